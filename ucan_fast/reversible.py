"""ReversiblePlan: puts a plan on the adapter it was made for, and takes it off again bit by bit."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from .adapter import fingerprint, one_walk, resolve_adapter, unwrap
from .errors import UcanError
from .marks import clear_mark, has_plan, mark_applied
from .weights import ParameterEdit


class ReversiblePlan(ABC):
    """What plans have in common, whatever they write.

    Attributes:
        fingerprint: of the adapter the plan is for.
        applied_fingerprint: of the adapter as :meth:`apply` left it; None before.
        originals: the values it overwrote, by parameter; None before.
    """

    fingerprint: str
    applied_fingerprint: str | None
    originals: dict[str, torch.Tensor] | None

    @abstractmethod
    def _edit(self, model: nn.Module, adapter: str) -> ParameterEdit:
        """The parameters that the plan writes, checked to be those it was made for."""

    @abstractmethod
    def _write(self, edit: ParameterEdit) -> None:
        """Write them; on any error all are the originals again."""

    def apply(self, model: nn.Module, adapter: str | None = None) -> None:
        """Write the plan's weights in place: all of them, or none.

        The overwritten values are kept for :meth:`undo`.

        Raises:
            UcanError: the model's adapter is not the one the plan was made for, a plan is applied
                to it already, or the factors do not fit. Every weight is as it was.
        """
        model = unwrap(model)
        with one_walk(model):
            self._apply(model, resolve_adapter(model, adapter))

    def _apply(self, model: nn.Module, adapter: str) -> None:
        now = fingerprint(model, adapter)
        if has_plan(model, adapter, now):
            raise UcanError(
                f"a plan is applied to adapter {adapter!r} already; undo it first. Plans "
                "do not stack: each applies to the origin."
            )
        if now != self.fingerprint:
            raise UcanError(
                f"this plan was made for an adapter with fingerprint {self.fingerprint[:12]}, "
                f"adapter {adapter!r} has {now[:12]}. Make a plan from statistics of this adapter."
            )
        edit = self._edit(model, adapter)
        self._write(edit)
        try:
            self.applied_fingerprint = fingerprint(model, adapter)
            self.originals = {key: value.cpu() for key, value in edit.originals.items()}
            if self.applied_fingerprint != self.fingerprint:
                mark_applied(model, adapter, self.applied_fingerprint)
        except BaseException:
            edit.restore()
            raise

    def undo(self, model: nn.Module, adapter: str | None = None) -> None:
        """Put the overwritten values back, bit exact.

        Raises:
            UcanError: the plan holds no original values, or the weights are not those that
                :meth:`apply` left. Nothing is changed.
        """
        model = unwrap(model)
        with one_walk(model):
            self._undo(model, resolve_adapter(model, adapter))

    def _undo(self, model: nn.Module, adapter: str) -> None:
        if self.originals is None or self.applied_fingerprint is None:
            raise UcanError(
                "this plan holds no original values: it was never applied, or was saved without "
                "save(..., include_original=True). Load the original adapter instead."
            )
        now = fingerprint(model, adapter)
        if now != self.applied_fingerprint:
            state = "has no plan applied" if now == self.fingerprint else "was changed since"
            raise UcanError(
                f"cannot undo: adapter {adapter!r} {state} (fingerprint {now[:12]}, the plan left "
                f"{self.applied_fingerprint[:12]}). Nothing was changed."
            )
        edit = self._edit(model, adapter)
        if set(edit.originals) != set(self.originals):
            raise UcanError("cannot undo: the model shares parameters differently than before.")
        for key, value in self.originals.items():
            if value.shape != edit.originals[key].shape:
                raise UcanError(
                    f"cannot undo: the plan's original values of {key} have the shape "
                    f"{tuple(value.shape)}, the parameter {tuple(edit.originals[key].shape)}. "
                    "Nothing was changed."
                )
        current = edit.originals
        edit.originals = self.originals
        try:
            edit.restore()
            if fingerprint(model, adapter) != self.fingerprint:
                raise UcanError(
                    "cannot undo bit exactly: the adapter is loaded in another dtype than the plan "
                    "was applied in, or the plan's original values were altered. Nothing was "
                    "changed."
                )
        except BaseException:
            edit.originals = current
            edit.restore()
            raise
        clear_mark(model, adapter)
