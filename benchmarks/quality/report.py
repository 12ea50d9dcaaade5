"""The README's quality section, docs/quality.md and its figures, from the result files.

    python -m benchmarks.quality.report            rewrite them
    python -m benchmarks.quality.report --check    exit code 1 if one of them is out of date

Read are the files of ``quality``, ``delivered``, ``text`` and ``in_a_row`` below
``benchmarks/results``. Nothing in the section is written by hand, and no row is left out of
docs/quality.md because it loses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas

from ..figures import Figure
from ..measure import ROOT
from ..report import replaced
from . import advice, goals, in_a_row, seeds, summary
from .overview import how, overview
from .tables import (
    COLUMNS,
    DETAILS,
    LEGEND,
    Document,
    groups,
    heading,
    key_of,
    load,
    mean,
    table,
)

MARKERS = ("<!-- quality:begin -->", "<!-- quality:end -->")
PAGE = "docs/quality.md"
#: Curves of the figures, and how they are drawn.
STYLES = {
    "influence, several steps": ("#7a0f4e", "-"),
    "influence": ("#0b3c8c", "-"),
    "influence, diagonals": ("#2e9bd6", "-"),
    "gates": ("#1a9e8f", "-"),
    "U-CAN, mlp": ("#e0a000", "-"),
    "U-CAN, input": ("#c8501e", "-"),
    "GradDiff": ("#555555", "--"),
    "NPO": ("#8a5a9e", "--"),
    "SSD": ("#d46a9c", "--"),
    "uniform shrink (control)": ("#b5b0a5", ":"),
}


@dataclass(frozen=True)
class Results:
    """What is committed: curves of the small recommenders, presets as delivered, text prompts,
    requests in a row."""

    curves: Sequence[Document]
    delivered: Sequence[Document] = ()
    texts: Sequence[Document] = ()
    in_a_row: Sequence[Document] = ()


def section(results: Results) -> str:
    """The README's part: what users decide by. The page has all of it."""
    documents = results.curves
    parts = [
        f"**All {len(documents)} cells** (a data set, a request and a seed each: "
        f"{_cells(documents)})\n",
        summary.over_all(documents),
        "Cells: those with a state within 5 % on calibration users. "
        "First: nothing but retraining forgets more at that drop on retained interactions, as far "
        "as its curve goes (the two rows of several steps do not count against each other). The "
        "other columns belong to the strongest state that is within 5 % on calibration users, as "
        "median [range] over the cells, the last two as mean [range]: drop of Recall@10 on "
        "deleted interactions in %, less that of the adapter retrained there; seconds on one "
        "thread, sums of a bank at hand; AUC of the loss attack (0.5: cannot be told apart).\n",
        summary.judged_only(documents),
        summary.asides(documents),
        "**By request**\n",
        summary.by_request(documents, lambda d: f"{d['data_set']}, {d['scenario']}"),
        summary.by_request(results.texts, lambda d: f"{d['model']}, {d['scenario']}")
        if results.texts
        else "",
        "A cell: drop of Recall@10 on deleted training interactions, in %, at a drop of 1 % / 5 % "
        "on retained ones of users that no setting was tuned on; the mean over the seeds (≥: the "
        "curve ends before; in brackets: the first state is beyond it). Bold: the most at 5 % in "
        "the row, retraining aside. Time, medians over the seeds: several steps / the best "
        "baseline / retraining.\n",
    ]
    parts += [_sizes(results.texts) + "\n"] if results.texts else []
    parts += [f"![Forgetting against damage](docs/{f.name}.png)\n" for f in figures(results)[:1]]
    parts += ["**By kind of request**\n", seeds.by_kind(documents, results.texts)]
    parts += ["**What was to be reached**\n", goals.section(documents, results.delivered)]
    parts += [seeds.of_genre(documents), seeds.of_one_user(documents, results.delivered)]
    parts.append(advice.short(results.delivered, documents))
    parts.append(in_a_row.section(results.in_a_row))
    parts.append(
        "All methods, metrics and both protocols, spreads, memory, and the command of every row: "
        f"[{PAGE}]({PAGE}).\n"
    )
    return "\n".join(parts)


