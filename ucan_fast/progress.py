"""Progress: a tqdm bar, the caller's own function, or silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

#: None or False: silent. True: a tqdm bar. Else called as (done, total or None, text).
Progress = bool | Callable[[int, int | None, str], None] | None


def track(items: Iterable[T], sized: object, progress: Progress, text: str) -> Iterator[T]:
    """Pass ``items`` through, telling ``progress`` about each; ``sized`` gives the total if it can."""
    if not progress:
        yield from items
        return
    total = len(sized) if hasattr(sized, "__len__") else None
    if progress is True:
        from tqdm.auto import tqdm

        yield from tqdm(items, total=total, desc=text, leave=False)
        return
    progress(0, total, text)
    for done, item in enumerate(items, start=1):
        yield item
        progress(done, total, text)
