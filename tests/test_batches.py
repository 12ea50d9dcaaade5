"""Batches: whose token is whose, and which batches are refused (by their index)."""

from __future__ import annotations

import warnings

import helpers_models as hm
import pytest
import torch
import transformers
from torch import nn

import ucan_fast as uf
from ucan_fast.batches import eval_mode, group_index, read_batches, reusable


@pytest.fixture(scope="module")
def model():
    return hm.lora(hm.llama(layers=1))


@pytest.fixture(scope="module")
def two_sided():
    return hm.lora(hm.t5())


def groups(model, batch, group="retain"):
    (read,) = read_batches(model, [batch], group)
    return read.groups.tolist()


IDS = torch.tensor([[5, 6, 7], [8, 9, 4]])
MASK = torch.tensor([[1, 1, 1], [0, 1, 1]])
G = torch.tensor([[0, 1, -1], [0, 0, 1]])


def test_groups_written_out(model):
    assert groups(model, {"input_ids": IDS}) == [[1, 1, 1], [1, 1, 1]]
    assert groups(model, {"input_ids": IDS}, "forget") == [[0, 0, 0], [0, 0, 0]]
    masked = {"input_ids": IDS, "attention_mask": MASK}
    assert groups(model, masked) == [[1, 1, 1], [-1, 1, 1]]
    given = {**masked, "token_groups": G}
    assert groups(model, given) == [[0, 1, -1], [-1, 0, 1]]
    assert groups(model, given, "forget") == [[0, 1, -1], [-1, 0, 1]]
    assert groups(model, {**masked, "token_groups": None}) == [[1, 1, 1], [-1, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype(model, dtype):
    assert groups(model, {"input_ids": IDS, "token_groups": G.to(dtype)}) == G.tolist()


def test_unsigned_groups(model):
    """-1 is no number of theirs, 255 no group."""
    given = G.clamp_min(0).to(torch.uint8)
    assert groups(model, {"input_ids": IDS, "token_groups": given}) == [[0, 1, 0], [0, 0, 1]]
    wrapped = {"input_ids": IDS, "token_groups": G.to(torch.uint8)}
    refused(model, [wrapped], "torch.uint8 in [0, 255]")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_every_mask_dtype(model, dtype):
    batch = {"input_ids": IDS, "attention_mask": MASK.to(dtype)}
    assert groups(model, batch) == [[1, 1, 1], [-1, 1, 1]]


def test_ours_are_taken_out_and_the_rest_goes_to_the_model(model):
    batch = {"input_ids": IDS, "token_groups": G, "labels": IDS, "position_ids": MASK, "flag": 3}
    (read,) = read_batches(model, [batch], "retain")
    assert set(read.inputs) == {"input_ids", "labels", "position_ids", "flag"}
    assert read.inputs["flag"] == 3
    assert set(read.forward_inputs()) == {"input_ids", "position_ids", "flag"}
    assert set(batch) == {"input_ids", "token_groups", "labels", "position_ids", "flag"}


def test_tokenizer_output_is_a_batch(model):
    batch = transformers.BatchEncoding({"input_ids": IDS, "attention_mask": MASK})
    assert groups(model, batch) == [[1, 1, 1], [-1, 1, 1]]


def test_embeddings_instead_of_ids(model):
    batch = {"inputs_embeds": torch.randn(2, 3, 16), "attention_mask": MASK}
    assert groups(model, batch) == [[1, 1, 1], [-1, 1, 1]]


def test_an_empty_batch_is_no_crash(model):
    empty = torch.zeros(0, 4, dtype=torch.int64)
    assert groups(model, {"input_ids": empty, "token_groups": empty}) == []


def test_batches_are_read_one_by_one(model):
    """Nothing is read ahead: data sets may be larger than memory."""
    pulled = []

    def source():
        for index in range(3):
            pulled.append(index)
            yield {"input_ids": IDS}

    reader = read_batches(model, source(), "retain")
    assert pulled == []
    next(reader)
    assert pulled == [0]


# ------------------------------------------------------------------ encoder-decoder


def sides(model, batch, group="retain"):
    (read,) = read_batches(model, [batch], group)
    return read.groups.tolist(), read.decoder_groups.tolist()


def test_decoder_groups_written_out(two_sided):
    source = {"input_ids": IDS, "attention_mask": MASK, "token_groups": G}
    encoder = [[0, 1, -1], [-1, 0, 1]]
    target = torch.tensor([[3, 4], [5, 6]])
    by_group = {**source, "decoder_input_ids": target}
    assert sides(two_sided, by_group) == (encoder, [[1, 1], [1, 1]])
    assert sides(two_sided, by_group, "forget") == (encoder, [[0, 0], [0, 0]])
    masked = {**by_group, "decoder_attention_mask": torch.tensor([[1, 0], [1, 1]])}
    assert sides(two_sided, masked) == (encoder, [[1, -1], [1, 1]])
    given = {**masked, "decoder_token_groups": torch.tensor([[0, 0], [-1, 0]])}
    assert sides(two_sided, given) == (encoder, [[0, -1], [-1, 0]])
    labels = {**source, "labels": torch.tensor([[3, 2, -100], [4, 3, 2]])}
    assert sides(two_sided, labels) == (encoder, [[1, 1, -1], [1, 1, 1]])
    assert sides(two_sided, {**labels, "decoder_input_ids": None})[1] == [[1, 1, -1], [1, 1, 1]]
    without_encoder = {"input_ids": IDS, "decoder_input_ids": target}
    assert sides(two_sided, without_encoder) == ([[1] * 3] * 2, [[1, 1], [1, 1]])


def test_labels_stay_where_the_decoder_is_built_from_them(two_sided):
    labels = {"input_ids": IDS, "labels": IDS}
    (read,) = read_batches(two_sided, [labels], "retain")
    assert "labels" in read.forward_inputs()
    (read,) = read_batches(two_sided, [{**labels, "decoder_input_ids": IDS}], "retain")
    assert "labels" not in read.forward_inputs()


# ------------------------------------------------------------------ refusals


def refused(model, batches, *words, group="retain"):
    with pytest.raises(uf.UcanError) as error:
        list(read_batches(model, batches, group))
    for word in words:
        assert word in str(error.value), str(error.value)


def test_refusals_name_the_batch(model, two_sided):
    good = {"input_ids": IDS}
    refused(model, [good, good, {"ids": IDS}], "batch 2", "input_ids")
    refused(model, [good, (IDS, MASK)], "batch 1", "tuple")
    refused(model, [{"input_ids": IDS.tolist()}], "batch 0", "list")
    refused(model, [{"input_ids": IDS[0]}], "batch 0", "(3,)")
    refused(model, [{**good, "attention_mask": MASK[:, :2]}], "attention_mask", "(2, 2)", "(2, 3)")
    refused(model, [{**good, "attention_mask": MASK[:, None, None, :]}], "(2, 1, 1, 3)", "2-D")
    refused(model, [good, {**good, "attention_mask": MASK.tolist()}], "batch 1", "a list", "2-D")
    refused(model, [{**good, "token_groups": G[:1]}], "token_groups", "(1, 3)", "(2, 3)")
    refused(model, [{**good, "token_groups": G.tolist()}], "token_groups", "list")
    refused(model, [{**good, "token_groups": G.float()}], "float32")
    refused(model, [{**good, "token_groups": G == 0}], "bool")
    refused(model, [{**good, "token_groups": G * 2}], "[-2, 2]")
    refused(model, [{**good, "decoder_token_groups": G}], "decoder_token_groups")
    refused(two_sided, [good], "decoder_input_ids", "labels")
    pair = {**good, "decoder_input_ids": IDS}
    refused(two_sided, [{**pair, "decoder_token_groups": G[:, :1]}], "decoder_token_groups")
    mask = MASK[:, :1]
    refused(two_sided, [{**pair, "decoder_attention_mask": mask}], "decoder_attention_mask")


def test_ids_that_are_not_embedded_are_named(model, two_sided):
    good = {"input_ids": IDS}
    for wrong in (hm.VOCAB, -1):
        ids = IDS.clone()
        ids[1, 2] = wrong
        words = ("batch 1: input_ids", f"token id {wrong},", "40 tokens, 0..39")
        refused(model, [good, {"input_ids": ids}], *words)
        refused(model, [good, {"input_ids": ids.int()}], *words)
        pair = {**good, "decoder_input_ids": ids}
        refused(two_sided, [pair], "batch 0: decoder_input_ids", f"id {wrong},")
        # The decoder's input is made of them.
        refused(two_sided, [{**good, "labels": ids}], "batch 0: labels", f"id {wrong},")
    for dtype in (torch.float32, torch.bool, torch.int16, torch.uint8):
        refused(model, [good, {"input_ids": IDS.to(dtype)}], "batch 1", "input_ids", str(dtype))


def test_ids_are_compared_with_what_the_model_embeds(model):
    batch = {"input_ids": torch.tensor([[5, 49]])}
    assert groups(hm.Wrapped(torch.nn.Identity(), 4), batch) == [[1, 1]]  # unknown
    saved = hm.lora(hm.llama(layers=1), modules_to_save=["embed_tokens"])
    refused(saved, [batch], "token id 49,")
    larger = hm.llama(layers=1)
    larger.resize_token_embeddings(50)
    larger.config.vocab_size = hm.VOCAB
    larger = hm.lora(larger)
    assert groups(larger, batch) == [[1, 1]]
    refused(larger, [{"input_ids": torch.tensor([[50]])}], "50 tokens, 0..49")
    base = hm.llama(layers=1)
    # PaliGemma and its kin put another id in the place of their image token's.
    base.config.image_token_id = 49
    base.config.pad_token_id = -1
    assert groups(base, batch) == [[1, 1]]
    refused(base, [{"input_ids": torch.tensor([[49, -1]])}], "token id -1,")
    embeddings = {"inputs_embeds": torch.full((1, 2, 16), 99.0)}
    assert groups(model, embeddings) == [[1, 1]]


@pytest.mark.parametrize(
    ("rows", "closing", "found"),
    [
        ([[5, 6, 0, 0], [5, 6, 7, 0]], None, 3),
        ([[0, 0, 5, 6], [0, 0, 0, 0]], None, 6),
        ([[5, 0, 6, 7], [5, 0, 0, 6]], None, 0),
        # What closes a sequence is no padding where it stands alone.
        ([[5, 6, 7, 0], [0, 5, 6, 7]], 0, 0),
        ([[5, 6, 0, 0], [5, 6, 7, 0]], [9, 0], 2),
    ],
)
def test_padding_without_a_mask_is_told(rows, closing, found):
    model = hm.llama(layers=1)
    model.config.pad_token_id, model.config.eos_token_id = 0, closing
    ids = torch.tensor(rows)
    mask, groups = torch.ones_like(ids), torch.ones_like(ids)
    silent = [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "token_groups": groups},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", uf.UcanWarning)
        list(read_batches(model, silent, "forget", tell_padding=True))
        list(read_batches(model, [{"input_ids": ids}], "forget"))
    batches = [*silent, {"input_ids": ids}, {"input_ids": ids}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", uf.UcanWarning)
        list(read_batches(model, batches, "forget", tell_padding=True))
    told = [str(warning.message) for warning in caught]
    assert len(told) == (found > 0)
    if found:
        assert told[0].startswith(f"batch 2 has no attention_mask, and {found} of its tokens")


@pytest.mark.parametrize("method", ["attenuate", "influence"])
def test_a_request_tells_of_padding_once_for_each_set(method):
    model = hm.lora(hm.llama())
    model.get_base_model().config.pad_token_id = 0
    ids = torch.randint(3, 30, (4, 8), generator=torch.Generator().manual_seed(0))
    ids[1, 5:] = 0
    forget, retain = [{"input_ids": ids}], [{"input_ids": ids + (ids > 0)}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", uf.UcanWarning)
        config = uf.UcanConfig(method=method, max_retain_loss_increase=0.1)
        uf.unlearn(model, forget=forget, retain=retain, config=config)
    told = [str(w.message) for w in caught if "padding" in str(w.message)]
    assert [("forget" in text, "3 of its tokens" in text) for text in told] == [
        (True, True),
        (False, True),
    ]


def test_one_batch_is_not_a_list_of_batches(model):
    for wrong in (None, 5):
        refused(model, wrong, "iterable of batches")
    for wrong in ({"input_ids": IDS}, IDS, "data.jsonl"):
        refused(model, wrong, "iterable of batches")
        with pytest.raises(uf.UcanError, match="forget"):
            reusable(wrong, "forget")


def test_group_names():
    assert (group_index("forget"), group_index("retain")) == (0, 1)
    for wrong in ("Forget", "both", "", 0, None):
        with pytest.raises(uf.UcanError, match="forget"):
            group_index(wrong)


# ------------------------------------------------------------------ reusable, eval_mode


def test_one_shot_iterators_are_kept_with_a_notice():
    with pytest.warns(uf.UcanWarning, match=r"retain.*one-shot.*3 batches"):
        kept = reusable(iter([1, 2, 3]), "retain")
    assert list(kept) == list(kept) == [1, 2, 3]
    with pytest.warns(uf.UcanWarning):
        kept = reusable((i for i in range(2)), "retain")
    assert list(kept) == list(kept) == [0, 1]


def test_what_can_be_read_again_is_left_as_it_is(recwarn):
    loader = torch.utils.data.DataLoader([1, 2])
    for batches in ([1, 2], (1, 2), loader):
        assert reusable(batches, "forget") is batches
    assert not [w for w in recwarn if issubclass(w.category, uf.UcanWarning)]


def test_eval_mode_gives_every_module_its_own_mode_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model.train()
    model[1][0].eval()
    before = [m.training for m in model.modules()]

    def broken_block():
        with eval_mode(model):
            assert not any(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        broken_block()
    assert [m.training for m in model.modules()] == before == [True, True, True, False, True]
