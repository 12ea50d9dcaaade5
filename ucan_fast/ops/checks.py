"""What the operators' checks share.

Every operator checks its arguments itself, in its implementation and in its fake one, so that a
direct call of ``torch.ops.ucan_fast`` is refused like a call of ``ucan_fast.ops``: the kernels
trust shapes, and would read and write past the end of what does not fit.
"""

from __future__ import annotations

import torch

from ..errors import UcanError
from .backend import is_transformed

#: What activations, weights and products may be.
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: The dtypes of sums: those in which a product is not rounded before it is added.
WIDE = (torch.float32, torch.float64)


def check_dtypes(operator: str, **dtypes: torch.dtype | None) -> None:
    """Refuse what is no floating type of :data:`FLOATING`; None stands for nothing given.

    Raises:
        UcanError: one of them is another type; its name is in the message.
    """
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in FLOATING:
            raise UcanError(
                f"{operator}: {name} must be float32, bfloat16, float16 or float64, not {dtype}."
            )


def check_device(operator: str, **tensors: torch.Tensor | None) -> None:
    """Refuse tensors on different devices; None stands for nothing given.

    Raises:
        UcanError: two devices; all tensors are named with theirs.
    """
    given = [tensor.device for tensor in tensors.values() if tensor is not None]
    if given.count(given[0]) != len(given):
        devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise UcanError(f"{operator}: {listed}; they must share one device.")


def check_not_recorded(operator: str, **tensors: torch.Tensor | None) -> None:
    """Refuse to take moments where a derivative is taken; None stands for nothing given.

    The kernels that take moments have no derivative: what they return would be cut off silently,
    and the reference's would not.

    Raises:
        UcanError: a tensor requires a gradient while gradients are being recorded, or has a
            forward-mode tangent, or a ``torch.func`` transform is active.
    """
    if not torch.compiler.is_compiling() and is_transformed(*tensors.values()):
        raise UcanError(
            f"{operator}: a call that takes moments has no rule for torch.func transforms or "
            "forward-mode AD; call it outside of them, or without moments."
        )
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise UcanError(
                f"{operator}: {name} requires a gradient, and none flows through a call that takes "
                "moments; call it under torch.no_grad(), or without moments."
            )
