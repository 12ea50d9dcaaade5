"""The one-shot edits of this package, their ablations, and the two controls, as methods."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch

import ucan_fast as uf
from ucan_fast.batches import FORGET, RETAIN
from ucan_fast.guidance import separability

from ..model.resources import peak_memory
from .case import Batch, Case, Clock, Method, State, as_before
from .dampening import importance_of_all

# Up to what SmolLM2 takes; a curve ends where calibration has dropped far enough.
STRENGTHS = (
    *(0.06, 0.12, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0),
    *(64.0, 128.0),
)
FRACTIONS = (
    *(0.0025, 0.005, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3),
    *(0.4, 0.5, 0.6, 0.8),
)
SCALES = (
    *(0.995, 0.99, 0.98, 0.97, 0.955, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7),
    *(0.6, 0.5, 0.4, 0.3, 0.2),
)
#: Predicted rises of the forget NLL.
NATS = (
    0.005,
    0.01,
    0.02,
    0.03,
    0.06,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.8,
    1.0,
    1.4,
    2.0,
    2.8,
    4.0,
    5.6,
    8.0,
)
QUANTILES = (0.5, 0.85, 0.95, 0.99, 1.0)
#: Sums over all data that a bank holds.
PREPARED = ("moments", "factors", "ssd")


def ladder(case: Case, values: Sequence[float]) -> Sequence[float]:
    """The values to try; every other one where the case is to be quick."""
    return values[1::2] if case.coarse else values


def only(batches: Sequence[Batch], group: int) -> list[Batch]:
    """The same sequences with no other group's tokens marked."""
    kept = []
    for batch in batches:
        groups = batch["token_groups"]
        kept.append({**batch, "token_groups": groups.where(groups == group, -1)})
    return kept


def prepare(case: Case, names: Iterable[str]) -> None:
    """Sums over all training data, as a bank holds them before a request comes in."""
    everything = []
    for batch in case.retain:
        groups = batch["token_groups"]
        everything.append({**batch, "token_groups": groups.where(groups != FORGET, RETAIN)})
    for name in names:
        clock = Clock()
        with clock:
            if name == "moments":
                case.prepared[name] = uf.collect(case.model, everything)
            elif name == "factors":
                case.prepared[name] = uf.collect_factors(case.model, everything, seed=case.seed)
            elif name == "ssd":
                case.prepared[name] = importance_of_all(case.model, case.retain)
            else:
                raise uf.UcanError(f"nothing is known of {name!r}; known: {', '.join(PREPARED)}.")
        case.seconds[name] = clock.seconds


def request_moments(case: Case) -> tuple[uf.ActivationStats, float]:
    """Statistics of both sides from the bank, and the seconds that a request takes for them."""
    return _once(
        case,
        "request moments",
        lambda: case.prepared["moments"].with_forget(
            uf.collect(case.model, only(case.forget, FORGET), group="forget")
        ),
    )


def request_factors(
    case: Case,
) -> tuple[tuple[uf.InfluenceFactors, uf.InfluenceFactors], float]:
    """Factors of forget and retain side from the bank, and the seconds, the subtraction's too."""

    def collect() -> tuple[uf.InfluenceFactors, uf.InfluenceFactors]:
        forget = uf.collect_factors(
            case.model, only(case.forget, FORGET), group="forget", seed=case.seed
        )
        return forget, case.prepared["factors"] - forget

    return _once(case, "request factors", collect)


def _once(case: Case, name: str, make: Callable[[], Any]) -> tuple[Any, float]:
    """Several methods start from the same sums: they are taken once, and charged to each.

    The peak of memory of that pass is kept, too: the runner charges it to whoever needs the sums.
    """
    if name not in case.prepared:
        clock, made = Clock(), []

        def timed() -> None:
            with clock:
                made.append(make())

        case.peaks[name] = peak_memory(timed, torch.device("cpu"))["peak_memory_bytes"]
        case.prepared[name] = (made[0], clock.seconds)
    return case.prepared[name]


