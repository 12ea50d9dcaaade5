"""Which parameters a neuron owns: on every site, in every known MLP, and where they are shared."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plan_helpers import (
    MLP,
    SITES,
    assert_same_bits,
    layer_names,
    lora_parameters,
    random_stats,
    snapshot,
    tiny_llama,
    weight,
    wrap,
)
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ucan_fast import UcanConfig, UcanError, collect, make_plan
from ucan_fast.adapter import find_layers, one_walk, tuner_layers
from ucan_fast.neurons import moments_site, neuron_groups, weight_norms

pytestmark = pytest.mark.filterwarnings("ignore::ucan_fast.UcanWarning")

# Scales many neurons by many different factors, so that a wrong place cannot go unnoticed.
BROAD = {"contrast": "none", "utility_weight": 0.0, "fraction": 0.9, "strength": 1.0}


def t5(targets, gated: bool = True) -> nn.Module:
    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu" if gated else "relu",
        decoder_start_token_id=0,
    )
    return wrap(T5ForConditionalGeneration(config), targets)


def phi3(targets) -> nn.Module:
    config = Phi3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return wrap(Phi3ForCausalLM(config), targets)


def scaled(values: torch.Tensor, factors: torch.Tensor, axis: int) -> torch.Tensor:
    """Rows (axis 0) or columns (axis 1) times their factors: in fp32, rounded once."""
    lengths = [-1, 1] if axis == 0 else [1, -1]
    return (values.float() * factors.view(*lengths)).to(values.dtype)


def check_apply(model: nn.Module, plan, expected: dict[tuple[str, str], list]) -> None:
    """Apply, and compare every parameter of the model bit by bit.

    Args:
        expected: (layer, "A" or "B") -> factors and axis of each scaling it gets, in order.
    """
    everything = snapshot(model)
    wanted = {}
    for (layer, which), steps in expected.items():
        values = weight(model, layer, which).detach().clone()
        for factors, axis in steps:
            values = scaled(values, factors, axis)
        wanted[layer, which] = values
    plan.apply(model)
    for (layer, which), values in wanted.items():
        assert torch.equal(weight(model, layer, which), values), (layer, which)
        assert weight(model, layer, which).dtype == values.dtype
    # What is expected to be touched is set back; then all must be as it was, bases included.
    touched = {f"{layer}.lora_{which}.default.weight" for layer, which in expected}
    now = snapshot(model)
    assert {name for name in now if not torch.equal(now[name], everything[name])} == touched
    plan.undo(model)
    assert_same_bits(model, everything)


# Each site --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("site", "which", "axis"), [("input", "A", 1), ("rank", "B", 1), ("output", "B", 0)]
)
def test_factors_land_on_the_neurons_own_parameters(site, which, axis, dtype):
    model = tiny_llama(dtype=dtype)
    plan = make_plan(model, random_stats(model), UcanConfig(site=site, **BROAD))
    assert list(plan.factors) == layer_names(model)
    for name, factors in plan.factors.items():
        assert factors.shape == (weight(model, name, which).shape[axis],)
        assert (factors < 1).any()
    if dtype == torch.float64:
        wide = {k: f.double() for k, f in plan.factors.items()}
        expected = {
            n: weight(model, n, which) * wide[n].view([-1, 1] if axis == 0 else [1, -1])
            for n in wide
        }
        plan.apply(model)
        assert all(torch.equal(weight(model, n, which), e) for n, e in expected.items())
        return
    check_apply(model, plan, {(name, which): [(f, axis)] for name, f in plan.factors.items()})


def test_bf16_weights_are_rounded_once():
    model = tiny_llama(dtype=torch.bfloat16)
    plan = make_plan(model, random_stats(model), UcanConfig(**BROAD))
    name = layer_names(model)[0]
    before = weight(model, name, "A").detach().clone()
    factors = plan.factors[name]
    plan.apply(model)
    once = (before.float() * factors).bfloat16()
    twice = before * factors.bfloat16()
    assert torch.equal(weight(model, name, "A"), once)
    assert not torch.equal(once, twice)  # so this test can fail


@pytest.mark.parametrize("site", SITES)
def test_the_weights_follow_a_mixed_dtype_model(site):
    # PEFT's default: fp32 adapters on a bf16 base.
    model = tiny_llama().to(torch.bfloat16)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.float()
    plan = make_plan(
        model,
        collect(
            model,
            [{"input_ids": torch.arange(8).view(1, 8), "token_groups": torch.tensor([[0, 1] * 4])}],
        ),
        UcanConfig(site=site, **BROAD),
    )
    before = snapshot(model)
    plan.apply(model)
    assert all(p.dtype == torch.float32 for p in lora_parameters(model).values())
    plan.undo(model)
    assert_same_bits(model, before)


# Gated MLPs -------------------------------------------------------------------------------------


def mlp_names(model: nn.Module, last: str) -> list[str]:
    return [name for name in layer_names(model) if name.endswith(f".{last}")]


def test_mlp_site_of_a_llama():
    model = tiny_llama()
    plan = make_plan(model, random_stats(model), UcanConfig(site="mlp", **BROAD))
    downs = mlp_names(model, "down_proj")
    assert list(plan.factors) == downs
    assert plan.neurons == 2 * 24
    expected = {}
    for down in downs:
        f, parent = plan.factors[down], down.rpartition(".")[0]
        expected[down, "A"] = [(f, 1)]
        expected[f"{parent}.gate_proj", "B"] = [(f, 0)]
        expected[f"{parent}.up_proj", "B"] = [(f, 0)]
    check_apply(model, plan, expected)


@pytest.mark.parametrize(
    "adapted", [["down_proj"], ["up_proj", "down_proj"], ["gate_proj", "down_proj"]]
)
def test_mlp_site_where_gate_or_up_is_not_adapted(adapted):
    model = tiny_llama(adapted)
    plan = make_plan(model, random_stats(model), UcanConfig(site="mlp", **BROAD))
    expected = {}
    for down in mlp_names(model, "down_proj"):
        f, parent = plan.factors[down], down.rpartition(".")[0]
        expected[down, "A"] = [(f, 1)]
        for name in adapted[:-1]:
            expected[f"{parent}.{name}", "B"] = [(f, 0)]
    check_apply(model, plan, expected)


def test_mlp_weight_norms_are_those_of_a_down():
    model = tiny_llama()
    stats = random_stats(model)
    only_down = {n: s for n, s in stats.layers.items() if n.endswith("down_proj")}
    plan = make_plan(model, stats, UcanConfig(site="mlp", **BROAD))
    for name, sites in only_down.items():
        rms = (sites["input"].sq_sum[1] / sites["input"].count[1]).sqrt()
        raw = weight(model, name, "A").detach().double().pow(2).sum(0).sqrt() * rms
        torch.testing.assert_close(plan.utility[name], (raw / raw.max()).float())


def test_mlp_site_of_a_gated_t5():
    model = t5(["q", "wi_0", "wi_1", "wo"])
    plan = make_plan(model, random_stats(model), UcanConfig(site="mlp", **BROAD))
    seconds = mlp_names(model, "wo")
    assert len(seconds) == 2  # one in the encoder, one in the decoder
    assert list(plan.factors) == seconds
    expected = {}
    for second in seconds:
        f, parent = plan.factors[second], second.rpartition(".")[0]
        expected[second, "A"] = [(f, 1)]
        expected[f"{parent}.wi_0", "B"] = [(f, 0)]
        expected[f"{parent}.wi_1", "B"] = [(f, 0)]
    check_apply(model, plan, expected)


def test_mlp_site_of_a_fused_gate_up_proj():
    model = phi3(["gate_up_proj", "down_proj", "o_proj"])
    plan = make_plan(model, random_stats(model), UcanConfig(site="mlp", **BROAD))
    downs = mlp_names(model, "down_proj")
    assert list(plan.factors) == downs
    assert plan.neurons == 2 * 24  # a neuron counts once
    expected = {}
    for down in downs:
        f, fused = plan.factors[down], f"{down.rpartition('.')[0]}.gate_up_proj"
        assert weight(model, fused, "B").shape[0] == 48
        expected[down, "A"] = [(f, 1)]
        expected[fused, "B"] = [(torch.cat([f, f]), 0)]  # rows j and 24 + j
    check_apply(model, plan, expected)


def test_mlp_site_of_a_phi3_with_only_down_adapted():
    model = phi3(["down_proj"])
    plan = make_plan(model, random_stats(model), UcanConfig(site="mlp", **BROAD))
    check_apply(model, plan, {(d, "A"): [(f, 1)] for d, f in plan.factors.items()})


def test_an_mlp_without_a_gate_is_refused_by_name():
    model = t5(["wi", "wo"], gated=False)
    stats = random_stats(model)
    with pytest.raises(UcanError, match=r"encoder\.block\.0\.layer\.1\.DenseReluDense .*wi, wo"):
        make_plan(model, stats, UcanConfig(site="mlp"))
    base = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1))
    model = wrap(base, ["c_attn", "c_proj", "c_fc"])
    with pytest.raises(UcanError, match=r"transformer\.h\.0\.mlp .*no gated MLP of a known form"):
        make_plan(model, random_stats(model), UcanConfig(site="mlp"))
    # ... before anything is run: collect refuses the same model the same way
    with pytest.raises(UcanError, match=r"transformer\.h\.0\.mlp .*no gated MLP of a known form"):
        collect(model, [{"input_ids": torch.zeros(1, 2, dtype=torch.int64)}], sites=["mlp"])


def test_an_attention_c_proj_is_no_mlp():
    base = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1))
    model = wrap(base, [r"h.0.attn.c_proj"])
    with pytest.raises(UcanError, match="this adapter only adapts c_proj"):
        make_plan(model, random_stats(model), UcanConfig(site="mlp"))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj", "up_proj"]])
def test_an_adapter_without_a_down_proj_is_refused(targets):
    model = tiny_llama(targets, layers=1)
    with pytest.raises(UcanError, match=f"only adapts {', '.join(targets)}. Use site='input'"):
        make_plan(model, random_stats(model), UcanConfig(site="mlp"))


def test_an_mlp_whose_sizes_do_not_fit_is_refused():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Module()
            self.mlp.gate_proj, self.mlp.up_proj = nn.Linear(4, 6), nn.Linear(4, 5)
            self.mlp.down_proj = nn.Linear(6, 4)

    model = get_peft_model(Odd(), LoraConfig(r=2, target_modules=MLP))
    with pytest.raises(UcanError, match=r"mlp\.up_proj has 5 outputs.*6 inputs of .*down_proj"):
        make_plan(model, random_stats(model), UcanConfig(site="mlp"))


# Shared Parameters ------------------------------------------------------------------------------


def tie(model: nn.Module, first: str, second: str, which: str, how: str) -> None:
    """Two modules, one storage: as one Parameter object, or as two on the same memory."""
    holder = getattr(model.get_submodule(second), f"lora_{which}")["default"]
    shared = weight(model, first, which)
    holder.weight = shared if how == "object" else nn.Parameter(shared.detach())


def pooled_utility(model, stats, names, site, which, axis) -> torch.Tensor:
    """w · rms over both modules' tokens; the shared weight counts once."""
    count = sum(stats.layers[n][site].count[1] for n in names)
    squares = sum(stats.layers[n][site].sq_sum[1] for n in names)
    w = weight(model, names[0], which).detach().double().norm(dim=1 - axis)
    raw = w * (squares / count).sqrt()
    return (raw / raw.max()).float()


