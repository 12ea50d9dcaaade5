"""The native operator behind expand: _expand_native_ (CPU)."""

from __future__ import annotations

import importlib

import pytest
import torch
from native_helpers import (
    DTYPES,
    LAYOUTS,
    assert_passes_on,
    exact,
    matrix,
    poisoned,
    random_groups,
    totals,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ucan_fast import native, ops
from ucan_fast.ops.backend import is_unobserved
from ucan_fast.ops.expand import expand_reference
from ucan_fast.ops.moments import moments_reference

pytestmark = pytest.mark.skipif(
    native.status()["_C"] != "available", reason=f"_C: {native.status()['_C']}"
)

# Around the 8 rows of a batch, the 32 of a partial sum and the 256 of a task.
TOKENS = [0, 1, 7, 8, 129, 600]
# Around a vector, a panel of 32 and the 1024 columns of a task.
COLUMNS = [0, 1, 17, 64, 1100]
RANKS = [1, 3, 8, 16, 64, 256]


def run(base, z, b, scaling, y, *, bias=None, groups=None, only=-1, moments=None) -> None:
    torch.ops.ucan_fast._expand_native_(base, z, b, scaling, bias, groups, only, moments, y)


def assert_y_is_exact(y, base, z, b, scaling, bias) -> None:
    """Within the rounding of r products and their sums, of the base's sum and of the bias's."""
    size = z.double().abs() @ b.double().abs().t()
    delta = z.double() @ b.double().t()
    if bias is not None:
        size, delta = size + bias.double().abs(), delta + bias.double()
    error = (y.double() - (base.double() + scaling * delta)).abs()
    unit = torch.finfo(y.dtype).eps
    # A sum of r products errs by sqrt(r) units where the signs of its roundings are random.
    allowed = unit * (base.double().abs() + abs(scaling) * size * (1 + z.shape[1] ** 0.5))
    assert (error <= allowed).all()


def assert_as_exact_as_torch(got, z, b, scaling, groups) -> None:
    """Below twice plain torch's error (in fp32, fp64 being the judge), and within rounding."""
    want = exact(scaling * (z.double() @ b.double().t()), groups)
    error = got - want
    # One number may come out exact in torch: the errors are compared where there are many.
    if z.dtype == torch.float32 and z.shape[0] > 100 and b.shape[0] > 16:
        torchs = moments_reference(scaling * (z @ b.t()), groups) - want
        assert (error.flatten(1).norm(dim=1) <= 2 * torchs.flatten(1).norm(dim=1)).all()
    sizes = exact(scaling * (z.double().abs() @ b.double().abs().t()), groups)
    assert (error.abs() <= 4 * torch.finfo(z.dtype).eps * z.shape[1] ** 0.5 * sizes).all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", RANKS)
def test_equals_the_definition(r, dtype, with_bias, in_place):
    for n in COLUMNS:
        for tokens in TOKENS:
            base, z, b = (matrix(*s, dtype) for s in ((tokens, n), (tokens, r), (n, r)))
            bias = torch.randn(2 * n, dtype=dtype)[::2] if with_bias else None
            groups, moments = random_groups(tokens), totals(n)
            kept = [t.clone() for t in (base, z, b)]
            y = base.clone() if in_place else poisoned(tokens, n, dtype)
            run(
                None if in_place else base, z, b, 1.75, y, bias=bias, groups=groups, moments=moments
            )
            assert all(map(torch.equal, (base, z, b), kept))
            assert_y_is_exact(y, base, z, b, 1.75, bias)
            assert_as_exact_as_torch(moments, z, b, 1.75, groups)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_strides(dtype, layout):
    wide = torch.promote_types(dtype, torch.float32)
    for tokens, n in ((1, 1), (7, 33), (300, 1100)):
        base, groups = matrix(tokens, n, dtype, layout), random_groups(tokens)
        # Errors of equal rows would add up.
        other = "every other" if layout == "expanded" else layout
        z, b = matrix(tokens, 5, wide, other), matrix(n, 5, wide, other)
        y, moments = poisoned(tokens, n, wide), totals(n)
        run(base, z, b, -0.6, y, groups=groups, moments=moments)
        assert_y_is_exact(y, base, z, b, -0.6, None)
        assert_as_exact_as_torch(moments, z, b, -0.6, groups)


def test_fp64_onto_any_base():
    for dtype in DTYPES:
        base, z, b = matrix(40, 9, dtype), *(torch.randn(m, 3).double() for m in (40, 9))
        y = poisoned(40, 9, torch.float64)
        run(base, z, b, 0.1, y)
        assert_y_is_exact(y, base, z, b, 0.1, None)


def rounded_bits(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Torch's own rounding, which is to nearest even; NaN as one number."""
    return torch.where(exact.isnan(), -1, exact.to(dtype).view(torch.int16).int())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_y_is_rounded_once(dtype, in_place):
    """The bits of the fp32 sum after one rounding, where columns and rows end included."""
    for r in (1, 16, 64):
        for n in COLUMNS:
            for tokens in TOKENS:
                base = matrix(tokens, n, dtype)
                z, b, bias = torch.randn(tokens, r), torch.randn(n, r), torch.randn(n)
                groups, moments, again = random_groups(tokens), totals(n), totals(n)
                wide = poisoned(tokens, n, torch.float32)
                more = {"bias": bias, "groups": groups}
                run(base, z, b, 0.3, wide, moments=again, **more)
                y = base.clone() if in_place else poisoned(tokens, n, dtype)
                run(None if in_place else base, z, b, 0.3, y, moments=moments, **more)
                assert torch.equal(y.view(torch.int16), wide.to(dtype).view(torch.int16))
                assert torch.equal(moments, again)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_y_of_a_base_of_any_strides(dtype, layout):
    for tokens, n in ((1, 1), (7, 33), (300, 1100)):
        base, z, b = matrix(tokens, n, dtype, layout), torch.randn(tokens, 5), torch.randn(n, 5)
        y, wide = poisoned(tokens, n, dtype), poisoned(tokens, n, torch.float32)
        run(base, z, b, -0.6, y)
        run(base, z, b, -0.6, wide)
        assert torch.equal(y, wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_the_narrow_dtypes_comes_through(dtype):
    """Every base there is, subnormals, infinities and NaN included, and sums between and beyond."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)
    step = torch.finfo(dtype).eps
    for size in (0.0, step / 2, step / 2 * (1 + 2.0**-12), 0.7 * step, 3.0):
        z = every.float().abs().nan_to_num(0, 0, 0)[:, :1]
        y, wide = poisoned(256, 256, dtype), poisoned(256, 256, torch.float32)
        for out in (y, wide):
            run(every, z, torch.full((256, 1), size), 1.0, out)
        assert torch.equal(rounded_bits(y, dtype), rounded_bits(wide, dtype))
        if not size:
            assert (y.eq(every) | (y.isnan() & every.isnan())).all()


def test_by_hand_and_added_to_what_is_there():
    z = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [2.0, 2.0], [5.0, 5.0]])
    b = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    y, moments = torch.full((4, 2), 10.0), totals(2, 1.0)
    groups = torch.tensor([0, 1, 0, 7])
    run(None, z, b, 2.0, y, bias=torch.tensor([0.5, 0.0]), groups=groups, moments=moments)
    assert y.tolist() == [[13.0, 10.0], [5.0, 16.0], [7.0, 22.0], [1.0, 40.0]]
    assert (moments - 1).tolist() == [[[6, 12], [6, 6]], [[20, 144], [36, 36]]]


@pytest.mark.parametrize("only", [-1, 0, 1])
def test_y_has_the_same_bits_whatever_is_counted(only):
    base, z, b = torch.randn(333, 70), torch.randn(333, 16), torch.randn(70, 16)
    groups, bias = random_groups(333), torch.randn(70)
    plain, counted, moments = poisoned(333, 70, torch.float32), base.clone(), totals(70, 2.5)
    run(base, z, b, -0.6, plain, bias=bias)
    run(None, z, b, -0.6, counted, bias=bias, groups=groups, only=only, moments=moments)
    assert torch.equal(plain, counted)
    wanted = exact(-0.6 * (z.double() @ b.double().t()), groups)
    if only >= 0:
        wanted[:, 1 - only] = 0
    torch.testing.assert_close(moments - 2.5, wanted, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_ignored_rows_may_hold_anything(poison):
    z, b, groups = torch.randn(700, 4), torch.randn(20, 4), random_groups(700)
    z[groups == -1] = poison
    moments, y = totals(20), torch.randn(700, 20)
    run(None, z, b, 1.0, y, groups=groups, moments=moments)
    counted = groups != -1
    assert_as_exact_as_torch(moments, z[counted], b, 1.0, groups[counted])
    assert torch.equal(y.isfinite().all(1), groups != -1)


@pytest.mark.parametrize("only", [0, 1])
def test_one_group_alone_leaves_the_other_half_as_it_was(only):
    z, b, groups = torch.randn(500, 8), torch.randn(40, 8), random_groups(500)
    z[groups == 1 - only] = torch.nan
    moments = totals(40)
    moments[:, 1 - only] = torch.nan
    run(None, z, b, 1.0, torch.zeros(500, 40), groups=groups, only=only, moments=moments)
    assert moments[:, 1 - only].isnan().all()
    wanted = exact(z.double() @ b.double().t(), groups)[:, only]
    torch.testing.assert_close(moments[:, only], wanted, rtol=1e-6, atol=0)


def test_a_nan_stays_in_its_neuron_and_group():
    z, b = torch.ones(50, 2), torch.ones(35, 2)
    b[34, 1] = torch.inf  # the last column of an unfinished panel, in unfinished batches
    z[30, 1] = torch.nan
    groups = torch.zeros(50, dtype=torch.int8)
    groups[30:33] = 1
    moments = totals(35)
    run(None, z, b, 1.0, torch.zeros(50, 35), groups=groups, moments=moments)
    assert moments[:, 1].isnan().all()
    assert moments[0, 0].tolist() == [94.0] * 34 + [torch.inf]


def test_an_fp32_sum_ends_after_32_rows_of_its_group():
    """2^30 swallows any 8 in fp32. What stands in another partial sum is not swallowed."""
    z = torch.ones(128, 1)
    z[:64:2] = 0.0
    z[0] = 2.0**30
    groups = torch.arange(128, dtype=torch.int8) % 2
    groups[64:] = 0  # group 0: rows 0, 2, .. 62 (one partial sum), then 64 ones
    moments = totals(1)
    run(None, z, torch.ones(1, 1), 1.0, torch.zeros(128, 1), groups=groups, moments=moments)
    assert moments[0].flatten().tolist() == [2.0**30 + 64, 32.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_with_any_number_of_threads(dtype):
    base, z, b = (torch.randn(s, dtype=dtype) for s in ((5000, 1100), (5000, 16), (1100, 16)))
    groups, results = random_groups(5000), []
    was = torch.get_num_threads()
    try:
        for threads in (1, 2, 4, 2):
            torch.set_num_threads(threads)
            moments, y = totals(1100, 0.1), poisoned(5000, 1100, dtype)
            run(base, z, b, 0.3, y, groups=groups, moments=moments)
            results.append((y, moments))
    finally:
        torch.set_num_threads(was)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": torch.ones(12)}, "_expand_native_: base must be 2-D"),
        ({"base": torch.ones(4, 2)}, r"base is \[4, 2\] and y \[4, 3\]"),
        ({"base": torch.ones(5, 3)}, r"base is \[5, 3\] and y \[4, 3\]"),
        ({"base": torch.ones(4, 3, dtype=torch.int32)}, "base must be float32, float64"),
        ({"base": torch.ones(4, 3).double()}, "y must be float64 where base is"),
        ({"z": torch.ones(3, 2)}, "z must have 4 rows, as y has"),
        ({"z": torch.ones(8)}, "z must be a 2-D float32 or float64"),
        ({"z": torch.ones(4, 2).bfloat16()}, "z must be a 2-D float32 or float64"),
        ({"z": torch.ones(4, 2).double()}, "y must be contiguous, 2-D, and of z's dtype"),
        ({"b": torch.ones(2, 2)}, r"b must be \[3, 2\] of z's dtype"),
        ({"b": torch.ones(3, 1)}, r"b must be \[3, 2\]"),
        ({"b": torch.ones(6)}, r"b must be \[3, 2\]"),
        ({"b": torch.ones(3, 2).half()}, "of z's dtype"),
        ({"y": torch.ones(3, 4).t()}, "y must be contiguous, 2-D"),
        ({"y": torch.ones(12)}, "y must be contiguous, 2-D"),
        ({"y": torch.ones(4, 3).double()}, "y must be contiguous, 2-D, and of z's dtype"),
        ({"y": torch.ones(4, 3).int()}, "or bfloat16 or float16 where z is float32"),
        ({"y": torch.ones(4, 3).bfloat16()}, "a bfloat16 or float16 y must have base's dtype"),
        ({"bias": torch.ones(4)}, "bias must be 1-D with 3 values of z's dtype"),
        ({"bias": torch.ones(1, 3)}, "bias must be 1-D"),
        ({"bias": torch.ones(3).bfloat16()}, "values of z's dtype"),
        ({"groups": torch.zeros(3, dtype=torch.int8)}, "one integer for each of the 4 rows"),
        ({"groups": torch.zeros(4, dtype=torch.bool)}, "groups must be int8"),
        ({"groups": None}, "groups and moments go together"),
        ({"moments": None}, "groups and moments go together"),
        ({"only": 7}, "_expand_native_: only_group must be"),
        ({"moments": totals(2)}, r"must be contiguous float64 \[2, 2, 3\]"),
    ],
)
def test_refuses_and_changes_nothing(change, message):
    arguments = {
        "base": torch.ones(4, 3),
        "z": torch.ones(4, 2),
        "b": torch.ones(3, 2),
        "scaling": 2.0,
        "y": torch.ones(4, 3),
        "groups": torch.zeros(4, dtype=torch.int8),
        "moments": totals(3),
    }
    arguments |= change
    with pytest.raises(RuntimeError, match=message):
        run(**arguments)
    assert (arguments["y"] == 1).all()
    assert arguments["moments"] is None or not arguments["moments"].any()


def test_nothing_may_share_memory_with_y():
    memory, z, b = torch.ones(8, 3), torch.ones(4, 2), torch.ones(3, 2)
    for base in (memory[1:5], memory[:4], memory[3:4].expand(4, 3)):
        with pytest.raises(RuntimeError, match="base and y must not share memory"):
            run(base, z, b, 2.0, memory[:4])
    with pytest.raises(RuntimeError, match="z and y must not share memory"):
        run(None, memory[:4, 1:], b, 2.0, memory[:4])
    assert (memory == 1).all()
    run(memory[4:], z, b, 2.0, memory[:4])
    assert (memory[:4] == 5).all()
    assert (memory[4:] == 1).all()


def test_opcheck_and_meta():
    z, b, y, groups = torch.randn(9, 3), torch.randn(5, 3), torch.randn(9, 5), random_groups(9)
    op = torch.ops.ucan_fast._expand_native_.default
    torch.library.opcheck(op, (None, z, b, 0.5, None, None, -1, None, y))
    torch.library.opcheck(
        op, (torch.randn(9, 5), z, b, 0.5, torch.randn(5), groups, 1, totals(5), y)
    )
    run(None, *(t.to("meta") for t in (z, b)), 0.5, y.to("meta"))


@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_every_instruction_set(instructions):
    """What a lesser processor would run, chosen by torch's own switch."""
    selected = "definition or strides or whatever or nan_stays or 32_rows or ignored_rows or narrow"
    assert_passes_on(instructions, selected, __file__)


# How ops.expand uses it.


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Base output, z and B, with enough rows for the C++ code."""
    return torch.randn(4, 16, 24), torch.randn(4, 16, 3), torch.randn(24, 3)


@pytest.mark.parametrize("with_moments", [False, True])
def test_base_out_is_overwritten_only_where_allowed(layer, with_moments):
    base, z, b = layer
    kept, wanted = base.clone(), expand_reference(base, z, b, 0.5, None)
    more = {"groups": random_groups(64), "delta_moments": totals(24)} if with_moments else {}
    y = ops.expand(base, z, b, 0.5, **more)
    assert torch.equal(base, kept)
    torch.testing.assert_close(y, wanted)
    again = ops.expand(base, z, b, 0.5, overwrite=True, **more)
    assert again.data_ptr() == base.data_ptr()
    assert torch.equal(again, y)


@pytest.mark.parametrize("with_moments", [False, True])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_a_narrow_base_is_overwritten_too(layer, adapter, with_moments):
    base, z, b = layer[0].bfloat16(), layer[1].to(adapter), layer[2].to(adapter)
    kept, wanted = base.clone(), base.double() + 0.5 * (z.double() @ b.double().t())
    groups, sums = random_groups(64), totals(24)
    more = {"groups": groups, "delta_moments": sums} if with_moments else {}
    y = ops.expand(base, z, b, 0.5, **more)
    assert torch.equal(base, kept)
    assert y.dtype == torch.bfloat16
    # One rounding, of sums that are exact to fp32.
    assert ((y - wanted).abs() <= (2.0**-8 + 1e-6) * wanted.abs() + 1e-6).all()
    again = ops.expand(base, z, b, 0.5, overwrite=True, **more)
    assert again.data_ptr() == base.data_ptr()
    assert torch.equal(again, y)
    if with_moments:
        delta = (0.5 * z.double() @ b.double().t()).reshape(64, 24)
        torch.testing.assert_close(sums / 2, exact(delta, groups), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lazily_negated_base_is_made_plain(layer, dtype):
    base, z, b = (t.to(dtype) for t in layer)
    negated = torch._neg_view(base.clone())
    y = ops.expand(negated, z, b, 0.5, overwrite=True)
    assert torch.equal(y, ops.expand(-base, z, b, 0.5))
    assert not y.is_neg()


def test_under_autocast_y_takes_b_rounded_and_moments_in_full():
    base, z, b = torch.randn(64, 24).bfloat16(), torch.randn(64, 16).bfloat16(), torch.randn(24, 16)
    groups, sums = random_groups(64), totals(24)
    with ops.use_backend("native"):
        y = ops.expand(base, z, b, 0.5, groups=groups, delta_moments=sums)
        assert torch.equal(y, ops.expand(base, z, b, 0.5))
    assert torch.equal(y, ops.expand(base, z, b.bfloat16(), 0.5))
    delta = 0.5 * z.double() @ b.double().t()
    torch.testing.assert_close(sums, exact(delta, groups), rtol=1e-6, atol=1e-9)


def test_a_base_of_other_strides_or_dtype_is_never_overwritten(layer):
    base, z, b = layer
    for other in (base.transpose(0, 1), base.double(), base.mT.contiguous().mT):
        kept, zs = other.clone(), z.reshape(*other.shape[:2], 3)
        y = ops.expand(other, zs, b, 0.5, overwrite=True)
        assert y.dtype == other.dtype
        assert y.is_contiguous()
        assert torch.equal(other, kept)
        torch.testing.assert_close(y, expand_reference(other, zs, b, 0.5, None))


def test_few_rows_have_the_same_bits_with_and_without_moments():
    for rows in (1, 5, 31, 32, 100):
        base, z, b = torch.randn(rows, 24), torch.randn(rows, 16), torch.randn(24, 16)
        counted = ops.expand(base, z, b, 1.5, groups=random_groups(rows), delta_moments=totals(24))
        assert torch.equal(counted, ops.expand(base, z, b, 1.5))


@pytest.mark.parametrize("with_moments", [False, True])
@pytest.mark.parametrize("rows", [1, 31, 32])
def test_native_by_name_takes_every_call_that_it_can(monkeypatch, rows, with_moments):
    """As backend.py says; the others are part of the definition and keep its bits."""
    native_calls = []
    module = importlib.import_module("ucan_fast.ops.expand")
    real = module._expand_native

    def noting(*args):
        native_calls.append(args[1].dtype)
        return real(*args)

    monkeypatch.setattr(module, "_expand_native", noting)

    def call(base, z, b):
        if not with_moments:
            return ops.expand(base, z, b, 1.5)
        sums = (random_groups(rows), totals(24))
        return ops.expand(base, z, b, 1.5, groups=sums[0], delta_moments=sums[1])

    base, z, b = torch.randn(rows, 24), torch.randn(rows, 16), torch.randn(24, 16)
    for name, wanted in (("native", 1), ("auto", int(rows >= 32)), ("reference", 0)):
        native_calls.clear()
        with ops.use_backend(name):
            y = call(base, z, b)
        assert len(native_calls) == wanted, name
        torch.testing.assert_close(y, expand_reference(base, z, b, 1.5, None))
    native_calls.clear()
    with ops.use_backend("native"):
        narrow = [t.bfloat16() for t in (base, z, b)]
        exact_y = expand_reference(*(t.double() for t in narrow), 1.5, None)
        torch.testing.assert_close(call(*narrow), exact_y.bfloat16())
        assert native_calls == [torch.bfloat16]
        native_calls.clear()
        beside = (base, z, b.double())
        assert torch.equal(call(*beside), expand_reference(*beside, 1.5, None))
        if not with_moments:
            leaf = b.clone().requires_grad_()
            y = call(base, z, leaf)
            assert torch.equal(y, expand_reference(base, z, b, 1.5, None))
            y.sum().backward()
            assert leaf.grad.any()
    assert not native_calls


def test_gradients_both_ways_and_transforms_go_through_the_reference(layer):
    base, z, b = layer
    assert is_unobserved(base, z, b)
    assert not is_unobserved(base, z, b.clone().requires_grad_())
    with torch.no_grad():
        assert is_unobserved(b.clone().requires_grad_())

    def f(z):
        return ops.expand(base, z, b, 0.5)

    tangent = torch.randn_like(z)
    wanted = 0.5 * tangent @ b.t()
    torch.testing.assert_close(torch.func.jvp(f, (z,), (tangent,))[1], wanted)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, tangent)
        got = torch.autograd.forward_ad.unpack_dual(f(dual)).tangent
        torch.testing.assert_close(got, wanted)
    many = torch.stack([base, base + 1])
    got = torch.func.vmap(lambda base: ops.expand(base, z, b, 0.5))(many)
    torch.testing.assert_close(got, torch.stack([f(z), f(z) + 1]))


def test_modes_see_the_call(layer):
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen():
        assert not is_unobserved(layer[0])
        ops.expand(*layer, 0.5)
    assert any("mm" in name for name in seen)
    assert not any("native" in name for name in seen)
    with torch.device("cpu"):
        assert not is_unobserved(layer[0])
    assert is_unobserved(layer[0])
