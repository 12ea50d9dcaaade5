"""unlearn: the main job, from two sets of batches to an attenuated adapter and a report."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from .adapter import find_layers, fingerprint, one_walk, resolve_adapter, untouched_parts, unwrap
from .batches import (
    FORGET,
    RETAIN,
    check_iterable,
    eval_mode,
    group_index,
    holding,
    reusable,
)
from .calibration import BY_HEART, RetainLoss, given, sample, split
from .collect import collect_at_origin
from .config import UcanConfig, config_or
from .controls import Control, random_control, random_step_control, uniform_control
from .errors import UcanError, UcanWarning
from .evaluation import Shift, forget_shift
from .factor_pass import collect_factors
from .factors import InfluenceFactors
from .guidance import guide
from .influence import InfluencePlan
from .influence_job import (
    InfluenceStats,
    Joined,
    gates_plan,
    influence_change,
    influence_plan,
    influence_statistics,
    search_step,
    search_walk,
)
from .influence_walk import Measured, check_base
from .marks import check_is_origin
from .neurons import moments_site
from .plan import AttenuationPlan
from .progress import Progress
from .report import OWN_METRICS, DeletionReport, environment
from .scoring import score_plan, unsearched_note
from .stats import ActivationStats
from .strength import StrengthSearch, search_strength
from .weights import WeightEdit

Batches = Iterable[Mapping[str, Any]]
Measure = Callable[[nn.Module], Mapping[str, float]]


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
            retain data cost less than 0.2 nats per token, so that the budget is next to nothing.
    """
    config = config_or(config)
    _check_kinds(bank, previous)
    _check_steps(config, previous)
    influence, gradients = config.method == "influence", config.method != "attenuate"
    several = config.influence_steps > 1
    model = unwrap(model)
    with one_walk(model), _at_origin(model, adapter, previous) as (adapter, origin, undone):
        job = _Job(model, adapter, config, progress, origin)
        check_iterable(forget, "forget")
        if retain is not None:
            check_iterable(retain, "retain")
        if holdout is not None and not (gradients and config.auto_strength):
            raise UcanError("holdout= is for method='influence' or 'gates' with strength='auto'.")
        if isinstance(holdout, (str, bool)):
            raise UcanError(f"holdout must be batches or nats per token > 0, not {holdout!r}.")
        if evaluate or config.auto_strength or gradients:
            forget = reusable(forget, "forget")
            retain = None if retain is None else reusable(retain, "retain")
        if gradients and bank is None and retain is not None:
            # Every token counts in its own group, wherever it is passed.
            strays = list(holding(model, retain, "retain", FORGET))
            forget = Joined(forget, strays) if strays else forget
        if bank is not None and retain is not None:
            _warn_of_forget_tokens(model, retain)
        if several:
            if holdout is None:
                check_base(model, adapter)
            job.prepare_walk(calibration, retain, forget, previous is not None, bank)
        with job.timed("collect"):
            gather = influence_statistics if gradients else _statistics
            stats = gather(job, forget, retain, bank, previous)
        if not several:
            with job.timed("score"):
                make = {"attenuate": score_plan, "influence": influence_plan, "gates": gates_plan}
                plan = make[config.method](model, stats, config, adapter)
            if config.auto_strength or evaluate:
                job.prepare_retain_loss(calibration, retain, forget, bank)
        with job.timed("search strength"):
            earlier = previous.plan if isinstance(previous, UnlearnResult) else None
            if several:
                job.retain.measure_before(config.auto_strength)
                plan = search_walk(job, stats, forget, holdout, earlier)
            else:
                plan = _choose_strength(job, plan, forget, holdout, earlier)
            job.warn_of_next_to_nothing()
        if previous is not None and plan.is_noop:
            plan.note += " Nothing of the earlier requests' forget sets is unlearned either."
            if undone is not None:
                plan.note += (
                    " Their plan was taken off: the adapter is the ORIGIN again. To put it back, "
                    "apply the earlier result's plan."
                )
        plan.warn_if_unusual()
        with job.timed("evaluate"):
            states, notes = _evaluate(job, plan, forget, evaluate) if evaluate else ({}, {})
            notes |= job.notes
        if previous is not None and states:
            notes["earlier requests"] = (
                "forget metrics cover the data of this request only; the earlier ones are in the "
                "statistics and in the plan, but their data were not run again"
            )
            if job.steps:
                notes["earlier requests"] += (
                    ". These steps moved them too, up or down: nothing held them where they were"
                )
        before = stats.fingerprint
        untouched = untouched_parts(model, adapter)
        if untouched:
            notes["untouched"] = (
                f"the adapter also trained {untouched}; attenuation leaves these as they are, "
                "whatever they know of the forget set"
            )
            warnings.warn(notes["untouched"], UcanWarning, stacklevel=2)
        guidance = None
        if not gradients:
            # Layers that the plan has no neurons in may have seen nothing (a tower of its own).
            try:
                guidance = guide(stats, moments_site(config))
            except UcanError as error:
                notes["advice"] = f"none: {error}"
        plan.apply(model, adapter)
        try:
            report = DeletionReport(
                request={
                    "forget_tokens": stats.tokens("forget"),
                    "retain_tokens": stats.tokens("retain"),
                    "forget_sequences": job.sequences["forget"],
                    "retain_from": "bank" if bank is not None else "batches",
                    "includes_previous_requests": previous is not None,
                    "adapter": adapter,
                },
                config=config,
                change=influence_change(job, plan) if influence else _change(plan),
                metrics=states,
                notes=notes,
                search=job.search,
                guidance=guidance,
                seconds=job.seconds,
                samples_per_second=job.throughput(),
                fingerprint_before=before,
                fingerprint_after=plan.applied_fingerprint or before,
                environment=environment(model),
            )
        except BaseException:
            plan.undo(model, adapter)
            raise
    return UnlearnResult(stats, plan, report)


