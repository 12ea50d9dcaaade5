"""collect_factors: forward and backward passes over a data set, and what influence is made of."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .adapter import (
    LoraLayer,
    active_context,
    base_config,
    find_layers,
    fingerprint,
    resolve_adapter,
    unwrap,
)
from .batches import IGNORED, Batch, group_index, read_batches
from .collect import _SAME_INPUT, _quiet, _role, is_recompute
from .config import VARIANTS
from .errors import UcanError
from .evaluation import (
    IGNORED_LABELS,
    check_predicts_tokens,
    scored,
    slices,
    token_logits,
)
from .factors import FACTORS, InfluenceFactors, LayerFactors
from .interrupts import finished
from .marks import check_is_origin
from .metrics import check_labels
from .neurons import Piece
from .progress import Progress, track

#: Elements of fp64 probabilities that labels are drawn from at a time.
_CHUNK_ELEMENTS = 1 << 22
#: Nats by which no logit is above another that takes part.
_MASKED = 1e3


# Tensors made in inference mode could not be differentiated.
@torch.inference_mode(False)
def collect_factors(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    group: str = "retain",
    variant: str = "all",
    rank: int = 32,
    blocks: int = 2,
    curvature: bool = True,
    seed: int = 0,
    adapter: str | None = None,
    progress: Progress = None,
) -> InfluenceFactors:
    """Run the model over the batches, forward and backward, and sum up gradients and factors.

    Per slice of a batch one forward pass, one backward pass of the group's NLL (true labels;
    gradients), and one of the NLL of labels drawn from the model, its logits :func:`softened`, at
    every scored position of the sequence (factors). A label depends on the seed and its own
    sequence only, not on the batch, so a sequence that is run again gives the same sums and can be
    subtracted. (As far as its logits are the same: in bf16 another batching may round them so that
    another label is drawn.)

    Args:
        model: a model with PEFT LoRA layers, plain or accelerated.
        batches: see :func:`ucan_fast.collect`.
        group: ``"retain"`` or ``"forget"``: which tokens are summed over, and the group of every
            attended token in batches without ``token_groups``. A bank is all data as retain.
        variant: which factors are kept. ``"all"``; ``"b-only"``, those of B; ``"last-blocks"``,
            those of the last blocks of the model; ``"diagonal"``, C_x and S_h as their diagonals;
            ``"eigenbasis"``, C_x and S_h as their largest eigenpairs and a flat rest (made after
            the pass, which needs the memory of ``"all"``).
        rank: eigenpairs per factor, for ``"eigenbasis"``.
        blocks: how many, for ``"last-blocks"``.
        curvature: False leaves the factors and their backward pass out.
        seed: of the labels.
        adapter: needed when several adapters are active.

    Returns:
        Sums on the CPU: gradients in fp64, factors in fp32 (fp64 where the adapter is). Weights,
        gradients, ``requires_grad``, training mode, gradient mode and random number generators
        are afterwards as they were.

    Raises:
        UcanError: as :func:`ucan_fast.collect`; also an adapter variant (DoRA and the like), a
            scaling of 0, a layer that no gradient reaches, no scored position of the group, or a
            model that predicts no next token.
    """
    group_index(group)
    _check_variant(variant, rank, blocks)
    model = unwrap(model)
    adapter = resolve_adapter(model, adapter)
    check_predicts_tokens(model)
    layers = influence_layers(model, adapter, variant, blocks)
    origin = fingerprint(model, adapter)
    check_is_origin(model, adapter, origin)
    stored = "all" if variant == "eigenbasis" else variant
    pass_ = _Pass(model, layers, group_index(group), stored, curvature, seed)
    weights = [p for target in pass_.targets for p in target.parameters]
    with _quiet(model), trainable(model, weights), differentiable(model), pass_.attached():
        checked = read_batches(model, batches, group, tell_padding=True)
        for batch in track(checked, batches, progress, "factors"):
            pass_.run(model, batch)
    factors = pass_.finish(group)
    factors.fingerprint = origin
    factors.context = active_context(model, adapter)
    factors.blocks = blocks if variant == "last-blocks" else 0
    if variant == "eigenbasis":
        if curvature:
            return factors.compressed(rank)
        factors.variant = variant
    return factors


def influence_layers(
    model: nn.Module, adapter: str, variant: str = "all", blocks: int = 2
) -> list[LoraLayer]:
    """The layers that a variant changes, in module order.

    Raises:
        UcanError: a layer whose output is not ``base(x) + s (x Aᵀ) Bᵀ`` (it is named).
    """
    layers = find_layers(model, adapter)
    for layer in layers:
        kind = layer.module.lora_variant.get(adapter)
        if kind is not None:
            raise UcanError(
                f"{layer.name}: the influence step does not know the gradients of "
                f"{type(kind).__name__}; use method='attenuate'."
            )
        if layer.scaling == 0:
            raise UcanError(f"{layer.name}: the adapter is scaled by 0, so it does nothing.")
    return _last_blocks(layers, blocks) if variant == "last-blocks" else layers


@dataclass
class Target:
    """A matrix that the step moves.

    Attributes:
        key: ``{layer}.lora_A`` or ``.lora_B``, of the first layer that uses it.
        which: ``"A"`` or ``"B"``.
        parameters: the Parameters that are this storage (more than one where views are tied).
        layers: the names of all layers that use it.
    """

    key: str
    which: str
    parameters: list[torch.Tensor]
    layers: list[str] = field(default_factory=list)

    @property
    def parameter(self) -> torch.Tensor:
        """The first of them; to write to it is to write to all."""
        return self.parameters[0].detach()


def find_targets(layers: list[LoraLayer], variant: str) -> list[Target]:
    """What a variant moves, every storage once, in module order."""
    found: dict[tuple, Target] = {}
    for layer in layers:
        for which in ("B",) if variant == "b-only" else ("A", "B"):
            parameter = layer.a if which == "A" else layer.b
            piece = Piece(layer.name, which, parameter, axis=0)
            target = found.setdefault(piece.storage_key, Target(piece.key, which, []))
            target.layers.append(layer.name)
            if all(parameter is not member for member in target.parameters):
                target.parameters.append(parameter)
    return list(found.values())


def factor_memory(
    model: nn.Module, *, rank: int = 32, blocks: int = 2, adapter: str | None = None
) -> dict[str, int]:
    """Bytes that the factors of every variant take for one set of tokens; nothing is run.

    A request beside a bank holds three sets: the bank's, the forget set's and what is left (of an
    eigenbasis, from which nothing is subtracted, the bank's alone). Not counted: fp64 gradients, 8
    bytes per weight of A and B a set, and what a solve takes for a while, 16 bytes per element of
    the largest factor. An eigenbasis is made from full factors: its peak is that of ``"all"``.

    C_x is counted once for layers that are known by their names to read the same tensor.
    """
    model = unwrap(model)
    adapter = resolve_adapter(model, adapter)
    memory = {}
    for variant in VARIANTS:
        total, inputs = 0, set()
        for layer in influence_layers(model, adapter, variant, blocks):
            (r, k), n = layer.a.shape, layer.b.shape[0]
            width = torch.promote_types(layer.a.dtype, torch.float32).itemsize
            wanted = _wanted(variant)
            sizes = {"c_x": _elements(k, variant, rank), "s_h": _elements(n, variant, rank)}
            sizes |= {"s_z": r * r, "c_z": r * r}
            if _input_name(layer.name) in inputs:
                sizes["c_x"] = 0
            inputs.add(_input_name(layer.name))
            total += width * sum(sizes[which] for which in wanted)
        memory[variant] = total
    return memory


def _check_variant(variant: str, rank: int, blocks: int) -> None:
    if variant not in VARIANTS:
        raise UcanError(
            f"variant must be one of {', '.join(map(repr, VARIANTS))}, not {variant!r}."
        )
    for name, value in (("rank", rank), ("blocks", blocks)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UcanError(f"{name} must be an integer >= 1, not {value!r}.")


def _wanted(variant: str) -> tuple[str, ...]:
    return ("s_h", "c_z") if variant == "b-only" else FACTORS


def _elements(n: int, variant: str, rank: int) -> int:
    if variant == "diagonal":
        return n
    if variant == "eigenbasis":
        k = min(rank, n)
        return n * k + k + 1
    return n * n


def _input_name(name: str) -> tuple[str, ...]:
    parent, _, last = name.rpartition(".")
    return (parent, *next((names for names in _SAME_INPUT if last in names), (last,)))


def _last_blocks(layers: list[LoraLayer], blocks: int) -> list[LoraLayer]:
    """Layers of the last blocks of every stack, and those that belong to no block (a head)."""
    # The first number in a module's name counts the blocks of the stack before it.
    places = [re.match(r"(.*?)\.(\d+)(?:\.|$)", f".{layer.name}") for layer in layers]
    numbers: dict[str, set[int]] = {}
    for place in places:
        if place:
            numbers.setdefault(place[1], set()).add(int(place[2]))
    kept = {stack: sorted(found)[-blocks:] for stack, found in numbers.items()}
    return [
        layer
        for layer, place in zip(layers, places, strict=True)
        if not place or int(place[2]) in kept[place[1]]
    ]


class _Pass:
    """One run over the data: the sums of all layers, and the tokens of the current slice."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[LoraLayer],
        group: int,
        variant: str,
        curvature: bool,
        seed: int,
    ) -> None:
        self.group, self.variant, self.curvature, self.seed = group, variant, curvature, seed
        two_sided = bool(getattr(base_config(model), "is_encoder_decoder", False))
        self.recorders = [
            _Recorder(self, layer, _role(layer.name) if two_sided else "encoder")
            for layer in layers
        ]
        self.targets = find_targets(layers, variant)
        self.gradients = {
            target.key: torch.zeros_like(target.parameter, dtype=torch.float64)
            for target in self.targets
        }
        self.positions = self.count = self.batches = 0
        # Set while the gradients of drawn labels flow.
        self.summing = False
        self.thread = threading.get_ident()
        self.tokens: dict[str, _Tokens] = {}
        self.last_input: tuple[torch.Tensor, int, _Recorder] | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        try:
            with finished():
                for recorder in self.recorders if self.curvature else ():
                    handles += recorder.hook()
            yield
        finally:
            with finished():
                for handle in handles:
                    handle.remove()

    def run(self, model: nn.Module, batch: Batch) -> None:
        """One batch, in :func:`ucan_fast.evaluation.slices`; an empty one is none."""
        if not batch.groups.numel():
            return
        self.batches += 1
        true, labels = scored(batch, self.group)
        anywhere, _ = scored(_ungrouped(batch, self.group), self.group)
        tokens = {"encoder": batch.groups == self.group}
        if batch.decoder_groups is not None:
            tokens["decoder"] = batch.decoder_groups == self.group
        member = torch.stack([member.any(1) for member in tokens.values()]).any(0)
        wanted = true.any(1) | (member & anywhere.any(1))
        self.count += sum(int(member[wanted].sum()) for member in tokens.values())
        if not self.curvature:
            wanted = true.any(1)
        rows = wanted.nonzero().squeeze(1)
        for inputs, taken, chosen in slices(model, batch, rows, true.shape):
            self.tokens = {
                role: _Tokens.of(member[taken] & chosen) for role, member in tokens.items()
            }
            at = (true[taken] & chosen, anywhere[taken] & chosen, labels[taken])
            self._slice(model, inputs, *at, batch.where)

    def _slice(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        true: torch.Tensor,
        anywhere: torch.Tensor,
        labels: torch.Tensor,
        where: str,
    ) -> None:
        self.last_input = None
        for recorder in self.recorders:
            recorder.calls = 0
        with torch.enable_grad():
            logits = token_logits(model, inputs, true.shape)
            uses = [tensor for target in self.targets for tensor in target.parameters]
            if true.any():
                self.positions += int(true.sum())
                scored, wanted = logits[true], labels[true]
                check_labels(scored, wanted, where, IGNORED_LABELS)
                loss = _summed_nll(scored, wanted)
                self._add_gradients(gradients(loss, uses, keep=self.curvature))
            if self.curvature:
                soft = softened(logits[anywhere])
                drawn = draw_labels(soft.detach(), row_uniforms(inputs, anywhere, self.seed))
                self._agree_on_inputs()
                self.summing = True
                try:
                    gradients(_summed_nll(soft, drawn), uses)
                finally:
                    self.summing = False

    def _add_gradients(self, found: list[torch.Tensor | None]) -> None:
        left = iter(found)
        for target in self.targets:
            for _ in target.parameters:
                gradient = next(left)
                if gradient is not None:
                    self.gradients[target.key] += gradient

    def _agree_on_inputs(self) -> None:
        """A layer that was called more or less often than the owner of its C_x gets its own."""
        for recorder in self.recorders:
            if recorder.calls != recorder.owner.calls:
                recorder.split()

    def finish(self, group: str) -> InfluenceFactors:
        if not self.batches:
            raise UcanError(f"there was no {group} batch with a token; nothing was recorded.")
        factors = InfluenceFactors(
            {key: total.cpu() for key, total in self.gradients.items()},
            float(self.positions),
            float(self.count),
            variant=self.variant,
            seed=self.seed,
        )
        if self.curvature:
            for recorder in self.recorders:
                factors.layers[recorder.layer.name] = recorder.finish()
        factors.check_finite()
        if not self.positions:
            raise UcanError(
                f"no {group} position is scored: a {group} token needs a token before it and, "
                "where there are labels, a label other than -100."
            )
        idle = [r.layer.name for r in self.recorders if self.curvature and not r.tokens]
        if idle:
            raise UcanError(
                f"no gradient of a {group} token reached {idle[0]}"
                f"{f' ({len(idle)} such layers)' if idle[1:] else ''}: it was never called with "
                "its adapter, runs without gradients, or saw no such token."
            )
        return factors


