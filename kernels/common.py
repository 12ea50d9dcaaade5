"""What the kernels share: rounding, column sums, the folding of partial sums, launch options.

Rules for every kernel of this package:

- Values are loaded in their own dtype, widened to fp32, and rounded once on the way out. Dots take
  fp32 operands under Triton's interpreter, whose bf16 arithmetic is wrong, and the native dtype on
  a GPU (:data:`CAST_DOT`).
- Every masked load names ``other``; row offsets are 64-bit; sizes and scalings are run-time values.
- No floating-point atomics: partial sums go to slots that one program owns, and
  :func:`fold_` adds the slots in a fixed order. The same input gives the same bits.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

#: Whether ``@triton.jit`` made interpreted functions here: decided when this module is imported.
INTERPRET: bool = bool(triton.knobs.runtime.interpret)
#: Whether dots take their operands in bf16/fp16; the interpreter must not.
CAST_DOT: bool = not INTERPRET

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}

#: Slots and columns that one step of a fold reads. Few columns, so that there are many programs;
#: of a small rank there is one tile, and more slots at a time are fewer waits for memory.
FOLD_WIDE = {"SLOTS": 64, "COLUMNS": 32, "num_warps": 4}
FOLD_NARROW = {"SLOTS": 256, "COLUMNS": 16, "num_warps": 4}
#: Few slots, as of :mod:`.expand`, are a thread's own: no thread waits for another.
FOLD_FEW = {"SLOTS": 8, "COLUMNS": 128, "num_warps": 1}


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of a kernel, for the ahead-of-time gate (``kernels.aot``).

    Attributes:
        name: what a reader of the table sees, for example ``"bf16 x, fp32 A, r 16, moments"``.
        kernel: the ``@triton.jit`` function.
        signature: type of every argument: ``"*bf16"``, ``"i64"``, ``"fp32"``, ``"constexpr"``.
        constants: value of every constexpr argument.
        divisible: arguments that are multiples of 16 (pointers and strides) in real models.
        num_warps, num_stages: as launched.
        dot: tensor-core instructions must be in the machine code.
        wide_loads: 16-byte global loads must be in the machine code.
        options: further compile options, as launched (``enable_fp_fusion``).
        capabilities: compute capabilities it ships for, times ten.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    dot: bool = False
    wide_loads: bool = True
    options: dict[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": True})
    capabilities: tuple[int, ...] = (80, 90, 100)


def ceil_div(number: int, divisor: int) -> int:
    """As ``triton.cdiv``, which takes microseconds from Python."""
    return -(-number // divisor)


def pad_rank(r: int) -> int:
    """The smallest rank that a dot can have and that holds r."""
    return max(16, triton.next_power_of_2(r))


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one: Triton launches on that."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., n]`` as ``[tokens, n]``: a view where the strides allow one, else a copy."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.shape[-1] else tensor.new_empty(0, 0)


def new_slots(slots: int, n: int, only_group: int | None, device: torch.device) -> torch.Tensor:
    """Uninitialised fp32 ``[slots, 2, G, n]``: Σ|h| and Σh² per group; G = 1 for one group."""
    groups = 2 if only_group is None else 1
    return torch.empty(slots, 2, groups, n, dtype=torch.float32, device=device)


@triton.jit
def round_to(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 to DTYPE, to nearest even. The interpreter truncates to bf16 and garbles its subnormal
    numbers; here the bits are made by hand."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A NaN stays one: rounding could carry its payload away.
        nearest = tl.where(value == value, nearest, (bits >> 16) | 0x40)
        rounded = nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = value.to(DTYPE)
    return rounded


@triton.jit
def as_operand(value, DTYPE: tl.constexpr, CAST_DOT: tl.constexpr):
    """A dot's operand, rounded to DTYPE: in DTYPE on a GPU, in fp32 under the interpreter."""
    if CAST_DOT:
        value = value.to(DTYPE)
    else:
        value = round_to(value.to(tl.float32), DTYPE, True).to(tl.float32)
    return value


@triton.jit
def fold_rows(value, LANES: tl.constexpr):
    """``[rows, columns]`` to ``[LANES, columns]``: the sums over every LANES-th row."""
    rows: tl.constexpr = value.shape[0] // LANES
    return tl.sum(tl.reshape(value, [rows, LANES, value.shape[1]]), axis=0)


@triton.jit
def lane_sums(h, group, only_group, BOTH: tl.constexpr, LANES: tl.constexpr):
    """Σ|h| and Σh² over every LANES-th row of each group, for one tile: ``[LANES, columns]``.

    h: fp32 ``[rows, columns]``; group: ``[rows]``, -1 for rows past the end. Returns forget-|h|,
    retain-|h|, forget-h², retain-h²; with ``BOTH`` False the first and third are those of
    ``only_group`` and the others repeat them.

    Where a thread holds every LANES-th row of its columns, nothing is exchanged between threads:
    the sum over the lanes needs that, and is taken once per program instead of once per tile.
    """
    if BOTH:
        forget = group == 0
        retain = group == 1
        # where, not a product: a NaN in an ignored row must not spread.
        h = tl.where((forget | retain)[:, None], h, 0.0)
        f = forget.to(tl.float32)[:, None]
        r = retain.to(tl.float32)[:, None]
        size = tl.abs(h)
        square = h * h
        abs_f = fold_rows(size * f, LANES)
        abs_r = fold_rows(size * r, LANES)
        sq_f = fold_rows(square * f, LANES)
        sq_r = fold_rows(square * r, LANES)
    else:
        counted = group == only_group
        h = tl.where(counted[:, None], h, 0.0)
        abs_f = fold_rows(tl.abs(h), LANES)
        # Times 1 or 0: a bare h * h would be fused into the first sum over other threads' rows, in
        # each thread with its own h, and copies of one sum would differ in their last bit.
        sq_f = fold_rows(h * h * counted.to(tl.float32)[:, None], LANES)
        abs_r = abs_f
        sq_r = sq_f
    return abs_f, abs_r, sq_f, sq_r


