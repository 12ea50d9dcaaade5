"""Where a causal language model over item tokens ranks the item that came next.

The model is any Hugging Face causal LM whose vocabulary is an `ItemVocabulary`: its logits at one
position score all items for the next. Pad and bos columns never compete.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from ..errors import UcanError
from ..metrics import target_ranks
from .data import InteractionLog, _row_mask
from .sequences import ItemVocabulary

__all__ = ["held_out_ranks", "next_item_ranks"]

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
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


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
    ranks = torch.zeros(len(cases), dtype=torch.int64)
    # Cases of similar length run together: less padding, fewer distinct last positions.
    order = np.argsort(np.minimum(count[heldout_log.user[cases]], max_length), kind="stable")
    with _evaluation(model) as device:
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
                exclude = torch.zeros(scores.shape, dtype=torch.bool)
                for i, user in enumerate(users):
                    seen = train_log.item[end[user] - count[user] : end[user]]
                    exclude[i, torch.from_numpy(seen)] = True
                exclude = exclude.to(device)
            target = torch.from_numpy(heldout_log.item[cases[places]]).to(device)
            ranks[torch.from_numpy(places)] = target_ranks(scores, target, exclude).cpu()
    return ranks


def _scored_positions(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    vocabulary: ItemVocabulary,
    exclude_history: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ranks, groups), both int64 on the CPU, for chunks of the positions with group 0 or 1."""
    with _evaluation(model) as device:
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
            logits = model(**inputs).logits
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
    if not _takes_logits_to_keep(model):
        return model(**batch).logits[row, position]
    kept, place = torch.unique(position, return_inverse=True)
    return model(**batch, logits_to_keep=kept).logits[row, place]


def _takes_logits_to_keep(model: torch.nn.Module) -> bool:
    # PEFT's own forward takes **kwargs, so the model that it wraps is asked.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


@contextmanager
def _evaluation(model: torch.nn.Module) -> Iterator[torch.device]:
    """Eval mode without gradients; every submodule's own mode comes back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield _device_of(model)
    finally:
        for module in training:
            module.training = True


def _device_of(model: torch.nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
