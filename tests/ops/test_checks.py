"""Bad input handed to ``torch.ops.ucan_fast`` itself, past the functions of ``ucan_fast.ops``.

The kernels trust shapes: without the operators' own checks each of these reads or writes past the
end of a tensor, or returns memory that nobody wrote, on one backend at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from ucan_fast import UcanError, native, ops

pytestmark = pytest.mark.usefixtures("backend")

O = torch.ops.ucan_fast  # noqa: E741
F32, INT = torch.float32, torch.int32
GROUPS = torch.tensor([0, 1, -1, 0, 1, 0, 1], dtype=torch.int8)


def ones(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def meta(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="meta")


def totals(n: int) -> torch.Tensor:
    return torch.zeros(2, 2, n, dtype=torch.float64)


def shrink(x=None, a=None, dtype=F32):
    return O.shrink(ones(7, 12) if x is None else x, ones(3, 12) if a is None else a, dtype)


def shrink_moments(groups=GROUPS, only=None, of_x=None, of_z=None):
    return O.shrink.moments(ones(7, 12), ones(3, 12), F32, groups, only, of_x, of_z)


def expand(base=None, z=None, b=None, bias=None):
    base = ones(7, 10) if base is None else base
    return O.expand(base, ones(7, 3) if z is None else z, ones(10, 3) if b is None else b, 1, bias)


def expand_moments(groups=GROUPS, only=None, sums=None):
    sums = totals(10) if sums is None else sums
    return O.expand.moments(ones(7, 10), ones(7, 3), ones(10, 3), 1, None, groups, only, sums)


def moments(h=None, groups=GROUPS, only=None, sums=None):
    h = ones(7, 12) if h is None else h
    return O.accumulate_moments(h, groups, only, totals(12) if sums is None else sums)


def fused(x=None, weight=None, z=None, b=None, bias=None, lora_bias=None):
    x = ones(7, 16) if x is None else x
    weight = ones(24, 16) if weight is None else weight
    z = ones(7, 3) if z is None else z
    return O.fused_linear(x, weight, z, ones(24, 3) if b is None else b, 1, bias, lora_bias)


def fused_moments(groups=GROUPS, sums=None):
    sums = totals(24) if sums is None else sums
    matrices = (ones(7, 16), ones(24, 16), ones(7, 3), ones(24, 3))
    return O.fused_linear.moments(*matrices, 1, None, None, groups, None, sums)


def scores(sums=None, counts=None, norms=None, offsets=(0, 5, 9), **options):
    choice = {
        "statistic": "rms",
        "contrast": "symmetric",
        "normalization": "none",
        "fusion": "protect",
        "utility_weight": 1.0,
        **options,
    }
    if not isinstance(offsets, torch.Tensor):
        offsets = torch.tensor(offsets, dtype=torch.int64)
    return O.contrastive_scores(
        totals(9) if sums is None else sums,
        ones(2, 2).double() if counts is None else counts,
        ones(9).double() if norms is None else norms,
        offsets,
        *choice.values(),
    )


def factors(score=None, threshold=0.1, decay="linear", strength=1.0, floor=0.0):
    score = torch.linspace(0, 1, 9, dtype=torch.float64) if score is None else score
    return O.attenuation_factors(score, threshold, decay, strength, floor)


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "shrink: A too narrow": (lambda: shrink(a=ones(3, 5)), r"\(3, 5\)"),
    "shrink: A too wide": (lambda: shrink(a=ones(3, 4000)), r"\(3, 4000\)"),
    "shrink: A a vector": (lambda: shrink(a=ones(12)), r"\(12,\)"),
    "shrink: x a number": (lambda: shrink(torch.tensor(1.0)), r"x \(\)"),
    "shrink: A on meta": (lambda: shrink(a=meta(3, 12)), "A on meta"),
    "shrink: x on meta": (lambda: shrink(meta(7, 12)), "x on meta"),
    "shrink: integer x": (lambda: shrink(ones(7, 12, dtype=INT)), "x must be .*int32"),
    "shrink: complex x": (lambda: shrink(ones(7, 12, dtype=torch.complex64)), "complex64"),
    "shrink: boolean A": (lambda: shrink(a=ones(3, 12) > 0), "A must be .*bool"),
    "shrink: integer product": (lambda: shrink(dtype=INT), "product must be .*int32"),
    "shrink: all integers": (
        lambda: shrink(ones(7, 12, dtype=INT), ones(3, 12, dtype=INT), INT),
        "x must be .*int32",
    ),
    "shrink: few groups": (lambda: shrink_moments(GROUPS[:2], of_x=totals(12)), "7 tokens"),
    "shrink: float groups": (
        lambda: shrink_moments(GROUPS.float(), of_x=totals(12)),
        "integer .*float32",
    ),
    "shrink: boolean groups": (
        lambda: shrink_moments(GROUPS > 0, of_x=totals(12)),
        "integer .*bool",
    ),
    "shrink: narrow totals": (lambda: shrink_moments(of_x=totals(3)), r"\(2, 2, 12\)"),
    "shrink: wide totals of z": (lambda: shrink_moments(of_z=totals(12)), r"\(2, 2, 3\)"),
    "shrink: fp32 totals": (lambda: shrink_moments(of_x=totals(12).float()), "float64"),
    "shrink: group 5": (lambda: shrink_moments(only=5, of_x=totals(12)), "only_group"),
    "expand: few rows of z": (lambda: expand(z=ones(2, 3)), r"z \(2, 3\)"),
    "expand: few rows of B": (lambda: expand(b=ones(2, 3)), r"B \(2, 3\)"),
    "expand: B of another rank": (lambda: expand(b=ones(10, 70)), r"B \(10, 70\)"),
    "expand: short bias": (lambda: expand(bias=ones(2)), "a bias"),
    "expand: bias on meta": (lambda: expand(bias=meta(10)), "bias on meta"),
    "expand: B on meta": (lambda: expand(b=meta(10, 3)), "B on meta"),
    "expand: integer bias": (lambda: expand(bias=ones(10, dtype=INT)), "bias must be .*int32"),
    "expand: integer base": (lambda: expand(ones(7, 10, dtype=INT)), "base_out must be"),
    "expand: all complex": (
        lambda: expand(*(ones(*s, dtype=torch.complex64) for s in ((7, 10), (7, 3), (10, 3)))),
        "base_out must be .*complex64",
    ),
    "expand: z a number": (lambda: expand(z=torch.tensor(1.0)), r"z \(\)"),
    "expand: few groups": (lambda: expand_moments(GROUPS[:1]), "7 tokens"),
    "expand: narrow totals": (lambda: expand_moments(sums=totals(2)), r"\(2, 2, 10\)"),
    "expand: group -1": (lambda: expand_moments(only=-1), "only_group"),
    "moments: few groups": (lambda: moments(groups=GROUPS[:1]), "7 tokens"),
    "moments: narrow totals": (lambda: moments(sums=totals(2)), r"\(2, 2, 12\)"),
    "moments: fp32 totals": (lambda: moments(sums=totals(12).float()), "float64"),
    "moments: totals on meta": (lambda: moments(sums=totals(12).to("meta")), "totals on meta"),
    "moments: integer h": (lambda: moments(ones(7, 12, dtype=INT)), "int32"),
    "moments: h a number": (lambda: moments(torch.tensor(1.0), GROUPS[:1], None, totals(1)), r"\("),
    "moments: group 7": (lambda: moments(only=7), "only_group"),
    "fused_linear: W of another K": (lambda: fused(weight=ones(24, 8)), r"W \(24, 8\)"),
    "fused_linear: W a number": (lambda: fused(weight=torch.tensor(1.0)), r"W \(\)"),
    "fused_linear: x a number": (lambda: fused(torch.tensor(1.0)), r"x \(\)"),
    "fused_linear: few rows of z": (lambda: fused(z=ones(2, 3)), r"z \(2, 3\)"),
    "fused_linear: few rows of B": (lambda: fused(b=ones(2, 3)), r"B \(2, 3\)"),
    "fused_linear: short bias": (lambda: fused(bias=ones(2)), "biases"),
    "fused_linear: bias on meta": (lambda: fused(bias=meta(24)), "bias on meta"),
    "fused_linear: integer bias": (lambda: fused(bias=ones(24, dtype=INT)), "the bias .*int32"),
    "fused_linear: integer LoRA bias": (
        lambda: fused(lora_bias=ones(24, dtype=INT)),
        "lora_bias must be .*int32",
    ),
    "fused_linear: few groups": (lambda: fused_moments(GROUPS[:3]), "7 tokens"),
    "fused_linear: narrow totals": (lambda: fused_moments(sums=totals(3)), r"\(2, 2, 24\)"),
    "scores: a layer beyond the end": (lambda: scores(offsets=(0, 500, 9)), "never fall"),
    "scores: offsets that fall": (
        lambda: scores(offsets=(0, 7, 5, 9), counts=ones(3, 2).double()),
        "never fall",
    ),
    "scores: a negative offset": (lambda: scores(offsets=(0, -3, 9)), "never fall"),
    "scores: offsets end early": (lambda: scores(offsets=(0, 5, 8)), "end at 9"),
    "scores: no offsets": (lambda: scores(offsets=()), "do not describe one plan"),
    "scores: offsets 2-D": (lambda: scores(offsets=[[0, 5, 9]]), "do not describe one plan"),
    "scores: float offsets": (
        lambda: scores(offsets=torch.tensor([0.0, 5.0, 9.0])),
        "offsets must be int64",
    ),
    "scores: few counts": (lambda: scores(counts=ones(1, 2).double()), "one plan"),
    "scores: a count of 0": (lambda: scores(counts=totals(1)[0, :].expand(2, 2) + 0), "counted"),
    "scores: short moments": (lambda: scores(totals(3)), "one plan"),
    "scores: norms 2-D": (lambda: scores(norms=ones(3, 3).double()), "one plan"),
    "scores: fp32 moments": (lambda: scores(totals(9).float()), "must be float64"),
    "scores: counts on meta": (lambda: scores(counts=meta(2, 2).double()), "counts on meta"),
    "scores: no such statistic": (lambda: scores(statistic="max"), "statistic 'max' is unknown"),
    "scores: no such contrast": (lambda: scores(contrast="sum"), "contrast 'sum' is unknown"),
    "scores: no such normalization": (lambda: scores(normalization="l2"), "'l2' is unknown"),
    "scores: no such fusion": (lambda: scores(fusion="add"), "fusion 'add' is unknown"),
    "scores: a weight below 0": (lambda: scores(utility_weight=-1.0), "utility_weight"),
    "scores: a weight of NaN": (lambda: scores(utility_weight=math.nan), "utility_weight"),
    "factors: fp32 score": (lambda: factors(ones(9)), r"float64 \[n\], not torch.float32"),
    "factors: score 2-D": (lambda: factors(ones(3, 3).double()), r"\(3, 3\)"),
    "factors: a threshold of NaN": (lambda: factors(threshold=math.nan), "threshold"),
    "factors: an infinite threshold": (lambda: factors(threshold=-math.inf), "threshold"),
    "factors: no such decay": (lambda: factors(decay="cosine"), "decay 'cosine' is unknown"),
    "factors: a strength below 0": (lambda: factors(strength=-5.0), "strength"),
    "factors: a strength of NaN": (lambda: factors(strength=math.nan), "strength"),
    "factors: a floor above 1": (lambda: factors(floor=2.0), "floor"),
    "factors: a floor of NaN": (lambda: factors(floor=math.nan), "floor"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_operator_itself_refuses(case):
    function, message = CASES[case]
    with pytest.raises(UcanError, match=message):
        function()


def test_what_the_cases_start_from_is_taken():
    for function in (shrink, expand, expand_moments, moments, fused, fused_moments, scores):
        function()
    shrink_moments(of_x=totals(12), of_z=totals(3))
    assert factors().shape == (9,)
    assert factors(ones(0).double()).shape == (0,)


ATTENUATE = {
    "a factor too few": ({"offsets": [1]}, "needs factors"),
    "far beyond the end": ({"offsets": [10**9]}, "needs factors"),
    "an offset that overflows": ({"offsets": [2**62]}, "needs factors"),
    "a negative offset": ({"offsets": [-2]}, "needs factors"),
    "one factor for all rows": ({"factors": torch.full((1,), 0.5)}, "needs factors"),
    "axis 2": ({"axes": [2]}, "axis must be 0"),
    "axis -1": ({"axes": [-1]}, "axis must be 0"),
    "more weights than offsets": ({"weights": [ones(4, 4), ones(2, 2)]}, "2 weights, 1 offsets"),
    "a vector": ({"weights": [ones(4)]}, "floating matrix"),
    "integers": ({"weights": [ones(4, 4, dtype=INT)]}, "floating matrix"),
    "fp16 factors": ({"factors": torch.full((4,), 0.5).half()}, "one flat float32"),
    "a weight on meta": ({"weights": [meta(4, 4)]}, "is on meta"),
    "factors on meta": ({"factors": meta(4)}, "the factors on meta"),
    "an expanded weight": ({"weights": [ones(1, 4).expand(4, 4)]}, "overlaps itself"),
    "a weight that is trained": ({"weights": [ones(4, 4).requires_grad_()]}, "a gradient"),
}


@pytest.mark.parametrize("case", ATTENUATE)
def test_attenuate_itself_refuses_and_writes_nothing(case):
    change, message = ATTENUATE[case]
    good = ones(4, 4)
    call = {"weights": [good], "factors": torch.full((4,), 0.5), "offsets": [0], "axes": [0]}
    if "weights" in change and case != "more weights than offsets":
        change = {"weights": [good, *change["weights"]], "offsets": [0, 0], "axes": [0, 0]}
    with pytest.raises(UcanError, match=message):
        O.attenuate_(**(call | change))
    assert (good == 1).all()


def test_attenuate_itself_refuses_overlapping_weights():
    weight = ones(4, 4)
    for pair in ([weight, weight], [weight[:3], weight[2:]], [weight, weight.t()]):
        with pytest.raises(UcanError, match="weights 0 and 1 overlap"):
            O.attenuate_(pair, torch.full((4,), 0.5), [0, 0], [0, 0])
    assert (weight == 1).all()


def test_attenuate_itself_refuses_factors_in_a_weights_memory():
    factors = torch.full((4,), 0.5)
    with pytest.raises(UcanError, match="weight 0 and the factors overlap"):
        O.attenuate_([factors.view(2, 2)], factors, [0], [0])
    assert (factors == 0.5).all()


def test_attenuate_itself_takes_strided_factors():
    weight = ones(4, 4)
    O.attenuate_([weight], torch.tensor([0.5, 9.0] * 4)[::2], [0], [0])
    assert (weight == 0.5).all()


def test_an_offset_beyond_64_bits_is_named():
    with pytest.raises(UcanError, match="needs factors"):
        ops.attenuate_([ones(4, 4)], torch.full((4,), 0.5), [2**63], [0])


def test_the_extension_refuses_a_mix_with_meta(backend):
    if backend != "native":
        pytest.skip("the extension's operators are the same under every backend")
    assert native.load()
    h, z, b = ones(7, 12), ones(7, 3), ones(12, 3)
    a = ones(3, 12)
    for call in (
        lambda: O._shrink_native_(h.to("meta"), a, z.clone()),
        lambda: O._shrink_native_(h, a.to("meta"), z.clone()),
        lambda: O._moments_native_(h.to("meta"), GROUPS, -1, totals(12)),
        lambda: O._moments_native_(h, GROUPS, -1, totals(12).to("meta")),
        lambda: O._expand_native_(
            None, z, b, 1.0, None, GROUPS.to("meta"), -1, totals(12), h.clone()
        ),
        lambda: O._expand_native_(None, z.to("meta"), b, 1.0, None, None, -1, None, h.clone()),
        lambda: O._expand_native_(h.to("meta"), z, b, 1.0, None, None, -1, None, h.clone()),
        lambda: O._attenuate_native_([h.to("meta")], ones(12), [0], [0]),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            call()


def test_totals_with_strides():
    """A slice of wider totals, on every backend."""
    h, a, b = torch.randn(7, 12), torch.randn(3, 12), torch.randn(12, 3)
    wide = [torch.zeros(12, 2, 2, dtype=torch.float64).permute(1, 2, 0) for _ in range(3)]
    flat = [totals(12) for _ in range(3)]
    for of_h, of_x, of_delta in (wide, flat):
        ops.accumulate_moments(h, GROUPS, of_h)
        z = ops.shrink(h, a, groups=GROUPS, input_moments=of_x)
        ops.expand(h, z, b, 1.0, groups=GROUPS, delta_moments=of_delta)
    for one, other in zip(wide, flat, strict=True):
        assert other.any()
        assert torch.equal(one, other)


def test_rank_0_adds_nothing():
    base, z, sums = torch.randn(7, 10), ops.shrink(ones(7, 12), ones(0, 12)), totals(10)
    assert z.shape == (7, 0)
    y = ops.expand(base, z, ones(10, 0), 2.0, groups=GROUPS, delta_moments=sums)
    assert torch.equal(y, base)
    assert not sums.any()


@pytest.mark.parametrize(("k", "r"), [(12, 0), (0, 3), (0, 0)])
def test_sizes_of_0_leave_the_other_moments(k, r):
    x, of_x, of_z = torch.randn(7, k), totals(k), totals(r)
    z = ops.shrink(x, ones(r, k), groups=GROUPS, input_moments=of_x, rank_moments=of_z)
    assert z.shape == (7, r)
    assert not z.any()
    assert not of_z.any()
    for group in (0, 1):
        want = x[group == GROUPS].double().abs().sum(0)
        torch.testing.assert_close(of_x[0, group], want, rtol=1e-6, atol=0)
    ops.accumulate_moments(x[:, :0], GROUPS, totals(0))


def test_ranks_above_256():
    """Wider than one launch of the kernel takes."""
    x, a, groups = torch.randn(7, 12), torch.randn(600, 12), GROUPS
    of_x, of_z = totals(12), totals(600)
    z = ops.shrink(x, a, groups=groups, input_moments=of_x, rank_moments=of_z)
    torch.testing.assert_close(z, x @ a.T, rtol=1e-5, atol=1e-5)
    for sums, h in ((of_x, x), (of_z, z)):
        for group in (0, 1):
            want = h[groups == group].double()
            torch.testing.assert_close(sums[0, group], want.abs().sum(0), rtol=1e-6, atol=0)
            torch.testing.assert_close(sums[1, group], (want * want).sum(0), rtol=1e-6, atol=0)
    y = ops.expand(x, z, torch.ones(12, 600), 0.5)
    torch.testing.assert_close(y, x + 0.5 * z.sum(1, keepdim=True), rtol=1e-4, atol=1e-3)
