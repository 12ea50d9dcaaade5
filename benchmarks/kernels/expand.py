"""expand: y = base_out + s z Bᵀ, alone and with the moments of δ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ucan_fast import ops

from .. import peers
from ..measure import Candidate, Profile
from .cases import SUMS, Bench, LoraCase, lora_cases


def _inputs(case: LoraCase, device: torch.device) -> Callable[[int], tuple[torch.Tensor, ...]]:
    _, n = case.size

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        # base_out is any [tokens, n] tensor, z any [tokens, r] one: x's and A's generator serves.
        z, _, _, b, groups = peers.lora_inputs(
            case.rank, n, case.rank, case.tokens, case.adapter_dtype, device
        )(seed)
        generator = torch.Generator(device).manual_seed(seed + 1)
        base = torch.randn(case.tokens, n, generator=generator, device=device).to(case.dtype)
        return base, z, b.to(case.adapter_dtype), groups

    return inputs


def _peft(base: torch.Tensor, z: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # Its expression, with the cast that it ends in.
    return (base + F.linear(z, b) * peers.SCALING).to(base.dtype)


def _addmm(base: torch.Tensor, z: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # Not in place: a benchmark that adds to the same base_out again and again would overflow.
    return torch.addmm(base, z.to(base.dtype), b.to(base.dtype).t(), alpha=peers.SCALING)


def _ucan(base: torch.Tensor, z: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ops.expand(base, z, b, peers.SCALING)


def _bind(function: Callable, *, compiled: bool = False) -> peers.Binder:
    def bind(base, z, b, _groups) -> peers.Call:
        run = torch.compile(function, dynamic=False) if compiled else function
        return lambda: run(base, z, b)

    return bind


def _reference(base, z, b, _groups) -> torch.Tensor:
    return base.double() + peers.SCALING * (z.double() @ b.double().t())


def _cost(case: LoraCase) -> dict[str, int]:
    t = case.traffic()
    _, n = case.size
    return {
        "bytes": 2 * t["y"] + t["z"] + t["b"],
        "flops": 2 * case.tokens * n * case.rank + 2 * case.tokens * n,
    }


def expand(profile: Profile, device: torch.device) -> list[Bench]:
    """Without moments."""
    benches = []
    for case in lora_cases(profile, few=True):
        cost, passes = _cost(case), case.cost(device)
        candidates = [
            Candidate("peft's expression", _bind(_peft), passes=passes.torch_expand(), **cost),
            Candidate("ucan_fast", _bind(_ucan), passes=passes.expand(), **cost),
            Candidate("torch.addmm", _bind(_addmm), passes=passes.torch_addmm(), **cost),
        ]
        if case.compiled:
            candidates.append(
                Candidate(
                    "peft's expression, compiled",
                    _bind(_peft, compiled=True),
                    passes=passes.torch_expand_compiled(),
                )
            )
        benches.append(
            Bench(
                "expand",
                case.shape,
                baseline="peft's expression",
                candidates=candidates,
                inputs=_inputs(case, device),
                reference=_reference,
                obstacle=case.too_large(cost["flops"], device),
                **case.dtypes,
            )
        )
    return benches


def _peft_moments(base, z, b, mask, total) -> torch.Tensor:
    delta = F.linear(z, b)
    wide = delta.float() * peers.SCALING
    total[0] += mask @ wide.abs()
    total[1] += mask @ wide.square()
    return (base + delta * peers.SCALING).to(base.dtype)


def _bind_peft_moments(*, compiled: bool = False) -> peers.Binder:
    def bind(base, z, b, groups) -> peers.Call:
        mask = torch.stack([groups == 0, groups == 1]).float()
        total = peers.new_totals(base.shape[1], base.device)
        run = torch.compile(_peft_moments, dynamic=False) if compiled else _peft_moments
        return lambda: {"y": run(base, z, b, mask, total), "output": total}

    return bind


def _bind_ucan_moments(base, z, b, groups) -> peers.Call:
    total = peers.new_totals(base.shape[1], base.device)
    return lambda: {
        "y": ops.expand(base, z, b, peers.SCALING, groups=groups, delta_moments=total),
        "output": total,
    }


def _reference_moments(base, z, b, groups) -> dict[str, Any]:
    delta = peers.SCALING * (z.double() @ b.double().t())
    return {"y": base.double() + delta, "output": peers.reference_moments(delta, groups)}


def expand_with_moments(profile: Profile, device: torch.device) -> list[Bench]:
    """With the moments of δ."""
    benches = []
    for case in lora_cases(profile, few=True):
        _, n = case.size
        cost, passes = _cost(case), case.cost(device)
        cost = {
            "bytes": cost["bytes"] + 2 * 4 * 8 * n,
            "flops": cost["flops"] + 4 * case.tokens * n,
        }
        candidates = [
            Candidate(
                "peft's expression, mask matmul",
                _bind_peft_moments(),
                passes=passes.torch_expand_moments(),
                **cost,
            ),
            Candidate("ucan_fast", _bind_ucan_moments, passes=passes.expand(moments=True), **cost),
        ]
        if case.compiled:
            candidates.append(
                Candidate(
                    "peft's expression, mask matmul, compiled",
                    _bind_peft_moments(compiled=True),
                    passes=passes.torch_expand_moments_compiled(),
                )
            )
        benches.append(
            Bench(
                "expand_moments",
                case.shape,
                baseline="peft's expression, mask matmul",
                candidates=candidates,
                inputs=_inputs(case, device),
                reference=_reference_moments,
                tolerances=SUMS,
                obstacle=case.too_large(cost["flops"], device),
                **case.dtypes,
            )
        )
    return benches
