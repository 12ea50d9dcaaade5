"""One case, all methods: curves, the setting and the state that calibration chooses, measures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ucan_fast.evaluation import forget_shift, group_loss
from ucan_fast.metrics import drop, perplexity, ranking_metrics
from ucan_fast.recsys import trade_offs

from ..model.resources import peak_memory
from .case import Case, Method, State, as_before, lora_weights
from .edits import FORGET, only

#: Drops of the case's metric on the retain side, in %, that forgetting is read off at.
BUDGETS = (0.5, 1.0, 5.0)
#: The one that settings are chosen at, and that the state measured in full stays within.
BUDGET = 5.0
#: A curve ends where calibration has dropped this far.
FAR_ENOUGH = 8.0
#: Batches of the forget set that KL divergence and perplexity are measured on, evenly spread.
MOST_BATCHES = 8


@dataclass
class Point:
    """One state on a curve: drops of the case's metric in % by side; what else is known of it."""

    value: float
    seconds: float
    drops: dict[str, float]
    measured: Mapping[str, float] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(repr=False, default_factory=dict)


Extra = Callable[[Case], Mapping[str, float]]


def run_case(
    case: Case,
    methods: Sequence[Method],
    say: Callable[[str], None] = print,
    extra: Extra | None = None,
) -> dict[str, Any]:
    """All methods on one case, as JSON can hold it.

    For every method and setting: the curve. What is forgotten at a budget is read off the curve of
    the setting that forgets most there on calibration users. Of the setting that does at
    ``BUDGET`` the strongest state that stays within it on them is measured in full; all figures
    are those of the other users. A method that fails is listed with its error.

    Args:
        extra: further figures of a state (membership inference), by name.
    """
    judge = Judge(case, extra or (lambda case: {}))
    found: dict[str, Any] = {
        "case": case.name,
        "seed": case.seed,
        "cases": judge.cases,
        "metric": case.metric,
        case.metric: judge.before,
        "before": judge.measured,
        "bank_seconds": case.seconds,
        "methods": {},
    }
    for method in methods:
        try:
            row = _run(case, method, judge)
        except Exception as error:  # a row of the table, not the end of it
            row = {"error": f"{type(error).__name__}: {error}"}
        found["methods"][method.name] = row
        say(f"{case.name}: {line(method.name, row)}")
    return found


