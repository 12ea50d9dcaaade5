"""LoRA over quantised base layers: the adapter half is fused, the base is only called.

bitsandbytes runs on the CPU; where it is missing its cases are skipped. Its NF4 kernel for
AVX512-BF16 rounds to bf16 and wants shapes in multiples of 64.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import pickle
import subprocess
import sys

import helpers_models as hm
import peft
import pytest
import torch
import transformers
from accelerate_helpers import One, assert_no_worse, count_fused_calls, make_x
from oracle import assert_equals_hooks, assert_relative, hook_sums
from peft.tuners import lora as peft_lora
from torch import nn

import ucan_fast as uf
from ucan_fast.accelerate import is_fused

K, N = 64, 96
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
needs_bnb = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def fused_calls(monkeypatch):
    return count_fused_calls(monkeypatch)


class Packed(nn.Module):
    """A stand-in for GPTQ's layers: integer weights, no ``weight``, takes x and nothing else."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        scale = dense.weight.detach().abs().max() / 127
        self.register_buffer("qweight", (dense.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", dense.bias.detach() if dense.bias is not None else None)

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale.to(x.dtype), bias)


def nf4(dense: nn.Linear, device: str = "cpu") -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=dense.bias is not None,
        compute_dtype=dense.weight.dtype,
        quant_type="nf4",
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        dense.weight.detach(), requires_grad=False, quant_type="nf4"
    )
    layer.bias = dense.bias
    return layer.to(device)


def int8(dense: nn.Linear, device: str = "cpu") -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(
        dense.in_features,
        dense.out_features,
        bias=dense.bias is not None,
        has_fp16_weights=False,
    )
    layer.weight = bitsandbytes.nn.Int8Params(
        dense.weight.detach(), requires_grad=False, has_fp16_weights=False
    )
    layer.bias = dense.bias
    return layer.to(device)


# kind -> (how the base is quantised, PEFT's layer class over it, the class of ours)
KINDS = {
    "nf4": (nf4, "Linear4bit", "FusedLinear4bit"),
    "int8": (int8, "Linear8bitLt", "FusedLinear8bitLt"),
    "plain over nf4": (nf4, "Linear", "FusedLinear"),
    "plain over int8": (int8, "Linear", "FusedLinear"),
    "gptq": (Packed, "GPTQLoraLinear", "FusedGPTQLoraLinear"),
}
ALL_KINDS = [pytest.param(k, marks=() if k == "gptq" else needs_bnb) for k in KINDS]
BNB_KINDS = [pytest.param(k, marks=needs_bnb) for k in ("nf4", "int8")]


def one_layer(kind: str, *, base=FP32, adapter=FP32, adapters: int = 1, **config) -> nn.Module:
    """A model of one LoRA layer K -> N over a quantised base, everything random."""
    quantise, cls, _ = KINDS[kind]
    torch.manual_seed(5)
    dense = nn.Linear(K, N).to(base)
    settings = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, **config}
    layer = None
    names = ["default", "second"][:adapters]
    for name in names:
        config = peft.LoraConfig(**settings)
        alpha = settings["lora_alpha"]
        if layer is None:
            layer = getattr(peft_lora, cls)(
                quantise(dense), name, config=config, r=settings["r"], lora_alpha=alpha
            )
        else:
            layer.update_layer(name, settings["r"] + 1, lora_alpha=alpha, config=config)
    layer.set_adapter(names)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                value = torch.randn(parameter.shape, generator=generator) * 0.5
                parameter.data = value.to(adapter)
    return One(layer).eval()


def accelerated(model: nn.Module, kind: str) -> nn.Module:
    model = copy.deepcopy(model)
    assert uf.accelerate(model).fused == ["dense"]
    assert type(model.dense).__name__ == KINDS[kind][2]
    assert is_fused(model.dense)
    return model


