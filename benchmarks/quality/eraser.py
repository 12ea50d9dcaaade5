"""LLM-Eraser-style pruning of the adapter (after Zhang et al., KDD 2025).

After the authors' code (mmichaelzhang/LLM-Eraser@dc8bf60, ``hf_prune.py`` and
``post_training_lang.py``), which prunes the *backbone*: heads and MLP channels of its middle
blocks, and then trains a fresh LoRA. Here the adapter is what was trained on the data and what is
pruned: input columns of A and output rows of B, in all blocks; post-training goes on with the same
adapter, pruned groups kept at zero. The paper's trainable soft masks are not in that code, nor
here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import nn

from ucan_fast.batches import FORGET, RETAIN

from .case import Case, Clock, State, as_before
from .losses import Scored, mean_nll, read
from .training import Weights, adamw, cycled, descend, differentiable, gradients, thinned

#: Shares of every matrix's groups. The authors' are 0.1 and 0.5.
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: Weight of D_f's importance, and of D_f's loss.
NEGATIVE_IMPORTANCE, NEGATIVE_LOSS = 0.2, 0.01
#: Without post-training, with it at the authors' learning rate, and at one that suits the adapter.
POST_TRAINING = ({"steps": 0}, {"steps": 32, "lr": 1e-4}, {"steps": 32, "lr": 1e-3})


def taylor_importance(
    model: nn.Module, weights: Weights, batches: Sequence[Scored]
) -> dict[str, torch.Tensor]:
    """Σ |w ∂L/∂w| of every group (``param_first`` of LLM-Pruner), fp64 ``[groups]``, by matrix.

    L is the mean NLL over all labels of the batches, as if they were one. Groups are the columns
    of A (one per input) and the rows of B (one per output).
    """
    total = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
    count = sum(batch.labels.numel() for batch in batches)
    with differentiable(weights):
        for batch in batches:
            share = batch.labels.numel() / count
            for name, gradient in gradients(mean_nll(model, batch) * share, weights).items():
                total[name] += gradient
    return {
        name: (weights[name].detach() * gradient).abs().sum(_within(name))
        for name, gradient in total.items()
    }


def kept_groups(importance: Mapping[str, torch.Tensor], ratio: float) -> dict[str, torch.Tensor]:
    """0 for the ``ratio`` of every matrix's groups that matter least, 1 for the others, by matrix.

    fp32, of the shape that multiplies the matrix. Ties go by position, so larger ratios prune
    what smaller ones do, and more.
    """
    masks = {}
    for name, values in importance.items():
        lowest = values.argsort(stable=True)[: round(ratio * len(values))]
        mask = torch.ones(len(values), device=values.device)
        mask[lowest] = 0.0
        masks[name] = mask.unsqueeze(_within(name))
    return masks


def sample_of(batches: Sequence[Scored], labels: int, seed: int) -> list[Scored]:
    """Batches in seeded order until they hold this many labels, or all are taken."""
    taken, count = [], 0
    for batch in islice(cycled(batches, seed), len(batches)):
        if count >= labels:
            break
        taken.append(batch)
        count += batch.labels.numel()
    return taken


def llm_eraser(
    case: Case, *, steps: int = 0, lr: float = 1e-4, ratios: Sequence[float] = RATIOS
) -> Iterator[State]:
    """States: pruned shares from small to large, every one made from the original.

    Importance is I = I_retain - 0.2 I_forget, and the lowest are pruned. It is taken on batches of
    D_r with about as many labels as D_f has (the authors: 10 examples each), since |mean gradient|
    falls with their number. Then ``steps`` steps of AdamW on L = NLL(D_r) - 0.01 NLL(D_f).

    A ratio that prunes no more groups than the one before it is left out. The seconds of a state
    are those of the importance, of one pruning and of its post-training.
    """
    if not ratios or sorted(set(ratios)) != list(ratios) or not 0 < ratios[0] <= ratios[-1] <= 1:
        raise ValueError(f"ratios must rise from above 0 to at most 1, not {ratios}.")
    if steps < 0 or not lr > 0:
        raise ValueError(f"steps must be at least 0 and lr above 0, not {steps} and {lr}.")
    model, request = case.model, Clock()
    with as_before(model) as weights:
        model.eval()
        original = {name: weight.detach().clone() for name, weight in weights.items()}
        with request:
            forget = read(model, case.forget, FORGET)
            retain = read(model, case.retain, RETAIN)
            labels = sum(batch.labels.numel() for batch in forget)
            sample = sample_of(retain, labels, case.seed)
            positive = taylor_importance(model, weights, sample)
            negative = taylor_importance(model, weights, forget)
            importance = {
                name: value - NEGATIVE_IMPORTANCE * negative[name]
                for name, value in positive.items()
            }
        pruned = 0
        for ratio in thinned(case, ratios):
            masks = kept_groups(importance, ratio)
            last, pruned = pruned, sum(int((mask == 0).sum()) for mask in masks.values())
            if pruned == last:
                continue
            edit = Clock()
            with edit:
                with torch.no_grad():
                    for name, weight in weights.items():
                        weight.copy_(original[name] * masks[name])
                finite = _post_train(case, weights, masks, forget, retain, steps, lr)
            if not finite:
                return
            yield State(ratio, request.seconds + edit.seconds)


def _post_train(
    case: Case,
    weights: Weights,
    masks: Mapping[str, torch.Tensor],
    forget: Sequence[Scored],
    retain: Sequence[Scored],
    steps: int,
    lr: float,
) -> bool:
    """Whether all steps were finite."""
    optimizer = adamw(weights, lr)
    pairs = zip(cycled(retain, case.seed), cycled(forget, case.seed), strict=True)
    with differentiable(weights):
        for positive, negative in islice(pairs, steps):
            loss = mean_nll(case.model, positive) - NEGATIVE_LOSS * mean_nll(case.model, negative)
            if not descend(optimizer, weights, loss, masks):
                return False
    return True


def _within(name: str) -> int:
    """The axis along which a group lies: down a column of A, along a row of B."""
    return 0 if ".lora_A." in name else 1
