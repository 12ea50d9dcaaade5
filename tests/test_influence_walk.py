"""Several influence steps: against dense algebra, where they end, and what they leave behind."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import helpers_models as hm
import influence_oracle as oracle
import pytest
import torch
from plan_helpers import assert_same_bits, snapshot
from trained_model import (
    MEMBERS,
    assert_same_weights,
    by_heart,
    forget_batches,
    mean_nll,
    mixed_batches,
    random_batches,
    retain_batches,
    scored_logits,
    trained,
    weights,
)

import ucan_fast as uf
from ucan_fast import calibration, evaluation, influence_walk, walk_job
from ucan_fast.influence_walk import InfluenceWalk

CONFIG = uf.UcanConfig(method="influence", damping=0.03, retain_gradient_weight=2.0)
STEPS = uf.UcanConfig.preset("thorough", influence_steps=4, max_retain_loss_increase=0.05)


def model64():
    return hm.lora(hm.gpt2(dtype=torch.float64), r=2, autocast_adapter_dtype=False).double()


def walk_of(model, *, forget=None, retain=None, config=CONFIG, sample=None, **options):
    """A walk whose factors are of all the retain batches, whatever sample it runs."""
    forget = forget_batches(count=8) if forget is None else forget
    retain = retain_batches(count=12) if retain is None else retain
    factors = (
        uf.collect_factors(model, forget, group="forget"),
        uf.collect_factors(model, retain),
    )
    return InfluenceWalk(model, forget, sample or retain, *factors, config, **options)


# The steps.


def without_adapter(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.zero_()
    return model


@pytest.mark.parametrize(
    ("most", "drawn", "started"),
    [
        (0.02, False, False),
        (math.inf, False, False),
        (math.inf, True, False),
        (math.inf, False, True),
        (math.inf, True, True),
    ],
)
def test_two_steps_are_those_of_the_formula(most, drawn, started, monkeypatch):
    """Momentum, control variate, references and both limits of the length, by dense solves."""
    monkeypatch.setattr(influence_walk, "_MOST_RISE", most)
    monkeypatch.setattr(influence_walk, "_MOST_LOSS", math.inf)
    monkeypatch.setattr(influence_walk, "_MOST_RETURN", math.inf)
    model = model64()
    forget, retain = forget_batches(count=8), retain_batches(count=12)
    sample = retain_batches(count=16, size=4, seed=3)
    config = CONFIG.replace(influence_steps=2, influence_batches=2, seed=5) if drawn else CONFIG
    now, factors = copy.deepcopy(model), oracle.factors(model, retain, 1)
    start = plan_of(model, forget_batches(seed=7, count=8), retain) if started else None
    walk = walk_of(model, forget=forget, retain=retain, sample=sample, config=config, start=start)
    if started:
        move(now, {key: start.strength * d for key, d in start.directions.items()})
    generator = torch.Generator().manual_seed(5)
    sums, positions = oracle.gradients(model, retain, 1)
    bank = mean(sums, positions)
    origin = copy.deepcopy(model)
    limit = math.log(hm.VOCAB)
    references = [min(c, limit) for c in oracle.costs(without_adapter(model), forget, 1)]
    counted = [c < r for c, r in zip(oracle.costs(model, forget, 1), references, strict=True)]
    assert 0 < sum(counted) < len(counted), "a case where the references decide"
    momentum = None
    for number in (1, 2):
        g = mean(*oracle.gradients(now, forget, 1, below=references))
        run = sample
        if drawn:
            order = torch.randperm(len(sample), generator=generator)[:2]
            run = [sample[index] for index in order.tolist()]
        at_origin = mean(*oracle.gradients(origin, run, 1))
        r = mean(*oracle.gradients(now, run, 1))
        ahead = {k: g[k] - 2.0 * (bank[k] + r[k] - at_origin[k]) for k in g}
        if momentum is not None:
            ahead = {k: 0.7 * momentum[k] + 0.3 * ahead[k] for k in g}
        momentum = ahead
        d = {k: solved(k, ahead[k], factors, positions) for k in ahead}
        slope, square = dot(g, d), dot(ahead, d)
        length = math.sqrt(2 * CONFIG.influence_radius / square)
        limited = slope > 0 and most / slope < length
        assert limited == (most == 0.02), "both limits are tried"
        length = most / slope if limited else length
        costs = oracle.costs(now, forget, 1)
        move(now, {k: length * v for k, v in d.items()})
        assert walk.advance()
        assert walk.steps == number
        for (name, ours), theirs in zip(model.named_parameters(), now.parameters(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-9), (number, name)
        said = walk.measured[-1]
        assert said.forget_nll == pytest.approx(sum(costs) / len(costs), rel=1e-6)
        below = [c < r for c, r in zip(costs, references, strict=True)]
        assert said.known == pytest.approx(sum(below) / len(below))
        assert said.rise == pytest.approx(length * slope, rel=1e-6)


def by_heart_batches():
    """What :func:`by_heart` knows: three sequences to forget, the others."""
    found = random_batches(MEMBERS)
    for batch in found:
        known = batch["attention_mask"].clone()
        known[:, :5] = 0  # where no sequence is told from the others yet
        batch["labels"] = batch["input_ids"].masked_fill(known == 0, -100)
    one, other = found
    parts = [{key: value[part] for key, value in one.items()} for part in (slice(3), slice(3, 16))]
    return parts[:1], [parts[1], other]


def test_what_is_known_by_heart_pulls_too():
    """The slope of its NLL is next to nothing."""
    model = by_heart().requires_grad_(False)
    forget, retain = by_heart_batches()
    walk = walk_of(model, forget=forget, retain=retain)
    costs = torch.tensor(oracle.costs(model, forget, 0), dtype=torch.float64)
    assert walk._by_heart
    assert costs.mean() < 0.2
    assert (costs < 0.05).sum() > len(costs) / 2, "a case where most are weighted"
    for _ in range(6):  # to where some are weighted, some are not, and some count no more
        assert walk.advance()
    costs = torch.tensor(oracle.costs(model, forget, 0), dtype=torch.float64)
    references = torch.cat(walk._references)
    weighted = costs < 0.1
    assert weighted.any()
    assert (costs[~weighted] < references[~weighted]).any()
    assert (costs >= references).any()
    side = walk._side(walk._forget, "forget", walk._references)
    below = references.tolist()
    wanted = mean(*oracle.gradients(model, forget, 0, below=below, by_heart=True))
    for key, gradient in wanted.items():
        assert (side.gradient[key] - gradient).norm() < 1e-3 * gradient.norm(), key
    assert side.known == pytest.approx(float((costs < references).double().mean()))
    assert side.reached == pytest.approx(float(costs.minimum(references).mean()), rel=1e-4)


def test_what_is_not_known_by_heart_is_walked_as_ever(monkeypatch):
    """No weights, and no guard that could halve a step."""
    monkeypatch.setattr(influence_walk, "_MOST_RETURN", -math.inf)
    monkeypatch.setattr(influence_walk, "_LEAST_PULL", math.inf)
    walk = walk_of(trained())
    assert not walk._by_heart
    assert walk.advance()
    assert math.isfinite(walk.measured[0].rise)


@pytest.mark.parametrize("drawn", [0, 1])
def test_by_heart_the_walk_goes_on_and_comes_back(drawn):
    model = by_heart().requires_grad_(False)
    forget, retain = by_heart_batches()
    origin = snapshot(model)
    config = CONFIG.replace(influence_steps=4, influence_batches=drawn)
    walk = walk_of(model, forget=forget, retain=retain, config=config)
    assert bool(walk._all) == bool(drawn)
    known = mean_nll(model, forget, "forget")
    for step in range(4):
        assert walk.advance(last=step == 3)
    assert mean_nll(model, forget, "forget") > known + 0.1
    walk.restore()
    assert_same_bits(model, origin)


def test_by_heart_a_second_request_goes_on_where_the_first_ended():
    """Its positions are weighted as they are there, not as they were at the origin."""
    model = by_heart().requires_grad_(False)
    forget, retain = by_heart_batches()
    origin = snapshot(model)
    first = walk_of(model, forget=forget, retain=retain)
    for _ in range(3):
        assert first.advance()
    start = first.plan()
    there = oracle.costs(model, forget, 0)
    first.restore()
    walk = walk_of(model, forget=forget, retain=retain, start=start)
    assert walk._by_heart, "as the origin is, though the start knows less"
    walk._edit.write(1.0)
    side = walk._side(walk._forget, "forget", walk._references)
    below = torch.cat(walk._references).tolist()
    wanted = mean(*oracle.gradients(model, forget, 0, below=below, by_heart=True))
    for key, gradient in wanted.items():
        assert (side.gradient[key] - gradient).norm() < 1e-3 * gradient.norm(), key
    walk.restore()
    assert walk.advance()
    assert walk.measured[0].forget_nll == pytest.approx(sum(there) / len(there), rel=1e-3)
    assert mean_nll(model, forget, "forget") > sum(there) / len(there)
    walk.restore()
    assert_same_bits(model, origin)


def test_what_gives_no_number_is_refused_before_the_first_step():
    model = trained()
    origin = snapshot(model)

    def base_overflows(module, inputs, output):
        b = [p for name, p in model.named_parameters() if ".lora_B." in name]
        return output * math.nan if not any(p.any() for p in b) else output

    def impossible(module, inputs, output):
        return output.index_fill(-1, token, -math.inf)

    forget = forget_batches(count=8)
    token = forget[0]["input_ids"][0, -1:]
    retain = retain_batches(count=12)
    factors = (uf.collect_factors(model, forget, group="forget"), uf.collect_factors(model, retain))
    head = model.get_output_embeddings()
    for hook, match in (
        (base_overflows, "batch 0: .*without its adapter is not a number"),
        (impossible, "the forget loss is inf nats per token"),
    ):
        handle = head.register_forward_hook(hook)
        with pytest.raises(uf.UcanError, match=match):
            InfluenceWalk(model, forget, retain, *factors, CONFIG)
        handle.remove()
        assert_same_bits(model, origin)


def test_the_pull_of_the_surest_and_of_the_least_sure():
    nll = torch.tensor([0.0, 1e-9, 1e-5, 1e-3, 0.05, 0.2, 1.0, 80.0, math.inf])
    exact = [1e3, 1e3, 1e3, 0.1 / -math.expm1(-1e-3), 0.1 / -math.expm1(-0.05), 1, 1, 1, 1]
    torch.testing.assert_close(influence_walk.pull(nll), torch.tensor(exact))


def plan_of(model, forget, retain, strength=0.2):
    """One step, by factors of its own."""
    factors = (
        uf.collect_factors(model, forget, group="forget"),
        uf.collect_factors(model, retain),
    )
    return uf.make_influence_plan(model, *factors, CONFIG.replace(strength=strength))


def move(model, directions: dict) -> None:
    with torch.no_grad():
        for name, layer in oracle.lora_layers(model).items():
            for letter, p in zip("AB", oracle.weights_of(layer), strict=True):
                p.add_(directions[f"{name}.lora_{letter}"])


def mean(sums: dict, count: int) -> dict:
    return {key: value / count for key, value in sums.items()}


def dot(one: dict, other: dict) -> float:
    return sum(float((one[key] * other[key]).sum()) for key in one)


def solved(key: str, gradient: torch.Tensor, factors: dict, positions: int) -> torch.Tensor:
    """F⁻¹ of it, F being the mean over scored positions."""
    f = factors[key.rpartition(".")[0]]
    left, right = ("s_z", "c_x") if key.endswith("A") else ("s_h", "c_z")
    return (
        positions
        / f["tokens"]
        * oracle.kronecker_solve(
            oracle.damped(f[left], f["tokens"], CONFIG.damping),
            gradient,
            oracle.damped(f[right], f["tokens"], CONFIG.damping),
        )
    )


def test_the_first_step_does_not_depend_on_the_sample(monkeypatch):
    """At the origin the retain gradient is the bank's."""
    monkeypatch.setattr(influence_walk, "_MOST_LOSS", math.inf)
    one, other = trained(), trained()
    walk_of(one).advance()
    walk_of(other, sample=retain_batches(count=8, seed=99)).advance()
    assert_same_weights(one, weights(other))


