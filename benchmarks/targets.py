"""What must hold, against what was measured: one row per target, exit code 1 if one falls short.

    python -m benchmarks.targets FILE.json... [--device cuda|cpu]

The targets stand in ``benchmarks/targets.toml``, which explains its keys. Judged are those of the
devices that the files come from, or of ``--device``. A judged target whose case is in none of the
files fails and says so, and so does one whose candidate was wrong or broke down. One whose case was
skipped is reported as skipped, with the reason, and decides nothing, but where nothing else was
judged either the exit code is 1. Where several files hold a case the newest counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .measure import ROOT, Spread, case_name, read_results

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TARGETS = ROOT / "benchmarks" / "targets.toml"
DEVICES = ("cpu", "cuda")
FIGURES = ("speedup", "time", "bandwidth", "launches")


@dataclass(frozen=True)
class Target:
    """One figure that must hold; the keys of ``targets.toml``."""

    name: str
    device: str
    group: str
    figure: str
    candidate: str
    dtype: str
    where: Mapping[str, Any] = field(default_factory=dict)
    adapter_dtype: str = ""
    against: str = ""
    kernels: str = ""
    at_least: float | None = None
    at_most: float | None = None
    stretch: float | None = None
    floor: str = ""
    only_if_faster_than: str = ""

    def __post_init__(self) -> None:
        problem = ""
        if self.device not in DEVICES:
            problem = f"device {self.device!r} is none of {', '.join(DEVICES)}"
        elif self.figure not in FIGURES:
            problem = f"figure {self.figure!r} is none of {', '.join(FIGURES)}"
        elif (self.at_least is None) == (self.at_most is None):
            problem = "give either at_least or at_most"
        elif (self.figure in ("speedup", "time")) != bool(self.against):
            problem = "against belongs to speedup and time, and to nothing else"
        elif self.floor and not self.against:
            problem = "floor belongs to speedup and time, and to nothing else"
        elif (self.figure == "launches") != bool(self.kernels):
            problem = "kernels belongs to launches, and to nothing else"
        if problem:
            raise ValueError(f"target {self.name!r}: {problem}.")

    def describes(
        self, group: str, shape: Mapping[str, Any], dtype: str, adapter_dtype: str
    ) -> bool:
        """Whether this is its case."""
        return (
            group == self.group
            and dtype == self.dtype
            and adapter_dtype == self.adapter_dtype
            and all(shape.get(key) == value for key, value in self.where.items())
        )

    @property
    def candidates(self) -> list[str]:
        """Names of those that the figure needs."""
        names = (self.candidate, self.against, self.only_if_faster_than)
        return [name for name in names if name]

    def named(self, case: str) -> bool:
        """Whether a case of this name (:func:`benchmarks.measure.case_name`) is its case."""
        ending = case_name({}, self.dtype, self.adapter_dtype)
        words = f" {case.removesuffix(ending)}"
        return case.endswith(f" {ending}") and all(
            f" {case_name({key: value}, '')}" in words for key, value in self.where.items()
        )

    @property
    def limit(self) -> str:
        """``>= 2.40x``."""
        if self.at_least is not None:
            return f">= {self.text(self.at_least)}"
        return f"<= {self.text(self.at_most)}"

    def holds(self, value: float, limit: float | None = None) -> bool:
        """Whether the value is on the right side of the limit, or of another one."""
        if self.at_least is not None:
            return value >= (self.at_least if limit is None else limit)
        return value <= (self.at_most if limit is None else limit)

    def text(self, value: float) -> str:
        """The value in this figure's unit."""
        if self.figure == "bandwidth":
            return f"{100 * value:.1f} %"
        return f"{value:.0f}" if self.figure == "launches" else f"{value:.2f}x"


@dataclass(frozen=True)
class Row:
    """A target and what was found.

    Attributes:
        result: ``pass``, ``FAIL``, ``skipped`` (a candidate could not run), ``not measured`` (its
            device was not asked for) or ``not used`` (an opt-in that loses).
        measured: the figure; None where there is none.
        note: why there is none, or where it comes from.
    """

    target: Target
    result: str
    measured: Spread | None = None
    note: str = ""


