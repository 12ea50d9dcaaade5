"""PNG figures of benchmark results: ratio bars, the roofline, scaling curves.

A figure is a set of plain data and a function that draws it. The data's hash is written into the
PNG, so that a figure that no longer shows the results is found without drawing it again.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

_WINS, _LOSES = "#0b3c8c", "#c8501e"
_COLOURS = (
    *("#0b3c8c", "#2e9bd6", "#e0a000", "#c8501e", "#6a8f3c", "#8a5a9e", "#555555", "#d46a9c"),
    *("#1a9e8f", "#7a4a12", "#9db80c", "#b03060"),
)
_KEY = "Source"


@dataclass(frozen=True)
class Figure:
    """A figure to be.

    Attributes:
        name: file name without suffix.
        data: what it shows, as JSON can hold it.
        draw: (canvas, data) -> None.
    """

    name: str
    data: Mapping[str, Any]
    draw: Callable[[Canvas, Mapping[str, Any]], None]

    def digest(self) -> str:
        """Hash of the data."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> Path:
        """Draw it; the PNG carries the digest."""
        canvas = Canvas(layout="constrained")
        FigureCanvasAgg(canvas)
        self.draw(canvas, self.data)
        path = folder / f"{self.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, dpi=110, metadata={_KEY: self.digest()})
        return path

    def is_current(self, folder: Path) -> bool:
        """Whether the file there shows these data."""
        path = folder / f"{self.name}.png"
        return path.exists() and written_digest(path) == self.digest()