@pytest.mark.parametrize("variant", ["b-only", "last-blocks", "eigenbasis", "diagonal"])
def test_every_variant_moves_its_own_matrices(variant):
    model = trained()
    config = CONFIG.replace(influence_variant=variant, influence_rank=3, influence_blocks=1)
    before = weights(model)
    walk = walk_of(model, config=config)
    for _ in range(2):
        assert walk.advance()
    moved = {name for name, w in weights(model).items() if not torch.equal(w, before[name])}
    wanted = {
        name
        for name in before
        if ".lora_" in name
        and (variant != "b-only" or ".lora_B." in name)
        and (variant != "last-blocks" or ".layers.1." in name)
    }
    assert moved == wanted
    assert mean_nll(model, forget_batches(count=8), "forget") > walk.measured[0].forget_nll


def test_accelerated_models_take_the_same_steps():
    plain, fast = trained(), trained()
    uf.accelerate(fast)
    for model in (plain, fast):
        walk = walk_of(model)
        for _ in range(2):
            assert walk.advance()
    for (name, one), other in zip(weights(plain).items(), weights(fast).values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5), name


def test_a_step_that_the_retain_batches_do_not_bear_is_halved(monkeypatch):
    """Sets that are alike, and nothing that holds the retain side: every step costs it."""
    forget, config = retain_batches(count=8, seed=5), CONFIG.replace(retain_gradient_weight=0.0)
    costs, rises = {}, {}
    before = mean_nll(trained(), retain_batches(count=12), "retain")
    for most in (math.inf, 0.02, -1.0):
        monkeypatch.setattr(influence_walk, "_MOST_LOSS", most)
        model = trained()
        walk = walk_of(model, forget=forget, config=config)
        went = walk.advance()
        costs[most] = mean_nll(model, retain_batches(count=12), "retain") - before
        rises[most] = sum(walk._rises.values())
        assert went == (most != -1.0)
    assert costs[math.inf] > 0.02, "the case is one where the full step is too long"
    assert 0 < costs[0.02] <= 0.02
    # No length is short enough for a retain loss that must fall: the step is taken back.
    assert walk.ended == "no shorter step 1 kept the retain batches"
    assert walk.steps == 0
    assert abs(costs[-1.0]) < 1e-4
    assert rises[-1.0] == pytest.approx(0, abs=1e-9)
    assert rises[0.02] in [pytest.approx(rises[math.inf] / 2**k) for k in (1, 2, 3, 4)]


