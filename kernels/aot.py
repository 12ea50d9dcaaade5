"""Compiles every kernel for sm_80, sm_90 and sm_100, on any machine, and judges the machine code.

``python -m ucan_fast.kernels.aot`` needs no GPU: Triton's wheel brings the assembler and the
disassembler. It prints one row per kernel, case and architecture as they are compiled and exits
with 1, the reasons below the table, if any of these fails:

- it compiles;
- no stack, no local memory, no spilled registers;
- shared memory (and tensor memory, sm_100) within what one block may have;
- tensor-core instructions where the case has a dot, 16-byte global loads where it should;
- every ``*_kernel`` has a case.

It says nothing about results, races or speed. All cases take tens of minutes on two cores;
``--cover`` compiles a choice (see :func:`covering`) in a few, and says how many it left out.
Interrupted, it writes down the rows that it has and exits with 130.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from . import obstacle

#: Files of this package with kernels, the slowest to compile first.
MODULES = (
    "fused_linear",
    "shrink",
    "shrink_columns",
    "shrink_finish",
    "expand",
    "moments",
    "scores",
    "attenuate",
    "common",
)

#: Shared memory that one block may have, bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: Columns of tensor memory of an SM (only sm_100 has it).
TENSOR_MEMORY_LIMIT = 512

_TENSOR_CORE = re.compile(r"\b((?:H|HG|QG|IG|D|UTC[A-Z]*)MMA)\b")
# A plain load, an asynchronous copy to shared memory, a TMA copy; plain and TMA stores.
_WIDE_LOAD = re.compile(r"\bLDG\S*\.(?:128|256)\b|\bLDGSTS\S*\.128\b|\bUTMALDG\b|\bUBLKCP\b")
_WIDE_STORE = re.compile(r"\bSTG\S*\.(?:128|256)\b|\bUTMASTG\b")
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")


@dataclass
class Row:
    """The machine code of one case on one architecture; ``problems`` should be empty."""

    module: str
    kernel: str
    case: str
    arch: int
    registers: int | None = None
    stack: int | None = None
    shared: int | None = None
    tensor_core: dict[str, int] = field(default_factory=dict)
    wide_loads: int | None = None
    wide_stores: int | None = None
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def check(case: Any, module: str, arch: int) -> Row:
    """Compiles one ``CompileCase`` for one architecture (90 is sm_90). Never raises."""
    row = Row(module, case.kernel.__name__, case.name, arch)
    start = time.perf_counter()
    try:
        compiled = _compile(case, arch)
        _read_machine_code(compiled.asm["cubin"], row)
        row.shared = compiled.metadata.shared
        row.problems += _problems(case, row, getattr(compiled.metadata, "tmem_size", 0) or 0)
    except Exception as error:  # whatever the compiler raises is the finding
        row.problems.append(f"{type(error).__name__}: {_last_line(error)}")
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def _compile(case: Any, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    for what, given in (
        ("signature", set(case.signature) ^ set(names)),
        ("constants", set(case.constants) ^ {n for n in names if _is_constant(case, n)}),
        ("divisible", set(case.divisible) - set(names)),
    ):
        if given:
            raise ValueError(f"{what} and the kernel's arguments disagree on {sorted(given)}")
    source = ASTSource(
        case.kernel,
        {name: case.signature[name] for name in names},
        {(names.index(name),): value for name, value in case.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _is_constant(case: Any, name: str) -> bool:
    return case.signature.get(name) == "constexpr"


def _read_machine_code(cubin: bytes, row: Row) -> None:
    """Registers and stack, and which instructions there are."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tools = triton.knobs.nvidia
        usage = _run(tools.cuobjdump.path, "--dump-resource-usage", file.name)
        code = _run(tools.nvdisasm.path, "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None or not code:
        raise RuntimeError(f"cuobjdump's answer cannot be read: {usage[-200:]!r}")
    row.registers, row.stack, local = map(int, found.groups())
    if local:
        row.problems.append(f"{local} bytes of local memory")
    if spills := len(_LOCAL.findall(code)):
        row.problems.append(f"{spills} loads and stores of local memory: registers are spilled")
    for name in _TENSOR_CORE.findall(code):
        row.tensor_core[name] = row.tensor_core.get(name, 0) + 1
    row.wide_loads = len(_WIDE_LOAD.findall(code))
    row.wide_stores = len(_WIDE_STORE.findall(code))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _problems(case: Any, row: Row, tensor_memory: int) -> list[str]:
    problems = []
    if row.stack:
        problems.append(f"{row.stack} bytes of stack")
    if row.shared > SHARED_LIMIT[row.arch]:
        limit = SHARED_LIMIT[row.arch] // 1024
        problems.append(f"{row.shared / 1024:.1f} KiB of shared memory, the limit is {limit}")
    if tensor_memory > TENSOR_MEMORY_LIMIT:
        problems.append(f"{tensor_memory} columns of tensor memory of {TENSOR_MEMORY_LIMIT}")
    if case.dot and not row.tensor_core:
        problems.append("a dot without tensor-core instructions")
    if case.wide_loads and not row.wide_loads:
        problems.append("no 16-byte global loads")
    return problems


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""


def _load(name: str) -> Any:
    return importlib.import_module(f"{__package__}.{name}" if name in MODULES else name)


def _cases(module: Any) -> list[Any]:
    return list(module.compile_cases())


def _without_case(module: Any) -> list[str]:
    """Kernels of the file that no case compiles."""
    from triton import JITFunction

    covered = {case.kernel.__name__ for case in _cases(module)}
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel") and name not in covered
        if value.fn.__module__ == module.__name__
    ]


