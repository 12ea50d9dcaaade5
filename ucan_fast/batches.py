"""Batches: what the model takes, and which group every token belongs to."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .adapter import base_config, base_model, module_device, named_modules, unwrap
from .errors import UcanError, warn
from .interrupts import finished

FORGET, RETAIN, IGNORED = 0, 1, -1
GROUPS = {"forget": FORGET, "retain": RETAIN}
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_OURS = ("token_groups", "decoder_token_groups")
# What torch looks embeddings up by.
_IDS = (torch.int64, torch.int32)
# Ids that stand for an image and the like: some models replace them before they embed.
_PLACEHOLDER = re.compile(r"(image|video|audio|vision|speech).*token_(id|index)$")


@dataclass(frozen=True)
class Batch:
    """One batch, checked.

    Attributes:
        inputs: keyword arguments for the model, on its device; ours are taken out.
        groups: int8 ``[B, T]`` of the (encoder's) tokens: 0 forget, 1 retain, -1 ignored.
        decoder_groups: the same for the decoder's tokens of an encoder-decoder model.
        where: what messages call it.
        source: the batch as it was passed.
    """

    inputs: dict[str, Any]
    groups: torch.Tensor
    decoder_groups: torch.Tensor | None = None
    where: str = "the batch"
    source: Mapping[str, Any] = field(default_factory=dict)

    def forward_inputs(self) -> dict[str, Any]:
        """What the model is called with when no loss is wanted from it."""
        inputs = dict(self.inputs)
        # Encoder-decoder models build their decoder's input from the labels.
        if self.decoder_groups is None or inputs.get("decoder_input_ids") is not None:
            inputs.pop("labels", None)
        return inputs


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, and every module's own mode back afterwards."""
    wrapped = unwrap(model) is not model
    modules = model.modules() if wrapped else (m for _, m in named_modules(model))
    training = [m for m in modules if m.training]
    try:
        # Not model.eval(): some modules override it, and the way back must be exact.
        with finished():
            for module in training:
                module.training = False
        yield
    finally:
        with finished():
            for module in training:
                module.training = True


def group_index(group: str) -> int:
    """0 for ``"forget"``, 1 for ``"retain"``.

    Raises:
        UcanError: any other word.
    """
    if group not in GROUPS:
        raise UcanError(f"group must be 'forget' or 'retain', not {group!r}.")
    return GROUPS[group]


def check_iterable(batches: object, what: str) -> None:
    """Refuse a single batch (or worse) where batches are wanted."""
    if isinstance(batches, (Mapping, torch.Tensor, str)):
        raise UcanError(f"{what} must be an iterable of batches, not one {type(batches).__name__}.")
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise UcanError(f"{what} must be an iterable of batches, not {type(batches).__name__}.")


def reusable(batches: Iterable[Mapping[str, Any]], what: str) -> Iterable[Mapping[str, Any]]:
    """The same batches, in a form that can be run through more than once.

    A one-shot iterator is read into a list, with a notice; it would be silently empty the second
    time.
    """
    check_iterable(batches, what)
    if isinstance(batches, Iterator):
        kept = list(batches)
        warn(
            f"{what} is a one-shot iterator and is needed more than once: its {len(kept)} batches "
            "were read into memory. Pass a list or a DataLoader to avoid that.",
        )
        return kept
    return batches


def read_batches(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    group: str,
    *,
    tell_padding: bool = False,
) -> Iterator[Batch]:
    """Check every batch and find the group of every token.

    Args:
        tell_padding: warn once where padding counts, for want of a mask.

    Raises:
        UcanError: a batch is no mapping, lacks input_ids, holds ids that the model does not embed,
            or its masks or groups do not fit. The batch is named by its index.
    """
    check_iterable(batches, "batches")
    default = group_index(group)
    known = _Known.of(model)
    told = not tell_padding
    for index, batch in enumerate(batches):
        read = _read(batch, f"batch {index}", default, known)
        if not told and (padding := known.unmarked_padding(read)):
            told = True
            warn(
                f"{read.where} has no attention_mask, and {padding} of its tokens are padding by "
                f"their id ({known.padding}): they count as {group} tokens of the statistics. Pass "
                "the mask."
            )
        yield read


def holding(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], group: str, wanted: int
) -> Iterator[Mapping[str, Any]]:
    """The batches with tokens of another group than they were passed as, those tokens alone marked.

    Args:
        batches: passed as ``group``, which unmarked tokens are in.
        wanted: the group that is looked for, FORGET or RETAIN.

    Yields:
        Copies with ``token_groups`` (and ``decoder_token_groups``) in which every other token is
        ignored, whatever they are passed as.

    Raises:
        UcanError: as :func:`read_batches`.
    """
    default, known = group_index(group), _Known.of(model)
    for index, batch in enumerate(batches):
        # Without a mark all of it is in the group it was passed as: nothing to look at.
        if isinstance(batch, Mapping) and all(batch.get(key) is None for key in _OURS):
            continue
        checked = _read(batch, f"batch {index}", default, known)
        found = dict(zip(_OURS, (checked.groups, checked.decoder_groups), strict=True))
        found = {key: groups for key, groups in found.items() if groups is not None}
        if any((groups == wanted).any() for groups in found.values()):
            marked = {key: g.where(g == wanted, IGNORED) for key, g in found.items()}
            yield {**checked.source, **marked}


