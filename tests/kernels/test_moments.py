"""The moments kernel, the folding of its slots, and the rounding that all kernels share."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from kernel_launches import Launches

from ucan_fast.kernels import common
from ucan_fast.kernels import moments as module
from ucan_fast.kernels.common import fold_, new_slots, round_to, rows_of
from ucan_fast.kernels.moments import PROGRAM_ROWS, accumulate_moments_, compile_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATISTICS = (torch.abs, torch.square)

pytestmark = pytest.mark.usefixtures("poison")


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def random_groups(tokens: int, dtype=torch.int8, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (tokens,), generator=generator).to(dtype).to(DEVICE)


def sums(h: torch.Tensor, groups: torch.Tensor, dtype: torch.dtype, only=None) -> torch.Tensor:
    """Σ|h| and Σh² by boolean indexing, in ``dtype``."""
    rows = h.reshape(-1, h.shape[-1]).to(dtype)
    return torch.stack(
        [
            torch.stack([statistic(rows[groups == g]).sum(0) * (only in (None, g)) for g in (0, 1)])
            for statistic in STATISTICS
        ]
    )


def assert_moments(got, h, groups, only=None, start=0.0):
    """The tolerance rule: less than twice plain torch's error, plus 1e-6 relative."""
    want = sums(h, groups, torch.float64, only)
    plain = sums(h, groups, torch.float32, only).double()
    assert got.dtype == torch.float64
    for mine, torchs, exact in zip(got - start, plain, want, strict=True):
        bound = 2 * (torchs - exact).abs().amax() + 1e-6 * exact.abs().amax()
        assert torch.all((mine - exact).abs() <= bound)


# ------------------------------------------------------------------ the kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("only", [None, 0, 1])
@pytest.mark.parametrize("m", [0, 1, 7, 129, PROGRAM_ROWS + 1])
@pytest.mark.parametrize("n", [1, 45, 150])
def test_values(dtype, only, m, n):
    h, groups = randn(m, n, dtype=dtype), random_groups(m)
    # += : what was there stays, also in the group that is not counted.
    totals = torch.full((2, 2, n), 3.0, dtype=torch.float64, device=DEVICE)
    accumulate_moments_(h, groups, totals, only)
    assert_moments(totals, h, groups, only, start=3.0)
    if only is not None:
        assert torch.all(totals[:, 1 - only] == 3.0)


