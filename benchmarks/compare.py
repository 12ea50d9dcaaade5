"""Which ratios moved between two result files, beyond noise.

    python -m benchmarks.compare BEFORE.json AFTER.json [--fail-on-slower]

Compared is a candidate's ratio to its case's baseline, never its seconds: a ratio is taken within a
round, so a machine that is slower as a whole changes nothing. A ratio *moved* if both hold:

- the 99 % bootstrap interval of (median ratio after / median ratio before) leaves out 1: 2,000
  resamples of each file's rounds, always the same ones;
- the medians differ by more than 5 %, which another memory layout or clock alone can bring about
  from one process to the next.

Of some hundred unmoved rows about one passes the first test by chance; the second one is for these.
Rows that only one file holds are listed. With ``--fail-on-slower`` the exit code is 1 if a row of
ucan_fast itself got slower; peers that do are only listed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .measure import read_results

RESAMPLES = 2000
CONFIDENCE = 0.99
SMALLEST = 0.05
OURS = "ucan_fast"

Key = tuple[str, str, str]  # group, case, candidate


@dataclass(frozen=True)
class Change:
    """The ratio of one candidate in both files.

    Attributes:
        before, after: median ratios to the baseline.
        low, high: bootstrap interval of after / before.
    """

    key: Key
    before: float
    after: float
    low: float
    high: float

    @property
    def moved(self) -> bool:
        """Beyond noise, as the module defines it."""
        return not self.low <= 1 <= self.high and abs(self.factor - 1) > SMALLEST

    @property
    def factor(self) -> float:
        """after / before: above 1 is faster now."""
        return self.after / self.before

    @property
    def slower(self) -> bool:
        """Moved, the wrong way."""
        return self.moved and self.factor < 1


@dataclass(frozen=True)
class Comparison:
    """Everything that two files say about each other."""

    changes: list[Change]
    appeared: list[Key]
    disappeared: list[Key]

    def regressions(self) -> list[Change]:
        """Rows of ucan_fast itself that got slower."""
        return [one for one in self.changes if one.slower and one.key[2].startswith(OURS)]


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Compare two documents of :func:`benchmarks.measure.read_results`."""
    old, new = _ratios(before), _ratios(after)
    changes = [
        Change(
            key,
            float(np.median(old[key])),
            float(np.median(new[key])),
            *bootstrap(old[key], new[key]),
        )
        for key in new
        if key in old
    ]
    return Comparison(
        changes,
        appeared=[key for key in new if key not in old],
        disappeared=[key for key in old if key not in new],
    )


def bootstrap(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """The interval of median(after) / median(before).

    Args:
        before, after: one ratio per round, any number of rounds.
    """
    random = np.random.default_rng(0)
    medians = [
        np.median(random.choice(values, (RESAMPLES, len(values))), axis=1)
        for values in (before, after)
    ]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(medians[1] / medians[0], [tail, 100 - tail])
    return float(low), float(high)


def _ratios(document: Mapping[str, Any]) -> dict[Key, np.ndarray]:
    rounds = {
        (row["group"], row["case"], row["candidate"]): np.array(row["seconds"]["rounds"])
        for row in document["results"]
    }
    return {
        (row["group"], row["case"], row["candidate"]): rounds[
            row["group"], row["case"], row["baseline"]
        ]
        / rounds[row["group"], row["case"], row["candidate"]]
        for row in document["results"]
        if row["candidate"] != row["baseline"]
    }


def render(comparison: Comparison) -> str:
    """What moved, slowest first, then what came and went."""
    moved = sorted((one for one in comparison.changes if one.moved), key=lambda one: one.factor)
    lines = [f"{len(moved)} of {len(comparison.changes)} ratios moved beyond noise"]
    for one in moved:
        group, case, candidate = one.key
        word = "slower" if one.slower else "faster"
        lines.append(
            f"  {word}: {group}: {case}: {candidate}: {one.before:.2f}x -> {one.after:.2f}x "
            f"({one.factor:.2f} [{one.low:.2f}, {one.high:.2f}])"
        )
    for title, keys in (
        ("only in the first file", comparison.disappeared),
        ("only in the second file", comparison.appeared),
    ):
        lines += [f"{title}: {': '.join(key)}" for key in keys]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--fail-on-slower", action="store_true", help="exit code 1 if ucan_fast got slower"
    )
    options = parser.parse_args(arguments)
    try:
        before, after = read_results(options.before), read_results(options.after)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for key in ("hardware", "threads", "torch", "peft", "profile"):
        old, new = before["environment"][key], after["environment"][key]
        if old != new:
            print(f"note: {key} differs: {old} and {new}")
    comparison = compare(before, after)
    print(render(comparison))
    regressions = comparison.regressions()
    if regressions and options.fail_on_slower:
        print(f"error: ucan_fast got slower in {len(regressions)} rows", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
