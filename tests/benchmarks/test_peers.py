"""Peers compute what they stand for, and the cases are those of real models."""

from __future__ import annotations

import pytest
import torch
from peft.tuners import lora

from benchmarks import measure as m
from benchmarks import peers
from benchmarks.kernels import attenuate, linear, scores, suite
from benchmarks.kernels.cases import SUMS, LoraCase, lora_cases
from benchmarks.shapes import LLAMA_3_8B, MODELS, SMOLLM2_135M, Model
from ucan_fast.ops.scores import factors_reference, scores_reference

CPU = torch.device("cpu")
FORWARDS = {
    "peft": peers.forward(peers.peft_layer, torch.float32),
    "ucan_fast": peers.forward(peers.ucan_layer, torch.float32),
    "addmm_": peers.addmm_forward(torch.float32),
}
STEPS = {
    "peft": peers.training_step(peers.peft_layer, torch.float32),
    "ucan_fast": peers.training_step(peers.ucan_layer, torch.float32),
    "addmm_": peers.addmm_training_step(torch.float32),
}
MOMENTS = {
    "boolean": peers.hooked_forward(peers.BooleanIndex, torch.float32),
    "mask": peers.hooked_forward(peers.MaskMatmul, torch.float32),
    "ucan_fast": peers.recorded_forward(torch.float32),
    "fused_linear": peers.fused_linear_moments(torch.float32),
}


def _candidates(binders) -> list[m.Candidate]:
    return [m.Candidate(name, bind) for name, bind in binders.items()]


@pytest.mark.parametrize("tokens", [1, 150])
def test_forward_peers_agree(tokens):
    inputs = peers.lora_inputs(48, 80, 8, tokens, torch.float32, CPU)
    reference = peers.reference_linear
    m.check(_candidates(FORWARDS), inputs, reference=reference, dtype="float32")


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_forward_peers_agree_on_a_bf16_base(adapter):
    inputs = peers.lora_inputs(48, 80, 8, 150, torch.bfloat16, CPU)
    candidates = [
        m.Candidate("peft", peers.forward(peers.peft_layer, adapter)),
        m.Candidate("autocast", peers.autocast_forward(peers.peft_layer, adapter, torch.bfloat16)),
        m.Candidate("addmm_", peers.addmm_forward(adapter)),
    ]
    m.check(candidates, inputs, reference=peers.reference_linear, dtype="bfloat16")


def test_the_reference_is_what_autograd_says():
    x, w, a, b, groups = peers.lora_inputs(24, 40, 4, 130, torch.float64, CPU)(5)
    x, a, b = (t.double().requires_grad_() for t in (x, a, b))
    dy = torch.randn(130, 40, dtype=torch.float64)
    y = x @ w.t() + peers.SCALING * (x @ a.t() @ b.t())
    wanted = (y, *torch.autograd.grad(y, (x, a, b), dy))
    got = peers.reference_gradients(x, w, a, b, groups, dy)
    for mine, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, right)


def test_training_peers_agree():
    make = peers.lora_inputs(48, 80, 8, 150, torch.float32, CPU)

    def inputs(seed):
        return (*make(seed), torch.randn(150, 80, generator=torch.Generator().manual_seed(seed)))

    m.check(_candidates(STEPS), inputs, reference=peers.reference_gradients, dtype="float32")


@pytest.mark.parametrize("tokens", [1, 64, 200])
def test_moments_peers_agree(tokens):
    inputs = peers.lora_inputs(48, 80, 8, tokens, torch.float32, CPU)
    reference = peers.reference_linear_moments
    m.check(_candidates(MOMENTS), inputs, reference=reference, dtype="float32")


def test_a_peer_without_the_adapter_is_caught():
    # The adapter's share of y is large enough for the gate in every dtype.
    for dtype in (torch.float32, torch.bfloat16):
        inputs = peers.lora_inputs(576, 576, 16, 64, dtype, CPU)
        with pytest.raises(m.CheckFailed, match="base alone"):
            m.check(
                [m.Candidate("base alone", peers.base_forward())],
                inputs,
                reference=peers.reference_linear,
                dtype=str(dtype).removeprefix("torch."),
            )


