"""Both evaluation protocols for a sequential recommender, in one call.

The paper's protocol scores the forget side on *training* interactions and the retain side on
*held-out* ones. Since any shrinking of the adapter lowers memorised training items first, it
rewards edits that forget nothing in particular; the strict protocol compares like with like.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from ..errors import UcanWarning
from ..metrics import ranking_metrics, trade_off
from .data import InteractionLog, _row_mask
from .ranking import _scored_positions, held_out_ranks
from .sequences import ItemVocabulary, _user_mask, sequence_batches

__all__ = ["evaluate_sequences", "trade_offs"]

PROTOCOLS = {
    "paper": ("forget_train", "retain_test"),
    "strict_train": ("forget_train", "retain_train"),
    "strict_test": ("forget_test", "retain_test"),
}


def evaluate_sequences(
    model: torch.nn.Module,
    train_log: InteractionLog,
    test_log: InteractionLog,
    forget_mask_train: np.ndarray,
    forget_mask_test: np.ndarray | None = None,
    *,
    vocabulary: ItemVocabulary,
    batch_size: int = 64,
    max_length: int = 100,
    padding_side: Literal["right", "left"] = "right",
    users: np.ndarray | None = None,
    ks: Sequence[int] = (5, 10),
    exclude_history: bool = True,
) -> dict[str, float]:
    """Ranking metrics of forget and retain side, on training and on held-out interactions.

    `forget_mask_train` and `forget_mask_test` mark the rows of `train_log` and `test_log` that
    belong to the forget side; without the latter every test row is on the retain side (a request
    for single interactions has no held-out counterpart). Training interactions are scored as
    next-item targets inside their sequence (`next_item_ranks`, the last `max_length` of each
    user), held-out ones from the user's history in `train_log` (`held_out_ranks`). `users` (dense
    ids or bool mask) restricts both.

    Returns "forget_train/recall@5", ..., "retain_test/ndcg@10" and the number of cases behind each
    as "forget_train/cases", ...; a side without cases has only its "cases", 0.
    """
    user_mask = _user_mask(users, train_log)
    with warnings.catch_warnings():
        # Making the forget batches has told this already, and here "cases" counts what is scored.
        warnings.simplefilter("ignore", UcanWarning)
        batches = sequence_batches(
            train_log,
            vocabulary=vocabulary,
            forget=forget_mask_train,
            batch_size=batch_size,
            max_length=max_length,
            padding_side=padding_side,
            users=user_mask,
            sort_by_length=True,
        )
    parts = list(_scored_positions(model, batches, vocabulary, exclude_history))
    ranks = (
        torch.cat([r for r, _ in parts])
        if parts
        else torch.zeros(0, dtype=torch.int64, device="cpu")
    )
    groups = (
        torch.cat([g for _, g in parts])
        if parts
        else torch.zeros(0, dtype=torch.int64, device="cpu")
    )

    if forget_mask_test is None:
        forget_mask_test = np.zeros(len(test_log), dtype=bool)
    forget_test = _row_mask(forget_mask_test, test_log, "forget_mask_test")
    tested = user_mask[test_log.user]
    test_ranks = held_out_ranks(
        model,
        train_log,
        test_log,
        vocabulary=vocabulary,
        rows=tested,
        batch_size=batch_size,
        max_length=max_length,
        exclude_history=exclude_history,
    )
    test_forget = torch.from_numpy(forget_test[tested])

    sides = {
        "forget_train": ranks[groups == 0],
        "retain_train": ranks[groups == 1],
        "forget_test": test_ranks[test_forget],
        "retain_test": test_ranks[~test_forget],
    }
    result = {}
    for side, side_ranks in sides.items():
        if len(side_ranks):
            for name, value in ranking_metrics(side_ranks, ks).items():
                result[f"{side}/{name}"] = value
        result[f"{side}/cases"] = float(len(side_ranks))
    return result


def trade_offs(
    before: Mapping[str, float], after: Mapping[str, float], k: int = 10
) -> dict[str, float]:
    """Trade-off@K under each protocol, from what `evaluate_sequences` said before and after.

    "paper": forget on training, retain on held-out interactions. "strict_train": both on training.
    "strict_test": both on held-out. A protocol one of whose sides has no cases is left out.
    """
    result = {}
    for protocol, (forget, retain) in PROTOCOLS.items():
        if all(f"{side}/recall@{k}" in before for side in (forget, retain)):
            result[protocol] = trade_off(
                _side(before, forget),
                _side(after, forget),
                _side(before, retain),
                _side(after, retain),
                k,
            )
    return result


def _side(metrics: Mapping[str, float], side: str) -> dict[str, float]:
    prefix = f"{side}/"
    return {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix)
    }
