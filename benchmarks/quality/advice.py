"""How the presets did as delivered, and how often the report's advice was right."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ucan_fast.config import PRESETS
from ucan_fast.guidance import LARGE_SHARE

from .overview import RETRAINING
from .summary import presets
from .tables import Document, groups, key_of, mean

#: Attenuation had something to hold on to where it forgot this many times what shrinking does.
WORTH = 1.5
#: A one-shot edit is enough where it forgets this much, in %, at a retain drop of 5 %.
ENOUGH = 50.0
#: How a walk's note says that it went as far as it aims.
AIMED_FOR = "known no better than its references"
#: What the advice is held against: forget drops at a retain drop of 5 %.
ATTENUATION = ("U-CAN, input", "U-CAN, mlp")
SHRINKING, STEP = "uniform shrink (control)", "influence"


def should_have_said(document: Document) -> str | None:
    """The advice that the curves of a case bear out; None where a curve is missing."""
    at = {}
    for name in (*ATTENUATION, SHRINKING, STEP):
        row = document["methods"].get(name, {}).get("at_budget", {})
        if "5" not in row:
            return None
        at[name] = row["5"][0]
    most = max(at[name] for name in ATTENUATION)
    if most > 0 and most >= WORTH * at[SHRINKING]:
        return "attenuate"
    return "influence" if at[STEP] >= ENOUGH else "retrain"


def section(delivered: Sequence[Document], documents: Sequence[Document]) -> str:
    """Presets as delivered, one row per data set and scenario, and the count of right advice."""
    if not delivered:
        return ""
    truth = _truth(documents)
    lines = [
        _heading(delivered) + " Forget / retain drop of Recall@10 in %, means over the seeds:\n",
        '| | `"paper"` | time, s | `"best"` | time, s | `"thorough"` | time, s | advice '
        "| curves say |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (data_set, scenario), found in groups(delivered).items():
        cells = []
        for name in PRESETS:
            rows = [document["presets"][name] for document in found]
            drops = [mean([row["drops"][side] for row in rows]) for side in ("forget", "retain")]
            cells.append(" / ".join(f"{drop:.1f}" for drop in drops))
            cells.append(f"{mean([row['seconds'] for row in rows]):.1f}")
        cells.append(", ".join(document["guidance"]["recommendation"] for document in found))
        cells.append(", ".join(truth.get(key_of(document)) or "-" for document in found))
        seeds = ", ".join(str(document["seed"]) for document in found)
        lines.append(f"| {data_set}, {scenario} (seed {seeds}) | " + " | ".join(cells) + " |")
    lines.append("\n" + _right(delivered, documents))
    lines.append(of_gradients(delivered, documents))
    return "\n".join(lines) + "\n"


def short(delivered: Sequence[Document], documents: Sequence[Document]) -> str:
    """One row per preset over all requests, and the count of right advice."""
    if not delivered:
        return ""
    lines = [
        _heading(delivered) + " Medians [ranges] over the requests:\n",
        presets(delivered, documents),
        _right(delivered, documents),
        of_gradients(delivered, documents),
    ]
    return "\n".join(lines) + "\n"


def _heading(delivered: Sequence[Document]) -> str:
    return (
        "**As delivered**: `unlearn` with each preset, its own search for the strength included, "
        "bank at hand (`python -m benchmarks.quality.delivered --data-set D --seed S`; "
        f"{delivered[0]['environment']['hardware']}, {delivered[0]['environment']['threads']} "
        "thread(s), cores shared)."
    )


def _truth(documents: Sequence[Document]) -> dict[tuple[object, ...], str | None]:
    return {key_of(document): should_have_said(document) for document in documents}


def _right(delivered: Sequence[Document], documents: Sequence[Document]) -> str:
    """How often the report's advice was what the curves bear out."""
    truth = _truth(documents)
    tested: dict[str, list[bool]] = {}
    chosen_on: list[bool] = []
    by_size: list[bool] = []
    for document in delivered:
        borne = truth.get(key_of(document))
        if borne is not None:
            known = (document["data_set"], document["seed"]) == ("ml-100k", 0)
            right = chosen_on if known else tested.setdefault(document["data_set"], [])
            right.append(document["guidance"]["recommendation"] == borne)
            if not known:
                large = document["guidance"]["forget_share"] > LARGE_SHARE
                by_size.append(borne == ("retrain" if large else "attenuate"))
    others = [one for found in tested.values() for one in found]
    return (
        "The advice was right in "
        + ", ".join(f"{_count(right)} cases of {name}" for name, right in tested.items())
        + f", and in {_count(chosen_on)} that its two thresholds were chosen on (ml-100k, seed 0; "
        "other seeds of it are other users and weights, but the same films). Of the cases that "
        f"nothing was chosen on the advice was right in {_count(others)}, size "
        f"alone (*retrain* beyond {100 * LARGE_SHARE:g} % of the tokens, else *attenuate*) in "
        f"{_count(by_size)}. Both are held against the curves: "
        f"*attenuate* where U-CAN (input or mlp) forgets at least {WORTH:g} times what shrinking "
        f"the adapter does at 5 %, else *influence* where that step forgets at least {ENOUGH:g} %, "
        "else *retrain*. *attenuate* says that U-CAN beats shrinking anything, not that it is the "
        "best choice: where backward passes can be paid, the other presets forget more.\n"
    )


