"""Differentiable losses of one side of a batch: what gradient-based unlearning goes up and down."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ucan_fast.batches import FORGET, RETAIN, read_batches
from ucan_fast.errors import UcanError

from .case import Batch

#: Called like a model: the model itself, or its state before the request.
Run = Callable[..., Any]
NAMES = {FORGET: "forget (0)", RETAIN: "retain (1)"}


@dataclass(frozen=True)
class Scored:
    """A batch, and where its logits are scored.

    Attributes:
        inputs: keyword arguments for the model, on its device. Without labels, so that it does
            not work out a loss of its own.
        mask: bool ``[B, T]``, true where the logits predict a label that counts.
        labels: int64 ``[P]``, those labels, in the order of the mask.
    """

    inputs: dict[str, Any]
    mask: torch.Tensor
    labels: torch.Tensor


def read(model: nn.Module, batches: Iterable[Batch], *groups: int) -> list[Scored]:
    """The batches that have a label of these groups, in their order.

    A label counts if ``token_groups`` at its own position is one of ``groups`` (batches without
    them are all retain), it is not -100 (``labels``, else ``input_ids``), and both it and the
    position before it, whose logits predict it, are attended.

    Raises:
        UcanError: no batch has such a label; an encoder-decoder model; bad batches (by index).
    """
    found = []
    for batch in read_batches(model, batches, "retain"):
        if batch.decoder_groups is not None:
            raise UcanError("the quality comparison is about decoder-only models.")
        inputs = dict(batch.inputs)
        labels = inputs.pop("labels", None)
        labels = inputs["input_ids"] if labels is None else labels
        counts = torch.isin(batch.groups, torch.tensor(groups, device=labels.device))
        mask = torch.zeros_like(counts)
        mask[:, :-1] = (counts & (labels != -100))[:, 1:]
        if inputs.get("attention_mask") is not None:
            mask &= inputs["attention_mask"].bool()
        if mask.any():
            found.append(Scored(inputs, mask, labels.roll(-1, dims=1)[mask].long()))
    if not found:
        sides = " or ".join(NAMES[group] for group in groups)
        raise UcanError(
            f"no batch has a label whose token group is {sides} with an attended token before it: "
            "nothing can be learned or forgotten. Check token_groups and labels."
        )
    return found


def logits(run: Run, batch: Scored) -> torch.Tensor:
    """``[P, V]`` at the scored positions; fp32 at least, so that bf16 models have usable sums."""
    found = run(**batch.inputs).logits
    # Prefix tuning and the like prepend positions; the last ones are the tokens'.
    found = found[:, -batch.mask.shape[1] :][batch.mask]
    return found.to(torch.promote_types(found.dtype, torch.float32))


def mean_nll(run: Run, batch: Scored) -> torch.Tensor:
    """Mean over the scored labels of -log p(label), nats."""
    return nn.functional.cross_entropy(logits(run, batch), batch.labels)


def sequence_nll(run: Run, batch: Scored) -> torch.Tensor:
    """*Sum* of -log p(label) over the scored labels of every sequence that has one: ``[S]``."""
    nll = nn.functional.cross_entropy(logits(run, batch), batch.labels, reduction="none")
    table = nll.new_zeros(batch.mask.shape).masked_scatter(batch.mask, nll)
    return table.sum(1)[batch.mask.any(1)]


def kl(reference: Run, run: Run, batch: Scored) -> torch.Tensor:
    """Mean over the scored positions of KL(reference || model), nats."""
    log_p = logits(reference, batch).log_softmax(-1)
    log_q = logits(run, batch).log_softmax(-1)
    return nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
