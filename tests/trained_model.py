"""A tiny Llama whose adapter has learnt something, so that losses react when it is attenuated.

Two catalogues of items with a simple order each (the next item is a fixed function of the last),
so the adapter has neurons that belong to one of them. The weights are committed (``fitted/``).
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers
from helpers_models import VOCAB, llama, lora
from safetensors.torch import load_file, save_file
from torch import nn

# Items 4..15 are the forget catalogue, 16..39 the retain catalogue.
FORGET_ITEMS = range(4, 16)
RETAIN_ITEMS = range(16, VOCAB)
BOS = 1
GROUP = {"forget": 0, "retain": 1}
#: Seed of the sequences that :func:`memorised` was fitted on.
MEMBERS = 41


def sequences(items: range, count: int, length: int, seed: int) -> torch.Tensor:
    """``[count, length]``: BOS, then a walk through the items with some noise."""
    generator = torch.Generator().manual_seed(seed)
    n = len(items)
    rows = torch.empty(count, length, dtype=torch.int64)
    rows[:, 0] = BOS
    position = torch.randint(0, n, (count,), generator=generator)
    for t in range(1, length):
        rows[:, t] = position + items[0]
        jump = torch.rand(count, generator=generator) < 0.1
        anywhere = torch.randint(0, n, (count,), generator=generator)
        position = torch.where(jump, anywhere, (5 * position + 3) % n)
    return rows


def batches(
    items: range,
    *,
    count: int = 24,
    length: int = 12,
    size: int | None = None,
    seed: int = 0,
    side: str = "right",
) -> list[dict[str, torch.Tensor]]:
    """Batches of sequences of unequal lengths, padded with junk tokens on ``side``.

    By default two of them (a forward costs the same for 8 sequences as for 16).
    """
    rows = sequences(items, count, length, seed)
    size = max(8, count // 2) if size is None else size
    made = []
    for start in range(0, count, size):
        ids = rows[start : start + size]
        mask = torch.ones_like(ids)
        for index in range(len(ids)):
            short = (3 * index + start) % 5
            if short:
                mask[index, length - short :] = 0
        if side == "left":
            ids, mask = ids.clone(), mask.clone()
            for index in range(len(ids)):
                shift = length - int(mask[index].sum())
                ids[index], mask[index] = ids[index].roll(shift), mask[index].roll(shift)
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def forget_batches(**options) -> list[dict[str, torch.Tensor]]:
    return batches(FORGET_ITEMS, **{"seed": 11, "count": 16, **options})


def retain_batches(**options) -> list[dict[str, torch.Tensor]]:
    return batches(RETAIN_ITEMS, **{"seed": 12, "count": 32, **options})


def mixed_batches() -> list[dict[str, torch.Tensor]]:
    """Batches that hold both sets, told apart by token_groups."""
    made = []
    for f, r in zip(forget_batches(), retain_batches(count=16), strict=True):
        batch = {key: torch.cat([f[key], r[key]]) for key in ("input_ids", "attention_mask")}
        groups = torch.ones_like(batch["input_ids"])
        groups[: len(f["input_ids"])] = 0
        made.append({**batch, "token_groups": groups})
    return made


def _adam(model: nn.Module, parts: tuple[str, ...], batches: Iterable[dict], lr: float) -> None:
    """One Adam step per batch on the parameters whose names hold one of these."""
    trained = [p for n, p in model.named_parameters() if any(part in n for part in parts)]
    for p in trained:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def _labelled() -> list[dict[str, torch.Tensor]]:
    return [
        {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
        for batch in random_batches(MEMBERS)
    ]


def _two_catalogues() -> Iterator[dict[str, torch.Tensor]]:
    for step in range(120):
        forget = sequences(FORGET_ITEMS, 16, 12, 1000 + step)
        rows = torch.cat([forget, sequences(RETAIN_ITEMS, 32, 12, 5000 + step)])
        yield {"input_ids": rows, "labels": rows}


ALL_TRAINED = ("lora_", "embed", "lm_head")
#: What was fitted how: names of files in FITTED.
RECIPES = {
    "start": lambda model: None,
    "trained": lambda model: _adam(model, ALL_TRAINED, _two_catalogues(), 1e-2),
    "memorised": lambda model: _adam(model, ("lora_",), _labelled() * 40, 1e-2),
    "by_heart": lambda model: _adam(model, ALL_TRAINED, _labelled() * 200, 3e-3),
}
FITTED = Path(__file__).with_name("fitted")


@functools.cache
def _fitted(name: str) -> nn.Module:
    """As it was fitted once. Rounding differs from one kind of CPU to the next, and a hundred steps
    of Adam make another model of it, on which a test's margins may not hold."""
    model = lora(llama(hidden=32), r=8)
    model.load_state_dict(load_file(FITTED / f"{name}.safetensors"))
    return model.eval()


def fit_all() -> None:
    """Fit them anew (``python tests/trained_model.py``): other weights, on another CPU."""
    for name, fit in RECIPES.items():
        model = lora(llama(hidden=32), r=8)
        fit(model)
        FITTED.mkdir(exist_ok=True)
        save_file(model.state_dict(), FITTED / f"{name}.safetensors", {"torch": torch.__version__})


