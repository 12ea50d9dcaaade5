"""What make and ci/gpu.sh start, as far as that goes without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
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


#: Answers as for an H100.
_SMI = """#!/bin/sh
case "$*" in *compute_cap*) echo 9.0 ;; *) echo 'A GPU, 1.0' ;; esac
"""


def _tool(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def _run(
    folder: Path, *steps: str, root: Path = m.ROOT, before=None, **more: str
) -> subprocess.CompletedProcess:
    _tool(folder / "tools" / "nvidia-smi", _SMI)
    settings = {
        "PATH": f"{folder / 'tools'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OUT": str(folder / "out"),
        "LOGS": str(folder / "logs"),
    }
    return subprocess.run(
        ["bash", str(root / "ci" / "gpu.sh"), *steps],
        env={**os.environ, **settings, **more},
        preexec_fn=before,
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
    _gpu_results(tmp_path / "out", hurry=0.5)
    ran = _run(tmp_path, "targets")
    assert ran.returncode == 1
    assert "targets      FAILED (exit 1)" in ran.stdout
    assert "FAIL: forward with moments against PEFT + hooks" in ran.stdout
    assert "pass: attenuate_, 448 matrices: launches" in ran.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "\n".join(summary["table"]) in ran.stdout
    assert "FAIL: forward with moments against PEFT + hooks" in "\n".join(summary["table"])
    _gpu_results(tmp_path / "out", hurry=2.0)
    ran = _run(tmp_path, "targets")
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.rstrip().endswith("0 of 14 judged targets fall short")


#: Stands in for python: the benchmarks hang until they are interrupted, the rest works.
_HANGS = """#!/bin/bash
case " $* " in
*" benchmarks/kernels "*) trap 'echo interrupted; exit 2' INT; sleep 60 & wait ;;
*) exec {python} "$@" ;;
esac
"""


@pytest.mark.skipif(shutil.which("timeout") is None, reason="ci/gpu.sh needs timeout")
def test_a_step_that_runs_over_is_stopped_and_the_next_one_goes_on(tmp_path):
    python = _tool(tmp_path / "python", _HANGS.format(python=sys.executable))
    _gpu_results(tmp_path / "out", hurry=2.0)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "bench.xml").write_text("of an earlier run")
    began = time.monotonic()
    limits = {"LIMIT_BENCH": "5", "LIMIT_TARGETS": "120"}
    # As a shell starts what it puts in the background: it does not hear SIGINT.
    deaf = {"before": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    ran = _run(tmp_path, "bench", "targets", PYTHON=str(python), **limits, **deaf)
    assert time.monotonic() - began < 55
    assert ran.returncode == 1
    assert "bench        FAILED (stopped after 5 s)" in ran.stdout
    assert "targets      passed" in ran.stdout, ran.stdout + ran.stderr
    assert "0 of 14 judged targets fall short" in ran.stdout
    assert not (tmp_path / "logs" / "bench.xml").exists()
    log = (tmp_path / "logs" / "bench.log").read_text()
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
echo "$5 $6"
shift 6
exec "$@" --collect-only -q
"""


@pytest.mark.skipif(shutil.which("timeout") is None, reason="ci/gpu.sh needs timeout")
def test_memcheck_runs_without_the_caching_allocator_and_without_graphs(tmp_path):
    """An overrun inside one of its blocks is none to memcheck; a capture needs it."""
    # Not on PATH, as where only the toolkit was installed.
    _tool(tmp_path / "cuda" / "bin" / "compute-sanitizer", _SANITIZER)
    limits = {"LIMIT_MEMCHECK": "120", "LIMIT_RACECHECK": "120"}
    limits["CUDA_HOME"] = str(tmp_path / "cuda")
    ran = _run(tmp_path, "memcheck", "racecheck", **limits)
    assert ran.stdout.count("memcheck leaves out the tests of CUDA graphs") == 1
    memcheck, racecheck = (
        (tmp_path / "logs" / f"{tool}.log").read_text() for tool in ("memcheck", "racecheck")
    )
    assert "memcheck: caching off: 1" in memcheck
    assert "racecheck: caching off: no" in racecheck
    # The assembler and the like, which Triton starts, are not what is looked at.
    assert "--target-processes application-only" in memcheck

    def listed(log: str) -> set[str]:
        return {line for line in log.splitlines() if "::test_" in line}

    left_out = listed(racecheck) - listed(memcheck)
    assert [name.split("::")[1] for name in left_out] == ["test_cuda_graph_of_attenuate"]
    # Too large for racecheck, which is the slower.
    more = listed(memcheck) - listed(racecheck)
    assert more
    assert all("test_small_kernels_against_fp64[(512, " in name for name in more)
    for kernel in ("attenuate_equals", "small_kernels", "small_fused_linear", "small_scores"):
        assert f"::test_{kernel}" in memcheck
    _tool(tmp_path / "cuda" / "bin" / "compute-sanitizer", "#!/bin/bash\n")
    assert "memcheck leaves out" not in _run(tmp_path, "racecheck", **limits).stdout