@contextlib.contextmanager
def applied(plan: Any, model: torch.nn.Module) -> Iterator[None]:
    """The plan is on the model in the block."""
    plan.apply(model)
    try:
        yield
    finally:
        plan.undo(model)


def attenuation(case: Case, **fields: Any) -> Iterator[State]:
    """U-CAN by strength; with ``decay="hard"`` by the share of neurons that are removed.

    ``min_score=0``: also where the default finds the two sets too alike to select anything.
    """
    stats, seconds = request_moments(case)
    clock = Clock(seconds)
    with clock:
        config = uf.UcanConfig(min_score=0.0, **fields)
        if config.decay != "hard":
            plan = _plan(case, stats, config.replace(strength=1.0))
    hard = config.decay == "hard"
    for value in ladder(case, FRACTIONS if hard else STRENGTHS):
        edit = Clock(clock.seconds)
        with edit:
            if hard:
                changed = _plan(case, stats, config.replace(strength=1.0, fraction=value))
            else:
                changed = plan.with_strength(value)
            changed.apply(case.model)
        try:
            yield State(value, edit.seconds)
        finally:
            changed.undo(case.model)


def scores(case: Case) -> dict[str, dict[str, float]]:
    """The distribution of U-CAN's scores by site: what a report's guidance goes by.

    A site that the adapter has no layers for (``mlp`` of a q/v adapter) is left out.
    """
    stats, _ = request_moments(case)
    found = {}
    for site in ("input", "mlp"):
        if site == "mlp" and not any(".mlp." in name for name in stats.layers):
            continue
        score = _plan(case, stats, uf.UcanConfig(site=site, strength=1.0)).flat_score.double()
        found[site] = {f"{q:g}": float(score.quantile(q)) for q in QUANTILES}
        found[site]["share above 0.05"] = float((score > 0.05).double().mean())
    apart = separability(stats)
    found["contrast"] = {"all": apart.contrast, "noise": apart.noise, "excess": apart.excess}
    return found


def _plan(case: Case, stats: uf.ActivationStats, config: uf.UcanConfig) -> uf.AttenuationPlan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", uf.UcanWarning)
        return uf.make_plan(case.model, stats, config)


def gates(case: Case) -> Iterator[State]:
    """One-shot gates, by the predicted rise of the forget NLL."""
    sums, seconds = request_factors(case)
    clock = Clock(seconds)
    with clock:
        plan = uf.make_gates_plan(case.model, *sums)
    for value in ladder(case, NATS):
        edit = Clock(clock.seconds)
        with edit:
            changed = plan.with_strength(value)
            changed.apply(case.model)
        try:
            yield State(value, edit.seconds)
        finally:
            changed.undo(case.model)


def influence(case: Case, **fields: Any) -> Iterator[State]:
    """The influence step, by the predicted rise of the forget NLL."""
    sums, seconds = request_factors(case)
    clock = Clock(seconds)
    with clock:
        config = uf.UcanConfig(method="influence", **fields)
        plan = uf.make_influence_plan(case.model, *sums, config)
    yield from _steps(case, plan, clock)


def influence_steps(case: Case, share: float = 1.0) -> Generator[State, None, str]:
    """Several influence steps as preset ``"thorough"`` takes them, the search aside: by number.

    Args:
        share: of the retain batches that a step runs, drawn anew before each.

    Returns:
        Why the walk ended by itself; "" where it took all its steps.
    """
    sums, seconds = request_factors(case)
    clock = Clock(seconds)
    with clock:
        drawn = math.ceil(share * len(case.retain)) if share < 1 else 0
        config = uf.UcanConfig.preset("thorough", seed=case.seed, influence_batches=drawn)
        walk = uf.InfluenceWalk(case.model, only(case.forget, FORGET), case.retain, *sums, config)
    try:
        while walk.steps < config.influence_steps:
            with clock:
                if not walk.advance(last=walk.steps + 1 == config.influence_steps):
                    break
            # How much is left: what a report's advice goes by.
            yield State(walk.steps, clock.seconds, {"still_known": walk.known()})
        return walk.ended
    finally:
        walk.restore()


