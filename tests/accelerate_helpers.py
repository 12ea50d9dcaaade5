"""What the tests of the fused forward share: a model of one layer, and the tolerance rule."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ucan_fast import ops


class One(nn.Module):
    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, x):
        return self.dense(x)


def make_x(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return (got.double() - want.double()).abs().max().item() if want.numel() else 0.0


def assert_no_worse(got, pefts, want, what: str = "") -> None:
    """The tolerance rule: less than twice PEFT's own error in that dtype, plus 1e-6 relative."""
    assert got.dtype == pefts.dtype, what
    assert torch.isfinite(got).all(), what
    scale = want.abs().max().item() if want.numel() else 0.0
    mine, theirs = error(got, want), error(pefts, want)
    assert mine <= 2 * theirs + 1e-6 * scale, f"{what}: {mine:.3g}, PEFT {theirs:.3g}"


@dataclasses.dataclass(repr=False)
class Call:
    """One fused forward. No repr: a failing assert must not print tensors that FSDP freed."""

    x: torch.Tensor
    dtype: torch.dtype


def count_fused_calls(monkeypatch) -> list[Call]:
    """Grows by one whenever a layer runs the fused forward: outputs alone cannot show which ran."""
    calls = []
    # A layer begins with one of the two: shrink where its statistics are taken.
    shrink, add_lora = ops.shrink, ops.add_lora

    def counted_shrink(x, a, *, dtype, **options):
        calls.append(Call(x, dtype))
        return shrink(x, a, dtype=dtype, **options)

    def counted_add_lora(base_out, x, *operands, dtype, **options):
        calls.append(Call(x, dtype))
        return add_lora(base_out, x, *operands, dtype=dtype, **options)

    monkeypatch.setattr(ops, "shrink", counted_shrink)
    monkeypatch.setattr(ops, "add_lora", counted_add_lora)
    return calls
