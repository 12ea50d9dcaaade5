"""expand: y = base_out + s (z Bᵀ + bias) and the output-site moments, in one pass over y.

Bytes: base_out is read and y written once, 2·M·N elements. z is read again for every tile of
columns and B for every slot, above rank 64 for every tile, from the L2 cache. The slots add 16·N
bytes per 32 to 1024 rows. Operations: 2·M·N·r for the product, three times that in fp32 (three
tf32 products), and about ten per element for the rest. At M = 8192, N = 4096 in bf16: 134 MB, 45
µs at the 3.0 TB/s that an H100 copies at. With r = 16 the product is 1.1 GFLOP, 2 µs at 700
TFLOP/s; in fp32 it is 3.2 GFLOP, about 10 µs at half of that: bound by the bandwidth. In fp32 that
ends near r = 64. Measured there with the moments of both groups and their totals: 61 µs with fp32
adapters. The loop is then 21 instructions an element (17 with bf16 adapters), half of what the SMs
can issue in that time.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from .common import (
    CAST_DOT,
    CompileCase,
    as_operand,
    ceil_div,
    fold_,
    lane_sums,
    new_slots,
    on_device,
    round_to,
    rows_of,
    store_sums,
)
from .tuning import TABLE, config
from .tuning import rows as table_rows

#: Rows of one slot at most, and programs that a launch aims at: two for each of 132 SMs, which run
#: at a time. The same on every GPU: the order of the sums depends on the blocks alone.
MAX_ROWS, PROGRAMS = 1024, 256
#: Row r of a tile is summed with rows r + 8, r + 16, ...: a thread of a tensor-core tile holds
#: these, so the loop over the rows sums in registers and no two threads meet before its end.
LANES = 8

#: In split dots the rest of B is scaled up by this, so that fp16 holds it without underflow.
_SPLIT_SCALE = tl.constexpr(2048.0)


def rows_per_program(m: int, column_tiles: int, block_m: int) -> int:
    """How many rows one program loops over: a multiple of ``block_m``, at most ``MAX_ROWS``.

    Few rows keep all SMs busy when the matrix is small; many rows mean few slots.
    """
    tiles = -(-m // block_m) * column_tiles
    return min(max(tiles // PROGRAMS, 1), MAX_ROWS // block_m) * block_m


@triton.jit
def load_b(b, column, rank, n, r):
    """B's rows ``column`` and columns ``rank``, zero outside, in its own dtype."""
    address = b + column.to(tl.int64)[:, None] * r + rank[None, :]
    return tl.load(address, mask=(column < n)[:, None] & (rank < r)[None, :], other=0.0)


@triton.jit
def in_two(value, CAST_DOT: tl.constexpr):
    """An fp32 value as the sum of two of tf32's 11 bits, to 2⁻²² of it. NaN stays NaN; infinity,
    and what rounds to it (from 3.402e38 on), may end as NaN."""
    bits = value.to(tl.uint32, bitcast=True)
    # To nearest, ties away from zero. A GPU's own NaN has all bits set: rounded, it would be zero.
    # Others may have all theirs where tensor cores do not look.
    nearest = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    high = tl.where(value == value, nearest, float("nan"))
    # Of infinity the rest is NaN on a GPU; the interpreter takes zero.
    low = value - high
    if not CAST_DOT:
        low = tl.where(tl.abs(high) < float("inf"), low, 0.0)
    return high, low


