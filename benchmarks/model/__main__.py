"""``python -m benchmarks.model --profile quick``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from ..measure import (
    CheckFailed,
    Profile,
    Result,
    Skipped,
    chosen_profile,
    output_path,
    table,
    write_results,
)
from . import deletion, passes, scaling
from .slopes import slope_table
from .timing import PROFILES

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
    """Run the chosen groups; 1 where a candidate computed something else, 130 if interrupted."""
    options = parse(arguments)
    profile = PROFILES[chosen_profile(options.profile).name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformers.utils.logging.disable_progress_bar()
    # PEFT asks a question that transformers renamed; nothing a user of either could do.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    results: list[Result] = []
    skipped: list[Skipped] = []
    status = 0
    for name in options.only:
        try:
            measured, left_out = GROUPS[name](profile, device)
        except KeyboardInterrupt:
            print(f"error: interrupted in {name}; what came before is kept", file=sys.stderr)
            status = 130
            break
        except CheckFailed as failure:
            print(f"error: {failure}", file=sys.stderr)
            return 1
        print(
            "\n".join(filter(None, [table(measured, left_out), slope_table(measured)])), flush=True
        )
        results += measured
        skipped += left_out
    if status and not results:
        return status
    path = options.json or output_path("model", save=options.save, profile=profile)
    write_results(
        path, results, command=_command(options, profile), skipped=skipped, profile=profile
    )
    print(f"written: {os.path.relpath(path)}")
    return status


def _command(options: argparse.Namespace, profile: Profile) -> str:
    # Where the file goes does not belong to what was measured.
    words = ["python", "-m", "benchmarks.model", "--profile", profile.name]
    if options.only != list(GROUPS):
        words += ["--only", ",".join(options.only)]
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
