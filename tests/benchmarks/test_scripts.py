"""What make and ci/gpu.sh start, as far as that goes without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import __main__ as both
from benchmarks import measure as m
from benchmarks import roofline, targets

from .synthetic import environment


def _gpu_results(folder: Path, hurry: float) -> None:
    # The predicted times, ours divided by `hurry`, as if an H100 had been measured.
    found = roofline.predict("h100")
    results = []
    for row in found["results"]:
        seconds = row["seconds"]["median"]
        if row["candidate"].startswith("ucan_fast") and "reference" not in row["candidate"]:
            seconds /= hurry
        results.append(
            m.Result(
                row["candidate"],
                row["group"],
                row["shape"],
                row["dtype"],
                row["adapter_dtype"],
                [seconds] * 3,
                bytes=row["bytes"],
                baseline=row["baseline"],
                extra={"launches": row["extra"]["launches"]},
            )
        )
    ceilings = found["environment"]["ceilings"]
    m.write_results(
        folder / "bench-kernels.json",
        results,
        "ci/gpu.sh bench",
        profile=m.PROFILES["full"],
        environment=environment("cuda", ceilings=ceilings),
    )


def _run(folder: Path, *steps: str, **more: str) -> subprocess.CompletedProcess:
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'A GPU, 1.0'\n")
    (tools / "nvidia-smi").chmod(0o755)
    settings = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(m.ROOT / "ci" / "gpu.sh"), *steps],
        env={**os.environ, **settings, "OUT": str(folder), **more},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="ci/gpu.sh needs bash")
def test_the_gpu_script_ends_with_the_targets_and_fails_row_by_row(tmp_path):
    ran = _run(tmp_path, "targets")
    assert ran.returncode == 1
    assert "run the step bench first" in ran.stdout
    _gpu_results(tmp_path, hurry=0.5)
    ran = _run(tmp_path, "targets")
    assert ran.returncode == 1
    assert "targets      FAILED (exit 1)" in ran.stdout
    assert "FAIL: forward with moments against PEFT + hooks" in ran.stdout
    assert "pass: attenuate_, 448 matrices: launches" in ran.stdout
    assert (tmp_path / "summary.json").exists()
    _gpu_results(tmp_path, hurry=2.0)
    ran = _run(tmp_path, "targets")
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.rstrip().endswith("0 of 13 judged targets fall short")


#: Stands in for python: the benchmarks hang until they are interrupted, the rest works.
_HANGS = """#!/bin/bash
case " $* " in
*" benchmarks/kernels "*) trap 'echo interrupted; exit 2' INT; sleep 60 & wait ;;
*) exec {python} "$@" ;;
esac
"""


@pytest.mark.skipif(shutil.which("timeout") is None, reason="ci/gpu.sh needs timeout")
def test_a_step_that_runs_over_is_stopped_and_the_next_one_goes_on(tmp_path):
    python = tmp_path / "python"
    python.write_text(_HANGS.format(python=sys.executable))
    python.chmod(0o755)
    _gpu_results(tmp_path, hurry=2.0)
    (tmp_path / "bench.xml").write_text("of an earlier run")
    began = time.monotonic()
    ran = _run(
        tmp_path, "bench", "targets", PYTHON=str(python), LIMIT_BENCH="5", LIMIT_TARGETS="120"
    )
    assert time.monotonic() - began < 55
    assert ran.returncode == 1
    assert "bench        FAILED (stopped after 5 s)" in ran.stdout
    assert "targets      passed" in ran.stdout, ran.stdout + ran.stderr
    assert "0 of 13 judged targets fall short" in ran.stdout
    assert not (tmp_path / "bench.xml").exists()
    log = (tmp_path / "bench.log").read_text()
    # It had the chance to write down what it has.
    assert log.splitlines() == [
        "interrupted",
        "ci/gpu.sh: stopped after 5 s; LIMIT_BENCH grants more",
    ]
    ran = _run(tmp_path, "targets", LIMIT_BENCH="0")
    assert ran.returncode == 1
    assert "LIMIT_BENCH must be a whole number of seconds, not '0'" in ran.stdout


#: Stands in for compute-sanitizer: notes the allocator's setting, lists what would run.
_SANITIZER = """#!/bin/bash
echo "$2: caching off: ${PYTORCH_NO_CUDA_MEMORY_CACHING:-no}"
shift 6
exec "$@" --collect-only -q
"""


@pytest.mark.skipif(shutil.which("timeout") is None, reason="ci/gpu.sh needs timeout")
def test_memcheck_runs_without_the_caching_allocator_and_without_graphs(tmp_path):
    """An overrun inside one of its blocks is none to memcheck; a capture needs it."""
    (tmp_path / "tools").mkdir()
    sanitizer = tmp_path / "tools" / "compute-sanitizer"
    sanitizer.write_text(_SANITIZER)
    sanitizer.chmod(0o755)
    limits = {"LIMIT_MEMCHECK": "120", "LIMIT_RACECHECK": "120"}
    ran = _run(tmp_path, "memcheck", "racecheck", **limits)
    assert ran.stdout.count("memcheck leaves out the tests of CUDA graphs") == 1
    memcheck, racecheck = (
        (tmp_path / f"{tool}.log").read_text() for tool in ("memcheck", "racecheck")
    )
    assert "memcheck: caching off: 1" in memcheck
    assert "racecheck: caching off: no" in racecheck

    def listed(log: str) -> set[str]:
        return {line for line in log.splitlines() if "::test_" in line}

    left_out = listed(racecheck) - listed(memcheck)
    assert [name.split("::")[1] for name in left_out] == ["test_cuda_graph_of_attenuate"]
    assert not listed(memcheck) - listed(racecheck)
    for kernel in ("attenuate_equals", "small_kernels", "small_fused_linear", "small_scores"):
        assert f"::test_{kernel}" in memcheck
    assert "memcheck leaves out" not in _run(tmp_path, "racecheck", **limits).stdout


def test_all_default_steps_end_within_ten_minutes():
    script = (m.ROOT / "ci" / "gpu.sh").read_text()
    limits = {name: int(value) for name, value in re.findall(r"\[(\w+)\]=(\d+)", script)}
    (steps,) = re.findall(r'wanted=" \$\{\*:-(.*)\} "', script)
    known = set(re.findall(r"^step (\w+) ", script, re.M))
    assert set(limits) == known | {"aot", "memcheck", "racecheck"}
    assert set(steps.split()) == set(limits) - {"bench_full"}
    (grace,) = re.findall(r"--kill-after=(\d+)", script)
    # The summary imports torch.
    assert sum(limits[name] for name in steps.split()) + int(grace) + 20 <= 600


@pytest.mark.parametrize(
    ("log", "result"),
    [
        ("========= Error: Device not supported. Please refer to\n", "refused by the driver"),
        ("========= ERROR SUMMARY: 2 errors\nSKIPPED: not supported here\n", "FAILED (exit 9)"),
        (
            "========= Warning: Unable to read symbols\n"
            "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n",
            "FAILED (exit 9)",
        ),
        ("FAILED test_gpu.py::test_x - permission\n========= ERROR SUMMARY: 0 errors\n", "FAILED"),
    ],
)
def test_what_a_sanitizer_found_is_not_taken_for_a_refusal(tmp_path, log, result):
    for tool in ("memcheck", "racecheck"):
        (tmp_path / f"{tool}.log").write_text(log)
    (tmp_path / "steps.tsv").write_text("memcheck\t9\t1\nracecheck\t9\t1\n")
    ran = subprocess.run(
        [sys.executable, str(m.ROOT / "ci" / "gpu_summary.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.count(result) == 2, ran.stdout + ran.stderr
    assert ran.returncode == (0 if result.startswith("refused") else 1)


def test_both_suites_write_where_the_targets_read(monkeypatch, tmp_path, capsys):
    started: list[list[str]] = []

    def run(command, **_):
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    judged: list[list[str]] = []
    monkeypatch.setattr(both.subprocess, "run", run)
    monkeypatch.setattr(targets, "main", lambda files: judged.append(files) or 0)
    assert both.main(["--profile", "quick"]) == 0
    assert [command[command.index("--profile") + 1] for command in started] == ["quick"] * 2
    written = [str(m.ROOT / command[command.index("--json") + 1]) for command in started]
    assert judged == [written]
    assert [Path(path).parent for path in written] == [m.ROOT / "build" / "bench"] * 2
    assert both.main(["--profile", "quick", "--save"]) == 0
    assert all("benchmarks/results" in path for path in judged[1])

    monkeypatch.setattr(targets, "main", lambda files: 1)
    assert both.main([]) == 1
    monkeypatch.setattr(
        both.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3)
    )
    monkeypatch.setattr(targets, "main", lambda files: pytest.fail("judged after a failed suite"))
    assert both.main([]) == 1
    assert "failed (3)" in capsys.readouterr().err
