"""Overlap: sequences that are passed as forgotten and as retained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from .batches import FORGET, INTEGERS, RETAIN

# Where a batch holds anything else (images, a decoder's own tokens), equal tokens say little.
_KNOWN = {
    *("input_ids", "attention_mask", "labels", "token_groups", "position_ids", "token_type_ids")
}
_UNSCORED = -100


class Overlap:
    """Remembers the forget set's sequences, and counts those of the retain set that are among them.

    Two rows are the same sequence where their tokens are, padding aside. They are in each other's
    way where a token is forgotten in the one and retained in the other; a history of which one set
    takes some tokens and the other set the rest is not.

    Attributes:
        found: sequences that were retained and are in the way.
        retained: all sequences with a retained token that were compared.
    """

    def __init__(self) -> None:
        self.found = self.retained = 0
        # By digest: one byte per token, 1 where it is forgotten.
        self._forgotten: dict[bytes, bytes] = {}

    def remember(self, batch: Mapping[str, Any]) -> None:
        """Look at what a batch forgets; tokens that are not marked are forgotten."""
        for key, groups in _sequences(batch, FORGET):
            self._forget(key, groups == FORGET)

    def compare(self, batch: Mapping[str, Any]) -> None:
        """Look at what a batch retains (and forgets); tokens that are not marked are retained."""
        for key, groups in _sequences(batch, RETAIN):
            self._forget(key, groups == FORGET)
            retained = groups == RETAIN
            self.retained += bool(retained.any())
            known = self._forgotten.get(key)
            if known is not None and bool((retained & np.frombuffer(known, dtype=bool)).any()):
                self.found += 1

    def _forget(self, key: bytes, marked: np.ndarray) -> None:
        if marked.any():
            known = self._forgotten.get(key)
            if known is not None:
                marked = marked | np.frombuffer(known, dtype=bool)
            self._forgotten[key] = marked.tobytes()


def _sequences(batch: Mapping[str, Any], default: int) -> Iterator[tuple[bytes, np.ndarray]]:
    """Of every row a digest of its tokens, and their groups, -1 where a label says "not scored".

    Nothing of a batch that holds more than tokens, or what is no tensor.
    """
    given = {key: value for key, value in batch.items() if value is not None}
    ids = given.get("input_ids")
    if ids is None or not given.keys() <= _KNOWN or not all(map(_is_readable, given.items())):
        return
    ids = _array(ids)
    mask = _array(given["attention_mask"] != 0) > 0 if "attention_mask" in given else None
    groups = np.full_like(ids, default)
    if "token_groups" in given:
        groups = _array(given["token_groups"])
    labels = _array(given["labels"]) if "labels" in given else None
    own = labels is not None  # labels of their own are a part of the sequence
    if labels is not None and labels.shape == ids.shape:
        scored = labels != _UNSCORED
        if (labels[scored] == ids[scored]).all():
            groups, own = np.where(scored, groups, -1), False
    if own and len(labels) != len(ids):
        return
    for row, tokens in enumerate(ids):
        of = groups[row]
        if mask is not None:
            tokens, of = tokens[mask[row]], of[mask[row]]
        content = tokens.tobytes()
        if own:
            content += b"|" + labels[row][labels[row] != _UNSCORED].tobytes()
        yield hashlib.blake2b(content, digest_size=16).digest(), of


def _is_readable(item: tuple[str, Any]) -> bool:
    key, value = item
    if not isinstance(value, torch.Tensor) or not value.dim():
        return False
    return value.dtype in INTEGERS or key == "attention_mask"


def _array(value: torch.Tensor) -> np.ndarray:
    return value.detach().cpu().to(torch.int64).numpy()
