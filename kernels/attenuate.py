"""attenuate_: the rows or columns of many matrices times their factors, in one launch per dtype.

The fallback where the C++ extension is not built. The matrices are described by a table in device
memory: one upload of 80 bytes per matrix (pageable, 36 KB for 448 matrices) and no
synchronisation. Because of that upload a call cannot be captured in a CUDA graph; the C++ operator
passes its description by value and can.

Bytes: an element whose factor is not 1 is read and written once, and the factors are read; 16-byte
units in which every factor is 1 are neither read nor written. A rank-16 adapter on all seven
projections of a 7B model is 448 matrices of 40 million elements: in bf16 80 MB read and 80 MB
written if every factor differs from 1, 55 μs at 2.9 TB/s, for one fp32 product an element.

Blocks of all matrices form one flat grid, so small and large matrices share the GPU evenly; a
block finds its matrix by a binary search over the table (9 steps for 448 matrices, from the cache).
Matrices whose alignment allows it are scaled in 16-byte units, the others element by element, both
in the same launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .common import INTERPRET, TRITON_DTYPES, CompileCase, ceil_div, on_device, round_to

#: Units of 16 bytes that one block scales where alignment allows, and elements where it does not.
UNITS, ELEMENTS = 512, 1024

#: Columns of the table, all int64; strides and lengths count elements.
#: first block | data | first factor | lines | length | line stride | step | factor per line | wide
_FIELDS: int = 9


@triton.jit
def widened(value, WIDE: tl.constexpr, INTERPRETED: tl.constexpr):
    """To fp32 or fp64, exactly; the interpreter garbles bf16's subnormal numbers."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = value.to(WIDE)
    return wide