#: Module, index of the case, architecture.
Task = tuple[str, int, int]


def _task(task: Task) -> Row:
    name, index, arch = task
    return check(_cases(_load(name))[index], name, arch)


def covering(cases: Sequence[Any], archs: Sequence[int]) -> list[tuple[int, int]]:
    """Indices and architectures such that every pair of properties of a case occurs.

    A property is one argument's type or constant, a launch option, or the architecture: each
    value meets every value of every other property that it meets in the whole list, on at least
    one architecture, and each is compiled for every architecture. Greedy, so always the same.
    """
    wanted: dict[tuple[int, int], set[Any]] = {}
    for index, case in enumerate(cases):
        properties = sorted(
            [
                *(f"{name}: {kind}" for name, kind in case.signature.items()),
                *(f"{name} = {value}" for name, value in case.constants.items()),
                *(f"{name} is aligned" for name in case.divisible),
                f"{case.num_warps} warps",
                f"{case.num_stages} stages",
            ]
        )
        for arch in set(archs) & set(case.capabilities):
            values = [case.kernel.__name__, f"sm_{arch}", *properties]
            wanted[index, arch] = set(itertools.combinations(values, 2))
    chosen = []
    missing = set().union(*wanted.values())
    while missing:
        best = max(wanted, key=lambda item: (len(wanted[item] & missing), -item[0], -item[1]))
        chosen.append(best)
        missing -= wanted.pop(best)
    return sorted(chosen)


def planned(
    modules: Sequence[str], archs: Sequence[int], part: str | None = None, cover: bool = False
) -> tuple[list[Row], list[Task], int]:
    """What is to be compiled of the modules; ``part`` picks cases by their name.

    Returns the rows of what cannot be, the tasks, and how many more there are without ``cover``.
    """
    rows, tasks, left_out = [], [], 0
    for name in modules:
        try:
            module = _load(name)
            cases = _cases(module)
            missing = _without_case(module)
        except Exception as error:
            problem = f"{type(error).__name__}: {_last_line(error)}"
            rows.append(Row(name, "", "import and compile_cases()", 0, problems=[problem]))
            continue
        rows += [Row(name, kernel, "", 0, problems=["no compile case"]) for kernel in missing]
        every = [
            (index, arch)
            for index, case in enumerate(cases)
            if part is None or part in case.name
            for arch in case.capabilities
            if arch in archs
        ]
        chosen = every
        if cover:
            indices = sorted({index for index, _ in every})
            picked = covering([cases[index] for index in indices], archs)
            chosen = [(indices[position], arch) for position, arch in picked]
        left_out += len(every) - len(chosen)
        tasks += [(name, index, arch) for index, arch in chosen]
    return rows, tasks, left_out


def compiled(tasks: Sequence[Task], jobs: int) -> Iterator[Row]:
    """The rows of the tasks in their order, whichever ends first, each as soon as it is there."""
    if jobs <= 1 or len(tasks) <= 1:
        yield from map(_task, tasks)
        return
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(tasks)), _context()) as pool:
        yield from pool.map(_task, tasks)


def _context() -> Any:
    # Forked workers start with torch and Triton imported; no thread runs yet that a fork could
    # leave behind.
    fork = "fork" in multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("fork" if fork else "spawn")


