"""The influence step: its direction against dense solves, and the plan that is put on and off."""

from __future__ import annotations

import copy
import json

import helpers_models as hm
import influence_oracle as oracle
import pytest
import torch
from plan_helpers import assert_same_bits, snapshot
from trained_model import forget_batches, retain_batches, trained

import ucan_fast as uf
from ucan_fast import influence
from ucan_fast.factors import InfluenceFactors
from ucan_fast.files import read_safetensors, write_safetensors
from ucan_fast.influence import FORMAT, FORMAT_VERSION, InfluencePlan, make_influence_plan

CONFIG = uf.UcanConfig(method="influence", strength=0.3)
VARIANTS = ("all", "b-only", "last-blocks", "eigenbasis", "diagonal")


def model64():
    return hm.lora(hm.gpt2(dtype=torch.float64), r=2, autocast_adapter_dtype=False).double()


def sets(model, **options) -> tuple[InfluenceFactors, InfluenceFactors]:
    forget = uf.collect_factors(model, forget_batches(count=8), group="forget", **options)
    return forget, uf.collect_factors(model, retain_batches(count=12), **options)


def planned(model=None, config=CONFIG) -> tuple:
    model = trained() if model is None else model
    return model, make_influence_plan(model, *sets(model), config)


# The direction.


