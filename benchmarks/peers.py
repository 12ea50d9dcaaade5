"""What a user would run instead of ucan_fast, each set up as its own documentation says.

Every function here returns a *binder* for :class:`benchmarks.measure.Candidate`: given the inputs
``(x, w, a, b, groups)`` of one LoRA layer, a function of no arguments. W has the base's dtype; A
and B hold values that fp32 and bf16 both represent, so that adapters of either dtype are one.

Moments are fp64 totals ``[2, 2, n]`` as :mod:`ucan_fast.ops.moments` defines them. The masks that
a peer needs are made once, as they would be once per batch, and are not timed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import ucan_fast as uf
from ucan_fast import ops

#: lora_alpha = 2 r, as the examples of PEFT have it.
SCALING = 2.0

Call = Callable[[], Any]
Binder = Callable[..., Call]


def lora_inputs(
    k: int,
    n: int,
    rank: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """Seed -> x ``[tokens, k]``, W ``[n, k]``, A, B (fp32), groups (runs of forget, retain, none).

    The adapter's share of the output is as large as the base's, so that a check sees it.
    """

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(rows: int, cols: int, scale: float) -> torch.Tensor:
            return torch.randn(rows, cols, generator=generator, device=device) * scale

        x, w = normal(tokens, k, 1.0).to(dtype), normal(n, k, k**-0.5).to(dtype)
        a, b = normal(rank, k, k**-0.5), normal(n, rank, rank**-0.5 / SCALING)
        runs = torch.randint(-1, 2, (-(-tokens // 64),), generator=generator, device=device)
        # Both groups occur where there are two runs.
        runs[0] = 1
        runs[-1] = 0
        groups = runs.repeat_interleave(64)[:tokens].clone()
        return x, w, a.bfloat16().float(), b.bfloat16().float(), groups

    return inputs


def reference_linear(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *_):
    """y of a LoRA layer, in fp64."""
    x = x.double()
    return x @ w.double().t() + SCALING * (x @ a.double().t() @ b.double().t())


def reference_base(x: torch.Tensor, w: torch.Tensor, *_) -> torch.Tensor:
    """The base product alone, in fp64."""
    return x.double() @ w.double().t()


def reference_gradients(x, w, a, b, _groups, dy) -> tuple[torch.Tensor, ...]:
    """y and the gradients of x, A and B for ``dy``, in fp64, written out."""
    x, w, a, b, dy = (t.double() for t in (x, w, a, b, dy))
    z, dz = x @ a.t(), SCALING * (dy @ b)
    y = x @ w.t() + SCALING * (z @ b.t())
    return y, dy @ w + dz @ a, dz.t() @ x, SCALING * (dy.t() @ z)


def reference_moments(h: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Σ|h| and Σh² per group, in fp64, one group after the other."""
    total = torch.zeros(2, 2, h.shape[-1], dtype=torch.float64, device=h.device)
    for group in (0, 1):
        chosen = h[groups == group].double()
        total[0, group] = chosen.abs().sum(0)
        total[1, group] = chosen.square().sum(0)
    return total


def reference_linear_moments(x, w, a, b, groups) -> dict[str, torch.Tensor]:
    """y, and the moments of x and of δ."""
    delta = SCALING * (x.double() @ a.double().t() @ b.double().t())
    return {
        "y": reference_linear(x, w, a, b),
        "input": reference_moments(x, groups),
        "output": reference_moments(delta, groups),
    }


# One LoRA layer


def peft_layer(
    w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, adapter_dtype: torch.dtype
) -> nn.Module:
    """PEFT's own layer over this base weight, made by PEFT, in eval mode."""
    n, k = w.shape
    base = nn.Linear(k, n, bias=False, device="meta")
    base.weight = nn.Parameter(w, requires_grad=False)
    rank = a.shape[0]
    config = LoraConfig(
        r=rank, lora_alpha=int(SCALING * rank), lora_dropout=0.0, target_modules=["proj"]
    )
    layer = inject_adapter_in_model(config, nn.ModuleDict({"proj": base}))["proj"]
    for module, value in ((layer.lora_A, a), (layer.lora_B, b)):
        module["default"].weight = nn.Parameter(value.to(adapter_dtype, copy=True))
    return layer.eval()


def ucan_layer(
    w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, adapter_dtype: torch.dtype
) -> nn.Module:
    """The same layer after ``ucan_fast.accelerate``."""
    layer = peft_layer(w, a, b, adapter_dtype)
    report = uf.accelerate(nn.ModuleDict({"proj": layer}))
    if report.kept:
        raise RuntimeError(str(report))
    return layer


Maker = Callable[..., nn.Module]


