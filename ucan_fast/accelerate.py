"""accelerate / restore: the fused LoRA forward, per layer, in place and reversible."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft.tuners import lora
from torch import nn

from . import ops
from .adapter import call_obstacle, sharded_by, tuner_layers, unfusable


class FusedLoraLinear(lora.Linear):
    """``peft.tuners.lora.Linear`` with another forward and no state of its own.

    A layer becomes one by having its ``__class__`` swapped, so that pickle, deepcopy, merging and
    every other method of PEFT keep working (a forward bound to the instance would be lost).
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """PEFT's result; by PEFT's own forward wherever :func:`call_obstacle` finds a reason."""
        recorder = self.__dict__.get("_ucan_recorder")
        if call_obstacle(self, x, args, kwargs) is not None:
            if recorder is None:
                return super().forward(x, *args, **kwargs)
            with recorder.hooked():
                result = super().forward(x, *args, **kwargs)
            recorder.layer_output(result)
            return result

        base_out = self.base_layer(x)
        adapters = [key for key in self.active_adapters if key in self.lora_A]
        result = base_out
        if len(adapters) > 1:
            # PEFT rounds once, after the last adapter, where adapters are wider than the base.
            result = base_out.to(torch.promote_types(base_out.dtype, torch.float32))
        for key in adapters:
            a, b = self.lora_A[key].weight, self.lora_B[key].weight
            bias, scaling = self.lora_B[key].bias, self.scaling[key]
            x = self._cast_input_dtype(x, a.dtype)
            dtype = _product_dtype(x)
            if recorder is not None and recorder.wants(key):
                result = recorder.fused_step(result, x, a, b, bias, scaling, dtype)
            else:
                result = ops.expand(result, ops.shrink(x, a, dtype=dtype), b, scaling, bias=bias)
        result = result.to(base_out.dtype)
        if recorder is not None:
            recorder.layer_output(result)
        return result


@dataclass
class AccelerationReport:
    """Which layers run the fused forward, and why the others do not.

    Attributes:
        fused: names of the layers that were switched.
        kept: name -> reason, for the layers that keep PEFT's own forward.
    """

    fused: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        total = len(self.fused) + len(self.kept)
        if not total:
            return "ucan_fast: this model has no LoRA layer, nothing to accelerate."
        lines = [f"ucan_fast: {len(self.fused)} of {total} LoRA layers fused."]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            lines.append(f"  PEFT's forward kept on {len(names)}: {reason} ({shown})")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> AccelerationReport:
    """Switch every LoRA layer that qualifies to the fused forward, in place.

    Outputs and gradients stay PEFT's within rounding; weights, names, saved files and hooks are
    untouched. Calling it again after adapters were added is fine. :func:`restore` undoes it.

    Args:
        model: any model with PEFT LoRA layers, wrapped in ``PeftModel`` or not.

    Returns:
        Which layers were fused and the reason for each that was not.
    """
    report = AccelerationReport()
    sharding = sharded_by(model)
    for name, module in tuner_layers(model):
        if isinstance(module, FusedLoraLinear):
            report.fused.append(name)
            continue
        reason = f"weights are sharded by {sharding}" if sharding else unfusable(module)
        if reason:
            report.kept[name] = reason
        else:
            module.__class__ = FusedLoraLinear
            report.fused.append(name)
    return report


def restore(model: nn.Module) -> int:
    """Give every layer PEFT's own forward back. Returns how many were switched."""
    count = 0
    for _, module in tuner_layers(model):
        if isinstance(module, FusedLoraLinear):
            module.__class__ = lora.Linear
            count += 1
    return count


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    # What F.linear would have computed in: autocast narrows fp32, and leaves fp64 alone.
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
