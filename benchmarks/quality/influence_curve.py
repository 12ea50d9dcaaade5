"""Trade-off curves of the influence step on the demo's recommender (examples/movielens.py).

For the three deletion requests of the demo, one seed: the drop of Recall@10 on deleted training
interactions at a drop of 1 % and 5 % on retained ones (linearly interpolated between the points of
the curve), of the influence step in its variants, one plain gradient step, one-shot gates, U-CAN,
and the whole adapter scaled down. Both sides are measured on training interactions (the strict
protocol). Run as

    python benchmarks/quality/influence_curve.py --out build/influence-curve
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import platform
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from peft.helpers import rescale_adapter_scale

import ucan_fast as uf
from ucan_fast import recsys
from ucan_fast.evaluation import group_loss
from ucan_fast.files import atomic_write
from ucan_fast.metrics import drop, ranking_metrics

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = (1.0, 5.0)  # drop of Recall@10 on retained interactions, in %
# The curve is followed until the retained side has dropped this far, or the values end.
FAR_ENOUGH = 6.0
NATS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
SCALES = (0.98, 0.95, 0.92, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7)
VARIANTS = ("all", "b-only", "last-blocks", "eigenbasis", "diagonal")

Point = tuple[float, float]  # retain drop, forget drop, in %


def demo() -> ModuleType:
    """examples/movielens.py, which is no package."""
    spec = importlib.util.spec_from_file_location("movielens", ROOT / "examples" / "movielens.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["movielens"] = module
    spec.loader.exec_module(module)
    return module


class Ranker:
    """Recall@10 of both sides on training interactions, as the demo's curves measure it."""

    def __init__(self, movielens: ModuleType, model, recipe, data, request) -> None:
        forgetters = np.unique(data.train.user[request.forget_train])
        others = np.setdiff1d(data.tuned_users, forgetters)[:100]
        users = np.union1d(forgetters, others)
        self.model, self.vocabulary = model, data.vocabulary
        self.batches = data.batches(recipe, users, forget=request.forget_train)
        groups = [b["token_groups"] for b in self.batches]
        self.groups = torch.cat([g[g >= 0] for g in groups])

    def recalls(self) -> Point:
        ranks = recsys.next_item_ranks(
            self.model, self.batches, group=None, vocabulary=self.vocabulary
        )
        retain, forget = (ranking_metrics(ranks[self.groups == g])["recall@10"] for g in (1, 0))
        return retain, forget

    def curve(self, states: Iterable[contextlib.AbstractContextManager]) -> list[Point]:
        """The drops of every state, until the retained side is far enough down."""
        before = self.recalls()
        points = []
        for state in states:
            with state:
                after = self.recalls()
            points.append(tuple(drop(b, a) for b, a in zip(before, after, strict=True)))
            if points[-1][0] > FAR_ENOUGH:
                break
        return points


def at_budget(points: list[Point], budget: float) -> float | None:
    """The largest forget drop that the curve reaches at this retain drop; None beyond its end."""
    retain, forget = (list(values) for values in zip((0.0, 0.0), *points, strict=True))
    crossing = next((i for i, r in enumerate(retain) if r > budget), None)
    if crossing is None:
        return None
    low, high = retain[crossing - 1], retain[crossing]
    share = (budget - low) / (high - low)
    return forget[crossing - 1] + share * (forget[crossing] - forget[crossing - 1])


@contextlib.contextmanager
def applied(plan, model):
    plan.apply(model)
    try:
        yield
    finally:
        plan.undo(model)


def influence_rows(model, ranker: Ranker, forget, retain) -> dict[str, list[Point]]:
    rows = {}
    for variant in VARIANTS:
        config = uf.UcanConfig(method="influence", influence_variant=variant)
        plan = uf.make_influence_plan(model, forget, retain, config)
        if variant == "all":
            plan_of_all = plan
        edit = plan.edit(model, model.active_adapter)
        rows[f"influence, {variant}"] = ranker.curve(edit.applied(t) for t in NATS)
    # What preconditioning brings: the bare gradient, scaled to the same first-order rise.
    bare = {key: gradient / forget.positions for key, gradient in forget.gradients.items()}
    slope = sum(float(g.square().sum()) for g in bare.values())
    plain = dataclasses.replace(plan_of_all, directions={k: g / slope for k, g in bare.items()})
    edit = plain.edit(model, model.active_adapter)
    rows["one plain gradient step"] = ranker.curve(edit.applied(t) for t in NATS)
    return rows


