"""Forget masks: which rows, how many, and the same users in every part of a split."""

from __future__ import annotations

import numpy as np
import pytest

from ucan_fast.errors import UcanError
from ucan_fast.recsys import (
    InteractionLog,
    forget_genre,
    forget_random_interactions,
    forget_random_users,
    forget_users,
    leave_one_out,
)


@pytest.fixture
def log() -> InteractionLog:
    users = [str(u) for u in range(20) for _ in range(5)]
    items = [str((u * 3 + n) % 12) for u in range(20) for n in range(5)]
    genres = {str(i): ("Horror",) if i % 4 == 0 else ("Drama", "War") for i in range(12)}
    return InteractionLog.from_rows(users, items, range(100), None, genres)


def test_random_users_takes_whole_users_and_the_same_in_every_part(log):
    mask = forget_random_users(log, 0.25, seed=3)
    chosen = set(log.user[mask].tolist())
    assert mask.dtype == bool
    assert mask.shape == (100,)
    assert len(chosen) == 5
    assert mask.sum() == 25
    for part in leave_one_out(log):
        assert set(part.user[forget_random_users(part, 0.25, seed=3)].tolist()) == chosen
    assert set(log.user[forget_random_users(log, 0.25, seed=4)].tolist()) != chosen


def test_random_interactions_takes_rows(log):
    mask = forget_random_interactions(log, 0.1, seed=0)
    assert mask.sum() == 10
    assert len(set(log.user[mask].tolist())) > 2
    assert np.array_equal(mask, forget_random_interactions(log, 0.1, seed=0))
    assert not np.array_equal(mask, forget_random_interactions(log, 0.1, seed=1))
    assert forget_random_interactions(log, 1e-9, seed=0).sum() == 1
    assert forget_random_interactions(log, 1.0, seed=0).all()


@pytest.mark.parametrize("split", [forget_random_users, forget_random_interactions])
@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_fraction_outside_of_its_range(log, split, fraction):
    with pytest.raises(UcanError, match=r"must lie in \(0, 1\]"):
        split(log, fraction, seed=0)


def test_nothing_to_draw_from(log):
    with pytest.raises(UcanError, match="the log is empty"):
        forget_random_interactions(log.rows(np.zeros(100, dtype=bool)), 0.5, seed=0)


def test_genre_marks_every_row_of_its_items(log):
    mask = forget_genre(log, "Horror")
    expected = [int(log.item_ids[i]) % 4 == 0 for i in log.item]
    assert mask.tolist() == expected
    assert np.array_equal(forget_genre(log, "War"), ~mask)


def test_unknown_genre_lists_the_known_ones(log):
    with pytest.raises(UcanError, match=r"'horror'; known: Drama, Horror, War\."):
        forget_genre(log, "horror")
    with pytest.raises(UcanError, match="has no genres"):
        forget_genre(InteractionLog.from_rows(["a"], ["x"], [0]), "Horror")


def test_users_by_their_own_ids():
    log = InteractionLog.from_rows(["7", "7", "12", "30"], ["1", "2", "1", "2"], range(4))
    assert forget_users(log, ["12", 7]).tolist() == [True, True, True, False]
    # A number is the data's own id, not a dense one; a string is one id, not its characters.
    assert forget_users(log, 12).tolist() == [False, False, True, False]
    assert forget_users(log, "12").tolist() == [False, False, True, False]


def test_unknown_and_empty_users(log):
    with pytest.raises(UcanError, match=r"2 of 3 user ids are not in the log \(99, x\)"):
        forget_users(log, ["99", "1", "x"])
    with pytest.raises(UcanError, match="is empty"):
        forget_users(log, [])