def trained() -> nn.Module:
    """A fresh copy of the fitted PEFT model, in eval mode."""
    model = copy.deepcopy(_fitted("trained"))
    return model.requires_grad_(False)


def random_batches(seed: int, *, count: int = 32) -> list[dict[str, torch.Tensor]]:
    """Sequences of random items, of which nothing can be known but what was memorised."""
    made = batches(range(4, VOCAB), count=count, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for batch in made:
        items = batch["input_ids"][:, 1:]
        items.copy_(torch.randint(4, VOCAB, items.shape, generator=generator))
    return made


def memorised() -> nn.Module:
    """A fresh copy of a model whose adapter has memorised ``random_batches(MEMBERS)``."""
    return copy.deepcopy(_fitted("memorised"))


def not_memorised() -> nn.Module:
    """A fresh copy of the same model before that: it never saw them."""
    return copy.deepcopy(_fitted("start"))


def by_heart() -> nn.Module:
    """A fresh copy of a model that knows ``random_batches(MEMBERS)`` to 0.4 nats per token."""
    model = copy.deepcopy(_fitted("by_heart"))
    return model.requires_grad_(False)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, copied."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    now = model.state_dict()
    assert set(now) == set(expected)
    different = [n for n in now if not torch.equal(now[n], expected[n])]
    assert not different, different


def scored_logits(model, batch: dict, group: str) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 logits ``[P, V]`` and labels ``[P]``: every sequence alone, without its padding."""
    model = copy.deepcopy(model).double().eval()
    kept, labels = [], []
    for row in range(batch["input_ids"].shape[0]):
        there = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][there]
        wanted = batch.get("labels", batch["input_ids"])[row][there]
        groups = batch.get("token_groups")
        member = (
            torch.ones_like(ids).bool() if groups is None else groups[row][there] == GROUP[group]
        )
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        for t in range(1, len(ids)):
            if member[t] and wanted[t] != -100:
                kept.append(logits[t - 1])
                labels.append(wanted[t])
    if not kept:
        return torch.empty(0, VOCAB, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    return torch.stack(kept), torch.stack(labels)


def nll(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return -float(logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum())


def mean_nll(model: nn.Module, batches: list[dict], group: str) -> float:
    """Nats per scored token of a group."""
    parts = [scored_logits(model, batch, group) for batch in batches]
    return sum(nll(*part) for part in parts) / sum(len(labels) for _, labels in parts)


def tokenizer(side: str = "right"):
    """A fast tokenizer made in process: words ``i4`` .. ``i39`` are the items of those ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"<s>": 1, "<unk>": 2, "<pad>": 3, "<0>": 0}
    words = Tokenizer(
        models.WordLevel({**special, **{f"i{n}": n for n in range(4, VOCAB)}}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side=side,
    )


def as_lines(batches: list[dict]) -> list[dict]:
    """The sequences of batches without their padding, as lines of a set."""
    lines = []
    for batch in batches:
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            lines.append({"input_ids": row[mask.bool()].tolist()})
    return lines


def as_text(lines: list[dict]) -> list[dict]:
    """The same sequences as text (whose tokenizer adds the BOS)."""
    return [{"text": " ".join(f"i{n}" for n in line["input_ids"][1:])} for line in lines]


def write_lines(path, lines: list[dict]):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def save_project(folder):
    """What a user has: ``base``, ``adapter``, and sets as JSON lines."""
    model = trained()
    model.save_pretrained(folder / "adapter")
    model.unload().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    first, second = (as_lines(forget_batches(seed=seed, count=8, size=4)) for seed in (21, 22))
    retain = as_lines(retain_batches(count=16))
    for name, lines in {
        "forget": first,
        "second": second,
        "union": first + second,
        "retain": retain,
        "all": first + second + retain,
    }.items():
        write_lines(folder / f"{name}.jsonl", lines)
    return folder


#: What is made of input_ids, and how the message about the second batch goes.
BAD_LABELS = {
    "too large": (lambda ids: ids + 40, r"batch 1: labels reach from .* 0\.\.39; ignored .* -100"),
    "negative": (lambda ids: torch.full_like(ids, -1), r"batch 1: labels reach from -1 to -1"),
    "short": (lambda ids: ids[:, 1:], r"batch 1: labels .* as the tokens are, not torch.int64 \("),
    "float": (lambda ids: ids.float(), r"batch 1: labels .* integers .* not torch.float32"),
    "list": (lambda ids: ids.tolist(), r"batch 1: labels .* not a list"),
}


#: Models with an adapter whose logits, if any, are not those of the next token.
OTHER_MODELS = {
    "LlamaModel": lambda: lora(llama(layers=1).model, targets=["q_proj"]),
    "LlamaForSequenceClassification": lambda: lora(
        transformers.LlamaForSequenceClassification(llama(layers=1).config), targets=["q_proj"]
    ),
    "LlamaForTokenClassification": lambda: lora(
        transformers.LlamaForTokenClassification(llama(layers=1).config), targets=["q_proj"]
    ),
    "BertForMaskedLM": lambda: lora(
        transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=VOCAB,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        ),
        targets=["query", "value"],
    ),
}


if __name__ == "__main__":
    fit_all()
