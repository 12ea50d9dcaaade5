"""The README's quality section, docs/quality.md and its figures, from the result files.

    python -m benchmarks.quality.report            rewrite them
    python -m benchmarks.quality.report --check    exit code 1 if one of them is out of date

Read are the files of ``quality``, ``delivered`` and ``text`` below ``benchmarks/results``. Nothing
in the section is written by hand, and no row is left out of docs/quality.md because it loses.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas

from ..figures import Figure
from ..measure import ROOT
from ..report import replaced
from . import advice, goals
from .runner import BUDGET, marked
from .tables import (
    COLUMNS,
    DETAILS,
    LEGEND,
    Document,
    groups,
    heading,
    load,
    mean,
    table,
)

MARKERS = ("<!-- quality:begin -->", "<!-- quality:end -->")
PAGE = "docs/quality.md"
#: The README's rows; docs/quality.md has all of them.
SHOWN = (
    "influence, several steps",
    "influence, several steps, a fifth of D_r each",
    "influence",
    "influence, B only",
    "influence, last blocks",
    "influence, diagonals",
    "gates",
    "U-CAN, mlp",
    "U-CAN, input",
    "U-CAN, mlp, w/o H (hard pruning)",
    "GradDiff",
    "NPO",
    "gradient ascent",
    "SSD",
    "LLM-Eraser-style (adapter)",
    "one plain gradient step",
    "uniform shrink (control)",
    "random neurons (control)",
)
#: Baselines that train the adapter, each state after so many steps.
TRAINED = ("GradDiff", "GradDiff (KL)", "NPO", "gradient ascent")
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
    """What is committed: curves of the small recommenders, presets as delivered, text prompts."""

    curves: Sequence[Document]
    delivered: Sequence[Document] = ()
    texts: Sequence[Document] = ()


def section(results: Results) -> str:
    """The README's part."""
    documents = results.curves
    parts = []
    for data_set in dict.fromkeys(document["data_set"] for document in documents):
        together = {
            scenario: found
            for (name, scenario), found in groups(documents).items()
            if name == data_set
        }
        parts.append(_overview(data_set, together))
    parts.append(
        "A cell: drop of Recall@10 on deleted training interactions, in %, at a drop of 1 % / 5 % "
        "on retained ones of users that nothing was tuned on; the mean over the seeds. Bold: the "
        "most at 5 %, retraining aside. Times, medians over the seeds, are those to the strongest "
        "state within 5 % on calibration users, one thread, sums of a bank at hand. "
        "In the step's (the steps') time: what it forgets in the state within 5 %, and what the "
        "best baseline that trains has forgotten after as many seconds, between its states, within "
        "5 % as well. All "
        f"methods, all metrics, both protocols, spreads, times and memory: [{PAGE}]({PAGE}).\n"
    )
    parts += [f"![Forgetting against damage](docs/{f.name}.png)\n" for f in figures(documents)[:1]]
    parts.append(goals.section(documents, results.delivered))
    parts.append(advice.section(results.delivered, documents))
    parts.append(text_section(results.texts))
    return "\n".join(parts)


