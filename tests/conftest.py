"""What every test shares: seeds, threads, Triton's interpreter, and the gpu marker."""

from __future__ import annotations

import os
import random

import fast_interpreter
import numpy as np
import pytest
import torch

# No test may depend on a hub; a missing file is then an error at once instead of a long retry.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Triton reads it when kernels are decorated, so it must be set before anything imports them.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    fast_interpreter.install()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason=f"no CUDA device (torch {torch.__version__})")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
