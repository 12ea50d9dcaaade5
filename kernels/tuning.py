"""Block sizes, warps and stages per (GPU, kernel, shape class), with a fallback for any GPU.

A committed table instead of ``triton.autotune``, which fails without a GPU, measures again in every
process, and lets the same input give different bits in two of them. A kernel names its shape
classes as it likes; every class needs a ``"default"`` row, and a row for a certain GPU is added
only with a measurement. The ahead-of-time gate compiles every row for every GPU that it can be
used on (:func:`rows`). Rows are measured with ``python -m benchmarks.tune``; the default rows were
chosen by registers and occupancy.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator

import torch

Config = dict[str, int]

#: Name of a row's GPU -> what its device name contains, and its compute capability times ten.
GPUS = {"a100": ("A100", 80), "h100": ("H100", 90), "h200": ("H200", 90), "b200": ("B200", 100)}

#: What the ``"default"`` rows must compile for.
CAPABILITIES = (80, 90, 100)

#: (GPU, dtype, N, K) where fused_linear was measured to beat cuBLAS and expand. None was.
FUSED_LINEAR_WINS: frozenset[tuple[str, torch.dtype, int, int]] = frozenset()

# With three stages ptxas spills a few bytes there, on one architecture or another.
_SPILL_WITH_THREE = (
    (16, "three", "many"),
    (64, "16-bit", "many"),
    (64, "32-bit", "many"),
    (128, "16-bit", "few"),
    (128, "16-bit", "many"),
    (128, "three", "few"),
)

#: kernel -> (GPU, shape class) -> launch options: block sizes, ``num_warps``, ``num_stages``.
TABLE: dict[str, dict[tuple[str, Hashable], Config]] = {
    # (dots, padded rank; 256 is a loop over parts of BLOCK_R). Chosen by registers and occupancy,
    # not measured: tiles of 64 and more rows would take wgmma, whose layout spreads the sums of a
    # column over the warps and spills, as the loop over parts does if it is pipelined.
    "expand": {
        ("default", (dots, rank)): {
            "BLOCK_M": 32,
            "BLOCK_N": 64 if rank <= 64 else 128,
            "BLOCK_R": rank if rank <= 64 else 32,
            "num_warps": 4 if rank <= 64 else 8,
            # With two, one group spills there: Triton 3.7, sm_90.
            "num_stages": 3 if (dots, rank) == ("split", 32) else 2 if rank <= 64 else 1,
        }
        for dots in ("16-bit", "split", "fp32")
        for rank in (16, 32, 64, 256)
    }
    # "ragged" instead: not everything can be read in 16-byte pieces (expand.variant). With an
    # address for every element, fp32 spills with four warps at rank 64 and, with a bias, at rank 16
    # (sm_100), and with 128 columns above rank 64 (all three).
    | {
        ("default", (dots, rank, "ragged")): {
            "BLOCK_M": 32,
            "BLOCK_N": 64,
            "BLOCK_R": rank if rank <= 64 else 32,
            "num_warps": 8 if rank > 32 or (dots, rank) == ("fp32", 16) else 4,
            "num_stages": 2 if rank <= 64 else 1,
        }
        for dots in ("16-bit", "split", "fp32")
        for rank in (16, 32, 64, 256)
    }
    # r = 8 and its like: with four warps Triton 3.6 spills on sm_100 where one group is counted. An
    # fp32 base goes here too: 3.7 spills on sm_80 where one group is counted.
    | {
        ("default", ("16-bit", 16, "odd ranks")): {
            "BLOCK_M": 32,
            "BLOCK_N": 64,
            "BLOCK_R": 16,
            "num_warps": 8,
            "num_stages": 2,
        }
    }
    # 8192 x 4096 in bf16 with fp32 and with bf16 adapters, moments of both groups.
    | {
        ("h100", (dots, 16)): {
            "BLOCK_M": 32,
            "BLOCK_N": 128,
            "BLOCK_R": 16,
            "num_warps": 4,
            "num_stages": 3,
        }
        for dots in ("16-bit", "fp32")
    },
    # (padded rank, dots, few or many rows). 64 columns of 16 bits and 32 of 32 are rows of 128
    # bytes, one swizzle; wide ranks take smaller tiles for the registers' sake.
    "shrink": {
        ("default", (rank, dots, rows)): {
            "BLOCK_M": (
                16
                if rows == "few"
                # 128 spill on sm_100: at rank 64 without moments, with four warps and with eight;
                # at rank 16 on Triton 3.6 where r is below 16.
                else 64
                # In three parts at rank 16, without moments, on sm_80.
                if (rank, dots) in ((16, "32-bit"), (16, "three"), (64, "16-bit"))
                else 128
                # With 64 rows ptxas spills on sm_100, whatever the stages.
                if rank <= 64 or (rank, dots) == (128, "16-bit")
                else 32
                if dots == "32-bit"
                else 64
            ),
            "BLOCK_K": (
                32
                if dots == "32-bit"
                or (dots == "three" and rank >= 64)
                or (rank, rows) == (256, "few")
                # 64 spill on sm_100, with two stages and with three.
                or (rank, dots, rows) == (16, "three", "few")
                else 64
            ),
            "num_warps": 4 if rows == "few" or rank <= 32 else 8,
            "num_stages": 2 if (rank, dots, rows) in _SPILL_WITH_THREE else 3,
        }
        for rank in (16, 32, 64, 128, 256)
        for dots in ("16-bit", "three", "32-bit")
        for rows in ("few", "many")
    }
    # As measured with the moments of both groups, 8192 x 4096 in bf16, which shrink_columns takes
    # by now; 31 µs without.
    | {
        ("h100", (16, "three", "many")): {
            "BLOCK_M": 128,
            "BLOCK_K": 64,
            "num_warps": 4,
            "num_stages": 3,
        }
    }
    # "ragged" instead: x or A cannot be read in 16-byte pieces (shrink.aligned), few rows or many.
    # Every element then takes registers for an address of its own: 128 rows spill at rank 16, and
    # 64 columns at rank 32.
    | {
        ("default", (rank, dots, "ragged")): {
            # 32 rows spill there, on sm_80 or sm_90.
            "BLOCK_M": 16 if (rank, dots) in ((32, "three"), (256, "32-bit")) else 32,
            "BLOCK_K": 32,
            "num_warps": 4 if rank <= 32 else 8,
            "num_stages": 2,
        }
        for rank in (16, 32, 64, 128, 256)
        for dots in ("16-bit", "three", "32-bit")
    },
    # (padded rank, dots), where x is read once for z and its moments (shrink_columns). 256 columns
    # of 16 bits are a row for each warp, and spill at rank 32. With three stages Triton 3.7 spills
    # on sm_90; an H100 was no faster with them in three parts, and 4 µs of 50 in one.
    "shrink_columns": {
        ("default", (rank, dots)): {
            "BLOCK_M": 64,
            "BLOCK_K": 256 if rank == 16 else 128,
            "num_warps": 4,
            "num_stages": 2,
        }
        for rank in (16, 32)
        for dots in ("16-bit", "three")
    },
    # (padded rank, few or many rows); few rows come with many chunks. Where the rank is odd, 64
    # rows spill at rank 16 and 32 at rank 32, on sm_80 or sm_90. Many rows take one part at a time,
    # in an order that no layout changes.
    "shrink_finish": {
        ("default", (rank, rows)): {
            "ROWS": 1 if rows == "few" else {16: 32, 32: 16}.get(rank, 2048 // rank),
            "SPLITS": min(2048 // rank, 64) if rows == "few" else 1,
            "num_warps": 4,
            "num_stages": 3,
        }
        for rank in (16, 32, 64, 128, 256)
        for rows in ("few", "many")
    },
}


def config(kernel: str, key: Hashable, device: torch.device | None = None) -> Config:
    """The row of this GPU for shape class ``key`` if there is one, else the default row.

    Returns a fresh dict that can be passed on as ``**config(...)`` at launch. An unknown GPU, and
    the interpreter, get the default; an unknown class is a KeyError, that is, a bug.
    """
    table = TABLE[kernel]
    row = table.get((gpu_of(device), key))
    return dict(table["default", key] if row is None else row)


def rows(kernel: str) -> Iterator[tuple[str, Hashable, Config, tuple[int, ...]]]:
    """Every row of a kernel: GPU, shape class, options, compute capabilities to compile for."""
    for (gpu, key), row in TABLE[kernel].items():
        yield gpu, key, dict(row), CAPABILITIES if gpu == "default" else (GPUS[gpu][1],)


def fused_linear_wins(device: torch.device, dtype: torch.dtype, n: int, k: int) -> bool:
    """Whether a committed measurement says that ``fused_linear`` beats cuBLAS and ``expand``.

    Args:
        device: of x.
        dtype: of x and the base weight ``[n, k]``.
    """
    # Asked at every call of a layer: the name of the GPU only where it can matter.
    return bool(FUSED_LINEAR_WINS) and (gpu_of(device), dtype, n, k) in FUSED_LINEAR_WINS


def gpu_of(device: torch.device | None) -> str:
    """``"h100"``, ...; ``"default"`` for an unknown GPU and for anything that is none."""
    if device is None or device.type != "cuda":
        return "default"
    index = device.index
    return _gpu_at(torch.cuda.current_device() if index is None else index)


@functools.cache
def _gpu_at(index: int) -> str:
    # Asked at every launch: the driver's answer takes longer than some kernels.
    name = torch.cuda.get_device_name(index)
    return next((gpu for gpu, (part, _) in GPUS.items() if part in name), "default")