def _cells(documents: Sequence[Document]) -> str:
    """How many requests of how many seeds each data set has, and where they were run."""
    counts = []
    for data_set in dict.fromkeys(document["data_set"] for document in documents):
        mine = [document for document in documents if document["data_set"] == data_set]
        seeds = list(dict.fromkeys(str(document["seed"]) for document in mine))
        counts.append(f"{data_set} {len(mine)}, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}")
    return "; ".join([*counts, how(documents)])


def overviews(documents: Sequence[Document]) -> str:
    """All methods of each data set, requests side by side."""
    parts = []
    for data_set in dict.fromkeys(document["data_set"] for document in documents):
        together = {
            request: found
            for (name, request), found in groups(documents).items()
            if name == data_set
        }
        parts.append(overview(data_set, together))
    parts.append(
        "A cell: drop of Recall@10 on deleted training interactions, in %, at a drop of 1 % / 5 % "
        "on retained ones of users that no setting was tuned on; the mean over the seeds. Bold: "
        "the most at 5 %, retraining aside. Times, medians over the seeds, are those to the "
        "strongest state within 5 % on calibration users, one thread, sums of a bank at hand. In "
        "the step's (the steps') time: what it forgets in the state within 5 %, and what the best "
        "baseline that trains has forgotten after as many seconds, between its states, within 5 % "
        "as well.\n"
    )
    return "\n".join(parts)


def text_section(texts: Sequence[Document]) -> str:
    """SmolLM2 on text prompts, as :func:`overviews` has the others."""
    parts = [overview(title, together) for title, together in _by_model(texts).items()]
    if parts:
        parts.append(_sizes(texts) + "\n")
    return "\n".join(parts)


def _sizes(texts: Sequence[Document]) -> str:
    """What the reduced case leaves of SmolLM2 and the data."""
    profile = texts[0]["recipe"]["profile"]
    blocks = f"the last {profile['blocks']} of 30 blocks" if profile["blocks"] else "all blocks"
    counts = dict.fromkeys(
        f"{text['scenario']}, seed {text['seed']}: {text['cases']['forget']} and "
        f"{text['cases']['retain']}"
        for text in texts
    )
    fewest = min(text["cases"]["forget"] for text in texts)
    return (
        "Text prompts: drops of MRR@10 among each prompt's candidates. "
        f"The {profile['name']} case: adapters in {blocks}, the head cut to the answers, "
        f"{texts[0]['interactions']['users']} users, {profile['candidates']} candidates a prompt, "
        f"titles of {profile['title_tokens']} tokens. Deleted and retained prompts judged: "
        f"{'; '.join(counts)}. A prompt is up to {100 / fewest:.1f} % of one seed's deleted side, "
        "and smaller differences say nothing."
    )


def _by_model(texts: Sequence[Document]) -> dict[str, dict[str, list[Document]]]:
    """What one model is called -> request -> its files, one per seed."""
    found: dict[str, dict[str, list[Document]]] = {}
    for text in texts:
        title = (
            f"{text['model']}; {text['recipe']['profile']['name']} text prompts of "
            f"{text['data_set']}"
        )
        found.setdefault(title, {}).setdefault(text["scenario"], []).append(text)
    return found


