"""Interaction logs as sequences of item tokens, one per user, with a group for every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..errors import UcanError, warn
from .data import InteractionLog, _row_mask

__all__ = ["ItemVocabulary", "sequence_batches"]


@dataclass(frozen=True)
class ItemVocabulary:
    """Token ids of a catalogue: 0 pads, 1 begins a sequence, item i is token i + 2."""

    n_items: int
    pad = 0
    bos = 1
    first_item = 2

    def __post_init__(self) -> None:
        if self.n_items < 1:
            raise UcanError(f"ItemVocabulary: {self.n_items} items; it needs at least one.")

    @property
    def size(self) -> int:
        """Number of tokens: the model's `vocab_size`."""
        return self.n_items + self.first_item

    def token(self, item):
        """Token id(s) of dense item id(s): int, array or tensor."""
        return item + self.first_item

    def item(self, token):
        """Dense item id(s) of token id(s); negative for pad and bos."""
        return token - self.first_item


def sequence_batches(
    log: InteractionLog,
    *,
    vocabulary: ItemVocabulary,
    forget: np.ndarray | None = None,
    batch_size: int = 64,
    max_length: int = 100,
    padding_side: Literal["right", "left"] = "right",
    users: np.ndarray | None = None,
    only_forget_users: bool = False,
    sort_by_length: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """One sequence per user, `bos` and then the last `max_length` items, in batches.

    Each batch holds int64 tensors `[B, T]`, T the longest sequence in it (at most
    `max_length + 1`): `input_ids`, `attention_mask`, `labels` (the item tokens; -100 at bos and
    padding) and `token_groups`: 0 where `forget` (bool, one per row of the log) is set, 1 at other
    items, -1 at bos and padding. A token's group belongs to the interaction that the token stands
    for, not to the position that predicts it.

    `users` (dense ids, or bool `[n_users]`) restricts the users; `only_forget_users` keeps those
    whose sequence has a forget row. Sequences come in the order of users, or shortest first with
    `sort_by_length` (less padding). Left padding suits models with rotary positions; those with
    learned absolute positions want it right, or `position_ids` of the caller's making.

    Warns (UcanWarning) when forget rows lie before the last `max_length` items of their user, for
    these are in no sequence. UcanError: another vocabulary than the log's, a mask that does not
    fit, or no sequence left.
    """
    if vocabulary.n_items != log.n_items:
        raise UcanError(
            f"sequence_batches: the vocabulary has {vocabulary.n_items} items but the log "
            f"{log.n_items}; use ItemVocabulary(log.n_items)."
        )
    if batch_size < 1 or max_length < 1:
        raise UcanError(
            f"sequence_batches: batch_size is {batch_size} and max_length {max_length}; both must "
            "be at least 1."
        )
    if padding_side not in ("right", "left"):
        raise UcanError(f'sequence_batches: padding_side is {padding_side!r}; "right" or "left".')
    if only_forget_users and forget is None:
        raise UcanError("sequence_batches: only_forget_users needs the mask forget=.")
    forget = np.zeros(len(log), dtype=bool) if forget is None else _row_mask(forget, log, "forget")

    # Rows are sorted by user: user u owns rows end[u] - count[u] .. end[u], in order of time.
    count = np.bincount(log.user, minlength=log.n_users)
    end = np.cumsum(count)
    length = np.minimum(count, max_length)
    wanted = _user_mask(users, log) & (count > 0)

    from_end = end[log.user] - 1 - np.arange(len(log))
    kept = from_end < max_length
    lost = int((forget & ~kept & wanted[log.user]).sum())
    if lost:
        warn(
            f"sequence_batches: {lost} of {int((forget & wanted[log.user]).sum())} forget "
            f"interactions lie before the last {max_length} of their user and are in no sequence; "
            "raise max_length to include them.",
        )
    if only_forget_users:
        wanted &= np.bincount(log.user[forget & kept], minlength=log.n_users) > 0
    chosen = np.flatnonzero(wanted)
    if len(chosen) == 0:
        raise UcanError(
            "sequence_batches: no sequence is left; "
            + (
                f"no chosen user has a forget row among the last {max_length} items."
                if only_forget_users
                else "none of the chosen users has an interaction."
            )
        )
    if sort_by_length:
        chosen = chosen[np.argsort(length[chosen], kind="stable")]

    tokens = vocabulary.token(log.item)
    groups = np.where(forget, 0, 1)
    batches = []
    for start in range(0, len(chosen), batch_size):
        batch = chosen[start : start + batch_size]
        size = length[batch][:, None]  # items of each sequence, bos not counted
        width = int(size.max()) + 1
        column = np.arange(width)[None, :]
        # Place in the sequence: 0 is bos, 1..size are items, anything else is padding.
        place = column if padding_side == "right" else column - (width - 1 - size)
        is_item = (place >= 1) & (place <= size)
        row = np.where(is_item, end[batch][:, None] - size + place - 1, 0)
        input_ids = np.where(is_item, tokens[row], vocabulary.pad)
        input_ids[np.broadcast_to(place, input_ids.shape) == 0] = vocabulary.bos
        batches.append(
            {
                "input_ids": torch.from_numpy(input_ids),
                "attention_mask": torch.from_numpy(np.where((place >= 0) & (place <= size), 1, 0)),
                "labels": torch.from_numpy(np.where(is_item, input_ids, -100)),
                "token_groups": torch.from_numpy(np.where(is_item, groups[row], -1)),
            }
        )
    return batches


def _user_mask(users: np.ndarray | None, log: InteractionLog) -> np.ndarray:
    if users is None:
        return np.ones(log.n_users, dtype=bool)
    users = np.asarray(users)
    if users.dtype == bool:
        if users.shape != (log.n_users,):
            raise UcanError(
                f"`users` is a mask of shape {users.shape}, but the log has {log.n_users} users."
            )
        return users.copy()
    if users.size and not (
        np.issubdtype(users.dtype, np.integer) and users.min() >= 0 and users.max() < log.n_users
    ):
        raise UcanError(
            f"`users` must be dense user ids in 0..{log.n_users - 1} (or a bool mask); find a "
            "user's dense id with log.user_ids.index(name)."
        )
    mask = np.zeros(log.n_users, dtype=bool)
    mask[users.astype(np.int64)] = True
    return mask
