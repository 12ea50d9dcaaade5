"""Where a causal language model over item tokens ranks the item that came next.

The model is any Hugging Face causal LM whose vocabulary is an `ItemVocabulary`: its logits at one
position score all items for the next. Pad and bos columns never compete.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from ..adapter import base_model, module_device
from ..batches import eval_mode
from ..errors import UcanError
from ..metrics import target_ranks
from .data import InteractionLog, _row_mask
from .sequences import ItemVocabulary

__all__ = ["Verbalizer", "held_out_ranks", "next_item_ranks"]

# Scores that are ranked at a time: 2^22 in fp32 are 16 MiB, however long the sequences.
_CHUNK_ELEMENTS = 1 << 22


def next_item_ranks(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    group: int | None,
    vocabulary: ItemVocabulary,
    exclude_history: bool = True,
) -> torch.Tensor:
    """Ranks of the items of one group, each scored as the target of the position before it.

    `batches` as `sequence_batches` makes them (any iterable, read once). A case is an attended item
    token whose `token_groups` entry is `group` (0 forget, 1 retain; None takes both) and whose
    predecessor is attended. With `exclude_history`, items that occur earlier in the same sequence
    do not compete; the target itself always does, also when it occurred before.

    Returns int64 `[cases]` on the CPU, in the order of batches, rows and positions; empty without
    cases. Runs in eval mode without gradients; the model's mode is as before afterwards.
    UcanError: batches without `token_groups`, a model of another vocabulary, or NaN scores.
    """
    parts = []
    for ranks, groups in _scored_positions(model, batches, vocabulary, exclude_history):
        parts.append(ranks[groups >= 0 if group is None else groups == group])
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device="cpu")


def held_out_ranks(
    model: torch.nn.Module,
    train_log: InteractionLog,
    heldout_log: InteractionLog,
    *,
    vocabulary: ItemVocabulary,
    rows: np.ndarray | None = None,
    batch_size: int = 64,
    max_length: int = 100,
    exclude_history: bool = True,
) -> torch.Tensor:
    """Ranks of held-out items, each predicted from its user's whole history in `train_log`.

    One case for every row of `heldout_log` where `rows` (bool, one per row; None: all) is set. The
    model sees `bos` and the user's last `max_length` items; with `exclude_history` none of the
    user's items in `train_log` competes, except the target itself. To test with the validation
    item in the history, pass `train.join(validation)`.

    Returns int64 `[cases]` on the CPU, in the order of the rows. Modes and errors as in
    `next_item_ranks`; also UcanError when the two logs do not share their ids.
    """
    if (
        train_log.user_ids != heldout_log.user_ids
        or train_log.item_ids != heldout_log.item_ids
        or vocabulary.n_items != heldout_log.n_items
    ):
        raise UcanError(
            "held_out_ranks: train_log, heldout_log and vocabulary do not cover the same users and "
            "items; cut both logs out of one (leave_one_out) and use ItemVocabulary(log.n_items)."
        )
    if rows is None:
        rows = np.ones(len(heldout_log), dtype=bool)
    cases = np.flatnonzero(_row_mask(rows, heldout_log, "rows"))
    count = np.bincount(train_log.user, minlength=train_log.n_users)
    end = np.cumsum(count)
    ranks = torch.zeros(len(cases), dtype=torch.int64, device="cpu")
    # Cases of similar length run together: less padding, fewer distinct last positions.
    order = np.argsort(np.minimum(count[heldout_log.user[cases]], max_length), kind="stable")
    device = module_device(model)
    with eval_mode(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            users = heldout_log.user[cases[places]]
            size = np.minimum(count[users], max_length)[:, None]
            column = np.arange(int(size.max()) + 1)[None, :]
            is_item = (column >= 1) & (column <= size)
            row = np.where(is_item, end[users][:, None] - size + column - 1, 0)
            tokens = vocabulary.token(train_log.item)
            input_ids = np.full(is_item.shape, vocabulary.pad, dtype=np.int64)
            if len(tokens):
                input_ids = np.where(is_item, tokens[row], input_ids)
            input_ids[:, 0] = vocabulary.bos
            batch = {
                "input_ids": torch.from_numpy(input_ids).to(device),
                "attention_mask": torch.from_numpy((column <= size).astype(np.int64)).to(device),
            }
            last = torch.from_numpy(size[:, 0]).to(device)
            logits = _logits_at(model, batch, last)
            scores = _item_scores(logits, vocabulary)
            exclude = None
            if exclude_history:
                exclude = torch.zeros(scores.shape, dtype=torch.bool, device="cpu")
                for i, user in enumerate(users):
                    seen = train_log.item[end[user] - count[user] : end[user]]
                    exclude[i, torch.from_numpy(seen)] = True
                exclude = exclude.to(device)
            target = torch.from_numpy(heldout_log.item[cases[places]]).to(device)
            ranks[torch.from_numpy(places)] = target_ranks(scores, target, exclude).cpu()
    return ranks


class Verbalizer:
    """Scores of a few answer letters at the end of each prompt, without the full head.

    `Verbalizer(model, ids)(batch)` returns fp32 `[B, len(ids)]`: the logits of the tokens `ids` at
    the last attended position of each row, whichever side is padded. `batch` is what the model
    takes (`labels` and `token_groups` are ignored). The backbone runs once and only `len(ids)` rows
    of `lm_head` are multiplied, instead of the vocabulary at every position. Mode and gradients are
    the caller's.

    Where that would not be the model's own answer the model's full forward is used instead, with
    `logits_to_keep` restricted to the last positions where it knows that argument: an `lm_head`
    that is no plain Linear (adapted by LoRA, quantised) or has hooks, logits that the model scales
    or soft-caps, a PEFT method that acts outside of the backbone's layers. `full_head` then holds
    the reason, else None. What the configuration does not reveal is found on the first batch, whose
    first row is computed both ways.

    UcanError: an encoder-decoder model, no or unknown token ids, or a row without attended tokens.
    """

    def __init__(self, model: torch.nn.Module, letter_token_ids: Sequence[int]) -> None:
        base = base_model(model)
        config = getattr(base, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise UcanError(
                f"Verbalizer: {type(base).__name__} is an encoder-decoder model; its answer does "
                "not follow at the end of the prompt. Use a causal language model."
            )
        size = getattr(config, "vocab_size", None)
        ids = list(letter_token_ids)
        if not ids or (size is not None and not (min(ids) >= 0 and max(ids) < size)):
            raise UcanError(
                f"Verbalizer: token ids {ids} for a vocabulary of {size}; pass the ids of the "
                "letters (letter_token_ids), with the tokenizer that belongs to the model."
            )
        self.model = model
        self.ids = ids
        self.full_head = _why_full_head(model, base)
        self._checked = self.full_head is not None

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        inputs = {
            name: value for name, value in batch.items() if name not in ("labels", "token_groups")
        }
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"]
        mask = torch.ones_like(tokens) if mask is None else mask
        if not bool(mask.bool().any(dim=1).all()):
            raise UcanError("Verbalizer: a row has no attended token; drop it from the batch.")
        column = torch.arange(tokens.shape[1], device=tokens.device)
        last = torch.where(mask.bool(), column, -1).amax(dim=1)
        if not self._checked:
            self._check({name: value[:1] for name, value in inputs.items()}, last[:1])
        if self.full_head is not None:
            return self._by_full_head(inputs, last)
        return self._by_rows(inputs, last)

    def _by_rows(self, inputs: Mapping[str, torch.Tensor], last: torch.Tensor) -> torch.Tensor:
        base = base_model(self.model)
        backbone = base.base_model
        hidden = backbone(**inputs, **_no_cache(backbone))[0]
        hidden = hidden[torch.arange(len(last), device=last.device), last]
        # The rows are read at every call: unlearning changes weights in place.
        head = base.get_output_embeddings()
        bias = None if head.bias is None else head.bias[self.ids]
        hidden = hidden.to(head.weight.device)
        return torch.nn.functional.linear(hidden, head.weight[self.ids], bias).float()

    def _by_full_head(self, inputs: Mapping[str, torch.Tensor], last: torch.Tensor) -> torch.Tensor:
        return _logits_at(self.model, inputs, last)[:, self.ids].float()

    def _check(self, inputs: Mapping[str, torch.Tensor], last: torch.Tensor) -> None:
        self._checked = True
        with eval_mode(self.model), torch.no_grad():  # dropout would tell the two ways apart
            own = self._by_full_head(inputs, last)
            rows = self._by_rows(inputs, last)
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.model.parameters())
        tolerance = (2e-2 if half else 1e-4) * float(own.abs().max().clamp(min=1e-30))
        if not torch.allclose(own, rows.to(own.device), rtol=0.0, atol=tolerance, equal_nan=True):
            self.full_head = "the model's own logits differ from those of the bare lm_head"


def _scored_positions(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    vocabulary: ItemVocabulary,
    exclude_history: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ranks, groups), both int64 on the CPU, for chunks of the positions with group 0 or 1."""
    if not isinstance(vocabulary, ItemVocabulary):
        raise UcanError(
            f"vocabulary must be an ItemVocabulary (which tokens are items), not "
            f"{type(vocabulary).__name__}: ItemVocabulary(number of items)."
        )
    device = module_device(model)
    with eval_mode(model), torch.no_grad():
        for batch in batches:
            if "token_groups" not in batch:
                raise UcanError(
                    "next_item_ranks: a batch has no `token_groups`; make batches with "
                    "sequence_batches, or add one group (0, 1 or -1) per token."
                )
            groups = batch["token_groups"].to(device)
            inputs = {
                name: value.to(device)
                for name, value in batch.items()
                if name not in ("token_groups", "labels")
            }
            tokens = inputs["input_ids"]
            attended = inputs.get("attention_mask", torch.ones_like(tokens)).bool()
            items = vocabulary.item(tokens)
            is_item = attended & (items >= 0)
            scored = is_item[:, 1:] & attended[:, :-1] & (groups[:, 1:] >= 0)
            case_row, case_column = scored.nonzero(as_tuple=True)
            case_column = case_column + 1
            if len(case_row) == 0:
                continue
            logits = model(**inputs, **_no_cache(model)).logits
            width = tokens.shape[1]
            # History items outside of the case's past go to an extra column that is cut off.
            step = max(1, _CHUNK_ELEMENTS // (vocabulary.n_items + width))
            for start in range(0, len(case_row), step):
                row, column = case_row[start : start + step], case_column[start : start + step]
                scores = _item_scores(logits[row, column - 1], vocabulary)
                exclude = None
                if exclude_history:
                    past = torch.arange(width, device=device)[None, :] < column[:, None]
                    seen = torch.where(past & is_item[row], items[row], vocabulary.n_items)
                    exclude = torch.zeros(
                        len(row), vocabulary.n_items + 1, dtype=torch.bool, device=device
                    )
                    exclude = exclude.scatter_(1, seen, True)[:, :-1]
                ranks = target_ranks(scores, items[row, column], exclude)
                yield ranks.cpu(), groups[row, column].long().cpu()


def _item_scores(logits: torch.Tensor, vocabulary: ItemVocabulary) -> torch.Tensor:
    if logits.shape[-1] < vocabulary.size:
        raise UcanError(
            f"The model scores {logits.shape[-1]} tokens, but the vocabulary has "
            f"{vocabulary.size} ({vocabulary.n_items} items); this model was not made for it."
        )
    # Columns beyond the vocabulary are padding of the embedding matrix.
    return logits[..., vocabulary.first_item : vocabulary.size]


def _logits_at(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], position: torch.Tensor
) -> torch.Tensor:
    """Logits `[B, V]` at one position per row, computing no more of the head than needed."""
    row = torch.arange(len(position), device=position.device)
    options = _no_cache(model)
    if "logits_to_keep" not in _arguments(model):
        return model(**batch, **options).logits[row, position]
    kept, place = torch.unique(position, return_inverse=True)
    return model(**batch, **options, logits_to_keep=kept).logits[row, place]


