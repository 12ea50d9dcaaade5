"""Reads a PEFT model: its LoRA layers, what can be fused and measured, and its fingerprint.

The only file that knows PEFT's attribute names.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import json
import weakref
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import layer as lora_layer
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .errors import UcanError
from .transfers import to_cpu

_PLAIN = (nn.Parameter, torch.Tensor)
_LINEAR_FORWARD = nn.Linear.forward
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# These hold lora_A and lora_B, but no y = x Aᵀ Bᵀ path whose inputs could be measured.
_NO_LINEAR_PATH = tuple(
    getattr(lora_layer, name)
    for name in ("Embedding", "_ConvNd", "MultiheadAttention", "ParamWrapper")
    if hasattr(lora_layer, name)
)
# By name: to look up the class of a library that is not in use would import that library.
_FUSABLE = (
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
    "peft.tuners.lora.gptq.GPTQLoraLinear",
)
_OTHER_BASES = {
    "AqlmLoraLinear": "AQLM",
    "AwqLoraLinear": "AWQ",
    "EetqLoraLinear": "EETQ",
    "HqqLoraLinear": "HQQ",
    "IncLoraLinear": "Intel Neural Compressor",
    "LoraParallelLinear": "Megatron tensor parallel",
    "TeLinear": "Transformer Engine",
    "TorchaoLoraLinear": "torchao",
}


# An adapter whose values are larger is hashed again each time: comparing needs a copy of them. The
# copy of a small one stays, which spares the next request its hash; others end with their one_walk.
_REMEMBERED_BYTES = 1 << 28
_KEPT_BYTES = 1 << 24
# Of an adapter on a GPU the copy stays there: to compare takes microseconds, to send the values to
# the CPU and hash them took an H100 machine two milliseconds a MiB.
_KEPT_ON_DEVICE_BYTES = 1 << 28

_Named = list[tuple[str, nn.Module]]


@dataclass(frozen=True)
class LoraLayer:
    """One LoRA layer of one adapter: ``y = base(x) + s (x Aᵀ) Bᵀ``."""

    name: str
    module: nn.Module
    adapter: str

    @property
    def a_module(self) -> nn.Module:
        """The module that computes ``z = x Aᵀ``."""
        return self.module._modules["lora_A"]._modules[self.adapter]

    @property
    def a(self) -> nn.Parameter:
        """A, ``[r, K]``."""
        return _weight(self.a_module)

    @property
    def b(self) -> nn.Parameter:
        """B, ``[N, r]``."""
        return _weight(self.module._modules["lora_B"]._modules[self.adapter])

    @property
    def scaling(self) -> float:
        """s as it is now (PEFT changes it at run time), never recomputed from alpha / r."""
        return self.module.scaling[self.adapter]


@dataclass(frozen=True)
class _Walk:
    model: nn.Module
    modules: _Named
    lora: _Named
    # What find_layers answered, per adapter. Their weights are read whenever they are asked for.
    layers: dict[str, list[LoraLayer]]
    # As in _kept.
    hashed: dict[str, tuple[bytes, str]]
    # What fingerprint says of values, per adapter, and all that it depends on.
    labels: dict[str, tuple[list, list[str]]]


# What fingerprint hashed last, per model and adapter, and the digest.
_kept: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[bytes, str]]] = (
    weakref.WeakKeyDictionary()
)

# The same for adapters on a GPU, one for each model: adapter, names and shapes, values by dtype,
# digest.
_kept_on_device: weakref.WeakKeyDictionary[nn.Module, tuple[str, str, list[torch.Tensor], str]] = (
    weakref.WeakKeyDictionary()
)

# The innermost one_walk.
_walked: contextvars.ContextVar[_Walk | None] = contextvars.ContextVar("walked", default=None)


@contextlib.contextmanager
def one_walk(model: nn.Module) -> Iterator[None]:
    """Within the with block the model's modules are listed once.

    Every question below starts from that list, and one deletion request asks some twenty of them:
    on small models the walks would cost more than the forward pass. Inside, no module may be added
    or replaced; weights' values, active adapters and classes may change.
    """
    model = unwrap(model)
    if _walk_of(model) is not None:
        yield
        return
    found = _walk(model)
    token = _walked.set(_Walk(model, found, _with_lora(found), {}, {}, {}))
    try:
        yield
    finally:
        _walked.reset(token)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DDP and ``DataParallel`` wrappers."""
    while True:
        # Not hasattr: PeftModel forwards unknown attributes to the model inside.
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def is_lora_layer(module: nn.Module) -> bool:
    """Whether PEFT put LoRA weights into this module."""
    return isinstance(module, lora.LoraLayer)