def test_a_step_that_brings_the_forget_set_back_is_halved(monkeypatch):
    """Nothing but the retain set is followed, and its sequences are the forget set's."""
    monkeypatch.setattr(influence_walk, "BY_HEART", math.inf)
    config = CONFIG.replace(retain_gradient_weight=50.0, influence_radius=2e-3)
    forget = retain_batches(count=12)
    costs, rises = {}, {}
    before = walk_of(trained(), forget=forget)._standing()[1]
    for most in (math.inf, 0.02, -1.0):
        monkeypatch.setattr(influence_walk, "_MOST_RETURN", most)
        model = trained()
        walk = walk_of(model, forget=forget, config=config)
        went = walk.advance()
        costs[most] = walk._standing()[1] - before
        rises[most] = sum(walk._rises.values())
        assert went == (most != -1.0)
    assert costs[math.inf] < -0.03, "the case is one where the full step is too long"
    assert -0.02 <= costs[0.02] < 0
    assert walk.ended == "no shorter step 1 kept what was forgotten"
    assert abs(costs[-1.0]) < 1e-4
    assert rises[0.02] in [pytest.approx(rises[math.inf] / 2**k) for k in range(1, 8)]


def test_lengths_come_back_twice_as_long_at_a_time():
    walk, other = walk_of(trained()), walk_of(trained())
    for one in (walk, other):
        one.advance()
    for _ in range(3):
        walk.shorten()
    assert walk._scale == 0.125
    scales = []
    for _ in range(4):
        assert walk.advance()
        scales.append(walk._scale)
    assert scales == [0.25, 0.5, 1, 1]


def test_gradients_are_only_taken_where_a_halved_step_is_borne(monkeypatch):
    """A halved step is looked at by a forward pass first."""
    walk = walk_of(trained())
    calls, costs = [], iter([9.0, 9.0])
    side, loss = walk._side, influence_walk.group_loss

    def taken(batches, group, *references):
        found = side(batches, group, *references)
        calls.append(f"{group} gradients")
        if len(calls) == 3:  # where the whole step led
            found.nll = 9.0
        return found

    def passed(model, batches, group):
        calls.append(f"{group} loss")
        found = loss(model, batches, group)
        cost = next(costs, found.mean)
        return evaluation.Loss(cost * found.tokens, found.tokens)

    monkeypatch.setattr(walk, "_side", taken)
    monkeypatch.setattr(influence_walk, "group_loss", passed)
    assert walk.advance()
    assert walk._scale == 0.25, "halved three times, and twice as long next time"
    wanted = ["retain gradients", "forget gradients", "retain gradients", *["retain loss"] * 3]
    assert calls == [*wanted, "retain gradients"]
    calls.clear()
    assert walk.advance(last=True)
    assert calls == ["forget gradients", "retain loss"], "those of the retain set are at hand"


def test_drawn_batches_are_others_before_every_step(monkeypatch):
    model = trained()
    config = CONFIG.replace(influence_steps=4, influence_batches=2)
    drawn, whole = [], retain_batches(count=24, size=4)
    walk = walk_of(model, retain=iter(whole), sample=iter(whole), config=config)
    real = walk._side

    def spied(batches, group, *references):
        if group == "retain":
            drawn.append([id(batch) for batch in batches])
        return real(batches, group, *references)

    monkeypatch.setattr(walk, "_side", spied)
    for _ in range(4):
        assert walk.advance()
    first, *later = drawn  # at the origin once, then there and where the model is
    steps = [first, *later[::2]]
    assert later[::2] == later[1::2]
    assert all(len(set(step)) == 2 for step in steps)
    assert len({tuple(step) for step in steps}) > 1
    assert {name for step in steps for name in step} <= {id(batch) for batch in whole}
    # Where the model is after that is no matter of how the origin was visited.
    there = weights(model)
    walk._edit.write(1.0)
    assert_same_weights(model, there)


def test_batches_without_a_scored_position_are_not_drawn():
    retain = retain_batches(count=12)
    empty = {**retain[0], "labels": torch.full_like(retain[0]["input_ids"], -100)}
    config = CONFIG.replace(influence_steps=9, influence_batches=1)
    walk = walk_of(trained(), sample=[empty, *retain, empty], config=config)
    for _ in range(6):
        assert walk.advance()
    # As many as there are: all of them, run once.
    one, other = trained(), trained()
    for model, count in ((one, 0), (other, 7)):
        walk = walk_of(model, config=config.replace(influence_batches=count))
        walk.advance()
        assert not walk._all, "nothing to draw from"
    assert_same_weights(one, weights(other))


def test_a_step_after_which_the_retain_gradient_is_not_finite_is_halved(monkeypatch):
    """Half precision overflows in the backward pass before the loss does."""
    model, whole = trained(), trained()
    walk, other = walk_of(model), walk_of(whole)
    real, calls = walk._side, []

    def overflows(batches, group, *references):
        found = real(batches, group, *references)
        calls.append(group)
        if calls == ["retain", "forget", "retain"]:  # where the first step led
            found.gradient = {key: value * math.inf for key, value in found.gradient.items()}
        return found

    monkeypatch.setattr(walk, "_side", overflows)
    assert walk.advance()
    assert other.advance()
    assert walk.measured[0].rise == pytest.approx(other.measured[0].rise / 2)
    assert walk.advance()


