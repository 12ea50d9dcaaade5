"""What every operator and every peer moves and computes, kernel by kernel, from the shapes alone.

A computation is a sequence of passes. A pass reads and writes device memory and computes; it takes
at least as long as the slower of the two (:meth:`Ceilings.seconds`). Counted are the tensors that
each kernel must read or write once; caches between two kernels are not, so a small case can be
faster than predicted. Written after the sources of PEFT 0.21, of PyTorch's eager kernels and of
this package, not fitted to measurements.

Sizes: M tokens, K inputs, N outputs, rank r; e and a: bytes per element of the base's and the
adapter's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ucan_fast.ops.shrink import NATIVE_ROWS

#: Bytes of fp64 totals ``[2, 2]`` per column, read and written once.
TOTALS = 2 * 4 * 8
#: Bytes of the fp32 partial sums per column that one slot of a kernel holds.
SLOT = 16

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
#: Adapters whose products C++ takes on the CPU.
_WIDE = ("float32", "float64")


@dataclass(frozen=True)
class Pass:
    """One kernel.

    Attributes:
        name: what it does.
        bytes: read and written.
        flops: operations.
        dtype: of the operands of a product; of element-wise work what it is computed in.
    """

    name: str
    bytes: float
    flops: float = 0
    dtype: str = "float32"


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most.

    Attributes:
        bandwidth: bytes per second of a copy, reads and writes counted, past the caches.
        flops: operations per second of a large matrix product, by dtype.
        shortest: seconds that the smallest kernel takes, launch included.
        launch: seconds between two kernels that Python starts one by one; as ``shortest`` on a CPU.
        source: where the figures come from.
    """

    bandwidth: float
    flops: Mapping[str, float]
    shortest: float = 0.0
    launch: float = 0.0
    source: str = ""

    def seconds(self, passes: Sequence[Pass], *, eager: bool = False) -> float:
        """The least time for these passes one after the other.

        Args:
            passes: in any order.
            eager: each is started from Python, rather than replayed from a graph.
        """
        least = max(self.shortest, self.launch) if eager else self.shortest
        return sum(
            max(one.bytes / self.bandwidth, one.flops / self._rate(one.dtype), least)
            for one in passes
        )

    def _rate(self, dtype: str) -> float:
        # Where a dtype was not measured: as fp32, from which it is computed.
        return self.flops.get(dtype) or self.flops["float32"]

    def to_json(self) -> dict[str, Any]:
        """As in a result file's environment."""
        return {**vars(self), "flops": dict(self.flops)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Ceilings:
        """Back from :meth:`to_json`."""
        return cls(**entry)


def traffic(passes: Sequence[Pass]) -> dict[str, float]:
    """Bytes, operations and kernels in all."""
    return {
        "bytes": sum(one.bytes for one in passes),
        "flops": sum(one.flops for one in passes),
        "passes": len(passes),
    }


@dataclass(frozen=True)
class LoraCost:
    """Passes over one LoRA layer.

    Attributes:
        m, k, n, r: the sizes.
        dtype, adapter: dtypes by name.
        device: ``cpu`` or ``cuda``: which of our implementations runs.
        groups: share of the tokens in the two groups together (the inputs have three, equally).
    """

    m: int
    k: int
    n: int
    r: int
    dtype: str
    adapter: str
    device: str = "cpu"
    groups: float = field(default=2 / 3, compare=False)

    @property
    def _e(self) -> int:
        return SIZES[self.dtype]

    @property
    def _a(self) -> int:
        return SIZES[self.adapter]

    @property
    def _wide(self) -> int:
        return max(self._e, self._a)

    def _product(self, name: str, rows: int, inner: int, cols: int, dtype: str) -> Pass:
        moved = (rows * inner + inner * cols + rows * cols) * SIZES[dtype]
        return Pass(name, moved, 2 * rows * inner * cols, dtype)

    def _casts(self, *tensors: tuple[str, int], of: int, to: int) -> list[Pass]:
        return [] if of == to else [Pass(f"cast {n}", size * (of + to)) for n, size in tensors]

    # One forward pass

    def base(self) -> list[Pass]:
        """The base product."""
        return [self._product("base product", self.m, self.k, self.n, self.dtype)]

    def peft(self, adapter: str | None = None) -> list[Pass]:
        """``result + lora_B(lora_A(x)) * s``, then ``.to(result's dtype)``: a kernel each."""
        a = SIZES[adapter or self.adapter]
        return [*self.base(), *self._peft_a(adapter), *self._peft_b(adapter), *self._peft_add(a)]

    def _peft_a(self, adapter: str | None = None) -> list[Pass]:
        adapter = adapter or self.adapter
        return [
            *self._casts(("x", self.m * self.k), of=self._e, to=SIZES[adapter]),
            self._product("lora_A", self.m, self.k, self.r, adapter),
        ]

    def _peft_b(self, adapter: str | None = None) -> list[Pass]:
        return [self._product("lora_B", self.m, self.r, self.n, adapter or self.adapter)]

    def _peft_add(self, a: int) -> list[Pass]:
        size, wide = self.m * self.n, max(self._e, a)
        return [
            Pass("times s", 2 * a * size, size),
            Pass("add", (self._e + a + wide) * size, size),
            *self._casts(("y", size), of=wide, to=self._e),
        ]

    def peft_autocast(self) -> list[Pass]:
        """Under autocast to the base's dtype: x to the adapter's dtype, then all of it narrowed."""
        down = {"of": self._a, "to": self._e}
        return [
            *self.base(),
            *self._casts(("x", self.m * self.k), of=self._e, to=self._a),
            *self._casts(
                ("x again", self.m * self.k),
                ("A", self.r * self.k),
                ("B", self.n * self.r),
                **down,
            ),
            self._product("lora_A", self.m, self.k, self.r, self.dtype),
            *self._peft_b(self.dtype),
            *self._peft_add(self._e),
        ]

    def peft_compiled(self) -> list[Pass]:
        """Products stay cuBLAS's or the CPU library's; what is element-wise becomes one kernel."""
        return [*self.base(), *self._peft_a(), *self.torch_expand_compiled()]

    def addmm(self) -> list[Pass]:
        """unsloth's: A and B narrowed, ``x Aᵀ``, ``addmm_`` into the base's output."""
        size = self.m * self.n
        return [
            *self.base(),
            *self._casts(("A", self.r * self.k), ("B", self.n * self.r), of=self._a, to=self._e),
            self._product("x A", self.m, self.k, self.r, self.dtype),
            Pass(
                "addmm_",
                (2 * size + self.m * self.r + self.n * self.r) * self._e,
                2 * size * self.r,
                self.dtype,
            ),
        ]

    def ucan(self, *, moments: bool = False) -> list[Pass]:
        """Base, :meth:`shrink`, :meth:`expand`."""
        return [*self.base(), *self.shrink(moments=moments), *self.expand(moments=moments)]

    def fused_linear(self, *, moments: bool = False) -> list[Pass]:
        """:meth:`shrink`, then the base product with the rest in its epilogue."""
        base = self.base()[0]
        z = self.m * self.r * self._a + self.n * self.r * self._a
        slots = SLOT * self.n * -(-self.m // 128) if moments else 0
        fused = Pass(
            "fused_linear",
            base.bytes + z + slots,
            base.flops + self._small_flops(self.n),
            self.dtype,
        )
        fold = [Pass("fold", slots + TOTALS * self.n)] if moments else []
        return [*self.shrink(moments=moments), fused, *fold]

    # The operators

    def _small_flops(self, n: int) -> float:
        # fp32 operands on tensor cores are three narrower products.
        three = 3 if self.adapter == "float32" and self.device == "cuda" else 1
        return three * 2 * self.m * self.r * n

    def _small_dtype(self) -> str:
        on_cuda = self.device == "cuda" and self.adapter == "float32"
        return "bfloat16" if on_cuda else self.adapter

    def shrink(self, *, moments: bool = False) -> list[Pass]:
        """``z = x Aᵀ``. CUDA: x comes from memory once; CPU: twice, for z and for the sums."""
        x = self.m * self.k * self._e
        a, z = self.r * self.k * self._a, self.m * self.r * self._a
        if self.device == "cpu":
            one = Pass("shrink", x + a + z, self._small_flops(self.k), self.adapter)
            # Narrow products and few rows are torch's.
            product = [one] if self.adapter in _WIDE and self.m >= NATIVE_ROWS else self._peft_a()
            sums = Pass("moments of x", x + TOTALS * self.k, 4 * self.m * self.k)
            return [*product, *([sums] if moments else [])]
        blocks = -(-self.m // 128)
        # K is cut into chunks for parallelism (kernels/shrink.py), whose fp32 sums go to memory.
        chunks = max(132 // blocks, min(264 // blocks, self.k // (8 * self.r)), 1)
        chunks, slots = min(chunks, 64), 0
        if moments and self._reads_x_once():
            # As in kernels/shrink_columns.py: a part of z for every tile of columns.
            width = 256 if self.r <= 16 else 128
            chunks = -(-self.k // width)
            rows = 64 * -(-self.m // (64 * max(256 // chunks, 1)))
            rows = min(rows, 128 * 1024 // width)
            slots = SLOT * self.k * (1024 // width) * -(-self.m // rows)
        elif moments:
            # A slot for each warp of a program, whose rows are as in kernels/moments.py.
            tiles = -(-self.k * self._e // 512)
            rows = 128 * min(max(-(-self.m // 128) * tiles // 512, 1), 4)
            slots = SLOT * self.k * (4 if self.r <= 32 else 8) * -(-self.m // rows)
        whole = chunks == 1 and not moments
        parts = z if whole else 4 * chunks * self.m * self.r
        totals = slots + TOTALS * self.k if moments else 0
        of_z = SLOT * self.r * -(-self.m // 32)
        return [
            Pass("shrink", x + a + parts + slots, self._small_flops(self.k), self._small_dtype()),
            *([] if whole else [Pass("finish", parts + z + totals)]),
            *([Pass("fold", of_z + TOTALS * self.r)] if moments else []),
        ]

    def _reads_x_once(self) -> bool:
        # kernels/shrink_columns.py, row_of.
        operands = (self.dtype, "float32") if self.dtype == "bfloat16" else (self.dtype,)
        width = 256 if self.r <= 16 else 128
        enough = self.m // 64 * -(-self.k // width) >= 132
        return self._e == 2 and self.r <= 32 and self.adapter in operands and enough

    def expand(self, *, moments: bool = False) -> list[Pass]:
        """``y = base + s z Bᵀ``, in one pass over y; narrow products on the CPU: as PEFT's."""
        size = self.m * self.n
        operands = (self.m * self.r + self.n * self.r) * self._a
        if self.device == "cpu":
            totals = [Pass("totals", TOTALS * self.n)] if moments else []
            if self.adapter not in _WIDE:
                sums = [*self._scaled_delta(), Pass("moments", 4 * size, 4 * size)]
                return [*self.torch_expand(), *(sums if moments else []), *totals]
            flops = self._small_flops(self.n) + (6 if moments else 2) * size
            one = Pass("expand", (self._e + self._a) * size + operands, flops, self.adapter)
            return [one, *self._casts(("y", size), of=self._a, to=self._e), *totals]
        # As in kernels/expand.py.
        rows = 32 * min(max(-(-self.m // 32) * -(-self.n // 64) // 256, 1), 32)
        slots = SLOT * self.n * -(-self.m // rows) if moments else 0
        one = Pass(
            "expand",
            2 * size * self._e + operands + slots,
            self._small_flops(self.n),
            self._small_dtype(),
        )
        return [one, Pass("fold", slots + TOTALS * self.n)] if moments else [one]

    def torch_shrink(self) -> list[Pass]:
        """PEFT's expression of it."""
        return self._peft_a()

    def torch_shrink_moments(self) -> list[Pass]:
        """The same, and the moments of x by mask products."""
        return [*self._mask_matmul(self.k, self._e), *self._peft_a()]

    def torch_expand(self) -> list[Pass]:
        """PEFT's expression of it."""
        return [*self._peft_b(), *self._peft_add(self._a)]

    def torch_expand_moments(self) -> list[Pass]:
        """The same, and the moments of δ by mask products."""
        return [
            *self._peft_b(),
            *self._scaled_delta(),
            *self._mask_matmul(self.n, 4),
            *self._peft_add(self._a),
        ]

    def torch_shrink_moments_compiled(self) -> list[Pass]:
        """The same compiled; without moments there is nothing to fuse."""
        return [*self._mask_matmul_compiled(self.k, self._e), *self._peft_a()]

    def torch_expand_compiled(self) -> list[Pass]:
        """PEFT's expression compiled: one kernel after the product."""
        size = self.m * self.n
        one = Pass("times s, add", (2 * self._e + self._a) * size, 2 * size)
        return [*self._peft_b(), one]

    def torch_expand_moments_compiled(self) -> list[Pass]:
        """The same with the moments of δ."""
        return [*self.torch_expand_compiled(), *self._mask_matmul_compiled(self.n, self._a)]

    def torch_addmm(self) -> list[Pass]:
        """``torch.addmm`` out of place, operands narrowed."""
        return [
            *self._casts(("z", self.m * self.r), ("B", self.n * self.r), of=self._a, to=self._e),
            self.addmm()[-1],
        ]

    # Hooks

    def hooks(self, statistics: str, *, autocast: bool = False) -> list[Pass]:
        """PEFT's forward with hooks on lora_A's input and lora_B's output times s.

        Args:
            statistics: ``boolean index`` or ``mask matmul``.
            autocast: to the base's dtype. lora_A is still handed x in the adapter's.
        """
        sums = {"boolean index": self._boolean_index, "mask matmul": self._mask_matmul}[statistics]
        return [
            *(self.peft_autocast() if autocast else self.peft()),
            *sums(self.k, self._a),
            *self._scaled_delta(self._e if autocast else self._a),
            *sums(self.n, 4),
        ]

    def hooks_compiled(self, statistics: str) -> list[Pass]:
        """The same compiled: what is element-wise around a product or an index is one kernel."""
        passes = self.peft_compiled()
        for width in (self.k, self.n):
            size = self.m * width
            if statistics == "mask matmul":
                passes += self._mask_matmul_compiled(width, self._a)
            else:
                part = self.groups / 2 * size
                passes += [
                    one
                    for _ in range(2)
                    for one in (
                        Pass("h[mask]", 2 * self._a * part),
                        Pass("sums", self._a * part, 4 * part),
                        Pass("totals", 40 * width),
                    )
                ]
        return passes

    def _scaled_delta(self, element: int | None = None) -> list[Pass]:
        size = self.m * self.n
        return [
            *self._casts(("lora_B's output", size), of=element or self._a, to=4),
            Pass("times s", 8 * size, size),
        ]

    def _mask_matmul(self, width: int, element: int) -> list[Pass]:
        size = self.m * width
        passes = self._casts(("h", size), of=element, to=4)
        for name in ("|h|", "h²"):
            passes += [Pass(name, 8 * size, size), Pass("mask product", 4 * size, 4 * size)]
            passes += [Pass("totals", 40 * width)]
        return passes

    def _mask_matmul_compiled(self, width: int, element: int) -> list[Pass]:
        # |h| and h² are written for the products that read them.
        size = self.m * width
        products = [Pass("mask product", 4 * size, 4 * size), Pass("totals", 40 * width)] * 2
        return [Pass("|h|, h²", (element + 8) * size, 2 * size), *products]

    def _boolean_index(self, width: int, element: int) -> list[Pass]:
        part = self.groups / 2 * self.m * width
        passes = []
        for _ in range(2):
            passes += [Pass("h[mask]", 2 * element * part)]
            passes += [] if element == 4 else [Pass("cast h", (element + 4) * part)]
            for name in ("|h|", "h²"):
                passes += [Pass(name, 8 * part, part), Pass("sum", 4 * part, part)]
                passes += [Pass("totals", 20 * width)]
        return passes

    # Forward and backward

    def _base_backward(self) -> Pass:
        return self._product("dy W", self.m, self.n, self.k, self.dtype)

    def _small_backward(self, dtype: str) -> list[Pass]:
        return [
            self._product("dz = dδ B", self.m, self.n, self.r, dtype),
            self._product("dB", self.n, self.m, self.r, dtype),
            self._product("dx of A", self.m, self.r, self.k, dtype),
            self._product("dA", self.r, self.m, self.k, dtype),
        ]

    def _wide_backward(self) -> list[Pass]:
        # Through autograd: dδ is a tensor, and dx is the sum of two.
        size = self.m * self.n
        return [
            self._base_backward(),
            *self._casts(("dy", size), of=self._e, to=self._wide),
            Pass("dδ = dy s", 2 * self._wide * size, size),
            *self._small_backward(self.adapter),
            *self._casts(("dx", self.m * self.k), of=self._a, to=self._e),
            Pass("dx + dx", 3 * self._e * self.m * self.k, self.m * self.k),
        ]

    def peft_step(self, adapter: str | None = None) -> list[Pass]:
        """PEFT, forward and backward."""
        cost = self if adapter is None else LoraCost(**{**vars(self), "adapter": adapter})
        return [*cost.peft(), *cost._wide_backward()]

    def peft_step_autocast(self) -> list[Pass]:
        """The same under autocast to the base's dtype: every cast has one in the backward pass."""
        size, inner = self.m * self.n, self.m * self.k
        return [
            *self.peft_autocast(),
            self._base_backward(),
            Pass("dδ = dy s", 2 * self._e * size, size),
            *self._small_backward(self.dtype),
            *self._widened_gradients(),
            *self._casts(("dx of A", inner), of=self._e, to=self._a),
            *self._casts(("dx of A again", inner), of=self._a, to=self._e),
            Pass("dx + dx", 3 * self._e * inner, inner),
        ]

    def _widened_gradients(self) -> list[Pass]:
        # Of A and B as autocast narrowed them.
        return self._casts(("dA", self.r * self.k), ("dB", self.n * self.r), of=self._e, to=self._a)

    def peft_step_compiled(self) -> list[Pass]:
        """The same compiled: element-wise work of the backward pass in two kernels."""
        size, inner = self.m * self.n, self.m * self.k
        return [
            *self.peft_compiled(),
            self._base_backward(),
            Pass("dδ = dy s", (self._e + self._wide) * size, size),
            *self._small_backward(self.adapter),
            Pass("dx + dx", (2 * self._e + self._a) * inner, inner),
        ]

    def ucan_step(self) -> list[Pass]:
        """Ours; the backward pass is torch's products."""
        return [*self.ucan(), *self._wide_backward()]

    def ucan_step_autocast(self) -> list[Pass]:
        """Ours under autocast: adapters of the base's dtype, whose gradients are widened."""
        narrow = LoraCost(**{**vars(self), "adapter": self.dtype})
        narrowed = self._casts(
            ("A", self.r * self.k), ("B", self.n * self.r), of=self._a, to=self._e
        )
        return [*narrowed, *narrow.ucan_step(), *self._widened_gradients()]

    def addmm_step(self) -> list[Pass]:
        """unsloth's scheme with its backward, which computes z again."""
        add = (2 * self.m * self.k + self.m * self.r + self.r * self.k) * self._e
        return [
            *self.addmm(),
            self._product("dz = dy B", self.m, self.n, self.r, self.dtype),
            self._product("dA", self.r, self.m, self.k, self.dtype),
            self._product("x A", self.m, self.k, self.r, self.dtype),
            self._product("dB", self.n, self.m, self.r, self.dtype),
            self._base_backward(),
            Pass("addmm_ into dx", add, 2 * self.m * self.k * self.r, self.dtype),
        ]


# attenuate_


def attenuate_per_tensor(sizes: Sequence[tuple[int, int]], element: int) -> list[Pass]:
    """A kernel per matrix.

    Args:
        sizes: elements and factors of each.
        element: bytes of one.
    """
    return [Pass("mul_", 2 * element * count + 4 * few, count) for count, few in sizes]


def attenuate_at_once(
    sizes: Sequence[tuple[int, int]], element: int, *, changed: float
) -> list[Pass]:
    """One kernel for all. A is read and written whole; of B, rows whose factor is 1 are not.

    Args:
        sizes: elements and factors of each, A and B in turn.
        element: bytes of one.
        changed: share of the factors that are not 1.
    """
    moved = sum(count * (1.0 if i % 2 == 0 else changed) for i, (count, _) in enumerate(sizes))
    count = sum(count for count, _ in sizes)
    factors = sum(few for _, few in sizes)
    return [Pass("attenuate_kernel", 2 * element * moved + 4 * factors, count)]


# Scores: all of it in fp64. Bytes per neuron of each kernel, after the functions in peers and ops
# with the choices of benchmarks.kernels.scores.

_LAYER_LOOP = {
    **dict.fromkeys(("f / n", "r / n", "r² / n", "sqrt", "relu", "1 - U", "U / top"), 16),
    **dict.fromkeys(("f + r", "f - r", "quotient", "norms x rms", "R (1 - U)"), 24),
    "total > 0": 9,
    "where R": 17,
    "where U": 16,
    "max": 8,
}
_WHOLE_PLAN = {
    **dict.fromkeys(("cat R", "cat U", "cat S", "S - t", "quotient", "relu", "-βu", "exp"), 16),
    "max": 8,
    "S > t": 9,
    "where": 17,
    "to fp32": 12,
}
_REFERENCE = {
    # repeat_interleave: an index per neuron, then what it selects.
    "index of layer": 8,
    **dict.fromkeys(("layer of neuron", "relu", "rms", "scatter max", "top of layer", "1 - U"), 16),
    **dict.fromkeys(("power", "S - t", "u", "-βu", "exp"), 16),
    **dict.fromkeys(("counts of layer", "f / n", "r / n", "f² / n", "r² / n", "sum"), 24),
    **dict.fromkeys(("difference", "quotient", "norms x rms", "R (1 - U)", "U / top"), 24),
    "> 0": 9,
    "where R": 17,
    "where U": 17,
    "U > 0": 9,
    "max": 8,
    "S > t": 9,
    "where u": 17,
    "floor": 16,
    "where γ": 17,
    "to fp32": 12,
}
# The loads and stores of kernels/scores.py, for mean_abs, symmetric and no normalization: 100.
_KERNELS = {
    "measure_kernel": 6 * 8,  # Σ|h| of both groups, Σh² of D_r, the norm; R and U out
    "finish_kernel": 4 * 8,  # R and U; U and S out. R is final already, and not written again
    "max": 8,  # S
    "factors_kernel": 8 + 4,  # S; γ out, in fp32
}


def _per_neuron(table: Mapping[str, int], neurons: int) -> list[Pass]:
    return [Pass(name, size * neurons, neurons, "float64") for name, size in table.items()]


def scores_layer_loop(widths: Sequence[int]) -> list[Pass]:
    """A loop over the layers, then one formula over all."""
    per_layer = [one for width in widths for one in _per_neuron(_LAYER_LOOP, width)]
    return [*per_layer, *_per_neuron(_WHOLE_PLAN, sum(widths))]


def scores_reference(neurons: int) -> list[Pass]:
    """This package's definition, in plain torch over all layers."""
    return _per_neuron(_REFERENCE, neurons)


def scores_ucan(neurons: int, device: str) -> list[Pass]:
    """Ours: on CUDA three kernels and torch's maximum, elsewhere the definition."""
    if device == "cuda":
        return _per_neuron(_KERNELS, neurons)
    return scores_reference(neurons)
