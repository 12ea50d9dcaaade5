"""What every baseline owes to its caller, whatever it computes."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from trained_model import assert_same_weights, weights

from benchmarks.quality import case as protocol
from benchmarks.quality.baselines import BASELINES
from benchmarks.quality.case import Case, Method, lora_weights
from benchmarks.quality.dampening import PREPARED, importance_of_all

from .quality_case import same, snapshot, tiny_case

# Short runs of every method; one with post-training besides.
SHORT = {"LLM-Eraser-style (adapter)": [{"steps": 0}, {"steps": 3, "lr": 1e-3}], "SSD": [{}]}
EVERY = [
    pytest.param(method, setting, id=f"{method.name} {setting}")
    for method in BASELINES
    for setting in SHORT.get(method.name, [{"lr": 3e-3, "steps": 8}])
]
each = pytest.mark.parametrize(("method", "setting"), EVERY)


def ready() -> Case:
    """A case whose model has unusual modes and flags."""
    case = tiny_case()
    case.prepared[PREPARED] = importance_of_all(case.model, [*case.retain, *case.forget])
    first, second = list(lora_weights(case.model).values())[:2]
    first.requires_grad_(False)
    second.requires_grad_(True)
    for name, module in case.model.named_modules():
        module.training = "lora_dropout" in name
    return case


def flags(case: Case) -> tuple:
    return (
        {name: p.requires_grad for name, p in case.model.named_parameters()},
        {name: m.training for name, m in case.model.named_modules()},
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )


def states_of(case: Case, method: Method, setting: dict):
    return method.states(case, **setting)


def test_the_names_are_those_of_tables_and_all_pass_back():
    assert [method.name for method in BASELINES] == [
        "gradient ascent",
        "GradDiff",
        "GradDiff (KL)",
        "NPO",
        "SSD",
        "LLM-Eraser-style (adapter)",
    ]
    assert all(method.backward for method in BASELINES)


@pytest.mark.parametrize("method", BASELINES, ids=lambda method: method.name)
def test_every_setting_of_the_grid_gives_another_edit(method):
    second = []
    for setting in method.settings:
        case = ready()
        # Ratios as large as those of a real request, which the larger dampenings are for.
        for value in case.prepared[PREPARED].values():
            value /= 1000
        states = states_of(case, method, setting)
        # In the first state the KL term, of a model to itself, has moved nothing yet.
        for _ in islice(states, 2):
            state = snapshot(case.model)
        second.append(state)
        states.close()
    assert len(second) > 1
    assert not any(same(one, other) for i, one in enumerate(second) for other in second[:i])


@each
def test_states_differ_and_the_model_comes_back_bit_by_bit(method, setting):
    case = ready()
    before, as_they_were = weights(case.model), flags(case)
    adapter = snapshot(case.model)
    seen, values = [], []
    for state in states_of(case, method, setting):
        now = snapshot(case.model)
        assert not any(same(now, earlier) for earlier in [adapter, *seen])
        assert flags(case)[2:] == as_they_were[2:]
        seen.append(now)
        values.append(state.value)
    assert len(values) > 3
    assert values == sorted(values, reverse=method.name == "SSD")
    assert_same_weights(case.model, before)
    assert flags(case) == as_they_were
    assert all(p.grad is None for p in case.model.parameters())


@each
def test_the_model_comes_back_when_the_states_are_closed_or_measuring_fails(method, setting):
    case = ready()
    before, as_they_were = weights(case.model), flags(case)
    adapter = snapshot(case.model)
    states = states_of(case, method, setting)
    next(states)
    next(states)
    assert not same(adapter, snapshot(case.model))
    states.close()
    assert_same_weights(case.model, before)
    assert flags(case) == as_they_were
    states = states_of(case, method, setting)
    next(states)
    with pytest.raises(KeyboardInterrupt):
        states.throw(KeyboardInterrupt())
    assert_same_weights(case.model, before)
    assert flags(case) == as_they_were


@each
def test_the_model_comes_back_when_a_forward_pass_fails(method, setting):
    case = ready()
    before, as_they_were = weights(case.model), flags(case)
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        # After two steps of ascent; within the importances of the others.
        if calls > 2:
            raise RuntimeError("out of memory")

    handle = case.model.register_forward_pre_hook(fail)
    if method.name == "SSD":
        calls = 1
    with pytest.raises(RuntimeError, match="out of memory"):
        list(states_of(case, method, setting))
    handle.remove()
    assert_same_weights(case.model, before)
    assert flags(case) == as_they_were


@each
def test_the_same_case_gives_the_same_states_whatever_the_global_seed(method, setting):
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        case = ready()
        torch.manual_seed(seed)
        runs.append([snapshot(case.model) for _ in states_of(case, method, setting)])
    assert len(runs[0]) == len(runs[1])
    assert all(same(one, other) for one, other in zip(*runs, strict=True))


@each
def test_a_coarse_case_gets_every_other_state_and_the_last(method, setting):
    whole, coarse = ready(), ready()
    coarse.coarse = True
    states = [snapshot(whole.model) for _ in states_of(whole, method, setting)]
    some = [snapshot(coarse.model) for _ in states_of(coarse, method, setting)]
    assert 1 < len(some) <= len(states) / 2 + 1
    assert same(some[-1], states[-1])
    assert all(any(same(found, state) for state in states) for found in some)


# Forward passes that a user waits for until a state, of 2 forget batches. (One of
# retain has as many labels.)
PASSES = {
    "gradient ascent": lambda value, steps: value,
    "GradDiff": lambda value, steps: 2 * value,
    "GradDiff (KL)": lambda value, steps: 3 * value,
    "NPO": lambda value, steps: 2 * value + min(value, 2),
    "SSD": lambda value, steps: 2,
    "LLM-Eraser-style (adapter)": lambda value, steps: 3 + 2 * steps,
}


@each
def test_the_clock_counts_every_forward_pass_and_no_measuring(method, setting, monkeypatch):
    case = ready()
    now = [0.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])

    def tick(*_):
        now[0] += 1

    handle = case.model.register_forward_pre_hook(tick)
    for state in states_of(case, method, setting):
        expected = PASSES[method.name](state.value, setting.get("steps", 0))
        assert state.seconds == expected
        # Measuring takes a thousand.
        now[0] += 1000
    handle.remove()


@each
def test_only_labels_of_the_right_side_matter(method, setting):
    """Labels of D_f that are not to be forgotten, and of D_r that are, change no state."""
    ends = []
    for changed in (False, True):
        case = ready()
        if changed:
            for batch, other in ((case.forget, 1), (case.retain, 0)):
                for part in batch:
                    groups = part.get("token_groups", torch.ones_like(part["input_ids"]))
                    untouched = (groups == other) | (groups == -1)
                    part["labels"] = torch.where(untouched, 7, part["labels"])
        ends.append([snapshot(case.model) for _ in states_of(case, method, setting)])
    assert len(ends[0]) == len(ends[1]) > 3
    assert all(same(one, other) for one, other in zip(*ends, strict=True))
