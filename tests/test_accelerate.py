"""accelerate: the fused forward gives PEFT's outputs and gradients, and PEFT works around it."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import itertools
import json
import pickle

import helpers_models as hm
import peft
import pytest
import torch
from accelerate_helpers import One, assert_no_worse, count_fused_calls, make_x
from peft.tuners import lora as peft_lora
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import ucan_fast as uf
from ucan_fast.accelerate import FusedLoraLinear

K, N = 12, 10
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture
def fused_calls(monkeypatch):
    return count_fused_calls(monkeypatch)


def one_layer(
    r: int = 3,
    *,
    base=FP32,
    adapter=FP32,
    conv: bool = False,
    adapters: int = 1,
    dropout: float = 0.0,
    **config,
) -> peft.PeftModel:
    """A model of one LoRA layer K -> N, everything random; the first ``adapters`` are active."""
    dense = Conv1D(N, K) if conv else nn.Linear(K, N)
    settings = {
        "lora_alpha": 2 * r,
        "target_modules": ["dense"],
        "lora_dropout": dropout,
        "fan_in_fan_out": conv,
        **config,
    }
    names = ["default", "second", "third"][:adapters]
    model = peft.get_peft_model(One(dense), peft.LoraConfig(r=r, **settings))
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(r=r + 1, **settings))
    model.base_model.set_adapter(names)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    model.to(base)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    return model.eval()


def layer_of(model: nn.Module) -> nn.Module:
    return model.base_model.model.dense


def accelerated(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    assert uf.accelerate(model).fused
    return model


CASES = {
    "fp32": {},
    "fp64": {"base": FP64, "adapter": FP64},
    "bf16, adapter fp32": {"base": BF16},
    "bf16, adapter bf16": {"base": BF16, "adapter": BF16},
    "fp16, adapter fp32": {"base": torch.float16},
    "fp32, adapter bf16": {"adapter": BF16},
    "bf16, adapter fp16": {"base": BF16, "adapter": torch.float16},
    "fp32, adapter fp64": {"adapter": FP64},
    "fp32, adapter fp64, autocast": {"adapter": FP64, "autocast": True},
    "autocast": {"autocast": True},
    "autocast of bf16": {"base": BF16, "autocast": True},
    "three adapters": {"adapters": 3},
    "three adapters bf16": {"adapters": 3, "base": BF16},
    "three adapters autocast": {"adapters": 3, "autocast": True},
    "lora_bias": {"lora_bias": True},
    "lora_bias bf16": {"lora_bias": True, "base": BF16, "adapter": BF16},
    "rslora": {"use_rslora": True},
    "Conv1D": {"conv": True},
    "Conv1D bf16": {"conv": True, "base": BF16},
    "Conv1D lora_bias": {"conv": True, "lora_bias": True},
}


def case(name: str, r: int = 3):
    """The model, the dtype of its x, and the context it runs in."""
    settings = dict(CASES[name])
    context = contextlib.nullcontext
    if settings.pop("autocast", False):

        def context():
            return torch.autocast("cpu", dtype=BF16)

    return one_layer(r, **settings), settings.get("base", FP32), context


# ------------------------------------------------------------------ outputs and gradients


@pytest.mark.parametrize("r", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("name", CASES)
def test_outputs(name, r, fused_calls):
    plain, dtype, context = case(name, r)
    x = make_x(5, 9, K, dtype=dtype)
    with torch.no_grad(), context():
        got, pefts = accelerated(plain)(x), plain(x)
    assert len(fused_calls) == CASES[name].get("adapters", 1)
    assert_no_worse(got, pefts, copy.deepcopy(plain).double()(x.double()))


def test_functional_call(fused_calls):
    """Weights handed in from outside are plain tensors, and they count."""
    fused = accelerated(one_layer())
    x = make_x(4, K)
    weights = {name: p.detach() * 2 for name, p in fused.named_parameters()}
    got = torch.func.functional_call(fused, weights, x)
    assert fused_calls
    doubled = copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter *= 2
    uf.restore(doubled)
    torch.testing.assert_close(got, doubled(x), rtol=1e-5, atol=1e-6)


def strange_inputs(dtype=FP32) -> dict[str, torch.Tensor]:
    x = make_x(4, 6, K, dtype=dtype)
    return {
        "2-D": x[0],
        "3-D": x,
        "4-D": x.view(2, 2, 6, K),
        "1-D": x[0, 0],
        "one token": x[:1, :1],
        "no token": x[:0],
        "no token in 3-D": x[:, :0],
        "transposed": x.transpose(0, 1),
        "neurons not adjacent": x.transpose(1, 2).contiguous().transpose(1, 2),
        "every second token": x[:, ::2],
        "inside a larger tensor": torch.cat([x, x], -1)[..., 5 : 5 + K],
        "expanded": x[:1].expand(4, 6, K),
    }


@pytest.mark.parametrize("kind", strange_inputs())
@pytest.mark.parametrize("name", ["fp32", "bf16, adapter fp32", "autocast", "Conv1D"])
def test_shapes_and_strides(name, kind, fused_calls):
    plain, dtype, context = case(name)
    x = strange_inputs(dtype)[kind]
    if name == "Conv1D":
        try:
            x.view(-1, K)
        except RuntimeError:
            pytest.skip("transformers' Conv1D itself takes no such x")
    with torch.no_grad(), context():
        got, pefts = accelerated(plain)(x), plain(x)
    assert fused_calls
    assert_no_worse(got, pefts, copy.deepcopy(plain).double()(x.double()))


def gradients(model, x, context=contextlib.nullcontext, run=lambda model, x: model(x)):
    """Of x and of every parameter, adapters and base alike."""
    model = copy.deepcopy(model)
    x = x.detach().clone().requires_grad_()
    model.requires_grad_(True)
    with context():
        y = run(model, x)
        weight = make_x(*y.shape, seed=8).to(y.dtype)
    (y * weight).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"x": x.grad, **found}


WIDENED = [
    ("bf16, adapter fp32", FP32),
    ("fp16, adapter fp32", FP32),
    ("autocast of bf16", BF16),
    ("three adapters bf16", FP32),
    ("fp32, adapter fp64", FP64),
    ("fp32, adapter fp64, autocast", FP64),
]


@pytest.mark.parametrize(("name", "product"), WIDENED)
def test_wide_copies_of_x_are_not_made(name, product, fused_calls):
    """Widening x is exact, so the operator gets x itself and does it on the fly."""
    plain, dtype, context = case(name)
    x = make_x(5, K, dtype=dtype)
    with torch.no_grad(), context():
        accelerated(plain)(x)
    assert fused_calls
    for call in fused_calls:
        assert call.x is x
        assert call.dtype == product


def test_x_is_narrowed_for_good(fused_calls):
    """As PEFT does: the second adapter, wider again, sees what the first one's dtype left of x."""
    plain = one_layer(adapters=2)
    for module in (layer_of(plain).lora_A, layer_of(plain).lora_B):
        module["default"].to(BF16)
    x = make_x(5, K)
    with torch.no_grad():
        got, pefts = accelerated(plain)(x), plain(x)
        dense = copy.deepcopy(layer_of(plain)).double()
        want = dense.base_layer(x.double())
        for key in ("default", "second"):
            z = dense.lora_A[key](x.bfloat16().double())
            want = want + dense.lora_B[key](z) * dense.scaling[key]
    assert [call.x.dtype for call in fused_calls] == [BF16, BF16]
    assert [call.dtype for call in fused_calls] == [BF16, FP32]
    assert_no_worse(got, pefts, want)