def test_what_is_known_by_hand():
    """As much as the next step measures, and nothing moves."""
    model = trained()
    walk = walk_of(model)
    for _ in range(3):
        before = weights(model)
        known = walk.known()
        assert_same_weights(model, before)
        assert walk.advance()
        assert walk.measured[-1].known == known
    assert known < 1
    # Position by position: better than without the adapter, and than blind guessing.
    nlls = {}
    for name, which in (("with", model), ("without", without_adapter(trained()))):
        with torch.no_grad():
            parts = [scored_logits(which, batch, "forget") for batch in forget_batches(count=8)]
            rows = [z.double().log_softmax(-1)[range(len(t)), t] for z, t in parts]
            nlls[name] = -torch.cat(rows)
    better = nlls["with"] < nlls["without"].clamp(max=math.log(hm.VOCAB))
    assert walk.known() == pytest.approx(float(better.double().mean()))


# Where they end.


def test_what_the_adapter_does_not_know_is_left_alone():
    """No position is better known with the adapter than without: nothing is to be forgotten."""
    model = without_adapter(trained())
    before = weights(model)
    walk = walk_of(model)
    assert not walk.advance()
    assert walk.steps == 0
    assert walk.plan().is_noop
    assert_same_weights(model, before)


def test_the_walk_ends_where_little_is_known_better_than_its_references():
    """Without references the same steps go on for as long as they are asked for."""
    model, free = trained(), trained()
    walk, endless = walk_of(model), walk_of(free)
    endless._references = [torch.full_like(r, math.inf) for r in endless._references]
    origin = mean_nll(model, forget_batches(count=8), "forget")
    for _ in range(30):
        if not walk.advance():
            break
    assert walk.ended == "the forget set is known no better than its references"
    for _ in range(walk.steps + 3):
        assert endless.advance()
    known, *_, last = [step.known for step in walk.measured]
    assert known > 0.8 > 0.5 > last >= influence_walk.FORGOTTEN
    assert last > influence_walk.FORGOTTEN > walk.known()
    assert endless.measured[-1].known == 1
    assert mean_nll(model, forget_batches(count=8), "forget") > origin + 0.5


def test_references_are_capped_by_never_seen_data():
    free, capped = walk_of(trained()), walk_of(trained(), never_seen=1.5)
    assert max(float(r.max()) for r in free._references) > 1.5
    assert max(float(r.max()) for r in capped._references) == 1.5
    for walk in (capped, free):
        assert walk.advance()
    assert capped.measured[0].known < free.measured[0].known


# What they leave behind.


def test_the_plan_is_where_the_model_is():
    model = trained()
    origin, walk = snapshot(model), walk_of(model)
    before = mean_nll(model, forget_batches(count=8), "forget")
    for _ in range(3):
        assert walk.advance()
    there, plan = weights(model), walk.plan()
    rise = mean_nll(model, forget_batches(count=8), "forget") - before
    assert plan.strength == pytest.approx(rise, rel=1e-4)
    assert sum(plan.shares.values()) == pytest.approx(1)
    walk.restore()
    assert_same_bits(model, origin)
    plan.apply(model)
    for name, weight in weights(model).items():
        assert torch.allclose(weight, there[name], rtol=1e-6, atol=1e-7), name
    plan.undo(model)
    assert_same_bits(model, origin)


def test_shortened_and_taken_back():
    model = trained()
    walk = walk_of(model)
    walk.advance()
    one = weights(model)
    walk.advance()
    two = weights(model)
    rise = walk.measured[-1].rise
    walk.shorten()
    assert walk.measured[-1].rise == rise / 2
    for name, weight in weights(model).items():
        assert torch.allclose(weight, (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-6), name
    walk.back()
    assert walk.steps == 1
    for name, weight in weights(model).items():
        assert torch.allclose(weight, one[name], rtol=1e-5, atol=1e-6), name
    # The next step is half as long as it would have been, and the one after that as long.
    full = trained()
    other = walk_of(full)
    for _ in range(2):
        other.advance()
    walk.advance()
    assert walk.measured[-1].rise == pytest.approx(0.5 * other.measured[-1].rise, rel=0.05)
    assert walk._scale == 1


def test_a_step_that_was_taken_back_is_the_same_again():
    """No direction of a refused step is kept in the momentum."""
    model = trained()
    walk = walk_of(model)
    for _ in range(2):
        walk.advance()
    two = weights(model)
    walk.back()
    walk.advance()
    for name, weight in weights(model).items():
        assert torch.allclose(weight, two[name], rtol=1e-4, atol=1e-6), name


def test_a_step_is_taken_back_once():
    model = trained()
    origin, walk = snapshot(model), walk_of(model)
    for call in (walk.back, walk.shorten):
        with pytest.raises(uf.UcanError, match="no last step"):
            call()
    for _ in range(2):
        walk.advance()
    walk.back()
    with pytest.raises(uf.UcanError, match="no last step"):
        walk.back()
    assert walk.steps == 1
    # Restored, the walk begins anew.
    walk.restore()
    assert_same_bits(model, origin)
    assert walk.plan().is_noop
    walk.advance()
    again = weights(model)
    assert walk.steps == 1
    fresh = trained()
    walk_of(fresh).advance()
    assert_same_weights(fresh, again)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"never_seen": math.nan}, "never_seen must be nats per token > 0, not nan"),
        ({"never_seen": 0.0}, "never_seen must be nats per token > 0"),
        ({"forget": 5}, "forget must be an iterable of batches, not int"),
        ({"retain": {"input_ids": None}}, "retain must be an iterable of batches, not one dict"),
    ],
)
def test_what_a_walk_is_called_with(options, match):
    model = trained()
    factors = (
        uf.collect_factors(model, forget_batches(count=8), group="forget"),
        uf.collect_factors(model, retain_batches(count=12)),
    )
    batches = [options.pop(name, []) for name in ("forget", "retain")]
    with pytest.raises(uf.UcanError, match=match):
        InfluenceWalk(model, *batches, *factors, CONFIG, **options)


