"""unlearn: the main job, from two sets of batches to an attenuated adapter and a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapter import find_layers, fingerprint, one_walk, resolve_adapter, untouched_parts, unwrap
from .attenuation_job import attenuation_change, attenuation_statistics, search_attenuation
from .config import UcanConfig, config_or
from .errors import UcanError, warn
from .factors import InfluenceFactors
from .guidance import Guidance, guide, guide_step, guide_steps
from .influence import InfluencePlan
from .influence_job import (
    InfluenceStats,
    gates_plan,
    influence_change,
    influence_plan,
    influence_statistics,
    search_step,
)
from .influence_walk import check_base
from .interrupts import finished
from .job import Job, Request
from .marks import check_is_origin
from .neurons import moments_site
from .plan import AttenuationPlan
from .progress import Progress
from .report import DeletionReport, environment
from .scoring import score_plan
from .states import Measure, measure_states
from .stats import ActivationStats
from .walk_job import search_walk

Batches = Iterable[Mapping[str, Any]]


@dataclass
class UnlearnResult:
    """What :func:`unlearn` did.

    Attributes:
        stats: what was measured of both groups on the origin; pass the result as ``previous=`` to
            the next request.
        plan: the applied plan; ``plan.undo(model)`` takes it back.
        report: the :class:`DeletionReport`; None in a result made from saved statistics and a
            saved plan, to be passed as ``previous=``.
    """

    stats: ActivationStats | InfluenceStats | InfluenceFactors
    plan: AttenuationPlan | InfluencePlan
    report: DeletionReport | None


def unlearn(
    model: nn.Module,
    *,
    forget: Batches,
    retain: Batches | None = None,
    bank: ActivationStats | InfluenceFactors | None = None,
    calibration: Batches | Callable[[nn.Module], float] | None = None,
    config: UcanConfig | None = None,
    evaluate: bool | Measure = True,
    progress: Progress = None,
    previous: UnlearnResult | ActivationStats | InfluenceFactors | None = None,
    holdout: Batches | float | None = None,
    adapter: str | None = None,
) -> UnlearnResult:
    """Unlearn the forget set in place: by attenuation (forward passes only), or by the influence
    step or gates (``method="influence"``, ``"gates"``; forward and backward passes).

    Args:
        model: a model with PEFT LoRA layers, plain or accelerated.
        forget: batches of D_f (see :func:`collect`). With ``token_groups`` they may hold retain
            tokens too.
        retain: batches of D_r. Needed unless there is a bank, or ``forget`` holds retain tokens.
            Every token counts in its own group, wherever it is passed: pass none of them twice.
            (With a bank only several influence steps run them, and only their retain tokens; forget
            tokens among them warn. Several steps keep all of them in memory.)
        bank: ``collect(model, all_batches)`` over *all* data, D_f included; then only D_f is run,
            and ``retain = bank - forget``. For the influence step
            ``collect_factors(model, all_batches)``, for gates the same (with
            ``variant="diagonal"`` it is far smaller).
        calibration: batches of D_r for the strength search, or a function ``model -> loss``.
            Default: a sample of about 8192 tokens of the retain batches (which stay in the
            statistics too); of several steps a part that they do not run. For requests in a row
            give data that stay out of every ``retain=``, or an earlier one has run them.
        config: all choices; default ``UcanConfig()``.
        evaluate: True: KL, prediction shift and perplexity, before, after and for both controls.
            A function ``model -> {name: value}`` is measured in the same four states as well.
            False: none of it.
        progress: True for progress bars, or a function ``(done, total, text)``.
        previous: the result (or its statistics) of the last request on this adapter. Its plan is
            taken off, its forget set is added to this one, and one new plan is applied to the
            origin: the same as one request with the union. (With ``strength="auto"`` the trust
            region and ``holdout`` of gradient methods are measured on this request's data alone:
            the earlier data are gone.) Several influence steps go on from where its plan leads to
            instead, and need the whole result; what was forgotten there is not run again, and the
            retain budget is that of both requests together. Requests must not overlap: a token in
            two of them would be counted, and taken from the bank, twice.
        holdout: for the influence step and gates: what never-seen data cost, as batches (forget
            tokens count) or in nats per token. The search stops before the forget set costs more,
            so that it does not stand out as forgotten.
        adapter: needed when several adapters are active.

    Returns:
        Statistics, plan and report. A plan that selects nothing is applied as a no-op, and warns.

    Raises:
        UcanError: bad input (named), an adapter with a plan applied without ``previous``,
            an empty forget or retain set. The model is as it was before the call.

    Warns:
        UcanWarning: the plan changes nothing (after ``previous`` this also takes the earlier
            requests back, and the warning says so), or more than half of all neurons; the adapter
            trained more than LoRA matrices (modules_to_save, biases), which stays as it is; the
            retain data cost less than 0.2 nats per token, so that the budget is next to nothing;
            sequences of the forget set are among the retained ones.
    """
    config = config_or(config)
    _check_kinds(bank, previous)
    _check_steps(config, previous)
    model = unwrap(model)
    with one_walk(model), _at_origin(model, adapter, previous) as (adapter, origin, undone):
        job = Job(model, adapter, config, progress, origin)
        is_result = isinstance(previous, UnlearnResult)
        request = Request(
            forget,
            retain,
            bank,
            calibration,
            holdout,
            earlier=previous.stats if is_result else previous,
            earlier_plan=previous.plan if is_result else None,
        ).checked(model, config, bool(evaluate))
        stats, plan = _answer(job, request, bool(evaluate))
        if previous is not None and plan.is_noop:
            plan.note += _says_nothing_is_unlearned(undone is not None)
        plan.warn_if_unusual()
        with job.timed("evaluate"):
            states = measure_states(job, plan, request.forget, evaluate) if evaluate else {}
        _add_notes(job, request, bool(states))
        guidance = _advice(job, stats, plan)
        before = stats.fingerprint
        plan.apply(model, adapter)
        try:
            report = DeletionReport(
                request={
                    "forget_tokens": stats.tokens("forget"),
                    "retain_tokens": stats.tokens("retain"),
                    "forget_sequences": job.sequences["forget"],
                    "retain_from": "bank" if bank is not None else "batches",
                    "includes_previous_requests": previous is not None,
                    "budget_measured_on": _measured_on(job, calibration),
                    "never_seen_nats": job.ceiling if job.ceiling < math.inf else None,
                    "adapter": adapter,
                },
                config=config,
                change=(
                    influence_change(job, plan)
                    if isinstance(plan, InfluencePlan)
                    else attenuation_change(plan)
                ),
                metrics=states,
                notes=job.notes,
                search=job.search,
                guidance=guidance,
                seconds=job.seconds,
                samples_per_second=job.throughput(),
                fingerprint_before=before,
                fingerprint_after=plan.applied_fingerprint or before,
                environment=environment(model),
            )
        except BaseException:
            with finished():
                plan.undo(model, adapter)
            raise
    return UnlearnResult(stats, plan, report)


def _answer(
    job: Job, request: Request, evaluate: bool
) -> tuple[ActivationStats | InfluenceStats, AttenuationPlan | InfluencePlan]:
    """Statistics of both sets, and the plan that they make, at the strength that is wanted."""
    config = job.config
    attenuates, several = config.method == "attenuate", config.influence_steps > 1
    if several:
        if request.holdout is None:
            check_base(job.model, job.adapter)
        job.prepare_walk(request)
    with job.timed("collect"):
        gather = attenuation_statistics if attenuates else influence_statistics
        stats = gather(job, request)
    job.warn_of_overlap(request)
    if not several:
        with job.timed("score"):
            make = {"attenuate": score_plan, "influence": influence_plan, "gates": gates_plan}
            plan = make[config.method](job.model, stats, config, job.adapter)
        if config.auto_strength or evaluate:
            job.prepare_retain_loss(request)
    with job.timed("search strength"):
        job.retain.measure_before(config.auto_strength)
        if several:
            plan = search_walk(job, stats, request)
        elif config.auto_strength and not plan.note:
            plan = search_attenuation(job, plan) if attenuates else search_step(job, plan, request)
        job.warn_of_next_to_nothing()
    return stats, plan


def _says_nothing_is_unlearned(undone: bool) -> str:
    """What a plan that changes nothing means after earlier requests."""
    note = " Nothing of the earlier requests' forget sets is unlearned either."
    if undone:
        note += (
            " Their plan was taken off: the adapter is the ORIGIN again. To put it back, apply the "
            "earlier result's plan."
        )
    return note


def _add_notes(job: Job, request: Request, measured: bool) -> None:
    """What the metrics do not cover, and what attenuation does not reach (which warns)."""
    if request.earlier is not None and measured:
        job.notes["earlier requests"] = (
            "forget metrics cover the data of this request only; the earlier ones are in the "
            "statistics and in the plan, but their data were not run again"
        ) + (
            ". These steps moved them too, up or down: nothing held them where they were"
            if job.steps
            else ""
        )
    untouched = untouched_parts(job.model, job.adapter)
    if untouched:
        job.notes["untouched"] = (
            f"the adapter also trained {untouched}; attenuation leaves these as they are, "
            "whatever they know of the forget set"
        )
        warn(job.notes["untouched"])


def _measured_on(job: Job, calibration: Any) -> str | None:
    """What the retain budget rests on; None where nothing was searched within one."""
    if job.search is None:
        return None
    if calibration is None:
        return "a sample of the retain data"
    return "calibration batches" if isinstance(calibration, Iterable) else "calibration function"


def _advice(
    job: Job, stats: ActivationStats | InfluenceStats, plan: AttenuationPlan | InfluencePlan
) -> Guidance | None:
    """What the report recommends; nothing where a gradient method found nothing to do."""
    if not isinstance(stats, ActivationStats):
        sizes = [stats.tokens(group) for group in ("forget", "retain")]
        if job.still_known is not None:
            return guide_steps(*sizes, job.still_known, job.ended)
        several = job.config.influence_steps > 1
        return None if plan.is_noop or several else guide_step(*sizes, job.config.method)
    # Layers that the plan has no neurons in may have seen nothing (a tower of its own).
    try:
        return guide(stats, moments_site(job.config))
    except UcanError as error:
        job.notes["advice"] = f"none: {error}"
        return None


def _check_kinds(bank: Any, previous: Any) -> None:
    """Refuse what is no statistics, such as the path of a file."""
    sums = (ActivationStats, InfluenceFactors)
    if bank is not None and not isinstance(bank, sums):
        raise UcanError(
            f"bank must be what collect or collect_factors returned, not {bank!r}; a file is read "
            "by ActivationStats.load(path) or InfluenceFactors.load(path)."
        )
    if isinstance(previous, UnlearnResult) and previous.stats is None:
        raise UcanError(
            "previous= holds no statistics of the earlier requests: without them what they forgot "
            "would come back. Load the ones that were saved with its plan."
        )
    if previous is not None and not isinstance(previous, (UnlearnResult, InfluenceStats, *sums)):
        raise UcanError(
            f"previous must be the result of an earlier unlearn or its statistics, not "
            f"{previous!r}."
        )


def _check_steps(config: UcanConfig, previous: Any) -> None:
    """Refuse requests in a row that would bring an earlier forget set back.

    Several steps go on from where an earlier plan leads to. One step is taken at the origin, by
    the gradients there, which do not say what several steps did.
    """
    if previous is None:
        return
    if config.influence_steps > 1:
        plan = getattr(previous, "plan", None)
        if plan is not None and not isinstance(plan, InfluencePlan):
            raise UcanError(
                f"the earlier request was answered by method={plan.config.method!r}, and "
                "influence steps cannot go on from there. Undo its plan and ask for both forget "
                "sets in one request."
            )
        if plan is None:
            raise UcanError(
                "influence_steps > 1 goes on from where the earlier request's plan leads to: pass "
                "previous= the whole result, not its statistics."
            )
    elif getattr(getattr(previous, "stats", previous), "steps", 1) > 1:
        raise UcanError(
            "the earlier request took several influence steps, and one step at the origin would "
            "not take them again: answer this one with influence_steps > 1 too (preset "
            "'thorough'), or undo the earlier plan and ask for both forget sets in one request."
        )


@contextmanager
def _at_origin(
    model: nn.Module,
    adapter: str | None,
    previous: UnlearnResult | ActivationStats | InfluenceFactors | None,
) -> Iterator[tuple[str, str, AttenuationPlan | InfluencePlan | None]]:
    """Take the previous plan off, and put it back if what follows fails.

    Yields the adapter's name, the origin's fingerprint and the plan that was taken off, if any.
    """
    adapter = resolve_adapter(model, adapter)
    find_layers(model, adapter)  # what cannot be measured is said before weights are read
    origin = fingerprint(model, adapter)
    undone = None
    applied = isinstance(previous, UnlearnResult) and previous.plan.applied_fingerprint == origin
    # One that was read from a file does not know the original weights, and need not where it
    # changed nothing.
    if applied and not (previous.plan.is_noop and previous.plan.originals is None):
        previous.plan.undo(model, adapter)
        undone = previous.plan
        origin = undone.fingerprint
    else:
        check_is_origin(model, adapter, origin)
    try:
        yield adapter, origin, undone
    except BaseException:
        if undone is not None:
            with finished():
                undone.apply(model, adapter)
        raise
