"""What unlearning must reach, against what it did: one row per goal, one column per data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .tables import Document, groups, key_of, mean

#: What ``UcanConfig.preset("best")`` does, as the tables call it.
BEST = "influence"
SHRINKING, DESCENT = "uniform shrink (control)", "GradDiff"


@dataclass(frozen=True)
class Goal:
    """A figure of a scenario's files (one per seed), and whether it is enough.

    ``figure`` gives the value, as a number and as text; None where a method is missing. It reads
    the curves, or with ``delivered`` the presets as ``unlearn`` applies them, beside which the
    curves of the same request stand as ``curves`` where they are there.
    """

    text: str
    scenario: str
    figure: Callable[[Sequence[Document]], tuple[float, str] | None]
    reached: Callable[[float], bool]
    delivered: bool = False


def forget_drop(documents: Sequence[Document], method: str, budget: float) -> float | None:
    """Mean over the files of the forget drop in % at this retain drop."""
    rows = [document["methods"].get(method, {}).get("at_budget", {}) for document in documents]
    return mean([row[f"{budget:g}"][0] for row in rows if f"{budget:g}" in row])


def _against_shrinking(method: str) -> Callable[[Sequence[Document]], tuple[float, str] | None]:
    """Ratio of two mean drops: a mean of ratios is that of the seed where shrinking did least."""

    def figure(documents: Sequence[Document]) -> tuple[float, str] | None:
        mine, other = (forget_drop(documents, name, 5) for name in (method, SHRINKING))
        if mine is None or other is None:
            return None
        ratio = mine / other if other > 0 else float("inf")
        return ratio, f"{ratio:.2f} ({mine:.1f} / {other:.1f} %)"

    return figure


def descents_time(document: Document, wanted: float) -> tuple[float, bool]:
    """Seconds until GradDiff has forgotten as much, by its fastest setting, between its states.

    False: no setting gets there before its curve ends (calibration has dropped too far), and the
    seconds of the longest one.
    """
    curves = document["methods"][DESCENT]["curves"]
    taken = [seconds for curve in curves if (seconds := _until(curve, wanted)) is not None]
    if taken:
        return min(taken), True
    return max(p[1] for curve in curves for p in curve), False


def _until(curve: Sequence[Sequence[Any]], wanted: float) -> float | None:
    """Seconds to a forget drop on the straight lines between a curve's states."""
    last_seconds, last_drop = 0.0, 0.0
    for _, seconds, drops in curve:
        drop = drops["forget"]
        if drop >= wanted:
            share = (wanted - last_drop) / (drop - last_drop) if drop > last_drop else 1.0
            return last_seconds + share * (seconds - last_seconds)
        last_seconds, last_drop = seconds, drop
    return None


def _time_against_descent(documents: Sequence[Document]) -> tuple[float, str] | None:
    """Our seconds over GradDiff's for the forgetting of our state within the budget."""
    ratios, texts = [], []
    for document in documents:
        ours, theirs = (document["methods"].get(name, {}) for name in (BEST, DESCENT))
        if "seconds" not in ours or "curves" not in theirs:
            return None
        seconds, there = descents_time(document, ours["drops"]["forget"])
        ratios.append(ours["seconds"] / seconds)
        texts.append(f"{ours['seconds']:.2f} s / {'' if there else 'not after '}{seconds:.2f} s")
    return (max(ratios), "; ".join(texts)) if ratios else None


def _drop_of_one_user(documents: Sequence[Document]) -> tuple[float, str] | None:
    value = forget_drop(documents, BEST, 0.5)
    return None if value is None else (value, f"{value:.0f} %")


def _seconds(documents: Sequence[Document]) -> tuple[float, str] | None:
    taken = [document["methods"].get(BEST, {}).get("seconds") for document in documents]
    found = mean([seconds for seconds in taken if seconds is not None])
    return None if found is None else (found, f"{found:.2f} s")


def _delivered(
    value: Callable[[Document], float], shown: str
) -> Callable[[Sequence[Document]], tuple[float, str] | None]:
    """The mean of a figure of preset ``best``, search included."""

    def figure(documents: Sequence[Document]) -> tuple[float, str] | None:
        found = mean([value(document["presets"]["best"]) for document in documents])
        return None if found is None else (found, shown.format(found))

    return figure


