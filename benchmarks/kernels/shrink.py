"""shrink: z = x Aᵀ, alone and with the moments of x."""

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
    k, n = case.size
    make = peers.lora_inputs(k, n, case.rank, case.tokens, case.dtype, device)

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        # What shrink reads and no more: by its size the sets that take turns are counted.
        x, _, a, _, groups = make(seed)
        return x, a.to(case.adapter_dtype), groups

    return inputs


def _torch(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    # PEFT's: x is cast to the adapter's dtype.
    return F.linear(x.to(a.dtype), a)


def _bind(function: Callable, *, compiled: bool = False) -> peers.Binder:
    def bind(x, a, _groups) -> peers.Call:
        run = torch.compile(function, dynamic=False) if compiled else function
        return lambda: run(x, a)

    return bind


def shrink(profile: Profile, device: torch.device) -> list[Bench]:
    """Without moments."""
    benches = []
    for case in lora_cases(profile, few=True):
        t, passes = case.traffic(), case.cost(device)
        k, _ = case.size
        cost = {"bytes": t["x"] + t["a"] + t["z"], "flops": 2 * case.tokens * k * case.rank}
        candidates = [
            Candidate("torch", _bind(_torch), passes=passes.torch_shrink(), **cost),
            Candidate("ucan_fast", _bind(ops.shrink), passes=passes.shrink(), **cost),
        ]
        if case.compiled:
            candidates.append(
                Candidate(
                    "torch, compiled",
                    _bind(_torch, compiled=True),
                    passes=passes.torch_shrink(),
                )
            )
        benches.append(
            Bench(
                "shrink",
                case.shape,
                baseline="torch",
                candidates=candidates,
                inputs=_inputs(case, device),
                reference=lambda x, a, _groups: x.double() @ a.double().t(),
                obstacle=case.too_large(cost["flops"], device),
                **case.dtypes,
            )
        )
    return benches


def _torch_moments(x, a, mask, total) -> torch.Tensor:
    wide = x.float()
    total[0] += mask @ wide.abs()
    total[1] += mask @ wide.square()
    return _torch(x, a)


def _bind_torch_moments(*, compiled: bool = False) -> peers.Binder:
    def bind(x, a, groups) -> peers.Call:
        mask = torch.stack([groups == 0, groups == 1]).float()
        total = peers.new_totals(x.shape[1], x.device)
        run = torch.compile(_torch_moments, dynamic=False) if compiled else _torch_moments
        return lambda: {"z": run(x, a, mask, total), "input": total}

    return bind


def _bind_ucan_moments(x, a, groups) -> peers.Call:
    total = peers.new_totals(x.shape[1], x.device)
    return lambda: {"z": ops.shrink(x, a, groups=groups, input_moments=total), "input": total}


def _reference_moments(x, a, groups) -> dict[str, Any]:
    z = x.double() @ a.double().t()
    return {"z": z, "input": peers.reference_moments(x, groups)}


def shrink_with_moments(profile: Profile, device: torch.device) -> list[Bench]:
    """With the moments of x."""
    benches = []
    for case in lora_cases(profile, few=True):
        t, passes = case.traffic(), case.cost(device)
        k, _ = case.size
        # Four fp64 totals a column, read and written; |x| and x² added up per group.
        cost = {
            "bytes": t["x"] + t["a"] + t["z"] + 2 * 4 * 8 * k,
            "flops": 2 * case.tokens * k * case.rank + 4 * case.tokens * k,
        }
        candidates = [
            Candidate(
                "torch, mask matmul",
                _bind_torch_moments(),
                passes=passes.torch_shrink_moments(),
                **cost,
            ),
            Candidate("ucan_fast", _bind_ucan_moments, passes=passes.shrink(moments=True), **cost),
        ]
        if case.compiled:
            candidates.append(
                Candidate(
                    "torch, mask matmul, compiled",
                    _bind_torch_moments(compiled=True),
                    passes=passes.torch_shrink_moments_compiled(),
                )
            )
        benches.append(
            Bench(
                "shrink_moments",
                case.shape,
                baseline="torch, mask matmul",
                candidates=candidates,
                inputs=_inputs(case, device),
                reference=_reference_moments,
                tolerances=SUMS,
                obstacle=case.too_large(cost["flops"], device),
                **case.dtypes,
            )
        )
    return benches
