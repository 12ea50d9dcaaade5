"""scores: moments and weight norms of all layers -> risk R, utility U, score S, factors γ.

All neurons of a plan lie in one flat array; ``offsets`` marks where each layer begins. The
formulas are the package's reading of U-CAN (arXiv 2602.23400), whose text gives the ideas
(contrast of activations; utility = weight magnitude x retain activation norm; soft decay) but
not every form; each reading is a choice of ``UcanConfig``.
"""

from __future__ import annotations

import math

import torch

from ..errors import UcanError
from .backend import LIBRARY, choose, is_unobserved, runs_directly
from .checks import check_device

#: Keeps the ratio contrast finite where a neuron never fires on the retain set.
TINY = torch.finfo(torch.float32).tiny

_CHOICES = {
    "statistic": ("mean_abs", "rms"),
    "contrast": ("symmetric", "difference", "ratio", "zscore", "none"),
    "normalization": ("none", "layer", "global"),
    "fusion": ("protect", "subtract"),
    "decay": ("exponential", "inverse", "linear", "hard"),
}


def contrastive_scores(
    moments: torch.Tensor,
    counts: torch.Tensor,
    weight_norms: torch.Tensor,
    offsets: torch.Tensor,
    *,
    statistic: str,
    contrast: str,
    normalization: str,
    fusion: str,
    utility_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Risk, utility and score of every neuron.

    Args:
        moments: fp64 ``[2, 2, n]``: Σ|h| and Σh² per group (0 forget, 1 retain).
        counts: fp64 ``[L, 2]``: tokens per layer and group, all > 0.
        weight_norms: fp64 ``[n]``: L2 norm of each neuron's own parameters.
        offsets: int64 ``[L + 1]``, from 0 to n, never falling: layer l holds neurons
            ``offsets[l] .. offsets[l + 1]``.
        statistic, contrast, normalization, fusion, utility_weight: see ``UcanConfig``.

    Returns:
        R >= 0, U in [0, 1] and S, fp64 ``[n]`` each.

    Raises:
        UcanError: shapes, dtypes or devices that do not fit together, offsets that describe no
            layers, a count that is not positive, an unknown choice or a weight below 0.
    """
    tensors = (moments, counts, weight_norms, offsets)
    run = _scores if _skips_dispatcher(*tensors) else torch.ops.ucan_fast.contrastive_scores
    return run(*tensors, statistic, contrast, normalization, fusion, float(utility_weight))


def attenuation_factors(
    score: torch.Tensor, threshold: float, *, decay: str, strength: float, floor: float
) -> torch.Tensor:
    """γ of every neuron: 1 where S <= t, else a decay of u = (S - t) / (S_max - t).

    ``"exponential"`` exp(-βu), ``"inverse"`` 1/(1 + βu), ``"linear"`` max(1 - βu, 0), ``"hard"``
    0; never below ``floor``.

    Args:
        score: S, fp64 ``[n]``, finite, of the whole plan (S_max is taken over it).
        threshold: t, a finite number.
        decay, strength, floor: see ``UcanConfig``; ``strength`` is a number here.

    Returns:
        fp32 ``[n]``.

    Raises:
        UcanError: a score of another dtype or shape or one that is not finite (not asked while a
            CUDA graph is captured), an unknown decay, or a number out of range.
    """
    run = _factors if _skips_dispatcher(score) else torch.ops.ucan_fast.attenuation_factors
    return run(score, float(threshold), decay, float(strength), float(floor))


def _skips_dispatcher(*tensors: torch.Tensor) -> bool:
    # As if a kernel ran, whatever does: the operators have no derivative. Whoever records calls
    # sees the operator, and meta tensors have no values to be checked.
    return (
        not torch.compiler.is_compiling()
        and runs_directly("triton", *tensors)
        and is_unobserved(*tensors)
        and not any(tensor.is_meta for tensor in tensors)
    )


def _check_choices(**given: str) -> None:
    for name, choice in given.items():
        if choice not in _CHOICES[name]:
            known = ", ".join(_CHOICES[name])
            raise UcanError(f"scores: {name} {choice!r} is unknown; use one of {known}.")


def _check_plan(
    moments: torch.Tensor,
    counts: torch.Tensor,
    weight_norms: torch.Tensor,
    offsets: torch.Tensor,
    statistic: str,
    contrast: str,
    normalization: str,
    fusion: str,
    utility_weight: float,
) -> None:
    # Everything but the values in the tensors, which a fake tensor does not have.
    n, layers = weight_norms.numel(), offsets.numel() - 1
    if (
        tuple(moments.shape) != (2, 2, n)
        or weight_norms.dim() != 1
        or offsets.dim() != 1
        or tuple(counts.shape) != (layers, 2)
    ):
        raise UcanError(
            f"scores: moments {tuple(moments.shape)}, counts {tuple(counts.shape)}, weight norms "
            f"{tuple(weight_norms.shape)} and offsets {tuple(offsets.shape)} do not describe one "
            "plan; they must be [2, 2, n], [L, 2], [n] and [L + 1]."
        )
    if not moments.dtype == counts.dtype == weight_norms.dtype == torch.float64:
        raise UcanError("scores: moments, counts and weight norms must be float64.")
    if offsets.dtype != torch.int64:
        raise UcanError(f"scores: offsets must be int64, not {offsets.dtype}.")
    check_device(
        "scores", moments=moments, counts=counts, weight_norms=weight_norms, offsets=offsets
    )
    _check_choices(
        statistic=statistic, contrast=contrast, normalization=normalization, fusion=fusion
    )
    if not 0 <= utility_weight < math.inf:
        raise UcanError(f"scores: utility_weight must be a number >= 0, not {utility_weight}.")


def _check_values(counts: torch.Tensor, weight_norms: torch.Tensor, offsets: torch.Tensor) -> None:
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # a CUDA graph cannot wait for them
    n, ends = weight_norms.numel(), offsets.tolist()
    if ends[0] != 0 or ends[-1] != n or ends != sorted(ends):
        raise UcanError(
            f"scores: the offsets of {len(ends) - 1} layers with {n} neurons do not describe one "
            f"plan; they must begin at 0, end at {n} and never fall."
        )
    # On the CPU: one copy, where comparing and adding up there are two kernels and a copy.
    if not bool((counts.cpu() > 0).all()):
        raise UcanError("scores: every layer must have counted tokens of both groups.")


def _check_factors(
    score: torch.Tensor, threshold: float, decay: str, strength: float, floor: float
) -> None:
    if score.dim() != 1 or score.dtype != torch.float64:
        raise UcanError(
            f"scores: the score must be float64 [n], not {score.dtype} {tuple(score.shape)}."
        )
    _check_choices(decay=decay)
    if not math.isfinite(threshold):
        raise UcanError(f"scores: the threshold must be a finite number, not {threshold}.")
    if not strength >= 0:
        raise UcanError(f"scores: strength must be a number >= 0, not {strength}.")
    if not 0 <= floor <= 1:
        raise UcanError(f"scores: floor must be in [0, 1], not {floor}.")


def _largest(score: torch.Tensor) -> torch.Tensor:
    # S_max, of at least one score.
    if score.is_cuda and torch.cuda.is_current_stream_capturing():
        return score.max()  # a CUDA graph cannot wait for an answer
    # A NaN would not be selected, but S_max would be NaN, and every selected factor with it. The
    # extremes are one kernel and one answer, counting what is not finite is eight kernels.
    low, high = score.aminmax()
    if not all(map(math.isfinite, torch.stack((low, high)).tolist())):
        bad = int((~score.isfinite()).sum())
        raise UcanError(
            f"scores: {bad} of {score.numel()} scores are NaN or infinite; collect again from "
            "finite activations and weights."
        )
    return high


def scores_reference(
    moments: torch.Tensor,
    counts: torch.Tensor,
    weight_norms: torch.Tensor,
    offsets: torch.Tensor,
    statistic: str,
    contrast: str,
    normalization: str,
    fusion: str,
    utility_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition."""
    # Sizes are taken from shapes, not read back from the device.
    layers = offsets.numel() - 1
    layer_of = torch.repeat_interleave(
        torch.arange(layers, device=offsets.device),
        offsets.diff(),
        output_size=weight_norms.numel(),
    )
    count_f, count_r = counts[layer_of].unbind(1)
    mean_abs_f, mean_abs_r = moments[0, 0] / count_f, moments[0, 1] / count_r
    mean_sq_f, mean_sq_r = moments[1, 0] / count_f, moments[1, 1] / count_r
    if statistic == "mean_abs":
        a_f, a_r = mean_abs_f, mean_abs_r
    else:
        a_f, a_r = mean_sq_f.sqrt(), mean_sq_r.sqrt()

    if contrast == "symmetric":
        c = _ratio_or_zero(a_f - a_r, a_f + a_r)
    elif contrast == "difference":
        c = a_f - a_r
    elif contrast == "ratio":
        c = a_f / a_r.clamp_min(TINY) - 1
    elif contrast == "zscore":
        var_f = (mean_sq_f - mean_abs_f**2).clamp_min(0)
        var_r = (mean_sq_r - mean_abs_r**2).clamp_min(0)
        c = _ratio_or_zero(a_f - a_r, (var_f / count_f + var_r / count_r).sqrt())
    else:
        c = _over_layer_max(a_f, layer_of, layers)
    risk = c.clamp_min(0)
    if normalization == "layer":
        risk = _over_layer_max(risk, layer_of, layers)
    elif normalization == "global":
        risk = _over_layer_max(risk, torch.zeros_like(layer_of), 1)

    utility = _over_layer_max(weight_norms * mean_sq_r.sqrt(), layer_of, layers)
    if fusion == "protect":
        score = risk * (1 - utility) ** utility_weight
    else:
        score = risk - utility_weight * utility
    return risk, utility, score


def factors_reference(
    score: torch.Tensor,
    top: torch.Tensor,
    threshold: float,
    decay: str,
    strength: float,
    floor: float,
) -> torch.Tensor:
    """The definition; ``top`` is S_max."""
    selected = score > threshold
    u = torch.where(selected, (score - threshold) / (top - threshold), 0.0)
    if decay == "exponential":
        factor = torch.exp(-strength * u)
    elif decay == "inverse":
        factor = 1 / (1 + strength * u)
    elif decay == "linear":
        factor = (1 - strength * u).clamp_min(0)
    else:
        factor = torch.zeros_like(u)
    return torch.where(selected, factor.clamp_min(floor), 1.0).to(torch.float32)


def _ratio_or_zero(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _over_layer_max(value: torch.Tensor, layer_of: torch.Tensor, layers: int) -> torch.Tensor:
    top = value.new_zeros(layers).scatter_reduce(0, layer_of, value, "amax")
    return _ratio_or_zero(value, top[layer_of])


def _scores(
    moments: torch.Tensor,
    counts: torch.Tensor,
    weight_norms: torch.Tensor,
    offsets: torch.Tensor,
    *options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_plan(moments, counts, weight_norms, offsets, *options)
    _check_values(counts, weight_norms, offsets)
    if choose("contrastive_scores", moments.device) == "triton":
        from ..kernels.scores import contrastive_scores as launch

        return launch(moments, counts, weight_norms, offsets, *options)
    return scores_reference(moments, counts, weight_norms, offsets, *options)


def _factors(score: torch.Tensor, *options) -> torch.Tensor:
    _check_factors(score, *options)
    if not score.numel():
        return torch.empty_like(score, dtype=torch.float32)
    top = _largest(score)
    if choose("attenuation_factors", score.device) == "triton":
        from ..kernels.scores import attenuation_factors as launch

        return launch(score, top, *options)
    return factors_reference(score, top, *options)


LIBRARY.define(
    "contrastive_scores(Tensor moments, Tensor counts, Tensor weight_norms, Tensor offsets, "
    "str statistic, str contrast, str normalization, str fusion, float utility_weight) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "attenuation_factors(Tensor score, float threshold, str decay, float strength, float floor) "
    "-> Tensor"
)
LIBRARY.impl("contrastive_scores", _scores, "CompositeExplicitAutograd")
LIBRARY.impl("attenuation_factors", _factors, "CompositeExplicitAutograd")


@torch.library.register_fake("ucan_fast::contrastive_scores", lib=LIBRARY)
def _(moments, counts, weight_norms, offsets, *options):
    _check_plan(moments, counts, weight_norms, offsets, *options)
    return tuple(torch.empty_like(weight_norms) for _ in range(3))


@torch.library.register_fake("ucan_fast::attenuation_factors", lib=LIBRARY)
def _(score, *options):
    _check_factors(score, *options)
    return torch.empty_like(score, dtype=torch.float32)
