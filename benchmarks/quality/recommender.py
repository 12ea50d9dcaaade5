"""A small Llama on item tokens, trained on one data set, and the requests to delete from it."""

from __future__ import annotations

import dataclasses
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

import ucan_fast as uf
from ucan_fast import recsys

from ..model.demo import example
from .case import SIDES, Batch, Case, lora_weights

#: Scenarios: what is to be deleted.
SCENARIOS = ("interactions", "users", "one-percent", "one-user", "genre", "taste")
QUARTER = 0.25
#: Of all users: never trained on. The base is pre-trained on those who are left.
NEVER_SEEN = 0.06
#: Users of each side whose sequences a point of a curve is measured on.
CURVE_USERS = {"forget": 80, "calibration": 40, "retain": 60}
#: Users that strengths are calibrated on, and that the full metrics are measured on.
CALIBRATION_USERS, JUDGED_USERS = 80, 100


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        folder: its name below the data folder, or None where it is fetched.
        genre: what the scenarios ``genre`` and ``taste`` are about.
        tuned: the share of all users that the adapter is trained on.
        recipe: changes to the recipe of ``examples/movielens.py``.
    """

    title: str
    load: Callable[[Path | None, Path], recsys.InteractionLog]
    of_genre: Callable[[recsys.InteractionLog], np.ndarray]
    genre: str
    folder: str | None = None
    tuned: float = 1 / 3
    recipe: tuple[tuple[str, Any], ...] = ()


def _with_word(*words: str) -> Callable[[recsys.InteractionLog], np.ndarray]:
    pattern = re.compile(rf"\b({'|'.join(words)})s?\b", re.IGNORECASE)

    def of_genre(log: recsys.InteractionLog) -> np.ndarray:
        return np.array([bool(pattern.search(title)) for title in log.titles])[log.item]

    return of_genre


def _of_genre(genre: str) -> Callable[[recsys.InteractionLog], np.ndarray]:
    return lambda log: recsys.forget_genre(log, genre)


DATA_SETS = {
    "ml-100k": DataSet(
        "MovieLens ml-100k",
        lambda folder, cache: recsys.load_movielens_100k(folder, cache_dir=cache),
        _of_genre("Horror"),
        "Horror films",
    ),
    "ml-latest-small": DataSet(
        "MovieLens ml-latest-small (LlamaRec's ML-100k)",
        # One rating of some copies is damaged.
        lambda folder, _: recsys.load_movielens_latest_small(folder, skip_bad_ratings=True),
        _of_genre("Horror"),
        "Horror films",
        "ml-latest-small",
    ),
    "pantry": DataSet(
        "Amazon Prime Pantry",
        lambda folder, _: recsys.load_pantry(folder),
        _with_word("coffee", "tea"),
        "coffee and tea",
        "pantry",
        tuned=0.12,
        # Histories of nine items: four times as many of them fill a batch.
        recipe=(("batch_size", 64),),
    ),
}


@dataclass
class Recommender:
    """A trained recommender and its data."""

    name: str
    data_set: DataSet
    recipe: Any
    data: Any
    never_seen: np.ndarray
    folder: Path

    def model(self) -> PeftModel:
        """A fresh copy, in eval mode."""
        base = LlamaForCausalLM.from_pretrained(self.folder / "base")
        return PeftModel.from_pretrained(base, self.folder / "adapter").eval()

    def retrained(self, forget_train: np.ndarray) -> tuple[dict[str, torch.Tensor], float]:
        """An adapter trained by the same recipe without these rows, and the seconds it took."""
        rest = dataclasses.replace(self.data, train=self.data.train.rows(~forget_train))
        base = LlamaForCausalLM.from_pretrained(self.folder / "base")
        torch.manual_seed(self.recipe.seed)
        start = time.perf_counter()
        # Who has nothing left is in no batch.
        batches = rest.batches(self.recipe, self.data.tuned_users)
        weights = lora_weights(example().fine_tune(base, self.recipe, batches))
        seconds = time.perf_counter() - start
        return {name: weight.detach() for name, weight in weights.items()}, seconds


@dataclass(frozen=True)
class Request:
    """What is to be deleted: rows of the training data, and their counterparts held out.

    ``like_it`` are the rows, of any user, that would be deleted if they were in the request: what
    never-seen users have of them is what an attacker compares with.
    """

    scenario: str
    title: str
    forget_train: np.ndarray
    forget_test: np.ndarray
    like_it: np.ndarray


def load_recommender(name: str, data: Path | None, cache: Path, seed: int) -> Recommender:
    """The recommender of a data set, trained now if it is not in the cache.

    Raises:
        UcanError: the data cannot be had.
    """
    data_set = DATA_SETS[name]
    if data_set.folder is not None and data is None:
        raise uf.UcanError(
            f"{data_set.title} is not shipped and not fetched: name the folder that holds "
            f"{data_set.folder}/ with --data (benchmarks/quality/README.md says where it is from)."
        )
    folder = data / data_set.folder if data_set.folder else None
    movielens = example()
    recipe = movielens.Recipe(seed=seed, **dict(data_set.recipe))
    log = recsys.k_core(recsys.deduplicate(data_set.load(folder, cache)), 5)
    from_end = np.cumsum(np.bincount(log.user))[log.user] - np.arange(len(log))
    log = log.rows(from_end <= recipe.max_length + 1)
    parts = recsys.leave_one_out(log)
    users = np.random.default_rng(seed).permutation(log.n_users)
    never, tuned = round(NEVER_SEEN * len(users)), round(data_set.tuned * len(users))
    never_seen = np.sort(users[:never])
    tuned_users = np.sort(users[never : never + tuned])
    base_users = np.sort(users[never + tuned :])
    prepared = movielens.Data(
        parts.train.join(parts.validation),
        parts.test,
        base_users,
        tuned_users,
        recsys.ItemVocabulary(log.n_items),
    )
    _, trained = movielens.train_or_load(recipe, prepared, cache / "quality")
    return Recommender(name, data_set, recipe, prepared, never_seen, trained)


def make_request(recommender: Recommender, scenario: str) -> Request:
    """The rows that a scenario is about, among those that the adapter was trained on.

    Raises:
        UcanError: there is no such scenario.
    """
    if scenario not in SCENARIOS:
        raise uf.UcanError(f"unknown scenario {scenario!r}; known: {', '.join(SCENARIOS)}.")
    data, genre = recommender.data, recommender.data_set.genre
    generator = np.random.default_rng([recommender.recipe.seed, SCENARIOS.index(scenario)])
    logs = (data.train, data.test)
    tuned = [np.isin(log.user, data.tuned_users) for log in logs]

    def drawn(count: int) -> list[np.ndarray]:
        users = generator.choice(data.tuned_users, max(1, count), replace=False)
        return [np.isin(log.user, users) for log in logs]

    count, all_rows = len(data.tuned_users), np.ones(len(data.train), bool)
    if scenario == "interactions":
        drawn_rows = generator.random(len(data.train)) < QUARTER
        train = tuned[0] & drawn_rows
        return Request(
            scenario, "25 % of the interactions", train, np.zeros(len(data.test), bool), drawn_rows
        )
    if scenario == "users":
        return Request(scenario, "25 % of the users", *drawn(round(QUARTER * count)), all_rows)
    if scenario == "one-percent":
        return Request(scenario, "1 % of the users", *drawn(round(0.01 * count)), all_rows)
    if scenario == "one-user":
        # Of those with a history to speak of.
        lengths = np.bincount(data.train.user, minlength=data.train.n_users)[data.tuned_users]
        long = data.tuned_users[lengths >= np.median(lengths)]
        user = generator.choice(long, 1)
        return Request(scenario, "one user", *[np.isin(log.user, user) for log in logs], all_rows)
    by_genre = [recommender.data_set.of_genre(log) for log in logs]
    if scenario == "genre":
        rows = [g & t for g, t in zip(by_genre, tuned, strict=True)]
        return Request(scenario, f"all {genre}", *rows, by_genre[0])
    # A taste: users with the largest share of the genre.
    seen = np.bincount(data.train.user, minlength=data.train.n_users)
    liked = np.bincount(data.train.user[by_genre[0]], minlength=data.train.n_users)
    share = liked / np.maximum(seen, 1)
    order = np.argsort(-share[data.tuned_users], kind="stable")
    users = data.tuned_users[order[: max(1, round(0.1 * count))]]
    alike = share >= share[users].min()
    title = f"the 10 % of the users with most {genre}"
    rows = [np.isin(log.user, users) for log in logs]
    return Request(scenario, title, *rows, alike[data.train.user])


def make_case(
    recommender: Recommender,
    request: Request,
    model: PeftModel,
    *,
    coarse: bool = False,
    share: float = 1.0,
) -> Case:
    """The request as a method gets it, and how it is judged.

    Args:
        coarse: see :class:`Case`.
        share: of the users that are measured on otherwise.
    """
    data, recipe = recommender.data, recommender.recipe
    generator = np.random.default_rng([recipe.seed, 1000])
    forgetters = np.unique(data.train.user[request.forget_train])
    kept = np.isin(data.train.user, data.tuned_users) & ~request.forget_train
    retained = generator.permutation(np.unique(data.train.user[kept]))
    calibration, judged = retained[0::2], retained[1::2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", uf.UcanWarning)
        forget = data.batches(
            recipe, data.tuned_users, forget=request.forget_train, only_forget_users=True
        )
        retain = data.batches(recipe, data.tuned_users, forget=request.forget_train)
        holdout = data.batches(
            recipe, recommender.never_seen, forget=request.like_it, only_forget_users=True
        )
        tried = calibration[:CALIBRATION_USERS]
        calibrated = data.batches(recipe, tried, forget=request.forget_train)
    pools = (generator.permutation(forgetters), calibration, judged)
    users = {
        side: pool[: round(share * CURVE_USERS[side])]
        for side, pool in zip(SIDES, pools, strict=True)
    }
    batches, sides = _sided(recommender, request, users)

    def ranks() -> dict[str, torch.Tensor]:
        found = recsys.next_item_ranks(model, batches, group=None, vocabulary=data.vocabulary)
        return {side: found[sides == index] for index, side in enumerate(SIDES)}

    judged = judged[: round(share * JUDGED_USERS)]

    def measure() -> dict[str, float]:
        # Who is in the forget set may be a calibration user too: their retained items count on
        # no side, so that the retain side is of users that nothing was tuned on.
        found = {}
        for side, chosen in (("forget", users["forget"]), ("retain", judged)):
            measured = recsys.evaluate_sequences(
                model,
                data.train,
                data.test,
                request.forget_train,
                request.forget_test,
                vocabulary=data.vocabulary,
                users=chosen,
                max_length=recipe.max_length,
            )
            found |= {name: v for name, v in measured.items() if name.startswith(side)}
        return found

    return Case(
        name=f"{recommender.name}-{recipe.seed}-{request.scenario}",
        model=model,
        forget=forget,
        retain=retain,
        calibration=calibrated,
        holdout=holdout,
        ranks=ranks,
        measure=measure,
        retrain=lambda: recommender.retrained(request.forget_train),
        seed=recipe.seed,
        coarse=coarse,
    )


def _sided(
    recommender: Recommender, request: Request, users: dict[str, np.ndarray]
) -> tuple[list[Batch], torch.Tensor]:
    """Sequences of all these users, and the side of every scored item, as an index of SIDES.

    A retained item counts for the side that its user was drawn for, on none if for neither.
    """
    data = recommender.data
    everybody = np.unique(np.concatenate(list(users.values())))
    side_of_user = np.full(data.train.n_users, -1)
    for index, side in enumerate(SIDES[1:], start=1):
        side_of_user[users[side]] = index
    # Every batch scores all its items; -1 among the sides is measured and left out.
    side_of_row = np.where(request.forget_train, 0, side_of_user[data.train.user])
    forgotten = ~np.isin(data.train.user, users["forget"]) & request.forget_train
    side_of_row[forgotten] = -1
    batches = data.batches(recommender.recipe, everybody)
    groups = torch.cat([b["token_groups"][b["token_groups"] >= 0] for b in batches])
    sides = torch.full_like(groups, -1)
    for index in range(len(SIDES)):
        # The same sequences in the same order, this side's items marked.
        marked = data.batches(recommender.recipe, everybody, forget=side_of_row == index)
        found = torch.cat([b["token_groups"][b["token_groups"] >= 0] for b in marked])
        sides[found == 0] = index
    return batches, sides