@dataclass
class _Job:
    """What the steps share: the model, the retain loss, and the clock."""

    model: nn.Module
    adapter: str
    config: UcanConfig
    progress: Progress
    origin: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=lambda: {"forget": 0, "retain": 0})
    search: StrengthSearch | None = None
    retain: RetainLoss = field(default_factory=RetainLoss)
    walked: list | None = None
    notes: dict[str, str] = field(default_factory=dict)
    steps: list[Measured] = field(default_factory=list)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start

    def throughput(self) -> float:
        """Sequences per second of the statistics pass."""
        return sum(self.sequences.values()) / max(self.seconds["collect"], 1e-9)

    def collect(self, batches: Batches, group: str, sites: tuple[str, ...]) -> ActivationStats:
        counted = _Counted(batches, group)
        stats = collect_at_origin(
            self.model,
            counted,
            group,
            sites=sites,
            adapter=self.adapter,
            origin=self.origin,
            progress=self.progress,
        )
        self.sequences[group] += counted.sequences
        return stats

    def factors(self, batches: Batches, group: str, **options: Any) -> InfluenceFactors:
        counted = _Counted(batches, group)
        factors = collect_factors(
            self.model,
            counted,
            group=group,
            adapter=self.adapter,
            progress=self.progress,
            **options,
        )
        self.sequences[group] += counted.sequences
        return factors

    def prepare_retain_loss(
        self,
        calibration: Batches | Callable | None,
        retain: Batches | None,
        forget: Batches,
        bank: ActivationStats | None,
    ) -> None:
        """Find out what the retain loss is measured on, if on anything."""
        if calibration is not None:
            self.retain = given(self.model, calibration)
        elif retain is not None:
            batches = sample(self.model, retain, self.config.seed)
            self.retain = RetainLoss.of_batches(self.model, batches)
        elif bank is None:
            # In a forget batch only tokens that say so are retain tokens.
            batches = sample(self.model, forget, self.config.seed, group="forget")
            self.retain = RetainLoss.of_batches(self.model, batches)

    def prepare_walk(
        self,
        calibration: Batches | Callable | None,
        retain: Batches | None,
        forget: Batches,
        later: bool,
        bank: InfluenceFactors | None,
    ) -> None:
        """Find out what several steps run, apart from what their budget is measured on.

        Args:
            later: whether other requests came before this one.

        Raises:
            UcanError: there is no retain data to run, or too little to be split.
        """
        if retain is None and bank is not None:
            raise UcanError(
                "influence_steps > 1 runs retain data before every step, which a bank does not "
                "hold: pass retain= batches beside it. (Not as calibration= alone: a budget that "
                "is measured on the data that the steps run would not hold for others.)"
            )
        mixed = list(holding(self.model, forget, "forget", RETAIN))
        pool = [*(() if retain is None else retain), *mixed]
        if calibration is not None:
            self.retain, self.walked = given(self.model, calibration), pool
            return
        apart, self.walked = split(self.model, pool, self.config.seed)
        self.retain = RetainLoss.of_batches(self.model, apart)
        if apart:
            others = len(self.walked)
            drawn = self.config.influence_batches
            self.notes["retain budget"] = (
                f"measured on {len(apart)} of {len(apart) + others} retain batches; the steps ran "
                + (f"{drawn} of the others each" if 0 < drawn < others else "the others")
                + (
                    "; earlier requests may have run any of them: give calibration= data of its own"
                    if later
                    else ""
                )
            )

    def warn_of_next_to_nothing(self) -> None:
        """Say that the budget is a share of a loss that is none."""
        before, budget = self.retain.before, self.config.max_retain_loss_increase
        if self.config.auto_strength and self.retain.on_batches and before < BY_HEART:
            text = (
                f"it is {100 * budget:g} % of next to nothing: the retain data cost {before:.2g} "
                "nats per token, so they are known by heart, and can lose many times that with no "
                "recommendation changed. Pass calibration= a function that measures "
                "recommendations, or raise max_retain_loss_increase"
            )
            earlier = self.notes.get("retain budget")
            self.notes["retain budget"] = f"{earlier}; {text}" if earlier else text
            warnings.warn(f"retain budget: {text}.", UcanWarning, stacklevel=3)


