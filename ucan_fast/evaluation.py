"""Runs the model over token groups and measures: NLL, and how far an edit moved predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .batches import INTEGERS, Batch, eval_mode, group_index, read_batches
from .errors import UcanError
from .metrics import check_labels, kl_divergence, perplexity, prediction_shift, token_nll
from .progress import Progress, track

#: Sequences are run in slices so that one slice's fp32 logits stay below this many bytes.
LOGITS_BYTES = 256 * 2**20

#: Ends the message about labels out of range.
IGNORED_LABELS = "ignored positions are -100"

#: Puts an edit on the model for the length of a with block.
Edit = Callable[[], contextlib.AbstractContextManager]


@dataclass
class Loss:
    """A sum of negative log-likelihoods.

    Attributes:
        nll: nats, summed over tokens.
        tokens: how many were scored.
    """

    nll: float = 0.0
    tokens: int = 0

    @property
    def mean(self) -> float:
        """Nats per token; nan where none was scored."""
        return self.nll / self.tokens if self.tokens else float("nan")

    @property
    def perplexity(self) -> float:
        """exp of the mean; nan where no token was scored."""
        return perplexity(self.nll, self.tokens) if self.tokens else float("nan")


@dataclass
class Shift:
    """What an edit did to the scored forget positions.

    Attributes:
        loss: NLL under the edited model.
        kl: mean KL(original || edited), nats.
        prediction_shift: % of positions whose argmax changed.
    """

    loss: Loss
    kl: float
    prediction_shift: float


def group_loss(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    group: str = "retain",
    progress: Progress = None,
) -> Loss:
    """NLL of the group's tokens, each predicted from the tokens before it.

    A token is scored if it is in the group, a token of its sequence stands before it and, where
    the batch has ``labels``, its label is not -100. Encoder-decoder models score decoder tokens.
    """
    loss = Loss()
    with evaluating(model):
        for piece in track(scored_slices(model, batches, group), None, progress, f"{group} loss"):
            logits, labels = piece.run(model)
            loss.nll += float(token_nll(logits, labels).double().sum())
            loss.tokens += labels.numel()
    return loss


def forget_shift(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    edits: Mapping[str, Edit],
    progress: Progress = None,
) -> tuple[Loss, dict[str, Shift]]:
    """Run the original and every edited model over the forget tokens, slice by slice.

    Logits of two models are compared without ever holding a data set's worth of them.

    Returns:
        The original's loss, and one :class:`Shift` per edit. Without a scored position the
        figures are nan.
    """
    before = Loss()
    after = {name: Loss() for name in edits}
    kl_sum = dict.fromkeys(edits, 0.0)
    changed = dict.fromkeys(edits, 0.0)
    with evaluating(model):
        for piece in track(
            scored_slices(model, batches, "forget"), None, progress, "forget metrics"
        ):
            original, labels = piece.run(model)
            count = labels.numel()
            before.nll += float(token_nll(original, labels).double().sum())
            before.tokens += count
            for name, edit in edits.items():
                with edit():
                    edited, _ = piece.run(model)
                after[name].nll += float(token_nll(edited, labels).double().sum())
                after[name].tokens += count
                kl_sum[name] += kl_divergence(original, edited) * count
                changed[name] += prediction_shift(original, edited) * count
    total = before.tokens or float("nan")
    shifts = {
        name: Shift(after[name], kl_sum[name] / total, changed[name] / total) for name in edits
    }
    return before, shifts


@dataclass
class ScoredSlice:
    """Some sequences of a batch, and where they are scored.

    Attributes:
        inputs: what the model is called with.
        mask: bool ``[B, T]``, the positions whose logits are scored; every row has one.
        labels: token ids ``[P]`` of those positions, row by row.
        where: what messages call the batch.
    """

    inputs: dict[str, Any]
    mask: torch.Tensor
    labels: torch.Tensor
    where: str

    def run(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[P, V]`` and labels ``[P]`` of the scored positions.

        Raises:
            UcanError: a label is no token of the vocabulary.
        """
        output = model(**self.inputs)
        logits = output["logits"] if isinstance(output, Mapping) else output.logits
        # Prefix tuning and the like prepend positions; the last ones are the tokens'.
        logits = logits[:, -self.mask.shape[1] :]
        logits = logits[self.mask].float()
        check_labels(logits, self.labels, self.where, IGNORED_LABELS)
        return logits, self.labels


def scored_slices(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    group: str,
    only: Container[int] | None = None,
) -> Iterator[ScoredSlice]:
    """The sequences with a scored token of the group, in slices whose logits fit LOGITS_BYTES.

    Args:
        only: numbers of the sequences wanted, counted over all that have a scored token, in the
            order of the batches; None: all.

    Raises:
        UcanError: a batch is malformed (it is named by its index).
    """
    wanted = group_index(group)
    number = 0
    for batch in read_batches(model, batches, group):
        mask, labels = _scored(batch, wanted)
        rows = mask.any(1).nonzero().squeeze(1)
        first, number = number, number + len(rows)
        if only is not None:
            rows = rows[[index for index in range(len(rows)) if first + index in only]]
        per_row = mask.shape[1] * 4 * _vocabulary(model)
        step = max(1, LOGITS_BYTES // max(per_row, 1))
        # (split makes one empty part of no rows.)
        for part in rows.split(step) if len(rows) else ():
            inputs = _rows(batch.forward_inputs(), part, mask.shape[0])
            yield ScoredSlice(inputs, mask[part], labels[part][mask[part]], batch.where)


def _labels(batch: Batch, shape: torch.Size) -> torch.Tensor | None:
    """The batch's own labels, int64, or None."""
    labels = batch.inputs.get("labels")
    if labels is None:
        return None
    if not isinstance(labels, torch.Tensor):
        found = f"a {type(labels).__name__}"
    elif labels.shape != shape or labels.dtype not in INTEGERS:
        found = f"{labels.dtype} {tuple(labels.shape)}"
    else:
        return labels.long()
    raise UcanError(
        f"{batch.where}: labels must be a tensor of integers {tuple(shape)}, as the tokens are, "
        f"not {found}."
    )


def _scored(batch: Batch, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where logits are scored ``[B, T]``, and the label at every position, int64."""
    if batch.decoder_groups is not None:
        labels = _labels(batch, batch.decoder_groups.shape)
        if labels is None:
            raise UcanError(f"{batch.where}: scoring an encoder-decoder model needs labels.")
        return (batch.decoder_groups == wanted) & (labels != -100), labels
    tokens = _labels(batch, batch.groups.shape)
    if tokens is None and batch.inputs.get("input_ids") is not None:
        tokens = batch.inputs["input_ids"].long()
    if tokens is None:
        raise UcanError(f"{batch.where}: scoring needs input_ids or labels.")
    scored = (batch.groups == wanted) & (tokens != -100)
    # The logits at position t predict token t + 1.
    mask = torch.zeros_like(scored)
    mask[:, :-1] = scored[:, 1:]
    # Before the first token of a left-padded sequence there is padding, which predicts nothing.
    attended = batch.inputs.get("attention_mask")
    if attended is not None:
        mask &= attended.bool()
    return mask, tokens.roll(-1, dims=1)


def _rows(inputs: dict[str, Any], rows: torch.Tensor, batch_size: int) -> dict[str, Any]:
    return {
        key: value[rows]
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == batch_size
        else value
        for key, value in inputs.items()
    }


def _vocabulary(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "vocab_size", None) or 50_000)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and the modules' own modes back afterwards."""
    with eval_mode(model), torch.no_grad():
        yield