def forward(make: Maker, adapter_dtype: torch.dtype, *, compiled: bool = False) -> Binder:
    """A layer's forward pass without gradients."""

    def bind(x, w, a, b, *_) -> Call:
        layer = make(w, a, b, adapter_dtype)
        run = torch.compile(layer, dynamic=False) if compiled else layer

        def call() -> torch.Tensor:
            with torch.no_grad():
                return run(x)

        return call

    return bind


def autocast_forward(make: Maker, adapter_dtype: torch.dtype, dtype: torch.dtype) -> Binder:
    """The same under autocast to ``dtype``."""

    def bind(x, w, a, b, *_) -> Call:
        layer = make(w, a, b, adapter_dtype)

        def call() -> torch.Tensor:
            with torch.no_grad(), _autocast(x, dtype):
                return layer(x)

        return call

    return bind


def _autocast(x: torch.Tensor, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    return torch.autocast(x.device.type, dtype) if dtype else contextlib.nullcontext()


def base_forward() -> Binder:
    """The base product alone: the floor."""

    def bind(x, w, *_) -> Call:
        return lambda: F.linear(x, w)

    return bind


def addmm_forward(adapter_dtype: torch.dtype) -> Binder:
    """unsloth's scheme: adapters cast to x's dtype at every call, the product added in place."""

    def bind(x, w, a, b, *_) -> Call:
        a, b = a.to(adapter_dtype), b.to(adapter_dtype)

        def call() -> torch.Tensor:
            with torch.no_grad():
                y = F.linear(x, w)
                z = x @ a.to(x.dtype).t()
                return y.addmm_(z, b.to(x.dtype).t(), alpha=SCALING)

        return call

    return bind


def training_step(
    make: Maker,
    adapter_dtype: torch.dtype,
    *,
    compiled: bool = False,
    autocast: torch.dtype | None = None,
) -> Binder:
    """Forward and backward: y and the gradients of x, A and B.

    Args:
        autocast: the forward pass runs under autocast to this dtype, as torch asks: the backward
            pass outside of it.
    """

    def bind(x, w, a, b, _groups, dy) -> Call:
        layer = make(w, a, b, adapter_dtype).train()
        run = torch.compile(layer, dynamic=False) if compiled else layer
        leaves = [
            x.detach().requires_grad_(),
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
        ]

        def call() -> tuple[torch.Tensor, ...]:
            with _autocast(x, autocast):
                y = run(leaves[0])
            return (y.detach(), *torch.autograd.grad(y, leaves, dy))

        return call

    return bind


class _AddmmLinear(torch.autograd.Function):
    """unsloth's scheme with its backward, x not overwritten."""

    @staticmethod
    def forward(ctx, x, w, a, b):
        y = F.linear(x, w)
        narrow_a, narrow_b = a.to(x.dtype), b.to(x.dtype)
        z = x @ narrow_a.t()
        ctx.save_for_backward(x, w, a, b)
        return y.addmm_(z, narrow_b.t(), alpha=SCALING)

    @staticmethod
    def backward(ctx, dy):
        x, w, a, b = ctx.saved_tensors
        narrow_a, narrow_b = a.to(x.dtype), b.to(x.dtype)
        dz = dy @ narrow_b
        da = (dz.t() @ x).mul_(SCALING)
        db = (dy.t() @ (x @ narrow_a.t())).mul_(SCALING)
        dx = (dy @ w).addmm_(dz, narrow_a, alpha=SCALING)
        return dx, None, da.to(a.dtype), db.to(b.dtype)


def addmm_training_step(adapter_dtype: torch.dtype) -> Binder:
    """Forward and backward by unsloth's scheme."""

    def bind(x, w, a, b, _groups, dy) -> Call:
        x = x.detach().requires_grad_()
        a = a.to(adapter_dtype, copy=True).requires_grad_()
        b = b.to(adapter_dtype, copy=True).requires_grad_()

        def call() -> tuple[torch.Tensor, ...]:
            y = _AddmmLinear.apply(x, w, a, b)
            return (y.detach(), *torch.autograd.grad(y, (x, a, b), dy))

        return call

    return bind


# The same layer while statistics are taken


def new_totals(n: int, device: torch.device) -> torch.Tensor:
    """Empty fp64 totals."""
    return torch.zeros(2, 2, n, dtype=torch.float64, device=device)


class BooleanIndex:
    """Moments by ``h[mask]``, one group after the other, as one writes it first."""

    #: The size of ``h[mask]`` is read back from the device.
    capturable = False

    def __init__(self, groups: torch.Tensor) -> None:
        self.masks = [groups == group for group in (0, 1)]

    def add(self, total: torch.Tensor, h: torch.Tensor) -> None:
        """Add the moments of h to ``total``."""
        h = h.detach().reshape(-1, h.shape[-1])
        for group, mask in enumerate(self.masks):
            chosen = h[mask].float()
            total[0, group] += chosen.abs().sum(0)
            total[1, group] += chosen.square().sum(0)


class MaskMatmul:
    """Moments by a product with the ``[2, tokens]`` mask of the groups."""

    capturable = True

    def __init__(self, groups: torch.Tensor) -> None:
        self.mask = torch.stack([groups == group for group in (0, 1)]).float()

    def add(self, total: torch.Tensor, h: torch.Tensor) -> None:
        """Add the moments of h to ``total``."""
        h = h.detach().reshape(-1, h.shape[-1]).float()
        total[0] += self.mask @ h.abs()
        total[1] += self.mask @ h.square()


class _OutsideAutocast:
    """Moments whose products autocast must not narrow, though the forward pass runs under it."""

    def __init__(self, statistics: BooleanIndex | MaskMatmul) -> None:
        self.statistics = statistics

    def add(self, total: torch.Tensor, h: torch.Tensor) -> None:
        with torch.autocast(h.device.type, enabled=False):
            self.statistics.add(total, h)


Statistics = type[BooleanIndex] | type[MaskMatmul]


def hook_moments(
    layer: nn.Module,
    statistics: BooleanIndex | MaskMatmul,
    totals: dict[str, torch.Tensor],
    adapter: str = "default",
) -> list[torch.utils.hooks.RemovableHandle]:
    """Forward hooks on lora_A's input and on lora_B's output times s, on PEFT's own layer."""
    scaling = layer.scaling[adapter]

    def before_a(_module, arguments) -> None:
        statistics.add(totals["input"], arguments[0])

    def after_b(_module, _arguments, out) -> None:
        # δ is defined in fp32, so out is widened before it is scaled.
        statistics.add(totals["output"], out.float() * scaling)

    return [
        layer.lora_A[adapter].register_forward_pre_hook(before_a),
        layer.lora_B[adapter].register_forward_hook(after_b),
    ]


def hooked_forward(
    statistics: Statistics,
    adapter_dtype: torch.dtype,
    *,
    compiled: bool = False,
    autocast: torch.dtype | None = None,
) -> Binder:
    """PEFT's forward with hooks that take the moments, under autocast where a dtype is given."""

    def bind(x, w, a, b, groups, *_) -> Call:
        layer = peft_layer(w, a, b, adapter_dtype)
        totals = {"input": new_totals(w.shape[1], x.device)}
        totals["output"] = new_totals(w.shape[0], x.device)
        taken = statistics(groups)
        hook_moments(layer, _OutsideAutocast(taken) if autocast else taken, totals)
        run = torch.compile(layer, dynamic=False) if compiled else layer

        def call() -> dict[str, torch.Tensor]:
            with torch.no_grad(), _autocast(x, autocast):
                return {"y": run(x), **totals}

        return call

    return bind


class _Recorder:
    """What ``collect`` gives a fused layer to record with, for one layer on its own."""

    def __init__(self, groups: torch.Tensor, totals: dict[str, torch.Tensor]) -> None:
        self.groups, self.totals = groups, totals

    def listens(self) -> bool:
        return True

    def wants(self, _adapter: str) -> bool:
        return True

    def shrink(
        self, x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        z = ops.shrink(x, a, dtype=dtype, groups=self.groups, input_moments=self.totals["input"])
        return z, {"groups": self.groups, "delta_moments": self.totals["output"]}

    def layer_output(self, _y: torch.Tensor) -> None:
        pass


def recorded_forward(adapter_dtype: torch.dtype, *, autocast: torch.dtype | None = None) -> Binder:
    """A fused layer's forward while it records: called as a module, as the peers are."""

    def bind(x, w, a, b, groups, *_) -> Call:
        layer = ucan_layer(w, a, b, adapter_dtype)
        totals = {"input": new_totals(w.shape[1], x.device)}
        totals["output"] = new_totals(w.shape[0], x.device)
        layer.__dict__["_ucan_recorders"] = (_Recorder(groups, totals),)

        def call() -> dict[str, torch.Tensor]:
            with torch.no_grad(), _autocast(x, autocast):
                return {"y": layer(x), **totals}

        return call

    return bind


def fused_linear_moments(adapter_dtype: torch.dtype) -> Binder:
    """The same work by ``shrink`` and ``fused_linear``, the opt-in, without the layer around it."""

    def bind(x, w, a, b, groups, *_) -> Call:
        a, b = a.to(adapter_dtype), b.to(adapter_dtype)
        totals = {"input": new_totals(w.shape[1], x.device)}
        totals["output"] = new_totals(w.shape[0], x.device)

        def call() -> dict[str, torch.Tensor]:
            with torch.no_grad():
                z = ops.shrink(x, a, groups=groups, input_moments=totals["input"])
                y = ops.fused_linear(
                    x, w, z, b, SCALING, groups=groups, delta_moments=totals["output"]
                )
            return {"y": y, **totals}

        return call

    return bind


# Attenuation: (weights, factors, offsets, axes), as ucan_fast.ops.attenuate_ takes them


def attenuate_ucan(weights, factors, offsets, axes) -> Call:
    """``ucan_fast.ops.attenuate_``, its checks included."""

    def call() -> list[torch.Tensor]:
        ops.attenuate_(weights, factors, offsets, axes)
        return weights

    return _without_gradients(call)


def _factor_views(weights, factors, offsets, axes) -> list[torch.Tensor]:
    return [
        factors[offset : offset + weight.shape[axis]].unsqueeze(1 - axis)
        for weight, offset, axis in zip(weights, offsets, axes, strict=True)
    ]


def attenuate_mul_loop(weights, factors, offsets, axes) -> Call:
    """``weight.mul_(factor)`` for each, the broadcastable factors at hand already."""
    views = _factor_views(weights, factors, offsets, axes)

    def call() -> list[torch.Tensor]:
        for weight, view in zip(weights, views, strict=True):
            weight.mul_(view)
        return weights

    return _without_gradients(call)


def attenuate_view_loop(weights, factors, offsets, axes) -> Call:
    """The loop from flat factors: each weight's are cut out and turned to its axis, then mul_."""

    def call() -> list[torch.Tensor]:
        for weight, offset, axis in zip(weights, offsets, axes, strict=True):
            factor = factors[offset : offset + weight.shape[axis]]
            weight.mul_(factor.unsqueeze(1) if axis == 0 else factor.unsqueeze(0))
        return weights

    return _without_gradients(call)


def attenuate_foreach(weights, factors, offsets, axes) -> Call:
    """``torch._foreach_mul_`` on the same views; broadcasting keeps it off its fast path."""
    views = _factor_views(weights, factors, offsets, axes)

    def call() -> list[torch.Tensor]:
        torch._foreach_mul_(weights, views)
        return weights

    return _without_gradients(call)


def _without_gradients(function: Call) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return function()

    return call


# Scores: (moments, counts, weight_norms, offsets) of a whole plan; the default formulas


def scores_per_layer(
    moments: torch.Tensor,
    counts: torch.Tensor,
    norms: torch.Tensor,
    bounds: Sequence[int],
    *,
    threshold: float,
    strength: float,
) -> dict[str, torch.Tensor]:
    """R, U, S and γ in a loop over the layers, as a paper's code would have it.

    ``bounds`` are the offsets on the host, where such code knows its layers' sizes anyway.
    """
    risks, utilities, scores = [], [], []
    for layer, (start, end) in enumerate(itertools.pairwise(bounds)):
        part = moments[:, :, start:end]
        mean_f, mean_r = part[0, 0] / counts[layer, 0], part[0, 1] / counts[layer, 1]
        total = mean_f + mean_r
        contrast = torch.where(total > 0, (mean_f - mean_r) / total, 0.0)
        utility = norms[start:end] * (part[1, 1] / counts[layer, 1]).sqrt()
        top = utility.max()
        utility = torch.where(top > 0, utility / top, 0.0)
        risks.append(contrast.clamp_min(0))
        utilities.append(utility)
        scores.append(risks[-1] * (1 - utility))
    score = torch.cat(scores)
    u = ((score - threshold) / (score.max() - threshold)).clamp_min(0)
    factors = torch.where(score > threshold, torch.exp(-strength * u), 1.0).float()
    return {"risk": torch.cat(risks), "utility": torch.cat(utilities), "score": score, "γ": factors}


def scores_ucan(
    moments: torch.Tensor,
    counts: torch.Tensor,
    norms: torch.Tensor,
    offsets: torch.Tensor,
    *,
    threshold: float,
    strength: float,
) -> dict[str, torch.Tensor]:
    """The same by ``ucan_fast``'s two operators."""
    risk, utility, score = ops.contrastive_scores(
        moments,
        counts,
        norms,
        offsets,
        statistic="mean_abs",
        contrast="symmetric",
        normalization="none",
        fusion="protect",
        utility_weight=1.0,
    )
    factors = ops.attenuation_factors(
        score, threshold, decay="exponential", strength=strength, floor=0.0
    )
    return {"risk": risk, "utility": utility, "score": score, "γ": factors}
