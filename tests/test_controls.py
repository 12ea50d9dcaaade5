"""The two controls: the same retain loss as U-CAN, or a word that it could not be reached."""

from __future__ import annotations

import pytest
import torch
from trained_model import (
    assert_same_weights,
    forget_batches,
    mean_nll,
    retain_batches,
    trained,
    weights,
)

import ucan_fast as uf
from ucan_fast import weights as weights_module
from ucan_fast.adapter import find_layers
from ucan_fast.controls import random_control, uniform_control
from ucan_fast.evaluation import group_loss
from ucan_fast.neurons import neuron_groups
from ucan_fast.weights import WeightEdit


def case(site: str = "rank", strength: float = 6.0, **changes):
    """A model, a plan that is not applied, the retain loss, and the plan's own loss."""
    model = trained()
    retain = retain_batches(count=16)
    config = uf.UcanConfig(site=site, strength=strength, **changes)
    stats = uf.collect(model, forget_batches(), group="forget") + uf.collect(model, retain)
    plan = uf.make_plan(model, stats, config)

    def retain_loss() -> float:
        return group_loss(model, retain, "retain").mean

    before = retain_loss()
    plan.apply(model)
    target = mean_nll(model, retain, "retain")
    plan.undo(model)
    assert target > before + 1e-3
    return model, plan, retain, retain_loss, before, target


def in_force(model, control, retain) -> float:
    with control.edit.applied(control.factors):
        return mean_nll(model, retain, "retain")


@pytest.mark.parametrize(
    ("site", "decay"),
    [("input", "exponential"), ("rank", "hard"), ("output", "exponential"), ("mlp", "hard")],
)
def test_controls_are_at_the_plans_retain_loss_or_say_so(site, decay):
    model, plan, retain, retain_loss, before, target = case(site, decay=decay)
    original = weights(model)
    found = [
        uniform_control(model, "default", retain_loss, before, target),
        random_control(model, "default", plan, retain_loss, before, target),
    ]
    assert_same_weights(model, original)
    for control in found:
        measured = in_force(model, control, retain)
        assert measured == pytest.approx(control.loss, rel=1e-5)
        off = abs(measured - target) / (target - before)
        assert (off <= 0.1 + 1e-3) == (not control.note), (control.name, off, control.note)
        if control.note:
            assert f"{target:.4f}" in control.note
            assert f"{control.loss:.4f}" in control.note
    # One constant can always be matched.
    assert not found[0].note
    assert_same_weights(model, original)


def test_uniform_scales_every_layer_by_one_constant():
    model, _, _, retain_loss, before, target = case()
    control = uniform_control(model, "default", retain_loss, before, target)
    assert control.name == "uniform"
    assert 0 < control.value < 1
    assert control.factors.unique().tolist() == [pytest.approx(1 - control.value)]
    original = weights(model)
    with control.edit.applied(control.factors):
        for name, value in model.state_dict().items():
            scale = control.factors[0] if "lora_B" in name else 1.0
            assert torch.equal(value, original[name] * scale), name
    assert_same_weights(model, original)