@pytest.mark.parametrize("kappa", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_the_direction_is_that_of_the_dense_kronecker_systems(kappa, damping):
    model = model64()
    retain_data, forget_data = retain_batches(count=12), forget_batches(count=8)
    forget, retain = sets(model)
    config = CONFIG.replace(damping=damping, retain_gradient_weight=kappa)
    plan = make_influence_plan(model, forget, retain, config)

    g, positions = oracle.gradients(model, forget_data, 1)
    r, retained = oracle.gradients(model, retain_data, 1)
    factors = oracle.factors(model, retain_data, 1)
    d = {}
    for key in g:
        f = factors[key.rpartition(".")[0]]
        left, right = ("s_z", "c_x") if key.endswith("A") else ("s_h", "c_z")
        d[key] = oracle.kronecker_solve(
            oracle.damped(f[left], f["tokens"], damping),
            g[key] / positions - kappa * r[key] / retained,
            oracle.damped(f[right], f["tokens"], damping),
        )
    rises = {key: float((g[key] / positions * d[key]).sum()) for key in g}
    total = sum(rises.values())
    assert total > 0
    for key, wanted in d.items():
        error = (plan.directions[key] - wanted / total).abs().max()
        assert error < 1e-7 * (wanted / total).abs().max(), key
        assert plan.shares[key] == pytest.approx(rises[key] / total, rel=1e-6, abs=1e-12)
    assert sum(plan.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("variant", ["all", "b-only", "diagonal", "eigenbasis"])
def test_a_factor_between_the_scaling_and_b_moves_the_product_alike(variant):
    """The model is the same function: a step by its curvature goes the same way."""
    config = CONFIG.replace(influence_variant=variant, influence_rank=8)
    collected = "all" if variant == "b-only" else variant

    def products(plan, times: float) -> dict[str, torch.Tensor]:
        return {k: v * times if k.endswith("B") else v for k, v in plan.directions.items()}

    model, other, times = model64(), model64(), 4.0
    with torch.no_grad():
        for layer in oracle.lora_layers(other).values():
            layer.scaling["default"] *= times
            layer.lora_B["default"].weight /= times
    plans = [
        make_influence_plan(each, *sets(each, variant=collected, rank=8), config)
        for each in (model, other)
    ]
    wanted, got = products(plans[0], 1.0), products(plans[1], times)
    for key, value in wanted.items():
        assert torch.allclose(got[key], value, rtol=1e-6, atol=1e-9 * float(value.abs().max())), key


def test_every_factor_is_solved_for_once_and_freed_after_its_last_use(monkeypatch):
    model = hm.lora(hm.llama(layers=3))
    made, kept = [], []
    real, drop = influence.solver, influence.Direction.drop

    def counted(factor, *arguments):
        made.append(factor)
        return real(factor, *arguments)

    def watched(self, solves):
        kept.append(len(self._known))
        drop(self, solves)
        kept.append(len(self._known))

    monkeypatch.setattr(influence, "solver", counted)
    monkeypatch.setattr(influence.Direction, "drop", watched)
    planned(model)
    # Seven layers a block: S_z, S_h and C_z of each, C_x of q, k and v and of gate and up once.
    assert len(made) == 3 * (3 * 7 + 4)
    # The shared C_x, and those of the matrix at hand.
    assert max(kept) <= 3
    assert kept[-1] == 0


def test_the_strength_is_the_first_order_rise_of_the_forget_loss():
    model = model64()
    _, plan = planned(model)
    before = oracle_mean(model)
    for strength in (1e-3, 1e-4):
        plan.with_strength(strength).apply(moved := copy.deepcopy(model))
        rise = oracle_mean(moved) - before
        assert rise == pytest.approx(strength, rel=20 * strength)


def oracle_mean(model) -> float:
    from trained_model import mean_nll

    return mean_nll(model, forget_batches(count=8), "forget")


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_factors_serve_every_variant(variant):
    """As those that were collected for the variant."""
    model = trained()
    options = {"variant": variant, "rank": 3, "blocks": 1}
    config = CONFIG.replace(influence_variant=variant, influence_rank=3, influence_blocks=1)
    own = make_influence_plan(model, *sets(model, **options), config)
    full = make_influence_plan(model, *sets(model), config)
    assert list(own.directions) == list(full.directions)
    for key, direction in own.directions.items():
        scale = float(direction.abs().max())
        assert torch.allclose(direction, full.directions[key], rtol=1e-3, atol=1e-4 * scale), key
    letters = {key[-1] for key in own.directions}
    assert letters == ({"B"} if variant == "b-only" else {"A", "B"})
    blocks = {".layers.1." in key for key in own.directions}
    assert blocks == ({True} if variant == "last-blocks" else {True, False})


def test_variants_differ():
    model = trained()
    forget, retain = sets(model)
    plans = {}
    for variant in ("all", "eigenbasis", "diagonal"):
        config = CONFIG.replace(influence_variant=variant, influence_rank=3)
        plans[variant] = make_influence_plan(model, forget, retain, config)
    key = next(iter(plans["all"].directions))
    directions = [plan.directions[key] for plan in plans.values()]
    for i in range(3):
        for j in range(i):
            assert not torch.allclose(directions[i], directions[j], rtol=0.1)


def test_tied_parameters_move_by_their_pooled_factors():
    model = model64()
    layers = list(oracle.lora_layers(model).values())
    first, second = (m for n, m in oracle.lora_layers(model).items() if n.endswith("c_fc"))
    second.lora_A["default"].weight = first.lora_A["default"].weight
    assert len(layers) == 8
    forget, retain = sets(model)
    plan = make_influence_plan(model, forget, retain, CONFIG.replace(retain_gradient_weight=0.0))
    data = retain_batches(count=12)
    factors = oracle.factors(model, data, 1)
    names = [n for n in factors if n.endswith("c_fc")]
    pooled = {w: factors[names[0]][w] + factors[names[1]][w] for w in ("s_z", "c_x", "tokens")}
    g, positions = oracle.gradients(model, forget_batches(count=8), 1)
    key = f"{names[0]}.lora_A"
    assert f"{names[1]}.lora_A" not in plan.directions
    # It is called twice per token: half as far as once (and relative to the other layers).
    wanted = 0.5 * oracle.kronecker_solve(
        oracle.damped(pooled["s_z"], pooled["tokens"], 0.01),
        g[key] / positions,
        oracle.damped(pooled["c_x"], pooled["tokens"], 0.01),
    )
    other = f"{names[0]}.lora_B"
    f = factors[names[0]]
    reference = oracle.kronecker_solve(
        oracle.damped(f["s_h"], f["tokens"], 0.01),
        g[other] / positions,
        oracle.damped(f["c_z"], f["tokens"], 0.01),
    )
    scale = plan.directions[other].norm() / reference.norm()
    assert torch.allclose(plan.directions[key], scale * wanted, rtol=1e-6, atol=1e-12)
    # The two layers stay tied.
    plan.apply(model)
    assert second.lora_A["default"].weight is first.lora_A["default"].weight


def test_an_untrained_adapter_gives_a_plan_of_nothing():
    """B is 0: A has no gradient and no curvature, and only B can move."""
    model = trained()
    for layer in oracle.lora_layers(model).values():
        oracle.weights_of(layer)[1].data.zero_()
    _, plan = planned(model)
    for key, direction in plan.directions.items():
        assert bool(direction.any()) == key.endswith("B"), key


def test_the_same_set_on_both_sides_has_no_direction():
    model = trained()
    forget = uf.collect_factors(model, forget_batches(count=8))
    plan = make_influence_plan(model, forget, forget, CONFIG)
    assert plan.is_noop
    assert "no direction raises the forget loss" in plan.note
    with pytest.warns(uf.UcanWarning, match="changes nothing: no direction"):
        plan.warn_if_unusual()


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("method", "needs method='influence', not 'attenuate'"),
        ("other adapter", "were taken on an adapter with fingerprint"),
        ("context", "different other adapters active"),
        ("no curvature", "hold gradients only"),
        ("variant", r"of variant 'diagonal', the configuration wants 'all'"),
        ("blocks", r"'last-blocks' \(1 blocks\), the configuration wants 'last-blocks'.*blocks=2"),
        ("forget keys", "forget factors hold no gradient of .*lora_A"),
        ("empty retain", "retain set is empty.*more than the forget set"),
    ],
)
def test_sums_that_do_not_fit_are_refused_by_name(what, match):
    model = trained()
    config = CONFIG
    forget, retain = sets(model)
    if what == "method":
        config = uf.UcanConfig()
    elif what == "other adapter":
        hm.randomise(model, seed=9)
    elif what == "context":
        retain.context = "other"
    elif what == "no curvature":
        retain.layers = {}
    elif what == "variant":
        _, retain = sets(model, variant="diagonal")
    elif what == "blocks":
        _, retain = sets(model, variant="last-blocks", blocks=1)
        config = CONFIG.replace(influence_variant="last-blocks")
    elif what == "forget keys":
        forget, _ = sets(model, variant="b-only")
    else:
        retain = retain - retain
    with pytest.raises(uf.UcanError, match=match):
        make_influence_plan(model, forget, retain, config)


