"""attenuate_: every A and B of an adapter scaled by its neurons' factors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ucan_fast.ops.attenuate import attenuate_reference_
from ucan_fast.ops.backend import native_obstacle

from .. import costs, peers
from ..measure import Candidate, Profile
from ..shapes import LLAMA_2_7B, LLAMA_32_1B, SMOLLM2_135M
from .cases import Bench, name_of

Sizes = list[tuple[tuple[int, int], int]]  # (shape, the axis that is scaled) per matrix

#: 200 matrices of a recommender of 128 dimensions: call overhead decides.
_SMALL: Sizes = [((16, 128), 1), ((128, 16), 0)] * 100


def _whole_adapter(model, rank: int = 16) -> Sizes:
    # Columns of A, rows of B: the input and output sites.
    return [
        (shape, axis)
        for pair in model.adapter_shapes(rank)
        for shape, axis in zip(pair, (1, 0), strict=True)
    ]


def _inputs(
    sizes: Sizes, dtype: torch.dtype, changed: float, device: torch.device
) -> Callable[[int], tuple[Any, ...]]:
    lengths = [shape[axis] for shape, axis in sizes]
    offsets = [0, *itertools.accumulate(lengths)][:-1]
    axes = [axis for _, axis in sizes]

    def inputs(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        weights = [
            torch.randn(*shape, generator=generator, device=device).to(dtype) for shape, _ in sizes
        ]
        # Neurons change by factors on both sides of 1 and so little that a hundred thousand calls
        # keep every weight a normal number.
        factors = 1 + 2e-4 * torch.randn(sum(lengths), generator=generator, device=device)
        untouched = torch.rand(sum(lengths), generator=generator, device=device) >= changed
        return weights, torch.where(untouched, 1.0, factors.clamp(0.9998, 1.0002)), offsets, axes

    return inputs


def _check_inputs(
    sizes: Sizes, dtype: torch.dtype, changed: float, device: torch.device
) -> Callable[[int], tuple[Any, ...]]:
    # The factors that can be timed are so near 1 that bf16 weights do not change: these show it.
    make = _inputs(sizes, dtype, changed, device)

    def inputs(seed: int) -> tuple[Any, ...]:
        weights, factors, *rest = make(seed)
        return weights, 1 + 2e3 * (factors - 1), *rest

    return inputs


def _reference(weights: Sequence[torch.Tensor], *rest) -> list[torch.Tensor]:
    copies = [weight.clone() for weight in weights]
    attenuate_reference_(copies, *rest)
    return copies


def _cases(profile: Profile) -> list[tuple[str, Sizes, torch.dtype, float]]:
    # Name, matrices, dtype, share of the neurons whose factor is not 1. Where half are untouched,
    # an implementation may skip them; where none are, the bytes that must move are certain.
    f32, bf16 = torch.float32, torch.bfloat16
    if profile.name == "quick":
        return [
            ("200 small matrices", _SMALL, f32, 0.5),
            (SMOLLM2_135M.name, _whole_adapter(SMOLLM2_135M), f32, 0.5),
        ]
    seven, wide = _whole_adapter(LLAMA_2_7B), _whole_adapter(LLAMA_32_1B, 64)
    return [
        *(("200 small matrices", _SMALL, dtype, 0.5) for dtype in (f32, bf16)),
        *((SMOLLM2_135M.name, _whole_adapter(SMOLLM2_135M), dtype, 0.5) for dtype in (f32, bf16)),
        *((LLAMA_2_7B.name, seven, dtype, 0.5) for dtype in (f32, bf16)),
        (LLAMA_2_7B.name, seven, bf16, 1.0),
        (f"{LLAMA_32_1B.name} rank 64", wide, f32, 0.5),
    ]


def extension_obstacle(device: torch.device) -> str | None:
    """Why ``attenuate_`` would fall back from the compiled extension here, or None.

    None too where the device is not here, as for a prediction.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    reason = native_obstacle("attenuate_", device)
    if reason is None:
        return None
    return f"attenuate_ would fall back: the compiled extension cannot run it ({reason})"


def _bench(
    group: str, case: tuple[str, Sizes, torch.dtype, float], device: torch.device, **options
) -> Bench:
    name, sizes, dtype, changed = case
    elements = sum(rows * cols for (rows, cols), _ in sizes)
    counts = [(rows * cols, (rows, cols)[axis]) for (rows, cols), axis in sizes]
    at_once = costs.attenuate_at_once(counts, dtype.itemsize, changed=changed)
    # What the result needs is what one kernel that leaves out whole rows moves.
    obstacle = extension_obstacle(device)
    cost = {"bytes": int(costs.traffic(at_once)["bytes"]), "flops": elements}
    loop = {"passes": costs.attenuate_per_tensor(counts, dtype.itemsize), **cost}
    return Bench(
        group,
        {"weights": name, "matrices": len(sizes), "elements": elements, "changed": changed},
        name_of(dtype),
        baseline="mul_ loop",
        candidates=[
            Candidate("mul_ loop", peers.attenuate_mul_loop, **loop),
            Candidate("loop, view per axis", peers.attenuate_view_loop, **loop),
            Candidate("torch._foreach_mul_", peers.attenuate_foreach, **loop),
            Candidate(
                "ucan_fast", peers.attenuate_ucan, passes=at_once, count_launches=True, **cost
            ),
        ],
        inputs=_inputs(sizes, dtype, changed, device),
        reference=_reference,
        check_inputs=_check_inputs(sizes, dtype, changed, device),
        mutates=True,
        obstacles={"ucan_fast": obstacle} if obstacle else {},
        **options,
    )


def attenuate(profile: Profile, device: torch.device) -> list[Bench]:
    """Synthetic adapters and those of real models."""
    return [_bench("attenuate", case, device) for case in _cases(profile)]


def attenuate_wall(profile: Profile, device: torch.device) -> list[Bench]:
    """The same in wall time of eager calls, launches included. A CPU has no other time."""
    if device.type == "cpu":
        return []
    return [_bench("attenuate_wall", case, device, wall=True) for case in _cases(profile)]
