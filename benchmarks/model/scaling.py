"""Group ``scaling``: how the ways to answer a deletion request grow, one size varied at a time.

A Llama with random weights and random tokens, all sequences of one length: nothing but the size
differs between the points of a sweep. ``full`` varies |D_f|, |D|, the blocks and the rank, with
four points each; ``quick`` leaves |D| and the rank out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from ..measure import Profile, Result, Skipped
from .deletion import BASELINE, FORWARD, Task, against_forward, measure_task
from .models import attended_tokens, random_base, random_batches, with_adapter
from .slopes import attach_slopes

GROUP = "scaling"
CANDIDATES = (
    BASELINE,
    "ucan_fast, bank",
    "gradient ascent, 1 epoch",
    "GradDiff, 1 epoch",
    "retrain the adapter",
    FORWARD,
)
VOCABULARY = 1024


@dataclass(frozen=True)
class Size:
    """One point.

    Attributes:
        width: of the model; four times as much in its MLP.
        blocks: of the model.
        rank: of the adapter.
        length: tokens of a sequence.
        batch: sequences of a batch.
        forget: sequences of D_f.
        sequences: of D = D_f and D_r.
    """

    width: int
    blocks: int
    rank: int
    length: int
    batch: int
    forget: int
    sequences: int


_CPU = Size(width=64, blocks=2, rank=16, length=64, batch=2, forget=2, sequences=32)
_CPU_FULL = Size(width=128, blocks=4, rank=16, length=100, batch=8, forget=8, sequences=256)
_CUDA = Size(width=1024, blocks=4, rank=16, length=256, batch=8, forget=8, sequences=128)
_CUDA_FULL = Size(width=2048, blocks=8, rank=16, length=256, batch=16, forget=16, sequences=512)
SIZES = {
    ("quick", "cpu"): _CPU,
    ("full", "cpu"): _CPU_FULL,
    ("quick", "cuda"): _CUDA,
    ("full", "cuda"): _CUDA_FULL,
}


def sweeps(profile: Profile, kind: str) -> dict[str, list[Size]]:
    """Key of the shape that is varied -> the points; quick varies |D_f| and the blocks only."""
    size, factors = SIZES[profile.name, kind], (1, 2, 4, 8)

    def varied(key: str, start: int, base: Size = size) -> list[Size]:
        return [dataclasses.replace(base, **{key: start * f}) for f in factors]

    # A quarter of the data where it is not what is varied: as telling, and sooner done.
    fewer = dataclasses.replace(size, sequences=size.sequences // 4)
    chosen = {
        "forget_tokens": varied("forget", size.batch),
        "blocks": varied("blocks", max(1, size.blocks // 2), fewer),
    }
    if profile.name == "full":
        chosen["tokens"] = varied("sequences", size.sequences // 4)
        chosen["rank"] = varied("rank", 8, fewer)
    return chosen


def run(profile: Profile, device: torch.device) -> Iterator[tuple[list[Result], list[Skipped]]]:
    """Every sweep of the profile; the slope is in every result's ``extra``."""
    # Less for a point than for a case of its own: the line is through four of them.
    profile = dataclasses.replace(profile, seconds=profile.seconds / 2)
    for along, points in sweeps(profile, device.type).items():
        swept = [r for point in points for r in measure_point(point, along, device, profile)]
        attach_slopes(swept, along)
        yield [*swept, *against_forward(swept)], []


def measure_point(size: Size, along: str, device: torch.device, profile: Profile) -> list[Result]:
    """All candidates at one size.

    Raises:
        CheckFailed: a plan or an update is not what it should be.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.blocks,
        num_attention_heads=max(1, size.width // 32),
        max_position_embeddings=size.length,
    )
    model = with_adapter(random_base(config, device), size.rank)
    task = random_task(size, device)
    shape: dict[str, Any] = {
        "model": f"Llama of width {size.width}",
        "varied": f"{along} varied",
        "forget_tokens": attended_tokens(task.forget),
        "tokens": attended_tokens(task.everything),
        "blocks": size.blocks,
        "rank": size.rank,
    }
    return measure_task(model, task, GROUP, shape, device, profile, CANDIDATES)


def random_task(size: Size, device: torch.device) -> Task:
    """D_f and D_r of random sequences; retraining is one epoch, all of it timed."""

    def batches(sequences: int, seed: int, group: int) -> list[dict[str, torch.Tensor]]:
        made = random_batches(VOCABULARY, sequences, size.length, size.batch, device, seed=seed)
        return [
            {**batch, "token_groups": torch.full_like(batch["input_ids"], group)} for batch in made
        ]

    # The bank holds every token as a retain token.
    forget, retain = batches(size.forget, 1, 0), batches(size.sequences - size.forget, 2, 1)
    as_retain = batches(size.forget, 1, 1)
    return Task(
        forget=forget,
        retain=retain,
        paired=batches(size.forget, 3, 1),
        everything=[*as_retain, *retain],
    )
