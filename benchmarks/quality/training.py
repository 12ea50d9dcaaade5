"""What the baselines that train have in common: gradients of the adapter, order, one step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .case import Case

T = TypeVar("T")
Weights = Mapping[str, nn.Parameter]
#: Default of transformers' Trainer, which open-unlearning and NPO's authors train with.
MAX_GRADIENT_NORM = 1.0


@contextlib.contextmanager
def differentiable(weights: Weights) -> Iterator[None]:
    """Gradient mode, with these weights requiring gradients; both as before afterwards."""
    before = [(weight, weight.requires_grad) for weight in weights.values()]
    try:
        for weight, _ in before:
            weight.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for weight, wanted in before:
            weight.requires_grad_(wanted)


def gradients(loss: torch.Tensor, weights: Weights) -> dict[str, torch.Tensor]:
    """By name. No ``.grad`` is written, and nothing else gets a gradient."""
    found = torch.autograd.grad(loss, list(weights.values()))
    return dict(zip(weights, found, strict=True))


def cycled(items: Sequence[T], seed: int) -> Iterator[T]:
    """The items for ever, every round in a new order that only the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(items), generator=generator).tolist():
            yield items[index]


def thinned(case: Case, values: Sequence[T]) -> Sequence[T]:
    """The values to try; every other one, the last included, where the case is to be quick."""
    return values[::-2][::-1] if case.coarse else values


def adamw(weights: Weights, lr: float) -> torch.optim.AdamW:
    """AdamW without weight decay, as open-unlearning sets it (``configs/trainer/finetune.yaml``).

    The learning rate stays constant: states on the way must not depend on where training ends.
    """
    return torch.optim.AdamW(list(weights.values()), lr=lr, weight_decay=0.0)


def descend(
    optimizer: torch.optim.Optimizer,
    weights: Weights,
    loss: torch.Tensor,
    kept: Mapping[str, torch.Tensor] | None = None,
) -> bool:
    """One step down the loss, its gradient clipped to norm 1.

    Args:
        kept: by name, 0 where a weight must stay as it is and 1 elsewhere. A weight whose
            gradient was always 0 is not moved by AdamW without weight decay.

    Returns:
        False, and no step, where the loss or its gradient is not finite.
    """
    if not torch.isfinite(loss):
        return False
    for name, gradient in gradients(loss, weights).items():
        weights[name].grad = gradient if kept is None else gradient * kept[name].to(gradient.dtype)
    norm = nn.utils.clip_grad_norm_(weights.values(), MAX_GRADIENT_NORM)
    finite = bool(torch.isfinite(norm))
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return finite


class Reference:
    """The model as it is now, to be called like it after its adapter has moved on.

    Its weights are swapped in for the length of a forward pass; the base is not copied.
    """

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        self._model = model
        self._weights = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        return torch.func.functional_call(self._model, self._weights, (), inputs)
