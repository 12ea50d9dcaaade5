"""Many small tensors to the CPU in few transfers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

#: Page-locked memory is not given back to the system: not more than this is asked for.
_PINNED_BYTES = 1 << 26


def to_cpu(
    tensors: Sequence[torch.Tensor],
    dtype_of: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype,
) -> list[torch.Tensor]:
    """The values of these tensors on the CPU, detached, in order; any shapes and dtypes.

    One transfer for each device and dtype: a model has hundreds of small weights and sums, and each
    transfer waits for the device. What is on the CPU in the right dtype is returned as it is; the
    others are copies, those of one device and dtype in shared memory.

    Args:
        dtype_of: dtype -> that of the result.
    """
    found = [tensor.detach() for tensor in tensors]
    away: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(found):
        if not tensor.is_cpu:
            away.setdefault((tensor.device, tensor.dtype), []).append(index)
        elif tensor.dtype != dtype_of(tensor.dtype):
            found[index] = tensor.to(dtype_of(tensor.dtype))
    for (_, dtype), indices in away.items():
        flat = torch.cat([found[i].reshape(-1) for i in indices]).to(dtype_of(dtype))
        parts = _copied(flat).split([found[i].numel() for i in indices])
        for i, part in zip(indices, parts, strict=True):
            found[i] = part.view(found[i].shape)
    return found


def _copied(flat: torch.Tensor) -> torch.Tensor:
    if flat.device.type != "cuda" or flat.nbytes > _PINNED_BYTES:
        return flat.cpu()
    # To page-locked memory, which the device writes itself: to any other, an H100 sent 2 GB/s.
    return torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=True).copy_(flat)