def _overview(title: str, together: Mapping[str, Sequence[Document]]) -> str:
    """One row per method, scenarios side by side."""
    scenarios = list(together)
    seeds = {s: ", ".join(str(d["seed"]) for d in found) for s, found in together.items()}
    lines = [
        f"**{title}** (seeds: "
        + "; ".join(f"{s} {seeds[s]}" for s in scenarios)
        + f"; {_how(together)})\n"
    ]
    lines.append("| | " + " | ".join(scenarios) + " |")
    lines.append("|---|" + "---|" * len(scenarios))
    values = {
        name: [tuple(_at(together[s], name, budget)[0] for budget in (1, 5)) for s in scenarios]
        for name in SHOWN
    }
    best = [
        max((cells[i][1] for cells in values.values() if cells[i][1] is not None), default=None)
        for i in range(len(scenarios))
    ]
    for name, cells in values.items():
        shown = []
        for i, (at_1, at_5) in enumerate(cells):
            marks = [_at(together[scenarios[i]], name, budget)[1] for budget in (1, 5)]
            pair = [
                marked(f"{at:.1f}", *known)
                for at, known in zip((at_1, at_5), marks, strict=True)
                if at is not None
            ]
            text = " / ".join(pair) or "-"
            shown.append(f"**{text}**" if at_5 is not None and at_5 == best[i] else text)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    costs = []
    for index, scenario in enumerate(scenarios):
        winner = next((n for n, cells in values.items() if cells[index][1] == best[index]), "")
        taken = [_seconds(together[scenario], name) for name in (winner, "GradDiff", "retraining")]
        costs.append(" / ".join(_shown(one) for one in taken))
    gold = []
    for scenario in scenarios:
        rows = [d["methods"].get("retraining", {}).get("drops") for d in together[scenario]]
        known = [row for row in rows if row]
        forget = mean([row["forget"] for row in known])
        retain = mean([row["retain"] for row in known])
        gold.append("-" if forget is None else f"{forget:.0f} (retain {retain:.1f})")
    lines.append("| retraining, forget drop | " + " | ".join(gold) + " |")
    lines.append("| time, s: the best / GradDiff / retraining | " + " | ".join(costs) + " |")
    for title, name in (
        ("in the step's time: influence / best trained one", "influence"),
        ("in the steps' time: several steps / best trained one", "influence, several steps"),
    ):
        equal = [_in_equal_time(together[scenario], name) for scenario in scenarios]
        lines.append(f"| {title} | " + " | ".join(equal) + " |")
    return "\n".join(lines) + "\n"


def _in_equal_time(documents: Sequence[Document], name: str) -> str:
    """Forget drops of a method's state, and of the best state that any baseline which trains has
    reached by then, both within the budget on calibration; means over the seeds."""
    ours, theirs = [], []
    for document in documents:
        step = document["methods"].get(name, {})
        if "seconds" not in step:
            continue
        reached = [
            _reached(curve, step["seconds"])
            for trained in TRAINED
            for curve in document["methods"].get(trained, {}).get("curves", ())
        ]
        ours.append(step["drops"]["forget"])
        theirs.append(max([0.0, *reached]))
    return f"{mean(ours):.0f} / {mean(theirs):.0f}" if ours else "-"


def _reached(curve: Sequence[Sequence[Any]], seconds: float) -> float:
    """The most that a curve has forgotten by then within the budget on calibration; on the
    straight line to the next state, where that one is within the budget as well."""
    most, last = 0.0, (0.0, 0.0)
    for _, at, drops in curve:
        if not drops["calibration"] <= BUDGET:
            break
        if at > seconds:
            share = (seconds - last[0]) / (at - last[0])
            return max(most, last[1] + share * (drops["forget"] - last[1]))
        last = (at, drops["forget"])
        most = max(most, drops["forget"])
    return most


def _how(together: Mapping[str, Sequence[Document]]) -> str:
    """Hardware, and what makes a measurement less than full, of all files."""
    every = [document for found in together.values() for document in found]
    words = list(dict.fromkeys(document["environment"]["hardware"] for document in every))
    for text, those in (
        ("coarse curves", [document["coarse"] for document in every]),
        ("a share of the users", [document.get("share", 1.0) != 1 for document in every]),
    ):
        if any(those):
            words.append(text if all(those) else f"{text} in {sum(those)} of {len(those)} files")
    return ", ".join(words)


def text_section(texts: Sequence[Document]) -> str:
    """SmolLM2 on text prompts, as :func:`_overview` has the others."""
    parts = [
        _overview(title, {document["scenario"]: [document] for document in together})
        for title, together in _by_model(texts).items()
    ]
    if parts:
        parts.append(_sizes(texts[0]) + "\n")
    return "\n".join(parts)


def _sizes(text: Document) -> str:
    """What the reduced case leaves of SmolLM2 and the data."""
    profile = text["recipe"]["profile"]
    blocks = f"the last {profile['blocks']} of 30 blocks" if profile["blocks"] else "all blocks"
    return (
        "Drops of MRR@10 among each prompt's candidates. "
        f"The {profile['name']} case: adapters in {blocks}, the head cut to the answers, "
        f"{text['interactions']['users']} users, {profile['candidates']} candidates a prompt, "
        f"titles of {profile['title_tokens']} tokens, {text['cases']['forget']} deleted and "
        f"{text['cases']['retain']} retained prompts judged: a prompt is "
        f"{100 / text['cases']['forget']:.1f} % of the deleted side, and smaller differences say "
        "nothing."
    )


