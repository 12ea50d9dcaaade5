"""Whole passes side by side: what :mod:`benchmarks.measure` does, with work between the samples.

A pass is too long to be repeated thousands of times, waits for the host as a user would, and
changes the model that the next candidate runs. So every candidate has three parts, of which only
the middle one is timed: prepare, run, undo. Time is wall time, the device synchronised at both
ends. Each candidate is checked before any of them is timed, rounds are interleaved.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..measure import Candidate, Inputs, Profile, Result, Spread, case_name, check
from .resources import EnergyMeter, peak_memory


def _nothing() -> None:
    return None


def _as_it_is(value: Any) -> Any:
    return value


@dataclass
class Run:
    """One pass, bound to its inputs.

    Attributes:
        run: does the work. Timed.
        prepare: before it: hooks or a fused forward put in place. Not timed.
        undo: after it: everything as before, weights included. Not timed.
        result: of what run returned, the tensors that are checked. Not timed.
    """

    run: Callable[[], Any]
    prepare: Callable[[], None] = _nothing
    undo: Callable[[], None] = _nothing
    result: Callable[[Any], Any] = _as_it_is


@dataclass(frozen=True)
class Whole:
    """One way to do the whole pass.

    Attributes:
        name: as it appears in tables and in the target file.
        bind: given the inputs, a :class:`Run`.
        tokens: attended tokens that the pass goes through, for tokens per second.
        scale: times and energy are multiplied by it, where only a slice of the pass is run; the
            slice must be described in ``extra``.
        reference: where it computes something else than the others on purpose.
        tolerance: relative error that a right result may have; default: the dtype's.
        extra: goes into the result's ``extra``.
    """

    name: str
    bind: Callable[..., Run]
    tokens: int | None = None
    scale: float = 1.0
    reference: Callable[..., Any] | None = None
    tolerance: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


#: Fewer and longer samples than for single operators.
PROFILES = {
    "quick": Profile("quick", rounds=9, seconds=8.0, min_sample=0.03, min_rounds=5),
    "full": Profile("full", rounds=21, seconds=90.0, min_sample=0.2, min_rounds=7),
}


def measure_whole(
    candidates: Sequence[Whole],
    inputs: Callable[[int], Inputs],
    *,
    group: str,
    shape: Mapping[str, Any],
    dtype: str,
    adapter_dtype: str,
    baseline: str,
    reference: Callable[..., Any],
    device: torch.device,
    profile: Profile,
) -> list[Result]:
    """Check every candidate, then time them all in interleaved rounds.

    Args:
        candidates: at least the baseline.
        inputs: seed -> inputs. The check uses another seed than the timing.
        group, shape, dtype, adapter_dtype: what the case is.
        baseline: name of the candidate that ratios refer to.
        reference: inputs -> the right result.
        device: where the passes run.
        profile: of :data:`PROFILES`.

    Returns:
        One result per candidate, in order. ``extra`` holds ``tokens_per_second``,
        ``peak_memory_bytes`` and ``energy_joules`` (null with ``..._reason`` where unknown).

    Raises:
        CheckFailed: a wrong result; nothing was timed.
    """
    names = [candidate.name for candidate in candidates]
    if len(set(names)) != len(names) or baseline not in names:
        raise ValueError(f"{group}: {names} must be distinct and contain {baseline!r}.")
    check(
        [_checked(candidate) for candidate in candidates],
        inputs,
        reference=reference,
        dtype=dtype,
        where=f"{group}: {case_name(shape, dtype, adapter_dtype)}",
    )
    bound = inputs(0)
    runs = [candidate.bind(*bound) for candidate in candidates]
    meters = [EnergyMeter(device) for _ in runs]
    with _own_garbage_collection():
        # The pass that memory is measured in also warms caches up, and says how long a pass is.
        memory, once = zip(*(_memory(run, device) for run in runs), strict=True)
        passes = [max(1, math.ceil(profile.min_sample / max(s, 1e-9))) for s in once]
        seconds = _rounds(runs, passes, meters, device, profile)
    return [
        Result(
            name=candidate.name,
            group=group,
            shape=dict(shape),
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            seconds=[s * candidate.scale for s in times],
            baseline=baseline,
            extra={
                "timing": "wall",
                **_rate(candidate, times),
                **memory_,
                **meter.per_pass(candidate.scale),
                **candidate.extra,
            },
        )
        for candidate, times, memory_, meter in zip(
            candidates, seconds, memory, meters, strict=True
        )
    ]


def _checked(candidate: Whole) -> Candidate:
    def bind(*inputs: Any) -> Callable[[], Any]:
        run = candidate.bind(*inputs)

        def call() -> Any:
            with _prepared(run):
                # Copied: undo may take it back in place.
                return _copied(run.result(run.run()))

        return call

    return Candidate(
        candidate.name, bind, reference=candidate.reference, tolerance=candidate.tolerance
    )


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    return value


@contextlib.contextmanager
def _prepared(run: Run) -> Iterator[None]:
    run.prepare()
    try:
        yield
    finally:
        run.undo()


def _memory(run: Run, device: torch.device) -> tuple[dict[str, Any], float]:
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        start = time.perf_counter()
        run.run()
        _synchronize(device)
        seconds = time.perf_counter() - start

    with _prepared(run):
        return peak_memory(timed, device), seconds


def _rate(candidate: Whole, times: list[float]) -> dict[str, Any]:
    if candidate.tokens is None:
        return {"tokens_per_second": None}
    return {"tokens_per_second": candidate.tokens / (Spread.of(times).median * candidate.scale)}


def _rounds(
    runs: Sequence[Run],
    passes: Sequence[int],
    meters: Sequence[EnergyMeter],
    device: torch.device,
    profile: Profile,
) -> list[list[float]]:
    def sample(index: int) -> float:
        total = 0.0
        for _ in range(passes[index]):
            with _prepared(runs[index]):
                _synchronize(device)
                with meters[index].metered():
                    start = time.perf_counter()
                    runs[index].run()
                    _synchronize(device)
                    total += time.perf_counter() - start
        return total / passes[index]

    seconds: list[list[float]] = [[] for _ in runs]
    began = time.perf_counter()
    for number in range(profile.rounds):
        # Between rounds, so that no candidate pays for what another left.
        gc.collect()
        order = range(len(runs))
        for i in reversed(order) if number % 2 else order:
            seconds[i].append(sample(i))
        late = time.perf_counter() - began > profile.seconds
        if late and number + 1 >= profile.min_rounds:
            break
    return seconds


@contextlib.contextmanager
def _own_garbage_collection() -> Iterator[None]:
    # None while a pass runs; and what was there before is left out, which is most of the work.
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
