"""Inputs of the native operators' own tests."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["plain", "column slice", "transposed", "every other", "expanded"]


def matrix(rows: int, cols: int, dtype: torch.dtype, layout: str = "plain") -> torch.Tensor:
    if layout == "plain":
        return torch.randn(rows, cols).to(dtype)
    if layout == "column slice":
        return torch.randn(rows, cols + 9).to(dtype)[:, 4 : 4 + cols]
    if layout == "transposed":
        return torch.randn(cols, rows).to(dtype).t()
    if layout == "every other":
        return torch.randn(2 * rows, 3 * cols).to(dtype)[::2, ::3]
    return torch.randn(1, cols).to(dtype).expand(rows, cols)


def poisoned(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((rows, cols), torch.nan, dtype=dtype)


def random_groups(tokens: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """Runs of one group, mixed stretches, and ignored rows."""
    groups = torch.randint(-1, 2, (tokens,))
    groups[tokens // 5 : tokens // 2] = 1
    return groups.to(dtype)


def totals(n: int, start: float = 0.0) -> torch.Tensor:
    return torch.full((2, 2, n), start, dtype=torch.float64)


def exact(h: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Moments by boolean indexing in fp64."""
    parts = [h.double()[groups == g] for g in (0, 1)]
    return torch.stack(
        [torch.stack([f(p).sum(0) for p in parts]) for f in (torch.abs, torch.square)]
    )


def assert_passes_on(instructions: str, selected: str, file: str) -> None:
    """The selected tests of a file pass with what a lesser processor would run.

    Chosen by torch's own switch: ``"default"`` or ``"avx2"``.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-k", selected, "-p", "no:cacheprovider", file]
    done = subprocess.run(
        command,
        env=os.environ | {"ATEN_CPU_CAPABILITY": instructions},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
