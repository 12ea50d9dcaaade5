"""scores: the moments of a whole plan -> risk, utility, score, factors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch

from ucan_fast import ops

from .. import costs, peers
from ..measure import Candidate, Profile
from ..shapes import LLAMA_2_7B, LLAMA_32_1B, QWEN_25_14B, SMOLLM2_135M, Model
from .cases import Bench

#: About a sixth of the neurons of these inputs score higher.
_CHOICES = {"threshold": 0.2, "strength": 2.0}


def _widths(model: Model) -> list[int]:
    # The input site.
    return [k for k, _ in model.layers().values()] * model.blocks


def _inputs(model: Model, device: torch.device) -> Callable[[int], tuple[torch.Tensor, ...]]:
    widths = _widths(model)

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        offsets = torch.tensor([0, *itertools.accumulate(widths)], device=device)
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


def _bind_loop(moments, counts, norms, offsets) -> peers.Call:
    loop = functools.partial(peers.scores_per_layer, **_CHOICES)
    return functools.partial(loop, moments, counts, norms, offsets.tolist())


def _by_reference(*inputs: torch.Tensor, **choices: float) -> dict[str, torch.Tensor]:
    with ops.use_backend("reference"):
        return peers.scores_ucan(*inputs, **choices)


def scores(profile: Profile, device: torch.device) -> list[Bench]:
    """The default formulas, at the input site of every layer: on CUDA device time, in a graph."""
    return [_bench("scores", model, device) for model in _models(profile)]


def scores_eager(profile: Profile, device: torch.device) -> list[Bench]:
    """The same by eager calls, launches and the checks that wait for the device included.

    On CUDA only.
    """
    if device.type == "cpu":
        return []
    return [_bench("scores_eager", model, device, capturable=False) for model in _models(profile)]


def _models(profile: Profile) -> list[Model]:
    more = [LLAMA_32_1B, LLAMA_2_7B, QWEN_25_14B] if profile.name == "full" else []
    return [SMOLLM2_135M, *more]


def _bench(group: str, model: Model, device: torch.device, *, capturable: bool = True) -> Bench:
    n = sum(_widths(model))
    # Three sums and a norm in, R, U, S out in fp64, S in again, γ out in fp32.
    cost = {"bytes": n * (4 * 8 + 3 * 8 + 8 + 4), "flops": 20 * n}
    # γ is fp32; the tolerance of fp64 would ask for more than it holds.
    common = {**cost, "tolerance": 1e-6}
    candidates = [
        Candidate(
            "torch, loop over layers",
            _bind_loop,
            passes=costs.scores_layer_loop(_widths(model)),
            **common,
        ),
        Candidate(
            "ucan_fast",
            _bind(peers.scores_ucan),
            passes=costs.scores_ucan(n, device.type),
            count_launches=True,
            **common,
        ),
        Candidate(
            "ucan_fast, reference backend",
            _bind(_by_reference),
            passes=costs.scores_reference(n),
            capturable=capturable,
            **common,
        ),
    ]
    return Bench(
        group,
        {"model": model.name, "layers": 7 * model.blocks, "neurons": n},
        "float64",
        baseline="torch, loop over layers",
        candidates=candidates,
        inputs=_inputs(model, device),
        reference=functools.partial(_reference, **_CHOICES),
        obstacles={"ucan_fast, reference backend": "on a CPU ucan_fast runs it anyway"}
        if device.type == "cpu"
        else {},
    )


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