@pytest.mark.parametrize("how", ["object", "memory"])
@pytest.mark.parametrize(("site", "which", "axis"), [("input", "A", 1), ("output", "B", 0)])
def test_a_shared_parameter_is_pooled_and_scaled_once(site, which, axis, how):
    model = tiny_llama(layers=1)
    names = layer_names(model)
    q, k, v = names[:3]
    first, second = (q, k) if which == "A" else (k, v)  # k and v have 8 outputs each
    tie(model, first, second, which, how)
    stats = random_stats(model)
    config = UcanConfig(site=site, **{**BROAD, "contrast": "symmetric", "min_score": 0.0})
    plan = make_plan(model, stats, config)

    # One group, one factor for both names, and the neurons count once.
    separate = sum(weight(model, n, which).shape[axis] for n in names)
    assert plan.neurons == separate - weight(model, first, which).shape[axis]
    assert (first, second) in plan.groups
    assert torch.equal(plan.factors[first], plan.factors[second])
    assert (plan.factors[first] < 1).any()

    # Pooled moments: the tokens of both.
    a, b = stats.layers[first][site], stats.layers[second][site]
    mean = (a.abs_sum + b.abs_sum) / (a.count + b.count).unsqueeze(1)
    risk = ((mean[0] - mean[1]) / (mean[0] + mean[1])).clamp_min(0)
    torch.testing.assert_close(plan.risk[first], risk.float())
    torch.testing.assert_close(
        plan.utility[first], pooled_utility(model, stats, (first, second), site, which, axis)
    )

    # The utility is relative to the layer, which hides a norm that counts a weight twice.
    (group,) = (
        g
        for g in neuron_groups(model, find_layers(model, "default"), site)
        if g.names == (first, second)
    )
    norm = weight(model, first, which).detach().double().norm(dim=1 - axis)
    torch.testing.assert_close(group.weight_norm, norm)

    # Scaled once: γ, not γ².
    before = weight(model, first, which).detach().clone()
    bits = snapshot(model)
    plan.apply(model)
    expected = scaled(before, plan.factors[first], axis)
    assert torch.equal(weight(model, first, which), expected)
    assert torch.equal(weight(model, second, which), expected)
    assert weight(model, first, which).data_ptr() == weight(model, second, which).data_ptr()
    plan.undo(model)
    assert_same_bits(model, bits)


