"""Progress: a tqdm bar, the caller's own function, or silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

#: None or False: silent. True: a tqdm bar. Else called as (done, total or None, text).
Progress = bool | Callable[[int, int | None, str], None] | None


def track(items: Iterable[T], sized: object, progress: Progress, text: str) -> Iterator[T]:
    """Pass ``items`` through and tell ``progress`` about each; the total is ``len(sized)``."""
    if not progress:
        yield from items
        return
    try:
        total = len(sized)
    except TypeError:
        total = None
    if progress is True:
        from tqdm.auto import tqdm

        yield from tqdm(items, total=total, desc=text, leave=False)
        return
    progress(0, total, text)
    for done, item in enumerate(items, start=1):
        yield item
        progress(done, total, text)
