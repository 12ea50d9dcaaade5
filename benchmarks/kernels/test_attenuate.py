"""attenuate_: every A and B of an adapter scaled by its neurons' factors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.kernels.cases import Bench, benchmark_device, name_of
from benchmarks.measure import Candidate, Profile, Result
from benchmarks.shapes import LLAMA_2_7B, LLAMA_32_1B, SMOLLM2_135M
from ucan_fast.ops.attenuate import attenuate_reference_

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


def _inputs(sizes: Sizes, dtype: torch.dtype) -> Callable[[int], tuple[Any, ...]]:
    device = benchmark_device()
    lengths = [shape[axis] for shape, axis in sizes]
    offsets = [0, *itertools.accumulate(lengths)][:-1]
    axes = [axis for _, axis in sizes]

    def inputs(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        weights = [
            torch.randn(*shape, generator=generator, device=device).to(dtype) for shape, _ in sizes
        ]
        # Half of the neurons change, by factors on both sides of 1 and so little that a hundred
        # thousand calls keep every weight a normal number.
        factors = 1 + 2e-4 * torch.randn(sum(lengths), generator=generator, device=device)
        untouched = torch.rand(sum(lengths), generator=generator, device=device) < 0.5
        return weights, torch.where(untouched, 1.0, factors.clamp(0.9998, 1.0002)), offsets, axes

    return inputs


def _reference(weights: Sequence[torch.Tensor], *rest) -> list[torch.Tensor]:
    copies = [weight.clone() for weight in weights]
    attenuate_reference_(copies, *rest)
    return copies


def attenuate(profile: Profile) -> list[Bench]:
    """Synthetic adapters and those of real models."""
    f32, bf16 = torch.float32, torch.bfloat16
    cases = [("200 small matrices", _SMALL, f32)]
    if profile.name == "full":
        cases += [
            ("200 small matrices", _SMALL, bf16),
            *(
                (m.name, _whole_adapter(m), d)
                for m in (SMOLLM2_135M, LLAMA_2_7B)
                for d in (f32, bf16)
            ),
            (f"{LLAMA_32_1B.name} rank 64", _whole_adapter(LLAMA_32_1B, 64), f32),
        ]
    else:
        cases.append((SMOLLM2_135M.name, _whole_adapter(SMOLLM2_135M), f32))
    benches = []
    for name, sizes, dtype in cases:
        elements = sum(rows * cols for (rows, cols), _ in sizes)
        factors = sum(shape[axis] for shape, axis in sizes)
        cost = {"bytes": 2 * elements * dtype.itemsize + 4 * factors, "flops": elements}
        candidates = [
            Candidate("mul_ loop", peers.attenuate_mul_loop, **cost),
            Candidate("loop, view per axis", peers.attenuate_view_loop, **cost),
            Candidate("torch._foreach_mul_", peers.attenuate_foreach, **cost),
            Candidate("ucan_fast", peers.attenuate_ucan, **cost),
        ]
        benches.append(
            Bench(
                "attenuate",
                {"weights": name, "matrices": len(sizes), "elements": elements},
                name_of(dtype),
                baseline="mul_ loop",
                candidates=candidates,
                inputs=_inputs(sizes, dtype),
                reference=_reference,
                mutates=True,
            )
        )
    return benches


@pytest.mark.benches(of=attenuate)
def test_attenuate(timed: Result) -> None:
    assert min(timed.seconds) > 0
