"""A whole LoRA linear: forward, forward + backward, and forward while statistics are taken."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers
from benchmarks.kernels.cases import Bench, LoraCase, benchmark_device, lora_cases, name_of
from benchmarks.measure import Candidate, Profile, Result


def _inputs(case: LoraCase):
    k, n = case.size
    return peers.lora_inputs(k, n, case.rank, case.tokens, case.dtype, benchmark_device())


def _other_adapter(case: LoraCase) -> torch.dtype | None:
    # fp32 adapters on a narrow base are PEFT's default; the other way to run it is beside it.
    if case.dtype == torch.float32 or case.adapter_dtype == case.dtype:
        return None
    return case.dtype


def forward(profile: Profile) -> list[Bench]:
    """Without gradients."""
    benches = []
    for case in lora_cases(profile):
        adapter, t = case.adapter_dtype, case.traffic()
        cost = {
            "bytes": t["x"] + t["w"] + t["a"] + t["b"] + t["y"],
            "flops": case.base_flops + case.lora_flops,
        }
        candidates = [
            Candidate("peft", peers.forward(peers.peft_layer, adapter), **cost),
            Candidate("ucan_fast", peers.forward(peers.ucan_layer, adapter), **cost),
            Candidate("addmm_", peers.addmm_forward(adapter), **cost),
            Candidate(
                "base layer alone",
                peers.base_forward(),
                reference=peers.reference_base,
                bytes=t["x"] + t["w"] + t["y"],
                flops=case.base_flops,
            ),
        ]
        if other := _other_adapter(case):
            for name, make in (("peft", peers.peft_layer), ("ucan_fast", peers.ucan_layer)):
                candidates.append(
                    Candidate(f"{name}, {name_of(other)} adapters", peers.forward(make, other))
                )
                candidates.append(
                    Candidate(
                        f"{name}, autocast", peers.autocast_forward(make, adapter, case.dtype)
                    )
                )
        if case.compiled:
            for name, make in (("peft", peers.peft_layer), ("ucan_fast", peers.ucan_layer)):
                candidates.append(
                    Candidate(f"{name}, compiled", peers.forward(make, adapter, compiled=True))
                )
        benches.append(
            Bench(
                "linear_forward",
                case.shape,
                baseline="peft",
                candidates=candidates,
                inputs=_inputs(case),
                reference=peers.reference_linear,
                obstacle=case.too_large(cost["flops"]),
                **case.dtypes,
            )
        )
    return benches


def forward_backward(profile: Profile) -> list[Bench]:
    """With the gradients of x, A and B."""
    benches = []
    for case in lora_cases(profile, few=True):
        adapter, t = case.adapter_dtype, case.traffic()
        # Forward; then dy, W, x and both adapters in, dx and both adapters' gradients out.
        cost = {
            "bytes": 3 * t["x"] + 2 * t["w"] + 2 * t["y"] + 3 * (t["a"] + t["b"]),
            "flops": 2 * case.base_flops + 3 * case.lora_flops,
        }
        candidates = [
            Candidate("peft", peers.training_step(peers.peft_layer, adapter), **cost),
            Candidate("ucan_fast", peers.training_step(peers.ucan_layer, adapter), **cost),
            Candidate("addmm_", peers.addmm_training_step(adapter), **cost),
        ]
        if other := _other_adapter(case):
            candidates.append(
                Candidate(
                    f"peft, {name_of(other)} adapters",
                    peers.training_step(peers.peft_layer, other),
                )
            )
        if case.compiled:
            candidates.append(
                Candidate(
                    "peft, compiled", peers.training_step(peers.peft_layer, adapter, compiled=True)
                )
            )
        benches.append(
            Bench(
                "linear_forward_backward",
                case.shape,
                baseline="peft",
                candidates=candidates,
                inputs=_with_gradient(case),
                reference=peers.reference_gradients,
                obstacle=case.too_large(cost["flops"]),
                **case.dtypes,
            )
        )
    return benches


def _with_gradient(case: LoraCase):
    make = _inputs(case)

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        x, *rest = make(seed)
        generator = torch.Generator(x.device).manual_seed(seed + 1)
        dy = torch.randn(case.tokens, case.size[1], generator=generator, device=x.device)
        return x, *rest, dy.to(x.dtype)

    return inputs


def forward_with_moments(profile: Profile) -> list[Bench]:
    """As ``collect`` runs a layer: the moments of x and of δ in the same pass."""
    benches = []
    for case in lora_cases(profile, few=True):
        adapter, t = case.adapter_dtype, case.traffic()
        # Beyond the forward pass: fp64 totals of four sums a column, read and written.
        totals = 2 * 4 * 8 * sum(case.size)
        cost = {
            "bytes": t["x"] + t["w"] + t["a"] + t["b"] + t["y"] + totals,
            "flops": case.base_flops + case.lora_flops,
        }
        hooks = (("boolean index", peers.BooleanIndex), ("mask matmul", peers.MaskMatmul))
        candidates = [
            Candidate(
                f"peft + hooks, {name}",
                peers.hooked_forward(kind, adapter),
                capturable=kind.capturable,
                **cost,
            )
            for name, kind in hooks
        ]
        candidates += [
            Candidate("ucan_fast", peers.ucan_forward_with_moments(adapter), **cost),
            Candidate(
                "peft, no moments",
                peers.forward(peers.peft_layer, adapter),
                reference=peers.reference_linear,
            ),
        ]
        if case.compiled:
            candidates += [
                Candidate(
                    f"peft + hooks, {name}, compiled",
                    peers.hooked_forward(kind, adapter, compiled=True),
                    capturable=kind.capturable,
                )
                for name, kind in hooks
            ]
        benches.append(
            Bench(
                "linear_moments",
                case.shape,
                baseline="peft + hooks, mask matmul",
                candidates=candidates,
                inputs=_inputs(case),
                reference=peers.reference_linear_moments,
                obstacle=case.too_large(cost["flops"]),
                **case.dtypes,
            )
        )
    return benches


@pytest.mark.benches(of=forward)
def test_forward(timed: Result) -> None:
    assert min(timed.seconds) > 0


@pytest.mark.benches(of=forward_backward)
def test_forward_backward(timed: Result) -> None:
    assert min(timed.seconds) > 0


@pytest.mark.benches(of=forward_with_moments)
def test_forward_with_moments(timed: Result) -> None:
    assert min(timed.seconds) > 0
