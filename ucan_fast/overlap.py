"""Overlap: sequences that are passed as forgotten and as retained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .batches import FORGET, RETAIN

#: What of a batch says which sequence it is.
_TOKENS = ("input_ids", "labels", "decoder_input_ids")


class Overlap:
    """Remembers the forget set's sequences, and counts those of the retain set that are among them.

    Two rows are the same sequence where their tokens are, padding aside. They are in each other's
    way where a token is in group 0 of the one and in group 1 of the other; a history of which one
    set takes some tokens and the other set the rest is not.
    """

    def __init__(self) -> None:
        self.found = 0
        self._forgotten: dict[bytes, torch.Tensor] = {}

    def remember(self, batch: Mapping[str, Any]) -> None:
        """Sequences of the forget set; what is not marked is forgotten."""
        for key, groups in _sequences(batch, FORGET):
            marked = groups == FORGET
            if marked.any():
                known = self._forgotten.get(key)
                self._forgotten[key] = marked if known is None else marked | known

    def compare(self, batch: Mapping[str, Any]) -> None:
        """Sequences of the retain set; what is not marked is retained."""
        if not self._forgotten:
            return
        for key, groups in _sequences(batch, RETAIN):
            forgotten = self._forgotten.get(key)
            if forgotten is not None and bool((forgotten & (groups == RETAIN)).any()):
                self.found += 1


def _sequences(batch: Mapping[str, Any], default: int) -> Iterator[tuple[bytes, torch.Tensor]]:
    """Every row's tokens, as bytes, and their groups; nothing of a batch without token ids."""
    ids = batch.get("input_ids")
    if ids is None:
        return
    ids = ids.cpu().to(torch.int64)
    groups, mask = (batch.get(key) for key in ("token_groups", "attention_mask"))
    groups = torch.full_like(ids, default) if groups is None else groups.cpu().to(torch.int64)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    rest = [batch[key].cpu() for key in _TOKENS[1:] if batch.get(key) is not None]
    for row, (tokens, of, real) in enumerate(zip(ids, groups, mask, strict=True)):
        parts = [tokens[real], *(other[row][other[row] != -100] for other in rest)]
        yield b"|".join(part.numpy().tobytes() for part in parts), of[real]
