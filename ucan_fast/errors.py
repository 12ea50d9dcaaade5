"""The two things this package raises, refusals and warnings, and whom a warning is shown to."""

from __future__ import annotations

import sys
import warnings

#: What may stand between the caller's line and ours: decorators, context managers, modules' calls.
_BETWEEN = ("ucan_fast", "contextlib", "torch", "peft")


class UcanError(ValueError):
    """A refusal: says what is wrong, where, and what to do. Nothing was changed."""


class UcanWarning(UserWarning):
    """The work was done, but the result is probably not what was wanted."""


def warn(text: str) -> None:
    """A :class:`UcanWarning` at the line that called this package, from however deep inside."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UcanWarning, stacklevel=level)