@triton.jit
def add_product(z_part, b_part, product, rest, SPLIT: tl.constexpr, CAST_DOT: tl.constexpr):
    """``product += z bᵀ``, b rounded to z's dtype; ``rest += z (b - rounded b)ᵀ`` with SPLIT.

    What rounding takes from an fp32 b is the sum of two numbers of z's dtype, to 2⁻²⁴ of b or
    better, and products of such numbers are exact in fp32: both b in full and b rounded are had
    for three 16-bit dots. ``rest`` is scaled up by _SPLIT_SCALE.

    fp32 operands go as two of tf32 each, in three dots, the small ones first: what tensor cores cut
    off is a part of the sum so far. Triton's own "tf32x3" does that, and looks for NaN in every
    element of the product as well, which takes longer.
    """
    dtype: tl.constexpr = z_part.dtype
    if dtype == tl.float32:
        z_high, z_low = in_two(z_part, CAST_DOT)
        b_high, b_low = in_two(b_part.to(tl.float32), CAST_DOT)
        if not CAST_DOT:
            # The interpreter is held to fp32. On a GPU this is less than what is cut off.
            product = tl.dot(z_low, tl.trans(b_low), product)
        product = tl.dot(z_low, tl.trans(b_high), product, input_precision="tf32")
        product = tl.dot(z_high, tl.trans(b_low), product, input_precision="tf32")
        product = tl.dot(z_high, tl.trans(b_high), product, input_precision="tf32")
    else:
        z_part = as_operand(z_part, dtype, CAST_DOT)
        high = as_operand(b_part, dtype, CAST_DOT)
        product = tl.dot(z_part, tl.trans(high), product)
    if SPLIT:
        left = (b_part.to(tl.float32) - high.to(tl.float32)) * _SPLIT_SCALE
        middle = as_operand(left, dtype, CAST_DOT)
        low = as_operand(left - middle.to(tl.float32), dtype, CAST_DOT)
        rest = tl.dot(z_part, tl.trans(low), rest)
        rest = tl.dot(z_part, tl.trans(middle), rest)
    return product, rest


#: What nothing is known of in any launch, where the ranks are odd, and where the columns are too
#: (:func:`variant`); ``slots`` and ``y`` are allocated here.
_NEVER = ["groups", "m", "rows", "only_group"]
ODD_RANKS = [*_NEVER, "z", "b", "r", "stride_z"]
RAGGED = [*ODD_RANKS, "base_out", "bias", "n", "stride_m", "stride_n"]


@triton.jit(do_not_specialize=_NEVER)
def expand_kernel(
    base_out,
    z,
    b,
    bias,
    groups,
    slots,
    y,
    m,
    n,
    r,
    rows,
    stride_m,
    stride_n,
    stride_z,
    scaling,
    only_group,
    MOMENTS: tl.constexpr,
    BOTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNKED: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    CAST_DOT: tl.constexpr,
):
    """One program: one slot's rows of one tile of columns."""
    column_tiles = tl.cdiv(n, BLOCK_N)
    # Neighbouring programs take neighbouring columns: whole rows of base_out at a time.
    slot = tl.program_id(0) // column_tiles
    column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.arange(0, BLOCK_M)
    rank = tl.arange(0, BLOCK_R)
    if not CHUNKED:
        b_part = load_b(b, column, rank, n, r)
    if HAS_BIAS:
        bias_row = tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)
        bias_row = as_operand(bias_row, z.dtype.element_ty, CAST_DOT).to(tl.float32) * scaling
    abs_f = tl.zeros([LANES, BLOCK_N], dtype=tl.float32)
    abs_r = tl.zeros([LANES, BLOCK_N], dtype=tl.float32)
    sq_f = tl.zeros([LANES, BLOCK_N], dtype=tl.float32)
    sq_r = tl.zeros([LANES, BLOCK_N], dtype=tl.float32)
    # Within a block of rows 32 bits are enough for an offset, unless strides may be anything.
    far_block = block.to(tl.int64) if FAR else block
    far_column = column.to(tl.int64) if FAR else column
    offsets = far_block[:, None] * stride_m + far_column[None, :] * stride_n
    y_offsets = far_block[:, None] * n + column[None, :]
    z_offsets = far_block[:, None] * stride_z + rank[None, :]
    # Tensor cores cut off the sum after every 8 ranks of tf32 instead of rounding it, 1.8e-6 of it
    # after 96 such sums (256 ranks in three dots). So in fp32 each part starts at zero, the small
    # products first, and is added outside of them: 9e-8 remain.
    IN_PARTS: tl.constexpr = z.dtype.element_ty == tl.float32
    first = slot * rows
    if MOMENTS:
        ahead = tl.load(groups + first + block, mask=first + block < m, other=-1)
    # The stages are named here, or base_out, no operand of a dot, would not be loaded ahead.
    for step in tl.range(0, rows, BLOCK_M, num_stages=STAGES):
        start = (first + step).to(tl.int64)
        row = first + step + block
        if MOMENTS:
            # A byte is too narrow for the loads that run ahead; this one is a block ahead by hand.
            group = ahead
            ahead = tl.load(groups + row + BLOCK_M, mask=row + BLOCK_M < m, other=-1)
        inside = (row < m)[:, None] & (column < n)[None, :]
        base = tl.load(base_out + start * stride_m + offsets, mask=inside, other=0.0)
        product = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        rest = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        z_address = z + start * stride_z + z_offsets
        if CHUNKED:
            for part in range(0, r, BLOCK_R):
                z_mask = (row < m)[:, None] & (part + rank < r)[None, :]
                z_part = tl.load(z_address + part, mask=z_mask, other=0.0)
                b_part = load_b(b, column, part + rank, n, r)
                if IN_PARTS:
                    begin = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
                    found, rest = add_product(z_part, b_part, begin, rest, SPLIT, CAST_DOT)
                    product += found
                else:
                    product, rest = add_product(z_part, b_part, product, rest, SPLIT, CAST_DOT)
        else:
            z_mask = (row < m)[:, None] & (rank < r)[None, :]
            z_part = tl.load(z_address, mask=z_mask, other=0.0)
            product, rest = add_product(z_part, b_part, product, rest, SPLIT, CAST_DOT)
        # Spelled out, so that y has the same bits whether moments are taken or not.
        result = tl.fma(product, scaling, base.to(tl.float32))
        if HAS_BIAS:
            result += bias_row[None, :]
        result = round_to(result, y.dtype.element_ty, not CAST_DOT)
        tl.store(y + start * n + y_offsets, result, mask=inside)
        if MOMENTS:
            if SPLIT:
                product += rest * (1 / _SPLIT_SCALE)
            a_f, a_r, s_f, s_r = lane_sums(product, group, only_group, BOTH, LANES)
            abs_f += a_f
            abs_r += a_r
            sq_f += s_f
            sq_r += s_r
    if MOMENTS:
        # Scaled here, where it is one product a column and not one an element; s² and the sums of
        # z Bᵀ alone have to be numbers of fp32.
        size, square = tl.abs(scaling), scaling * scaling
        store_sums(
            slots,
            slot,
            column,
            n,
            tl.sum(abs_f, axis=0) * size,
            tl.sum(abs_r, axis=0) * size,
            tl.sum(sq_f, axis=0) * square,
            tl.sum(sq_r, axis=0) * square,
            BOTH,
        )