def gates_rows(model, ranker: Ranker, forget, retain) -> dict[str, list[Point]]:
    plan = uf.make_gates_plan(model, forget, retain)
    states = (applied(plan.with_strength(t), model) for t in NATS)
    return {"one-shot gates": ranker.curve(states)}


def attenuation_rows(model, ranker: Ranker, forget, bank) -> dict[str, list[Point]]:
    stats = bank.with_forget(uf.collect(model, forget, group="forget"))
    rows = {}
    for site in ("input", "mlp"):
        # min_score=0: also where the default finds the sets too alike to select anything.
        config = uf.UcanConfig(site=site, strength=1.0, min_score=0.0)
        plan = uf.make_plan(model, stats, config)
        rows[f"U-CAN, {site}"] = ranker.curve(
            applied(plan.with_strength(s), model) for s in STRENGTHS
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="as in examples/movielens.py")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "demo-cache")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "influence-curve")
    parser.add_argument("--genre", default="Horror")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", nargs="+", default=["genre", "users", "one-user"])
    options = parser.parse_args()
    warnings.simplefilter("ignore", uf.UcanWarning)
    movielens = demo()
    recipe = movielens.Recipe(seed=options.seed)
    data = movielens.load_data(recipe, options.data, options.cache)
    model, _ = movielens.train_or_load(recipe, data, options.cache)
    everything = data.batches(recipe, data.tuned_users)
    moments = uf.collect(model, everything)
    start = time.perf_counter()
    bank = uf.collect_factors(model, everything, seed=options.seed)
    print(f"bank: {time.perf_counter() - start:.1f} s, {bank}")
    found = {"hardware": hardware(), "factor_bytes": uf.factor_memory(model), "requests": {}}
    for request in movielens.make_requests(data, options.genre, options.seed):
        if request.name not in options.requests:
            continue
        forget = data.batches(
            recipe, data.tuned_users, forget=request.forget_train, only_forget_users=True
        )
        start = time.perf_counter()
        factors = uf.collect_factors(model, forget, group="forget", seed=options.seed)
        plan = uf.make_influence_plan(model, factors, bank - factors)
        seconds = time.perf_counter() - start
        ranker = Ranker(movielens, model, recipe, data, request)
        before = {g: group_loss(model, ranker.batches, g).mean for g in ("forget", "retain")}
        rows = influence_rows(model, ranker, factors, bank - factors)
        rows |= gates_rows(model, ranker, factors, bank - factors)
        rows |= attenuation_rows(model, ranker, forget, moments)
        scaled = (rescale_adapter_scale(model, scale) for scale in SCALES)
        rows["uniform shrink (control)"] = ranker.curve(scaled)
        print(f"\n{movielens.describe(data, request)}")
        print(f"direction from the bank in {seconds:.2f} s; NLL before {before}; {plan!r}")
        columns = "".join(f"{budget:>8g} %" for budget in BUDGETS)
        print(f"{'forget drop (%) at a retain drop of':38}{columns}")
        for label, points in rows.items():
            cells = [at_budget(points, budget) for budget in BUDGETS]
            shown = ["-" if cell is None else f"{cell:.1f}" for cell in cells]
            print(f"{label:38}" + "".join(f"{cell:>10}" for cell in shown))
        found["requests"][request.name] = {
            "title": request.title,
            "seconds": seconds,
            "nll_before": before,
            "curves": rows,
        }
    atomic_write(options.out / "curves.json", json.dumps(found, indent=2).encode())
    print(f"\ncurves: {options.out / 'curves.json'} ({found['hardware']})")


def hardware() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    main()
