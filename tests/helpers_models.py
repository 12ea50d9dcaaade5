"""Tiny models built from their configurations (nothing is downloaded), adapters and batches."""

from __future__ import annotations

import peft
import torch
import transformers
from torch import nn

VOCAB = 40


def llama(*, layers: int = 2, hidden: int = 16, dtype=torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def gpt2(*, dtype=torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).to(dtype)


def t5(*, gated: bool = True, dtype=torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu" if gated else "relu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return transformers.T5ForConditionalGeneration(config).to(dtype)


def bart(*, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    return transformers.BartForConditionalGeneration(config)


LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_TARGETS = ["c_attn", "c_proj", "c_fc"]
BART_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
T5_TARGETS = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]


def lora(
    model: nn.Module,
    *,
    r: int = 4,
    targets: list[str] | None = None,
    adapter: str = "default",
    seed: int = 1,
    autocast_adapter_dtype: bool = True,
    **config,
) -> peft.PeftModel:
    """The model with an adapter whose A and B are both random (PEFT starts with B = 0)."""
    if targets is None:
        kind = model.config.model_type
        targets = {
            "llama": LLAMA_TARGETS,
            "gpt2": GPT2_TARGETS,
            "t5": T5_TARGETS,
            "bart": BART_TARGETS,
        }[kind]
    settings = {
        "r": r,
        "lora_alpha": 2 * r + 1,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "fan_in_fan_out": getattr(model.config, "model_type", None) == "gpt2",
        **config,
    }
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(**settings),
        adapter_name=adapter,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    randomise(model, adapter, seed)
    return model.eval()


def randomise(model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("lora_A." in name or "lora_B." in name) and f".{adapter}." in name:
                value = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(value.to(parameter.dtype))


def token_batch(
    lengths: list[int], *, side: str = "right", seed: int = 0, groups: str | None = None
) -> dict[str, torch.Tensor]:
    """Sequences of these lengths, padded with *junk* tokens, so that padding that leaks shows.

    ``groups="mixed"`` adds token_groups of 0, 1 and -1 all over, in the padding too.
    """
    generator = torch.Generator().manual_seed(100 + seed)
    total = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), total), generator=generator)
    mask = torch.zeros(len(lengths), total, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(total - length, total)] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if groups == "mixed":
        batch["token_groups"] = torch.randint(-1, 2, ids.shape, generator=generator)
    return batch


def pair_batch(
    encoder: list[int], decoder: list[int], *, seed: int = 0, groups: str | None = None
) -> dict[str, torch.Tensor]:
    """A batch of an encoder-decoder model."""
    source = token_batch(encoder, seed=seed, groups=groups)
    target = token_batch(decoder, seed=seed + 50, groups=groups)
    return {**source, **{f"decoder_{key}": value for key, value in target.items()}}


class Wrapped(nn.Module):
    """A base model of our own around any module that maps hidden states to hidden states.

    It takes batches as a Hugging Face model does; ``embed`` gives every token id its vector.
    """

    def __init__(self, body: nn.Module, width: int, dtype=torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width, dtype=dtype)
        self.body = body

    def forward(self, input_ids, attention_mask=None):
        return self.body(self.embed(input_ids))
