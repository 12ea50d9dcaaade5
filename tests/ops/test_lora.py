"""add_lora: what shrink and expand give, in base_out's memory where that is allowed and faster."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from ucan_fast import UcanError, ops

S = 0.5


def make(shape=(2, 5, 6), n=4, r=3, dtype=torch.float32):
    x = torch.randn(shape, dtype=dtype)
    base = torch.randn(*shape[:-1], n, dtype=dtype)
    return base, x, torch.randn(r, shape[-1], dtype=dtype), torch.randn(n, r, dtype=dtype)


def call(base, x, a, b, **options):
    options = {"dtype": a.dtype, "overwrite": True, **options}
    return ops.add_lora(base, x, a, b, S, **options)


def halves(base, x, a, b, bias=None):
    return ops.expand(base, ops.shrink(x, a), b, S, bias=bias)


def is_in_place(monkeypatch, *operands, **options) -> bool:
    """Whether the two operators were left out; the result is checked."""
    wanted = halves(*operands, bias=options.get("bias"))
    asked = []
    module = importlib.import_module("ucan_fast.ops.lora")
    real = module.shrink
    with monkeypatch.context() as patch:
        patch.setattr(module, "shrink", lambda *a, **k: asked.append(1) or real(*a, **k))
        y = call(*operands, **options)
    torch.testing.assert_close(y, wanted)
    if not asked:
        assert y.data_ptr() == operands[0].data_ptr()
    return not asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 6), (129, 6), (2, 3, 4, 6), (0, 6), (6,)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_values(backend, dtype, shape, overwrite):
    base, x, a, b = make(shape, dtype=dtype)
    kept = base.clone()
    y = call(base, x, a, b, overwrite=overwrite)
    assert (y.shape, y.dtype) == (base.shape, base.dtype)
    wide = kept.double() + S * F.linear(F.linear(x.double(), a.double()), b.double())
    plain = kept + F.linear(F.linear(x, a), b) * S
    scale = wide.abs().max().item() if wide.numel() else 0.0
    errors = [(t.double() - wide).abs().max().item() if wide.numel() else 0.0 for t in (y, plain)]
    assert errors[0] <= 2 * errors[1] + 1e-6 * scale
    if not overwrite:
        assert torch.equal(base, kept)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_no_columns(name):
    with ops.use_backend(name):
        assert call(*make(n=0)).shape == (2, 5, 0)


def test_in_place_where_nothing_speaks_against_it(monkeypatch):
    with torch.no_grad():
        assert is_in_place(monkeypatch, *make())
        assert is_in_place(monkeypatch, *make(dtype=torch.float64))
    base, x, a, b = make()
    assert is_in_place(monkeypatch, base, x, a, b)  # nothing requires a gradient
    with torch.no_grad():
        assert is_in_place(monkeypatch, base, x, a.requires_grad_(), b)
        assert is_in_place(monkeypatch, base, x[:, ::1].mT.contiguous().mT, a, b)


@pytest.mark.parametrize("name", ["reference", "native"])
def test_a_backend_asked_for_by_name_runs(monkeypatch, name):
    with ops.use_backend(name):
        assert not is_in_place(monkeypatch, *make())


@pytest.mark.parametrize(
    "change",
    [{"overwrite": False}, {"bias": torch.ones(4)}],
    ids=["not allowed", "bias"],
)
def test_not_in_place_by_option(monkeypatch, change):
    assert not is_in_place(monkeypatch, *make(), **change)


def test_not_in_place_by_operands(monkeypatch):
    base, x, a, b = make()
    assert not is_in_place(monkeypatch, base.mT.contiguous().mT, x, a, b)
    assert not is_in_place(monkeypatch, *(t.half() for t in (base, x, a, b)))
    assert not is_in_place(monkeypatch, base, x, a, b.double())


@pytest.mark.parametrize("rows", [5, 64])
@pytest.mark.parametrize("strange", [torch.int64, torch.complex64])
def test_other_dtypes_are_refused_however_few_the_rows(strange, rows):
    base, x, a, b = make((rows, 20), n=24, r=4)
    for operands in ((base.bfloat16(), x.to(strange), a, b), (base.to(strange), x, a, b)):
        with pytest.raises(UcanError, match="must be"):
            call(*operands)


def test_no_rank_and_no_scaling_add_nothing(monkeypatch):
    module = importlib.import_module("ucan_fast.ops.lora")
    monkeypatch.setattr(module, "_multiplies_bfloat16", lambda: True)
    asked, real = [], module.expand
    monkeypatch.setattr(module, "expand", lambda *a, **k: asked.append(1) or real(*a, **k))
    for dtype in (torch.float32, torch.bfloat16):
        base, x, a, b = (t.to(dtype) for t in make((64, 20), n=24, r=4))
        assert torch.equal(call(base.clone(), x, a[:0], b[:, :0]), base)
        assert not asked
        y = ops.add_lora(base.clone(), x, a, b, 0.0, dtype=dtype, overwrite=True)
        assert torch.equal(y, base)
        # torch's own bf16 product is many times slower where its factor is 0.
        assert bool(asked) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("fast", [False, True])
def test_bf16_goes_to_torch_where_the_processor_multiplies_it(monkeypatch, fast):
    module = importlib.import_module("ucan_fast.ops.lora")
    monkeypatch.setattr(module, "_multiplies_bfloat16", lambda: fast)
    asked = []
    real = module.expand
    monkeypatch.setattr(module, "expand", lambda *a, **k: asked.append(1) or real(*a, **k))
    base, x, a, b = (t.bfloat16() for t in make((300, 64), n=48, r=8))
    kept, z = base.double(), ops.shrink(x, a).double()
    y = call(base, x, a, b)
    assert y.data_ptr() == base.data_ptr()
    assert bool(asked) != fast
    # Rounded once: at most half a unit off, and what sums in fp32 add to it.
    wanted = kept + S * (z @ b.double().t())
    assert ((y - wanted).abs() <= (2.0**-8 + 1e-5) * wanted.abs() + 1e-5).all()


@pytest.mark.parametrize("rows", [1, 31, 32])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_few_rows_of_a_narrow_base_have_the_bits_of_both_operators(monkeypatch, narrow, rows):
    """A wide adapter: without the operators' questions, but computed as they would."""
    module = importlib.import_module("ucan_fast.ops.lora")
    base, x, a, b = make((rows, 20), n=24, r=4)
    base, x = base.to(narrow), x.to(narrow)
    wanted = ops.expand(base, ops.shrink(x, a, dtype=a.dtype), b, S)
    asked = []
    real = module.expand
    monkeypatch.setattr(module, "expand", lambda *a, **k: asked.append(1) or real(*a, **k))
    assert torch.equal(call(base.clone(), x, a, b), wanted)
    assert bool(asked) == (rows == 32)
    # A narrow product is rounded to what it is stored as: that is left to the operators.
    call(base, x, a.to(narrow), b.to(narrow), dtype=torch.float16)
    assert len(asked) == 1 + (rows == 32)


