"""The native operator behind the moments: _moments_native_ (CPU)."""

from __future__ import annotations

import pytest
import torch
from native_helpers import DTYPES, LAYOUTS, assert_passes_on, exact, matrix, random_groups, totals

from ucan_fast import native
from ucan_fast.ops.moments import moments_reference

pytestmark = pytest.mark.skipif(
    native.status()["_C"] != "available", reason=f"_C: {native.status()['_C']}"
)

GROUP_DTYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
# Around the 8 rows of a batch, the 32 of a partial sum and the 256 of a task.
TOKENS = [0, 1, 3, 7, 8, 9, 31, 33, 129, 1025, 2100]
# Around a vector and the 1024 columns of a task.
COLUMNS = [0, 1, 5, 16, 33, 1100]


def run_moments(h, groups, moments, only_group=-1) -> None:
    torch.ops.ucan_fast._moments_native_(h, groups, only_group, moments)


def assert_as_exact_as_torch(got: torch.Tensor, h: torch.Tensor, groups: torch.Tensor) -> None:
    want = exact(h, groups)
    allowed = 2 * (moments_reference(h, groups) - want).abs().max() if want.numel() else 0
    relative = 1e-14 if h.dtype == torch.float64 else 3e-7
    assert ((got - want).abs() <= allowed + relative * want.abs()).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_equal_the_definition(dtype, layout):
    for n in COLUMNS:
        for tokens in TOKENS:
            h, groups = matrix(tokens, n, dtype, layout), random_groups(tokens)
            before = h.clone()
            moments = totals(n)
            run_moments(h, groups, moments)
            assert_as_exact_as_torch(moments, h, groups)
            assert torch.equal(h, before)


def test_by_hand_and_added_to_what_is_there():
    h = torch.tensor([[1.0, -2.0], [-3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [-0.5, 0.25]])
    moments = totals(2)
    run_moments(h, torch.tensor([0, 1, 0, -1, 1]), moments)
    assert moments.tolist() == [[[6, 8], [3.5, 4.25]], [[26, 40], [9.25, 16.0625]]]
    run_moments(h, torch.tensor([-1, -1, -1, 0, -1]), moments)
    assert moments.tolist() == [[[13, 16], [3.5, 4.25]], [[75, 104], [9.25, 16.0625]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_the_narrow_dtypes_is_widened_exactly(dtype):
    """Subnormals, infinities and NaN included; one token, so that nothing is rounded."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    for h in (every.unsqueeze(0), every.unsqueeze(1).t(), every.repeat(1, 2)[:, ::2]):
        moments = totals(h.shape[1])
        run_moments(h, torch.zeros(1, dtype=torch.int8), moments)
        torch.testing.assert_close(
            moments[0, 0], h[0].double().abs(), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", GROUP_DTYPES)
def test_group_dtypes_strides_and_other_numbers(dtype):
    h = torch.randn(300, 7)
    groups = random_groups(600, dtype)[::2]
    others = torch.iinfo(dtype)
    groups[::7] = others.max
    groups[3::7] = others.min if others.min else 2
    if others.bits > 8:  # must not be cut to 0 or 1
        groups[5::7], groups[6::7] = 256, 257
    if others.bits > 32:
        groups[2::7] = 1 << 32
    moments = totals(7)
    run_moments(h, groups, moments)
    assert_as_exact_as_torch(moments, h, groups)


@pytest.mark.parametrize("only", [0, 1])
def test_one_group_alone_leaves_the_other_half_as_it_was(only):
    h, groups = torch.randn(500, 40), random_groups(500)
    h[groups == 1 - only] = torch.nan  # not even read
    moments = totals(40)
    moments[:, 1 - only] = torch.nan
    run_moments(h, groups, moments, only)
    assert moments[:, 1 - only].isnan().all()
    torch.testing.assert_close(moments[:, only], exact(h, groups)[:, only], rtol=3e-7, atol=0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_ignored_rows_may_hold_anything(poison):
    h, groups = torch.randn(700, 20), random_groups(700)
    h[groups == -1] = poison
    moments = totals(20)
    run_moments(h, groups, moments)
    assert_as_exact_as_torch(moments, h, groups)


def test_nan_in_a_counted_row_is_not_hidden():
    h = torch.zeros(50, 3)
    h[30, 1] = torch.nan
    moments = totals(3)
    run_moments(h, torch.ones(50, dtype=torch.int8), moments)
    assert moments[:, 1, 1].isnan().all()
    assert moments[:, :, [0, 2]].count_nonzero() == moments[:, 0].count_nonzero() == 0


def test_an_fp32_sum_ends_after_32_rows_of_its_group():
    """2^30 swallows any 8 in fp32. What stands in another partial sum is not swallowed."""
    h = torch.ones(128, 1)
    h[:64:2] = 0.0
    h[0] = 2.0**30
    groups = torch.arange(128, dtype=torch.int8) % 2
    groups[64:] = 0  # group 0: rows 0, 2, .. 62 (one partial sum), then 64 ones
    moments = totals(1)
    run_moments(h, groups, moments)
    assert moments[0].flatten().tolist() == [2.0**30 + 64, 32.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_any_number_of_threads(dtype):
    h, groups = torch.randn(5000, 1100).to(dtype), random_groups(5000)
    results = []
    was = torch.get_num_threads()
    try:
        for threads in (1, 2, 4, 2):
            torch.set_num_threads(threads)
            moments = totals(1100, 0.1)
            run_moments(h, groups, moments)
            results.append(moments)
    finally:
        torch.set_num_threads(was)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.ones(4)}, "_moments_native_: h must be 2-D, not 1-D"),
        ({"h": torch.ones(4, 3, dtype=torch.int32)}, "h must be float32, float64, bfloat16 or"),
        ({"groups": torch.zeros(3, dtype=torch.int8)}, "one integer for each of the 4 rows"),
        ({"groups": torch.zeros(4, 1, dtype=torch.int8)}, "groups must be 1-D"),
        ({"groups": torch.zeros(4)}, "groups must be int8, uint8, int16, int32 or int64"),
        ({"only_group": 2}, r"only_group must be -1 \(both\), 0 or 1, not 2"),
        ({"only_group": -2}, "only_group must be"),
        ({"moments": torch.zeros(2, 2, 3)}, r"must be contiguous float64 \[2, 2, 3\]"),
        ({"moments": totals(4)}, r"must be contiguous float64 \[2, 2, 3\]"),
        ({"moments": totals(6)[..., ::2]}, "must be contiguous"),
        ({"moments": totals(3)[0]}, "must be contiguous float64"),
    ],
)
def test_moments_refuse_and_change_nothing(change, message):
    arguments = {
        "h": torch.ones(4, 3),
        "groups": torch.zeros(4, dtype=torch.int8),
        "moments": totals(3),
    }
    arguments |= change
    before = arguments["moments"].clone()
    with pytest.raises(RuntimeError, match=message):
        run_moments(**arguments)
    assert torch.equal(arguments["moments"], before)


def test_opcheck_and_meta():
    h, groups = torch.randn(9, 5), random_groups(9)
    ops = torch.ops.ucan_fast
    torch.library.opcheck(ops._moments_native_.default, (h, groups, -1, totals(5)))
    meta = torch.empty(9, 5, device="meta")
    run_moments(meta, groups.to("meta"), totals(5).to("meta"))


@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_every_instruction_set(instructions):
    """What a lesser processor would run, chosen by torch's own switch."""
    # Of the layouts one with neighbours side by side and one without: the code knows no others.
    selected = "(definition and (plain or other)) or every_value or 32_rows or ignored_rows"
    assert_passes_on(instructions, selected, __file__)
