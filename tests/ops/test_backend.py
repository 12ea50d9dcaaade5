"""UCAN_FAST_BACKEND: named backends are obeyed or refused, never silently replaced."""

from __future__ import annotations

import pytest
import torch

from ucan_fast import UcanError, native, ops
from ucan_fast.ops import attenuate as attenuate_module
from ucan_fast.ops import backend as backend_module

CPU = torch.device("cpu")


def call() -> torch.Tensor:
    weight = torch.full((2, 2), 4.0)
    ops.attenuate_([weight], torch.tensor([0.5, 1.0]), [0], [0])
    return weight


def call_all() -> None:
    """One call of every operator."""
    x, groups = torch.ones(3, 4), torch.tensor([0, 1, -1])
    moments = torch.zeros(2, 2, 4, dtype=torch.float64)
    ops.accumulate_moments(x, groups, moments)
    z = ops.shrink(x, torch.ones(2, 4))
    ops.expand(torch.zeros(3, 5), z, torch.ones(5, 2), 1.0)
    _, _, score = ops.contrastive_scores(
        moments,
        torch.ones(1, 2, dtype=torch.float64),
        torch.ones(4, dtype=torch.float64),
        torch.tensor([0, 4]),
        statistic="mean_abs",
        contrast="symmetric",
        normalization="none",
        fusion="protect",
        utility_weight=1.0,
    )
    ops.attenuation_factors(score, 0.0, decay="hard", strength=1.0, floor=0.0)
    call()


@pytest.fixture
def missing(monkeypatch):
    """A machine on which the native library could not be built."""
    reason = {"_C": "not built: no compiler here", "_C_cuda": "not built: no nvcc here"}
    monkeypatch.setattr(native, "status", lambda: reason)


@pytest.fixture
def spy(monkeypatch) -> list[str]:
    """Notes when the reference of attenuate_ runs."""
    seen = []
    reference = attenuate_module.attenuate_reference_

    def noting(*arguments):
        seen.append("reference")
        return reference(*arguments)

    monkeypatch.setattr(attenuate_module, "attenuate_reference_", noting)
    return seen


@pytest.mark.parametrize("name", ["cuda", "NATIVE", "Reference", "auto ", "1"])
def test_an_unknown_backend_is_refused_by_every_operator(monkeypatch, name):
    monkeypatch.setenv("UCAN_FAST_BACKEND", name)
    x = torch.ones(1, 2)
    moments = torch.zeros(2, 2, 2, dtype=torch.float64)
    counts, norms = torch.ones(1, 2).double(), torch.ones(2).double()
    choices = {
        "statistic": "rms",
        "contrast": "none",
        "normalization": "none",
        "fusion": "protect",
        "utility_weight": 1.0,
    }
    calls = [
        call,
        lambda: ops.accumulate_moments(x, torch.zeros(1, dtype=torch.int8), moments),
        lambda: ops.shrink(x, x),
        lambda: ops.expand(x, torch.ones(1, 1), torch.ones(2, 1), 1.0),
        lambda: ops.contrastive_scores(moments, counts, norms, torch.tensor([0, 2]), **choices),
        lambda: ops.attenuation_factors(norms, 0.5, decay="hard", strength=1.0, floor=0.0),
    ]
    for function in calls:
        with pytest.raises(UcanError, match=r"UCAN_FAST_BACKEND=.* is unknown; use one of auto"):
            function()


def test_native_refuses_with_the_reason_when_it_is_missing(monkeypatch, missing):
    monkeypatch.setenv("UCAN_FAST_BACKEND", "native")
    with pytest.raises(UcanError, match="native cannot run attenuate_: not built: no compiler"):
        call()


def test_native_leaves_the_weight_untouched_when_it_refuses(monkeypatch, missing):
    monkeypatch.setenv("UCAN_FAST_BACKEND", "native")
    weight = torch.ones(2, 2)
    with pytest.raises(UcanError):
        ops.attenuate_([weight], torch.zeros(2), [0], [0])
    assert weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_native_reports_the_cuda_library_for_cuda_tensors(monkeypatch, missing):
    monkeypatch.setenv("UCAN_FAST_BACKEND", "native")
    with pytest.raises(UcanError, match="no nvcc here"):
        backend_module.use_native("attenuate_", torch.device("cuda"))
    with pytest.raises(UcanError, match="no native backend for mps"):
        backend_module.use_native("attenuate_", torch.device("mps"))


def test_auto_falls_back_when_native_is_missing(monkeypatch, missing, spy):
    for name in ("auto", ""):
        monkeypatch.setenv("UCAN_FAST_BACKEND", name)
        assert call().tolist() == [[2.0, 2.0], [4.0, 4.0]]
    monkeypatch.delenv("UCAN_FAST_BACKEND")
    call()
    assert spy == ["reference"] * 3


def test_reference_never_asks_for_native(monkeypatch, spy):
    def forbidden(*_):
        raise AssertionError("the native library was touched")

    monkeypatch.setattr(native, "load", forbidden)
    monkeypatch.setattr(native, "status", forbidden)
    monkeypatch.setenv("UCAN_FAST_BACKEND", "reference")
    call_all()
    assert spy == ["reference"]


@pytest.mark.skipif(
    native.status()["_C"] != "available", reason=f"no native library: {native.status()['_C']}"
)
@pytest.mark.parametrize("name", ["auto", "native", None])
def test_native_is_used_where_it_is_available(monkeypatch, spy, name):
    if name is None:
        monkeypatch.delenv("UCAN_FAST_BACKEND", raising=False)
    else:
        monkeypatch.setenv("UCAN_FAST_BACKEND", name)
    assert call().tolist() == [[2.0, 2.0], [4.0, 4.0]]
    assert spy == []


def test_the_variable_is_read_at_every_call(monkeypatch, missing, spy):
    monkeypatch.setenv("UCAN_FAST_BACKEND", "reference")
    call()
    monkeypatch.setenv("UCAN_FAST_BACKEND", "native")
    with pytest.raises(UcanError):
        call()
    assert spy == ["reference"]


def test_backends_in_use_names_every_operator_and_the_reason(missing):
    use = ops.backends_in_use()
    assert set(use) == {"shrink", "expand", "moments", "scores", "attenuate_"}
    assert use["attenuate_"] == "reference (not built: no compiler here)"
    assert all(value.startswith("reference (") for value in use.values())


def test_backends_in_use_says_native_where_it_is(monkeypatch):
    monkeypatch.setattr(native, "status", lambda: {"_C": "available", "_C_cuda": "no"})
    assert ops.backends_in_use()["attenuate_"] == "native"


def test_import_survives_without_the_library(monkeypatch, missing):
    call_all()