@pytest.mark.parametrize("how", ["object", "memory"])
def test_rank_site_with_a_shared_b(how):
    model = tiny_llama(layers=1)
    k, v = layer_names(model)[1:3]
    tie(model, k, v, "B", how)
    stats = random_stats(model)
    plan = make_plan(model, stats, UcanConfig(site="rank", **BROAD))
    assert plan.neurons == 6 * 4
    assert (k, v) in plan.groups
    before = weight(model, k, "B").detach().clone()
    plan.apply(model)
    assert torch.equal(weight(model, v, "B"), scaled(before, plan.factors[k], 1))
    plan.undo(model)


def test_rank_site_with_a_shared_a_keeps_the_neurons_apart():
    # What is scaled is a column of B; those are not shared here.
    model = tiny_llama(layers=1)
    q, k = layer_names(model)[:2]
    tie(model, q, k, "A", "object")
    plan = make_plan(model, random_stats(model), UcanConfig(site="rank", **BROAD))
    assert plan.neurons == 7 * 4
    assert not torch.equal(plan.factors[q], plan.factors[k])
    check_apply(model, plan, {(n, "B"): [(f, 1)] for n, f in plan.factors.items()})


def test_three_layers_and_two_layers_that_share():
    model = tiny_llama(layers=2)
    names = layer_names(model)
    q, k, v = names[:3]
    tie(model, q, k, "A", "object")
    tie(model, q, v, "A", "memory")
    gate, up = names[4], names[5]
    tie(model, gate, up, "A", "object")
    stats = random_stats(model)
    plan = make_plan(model, stats, UcanConfig(**BROAD))
    assert plan.groups[0] == (q, k, v)
    assert (gate, up) in plan.groups
    assert list(plan.factors) == names
    expected = {(n, "A"): [(f, 1)] for n, f in plan.factors.items()}
    check_apply(model, plan, expected)


