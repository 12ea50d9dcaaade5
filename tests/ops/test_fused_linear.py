"""fused_linear: base product and LoRA in one operator, on every backend; who decides to use it."""

from __future__ import annotations

import copy

import helpers_models as hm
import peft
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_equals_hooks, hook_sums
from torch.autograd import forward_ad

import ucan_fast as uf
from ucan_fast import UcanError, kernels, ops
from ucan_fast.kernels import tuning

S = 1.25


def make(shape=(2, 5, 16), n=24, r=3, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=generator).to(dtype)

    k = shape[-1]
    return {
        "x": randn(*shape),
        "weight": randn(n, k),
        "z": randn(*shape[:-1], r),
        "b": randn(n, r),
        "bias": randn(n),
        "lora_bias": randn(n),
    }


def run(t: dict[str, torch.Tensor], **options) -> torch.Tensor:
    biases = {key: t[key] for key in ("bias", "lora_bias") if key in t}
    return ops.fused_linear(t["x"], t["weight"], t["z"], t["b"], S, **biases, **options)


def plain(t: dict[str, torch.Tensor]) -> torch.Tensor:
    base = F.linear(t["x"], t["weight"], t.get("bias"))
    return base + S * F.linear(t["z"], t["b"], t.get("lora_bias"))


# The second has rows that TMA refuses: the operator then takes the other way.
@pytest.mark.parametrize(("k", "n"), [(16, 24), (15, 23)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biases", [True, False])
def test_values_and_moments(backend, k, n, dtype, biases):
    t = make((2, 5, k), n, dtype=dtype)
    if not biases:
        del t["bias"], t["lora_bias"]
    groups = torch.tensor([0, 1, -1, 1, 0, 0, 1, 1, -1, 0], dtype=torch.int8)
    exact = plain({key: value.double() for key, value in t.items()})
    allowed = 2 * (plain(t).double() - exact).abs().max() + 1e-6 * exact.abs().max()
    sums = torch.zeros(2, 2, n, dtype=torch.float64)
    for y in (run(t), run(t, groups=groups, delta_moments=sums)):
        assert y.dtype == dtype
        assert (y.double() - exact).abs().max() <= allowed
    delta = (S * t["z"].double() @ t["b"].double().t()).reshape(-1, n)
    for group in (0, 1):
        want = delta[groups == group]
        torch.testing.assert_close(sums[0, group], want.abs().sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums[1, group], (want**2).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(kernels.obstacle("cpu") is not None, reason=str(kernels.obstacle("cpu")))
@pytest.mark.parametrize("with_moments", [False, True])
def test_what_tma_refuses_still_runs_on_triton(monkeypatch, with_moments):
    """By its definition, as backend.py says: the base's product, then Triton's expand."""
    from ucan_fast.kernels import expand as expand_kernel
    from ucan_fast.kernels import fused_linear as fused_kernel

    launched = []

    def note(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: launched.append(name) or real(*args))

    note(expand_kernel, "expand")
    note(fused_kernel, "fused_linear")
    sums = {}
    if with_moments:
        groups = torch.tensor([0, 1, -1, 1, 0, 0, 1, 1, -1, 0], dtype=torch.int8)
        sums = {"groups": groups, "delta_moments": torch.zeros(2, 2, 23, dtype=torch.float64)}
    whole, odd = make(), make((2, 5, 15), 23)
    with ops.use_backend("triton"):
        run(whole)
        y = run(odd, **sums)
    assert launched == ["fused_linear", "expand"]
    torch.testing.assert_close(y, plain(odd), rtol=1e-5, atol=1e-5)
    assert "16 bytes" in fused_kernel.obstacle(odd["x"], odd["weight"], odd["z"], odd["b"])


def test_gradients_are_autograds(backend):
    t = make()
    leaves = {key: value.requires_grad_() for key, value in t.items()}
    weight = torch.randn(2, 5, 24)
    (run(leaves) * weight).sum().backward()
    got = {key: value.grad for key, value in leaves.items()}
    exact = {key: value.detach().double().requires_grad_() for key, value in t.items()}
    (plain(exact) * weight).sum().backward()
    for key, value in exact.items():
        torch.testing.assert_close(got[key].double(), value.grad, rtol=1e-5, atol=1e-5)


NAMES = ("x", "weight", "z", "b", "bias", "lora_bias")


@pytest.mark.parametrize("of", NAMES)
def test_forward_mode(backend, of):
    t = make()
    tangent = torch.randn_like(t[of])

    def tangents(function):
        with forward_ad.dual_level():
            dual = {**t, of: forward_ad.make_dual(t[of], tangent)}
            return forward_ad.unpack_dual(function(dual)).tangent

    want = tangents(plain)
    torch.testing.assert_close(tangents(run), want)
    t = {key: value.requires_grad_() for key, value in t.items()}
    torch.testing.assert_close(tangents(run), want)


def test_torch_func(backend):
    t = make()
    tensors = tuple(t[name] for name in NAMES)

    def of(function):
        return lambda *tensors: function(dict(zip(NAMES, tensors, strict=True))).pow(2).sum()

    for transform in (
        lambda f: torch.func.grad(f, tuple(range(6))),
        lambda f: torch.func.vmap(f, (0, None, 0, None, None, None)),
        lambda f: lambda *t: torch.func.jvp(f, t, t),
    ):
        got, want = transform(of(run))(*tensors), transform(of(plain))(*tensors)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    options = {
        "groups": torch.zeros(10, dtype=torch.int8),
        "delta_moments": torch.zeros(2, 2, 24, dtype=torch.float64),
    }
    with pytest.raises(UcanError, match=r"fused_linear: .*torch\.func transforms"):
        torch.func.vmap(lambda x: run({**t, "x": x}, **options))(t["x"][None])
    assert not options["delta_moments"].any()
    if backend == "triton":
        with pytest.raises(UcanError, match=r"not torch\.float64"):
            torch.func.grad(of(run))(*(v.double() for v in tensors))


@pytest.mark.parametrize("of", NAMES)
def test_lazily_negated_tensors(backend, of):
    t = make()
    t[of] = torch._neg_view(t[of])
    torch.testing.assert_close(run(t), plain(t))


def test_opcheck(backend):
    t = make()
    arguments = (t["x"], t["weight"], t["z"], t["b"], S, t["bias"], None)
    for value in arguments[:4]:
        value.requires_grad_()
    torch.library.opcheck(torch.ops.ucan_fast.fused_linear.default, arguments)
    groups, sums = torch.zeros(10, dtype=torch.int8), torch.zeros(2, 2, 24, dtype=torch.float64)
    plain_ones = tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in arguments)
    torch.library.opcheck(torch.ops.ucan_fast.fused_linear.moments, (*plain_ones, groups, 0, sums))


def test_refuses_arguments_that_do_not_fit():
    t = make()
    cases = [
        ({"weight": t["weight"][:, :4]}, "[N, K]"),
        ({"z": t["z"][:1]}, "[..., r]"),
        ({"b": t["b"][:5]}, "[N, r]"),
        ({"bias": t["bias"][:3]}, "biases"),
        ({"weight": t["weight"].bfloat16()}, "bfloat16"),
        ({"weight": t["weight"].to("meta")}, "meta"),
    ]
    for change, word in cases:
        with pytest.raises(UcanError) as caught:
            run({**t, **change})
        assert word in str(caught.value), str(caught.value)
    sums = torch.zeros(2, 2, 24, dtype=torch.float64)
    with pytest.raises(UcanError, match="need groups"):
        run(t, delta_moments=sums)
    with pytest.raises(UcanError, match="10 tokens"):
        run(t, delta_moments=sums, groups=torch.zeros(3, dtype=torch.int8))


@pytest.mark.parametrize("of", ["x", "weight", "z", "b", "bias", "lora_bias"])
def test_moments_are_refused_while_a_gradient_is_recorded(backend, of):
    t = make()
    t[of].requires_grad_()
    options = {
        "groups": torch.zeros(10, dtype=torch.int8),
        "delta_moments": torch.zeros(2, 2, 24, dtype=torch.float64),
    }
    operator = torch.ops.ucan_fast.fused_linear.moments
    arguments = [t[key] for key in ("x", "weight", "z", "b")]
    biases = (S, t["bias"], t["lora_bias"])
    for call in (
        lambda: run(t, **options),
        lambda: operator(*arguments, *biases, options["groups"], None, options["delta_moments"]),
    ):
        with pytest.raises(UcanError, match=r"fused_linear: .* requires a gradient, .*no_grad"):
            call()
        assert not options["delta_moments"].any()
    with torch.no_grad():
        assert not run(t, **options).requires_grad
    assert options["delta_moments"].any()


# ------------------------------------------------------------------ who uses it


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    seen = []
    real = ops.fused_linear

    def counted(*args, **kwargs):
        seen.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "fused_linear", counted)
    return seen


def test_nobody_unless_measured_or_asked_for(monkeypatch, calls):
    x, weight = torch.ones(2, 16), torch.ones(24, 16)
    monkeypatch.setattr(kernels, "obstacle", lambda kind: None)
    assert not ops.fused_linear_wanted(x, weight)
    with ops.use_backend("triton"):
        assert not ops.fused_linear_wanted(x, weight), "nobody measured that it wins"
    monkeypatch.setattr(tuning, "fused_linear_wins", lambda *args: True)
    assert not ops.fused_linear_wanted(x, weight), "the interpreter is never taken by itself"
    with ops.use_backend("triton"):
        assert ops.fused_linear_wanted(x, weight)
        assert not ops.fused_linear_wanted(x, weight.bfloat16())
        monkeypatch.setenv("UCAN_FAST_FUSED_LINEAR", "0")
        assert not ops.fused_linear_wanted(x, weight)
        monkeypatch.setenv("UCAN_FAST_FUSED_LINEAR", "yes")
        with pytest.raises(UcanError, match="UCAN_FAST_FUSED_LINEAR='yes' is unknown"):
            ops.fused_linear_wanted(x, weight)
    monkeypatch.delenv("UCAN_FAST_FUSED_LINEAR")
    model = hm.lora(hm.llama(layers=1))
    uf.accelerate(model)
    model(**hm.token_batch([3]))
    assert not calls


def test_the_table_of_wins_names_gpu_dtype_and_shape(monkeypatch):
    cuda = torch.device("cuda")
    assert not tuning.fused_linear_wins(cuda, torch.bfloat16, 4096, 4096)
    monkeypatch.setattr(tuning, "gpu_of", lambda device: "h100")
    wins = frozenset({("h100", torch.bfloat16, 4096, 2048)})
    monkeypatch.setattr(tuning, "FUSED_LINEAR_WINS", wins)
    assert tuning.fused_linear_wins(cuda, torch.bfloat16, 4096, 2048)
    assert not tuning.fused_linear_wins(cuda, torch.bfloat16, 2048, 4096)
    assert not tuning.fused_linear_wins(cuda, torch.float16, 4096, 2048)


@pytest.mark.skipif(kernels.obstacle("cpu") is not None, reason=str(kernels.obstacle("cpu")))
def test_a_model_through_it(monkeypatch, calls):
    plain_model = hm.lora(hm.llama(layers=1))
    batches = [hm.token_batch([7, 3], groups="mixed")]
    monkeypatch.setenv("UCAN_FAST_FUSED_LINEAR", "1")
    monkeypatch.setenv("UCAN_FAST_BACKEND", "triton")
    fused = copy.deepcopy(plain_model)
    uf.accelerate(fused)
    with torch.no_grad():
        expected, got = plain_model(**hm.token_batch([4])), fused(**hm.token_batch([4]))
    assert len(calls) == 7
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    stats = uf.collect(fused, batches)
    assert len(calls) == 14
    assert_equals_hooks(stats, hook_sums(plain_model, batches, accelerated=True))
    # A hook on the base, several adapters, or a quantised base: the base is called as a module.
    calls.clear()
    fused.base_model.model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(
        lambda *_: None
    )
    fused(**hm.token_batch([4]))
    assert len(calls) == 6


@pytest.mark.skipif(kernels.obstacle("cpu") is not None, reason=str(kernels.obstacle("cpu")))
def test_a_layer_with_biases_and_under_autocast(monkeypatch, calls):
    class Body(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(16, 24)

        def forward(self, x):
            return self.proj(x)

    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["proj"], lora_bias=True)
    plain_model = peft.get_peft_model(Body(), config).eval()
    with torch.no_grad():
        for parameter in plain_model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    monkeypatch.setenv("UCAN_FAST_FUSED_LINEAR", "1")
    monkeypatch.setenv("UCAN_FAST_BACKEND", "triton")
    fused = copy.deepcopy(plain_model)
    uf.accelerate(fused)
    x = torch.randn(5, 16)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain_model(x), rtol=1e-5, atol=1e-5)
        assert len(calls) == 1
        # Autocast rounds the base's operands: its product is left to torch.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, expected = fused(x), plain_model(x)
    assert len(calls) == 1
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-1)


def test_compiles_without_graph_breaks(monkeypatch):
    monkeypatch.setenv("UCAN_FAST_FUSED_LINEAR", "1")
    model = hm.lora(hm.llama(layers=1))
    uf.accelerate(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 16)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
