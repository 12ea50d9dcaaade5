"""scoring: moments -> risk, utility, score -> AttenuationPlan."""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import nn

from . import ops
from .adapter import (
    active_context,
    find_layers,
    fingerprint,
    one_walk,
    resolve_adapter,
    unwrap,
)
from .batches import FORGET, RETAIN
from .config import UcanConfig, config_or
from .errors import UcanError
from .marks import has_plan
from .neurons import NeuronGroup, moments_site, neuron_groups, weight_norms
from .plan import AttenuationPlan, select
from .stats import ActivationStats, Moments

#: β where ``strength="auto"`` has no calibration data to search with.
DEFAULT_STRENGTH = 1.0


def make_plan(
    model: nn.Module,
    stats: ActivationStats,
    config: UcanConfig | None = None,
    *,
    adapter: str | None = None,
) -> AttenuationPlan:
    """Score every neuron of the configured site, select the risky ones, and set their factors.

    The model is only read. With ``strength="auto"`` there is no calibration data here to search
    with: β = 1 (for ``decay="hard"``: ``fraction`` as given) is used and the plan's note says so
    (``unlearn`` searches).

    Args:
        model: the model the statistics were taken on.
        stats: with tokens of both groups.
        config: all choices; default ``UcanConfig()``.
        adapter: needed when several adapters are active.

    Raises:
        UcanError: statistics of another adapter, or without the site, a layer or a group that the
            plan needs; weights or statistics that are not finite.

    Warns:
        UcanWarning: the plan changes nothing, or more than half of all neurons.
    """
    config = config_or(config)
    model = unwrap(model)
    with one_walk(model):
        adapter = resolve_adapter(model, adapter)
        find_layers(model, adapter)  # what has no neurons is said before weights are read
        _check_origin(model, adapter, stats)
        plan = score_plan(model, stats, config, adapter)
    if plan.config.auto_strength and not plan.note:
        plan.note = f"{unsearched_note(plan.config)}."
    plan.warn_if_unusual()
    return plan


def unsearched_note(config: UcanConfig) -> str:
    """What ``strength="auto"`` means where there is nothing to search with."""
    hard = config.decay == "hard"
    used = f"fraction={config.fraction:g}" if hard else f"strength={DEFAULT_STRENGTH:g}"
    return f"{used} was used: 'auto' needs calibration data to search with"


def score_plan(
    model: nn.Module, stats: ActivationStats, config: UcanConfig, adapter: str
) -> AttenuationPlan:
    """:func:`make_plan` without its notes and warnings, for callers that search the strength.

    They know that the statistics are of this very adapter.
    """
    layers = find_layers(model, adapter)
    groups = neuron_groups(model, layers, config.site)
    # fp64 sums of a million neurons are worth a GPU where the weights are on one.
    device = groups[0].pieces[0].parameter.device
    device = device if device.type == "cuda" else torch.device("cpu")
    norms = _weight_norms(groups, device)
    moments, counts = _pooled_moments(groups, stats, moments_site(config))
    offsets = torch.tensor([0] + [g.n for g in groups], device="cpu").cumsum(0)
    risk, utility, score = ops.contrastive_scores(
        moments.to(device),
        counts.to(device),
        norms,
        offsets.to(device),
        statistic=config.statistic,
        contrast=config.contrast,
        normalization=config.normalization,
        fusion=config.fusion,
        utility_weight=float(config.utility_weight),
    )
    risk, utility, score = risk.cpu(), utility.cpu(), score.cpu()
    threshold, note = select(score, config)
    plan = AttenuationPlan(
        config=config,
        fingerprint=stats.fingerprint,
        groups=[group.names for group in groups],
        sizes=[group.n for group in groups],
        flat_factors=torch.ones(score.numel(), device="cpu"),
        flat_risk=risk,
        flat_utility=utility,
        flat_score=score,
        threshold=threshold,
        strength=0.0,
        note=note,
    )
    plan = plan.with_strength(DEFAULT_STRENGTH if config.auto_strength else config.strength)
    if not plan.note and not plan.attenuated:
        plan.note = (
            f"strength={plan.strength:g} with floor={config.floor:g} leaves every factor at 1."
        )
    return plan


def _check_origin(model: nn.Module, adapter: str, stats: ActivationStats) -> None:
    now = fingerprint(model, adapter)
    if now == stats.fingerprint:
        if active_context(model, adapter) != stats.context:
            raise UcanError(
                f"the statistics of adapter {adapter!r} were taken with different other adapters "
                "active beside it; activate the same ones, or collect again."
            )
        return
    if has_plan(model, adapter, now):
        hint = "A plan is applied to it: call plan.undo(model) first."
    else:
        hint = "Collect statistics on this adapter."
    raise UcanError(
        f"the statistics were taken on an adapter with fingerprint {stats.fingerprint[:12]}, but "
        f"adapter {adapter!r} has {now[:12]}. {hint}"
    )


def _weight_norms(groups: list[NeuronGroup], device: torch.device) -> torch.Tensor:
    parts = weight_norms(groups)
    norms = torch.cat([part.to(device) for part in parts])
    # A NaN would silently give its whole layer no utility, and so no protection.
    if not torch.isfinite(norms).all():
        parts = zip(groups, parts, strict=True)
        bad = next(group for group, part in parts if not torch.isfinite(part).all())
        raise UcanError(
            f"the adapter weights of {bad.names[0]} are not finite (NaN or Inf); load the "
            "adapter again."
        )
    return norms


def _pooled_moments(
    groups: list[NeuronGroup], stats: ActivationStats, site: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ|h| and Σh² of all neurons ``[2, 2, n]`` and the token counts of all groups ``[L, 2]``."""
    pooled = [_pooled(group, stats, site) for group in groups]
    counts = torch.stack([m.count for m in pooled])
    abs_sums = torch.cat([m.abs_sum for m in pooled], dim=1)
    moments = torch.stack([abs_sums, torch.cat([m.sq_sum for m in pooled], dim=1)])
    if not math.isfinite(float(moments.sum() + counts.sum())):
        for name in (name for group in groups for name in group.names):
            if not stats.layers[name][site].finite:
                raise UcanError(f"the statistics of {name} are not finite; collect again.")
    for index, what in ((FORGET, "forget"), (RETAIN, "retain")):
        empty = ~(counts[:, index] > 0)
        if empty.any():
            raise UcanError(
                f"the {what} set is empty: {groups[int(empty.nonzero()[0])].names[0]} saw no "
                f"{what} token. Check token_groups and attention_mask"
                + (", or that the bank holds more than the forget set." if index else ".")
            )
    return moments, counts


def _pooled(group: NeuronGroup, stats: ActivationStats, site: str) -> Moments:
    members = []
    for name in group.names:
        measured = stats.layers.get(name, {})
        if site not in measured:
            raise UcanError(
                f"the statistics hold no {site!r} moments of {name} (they have "
                f"{', '.join(measured) or 'nothing'}); collect with sites including {site!r}."
            )
        if measured[site].n != group.n:
            raise UcanError(
                f"{name} has {group.n} neurons, its statistics {measured[site].n}; collect again."
            )
        members.append(measured[site])
    return functools.reduce(operator.add, members)
