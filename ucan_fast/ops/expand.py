"""expand: ``y = base_out + s z Bᵀ (+ s bias)``, and in the same pass the output-site moments."""

from __future__ import annotations

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
from .moments import add_moments_, check_moments

# From this many rows on C++ is faster without moments too: it brings B into another order first.
# Fewer go there only where it was asked for by name. With moments the rule is the same, so that y
# has the same bits whatever is measured.
NATIVE_ROWS = 32


def expand(
    base_out: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    only_group: int | None = None,
    delta_moments: torch.Tensor | None = None,
    overwrite: bool = False,
) -> torch.Tensor:
    """The second half of a LoRA layer, added to what the base layer returned.

    The product is that of z's dtype (B and the bias are rounded to it), sums are in fp32 (fp64 for
    fp64), and y is rounded once to ``base_out``'s dtype. The reference rounds a narrow product too,
    as torch's products do; Triton and C++ do not, so that the last bits of a narrow product depend
    on which of them runs: on the CPU C++ from 32 rows on, where nothing is recorded. What C++ does
    not compute as this says goes to the reference, also under ``native`` by name (see
    :mod:`ucan_fast.ops.backend`).

    Args:
        base_out: ``[..., N]``, what the base layer returned.
        z: ``[..., r]``, from :func:`shrink`.
        b: the adapter's B, ``[N, r]``.
        scaling: s.
        bias: the adapter's own bias ``[N]``, if it has one.
        groups: one integer per token (0 forget, 1 retain, else ignored); needed for moments.
        only_group: 0 or 1 counts the tokens of that group alone.
        delta_moments: fp64 ``[2, 2, N]``, increased by the moments of δ = s z Bᵀ taken in fp32
            from the stored z and B (no bias).
        overwrite: nobody else holds ``base_out``'s memory, so y may be written into it. Only a
            permission: it is used where that is faster.

    Returns:
        y, ``[..., N]`` in ``base_out``'s dtype, contiguous; a new tensor unless ``overwrite``.

    Differentiable while no moments are asked for, in both directions and under ``torch.func``;
    with moments, call it under ``torch.no_grad()``.

    Raises:
        UcanError: shapes, dtypes or devices that do not fit together, or moments while a derivative
            is taken.
    """
    eager = not torch.compiler.is_compiling()
    if delta_moments is None:
        if eager:
            backend = _backend(base_out, z, b)
            if backend == "triton" and is_transformed(base_out, z, b, bias):
                _check(base_out, z, b, bias)
                return expand_reference(base_out, z, b, scaling, bias)
            if runs_directly(backend, base_out, z, b, bias):
                _check(base_out, z, b, bias)
                return _run(backend, base_out, z, b, scaling, bias, overwrite)
        return torch.ops.ucan_fast.expand(base_out, z, b, scaling, bias)
    if groups is None:
        raise UcanError("expand: moments need groups, one integer per token.")
    sums = (groups, only_group, delta_moments)
    if eager and runs_directly("triton", base_out, z, b, bias, groups, delta_moments):
        return _expand_moments(base_out, z, b, scaling, bias, *sums, overwrite)
    check_not_recorded("expand", base_out=base_out, z=z, B=b, bias=bias)
    return torch.ops.ucan_fast.expand.moments(base_out, z, b, scaling, bias, *sums)


