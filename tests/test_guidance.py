"""Separability against sampled activations whose contrast is known."""

from __future__ import annotations

import math

import pytest
import torch

from ucan_fast import ActivationStats, Moments, UcanError
from ucan_fast.guidance import (
    LARGE_SHARE,
    SEPARABLE,
    guide,
    guide_step,
    guide_steps,
    separability,
)


def moments(forget: torch.Tensor, retain: torch.Tensor) -> Moments:
    """Of samples ``[tokens, n]``."""
    both = (forget.double(), retain.double())
    return Moments(
        torch.tensor([len(h) for h in both], dtype=torch.float64),
        torch.stack([h.abs().sum(0) for h in both]),
        torch.stack([h.square().sum(0) for h in both]),
    )


def stats(forget: torch.Tensor, retain: torch.Tensor, layers: int = 2) -> ActivationStats:
    parts = zip(forget.chunk(layers, 1), retain.chunk(layers, 1), strict=True)
    return ActivationStats({f"l{i}": {"input": moments(*part)} for i, part in enumerate(parts)})


def draws(tokens: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [50, 400])
def test_noise_is_what_sampling_makes(tokens):
    """Two samples of one distribution: all contrast is noise, and it is predicted."""
    found = separability(stats(draws(tokens, 4000, 0), draws(3000, 4000, 1)))
    assert found.contrast == pytest.approx(found.noise, rel=0.05)
    assert found.excess < 0.3 * found.noise
    # Of |N(0, 1)|: mean sqrt(2/π), variance 1 - 2/π; R has half the relative error.
    relative = math.sqrt((math.pi / 2 - 1) * (1 / tokens + 1 / 3000)) / 2
    assert found.noise == pytest.approx(relative, rel=0.05)


def test_excess_is_the_contrast_that_is_there():
    forget, retain = draws(400, 3000, 2), draws(3000, 3000, 3)
    # Half of the neurons fire 1.5 times as much: R = 0.2 for them.
    forget[:, ::2] *= 1.5
    found = separability(stats(forget, retain))
    assert found.excess == pytest.approx(0.2 / math.sqrt(2), rel=0.05)
    assert found.noise < 0.2 * found.contrast


def test_by_hand():
    """n_f = 1, n_r = 2 tokens, one neuron that varies in the retain set."""
    found = separability(stats(torch.tensor([[3.0]]), torch.tensor([[1.0], [-2.0]]), layers=1))
    a_f, a_r, variance_r = 3.0, 1.5, 0.25 / 2
    assert found.contrast == pytest.approx((a_f - a_r) / (a_f + a_r))
    assert found.noise == pytest.approx(2 * a_f / (a_f + a_r) ** 2 * math.sqrt(variance_r))


def test_silent_neurons_count_as_alike():
    one = separability(stats(torch.tensor([[3.0]]), torch.tensor([[1.0]]), layers=1))
    two = separability(stats(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]), layers=2))
    assert two.contrast == pytest.approx(one.contrast / math.sqrt(2))
    assert two.noise == 0


def test_refusals():
    both = stats(draws(3, 4, 0), draws(3, 4, 1))
    with pytest.raises(UcanError, match="no 'rank' moments of l0"):
        separability(both, "rank")
    for index, group in enumerate(("forget", "retain")):
        half = stats(draws(3, 4, 0), draws(3, 4, 1))
        half.layers["l1"]["input"].count[index] = 0
        with pytest.raises(UcanError, match=f"the {group} set is empty: l1"):
            separability(half)
    with pytest.raises(UcanError, match="no layer"):
        separability(ActivationStats({}))


@pytest.mark.parametrize(
    ("factor", "forget", "wanted"),
    [
        (1.0, 300, "retrain"),
        (1.0, 100, "influence"),
        (1.5, 300, "attenuate"),
        (1.5, 100, "attenuate"),
    ],
)
def test_what_is_recommended(factor, forget, wanted):
    """All activations of one neuron in two scaled, or none; a tenth of the tokens, or a quarter."""
    h = draws(forget, 2000, 4)
    h[:, ::2] *= factor
    found = guide(stats(h, draws(1000, 2000, 5)))
    assert found.recommendation == wanted
    assert found.forget_share == pytest.approx(forget / (forget + 1000))
    assert (found.forget_share > LARGE_SHARE) == (forget == 300)
    assert (found.separability.excess >= SEPARABLE) == (factor > 1)
    assert f"sampling {forget} forget tokens" in found.text
    assert ("of the tokens that were measured" in found.text) == (wanted == "retrain")
    assert ("preset('thorough')" if wanted == "retrain" else "preset('best')") in found.text
    assert "thorough" in found.text


@pytest.mark.parametrize("method", ["influence", "gates"])
@pytest.mark.parametrize(("forget", "wanted"), [(100, "influence"), (101, "retrain")])
def test_of_one_step_the_size_decides(method, forget, wanted):
    """A tenth of all tokens is still small."""
    found = guide_step(forget, 900, method)
    assert found.recommendation == wanted
    assert found.forget_share == forget / (forget + 900)
    assert found.separability is found.still_known is None
    assert found.text.startswith(f"the forget set is {100 * found.forget_share:.1f} % of the tok")
    assert ("gates only attenuate" in found.text) == (method == "gates")
    assert "thorough" in found.text


@pytest.mark.parametrize(
    ("ended", "wanted", "words"),
    [
        ("forgotten", "influence", "as far as they aim: 37 % of the request's positions are still"),
        (
            "never-seen",
            "influence",
            "costs about as much as never-seen data (37 % of the request's",
        ),
        ("before", "retrain", "ended before they were where they aim: 37 % of the request's"),
    ],
)
def test_of_several_steps_their_end_decides(ended, wanted, words):
    found = guide_steps(1, 3, 0.374, ended)
    assert found.recommendation == wanted
    assert (found.forget_share, found.still_known) == (0.25, 0.374)
    assert words in found.text
    assert ("Retraining forgot about as much" in found.text) == (ended == "forgotten")
    assert ("else retrain" in found.text) == (ended == "before")


def test_advice_needs_both_sets():
    for sizes, group in (((0, 5), "forget"), ((5, 0), "retain")):
        with pytest.raises(UcanError, match=f"the {group} set is empty"):
            guide_step(*sizes)
        with pytest.raises(UcanError, match=f"the {group} set is empty"):
            guide_steps(*sizes, 0.1, "before")
