"""The scores kernels against the reference: same bits, same neurons selected, few launches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ucan_fast.config import UcanConfig
from ucan_fast.kernels import scores
from ucan_fast.ops.scores import factors_reference, scores_reference
from ucan_fast.plan import select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATISTICS = ("mean_abs", "rms")
CONTRASTS = ("symmetric", "difference", "ratio", "zscore", "none")
NORMALIZATIONS = ("none", "layer", "global")
FUSIONS = [
    *(("protect", weight) for weight in (0.0, 0.5, 1.0, 2.0, 3.0, 0.3, 2.5, 40.0, 1e-9)),
    *(("subtract", weight) for weight in (0.0, 1.0, 0.1, 7.7)),
]
DECAYS = ("exponential", "inverse", "linear", "hard")
EXACT = (0.0, 1.0, 2.0, 3.0)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory that a kernel forgets to write shows up as NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))


def plan_inputs(sizes: list[int], seed: int = 0, harsh: bool = False):
    """moments, counts, weight norms and offsets of layers of these sizes.

    Harsh: neurons that are silent on one or both sets, ties, constant activations (no variance),
    neurons without weights, a layer that never fires, tiny and huge values.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    n = sum(sizes)
    counts = torch.floor(rand(len(sizes), 2) * 500) + 1
    per_neuron = counts.repeat_interleave(torch.tensor(sizes), 0).T
    mean = rand(2, n) * 3
    spread = 1 + rand(2, n)
    norms = rand(n)
    if harsh:
        kind = torch.randint(0, 9, (n,), generator=generator)
        mean[0, kind == 0] = 0
        mean[1, kind == 1] = 0
        mean[:, kind == 2] = 0
        mean[:, kind == 3] = torch.tensor([[2.0], [0.5]], dtype=torch.float64)
        norms[kind == 3] = 0.25
        mean[:, kind == 4] = mean[:1, kind == 4]
        spread[:, kind <= 4] = 1
        norms[kind == 5] = 0
        mean[:, kind == 6] *= 1e-30
        mean[:, kind == 7] *= 1e15
        first = len(sizes) // 2
        start = sum(sizes[:first])
        mean[:, start : start + sizes[first]] = 0
    moments = torch.stack([mean * per_neuron, mean**2 * spread * per_neuron])
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    return moments, counts, norms, offsets


def run(inputs, *options):
    on_device = [tensor.to(DEVICE) for tensor in inputs]
    return [tensor.cpu() for tensor in scores.contrastive_scores(*on_device, *options)]


def correctly_rounded_sqrt(tensor: torch.Tensor) -> torch.Tensor:
    """torch's own fp64 square root is off by one unit for 1 value in 60 on some CPUs."""
    return torch.from_numpy(np.sqrt(tensor.numpy()))


def check(inputs, statistic, contrast, normalization, fusion, weight):
    """Equal to the reference within 1e-12, and in every bit once its square roots are exact."""
    options = (statistic, contrast, normalization, fusion, weight)
    got, reference = run(inputs, *options), scores_reference(*inputs, *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "sqrt", correctly_rounded_sqrt)
        exact = scores_reference(*inputs, *options)
    for name, expected, rounded, ours in zip("RUS", reference, exact, got, strict=True):
        assert ours.dtype == torch.float64
        assert ours.isfinite().all(), (name, options)
        if name != "S" or fusion == "subtract" or weight in EXACT:
            assert torch.equal(rounded, ours), (name, options)
        else:
            torch.testing.assert_close(ours, rounded, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            ours, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max())
        )
    for fraction in (0.1, 0.5, 0.9):
        config = UcanConfig(contrast=contrast, fraction=fraction, min_score=-100.0)
        thresholds = [select(s, config)[0] for s in (got[2], exact[2], reference[2])]
        ours, rounded, expected = (
            s > t for s, t in zip((got[2], exact[2], reference[2]), thresholds, strict=True)
        )
        assert torch.equal(ours, rounded), options
        # Inexact square roots may break ties at the threshold, nothing else.
        distance = (reference[2] - thresholds[2]).abs()[ours != expected]
        assert (distance <= 1e-12 * reference[2].abs().max()).all(), options