def tuner_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module that carries LoRA weights of any adapter, by name."""
    model = unwrap(model)
    known = _walk_of(model)
    return known.lora if known is not None else _with_lora(_walk(model))


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` gives, without wrappers around the model."""
    model = unwrap(model)
    known = _walk_of(model)
    return known.modules if known is not None else _walk(model)


def resolve_adapter(model: nn.Module, adapter: str | None = None) -> str:
    """The one adapter that a call is about.

    Raises:
        UcanError: the model has no LoRA layer, the adapter is unknown, not active, disabled or
            merged, or several are active and none was named.
    """
    layers = tuner_layers(model)
    if not layers:
        raise UcanError(
            f"{type(unwrap(model)).__name__} has no LoRA layer; wrap it with peft.get_peft_model "
            "or load an adapter with peft.PeftModel.from_pretrained first."
        )
    known = sorted({key for _, m in layers for key in _adapters_of(m)})
    if not known:
        raise UcanError("the model's LoRA layers hold no adapter; load one first.")
    active = sorted({key for _, m in layers for key in m.active_adapters if key in known})
    if adapter is None:
        if len(active) != 1:
            raise UcanError(
                f"{len(active)} adapters are active ({', '.join(active) or 'none'}); say which one "
                f"is meant with adapter=. Known: {', '.join(known)}."
            )
        adapter = active[0]
    elif adapter not in known:
        raise UcanError(f"there is no adapter {adapter!r}; known: {', '.join(known)}.")
    elif adapter not in active:
        raise UcanError(
            f"adapter {adapter!r} is not active (active: {', '.join(active) or 'none'}); call "
            "model.set_adapter first: only what runs can be measured."
        )
    for name, module in layers:
        if module.merged:
            raise UcanError(
                f"{name}: adapter {', '.join(module.merged_adapters)} is merged into the base "
                "weights; call model.unmerge_adapter() first."
            )
        if module.disable_adapters:
            raise UcanError(f"{name}: adapters are disabled; enable them first.")
    return adapter


def find_layers(model: nn.Module, adapter: str) -> list[LoraLayer]:
    """The adapter's layers, in module order.

    Raises:
        UcanError: a layer has no ``x Aᵀ Bᵀ`` path whose neurons could be measured (embedding,
            convolution, fused attention, expert weights), is sharded over processes, or is not
            on a real device. The layer is named.
    """
    known = _walk_of(unwrap(model))
    if known is None:
        with one_walk(model):
            return find_layers(model, adapter)
    if adapter not in known.layers:
        known.layers[adapter] = _find_layers(known, adapter)
    return list(known.layers[adapter])


def _find_layers(walk: _Walk, adapter: str) -> list[LoraLayer]:
    layers = []
    sharded = _has_fsdp(module for _, module in walk.modules)
    for name, module in walk.lora:
        if adapter not in _adapters_of(module):
            continue
        if sharded:
            raise UcanError(
                f"{name}: weights are sharded by FSDP, so no process holds a whole neuron; "
                "load the model unsharded for this."
            )
        reason = unmeasurable(module, adapter)
        if reason:
            raise UcanError(
                f"{name} ({type(module).__name__}): {reason}; activation statistics have no "
                "meaning there. Leave this module out of the adapter's target_modules."
            )
        layers.append(LoraLayer(name, module, adapter))
    return layers


def unmeasurable(module: nn.Module, adapter: str) -> str | None:
    """Why neuron statistics cannot be taken on this layer, or None."""
    if isinstance(module, _NO_LINEAR_PATH) or adapter not in module._modules["lora_A"]._modules:
        return "it is not a linear LoRA layer"
    if type(module).__name__ == "LoraParallelLinear":
        return "Megatron tensor-parallel layers are not supported"
    if _is_tensor_parallel(module):
        return "its base layer is tensor parallel"
    for which in ("lora_A", "lora_B"):
        if module._modules[which]._modules[adapter]._parameters.get("weight") is None:
            return (
                f"its {which} weight is computed from others (parametrised), so writing to it "
                "changes nothing"
            )
    layer = LoraLayer("", module, adapter)
    for weight in (layer.a, layer.b):
        reason = _unusual_weight(weight)
        if reason:
            return reason
    return None