class Judge:
    """Measures states of one case against the model before."""

    def __init__(self, case: Case, extra: Extra) -> None:
        self.case, self.extra = case, extra
        self.forget = only(case.forget, FORGET)[:: -(-len(case.forget) // MOST_BATCHES)]
        self.before, self.cases = self._sides()
        self.ranking = case.measure()
        self.measured = self.ranking | dict(extra(case)) | self._loss()

    def drops(self) -> dict[str, float]:
        """Of the model as it is, by side, in %."""
        now, _ = self._sides()
        return {side: drop(self.before[side], now[side]) for side in now}

    def full(self, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """All metrics of the model with these weights."""
        with _weights(self.case, weights):
            now = self.case.measure()
            extra = dict(self.extra(self.case))
        metrics = now | extra | self._shift(weights)
        return {"metrics": metrics, "trade_off": trade_offs(self.ranking, now)}

    def _sides(self) -> tuple[dict[str, float], dict[str, int]]:
        ranks = {side: found for side, found in self.case.ranks().items() if len(found)}
        values = {side: ranking_metrics(found)[self.case.metric] for side, found in ranks.items()}
        return values, {side: len(found) for side, found in ranks.items()}

    def _loss(self) -> dict[str, float]:
        losses = {
            "forget": group_loss(self.case.model, self.forget, "forget"),
            "calibration": group_loss(self.case.model, self.case.calibration, "retain"),
            "holdout": group_loss(self.case.model, self.case.holdout, "forget"),
        }
        return {f"{name}/nll": loss.mean for name, loss in losses.items()}

    def _shift(self, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        edits = {"now": lambda: _weights(self.case, weights)}
        _, shifts = forget_shift(self.case.model, self.forget, edits)
        shift = shifts["now"]
        return {
            "forget/kl": shift.kl,
            "forget/prediction_shift": shift.prediction_shift,
            "forget/perplexity": perplexity(shift.loss.nll, shift.loss.tokens),
            "forget/nll": shift.loss.mean,
        }


def _run(case: Case, method: Method, judge: Judge) -> dict[str, Any]:
    settings = method.settings[-2:] if case.coarse else method.settings
    curves = [_curve(case, method, setting, judge) for setting in settings]
    best = max(
        range(len(curves)), key=lambda i: at_budget(_pairs(curves[i][0], "calibration"), BUDGET)[0]
    )
    points, memory, ended = curves[best]
    shared = [case.peaks.get(f"request {name}") for name in method.needs]
    row: dict[str, Any] = {
        "backward": method.backward,
        "needs": list(method.needs),
        "settings": [dict(setting) for setting in settings],
        "setting": dict(settings[best]),
        "curves": [[[p.value, p.seconds, p.drops] for p in curve] for curve, *_ in curves],
        "best": best,
        # Why there are no further states, where the method itself says so.
        "ended": ended,
        "at_budget": {},
        "peak_memory_bytes": memory,
        # Of the pass over the forget set that the methods which start from a bank have in common.
        "shared_peak_bytes": max((peak for peak in shared if peak is not None), default=None),
    }
    if any(point.measured for point in points):
        row["measured"] = [dict(point.measured) for point in points]
    if not method.single:
        row["at_budget"] = at_budgets(row["curves"])
    # Retraining is one state, whatever it costs, and no curve.
    chosen = points[0] if method.single and points else _strongest(points)
    if chosen is not None:
        row |= {"value": chosen.value, "seconds": chosen.seconds, "drops": chosen.drops}
        row |= judge.full(chosen.weights)
    return row


def _curve(
    case: Case, method: Method, setting: Mapping[str, Any], judge: Judge
) -> tuple[list[Point], int | None, str]:
    """The states until calibration has dropped far enough, the peak of memory on the way, and what
    the method says of its end ("" where it says nothing)."""
    points: list[Point] = []
    memory: list[int] = []
    ended = ""
    states = method.states(case, **setting)
    with contextlib.closing(states):
        while True:
            step: list[State] = []
            try:
                used = peak_memory(lambda out=step: out.append(next(states)), torch.device("cpu"))
            except StopIteration as stop:
                ended = stop.value or ""
                break
            if used["peak_memory_bytes"] is not None:
                memory.append(used["peak_memory_bytes"])
            weights = {name: w.detach().clone() for name, w in lora_weights(case.model).items()}
            state = step[0]
            drops = judge.drops()
            points.append(Point(state.value, state.seconds, drops, state.measured, weights))
            if not points[-1].drops["calibration"] <= FAR_ENOUGH:
                break
    return points, max(memory, default=None), ended


def _strongest(points: Sequence[Point]) -> Point | None:
    """The last state before calibration is beyond the budget."""
    within = None
    for point in points:
        if not point.drops["calibration"] <= BUDGET:
            break
        within = point
    return within


def _pairs(points: Iterable[Point], side: str) -> list[tuple[float, float]]:
    return [(point.drops[side], point.drops["forget"]) for point in points]


def at_budget(points: Iterable[tuple[float, float]], budget: float) -> tuple[float, str]:
    """The forget drop where the curve first exceeds this retain drop, between its two points.

    Returns:
        The drop, and how it is known: ``"between"`` two states; ``"first"``, on the straight line
        from the original to the first state, which is beyond the budget; ``"end"``, the largest
        drop on a curve that ends before.
    """
    last, most, known = (0.0, 0.0), 0.0, "first"
    for retain, forget in points:
        if retain > budget:
            share = (budget - last[0]) / (retain - last[0])
            return last[1] + share * (forget - last[1]), known
        last, most, known = (retain, forget), max(most, forget), "between"
    return most, "end"


def at_budgets(curves: Sequence[Sequence[Sequence[Any]]]) -> dict[str, tuple[float, str]]:
    """:func:`at_budget` for every budget, each on the curve that forgets most there on calibration.

    Args:
        curves: of one setting each, points as a file has them: value, seconds, drops by side.
    """
    found = {}
    for budget in BUDGETS:
        by_side = [
            [
                at_budget([(p[2][side], p[2]["forget"]) for p in curve], budget)
                for side in ("calibration", "retain")
            ]
            for curve in curves
        ]
        found[f"{budget:g}"] = max(by_side, key=lambda pair: pair[0][0])[1]
    return found


@contextlib.contextmanager
def _weights(case: Case, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    with as_before(case.model) as own:
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(weight)
        yield


def marked(text: str, *known: str) -> str:
    """A drop at a budget with its mark: in brackets where no state is within the budget, with ≥
    where the curve ends before."""
    if "first" in known:
        return f"({text})"
    return f"≥ {text}" if "end" in known else text


def line(name: str, row: Mapping[str, Any]) -> str:
    """One row in words, for who watches."""
    if "error" in row:
        return f"{name}: {row['error']}"
    cells = " / ".join(
        f"{'' if end else '<='}{value:.1f}" for value, end in row["at_budget"].values()
    )
    return f"{name}: forget drop {cells} %, {row.get('seconds', float('nan')):.2f} s"
