"""accelerate / restore: the fused LoRA forward, per layer, in place and reversible."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from . import ops
from .adapter import (
    fusable_parts,
    gives_new_output,
    plain_linear,
    sharded_by,
    tuner_layers,
    unfusable,
)
from .ops.backend import is_unobserved


class FusedLoraLinear:
    """Another forward for one of PEFT's linear LoRA layers, without any state of its own.

    A layer is switched by having its ``__class__`` swapped for a subclass of this one and of its
    own class, so that pickle, deepcopy, merging and every other method of PEFT keep working (a
    forward bound to the instance would be lost).
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """PEFT's result; by PEFT's own forward wherever :func:`fusable_parts` finds a reason.

        Also where :func:`.ops.is_launch_bound` says that launches decide: a decode step by eager
        calls on a GPU.
        """
        recorder = None
        for candidate in self.__dict__.get("_ucan_recorders", ()):
            if candidate.listens():
                recorder = candidate
        parts = None
        # With moments to take, the kernels do in a few launches what takes PEFT and hooks dozens.
        if is_fused(self) and (recorder is not None or not _launches_decide(self, x)):
            parts = fusable_parts(self, x, args, kwargs)
        if parts is None:
            if recorder is None:
                return super().forward(x, *args, **kwargs)
            with recorder.hooked():
                result = super().forward(x, *args, **kwargs)
            recorder.layer_output(result)
            return result

        base = self._modules["base_layer"]
        whole = self._base_product(x, base, parts)
        if whole is not None:
            return self._one_product(x, *whole, parts[0], recorder)
        result = self._call_base(x, base)
        y_dtype = result.dtype
        ours = (
            not torch.compiler.is_compiling()
            and gives_new_output(base)
            and is_unobserved(x, result)
        )
        if len(parts) > 1:
            # PEFT rounds once, after the last adapter, where adapters are wider than the base.
            result = result.to(torch.promote_types(y_dtype, torch.float32))
        casts = self._casts_dtypes()
        for adapter, a, b, bias, scaling in parts:
            if casts:
                x, dtype = _narrowed(x, a.dtype), _product_dtype(x, a.dtype)
            else:
                dtype = _product_dtype(x, x.dtype)
                y_dtype = torch.promote_types(y_dtype, dtype)
                result = result.to(torch.promote_types(result.dtype, dtype))
            if recorder is None or not recorder.wants(adapter):
                result = ops.add_lora(
                    result, x, a, b, scaling, dtype=dtype, bias=bias, overwrite=ours
                )
            else:
                z, moments = recorder.shrink(x, a, dtype)
                result = ops.expand(result, z, b, scaling, bias=bias, overwrite=ours, **moments)
        if result.dtype != y_dtype:
            result = result.to(y_dtype)
        if recorder is not None:
            recorder.layer_output(result)
        return result

    def _one_product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        base_bias: torch.Tensor | None,
        part: tuple,
        recorder: Any,
    ) -> torch.Tensor:
        adapter, a, b, bias, scaling = part
        if recorder is not None and recorder.wants(adapter):
            z, moments = recorder.shrink(x, a, a.dtype)
        else:
            z, moments = ops.shrink(x, a, dtype=a.dtype), {}
        result = ops.fused_linear(
            x, weight, z, b, scaling, bias=base_bias, lora_bias=bias, **moments
        )
        if recorder is not None:
            recorder.layer_output(result)
        return result

    def _call_base(self, x: torch.Tensor, base: nn.Module) -> torch.Tensor:
        return base(x)

    def _base_product(self, x: torch.Tensor, base: nn.Module, parts: list[tuple]) -> tuple | None:
        # The base layer's weight and bias where one product is to do it all.
        return None

    def _casts_dtypes(self) -> bool:
        # Whether x is cast to the adapter's dtype and the sum back to the base's.
        return True


class FusedLinear(FusedLoraLinear, lora.Linear):
    """``peft.tuners.lora.Linear``, fused."""

    pefts = lora.Linear

    def _base_product(self, x: torch.Tensor, base: nn.Module, parts: list[tuple]) -> tuple | None:
        if len(parts) > 1:
            return None
        weight = base._parameters.get("weight")
        if weight is None or not ops.fused_linear_wanted(x, weight):
            return None
        plain = plain_linear(base)
        narrows = torch.promote_types(x.dtype, parts[0][1].dtype) != parts[0][1].dtype
        if narrows or torch.is_autocast_enabled(x.device.type):
            return None
        return plain


class _OverBitsandbytes(FusedLoraLinear):
    # PEFT clones what the base returns, lest a view of a custom function be changed in place.
    # Nothing is changed in place here.
    def _casts_dtypes(self) -> bool:
        # PEFT's own question: without a device it means CUDA's autocast, on the CPU too.
        return not torch.is_autocast_enabled()


class _OverGptq(FusedLoraLinear):
    def _call_base(self, x: torch.Tensor, base: nn.Module) -> torch.Tensor:
        return self.quant_linear_module(x)


_OVER = {
    "Linear4bit": _OverBitsandbytes,
    "Linear8bitLt": _OverBitsandbytes,
    "GPTQLoraLinear": _OverGptq,
}


def __getattr__(name: str) -> type[FusedLoraLinear]:
    # FusedLinear4bit and the like are made when first asked for, by accelerate or by pickle:
    # their bases come from modules of PEFT that import bitsandbytes.
    own = name.removeprefix("Fused")
    if own == name or own not in _OVER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _fused_over(getattr(lora, own))


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
        if sharding:
            report.kept[name] = f"weights are sharded by {sharding}"
            _give_back(module)
        elif is_fused(module):
            report.fused.append(name)
        elif reason := unfusable(module):
            report.kept[name] = reason
        else:
            module.__class__ = _fused_class(type(module))
            report.fused.append(name)
    return report


def restore(model: nn.Module) -> int:
    """Give every layer PEFT's own forward back. Returns how many were switched."""
    return sum(_give_back(module) for _, module in tuner_layers(model))


def is_fused(module: nn.Module) -> bool:
    """Whether this layer was switched to the fused forward."""
    # Not a subclass of ours: whoever made it (FSDP does) has put something around the weights.
    return "pefts" in vars(type(module))


def _give_back(module: nn.Module) -> bool:
    fused = is_fused(module)
    if fused:
        module.__class__ = type(module).pefts
    return fused


def _fused_class(cls: type[nn.Module]) -> type[FusedLoraLinear]:
    return FusedLinear if cls is lora.Linear else _fused_over(cls)


@functools.cache
def _fused_over(cls: type[nn.Module]) -> type[FusedLoraLinear]:
    body = {"__doc__": f"PEFT's ``{cls.__name__}``, fused.", "__module__": __name__, "pefts": cls}
    return type(f"Fused{cls.__name__}", (_OVER[cls.__name__], cls), body)


def _launches_decide(layer: nn.Module, x: Any) -> bool:
    # Not in training, where a checkpoint may run the layer first without gradients, then with them;
    # nor where the fused product was asked for by name.
    return (
        not layer.training
        and isinstance(x, torch.Tensor)
        and ops.is_launch_bound(x, layer.out_features or 0)
        and ops.fused_linear_switch() != "1"
    )


def _narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # PEFT casts x to the adapter's dtype. Widening is exact, so the product may do it on the fly;
    # narrowing is not, and what the statistics describe is the narrowed x.
    if x.dtype == dtype or torch.promote_types(x.dtype, dtype) == dtype:
        return x
    return x.to(dtype)


def _product_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    # What F.linear would have computed in: autocast narrows fp32, and leaves fp64 alone.
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return dtype
