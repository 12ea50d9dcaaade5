"""Turns the steps of ci/gpu.sh into one table and one JSON file; exit code 1 if one failed."""

from __future__ import annotations

import json
import platform
import re
import sys
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

import torch

# What compute-sanitizer prints where it may not attach, rather than where it found something.
REFUSALS = ("not supported", "permission", "Unable to", "ERR_NVGPUCTRPERM")
PACKAGES = ("transformers", "peft", "triton", "bitsandbytes")


def main(out: Path, folder: Path) -> int:
    """Print the tables of the logs in ``folder``, write them to ``summary.json`` in ``out``."""
    steps = []
    for line in (folder / "steps.tsv").read_text().splitlines():
        name, status, seconds = line.split("\t")
        steps.append(
            {
                "step": name,
                "result": _result(folder, name, status),
                "seconds": int(seconds),
                **_tests(folder / f"{name}.xml"),
            }
        )
    summary = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "steps": steps,
    }
    table = [
        f"{summary['device']}, torch {summary['torch']} (CUDA {summary['cuda']}), "
        + ", ".join(f"{name} {summary[name]}" for name in PACKAGES),
        f"{'step':<13}{'result':<42}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}",
    ]
    for step in steps:
        counts = "".join(f"{step.get(key, ''):>8}" for key in ("passed", "failed", "skipped"))
        table.append(f"{step['step']:<13}{step['result']:<42}{counts}{step['seconds']:>9}")
    targets = folder / "targets.log"
    if any(step["step"] == "targets" for step in steps) and targets.exists():
        table += targets.read_text().rstrip().splitlines()
    print("\n".join(table))
    (out / "summary.json").write_text(json.dumps({**summary, "table": table}, indent=2) + "\n")
    failed = any(step["result"].startswith("FAILED") for step in steps)
    nothing = any(step.get("passed") == 0 and step["step"] != "quantised" for step in steps)
    return int(failed or nothing or not steps)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _result(folder: Path, name: str, status: str) -> str:
    if status == "0":
        return "passed"
    if not status.isdigit():
        return status
    log = (folder / f"{name}.log").read_text(errors="replace")
    if name in ("memcheck", "racecheck"):
        # The tool's own lines only: what pytest prints has such words too. And whoever counted
        # errors was not refused.
        said = "\n".join(line for line in log.splitlines() if line.startswith("========="))
        refusal = next((text for text in REFUSALS if text in said), None)
        if refusal and not re.search(r"SUMMARY: [1-9]", said):
            return f"refused by the driver ({refusal!r})"
    if name == "quantised" and "No module named 'bitsandbytes'" in log:
        return "bitsandbytes is not installed"
    return f"FAILED (exit {status})"


def _tests(path: Path) -> dict[str, int]:
    if not path.exists():
        return {}
    suite = next(iter(ElementTree.parse(path).getroot().iter("testsuite")))
    number = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    return {
        "passed": number["tests"] - failed - number["skipped"],
        "failed": failed,
        "skipped": number["skipped"],
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
