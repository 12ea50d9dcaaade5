"""What :mod:`.shrink` launches first where x is long and its moments are asked for: one read of x.

A program owns a tile of 256 columns and some rows. A's tile stays where it is, and the moments of
these columns are sums in registers over all rows of the program, because a thread adds up rows of
its own columns only (:func:`.common.lane_sums`). What these columns add to z, the program stores
for every block of rows; :mod:`.shrink` adds up the parts. That is 4·r/256 bytes, written and read
again from the L2 cache, for every element of x of two bytes: 12 % of x each way at r = 16. Above
that tiles have 128 columns, for the registers' sake, and at rank 32 it is half of x each way; for
more, programs that own rows take over.

An fp32 A is three bf16 parts, stacked: one dot with 4 r columns, a fourth of them zeros, is a third
of the instructions of three dots.

An x of infinity under such an A makes NaN of its row of z: it meets the zeros.

Bytes at M tokens, K columns: 2·M·K for x, once; A once; 4·(K/256)·M·r for z's parts; slots of
16·K bytes for every 16 to 128 rows. Operations: 2·M·K·r in the dot (8·M·K·r with A in parts, of
which three quarters are asked for) and about ten an element for the moments. On an H100 (copies at
3.0 TB/s) all of shrink took 52 µs for 8192 x 4096 in bf16, an fp32 A of rank 16 and all moments,
where two reads of x took 55: 38 are this kernel's (x alone would be 22.5, z's parts 2.8), 6 the
next one's, and the rest is the last launch and what lies between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning
from .common import (
    CAST_DOT,
    TRITON_DTYPES,
    CompileCase,
    as_operand,
    ceil_div,
    lane_sums,
    new_slots,
    on_device,
    pad_rank,
    store_sums,
)

#: The widest padded rank whose parts of z are worth their bytes.
MAX_PADDED_RANK = 32
#: Programs that a launch aims at, two for each of an H100's 132 SMs, and the fewest for which it
#: is worth while. The same on every GPU, so that the order of the sums does not depend on it.
PROGRAMS, FEWEST_PROGRAMS = 256, 132
#: At most so many rows are added up in fp32.
SLOT_ROWS = 128
#: Strides above this do not fit the 32-bit offsets within one block of rows.
MAX_STRIDE = 1 << 24

#: What nothing is known of in any launch.
_NEVER = ["groups", "m", "r", "rows", "only_group"]


@triton.jit
def stacked_parts(a_tile, part, OPERAND: tl.constexpr, CAST_DOT: tl.constexpr):
    """Rows of an fp32 A in its ``part``: bf16's nearest, what that leaves, what both leave, zeros.

    a_tile: fp32 ``[rows, columns]``; part: ``[rows]``, 0 to 3.
    """
    high = as_operand(a_tile, OPERAND, CAST_DOT)
    rest = a_tile - high.to(tl.float32)
    middle = as_operand(rest, OPERAND, CAST_DOT)
    low = as_operand(rest - middle.to(tl.float32), OPERAND, CAST_DOT)
    chosen = tl.where((part == 0)[:, None], high, tl.where((part == 1)[:, None], middle, low))
    return tl.where((part < 3)[:, None], chosen, 0.0)


@triton.jit(do_not_specialize=_NEVER)
def shrink_columns_kernel(
    x,
    a,
    parts,
    groups,
    slots,
    m,
    k,
    r,
    rows,
    stride_m,
    only_group,
    OPERAND: tl.constexpr,
    PARTS: tl.constexpr,
    BOTH: tl.constexpr,
    CAST_DOT: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: ``rows`` rows of one tile of columns. ``parts`` is fp32 ``[tiles, m, r]``."""
    tiles = tl.cdiv(k, BLOCK_K)
    # Neighbouring programs take neighbouring columns: whole rows of x at a time.
    slot = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    column = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (column < k)[None, :]
    rank = tl.arange(0, R_PAD)
    stacked = tl.arange(0, R_PAD * PARTS)
    a_row = stacked % R_PAD
    a_address = a + a_row.to(tl.int64)[:, None] * k + column[None, :]
    a_tile = tl.load(a_address, mask=(a_row < r)[:, None] & inside, other=0.0)
    if PARTS == 1:
        right = as_operand(a_tile, OPERAND, CAST_DOT)
    else:
        right = stacked_parts(a_tile, stacked // R_PAD, OPERAND, CAST_DOT)
    right = tl.trans(right)
    abs_f = tl.zeros([LANES, BLOCK_K], dtype=tl.float32)
    abs_r = tl.zeros([LANES, BLOCK_K], dtype=tl.float32)
    sq_f = tl.zeros([LANES, BLOCK_K], dtype=tl.float32)
    sq_r = tl.zeros([LANES, BLOCK_K], dtype=tl.float32)
    own = parts + tile.to(tl.int64) * m * r
    first = slot * rows
    block = tl.arange(0, BLOCK_M)
    x_offsets = block[:, None] * stride_m + column[None, :]
    z_offsets = block[:, None] * r + rank[None, :]
    row = first + block
    ahead = tl.load(groups + row, mask=row < m, other=-1)
    # The stages are named here: Triton loads only a dot's operands ahead by itself.
    for step in tl.range(0, rows, BLOCK_M, num_stages=STAGES):
        start = first + step
        row = start + block
        present = (row < m)[:, None]
        address = x + start.to(tl.int64) * stride_m + x_offsets
        value = tl.load(address, mask=present & inside, other=0.0)
        # A byte is too narrow for the loads that run ahead; this one is a block ahead by hand.
        group = ahead
        ahead = tl.load(groups + row + BLOCK_M, mask=row + BLOCK_M < m, other=-1)
        left = as_operand(value, OPERAND, CAST_DOT)
        z = tl.zeros([BLOCK_M, R_PAD * PARTS], dtype=tl.float32)
        z = tl.dot(left, right, z)
        if PARTS > 1:
            z = tl.sum(tl.reshape(z, [BLOCK_M, PARTS, R_PAD]), axis=1)
        target = own + start.to(tl.int64) * r + z_offsets
        tl.store(target, z, mask=present & (rank < r)[None, :])
        a_f, a_r, s_f, s_r = lane_sums(value.to(tl.float32), group, only_group, BOTH, LANES)
        abs_f += a_f
        abs_r += a_r
        sq_f += s_f
        sq_r += s_r
    # A slot for every lane: to add them up here would send them through shared memory.
    lane = slot.to(tl.int64) * LANES + tl.arange(0, LANES)
    store_sums(slots, lane[:, None], column[None, :], k, abs_f, abs_r, sq_f, sq_r, BOTH)


def row_of(
    x: torch.Tensor, groups: torch.Tensor, r_pad: int, operand: torch.dtype, split_a: bool
) -> tuning.Config | None:
    """The launch options, where this kernel is the one to take, else None.

    Args:
        x: ``[M, K]``, its rows in 16-byte pieces (:func:`.shrink.aligned`).
        groups: integers ``[M]``; wider than a byte they spill.
        r_pad: the padded rank.
        operand: dtype of the dot's operands.
        split_a: whether A is split in parts.
    """
    m, k = x.shape
    if operand != x.dtype or x.itemsize != 2 or groups.itemsize != 1:
        return None
    if r_pad > MAX_PADDED_RANK or x.stride(0) > MAX_STRIDE:
        return None
    row = tuning.config("shrink_columns", (r_pad, "three" if split_a else "16-bit"), x.device)
    programs = m // row["BLOCK_M"] * ceil_div(k, row["BLOCK_K"])
    return row if programs >= FEWEST_PROGRAMS else None


def parts_and_slots(
    x: torch.Tensor,
    a: torch.Tensor,
    row: tuning.Config,
    operand: torch.dtype,
    split_a: bool,
    groups: torch.Tensor,
    only_group: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch. z is the sum of the parts, the moments of x are the sums of the slots.

    Args:
        x: ``[M, K]``, as :func:`row_of` took it; a: ``[r, K]``, contiguous.
        row: from :func:`row_of`.
        groups: integers ``[M]``, contiguous.

    Returns:
        fp32 parts ``[tiles, M, r]`` and slots ``[S, 2, G, K]``, as :func:`.common.new_slots`.
    """
    (m, k), r = x.shape, a.shape[0]
    tiles = ceil_div(k, row["BLOCK_K"])
    rows = ceil_div(ceil_div(m, max(PROGRAMS // tiles, 1)), row["BLOCK_M"]) * row["BLOCK_M"]
    lanes = lanes_of(row)
    rows = min(rows, SLOT_ROWS * lanes)
    count = ceil_div(m, rows)
    parts = x.new_empty((tiles, m, r), dtype=torch.float32)
    slots = new_slots(count * lanes, k, only_group, x.device)
    with on_device(x):
        shrink_columns_kernel[(count * tiles,)](
            *(x, a, parts, groups, slots, m, k, r, rows, x.stride(0)),
            -1 if only_group is None else only_group,
            OPERAND=TRITON_DTYPES[operand],
            PARTS=_PARTS if split_a else 1,
            BOTH=only_group is None,
            CAST_DOT=CAST_DOT,
            R_PAD=pad_rank(r),
            LANES=lanes,
            STAGES=row["num_stages"],
            enable_fp_fusion=True,
            **row,
        )
    return parts, slots


#: Three, and zeros to make it a power of two.
_PARTS = 4


def lanes_of(row: tuning.Config) -> int:
    """Into how many sums the rows of a column go: a warp reads 256 columns of one row at a time."""
    return 32 * 8 * row["num_warps"] // row["BLOCK_K"]


def compile_cases() -> list[CompileCase]:
    """As launched: the 16-bit dtypes and bf16 under an fp32 A, both groups and one."""
    cases = []
    for gpu, (rank, dots), row, capabilities in tuning.rows("shrink_columns"):
        options = {name: row[name] for name in ("num_warps", "num_stages")}
        blocks = {name: row[name] for name in ("BLOCK_M", "BLOCK_K")}
        kinds = [("bf16", "fp32")] if dots == "three" else [("bf16", "bf16"), ("fp16", "fp16")]
        if dots == "16-bit":
            kinds += [("bf16", "fp32"), ("fp16", "fp32")]  # autocast
        for x, a in kinds:
            for both in (True, False):
                constants = {
                    "OPERAND": tl.bfloat16 if x == "bf16" else tl.float16,
                    "PARTS": _PARTS if dots == "three" else 1,
                    "BOTH": both,
                    "CAST_DOT": True,
                    "R_PAD": rank,
                    "LANES": lanes_of(row),
                    "STAGES": row["num_stages"],
                    **blocks,
                }
                cases.append(
                    CompileCase(
                        name=f"{x} x, {a} A{' in three parts' * (dots == 'three')}, r {rank}, "
                        f"{'both groups' if both else 'one group'}, {gpu}",
                        kernel=shrink_columns_kernel,
                        signature=dict.fromkeys(shrink_columns_kernel.arg_names, "constexpr")
                        | {"x": f"*{x}", "a": f"*{a}", "groups": "*i8"}
                        | dict.fromkeys(("parts", "slots"), "*fp32")
                        | dict.fromkeys(("m", "k", "r", "rows", "stride_m", "only_group"), "i32"),
                        constants=constants,
                        divisible=("x", "a", "parts", "slots", "k", "stride_m"),
                        dot=True,
                        capabilities=capabilities,
                        **options,
                    )
                )
    return cases
