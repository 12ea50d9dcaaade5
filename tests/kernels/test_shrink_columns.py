"""shrink where x is read once for z and its moments: 16-bit x, many rows, ranks up to 32."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from kernel_launches import Launches
from shrink_checks import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    assert_moments,
    assert_z,
    name_of,
    randn,
    random_groups,
    zeros,
)

from ucan_fast.kernels import shrink as shrink_module
from ucan_fast.kernels import shrink_columns as module
from ucan_fast.kernels import tuning
from ucan_fast.kernels.shrink import shrink

pytestmark = pytest.mark.usefixtures("poison")

KINDS = [(BF16, BF16, BF16), (BF16, FP32, FP32), (BF16, FP32, BF16)]
KINDS += [(FP16, FP16, FP16), (FP16, FP32, FP16), (BF16, BF16, FP32)]


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel was launched. Few programs are enough for it here."""
    seen, launch = [], module.parts_and_slots
    monkeypatch.setattr(module, "parts_and_slots", lambda *args: seen.append(args) or launch(*args))
    monkeypatch.setattr(module, "FEWEST_PROGRAMS", 1)
    return seen


def check(x, a, dtype, only=None):
    groups = random_groups(x)
    of_x, of_z = zeros(x.shape[-1]) + 3, zeros(a.shape[0]) + 4
    z = shrink(x, a, dtype, groups, only, of_x, of_z)
    assert_z(z, x, a, dtype)
    assert_moments(of_x - 3, x, groups, only)
    assert_moments(of_z - 4, z, groups, only)
    if only is not None:
        assert torch.all(of_x[:, 1 - only] == 3)
        assert torch.all(of_z[:, 1 - only] == 4)
    return z


@pytest.mark.parametrize("dtypes", KINDS, ids=name_of)
@pytest.mark.parametrize("r", [1, 16, 24])
def test_dtypes_and_ranks(dtypes, r, calls):
    check(randn(70, 272, dtype=dtypes[0]), randn(r, 272, dtype=dtypes[1], seed=1), dtypes[2])
    assert len(calls) == 1


