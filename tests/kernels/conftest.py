"""The kernels' tests run where the kernels do: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from ucan_fast import kernels

REASON = kernels.obstacle("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _kernels_run_here(request: pytest.FixtureRequest) -> None:
    if REASON and request.path.name != "test_aot.py":
        pytest.skip(f"Triton kernels: {REASON}")


@pytest.fixture
def poison(monkeypatch):
    """Memory that a kernel forgets to write shows up as NaN."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
