"""Moments of one activation per token group: the definition behind every statistic.

``moments`` is one fp64 tensor ``[2, 2, n]``: ``moments[0, g, j] = Σ |h_j|`` and
``moments[1, g, j] = Σ h_j²`` over the tokens of group g (0 forget, 1 retain). Other groups are
ignored, whatever their rows hold, NaN included.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..errors import UcanError
from .backend import LIBRARY, choose, without_autocast
from .checks import FLOATING

#: fp32 partial sums span this many tokens; they are folded into fp64 totals in a fixed order.
ROWS_PER_PARTIAL = 32
#: Values of h that are widened at a time: 16 MiB in fp32, about four times that with temporaries.
BLOCK_ELEMENTS = 1 << 22
_GROUP_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def accumulate_moments(
    h: torch.Tensor,
    groups: torch.Tensor,
    moments: torch.Tensor,
    *,
    only_group: int | None = None,
) -> None:
    """Add the moments of ``h`` to ``moments``, in place. No gradient flows into them.

    Args:
        h: activations ``[..., n]``, any floating dtype, any strides.
        groups: one integer per token of ``h``, flattened: 0 forget, 1 retain, else ignored.
        moments: running totals, fp64 ``[2, 2, n]``.
        only_group: 0 or 1 counts the tokens of that group alone. The sums of a batch that holds
            no other group are the same, and cheaper on a GPU.

    Raises:
        UcanError: shapes, dtypes or devices that do not fit together.
    """
    torch.ops.ucan_fast.accumulate_moments(h, groups, only_group, moments)


def check_moments(
    h: torch.Tensor,
    groups: torch.Tensor,
    moments: torch.Tensor,
    only_group: int | None = None,
) -> None:
    """Refuse arguments that would record nonsense."""
    if h.dtype not in FLOATING or h.dim() < 1:
        raise UcanError(
            "moments: h must be float32, bfloat16, float16 or float64 [..., n], "
            f"not {h.dtype} {tuple(h.shape)}."
        )
    tokens = math.prod(h.shape[:-1])
    check_totals(tokens, h.shape[-1], h.device, groups, moments, only_group)


def check_totals(
    tokens: int,
    n: int,
    device: torch.device,
    groups: torch.Tensor,
    moments: torch.Tensor,
    only_group: int | None,
) -> None:
    """:func:`check_moments` for activations ``[tokens, n]`` that do not exist yet."""
    if groups.dim() != 1 or groups.numel() != tokens or groups.dtype not in _GROUP_DTYPES:
        raise UcanError(
            "moments: groups must hold one integer (int8, uint8, int16, int32 or int64) for each "
            f"of the {tokens} tokens, not {groups.dtype} {tuple(groups.shape)}."
        )
    if tuple(moments.shape) != (2, 2, n) or moments.dtype != torch.float64:
        raise UcanError(
            f"moments: the totals must be float64 (2, 2, {n}), "
            f"not {moments.dtype} {tuple(moments.shape)}."
        )
    if only_group not in (None, 0, 1):
        raise UcanError(f"moments: only_group must be None, 0 or 1, not {only_group!r}.")
    if not device == groups.device == moments.device:
        raise UcanError(
            f"moments: h is on {device}, groups on {groups.device}, totals on {moments.device}; "
            "they must share one device."
        )


def moments_reference(
    h: torch.Tensor, groups: torch.Tensor, only_group: int | None = None
) -> torch.Tensor:
    """Σ|h| and Σh² per group, fp64 ``[2, 2, n]``: the definition."""
    n = h.shape[-1]
    if only_group is not None:
        groups = torch.where(groups == only_group, groups, -1)
    h = h.reshape(-1, n)
    total = torch.zeros(2, 2, n, dtype=torch.float64, device=h.device)
    rows = max(1, BLOCK_ELEMENTS // (ROWS_PER_PARTIAL * max(n, 1))) * ROWS_PER_PARTIAL
    for start in range(0, h.shape[0], rows):
        total += _block_moments(h[start : start + rows], groups[start : start + rows])
    return total


def _block_moments(h: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    n = h.shape[1]
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    # where, not a product: a NaN in an ignored row must not spread.
    h = torch.where((groups == 0).logical_or(groups == 1).unsqueeze(1), h, 0.0)
    chunks = -(-h.shape[0] // ROWS_PER_PARTIAL)
    padding = chunks * ROWS_PER_PARTIAL - h.shape[0]
    mask = torch.stack([groups == 0, groups == 1]).to(h.dtype)
    mask = F.pad(mask, (0, padding)).view(2, chunks, ROWS_PER_PARTIAL).transpose(0, 1)
    h = F.pad(h, (0, 0, 0, padding)).view(chunks, ROWS_PER_PARTIAL, n)
    partial = torch.stack([mask @ h.abs(), mask @ (h * h)])
    return partial.sum(1, dtype=torch.float64)


def add_moments_(
    h: torch.Tensor, groups: torch.Tensor, only_group: int | None, moments: torch.Tensor
) -> None:
    """The sums, unchecked, on the backend chosen for this call."""
    backend = choose("accumulate_moments", h.device, h.dtype)
    if not h.numel():
        return
    if backend == "triton":
        from ..kernels.moments import accumulate_moments_

        accumulate_moments_(h, groups, moments, only_group)
    elif backend == "native":
        group = -1 if only_group is None else only_group
        totals = moments.contiguous()
        rows = h.reshape(-1, h.shape[-1])
        torch.ops.ucan_fast._moments_native_(rows, groups, group, totals)
        if totals is not moments:
            moments.copy_(totals)
    else:
        # Autocast would turn the sums into bf16 products.
        with torch.no_grad(), without_autocast(h.device.type):
            moments += moments_reference(h, groups, only_group)


def _accumulate(
    h: torch.Tensor, groups: torch.Tensor, only_group: int | None, moments: torch.Tensor
) -> None:
    check_moments(h, groups, moments, only_group)
    add_moments_(h, groups, only_group, moments)


LIBRARY.define(
    "accumulate_moments(Tensor h, Tensor groups, int? only_group, Tensor(a!) moments) -> ()"
)
LIBRARY.impl("accumulate_moments", _accumulate, "CompositeExplicitAutograd")


@torch.library.register_fake("ucan_fast::accumulate_moments", lib=LIBRARY)
def _(h, groups, only_group, moments) -> None:
    check_moments(h, groups, moments, only_group)
