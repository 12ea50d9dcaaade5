"""The steps of ``unlearn`` that differ for ``method="influence"`` and ``method="gates"``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from .batches import RETAIN, holding, reusable
from .config import UcanConfig
from .errors import UcanError
from .evaluation import _vocabulary, group_loss
from .factor_pass import factor_memory
from .factors import InfluenceFactors
from .gates import score_gates
from .influence import InfluencePlan, make_influence_plan
from .job import Job, Joined, Request
from .plan import AttenuationPlan
from .strength import search_strength

Batches = Iterable[Mapping[str, Any]]


@dataclass
class InfluenceStats:
    """Gradients and factors of both token sets of a request.

    Attributes:
        forget: sums over the forget sets of this request and all before it.
        retain: sums over the retain set.
        steps: ``influence_steps`` of the request.
    """

    forget: InfluenceFactors
    retain: InfluenceFactors
    steps: int = 1

    @property
    def fingerprint(self) -> str:
        """Of the adapter they were taken on (the origin)."""
        return self.forget.fingerprint

    def tokens(self, group: str) -> int:
        """Tokens of one group (``"forget"`` or ``"retain"``)."""
        return int((self.forget if group == "forget" else self.retain).tokens)

    def save(self, path: str | os.PathLike) -> None:
        """Write ``forget``, which is all that a later request needs (as ``previous=``).

        Raises:
            UcanError: it could not be written; what stood there before is untouched.
        """
        self.forget.save(path)


def influence_statistics(job: Job, request: Request) -> InfluenceStats:
    """Sums over the union of all forget sets, and over the retain set.

    Raises:
        UcanError: a bank or an earlier request of the other method, no retain set, or sets that
            do not fit.
    """
    forget, retain, bank = request.forget, request.retain, request.bank
    if bank is not None and not isinstance(bank, InfluenceFactors):
        raise UcanError(
            f"method={job.config.method!r} needs a bank of factors, not {type(bank).__name__}: "
            "bank=ucan_fast.collect_factors(model, all_batches)."
        )
    config = job.config
    wanted = {
        "variant": config.effective_variant,
        "rank": config.influence_rank,
        "blocks": config.influence_blocks,
        "seed": config.seed,
    }
    # An eigenbasis stays that of all data: nothing is subtracted from it.
    exact = bank is not None and bank.variant != "eigenbasis"
    if exact:
        # What is subtracted must be what is there; the labels are the bank's too.
        like = {"variant": bank.variant, "blocks": bank.blocks or 1, "seed": bank.seed}
        found = job.factors(forget, "forget", **{**wanted, **like})
    else:
        found = job.factors(forget, "forget", **wanted, curvature=False)
    if request.earlier is not None:
        found = found + _earlier(request.earlier)
    if bank is not None:
        rest = bank - found
        if not rest.positions:
            raise UcanError(
                "the retain set is empty: the bank holds no more than the forget set. A bank is "
                "all data, the forget set included."
            )
        return InfluenceStats(found, rest, config.influence_steps)
    mixed = list(holding(job.model, forget, "forget", RETAIN))
    if retain is None and not mixed:
        raise UcanError(
            "there is no retain set: pass retain= batches or bank= factors, or mark retain "
            "tokens in the forget batches with token_groups."
        )
    others = () if retain is None else retain
    together = job.factors(Joined(others, mixed), "retain", **wanted)
    return InfluenceStats(found, together, config.influence_steps)


def influence_plan(
    model: nn.Module, stats: InfluenceStats, config: UcanConfig, adapter: str
) -> InfluencePlan:
    """The plan that these sums make."""
    return make_influence_plan(model, stats.forget, stats.retain, config, adapter=adapter)


def gates_plan(
    model: nn.Module, stats: InfluenceStats, config: UcanConfig, adapter: str
) -> AttenuationPlan:
    """The gates that these sums make."""
    return score_gates(model, stats.forget, stats.retain, config, adapter)


def search_step(
    job: Job, plan: InfluencePlan | AttenuationPlan, request: Request
) -> InfluencePlan | AttenuationPlan:
    """The largest t within the retain budget, the trust region and the holdout's NLL.

    Where the data are no better known than never-seen data, the plan of the requests before this
    one stays.

    Raises:
        UcanError: there is nothing to measure the retain loss on, or no scored holdout position.
    """
    if job.retain.measure is None:
        raise UcanError(
            "strength='auto' has nothing to measure the retain budget on, and a step of unknown "
            "cost is not taken: pass calibration= or retain=, or a strength in nats."
        )
    forget, earlier = request.forget, request.earlier_plan
    edit, trust = plan._edit(job.model, job.adapter), job.config.trust_region
    before = group_loss(job.model, forget, "forget")
    ceiling = job.ceiling = ceiling_of(job.model, request.holdout)
    if before.mean >= ceiling:
        note = (
            f"the forget set is no better known than never-seen data (NLL {before.mean:.4f} "
            f"against holdout={ceiling:.4f} nats): there is nothing to unlearn."
        )
        if type(earlier) is type(plan):
            plan = replace(earlier, applied_fingerprint=None, originals=None)
            note += " The plan of the earlier requests stays as it is."
        plan.note = note
        return plan

    @contextmanager
    def in_force(strength: float) -> Iterator[None]:
        try:
            plan.with_strength(strength)._write(edit)
            yield
        finally:
            edit.restore()

    def loss_at(strength: float) -> float:
        with in_force(strength):
            return job.retain.measure()

    costs = {}

    def guard(strength: float) -> str:
        with in_force(strength):
            after = costs[strength] = group_loss(job.model, forget, "forget").mean
        if not after <= ceiling:
            return (
                f"stopped where the forget set costs as much as never-seen data "
                f"({ceiling:.4f} nats per token), before the retain budget was used up."
            )
        rise = after - before.mean
        if not (rise >= 0 and abs(rise - strength) <= trust * strength):
            off = f"further off than trust_region={trust:g} times the prediction"
            return (
                f"stopped by the trust region: a predicted rise of {strength:.3g} nats was one of "
                f"{rise:.3g}, {'a fall' if rise < 0 else off}."
            )
        return ""

    # Beyond ln V a token is less likely than one drawn blindly: nothing is gained there.
    blind = math.log(_vocabulary(job.model))
    high = min(job.config.max_strength, blind)
    search = search_strength(
        loss_at, job.retain.before, job.config.max_retain_loss_increase, high, guard=guard
    )
    job.search = search
    chosen = plan.with_strength(search.chosen)
    if search.chosen == high:
        search.note = (
            f"even a predicted rise of {high:.3g} nats, the most that is tried, stays within the "
            f"budget of {100 * search.budget:g} % retain loss."
        )
    cost = costs.get(search.chosen, 0.0)
    if before.mean <= blind < cost and ceiling == math.inf:
        # The rise that is predicted is at most ln V, the rise that comes may be more.
        beyond = (
            f"The forget set now costs {cost:.2f} nats per token, more than blind guessing "
            f"({blind:.2f}): it stands out as forgotten. Give holdout= or a smaller strength."
        )
        search.note = f"{search.note} {beyond}" if search.note else beyond
    chosen.note = search.note
    return chosen


def influence_change(job: Job, plan: InfluencePlan) -> dict[str, Any]:
    """What a report says about the step (after or before it was applied)."""
    originals = plan.edit(job.model, job.adapter).originals
    if plan.originals is not None:
        originals = plan.originals
    layers: dict[str, dict[str, float]] = {}
    squares: dict[str, list[float]] = {}
    for key, direction in plan.directions.items():
        name = key.rpartition(".")[0]
        values = layers.setdefault(name, {"parameters": 0, "relative_change": 0.0, "share": 0.0})
        values["parameters"] += direction.numel()
        values["share"] += plan.shares[key]
        sums = squares.setdefault(name, [0.0, 0.0])
        sums[0] += float((plan.strength * direction.double()).square().sum())
        sums[1] += float(originals[key].double().square().sum())
    for name, (moved, size) in squares.items():
        layers[name]["relative_change"] = math.sqrt(moved / size) if size else math.nan
    config = job.config
    return {
        "strength": plan.strength,
        "variant": config.influence_variant,
        "factor_bytes": factor_memory(
            job.model,
            rank=config.influence_rank,
            blocks=config.influence_blocks,
            adapter=job.adapter,
        ),
        "matrices": len(plan.directions),
        "parameters": sum(d.numel() for d in plan.directions.values()),
        "steps": [asdict(step) for step in job.steps],
        "note": plan.note,
        "layers": layers,
    }


def _earlier(stats: Any) -> InfluenceFactors:
    if isinstance(stats, InfluenceStats):
        return stats.forget
    if isinstance(stats, InfluenceFactors):
        return stats
    raise UcanError(
        "the earlier request was answered by method='attenuate': its statistics hold no "
        "gradients. Undo its plan and ask for both forget sets in one request."
    )


def ceiling_of(model: nn.Module, holdout: Batches | float | None) -> float:
    """What never-seen data cost, nats per token; infinite where nothing is said of them."""
    if holdout is None:
        return math.inf
    if isinstance(holdout, (int, float)) and not isinstance(holdout, bool):
        if not 0 < holdout < math.inf:
            raise UcanError(f"holdout must be batches or nats per token > 0, not {holdout!r}.")
        return float(holdout)
    loss = group_loss(model, reusable(holdout, "holdout"), "forget")
    if not loss.tokens:
        raise UcanError("the holdout set is empty: no position of it is scored.")
    return loss.mean