def test_mlps_that_share_in_a_chain_become_one_group():
    # 1 and 3 share B of gate_proj, 2 and 3 share B of up_proj: one group of three, found late.
    model = tiny_llama(MLP, layers=3)
    gates, ups, downs = (mlp_names(model, last) for last in MLP)
    tie(model, gates[0], gates[2], "B", "object")
    tie(model, ups[1], ups[2], "B", "object")
    stats = random_stats(model)
    plan = make_plan(model, stats, UcanConfig(site="mlp", **BROAD))
    assert plan.groups == [tuple(downs)]
    assert plan.neurons == 24
    f = plan.factors[downs[0]]
    assert all(torch.equal(plan.factors[d], f) for d in downs)
    # The weight norm of pooled neurons with weights of their own: over all of them.
    squares = sum(stats.layers[d]["input"].sq_sum[1] for d in downs)
    count = sum(stats.layers[d]["input"].count[1] for d in downs)
    w = torch.cat([weight(model, d, "A").detach().double() for d in downs]).norm(dim=0)
    raw = w * (squares / count).sqrt()
    torch.testing.assert_close(plan.utility[downs[0]], (raw / raw.max()).float())
    expected = {(d, "A"): [(f, 1)] for d in downs}
    expected |= {(name, "B"): [(f, 0)] for name in (*gates, *ups)}
    check_apply(model, plan, expected)