@triton.jit
def column_sums(h, group, only_group, BOTH: tl.constexpr):
    """As :func:`lane_sums` over all rows, of which there may be 128: ``[columns]``."""
    abs_f, abs_r, sq_f, sq_r = lane_sums(h, group, only_group, BOTH, 1)
    return tl.sum(abs_f, axis=0), tl.sum(abs_r, axis=0), tl.sum(sq_f, axis=0), tl.sum(sq_r, axis=0)


@triton.jit
def store_sums(slots, slot, columns, n, abs_f, abs_r, sq_f, sq_r, BOTH: tl.constexpr):
    """Writes the sums of one tile of columns into slot ``slot`` of ``[slots, 2, G, n]``."""
    inside = columns < n
    if BOTH:
        base = slots + slot.to(tl.int64) * 4 * n + columns
        tl.store(base, abs_f, mask=inside)
        tl.store(base + n, abs_r, mask=inside)
        tl.store(base + 2 * n, sq_f, mask=inside)
        tl.store(base + 3 * n, sq_r, mask=inside)
    else:
        base = slots + slot.to(tl.int64) * 2 * n + columns
        tl.store(base, abs_f, mask=inside)
        tl.store(base + n, sq_f, mask=inside)


@triton.jit
def fold_tile(
    slots,
    totals,
    tile,
    part,
    slot_count,
    n,
    total_stride,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """totals[stat, g] += Σ slots[:, stat, g] for one tile of columns and one ``part``, which is
    stat * GROUPS + g. fp32 summed in fp64, always in the same order."""
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    target = totals + (part // GROUPS) * total_stride + (part % GROUPS) * n + column
    # Asked for first: one wait for memory instead of two.
    before = tl.load(target, mask=inside, other=0.0)
    total = tl.zeros([COLUMNS], dtype=tl.float64)
    for first in range(0, slot_count, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        address = slots + (slot.to(tl.int64) * 2 * GROUPS + part)[:, None] * n + column[None, :]
        value = tl.load(address, mask=(slot < slot_count)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(value.to(tl.float64), axis=0)
    tl.store(target, before + total, mask=inside)


@triton.jit(do_not_specialize=["slot_count"])
def fold_kernel(
    slots,
    totals,
    slot_count,
    n,
    total_stride,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: :func:`fold_tile`."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    fold_tile(
        *(slots, totals, tile, part, slot_count, n, total_stride),
        *(GROUPS, SLOTS, COLUMNS),
    )


def fold_(slots: torch.Tensor, moments: torch.Tensor, only_group: int | None) -> None:
    """Adds the slots of one call to the fp64 totals ``[2, 2, n]``, in place.

    Reads 4 bytes per slot entry once: 4 S 2 G n bytes, next to M n elements of h for S = M / 16 or
    fewer slots.
    """
    count, _, groups, n = slots.shape
    if count == 0 or n == 0:
        return
    target = moments if moments.is_contiguous() else moments.contiguous()
    start = target if only_group is None else target[:, only_group]
    tile = FOLD_FEW if count <= FOLD_FEW["SLOTS"] else FOLD_WIDE
    tile = FOLD_NARROW if n <= FOLD_NARROW["COLUMNS"] else tile
    grid = (ceil_div(n, tile["COLUMNS"]), 2 * groups)
    with on_device(slots):
        fold_kernel[grid](
            slots,
            start,
            count,
            n,
            2 * n,
            GROUPS=groups,
            **tile,
            enable_fp_fusion=False,
        )
    if target is not moments:
        moments.copy_(target)


def compile_cases() -> list[CompileCase]:
    """The fold kernel as launched."""
    signature = {
        "slots": "*fp32",
        "totals": "*fp64",
        "slot_count": "i32",
        "n": "i32",
        "total_stride": "i32",
        "GROUPS": "constexpr",
        "SLOTS": "constexpr",
        "COLUMNS": "constexpr",
    }
    return [
        CompileCase(
            name=f"{groups} group{'s' * (groups - 1)}, {tile['SLOTS']} slots at a time",
            kernel=fold_kernel,
            signature=signature,
            constants={"GROUPS": groups, "SLOTS": tile["SLOTS"], "COLUMNS": tile["COLUMNS"]},
            divisible=("slots", "totals", "n", "total_stride"),
            num_warps=tile["num_warps"],
            options={"enable_fp_fusion": False},
        )
        for groups in (1, 2)
        for tile in (FOLD_WIDE, FOLD_NARROW, FOLD_FEW)
    ]
