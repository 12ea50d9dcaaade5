"""``python -m benchmarks.model --profile quick``."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from ..measure import (
    Profile,
    Result,
    Skipped,
    chosen_profile,
    described,
    output_path,
    table,
    write_results,
)
from . import deletion, passes, scaling
from .slopes import slope_table
from .timing import PROFILES

#: Each gives its results and what it skipped case by case.
GROUPS = {"collect": passes.run, "deletion": deletion.run, "scaling": scaling.run}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``only`` becomes a list of groups."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description="Whole passes, side by side."
    )
    parser.add_argument(
        "--profile", choices=sorted(PROFILES), help="default: BENCH_PROFILE, or quick"
    )
    parser.add_argument(
        "--only", type=_groups, default=list(GROUPS), help=f"of {','.join(GROUPS)} (default: all)"
    )
    parser.add_argument("--json", metavar="PATH", type=Path, help="write the results there")
    parser.add_argument(
        "--save",
        action="store_true",
        help="write the results to benchmarks/results instead of build/bench",
    )
    return parser.parse_args(arguments)


def _groups(text: str) -> list[str]:
    chosen = [word for word in text.split(",") if word]
    unknown = [word for word in chosen if word not in GROUPS]
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(f"{text!r}: give some of {','.join(GROUPS)}")
    return [name for name in GROUPS if name in chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen groups; 1 where a candidate was wrong or broke down, 130 if interrupted."""
    options = parse(arguments)
    profile = PROFILES[chosen_profile(options.profile).name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformers.utils.logging.disable_progress_bar()
    # PEFT asks a question that transformers renamed; nothing a user of either could do.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    results: list[Result] = []
    skipped: list[Skipped] = []
    status = 1
    try:
        status = _measure(options.only, profile, device, results, skipped)
    finally:
        # What was measured before something ended the run is kept.
        if results or skipped or status == 0:
            path = options.json or output_path("model", save=options.save, profile=profile)
            write_results(
                path, results, command=_command(options, profile), skipped=skipped, profile=profile
            )
            print(f"written: {os.path.relpath(path)}")
    return status


def _measure(
    groups: Sequence[str],
    profile: Profile,
    device: torch.device,
    results: list[Result],
    skipped: list[Skipped],
) -> int:
    # Prints each case when it is done. A group that breaks down costs its own cases only.
    status = 0
    for name in groups:
        try:
            for measured, left_out in GROUPS[name](profile, device):
                results += measured
                skipped += left_out
                shown = [table(measured, left_out), slope_table(measured)]
                print("\n".join(filter(None, shown)), flush=True)
                if any(one.failed for one in left_out):
                    status = 1
        except KeyboardInterrupt:
            print(f"error: interrupted in {name}; what came before is kept", file=sys.stderr)
            return 130
        except Exception as error:
            traceback.print_exc()
            print(f"error: {name}: {described(error)}", file=sys.stderr)
            status = 1
    return status


def _command(options: argparse.Namespace, profile: Profile) -> str:
    # Where the file goes does not belong to what was measured.
    words = ["python", "-m", "benchmarks.model", "--profile", profile.name]
    if options.only != list(GROUPS):
        words += ["--only", ",".join(options.only)]
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
