"""Which interactions are to be forgotten: bool masks over the rows of an `InteractionLog`.

A user- or genre-wise mask depends only on ids, so on the parts of a leave-one-out split the same
call (same seed) names the same users or films in every part.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..errors import UcanError
from .data import InteractionLog

__all__ = ["forget_genre", "forget_random_interactions", "forget_random_users", "forget_users"]


def forget_random_users(log: InteractionLog, fraction: float, seed: int) -> np.ndarray:
    """All rows of `fraction` (in (0, 1]) of the users, drawn by `seed`; at least one user.

    Drawn among all `log.n_users` ids. Returns bool `[len(log)]`.
    """
    chosen = _draw(log.n_users, fraction, seed, "forget_random_users")
    return chosen[log.user]


def forget_random_interactions(log: InteractionLog, fraction: float, seed: int) -> np.ndarray:
    """`fraction` (in (0, 1]) of all rows, drawn by `seed`; at least one. Bool `[len(log)]`."""
    return _draw(len(log), fraction, seed, "forget_random_interactions")


def forget_genre(log: InteractionLog, genre: str) -> np.ndarray:
    """All rows whose item is of `genre`, spelled as in the data. Bool `[len(log)]`.

    UcanError lists the known genres when this is none of them.
    """
    of_genre = np.array([genre in genres for genres in log.genres], dtype=bool)
    if not of_genre.any():
        known = sorted({name for genres in log.genres for name in genres})
        raise UcanError(
            f"forget_genre: no item has the genre {genre!r}; "
            + (f"known: {', '.join(known)}." if known else "this log has no genres.")
        )
    return of_genre[log.item]


def forget_users(log: InteractionLog, users: Iterable[str | int]) -> np.ndarray:
    """All rows of the users named by `users`: their ids in the data (`log.user_ids`).

    Bool `[len(log)]`. UcanError names ids that the log does not know, or an empty list.
    """
    wanted = [users] if isinstance(users, str | int) else list(users)
    if not wanted:
        raise UcanError("forget_users: the list of users is empty; name at least one user id.")
    index = {name: i for i, name in enumerate(log.user_ids)}
    unknown = [str(user) for user in wanted if str(user) not in index]
    if unknown:
        raise UcanError(
            f"forget_users: {len(unknown)} of {len(wanted)} user ids are not in the log "
            f"({', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}); give ids as in "
            f"log.user_ids, such as {', '.join(map(repr, log.user_ids[:3]))}."
        )
    chosen = np.zeros(log.n_users, dtype=bool)
    chosen[[index[str(user)] for user in wanted]] = True
    return chosen[log.user]


def _draw(count: int, fraction: float, seed: int, name: str) -> np.ndarray:
    if not 0 < fraction <= 1:
        raise UcanError(f"{name}: fraction is {fraction}; it must lie in (0, 1].")
    if count == 0:
        raise UcanError(f"{name}: the log is empty; there is nothing to forget.")
    size = max(1, round(fraction * count))
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng(seed).choice(count, size=size, replace=False)] = True
    return chosen
