"""shrink: ``z = x Aᵀ``, and in the same pass the moments of x and of z."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..errors import UcanError
from .backend import (
    LIBRARY,
    cast,
    choose,
    is_transformed,
    is_unobserved,
    requested_backend,
    runs_directly,
    without_autocast,
)
from .checks import FLOATING, WIDE, check_device, check_dtypes, check_not_recorded
from .moments import add_moments_, check_totals

# From this many rows on C++ is faster: it brings A into another order first. Fewer go there only
# where it was asked for by name. With moments the rule is the same, so that z has the same bits
# whatever is measured.
NATIVE_ROWS = 128


def shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    groups: torch.Tensor | None = None,
    only_group: int | None = None,
    input_moments: torch.Tensor | None = None,
    rank_moments: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first half of a LoRA layer: ``z = x Aᵀ``.

    What C++ does not compute as this says goes to the reference, also under ``native`` by name (see
    :mod:`ucan_fast.ops.backend`).

    Args:
        x: activations ``[..., K]``.
        a: the adapter's A, ``[r, K]``.
        dtype: operands are cast to it before the product, and z has it; default: A's dtype.
        groups: one integer per token (0 forget, 1 retain, else ignored); needed for moments.
        only_group: 0 or 1 counts the tokens of that group alone.
        input_moments: fp64 ``[2, 2, K]``, increased by the moments of x.
        rank_moments: fp64 ``[2, 2, r]``, increased by the moments of z.

    Returns:
        z, ``[..., r]`` in ``dtype``.

    Differentiable while no moments are asked for, in both directions and under ``torch.func``;
    with moments, call it under ``torch.no_grad()``.

    Raises:
        UcanError: shapes, dtypes or devices that do not fit together, or moments while a derivative
            is taken.
    """
    dtype = dtype or a.dtype
    if input_moments is None and rank_moments is None:
        if not torch.compiler.is_compiling():
            backend = _backend(x, a, dtype)
            if backend == "triton" and is_transformed(x, a):
                _check(x, a, dtype)
                return shrink_reference(x, a, dtype)
            if runs_directly(backend, x, a):
                _check(x, a, dtype)
                return _run(backend, x, a, dtype)
        return torch.ops.ucan_fast.shrink(x, a, dtype)
    if groups is None:
        raise UcanError("shrink: moments need groups, one integer per token.")
    sums = (groups, only_group, input_moments, rank_moments)
    eager = not torch.compiler.is_compiling()
    if eager and runs_directly("triton", x, a, groups, input_moments, rank_moments):
        return _shrink_moments(x, a, dtype, *sums)
    check_not_recorded("shrink", x=x, A=a)
    return torch.ops.ucan_fast.shrink.moments(x, a, dtype, *sums)


