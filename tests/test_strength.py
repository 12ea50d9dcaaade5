"""The closed loop: never outside the budget, whatever the loss does."""

from __future__ import annotations

import math
import random

import pytest
import torch
from trained_model import forget_batches, mean_nll, retain_batches, trained

import ucan_fast as uf
from ucan_fast import calibration as calibration_module
from ucan_fast.strength import match_loss, search_strength


def wild_curve(seed: int):
    """A loss that need not be monotone, continuous or finite, but repeats itself."""
    rng = random.Random(seed)
    before = rng.uniform(0.01, 5)
    steps = [
        before * rng.choice([0.5, 0.99, 1.0, 1.01, 1.04, 1.05, 1.0500001, 1.3, 9.0])
        if rng.random() < 0.9
        else rng.choice([math.nan, math.inf])
        for _ in range(rng.choice([2, 7, 50]))
    ]
    high = rng.choice([1.0, 32.0, 0.37])
    return before, high, lambda value: steps[min(int(value / high * len(steps)), len(steps) - 1)]


@pytest.mark.parametrize("seed", range(200))
def test_the_search_never_ends_outside_the_budget(seed):
    before, high, loss_at = wild_curve(seed)
    asked = []

    def recorded(value):
        asked.append((value, loss_at(value)))
        return asked[-1][1]

    budget = random.Random(seed).choice([0.0, 0.01, 0.05, 1.0])
    search = search_strength(recorded, before, budget, high)
    limit = before + budget * before
    # The curve is what was asked, no more and no less (nan compared as itself).
    assert str(search.curve) == str(asked)
    assert 1 <= len(asked) <= 20
    assert all(0 < value <= high for value, _ in asked)
    assert (search.parameter, search.budget, search.loss_before) == ("strength", budget, before)
    inside = [value for value, loss in asked if loss <= limit]
    assert search.chosen == max(inside, default=0.0)
    if search.chosen:
        assert search.loss_after == loss_at(search.chosen) <= limit
    else:
        assert search.loss_after == before
        assert "nothing was attenuated" in search.note
    # (The one case in which the budget was not the limit is said in words.)
    assert ("even strength" in search.note) == (asked[0][1] <= limit)


@pytest.mark.parametrize("power", [0.5, 1, 3])
@pytest.mark.parametrize("crossing", [0.02, 3.3, 31.9])
def test_a_monotone_loss_is_met_closely(power, crossing):
    high, before, budget = 32.0, 2.0, 0.05

    def loss_at(value):
        return before * (1 + budget * (value / crossing) ** power)

    search = search_strength(loss_at, before, budget, high)
    assert search.chosen <= crossing * (1 + 1e-9)
    rise = (search.loss_after - before) / (budget * before)
    assert rise >= 0.97 or crossing - search.chosen <= high / 2**11
    assert search.note == ""
    assert len(search.curve) <= 5  # bisection: up to 12


@pytest.mark.parametrize("seed", range(30))
def test_few_tries_where_the_loss_is_smooth(seed):
    """Sums of powers, flat or even falling at first, as losses of edits are."""
    rng = random.Random(seed)
    high, budget = rng.choice([1.0, 7.0, 32.0]), rng.choice([0.01, 0.05])
    slope, curvature = rng.uniform(-0.02, 0.1), rng.uniform(0.05, 5)
    power = rng.choice([2, 3])

    def loss_at(value):
        return 1 + slope * value + curvature * value**power

    search = search_strength(loss_at, 1.0, budget, high)
    assert 0.97 * budget <= search.loss_after - 1 <= budget
    assert len(search.curve) <= 9


def test_when_even_the_maximum_stays_inside_it_is_taken_and_said():
    search = search_strength(lambda value: 1.01, 1.0, 0.05, 32.0)
    assert (search.chosen, search.loss_after, search.curve) == (32.0, 1.01, [(32.0, 1.01)])
    assert "even strength=32" in search.note
    assert "5 %" in search.note


@pytest.mark.parametrize("bad", [2.0, math.nan, math.inf])
def test_when_nothing_fits_zero_is_chosen_and_said(bad):
    search = search_strength(lambda value: bad, 1.0, 0.05, 1.0, "fraction")
    assert (search.chosen, search.loss_after) == (0.0, 1.0)
    least = min(value for value, _ in search.curve)
    assert least < 0.1
    assert f"no fraction down to {least:.3g} stays within" in search.note
    assert "nothing was attenuated" in search.note


def test_a_share_of_a_loss_of_0_is_0():
    search = search_strength(lambda value: value, 0.0, 0.05, 1.0)
    assert search.chosen == 0
    assert "A share of a loss of 0 is 0" in search.note
    assert "loss of 0" not in search_strength(lambda value: 2.0, 1.0, 0.05, 1.0).note