def _check(
    base_out: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    if (
        b.dim() != 2
        or z.dim() < 1
        or z.shape[-1] != b.shape[1]
        or base_out.shape != (*z.shape[:-1], b.shape[0])
        or (bias is not None and tuple(bias.shape) != (b.shape[0],))
    ):
        raise UcanError(
            f"expand: base_out {tuple(base_out.shape)}, z {tuple(z.shape)}, B {tuple(b.shape)} "
            "must be [..., N], [..., r], [N, r], and a bias [N]."
        )
    # All alike is the usual case, and cheaper to see than to look at each.
    dtype = z.dtype
    if bias is not None or not base_out.dtype == dtype == b.dtype or dtype not in FLOATING:
        bias_dtype = None if bias is None else bias.dtype
        check_dtypes("expand", base_out=base_out.dtype, z=dtype, B=b.dtype, bias=bias_dtype)
    if bias is not None or not base_out.device == z.device == b.device:
        check_device("expand", base_out=base_out, z=z, B=b, bias=bias)


def delta_dtype(z: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 where z or B is."""
    return torch.promote_types(torch.promote_types(z.dtype, b.dtype), torch.float32)


def delta_reference(z: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """δ = s z Bᵀ in fp32 (fp64 for fp64): the signal of the output site."""
    wide = delta_dtype(z, b)
    with without_autocast(z.device.type):
        delta = F.linear(z.to(wide), b.to(wide))
        return delta if scaling == 1.0 else delta * scaling


def expand_reference(
    base_out: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The definition of y."""
    wide = torch.promote_types(torch.promote_types(base_out.dtype, z.dtype), torch.float32)
    with without_autocast(z.device.type):
        delta = F.linear(z, cast(b, z.dtype), None if bias is None else cast(bias, z.dtype))
        y = torch.add(cast(base_out, wide), cast(delta, wide), alpha=scaling)
    return cast(y, base_out.dtype).contiguous()


def _backend(base_out: torch.Tensor, z: torch.Tensor, b: torch.Tensor) -> str:
    return choose("expand", z.device, base_out.dtype, z.dtype, b.dtype)


def run_expand(
    base_out: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """y, unchecked, on the backend chosen for this call."""
    return _run(_backend(base_out, z, b), base_out, z, b, scaling, bias, False)


def _run(
    backend: str,
    base_out: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    overwrite: bool,
) -> torch.Tensor:
    if backend == "triton":
        from ..kernels.expand import expand as launch

        return launch(base_out, z, b, scaling, bias)
    if backend == "native" and _fits_native(base_out, z, b) and is_unobserved(base_out, z, b, bias):
        return _expand_native(base_out, z, b, scaling, bias, None, None, None, overwrite)
    return expand_reference(base_out, z, b, scaling, bias)


def run_expand_moments(
    base_out: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    groups: torch.Tensor,
    only_group: int | None,
    delta_moments: torch.Tensor,
    overwrite: bool = False,
) -> torch.Tensor:
    """y and its moments, unchecked, on the backend chosen for this call."""
    backend = _backend(base_out, z, b)
    sums = (groups, only_group, delta_moments)
    if backend == "triton":
        from ..kernels.expand import expand as launch

        return launch(base_out, z, b, scaling, bias, *sums)
    if backend == "native" and _fits_native(base_out, z, b):
        return _expand_native(base_out, z, b, scaling, bias, *sums, overwrite)
    y = expand_reference(base_out, z, b, scaling, bias)
    add_moments_(delta_reference(z, b, scaling), *sums)
    return y


def _fits_native(base_out: torch.Tensor, z: torch.Tensor, b: torch.Tensor) -> bool:
    (n, r), dtype = b.shape, z.dtype
    if base_out.dtype == dtype == b.dtype:  # the usual case, and cheaper to see
        fits = True
    else:
        wide = torch.promote_types(base_out.dtype, delta_dtype(z, b))
        fits = wide in (torch.float32, dtype)
    if not fits or n == 0 or r == 0:
        return False
    return z.numel() >= NATIVE_ROWS * r or requested_backend() == "native"


def _expand_native(
    base_out: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    groups: torch.Tensor | None,
    only_group: int | None,
    delta_moments: torch.Tensor | None,
    overwrite: bool,
) -> torch.Tensor:
    (n, r), dtype = b.shape, z.dtype
    sums = (groups, only_group, delta_moments)
    # y is of B as it is in z's dtype, δ of B in full.
    apart = delta_moments is not None and torch.promote_types(b.dtype, dtype) != dtype
    if apart:
        groups = only_group = delta_moments = None
    wide = dtype if dtype in WIDE else torch.float32
    y_dtype = base_out.dtype if wide == torch.float32 else wide
    in_place = overwrite and base_out.dtype == y_dtype and base_out.is_contiguous()
    # The dispatcher makes a lazily negated tensor plain by a copy.
    in_place = in_place and not base_out.is_neg()
    y = base_out if in_place else torch.empty(base_out.shape, dtype=y_dtype, device=z.device)
    totals = None if delta_moments is None else delta_moments.contiguous()
    torch.ops.ucan_fast._expand_native_(
        None if in_place else base_out.reshape(-1, n),
        cast(z.reshape(-1, r), wide),
        cast(cast(b, dtype), wide),
        scaling,
        None if bias is None else cast(cast(bias, dtype), wide),
        groups,
        -1 if only_group is None else only_group,
        totals,
        y.view(-1, n),
    )
    if totals is not delta_moments:
        delta_moments.copy_(totals)
    if apart:
        add_moments_(delta_reference(z, b, scaling), *sums)
    return cast(y, base_out.dtype)


def _save(ctx, inputs, output) -> None:
    _, z, b, ctx.scaling, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(z, b)


def _backward(ctx, grad_y: torch.Tensor):
    z, b = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (1, 2, 4)]
    grad_z, grad_b, grad_bias = lora_gradients(grad_y, z, b, ctx.scaling, ctx.bias_dtype, needs)
    return grad_y, grad_z, grad_b, None, grad_bias


def lora_gradients(
    grad_y: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias_dtype: torch.dtype | None,
    needs: list[bool],
) -> list[torch.Tensor | None]:
    """Gradients of z, B and the adapter's bias, those that are needed."""
    grad_z = grad_b = grad_bias = None
    with torch.autocast(z.device.type, enabled=False):
        wide = grad_y.to(torch.promote_types(grad_y.dtype, z.dtype))
        grad_delta = (wide * scaling).to(z.dtype)
        rows = grad_delta.reshape(-1, grad_delta.shape[-1])
        if needs[0]:
            grad_z = grad_delta @ b.to(z.dtype)
        if needs[1]:
            grad_b = (rows.t() @ z.reshape(-1, z.shape[-1])).to(b.dtype)
        if needs[2]:
            grad_bias = rows.sum(0).to(bias_dtype)
    return [grad_z, grad_b, grad_bias]


def _expand(
    base_out: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    _check(base_out, z, b, bias)
    return run_expand(base_out, z, b, scaling, bias)


def _expand_moments(
    base_out: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    groups: torch.Tensor,
    only_group: int | None,
    delta_moments: torch.Tensor,
    overwrite: bool = False,
) -> torch.Tensor:
    check_not_recorded("expand", base_out=base_out, z=z, B=b, bias=bias)
    _check(base_out, z, b, bias)
    check_moments(base_out, groups, delta_moments, only_group)
    sums = (groups, only_group, delta_moments)
    return run_expand_moments(base_out, z, b, scaling, bias, *sums, overwrite)


LIBRARY.define("expand(Tensor base_out, Tensor z, Tensor b, float scaling, Tensor? bias) -> Tensor")
LIBRARY.define(
    "expand.moments(Tensor base_out, Tensor z, Tensor b, float scaling, Tensor? bias, "
    "Tensor groups, int? only_group, Tensor(a!) delta_moments) -> Tensor"
)
LIBRARY.impl("expand", _expand, "CompositeExplicitAutograd")
LIBRARY.impl("expand.moments", _expand_moments, "CompositeExplicitAutograd")
torch.library.register_autograd("ucan_fast::expand", _backward, setup_context=_save, lib=LIBRARY)


@torch.library.register_fake("ucan_fast::expand", lib=LIBRARY)
def _(base_out, z, b, scaling, bias) -> torch.Tensor:
    _check(base_out, z, b, bias)
    return base_out.new_empty(base_out.shape)


@torch.library.register_fake("ucan_fast::expand.moments", lib=LIBRARY)
def _(base_out, z, b, scaling, bias, groups, only_group, delta_moments) -> torch.Tensor:
    _check(base_out, z, b, bias)
    check_moments(base_out, groups, delta_moments, only_group)
    return base_out.new_empty(base_out.shape)
