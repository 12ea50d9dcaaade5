"""One-shot gates: from gradients and curvature, how far to close every neuron, as a plan."""

from __future__ import annotations

import math

import torch
from torch import nn

from .adapter import find_layers, one_walk, resolve_adapter, unwrap
from .config import UcanConfig, config_or
from .errors import UcanError
from .factors import InfluenceFactors
from .influence import _check_origin, _check_sets, of_variant, targets_of
from .neurons import NeuronGroup, neuron_groups
from .plan import AttenuationPlan


def make_gates_plan(
    model: nn.Module,
    forget: InfluenceFactors,
    retain: InfluenceFactors,
    config: UcanConfig | None = None,
    *,
    adapter: str | None = None,
) -> AttenuationPlan:
    """A gate γ in (0, 1] for every input and every output of every LoRA layer, from sums over both
    token sets. The model is only read.

    Gate j of the inputs of a layer multiplies column j of A, gate i of its outputs row i of B. At
    γ = 1 the chain rule gives the slope of the mean forget NLL by a gate from the gradient G of
    the matrix, and that of the mean retain NLL, r, likewise::

        g_j = <A[:, j], G_A[:, j]>                  g_i = <B[i], G_B[i]>

    A negative slope means that closing the gate raises the forget NLL. The slope of one token's
    NLL is ``x_j A_jᵀ g_z`` at an input and ``h_i (B_i z)`` at an output, with h the gradient by
    the output of lora_B and ``g_z = Bᵀ h``. Its mean square over retain tokens, labels drawn from
    the model, is the Fisher information of the gate (an upper bound of it where the model is sure
    of a label: :func:`ucan_fast.collect_factors`); with x independent of g_z, and h of z (the
    assumption of Kronecker factors, Martens and Grosse, arXiv 1503.05671), from mean factors::

        F_j = C_x[jj] · A_jᵀ S_z A_j                F_i = S_h[ii] · B_i C_z B_iᵀ

    (times tokens per scored position, the same for all layers of a decoder; layers that share the
    matrix add up). A natural gradient step in log γ up the forget NLL, less κ times the retain
    NLL, that may only close gates::

        d = min((g - κ r) / (F + damping · mean F), 0)      γ = exp(t c d)      c = 1 / Σ g d

    The mean is over the gates of one matrix. c makes t the first-order rise of the mean forget NLL
    in nats per token; gates that close lose their slope, so the true rise falls behind.

    Args:
        model: the model the sums were taken on.
        forget: ``collect_factors(model, forget_batches, group="forget", variant="diagonal")``, of
            all requests.
        retain: the factors of the retain set: ``bank - forget``, or collected; of variant
            ``"diagonal"`` or ``"all"``.
        config: with ``method="gates"`` and a given ``strength`` in nats; ``unlearn`` searches for
            one. ``"auto"`` gives the plan a strength of 0 (see ``with_strength``).
        adapter: needed when several adapters are active.

    Returns:
        A plan whose neurons are named ``{layer}.lora_A`` (inputs) and ``{layer}.lora_B``
        (outputs), with risk ``κ r - g``, utility ``F + damping · mean F`` and score ``-c d``.

    Raises:
        UcanError: sums of another adapter or variant, an empty set, or adapter weights that are
            not finite.

    Warns:
        UcanWarning: no gate can be closed to any use.
    """
    config = config_or(config, "gates")
    if config.method != "gates":
        raise UcanError(f"make_gates_plan needs method='gates', not {config.method!r}.")
    model = unwrap(model)
    with one_walk(model):
        plan = score_gates(model, forget, retain, config, resolve_adapter(model, adapter))
    if plan.note:
        plan.warn_if_unusual()
    return plan


def score_gates(
    model: nn.Module,
    forget: InfluenceFactors,
    retain: InfluenceFactors,
    config: UcanConfig,
    adapter: str,
) -> AttenuationPlan:
    """:func:`make_gates_plan` without its warning, for callers that search the strength."""
    _check_origin(model, adapter, forget, retain)
    retain = of_variant(retain, config)
    _check_sets(targets_of(model, adapter, config), forget, retain)
    layers = {layer.name: layer for layer in find_layers(model, adapter)}
    groups = neuron_groups(model, list(layers.values()), config.effective_site)
    kappa = config.retain_gradient_weight
    slope = torch.cat([_slope(group, forget) for group in groups])
    risk = torch.cat([kappa * _slope(group, retain) for group in groups]) - slope
    utility = torch.cat([_curvature(group, retain, config.damping) for group in groups])
    # Where the retain set has no curvature at all there is nothing to measure a gate by.
    score = torch.where(utility > 0, risk.clamp_min(0) / utility, 0.0)
    rise, note = -float((slope * score).sum()), ""
    if rise > 0 and math.isfinite(rise):
        score = score / rise
    else:
        note = (
            "closing no gate raises the forget loss against the retain gradient (predicted slope "
            f"{rise:.3g}): to this method D_f and D_r are the same, or the adapter does nothing."
        )
        score = torch.zeros_like(score)
    plan = AttenuationPlan(
        config=config,
        fingerprint=forget.fingerprint,
        groups=[group.names for group in groups],
        sizes=[group.n for group in groups],
        flat_factors=torch.ones(score.numel(), device="cpu"),
        flat_risk=risk,
        flat_utility=utility,
        flat_score=score,
        threshold=0.0,
        strength=0.0,
        note=note,
    )
    return plan if config.auto_strength else plan.with_strength(config.strength)


def _matrix(group: NeuronGroup) -> tuple[torch.Tensor, int]:
    """The matrix of a group in fp64 on the CPU, and the axis that its neurons do not lie on."""
    (piece,) = group.pieces
    matrix = piece.parameter.detach().to("cpu", torch.float64)
    if not torch.isfinite(matrix).all():
        raise UcanError(
            f"the adapter weights of {piece.layer} are not finite (NaN or Inf); load the adapter "
            "again."
        )
    return matrix, 1 - piece.axis


def _slope(group: NeuronGroup, sums: InfluenceFactors) -> torch.Tensor:
    """Of the mean NLL by every gate of the group, at 1: fp64 ``[n]``."""
    matrix, across = _matrix(group)
    return (matrix * sums.gradients[group.names[0]]).sum(across) / sums.positions


def _curvature(group: NeuronGroup, retain: InfluenceFactors, damping: float) -> torch.Tensor:
    """F of every gate of the group, damped: fp64 ``[n]``."""
    matrix, across = _matrix(group)
    rows = matrix if across else matrix.T
    at_input = group.pieces[0].which == "A"
    total = torch.zeros(group.n, dtype=torch.float64, device="cpu")
    for name in (name.rpartition(".")[0] for name in group.names):
        if at_input:
            own, inner = retain.factor(name, "c_x"), retain.factor(name, "s_z")
        else:
            own, inner = retain.factor(name, "s_h"), retain.factor(name, "c_z")
        through = ((rows @ inner.double()) * rows).sum(1)
        # What subtraction left below zero is rounding. Both factors are sums over the tokens.
        counts = retain.layers[name].tokens * retain.positions
        total += own.double().clamp_min(0) * through.clamp_min(0) / counts
    return total + damping * total.mean()
