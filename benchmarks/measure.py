"""The measuring core: several ways to compute one thing, timed side by side in one run.

    candidates = [
        Candidate("peft", bind=lambda x, w: lambda: x @ w),
        Candidate("ucan_fast", bind=lambda x, w: lambda: mine(x, w)),
    ]
    results = measure(
        candidates, inputs, reference=lambda x, w: x.double() @ w.double(), baseline="peft",
        group="linear", shape={"model": "Llama-2-7B", "tokens": 1024}, dtype="float32",
    )
    write_results(output_path("kernels"), results, command="...")

- **Correct first.** Every candidate runs on fresh inputs and is compared with the reference; one
  that is wrong raises :class:`CheckFailed` and nothing of the case is timed. Where the caller asks
  for it, one that is not the baseline loses its own row only.
- **Interleaved.** Each round times every candidate once, in turning order, so that a slow moment
  hits them all; a ratio is taken within a round, and its median and quartiles are reported.
- **Device time on CUDA**: events around replays of a CUDA graph. Where one candidate cannot be
  captured, all of the case run eagerly between events, so that like is compared with like. Several
  input sets, together past the L2 cache, take turns. The clock that a GPU's power limit allows
  has a memory: each sample follows 100 ms of its own candidate, untimed, or it would be measured
  at the clock that its neighbour in the round left behind (one product of 8192 x 4096 x 4096 on
  an H100: 409 µs after heavy work and 347 after a rest, about 400 either way after 100 ms). On
  the CPU, and where a case asks for it, it is wall time, launches included.

The JSON file (:func:`write_results`, read back and checked by :func:`read_results`)::

    {"schema": 1,
     "environment": {"hardware", "device", "cores", "threads", "python", "torch", "cuda", "triton",
                     "peft", "transformers", "commit", "date", "command", "profile",
                     "ceilings": {...}},                       see benchmarks.costs.Ceilings
     "results": [{"group", "case", "candidate", "baseline",
                  "seconds": {"median", "q1", "q3", "rounds"},     rounds: one number per round
                  "ratio": {"median", "q1", "q3"},                 baseline time / candidate time
                  "bytes", "flops",                                what the result needs, or null
                  "roofline_seconds",                              of this candidate, or null
                  "shape": {...}, "dtype", "adapter_dtype",        what "case" spells out
                  "extra": {"timing": "graph" | "events" | "wall", ...,
                            "not_captured": why a case on CUDA has no graph,
                            "traffic": {"bytes", "flops", "passes"}: what the candidate needs,
                            "launches": {kernel: number} of one call, on CUDA, where counted,
                            "launches_reason": why they could not be}}],
     "skipped": [{"group", "case", "candidate", "reason",
                  "failed": true where it ran and was wrong or broke down; absent in old files}]}

A ratio above 1 is faster than the baseline. ``commit`` ends in ``+`` where files were changed.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import functools
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .costs import Ceilings, Pass, traffic

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
#: Largest relative error, ‖out - ref‖ / ‖ref‖, of a right result in this dtype.
TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}

Inputs = tuple[Any, ...]


class CheckFailed(AssertionError):
    """A candidate computes something else than the reference; it was not timed."""


class CandidateFailed(RuntimeError):
    """A candidate that is not the baseline is wrong or broke down; the others were measured."""


@dataclass(frozen=True)
class Profile:
    """How long one case may take.

    Attributes:
        name: ``quick`` or ``full``.
        rounds: as many, unless ``seconds`` ends them, but never fewer than ``min_rounds``.
        seconds: for the timed rounds of one case.
        min_sample: a sample repeats its call until it lasts this long, in seconds.
        settle: on CUDA a candidate first runs this long untimed, in every round, in seconds.
    """

    name: str
    rounds: int
    seconds: float
    min_sample: float
    min_rounds: int = 5
    settle: float = 0.0


PROFILES = {
    "quick": Profile("quick", rounds=11, seconds=2.0, min_sample=2e-3, settle=0.1),
    "full": Profile("full", rounds=21, seconds=20.0, min_sample=5e-3, settle=0.1),
}


def chosen_profile(name: str | None = None) -> Profile:
    """The named profile, else ``BENCH_PROFILE``'s, else quick."""
    name = name or os.environ.get("BENCH_PROFILE") or "quick"
    if name not in PROFILES:
        raise ValueError(f"profile {name!r} is unknown; use one of {', '.join(PROFILES)}.")
    return PROFILES[name]