#: The same kernel for other operands. It is told nothing of them, so that every odd size, stride
#: and pointer, and a rank of 1, runs the one machine code that the gate has seen.
expand_odd_ranks = triton.jit(expand_kernel.fn, do_not_specialize=ODD_RANKS)
expand_ragged = triton.jit(expand_kernel.fn, do_not_specialize=RAGGED)


#: Strides above this do not fit the 32-bit offsets within one block of rows.
MAX_STRIDE = 1 << 24

_VARIANTS = {
    "regular": (expand_kernel, _NEVER),
    "odd ranks": (expand_odd_ranks, ODD_RANKS),
    "ragged": (expand_ragged, RAGGED),
}


def variant(
    base_out: torch.Tensor, z: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None
) -> str:
    """``"regular"``, ``"odd ranks"`` or ``"ragged"``: what can be read in 16-byte pieces.

    Triton knows that only of pointers that are multiples of 16 bytes, and of sizes and strides
    that are multiples of 16 elements. With odd ranks (r = 8) z and B are read element by element,
    ragged operands (32001 columns, or rows more than MAX_STRIDE apart) all are.

    Args:
        base_out: ``[M, N]``.
        z: ``[M, r]``, its columns adjacent.
        b: ``[N, r]``, contiguous.
        bias: ``[N]``, contiguous, or None.
    """
    wide = [base_out.data_ptr(), base_out.stride(0), b.shape[0]]
    if bias is not None:
        wide.append(bias.data_ptr())
    if base_out.stride(1) != 1 or any(number % 16 for number in wide):
        return "ragged"
    if max(base_out.stride(0), b.shape[0], z.stride(0)) > MAX_STRIDE:
        return "ragged"
    ranks = (z.data_ptr(), z.stride(0), b.data_ptr(), b.shape[1])
    return "odd ranks" if any(number % 16 for number in ranks) else "regular"


