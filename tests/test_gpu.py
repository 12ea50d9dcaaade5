"""The same promises on a CUDA device. Every test here is marked ``gpu``."""

from __future__ import annotations

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
@pytest.mark.parametrize("backend", ["native", "reference"])
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