@dataclass
class _Tokens:
    """The tokens of a slice: their shape, which of them are in the group, and how many."""

    shape: tuple[int, ...]
    index: torch.Tensor | None  # None: all
    count: int

    @classmethod
    def of(cls, member: torch.Tensor) -> _Tokens:
        index = member.reshape(-1).nonzero().squeeze(1)
        everything = index.numel() == member.numel()
        return cls(tuple(member.shape), None if everything else index, index.numel())

    def rows(self, v: torch.Tensor) -> torch.Tensor:
        """The group's rows of ``[..., n]``."""
        flat = v.reshape(-1, v.shape[-1])
        return flat if self.index is None else flat[self.index.to(v.device)]


class _Recorder:
    """The sums of one layer."""

    def __init__(self, pass_: _Pass, layer: LoraLayer, role: str) -> None:
        self.pass_, self.layer, self.role = pass_, layer, role
        self.inside = False
        # What the layer was called with, as long as it runs.
        self.given: torch.Tensor | None = None
        self.calls = 0
        self.tokens = 0
        self.owner: _Recorder = self
        (r, k), n = layer.a.shape, layer.b.shape[0]
        dtype = torch.promote_types(layer.a.dtype, torch.float32)
        square = (lambda m: (m,)) if pass_.variant == "diagonal" else (lambda m: (m, m))
        shapes = {"c_x": square(k), "s_h": square(n), "s_z": (r, r), "c_z": (r, r)}
        self._shapes = {which: shapes[which] for which in _wanted(pass_.variant)}
        # Made when they are first needed: most C_x belong to another layer.
        self.sums: dict[str, torch.Tensor] = {}
        self._new = lambda which: torch.zeros(shapes[which], dtype=dtype, device=layer.a.device)
        self._seen = False

    def hook(self) -> list[torch.utils.hooks.RemovableHandle]:
        module = self.layer.module
        # Hooks on lora_A and lora_B also make an accelerated layer run PEFT's own forward.
        handles = [
            module.register_forward_pre_hook(self._before),
            module.lora_B[self.layer.adapter].register_forward_hook(self._after_b),
            module.register_forward_hook(self._after),
        ]
        if "c_x" in self._shapes:
            handles.append(self.layer.a_module.register_forward_hook(self._after_a))
        return handles

    def listens(self) -> bool:
        """Whether this call counts: not other threads', and none that a backward pass repeats."""
        return threading.get_ident() == self.pass_.thread and not is_recompute()

    def split(self) -> None:
        """Stop sharing C_x: from here on it may differ from the owner's."""
        if self.owner is not self:
            if "c_x" in self.owner.sums:
                self.sums["c_x"] = self.owner.sums["c_x"].clone()
            self.owner = self

    def finish(self) -> LayerFactors:
        sums = {which: self._sum(which).cpu() for which in self._shapes if which != "c_x"}
        owner = self.owner.layer.name if "c_x" in self._shapes else self.layer.name
        if "c_x" in self._shapes and self.owner is self:
            sums["c_x"] = self._sum("c_x").cpu()
        return LayerFactors(float(self.tokens), owner, **sums)

    def _sum(self, which: str) -> torch.Tensor:
        if which not in self.sums:
            self.sums[which] = self._new(which)
        return self.sums[which]

    def _before(self, _module: nn.Module, args: tuple) -> None:
        if self.listens():
            self.inside, self.given = True, args[0] if args else None

    def _after(self, _module: nn.Module, _args: tuple, _y: torch.Tensor) -> None:
        if self.listens():
            self.inside, self.given = False, None

    # lora_A and lora_B may be tied to other layers as modules; their calls are theirs.
    def _after_a(self, _module: nn.Module, args: tuple, z: torch.Tensor) -> None:
        if not (self.inside and self.listens()):
            return
        x, tokens = args[0], self._tokens_of(z)
        self._find_owner(x)
        self.calls += 1
        if z.requires_grad:
            z.register_hook(lambda g: self._add_a(x, g, tokens))

    def _after_b(self, _module: nn.Module, args: tuple, y: torch.Tensor) -> None:
        if self.inside and self.listens() and y.requires_grad:
            z, tokens = args[0].detach(), self._tokens_of(y)
            y.register_hook(lambda h: self._add_b(z, h, tokens))

    # Both at the time of the gradient, which comes once, however often a forward is run again.
    @torch.no_grad()
    def _add_a(self, x: torch.Tensor, g_z: torch.Tensor, tokens: _Tokens) -> None:
        if self.pass_.summing:
            if self.owner is self:
                self._add("c_x", x, tokens)
            self._add("s_z", g_z, tokens)

    @torch.no_grad()
    def _add_b(self, z: torch.Tensor, h: torch.Tensor, tokens: _Tokens) -> None:
        if self.pass_.summing:
            self.tokens += tokens.count
            self._add("c_z", z, tokens)
            self._add("s_h", h, tokens)

    def _add(self, which: str, v: torch.Tensor, tokens: _Tokens) -> None:
        total = self._sum(which)
        rows = tokens.rows(v).to(total.dtype)
        if total.dim() == 1:
            total += (rows * rows).sum(0)
        else:
            total.addmm_(rows.T, rows)

    def _find_owner(self, x: torch.Tensor) -> None:
        """Share C_x with the first layer that read this very tensor."""
        # PEFT casts to the adapter's dtype in every layer anew: the same numbers each time.
        cast = self.given is not None and self.given.dtype != x.dtype
        read = self.given if cast else x
        version = -1 if read.is_inference() else read._version
        last = self.pass_.last_input
        same = (
            last is not None
            and last[0] is read
            and last[1] == (version, x.dtype)
            and version >= 0
            and last[2].role == self.role
        )
        if not same:
            self.pass_.last_input = (read, (version, x.dtype), self)
        found = last[2] if same else self
        # Who was not called before would take over what its owner has of others' tokens.
        if not self._seen and "c_x" not in found.sums:
            self.owner = found
        elif found is not self.owner:
            self.split()
        self._seen = True

    def _tokens_of(self, h: torch.Tensor) -> _Tokens:
        tokens, shape = self.pass_.tokens[self.role], tuple(h.shape[:-1])
        if shape not in (tokens.shape, (math.prod(tokens.shape),)):
            raise UcanError(
                f"{self.layer.name} sees tokens of shape {shape}, but the batch's are "
                f"{tokens.shape} ({self.role} tokens); its neurons cannot be matched with token "
                "groups. Leave this module out of the adapter's target_modules."
            )
        return tokens