def expand(
    base_out: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    only_group: int | None = None,
    delta_moments: torch.Tensor | None = None,
) -> torch.Tensor:
    """``base_out + scaling (z bᵀ + bias)``, and the moments of ``scaling z bᵀ``.

    The product is that of z's dtype: b and bias are rounded to it, sums are in fp32, y is rounded
    once. The moments are those of z and b as given, without the bias.

    Args:
        base_out: ``[..., N]``, fp32, bf16 or fp16, any strides; slower where not :func:`variant`
            "regular".
        z: ``[..., r]``, fp32, bf16 or fp16; a slice of a wider z is read in place.
        b: ``[N, r]``, fp32, bf16 or fp16.
        scaling: s.
        bias: ``[N]``, or None.
        groups: integers ``[tokens]``: 0 forget, 1 retain, else ignored. For the moments.
        only_group: 0 or 1 counts only that group's tokens.
        delta_moments: fp64 ``[2, 2, N]``, increased in place; None takes no moments.

    Returns:
        y, contiguous, of ``base_out``'s shape and dtype.
    """
    y = torch.empty(base_out.shape, dtype=base_out.dtype, device=base_out.device)
    if y.numel() == 0:
        return y
    base_out, z, b = rows_of(base_out), rows_of(z), b.contiguous()
    if z.stride(1) != 1:
        z = z.contiguous()
    if b.dtype != z.dtype:
        # Exact for B; fewer kernels. What is given as fp32 is rounded to z's dtype by the kernel.
        b = b.float()
    if bias is not None:
        bias = bias.to(b.dtype).contiguous()
    (m, n), r = base_out.shape, z.shape[1]
    moments = delta_moments is not None
    rank = rank_class(r)
    kind = variant(base_out, z, b, bias)
    dtypes = (y.dtype, z.dtype, b.dtype)
    options = config("expand", _shape_class(dtypes, moments, rank, kind), y.device)
    column_tiles = ceil_div(n, options["BLOCK_N"])
    rows = rows_per_program(m, column_tiles, options["BLOCK_M"])
    count = ceil_div(m, rows)
    slots = new_slots(count, n, only_group, y.device) if moments else None
    kernel, _ = _VARIANTS[kind]
    with on_device(y):
        kernel[(count * column_tiles,)](
            base_out,
            z,
            b,
            bias,
            groups.contiguous() if moments else None,
            slots,
            y,
            m,
            n,
            r,
            rows,
            base_out.stride(0),
            base_out.stride(1),
            z.stride(0),
            float(scaling),
            -1 if only_group is None else only_group,
            **_flags(z.dtype, b.dtype, moments, only_group is None, bias is not None, rank),
            FAR=kind == "ragged",
            STAGES=options["num_stages"],
            **options,
            enable_fp_fusion=True,
        )
    if moments:
        fold_(slots, delta_moments, only_group)
    return y


def rank_class(r: int) -> int:
    """16, 32 or 64: r padded to it, B held over all rows. 256: a loop over parts of r."""
    return next((padded for padded in (16, 32, 64) if r <= padded), 256)


def _dot_class(z_dtype: torch.dtype, b_dtype: torch.dtype, moments: bool) -> str:
    """Which dots are taken."""
    if z_dtype == torch.float32:
        return "fp32"
    return "split" if moments and b_dtype != z_dtype else "16-bit"


def _shape_class(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], moments: bool, rank: int, kind: str
) -> tuple[str | int, ...]:
    """The key of the table of configurations: dots, padded rank, and the kind if it has a row."""
    base_dtype, z_dtype, b_dtype = dtypes
    key = (_dot_class(z_dtype, b_dtype, moments), rank)
    if kind == "regular" and key[0] == "16-bit" and base_dtype == torch.float32:
        kind = "odd ranks"  # the row for what takes more registers: an fp32 base does, too
    own = (*key, kind)
    return own if ("default", own) in TABLE["expand"] else key


