"""expand: ``y = base_out + s z Bᵀ (+ s bias)``, and in the same pass the output-site moments."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import UcanError
from .backend import LIBRARY, cast, choose, runs_directly, without_autocast
from .checks import check_device, check_dtypes
from .moments import add_moments_, check_moments


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
) -> torch.Tensor:
    """The second half of a LoRA layer, added to what the base layer returned.

    The product is taken in z's dtype, the sum in fp32 (fp64 for fp64), rounded once to
    ``base_out``'s dtype.

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

    Returns:
        y, ``[..., N]`` in ``base_out``'s dtype, a new contiguous tensor.

    Differentiable while no moments are asked for.

    Raises:
        UcanError: shapes, dtypes or devices that do not fit together.
    """
    if delta_moments is None:
        if not torch.compiler.is_compiling():
            backend = _backend(base_out, z, b)
            if runs_directly(backend, base_out, z, b, bias):
                _check(base_out, z, b, bias)
                return _run(backend, base_out, z, b, scaling, bias)
        return torch.ops.ucan_fast.expand(base_out, z, b, scaling, bias)
    if groups is None:
        raise UcanError("expand: moments need groups, one integer per token.")
    tensors = (base_out, z, b, bias, groups, delta_moments)
    direct = not torch.compiler.is_compiling() and runs_directly("triton", *tensors)
    run = _expand_moments if direct else torch.ops.ucan_fast.expand.moments
    return run(base_out, z, b, scaling, bias, groups, only_group, delta_moments)


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
    bias_dtype = None if bias is None else bias.dtype
    check_dtypes("expand", base_out=base_out.dtype, z=z.dtype, B=b.dtype, bias=bias_dtype)
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
    return _run(_backend(base_out, z, b), base_out, z, b, scaling, bias)


def _run(
    backend: str,
    base_out: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    if backend == "triton":
        from ..kernels.expand import expand as launch

        return launch(base_out, z, b, scaling, bias)
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
) -> torch.Tensor:
    """y and its moments, unchecked, on the backend chosen for this call."""
    backend = _backend(base_out, z, b)
    if backend == "triton":
        from ..kernels.expand import expand as launch

        return launch(base_out, z, b, scaling, bias, groups, only_group, delta_moments)
    # Narrow products are rounded before they are added, as without moments.
    products = base_out.numel() and z.numel()
    if backend == "native" and products and z.dtype == delta_dtype(z, b):
        return _expand_native(base_out, z, b, scaling, bias, groups, only_group, delta_moments)
    y = expand_reference(base_out, z, b, scaling, bias)
    add_moments_(delta_reference(z, b, scaling), groups, only_group, delta_moments)
    return y


def _expand_native(
    base_out: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    groups: torch.Tensor,
    only_group: int | None,
    delta_moments: torch.Tensor,
) -> torch.Tensor:
    # One product in fp32 serves y and the moments; C++ does the rest in one pass over it.
    n, totals = b.shape[0], delta_moments.contiguous()
    delta = delta_reference(z.reshape(-1, z.shape[-1]), b, 1.0)
    torch.ops.ucan_fast._add_delta_native_(
        base_out.reshape(-1, n),
        delta,
        scaling,
        None if bias is None else bias.to(delta.dtype),
        groups,
        -1 if only_group is None else only_group,
        totals,
    )
    if totals is not delta_moments:
        delta_moments.copy_(totals)
    return delta.view(base_out.shape).to(base_out.dtype)


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
) -> torch.Tensor:
    _check(base_out, z, b, bias)
    check_moments(base_out, groups, delta_moments, only_group)
    return run_expand_moments(base_out, z, b, scaling, bias, groups, only_group, delta_moments)


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