def test_small_integers_are_exact():
    h = torch.tensor([[1.0, -2.0], [3.0, 4.0], [-5.0, 6.0], [7.0, 8.0]], device=DEVICE)
    groups = torch.tensor([0, 1, 0, -1], device=DEVICE)
    totals = torch.zeros(2, 2, 2, dtype=torch.float64, device=DEVICE)
    accumulate_moments_(h, groups, totals)
    assert totals.tolist() == [[[6, 8], [3, 4]], [[26, 40], [9, 16]]]


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (2, 3, 4, 12), (2, 0, 12), (0, 12)])
def test_shapes(shape):
    h = randn(*shape)
    groups = random_groups(h.numel() // 12)
    totals = torch.zeros(2, 2, 12, dtype=torch.float64, device=DEVICE)
    accumulate_moments_(h, groups, totals)
    assert_moments(totals, h, groups)


STRIDED = {
    "every other row": lambda: randn(40, 20)[::2],
    "every other column": lambda: randn(20, 40)[:, ::2],
    "transposed": lambda: randn(20, 37).t(),
    "one row repeated": lambda: randn(1, 20).expand(9, 20),
    "permuted 3-D": lambda: randn(4, 20, 5).permute(2, 0, 1),
    "a slice of a wider row": lambda: randn(3, 4, 50)[..., 7:27],
}


@pytest.mark.parametrize("name", STRIDED)
def test_strides(name):
    h = STRIDED[name]()
    groups = random_groups(h.numel() // h.shape[-1])
    totals = torch.zeros(2, 2, h.shape[-1], dtype=torch.float64, device=DEVICE)
    accumulate_moments_(h, groups, totals)
    assert_moments(totals, h, groups)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_group_dtypes_and_strides(dtype):
    h = randn(33, 20)
    groups = torch.arange(66).remainder(3).to(dtype).to(DEVICE)[::2]
    totals = torch.zeros(2, 2, 20, dtype=torch.float64, device=DEVICE)
    accumulate_moments_(h, groups, totals)
    assert_moments(totals, h, groups)


@pytest.mark.parametrize("only", [None, 0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ignored_rows_do_not_spread(only, value):
    h = randn(40, 20)
    groups = torch.tensor([0, 1, -1, 2, -100] * 8, device=DEVICE)
    h[(groups != 0) & (groups != 1)] = value
    if only is not None:
        h[groups == 1 - only] = value
    totals = torch.zeros(2, 2, 20, dtype=torch.float64, device=DEVICE)
    accumulate_moments_(h, groups, totals, only)
    keep = (groups == only) if only is not None else (groups == 0) | (groups == 1)
    assert_moments(totals, h[keep], groups[keep], only)


def test_nan_in_a_counted_row_is_seen():
    h = randn(40, 20)
    h[3, 4] = torch.nan
    groups = torch.zeros(40, dtype=torch.int8, device=DEVICE)
    groups[20:] = 1
    totals = torch.zeros(2, 2, 20, dtype=torch.float64, device=DEVICE)
    accumulate_moments_(h, groups, totals)
    assert totals[:, 0, 4].isnan().all()
    assert_moments(totals[..., 5:], h[:, 5:], groups)
    assert_moments(totals[..., :4], h[:, :4], groups)


def test_totals_with_strides():
    h, groups = randn(33, 20), random_groups(33)
    totals = torch.zeros(20, 2, 2, dtype=torch.float64, device=DEVICE).permute(1, 2, 0)
    for only in (0, 1):
        accumulate_moments_(h, groups, totals, only)
    assert_moments(totals, h, groups)


def test_same_input_same_bits():
    h, groups = randn(300, 33), random_groups(300)
    first, second = (torch.zeros(2, 2, 33, dtype=torch.float64, device=DEVICE) for _ in range(2))
    accumulate_moments_(h, groups, first)
    accumulate_moments_(h, groups, second)
    assert torch.equal(first, second)


# ------------------------------------------------------------------ what the kernels share


@pytest.mark.parametrize("only", [None, 0, 1])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("n", [1, 127, 130])
def test_fold(only, count, n):
    slots = new_slots(count, n, only, torch.device(DEVICE))
    assert slots.shape == (count, 2, 2 if only is None else 1, n)
    slots.copy_(randn(*slots.shape))
    totals = randn(2, 2, n).double()
    want = totals.clone()
    target = want if only is None else want[:, only : only + 1]
    target += slots.double().sum(0)
    fold_(slots, totals, only)
    torch.testing.assert_close(totals, want, rtol=1e-14, atol=1e-14)


def test_fold_adds_in_fp64():
    slots = torch.ones(20, 2, 2, 3, device=DEVICE)
    slots[0] = 2.0**24  # where fp32 would lose every 1 that follows
    totals = torch.zeros(2, 2, 3, dtype=torch.float64, device=DEVICE)
    fold_(slots, totals, None)
    assert torch.all(totals == 2.0**24 + 19)


def test_rows_of_is_a_view_where_it_can_be():
    x = randn(2, 3, 8)
    assert rows_of(x).data_ptr() == x.data_ptr()
    assert rows_of(x[..., :5]).data_ptr() == x.data_ptr()
    assert rows_of(x[0, 0]).shape == (1, 8)
    assert torch.equal(rows_of(x.transpose(0, 1)), x.transpose(0, 1).reshape(6, 8))
    assert rows_of(x[:0]).shape == (0, 8)


@triton.jit
def _round_kernel(source, target, n, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + place, mask=place < n, other=0.0)
    tl.store(target + place, round_to(value, target.dtype.element_ty, INTERPRETED), mask=place < n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_to(dtype):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=generator)
    low = torch.tensor([0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x17FFF, 0x18000, 0x18001, 0x1000, 0x3000])
    ties = (low + torch.tensor([0, 0x3F800000, 0x7F7F0000, -0x80000000])[:, None]).reshape(-1)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45, 65504, 65520])
    value = torch.cat([torch.cat([bits, ties]).int().view(torch.float32), special]).to(DEVICE)
    got = torch.empty(len(value), dtype=dtype, device=DEVICE)
    grid = (triton.cdiv(len(value), 256),)
    _round_kernel[grid](value, got, len(value), BLOCK=256, INTERPRETED=common.INTERPRET)
    want = value.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    real = ~want.isnan()
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(integer)[real], want.view(integer)[real])


def test_cases_describe_the_kernels():
    for case in (*compile_cases(), *common.compile_cases()):
        assert list(case.signature) == case.kernel.arg_names
        constants = {name for name, kind in case.signature.items() if kind == "constexpr"}
        assert constants == set(case.constants)


def test_what_is_launched_is_what_is_compiled(monkeypatch):
    """Every launch has an ahead-of-time case with its types, constants, options and alignment."""
    launches = Launches(
        {name: getattr(module, name) for name in ("moments_kernel", "moments_ragged")}
    )
    assert launches.alone["moments_ragged"] == set(module.RAGGED)
    compiled = launches.compiled(compile_cases())
    for name in launches.kernels:
        monkeypatch.setattr(module, name, launches.of(name))
    monkeypatch.setattr(module, "fold_", lambda *args: None)
    for dtype in DTYPES:
        for name, h in (
            ("moments_kernel", randn(9, 32, dtype=dtype)),
            ("moments_kernel", randn(9, 48, dtype=dtype)[:, :32]),
            ("moments_ragged", randn(9, 33, dtype=dtype)),
            ("moments_ragged", randn(9, 33, dtype=dtype)[:, :32]),
            ("moments_ragged", randn(9, 1, dtype=dtype)),
            ("moments_ragged", randn(9, 64, dtype=dtype)[:, ::2]),
            ("moments_ragged", randn(32, 9, dtype=dtype).t()),
            ("moments_ragged", randn(9 * 32 + 1, dtype=dtype)[1:].view(9, 32)),
        ):
            for only in (None, 1):
                accumulate_moments_(
                    h,
                    random_groups(10)[1:],
                    torch.zeros(2, 2, h.shape[1], dtype=torch.float64, device=DEVICE),
                    only,
                )
                (what,) = launches.taken()
                # Whole numbers of another type are read by the same code.
                assert what[0] == name
                types = what[2] | {"groups": "*i8" if name == "moments_kernel" else "*i64"}
                assert (*what[:2], types, *what[3:]) in compiled, (h.shape, h.stride(), what)
