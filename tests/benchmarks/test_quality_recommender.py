"""Who is trained on, what a request deletes, and who is measured where."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.quality import recommender as module
from benchmarks.quality.case import SIDES, lora_weights
from benchmarks.quality.recommender import SCENARIOS, load_recommender, make_case, make_request
from ucan_fast import UcanError
from ucan_fast.metrics import ranking_metrics

from .quality_toy import TOY, toy

__all__ = ["toy"]


def users_of(toy, rows):
    return set(toy.data.train.user[rows])


def test_users_are_split_without_overlap(toy):
    parts = [set(toy.data.base_users), set(toy.data.tuned_users), set(toy.never_seen)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == toy.data.train.n_users


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_request_deletes_rows_of_tuned_users_only(toy, scenario):
    request = make_request(toy, scenario)
    assert request.forget_train.any()
    assert users_of(toy, request.forget_train) <= set(toy.data.tuned_users)
    assert set(toy.data.test.user[request.forget_test]) <= set(toy.data.tuned_users)


def test_what_each_scenario_deletes(toy):
    requests = {scenario: make_request(toy, scenario) for scenario in SCENARIOS}
    tuned = np.isin(toy.data.train.user, toy.data.tuned_users)
    horror = TOY.of_genre(toy.data.train)

    share = requests["interactions"].forget_train.sum() / tuned.sum()
    assert 0.15 < share < 0.35
    assert not requests["interactions"].forget_test.any()
    assert len(users_of(toy, requests["users"].forget_train)) == round(
        len(toy.data.tuned_users) / 4
    )
    for scenario in ("one-user", "one-percent"):
        assert len(users_of(toy, requests[scenario].forget_train)) == 1
    assert (requests["genre"].forget_train == (tuned & horror)).all()
    assert (requests["genre"].like_it == horror).all()
    assert requests["users"].like_it.all()
    alike = requests["interactions"].like_it
    assert (requests["interactions"].forget_train == (tuned & alike)).all()
    assert 0.15 < alike.mean() < 0.35
    # Of every user, everything is deleted, where users are.
    for scenario in ("users", "one-user", "taste"):
        rows = requests[scenario].forget_train
        assert (rows == np.isin(toy.data.train.user, list(users_of(toy, rows)))).all()
    # Odd users like Horror: the taste group is of them.
    names = [toy.data.train.user_ids[u] for u in users_of(toy, requests["taste"].forget_train)]
    assert all(int(name[1:]) % 2 for name in names)


def test_draws_depend_on_the_seed(toy):
    other = module.Recommender(**{**vars(toy), "recipe": type(toy.recipe)(seed=1)})
    for scenario in ("interactions", "users"):
        one, two = (make_request(r, scenario).forget_train for r in (toy, other))
        assert (one != two).any()


@pytest.mark.parametrize("scenario", ["interactions", "users", "genre"])
def test_the_sides_of_a_case(toy, scenario):
    request = make_request(toy, scenario)
    model = toy.model()
    case = make_case(toy, request, model)
    ranks = case.ranks()
    assert list(ranks) == list(SIDES)
    train = toy.data.train
    # Few enough users that all of the forget set is measured.
    assert len(ranks["forget"]) == request.forget_train.sum()
    kept = np.isin(train.user, toy.data.tuned_users) & ~request.forget_train
    # Every retained item is on one side, and on one only.
    assert len(ranks["calibration"]) + len(ranks["retain"]) == kept.sum()
    assert min(len(ranks["calibration"]), len(ranks["retain"])) > 0
    # The model has learned what it is measured on.
    assert ranking_metrics(ranks["retain"])["recall@10"] > 1.5 * 10 / train.n_items

    marked = torch.cat([b["token_groups"].flatten() for b in case.retain])
    assert int((marked == 0).sum()) == request.forget_train.sum()
    assert int((marked == 1).sum()) == kept.sum()
    forget = torch.cat([b["token_groups"].flatten() for b in case.forget])
    assert int((forget == 0).sum()) == request.forget_train.sum()
    # What an attacker compares with: never-seen users, the same kind of rows.
    held = torch.cat([b["token_groups"].flatten() for b in case.holdout])
    alike = request.like_it & np.isin(train.user, toy.never_seen)
    assert 0 < int((held == 0).sum()) == alike.sum()
    measured = case.measure()
    assert measured["forget_train/cases"] == request.forget_train.sum()


def test_nothing_that_was_tuned_on_is_judged(toy, monkeypatch):
    """Not in the curves, not in the full metrics, also of who has deleted and retained items."""
    request = make_request(toy, "interactions")
    seen = []
    scored = module._sided

    def spy(recommender, request, users):
        seen.append(users)
        return scored(recommender, request, users)

    monkeypatch.setattr(module, "_sided", spy)
    measured = make_case(toy, request, toy.model()).measure()
    (users,) = seen
    train = toy.data.train
    judged = np.isin(train.user, toy.data.tuned_users) & ~request.forget_train
    judged &= ~np.isin(train.user, users["calibration"])
    assert measured["retain_train/cases"] == judged.sum() > 0
    assert measured["forget_train/cases"] == request.forget_train.sum()


def test_calibration_and_retain_are_of_different_users(toy, monkeypatch):
    request = make_request(toy, "one-user")
    seen = []
    scored = module._sided

    def spy(recommender, request, users):
        seen.append(users)
        return scored(recommender, request, users)

    monkeypatch.setattr(module, "_sided", spy)
    make_case(toy, request, toy.model())
    (users,) = seen
    assert not set(users["calibration"]) & set(users["retain"])
    assert not set(users["forget"]) & (set(users["calibration"]) | set(users["retain"]))


def test_retraining_never_sees_the_forget_set(toy, monkeypatch):
    request = make_request(toy, "genre")
    seen = []
    example = module.example()
    fine_tune = example.fine_tune

    def spy(base, recipe, batches):
        seen.extend(batches)
        return fine_tune(base, recipe, batches)

    monkeypatch.setattr(example, "fine_tune", spy)
    model = toy.model()
    weights, seconds = make_case(toy, request, model).retrain()
    assert seconds > 0
    own = lora_weights(model)
    assert weights.keys() == own.keys()
    assert any(not torch.equal(weights[name], own[name]) for name in own)
    items = np.concatenate([toy.data.vocabulary.item(b["input_ids"]).flatten() for b in seen])
    horror = [i for i, genres in enumerate(toy.data.train.genres) if "Horror" in genres]
    assert not np.isin(items, horror).any()
    kept = np.isin(toy.data.train.user, toy.data.tuned_users) & ~request.forget_train
    assert (items >= 0).sum() == kept.sum()


def test_data_that_are_not_shipped_must_be_named():
    with pytest.raises(UcanError, match=r"Prime Pantry is not shipped.*--data"):
        load_recommender("pantry", None, "unused", 0)


def test_an_unknown_scenario(toy):
    with pytest.raises(UcanError, match="unknown scenario 'nonsense'"):
        make_request(toy, "nonsense")