def row_uniforms(inputs: Mapping[str, Any], positions: torch.Tensor, seed: int) -> torch.Tensor:
    """A number in [0, 1) for every scored position, fp64 ``[P]``, in the order of the mask.

    It depends on the seed, the tokens of its own sequence and its place among the scored ones:
    not on the batch, nor on padding.
    """
    encoder = _own_tokens(inputs, "input_ids", "attention_mask")
    decoder = _own_tokens(inputs, "decoder_input_ids", "decoder_attention_mask")
    found = []
    for row, count in enumerate(positions.sum(1).tolist()):
        digest = hashlib.blake2b(str(seed).encode(), digest_size=8)
        for tokens in (encoder, decoder):
            if tokens is not None:
                digest.update(tokens(row).contiguous().view(torch.uint8).numpy().tobytes())
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little") >> 1)
        found.append(torch.rand(count, generator=generator, dtype=torch.float64, device="cpu"))
    return torch.cat(found).to(positions.device)


def softened(logits: torch.Tensor) -> torch.Tensor:
    """Logits ``[P, V]`` with the best of a row lowered until it is no likelier than all others.

    A row whose best label has at most half of the probability stays as it is, bit by bit; in
    another the others keep their shares among themselves. (Ours; not in the paper.) The curvature
    p (1 - p) of a label that is known by heart is next to nothing at the point where it is
    measured and grows e-fold with every nat that a step takes off its margin: by it alone a step
    could go anywhere. Here it is what the step would meet when the margin is gone, an upper bound.
    """
    if logits.shape[1] < 2:
        return logits
    with torch.no_grad():
        best = logits.argmax(1, keepdim=True)
        margins = []
        step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
        for part, at in zip(logits.split(step), best.split(step), strict=True):
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            others = wide.scatter(1, at, -math.inf).logsumexp(1, keepdim=True)
            margins.append(wide.gather(1, at) - others)
        # Where all others are masked (-inf, or the dtype's least) there is nothing to lower it to.
        margin = torch.cat(margins)
        margin = margin.clamp_min(0).masked_fill(margin > _MASKED, 0)
    wide = logits.to(margin.dtype)
    return wide.scatter_add(1, best, -margin)


