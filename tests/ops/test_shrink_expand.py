"""shrink and expand: z = x Aᵀ, y = base + s z Bᵀ, their moments and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from ucan_fast import UcanError, ops

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RANKS = [1, 3, 8, 16, 64]
SHAPES = [(5, 12), (2, 3, 12), (2, 3, 4, 12), (0, 12), (2, 0, 12), (1, 12), (129, 12), (12,)]
S = 1.75


def make(shape=(2, 7, 12), r=3, n=10, dtype=torch.float32, seed=0):
    """x, A, B, base output, LoRA bias."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator).to(dtype)

    return randn(*shape), randn(r, shape[-1]), randn(n, r), randn(*shape[:-1], n), randn(n)


def groups_of(x: torch.Tensor) -> torch.Tensor:
    tokens = x.numel() // x.shape[-1] if x.dim() > 1 else 1
    generator = torch.Generator().manual_seed(5)
    return torch.randint(-1, 2, (tokens,), generator=generator, dtype=torch.int8)


def totals(n: int) -> torch.Tensor:
    return torch.zeros(2, 2, n, dtype=torch.float64)


def exact_moments(h: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    rows = h.reshape(-1, h.shape[-1]).double()
    parts = [rows[groups == g] for g in (0, 1)]
    return torch.stack(
        [torch.stack([f(p).sum(0) for p in parts]) for f in (torch.abs, lambda p: p * p)]
    )


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return (got.double() - want.double()).abs().max().item() if want.numel() else 0.0


def assert_no_worse(got: torch.Tensor, torchs: torch.Tensor, want: torch.Tensor) -> None:
    """The tolerance rule: less than twice plain torch's error, plus 1e-6 relative."""
    assert got.dtype == torchs.dtype
    scale = want.abs().max().item() if want.numel() else 0.0
    assert error(got, want) <= 2 * error(torchs, want) + 1e-6 * scale


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", RANKS)
def test_values(dtype, r):
    x, a, b, base, bias = make(r=r, dtype=dtype)
    z = ops.shrink(x, a)
    assert_no_worse(z, F.linear(x, a), F.linear(x.double(), a.double()))
    for with_bias in (None, bias):
        y = ops.expand(base, z, b, S, bias=with_bias)
        plain = base + F.linear(z, b, with_bias) * S
        wide = None if with_bias is None else with_bias.double()
        assert_no_worse(y, plain, base.double() + F.linear(z.double(), b.double(), wide) * S)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("moments", [False, True])
def test_shapes(shape, moments):
    x, a, b, base, _ = make(shape)
    groups = groups_of(x) if moments else None
    sums = [totals(12), totals(3), totals(10)] if moments else [None] * 3
    z = ops.shrink(x, a, groups=groups, input_moments=sums[0], rank_moments=sums[1])
    assert z.shape == (*shape[:-1], 3)
    assert error(z, x @ a.t()) < 1e-5
    y = ops.expand(base, z, b, S, groups=groups, delta_moments=sums[2])
    assert y.shape == (*shape[:-1], 10)
    assert error(y, base + S * (z @ b.t())) < 1e-5
    if moments:
        for total, h in zip(sums, (x, z, S * (z.double() @ b.double().t())), strict=True):
            torch.testing.assert_close(total, exact_moments(h, groups), rtol=1e-6, atol=1e-6)


def test_by_hand():
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    a = torch.tensor([[3.0, 1.0]])
    b = torch.tensor([[2.0], [-1.0]])
    z = ops.shrink(x, a)
    assert z.tolist() == [[5], [-1]]
    base = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert ops.expand(base, z, b, 0.5).tolist() == [[6, -1.5], [-1, 0.5]]
    bias = torch.tensor([4.0, 0.0])
    # PEFT's own bias sits in lora_B, before the scaling.
    assert ops.expand(base, z, b, 0.5, bias=bias).tolist() == [[8, -1.5], [1, 0.5]]


def strided(x: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens, width = x.shape
    return {
        "transposed": x.t().contiguous().t(),
        "every second": x.repeat_interleave(2, 0)[::2],
        "padded rows": F.pad(x, (3, 2))[:, 3 : 3 + width],
        "3-D permuted": x.view(2, tokens // 2, width).transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize("kind", ["transposed", "every second", "padded rows", "3-D permuted"])
def test_strided_inputs(kind):
    x, a, b, base, _ = make((6, 12))
    want_z = x @ a.t()
    odd_x = strided(x)[kind]
    assert not odd_x.is_contiguous()
    groups, sums = groups_of(x), totals(12)
    z = ops.shrink(odd_x, a.t().contiguous().t(), groups=groups, input_moments=sums)
    assert error(z.reshape(6, -1), want_z) < 1e-5
    torch.testing.assert_close(sums, exact_moments(x, groups), rtol=1e-6, atol=0)
    want = base + S * (want_z @ b.t())
    y = ops.expand(strided(base)[kind], z, b.t().contiguous().t(), S)
    assert error(y.reshape(6, -1), want) < 1e-5


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_mixed_dtypes(wide):
    """A wide adapter on a bf16 base: the product in the adapter's dtype, rounded once."""
    x, a, b, base, _ = make(dtype=wide)
    x, base = x.bfloat16(), base.bfloat16()
    z = ops.shrink(x, a)
    assert z.dtype == wide
    assert error(z, x.double() @ a.double().t()) < 1e-5
    y = ops.expand(base, z, b, S)
    want = base.double() + S * (z.double() @ b.double().t())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want.bfloat16(), rtol=2**-8, atol=1e-6)
    assert (y != want.bfloat16()).float().mean() < 0.02


def test_dtype_argument_is_the_dtype_of_the_product():
    """Under autocast x and A are fp32 and the product is bf16, whatever autocast says here."""
    x, a, *_ = make()
    z = ops.shrink(x, a, dtype=torch.bfloat16)
    assert z.dtype == torch.bfloat16
    assert torch.equal(z, F.linear(x.bfloat16(), a.bfloat16()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.shrink(x, a, dtype=torch.bfloat16), z)
        assert error(ops.shrink(x, a), x.double() @ a.double().t()) < 1e-5


def test_moments_describe_the_stored_values():
    """z's moments are those of the rounded z; δ is taken in fp32 from it."""
    x, a, b, base, bias = make((40, 12), dtype=torch.bfloat16)
    groups = groups_of(x)
    sums_x, sums_z, sums_d = totals(12), totals(3), totals(10)
    z = ops.shrink(x, a, groups=groups, input_moments=sums_x, rank_moments=sums_z)
    y = ops.expand(base, z, b, S, bias=bias, groups=groups, delta_moments=sums_d)
    assert z.dtype == y.dtype == torch.bfloat16
    delta = S * (z.double() @ b.double().t())
    for got, h in ((sums_x, x), (sums_z, z), (sums_d, delta)):
        torch.testing.assert_close(got, exact_moments(h, groups), rtol=1e-6, atol=0)
    # The values are the same with and without moments.
    assert torch.equal(z, ops.shrink(x, a))
    assert torch.equal(y, ops.expand(base, z, b, S, bias=bias))


@pytest.mark.parametrize("only_group", [0, 1])
def test_only_one_group_is_counted_where_that_is_asked_for(only_group):
    """Also where the other one is there."""
    x, a, b, base, _ = make((40, 12))
    groups = groups_of(x)
    sums = [totals(12), totals(3), totals(10)]
    options = {"groups": groups, "only_group": only_group}
    z = ops.shrink(x, a, input_moments=sums[0], rank_moments=sums[1], **options)
    y = ops.expand(base, z, b, S, delta_moments=sums[2], **options)
    assert error(y, base + S * (z @ b.t())) < 1e-5
    counted = torch.where(groups == only_group, groups, -1)
    delta = S * (z.double() @ b.double().t())
    for got, h in zip(sums, (x, z, delta), strict=True):
        assert not got[:, 1 - only_group].any()
        torch.testing.assert_close(got, exact_moments(h, counted), rtol=1e-5, atol=1e-6)
    with pytest.raises(UcanError, match="only_group must be"):
        ops.expand(base, z, b, S, groups=groups, only_group=2, delta_moments=sums[2])


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_a_bias_is_in_y_and_not_in_the_moments(base_dtype):
    """With an fp32 adapter, where C++ makes y and the moments in one pass."""
    x, a, b, base, bias = make((40, 12))
    base, groups, sums = base.to(base_dtype), groups_of(x), totals(10)
    z = ops.shrink(x, a)
    y = ops.expand(base, z, b, S, bias=bias, groups=groups, delta_moments=sums)
    delta = S * (z.double() @ b.double().t())
    exact = base.double() + delta + S * bias.double()
    assert_no_worse(y, (base + S * F.linear(z, b, bias)).to(base_dtype), exact)
    torch.testing.assert_close(sums, exact_moments(delta, groups), rtol=1e-5, atol=1e-6)


def test_moments_add_to_what_is_there_and_one_of_them_is_enough():
    x, a, b, base, _ = make((9, 12))
    groups = groups_of(x)
    for key, h in (("input_moments", x), ("rank_moments", x @ a.t())):
        sums = torch.ones(2, 2, h.shape[-1], dtype=torch.float64)
        ops.shrink(x, a, groups=groups, **{key: sums})
        torch.testing.assert_close(sums - 1, exact_moments(h, groups), rtol=1e-5, atol=1e-9)
    z = x @ a.t()
    sums = torch.ones(2, 2, 10, dtype=torch.float64)
    ops.expand(base, z, b, S, groups=groups, delta_moments=sums)
    delta = S * z @ b.t()
    torch.testing.assert_close(sums - 1, exact_moments(delta, groups), rtol=1e-5, atol=1e-9)


def test_poison_in_ignored_rows_stays_there():
    x, a, b, base, _ = make((9, 12))
    groups = torch.tensor([0, 1, -1, 0, 1, -1, 0, 1, 1], dtype=torch.int8)
    clean = [totals(12), totals(3), totals(10)]
    dirty = [totals(12), totals(3), totals(10)]
    for sums, value in ((clean, 0.0), (dirty, float("nan"))):
        x[groups == -1] = value
        z = ops.shrink(x, a, groups=groups, input_moments=sums[0], rank_moments=sums[1])
        ops.expand(base, z, b, S, groups=groups, delta_moments=sums[2])
    for one, two in zip(clean, dirty, strict=True):
        assert torch.equal(one, two)


def test_inputs_are_not_written_to():
    x, a, b, base, bias = make((9, 12))
    copies = [t.clone() for t in (x, a, b, base, bias)]
    groups = groups_of(x)
    z = ops.shrink(x, a, groups=groups, input_moments=totals(12))
    y = ops.expand(base, z, b, S, bias=bias, groups=groups, delta_moments=totals(10))
    for now, before in zip((x, a, b, base, bias), copies, strict=True):
        assert torch.equal(now, before)
    assert y.data_ptr() != base.data_ptr()


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (0, 6)])
def test_gradcheck(shape, bias):
    x, a, b, base, lora_bias = make(shape, r=2, n=4, dtype=torch.float64)
    leaves = [x, a, b, base] + ([lora_bias] if bias else [])
    for leaf in leaves:
        leaf.requires_grad_()

    def layer(x, a, b, base, lora_bias=None):
        return ops.expand(base, ops.shrink(x, a), b, S, bias=lora_bias)

    if shape[0]:
        assert torch.autograd.gradcheck(layer, leaves)
    else:
        layer(*leaves).sum().backward()
        assert all(leaf.grad is not None for leaf in leaves)
        assert not a.grad.any()


@pytest.mark.parametrize("needed", ["x", "a", "b", "base"])
def test_only_what_is_asked_for_gets_a_gradient(needed):
    tensors = dict(zip(("x", "a", "b", "base"), make((4, 6), r=2, n=5)[:4], strict=True))
    tensors[needed].requires_grad_()
    ops.expand(
        tensors["base"], ops.shrink(tensors["x"], tensors["a"]), tensors["b"], S
    ).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [needed]
    assert tensors[needed].grad.shape == tensors[needed].shape


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_gradients_of_a_bf16_base(adapter):
    """Each gradient in its own tensor's dtype, no worse than autograd's through plain torch."""
    x, a, b, base, bias = make((30, 12), dtype=torch.bfloat16)
    a, b, bias = a.to(adapter), b.to(adapter), bias.to(adapter)
    weight = torch.randn(30, 10, generator=torch.Generator().manual_seed(9))

    def fused(x, a, b, base, bias):
        return ops.expand(base, ops.shrink(x, a), b, S, bias=bias)

    def plain(x, a, b, base, bias):
        delta = F.linear(F.linear(x.to(a.dtype), a), b, bias) * S
        return (base + delta).to(base.dtype)

    def gradients(function, *tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        (function(*leaves) * weight.to(leaves[0].dtype)).sum().backward()
        return [leaf.grad for leaf in leaves]

    tensors = (x, a, b, base, bias)
    got, peft = gradients(fused, *tensors), gradients(plain, *tensors)
    want = gradients(plain, *(t.double() for t in tensors))
    for mine, theirs, true in zip(got, peft, want, strict=True):
        assert_no_worse(mine, theirs, true)


# ------------------------------------------------------------------ other autograd modes


def layer(x, a, b, base, bias):
    return ops.expand(base, ops.shrink(x, a), b, S, bias=bias)


def layer_in_torch(x, a, b, base, bias):
    return base + S * F.linear(F.linear(x, a), b, bias)


def tangents(function, tensors, which, tangent):
    with forward_ad.dual_level():
        tensors = list(tensors)
        tensors[which] = forward_ad.make_dual(tensors[which], tangent)
        return forward_ad.unpack_dual(function(*tensors))


@pytest.mark.parametrize("which", range(5), ids=["x", "A", "B", "base_out", "bias"])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode(which, grad):
    """Also where a gradient is recorded at the same time, or is not."""
    tensors = make()
    tangent = torch.randn_like(tensors[which])
    want = tangents(layer_in_torch, tensors, which, tangent)
    for tensor in tensors:
        tensor.requires_grad_(grad)
    got = tangents(layer, tensors, which, tangent)
    torch.testing.assert_close(got.primal, want.primal)
    torch.testing.assert_close(got.tangent, want.tangent)
    assert got.primal.requires_grad == grad
    with torch.no_grad():
        torch.testing.assert_close(tangents(layer, tensors, which, tangent).tangent, want.tangent)


def test_torch_func():
    """Per-sample gradients, tangents, and a batch dimension that the operators do not know of."""
    x, a, b, base, bias = make()

    def loss(a, b, x, base):
        return layer(x, a, b, base, bias).pow(2).sum()

    def loss_in_torch(a, b, x, base):
        return layer_in_torch(x, a, b, base, bias).pow(2).sum()

    for transform, arguments in (
        (lambda f: torch.func.grad(f, (0, 1)), (a, b, x, base)),
        (lambda f: torch.func.vmap(f, (None, None, 0, 0)), (a, b, x, base)),
        (lambda f: torch.func.vmap(torch.func.grad(f), (None, None, 0, 0)), (a, b, x, base)),
        (lambda f: torch.func.jacrev(torch.func.jacfwd(f)), (a, b, x, base)),
        (lambda f: lambda *t: torch.func.jvp(f, t, t), (a, b, x, base)),
    ):
        got, want = transform(loss)(*arguments), transform(loss_in_torch)(*arguments)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        one = torch.func.vmap(lambda x, base: layer(x, a, b, base, bias))(x, base)
    torch.testing.assert_close(one, layer_in_torch(x, a, b, base, bias))


@pytest.mark.parametrize("which", range(5), ids=["x", "A", "B", "base_out", "bias"])
@pytest.mark.parametrize("grad", [False, True])
def test_lazily_negated_tensors(which, grad):
    tensors = list(make((3, 12)))
    leaf = tensors[which].requires_grad_(grad)
    tensors[which] = torch._neg_view(leaf)
    assert tensors[which].is_neg()
    x, a, b, base, bias = tensors
    y = layer(*tensors)
    torch.testing.assert_close(y, layer_in_torch(*(t.resolve_neg() for t in tensors)))
    if grad:
        y.sum().backward()
        want = leaf.detach().clone().requires_grad_()
        tensors[which] = -want
        layer_in_torch(*tensors).sum().backward()
        torch.testing.assert_close(leaf.grad, want.grad)
    with torch.no_grad():
        of_x, of_z, of_delta, groups = totals(12), totals(3), totals(10), groups_of(x)
        z = ops.shrink(x, a, groups=groups, input_moments=of_x, rank_moments=of_z)
        sums = {"groups": groups, "delta_moments": of_delta}
        torch.testing.assert_close(ops.expand(base, z, b, S, bias=bias, **sums), y)
    torch.testing.assert_close(of_x, exact_moments(x.detach(), groups))
    torch.testing.assert_close(of_z, exact_moments(z, groups))
    delta = S * z.double() @ b.detach().double().t()
    torch.testing.assert_close(of_delta, exact_moments(delta, groups), rtol=1e-5, atol=1e-5)


def test_moments_are_refused_under_forward_mode_and_torch_func():
    x, a, b, base, _ = make((40, 12))
    z, groups, of_x, of_delta = x @ a.t(), groups_of(x), totals(12), totals(10)

    def shrink(x):
        return ops.shrink(x, a, groups=groups, input_moments=of_x)

    def expand(z):
        return ops.expand(base, z, b, S, groups=groups, delta_moments=of_delta)

    for name, call, tensor in (("shrink", shrink, x), ("expand", expand, z)):
        for way in (
            lambda call, t: tangents(call, [t], 0, t),
            lambda call, t: torch.func.jvp(call, (t,), (t,)),
            lambda call, t: torch.func.vmap(call)(t[None]),
            lambda call, t: torch.func.grad(lambda t: call(t).sum())(t),
        ):
            with pytest.raises(UcanError, match=f"{name}: .*torch.func transforms or forward-mode"):
                way(call, tensor)
        assert not of_x.any()
        assert not of_delta.any()
    # A level without tangents changes nothing.
    with forward_ad.dual_level():
        shrink(x)
        expand(z)
    assert of_x.any()
    assert of_delta.any()


# ------------------------------------------------------------------ contracts


@pytest.mark.parametrize(
    ("dtype", "grad", "layout"),
    [
        (torch.float32, True, "contiguous"),
        (torch.float32, False, "transposed"),
        (torch.bfloat16, True, "transposed"),
    ],
)
def test_opcheck(backend, dtype, grad, layout):
    x, a, b, base, bias = make((2, 6, 12), dtype=dtype)
    if layout == "transposed":
        x, base = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, base))
    for tensor in (x, a, b, base, bias):
        tensor.requires_grad_(grad)
    shrink, expand = torch.ops.ucan_fast.shrink.default, torch.ops.ucan_fast.expand.default
    torch.library.opcheck(shrink, (x, a, dtype))
    wide = torch.float32 if backend == "triton" else torch.float64
    torch.library.opcheck(shrink, (x, a, wide))
    z = (x @ a.t()).detach().requires_grad_(grad)
    torch.library.opcheck(expand, (base, z, b, S, None))
    torch.library.opcheck(expand, (base, z, b, S, bias))


@pytest.mark.parametrize("of", ["x", "A"])
@pytest.mark.parametrize("direct", [False, True])
def test_shrink_with_moments_is_refused_while_a_gradient_is_recorded(of, direct):
    """On every backend: the reference's result had a gradient, the kernels' had none."""
    x, a, *_ = make((6, 12))
    {"x": x, "A": a}[of].requires_grad_()
    sums = totals(12)

    def call():
        if direct:
            return torch.ops.ucan_fast.shrink.moments(x, a, x.dtype, groups_of(x), None, sums, None)
        return ops.shrink(x, a, groups=groups_of(x), input_moments=sums)

    with pytest.raises(UcanError, match=f"shrink: {of} requires a gradient, .*no_grad"):
        call()
    assert not sums.any()
    with torch.no_grad():
        z = call()
    assert not z.requires_grad
    assert sums.any()


@pytest.mark.parametrize("of", ["base_out", "z", "B", "bias"])
@pytest.mark.parametrize("direct", [False, True])
def test_expand_with_moments_is_refused_while_a_gradient_is_recorded(of, direct):
    x, a, b, base, bias = make((40, 12))  # enough rows for C++
    z, sums = x @ a.t(), totals(10)
    {"base_out": base, "z": z, "B": b, "bias": bias}[of].requires_grad_()

    def call():
        if direct:
            expand = torch.ops.ucan_fast.expand.moments
            return expand(base, z, b, S, bias, groups_of(x), None, sums)
        return ops.expand(base, z, b, S, bias=bias, groups=groups_of(x), delta_moments=sums)

    with pytest.raises(UcanError, match=f"expand: {of} requires a gradient, .*no_grad"):
        call()
    assert not sums.any()
    with torch.no_grad():
        y = call()
    assert not y.requires_grad
    assert sums.any()


def test_a_compiled_call_with_moments_is_refused_while_a_gradient_is_recorded():
    x, a, *_ = make((6, 12))
    a.requires_grad_()
    groups, sums = groups_of(x), totals(12)

    def call():
        return ops.shrink(x, a, groups=groups, input_moments=sums)

    with pytest.raises(Exception, match="requires a gradient"):
        torch.compile(call, backend="aot_eager")()
    assert not sums.any()


@pytest.mark.parametrize(
    ("which", "dtype"),
    [
        ("both", torch.float32),
        ("first", torch.bfloat16),
        ("second", torch.bfloat16),
        ("transposed", torch.float32),
    ],
)
def test_opcheck_with_moments(backend, which, dtype):
    x, a, b, base, bias = make((2, 6, 12), dtype=dtype)
    wide = torch.float32 if backend == "triton" else torch.float64
    z_dtype = wide if which == "both" else dtype
    if which == "transposed":
        x, base = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, base))
    groups = groups_of(x)
    first, second = which != "second", which != "first"
    torch.library.opcheck(
        torch.ops.ucan_fast.shrink.moments,
        (
            *(x, a, z_dtype, groups, None if first else 1),
            *(totals(12) if first else None, totals(3) if second else None),
        ),
    )
    torch.library.opcheck(
        torch.ops.ucan_fast.expand.moments,
        (
            *(base, (x @ a.t()).to(z_dtype), b, S, bias if second else None),
            *(groups, 0 if second else None, totals(10)),
        ),
    )


