"""accumulate_moments: Σ|h| and Σh² per token group, in fp64 totals."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ucan_fast import UcanError, ops
from ucan_fast.ops import moments as moments_module
from ucan_fast.ops.moments import moments_reference

pytestmark = pytest.mark.usefixtures("backend")


def exact(h: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """By boolean indexing in fp64."""
    rows = h.reshape(-1, h.shape[-1]).double()
    parts = [rows[groups == g] for g in (0, 1)]
    return torch.stack(
        [torch.stack([f(p).sum(0) for p in parts]) for f in (torch.abs, lambda p: p * p)]
    )


def random_groups(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (tokens,), generator=generator, dtype=torch.int8)


def totals(n: int) -> torch.Tensor:
    return torch.zeros(2, 2, n, dtype=torch.float64)


def assert_relative(got: torch.Tensor, want: torch.Tensor, rel: float) -> None:
    assert ((got - want).abs() <= rel * want.abs()).all(), (got, want)


def test_by_hand():
    h = torch.tensor([[1.0, -2.0], [-3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [-0.5, 0.25]])
    moments = totals(2)
    ops.accumulate_moments(h, torch.tensor([0, 1, 0, -1, 1]), moments)
    assert moments.tolist() == [[[6, 8], [3.5, 4.25]], [[26, 40], [9.25, 16.0625]]]
    # It adds, and leaves h alone.
    ops.accumulate_moments(h, torch.tensor([-1, -1, -1, 0, -1]), moments)
    assert moments.tolist() == [[[13, 16], [3.5, 4.25]], [[75, 104], [9.25, 16.0625]]]


@pytest.mark.parametrize("tokens", [0, 1, 7, 31, 32, 33, 129])
@pytest.mark.parametrize("n", [1, 5, 16])
def test_equals_indexing_at_every_size(tokens, n):
    h = torch.randn(tokens, n)
    groups = random_groups(tokens)
    moments = totals(n) + 2.5
    ops.accumulate_moments(h, groups, moments)
    assert_relative(moments - 2.5, exact(h, groups), 1e-6)


@pytest.mark.parametrize(
    ("dtype", "rel"),
    [
        (torch.float32, 1e-6),
        (torch.bfloat16, 1e-6),
        (torch.float16, 1e-6),
        (torch.float64, 1e-13),
    ],
)
def test_every_dtype_is_summed_in_full(dtype, rel):
    """Narrow activations are widened before they are squared."""
    h = (torch.randn(200, 8) * 300).to(dtype)
    groups = random_groups(200)
    moments = totals(8)
    ops.accumulate_moments(h, groups, moments)
    assert torch.isfinite(moments).all()
    assert_relative(moments, exact(h, groups), rel)


@pytest.mark.parametrize("groups_dtype", [torch.int8, torch.int32, torch.int64])
def test_group_dtypes_and_other_numbers(groups_dtype):
    h = torch.randn(6, 3)
    groups = torch.tensor([0, 1, 2, -1, 7, 1], dtype=groups_dtype)
    moments = totals(3)
    ops.accumulate_moments(h, groups, moments)
    assert_relative(moments, exact(h, groups), 1e-6)


@pytest.mark.parametrize("only_group", [0, 1])
def test_only_one_group_is_counted_where_that_is_asked_for(only_group):
    h, groups, moments = torch.randn(70, 5), random_groups(70), totals(5)
    ops.accumulate_moments(h, groups, moments, only_group=only_group)
    assert not moments[:, 1 - only_group].any()
    assert_relative(moments[:, only_group], exact(h, groups)[:, only_group], 1e-6)
    with pytest.raises(UcanError, match="only_group must be"):
        ops.accumulate_moments(h, groups, moments, only_group=-1)


def layouts():
    base = torch.randn(4, 6, 10)
    return {
        "3-D": base,
        "4-D": base.reshape(2, 2, 6, 10),
        "1-D": base[0, 0],
        "transposed tokens": base.transpose(0, 1),
        "transposed neurons": base.transpose(1, 2),
        "every second": base[:, ::2, ::2],
        "expanded": base[:1].expand(4, 6, 10),
    }


@pytest.mark.parametrize("layout", layouts())
def test_any_strides(layout):
    h = layouts()[layout]
    groups = random_groups(h.numel() // h.shape[-1])
    if layout == "1-D":
        groups[:] = 0
    moments = totals(h.shape[-1])
    ops.accumulate_moments(h, groups, moments)
    assert_relative(moments, exact(h.contiguous(), groups), 1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_ignored_rows_may_hold_anything(poison):
    h = torch.randn(70, 4)
    groups = random_groups(70)
    want = exact(h, groups)
    h[groups == -1] = poison
    moments = totals(4)
    ops.accumulate_moments(h, groups, moments)
    assert_relative(moments, want, 1e-6)


def test_nan_in_a_counted_row_is_not_hidden():
    h = torch.zeros(5, 2)
    h[3, 1] = float("nan")
    moments = totals(2)
    ops.accumulate_moments(h, torch.ones(5, dtype=torch.int8), moments)
    assert torch.isnan(moments[:, 1, 1]).all()
    assert (moments[:, 1, 0] == 0).all()


def test_thirty_million_tokens_of_a_constant_neither_stall_nor_drift(backend):
    """In fp32 totals Σ stops growing at 0.1 x 2^24 tokens; the truth is n x float32(0.1)."""
    if backend == "triton":
        pytest.skip("minutes in the interpreter; test_gpu.py runs it on a GPU")
    rows, runs = 1_000_000, 30
    h = torch.full((rows, 1), 0.1)
    groups = torch.zeros(rows, dtype=torch.int8)
    moments = totals(1)
    for _ in range(runs):
        ops.accumulate_moments(h, groups, moments)
    value = torch.tensor(0.1).double().item()
    assert moments[0, 0, 0].item() == pytest.approx(rows * runs * value, rel=1e-6)
    assert moments[1, 0, 0].item() == pytest.approx(rows * runs * value**2, rel=1e-6)
    assert (moments[:, 1] == 0).all()


def test_many_small_batches_do_not_drift_either():
    value = torch.tensor(0.1).double().item()
    h, groups, moments = torch.full((3, 1), 0.1), torch.ones(3, dtype=torch.int8), totals(1)
    moments += 3e7 * value  # as if 3e7 tokens had been seen
    start = moments.clone()
    for _ in range(50):
        ops.accumulate_moments(h, groups, moments)
    grown = (moments - start)[0, 1, 0].item()
    assert grown == pytest.approx(150 * value, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [64, 321, 1000])
def test_blocks_do_not_change_the_sums(tokens, dtype, monkeypatch):
    h, groups = torch.randn(tokens, 5).to(dtype), random_groups(tokens)
    want = moments_reference(h, groups)
    for rows in (32, 64, 300):
        monkeypatch.setattr(moments_module, "BLOCK_ELEMENTS", rows * 5)
        # A single last partial may take another matrix product: one fp32 rounding of it.
        rel = 1e-15 if dtype == torch.float64 else 1e-7
        assert_relative(moments_reference(h, groups), want, rel)


def test_only_a_block_is_widened(monkeypatch):
    """No tensor that is made on the way holds more than one block of rows."""

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest.append(out.numel())
            return out

    largest = []
    monkeypatch.setattr(moments_module, "BLOCK_ELEMENTS", 64 * 5)
    h, groups = torch.randn(2000, 5).bfloat16(), random_groups(2000)
    with Sizes():
        moments_reference(h, groups)
    assert max(largest) == 64 * 5


def test_same_input_same_bits():
    h, groups = torch.randn(500, 7), random_groups(500)
    one, two = totals(7), totals(7)
    ops.accumulate_moments(h, groups, one)
    ops.accumulate_moments(h, groups, two)
    assert torch.equal(one, two)


def test_autocast_does_not_narrow_the_sums():
    h, groups, moments = torch.randn(100, 6), random_groups(100), totals(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ops.accumulate_moments(h, groups, moments)
    assert_relative(moments, exact(h, groups), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    h = torch.randn(2, 9, 5).to(dtype)
    for only_group in (None, 1):
        args = (h, random_groups(18), only_group, totals(5))
        torch.library.opcheck(torch.ops.ucan_fast.accumulate_moments.default, args)


def refusals():
    h, groups, good = torch.randn(6, 3), random_groups(6), totals(3)
    return {
        "one group missing": (h, groups[:5], good, "6 tokens"),
        "groups 2-D": (h, groups.view(2, 3), good, "(2, 3)"),
        "groups float": (h, groups.float(), good, "float32"),
        "fp32 totals": (h, groups, good.float(), "float64"),
        "totals of another width": (h, groups, totals(4), "(2, 2, 4)"),
        "integer h": (h.int(), groups, good, "int32"),
        "another device": (h, groups, totals(3).to("meta"), "meta"),
    }


@pytest.mark.parametrize("kind", refusals())
def test_refuses_arguments_that_do_not_fit(kind):
    h, groups, moments, word = refusals()[kind]
    before = moments.clone()
    with pytest.raises(UcanError) as error:
        ops.accumulate_moments(h, groups, moments)
    assert word in str(error.value)
    if moments.device.type != "meta":
        assert torch.equal(moments, before)


def test_no_gradient_flows_into_the_totals(backend):
    h = torch.randn(5, 4).requires_grad_()
    sums = torch.zeros(2, 2, 4, dtype=torch.float64)
    ops.accumulate_moments(h * 2, torch.tensor([0, 1, 0, -1, 1]), sums)
    assert sums.any()
    assert not sums.requires_grad
    assert sums.is_leaf
