"""The steps of ``unlearn`` that differ for ``method="attenuate"``."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import UcanError
from .factors import InfluenceFactors
from .job import Job, Request
from .neurons import moments_site
from .plan import AttenuationPlan
from .scoring import unsearched_note
from .stats import ActivationStats
from .strength import search_strength
from .weights import WeightEdit


def attenuation_statistics(job: Job, request: Request) -> ActivationStats:
    """Moments of both sets: of the forget sets of this request and all before it, and of the rest.

    Raises:
        UcanError: a bank or an earlier request of a gradient method, or an empty set.
    """
    sites, bank, earlier = (moments_site(job.config),), request.bank, request.earlier
    found = job.collect(request.forget, "forget", sites)
    if not found.tokens("forget"):
        raise UcanError("the forget set is empty: no token of it is in group 0 (forget).")
    if isinstance(bank, InfluenceFactors):
        raise UcanError(
            "method='attenuate' needs a bank of activation statistics, not of factors: "
            "bank=ucan_fast.collect(model, all_batches)."
        )
    if earlier is not None:
        if not isinstance(earlier, ActivationStats):
            raise UcanError(
                "the earlier request was answered by a gradient method, which takes no activation "
                "statistics. Undo its plan and ask for both forget sets in one request."
            )
        found = found + earlier.select(sites).only("forget")
    if bank is not None:
        return bank.select(sites).with_forget(found)
    if request.retain is not None:
        return found + job.collect(request.retain, "retain", sites)
    if not found.tokens("retain"):
        raise UcanError(
            "there is no retain set: pass retain= batches or bank= statistics, or mark retain "
            "tokens in the forget batches with token_groups."
        )
    return found


def search_attenuation(job: Job, plan: AttenuationPlan) -> AttenuationPlan:
    """The largest strength within the retain budget (``decay="hard"``: the largest fraction)."""
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


def attenuation_change(plan: AttenuationPlan) -> dict[str, Any]:
    """What a report says of the factors."""
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
