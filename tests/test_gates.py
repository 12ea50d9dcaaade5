"""One-shot gates: their slopes and curvature against dense references, and the plan of them."""

from __future__ import annotations

import copy
import json

import helpers_models as hm
import influence_oracle as oracle
import pytest
import torch
from plan_helpers import assert_same_bits, snapshot
from torch.func import functional_call
from trained_model import assert_same_weights, forget_batches, retain_batches, trained, weights

import ucan_fast as uf
from ucan_fast.factor_pass import draw_labels, row_uniforms
from ucan_fast.files import read_safetensors, write_safetensors
from ucan_fast.plan import FORMAT, FORMAT_VERSION
from ucan_fast.plans import load_plan

CONFIG = uf.UcanConfig(method="gates", strength=0.5)


def model64():
    return hm.lora(hm.gpt2(dtype=torch.float64), r=2, autocast_adapter_dtype=False).double()


def sets(model, variant="diagonal", **options):
    options = {"variant": variant, **options}
    forget = uf.collect_factors(model, forget_batches(count=8), group="forget", **options)
    return forget, uf.collect_factors(model, retain_batches(count=12), **options)


def planned(model=None, config=CONFIG) -> tuple:
    model = trained() if model is None else model
    return model, uf.make_gates_plan(model, *sets(model), config)