def test_a_guard_refuses_values_within_the_budget():
    search = search_strength(
        lambda value: 1.0, 1.0, 0.05, 8.0, guard=lambda v: f"{v} is too far" if v > 3 else ""
    )
    assert 2.99 < search.chosen <= 3
    assert search.note == f"{min(v for v, _ in search.curve if v > 3)} is too far"
    # It is asked only where the budget allows.
    asked = []
    search_strength(lambda value: 1 + value, 1.0, 0.05, 8.0, guard=lambda v: asked.append(v) or "")
    assert asked
    assert max(asked) <= 0.05


def test_a_guard_that_is_not_the_limit_leaves_no_note():
    search = search_strength(
        lambda value: 1 + value, 1.0, 0.5, 8.0, guard=lambda v: "far" if v > 1 else ""
    )
    assert search.chosen == pytest.approx(0.5, rel=0.03)
    assert search.note == ""


def test_a_guard_that_refuses_everything_is_named():
    search = search_strength(lambda value: 1.0, 1.0, 0.05, 1.0, guard=lambda v: "nothing goes")
    assert (search.chosen, search.note) == (0.0, "nothing goes")


def test_a_negative_loss_has_a_budget_too():
    search = search_strength(lambda value: -1 + value, -1.0, 0.05, 1.0)
    assert 0.045 <= search.chosen <= 0.05


@pytest.mark.parametrize("seed", range(50))
def test_match_loss_reports_the_closest_value_tried(seed):
    before, _, wild = wild_curve(seed)
    _, high, _ = wild_curve(seed)
    tried = {0.0: before}

    def loss_at(value):
        tried[value] = wild(value * high)
        return tried[value]

    target = before * random.Random(seed).choice([0.9, 1.0, 1.02, 1.3, 20])
    value, loss = match_loss(loss_at, before, target)
    assert 0 <= value <= 1
    assert tried[value] == loss
    assert abs(loss - target) == min(abs(x - target) for x in tried.values() if x == x)


def test_match_loss_meets_a_monotone_target():
    value, loss = match_loss(lambda v: 1 + v**2, 1.0, 1.3)
    assert loss == pytest.approx(1.3, abs=0.02 * 0.3)
    assert value == pytest.approx(math.sqrt(loss - 1))


def own_loss(model, batches) -> float:
    return mean_nll(model, batches, "retain")


def calibration() -> list[dict]:
    return retain_batches(count=16, seed=77)


@pytest.mark.parametrize(
    ("site", "decay", "budget"),
    [
        ("input", "exponential", 0.05),
        ("input", "hard", 0.05),
        ("rank", "linear", 0.01),
        ("output", "inverse", 0.02),
        ("rank", "hard", 0.1),
    ],
)
def test_the_final_model_is_within_the_budget(budget, decay, site):
    model = trained()
    before = own_loss(model, calibration())
    config = uf.UcanConfig(site=site, decay=decay, max_retain_loss_increase=budget)
    result = uf.unlearn(
        model,
        forget=forget_batches(),
        retain=retain_batches(),
        calibration=calibration(),
        config=config,
        evaluate=False,
    )
    after = own_loss(model, calibration())
    search = result.report.search
    assert search.loss_before == pytest.approx(before, rel=1e-5)
    assert search.loss_after == pytest.approx(after, rel=1e-5)
    assert after <= before * (1 + budget) * (1 + 1e-6)
    assert search.parameter == ("fraction" if decay == "hard" else "strength")
    assert search.chosen in [value for value, _ in search.curve]
    if decay == "hard":
        assert result.report.change["fraction"] == search.chosen
        assert result.plan.attenuated <= math.ceil(search.chosen * result.plan.neurons)
        assert set(result.plan.flat_factors.unique().tolist()) == {0.0, 1.0}
    else:
        assert result.plan.strength == result.report.change["strength"] == search.chosen
        # The budget is used, not only kept. (Hard pruning of few neurons is coarse.)
        assert after >= before * (1 + 0.7 * budget)


def test_the_default_calibration_is_a_sample_of_the_retain_batches():
    model = trained()
    retain = retain_batches()
    before = own_loss(model, retain)
    result = uf.unlearn(model, forget=forget_batches(), retain=retain, evaluate=False)
    # They hold fewer tokens than the sample may have, so the sample is all of them.
    assert result.report.search.loss_before == pytest.approx(before, rel=1e-5)
    assert own_loss(model, retain) <= 1.05 * before * (1 + 1e-6)


