"""Unlearning quality of every method, side by side: tables, JSON, figures.

    python -m benchmarks.quality --profile quick      one seed on ml-100k, coarse curves
    python -m benchmarks.quality --profile full --data FOLDER --save

A cell (data set, seed, scenario) is a file; files that are there already are kept, so that a run
that was cut short goes on. Cells run side by side, each on its share of the cores.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..measure import ROOT
from .methods import METHODS
from .recommender import DATA_SETS, SCENARIOS
from .tables import load, text_tables

RESULTS = ROOT / "benchmarks" / "results" / "quality"


@dataclass(frozen=True)
class Profile:
    """What is run."""

    data_sets: tuple[str, ...]
    scenarios: tuple[str, ...]
    seeds: tuple[int, ...]
    coarse: bool
    share: float = 1.0


PROFILES = {
    # The longest first, so that no worker waits for the last one for long.
    "quick": Profile(("ml-100k",), ("genre", "one-user"), (0,), True, 0.4),
    "full": Profile(tuple(DATA_SETS), SCENARIOS, (0, 1, 2), False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 where a cell fails."""
    options = _parser().parse_args(arguments)
    profile = PROFILES[options.profile]
    coarse = profile.coarse if options.coarse is None else options.coarse
    out = RESULTS if options.save else ROOT / "build" / f"quality-{options.profile}"
    out = options.out or out
    began = time.perf_counter()
    data_sets = options.data_sets or profile.data_sets
    seeds = options.seeds or profile.seeds
    scenarios = options.scenarios or profile.scenarios
    shared = ["--data", str(options.data)] if options.data else []
    pairs = [["--data-set", name, "--seed", str(seed)] for seed in seeds for name in data_sets]
    every = [_file(out, pair, scenario) for pair in pairs for scenario in scenarios]
    better = [file for file in every if _is_better(file, coarse, profile.share)]
    if better:
        print(
            f"error: {_shown(better[0])} was measured on more users or with finer curves than "
            f"this would be ({len(better)} such files); write elsewhere with --out.",
            file=sys.stderr,
        )
        return 2
    print(f"recommenders: {len(pairs)}, trained where the cache has them not", flush=True)
    failed = _all([[*pair, *shared] for pair in pairs], options.workers)
    cells, files = [], []
    # Seeds outermost: a run that is cut short has covered all scenarios.
    for pair in pairs:
        for scenario in scenarios:
            file = _file(out, pair, scenario)
            files.append(file)
            if not options.again and _is_there(file, coarse, profile.share, options.methods):
                print(f"kept: {_shown(file)} (--again measures it anew)")
                continue
            words = [*pair, "--scenario", scenario, "--out", str(file), *shared]
            words += ["--methods", options.methods] if options.methods else []
            words += ["--share", str(profile.share)] if profile.share != 1 else []
            cells.append([*words, "--coarse"] if coarse else words)
    failed += _all(cells, options.workers)
    results = load(file for file in files if file.exists())
    if results:
        print()
        print(text_tables(results))
    print(f"{time.perf_counter() - began:.0f} s in all; results: {_shown(out)}")
    return 1 if failed else 0


def _file(out: Path, pair: list[str], scenario: str) -> Path:
    return out / f"{pair[1]}-{pair[3]}-{scenario}.json"


def _is_better(file: Path, coarse: bool, share: float) -> bool:
    """Whether the file says more than one measured like this would."""
    if not file.exists():
        return False
    (found,) = load([file])
    return found["share"] > share or (coarse and not found["coarse"])


def _is_there(file: Path, coarse: bool, share: float, methods: str) -> bool:
    """Whether the file was measured like this."""
    if not file.exists():
        return False
    (found,) = load([file])
    chosen = [method.name for method in METHODS if re.search(methods, method.name)]
    same = (found["coarse"], found["share"]) == (coarse, share)
    return same and set(chosen) <= found["methods"].keys()


def _all(jobs: list[list[str]], workers: int) -> int:
    """Run the cells, `workers` at a time; how many failed."""
    workers = max(1, min(workers, len(jobs)))
    threads = max(1, (os.cpu_count() or 1) // workers)
    # A thread that spins while it waits takes the core from the one it waits for.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}

    def one(words: list[str]) -> int:
        command = [sys.executable, "-m", "benchmarks.quality.cell", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, check=False, stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            print(f"error: {' '.join(words)} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return int(done.returncode != 0)

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(one, jobs))


def _shown(path: Path) -> str:
    return os.path.relpath(path, ROOT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--profile", choices=sorted(PROFILES), default="quick")
    parser.add_argument("--data", type=Path, help="folder with ml-latest-small/ and pantry/")
    parser.add_argument("--data-sets", nargs="+", choices=sorted(DATA_SETS))
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--methods", default="", help="regular expression; default: all")
    parser.add_argument("--coarse", action=argparse.BooleanOptionalAction)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--again", action="store_true", help="measure cells that are there anew")
    parser.add_argument("--save", action="store_true", help=f"write to {_shown(RESULTS)}")
    parser.add_argument("--out", type=Path, help="folder of the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