def unfusable(module: nn.Module) -> str | None:
    """Why the fused forward cannot replace PEFT's own on this layer, or None.

    States that may change from call to call (merged, disabled, dropout, hooks) are not asked
    here but by :func:`fusable_parts`.
    """
    # The exact classes: a subclass may change what forward means.
    cls = type(module)
    if f"{cls.__module__}.{cls.__qualname__}" not in _FUSABLE:
        kind = _OTHER_BASES.get(cls.__name__)
        return f"{cls.__name__}{f' ({kind})' if kind else ''} has its own forward"
    base = module.base_layer
    if base is not module.get_base_layer():
        return "another tuner is nested inside it"
    weight = getattr(base, "weight", None)
    # The base is only called, so how its weight is packed does not matter.
    reason = None if weight is None else _unusual_weight(weight, packed=_is_packed(module, weight))
    for weight in _adapter_weights(module):
        reason = reason or _unusual_weight(weight)
    if reason:
        return reason
    if _is_tensor_parallel(module):
        return "its base layer is tensor parallel"
    if module.lora_variant:
        names = sorted({type(v).__name__ for v in module.lora_variant.values()})
        return f"adapter variant {', '.join(names)}"
    return None


def is_weight_probe(layer: LoraLayer, x: torch.Tensor) -> bool:
    """Whether this call of lora_A only reads B A off, as DoRA does for its weight norm.

    PEFT sends an identity matrix through it; those are no tokens, even where there are just as
    many of them.
    """
    if layer.adapter not in layer.module.lora_variant:
        return False
    size = layer.a.shape[1]
    if tuple(x.shape) != (size, size):
        return False
    return torch.equal(x, torch.eye(size, dtype=x.dtype, device=x.device))


def sharded_by(model: nn.Module) -> str | None:
    """The wrapper that shards this model's weights (FSDP, ZeRO-3), or None."""
    if _has_fsdp(module for _, module in named_modules(model)):
        return "FSDP"
    if any(hasattr(p, "ds_id") for p in unwrap(model).parameters()):
        return "DeepSpeed ZeRO-3"
    return None


def fusable_parts(
    module: nn.Module, x: torch.Tensor, args: tuple, kwargs: dict
) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None, float]] | None:
    """``(adapter, A, B, bias of B, s)`` of every active adapter, or None for PEFT's own forward.

    Asked at every call, in training and generation for every layer: dictionaries are read
    directly, since attributes of an ``nn.Module`` cost ten times as much.
    """
    # Arguments: adapter_names, alora_offsets, or ones for the base layer.
    if args or kwargs or module.disable_adapters or module.merged or x.dtype not in _FLOATS:
        return None
    own = module.__dict__
    if not own.get("cast_input_dtype_enabled", True) or _has_any_global_hook() or x.is_meta:
        return None
    if _is_followed() or nn.Linear.forward is not _LINEAR_FORWARD:
        return None
    modules, variants, device = own["_modules"], own["lora_variant"], x.device
    all_a, all_b = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts = modules["lora_dropout"]._modules
    parts = []
    for adapter in module.active_adapters:
        if adapter not in all_a:
            continue
        a, b, dropout = all_a[adapter], all_b[adapter], dropouts[adapter]
        # A variant (DoRA), or lora_A or lora_B replaced or parametrised.
        if adapter in variants or type(a) is not nn.Linear or type(b) is not nn.Linear:
            return None
        if not _is_identity(dropout):
            return None
        if _is_observed(a) or _is_observed(b) or _is_observed(dropout):
            return None
        if a._parameters.get("bias") is not None:  # PEFT makes none
            return None
        weight_a, weight_b = a._parameters.get("weight"), b._parameters.get("weight")
        # One type test covers DTensor, and wrappers that took the parameter away. Plain tensors
        # come from torch.func.functional_call.
        if type(weight_a) not in _PLAIN or type(weight_b) not in _PLAIN:
            return None
        if weight_a.device != device or weight_b.device != device:
            return None
        if weight_a.dtype != weight_b.dtype:
            return None
        scaling = own["scaling"][adapter]
        if not isinstance(scaling, (int, float)):  # PEFT multiplies by tensors, too
            return None
        parts.append((adapter, weight_a, weight_b, b._parameters["bias"], float(scaling)))
    # Without an active adapter the forward is all PEFT's: there is nothing to fuse.
    return parts or None


