"""The native operator behind shrink: _shrink_native_ (CPU)."""

from __future__ import annotations

import importlib

import pytest
import torch
from guarded import guarded, guarded_empty, linux, survives
from native_helpers import (
    DTYPES,
    LAYOUTS,
    assert_passes_on,
    matrix,
    poisoned,
    random_groups,
    totals,
)

from ucan_fast import native, ops
from ucan_fast.ops.shrink import NATIVE_ROWS, shrink_reference

pytestmark = pytest.mark.skipif(
    native.status()["_C"] != "available", reason=f"_C: {native.status()['_C']}"
)

# Around the 8 rows of a tile and the 64 of a task.
TOKENS = [0, 1, 7, 8, 9, 64, 129, 300]
# Around a vector and the 256 columns of a sum.
COLUMNS = [0, 1, 17, 256, 300, 1100]
# Around a vector and the panels of one, two and three of them.
RANKS = [0, 1, 3, 16, 17, 40, 64, 65, 256]


def run(x, a) -> torch.Tensor:
    z = poisoned(x.shape[0], a.shape[0], a.dtype)
    torch.ops.ucan_fast._shrink_native_(x, a, z)
    return z


def assert_exact(z, x, a) -> None:
    """Below twice plain torch's error (in z's dtype, fp64 being the judge), and within rounding."""
    want = x.double() @ a.double().t()
    error = (z.double() - want).abs()
    size = x.double().abs() @ a.double().abs().t()
    unit = torch.finfo(z.dtype).eps
    # A sum of K products errs by sqrt(K) units where the signs of its roundings are random.
    assert (error <= unit * size * (1 + x.shape[1] ** 0.5)).all()
    # A few numbers may come out exact in torch: the errors are compared where there are many.
    if z.dtype == torch.float32 and z.numel() > 1000 and x.shape[1] > 200:
        torchs = (x.to(z.dtype) @ a.t()).double() - want
        assert error.norm() <= 2 * torchs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", RANKS)
def test_equals_the_definition(r, dtype):
    for k in COLUMNS:
        for tokens in TOKENS:
            x, a = matrix(tokens, k, dtype), matrix(r, k, dtype)
            kept = x.clone(), a.clone()
            z = run(x, a)
            assert torch.equal(x, kept[0])
            assert torch.equal(a, kept[1])
            assert_exact(z, x, a)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_strides(dtype, layout):
    for wide in {torch.promote_types(dtype, torch.float32), torch.float64}:
        for tokens, k, r in ((1, 1, 1), (7, 33, 5), (129, 700, 20)):
            x, a = matrix(tokens, k, dtype, layout), matrix(r, k, wide, layout)
            z = run(x, a)
            if layout == "expanded":  # one number, whose error torch may happen not to have
                assert (z == z[0, 0]).all()
                z, x, a = z[:1, :1], x[:1], a[:1]
            assert_exact(z, x, a)


def test_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    a = torch.tensor([[1.0, 0.0, -1.0], [2.0, 2.0, 2.0]])
    assert run(x, a).tolist() == [[-2.0, 12.0], [-0.5, -1.0]]


def test_a_register_sums_up_256_columns():
    """2^30 swallows any 32 in fp32. What stands in another stretch is not swallowed."""
    x = torch.ones(9, 512)
    x[:, 0] = 2.0**30
    z = run(x, torch.ones(3, 512))
    assert (z == 2.0**30 + 256).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_depends_on_its_own_rows_alone(dtype):
    """So layers computed together, and batches cut elsewhere, have the same bits."""
    x, a = matrix(200, 600, dtype), matrix(50, 600, dtype)
    z = run(x, a)
    assert torch.equal(run(x[37:], a), z[37:])
    assert torch.equal(run(x[3:4], a[20:21]), z[3:4, 20:21])
    assert torch.equal(run(x, a[16:]), z[:, 16:])


def at_the_border(side: str) -> None:
    for tokens, k, r in ((9, 300, 17), (1, 1, 1), (65, 257, 40)):
        x, a = (guarded(matrix(rows, k, torch.float32), side) for rows in (tokens, r))
        z = guarded_empty((tokens, r), torch.float32, side)
        torch.ops.ucan_fast._shrink_native_(x, a, z)
        assert_exact(z, x, a)