# The plan.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_applied_is_the_wide_sum_rounded_once_and_undo_is_bit_exact(dtype):
    model = trained()
    for layer in oracle.lora_layers(model).values():
        for p in oracle.weights_of(layer):
            p.data = p.data.to(dtype)
    _, plan = planned(model)
    origin = snapshot(model)
    wide = {}
    for name, layer in oracle.lora_layers(model).items():
        for letter, p in zip("AB", oracle.weights_of(layer), strict=True):
            direction = plan.directions[f"{name}.lora_{letter}"]
            assert direction.dtype == torch.float32
            wide[name, letter] = p.detach().double(), 0.3 * direction.double()
    plan.apply(model)
    for name, layer in oracle.lora_layers(model).items():
        for letter, p in zip("AB", oracle.weights_of(layer), strict=True):
            before, moved = wide[name, letter]
            exact = before + moved
            # Half a unit in the last place, and what the sum in fp32 is off by.
            half = 0.5 * exact.abs().clamp_min(torch.finfo(dtype).tiny) * torch.finfo(dtype).eps
            slack = 2e-7 * (before.abs() + moved.abs())
            assert ((p.detach().double() - exact).abs() <= half + slack).all(), (name, letter)
            assert p.dtype == dtype
    with pytest.raises(uf.UcanError, match="a plan is applied to adapter 'default' already"):
        plan.apply(model)
    with pytest.raises(uf.UcanError, match="a plan is applied"):
        uf.collect_factors(model, retain_batches())
    plan.undo(model)
    assert_same_bits(model, origin)


def test_a_step_that_overflows_changes_nothing():
    model = trained()
    for layer in oracle.lora_layers(model).values():
        for p in oracle.weights_of(layer):
            p.data = p.data.half()
    _, plan = planned(model)
    before = snapshot(model)
    with pytest.raises(uf.UcanError, match=r"would not be finite in torch.float16.*nothing was"):
        plan.with_strength(1e9).apply(model)
    assert_same_bits(model, before)


