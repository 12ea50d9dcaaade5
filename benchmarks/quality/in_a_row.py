"""Deletion requests one after the other, against all of them at once.

    python -m benchmarks.quality.in_a_row --data-set ml-100k --seed 0 --save

A quarter of the users leave, a few at a time. Each request is answered by ``unlearn`` with preset
``"thorough"`` and ``previous=`` the result before it, on the data of those who have not left yet;
what earlier requests deleted is not run again. Then all of them are answered by one request. The
budget is measured on users whose data no request runs: a tenth of those who stay.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ucan_fast as uf
from ucan_fast.files import atomic_write
from ucan_fast.report import json_values

from ..measure import ROOT, describe_environment
from ..model.models import cache_folder
from .case import Batch, Clock
from .edits import FORGET, only
from .recommender import DATA_SETS, Recommender, Request, load_recommender, make_case, make_request
from .runner import Judge

RESULTS = ROOT / "benchmarks" / "results" / "in_a_row"
PRESET = "thorough"


def compare(recommender: Recommender, count: int) -> dict[str, Any]:
    """All requests in a row, then all at once; the drops of each one's interactions after each."""
    data, recipe = recommender.data, recommender.recipe
    whole = make_request(recommender, "users")
    leaving = np.unique(data.train.user[whole.forget_train])
    leaving = np.random.default_rng(recipe.seed).permutation(leaving)
    groups = [np.sort(users) for users in np.array_split(leaving, count)]
    model = recommender.model()
    case = make_case(recommender, whole, model)
    judge = Judge(case, _nothing)
    judges = [
        Judge(make_case(recommender, _request(recommender, users), model), _nothing)
        for users in groups
    ]
    bank = uf.collect_factors(model, data.batches(recipe, data.tuned_users), seed=recipe.seed)
    config = uf.UcanConfig.preset(PRESET, seed=recipe.seed)

    def state() -> dict[str, Any]:
        return {
            "forget": [one.drops()["forget"] for one in judges],
            "retain": judge.drops()["retain"],
        }

    staying = np.random.default_rng([recipe.seed, 1]).permutation(
        np.setdiff1d(data.tuned_users, leaving)
    )
    apart = np.sort(staying[: max(1, len(staying) // 10)])
    options = {"bank": bank, "config": config, "calibration": data.batches(recipe, apart)}
    rows, previous, gone = [], None, apart
    for users in groups:
        gone = np.union1d(gone, users)
        kept = data.batches(recipe, np.setdiff1d(data.tuned_users, gone))
        options |= {"retain": kept, "previous": previous}
        previous, row = _answer(model, _forget(recommender, users), **options)
        rows.append({"users": len(users), **row, **state()})
    previous.plan.undo(model)
    result, row = _answer(model, only(case.forget, FORGET), **options | {"previous": None})
    union = {"users": len(leaving), **row, **state()}
    result.plan.undo(model)
    return {"requests": rows, "at once": union}


def _request(recommender: Recommender, users: np.ndarray) -> Request:
    data = recommender.data
    rows = [np.isin(log.user, users) for log in (data.train, data.test)]
    return Request("users", f"{len(users)} users", *rows, np.ones(len(data.train), bool))


def _forget(recommender: Recommender, users: np.ndarray) -> list[Batch]:
    data = recommender.data
    rows = np.isin(data.train.user, users)
    return only(data.batches(recommender.recipe, users, forget=rows), FORGET)


def _answer(
    model: Any, forget: list[Batch], **options: Any
) -> tuple[uf.UnlearnResult, dict[str, Any]]:
    clock = Clock()
    with clock:
        result = uf.unlearn(model, forget=forget, evaluate=False, **options)
    steps, note = len(result.report.change["steps"]), result.plan.note
    return result, {"seconds": clock.seconds, "steps": steps, "note": note}


def _nothing(_case: Any) -> dict[str, float]:
    return {}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 where the data cannot be had."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.in_a_row", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data-set", required=True, choices=sorted(DATA_SETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=4, help="how many")
    parser.add_argument("--data", type=Path, help="folder that holds the data sets' folders")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/in_a_row")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(arguments)
    if options.requests < 2:
        parser.error(f"--requests must be at least 2, not {options.requests}")
    warnings.simplefilter("ignore", uf.UcanWarning)
    out = options.out or (RESULTS if options.save else ROOT / "build" / "in_a_row")
    try:
        recommender = load_recommender(options.data_set, options.data, cache_folder(), options.seed)
    except uf.UcanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    words = ["--data-set", options.data_set, "--seed", str(options.seed)]
    words += ["--requests", str(options.requests)]
    found = {
        "environment": describe_environment(),
        "command": shlex.join(["python", "-m", "benchmarks.quality.in_a_row", *words]),
        "data_set": options.data_set,
        "scenario": "users",
        "seed": options.seed,
        **compare(recommender, options.requests),
    }
    name = f"{options.data_set}-{options.seed}"
    text = json.dumps(json_values(found), indent=1, allow_nan=False)
    atomic_write(out / f"{name}.json", text.encode())
    print(table([found]))
    return 0


def table(documents: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one row per recommender."""
    lines = [
        "| | users | forget drop right after each, % | of the same at the end | all at once "
        "| retain drop after each, % | all at once | time, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for document in documents:
        rows, union = document["requests"], document["at once"]
        after = [row["forget"][index] for index, row in enumerate(rows)]
        end = rows[-1]["forget"]
        cells = [
            f"{document['data_set']}, seed {document['seed']}",
            " + ".join(str(row["users"]) for row in rows),
            _listed(after),
            _listed(end),
            _listed(union["forget"]),
            ", ".join(f"{row['retain']:.1f}" for row in rows),
            f"{union['retain']:.1f}",
            f"{sum(row['seconds'] for row in rows):.0f} / {union['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _listed(values: Sequence[float]) -> str:
    return f"{', '.join(f'{v:.0f}' for v in values)} (mean {sum(values) / len(values):.0f})"


def section(documents: Sequence[Mapping[str, Any]]) -> str:
    """The README's part on them."""
    if not documents:
        return ""
    where = documents[0]["environment"]
    return (
        "### Requests in a row\n\n"
        "A quarter of the users leave, a few at a time; each request is answered with "
        f'`"{PRESET}"` and `previous=` the last result, without the data of those who left before; '
        f"then all of them at once ({where['hardware']}, {where['threads']} thread(s); `"
        + "`, `".join(document["command"] for document in documents)
        + "`).\n\n"
        + table(documents)
        + "\nTime: in a row / at once. The budget of 2 % of retain loss is measured on a tenth of "
        "the users who stay, whose data no request runs. It is that of all requests together, so "
        "that later ones end sooner; and what was forgotten earlier drifts: nothing holds it, nor "
        "is it run again. Gather requests where you can.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
