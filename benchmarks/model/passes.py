"""Group ``collect``: one pass over a data set, with and without the statistics."""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

import ucan_fast as uf

from .. import peers
from ..measure import CheckFailed, Profile, Result, Skipped, case_name, described
from ..shapes import LLAMA_2_7B, SMOLLM2_135M
from . import demo
from .models import (
    Base,
    Batch,
    Unavailable,
    attended_tokens,
    cache_folder,
    lora_layers,
    random_batches,
    random_model,
    real_smollm2,
    with_adapter,
)
from .timing import Run, Whole, measure_whole

GROUP = "collect"
BASELINE = "peft, plain forward"
#: Less than any candidate must do: what is left of a target is read off against it.
FLOOR = "adapter off (floor)"
CANDIDATES = (
    BASELINE,
    "peft, plain forward, all logits",
    FLOOR,
    "peft + hooks, boolean index",
    "peft + hooks, mask matmul",
    "ucan_fast",
    "ucan_fast, not accelerated",
)
SITES = ("input", "output")
RANK = 16


@dataclass(frozen=True)
class Case:
    """A model and a data set.

    Attributes:
        shape: model, blocks, tokens, rank, and which groups the tokens are in.
        make: -> (model, seed -> batches); raises :class:`Unavailable`.
        exact: whether an fp64 copy of the model fits: the reference is then computed by it.
    """

    shape: dict[str, Any]
    dtype: str
    adapter_dtype: str
    make: Callable[[], tuple[PeftModel, Callable[[int], list[Batch]]]]
    exact: bool

    def skipped(self, reason: str, *, failed: bool = False) -> list[Skipped]:
        """Every candidate, with the reason."""
        where = case_name(self.shape, self.dtype, self.adapter_dtype)
        return [Skipped(GROUP, where, name, reason, failed) for name in CANDIDATES]


def run(profile: Profile, device: torch.device) -> Iterator[tuple[list[Result], list[Skipped]]]:
    """Every case of the profile, one after another; one that breaks down leaves the others be."""
    for case in cases(profile, device):
        try:
            model, batches = case.make()
            yield measure_case(case, model, batches, device, profile), []
        except Unavailable as reason:
            yield [], case.skipped(str(reason))
        except Exception as error:
            traceback.print_exc()
            # Its frames hold a model and its batches.
            traceback.clear_frames(error.__traceback__)
            yield [], case.skipped(described(error), failed=True)
        model = batches = None
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_case(
    case: Case,
    model: PeftModel,
    batches: Callable[[int], list[Batch]],
    device: torch.device,
    profile: Profile,
) -> list[Result]:
    """All candidates, checked and interleaved.

    Raises:
        CheckFailed: moments, token counts or logits differ.
    """
    sample = batches(0)
    tokens = attended_tokens(sample)
    case.shape["tokens"] = tokens
    return measure_whole(
        candidates(model, forward_options(model, sample[:1]), tokens, exact=case.exact),
        lambda seed: (batches(seed),),
        group=GROUP,
        shape=case.shape,
        dtype=case.dtype,
        adapter_dtype=case.adapter_dtype,
        baseline=BASELINE,
        reference=_reference(model, exact=case.exact),
        device=device,
        profile=profile,
    )


def cases(profile: Profile, device: torch.device) -> Iterable[Case]:
    """Models and data sets of a profile, on this device."""
    quick = profile.name == "quick"
    yield _random_case(Base(SMOLLM2_135M, 4 if quick else 30), device, 4 if quick else 16, 512)
    if not quick:
        yield _random_case(
            Base(SMOLLM2_135M, 30), device, sequences=16, length=512, both_groups=False
        )
        yield _real_case(device)
    yield _demo_case(device, every=5 if quick else 1)
    if device.type == "cuda":
        # Several batches: what collect does once (it hashes the adapter) is not a batch's price.
        blocks, sequences = (4, 64) if quick else (LLAMA_2_7B.blocks, 64)
        bf16 = torch.bfloat16
        plain = Base(LLAMA_2_7B, blocks, bf16)
        yield _random_case(plain, device, sequences, 1024)
        yield _random_case(plain, device, sequences, 1024, adapter_dtype=bf16)
        yield _random_case(Base(LLAMA_2_7B, blocks, bf16, nf4=True), device, sequences, 1024)


