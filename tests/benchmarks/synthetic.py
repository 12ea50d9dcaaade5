"""Result documents with given times, for what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import measure as m
from benchmarks.costs import Ceilings

CEILINGS = Ceilings(
    bandwidth=100.0, flops={"float32": 1000.0, "bfloat16": 2000.0}, source="measured"
)


def environment(device: str = "cpu", **changes: Any) -> dict[str, Any]:
    """Of an invented machine."""
    known = {
        "hardware": "A CPU" if device == "cpu" else "A GPU",
        "device": device,
        "cores": 2,
        "threads": 2,
        "python": "3.11",
        "torch": "2.13.0",
        "cuda": None,
        "triton": "3.7.1",
        "peft": "0.21.2",
        "transformers": "5.23.0",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "date": "2026-11-01T00:00:00+00:00",
        "ceilings": CEILINGS.to_json(),
    }
    return {**known, **changes}


def case(
    group: str,
    shape: dict[str, Any],
    times: dict[str, list[float]],
    *,
    dtype: str = "float32",
    adapter_dtype: str = "",
    baseline: str | None = None,
    **options: Any,
) -> list[m.Result]:
    """Results of one case; the first candidate is the baseline unless one is named."""
    return [
        m.Result(
            name,
            group,
            dict(shape),
            dtype,
            adapter_dtype,
            seconds,
            baseline=baseline or next(iter(times)),
            **options,
        )
        for name, seconds in times.items()
    ]


def document(path: Path, *cases: list[m.Result], skipped=(), device="cpu", **changes: Any):
    """Written, read back and checked."""
    results = [result for one in cases for result in one]
    command = changes.pop("command", "make bench-quick")
    m.write_results(
        path,
        results,
        command,
        skipped=skipped,
        profile=m.PROFILES["quick"],
        environment=environment(device, **changes),
    )
    return m.read_results(path)