@pytest.mark.parametrize("site", ["input", "rank"])
def test_random_uses_the_plans_own_factors_on_other_neurons(site):
    model, plan, _, retain_loss, before, target = case(site)
    control = random_control(model, "default", plan, retain_loss, before, target)
    assert control.factors.shape == plan.flat_factors.shape
    mine = control.factors[control.factors != 1]
    theirs = plan.flat_factors[plan.flat_factors != 1]
    assert len(mine) == pytest.approx(control.value * plan.neurons, abs=1)
    # The last neuron may have a part of its factor, so that the loss can be met exactly.
    whole = torch.isin(mine, theirs)
    assert int((~whole).sum()) <= 1
    assert (mine[~whole] > theirs.min()).all()
    mine = mine[whole]
    # A factor comes back only when all of them are in use.
    times = torch.stack([(mine == factor).sum() for factor in theirs.unique()])
    own = torch.stack([(theirs == factor).sum() for factor in theirs.unique()])
    assert int(times.sum()) == len(mine)
    rounds = -(-len(mine) // len(theirs))
    assert (times <= rounds * own).all()
    assert (times >= (rounds - 1) * own).all()
    # They lie anywhere: on the plan's own neurons as often as chance has it (4 sigma), and in
    # about as many layers.
    n, k, m = plan.neurons, int((control.factors != 1).sum()), len(theirs)
    overlap = int(((control.factors != 1) & (plan.flat_factors != 1)).sum())
    sigma = (k * m / n * (1 - m / n) * (n - k) / (n - 1)) ** 0.5
    assert abs(overlap - k * m / n) <= 4 * sigma
    layers = [part.ne(1).any() for part in control.factors.split(plan.sizes)]
    by_chance = len(layers) * (1 - (1 - 1 / len(layers)) ** k)
    assert sum(map(bool, layers)) > by_chance / 2


def test_random_is_repeatable_and_depends_on_the_seed():
    model, plan, _, retain_loss, before, target = case("input")
    torch.manual_seed(1)
    first = random_control(model, "default", plan, retain_loss, before, target)
    torch.manual_seed(2)
    again = random_control(model, "default", plan, retain_loss, before, target)
    assert torch.equal(first.factors, again.factors)
    other_plan = plan._derive(config=plan.config.replace(seed=5))
    other = random_control(model, "default", other_plan, retain_loss, before, target)
    assert not torch.equal(first.factors, other.factors)


def test_a_plan_without_cost_leaves_the_controls_at_nothing_and_says_so():
    model, plan, _, retain_loss, before, _ = case()
    for control in (
        uniform_control(model, "default", retain_loss, before, before - 0.01),
        random_control(model, "default", plan, retain_loss, before, before - 0.01),
    ):
        assert control.value == 0
        assert (control.factors == 1).all()
        assert "does not raise the retain loss" in control.note


def test_a_loss_that_the_adapter_cannot_reach_is_said():
    model, _, _, retain_loss, before, _ = case()
    control = uniform_control(model, "default", retain_loss, before, before + 1000)
    assert control.value == 1
    assert "could not reach" in control.note


def test_a_failing_loss_leaves_the_weights():
    model, plan, _, _, before, target = case()
    original = weights(model)
    changed = []

    def loss() -> float:
        # It is measured with the control in force, so there is something to take back.
        changed.append(any(not torch.equal(v, original[n]) for n, v in model.state_dict().items()))
        raise RuntimeError("broken on purpose")

    for make in (
        lambda: uniform_control(model, "default", loss, before, target),
        lambda: random_control(model, "default", plan, loss, before, target),
    ):
        with pytest.raises(RuntimeError, match="on purpose"):
            make()
        assert_same_weights(model, original)
    assert changed == [True, True]


def test_after_unlearn_the_weights_are_the_plans_to_the_last_bit():
    measured, unmeasured = trained(), trained()
    with_controls = uf.unlearn(measured, forget=forget_batches(), retain=retain_batches())
    assert {"uniform", "random"} <= set(with_controls.report.metrics)
    without = uf.unlearn(
        unmeasured, forget=forget_batches(), retain=retain_batches(), evaluate=False
    )
    assert_same_weights(measured, weights(unmeasured))
    # What the plan says, by hand: column j of A times factor j.
    origin = trained()
    groups = neuron_groups(origin, find_layers(origin, "default"), "input")
    for group, factors in zip(
        groups, without.plan.flat_factors.split(without.plan.sizes), strict=True
    ):
        (piece,) = group.pieces
        expected = piece.parameter.detach() * factors
        name = f"{piece.layer}.lora_A.default.weight"
        assert torch.equal(measured.state_dict()[name], expected), name


def test_the_report_states_what_the_controls_reached():
    model = trained()
    result = uf.unlearn(model, forget=forget_batches(), retain=retain_batches(count=16))
    metrics, notes = result.report.metrics, result.report.notes
    before, target = (metrics[s]["retain/loss"] for s in ("before", "U-CAN"))
    for name in ("uniform", "random"):
        off = abs(metrics[name]["retain/loss"] - target) / (target - before)
        assert (off > 0.1) == (name in notes), (name, off)


def test_writing_twice_starts_from_the_originals_and_bad_factors_change_nothing():
    model = trained()
    original = weights(model)
    edit = WeightEdit(neuron_groups(model, find_layers(model, "default"), "output"))
    n = sum(value.shape[0] for name, value in original.items() if "lora_B" in name)
    edit.write(torch.full((n,), 0.5))
    edit.write(torch.full((n,), 0.25))
    for name, value in model.state_dict().items():
        assert torch.equal(value, original[name] * (0.25 if "lora_B" in name else 1)), name
    quarter = weights(model)
    factors = torch.ones(n)
    factors[5] = float("nan")
    with pytest.raises(uf.UcanError, match="finite"):
        edit.write(factors)
    assert_same_weights(model, quarter)
    edit.restore()
    assert_same_weights(model, original)


def edit_of_b(model) -> tuple[WeightEdit, int]:
    groups = neuron_groups(model, find_layers(model, "default"), "output")
    return WeightEdit(groups), sum(group.n for group in groups)


@pytest.mark.parametrize("when", ["before the first write", "after a restore"])
def test_a_write_by_others_in_between_does_not_count(when):
    model = trained()
    original = weights(model)
    edit, n = edit_of_b(model)
    if when == "after a restore":
        with edit.applied(torch.full((n,), 2.0)):
            pass
    changed = next(p for name, p in model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        changed.add_(1.0)
    edit.write(torch.full((n,), 0.5))
    expected = {k: v * (0.5 if "lora_B" in k else 1) for k, v in original.items()}
    assert_same_weights(model, expected)
    edit.restore()
    assert_same_weights(model, original)


@pytest.mark.parametrize("writes", [0, 1])
def test_a_write_that_fails_half_way_leaves_the_originals(monkeypatch, writes):
    model = trained()
    original = weights(model)
    edit, n = edit_of_b(model)
    for _ in range(writes):
        edit.write(torch.full((n,), 0.5))

    def broken(weights, factors, offsets, axes):
        weights[0].zero_()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights_module.ops, "attenuate_", broken)
        with pytest.raises(KeyboardInterrupt):
            edit.write(torch.full((n,), 0.25))
    assert_same_weights(model, original)


def test_inference_tensors_are_written_from_the_originals():
    with torch.inference_mode():
        model = trained()
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    fresh = torch.nn.Parameter(parameter.clone(), requires_grad=False)
                    module._parameters[name] = fresh
        original = weights(model)
        edit, n = edit_of_b(model)
        for factor in (0.5, 0.25):
            edit.write(torch.full((n,), factor))
            expected = {k: v * (factor if "lora_B" in k else 1) for k, v in original.items()}
            assert_same_weights(model, expected)