def _delivered_time_against_descent(documents: Sequence[Document]) -> tuple[float, str] | None:
    """Preset ``best``, search included, over GradDiff for as much forgetting."""
    ratios, texts = [], []
    for document in documents:
        curves = document.get("curves")
        if curves is None or "curves" not in curves["methods"].get(DESCENT, {}):
            continue
        ours = document["presets"]["best"]
        seconds, there = descents_time(curves, ours["drops"]["forget"])
        ratios.append(ours["seconds"] / seconds)
        texts.append(f"{ours['seconds']:.1f} s / {'' if there else 'not after '}{seconds:.1f} s")
    return (max(ratios), "; ".join(texts)) if ratios else None


GOALS = (
    Goal(
        "a genre at 5 %: U-CAN at the input site over shrinking, ≥ 1.6",
        "genre",
        _against_shrinking("U-CAN, input"),
        lambda value: value >= 1.6,
    ),
    Goal(
        "a genre at 5 %: U-CAN at the mlp site over shrinking, ≥ 2",
        "genre",
        _against_shrinking("U-CAN, mlp"),
        lambda value: value >= 2,
    ),
    Goal(
        "a genre at 5 %: `best`'s step over shrinking, ≥ 10",
        "genre",
        _against_shrinking(BEST),
        lambda value: value >= 10,
    ),
    Goal(
        "a genre: the step's time over GradDiff's for as much forgetting, ≤ 1",
        "genre",
        _time_against_descent,
        lambda value: value <= 1,
    ),
    Goal(
        "the same, preset `best` as delivered, its search included, ≤ 1",
        "genre",
        _delivered_time_against_descent,
        lambda value: value <= 1,
        delivered=True,
    ),
    Goal(
        "one user at 0.5 %: forget drop of `best`'s step, ≥ 80 %",
        "one-user",
        _drop_of_one_user,
        lambda value: value >= 80,
    ),
    Goal("one user: the step's time, < 1 s", "one-user", _seconds, lambda value: value < 1),
    Goal(
        "one user, preset `best` as delivered: forget drop, ≥ 80 %",
        "one-user",
        _delivered(lambda row: row["drops"]["forget"], "{:.0f} %"),
        lambda value: value >= 80,
        delivered=True,
    ),
    Goal(
        "the same: retain drop, ≤ 0.5 %",
        "one-user",
        _delivered(lambda row: row["drops"]["retain"], "{:.1f} %"),
        lambda value: value <= 0.5,
        delivered=True,
    ),
    Goal(
        "the same: its time with the search for the strength, < 1 s",
        "one-user",
        _delivered(lambda row: row["seconds"], "{:.1f} s"),
        lambda value: value < 1,
        delivered=True,
    ),
)


def section(documents: Sequence[Document], delivered: Sequence[Document] = ()) -> str:
    """Markdown; a missed goal says so in bold."""
    if not documents:
        return ""
    cells = {key_of(document): document for document in documents}
    beside = [{**found, "curves": cells.get(key_of(found))} for found in delivered]
    curves, presets = groups(documents), groups(beside)
    data_sets = list(dict.fromkeys(data_set for data_set, _ in curves))
    lines = [
        "| goal | " + " | ".join(data_sets) + " |",
        "|---|" + "---|" * len(data_sets),
    ]
    for goal in GOALS:
        together = presets if goal.delivered else curves
        shown = [_cell(goal, together, data_set) for data_set in data_sets]
        lines.append(f"| {goal.text} | " + " | ".join(shown) + " |")
    lines.append(
        "\nTimes are for a bank at hand (its own seconds stand in docs/quality.md). Of the step: "
        "to the state that is measured in full, the search for it aside; GradDiff's between the "
        'states of its fastest setting, "not after" where all ended before.'
    )
    return "\n".join(lines) + "\n"


def _cell(goal: Goal, together: Mapping[tuple[str, str], Sequence[Document]], data_set: str) -> str:
    found = goal.figure(together.get((data_set, goal.scenario), ()))
    if found is None:
        return "not run"
    value, text = found
    return text if goal.reached(value) else f"**missed:** {text}"
