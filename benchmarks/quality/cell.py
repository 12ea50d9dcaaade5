"""One cell of the comparison: a data set, a seed, a scenario; its results go to one JSON file.

    python -m benchmarks.quality.cell --data-set ml-100k --seed 0 --scenario genre --out FILE

Without ``--scenario`` the recommender is trained and kept for the cells that need it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ucan_fast as uf
from ucan_fast.files import atomic_write
from ucan_fast.membership import MIN_SEQUENCES, membership_auc
from ucan_fast.report import json_values

from ..measure import describe_environment
from ..model.models import Unavailable, cache_folder
from .case import Case
from .edits import FORGET, only, prepare, scores
from .methods import METHODS
from .recommender import DATA_SETS, SCENARIOS, load_recommender, make_case, make_request
from .runner import run_case
from .tables import load


def parser() -> argparse.ArgumentParser:
    """The command line of a cell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.cell", description=__doc__.split("\n")[0]
    )
    add_common(parser, DATA_SETS, SCENARIOS)
    parser.add_argument("--share", type=float, default=1.0, help="of the users to measure on")
    return parser


def add_common(
    parser: argparse.ArgumentParser, data_sets: Iterable[str], scenarios: Iterable[str]
) -> None:
    """What cells of all models are asked for."""
    parser.add_argument("--data-set", required=True, choices=sorted(data_sets))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", choices=scenarios)
    parser.add_argument("--data", type=Path, help="folder that holds the data sets' folders")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument(
        "--into", type=Path, help="an earlier file of this cell: its rows of these methods are new"
    )
    parser.add_argument("--methods", default="", help="regular expression; default: all")
    parser.add_argument(
        "--coarse", action="store_true", help="half the points of every curve, two settings"
    )


def compare(case: Case, methods: str) -> dict[str, Any]:
    """All methods whose names match, with the sums of a bank that they need."""
    chosen = [method for method in METHODS if re.search(methods, method.name)]
    prepare(case, dict.fromkeys(name for method in chosen for name in method.needs))
    prepare(case, {"moments"} - case.prepared.keys())
    found = {"scores": scores(case)}
    return found | run_case(case, chosen, say=lambda text: print(text, flush=True), extra=attacks)


def write(found: Mapping[str, Any], out: Path) -> None:
    """A result file; what is not a number becomes null."""
    text = json.dumps(json_values(found), indent=1, allow_nan=False)
    atomic_write(out, text.encode())


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or measure all methods."""
    start = time.perf_counter()
    environment = describe_environment()
    recommender = load_recommender(options.data_set, options.data, cache_folder(), options.seed)
    if options.scenario is None:
        return None
    request = make_request(recommender, options.scenario)
    case = make_case(
        recommender, request, recommender.model(), coarse=options.coarse, share=options.share
    )
    found = compare(case, options.methods)
    return {
        "environment": environment,
        "command": shlex.join(["python", "-m", "benchmarks.quality.cell", *_words(options)]),
        "data_set": options.data_set,
        "scenario": options.scenario,
        "title": request.title,
        "coarse": options.coarse,
        "share": options.share,
        "recipe": dataclasses.asdict(recommender.recipe),
        "never_seen_alike": True,
        "interactions": {
            "forget": int(request.forget_train.sum()),
            "users": len(recommender.data.tuned_users),
        },
        "total_seconds": time.perf_counter() - start,
        **found,
    }


#: What must be the same for rows of two runs to stand in one table.
_SAME = ("data_set", "scenario", "seed", "coarse", "share", "interactions", "cases")


def joined(earlier: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier file with the rows of a later run in place of its own; each says where it is from.

    Raises:
        UcanError: the two are not of one cell, or the model was another one.
    """
    for name in _SAME:
        if earlier[name] != json_values(found[name]):
            raise uf.UcanError(
                f"--into: {name} is {earlier[name]} in the file and {found[name]} here."
            )
    metric = found["metric"]
    pairs = [(earlier[metric][side], value) for side, value in found[metric].items()]
    if any(abs(one - other) > 1e-9 for one, other in pairs):
        raise uf.UcanError(
            f"--into: before any edit {metric} is {earlier[metric]} in the file and "
            f"{found[metric]} here: it is another model."
        )
    source = {name: found[name] for name in ("command", "environment", "total_seconds")}
    source["methods"] = list(found["methods"])
    kept = [s for s in earlier.get("later", ()) if set(s["methods"]) - set(source["methods"])]
    rows = {**earlier["methods"], **found["methods"]}
    order = [method.name for method in METHODS if method.name in rows]
    return {
        **earlier,
        "methods": {name: rows[name] for name in order},
        "later": [*kept, source],
    }


def attacks(case: Case) -> dict[str, float]:
    """AUC of membership inference on the model as it is; nothing where there are too few sequences.

    Item tokens have no text, so the zlib attack compresses their ids.
    """
    forget = only(case.forget, FORGET)
    counts = [
        sum(int((b["token_groups"] == FORGET).any(1).sum()) for b in s)
        for s in (forget, case.holdout)
    ]
    if min(counts) < MIN_SEQUENCES:
        return {}
    found = membership_auc(case.model, forget, case.holdout)
    values = {}
    for name, auc in found.items():
        ends = {"": auc.value, "/low": auc.low, "/high": auc.high}
        values |= {f"mia/{name}{end}": value for end, value in ends.items()}
    return values


def common_words(options: argparse.Namespace, folder: str) -> list[str]:
    """The arguments of :func:`add_common` that reproduce a file; where data lie is the reader's.

    Args:
        folder: where such files are committed, below ``benchmarks/results``.
    """
    words = ["--data-set", options.data_set, "--seed", str(options.seed)]
    words += ["--scenario", options.scenario, "--out", f"build/{options.out.name}"]
    if options.methods:
        words += ["--methods", options.methods]
    words += ["--coarse"] if options.coarse else []
    if options.into:
        words += ["--into", f"benchmarks/results/{folder}/{options.into.name}"]
    return words


def _words(options: argparse.Namespace) -> list[str]:
    share = ["--share", f"{options.share:g}"] if options.share != 1 else []
    return common_words(options, "quality") + share


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 where the data cannot be had."""
    options = parse(parser(), arguments)
    if not 0 < options.share <= 1:
        parser().error(f"--share must be above 0 and at most 1, not {options.share:g}")
    return measure(options, run)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a cell; ends the program where it would not know what to write."""
    options = parser.parse_args(arguments)
    options.out = options.out or options.into
    if options.scenario is not None and options.out is None:
        parser.error("--scenario needs --out, the file to write")
    return options


def measure(
    options: argparse.Namespace, run: Callable[[argparse.Namespace], dict[str, Any] | None]
) -> int:
    """Run a cell and write its file: the exit code, 1 where the data or the model are missing."""
    warnings.simplefilter("ignore", uf.UcanWarning)
    # Before each state, garbage is collected: a third of a second of looking through what torch
    # and transformers made at import, hundreds of times, if they were not set aside.
    gc.collect()
    gc.freeze()
    try:
        earlier = None
        if options.into is not None:
            (earlier,) = load([options.into])
        found = run(options)
        if found is not None and earlier is not None:
            found = joined(earlier, found)
    except (uf.UcanError, Unavailable, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        gc.unfreeze()
    if found is not None:
        write(found, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
