"""How many influence steps ``unlearn`` takes: what the retain budget and never-seen data allow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import UcanError
from .evaluation import group_loss
from .influence import InfluencePlan
from .influence_job import Batches, InfluenceStats, ceiling_of
from .influence_walk import FORGOTTEN, InfluenceWalk, counted
from .job import Job, Request
from .progress import track
from .strength import StrengthSearch

#: How often a step that leaves the retain budget is halved: as often as by the walk itself.
_HALVINGS = 8
#: The budget, and the way to what never-seen data cost, count as used up where this share is left.
_CLOSE = 0.02
#: As well as never-seen data are known, where their cost is given: what is left to that, relative.
_AT_CEILING = 0.05


def search_walk(job: Job, stats: InfluenceStats, request: Request) -> InfluencePlan:
    """As many influence steps as stay within the retain budget and below the holdout's NLL.

    A step that does not is halved, up to :data:`_HALVINGS` times, and taken back if that was no
    help; then the steps end. They go on from where the plan of the requests before this one leads
    to, and where none is taken it stays.

    Raises:
        UcanError: there is nothing to measure the retain loss on, or no scored holdout position.
    """
    if job.retain.measure is None or job.walked is None:
        raise UcanError(
            "strength='auto' has nothing to measure the retain budget on, and steps of unknown "
            "cost are not taken: retain= holds no batch."
        )
    earlier = request.earlier_plan
    if earlier is not None and earlier.is_noop:
        earlier = None
    before = job.retain.before
    search = StrengthSearch("steps", job.config.max_retain_loss_increase, before, loss_after=before)
    job.ceiling = ceiling_of(job.model, request.holdout)
    bounds = _Bounds(job, request.forget, job.ceiling, search)
    walk = InfluenceWalk(
        job.model,
        request.forget,
        job.walked,
        stats.forget,
        stats.retain,
        job.config,
        never_seen=bounds.ceiling,
        start=earlier,
        adapter=job.adapter,
    )
    why_none = bounds.reason_for_none(earlier)
    start = search.loss_after
    try:
        search.note = _take_steps(walk, bounds, why_none)
        plan = walk.plan()
        job.steps = list(walk.measured)
        job.still_known, job.ended = bounds.standing(walk)
    finally:
        walk.restore()
    stays = earlier is not None and plan.directions is earlier.directions
    if plan.is_noop or stays:
        search.chosen, search.loss_after, job.steps = 0.0, start, []
        job.still_known = None
    if stays:
        with earlier._edit(job.model, job.adapter).applied(earlier.strength):
            job.still_known, job.ended = bounds.standing(walk)
    job.search = search
    notes = [plan.note or search.note] if plan.is_noop and not stays else [search.note, plan.note]
    if stays:
        notes.append("The plan of the earlier requests stays as it is.")
    plan.note = " ".join(filter(None, notes))
    return plan


@dataclass
class _Bounds:
    """What every state of a walk is held against.

    Attributes:
        forget: batches of D_f.
        ceiling: nats per token that they may cost; infinite where nothing is said of never-seen
            data.
        search: the retain budget, and the states that were looked at.
        cost_before, cost: nats per token that they cost at the start, and cost now; -inf where
            there is no ceiling.
    """

    job: Job
    forget: Batches
    ceiling: float
    search: StrengthSearch
    cost_before: float = -math.inf
    cost: float = -math.inf

    @property
    def _room(self) -> float:
        """Nats of retain loss that may be added."""
        return self.search.budget * abs(self.job.retain.before)

    @property
    def _budget(self) -> str:
        return f"the budget of {100 * self.search.budget:g} % retain loss"

    def _is_within(self, loss: float) -> bool:
        return loss <= self.job.retain.before + self._room  # nan is outside

    def _forget_cost(self) -> float:
        """Nats per token; not measured where nothing depends on it."""
        if self.ceiling == math.inf:
            return -math.inf
        return group_loss(self.job.model, self.forget, "forget").mean

    def standing(self, walk: InfluenceWalk) -> tuple[float, str]:
        """Share of the forget positions that the model as it is knows better than their
        references, and whether that is where the steps aim."""
        known = walk.known()
        if known < FORGOTTEN:
            return known, "forgotten"
        reached = self._forget_cost() >= (1 - _AT_CEILING) * self.ceiling
        return known, "never-seen" if reached else "before"

    def reason_for_none(self, earlier: InfluencePlan | None) -> str:
        """Why no step is to be taken from where the earlier plan leads to, or ""."""
        if earlier is None:
            cost = self._forget_cost()
        else:
            with earlier._edit(self.job.model, self.job.adapter).applied(earlier.strength):
                cost = self._forget_cost()
                self.search.loss_after = self.job.retain.measure()
        self.cost_before = self.cost = cost
        if cost >= self.ceiling:
            return (
                f"the forget set is no better known than never-seen data (NLL {cost:.4f} "
                f"against holdout={self.ceiling:.4f} nats): there is nothing to unlearn."
            )
        if not self._is_within(self.search.loss_after):
            return f"the earlier requests alone use up {self._budget}: no step was taken."
        return ""

    def refusal(self, steps: int) -> str:
        """Why the model is in no state to stay in after so many steps, or ""."""
        loss = self.job.retain.measure()
        self.search.curve.append((steps, loss))
        if not self._is_within(loss):
            return self._budget
        cost = self._forget_cost()
        if not cost <= self.ceiling:
            return f"the cost of never-seen data ({self.ceiling:.4f} nats per token)"
        self.search.chosen, self.search.loss_after, self.cost = steps, loss, cost
        return ""

    def used_up(self) -> str:
        """That next to nothing of a bound is left, or ""."""
        left = self.job.retain.before + self._room - self.search.loss_after
        if left <= _CLOSE * self._room:
            return f"{self._budget} is used up"
        # Steps that come ever closer to it are halved until they move nothing.
        way = self.ceiling - self.cost_before
        if math.isfinite(way) and self.ceiling - self.cost <= _CLOSE * way:
            return (
                f"the forget set costs what never-seen data do ({self.ceiling:.4f} nats per token)"
            )
        return ""


def _take_steps(walk: InfluenceWalk, bounds: _Bounds, why_none: str) -> str:
    """All that the bounds bear: why there are no more, "" where there are as many as wanted."""
    job, why = bounds.job, why_none
    steps = range(job.config.influence_steps)
    for _ in track(steps, steps, job.progress, "influence steps"):
        if why:  # not looked at before: the progress of the last step is told first
            break
        why = _take_step(walk, bounds, last=walk.steps + 1 == len(steps))
    return why


def _take_step(walk: InfluenceWalk, bounds: _Bounds, last: bool) -> str:
    """One step, halved until it is within the bounds: why no other is to follow, or ""."""
    if not walk.advance(last=last):
        return f"ended after {counted(walk.steps)}: {walk.ended}."
    refusal = bounds.refusal(walk.steps)
    for _ in range(_HALVINGS if refusal else 0):
        walk.shorten()
        refusal = bounds.refusal(walk.steps)
        if not refusal:
            break
    if refusal:
        walk.back()
        return f"stopped by {refusal}: no shorter step {walk.steps + 1} was within."
    used_up = bounds.used_up()
    return f"ended after {counted(walk.steps)}: {used_up}." if used_up else ""
