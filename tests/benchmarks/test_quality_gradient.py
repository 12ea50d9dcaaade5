"""Gradient ascent, GradDiff and NPO against a training loop written out, in fp64."""

from __future__ import annotations

import contextlib
import copy
import math
from itertools import islice, pairwise

import pytest
import torch
from trained_model import forget_batches as forgettable
from trained_model import retain_batches as retainable
from trained_model import trained

from benchmarks.quality import gradient
from benchmarks.quality.case import Case, lora_weights
from benchmarks.quality.gradient import ladder, npo_loss
from benchmarks.quality.training import cycled
from ucan_fast.batches import FORGET, RETAIN
from ucan_fast.evaluation import group_loss

from .quality_case import (
    loop_gradients,
    loop_mean,
    loop_nll,
    same,
    scored_rows,
    snapshot,
    tiny_case,
)

METHODS = {
    "gradient ascent": gradient.gradient_ascent,
    "GradDiff": gradient.grad_diff,
    "GradDiff (KL)": gradient.grad_diff_kl,
    "NPO": gradient.npo,
}
LR, STEPS, BETA = 2e-2, 6, 0.1


HEAVY = {"retain_weight": 3.0, "retain_batches": 2}


def written_out(
    case: Case, name: str, weight: float = 1, batches: int = 1
) -> dict[int, dict[str, torch.Tensor]]:
    """The adapter after every step, by plain loops over sequences and Adam by hand."""
    model, start = copy.deepcopy(case.model), copy.deepcopy(case.model)
    weights = lora_weights(model)
    mean = {n: torch.zeros_like(w) for n, w in weights.items()}
    square = {n: torch.zeros_like(w) for n, w in weights.items()}
    forget, retain = (cycled(part, case.seed) for part in (case.forget, case.retain))
    after = {}
    for step in range(1, STEPS + 1):
        deleted, kept = next(forget), [next(retain) for _ in range(batches)]

        def forget_term(batch=deleted):
            if name != "NPO":
                return -loop_mean(model, batch, FORGET)
            now = [nll.sum() for nll in loop_nll(model, batch, FORGET)]
            before = [nll.sum().detach() for nll in loop_nll(start, batch, FORGET)]
            # -log σ(x) = log(1 + exp(-x))
            terms = [
                torch.log(1 + torch.exp(-BETA * (n - b))) for n, b in zip(now, before, strict=True)
            ]
            return 2 / BETA * sum(terms) / len(terms)

        def retain_term(batch):
            if name != "GradDiff (KL)":
                return loop_mean(model, batch, RETAIN)
            new, old = (
                torch.cat([part for part, _ in scored_rows(m, batch, RETAIN)]).log_softmax(-1)
                for m in (model, start)
            )
            return (old.detach().exp() * (old.detach() - new)).sum() / len(new)

        def loss(forget_term=forget_term, retain_term=retain_term, kept=kept):
            if name == "gradient ascent":
                return forget_term()
            return forget_term() + weight * sum(map(retain_term, kept)) / len(kept)

        found = loop_gradients(model, loss)
        norm = math.sqrt(sum(g.square().sum().item() for g in found.values()))
        with torch.no_grad():
            for n, value in weights.items():
                g = found[n] / max(1.0, norm)
                mean[n] = 0.9 * mean[n] + 0.1 * g
                square[n] = 0.999 * square[n] + 0.001 * g**2
                m, v = mean[n] / (1 - 0.9**step), square[n] / (1 - 0.999**step)
                value -= LR * m / (v.sqrt() + 1e-8)
        after[step] = snapshot(model)
    return after


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum((one[n] - other[n]).square().sum().item() for n in one))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("name", "retain"), [*((name, {}) for name in METHODS), ("GradDiff", HEAVY), ("NPO", HEAVY)]
)
def test_states_are_those_of_a_loop_over_single_sequences(name, retain, side):
    case = tiny_case(torch.float64, side=side)
    expected = written_out(case, name, *retain.values())
    start, seen = snapshot(case.model), []
    for state in METHODS[name](case, lr=LR, steps=STEPS, **retain):
        seen.append(state.value)
        found = snapshot(case.model)
        moved = distance(expected[state.value], start)
        assert distance(found, expected[state.value]) < 1e-4 * moved
    assert seen == [1, 2, 3, 4, 6]