def _flags(
    z_dtype: torch.dtype, b_dtype: torch.dtype, moments: bool, both: bool, bias: bool, rank: int
) -> dict[str, int | bool]:
    """The constexpr arguments that are not block sizes."""
    return {
        "MOMENTS": moments,
        # Without moments it changes nothing, and one kernel is enough.
        "BOTH": both or not moments,
        "HAS_BIAS": bias,
        "SPLIT": _dot_class(z_dtype, b_dtype, moments) == "split",
        "CHUNKED": rank > 64,
        "LANES": LANES,
        "CAST_DOT": CAST_DOT,
    }


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _case(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    rank: int,
    *,
    moments: bool = True,
    both: bool = True,
    bias: bool = False,
    kind: str = "regular",
) -> list[CompileCase]:
    """One launch as the ahead-of-time gate compiles it, for every row of the table it may use."""
    base_type, z_type, b_type = (_NAMES[dtype] for dtype in dtypes)
    absent = ([] if bias else ["bias"]) + ([] if moments else ["groups", "slots"])
    flags = _flags(dtypes[1], dtypes[2], moments, both, bias, rank) | {"FAR": kind == "ragged"}
    key = _shape_class(dtypes, moments, rank, kind)
    kernel, unknown = _VARIANTS[kind]
    cases = []
    for gpu, row_key, options, capabilities in table_rows("expand"):
        if row_key != key:
            continue
        blocks = {name: options[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_R")}
        constants = dict.fromkeys(absent) | ({} if kind == "ragged" else {"stride_n": 1})
        constants |= flags | blocks | {"STAGES": options["num_stages"]}
        signature = {
            **dict.fromkeys(("base_out", "y"), f"*{base_type}"),
            **dict.fromkeys(("b", "bias"), f"*{b_type}"),
            "z": f"*{z_type}",
            "groups": "*i8",
            "slots": "*fp32",
            **dict.fromkeys(("m", "n", "r", "rows", "stride_m", "stride_n", "stride_z"), "i32"),
            "scaling": "fp32",
            "only_group": "i32",
            **dict.fromkeys(constants, "constexpr"),
        }
        divisible = ["base_out", "z", "b", "bias", "slots", "y", "n", "stride_m", "r", "stride_z"]
        words = [
            f"{base_type} y, {z_type} z, {b_type} B",
            ("r > 64" if rank > 64 else f"r <= {rank}") + (" odd" if kind == "odd ranks" else ""),
            ("moments" if both else "moments of one group") if moments else "no moments",
            *(["bias"] if bias else []),
            *(["ragged"] if kind == "ragged" else []),
            *([] if gpu == "default" else [gpu]),
        ]
        cases.append(
            CompileCase(
                name=", ".join(words),
                kernel=kernel,
                signature=signature,
                constants=constants,
                divisible=tuple(
                    name
                    for name in divisible
                    if signature[name] != "constexpr" and name not in unknown
                ),
                num_warps=options["num_warps"],
                num_stages=options["num_stages"],
                dot=True,
                wide_loads=kind != "ragged",
                capabilities=capabilities,
            )
        )
    return cases


def compile_cases() -> list[CompileCase]:
    """The flags of every dtype that models bring, at every rank class; fewer of the rare dtypes."""
    single, bf16, half = torch.float32, torch.bfloat16, torch.float16
    # PEFT's default, an adapter in the base's dtype, autocast; then the same in fp16; all fp32.
    common = [(bf16, single, single), (bf16, bf16, bf16), (bf16, bf16, single)]
    common += [(half, single, single), (half, half, half), (half, half, single)]
    common += [(single, single, single)]
    rare = [(single, bf16, bf16), (single, bf16, single), (single, half, half)]
    rare += [(single, half, single), (bf16, half, half), (bf16, half, single)]
    rare += [(half, bf16, bf16), (half, bf16, single)]
    cases = []
    for dtypes in common:
        for rank in (16, 32, 64, 256):
            cases += _case(dtypes, rank, moments=False)
            cases += _case(dtypes, rank)
            cases += _case(dtypes, rank, both=False)
            cases += _case(dtypes, rank, bias=True)
            cases += _case(dtypes, rank, kind="odd ranks")
            cases += _case(dtypes, rank, kind="ragged")
        cases += _case(dtypes, 16, moments=False, bias=True)
    for dtypes in rare:
        for rank in (16, 32, 64, 256):
            cases += _case(dtypes, rank, moments=False) + _case(dtypes, rank)
            cases += _case(dtypes, rank, both=False)
    # What models without fp16 bring: every flag where not everything is known, too.
    for dtypes in (*common[:3], common[-1]):
        for rank, kind in itertools.product((16, 32, 64, 256), ("odd ranks", "ragged")):
            cases += _case(dtypes, rank, moments=False, kind=kind)
            cases += _case(dtypes, rank, both=False, kind=kind)
            cases += _case(dtypes, rank, bias=True, kind=kind)
    return cases