@dataclass(frozen=True)
class Candidate:
    """One way to compute the thing.

    Attributes:
        name: as it appears in tables, for example ``peft, fp32 adapters``.
        bind: given the inputs, a function of no arguments that does the work and returns what is
            checked (tensors, numbers, nested in tuples, lists or dicts). What bind itself does
            (building a module, compiling) is not timed.
        bytes: device memory traffic that the result needs at least, whoever computes it; None if
            unknown. Rates in GB/s refer to it.
        flops: operations, likewise.
        passes: what this candidate moves and computes, kernel by kernel, for the roofline.
        dtype: of its result, where narrower than the case's; decides how exact it must be.
        tolerance: instead of the dtype's.
        reference: where it computes something else on purpose (a floor).
        capturable: False where it synchronises, so that no CUDA graph can hold it.
        count_launches: on CUDA, note which kernels one call starts.
        extra: goes into the result's ``extra``.
    """

    name: str
    bind: Callable[..., Callable[[], Any]]
    bytes: int | None = None
    flops: int | None = None
    passes: Sequence[Pass] | None = None
    dtype: str | None = None
    tolerance: float | None = None
    reference: Callable[..., Any] | None = None
    capturable: bool = True
    count_launches: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """The times of one candidate in one case, one per round."""

    name: str
    group: str
    shape: dict[str, Any]
    dtype: str
    adapter_dtype: str
    seconds: list[float]
    bytes: int | None = None
    flops: int | None = None
    baseline: str = ""
    roofline_seconds: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    passes: Sequence[Pass] | None = None

    def predicted_seconds(self, ceilings: Ceilings) -> float | None:
        """The roofline's, unless it was given; None where the passes are not known."""
        if self.roofline_seconds is not None or self.passes is None:
            return self.roofline_seconds
        return ceilings.seconds(self.passes, eager=self.extra.get("timing") != "graph")

    @property
    def case(self) -> str:
        """What was computed, the candidate apart."""
        return case_name(self.shape, self.dtype, self.adapter_dtype)


@dataclass(frozen=True)
class Skipped:
    """A candidate without times, and why: no row is left out silently.

    Attributes:
        failed: it is wrong or broke down, rather than unable to run here.
    """

    group: str
    case: str
    candidate: str
    reason: str
    failed: bool = False


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of these values; one value has no spread."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)

    def to_json(self) -> dict[str, float]:
        """As in the file."""
        return {"median": self.median, "q1": self.q1, "q3": self.q3}


def case_name(shape: Mapping[str, Any], dtype: str, adapter_dtype: str = "") -> str:
    """``Llama-2-7B q_proj tokens=1024 rank=16 bfloat16, float32 adapters``.

    Strings stand alone, numbers with their key.
    """
    words = [str(v) if isinstance(v, str) else f"{k}={v}" for k, v in shape.items()]
    name = " ".join([*words, dtype])
    return f"{name}, {adapter_dtype} adapters" if adapter_dtype else name


