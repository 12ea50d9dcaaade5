"""The compile gate: it passes for what is shipped, and fails for what it is there to catch.

Always in a process of its own: this one's kernels may be interpreted functions.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from ucan_fast.kernels import aot

BAD_KERNELS = """
    import triton
    import triton.language as tl
    from ucan_fast.kernels.common import CompileCase


    @triton.jit
    def copy_kernel(x, y, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        tl.store(y + i, tl.load(x + i))


    @triton.jit
    def spill_kernel(x, y, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        h = tl.load(x + i)
        tl.store(y + i, h / tl.sum(h))


    @triton.jit
    def dot_kernel(x, y, SIZE: tl.constexpr, STEPS: tl.constexpr):
        i = tl.arange(0, SIZE)
        at = i[:, None] * SIZE + i[None, :]
        total = tl.zeros([SIZE, SIZE], dtype=tl.float32)
        for step in range(STEPS):
            tile = tl.load(x + step * SIZE * SIZE + at)
            total = tl.dot(tile, tile, total, input_precision="ieee")
        tl.store(y + at, total)


    @triton.jit
    def wrong_kernel(x, y, SIZE: tl.constexpr):
        tl.store(y + tl.arange(0, SIZE), no_such_name)


    @triton.jit
    def forgotten_kernel(x, y):
        tl.store(y, tl.load(x))


    def case(name, kernel, size, dtype="fp32", signature=None, constants=None, **options):
        names = ("x", "y")
        constants = {"SIZE": size, **(constants or {})}
        signature = {**dict.fromkeys(names, "*" + dtype), **dict.fromkeys(constants, "constexpr")}
        return CompileCase(name, kernel, signature, constants, names, **options)


    def compile_cases():
        steps = {"STEPS": 8}
        return [
            case("good", copy_kernel, 1024),
            case("good dot", dot_kernel, 64, "bf16", constants=steps, dot=True),
            case("spills", spill_kernel, 32 * 512, num_warps=1),
            case("no tensor cores", dot_kernel, 32, constants=steps, dot=True),
            case("narrow", copy_kernel, 32, num_warps=1),
            case("narrow on purpose", copy_kernel, 32, num_warps=1, wide_loads=False),
            case("shared", dot_kernel, 128, "bf16", constants=steps, num_warps=8, num_stages=8),
            case("wrong", wrong_kernel, 32),
            case("misnamed", copy_kernel, 1024, constants={"BLOCK": 1}),
        ]
"""

EXPECTED = {
    "good": None,
    "good dot": None,
    "spills": "bytes of stack",
    "no tensor cores": "a dot without tensor-core instructions",
    "narrow": "no 16-byte global loads",
    "narrow on purpose": None,
    "shared": "KiB of shared memory, the limit is",
    "wrong": "no_such_name",
    "misnamed": "disagree on ['BLOCK']",
}


def gate(*arguments: str, path: str = "", code: str | None = None, **environment: str):
    """Runs the gate as users do; Triton's interpreter is off unless the environment says so."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if path:
        clean["PYTHONPATH"] = os.pathsep.join(filter(None, [path, clean.get("PYTHONPATH")]))
    start = ["-m", "ucan_fast.kernels.aot"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.slow
def test_every_shipped_kernel_on_every_architecture(tmp_path):
    """All kernels and every pair of their properties; all cases together take far longer."""
    file = tmp_path / "gate.json"
    result = gate("--cover", "--json", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {row["module"] for row in rows} == set(aot.MODULES)
    cores = {
        arch: {name for r in rows if r["arch"] == arch for name in r["tensor_core"]}
        for arch in (80, 90, 100)
    }
    assert cores[80] == {"HMMA"}
    assert "HGMMA" in cores[90]
    assert "UTCHMMA" in cores[100]
    for row in rows:
        assert row["stack"] == 0
        assert 0 < row["registers"] <= 255
        assert row["kernel"] in result.stdout
    assert f"{len(rows)} rows, 0 failed" in result.stdout


def test_each_kind_of_failure_is_found_and_named(tmp_path):
    (tmp_path / "bad_kernels.py").write_text(textwrap.dedent(BAD_KERNELS))
    file = tmp_path / "gate.json"
    names = ("bad_kernels", "no_such_kernels")
    result = gate("--only", *names, "--arch", "90", "--json", str(file), path=str(tmp_path))
    assert result.returncode == 1, result.stdout + result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert set(EXPECTED) <= {row["case"] for row in rows}
    assert "forgotten_kernel" in {row["kernel"] for row in rows}
    for row in rows:
        problems = "; ".join(row["problems"])
        if row["module"] == "no_such_kernels":
            assert "ModuleNotFoundError" in problems
        elif row["kernel"] == "forgotten_kernel":
            assert problems == "no compile case"
        elif EXPECTED[row["case"]] is None:
            assert not problems, (row["case"], problems)
        else:
            assert EXPECTED[row["case"]] in problems, row
            assert f"[{row['case']}] sm_90: {row['problems'][0]}" in result.stdout
    spilled = next(row for row in rows if row["case"] == "spills")
    assert any("registers are spilled" in problem for problem in spilled["problems"])


def test_selection_by_name_case_and_architecture(tmp_path):
    file = tmp_path / "gate.json"
    result = gate(
        "--only", "common", "--arch", "90", "--case", "1 group, 64 slots", "--json", str(file)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["module"], row["case"], row["arch"]) == (
        "common",
        "1 group, 64 slots at a time",
        90,
    )
    assert row["shared"] is not None
    assert row["wide_loads"] > 0
    result = gate("--only", "common", "--case", "no such case")
    assert result.returncode == 2
    assert "no case has that name" in result.stderr


def test_an_interrupted_run_keeps_the_rows_that_it_has(tmp_path):
    """The second case interrupts, as Ctrl-C or a time limit would."""
    code = """
import sys
from ucan_fast.kernels import aot
check, seen = aot.check, []
def interrupted(*case):
    seen.append(case)
    if len(seen) == 2:
        raise KeyboardInterrupt
    return check(*case)
aot.check = interrupted
sys.exit(aot.main())
"""
    file = tmp_path / "gate.json"
    wanted = ("--only", "common", "--arch", "90", "--jobs", "1", "--json", str(file))
    result = gate(*wanted, code=code)
    assert result.returncode == 130, result.stdout + result.stderr
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 1
    assert found["missing"] >= 1
    assert f"interrupted; {found['missing']} rows are missing" in result.stderr
    assert "1 rows, 0 failed" in result.stdout
    for row in found["rows"]:
        assert f"{row['module']}.{row['kernel']}" in result.stdout


def test_parts_of_many_ranks_are_summed_outside_of_the_tensor_cores():
    """These cut sums off, and the interpreter rounds: no test of values on a CPU would notice."""
    code = """
        import re
        from ucan_fast.kernels import aot, expand

        name = "bf16 y, fp32 z, fp32 B, r > 64, moments"
        (case,) = [case for case in expand.compile_cases() if case.name == name]
        text = aot._compile(case, 90).asm["ttgir"]
        print(*re.findall(r"tt(?:ng)?\\.(?:dot|warp_group_dot) \\S+, \\S+, (%\\w+)", text))
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    first, *later = found.stdout.splitlines()[-1].split()
    assert first.startswith("%cst"), "the first dot of a part starts at zero"
    assert len(later) == 2, "z low, b low, both high"


def test_cover_leaves_out_only_what_repeats_pairs():
    def case(**constants):
        return SimpleNamespace(
            kernel=SimpleNamespace(__name__="k"),
            signature={"x": "*bf16"},
            constants=constants,
            divisible=("x",),
            num_warps=4,
            num_stages=3,
            capabilities=(80, 90),
        )

    values = list(itertools.product((1, 2), (1, 2), (1, 2)))
    cases = [case(a=a, b=b, c=c) for a, b, c in values]
    chosen = aot.covering(cases, (80, 90, 100))
    assert len(chosen) < 2 * len(cases)
    full = [(*value, arch) for value in values for arch in (80, 90)]
    kept = [(*values[index], arch) for index, arch in chosen]
    for first, second in itertools.combinations(range(4), 2):
        pairs = {(row[first], row[second]) for row in full}
        assert {(row[first], row[second]) for row in kept} == pairs
    assert aot.covering([case(a=1)], (80, 90, 100)) == [(0, 80), (0, 90)]


def test_it_refuses_to_run_on_interpreted_functions():
    result = gate("--only", "common", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr


def test_it_says_that_triton_is_missing():
    code = """
import sys
sys.modules["triton"] = None
from ucan_fast.kernels import aot
sys.exit(aot.main())
"""
    result = gate(code=code)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Triton is not installed" in result.stderr
