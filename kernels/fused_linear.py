"""fused_linear: y = x Wᵀ + b + s (z Bᵀ + lora_b) and the output-site moments, in one product.

A persistent matrix product for Hopper: TMA brings x and W and takes y, the accumulator starts as
the LoRA product, and the moments of that product, δ, are taken before the main loop begins. δ never
becomes a matrix in memory and y is written once and never read.

What it saves is one read and one write of y, what ``expand`` costs beside the base product: at F
FLOP/s and a bandwidth of W bytes/s that is 2F/(K·W) of the product in bf16 (F = 700e12, W = 2.9e12:
24 % at K = 2048, 12 % at 4096, 6 % at 8192). So it pays only where this kernel reaches
1 / (1 + 2F/(K·W)) of cuBLAS's rate: 68 % at K = 1024, 81 % at 2048, 89 % at 4096, 94 % at 8192.
Operations: 2·M·N·(K + r), r three times in fp32, about fourteen per element of y for the moments;
at M = 8192, N = K = 4096 in bf16 275 GFLOP, 393 µs at 700 TFLOP/s; ``expand``'s pass is 46 µs.
Bytes: at least M·K + N·K + M·N elements (167 MB there, 58 µs: bound by arithmetic), 16·N per 128
rows for the slots.

Used only where a committed measurement says so: on an H100 it lost to cuBLAS and expand (4096 x
4096, 8192 tokens in bf16 with fp32 adapters: 1.65 times the base product alone, against 1.37).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import TMA_CAPABILITY
from .common import (
    CAST_DOT,
    INTERPRET,
    TRITON_DTYPES,
    CompileCase,
    ceil_div,
    column_sums,
    fold_,
    new_slots,
    on_device,
    round_to,
    store_sums,
)

#: Block sizes and launch options per bytes of an element of x.
_CONFIGS = {
    2: {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
    4: {"BM": 64, "BN": 128, "BK": 32, "num_warps": 4, "num_stages": 3},
}
#: Row blocks that are done together, so that they share W's tiles in the L2 cache.
_ROW_BLOCKS = 8
#: Programs where there is no GPU to ask: few, so that each has several tiles.
_PROGRAMS = 3


@triton.jit
def lora_product(
    z,
    b,
    row,
    column,
    m,
    n,
    r,
    stride_z,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAST_DOT: tl.constexpr,
):
    """z Bᵀ of one tile, fp32, with z and B rounded to DTYPE."""
    product = tl.zeros([BM, BN], dtype=tl.float32)
    # One stage: the buffers of the main loop need the shared memory.
    for first in tl.range(0, r, RANK, num_stages=1):
        rank = first + tl.arange(0, RANK)
        z_address = z + row.to(tl.int64)[:, None] * stride_z + rank[None, :]
        z_part = tl.load(z_address, mask=(row < m)[:, None] & (rank < r)[None, :], other=0.0)
        b_address = b + column.to(tl.int64)[:, None] * r + rank[None, :]
        b_part = tl.load(b_address, mask=(column < n)[:, None] & (rank < r)[None, :], other=0.0)
        if CAST_DOT:
            z_part = z_part.to(DTYPE)
            b_part = b_part.to(DTYPE)
        else:
            z_part = round_to(z_part.to(tl.float32), DTYPE, True).to(tl.float32)
            b_part = round_to(b_part.to(tl.float32), DTYPE, True).to(tl.float32)
        product = tl.dot(z_part, tl.trans(b_part), product, input_precision="tf32x3")
    return product


@triton.jit
def halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half: half the registers for sums, half the buffer for the store."""
    return tl.split(tl.permute(tl.reshape(tile, [BM, 2, BN // 2]), [0, 2, 1]))


@triton.jit(do_not_specialize=["m", "n", "k", "only_group"])
def fused_linear_kernel(
    x,
    weight,
    y,
    z,
    b,
    bias,
    lora_bias,
    groups,
    slots,
    m,
    n,
    k,
    r,
    stride_z,
    scaling,
    only_group,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    LORA_DTYPE: tl.constexpr,
    DELTA_DTYPE: tl.constexpr,
    BIAS: tl.constexpr,
    LORA_BIAS: tl.constexpr,
    MOMENTS: tl.constexpr,
    BOTH: tl.constexpr,
    CAST_DOT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Each program takes every ``num_programs``-th tile of y; x, weight and y are descriptors."""
    row_blocks = tl.cdiv(m, BM)
    column_blocks = tl.cdiv(n, BN)
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0)):
        band = tile // (ROW_BLOCKS * column_blocks)
        height = min(row_blocks - band * ROW_BLOCKS, ROW_BLOCKS)
        inside = tile - band * ROW_BLOCKS * column_blocks
        row_block = band * ROW_BLOCKS + inside % height
        first_column = (inside // height) * BN
        row = row_block * BM + tl.arange(0, BM)
        column = first_column + tl.arange(0, BN)
        half = first_column + tl.arange(0, BN // 2)

        if MOMENTS:
            product = lora_product(
                z, b, row, column, m, n, r, stride_z, DELTA_DTYPE, RANK, BM, BN, CAST_DOT
            )
            group = tl.load(groups + row.to(tl.int64), mask=row < m, other=-1)
            left, right = halves(product * scaling, BM, BN)
            # A slot is a row block: this tile's columns of it belong to this program alone.
            a_f, a_r, s_f, s_r = column_sums(left, group, only_group, BOTH)
            store_sums(slots, row_block, half, n, a_f, a_r, s_f, s_r, BOTH)
            a_f, a_r, s_f, s_r = column_sums(right, group, only_group, BOTH)
            store_sums(slots, row_block, half + BN // 2, n, a_f, a_r, s_f, s_r, BOTH)
        # δ's own product serves y too, unless B is wider than z: y takes B rounded, δ does not.
        if not MOMENTS or DELTA_DTYPE != LORA_DTYPE:
            product = lora_product(
                z, b, row, column, m, n, r, stride_z, LORA_DTYPE, RANK, BM, BN, CAST_DOT
            )
        if LORA_BIAS:
            value = tl.load(lora_bias + column, mask=column < n, other=0.0).to(tl.float32)
            product += round_to(value, LORA_DTYPE, INTERPRETED).to(tl.float32)[None, :]
        total = product * scaling
        if BIAS:
            value = tl.load(bias + column, mask=column < n, other=0.0)
            total += value.to(tl.float32)[None, :]

        for step in range(0, k, BK):
            x_part = x.load([row_block * BM, step])
            w_part = weight.load([first_column, step])
            if not CAST_DOT:
                x_part = x_part.to(tl.float32)
                w_part = w_part.to(tl.float32)
            total = tl.dot(x_part, tl.trans(w_part), total, input_precision="tf32x3")

        left, right = halves(total, BM, BN)
        y.store([row_block * BM, first_column], round_to(left, DTYPE, INTERPRETED))
        y.store([row_block * BM, first_column + BN // 2], round_to(right, DTYPE, INTERPRETED))


def obstacle(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
) -> str | None:
    """Why :func:`fused_linear` cannot take these arguments, or None. Copies nothing."""
    n, k = weight.shape
    for name, tensor in (("x", x), ("z", z), ("B", b)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} is {tensor.dtype}, not fp32, bf16 or fp16"
    if weight.dtype != x.dtype:
        return f"x is {x.dtype}, the weight {weight.dtype}"
    if k == 0:
        return "K is 0"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < TMA_CAPABILITY:
        return "TMA needs compute capability 9.0 (Hopper) or later"
    rows = _rows_view(x)
    if rows is None:
        return f"x's rows have no common stride: shape {tuple(x.shape)}, strides {x.stride()}"
    size = x.element_size()
    if n * size % 16:
        return f"a row of y, {n} elements, is not a multiple of 16 bytes"
    for name, tensor in (("x", rows), ("the weight", weight)):
        if tensor.stride(1) != 1:
            return f"{name}'s last stride is {tensor.stride(1)}, not 1"
        if tensor.stride(0) * size % 16 or tensor.stride(0) < k:
            stride = tensor.stride(0)
            return f"{name}'s row stride, {stride} elements, is not a multiple of 16 bytes"
        if tensor.data_ptr() % 16:
            return f"{name} does not start at a multiple of 16 bytes"
    for name, vector in (("bias", bias), ("LoRA bias", lora_bias)):
        if vector is not None and vector.stride(0) != 1:
            return f"the {name} is not contiguous"
    return None


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    only_group: int | None = None,
    delta_moments: torch.Tensor | None = None,
) -> torch.Tensor:
    """A whole LoRA linear layer, given z. fp32 accumulation, y rounded once to x's dtype.

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16, rows of one stride (see :func:`obstacle`).
        weight: the base layer's, ``[N, K]``, x's dtype.
        z: ``[..., r]``, from ``shrink``; fp32, bf16 or fp16.
        b: the adapter's B, ``[N, r]``; rounded to z's dtype for y, taken as it is for the moments.
        scaling: s.
        bias: the base layer's, ``[N]``.
        lora_bias: the adapter's own, ``[N]``, rounded to z's dtype and scaled by s.
        groups: integers ``[tokens]``: 0 forget, 1 retain, else ignored; needed for moments.
        only_group: 0 or 1 counts only that group's tokens.
        delta_moments: fp64 ``[2, 2, N]``, increased by the moments of δ = s z Bᵀ in fp32.

    Raises:
        ValueError: what :func:`obstacle` says.
    """
    reason = obstacle(x, weight, z, b, bias, lora_bias)
    if reason:
        raise ValueError(f"fused_linear: {reason}")
    n, k = weight.shape
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    m = y.numel() // n if n else 0
    if m == 0 or n == 0:
        return y
    z = z.reshape(m, -1)
    z = z if z.stride(-1) == 1 else z.contiguous()
    b = b.contiguous()
    r = b.shape[1]
    delta_dtype = torch.promote_types(z.dtype, b.dtype)
    config = _CONFIGS[x.element_size()]
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    row_blocks = ceil_div(m, bm)
    moments = delta_moments is not None
    slots = new_slots(row_blocks, n, only_group, x.device) if moments else None
    with on_device(x):
        fused_linear_kernel[(min(_programs(x.device), row_blocks * ceil_div(n, bn)),)](
            TensorDescriptor.from_tensor(_rows_view(x), [bm, bk]),
            TensorDescriptor.from_tensor(weight, [bn, bk]),
            TensorDescriptor.from_tensor(y.view(m, n), [bm, bn // 2]),
            z,
            b,
            bias,
            lora_bias,
            groups.contiguous() if moments else None,
            slots,
            m,
            n,
            k,
            r,
            z.stride(0),
            float(scaling),
            -1 if only_group is None else only_group,
            RANK=_rank_block(r, delta_dtype),
            ROW_BLOCKS=_ROW_BLOCKS,
            DTYPE=TRITON_DTYPES[x.dtype],
            LORA_DTYPE=TRITON_DTYPES[z.dtype],
            DELTA_DTYPE=TRITON_DTYPES[delta_dtype],
            BIAS=bias is not None,
            LORA_BIAS=lora_bias is not None,
            MOMENTS=moments,
            BOTH=only_group is None,
            CAST_DOT=CAST_DOT,
            INTERPRETED=INTERPRET,
            enable_fp_fusion=True,
            **config,
        )
    if moments:
        fold_(slots, delta_moments, only_group)
    return y


def _rows_view(x: torch.Tensor) -> torch.Tensor | None:
    """``[..., K]`` as ``[tokens, K]`` without a copy, None where that cannot be."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return None


def _rank_block(r: int, delta_dtype: torch.dtype) -> int:
    """Columns of z and B multiplied at a time: fp32 ones take three products and registers."""
    most = 32 if delta_dtype == torch.float32 else 64
    return min(max(triton.next_power_of_2(r), 16), most)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def compile_cases() -> list[CompileCase]:
    """As launched: base and adapter dtypes, rank blocks, moments of both groups, one or none.

    Biases are there in the cases of both groups, which need the most registers.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        _compile_case(bf16, bf16, bf16, 16, "both groups"),
        _compile_case(bf16, bf16, bf16, 32, "one group"),
        _compile_case(bf16, bf16, bf16, 64, "both groups"),
        _compile_case(bf16, bf16, bf16, 8, "no moments"),
        _compile_case(bf16, fp32, fp32, 1, "one group"),
        _compile_case(bf16, fp32, fp32, 8, "both groups"),
        _compile_case(bf16, fp32, fp32, 16, "both groups"),
        _compile_case(bf16, fp32, fp32, 64, "both groups"),
        _compile_case(bf16, fp32, fp32, 16, "no moments"),
        _compile_case(bf16, bf16, fp32, 64, "both groups"),
        _compile_case(fp16, fp16, fp16, 64, "both groups"),
        _compile_case(fp16, fp32, fp32, 64, "both groups"),
        _compile_case(fp16, fp16, fp32, 16, "one group"),
        _compile_case(fp32, fp32, fp32, 64, "both groups"),
        _compile_case(fp32, fp32, fp32, 16, "no moments"),
        _compile_case(fp32, bf16, bf16, 64, "both groups"),
    ]


def _compile_case(
    x: torch.dtype, z: torch.dtype, b: torch.dtype, r: int, counted: str
) -> CompileCase:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    config = dict(_CONFIGS[x.itemsize])
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    moments, both = counted != "no moments", counted == "both groups"
    delta = torch.promote_types(z, b)
    optional = {"groups": "*i8", "slots": "*fp32"} if moments else {}
    biases = {"bias": f"*{names[x]}", "lora_bias": f"*{names[b]}"} if both else {}
    constants = {
        **config,
        "RANK": _rank_block(r, delta),
        "ROW_BLOCKS": _ROW_BLOCKS,
        "DTYPE": TRITON_DTYPES[x],
        "LORA_DTYPE": TRITON_DTYPES[z],
        "DELTA_DTYPE": TRITON_DTYPES[delta],
        "BIAS": both,
        "LORA_BIAS": both,
        "MOMENTS": moments,
        "BOTH": both,
        "CAST_DOT": True,
        "INTERPRETED": False,
        **{name: None for name in ("groups", "slots") if not moments},
        **{name: None for name in ("bias", "lora_bias") if not both},
        # Triton makes a constant of an integer that is 1.
        **({"r": 1, "stride_z": 1} if r == 1 else {}),
    }
    signature = {
        "x": f"tensordesc<{names[x]}[{bm}, {bk}]>",
        "weight": f"tensordesc<{names[x]}[{bn}, {bk}]>",
        "y": f"tensordesc<{names[x]}[{bm}, {bn // 2}]>",
        "z": f"*{names[z]}",
        "b": f"*{names[b]}",
        **dict.fromkeys(("m", "n", "k", "r", "stride_z", "only_group"), "i32"),
        "scaling": "fp32",
        **optional,
        **biases,
        **dict.fromkeys(constants, "constexpr"),
    }
    return CompileCase(
        name=f"{names[x]} x, {names[z]} z, {names[b]} B, r {r}, {counted}",
        kernel=fused_linear_kernel,
        signature=signature,
        constants=constants,
        divisible=("z", "b", *optional, *biases, *(("r", "stride_z") if r % 16 == 0 else ())),
        dot=True,
        capabilities=(90, 100),
        **options,
    )
