"""What users get: every preset through ``unlearn``, search included, and the advice beside it.

    python -m benchmarks.quality.delivered --data-set ml-100k --seed 0 --save

One bank per recommender answers all requests. The advice (``ucan_fast.guide``) is held against the
curves of the comparison by the report.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ucan_fast as uf
from ucan_fast.config import PRESETS
from ucan_fast.files import atomic_write
from ucan_fast.report import json_values

from ..measure import ROOT, describe_environment
from ..model.models import cache_folder
from .case import Case, Clock
from .cell import attacks
from .edits import FORGET, only
from .recommender import DATA_SETS, SCENARIOS, load_recommender, make_case, make_request
from .runner import Judge

RESULTS = ROOT / "benchmarks" / "results" / "delivered"


def deliver(case: Case, banks: dict[str, Any]) -> dict[str, Any]:
    """Every preset on one case, the model the original again afterwards."""
    judge = Judge(case, attacks)
    forget = only(case.forget, FORGET)
    found: dict[str, Any] = {"before": judge.measured, "presets": {}}
    for name in PRESETS:
        config = uf.UcanConfig.preset(name, seed=case.seed)
        several = config.influence_steps > 1
        clock = Clock()
        with clock:
            result = uf.unlearn(
                case.model,
                forget=forget,
                bank=banks["moments" if config.method == "attenuate" else "factors"],
                # Several steps run retain data, and keep a part of it apart for the budget.
                retain=case.retain if several else None,
                calibration=None if several else case.calibration,
                config=config,
                evaluate=False,
            )
        report = result.report
        found["presets"][name] = {
            "seconds": clock.seconds,
            "steps": report.seconds,
            "strength": result.plan.strength,
            "note": result.plan.note,
            "changed": not result.plan.is_noop,
            "drops": judge.drops(),
            "metrics": attacks(case),
        }
        if report.guidance is not None:
            advice = dataclasses.asdict(report.guidance)
            found["presets"][name]["guidance"] = advice
            if config.method == "attenuate":  # of the statistics of both sets
                found["guidance"] = advice
        if not result.plan.is_noop:
            result.plan.undo(case.model)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 where the data cannot be had."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.delivered", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data-set", required=True, choices=sorted(DATA_SETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder that holds the data sets' folders")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/delivered")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", uf.UcanWarning)
    out = options.out or (RESULTS if options.save else ROOT / "build" / "delivered")
    try:
        recommender = load_recommender(options.data_set, options.data, cache_folder(), options.seed)
    except uf.UcanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    model = recommender.model()
    everything = recommender.data.batches(recommender.recipe, recommender.data.tuned_users)
    banks, seconds = {}, {}
    for name, collect in (("moments", uf.collect), ("factors", _factors(options.seed))):
        clock = Clock()
        with clock:
            banks[name] = collect(model, everything)
        seconds[name] = clock.seconds
    words = ["--data-set", options.data_set, "--seed", str(options.seed), "--scenarios"]
    for scenario in options.scenarios:
        request = make_request(recommender, scenario)
        found = {
            "environment": describe_environment(),
            "command": shlex.join(
                ["python", "-m", "benchmarks.quality.delivered", *words, scenario]
            ),
            "data_set": options.data_set,
            "scenario": scenario,
            "seed": options.seed,
            "title": request.title,
            "bank_seconds": seconds,
            **deliver(make_case(recommender, request, model), banks),
        }
        name = f"{options.data_set}-{options.seed}-{scenario}"
        text = json.dumps(json_values(found), indent=1, allow_nan=False)
        atomic_write(out / f"{name}.json", text.encode())
        print(f"{name}: {line(found)}", flush=True)
    return 0


def _factors(seed: int):
    return lambda model, batches: uf.collect_factors(model, batches, seed=seed)


def line(found: dict[str, Any]) -> str:
    """One case in words."""
    parts = [
        f"{name}: forget drop {row['drops']['forget']:.1f} %, retain drop "
        f"{row['drops']['retain']:.1f} %, {row['seconds']:.2f} s"
        for name, row in found["presets"].items()
    ]
    return "; ".join([*parts, f"advice: {found['guidance']['recommendation']}"])


if __name__ == "__main__":
    sys.exit(main())
