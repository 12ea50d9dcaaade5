"""Which layers are timed in which profile, and what one benchmark consists of."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..costs import LoraCost
from ..measure import (
    Candidate,
    CandidateFailed,
    Inputs,
    Profile,
    Result,
    Skipped,
    case_name,
    measure,
)
from ..shapes import LLAMA_2_7B, LLAMA_32_1B, MODELS, RANKS, SMOLLM2_135M, TOKENS, Model

#: Largest product that is timed on a CPU: half a second or so on two cores.
CPU_FLOPS = 30e9
#: Σ|h| and Σh² over thousands of tokens: rounding averages out in every dtype, so that a block of
#: 128 rows out of 8,192 which is left out (1.6 %) shows in bf16 too.
SUMS = {"input": 1e-3, "output": 1e-3}


def benchmark_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class LoraCase:
    """One adapted layer of a real model.

    Attributes:
        compiled: whether the ``torch.compile`` peers run too, which costs many seconds.
    """

    model: Model
    layer: str
    tokens: int
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    compiled: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """K and N."""
        return self.model.layers()[self.layer]

    @property
    def shape(self) -> dict[str, Any]:
        """As it stands in the results."""
        k, n = self.size
        return {
            "model": self.model.name,
            "layer": self.layer,
            "tokens": self.tokens,
            "rank": self.rank,
            "k": k,
            "n": n,
        }

    @property
    def dtypes(self) -> dict[str, str]:
        """Arguments of :class:`Bench`."""
        return {"dtype": name_of(self.dtype), "adapter_dtype": name_of(self.adapter_dtype)}

    def cost(self, device: torch.device) -> LoraCost:
        """What its passes move and compute."""
        k, n = self.size
        dtypes = (name_of(self.dtype), name_of(self.adapter_dtype))
        return LoraCost(self.tokens, k, n, self.rank, *dtypes, device.type)

    def too_large(self, flops: float, device: torch.device) -> str | None:
        """Why it is not timed there."""
        if device.type != "cpu" or flops <= CPU_FLOPS:
            return None
        return f"{flops * 1e-9:.0f} GFLOP per call are too many for a CPU"

    def traffic(self) -> dict[str, int]:
        """Bytes of x, w, a, b, z, y."""
        k, n = self.size
        wide, adapter = self.dtype.itemsize, self.adapter_dtype.itemsize
        return {
            "x": self.tokens * k * wide,
            "w": n * k * wide,
            "a": self.rank * k * adapter,
            "b": n * self.rank * adapter,
            "z": self.tokens * self.rank * adapter,
            "y": self.tokens * n * wide,
        }

    @property
    def lora_flops(self) -> int:
        """Of both small products."""
        k, n = self.size
        return 2 * self.tokens * self.rank * (k + n)

    @property
    def base_flops(self) -> int:
        """Of the base product."""
        k, n = self.size
        return 2 * self.tokens * k * n


_F32 = {"dtype": torch.float32}
_QUICK = (
    LoraCase(SMOLLM2_135M, "gate_proj", 1024, compiled=True, **_F32),
    LoraCase(SMOLLM2_135M, "q_proj", 1024, **_F32),
    LoraCase(SMOLLM2_135M, "down_proj", 1024, **_F32),
    LoraCase(SMOLLM2_135M, "gate_proj", 1, **_F32),
    LoraCase(LLAMA_32_1B, "q_proj", 64, **_F32),
    LoraCase(SMOLLM2_135M, "q_proj", 256),
)


def lora_cases(profile: Profile, *, few: bool = False) -> list[LoraCase]:
    """The layers of a profile. ``full`` varies one thing at a time; every case of quick is in it.

    Args:
        profile: quick or full.
        few: the first three in quick.
    """
    if profile.name == "quick":
        return list(_QUICK[:3] if few else _QUICK)
    longest = max(TOKENS)
    every = [LoraCase(m, layer, longest) for m in MODELS for layer in m.distinct_layers()]
    seven = [LoraCase(LLAMA_2_7B, layer, longest) for layer in ("q_proj", "gate_proj", "down_proj")]
    one, wide = seven[:2]
    cases = [
        *_QUICK,
        *every,
        *(replace(case, adapter_dtype=torch.bfloat16) for case in seven),
        *(replace(case, tokens=t) for case in (one, wide) for t in TOKENS),
        *(LoraCase(SMOLLM2_135M, "gate_proj", t) for t in TOKENS),
        *(replace(case, rank=r) for case in (one, wide) for r in RANKS),
        replace(one, dtype=torch.float16),
        replace(one, dtype=torch.float32),
    ]
    compiled = {one, wide, LoraCase(SMOLLM2_135M, "gate_proj", longest)}
    # dict: each once, in order.
    return [
        replace(case, compiled=True) if case in compiled else case for case in dict.fromkeys(cases)
    ]


@dataclass
class Bench:
    """One case of one group: arguments of :func:`benchmarks.measure.measure`, made lazily.

    Attributes:
        obstacle: why nothing of it can run here.
        obstacles: candidate -> why it cannot run here, where the others can.
    """

    group: str
    shape: Mapping[str, Any]
    dtype: str
    baseline: str
    candidates: Sequence[Candidate]
    inputs: Callable[[int], Inputs]
    reference: Callable[..., Any]
    adapter_dtype: str = ""
    mutates: bool = False
    wall: bool = False
    tolerances: Mapping[str, float] | None = None
    check_inputs: Callable[[int], Inputs] | None = None
    obstacle: str | None = None
    obstacles: Mapping[str, str] = field(default_factory=dict)
    _outcome: list[Result] | Exception | None = field(default=None, init=False, repr=False)
    _failures: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def narrowed(self, names: Collection[str]) -> Bench:
        """The same with these candidates only."""
        return replace(self, candidates=[one for one in self.candidates if one.name in names])

    @property
    def case(self) -> str:
        """Its name in the results."""
        return case_name(self.shape, self.dtype, self.adapter_dtype)

    def skipped(self, candidate: str) -> Skipped | None:
        """The row of a candidate that something keeps from running, else None."""
        reason = self.obstacle or self.obstacles.get(candidate)
        return Skipped(self.group, self.case, candidate, reason) if reason else None

    def result(self, candidate: str, profile: Profile) -> Result:
        """The candidate's times: the first one asked for measures them all, side by side.

        Raises:
            CandidateFailed: this one is wrong or broke down.
            CheckFailed: the baseline is wrong; the same for every one of the case.
        """
        if self._outcome is None:
            # Compiled code is found by code object and shapes, not by hooks: a layer with hooks
            # would be given what was compiled for the same layer without. And after a few shapes
            # torch.compile would give up silently. So every case starts afresh, and says so.
            torch.compiler.reset()
            try:
                with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                    self._outcome = measure(
                        [one for one in self.candidates if one.name not in self.obstacles],
                        self.inputs,
                        group=self.group,
                        shape=self.shape,
                        dtype=self.dtype,
                        adapter_dtype=self.adapter_dtype,
                        baseline=self.baseline,
                        reference=self.reference,
                        mutates=self.mutates,
                        wall=self.wall,
                        tolerances=self.tolerances,
                        check_inputs=self.check_inputs,
                        profile=profile,
                        failures=self._failures,
                    )
            except Exception as error:
                # Its frames hold the tensors of the case, and it is kept to the end.
                traceback.clear_frames(error.__traceback__)
                self._outcome = error
        if isinstance(self._outcome, Exception):
            raise self._outcome
        if candidate in self._failures:
            raise CandidateFailed(self._failures[candidate])
        return next(result for result in self._outcome if result.name == candidate)