def test_a_failure_on_the_way_changes_nothing(monkeypatch):
    model, plan = planned()
    before = snapshot(model)
    last = list(plan.directions)[-1]
    plan.directions[last] = plan.directions[last][:1].expand(3, -1).clone()
    with pytest.raises(uf.UcanError, match="layers are not those of the plan"):
        plan.apply(model)
    _, plan = planned(model)
    plan.directions[last] = plan.directions[last] * float("inf")
    with pytest.raises(uf.UcanError, match="would not be finite"):
        plan.apply(model)
    assert_same_bits(model, before)
    assert plan.originals is None


def test_plans_belong_to_their_adapter():
    model, plan = planned()
    hm.randomise(model, seed=9)
    before = snapshot(model)
    with pytest.raises(uf.UcanError, match="this plan was made for an adapter"):
        plan.apply(model)
    with pytest.raises(uf.UcanError, match="holds no original values"):
        plan.undo(model)
    assert_same_bits(model, before)


def test_undo_on_changed_weights_changes_nothing():
    model, plan = planned()
    plan.apply(model)
    layer = next(iter(oracle.lora_layers(model).values()))
    oracle.weights_of(layer)[0].data[0, 0] += 1
    before = snapshot(model)
    with pytest.raises(uf.UcanError, match="was changed since"):
        plan.undo(model)
    assert_same_bits(model, before)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_strengths_that_are_none_are_refused(strength):
    _, plan = planned()
    with pytest.raises(uf.UcanError, match="strength must be a finite number >= 0"):
        plan.with_strength(strength)


@pytest.mark.parametrize("original", [False, True])
def test_a_loaded_plan_is_the_plan(original, tmp_path):
    model, plan = planned()
    before = snapshot(model)
    plan.apply(model)
    plan.save(tmp_path / "plan.safetensors", include_original=original)
    loaded = InfluencePlan.load(tmp_path / "plan.safetensors")
    assert (loaded.summary(), repr(loaded)) == (plan.summary(), repr(plan))
    assert loaded.config == plan.config
    if original:
        loaded.undo(model)
        assert_same_bits(model, before)
        return
    with pytest.raises(uf.UcanError, match="holds no original values"):
        loaded.undo(model)
    fresh = trained()
    loaded.apply(fresh)
    assert_same_bits(fresh, snapshot(model))


def test_originals_are_saved_only_where_there_are_some(tmp_path):
    _, plan = planned()
    with pytest.raises(uf.UcanError, match="was not applied"):
        plan.save(tmp_path / "plan", include_original=True)
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize("what", ["bit", "cut", "kind", "missing", "nan", "strength", "config"])
def test_broken_files_are_refused(what, tmp_path):
    path = tmp_path / "plan.safetensors"
    _, plan = planned()
    plan.save(path)
    content = bytearray(path.read_bytes())
    metadata, tensors = read_safetensors(path, FORMAT, FORMAT_VERSION)
    values, kind = json.loads(metadata["plan"]), FORMAT
    if what == "bit":
        content[-5] ^= 1
        path.write_bytes(bytes(content))
    elif what == "cut":
        path.write_bytes(bytes(content[:-3]))
    else:
        if what == "kind":
            kind = "ucan_fast.plan"
        elif what == "missing":
            del tensors["direction.3"]
        elif what == "nan":
            tensors["direction.3"][0, 0] = float("nan")
        elif what == "strength":
            values["strength"] = -1.0
        else:
            values["config"]["damping"] = -1.0
        write_safetensors(path, kind, FORMAT_VERSION, {"plan": json.dumps(values)}, tensors)
    match = {
        "bit": "truncated or corrupt",
        "cut": "truncated or corrupt",
        "kind": "is no ucan_fast.influence_plan file",
        "config": "damping must be a number",
    }
    with pytest.raises(uf.UcanError, match=match.get(what, "is damaged")):
        InfluencePlan.load(path)


def test_the_summary_says_what_moves():
    _, plan = planned()
    assert "influence step on 28 matrices, variant 'all'" in plan.summary()
    assert "0.3 nats" in plan.summary()
    top = max(plan.shares, key=lambda key: plan.shares[key]).rpartition(".")[0]
    assert top in plan.summary()
