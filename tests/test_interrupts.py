"""Ctrl-C while weights, hooks and modes are put back: all of it first, then the interrupt."""

from __future__ import annotations

import os
import signal
import sys
import threading

import helpers_models as hm
import peft
import pytest
import torch
from torch.utils.hooks import RemovableHandle
from trained_model import assert_same_weights, forget_batches, retain_batches, trained, weights

import ucan_fast as uf
from ucan_fast.accelerate import FusedLoraLinear
from ucan_fast.audit import _Audited, audit
from ucan_fast.batches import eval_mode
from ucan_fast.factor_pass import trainable
from ucan_fast.interrupts import finished
from ucan_fast.weights import ParameterEdit


def interrupt() -> None:
    """What the terminal does, heeded by now if it is heeded at all."""
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass


def test_the_block_is_finished_and_then_interrupted():
    done = []

    def run() -> None:
        with finished():
            interrupt()
            with finished():
                interrupt()
                done.append("inner")
            done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done == ["inner", "outer"]
    before = signal.getsignal(signal.SIGINT)
    with finished():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_errors_come_through_and_other_threads_run_as_they_are():
    with pytest.raises(ZeroDivisionError), finished():
        raise ZeroDivisionError
    found = []

    def run() -> None:
        with finished():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


class Interrupting(torch.Tensor):
    """An original whose reading interrupts, once it is set."""

    armed = False

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if cls.armed and function is torch.Tensor.copy_:
            cls.armed = False
            interrupt()
        return super().__torch_function__(function, types, arguments, options or {})


def test_restored_weights_are_all_restored():
    model = trained()
    origin = weights(model)
    parameters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    edit = ParameterEdit(parameters)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(2)
    first = next(iter(edit.originals))
    edit.originals[first] = edit.originals[first].as_subclass(Interrupting)
    Interrupting.armed = True
    with pytest.raises(KeyboardInterrupt):
        edit.restore()
    assert not Interrupting.armed, "it was interrupted"
    assert_same_weights(model, origin)


class Fragile(torch.nn.Module):
    """Interrupts when its mode is changed."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "training" and getattr(self, "armed", False):
            interrupt()


@pytest.mark.parametrize("armed", ["before", "after"])
def test_modes_are_put_back_whenever_it_comes(armed):
    model = torch.nn.Sequential(torch.nn.Dropout(), Fragile(), torch.nn.Dropout()).train()
    model[1].armed = armed == "before"
    with pytest.raises(KeyboardInterrupt), eval_mode(model):
        model[1].armed = True
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("collect", [uf.collect, uf.collect_factors])
@pytest.mark.parametrize("when", ["registered", "removed"])
def test_no_hook_stays(collect, when, monkeypatch):
    model = hm.lora(hm.llama())
    handles = torch.utils.hooks.RemovableHandle
    name = "__init__" if when == "registered" else "remove"
    real = getattr(handles, name)
    interrupts = iter([True])

    def interrupted(*arguments, **options):
        real(*arguments, **options)
        if next(interrupts, False):
            interrupt()

    monkeypatch.setattr(handles, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(model, [hm.token_batch([4, 5])])
    assert next(interrupts, "interrupted") == "interrupted"
    left = [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    ]
    assert left == []
    monkeypatch.undo()
    uf.collect(model, forget_batches())


def test_flags_are_put_back_whenever_it_comes(monkeypatch):
    model = hm.lora(hm.llama())
    parameters = list(model.parameters())
    flags = [p.requires_grad for p in parameters]
    real, calls = torch.nn.Parameter.requires_grad_, iter(range(1000))

    def counted(self, flag=True):
        real(self, flag)
        if next(calls) == changed:  # the first that is put back
            interrupt()

    weights_wanted = [p for p in parameters if not p.requires_grad][:3]
    changed = len(weights_wanted) + sum(flags)  # all that is switched on, and all that is off
    monkeypatch.setattr(torch.nn.Parameter, "requires_grad_", counted, raising=False)
    with pytest.raises(KeyboardInterrupt), trainable(model, weights_wanted):
        assert [p for p in parameters if p.requires_grad] != []
    assert [p.requires_grad for p in parameters] == flags


def test_an_audited_model_is_the_original_again(monkeypatch, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "other")
    origin, flags = weights(model), [p.requires_grad for p in model.parameters()]
    real = peft.PeftModel.delete_adapter

    def interrupted(self, name):
        real(self, name)
        interrupt()

    monkeypatch.setattr(peft.PeftModel, "delete_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audit(model, tmp_path / "other", forget=forget_batches(), relearn_steps=0)
    assert model.active_adapter == "default"
    assert_same_weights(model, origin)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_an_audit_goes_back_to_the_original_adapter_before(monkeypatch):
    model = trained()
    model.add_adapter("other", model.peft_config["default"])
    real = peft.PeftModel.set_adapter

    def interrupted(self, name):
        if name == "default":
            interrupt()
        real(self, name)

    monkeypatch.setattr(peft.PeftModel, "set_adapter", interrupted)
    states = {"original": "default", "unlearned": "other"}
    audited = _Audited(model, states, forget_batches(), progress=None)
    with pytest.raises(KeyboardInterrupt), audited.active("unlearned"):
        assert model.active_adapter == "other"
    assert model.active_adapter == "default"


def test_a_hook_of_one_call_is_removed(monkeypatch):
    """Of a fused layer that one call leaves to PEFT: another adapter is mixed in."""
    model = hm.lora(hm.llama(layers=1))
    uf.accelerate(model)
    layer = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    # The function of the package has the module's name.
    module = sys.modules[FusedLoraLinear.__module__]
    monkeypatch.setattr(module, "fusable_parts", lambda *_: None)
    removed = []
    real = RemovableHandle.remove

    def interrupted(self):
        if not removed:
            removed.append(self)
            interrupt()
        real(self)

    monkeypatch.setattr(RemovableHandle, "remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uf.collect(model, [hm.token_batch([7, 3])])
    assert removed
    assert not any(m._forward_hooks for m in model.modules())
    assert "_ucan_recorders" not in layer.__dict__


def test_an_earlier_plan_is_put_back_whenever_it_comes(monkeypatch):
    """The second interrupt, while the first one's way back is under way."""
    model, retain = trained(), retain_batches()
    config = uf.UcanConfig(strength=2.0)
    first = uf.unlearn(model, forget=forget_batches(), retain=retain, config=config, evaluate=False)
    applied = weights(model)
    real = uf.AttenuationPlan.apply

    def interrupted(self, *arguments):
        interrupt()
        return real(self, *arguments)

    monkeypatch.setattr(uf.AttenuationPlan, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uf.unlearn(
            model, forget=forget_batches(seed=3), retain=retain, config=config, previous=first
        )
    assert_same_weights(model, applied)
