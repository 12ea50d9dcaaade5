"""The same promises on a CUDA device. Every test here is marked ``gpu``."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import ucan_fast as uf
from ucan_fast import native, ops
from ucan_fast.ops.attenuate import attenuate_reference_

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def small_model(dtype: torch.dtype = torch.float32, adapter_fp32: bool = True):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).to(dtype)
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, config, autocast_adapter_dtype=adapter_fp32).eval()


def batches(seed: int, low: int, high: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(low, high, (3, 6, 17), generator=generator)
    mask = torch.ones(6, 17, dtype=torch.int64)
    mask[2, 11:] = 0
    return [{"input_ids": t, "attention_mask": mask} for t in tokens]


def random_bits(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_attenuate_equals_the_reference_on_the_cpu_bit_by_bit(dtype, backend, monkeypatch):
    monkeypatch.setenv("UCAN_FAST_BACKEND", backend)
    shapes = [(1, 1), (7, 129), (16, 4096), (4096, 16), (3, 0), (8, 33), (64, 64)] * 30
    weights = [random_bits(shape, dtype, i) for i, shape in enumerate(shapes)]
    axes = [i % 2 for i in range(len(shapes))]
    sizes = [w.shape[axis] for w, axis in zip(weights, axes, strict=True)]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    factors = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(1))
    factors[::3] = 1.0
    on_gpu = [w.cuda() for w in weights]
    attenuate_reference_(weights, factors, offsets, axes)
    with torch.no_grad():
        ops.attenuate_(on_gpu, factors.cuda(), offsets, axes)
    for expected, got in zip(weights, on_gpu, strict=True):
        assert torch.equal(expected, got.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attenuate_strided_weights_and_untouched_bits(dtype):
    assert native.status()["_C_cuda"] == "available", native.status()
    whole = random_bits((40, 50), dtype, 0).cuda()
    expected = whole.cpu().clone()
    factors = torch.rand(25)
    factors[3] = 1.0
    expected[:, ::2] = (expected[:, ::2].double() * factors.double()).to(dtype)
    with torch.no_grad():
        ops.attenuate_([whole[:, ::2]], factors.cuda(), [0], [1])
    # One rounding from fp32 and one from fp64 may differ by an ulp of a tie, not more.
    assert torch.allclose(
        whole.cpu().float(), expected.float(), rtol=2e-2 if dtype != DTYPES[0] else 1e-6
    )
    nan = torch.full((4, 8), float("nan"), device="cuda", dtype=dtype)
    bits = nan.view(torch.uint8).clone()
    ops.attenuate_([nan], torch.ones(4, device="cuda"), [0], [0])
    assert torch.equal(nan.view(torch.uint8), bits)


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
def test_collect_equals_the_cpu(accelerated):
    forget, retain = batches(0, 0, 30), batches(1, 30, 97)
    model = small_model()
    on_cpu = uf.collect(model, forget, group="forget") + uf.collect(model, retain)
    model.cuda()
    if accelerated:
        uf.accelerate(model)
    on_gpu = uf.collect(model, forget, group="forget") + uf.collect(model, retain)
    for name, sites in on_cpu.layers.items():
        for site, moments in sites.items():
            for expected, got in zip(
                moments.tensors(), on_gpu.layers[name][site].tensors(), strict=True
            ):
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def test_collect_gives_the_same_bits_twice():
    model = small_model(torch.bfloat16).cuda()
    uf.accelerate(model)
    first, second = (uf.collect(model, batches(0, 0, 97)) for _ in range(2))
    for name, sites in first.layers.items():
        for site, moments in sites.items():
            assert torch.equal(moments.abs_sum, second.layers[name][site].abs_sum), (name, site)


@pytest.mark.parametrize("adapter_fp32", [True, False], ids=["fp32-adapter", "bf16-adapter"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_accelerated_output_is_as_exact_as_pefts(adapter_fp32, autocast):
    model = small_model(torch.bfloat16, adapter_fp32)
    layer = next(m for n, m in model.named_modules() if n.endswith("mlp.up_proj")).cuda()
    x = torch.randn(5, 9, 64, generator=torch.Generator().manual_seed(2)).to("cuda", torch.bfloat16)
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    oracle = x.double() @ layer.base_layer.weight.double().T
    oracle = oracle + layer.scaling["default"] * (x.double() @ a.T @ b.T)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        peft = layer(x)
        uf.accelerate(layer)
        # By name: so few tokens are left to PEFT otherwise.
        with ops.use_backend("triton"):
            ours = layer(x)
    scale = oracle.norm()
    error, allowed = (
        (ours.double() - oracle).norm() / scale,
        (peft.double() - oracle).norm() / scale,
    )
    assert ours.dtype == peft.dtype
    assert error < 2 * allowed + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unlearn_and_undo_on_the_device(dtype):
    model = small_model(dtype, adapter_fp32=False).cuda()
    uf.accelerate(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    forget, retain = batches(0, 0, 30), batches(1, 30, 97)
    result = uf.unlearn(model, forget=forget, retain=retain)
    assert result.plan.attenuated
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    result.plan.undo(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ------------------------------------------------------------------ the kernels alone

# tokens, K, N, r: decode, odd everything, a small model's, a large model's, the largest rank.
SIZES = [
    (1, 64, 48, 8),
    (129, 100, 72, 3),
    (512, 1024, 768, 16),
    (300, 4096, 4096, 64),
    (70, 256, 320, 256),
]
PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "bf16, adapter fp32": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp16, adapter fp32": (torch.float16, torch.float32),
}


def layer_tensors(size, dtypes, seed: int = 0) -> dict[str, torch.Tensor]:
    (m, k, n, r), (base, adapter) = size, dtypes
    x = random_bits((m, k), base, seed)
    a = random_bits((r, k), torch.float32, seed + 1) / k**0.5
    b = random_bits((n, r), torch.float32, seed + 2) / r**0.5
    groups = torch.randint(-1, 2, (m,), generator=torch.Generator().manual_seed(seed))
    tensors = {
        "x": x,
        "a": a.to(adapter),
        "b": b.to(adapter),
        "base": random_bits((m, n), base, seed + 3),
        "groups": groups.to(torch.int8),
    }
    return {key: value.cuda() for key, value in tensors.items()}


def exact_sums(h: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    h = h.double()
    parts = [h[groups == g] for g in (0, 1)]
    return torch.stack(
        [torch.stack([f(p).sum(0) for p in parts]) for f in (torch.abs, torch.square)]
    )


def plain_sums(h: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """As a hook would take them, in fp32."""
    h = h.float()
    parts = [h[groups == g] for g in (0, 1)]
    return torch.stack(
        [torch.stack([f(p).sum(0) for p in parts]) for f in (torch.abs, torch.square)]
    )


def assert_rule(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """Less than twice plain torch's error in the same dtype, plus 1e-6 relative."""
    assert torch.isfinite(got).all(), what
    error, allowed = ((t.double() - exact).abs().max().item() for t in (got, plain))
    scale = exact.abs().max().item()
    assert error <= 2 * allowed + 1e-6 * scale, f"{what}: {error:.3g}, torch {allowed:.3g}"


