"""A case of the quality comparison on a tiny model, and its losses by plain loops."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from helpers_models import llama, lora, token_batch
from torch import nn

from benchmarks.quality.case import Case, lora_weights


def mixed_batch(lengths: list[int], *, seed: int, side: str = "right") -> dict[str, torch.Tensor]:
    """All three groups and some labels of -100, the same sequences for either padding side."""
    batch = token_batch(lengths, seed=seed, groups="mixed")
    generator = torch.Generator().manual_seed(900 + seed)
    labels = batch["input_ids"].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    batch["labels"] = labels
    if side == "left":
        for row, length in enumerate(lengths):
            shift = max(lengths) - length
            for value in batch.values():
                value[row] = value[row].roll(shift)
    return batch


def forget_batches(side: str = "right") -> list[dict[str, torch.Tensor]]:
    return [mixed_batch([9, 5, 7], seed=1, side=side), mixed_batch([4, 8], seed=2, side=side)]


def retain_batches(side: str = "right") -> list[dict[str, torch.Tensor]]:
    made = [mixed_batch([8, 6], seed=seed, side=side) for seed in (6, 7, 8)]
    for batch in made[1:]:
        del batch["token_groups"]
    return made


def tiny_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    # In eval mode dropout does nothing, and methods must run in it.
    return lora(llama(layers=1, hidden=8), r=2, lora_dropout=0.5).to(dtype)


def _unused() -> dict:
    pytest.fail("a method measured the model itself")


def tiny_case(
    dtype: torch.dtype = torch.float32, *, side: str = "right", model: nn.Module | None = None
) -> Case:
    return Case(
        name="tiny",
        model=tiny_model(dtype) if model is None else model,
        forget=forget_batches(side),
        retain=retain_batches(side),
        calibration=(),
        holdout=(),
        ranks=_unused,
        measure=_unused,
        retrain=_unused,
        seed=3,
    )


def scored_rows(model: nn.Module, batch: Mapping[str, torch.Tensor], *groups: int):
    """Per sequence, run alone and without padding: logits ``[P, V]`` and labels ``[P]``."""
    found = []
    for row in range(len(batch["input_ids"])):
        there = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][there]
        labels = batch.get("labels", batch["input_ids"])[row][there]
        group = batch.get("token_groups", torch.ones_like(batch["input_ids"]))[row][there]
        logits = model(input_ids=ids[None]).logits[0]
        at = [t for t in range(1, len(ids)) if group[t] in groups and labels[t] != -100]
        if at:
            found.append((torch.stack([logits[t - 1] for t in at]), labels[at]))
    return found


def loop_nll(model: nn.Module, batch: Mapping[str, torch.Tensor], *groups: int) -> list:
    """Per sequence with a scored label: the NLL of every one of them."""
    return [
        torch.stack([-row.log_softmax(-1)[label] for row, label in zip(*part, strict=True)])
        for part in scored_rows(model, batch, *groups)
    ]


def loop_mean(model: nn.Module, batch: Mapping[str, torch.Tensor], *groups: int) -> torch.Tensor:
    return torch.cat(loop_nll(model, batch, *groups)).mean()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in lora_weights(model).items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def loop_gradients(model: nn.Module, loss) -> dict[str, torch.Tensor]:
    """Of a loss that is made by calling ``loss()``, by ``backward``; the model is as before."""
    weights = lora_weights(model)
    before = {name: weight.requires_grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    loss().backward()
    found = {name: weight.grad for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.grad = None
        weight.requires_grad_(before[name])
    return found
