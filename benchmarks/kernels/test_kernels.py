"""Every candidate of every case, as a test: it is checked, then timed beside the others."""

from __future__ import annotations

from benchmarks.measure import Result


def test_kernels(timed: Result) -> None:
    assert min(timed.seconds) > 0
