"""contrastive_scores and attenuation_factors as operators: fakes, devices of arguments, refusals.

Their values are checked in test_toy_numbers.py (by hand) and test_scoring.py (a slow literal
implementation).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ucan_fast import UcanError, ops
from ucan_fast.config import UcanConfig

pytestmark = pytest.mark.usefixtures("backend")

STATISTICS = ("mean_abs", "rms")
CONTRASTS = ("symmetric", "difference", "ratio", "zscore", "none")
NORMALIZATIONS = ("none", "layer", "global")
FUSIONS = ("protect", "subtract")
DECAYS = ("exponential", "inverse", "linear", "hard")


def tokens(n=9, seed=0):
    """Moments, counts, weight norms and offsets of two layers with 5 and n - 5 neurons."""
    generator = torch.Generator().manual_seed(seed)
    h_f = torch.randn(6, n, generator=generator, dtype=torch.float64)
    h_r = torch.randn(11, n, generator=generator, dtype=torch.float64)
    moments = torch.stack(
        [
            torch.stack([h_f.abs().sum(0), h_r.abs().sum(0)]),
            torch.stack([(h_f**2).sum(0), (h_r**2).sum(0)]),
        ]
    )
    counts = torch.tensor([[6.0, 11.0], [6.0, 11.0]], dtype=torch.float64)
    norms = torch.rand(n, generator=generator, dtype=torch.float64)
    return moments, counts, norms, torch.tensor([0, 5, n])


DEFAULTS = {
    "statistic": "mean_abs",
    "contrast": "symmetric",
    "normalization": "none",
    "fusion": "protect",
    "utility_weight": 1.0,
}


def test_opcheck_scores():
    for statistic in STATISTICS:
        for contrast in CONTRASTS:
            torch.library.opcheck(
                torch.ops.ucan_fast.contrastive_scores.default,
                (*tokens(), statistic, contrast, "layer", "protect", 1.0),
                # The dynamic-shape test compiles; once is enough, below.
                test_utils=("test_schema", "test_faketensor"),
            )
    for normalization in NORMALIZATIONS:
        for fusion in FUSIONS:
            torch.library.opcheck(
                torch.ops.ucan_fast.contrastive_scores.default,
                (*tokens(), "rms", "zscore", normalization, fusion, 0.5),
            )


def test_who_records_calls_sees_the_operators():
    """Eager calls go past the dispatcher; what watches or needs no values does not."""

    def both(*tensors):
        _, _, score = ops.contrastive_scores(*tensors, **DEFAULTS)
        return ops.attenuation_factors(score, 0.1, decay="linear", strength=1.0, floor=0.0)

    graph = make_fx(both)(*tokens()).graph
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    ours = torch.ops.ucan_fast
    assert calls.count(ours.contrastive_scores.default) == 1
    assert calls.count(ours.attenuation_factors.default) == 1
    factors = both(*(tensor.to("meta") for tensor in tokens()))
    assert (factors.is_meta, factors.shape, factors.dtype) == (True, (9,), torch.float32)
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    tensors = tokens()
    with Watching():
        both(*tensors)
    assert ours.contrastive_scores.default in seen
    seen.clear()
    assert both(*tensors).shape == (9,)
    assert not seen


def test_opcheck_factors():
    score = torch.linspace(-1, 1, 9, dtype=torch.float64)
    for decay in DECAYS:
        torch.library.opcheck(
            torch.ops.ucan_fast.attenuation_factors.default, (score, 0.1, decay, 2.0, 0.05)
        )


def test_every_choice_of_the_configuration_is_an_operator_choice():
    for statistic in STATISTICS:
        for contrast in CONTRASTS:
            for normalization in NORMALIZATIONS:
                for fusion in FUSIONS:
                    UcanConfig(
                        statistic=statistic,
                        contrast=contrast,
                        normalization=normalization,
                        fusion=fusion,
                    )
                    results = ops.contrastive_scores(
                        *tokens(),
                        statistic=statistic,
                        contrast=contrast,
                        normalization=normalization,
                        fusion=fusion,
                        utility_weight=1.0,
                    )
                    for result in results:
                        assert result.dtype == torch.float64
                        assert result.shape == (9,)
                        assert torch.isfinite(result).all()
                    risk, utility, _ = results
                    assert (risk >= 0).all()
                    assert (utility >= 0).all()
                    assert (utility <= 1).all()


def test_arguments_are_not_changed():
    arguments = tokens()
    before = [a.clone() for a in arguments]
    _, _, score = ops.contrastive_scores(*arguments, **DEFAULTS)
    kept = score.clone()
    ops.attenuation_factors(score, 0.1, decay="exponential", strength=1.0, floor=0.0)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
    assert torch.equal(score, kept)


def test_layers_do_not_see_each_other_where_they_must_not():
    # Symmetric contrast and utility of layer 1 are the same with layer 2 blown up.
    moments, counts, norms, offsets = tokens()
    risk, utility, _ = ops.contrastive_scores(moments, counts, norms, offsets, **DEFAULTS)
    louder = moments.clone()
    louder[:, :, 5:] *= 100
    heavier = norms.clone()
    heavier[5:] *= 1000
    risk_2, utility_2, _ = ops.contrastive_scores(louder, counts, heavier, offsets, **DEFAULTS)
    assert torch.equal(risk[:5], risk_2[:5])
    assert torch.equal(utility[:5], utility_2[:5])
    torch.testing.assert_close(utility[5:], utility_2[5:], rtol=1e-12, atol=0)


def test_same_input_same_bits():
    first = ops.contrastive_scores(*tokens(400), **DEFAULTS)
    second = ops.contrastive_scores(*tokens(400), **DEFAULTS)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("part", range(4))
def test_refuses_shapes_that_do_not_fit(part):
    arguments = list(tokens())
    arguments[part] = (
        arguments[0][:, :, :8],
        arguments[1][:1],
        arguments[2][:7],
        torch.tensor([0, 5, 8]),
    )[part]
    with pytest.raises(UcanError, match="do not describe one plan"):
        ops.contrastive_scores(*arguments, **DEFAULTS)


def test_refuses_offsets_that_do_not_begin_at_zero():
    moments, counts, norms, _ = tokens()
    with pytest.raises(UcanError, match="do not describe one plan"):
        ops.contrastive_scores(moments, counts, norms, torch.tensor([1, 5, 9]), **DEFAULTS)


@pytest.mark.parametrize("part", range(3))
def test_refuses_other_dtypes(part):
    arguments = list(tokens())
    arguments[part] = arguments[part].float()
    with pytest.raises(UcanError, match="must be float64"):
        ops.contrastive_scores(*arguments, **DEFAULTS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("decay", DECAYS)
def test_refuses_scores_that_are_not_finite(backend, value, decay):
    score = torch.linspace(0, 1, 11, dtype=torch.float64)
    score[2] = score[9] = value
    kept = score.clone()
    with pytest.raises(UcanError, match="2 of 11 scores are NaN or infinite"):
        ops.attenuation_factors(score, 0.5, decay=decay, strength=3.0, floor=0.0)
    assert torch.equal(score.view(torch.int64), kept.view(torch.int64))


def test_factors_are_one_fp32_number_per_neuron():
    score = torch.linspace(0, 1, 11, dtype=torch.float64)
    for decay in DECAYS:
        factors = ops.attenuation_factors(score, 0.5, decay=decay, strength=3.0, floor=0.0)
        assert factors.dtype == torch.float32
        assert factors.shape == (11,)
        assert (factors[:6] == 1).all()
        assert (factors[6:] < 1).all()
        assert (factors[6:] >= 0).all()
        # the riskier, the smaller
        assert (factors[6:].diff() <= 0).all()
