"""``import ucan_fast.auto``: every PEFT LoRA model is accelerated, without another line.

Models that exist already are switched at import; later ones when PEFT puts the adapter in.
:func:`disable` undoes both. Layers that do not qualify keep PEFT's forward: one
:class:`~ucan_fast.UcanWarning` per model names them and says why. Another adapter in that model
repeats it only if that adds such a layer.
"""

from __future__ import annotations

import functools
import gc
import weakref

from peft.tuners.lora import LoraModel
from torch import nn

from .accelerate import accelerate, is_fused, restore
from .adapter import is_lora_layer, unwrap
from .errors import warn

_hooked = False
# LoraModel's own method, or None where it inherits it (as in today's PEFT).
_own_inject = None
# What was said about each model's layers that are not fused.
_told: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


def enable() -> int:
    """Accelerate every LoRA layer alive and hook PEFT for those to come.

    Returns how many layers now run the fused forward. Calling it twice is harmless.

    Warns:
        UcanWarning: layers of a model keep PEFT's forward; the reasons.
    """
    global _hooked, _own_inject
    if not _hooked:
        original = LoraModel.inject_adapter
        _own_inject = vars(LoraModel).get("inject_adapter")
        _hooked = True

        @functools.wraps(original)
        def inject_adapter(self, model: nn.Module, *args, **kwargs):
            result = original(self, model, *args, **kwargs)
            _accelerate(model)
            return result

        LoraModel.inject_adapter = inject_adapter
    layers = _living_layers()
    for model in _models_of(layers):
        _accelerate(model)
    return sum(map(is_fused, layers))


def disable() -> int:
    """Unhook PEFT and give every living LoRA layer its own forward back. Returns how many."""
    global _hooked
    if _hooked:
        if _own_inject is None:
            del LoraModel.inject_adapter
        else:
            LoraModel.inject_adapter = _own_inject
        _hooked = False
    return sum(restore(module) for module in _living_layers())


def _accelerate(model: nn.Module) -> None:
    report = accelerate(model)
    model = unwrap(model)
    if not report.kept.items() <= _told.get(model, {}).items():
        warn(str(report))
        _told[model] = report.kept


def _living_layers() -> list[nn.Module]:
    return [module for module in _living_modules() if is_lora_layer(module)]


def _living_modules() -> list[nn.Module]:
    # PEFT keeps no list of its models, so the garbage collector's is the only complete one.
    # type(), not isinstance(): some objects' __class__ runs code.
    return [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]


def _models_of(layers: list[nn.Module]) -> list[nn.Module]:
    # The outermost modules that hold these layers: a layer alone knows neither its name nor who
    # shards its weights.
    holders: dict[int, list[nn.Module]] = {}
    for module in _living_modules():
        for child in (vars(module).get("_modules") or {}).values():
            holders.setdefault(id(child), []).append(module)
    seen: set[int] = set()
    models, waiting = [], list(layers)
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if above := holders.get(id(module)):
            waiting += above
        else:
            models.append(module)
    return models


enable()
