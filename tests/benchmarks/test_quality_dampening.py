"""SSD: importances against loops in fp64, dampening on numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.case import Case, lora_weights
from benchmarks.quality.dampening import (
    PREPARED,
    dampening_factors,
    importance,
    importance_of_all,
    ssd,
    thresholds,
)
from ucan_fast.batches import FORGET, RETAIN
from ucan_fast.errors import UcanError

from .quality_case import (
    forget_batches,
    loop_gradients,
    loop_mean,
    retain_batches,
    same,
    snapshot,
    tiny_case,
    tiny_model,
)


def prepared_case() -> Case:
    case = tiny_case()
    case.prepared[PREPARED] = importance_of_all(case.model, [*case.retain, *case.forget])
    return case


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("groups", [(FORGET,), (RETAIN,), (FORGET, RETAIN)])
def test_importance_is_the_mean_over_batches_of_squared_gradients(side, groups):
    model = tiny_model(torch.float64)
    batches = [*forget_batches(side), *retain_batches(side)]
    if FORGET in groups and RETAIN in groups:
        found = importance_of_all(model, batches)
    else:
        found = importance(model, batches, *groups)
    # Without token groups everything is retained: those have no forget label and do not count.
    counted = batches[:3] if groups == (FORGET,) else batches
    each = [
        loop_gradients(model, lambda b=batch: loop_mean(model, b, *groups)) for batch in counted
    ]
    for name, value in found.items():
        expected = sum(gradients[name].square() for gradients in each) / len(counted)
        assert (value - expected).norm() < 1e-5 * expected.norm()
        assert value.dtype == torch.float64


def test_importance_is_taken_in_eval_mode_and_leaves_the_model_as_it_is():
    model = tiny_model()
    expected = importance(model, forget_batches(), FORGET)
    name = next(iter(lora_weights(model)))
    lora_weights(model)[name].requires_grad_(False)
    model.train()
    next(m for m in model.modules() if isinstance(m, torch.nn.Linear)).eval()
    before = snapshot(model)
    flags = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    assert same(importance(model, forget_batches(), FORGET), expected)
    assert same(before, snapshot(model))
    assert flags == [m.training for m in model.modules()]
    assert wanted == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


def test_factors_on_numbers_by_hand():
    of_all = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 4.0], dtype=torch.float64)
    of_forget = torch.tensor([20.0, 10.0, 5.0, 3.0, 0.0, 100.0], dtype=torch.float64)

    def factors(*setting: float) -> list[float]:
        return dampening_factors(of_all, of_forget, *setting).tolist()

    # α = 10: strictly more than 10 times as important. β = λ I_D / I_Df.
    assert factors(10.0, 1.0) == pytest.approx([0.05, 1, 1, 0, 1, 0.04])
    assert factors(10.0, 0.5) == pytest.approx([0.025, 1, 1, 0, 1, 0.02])
    assert factors(10.0, 1.0, 0.5) == pytest.approx([0.05**0.5, 1, 1, 0, 1, 0.2])
    # Never more than 1.
    assert factors(2.0, 8.0) == pytest.approx([0.4, 0.8, 1, 0, 1, 0.32])
    assert factors(30.0, 1.0) == pytest.approx([1, 1, 1, 0, 1, 1])


@pytest.mark.parametrize("setting", [{"dampening": 1.0}, {"dampening": 0.1, "exponent": 2.0}])
def test_states_are_the_original_times_the_factors(setting):
    case = prepared_case()
    start = snapshot(case.model)
    of_forget = importance(case.model, case.forget, FORGET)
    values = []
    for state in ssd(case, **setting):
        values.append(state.value)
        if len(values) % 6:
            continue
        for name, weight in lora_weights(case.model).items():
            expected = start[name].clone()
            for index in torch.cartesian_prod(*(torch.arange(n) for n in weight.shape)).tolist():
                d, f = (x[name][tuple(index)].item() for x in (case.prepared[PREPARED], of_forget))
                if f > state.value * d:
                    factor = (setting["dampening"] * d / f) ** setting.get("exponent", 1.0)
                    expected[tuple(index)] = start[name][tuple(index)].item() * min(factor, 1.0)
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=0)
    assert values == sorted(values, reverse=True)
    assert len(values) > 6


def test_thresholds_that_edit_nothing_more_are_left_out():
    case = prepared_case()
    largest = max(
        (of_forget / case.prepared[PREPARED][name]).max().item()
        for name, of_forget in importance(case.model, case.forget, FORGET).items()
    )
    alphas = [largest * share for share in (3.0, 2.0, 0.9, 0.9 - 1e-9, 0.3)]
    assert [state.value for state in ssd(case, alphas=alphas)] == [alphas[2], alphas[4]]
    # α below λ: what is selected besides has a factor of 1.
    assert [state.value for state in ssd(case, alphas=[1.0, 0.5, 0.1])] == [1.0]
    assert list(ssd(case, alphas=[2 * largest])) == []


def test_a_missing_or_foreign_preparation_is_refused():
    with pytest.raises(UcanError, match="importance_of_all"):
        next(ssd(tiny_case()))
    case = prepared_case()
    case.prepared[PREPARED].popitem()
    with pytest.raises(UcanError, match="of another adapter"):
        next(ssd(case))


@pytest.mark.parametrize("alphas", [(1.0, 2.0), (2.0, 2.0)])
def test_thresholds_must_fall(alphas):
    with pytest.raises(ValueError, match="must fall"):
        next(ssd(prepared_case(), alphas=alphas))


def test_thresholds_select_the_shares_of_all_weights_together():
    of_all = {"a": torch.ones(2, 5).double(), "b": torch.tensor([2.0, 2.0, 0.0, 0.0]).double()}
    of_forget = {
        "a": torch.arange(10.0).double().reshape(2, 5),
        "b": torch.tensor([40.0, 1.0, 3.0, 0.0]).double(),
    }
    # Ratios: 0 to 9, 20, 0.5, inf (nothing in all data), and 0 for the one that is 0 / 0.
    found = thresholds(of_all, of_forget, (0.0, 1 / 14, 4 / 14, 0.5, 1.0))
    assert found == [20.0, 7.0, 4.0, 0.0]
    for alpha, count in zip(found, (1, 4, 7, 12), strict=True):
        selected = [of_forget[name] > alpha * of_all[name] for name in of_all]
        assert sum(int(part.sum()) for part in selected) == count