@pytest.mark.parametrize("r", [1, 8, 64])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, r, fused_calls):
    plain, dtype, context = case(name, r)
    x = make_x(6, 9, K, dtype=dtype)
    got, pefts = gradients(accelerated(plain), x, context), gradients(plain, x, context)
    want = gradients(copy.deepcopy(plain).double(), x.double())
    assert fused_calls
    assert list(got) == list(pefts)
    assert {"lora_A", "lora_B"} <= {part for key in got for part in key.split(".")}
    for key in want:
        assert_no_worse(got[key], pefts[key], want[key], key)


@pytest.mark.parametrize("kind", ["2-D", "4-D", "transposed", "no token", "expanded"])
def test_gradients_of_strange_inputs(kind):
    plain, *_ = case("fp32")
    x = strange_inputs()[kind]
    got, pefts = gradients(accelerated(plain), x), gradients(plain, x)
    want = gradients(copy.deepcopy(plain).double(), x.double())
    for key in want:
        assert_no_worse(got[key], pefts[key], want[key], key)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["fp32", "bf16, adapter fp32", "autocast", "lora_bias"])
def test_gradients_under_checkpointing(name, reentrant, fused_calls):
    plain, dtype, context = case(name)
    plain.train()
    x = make_x(6, 9, K, dtype=dtype)

    def run(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    got = gradients(accelerated(plain), x, context, run)
    assert len(fused_calls) == 2, "the checkpoint did not run the layer again"
    pefts = gradients(plain, x, context, run)
    want = gradients(copy.deepcopy(plain).double(), x.double())
    for key in want:
        assert_no_worse(got[key], pefts[key], want[key], key)


def test_only_the_adapter_is_trained():
    """As PEFT trains: x and the base need no gradient."""
    model = accelerated(one_layer())
    model(make_x(4, K)).sum().backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {name for name, _ in model.named_parameters() if "lora_" in name}


def whole(name: str, dtype):
    if name == "llama":
        return hm.lora(hm.llama(dtype=dtype)), hm.token_batch([7, 3], side="left")
    if name == "gpt2":
        return hm.lora(hm.gpt2(dtype=dtype)), hm.token_batch([7, 3])
    return hm.lora(hm.t5(dtype=dtype)), hm.pair_batch([7, 3], [4, 2])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_whole_models(name, dtype, fused_calls):
    plain, batch = whole(name, dtype)
    fused = accelerated(plain)
    with torch.no_grad():
        want = copy.deepcopy(plain).double()(**batch).logits
        got, pefts = fused(**batch).logits, plain(**batch).logits
    assert len(fused_calls) == sum(isinstance(m, FusedLoraLinear) for m in fused.modules()) > 0
    assert_no_worse(got, pefts, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_training_step_with_gradient_checkpointing(reentrant, fused_calls):
    plain, batch = whole("llama", FP32)
    plain.train()
    plain.gradient_checkpointing_enable({"use_reentrant": reentrant})
    plain.enable_input_require_grads()
    fused = accelerated(plain)
    for model in (fused, plain):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    assert len(fused_calls) == 2 * 14
    exact = copy.deepcopy(plain).double()
    exact.zero_grad()
    exact(**batch, labels=batch["input_ids"]).loss.backward()
    truth, pefts = dict(exact.named_parameters()), dict(plain.named_parameters())
    for name, parameter in fused.named_parameters():
        if "lora_" in name:
            assert_no_worse(parameter.grad, pefts[name].grad, truth[name].grad, name)


# ------------------------------------------------------------------ reports


def test_report_names_every_layer():
    model = hm.lora(hm.llama(layers=1), targets=["q_proj", "up_proj", "embed_tokens", "lm_head"])
    report = uf.accelerate(model)
    layer = "base_model.model.model.layers.0"
    assert report.fused == [
        f"{layer}.self_attn.q_proj",
        f"{layer}.mlp.up_proj",
        "base_model.model.lm_head",
    ]
    assert list(report.kept) == ["base_model.model.model.embed_tokens"]
    assert "Embedding" in report.kept["base_model.model.model.embed_tokens"]
    text = str(report)
    assert "3 of 4" in text
    assert "embed_tokens" in text
    assert "Embedding" in text


def test_dora_is_kept_and_named():
    model = hm.lora(hm.llama(layers=1), use_dora=True)
    report = uf.accelerate(model)
    assert not report.fused
    assert len(report.kept) == 7
    assert all("Dora" in reason for reason in report.kept.values())
    text = str(report)
    assert "0 of 7" in text
    assert "q_proj" in text
    assert "and 4 more" in text
    assert not any(isinstance(m, FusedLoraLinear) for m in model.modules())


def test_nothing_to_accelerate_is_said():
    model = hm.llama(layers=1)
    report = uf.accelerate(model)
    assert (report.fused, report.kept) == ([], {})
    assert "no LoRA layer" in str(report)
    assert uf.restore(model) == 0


def test_subclasses_and_sharded_weights_are_kept():
    class Own(peft_lora.Linear):
        pass

    model = one_layer()
    layer_of(model).__class__ = Own
    assert list(uf.accelerate(model).kept.values()) == ["Own has its own forward"]
    assert type(layer_of(model)) is Own

    model = one_layer()
    layer_of(model).base_layer.weight.ds_id = 3
    (reason,) = uf.accelerate(model).kept.values()
    assert "ZeRO-3" in reason

    model = one_layer()
    layer_of(model).base_layer._hf_tp_plan = "colwise"
    (reason,) = uf.accelerate(model).kept.values()
    assert "tensor parallel" in reason


QUANTISED_KINDS = {
    "awq.AwqLoraLinear": "AWQ",
    "aqlm.AqlmLoraLinear": "AQLM",
    "torchao.TorchaoLoraLinear": "torchao",
    "te.TeLinear": "Transformer Engine",
}


@pytest.mark.parametrize("where", QUANTISED_KINDS)
def test_layers_over_other_quantised_bases_are_kept_and_named(where):
    """The class decides: their libraries need not be installed to have it."""
    module, _, name = where.rpartition(".")
    cls = getattr(importlib.import_module(f"peft.tuners.lora.{module}"), name)
    model = one_layer()
    layer_of(model).__class__ = cls
    report = uf.accelerate(model)
    assert not report.fused
    assert list(report.kept.values()) == [f"{name} ({QUANTISED_KINDS[where]}) has its own forward"]
    assert type(layer_of(model)) is cls


def test_a_subclass_of_ours_takes_pefts_forward(fused_calls):
    """FSDP and parametrisations make such classes, around something that must run."""
    model = accelerated(one_layer())

    class Wrapped(type(layer_of(model))):
        pass

    layer_of(model).__class__ = Wrapped
    x = make_x(3, K)
    want = layer_of(model).base_layer(x)
    assert not torch.equal(model(x), want)
    assert not fused_calls
    assert list(uf.accelerate(model).kept.values()) == ["Wrapped has its own forward"]
    assert uf.restore(model) == 0
    assert type(layer_of(model)) is Wrapped


@pytest.mark.parametrize("method", ["pissa", "olora", "eva", "gaussian", "orthogonal"])
def test_other_initialisations_are_ordinary_layers(method, fused_calls):
    if method == "eva":
        config = peft.LoraConfig(
            r=4,
            target_modules=["dense"],
            init_lora_weights="eva",
            eva_config=peft.EvaConfig(),
        )
    else:
        config = peft.LoraConfig(r=4, target_modules=["dense"], init_lora_weights=method)
    plain = peft.get_peft_model(One(nn.Linear(K, N)), config).eval()
    x = make_x(5, K)
    torch.testing.assert_close(accelerated(plain)(x), plain(x), rtol=1e-5, atol=1e-6)
    assert fused_calls


def test_accelerating_twice_and_after_new_adapters(fused_calls):
    model = hm.lora(hm.llama(layers=1), targets=["q_proj"])
    assert len(uf.accelerate(model).fused) == 1
    assert len(uf.accelerate(model).fused) == 1
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    report = uf.accelerate(model)
    assert [name.rpartition(".")[2] for name in report.fused] == ["q_proj", "v_proj"]
    model.set_adapter("second")
    model(**hm.token_batch([4]))
    assert len(fused_calls) == 2


def test_without_the_peft_model_around_it(fused_calls):
    model = hm.lora(hm.llama(layers=1)).base_model.model
    assert len(uf.accelerate(model).fused) == 7
    model(**hm.token_batch([4]))
    assert len(fused_calls) == 7
    assert uf.restore(model) == 7


def test_a_single_layer_can_be_accelerated(fused_calls):
    layer = layer_of(one_layer())
    assert uf.accelerate(layer).fused == [""]
    layer(make_x(2, K))
    layer(x=make_x(2, K))
    assert len(fused_calls) == 2


# ------------------------------------------------------------------ no trace


def traces(model: nn.Module) -> dict:
    return {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()}


def test_restore_leaves_no_trace(fused_calls):
    model, batch = whole("llama", FP32)
    before, weights = traces(model), {k: v.clone() for k, v in model.state_dict().items()}
    outputs = model(**batch).logits
    parameters = [id(p) for p in model.parameters()]
    uf.accelerate(model)
    during = traces(model)
    assert [keys for _, keys in during.values()] == [keys for _, keys in before.values()]
    assert list(model.state_dict()) == list(weights)
    model(**batch).logits.sum().backward()
    model.zero_grad()
    uf.collect(model, [batch])
    fused_calls.clear()
    assert uf.restore(model) == 14
    assert traces(model) == before
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert type(layer) is peft_lora.Linear
    assert [id(p) for p in model.parameters()] == parameters
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[k], weights[k]) for k in weights)
    assert torch.equal(model(**batch).logits, outputs)
    assert not fused_calls
    assert uf.restore(model) == 0


