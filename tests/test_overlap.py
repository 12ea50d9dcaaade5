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
    for groups, found in (([[1, -1, -1, -1]], 1), ([[-1, 1, -1, -1]], 2), ([[-1, -1, 1, 1]], 2)):
        overlap.compare(batch([[5, 6, 7, 8]], token_groups=torch.tensor(groups)))
        assert overlap.found == found


def test_what_is_not_scored_is_neither_forgotten_nor_retained():
    ids = [[1, 20, 7, 20, 9]]
    first = batch(ids, labels=torch.tensor([[-100, 20, -100, -100, -100]]))
    second = batch(ids, labels=torch.tensor([[-100, -100, -100, 20, 9]], dtype=torch.int32))
    assert count(first, second) == 0
    assert count(first, first) == count(second, second) == count(first, batch(ids)) == 1


def test_labels_of_their_own_tell_sequences_apart():
    prompts, labels = [[5, 6], [7, 8]], torch.tensor([[3, 4, -100], [4, 5, 6]])
    forget = batch(prompts, labels=labels)
    assert count(forget, forget) == 2
    wider = torch.tensor([[3, 4, -100, -100], [4, 5, 7, -100]])
    assert count(forget, batch(prompts, labels=wider)) == 1
    # Of the shape of the tokens, but not these.
    classes = batch(prompts, labels=torch.tensor([[-100, 2], [-100, 3]]))
    assert count(classes, classes) == 2
    assert count(classes, batch(prompts, labels=torch.tensor([[-100, 2], [-100, 4]]))) == 1


def test_a_forgotten_token_counts_wherever_it_is_passed():
    marked = batch([[5, 6], [5, 6]], token_groups=torch.tensor([[0, -1], [1, 1]]))
    overlap = Overlap()
    overlap.compare(marked)
    assert (overlap.found, overlap.retained) == (1, 1)


@pytest.mark.parametrize(
    "extra",
    [
        {"pixel_values": torch.zeros(2, 3)},
        {"decoder_input_ids": torch.tensor([[1], [2]])},
        {"decoder_token_groups": torch.tensor([[0], [0]])},
        {"labels": [[5, 6], [7, 8]]},
        {"labels": torch.zeros(2, dtype=torch.bfloat16)},
        {"labels": torch.tensor(1)},
        {"labels": torch.tensor([[5, 6]])},
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_not(extra):
    odd = batch([[5, 6], [7, 8]], **extra)
    assert count(odd, odd) == 0
    embedded = {"inputs_embeds": torch.zeros(1, 2, 3)}
    assert count(embedded, embedded) == 0
    assert count(
        batch([[5, 6]], labels=None), batch([[5, 6]], position_ids=torch.zeros(1, 2).long())
    )


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
        assert told[0].startswith(f"{rows} of the {total} retained sequences are")
        assert result.report.notes["overlap"] in told[0]
    else:
        assert "overlap" not in result.report.notes


def test_beside_a_bank_too():
    """Where no pass for statistics sees them, but every step does."""
    model, forget, retain = trained(), forget_batches(), retain_batches(count=16)
    bank = uf.collect_factors(model, [*forget, *retain])
    config = uf.UcanConfig.preset("thorough", influence_steps=2, influence_batches=1)
    for among in (True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            uf.unlearn(
                trained(),
                forget=forget,
                bank=bank,
                retain=[*retain, *forget] if among else retain,
                config=config,
                evaluate=False,
            )
        assert sum("token for token" in str(w.message) for w in caught) == among


def test_a_malformed_batch_beside_a_bank_is_named():
    model, forget, retain = trained(), forget_batches(count=8), retain_batches(count=16)
    bank = uf.collect_factors(model, [*forget, *retain])
    bad = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 4)}
    config = uf.UcanConfig.preset("thorough", influence_steps=2)
    with pytest.raises(uf.UcanError, match="batch 1: attention_mask"):
        uf.unlearn(
            model,
            forget=forget,
            bank=bank,
            retain=[retain[0], bad],
            calibration=lambda model: 1.0,
            config=config,
        )
