"""Attenuation against the influence step on SmolLM2 and text prompts, at its real width.

For each request: how much of the deleted prompts' ranking is lost where the retained prompts'
has dropped by 1 % and 5 %, all on training prompts (the strict protocol). The strengths of a grid
are searched by bisection for both budgets, with straight lines between its points. Run as

    python -m benchmarks.quality.text_curves --scenarios genre interactions
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import shlex
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from peft.helpers import rescale_adapter_scale

import ucan_fast as uf
from ucan_fast import recsys
from ucan_fast.files import atomic_write
from ucan_fast.metrics import drop, ranking_metrics

from ..measure import describe_environment, hardware
from ..model.models import cache_folder
from .text_case import (
    PROFILES,
    SCENARIOS,
    TextCase,
    TextRecommender,
    load_log,
    make_case,
    make_request,
    text_recommender,
)
from .text_model import RECIPES

METRICS = ("recall@1", "mrr")
BUDGETS = (1.0, 5.0)  # drop on retained prompts, in %
FRACTIONS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
NATS = (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5, 2.2, 3.3, 5.0, 8.0)
STRENGTHS = (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0)
SHRINK = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)
DAMPINGS = (0.1, 1.0, 10.0)
VARIANTS = ("diagonal", "b-only", "eigenbasis", "all")

#: In force for the length of the with block, at this strength.
State = Callable[[float], contextlib.AbstractContextManager]
#: A method: the state that it puts the model in, and the strengths to try.
Row = tuple[State, Sequence[float]]
#: Drop in % by metric, of both sides.
Point = dict[str, dict[str, float]]


class Ranking:
    """The ranking metrics of deleted and retained training prompts, against those at the start."""

    def __init__(self, case: TextCase) -> None:
        self.prompts = {
            side: case.recommender.prompts(
                [case.recommender.data.train[i] for i in case.sides[side]], 1
            )
            for side in ("forget", "retain")
        }
        self.rank = case.recommender.ranks
        self.before = self._now()

    def _now(self) -> dict[str, dict[str, float]]:
        found = {}
        for side, prompts in self.prompts.items():
            ranks = self.rank(prompts)
            # Every candidate counts for MRR: no rank is beyond the cut.
            metrics = ranking_metrics(ranks, (1, len(recsys.LETTERS)))
            found[side] = {"recall@1": metrics["recall@1"]}
            found[side]["mrr"] = metrics[f"mrr@{len(recsys.LETTERS)}"]
        return found

    def point(self) -> Point:
        """The drops now."""
        now = self._now()
        return {
            side: {m: drop(self.before[side][m], now[side][m]) for m in METRICS} for side in now
        }

    def curve(self, state: State, grid: Sequence[float]) -> dict[float, Point]:
        """The points of the grid next to where the retained MRR has dropped by each budget."""
        points: dict[float, Point] = {}
        for budget in sorted(BUDGETS, reverse=True):
            low, high = -1, len(grid)
            while high - low > 1:
                middle = (low + high) // 2
                value = grid[middle]
                if value not in points:
                    with state(value):
                        points[value] = self.point()
                if points[value]["retain"]["mrr"] > budget:
                    high = middle
                else:
                    low = middle
        return dict(sorted(points.items()))


def at_budget(points: dict[float, Point], metric: str, budget: float) -> float | None:
    """The forget drop where the retain drop first exceeds the budget; None if it never does."""
    before = (0.0, 0.0)
    for point in points.values():
        retain, forget = point["retain"][metric], point["forget"][metric]
        if retain > budget:
            share = (budget - before[0]) / (retain - before[0])
            return before[1] + share * (forget - before[1])
        before = (retain, forget)
    return None


def attenuation_rows(case: TextCase, kept: Kept) -> dict[str, Row]:
    """U-CAN by its strength, and pruned hard by the share of neurons; the whole adapter shrunk."""
    model = case.model
    found: dict[str, Row] = {
        "uniform shrink (control)": (lambda share: rescale_adapter_scale(model, 1 - share), SHRINK)
    }
    stats = kept.moments.with_forget(uf.collect(model, case.forget, group="forget"))
    sites = ("input", "mlp") if case.recommender.recipe.projections == "all" else ("input",)
    for site in sites:
        # min_score=0: also where the default finds the sets too alike to select anything.
        config = uf.UcanConfig(site=site, strength=1.0, min_score=0.0)
        plan = uf.make_plan(model, stats, config)
        largest = max(float(score.max()) for score in plan.score.values())
        print(f"largest score at site {site}: {largest:.3f}")
        found[f"U-CAN, {site}"] = (_of_plan(plan, model), STRENGTHS)

        def pruned(fraction: float, config: uf.UcanConfig = config):
            chosen = config.replace(decay="hard", fraction=fraction)
            return _of_plan(uf.make_plan(model, stats, chosen), model)(1.0)

        found[f"U-CAN, {site}, hard"] = (pruned, FRACTIONS)
    return found


def influence_rows(case: TextCase, kept: Kept) -> dict[str, Row]:
    """The influence step in its variants and without preconditioning, and one-shot gates."""
    model, found = case.model, {}
    forget, retain = kept.sides(case)
    for variant in VARIANTS:
        start = time.perf_counter()
        config = uf.UcanConfig(method="influence", influence_variant=variant)
        plan = uf.make_influence_plan(model, forget, retain, config)
        print(f"direction, {variant}: {time.perf_counter() - start:.1f} s {plan.note}")
        found[f"influence, {variant}"] = (plan.edit(model, model.active_adapter).applied, NATS)
    # What preconditioning brings: the bare gradient, scaled to the same first-order rise.
    bare = {key: gradient / forget.positions for key, gradient in forget.gradients.items()}
    slope = sum(float(g.square().sum()) for g in bare.values())
    plain = dataclasses.replace(plan, directions={k: g / slope for k, g in bare.items()})
    found["one plain gradient step"] = (plain.edit(model, model.active_adapter).applied, NATS)
    gates = uf.make_gates_plan(model, forget, retain)
    found["one-shot gates"] = (_of_plan(gates, model), NATS)
    return found


def damping_rows(case: TextCase, kept: Kept) -> dict[str, Row]:
    """More damping than the default: few answers stand behind the factors of many outputs."""
    model, found = case.model, {}
    forget, retain = kept.sides(case)
    for variant in ("diagonal", "all"):
        for damping in DAMPINGS:
            config = uf.UcanConfig(method="influence", influence_variant=variant, damping=damping)
            plan = uf.make_influence_plan(model, forget, retain, config)
            edit = plan.edit(model, model.active_adapter)
            found[f"influence, {variant}, damping {damping:g}"] = (edit.applied, NATS)
    return found


FAMILIES = {
    "attenuation": attenuation_rows,
    "influence": influence_rows,
    "damping": damping_rows,
}


def _of_plan(plan: uf.AttenuationPlan, model: PeftModel) -> State:
    @contextlib.contextmanager
    def state(strength: float):
        chosen = plan.with_strength(strength)
        chosen.apply(model)
        try:
            yield
        finally:
            chosen.undo(model)

    return state


class Kept:
    """The bank: sums over all training prompts on the adapter as it was trained, when first asked.

    Attributes:
        seconds: what each took.
    """

    def __init__(self, recommender: TextRecommender) -> None:
        self._model, self._seed = recommender.model, recommender.recipe.seed
        self._everything = recommender.prompts(recommender.data.train, 1)
        self.seconds: dict[str, float] = {}
        self._forget: dict[str, uf.InfluenceFactors] = {}

    @functools.cached_property
    def moments(self) -> uf.ActivationStats:
        """For attenuation."""
        start = time.perf_counter()
        moments = uf.collect(self._model, self._everything)
        self.seconds["moments"] = time.perf_counter() - start
        return moments

    @functools.cached_property
    def factors(self) -> uf.InfluenceFactors:
        """For the influence step."""
        start = time.perf_counter()
        factors = uf.collect_factors(self._model, self._everything, seed=self._seed)
        self.seconds["factors"] = time.perf_counter() - start
        return factors

    def sides(self, case: TextCase) -> tuple[uf.InfluenceFactors, uf.InfluenceFactors]:
        """The factors of the case's forget set, collected now, and those of the rest."""
        bank = self.factors
        if case.name not in self._forget:
            start = time.perf_counter()
            self._forget[case.name] = uf.collect_factors(
                case.model, case.forget, group="forget", seed=case.seed
            )
            print(f"factors of the forget set: {time.perf_counter() - start:.1f} s")
        return self._forget[case.name], bank - self._forget[case.name]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-set", default="ml-100k", help="ml-latest-small needs --data")
    parser.add_argument("--data", type=Path, help="folder of the data set's files")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--out", type=Path, default=Path("build") / "text-curves")
    parser.add_argument("--profile", choices=PROFILES, default="reduced")
    parser.add_argument("--recipe", choices=RECIPES, default="all")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=["genre", "users"])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--quantise", choices=["nf4"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--genre", default="Thriller")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    environment = describe_environment()
    warnings.simplefilter("ignore", uf.UcanWarning)
    transformers.utils.logging.disable_progress_bar()
    recommender = text_recommender(
        options.data_set,
        load_log(options.data_set, options.data, options.cache),
        cache=options.cache,
        profile=PROFILES[options.profile],
        recipe=options.recipe,
        quantise=options.quantise,
        seed=options.seed,
        device=options.device,
    )
    kept = Kept(recommender)

    def words(scenario: str) -> list[str]:
        """What makes the case's file again; where data lie is the reader's own."""
        asked = ["--scenarios", scenario, "--families", *options.families, "--seed"]
        asked += [str(options.seed), "--data-set", options.data_set, "--profile", options.profile]
        asked += ["--recipe", options.recipe, "--genre", options.genre]
        return asked + (["--quantise", options.quantise] if options.quantise else [])

    for scenario in options.scenarios:
        request = make_request(recommender, scenario, genre=options.genre, seed=options.seed)
        case = make_case(recommender, request, cache=options.cache, seed=options.seed)
        found = {
            "case": case.name,
            "request": request.title,
            "hardware": f"{hardware()}, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}",
            "environment": environment,
            "command": shlex.join(
                ["python", "-m", "benchmarks.quality.text_curves", *words(scenario)]
            ),
            "before": case.measure(),
            "bank_seconds": kept.seconds,
            "factor_bytes": uf.factor_memory(case.model),
            "curves": {},
        }
        ranking = Ranking(case)
        print(f"\n{case.name}: {request.title}; {json.dumps(found['before'])}", flush=True)
        print(f"{'forget drop (%) at a retain drop of':36}{heading()}")
        made = (row for family in options.families for row in FAMILIES[family](case, kept).items())
        for label, (state, grid) in made:
            points = ranking.curve(state, grid)
            cells = [at_budget(points, m, b) for m in METRICS for b in BUDGETS]
            shown = "".join(f"{'-' if c is None else format(c, '.1f'):>15}" for c in cells)
            print(f"{label:36}{shown}", flush=True)
            found["curves"][label] = {str(value): point for value, point in points.items()}
            text = json.dumps(found, indent=2)
            atomic_write(
                options.out / f"{case.name}-{options.recipe.replace('/', '')}.json", text.encode()
            )


def heading() -> str:
    return "".join(f"{f'{m} {b:g} %':>15}" for m in METRICS for b in BUDGETS)


if __name__ == "__main__":
    main()