def load_targets(path: Path = TARGETS) -> list[Target]:
    """The targets of a file.

    Raises:
        ValueError: a target that is incomplete, has an unknown key or contradicts itself.
    """
    known = {one.name for one in dataclasses.fields(Target)}
    targets = []
    for number, entry in enumerate(tomllib.loads(path.read_text()).get("target", ()), 1):
        where = f"{path.name}: target {number} ({entry.get('name', 'without a name')})"
        if unknown := sorted(set(entry) - known):
            raise ValueError(f"{where}: unknown key {', '.join(unknown)}.")
        try:
            targets.append(Target(**entry))
        except TypeError as error:
            raise ValueError(f"{where}: {error}.") from None
    return targets


def asks_for(bench: Any, device: str) -> bool:
    """Whether a target of this device is about the case (of :mod:`benchmarks.kernels`)."""
    return bool(asked_of(bench, device))


def asked_of(bench: Any, device: str) -> set[str]:
    """Names of the case's candidates that targets of this device are about, the baseline too."""
    case = (bench.group, bench.shape, bench.dtype, bench.adapter_dtype)
    mine = [one for one in _committed() if one.device == device and one.describes(*case)]
    named = {name for one in mine for name in (*one.candidates, one.floor) if name}
    return named | {bench.baseline} if mine else set()


@functools.cache
def _committed() -> list[Target]:
    return load_targets()


def evaluate(
    targets: Iterable[Target], documents: Sequence[Mapping[str, Any]], *, devices: Iterable[str]
) -> list[Row]:
    """Every target against the documents of its device.

    Args:
        targets: as :func:`load_targets` gives them.
        documents: as :func:`benchmarks.measure.read_results` gives them.
        devices: those that are judged.

    Raises:
        ValueError: a target's case is not unique in a document.
    """
    judged = set(devices)
    newest = sorted(documents, key=lambda one: one["environment"]["date"], reverse=True)
    rows = []
    for target in targets:
        if target.device not in judged:
            rows.append(Row(target, "not measured", note=f"needs a {target.device} result"))
            continue
        mine = [one for one in newest if one["environment"]["device"] == target.device]
        found = (_judge(target, one) or _skipped(target, one) for one in mine)
        missing = Row(target, "FAIL", note="not measured: the case is in none of the files")
        rows.append(next((row for row in found if row), missing))
    return rows


def failed(rows: Iterable[Row]) -> list[Row]:
    """Those that fall short."""
    return [row for row in rows if row.result == "FAIL"]


def _skipped(target: Target, document: Mapping[str, Any]) -> Row | None:
    """The row of a target whose case the document skipped, or None."""
    for entry in document["skipped"]:
        mine = entry["group"] == target.group and target.named(entry["case"])
        if mine and entry["candidate"] in target.candidates:
            of = "" if entry["candidate"] == target.candidate else f"{entry['candidate']}: "
            result = "FAIL" if entry.get("failed") else "skipped"
            return Row(target, result, note=f"{of}{entry['reason']}")
    return None


def _judge(target: Target, document: Mapping[str, Any]) -> Row | None:
    """The row, or None where the document does not hold the case."""
    rows = [
        row
        for row in document["results"]
        if target.describes(row["group"], row["shape"], row["dtype"], row["adapter_dtype"])
    ]
    cases = sorted({row["case"] for row in rows})
    if len(cases) > 1:
        raise ValueError(f"target {target.name!r} fits several cases: {'; '.join(cases)}.")
    by_name = {row["candidate"]: row for row in rows}
    if any(name not in by_name for name in target.candidates):
        return None
    mine = by_name[target.candidate]
    measured, obstacle = _figure(target, mine, by_name.get(target.against), document)
    if measured is None:
        return Row(target, "FAIL", note=f"not measured: {obstacle}")
    if rival := target.only_if_faster_than:
        gain = per_round(by_name[rival], mine)
        if gain.median <= 1:
            return Row(target, "not used", measured, f"slower than {rival}")
    result = "pass" if target.holds(measured.median) else "FAIL"
    return Row(target, result, measured, _room(target, by_name))


