"""The comparison in short, for the README: over all cells, by request, and the presets.

A cell is one result file: a data set, a request and a seed. What is left out here stands in
docs/quality.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from ucan_fast.config import PRESETS

from .overview import RETRAINING, at_budget, pair, rank, retrained, seconds
from .tables import Document, exposure, key_of, mean

STEPS, FIFTH, STEP = (
    "influence, several steps",
    "influence, several steps, a fifth of D_r each",
    "influence",
)
SHRINKING = "uniform shrink (control)"
#: Data sets and seeds, beside seed 0 of all, that the several steps' constants were chosen on.
CHOSEN_ON = (("ml-latest-small", 2), ("pantry", 2))
#: As their authors describe them; what else there is, is ours, U-CAN's or a control.
BASELINES = (
    "GradDiff",
    "GradDiff (KL)",
    "NPO",
    "gradient ascent",
    "SSD",
    "LLM-Eraser-style (adapter)",
)
#: Rows of :func:`over_all`.
ROWS = (
    RETRAINING,
    STEPS,
    FIFTH,
    STEP,
    "influence, diagonals",
    "gates",
    "U-CAN, mlp",
    "U-CAN, input",
    "GradDiff",
    "NPO",
    "gradient ascent",
    "SSD",
    "LLM-Eraser-style (adapter)",
    SHRINKING,
    "random neurons (control)",
)


def over_all(documents: Sequence[Document]) -> str:
    """A row per method, each figure over all cells that have it."""
    lines = [
        "| | cells | first at 1 % | first at 5 % | forget drop less retraining's | retain drop, % "
        "| time, s | MIA AUC | held-out Recall@10 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    before = [{"metrics": document["before"]} for document in documents]
    lines.append(
        "| before | - | - | - | - | - | - | "
        + " | ".join(_known(list(zip(documents, before, strict=True))))
        + " |"
    )
    for name in ROWS:
        rows = [(d, d["methods"][name]) for d in documents if "drops" in d["methods"].get(name, {})]
        if not rows:
            continue
        places = ["-", "-"]
        if name != RETRAINING:
            places = [str(sum(is_first(d, name, budget) for d, _ in rows)) for budget in (1, 5)]
        cells = [
            *places,
            _spread([_less_retraining(d, row) for d, row in rows], statistics.median, 0),
            _spread([row["drops"]["retain"] for _, row in rows], statistics.median, 1),
            _spread([row["seconds"] for _, row in rows], statistics.median, 1),
            *_known(rows),
        ]
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _is_bound(document: Document, budget: float) -> bool:
    """Whether no curve of the best baseline goes through this retain drop: it ended before, or
    its first state is beyond."""

    def drop(name: str) -> float:
        value, _ = at_budget([document], name, budget)
        return -math.inf if value is None else value

    _, known = at_budget([document], max(BASELINES, key=drop), budget)
    return known != ["between"]


def judged_only(documents: Sequence[Document]) -> str:
    """How far the counts are to be trusted: curves that end early, and cells of other seeds than
    those that constants were chosen on."""
    others = [
        document
        for document in documents
        if document["seed"] != 0 and (document["data_set"], document["seed"]) not in CHOSEN_ON
    ]
    if not others:
        return ""
    counts = [sum(is_first(document, STEPS, budget) for document in others) for budget in (1, 5)]
    bounds = []
    for budget in (1, 5):
        firsts = [document for document in documents if is_first(document, STEPS, budget)]
        short = sum(_is_bound(document, budget) for document in firsts)
        bounds.append(f"at {budget} % in {short} of {len(firsts)}")
    return (
        "Where several steps are first, the best baseline's curve may have ended before that drop "
        f"or begun beyond it ({', '.join(bounds)}): it might forget more.\n\n"
        "The several steps' constants were chosen on seed 0 of all data sets, and on "
        f"{' and '.join(f'seed {seed} of {name}' for name, seed in CHOSEN_ON)}: of the "
        f"{len(others)} other cells "
        f"they are first in {counts[0]} at 1 % and in {counts[1]} at 5 %.\n"
    )


def asides(documents: Sequence[Document]) -> str:
    """What the table does not show: when several steps are slower than retraining, and what gates
    are worth."""
    kinds = dict.fromkeys(document["scenario"] for document in documents)
    counts = {}
    for kind in kinds:
        ratios = [
            mine / theirs
            for document in documents
            if document["scenario"] == kind
            for mine, theirs in [[_time(document, name) for name in (STEPS, RETRAINING)]]
            if mine is not None and theirs
        ]
        slower = sum(ratio > 1 for ratio in ratios)
        if slower:
            counts[kind] = (
                f"{slower} of {len(ratios)} cells of {kind} (up to {max(ratios):.1f} times)"
            )
    text = "Several steps took longer than retraining in "
    text += f"{', '.join(counts.values())}." if counts else "no cell."
    rivals = ("gradient ascent", "one plain gradient step", "influence, diagonals")
    beaten = []
    for rival in rivals:
        pairs = [
            [at_budget([document], name, 5)[0] for name in ("gates", rival)]
            for document in documents
        ]
        both = [(mine, theirs) for mine, theirs in pairs if None not in (mine, theirs)]
        if both:
            more = sum(mine > theirs for mine, theirs in both)
            beaten.append(f"{rival} in {more} of {len(both)} cells")
    if beaten:
        text += (
            f" Gates forget more at 5 % than {', than '.join(beaten)}: they are the strongest "
            "*attenuation* (factors of at most 1), not the strongest edit of their cost."
        )
    return text + "\n"


def _time(document: Document, name: str) -> float | None:
    return document["methods"].get(name, {}).get("seconds")


def _known(rows: Sequence[tuple[Document, Mapping]]) -> list[str]:
    """Membership inference and held-out recommendations: means, as AUCs have no tail."""
    heldout = [row["metrics"].get("retain_test/recall@10") for _, row in rows]
    return [_spread([exposure(d, row) for d, row in rows], mean, 2), _spread(heldout, mean, 3)]


def is_first(document: Document, name: str, budget: float) -> bool:
    """Whether nothing but retraining forgets more at this retain drop.

    Several steps on all of D_r and on a fifth of it are one method: they do not count against
    each other.
    """

    def at(method: str) -> float | None:
        return at_budget([document], method, budget)[0]

    mine = at(name)
    same = {STEPS, FIFTH} if name in (STEPS, FIFTH) else {name}
    rivals = document["methods"].keys() - same - {RETRAINING}
    others = [at(rival) for rival in rivals]
    return mine is not None and all(other is None or mine >= other for other in others)


def _less_retraining(document: Document, row: Mapping) -> float | None:
    gold = document["methods"].get(RETRAINING, {}).get("drops")
    return None if gold is None else row["drops"]["forget"] - gold["forget"]


def _spread(
    values: Sequence[float | None],
    middle: Callable[[Sequence[float]], float | None],
    digits: int,
) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = (f"{end:.{digits}f}" for end in (min(known), max(known)))
    return f"{middle(known):.{digits}f} [{low}, {high}]"


def by_request(documents: Sequence[Document], label: Callable[[Document], str]) -> str:
    """A row per request: what ours and the best baseline forget there, and what it takes.

    Args:
        documents: result files; those of one label are seeds of one request.
        label: the row that a file belongs to.
    """
    shown = (STEPS, STEP, "U-CAN, mlp")
    lines = [
        "| request | seeds | "
        + " | ".join(shown)
        + " | the best baseline | shrinking | retraining | time, s |",
        "|---|" + "---|" * (len(shown) + 5),
    ]
    together: dict[str, list[Document]] = {}
    for document in documents:
        together.setdefault(label(document), []).append(document)
    for text, mine in together.items():
        baseline = max(BASELINES, key=lambda name: rank(mine, name))
        names = (*shown, baseline, SHRINKING)
        most = max(rank(mine, name) for name in names)
        cells = []
        for name in names:
            drops = pair(mine, name)
            drops = f"**{drops}**" if rank(mine, name) == most else drops
            cells.append(f"{name} {drops}" if name == baseline else drops)
        cells.append(retrained(mine))
        cells.append(" / ".join(seconds(mine, name) for name in (STEPS, baseline, RETRAINING)))
        lines.append(f"| {text} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def presets(delivered: Sequence[Document], documents: Sequence[Document]) -> str:
    """A row per preset: what ``unlearn`` delivers with it, its search included."""
    if not delivered:
        return ""
    gold = {
        key_of(document): document["methods"][RETRAINING]["drops"]["forget"]
        for document in documents
        if "drops" in document["methods"].get(RETRAINING, {})
    }
    lines = [
        "| preset | requests | forget drop, % | less retraining's | retain drop, % | time, s |",
        "|---|---|---|---|---|---|",
    ]
    for name in PRESETS:
        rows = [(found["presets"][name], gold.get(key_of(found))) for found in delivered]
        against = [None if it is None else row["drops"]["forget"] - it for row, it in rows]
        cells = [
            _spread([row["drops"]["forget"] for row, _ in rows], statistics.median, 0),
            _spread(against, statistics.median, 0),
            _spread([row["drops"]["retain"] for row, _ in rows], statistics.median, 1),
            _spread([row["seconds"] for row, _ in rows], statistics.median, 1),
        ]
        lines.append(f'| `"{name}"` | {len(rows)} | ' + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