#: Stands in for python: says what it was asked for and which logs are safe already.
_ASKED = """#!/bin/bash
case " $* " in
*"import xdist"*) exit {xdist} ;;
*" ci/gpu_summary.py "*) exec {python} "$@" ;;
esac
echo "asked: $*"
echo "index: ${{PIP_NO_INDEX:-asked}}"
echo "safe: $(tar -tzf "$OUT/logs.tar.gz" 2>/dev/null | sort | tr '\\n' ' ')"
case " $* " in
*" pip "*) echo "no compiler"; exit 1 ;;
*" --junitxml="*) exit 0 ;;
*" --json "*) for last; do :; done; echo '{{}}' >"$last" ;;
esac
"""


def _asked(folder: Path, *steps: str, xdist: int = 0, **more: str) -> dict[str, str]:
    """Step -> its log, of a run that only asks."""
    text = _ASKED.format(python=sys.executable, xdist=xdist)
    ran = _run(folder, *steps, PYTHON=str(_tool(folder / "python", text)), **more)
    assert "build        FAILED (exit 1)" in ran.stdout or "build" not in steps, ran.stdout
    return {path.stem: path.read_text() for path in (folder / "logs").glob("*.log")}


@pytest.mark.skipif(shutil.which("timeout") is None, reason="ci/gpu.sh needs timeout")
def test_few_files_are_left_and_the_logs_are_safe_after_every_step(tmp_path):
    logs = _asked(tmp_path, "build", "aot", "tests", "kernels", "bench", "bench_model")
    # Whether or not the extension was built.
    assert "asked: -m ucan_fast.kernels.aot" in logs["aot"]
    assert "safe: ./ ./aot.log ./build.log ./steps.tsv" in logs["tests"]
    left = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    results = ["aot.json", "bench-kernels.json", "bench-model.json"]
    assert left == [*results, "logs.tar.gz", "summary.json"]
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as archive:
        names = set(archive.getnames())
        steps = archive.extractfile("./steps.tsv").read().decode()
    assert {f"./{name}.log" for name in logs} < names
    assert len(steps.splitlines()) == 6


@pytest.mark.skipif(shutil.which("timeout") is None, reason="ci/gpu.sh needs timeout")
def test_steps_do_what_needs_this_gpu_on_most_cores(tmp_path):
    logs = _asked(tmp_path, "aot", "tests", "kernels", "bench_model", WORKERS="15")
    assert f"aot --arch 90 --json {tmp_path}/out/aot.json" in logs["aot"]
    assert "-n 15 -m gpu tests" in logs["tests"]
    assert "-n 15 tests/kernels tests/test_triton_path.py" in logs["kernels"]
    assert "--ignore=tests/kernels/test_aot.py" in logs["kernels"]
    assert "--only collect" in logs["bench_model"]
    assert "index: 1" in logs["bench_model"]
    logs = _asked(tmp_path, "kernels", xdist=1)
    assert " -n " not in logs["kernels"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="ci/gpu.sh needs bash")
def test_results_that_will_not_name_their_commit_are_announced(tmp_path):
    (tmp_path / "copy").mkdir()
    shutil.copytree(m.ROOT / "ci", tmp_path / "copy" / "ci")
    nothing = {"root": tmp_path / "copy", "BENCH_COMMIT": ""}
    assert "neither .git nor BENCH_COMMIT: the results" in _run(tmp_path, "none", **nothing).stdout
    named = {**nothing, "BENCH_COMMIT": "0123abc"}
    assert "BENCH_COMMIT" not in _run(tmp_path, "none", **named).stdout


def test_each_of_the_four_calls_ends_within_nine_minutes():
    script = (m.ROOT / "ci" / "gpu.sh").read_text()
    limits = {name: int(value) for name, value in re.findall(r"\[(\w+)\]=(\d+)", script)}
    (steps,) = re.findall(r'wanted=" \$\{\*:-(.*)\} "', script)
    known = set(re.findall(r"^step (\w+) ", script, re.M))
    assert set(limits) == known | {"memcheck", "racecheck"}
    assert set(steps.split()) == set(limits) - {"bench_full"}
    (described,) = re.findall(r"four calls,(.*)Later calls", script, re.S)
    calls = [call.split() for call in re.findall(r"^#   ci/gpu\.sh (.*)$", described, re.M)]
    assert len(calls) == 4
    assert {name for call in calls for name in call} == set(steps.split())
    # In the order that one call of all has.
    for call in calls:
        assert call == [name for name in steps.split() if name in call]
    (grace,) = re.findall(r"--kill-after=(\d+)", script)
    for call in calls:
        assert sum(limits[name] for name in call) <= 540, call
        # Stopping the last step, and the summary, which imports torch.
        assert sum(limits[name] for name in call) + int(grace) + 20 <= 600
    assert min(limits["memcheck"], limits["racecheck"]) >= 200
    todo = (m.ROOT / "benchmarks" / "GPU_TODO.md").read_text()
    assert [call.split() for call in re.findall(r"^    .*ci/gpu\.sh (.*)$", todo, re.M)] == calls


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
        [sys.executable, str(m.ROOT / "ci" / "gpu_summary.py"), *[str(tmp_path)] * 2],
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
