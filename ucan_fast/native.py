"""Loads the optional native extension, or says why not.

- ``_C``: the schemas of ``ucan_fast::_attenuate_native_``, ``_moments_native_``,
  ``_shrink_native_`` and ``_expand_native_``, and their CPU code;
- ``_C_cuda``: the CUDA kernel of ``_attenuate_native_``, loaded only where torch is a CUDA build.

Both go through PyTorch's stable ABI, so one build serves torch 2.10 and later. Importing this
module loads nothing and never fails.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import torch

__all__ = ["load", "status"]

LIBRARIES = ("_C", "_C_cuda")
_OPERATOR = "ucan_fast::_attenuate_native_"
_OPERATORS = (
    _OPERATOR,
    *(f"ucan_fast::_{name}_native_" for name in ("moments", "shrink", "expand")),
)
_AVAILABLE = "available"
_REBUILD = "rebuild it with: pip install --no-build-isolation --no-deps --force-reinstall ."

_folder = Path(__file__).resolve().parent
_status: dict[str, str] = {}
_lock = threading.Lock()


def load() -> bool:
    """Load what there is, once; later calls return at once. Never raises.

    ``UCAN_FAST_SKIP_EXTENSION=1`` in the environment of the first call leaves everything out.

    Returns:
        Whether the CPU library is available; :func:`status` has both and the reasons.
    """
    if not _status:
        with _lock:
            if not _status:
                _status.update(_load())
    return _status["_C"] == _AVAILABLE


def status() -> dict[str, str]:
    """``"available"``, or one readable reason why not, for ``_C`` and ``_C_cuda``. Loads them."""
    load()
    return dict(_status)


def _load() -> dict[str, str]:
    if os.environ.get("UCAN_FAST_SKIP_EXTENSION", "") not in ("", "0"):
        return dict.fromkeys(LIBRARIES, "UCAN_FAST_SKIP_EXTENSION is set")
    result = {"_C": _load_library("_C")}
    if result["_C"] != _AVAILABLE:
        result["_C_cuda"] = f"it needs _C, which is missing: {result['_C']}"
    elif torch.version.cuda is None:
        result["_C_cuda"] = f"torch {torch.__version__} is not a CUDA build"
    else:
        result["_C_cuda"] = _load_library("_C_cuda")
    return result


def _load_library(name: str) -> str:
    """Load one library and return its status."""
    try:
        key = "CUDA" if name == "_C_cuda" else "CPU"
        # A second copy of the library (another install on sys.path, say) would register the
        # operator twice, which ends the process.
        if torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, key):
            return _AVAILABLE
    except RuntimeError:
        pass  # the operator has no schema yet
    paths = sorted(_folder.glob(f"{name}.*so"))
    if not paths:
        return _why_missing(name)
    try:
        torch.ops.load_library(str(paths[0]))
        if name == "_C":
            for operator in _OPERATORS:
                torch.library.register_fake(operator)(_fake)
    except Exception as error:  # whatever it is, the reference still works
        # torch wraps what the dynamic linker said.
        return diagnose(str(error.__cause__ or error), paths[0].name)
    return _AVAILABLE


def _fake(first, *rest) -> None:
    """All of them write in place and return nothing.

    A real meta tensor beside real ones comes here too, past the checks of the other devices.
    """
    values = [*first, *rest] if isinstance(first, list) else [first, *rest]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if len({tensor.device for tensor in tensors}) > 1:
        raise RuntimeError("all tensors must be on the same device")


def _why_missing(name: str) -> str:
    try:
        for line in (_folder / "_native_build.txt").read_text(encoding="utf-8").splitlines():
            library, _, reason = line.partition(": ")
            if library == name and reason.startswith("not built"):
                return reason
    except OSError:
        pass
    return (
        "not built: this copy of ucan_fast was not installed (a checkout on the path?); "
        "pip install --no-build-isolation -e . builds it"
    )


def diagnose(message: str, library: str) -> str:
    """One sentence for what the dynamic linker or torch said about ``library``."""
    message = " ".join(message.split())
    if found := re.search(r"undefined symbol: (\w+)", message):
        symbol = found[1]
        if symbol.startswith(("aoti_torch_", "torch_")):
            return (
                f"{library} needs {symbol}, which torch {torch.__version__} does not have; "
                f"it wants torch 2.10 or later"
            )
        return (
            f"{library} needs {symbol}, which nothing here provides: it was built with another "
            f"compiler or torch than torch {torch.__version__} fits; {_REBUILD}"
        )
    if found := re.search(r"version [`']?((?:GLIBCXX|GLIBC|CXXABI)_[\w.]+)", message):
        return f"{library} was built on a newer system ({found[1]} is missing here); {_REBUILD}"
    if found := re.search(r"(\S+): cannot open shared object file", message):
        return f"{library} needs {found[1]}, which was not found"
    if re.search(r"ELF|file too short|mach-o|incompatible architecture", message):
        return f"{library} is damaged or made for another kind of processor; {_REBUILD}"
    return f"{library} could not be loaded: {message[:300]}"
