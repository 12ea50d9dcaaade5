"""The Triton path from end to end: accelerate, collect, make_plan, apply, nothing left out.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections import Counter
from collections.abc import Callable

import helpers_models as hm
import pytest
import torch
from oracle import assert_equals_hooks, assert_same_stats, hook_sums
from torch import nn

import ucan_fast as uf
from ucan_fast import kernels, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if kernels.obstacle(DEVICE):
    pytest.skip(f"Triton kernels: {kernels.obstacle(DEVICE)}", allow_module_level=True)

LAUNCHERS = {
    "shrink": "shrink",
    "expand": "expand",
    "moments": "accumulate_moments_",
    "scores": "contrastive_scores",
    "attenuate": "attenuate_",
}
REFERENCES = {
    "shrink": ["shrink_reference"],
    "expand": ["expand_reference", "delta_reference"],
    "moments": ["moments_reference"],
    "scores": ["scores_reference", "factors_reference"],
    "attenuate": ["attenuate_reference_"],
}


@pytest.fixture
def launches(monkeypatch) -> dict[str, list[tuple]]:
    """The arguments of every launcher call, under the backend ``triton``."""
    calls: dict[str, list[tuple]] = {}
    for name, function in LAUNCHERS.items():
        module = importlib.import_module(f"ucan_fast.kernels.{name}")
        calls[name] = []
        monkeypatch.setattr(module, function, counting(getattr(module, function), calls[name]))
    monkeypatch.setenv("UCAN_FAST_BACKEND", "triton")
    return calls


def counting(real: Callable, seen: list[tuple]) -> Callable:
    def counted(*args, **kwargs):
        seen.append(args)
        return real(*args, **kwargs)

    return counted


@pytest.fixture
def no_reference(monkeypatch) -> None:
    """Any reference that runs is an error: a fallback would look the same from outside."""

    def forbidden(*_args, **_kwargs):
        raise AssertionError("a reference ran under UCAN_FAST_BACKEND=triton")

    for operator, names in REFERENCES.items():
        module = importlib.import_module(f"ucan_fast.ops.{operator}")
        for name in names:
            monkeypatch.setattr(module, name, forbidden)


def model_and_batches(dtype=torch.float32) -> tuple[nn.Module, list[dict], list[dict]]:
    model = hm.lora(hm.llama(layers=2, dtype=dtype)).to(DEVICE)
    forget = [batch_of(range(3, 14), 1)]
    retain = [batch_of(range(14, hm.VOCAB), seed) for seed in (2, 3)]
    return model, forget, retain


def batch_of(items: range, seed: int) -> dict[str, torch.Tensor]:
    batch = hm.token_batch([7, 3 + seed], seed=seed)
    ids = items[0] + batch["input_ids"] % len(items)
    return {**batch, "input_ids": ids}


def test_every_layer_goes_through_the_kernels(launches, no_reference):
    model, forget, retain = model_and_batches()
    layers = len(uf.accelerate(model).fused)
    assert layers == 14
    bank = uf.collect(model, forget + retain)
    batches = len(forget + retain)
    ranks = sum(m.lora_A["default"].weight.shape[0] for m in fused(model))
    # q, k and v (and gate and up) share a launch: the ranks of all layers, not the calls, count.
    assert sum(args[1].shape[0] for args in launches["shrink"]) == ranks * batches
    assert len(launches["shrink"]) == 2 * 4 * batches
    assert len(launches["expand"]) == layers * batches
    assert not launches["scores"]
    stats = bank.with_forget(uf.collect(model, forget, group="forget"))
    plan = uf.make_plan(model, stats, uf.UcanConfig(strength=2.0, min_score=0.0))
    assert len(launches["scores"]) == 1
    assert plan.attenuated
    before = {name: p.clone() for name, p in model.named_parameters()}
    plan.apply(model)
    assert len(launches["attenuate"]) == 1
    assert len(launches["attenuate"][0][0]) == layers
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_A" in name for name in changed)
    plan.undo(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_unlearn_goes_through_the_kernels(launches, no_reference):
    model, forget, retain = model_and_batches()
    uf.accelerate(model)
    config = uf.UcanConfig(strength=1.0, min_score=0.0)
    result = uf.unlearn(model, forget=forget, retain=retain, config=config, evaluate=False)
    assert result.plan.attenuated
    assert launches["shrink"]
    assert launches["expand"]
    assert len(launches["attenuate"]) == 1


def test_layers_that_are_not_accelerated_are_measured_by_the_moments_kernel(launches):
    model, forget, _ = model_and_batches()
    uf.collect(model, forget)
    assert not launches["shrink"]
    assert not launches["expand"]
    # q, k, v and gate, up share their input's moments: 4 inputs, 7 z and 7 δ a block.
    assert len(launches["moments"]) == 2 * (4 + 7 + 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", ["mixed", "one"])
def test_statistics_equal_the_hooks(dtype, group, monkeypatch):
    model = hm.lora(hm.llama(layers=1, dtype=dtype)).to(DEVICE)
    groups = {"groups": "mixed"} if group == "mixed" else {}
    made = [hm.token_batch([7, 3], seed=s, side=side, **groups) for s, side in SIDES]
    batches = [{key: value.to(DEVICE) for key, value in batch.items()} for batch in made]
    monkeypatch.setenv("UCAN_FAST_BACKEND", "triton")
    stats = uf.collect(accelerated(model), batches)
    expected = hook_sums(model, batches, accelerated=True)
    assert_equals_hooks(stats, expected, rel=1e-6 if DEVICE == "cpu" else CUDA_ROUNDING)


#: There z and δ are products of parts (three tf32 or bf16 dots), rounded otherwise than torch's.
CUDA_ROUNDING = 4e-6
SIDES = [(1, "left"), (2, "right")]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def measured(request) -> tuple[nn.Module, dict[str, uf.ActivationStats]]:
    """A model and its statistics by backend, which hold every site's neurons."""
    torch.manual_seed(0)
    model, forget, retain = model_and_batches(request.param)
    uf.accelerate(model)
    stats = {}
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            bank = uf.collect(model, forget + retain)
            stats[backend] = bank.with_forget(uf.collect(model, forget, group="forget"))
    return model, stats


