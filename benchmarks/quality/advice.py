"""How the presets did as delivered, and how often the report's advice was right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ucan_fast.config import PRESETS

from .tables import Document, groups, mean

#: Attenuation had something to hold on to where it forgot this many times what shrinking does.
WORTH = 1.5
#: A one-shot edit is enough where it forgets this much, in %, at a retain drop of 5 %.
ENOUGH = 50.0
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
    truth = {_key(document): should_have_said(document) for document in documents}
    lines = [
        "**As delivered**: `unlearn` with each preset, its own search for the strength included, "
        "bank at hand (`python -m benchmarks.quality.delivered --data-set D --seed S`; "
        f"{delivered[0]['environment']['hardware']}, {delivered[0]['environment']['threads']} "
        "thread(s), cores shared). Forget / retain drop of Recall@10 in %, means over the seeds:\n",
        '| | `"paper"` | time, s | `"best"` | time, s | `"thorough"` | time, s | advice '
        "| curves say |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    tested: dict[str, list[bool]] = {}
    chosen_on: list[bool] = []
    for (data_set, scenario), found in groups(delivered).items():
        cells = []
        for name in PRESETS:
            rows = [document["presets"][name] for document in found]
            drops = [mean([row["drops"][side] for row in rows]) for side in ("forget", "retain")]
            cells.append(" / ".join(f"{drop:.1f}" for drop in drops))
            cells.append(f"{mean([row['seconds'] for row in rows]):.1f}")
        said = [document["guidance"]["recommendation"] for document in found]
        borne = [truth.get(_key(document)) for document in found]
        for document, one, other in zip(found, said, borne, strict=True):
            if other is not None:
                known = _chosen_on(document)
                (chosen_on if known else tested.setdefault(data_set, [])).append(one == other)
        cells += [", ".join(said), ", ".join(one or "-" for one in borne)]
        seeds = ", ".join(str(document["seed"]) for document in found)
        lines.append(f"| {data_set}, {scenario} (seed {seeds}) | " + " | ".join(cells) + " |")
    lines.append(
        "\nThe advice was right in "
        + ", ".join(f"{_count(right)} cases of {name}" for name, right in tested.items())
        + f", and in {_count(chosen_on)} that its two thresholds were chosen on (ml-100k, seed 0; "
        "other seeds of it are other users and weights, but the same films). It is held against "
        "the curves: "
        f"*attenuate* where U-CAN (input or mlp) forgets at least {WORTH:g} times what shrinking "
        f"the adapter does at 5 %, else *influence* where that step forgets at least {ENOUGH:g} %, "
        "else *retrain*. *attenuate* says that U-CAN beats shrinking anything, not that it is the "
        "best choice: where backward passes can be paid, the other presets forget more.\n"
    )
    return "\n".join(lines)


def _chosen_on(document: Document) -> bool:
    return (document["data_set"], document["seed"]) == ("ml-100k", 0)


def _count(right: Sequence[bool]) -> str:
    return f"{sum(right)} of {len(right)}"


def _key(document: Mapping[str, object]) -> tuple[object, ...]:
    return document["data_set"], document["scenario"], document["seed"]
