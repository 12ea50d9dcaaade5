"""scores: the moments of a whole plan -> risk, utility, score, factors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch

from benchmarks import peers
from benchmarks.kernels.cases import Bench, benchmark_device
from benchmarks.measure import Candidate, Profile, Result
from benchmarks.shapes import LLAMA_2_7B, LLAMA_32_1B, QWEN_25_14B, SMOLLM2_135M, Model

#: About a sixth of the neurons of these inputs score higher.
_CHOICES = {"threshold": 0.2, "strength": 2.0}


def _inputs(model: Model) -> Callable[[int], tuple[torch.Tensor, ...]]:
    device = benchmark_device()
    widths = [k for k, _ in model.layers().values()] * model.blocks  # the input site
    offsets = torch.tensor([0, *itertools.accumulate(widths)], device=device)

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)

        def positive(*shape: int) -> torch.Tensor:
            normal = torch.randn(*shape, generator=generator, device=device, dtype=torch.float64)
            return normal.abs() + 0.05

        n = sum(widths)
        counts = torch.tensor([[2000.0, 50000.0]], dtype=torch.float64, device=device)
        per_token = positive(2, n)
        moments = torch.stack([per_token, per_token.square() * 1.5]) * counts[0].view(1, 2, 1)
        return moments, counts.repeat(len(widths), 1), positive(n), offsets

    return inputs


def _bind(function: Callable) -> peers.Binder:
    return lambda *inputs: functools.partial(function, *inputs, **_CHOICES)


def scores(profile: Profile) -> list[Bench]:
    """The default formulas, at the input site of every layer."""
    models = [SMOLLM2_135M]
    if profile.name == "full":
        models += [LLAMA_32_1B, LLAMA_2_7B, QWEN_25_14B]
    benches = []
    for model in models:
        n = sum(k for k, _ in model.layers().values()) * model.blocks
        # Four sums and a norm in, R, U, S out in fp64, S in again, γ out in fp32.
        cost = {"bytes": n * (5 * 8 + 3 * 8 + 8 + 4), "flops": 20 * n}
        # γ is fp32; the tolerance of fp64 would ask for more than it holds. Both candidates read
        # layer boundaries back from the device.
        common = {**cost, "tolerance": 1e-6, "capturable": False}
        candidates = [
            Candidate("torch, loop over layers", _bind(peers.scores_per_layer), **common),
            Candidate("ucan_fast", _bind(peers.scores_ucan), **common),
        ]
        benches.append(
            Bench(
                "scores",
                {"model": model.name, "layers": 7 * model.blocks, "neurons": n},
                "float64",
                baseline="torch, loop over layers",
                candidates=candidates,
                inputs=_inputs(model),
                reference=functools.partial(_reference, **_CHOICES),
            )
        )
    return benches


def _reference(
    moments: torch.Tensor,
    counts: torch.Tensor,
    norms: torch.Tensor,
    offsets: torch.Tensor,
    *,
    threshold: float,
    strength: float,
) -> dict[str, torch.Tensor]:
    # Written over [layers][neurons] without any of the candidates' shortcuts.
    parts: dict[str, list[torch.Tensor]] = {"risk": [], "utility": [], "score": []}
    for layer, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        forget = moments[:, 0, start:end] / counts[layer, 0]
        retain = moments[:, 1, start:end] / counts[layer, 1]
        risk = ((forget[0] - retain[0]) / (forget[0] + retain[0])).relu()
        strengths = norms[start:end] * retain[1] ** 0.5
        utility = strengths / strengths.max()
        for name, value in (("risk", risk), ("utility", utility), ("score", risk - risk * utility)):
            parts[name].append(value)
    out = {name: torch.cat(values) for name, values in parts.items()}
    above = (out["score"] - threshold).relu()
    # exp(0) = 1 where the score is not above the threshold.
    return {**out, "γ": torch.exp(-strength * above / above.max())}


@pytest.mark.benches(of=scores)
def test_scores(timed: Result) -> None:
    assert min(timed.seconds) > 0