@pytest.mark.parametrize("site", ["input", "rank", "output", "mlp"])
def test_the_plan_is_the_references(site, measured):
    """The same neurons, and γ within rounding."""
    model, stats = measured
    config = uf.UcanConfig(site=site, strength=2.0, min_score=0.0)
    plans = {}
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            plans[backend] = uf.make_plan(model, stats[backend], config)
    expected, got = plans["reference"], plans["triton"]
    assert expected.attenuated
    margin = (expected.flat_score - expected.threshold).abs()
    differ = (got.flat_factors < 1) != (expected.flat_factors < 1)
    # In bf16 a rounding that falls the other way moves an activation by 2^-8.
    slack = 1e-5 if model.dtype is torch.float32 else 2e-2
    assert not (differ & (margin > slack)).any()
    torch.testing.assert_close(
        got.flat_score, expected.flat_score, rtol=0, atol=slack, check_dtype=True
    )


def test_the_same_bits_twice_and_with_the_batch_alone(monkeypatch):
    """A forget set that ran in the bank as whole batches leaves the bank exactly."""
    monkeypatch.setenv("UCAN_FAST_BACKEND", "triton")
    model, forget, retain = model_and_batches()
    uf.accelerate(model)
    bank = uf.collect(model, retain + forget)
    assert_same_stats(bank, uf.collect(model, retain + forget))
    deleted = uf.collect(model, forget, group="forget")
    assert_same_stats(bank.with_forget(deleted), uf.collect(model, retain) + deleted, 1e-9)


def test_training_gradients_equal_pefts(launches):
    """One batch's error is one draw of the whole model's rounding, ours or PEFT's six times the
    other's by luck, and in a sum over batches one of them decides. Judged is each parameter's
    geometric mean over sixteen."""
    plain, _, _ = model_and_batches()
    fused_model = accelerated(plain)
    exact = copy.deepcopy(plain).double()
    mine, theirs = Counter(), Counter()
    for seed in range(16):
        batch = batch_of(range(3, hm.VOCAB), seed)
        truth = gradients(exact, batch)
        for model, errors in ((fused_model, mine), (plain, theirs)):
            for name, gradient in gradients(model, batch).items():
                error = (gradient.double() - truth[name]).norm() / truth[name].norm()
                errors[name] += math.log(error) / 16
    # A layer that fell back to PEFT's forward would have PEFT's errors, too.
    assert len(launches["expand"]) == 14 * 16
    assert len(mine) == 28
    assert mine.keys() == theirs.keys()
    for name, error in mine.items():
        assert math.exp(error - theirs[name]) <= 2, name


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    batch = {key: value.to(DEVICE) for key, value in batch.items()}
    model(**batch, labels=batch["input_ids"]).loss.backward()
    named = model.named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def test_generation_gives_pefts_tokens(launches):
    model = hm.lora(hm.llama(layers=1)).to(DEVICE)
    prompt = torch.tensor([[1, 5, 9]], device=DEVICE)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=prompt, **options)
    assert torch.equal(accelerated(model).generate(input_ids=prompt, **options), expected)
    assert len(launches["expand"]) == 7 * 4


def accelerated(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    assert uf.accelerate(model).fused
    return model


def fused(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]