def plain_linear(base: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias of a base layer that is nothing but ``nn.Linear``, else None."""
    if type(base) is not nn.Linear or _has_hooks(base):
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) not in _PLAIN or (bias is not None and type(bias) not in _PLAIN):
        return None
    return weight, bias


def gives_new_output(base: nn.Module) -> bool:
    """Whether what this base layer returns is a tensor that nobody else holds.

    Only said of ``nn.Linear`` itself: others may return views or keep their results, and so may
    whoever replaced its forward.
    """
    return (
        plain_linear(base) is not None
        and "forward" not in base.__dict__
        and nn.Linear.forward is _LINEAR_FORWARD
    )


def fingerprint(model: nn.Module, adapter: str) -> str:
    """SHA-256 over one adapter: names, values and scaling of its layers.

    Of the base only its configuration and the layers' shapes enter: a base that was trained on is
    not noticed. Values are hashed as fp32 (fp64 where they are), so the dtype an adapter is
    loaded in does not matter as long as its values survive it.

    The bytes of an adapter of at most 16 MiB (of 256 MiB within :func:`one_walk`) are compared with
    those that were hashed last, and hashed only where one of them differs: comparing is twenty
    times as fast. Of one on a GPU, of at most 256 MiB, that copy stays there until another is asked
    for.

    Raises:
        UcanError: a weight is on the meta device, where it has no value.
    """
    model = unwrap(model)
    layers = [(name, m) for name, m in tuner_layers(model) if adapter in _adapters_of(m)]
    named = [_weights_of(module, adapter) for _, module in layers]
    values = [weight for weights in named for _, weight in weights]
    labels = _labels(model, adapter, layers, named)
    # Taken out: what no longer fits leaves the GPU before anything new comes.
    last = _kept_on_device.pop(model, None)
    size = sum(value.nbytes for value in values)
    if size > _KEPT_ON_DEVICE_BYTES or not _on_one_gpu(values):
        return _digest(model, adapter, labels, values)
    # Which value lies where in the copies follows from the shapes and these.
    layout = "".join([*labels, *(str(value.dtype) for value in values), str(values[0].device)])
    copies = _by_dtype(values)
    if last is None or last[:2] != (adapter, layout) or not _same_bits(last[2], copies):
        del last
        last = adapter, layout, copies, _digest(model, adapter, labels, values)
    _kept_on_device[model] = last
    return last[3]


def _labels(
    model: nn.Module,
    adapter: str,
    layers: _Named,
    named: list[list[tuple[str, torch.Tensor]]],
) -> list[str]:
    """What is hashed before each value, and what after the last one."""
    known = _walk_of(model)
    memory = {} if known is None else known.labels
    identity = _base_identity(model)
    scalings = [(name, repr(float(module.scaling.get(adapter, 1.0)))) for name, module in layers]
    # All that the labels say, and whether each weight has a value.
    shapes = [[(key, w.shape, w.is_meta) for key, w in weights] for weights in named]
    says = [identity, scalings, shapes]
    if adapter in memory and memory[adapter][0] == says:
        return memory[adapter][1]
    text, labels = json.dumps(identity, sort_keys=True), []
    for (name, scaling), of_layer in zip(scalings, shapes, strict=True):
        text += f"{name}|{scaling}"
        for key, shape, is_meta in of_layer:
            if is_meta:
                raise UcanError(
                    f"{name} ({key}): its weights are on the meta device (offloaded); load the "
                    "adapter's values onto a real device first."
                )
            labels.append(f"{text}|{key}{tuple(shape)}")
            text = ""
    labels.append(text)
    memory[adapter] = says, labels
    return labels


def _digest(model: nn.Module, adapter: str, labels: list[str], weights: list[torch.Tensor]) -> str:
    # A label before each value, and one at the end.
    parts: list[Any] = []
    for label, value in zip(labels, to_cpu(weights, _wide), strict=False):
        parts += (label.encode(), value.contiguous().numpy())
    parts.append(labels[-1].encode())
    size = sum(value.nbytes for value in parts[1::2])
    known = _walk_of(model)
    if size <= _KEPT_BYTES:
        memory = _kept.setdefault(model, {})
    elif known is not None and size <= _REMEMBERED_BYTES:
        memory = known.hashed
    else:
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        return digest.hexdigest()
    content = b"".join(parts)
    last = memory.get(adapter)
    if last is None or last[0] != content:
        memory[adapter] = last = content, hashlib.sha256(content).hexdigest()
    return last[1]


def _on_one_gpu(values: list[torch.Tensor]) -> bool:
    return len({value.device for value in values}) == 1 and values[0].is_cuda


def _by_dtype(values: list[torch.Tensor]) -> list[torch.Tensor]:
    # Copies, side by side: one tensor for each dtype.
    kinds: dict[torch.dtype, list[torch.Tensor]] = {}
    for value in values:
        kinds.setdefault(value.dtype, []).append(value.detach().reshape(-1))
    return [torch.cat(alike) for alike in kinds.values()]


def _same_bits(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    # By bits: -0 equals 0, and NaN nothing, but neither is hashed so.
    pairs = zip(mine, theirs, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def remove_layers(model: nn.Module, names: Iterable[str]) -> None:
    """Put the base layers back where these LoRA layers stand.

    Args:
        names: as :func:`tuner_layers` gives them; every adapter in these layers is lost.
    """
    model = unwrap(model)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, model.get_submodule(name).get_base_layer())


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """Every weight that PEFT holds for one adapter's layers, by name; a shared one once.

    A and B, biases of B, DoRA magnitudes, and the matrices of adapted embeddings.
    """
    found, seen = {}, set()
    for name, module in tuner_layers(model):
        if adapter not in _adapters_of(module):
            continue
        for key, weight in _weights_of(module, adapter):
            if id(weight) not in seen:
                seen.add(id(weight))
                found[f"{name}.{key}"] = weight
    return found


@functools.cache
def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def active_context(model: nn.Module, adapter: str) -> str:
    """Fingerprints of the other active adapters, "" where there are none."""
    layers = [m for _, m in tuner_layers(model)]
    others = {
        key
        for m in layers
        for key in m.active_adapters
        if key != adapter and key in _adapters_of(m)
    }
    return " ".join(sorted(fingerprint(model, key) for key in others))


def untouched_parts(model: nn.Module, adapter: str) -> str:
    """What the adapter trained besides its LoRA matrices, in words; "" where there is nothing."""
    config = getattr(unwrap(model), "peft_config", {})
    config = config.get(adapter) if isinstance(config, dict) else None
    parts = []
    for key in ("modules_to_save", "trainable_token_indices"):
        value = getattr(config, key, None)
        if value:
            parts.append(f"{key}={value}")
    if getattr(config, "bias", "none") != "none":
        parts.append(f"bias={config.bias!r}")
    layers = [m for _, m in tuner_layers(model) if adapter in m._modules["lora_A"]._modules]
    if any(m._modules["lora_B"]._modules[adapter].bias is not None for m in layers):
        parts.append("lora_bias")
    if any(adapter in m._modules.get("lora_magnitude_vector", ()) for m in layers):
        parts.append("DoRA magnitudes")
    return ", ".join(parts)


def base_config(model: nn.Module) -> object | None:
    """The Hugging Face configuration of the base model, if it has one."""
    model = unwrap(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "config", None)


def base_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside the PEFT model (adapters still in it)."""
    model = unwrap(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def module_device(model: nn.Module) -> torch.device:
    """Where batches must go: the device of the first parameter."""
    parameter = next(unwrap(model).parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _with_lora(modules: _Named) -> _Named:
    # Asked once per class: LoraLayer is an abstract one, for which isinstance takes long.
    classes = {type(module) for _, module in modules}
    adapted = {cls for cls in classes if issubclass(cls, lora.LoraLayer)}
    return [(name, module) for name, module in modules if type(module) in adapted]


def _walk_of(model: nn.Module) -> _Walk | None:
    known = _walked.get()
    return known if known is not None and known.model is model else None


def _walk(model: nn.Module) -> _Named:
    # By a loop: torch's nested generators take twice as long.
    found, seen, left = [], set(), [("", model)]
    while left:
        name, module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append((name, module))
        start = f"{name}." if name else ""
        for key, child in reversed(module._modules.items()):
            if child is not None:
                left.append((start + key, child))
    return found


def _has_fsdp(modules: Iterable[nn.Module]) -> bool:
    kinds = {cls.__name__ for kind in {type(m) for m in modules} for cls in kind.__mro__}
    return not kinds.isdisjoint(("FullyShardedDataParallel", "FSDPModule"))


def _adapters_of(module: nn.Module) -> Collection[str]:
    # Read directly: attributes of an nn.Module cost ten times as much.
    linear, embedded = module._modules["lora_A"]._modules, module._modules.get("lora_embedding_A")
    return (*linear, *embedded) if embedded else linear


def _adapter_weights(module: nn.Module) -> list[torch.Tensor]:
    return [m.weight for d in (module.lora_A, module.lora_B) for m in d.values()]


def _weights_of(module: nn.Module, adapter: str) -> list[tuple[str, torch.Tensor]]:
    found = []
    holders = module._modules
    for attribute in ("lora_A", "lora_B", "lora_magnitude_vector"):
        if attribute in holders and adapter in holders[attribute]._modules:
            own = holders[attribute]._modules[adapter]
            # named_parameters, where there are modules inside, takes ten times as long.
            named = own.named_parameters() if own._modules else own._parameters.items()
            for key, weight in named:
                if weight is not None:
                    found.append((f"{attribute}.{key}", weight))
    for attribute in ("lora_embedding_A", "lora_embedding_B"):
        if attribute in holders and adapter in holders[attribute]:
            found.append((attribute, holders[attribute][adapter]))
    return found


def _weight(linear: nn.Module) -> torch.Tensor:
    # A parametrised weight is no parameter of that name, but computed when asked for.
    weight = linear._parameters.get("weight")
    return linear.weight if weight is None else weight


def _base_identity(model: nn.Module) -> dict:
    config = base_config(model)
    identity = {}
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "d_model"):
        value = getattr(config, key, None)
        if isinstance(value, (int, str)):
            identity[key] = value
    return identity


def _is_packed(module: nn.Module, weight: torch.Tensor) -> bool:
    """Whether this is the weight of a quantised base layer that may be fused."""
    # bitsandbytes' classes also reach plain lora.Linear, where the model does not say that it is
    # loaded in 4 or 8 bits.
    return type(module) is not lora.Linear or type(weight).__module__.startswith("bitsandbytes.")


def _is_tensor_parallel(module: nn.Module) -> bool:
    # Read directly: asking an nn.Module for what it lacks takes long.
    base = module
    while "base_layer" in base._modules:
        base = base._modules["base_layer"]
    own = base.__dict__
    return own.get("_hf_tp_plan") is not None or own.get("_hf_device_mesh") is not None


def _unusual_weight(weight: torch.Tensor, *, packed: bool = False) -> str | None:
    if hasattr(weight, "ds_id"):
        return "its weights are sharded (DeepSpeed ZeRO-3)"
    if weight.device.type == "meta":
        return "its weights are on the meta device (offloaded)"
    if packed:
        return None
    if type(weight) not in _PLAIN:
        return f"its weights are of type {type(weight).__name__}"
    if weight.dtype not in _FLOATS:
        return f"its weights are {weight.dtype}"
    return None


def _is_followed() -> bool:
    """Whether the call is traced into a graph by what knows only PyTorch's own operators.

    ``torch.jit.trace``, and ``torch.compile`` around or inside a ``torch.func`` transform or
    forward-mode AD. (Eagerly the operators themselves ask for the last two.)
    """
    if torch.compiler.is_compiling():
        return _is_transformed_while_traced()
    return torch.jit.is_tracing()


@torch.compiler.assume_constant_result
def _is_transformed_while_traced() -> bool:
    # Asked while the graph is made; it is made anew where these change.
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def _is_identity(dropout: nn.Module) -> bool:
    # By its own mode: for Monte Carlo dropout it alone is in training.
    if type(dropout) is nn.Dropout:
        return not dropout.training or dropout.p == 0.0
    return type(dropout) is nn.Identity


def _is_observed(module: nn.Module) -> bool:
    # Hooks, or a forward of its own on this one instance.
    return "forward" in module.__dict__ or _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_hf_hook" in module.__dict__
    )
