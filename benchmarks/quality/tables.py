"""Tables of the comparison, from result files: means over seeds, with their range."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .runner import BUDGET, BUDGETS, at_budgets, marked

Document = Mapping[str, Any]
Row = Mapping[str, Any]
KS = (5, 10)
RANKING = ("recall", "mrr", "ndcg")


@dataclass(frozen=True)
class Column:
    """A column: its heading, the value of a method in one file (None where it has none), digits,
    and how a drop at a budget is known (see ``runner.at_budget``)."""

    heading: str
    value: Callable[[Document, Row], float | None]
    digits: int = 1
    known: Callable[[Row], str] = lambda _: ""


def load(paths: Iterable[Path], holding: str = "methods") -> list[Document]:
    """Result files, by data set, scenario and seed.

    Args:
        holding: the entry that such a file has.

    Raises:
        ValueError: a file holds no results of this comparison; it is named.
    """
    found = []
    for path in paths:
        try:
            document = json.loads(path.read_text())
            order = (document["data_set"], document["scenario"], document["seed"])
            for row in document["methods"].values() if holding == "methods" else ():
                # Read anew: files of before took the setting of the largest budget for all.
                if row.get("at_budget"):
                    row["at_budget"] = at_budgets(row["curves"])
            found.append((order, document[holding] and document))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no results of benchmarks.quality: {error}") from error
    return [document for _, document in sorted(found, key=lambda pair: pair[0])]


def groups(documents: Iterable[Document]) -> dict[tuple[str, str], list[Document]]:
    """(data set, scenario) -> its files, one per seed."""
    found: dict[tuple[str, str], list[Document]] = {}
    for document in documents:
        found.setdefault((document["data_set"], document["scenario"]), []).append(document)
    return found


def key_of(document: Document) -> tuple[str, str, int]:
    """What tells one file from another: data set, scenario, seed."""
    return document["data_set"], document["scenario"], document["seed"]


def methods_of(documents: Sequence[Document]) -> list[str]:
    """All methods, in the order of the files."""
    return list(dict.fromkeys(name for document in documents for name in document["methods"]))


def _at(budget: float) -> Column:
    def value(_: Document, row: Row) -> float | None:
        return row.get("at_budget", {}).get(f"{budget:g}", [None])[0]

    def known(row: Row) -> str:
        return row.get("at_budget", {}).get(f"{budget:g}", [None, ""])[1]

    return Column(f"f@{budget:g}", value, known=known)


def _metric(heading: str, name: str, digits: int) -> Column:
    return Column(heading, lambda _, row: row.get("metrics", {}).get(name), digits)


def _trade_off(heading: str, protocol: str) -> Column:
    return Column(heading, lambda _, row: row.get("trade_off", {}).get(protocol))


def _drop(heading: str, side: str) -> Column:
    return Column(heading, lambda _, row: row.get("drops", {}).get(side))


def _peak(document: Document, row: Row) -> int | None:
    """Growth of resident memory, the shared pass over the forget set included.

    None where that pass was not measured, or where retraining came from a cache.
    """
    if row.get("needs") and set(row["needs"]) & {"moments", "factors"}:
        shared = row.get("shared_peak_bytes")
        return None if shared is None else max(shared, row["peak_memory_bytes"] or 0)
    cached = "model" in document and "at_budget" in row and not row["at_budget"]
    return None if cached else row.get("peak_memory_bytes")


def exposure(document: Document, row: Row) -> float | None:
    """AUC of the loss attack; None where the never-seen data were of another kind."""
    other_kind = document["scenario"] == "taste" or (
        document["scenario"] == "genre" and "model" in document
    )
    if other_kind and not document.get("never_seen_alike"):
        return None
    return row.get("metrics", {}).get("mia/loss")


#: What users decide by.
COLUMNS = (
    *map(_at, BUDGETS),
    Column("time, s", lambda _, row: row.get("seconds"), 2),
    Column("peak, MiB", lambda document, row: _mebibytes(_peak(document, row)), 0),
    _drop("forget drop", "forget"),
    _drop("retain drop", "retain"),
    _metric("KL", "forget/kl", 3),
    _metric("shift, %", "forget/prediction_shift", 1),
    _metric("PPL", "forget/perplexity", 1),
    _trade_off("T@10 strict", "strict_train"),
    _trade_off("T@10 paper", "paper"),
    Column("MIA AUC", lambda document, row: exposure(document, row), 2),
)
#: Recommendations of both sides, at the same state.
DETAILS = tuple(
    _metric(
        f"{title} {metric.upper() if metric != 'recall' else 'R'}@{k}", f"{side}/{metric}@{k}", 3
    )
    for side, title in (
        ("forget_train", "forget"),
        ("retain_train", "retain"),
        ("retain_test", "held out"),
    )
    for metric in RANKING
    for k in KS
)


def mean(values: Sequence[float]) -> float | None:
    """None of none."""
    return sum(values) / len(values) if values else None


def _mebibytes(value: float | None) -> float | None:
    return None if value is None else value / 2**20


def table(documents: Sequence[Document], columns: Sequence[Column]) -> list[str]:
    """Markdown, one row per method: the mean over seeds and, of several, [the range]."""
    lines = ["| | " + " | ".join(column.heading for column in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    lines.append(
        "| before | " + " | ".join(_before(documents, column) for column in columns) + " |"
    )
    for name in methods_of(documents):
        rows = [(d, d["methods"][name]) for d in documents if name in d["methods"]]
        errors = [row["error"] for _, row in rows if "error" in row]
        cells = [
            marked(
                _cell([column.value(d, row) for d, row in rows], column),
                *(column.known(row) for _, row in rows),
            )
            for column in columns
        ]
        note = f" ({len(errors)} of {len(rows)} failed: {errors[0]})" if errors else ""
        lines.append(f"| {name}{note} | " + " | ".join(cells) + " |")
    return lines


def _before(documents: Sequence[Document], column: Column) -> str:
    rows = [{"metrics": document["before"]} for document in documents]
    return _cell([column.value(d, r) for d, r in zip(documents, rows, strict=True)], column)


def _cell(values: Sequence[float | None], column: Column) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "-"
    text = f"{mean(known):.{column.digits}f}"
    if len(known) > 1:
        text += f" [{min(known):.{column.digits}f}, {max(known):.{column.digits}f}]"
    return text


def heading(documents: Sequence[Document]) -> str:
    """What the table under it is about."""
    first = documents[0]
    seeds = ", ".join(str(document["seed"]) for document in documents)
    counts = ", ".join(f"{document['interactions']['forget']:,}" for document in documents)
    how = "; coarse" if first["coarse"] else ""
    where = f"{first['model']}, {first['data_set']}" if "model" in first else first["data_set"]
    return f"{where}, {first['title']} ({counts} interactions; seed {seeds}{how})"


LEGEND = (
    "f@b: drop of Recall@10 (text prompts: MRR@10) on deleted training interactions (%) where the "
    "method's curve reaches a drop of b % on retained ones, of users that no setting was tuned on; "
    "in brackets where the "
    "method's first state is beyond it already (a straight line from the original), with ≥ where "
    "the curve ends before. The other columns belong to the strongest state whose drop on "
    f"calibration users is at most {BUDGET:g} %. Time: from the request to that state, on one "
    "thread, tuning and measuring aside, sums of a bank at hand. Peak: growth of resident memory, "
    "with the pass over the forget set (- where that was not measured). "
    "KL, shift and perplexity: on at most 8 batches of the forget set. Shift: share of positions "
    "with another best item. T@10: forget drop minus retain drop, means over Recall, MRR and NDCG; "
    "strict has both on training interactions, paper the retain side held out. MIA AUC: loss "
    "attack, deleted sequences against never-seen ones of the same kind (0.5: cannot be told "
    "apart; - where never-seen ones were of another kind, or too few). Coarse: every other state "
    "of a curve (several influence steps: every one of at most twenty), two settings of a "
    "baseline. Every model is "
    "ranked on whole histories. A retrained one has learned histories without the deleted items: "
    "where those are single interactions (genre, interactions) it loses on retained ones too."
)


def text_tables(documents: Sequence[Document]) -> str:
    """All tables with their captions."""
    parts = []
    for together in groups(documents).values():
        parts.append(f"### {heading(together)}\n")
        parts.append("\n".join(table(together, COLUMNS)) + "\n")
    return "\n".join([*parts, LEGEND])
