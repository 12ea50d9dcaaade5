"""Which implementation an operator runs on.

``UCAN_FAST_BACKEND`` is read at every call:

* ``auto`` (default): the fastest backend that works here for these arguments;
* ``reference``: plain PyTorch, the definition of every operator;
* ``native``: the C++ extension, for the operators that have it (so far ``attenuate_``); the others
  have only the reference.

``native`` is an error, never a silent fallback, where an operator has that backend and it cannot be
used; so is an unknown name. ``ucan-fast doctor`` shows what each operator runs on.
"""

from __future__ import annotations

import os

import torch

from .. import native
from ..errors import UcanError

#: The operators' schemas are registered here; backends of other files add to the same namespace.
LIBRARY = torch.library.Library("ucan_fast", "FRAGMENT")

BACKENDS = ("auto", "reference", "native")
_NATIVE_OPERATORS = ("attenuate_",)


def requested_backend() -> str:
    """The backend named by ``UCAN_FAST_BACKEND``.

    Raises:
        UcanError: it names no backend.
    """
    name = os.environ.get("UCAN_FAST_BACKEND", "auto") or "auto"
    if name not in BACKENDS:
        raise UcanError(f"UCAN_FAST_BACKEND={name!r} is unknown; use one of {', '.join(BACKENDS)}.")
    return name


def use_native(operator: str, device: torch.device) -> bool:
    """Whether a call of ``operator`` on ``device`` goes to the C++ extension.

    Raises:
        UcanError: ``native`` was asked for by name and cannot serve this call.
    """
    name = requested_backend()
    if name == "reference" or (name == "auto" and operator not in _NATIVE_OPERATORS):
        return False
    reason = _native_obstacle(operator, device)
    if reason and name == "native":
        raise UcanError(f"UCAN_FAST_BACKEND=native cannot run {operator}: {reason}.")
    return reason is None


def backends_in_use() -> dict[str, str]:
    """For ``doctor``: what each operator runs on for CPU tensors, and why not something faster."""
    forced = requested_backend() == "reference"
    use = {}
    for operator in ("shrink", "expand", "moments", "scores", "attenuate_"):
        reason = _native_obstacle(operator, torch.device("cpu"))
        if forced and reason is None:
            reason = "UCAN_FAST_BACKEND=reference"
        use[operator] = "native" if reason is None else f"reference ({reason})"
    return use


def _native_obstacle(operator: str, device: torch.device) -> str | None:
    if operator not in _NATIVE_OPERATORS:
        return "this operator has no native backend yet"
    native.load()
    library = "_C_cuda" if device.type == "cuda" else "_C"
    status = native.status().get(library, "not built")
    if device.type not in ("cpu", "cuda"):
        return f"no native backend for {device.type} tensors"
    return None if status == "available" else status
