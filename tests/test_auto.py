"""``import ucan_fast.auto``: models made before and after run the fused forward; disable undoes it.

The module hooks PEFT for the whole process, so each scenario runs in a fork of this one.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable

import helpers_models as hm
import peft
import pytest
import torch
from peft.tuners import lora as peft_lora
from peft.tuners.lora import LoraModel

import ucan_fast as uf
from ucan_fast import ops
from ucan_fast.accelerate import FusedLoraLinear

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the scenarios run in forks")


def run_alone(scenario: Callable, connection, arguments: tuple) -> None:
    torch.set_num_threads(1)
    if (imported := sys.modules.pop("ucan_fast.auto", None)) is not None:
        imported.disable()
        del uf.auto
    try:
        scenario(*arguments)
        connection.send("")
    except BaseException:
        connection.send(traceback.format_exc())


def alone(scenario: Callable, *arguments) -> None:
    """Run in a process of its own; its failure is ours."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_alone, args=(scenario, theirs, arguments))
    process.start()
    try:
        assert ours.poll(60), "the scenario did not end"
        failure = ours.recv()
    finally:
        process.kill()
        process.join()
    assert not failure, failure


def fused(model) -> int:
    return sum(isinstance(m, FusedLoraLinear) for m in model.modules())


def fused_calls(model) -> int:
    """How many layers really run the fused forward."""
    calls, real = [], ops.add_lora

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    ops.add_lora = counted
    try:
        with torch.no_grad():
            model(**hm.token_batch([4, 2]))
    finally:
        ops.add_lora = real
    return len(calls)


def logits(model):
    with torch.no_grad():
        return model(**hm.token_batch([5, 3])).logits


def test_models_made_before_and_after():
    alone(before_and_after)


def before_and_after():
    before = hm.lora(hm.llama(layers=1))
    want = logits(before)
    assert fused(before) == fused_calls(before) == 0

    import ucan_fast.auto

    after = hm.lora(hm.llama(layers=1))
    assert fused(before) == fused_calls(before) == 7
    assert fused(after) == fused_calls(after) == 7
    for model in (before, after):
        torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-6)

    # At least: models of other tests may still be alive in this process.
    assert ucan_fast.auto.disable() >= 14
    assert fused_calls(before) == fused_calls(after) == 0
    assert {type(m) for m in before.modules() if isinstance(m, peft_lora.LoraLayer)} == {
        peft_lora.Linear
    }
    assert torch.equal(logits(before), want)
    assert torch.equal(logits(after), want)
    assert fused(hm.lora(hm.llama(layers=1))) == 0, "PEFT is still hooked"


def test_disable_restores_peft_itself():
    alone(peft_is_untouched)


def peft_is_untouched():
    own = dict(vars(LoraModel))
    method = LoraModel.inject_adapter
    import ucan_fast.auto

    assert LoraModel.inject_adapter is not method
    assert LoraModel.inject_adapter.__name__ == "inject_adapter"
    ucan_fast.auto.disable()
    assert LoraModel.inject_adapter is method
    assert dict(vars(LoraModel)) == own, "an attribute was left on PEFT's class"


def test_enable_and_disable_may_be_repeated():
    alone(repeated)


def repeated():
    model = hm.lora(hm.llama(layers=1))
    method = LoraModel.inject_adapter
    import ucan_fast.auto as auto

    gc.collect()  # what earlier tests left in cycles would go at any moment, and be missed
    living = auto.enable()
    assert living >= 7
    assert auto.enable() == living
    assert auto.disable() == living
    assert auto.disable() == 0
    assert LoraModel.inject_adapter is method
    assert auto.enable() == living
    assert fused_calls(model) == 7
    assert fused(hm.lora(hm.llama(layers=1))) == 7
    auto.disable()
    assert LoraModel.inject_adapter is method


def test_adapters_loaded_and_added_later(tmp_path):
    hm.lora(hm.llama(layers=1)).save_pretrained(tmp_path)
    alone(later, tmp_path)


def later(folder):
    import ucan_fast.auto

    loaded = peft.PeftModel.from_pretrained(hm.llama(layers=1), folder).eval()
    assert fused_calls(loaded) == 7
    started = hm.lora(hm.llama(layers=1), targets=["q_proj"])
    assert fused_calls(started) == 1
    started.load_adapter(folder, "second")
    started.set_adapter("second")
    assert fused(started) == fused_calls(started) == 7
    started.add_adapter("third", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    assert fused(started) == 8
    plain = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["q_proj"]), hm.llama(layers=1)
    )
    assert fused(plain) == fused_calls(plain) == 1
    uf.restore(plain)
    assert fused_calls(plain) == 0
    ucan_fast.auto.disable()
    assert fused(started) == fused(loaded) == 0


def test_what_cannot_be_fused_is_left_to_peft():
    alone(unusual)


def unusual():
    import ucan_fast.auto  # noqa: F401

    model = hm.lora(hm.llama(layers=1), use_dora=True)
    assert fused(model) == 0
    embedding = hm.lora(hm.llama(layers=1), targets=["embed_tokens", "q_proj"])
    assert fused(embedding) == fused_calls(embedding) == 1
    other = peft.get_peft_model(
        hm.llama(layers=1), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    assert fused(other) == 0
    logits(other)


def test_says_once_per_model_why_layers_are_not_fused():
    alone(reasons)


def said(action: Callable) -> tuple[object, list[str]]:
    """What the action returns, and its warnings of ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [str(w.message) for w in caught if issubclass(w.category, uf.UcanWarning)]


def reasons():
    dora = hm.lora(hm.llama(layers=1), targets=["o_proj", "up_proj"], use_dora=True)
    plain = hm.lora(hm.llama(layers=1))

    def enable():
        import ucan_fast.auto

        return ucan_fast.auto.enable()  # the second time, which has nothing more to say

    _, messages = said(enable)
    first = str(uf.accelerate(dora))
    # Models of other tests, still alive in this process, may have said something too.
    assert messages.count(first) == 1
    assert first.startswith("ucan_fast: 0 of 2 LoRA layers fused.\n")
    assert "PEFT's forward kept on 2: adapter variant DoraLinearVariant" in first
    assert "layers.0.self_attn.o_proj" in first
    assert fused_calls(plain) == 7

    later, messages = said(lambda: hm.lora(hm.llama(layers=1)))
    assert fused_calls(later) == 7
    assert not messages
    targets = ["embed_tokens", "q_proj"]
    mixed, (only,) = said(lambda: hm.lora(hm.llama(layers=1), targets=targets))
    assert only.startswith("ucan_fast: 1 of 2 LoRA layers fused.\n")
    assert "Embedding" in only
    another = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"])
    _, messages = said(lambda: mixed.add_adapter("plain", another))
    assert not messages
    variant = peft.LoraConfig(r=2, target_modules=["o_proj"], use_dora=True)
    _, (grown,) = said(lambda: mixed.add_adapter("variant", variant))
    assert grown.startswith("ucan_fast: 2 of 4 LoRA layers fused.\n")
    assert "DoraLinearVariant" in grown
    _, (again,) = said(lambda: hm.lora(hm.llama(layers=1), targets=targets))
    assert again == only


def test_living_models_of_other_kinds_are_not_disturbed():
    alone(strange_objects)


class Touchy:
    """Objects whose attributes run code, as lazily loaded modules and mocks have."""

    @property
    def __class__(self):
        raise RuntimeError("touched")


def strange_objects():
    kept = [Touchy()]
    import ucan_fast.auto

    ucan_fast.auto.disable()
    assert kept
