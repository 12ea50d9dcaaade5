"""The recommender and the data of ``examples/movielens.py``, with random weights.

What is timed here does not depend on the values of the weights, so nothing is trained.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import LlamaConfig

from ucan_fast import UcanError, recsys

from ..measure import ROOT
from .models import Batch, Unavailable, cache_folder, on_device, random_base, with_adapter

NAME = "demo Llama"


@dataclass(frozen=True)
class Demo:
    """The demo's data and recipe (:class:`Data` and :class:`Recipe` of the example)."""

    recipe: Any
    data: Any

    def model(self, device: torch.device) -> PeftModel:
        """4 blocks of width 128, LoRA r = 16 on all projections."""
        recipe = self.recipe
        config = LlamaConfig(
            vocab_size=self.data.vocabulary.size,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=2 * recipe.max_length,
            pad_token_id=self.data.vocabulary.pad,
            bos_token_id=self.data.vocabulary.bos,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
        return with_adapter(random_base(config, device), recipe.lora_rank)

    def everything(self, device: torch.device) -> list[Batch]:
        """All sequences that the adapter was tuned on, as retain tokens."""
        return self._batches(self.data.tuned_users, device)

    def of_users(
        self, users: np.ndarray, device: torch.device, *, forget: bool, batch_size: int = 0
    ) -> list[Batch]:
        """Sequences of these users, every item in one group."""
        rows = np.isin(self.data.train.user, users) if forget else None
        return self._batches(users, device, forget=rows, batch_size=batch_size)

    def _batches(
        self,
        users: np.ndarray,
        device: torch.device,
        *,
        forget: np.ndarray | None = None,
        batch_size: int = 0,
    ) -> list[Batch]:
        batches = recsys.sequence_batches(
            self.data.train,
            vocabulary=self.data.vocabulary,
            users=users,
            forget=forget,
            batch_size=batch_size or self.recipe.batch_size,
            max_length=self.recipe.max_length,
            sort_by_length=True,
        )
        return on_device(batches, device)


def load_demo() -> Demo:
    """ml-100k as the example prepares it.

    Raises:
        Unavailable: the data cannot be had, or the example not be imported.
    """
    found = _found()
    if isinstance(found, str):
        raise Unavailable(f"ml-100k as in examples/movielens.py: {found}")
    return found


@functools.cache
def _found() -> Demo | str:
    # The demo, or why there is none: asked once, since two groups need it and a fetch can be slow.
    try:
        movielens = example()
        recipe = movielens.Recipe()
        return Demo(recipe, movielens.load_data(recipe, None, cache_folder()))
    except (UcanError, ImportError) as error:
        return str(error)


@functools.cache
def example() -> ModuleType:
    """``examples/movielens.py``, which is no package, as a module."""
    name = "ucan_fast_movielens_example"
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "movielens.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