def exact(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The base as it is, the adapters in fp64."""
    layer = copy.deepcopy(model).dense
    y = layer.base_layer(x).double()
    for key in layer.active_adapters:
        a, b = (m[key].weight.double() for m in (layer.lora_A, layer.lora_B))
        y = y + (x.double() @ a.t() @ b.t()) * layer.scaling[key]
        if layer.lora_B[key].bias is not None:
            y = y + layer.lora_B[key].bias.double() * layer.scaling[key]
    return y


CASES = {
    "fp32": {},
    "bf16, adapter fp32": {"base": BF16},
    "bf16, adapter bf16": {"base": BF16, "adapter": BF16},
    "fp32, adapter bf16": {"adapter": BF16},
    "fp16, adapter fp32": {"base": FP16},
    "autocast": {"autocast": "cpu"},
    "autocast of bf16": {"base": BF16, "autocast": "cpu"},
    "CUDA's autocast": {"autocast": "both"},
    "CUDA's autocast of bf16": {"base": BF16, "autocast": "both"},
    "CUDA's autocast of fp16": {"base": FP16, "autocast": "both"},
    "CUDA's autocast, adapter bf16": {"adapter": BF16, "autocast": "both"},
    "two adapters": {"adapters": 2},
    "two adapters bf16": {"adapters": 2, "base": BF16},
    "two adapters, CUDA's autocast": {"adapters": 2, "autocast": "both"},
    "lora_bias": {"lora_bias": True},
}


@contextlib.contextmanager
def both_autocasts():
    """What a CUDA user has: ``torch.is_autocast_enabled()`` without a device asks for CUDA's."""
    with torch.autocast("cpu", dtype=BF16):
        torch.set_autocast_enabled("cuda", True)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)


def case(kind: str, name: str):
    """The model, the dtype of its x, and the context it runs in."""
    settings = dict(CASES[name])
    context = {
        "cpu": lambda: torch.autocast("cpu", dtype=BF16),
        "both": both_autocasts,
        None: contextlib.nullcontext,
    }[settings.pop("autocast", None)]
    return one_layer(kind, **settings), settings.get("base", FP32), context


# ------------------------------------------------------------------ outputs and gradients


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_outputs(kind, name, fused_calls):
    plain, dtype, context = case(kind, name)
    for shape in ((5, 9, K), (1, K), (0, K)):
        if not shape[0] and kind != "gptq":
            continue  # bitsandbytes' CPU kernels take no empty x
        fused_calls.clear()
        x = make_x(*shape, dtype=dtype)
        with torch.no_grad(), context():
            got, pefts, want = accelerated(plain, kind)(x), copy.deepcopy(plain)(x), exact(plain, x)
        assert len(fused_calls) == CASES[name].get("adapters", 1)
        assert_no_worse(got, pefts, want, str(shape))


def gradients(model, x, context, run=None):
    model = copy.deepcopy(model)
    x = x.detach().clone().requires_grad_()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with context():
        y = model(x) if run is None else run(model, x)
    (y * make_x(*y.shape, seed=8).to(y.dtype)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"x": x.grad, **found}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_gradients(kind, name, fused_calls):
    plain, dtype, context = case(kind, name)
    plain.train()
    x = make_x(6, 9, K, dtype=dtype)
    got = gradients(accelerated(plain, kind), x, context)
    assert fused_calls
    pefts = gradients(plain, x, context)

    def exactly(model, x):
        layer = model.dense
        y = layer.base_layer(x).double()
        for key in layer.active_adapters:
            a, b = layer.lora_A[key], layer.lora_B[key]
            delta = x.double() @ a.weight.double().t() @ b.weight.double().t()
            if b.bias is not None:
                delta = delta + b.bias.double()
            y = y + delta * layer.scaling[key]
        return y

    # Leaves as wide as the truth, so that their gradients are not rounded.
    wide = copy.deepcopy(plain)
    for key, parameter in wide.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.double()
    want = gradients(wide, x, context, exactly)
    assert list(got) == list(pefts) == list(want)
    assert len(got) == 1 + 2 * CASES[name].get("adapters", 1) + ("bias" in name)
    for key in want:
        assert_no_worse(got[key], pefts[key], want[key], key)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_result_is_a_tensor_of_its_own(kind):
    """Changing it in place is fine, as after PEFT's clone, with and without an adapter in it."""
    model = accelerated(one_layer(kind), kind)
    x = make_x(4, K).requires_grad_()
    model(x).add_(1).sum().backward()
    first = x.grad.clone()
    model.dense.set_adapter([])
    model(x).mul_(2).sum().backward()
    assert torch.isfinite(first).all()
    assert not torch.equal(first, x.grad)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_call_states_take_pefts_forward(kind, fused_calls):
    plain = one_layer(kind, lora_dropout=0.5)
    fused = accelerated(plain, kind)
    x = make_x(30, K)
    for model in (plain, fused):
        model.train()
    torch.manual_seed(3)
    want = plain(x)
    torch.manual_seed(3)
    assert torch.equal(fused(x), want)
    assert not fused_calls
    for model in (plain, fused):
        model.eval()
        model.dense.enable_adapters(False)
    assert torch.equal(fused(x), plain(x))
    assert not fused_calls
    for model in (plain, fused):
        model.dense.enable_adapters(True)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)
    assert len(fused_calls) == 1


