"""Models and adapters from files: what is damaged, missing or does not fit is refused by name."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from .errors import UcanError

BASE_FILES = "its config.json or a file of its weights"
ADAPTER_FILES = "its adapter_config.json or the file of its weights"
# PEFT's initialisations that leave the base as it is; all others take the adapter's first values
# out of the base weights.
_INIT_ASIDE = (True, False, None, "gaussian", "eva", "orthogonal")
# What decides which values those were.
_INIT_FIELDS = (
    *("init_lora_weights", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)


@contextlib.contextmanager
def refused_as(what: str, files: str) -> Iterator[None]:
    """Every failure in the with block as a refusal: ``cannot load {what}: reason``.

    Args:
        files: which of its files may be at fault where the failure itself does not say so.

    Raises:
        UcanError: instead of anything but a UcanError or an interrupt.
    """
    try:
        yield
    except UcanError:
        raise
    except Exception as error:
        # Damaged files fail in as many ways as there are parsers: struct.error, EOFError,
        # UnpicklingError, re.error, AttributeError of null where a table should be, ...
        raise UcanError(f"cannot load {what}: {_reason(error, files)}") from error


def _reason(error: Exception, files: str) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "there is not enough memory."
    if isinstance(error, re.error):
        return f"{error.pattern!r} in {files} is no regular expression: {text}."
    # These are written for readers; a KeyError's text is but the key.
    written = isinstance(error, (OSError, ValueError, RuntimeError, ImportError))
    if written and not isinstance(error, RecursionError) and text:
        return text
    # The advice of torch.load is to load it all the same, which runs what is in the file.
    text = "it holds more than tensors" if isinstance(error, UnpicklingError) else text[:300]
    return (
        f"{files} is damaged or holds what does not belong there "
        f"({type(error).__name__}: {text or 'no more is known'})."
    )


def check_base(loading: Mapping[str, Any], base: str) -> None:
    """Refuse a base without some of its weights, which transformers fills with random values.

    Tied weights, which no file holds twice, are not among the missing ones.

    Args:
        loading: what ``from_pretrained(..., output_loading_info=True)`` returned of it, which
            names other shapes only with ``ignore_mismatched_sizes=True``.

    Raises:
        UcanError: weights are missing, or of another shape.
    """
    mismatched = sorted((name, tuple(a), tuple(b)) for name, a, b in loading["mismatched_keys"])
    if mismatched:
        name, found, wanted = mismatched[0]
        raise UcanError(
            f"cannot load the base model {base}: by its config.json {name} has the shape {wanted}, "
            f"in its file {found}; give the config.json that belongs to the weights."
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UcanError(
            f"cannot load the base model {base}: it has no weights for {_first(missing)}; give the "
            "whole model."
        )


def check_loaded(loaded: Any, folder: str | os.PathLike) -> None:
    """Refuse an adapter that fits the model only in part, of which PEFT merely warns.

    Args:
        loaded: what PEFT's ``load_adapter`` returned.

    Raises:
        UcanError: weights are missing from the adapter, or have no place in the model.
    """
    for names, problem in (
        (loaded.missing_keys, "it has no weights for"),
        (loaded.unexpected_keys, "the base model has no place for its"),
    ):
        if names:
            raise UcanError(f"cannot load the adapter {folder}: {problem} {_first(names)}.")


def load_beside(model: nn.Module, adapter: str, folder: str | os.PathLike, name: str) -> None:
    """Load another adapter into a model that carries one; nothing of the base changes.

    PEFT would initialise the second adapter as its configuration says, and PiSSA, OLoRA and the
    like then take its first values out of the base weights once more. The values are in the file,
    so it is initialised like any other; layers are not replicated a second time either.

    Args:
        adapter: the one that the model carries.
        name: of the new one. It is not active.

    Raises:
        UcanError: the adapter cannot be loaded, fits only in part, or needs another base than the
            first: other replicated layers, another initialisation from the base weights, or
            values of the base (biases, embeddings) that PEFT has but once per model. An adapter of
            that name may be left in the model.
    """
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    with refused_as(f"the adapter {folder}", ADAPTER_FILES):
        config = PeftConfig.from_pretrained(str(folder))
        _check_same_base(model.peft_config[adapter], config, folder)
        _check_base_values(model, load_peft_weights(str(folder), device="cpu"), folder)
        config.init_lora_weights = True
        config.layer_replication = None
        # Its biases are the model's: see _check_base_values. PEFT takes one adapter with biases.
        config.bias = "none"
        config.inference_mode = True
        # Fresh weights are drawn before those of the file replace them.
        with torch.random.fork_rng(devices=[]):
            model.add_adapter(name, config)
        loaded = model.load_adapter(str(folder), adapter_name=name)
    check_loaded(loaded, folder)


def _check_same_base(ours: Any, theirs: Any, folder: str | os.PathLike) -> None:
    for fields, matters in (
        (("layer_replication",), True),
        (
            _INIT_FIELDS,
            any(getattr(c, "init_lora_weights", True) not in _INIT_ASIDE for c in (ours, theirs)),
        ),
    ):
        for field in fields if matters else ():
            one, two = (_plain(getattr(config, field, None)) for config in (ours, theirs))
            if one != two:
                raise UcanError(
                    f"cannot load the adapter {folder} beside the original: its {field} is {two}, "
                    f"the original's {one}, so the two stand on different base weights and cannot "
                    "be compared in one model."
                )


def _check_base_values(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], folder: str | os.PathLike
) -> None:
    # A tensor under the very name of one of the model's is no adapter's: bias="all" or
    # "lora_only", or embeddings that were resized. PEFT writes it over the base's.
    base = dict(model.named_parameters(remove_duplicate=False))
    for name, value in tensors.items():
        if name not in base:
            continue
        held = base[name]
        if held.shape != value.shape or not torch.equal(
            held.cpu(), value.to(held.device).to(held.dtype).cpu()
        ):
            raise UcanError(
                f"cannot load the adapter {folder} beside the original: its values of the base's "
                f"{name} are not those of the original adapter, and a model has room for one."
            )


def _plain(value: Any) -> Any:
    """A setting, comparable whatever container it came in."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")
