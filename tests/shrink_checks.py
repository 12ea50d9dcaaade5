"""Inputs of the shrink kernels' tests, and what their results are held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def name_of(value) -> str:
    if isinstance(value, tuple):
        return "-".join(name_of(item) for item in value)
    return str(value).replace("torch.", "")


def randn(*shape, dtype=FP32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def random_groups(x: torch.Tensor, dtype=torch.int8):
    generator = torch.Generator().manual_seed(5)
    tokens = x[..., 0].numel()
    return torch.randint(-1, 2, (tokens,), generator=generator).to(dtype).to(DEVICE)


def zeros(n: int) -> torch.Tensor:
    return torch.zeros(2, 2, n, dtype=torch.float64, device=DEVICE)


def assert_z(z, x, a, dtype):
    """The tolerance rule: less than twice plain torch's error, plus 1e-6 relative."""
    want = F.linear(x.to(dtype).double(), a.to(dtype).double())
    plain = F.linear(x.to(dtype), a.to(dtype))
    assert z.shape == want.shape
    assert z.dtype == dtype
    assert z.is_contiguous()
    if want.numel():
        bound = 2 * (plain - want).abs().max() + 1e-6 * want.abs().max()
        assert (z - want).abs().max() <= bound


def sums(h: torch.Tensor, groups: torch.Tensor, dtype: torch.dtype, only=None) -> torch.Tensor:
    """Σ|h| and Σh² by boolean indexing, in ``dtype``."""
    rows = h.reshape(-1, h.shape[-1]).to(dtype)
    return torch.stack(
        [
            torch.stack([f(rows[groups == g]).sum(0) * (only in (None, g)) for g in (0, 1)])
            for f in (torch.abs, torch.square)
        ]
    )


def assert_moments(got, h, groups, only=None):
    want = sums(h, groups, torch.float64, only)
    plain = sums(h, groups, FP32, only).double()
    for mine, torchs, exact in zip(got, plain, want, strict=True):
        bound = 2 * (torchs - exact).abs().amax() + 1e-6 * exact.abs().amax()
        assert torch.all((mine - exact).abs() <= bound)
