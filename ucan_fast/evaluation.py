"""Runs the model over token groups and measures: NLL, and how far an edit moved predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapter import base_model
from .batches import INTEGERS, Batch, eval_mode, group_index, read_batches
from .errors import UcanError
from .metrics import check_labels, kl_divergence, perplexity, prediction_shift, token_nll
from .progress import Progress, track

#: Sequences are run in slices so that one slice's fp32 logits stay below this many bytes. A batch
#: with inputs that cannot be cut (images, ...) is run whole.
LOGITS_BYTES = 256 * 2**20

# Dimensions of what holds one row per sequence. Of other inputs it is not known: pixel_values may
# hold images or patches, and the position_ids of Qwen2-VL are [3, B, T].
_PER_SEQUENCE = {
    "input_ids": 2,
    "inputs_embeds": 3,
    "attention_mask": 2,
    "position_ids": 2,
    "token_type_ids": 2,
    "mm_token_type_ids": 2,
    "labels": 2,
    "decoder_input_ids": 2,
    "decoder_inputs_embeds": 3,
    "decoder_attention_mask": 2,
    "decoder_position_ids": 2,
}

#: Ends the message about labels out of range.
IGNORED_LABELS = "ignored positions are -100"

# Hugging Face's classes whose logits are no next token's, by the end of their names.
_OTHER_HEADS = ("ForMaskedLM", "Classification", "ForMultipleChoice", "ForQuestionAnswering")

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
        positions: bool ``[B, T]``, where its logits are scored.
        labels: token ids ``[P]`` of those positions, row by row.
        where: what messages call the batch.
    """

    inputs: dict[str, Any]
    positions: torch.Tensor
    labels: torch.Tensor
    where: str

    @property
    def mask(self) -> torch.Tensor:
        """The positions of the scored sequences alone, bool ``[S, T]``; every row has one."""
        return self.positions[self.positions.any(1)]

    def run(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[P, V]`` and labels ``[P]`` of the scored positions.

        Raises:
            UcanError: a label is no token of the vocabulary, or there are no logits per token.
        """
        logits = token_logits(model, self.inputs, self.positions.shape)[self.positions].float()
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
        UcanError: a batch is malformed (it is named by its index), or the model predicts no next
            token.
    """
    check_predicts_tokens(model)
    wanted = group_index(group)
    number = 0
    for batch in read_batches(model, batches, group):
        mask, labels = scored(batch, wanted)
        rows = mask.any(1).nonzero().squeeze(1)
        first, number = number, number + len(rows)
        if only is not None:
            rows = rows[[index for index in range(len(rows)) if first + index in only]]
        for inputs, taken, chosen in slices(model, batch, rows, mask.shape):
            positions = mask[taken] & chosen
            yield ScoredSlice(inputs, positions, labels[taken][positions], batch.where)


def slices(
    model: nn.Module, batch: Batch, rows: torch.Tensor, shape: torch.Size
) -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
    """The wanted rows of a batch, in slices whose logits fit LOGITS_BYTES, or in one.

    Args:
        rows: numbers of the wanted sequences ``[S]``.
        shape: ``[B, T]`` of the logits.

    Yields:
        What the model is called with; the numbers of the sequences in it ``[R]``; which of them
        are wanted, bool ``[R, 1]``. A batch that cannot be cut comes whole.
    """
    if not len(rows):
        return
    inputs = batch.forward_inputs()
    step = max(1, LOGITS_BYTES // max(shape[1] * 4 * _vocabulary(model), 1))
    parts = rows.split(step)
    everything = len(parts) == 1 and len(rows) == shape[0]
    if everything or not _can_be_cut(inputs, shape[0]):
        chosen = torch.zeros(shape[0], 1, dtype=torch.bool, device=rows.device)
        chosen[rows] = True
        yield inputs, torch.arange(shape[0], device=rows.device), chosen
        return
    for part in parts:
        yield _rows(inputs, part), part, torch.ones_like(part, dtype=torch.bool)[:, None]


def check_predicts_tokens(model: nn.Module) -> None:
    """Refuse models of other tasks, by the name of their class.

    A masked LM's logits have the right shape, but are those of the token at their own place.
    """
    names = [kind.__name__ for kind in type(base_model(model)).__mro__]
    if any(name.endswith(_OTHER_HEADS) for name in names):
        raise UcanError(_no_language_model(model, "its logits do not predict the next token"))


def token_logits(model: nn.Module, inputs: Mapping[str, Any], shape: torch.Size) -> torch.Tensor:
    """The model's logits ``[B, T, V]`` at the tokens, whose shape ``[B, T]`` is given.

    Raises:
        UcanError: the output has none of this form.
    """
    output = model(**inputs)
    logits = output.get("logits") if isinstance(output, Mapping) else None
    if logits is None:
        logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise UcanError(_no_language_model(model, "its output has no logits"))
    if logits.dim() != 3 or logits.shape[0] != shape[0] or logits.shape[1] < shape[1]:
        found = f"its logits are {tuple(logits.shape)} for tokens {tuple(shape)}"
        raise UcanError(_no_language_model(model, found))
    # Prefix tuning and the like prepend positions; the last ones are the tokens'.
    return logits[:, -shape[1] :]


def _no_language_model(model: nn.Module, found: str) -> str:
    return (
        f"{type(base_model(model)).__name__} cannot be scored: {found}. What is scored is the next "
        "token of a causal or encoder-decoder language model. method='attenuate' can do without: "
        "pass calibration=function (model -> loss) and evaluate=False."
    )


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


def scored(batch: Batch, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def _can_be_cut(inputs: Mapping[str, Any], sequences: int) -> bool:
    """Whether some of the sequences can be taken out of everything the model gets."""
    for key, value in inputs.items():
        if isinstance(value, torch.Tensor):
            known = value.dim() == _PER_SEQUENCE.get(key) and value.shape[0] in (1, sequences)
            if value.dim() and not known:
                return False
        elif value is not None and not isinstance(value, (bool, int, float, str)):
            return False
    return True


def _rows(inputs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    # One row for all sequences, such as position_ids [1, T], stays.
    return {
        key: value[rows]
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] > 1
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
