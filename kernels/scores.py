"""scores: moments and weight norms of all layers -> R, U, S (two or three launches), then γ (one).

Bytes per neuron, all fp64: three moments and the norm are read, unscaled R and U written (48), both
are read again and U and S written (32), the maximum is searched (8), S is read and γ written (12):
100 in all with the default choices. The 3,584 rank neurons of a 7B model are bound by
the launches; the 1.1 million input neurons of its 224 projections take 114 MB, 38 μs at the
3.0 TB/s of an H100 (57 were measured, S_max included), next to about 30 fp64 operations a neuron,
which is one operation for 4 bytes. Loads are 8 bytes
wide: a layer begins anywhere.

Layers are cut into chunks of blocks, so that one huge layer among small ones keeps the GPU busy;
each program writes the two maxima of its chunk, and the next launch takes the maximum over the
chunks. A maximum does not depend on the order: no atomics, the same bits every time.

Every operation is the reference's, in its order and without fused multiply-adds, so results have
the reference's bits wherever division and square root are correctly rounded. The exceptions are
the general power, taken as exp(λ log x) (λ = 0, 1/2, 1, 2, 3 are exact as in the reference), and
exp in γ, before the rounding to fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import CompileCase, ceil_div, on_device

BLOCK = 512
#: Chunks of one layer at most, and programs of one launch beyond which layers are cut less.
MAX_CHUNKS, PROGRAMS = 64, 8192

_STATISTICS = ("mean_abs", "rms")
_CONTRASTS = ("symmetric", "difference", "ratio", "zscore", "none")
_NORMALIZATIONS = ("none", "layer", "global")
#: λ whose power the reference takes exactly, and the name of that form here.
_EXACT_POWERS = {0.0: "zero", 0.5: "root", 1.0: "one", 2.0: "square", 3.0: "cube"}
_FUSIONS = (*_EXACT_POWERS.values(), "general", "subtract")
_DECAYS = ("exponential", "inverse", "linear", "hard")


@triton.jit
def ratio_or_zero(numerator, denominator):
    """0 where the denominator is not positive, as the reference has it."""
    positive = denominator > 0
    return tl.where(positive, numerator / tl.where(positive, denominator, 1.0), 0.0)


@triton.jit(do_not_specialize=["n", "chunks"])
def measure_kernel(
    moments,
    counts,
    weight_norms,
    offsets,
    risk,
    utility,
    tops,
    n,
    chunks,
    STATISTIC: tl.constexpr,
    CONTRAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Unscaled R and U of one chunk of one layer, and their maxima (0 of an empty chunk).

    moments ``[2, 2, n]``; tops ``[2, layers, chunks]``: maxima of R and of U.
    """
    layer = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    first = tl.load(offsets + layer)
    last = tl.load(offsets + layer + 1)
    count_f = tl.load(counts + 2 * layer)
    count_r = tl.load(counts + 2 * layer + 1)
    top_risk = tl.zeros([BLOCK], dtype=tl.float64)
    top_utility = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(first + chunk * BLOCK, last, chunks * BLOCK):
        neuron = start + tl.arange(0, BLOCK)
        inside = neuron < last
        moment = moments + neuron
        stride = n.to(tl.int64)
        sq_r = tl.load(moment + 3 * stride, mask=inside, other=0.0) / count_r
        root_r = tl.sqrt(sq_r)
        if STATISTIC == "mean_abs" or CONTRAST == "zscore":
            mean_f = tl.load(moment, mask=inside, other=0.0) / count_f
            mean_r = tl.load(moment + stride, mask=inside, other=0.0) / count_r
        if STATISTIC == "rms" or CONTRAST == "zscore":
            sq_f = tl.load(moment + 2 * stride, mask=inside, other=0.0) / count_f
        if STATISTIC == "mean_abs":
            a_f = mean_f
            a_r = mean_r
        else:
            a_f = tl.sqrt(sq_f)
            a_r = root_r

        if CONTRAST == "symmetric":
            c = ratio_or_zero(a_f - a_r, a_f + a_r)
        elif CONTRAST == "difference":
            c = a_f - a_r
        elif CONTRAST == "ratio":
            # fp32's smallest normal number, exact in fp64.
            c = a_f / tl.maximum(a_r, 1.1754943508222875e-38) - 1.0
        elif CONTRAST == "zscore":
            var_f = tl.maximum(sq_f - mean_f * mean_f, 0.0)
            var_r = tl.maximum(sq_r - mean_r * mean_r, 0.0)
            c = ratio_or_zero(a_f - a_r, tl.sqrt(var_f / count_f + var_r / count_r))
        else:
            c = a_f
        c = tl.maximum(c, 0.0)  # past the end every contrast is 0 or less
        importance = tl.load(weight_norms + neuron, mask=inside, other=0.0) * root_r
        tl.store(risk + neuron, c, mask=inside)
        tl.store(utility + neuron, importance, mask=inside)
        top_risk = tl.maximum(top_risk, c)
        top_utility = tl.maximum(top_utility, importance)
    part = layer * chunks + chunk
    tl.store(tops + part, tl.max(top_risk, axis=0))
    tl.store(tops + tl.num_programs(0).to(tl.int64) * chunks + part, tl.max(top_utility, axis=0))


