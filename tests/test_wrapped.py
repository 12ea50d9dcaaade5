"""Models inside wrappers: DDP, DataParallel, Accelerator.prepare, torch.compile, generate.

Sharded models (FSDP, ZeRO-3, tensor parallel) keep PEFT's forward and are refused by collect.
"""

from __future__ import annotations

import copy

import helpers_models as hm
import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate_helpers import count_fused_calls
from oracle import assert_same_stats
from peft.tuners import lora as peft_lora
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import ucan_fast as uf

BATCH = hm.token_batch([7, 4], side="left")
MIXED = [hm.token_batch([7, 3], groups="mixed"), hm.token_batch([2, 5], seed=1, groups="mixed")]
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def fused_calls(monkeypatch):
    return count_fused_calls(monkeypatch)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    assert not distributed.is_initialized()
    file = f"file://{tmp_path}/rendezvous"
    distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def accelerator():
    made = []

    def make(**options):
        AcceleratorState._reset_state(True)
        made.append(Accelerator(cpu=True, **options))
        return made[-1]

    yield make
    AcceleratorState._reset_state(True)
    assert made


def llama(dtype=FP32) -> peft.PeftModel:
    return hm.lora(hm.llama(layers=1, dtype=dtype))


def lora_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    loss = model(**BATCH, labels=BATCH["input_ids"]).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name[name.index("base_model") :]: grad for name, grad in found.items()}


def assert_same_gradients(got: dict, want: dict, **close) -> None:
    assert list(got) == list(want)
    assert len(got) == 14
    for name in want:
        assert want[name].abs().max() > 0, name
        torch.testing.assert_close(got[name], want[name], **close)


# ------------------------------------------------------------------ data parallel


@pytest.mark.parametrize("first", [True, False], ids=["accelerated first", "wrapped first"])
@pytest.mark.parametrize("wrapper", [nn.parallel.DistributedDataParallel, nn.DataParallel])
def test_data_parallel(one_process, wrapper, first, fused_calls):
    plain = llama()
    fused = copy.deepcopy(plain)
    names = [n for n, m in plain.named_modules() if isinstance(m, peft_lora.LoraLayer)]
    if first:
        assert uf.accelerate(fused).fused == names
    wrapped = wrapper(fused)
    # Names are those of the model inside, so reports and statistics do not depend on the wrapper.
    assert uf.accelerate(wrapped).fused == names

    got = lora_gradients(wrapped)
    assert len(fused_calls) == 7
    want = lora_gradients(wrapper(plain))
    assert len(fused_calls) == 7
    assert_same_gradients(got, want, rtol=1e-4, atol=1e-7)

    fused_calls.clear()
    assert_same_stats(uf.collect(wrapped, MIXED), uf.collect(fused, MIXED))
    assert fused_calls
    assert uf.restore(wrapped) == 7