def test_repr_shows_which_forward_runs():
    model = one_layer()
    text = repr(model)
    uf.accelerate(model)
    assert repr(model) == text.replace("lora.Linear", "lora.FusedLinear")
    assert isinstance(layer_of(model), peft_lora.Linear)


# ------------------------------------------------------------------ PEFT's methods meanwhile


@pytest.fixture
def pair():
    """The same model plain and accelerated, with a second adapter that is not active."""
    plain = hm.lora(hm.llama(layers=1))
    plain.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    hm.randomise(plain, "second", seed=4)
    return plain, accelerated(plain)


BATCH = hm.token_batch([6, 3])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def assert_alike(fused, plain) -> None:
    torch.testing.assert_close(logits(fused), logits(plain), rtol=1e-5, atol=1e-6)


def test_save_pretrained(pair, tmp_path, fused_calls):
    plain, fused = pair
    for name, model in (("plain", plain), ("fused", fused)):
        model.save_pretrained(tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*.*"))
    assert len(files) >= 4
    for file in files:
        mine, theirs = ((tmp_path / name / file).read_bytes() for name in ("fused", "plain"))
        if file.suffix == ".json":
            # PEFT writes sets (target_modules) in any order.
            mine, theirs = (
                {k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
                for text in (mine, theirs)
            )
        assert mine == theirs, file
    loaded = peft.PeftModel.from_pretrained(hm.llama(layers=1), tmp_path / "fused").eval()
    assert torch.equal(logits(loaded), logits(plain))
    assert not fused_calls


def test_deepcopy(pair, fused_calls):
    plain, fused = pair
    twin = copy.deepcopy(fused)
    assert_alike(twin, plain)
    assert len(fused_calls) == 7
    uf.restore(twin)
    logits(fused)
    assert len(fused_calls) == 14
    with torch.no_grad():
        twin.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.zero_()
    assert_alike(fused, plain)


@pytest.mark.parametrize("way", ["torch.save", "pickle"])
def test_pickle_keeps_the_fused_forward(pair, way, fused_calls):
    plain, fused = pair
    if way == "pickle":
        loaded = pickle.loads(pickle.dumps(fused))
    else:
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    assert_alike(loaded, plain)
    assert len(fused_calls) == 7, "the loaded model runs PEFT's own forward"
    assert uf.restore(loaded) == 7
    assert torch.equal(logits(loaded), logits(plain))


def test_a_pickled_plain_model_stays_plain(pair, fused_calls):
    plain, _ = pair
    logits(pickle.loads(pickle.dumps(plain)))
    assert not fused_calls


def test_merge_and_unmerge(pair, fused_calls):
    plain, fused = pair
    for model in pair:
        model.merge_adapter()
    assert torch.equal(logits(fused), logits(plain))
    assert not fused_calls, "a merged layer must not add its adapter once more"
    for model in pair:
        model.unmerge_adapter()
    assert_alike(fused, plain)
    assert len(fused_calls) == 7


def test_merge_and_unload(pair, fused_calls):
    plain, fused = pair
    one, other = plain.merge_and_unload(), fused.merge_and_unload()
    assert not any(isinstance(m, peft_lora.LoraLayer) for m in other.modules())
    assert torch.equal(logits(other), logits(one))
    assert not fused_calls


def test_unload(pair):
    plain, fused = pair
    assert torch.equal(logits(fused.unload()), logits(plain.unload()))


def test_disable_adapter(pair, fused_calls):
    plain, fused = pair
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(logits(fused), logits(plain))
        assert torch.equal(logits(fused), logits(hm.llama(layers=1)))
        assert not fused_calls
    assert_alike(fused, plain)
    assert len(fused_calls) == 7


def test_set_adapter(pair, fused_calls):
    plain, fused = pair
    both = {}
    for active, calls in (("second", 2), ("default", 7), (["default", "second"], 9)):
        for model in pair:
            model.base_model.set_adapter(active)
        fused_calls.clear()
        assert_alike(fused, plain)
        assert len(fused_calls) == calls
        both[str(active)] = logits(fused)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(both.values(), 2))


def test_add_load_delete_and_weighted_adapters(pair, tmp_path, fused_calls):
    plain, fused = pair
    plain.save_pretrained(tmp_path)
    for model in pair:
        model.add_adapter("third", peft.LoraConfig(r=5, target_modules=["q_proj", "k_proj"]))
        hm.randomise(model, "third", seed=6)
        model.set_adapter("third")
    fused_calls.clear()
    assert_alike(fused, plain)
    assert len(fused_calls) == 2
    for model in pair:
        model.load_adapter(tmp_path / "second", "loaded")
        model.set_adapter("loaded")
    assert_alike(fused, plain)
    for model in pair:
        model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "mixed", "cat")
        model.set_adapter("mixed")
    assert_alike(fused, plain)
    for model in pair:
        model.delete_adapter("mixed")
        model.set_adapter("default")
    assert_alike(fused, plain)


