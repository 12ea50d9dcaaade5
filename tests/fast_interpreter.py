"""Triton's interpreter, without what it does again and again.

For a launch the interpreter puts its own functions in the place of ``tl.load``, ``tl.sum`` and all
others, and does so again at each call of a ``@triton.jit`` function inside the kernel: a third of
the time of our kernels' tests, for what is in place already. Here it is done once per launch and
module. And for each value it builds the table of Triton's dtypes and NumPy's anew, a tenth of the
time: here what was looked up once is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any


def install() -> None:
    """Change the interpreter of this process; nothing where there is none of this shape."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    executor = interpreter.GridExecutor
    prepare = getattr(interpreter, "_patch_lang", None)
    scopes = getattr(interpreter, "_LangPatchScope", None)
    if prepare is None or scopes is None or getattr(prepare, "once_per_launch", False):
        return
    # Of the launch that runs in this thread: the modules that it has prepared.
    running, launch = threading.local(), executor.__call__

    def launched(self: Any, *arguments: Any, **options: Any) -> Any:
        outer = getattr(running, "modules", None)
        running.modules = set()
        try:
            return launch(self, *arguments, **options)
        finally:
            running.modules = outer

    def once(function: FunctionType) -> Any:
        modules = getattr(running, "modules", None)
        if modules is None:  # a device function that is called outside of any launch
            return prepare(function)
        module = id(function.__globals__)
        if module in modules:
            return scopes()
        modules.add(module)
        return prepare(function)

    once.once_per_launch = True
    executor.__call__ = launched
    interpreter._patch_lang = once
    if numpy_dtype := getattr(interpreter, "_get_np_dtype", None):
        interpreter._get_np_dtype = _kept(numpy_dtype)


def _kept(numpy_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same function, asked once for each dtype of elements, whatever the block's shape."""
    known: dict[str, Any] = {}

    def kept(dtype: Any) -> Any:
        element = dtype.scalar
        if element.is_ptr():
            return numpy_dtype(element)
        if element.name not in known:
            known[element.name] = numpy_dtype(element)
        return known[element.name]

    kept.known, kept.real = known, numpy_dtype
    return kept