def test_a_large_retain_set_is_sampled(monkeypatch):
    monkeypatch.setattr(calibration_module, "CALIBRATION_TOKENS", 200)
    retain = retain_batches(count=64, size=8)
    sizes = [int(b["attention_mask"].sum()) for b in retain]
    picks = set()
    for seed in range(8):
        drawn = calibration_module.sample(trained(), iter(retain), seed)
        index = [next(i for i, b in enumerate(retain) if b is s) for s in drawn]
        assert index == sorted(set(index))
        tokens = sum(sizes[i] for i in index)
        assert 200 <= tokens < 200 + max(sizes)
        again = calibration_module.sample(trained(), retain, seed)
        assert [id(b) for b in again] == [id(b) for b in drawn]
        picks.add(tuple(index))
    assert len(picks) > 2  # the seed decides
    # Every batch has its chance, wherever it stands.
    assert len({i for pick in picks for i in pick}) >= 6


def count_forwards(model) -> list[int]:
    rows = []
    model.register_forward_hook(lambda _m, _x, y: rows.append(1))
    return rows


def test_with_a_given_strength_nothing_but_the_statistics_is_run():
    model = trained()
    forwards = count_forwards(model)
    forget, retain = forget_batches(), retain_batches()
    result = uf.unlearn(
        model,
        forget=forget,
        retain=retain,
        config=uf.UcanConfig(strength=2.0),
        evaluate=False,
    )
    assert len(forwards) == len(forget) + len(retain)
    assert result.report.search is None
    assert result.plan.strength == 2.0


def test_with_a_given_strength_an_unscorable_retain_set_is_no_obstacle():
    """It is measured for the controls only; without them nobody asks for its loss."""
    retain = [{**b, "labels": torch.full_like(b["input_ids"], -100)} for b in retain_batches()]
    result = uf.unlearn(
        trained(),
        forget=forget_batches(),
        retain=retain,
        config=uf.UcanConfig(strength=2.0),
        evaluate=False,
    )
    assert result.plan.attenuated


def test_calibration_as_a_function():
    model = trained()
    model.train()
    seen = []

    def loss_fn(given):
        assert given is model
        assert not any(m.training for m in given.modules())
        assert not torch.is_grad_enabled()
        rows = retain_batches(count=8)[0]["input_ids"]
        loss = given(input_ids=rows, labels=rows).loss
        seen.append(float(loss))
        return loss  # a tensor is as good as a float

    result = uf.unlearn(
        model, forget=forget_batches(), retain=retain_batches(), calibration=loss_fn
    )
    search = result.report.search
    assert search.loss_before == seen[0]
    assert [loss for _, loss in search.curve] == seen[1 : 1 + len(search.curve)]
    with torch.no_grad():
        model.eval()
        assert float(loss_fn(model)) == pytest.approx(search.loss_after, rel=1e-6)
    assert search.loss_after <= 1.05 * seen[0]
    metrics = result.report.metrics
    assert metrics["U-CAN"]["retain/loss"] == pytest.approx(search.loss_after, rel=1e-6)
    # Only the loss over batches is known to be an NLL per token.
    assert "retain/perplexity" not in metrics["before"]


def test_a_calibration_function_serves_a_bank_too():
    model = trained()
    bank = uf.collect(model, [*forget_batches(), *retain_batches()])
    result = uf.unlearn(
        model,
        forget=forget_batches(),
        bank=bank,
        calibration=lambda m: own_loss(m, calibration()[:1]),
        evaluate=False,
    )
    assert result.report.search.chosen == result.plan.strength != 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_calibration_loss_that_is_no_number_is_refused(value):
    with pytest.raises(uf.UcanError, match="retain loss"):
        uf.unlearn(
            trained(),
            forget=forget_batches(),
            retain=retain_batches(),
            calibration=lambda model: value,
        )


@pytest.mark.parametrize("decay", ["exponential", "hard"])
def test_without_calibration_data_strength_is_one_and_the_report_says_so(decay):
    model = trained()
    bank = uf.collect(model, [*forget_batches(), *retain_batches()])
    result = uf.unlearn(
        model, forget=forget_batches(), bank=bank, config=uf.UcanConfig(decay=decay)
    )
    assert result.plan.strength == 1.0
    assert result.report.search is None
    assert "calibration" in result.report.change["note"]
    assert "calibration" in result.report.to_markdown()


def test_nothing_fits_the_budget():
    calls = []

    def loss_fn(model):
        calls.append(1)
        return 1.0 if len(calls) == 1 else 2.0

    model = trained()
    with pytest.warns(uf.UcanWarning, match="nothing was attenuated"):
        result = uf.unlearn(
            model,
            forget=forget_batches(),
            retain=retain_batches(),
            calibration=loss_fn,
            evaluate=False,
        )
    assert result.plan.attenuated == 0
    assert result.plan.strength == 0
