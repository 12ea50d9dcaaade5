"""add_lora: shrink and expand in one call, for whoever takes no moments."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .backend import PLAIN, cast, is_unobserved, requested_backend
from .checks import FLOATING, WIDE
from .expand import NATIVE_ROWS as EXPAND_ROWS
from .expand import expand
from .shrink import NATIVE_ROWS as SHRINK_ROWS
from .shrink import shrink


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
    if overwrite and bias is None and _is_plain(base_out, x, a, b):
        n, r = b.shape
        rows, casts = base_out.numel() // n, torch.is_autocast_enabled("cpu")
        if base_out.dtype == dtype and _sums_once(dtype, scaling):
            # shrink's own questions take longer than the product of a few tokens.
            few = rows < SHRINK_ROWS and x.dtype == a.dtype == dtype and not casts
            z = F.linear(x, a) if few else shrink(x, a, dtype=dtype)
            base_out.view(rows, n).addmm_(z.reshape(rows, r), cast(b, dtype).t(), alpha=scaling)
            return base_out
        wide = dtype in WIDE and torch.promote_types(base_out.dtype, dtype) == dtype
        if wide and rows < EXPAND_ROWS and not casts:
            # What both operators compute of so few rows, less their questions.
            product = F.linear(F.linear(cast(x, dtype), cast(a, dtype)), cast(b, dtype))
            return cast(cast(base_out, dtype).add_(product, alpha=scaling), base_out.dtype)
    return expand(base_out, shrink(x, a, dtype=dtype), b, scaling, bias=bias, overwrite=overwrite)


def _is_plain(base_out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether these are CPU tensors that fit together and that nobody watches."""
    return (
        type(x) in PLAIN
        and x.is_cpu
        and base_out.is_contiguous()
        and base_out.numel() > 0
        # What does not fit is refused by shrink and expand, in their words.
        and base_out.dtype in FLOATING
        and x.dtype in FLOATING
        and base_out.shape[:-1] == x.shape[:-1]
        and a.shape == (b.shape[-1], x.shape[-1])
        and b.shape == (base_out.shape[-1], a.shape[0])
        and a.dtype == b.dtype
        and requested_backend() == "auto"
        and is_unobserved(base_out, x, a, b)
    )


def _sums_once(dtype: torch.dtype, scaling: float) -> bool:
    """Whether torch's own ``addmm_`` is the fastest sum there is, and rounds once, as ``expand``.

    C++ beats that one only where it takes moments as well, and of one token the two operators' own
    questions take longer than the products. (Of bf16 torch leaves a factor of 0 to slow code.)
    """
    return dtype in WIDE or (dtype == torch.bfloat16 and scaling != 0 and _multiplies_bfloat16())


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it, and torch uses them: else C++ is faster."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())