@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module")
@pytest.mark.parametrize("kind", BNB_KINDS)
def test_merge_and_unmerge(kind, fused_calls):
    plain = one_layer(kind)
    fused = accelerated(plain, kind)
    x = make_x(4, K)
    for model in (plain, fused):
        model.dense.merge()
    with torch.no_grad():
        assert torch.equal(fused(x), plain(x))
    assert not fused_calls
    for model in (plain, fused):
        model.dense.unmerge()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)
    assert fused_calls


# ------------------------------------------------------------------ switching


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_restore_pickle_and_deepcopy(kind, fused_calls):
    plain = one_layer(kind)
    fused = accelerated(plain, kind)
    x = make_x(4, K)
    with torch.no_grad():
        want = copy.deepcopy(plain)(x)
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(fused),
            pickle.loads(pickle.dumps(fused)),
            torch.load(buffer, weights_only=False),
        ]
        for number, twin in enumerate(copies, 1):
            torch.testing.assert_close(twin(x), want, rtol=1e-5, atol=1e-5)
            assert len(fused_calls) == number
            if kind == "gptq":
                assert twin.dense.quant_linear_module is twin.dense.base_layer
        assert sorted(fused.dense.__dict__) == sorted(plain.dense.__dict__)
        assert uf.restore(fused) == 1
        assert type(fused.dense) is type(plain.dense)
        assert torch.equal(fused(x), want)
    assert len(fused_calls) == 3
    assert uf.restore(fused) == 0


def test_unknown_names_of_the_module_are_attribute_errors():
    for name in ("FusedNothing", "Linear4bit", "Fused"):
        with pytest.raises(AttributeError, match=name):
            getattr(sys.modules["ucan_fast.accelerate"], name)


@needs_bnb
def test_dora_and_odd_bases_are_kept():
    model = one_layer("nf4", use_dora=True)
    assert "Dora" in uf.accelerate(model).kept["dense"]
    model = one_layer("int8")
    model.dense.base_layer.weight.ds_id = 1
    assert "ZeRO-3" in uf.accelerate(model).kept["dense"]
    model = one_layer("nf4")

    class Own(type(model.dense)):
        pass

    model.dense.__class__ = Own
    assert uf.accelerate(model).kept == {"dense": "Own has its own forward"}


def test_qalora_is_kept():
    model = one_layer("gptq", r=4, use_qalora=True, qalora_group_size=16)
    assert "QALora" in uf.accelerate(model).kept["dense"]