def page(results: Results) -> str:
    """docs/quality.md."""
    documents = results.curves
    parts = [
        "# Unlearning quality, every method\n",
        "Generated by `python -m benchmarks.quality.report` from the files below "
        "`benchmarks/results`.\n",
        LEGEND + "\n",
        "## All methods, by data set\n",
        overviews(documents),
        _pictures(figures(Results(documents))),
        "## Presets and advice\n",
        advice.section(results.delivered, documents),
        "## Text prompts\n",
        text_section(results.texts),
        _pictures(figures(Results((), texts=results.texts))),
    ]
    cases = [*groups(documents).values()]
    cases += [
        found for requests in _by_model(results.texts).values() for found in requests.values()
    ]
    for together in cases:
        parts.append(f"## {heading(together)}\n")
        parts.append("\n".join(table(together, COLUMNS)) + "\n")
        bank = _bank(together)
        parts.append(f"Sums of a bank, made once for all requests: {bank}.\n" if bank else "")
        parts.append("<details><summary>Recommendations at the same states</summary>\n")
        parts.append("\n".join(table(together, DETAILS)) + "\n")
        parts.append("</details>\n")
        parts += [f"- {_provenance(document)}" for document in together]
        parts += _endings(together)
        parts.append("")
    return "\n".join(parts)


def _pictures(shown: Sequence[Figure]) -> str:
    return "\n".join(f"![{f.data['title']}]({f.name}.png)\n" for f in shown)


def _bank(documents: Sequence[Document]) -> str:
    names = dict.fromkeys(name for document in documents for name in document["bank_seconds"])
    found = {
        n: mean([d["bank_seconds"][n] for d in documents if n in d["bank_seconds"]]) for n in names
    }
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.items())


def _endings(documents: Sequence[Document]) -> list[str]:
    """Which methods say themselves why there are no further states, after how many."""
    return [
        f"- seed {document['seed']}: {name} ended after {len(row['curves'][row['best']])} of its "
        f"states: {row['ended']}"
        for document in documents
        for name, row in document["methods"].items()
        if row.get("ended")  # not in files of before
    ]