def written_digest(path: Path) -> str | None:
    """The digest that a PNG carries."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(_KEY)


def draw_ratios(canvas: Canvas, data: Mapping[str, Any]) -> None:
    """Bars: how many times faster ucan_fast is than each peer, a panel per case.

    Args:
        canvas: empty.
        data: ``cases``: [{"title", "bars": [[peer, median, q1, q3]]}], ``caption``.
    """
    cases = data["cases"]
    bars = [len(case["bars"]) for case in cases]
    canvas.set_size_inches(9.5, 1.0 + sum(0.27 * n + 0.62 for n in bars))
    axes = canvas.subplots(len(cases), 1, squeeze=False, height_ratios=[n + 0.7 for n in bars])
    for ax, case in zip(axes[:, 0], cases, strict=True):
        names, median, q1, q3 = zip(*case["bars"], strict=True)
        places = np.arange(len(names))[::-1]
        errors = [np.subtract(median, q1), np.subtract(q3, median)]
        colours = [_WINS if value >= 1 else _LOSES for value in median]
        ax.barh(places, np.subtract(median, 1), left=1, color=colours, height=0.62)
        ax.errorbar(median, places, xerr=errors, fmt="none", ecolor="black", capsize=2, linewidth=1)
        for place, value, high in zip(places, median, q3, strict=True):
            ax.annotate(
                _times(value),
                (max(high, 1), place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        ax.set_xscale("log")
        # A panel each: a bar of 1.2x would be a point beside one of 1,000x.
        low, high = min(0.9, 0.95 * min(q1)), max(1.5, max(q3))
        ax.set_xlim(low, high * (high / low) ** 0.12)
        ticks = _ticks(low, high)
        ax.set_xticks(ticks, [_times(tick) for tick in ticks], fontsize=8)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_yticks(places, names, fontsize=8)
        ax.set_ylim(-0.6, len(names) - 0.4)
        ax.axvline(1, color="black", linewidth=1)
        ax.set_title(case["title"], loc="left", fontsize=8.5, fontweight="bold")
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
        ax.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
    axes[-1, 0].set_xlabel(
        "time of the peer / time of ucan_fast, median and quartiles of the rounds; right of 1: "
        "ucan_fast is faster",
        fontsize=8,
    )
    _caption(canvas, data)


def _ticks(low: float, high: float) -> list[float]:
    # 1-2-5 steps, finer where the range is short; always with 1.
    if high / low < 4:
        steps = [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 2.5, 3]
    else:
        steps = [base * 10.0**power for power in range(-3, 7) for base in (1, 2, 5)]
    if high / low > 100:
        steps = [10.0**power for power in range(-3, 7)]
    return [step for step in steps if low <= step <= high]


def _times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:,.0f}x"


def draw_roofline(canvas: Canvas, data: Mapping[str, Any]) -> None:
    """Achieved operations per second over operations per byte, below the measured ceilings.

    Args:
        canvas: empty.
        data: ``ceilings``: {"bandwidth", "flops": {dtype: rate}}, ``points``:
            [{"group", "ours", "intensity", "rate"}], ``caption``.
    """
    canvas.set_size_inches(9.5, 5.6)
    ax = canvas.subplots()
    bandwidth, flops = data["ceilings"]["bandwidth"], data["ceilings"]["flops"]
    points = data["points"]
    x = np.array([point["intensity"] for point in points])
    span = np.geomspace(min(x) / 2, max(max(x), max(flops.values()) / bandwidth) * 2, 200)
    for dtype, rate in flops.items():
        ax.plot(span, np.minimum(span * bandwidth, rate), color="0.35", linewidth=1.2)
        ax.annotate(
            f"{dtype} products, {_rate(rate)}",
            (rate / bandwidth, rate),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=8,
            color="0.25",
        )
    ax.annotate(
        f"copy bandwidth, {bandwidth * 1e-9:,.0f} GB/s",
        (span[60], span[60] * bandwidth),
        xytext=(-6, 2),
        textcoords="offset points",
        ha="right",  # above the line: below it lie the points
        fontsize=8,
        color="0.25",
    )
    for group, colour in zip(dict.fromkeys(p["group"] for p in points), _COLOURS, strict=False):
        for ours, marker, size in ((False, "o", 16), (True, "D", 34)):
            chosen = [p for p in points if p["group"] == group and p["ours"] is ours]
            ax.scatter(
                [p["intensity"] for p in chosen],
                [p["rate"] for p in chosen],
                s=size,
                marker=marker,
                facecolors=colour if ours else "none",
                edgecolors=colour,
                linewidths=0.9,
                label=group if ours else None,
                zorder=3,
            )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("operations per byte that the result needs")
    ax.set_ylabel("operations per second")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _rate(value)))
    ax.set_title(
        "Diamonds: ucan_fast; circles: its peers. Above the line: the data was still in a cache.",
        loc="left",
        fontsize=9,
    )
    ax.legend(fontsize=8, loc="lower right", frameon=False)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    _caption(canvas, data)


def draw_scaling(canvas: Canvas, data: Mapping[str, Any]) -> None:
    """Time over what was varied, both logarithmic, a panel per quantity; slopes in the legends.

    Args:
        canvas: empty.
        data: ``panels``: [{"title", "xlabel", "curves": [{"name", "ours", "points":
            [[x, median, q1, q3]], "slope"}]}], ``caption``.
    """
    panels = data["panels"]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    canvas.set_size_inches(5.0 * columns, 3.7 * lines + 0.3)
    axes = canvas.subplots(lines, columns, squeeze=False).ravel()
    names = list(dict.fromkeys(c["name"] for panel in panels for c in panel["curves"]))
    colour = dict(zip(names, _COLOURS, strict=False))
    for ax, panel in zip(axes, panels, strict=False):
        lifts = _lifts(panel["curves"])
        for curve in panel["curves"]:
            x, median, q1, q3 = (np.array(v) for v in zip(*curve["points"], strict=True))
            ax.errorbar(
                x,
                median,
                yerr=[median - q1, q3 - median],
                color=colour[curve["name"]],
                marker="D" if curve["ours"] else "o",
                markersize=4.5,
                linewidth=1.8 if curve["ours"] else 1.1,
                capsize=2,
                label=curve["name"],
            )
            ax.annotate(
                f"slope {curve['slope']:.2f}",
                (x[-1], median[-1]),
                xytext=(6, lifts[curve["name"]]),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=colour[curve["name"]],
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ticks = sorted({point[0] for curve in panel["curves"] for point in curve["points"]})
        ax.set_xlim(ticks[0] / 1.15, ticks[-1] * (ticks[-1] / ticks[0]) ** 0.2)
        ax.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], fontsize=8)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(panel["xlabel"], fontsize=8)
        ax.set_ylabel("seconds", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.set_title(panel["title"], loc="left", fontsize=9, fontweight="bold")
        ax.grid(color="0.92")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(
        handles, labels, loc="outside upper center", ncols=len(names), fontsize=8, frameon=False
    )
    _caption(canvas, data)


def _lifts(curves: list[Mapping[str, Any]]) -> dict[str, float]:
    # Points by which the label at a curve's end is moved up, so that none lies on another.
    every = [np.log(y) for curve in curves for _, y, *_ in curve["points"]]
    scale = 210 / max(max(every) - min(every), 1e-9)
    lifts, above = {}, -np.inf
    for curve in sorted(curves, key=lambda one: one["points"][-1][1]):
        place = np.log(curve["points"][-1][1]) * scale
        above = max(place, above + 9)
        lifts[curve["name"]] = above - place
    return lifts


def _caption(canvas: Canvas, data: Mapping[str, Any]) -> None:
    columns = int(canvas.get_size_inches()[0] * 15)
    lines = [textwrap.fill(line, columns) for line in data["caption"].splitlines()]
    canvas.supxlabel("\n".join(lines), fontsize=7, color="0.35", x=0.01, ha="left")


def _rate(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:,.3g} {unit}FLOP/s"
    return f"{value:,.3g} FLOP/s"
