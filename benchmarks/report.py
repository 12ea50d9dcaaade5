"""The README's performance section, docs/benchmarks.md and the figures, from the result files.

    python -m benchmarks.report            rewrite them
    python -m benchmarks.report --check    exit code 1 if one of them is out of date

Read are all files of ``benchmarks/results``; where several hold a case, the newest counts. The
section stands between two markers in the README. Nothing in it is written by hand, and no row is
left out of docs/benchmarks.md because it loses.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import figures, roofline, targets
from .costs import Ceilings
from .figures import Figure
from .measure import ROOT, Spread, case_name, read_results

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
OURS = "ucan_fast"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
NOT_MEASURED = "not measured on a GPU yet"
PREDICTED_GPU = "h100"
DETAILS = "docs/benchmarks.md"


@dataclass(frozen=True)
class Case:
    """All rows of one case, and the environment that they were measured in."""

    group: str
    name: str
    environment: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]  # by candidate

    @property
    def shape(self) -> Mapping[str, Any]:
        """Of any of its rows: they share it."""
        return next(iter(self.rows.values()))["shape"]

    @property
    def baseline(self) -> str:
        """Name of the candidate that ratios refer to."""
        return next(iter(self.rows.values()))["baseline"]

    def speedup(self, candidate: str, against: str) -> Spread:
        """How many times faster, paired within each round."""
        return targets.per_round(self.rows[against], self.rows[candidate])


@dataclass(frozen=True)
class Results:
    """What the result files say together.

    Attributes:
        documents: by device, newest first.
        cases: by device, in the order of the files.
    """

    documents: Mapping[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    cases: Mapping[str, list[Case]] = field(default_factory=dict)


def load(paths: Iterable[Path]) -> Results:
    """Read result files; of each case the newest.

    Raises:
        ValueError: a file is not a result file.
    """
    documents: dict[str, list[Mapping[str, Any]]] = {}
    for path in sorted(paths):
        document = read_results(path)
        documents.setdefault(document["environment"]["device"], []).append(document)
    cases: dict[str, list[Case]] = {}
    for device, mine in documents.items():
        mine.sort(key=lambda one: one["environment"]["date"], reverse=True)
        seen: dict[tuple[str, str], Case] = {}
        for document in mine:
            for key, rows in _by_case(document).items():
                seen.setdefault(key, Case(*key, document["environment"], rows))
        cases[device] = list(seen.values())
    return Results(documents, cases)


def _by_case(document: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    cases: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in document["results"]:
        cases.setdefault((row["group"], row["case"]), {})[row["candidate"]] = row
    return cases


# The figures that decide


@dataclass(frozen=True)
class Headline:
    """A line of the first table.

    Attributes:
        text: what is compared.
        group, where: its case, by device; the first that fits.
        candidate: ours.
        against: peers, each with its own words after the figure.
        as_time: ours as a multiple of the peer's time, rather than how many times faster.
    """

    text: str
    group: str
    where: Mapping[str, Mapping[str, Any]]
    candidate: str
    against: Mapping[str, str]
    as_time: bool = False


_COLLECT = {
    "cpu": {"model": "SmolLM2-135M", "groups": "both groups"},
    "cuda": {"model": "Llama-2-7B", "groups": "both groups"},
}
#: What a user decides by.
HEADLINES = (
    Headline(
        "**Collecting** the statistics of a data set after `uf.accelerate(model)`, against a plain "
        "PEFT forward pass over it",
        "collect",
        _COLLECT,
        "ucan_fast",
        {"peft, plain forward": "its time"},
        as_time=True,
    ),
    Headline(
        "without `accelerate`",
        "collect",
        _COLLECT,
        "ucan_fast, not accelerated",
        {"peft, plain forward": "its time"},
        as_time=True,
    ),
    Headline(
        "with it, against PEFT with hooks that take the same statistics",
        "collect",
        _COLLECT,
        "ucan_fast",
        {
            "peft + hooks, mask matmul": "faster (mask products)",
            "peft + hooks, boolean index": "faster (boolean index)",
        },
    ),
    Headline(
        "**Deleting** one user with a bank, against collecting both sets",
        "deletion",
        {device: {"request": "one user"} for device in DEVICES},
        "ucan_fast, bank",
        {"ucan_fast, both sets": "faster"},
    ),
)


def headline_value(headline: Headline, results: Results, device: str) -> tuple[str, Case | None]:
    """A cell of the table, and the case behind it."""
    if device not in results.cases:
        return (NOT_MEASURED if device == "cuda" else "not measured"), None
    case = find(results.cases[device], headline.group, headline.where[device])
    if case is None or headline.candidate not in case.rows:
        return "not measured", None
    parts = []
    for peer, words in headline.against.items():
        if peer not in case.rows:
            continue
        if headline.as_time:
            spread = case.speedup(peer, headline.candidate)
        else:
            spread = case.speedup(headline.candidate, peer)
        parts.append(f"**{_times(spread.median)}** {_range(spread)} {words}")
    return ", ".join(parts) or "not measured", case


def find(cases: Iterable[Case], group: str, where: Mapping[str, Any]) -> Case | None:
    """The first case of a group whose shape has these entries."""
    for case in cases:
        if case.group == group and all(case.shape.get(k) == v for k, v in where.items()):
            return case
    return None


# The README's section


def section(results: Results) -> str:
    """The text between the markers."""
    lines = ["## What it buys", ""]
    names = {device: _machine(results, device) for device in DEVICES}
    lines += [
        "| | " + " | ".join(names.values()) + " |",
        "|---|" + "---|" * len(names),
    ]
    sources: list[Case] = []
    for headline in HEADLINES:
        cells = []
        for device in DEVICES:
            text, case = headline_value(headline, results, device)
            cells.append(text)
            sources += [case] if case else []
        lines.append(f"| {headline.text} | " + " | ".join(cells) + " |")
    described = "; ".join(dict.fromkeys(f"{one.group}: {one.name}" for one in sources))
    lines += [
        "",
        _wrapped(
            "Medians of interleaved rounds [quartiles], ratios within a round, every candidate "
            "checked against a reference in higher precision before it is timed. "
            f"Cases: {described or 'none'}."
        ),
        "",
    ]
    for device in DEVICES:
        for figure in device_figures(results, device):
            lines += [f"![{figure.data['title']}](docs/{figure.name}.png)", ""]
        lines += _sweeps_left_out(results.cases.get(device, []))
    for device, mine in results.documents.items():
        lines += [f"{DEVICES[device]} files:", ""]
        lines += [
            _wrapped(f"- {_provenance(one['environment'])}", "  ")
            for one in _used(results, device, mine)
        ]
        lines.append("")
    lines += _losses(results)
    lines += _target_table(results)
    if "cuda" not in results.documents:
        lines += _prediction()
    lines.append(
        _wrapped(
            "Every row, those that lose too, with what the roofline predicts for it: "
            f"[{DETAILS}]({DETAILS}). `make bench-quick` measures your machine in five minutes, "
            "`make bench` takes longer; `python -m benchmarks.compare A.json B.json` says which "
            "ratios moved beyond noise."
        )
    )
    return "\n".join(lines).strip() + "\n"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _machine(results: Results, device: str) -> str:
    if device not in results.documents:
        return DEVICES[device]
    environment = results.documents[device][0]["environment"]
    if device == "cpu":
        return f"{environment['threads']} cores of an {environment['hardware']}"
    return environment["hardware"]


def _used(
    results: Results, device: str, documents: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    behind = [id(case.environment) for case in results.cases[device]]
    return [one for one in documents if id(one["environment"]) in behind]


def _provenance(environment: Mapping[str, Any]) -> str:
    cuda = f" (CUDA {environment['cuda']})" if environment["cuda"] else ""
    return (
        f"{environment['hardware']}, {environment['cores']} cores, {environment['threads']} "
        f"threads, Python {environment['python']}, torch {environment['torch']}{cuda}, "
        f"triton {environment['triton']}, peft {environment['peft']}, transformers "
        f"{environment['transformers']}, commit {targets.short_commit(environment)}, "
        f"{environment['date'][:10]}, `{environment['command']}`"
    )


def _losses(results: Results) -> list[str]:
    """Where a peer is clearly faster than ucan_fast, the worst first."""
    lost, compared = [], 0
    for device, cases in results.cases.items():
        for case in cases:
            for peer, spread in against_peers(case).items():
                compared += 1
                if spread.q3 < 1:
                    words = (
                        f"{case.group}, {case.name}: {peer} takes {spread.median:.2f} of the time"
                    )
                    lost.append((spread.median, f"{DEVICES[device]}: {words}"))
    if not compared:
        return []
    if not lost:
        return [f"No peer is clearly faster in any of {compared} comparisons.", ""]
    lost.sort()
    return [
        _wrapped(
            f"**Where it loses**: in {len(lost)} of {compared} comparisons a peer is clearly "
            "faster (the upper quartile is below 1). The worst:"
        ),
        "",
        *(_wrapped(f"- {text}", "  ") for _, text in lost[:3]),
        "",
    ]


#: They compute less on purpose: floors, no peers.
_LESS = ("base layer alone", "adapter off", "peft, no moments", "peft, plain forward")


def against_peers(case: Case) -> dict[str, Spread]:
    """Peer -> how many times faster ucan_fast is, of the peers that do the same job.

    A peer in another precision (autocast, adapters of another dtype) is held against ours in it.
    """
    peers = [name for name in case.rows if not name.startswith(_LESS)]
    if case.group == "deletion":
        return _against(case, dict.fromkeys(peers, "ucan_fast, bank"))
    peers = [name for name in peers if not name.startswith(OURS)]
    rivals = {}
    for name in peers:
        way = name.rpartition(", ")[2]
        special = way == "autocast" or way.endswith(" adapters")
        rivals[name] = f"{OURS}, {way}" if special else OURS
    return _against(case, rivals)


def _against(case: Case, rivals: Mapping[str, str]) -> dict[str, Spread]:
    """Peer -> how many times faster its rival is, where the rival was run."""
    return {
        peer: case.speedup(ours, peer)
        for peer, ours in rivals.items()
        if ours in case.rows and peer != ours
    }


def _target_table(results: Results) -> list[str]:
    if not results.documents:
        return []
    documents = [one for mine in results.documents.values() for one in mine]
    wanted = [one for one in targets.load_targets() if one.device in results.documents]
    rows = targets.evaluate(wanted, documents, devices=results.documents)
    return [
        "What must hold (`benchmarks/targets.toml`):",
        "",
        *_target_rows(rows, "measured"),
        "",
    ]


def _target_rows(rows: Sequence[targets.Row], column: str) -> list[str]:
    words = {"pass": "holds", "FAIL": "**falls short**"}
    if column == "predicted":
        words = {"pass": "would hold", "FAIL": "**would fall short**"}
    lines = [f"| figure | {column} | target | |", "|---|---|---|---|"]
    for row in rows:
        target = row.target
        value = "-" if row.measured is None else target.text(row.measured.median)
        if row.measured is not None and row.measured.q1 != row.measured.q3:
            value += f" [{target.text(row.measured.q1)}, {target.text(row.measured.q3)}]"
        result = words.get(row.result, row.result)
        note = f" ({row.note})" if row.note else ""
        limit = target.limit.replace(">=", "≥").replace("<=", "≤")
        lines.append(f"| {target.name} | {value} | {limit} | {result}{note} |")
    return lines


def _prediction() -> list[str]:
    document = roofline.predict(PREDICTED_GPU)
    wanted = [one for one in targets.load_targets() if one.device == "cuda"]
    rows = targets.evaluate(wanted, [document], devices={"cuda"})
    name = PREDICTED_GPU.upper()
    text = (
        f"**{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}.** The table is a *prediction* for one "
        f"{name}, from bytes and operations alone (`python -m benchmarks.roofline --gpu "
        f"{PREDICTED_GPU}`), as if every kernel, ours and the peers', reached the ceilings: ours "
        "have yet to show it. One Llama-2-7B layer, 4096 x 4096, 8,192 tokens, bf16, rank 16. "
        f"Ceilings {roofline.GPUS[PREDICTED_GPU].source}."
    )
    return [_wrapped(text), "", *_target_rows(rows, "predicted"), ""]


# docs/benchmarks.md


def details(results: Results) -> str:
    """Every row, every skipped candidate."""
    lines = [
        "# Benchmark results",
        "",
        "Written by `python -m benchmarks.report` from `benchmarks/results/`. Ratio: how many "
        "times faster than the case's baseline, median [quartiles] of the rounds; below 1 is "
        "slower. Predicted: what bytes, operations and the measured ceilings allow "
        "(`benchmarks/costs.py`); far above 1 the last column is unexplained time, below 1 data "
        "stayed in a cache.",
        "",
    ]
    for device, documents in results.documents.items():
        lines += [f"## {DEVICES[device]}", ""]
        for document in _used(results, device, documents):
            environment = document["environment"]
            lines += [_provenance(environment), ""]
            if "ceilings" in environment:
                ceilings = Ceilings.from_json(environment["ceilings"])
                lines += [f"Ceilings: {roofline.describe(ceilings)}.", ""]
            mine = [c for c in results.cases[device] if c.environment is environment]
            for case in mine:
                lines += _case_table(case)
            lines += _skipped(document)
    if not results.documents:
        lines += ["Nothing was measured yet.", ""]
    return "\n".join(lines).strip() + "\n"


def _case_table(case: Case) -> list[str]:
    timing = next(iter(case.rows.values()))["extra"].get("timing", "")
    rounds = len(next(iter(case.rows.values()))["seconds"]["rounds"])
    rates = any(row["extra"].get("tokens_per_second") for row in case.rows.values())
    last = "| tokens/s | peak memory |" if rates else "| predicted | measured / predicted |"
    lines = [
        f"**{case.group}**: {case.name} ({timing} time, {rounds} rounds)",
        "",
        f"| | time | ratio {last}",
        "|---|---|---|---|---|",
    ]
    for name, row in case.rows.items():
        ratio, seconds = row["ratio"], row["seconds"]["median"]
        if rates:
            cells = [_number(row["extra"].get("tokens_per_second")), _memory(row["extra"])]
        elif row["roofline_seconds"] is None:
            cells = ["-", "-"]
        else:
            predicted = row["roofline_seconds"]
            cells = [_duration(predicted), f"{seconds / predicted:.2f}"]
        of = " (baseline)" if name == row["baseline"] else ""
        if row["extra"].get("extrapolated"):
            steps, every = row["extra"]["timed_steps"], row["extra"]["all_steps"]
            of += f" (extrapolated from {steps} of {every} steps)"
        lines.append(
            f"| {name}{of} | {_duration(seconds)} | {ratio['median']:.2f}x [{ratio['q1']:.2f}, "
            f"{ratio['q3']:.2f}] | {cells[0]} | {cells[1]} |"
        )
    return [*lines, ""]


def _skipped(document: Mapping[str, Any]) -> list[str]:
    reasons: dict[tuple[str, str, str], int] = {}
    for entry in document["skipped"]:
        reason = f"failed: {entry['reason']}" if entry.get("failed") else entry["reason"]
        key = (entry["group"], entry["candidate"], reason)
        reasons[key] = reasons.get(key, 0) + 1
    if not reasons:
        return []
    return [
        "Not run here:",
        "",
        *(
            f"- {group}: {candidate}: {reason}" + (f" ({count} cases)" if count > 1 else "")
            for (group, candidate, reason), count in reasons.items()
        ),
        "",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _memory(extra: Mapping[str, Any]) -> str:
    peak = extra.get("peak_memory_bytes")
    return "-" if peak is None else f"{peak / 2**20:,.0f} MiB"


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds:,.0f} s"
    return f"{seconds * 1e6:.3g} µs"


def _times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def _range(spread: Spread) -> str:
    return f"[{_times(spread.q1)[:-1]}, {_times(spread.q3)[:-1]}]"


# Figures

#: Which case of a group is drawn in the ratio bars: the first whose shape has these entries.
_DRAWN = (
    ("collect", {"groups": "both groups"}),
    ("deletion", {"request": "one user"}),
    ("attenuate", {}),
    ("attenuate_wall", {"weights": "Llama-2-7B"}),
    ("scores", {}),
    ("linear_hooks", {}),
    ("linear_forward", {}),
    ("linear_forward_backward", {}),
)


def device_figures(results: Results, device: str) -> list[Figure]:
    """The figures of one device; none where there is nothing to show."""
    cases = results.cases.get(device, [])
    made = [_ratios(cases, device), _roofline(cases, device), _scaling(cases, device)]
    return [figure for figure in made if figure is not None]


def _ratios(cases: Sequence[Case], device: str) -> Figure | None:
    shown = [case for group, where in _DRAWN if (case := find(cases, group, where))]
    entries = []
    for case in shown:
        bars = [
            [name, spread.median, spread.q1, spread.q3]
            for name, spread in against_peers(case).items()
        ]
        if bars:
            entries.append({"title": f"{case.group}: {_short(case)}", "bars": bars})
    if not entries:
        return None
    title = f"How many times faster ucan_fast is than its peers ({DEVICES[device]})"
    data = {"title": title, "cases": entries, "caption": _caption(shown)}
    return Figure(f"bench-{device}-ratios", data, figures.draw_ratios)


def _short(case: Case) -> str:
    row = next(iter(case.rows.values()))
    hidden = ("k", "n", "elements", "changed", "neurons", "users")
    shape = {key: value for key, value in case.shape.items() if key not in hidden}
    return case_name(shape, row["dtype"], row["adapter_dtype"])


def _roofline(cases: Sequence[Case], device: str) -> Figure | None:
    points, shown = [], []
    for case in cases:
        for name, row in case.rows.items():
            if not row["bytes"] or not row["flops"]:
                continue
            points.append(
                {
                    "group": case.group,
                    "ours": name.startswith(OURS),
                    "intensity": row["flops"] / row["bytes"],
                    "rate": row["flops"] / row["seconds"]["median"],
                }
            )
            shown.append(case)
    ceilings = next((one.environment.get("ceilings") for one in shown), None)
    if not points or ceilings is None:
        return None
    # What products are made in here; fp64 is in scores alone, which has no product.
    dtypes = {row["dtype"] for case in shown for row in case.rows.values()} - {"float64"}
    rates = {name: rate for name, rate in ceilings["flops"].items() if name in dtypes}
    data = {
        "title": f"Achieved operations per second below the measured ceilings ({DEVICES[device]})",
        "ceilings": {"bandwidth": ceilings["bandwidth"], "flops": rates},
        "points": points,
        "caption": _caption(shown),
    }
    return Figure(f"bench-{device}-roofline", data, figures.draw_roofline)


def _scaling(cases: Sequence[Case], device: str) -> Figure | None:
    shown = _most_varied([case for case in cases if case.group == "scaling"])
    drawn = _panels([row for case in shown for row in case.rows.values()])
    if not drawn:
        return None
    title = f"How the time of a deletion request grows ({DEVICES[device]})"
    data = {"title": title, "panels": drawn, "caption": _caption(shown)}
    return Figure(f"bench-{device}-scaling", data, figures.draw_scaling)


def _most_varied(cases: Sequence[Case]) -> list[Case]:
    """Those of the model that most sizes were varied of; docs/benchmarks.md has the others."""
    sizes: dict[str, set[str]] = {}
    for case in cases:
        sizes.setdefault(case.shape["model"], set()).add(case.shape["varied"])
    most = max(sizes, key=lambda model: len(sizes[model]), default=None)
    return [case for case in cases if case.shape["model"] == most]


_ALONG = {
    "forget_tokens": "tokens of the forget set",
    "tokens": "tokens of the whole data set",
    "blocks": "blocks of the model",
    "rank": "rank of the adapter",
}


def _sweeps_left_out(cases: Sequence[Case]) -> list[str]:
    """What the scaling curves do not vary, where there are some."""
    rows = [row for case in cases if case.group == "scaling" for row in case.rows.values()]
    shown = {row["extra"]["slope"]["along"] for row in rows if "slope" in row["extra"]}
    missing = [words for along, words in _ALONG.items() if along not in shown]
    if not shown or not missing:
        return []
    varied = [words for along, words in _ALONG.items() if along in shown]
    text = (
        f"The quick profile varies the {' and the '.join(varied)}; growth with the "
        f"{' and the '.join(missing)} is left out there and measured by `make bench` alone."
    )
    return [_wrapped(text), ""]


def _panels(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    # A panel per sweep: rows whose extra names the same key of the shape as varied.
    sweeps: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if slope := row["extra"].get("slope"):
            sweeps.setdefault((row["shape"]["model"], slope["along"]), []).append(row)
    drawn = []
    for (model, along), mine in sweeps.items():
        curves = []
        for name in dict.fromkeys(row["candidate"] for row in mine):
            swept = [row for row in mine if row["candidate"] == name]
            points = sorted(
                [row["shape"][along], *(row["seconds"][key] for key in ("median", "q1", "q3"))]
                for row in swept
            )
            curves.append(
                {
                    "name": name,
                    "ours": name.startswith(OURS),
                    "points": points,
                    "slope": swept[0]["extra"]["slope"]["value"],
                }
            )
        drawn.append({"title": model, "xlabel": _ALONG.get(along, along), "curves": curves})
    return drawn


def _caption(cases: Sequence[Case]) -> str:
    lines = dict.fromkeys(
        f"{e['hardware']}, {e['threads']} threads, torch {e['torch']}, triton {e['triton']}, peft "
        f"{e['peft']}, commit {targets.short_commit(e)}, {e['date'][:10]}, {e['command']}"
        for e in (case.environment for case in cases)
    )
    return "\n".join(lines)


# Writing and checking


def replaced(readme: str, text: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """The README with another section.

    Raises:
        ValueError: the two markers are not there, once each and in order.
    """
    begin, end = markers
    if (
        readme.count(begin) != 1
        or readme.count(end) != 1
        or readme.index(begin) > readme.index(end)
    ):
        raise ValueError(f"README.md must hold {begin} and, after it, {end}, once each.")
    before, rest = readme.split(begin)
    return f"{before}{begin}\n{text}{end}{rest.split(end)[1]}"


def write(root: Path, results: Results) -> list[Path]:
    """Rewrite the section, the details and the figures; returns what changed."""
    changed = []
    readme = root / "README.md"
    for path, text in (
        (readme, replaced(readme.read_text(), section(results))),
        (root / DETAILS, details(results)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            changed.append(path)
    wanted = [figure for device in DEVICES for figure in device_figures(results, device)]
    for figure in wanted:
        if not figure.is_current(root / "docs"):
            changed.append(figure.write(root / "docs"))
    for path in _leftover(root, wanted):
        path.unlink()
        changed.append(path)
    return changed


def outdated(root: Path, results: Results) -> list[str]:
    """What :func:`write` would change, in words."""
    found = []
    readme = (root / "README.md").read_text()
    if replaced(readme, section(results)) != readme:
        found.append("the performance section of README.md")
    path = root / DETAILS
    if not path.exists() or path.read_text() != details(results):
        found.append(DETAILS)
    wanted = [figure for device in DEVICES for figure in device_figures(results, device)]
    found += [f"docs/{one.name}.png" for one in wanted if not one.is_current(root / "docs")]
    return [*found, *(f"docs/{path.name} (no longer made)" for path in _leftover(root, wanted))]


def _leftover(root: Path, wanted: Sequence[Figure]) -> list[Path]:
    names = {f"{figure.name}.png" for figure in wanted}
    return [path for path in sorted(root.glob("docs/bench-*.png")) if path.name not in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    options = parser.parse_args(arguments)
    try:
        results = load((ROOT / "benchmarks" / "results").glob("*.json"))
        if options.check:
            found = outdated(ROOT, results)
            for name in found:
                print(f"out of date: {name}; run: python -m benchmarks.report")
            return 1 if found else 0
        for path in write(ROOT, results):
            print(f"written: {path.relative_to(ROOT)}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
