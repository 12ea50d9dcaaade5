"""Item-token sequences: order, padding on either side, and the group of every token."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from ucan_fast.errors import UcanError, UcanWarning
from ucan_fast.recsys import InteractionLog, ItemVocabulary, sequence_batches


@pytest.fixture
def log() -> InteractionLog:
    """User 0: items 4 3 2 1; user 1: item 0; user 2: items 0 4 0 (a repeated pair)."""
    users = ["0"] * 4 + ["1"] + ["2"] * 3
    items = ["4", "3", "2", "1", "0", "0", "4", "0"]
    return InteractionLog.from_rows(users, items, range(8))


@pytest.fixture
def vocabulary(log) -> ItemVocabulary:
    return ItemVocabulary(log.n_items)


FORGET = np.array([False, True, False, False, False, True, False, False])


def test_vocabulary():
    vocabulary = ItemVocabulary(10)
    assert (vocabulary.pad, vocabulary.bos, vocabulary.size) == (0, 1, 12)
    assert vocabulary.token(0) == 2
    assert vocabulary.item(vocabulary.token(9)) == 9
    assert vocabulary.item(torch.tensor([0, 1, 2])).tolist() == [-2, -1, 0]
    with pytest.raises(UcanError, match="at least one"):
        ItemVocabulary(0)


def test_right_padding_by_hand(log, vocabulary):
    (batch,) = sequence_batches(log, vocabulary=vocabulary, forget=FORGET)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 6, 5, 4, 3], [1, 2, 0, 0, 0], [1, 2, 6, 2, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]],
        "labels": [[-100, 6, 5, 4, 3], [-100, 2, -100, -100, -100], [-100, 2, 6, 2, -100]],
        "token_groups": [[-1, 1, 0, 1, 1], [-1, 1, -1, -1, -1], [-1, 0, 1, 1, -1]],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_left_padding_is_the_same_rows_moved(log, vocabulary):
    (right,) = sequence_batches(log, vocabulary=vocabulary, forget=FORGET)
    (left,) = sequence_batches(log, vocabulary=vocabulary, forget=FORGET, padding_side="left")
    for name in right:
        for row, length in enumerate([5, 2, 4]):
            assert left[name][row, 5 - length :].tolist() == right[name][row, :length].tolist()
    assert left["input_ids"][1].tolist() == [0, 0, 0, 1, 2]
    assert left["attention_mask"][1].tolist() == [0, 0, 0, 1, 1]
    assert left["token_groups"][1].tolist() == [-1, -1, -1, -1, 1]


def test_without_a_mask_every_item_is_retained(log, vocabulary):
    (batch,) = sequence_batches(log, vocabulary=vocabulary)
    assert batch["token_groups"].unique().tolist() == [-1, 1]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_last_items_are_kept_and_lost_forget_rows_are_told(log, vocabulary, side):
    with pytest.warns(UcanWarning, match="2 of 2 forget interactions lie before the last 2"):
        (batch,) = sequence_batches(
            log, vocabulary=vocabulary, forget=FORGET, max_length=2, padding_side=side
        )
    ids = [[t for t in row if t > 1] for row in batch["input_ids"].tolist()]
    assert ids == [[4, 3], [2], [6, 2]]
    assert batch["input_ids"].shape[1] == 3
    assert 0 not in batch["token_groups"]


def test_no_warning_when_all_forget_rows_are_in(log, vocabulary):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sequence_batches(log, vocabulary=vocabulary, forget=FORGET, max_length=3)
        # User 1 alone: the forget rows of the others are nobody's concern.
        sequence_batches(
            log, vocabulary=vocabulary, forget=FORGET, max_length=1, users=np.array([1])
        )


def test_users_and_only_forget_users(log, vocabulary):
    def first_items(**options):
        batches = sequence_batches(log, vocabulary=vocabulary, **options)
        return [row[1] - 2 for batch in batches for row in batch["input_ids"].tolist()]

    assert first_items() == [4, 0, 0]
    assert first_items(users=np.array([2, 0])) == [4, 0]
    assert first_items(users=np.array([False, True, False])) == [0]
    assert first_items(forget=FORGET, only_forget_users=True) == [4, 0]
    assert first_items(sort_by_length=True) == [0, 0, 4]
    with pytest.warns(UcanWarning):
        only = sequence_batches(
            log,
            vocabulary=vocabulary,
            forget=np.array([True] + [False] * 4 + [True, False, False]),
            only_forget_users=True,
            max_length=3,
        )
    assert only[0]["input_ids"].tolist() == [[1, 2, 6, 2]]  # user 0's forget row is cut off


def test_batch_size(log, vocabulary):
    batches = sequence_batches(log, vocabulary=vocabulary, batch_size=2)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 5), (1, 4)]


def test_users_without_rows_have_no_sequence(log, vocabulary):
    (batch,) = sequence_batches(log.rows(log.user != 1), vocabulary=vocabulary)
    assert len(batch["input_ids"]) == 2


def test_sequences_equal_a_plain_loop():
    random = np.random.default_rng(0)
    users = [str(u) for u in random.integers(0, 30, 400)]
    items = [str(i) for i in random.integers(0, 50, 400)]
    log = InteractionLog.from_rows(users, items, range(400))
    forget = random.random(400) < 0.3
    for side in ("right", "left"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batches = sequence_batches(
                log,
                vocabulary=ItemVocabulary(log.n_items),
                forget=forget,
                max_length=9,
                batch_size=7,
                padding_side=side,
            )
        rows = [
            (ids[mask == 1].tolist(), groups[mask == 1].tolist(), groups[mask == 0].tolist())
            for batch in batches
            for ids, mask, groups in zip(
                batch["input_ids"], batch["attention_mask"], batch["token_groups"], strict=True
            )
        ]
        for user, (ids, groups, padded) in enumerate(rows):
            mine = np.flatnonzero(log.user == user)[-9:]
            assert ids == [1] + [2 + int(log.item[r]) for r in mine]
            assert groups == [-1] + [0 if forget[r] else 1 for r in mine]
            assert set(padded) <= {-1}


def test_refusals(log, vocabulary):
    with pytest.raises(UcanError, match=r"use ItemVocabulary\(log\.n_items\)"):
        sequence_batches(log, vocabulary=ItemVocabulary(9))
    with pytest.raises(UcanError, match="bool with one entry"):
        sequence_batches(log, vocabulary=vocabulary, forget=FORGET[:-1])
    with pytest.raises(UcanError, match="bool with one entry"):
        sequence_batches(log, vocabulary=vocabulary, forget=FORGET.astype(int))
    with pytest.raises(UcanError, match="max_length 0"):
        sequence_batches(log, vocabulary=vocabulary, max_length=0)
    with pytest.raises(UcanError, match="padding_side is 'middle'"):
        sequence_batches(log, vocabulary=vocabulary, padding_side="middle")
    with pytest.raises(UcanError, match="needs the mask"):
        sequence_batches(log, vocabulary=vocabulary, only_forget_users=True)
    with pytest.raises(UcanError, match="no chosen user has a forget row"):
        sequence_batches(
            log, vocabulary=vocabulary, forget=FORGET, only_forget_users=True, users=np.array([1])
        )
    with pytest.raises(UcanError, match="none of the chosen users"):
        sequence_batches(log, vocabulary=vocabulary, users=np.zeros(3, dtype=bool))
    with pytest.raises(UcanError, match=r"dense user ids in 0\.\.2"):
        sequence_batches(log, vocabulary=vocabulary, users=np.array([3]))
    with pytest.raises(UcanError, match="mask of shape"):
        sequence_batches(log, vocabulary=vocabulary, users=np.array([True]))