def test_refuses_arguments_that_do_not_fit():
    x, a, b, base, bias = make((4, 12))
    z = x @ a.t()
    groups = groups_of(x)
    cases = [
        (lambda: ops.shrink(x, a[:, :5]), "(3, 5)"),
        (lambda: ops.shrink(x, a[0]), "(12,)"),
        (lambda: ops.shrink(x, a.to("meta")), "meta"),
        (lambda: ops.shrink(x, a, input_moments=totals(12)), "groups"),
        (lambda: ops.shrink(x, a, groups=groups, input_moments=totals(3)), "(2, 2, 3)"),
        (lambda: ops.shrink(x, a, groups=groups, rank_moments=totals(12)), "(2, 2, 12)"),
        (lambda: ops.shrink(x, a, groups=groups[:3], rank_moments=totals(3)), "4 tokens"),
        (lambda: ops.expand(base, z, b[:, :2], S), "(10, 2)"),
        (lambda: ops.expand(base[:3], z, b, S), "(3, 10)"),
        (lambda: ops.expand(base[:, :9], z, b, S), "(4, 9)"),
        (lambda: ops.expand(base, z, b, S, bias=bias[:4]), "bias"),
        (lambda: ops.expand(base, z, b.to("meta"), S), "meta"),
        (lambda: ops.expand(base, z, b, S, delta_moments=totals(10)), "groups"),
        (lambda: ops.expand(base, z, b, S, groups=groups, delta_moments=totals(3)), "(2, 2, 3)"),
    ]
    for call, word in cases:
        with pytest.raises(UcanError) as caught:
            call()
        assert word in str(caught.value), str(caught.value)


def test_unknown_backend_is_refused(monkeypatch):
    x, a, b, base, _ = make((4, 12))
    monkeypatch.setenv("UCAN_FAST_BACKEND", "warp")
    for call in (
        lambda: ops.shrink(x, a),
        lambda: ops.expand(base, x @ a.t(), b, S),
        lambda: ops.accumulate_moments(x, groups_of(x), totals(12)),
    ):
        with pytest.raises(UcanError, match="warp"):
            call()