def test_scale_and_dtype_changes(pair, fused_calls):
    plain, fused = pair
    for model in pair:
        for module in model.modules():
            if isinstance(module, peft_lora.LoraLayer):
                module.scale_layer(0.3)
    assert_alike(fused, plain)
    plain.double()
    fused.double()
    torch.testing.assert_close(logits(fused), logits(plain), rtol=1e-12, atol=1e-12)
    assert len(fused_calls) == 14


def test_adapter_names_of_a_mixed_batch(pair, fused_calls):
    plain, fused = pair
    options = {**BATCH, "adapter_names": ["second", "__base__"]}
    with torch.no_grad():
        assert torch.equal(fused(**options).logits, plain(**options).logits)
    assert not fused_calls


# ------------------------------------------------------------------ falling back, call by call


def test_dropout_in_training_is_pefts_own(fused_calls):
    plain = one_layer(dropout=0.5)
    fused = accelerated(plain)
    x = make_x(30, K)
    for model in (plain, fused):
        model.train()
    torch.manual_seed(3)
    want = plain(x)
    torch.manual_seed(3)
    assert torch.equal(fused(x), want)
    assert not fused_calls
    torch.manual_seed(4)
    assert not torch.equal(fused(x), want)
    fused.eval()
    plain.eval()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-6)
    assert len(fused_calls) == 1


