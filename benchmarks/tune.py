"""Rows of the launch table (``kernels/tuning.py``), timed side by side on a GPU.

    python -m benchmarks.tune --kernel shrink_columns expand --json build/bench/tune.json
    python -m benchmarks.tune --kernel expand --layer q_proj gate_proj --no-moments
    python -m benchmarks.tune --kernel shrink_finish --adapter-dtype float32,bfloat16

A row is put into the table for the time of one call of the operator; everything else of the case,
the check against the reference included, is the benchmark suite's (:mod:`benchmarks.kernels`).
The search goes by coordinates: stage 1 varies the block sizes and warps, stage 2 takes the fastest
of them and varies the pipeline's stages and the constant of the module that cuts the work into
programs. Ratios are to the row that the table gives now, "as it is", which is in both stages. What
does not compile, does not fit or is wrong loses its own line only.

Names: M, N, K, R are ``BLOCK_M`` to ``BLOCK_R``, w ``num_warps``, s ``num_stages``, T
``shrink.TWO_PER_SM``, P ``PROGRAMS`` of expand or shrink_columns. These are no part of the
table: they hold for every GPU and shape.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ucan_fast import ops
from ucan_fast.kernels import expand as expand_module
from ucan_fast.kernels import shrink as shrink_module
from ucan_fast.kernels import shrink_columns as shrink_columns_module
from ucan_fast.kernels import tuning

from .costs import Ceilings
from .kernels import expand as expand_suite
from .kernels import shrink as shrink_suite
from .kernels.cases import Bench, LoraCase, name_of
from .measure import (
    Candidate,
    Profile,
    Result,
    Skipped,
    Spread,
    describe_environment,
    described,
    measure,
    ratios,
    write_results,
)
from .roofline import measured_ceilings
from .shapes import LLAMA_2_7B, MODELS, PROJECTIONS

#: Options of a launch and the module's constant, by name.
Row = dict[str, int]

#: No candidate here is heavy enough for the GPU's clock to remember it: nothing settles.
PROFILE = Profile("tune", rounds=15, seconds=3.0, min_sample=3e-3)
BASELINE = "as it is"
SHOWN = 12

#: kernel -> what stage 1 and stage 2 vary; the rest stays as it is.
GRIDS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {
    "shrink": (
        {"BLOCK_M": (32, 64, 128), "BLOCK_K": (32, 64, 128), "num_warps": (4, 8)},
        {"num_stages": (2, 3, 4), "TWO_PER_SM": (264, 528, 1056)},
    ),
    "expand": (
        {"BLOCK_M": (16, 32, 64), "BLOCK_N": (64, 128, 256), "num_warps": (4, 8)},
        {"num_stages": (1, 2, 3, 4, 5), "PROGRAMS": (256, 512, 1024)},
    ),
    "shrink_columns": (
        {"BLOCK_M": (32, 64, 128), "BLOCK_K": (128, 256), "num_warps": (4, 8)},
        {"num_stages": (2, 3), "PROGRAMS": (256, 384, 512)},
    ),
    "shrink_finish": (
        {"ROWS": (16, 32, 64, 128), "num_warps": (2, 4, 8)},
        {"SPLITS": (1, 2, 4, 8)},
    ),
}
#: kernel -> the constant that is tried with its rows.
CONSTANTS = {
    "shrink": (shrink_module, "TWO_PER_SM"),
    "shrink_columns": (shrink_columns_module, "PROGRAMS"),
    "expand": (expand_module, "PROGRAMS"),
}
_LETTERS = {
    **{f"BLOCK_{letter}": letter for letter in "MNKR"},
    "num_warps": "w",
    "num_stages": "s",
    "TWO_PER_SM": "T",
    "PROGRAMS": "P",
}
_DTYPES = {name_of(one): one for one in (torch.float32, torch.bfloat16, torch.float16)}


# Rows


def name_of_row(row: Mapping[str, int]) -> str:
    """``M64 N64 R16 w4 s2 P4096``."""
    return " ".join(f"{_LETTERS.get(key, key)}{value}" for key, value in row.items())


def current_row(kernel: str, key: Hashable, device: torch.device) -> Row:
    """What a launch takes now, the module's constant included."""
    row = tuning.config(kernel, key, device)
    if kernel in CONSTANTS:
        module, constant = CONSTANTS[kernel]
        row[constant] = getattr(module, constant)
    return row


def grid(kernel: str, row: Row) -> list[Row]:
    """Stage 1 around the current row, which is not among them."""
    return [one for one in _varied(row, GRIDS[kernel][0]) if one != row]


