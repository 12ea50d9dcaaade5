"""What a request asks for, and what its steps share: model, retain loss, clock, notes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from torch import nn

from .batches import FORGET, RETAIN, check_iterable, group_index, holding, read_batches, reusable
from .calibration import BY_HEART, RetainLoss, given, sample, split
from .collect import collect_at_origin
from .config import UcanConfig
from .errors import UcanError, warn
from .factor_pass import collect_factors
from .factors import InfluenceFactors
from .influence import InfluencePlan
from .influence_walk import Measured
from .overlap import Overlap
from .plan import AttenuationPlan
from .progress import Progress
from .stats import ActivationStats
from .strength import StrengthSearch

Batches = Iterable[Mapping[str, Any]]


@dataclass
class Request:
    """The data of one call of :func:`ucan_fast.unlearn`, as it takes them.

    Attributes:
        earlier: statistics of the requests before this one.
        earlier_plan: the plan that answered them, where it is known.
    """

    forget: Batches
    retain: Batches | None = None
    bank: ActivationStats | InfluenceFactors | None = None
    calibration: Batches | Callable[[nn.Module], float] | None = None
    holdout: Batches | float | None = None
    earlier: Any = None
    earlier_plan: AttenuationPlan | InfluencePlan | None = None

    def checked(self, model: nn.Module, config: UcanConfig, evaluate: bool) -> Request:
        """The same in a form that every pass can read, every token in its own set.

        Raises:
            UcanError: no batches where batches are wanted, or a holdout that nothing asks for.
        """
        gradients = config.method != "attenuate"
        forget, retain = self.forget, self.retain
        check_iterable(forget, "forget")
        if retain is not None:
            check_iterable(retain, "retain")
        if self.holdout is not None and not (gradients and config.auto_strength):
            raise UcanError("holdout= is for method='influence' or 'gates' with strength='auto'.")
        if isinstance(self.holdout, (str, bool)):
            raise UcanError(f"holdout must be batches or nats per token > 0, not {self.holdout!r}.")
        if evaluate or config.auto_strength or gradients:
            forget = reusable(forget, "forget")
            retain = None if retain is None else reusable(retain, "retain")
        if gradients and self.bank is None and retain is not None:
            # Every token counts in its own group, wherever it is passed.
            strays = list(holding(model, retain, "retain", FORGET))
            forget = Joined(forget, strays) if strays else forget
        beside = retain if self.bank is not None and retain is not None else ()
        if next(holding(model, beside, "retain", FORGET), None) is not None:
            warn(
                "retain= holds forget tokens. Beside a bank only those of forget= are forgotten: "
                "pass them there too."
            )
        return replace(self, forget=forget, retain=retain)


@dataclass
class Job:
    """What the steps of one call share, and what they leave for its report.

    Attributes:
        origin: fingerprint of the adapter before any plan.
        seconds: by step.
        sequences: with a token of the group, that the statistics pass ran.
        search: how the strength was chosen.
        retain: what the retain budget is measured on.
        walked: retain batches that several steps run.
        steps: what several steps measured.
        still_known: share of the forget positions that are better known than their references
            where several steps ended; None of other methods, and where there was nothing to do.
        ended: how, as :func:`ucan_fast.guidance.guide_steps` has it.
        overlap: sequences that both sets hold.
        ceiling: nats per token that never-seen data cost; infinite where nothing is said of them.
    """

    model: nn.Module
    adapter: str
    config: UcanConfig
    progress: Progress
    origin: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=lambda: {"forget": 0, "retain": 0})
    search: StrengthSearch | None = None
    retain: RetainLoss = field(default_factory=RetainLoss)
    walked: list | None = None
    notes: dict[str, str] = field(default_factory=dict)
    steps: list[Measured] = field(default_factory=list)
    still_known: float | None = None
    ended: str = "before"
    overlap: Overlap = field(default_factory=Overlap)
    ceiling: float = math.inf

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Seconds of the block, as those of the step."""
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start

    def throughput(self) -> float:
        """Sequences per second of the statistics pass."""
        return sum(self.sequences.values()) / max(self.seconds["collect"], 1e-9)

    def collect(self, batches: Batches, group: str, sites: tuple[str, ...]) -> ActivationStats:
        """Moments of these batches, whose sequences count."""
        counted = Counted(batches, group, self.overlap)
        stats = collect_at_origin(
            self.model,
            counted,
            group,
            sites=sites,
            adapter=self.adapter,
            origin=self.origin,
            progress=self.progress,
        )
        self.sequences[group] += counted.sequences
        return stats

    def factors(self, batches: Batches, group: str, **options: Any) -> InfluenceFactors:
        """Factors and gradients of these batches, whose sequences count."""
        counted = Counted(batches, group, self.overlap)
        factors = collect_factors(
            self.model,
            counted,
            group=group,
            adapter=self.adapter,
            progress=self.progress,
            **options,
        )
        self.sequences[group] += counted.sequences
        return factors

    def prepare_retain_loss(self, request: Request) -> None:
        """Find out what the retain loss is measured on, if on anything."""
        if request.calibration is not None:
            self.retain = given(self.model, request.calibration)
        elif request.retain is not None:
            batches = sample(self.model, request.retain, self.config.seed)
            self.retain = RetainLoss.of_batches(self.model, batches)
        elif request.bank is None:
            # In a forget batch only tokens that say so are retain tokens.
            batches = sample(self.model, request.forget, self.config.seed, group="forget")
            self.retain = RetainLoss.of_batches(self.model, batches)

    def prepare_walk(self, request: Request) -> None:
        """Find out what several steps run, apart from what their budget is measured on.

        Raises:
            UcanError: there is no retain data to run, or too little to be split.
        """
        if request.retain is None and request.bank is not None:
            raise UcanError(
                "influence_steps > 1 runs retain data before every step, which a bank does not "
                "hold: pass retain= batches beside it. (Not as calibration= alone: a budget that "
                "is measured on the data that the steps run would not hold for others.)"
            )
        mixed = list(holding(self.model, request.forget, "forget", RETAIN))
        pool = [*(() if request.retain is None else request.retain), *mixed]
        if request.calibration is not None:
            self.retain, self.walked = given(self.model, request.calibration), pool
            return
        apart, self.walked = split(self.model, pool, self.config.seed)
        self.retain = RetainLoss.of_batches(self.model, apart)
        if apart:
            others = len(self.walked)
            drawn = self.config.influence_batches
            self.notes["retain budget"] = (
                f"measured on {len(apart)} of {len(apart) + others} retain batches; the steps ran "
                + (f"{drawn} of the others each" if 0 < drawn < others else "the others")
                + (
                    "; earlier requests may have run any of them: give calibration= data of its own"
                    if request.earlier is not None
                    else ""
                )
            )

    def warn_of_overlap(self, request: Request) -> None:
        """Say that what is to be forgotten was passed as retained as well."""
        if request.bank is not None and request.retain is not None:
            # Which no pass for statistics has seen, nor checked.
            for batch in read_batches(self.model, request.retain, "retain"):
                self.overlap.compare(batch.source)
        if self.overlap.found:
            self.notes["overlap"] = (
                f"{self.overlap.found} of the {self.overlap.retained} retained sequences are "
                "sequences of the forget set too, token for token: what one set forgets the other "
                "holds. Leave what is to be forgotten out of the retained data (not where others "
                "did the very same)"
            )
            warn(f"{self.notes['overlap']}.")

    def warn_of_next_to_nothing(self) -> None:
        """Say that the budget is a share of a loss that is none."""
        before, budget = self.retain.before, self.config.max_retain_loss_increase
        if self.config.auto_strength and self.retain.on_batches and before < BY_HEART:
            text = (
                f"it is {100 * budget:g} % of next to nothing: the retain data cost {before:.2g} "
                "nats per token, so they are known by heart, and can lose many times that with no "
                "recommendation changed. Pass calibration= a function that measures "
                "recommendations, or raise max_retain_loss_increase"
            )
            earlier = self.notes.get("retain budget")
            self.notes["retain budget"] = f"{earlier}; {text}" if earlier else text
            warn(f"retain budget: {text}.")


class Counted:
    """Batches, and how many sequences with a token of the group went by; looked at for overlap."""

    def __init__(self, batches: Batches, group: str, overlap: Overlap) -> None:
        self.batches, self.group = batches, group_index(group)
        self.sequences = 0
        self._look = overlap.remember if self.group == FORGET else overlap.compare

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self.batches:
            yield batch
            self._look(batch)
            groups = batch.get("token_groups")
            if groups is not None:
                self.sequences += int((groups == self.group).any(1).sum())
                continue
            tokens = batch.get("input_ids")
            self.sequences += len(batch["inputs_embeds"] if tokens is None else tokens)


class Joined:
    """Some batches after others, any number of times."""

    def __init__(self, first: Batches, second: Batches) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return chain(self.first, self.second)