def totals(n: int) -> torch.Tensor:
    return torch.zeros(2, 2, n, dtype=torch.float64, device="cuda")


@pytest.mark.parametrize("only_group", [None, 1])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_small_kernels_against_fp64(size, precision, only_group):
    check_kernels(size, precision, only_group)


# Rows of whole 16 bytes, of which the last block has few; ranks of one part and of two.
ONE_READ_SIZES = [(130, 272, 96, 8), (200, 528, 64, 16), (70, 256, 48, 32)]


@pytest.mark.parametrize("only_group", [None, 1])
@pytest.mark.parametrize("precision", [p for p in PRECISIONS if PRECISIONS[p][0].itemsize == 2])
@pytest.mark.parametrize("size", ONE_READ_SIZES, ids=str)
def test_small_one_read_against_fp64(size, precision, only_group, monkeypatch):
    """shrink_columns, which few programs are left to otherwise."""
    from ucan_fast.kernels import shrink_columns

    calls, launch = [], shrink_columns.parts_and_slots
    monkeypatch.setattr(shrink_columns, "FEWEST_PROGRAMS", 1)
    monkeypatch.setattr(
        shrink_columns, "parts_and_slots", lambda *args: calls.append(args) or launch(*args)
    )
    check_kernels(size, precision, only_group)
    base, adapter = PRECISIONS[precision]
    assert len(calls) == (adapter == base or base == torch.bfloat16)