@linux
@pytest.mark.parametrize("side", ["start", "end"])
def test_nothing_beyond_the_operands_is_touched(side):
    """Panels and tiles that are not full: A, x and z end, or begin, at an inaccessible page."""
    survives(at_the_border, side)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(poison):
    x, a = torch.ones(67, 300), torch.ones(18, 300)
    x[66, 299] = poison  # the last row, of an unfinished tile, in the last stretch
    a[17, 0] = poison  # the last row of an unfinished panel
    z = run(x, a)
    finite = z.isfinite()
    assert finite[:66, :17].all()
    assert not finite[66].any()
    assert not finite[:, 17].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_with_any_number_of_threads(dtype):
    x, a, results = matrix(3000, 500, dtype), matrix(48, 500, dtype), []
    was = torch.get_num_threads()
    try:
        for threads in (1, 2, 4, 2):
            torch.set_num_threads(threads)
            results.append(run(x, a))
    finally:
        torch.set_num_threads(was)
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(12)}, "_shrink_native_: x must be 2-D"),
        ({"x": torch.ones(5, 3)}, "x has 5 rows and z 4"),
        ({"x": torch.ones(4, 2)}, r"a must be \[2, 2\] of z's dtype"),
        ({"x": torch.ones(4, 3, dtype=torch.int32)}, "x must be float32, float64"),
        ({"x": torch.ones(4, 3).double()}, "z must be float64 where x is"),
        ({"a": torch.ones(3, 3)}, r"a must be \[2, 3\]"),
        ({"a": torch.ones(6)}, r"a must be \[2, 3\]"),
        ({"a": torch.ones(2, 3).half()}, "of z's dtype"),
        ({"z": torch.ones(2, 4).t()}, "z must be a contiguous 2-D float32 or float64"),
        ({"z": torch.ones(8)}, "z must be a contiguous 2-D"),
        ({"z": torch.ones(4, 2).bfloat16()}, "z must be a contiguous 2-D float32"),
    ],
)
def test_refuses_and_changes_nothing(change, message):
    arguments = {"x": torch.ones(4, 3), "a": torch.ones(2, 3), "z": torch.ones(4, 2)} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ucan_fast._shrink_native_(**arguments)
    assert (arguments["z"] == 1).all()


def test_nothing_may_share_memory_with_z():
    memory = torch.ones(40)
    x, a, z = memory[:12].view(4, 3), memory[12:18].view(2, 3), memory[18:26].view(4, 2)
    op = torch.ops.ucan_fast._shrink_native_
    with pytest.raises(RuntimeError, match="x and z must not share memory"):
        op(x, a, memory[11:19].view(4, 2))
    with pytest.raises(RuntimeError, match="a and z must not share memory"):
        op(x, a, memory[17:25].view(4, 2))
    assert (memory == 1).all()
    op(x, a, z)
    assert (z == 3).all()
    assert (memory[:18] == 1).all()
    assert (memory[26:] == 1).all()


def test_opcheck_and_meta():
    op = torch.ops.ucan_fast._shrink_native_.default
    x, a, z = torch.randn(9, 5), torch.randn(3, 5), torch.randn(9, 3)
    torch.library.opcheck(op, (x, a, z))
    op(x.to("meta"), a.to("meta"), z.to("meta"))


@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_every_instruction_set(instructions):
    """What a lesser processor would run, chosen by torch's own switch."""
    selected = "definition or strides or register or own_rows or finite"
    assert_passes_on(instructions, selected, __file__)


# How ops.shrink uses it.


@pytest.fixture
def native_calls(monkeypatch) -> list[torch.dtype]:
    """The dtypes of x in every call that C++ computed."""
    calls = []
    module = importlib.import_module("ucan_fast.ops.shrink")
    real = module.run_native

    def noting(x, a, dtype):
        calls.append(x.dtype)
        return real(x, a, dtype)

    monkeypatch.setattr(module, "run_native", noting)
    return calls