def test_the_layers_are_peft_s_own_and_ours():
    _, w, a, b, _ = peers.lora_inputs(48, 80, 8, 4, torch.bfloat16, CPU)(0)
    layer = peers.peft_layer(w, a, b, torch.float32)
    assert type(layer) is lora.Linear
    assert layer.base_layer.weight.data_ptr() == w.data_ptr()
    assert layer.scaling["default"] == peers.SCALING
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert layer.lora_A["default"].weight.data_ptr() != a.data_ptr()
    assert type(peers.ucan_layer(w, a, b, torch.float32)).__name__ == "FusedLinear"


def test_inputs_repeat_and_are_never_zeros():
    make = peers.lora_inputs(48, 80, 8, 256, torch.float32, CPU)
    for one, again, other in zip(make(1), make(1), make(2), strict=True):
        assert torch.equal(one, again)
        assert one.count_nonzero() > 0
        assert one.dtype == torch.int64 or not torch.equal(one, other)
    groups = make(1)[-1]
    assert {0, 1} <= set(groups.tolist()) <= {-1, 0, 1}
    _, _, a, b, _ = make(1)
    assert torch.equal(a, a.bfloat16().float())
    assert torch.equal(b, b.bfloat16().float())


def test_attenuation_peers_agree():
    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(*s, generator=generator) for s in ((4, 30), (50, 4), (3, 3))]
        factors = torch.rand(30 + 50 + 3, generator=generator)
        return weights, factors, [0, 30, 80], [1, 0, 1]

    def reference(weights, factors, offsets, axes):
        a, b, c = (weight.double() for weight in weights)
        f = factors.double()
        return [a * f[:30], b * f[30:80].unsqueeze(1), c * f[80:]]

    binders = {
        "ucan_fast": peers.attenuate_ucan,
        "mul_": peers.attenuate_mul_loop,
        "views": peers.attenuate_view_loop,
        "foreach": peers.attenuate_foreach,
    }
    m.check(_candidates(binders), inputs, reference=reference, dtype="float32", mutates=True)


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_attenuation_that_does_nothing_is_caught_in_every_dtype(profile):
    for bench in attenuate.attenuate(m.PROFILES[profile], CPU)[:2]:
        nothing = m.Candidate("nothing", lambda weights, *_: lambda: weights)
        with pytest.raises(m.CheckFailed, match="'nothing' is wrong"):
            m.check(
                [nothing],
                bench.check_inputs,
                reference=bench.reference,
                dtype=bench.dtype,
                mutates=True,
            )


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_a_forgotten_block_of_rows_is_caught_in_bf16(adapter):
    case = LoraCase(
        Model("tiny", 1, hidden=64, intermediate=48, query=32, key_value=32),
        "q_proj",
        8192,
        rank=8,
        adapter_dtype=adapter,
    )
    inputs = peers.lora_inputs(*case.size, case.rank, case.tokens, case.dtype, CPU)

    def short(x, w, a, b, groups):
        # The last block counts for nothing.
        groups = groups.clone()
        groups[-128:] = -1
        return peers.recorded_forward(adapter)(x, w, a, b, groups)

    options = {
        "reference": peers.reference_linear_moments,
        "dtype": "bfloat16",
        "tolerances": SUMS,
    }
    whole = [
        m.Candidate("ucan_fast", peers.recorded_forward(adapter)),
        m.Candidate("fused_linear", peers.fused_linear_moments(adapter)),
        m.Candidate("boolean", peers.hooked_forward(peers.BooleanIndex, adapter)),
        m.Candidate("mask", peers.hooked_forward(peers.MaskMatmul, adapter)),
    ]
    m.check(whole, inputs, **options)
    with pytest.raises(m.CheckFailed, match="'short' is wrong"):
        m.check([m.Candidate("short", short)], inputs, **options)