def test_modes_gradients_and_random_numbers_stay():
    model = trained().train()
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    walk = walk_of(model)
    walk.advance()
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("when", [1, 2, 3])
def test_a_failure_on_the_way_restores_the_origin(when, monkeypatch):
    model = trained()
    origin, walk = snapshot(model), walk_of(model)
    calls, real = [], influence_walk.gradients

    def fails(*arguments, **options):
        calls.append(1)
        if len(calls) > 3 * when:
            raise RuntimeError("out of memory")
        return real(*arguments, **options)

    monkeypatch.setattr(influence_walk, "gradients", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        all(walk.advance() for _ in range(4))
    assert_same_bits(model, origin)


def test_gradients_that_are_not_finite_are_named(monkeypatch):
    model = trained()
    origin, walk = snapshot(model), walk_of(model)
    walk.advance()
    real = influence_walk.gradients
    monkeypatch.setattr(
        influence_walk, "gradients", lambda *a, **o: [g * math.nan for g in real(*a, **o)]
    )
    with pytest.raises(
        uf.UcanError, match=r"not finite after 1 influence step;.*original ones.*damping"
    ):
        walk.advance()
    assert_same_bits(model, origin)


# unlearn with several steps.


def test_the_last_step_takes_no_gradient_that_nobody_follows(monkeypatch):
    taken, real, seen = [], InfluenceWalk._side, []

    def spied(self, batches, group, *references):
        taken.append(group)
        return real(self, batches, group, *references)

    monkeypatch.setattr(InfluenceWalk, "_side", spied)
    result = uf.unlearn(
        trained(),
        forget=forget_batches(),
        retain=retain_batches(count=64),
        config=STEPS.replace(influence_steps=3),
        evaluate=False,
        progress=lambda *told: seen.append(told),
    )
    assert result.report.search.chosen == 3
    assert taken == ["retain", "forget"] * 3
    # A bar over the steps.
    assert [told for told in seen if told[2] == "influence steps"] == [
        (done, 3, "influence steps") for done in range(4)
    ]


def test_several_steps_forget_more_than_one_at_the_same_budget(tmp_path):
    forget, retain = forget_batches(), retain_batches(count=64)
    one, several = trained(), trained()
    single = STEPS.replace(influence_steps=1)
    uf.unlearn(one, forget=forget, retain=retain, config=single, evaluate=False)
    origin = weights(several)
    config = STEPS.replace(influence_steps=8)
    result = uf.unlearn(several, forget=forget, retain=retain, config=config)
    unseen = retain_batches(count=256, seed=77)
    assert mean_nll(several, forget, "forget") > mean_nll(one, forget, "forget") + 0.1
    assert mean_nll(several, unseen, "retain") < 1.05 * mean_nll(trained(), unseen, "retain")
    rise = mean_nll(several, forget, "forget") - mean_nll(trained(), forget, "forget")
    assert result.plan.strength == pytest.approx(rise, rel=1e-4), "measured, not predicted"
    report = result.report
    assert report.search.parameter == "steps"
    assert report.search.loss_after <= 1.05 * report.search.loss_before
    taken = report.change["steps"]
    assert len(taken) == report.search.chosen <= 8
    nlls = [s["forget_nll"] for s in taken]
    assert nlls == sorted(nlls)
    text = report.to_markdown()
    assert f"moved by {len(taken)} influence steps, variant `all`, whose measured rise" in text
    walk = walk_of(there := trained(), forget=forget, retain=retain)
    there.load_state_dict(several.state_dict())
    assert report.guidance.still_known == walk.known()
    wanted = "retrain" if walk.known() >= influence_walk.FORGOTTEN else "influence"
    assert report.guidance.recommendation == wanted
    assert f"Recommendation: **{report.guidance.recommendation}**. The steps" in text
    assert "| step | forget NLL | retain NLL | still known | predicted rise |" in text
    first = taken[0]
    assert (
        f"| 1 | {first['forget_nll']:.4f} | {first['retain_nll']:.4f} "
        f"| {100 * first['known']:.1f} % | {first['rise']:.4f} |"
    ) in text
    result.report.figure(tmp_path / "figure.png")
    result.plan.undo(several)
    assert_same_weights(several, origin)


def test_the_budget_is_measured_apart_from_what_the_steps_run(monkeypatch):
    """Without calibration= a part of the retain batches is kept for it; with it none is."""
    forget, retain = forget_batches(), retain_batches(count=48, size=8)
    bank = uf.collect_factors(trained(), [*forget, *retain])
    run, measured = [], []
    real, loss = InfluenceWalk, evaluation.group_loss

    def kept(model, forget, retain, *arguments, **options):
        run[:] = [id(batch) for batch in retain]
        return real(model, forget, retain, *arguments, **options)

    def spied(model, batches, group="retain", *arguments):
        if group == "retain":
            measured[:] = [id(batch) for batch in batches]
        return loss(model, batches, group, *arguments)

    monkeypatch.setattr(walk_job, "InfluenceWalk", kept)
    monkeypatch.setattr(calibration, "group_loss", spied)
    every = {id(batch) for batch in retain}
    for options in ({"bank": bank}, {}):
        result = uf.unlearn(
            trained(), forget=forget, retain=retain, config=STEPS, evaluate=False, **options
        )
        assert set(run) | set(measured) == every
        assert len(run) + len(measured) == len(every) == 6
        assert len(measured) == 2
        note = "measured on 2 of 6 retain batches; the steps ran the others"
        assert result.report.notes["retain budget"] == note
        given = uf.unlearn(
            trained(),
            forget=forget,
            retain=retain[:4],
            calibration=retain[4:],
            config=STEPS,
            evaluate=False,
            **options,
        )
        assert run == [id(batch) for batch in retain[:4]]
        assert measured == [id(batch) for batch in retain[4:]]
        assert "retain budget" not in given.report.notes


def test_retain_tokens_among_the_forget_batches():
    forget, mixed = forget_batches(), mixed_batches()
    model = trained()
    before = mean_nll(model, forget, "forget")
    result = uf.unlearn(model, forget=mixed, config=STEPS, evaluate=False)
    assert result.report.notes["retain budget"].startswith("measured on 1 of 2")
    assert mean_nll(model, forget, "forget") > before + 0.5
    with pytest.raises(uf.UcanError, match=r"only one batch of retain data.*smaller batches"):
        uf.unlearn(trained(), forget=mixed[:1], config=STEPS)


def test_steps_beyond_the_budget_are_halved_and_taken_back():
    """Of sets that are alike: to forget one is to lose the other."""
    forget, retain = retain_batches(seed=21, count=16), retain_batches()
    careless = STEPS.replace(retain_gradient_weight=0.0)
    model = trained()
    origin = weights(model)
    with pytest.warns(uf.UcanWarning, match="changes nothing.*stopped by the budget of 1e-07 %"):
        result = uf.unlearn(
            model,
            forget=forget,
            retain=retain,
            config=careless.replace(max_retain_loss_increase=1e-9),
            evaluate=False,
        )
    assert [step for step, _ in result.report.search.curve] == [1] * 9
    assert result.plan.is_noop
    assert_same_weights(model, origin)
    # A wider budget takes the halved steps.
    wide = careless.replace(max_retain_loss_increase=0.02, influence_steps=20)
    result = uf.unlearn(trained(), forget=forget, retain=retain, config=wide, evaluate=False)
    search = result.report.search
    tried = [step for step, _ in search.curve]
    assert len(tried) > len(set(tried)), "a step was halved"
    assert search.loss_before < search.loss_after <= 1.02 * search.loss_before
    assert search.loss_after > 1.0195 * search.loss_before
    assert search.note.endswith("the budget of 2 % retain loss is used up.")
    assert result.plan.strength > 0


def test_it_stops_below_the_cost_of_never_seen_data(monkeypatch):
    forget, retain = forget_batches(), retain_batches()
    walks, real, advised = [], InfluenceWalk, set()

    def kept(*arguments, **options):
        walks.append(real(*arguments, **options))
        return walks[-1]

    monkeypatch.setattr(walk_job, "InfluenceWalk", kept)
    before = mean_nll(trained(), forget, "forget")
    for ceiling in (before + 0.3, before + 1.0, before + 2.0):
        model = trained()
        result = uf.unlearn(
            model, forget=forget, retain=retain, config=STEPS, holdout=ceiling, evaluate=False
        )
        reached = mean_nll(model, forget, "forget")
        assert before < reached <= ceiling
        # Where never-seen data are, that is where the steps aim, whatever share is still known.
        advice = result.report.guidance
        assert advice.still_known >= 0.2
        assert (advice.recommendation == "influence") == (reached >= 0.95 * ceiling)
        advised.add(advice.recommendation)
        assert reached > before + 0.1
        # No position is to cost more than never-seen data either.
        highest = max(float(r.max()) for r in walks[-1]._references)
        assert highest == pytest.approx(min(ceiling, math.log(hm.VOCAB)))
    assert advised == {"influence", "retrain"}
    assert result.report.search.chosen == STEPS.influence_steps, "the case that never gets there"
    # No step that could not but be halved to nothing follows.
    result = uf.unlearn(
        trained(),
        forget=forget,
        retain=retain,
        config=STEPS.replace(influence_steps=40),
        holdout=before + 0.3,
        evaluate=False,
    )
    assert f"the forget set costs what never-seen data do ({before + 0.3:.4f} nats" in (
        result.plan.note
    )
    assert result.report.search.chosen < 10
    assert result.plan.strength > 0.98 * 0.3
    model = trained()
    with pytest.warns(uf.UcanWarning, match="nothing to unlearn"):
        uf.unlearn(
            model,
            forget=random_batches(3),
            retain=retain,
            config=STEPS,
            holdout=0.5,
            evaluate=False,
        )
    assert_same_weights(model, weights(trained()))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"calibration": lambda model: 1.0}, r"a bank does not hold: pass retain= batches beside"),
        ({"calibration": retain_batches()}, r"measured on the data that the steps run"),
        ({}, r"pass retain= batches beside it"),
        ({"retain": retain_batches(), "holdout": -1.0}, r"holdout must be batches or nats per"),
        ({"retain": retain_batches(), "calibration": []}, r"the calibration set is empty"),
        ({"retain": []}, r"steps of unknown cost are not taken: retain= holds no batch"),
    ],
)
def test_what_is_missing_is_named(options, match):
    forget, retain = forget_batches(), retain_batches()
    model = trained()
    bank = uf.collect_factors(model, [*forget, *retain])
    before = weights(model)
    with pytest.raises(uf.UcanError, match=match):
        uf.unlearn(model, forget=forget, bank=bank, config=STEPS, **options)
    assert_same_weights(model, before)


