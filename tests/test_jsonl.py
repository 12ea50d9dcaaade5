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
    with pytest.warns(uf.UcanWarning, match="2 of 2 sequences are longer than 3 tokens"):
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


def test_pairs_of_an_encoder_decoder_model(tmp_path):
    """The tokenizer's special tokens go to both sides; labels are padded on the right."""
    path = written(
        tmp_path,
        {"prompt": "i4 i5 i6", "completion": "i7"},
        {"prompt": "i8", "completion": "i9 i10"},
        {"input_ids": [5], "labels": [6, 7]},
    )
    for side in ("right", "left"):
        (batch,) = read_jsonl(path, tokenizer(side), encoder_decoder=True)
        right = side == "right"
        assert lists(batch) == {
            "input_ids": [
                [1, 4, 5, 6],
                [1, 8, 3, 3] if right else [3, 3, 1, 8],
                [5, 3, 3, 3] if right else [3, 3, 3, 5],
            ],
            "attention_mask": [
                [1, 1, 1, 1],
                [1, 1, 0, 0] if right else [0, 0, 1, 1],
                [1, 0, 0, 0] if right else [0, 0, 0, 1],
            ],
            "labels": [[1, 7, -100], [1, 9, 10], [6, 7, -100]],
        }


def test_the_end_token_comes_with_the_tokenizer(tmp_path):
    from tokenizers import processors

    words = tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    path = written(tmp_path, {"prompt": "i4 i5", "completion": "i7"})
    (batch,) = read_jsonl(path, words, encoder_decoder=True)
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([[4, 5, 2]], [[7, 2]])


def test_groups_and_truncation_of_both_sides(tmp_path):
    path = written(
        tmp_path,
        {"input_ids": [4, 5, 6], "labels": [7, 8]},
        {"input_ids": [4, 5, 6], "labels": [7, 8], "token_groups": [1, 0, -1]},
        {"input_ids": [4], "labels": [7, 8, 9], "decoder_token_groups": [0, -1, 1]},
        {
            "input_ids": [4],
            "labels": [7, 8, 9],
            "token_groups": [0],
            "decoder_token_groups": [0, 0, 1],
        },
    )
    with pytest.warns(uf.UcanWarning, match="4 of 4 sequences are longer than 2"):
        batches = [lists(b) for b in read_jsonl(path, None, max_length=2, encoder_decoder=True)]
    assert [b["labels"] for b in batches] == [[[7, 8]], [[8, 9]], [[7, 8]], [[8, 9]]]
    assert [b["input_ids"] for b in batches] == [[[5, 6]], [[4]], [[5, 6]], [[4]]]
    assert [b.get("token_groups") for b in batches] == [None, None, [[0, -1]], [[0]]]
    assert [b.get("decoder_token_groups") for b in batches] == [None, [[-1, 1]], None, [[0, 1]]]


def test_tokens_of_an_attention_mask_of_0_are_left_out(tmp_path):
    path = written(
        tmp_path,
        {"input_ids": [5, 6, 7, 0, 99], "attention_mask": [1, 1, 1, 0, 0]},
        {"input_ids": [0, 8, 9], "attention_mask": [0, 1, 1], "token_groups": [1, 0, 1]},
        {"input_ids": [8, 9], "attention_mask": [1, 1]},
    )
    first, second = map(lists, read_jsonl(path, None, vocabulary=40))
    assert first == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[5, 6, 7], [8, 9, -100]],
    }
    assert second["input_ids"] == second["labels"] == [[8, 9]]
    assert second["token_groups"] == [[0, 1]]
    # Of a pair it is the encoder's.
    path = written(
        tmp_path,
        {
            "input_ids": [0, 5, 6],
            "attention_mask": [0, 1, 1],
            "token_groups": [0, 1, 0],
            "labels": [7, 8, 9],
            "decoder_token_groups": [0, 0, 1],
        },
    )
    (batch,) = read_jsonl(path, None, encoder_decoder=True)
    assert lists(batch) == {
        "input_ids": [[5, 6]],
        "attention_mask": [[1, 1]],
        "token_groups": [[1, 0]],
        "labels": [[7, 8, 9]],
        "decoder_token_groups": [[0, 0, 1]],
    }


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input_ids": [1, 2]}\n{"input_ids": [3, 4]}\n')
    (batch,) = read_jsonl(path, None)
    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"input_ids": [4], "labels": [5], "decoder_groups": [0]},
            "unknown key 'decoder_groups'; beside 'input_ids' + 'labels' a line may hold "
            "'attention_mask', 'token_groups', 'decoder_token_groups'.",
        ),
        (
            {"prompt": "i4", "completion": "i5", "labels": [6]},
            "'labels' beside 'prompt' + 'completion': these are two kinds of line",
        ),
        ({"prompt": "i4", "completion": "i5", "attention_mask": [1, 1]}, "unknown key 'att"),
        ({"prompt": "i4", "completion": "\ud83d"}, "the text holds \\ud83d, one half"),
        ({"text": "i4 i5"}, "found 'text'; an encoder-decoder model reads one sequence"),
        ({"input_ids": [4, 5]}, "needed are 'prompt' + 'completion', or 'input_ids' + 'labels'"),
        ({"input_ids": [4], "labels": [-1, 5]}, "labels must be token ids, or -100"),
        ({"input_ids": [4], "labels": []}, "labels must be a list"),
        ({"input_ids": [4], "labels": [40]}, "token id 40 is beyond"),
        (
            {"input_ids": [4, 5], "labels": [5], "decoder_token_groups": [0, 0]},
            "decoder_token_groups must hold 0, 1 or -1 for each of the 1 tokens",
        ),
        ({"input_ids": [4], "labels": [5, 6], "token_groups": [0, 0]}, "each of the 1 tokens"),
        ([4], "must be a JSON object with 'prompt'"),
    ],
)
def test_a_malformed_pair_is_named(tmp_path, line, message):
    path = written(tmp_path, {"input_ids": [1], "labels": [2]}, line)
    with pytest.raises(uf.UcanError, match=re.escape(f"{path}:2:")) as refusal:
        read_jsonl(path, tokenizer(), vocabulary=40, encoder_decoder=True)
    assert message in str(refusal.value)