def measure(
    candidates: Sequence[Candidate],
    inputs: Callable[[int], Inputs],
    *,
    group: str,
    shape: Mapping[str, Any],
    dtype: str,
    baseline: str,
    reference: Callable[..., Any],
    adapter_dtype: str = "",
    mutates: bool = False,
    wall: bool = False,
    tolerances: Mapping[str, float] | None = None,
    check_inputs: Callable[[int], Inputs] | None = None,
    profile: Profile | None = None,
    failures: dict[str, str] | None = None,
) -> list[Result]:
    """Check every candidate, then time them all in interleaved rounds.

    Args:
        candidates: at least the baseline.
        inputs: seed -> inputs; the same seed gives the same values, never zeros.
        group, shape, dtype, adapter_dtype: what the case is.
        baseline: name of the candidate that ratios refer to.
        reference: inputs -> the right result, in higher precision where that is possible.
        mutates: candidates change their inputs, so that each is checked on its own copy. Repeated
            calls must not drive the values to 0 or infinity.
        wall: on CUDA too, wall time of eager calls until the device is done.
        tolerances: as for :func:`check`.
        check_inputs: what is checked, where the inputs that can be timed show too little.
        profile: default: :func:`chosen_profile`.
        failures: where given, a candidate other than the baseline that is wrong or breaks down is
            left out, and why is written here under its name.

    Returns:
        One result per candidate that is not left out, in order.

    Raises:
        CheckFailed: a wrong result.
    """
    names = [candidate.name for candidate in candidates]
    if len(set(names)) != len(names) or baseline not in names:
        raise ValueError(f"{group}: {names} must be distinct and contain {baseline!r}.")
    profile = profile or chosen_profile()
    case = case_name(shape, dtype, adapter_dtype)
    alone = functools.partial(_alone, baseline=baseline, failures=failures)
    errors = check(
        candidates,
        check_inputs or inputs,
        reference=reference,
        dtype=dtype,
        mutates=mutates,
        tolerances=tolerances,
        where=f"{group}: {case}",
        alone=alone,
    )
    candidates = [candidate for candidate in candidates if candidate.name in errors]
    first = inputs(0)
    device = device_of(first)
    sets = [first, *(inputs(seed) for seed in range(1, number_of_sets(first, device)))]
    candidates, calls = _warm(candidates, sets, device, alone)
    samplers, timing = _samplers(candidates, calls, device, settle=profile.settle, wall=wall)
    launches = [
        _launches(bound[0]) if candidate.count_launches and device.type == "cuda" else {}
        for candidate, bound in zip(candidates, calls, strict=True)
    ]
    seconds = _rounds(samplers, profile)
    return [
        Result(
            name=candidate.name,
            group=group,
            shape=dict(shape),
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            seconds=times,
            bytes=candidate.bytes,
            flops=candidate.flops,
            baseline=baseline,
            extra={**timing, "input_sets": len(sets), **counted, **candidate.extra},
            passes=candidate.passes,
        )
        for candidate, times, counted in zip(candidates, seconds, launches, strict=True)
    ]


@contextlib.contextmanager
def _alone(name: str, *, baseline: str, failures: dict[str, str] | None) -> Iterator[None]:
    # What happens in here costs this candidate its row; the baseline's costs the case.
    try:
        yield
    except Exception as error:
        if failures is None or name == baseline:
            raise
        # Its frames hold the tensors that the others need room for.
        traceback.clear_frames(error.__traceback__)
        failures[name] = described(error)


