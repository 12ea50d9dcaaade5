"""A data set of 60 users on 40 items, and a recommender on it that trains in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import recommender as module
from benchmarks.quality.recommender import DataSet, Recommender, load_recommender
from ucan_fast.recsys import InteractionLog, forget_genre

USERS, ITEMS = 60, 40
TINY = (
    *(("layers", 1), ("hidden", 16), ("intermediate", 32), ("heads", 2), ("max_length", 16)),
    *(("pretrain_epochs", 1), ("finetune_epochs", 12), ("lora_rank", 4), ("finetune_lr", 1e-2)),
)


def toy_log(*_: object) -> InteractionLog:
    """Users of two tastes: odd ones like the upper half of the items, which is Horror."""
    generator = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        liked = np.arange(ITEMS // 2) + (ITEMS // 2 if user % 2 else 0)
        others = np.setdiff1d(np.arange(ITEMS), liked)
        items = np.concatenate(
            [generator.choice(liked, 9, replace=False), generator.choice(others, 3, replace=False)]
        )
        rows += [(f"u{user}", f"i{item}", time) for time, item in enumerate(items)]
    genres = {f"i{i}": ("Horror",) if i >= ITEMS // 2 else ("Drama",) for i in range(ITEMS)}
    return InteractionLog.from_rows(*zip(*rows, strict=True), genres=genres)


TOY = DataSet("toy", toy_log, lambda log: forget_genre(log, "Horror"), "Horror", recipe=TINY)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """The trained toy recommender."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.DATA_SETS, "toy", TOY)
        return load_recommender("toy", None, Path(tmp_path_factory.mktemp("quality")), seed=0)