def test_a_deletion_through_ddp(one_process):
    model = llama()
    uf.accelerate(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    config = uf.UcanConfig(strength=2.0, fraction=0.3, min_score=0.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = uf.make_plan(wrapped, uf.collect(wrapped, MIXED), config)
    plan.apply(wrapped)
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    plan.undo(wrapped)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ------------------------------------------------------------------ Hugging Face accelerate


@pytest.mark.parametrize("first", [True, False], ids=["accelerated first", "prepared first"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_by_accelerate(accelerator, precision, first, fused_calls):
    """``mixed_precision="bf16"`` runs the model under autocast and widens its outputs."""
    plain = llama()
    helper = accelerator(mixed_precision=precision)
    fused = copy.deepcopy(plain)
    if first:
        uf.accelerate(fused)
    prepared = helper.prepare(fused)
    assert len(uf.accelerate(prepared).fused) == 7

    got = lora_gradients(prepared)
    assert len(fused_calls) == 7
    assert fused_calls[0].dtype == (FP32 if precision == "no" else BF16)
    want = lora_gradients(helper.prepare(plain))
    assert len(fused_calls) == 7
    rough = {"rtol": 1e-4, "atol": 1e-7} if precision == "no" else {"rtol": 0.1, "atol": 2e-3}
    assert_same_gradients(got, want, **rough)

    stats, pefts = uf.collect(prepared, MIXED), uf.collect(plain, MIXED)
    assert_same_stats(stats, pefts, rel=1e-4 if precision == "no" else 0.1)
    unwrapped = helper.unwrap_model(prepared)
    assert uf.restore(unwrapped) == 7


def test_a_prepared_training_loop(accelerator):
    """Steps of an optimizer, then the same weights as PEFT's."""
    helper = accelerator()
    results = []
    for fuse in (False, True):
        model = llama().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = helper.prepare(model, optimizer)
        if fuse:
            uf.accelerate(model)
        for _ in range(3):
            loss = model(**BATCH, labels=BATCH["input_ids"]).loss
            helper.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        results.append({n: p.detach() for n, p in model.named_parameters() if "lora_" in n})
    for name, want in results[0].items():
        torch.testing.assert_close(results[1][name], want, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ torch.compile, generate


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_whole_model_compiles_into_one_graph(dtype):
    model = llama(dtype)
    uf.accelerate(model)
    with torch.no_grad():
        want = model(**BATCH).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        # Eagerly an fp32 sum is taken in the base product's memory, which rounds once less.
        within = {} if dtype == FP32 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(compiled(**BATCH).logits, want, **within)
        longer = hm.token_batch([9, 6], seed=3)
        torch.testing.assert_close(compiled(**longer).logits, model(**longer).logits, **within)


def test_a_compiled_training_step():
    plain = llama()
    fused = copy.deepcopy(plain)
    uf.accelerate(fused)
    want = lora_gradients(plain)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    compiled.train()
    compiled(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    got = {n: p.grad for n, p in fused.named_parameters() if p.grad is not None}
    assert_same_gradients(got, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_generation_gives_pefts_tokens(options, fused_calls):
    plain = hm.lora(hm.llama(layers=2))
    fused = copy.deepcopy(plain)
    uf.accelerate(fused)
    settings = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6, **options}
    want = plain.generate(**BATCH, **settings)
    assert not fused_calls
    got = fused.generate(**BATCH, **settings)
    assert torch.equal(got, want)
    assert len(fused_calls) >= 6 * 14
    tokens = {call.x.shape[-2] for call in fused_calls}
    assert (1 in tokens) == options.get("use_cache", True), "the cache was not used"


# ------------------------------------------------------------------ sharded models


def shard(model: nn.Module, how: str) -> nn.Module:
    if how == "FSDP1":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    layers = model.base_model.model.model.layers
    if how == "FSDP2, every LoRA layer":
        layers = [m for m in model.modules() if isinstance(m, peft_lora.LoraLayer)]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [True, False], ids=["accelerated first", "sharded first"])
@pytest.mark.parametrize("how", ["FSDP1", "FSDP2", "FSDP2, every LoRA layer"])
def test_fsdp_keeps_pefts_forward(one_process, how, first, fused_calls):
    model = llama()
    with torch.no_grad():
        want = model(**BATCH).logits
    if first:
        assert len(uf.accelerate(model).fused) == 7
    sharded = shard(model, how)
    report = uf.accelerate(sharded)
    assert not report.fused
    assert set(report.kept.values()) == {"weights are sharded by FSDP"}
    assert len(report.kept) == 7
    assert "FSDP" in str(report)
    torch.testing.assert_close(sharded(**BATCH).logits, want, rtol=1e-5, atol=1e-6)
    assert not fused_calls
    with pytest.raises(uf.UcanError, match=r"q_proj: weights are sharded by FSDP"):
        uf.collect(sharded, MIXED)
    with pytest.raises(uf.UcanError, match=r"q_proj: weights are sharded by FSDP"):
        uf.unlearn(sharded, forget=MIXED, evaluate=False)


def test_zero3_keeps_pefts_forward_and_is_refused():
    """DeepSpeed marks every parameter with an id."""
    model = llama()
    uf.accelerate(model)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    report = uf.accelerate(model)
    assert not report.fused
    assert set(report.kept.values()) == {"weights are sharded by DeepSpeed ZeRO-3"}
    assert uf.restore(model) == 0, "the layers were not given back"
    with pytest.raises(uf.UcanError, match=r"q_proj .*ZeRO-3"):
        uf.collect(model, MIXED)


@pytest.mark.parametrize("mark", ["_hf_tp_plan", "_hf_device_mesh"])
def test_tensor_parallel_keeps_pefts_forward_and_is_refused(mark):
    """transformers marks the layers that it splits; the others of the model are fused."""
    model = llama()
    split = model.base_model.model.model.layers[0].mlp.down_proj
    setattr(split.base_layer, mark, "rowwise")
    report = uf.accelerate(model)
    assert len(report.fused) == 6
    ((name, reason),) = report.kept.items()
    assert name.endswith("mlp.down_proj")
    assert "tensor parallel" in reason
    with pytest.raises(uf.UcanError, match=r"mlp\.down_proj .*tensor parallel"):
        uf.collect(model, MIXED)
