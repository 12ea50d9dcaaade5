"""Every operator's tests run on every backend that works here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.testing._internal.optests import OpCheckError

from ucan_fast import UcanError, kernels, native

BACKENDS = ("reference", "native", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sets UCAN_FAST_BACKEND; ``triton`` is the interpreter where there is no GPU."""
    if request.param == "native" and native.status()["_C"] != "available":
        pytest.skip(f"no native library: {native.status()['_C']}")
    if request.param == "triton" and (reason := kernels.obstacle("cpu")):
        pytest.skip(f"CPU tensors: {reason}")
    monkeypatch.setenv("UCAN_FAST_BACKEND", request.param)
    return request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """The kernels refuse fp64, as backend.py says; that is no failure of an fp64 case."""
    try:
        return (yield)
    except (UcanError, OpCheckError) as error:  # opcheck wraps what the operator said
        if "the kernel takes fp32, bf16 and fp16, not torch.float64" in str(error):
            pytest.skip(f"fp64: {error}")
        raise
