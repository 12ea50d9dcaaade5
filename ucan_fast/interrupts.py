"""What must not be cut short by Ctrl-C: the ways back."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def finished() -> Iterator[None]:
    """A block that ends before Ctrl-C is heeded: restored weights, removed hooks, modes put back.

    Only the main thread is interrupted, and only there handlers can be changed; elsewhere, and
    where the handler is not Python's to change, the block runs as it is.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    heard: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            before(*heard[0])
