"""One table per data set: all methods, requests side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .runner import BUDGET, marked
from .tables import Document, mean

#: Rows of an overview; the tables of single requests have all methods.
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

RETRAINING = "retraining"


def overview(title: str, together: Mapping[str, Sequence[Document]]) -> str:
    """One row per method, a column per request.

    Args:
        title: stands above it.
        together: request -> its files, one per seed.
    """
    every = list(together.values())
    seeds = "; ".join(
        f"{request} {', '.join(str(d['seed']) for d in found)}"
        for request, found in together.items()
    )
    lines = [
        f"**{title}** (seeds: {seeds}; {how([d for found in every for d in found])})\n",
        "| | " + " | ".join(together) + " |",
        "|---|" + "---|" * len(together),
    ]
    best = [max(SHOWN, key=lambda name: rank(found, name)) for found in every]
    for name in SHOWN:
        cells = [
            f"**{pair(found, name)}**"
            if 0 < rank(found, name) == rank(found, first)
            else pair(found, name)
            for found, first in zip(every, best, strict=True)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| retraining, forget drop | " + " | ".join(map(retrained, every)) + " |")
    costs = [
        " / ".join(seconds(found, name) for name in (first, "GradDiff", RETRAINING))
        for found, first in zip(every, best, strict=True)
    ]
    lines.append("| time, s: the best / GradDiff / retraining | " + " | ".join(costs) + " |")
    for text, name in (
        ("in the step's time: influence / best trained one", "influence"),
        ("in the steps' time: several steps / best trained one", "influence, several steps"),
    ):
        equal = [_in_equal_time(found, name) for found in every]
        lines.append(f"| {text} | " + " | ".join(equal) + " |")
    return "\n".join(lines) + "\n"


def at_budget(
    documents: Sequence[Document], name: str, budget: float
) -> tuple[float | None, list[str]]:
    """Mean forget drop of a method at this retain drop, and how each is known."""
    rows = [document["methods"].get(name, {}).get("at_budget") for document in documents]
    found = [row[f"{budget:g}"] for row in rows if row]
    return mean([value for value, _ in found]), [known for _, known in found]


def rank(documents: Sequence[Document], name: str) -> float:
    """What methods are ordered by: the mean forget drop at a retain drop of 5 %."""
    value, _ = at_budget(documents, name, 5)
    return -math.inf if value is None else value


def pair(documents: Sequence[Document], name: str) -> str:
    """``drop at 1 % / drop at 5 %``, each marked with how it is known."""
    cells = []
    for budget in (1, 5):
        value, known = at_budget(documents, name, budget)
        if value is not None:
            cells.append(marked(f"{value:.1f}", *known))
    return " / ".join(cells) or "-"


def retrained(documents: Sequence[Document]) -> str:
    """The gold standard's forget drop (and retain drop); ``-`` where it is not there."""
    rows = [document["methods"].get(RETRAINING, {}).get("drops") for document in documents]
    known = [row for row in rows if row]
    forget = mean([row["forget"] for row in known])
    retain = mean([row["retain"] for row in known])
    return "-" if forget is None else f"{forget:.0f} (retain {retain:.1f})"


def seconds(documents: Sequence[Document], name: str) -> str:
    """From the request to the state that is measured in full; the median over the seeds."""
    taken = [document["methods"].get(name, {}).get("seconds") for document in documents]
    known = [one for one in taken if one is not None]
    if not known:
        return "-"
    middle = statistics.median(known)
    return f"{middle:.{2 if middle < 1 else 1 if middle < 10 else 0}f}"


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


def how(documents: Sequence[Document]) -> str:
    """Hardware, and what makes a measurement less than full, of all files."""
    words = list(dict.fromkeys(document["environment"]["hardware"] for document in documents))
    for text, those in (
        ("coarse curves", [document["coarse"] for document in documents]),
        ("a share of the users", [document.get("share", 1.0) != 1 for document in documents]),
    ):
        if any(those):
            words.append(text if all(those) else f"{text} in {sum(those)} of {len(those)} files")
    return ", ".join(words)