def test_bitsandbytes_need_not_be_there():
    code = (
        "import sys\n"
        "sys.modules['bitsandbytes'] = None\n"
        "import ucan_fast, ucan_fast.auto, torch, peft\n"
        "layer = peft.tuners.lora.Linear(torch.nn.Linear(4, 4), 'default', r=2, lora_alpha=2, "
        "config=peft.LoraConfig(r=2))\n"
        "assert ucan_fast.accelerate(layer).fused == ['']\n"
        "assert ucan_fast.restore(layer) == 1\n"
        "assert sys.modules['bitsandbytes'] is None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ whole models


def quantised_llama(kind: str, *, dtype=FP32, flag: bool = True, **config) -> peft.PeftModel:
    """As ``from_pretrained(quantization_config=...)`` leaves it, with an adapter on top."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=hm.VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    ).to(dtype)
    for parent in [m for name, m in model.named_modules() if name.endswith(("attn", "mlp"))]:
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, key, KINDS[kind][0](child))
    if flag:
        setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
    return hm.lora(model, **config)


def base_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the base does, since its weights may lie packed: every base layer of one x."""
    found = {k: v.clone() for k, v in model.named_parameters() if "lora_" not in k}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, peft_lora.LoraLayer):
                found[name] = module.base_layer(make_x(3, module.in_features))
    return found


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("kind", BNB_KINDS)
def test_peft_makes_these_layers_and_all_are_fused(kind, flag, fused_calls):
    model = quantised_llama(kind, flag=flag)
    made = {type(m).__name__ for m in model.modules() if isinstance(m, peft_lora.LoraLayer)}
    assert made == {KINDS[kind][1] if flag else "Linear"}
    batch = hm.token_batch([7, 4])
    with torch.no_grad():
        want = copy.deepcopy(model)(**batch).logits
        report = uf.accelerate(model)
        assert (len(report.fused), report.kept) == (7, {})
        # The NF4 kernel rounds activations to bf16, which doubles any difference in them.
        torch.testing.assert_close(model(**batch).logits, want, rtol=1e-3, atol=1e-3)
    assert len(fused_calls) == 7
    assert uf.restore(model) == 7


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", BNB_KINDS)
def test_a_training_step(kind, dtype, fused_calls):
    plain = quantised_llama(kind, dtype=dtype).train()
    fused = copy.deepcopy(plain)
    uf.accelerate(fused)
    batch = hm.token_batch([7, 4])
    for model in (plain, fused):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model(**batch, labels=batch["input_ids"]).loss.backward()
    assert len(fused_calls) == 2 * 7
    wanted = dict(plain.named_parameters())
    for name, parameter in fused.named_parameters():
        assert (parameter.grad is None) == ("lora_" not in name)
        if parameter.grad is not None:
            close = {"rtol": 1e-3, "atol": 1e-5} if dtype == FP32 else {"rtol": 0.1, "atol": 2e-3}
            torch.testing.assert_close(parameter.grad, wanted[name].grad, **close)


@pytest.mark.parametrize("kind", BNB_KINDS)
def test_compiles_without_graph_breaks(kind):
    model = quantised_llama(kind)
    batch = hm.token_batch([7, 4])
    with torch.no_grad():
        model(**batch)
        uf.accelerate(model)
        want = model(**batch).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(**batch).logits, want)


# ------------------------------------------------------------------ statistics and edits

MIXED = [hm.token_batch([7, 3, 5], groups="mixed"), hm.token_batch([2, 6], seed=1, groups="mixed")]
SITES = ("input", "rank", "output", "layer")


