"""Memory with an inaccessible page on either side, and address space larger than the machine's.

A kernel that reads or writes one element past the end of a tensor mostly gets away with it. Beside
such a page the process ends at once, as under compute-sanitizer on a GPU.
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import mmap
import multiprocessing
import sys
from collections.abc import Callable

import pytest
import torch

linux = pytest.mark.skipif(sys.platform != "linux", reason=f"no guard pages on {sys.platform}")

_PAGE = mmap.PAGESIZE
_MAP_NORESERVE = 0x4000  # Linux's number; the mmap module knows it only from Python 3.13 on
_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: torch.Tensor, side: str) -> torch.Tensor:
    """A contiguous copy whose ``"end"`` or ``"start"`` is the border to an inaccessible page."""
    copy = guarded_empty(tensor.shape, tensor.dtype, side)
    return copy.copy_(tensor)


def guarded_empty(shape: tuple[int, ...], dtype: torch.dtype, side: str) -> torch.Tensor:
    """Uninitialised but for NaN."""
    count = math.prod(shape)
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    size = count * dtype.itemsize
    pages = -(-size // _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if _libc.mprotect(ctypes.c_void_p(start + page * _PAGE), _PAGE, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = _PAGE if side == "start" else (pages + 1) * _PAGE - size
    tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
    return tensor.fill_(torch.nan) if dtype.is_floating_point else tensor.zero_()


def far_rows(rows: torch.Tensor, stride: int = 1 << 30) -> torch.Tensor:
    """The same values, ``stride`` elements from row to row, in memory that is hardly touched.

    With three rows the last begins at element 2^31, which 32 bits cannot count to.
    """
    count = (rows.shape[0] - 1) * stride + rows.shape[1]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, count * rows.dtype.itemsize, flags=flags)
    far = torch.frombuffer(memory, dtype=rows.dtype, count=count).as_strided(
        rows.shape, (stride, 1)
    )
    return far.copy_(rows)


def survives(function: Callable[..., None], *arguments: object) -> None:
    """Runs it in a forked process: what would end this one is a failed assertion instead."""
    process = multiprocessing.get_context("fork").Process(
        target=_alone, args=(function, *arguments)
    )
    process.start()
    process.join()
    what = f"signal {-process.exitcode}" if process.exitcode < 0 else "an error (see above)"
    assert process.exitcode == 0, f"{function.__name__}{arguments} ended with {what}"


def _alone(function: Callable[..., None], *arguments: object) -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    faulthandler.disable()  # an end by a signal may be what is wanted
    function(*arguments)