def test_gate_and_up_of_one_mlp_that_share_b():
    model = tiny_llama(MLP, layers=1)
    gate, up, down = layer_names(model)
    tie(model, gate, up, "B", "object")
    plan = make_plan(model, random_stats(model), UcanConfig(site="mlp", **BROAD))
    f = plan.factors[down]
    check_apply(model, plan, {(down, "A"): [(f, 1)], (gate, "B"): [(f, 0)], (up, "B"): [(f, 0)]})


def test_ties_that_appeared_or_vanished_are_refused():
    model = tiny_llama(layers=1)
    k, v = layer_names(model)[1:3]
    with torch.no_grad():  # equal values, so that the fingerprint is the same either way
        weight(model, v, "A").copy_(weight(model, k, "A"))
    plan = make_plan(model, random_stats(model), UcanConfig(**BROAD))
    tie(model, k, v, "A", "object")
    before = snapshot(model)
    with pytest.raises(UcanError, match="shared parameters differ"):
        plan.apply(model)
    assert_same_bits(model, before)


# The parts by themselves ------------------------------------------------------------------------


def test_moments_site():
    assert [moments_site(UcanConfig(site=s)) for s in SITES] == ["input", "rank", "output", "input"]
    assert moments_site(UcanConfig(site="output", output_signal="layer")) == "layer"
    assert moments_site(UcanConfig(site="input", output_signal="layer")) == "input"


def test_weight_norms_are_fp64_on_the_cpu():
    model = tiny_llama(layers=1, dtype=torch.bfloat16)
    layers = find_layers(model, "default")
    for site in SITES:
        for group in neuron_groups(model, layers, site):
            assert group.weight_norm.dtype == torch.float64
            assert group.weight_norm.shape == (group.n,)
    name = layers[0].name
    a, b = weight(model, name, "A").double(), weight(model, name, "B").double()
    norms = {s: neuron_groups(model, layers, s)[0].weight_norm for s in SITES}
    torch.testing.assert_close(norms["input"], a.pow(2).sum(0).sqrt())
    torch.testing.assert_close(norms["output"], b.pow(2).sum(1).sqrt())
    torch.testing.assert_close(norms["rank"], (a.pow(2).sum(1) * b.pow(2).sum(0)).sqrt())


def test_nothing_of_the_autograd_graph_is_kept():
    model = tiny_llama(layers=1)
    for group in neuron_groups(model, find_layers(model, "default"), "rank"):
        assert not group.weight_norm.requires_grad
        assert all(not piece.view(group.n).requires_grad for piece in group.pieces)


@pytest.mark.parametrize("site", SITES)
def test_weight_norms_taken_together_are_those_of_each_matrix(site):
    # More layers than are taken in one go, of two ranks.
    model = tiny_llama(layers=6)
    for module in (m for _, m in tuner_layers(model)):
        if module.in_features == 16:
            continue
        for holder, shape in ((module.lora_A, (5, module.in_features)), (module.lora_B, (0, 5))):
            rows = shape[0] or module.out_features
            holder["default"].weight = torch.nn.Parameter(torch.randn(rows, shape[1]))
    groups = neuron_groups(model, find_layers(model, "default"), site)
    assert len(groups) > 32 or site == "mlp"
    for group, together in zip(groups, weight_norms(groups), strict=True):
        a = weight(model, group.names[0], "A").detach().double()
        b = weight(model, group.names[0], "B").detach().double()
        wanted = {
            "input": a.norm(dim=0),
            "mlp": a.norm(dim=0),
            "rank": a.norm(dim=1) * b.norm(dim=0),
            "output": b.norm(dim=1),
        }[site]
        torch.testing.assert_close(together, wanted, rtol=1e-14, atol=0)


def test_layers_of_one_walk_are_found_once_and_read_anew():
    model = tiny_llama(layers=1)
    with one_walk(model):
        first = find_layers(model, "default")[0]
        replaced = torch.nn.Parameter(torch.zeros_like(first.a))
        first.a_module.weight = replaced
        again = find_layers(model, "default")[0]
        assert again is first
        assert again.a is replaced
    assert find_layers(model, "default")[0] is not first