def described(error: BaseException) -> str:
    """An error in one line: our own words, else its type and its first line."""
    if isinstance(error, (CheckFailed, CandidateFailed)):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def check(
    candidates: Sequence[Candidate],
    inputs: Callable[[int], Inputs],
    *,
    reference: Callable[..., Any],
    dtype: str,
    mutates: bool = False,
    tolerances: Mapping[str, float] | None = None,
    where: str = "",
    seed: int = 1_000_003,
    alone: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict[str, float]:
    """The gate: the relative error of every candidate on fresh inputs.

    Args:
        tolerances: key of a result that is a dict -> what its tensors may be wrong by at most,
            where that is less than the dtype allows.
        alone: a candidate's name -> what surrounds its own part; where that takes an error, the
            candidate is not among those returned.

    Raises:
        CheckFailed: one is larger than its dtype allows, or not a number, or the results do not
            correspond.
    """
    fresh = inputs(seed)
    expected = reference(*fresh)
    # Before any candidate can change them.
    own: dict[str, Any] = {}
    for candidate in candidates:
        if candidate.reference is not None:
            with alone(candidate.name):
                own[candidate.name] = candidate.reference(*fresh)
    errors = {}
    for candidate in candidates:
        if candidate.reference is not None and candidate.name not in own:
            continue
        with alone(candidate.name):
            errors[candidate.name] = _error(
                candidate,
                inputs(seed) if mutates else fresh,
                own.get(candidate.name, expected),
                dtype,
                tolerances or {},
                where,
            )
    return errors


def _error(
    candidate: Candidate,
    inputs: Inputs,
    wanted: Any,
    dtype: str,
    tolerances: Mapping[str, float],
    where: str,
) -> float:
    call = candidate.bind(*inputs)
    poison(_flat(wanted), getattr(torch, dtype))
    limit = candidate.tolerance or TOLERANCE[candidate.dtype or dtype]
    try:
        got = call()
        found = [(relative_error(_flat(got), _flat(wanted)), limit)]
        for key, most in tolerances.items():
            # A floor with a reference of its own returns less.
            if isinstance(wanted, Mapping) and key in wanted:
                error = relative_error(_flat(got[key]), _flat(wanted[key]))
                found.append((error, min(limit, most)))
    except CheckFailed as failure:
        raise CheckFailed(f"{where}: {candidate.name!r}: {failure}") from None
    for error, most in found:
        # `not <=`: a NaN must not pass.
        if not error <= most:
            raise CheckFailed(
                f"{where}: {candidate.name!r} is wrong: relative error {error:.3g}, "
                f"allowed {most:.3g}. It was not timed."
            )
    return found[0][0]


def relative_error(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest ‖got - wanted‖ / ‖wanted‖ of the tensors; NaN where one is not finite."""
    if [tuple(t.shape) for t in got] != [tuple(t.shape) for t in wanted]:
        raise CheckFailed(
            f"the result has shapes {[tuple(t.shape) for t in got]}, "
            f"the reference {[tuple(t.shape) for t in wanted]}."
        )
    worst = 0.0
    for mine, right in zip(got, wanted, strict=True):
        right = right.detach().to(torch.float64)
        difference = mine.detach().to(right.device, torch.float64) - right
        scale = float(right.norm())
        error = float(difference.norm()) / (scale or 1.0)
        if not math.isfinite(error):
            return math.nan
        worst = max(worst, error)
    return worst


def poison(outputs: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    """Leave NaN in freed memory of these sizes, where an output is about to land.

    What a candidate does not write must not hold the right values of the one before it.
    """
    held = [
        torch.full_like(output, math.nan, dtype=kind)
        for output in outputs
        for kind in (dtype, torch.float32)
        for _ in range(2)
    ]
    del held


def ratios(results: Sequence[Result], baseline: str) -> dict[str, Spread]:
    """By candidate: how many times faster than the baseline, round by round.

    Args:
        results: of one case, from one call of :func:`measure`.
        baseline: a candidate's name.
    """
    times = {result.name: result.seconds for result in results}
    return {
        name: Spread.of([b / s for b, s in zip(times[baseline], seconds, strict=True)])
        for name, seconds in times.items()
    }


def number_of_sets(inputs: Inputs, device: torch.device) -> int:
    """How many input sets take turns: together three times the L2 cache on CUDA.

    However small one is: a thousand sets of a single token's vectors, rather than a few that stay
    in the cache. So inputs must not hold more than what the candidates read.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(3 * cache / max(input_bytes(inputs), 1)))


def input_bytes(inputs: Any) -> int:
    """Bytes of all tensors of the inputs, shared storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(inputs)}
    return sum(storage.nbytes() for storage in storages.values())


def device_of(inputs: Any) -> torch.device:
    """Where the inputs are: of the first tensor or module, else the CPU."""
    return next((tensor.device for tensor in _tensors(inputs)), torch.device("cpu"))


# Timing


def _warm(
    candidates: Sequence[Candidate],
    sets: list[Inputs],
    device: torch.device,
    alone: Callable[[str], contextlib.AbstractContextManager],
) -> tuple[list[Candidate], list[list[Callable[[], Any]]]]:
    # Those that can be called with every input set, and their calls. Compilation, caches, handles:
    # before anything is captured or timed.
    kept, calls = [], []
    for candidate in candidates:
        with alone(candidate.name):
            bound = [candidate.bind(*inputs) for inputs in sets]
            for call in [*bound, *bound]:
                call()
            if device.type == "cuda":
                # What the device finds wrong is this candidate's.
                torch.cuda.synchronize(device)
            kept.append(candidate)
            calls.append(bound)
    return kept, calls


def _samplers(
    candidates: Sequence[Candidate],
    calls: list[list[Callable[[], Any]]],
    device: torch.device,
    *,
    settle: float = 0.0,
    wall: bool = False,
) -> tuple[list[Callable[[int], float]], dict[str, str]]:
    # For each candidate: n -> seconds per call, over n passes through all input sets.
    if device.type != "cuda":
        return [_wall_sampler(bound) for bound in calls], {"timing": "wall"}
    if wall:
        return [_wall_sampler(bound, torch.cuda.synchronize) for bound in calls], {"timing": "wall"}
    eager = [_event_sampler(_in_turn(bound), len(bound), settle) for bound in calls]
    obstacle = ", ".join(candidate.name for candidate in candidates if not candidate.capturable)
    if obstacle:
        return eager, {"timing": "events", "not_captured": obstacle}
    replays = []
    for candidate, bound in zip(candidates, calls, strict=True):
        try:
            replays.append(_event_sampler(_capture(bound), len(bound), settle))
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            reason = f"{candidate.name}: {str(error).splitlines()[0]}"
            return eager, {"timing": "events", "not_captured": reason}
    return replays, {"timing": "graph"}


def _wall_sampler(
    calls: list[Callable[[], Any]], wait: Callable[[], None] = lambda: None
) -> Callable[[int], float]:
    def sample(passes: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(passes):
            for call in calls:
                call()
        wait()
        return (time.perf_counter() - start) / (passes * len(calls))

    return sample


def _event_sampler(
    run: Callable[[], Any], calls: int, settle: float = 0.0
) -> Callable[[int], float]:
    def sample(passes: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began = time.perf_counter()
        while time.perf_counter() - began < settle:
            for _ in range(passes):
                run()
            torch.cuda.synchronize()
        start.record()
        for _ in range(passes):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / (passes * calls)

    return sample


def _in_turn(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _capture(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    # Warmed up on the stream that is captured, as torch.cuda.graphs asks.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph.replay


def _launches(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"launches": count_launches(call)}
    except RuntimeError as error:  # no profiler here: the times are still to be had
        return {"launches_reason": described(error)}


def count_launches(call: Callable[[], Any]) -> dict[str, int]:
    """Kernel -> how often one call starts it on CUDA; copies and memsets are left out."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    return kernels_of(profiler.events())


def kernels_of(events: Iterable[Any]) -> dict[str, int]:
    """The kernels among a profiler's events, counted by name."""
    names = [
        event.name
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)
    ]
    return dict(collections.Counter(names))


