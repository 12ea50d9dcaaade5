"""The two things this package raises: refusals and warnings."""

from __future__ import annotations


class UcanError(ValueError):
    """A refusal: says what is wrong, where, and what to do. Nothing was changed."""


class UcanWarning(UserWarning):
    """The work was done, but the result is probably not what was wanted."""