@triton.jit
def scale_units(
    row,
    factors,
    start,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Scales units start .. start + UNITS of the matrix described by ``row``.

    A unit is WIDTH neighbours of a line. WIDTH > 1 asks for a step of 1 and for 16-byte alignment
    of every unit and of its factors.
    """
    data = tl.load(row + 1).to(tl.pointer_type(DTYPE))
    first_factor = tl.load(row + 2)
    lines = tl.load(row + 3)
    per_line = tl.load(row + 4) // WIDTH
    line_stride = tl.load(row + 5)
    per_position = tl.load(row + 7) == 0
    if WIDTH > 1:
        data = tl.multiple_of(data, 16)
        line_stride = tl.multiple_of(line_stride, WIDTH)
    # One 64-bit division for the block; within it 32 bits will do, unless a line is so long that
    # the block meets no more than two of them.
    first_line = start // per_line
    offset = start - first_line * per_line + tl.arange(0, UNITS)
    if per_line < 1 << 30:
        lines_on = (offset.to(tl.uint32) // per_line.to(tl.uint32)).to(tl.int64)
    else:
        lines_on = (offset >= per_line).to(tl.int64)
    line = first_line + lines_on
    position = (offset - lines_on * per_line) * WIDTH
    inside = line < lines
    neighbour = tl.arange(0, WIDTH)
    if per_position:
        some = factors + first_factor
        if WIDTH > 1:
            some = tl.multiple_of(some, 16)
        index = position[:, None] + neighbour[None, :]
        factor = tl.load(some + index, mask=inside[:, None], other=1.0)
    else:
        one = tl.load(factors + first_factor + line, mask=inside, other=1.0)
        factor = tl.broadcast_to(one[:, None], [UNITS, WIDTH])
    # The mask must not vary within a unit, or the store would fall apart into elements.
    touched = (tl.max((factor != 1.0).to(tl.int32), axis=1) > 0)[:, None]
    address = data + (line * line_stride)[:, None]
    if WIDTH > 1:
        address += position[:, None] + neighbour[None, :]
    else:
        address += (position * tl.load(row + 6))[:, None]
    old = tl.load(address, mask=touched, other=0.0)
    new = round_to(widened(old, WIDE, INTERPRETED) * factor.to(WIDE), DTYPE, INTERPRETED)
    # The old bits, not 1 * old: that would change a NaN's payload.
    tl.store(address, tl.where(factor == 1.0, old, new), mask=touched)


@triton.jit(do_not_specialize=["first_row", "matrices", "steps"])
def attenuate_kernel(
    table,
    factors,
    first_row,
    matrices,
    steps,
    FIELDS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One block of one of the matrices of one dtype: rows first_row .. of the table."""
    block = tl.program_id(0).to(tl.int64)
    table += first_row * FIELDS
    low = first_row * 0  # the last matrix whose first block is not after this one
    high = matrices
    for _ in range(steps):
        middle = (low + high) // 2
        # Once low and high are neighbours, middle is low and stays.
        before = tl.load(table + middle * FIELDS) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    row = table + low * FIELDS
    block -= tl.load(row)
    if tl.load(row + 8) != 0:
        scale_units(row, factors, block * UNITS, DTYPE, WIDE, WIDTH, UNITS, INTERPRETED)
    else:
        scale_units(row, factors, block * ELEMENTS, DTYPE, WIDE, 1, ELEMENTS, INTERPRETED)


def attenuate_(
    weights: Sequence[torch.Tensor],
    factors: torch.Tensor,
    offsets: Sequence[int],
    axes: Sequence[int],
) -> None:
    """Scales each row (axis 0) or column (axis 1) of each weight by its factor, in place.

    The weights are written through their addresses: autograd's version counters do not notice.

    Args:
        weights: matrices of fp32, bf16, fp16 or fp64, on one device, sharing no memory.
        factors: fp32, flat, contiguous, on the same device.
        offsets: where each weight's factors begin.
        axes: 0 or 1 per weight.
    """
    rows: dict[torch.dtype, list[list[int]]] = {}
    blocks: dict[torch.dtype, int] = {}
    for weight, offset, axis in zip(weights, offsets, axes, strict=True):
        if weight.numel() == 0:
            continue
        total = blocks.get(weight.dtype, 0)
        row, needed = _table_row(weight, factors, offset, axis)
        rows.setdefault(weight.dtype, []).append([total, *row])
        blocks[weight.dtype] = total + needed
    if not rows:
        return
    table = torch.tensor([row for of_dtype in rows.values() for row in of_dtype])
    table = table.to(factors.device, non_blocking=True)
    first_row = 0
    with on_device(factors):
        for dtype, of_dtype in rows.items():
            attenuate_kernel[(blocks[dtype],)](
                table,
                factors,
                first_row,
                len(of_dtype),
                (len(of_dtype) - 1).bit_length(),
                **_constants(dtype),
                num_warps=4,
                enable_fp_fusion=False,
            )
            first_row += len(of_dtype)


def _table_row(
    weight: torch.Tensor, factors: torch.Tensor, offset: int, axis: int
) -> tuple[list[int], int]:
    """The table's entry without its first block, and the number of blocks."""
    (lines, length), (line_stride, step) = weight.shape, weight.stride()
    factor_per_line = axis == 0
    # Walk a transposed weight in the order of its memory, and a single column as one line.
    if length == 1 or (lines > 1 and line_stride < step):
        lines, length, line_stride, step = length, lines, step, line_stride
        factor_per_line = not factor_per_line
    width = 16 // weight.element_size()
    wide = (
        step == 1
        and length % width == 0
        and (lines == 1 or line_stride % width == 0)
        and weight.data_ptr() % 16 == 0
        and (factor_per_line or (factors.data_ptr() + 4 * offset) % 16 == 0)
    )
    if lines == 1:
        line_stride = 0  # never used, and 0 is a multiple of the width
    needed = lines * length // width if wide else lines * length
    row = [weight.data_ptr(), offset, lines, length, line_stride, step, factor_per_line, wide]
    return [int(value) for value in row], ceil_div(needed, UNITS if wide else ELEMENTS)


def _constants(dtype: torch.dtype) -> dict[str, object]:
    return {
        "FIELDS": _FIELDS,
        "DTYPE": TRITON_DTYPES[dtype],
        "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
        "WIDTH": 16 // dtype.itemsize,
        "UNITS": UNITS,
        "ELEMENTS": ELEMENTS,
        "INTERPRETED": INTERPRET,
    }


def compile_cases() -> list[CompileCase]:
    """One per dtype of the weights, as launched."""
    signature = {
        "table": "*i64",
        "factors": "*fp32",
        **dict.fromkeys(("first_row", "matrices", "steps"), "i32"),
        **dict.fromkeys(_constants(torch.float32), "constexpr"),
    }
    return [
        CompileCase(
            name=f"{dtype} weights".removeprefix("torch."),
            kernel=attenuate_kernel,
            signature=signature,
            constants={**_constants(dtype), "INTERPRETED": False},
            divisible=("table", "factors"),
            options={"enable_fp_fusion": False},
        )
        for dtype in TRITON_DTYPES
    ]
