"""The closed loop: the strongest attenuation whose retain loss stays within the budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

_STEPS = 12
#: Close enough: the search stops when this share of the budget is left, or of the value range.
_CLOSE = 0.02


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
    """Bisection over [0, high]; never ends outside the budget.

    The loss need not be monotone: the result is the largest value *tried* along the bisection
    that stayed inside, and 0 is inside by definition.

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
    low = 0.0
    for _ in range(_STEPS):
        left = loss_before + allowed - search.loss_after
        if low and left <= _CLOSE * allowed:
            break
        middle = (low + high) / 2
        if inside(middle):
            low = middle
        else:
            high = middle
    if not search.chosen and not refused[1]:
        search.note = (
            f"no {parameter} above {high:.3g} stays within the budget of {100 * budget:g} % retain "
            "loss; nothing was attenuated."
        )
    elif refused[1]:
        search.note = refused[1]
    return search


def match_loss(
    loss_at: Callable[[float], float], loss_before: float, target: float
) -> tuple[float, float]:
    """The value in [0, 1] whose loss comes closest to ``target``, by bisection.

    Returns:
        The value and its loss; the caller compares the loss with the target.
    """
    tried = [(0.0, loss_before)]
    low, high = 0.0, 1.0
    if target > loss_before:
        tried.append((high, loss_at(high)))
        for _ in range(_STEPS if not tried[-1][1] <= target else 0):
            if abs(tried[-1][1] - target) <= _CLOSE * (target - loss_before):
                break
            middle = (low + high) / 2
            tried.append((middle, loss_at(middle)))
            if tried[-1][1] <= target:
                low = middle
            else:
                high = middle
    return min(tried, key=lambda pair: math.inf if pair[1] != pair[1] else abs(pair[1] - target))