def _no_cache(model: torch.nn.Module) -> dict[str, bool]:
    # Keys and values of a batch that is never continued would only take memory.
    return {"use_cache": False} if "use_cache" in _arguments(model) else {}


def _arguments(model: torch.nn.Module) -> Mapping[str, inspect.Parameter]:
    # PEFT's own forward takes **kwargs, so the model that it wraps is asked.
    return inspect.signature(base_model(model).forward).parameters


# Configuration fields by which model families scale or cap their logits after lm_head.
_LOGIT_FIELDS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


def _why_full_head(model: torch.nn.Module, base: torch.nn.Module) -> str | None:
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, Mapping) else ():
        if getattr(config, "is_prompt_learning", False):
            return f"{config.peft_type} acts on the model's inputs, outside of the backbone"
    backbone = getattr(base, "base_model", base)
    if backbone is base or not hasattr(base, "get_output_embeddings"):
        return f"{type(base).__name__} has no backbone that can be told from its head"
    head = base.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return f"lm_head is a {type(head).__name__}, not a plain Linear"
    if head._forward_hooks or head._forward_pre_hooks:
        return "lm_head has forward hooks"
    for name in _LOGIT_FIELDS:
        if getattr(base.config, name, None) not in (None, 1, 1.0):
            return f"the model's logits are changed after lm_head ({name})"
    return None
