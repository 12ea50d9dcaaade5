"""What a retain budget is measured on: the retain loss, and the part of D_r that it is taken on."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .batches import RETAIN, eval_mode, read_batches, reusable
from .errors import UcanError
from .evaluation import check_predicts_tokens, group_loss, scored

#: Nats per token: data that cost less are known by heart.
BY_HEART = 0.2
#: Retain tokens drawn for the strength search where no calibration data is given.
CALIBRATION_TOKENS = 8192

Batches = Iterable[Mapping[str, Any]]


@dataclass
class RetainLoss:
    """The retain loss of a model as it is, on calibration batches or by the caller's function.

    Attributes:
        measure: the loss now; None where there is nothing to measure it on.
        on_batches: whether it is a mean NLL per token, in nats; else whatever the function gives.
        before: on the origin, once :meth:`measure_before` has run.
        missing: why there is none.
    """

    measure: Callable[[], float] | None = None
    on_batches: bool = False
    before: float = float("nan")
    missing: str = "there is no calibration data (calibration= or retain=)"

    @classmethod
    def of_batches(cls, model: nn.Module, batches: list) -> RetainLoss:
        """On the retain tokens of these; none where there are no batches."""
        if not batches:
            return cls()
        return cls(lambda: group_loss(model, batches, "retain").mean, on_batches=True)

    @classmethod
    def of_function(cls, model: nn.Module, function: Callable[[nn.Module], float]) -> RetainLoss:
        """The caller's own, run without gradients and dropout."""

        def measure() -> float:
            with eval_mode(model), torch.no_grad():
                loss = function(model)
            try:
                return float(loss)
            except (TypeError, ValueError, RuntimeError) as error:
                raise UcanError(
                    f"calibration= returned {loss!r}; it must return one number, the retain loss."
                ) from error

        return cls(measure)

    def measure_before(self, searched: bool) -> None:
        """Measure the origin; a loss that is no number is none.

        Args:
            searched: whether a strength is to be searched by it.

        Raises:
            UcanError: there is such a one, and a strength to be searched by it.
        """
        if self.measure is None:
            return
        self.before = self.measure()
        if math.isfinite(self.before):
            return
        why = (
            "no retain token of the calibration data is scored (it needs a token before it, "
            "and a label other than -100)"
            if self.on_batches and math.isnan(self.before)
            else f"the retain loss is {self.before} before any attenuation; check the "
            "model, the calibration data or the calibration function"
        )
        if searched:
            raise UcanError(f"the retain budget cannot be measured: {why}.")
        self.measure, self.missing = None, why


def given(model: nn.Module, calibration: Batches | Callable[[nn.Module], float]) -> RetainLoss:
    """On what the caller gave.

    Raises:
        UcanError: batches, but none.
    """
    if callable(calibration) and not isinstance(calibration, Iterable):
        return RetainLoss.of_function(model, calibration)
    batches = list(reusable(calibration, "calibration"))
    if not batches:
        raise UcanError("the calibration set is empty: calibration= holds no batch.")
    return RetainLoss.of_batches(model, batches)


def sample(
    model: nn.Module, batches: Batches, seed: int, group: str = "retain"
) -> list[Mapping[str, Any]]:
    """Random batches with about CALIBRATION_TOKENS scored retain tokens, in one pass.

    Where no retain token is scored it is a batch with one that is not, if there is any.

    Raises:
        UcanError: a batch is malformed (it is named by its index).
    """
    generator = random.Random(seed)
    kept: list[tuple[float, int, int, Mapping[str, Any]]] = []
    total, unscored = 0, []
    for index, (batch, tokens, there) in enumerate(counted_batches(model, batches, group)):
        if not tokens:
            unscored = [batch] if there else unscored
            continue
        heapq.heappush(kept, (generator.random(), index, tokens, batch))
        total += tokens
        while total - kept[0][2] >= CALIBRATION_TOKENS:
            total -= heapq.heappop(kept)[2]
    return [batch for *_, batch in sorted(kept, key=lambda entry: entry[1])] or unscored


def split(model: nn.Module, batches: Batches, seed: int) -> tuple[list, list]:
    """Batches to measure the budget on, about CALIBRATION_TOKENS scored retain tokens but at most a
    third of the batches, and the others; those without a scored retain token are in neither.

    Raises:
        UcanError: there are batches, but at most one with scored retain tokens, or a batch is
            malformed (it is named by its index).
    """
    every = list(counted_batches(model, batches, "retain"))
    holding = [one for one in every if one[1]]
    if every and not holding:
        raise UcanError(
            "no retain token of the retain batches is scored (it needs a token before it, and a "
            "label other than -100): there is nothing to run, nor to measure the budget on."
        )
    if len(holding) == 1:
        raise UcanError(
            "there is only one batch of retain data, and several steps need some to run and some "
            "to measure the retain budget on: pass it in smaller batches, or calibration data."
        )
    order = list(range(len(holding)))
    random.Random(seed).shuffle(order)
    apart: set[int] = set()
    for index in order[: max(1, len(holding) // 3)] if holding else ():
        if sum(holding[i][1] for i in apart) >= CALIBRATION_TOKENS:
            break
        apart.add(index)
    return (
        [holding[i][0] for i in sorted(apart)],
        [holding[i][0] for i in order if i not in apart],
    )


def counted_batches(
    model: nn.Module, batches: Batches, group: str
) -> Iterator[tuple[Mapping[str, Any], int, bool]]:
    """Every batch, the number of its scored retain tokens, and whether it has any at all."""
    check_predicts_tokens(model)
    for checked in read_batches(model, batches, group):
        groups = checked.groups if checked.decoder_groups is None else checked.decoder_groups
        count = int(scored(checked, RETAIN)[0].sum())
        yield checked.source, count, bool((groups == RETAIN).any())
