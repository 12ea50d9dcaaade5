"""fused_linear against an fp64 oracle: at most twice torch's own error, for y and the moments."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from ucan_fast.kernels import fused_linear as module
from ucan_fast.kernels.fused_linear import fused_linear, obstacle
from ucan_fast.ops.expand import delta_reference, expand_reference
from ucan_fast.ops.moments import moments_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# x and weight, z, B: PEFT's default, plain, autocast.
DTYPES = [
    *((BF16, FP32, FP32), (BF16, BF16, BF16), (BF16, BF16, FP32), (BF16, FP32, BF16)),
    *((FP16, FP32, FP32), (FP16, FP16, FP16), (FP16, FP16, FP32)),
    *((FP32, FP32, FP32), (FP32, BF16, BF16), (FP32, FP16, FP16)),
]
IDS = ["-".join(str(dtype)[6:] for dtype in dtypes) for dtypes in DTYPES]

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="TMA needs Hopper"
)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory that the kernel forgets to write shows up as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


def inputs(m, n, k, r, dtypes=(FP32, FP32, FP32), seed=0):
    """x, weight, z, b, bias, lora_bias, groups; δ is about as large as x Wᵀ."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    x_dtype, z_dtype, b_dtype = dtypes
    return {
        "x": normal(m, k, dtype=x_dtype),
        "weight": normal(n, k, dtype=x_dtype) * k**-0.5,
        "z": normal(m, r, dtype=z_dtype),
        "b": normal(n, r, dtype=b_dtype) * r**-0.5,
        "bias": normal(n, dtype=x_dtype),
        "lora_bias": normal(n, dtype=b_dtype),
        "groups": torch.randint(-1, 3, (m,), generator=generator).to(DEVICE),
    }


def oracle(x, weight, z, b, scaling, bias=None, lora_bias=None):
    """y in fp64, of B and its bias as rounded to z's dtype."""
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    lora_bias = None if lora_bias is None else lora_bias.to(z.dtype).double()
    return y + scaling * F.linear(z.double(), b.to(z.dtype).double(), lora_bias)


def plain(x, weight, z, b, scaling, bias=None, lora_bias=None):
    return expand_reference(F.linear(x, weight, bias), z, b, scaling, lora_bias)


def assert_as_good(got, torchs, exact):
    """The rule: at most twice torch's own error, and 1e-6 of the largest value."""
    assert got.shape == exact.shape
    assert got.isfinite().all()
    error = (got.double() - exact).abs().max()
    allowed = 2 * (torchs.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_moments(got, z, b, groups, scaling, before=0.0, only_group=None):
    if only_group is not None:
        groups = torch.where(groups == only_group, groups, -1)
    delta = scaling * z.double() @ b.double().T
    exact = moments_reference(delta.reshape(-1, delta.shape[-1]), groups)
    torchs = moments_reference(delta_reference(z, b, scaling).flatten(0, -2), groups)
    for statistic in range(2):
        assert_as_good(
            got[statistic] - before,
            torchs[statistic],
            exact[statistic],
        )


def run(data, scaling, only_group=None, moments=True, biases=True, before=0.0):
    """y and, if asked for, the moments, which start at ``before``."""
    n = data["weight"].shape[0]
    arguments = {name: data[name] for name in ("x", "weight", "z", "b")}
    if biases:
        arguments |= {name: data[name] for name in ("bias", "lora_bias")}
    total = torch.full((2, 2, n), before, dtype=torch.float64, device=DEVICE) if moments else None
    y = fused_linear(
        **arguments,
        scaling=scaling,
        groups=data["groups"] if moments else None,
        only_group=only_group,
        delta_moments=total,
    )
    assert y.dtype == data["x"].dtype
    assert_as_good(y, plain(**arguments, scaling=scaling), oracle(**arguments, scaling=scaling))
    return y, total


@pytest.mark.parametrize("dtypes", DTYPES, ids=IDS)
@pytest.mark.parametrize(
    ("m", "n", "k", "r"),
    [(1, 8, 8, 3), (7, 136, 72, 8), (129, 72, 136, 16), (130, 264, 24, 64)],
)
def test_y_and_moments(dtypes, m, n, k, r):
    data = inputs(m, n, k, r, dtypes)
    _, moments = run(data, scaling=1.7, before=3.0)
    assert_moments(moments, data["z"], data["b"], data["groups"], 1.7, before=3.0)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[2], DTYPES[7]])
@pytest.mark.parametrize("r", [1, 17, 33, 65, 256])
def test_every_rank(dtypes, r):
    data = inputs(129, 16, 8, r, dtypes)
    _, moments = run(data, scaling=-0.5, biases=False)
    assert_moments(moments, data["z"], data["b"], data["groups"], -0.5)


