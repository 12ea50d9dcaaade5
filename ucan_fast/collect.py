"""collect: one forward pass over a data set, and the moments of every LoRA layer."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import nn

from . import ops
from .accelerate import FusedLoraLinear, is_fused
from .adapter import (
    LoraLayer,
    active_context,
    base_config,
    base_model,
    find_layers,
    fingerprint,
    is_weight_probe,
    named_modules,
    one_walk,
    resolve_adapter,
    unwrap,
)
from .batches import Batch, eval_mode, group_index, read_batches
from .errors import UcanError
from .interrupts import finished
from .marks import check_is_origin
from .neurons import gated_mlps
from .ops.backend import decide_once
from .ops.expand import delta_reference
from .progress import Progress, track
from .stats import ActivationStats, Moments
from .transfers import to_cpu

#: ``"layer"`` is the whole output of a layer, for ``UcanConfig(output_signal="layer")``.
MEASURABLE = ("input", "rank", "output", "layer")
DEFAULT_SITES = ("input", "rank", "output")

# Where cross-attention modules sit in a decoder: T5, BART and its kin, BLIP and BERT style.
_CROSS_ATTENTION = ("encdecattention", "encoder_attn", "crossattention", "cross_attn")
# Layers of one parent that read the same tensor, in the order in which models call them.
_SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
_MAX_STACKED_RANK = 256
_KEY_VALUE = ("k", "v", "k_proj", "v_proj", "key", "value")


def collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    group: str = "retain",
    sites: Iterable[str] | None = None,
    adapter: str | None = None,
    progress: Progress = None,
) -> ActivationStats:
    """Run the model over the batches, forward only, and sum up what its neurons did.

    Args:
        model: a model with PEFT LoRA layers, plain or accelerated.
        batches: dicts of what the model takes (``input_ids [B, T]``, ``attention_mask``, ...), plus
            optionally ``token_groups [B, T]``: 0 forget, 1 retain, -1 ignored. Padding is ignored
            whatever it says. Encoder-decoder models also take ``decoder_token_groups``.
        group: the group of every attended token in batches without ``token_groups``.
        sites: any of ``"input"``, ``"rank"``, ``"output"``, ``"layer"``, ``"mlp"`` (which reads the
            input moments); default: input, rank and output.
        adapter: which adapter is measured, needed when several are active.
        progress: True for a progress bar, or a function ``(done, total, text)``.

    Returns:
        fp64 sums per layer, site and group. The model's training mode, the gradient mode and the
        random number generators are afterwards as they were.

    Raises:
        UcanError: no LoRA layers, a merged or disabled adapter, an adapter with a plan (statistics
            belong to the origin), a layer without measurable neurons, a site the model does not
            have, a malformed batch, no token at all, a layer whose token count does not fit, or
            NaN/Inf activations (the layer is named). Nothing is recorded then.
    """
    group_index(group)
    model = unwrap(model)
    with one_walk(model):
        adapter = resolve_adapter(model, adapter)
        find_layers(model, adapter)  # what cannot be measured is said before weights are read
        origin = fingerprint(model, adapter)
        check_is_origin(model, adapter, origin)
        return collect_at_origin(
            model, batches, group, sites=sites, adapter=adapter, origin=origin, progress=progress
        )


def collect_at_origin(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    group: str,
    *,
    sites: Iterable[str] | None,
    adapter: str,
    origin: str,
    progress: Progress,
) -> ActivationStats:
    """:func:`collect`, for callers that know the adapter and its fingerprint, ``origin``."""
    layers = find_layers(model, adapter)
    wanted = _measured_sites(model, layers, sites)
    pass_ = _Pass(model, layers, wanted)
    options = _forward_options(model, layers)
    with _quiet(model), pass_.attached(), decide_once():
        checked = read_batches(model, batches, group, tell_padding=True)
        for batch in track(checked, batches, progress, "collect"):
            if not batch.groups.numel():  # models cannot be run on nothing
                continue
            pass_.begin(batch)
            model(**{**batch.forward_inputs(), **options})
            pass_.end()
    stats = pass_.finish(group)
    stats.fingerprint = origin
    stats.context = active_context(model, adapter)
    return stats


class _Pass:
    """One run over the data: the totals of all layers, and the groups of the current batch."""

    def __init__(self, model: nn.Module, layers: list[LoraLayer], sites: tuple[str, ...]) -> None:
        self.sites = sites
        two_sided = bool(getattr(base_config(model), "is_encoder_decoder", False))
        self.recorders = [
            _Recorder(self, layer, _role(layer.name) if two_sided else "encoder")
            for layer in layers
        ]
        self.batches = 0
        self.tokens: dict[str, _Tokens] = {}
        self.thread = threading.get_ident()
        # Layers that another thread ran during this batch.
        self.elsewhere: set[_Recorder] = set()
        self.shared: _SharedInput | None = None
        _find_companions(self.recorders)

    def begin(self, batch: Batch) -> None:
        self.batches += 1
        self.tokens = {"encoder": _Tokens(batch.groups)}
        if batch.decoder_groups is not None:
            self.tokens["decoder"] = _Tokens(batch.decoder_groups)

    def end(self) -> None:
        self.shared = None
        self.tokens = {}
        for recorder in self.recorders:
            if recorder.fused and not isinstance(recorder.layer.module, FusedLoraLinear):
                raise UcanError(
                    f"{recorder.layer.name} was given PEFT's forward back while statistics were "
                    "taken, and its tokens since then were not counted; collect again without a "
                    "restore between the batches."
                )
        for recorder in list(self.elsewhere):
            if recorder.last_batch != self.batches:
                raise UcanError(
                    f"{recorder.layer.name} was run in another thread than the one that collects, "
                    "and only the collecting thread's calls are counted. Run the whole model in "
                    "one thread."
                )
        self.elsewhere.clear()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        try:
            with finished():
                for recorder in self.recorders:
                    module = recorder.layer.module
                    if recorder.fused:
                        _attach(module, recorder)
                    else:
                        handles += recorder.hook()
            yield
        finally:
            with finished():
                for handle in handles:
                    handle.remove()
                for recorder in self.recorders:
                    _detach(recorder.layer.module, recorder)

    def finish(self, group: str) -> ActivationStats:
        stats = ActivationStats()
        counts = torch.tensor([r.count for r in self.recorders], dtype=torch.float64, device="cpu")
        totals = [total for r in self.recorders for total in r.totals.values()]
        # Own memory for each: what came from a GPU shares its.
        mine = (
            here if total.is_cpu else here.clone()
            for total, here in zip(totals, to_cpu(totals), strict=True)
        )
        for recorder, count in zip(self.recorders, counts.unbind(0), strict=True):
            stats.layers[recorder.layer.name] = {
                site: Moments(count.clone(), *next(mine).unbind(0)) for site in recorder.totals
            }
        idle = [r.layer.name for r in self.recorders if not r.calls]
        if not self.batches:
            raise UcanError(f"there was no {group} batch with a token; nothing was recorded.")
        if idle:
            raise UcanError(
                f"{idle[0]} was never called with its adapter while the model ran"
                f"{f' ({len(idle)} such layers)' if idle[1:] else ''}; it cannot be measured."
            )
        stats.check_finite()
        empty = [r.layer.name for r in self.recorders if not any(r.count)]
        if empty:
            raise UcanError(
                f"no token of {empty[0]} was counted: every token is padding or ignored "
                "(attention_mask and token_groups)."
            )
        return stats


class _Tokens:
    """The groups of the tokens of one role, in the current batch.

    Attributes:
        shape: the batch's.
        count: tokens of group 0 and 1. The same for every layer of the role.
        only_group: the only group that the batch holds, where it holds but one: cheaper sums.
    """

    def __init__(self, groups: torch.Tensor) -> None:
        self.shape = groups.shape
        self.count = torch.stack([(groups == 0).sum(), (groups == 1).sum()]).tolist()
        self.only_group = None if all(self.count) else int(self.count[1] > 0)
        self._flat = {groups.device: groups.reshape(-1)}

    def on(self, device: torch.device) -> torch.Tensor:
        """The groups ``[tokens]``. Layers may lie on several devices; the batch is on the first."""
        if device not in self._flat:
            self._flat[device] = next(iter(self._flat.values())).to(device)
        return self._flat[device]


class _Recorder:
    """The totals of one layer. Fused layers call it; others are hooked."""

    def __init__(self, pass_: _Pass, layer: LoraLayer, role: str) -> None:
        self.pass_ = pass_
        self.layer = layer
        self.role = role
        self.fused = isinstance(layer.module, FusedLoraLinear)
        self.calls = self.last_batch = 0
        self.inside = False
        self.companions: list[_Recorder] = []
        self.count = [0, 0]
        a, b = layer.a, layer.b
        (rank, inputs), outputs = a.shape, b.shape[0]
        sizes = {"input": inputs, "rank": rank, "output": outputs, "layer": outputs}
        self.totals = {
            site: torch.zeros(2, 2, sizes[site], dtype=torch.float64, device=a.device)
            for site in pass_.sites
        }

    @property
    def _tokens(self) -> _Tokens:
        return self.pass_.tokens[self.role]

    def fits_with(self, other: _Recorder) -> bool:
        """Whether one product could serve both layers."""
        mine, theirs = self.layer.a, other.layer.a
        return (
            is_fused(self.layer.module)
            and is_fused(other.layer.module)
            and self.role == other.role
            and (mine.shape[1], mine.dtype, mine.device)
            == (theirs.shape[1], theirs.dtype, theirs.device)
        )

    def listens(self) -> bool:
        """Whether this call counts: if it is the pass's own thread's, and within a batch.

        Whoever yields the batches may run the model between two of them, and so may others beside.
        """
        pass_ = self.pass_
        if not pass_.tokens:
            return False
        if threading.get_ident() != pass_.thread:
            pass_.elsewhere.add(self)
            return False
        return not is_recompute()

    def wants(self, adapter: str) -> bool:
        """Whether this adapter's path is the one being measured, in a call that counts."""
        return adapter == self.layer.adapter

    def shrink(
        self, x: torch.Tensor, a: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """z and its moments, for the fused forward, and what its expand has to record."""
        groups = self._begin_call(x)
        shared = self._shared_input(x)
        if shared is None or not shared.holds(self.layer.name, dtype):
            shared = self._shrink_together(x, a, groups, dtype, shared)
        z, rank_moments = shared.ready.pop(self.layer.name)
        if shared.moments is not None:
            self.totals["input"].add_(shared.moments)
        if rank_moments is not None:
            self.totals["rank"].add_(rank_moments)
        delta_moments = self.totals.get("output")
        if delta_moments is None:
            return z, {}
        return z, {
            "groups": groups,
            "only_group": self._tokens.only_group,
            "delta_moments": delta_moments,
        }

    def _shrink_together(
        self,
        x: torch.Tensor,
        a: torch.Tensor,
        groups: torch.Tensor,
        dtype: torch.dtype,
        shared: _SharedInput | None,
    ) -> _SharedInput:
        """One shrink for this layer and its companions, and x's moments unless they are known."""
        # An input that can change unnoticed is used for one layer only.
        alone = shared is not None or x.is_inference()
        others = [] if alone else self.companions
        stacked = [a, *(recorder.layer.a for recorder in others)]
        ranks = [len(each) for each in stacked]
        fresh = shared is None and "input" in self.totals
        moments = torch.zeros_like(self.totals["input"]) if fresh else None
        rank_moments = None
        if "rank" in self.totals:
            rank_moments = self.totals["rank"].new_zeros(2, 2, sum(ranks))
        z = ops.shrink(
            x,
            torch.cat(stacked) if others else a,
            dtype=dtype,
            groups=groups,
            only_group=self._tokens.only_group,
            input_moments=moments,
            rank_moments=rank_moments,
        )
        if shared is None:
            self.pass_.shared = shared = _SharedInput(x, self.role, moments)
        if not others:
            shared.ready[self.layer.name] = (z, rank_moments)
            return shared
        parts = z.split(ranks, -1)
        sums = [None] * len(ranks) if rank_moments is None else rank_moments.split(ranks, -1)
        for recorder, part, total in zip((self, *others), parts, sums, strict=True):
            shared.ready[recorder.layer.name] = (part, total)
        return shared

    def layer_output(self, y: torch.Tensor) -> None:
        """The whole output of the layer in a call that counts, for the ``layer`` site."""
        if "layer" in self.totals:
            with torch.no_grad():
                self._add(self.totals["layer"], y, self._flat_groups(y))

    def hook(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Record from PEFT's own forward."""
        module = self.layer.module
        return [
            module.register_forward_pre_hook(self._before),
            self.layer.a_module.register_forward_hook(self._after_a),
            module.register_forward_hook(self._after),
        ]

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """For one call in which a fused layer falls back to PEFT's own forward.

        The caller hands the result to :meth:`layer_output`: a hook on the layer itself would come
        too late, that call has begun.
        """
        handle = self.layer.a_module.register_forward_hook(self._after_a)
        self.inside = True
        try:
            yield
        finally:
            with finished():
                self.inside = False
                handle.remove()

    def _before(self, _module: nn.Module, _args: tuple) -> None:
        if self.listens():
            self.inside = True

    def _after(self, _module: nn.Module, _args: tuple, y: torch.Tensor) -> None:
        if self.listens():
            self.inside = False
            self.layer_output(y)

    def _after_a(self, _module: nn.Module, args: tuple, z: torch.Tensor) -> None:
        # lora_A may be tied to other layers as a module; their calls are theirs.
        if not (self.inside and self.listens()):
            return
        x = args[0]
        if is_weight_probe(self.layer, x):
            return
        with torch.no_grad():
            self._plain_step(x, z)

    def _plain_step(self, x: torch.Tensor, z: torch.Tensor) -> None:
        groups = self._begin_call(x)
        if "input" in self.totals:
            shared = self._shared_input(x)
            if shared is None:
                shared = _SharedInput(x, self.role, torch.zeros_like(self.totals["input"]))
                self._add(shared.moments, x, groups)
                self.pass_.shared = shared
            self.totals["input"] += shared.moments
        if "rank" in self.totals:
            self._add(self.totals["rank"], z, groups)
        if "output" in self.totals:
            delta = delta_reference(z, self.layer.b, self.layer.scaling)
            self._add(self.totals["output"], delta, groups)

    def _add(self, total: torch.Tensor, h: torch.Tensor, groups: torch.Tensor) -> None:
        ops.accumulate_moments(h, groups, total, only_group=self._tokens.only_group)

    def _begin_call(self, x: torch.Tensor) -> torch.Tensor:
        groups = self._flat_groups(x)
        self.calls += 1
        self.last_batch = self.pass_.batches
        forget, retain = self._tokens.count
        self.count[0] += forget
        self.count[1] += retain
        return groups

    def _flat_groups(self, h: torch.Tensor) -> torch.Tensor:
        tokens, shape = self._tokens, h.shape[:-1]
        if shape != tokens.shape and shape != (tokens.shape.numel(),):
            raise UcanError(
                f"{self.layer.name} sees tokens of shape {tuple(shape)}, but the batch's are "
                f"{tuple(tokens.shape)} ({self.role} tokens); its neurons cannot be matched with "
                "token groups. Leave this module out of the adapter's target_modules."
            )
        return tokens.on(h.device)

    def _shared_input(self, x: torch.Tensor) -> _SharedInput | None:
        shared = self.pass_.shared
        return shared if shared is not None and shared.is_for(x, self.role) else None


class _SharedInput:
    """What is known of a tensor that several layers read, as q, k and v do.

    Attributes:
        moments: its input-site moments, taken by the first of those layers.
        ready: z and z's moments, per layer that is still to come.
    """

    def __init__(self, x: torch.Tensor, role: str, moments: torch.Tensor | None) -> None:
        # Weakly: the layers' caller holds it as long as another may read it, and what is held
        # longer is memory that the next activations cannot have.
        self._x = weakref.ref(x)
        self.role, self.moments = role, moments
        # Tensors of inference mode have no version: their changes in place would go unnoticed.
        self.version = -1 if x.is_inference() else x._version
        self.ready: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def is_for(self, x: torch.Tensor, role: str) -> bool:
        """Whether this is about that very tensor, unchanged."""
        if self._x() is not x or self.role != role or x.is_inference():
            return False
        return self.version == x._version

    def holds(self, layer: str, dtype: torch.dtype) -> bool:
        """Whether the layer's z is here, in that dtype."""
        return layer in self.ready and self.ready[layer][0].dtype == dtype


def _find_companions(recorders: list[_Recorder]) -> None:
    """Which layers after it are expected to read the same tensor as a layer does.

    By name, so that every batch is computed in the same way, the first one too. A wrong guess
    costs a little time and changes nothing: z is used only for the very same tensor.
    """
    by_name = {recorder.layer.name: recorder for recorder in recorders}
    for recorder in recorders:
        parent, dot, last = recorder.layer.name.rpartition(".")
        family = next((names for names in _SAME_INPUT if last in names), (last,))
        rank = recorder.layer.a.shape[0]
        for name in family[family.index(last) + 1 :]:
            other = by_name.get(f"{parent}{dot}{name}")
            if other is None or not recorder.fits_with(other):
                continue
            rank += other.layer.a.shape[0]
            if rank <= _MAX_STACKED_RANK:
                recorder.companions.append(other)


# Two passes may begin and end on one model at the same time, in two threads.
_recorders_lock = threading.Lock()


def _attach(module: nn.Module, recorder: _Recorder) -> None:
    with _recorders_lock:
        module.__dict__["_ucan_recorders"] = (*module.__dict__.get("_ucan_recorders", ()), recorder)


def _detach(module: nn.Module, recorder: _Recorder) -> None:
    with _recorders_lock:
        others = [r for r in module.__dict__.pop("_ucan_recorders", ()) if r is not recorder]
        if others:
            module.__dict__["_ucan_recorders"] = tuple(others)


def is_recompute() -> bool:
    """Whether this is a checkpoint's second run, in a backward pass: its tokens were counted."""
    return torch._C._current_graph_task_id() != -1


def _measured_sites(
    model: nn.Module, layers: list[LoraLayer], sites: Iterable[str] | None
) -> tuple[str, ...]:
    names = DEFAULT_SITES if sites is None else (sites,) if isinstance(sites, str) else tuple(sites)
    unknown = [s for s in names if s not in (*MEASURABLE, "mlp")]
    if unknown or not names:
        raise UcanError(
            f"unknown site {', '.join(map(repr, unknown)) or '(none given)'}; "
            f"known: {', '.join(MEASURABLE)}, mlp."
        )
    if "mlp" in names:
        gated_mlps(model, layers)
    return tuple(s for s in MEASURABLE if s in names or (s == "input" and "mlp" in names))


def _role(name: str) -> str:
    parts = name.lower().split(".")
    if "decoder" not in parts:
        return "encoder" if "encoder" in parts else "decoder"
    crosses = any(part in _CROSS_ATTENTION for part in parts)
    return "encoder" if crosses and parts[-1] in _KEY_VALUE else "decoder"


def _forward_options(model: nn.Module, layers: list[LoraLayer]) -> dict[str, Any]:
    """No cache, and no full-vocabulary logits where nothing after the trunk is measured."""
    base = base_model(model)
    try:
        # Kept by class: a forward that was put on the instance may hold the model.
        own = "forward" in base.__dict__
        accepted = inspect.signature(base.forward).parameters if own else _parameters(type(base))
    except (TypeError, ValueError):
        return {}
    options: dict[str, Any] = {}
    if "use_cache" in accepted:
        options["use_cache"] = False
    trunk = base._modules.get(getattr(base, "base_model_prefix", ""))
    if "logits_to_keep" in accepted and trunk is not None:
        # What is not in the trunk may see the last position only: a head, and layers before it.
        others = [part for part in base._modules.values() if part not in (None, trunk)]
        measured = {layer.module for layer in layers}
        if not any(m in measured for part in others for m in part.modules()):
            options["logits_to_keep"] = 1
    return options


@functools.lru_cache(maxsize=16)
def _parameters(kind: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.forward).parameters


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, nothing compiled; every mode and random state comes back."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    devices: set[int] = set()
    if torch.cuda.is_initialized():  # it is where there is a tensor on a GPU
        own = (p for _, m in named_modules(model) for p in m._parameters.values() if p is not None)
        devices = {p.device.index for p in own if p.device.type == "cuda"}
    try:
        with (
            eval_mode(model),
            torch.no_grad(),
            torch.random.fork_rng(sorted(devices)),
            # A submodule that was compiled would run without our hooks and recorders.
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
