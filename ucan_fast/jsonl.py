"""Forget and retain sets as JSON lines -> batches."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .errors import UcanError, warn

_KINDS = "'text', 'prompt' + 'completion', or 'input_ids'"
_PAIRS = "'prompt' + 'completion', or 'input_ids' + 'labels'"
_GROUPS = {"input_ids": "token_groups", "labels": "decoder_token_groups"}
# The keys that tell a line's kind, and what may stand beside them.
_Kinds = dict[tuple[str, ...], tuple[str, ...]]
_SEQUENCE_KEYS: _Kinds = {
    ("input_ids",): ("attention_mask", "token_groups"),
    ("text",): ("token_groups",),
    ("prompt", "completion"): ("token_groups",),
}
_PAIR_KEYS: _Kinds = {
    ("input_ids", "labels"): ("attention_mask", "token_groups", "decoder_token_groups"),
    ("prompt", "completion"): ("token_groups", "decoder_token_groups"),
}


def read_jsonl(
    path: str | os.PathLike,
    tokenizer: Any | None,
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    vocabulary: int | None = None,
    encoder_decoder: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """Read one set; each line is an object of one of three kinds.

    * ``{"text": str}``: every token is scored.
    * ``{"prompt": str, "completion": str}``: only the completion is scored; both are measured.
    * ``{"input_ids": [int, ...]}``: already tokenised.

    Each may carry ``"token_groups"``: one of 0 (forget), 1 (retain), -1 (ignored) per token; for
    text the count must be that of its tokens. Beside ``"input_ids"`` an ``"attention_mask"`` may
    stand, 1 or 0 per token: those of 0 are left out, and their groups with them. No other key may:
    a misspelt one would be passed over, and other tokens be forgotten than were meant. Sequences
    longer than ``max_length`` lose their beginning, with a warning. Batches are padded on the
    tokenizer's side (right without one).

    For an encoder-decoder model the kinds are ``{"prompt": str, "completion": str}`` (the encoder
    reads the prompt, the decoder's labels are the completion, each with the special tokens that
    the tokenizer adds to it) and ``{"input_ids": [...], "labels": [...]}``. ``"token_groups"``
    are those of the encoder's tokens, ``"decoder_token_groups"`` those of the labels; either
    defaults to the set's group. Labels are padded on the right, where no decoder sees it.

    Args:
        vocabulary: the model's number of tokens, to refuse ids beyond it by line; None: unknown.
        encoder_decoder: whether the model is one.

    Raises:
        UcanError: a line is malformed or holds an unknown key (file, line and reason are given),
            there is no tokenizer for text, or the file has no line.

    Warns:
        UcanWarning: sequences were cut to ``max_length``.
    """
    path = Path(path)
    rows = []
    try:
        # Bytes, so that a line that is no UTF-8 can be named.
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                # What editors on Windows begin a file with.
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    where = f"{path}:{number}"
                    rows.append(_row(line, where, tokenizer, vocabulary, encoder_decoder))
    except FileNotFoundError as error:
        raise UcanError(f"{path} does not exist.") from error
    except OSError as error:
        raise UcanError(f"{path} cannot be read: {error}.") from error
    if not rows:
        raise UcanError(f"{path} holds no line; one JSON object per line is expected.")
    left = getattr(tokenizer, "padding_side", "right") == "left"
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    long = sum(any(len(values) > max_length for values in row.values()) for row in rows)
    if long:
        warn(
            f"{path}: {long} of {len(rows)} sequences are longer than {max_length} tokens and "
            "lost their beginning.",
        )
    rows = [{key: values[-max_length:] for key, values in row.items()} for row in rows]
    # A batch needs the groups of all its rows or of none: the default depends on the caller.
    parts: dict[tuple[bool, ...], list] = {}
    for row in rows:
        parts.setdefault(tuple(key in row for key in _GROUPS.values()), []).append(row)
    return [
        _batch(part[start : start + batch_size], pad, left, encoder_decoder)
        for _, part in sorted(parts.items())
        for start in range(0, len(part), batch_size)
    ]


def _row(
    line: bytes,
    where: str,
    tokenizer: Any | None,
    vocabulary: int | None,
    encoder_decoder: bool,
) -> dict[str, list[int]]:
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UcanError(f"{where}: not UTF-8: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise UcanError(f"{where}: not valid JSON: {error}.") from error
    if not isinstance(entry, dict):
        kinds = _PAIRS if encoder_decoder else _KINDS
        raise UcanError(f"{where}: each line must be a JSON object with {kinds}.")
    read = _pair if encoder_decoder else _sequence
    row = read(entry, where, tokenizer)
    row.setdefault("labels", row["input_ids"])
    for tokens, key in _GROUPS.items():
        if key not in entry or not row[tokens]:
            continue
        groups = _integers(entry[key], f"{where}: {key}", -1)
        if len(groups) != len(row[tokens]) or max(groups) > 1:
            raise UcanError(
                f"{where}: {key} must hold 0, 1 or -1 for each of the {len(row[tokens])} tokens; "
                f"it has {len(groups)} entries up to {max(groups)}."
            )
        row[key] = groups
    if "attention_mask" in entry:
        row = _attended(row, entry["attention_mask"], where, encoder_decoder)
    if not encoder_decoder and len(row["input_ids"]) < 2:
        raise UcanError(
            f"{where}: a sequence needs at least 2 tokens, this has {len(row['input_ids'])}."
        )
    for key in ("input_ids", "labels"):
        if not row[key]:
            raise UcanError(f"{where}: {key} of this line have no token.")
        largest = max(row[key])
        # Without a known vocabulary at least what a tensor can hold.
        if largest >= (vocabulary or 2**63):
            raise UcanError(
                f"{where}: token id {largest} is beyond the model's vocabulary of "
                f"{vocabulary or 2**63} tokens."
            )
    return row


def _attended(
    row: dict[str, list[int]], mask: Any, where: str, encoder_decoder: bool
) -> dict[str, list[int]]:
    """The row without the tokens that the mask hides, as tokenised dumps mark their padding."""
    mask = _integers(mask, f"{where}: attention_mask", 0)
    if len(mask) != len(row["input_ids"]) or max(mask) > 1:
        raise UcanError(
            f"{where}: attention_mask must hold 0 or 1 for each of the {len(row['input_ids'])} "
            f"tokens; it has {len(mask)} entries up to {max(mask)}."
        )
    decoder = ("labels", "decoder_token_groups") if encoder_decoder else ()
    return {
        key: values if key in decoder else [v for v, m in zip(values, mask, strict=True) if m]
        for key, values in row.items()
    }


def _sequence(entry: dict, where: str, tokenizer: Any | None) -> dict[str, list[int]]:
    for key in ("labels", "decoder_token_groups"):
        if key in entry:
            raise UcanError(
                f"{where}: {key!r} is for encoder-decoder models only; to score a part of a "
                "sequence use 'prompt' + 'completion' or 'token_groups'."
            )
    _check_keys(entry, where, _SEQUENCE_KEYS)
    if "input_ids" in entry:
        row = {"input_ids": _integers(entry["input_ids"], f"{where}: input_ids", 0)}
    elif isinstance(entry.get("text"), str):
        row = {"input_ids": _tokens(tokenizer, where, entry["text"])}
    elif isinstance(entry.get("prompt"), str) and isinstance(entry.get("completion"), str):
        prompt = _tokens(tokenizer, where, entry["prompt"])
        completion = _tokens(tokenizer, where, entry["completion"], add_special_tokens=False)
        row = {
            "input_ids": prompt + completion,
            "labels": [-100] * len(prompt) + completion,
        }
    else:
        raise UcanError(f"{where}: found {_keys(entry)}; needed are {_KINDS}.")
    return row


def _pair(entry: dict, where: str, tokenizer: Any | None) -> dict[str, list[int]]:
    _check_keys(entry, where, _PAIR_KEYS)
    if "input_ids" in entry and "labels" in entry:
        labels = _integers(entry["labels"], f"{where}: labels", -100)
        if any(-100 < label < 0 for label in labels) or max(labels) < 0:
            raise UcanError(
                f"{where}: labels must be token ids, or -100 where nothing is scored, and at least "
                "one token id."
            )
        return {
            "input_ids": _integers(entry["input_ids"], f"{where}: input_ids", 0),
            "labels": labels,
        }
    if isinstance(entry.get("prompt"), str) and isinstance(entry.get("completion"), str):
        return {
            "input_ids": _tokens(tokenizer, where, entry["prompt"]),
            # text_target: some tokenizers mark the two sides differently (languages).
            "labels": _tokens(tokenizer, where, text_target=entry["completion"]),
        }
    raise UcanError(
        f"{where}: found {_keys(entry)}; an encoder-decoder model reads one sequence and answers "
        f"with another, so needed are {_PAIRS}."
    )


def _check_keys(entry: dict, where: str, kinds: _Kinds) -> None:
    """Refuse what would be passed over beside the keys that tell the line's kind."""
    kind = next((kind for kind in kinds if all(key in entry for key in kind)), None)
    if kind is None:
        return
    more = [key for key in entry if key not in (*kind, *kinds[kind])]
    mixed = [key for key in more if any(key in other for other in kinds)]
    named = " + ".join(map(repr, kind))
    if mixed:
        raise UcanError(
            f"{where}: {_keys(mixed)} beside {named}: these are two kinds of line, so which tokens "
            "are meant is unclear; leave one of them out."
        )
    if more:
        raise UcanError(
            f"{where}: unknown key {_keys(more)}; beside {named} a line may hold "
            f"{_keys(kinds[kind])}. Mend its name or leave it out."
        )