def draw_labels(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """One label per row of logits ``[P, V]``, by inversion of the cumulative probabilities."""
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    drawn = []
    for part, u in zip(logits.split(step), uniforms.split(step), strict=True):
        # MPS has no fp64; everything else does.
        dtype = torch.float32 if part.device.type == "mps" else torch.float64
        total = part.to(dtype).softmax(-1).cumsum(-1)
        wanted = (u.to(dtype).unsqueeze(1) * total[:, -1:]).contiguous()
        drawn.append(torch.searchsorted(total, wanted, right=True).squeeze(1))
    return torch.cat(drawn).clamp_max(logits.shape[1] - 1)


def _own_tokens(inputs: Mapping[str, Any], key: str, mask_key: str):
    """Row -> its attended tokens on the CPU, or None where there is no such input."""
    tokens, mask = inputs.get(key), inputs.get(mask_key)
    if tokens is None:
        if key == "decoder_input_ids":
            tokens, mask = inputs.get("labels"), None
        else:
            tokens = inputs.get("inputs_embeds")
    if tokens is None:
        return None
    tokens = tokens.detach().cpu()
    tokens = tokens.to(torch.float32 if tokens.is_floating_point() else torch.int64)
    mask = None if mask is None else mask.cpu().bool()
    return lambda row: tokens[row] if mask is None else tokens[row][mask[row]]


def _ungrouped(batch: Batch, group: int) -> Batch:
    """The same with every attended token in the group, ignored ones too."""
    mask = batch.inputs.get("attention_mask")
    groups = torch.full_like(batch.groups, group)
    if mask is not None:
        groups = groups.masked_fill(~mask.bool(), IGNORED)
    decoder = batch.decoder_groups
    if decoder is not None:
        mask = batch.inputs.get("decoder_attention_mask")
        decoder = torch.full_like(decoder, group)
        if mask is not None:
            decoder = decoder.masked_fill(~mask.bool(), IGNORED)
    return dataclasses.replace(batch, groups=groups, decoder_groups=decoder)


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Refuse base layers that would swallow gradients without a word.

    bitsandbytes packs 4-bit weights anew for CPUs with AVX512-BF16 in the first forward without
    gradients; the product with a packed weight has no backward.
    """

    def refuse(name: str):
        def hook(_module: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], torch.Tensor) and args[0].requires_grad:
                raise UcanError(
                    f"{name}: bitsandbytes packed its 4-bit weight for inference on the CPU, and "
                    "no gradient passes through it any more. Load the base model again, and set "
                    "support_avx512bf16_for_cpu = False on its Linear4bit layers before they are "
                    "first run."
                )

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            state = getattr(module._parameters.get("weight"), "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                handles.append(module.register_forward_pre_hook(refuse(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _summed_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # Not metrics.token_nll: a model in fp64 keeps its precision.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, labels, reduction="sum")


def gradients(
    loss: torch.Tensor, uses: list[torch.Tensor], keep: bool = False
) -> list[torch.Tensor | None]:
    """Of the loss by ``uses``, None where it does not depend on one; no ``.grad`` is written.

    Raises:
        UcanError: nothing can be differentiated: reentrant checkpoints, or a model that runs
            without gradients.
    """
    try:
        return list(torch.autograd.grad(loss, uses, retain_graph=keep, allow_unused=True))
    except RuntimeError as error:
        if "checkpoint" in str(error).lower():
            raise UcanError(
                "the model checkpoints activations in the reentrant way, which cannot be "
                "differentiated piece by piece; use use_reentrant=False or switch it off."
            ) from error
        if "does not require grad" in str(error):
            raise UcanError(
                "the loss does not depend on the adapter: the model runs without gradients "
                "(no_grad or inference mode inside), or no adapted layer is used."
            ) from error
        raise


@contextlib.contextmanager
def trainable(model: nn.Module, weights: Iterable[torch.Tensor]) -> Iterator[None]:
    """Only these require gradients; every flag comes back, and no ``.grad`` is written."""
    wanted = {id(tensor) for tensor in weights}
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, flag in before:
            if flag != (id(parameter) in wanted):
                parameter.requires_grad_(not flag)
        yield
    except RuntimeError as error:
        if "inference tensor" in str(error).lower():
            raise UcanError(
                "the model was made in torch.inference_mode, where nothing can be differentiated; "
                "load it outside."
            ) from error
        raise
    finally:
        with finished():
            for parameter, flag in before:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)
