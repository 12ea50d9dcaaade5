"""Behind the means, for the README: ranges by kind of request, and the goals' requests by seed.

What a seed's adapter knows decides most of a ratio: where shrinking takes one hit of a genre, or
the deleted user has eight, single rankings do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .overview import RETRAINING, at_budget, pair
from .summary import FIFTH, SHRINKING, STEP, STEPS, is_first
from .tables import Document, key_of

#: Kinds of requests, from one sequence to a quarter of everything.
KINDS = ("one-user", "one-percent", "users", "taste", "genre", "interactions")
MLP = "U-CAN, mlp"


def by_kind(documents: Sequence[Document], texts: Sequence[Document] = ()) -> str:
    """A row per kind of request: lowest and highest figure over its cells.

    Args:
        documents: cells of the small recommenders, all data sets of a kind in one row.
        texts: cells on text prompts, a row per model and request.
    """
    columns = (
        *("request", "cells", "retraining", "its retain drop", f"{STEPS}, less retraining's"),
        *(STEP, MLP, "shrinking", "several steps are passed"),
    )
    kinds = {kind: [d for d in documents if d["scenario"] == kind] for kind in KINDS}
    for document in texts:
        kinds.setdefault(f"{document['model']}, {document['scenario']}", []).append(document)
    rows = []
    for kind, mine in kinds.items():
        if not mine:
            continue
        gold, steps = ([_drops(d, name) for d in mine] for name in (RETRAINING, STEPS))
        row = [
            kind,
            str(len(mine)),
            _range(drops["forget"] for drops in gold if drops),
            _range(drops["retain"] for drops in gold if drops),
            _range(s["forget"] - g["forget"] for s, g in zip(steps, gold, strict=True) if s and g),
            *(_range(_at(d, name, 5) for d in mine) for name in (STEP, MLP, SHRINKING)),
            _passed(mine),
        ]
        rows.append(row)
    return _table(
        columns,
        rows,
        "Drops in %, the lowest and the highest over the cells: of retraining, and of "
        "several steps in their strongest state within 5 % on calibration users; of the others at "
        "a retain drop of 5 %, or the most before where a curve ends earlier. Passed: in how many "
        "cells something else than retraining and several steps on a fifth of D_r forgets more "
        "there, and what forgets most (all that tie).",
    )


def _drops(document: Document, name: str) -> dict[str, float] | None:
    return document["methods"].get(name, {}).get("drops")


def _at(document: Document, name: str, budget: float) -> float | None:
    return at_budget([document], name, budget)[0]


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    ends = dict.fromkeys(f"{end(known):.0f}" for end in (min, max) if known)
    return " to ".join(ends) or "-"


def _passed(documents: Sequence[Document]) -> str:
    """How often several steps are not first at 5 %, and who forgets most there."""
    times, firsts = 0, Counter()
    for document in documents:
        if _at(document, STEPS, 5) is None or is_first(document, STEPS, 5):
            continue
        rivals = document["methods"].keys() - {STEPS, FIFTH, RETRAINING}
        reached = {name: _at(document, name, 5) for name in sorted(rivals)}
        most = max(drop for drop in reached.values() if drop is not None)
        times += 1
        firsts.update(name for name, drop in reached.items() if drop == most)
    names = ", ".join(f"{name} {count}" for name, count in firsts.most_common())
    return f"{times} ({names})" if times else "0"


def of_genre(documents: Sequence[Document]) -> str:
    """The genre's cells: what shrinking and attenuation forget, and how far activations differ."""
    mine = [document for document in documents if document["scenario"] == "genre"]
    if not mine:
        return ""
    names = ("U-CAN, input", MLP, STEP)
    rows = []
    for document in mine:
        shrunk, hit = _at(document, SHRINKING, 5), _one_hit(document, "forget")
        row = [
            _cell(document),
            f"{document['scores']['contrast']['excess']:.3f}",
            _shown(hit),
            _shown(shrunk),
            *(_against(_at(document, name, 5), shrunk, hit) for name in names),
        ]
        rows.append(row)
    return _table(
        ("genre", "contrast", "one hit, %", "shrinking", *names),
        rows,
        "The genre's goals by seed. Contrast: of the activations, beyond sampling noise. One "
        "hit: what one deleted interaction in the top ten is of all of them. Then drops at 5 %, in "
        "brackets how many times shrinking's, where that takes a whole hit.",
    )


def of_one_user(documents: Sequence[Document], delivered: Sequence[Document] = ()) -> str:
    """The one-user cells: how few rankings decide them, the step by budget, and ``best``."""
    mine = [document for document in documents if document["scenario"] == "one-user"]
    if not mine:
        return ""
    presets = {key_of(document): document for document in delivered}
    columns = (
        *("one user", "one hit, %", "of the others, %", f"{STEP}, at 0.5 / 1 / 5 %"),
        *(f"{STEPS}, at 1 / 5 %", "retraining", '`"best"` as delivered: forget, retain drop'),
    )
    rows = []
    for document in mine:
        step = [_at(document, STEP, budget) for budget in (0.5, 1, 5)]
        gold = _drops(document, RETRAINING)
        row = [
            _cell(document),
            *(_shown(_one_hit(document, side), 2) for side in ("forget", "retain")),
            " / ".join(_shown(drop, 0) for drop in step),
            pair([document], STEPS),
            f"{gold['forget']:.0f}" if gold else "-",
            _best(presets.get(key_of(document)), document),
        ]
        rows.append(row)
    return _table(
        columns,
        rows,
        "The one user's goals by seed, drops in % (≥: the curve ends before; the step's is "
        "its largest then, too). One hit: what one interaction in the top ten is, of the deleted "
        "user's and of those of the others who are judged.",
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], legend: str) -> str:
    head, *lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    return "\n".join([head, "|" + "---|" * len(columns), *lines, "", legend, ""])


def _best(delivered: Document | None, document: Document) -> str:
    """What the preset forgot and cost, if it was delivered on the adapter of the cell."""
    if delivered is None:
        return "not run"
    name = "forget_train/recall@10"
    if abs(delivered["before"][name] - document["before"][name]) > 1e-9:
        return "another adapter"
    drops = delivered["presets"]["best"]["drops"]
    return f"{drops['forget']:.0f}, {drops['retain']:.1f}"


def _cell(document: Document) -> str:
    return f"{document['data_set']}, seed {document['seed']}"


def _one_hit(document: Document, side: str) -> float | None:
    """In % of all hits of that side; a hit is a case among the ten best. None without any."""
    hits = document["cases"][side] * document["recall@10"][side]
    return 100 / hits if hits else None


def _against(drop: float | None, shrunk: float | None, hit: float | None) -> str:
    """With its ratio to shrinking's, where that is not less than a hit."""
    known = None not in (drop, shrunk, hit) and shrunk >= hit
    return f"{drop:.1f} ({drop / shrunk:.1f}x)" if known else _shown(drop)


def _shown(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