def _check(x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> None:
    if a.dim() != 2 or x.dim() < 1 or x.shape[-1] != a.shape[1]:
        raise UcanError(
            f"shrink: x {tuple(x.shape)} and A {tuple(a.shape)} must be [..., K] and [r, K]."
        )
    # All alike is the usual case, and cheaper to see than to look at each.
    if not x.dtype == a.dtype == dtype or dtype not in FLOATING:
        check_dtypes("shrink", x=x.dtype, A=a.dtype, product=dtype)
    if x.device != a.device:
        check_device("shrink", x=x, A=a)


def _check_moments(
    x: torch.Tensor,
    a: torch.Tensor,
    dtype: torch.dtype,
    groups: torch.Tensor,
    only_group: int | None,
    input_moments: torch.Tensor | None,
    rank_moments: torch.Tensor | None,
) -> None:
    _check(x, a, dtype)
    tokens, (r, k) = math.prod(x.shape[:-1]), a.shape
    for n, moments in ((k, input_moments), (r, rank_moments)):
        if moments is not None:
            check_totals(tokens, n, x.device, groups, moments, only_group)


def shrink_reference(x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The definition of z."""
    # The dtype is given explicitly, so an outer autocast must not cast once more.
    with without_autocast(x.device.type):
        return F.linear(cast(x, dtype), cast(a, dtype))


def _backend(x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> str:
    return choose("shrink", x.device, x.dtype, a.dtype, dtype)


def _shrink(x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    _check(x, a, dtype)
    return _run(_backend(x, a, dtype), x, a, dtype)


def _run(backend: str, x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if backend == "triton":
        from ..kernels.shrink import shrink as launch

        return launch(x, a, dtype)
    return _product(backend, x, a, dtype)


def _product(backend: str, x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if backend != "native" or not (_fits_native(x, a, dtype) and is_unobserved(x, a)):
        return shrink_reference(x, a, dtype)
    return run_native(x, a, dtype)


def run_native(x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """z from C++, unchecked."""
    z = torch.empty(*x.shape[:-1], a.shape[0], dtype=dtype, device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    torch.ops.ucan_fast._shrink_native_(rows, cast(a, dtype), z.view(-1, a.shape[0]))
    return z


def _fits_native(x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> bool:
    # Narrow products are rounded, and wide values narrowed before them; the C++ code does neither.
    if dtype not in WIDE or (x.dtype != dtype and torch.promote_types(x.dtype, dtype) != dtype):
        return False
    if x.numel() == 0 or a.numel() == 0:
        return False
    return x.numel() >= NATIVE_ROWS * x.shape[-1] or requested_backend() == "native"


def _shrink_moments(
    x: torch.Tensor,
    a: torch.Tensor,
    dtype: torch.dtype,
    groups: torch.Tensor,
    only_group: int | None,
    input_moments: torch.Tensor | None,
    rank_moments: torch.Tensor | None,
) -> torch.Tensor:
    check_not_recorded("shrink", x=x, A=a)
    _check_moments(x, a, dtype, groups, only_group, input_moments, rank_moments)
    backend = _backend(x, a, dtype)
    if backend == "triton":
        from ..kernels.shrink import shrink as launch

        return launch(x, a, dtype, groups, only_group, input_moments, rank_moments)
    z = _product(backend, x, a, dtype)
    if input_moments is not None:
        add_moments_(x, groups, only_group, input_moments)
    if rank_moments is not None:
        add_moments_(z, groups, only_group, rank_moments)
    return z


def _save(ctx, inputs, output) -> None:
    x, a, ctx.dtype = inputs
    ctx.save_for_backward(x, a)


def _backward(ctx, grad_z: torch.Tensor):
    x, a = ctx.saved_tensors
    grad_x = grad_a = None
    with torch.autocast(x.device.type, enabled=False):
        if ctx.needs_input_grad[0]:
            grad_x = (grad_z @ a.to(ctx.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows = grad_z.reshape(-1, grad_z.shape[-1])
            grad_a = (rows.t() @ x.to(ctx.dtype).reshape(-1, x.shape[-1])).to(a.dtype)
    return grad_x, grad_a, None


LIBRARY.define("shrink(Tensor x, Tensor a, ScalarType dtype) -> Tensor")
LIBRARY.define(
    "shrink.moments(Tensor x, Tensor a, ScalarType dtype, Tensor groups, int? only_group, "
    "Tensor(a!)? input_moments, Tensor(b!)? rank_moments) -> Tensor"
)
LIBRARY.impl("shrink", _shrink, "CompositeExplicitAutograd")
LIBRARY.impl("shrink.moments", _shrink_moments, "CompositeExplicitAutograd")
torch.library.register_autograd("ucan_fast::shrink", _backward, setup_context=_save, lib=LIBRARY)


@torch.library.register_fake("ucan_fast::shrink", lib=LIBRARY)
def _(x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    _check(x, a, dtype)
    return x.new_empty((*x.shape[:-1], a.shape[0]), dtype=dtype)


@torch.library.register_fake("ucan_fast::shrink.moments", lib=LIBRARY)
def _(x, a, dtype, groups, only_group, input_moments, rank_moments) -> torch.Tensor:
    _check_moments(x, a, dtype, groups, only_group, input_moments, rank_moments)
    return x.new_empty((*x.shape[:-1], a.shape[0]), dtype=dtype)