@dataclass(frozen=True)
class _Known:
    """What batches are checked against.

    Attributes:
        embedded: how many tokens the (encoder's) input embeddings hold; None: unknown.
        decoder_embedded: the same of the decoder.
        placeholders: token ids that the model may replace before it embeds.
        padding: the id of padding; None: the model names none.
        closing: ids that may stand at either end of a sequence.
    """

    device: torch.device
    encoder_decoder: bool
    embedded: int | None
    decoder_embedded: int | None
    placeholders: tuple[int, ...]
    padding: int | None = None
    closing: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> _Known:
        base, config = base_model(model), base_config(model)
        two_sided = bool(getattr(config, "is_encoder_decoder", False))
        values = getattr(config, "__dict__", {}).items()
        placeholders = tuple(v for k, v in values if _PLACEHOLDER.search(k) and isinstance(v, int))
        decoder = _embedded(base, "get_decoder") if two_sided else None
        padding, bos, eos = (getattr(config, f"{n}_token_id", None) for n in ("pad", "bos", "eos"))
        return cls(
            module_device(model),
            two_sided,
            _embedded(base),
            decoder,
            placeholders,
            padding if isinstance(padding, int) else None,
            (bos, *eos) if isinstance(eos, (list, tuple)) else (bos, eos),
        )

    def unmarked_padding(self, batch: Batch) -> int:
        """Tokens that have the id of padding at an end of their sequence, and no mask.

        Where padding has the id of a token that closes sequences, one alone is taken for that.
        """
        ids = batch.source.get("input_ids")
        given = [batch.source.get(key) for key in ("attention_mask", *_OURS)]
        if ids is None or self.padding is None or any(value is not None for value in given):
            return 0
        padding = (ids == self.padding).to(torch.int64)
        alone = int(self.padding in self.closing)
        found = torch.zeros_like(padding, dtype=torch.bool)
        for run in (padding.cumprod(1), padding.flip(1).cumprod(1).flip(1)):
            found |= run.bool() & (run.sum(1, keepdim=True) > alone)
        return int(found.sum())

    def check_ids(self, ids: torch.Tensor, key: str, where: str, embedded: int | None) -> None:
        """Refuse what an embedding cannot look up: on a GPU that would end the whole process."""
        if not ids.numel():
            return
        if ids.dtype not in _IDS:
            raise UcanError(
                f"{where}: {key} must be int64 or int32 token ids, not {ids.dtype}; convert them "
                "with .long()."
            )
        if embedded is None:
            return
        low, high = torch.stack((ids.min(), ids.max())).tolist()
        if low >= 0 and high < embedded:
            return
        known = torch.tensor(self.placeholders, dtype=ids.dtype, device=ids.device)
        unknown = ids[((ids < 0) | (ids >= embedded)) & ~torch.isin(ids, known)]
        if unknown.numel():
            raise UcanError(
                f"{where}: {key} holds the token id {int(unknown[0])}, but the model embeds "
                f"{embedded} tokens, 0..{embedded - 1}. Use the tokenizer that belongs to the "
                "model, and one of its ids for padding."
            )


