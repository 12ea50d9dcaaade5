"""Does forgotten knowledge come back: by a few steps of training, or by rounding the adapter?

Both edit an adapter's weights in place for a while; afterwards, and on any error, every weight is
as it was, bit by bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapter import adapter_parameters, resolve_adapter, unwrap
from .batches import eval_mode, reusable
from .config import SEEDS, is_seed
from .errors import UcanError
from .evaluation import Loss, ScoredSlice, group_loss, scored_slices
from .factor_pass import differentiable, gradients, trainable
from .membership import MIN_SEQUENCES, Auc, SequenceScores, auc, sequence_scores
from .metrics import token_nll
from .progress import Progress, track
from .weights import ParameterEdit

#: What :func:`rounded_losses` rounds an adapter to.
PRECISIONS = ("fp16", "bf16", "int8", "int4")
_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Symmetric integers: -127..127 and -7..7.
_LEVELS = {"int8": 127, "int4": 7}


@dataclass(frozen=True)
class Relearning:
    """What training on a part of the forget set brought back of the rest.

    Attributes:
        steps, learning_rate, seed: of the training.
        trained, others: sequences trained on, and the others, which everything below is about.
        nll_before, nll_after: nats per token.
        auc_before, auc_after: of the attack "loss"; None without enough sequences.
    """

    steps: int
    learning_rate: float
    seed: int
    trained: int
    others: int
    nll_before: float
    nll_after: float
    auc_before: Auc | None = None
    auc_after: Auc | None = None


def relearn(
    model: nn.Module,
    forget: Iterable[Mapping[str, Any]],
    *,
    holdout: Iterable[Mapping[str, Any]] | None = None,
    adapter: str | None = None,
    steps: int = 10,
    fraction: float = 0.1,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Progress = None,
) -> Relearning:
    """Train the adapter on some forget sequences, measure the others, and take it back.

    Adam (torch's defaults, on fp32 copies of the adapter's weights, in eval mode), every step on
    the mean NLL of all drawn tokens. A relearning attack as in arXiv 2406.13356: what comes back on
    sequences that were *not* trained on was hidden, not removed, as far as it comes back faster
    than in a model that never knew it.

    Args:
        forget: group 0 of it; needed several times.
        holdout: never-seen data, for the AUC; group 0 of it, or all of a plain batch.
        steps: 0 measures only.
        fraction: of the sequences to train on, at least one; drawn by ``seed`` from their order.

    Raises:
        UcanError: an option is out of range, fewer than 2 forget sequences, the model cannot be
            differentiated, or training diverged. Every weight is as it was.
    """
    _check_options(steps, fraction, learning_rate)
    check_seed(seed)
    model = unwrap(model)
    adapter = resolve_adapter(model, adapter)
    forget = reusable(forget, "forget")
    holdout = None if holdout is None else reusable(holdout, "holdout")
    count = sum(len(piece.mask) for piece in scored_slices(model, forget, "forget"))
    drawn, others = draw_sequences(count, fraction, seed)

    def measure() -> tuple[float, Auc | None]:
        members = sequence_scores(model, forget, attacks=("loss",), only=others)
        return members.mean_nll, _auc(model, members, holdout)

    before = after = measure()
    edit = ParameterEdit(adapter_parameters(model, adapter))
    try:
        if steps:
            pieces = list(scored_slices(model, forget, "forget", drawn))
            _train(model, adapter, pieces, steps, learning_rate, progress)
            after = measure()
    finally:
        edit.restore()
    return Relearning(
        steps,
        learning_rate,
        seed,
        len(drawn),
        len(others),
        before[0],
        after[0],
        before[1],
        after[1],
    )


def draw_sequences(count: int, fraction: float, seed: int) -> tuple[set[int], set[int]]:
    """Numbers of the sequences to train on (at least one) and of the others (at least one).

    Raises:
        UcanError: there are fewer than 2.
    """
    if count < 2:
        raise UcanError(
            f"relearning needs at least 2 forget sequences, one to train on and another to "
            f"measure; there {'is 1' if count == 1 else 'are none'}."
        )
    order = torch.randperm(
        count, generator=torch.Generator().manual_seed(seed), device="cpu"
    ).tolist()
    size = min(max(1, round(fraction * count)), count - 1)
    return set(order[:size]), set(order[size:])


def rounded_losses(
    model: nn.Module,
    forget: Iterable[Mapping[str, Any]],
    *,
    adapter: str | None = None,
    precisions: Sequence[str] = PRECISIONS,
    progress: Progress = None,
) -> dict[str, Loss]:
    """The forget NLL with the adapter's weights rounded, by precision.

    Unlearning that moves weights by less than a rounding step is undone by it (arXiv 2410.16454).

    Args:
        forget: group 0 of it; needed once per precision.
        precisions: of ``fp16``, ``bf16``, ``int8``, ``int4``; see :func:`round_weight`.

    Raises:
        UcanError: an unknown precision, or a batch is malformed. Every weight is as it was.
    """
    model = unwrap(model)
    adapter = resolve_adapter(model, adapter)
    forget = reusable(forget, "forget")
    losses = {}
    for precision in precisions:
        with rounded_adapter(model, adapter, precision):
            losses[precision] = group_loss(model, forget, "forget", progress)
    return losses


@contextlib.contextmanager
def rounded_adapter(model: nn.Module, adapter: str, precision: str) -> Iterator[None]:
    """The adapter's weights rounded, for the length of a with block.

    Raises:
        UcanError: an unknown precision.
    """
    parameters = adapter_parameters(unwrap(model), adapter)
    edit = ParameterEdit(parameters)
    try:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.copy_(round_weight(parameter, precision))
        yield
    finally:
        edit.restore()


def round_weight(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """The values that are left of a weight, in its own dtype.

    ``fp16`` and ``bf16``: rounded to that type. ``int8`` and ``int4``: every row of a matrix ``w``
    becomes ``s round(w / s)`` with ``s = max|w| / 127`` or ``/ 7``; vectors stay.

    Raises:
        UcanError: another precision.
    """
    if precision in _FLOATS:
        return weight.detach().to(_FLOATS[precision]).to(weight.dtype)
    if precision not in _LEVELS:
        raise UcanError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}.")
    if weight.dim() < 2:
        return weight.detach().clone()
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    step = wide.abs().amax(dim=-1, keepdim=True) / _LEVELS[precision]
    # A row of zeros stays one.
    whole = (wide / torch.where(step == 0, torch.ones_like(step), step)).round()
    return (whole * step).to(weight.dtype)


def _check_options(steps: int, fraction: float, learning_rate: float) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise UcanError(f"steps must be a whole number of at least 0, not {steps!r}.")
    if not 0 < fraction < 1:
        raise UcanError(f"fraction must lie between 0 and 1, not {fraction!r}.")
    if not 0 < learning_rate < math.inf:
        raise UcanError(f"learning_rate must be positive, not {learning_rate!r}.")


def check_seed(seed: Any) -> None:
    """Refuse what torch's generators do not take.

    Raises:
        UcanError: not an integer of 64 bits, with or without a sign.
    """
    if not is_seed(seed):
        raise UcanError(f"seed must be {SEEDS}, not {seed!r}.")


def _auc(
    model: nn.Module, members: SequenceScores, holdout: Iterable[Mapping[str, Any]] | None
) -> Auc | None:
    if holdout is None or len(members.tokens) < MIN_SEQUENCES:
        return None
    nonmembers = sequence_scores(model, holdout, attacks=("loss",))
    if len(nonmembers.tokens) < MIN_SEQUENCES:
        return None
    return auc(members.scores["loss"], nonmembers.scores["loss"])


def _train(
    model: nn.Module,
    adapter: str,
    pieces: list[ScoredSlice],
    steps: int,
    learning_rate: float,
    progress: Progress,
) -> None:
    """Leaves the trained weights in the model."""
    parameters = list(adapter_parameters(model, adapter).values())
    # Small steps would vanish in a half-precision weight, and .grad of the model's is not ours.
    masters = [
        p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in parameters
    ]
    optimizer = torch.optim.Adam(masters, lr=learning_rate)
    total = sum(piece.labels.numel() for piece in pieces)
    with eval_mode(model), trainable(model, parameters), differentiable(model):
        for step in track(range(steps), range(steps), progress, "relearning"):
            for master in masters:
                master.grad = torch.zeros_like(master)
            loss = 0.0
            for piece in pieces:
                with torch.enable_grad():
                    part = token_nll(*piece.run(model)).sum() / total
                    found = gradients(part, parameters)
                loss += float(part.detach())
                for master, gradient in zip(masters, found, strict=True):
                    if gradient is not None:
                        master.grad += gradient
            if not math.isfinite(loss):
                raise UcanError(
                    f"relearning diverged: the loss is {loss} at step {step + 1} of {steps}; use a "
                    "smaller learning_rate."
                )
            optimizer.step()
            with torch.no_grad():
                for parameter, master in zip(parameters, masters, strict=True):
                    parameter.copy_(master)
