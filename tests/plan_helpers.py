"""Tiny adapters with random weights, and made-up statistics for them."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ucan_fast import ActivationStats, Moments
from ucan_fast.adapter import fingerprint

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
SITES = ("input", "rank", "output", "mlp")


def tiny_llama(
    targets=(*ATTENTION, *MLP),
    *,
    layers: int = 2,
    rank: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    adapter: str = "default",
) -> nn.Module:
    """K = 16 and I = 24; k_proj and v_proj have 8 outputs. Base and adapter in one dtype."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
            )
        )
        return wrap(base, targets, rank=rank, seed=seed, dtype=dtype, adapter=adapter)


def wrap(base, targets, *, rank=4, seed=0, dtype=torch.float32, adapter="default") -> nn.Module:
    """A LoRA adapter whose A and B are both random (PEFT starts with B = 0)."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
    model = get_peft_model(base, config, adapter_name=adapter, autocast_adapter_dtype=False)
    randomize(model, adapter, seed)
    return model.to(dtype).eval()


def randomize(model: nn.Module, adapter: str = "default", seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in lora_parameters(model, adapter).items():
            scale = 0.5 if "lora_A" in name else 0.1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            # negative zeros, which only a bitwise comparison tells from zeros
            parameter[0, 0] = -0.0


def lora_parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """Every A and B by its name in the module tree, tied ones under each of their names."""
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if f".lora_A.{adapter}." in name or f".lora_B.{adapter}." in name
    }


def layer_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def weight(model: nn.Module, layer: str, which: str, adapter: str = "default") -> nn.Parameter:
    return getattr(model.get_submodule(layer), f"lora_{which}")[adapter].weight


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """The stored bits of every parameter and buffer."""
    return {
        name: tensor.detach().contiguous().reshape(-1).view(torch.uint8).clone()
        for name, tensor in model.state_dict().items()
    }


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = snapshot(model)
    assert set(now) == set(before)
    changed = [name for name in now if not torch.equal(now[name], before[name])]
    assert not changed, changed


def random_moments(n: int, seed: int, counts=(5.0, 9.0)) -> Moments:
    """Σ|h| and Σh² of real random tokens, so that variances are what variances can be."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.rand(2, 1, n, generator=generator, dtype=torch.float64) + 0.1
    sums, squares = [], []
    for group in range(2):
        h = torch.randn(int(counts[group]), n, generator=generator, dtype=torch.float64)
        h = h * loudness[group]
        sums.append(h.abs().sum(0))
        squares.append((h * h).sum(0))
    return Moments(
        torch.tensor(counts, dtype=torch.float64), torch.stack(sums), torch.stack(squares)
    )


def random_stats(model: nn.Module, adapter: str = "default", seed: int = 0) -> ActivationStats:
    """Made-up statistics of every site, marked as taken on this adapter."""
    stats = ActivationStats({}, fingerprint(model, adapter))
    for index, name in enumerate(layer_names(model)):
        a, b = weight(model, name, "A", adapter), weight(model, name, "B", adapter)
        sizes = {"input": a.shape[1], "rank": a.shape[0], "output": b.shape[0]}
        sizes["layer"] = b.shape[0]
        stats.layers[name] = {
            site: random_moments(n, 100 * seed + 10 * index + k)
            for k, (site, n) in enumerate(sizes.items())
        }
    return stats


def batches(seed: int = 0, sequences: int = 8, length: int = 6) -> list[dict[str, torch.Tensor]]:
    """One batch of mixed sequences: token groups 0 and 1, some padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (sequences, length), generator=generator)
    groups = torch.randint(0, 2, (sequences, length), generator=generator)
    mask = torch.ones(sequences, length, dtype=torch.int64)
    mask[0, -2:] = 0
    mask[sequences // 2, -1:] = 0
    return [{"input_ids": ids, "attention_mask": mask, "token_groups": groups}]