def test_dropout_alone_in_training_is_pefts_own(fused_calls):
    """Monte Carlo dropout: the model is in eval mode, the dropout modules are not."""
    plain = one_layer(dropout=0.5)
    fused = accelerated(plain)
    for model in (plain, fused):
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
    x = torch.randn(3, K)
    torch.manual_seed(0)
    expected = plain(x)
    torch.manual_seed(0)
    assert torch.equal(fused(x), expected)
    assert not fused_calls


@pytest.mark.parametrize("where", ["lora_A", "lora_B", "lora_dropout"])
def test_a_part_with_a_forward_of_its_own_is_called(where, fused_calls):
    plain = one_layer(dropout=0.5).eval()
    fused = accelerated(plain).eval()
    for model in (plain, fused):
        part = getattr(layer_of(model), where)["default"]
        part.forward = lambda x, own=part.forward: 2 * own(x) + 1
    x = torch.randn(3, K)
    assert torch.equal(fused(x), plain(x))
    assert not fused_calls


def test_another_module_in_the_place_of_dropout_is_called(fused_calls):
    plain = one_layer(dropout=0.5).eval()
    layer_of(plain).lora_dropout["default"] = nn.LayerNorm(K)
    x = torch.randn(3, K)
    expected = plain(x)
    assert torch.equal(accelerated(plain)(x), expected)
    assert not fused_calls


