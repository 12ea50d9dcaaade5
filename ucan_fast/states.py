"""The states of a report: before, edited and both controls, and what is measured in each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from .batches import eval_mode
from .controls import Control, random_control, random_step_control, uniform_control
from .errors import UcanError
from .evaluation import Shift, forget_shift
from .influence import InfluencePlan
from .job import Job
from .plan import AttenuationPlan
from .report import OWN_METRICS
from .weights import WeightEdit

Batches = Iterable[Mapping[str, Any]]
Measure = Callable[[nn.Module], Mapping[str, float]]
#: Metrics by name, by state; None where one does not exist.
States = dict[str, dict[str, float | None]]


def measure_states(
    job: Job,
    plan: AttenuationPlan | InfluencePlan,
    forget: Batches,
    evaluate: Literal[True] | Measure,
) -> States:
    """Metrics by state; why one is missing goes to the job's notes.

    Args:
        evaluate: True, or a function ``model -> {name: value}`` to be measured in each as well.

    Raises:
        UcanError: the function returns something else.
    """
    model, notes = job.model, job.notes
    if isinstance(plan, InfluencePlan):
        name, edit, factors = "influence", plan.edit(model, job.adapter), plan.strength
    else:
        name = "gates" if plan.config.method == "gates" else "U-CAN"
        factors = plan.flat_factors
        edit = WeightEdit(plan.match(model, job.adapter))
    edits = {name: (edit, factors)}
    retain_losses = {"before": job.retain.before}
    if plan.is_noop:
        notes["controls"] = f"not run: the plan changes nothing ({plan.note})"
    elif job.retain.measure is None:
        notes["controls"] = f"not run: the retain loss cannot be matched, {job.retain.missing}"
    if job.retain.measure is not None:
        with edit.applied(factors):
            retain_losses[name] = job.retain.measure()
    if "controls" not in notes:
        for control in _controls(job, plan, retain_losses[name]):
            edits[control.name] = (control.edit, control.factors)
            retain_losses[control.name] = control.loss
            if control.note:
                notes[control.name] = control.note

    on = {name: (lambda e=e, f=f: e.applied(f)) for name, (e, f) in edits.items()}
    loss, shifts = forget_shift(model, forget, on, job.progress)
    if not loss.tokens:
        notes["forget"] = (
            "no forget position is scored: a forget token needs a token before it and, where "
            "there are labels, a label other than -100"
        )
    unmoved = Shift(loss, 0.0, 0.0)
    states = {}
    for name in ("before", *edits):
        shift = unmoved if name == "before" else shifts[name]
        states[name] = _figures(shift, retain_losses.get(name), job.retain.on_batches)
    if callable(evaluate):
        with eval_mode(model), torch.no_grad():
            states["before"] |= _measured(evaluate, model)
            for name in edits:
                with on[name]():
                    states[name] |= _measured(evaluate, model)
    if job.retain.measure is None:
        notes["retain"] = f"no retain metric: {job.retain.missing}"
    return states


def _measured(evaluate: Measure, model: nn.Module) -> dict[str, float | None]:
    """What the caller's function measured, as plain floats (it may return tensors)."""
    values = {}
    measured = evaluate(model)
    if not isinstance(measured, Mapping):
        raise UcanError(
            f"evaluate= returned {type(measured).__name__}; it must return {{name: number}}."
        )
    for name, value in measured.items():
        if name in OWN_METRICS:
            raise UcanError(
                f"evaluate= returned {name!r}, which is a metric of the report itself; "
                "choose another name."
            )
        try:
            values[str(name)] = None if value is None else float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UcanError(
                f"evaluate= returned {value!r} for {name!r}; every metric must be one number."
            ) from error
    return values


def _controls(job: Job, plan: AttenuationPlan | InfluencePlan, target: float) -> Iterator[Control]:
    arguments = (job.retain.measure, job.retain.before, target)
    yield uniform_control(job.model, job.adapter, *arguments)
    at_random = random_step_control if isinstance(plan, InfluencePlan) else random_control
    yield at_random(job.model, job.adapter, plan, *arguments)


def _figures(
    shift: Shift, retain_loss: float | None, retain_is_nll: bool
) -> dict[str, float | None]:
    scored = shift.loss.tokens > 0
    figures: dict[str, float | None] = {
        "forget/kl": shift.kl if scored else None,
        "forget/prediction_shift": shift.prediction_shift if scored else None,
        "forget/perplexity": shift.loss.perplexity if scored else None,
    }
    if retain_loss is not None and retain_loss == retain_loss:
        figures["retain/loss"] = retain_loss
        if retain_is_nll:
            figures["retain/perplexity"] = float(
                torch.tensor(retain_loss, dtype=torch.float64, device="cpu").exp()
            )
    return figures