# One-neuron layers, an empty one, and layers that end within a block and exactly at one.
SIZES = [16, 1, 0, 37, 48, 1, 90, 5]


@pytest.mark.parametrize("harsh", [False, True], ids=["random", "harsh"])
@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_every_contrast_has_the_references_bits(statistic, contrast, harsh):
    inputs = plan_inputs(SIZES, seed=1, harsh=harsh)
    for normalization in NORMALIZATIONS:
        check(inputs, statistic, contrast, normalization, "protect", 1.0)


@pytest.mark.parametrize(("fusion", "weight"), FUSIONS)
def test_every_fusion_and_weight(fusion, weight):
    for harsh, normalization in itertools.product([False, True], NORMALIZATIONS):
        inputs = plan_inputs(SIZES, seed=2, harsh=harsh)
        check(inputs, "rms", "symmetric", normalization, fusion, weight)


@pytest.mark.parametrize(
    ("contrast", "normalization"), [("zscore", "layer"), ("difference", "global"), ("none", "none")]
)
def test_layers_cut_into_many_chunks(monkeypatch, contrast, normalization):
    monkeypatch.setattr(scores, "BLOCK", 16)
    inputs = plan_inputs([3, 150, 1, 33], seed=3)
    for layer_top in (3, 3 + 16 * 5 + 5, 152):  # the maximum in the first, a middle, the last
        moments = inputs[0].clone()
        moments[:, 0, layer_top] = moments[:, 0].amax(1) * torch.tensor([9.0, 81.0])
        check((moments, *inputs[1:]), "mean_abs", contrast, normalization, "protect", 0.7)


