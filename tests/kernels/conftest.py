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
