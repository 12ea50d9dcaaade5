"""Our own edits as methods: every state edits the model, and none is left on it."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.quality import edits
from benchmarks.quality.case import lora_weights
from benchmarks.quality.edits import BEYOND, CONTROLS, RETRAINING, only, prepare, scores
from benchmarks.quality.recommender import make_case, make_request
from benchmarks.quality.runner import run_case
from ucan_fast import UcanConfig, UcanError
from ucan_fast.evaluation import group_loss

from .quality_toy import toy

__all__ = ["toy"]

METHODS = (*CONTROLS, *edits.ATTENUATION, *BEYOND)


@pytest.fixture(scope="module")
def case(toy):
    made = make_case(toy, make_request(toy, "genre"), toy.model())
    prepare(made, edits.PREPARED)
    return made


def snapshot(case):
    return {name: weight.detach().clone() for name, weight in lora_weights(case.model).items()}


def changed(case, origin):
    return sum(not torch.equal(w, origin[n]) for n, w in lora_weights(case.model).items())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_states_edit_and_leave_nothing(case, method):
    origin = snapshot(case)
    seen = []
    for state in method.states(case, **method.settings[0]):
        assert changed(case, origin)
        seen.append(state)
    assert not changed(case, origin)
    values = [state.value for state in seen]
    assert values == sorted(set(values))
    assert len(values) > 3
    assert all(s.seconds >= 0 for s in seen)

    stopped = method.states(case, **method.settings[0])
    next(stopped)
    stopped.close()
    assert not changed(case, origin)


#: Its states are on one way, like those of training: each is paid for with those before it.
ON_A_WAY = [method for method in BEYOND if "several steps" in method.name]


@pytest.mark.parametrize(
    "method",
    [m for m in (*edits.ATTENUATION, *BEYOND) if m not in ON_A_WAY],
    ids=lambda method: method.name,
)
def test_a_state_does_not_pay_for_those_before_it(case, method, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(edits.Clock, "_now", staticmethod(lambda: next(ticks)))
    seconds = [state.seconds for state in method.states(case, **method.settings[0])]
    assert seconds[0] > 0
    assert len(set(seconds)) == 1


@pytest.mark.parametrize("method", ON_A_WAY, ids=lambda method: method.name)
def test_a_step_is_paid_for_with_those_before_it(case, method, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(edits.Clock, "_now", staticmethod(lambda: next(ticks)))
    states = list(method.states(case, **method.settings[0]))
    known = [state.measured["still_known"] for state in states]
    assert 1 >= known[0] > known[-1] >= 0
    seconds = [state.seconds for state in states]
    assert [b - a for a, b in itertools.pairwise(seconds)] == [1] * (len(seconds) - 1)
    assert 1 < len(seconds) <= UcanConfig.preset("thorough").influence_steps


def test_the_pass_that_methods_share_is_charged_to_each_of_them(toy):
    case = make_case(toy, make_request(toy, "genre"), toy.model())
    chosen = [m for m in METHODS if m.name in ("gates", "influence", "uniform shrink (control)")]
    prepare(case, edits.PREPARED)
    rows = run_case(case, chosen, say=lambda _: None)["methods"]
    assert case.peaks["request factors"] is not None
    for name in ("gates", "influence"):
        assert rows[name]["shared_peak_bytes"] == case.peaks["request factors"]
    assert rows["uniform shrink (control)"]["shared_peak_bytes"] is None


@pytest.mark.parametrize("name", ["influence", "gates", "one plain gradient step"])
def test_unlearning_raises_the_forget_loss_more_than_the_retain_loss(case, name):
    method = next(m for m in METHODS if m.name == name)
    forget = only(case.forget, 0)

    def losses():
        sides = (forget, "forget"), (case.calibration, "retain")
        return [group_loss(case.model, *side).mean for side in sides]

    before = losses()
    states = method.states(case, **method.settings[0])
    for _ in itertools.islice(states, 6):
        after = losses()
    states.close()
    rises = [a - b for a, b in zip(after, before, strict=True)]
    assert rises[0] > 0
    assert rises[0] > 2 * rises[1]


def test_every_setting_is_its_own(case):
    """No two of our methods are the same edit under two names."""
    firsts = []
    for method in (*edits.ATTENUATION, *BEYOND):
        if method.name == "influence, last blocks":  # the toy has one block
            continue
        states = method.states(case, **method.settings[0])
        next(states), next(states)
        firsts.append(torch.cat([w.detach().flatten() for w in lora_weights(case.model).values()]))
        states.close()
    for one, two in itertools.combinations(firsts, 2):
        assert not torch.equal(one, two)


def test_coarse_cases_take_every_other_value(case):
    case.coarse = True
    try:
        values = [state.value for state in edits.uniform(case)]
    finally:
        case.coarse = False
    assert values == pytest.approx([1 - scale for scale in edits.SCALES[1::2]])


def test_uniform_scaling_scales_the_adapter(case):
    origin = snapshot(case)
    states = edits.uniform(case)
    value = next(states).value
    for name, weight in lora_weights(case.model).items():
        wanted = origin[name] * (1 - value) if ".lora_B." in name else origin[name]
        torch.testing.assert_close(weight, wanted)
    states.close()


def test_retraining_is_one_state(case):
    origin = snapshot(case)
    (state,) = RETRAINING.states(case)
    assert state.seconds > 0
    assert not changed(case, origin)


def test_only_keeps_one_group(case):
    for batch, kept in zip(case.forget, only(case.forget, 0), strict=True):
        groups = batch["token_groups"]
        assert torch.equal(kept["token_groups"] == 0, groups == 0)
        assert not (kept["token_groups"] == 1).any()
    assert any((b["token_groups"] == 1).any() for b in case.forget)


def test_a_bank_holds_all_data_and_a_request_takes_its_part_out(case):
    kept, gone = (sum(int((b["token_groups"] == g).sum()) for b in case.retain) for g in (1, 0))
    assert case.prepared["moments"].tokens("retain") == kept + gone
    assert case.prepared["moments"].tokens("forget") == 0
    stats, seconds = edits.request_moments(case)
    assert (stats.tokens("forget"), stats.tokens("retain")) == (gone, kept)
    (forget, retain), longer = edits.request_factors(case)
    assert (forget.tokens, retain.tokens) == (gone, kept)
    assert min(seconds, longer) > 0
    # The second to ask gets the same sums, at the same price.
    assert edits.request_factors(case)[0][0] is forget
    assert edits.request_factors(case)[1] == longer
    for name in ("influence", "gates", "influence, diagonals"):
        method = next(m for m in METHODS if m.name == name)
        states = method.states(case, **method.settings[0])
        assert next(states).seconds > longer
        states.close()
    assert set(case.seconds) == set(edits.PREPARED)
    with pytest.raises(UcanError, match="nothing is known of 'bank'"):
        prepare(case, ["bank"])


def test_scores_say_how_separable_the_request_is(case, toy):
    genre = scores(case)
    random = make_case(toy, make_request(toy, "interactions"), toy.model())
    prepare(random, ["moments"])
    assert genre["input"]["0.99"] > 1.3 * scores(random)["input"]["0.99"]