def _rounds(samplers: list[Callable[[int], float]], profile: Profile) -> list[list[float]]:
    passes = []
    for sample in samplers:
        n, once = 1, sample(1)
        # A first sample can be slow by accident: ask again with as many passes as it suggests.
        for _ in range(2):
            n = max(1, math.ceil(profile.min_sample / max(once, 1e-9)))
            once = sample(n)
            if once * n >= profile.min_sample / 2:
                break
        passes.append(n)
    seconds: list[list[float]] = [[] for _ in samplers]
    began = time.perf_counter()
    with _no_garbage_collection():
        for number in range(profile.rounds):
            order = range(len(samplers))
            for i in reversed(order) if number % 2 else order:
                seconds[i].append(samplers[i](passes[i]))
            late = time.perf_counter() - began > profile.seconds
            if late and number + 1 >= profile.min_rounds:
                break
    return seconds


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# What is written down


def write_results(
    path: Path,
    results: Sequence[Result],
    command: str,
    *,
    skipped: Iterable[Skipped] = (),
    profile: Profile | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Write the JSON file described at the top.

    Args:
        path: parent folders are made.
        results: of any number of cases; each names its baseline, which is among them.
        command: how to run it again, from the repository's root.
        skipped: what could not run, and why.
        profile: default: :func:`chosen_profile`.
        environment: default: :func:`describe_environment` and the ceilings that
            :func:`benchmarks.roofline.measured_ceilings` finds.
    """
    if environment is None:
        from .roofline import measured_ceilings

        environment = {**describe_environment(), "ceilings": measured_ceilings().to_json()}
    ceilings = Ceilings.from_json(environment["ceilings"]) if "ceilings" in environment else None
    cases: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        cases.setdefault((result.group, result.case), []).append(result)
    rows = []
    for together in cases.values():
        for result in together:
            ratio = ratios([r for r in together if r.baseline == result.baseline], result.baseline)
            rows.append(
                {
                    "group": result.group,
                    "case": result.case,
                    "candidate": result.name,
                    "baseline": result.baseline,
                    "seconds": {**Spread.of(result.seconds).to_json(), "rounds": result.seconds},
                    "ratio": ratio[result.name].to_json(),
                    "bytes": result.bytes,
                    "flops": result.flops,
                    "roofline_seconds": result.predicted_seconds(ceilings)
                    if ceilings
                    else result.roofline_seconds,
                    "shape": result.shape,
                    "dtype": result.dtype,
                    "adapter_dtype": result.adapter_dtype,
                    "extra": result.extra
                    if result.passes is None
                    else {**result.extra, "traffic": traffic(result.passes)},
                }
            )
    document = {
        "schema": SCHEMA,
        "environment": {
            **environment,
            "command": command,
            "profile": (profile or chosen_profile()).name,
        },
        "results": rows,
        "skipped": [vars(entry) for entry in skipped],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


_ENVIRONMENT = (
    *("hardware", "device", "cores", "threads", "python", "torch", "cuda", "triton"),
    *("peft", "transformers", "commit", "date", "command", "profile"),
)
_ROW = {
    **dict.fromkeys(("group", "case", "candidate", "baseline", "dtype", "adapter_dtype"), str),
    **dict.fromkeys(("seconds", "ratio", "shape", "extra"), dict),
    **dict.fromkeys(("bytes", "flops", "roofline_seconds"), (int, float, type(None))),
}


def read_results(path: Path) -> dict[str, Any]:
    """The file's content, checked: medians, quartiles and ratios are those of its rounds.

    Raises:
        ValueError: it is not what :func:`write_results` writes; the text says where.
    """
    try:
        document = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error}).") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a benchmark result of schema {SCHEMA}.")
    environment = document.get("environment")
    for key in _ENVIRONMENT:
        if not isinstance(environment, dict) or key not in environment:
            raise ValueError(f"{path}: environment.{key} is missing.")
    if environment["device"] not in ("cpu", "cuda") or not isinstance(environment["date"], str):
        raise ValueError(f"{path}: environment.device or environment.date is none.")
    for key in ("results", "skipped"):
        if not isinstance(document.get(key), list):
            raise ValueError(f"{path}: {key} is missing or no list.")
    for index, row in enumerate(document["results"]):
        where = f"{path}: results[{index}]"
        for key, kind in _ROW.items():
            if not isinstance(row, dict) or key not in row or not isinstance(row[key], kind):
                raise ValueError(f"{where}.{key} is missing or of a wrong type.")
        rounds = row["seconds"].get("rounds")
        if not isinstance(rounds, list) or not rounds or not all(map(_is_time, rounds)):
            raise ValueError(f"{where}.seconds.rounds must hold the time of every round.")
        _check_spread(row["seconds"], rounds, f"{where}.seconds")
    times = {_place(row, "candidate"): row["seconds"]["rounds"] for row in document["results"]}
    for index, row in enumerate(document["results"]):
        where = f"{path}: results[{index}]"
        own, base = row["seconds"]["rounds"], times.get(_place(row, "baseline"))
        if base is None or len(base) != len(own):
            raise ValueError(f"{where}: its baseline is missing or has other rounds.")
        ratio = [b / s for b, s in zip(base, own, strict=True)]
        _check_spread(row["ratio"], ratio, f"{where}.ratio")
    return document


def _place(row: Mapping[str, Any], key: str) -> tuple[str, str, str]:
    return row["group"], row["case"], row[key]


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _check_spread(spread: Mapping[str, Any], values: Sequence[float], where: str) -> None:
    for key, wanted in Spread.of(values).to_json().items():
        value = spread.get(key)
        if not isinstance(value, (int, float)):
            raise ValueError(f"{where}.{key} is missing or not a number.")
        if not math.isclose(value, wanted, rel_tol=1e-9):
            raise ValueError(f"{where}.{key} is {value}, but its rounds say {wanted}.")


def output_path(suite: str, *, save: bool = False, profile: Profile | None = None) -> Path:
    """``<device>-<profile>-<date>-<suite>.json`` in ``benchmarks/results``, or ``build/bench``.

    Args:
        suite: ``kernels`` or ``model``.
        save: results that are to be committed.
        profile: default: :func:`chosen_profile`.
    """
    folder = ROOT / ("benchmarks/results" if save else "build/bench")
    words = (hardware(), (profile or chosen_profile()).name, datetime.date.today(), suite)
    return folder / f"{'-'.join(_slug(str(word)) for word in words)}.json"


def hardware() -> str:
    """The name of the GPU, else of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def describe_environment() -> dict[str, Any]:
    """Hardware, versions, commit, date and threads."""
    return {
        "hardware": hardware(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "peft": version_of("peft"),
        "transformers": version_of("transformers"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def version_of(package: str) -> str | None:
    """Its installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    # A copy without .git (a GPU machine that was sent the files) may name it in the environment.
    if named := os.environ.get("BENCH_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        run = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(results: Sequence[Result], skipped: Iterable[Skipped] = ()) -> str:
    """The results for a terminal: one block per case, the baseline named, slower rows kept."""
    lines: list[str] = []
    cases: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        cases.setdefault((result.group, result.case), []).append(result)
    for (group, case), together in cases.items():
        baseline = together[0].baseline
        faster = ratios(together, baseline)
        timing = together[0].extra.get("timing", "")
        lines.append(f"{group}: {case} ({timing} time, {len(together[0].seconds)} rounds)")
        for result in together:
            seconds, ratio = Spread.of(result.seconds), faster[result.name]
            rate = f"{result.bytes / seconds.median * 1e-9:9.1f} GB/s" if result.bytes else ""
            of = " x baseline" if result.name == baseline else ""
            lines.append(
                f"  {result.name:<34}{seconds.median * 1e3:10.4f} ms {ratio.median:8.2f}x "
                f"[{ratio.q1:.2f}, {ratio.q3:.2f}]{of} {rate}".rstrip()
            )
    for s in skipped:
        lines.append(
            f"{'FAILED' if s.failed else 'skipped'}: {s.group}: {s.case}: {s.candidate}: {s.reason}"
        )
    return "\n".join(lines)


# Tensors in nested results


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for key in sorted(value) for t in _flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _flat(item)]
    if isinstance(value, (int, float)):
        return [torch.tensor(float(value), dtype=torch.float64)]
    raise CheckFailed(f"a result of type {type(value).__name__} cannot be checked.")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
