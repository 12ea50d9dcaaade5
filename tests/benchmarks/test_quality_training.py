"""Gradients, order and one step, against Adam written out."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from torch import nn

from benchmarks.quality.case import lora_weights
from benchmarks.quality.training import (
    Reference,
    adamw,
    cycled,
    descend,
    differentiable,
    gradients,
)

from .quality_case import forget_batches, same, snapshot, tiny_model


def two_weights() -> dict[str, nn.Parameter]:
    first, second = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([[3.0]])
    return {"a": nn.Parameter(first.double()), "b": nn.Parameter(second.double())}


def loss_of(weights: dict[str, nn.Parameter], scale: float) -> torch.Tensor:
    return scale * (weights["a"].square().sum() + weights["b"].pow(3).sum())


def test_steps_are_those_of_adam_with_gradients_clipped_to_norm_1():
    weights, lr = two_weights(), 0.1
    optimizer = adamw(weights, lr)
    numbers = [1.0, -2.0, 0.0, 3.0]
    mean, square = [0.0] * 4, [0.0] * 4
    # The last gradient is too short to be clipped.
    for step, scale in enumerate((1.0, 5.0, 0.01), start=1):
        gradient = [scale * 2 * x for x in numbers[:3]] + [scale * 3 * numbers[3] ** 2]
        norm = math.sqrt(sum(g * g for g in gradient))
        assert (norm > 1) == (step < 3)
        for i in range(4):
            g = gradient[i] / max(norm, 1.0)
            mean[i] = 0.9 * mean[i] + 0.1 * g
            square[i] = 0.999 * square[i] + 0.001 * g * g
            m, v = mean[i] / (1 - 0.9**step), square[i] / (1 - 0.999**step)
            numbers[i] -= lr * m / (math.sqrt(v) + 1e-8)
        assert descend(optimizer, weights, loss_of(weights, scale))
        found = [*weights["a"].tolist(), weights["b"].item()]
        # (torch clips to norm / (norm + 1e-6).)
        assert found == pytest.approx(numbers, rel=1e-5, abs=1e-12)
    assert all(weight.grad is None for weight in weights.values())


def test_a_masked_weight_stays_bit_by_bit_and_does_not_count_in_the_norm():
    weights, alone = two_weights(), two_weights()
    kept = {"a": torch.tensor([1.0, 0.0, 1.0]), "b": torch.zeros(1, 1)}
    optimizer, other = adamw(weights, 0.1), adamw({"a": alone["a"]}, 0.1)
    for _ in range(3):
        assert descend(optimizer, weights, loss_of(weights, 0.3), kept)
        first = alone["a"][0].square()
        assert descend(other, {"a": alone["a"]}, 0.3 * first)
    assert weights["a"][1] == -2.0
    assert weights["b"] == 3.0
    assert weights["a"][0] == alone["a"][0] != 1.0


@pytest.mark.parametrize("kind", ["nan", "inf", "loss alone", "gradient"])
def test_no_step_is_made_where_loss_or_gradient_is_not_finite(kind):
    weights = two_weights()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = adamw(weights, 0.1)
    bad = {
        "nan": lambda: loss_of(weights, math.nan),
        "inf": lambda: loss_of(weights, math.inf),
        "loss alone": lambda: loss_of(weights, 1.0) + math.inf,
        # The root's slope at 0 is infinite, its value is not.
        "gradient": lambda: loss_of(weights, 1.0) + weights["a"][2].sqrt(),
    }[kind]
    assert descend(optimizer, weights, bad()) is False
    assert same(before, {name: weight.detach() for name, weight in weights.items()})
    assert all(weight.grad is None for weight in weights.values())


def test_every_round_has_each_item_once_in_an_order_that_the_seed_decides():
    items = list(range(7))
    rounds = [list(islice(cycled(items, 1), 21))[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(order) == items for order in rounds)
    assert len({tuple(order) for order in rounds}) == 3
    assert list(islice(cycled(items, 1), 21)) == [*rounds[0], *rounds[1], *rounds[2]]
    assert list(islice(cycled(items, 2), 7)) != rounds[0]


def test_order_leaves_the_global_random_numbers_alone():
    state = torch.get_rng_state()
    list(islice(cycled([1, 2, 3], 5), 10))
    assert torch.equal(state, torch.get_rng_state())


def test_only_these_weights_are_differentiated_and_flags_come_back():
    model = tiny_model()
    weights = lora_weights(model)
    names = list(weights)
    weights[names[0]].requires_grad_(False)
    other = next(p for name, p in model.named_parameters() if name not in weights)
    other.requires_grad_(True)
    flags = [weight.requires_grad for weight in weights.values()]
    ids = forget_batches()[0]["input_ids"]
    with torch.no_grad(), differentiable(weights):
        found = gradients(model(input_ids=ids).logits.square().mean(), weights)
    assert list(found) == names
    assert all(bool(gradient.any()) for gradient in found.values())
    assert flags == [weight.requires_grad for weight in weights.values()]
    assert not flags[0]
    assert all(p.grad is None for p in model.parameters())


def test_flags_come_back_after_an_error():
    weights = two_weights()
    weights["a"].requires_grad_(False)

    def broken() -> None:
        with differentiable(weights):
            assert torch.is_grad_enabled()
            assert weights["a"].requires_grad
            raise RuntimeError("broken")

    with torch.no_grad():
        with pytest.raises(RuntimeError, match="broken"):
            broken()
        assert not torch.is_grad_enabled()
    assert not weights["a"].requires_grad
    assert weights["b"].requires_grad


def test_the_reference_stays_what_the_model_was_and_takes_nothing_from_it():
    model = tiny_model()
    ids = forget_batches()[0]["input_ids"]
    before = model(input_ids=ids).logits.detach()
    reference = Reference(model, lora_weights(model))
    with torch.no_grad():
        for weight in lora_weights(model).values():
            weight.mul_(1.5)
    edited = snapshot(model)
    found = reference(input_ids=ids).logits
    assert torch.equal(found, before)
    assert not found.requires_grad
    assert same(edited, snapshot(model))
    assert not torch.equal(model(input_ids=ids).logits, before)