def test_a_scaling_that_is_a_tensor(fused_calls):
    plain = one_layer()
    layer_of(plain).scaling["default"] = torch.linspace(0.5, 2, N)
    x = torch.randn(3, K)
    expected = plain(x)
    assert torch.equal(accelerated(plain)(x), expected)
    assert not fused_calls


def test_training_without_dropout_is_fused(fused_calls):
    fused = accelerated(one_layer()).train()
    fused(make_x(3, K))
    assert len(fused_calls) == 1


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "dropout"])
def test_hooks_on_inner_modules_fire(kind):
    fused = accelerated(one_layer(dropout=0.1))
    layer, fired = layer_of(fused), []

    def hook(*_):
        fired.append(1)

    inner = {
        "forward": [layer.lora_A["default"], layer.lora_B["default"]],
        "pre": [layer.lora_A["default"], layer.lora_B["default"]],
        "backward": [layer.lora_A["default"], layer.lora_B["default"]],
        "dropout": [layer.lora_dropout["default"]],
    }[kind]
    handles = []
    for module in inner:
        register = {
            "forward": module.register_forward_hook,
            "dropout": module.register_forward_hook,
            "pre": module.register_forward_pre_hook,
            "backward": module.register_full_backward_hook,
        }[kind]
        handles.append(register(hook))
    x = make_x(4, K).requires_grad_()
    fused(x).sum().backward()
    assert len(fired) == len(inner)
    for handle in handles:
        handle.remove()
    fused(x)
    assert len(fired) == len(inner)