def test_more_chunks_than_one_load_takes(monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", 16)
    assert scores._chunks(16 * 500, 2) == scores.MAX_CHUNKS
    assert scores._chunks(16 * 500, 10**6) == 1
    moments, counts, norms, offsets = plan_inputs([16 * 90 + 3, 7], seed=4)
    # The first chunk holds blocks 0 and 64: both maxima in the one, then in the other.
    for loudest in (5, 16 * 64 + 5):
        louder, heavier = moments.clone(), norms.clone()
        louder[:, 0, loudest] = moments[:, 0].amax(1) * torch.tensor([9.0, 81.0])
        heavier[loudest] = 50.0
        inputs = (louder, counts, heavier, offsets)
        check(inputs, "rms", "difference", "layer", "protect", 1.0)


def test_one_huge_layer_among_small_ones():
    inputs = plan_inputs([2, 20_011, 0, 3], seed=5, harsh=True)
    check(inputs, "rms", "symmetric", "global", "subtract", 0.3)


@pytest.mark.parametrize("sizes", [[1], [0, 1, 0], [513], [512]])
def test_smallest_plans(sizes):
    for contrast, normalization in itertools.product(CONTRASTS, NORMALIZATIONS):
        check(plan_inputs(sizes, seed=6), "mean_abs", contrast, normalization, "protect", 2.5)


def test_a_plan_without_neurons_and_non_contiguous_inputs():
    for sizes in ([], [0, 0]):
        empty = torch.zeros(2, 2, 0, dtype=torch.float64, device=DEVICE)
        counts = torch.ones(len(sizes), 2, dtype=torch.float64, device=DEVICE)
        offsets = torch.zeros(len(sizes) + 1, dtype=torch.int64, device=DEVICE)
        options = ("rms", "symmetric", "global", "protect", 1.0)
        got = scores.contrastive_scores(empty, counts, empty[0, 0], offsets, *options)
        assert [t.numel() for t in got] == [0, 0, 0]
        assert scores.attenuation_factors(empty[0, 0], None, 0.0, "hard", 1.0, 0.0).numel() == 0
    moments, counts, norms, offsets = plan_inputs(SIZES, seed=7)
    strided = (
        moments.mT.contiguous().mT,
        counts.T.contiguous().T,
        norms.repeat_interleave(2)[::2],
        offsets.repeat_interleave(3)[::3],
    )
    check(strided, "rms", "zscore", "layer", "protect", 1.0)


def test_a_silent_plan_has_no_nan():
    moments, counts, norms, offsets = plan_inputs(SIZES)
    for contrast, normalization in itertools.product(CONTRASTS, NORMALIZATIONS):
        inputs = (torch.zeros_like(moments), counts, norms, offsets)
        options = ("rms", contrast, normalization, "protect", 0.3)
        assert all(not tensor.any() for tensor in run(inputs, *options))


def test_ties_of_the_reference_stay_ties():
    # (R, U) = (1, 1/2) and (1/4, 0) score the same for λ = 2: neither may be above the other.
    mean = torch.tensor([[1.0, 1.25, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    moments = torch.stack([mean, torch.tensor([[1.0, 2.0, 0.0], [1.0, 1.0, 4.0]]).double()])
    norms = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    inputs = (moments, torch.ones(1, 2).double(), norms, torch.tensor([0, 3]))
    score = run(inputs, "mean_abs", "difference", "none", "protect", 2.0)[2]
    assert score.tolist() == [0.25, 0.25, 0.0]


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("decay", DECAYS)
def test_factors(decay, floor):
    generator = torch.Generator().manual_seed(8)
    score = torch.randn(1500, generator=generator, dtype=torch.float64)
    score[::7] = score[3]
    for threshold, strength in itertools.product((-50.0, 0.1, 1.0), (0.0, 1e-20, 1.7, 32.0, 1e6)):
        check_factors(score, threshold, decay, strength, floor)
    top = float(score.max())
    check_factors(score, top, decay, 1.0, floor)  # nothing is selected, and the gap is 0
    check_factors(score, top + 1, decay, 1.0, floor)
    check_factors(score[:1], float(score[0]) - 1e-9, decay, 2.0, floor)


def check_factors(score, threshold, decay, strength, floor):
    options = (threshold, decay, strength, floor)
    expected = factors_reference(score, score.max(), *options)
    score = score.to(DEVICE)
    got = scores.attenuation_factors(score, score.max(), *options).cpu()
    assert got.dtype == torch.float32
    assert torch.equal(got == 1, expected == 1)
    if decay == "exponential":
        torch.testing.assert_close(got, expected, rtol=1.2e-7, atol=1e-45)
    else:
        assert torch.equal(got, expected)


def test_the_threshold_is_not_rounded_to_fp32():
    threshold = 0.1
    near = torch.tensor(threshold, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    score = torch.stack([near.nextafter(-one), near, near.nextafter(one), one])
    score = score.to(DEVICE)
    got = scores.attenuation_factors(score, score.max(), threshold, "hard", 1.0, 0.0)
    assert got.tolist() == [1, 1, 0, 0]


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel, launches: list[str], name: str):
        self.kernel, self.launches, self.name = kernel, launches, name

    def __getitem__(self, grid):
        self.launches.append(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_four_launches_at_most(monkeypatch, normalization):
    launches: list[str] = []
    for name in [name for name in vars(scores) if name.endswith("_kernel")]:
        monkeypatch.setattr(scores, name, Counted(getattr(scores, name), launches, name))
    options = ("rms", "symmetric", normalization, "protect", 1.0)
    score = run(plan_inputs(SIZES), *options)[2].to(DEVICE)
    assert len(launches) == (3 if normalization == "global" else 2)
    scores.attenuation_factors(score, score.max(), 0.1, "linear", 1.0, 0.0)
    assert launches[-1] == "factors_kernel"
    assert len(launches) <= 4


def test_every_launched_specialisation_is_compiled_ahead():
    names = {case.name for case in scores.compile_cases()}
    assert len(names) == len(scores.compile_cases())
    for statistic, contrast in itertools.product(STATISTICS, CONTRASTS):
        assert f"measure, {statistic}, {contrast}" in names
    powers = {scores._EXACT_POWERS.get(w, "general") for f, w in FUSIONS if f == "protect"}
    for normalization, fusion in itertools.product(NORMALIZATIONS, (*powers, "subtract")):
        assert f"finish, normalization {normalization}, {fusion}" in names