def gated(model, gates: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's LoRA parameters, columns of A and rows of B times the gates."""
    changed = {}
    for name, layer in oracle.lora_layers(model).items():
        a, b = oracle.weights_of(layer)
        changed[f"{name}.lora_A.default.weight"] = a.detach() * gates[f"{name}.lora_A"]
        changed[f"{name}.lora_B.default.weight"] = b.detach() * gates[f"{name}.lora_B"][:, None]
    return changed


def mean_nll(model, gates: dict[str, torch.Tensor], batches: list[dict]) -> torch.Tensor:
    """Of the gated model, differentiable: every sequence alone, without its padding."""
    total, count = 0.0, 0
    for ids, _, _ in oracle.rows(batches, 1):
        # Layers that share a matrix have gates of their own here.
        options = {"kwargs": {"input_ids": ids[None]}, "tie_weights": False}
        logits = functional_call(model, gated(model, gates), (), **options).logits[0]
        total = total - logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
    return total / count


def slopes(model, batches: list[dict]) -> dict[str, torch.Tensor]:
    """Derivative of the mean NLL by every gate, at 1: by autograd through the gates themselves."""
    gates = {}
    for name, layer in oracle.lora_layers(model).items():
        a, b = oracle.weights_of(layer)
        gates[f"{name}.lora_A"] = torch.ones(a.shape[1], dtype=a.dtype, requires_grad=True)
        gates[f"{name}.lora_B"] = torch.ones(b.shape[0], dtype=b.dtype, requires_grad=True)
    mean_nll(model, gates, batches).backward()
    return {key: gate.grad for key, gate in gates.items()}


def curvatures(model, factors: dict[str, dict], positions: int) -> dict[str, torch.Tensor]:
    """F of every gate, from explicit sums of outer products."""
    found = {}
    for name, layer in oracle.lora_layers(model).items():
        a, b = (w.detach() for w in oracle.weights_of(layer))
        n = factors[name]["tokens"]
        c_x, s_z, s_h, c_z = (factors[name][w] / n for w in ("c_x", "s_z", "s_h", "c_z"))
        inputs = [c_x[j, j] * (v @ s_z @ v) for j, v in enumerate(a.T)]
        outputs = [s_h[i, i] * (v @ c_z @ v) for i, v in enumerate(b)]
        found[f"{name}.lora_A"] = torch.stack(inputs) * n / positions
        found[f"{name}.lora_B"] = torch.stack(outputs) * n / positions
    return found


# What a gate is.


@pytest.mark.parametrize("kappa", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_gates_are_those_of_the_dense_slopes_and_curvatures(kappa, damping):
    model = model64()
    for layer in oracle.lora_layers(model).values():
        layer.scaling["default"] = 0.7
    config = CONFIG.replace(damping=damping, retain_gradient_weight=kappa)
    plan = uf.make_gates_plan(model, *sets(model), config)
    g, r = slopes(model, forget_batches(count=8)), slopes(model, retain_batches(count=12))
    _, positions = oracle.gradients(model, retain_batches(count=12), 1)
    f = curvatures(model, oracle.factors(model, retain_batches(count=12), 1), positions)
    assert list(plan.factors) == sorted(g, key=lambda key: key[-1])
    steps = {k: ((g[k] - kappa * r[k]) / (f[k] + damping * f[k].mean())).clamp_max(0) for k in g}
    rise = sum(float(g[k] @ steps[k]) for k in g)
    assert rise > 0
    for key, step in steps.items():
        wanted = torch.exp(0.5 * step / rise)
        assert torch.allclose(plan.factors[key].double(), wanted, rtol=1e-5), key
        assert torch.allclose(plan.score[key].double(), -step / rise, rtol=1e-5), key
        risk, utility = kappa * r[key] - g[key], f[key] + damping * f[key].mean()
        assert torch.allclose(plan.risk[key].double(), risk, rtol=1e-4, atol=1e-7), key
        assert torch.allclose(plan.utility[key].double(), utility, rtol=1e-5), key
    assert plan.threshold == 0
    # Both kinds of gates take part, and some stay open.
    for letter in "AB":
        closed = torch.cat([v for k, v in plan.factors.items() if k.endswith(letter)]) < 1
        assert 0.1 < closed.double().mean() < 0.9


def test_curvature_is_the_squared_slope_of_a_drawn_label_where_there_is_one_token():
    """There x and its gradient cannot depend on each other, so F is the Fisher information itself.

    A Llama sees the same in both of two equal tokens, and only the first is scored."""
    model = hm.lora(hm.llama(hidden=32), r=4, autocast_adapter_dtype=False).double()
    ids = torch.full((1, 2), 7)
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    retain = uf.collect_factors(model, data, variant="diagonal")
    forget = uf.collect_factors(model, forget_batches(count=8), variant="diagonal")
    plan = uf.make_gates_plan(model, forget, retain, CONFIG.replace(damping=0.0))
    uniforms = row_uniforms(data[0], torch.tensor([[True, False]]), 0)
    label = draw_labels(model(input_ids=ids).logits[0, :1], uniforms)
    drawn = torch.stack([ids[0, :1], label], 1)
    wanted = slopes(model, [{"input_ids": drawn, "attention_mask": torch.ones_like(drawn)}])
    for key, slope in wanted.items():
        size = float(slope.square().max())
        assert size > 0
        error = (plan.utility[key].double() - slope.square()).abs().max()
        assert error < 1e-5 * size, key


def test_the_strength_is_the_first_order_rise_of_the_forget_loss():
    model = model64()
    _, plan = planned(model)
    before = float(mean_nll(model, ones(plan), forget_batches(count=8)))
    for strength in (1e-3, 1e-4):
        # Gates in fp64: fp32 cannot tell a loss of 1e-4 nats apart this well.
        gates = {key: torch.exp(-strength * s.double()) for key, s in plan.score.items()}
        rise = float(mean_nll(model, gates, forget_batches(count=8))) - before
        assert rise == pytest.approx(strength, rel=30 * strength)


def ones(plan) -> dict[str, torch.Tensor]:
    return {key: torch.ones(len(f), dtype=torch.float64) for key, f in plan.factors.items()}


def test_gates_are_in_range_and_close_with_the_strength():
    _, plan = planned()
    last = torch.ones_like(plan.flat_factors)
    for strength in (0.0, 0.01, 0.1, 1.0, 3.0):
        factors = plan.with_strength(strength).flat_factors
        assert ((factors > 0) & (factors <= 1)).all()
        assert (factors <= last).all()
        assert (factors == last).all() == (strength == 0.0)
        last = factors
    floored = uf.make_gates_plan(*_with_sets(CONFIG.replace(strength=30.0, floor=0.25)))
    assert float(floored.flat_factors.min()) == 0.25


def _with_sets(config) -> tuple:
    model = trained()
    return model, *sets(model), config


def test_full_factors_serve_as_their_diagonals():
    model = trained()
    own = uf.make_gates_plan(model, *sets(model), CONFIG)
    full = uf.make_gates_plan(model, *sets(model, variant="all"), CONFIG)
    assert torch.allclose(own.flat_factors, full.flat_factors, rtol=1e-3, atol=1e-5)


def test_tied_parameters_share_gates_of_their_summed_slopes_and_curvatures():
    model = model64()
    first, second = (m for n, m in oracle.lora_layers(model).items() if n.endswith("c_fc"))
    second.lora_A["default"].weight = first.lora_A["default"].weight
    names = [n for n in oracle.lora_layers(model) if n.endswith("c_fc")]
    config = CONFIG.replace(retain_gradient_weight=0.0)
    plan = uf.make_gates_plan(model, *sets(model), config)
    keys = [f"{name}.lora_A" for name in names]
    assert torch.equal(plan.factors[keys[0]], plan.factors[keys[1]])
    assert tuple(keys) in plan.groups
    g = slopes(model, forget_batches(count=8))
    _, positions = oracle.gradients(model, retain_batches(count=12), 1)
    f = curvatures(model, oracle.factors(model, retain_batches(count=12), 1), positions)
    f = f[keys[0]] + f[keys[1]]
    risk = -(g[keys[0]] + g[keys[1]])
    assert torch.allclose(plan.risk[keys[0]].double(), risk, rtol=1e-4, atol=1e-7)
    assert torch.allclose(plan.utility[keys[0]].double(), f + 0.01 * f.mean(), rtol=1e-5)
    before = snapshot(model)
    origin = first.lora_A["default"].weight.detach().clone()
    plan.apply(model)
    assert second.lora_A["default"].weight is first.lora_A["default"].weight
    # Scaled once, not once per layer.
    wanted = origin * plan.factors[keys[0]].double()
    assert torch.allclose(first.lora_A["default"].weight, wanted, rtol=1e-6)
    plan.undo(model)
    assert_same_bits(model, before)


def test_an_untrained_adapter_gives_a_plan_of_nothing():
    """B is 0: no gate changes anything."""
    model = trained()
    for layer in oracle.lora_layers(model).values():
        oracle.weights_of(layer)[1].data.zero_()
    with pytest.warns(uf.UcanWarning, match="changes nothing: closing no gate"):
        _, plan = planned(model)
    assert plan.is_noop
    assert not plan.flat_score.any()


def test_the_same_set_on_both_sides_closes_nothing():
    model = trained()
    forget = uf.collect_factors(model, forget_batches(count=8))
    with pytest.warns(uf.UcanWarning, match="changes nothing: closing no gate raises"):
        plan = uf.make_gates_plan(model, forget, forget, CONFIG)
    assert plan.is_noop


def test_dead_inputs_stay_open_without_damping():
    """An input that is always 0 has neither slope nor curvature."""
    model = trained()
    forget, retain = sets(model)
    name = next(iter(retain.layers))
    owner = retain.layers[retain.layers[name].owner]
    owner.c_x[3] = 0.0
    plan = uf.make_gates_plan(model, forget, retain, CONFIG.replace(damping=0.0))
    assert torch.isfinite(plan.flat_score).all()
    assert not plan.is_noop
    assert plan.factors[f"{name}.lora_A"][3] == 1


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("method", "needs method='gates', not 'attenuate'"),
        ("other adapter", "were taken on an adapter with fingerprint"),
        ("context", "different other adapters active"),
        ("no curvature", "hold gradients only"),
        ("variant", "of variant 'eigenbasis', the configuration wants 'diagonal'"),
        ("forget keys", "forget factors hold no gradient of .*lora_A"),
        ("empty retain", "retain set is empty.*more than the forget set"),
        ("nan", "adapter weights of .* are not finite"),
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
        _, retain = sets(model, variant="eigenbasis")
    elif what == "forget keys":
        forget, _ = sets(model, variant="b-only")
    elif what == "nan":
        layer = next(iter(oracle.lora_layers(model).values()))
        oracle.weights_of(layer)[0].data[0, 0] = float("nan")
        from ucan_fast.adapter import fingerprint

        forget.fingerprint = retain.fingerprint = fingerprint(model, "default")
    else:
        retain = retain - retain
    with pytest.raises(uf.UcanError, match=match):
        uf.make_gates_plan(model, forget, retain, config)


def test_auto_has_nothing_to_search_with(recwarn):
    model, plan = planned(config=CONFIG.replace(strength="auto"))
    assert plan.strength == 0.0
    assert plan.is_noop
    assert not [w for w in recwarn if issubclass(w.category, uf.UcanWarning)]
    expected = uf.make_gates_plan(model, *sets(model), CONFIG).flat_factors
    assert torch.equal(plan.with_strength(0.5).flat_factors, expected)


# The plan.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_applied_is_the_product_rounded_once_and_undo_is_bit_exact(dtype):
    model = trained()
    for layer in oracle.lora_layers(model).values():
        for p in oracle.weights_of(layer):
            p.data = p.data.to(dtype)
    _, plan = planned(model)
    assert isinstance(plan, uf.AttenuationPlan)
    before, origin = snapshot(model), copy.deepcopy(model)
    plan.apply(model)
    layers = oracle.lora_layers(model)
    for name, layer in oracle.lora_layers(origin).items():
        a, b = (w.detach().float() for w in oracle.weights_of(layer))
        a = (a * plan.factors[f"{name}.lora_A"]).to(dtype)
        b = (b * plan.factors[f"{name}.lora_B"][:, None]).to(dtype)
        got = oracle.weights_of(layers[name])
        assert torch.equal(got[0], a), name
        assert torch.equal(got[1], b), name
    with pytest.raises(uf.UcanError, match="a plan is applied to adapter 'default' already"):
        plan.apply(model)
    with pytest.raises(uf.UcanError, match="a plan is applied"):
        uf.collect_factors(model, retain_batches())
    plan.undo(model)
    assert_same_bits(model, before)


@pytest.mark.parametrize("original", [False, True])
def test_a_loaded_plan_is_the_plan(original, tmp_path):
    model, plan = planned()
    before = weights(model)
    plan.apply(model)
    plan.save(tmp_path / "plan.safetensors", include_original=original)
    loaded = load_plan(tmp_path / "plan.safetensors")
    assert (loaded.summary(), repr(loaded)) == (plan.summary(), repr(plan))
    assert loaded.config == plan.config
    again = loaded.with_strength(0.9).flat_factors
    assert torch.equal(again, plan.with_strength(0.9).flat_factors)
    if original:
        loaded.undo(model)
        assert_same_weights(model, before)
        return
    with pytest.raises(uf.UcanError, match="holds no original values"):
        loaded.undo(model)
    fresh = trained()
    loaded.apply(fresh)
    assert_same_weights(fresh, weights(model))


def test_a_file_without_half_of_the_gates_is_refused(tmp_path):
    path = tmp_path / "plan.safetensors"
    model, plan = planned()
    plan.save(path)
    metadata, tensors = read_safetensors(path, FORMAT, FORMAT_VERSION)
    values = json.loads(metadata["plan"])
    half = len(values["sizes"]) // 2
    kept = sum(values["sizes"][:half])
    values["groups"], values["sizes"] = values["groups"][:half], values["sizes"][:half]
    tensors = {key: tensor[:kept].clone() for key, tensor in tensors.items()}
    write_safetensors(path, FORMAT, FORMAT_VERSION, {"plan": json.dumps(values)}, tensors)
    before = snapshot(model)
    with pytest.raises(uf.UcanError, match="layers are not those of the plan"):
        load_plan(path).apply(model)
    assert_same_bits(model, before)


def test_gates_are_not_selected():
    _, plan = planned()
    with pytest.raises(uf.UcanError, match="gates are not selected"):
        plan.with_fraction(0.1)


def test_more_than_half_of_the_gates_closed_is_no_warning(recwarn):
    model = trained()
    config = CONFIG.replace(retain_gradient_weight=0.0)
    _, plan = planned(model, config)
    assert plan.attenuated > plan.neurons / 2
    plan.warn_if_unusual()
    assert not [w for w in recwarn if issubclass(w.category, uf.UcanWarning)]


def test_the_summary_says_what_it_is():
    _, plan = planned()
    for text in (plan.summary(), repr(plan)):
        assert "in 28 matrices, site 'input and output'" in text
        assert "strength 0.5" in text