def test_the_methods_do_not_give_the_same_states():
    ends = []
    for method in METHODS.values():
        case = tiny_case(torch.float64)
        for _ in method(case, lr=LR, steps=3):
            end = snapshot(case.model)
        ends.append(end)
    start = snapshot(tiny_case(torch.float64).model)
    for i, one in enumerate(ends):
        for other in ends[:i]:
            # A hundred times what the test above allows.
            assert distance(one, other) > 1e-2 * distance(one, start)


def test_npo_loss_is_its_formula_and_ascent_where_beta_is_small():
    now = torch.tensor([3.0, 40.0, 0.5], dtype=torch.float64, requires_grad=True)
    before = torch.tensor([1.0, 10.0, 2.0], dtype=torch.float64)
    terms = [math.log(1 / (1 + math.exp(-0.1 * r))) for r in (3.0 - 1.0, 40.0 - 10.0, 0.5 - 2.0)]
    assert npo_loss(now, before).item() == pytest.approx(-20 * sum(terms) / 3, rel=1e-12)
    (slope,) = torch.autograd.grad(npo_loss(now, before, 1e-9), now)
    assert slope.tolist() == pytest.approx([-1 / 3] * 3, rel=1e-6)
    # Far from the reference nothing more is gained.
    (slope,) = torch.autograd.grad(npo_loss(now, before - 500), now)
    assert slope.abs().max() < 1e-15


def test_the_ladder_is_geometric_and_ends_with_the_last_step():
    assert ladder(64) == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64]
    assert ladder(50) == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 50]
    assert ladder(128)[-3:] == [64, 91, 128]
    assert ladder(1) == [1]


@pytest.mark.parametrize("setting", [{"lr": 0.0}, {"lr": -1e-3}, {"lr": 1e-3, "steps": 0}])
def test_settings_without_meaning_are_refused(setting):
    with pytest.raises(ValueError, match="steps must be at least 1 and lr above 0"):
        next(gradient.npo(tiny_case(), **setting))


@pytest.mark.parametrize("name", METHODS)
def test_more_steps_forget_more_and_the_retained_side_is_held(name):
    case = tiny_case(model=trained())
    case.forget = [
        {**b, "token_groups": torch.zeros_like(b["input_ids"])} for b in forgettable(size=8)
    ]
    case.retain = retainable(size=8)
    losses = [group_loss(case.model, case.forget, "forget").mean]
    kept = [group_loss(case.model, case.retain, "retain").mean]
    for _ in METHODS[name](case, lr=3e-3, steps=23):
        losses.append(group_loss(case.model, case.forget, "forget").mean)
        kept.append(group_loss(case.model, case.retain, "retain").mean)
    assert all(later > earlier for earlier, later in pairwise(losses[1:]))
    assert losses[-1] > losses[0] + 1
    if name != "gradient ascent":
        ascent = tiny_case(model=case.model)
        ascent.forget = case.forget
        for _ in islice(gradient.gradient_ascent(ascent, lr=3e-3, steps=23), 9):
            without = group_loss(case.model, case.retain, "retain").mean
        assert kept[-1] < without


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_that_is_not_finite_ends_the_states_with_what_was_reached(name):
    case = tiny_case()
    start = snapshot(case.model)
    whole = [state.value for state in METHODS[name](case, lr=LR, steps=STEPS)]
    calls = 0

    def spoil(_module, _args, output):
        nonlocal calls
        calls += 1
        if calls > 5:
            output.logits = output.logits * math.nan
        return output

    handle = case.model.register_forward_hook(spoil)
    with contextlib.closing(METHODS[name](case, lr=LR, steps=STEPS)) as states:
        reached = []
        for state in states:
            reached.append(state.value)
            assert all(w.isfinite().all() for w in snapshot(case.model).values())
    handle.remove()
    assert whole == [1, 2, 3, 4, 6]
    assert 0 < len(reached) < len(whole)
    assert reached == whole[: len(reached)]
    assert same(start, snapshot(case.model))
