"""Turns the steps of ci/gpu.sh into one table and one JSON file; exit code 1 if one failed."""

from __future__ import annotations

import json
import platform
import sys
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

import torch

# What compute-sanitizer prints where it may not attach, rather than where it found something.
REFUSALS = ("not supported", "permission", "Unable to", "Device not supported", "ERR_NVGPUCTRPERM")


def main(folder: Path) -> int:
    """Print the table, write ``summary.json`` into ``folder``."""
    steps = []
    for line in (folder / "steps.tsv").read_text().splitlines():
        name, status, seconds = line.split("\t")
        steps.append({"step": name, "result": _result(folder, name, status), "seconds": seconds})
    tests = _tests(folder / "gpu-tests.xml")
    summary = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("transformers", "peft")},
        "tests": tests,
        "steps": steps,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{summary['device']}, torch {summary['torch']} (CUDA {summary['cuda']})")
    print(f"gpu tests: {tests}")
    print(f"{'step':<12}{'result':<40}{'seconds':>8}")
    for step in steps:
        print(f"{step['step']:<12}{step['result']:<40}{step['seconds']:>8}")
    complete = {"build", "tests"} <= {step["step"] for step in steps}
    failed = any(step["result"].startswith("FAILED") for step in steps)
    return int(failed or not complete or not tests.get("passed"))


def _result(folder: Path, name: str, status: str) -> str:
    if status == "0":
        return "passed"
    if not status.isdigit():
        return status
    log = (folder / f"{name}.log").read_text(errors="replace")
    if name in ("memcheck", "racecheck") and "ERROR SUMMARY: 0 errors" not in log:
        refusal = next((text for text in REFUSALS if text in log), None)
        if refusal:
            return f"refused by the driver ({refusal!r})"
    return f"FAILED (exit {status})"


def _tests(path: Path) -> dict[str, int]:
    if not path.exists():
        return {}
    suite = next(iter(ElementTree.parse(path).getroot().iter("testsuite")))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - sum(counts[k] for k in ("failures", "errors", "skipped"))
    return counts


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