def check_kernels(size, precision, only_group):
    t = layer_tensors(size, PRECISIONS[precision])
    groups = t["groups"]
    counted = groups if only_group is None else torch.where(groups == only_group, groups, -1)
    scaling = 1.75
    t["x"][groups == -1] = float("nan")
    x_sums, z_sums, d_sums = totals(size[1]), totals(size[3]), totals(size[2])
    with ops.use_backend("triton"):
        z = ops.shrink(
            *(t["x"], t["a"]),
            groups=groups,
            only_group=only_group,
            input_moments=x_sums,
            rank_moments=z_sums,
        )
        y = ops.expand(
            *(t["base"], z, t["b"], scaling),
            groups=groups,
            only_group=only_group,
            delta_moments=d_sums,
        )
    keep = groups != -1
    x, a, b = t["x"][keep], t["a"], t["b"]
    exact_z = x.double() @ a.double().T
    assert_rule(z[keep], x.to(a.dtype) @ a.T, exact_z, "z")
    exact_y = t["base"][keep].double() + scaling * (z[keep].double() @ b.double().T)
    plain_y = (t["base"][keep] + scaling * (z[keep] @ b.T)).to(t["base"].dtype)
    assert_rule(y[keep], plain_y, exact_y, "y")
    delta = scaling * (z.double() @ b.double().T)
    for sums, h, plain, what in (
        (x_sums, t["x"], t["x"], "moments of x"),
        (z_sums, z, z, "moments of z"),
        (d_sums, delta, scaling * (z.float() @ b.float().T), "moments of delta"),
    ):
        for power in (0, 1):
            assert_rule(
                sums[power],
                plain_sums(plain, counted)[power],
                exact_sums(h, counted)[power],
                f"{what}, power {power + 1}",
            )


# N and K are rows of whole 16 bytes, as TMA asks; several bands of row blocks, ranks in parts.
WHOLE_SIZES = [(1, 64, 48, 8), (129, 104, 72, 3), (1300, 64, 136, 70)]


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="fused_linear needs TMA, compute capability 9.0",
)
@pytest.mark.parametrize("only_group", [None, 1])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", WHOLE_SIZES, ids=str)
def test_small_fused_linear_against_fp64(size, precision, only_group):
    """Under the sanitizers too: its pipeline of TMA copies is where a race would be."""
    from ucan_fast.kernels.fused_linear import obstacle

    (m, k, n, r), (base, adapter) = size, PRECISIONS[precision]
    t = layer_tensors(size, (base, adapter))
    weight = random_bits((n, k), base, 7).cuda() / k**0.5
    bias = random_bits((1, n), base, 8)[0].cuda()
    z = random_bits((m, r), adapter, 9).cuda()
    groups = t["groups"]
    counted = groups if only_group is None else torch.where(groups == only_group, groups, -1)
    assert obstacle(t["x"], weight, z, t["b"], bias) is None
    sums, scaling, options = totals(n), 1.75, {"bias": bias, "groups": groups}
    with ops.use_backend("triton"):
        y = ops.fused_linear(
            *(t["x"], weight, z, t["b"], scaling),
            **options,
            only_group=only_group,
            delta_moments=sums,
        )
    delta = scaling * (z.double() @ t["b"].double().T)
    exact = t["x"].double() @ weight.double().T + bias.double() + delta
    plain = torch.nn.functional.linear(t["x"], weight, bias)
    assert_rule(y, (plain + scaling * (z @ t["b"].T)).to(base), exact, "y")
    taken = scaling * (z.float() @ t["b"].float().T)
    for power in (0, 1):
        assert_rule(
            sums[power],
            plain_sums(taken, counted)[power],
            exact_sums(delta, counted)[power],
            f"moments, power {power + 1}",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_moments_against_fp64(dtype):
    for m, n in ((1, 1), (129, 45), (700, 300)):
        h = random_bits((m, n), dtype, 0).cuda()
        groups = torch.randint(-1, 2, (m,), generator=torch.Generator().manual_seed(0))
        groups, sums = groups.to("cuda", torch.int8), totals(n)
        with ops.use_backend("triton"):
            ops.accumulate_moments(h, groups, sums)
        for power in (0, 1):
            want, plain = exact_sums(h, groups)[power], plain_sums(h, groups)[power]
            assert_rule(sums[power], plain, want, f"{dtype}, power {power + 1}")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_kernels_give_the_same_bits_twice(precision):
    t = layer_tensors((2048, 1024, 768, 16), PRECISIONS[precision])
    results = []
    for _ in range(3):
        sums = [totals(1024), totals(16), totals(768)]
        with ops.use_backend("triton"):
            z = ops.shrink(
                t["x"], t["a"], groups=t["groups"], input_moments=sums[0], rank_moments=sums[1]
            )
            y = ops.expand(t["base"], z, t["b"], 1.5, groups=t["groups"], delta_moments=sums[2])
        results.append([z, y, *sums])
    for later in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], later, strict=True))