@pytest.mark.parametrize("which", range(4), ids=["base_out", "x", "A", "B"])
def test_gradients(which):
    operands = [t.double() for t in make()]
    operands[which].requires_grad_()
    kept = operands[0].detach().clone()
    y = call(*operands)
    assert y.requires_grad
    (got,) = torch.autograd.grad(y.square().sum(), operands[which])
    (want,) = torch.autograd.grad(halves(*operands).square().sum(), operands[which])
    torch.testing.assert_close(got, want)
    assert torch.equal(operands[0], kept)


@pytest.mark.parametrize("which", range(4), ids=["base_out", "x", "A", "B"])
def test_forward_mode(which):
    operands, (tangent, *_) = make(), (None,)
    tangent = torch.randn_like(operands[which])

    def at(value, run):
        return run(*(value if i == which else t for i, t in enumerate(operands)))

    _, got = torch.func.jvp(lambda v: at(v, call), (operands[which],), (tangent,))
    _, want = torch.func.jvp(lambda v: at(v, halves), (operands[which],), (tangent,))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [5, 200])
def test_autocast_changes_no_bit(rows):
    """The dtype of both products is given: nothing is cast once more."""
    for base_dtype, dtype in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ):
        base, x, a, b = make((rows, 20), n=24, r=4)
        base = base.to(base_dtype)
        wanted = call(base.clone(), x, a, b, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            y = call(base, x, a, b, dtype=dtype)
        assert y.dtype == base_dtype
        assert torch.equal(y, wanted)


def test_a_bf16_sum_under_autocast_is_torchs(monkeypatch):
    module = importlib.import_module("ucan_fast.ops.lora")
    monkeypatch.setattr(module, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(module, "expand", None)
    base, x, a, b = make((200, 20), n=24, r=4)
    base = base.bfloat16()
    kept, z = base.double(), ops.shrink(x, a, dtype=torch.bfloat16).double()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = call(base, x, a, b, dtype=torch.bfloat16)
    assert y.data_ptr() == base.data_ptr()
    wanted = kept + S * (z @ b.bfloat16().double().t())
    assert ((y - wanted).abs() <= (2.0**-8 + 1e-5) * wanted.abs() + 1e-5).all()


@pytest.mark.parametrize(
    "shapes",
    [((2, 5, 4), (10, 6), (3, 6), (4, 3)), ((5, 4), (5, 6), (3, 7), (4, 3)),
     ((5, 4), (5, 6), (3, 6), (4, 2)), ((5, 4), (5, 6), (3, 6), (5, 3))],
    ids=["tokens", "K", "r", "N"],
)  # fmt: skip
def test_refuses_what_does_not_fit(shapes):
    operands = [torch.randn(shape) for shape in shapes]
    kept = operands[0].clone()
    with pytest.raises(UcanError, match="must be"):
        call(*operands)
    assert torch.equal(operands[0], kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_product_is_of_the_dtype_asked_for(dtype):
    base, x, a, b = make((64, 20), n=24, r=4)
    for rows in (5, 64):
        few = (base[:rows], x[:rows])
        wanted = ops.expand(few[0], ops.shrink(few[1], a, dtype=dtype), b, S)
        assert torch.equal(call(few[0].clone(), few[1], a, b, dtype=dtype), wanted)
        assert not torch.equal(call(few[0].clone(), few[1], a, b), wanted)