def grid_two(kernel: str, best: Row, row: Row) -> list[Row]:
    """Stage 2 around the best of stage 1, itself among them; the current row is not."""
    rows = _varied(best, GRIDS[kernel][1])
    return [one for one in (rows if best in rows else [best, *rows]) if one != row]


def _varied(row: Row, values: Mapping[str, Sequence[int]]) -> list[Row]:
    return [
        row | dict(zip(values, chosen, strict=True))
        for chosen in itertools.product(*values.values())
    ]


@contextlib.contextmanager
def row_set(kernel: str, place: tuple[str, Hashable], row: Row) -> Iterator[None]:
    """The row at this place of the table, and the module's constant, until the block ends."""
    options, module, constant = dict(row), None, ""
    if kernel in CONSTANTS:
        module, constant = CONSTANTS[kernel]
        value = options.pop(constant, getattr(module, constant))
    with contextlib.ExitStack() as stack:
        if module is not None:
            stack.enter_context(_attribute_set(module, constant, value))
        table = tuning.TABLE[kernel]
        before = table.get(place)
        table[place] = options
        try:
            yield
        finally:
            if before is None:
                del table[place]
            else:
                table[place] = before


@contextlib.contextmanager
def _attribute_set(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def recorded_key(kernel: str, call: Callable[[], Any]) -> Hashable | None:
    """The shape class that one call asks the table of this kernel for; None if it does not."""
    asked: list[Hashable] = []
    plain = tuning.config

    def config(name: str, key: Hashable, device: torch.device | None = None) -> Row:
        if name == kernel:
            asked.append(key)
        return plain(name, key, device)

    # expand imported the name.
    with _attribute_set(tuning, "config", config), _attribute_set(expand_module, "config", config):
        call()
    if len(set(asked)) > 1:
        raise ValueError(f"{kernel}: one call asks for several classes, {asked}.")
    return asked[0] if asked else None


# One case


@dataclass(frozen=True)
class Case:
    """What is timed: a layer and the kernel whose rows are varied."""

    kernel: str
    lora: LoraCase
    moments: bool

    def bench(self, device: torch.device) -> Bench:
        """The suite's, of this layer."""
        suite = expand_suite if self.kernel == "expand" else shrink_suite
        name = "expand" if self.kernel == "expand" else "shrink"
        make = getattr(suite, f"{name}_with_moments" if self.moments else name)
        # The suite knows profiles, not single layers.
        with _attribute_set(suite, "lora_cases", lambda *_, **__: [self.lora]):
            (bench,) = make(PROFILE, device)
        return bench


def candidate_of(kernel: str, own: Candidate, name: str, place: Any, row: Row) -> Candidate:
    """The operator's candidate with this row in the table at every call."""

    def bind(*inputs: Any) -> Callable[[], Any]:
        call = own.bind(*inputs)

        def with_row() -> Any:
            # A CUDA graph keeps what was launched: the row is read at the capture only.
            with row_set(kernel, place, row), ops.use_backend("triton"):
                return call()

        return with_row

    # Its passes are those of the current row.
    extra = {"row": row, "class": str(place[1])}
    return replace(own, name=name, bind=bind, passes=None, count_launches=False, extra=extra)


def own_candidate(bench: Bench) -> Candidate:
    """Ours among the suite's."""
    return next(one for one in bench.candidates if one.name == "ucan_fast")


def place_of(case: Case, bench: Bench, device: torch.device) -> tuple[str, Hashable] | None:
    """Where in the table the case's row belongs; None where the kernel is not launched."""
    call = own_candidate(bench).bind(*bench.inputs(0))
    with ops.use_backend("triton"):
        key = recorded_key(case.kernel, call)
    return None if key is None else (tuning.gpu_of(device), key)


def compile_rows(case: Case, place: Any, rows: Sequence[Row], device: torch.device) -> int:
    """One call with every row, for Triton's cache on disk; returns how many went through."""
    bench, done = case.bench(device), 0
    inputs = bench.inputs(0)
    for row in rows:
        # The timing run meets the same error and reports it.
        with contextlib.suppress(Exception):
            candidate_of(case.kernel, own_candidate(bench), "", place, row).bind(*inputs)()
            done += 1
    with contextlib.suppress(Exception):
        torch.cuda.empty_cache()  # the process stays, and the timing needs the room
    return done


def _compile_all(
    pool: Executor | None, workers: int, case: Case, place: Any, rows: list[Row], device: Any
) -> None:
    if pool is None:
        return
    # In turn, so that the slow ones, large blocks, are spread.
    parts = [part for part in (rows[i::workers] for i in range(workers)) if part]
    try:
        pending = [pool.submit(compile_rows, case, place, part, device) for part in parts]
        for one in pending:
            one.result()
    except Exception as error:  # then Triton compiles one by one, while timing
        print(f"note: compiling in parallel broke down: {described(error)}", flush=True)


@dataclass
class Stage:
    """What one call of measure() found; the current row is the first result."""

    title: str
    results: list[Result]
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Result:
        """The fastest by its median."""
        return min(self.results, key=lambda one: Spread.of(one.seconds).median)

    def skipped(self) -> list[Skipped]:
        """The failures, for the file."""
        group, case = self.results[0].group, self.results[0].case
        return [Skipped(group, case, name, why, True) for name, why in self.failures.items()]


def run_stage(
    case: Case,
    bench: Bench,
    place: tuple[str, Hashable],
    rows: Sequence[Row],
    number: int,
    *,
    device: torch.device,
    profile: Profile = PROFILE,
) -> Stage:
    """The current row and these, checked and timed side by side."""
    own, kernel = own_candidate(bench), case.kernel
    named = {BASELINE: current_row(kernel, place[1], device)}
    named |= {name_of_row(row): row for row in rows}
    failures: dict[str, str] = {}
    results = measure(
        [candidate_of(kernel, own, name, place, row) for name, row in named.items()],
        bench.inputs,
        group=f"tune {bench.group} {kernel} stage {number}",
        shape=bench.shape,
        dtype=bench.dtype,
        adapter_dtype=bench.adapter_dtype,
        baseline=BASELINE,
        reference=bench.reference,
        tolerances=bench.tolerances,
        profile=profile,
        failures=failures,
    )
    for result in results:
        result.baseline = BASELINE
    title = f"{kernel} {place}: {bench.group}, {bench.case}: stage {number}, {len(rows)} rows"
    return Stage(title, results, failures)


def table(stage: Stage, ceilings: Ceilings) -> str:
    """The fastest rows and the current one, by median time; then what failed, counted."""
    faster = ratios(stage.results, BASELINE)
    ordered = sorted(stage.results, key=lambda one: Spread.of(one.seconds).median)
    shown = [one for i, one in enumerate(ordered) if i < SHOWN or one.name == BASELINE]
    timing = stage.results[0].extra
    lines = [
        f"{stage.title} ({timing.get('timing')} time, {len(ordered[0].seconds)} rounds)",
        *([f"  not captured: {timing['not_captured']}"] if "not_captured" in timing else []),
        f"  {'µs':>9}  {'q1 - q3':>19}  {'bandwidth':>9}  {'ratio':>6}  row",
    ]
    for one in shown:
        spread = Spread.of(one.seconds)
        of = f"{100 * one.bytes / spread.median / ceilings.bandwidth:.1f} %" if one.bytes else "-"
        quartiles = f"{spread.q1 * 1e6:.2f} - {spread.q3 * 1e6:.2f}"
        name = name_of_row(one.extra["row"])
        name = f"{name}  ({BASELINE})" if one.name == BASELINE else name
        ratio = faster[one.name].median
        lines.append(
            f"  {spread.median * 1e6:9.2f}  {quartiles:>19}  {of:>9}  {ratio:5.3f}x  {name}"
        )
    if len(ordered) > len(shown):
        lines.append(f"  and {len(ordered) - len(shown)} slower ones")
    alike: dict[str, list[str]] = {}
    for name, why in stage.failures.items():
        # A check's text names the case and the candidate.
        alike.setdefault(why.split(f"{name!r} ")[-1][:160], []).append(name)
    for reason, names in sorted(alike.items(), key=lambda item: -len(item[1]))[:6]:
        lines.append(f"  {len(names)} failed, such as {names[0]}: {reason}")
    if len(alike) > 6:
        lines.append(f"  {len(stage.failures)} failed in all")
    return "\n".join(lines)


def as_source(place: tuple[str, Hashable], row: Mapping[str, int]) -> str:
    """The row as it would stand in the table; the module's constant as a comment."""
    constants = {name for _, name in CONSTANTS.values()}
    options = {key: value for key, value in row.items() if key not in constants}
    rest = "".join(f"  # with {key} = {row[key]}" for key in row if key in constants)
    return f"{place!r}: {options!r},{rest}"


def tune(
    case: Case,
    device: torch.device,
    ceilings: Ceilings,
    *,
    pool: Executor | None = None,
    workers: int = 0,
    profile: Profile = PROFILE,
) -> Iterator[Stage]:
    """The stages of one case, each printed before the next begins."""
    bench = case.bench(device)
    if bench.obstacle:
        print(f"{case.kernel}: {bench.case}: {bench.obstacle}.", flush=True)
        return
    place = place_of(case, bench, device)
    if place is None:
        print(f"{case.kernel}: {bench.case}: this kernel is not launched.", flush=True)
        return
    now = current_row(case.kernel, place[1], device)
    best = now
    for number in (1, 2):
        rows = grid(case.kernel, now) if number == 1 else grid_two(case.kernel, best, now)
        began = time.perf_counter()
        _compile_all(pool, workers, case, place, rows, device)
        compiled = time.perf_counter()
        stage = run_stage(case, bench, place, rows, number, device=device, profile=profile)
        print(table(stage, ceilings))
        took = time.perf_counter() - compiled
        print(f"  {compiled - began:.1f} s to compile, {took:.1f} s to measure", flush=True)
        torch.cuda.empty_cache()  # what the stage's graphs held
        best = dict(stage.best.extra["row"])
        yield stage
    print(f"  fastest: {as_source(place, best)}\n", flush=True)


# The command line


def _several(words: Iterable[str], known: Iterable[str], parser: Any, option: str) -> list[str]:
    chosen = [part for word in words for part in word.split(",") if part]
    known = list(known)
    for one in chosen:
        if one not in known:
            parser.error(f"{option}: {one!r} is none of {', '.join(known)}.")
    return list(dict.fromkeys(chosen))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__.split("\n\n")[0],
        epilog="Options that take several values take them with spaces or commas between.",
    )
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--kernel", default=["shrink_columns", "expand"], help=", ".join(GRIDS), **several
    )
    parser.add_argument(
        "--model", default=LLAMA_2_7B.name, choices=[model.name for model in MODELS]
    )
    parser.add_argument("--layer", default=["q_proj"], **several)
    parser.add_argument("--tokens", default=[8192], type=int, nargs="+")
    parser.add_argument("--rank", default=[16], type=int, nargs="+")
    parser.add_argument("--dtype", default=["bfloat16"], **several)
    parser.add_argument("--adapter-dtype", default=["float32"], **several)
    parser.add_argument(
        "--moments", action=argparse.BooleanOptionalAction, default=True, help="default: with"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(14, max((os.cpu_count() or 1) - 1, 0)),
        help="processes that compile (default: %(default)s); 0: compile one by one while timing",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all rows there")
    return parser


def cases_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    """Every combination of the options."""
    kernels = _several(options.kernel, GRIDS, parser, "--kernel")
    layers = _several(options.layer, PROJECTIONS, parser, "--layer")
    dtypes = _several(options.dtype, _DTYPES, parser, "--dtype")
    adapters = _several(options.adapter_dtype, _DTYPES, parser, "--adapter-dtype")
    model = next(one for one in MODELS if one.name == options.model)
    every = itertools.product(kernels, layers, options.tokens, options.rank, dtypes, adapters)
    return [
        Case(
            kernel,
            LoraCase(model, layer, tokens, rank, _DTYPES[dtype], _DTYPES[adapter]),
            options.moments,
        )
        for kernel, layer, tokens, rank, dtype, adapter in every
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 where a case could not be measured, 2 without a GPU."""
    parser = _parser()
    options = parser.parse_args(arguments)
    cases = cases_of(options, parser)
    if not torch.cuda.is_available():
        print("error: rows are measured on a CUDA GPU, and there is none here.", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = measured_ceilings()
    environment = {**describe_environment(), "ceilings": ceilings.to_json()}
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = shlex.join(["python", "-m", "benchmarks.tune", *given])
    print(
        f"{environment['hardware']} ({tuning.gpu_of(device)}), torch {environment['torch']}, "
        f"Triton {environment['triton']}, commit {environment['commit']}, copies at "
        f"{ceilings.bandwidth * 1e-12:.3f} TB/s\n",
        flush=True,
    )
    results: list[Result] = []
    skipped: list[Skipped] = []
    broken = False
    with _pool(options.workers) as pool:
        for case in cases:
            try:
                for stage in tune(case, device, ceilings, pool=pool, workers=options.workers):
                    results += stage.results
                    skipped += stage.skipped()
                    if options.json:
                        write_results(
                            options.json,
                            results,
                            command,
                            skipped=skipped,
                            profile=PROFILE,
                            environment=environment,
                        )
            except Exception as error:  # the other cases are still to be had
                print(f"FAILED: {case}: {described(error)}", flush=True)
                broken = True
    return 1 if broken or not results else 0


def _pool(workers: int) -> contextlib.AbstractContextManager[Executor | None]:
    if workers < 1:
        return contextlib.nullcontext()
    return ProcessPoolExecutor(
        workers,
        # CUDA does not survive a fork.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )


if __name__ == "__main__":
    sys.exit(main())