@pytest.mark.parametrize("with_moments", [False, True])
@pytest.mark.parametrize("rows", [1, NATIVE_ROWS - 1, NATIVE_ROWS])
def test_native_by_name_takes_every_call_that_it_can(native_calls, rows, with_moments):
    """As backend.py says; the others are part of the definition and keep its bits."""

    def call(x, a, dtype):
        if not with_moments:
            return ops.shrink(x, a, dtype=dtype)
        more = {"input_moments": totals(24), "rank_moments": totals(5)}
        return ops.shrink(x, a, dtype=dtype, groups=random_groups(rows), **more)

    x, a = torch.randn(rows, 24), torch.randn(5, 24)
    for name, wanted in (("native", 1), ("auto", int(rows >= NATIVE_ROWS)), ("reference", 0)):
        native_calls.clear()
        with ops.use_backend(name):
            z = call(x, a, torch.float32)
        assert len(native_calls) == wanted, name
        torch.testing.assert_close(z, shrink_reference(x, a, torch.float32))
    native_calls.clear()
    with ops.use_backend("native"):
        for dtypes in (
            (torch.bfloat16, torch.bfloat16, torch.bfloat16),  # a narrow product is rounded
            (torch.float32, torch.float32, torch.float16),
            (torch.float64, torch.float32, torch.float32),  # x is narrowed
        ):
            one, other = x.to(dtypes[0]), a.to(dtypes[1])
            assert torch.equal(call(one, other, dtypes[2]), shrink_reference(one, other, dtypes[2]))
        assert not native_calls
        for dtype in (torch.bfloat16, torch.float16):  # x is widened, exactly
            z = call(x.to(dtype), a, torch.float32)
            torch.testing.assert_close(z, shrink_reference(x.to(dtype), a, torch.float32))
        z = call(x, a.bfloat16(), torch.float64)  # and so is A
        torch.testing.assert_close(z, shrink_reference(x, a.bfloat16(), torch.float64))
    assert native_calls == [torch.bfloat16, torch.float16, torch.float32]


def test_the_same_bits_with_and_without_moments():
    for rows in (1, NATIVE_ROWS - 1, NATIVE_ROWS, 300):
        x, a = torch.randn(rows, 70), torch.randn(16, 70)
        more = {"input_moments": totals(70), "rank_moments": totals(16)}
        counted = ops.shrink(x, a, groups=random_groups(rows), **more)
        assert torch.equal(counted, ops.shrink(x, a))


def test_gradients_both_ways_and_transforms_go_through_the_reference(native_calls):
    x, a = torch.randn(4, 50, 24), torch.randn(5, 24)

    def f(a):
        return ops.shrink(x, a)

    leaf = a.clone().requires_grad_()
    f(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, x.sum((0, 1)).expand(5, 24))
    tangent = torch.randn_like(a)
    wanted = x @ tangent.t()
    torch.testing.assert_close(torch.func.jvp(f, (a,), (tangent,))[1], wanted)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, tangent)
        got = torch.autograd.forward_ad.unpack_dual(f(dual)).tangent
        torch.testing.assert_close(got, wanted)
    many = torch.stack([a, a + 1])
    got = torch.func.vmap(f)(many)
    torch.testing.assert_close(got, torch.stack([x @ a.t(), x @ (a + 1).t()]))
    assert not native_calls


def test_shapes_and_layouts(native_calls):
    a = torch.randn(5, 24)
    for x in (
        torch.randn(2, 70, 24),
        torch.randn(24, 140).t(),
        torch.randn(140, 2, 48)[:, 0, ::2],
        torch.randn(3, 2, 50, 24).transpose(0, 2),
    ):
        z = ops.shrink(x, a)
        assert z.shape == (*x.shape[:-1], 5)
        assert z.is_contiguous()
        torch.testing.assert_close(z, shrink_reference(x, a, torch.float32))
    assert len(native_calls) == 4
    assert ops.shrink(torch.randn(0, 24), a).shape == (0, 5)
    assert ops.shrink(torch.randn(140, 0), a[:, :0]).tolist() == [[0.0] * 5] * 140
    assert ops.shrink(torch.randn(140, 24), a[:0]).shape == (140, 0)
    assert len(native_calls) == 4
