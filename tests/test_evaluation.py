"""group_loss and forget_shift against one unpadded sequence at a time, in fp64."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
import transformers
from helpers_models import VOCAB, llama, lora, t5, token_batch
from trained_model import (
    BAD_LABELS,
    GROUP,
    OTHER_MODELS,
    assert_same_weights,
    forget_batches,
    nll,
    retain_batches,
    scored_logits,
    trained,
    weights,
)

import ucan_fast as uf
from ucan_fast import evaluation
from ucan_fast.evaluation import forget_shift, group_loss


def variant(batches: list[dict], kind: str) -> list[dict]:
    """The batches with labels and / or token groups."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for batch in batches:
        batch = dict(batch)
        shape = batch["input_ids"].shape
        if "labels" in kind:
            labels = batch["input_ids"].clone()
            labels[torch.rand(shape, generator=generator) < 0.4] = -100
            batch["labels"] = labels
        if "groups" in kind:
            # All over, in the padding too: it is never scored.
            batch["token_groups"] = torch.randint(-1, 2, shape, generator=generator)
        made.append(batch)
    return made


KINDS = ["plain", "labels", "groups", "labels and groups"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", ["forget", "retain"])
def test_group_loss_is_the_sum_over_single_sequences(side, kind, group):
    model = trained()
    batches = variant(forget_batches(side=side), kind)
    parts = [scored_logits(model, batch, group) for batch in batches]
    loss = group_loss(model, batches, group)
    assert loss.tokens == sum(len(labels) for _, labels in parts) > 20
    assert loss.nll == pytest.approx(sum(nll(*part) for part in parts), rel=1e-5)
    assert loss.mean == pytest.approx(loss.nll / loss.tokens)
    assert loss.perplexity == pytest.approx(math.exp(loss.nll / loss.tokens))


def test_the_first_token_of_a_left_padded_sequence_is_not_predicted_from_padding():
    """Nothing stands before it, so both sides of padding score the same tokens."""
    model = trained()
    right = group_loss(model, forget_batches(side="right"), "forget")
    left = group_loss(model, forget_batches(side="left"), "forget")
    assert left.tokens == right.tokens
    assert left.nll == pytest.approx(right.nll, rel=1e-5)


@contextlib.contextmanager
def halved(model):
    """Every B times 0.5 (exact in floating point, and back)."""
    bs = [p for n, p in model.named_parameters() if "lora_B" in n]
    with torch.no_grad():
        for b in bs:
            b.mul_(0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            for b in bs:
                b.mul_(2)


@contextlib.contextmanager
def off(model):
    bs = [p for n, p in model.named_parameters() if "lora_B" in n]
    saved = [b.detach().clone() for b in bs]
    with torch.no_grad():
        for b in bs:
            b.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for b, value in zip(bs, saved, strict=True):
                b.copy_(value)


def edits(model) -> dict:
    return {"half": lambda: halved(model), "off": lambda: off(model)}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["plain", "labels and groups"])
def test_forget_shift(side, kind):
    model = trained()
    batches = variant(forget_batches(side=side), kind)
    parts = [scored_logits(model, batch, "forget") for batch in batches]
    p, labels = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    original = weights(model)
    before, shifts = forget_shift(model, batches, edits(model))
    assert_same_weights(model, original)
    assert before.tokens == len(labels)
    assert before.nll == pytest.approx(nll(p, labels), rel=1e-5)
    assert list(shifts) == ["half", "off"]
    for name, edit in edits(model).items():
        with edit():
            q = torch.cat([scored_logits(model, batch, "forget")[0] for batch in batches])
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        reverse = float((log_q.exp() * (log_q - log_p)).sum(-1).mean())
        assert abs(kl - reverse) > 1e-3 * kl  # else the direction would not show
        assert shifts[name].kl == pytest.approx(kl, rel=1e-4)
        changed = 100 * float((p.argmax(-1) != q.argmax(-1)).double().mean())
        assert shifts[name].prediction_shift == pytest.approx(changed)
        assert shifts[name].loss.tokens == len(labels)
        assert shifts[name].loss.nll == pytest.approx(nll(q, labels), rel=1e-5)
    assert shifts["off"].kl > shifts["half"].kl > 0
    assert shifts["off"].prediction_shift > 0


def pairs(side: str) -> list[dict]:
    """T5: encoder tokens padded on either side, labels padded with -100 at the end."""
    generator = torch.Generator().manual_seed(8)
    batches = []
    for _ in range(2):
        ids = torch.randint(3, VOCAB, (4, 9), generator=generator)
        labels = torch.randint(3, VOCAB, (4, 6), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(4):
            mask[row, slice(9 - row, 9) if side == "right" else slice(0, row)] = 0
            labels[row, 6 - row :] = -100
        groups = torch.randint(-1, 2, labels.shape, generator=generator)
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": labels,
                "decoder_token_groups": groups,
            }
        )
    return batches


