"""Forget and retain sets as JSON lines -> batches."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from .errors import UcanError

_KINDS = "'text', 'prompt' + 'completion', or 'input_ids'"


def read_jsonl(
    path: str | os.PathLike,
    tokenizer: Any | None,
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    vocabulary: int | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Read one set; each line is an object of one of three kinds.

    * ``{"text": str}``: every token is scored.
    * ``{"prompt": str, "completion": str}``: only the completion is scored; both are measured.
    * ``{"input_ids": [int, ...]}``: already tokenised.

    Each may carry ``"token_groups"``: one of 0 (forget), 1 (retain), -1 (ignored) per token; for
    text the count must be that of its tokens. Sequences longer than ``max_length`` lose their
    beginning. Batches are padded on the tokenizer's side (right without one).

    Args:
        vocabulary: the model's number of tokens, to refuse ids beyond it by line; None: unknown.

    Raises:
        UcanError: a line is malformed (file, line and reason are given), there is no tokenizer
            for text, or the file has no line.
    """
    path = Path(path)
    rows = []
    try:
        # Bytes, so that a line that is no UTF-8 can be named.
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    rows.append(_row(line, where, tokenizer, max_length, vocabulary))
    except FileNotFoundError as error:
        raise UcanError(f"{path} does not exist.") from error
    except OSError as error:
        raise UcanError(f"{path} cannot be read: {error}.") from error
    if not rows:
        raise UcanError(f"{path} holds no line; one JSON object per line is expected.")
    left = getattr(tokenizer, "padding_side", "right") == "left"
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    # A batch needs the groups of all its rows or of none: the default depends on the caller.
    grouped = [row for row in rows if "token_groups" in row]
    plain = [row for row in rows if "token_groups" not in row]
    return [
        _batch(part[start : start + batch_size], pad, left)
        for part in (plain, grouped)
        for start in range(0, len(part), batch_size)
    ]


def _row(
    line: bytes, where: str, tokenizer: Any | None, max_length: int, vocabulary: int | None
) -> dict[str, list[int]]:
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UcanError(f"{where}: not UTF-8: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise UcanError(f"{where}: not valid JSON: {error}.") from error
    if not isinstance(entry, dict):
        raise UcanError(f"{where}: each line must be a JSON object with {_KINDS}.")
    if "input_ids" in entry:
        row = {"input_ids": _integers(entry["input_ids"], f"{where}: input_ids", 0)}
    elif isinstance(entry.get("text"), str):
        row = {"input_ids": _tokens(tokenizer, entry["text"], where, special=True)}
    elif isinstance(entry.get("prompt"), str) and isinstance(entry.get("completion"), str):
        prompt = _tokens(tokenizer, entry["prompt"], where, special=True)
        completion = _tokens(tokenizer, entry["completion"], where, special=False)
        row = {
            "input_ids": prompt + completion,
            "labels": [-100] * len(prompt) + completion,
        }
    else:
        raise UcanError(
            f"{where}: found {', '.join(map(repr, entry)) or 'nothing'}; needed are {_KINDS}."
        )
    if len(row["input_ids"]) < 2:
        raise UcanError(
            f"{where}: a sequence needs at least 2 tokens, this has {len(row['input_ids'])}."
        )
    largest = max(row["input_ids"])
    # Without a known vocabulary at least what a tensor can hold.
    if largest >= (vocabulary or 2**63):
        raise UcanError(
            f"{where}: token id {largest} is beyond the model's vocabulary of "
            f"{vocabulary or 2**63} tokens."
        )
    row.setdefault("labels", row["input_ids"])
    if "token_groups" in entry:
        groups = _integers(entry["token_groups"], f"{where}: token_groups", -1)
        if len(groups) != len(row["input_ids"]) or max(groups) > 1:
            raise UcanError(
                f"{where}: token_groups must hold 0, 1 or -1 for each of the "
                f"{len(row['input_ids'])} tokens; it has {len(groups)} entries up to {max(groups)}."
            )
        row["token_groups"] = groups
    return {key: values[-max_length:] for key, values in row.items()}


def _integers(value: Any, what: str, low: int) -> list[int]:
    good = isinstance(value, list) and value
    if not good or not all(type(v) is int and v >= low for v in value):
        raise UcanError(f"{what} must be a list of integers >= {low}.")
    return value


def _tokens(tokenizer: Any | None, text: str, where: str, special: bool) -> list[int]:
    if tokenizer is None:
        raise UcanError(
            f"{where}: text needs a tokenizer, and none was found with the base model; give "
            "--tokenizer, or 'input_ids' in the file."
        )
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    return list(ids)


def _batch(rows: list[dict[str, list[int]]], pad: int, left: bool) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": pad, "labels": -100, "token_groups": -1}
    batch = {}
    for key in rows[0]:
        batch[key] = torch.tensor([_pad(row[key], length, fills[key], left) for row in rows])
    ones = [_pad([1] * len(row["input_ids"]), length, 0, left) for row in rows]
    batch["attention_mask"] = torch.tensor(ones)
    return batch


def _pad(values: list[int], length: int, fill: int, left: bool) -> list[int]:
    padding = [fill] * (length - len(values))
    return padding + values if left else values + padding