# Requests in a row.


def two_requests():
    return forget_batches(count=8), forget_batches(seed=5, count=8), retain_batches(count=64)


@pytest.mark.parametrize("banked", [False, True])
def test_steps_go_on_from_the_plan_of_the_earlier_request(banked, tmp_path):
    one, two, retain = two_requests()
    model = trained()
    origin = snapshot(model)
    bank = uf.collect_factors(model, [*one, *two, *retain]) if banked else None
    options = {"retain": retain, "bank": bank, "config": STEPS, "evaluate": False}
    first = uf.unlearn(model, forget=one, **options)
    known = mean_nll(model, one, "forget"), mean_nll(model, two, "forget")
    second = uf.unlearn(model, forget=two, previous=first, **options)
    assert mean_nll(model, one, "forget") > known[0] - 0.05, "the first is not known again"
    assert mean_nll(model, two, "forget") > known[1] + 0.3
    search = second.report.search
    assert search.loss_after <= 1.05 * search.loss_before
    # The plan is the whole way from the origin: its statistics, undo and file are as ever.
    assert second.stats.tokens("forget") == sum(int(b["attention_mask"].sum()) for b in one + two)
    rise = mean_nll(model, two, "forget") - known[1]
    assert second.plan.strength == pytest.approx(rise, rel=1e-4)
    assert sum(second.plan.shares.values()) == pytest.approx(1)
    there = snapshot(model)
    second.plan.save(tmp_path / "plan", include_original=True)
    second.plan.undo(model)
    assert_same_bits(model, origin)
    again = uf.InfluencePlan.load(tmp_path / "plan")
    again.applied_fingerprint = again.originals = None
    again.apply(model)
    assert_same_bits(model, there)
    assert second.report.request["includes_previous_requests"]


def test_a_third_request_goes_on_from_both():
    one, two, retain = two_requests()
    three = forget_batches(seed=9, count=8)
    model, result = trained(), None
    origin = snapshot(model)
    options = {"retain": retain, "config": STEPS, "evaluate": False}
    known = []
    for forget in (one, two, three):
        result = uf.unlearn(model, forget=forget, previous=result, **options)
        known.append(mean_nll(model, forget, "forget"))
    for forget, nll in zip((one, two, three), known, strict=True):
        assert mean_nll(model, forget, "forget") > nll - 0.05
    result.plan.undo(model)
    assert_same_bits(model, origin)