def test_a_hook_that_changes_the_result_is_obeyed(fused_calls):
    plain = one_layer()
    fused = accelerated(plain)
    for model in (plain, fused):
        layer_of(model).lora_B["default"].register_forward_hook(lambda _m, _x, y: y * 3)
    x = make_x(4, K)
    assert torch.equal(fused(x), plain(x))
    assert not fused_calls


def test_hooks_on_all_modules_fire(fused_calls):
    """Those of torch.nn.modules.module: profilers and module trackers use them."""
    fused, fired = accelerated(one_layer()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: fired.append(m))
    try:
        fused(make_x(4, K))
    finally:
        handle.remove()
    layer = layer_of(fused)
    assert layer.lora_A["default"] in fired
    assert layer.lora_B["default"] in fired
    assert not fused_calls


def test_hooks_on_the_layer_and_on_its_base_fire(fused_calls):
    fused = accelerated(one_layer())
    layer, fired = layer_of(fused), []
    layer.register_forward_hook(lambda *_: fired.append("layer"))
    layer.base_layer.register_forward_hook(lambda *_: fired.append("base"))
    fused(make_x(4, K))
    assert fired == ["base", "layer"]
    assert fused_calls


def change_nothing(layer):
    pass


def replace_a(layer):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.lora_A["default"].__class__ = Doubled


def parametrise_b(layer):
    class Squared(nn.Module):
        def forward(self, weight):
            return weight * weight

    nn.utils.parametrize.register_parametrization(layer.lora_B["default"], "weight", Squared())


def bias_on_a(layer):
    layer.lora_A["default"].bias = nn.Parameter(torch.ones(layer.lora_A["default"].out_features))


def other_dtypes(layer):
    layer.lora_B["default"].to(FP64)


def add_dora(layer):
    config = peft.LoraConfig(r=2, lora_alpha=4, use_dora=True)
    layer.update_layer("dora", r=2, lora_alpha=4, config=config)
    layer.set_adapter(["default", "dora"])


@pytest.mark.parametrize(
    ("change", "falls_back"),
    [
        (change_nothing, False),
        (replace_a, True),
        (parametrise_b, True),
        (bias_on_a, True),
        (add_dora, True),
    ],
)
def test_layers_changed_after_acceleration(change, falls_back, fused_calls):
    plain = one_layer()
    fused = accelerated(plain)
    for model in (plain, fused):
        torch.manual_seed(1)
        change(layer_of(model))
    x = make_x(4, K)
    if falls_back:
        assert torch.equal(fused(x), plain(x))
        assert not fused_calls
    else:
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-6)
        assert fused_calls


def test_another_forward_of_all_linear_layers_is_pefts_own(monkeypatch, fused_calls):
    plain = one_layer()
    fused, real = accelerated(plain), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * real(self, x))
    x = make_x(4, K)
    assert torch.equal(fused(x), plain(x))
    assert not fused_calls


def test_a_model_moved_to_meta_runs_as_pefts():
    fused = accelerated(one_layer()).to("meta")
    assert fused(make_x(4, K).to("meta")).shape == (4, N)


