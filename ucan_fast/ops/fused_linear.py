"""fused_linear: a whole LoRA linear in one product, ``y = x Wᵀ + b + s (z Bᵀ + lora_b)``.

Opt-in: a layer uses it where ``UCAN_FAST_FUSED_LINEAR=1`` says so, or where a committed measurement
says that it wins (``kernels/tuning.py``; there is none yet). Elsewhere the base layer is called as
a module and :func:`expand` does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import UcanError
from ..kernels import tuning
from .backend import LIBRARY, choose, is_transformed, setting
from .checks import check_device, check_dtypes, check_not_recorded
from .expand import expand_reference, lora_gradients, run_expand, run_expand_moments
from .moments import check_totals

_SWITCH = "UCAN_FAST_FUSED_LINEAR"


def fused_linear_wanted(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a layer with this input and base weight is to go through :func:`fused_linear`.

    Raises:
        UcanError: ``UCAN_FAST_FUSED_LINEAR`` is none of 0, 1 and auto.
    """
    switch = fused_linear_switch()
    if switch == "0" or x.dtype != weight.dtype:
        return False
    if switch == "auto" and not tuning.fused_linear_wins(x.device, x.dtype, *weight.shape):
        return False
    return _has_kernel(x.device, x.dtype)


def fused_linear_switch() -> str:
    """``UCAN_FAST_FUSED_LINEAR``: ``"0"`` never, ``"1"`` wherever the kernel runs, ``"auto"``.

    Raises:
        UcanError: it is none of these.
    """
    switch = _switch()
    if switch not in ("0", "1", "auto"):
        raise UcanError(f"{_SWITCH}={switch!r} is unknown; use 0, 1 or auto.")
    return switch


# torch.compile asks once, while it traces.
@torch.compiler.assume_constant_result
def _switch() -> str:
    return setting(_SWITCH)


@torch.compiler.assume_constant_result
def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return choose("fused_linear", device, dtype) == "triton"


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    only_group: int | None = None,
    delta_moments: torch.Tensor | None = None,
) -> torch.Tensor:
    """The base layer and the second half of a LoRA layer, in one product.

    Accumulated in fp32 and rounded once to x's dtype. Where the kernel cannot take the arguments
    (strides or sizes that TMA refuses, no Triton), the product is torch's and the rest expand's,
    also under ``triton`` by name (see :mod:`ucan_fast.ops.backend`).

    Args:
        x: ``[..., K]``.
        weight: the base layer's W, ``[N, K]``, in x's dtype.
        z: ``[..., r]``, from :func:`shrink`.
        b: the adapter's B, ``[N, r]``.
        scaling: s.
        bias: the base layer's bias ``[N]``.
        lora_bias: the adapter's own bias ``[N]``.
        groups, only_group, delta_moments: as for :func:`expand`.

    Returns:
        y, ``[..., N]`` in x's dtype.

    Differentiable while no moments are asked for, in both directions and under ``torch.func``;
    with moments, call it under ``torch.no_grad()``.

    Raises:
        UcanError: shapes, dtypes or devices that do not fit together, or moments while a derivative
            is taken.
    """
    if delta_moments is None:
        tensors = (x, weight, z, b, bias, lora_bias)
        if not torch.compiler.is_compiling() and is_transformed(*tensors):
            _check(*tensors)
            # A backend that cannot run it is an error here too.
            choose("fused_linear", x.device, x.dtype, z.dtype, b.dtype)
            return expand_reference(_base(x, weight, bias), z, b, scaling, lora_bias)
        return torch.ops.ucan_fast.fused_linear(x, weight, z, b, scaling, bias, lora_bias)
    if groups is None:
        raise UcanError("fused_linear: moments need groups, one integer per token.")
    recorded = {"x": x, "W": weight, "z": z, "B": b, "bias": bias, "lora_bias": lora_bias}
    check_not_recorded("fused_linear", **recorded)
    return torch.ops.ucan_fast.fused_linear.moments(
        x, weight, z, b, scaling, bias, lora_bias, groups, only_group, delta_moments
    )


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
) -> None:
    if (
        weight.dim() != 2
        or x.dim() < 1
        or z.dim() < 1
        or x.shape[-1] != weight.shape[1]
        or tuple(z.shape[:-1]) != tuple(x.shape[:-1])
        or tuple(b.shape) != (weight.shape[0], z.shape[-1])
        or any(v is not None and tuple(v.shape) != (weight.shape[0],) for v in (bias, lora_bias))
    ):
        raise UcanError(
            f"fused_linear: x {tuple(x.shape)}, W {tuple(weight.shape)}, z {tuple(z.shape)}, "
            f"B {tuple(b.shape)} must be [..., K], [N, K], [..., r], [N, r], and biases [N]."
        )
    lora = None if lora_bias is None else lora_bias.dtype
    check_dtypes("fused_linear", x=x.dtype, z=z.dtype, B=b.dtype, lora_bias=lora)
    for name, other in (("W", weight), ("the bias", bias)):
        if other is not None and other.dtype != x.dtype:
            raise UcanError(
                f"fused_linear: x is {x.dtype}, {name} {other.dtype}; they must share one dtype."
            )
    check_device("fused_linear", x=x, W=weight, z=z, B=b, bias=bias, lora_bias=lora_bias)


