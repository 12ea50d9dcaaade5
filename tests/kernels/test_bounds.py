"""No kernel touches what lies beside its tensors, and none counts elements in 32 bits.

In the interpreter, where every masked-out element is left alone as on a GPU. There
compute-sanitizer and a tensor of more than 2^31 elements ask the same (ci/gpu.sh).
"""

from __future__ import annotations

import pytest
import torch
from guarded import far_rows, guarded, guarded_empty, linux, survives

pytest.importorskip("triton")

import triton
import triton.language as tl

from ucan_fast.kernels import fused_linear as fused_module
from ucan_fast.kernels import shrink_columns
from ucan_fast.kernels.attenuate import attenuate_
from ucan_fast.kernels.common import INTERPRET, store_sums
from ucan_fast.kernels.expand import expand
from ucan_fast.kernels.fused_linear import fused_linear
from ucan_fast.kernels.moments import accumulate_moments_
from ucan_fast.kernels.scores import attenuation_factors, contrastive_scores
from ucan_fast.kernels.shrink import shrink
from ucan_fast.ops.moments import moments_reference

pytestmark = [
    linux,
    pytest.mark.skipif(not INTERPRET, reason="on a GPU compute-sanitizer looks for this"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of fork beside threads
]
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
#: x, A and the product of shrink, or z, B and the base of expand.
DTYPES = [(BF16, FP32, FP32), (BF16, BF16, BF16), (FP32, FP32, FP32), (FP32, FP16, FP32)]


class Guarded:
    """Makes tensors beside inaccessible pages, and has the launchers make theirs so, too."""

    def __init__(self, side: str) -> None:
        self.side = side
        torch.manual_seed(0)
        torch.empty = lambda *shape, dtype=FP32, device=None: self.empty(shape, dtype)
        torch.empty_like = lambda like, dtype=None: self.empty(like.shape, dtype or like.dtype)
        new_empty = torch.Tensor.new_empty

        def guarded_new_empty(tensor, *shape, dtype=None, **options):
            if options:  # the interpreter's own
                return new_empty(tensor, *shape, dtype=dtype, **options)
            return self.empty(shape, dtype or tensor.dtype)

        torch.Tensor.new_empty = guarded_new_empty

    def empty(self, shape, dtype: torch.dtype) -> torch.Tensor:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return guarded_empty(tuple(shape), dtype, self.side)

    def randn(self, *shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
        return guarded(torch.randn(shape).to(dtype), self.side)

    def groups(self, tokens: int) -> torch.Tensor:
        return guarded(torch.randint(-1, 2, (tokens,)).to(torch.int8), self.side)

    def totals(self, n: int) -> torch.Tensor:
        return guarded(torch.zeros(2, 2, n, dtype=FP64), self.side)


def finite(*tensors: torch.Tensor) -> None:
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)


def run_moments(side: str) -> None:
    make = Guarded(side)
    for m, n in ((37, 45), (1, 1), (300, 130)):
        for only in (None, 1):
            totals = make.totals(n)
            accumulate_moments_(make.randn(m, n, dtype=BF16), make.groups(m), totals, only)
            finite(totals)


def run_shrink(side: str) -> None:
    make = Guarded(side)
    for x_dtype, a_dtype, dtype in DTYPES[: 4 if side == "end" else 1]:
        for m, k, r in ((37, 77, 3), (7, 80, 17), (129, 208, 5), (40, 150, 5), (1, 31, 65)):
            for only in (None, 0):
                x, a = make.randn(m, k, dtype=x_dtype), make.randn(r, k, dtype=a_dtype)
                of_x, of_z = make.totals(k), make.totals(r)
                finite(shrink(x, a, dtype, make.groups(m), only, of_x, of_z), of_x, of_z)
                finite(shrink(x, a, dtype))


def run_shrink_columns(side: str) -> None:
    make = Guarded(side)
    shrink_columns.FEWEST_PROGRAMS = 1
    for dtypes in ((BF16, FP32, FP32), (BF16, BF16, BF16), (FP16, FP16, FP16)):
        for m, k, r in ((64, 16, 1), (70, 272, 5), (130, 256, 20)):
            for only in (None, 0):
                x, a = make.randn(m, k, dtype=dtypes[0]), make.randn(r, k, dtype=dtypes[1])
                of_x, of_z = make.totals(k), make.totals(r)
                finite(shrink(x, a, dtypes[2], make.groups(m), only, of_x, of_z), of_x, of_z)


def run_expand(side: str) -> None:
    make = Guarded(side)
    for z_dtype, b_dtype, base_dtype in DTYPES[: 4 if side == "end" else 1]:
        for m, n, r in ((70, 65, 5), (7, 130, 70), (1, 1, 1), (33, 64, 33)):
            for only in (None, 0):
                base, z = make.randn(m, n, dtype=base_dtype), make.randn(m, r, dtype=z_dtype)
                b, bias = make.randn(n, r, dtype=b_dtype), make.randn(n, dtype=b_dtype)
                sums = make.totals(n)
                finite(expand(base, z, b, 1.5, bias, make.groups(m), only, sums), sums)
                finite(expand(base, z, b, 1.5))


def run_fused_linear(side: str) -> None:
    make = Guarded(side)
    for dtype, b_dtype in ((BF16, FP32), (FP32, FP32), (BF16, BF16)):
        for m, n, k, r in ((130, 136, 72, 5), (16, 8, 8, 70)):
            x, weight = make.randn(m, k, dtype=dtype), make.randn(n, k, dtype=dtype)
            z, b = make.randn(m, r, dtype=dtype), make.randn(n, r, dtype=b_dtype)
            assert fused_module.obstacle(x, weight, z, b) is None
            bias, lora_bias = make.randn(n, dtype=dtype), make.randn(n, dtype=b_dtype)
            for only in (None, 1):
                sums, groups = make.totals(n), make.groups(m)
                y = fused_linear(x, weight, z, b, 0.5, bias, lora_bias, groups, only, sums)
                finite(y, sums, fused_linear(x, weight, z, b, 0.5))


def run_scores(side: str) -> None:
    make = Guarded(side)
    ends = guarded(torch.tensor([0, 1, 1, 40, 600]), side)
    moments = make.randn(2, 2, 600, dtype=FP64).abs_()
    counts = guarded(torch.full((4, 2), 7.0, dtype=FP64), side)
    norms = make.randn(600, dtype=FP64).abs_()
    for normalization in ("none", "layer", "global"):
        options = ("rms", "zscore", normalization, "protect", 0.3)
        _, _, score = contrastive_scores(moments, counts, norms, ends, *options)
        finite(score, attenuation_factors(score, score.max(), 0.01, "linear", 1.0, 0.1))


def run_attenuate(side: str) -> None:
    make = Guarded(side)
    shapes = [(16, 40), (3, 5), (1, 40), (40, 1), (7, 33), (64, 64), (1, 1)]
    for dtype in (BF16, FP32, FP16, FP64):
        for axis in (0, 1):
            weights = [make.randn(*shape, dtype=dtype) for shape in shapes]
            weights += [make.randn(*shape, dtype=dtype).t() for shape in shapes]
            sizes = [weight.shape[axis] for weight in weights]
            offsets = [sum(sizes[:i]) for i in range(len(sizes))]
            factors = guarded(torch.rand(sum(sizes)), side)
            attenuate_(weights, factors, offsets, [axis] * len(weights))
            finite(*weights)


KERNELS = [run_moments, run_shrink, run_shrink_columns, run_expand]
KERNELS += [run_fused_linear, run_scores, run_attenuate]


@pytest.mark.parametrize("side", ["end", "start"])
@pytest.mark.parametrize("run", KERNELS, ids=lambda run: run.__name__.removeprefix("run_"))
def test_nothing_beside_the_tensors_is_touched(run, side):
    survives(run, side)


@triton.jit
def _copy_kernel(source, target, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(target + place, tl.load(source + place))


def copy_four_of_three(side: str) -> None:
    target = torch.zeros(4)
    _copy_kernel[(1,)](guarded(torch.ones(3), side), target, SIZE=4)


def test_a_kernel_that_does_is_found():
    survives(copy_four_of_three, "start")
    with pytest.raises(AssertionError, match="signal 11"):
        survives(copy_four_of_three, "end")


# ------------------------------------------------------------------ 64-bit addresses


@pytest.fixture
def storages_stay(monkeypatch):
    """The interpreter copies every storage back onto itself: not one of 4 GB, if you please."""
    real = torch.UntypedStorage.copy_

    def copy_(storage, source, *rest):
        same = storage.data_ptr() == source.data_ptr()
        return storage if same else real(storage, source, *rest)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


GROUPS = torch.tensor([-1, 1, 0], dtype=torch.int8)


def far_moments() -> None:
    near = rows(3, 20)
    sums = torch.zeros(2, 2, 20, dtype=FP64)
    accumulate_moments_(far_rows(near), GROUPS, sums)
    torch.testing.assert_close(sums, moments_reference(near, GROUPS))


def far_shrink() -> None:
    near, a = rows(3, 40), rows(3, 40, seed=1)
    one, two = (torch.zeros(2, 2, 40, dtype=FP64) for _ in range(2))
    z = shrink(far_rows(near), a, BF16, GROUPS, None, one)
    assert torch.equal(z, shrink(near, a, BF16, GROUPS, None, two))
    assert torch.equal(one, two)


def far_expand() -> None:
    base, b = rows(3, 20), rows(20, 4, seed=1)
    for z in (rows(3, 4, seed=2), rows(3, 70, seed=3)):
        b = rows(20, z.shape[1], seed=1)
        want = expand(base, z, b, 2.0)
        assert torch.equal(expand(far_rows(base), z, b, 2.0), want)
        assert torch.equal(expand(base, far_rows(z), b, 2.0), want)


def far_blocks() -> None:
    """Rows so far apart that blocks of them are beyond 32 bits, but not a block's own."""
    shrink_columns.FEWEST_PROGRAMS = 1
    near, a, groups = rows(130, 16), rows(4, 16, seed=1), torch.zeros(130, dtype=torch.int8)
    far = far_rows(near, shrink_columns.MAX_STRIDE)
    one, two = (torch.zeros(2, 2, 16, dtype=FP64) for _ in range(2))
    z = shrink(near, a, BF16, groups, None, one)
    assert torch.equal(shrink(far, a, BF16, groups, None, two), z)
    assert torch.equal(one, two)
    b = rows(16, 4, seed=2)
    assert torch.equal(expand(far, z, b, 2.0), expand(near, z, b, 2.0))


def far_fused_linear() -> None:
    x, weight, z, b = rows(3, 16), rows(24, 16, seed=1), rows(3, 4, seed=2), rows(24, 4, seed=3)
    assert torch.equal(
        fused_linear(x, weight, far_rows(z), b, 2.0), fused_linear(x, weight, z, b, 2.0)
    )


def far_attenuate() -> None:
    near, factors = rows(3, 20), torch.tensor([0.5, 1.0, 0.25])
    weight = far_rows(near)
    attenuate_([weight], factors, [0], [0])
    assert torch.equal(weight, (near.float() * factors[:, None]).to(BF16))


@triton.jit
def _far_slot_kernel(slots, shift, slot, n, BOTH: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    value = column.to(tl.float32)
    store_sums(slots - shift, slot, column, n, value, value + 100, value + 200, value + 300, BOTH)


def far_slots() -> None:
    """A slot whose first element is number 2^32 or 2^31, from where it would begin."""
    for both, parts in ((True, 4), (False, 2)):
        slots, slot, n = torch.zeros(parts, 1024), 1 << 20, 1024
        _far_slot_kernel[(1,)](slots, slot * parts * n, slot, n, BOTH=both, COLUMNS=1024)
        first = (0, 100, 200, 300) if both else (0, 200)
        assert torch.equal(slots, torch.arange(1024.0) + torch.tensor(first)[:, None])


FAR = [far_moments, far_shrink, far_expand, far_blocks, far_fused_linear, far_attenuate, far_slots]


@pytest.mark.usefixtures("storages_stay")
@pytest.mark.parametrize("run", FAR, ids=lambda run: run.__name__)
def test_elements_beyond_32_bits(run):
    survives(run)
