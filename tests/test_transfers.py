"""Many tensors to the CPU in few transfers."""

from __future__ import annotations

import torch

from ucan_fast import transfers
from ucan_fast.transfers import to_cpu


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def test_what_is_there_is_returned_as_it_is():
    here = [torch.randn(3, 4).t(), torch.randn((), dtype=torch.float64), torch.empty(0, 2)]
    for given, got in zip(here, to_cpu(here, wide), strict=True):
        assert got.data_ptr() == given.data_ptr()
        assert got.shape == given.shape
    parameter = torch.nn.Parameter(torch.randn(2))
    (got,) = to_cpu([parameter])
    assert not got.requires_grad


def test_dtypes_are_widened():
    narrow = torch.randn(5, 2).to(torch.bfloat16)
    (got,) = to_cpu([narrow], wide)
    assert got.dtype == torch.float32
    assert torch.equal(got, narrow.float())


def test_one_transfer_for_each_device_and_dtype(monkeypatch):
    """A device that keeps no values stands for the GPU: what arrives is numbered."""
    sent = []

    def copied(flat):
        sent.append((flat.dtype, flat.numel()))
        return torch.arange(flat.numel(), dtype=flat.dtype)

    monkeypatch.setattr(transfers, "_copied", copied)
    shapes = [(2, 3), (4,), (), (0, 5), (3, 1)]
    away = [torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes]
    away.insert(1, torch.empty(2, 2, device="meta", dtype=torch.float64))
    here = torch.randn(3)
    got = to_cpu([*away, here], wide)
    assert sent == [(torch.float32, 14), (torch.float64, 4)]
    assert [tuple(t.shape) for t in got] == [(2, 3), (2, 2), (4,), (), (0, 5), (3, 1), (3,)]
    assert got[0].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert got[1].flatten().tolist() == [0, 1, 2, 3]
    assert got[2].tolist() == [6, 7, 8, 9]
    assert got[3].item() == 10
    assert got[5].flatten().tolist() == [11, 12, 13]
    assert torch.equal(got[6], here)