def test_moments_take_b_in_full_and_y_takes_it_rounded():
    """z is bf16, as under autocast, and y shows B's own digits: x is 0 and z is 1."""
    data = inputs(2, 24, 16, 1, (FP32, BF16, FP32))
    data |= {"x": torch.zeros_like(data["x"]), "z": torch.ones_like(data["z"])}
    data["groups"] = torch.tensor([0, 1], device=DEVICE)
    y, moments = run(data, scaling=1.0, biases=False)
    assert torch.equal(y, data["b"].to(BF16).float().T.expand(2, 24))
    assert not torch.equal(y[0], data["b"][:, 0])
    torch.testing.assert_close(
        moments[0], data["b"].T.abs().double().expand(2, 24), rtol=2**-22, atol=0
    )


@pytest.mark.parametrize("biases", [("bias",), ("lora_bias",), ()], ids=str)
def test_each_bias_alone_and_no_moments(biases):
    data = inputs(9, 24, 16, 4, DTYPES[2])
    data |= {name: None for name in ("bias", "lora_bias") if name not in biases}
    run(data, scaling=2.0, moments=False)
    _, moments = run(data, scaling=2.0)
    assert_moments(moments, data["z"], data["b"], data["groups"], 2.0)


@pytest.mark.parametrize("only_group", [0, 1])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_one_group(only_group, dtype):
    data = inputs(140, 40, 16, 8, DTYPES[0])
    data["groups"] = data["groups"].to(dtype)
    _, moments = run(data, scaling=1.5, only_group=only_group, before=1.0)
    assert_moments(moments, data["z"], data["b"], data["groups"], 1.5, 1.0, only_group)
    assert (moments[:, 1 - only_group] == 1.0).all()


@pytest.mark.parametrize("dtypes", [DTYPES[1], DTYPES[7]], ids=["bf16", "fp32"])
def test_more_row_blocks_than_one_band_has(dtypes):
    m = module._CONFIGS[dtypes[0].itemsize]["BM"] * (module._ROW_BLOCKS + 2) + 5
    data = inputs(m, 136, 8, 8, dtypes)
    _, moments = run(data, scaling=1.0)
    assert_moments(moments, data["z"], data["b"], data["groups"], 1.0)


def test_bits_do_not_depend_on_the_number_of_programs(monkeypatch):
    data = inputs(300, 264, 40, 8, DTYPES[0])
    results = []
    for programs in (1, 3, 7, 1000):
        monkeypatch.setattr(module, "_programs", lambda device, programs=programs: programs)
        results.append(run(data, scaling=1.3))
    for y, moments in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(moments, results[0][1])


def test_nan_stays_in_its_row():
    data = inputs(20, 16, 8, 4, DTYPES[0])
    arguments = {name: data[name] for name in ("x", "weight", "z", "b")}
    ignored = (data["groups"] != 0) & (data["groups"] != 1)
    assert ignored.any()
    clean = fused_linear(**arguments, scaling=2.0)
    data["z"][ignored] = torch.nan
    moments = torch.zeros(2, 2, 16, dtype=torch.float64, device=DEVICE)
    y = fused_linear(**arguments, scaling=2.0, groups=data["groups"], delta_moments=moments)
    assert y[ignored].isnan().all()
    assert torch.equal(y[~ignored], clean[~ignored])
    kept = ~ignored
    assert_moments(moments, data["z"][kept], data["b"], data["groups"][kept], 2.0)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 5), (3, 1, 2, 4)])
def test_shapes_and_strides(shape):
    """x and z as slices of something wider, B transposed, W's rows farther apart than K."""
    m, n, k, r = torch.Size(shape).numel(), 24, 16, 3
    wide = inputs(m, n, k + 8, r + 5, DTYPES[0])
    data = {
        **wide,
        "x": wide["x"].view(*shape, k + 8)[..., :k],
        "weight": wide["weight"][:, 8:],
        "z": wide["z"].view(*shape, r + 5)[..., 2 : 2 + r],
        "b": wide["b"].T.contiguous().T[:, :r],
    }
    y, moments = run(data, scaling=0.7)
    assert y.shape == (*shape, n)
    assert y.is_contiguous()
    assert_moments(moments, data["z"], data["b"], data["groups"], 0.7)


def test_moments_that_are_a_view():
    data = inputs(9, 16, 8, 4)
    wide = torch.zeros(2, 2, 40, dtype=torch.float64, device=DEVICE)
    fused_linear(
        *(data[name] for name in ("x", "weight", "z", "b")),
        scaling=1.0,
        groups=data["groups"],
        delta_moments=wide[:, :, 8:24],
    )
    assert_moments(wide[:, :, 8:24], data["z"], data["b"], data["groups"], 1.0)
    assert (wide[:, :, :8] == 0).all()
    assert (wide[:, :, 24:] == 0).all()


@pytest.mark.parametrize(("m", "n"), [(0, 16), (5, 0), (0, 0)])
def test_nothing_to_do(m, n):
    data = inputs(m, n, 8, 4)
    moments = torch.ones(2, 2, n, dtype=torch.float64, device=DEVICE)
    arguments = [data[name] for name in ("x", "weight", "z", "b")]
    y = fused_linear(*arguments, scaling=1.0, groups=data["groups"], delta_moments=moments)
    assert y.shape == (m, n)
    assert (moments == 1).all()