def test_every_projection_of_a_model_is_covered():
    assert SMOLLM2_135M.layers()["down_proj"] == (1536, 576)
    assert LLAMA_3_8B.layers()["k_proj"] == (4096, 1024)
    for model in MODELS:
        sizes = set(model.layers().values())
        assert set(model.distinct_layers().values()) == sizes
        assert len(model.distinct_layers()) == len(sizes)
    assert len(SMOLLM2_135M.adapter_shapes(16)) == 210
    assert SMOLLM2_135M.adapter_shapes(16)[0] == ((16, 576), (576, 16))


def test_full_holds_quick_and_every_model_tokens_and_rank():
    quick = lora_cases(m.PROFILES["quick"])
    full = lora_cases(m.PROFILES["full"])
    assert set(quick) <= set(full)
    assert len(set(full)) == len(full)
    assert {case.model for case in full} == set(MODELS)
    assert {case.tokens for case in full} >= {1, 64, 1024, 8192}
    assert {case.rank for case in full} == {8, 16, 64}
    for model in MODELS:
        timed = {case.size for case in full if case.model == model}
        assert timed == set(model.layers().values())


def test_what_is_too_large_for_a_cpu_says_so():
    case = LoraCase(LLAMA_3_8B, "gate_proj", 8192)
    assert "962 GFLOP" in case.too_large(case.base_flops, CPU)
    assert case.too_large(1e9, CPU) is None
    assert case.too_large(case.base_flops, torch.device("cuda")) is None


# Under autocast


@pytest.mark.parametrize("tokens", [64, 600])
def test_moments_under_autocast_agree(tokens):
    inputs = peers.lora_inputs(64, 80, 8, tokens, torch.bfloat16, CPU)
    f32, bf16 = torch.float32, torch.bfloat16
    candidates = [
        m.Candidate("boolean", peers.hooked_forward(peers.BooleanIndex, f32, autocast=bf16)),
        m.Candidate("mask", peers.hooked_forward(peers.MaskMatmul, f32, autocast=bf16)),
        m.Candidate("ucan_fast", peers.recorded_forward(f32, autocast=bf16)),
    ]
    options = {
        "reference": peers.reference_linear_moments,
        "dtype": "bfloat16",
        "tolerances": SUMS,
    }
    m.check(candidates, inputs, **options)


def test_hooks_under_autocast_see_what_it_narrowed(monkeypatch):
    x, w, a, b, groups = peers.lora_inputs(64, 80, 8, 64, torch.bfloat16, CPU)(0)
    seen: list[tuple[torch.dtype, bool]] = []
    of_layer = peers.hook_moments

    def hook_moments(layer, statistics, totals):
        layer.lora_B["default"].register_forward_hook(
            lambda _module, _arguments, out: seen.append(
                (out.dtype, torch.is_autocast_enabled("cpu"))
            )
        )
        return of_layer(layer, statistics, totals)

    monkeypatch.setattr(peers, "hook_moments", hook_moments)
    for autocast in (None, torch.bfloat16):
        options = {"autocast": autocast}
        peers.hooked_forward(peers.MaskMatmul, torch.float32, **options)(x, w, a, b, groups)()
    assert seen == [(torch.float32, False), (torch.bfloat16, True)]


def test_training_under_autocast_agrees():
    make = peers.lora_inputs(64, 80, 8, 150, torch.bfloat16, CPU)

    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        return (*make(seed), torch.randn(150, 80, generator=generator).bfloat16())

    steps = {
        name: peers.training_step(maker, torch.float32, autocast=torch.bfloat16)
        for name, maker in (("peft", peers.peft_layer), ("ucan_fast", peers.ucan_layer))
    }
    m.check(_candidates(steps), inputs, reference=peers.reference_gradients, dtype="bfloat16")


