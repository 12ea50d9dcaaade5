"""Curves, the setting and state that calibration chooses, and what is said of a failure."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.quality import runner
from benchmarks.quality.case import Method, State, as_before, lora_weights
from benchmarks.quality.recommender import make_case, make_request
from benchmarks.quality.runner import at_budget, marked, run_case
from ucan_fast.report import json_values

from .quality_toy import toy

__all__ = ["toy"]


@pytest.mark.parametrize(
    ("points", "budget", "wanted"),
    [
        ([(1, 10), (3, 30)], 2, (20.0, "between")),
        ([(4, 8)], 1, (2.0, "first")),  # from (0, 0)
        ([(1, 10), (2, 20)], 5, (20.0, "end")),
        ([(1, 30), (2, 20)], 5, (30.0, "end")),
        ([(-3, 10), (1, 20)], 0, (17.5, "between")),
        ([], 5, (0.0, "end")),
        # The first crossing counts, not a later return.
        ([(10, 10), (1, 50), (9, 60)], 5, (5.0, "first")),
    ],
)
def test_reading_a_curve_off(points, budget, wanted):
    value, known = at_budget(points, budget)
    assert (pytest.approx(value), known) == wanted


def test_each_budget_takes_the_setting_that_calibration_prefers_there():
    """Also where the other users, whose figures count, would prefer another one."""

    def point(calibration, retain, forget):
        drops = {"calibration": calibration, "retain": retain, "forget": forget}
        return [1, 0.1, drops]

    careful = [point(0.5, 1.0, 8.0), point(6.0, 5.0, 20.0)]
    bold = [point(1.5, 2.0, 9.0), point(4.0, 8.0, 50.0)]
    found = runner.at_budgets([careful, bold])
    # Calibration at 1 %: careful 8 + 0.5/5.5 x 12 = 9.1, bold 6; of careful the other side has 8.
    assert found["1"] == (pytest.approx(8.0), "between")
    # At 5 %: careful 17.8, bold 50 (its end); of bold the other side has 9 + 3/6 x 41.
    assert found["5"] == (pytest.approx(29.5), "between")
    # At 0.5 %: careful 8, bold 3; of careful the other side is on the way to its first state.
    assert found["0.5"] == (pytest.approx(4.0), "first")


def test_marks_of_what_is_not_between_two_states():
    assert marked("2.0", "between", "between") == "2.0"
    assert marked("2.0", "between", "end") == "≥ 2.0"
    assert marked("2.0", "end", "first") == "(2.0)"


@pytest.fixture
def case(toy):
    return make_case(toy, make_request(toy, "genre"), toy.model())


def shrinking(case, *, to, seconds=0.0):
    """B of all layers scaled, one state per number."""
    for number, scale in enumerate(to):
        with as_before(case.model) as weights:
            with torch.no_grad():
                for name, weight in weights.items():
                    if ".lora_B." in name:
                        weight.mul_(scale)
            yield State(1 - scale, seconds + number, {"scale": scale} if scale < 0.9 else {})


def test_calibration_chooses_the_setting_and_the_state(case, monkeypatch):
    drops = {  # by the scale that is in force: calibration, retain, forget
        0.9: {"calibration": 1.0, "retain": 2.0, "forget": 5.0},
        0.8: {"calibration": 4.0, "retain": 9.0, "forget": 20.0},
        0.7: {"calibration": 9.0, "retain": 9.5, "forget": 70.0},
        # Better on the side that is judged, worse on the one that settings are chosen by.
        0.5: {"calibration": 10.0, "retain": 0.0, "forget": 10.0},
    }
    origin = {n: w.detach().clone() for n, w in lora_weights(case.model).items()}
    name = next(n for n in origin if ".lora_B." in n)

    def drops_now(judge):
        now = lora_weights(judge.case.model)[name]
        ratio = float((now / origin[name]).nanmedian())
        return drops[round(ratio, 2)]

    monkeypatch.setattr(runner.Judge, "drops", drops_now)
    method = Method("shrink", shrinking, ({"to": (0.5,)}, {"to": (0.9, 0.8, 0.7, 0.6)}))
    row = run_case(case, [method], say=lambda _: None)["methods"]["shrink"]
    assert row["best"] == 1
    assert row["setting"] == {"to": (0.9, 0.8, 0.7, 0.6)}
    # The curve ends beyond FAR_ENOUGH: 0.6 was never run (it has no drops).
    assert [point[0] for point in row["curves"][1]] == pytest.approx([0.1, 0.2, 0.3])
    # What the method said of the states, of the best setting's.
    assert row["measured"] == [{}, {"scale": 0.8}, {"scale": 0.7}]
    # The strongest within the budget on calibration, however it does on the other users.
    assert row["value"] == pytest.approx(0.2)
    assert row["seconds"] == 1.0
    assert row["drops"]["retain"] == 9.0
    assert row["at_budget"]["1"][0] == pytest.approx(2.5)
    assert all(torch.equal(w, origin[n]) for n, w in lora_weights(case.model).items())


def test_figures_of_the_chosen_state(case):
    method = Method("shrink", shrinking, ({"to": (0.97,)},))
    found = run_case(case, [method], say=lambda _: None, extra=lambda case: {"mia/loss": 0.5})
    json.dumps(json_values(found))
    row = found["methods"]["shrink"]
    with as_before(case.model) as weights:
        before = case.measure()
        with torch.no_grad():
            for name, weight in weights.items():
                if ".lora_B." in name:
                    weight.mul_(0.97)
        after = case.measure()
    assert {k: found["before"][k] for k in before} == before
    assert {k: row["metrics"][k] for k in after} == after
    assert row["metrics"]["mia/loss"] == found["before"]["mia/loss"] == 0.5
    assert row["metrics"]["forget/kl"] > 0
    assert "measured" not in row
    assert set(row["trade_off"]) >= {"paper", "strict_train"}
    side = "forget_train/recall@10"
    assert row["drops"]["forget"] == pytest.approx(100 * (1 - after[side] / before[side]))


def failing(case):
    with as_before(case.model) as weights:
        with torch.no_grad():
            for weight in weights.values():
                weight.zero_()
        yield State(1.0, 0.0)
        raise RuntimeError("no more")


def test_a_failing_method_is_a_row(case, monkeypatch):
    monkeypatch.setattr(runner, "FAR_ENOUGH", 1e9)
    origin = {n: w.detach().clone() for n, w in lora_weights(case.model).items()}
    methods = [Method("fails", failing), Method("works", shrinking, ({"to": (0.9,)},))]
    said = []
    found = run_case(case, methods, say=said.append)["methods"]
    assert found["fails"] == {"error": "RuntimeError: no more"}
    assert "at_budget" in found["works"]
    assert "no more" in said[0]
    assert "works" in said[1]
    assert all(torch.equal(w, origin[n]) for n, w in lora_weights(case.model).items())


def test_a_single_state_is_measured_whatever_it_costs(case):
    method = Method("gone", shrinking, ({"to": (0.0,)},), single=True)
    row = run_case(case, [method], say=lambda _: None)["methods"]["gone"]
    assert row["drops"]["calibration"] > runner.BUDGET
    assert row["at_budget"] == {}
    assert row["metrics"]["forget/kl"] > 0


def nothing(case):
    yield from ()


def test_a_method_without_states(case):
    row = run_case(case, [Method("nothing", nothing)], say=lambda _: None)["methods"]["nothing"]
    assert row["at_budget"] == dict.fromkeys(("0.5", "1", "5"), (0.0, "end"))
    assert "metrics" not in row


def telling(case, steps):
    yield from shrinking(case, to=(0.0,) * steps)
    return f"no more than {steps}"


def test_a_method_may_say_why_it_ended(case, monkeypatch):
    """Of the setting that is chosen; a curve that was cut short was not ended by the method."""
    method = Method("tells", telling, ({"steps": 0}, {"steps": 1}))
    row = run_case(case, [method], say=lambda _: None)["methods"]["tells"]
    assert (row["best"], row["ended"]) == (1, "")
    monkeypatch.setattr(runner, "FAR_ENOUGH", 1e9)
    row = run_case(case, [method], say=lambda _: None)["methods"]["tells"]
    assert (row["best"], row["ended"]) == (1, "no more than 1")
    row = run_case(case, [Method("plain", shrinking, ({"to": (0.9,)},))], say=lambda _: None)
    assert row["methods"]["plain"]["ended"] == ""
