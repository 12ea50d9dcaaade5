"""attenuate_: multiply the rows or columns of many small matrices by their factors, in place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from ..errors import UcanError
from .backend import LIBRARY, choose

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def attenuate_(
    weights: Sequence[torch.Tensor],
    factors: torch.Tensor,
    offsets: Sequence[int],
    axes: Sequence[int],
) -> None:
    """Scale each row (axis 0) or column (axis 1) of each weight by its factor, in place.

    The product is taken in fp32 (fp64 for fp64 weights) and rounded once to the weight's dtype;
    where the factor is 1 the stored bits stay as they are.

    Args:
        weights: matrices ``[rows, cols]`` of fp32, bf16, fp16 or fp64, on one device.
        factors: the factors of all matrices in one flat fp32 tensor, on the same device; memory
            of their own.
        offsets: where the factors of each weight begin; several weights may share a range.
        axes: 0 or 1 per weight.

    Raises:
        UcanError: a wrong shape, dtype or device, an offset out of range, weights that overlap
            each other or the factors in memory, or gradients being recorded. No weight was
            changed.
    """
    weights, offsets, axes = list(weights), list(offsets), list(axes)
    if torch.compiler.is_compiling():
        torch.ops.ucan_fast.attenuate_(weights, factors, offsets, axes)
        return
    # The extension checks the same things as the operator, a hundred times faster, before it
    # writes. What it or the schema refuses is looked at again, for the better words.
    try:
        if choose("attenuate_", factors.device) == "native":
            _attenuate_native_(weights, factors.contiguous(), offsets, axes)
        else:
            torch.ops.ucan_fast.attenuate_(weights, factors, offsets, axes)
    except RuntimeError:
        _check(weights, factors, offsets, axes)
        raise


def attenuate_reference_(
    weights: Sequence[torch.Tensor],
    factors: torch.Tensor,
    offsets: Sequence[int],
    axes: Sequence[int],
) -> None:
    """The definition."""
    for weight, offset, axis in zip(weights, offsets, axes, strict=True):
        wide = torch.promote_types(weight.dtype, torch.float32)
        factor = factors[offset : offset + weight.shape[axis]].to(wide).unsqueeze(1 - axis)
        scaled = (weight.to(wide) * factor).to(weight.dtype)
        # where keeps the bits of untouched neurons, a NaN's payload included.
        weight.copy_(torch.where(factor == 1, weight, scaled))


def _check(
    weights: Sequence[torch.Tensor],
    factors: torch.Tensor,
    offsets: Sequence[int],
    axes: Sequence[int],
) -> None:
    _check_arguments(weights, factors, offsets, axes)
    if torch.is_grad_enabled():
        for index, weight in enumerate(weights):
            if weight.requires_grad:
                raise UcanError(
                    f"attenuate_: weight {index} requires a gradient; "
                    "call attenuate_ under torch.no_grad()."
                )
    _check_overlap(weights, factors)


def _check_arguments(
    weights: Sequence[torch.Tensor],
    factors: torch.Tensor,
    offsets: Sequence[int],
    axes: Sequence[int],
) -> None:
    # What can be asked of fake tensors, too.
    if not len(weights) == len(offsets) == len(axes):
        raise UcanError(
            f"attenuate_: {len(weights)} weights, {len(offsets)} offsets and {len(axes)} axes; "
            "there must be one of each per weight."
        )
    if factors.dim() != 1 or factors.dtype != torch.float32:
        raise UcanError(
            f"attenuate_: factors must be one flat float32 tensor, "
            f"not {factors.dtype} {tuple(factors.shape)}."
        )
    for index, (weight, offset, axis) in enumerate(zip(weights, offsets, axes, strict=True)):
        which = f"attenuate_: weight {index}"
        if weight.dim() != 2 or weight.dtype not in _DTYPES:
            raise UcanError(
                f"{which} must be a floating matrix, not {weight.dtype} {tuple(weight.shape)}."
            )
        if axis not in (0, 1):
            raise UcanError(f"{which}: axis must be 0 (rows) or 1 (columns), not {axis}.")
        if weight.device != factors.device:
            raise UcanError(f"{which} is on {weight.device}, the factors on {factors.device}.")
        if offset < 0 or offset + weight.shape[axis] > factors.numel():
            raise UcanError(
                f"{which} needs factors [{offset}, {offset + weight.shape[axis]}), "
                f"but there are {factors.numel()}."
            )


def _check_overlap(weights: Sequence[torch.Tensor], factors: torch.Tensor) -> None:
    # Sorted by address, two weights overlap exactly if some neighbours do. Interleaved views
    # (two column ranges of one matrix) span each other without sharing an element: those are
    # refused as well, since telling them apart costs more than it is worth.
    # Strided factors are copied before a weight is written.
    factors_start = factors.data_ptr()
    factors_end = factors_start + 4 * factors.numel() if factors.is_contiguous() else factors_start
    spans = []
    for index, weight in enumerate(weights):
        if weight.numel() == 0:
            continue
        if _overlaps_itself(weight):
            raise UcanError(f"attenuate_: weight {index} overlaps itself (an expanded tensor?).")
        last = sum((s - 1) * abs(t) for s, t in zip(weight.shape, weight.stride(), strict=True))
        start = weight.data_ptr()
        end = start + (last + 1) * weight.element_size()
        if factors_start < end and start < factors_end:
            raise UcanError(
                f"attenuate_: weight {index} and the factors overlap in memory, so factors would "
                "change while they are applied; pass factors.clone()."
            )
        spans.append((start, end, index))
    spans.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            raise UcanError(
                f"attenuate_: weights {min(first, second)} and {max(first, second)} overlap in "
                "memory and would be scaled twice; pass shared storage once."
            )


def _overlaps_itself(weight: torch.Tensor) -> bool:
    (rows, cols), (row_stride, col_stride) = weight.shape, weight.stride()
    if rows < 2 or cols < 2:
        return (rows > 1 and row_stride == 0) or (cols > 1 and col_stride == 0)
    # Two elements coincide if i row_stride = j col_stride; the smallest such pair is
    # (col_stride, row_stride) / gcd.
    divisor = math.gcd(row_stride, col_stride)
    return divisor == 0 or (col_stride // divisor < rows and row_stride // divisor < cols)


def _dispatch(
    weights: Sequence[torch.Tensor],
    factors: torch.Tensor,
    offsets: Sequence[int],
    axes: Sequence[int],
) -> None:
    backend = choose("attenuate_", factors.device)
    _check(weights, factors, offsets, axes)
    factors = factors.contiguous()
    if backend == "reference":
        attenuate_reference_(weights, factors, offsets, axes)
        return
    if backend == "native":
        _attenuate_native_(weights, factors, offsets, axes)
        return
    from ..kernels.attenuate import attenuate_ as launch

    launch(weights, factors, offsets, axes)
    _count_writes(weights)


def _attenuate_native_(
    weights: Sequence[torch.Tensor],
    factors: torch.Tensor,
    offsets: Sequence[int],
    axes: Sequence[int],
) -> None:
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        raise RuntimeError("a weight requires a gradient")
    torch.ops.ucan_fast._attenuate_native_.default(weights, factors, offsets, axes)
    _count_writes(weights)


def _count_writes(weights: Sequence[torch.Tensor]) -> None:
    # Kernels do not; a backward that saved the old values must notice.
    if weights:
        torch.autograd.graph.increment_version(weights)


LIBRARY.define("attenuate_(Tensor(a!)[] weights, Tensor factors, int[] offsets, int[] axes) -> ()")
LIBRARY.impl("attenuate_", _dispatch, "CompositeExplicitAutograd")


@torch.library.register_fake("ucan_fast::attenuate_", lib=LIBRARY)
def _(weights, factors, offsets, axes) -> None:
    _check_arguments(weights, factors, offsets, axes)