def test_tensors_beyond_32_bit_offsets():
    """More than 2^31 elements: the last token alone is counted."""
    m, n = 2**31 // 4096 + 1000, 4096
    x = torch.zeros(m, n, dtype=torch.bfloat16, device="cuda")
    last = random_bits((1, n), torch.bfloat16, 0).cuda()
    x[-1] = last
    a, b = (random_bits(s, torch.bfloat16, 1).cuda() for s in ((16, n), (n, 16)))
    groups = torch.full((m,), -1, dtype=torch.int8, device="cuda")
    groups[-1] = 0
    x_sums, d_sums, h_sums = totals(n), totals(n), totals(n)
    with ops.use_backend("triton"):
        z = ops.shrink(x, a, groups=groups, input_moments=x_sums)
        y = ops.expand(x, z, b, 1.0, groups=groups, delta_moments=d_sums)
        ops.accumulate_moments(y, groups, h_sums)
    assert torch.equal(x_sums[0, 0], last[0].abs().double())
    want = last.double() + z[-1:].double() @ b.double().T
    torch.testing.assert_close(y[-1:].double(), want, rtol=1e-2, atol=1e-2)
    assert torch.equal(h_sums[0, 0], y[-1].abs().double())
    assert not y[: m - 1].any()
    assert not d_sums[:, 1].any()


def test_thirty_million_tokens_neither_stall_nor_drift():
    h = torch.full((1_000_000, 1), 0.1, device="cuda")
    groups = torch.zeros(1_000_000, dtype=torch.int8, device="cuda")
    sums = totals(1)
    with ops.use_backend("triton"):
        for _ in range(30):
            ops.accumulate_moments(h, groups, sums)
    value = torch.tensor(0.1).double().item()
    assert sums[0, 0, 0].item() == pytest.approx(3e7 * value, rel=1e-6)
    assert sums[1, 0, 0].item() == pytest.approx(3e7 * value**2, rel=1e-6)


def test_small_scores_and_factors_are_the_references():
    generator = torch.Generator().manual_seed(0)
    sizes = [64, 1, 500, 0, 128]
    n = sum(sizes)
    moments = torch.rand(2, 2, n, generator=generator, dtype=torch.float64)
    arguments = (
        moments,
        torch.randint(1, 50, (len(sizes), 2), generator=generator).double(),
        torch.rand(n, generator=generator, dtype=torch.float64),
        torch.tensor([0, *sizes]).cumsum(0),
    )
    options = {
        "statistic": "rms",
        "contrast": "zscore",
        "normalization": "global",
        "fusion": "protect",
        "utility_weight": 0.5,
    }
    with ops.use_backend("reference"):
        expected = ops.contrastive_scores(*arguments, **options)
    with ops.use_backend("triton"):
        got = ops.contrastive_scores(*(t.cuda() for t in arguments), **options)
        factors = ops.attenuation_factors(
            got[2], 0.1, decay="exponential", strength=2.0, floor=0.05
        )
    for one, two in zip(expected, got, strict=True):
        torch.testing.assert_close(two.cpu(), one, rtol=1e-12, atol=1e-14)
    with ops.use_backend("reference"):
        want = ops.attenuation_factors(
            expected[2], 0.1, decay="exponential", strength=2.0, floor=0.05
        )
    torch.testing.assert_close(factors.cpu(), want, rtol=1e-6, atol=0)
    assert torch.equal(factors.cpu() < 1, want < 1)