@pytest.mark.parametrize("programs", [1, 256])
@pytest.mark.parametrize("only", [None, 0, 1])
@pytest.mark.parametrize(("m", "k"), [(64, 16), (65, 256), (127, 528), (260, 272)])
def test_sizes_and_groups(programs, only, m, k, calls, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    check(randn(m, k, dtype=BF16), randn(5, k, seed=1), FP32, only)
    assert len(calls) == 1


def test_rows_apart_and_more_than_one_dimension(calls):
    wide = randn(2, 70, 320, dtype=BF16)
    assert check(wide[..., 32:304], randn(16, 272, seed=1), FP32).shape == (2, 70, 16)
    assert len(calls) == 1


def test_every_digit_of_an_fp32_a(calls):
    x = torch.ones(64, 256, dtype=BF16, device=DEVICE)
    a = torch.zeros(3, 256, device=DEVICE)
    a[:, 0] = torch.tensor([1 + 2**-23, -(1 + 2**-12 + 2**-23), 3.0000002])
    z = shrink(x, a, FP32, random_groups(x), None, zeros(256), zeros(3))
    assert torch.equal(z, a[:, 0].expand(64, 3))
    assert len(calls) == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_ignored_rows_do_not_spread(bad, calls):
    x, a = randn(135, 272, dtype=BF16), randn(5, 272, dtype=BF16, seed=1)
    groups = torch.tensor([0, 1, -1, 2, -100] * 27, dtype=torch.int8, device=DEVICE)
    counted = (groups == 0) | (groups == 1)
    x[~counted] = bad
    of_x, of_z = zeros(272), zeros(5)
    z = shrink(x, a, BF16, groups, None, of_x, of_z)
    assert not z[~counted].isfinite().any()
    assert_z(z[counted], x[counted], a, BF16)
    assert_moments(of_x, x[counted], groups[counted])
    assert_moments(of_z, z[counted], groups[counted])
    assert len(calls) == 1


def test_each_moment_can_be_had_alone(calls):
    x, a = randn(131, 272, dtype=BF16), randn(5, 272, seed=1)
    groups, of_x, of_z = random_groups(x), zeros(272), zeros(5)
    z = shrink(x, a, FP32, groups, input_moments=of_x)
    assert len(calls) == 1
    again = shrink(x, a, FP32, groups, rank_moments=of_z)
    assert len(calls) == 1  # nothing of x is asked for: the other kernel
    torch.testing.assert_close(z, again, rtol=1e-5, atol=1e-5)
    assert_moments(of_x, x, groups)
    assert_moments(of_z, again, groups)


def test_same_input_same_bits(calls):
    x, a = randn(140, 272, dtype=BF16), randn(5, 272, seed=1)
    groups, runs = random_groups(x), []
    for _ in range(2):
        of_x, of_z = zeros(272), zeros(5)
        runs.append((shrink(x, a, FP32, groups, None, of_x, of_z), of_x, of_z))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    assert len(calls) == 2


def test_what_it_leaves_to_the_other_kernel(calls):
    x, a = randn(66, 272, dtype=BF16), randn(5, 272, seed=1)
    far = torch.empty_strided((64, 16), (module.MAX_STRIDE + 16, 1), dtype=BF16, device="meta")
    for other_x, other_a, dtype, groups in (
        (x.float(), a, FP32, torch.int8),
        (x.half(), a, FP32, torch.int8),  # operands are fp32
        (x, a, FP32, torch.int64),
        (x[:63], a, FP32, torch.int8),
        (x[:, :250], a[:, :250], FP32, torch.int8),
        (x, randn(33, 272), FP32, torch.int8),
    ):
        groups = random_groups(other_x, groups)
        of_x, of_z = zeros(other_x.shape[1]), zeros(other_a.shape[0])
        z = shrink(other_x, other_a, dtype, groups, None, of_x, of_z)
        assert_z(z, other_x, other_a, dtype)
        assert_moments(of_x, other_x, groups)
    assert not calls
    assert module.row_of(far, groups.to("meta", torch.int8), 16, BF16, False) is None


def test_few_programs_are_left_to_the_other_kernel(monkeypatch):
    x, groups = randn(64 * 66, 512, dtype=BF16), torch.zeros(64 * 66, dtype=torch.int8)
    assert module.row_of(x, groups, 16, BF16, True) == tuning.config(
        "shrink_columns", (16, "three"), x.device
    )
    assert module.row_of(x[:-1], groups, 16, BF16, True) is None


def test_what_is_launched_is_what_is_compiled(calls, monkeypatch):
    name = "shrink_columns_kernel"
    launches = Launches({name: getattr(module, name)})
    compiled = launches.compiled(module.compile_cases())
    assert len(compiled) == len(module.compile_cases())
    monkeypatch.setattr(module, name, launches.of(name))
    monkeypatch.setattr(shrink_module, "finish_", lambda *args: None)
    for dtypes, r, only in itertools.product(KINDS, (1, 8, 16, 32), (None, 1)):
        x, a = randn(80, 272, dtype=dtypes[0]), randn(r, 272, dtype=dtypes[1])
        shrink(x, a, dtypes[2], random_groups(x), only, zeros(272), zeros(r))
        (what,) = launches.taken()
        assert what in compiled, (dtypes, r, only, what)


def test_cases_describe_the_kernel():
    cases = module.compile_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert list(case.signature) == case.kernel.arg_names
        constants = {name for name, kind in case.signature.items() if kind == "constexpr"}
        assert constants == set(case.constants)
        # A thread holds every LANES-th row, and a block has all of them.
        assert case.constants["BLOCK_M"] % case.constants["LANES"] == 0