@pytest.mark.parametrize("accelerate_it", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", BNB_KINDS)
def test_statistics_equal_hooks(kind, dtype, accelerate_it, fused_calls):
    model = quantised_llama(kind, dtype=dtype)
    expected = hook_sums(model, MIXED, accelerated=accelerate_it)
    if accelerate_it:
        uf.accelerate(model)
    fused_calls.clear()
    stats = uf.collect(model, MIXED, sites=SITES)
    assert bool(fused_calls) == accelerate_it
    assert_equals_hooks(stats, expected, SITES)


@pytest.mark.parametrize("context", [contextlib.nullcontext, both_autocasts])
@pytest.mark.parametrize("adapter", [FP32, BF16])
@pytest.mark.parametrize("kind", BNB_KINDS)
def test_one_layer_has_the_same_statistics_accelerated(kind, adapter, context):
    """One layer reads the same x either way. Under CUDA's autocast it is not cast before it."""
    body = nn.Sequential(KINDS[kind][0](nn.Linear(K, N)))
    model = hm.Wrapped(body, K)
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
    model.config = {"model_type": "own"}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=9, target_modules=["0"]))
    hm.randomise(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    fused = copy.deepcopy(model)
    assert len(uf.accelerate(fused).fused) == 1
    with context():
        plain = uf.collect(model, MIXED, sites=SITES)
        other = uf.collect(fused, MIXED, sites=SITES)
    for name, sites in plain.layers.items():
        for site, want in sites.items():
            got = other.layers[name][site]
            assert torch.equal(got.count, want.count)
            # y is rounded once where PEFT rounds twice.
            rel = 2e-2 if site == "layer" else 1e-6
            for part in ("abs_sum", "sq_sum"):
                assert_relative(
                    getattr(got, part), getattr(want, part), rel, f"{site} {part}", to_mean=True
                )
            if site == "input":
                assert torch.equal(got.abs_sum, want.abs_sum)


@pytest.mark.parametrize("kind", BNB_KINDS)
def test_a_deletion_over_a_quantised_base(kind):
    """collect, make_plan, apply, undo: plain and accelerated agree; only the adapter is edited."""
    plain = quantised_llama(kind)
    # bitsandbytes packs its weights anew at the first forward on some CPUs.
    with torch.no_grad():
        plain(**hm.token_batch([3]))
    fused = copy.deepcopy(plain)
    assert len(uf.accelerate(fused).fused) == 7
    config = uf.UcanConfig(strength=2.0, fraction=0.3, min_score=0.0)
    factors = []
    for model in (plain, fused):
        base = base_values(model)
        before = {k: v.clone() for k, v in model.named_parameters() if "lora_" in k}
        plan = uf.make_plan(model, uf.collect(model, MIXED), config)
        plan.apply(model)
        after = dict(model.named_parameters())
        assert any(not torch.equal(after[k], v) for k, v in before.items())
        now = base_values(model)
        assert list(now) == list(base)
        assert all(torch.equal(now[k], base[k]) for k in base)
        plan.undo(model)
        assert all(torch.equal(after[k], v) for k, v in before.items())
        factors.append(torch.cat([f for _, f in sorted(plan.factors.items())]))
    assert (factors[0] < 1).sum() > 10
    # A score near the threshold may fall on either side of it.
    assert ((factors[0] - factors[1]).abs() > 0.02).sum() <= 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("kind", BNB_KINDS)
def test_outputs_gradients_and_statistics_are_pefts_on_each_device(
    kind, dtype, device, fused_calls, monkeypatch
):
    """One layer, quantised by and for this device."""
    if device == "cuda":
        monkeypatch.setenv("UCAN_FAST_BACKEND", "triton")  # so few tokens are left to PEFT else
    torch.manual_seed(5)
    base = KINDS[kind][0](nn.Linear(K, N).to(dtype), device)
    # Packed for the CPU, NF4 weights would pass no gradient.
    base.support_avx512bf16_for_cpu = False
    body = nn.Sequential(base)
    model = hm.Wrapped(body, K).to(device, dtype)
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
    model.config = {"model_type": "own"}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=9, target_modules=["0"]))
    hm.randomise(model)
    model.to(device).eval()
    (plain_layer,) = (m for m in model.modules() if isinstance(m, peft_lora.LoraLayer))
    assert type(plain_layer).__name__ == KINDS[kind][1]
    assert all(p.device.type == device for p in model.parameters())
    fused = copy.deepcopy(model)
    assert len(uf.accelerate(fused).fused) == 1
    (fused_layer,) = (m for m in fused.modules() if is_fused(m))

    x = make_x(2, 9, K, dtype=dtype).to(device)
    with torch.no_grad():
        got, pefts = fused_layer(x), plain_layer(x)
        assert len(fused_calls) == 1
        a, b = (m["default"].weight.double() for m in (plain_layer.lora_A, plain_layer.lora_B))
        scaling = plain_layer.scaling["default"]
        want = plain_layer.base_layer(x).double() + x.double() @ a.t() @ b.t() * scaling
    assert_no_worse(got, pefts, want, "outputs")

    upstream = make_x(2, 9, N, dtype=dtype, seed=8).to(device)
    gradients_of = []
    for layer in (fused_layer, plain_layer):
        leaf = x.clone().requires_grad_()
        (layer(leaf) * upstream).sum().backward()
        weights = [m["default"].weight.grad for m in (layer.lora_A, layer.lora_B)]
        gradients_of.append([leaf.grad, *weights])
    rows, up = (t.reshape(-1, t.shape[-1]).double() for t in (x, upstream))
    through = x.clone().requires_grad_()
    (plain_layer.base_layer(through) * upstream).sum().backward()
    truth = [
        through.grad.double() + (upstream.double() @ b @ a) * scaling,
        (up @ b).t() @ rows * scaling,
        up.t() @ (rows @ a.t()) * scaling,
    ]
    for what, mine, theirs, exactly in zip("xAB", *gradients_of, truth, strict=True):
        assert_no_worse(mine, theirs, exactly, f"gradient of {what}")

    plain_sums, fused_sums = (uf.collect(m, MIXED, sites=SITES) for m in (model, fused))
    for name, sites in plain_sums.layers.items():
        for site, want in sites.items():
            got = fused_sums.layers[name][site]
            assert torch.equal(got.count, want.count)
            # y is rounded once where PEFT rounds twice; products on a GPU differ in their order.
            rel = 2e-2 if site == "layer" or dtype != FP32 else 1e-3
            for part in ("abs_sum", "sq_sum"):
                assert want.count.sum() > 0
                assert_relative(
                    getattr(got, part), getattr(want, part), rel, f"{site} {part}", to_mean=True
                )


