"""Sets as JSON lines: three kinds of line, padding, truncation, and every malformed line named."""

from __future__ import annotations

import json
import re

import pytest
import torch
from trained_model import tokenizer

import ucan_fast as uf
from ucan_fast.jsonl import read_jsonl


def written(tmp_path, *lines, name="set.jsonl"):
    path = tmp_path / name
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def lists(batch: dict) -> dict:
    return {key: value.tolist() for key, value in batch.items()}


def test_input_ids(tmp_path):
    path = written(tmp_path, {"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]})
    (batch,) = read_jsonl(path, None)
    assert lists(batch) == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[5, 6, 7], [8, 9, -100]],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_text_has_the_tokenizers_special_tokens_and_every_token_is_scored(tmp_path):
    (batch,) = read_jsonl(written(tmp_path, {"text": "i4 i5 i6"}), tokenizer())
    assert lists(batch) == {
        "input_ids": [[1, 4, 5, 6]],
        "attention_mask": [[1, 1, 1, 1]],
        "labels": [[1, 4, 5, 6]],
    }


def test_of_prompt_and_completion_only_the_completion_is_scored(tmp_path):
    (batch,) = read_jsonl(
        written(tmp_path, {"prompt": "i4 i5", "completion": "i6 i7"}), tokenizer()
    )
    assert lists(batch) == {
        "input_ids": [[1, 4, 5, 6, 7]],
        "attention_mask": [[1, 1, 1, 1, 1]],
        "labels": [[-100, -100, -100, 6, 7]],
    }


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_follows_the_tokenizer(tmp_path, side):
    path = written(
        tmp_path,
        {"text": "i4 i5 i6", "token_groups": [-1, 0, 1, 0]},
        {"prompt": "i7", "completion": "i8", "token_groups": [1, 1, 0]},
    )
    (batch,) = read_jsonl(path, tokenizer(side))
    right = side == "right"
    pad = tokenizer().pad_token_id
    assert pad == 3
    assert lists(batch) == {
        "input_ids": [[1, 4, 5, 6], [1, 7, 8, pad] if right else [pad, 1, 7, 8]],
        "labels": [
            [1, 4, 5, 6],
            [-100, -100, 8, -100] if right else [-100, -100, -100, 8],
        ],
        "token_groups": [[-1, 0, 1, 0], [1, 1, 0, -1] if right else [-1, 1, 1, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0] if right else [0, 1, 1, 1]],
    }


def test_a_tokenizer_without_a_padding_token(tmp_path):
    plain = tokenizer()
    plain.pad_token = None
    path = written(tmp_path, {"text": "i4 i5 i6"}, {"text": "i4"})
    (batch,) = read_jsonl(path, plain)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist()[1] == [1, 4, -100, -100]


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_keeps_the_end(tmp_path, side):
    path = written(
        tmp_path,
        {"text": "i4 i5 i6 i7", "token_groups": [-1, 0, 1, 0, 1]},
        {"prompt": "i4 i5 i6", "completion": "i7 i8", "token_groups": [-1, 1, 1, 1, 0, 0]},
    )
    (batch,) = read_jsonl(path, tokenizer(side), max_length=3)
    assert lists(batch) == {
        "input_ids": [[5, 6, 7], [6, 7, 8]],
        "labels": [[5, 6, 7], [-100, 7, 8]],
        "token_groups": [[1, 0, 1], [1, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 1]],
    }


def test_batches_lines_with_and_without_groups_apart_and_blank_lines(tmp_path):
    rows = [{"input_ids": [10 + i, 20]} for i in range(5)]
    rows[1]["token_groups"] = [0, 1]
    path = written(tmp_path, rows[0], "", rows[1], "   ", *rows[2:])
    batches = read_jsonl(path, None, batch_size=2)
    assert [b["input_ids"][:, 0].tolist() for b in batches] == [[10, 12], [13, 14], [11]]
    assert ["token_groups" in b for b in batches] == [False, False, True]
    # Windows line ends and a missing last one are no matter.
    other = tmp_path / "dos.jsonl"
    other.write_bytes(b'{"input_ids": [1, 2]}\r\n{"input_ids": [3, 4]}')
    assert read_jsonl(other, None)[0]["input_ids"].tolist() == [[1, 2], [3, 4]]


def test_text_of_any_language(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"text": "i4 größer 映画 i5"}\n', encoding="utf-8")
    (batch,) = read_jsonl(path, tokenizer())
    assert batch["input_ids"].tolist() == [[1, 4, 2, 2, 5]]  # 2: unknown


BAD = {
    "no JSON": ("{oops", "not valid JSON"),
    "half a line": ('{"input_ids": [1, 2', "not valid JSON"),
    "a list": ("[1, 2, 3]", "must be a JSON object"),
    "a number": ("5", "must be a JSON object"),
    "null": ("null", "must be a JSON object"),
    "nested too deeply": ("[" * 100_000, "not valid JSON"),
    "nothing": ("{}", "found nothing; needed are 'text'"),
    "unknown keys": ({"txt": "a"}, "found 'txt'; needed are 'text'"),
    "prompt alone": ({"prompt": "i4"}, "found 'prompt'"),
    "text is a number": ({"text": 5}, "found 'text'"),
    "completion is null": ({"prompt": "i4", "completion": None}, "found 'prompt', 'completion'"),
    "ids are text": ({"input_ids": "abc"}, "list of integers"),
    "ids are floats": ({"input_ids": [1.0, 2.0]}, "list of integers"),
    "ids are booleans": ({"input_ids": [True, False]}, "list of integers"),
    "ids are nested": ({"input_ids": [[1, 2]]}, "list of integers"),
    "ids are negative": ({"input_ids": [1, -5]}, "integers >= 0"),
    "ids are huge": ({"input_ids": [1, 10**30]}, "1000000000000000000000000000000"),
    "no id": ({"input_ids": []}, "list of integers"),
    "one id": ({"input_ids": [7]}, "at least 2 tokens, this has 1"),
    "empty text": ({"text": ""}, "at least 2 tokens, this has 1"),
    "too few groups": ({"input_ids": [1, 2], "token_groups": [0]}, "each of the 2 tokens"),
    "too many groups": ({"input_ids": [1, 2], "token_groups": [0, 0, 1]}, "each of the 2"),
    "group 2": ({"input_ids": [1, 2], "token_groups": [0, 2]}, "0, 1 or -1"),
    "group -2": ({"input_ids": [1, 2], "token_groups": [0, -2]}, "integers >= -1"),
    "groups are text": ({"input_ids": [1, 2], "token_groups": "01"}, "list of integers"),
    "groups of text": ({"text": "i4 i5", "token_groups": [0, 0]}, "each of the 3 tokens"),
}


@pytest.mark.parametrize("what", list(BAD))
def test_a_malformed_line_is_named(tmp_path, what):
    line, message = BAD[what]
    path = written(tmp_path, {"input_ids": [1, 2]}, "", line, {"input_ids": [3, 4]})
    with pytest.raises(uf.UcanError, match=re.escape(f"{path}:3:")) as refusal:
        read_jsonl(path, tokenizer())
    assert message in str(refusal.value)


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"input_ids": [1, 2]}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(uf.UcanError, match=re.escape(f"{path}:2")):
        read_jsonl(path, tokenizer())


def test_token_ids_beyond_the_vocabulary_are_named(tmp_path):
    path = written(tmp_path, {"input_ids": [1, 39]}, {"input_ids": [1, 40]})
    with pytest.raises(uf.UcanError, match=re.escape(f"{path}:2:") + ".* 40.*vocabulary"):
        read_jsonl(path, None, vocabulary=40)
    assert len(read_jsonl(path, None, vocabulary=41)) == 1


def test_text_without_a_tokenizer(tmp_path):
    path = written(tmp_path, {"input_ids": [1, 2]}, {"text": "i4 i5"})
    with pytest.raises(uf.UcanError, match=re.escape(f"{path}:2:") + ".*needs a tokenizer"):
        read_jsonl(path, None)


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_a_file_without_a_line(tmp_path, content):
    path = tmp_path / "set.jsonl"
    path.write_text(content)
    with pytest.raises(uf.UcanError, match=r"set\.jsonl holds no line"):
        read_jsonl(path, None)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(uf.UcanError, match=r"none\.jsonl does not exist"):
        read_jsonl(tmp_path / "none.jsonl", None)
    with pytest.raises(uf.UcanError, match="cannot be read"):
        read_jsonl(tmp_path, None)
