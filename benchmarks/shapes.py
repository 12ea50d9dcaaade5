"""Layer shapes of real models, from their published configurations."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = (1, 64, 1024, 8192)
RANKS = (8, 16, 64)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Model:
    """A decoder of the Llama kind, as far as its linear layers go."""

    name: str
    blocks: int
    hidden: int
    intermediate: int
    query: int
    key_value: int

    def layers(self) -> dict[str, tuple[int, int]]:
        """Projection -> (K, N): the sizes of its input and output."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key_value),
            "v_proj": (self.hidden, self.key_value),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def distinct_layers(self) -> dict[str, tuple[int, int]]:
        """The same, without those of a size that came before: one projection per size."""
        seen: dict[tuple[int, int], str] = {}
        for name, size in self.layers().items():
            seen.setdefault(size, name)
        return {name: size for size, name in seen.items()}

    def adapter_shapes(self, rank: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """(shape of A, shape of B) of every adapted layer of the whole model."""
        return [((rank, k), (n, rank)) for k, n in self.layers().values()] * self.blocks


SMOLLM2_135M = Model("SmolLM2-135M", 30, hidden=576, intermediate=1536, query=576, key_value=192)
LLAMA_32_1B = Model("Llama-3.2-1B", 16, hidden=2048, intermediate=8192, query=2048, key_value=512)
LLAMA_2_7B = Model("Llama-2-7B", 32, hidden=4096, intermediate=11008, query=4096, key_value=4096)
LLAMA_3_8B = Model("Llama-3-8B", 32, hidden=4096, intermediate=14336, query=4096, key_value=1024)
QWEN_25_14B = Model("Qwen2.5-14B", 48, hidden=5120, intermediate=13824, query=5120, key_value=1024)

MODELS = (SMOLLM2_135M, LLAMA_32_1B, LLAMA_2_7B, LLAMA_3_8B, QWEN_25_14B)