def test_a_scaling_of_true_is_one():
    plain = one_layer()
    fused = accelerated(plain)
    for model in (plain, fused):
        layer_of(model).scaling["default"] = True
    x = make_x(4, K)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, K), (1, K), (7, K), (2, 65, K), (K,)])
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_without_gradients_the_sum_is_taken_in_place(shape, dtype):
    """The base product's own memory; never what somebody else may hold."""
    plain = one_layer(base=dtype, adapter=dtype)
    fused, x = accelerated(plain), make_x(*shape, dtype=dtype)
    with torch.no_grad():
        wanted, exact = plain(x), copy.deepcopy(plain).double()(x.double())
        results = [fused(x) for _ in range(2)]
        assert_no_worse(results[0], wanted, exact, "y")
        assert torch.equal(*results)
        kept = []
        layer_of(fused).base_layer.register_forward_hook(lambda *given: kept.append(given[2]))
        fused(x)
        assert torch.equal(kept[0], layer_of(plain).base_layer(x))


def test_a_and_b_of_different_dtypes_fail_as_in_peft():
    """PEFT's error, not a silent cast of ours."""
    plain = one_layer()
    fused = accelerated(plain)
    errors = []
    for model in (plain, fused):
        other_dtypes(layer_of(model))
        with pytest.raises(RuntimeError) as caught:
            model(make_x(4, K))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_disabled_input_casting_is_pefts_own(fused_calls):
    plain = one_layer(base=BF16, adapter=BF16)
    fused = accelerated(plain)
    x = make_x(4, K, dtype=BF16)
    with peft.helpers.disable_input_dtype_casting(plain):
        want = plain(x)
    with peft.helpers.disable_input_dtype_casting(fused):
        assert torch.equal(fused(x), want)
    assert not fused_calls


# ------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("name", ["fp32", "bf16, adapter fp32", "three adapters", "lora_bias"])
def test_compile_without_graph_breaks(name):
    plain, dtype, _ = case(name)
    fused = accelerated(plain)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    x = make_x(4, 5, K, dtype=dtype)
    assert torch.equal(compiled(x), fused(x))


def test_compile_traces_gradients():
    x = make_x(4, 5, K)
    eager, compiled = accelerated(one_layer()), accelerated(one_layer())
    torch._dynamo.reset()
    torch.compile(compiled, backend="aot_eager", fullgraph=True)(x).sum().backward()
    eager(x).sum().backward()
    want = dict(eager.named_parameters())
    for name, parameter in compiled.named_parameters():
        assert (parameter.grad is None) == ("lora_" not in name)
        torch.testing.assert_close(parameter.grad, want[name].grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "dual tensor"])
def test_compile_with_other_derivatives(backend, transform):
    """Only PyTorch's own operators have rules for those."""
    plain = one_layer().requires_grad_(False)
    fused = accelerated(plain)
    x, tangent = make_x(4, K), make_x(4, K, seed=1)

    def run(model):
        torch._dynamo.reset()
        if transform == "dual tensor":
            compiled = torch.compile(model, backend=backend)
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, tangent))).tangent
        transformed = {
            "jvp": lambda x: torch.func.jvp(model, (x,), (tangent,))[1],
            "grad": torch.func.grad(lambda x: model(x).square().sum()),
            "vmap": torch.func.vmap(model),
        }[transform]
        return torch.compile(transformed, backend=backend)(x)

    torch.testing.assert_close(run(fused), run(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize("base", [FP32, BF16])
def test_jit_trace_holds_pytorchs_own_operators(rows, base):
    plain = one_layer(base=base, adapter=FP32)
    fused, x = accelerated(plain), make_x(rows, K, dtype=base)
    with torch.no_grad():
        traced = torch.jit.trace(fused, x)
        assert not [n for n in traced.inlined_graph.nodes() if "ucan_fast" in n.kind()]
        other = make_x(rows, K, seed=1, dtype=base)
        torch.testing.assert_close(traced(other), plain(other))


def test_compile_notices_what_changes_between_calls():
    """Merged, disabled, dropout: each call's state, not that of the first."""
    plain = one_layer(dropout=0.5)
    fused = accelerated(plain)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="eager")
    x = make_x(4, K)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-6)
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(compiled(x), plain(x))
    for model in (plain, fused):
        model.merge_adapter()
    assert torch.equal(compiled(x), plain(x))
    for model in (plain, fused):
        model.unmerge_adapter()
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-6)
