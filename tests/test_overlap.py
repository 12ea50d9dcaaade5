"""Sequences that are passed both as forgotten and as retained are told, others are not."""

from __future__ import annotations

import warnings

import pytest
import torch
from trained_model import forget_batches, retain_batches, trained

import ucan_fast as uf
from ucan_fast.overlap import Overlap


def batch(rows: list[list[int]], *, left: bool = False, **fields) -> dict[str, torch.Tensor]:
    """Rows padded to one length."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask} | fields


def count(forget: dict, retain: dict) -> int:
    overlap = Overlap()
    overlap.remember(forget)
    overlap.compare(retain)
    return overlap.found


def test_padding_and_its_side_do_not_matter():
    forget = batch([[5, 6, 7], [8, 9]])
    assert count(forget, batch([[8, 9], [1, 2, 3, 4], [5, 6, 7]], left=True)) == 2
    assert count(forget, batch([[5, 6], [5, 6, 7, 8], [6, 7], [9, 8]])) == 0
    # A zero that is a token is one.
    assert count(batch([[5, 0]]), batch([[5], [5, 0]])) == 1
    assert count(batch([[5, 6]]), {"input_ids": torch.tensor([[5, 6]], dtype=torch.int32)}) == 1


def test_a_history_that_is_shared_out_is_none():
    marked = torch.tensor([[0, 1, 0, 1]])
    history = batch([[5, 6, 7, 8]], token_groups=marked)
    assert count(history, history) == 0
    assert count(history, batch([[5, 6, 7, 8]])) == 1  # all of it retained
    assert count(history, batch([[5, 6, 7, 8]], token_groups=torch.tensor([[-1, 1, -1, 1]]))) == 0
    assert count(batch([[5, 6, 7, 8]]), history) == 1  # all of it forgotten
    # Twice in the forget set, other tokens each time.
    overlap = Overlap()
    for groups in ([[0, -1, -1, -1]], [[-1, 0, -1, -1]]):
        overlap.remember(batch([[5, 6, 7, 8]], token_groups=torch.tensor(groups)))
    for groups, found in (([[1, 0, 0, 0]], 1), ([[0, 1, 0, 0]], 2), ([[0, 0, 1, 1]], 2)):
        overlap.compare(batch([[5, 6, 7, 8]], token_groups=torch.tensor(groups)))
        assert overlap.found == found


def test_labels_tell_prompts_apart():
    prompts, labels = [[5, 6], [7, 8]], torch.tensor([[3, -100], [4, 5]])
    forget = batch(prompts, labels=labels)
    assert count(forget, batch(prompts, labels=labels)) == 2
    assert count(forget, batch(prompts, labels=torch.tensor([[-100, 3], [4, 6]]))) == 1


def test_embeddings_are_not_compared():
    embedded = {"inputs_embeds": torch.zeros(1, 2, 3)}
    assert count(embedded, embedded) == 0


@pytest.mark.parametrize("method", ["attenuate", "influence"])
@pytest.mark.parametrize("among", [True, False])
def test_unlearn_says_so(method, among):
    forget, retain = forget_batches(), retain_batches(count=8)
    config = uf.UcanConfig(method=method, strength=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = uf.unlearn(
            trained(),
            forget=forget,
            retain=[*retain, forget[0]] if among else retain,
            config=config,
            evaluate=False,
        )
    told = [str(w.message) for w in caught if "token for token" in str(w.message)]
    assert len(told) == among
    if among:
        rows = len(forget[0]["input_ids"])
        total = rows + sum(len(b["input_ids"]) for b in retain)
        assert told[0].startswith(f"{rows} of the {total} retain sequences are")
        assert result.report.notes["overlap"] in told[0]
    else:
        assert "overlap" not in result.report.notes
