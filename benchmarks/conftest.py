"""Options of the benchmarks that pytest runs; see :mod:`benchmarks.kernels`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The benchmarks are not installed. Last, so that an installed ucan_fast is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ucan_fast benchmarks")
    group.addoption("--profile", choices=["quick", "full"], help="default: BENCH_PROFILE, or quick")
    group.addoption(
        "--save",
        action="store_true",
        help="write the results to benchmarks/results instead of build/bench",
    )
    group.addoption(
        "--targets",
        action="store_true",
        help="only the cases and candidates that benchmarks/targets.toml asks for on this device",
    )
    group.addoption("--json", metavar="PATH", help="write the results there")