def _room(target: Target, by_name: Mapping[str, Mapping[str, Any]]) -> str:
    """The figure of what every candidate must do at least: what is left above it is ours."""
    if target.floor not in by_name:
        return ""
    floor, _ = _figure(target, by_name[target.floor], by_name[target.against], {})
    return f"{target.floor}: {target.text(floor.median)}"


def per_round(numerator: Mapping[str, Any], denominator: Mapping[str, Any]) -> Spread:
    """Time over time of two rows of one case, paired within each round."""
    pairs = zip(numerator["seconds"]["rounds"], denominator["seconds"]["rounds"], strict=True)
    return Spread.of([a / b for a, b in pairs])


def _figure(
    target: Target,
    mine: Mapping[str, Any],
    other: Mapping[str, Any] | None,
    document: Mapping[str, Any],
) -> tuple[Spread | None, str]:
    """The figure, or None and why there is none."""
    if target.figure == "speedup":
        return per_round(other, mine), ""
    if target.figure == "time":
        return per_round(mine, other), ""
    if target.figure == "bandwidth":
        ceilings = document["environment"].get("ceilings")
        if ceilings is None or mine["bytes"] is None:
            return None, "the file has no ceilings or the row no bytes"
        full = mine["bytes"] / ceilings["bandwidth"]
        return Spread.of([full / seconds for seconds in mine["seconds"]["rounds"]]), ""
    launches = mine["extra"].get("launches")
    if not launches:
        return None, mine["extra"].get("launches_reason", "launches were not counted")
    pattern = re.compile(target.kernels)
    counted = sum(n for name, n in launches.items() if pattern.search(name))
    if not counted:
        # Another backend ran, or the kernels were renamed.
        return None, f"no kernel is named like {target.kernels}, but {', '.join(launches)}"
    return Spread.of([counted]), ""


def short_commit(environment: Mapping[str, Any]) -> str:
    """Twelve digits, and the ``+`` of changed files."""
    commit = environment["commit"]
    return commit[:12] + ("+" if commit.endswith("+") else "")


def render(rows: Sequence[Row], *, measured: str = "measured") -> str:
    """The table, a line per target."""
    body = [(measured, "target", "stretch", "result", "figure")]
    for row in rows:
        target, found = row.target, row.measured
        value = "-"
        if found is not None:
            value = target.text(found.median)
            if found.q1 != found.q3:
                value += f" [{target.text(found.q1)}, {target.text(found.q3)}]"
        stretch = "-" if target.stretch is None else target.text(target.stretch)
        if found is not None and target.stretch is not None:
            stretch += " met" if target.holds(found.median, target.stretch) else " not met"
        result = f"{row.result} ({row.note})" if row.note else row.result
        body.append((value, target.limit, stretch, row.result, target.name))
        if row.note:
            body[-1] = (*body[-1][:3], result, target.name)
    widths = [max(len(line[i]) for line in body) for i in (0, 1, 2)]
    head = "  ".join(f"{cell:<{width}}" for cell, width in zip(body[0], widths, strict=False))
    lines = [f"{head}  result: figure"]
    for line in body[1:]:
        cells = "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False))
        lines.append(f"{cells}  {line[3]}: {line[4]}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.targets", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("files", nargs="+", type=Path, help="result files")
    parser.add_argument("--device", choices=DEVICES, help="judge the targets of this one only")
    options = parser.parse_args(arguments)
    try:
        documents = [read_results(path) for path in options.files]
        found = {one["environment"]["device"] for one in documents}
        rows = evaluate(
            load_targets(),
            documents,
            devices={options.device} if options.device else found,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for document in documents:
        environment = document["environment"]
        print(
            f"{environment['hardware']}, torch {environment['torch']}, commit "
            f"{short_commit(environment)}, {environment['date']}: {environment['command']}"
        )
    print(render(rows))
    short = failed(rows)
    skipped = [row for row in rows if row.result == "skipped"]
    judged = [row for row in rows if row.result not in ("not measured", "skipped")]
    also = f", {len(skipped)} skipped" if skipped else ""
    print(f"{len(short)} of {len(judged)} judged targets fall short{also}")
    return 1 if short or (skipped and not judged) else 0


if __name__ == "__main__":
    sys.exit(main())
