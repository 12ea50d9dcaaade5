"""Triton kernels, installed as ``ucan_fast.kernels``; one file an operator, launchers on tensors.

============== ===============================================================================
file           kernels
============== ===============================================================================
common         what all share: rounding, column sums, folding of partial sums
tuning         block sizes per kernel, size class and GPU
moments        Σ|h| and Σh² per column and token group
shrink         z = x Aᵀ with the moments of x and z, in two or three launches
shrink_columns its first launch where x is long: one read for z and the moments of x
shrink_finish  its last: z from its parts, and the totals of x
expand         y = base + s z Bᵀ with the moments of δ, in one read and one write of y
fused_linear   the whole LoRA linear in one persistent matrix product (opt-in)
scores         risk, utility, score and factors of all layers
attenuate      rows or columns of many matrices times their factors
aot            compiles all of them for sm_80, sm_90 and sm_100, without a GPU
============== ===============================================================================

Importing this package imports neither Triton nor torch; the files above do.

In a checkout this folder is also visible as a top-level ``kernels``, the name of a package on PyPI
that transformers looks for. It must therefore stay importable under that name without side effects
and must never define ``__version__``, by which transformers would take it for that package.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys

__all__ = ["SHIPPED", "TMA_CAPABILITY", "availability", "obstacle"]

#: The kernels' files.
SHIPPED: tuple[str, ...] = ("moments", "shrink", "expand", "fused_linear", "scores", "attenuate")

#: The compute capability from which on a GPU has TMA, which ``fused_linear`` is built on: Hopper.
TMA_CAPABILITY = (9, 0)

_OLDEST = (3, 6)


def obstacle(device_type: str) -> str | None:
    """Why the kernels cannot run on tensors of this kind of device, or None.

    Args:
        device_type: ``torch.device.type``: ``"cpu"`` needs Triton's interpreter.
    """
    version = _triton_version()
    if version is None:
        return "Triton is not installed (pip install 'ucan-fast[triton]')"
    number = _number(version)
    if number and number < _OLDEST:
        return f"Triton {version} is too old, it must be {_OLDEST[0]}.{_OLDEST[1]} or later"
    if device_type == "cpu" and not _interpreted():
        return "on the CPU only with TRITON_INTERPRET=1, set before the start"
    if device_type == "cpu" and number and number < (3, 7) and _numpy() >= (2, 4):
        return f"the interpreter of Triton {version} needs NumPy older than 2.4"
    if device_type not in ("cpu", "cuda"):
        return f"the kernels have not been written for {device_type} tensors"
    return None


def availability() -> dict[str, object]:
    """What Triton can do here, for ``ucan-fast doctor``. Never raises, imports Triton nowhere.

    Returns a dict with

    - ``triton`` (``str | None``): installed version, None where Triton cannot be imported;
    - ``interpreter`` (``bool``): whether ``TRITON_INTERPRET`` asks for the CPU interpreter;
    - ``cuda_device`` (``str | None``): name of the current CUDA device, None where there is none;
    - ``kernels`` (``tuple[str, ...]``): the kernels this release ships (:data:`SHIPPED`);
    - ``usable`` (``bool``): whether a shipped kernel can run here;
    - ``reason`` (``str``): one sentence that says why not, or how.
    """
    device = _cuda_device()
    reason = obstacle("cuda" if device else "cpu")
    usable = reason is None
    if usable and _interpreted():
        reason = "runs in Triton's interpreter (TRITON_INTERPRET is set), slowly"
    elif usable:
        reason = f"runs on {device}"
    elif not device and _triton_version():
        reason = f"there is no CUDA device, and {reason}"
    return {
        "triton": _triton_version(),
        "interpreter": _interpreted(),
        "cuda_device": device,
        "kernels": SHIPPED,
        "usable": usable,
        "reason": reason,
    }


def _interpreted() -> bool:
    common = sys.modules.get(f"{__name__}.common")
    if common is not None:  # decided when the kernels were decorated
        return common.INTERPRET
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _triton_version() -> str | None:
    try:
        if importlib.util.find_spec("triton") is None:
            return None
    except (ImportError, ValueError):  # blocked on purpose, or half installed
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _numpy() -> tuple[int, ...]:
    try:
        return _number(importlib.metadata.version("numpy"))
    except importlib.metadata.PackageNotFoundError:
        return ()


def _number(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:2]
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()


def _cuda_device() -> str | None:
    try:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    except Exception:  # a broken driver must not break the report about it
        return None
    return None
