"""Measured ceilings, predicted times, and both beside what was measured.

    python -m benchmarks.roofline                      this machine's ceilings
    python -m benchmarks.roofline FILE.json...         predicted and measured, row by row
    python -m benchmarks.roofline --gpu h100           the target table, predicted

A kernel needs at least the larger of bytes / copy bandwidth and operations / product rate, and
never less than the shortest kernel; a candidate needs the sum over its kernels
(:mod:`benchmarks.costs`).
Measured over predicted, the last column, is 1 where a candidate does as well as its kernels allow.
Far above 1 something is unexplained; below 1 data stayed in a cache between two kernels.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .costs import Ceilings
from .measure import Spread, read_results

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: GPUs that can be predicted without one. Copy bandwidth and product rates are what well-tuned
#: kernels are reported to reach, well below the data sheet.
GPUS = {
    "h100": Ceilings(
        bandwidth=2.9e12,
        flops={"float32": 50e12, "bfloat16": 700e12, "float16": 700e12, "float64": 50e12},
        shortest=2.0e-6,
        launch=5.0e-6,
        source="assumed for an H100 SXM: copies at 2.9 of the published 3.35 TB/s, bf16 products "
        "at 700 of 989 TFLOP/s, fp32 and fp64 at 50 of 67; 2 µs for the shortest kernel of a "
        "graph, 5 µs from one eager kernel to the next",
    )
}


def measure_ceilings(device: torch.device | None = None, *, seconds: float = 0.25) -> Ceilings:
    """Copy bandwidth and product rates, the best of several tries.

    Args:
        device: default: the GPU where there is one.
        seconds: for each of the figures, roughly; one call is made in any case.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = _clock(device)

    def best(call: Callable[[], Any], repeat: int = 1) -> float:
        call()
        times, began = [], time.perf_counter()
        while not times or (len(times) < 50 and time.perf_counter() - began < seconds):
            times.append(clock(call) / repeat)
        return min(times)

    def copy_rate() -> float:
        # Past the caches of the machines that we know: 32 MB of L3, 50 MB of L2.
        size = 1 << (30 if device.type == "cuda" else 28)
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * size / best(functools.partial(target.copy_, source))

    bandwidth, flops = copy_rate(), {}
    for dtype in _DTYPES:
        if device.type == "cuda":
            n = 8192 if dtype.itemsize == 2 else 4096
        else:
            # Few CPUs multiply fp16: 1024 would take seconds.
            n = 256 if dtype == torch.float16 else 1024
        x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, dtype=dtype, device=device)
        product = functools.partial(torch.mm, x, y, out=out)
        flops[str(dtype).removeprefix("torch.")] = 2 * n**3 / best(product)
    small = torch.zeros(1, device=device)

    def kernels() -> None:
        for _ in range(200):
            small.add_(1.0)

    launch = best(kernels, repeat=200)
    shortest = launch
    if device.type == "cuda":
        kernels()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernels()
        shortest = best(graph.replay, repeat=200)
    return Ceilings(
        bandwidth=bandwidth, flops=flops, shortest=shortest, launch=launch, source="measured"
    )


@functools.cache
def measured_ceilings() -> Ceilings:
    """:func:`measure_ceilings` of this machine, measured once in a process."""
    return measure_ceilings()