def _provenance(document: Document) -> str:
    where = document["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "peft", "transformers"))
    return (
        f"seed {document['seed']}: {where['hardware']}, {where['threads']} thread(s), {versions}, "
        f"commit {where['commit']}, {where['date'][:10]}, {document['total_seconds']:.0f} s, "
        f"`{document['command']}`"
        + "".join(
            f"; {', '.join(later['methods'])} measured later: commit "
            f"{later['environment']['commit']}, {later['environment']['date'][:10]}, "
            f"{later['total_seconds']:.0f} s, `{later['command']}`"
            for later in document.get("later", ())
        )
    )


def figures(results: Results) -> list[Figure]:
    """One per data set: a panel per scenario; and one of the text prompts."""
    found = []
    for data_set in dict.fromkeys(document["data_set"] for document in results.curves):
        panels = [
            _panel(scenario, together)
            for (name, scenario), together in groups(results.curves).items()
            if name == data_set
        ]
        title = f"{data_set}: Recall@10 on training interactions"
        found.append(Figure(f"quality-{data_set}", {"title": title, "panels": panels}, _draw))
    panels = [
        _panel(f"{together[0]['model']}, {scenario}".replace("SmolLM2-135M, ", ""), together)
        for requests in _by_model(results.texts).values()
        for scenario, together in requests.items()
    ]
    if panels:
        title = "SmolLM2-135M: MRR@10 on text prompts"
        found.append(Figure("quality-text", {"title": title, "panels": panels}, _draw))
    return found


def _panel(title: str, together: Sequence[Document]) -> dict[str, Any]:
    curves = _curves(together)
    return {"scenario": title, "curves": curves, "left": _left(curves)}


def _curves(documents: Sequence[Document]) -> dict[str, list[list[list[float]]]]:
    curves: dict[str, list[list[list[float]]]] = {}
    for document in documents:
        for name in STYLES:
            row = document["methods"].get(name, {})
            if "curves" in row:
                points = row["curves"][row["best"]]
                drops = [[p[2]["retain"], p[2]["forget"]] for p in points]
                curves.setdefault(name, []).append([[0.0, 0.0], *drops])
    return curves


def _left(curves: Mapping[str, list[list[list[float]]]]) -> float:
    """Where the axis begins: retained items may be ranked better after an edit than before."""
    gains = [x for lines in curves.values() for line in lines for x, _ in line]
    return min(-1.5, max(-45.0, min(gains, default=0.0) - 0.5))


def _draw(canvas: Canvas, data: Mapping[str, Any]) -> None:
    panels = data["panels"]
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = -(-len(panels) // columns)
    canvas.set_size_inches(4.6 * columns, 3.8 * rows + 0.9)
    axes = canvas.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        for name, (colour, style) in STYLES.items():
            for index, curve in enumerate(panel["curves"].get(name, [])):
                x, y = zip(*curve, strict=True)
                label = name if index == 0 else None
                axis.plot(x, y, style, color=colour, linewidth=1.5, label=label, alpha=0.85)
        axis.plot([-45, 10], [-45, 10], color="0.8", linewidth=0.8, zorder=0)
        axis.set_xlim(panel["left"], 9)
        axis.locator_params("x", nbins=7)  # more of them touch
        axis.set_ylim(-5, 100)
        axis.set_title(panel["scenario"], fontsize=11)
        axis.grid(color="0.93")
        axis.set_xlabel("drop on retained interactions, %", fontsize=9)
        axis.set_ylabel("drop on deleted ones, %", fontsize=9)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    labels = {}
    for axis in axes[: len(panels)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    canvas.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=5, fontsize=8.5)
    canvas.suptitle(f"{data['title']}, one line per seed")


def read(folder: Path) -> Results:
    """The files below ``benchmarks/results``.

    Raises:
        ValueError: a file holds something else, or presets were delivered on another adapter than
            the curves beside them.
    """
    results = Results(
        load((folder / "quality").glob("*.json")),
        load((folder / "delivered").glob("*.json"), holding="presets"),
        load((folder / "text").glob("*.json")),
        load((folder / "in_a_row").glob("*.json"), holding="requests"),
    )
    _check_adapters(results)
    return results


def _check_adapters(results: Results) -> None:
    """Presets are held against curves: of another adapter (the same recipe and seed on another CPU
    give one) these would say nothing of them."""
    curves = {key_of(document): document["before"] for document in results.curves}
    for document in results.delivered:
        ours, theirs = document["before"], curves.get(key_of(document), {})
        if any(abs(ours[name] - theirs[name]) > 1e-9 for name in ours.keys() & theirs.keys()):
            name = "-".join(map(str, key_of(document)))
            raise ValueError(
                f"{name}: the presets were delivered on another adapter than the curves are of (it "
                "recommends otherwise before any edit); run both where one cache holds the adapter."
            )


def _texts(root: Path, results: Results) -> dict[Path, str]:
    readme = root / "README.md"
    return {
        readme: replaced(readme.read_text(), section(results), MARKERS),
        root / PAGE: page(results),
    }


def write(root: Path, results: Results) -> list[Path]:
    """Rewrite section, page and figures; returns what changed."""
    changed = []
    for path, text in _texts(root, results).items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            changed.append(path)
    for figure in figures(results):
        if not figure.is_current(root / "docs"):
            changed.append(figure.write(root / "docs"))
    return changed


def outdated(root: Path, results: Results) -> list[str]:
    """What :func:`write` would change."""
    texts = _texts(root, results).items()
    found = [path.name for path, text in texts if not path.exists() or path.read_text() != text]
    return found + [f.name for f in figures(results) if not f.is_current(root / "docs")]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.report", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    options = parser.parse_args(arguments)
    try:
        results = read(ROOT / "benchmarks" / "results")
        if options.check:
            found = outdated(ROOT, results)
            for name in found:
                print(f"out of date: {name}; run: python -m benchmarks.quality.report")
            return 1 if found else 0
        for path in write(ROOT, results):
            print(f"written: {path.relative_to(ROOT)}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