def test_several_steps_go_on_from_one_but_not_one_from_several():
    one, two, retain = two_requests()
    model = trained()
    single = STEPS.replace(influence_steps=1)
    first = uf.unlearn(model, forget=one, retain=retain, config=single, evaluate=False)
    known = mean_nll(model, one, "forget")
    options = {"forget": two, "retain": retain, "evaluate": False}
    second = uf.unlearn(model, previous=first, config=STEPS, **options)
    assert mean_nll(model, one, "forget") > known - 0.05
    before = weights(model)
    options["forget"] = forget_batches(seed=9, count=8)
    for previous in (second, second.stats):
        with pytest.raises(uf.UcanError, match=r"would not take them again: answer this"):
            uf.unlearn(model, previous=previous, config=single, **options)
    with pytest.raises(uf.UcanError, match=r"pass previous= the whole result, not its statistics"):
        uf.unlearn(model, previous=second.stats, config=STEPS, **options)
    assert_same_weights(model, before)


def test_what_cannot_be_gone_on_from_is_named():
    one, two, retain = two_requests()
    model = trained()
    b_only = STEPS.replace(influence_variant="b-only")
    first = uf.unlearn(model, forget=one, retain=retain, config=b_only, evaluate=False)
    before = weights(model)
    with pytest.raises(uf.UcanError, match=r"lora_A is \(.*not there.*'all' and 'b-only'"):
        uf.unlearn(model, forget=two, retain=retain, config=STEPS, previous=first)
    assert_same_weights(model, before)
    first.plan.undo(model)
    with pytest.raises(uf.UcanError, match=r"moved other matrices .*'b-only'.*'all'"):
        walk_of(model, start=first.plan)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).add_(0.01)
    with pytest.raises(uf.UcanError, match=r"start from is for another adapter"):
        walk_of(model, config=b_only, start=first.plan)


def test_where_nothing_is_gone_on_to_the_earlier_plan_stays():
    one, two, retain = two_requests()
    model = trained()
    options = {"retain": retain, "config": STEPS, "evaluate": False}
    first = uf.unlearn(model, forget=one, **options)
    there = snapshot(model)
    known = mean_nll(model, two, "forget")
    result = uf.unlearn(model, forget=two, previous=first, holdout=known - 0.1, **options)
    assert_same_bits(model, there)
    assert "there is nothing to unlearn. The plan of the earlier requests stays" in result.plan.note
    assert result.report.change["steps"] == []
    search = result.report.search
    assert (search.chosen, search.curve) == (0.0, [])
    assert search.loss_after == pytest.approx(mean_nll(model, retain, "retain"), rel=0.2)
    # What is known is known of the adapter with the earlier plan.
    advice = result.report.guidance
    assert advice.recommendation == "influence"
    assert "costs about as much as never-seen data" in advice.text
    walk = walk_of(there_model := trained(), forget=two, retain=retain, never_seen=known - 0.1)
    there_model.load_state_dict(model.state_dict())
    assert advice.still_known == walk.known()
    # The earlier request used up the budget.
    tight = STEPS.replace(max_retain_loss_increase=1e-9)
    generator = torch.Generator().manual_seed(0)
    noise = {k: torch.randn(d.shape, generator=generator) for k, d in first.plan.directions.items()}
    worse = replace(first.plan, directions=noise, strength=0.05)
    worse.originals = worse.applied_fingerprint = None
    first.plan.undo(model)
    spent = replace(first, plan=worse)
    result = uf.unlearn(model, forget=one, previous=spent, **{**options, "config": tight})
    assert "the earlier requests alone use up the budget" in result.plan.note
    assert result.plan.strength == worse.strength
    advice = result.report.guidance
    assert (advice.recommendation, advice.still_known > 0.2) == ("retrain", True)


def test_a_second_request_ends_at_the_cost_of_never_seen_data_too():
    one, two, retain = two_requests()
    model = trained()
    options = {"retain": retain, "evaluate": False}
    first = uf.unlearn(model, forget=one, config=STEPS, **options)
    known = mean_nll(model, two, "forget")
    assert known > mean_nll(trained(), two, "forget") + 0.02, "the start is not the origin"
    config = STEPS.replace(influence_steps=40)
    result = uf.unlearn(
        model, forget=two, previous=first, config=config, holdout=known + 0.2, **options
    )
    assert "the forget set costs what never-seen data do" in result.plan.note
    assert 0 < result.report.search.chosen < 10
    reached = mean_nll(model, two, "forget")
    assert 0.98 * 0.2 - 1e-4 < reached - known <= 0.2 + 1e-6


def test_a_loss_that_is_infinite_in_the_end_makes_no_plan():
    model = trained()
    origin = snapshot(model)
    walk = walk_of(model)
    assert walk.advance()
    token = forget_batches(count=8)[0]["input_ids"][0, -1:]
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda *a: a[2].index_fill(-1, token, -math.inf))
    with pytest.raises(uf.UcanError, match="after 1 influence step the forget loss is inf"):
        walk.plan()
    handle.remove()
    walk.restore()
    assert_same_bits(model, origin)


def test_steps_that_only_undo_what_the_start_did_count_all_the_same():
    """The rise is that from the start: it may lead to below where the origin was."""
    forget, retain = forget_batches(count=8), retain_batches(count=12)
    model = trained()
    better = plan_of(model, forget, retain)
    better.directions = {key: -d for key, d in better.directions.items()}
    origin = mean_nll(model, forget, "forget")
    short = CONFIG.replace(influence_radius=2e-8)
    walk = walk_of(model, forget=forget, retain=retain, start=better, config=short)
    assert walk.advance()
    here = mean_nll(model, forget, "forget")
    assert walk.measured[0].forget_nll < here < origin, "the case is one of that kind"
    plan = walk.plan()
    assert plan.strength == pytest.approx(here - walk.measured[0].forget_nll, rel=1e-4)
    there = weights(model)
    walk.restore()
    plan.apply(model)
    for name, weight in weights(model).items():
        assert torch.allclose(weight, there[name], rtol=1e-5, atol=1e-7), name


def test_steps_that_raise_nothing_leave_the_start():
    forget, retain = forget_batches(count=8), retain_batches(count=12)
    model = trained()
    start = plan_of(model, forget_batches(seed=7, count=8), retain)
    walk = walk_of(model, forget=forget, retain=retain, start=start)
    assert walk.advance()
    walk._last = {key: 1.2 * value for key, value in walk._last.items()}
    walk._last_rises = dict.fromkeys(walk._last_rises, 0.0)
    walk._write(-1.0)  # a fifth of it the other way
    plan = walk.plan()
    assert plan.directions is start.directions
    assert plan.strength == start.strength
    assert "1 influence step did not raise the forget loss" in plan.note
    assert plan.config.influence_steps == walk.config.influence_steps