def _embedded(base: nn.Module, *part: str) -> int | None:
    """Rows of the input embeddings of a Hugging Face model (or a part of it), None if unknown."""
    module = base
    try:
        for getter in (*part, "get_input_embeddings"):
            module = getattr(module, getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None  # models of other libraries: ids are then the model's own to refuse
    while isinstance(module, nn.Module) and not isinstance(module, nn.Embedding):
        # PEFT's wrappers.
        module = module._modules.get("base_layer", module._modules.get("original_module"))
    if module is None:
        return None
    # A weight may have been replaced by a larger one, or packed.
    weight = module.weight
    whole = weight.dim() == 2 and weight.shape[1] == module.embedding_dim
    return weight.shape[0] if whole else module.num_embeddings


def _read(batch: Mapping[str, Any], where: str, default: int, known: _Known) -> Batch:
    device = known.device
    if not isinstance(batch, Mapping):
        raise UcanError(f"{where} is a {type(batch).__name__}; a batch is a dict of tensors.")
    tokens = batch.get("input_ids")
    if tokens is None and batch.get("inputs_embeds") is not None:
        tokens = batch["inputs_embeds"][..., 0]
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
        shape = tuple(tokens.shape) if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise UcanError(f"{where}: input_ids must be a tensor [batch, tokens], not {shape}.")
    if batch.get("input_ids") is not None:
        known.check_ids(tokens, "input_ids", where, known.embedded)
    groups = _groups(
        batch.get("token_groups"), batch.get("attention_mask"), tokens.shape, default, where, ""
    )
    decoder_groups = None
    if known.encoder_decoder:
        decoder_tokens, labels = batch.get("decoder_input_ids"), batch.get("labels")
        key = "labels" if decoder_tokens is None else "decoder_input_ids"
        if decoder_tokens is None:
            decoder_tokens = labels
        for given in (decoder_tokens, decoder_tokens if labels is None else labels):
            if not isinstance(given, torch.Tensor) or given.dim() != 2:
                raise UcanError(
                    f"{where}: an encoder-decoder model needs decoder_input_ids or labels "
                    "[batch, tokens]."
                )
        ids = decoder_tokens[decoder_tokens != -100] if key == "labels" else decoder_tokens
        known.check_ids(ids, key, where, known.decoder_embedded)
        mask = batch.get("decoder_attention_mask")
        if mask is None and labels is not None:
            mask = labels != -100
        decoder_groups = _groups(
            batch.get("decoder_token_groups"),
            mask,
            decoder_tokens.shape,
            default,
            where,
            "decoder_",
        ).to(device)
    elif batch.get("decoder_token_groups") is not None:
        raise UcanError(f"{where}: decoder_token_groups, but the model has no decoder of its own.")
    inputs = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key not in _OURS
    }
    return Batch(inputs, groups.to(device), decoder_groups, where, batch)


def _groups(
    given: torch.Tensor | None,
    mask: torch.Tensor | None,
    shape: torch.Size,
    default: int,
    where: str,
    prefix: str,
) -> torch.Tensor:
    if mask is not None and (
        not isinstance(mask, torch.Tensor) or tuple(mask.shape) != tuple(shape)
    ):
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise UcanError(
            f"{where}: {prefix}attention_mask is {got}, the tokens are {tuple(shape)}; pass the "
            "plain 2-D mask as a tensor."
        )
    if given is None:
        groups = torch.full(tuple(shape), default, dtype=torch.int8, device="cpu")
    else:
        if not isinstance(given, torch.Tensor) or tuple(given.shape) != tuple(shape):
            got = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
            raise UcanError(
                f"{where}: {prefix}token_groups is {got}, but the tokens are {tuple(shape)}; "
                "every token needs its own group."
            )
        # As Python's integers: -1 as an unsigned one would be 255. bool is refused too: a forget
        # mask would be read the wrong way round (0 is forget).
        if given.dtype not in INTEGERS or (
            given.numel() and not (int(given.min()) >= IGNORED and int(given.max()) <= RETAIN)
        ):
            ordered = given.numel() and not given.is_complex()
            values = f" in [{given.min()}, {given.max()}]" if ordered else ""
            raise UcanError(
                f"{where}: {prefix}token_groups must be integers 0 (forget), 1 (retain) or "
                f"-1 (ignored), not {given.dtype}{values}."
            )
        groups = given.to(torch.int8)
    if mask is not None:
        groups = torch.where(mask.to(groups.device).bool(), groups, IGNORED)
    return groups