@pytest.mark.parametrize("group", ["forget", "retain"])
@pytest.mark.parametrize("grouped", [True, False])
def test_encoder_decoder_models_score_decoder_tokens(group, grouped):
    model = lora(t5())
    batches = pairs("right")
    if not grouped:
        batches = [{k: v for k, v in b.items() if k != "decoder_token_groups"} for b in batches]
    oracle = copy.deepcopy(model).double()
    total, count = 0.0, 0
    for batch in batches:
        for row in range(4):
            there = batch["attention_mask"][row].bool()
            labels = batch["labels"][row]
            real = labels != -100
            with torch.no_grad():
                logits = oracle(
                    input_ids=batch["input_ids"][row][there][None], labels=labels[real][None]
                ).logits[0]
            for t in range(int(real.sum())):
                if not grouped or batch["decoder_token_groups"][row, t] == GROUP[group]:
                    total -= float(logits[t].log_softmax(-1)[labels[t]])
                    count += 1
    loss = group_loss(model, batches, group)
    assert loss.tokens == count > 5
    assert loss.nll == pytest.approx(total, rel=1e-5)


def test_an_encoder_decoder_model_needs_labels():
    batch = {"input_ids": torch.ones(1, 4).long(), "decoder_input_ids": torch.ones(1, 3).long()}
    with pytest.raises(uf.UcanError, match="labels"):
        group_loss(lora(t5()), [batch], "forget")


@pytest.mark.parametrize("limit", [1, 2 * 12 * 4 * VOCAB])
def test_slices_give_the_same_numbers(monkeypatch, limit):
    model = trained()
    batches = variant(forget_batches(side="left"), "labels and groups")
    loss = group_loss(model, batches, "forget")
    before, shifts = forget_shift(model, batches, edits(model))
    rows = []
    model.register_forward_hook(lambda _m, _x, y: rows.append(y.logits.shape[0]))
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", limit)
    sliced = group_loss(model, batches, "forget")
    assert max(rows) == (1 if limit == 1 else 2)
    assert sliced.tokens == loss.tokens
    assert sliced.nll == pytest.approx(loss.nll, rel=1e-6)
    before_sliced, shifts_sliced = forget_shift(model, batches, edits(model))
    assert before_sliced.nll == pytest.approx(before.nll, rel=1e-6)
    for name in shifts:
        assert shifts_sliced[name].kl == pytest.approx(shifts[name].kl, rel=1e-4)
        assert shifts_sliced[name].prediction_shift == shifts[name].prediction_shift
        assert shifts_sliced[name].loss.nll == pytest.approx(shifts[name].loss.nll, rel=1e-6)


def test_inputs_per_sequence_are_sliced_and_others_passed_on(monkeypatch):
    model = trained()
    batches = forget_batches(side="left")
    for batch in batches:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        batch["use_cache"] = False
    expected = group_loss(model, batches, "forget")
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 1)
    assert group_loss(model, batches, "forget").nll == pytest.approx(expected.nll, rel=1e-6)


def qwen2_vl() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "embed_dim": 16,
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 1,
        },
    )
    return lora(transformers.Qwen2VLForConditionalGeneration(config), targets=["q_proj", "k_proj"])


@pytest.mark.parametrize("count", [3, 4])
def test_batches_with_inputs_of_other_first_dimensions_are_run_whole(count, monkeypatch):
    """Positions of Qwen2-VL are [3, B, T]: with three sequences the wrong axis would be cut."""
    model, generator = qwen2_vl(), torch.Generator().manual_seed(1)
    ids = torch.randint(3, 38, (count, 8), generator=generator)
    places = torch.randint(0, 50, (3, count, 8), generator=generator)
    groups = torch.zeros_like(ids)
    groups[1] = -1
    nll = 0.0
    for row in (row for row in range(count) if row != 1):
        with torch.no_grad():
            one = model(input_ids=ids[row][None], position_ids=places[:, row][:, None]).logits[0]
        log_p = one[:-1].double().log_softmax(-1)
        nll -= float(log_p.gather(1, ids[row, 1:, None]).sum())
    batch = {"input_ids": ids, "position_ids": places, "token_groups": groups}
    rows = []
    model.register_forward_hook(lambda _m, _x, y: rows.append(len(y.logits)))
    for limit in (evaluation.LOGITS_BYTES, 1):
        monkeypatch.setattr(evaluation, "LOGITS_BYTES", limit)
        loss = group_loss(model, [batch], "forget")
        assert loss.tokens == 7 * (count - 1)
        assert loss.nll == pytest.approx(nll, rel=1e-5)
    assert rows == [count, count]