def _by_model(texts: Sequence[Document]) -> dict[str, list[Document]]:
    found: dict[str, list[Document]] = {}
    for text in texts:
        title = (
            f"{text['model']}; {text['recipe']['profile']['name']} text prompts of "
            f"{text['data_set']}"
        )
        found.setdefault(title, []).append(text)
    return found


def _at(documents: Sequence[Document], name: str, budget: float) -> tuple[float | None, list[str]]:
    rows = [document["methods"].get(name, {}).get("at_budget") for document in documents]
    found = [row[f"{budget:g}"] for row in rows if row]
    return mean([value for value, _ in found]), [known for _, known in found]


def _shown(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.{2 if seconds < 1 else 1 if seconds < 10 else 0}f}"


def _seconds(documents: Sequence[Document], name: str) -> float | None:
    """From the request to the state that is measured in full; the median over the seeds."""
    taken = [document["methods"].get(name, {}).get("seconds") for document in documents]
    known = [seconds for seconds in taken if seconds is not None]
    return statistics.median(known) if known else None


def page(results: Results) -> str:
    """docs/quality.md."""
    documents = results.curves
    parts = [
        "# Unlearning quality, every method\n",
        "Generated by `python -m benchmarks.quality.report` from `benchmarks/results/quality`.\n",
        LEGEND + "\n",
        "## Presets and advice\n",
        advice.section(results.delivered, documents),
        "## Text prompts\n",
        text_section(results.texts),
    ]
    cases = [*groups(documents).values(), *([text] for text in results.texts)]
    for together in cases:
        parts.append(f"## {heading(together)}\n")
        parts.append("\n".join(table(together, COLUMNS)) + "\n")
        bank = _bank(together)
        parts.append(f"Sums of a bank, made once for all requests: {bank}.\n" if bank else "")
        parts.append("<details><summary>Recommendations at the same states</summary>\n")
        parts.append("\n".join(table(together, DETAILS)) + "\n")
        parts.append("</details>\n")
        parts += [f"- {_provenance(document)}" for document in together]
        parts.append("")
    return "\n".join(parts)


def _bank(documents: Sequence[Document]) -> str:
    names = dict.fromkeys(name for document in documents for name in document["bank_seconds"])
    found = {
        n: mean([d["bank_seconds"][n] for d in documents if n in d["bank_seconds"]]) for n in names
    }
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.items())


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


def figures(documents: Sequence[Document]) -> list[Figure]:
    """One per data set: a panel per scenario."""
    found = []
    for data_set in dict.fromkeys(document["data_set"] for document in documents):
        panels = []
        for (name, scenario), together in groups(documents).items():
            if name == data_set:
                curves = _curves(together)
                panels.append({"scenario": scenario, "curves": curves, "left": _left(curves)})
        found.append(Figure(f"quality-{data_set}", {"data_set": data_set, "panels": panels}, _draw))
    return found


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
    canvas.suptitle(f"{data['data_set']}: Recall@10 on training interactions, one line per seed")


def read(folder: Path) -> Results:
    """The files below ``benchmarks/results``.

    Raises:
        ValueError: a file holds something else.
    """
    return Results(
        load((folder / "quality").glob("*.json")),
        load((folder / "delivered").glob("*.json"), holding="presets"),
        load((folder / "text").glob("*.json")),
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
    for figure in figures(results.curves):
        if not figure.is_current(root / "docs"):
            changed.append(figure.write(root / "docs"))
    return changed


def outdated(root: Path, results: Results) -> list[str]:
    """What :func:`write` would change."""
    texts = _texts(root, results).items()
    found = [path.name for path, text in texts if not path.exists() or path.read_text() != text]
    return found + [f.name for f in figures(results.curves) if not f.is_current(root / "docs")]


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