def _random_case(
    base: Base,
    device: torch.device,
    sequences: int,
    length: int,
    *,
    adapter_dtype: torch.dtype = torch.float32,
    both_groups: bool = True,
) -> Case:
    def make() -> tuple[PeftModel, Callable[[int], list[Batch]]]:
        model = random_model(base, RANK, device, adapter_dtype=adapter_dtype)
        # 8,192 tokens per batch on a GPU, 2,048 on a CPU.
        size = max(1, (8192 if device.type == "cuda" else 2048) // length)

        def batches(seed: int) -> list[Batch]:
            return random_batches(
                base.vocabulary, sequences, length, size, device, seed=seed, both_groups=both_groups
            )

        return model, batches

    return Case(
        _shape(
            base.model.name + (" NF4" if base.nf4 else ""),
            base.blocks,
            sequences * length,
            both_groups,
        ),
        _name(base.dtype),
        _name(adapter_dtype),
        make,
        exact=base.dtype == torch.float32,
    )


def _real_case(device: torch.device) -> Case:
    sequences, length = 16, 512

    def make() -> tuple[PeftModel, Callable[[int], list[Batch]]]:
        model = with_adapter(real_smollm2(cache_folder()).to(device), RANK)
        vocabulary = model.config.vocab_size
        return model, lambda seed: random_batches(
            vocabulary, sequences, length, 4, device, seed=seed, both_groups=True
        )

    shape = _shape("SmolLM2-135M-Instruct", SMOLLM2_135M.blocks, sequences * length, True)
    return Case(shape, "float32", "float32", make, exact=True)


def _demo_case(device: torch.device, every: int) -> Case:
    def make() -> tuple[PeftModel, Callable[[int], list[Batch]]]:
        data = demo.load_demo()
        # Sorted by length: every k-th batch is a small data set of the same mixture.
        batches = data.everything(device)[every // 2 :: every]
        return data.model(device), lambda seed: batches

    return Case(_shape(demo.NAME, 4, 0, False), "float32", "float32", make, exact=True)


def _shape(model: str, blocks: int, tokens: int, both_groups: bool) -> dict[str, Any]:
    return {
        "model": model,
        "blocks": blocks,
        "tokens": tokens,
        "rank": RANK,
        "groups": "both groups" if both_groups else "one group",
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Candidates


def forward_options(model: PeftModel, batches: list[Batch]) -> dict[str, Any]:
    """What ``collect`` calls the model with beside the batch: the peers get the same."""
    seen: dict[str, Any] = {}

    def note(_module: torch.nn.Module, _arguments: tuple, options: dict[str, Any]) -> None:
        seen.update({k: v for k, v in options.items() if not isinstance(v, torch.Tensor)})

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        uf.collect(model, batches, sites=SITES)
    finally:
        handle.remove()
    return seen


def candidates(
    model: PeftModel, options: dict[str, Any], tokens: int, *, exact: bool
) -> list[Whole]:
    """All ways to go over the data set; each takes ``(batches,)``."""
    every = {key: value for key, value in options.items() if key != "logits_to_keep"}
    said = {"forward_options": options}
    logits = logits_reference(model, exact=exact)
    plain = [Whole(BASELINE, plain_pass(model, options), tokens, reference=logits, extra=said)]
    if every != options:
        plain.append(
            Whole(
                "peft, plain forward, all logits",
                plain_pass(model, every),
                tokens,
                reference=logits,
                extra={"forward_options": every},
            )
        )
    return [
        *plain,
        Whole(
            FLOOR,
            adapter_off(model, options),
            tokens,
            reference=logits_reference(model, exact=exact, adapter=False),
            extra=said,
        ),
        Whole(
            "peft + hooks, boolean index",
            _hooked(model, peers.BooleanIndex, options),
            tokens,
            extra=said,
        ),
        Whole(
            "peft + hooks, mask matmul",
            _hooked(model, peers.MaskMatmul, options),
            tokens,
            extra=said,
        ),
        Whole("ucan_fast", _collected(model, accelerated=True), tokens, extra=said),
        Whole(
            "ucan_fast, not accelerated", _collected(model, accelerated=False), tokens, extra=said
        ),
    ]


def _forward(model: PeftModel, batch: Batch, options: dict[str, Any]) -> Any:
    # Without labels: no candidate computes a loss.
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return model(**inputs, **options)


def plain_pass(model: PeftModel, options: dict[str, Any]) -> Callable[..., Run]:
    """PEFT's forward without gradients; takes ``(batches,)``, checked are the last logits."""

    def bind(batches: list[Batch]) -> Run:
        def run() -> list[torch.Tensor]:
            with torch.no_grad():
                # The last position only: keeping more would be charged to the memory.
                return [_forward(model, b, options).logits[:, -1].clone() for b in batches]

        return Run(run)

    return bind


def adapter_off(model: PeftModel, options: dict[str, Any]) -> Callable[..., Run]:
    """:func:`plain_pass` of the base alone, the LoRA layers still around it."""
    plain = plain_pass(model, options)

    def bind(batches: list[Batch]) -> Run:
        layers = model.base_model
        return Run(plain(batches).run, layers.disable_adapter_layers, layers.enable_adapter_layers)

    return bind


def _sums_apart(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # Σ|h| and Σh² have errors of their own: beside the larger one the other would not show.
    return {
        "count": found["count"],
        **{f"{key}/{i}": t[i] for key, t in found.items() if key != "count" for i in (0, 1)},
    }


class _OfTheBatch:
    """Statistics whose groups change with the batch, behind hooks that stay."""

    current: peers.BooleanIndex | peers.MaskMatmul

    def add(self, total: torch.Tensor, h: torch.Tensor) -> None:
        self.current.add(total, h)


def _hooked(
    model: PeftModel, statistics: peers.Statistics, options: dict[str, Any]
) -> Callable[..., Run]:
    def bind(batches: list[Batch]) -> Run:
        hooked = HookedPass(model, statistics, batches, options)
        return Run(hooked.run, hooked.register, hooked.remove, _sums_apart)

    return bind


class HookedPass:
    """PEFT's forward with hooks on every LoRA layer: what ``collect`` sums up.

    Args:
        statistics: groups ``[tokens]`` -> an object with ``add(total, h)``.
    """

    def __init__(
        self,
        model: PeftModel,
        statistics: Callable[[torch.Tensor], Any],
        batches: list[Batch],
        options: dict[str, Any],
    ) -> None:
        self.model, self.statistics, self.batches = model, statistics, batches
        self.options = options
        self._of_batch = _OfTheBatch()
        self._totals: dict[str, torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def register(self) -> None:
        """Put the hooks in place, with empty totals."""
        for name, layer in lora_layers(self.model):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            mine = {
                "input": peers.new_totals(a.shape[1], a.device),
                "output": peers.new_totals(b.shape[0], b.device),
            }
            self._totals |= {f"{name}/{site}": total for site, total in mine.items()}
            self._handles += peers.hook_moments(layer, self._of_batch, mine)

    def remove(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def run(self) -> dict[str, torch.Tensor]:
        """One pass.

        Returns:
            ``"layer/site"`` -> ``[2, 2, n]`` on the CPU, and the token count of both groups.
        """
        count = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for batch in self.batches:
                groups = torch.where(batch["attention_mask"].bool(), batch["token_groups"], -1)
                groups = groups.reshape(-1)
                count += torch.stack([(groups == g).sum() for g in (0, 1)]).cpu()
                self._of_batch.current = self.statistics(groups)
                _forward(self.model, batch, self.options)
        return {"count": count, **{key: total.cpu() for key, total in self._totals.items()}}


def hooked_pass(
    model: PeftModel,
    statistics: Callable[[torch.Tensor], Any],
    batches: list[Batch],
    options: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """A :class:`HookedPass` from beginning to end; the arguments are its own."""
    hooked = HookedPass(model, statistics, batches, options)
    try:
        hooked.register()
        return hooked.run()
    finally:
        hooked.remove()


def _collected(model: PeftModel, *, accelerated: bool) -> Callable[..., Run]:
    def bind(batches: list[Batch]) -> Run:
        def run() -> uf.ActivationStats:
            return uf.collect(model, batches, sites=SITES)

        def sums(stats: uf.ActivationStats) -> dict[str, torch.Tensor]:
            measured = [
                (f"{name}/{site}", moments)
                for name, sites in stats.layers.items()
                for site, moments in sites.items()
            ]
            found = {key: torch.stack([m.abs_sum, m.sq_sum]) for key, m in measured}
            # Of every layer: each counts for itself.
            counts = torch.stack([m.count for _, m in measured])
            if (counts != counts[0]).any():
                raise CheckFailed("collect counted other tokens in one layer than in another.")
            return _sums_apart({"count": counts[0], **found})

        if not accelerated:
            return Run(run, result=sums)
        return Run(run, lambda: accelerate_all(model), lambda: uf.restore(model), sums)

    return bind


def accelerate_all(model: PeftModel) -> None:
    """``uf.accelerate``, and an error where a layer keeps PEFT's forward."""
    report = uf.accelerate(model)
    if report.kept:
        raise RuntimeError(str(report))


# References


class _Exact:
    """Moments as :func:`benchmarks.peers.reference_moments` defines them."""

    def __init__(self, groups: torch.Tensor) -> None:
        self.groups = groups

    def add(self, total: torch.Tensor, h: torch.Tensor) -> None:
        total += peers.reference_moments(h.reshape(-1, h.shape[-1]), self.groups)


def exact_model(model: PeftModel, *, exact: bool) -> PeftModel:
    """An fp64 copy where that is possible, else the model itself."""
    return copy.deepcopy(model).double() if exact else model


def _reference(model: PeftModel, *, exact: bool) -> Callable[..., dict[str, torch.Tensor]]:
    def reference(batches: list[Batch]) -> dict[str, torch.Tensor]:
        right = exact_model(model, exact=exact)
        return _sums_apart(hooked_pass(right, _Exact, batches, {"use_cache": False}))

    return reference


def logits_reference(
    model: PeftModel, *, exact: bool, adapter: bool = True
) -> Callable[..., list[torch.Tensor]]:
    """The logits of :func:`plain_pass`, from an fp64 copy of the model where ``exact``.

    ``adapter=False``: those of :func:`adapter_off`.
    """
    # Without collect's options: what they skip must not change what remains. Both plain forwards
    # are compared with it, on the same batches: it is computed once.
    known: list[tuple[list[Batch], list[torch.Tensor]]] = []

    def reference(batches: list[Batch]) -> list[torch.Tensor]:
        if not known or known[0][0] is not batches:
            right = exact_model(model, exact=exact)
            off = contextlib.nullcontext() if adapter else right.disable_adapter()
            with torch.no_grad(), off:
                options = {"use_cache": False}
                logits = [_forward(right, b, options).logits[:, -1].clone() for b in batches]
            known[:] = [(batches, logits)]
        return known[0][1]

    return reference