# ------------------------------------------------------------------ whole models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plan_is_the_references(dtype):
    model = small_model(dtype).cuda()
    uf.accelerate(model)
    forget, retain = batches(0, 0, 30), batches(1, 30, 97)
    config = uf.UcanConfig(strength=2.0, min_score=0.0)
    plans = []
    for backend in ("reference", "auto"):
        with ops.use_backend(backend):
            bank = uf.collect(model, forget + retain)
            stats = bank.with_forget(uf.collect(model, forget, group="forget"))
            plans.append(uf.make_plan(model, stats, config))
    expected, got = plans
    slack = 1e-5 if dtype is torch.float32 else 2e-2
    differ = (got.flat_factors < 1) != (expected.flat_factors < 1)
    assert expected.attenuated
    assert not (differ & ((expected.flat_score - expected.threshold).abs() > slack)).any()


GRADIENT_METHODS = {
    "influence": uf.UcanConfig(method="influence", strength=0.05),
    "gates": uf.UcanConfig(method="gates", strength=0.05),
    "several steps": uf.UcanConfig.preset("thorough", influence_steps=3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_gradient_methods_move_the_adapter_as_on_the_cpu(method, dtype):
    """The bf16 case has the CPU's fp32 as its measure: a direction, not bits."""
    forget, retain = batches(0, 0, 30), batches(1, 30, 97)
    moved = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        model = small_model(kind).to(device)
        origin = {name: p.detach().clone() for name, p in model.named_parameters()}
        uf.accelerate(model)
        result = uf.unlearn(
            model, forget=forget, retain=retain, config=GRADIENT_METHODS[method], evaluate=False
        )
        change = [(p.detach() - origin[n]).flatten() for n, p in model.named_parameters()]
        moved.append(torch.cat(change).double().cpu())
        result.plan.undo(model)
        assert all(torch.equal(p, origin[name]) for name, p in model.named_parameters())
    cpu, gpu = moved
    assert cpu.norm() > 0
    slack = 1e-2 if dtype is torch.float32 else 0.5
    assert (gpu - cpu).norm() < slack * cpu.norm()


def test_training_gradients_equal_pefts():
    exact = small_model().cuda().train()
    plain, fused = copy.deepcopy(exact), copy.deepcopy(exact)
    exact.double()
    assert uf.accelerate(fused).fused
    ids = batches(0, 0, 97)[0]["input_ids"].cuda()
    with ops.use_backend("triton"):
        for model in (plain, fused, exact):
            model(input_ids=ids, labels=ids).loss.backward()
    truth, theirs = dict(exact.named_parameters()), dict(plain.named_parameters())
    for name, parameter in fused.named_parameters():
        if parameter.grad is not None:
            assert_rule(parameter.grad, theirs[name].grad, truth[name].grad, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_model_without_graph_breaks(dtype):
    model = small_model(dtype).cuda()
    uf.accelerate(model)
    ids = batches(0, 0, 97)[0]["input_ids"].cuda()
    with torch.no_grad():
        eager = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(
        compiled, eager, rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-4
    )


def test_cuda_graph_of_a_decode_step(monkeypatch):
    """Captured once, replayed with other tokens: what eager gives for those."""
    from transformers import StaticCache

    model = small_model(torch.bfloat16).cuda()
    uf.accelerate(model)
    monkeypatch.setenv("UCAN_FAST_BACKEND", "triton")  # the eager steps too
    token = torch.tensor([[5]], device="cuda")
    position = torch.tensor([8], device="cuda")
    cache = StaticCache(config=model.config, max_cache_len=16)

    def forward(ids, positions):
        with torch.no_grad():
            return model(
                input_ids=ids,
                past_key_values=cache,
                cache_position=positions,
                position_ids=positions[None],
            ).logits

    forward(torch.arange(1, 9, device="cuda")[None], torch.arange(8, device="cuda"))
    # Some versions count the tokens in the cache: every step starts from the same state.
    held = [v for layer in cache.layers for v in vars(layer).values() if torch.is_tensor(v)]
    prompt = [v.clone() for v in held]

    def rewind():
        for tensor, value in zip(held, prompt, strict=True):
            tensor.copy_(value)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            rewind()
            forward(token, position)
    torch.cuda.current_stream().wait_stream(stream)
    rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(token, position)
    seen = []
    for value in (7, 30):
        token.fill_(value)
        rewind()
        graph.replay()
        seen.append(captured.clone())
        rewind()
        torch.testing.assert_close(seen[-1], forward(token, position), rtol=1e-2, atol=1e-2)
    assert not torch.equal(*seen)


def test_few_tokens_are_left_to_peft_unless_a_graph_is_captured(monkeypatch):
    """Eager calls are bound by launches; a graph's are not."""
    import ucan_fast.kernels.expand as expand_kernels

    launched = []
    plain = expand_kernels.expand
    monkeypatch.setattr(
        expand_kernels, "expand", lambda *a, **k: launched.append(1) or plain(*a, **k)
    )
    model = small_model(torch.bfloat16).cuda()
    uf.accelerate(model)
    layer = next(m for n, m in model.named_modules() if n.endswith("mlp.up_proj"))
    x = torch.randn(5, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        eager = layer(x)
        assert not launched
        with ops.use_backend("triton"):
            named = layer(x)
        assert len(launched) == 1
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x)  # as graphs are warmed up
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        assert len(launched) == 3
        graph.replay()
        many = torch.randn(ops.LAUNCH_BOUND // 64 + 1, 64, device="cuda", dtype=torch.bfloat16)
        layer(many)
        assert len(launched) == 4
    layer(x)  # gradients are recorded
    assert len(launched) == 5
    assert torch.equal(captured, named)
    torch.testing.assert_close(named, eager, rtol=2e-2, atol=2e-2)


def test_a_plan_is_made_by_kernels_where_they_are_asked_for(monkeypatch):
    """The plan itself lies on the CPU, which no kernel can reach."""
    model = small_model().cuda()
    uf.accelerate(model)
    monkeypatch.setenv("UCAN_FAST_BACKEND", "triton")
    stats = uf.collect(model, batches(0, 0, 30), group="forget")
    stats = stats + uf.collect(model, batches(1, 30, 97))
    plan = uf.make_plan(model, stats, uf.UcanConfig(strength=2.0, min_score=0.0))
    assert plan.attenuated
    assert plan.flat_factors.device.type == "cpu"


def test_cuda_graph_of_attenuate():
    """The CUDA kernel's table travels in its arguments: a graph keeps it."""
    assert native.status()["_C_cuda"] == "available", native.status()
    weights = [random_bits((16, 64), torch.bfloat16, i).cuda() for i in range(448)]
    before = [w.clone() for w in weights]
    factors = torch.full((64 * 448,), 0.5, device="cuda")
    offsets, axes = [64 * i for i in range(448)], [1] * 448
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), ops.use_backend("cuda"), torch.no_grad():
        ops.attenuate_(weights, factors, offsets, axes)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(w, b * 0.5) for w, b in zip(weights, before, strict=True))


def test_448_matrices_are_one_launch():
    assert native.status()["_C_cuda"] == "available", native.status()
    weights = [random_bits((16, 64), torch.bfloat16, i).cuda() for i in range(448)]
    factors = torch.full((64 * 448,), 0.5, device="cuda")
    call = (weights, factors, [64 * i for i in range(448)], [1] * 448)
    for backend in ("cuda", "triton"):
        with ops.use_backend(backend), torch.no_grad():
            ops.attenuate_(*call)
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                ops.attenuate_(*call)
                torch.cuda.synchronize()
        names = [e.name for e in seen.events() if "attenuate" in e.name.lower()]
        kernels = [name for name in names if "kernel" in name]
        assert len(kernels) == 1, (backend, names)
