"""The base of the text recommender, whole or with its lower blocks run once and remembered.

On a GPU the adapter sits in all blocks of SmolLM2 and the model is what transformers loads. On two
cores that would take hours, so the reduced model has adapters in the last blocks only. What the
blocks below them (the trunk) make of a prompt can then never change: it is computed once and
kept. The head is cut to the tokens that can be an answer. Width, weights and the activations that
the adapters see are those of the whole model.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaModel,
    apply_rotary_pos_emb,
)

from ucan_fast.files import atomic_write

from ..shapes import PROJECTIONS

#: Recipes of adapters: which projections they are on.
RECIPES = {"q/v": ("q_proj", "v_proj"), "all": tuple(PROJECTIONS)}


class FrozenTrunk(nn.Module):
    """Embedding and lower blocks of a Llama; what comes out of them is remembered by prompt.

    Attributes:
        known: digest of a row's attended tokens -> hidden states ``[tokens, hidden]``, on the CPU.
    """

    def __init__(self, model: LlamaModel, blocks: int) -> None:
        super().__init__()
        self.body = copy.copy(model)
        # copy.copy shares the table of modules.
        self.body._modules = dict(model._modules)
        self.body.config = copy.copy(model.config)
        self.body.config.num_hidden_layers = blocks
        self.body.layers = model.layers[:blocks]
        self.body.norm = nn.Identity()
        self.known: dict[str, torch.Tensor] = {}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states ``[B, T, hidden]`` of tokens ``[B, T]``; zeros at padding."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.bool()
        # Ordinary tensors, also where the caller is in inference mode: they are used again.
        with torch.inference_mode(False), torch.no_grad():
            rows = [self._row(tokens[kept]) for tokens, kept in zip(input_ids, mask, strict=True)]
            hidden = rows[0].new_zeros(*input_ids.shape, rows[0].shape[-1])
            for out, kept, row in zip(hidden, mask, rows, strict=True):
                out[kept] = row
            return hidden.to(input_ids.device)

    def _row(self, tokens: torch.Tensor) -> torch.Tensor:
        # Each row alone: its bits do not depend on the batch in which it came first.
        key = hashlib.blake2b(tokens.cpu().numpy().tobytes(), digest_size=16).hexdigest()
        if key not in self.known:
            output = self.body(input_ids=tokens.clone().unsqueeze(0), use_cache=False)
            self.known[key] = output.last_hidden_state[0].cpu()
        return self.known[key]

    def save(self, path: Path) -> None:
        """Write all that is known to a safetensors file, whole or not at all."""
        atomic_write(path, lambda temporary: save_file(self.known, temporary))

    def load(self, path: Path) -> None:
        """Add what :meth:`save` wrote, if it is there."""
        if path.is_file():
            self.known |= load_file(path)


class OnTrunk(LlamaModel):
    """The upper blocks of a Llama, on a :class:`FrozenTrunk`."""

    trunk: FrozenTrunk

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        use_cache=None,
        last_rows: int | None = None,
        **options,
    ):
        """As LlamaModel's; there is no cache of keys and values.

        With ``last_rows`` only that many last positions come out: in the last block, where the
        others are but keys and values, the rest of their work is left out.
        """
        if inputs_embeds is None:
            inputs_embeds = self.trunk(input_ids, attention_mask)
        if last_rows is not None:
            return self._last_rows(inputs_embeds, attention_mask, last_rows)
        return super().forward(
            attention_mask=attention_mask, inputs_embeds=inputs_embeds, use_cache=False, **options
        )

    def _last_rows(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor, count: int
    ) -> BaseModelOutputWithPast:
        width = hidden.shape[1]
        seen = torch.ones(width, width, dtype=torch.bool, device=hidden.device)
        # Padding sees itself, so that no softmax is over nothing.
        mask = (seen.tril() & attention_mask.bool()[:, None, None]) | seen.tril().triu()
        turns = self.rotary_emb(hidden, torch.arange(width, device=hidden.device)[None])
        for block in self.layers[:-1]:
            hidden = block(hidden, attention_mask=mask, position_embeddings=turns, use_cache=False)
        hidden = _last_rows(self.layers[-1], hidden, mask, turns, count)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def _last_rows(
    block: LlamaDecoderLayer,
    hidden: torch.Tensor,
    mask: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor],
    count: int,
) -> torch.Tensor:
    """The block's output at the last positions, ``[B, count, hidden]``."""
    attention, normed = block.self_attn, block.input_layernorm(hidden)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query = heads(attention.q_proj(normed[:, -count:]))
    key, value = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
    cos, sin = turns
    # The function turns queries and keys at the same positions.
    query, _ = apply_rotary_pos_emb(query, query, cos[:, -count:], sin[:, -count:])
    key, _ = apply_rotary_pos_emb(key, key, cos, sin)
    found = nn.functional.scaled_dot_product_attention(
        query, key, value, mask[:, :, -count:], scale=attention.scaling, enable_gqa=True
    )
    hidden = hidden[:, -count:] + attention.o_proj(found.transpose(1, 2).flatten(2))
    return hidden + block.mlp(block.post_attention_layernorm(hidden))


def on_frozen_trunk(
    base: LlamaForCausalLM, blocks: int, answers: Sequence[int]
) -> LlamaForCausalLM:
    """The model as its last ``blocks`` blocks on a frozen trunk, with a head of few tokens.

    Args:
        base: is taken apart and must not be used any more.
        blocks: fewer than it has.
        answers: rows of the head that stay, so ``config.vocab_size`` is their number and labels
            are places in this list. Logits are as before at these tokens.
    """
    count = len(base.model.layers)
    if not 0 < blocks < count:
        raise ValueError(f"{blocks} of {count} blocks: some, but not all, must be left to adapt.")
    trunk = FrozenTrunk(base.model, count - blocks)
    base.config = config = copy.copy(base.config)
    config.num_hidden_layers = blocks
    config.vocab_size = base.vocab_size = len(answers)
    config.tie_word_embeddings = False
    body = base.model
    body.__class__ = OnTrunk
    body.config = config
    body.trunk = trunk
    body.layers = body.layers[count - blocks :]
    for index, block in enumerate(body.layers):
        block.self_attn.layer_idx = index
    head = nn.Linear(config.hidden_size, len(answers), bias=False)
    with torch.no_grad():
        head.weight = nn.Parameter(base.lm_head.weight[list(answers)].clone())
    base.lm_head = head
    return base.eval()


def trunk_of(model: nn.Module) -> FrozenTrunk | None:
    """The frozen trunk that a model stands on; None where all blocks are its own."""
    return next((m for m in model.modules() if isinstance(m, FrozenTrunk)), None)


def new_adapter(base: LlamaForCausalLM, recipe: str, seed: int) -> PeftModel:
    """LlamaRec's adapter (r = 8, alpha = 32, dropout 0.05) on the projections of a recipe."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=8,
            lora_alpha=32,
            lora_dropout=0.05,
            target_modules=list(RECIPES[recipe]),
            exclude_modules=None if trunk_of(base) is None else r".*\.trunk\..*",
        )
        return get_peft_model(base, config)