def _check_kinds(bank: Any, previous: Any) -> None:
    """Refuse what is no statistics, such as the path of a file."""
    sums = (ActivationStats, InfluenceFactors)
    if bank is not None and not isinstance(bank, sums):
        raise UcanError(
            f"bank must be what collect or collect_factors returned, not {bank!r}; a file is read "
            "by ActivationStats.load(path) or InfluenceFactors.load(path)."
        )
    if previous is not None and not isinstance(previous, (UnlearnResult, InfluenceStats, *sums)):
        raise UcanError(
            f"previous must be the result of an earlier unlearn or its statistics, not "
            f"{previous!r}."
        )


def _warn_of_forget_tokens(model: nn.Module, retain: Batches) -> None:
    """Beside a bank the retain batches say nothing of what is to be forgotten."""
    if next(holding(model, retain, "retain", FORGET), None) is not None:
        warnings.warn(
            "retain= holds forget tokens. Beside a bank only those of forget= are forgotten: pass "
            "them there too.",
            UcanWarning,
            stacklevel=3,
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


class _Counted:
    """Batches, and how many sequences with a token of the group went by."""

    def __init__(self, batches: Batches, group: str) -> None:
        self.batches, self.group = batches, group_index(group)
        self.sequences = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self.batches:
            yield batch
            groups = batch.get("token_groups")
            if groups is not None:
                self.sequences += int((groups == self.group).any(1).sum())
                continue
            tokens = batch.get("input_ids")
            self.sequences += len(batch["inputs_embeds"] if tokens is None else tokens)


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
            undone.apply(model, adapter)
        raise


def _statistics(
    job: _Job,
    forget: Batches,
    retain: Batches | None,
    bank: ActivationStats | None,
    previous: UnlearnResult | ActivationStats | None,
) -> ActivationStats:
    sites = (moments_site(job.config),)
    request = job.collect(forget, "forget", sites)
    if not request.tokens("forget"):
        raise UcanError("the forget set is empty: no token of it is in group 0 (forget).")
    if isinstance(bank, InfluenceFactors):
        raise UcanError(
            "method='attenuate' needs a bank of activation statistics, not of factors: "
            "bank=ucan_fast.collect(model, all_batches)."
        )
    if previous is not None:
        earlier = previous.stats if isinstance(previous, UnlearnResult) else previous
        if not isinstance(earlier, ActivationStats):
            raise UcanError(
                "the earlier request was answered by a gradient method, which takes no activation "
                "statistics. Undo its plan and ask for both forget sets in one request."
            )
        request = request + earlier.select(sites).only("forget")
    if bank is not None:
        return bank.select(sites).with_forget(request)
    if retain is not None:
        return request + job.collect(retain, "retain", sites)
    if not request.tokens("retain"):
        raise UcanError(
            "there is no retain set: pass retain= batches or bank= statistics, or mark retain "
            "tokens in the forget batches with token_groups."
        )
    return request


def _choose_strength(
    job: _Job,
    plan: AttenuationPlan | InfluencePlan,
    forget: Batches,
    holdout: Batches | float | None,
    earlier: AttenuationPlan | InfluencePlan | None,
) -> AttenuationPlan | InfluencePlan:
    job.retain.measure_before(job.config.auto_strength)
    if not job.config.auto_strength or plan.note:
        return plan
    if plan.config.method != "attenuate":
        return search_step(job, plan, forget, holdout, earlier)
    if job.retain.measure is None:
        plan.note = f"{unsearched_note(plan.config)} (pass calibration= or retain=)."
        return plan
    edit = WeightEdit(plan.match(job.model, job.adapter))
    hard = job.config.decay == "hard"
    at = plan.with_fraction if hard else plan.with_strength

    def loss_at(value: float) -> float:
        with edit.applied(at(value).flat_factors):
            return job.retain.measure()

    search = search_strength(
        loss_at,
        job.retain.before,
        job.config.max_retain_loss_increase,
        1.0 if hard else job.config.max_strength,
        "fraction" if hard else "strength",
    )
    job.search = search
    chosen = at(search.chosen)
    chosen.note = search.note or chosen.note
    return chosen


def _evaluate(
    job: _Job, plan: AttenuationPlan | InfluencePlan, forget: Batches, evaluate: bool | Measure
) -> tuple[dict[str, dict[str, float | None]], dict[str, str]]:
    """Metrics of the four states, and why one is missing."""
    model, notes = job.model, {}
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
    return states, notes


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


def _controls(job: _Job, plan: AttenuationPlan | InfluencePlan, target: float) -> Iterator[Control]:
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


def _change(plan: AttenuationPlan) -> dict[str, Any]:
    factors, sizes = plan.flat_factors.double().numpy(), np.array(plan.sizes)
    starts = sizes.cumsum() - sizes
    figures = {
        "neurons": sizes,
        "attenuated": np.add.reduceat(factors != 1, starts, dtype=np.int64),
        "mean_factor": np.add.reduceat(factors, starts) / sizes,
        "min_factor": np.minimum.reduceat(factors, starts),
    }
    columns = zip(*(column.tolist() for column in figures.values()), strict=True)
    layers = {
        " + ".join(names): dict(zip(figures, row, strict=True))
        for names, row in zip(plan.groups, columns, strict=True)
    }
    return {
        "neurons": plan.neurons,
        "attenuated": plan.attenuated,
        "threshold": plan.threshold,
        "largest_score": float(plan.flat_score.max()),
        "strength": plan.strength,
        "fraction": plan.config.fraction,
        "note": plan.note,
        "layers": layers,
    }
