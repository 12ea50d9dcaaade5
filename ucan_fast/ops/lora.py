"""add_lora: shrink and expand in one call, for whoever takes no moments."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import PLAIN, is_unobserved, requested_backend
from .checks import WIDE
from .expand import expand
from .shrink import NATIVE_ROWS, shrink


def add_lora(
    base_out: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    *,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    overwrite: bool = False,
) -> torch.Tensor:
    """``y = base_out + s ((x Aᵀ) Bᵀ + bias)``: a whole LoRA layer but for its base product.

    Args:
        base_out: ``[..., N]``, what the base layer returned.
        x: ``[..., K]``.
        a, b: the adapter's A ``[r, K]`` and B ``[N, r]``.
        scaling: s.
        dtype: of both products, as in :func:`shrink`.
        bias: the adapter's own bias ``[N]``, if it has one.
        overwrite: nobody else holds ``base_out``'s memory, so y may be written into it.

    Returns, Raises: as :func:`expand`, whose result it is, on the same backends. Differentiable.
    """
    if overwrite and bias is None and _is_plain(base_out, x, a, b, dtype):
        n, r = b.shape
        # shrink's own questions take longer than the product of a few tokens.
        z = F.linear(x, a) if base_out.numel() < NATIVE_ROWS * n else shrink(x, a)
        base_out.view(-1, n).addmm_(z.reshape(-1, r), b.t(), alpha=scaling)
        return base_out
    return expand(base_out, shrink(x, a, dtype=dtype), b, scaling, bias=bias, overwrite=overwrite)


def _is_plain(
    base_out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
) -> bool:
    """Whether torch's own ``addmm_`` is the fastest sum there is: on the CPU, in one wide dtype.

    C++ beats that one only where it takes moments as well, and of one token the two operators' own
    questions take longer than the products.
    """
    return (
        type(x) in PLAIN
        and x.is_cpu
        and base_out.dtype == x.dtype == a.dtype == b.dtype == dtype
        and dtype in WIDE
        and base_out.is_contiguous()
        and base_out.numel() > 0
        # What does not fit is refused by shrink and expand, in their words.
        and base_out.shape[:-1] == x.shape[:-1]
        and a.shape == (b.shape[-1], x.shape[-1])
        and b.shape == (base_out.shape[-1], a.shape[0])
        and requested_backend() == "auto"
        and not torch.is_autocast_enabled("cpu")
        and is_unobserved(base_out, x, a, b)
    )
