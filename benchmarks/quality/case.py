"""One deletion request to one trained recommender: what a method gets, and how it is judged."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel

Batch = Mapping[str, torch.Tensor]
#: The sides that recommendations are ranked on. All three are training interactions.
SIDES = ("forget", "calibration", "retain")


@dataclass
class Case:
    """A request, the adapter that it concerns, and the data that a method may use.

    Attributes:
        name: data set, seed and scenario, as files are called.
        model: in eval mode, with the adapter before the request.
        forget: sequences with something to delete: ``token_groups`` 0 is to be forgotten, 1 is
            retained (context of the same sequence), -1 is neither.
        retain: all sequences that the adapter was trained on; only positions of ``token_groups`` 1
            are retained data, those of 0 are the forget set again.
        calibration: a part of the retained data: strengths and settings are chosen on it.
        holdout: data of the same kind that was never trained on, ``token_groups`` 0.
        ranks: ranks (1 is best) of the true items, by side. ``calibration`` and ``retain`` are
            of different users (or prompts): a method is tuned on the first and judged on the
            second.
        measure: the ranking metrics of both protocols, by name.
        retrain: trains an adapter anew without the forget set; returns its matrices by the names
            of :func:`lora_weights`, and the seconds.
        seed: of everything that is drawn.
        coarse: whether every other point of a curve, and two settings, are enough.
        metric: of ``ranking_metrics``, what drops are drops of.
        prepared: sums that are there before the request comes in (a bank), by name.
        seconds: what it took to make those, by the same names.
        peaks: growth of resident memory in passes that several methods share, by name, in bytes;
            None where it cannot be known.
    """

    name: str
    model: PeftModel
    forget: Sequence[Batch]
    retain: Sequence[Batch]
    calibration: Sequence[Batch]
    holdout: Sequence[Batch]
    ranks: Callable[[], dict[str, torch.Tensor]]
    measure: Callable[[], dict[str, float]]
    retrain: Callable[[], tuple[dict[str, torch.Tensor], float]]
    seed: int
    coarse: bool = False
    metric: str = "recall@10"
    prepared: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """The model as edited by a method, as long as the generator that gave this is not resumed.

    Attributes:
        value: what the method varies: strength, number of steps, share.
        seconds: what a user waits for from the request to this state, sums of a bank aside.
        measured: what else the method knows of this state, by name.
    """

    value: float
    seconds: float
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way to unlearn.

    Attributes:
        name: as tables call it.
        states: ``states(case, **setting)`` yields the method's states from the weakest edit to
            the strongest. While it is suspended ``case.model`` is that state; when it is closed or
            ends, the model is the original again, bit by bit. It may return why it ended.
        settings: the grid of settings, of which the best on ``calibration`` is taken; of a coarse
            case the last two.
        needs: entries of ``case.prepared`` that it uses.
        backward: passes back through the model (gradients), which attenuation does without.
        single: there is one state and no strength to choose.
    """

    name: str
    states: Callable[..., Iterator[State]]
    settings: tuple[Mapping[str, Any], ...] = ({},)
    needs: tuple[str, ...] = ()
    backward: bool = False
    single: bool = False


class Clock:
    """Seconds in ``with clock:`` blocks, summed; what lies between them is not counted."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __enter__(self) -> Clock:
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += self._now() - self._start

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


def lora_weights(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The matrices A and B of the active adapter, by name."""
    adapter = f".{model.active_adapter}."
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if adapter in name and (".lora_A." in name or ".lora_B." in name)
    }


@contextlib.contextmanager
def as_before(model: PeftModel) -> Iterator[dict[str, torch.nn.Parameter]]:
    """The adapter's matrices, which are bit for bit the same afterwards; so are their modes."""
    weights = lora_weights(model)
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    wanted = {name: weight.requires_grad for name, weight in weights.items()}
    training = {name: module.training for name, module in model.named_modules()}
    try:
        yield weights
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])
                weight.requires_grad_(wanted[name])
                weight.grad = None
        for name, module in model.named_modules():
            module.training = training[name]
