"""Both suites, then the target table of this device: ``python -m benchmarks --profile quick``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from . import targets
from .measure import PROFILES, ROOT, chosen_profile, output_path


def commands(profile: str, *, save: bool) -> dict[str, list[str]]:
    """Result file -> the command that writes it."""
    python = [sys.executable, "-m"]
    options = ["--profile", profile, "--json"]
    suites = {
        # pytest-benchmark would print the same times once more.
        "kernels": [*python, "pytest", "-q", "-p", "no:benchmark", "benchmarks/kernels", *options],
        "model": [*python, "benchmarks.model", *options],
    }
    paths = {
        name: os.path.relpath(output_path(name, save=save, profile=PROFILES[profile]), ROOT)
        for name in suites
    }
    return {paths[name]: [*command, paths[name]] for name, command in suites.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 where a suite or a target fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--profile", choices=sorted(PROFILES), help="default: BENCH_PROFILE")
    parser.add_argument(
        "--save",
        action="store_true",
        help="write the results to benchmarks/results instead of build/bench",
    )
    options = parser.parse_args(arguments)
    profile = chosen_profile(options.profile).name
    began = time.perf_counter()
    files = commands(profile, save=options.save)
    for path, command in files.items():
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            print(f"error: the suite that writes {path} failed ({status}).", file=sys.stderr)
            return 1
    print()
    status = targets.main([str(ROOT / path) for path in files])
    print(f"{time.perf_counter() - began:.0f} s in all; results: {', '.join(files)}")
    if options.save:
        print("README, docs/benchmarks.md and figures: python -m benchmarks.report")
    return status


if __name__ == "__main__":
    sys.exit(main())