def _keys(entry: Iterable[str]) -> str:
    return ", ".join(map(repr, entry)) or "nothing"


def _integers(value: Any, what: str, low: int) -> list[int]:
    good = isinstance(value, list) and value
    if not good or not all(type(v) is int and v >= low for v in value):
        raise UcanError(f"{what} must be a list of integers >= {low}.")
    return value


def _tokens(tokenizer: Any | None, where: str, *text: str, **options: Any) -> list[int]:
    if tokenizer is None:
        raise UcanError(
            f"{where}: text needs a tokenizer, and none was found with the base model; give "
            "--tokenizer, or 'input_ids' in the file."
        )
    for value in (*text, options.get("text_target", "")):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = ascii(value[error.start])[1:-1]
            raise UcanError(
                f"{where}: the text holds {half}, one half of a pair that makes a character; write "
                "the character itself, or both halves."
            ) from error
    return list(tokenizer(*text, **options)["input_ids"])


def _batch(
    rows: list[dict[str, list[int]]], pad: int, left: bool, encoder_decoder: bool
) -> dict[str, torch.Tensor]:
    fills = {
        "input_ids": pad,
        "labels": -100,
        "token_groups": -1,
        "decoder_token_groups": -1,
        "attention_mask": 0,
    }
    decoder = ("labels", "decoder_token_groups") if encoder_decoder else ()
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        key: _padded([row[key] for row in rows], fills[key], left and key not in decoder)
        for key in rows[0]
    }


def _padded(rows: list[list[int]], fill: int, left: bool) -> torch.Tensor:
    length = max(map(len, rows))
    padding = [[fill] * (length - len(row)) for row in rows]
    return torch.tensor(
        [p + row if left else row + p for row, p in zip(rows, padding, strict=True)],
        device="cpu",
    )
