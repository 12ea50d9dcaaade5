"""Unlearning by training: gradient ascent, GradDiff and NPO, on the adapter alone.

One step takes one batch of D_f and, where D_r is used, one batch of D_r or more, each set in
rounds of seeded order. The model stays in eval mode: without dropout a state depends on nothing but
the seed, and the reference of KL and NPO is the same function. (The authors train in train mode,
with LoRA dropout 0.05.) Otherwise as in open-unlearning (locuslab/open-unlearning@d3d7cf9,
``src/trainer/unlearn/``): AdamW, no weight decay, gradients clipped to norm 1. The authors weigh
both terms of the loss alike and take as much of D_r as of D_f in a step; α can be set there as it
can here, and a heavier term takes more batches, lest a step fit one of them. The learning rate is
constant, and every step on the ladder is a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ucan_fast.batches import FORGET, RETAIN

from .case import Case, Clock, State, as_before
from .losses import Run, Scored, kl, mean_nll, read, sequence_nll
from .training import Reference, adamw, cycled, descend, differentiable, thinned

#: Loss of (model, reference, batch).
Loss = Callable[[Run, Run, Scored], torch.Tensor]
#: Around the LoRA rate of open-unlearning. At that of training (2e-3) the second step is too far.
RATES = ({"lr": 1e-5, "steps": 512}, {"lr": 3e-5}, {"lr": 1e-4})
#: With a term of D_r: the authors' weights, and a retain term that carries a higher rate.
_HEAVY = {"retain_weight": 5.0, "retain_batches": 4}
RETAIN_RATES = (
    {"lr": 1e-5, "steps": 512},
    {"lr": 3e-5},
    {"lr": 1e-4, **_HEAVY},
    {"lr": 1e-4},
    {"lr": 3e-4, **_HEAVY},
)
STEPS = 128
NPO_BETA = 0.1


def ladder(steps: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 11, 16, ... (2^(k/2), rounded) below ``steps``, and ``steps``."""
    rungs = {round(2 ** (k / 2)) for k in range(2 * steps.bit_length())}
    return sorted({rung for rung in rungs if rung < steps} | {steps})


def gradient_ascent(case: Case, *, lr: float, steps: int = STEPS) -> Iterator[State]:
    """GA: L = -NLL(D_f). States: numbers of steps."""
    return _train(case, _ascent, None, lr, steps)


def grad_diff(case: Case, *, lr: float, steps: int = STEPS, **retain: float) -> Iterator[State]:
    """GradDiff: L = -NLL(D_f) + α NLL(D_r). States: numbers of steps.

    Args:
        retain: ``retain_weight``, α (default 1), and ``retain_batches`` of a step (default 1).
    """
    return _train(case, _ascent, _retain_nll, lr, steps, **retain)


def grad_diff_kl(case: Case, *, lr: float, steps: int = STEPS, **retain: float) -> Iterator[State]:
    """GradDiff: L = -NLL(D_f) + α KL(reference || model; D_r). States: numbers of steps.

    The reference is run again for every batch, as the authors do: its logits are too many to keep.
    """
    return _train(case, _ascent, kl_to_reference, lr, steps, **retain)


def npo(
    case: Case, *, lr: float, steps: int = STEPS, beta: float = NPO_BETA, **retain: float
) -> Iterator[State]:
    """NPO + retain: L = -(2/β) E log σ(β (NLL - NLL_ref)) + α NLL(D_r). States: numbers of steps.

    Zhang et al. 2024 (licong-lin/negative-preference-optimization@1207bbe). NLL is the *sum* over
    a sequence's forget labels; MUSE took the mean, which is another effective β.
    """
    # One number per sequence, so the reference is run over a batch only once.
    kept: dict[int, torch.Tensor] = {}

    def forget_loss(run: Run, reference: Run, batch: Scored) -> torch.Tensor:
        if id(batch) not in kept:
            kept[id(batch)] = sequence_nll(reference, batch)
        return npo_loss(sequence_nll(run, batch), kept[id(batch)], beta)

    return _train(case, forget_loss, _retain_nll, lr, steps, **retain)


def npo_loss(nll: torch.Tensor, reference: torch.Tensor, beta: float = NPO_BETA) -> torch.Tensor:
    """-(2/β) mean log σ(β (nll - reference)) of summed sequence NLLs ``[S]``, nats."""
    return -2 / beta * torch.nn.functional.logsigmoid(beta * (nll - reference)).mean()


def kl_to_reference(run: Run, reference: Run, batch: Scored) -> torch.Tensor:
    """KL(reference || model), mean over the scored positions, nats."""
    return kl(reference, run, batch)


def _ascent(run: Run, _reference: Run, batch: Scored) -> torch.Tensor:
    return -mean_nll(run, batch)


def _retain_nll(run: Run, _reference: Run, batch: Scored) -> torch.Tensor:
    return mean_nll(run, batch)


def _train(
    case: Case,
    forget_loss: Loss,
    retain_loss: Loss | None,
    lr: float,
    steps: int,
    retain_weight: float = 1.0,
    retain_batches: int = 1,
) -> Iterator[State]:
    """States on the ladder; ends early, with what was reached, where the loss is not finite."""
    if steps < 1 or not lr > 0:
        raise ValueError(f"steps must be at least 1 and lr above 0, not {steps} and {lr}.")
    model, clock = case.model, Clock()
    rungs = set(thinned(case, ladder(steps)))
    with as_before(model) as weights:
        model.eval()
        with clock:
            forget = cycled(read(model, case.forget, FORGET), case.seed)
            retain = None
            if retain_loss is not None:
                retain = cycled(read(model, case.retain, RETAIN), case.seed)
            reference = Reference(model, weights)
            optimizer = adamw(weights, lr)
        for step in range(1, steps + 1):
            with clock, differentiable(weights):
                loss = forget_loss(model, reference, next(forget))
                if retain_loss is not None:
                    share = retain_weight / retain_batches
                    for _ in range(retain_batches):
                        loss = loss + share * retain_loss(model, reference, next(retain))
                if not descend(optimizer, weights, loss):
                    return
            if step in rungs:
                yield State(step, clock.seconds)