def _shifted(tensor, elements):
    """The same values, starting some elements after an aligned address."""
    storage = torch.zeros(tensor.numel() + elements, dtype=tensor.dtype, device=tensor.device)
    shifted = storage[elements:].view(tensor.shape)
    return shifted.copy_(tensor)


OBSTACLES = {
    "x is torch.float64": lambda d: {"x": d["x"].double()},
    "the weight torch.float32": lambda d: {"weight": d["weight"].float()},
    "z is torch.float64": lambda d: {"z": d["z"].double()},
    "z is torch.int64": lambda d: {"z": d["z"].long()},
    "B is torch.float64": lambda d: {"b": d["b"].double()},
    "B is torch.int64": lambda d: {"b": d["b"].long()},
    "K is 0": lambda d: {"x": d["x"][:, :0], "weight": d["weight"][:, :0]},
    "no common stride": lambda d: {"x": d["x"].view(2, 4, 16)[:, :3]},
    "a row of y, 20 elements": lambda d: {"weight": d["weight"][:20], "b": d["b"][:20]},
    "x's last stride is 8": lambda d: {"x": d["x"].T.contiguous().T},
    "weight's last stride is 24": lambda d: {"weight": d["weight"].T.contiguous().T},
    "x's row stride, 12": lambda d: {
        "x": d["x"][:, :12].contiguous(),
        "weight": d["weight"][:, :12],
    },
    "x's row stride, 0": lambda d: {"x": d["x"][:1].expand(8, 16)},
    "weight's row stride, 12": lambda d: {
        "x": d["x"][:, :12],
        "weight": d["weight"][:, :12].contiguous(),
    },
    "x does not start": lambda d: {"x": _shifted(d["x"], 4)},
    "the weight does not start": lambda d: {"weight": _shifted(d["weight"], 4)},
    "the bias is not contiguous": lambda d: {"bias": d["weight"][:, 0]},
    "the LoRA bias is not contiguous": lambda d: {"lora_bias": d["weight"][:, 0]},
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_every_obstacle_has_its_reason(reason):
    data = inputs(8, 24, 16, 4, DTYPES[0])
    arguments = {name: data[name] for name in ("x", "weight", "z", "b")}
    assert obstacle(**arguments) is None
    arguments |= OBSTACLES[reason](data)
    assert reason in obstacle(**arguments)
    with pytest.raises(ValueError, match="fused_linear: .*" + reason.replace("(", r"\(")):
        fused_linear(**arguments, scaling=1.0)


def test_compile_cases_are_what_is_launched(monkeypatch):
    """Same names, types of arguments, block sizes and options as the launcher's."""
    launched = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append((args, kwargs))

    kernel = module.fused_linear_kernel
    names = list(inspect.signature(kernel.fn).parameters)
    monkeypatch.setattr(module, "fused_linear_kernel", Recorder())
    monkeypatch.setattr(module, "fold_", lambda *a: None)
    dtypes = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
    cases = module.compile_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        x, z, b, r, counted = (part.split(" ") for part in case.name.split(", "))
        data = inputs(4, 16, 16, int(r[1]), (dtypes[x[0]], dtypes[z[0]], dtypes[b[0]]))
        data["groups"] = data["groups"].to(torch.int8)
        both, moments = counted[0] == "both", counted[0] != "no"
        arguments = {name: data[name] for name in ("x", "weight", "z", "b")}
        if both:
            arguments |= {name: data[name] for name in ("bias", "lora_bias")}
        totals = torch.zeros(2, 2, 16, dtype=torch.float64, device=DEVICE)
        fused_linear(
            **arguments,
            scaling=1.0,
            groups=data["groups"] if moments else None,
            only_group=None if both or not moments else 0,
            delta_moments=totals if moments else None,
        )
        args, kwargs = launched.pop()
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for option in ("num_warps", "num_stages"):
            assert given.pop(option) == getattr(case, option)
        assert given.pop("enable_fp_fusion") is case.options["enable_fp_fusion"]
        assert set(given) == set(names) == set(case.signature)
        if not moments:
            given["BOTH"] = False  # means nothing without moments
        for name, value in given.items():
            if case.signature[name] == "constexpr":
                if name not in ("CAST_DOT", "INTERPRETED"):  # under the interpreter the reverse
                    assert value == case.constants[name], (case.name, name)
            else:
                assert _type(value) == case.signature[name], (case.name, name)


def _type(value):
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.int8: "i8"}
    if isinstance(value, torch.Tensor):
        return f"*{short[value.dtype]}"
    if hasattr(value, "block_shape"):
        return f"tensordesc<{short[value.base.dtype]}{list(value.block_shape)}>"
    return {int: "i32", float: "fp32"}[type(value)]