# Gradients and factors of the influence step.


def packed_and_dense(kind: str) -> tuple[nn.Module, nn.Module]:
    """A LoRA model over a quantised base, and the same over its dequantised weights."""
    import bitsandbytes

    base = hm.llama(hidden=64)
    base.config.intermediate_size = 64
    base = transformers.LlamaForCausalLM(base.config)
    dense = copy.deepcopy(base)
    for name, module in list(base.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        packed = (nf4 if kind == "nf4" else int8)(module)
        # Packed for the CPU, NF4 weights would pass no gradient.
        packed.support_avx512bf16_for_cpu = False
        if kind == "nf4":
            weight = bitsandbytes.functional.dequantize_4bit(
                packed.weight.data, packed.weight.quant_state
            )
        else:
            weight = packed.weight.data.float() * packed.weight.SCB[:, None] / 127
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, packed)
        dense.get_submodule(name).weight.data = weight.float()
    return hm.lora(base), hm.lora(dense)


@pytest.mark.parametrize("kind", BNB_KINDS)
@pytest.mark.parametrize("accelerated", [False, True])
def test_influence_over_a_quantised_base(kind, accelerated):
    """As over the dequantised weights, to the rounding of bitsandbytes' products (bf16 or int8)."""
    packed, dense = packed_and_dense(kind)
    if accelerated:
        uf.accelerate(packed)
    data = [hm.token_batch([6, 5, 7]), hm.token_batch([4, 8], seed=1)]
    got, wanted = (uf.collect_factors(model, data) for model in (packed, dense))
    for key, gradient in wanted.gradients.items():
        assert (got.gradients[key] - gradient).norm() < 0.1 * gradient.norm(), key
    for name in wanted.layers:
        c_x, expected = got.factor(name, "c_x"), wanted.factor(name, "c_x")
        assert (c_x - expected).norm() < 0.05 * expected.norm(), name
    before = packed.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    config = uf.UcanConfig(method="influence", strength=0.1)
    result = uf.unlearn(packed, forget=data[:1], retain=data[1:], config=config)
    assert (
        result.report.metrics["influence"]["forget/perplexity"]
        > (result.report.metrics["before"]["forget/perplexity"])
    )
    changed = [k for k, v in packed.state_dict().items() if not torch.equal(v, before[k])]
    assert changed
    assert all("lora_" in key for key in changed)
    result.plan.undo(packed)
    left = [k for k, v in packed.state_dict().items() if not torch.equal(v, before[k])]
    assert not left


@needs_bnb
def test_packed_weights_that_pass_no_gradient_are_refused():
    """bitsandbytes packs NF4 weights for AVX512-BF16 in the first forward without gradients."""
    packed, _ = packed_and_dense("nf4")
    data = [hm.token_batch([6, 5, 7])]
    for module in packed.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.packing_format_for_cpu = True
    with pytest.raises(uf.UcanError, match=r"base_layer: bitsandbytes packed its 4-bit weight"):
        uf.collect_factors(packed, data)
    assert not any(m._forward_pre_hooks for m in packed.modules())
