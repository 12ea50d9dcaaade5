"""``import ucan_fast.auto``: every PEFT LoRA model is accelerated, without another line.

Models that exist already are switched at import; later ones when PEFT puts the adapter in.
:func:`disable` undoes both. Layers that do not qualify keep PEFT's forward; ask
``ucan_fast.accelerate(model)`` for the reasons.
"""

from __future__ import annotations

import functools
import gc

from peft.tuners.lora import LoraModel
from torch import nn

from .accelerate import accelerate, restore
from .adapter import is_lora_layer

_hooked = False
# LoraModel's own method, or None where it inherits it (as in today's PEFT).
_own_inject = None


def enable() -> int:
    """Accelerate every LoRA layer alive and hook PEFT for those to come.

    Returns how many layers now run the fused forward. Calling it twice is harmless.
    """
    global _hooked, _own_inject
    if not _hooked:
        original = LoraModel.inject_adapter
        _own_inject = vars(LoraModel).get("inject_adapter")
        _hooked = True

        @functools.wraps(original)
        def inject_adapter(self, model: nn.Module, *args, **kwargs):
            result = original(self, model, *args, **kwargs)
            accelerate(model)
            return result

        LoraModel.inject_adapter = inject_adapter
    return sum(len(accelerate(module).fused) for module in _living_layers())


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


def _living_layers() -> list[nn.Module]:
    # PEFT keeps no list of its models, so the garbage collector's is the only complete one.
    # type(), not isinstance(): some objects' __class__ runs code.
    return [o for o in gc.get_objects() if issubclass(type(o), nn.Module) and is_lora_layer(o)]


enable()
