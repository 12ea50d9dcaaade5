"""What :mod:`.shrink` launches last: z from its parts, its moments, and the totals of x's.

Bytes at S parts: 4·S·M·r read (from the L2 cache, where the launch before left them) and M·r
written; the slots of x's moments are read once. The totals of x are folded here and not in a launch
of their own, which takes 3 µs or more on an H100; those of z have to wait for this one.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from . import tuning
from .common import (
    CAST_DOT,
    FOLD_WIDE,
    CompileCase,
    ceil_div,
    column_sums,
    fold_,
    fold_tile,
    new_slots,
    on_device,
    pad_rank,
    round_to,
    store_sums,
)

#: At most so many rows are "few": decoding. They get small blocks, and parallelism from K alone.
FEW_ROWS = 32


@triton.jit
def finish_rows(
    parts,
    z,
    groups,
    slots,
    m,
    r,
    splits,
    only_group,
    MOMENTS: tl.constexpr,
    BOTH: tl.constexpr,
    CAST_DOT: tl.constexpr,
    R_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """z = Σ parts for one block of rows, and its moments in the slot of this block."""
    block = tl.program_id(0)
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, R_PAD)
    inside = (row < m)[:, None] & (rank < r)[None, :]
    place = row[:, None] * r + rank[None, :]
    total = tl.zeros([ROWS, R_PAD], dtype=tl.float32)
    for first in range(0, splits, SPLITS):
        part = first + tl.arange(0, SPLITS)
        address = parts + (part.to(tl.int64) * m * r)[:, None, None] + place[None, :, :]
        mask = (part < splits)[:, None, None] & inside[None, :, :]
        total += tl.sum(tl.load(address, mask=mask, other=0.0), axis=0)
    total = round_to(total, z.dtype.element_ty, not CAST_DOT)
    tl.store(z + place, total, mask=inside)
    if MOMENTS:
        group = tl.load(groups + row, mask=row < m, other=-1)
        a_f, a_r, s_f, s_r = column_sums(total.to(tl.float32), group, only_group, BOTH)
        store_sums(slots, block, rank, r, a_f, a_r, s_f, s_r, BOTH)


#: What nothing is known of in any launch.
_NEVER = ["groups", "m", "splits", "blocks", "x_slot_count", "only_group"]


@triton.jit(do_not_specialize=_NEVER)
def finish_kernel(
    parts,
    z,
    groups,
    slots,
    x_slots,
    x_totals,
    m,
    k,
    r,
    splits,
    blocks,
    x_slot_count,
    x_stride,
    only_group,
    MOMENTS: tl.constexpr,
    FOLD: tl.constexpr,
    BOTH: tl.constexpr,
    CAST_DOT: tl.constexpr,
    R_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    FOLD_SLOTS: tl.constexpr,
    FOLD_COLUMNS: tl.constexpr,
):
    """A program does one of two things: rows of z, or with FOLD a tile of the totals of x.

    z = Σ parts, always in the same order; then rounded, and its moments taken. The programs after
    ``blocks`` do what a launch of :func:`.common.fold_kernel` of many slots would.
    """
    if FOLD:
        own = tl.program_id(0) - blocks
        if own < 0:
            finish_rows(
                *(parts, z, groups, slots, m, r, splits, only_group),
                *(MOMENTS, BOTH, CAST_DOT, R_PAD, ROWS, SPLITS),
            )
        else:
            tiles = tl.cdiv(k, FOLD_COLUMNS)
            fold_tile(
                *(x_slots, x_totals, own % tiles, own // tiles, x_slot_count, k, x_stride),
                *(2 if BOTH else 1, FOLD_SLOTS, FOLD_COLUMNS),
            )
    else:
        finish_rows(
            *(parts, z, groups, slots, m, r, splits, only_group),
            *(MOMENTS, BOTH, CAST_DOT, R_PAD, ROWS, SPLITS),
        )


#: The same kernel for ranks and columns that are no multiple of 16; one group's totals of x then
#: begin anywhere.
ODD = [*_NEVER, "x_totals", "k", "r", "x_stride"]
finish_odd = triton.jit(finish_kernel.fn, do_not_specialize=ODD)


def finish_(
    parts: torch.Tensor,
    z: torch.Tensor,
    k: int,
    groups: torch.Tensor | None,
    only_group: int | None,
    x_slots: torch.Tensor | None,
    x_totals: torch.Tensor | None,
    z_totals: torch.Tensor | None,
) -> None:
    """Writes z, adds its moments to ``z_totals`` and the slots of x to ``x_totals``, in place.

    Args:
        parts: fp32 ``[splits, M, r]``.
        z: ``[..., r]`` of M rows, contiguous.
        k: columns of x.
        groups: integers ``[M]``, contiguous; for the moments of z.
        only_group: 0 or 1 counts only that group's tokens.
        x_slots: fp32 ``[S, 2, G, K]``, or None.
        x_totals, z_totals: fp64 ``[2, 2, K]`` and ``[2, 2, r]``; None takes none.
    """
    splits, m, r = parts.shape
    size = "few" if m <= FEW_ROWS else "many"
    row = tuning.config("shrink_finish", (pad_rank(r), size), z.device)
    blocks, slots = ceil_div(m, row["ROWS"]), None
    if z_totals is not None:
        slots = new_slots(blocks, r, only_group, z.device)
    grid, start = blocks, None
    if x_slots is not None:
        if x_totals.is_contiguous():
            start = x_totals if only_group is None else x_totals[:, only_group]
            grid += ceil_div(k, FOLD_WIDE["COLUMNS"]) * 2 * x_slots.shape[2]
        else:
            fold_(x_slots, x_totals, only_group)
    # The same for this x and A, whatever is asked for: the order of the sums is the compiler's.
    kernel = finish_odd if r % 16 or k % 16 else finish_kernel
    with on_device(z):
        kernel[grid,](
            *(parts, z, None if slots is None else groups, slots),
            *(None if start is None else x_slots, start),
            *(m, k, r, splits, blocks, 0 if start is None else x_slots.shape[0], 2 * k),
            -1 if only_group is None else only_group,
            MOMENTS=slots is not None,
            FOLD=start is not None,
            # Without sums it changes nothing, and one kernel is enough.
            BOTH=only_group is None or (slots is None and start is None),
            CAST_DOT=CAST_DOT,
            R_PAD=pad_rank(r),
            FOLD_SLOTS=FOLD_WIDE["SLOTS"],
            FOLD_COLUMNS=FOLD_WIDE["COLUMNS"],
            enable_fp_fusion=True,
            **row,
        )
    if slots is not None:
        fold_(slots, z_totals, only_group)


def compile_cases() -> list[CompileCase]:
    """Every row of the table: dtypes of z, its moments or none, the totals of x or none."""
    cases = []
    for gpu, (rank, rows), row, capabilities in tuning.rows("shrink_finish"):
        options = {name: row.pop(name) for name in ("num_warps", "num_stages")}
        flags = (True, False)
        # Nothing odd, and odd sizes with groups of a byte and of eight.
        kinds = [*itertools.product(("bf16", "fp32"), flags, flags, flags, ("", "i8", "i64"))]
        kinds += [("fp16", True, True, True, odd) for odd in ("", "i8")]
        for dtype, moments, fold, both, odd in kinds:
            if (not moments and not fold and not both) or (not moments and odd == "i64"):
                continue
            absent = [] if moments else ["groups", "slots"]
            absent += [] if fold else ["x_slots", "x_totals"]
            types = {"parts": "*fp32", "z": f"*{dtype}"}
            types |= {"groups": f"*{odd or 'i8'}", "slots": "*fp32"} if moments else {}
            types |= {"x_slots": "*fp32", "x_totals": "*fp64"} if fold else {}
            sizes = ["m", "k", "r", "splits", "blocks", "x_slot_count", "x_stride", "only_group"]
            constants = {"MOMENTS": moments, "FOLD": fold, "BOTH": both, "CAST_DOT": True}
            constants |= {"R_PAD": rank, "FOLD_SLOTS": FOLD_WIDE["SLOTS"]}
            constants |= {"FOLD_COLUMNS": FOLD_WIDE["COLUMNS"], **row}
            known = [*types, "k", "r", "x_stride"]
            unknown = ODD if odd else _NEVER
            words = [f"{dtype} z", f"r {rank}{' odd' if odd else ''}", f"{rows} rows"]
            words += [f"moments{' by 64 bits' if odd == 'i64' else ''}"] if moments else []
            words += ["totals of x"] if fold else []
            words.append(("both groups" if both else "one group") if moments or fold else "z alone")
            cases.append(
                CompileCase(
                    name=f"{', '.join(words)}, {gpu}",
                    kernel=finish_odd if odd else finish_kernel,
                    signature=dict.fromkeys(finish_kernel.arg_names, "constexpr")
                    | types
                    | dict.fromkeys(sizes, "i32"),
                    constants=dict.fromkeys(absent) | constants,
                    divisible=tuple(name for name in known if name not in unknown),
                    wide_loads=not odd,
                    capabilities=capabilities,
                    **options,
                )
            )
    return cases
