"""DeletionReport: what was asked, what changed, what it cost: as JSON, Markdown and a figure."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._version import __version__
from .adapter import module_device
from .config import UcanConfig
from .errors import UcanError
from .files import atomic_write, atomic_writes
from .guidance import Guidance
from .strength import StrengthSearch

DISCLAIMER = (
    "This is not a formal guarantee. The adapter was edited so that it responds less to the "
    "forget set; the report says how much less. It is no proof that nothing about the forget set "
    "can be recovered."
)
#: The JSON form of a report, in the folder of the adapter that it is about.
REPORT = "deletion_report.json"

STATES = ("before", "U-CAN", "influence", "gates", "uniform", "random")
_STATE_NAMES = {
    "before": "before",
    "U-CAN": "U-CAN",
    "influence": "influence step",
    "gates": "one-shot gates",
    "uniform": "control: whole adapter scaled down",
    "random": "control: random neurons",
}
#: Metrics that every report measures itself, and what they mean.
OWN_METRICS = {
    "forget/kl": "mean KL(original ‖ edited) on forget positions, nats",
    "forget/prediction_shift": "forget positions whose top prediction changed, %",
    "forget/perplexity": "perplexity of the forget tokens",
    "retain/loss": "mean retain loss, nats per token",
    "retain/perplexity": "perplexity of the retain (calibration) tokens",
}


@dataclass
class DeletionReport:
    """The record of one deletion request.

    Attributes:
        request: counts of tokens and sequences, and where the retain statistics came from.
        config: every choice.
        change: neurons attenuated, in total and per layer, threshold, strength, note. For an
            influence step: its strength (the predicted rise of the forget NLL in nats), the
            bytes of every variant's factors, and per layer how far it was moved (relative to
            its norm) and its share of the predicted rise.
        metrics: state (``before``, then ``U-CAN``, ``influence`` or ``gates``, ``uniform``,
            ``random``) -> metric -> value; None where it could not be measured (``notes`` says
            why).
        notes: why something is missing or not comparable.
        search: the strength search, or None.
        guidance: what is to be expected of the request, and what is recommended. None where a
            gradient method found nothing to do, and where ``notes`` say why there is none.
        seconds: wall time per step.
        samples_per_second: sequences per second of the statistics pass.
        fingerprint_before, fingerprint_after: SHA-256 of the adapter.
        environment: versions and hardware.
    """

    request: dict[str, Any]
    config: UcanConfig
    change: dict[str, Any]
    metrics: dict[str, dict[str, float | None]]
    notes: dict[str, str]
    search: StrengthSearch | None
    guidance: Guidance | None
    seconds: dict[str, float]
    samples_per_second: float
    fingerprint_before: str
    fingerprint_after: str
    environment: dict[str, str]
    created: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )

    def to_json(self) -> str:
        """Everything, as one JSON object. Figures that are not finite become null or "inf"."""
        values = {
            "format": "ucan_fast.deletion_report",
            "version": 1,
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "disclaimer": DISCLAIMER,
        }
        values["config"] = json.loads(self.config.to_json())
        for name in ("search", "guidance"):
            value = getattr(self, name)
            values[name] = None if value is None else dataclasses.asdict(value)
        return json.dumps(json_values(values), indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """The same for people, as Markdown."""
        change, request = self.change, self.request
        lines = [
            "# Deletion report",
            "",
            f"*{self.created}, ucan_fast {self.environment['ucan_fast']}*",
            "",
            f"> {DISCLAIMER}",
            "",
            "## What was asked",
            "",
            f"Forget {request['forget_tokens']} tokens of adapter `{request['adapter']}`"
            + (" (earlier requests included)" if request["includes_previous_requests"] else "")
            + f", keep {request['retain_tokens']} (statistics from {request['retain_from']})."
            + _bounds_text(request),
            "",
            "## What changed",
            "",
            self._change_text(),
        ]
        if change["note"]:
            lines += ["", f"**Note:** {change['note']}"]
        if self.guidance is not None:
            lines += ["", "## What to expect", ""]
            lines += [f"Recommendation: **{self.guidance.recommendation}**. {self._guidance_text}"]
        lines += ["", *self._metrics_table(), *self._search_lines(), "", "## Layers", ""]
        lines += [*self._layer_lines(), "", "## How", ""]
        lines += [f"- {step}: {seconds:.3f} s" for step, seconds in self.seconds.items()]
        lines += [f"- statistics pass: {self.samples_per_second:.1f} sequences/s"]
        lines += [f"- adapter before: `{self.fingerprint_before}`"]
        lines += [f"- adapter after: `{self.fingerprint_after}`"]
        lines += [f"- seed: {self.config.seed}"]
        lines += [f"- {key}: {value}" for key, value in self.environment.items()]
        lines += ["", "```json", self.config.to_json(), "```", ""]
        return "\n".join(lines)

    def figure(self, path: str | os.PathLike) -> None:
        """Draw the attenuated neurons per layer, and forgetting against retain loss.

        Args:
            path: where to; the suffix (.png, .svg, .pdf) chooses the format.

        Raises:
            UcanError: matplotlib is not installed, or the file could not be written.
        """
        atomic_write(path, self._picture(Path(path).suffix.lstrip(".") or "png"))

    def _picture(self, suffix: str) -> Callable[[Path], None]:
        """The figure, as what writes it to a path."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UcanError("the figure needs matplotlib: pip install matplotlib.") from error
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
        self._draw_layers(figure, left)
        self._draw_cost(right)
        return lambda path: figure.savefig(path, format=suffix, dpi=120)

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Write ``deletion_report.json``, ``.md`` and, where matplotlib is there, ``.png``.

        Returns:
            The files written.

        Raises:
            UcanError: a file could not be written. All are as they were, unless it says otherwise.
        """
        folder = Path(folder)
        contents: dict[Path, Any] = {
            folder / REPORT: self.to_json().encode(),
            folder / "deletion_report.md": self.to_markdown().encode(),
        }
        try:
            contents[folder / "deletion_report.png"] = self._picture("png")
        except UcanError as error:
            if not isinstance(error.__cause__, ImportError):
                raise
        atomic_writes(contents)
        return list(contents)

    def _metrics_table(self) -> list[str]:
        if not self.metrics:
            lines = ["## Metrics", "", "Not measured (evaluate=False)."]
            return lines + self._note_lines()
        names = list(dict.fromkeys(name for state in self.metrics.values() for name in state))
        states = [state for state in STATES if state in self.metrics]
        edited = "the gates" if self.config.method == "gates" else "U-CAN"
        lines = [
            "## Metrics",
            "",
            "Controls are set to the retain loss that the step reached: what they forget, any "
            "change of that cost would have forgotten. (Where it fell they are the original.)"
            if self._influence
            else f"Controls are set to the retain loss that {edited} reached: what they forget, "
            "shrinking anything would have forgotten.",
            "",
            "| metric | " + " | ".join(self._state_name(s) for s in states) + " |",
            "|---|" + "---:|" * len(states),
        ]
        for name in names:
            values = [_number(self.metrics[state].get(name)) for state in states]
            # The caller's own metrics may be called anything.
            label = OWN_METRICS.get(name, name).replace("|", "\\|")
            lines.append(f"| {label} | " + " | ".join(values) + " |")
        return lines + self._note_lines()

    def _change_text(self) -> str:
        change = self.change
        if self._influence:
            memory = change["factor_bytes"]
            return (
                f"{change['matrices']} matrices ({change['parameters']} parameters) moved by "
                f"{self._steps_text}{self._from_text}, variant `{change['variant']}`, whose "
                f"{self._rise_text} of the forget NLL is {change['strength']:.4g} nats per token. "
                "Factors of one set of tokens (a request beside a bank holds three, of an "
                "eigenbasis one): "
                + ", ".join(f"`{name}` {size / 2**20:.3g} MiB" for name, size in memory.items())
                + "."
            )
        return (
            f"{change['attenuated']} of {change['neurons']} neurons attenuated "
            f"({_percent(change['attenuated'], change['neurons'])}) at site "
            f"`{self.config.effective_site}`, decay `{self.config.decay}`, "
            f"strength {change['strength']:.4g}. Largest score {change['largest_score']:.4g}, "
            f"threshold {change['threshold']:.4g}."
        )

    def _layer_lines(self) -> list[str]:
        layers = self.change["layers"].items()
        if self._influence:
            return [
                "| layer | parameters | moved, of its norm | share of the predicted rise |",
                "|---|---:|---:|---:|",
                *(
                    f"| {name} | {v['parameters']} | {100 * v['relative_change']:.2f} % "
                    f"| {100 * v['share']:.1f} % |"
                    for name, v in layers
                ),
            ]
        return [
            "| layer | neurons | attenuated | mean factor | smallest factor |",
            "|---|---:|---:|---:|---:|",
            *(
                f"| {name} | {v['neurons']} | {v['attenuated']} | {v['mean_factor']:.4f} "
                f"| {v['min_factor']:.4f} |"
                for name, v in layers
            ),
        ]

    def _state_name(self, state: str) -> str:
        if state == "random" and self._influence:
            return "control: random direction"
        return _STATE_NAMES[state]

    @property
    def _guidance_text(self) -> str:
        text = self.guidance.text
        return text[0].upper() + text[1:]

    @property
    def _steps_text(self) -> str:
        if self.config.influence_steps == 1:
            return "one influence step"
        count = len(self.change["steps"])
        if not count and self.change["strength"]:
            return "the steps of the earlier requests alone"
        return f"{count} influence step{'' if count == 1 else 's'}"

    @property
    def _from_text(self) -> str:
        later = self.config.influence_steps > 1 and self.request["includes_previous_requests"]
        return " from where the earlier requests led" if later and self.change["steps"] else ""

    @property
    def _rise_text(self) -> str:
        return "predicted rise" if self.config.influence_steps == 1 else "measured rise"

    @property
    def _influence(self) -> bool:
        return self.config.method == "influence"

    def _note_lines(self) -> list[str]:
        return [""] + [f"- {key}: {text}" for key, text in self.notes.items()] if self.notes else []

    def _search_lines(self) -> list[str]:
        search = self.search
        if search is None:
            return []
        lines = [
            "",
            "## Strength search",
            "",
            f"Budget: the retain loss may rise by {100 * search.budget:g} % (from "
            f"{search.loss_before:.4f}). Chosen: {search.parameter} {search.chosen:.4g}, retain "
            f"loss {search.loss_after:.4f} ({_rise(search.loss_after, search.loss_before)}).",
            "",
            f"| {search.parameter} | retain loss | change |",
            "|---:|---:|---:|",
        ]
        for value, loss in search.curve:
            rise = _rise(loss, search.loss_before)
            lines.append(f"| {value:.4g} | {loss:.4f} | {rise} |")
        return lines + self._step_lines()

    def _step_lines(self) -> list[str]:
        steps = self.change.get("steps")
        if not steps:
            return []
        return [
            "",
            "Before each step: the mean NLL of both sets, in nats per token (retain: of the "
            "batches that were run), the share of the forget positions that were better known than "
            "their references, and the rise of the forget NLL that the step predicted (by the "
            "weighted gradient where the forget set is known by heart).",
            "",
            "| step | forget NLL | retain NLL | still known | predicted rise |",
            "|---:|---:|---:|---:|---:|",
            *(
                f"| {number} | {s['forget_nll']:.4f} | {s['retain_nll']:.4f} "
                f"| {100 * s['known']:.1f} % | {s['rise']:.4f} |"
                for number, s in enumerate(steps, 1)
            ),
        ]

    def _draw_layers(self, figure, axes) -> None:
        """A map: kinds of layers by blocks of the model, coloured by how much was changed."""
        # Several layers may share a place (the experts of a block): their neurons together.
        part, whole = Counter(), Counter()
        for names, values in self.change["layers"].items():
            for name in names.split(" + "):
                size = values["parameters" if self._influence else "neurons"]
                whole[_place(name)] += size
                part[_place(name)] += (
                    values["relative_change"] * size if self._influence else values["attenuated"]
                )
        cells = {place: 100 * part[place] / count for place, count in whole.items()}
        kinds = list(dict.fromkeys(kind for kind, _ in cells))
        blocks = sorted({block for _, block in cells})
        grid = [[cells.get((kind, block), math.nan) for block in blocks] for kind in kinds]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
        step = max(1, len(blocks) // 16)
        axes.set_xticks(range(0, len(blocks), step), blocks[::step])
        axes.set_xlabel("block of the model")
        if self._influence:
            title = f"{self._steps_text}, {self._rise_text} {self.change['strength']:.3g} nats"
            label = "moved, of the layer's norm (%)"
        else:
            title = f"{self.change['attenuated']} of {self.change['neurons']} neurons attenuated"
            label = "attenuated in this layer (%)"
        axes.set_title(title, fontsize=10)
        figure.colorbar(image, ax=axes, label=label)

    def _draw_cost(self, axes) -> None:
        axes.set_xlabel("rise of the retain loss (nats per token)")
        axes.set_ylabel("KL on forget positions (nats)")
        points = {
            state: (
                values["retain/loss"] - self.metrics["before"]["retain/loss"],
                values["forget/kl"],
            )
            for state, values in self.metrics.items()
            if values.get("retain/loss") is not None and values.get("forget/kl") is not None
        }
        if len(points) < 2:
            axes.set_axis_off()
            reason = self.notes.get("controls") or self.notes.get("forget") or "not evaluated"
            axes.text(
                0.5, 0.5, f"no comparison:\n{_wrap(reason)}", ha="center", va="center", fontsize=9
            )
            return
        markers = {**dict.fromkeys(STATES, "D"), "before": "o", "uniform": "s", "random": "^"}
        for state, (x, y) in points.items():
            axes.scatter(
                [x], [y], marker=markers[state], s=60, label=self._state_name(state), zorder=3
            )
        axes.axhline(0, color="0.85", linewidth=1, zorder=0)
        axes.set_title("how far forget predictions moved, and at what cost", fontsize=10)
        axes.margins(0.15)
        # Small losses have long tick labels, which would run into each other.
        axes.locator_params(axis="x", nbins=5)
        axes.ticklabel_format(scilimits=(-2, 4), useMathText=True)
        axes.legend(fontsize=8, loc="best")


def environment(model: nn.Module) -> dict[str, str]:
    """Versions and hardware, for the record."""
    device = module_device(model)
    versions = {"ucan_fast": __version__, "python": platform.python_version()}
    versions |= {package: _version(package) for package in ("torch", "transformers", "peft")}
    if device.type == "cuda":
        versions["device"] = torch.cuda.get_device_name(device)
    else:
        name = _cpu_name()
        versions["device"] = f"{device.type}: {name}, {torch.get_num_threads()} threads"
    return versions


# Both read files, which takes longer than a small deletion request.
@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next(
            line.split(":", 1)[1].strip()
            for line in text.splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def json_values(value: Any) -> Any:
    """The same with figures that JSON does not know replaced: nan by None, inf by "inf"."""
    if isinstance(value, dict):
        return {str(key): json_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no such numbers; an infinite perplexity is information, nan is none.
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "n/a"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"


def _rise(loss: float, before: float) -> str:
    # A calibration function may return 0 (1 - recall) or less (-recall).
    if before == 0 or not math.isfinite(loss - before):
        return "n/a"
    return f"{100 * (loss - before) / abs(before):+.2f} %"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "n/a"


def _place(name: str) -> tuple[str, int]:
    """Kind and block of a layer: the first number in a module name counts the blocks."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return ".".join(parts[-2:]), 0
    # encoder and decoder blocks of one model must not fall on each other.
    side = [part for part in parts[: numbers[0]] if part in ("encoder", "decoder")]
    kind = [part for part in parts[numbers[0] + 1 :] if not part.isdigit()]
    return ".".join([*side, *kind[-2:]]), int(parts[numbers[0]])


def _wrap(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 44))


def _bounds_text(request: dict[str, Any]) -> str:
    source, ceiling = request.get("budget_measured_on"), request.get("never_seen_nats")
    text = "" if source is None else f" The retain budget is measured on {source}."
    return text + (
        "" if ceiling is None else f" Never-seen data cost {ceiling:.4g} nats per token."
    )