_HEADER = (
    *("kernel", "case", "arch", "regs", "stack", "shared KiB", "tensor cores"),
    *("16 B loads", "16 B stores", "verdict"),
)
_NUMBERS = {3, 4, 5, 7, 8}


def widths(rows: Sequence[Row], tasks: Sequence[Task]) -> list[int]:
    """Of the table's columns, before anything is compiled: names are known, numbers are short."""
    cases = {name: _cases(_load(name)) for name in {name for name, _, _ in tasks}}
    named = [
        Row(name, cases[name][index].kernel.__name__, cases[name][index].name, arch)
        for name, index, arch in tasks
    ]
    lines = [_HEADER, *(_cells(row) for row in (*rows, *named))]
    found = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    found[6] = max(found[6], len("UTCHMMAx999"))
    return found


def line(cells: Sequence[str], columns: Sequence[int]) -> str:
    """One line of the table."""
    return "  ".join(
        cell.rjust(columns[i]) if i in _NUMBERS else cell.ljust(columns[i])
        for i, cell in enumerate(cells)
    ).rstrip()


def _cells(row: Row) -> list[str]:
    known = row.registers is not None
    cores = " ".join(f"{name}x{count}" for name, count in sorted(row.tensor_core.items()))
    return [
        f"{row.module}.{row.kernel}" if row.kernel else row.module,
        row.case,
        f"sm_{row.arch}" if row.arch else "-",
        str(row.registers) if known else "-",
        str(row.stack) if known else "-",
        f"{row.shared / 1024:.1f}" if row.shared is not None else "-",
        cores or "-",
        str(row.wide_loads) if known else "-",
        str(row.wide_stores) if known else "-",
        "FAILED" if row.problems else "ok",
    ]


def summary(rows: Sequence[Row]) -> str:
    """The reasons of those that failed, and how many they are."""
    failed = [row for row in rows if row.problems]
    text = [
        f"FAILED {row.module}.{row.kernel} [{row.case}] sm_{row.arch}: {problem}"
        for row in failed
        for problem in row.problems
    ]
    return "\n".join([*text, f"{len(rows)} rows, {len(failed)} failed"])


def main(argv: Sequence[str] | None = None) -> int:
    """0: all is well; 1: something failed; 2: nothing could be checked; 130: interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m ucan_fast.kernels.aot",
        description="Compile every kernel for every architecture it ships for; no GPU is needed.",
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=sorted(SHARED_LIMIT),
        default=sorted(SHARED_LIMIT),
        help="compute capabilities times ten (default: all)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        default=MODULES,
        help=f"of {', '.join(MODULES)}, or any importable module with compile_cases()",
    )
    parser.add_argument("--case", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument(
        "--cover",
        action="store_true",
        help="not all cases: a choice in which every pair of properties that occurs occurs",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args(argv)

    reason = obstacle("cuda")
    if reason is None and _interpreted():
        reason = (
            "TRITON_INTERPRET is set, so the kernels are interpreted functions that cannot be "
            "compiled; unset it"
        )
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    import triton

    start = time.perf_counter()
    rows, tasks, left_out = planned(args.only, args.arch, args.case, args.cover)
    if not rows and not tasks:
        print("error: no case has that name and architecture", file=sys.stderr)
        return 2
    wanted = len(rows) + len(tasks)
    columns = widths(rows, tasks)
    for cells in (_HEADER, *map(_cells, rows)):
        print(line(cells, columns), flush=True)
    interrupted = False
    try:
        for row in compiled(tasks, args.jobs):
            rows.append(row)
            print(line(_cells(row), columns), flush=True)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        # In any case: what was compiled until then need not be compiled again.
        if args.json:
            document = {
                "triton": triton.__version__,
                "left_out": left_out,
                "missing": wanted - len(rows),
                "rows": [asdict(row) for row in rows],
            }
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=1)
    print(summary(rows))
    if left_out:
        print(f"{left_out} more rows without --cover")
    print(f"Triton {triton.__version__}, {time.perf_counter() - start:.0f} s")
    if interrupted:
        print(f"error: interrupted; {wanted - len(rows)} rows are missing", file=sys.stderr)
        return 130
    return int(any(row.problems for row in rows))


def _interpreted() -> bool:
    from .common import INTERPRET

    return INTERPRET


if __name__ == "__main__":
    sys.exit(main())
