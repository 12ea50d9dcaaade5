"""Marks on a model in memory: which adapter has a plan applied to it.

A mark is a plain attribute of the LoRA layers, so it survives deepcopy and pickle; it is not
part of a saved adapter. It counts only while the weights are those that the plan left, so an
adapter that was replaced or trained on since is a new origin.
"""

from __future__ import annotations

from torch import nn

from .adapter import tuner_layers
from .errors import UcanError

_MARK = "_ucan_applied"


def mark_applied(model: nn.Module, adapter: str, applied: str) -> None:
    """Remember the fingerprint of the adapter as a plan left it."""
    for _, module in tuner_layers(model):
        module.__dict__[_MARK] = {**module.__dict__.get(_MARK, {}), adapter: applied}


def clear_mark(model: nn.Module, adapter: str) -> None:
    """The adapter is its origin again."""
    for _, module in tuner_layers(model):
        marks = {k: v for k, v in module.__dict__.pop(_MARK, {}).items() if k != adapter}
        if marks:
            module.__dict__[_MARK] = marks


def has_plan(model: nn.Module, adapter: str, fingerprint: str) -> bool:
    """Whether a plan is applied to the adapter whose fingerprint is now ``fingerprint``."""
    return any(
        m.__dict__.get(_MARK, {}).get(adapter) == fingerprint for _, m in tuner_layers(model)
    )


def check_is_origin(model: nn.Module, adapter: str, fingerprint: str) -> None:
    """Refuse an adapter with a plan: its statistics would silently describe another origin.

    Raises:
        UcanError: a plan is applied to it.
    """
    if has_plan(model, adapter, fingerprint):
        raise UcanError(
            f"a plan is applied to adapter {adapter!r}. Statistics belong to the origin, the "
            "adapter before any plan. Call plan.undo(model) first; for a "
            "further deletion request pass previous= to unlearn."
        )