def test_every_case_with_wider_adapters_has_peers_under_autocast():
    wanted = {
        linear.forward_backward: {"peft, autocast"},
        linear.forward_with_moments: {"peft + hooks, mask matmul, autocast"},
        linear.forward_with_hooks: {
            "peft + hooks, mask matmul, autocast",
            "peft + hooks, boolean index, autocast",
        },
    }
    for group, peers_ in wanted.items():
        for bench in group(m.PROFILES["full"], CPU):
            names = {c.name for c in bench.candidates if c.name.endswith(", autocast")}
            wider = bench.dtype != "float32" and bench.adapter_dtype != bench.dtype
            assert names == (peers_ | {"ucan_fast, autocast"} if wider else set()), bench.case
            if bench.group == "linear_forward_backward":
                continue
            # One token's sums are no averages.
            few = {n for n in names if "does not average" in bench.obstacles.get(n, "")}
            assert few == (names if bench.shape["tokens"] == 1 else set())


# On a GPU, as far as that goes without one


def test_scores_hold_nothing_that_a_graph_cannot(monkeypatch):
    cuda = torch.device("cuda")
    (bench,) = scores.scores(m.PROFILES["quick"], cuda)
    assert [c.name for c in bench.candidates] == [
        *("torch, loop over layers", "ucan_fast", "ucan_fast, reference backend")
    ]
    assert all(c.capturable for c in bench.candidates)
    (eager,) = scores.scores_eager(m.PROFILES["quick"], cuda)
    assert [c.name for c in eager.candidates if not c.capturable] == [
        "ucan_fast, reference backend"
    ]
    assert scores.scores_eager(m.PROFILES["quick"], CPU) == []
    # A meta tensor has no values that could be read back.
    (bench,) = scores.scores(m.PROFILES["quick"], CPU)
    moments, counts, norms, offsets = bench.inputs(0)
    loop = bench.candidates[0].bind(*(t.to("meta") for t in (moments, counts, norms)), offsets)
    for name in ("tolist", "item", "__index__", "__int__", "__bool__", "__iter__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("read back"))
    assert loop()["γ"].device.type == "meta"
    tensors = [t.to("meta") for t in (moments, counts, norms, offsets)]
    choices = ("mean_abs", "symmetric", "global", "protect", 1.0)
    score = scores_reference(*tensors, *choices)[2]
    factors = factors_reference(score, score.max(), 0.2, "exponential", 2.0, 0.0)
    assert factors.device.type == "meta"


def test_attenuation_without_the_extension_is_skipped_and_says_so(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(attenuate, "native_obstacle", lambda *_: "not built")
    for device, here in ((CPU, False), (cuda, True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        for group in (attenuate.attenuate, attenuate.attenuate_wall):
            for bench in group(m.PROFILES["quick"], device):
                assert "fall back" in bench.skipped("ucan_fast").reason
                assert "not built" in bench.skipped("ucan_fast").reason
                assert bench.skipped("mul_ loop") is None
    # For a GPU that is not here the row is predicted.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attenuate.attenuate(m.PROFILES["quick"], cuda)[0].skipped("ucan_fast") is None
    monkeypatch.setattr(attenuate, "native_obstacle", lambda *_: None)
    assert attenuate.attenuate(m.PROFILES["quick"], CPU)[0].skipped("ucan_fast") is None


def test_inputs_are_rotated_past_the_cache_in_the_smallest_cases(monkeypatch):
    cache = 50 * 2**20
    properties = type("Properties", (), {"L2_cache_size": cache})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    smallest: dict[str, object] = {}
    for bench in suite.benches(m.PROFILES["full"], CPU):
        size = min(c.bytes for c in bench.candidates if c.bytes)
        if bench.group not in smallest or size < smallest[bench.group][0]:
            smallest[bench.group] = (size, bench)
    assert set(smallest) >= {"shrink", "expand", "linear_forward", "attenuate", "scores"}
    for size, bench in smallest.values():
        sets = m.number_of_sets(bench.inputs(0), torch.device("cuda"))
        # What one call reads and writes, over all sets.
        assert sets * size > 2 * cache, (bench.group, bench.case, sets, size)
