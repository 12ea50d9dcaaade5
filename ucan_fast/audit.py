"""audit: is an unlearned adapter exactly what its plan says, and how far did it move?"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from .adapter import fingerprint, resolve_adapter, unwrap
from .batches import reusable
from .errors import UcanError
from .evaluation import forget_shift, group_loss
from .plans import load_plan
from .progress import Progress
from .report import DISCLAIMER, REPORT, json_values
from .reversible import ReversiblePlan

_OTHER = "ucan_fast_audited"


@dataclass
class Audit:
    """Findings.

    Attributes:
        checks: what was checked -> (passed, in words).
        metrics: ``original`` and ``unlearned`` -> metric -> value.
        fingerprints: of both adapters.
    """

    checks: dict[str, tuple[bool, str]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(passed for passed, _ in self.checks.values())

    def to_json(self) -> str:
        """Everything, as JSON."""
        values = {**dataclasses.asdict(self), "passed": self.passed, "disclaimer": DISCLAIMER}
        return json.dumps(json_values(values), indent=2, allow_nan=False)

    def __str__(self) -> str:
        lines = [
            f"{'pass' if passed else 'FAIL'}  {name}: {text}"
            for name, (passed, text) in self.checks.items()
        ]
        lines.append(f"{'':<26}{'original':>12}{'unlearned':>12}")
        for name in self.metrics["original"]:
            values = [self.metrics[state][name] for state in ("original", "unlearned")]
            shown = [f"{'n/a' if v is None else f'{v:.4g}':>12}" for v in values]
            lines.append(f"{name:<26}" + "".join(shown))
        return "\n".join([*lines, DISCLAIMER])


def audit(
    model: nn.Module,
    unlearned: str | os.PathLike,
    *,
    forget: Iterable[Mapping[str, Any]],
    retain: Iterable[Mapping[str, Any]] | None = None,
    plan: str | os.PathLike | None = None,
    progress: Progress = None,
) -> Audit:
    """Compare an unlearned adapter with the original one that ``model`` carries.

    Checks that the two differ; with a plan also that it was made for the original, and that the
    original edited by it *is* the unlearned adapter, bit by bit.

    Args:
        model: the base model with the original adapter. It is the same afterwards.
        unlearned: folder of the unlearned adapter.
        forget, retain: batches to measure both adapters on.
        plan: the plan file that came with it.

    Raises:
        UcanError: the adapter cannot be loaded or does not fit the model.
    """
    model = unwrap(model)
    adapter = resolve_adapter(model, None)
    findings = Audit()
    original = fingerprint(model, adapter)
    with _loaded(model, adapter, unlearned):
        edited = fingerprint(model, _OTHER)
        findings.fingerprints = {"original": original, "unlearned": edited}
        findings.checks["adapters differ"] = (
            edited != original,
            "the unlearned adapter has other weights than the original"
            if edited != original
            else "the unlearned adapter IS the original",
        )
        if plan is not None:
            loaded = load_plan(plan)
            findings.checks["plan"] = _check_plan(model, adapter, loaded, edited)
        report = Path(unlearned) / REPORT
        if report.exists():
            findings.checks["report"] = _check_report(report, original, edited)
        findings.metrics = _measure(model, adapter, forget, retain, progress)
    return findings


@contextlib.contextmanager
def _loaded(model: nn.Module, adapter: str, folder: str | os.PathLike) -> Iterator[None]:
    """The unlearned adapter beside the original; afterwards the model is as it was."""
    # PEFT changes these when it loads an adapter and when it switches to another.
    training = [module for module in model.modules() if module.training]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        try:
            loaded = model.load_adapter(str(folder), adapter_name=_OTHER)
        except (
            OSError,
            ValueError,
            RuntimeError,
            KeyError,
            TypeError,
            SafetensorError,
        ) as error:
            raise UcanError(f"cannot load the adapter {folder}: {error}") from error
        check_loaded(loaded, folder)
        yield
    finally:
        if _OTHER in model.peft_config:
            model.delete_adapter(_OTHER)
        model.set_adapter(adapter)
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)
        for module in training:
            module.training = True


def check_loaded(loaded: Any, folder: str | os.PathLike) -> None:
    """Refuse an adapter that fits the model only in part, of which PEFT merely warns.

    Args:
        loaded: what PEFT's ``load_adapter`` returned.

    Raises:
        UcanError: weights are missing from the adapter, or have no place in the model.
    """
    for names, problem in (
        (loaded.missing_keys, "it has no weights for"),
        (loaded.unexpected_keys, "the base model has no place for its"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise UcanError(f"cannot load the adapter {folder}: {problem} {names[0]}{more}.")


def _check_plan(
    model: nn.Module, adapter: str, plan: ReversiblePlan, edited: str
) -> tuple[bool, str]:
    original = fingerprint(model, adapter)
    if plan.fingerprint != original:
        return False, (
            f"the plan was made for an adapter {plan.fingerprint[:12]}, the original is "
            f"{original[:12]}"
        )
    plan.apply(model, adapter)
    try:
        same = plan.applied_fingerprint == edited
    finally:
        plan.undo(model, adapter)
    if same:
        return True, "the original edited by the plan is the unlearned adapter, bit by bit"
    return False, "the original edited by the plan is another adapter than the unlearned one"


def _check_report(path: Path, original: str, edited: str) -> tuple[bool, str]:
    try:
        report = json.loads(path.read_text())
        stated = report["fingerprint_before"], report["fingerprint_after"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return False, f"{path.name} cannot be read: {error!r}"
    if stated == (original, edited):
        return True, "the deletion report names these two adapters"
    return False, "the deletion report names other adapters than these two"


def _measure(
    model: nn.Module,
    adapter: str,
    forget: Iterable[Mapping[str, Any]],
    retain: Iterable[Mapping[str, Any]] | None,
    progress: Progress,
) -> dict[str, dict[str, float | None]]:
    @contextlib.contextmanager
    def unlearned() -> Iterator[None]:
        model.set_adapter(_OTHER)
        try:
            yield
        finally:
            model.set_adapter(adapter)

    before, shifts = forget_shift(model, forget, {"unlearned": unlearned}, progress)
    shift = shifts["unlearned"]
    metrics: dict[str, dict[str, float | None]] = {
        "original": {
            "forget/kl": 0.0,
            "forget/prediction_shift": 0.0,
            "forget/perplexity": before.perplexity,
        },
        "unlearned": {
            "forget/kl": shift.kl,
            "forget/prediction_shift": shift.prediction_shift,
            "forget/perplexity": shift.loss.perplexity,
        },
    }
    if retain is not None:
        retain = reusable(retain, "retain")
        metrics["original"]["retain/loss"] = group_loss(model, retain, "retain", progress).mean
        with unlearned():
            metrics["unlearned"]["retain/loss"] = group_loss(model, retain, "retain").mean
    # nan means that nothing was scored.
    return {
        state: {name: None if value != value else value for name, value in values.items()}
        for state, values in metrics.items()
    }