@triton.jit(do_not_specialize=["parts"])
def top_kernel(tops, top, parts, BLOCK: tl.constexpr):
    """top[0] = max of tops[:parts]; one program."""
    best = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(tops + part, mask=part < parts, other=0.0))
    tl.store(top, tl.max(best, axis=0))


@triton.jit(do_not_specialize=["chunks"])
def finish_kernel(
    offsets,
    risk,
    utility,
    score,
    tops,
    top,
    utility_weight: tl.float64,
    chunks,
    NORMALIZATION: tl.constexpr,
    FUSION: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Scales R and U in place by the maxima and writes S, for one chunk of one layer."""
    layer = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    first = tl.load(offsets + layer)
    last = tl.load(offsets + layer + 1)
    part = tl.arange(0, MAX_CHUNKS)
    parts = tops + layer * chunks + part
    top_risk = tl.max(tl.load(parts, mask=part < chunks, other=0.0), axis=0)
    parts += tl.num_programs(0).to(tl.int64) * chunks
    top_utility = tl.max(tl.load(parts, mask=part < chunks, other=0.0), axis=0)
    if NORMALIZATION == "global":
        top_risk = tl.load(top)
    for start in range(first + chunk * BLOCK, last, chunks * BLOCK):
        neuron = start + tl.arange(0, BLOCK)
        inside = neuron < last
        r = tl.load(risk + neuron, mask=inside, other=0.0)
        u = ratio_or_zero(tl.load(utility + neuron, mask=inside, other=0.0), top_utility)
        if NORMALIZATION != "none":
            r = ratio_or_zero(r, top_risk)
            tl.store(risk + neuron, r, mask=inside)
        tl.store(utility + neuron, u, mask=inside)
        if FUSION == "subtract":
            s = r - utility_weight * u
        else:
            kept = 1.0 - u
            if FUSION == "zero":
                power = kept * 0.0 + 1.0
            elif FUSION == "root":
                power = tl.sqrt(kept)
            elif FUSION == "one":
                power = kept
            elif FUSION == "square":
                power = kept * kept
            elif FUSION == "cube":
                power = kept * kept * kept
            else:
                some = kept > 0
                power = tl.exp(utility_weight * tl.log(tl.where(some, kept, 1.0)))
                power = tl.where(some, power, 0.0)
            s = r * power
        tl.store(score + neuron, s, mask=inside)


@triton.jit(do_not_specialize=["n"])
def factors_kernel(
    score,
    top,
    factors,
    threshold: tl.float64,
    strength: tl.float64,
    floor: tl.float64,
    n,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """γ of one block of neurons; top holds the largest score of all."""
    neuron = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = neuron < n
    s = tl.load(score + neuron, mask=inside, other=0.0)
    # Full blocks, since a bare number would be narrowed to fp32 in a comparison or a maximum.
    threshold = tl.full([BLOCK], threshold, dtype=tl.float64)
    floor = tl.full([BLOCK], floor, dtype=tl.float64)
    selected = s > threshold
    gap = tl.load(top) - threshold
    # Where nothing is selected the gap may be 0; nothing uses the quotient then.
    u = tl.where(selected, (s - threshold) / tl.where(gap == 0, 1.0, gap), 0.0)
    if DECAY == "exponential":
        factor = tl.exp(-strength * u)
    elif DECAY == "inverse":
        factor = 1.0 / (1.0 + strength * u)
    elif DECAY == "linear":
        factor = tl.maximum(1.0 - strength * u, 0.0)
    else:
        factor = tl.zeros([BLOCK], dtype=tl.float64)
    factor = tl.maximum(factor, floor)
    tl.store(factors + neuron, tl.where(selected, factor, 1.0).to(tl.float32), mask=inside)


def contrastive_scores(
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
    """Risk, utility and score of every neuron, fp64 ``[n]`` each, without a synchronisation.

    Args:
        moments: fp64 ``[2, 2, n]``, finite: Σ|h| and Σh² per group.
        counts: fp64 ``[L, 2]``, all > 0.
        weight_norms: fp64 ``[n]``, finite.
        offsets: int64 ``[L + 1]``, on the same device: layer l is ``offsets[l] .. offsets[l + 1]``.
        statistic, contrast, normalization, fusion, utility_weight: as in ``UcanConfig``.
    """
    n, layers = weight_norms.numel(), offsets.numel() - 1
    risk, utility, score = (torch.empty_like(weight_norms) for _ in range(3))
    if n == 0:
        return risk, utility, score
    if contrast == "none":
        # Already over the layer's maximum: that of the layer and that of the plan are then 1.
        normalization = "layer"
    power = _EXACT_POWERS.get(float(utility_weight), "general")
    chunks = _chunks(n, layers)
    offsets = offsets.contiguous()
    tops = torch.empty(2, layers, chunks, dtype=torch.float64, device=moments.device)
    top = tops
    with on_device(moments):
        measure_kernel[(layers, chunks)](
            moments.contiguous(),
            counts.contiguous(),
            weight_norms.contiguous(),
            offsets,
            risk,
            utility,
            tops,
            n,
            chunks,
            STATISTIC=statistic,
            CONTRAST=contrast,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
        if normalization == "global":
            top = torch.empty(1, dtype=torch.float64, device=moments.device)
            top_kernel[(1,)](
                tops, top, layers * chunks, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
            )
        finish_kernel[(layers, chunks)](
            offsets,
            risk,
            utility,
            score,
            tops,
            top,
            float(utility_weight),
            chunks,
            NORMALIZATION=normalization,
            FUSION="subtract" if fusion == "subtract" else power,
            BLOCK=BLOCK,
            MAX_CHUNKS=MAX_CHUNKS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return risk, utility, score


def attenuation_factors(
    score: torch.Tensor,
    top: torch.Tensor,
    threshold: float,
    decay: str,
    strength: float,
    floor: float,
) -> torch.Tensor:
    """γ of every neuron, fp32 ``[n]``; ``top`` is the largest score, fp64, on the device."""
    n = score.numel()
    factors = torch.empty_like(score, dtype=torch.float32)
    if n == 0:
        return factors
    score = score.contiguous()
    with on_device(score):
        factors_kernel[(ceil_div(n, BLOCK),)](
            score,
            top,
            factors,
            float(threshold),
            float(strength),
            float(floor),
            n,
            DECAY=decay,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return factors


def _chunks(n: int, layers: int) -> int:
    """Programs per layer: enough for one that holds all n neurons, not too many in total."""
    return max(1, min(ceil_div(n, BLOCK), MAX_CHUNKS, PROGRAMS // layers))


def compile_cases() -> list[CompileCase]:
    """Every choice of the configuration as launched."""
    pointers = ("offsets", "risk", "utility", "tops")
    measure = {
        **dict.fromkeys(("moments", "counts", "weight_norms"), "*fp64"),
        "offsets": "*i64",
        "risk": "*fp64",
        "utility": "*fp64",
        "tops": "*fp64",
        "n": "i32",
        "chunks": "i32",
        **dict.fromkeys(("STATISTIC", "CONTRAST", "BLOCK"), "constexpr"),
    }
    finish = {
        "offsets": "*i64",
        **dict.fromkeys(("risk", "utility", "score", "tops", "top"), "*fp64"),
        "utility_weight": "fp64",
        "chunks": "i32",
        **dict.fromkeys(("NORMALIZATION", "FUSION", "BLOCK", "MAX_CHUNKS"), "constexpr"),
    }
    factors = {
        "score": "*fp64",
        "top": "*fp64",
        "factors": "*fp32",
        "threshold": "fp64",
        "strength": "fp64",
        "floor": "fp64",
        "n": "i32",
        "DECAY": "constexpr",
        "BLOCK": "constexpr",
    }
    options = {"enable_fp_fusion": False}
    cases = [
        CompileCase(
            name=f"measure, {statistic}, {contrast}",
            kernel=measure_kernel,
            signature=measure,
            constants={"STATISTIC": statistic, "CONTRAST": contrast, "BLOCK": BLOCK},
            divisible=("moments", "counts", "weight_norms", *pointers),
            wide_loads=False,
            options=options,
        )
        for statistic in _STATISTICS
        for contrast in _CONTRASTS
    ]
    cases.append(
        CompileCase(
            name="largest risk of all layers",
            kernel=top_kernel,
            signature={"tops": "*fp64", "top": "*fp64", "parts": "i32", "BLOCK": "constexpr"},
            constants={"BLOCK": BLOCK},
            divisible=("tops", "top"),
            wide_loads=False,
            options=options,
        )
    )
    cases += [
        CompileCase(
            name=f"finish, normalization {normalization}, {fusion}",
            kernel=finish_kernel,
            signature=finish,
            constants={
                "NORMALIZATION": normalization,
                "FUSION": fusion,
                "BLOCK": BLOCK,
                "MAX_CHUNKS": MAX_CHUNKS,
            },
            divisible=(*pointers, "score", "top"),
            wide_loads=False,
            options=options,
        )
        for normalization in _NORMALIZATIONS
        for fusion in _FUSIONS
    ]
    cases += [
        CompileCase(
            name=f"factors, {decay}",
            kernel=factors_kernel,
            signature=factors,
            constants={"DECAY": decay, "BLOCK": BLOCK},
            divisible=("score", "top", "factors"),
            wide_loads=False,
            options=options,
        )
        for decay in _DECAYS
    ]
    return cases