def test_a_side_without_a_token_is_named(tmp_path):
    from tokenizers import processors

    words = tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    path = written(tmp_path, {"prompt": "i4", "completion": ""})
    with pytest.raises(uf.UcanError, match=r"set\.jsonl:1: labels of this line have no token"):
        read_jsonl(path, words, encoder_decoder=True)


BAD = {
    "labels": ({"input_ids": [1, 2], "labels": [1, 2]}, "'labels' is for encoder-decoder models"),
    "decoder groups": (
        {"text": "i4 i5", "decoder_token_groups": [0, 0, 0]},
        "'decoder_token_groups' is for encoder-decoder",
    ),
    "misspelt groups": (
        {"input_ids": [1, 2], "token_group": [1, 0]},
        "unknown key 'token_group'; beside 'input_ids' a line may hold 'attention_mask', "
        "'token_groups'. Mend its name",
    ),
    "two unknown keys": ({"text": "i4 i5", "user": 7, "id": 1}, "unknown key 'user', 'id'; beside"),
    "ids and text": ({"input_ids": [1, 2], "text": "i4"}, "'text' beside 'input_ids': these are"),
    "ids and a prompt": (
        {"input_ids": [1, 2], "prompt": "i4", "completion": "i5"},
        "'prompt', 'completion' beside 'input_ids': these are two kinds of line",
    ),
    "text and a prompt": ({"text": "i4 i5", "prompt": "i4"}, "'prompt' beside 'text': these"),
    "a mask of text": ({"text": "i4 i5", "attention_mask": [1, 1, 1]}, "unknown key 'attention_"),
    "a short mask": ({"input_ids": [1, 2], "attention_mask": [1]}, "for each of the 2 tokens"),
    "mask 2": ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "must hold 0 or 1"),
    "mask -1": ({"input_ids": [1, 2], "attention_mask": [1, -1]}, "integers >= 0"),
    "mask is null": ({"input_ids": [1, 2], "attention_mask": None}, "attention_mask must be a li"),
    "all masked": (
        {"input_ids": [1, 2], "attention_mask": [0, 0]},
        "at least 2 tokens, this has 0",
    ),
    "groups of the unmasked": (
        {"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0], "token_groups": [0, 0]},
        "each of the 3 tokens",
    ),
    "half a character": ({"text": "i4 \ud83d i5"}, "the text holds \\ud83d, one half of a pair"),
    "half in a prompt": ({"prompt": "\udc00", "completion": "i5"}, "the text holds \\udc00"),
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


def test_labels_of_pairs_may_be_unscored_in_part(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"input_ids": [4, 5], "labels": [7, -100]}\n')
    (batch,) = read_jsonl(path, None, encoder_decoder=True)
    assert batch["labels"].tolist() == [[7, -100]]
    for labels in ("[-100]", "[7, -1]"):
        path.write_text(f'{{"input_ids": [4, 5], "labels": {labels}}}\n')
        with pytest.raises(uf.UcanError, match=r"pairs.jsonl:1: labels"):
            read_jsonl(path, None, encoder_decoder=True)