def gradient_step(case: Case) -> Iterator[State]:
    """One plain step up the forget NLL, by its predicted rise: what preconditioning adds to."""
    (forget, retain), seconds = request_factors(case)
    clock = Clock(seconds)
    with clock:
        bare = {key: g / forget.positions for key, g in forget.gradients.items()}
        slope = sum(float(g.square().sum()) for g in bare.values())
        # The diagonals make the cheapest plan of all matrices; its directions are replaced.
        config = uf.UcanConfig(method="influence", influence_variant="diagonal")
        plan = uf.make_influence_plan(case.model, forget, retain, config)
        plan = dataclasses.replace(plan, directions={k: g / slope for k, g in bare.items()})
    yield from _steps(case, plan, clock)


def _steps(case: Case, plan: uf.InfluencePlan, clock: Clock) -> Iterator[State]:
    with clock:
        edit = plan.edit(case.model, case.model.active_adapter)
    for value in ladder(case, NATS):
        # Each state is written on the original weights: the ones before it cost it nothing.
        written = Clock(clock.seconds)
        with written:
            edit.write(value)
        try:
            yield State(value, written.seconds)
        finally:
            edit.restore()


def uniform(case: Case) -> Iterator[State]:
    """The whole adapter scaled down by one number."""
    for scale in ladder(case, SCALES):
        with as_before(case.model) as weights:
            with torch.no_grad():
                for name, weight in weights.items():
                    if ".lora_B." in name:
                        weight.mul_(scale)
            yield State(1 - scale, 0.0)


def random_neurons(case: Case) -> Iterator[State]:
    """U-CAN's factors at the input site, on neurons drawn at random."""
    stats, _ = request_moments(case)
    plan = _plan(case, stats, uf.UcanConfig(min_score=0.0, strength=1.0))
    order = torch.randperm(plan.neurons, generator=torch.Generator().manual_seed(case.seed))
    for value in ladder(case, STRENGTHS):
        changed = plan.with_strength(value)
        changed = dataclasses.replace(changed, flat_factors=changed.flat_factors[order])
        with applied(changed, case.model):
            yield State(value, 0.0)


def retraining(case: Case) -> Iterator[State]:
    """An adapter that never saw the forget set: what the others stand in for."""
    weights, seconds = case.retrain()
    with as_before(case.model) as own:
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(weight)
        yield State(0.0, seconds)


def _ucan(name: str, **fields: Any) -> Method:
    return Method(name, attenuation, ({**fields},), ("moments",))


def _influence(name: str, **fields: Any) -> Method:
    return Method(name, influence, ({**fields},), ("factors",), backward=True)


RETRAINING = Method("retraining", retraining, backward=True, single=True)
CONTROLS = (
    Method("uniform shrink (control)", uniform),
    Method("random neurons (control)", random_neurons, needs=("moments",)),
)
ATTENUATION = (
    _ucan("U-CAN, input", site="input"),
    _ucan("U-CAN, mlp", site="mlp"),
    _ucan("U-CAN, rank", site="rank"),
    _ucan("U-CAN, output", site="output"),
    _ucan("U-CAN, input, w/o C (no contrast)", contrast="none"),
    _ucan("U-CAN, input, w/o F (no utility)", utility_weight=0.0),
    _ucan("U-CAN, input, w/o H (hard pruning)", decay="hard"),
    _ucan("U-CAN, mlp, w/o H (hard pruning)", site="mlp", decay="hard"),
)
BEYOND = (
    Method("gates", gates, needs=("factors",), backward=True),
    _influence("influence"),
    _influence("influence, B only", influence_variant="b-only"),
    _influence("influence, last blocks", influence_variant="last-blocks"),
    _influence("influence, eigenbasis", influence_variant="eigenbasis"),
    _influence("influence, diagonals", influence_variant="diagonal"),
    Method("influence, several steps", influence_steps, needs=("factors",), backward=True),
    Method(
        "influence, several steps, a fifth of D_r each",
        influence_steps,
        ({"share": 0.2},),
        needs=("factors",),
        backward=True,
    ),
    Method("one plain gradient step", gradient_step, needs=("factors",), backward=True),
)
