"""UCAN_FAST_BACKEND: named backends are obeyed or refused, never silently replaced."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from ucan_fast import UcanError, kernels, native, ops
from ucan_fast.ops import attenuate as attenuate_module
from ucan_fast.ops import backend
from ucan_fast.ops.backend import choose, is_transformed, requested_backend

CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.mark.parametrize("name", ["CUDA", "NATIVE", "Reference", "auto ", "1"])
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
    with pytest.raises(UcanError, match="'native' cannot run attenuate_: not built: no compiler"):
        call()


def test_native_leaves_the_weight_untouched_when_it_refuses(monkeypatch, missing):
    monkeypatch.setenv("UCAN_FAST_BACKEND", "native")
    weight = torch.ones(2, 2)
    with pytest.raises(UcanError):
        ops.attenuate_([weight], torch.zeros(2), [0], [0])
    assert weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]


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


def test_a_pass_decides_once(monkeypatch, spy):
    """Neither the variable nor the libraries are looked at again, but use_backend is obeyed."""
    asked = []
    status = native.status()
    monkeypatch.setattr(native, "status", lambda: asked.append(None) or status)
    monkeypatch.setenv("UCAN_FAST_BACKEND", "auto")
    with backend.decide_once():
        chosen = [choose("attenuate_", CPU) for _ in range(3)]
        assert len(asked) == 1
        monkeypatch.setenv("UCAN_FAST_BACKEND", "reference")
        assert choose("attenuate_", CPU) == chosen[0] == fastest(status)
        assert choose("expand", CPU, torch.float32) == fastest(status)
        assert len(asked) == 2
        with backend.use_backend("reference"):
            assert choose("attenuate_", CPU) == "reference"
        with backend.decide_once():  # one pass inside another
            assert choose("attenuate_", CPU) == chosen[0]
        assert len(asked) == 2
    assert choose("attenuate_", CPU) == "reference"


def fastest(status: dict[str, str]) -> str:
    return "native" if status["_C"] == "available" else "reference"


def test_a_pass_decides_for_each_dtype_and_device(monkeypatch):
    status = {"_C": "available", "_C_cuda": "not built"}
    monkeypatch.setattr(native, "status", lambda: status)
    monkeypatch.setattr(kernels, "obstacle", lambda kind: None)
    monkeypatch.delenv("UCAN_FAST_BACKEND", raising=False)
    cuda = torch.device("cuda")
    with backend.decide_once():
        for _ in range(2):
            assert choose("shrink", CPU, torch.float32) == "native"
            assert choose("shrink", cuda, torch.float32) == "triton"
            assert choose("shrink", cuda, torch.float64) == "reference"
            assert choose("contrastive_scores", cuda) == "triton"


def test_a_pass_does_not_keep_what_it_could_not_decide(monkeypatch, missing):
    monkeypatch.setenv("UCAN_FAST_BACKEND", "native")
    with backend.decide_once():
        for _ in range(2):
            with pytest.raises(UcanError, match="cannot run attenuate_"):
                choose("attenuate_", CPU)


def test_native_and_cuda_ask_for_the_library_of_the_tensors(monkeypatch, missing):
    cuda = torch.device("cuda")
    for name in ("native", "cuda"):
        with pytest.raises(UcanError, match="no nvcc here"), ops.use_backend(name):
            choose("attenuate_", cuda)
    with pytest.raises(UcanError, match="no code for mps"), ops.use_backend("native"):
        choose("attenuate_", torch.device("mps"))
    with pytest.raises(UcanError, match="tensors are on cpu"), ops.use_backend("cuda"):
        choose("attenuate_", CPU)


@pytest.mark.parametrize("name", ["native", "cuda"])
def test_operators_that_a_backend_does_not_have_go_as_under_auto(monkeypatch, name):
    monkeypatch.setattr(native, "status", lambda: {"_C": "available", "_C_cuda": "available"})
    monkeypatch.setattr(kernels, "obstacle", lambda kind: None)
    with ops.use_backend(name):
        assert choose("contrastive_scores", CPU) == "reference"
        assert choose("shrink", torch.device("cuda"), torch.float32) == "triton"
        assert choose("expand", torch.device("cuda"), torch.bfloat16) == "triton"
        assert choose("accumulate_moments", torch.device("cuda"), torch.float16) == "triton"


# What "auto" takes: (operator, device, the CUDA library, Triton) -> backend.
AUTO = [
    ("shrink", "cuda", True, True, "triton"),
    ("shrink", "cuda", True, False, "reference"),
    ("shrink", "cpu", True, True, "native"),
    ("expand", "cuda", True, True, "triton"),
    ("expand", "cpu", True, True, "native"),
    ("accumulate_moments", "cuda", True, True, "triton"),
    ("accumulate_moments", "cpu", True, True, "native"),
    ("contrastive_scores", "cuda", True, True, "triton"),
    ("contrastive_scores", "cpu", True, True, "reference"),
    ("attenuation_factors", "cuda", True, True, "triton"),
    ("attenuate_", "cuda", True, True, "native"),
    ("attenuate_", "cuda", False, True, "triton"),
    ("attenuate_", "cuda", False, False, "reference"),
    ("attenuate_", "cpu", True, True, "native"),
    ("attenuate_", "mps", True, True, "reference"),
]


@pytest.mark.parametrize(("operator", "kind", "library", "triton", "expected"), AUTO)
def test_auto_takes_the_fastest(monkeypatch, operator, kind, library, triton, expected):
    status = {"_C": "available", "_C_cuda": "available" if library else "not built"}
    monkeypatch.setattr(native, "status", lambda: status)
    monkeypatch.setattr(
        kernels, "obstacle", lambda k: None if triton and k in ("cpu", "cuda") else "no Triton"
    )
    with ops.use_backend("auto"):
        assert choose(operator, torch.device(kind), torch.float32) == expected
        if expected == "triton" and operator in ("shrink", "expand", "accumulate_moments"):
            assert choose(operator, torch.device(kind), torch.float64) == "reference"


def test_triton_refuses_what_it_cannot_run(monkeypatch):
    monkeypatch.setattr(kernels, "obstacle", lambda kind: None)
    with ops.use_backend("triton"):
        assert choose("shrink", CPU, torch.float32, torch.bfloat16) == "triton"
        assert choose("contrastive_scores", CPU) == "triton"
        with pytest.raises(UcanError, match=r"'triton' cannot run shrink: .*not torch.float64"):
            choose("shrink", CPU, torch.float32, torch.float64)
    monkeypatch.setattr(kernels, "obstacle", lambda kind: f"nothing for {kind}")
    with ops.use_backend("triton"):
        for function in (lambda: call(), call_all):
            with pytest.raises(UcanError, match="nothing for cpu"):
                function()


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_fused_linear_by_name_is_refused_on_a_gpu_without_tma(monkeypatch, capability):
    cuda = torch.device("cuda")
    monkeypatch.setattr(kernels, "obstacle", lambda kind: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose("expand", cuda, torch.bfloat16) == "triton"
    if capability >= (9, 0):
        for name in ("auto", "triton"):
            with ops.use_backend(name):
                assert choose("fused_linear", cuda, torch.bfloat16) == "triton"
        return
    with ops.use_backend("auto"):
        assert choose("fused_linear", cuda, torch.bfloat16) == "reference"
    with ops.use_backend("triton"), pytest.raises(UcanError, match=r"TMA needs .* 9\.0"):
        choose("fused_linear", cuda, torch.bfloat16)


def test_use_backend_wins_over_the_variable_and_ends(monkeypatch, missing, spy):
    monkeypatch.setenv("UCAN_FAST_BACKEND", "native")
    with ops.use_backend("reference"):
        call()
        with ops.use_backend("auto"):
            call()
        call()
    assert spy == ["reference"] * 3
    with pytest.raises(UcanError):
        call()
    with pytest.raises(UcanError, match="use_backend='warp' is unknown"), ops.use_backend("warp"):
        pass
    with pytest.raises(ZeroDivisionError), ops.use_backend("reference"):
        raise ZeroDivisionError
    assert requested_backend() == "native"


def test_backends_in_use_names_every_operator_and_the_reason(missing):
    use = ops.backends_in_use()
    assert set(use) == {
        *("shrink", "expand", "fused_linear", "accumulate_moments"),
        *("contrastive_scores", "attenuation_factors", "attenuate_"),
    }
    assert use["attenuate_"].startswith(f"reference on {DEVICE} tensors (not native: not built: no")
    assert all("not triton: " in value for value in use.values())


def test_backends_in_use_says_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(native, "status", lambda: {"_C": "available", "_C_cuda": "available"})
    assert ops.backends_in_use()["attenuate_"].startswith(f"native on {DEVICE} tensors")
    with ops.use_backend("reference"):
        text = ops.backends_in_use()["attenuate_"]
    assert "not native: reference was asked for" in text
    monkeypatch.setattr(kernels, "obstacle", lambda kind: "no Triton at all")
    with ops.use_backend("triton"):
        assert "no Triton at all" in ops.backends_in_use()["shrink"]


def test_an_extension_older_than_the_code_is_not_called(monkeypatch):
    monkeypatch.setattr(native, "status", lambda: {"_C": "available", "_C_cuda": "available"})
    monkeypatch.setitem(backend._NATIVE["cpu"], "accumulate_moments", "_not_built_yet_")
    with ops.use_backend("auto"):
        assert choose("accumulate_moments", CPU, torch.float32) == "reference"
    with pytest.raises(UcanError, match="older than this code"), ops.use_backend("native"):
        choose("accumulate_moments", CPU, torch.float32)


def test_obstacles_of_the_kernels(monkeypatch):
    real = kernels._triton_version
    monkeypatch.setattr(kernels, "_triton_version", lambda: None)
    assert "not installed" in kernels.obstacle("cuda")
    monkeypatch.setattr(kernels, "_triton_version", lambda: "3.5.1")
    assert "3.5.1 is too old" in kernels.obstacle("cuda")
    for version in ("3.6.0", "4.0", "unknown", "3.7.1+git123"):
        monkeypatch.setattr(kernels, "_triton_version", lambda version=version: version)
        assert kernels.obstacle("cuda") is None
        assert "xpu" in kernels.obstacle("xpu")
    monkeypatch.setattr(kernels, "_interpreted", lambda: False)
    assert "TRITON_INTERPRET=1" in kernels.obstacle("cpu")
    monkeypatch.setattr(kernels, "_interpreted", lambda: True)
    assert kernels.obstacle("cpu") is None
    monkeypatch.setattr(kernels, "_triton_version", lambda: "3.6.0")
    for numpy, usable in (((2, 3), True), ((2, 4), False)):
        monkeypatch.setattr(kernels, "_numpy", lambda numpy=numpy: numpy)
        assert (kernels.obstacle("cpu") is None) == usable
        assert kernels.obstacle("cuda") is None
    assert real() is None or real()[0].isdigit()


def test_import_survives_without_the_library(monkeypatch, missing):
    call_all()


@pytest.mark.skipif(kernels.obstacle("cpu") is not None, reason=str(kernels.obstacle("cpu")))
def test_only_a_tangent_keeps_a_call_from_the_kernels(monkeypatch):
    """That a level of forward-mode AD is open, or was, says nothing of the arguments."""
    from ucan_fast.kernels import expand as expand_kernel
    from ucan_fast.kernels import shrink as shrink_kernel

    launched = []

    def note(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: launched.append(name) or real(*args))

    note(shrink_kernel, "shrink")
    note(expand_kernel, "expand")
    x, a, b = torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 2)

    def layer(x):
        return ops.expand(torch.zeros(3, 5), ops.shrink(x, a), b, 1.0)

    with ops.use_backend("triton"):
        with forward_ad.dual_level():
            assert not is_transformed(x, None)
            layer(x)
            dual = forward_ad.make_dual(x, x)
            assert is_transformed(None, dual)
            layer(dual)
        assert launched == ["shrink", "expand"]
        assert torch.func.vmap(lambda x: torch.tensor(is_transformed(a)).expand(1))(x).all()
        assert not is_transformed(dual)
        layer(x)
    assert launched == ["shrink", "expand"] * 2
