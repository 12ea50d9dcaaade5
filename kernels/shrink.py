"""shrink: ``z = x Aᵀ`` and the moments of x and of z, in two or three launches.

Where x is long, its moments are asked for and it is an operand as it is (16 bits, under an A of its
own dtype, or bf16 under an fp32 A), :mod:`.shrink_columns` reads it once for both, up to rank 32.
Everything else is here. A program does one of two things. Most own a block of
rows and a chunk of columns of x: at 8192 tokens there are only 64 blocks of 128 rows, or 128 of 64,
for the 132 SMs of an H100. They loop over the chunk and add to z in fp32; partial z go to a
workspace, and :mod:`.shrink_finish` adds them in a fixed order, rounds once and takes the moments
of z. With one chunk and no moments of z the first kernel writes z itself. Beside them, where the
moments of x are asked for, others take those of a tile of columns of the same rows
(:func:`.moments.tile_moments`): x is read twice.

z has the same bits whether moments are taken or not, except where :mod:`.shrink_columns` adds up
the same products in another order.

Bytes at M tokens, K columns, rank r, S chunks, blocks of b rows, e bytes per element: M·K·e for x,
once or twice; A is read from L2 by each of the M/b blocks of rows; the slots are 4·2·G·K for every
16 to 128 rows, written and read by the fold (with two groups 12 % of x in bf16, each way, at 64
rows); the partial sums 8·S·M·r (at K = 4096, r = 16 and S = 4, 6 % of x in bf16). Operations:
2·M·K·r in the dot (three times that where fp32's digits need three products) and about ten a value
for the moments of two groups. On an H100 (copies at 3.0 TB/s) 8192 x 4096 in bf16, r = 16 and an
fp32 A, without moments: 31 µs, of which x alone would be 22.5.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import shrink_columns, tuning
from .common import (
    CAST_DOT,
    TRITON_DTYPES,
    CompileCase,
    as_operand,
    ceil_div,
    fold_,
    new_slots,
    on_device,
    pad_rank,
    round_to,
    rows_of,
)
from .moments import PROGRAMS_BESIDE, accumulate_moments_, program_rows, tile_moments, tile_of
from .shrink_finish import FEW_ROWS, finish_

#: The widest A of one launch; wider ones take several.
MAX_RANK = 256
#: Programs of one wave, and of two per SM: an H100 has 132 SMs.
WAVE, TWO_PER_SM = 132, 264
MAX_SPLITS = 64


#: What nothing is known of in any launch.
_NEVER = ["groups", "m", "splits", "blocks", "rows", "only_group"]


@triton.jit
def partial_z(
    x,
    a,
    out,
    block,
    part,
    m,
    k,
    r,
    chunk,
    stride_m,
    stride_k,
    OPERAND: tl.constexpr,
    SPLIT_A: tl.constexpr,
    CAST_DOT: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What one chunk of columns adds to z, for one block of rows."""
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, R_PAD)
    x_rows = x + row[:, None] * stride_m
    a_rows = a + rank.to(tl.int64)[:, None] * k
    z = tl.zeros([BLOCK_M, R_PAD], dtype=tl.float32)
    first = part * chunk
    for start in range(first, tl.minimum(first + chunk, k), BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = (column < k)[None, :]
        x_address = x_rows + column.to(tl.int64)[None, :] * stride_k
        x_tile = tl.load(x_address, mask=(row < m)[:, None] & inside, other=0.0)
        a_tile = tl.load(a_rows + column[None, :], mask=(rank < r)[:, None] & inside, other=0.0)
        left = as_operand(x_tile, OPERAND, CAST_DOT)
        if SPLIT_A:
            # Three bf16 parts of 8 bits each hold all 24 of an fp32 A; x is exact in bf16.
            high = as_operand(a_tile, OPERAND, CAST_DOT)
            rest = a_tile - high.to(tl.float32)
            middle = as_operand(rest, OPERAND, CAST_DOT)
            low = as_operand(rest - middle.to(tl.float32), OPERAND, CAST_DOT)
            z = tl.dot(left, tl.trans(low), z)
            z = tl.dot(left, tl.trans(middle), z)
            z = tl.dot(left, tl.trans(high), z)
        else:
            # tf32x3 concerns fp32 operands only: plain tf32 would keep 11 bits of 24.
            right = as_operand(a_tile, OPERAND, CAST_DOT)
            z = tl.dot(left, tl.trans(right), z, input_precision="tf32x3")
    z = round_to(z, out.dtype.element_ty, not CAST_DOT)
    target = out + part.to(tl.int64) * m * r + row[:, None] * r + rank[None, :]
    tl.store(target, z, mask=(row < m)[:, None] & (rank < r)[None, :])


@triton.jit(do_not_specialize=_NEVER)
def shrink_kernel(
    x,
    a,
    out,
    groups,
    slots,
    m,
    k,
    r,
    chunk,
    splits,
    blocks,
    rows,
    stride_m,
    stride_k,
    only_group,
    OPERAND: tl.constexpr,
    SPLIT_A: tl.constexpr,
    MOMENTS: tl.constexpr,
    BOTH: tl.constexpr,
    CAST_DOT: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program does one of two things: its share of z, or the moments of one tile of columns.

    In a column of the grid, the programs of ``blocks`` blocks of rows, ``splits`` for each, are
    followed by those that take the moments of the same ``rows`` rows, so that the second read can
    come from the L2 cache.

    ``out`` is the fp32 workspace ``[splits, m, r]``, or z itself where nothing is left to do.
    """
    if MOMENTS:
        of_z = blocks * splits
        slot = tl.program_id(1)
        own = tl.program_id(0)
        if own < of_z:
            block = slot * blocks + own // splits
            part = own % splits
            partial_z(
                *(x, a, out, block, part, m, k, r, chunk, stride_m, stride_k),
                *(OPERAND, SPLIT_A, CAST_DOT, R_PAD, BLOCK_M, BLOCK_K),
            )
        else:
            tile_moments(
                *(x, groups, slots, slot, own - of_z, m, k, rows, stride_m, stride_k, only_group),
                *(BOTH, ROWS, COLUMNS, LANES, STAGES),
            )
    else:
        partial_z(
            *(x, a, out, tl.program_id(0), tl.program_id(1), m, k, r, chunk, stride_m, stride_k),
            *(OPERAND, SPLIT_A, CAST_DOT, R_PAD, BLOCK_M, BLOCK_K),
        )


#: What nothing is known of where r is no multiple of 16.
ODD_RANK = [*_NEVER, "r"]
#: The same kernel for these. Triton would make a rank of 1 a constant, in machine code of its own
#: that spills where that of r = 8 does not.
shrink_odd_rank = triton.jit(shrink_kernel.fn, do_not_specialize=ODD_RANK)
#: What nothing is known of where rows are not :func:`aligned`; the rest is allocated here.
RAGGED = [*ODD_RANK, "x", "a", "k", "stride_m", "stride_k"]
#: The same kernel for operands that are not :func:`aligned`. It is told nothing of them, so that
#: every odd size, stride and pointer runs the one machine code that the gate has seen.
shrink_ragged = triton.jit(shrink_kernel.fn, do_not_specialize=RAGGED)


def chunks(m: int, k: int, r: int, block_m: int, block_k: int) -> tuple[int, int]:
    """How x is cut along K: the number of chunks, and the columns of one (whole blocks).

    As many as give two programs per SM, but no more than keep the partial sums (8 bytes written
    and read per chunk, row and rank) under half of x in bf16, unless one wave needs them.
    """
    row_blocks = max(1, ceil_div(m, block_m))
    k_blocks = max(1, ceil_div(k, block_k))
    wanted = max(WAVE // row_blocks, min(TWO_PER_SM // row_blocks, k // (8 * r)), 1)
    chunk = ceil_div(k_blocks, min(wanted, k_blocks, MAX_SPLITS)) * block_k
    return max(1, ceil_div(k, chunk)), chunk


def dot_mode(x: torch.dtype, a: torch.dtype, product: torch.dtype) -> tuple[torch.dtype, bool]:
    """The dtype of the dot's operands, and whether A is split in three parts of it.

    An fp32 product of two tensors of the same 16-bit dtype is exact in that dtype.
    """
    if product != torch.float32:
        return product, False
    if x == a:
        return x, False
    if x == torch.bfloat16 and a == torch.float32:
        return torch.bfloat16, True
    return torch.float32, False


def dots(x: torch.dtype, operand: torch.dtype, split_a: bool) -> str:
    """The shape class of a dot mode: where 32 bits are loaded or multiplied, tiles are narrower."""
    if split_a:
        return "three"
    return "16-bit" if max(x.itemsize, operand.itemsize) == 2 else "32-bit"


def aligned(x: torch.Tensor, a: torch.Tensor) -> bool:
    """Whether all rows of x ``[M, K]`` and A ``[r, K]`` can be read in 16-byte pieces.

    Triton knows that only of pointers that are multiples of 16 bytes, and of sizes and strides
    that are multiples of 16 elements. Other rows ("ragged") are read element by element in blocks
    of 32 or 16 rows, and A from L2 for each of these. So are ranks above 64 that are no multiple of
    16, which spill on sm_80 in the larger tiles.
    """
    numbers = (x.data_ptr(), a.data_ptr(), x.shape[1], x.stride(0))
    odd_rank = a.shape[0] > 64 and a.shape[0] % 16
    return x.stride(1) == 1 and not odd_rank and not any(number % 16 for number in numbers)


def shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    dtype: torch.dtype,
    groups: torch.Tensor | None = None,
    only_group: int | None = None,
    input_moments: torch.Tensor | None = None,
    rank_moments: torch.Tensor | None = None,
) -> torch.Tensor:
    """``z = x Aᵀ``, with the moments of x as given and of z as stored added in place.

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16, any strides. Where x or A is not :func:`aligned` it
            is read element by element, in small tiles; x whose columns are not adjacent in
            memory is slower still.
        a: ``[r, K]``, fp32, bf16 or fp16. Above rank 256 x is read once for every 256 rows.
        dtype: of the product: operands are rounded to it, sums are fp32, z has it.
        groups: integers ``[tokens]``: 0 forget, 1 retain, else ignored; needed for moments.
        only_group: 0 or 1 counts only that group's tokens.
        input_moments: fp64 ``[2, 2, K]``.
        rank_moments: fp64 ``[2, 2, r]``.
    """
    r, k = a.shape
    if r > MAX_RANK:
        parts = []
        for start in range(0, r, MAX_RANK):
            rows = slice(start, start + MAX_RANK)
            of_z = None if rank_moments is None else rank_moments[..., rows]
            of_x = input_moments if start == 0 else None
            parts.append(shrink(x, a[rows], dtype, groups, only_group, of_x, of_z))
        return torch.cat(parts, -1)
    z = x.new_empty((*x.shape[:-1], r), dtype=dtype)
    if z.numel() == 0:
        if input_moments is not None:
            accumulate_moments_(x, groups, input_moments, only_group)
        return z
    if k == 0:
        return z.zero_()
    x, a = rows_of(x), a.contiguous()
    if input_moments is not None or rank_moments is not None:
        groups = groups.contiguous()
    parts, x_slots = None, None
    operand, split_a = dot_mode(x.dtype, a.dtype, dtype)
    smooth = aligned(x, a)
    if input_moments is not None and smooth:
        row = shrink_columns.row_of(x, groups, pad_rank(r), operand, split_a)
        if row is not None:
            parts, x_slots = shrink_columns.parts_and_slots(
                x, a, row, operand, split_a, groups, only_group
            )
    if parts is None:
        at_once = z if rank_moments is None else None
        of_x = None if input_moments is None else groups
        parts, x_slots = _parts_and_slots(x, a, operand, split_a, smooth, of_x, only_group, at_once)
    if parts is z:
        if x_slots is not None:
            fold_(x_slots, input_moments, only_group)
    else:
        finish_(parts, z, k, groups, only_group, x_slots, input_moments, rank_moments)
    return z


def _parts_and_slots(
    x: torch.Tensor,
    a: torch.Tensor,
    operand: torch.dtype,
    split_a: bool,
    smooth: bool,
    groups: torch.Tensor | None,
    only_group: int | None,
    at_once: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One launch of programs that own rows: fp32 parts of z ``[splits, M, r]``, or z itself in
    ``at_once`` where one chunk is all, and with ``groups`` the slots of x's moments."""
    (m, k), r = x.shape, a.shape[0]
    r_pad, size = pad_rank(r), "few" if m <= FEW_ROWS else "many"
    key = (r_pad, dots(x.dtype, operand, split_a), size if smooth else "ragged")
    tile = tuning.config("shrink", key, x.device)
    splits, chunk = chunks(m, k, r, tile["BLOCK_M"], tile["BLOCK_K"])
    out = at_once
    if out is None or splits > 1:
        out = x.new_empty((splits, m, r), dtype=torch.float32)
    of_moments = tile_of(x.element_size(), smooth, tile["num_warps"])
    row_blocks, slots = ceil_div(m, tile["BLOCK_M"]), None
    blocks, rows, grid = row_blocks, m, (row_blocks, splits)
    if groups is not None:
        tiles = ceil_div(k, of_moments["COLUMNS"])
        rows = program_rows(m, tiles, PROGRAMS_BESIDE)
        count = ceil_div(m, rows)
        slots = new_slots(count * of_moments["LANES"], k, only_group, x.device)
        blocks = min(rows // tile["BLOCK_M"], row_blocks)
        grid = (blocks * splits + tiles, count)
    kernel = shrink_ragged
    if smooth:
        kernel = shrink_odd_rank if r % 16 else shrink_kernel
    with on_device(x):
        kernel[grid](
            *(x, a, out, groups, slots, m, k, r, chunk, splits, blocks, rows, *x.stride()),
            -1 if only_group is None else only_group,
            OPERAND=TRITON_DTYPES[operand],
            SPLIT_A=split_a,
            MOMENTS=slots is not None,
            BOTH=only_group is None,
            CAST_DOT=CAST_DOT,
            R_PAD=r_pad,
            enable_fp_fusion=True,
            **of_moments,
            **tile,
        )
    return out, slots


#: Operands that real models bring: x, A, product. All-bf16, PEFT's default of fp32 adapters under
#: bf16, fp32, the two autocasts, and the same in fp16.
_DTYPES = (
    ("bf16", "bf16", "bf16"),
    ("bf16", "fp32", "fp32"),
    ("fp32", "fp32", "fp32"),
    ("fp32", "fp32", "bf16"),
    ("bf16", "fp32", "bf16"),
    ("fp16", "fp16", "fp16"),
    ("fp16", "fp32", "fp32"),
    ("fp32", "fp32", "fp16"),
    ("fp16", "fp32", "fp16"),
)
_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compile_cases() -> list[CompileCase]:
    """Every dtype and row of the table with all moments; the lighter variants of the main ones."""
    return list(_cases())


def _cases() -> Iterator[CompileCase]:
    for gpu, (rank, kind_of_dots, rows), tile, capabilities in tuning.rows("shrink"):
        options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
        for dtypes in _DTYPES:
            x, a, product = dtypes
            operand, split_a = dot_mode(*(_NAMES[name] for name in dtypes))
            if dots(_NAMES[x], operand, split_a) != kind_of_dots:
                continue
            for out, moments, both, odd in _kinds(dtypes, rank, rows):
                none = dict.fromkeys(() if moments else ("groups", "slots"))
                what = ("both groups" if both else "one group") if moments else "no moments"
                constants = {"OPERAND": TRITON_DTYPES[operand], "SPLIT_A": split_a}
                constants |= {"MOMENTS": moments, "BOTH": both, "CAST_DOT": True, "R_PAD": rank}
                types = {"x": f"*{x}", "a": f"*{a}", "out": f"*{out}"}
                types |= {"groups": "*i64" if odd else "*i8", "slots": "*fp32"} if moments else {}
                constants |= tile_of(_NAMES[x].itemsize, rows != "ragged", options["num_warps"])
                sizes = ["m", "k", "r", "chunk", "splits", "blocks", "rows", "stride_m"]
                sizes.append("only_group")
                divisible = [*types, "k", "r", "chunk", "stride_m"]
                # Odd ranks above 64 are launched as ragged rows, see `aligned`.
                unknown = ODD_RANK if odd and rank <= 64 else _NEVER
                if rows == "ragged":
                    sizes.append("stride_k")
                    kernel, unknown = shrink_ragged, RAGGED
                else:
                    constants["stride_k"] = 1
                    kernel = shrink_odd_rank if "r" in unknown else shrink_kernel
                yield CompileCase(
                    name=f"{x} x, {a} A{' in three parts' if split_a else ''}, {product} product, "
                    f"{out} out, r {rank}{' odd' if 'r' in unknown else ''}, {rows} rows, "
                    f"{what}{' of 64 bits' if odd else ''}, {gpu}",
                    kernel=kernel,
                    signature=dict.fromkeys(shrink_kernel.arg_names, "constexpr")
                    | types
                    | dict.fromkeys(sizes, "i32"),
                    constants=none | constants | tile,
                    divisible=tuple(name for name in divisible if name not in unknown),
                    dot=True,
                    wide_loads=rows != "ragged",
                    capabilities=capabilities,
                    **options,
                )


def _kinds(
    dtypes: tuple[str, str, str], rank: int, rows: str
) -> Iterator[tuple[str, bool, bool, bool]]:
    """What is stored, whether moments are taken, whether of both groups, and whether r is no
    multiple of 16 and the groups are int64 that begin anywhere."""
    product, main = dtypes[2], dtypes in _DTYPES[:3]
    # fp16 takes bf16's registers: where nothing is aligned, one rank shows that it compiles.
    if rows == "ragged" and "fp16" in dtypes and rank != 16:
        return
    yield "fp32", True, True, False
    if main:
        yield "fp32", True, False, False
        yield "fp32", False, True, False
        yield "fp32", True, True, True
    # One chunk of K and no moments of z: the first kernel rounds.
    if product != "fp32" and (main or rows == "many"):
        yield product, False, True, False
    if dtypes == _DTYPES[0]:
        yield product, True, True, False
        if rows != "ragged":
            yield product, True, True, True
