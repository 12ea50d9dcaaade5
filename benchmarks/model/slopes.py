"""How a time grows with a size: the slope of log(time) over log(size)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..measure import Result, Spread

#: Fewer points say too little about a line.
MIN_POINTS = 4


@dataclass(frozen=True)
class Slope:
    """Least squares through ``(log size, log seconds)``.

    Attributes:
        value: 1 where the time is proportional to the size, 0 where it does not depend on it.
        standard_error: of ``value``, from the residuals: sqrt(Σ e² / (n - 2) / Σ (x - x̄)²).
        points: the (size, median seconds) it was taken from.
    """

    value: float
    standard_error: float
    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Slope:
        """Through these (size, seconds).

        Raises:
            ValueError: fewer than :data:`MIN_POINTS` sizes, or a value that is not positive.
        """
        if len({size for size, _ in points}) < MIN_POINTS:
            raise ValueError(f"a slope needs {MIN_POINTS} different sizes, not {points}.")
        if not all(size > 0 and seconds > 0 for size, seconds in points):
            raise ValueError(f"sizes and seconds must be positive: {points}.")
        xs = [math.log(size) for size, _ in points]
        ys = [math.log(seconds) for _, seconds in points]
        n = len(points)
        mean_x, mean_y = sum(xs) / n, sum(ys) / n
        spread = sum((x - mean_x) ** 2 for x in xs)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
        residuals = [y - mean_y - slope * (x - mean_x) for x, y in zip(xs, ys, strict=True)]
        error = math.sqrt(sum(e * e for e in residuals) / (n - 2) / spread)
        return cls(slope, error, tuple((float(x), float(y)) for x, y in points))


def attach_slopes(results: Sequence[Result], along: str) -> None:
    """Put every candidate's slope along this key of the shape into ``extra["slope"]``.

    Args:
        results: of one sweep: cases that differ in nothing else that matters.
    """
    for name in dict.fromkeys(result.name for result in results):
        mine = [result for result in results if result.name == name]
        slope = Slope.of([(r.shape[along], Spread.of(r.seconds).median) for r in mine])
        for result in mine:
            result.extra["slope"] = {
                "along": along,
                "value": slope.value,
                "standard_error": slope.standard_error,
                "points": [list(point) for point in slope.points],
            }


def slope_table(results: Sequence[Result]) -> str:
    """One line per sweep and candidate, for a terminal."""
    lines: dict[str, None] = {}
    for result in results:
        if "slope" in result.extra:
            slope = result.extra["slope"]
            points = slope["points"]
            lines[
                f"{result.group}: log-log slope along {slope['along']:<14}{result.name:<26}"
                f"{slope['value']:6.2f} ± {slope['standard_error']:.2f} "
                f"({len(points)} points, {points[0][0]:g} to {points[-1][0]:g})"
            ] = None
    return "\n".join(lines)
