"""Triton's interpreter, without preparing ``triton.language`` anew for every device function.

For a launch the interpreter puts its own functions in the place of ``tl.load``, ``tl.sum`` and all
others, and does so again at each call of a ``@triton.jit`` function inside the kernel: a third of
the time of our kernels' tests, for what is in place already. Here it is done once per launch and
module.
"""

from __future__ import annotations

import threading
from types import FunctionType
from typing import Any


def install() -> None:
    """Change the interpreter of this process; nothing where Triton's has another shape."""
    from triton.runtime import interpreter

    prepare = getattr(interpreter, "_patch_lang", None)
    scopes = getattr(interpreter, "_LangPatchScope", None)
    if prepare is None or scopes is None or getattr(prepare, "once_per_launch", False):
        return
    launch = threading.local()

    class Launch(scopes):
        """What a launch has put in place; taken back at its end, whatever happens in it."""

        def restore(self) -> None:
            launch.prepared = None
            super().restore()

    def once(function: FunctionType) -> Any:
        namespace = id(function.__globals__)
        prepared = getattr(launch, "prepared", None)
        if prepared is None:
            scope = prepare(function)
            scope.__class__ = Launch
            launch.prepared = {namespace}
            return scope
        if namespace not in prepared:
            # As the interpreter has it: nothing takes this back.
            prepare(function)
            prepared.add(namespace)
        return None

    once.once_per_launch = True
    interpreter._patch_lang = once
