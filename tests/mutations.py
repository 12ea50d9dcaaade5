"""Breaks the kernels one line at a time, and asks whether a test notices.

    python tests/mutations.py                  all of them: one to two hours of one core
    python tests/mutations.py --only expand    those whose name or file contains "expand"
    python tests/mutations.py --list

Works in copies of the checkout in a temporary folder; nothing here is changed. First the tests of
the chosen mutations must pass unbroken. Then one line each: the test that failed, or SURVIVED. Exit
code 1 if one survived, or could not be tried (it did not compile, or no test could be collected).

A mutation that changes no result is not listed: where two masks guard the same sum (rows past the
end are zero and belong to no group), taking one away is seen by ``kernels/test_bounds.py`` only if
it reaches memory that is not the tensor's. That ``other=`` is named is read from the source
(``kernels/test_rules.py``): the interpreter gives 0 without it.
"""

# ruff: noqa: E501  (the code is quoted as it stands)
from __future__ import annotations

import argparse
import concurrent.futures
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", ".ci", "build", "dist", "results", "docs", "*.egg-info"),
    *("__pycache__", ".*_cache", "_C_cuda.*"),
)


@dataclass(frozen=True)
class Mutation:
    """``old``, which occurs once in ``file``, becomes ``new``; one of ``tests`` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _mutations(file: str, tests: str, *changes: tuple[str, str, str]) -> list[Mutation]:
    place = "csrc" if file.startswith("csrc") else Path(file).parent.name
    label = f"{place}/{Path(file).stem if place != 'csrc' else Path(file).name}"
    return [
        Mutation(f"{label}: {name}", file, old, new, tuple(tests.split()))
        for name, old, new in changes
    ]


BOUNDS = "tests/kernels/test_bounds.py"

MUTATIONS: list[Mutation] = [
    *_mutations(
        "kernels/common.py",
        f"tests/kernels/test_moments.py tests/kernels/test_rules.py {BOUNDS}",
        ("bf16 ties away from even", "0x7FFF + ((bits >> 16) & 1)", "0x8000"),
        (
            "bf16 rounds a NaN away",
            "nearest = tl.where(value == value, nearest, (bits >> 16) | 0x40)",
            "nearest = nearest + 0",
        ),
        (
            "groups swapped in Σ|h|",
            "abs_f = fold_rows(size * f, LANES)",
            "abs_f = fold_rows(size * r, LANES)",
        ),
        (
            "groups swapped in Σh²",
            "sq_r = fold_rows(square * r, LANES)",
            "sq_r = fold_rows(square * f, LANES)",
        ),
        (
            "ignored rows are counted as zero by a product",
            "h = tl.where((forget | retain)[:, None], h, 0.0)",
            "h = h * (forget | retain).to(tl.float32)[:, None]",
        ),
        (
            "only_group ignored",
            "counted = group == only_group",
            "counted = group >= 0",
        ),
        ("no square", "sq_f = fold_rows(h * h * counted", "sq_f = fold_rows(tl.abs(h) * counted"),
        (
            "the sums of the lanes are not added up",
            "tl.sum(tl.reshape(value, [rows, LANES, value.shape[1]]), axis=0)",
            "tl.max(tl.reshape(value, [rows, LANES, value.shape[1]]), axis=0)",
        ),
        (
            "abs and sq swapped in a slot",
            "tl.store(base + n, abs_r, mask=inside)",
            "tl.store(base + n, sq_f, mask=inside)",
        ),
        ("a slot overlaps its neighbour", "slot.to(tl.int64) * 4 * n", "slot.to(tl.int64) * 3 * n"),
        ("the slot of one group overlaps", "slot.to(tl.int64) * 2 * n", "slot.to(tl.int64) * n"),
        ("32-bit slots", "slot.to(tl.int64) * 4 * n", "slot * 4 * n"),
        ("32-bit slots of one group", "slot.to(tl.int64) * 2 * n", "slot * 2 * n"),
        ("columns past the end are stored", "inside = columns < n", "inside = columns < n + 1"),
        (
            "the fold takes one block of slots",
            "range(0, slot_count, SLOTS)",
            "range(0, SLOTS, SLOTS)",
        ),
        (
            "the fold takes one slot too many",
            "mask=(slot < slot_count)",
            "mask=(slot < slot_count + 1)",
        ),
        (
            "the fold takes one slot too few",
            "mask=(slot < slot_count)",
            "mask=(slot < slot_count - 1)",
        ),
        (
            "the fold sums in fp32",
            "tl.sum(value.to(tl.float64), axis=0)",
            "tl.sum(value, axis=0).to(tl.float64)",
        ),
        (
            "the fold replaces the totals",
            "tl.store(target, before + total, mask=inside)",
            "tl.store(target, total, mask=inside)",
        ),
        (
            "the fold writes where the other statistic is",
            "totals + (part // GROUPS) * total_stride + (part % GROUPS) * n",
            "totals + (part % GROUPS) * total_stride + (part // GROUPS) * n",
        ),
        (
            "the fold of a view is lost",
            "    if target is not moments:\n        moments.copy_(target)\n",
            "",
        ),
        (
            "the fold of one group goes to group 0",
            "target if only_group is None else target[:, only_group]",
            "target",
        ),
        (
            "no other= in the fold",
            "mask=(slot < slot_count)[:, None] & inside[None, :], other=0.0)",
            "mask=(slot < slot_count)[:, None] & inside[None, :])",
        ),
    ),
    *_mutations(
        "kernels/moments.py",
        f"tests/kernels/test_moments.py {BOUNDS}",
        (
            "the last rows are skipped",
            "tl.range(0, rows, ROWS,",
            "tl.range(0, rows - ROWS, ROWS,",
        ),
        (
            "rows of the neighbouring slot",
            "slot.to(tl.int64) * rows + step",
            "slot.to(tl.int64) * ROWS + step",
        ),
        (
            "32-bit rows",
            "slot.to(tl.int64) * rows + step",
            "slot * rows + step",
        ),
        (
            "no row mask",
            "mask=(row < m)[:, None] & (column < n)[None, :]",
            "mask=(column < n)[None, :]",
        ),
        (
            "no column mask",
            "mask=(row < m)[:, None] & (column < n)[None, :]",
            "mask=(row < m)[:, None]",
        ),
        (
            "no mask of the groups",
            "tl.load(groups + row, mask=row < m, other=-1)",
            "tl.load(groups + row)",
        ),
        (
            "strides swapped",
            "row[:, None] * stride_m + column.to(tl.int64)[None, :] * stride_n",
            "row[:, None] * stride_n + column.to(tl.int64)[None, :] * stride_m",
        ),
        ("counted twice", "abs_f += a_f", "abs_f += 2 * a_f"),
        ("one slot too few", "count = ceil_div(m, rows)", "count = max(1, m // rows)"),
        (
            "lanes on top of each other",
            "slot.to(tl.int64) * LANES + tl.arange(0, LANES)",
            "slot.to(tl.int64) + tl.arange(0, LANES)",
        ),
        (
            "tiles and slots swapped",
            "tl.program_id(0) // tiles,\n        tl.program_id(0) % tiles,",
            "tl.program_id(0) % tiles,\n        tl.program_id(0) // tiles,",
        ),
        ("groups may be strided", "groups.contiguous()", "groups"),
    ),
    *_mutations(
        "kernels/shrink.py",
        f"tests/kernels/test_shrink.py {BOUNDS}",
        (
            "the last columns are skipped",
            "tl.minimum(first + chunk, k), BLOCK_K)",
            "tl.minimum(first + chunk, k) - BLOCK_K + 1, BLOCK_K)",
        ),
        ("a chunk begins one column late", "first = part * chunk", "first = part * chunk + part"),
        (
            "no row mask of x",
            "mask=(row < m)[:, None] & inside, other=0.0",
            "mask=inside, other=0.0",
        ),
        (
            "no column mask of x",
            "mask=(row < m)[:, None] & inside, other=0.0",
            "mask=(row < m)[:, None], other=0.0",
        ),
        (
            "padded rows of A are read",
            "mask=(rank < r)[:, None] & inside, other=0.0",
            "mask=inside, other=0.0",
        ),
        (
            "padded columns of z are written",
            "tl.store(target, z, mask=(row < m)[:, None] & (rank < r)[None, :])",
            "tl.store(target, z, mask=(row < m)[:, None])",
        ),
        ("32-bit rows", "block.to(tl.int64) * BLOCK_M", "block * BLOCK_M"),
        ("the lowest part of A is dropped", "            z = tl.dot(left, tl.trans(low), z)\n", ""),
        (
            "the middle part of A is dropped",
            "            z = tl.dot(left, tl.trans(middle), z)\n",
            "",
        ),
        (
            "x is not rounded to the product",
            "left = as_operand(x_tile, OPERAND, CAST_DOT)",
            "left = x_tile.to(tl.float32)",
        ),
        (
            "moments of the neighbouring tile",
            "slot, own - of_z, m, k",
            "slot, own - of_z + 1, m, k",
        ),
        (
            "the last tile has no program",
            "grid = (blocks * splits + tiles, count)",
            "grid = (blocks * splits + tiles - 1, count)",
        ),
        (
            "one block of rows of a slot",
            'blocks = min(rows // tile["BLOCK_M"], row_blocks)',
            "blocks = 1",
        ),
        (
            "blocks and chunks swapped",
            "block = slot * blocks + own // splits\n            part = own % splits",
            "block = slot * blocks + own % blocks\n            part = own // blocks % splits * 0",
        ),
        (
            "partial z on top of each other",
            "part.to(tl.int64) * m * r + row",
            "part.to(tl.int64) * r + row",
        ),
        (
            "partial z in the dtype of z",
            "x.new_empty((splits, m, r), dtype=torch.float32)",
            "x.new_empty((splits, m, r), dtype=torch.bfloat16)",
        ),
        (
            "strides of x swapped",
            "rows, *x.stride()),",
            "rows, *x.stride()[::-1]),",
        ),
        ("odd rows take the tiles of aligned ones", "smooth = aligned(x, a)", "smooth = True"),
        ("A that begins anywhere is aligned", "a.data_ptr(), x.shape", "x.shape"),
        (
            "a rank of 1 becomes a constant",
            "shrink_odd_rank if r % 16 else shrink_kernel",
            "shrink_kernel",
        ),
        ("only the first 256 rows of A", "range(0, r, MAX_RANK)", "range(0, MAX_RANK, MAX_RANK)"),
        (
            "x counted once per part of a wide A",
            "input_moments if start == 0 else None",
            "input_moments",
        ),
    ),
    *_mutations(
        "kernels/shrink_finish.py",
        f"tests/kernels/test_shrink.py tests/kernels/test_shrink_columns.py {BOUNDS}",
        ("a partial z is left out", "range(0, splits, SPLITS)", "range(0, splits - 1, SPLITS)"),
        (
            "partial z past the last are added",
            "mask = (part < splits)[:, None, None]",
            "mask = (part < splits + 1)[:, None, None]",
        ),
        (
            "moments of z before it is rounded",
            "    total = round_to(total, z.dtype.element_ty, not CAST_DOT)\n    tl.store(z + place, total, mask=inside)\n",
            "    tl.store(z + place, round_to(total, z.dtype.element_ty, not CAST_DOT), mask=inside)\n",
        ),
        (
            "moments of z are not folded",
            "    if slots is not None:\n        fold_(slots, z_totals, only_group)\n",
            "",
        ),
        (
            "totals of x that are a view are not folded",
            "            fold_(x_slots, x_totals, only_group)\n",
            "            pass\n",
        ),
        (
            "the last tile of the totals of x has no program",
            'grid += ceil_div(k, FOLD_WIDE["COLUMNS"]) * 2 * x_slots.shape[2]',
            'grid += ceil_div(k, FOLD_WIDE["COLUMNS"]) * 2 * x_slots.shape[2] - 1',
        ),
        (
            "statistics and tiles of the totals of x swapped",
            "own % tiles, own // tiles, x_slot_count",
            "own // tiles, own % tiles, x_slot_count",
        ),
        (
            "one group's totals of x go to group 0",
            "start = x_totals if only_group is None else x_totals[:, only_group]",
            "start = x_totals",
        ),
        (
            "one group's slots of x are read as two",
            "*(2 if BOTH else 1, FOLD_SLOTS, FOLD_COLUMNS)",
            "*(2, FOLD_SLOTS, FOLD_COLUMNS)",
        ),
        (
            "another kernel where moments are taken",
            "kernel = finish_odd if r % 16 or k % 16 else finish_kernel",
            "kernel = finish_kernel",
        ),
    ),
    *_mutations(
        "kernels/shrink_columns.py",
        f"tests/kernels/test_shrink_columns.py {BOUNDS}",
        (
            "the last rows are skipped",
            "tl.range(0, rows, BLOCK_M,",
            "tl.range(0, rows, 2 * BLOCK_M,",
        ),
        ("no row mask of x", "mask=present & inside, other=0.0", "mask=inside, other=0.0"),
        ("no column mask of x", "mask=present & inside, other=0.0", "mask=present, other=0.0"),
        (
            "padded rows of A are read",
            "mask=(a_row < r)[:, None] & inside, other=0.0",
            "mask=inside, other=0.0",
        ),
        (
            "padded columns of z are written",
            "mask=present & (rank < r)[None, :])",
            "mask=present)",
        ),
        (
            "rows past the end of z are written",
            "mask=present & (rank < r)[None, :])",
            "mask=(rank < r)[None, :])",
        ),
        ("32-bit rows", "start.to(tl.int64) * stride_m", "start * stride_m"),
        (
            "the lowest part of A is dropped",
            "tl.where((part < 3)[:, None], chosen, 0.0)",
            "tl.where((part < 2)[:, None], chosen, 0.0)",
        ),
        (
            "the middle part of A is the lowest",
            "(part == 1)[:, None], middle, low)",
            "(part == 1)[:, None], low, low)",
        ),
        (
            "the fourth part is A's lowest",
            "return tl.where((part < 3)[:, None], chosen, 0.0)",
            "return chosen",
        ),
        (
            "groups of the block before",
            "        group = ahead\n",
            "        group = tl.load(groups + row - BLOCK_M, mask=(row < m) & (row >= BLOCK_M), other=-1)\n",
        ),
        (
            "groups ahead have no end",
            "mask=row + BLOCK_M < m, other=-1)",
            "mask=row >= 0, other=-1)",
        ),
        ("sums of the last block alone", "        sq_f += s_f\n", "        sq_f = s_f\n"),
        (
            "lanes on top of each other",
            "lane = slot.to(tl.int64) * LANES",
            "lane = slot.to(tl.int64)",
        ),
        ("parts on top of each other", "own = parts + tile.to(tl.int64) * m * r", "own = parts"),
        (
            "tiles and slots swapped",
            "slot = tl.program_id(0) // tiles\n    tile = tl.program_id(0) % tiles",
            "slot = tl.program_id(0) % tiles\n    tile = tl.program_id(0) // tiles",
        ),
        ("groups wider than a byte are taken", "or groups.itemsize != 1", ""),
        ("operands of another dtype are taken", "operand != x.dtype or ", ""),
        ("strides of any size are taken", " or x.stride(0) > MAX_STRIDE", ""),
        ("ranks of any size are taken", "r_pad > MAX_PADDED_RANK or ", ""),
    ),
    *_mutations(
        "kernels/expand.py",
        f"tests/kernels/test_expand.py {BOUNDS}",
        (
            "moments not scaled",
            "size, square = tl.abs(scaling), scaling * scaling",
            "size, square = 1.0, 1.0",
        ),
        (
            "the sign of the scaling is in Σ|h|",
            "size, square = tl.abs(scaling), ",
            "size, square = scaling, ",
        ),
        (
            "the square of the scaling is its size",
            "tl.abs(scaling), scaling * scaling",
            "tl.abs(scaling), tl.abs(scaling)",
        ),
        (
            "not scaled",
            "tl.fma(product, scaling, base.to(tl.float32))",
            "product + base.to(tl.float32)",
        ),
        ("base dropped", "tl.fma(product, scaling, base.to(tl.float32))", "product * scaling"),
        (
            "base added twice",
            "tl.fma(product, scaling, base.to(tl.float32))",
            "tl.fma(product, scaling, 2 * base.to(tl.float32))",
        ),
        (
            "bias dropped",
            "            result += bias_row[None, :]\n",
            "            result += 0 * bias_row[None, :]\n",
        ),
        (
            "bias not scaled",
            "operand(bias_row, z.dtype.element_ty, CAST_DOT).to(tl.float32) * scaling",
            "operand(bias_row, z.dtype.element_ty, CAST_DOT).to(tl.float32)",
        ),
        (
            "bias counted",
            "        if MOMENTS:\n            if SPLIT:",
            "        if MOMENTS:\n            if HAS_BIAS:\n                product += bias_row[None, :]\n            if SPLIT:",
        ),
        (
            "rounded twice",
            "        # Spelled out, so that y",
            "        product = round_to(product, y.dtype.element_ty, not CAST_DOT).to(tl.float32)\n        # Spelled out, so that y",
        ),
        ("what rounding B took is scaled up", "rest * (1 / _SPLIT_SCALE)", "rest"),
        (
            "what rounding B took is dropped",
            "            if SPLIT:\n                product += rest",
            "            if False:\n                product += rest",
        ),
        (
            "an odd number of columns is specialised",
            "base_out.stride(0), b.shape[0]]",
            "base_out.stride(0)]",
        ),
        ("an odd rank is specialised", "b.data_ptr(), b.shape[1])", "b.data_ptr())"),
        (
            "the last part of the rank is skipped",
            "range(0, r, BLOCK_R)",
            "range(0, r - BLOCK_R + 1, BLOCK_R)",
        ),
        (
            "the last rows are skipped",
            "tl.range(0, rows, BLOCK_M,",
            "tl.range(0, rows, 2 * BLOCK_M,",
        ),
        (
            "no rank mask of B",
            "mask=(column < n)[:, None] & (rank < r)[None, :], other=0.0)",
            "mask=(column < n)[:, None], other=0.0)",
        ),
        (
            "no column mask of B",
            "mask=(column < n)[:, None] & (rank < r)[None, :], other=0.0)",
            "mask=(rank < r)[None, :], other=0.0)",
        ),
        (
            "no rank mask of z",
            "z_mask = (row < m)[:, None] & (rank < r)[None, :]",
            "z_mask = (row < m)[:, None] & (rank >= 0)[None, :]",
        ),
        (
            "no row mask",
            "inside = (row < m)[:, None] & (column < n)[None, :]",
            "inside = (row >= 0)[:, None] & (column < n)[None, :]",
        ),
        (
            "no column mask",
            "inside = (row < m)[:, None] & (column < n)[None, :]",
            "inside = (row < m)[:, None] & (column >= 0)[None, :]",
        ),
        ("32-bit rows", "start = (first + step).to(tl.int64)", "start = first + step"),
        ("32-bit offsets in a block", 'FAR=kind == "ragged",', "FAR=False,"),
        (
            "the rest of an fp32 z is dropped",
            "tl.dot(z_low, tl.trans(b_high)",
            "tl.dot(0 * z_low, tl.trans(b_high)",
        ),
        (
            "the rest of an fp32 B is dropped",
            "tl.dot(z_high, tl.trans(b_low)",
            "tl.dot(z_high, tl.trans(0 * b_low)",
        ),
        (
            "a NaN is rounded",
            'high = tl.where(value == value, nearest, float("nan"))',
            "high = nearest",
        ),
        (
            "groups of the block before",
            "            group = ahead\n",
            "            group = tl.load(groups + row - BLOCK_M, mask=(row < m) & (row >= BLOCK_M), other=-1)\n",
        ),
        ("sums of the last tile alone", "            sq_f += s_f\n", "            sq_f = s_f\n"),
        (
            "z read without its stride",
            "far_block[:, None] * stride_z + rank[None, :]",
            "far_block[:, None] * r + rank[None, :]",
        ),
        ("slots one too few", "count = ceil_div(m, rows)", "count = max(1, m // rows)"),
        (
            "columns of the wrong tile",
            "slot = tl.program_id(0) // column_tiles",
            "slot = tl.program_id(0) % column_tiles",
        ),
        (
            "B rounded to z for the moments",
            "        b = b.float()\n",
            "        b = b.to(z.dtype)\n",
        ),
    ),
    *_mutations(
        "kernels/fused_linear.py",
        f"tests/kernels/test_fused_linear.py {BOUNDS}",
        ("scaled twice", "total = product * scaling", "total = product * scaling * scaling"),
        (
            "bias dropped",
            "            total += value.to(tl.float32)[None, :]",
            "            total += 0 * value.to(tl.float32)[None, :]",
        ),
        (
            "LoRA bias after the scaling",
            "        total = product * scaling\n        if BIAS:",
            "        total = product * scaling\n        if LORA_BIAS:\n            total += (1 - scaling) * round_to(value, LORA_DTYPE, INTERPRETED).to(tl.float32)[None, :]\n        if BIAS:",
        ),
        ("the last columns of K are skipped", "range(0, k, BK)", "range(0, k - BK + 1, BK)"),
        (
            "the last part of the rank is skipped",
            "tl.range(0, r, RANK, num_stages=1)",
            "tl.range(0, r - RANK + 1, RANK, num_stages=1)",
        ),
        (
            "the right half stored at the left",
            "y.store([row_block * BM, first_column + BN // 2], ",
            "y.store([row_block * BM, first_column], ",
        ),
        (
            "the right half counted at the left",
            "store_sums(slots, row_block, half + BN // 2, n",
            "store_sums(slots, row_block, half, n",
        ),
        (
            "halves interleaved",
            "tl.reshape(tile, [BM, 2, BN // 2]), [0, 2, 1]",
            "tl.reshape(tile, [BM, BN // 2, 2]), [0, 1, 2]",
        ),
        (
            "the slot of the program",
            "store_sums(slots, row_block, half, n",
            "store_sums(slots, band, half, n",
        ),
        (
            "a band of the wrong height",
            "min(row_blocks - band * ROW_BLOCKS, ROW_BLOCKS)",
            "ROW_BLOCKS",
        ),
        (
            "rounded B for the moments, too",
            "if not MOMENTS or DELTA_DTYPE != LORA_DTYPE:",
            "if not MOMENTS:",
        ),
        (
            "padded ranks of z are read",
            "mask=(row < m)[:, None] & (rank < r)[None, :], other=0.0)",
            "mask=(row < m)[:, None], other=0.0)",
        ),
        (
            "padded ranks of B are read",
            "mask=(column < n)[:, None] & (rank < r)[None, :], other=0.0)",
            "mask=(column < n)[:, None], other=0.0)",
        ),
        (
            "no mask of the bias",
            "tl.load(bias + column, mask=column < n, other=0.0)",
            "tl.load(bias + column)",
        ),
        ("32-bit rows of z", "row.to(tl.int64)[:, None] * stride_z", "row[:, None] * stride_z"),
        ("moments not scaled", "halves(product * scaling, BM, BN)", "halves(product, BM, BN)"),
        (
            "only_group lost",
            "            -1 if only_group is None else only_group,\n            RANK",
            "            0,\n            RANK",
        ),
    ),
    *_mutations(
        "kernels/scores.py",
        f"tests/kernels/test_scores.py {BOUNDS}",
        (
            "counts of the groups swapped",
            "count_f = tl.load(counts + 2 * layer)",
            "count_f = tl.load(counts + 2 * layer + 1)",
        ),
        (
            "Σh² of the other group",
            "tl.load(moment + 3 * stride, mask=inside, other=0.0)",
            "tl.load(moment + 2 * stride, mask=inside, other=0.0)",
        ),
        (
            "a layer ends one neuron late",
            "last = tl.load(offsets + layer + 1)\n    count_f",
            "last = tl.load(offsets + layer + 1) + 1\n    count_f",
        ),
        (
            "only the first block of a chunk",
            "for start in range(first + chunk * BLOCK, last, chunks * BLOCK):\n        neuron = start + tl.arange(0, BLOCK)\n        inside = neuron < last\n        moment",
            "for start in range(first + chunk * BLOCK, tl.minimum(last, first + chunk * BLOCK + 1), chunks * BLOCK):\n        neuron = start + tl.arange(0, BLOCK)\n        inside = neuron < last\n        moment",
        ),
        ("variance without the mean", "tl.maximum(sq_f - mean_f * mean_f, 0.0)", "sq_f"),
        ("a negative contrast stays", "c = tl.maximum(c, 0.0)", "c = c + 0.0"),
        ("ratio over a silent neuron", "tl.maximum(a_r, 1.1754943508222875e-38)", "a_r"),
        (
            "utility without the weights",
            "tl.load(weight_norms + neuron, mask=inside, other=0.0) * root_r",
            "root_r",
        ),
        (
            "maximum of the last block alone",
            "top_utility = tl.maximum(top_utility, importance)",
            "top_utility = importance",
        ),
        (
            "maxima of R and U swapped",
            "parts += tl.num_programs(0).to(tl.int64) * chunks",
            "parts += 0",
        ),
        (
            "maximum over one chunk",
            "tl.load(parts, mask=part < chunks, other=0.0), axis=0)\n    parts",
            "tl.load(parts, mask=part < 1, other=0.0), axis=0)\n    parts",
        ),
        ("the plan's maximum is the first layer's", "range(0, parts, BLOCK)", "range(0, 1, BLOCK)"),
        (
            "global is layer",
            'if NORMALIZATION == "global":\n        top_risk',
            "if False:\n        top_risk",
        ),
        ("cube is square", "power = kept * kept * kept", "power = kept * kept"),
        ("the power of 0 is 1", "power = tl.where(some, power, 0.0)", "power = power + 0.0"),
        ("λ dropped", "s = r - utility_weight * u", "s = r - u"),
        ("the threshold is selected", "selected = s > threshold", "selected = s >= threshold"),
        (
            "the threshold in fp32",
            "threshold = tl.full([BLOCK], threshold, dtype=tl.float64)",
            "threshold = tl.full([BLOCK], threshold.to(tl.float32), dtype=tl.float32).to(tl.float64)",
        ),
        ("no floor of γ", "factor = tl.maximum(factor, floor)", "factor = factor + 0.0"),
        ("γ of the others", "tl.where(selected, factor, 1.0)", "factor"),
        (
            "the gap from zero",
            "gap = tl.load(top) - threshold",
            "gap = tl.load(top) + 0 * threshold",
        ),
        ("inverse decay without β", "1.0 / (1.0 + strength * u)", "1.0 / (1.0 + u)"),
    ),
    *_mutations(
        "kernels/attenuate.py",
        f"tests/kernels/test_attenuate.py {BOUNDS}",
        (
            "rows and columns swapped",
            "per_position = tl.load(row + 7) == 0",
            "per_position = tl.load(row + 7) != 0",
        ),
        (
            "a factor of 1 multiplies",
            "tl.store(address, tl.where(factor == 1.0, old, new), mask=touched)",
            "tl.store(address, new, mask=touched)",
        ),
        (
            "the first factor of all",
            "first_factor = tl.load(row + 2)",
            "first_factor = tl.load(row + 2) * 0",
        ),
        (
            "factors rounded first",
            "widened(old, WIDE, INTERPRETED) * factor.to(WIDE)",
            "widened(old, WIDE, INTERPRETED) * round_to(factor, DTYPE, INTERPRETED).to(WIDE)",
        ),
        ("fp64 in fp32", "tl.float64 if dtype == torch.float64 else tl.float32", "tl.float32"),
        ("lines past the end", "inside = line < lines", "inside = line <= lines"),
        (
            "the line stride is the length",
            "data + (line * line_stride)[:, None]",
            "data + (line * per_line * WIDTH)[:, None]",
        ),
        ("the step is 1", "position * tl.load(row + 6)", "position"),
        (
            "the search stops before the matrix",
            "tl.load(table + middle * FIELDS) <= block",
            "tl.load(table + middle * FIELDS) < block",
        ),
        (
            "one step too few in the search",
            "(len(of_dtype) - 1).bit_length()",
            "max((len(of_dtype) - 1).bit_length() - 1, 0)",
        ),
        (
            "every dtype starts at the first row",
            "table += first_row * FIELDS",
            "table += 0 * first_row * FIELDS",
        ),
        ("blocks counted from the first matrix", "    block -= tl.load(row)\n", ""),
        ("blocks overlap", "block * ELEMENTS, DTYPE", "block * (ELEMENTS // 2), DTYPE"),
        ("misaligned weights in wide units", "        and weight.data_ptr() % 16 == 0\n", ""),
        ("odd lengths in wide units", "        and length % width == 0\n", ""),
        (
            "a wide unit takes one factor",
            "index = position[:, None] + neighbour[None, :]\n        factor",
            "index = position[:, None] + 0 * neighbour[None, :]\n        factor",
        ),
        ("long lines by 32 bits", "if per_line < 1 << 30:", "if per_line < 1 << 62:"),
        (
            "a transposed weight keeps its axis",
            "        factor_per_line = not factor_per_line\n",
            "",
        ),
    ),
    *_mutations(
        "csrc/attenuate_cpu.cpp",
        "tests/test_native.py tests/ops/test_attenuate.py",
        (
            "factor rounded to the weight's dtype",
            "static_cast<Wide<T>>(value) * static_cast<Wide<T>>(factor)",
            "static_cast<Wide<T>>(value) * static_cast<Wide<T>>(static_cast<T>(factor))",
        ),
        ("fp64 in fp32", "std::conditional_t<std::is_same_v<T, double>, double, float>", "float"),
        (
            "every line is scaled",
            "count += !is_one(factors[line]);",
            "count += 1;",
        ),
        (
            "lines past 256 take the first factors",
            "const float* factors = matrix.factors + start;",
            "const float* factors = matrix.factors;",
        ),
        (
            "lines past 256 are the first ones again",
            "static_cast<T*>(matrix.data) + start * line_stride;",
            "static_cast<T*>(matrix.data);",
        ),
        (
            "the last line is left out",
            "std::min(kBlock, last - start)",
            "std::min(kBlock, last - start - 1)",
        ),
        (
            "a strided line of 16 is contiguous",
            "matrix.step == 1 ? matrix.length : 0",
            "matrix.length",
        ),
        (
            "a position's factor of 1 multiplies",
            "std::bit_cast<T>(is_one(factors[j]) ? kept : product)",
            "std::bit_cast<T>(product)",
        ),
        (
            "one factor of 1 leaves all positions",
            "std::all_of(factors, factors + length, is_one)",
            "std::any_of(factors, factors + length, is_one)",
        ),
        (
            "a task's first line is the matrix's",
            "const int64_t first = start >= begin ? 0 : line_at(begin);",
            "const int64_t first = 0;",
        ),
        (
            "a task's last line is the matrix's",
            "const int64_t last = ends[i] <= end ? matrix.lines : line_at(end);",
            "const int64_t last = matrix.lines;",
        ),
    ),
    *_mutations(
        "csrc/checks.h",
        "tests/test_native.py tests/ops/test_attenuate.py",
        (
            "the last factor is one too far",
            "needed <= available - offsets[i]",
            "needed <= available - offsets[i] + 1",
        ),
        (
            "negative offsets",
            "offsets[i] >= 0 && offsets[i] <= available",
            "offsets[i] <= available",
        ),
        ("any axis", "axis == 0 || axis == 1, ", "axis < 3, "),
        (
            "neighbours may overlap by an element",
            "spans[i - 1].end <= spans[i].first",
            "spans[i - 1].end <= spans[i].first + 4",
        ),
        (
            "factors may lie in a weight",
            "span.end <= factors || factors + count * sizeof(float) <= span.first || count == 0,",
            "true,",
        ),
        (
            "factors of one byte",
            "factors + count * sizeof(float) <= span.first",
            "factors + count <= span.first",
        ),
        ("spans unsorted", "std::sort(spans.begin(), spans.end(), earlier);", ""),
        (
            "interleaved lines do not overlap",
            "if ((cols - 1) * s1 < s0 || (rows - 1) * s0 < s1) return false;",
            "return false;",
        ),
        (
            "one stride more is apart",
            "if ((cols - 1) * s1 < s0 || (rows - 1) * s0 < s1) return false;",
            "if ((cols - 2) * s1 < s0 || (rows - 2) * s0 < s1) return false;",
        ),
        ("any dtype", "number == numbers.float16, ", "true, "),
        (
            "the spans of fp64 weights in 16 bits",
            "dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2",
            "dtype == Dtype::float32 ? 4 : 2",
        ),
        (
            "the spans of all weights in 16 bits",
            "(last + 1) * element_size(dtype)",
            "(last + 1) * 2",
        ),
        (
            "an expanded weight",
            "if ((rows > 1 && s0 == 0) || (cols > 1 && s1 == 0)) return true;",
            "if (s0 == 0 || s1 == 0) return false;",
        ),
        ("columns walked as rows", "      factor_per_line = !factor_per_line;\n", ""),
        (
            "every weight at the first factor",
            "first_factor + offsets[i]",
            "first_factor",
        ),
    ),
    *_mutations(
        "csrc/rows.h",
        "tests/ops/test_native_moments.py tests/ops/test_moments.py tests/ops/test_native_shrink.py --deselect tests/ops/test_native_moments.py::test_every_instruction_set",
        (
            "groups swapped",
            "value == 0 ? 0 : value == 1 ? 1 : kUncounted",
            "value == 0 ? 1 : value == 1 ? 0 : kUncounted",
        ),
        (
            "groups cut to 8 bits",
            "const G value = groups[row * stride];",
            "const int8_t value = static_cast<int8_t>(groups[row * stride]);",
        ),
        (
            "only_group ignored",
            "if (only_group >= 0 && group != only_group) group = kUncounted;",
            "",
        ),
        (
            "the last batch is dropped",
            "for (int group = 0; group < 3; ++group) flush(group);",
            "for (int group = 0; group < 1; ++group) flush(group);",
        ),
        ("fp32 sums of 64 rows", "kBatchesPerPartial = 4;", "kBatchesPerPartial = 8;"),
        (
            "subnormal fp16 as normal",
            "magnitude < (1u << 27) ? as_bits(subnormal) : as_bits(normal)",
            "as_bits(normal)",
        ),
        (
            "abs and sq swapped",
            "out + (2 * s + g) * out_stride",
            "out + (2 * (1 - s) + g) * out_stride",
        ),
        ("totals replaced", "moments[j] += totals[j];", "moments[j] = totals[j];"),
        (
            "the last segment is left out",
            "for (int64_t segment = 1; segment < segments; ++segment)",
            "for (int64_t segment = 1; segment + 1 < segments; ++segment)",
        ),
        (
            "the step is 1",
            "out[j] = static_cast<W>(source[j * step]);",
            "out[j] = static_cast<W>(source[j]);",
        ),
        ("too few groups", "groups.dim() == 1 && groups.size(0) == tokens", "groups.dim() == 1"),
        ("memory may overlap", "end <= y_start || y_end <= start", "start != y_start"),
    ),
    *_mutations(
        "ucan_fast/walk_job.py",
        "tests/test_influence_walk.py",
        (
            "no end at the ceiling",
            "if math.isfinite(way) and self.ceiling",
            "if False and self.ceiling",
        ),
        ("an end without a ceiling", "if math.isfinite(way) and ", "if "),
        (
            "an earlier plan's cost is forgotten",
            "        self.cost_before = self.cost = cost\n",
            "        if earlier is None:\n            self.cost_before = self.cost = cost\n",
        ),
    ),
    *_mutations(
        "csrc/moments_cpu.cpp",
        "tests/ops/test_native_moments.py tests/ops/test_moments.py --deselect tests/ops/test_native_moments.py::test_every_instruction_set",
        ("no square", "q += value * value;", "q += std::abs(value);"),
    ),
    *_mutations(
        "csrc/expand_cpu.cpp",
        "tests/ops/test_native_expand.py --deselect tests/ops/test_native_expand.py::test_every_instruction_set",
        ("no square", "q += value * value;", "q += value;"),
        ("no magnitude", "(Vector)((Bits)value & kMagnitude)", "value"),
        (
            "bias counted",
            "value = scaling * product[i][v];",
            "value = scaling * (product[i][v] + shift);",
        ),
        (
            "bias not scaled",
            "scaling * (product[i][v] + shift);\n    }",
            "scaling * product[i][v] + shift;\n    }",
        ),
        ("rows that are not there", "if (!kAll && i >= count) continue;", ""),
        ("no rest of the columns", "if (rest) {", "if (false) {"),
        ("B's step is 1", "from[j * row_stride + p * step]", "from[j * row_stride + p]"),
        ("z's step is 1", "row[p * call.z_step]", "row[p]"),
        ("memory may overlap", 'check_apart(z, y, op, "z", "y");', ""),
        (
            "a last row not rounded",
            "call.rounds && i < batch.count",
            "call.rounds && i + 1 < batch.count",
        ),
        (
            "rounded from column 0 on",
            "indices[i] * call.columns + column;\n        if",
            "indices[i] * call.columns;\n        if",
        ),
        (
            "the rest of the columns not rounded",
            "(buffer[i], n, call.y, offset);\n        } else",
            "(buffer[i], whole, call.y, offset);\n        } else",
        ),
        ("fp16 as bf16", "call.base.dtype == Dtype::bfloat16", "true"),
        (
            "another narrow dtype than base's",
            "!rounds || base->scalar_type() == y.scalar_type()",
            "true",
        ),
    ),
    *_mutations(
        "csrc/shrink_cpu.cpp",
        "tests/ops/test_native_shrink.py --deselect tests/ops/test_native_shrink.py::test_every_instruction_set",
        ("the last row is not there", "row + i < last ?", "row + i + 1 < last ?"),
        ("one stretch of columns", "column += kDepth", "column += call.columns"),
        ("the last stretch is whole", "std::min(kDepth, call.columns - column)", "kDepth"),
        ("sums are not begun", "std::fill_n(sums", "if (first > 0) std::fill_n(sums"),
        ("panels one column off", "(panel * call.columns + column)", "(panel * call.columns)"),
        ("A's step is 1", "from[p * step]", "from[p]"),
        ("A ends with its panel", "r < call.rank ? from[p * step] : W(0)", "from[p * step]"),
        ("one task too few", "divide_up(call.rows, kTaskRows)", "call.rows / kTaskRows"),
        ("a sum in one register", "kDepth = 256", "kDepth = 65536"),
        ("memory may overlap", 'check_apart(x, z, op, "x", "z");', ""),
    ),
    *_mutations(
        "ucan_fast/ops/shrink.py",
        "tests/ops/test_shrink_expand.py tests/ops/test_checks.py tests/test_triton_path.py",
        (
            "no check in the operator",
            "def _shrink(x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:\n    _check(x, a, dtype)\n",
            "def _shrink(x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:\n",
        ),
        (
            "the kernel's call loses only_group",
            "return launch(x, a, dtype, groups, only_group, input_moments, rank_moments)",
            "return launch(x, a, dtype, groups, None, input_moments, rank_moments)",
        ),
        (
            "the reference instead of the kernel",
            '    backend = _backend(x, a, dtype)\n    if backend == "triton":',
            '    backend = _backend(x, a, dtype)\n    if backend == "never":',
        ),
        (
            "moments under autograd",
            '    check_not_recorded("shrink", x=x, A=a)\n    _check_moments',
            "    _check_moments",
        ),
        (
            "moments of z from x",
            "add_moments_(z, groups, only_group, rank_moments)",
            "add_moments_(z * 2, groups, only_group, rank_moments)",
        ),
        (
            "a kernel run past autograd",
            "runs_directly(backend, x, a)",
            "runs_directly('reference', x, a)",
        ),
        (
            "a kernel under torch.func",
            'backend == "triton" and is_transformed(x, a)',
            'backend == "never" and is_transformed(x, a)',
        ),
        (
            "the gradient of A transposed",
            "rows.t() @ x.to(ctx.dtype)",
            "2 * rows.t() @ x.to(ctx.dtype)",
        ),
    ),
    *_mutations(
        "ucan_fast/ops/lora.py",
        "tests/ops/test_lora.py",
        ("written where it may not be", "if overwrite and bias", "if bias"),
        ("the bias is left out", "bias is None and _is_plain", "_is_plain"),
        ("not scaled", "dtype).t(), alpha=scaling", "dtype).t()"),
        ("a product of another dtype", "base_out.dtype == dtype and _sums", "_sums"),
        ("few rows of another dtype", "and x.dtype == a.dtype == dtype and", "and"),
        ("B as it is stored", "cast(b, dtype).t()", "b.t()"),
        ("narrow sums in place", "dtype in WIDE or (", "dtype in WIDE or True or ("),
        ("halves of two dtypes", "and a.dtype == b.dtype", ""),
        ("few rows not scaled", "add_(product, alpha=scaling)", "add_(product)"),
        ("a narrow product of few rows", "wide = dtype in WIDE and", "wide ="),
        ("many rows like few", "if wide and rows < EXPAND_ROWS and", "if wide and"),
        (
            "bf16 without instructions for it",
            "scaling != 0 and _multiplies_bfloat16()",
            "scaling != 0",
        ),
        ("slow code for a factor of 0", " and scaling != 0", ""),
        ("no dtype of ours", "and x.dtype in FLOATING", ""),
        (
            "a base that is no float",
            "and base_out.dtype in FLOATING",
            "",
        ),
        ("a strided base", "and base_out.is_contiguous()", ""),
        ("empty outputs", "and base_out.numel() > 0", ""),
        ("other tokens than the base's", "and base_out.shape[:-1] == x.shape[:-1]", ""),
        ("A of another K", "and a.shape == (b.shape[-1], x.shape[-1])", ""),
        ("another backend by name", 'and requested_backend() == "auto"', ""),
        ("autocast casts a few rows' z", "== dtype and not casts", "== dtype"),
        ("autocast casts few rows", "rows < EXPAND_ROWS and not casts", "rows < EXPAND_ROWS"),
        (
            "a gradient of A is lost",
            "is_unobserved(base_out, x, a, b)",
            "is_unobserved(base_out, x, b)",
        ),
    ),
    *_mutations(
        "ucan_fast/adapter.py",
        "tests/test_accelerate.py",
        ("a trace holds our operators", "return torch.jit.is_tracing()", "return False"),
        (
            "a compiled transform sees our operators",
            "return _is_transformed_while_traced()",
            "return False",
        ),
        (
            "dual tensors go into a compiled layer",
            "is not None or forward_ad._current_level >= 0",
            "is not None",
        ),
        ("a bias of A", 'a._parameters.get("bias") is not None', "False"),
        (
            "another forward of all linear layers",
            "or nn.Linear.forward is not _LINEAR_FORWARD:",
            "or False:",
        ),
        ("meta tensors", "or x.is_meta:", "or False:"),
        ("a scaling of True", "float(scaling)))", "scaling))"),
    ),
    *_mutations(
        "ucan_fast/adapter.py",
        "tests/test_stats.py",
        ("labels of another scaling", "[identity, scalings, shapes]", "[identity, shapes]"),
        ("labels of another shape", "[identity, scalings, shapes]", "[identity, scalings]"),
        ("labels of another base", "[identity, scalings, shapes]", "[scalings, shapes]"),
    ),
    *_mutations(
        "ucan_fast/collect.py",
        "tests/test_collect.py",
        ("a pass ends all others", "if r is not recorder]", "if False]"),
        (
            "a pass takes another's place",
            '(*module.__dict__.get("_ucan_recorders", ()), recorder)',
            "(recorder,)",
        ),
        (
            "layers that ran elsewhere",
            "if recorder.last_batch != self.batches:",
            "if False:",
        ),
        (
            "what one batch left is held against the next",
            "        self.elsewhere.clear()\n",
            "",
        ),
        (
            "a forward given back",
            "if recorder.fused and not isinstance(recorder.layer.module, FusedLoraLinear):",
            "if False:",
        ),
        ("calls between two batches", "        if not pass_.tokens:\n", "        if False:\n"),
    ),
    *_mutations(
        "ucan_fast/ops/expand.py",
        "tests/ops/test_shrink_expand.py tests/ops/test_native_expand.py tests/ops/test_checks.py "
        "tests/test_triton_path.py",
        (
            "a silent fallback",
            '    sums = (groups, only_group, delta_moments)\n    if backend == "triton":',
            '    sums = (groups, only_group, delta_moments)\n    if backend == "never":',
        ),
        (
            "tangents of the bias are dropped",
            "is_transformed(base_out, z, b, bias)",
            "is_transformed(base_out, z, b)",
        ),
        ("narrow products in one pass", "if not fits or n == 0", "if n == 0"),
        (
            "native by name for many rows alone",
            ' or requested_backend() == "native"',
            "",
        ),
        (
            "moments of B as it is rounded",
            "apart = delta_moments is not None and torch.promote_types(b.dtype, dtype) != dtype",
            "apart = False",
        ),
        ("B in full for a narrow z", "cast(cast(b, dtype), wide)", "cast(b, wide)"),
        (
            "moments under autograd",
            "bias=bias)\n    _check(base_out, z, b, bias)\n    check_moments",
            "bias=None)\n    _check(base_out, z, b, bias)\n    check_moments",
        ),
        (
            "moments not scaled",
            "return delta if scaling == 1.0 else delta * scaling",
            "return delta",
        ),
        (
            "gradients not scaled",
            "grad_delta = (wide * scaling).to(z.dtype)",
            "grad_delta = wide.to(z.dtype)",
        ),
        (
            "no check of the groups",
            "    _check(base_out, z, b, bias)\n    check_moments(base_out, groups, delta_moments, only_group)\n    sums",
            "    _check(base_out, z, b, bias)\n    sums",
        ),
    ),
    *_mutations(
        "ucan_fast/ops/moments.py",
        "tests/ops/test_moments.py tests/ops/test_checks.py",
        (
            "no check in the operator",
            "    check_moments(h, groups, moments, only_group)\n    add_moments_(h",
            "    add_moments_(h",
        ),
        (
            "totals with strides are lost",
            "        if totals is not moments:\n            moments.copy_(totals)\n",
            "",
        ),
        (
            "one group more in C++",
            "group = -1 if only_group is None else only_group\n        totals",
            "group = -1\n        totals",
        ),
        (
            "sums under autocast",
            "with torch.no_grad(), without_autocast(h.device.type):",
            "with torch.no_grad():",
        ),
        (
            "the graph grows into the totals",
            "with torch.no_grad(), without_autocast(h.device.type):",
            "with without_autocast(h.device.type):",
        ),
    ),
    *_mutations(
        "ucan_fast/ops/scores.py",
        "tests/ops/test_scores.py tests/ops/test_checks.py tests/test_triton_path.py",
        (
            "no check of the offsets",
            "    _check_values(counts, weight_norms, offsets)\n    if",
            "    if",
        ),
        (
            "no check of the choices",
            "        if choice not in _CHOICES[name]:",
            "        if False:",
        ),
        ("past whoever records calls", "        and is_unobserved(*tensors)\n", ""),
        (
            "meta tensors are checked for their values",
            "        and not any(tensor.is_meta for tensor in tensors)\n",
            "",
        ),
        (
            "the reference instead of the kernel",
            'choose("contrastive_scores", moments.device) == "triton"',
            'choose("contrastive_scores", moments.device) == "never"',
        ),
        ("any threshold", "if not math.isfinite(threshold):", "if False:"),
        (
            "any score",
            "    if not all(map(math.isfinite, torch.stack((low, high)).tolist())):",
            "    if False:",
        ),
    ),
    *_mutations(
        "ucan_fast/ops/attenuate.py",
        "tests/ops/test_attenuate.py tests/ops/test_checks.py tests/test_triton_path.py",
        (
            "no check in the operator",
            '    backend = choose("attenuate_", factors.device)\n    _check(weights, factors, offsets, axes)\n',
            '    backend = choose("attenuate_", factors.device)\n',
        ),
        ("overlaps are not looked for", "    _check_overlap(weights, factors)\n\n", "\n"),
        (
            "factors may lie in a weight",
            "        if factors_start < end and start < factors_end:",
            "        if False:",
        ),
        (
            "the reference instead of the kernel",
            "    launch(weights, factors, offsets, axes)\n",
            "    attenuate_reference_(weights, factors, offsets, axes)\n",
        ),
        (
            "a backward does not notice",
            "        torch.autograd.graph.increment_version(weights)",
            "        pass",
        ),
        ("strided factors as they lie", "    factors = factors.contiguous()\n", ""),
    ),
    *_mutations(
        "ucan_fast/ops/fused_linear.py",
        "tests/ops/test_fused_linear.py tests/ops/test_checks.py",
        (
            "no check in the operator",
            "    _check(x, weight, z, b, bias, lora_bias)\n    launch",
            "    launch",
        ),
        (
            "the base's bias is dropped",
            "return F.linear(x, weight, bias)",
            "return F.linear(x, weight)",
        ),
        (
            "tangents are dropped",
            "not torch.compiler.is_compiling() and is_transformed(*tensors)",
            "False",
        ),
        (
            "the kernel is never taken",
            "return launch if obstacle(x, weight, z, b, bias, lora_bias) is None else None",
            "return None",
        ),
        (
            "always wanted",
            'switch == "auto" and not tuning.fused_linear_wins',
            'switch == "never" and not tuning.fused_linear_wins',
        ),
    ),
    *_mutations(
        "ucan_fast/ops/backend.py",
        "tests/ops/test_backend.py tests/ops/test_shrink_expand.py",
        ("negated views as they lie", "(kernel and t.is_neg())", "False"),
        ("tangents are not looked for", "if forward_ad._current_level < 0:", "if True:"),
        (
            "transforms are not looked for",
            "    if torch._C._functorch.peek_interpreter_stack() is not None:\n        return True\n",
            "",
        ),
        (
            "a named backend falls back",
            '    if reason:\n        raise UcanError(f"backend',
            '    if reason:\n        return "reference"\n        raise UcanError(f"backend',
        ),
        (
            "the interpreter by itself",
            'if kind != "cpu" and triton_obstacle',
            "if triton_obstacle",
        ),
        (
            "Triton before C++",
            "if operator in _NATIVE.get(kind, ()) and native_obstacle(operator, device) is None:",
            "if False:",
        ),
        ("any name", "    if name not in BACKENDS:", "    if False:"),
        ("fp64 to the kernels", "if dtype not in _TRITON_DTYPES), None)", "if False), None)"),
        (
            "a GPU without TMA is taken",
            "torch.cuda.get_device_capability(device) < kernels.TMA_CAPABILITY",
            "False",
        ),
    ),
]


def copy_of_checkout(folder: Path) -> Path:
    """A copy that can be broken, with the built libraries."""
    target = folder / "checkout"
    shutil.copytree(ROOT, target, symlinks=True, ignore=_LEFT_OUT)
    return target


def run_tests(checkout: Path, tests: tuple[str, ...], timeout: int) -> tuple[int, str]:
    """pytest's exit code and output; a timeout counts as a failed test."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    try:
        done = subprocess.run(
            command,
            cwd=checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return 1, f"FAILED after {timeout} s without an end"
    return done.returncode, done.stdout


def build(checkout: Path) -> tuple[int, str]:
    """The CPU library in place."""
    environment = os.environ | {"UCAN_FAST_SKIP_CUDA": "1", "UCAN_FAST_REQUIRE_EXTENSION": "1"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def attempt(mutation: Mutation, checkout: Path, timeout: int) -> tuple[bool, str]:
    """Whether a test noticed, and one line about it. The copy is mended afterwards."""
    file = checkout / mutation.file
    whole = file.read_text(encoding="utf-8")
    native = mutation.file.startswith("csrc")
    library = next((checkout / "ucan_fast").glob("_C.*so"), None)
    kept = library.read_bytes() if library and native else None
    try:
        file.write_text(whole.replace(mutation.old, mutation.new), encoding="utf-8")
        if native:
            code, output = build(checkout)
            if code:
                return False, "DID NOT COMPILE: " + _last(output)
        code, output = run_tests(checkout, mutation.tests, timeout)
    finally:
        file.write_text(whole, encoding="utf-8")
        if kept is not None:
            library.unlink()
            library.write_bytes(kept)
    if code == 0:
        return False, "SURVIVED"
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, re.MULTILINE)
    if code == 1 and failed:
        return True, f"killed by {failed[1]}"
    if code < 0:
        return True, f"killed: the tests ended by signal {-code}"
    return False, f"NOT TRIED (pytest ended with {code}): {_last(output)}"


def _last(output: str) -> str:
    lines = [line for line in output.splitlines() if "rror" in line] or output.splitlines()
    return lines[-1][:200] if lines else ""


def main(arguments: list[str] | None = None) -> int:
    """0 if every mutation was noticed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="TEXT", help="in the mutation's name or file")
    parser.add_argument("--list", action="store_true", help="only name them")
    parser.add_argument("--jobs", type=int, default=1, help="copies at work (default: 1)")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for the tests of one")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTATIONS if options.only is None or options.only in f"{m.name} {m.file}"]
    if options.list or not chosen:
        print("\n".join(m.name for m in chosen) or "no mutation has that name")
        return int(not chosen)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for index in range(max(1, min(options.jobs, len(chosen)))):
            copies.put(copy_of_checkout(Path(folder) / str(index)))
        first = copies.queue[0]
        if any(m.file.startswith("csrc") for m in chosen):
            code, output = build(first)
            if code:
                print(f"the extension cannot be built here: {_last(output)}")
                return 1
        tests = tuple(dict.fromkeys(test for m in chosen for test in m.tests))
        code, output = run_tests(first, tests, 10 * options.timeout)
        if code:
            print(f"{output[-3000:]}\nthe tests fail without a mutation")
            return 1

        def take(mutation: Mutation) -> tuple[bool, str]:
            checkout = copies.get()
            try:
                return attempt(mutation, checkout, options.timeout)
            finally:
                copies.put(checkout)

        survivors = 0
        with concurrent.futures.ThreadPoolExecutor(copies.qsize()) as pool:
            for mutation, (noticed, line) in zip(chosen, pool.map(take, chosen), strict=True):
                survivors += not noticed
                print(f"{mutation.name}: {line}", flush=True)
    minutes = (time.perf_counter() - start) / 60
    print(f"{len(chosen)} mutations, {survivors} not noticed, {minutes:.1f} minutes")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