def _clock(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    if device.type != "cuda":

        def wall(call: Callable[[], Any]) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return wall

    def events(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return events


def predicted_document(benches: Iterable[Any], ceilings: Ceilings, hardware: str) -> dict[str, Any]:
    """A result document whose times are predictions: of every candidate with known passes.

    Args:
        benches: as :mod:`benchmarks.kernels` makes them, built for the device in question.
        ceilings: of the machine.
        hardware: its name.
    """
    rows = []
    for bench in benches:
        eager = bench.wall or not all(one.capturable for one in bench.candidates)
        times = {
            one.name: ceilings.seconds(one.passes, eager=eager)
            for one in bench.candidates
            if one.passes is not None
        }
        for one in bench.candidates:
            if one.name not in times:
                continue
            seconds = times[one.name]
            faster = times[bench.baseline] / seconds
            launches = {}
            for kernel in one.passes:
                launches[kernel.name] = launches.get(kernel.name, 0) + 1
            rows.append(
                {
                    "group": bench.group,
                    "case": bench.case,
                    "candidate": one.name,
                    "baseline": bench.baseline,
                    "seconds": {**Spread.of([seconds]).to_json(), "rounds": [seconds]},
                    "ratio": Spread.of([faster]).to_json(),
                    "bytes": one.bytes,
                    "flops": one.flops,
                    "roofline_seconds": seconds,
                    "shape": dict(bench.shape),
                    "dtype": bench.dtype,
                    "adapter_dtype": bench.adapter_dtype,
                    "extra": {"timing": "predicted", "launches": launches},
                }
            )
    environment = {"hardware": hardware, "device": "cuda", "date": "", "commit": ""}
    environment["ceilings"] = ceilings.to_json()
    return {"environment": environment, "results": rows, "skipped": []}


def predict(gpu: str) -> dict[str, Any]:
    """The cases of the target table, as predicted for this GPU before it is measured.

    Raises:
        ValueError: no ceilings are known for it.
    """
    if gpu not in GPUS:
        raise ValueError(f"no ceilings for {gpu!r}; known: {', '.join(GPUS)}.")
    from .kernels.suite import target_benches

    return predicted_document(target_benches("cuda"), GPUS[gpu], f"{gpu.upper()}, predicted")


def describe(ceilings: Ceilings) -> str:
    """The ceilings in one paragraph."""
    rates = ", ".join(f"{name} {rate * 1e-9:,.0f}" for name, rate in ceilings.flops.items())
    return (
        f"copy bandwidth {ceilings.bandwidth * 1e-9:,.1f} GB/s (reads and writes); matrix products "
        f"in GFLOP/s: {rates}; shortest kernel {ceilings.shortest * 1e6:.2f} µs, "
        f"{ceilings.launch * 1e6:.2f} µs from Python ({ceilings.source})"
    )


def side_by_side(document: dict[str, Any]) -> str:
    """Predicted and measured time of every row that has both, case by case."""
    lines, case = [], None
    for row in document["results"]:
        if row["roofline_seconds"] is None:
            continue
        if (row["group"], row["case"]) != case:
            case = (row["group"], row["case"])
            lines.append(f"{row['group']}: {row['case']}")
            lines.append(f"  {'':<40}{'predicted':>12}{'measured':>12}   measured / predicted")
        predicted, measured = row["roofline_seconds"], row["seconds"]["median"]
        lines.append(
            f"  {row['candidate']:<40}{predicted * 1e3:9.4f} ms{measured * 1e3:9.4f} ms"
            f"{measured / predicted:9.2f}"
        )
    return "\n".join(lines) or "no row has a predicted time"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("files", nargs="*", type=Path, help="result files")
    parser.add_argument("--gpu", choices=sorted(GPUS), help="predict the target table for it")
    options = parser.parse_args(arguments)
    if options.gpu:
        from .targets import evaluate, load_targets, render

        document = predict(options.gpu)
        print(f"PREDICTION for one {options.gpu.upper()}, nothing was measured.")
        print(f"Ceilings: {describe(GPUS[options.gpu])}.\n")
        targets = [target for target in load_targets() if target.device == "cuda"]
        print(render(evaluate(targets, [document], devices={"cuda"}), measured="predicted"))
        return 0
    if not options.files:
        print(describe(measure_ceilings()))
    from .targets import short_commit

    for path in options.files:
        document = read_results(path)
        environment = document["environment"]
        print(f"{path.name}: {environment['hardware']}, commit {short_commit(environment)}")
        if "ceilings" in environment:
            print(describe(Ceilings.from_json(environment["ceilings"])))
        print(side_by_side(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
