"""accumulate_moments: Σ|h| and Σh² of every column, per token group, in one read of h.

Per element of h: its own bytes are read once; about six fp32 operations. At bf16 that is 3
operations a byte, far below what any GPU needs to be bound by arithmetic: the bound is the
bandwidth. Written besides: 4·2·G·n bytes per slot, one slot for :data:`ROWS_PER_PROGRAM` rows.
Not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import CompileCase, column_sums, fold_, new_slots, on_device, rows_of, store_sums

#: Rows that are summed in fp32 at a time, and rows of one slot.
ROWS, COLUMNS, ROWS_PER_PROGRAM = 32, 128, 256
#: With an address for every element 32 spill: Triton 3.6, sm_100.
RAGGED_ROWS = 16

_NEVER = ["groups", "m", "only_group"]
#: What nothing is known of where h cannot be read in 16-byte pieces.
RAGGED = [*_NEVER, "h", "n", "stride_m", "stride_n"]


@triton.jit(do_not_specialize=_NEVER)
def moments_kernel(
    h,
    groups,
    slots,
    m,
    n,
    stride_m,
    stride_n,
    only_group,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
):
    """One program: one slot's rows of one tile of columns."""
    slot = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    abs_f = tl.zeros([COLUMNS], dtype=tl.float32)
    abs_r = tl.zeros([COLUMNS], dtype=tl.float32)
    sq_f = tl.zeros([COLUMNS], dtype=tl.float32)
    sq_r = tl.zeros([COLUMNS], dtype=tl.float32)
    for step in range(0, ROWS_PER_PROGRAM, ROWS):
        row = slot.to(tl.int64) * ROWS_PER_PROGRAM + step + tl.arange(0, ROWS)
        group = tl.load(groups + row, mask=row < m, other=-1)
        address = h + row[:, None] * stride_m + column.to(tl.int64)[None, :] * stride_n
        value = tl.load(address, mask=(row < m)[:, None] & (column < n)[None, :], other=0.0)
        a_f, a_r, s_f, s_r = column_sums(value.to(tl.float32), group, only_group, BOTH)
        abs_f += a_f
        abs_r += a_r
        sq_f += s_f
        sq_r += s_r
    store_sums(slots, slot, column, n, abs_f, abs_r, sq_f, sq_r, BOTH)


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
    slots = new_slots(triton.cdiv(m, ROWS_PER_PROGRAM), n, only_group, h.device)
    grid = (slots.shape[0], triton.cdiv(n, COLUMNS))
    numbers = (h.data_ptr(), h.stride(0), n)
    smooth = h.stride(1) == 1 and not any(number % 16 for number in numbers)
    kernel = moments_kernel if smooth else moments_ragged
    with on_device(h):
        kernel[grid](
            h,
            groups.contiguous(),
            slots,
            m,
            n,
            h.stride(0),
            h.stride(1),
            -1 if only_group is None else only_group,
            BOTH=only_group is None,
            ROWS=ROWS if smooth else RAGGED_ROWS,
            COLUMNS=COLUMNS,
            ROWS_PER_PROGRAM=ROWS_PER_PROGRAM,
            num_warps=4,
            enable_fp_fusion=True,
        )
    fold_(slots, moments, only_group)


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
                "stride_m": "i32",
                "stride_n": "constexpr" if smooth else "i32",
                "only_group": "i32",
                **dict.fromkeys(("BOTH", "ROWS", "COLUMNS", "ROWS_PER_PROGRAM"), "constexpr"),
            },
            constants={
                **({"stride_n": 1} if smooth else {}),
                "BOTH": both,
                "ROWS": ROWS if smooth else RAGGED_ROWS,
                "COLUMNS": COLUMNS,
                "ROWS_PER_PROGRAM": ROWS_PER_PROGRAM,
            },
            divisible=("h", "slots", "n", "stride_m") if smooth else ("slots",),
            wide_loads=smooth,
        )
        for dtype in ("fp32", "bf16", "fp16")
        for both in (True, False)
        for smooth in (True, False)
    ]