def test_positions_for_all_sequences_stay_as_they_are(monkeypatch):
    model = trained()
    batches = forget_batches()
    expected = group_loss(model, batches, "forget")
    length = batches[0]["input_ids"].shape[1]
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 1)
    rows = []
    model.register_forward_hook(lambda _m, _x, y: rows.append(len(y.logits)))
    shared = [{**batch, "position_ids": torch.arange(length)[None]} for batch in batches]
    assert group_loss(model, shared, "forget").nll == pytest.approx(expected.nll, rel=1e-6)
    assert set(rows) == {1}


@pytest.mark.parametrize("kind", list(OTHER_MODELS))
def test_models_that_predict_no_next_token_are_refused_by_name(kind):
    model = OTHER_MODELS[kind]()
    batch = token_batch([6, 4])
    with pytest.raises(uf.UcanError, match=f"{kind} cannot be scored: .*calibration=function"):
        group_loss(model, [batch], "forget")
    # What the message advises.
    result = uf.unlearn(
        model,
        forget=[batch],
        retain=[token_batch([5, 6], seed=1)],
        calibration=lambda m: m(**batch)[0].square().mean(),
        evaluate=False,
    )
    assert result.plan.attenuated


def test_embeddings_with_labels_are_scored():
    model = trained()
    batch = forget_batches()[0]
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
        "attention_mask": batch["attention_mask"],
    }
    with pytest.raises(uf.UcanError, match="input_ids or labels"):
        group_loss(model, [embedded], "forget")
    loss = group_loss(model, [{**embedded, "labels": batch["input_ids"]}], "forget")
    expected = group_loss(model, [batch], "forget")
    assert (loss.tokens, loss.nll) == (expected.tokens, pytest.approx(expected.nll, rel=1e-5))


@pytest.mark.parametrize("kind", list(BAD_LABELS))
def test_labels_that_cannot_be_scored_are_named(kind):
    change, match = BAD_LABELS[kind]
    first, second = forget_batches()
    second = {**second, "labels": change(second["input_ids"])}
    with pytest.raises(uf.UcanError, match=match):
        group_loss(trained(), [first, second], "forget")


def test_int32_batches_are_those_of_int64():
    model = trained()
    batches = [{**batch, "labels": batch["input_ids"]} for batch in forget_batches()]
    narrow = [{key: value.int() for key, value in batch.items()} for batch in batches]
    assert group_loss(model, narrow, "forget") == group_loss(model, batches, "forget")
    plain = [{key: b[key] for key in ("input_ids", "attention_mask")} for b in narrow]
    assert group_loss(model, plain, "forget") == group_loss(model, batches, "forget")


def nothing_scored() -> dict:
    batch = retain_batches()[0]
    return {**batch, "token_groups": torch.full_like(batch["input_ids"], -1)}


def test_nothing_scored_is_nan_and_runs_no_model():
    model = trained()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    loss = group_loss(model, [nothing_scored()], "retain")
    assert (loss.nll, loss.tokens) == (0.0, 0)
    assert math.isnan(loss.mean)
    assert math.isnan(loss.perplexity)
    before, shifts = forget_shift(model, [nothing_scored()], edits(model))
    assert before.tokens == 0
    assert math.isnan(shifts["half"].kl)
    assert math.isnan(shifts["half"].prediction_shift)
    assert not calls


def test_a_batch_without_a_scored_token_changes_nothing():
    model = trained()
    batches = forget_batches()
    with_idle = [batches[0], nothing_scored(), batches[1]]
    assert group_loss(model, with_idle, "forget") == group_loss(model, batches, "forget")
    assert forget_shift(model, with_idle, edits(model)) == forget_shift(
        model, batches, edits(model)
    )


def test_only_sequences_with_a_scored_token_are_run():
    model = trained()
    batch = forget_batches()[0]
    groups = torch.full_like(batch["input_ids"], -1)
    groups[2, 3] = 0
    rows = []
    model.register_forward_hook(lambda _m, _x, y: rows.append(y.logits.shape[0]))
    loss = group_loss(model, [{**batch, "token_groups": groups}], "forget")
    assert (loss.tokens, rows) == (1, [1])


def test_training_mode_dropout_and_gradients_stay_out():
    model = lora(llama(), lora_dropout=0.5)
    batches = forget_batches()
    expected = group_loss(model, batches, "forget")
    model.train()
    model.base_model.model.lm_head.eval()
    modes = [m.training for m in model.modules()]
    outputs = []
    model.register_forward_hook(lambda _m, _x, y: outputs.append(y.logits.requires_grad))
    assert group_loss(model, batches, "forget") == expected
    assert [m.training for m in model.modules()] == modes
    assert not any(outputs)


def test_progress_counts_slices():
    seen = []
    group_loss(trained(), forget_batches(), "forget", lambda *args: seen.append(args))
    assert [done for done, *_ in seen] == list(range(len(seen)))
    assert len(seen) == len(forget_batches()) + 1
    assert {text for *_, text in seen} == {"forget loss"}
