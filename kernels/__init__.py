"""Triton kernels, installed as ``ucan_fast.kernels``.

This release ships no Triton kernel: every operator runs on its PyTorch reference, and
:func:`availability` says so. The package exists so that the place, the import path and the
backend report are settled. Importing it imports neither Triton nor torch.

In a checkout this folder is also visible as a top-level ``kernels``, the name of a package on PyPI
that transformers looks for. It must therefore stay importable under that name without side effects
and must never define ``__version__``, by which transformers would take it for that package.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

__all__ = ["SHIPPED", "availability"]

#: Names of the Triton kernels in this release.
SHIPPED: tuple[str, ...] = ()


def availability() -> dict[str, object]:
    """What Triton could do here, for ``ucan-fast doctor``. Never raises, imports Triton nowhere.

    Returns a dict with

    - ``triton`` (``str | None``): installed version, None where Triton cannot be imported;
    - ``interpreter`` (``bool``): whether ``TRITON_INTERPRET`` asks for the CPU interpreter;
    - ``cuda_device`` (``str | None``): name of the current CUDA device, None where there is none;
    - ``kernels`` (``tuple[str, ...]``): the kernels this release ships (:data:`SHIPPED`);
    - ``usable`` (``bool``): whether a shipped kernel can run here;
    - ``reason`` (``str``): one sentence that says why not, or how.
    """
    version = _triton_version()
    interpreter = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")
    device = _cuda_device()
    if not SHIPPED:
        usable, reason = False, "Triton kernels are not part of this release yet"
    elif version is None:
        usable, reason = False, "Triton is not installed (pip install 'ucan-fast[triton]')"
    elif interpreter:
        usable, reason = True, "runs in Triton's interpreter (TRITON_INTERPRET is set), slowly"
    elif device is None:
        usable, reason = False, "there is no CUDA device (TRITON_INTERPRET=1 runs on the CPU)"
    else:
        usable, reason = True, f"runs on {device}"
    return {
        "triton": version,
        "interpreter": interpreter,
        "cuda_device": device,
        "kernels": SHIPPED,
        "usable": usable,
        "reason": reason,
    }


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


def _cuda_device() -> str | None:
    try:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    except Exception:  # a broken driver must not break the report about it
        return None
    return None