def of_gradients(delivered: Sequence[Document], documents: Sequence[Document]) -> str:
    """How often the advice after one step was right, and what several steps left to retraining."""
    cells = {key_of(document): document["methods"] for document in documents}
    chosen_on: list[bool] = []
    tested: list[bool] = []
    enough: list[bool] = []
    above: dict[bool, list[float]] = {True: [], False: []}
    for document in delivered:
        methods = cells.get(key_of(document), {})
        step = methods.get(STEP, {}).get("at_budget", {}).get("5")
        if step is not None:
            small = document["guidance"]["forget_share"] <= LARGE_SHARE
            right = small == (step[0] >= ENOUGH)
            if (document["data_set"], document["seed"]) == ("ml-100k", 0):
                chosen_on.append(right)
            else:
                tested.append(right)
                enough.append(step[0] >= ENOUGH)
        gold, several = methods.get(RETRAINING, {}).get("drops"), document["presets"]["thorough"]
        if gold is not None:
            more = gold["forget"] - several["drops"]["forget"]
            above[AIMED_FOR in several.get("note", "")].append(more)
    parts = [
        f"After one step the report goes by size alone (*retrain* beyond {100 * LARGE_SHARE:g} % "
        "of the tokens, else *influence*). By whether the step forgets at least "
        f"{ENOUGH:g} % at 5 % that was right in {_count(tested)} cases that nothing was chosen on "
        f"(*influence* always: {_count(enough)}), and in {_count(chosen_on)} of ml-100k's seed 0."
        f"{_gap([document['guidance']['forget_share'] for document in delivered])}"
    ]
    for aimed, text in (
        (True, "where they aim"),
        (False, "by the retain budget or their number"),
    ):
        if above[aimed]:
            low, high = min(above[aimed]), max(above[aimed])
            parts.append(
                f"Several steps ended {text} in {len(above[aimed])} of these requests: less "
                f"theirs, retraining's forget drop is {low:.0f} to {high:.0f} points there."
            )
    return " ".join(parts) + "\n"


def _gap(shares: Sequence[float]) -> str:
    """Where the forget sets' sizes say nothing of a threshold: the widest gap between them."""
    ordered = sorted(shares)
    if len(ordered) < 2:
        return ""
    low, high = max(pairwise(ordered), key=lambda pair: pair[1] - pair[0])
    return (
        f" No forget set is between {100 * low:.1f} and {100 * high:.1f} % of the tokens: within "
        "that the threshold is not tested."
    )


def _count(right: Sequence[bool]) -> str:
    return f"{sum(right)} of {len(right)}"