def _check_moments(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    groups: torch.Tensor,
    only_group: int | None,
    delta_moments: torch.Tensor,
) -> None:
    _check(x, weight, z, b, bias, lora_bias)
    tokens = math.prod(x.shape[:-1])
    check_totals(tokens, weight.shape[0], x.device, groups, delta_moments, only_group)


def _kernel(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
) -> Callable[..., torch.Tensor] | None:
    """The launcher, or None where the kernel cannot take these arguments."""
    if choose("fused_linear", x.device, x.dtype, z.dtype, b.dtype) != "triton":
        return None
    from ..kernels.fused_linear import fused_linear as launch
    from ..kernels.fused_linear import obstacle

    return launch if obstacle(x, weight, z, b, bias, lora_bias) is None else None


def _base(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, bias)


def _fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
) -> torch.Tensor:
    _check(x, weight, z, b, bias, lora_bias)
    launch = _kernel(x, weight, z, b, bias, lora_bias)
    if launch is None:
        return run_expand(_base(x, weight, bias), z, b, scaling, lora_bias)
    return launch(x, weight, z, b, scaling, bias, lora_bias)


def _fused_linear_moments(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    groups: torch.Tensor,
    only_group: int | None,
    delta_moments: torch.Tensor,
) -> torch.Tensor:
    recorded = {"x": x, "W": weight, "z": z, "B": b, "bias": bias, "lora_bias": lora_bias}
    check_not_recorded("fused_linear", **recorded)
    _check_moments(x, weight, z, b, bias, lora_bias, groups, only_group, delta_moments)
    launch = _kernel(x, weight, z, b, bias, lora_bias)
    sums = (groups, only_group, delta_moments)
    if launch is None:
        return run_expand_moments(_base(x, weight, bias), z, b, scaling, lora_bias, *sums)
    return launch(x, weight, z, b, scaling, bias, lora_bias, *sums)


def _save(ctx, inputs, output) -> None:
    x, weight, z, b, ctx.scaling, bias, lora_bias = inputs
    ctx.dtypes = [None if v is None else v.dtype for v in (bias, lora_bias)]
    ctx.save_for_backward(x, weight, z, b)


def _backward(ctx, grad_y: torch.Tensor):
    x, weight, z, b = ctx.saved_tensors
    need = ctx.needs_input_grad
    grad_x = grad_weight = grad_bias = None
    with torch.autocast(x.device.type, enabled=False):
        rows = grad_y.reshape(-1, grad_y.shape[-1])
        if need[0]:
            grad_x = grad_y @ weight
        if need[1]:
            grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        if need[5]:
            grad_bias = rows.sum(0).to(ctx.dtypes[0])
    lora = [need[i] for i in (2, 3, 6)]
    grad_z, grad_b, grad_lora = lora_gradients(grad_y, z, b, ctx.scaling, ctx.dtypes[1], lora)
    return grad_x, grad_weight, grad_z, grad_b, None, grad_bias, grad_lora


LIBRARY.define(
    "fused_linear(Tensor x, Tensor weight, Tensor z, Tensor b, float scaling, Tensor? bias, "
    "Tensor? lora_bias) -> Tensor"
)
LIBRARY.define(
    "fused_linear.moments(Tensor x, Tensor weight, Tensor z, Tensor b, float scaling, "
    "Tensor? bias, Tensor? lora_bias, Tensor groups, int? only_group, Tensor(a!) delta_moments) "
    "-> Tensor"
)
LIBRARY.impl("fused_linear", _fused_linear, "CompositeExplicitAutograd")
LIBRARY.impl("fused_linear.moments", _fused_linear_moments, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "ucan_fast::fused_linear", _backward, setup_context=_save, lib=LIBRARY
)


@torch.library.register_fake("ucan_fast::fused_linear", lib=LIBRARY)
def _(x, weight, z, b, scaling, bias, lora_bias) -> torch.Tensor:
    _check(x, weight, z, b, bias, lora_bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("ucan_fast::fused_linear.moments", lib=LIBRARY)
def _(x, weight, z, b, scaling, *rest) -> torch.Tensor:
    _check_moments(x, weight, z, b, *rest)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