def test_a_saved_plan_that_does_nothing_can_be_gone_on_from(tmp_path):
    one, two, retain = two_requests()
    model = trained()
    known = mean_nll(model, one, "forget")
    options = {"retain": retain, "config": STEPS, "evaluate": False}
    with pytest.warns(uf.UcanWarning, match="nothing to unlearn"):
        nothing = uf.unlearn(model, forget=one, holdout=known - 0.1, **options)
    nothing.plan.save(tmp_path / "plan")
    plan = uf.InfluencePlan.load(tmp_path / "plan")
    again = uf.unlearn(
        trained(), forget=two, previous=replace(nothing, plan=plan, report=None), **options
    )
    alone = uf.unlearn(model, forget=two, previous=nothing, **options)
    assert alone.plan.strength > 0
    assert again.plan.strength == pytest.approx(alone.plan.strength)


def test_steps_do_not_go_on_from_another_method():
    one, two, retain = two_requests()
    model = trained()
    gates = uf.UcanConfig(method="gates")
    first = uf.unlearn(model, forget=one, retain=retain, config=gates, evaluate=False)
    before = weights(model)
    with pytest.raises(uf.UcanError, match=r"method='gates', and influence steps cannot go on"):
        uf.unlearn(model, forget=two, retain=retain, config=STEPS, previous=first)
    assert_same_weights(model, before)
    with pytest.raises(uf.UcanError, match="start must be an InfluencePlan, not 'plan'"):
        walk_of(trained(), start="plan")


@pytest.mark.parametrize("count", [1, 2])
def test_reports_of_requests_in_a_row(count):
    one, two, retain = two_requests()
    model, config = trained(), STEPS.replace(influence_steps=2)
    first = uf.unlearn(model, forget=one, retain=retain, config=config)
    assert "from where the earlier" not in first.report.to_markdown()
    known = mean_nll(model, two, "forget")
    holdout = None if count == 2 else known - 0.1  # no step is taken
    second = uf.unlearn(
        model, forget=two, retain=retain, config=config, previous=first, holdout=holdout
    )
    text = second.report.to_markdown()
    assert ("These steps moved them too, up or down" in text) == (count == 2)
    assert "earlier requests may have run any of them" in text
    if count == 2:
        assert "moved by 2 influence steps from where the earlier requests led, var" in text
    else:
        assert "moved by the steps of the earlier requests alone, variant" in text
    assert "whose measured rise of the forget NLL" in text


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_progress_tells_of_every_step_that_was_taken(taken):
    """Of the last one too, where the steps end before there are as many as wanted."""
    forget, retain, told = forget_batches(), retain_batches(count=32), []
    config, options = STEPS.replace(influence_steps=3, max_retain_loss_increase=9.0), {}
    if taken == 0:
        options["holdout"] = mean_nll(trained(), forget, "forget") - 0.1
    if taken == 1:
        losses = iter([1.0, 1.00999])  # nearly the whole budget
        config = config.replace(max_retain_loss_increase=0.01)
        options["calibration"] = lambda model: next(losses)
    result = uf.unlearn(
        trained(),
        forget=forget,
        retain=retain,
        config=config,
        evaluate=False,
        progress=lambda *event: told.append(event),
        **options,
    )
    assert len(result.report.change["steps"]) == taken
    events = [(done, total) for done, total, text in told if text == "influence steps"]
    assert events == [(done, 3) for done in range(taken + 1)]


def test_what_costs_more_than_blind_guessing_is_said():
    """Positions that no longer count are moved by the others all the same."""
    forget, retain = forget_batches(count=8), retain_batches(count=64)
    model = trained()
    far = STEPS.replace(influence_steps=12, influence_radius=0.05, max_retain_loss_increase=9.0)
    result = uf.unlearn(model, forget=forget, retain=retain, config=far, evaluate=False)
    after = mean_nll(model, forget, "forget")
    assert after > math.log(hm.VOCAB), "the case is one where it goes too far"
    assert f"now costs {after:.2f} nats per token, more than blind guessing (3.69)" in (
        result.plan.note
    )
    near = uf.unlearn(trained(), forget=forget, retain=retain, config=STEPS, evaluate=False)
    assert "blind" not in near.plan.note


@pytest.mark.parametrize("kind", ["lora_ga", "corda", "loftq", "something new"])
def test_initialisations_that_may_change_the_base_are_not_trusted(kind):
    model = trained()
    model.peft_config["default"].init_lora_weights = kind
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(uf.UcanError, match=f"'{kind}'.*changed the base.*holdout="):
        uf.unlearn(model, forget=forget_batches(), retain=retain_batches(), config=STEPS)
    assert not forwards, "refused before any work"
    for kept in (True, "gaussian", "EVA"):
        model.peft_config["default"].init_lora_weights = kept
        influence_walk.check_base(model, "default")


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_base_that_the_adapter_changed_is_no_reference(kind):
    model = hm.lora(hm.llama(hidden=32), r=4, init_lora_weights=kind)
    origin = snapshot(model)
    forget, retain = forget_batches(), retain_batches(count=32, size=8)
    with pytest.raises(uf.UcanError, match=f"'{kind}'.*changed the base.*holdout="):
        uf.unlearn(model, forget=forget, retain=retain, config=STEPS)
    assert_same_bits(model, origin)
    # Never-seen data are a reference all the same.
    ceiling = mean_nll(model, forget, "forget") + 0.1
    uf.unlearn(model, forget=forget, retain=retain, config=STEPS, holdout=ceiling, evaluate=False)


def test_a_plan_that_does_nothing_reports_no_steps():
    """Steps that only lower the retain loss, and the forget loss with it."""
    retain = retain_batches(count=48, size=8)
    model = trained()
    before = weights(model)
    with pytest.warns(uf.UcanWarning, match="did not raise the forget loss"):
        result = uf.unlearn(
            model,
            forget=retain[:2],
            retain=retain,
            config=STEPS.replace(retain_gradient_weight=50.0),
            evaluate=False,
        )
    report = result.report
    assert report.change["steps"] == []
    assert report.guidance is None
    assert (report.search.chosen, report.search.loss_after) == (0.0, report.search.loss_before)
    assert "influence steps" not in report.to_markdown().split("## ")[0]
    assert_same_weights(model, before)


def test_a_saved_plan_of_several_steps_is_the_same(tmp_path):
    model = trained()
    origin = weights(model)
    result = uf.unlearn(
        model, forget=forget_batches(), retain=retain_batches(), config=STEPS, evaluate=False
    )
    edited = weights(model)
    result.plan.save(tmp_path / "plan.safetensors")
    result.plan.undo(model)
    assert_same_weights(model, origin)
    loaded = uf.InfluencePlan.load(tmp_path / "plan.safetensors")
    assert loaded.config == STEPS
    loaded.apply(model)
    assert_same_weights(model, edited)
