"""accumulate_moments: Σ|h| and Σh² of every column, per token group, in one read of h.

Per element of h: its own bytes are read once; about ten instructions. At bf16 that is 5 a byte,
below what an H100 can issue: the bound is the bandwidth. A thread adds up rows of its own columns
only, in registers, and each of the LANES that a tile of columns then has gets a slot of its own:
4·2·G·n bytes, for 32 to 128 rows. On an H100 8192 x 4096 in bf16 take 36 µs, 23 of which would be
h alone at the 3.0 TB/s that it copies at.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    CompileCase,
    ceil_div,
    fold_,
    lane_sums,
    new_slots,
    on_device,
    rows_of,
    store_sums,
)

#: Rows that are read at a time, and how many such reads are under way: alone and beside a product.
#: With three alone, one group of fp16 spills, Triton 3.7 on sm_100.
ROWS, STAGES_ALONE, STAGES = 16, 4, 3
#: Columns of one warp, 16 bytes a thread, by bytes of an element: a warp reads whole rows, so that
#: a thread holds every LANES-th row of its columns, LANES the number of warps.
COLUMNS = {2: 256, 4: 128}
#: With an address for every element. 32 rows spill here, Triton 3.6 on sm_100, and above beside
#: some products, Triton 3.7 on sm_80.
RAGGED_ROWS, RAGGED_COLUMNS = 16, 128
WARPS = 4
#: Rows of one program: a multiple of the first, at most the second.
PROGRAM_ROWS, MAX_PROGRAM_ROWS = 128, 512
#: Programs that a launch aims at, and a launch of :mod:`.shrink` beside those that work on z. The
#: same on every GPU, so that the order of the sums does not depend on it.
PROGRAMS, PROGRAMS_BESIDE = 256, 512

#: What nothing is known of in any launch, and where h cannot be read in 16-byte pieces.
_NEVER = ["groups", "m", "rows", "only_group"]
RAGGED = [*_NEVER, "h", "n", "stride_m", "stride_n"]


@triton.jit
def tile_moments(
    h,
    groups,
    slots,
    slot,
    tile,
    m,
    n,
    rows,
    stride_m,
    stride_n,
    only_group,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Σ|h| and Σh² over ``rows`` rows of one tile of columns, in one slot for each lane."""
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    abs_f = tl.zeros([LANES, COLUMNS], dtype=tl.float32)
    abs_r = tl.zeros([LANES, COLUMNS], dtype=tl.float32)
    sq_f = tl.zeros([LANES, COLUMNS], dtype=tl.float32)
    sq_r = tl.zeros([LANES, COLUMNS], dtype=tl.float32)
    # The stages are named here: Triton loads only a dot's operands ahead by itself.
    for step in tl.range(0, rows, ROWS, num_stages=STAGES):
        row = slot.to(tl.int64) * rows + step + tl.arange(0, ROWS)
        group = tl.load(groups + row, mask=row < m, other=-1)
        address = h + row[:, None] * stride_m + column.to(tl.int64)[None, :] * stride_n
        value = tl.load(address, mask=(row < m)[:, None] & (column < n)[None, :], other=0.0)
        a_f, a_r, s_f, s_r = lane_sums(value.to(tl.float32), group, only_group, BOTH, LANES)
        abs_f += a_f
        abs_r += a_r
        sq_f += s_f
        sq_r += s_r
    # A slot for every lane: to add them up here would send them through shared memory, against its
    # banks, and take as long as two hundred rows.
    lane = slot.to(tl.int64) * LANES + tl.arange(0, LANES)
    store_sums(slots, lane[:, None], column[None, :], n, abs_f, abs_r, sq_f, sq_r, BOTH)


