"""The closed loop: the strongest attenuation whose retain loss stays within the budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

_STEPS = 12
#: Close enough: the search stops when this share of the budget is left, or of the value range.
_CLOSE = 0.02
#: What of the budget is aimed at: past it a try is lost, and from 1 - _CLOSE on it is the last one.
_AIM = 0.99


@dataclass
class StrengthSearch:
    """What the search saw.

    Attributes:
        parameter: ``"strength"`` (β) or, for hard pruning, ``"fraction"``.
        budget: allowed relative rise of the retain loss.
        loss_before: mean retain NLL of the origin, nats.
        curve: (value, loss) of every try, in order.
        chosen: the largest value tried whose loss stayed within the budget.
        loss_after: the loss there.
        note: in words, where the budget was not the limit.
    """

    parameter: str
    budget: float
    loss_before: float
    curve: list[tuple[float, float]] = field(default_factory=list)
    chosen: float = 0.0
    loss_after: float = math.nan
    note: str = ""


def search_strength(
    loss_at: Callable[[float], float],
    loss_before: float,
    budget: float,
    high: float,
    parameter: str = "strength",
    guard: Callable[[float], str] | None = None,
) -> StrengthSearch:
    """The largest value in [0, high] that is found; never ends outside the budget.

    The interval is cut where a power law through its ends meets the budget, and halved wherever
    that did not halve it: half as many tries as by bisection alone, each of which runs the model
    over the calibration data. The loss need not be monotone: the result is the largest value
    *tried* that stayed inside, and 0 is inside by definition.

    Args:
        loss_at: mean retain NLL with that value in force.
        loss_before: the same without any attenuation.
        budget: allowed relative rise.
        high: the largest value to consider.
        guard: why a value within the budget is refused all the same, "" where it is not.
    """
    search = StrengthSearch(parameter, budget, loss_before, loss_after=loss_before)
    allowed = budget * abs(loss_before)
    # Of the smallest value that was refused, "" where that was for the budget.
    refused = (math.inf, "")

    def inside(value: float) -> bool:
        nonlocal refused
        loss = loss_at(value)
        search.curve.append((value, loss))
        within = loss <= loss_before + allowed  # nan is outside
        reason = guard(value) if within and guard is not None else ""
        if not within or reason:
            refused = min(refused, (value, reason))
            return False
        search.chosen, search.loss_after = value, loss
        return True

    if inside(high):
        search.note = (
            f"even {parameter}={high:g} stays within the budget of {100 * budget:g} % retain loss; "
            "the selection, not the budget, limits what is forgotten."
        )
        return search
    bracket = _Bracket(high, search.curve[-1][1] - loss_before, _AIM * allowed)
    for _ in range(_STEPS):
        left = loss_before + allowed - search.loss_after
        if search.chosen and left <= _CLOSE * allowed:
            break
        value = bracket.next()
        bracket.add(value, inside(value), search.curve[-1][1] - loss_before)
    if not search.chosen and not refused[1]:
        search.note = (
            f"no {parameter} down to {bracket.high[0]:.3g} stays within the budget of "
            f"{100 * budget:g} % retain loss; nothing was attenuated."
        )
        if loss_before == 0:
            search.note += " (A share of a loss of 0 is 0: give a loss that is above it.)"
    elif refused[1]:
        search.note = refused[1]
    return search


class _Bracket:
    """Two values, the lower one inside and the upper one outside, and how far the loss rose there.

    Args:
        high: outside.
        rise: of the loss there; nan and inf where it is none.
        aim: the rise that is looked for.
    """

    def __init__(self, high: float, rise: float, aim: float) -> None:
        self.low, self.high, self.aim = (0.0, 0.0), (high, rise), aim
        # The upper value before the present one.
        self.beyond = (high, math.inf)
        self._halve = False

    def next(self) -> float:
        """The value to try."""
        (low, low_rise), (high, high_rise) = self.low, self.high
        crosses = 0 < self.aim < high_rise < math.inf  # not so where the upper one was refused
        if self._halve or not crosses:
            return (low + high) / 2
        other, other_rise = self.low if low > 0 and 0 < low_rise < self.aim else self.beyond
        power = 2.0  # from 0 losses rise like a square
        if 0 < other_rise < math.inf and other != high:
            steepness = math.log(high_rise / other_rise) / math.log(high / other)
            power = steepness if steepness > 1e-3 else power
        value = high * math.exp(math.log(self.aim / high_rise) / power)
        margin = (high - low) / 20
        return min(max(value, low + margin), high - margin)

    def add(self, value: float, inside: bool, rise: float) -> None:
        """The value was tried."""
        width = self.high[0] - self.low[0]
        if inside:
            self.low = value, rise
        else:
            self.beyond, self.high = self.high, (value, rise)
        self._halve = not self._halve and self.high[0] - self.low[0] > width / 2


def match_loss(
    loss_at: Callable[[float], float], loss_before: float, target: float
) -> tuple[float, float]:
    """The value in [0, 1] whose loss comes closest to ``target``, as :func:`search_strength` looks.

    Returns:
        The value and its loss; the caller compares the loss with the target.
    """
    tried = [(0.0, loss_before)]
    high = 1.0
    if target > loss_before:
        tried.append((high, loss_at(high)))
        bracket = _Bracket(high, tried[-1][1] - loss_before, target - loss_before)
        for _ in range(_STEPS if not tried[-1][1] <= target else 0):
            if abs(tried[-1][1] - target) <= _CLOSE * (target - loss_before):
                break
            value = bracket.next()
            tried.append((value, loss_at(value)))
            bracket.add(value, tried[-1][1] <= target, tried[-1][1] - loss_before)
    return min(tried, key=lambda pair: math.inf if pair[1] != pair[1] else abs(pair[1] - target))