@triton.jit(do_not_specialize=_NEVER)
def moments_kernel(
    h,
    groups,
    slots,
    m,
    n,
    rows,
    stride_m,
    stride_n,
    only_group,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: some rows of one tile of columns."""
    tiles = tl.cdiv(n, COLUMNS)
    # Neighbouring programs take neighbouring columns: whole rows of h at a time.
    tile_moments(
        h,
        groups,
        slots,
        tl.program_id(0) // tiles,
        tl.program_id(0) % tiles,
        m,
        n,
        rows,
        stride_m,
        stride_n,
        only_group,
        BOTH,
        ROWS,
        COLUMNS,
        LANES,
        STAGES,
    )


#: The same kernel for any other h: every odd size, stride and pointer runs the one machine code
#: that the gate has seen.
moments_ragged = triton.jit(moments_kernel.fn, do_not_specialize=RAGGED)


def accumulate_moments_(
    h: torch.Tensor, groups: torch.Tensor, moments: torch.Tensor, only_group: int | None = None
) -> None:
    """Adds the moments of ``h`` to ``moments``, in place.

    Args:
        h: ``[..., n]``, fp32, bf16 or fp16, any strides; slower where rows do not begin and end at
            multiples of 16 elements.
        groups: integers ``[tokens]``: 0 forget, 1 retain, else ignored.
        moments: fp64 ``[2, 2, n]``.
        only_group: 0 or 1 counts only that group's tokens, at half the arithmetic.
    """
    h = rows_of(h)
    m, n = h.shape
    if m == 0 or n == 0:
        return
    numbers = (h.data_ptr(), h.stride(0), n)
    smooth = h.stride(1) == 1 and not any(number % 16 for number in numbers)
    blocks = tile_of(h.element_size(), smooth, WARPS, STAGES_ALONE)
    tiles = ceil_div(n, blocks["COLUMNS"])
    rows = program_rows(m, tiles, PROGRAMS)
    count = ceil_div(m, rows)
    slots = new_slots(count * blocks["LANES"], n, only_group, h.device)
    kernel = moments_kernel if smooth else moments_ragged
    only = -1 if only_group is None else only_group
    with on_device(h):
        kernel[(count * tiles,)](
            *(h, groups.contiguous(), slots, m, n, rows, *h.stride(), only),
            BOTH=only_group is None,
            **blocks,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    fold_(slots, moments, only_group)


def tile_of(itemsize: int, smooth: bool, warps: int, stages: int = STAGES) -> dict[str, int]:
    """The constants of :func:`tile_moments`: rows that can be read in 16-byte pieces, or others."""
    blocks = {"ROWS": RAGGED_ROWS, "COLUMNS": RAGGED_COLUMNS, "LANES": warps, "STAGES": 1}
    if smooth:
        blocks |= {"ROWS": ROWS, "COLUMNS": COLUMNS[itemsize], "STAGES": stages}
    return blocks


def program_rows(m: int, tiles: int, programs: int) -> int:
    """How many rows one program adds up: few keep all SMs busy, many mean few slots."""
    wanted = ceil_div(m, PROGRAM_ROWS) * tiles // programs
    return PROGRAM_ROWS * min(max(wanted, 1), MAX_PROGRAM_ROWS // PROGRAM_ROWS)


def compile_cases() -> list[CompileCase]:
    """As launched: the three dtypes, both groups and one, aligned rows and others."""
    return [
        CompileCase(
            name=f"{dtype} h, {'both groups' if both else 'one group'}"
            + ("" if smooth else ", ragged, groups of 64 bits"),
            kernel=moments_kernel if smooth else moments_ragged,
            signature={
                "h": f"*{dtype}",
                "groups": "*i8" if smooth else "*i64",
                "slots": "*fp32",
                "m": "i32",
                "n": "i32",
                "rows": "i32",
                "stride_m": "i32",
                "stride_n": "constexpr" if smooth else "i32",
                "only_group": "i32",
                **dict.fromkeys(("BOTH", "ROWS", "COLUMNS", "LANES", "STAGES"), "constexpr"),
            },
            constants={
                **({"stride_n": 1} if smooth else {}),
                "BOTH": both,
                **tile_of(4 if dtype == "fp32" else 2, smooth, WARPS, STAGES_ALONE),
            },
            num_warps=WARPS,
            divisible=("h", "slots", "n", "stride_m") if smooth else ("slots",),
            wide_loads=smooth,
        )
        for dtype in ("fp32", "bf16", "fp16")
        for both in (True, False)
        for smooth in (True, False)
    ]
