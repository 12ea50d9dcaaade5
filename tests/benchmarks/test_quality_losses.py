"""Losses of one side of a batch, against one unpadded sequence at a time in fp64."""

from __future__ import annotations

import pytest
import torch
from helpers_models import t5

from benchmarks.quality.case import lora_weights
from benchmarks.quality.losses import kl, logits, mean_nll, read, sequence_nll
from benchmarks.quality.training import Reference, differentiable, gradients
from ucan_fast.batches import FORGET, RETAIN
from ucan_fast.errors import UcanError
from ucan_fast.evaluation import group_loss

from .quality_case import (
    forget_batches,
    loop_gradients,
    loop_mean,
    loop_nll,
    retain_batches,
    scored_rows,
    tiny_model,
)

# Llama's norms and rotations are in fp32 even in an fp64 model; they see absolute positions.
EXACT = 1e-6
GROUPS = [(FORGET,), (RETAIN,), (FORGET, RETAIN)]


@pytest.fixture
def model():
    return tiny_model(torch.float64)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("groups", GROUPS)
def test_mean_nll_and_its_gradient_are_those_of_single_sequences(model, side, groups):
    for batch in forget_batches(side):
        (scored,) = read(model, [batch], *groups)
        expected = loop_mean(model, batch, *groups)
        assert mean_nll(model, scored).item() == pytest.approx(expected.item(), rel=EXACT)
        oracle = loop_gradients(model, lambda b=batch: loop_mean(model, b, *groups))
        weights = lora_weights(model)
        with differentiable(weights):
            found = gradients(mean_nll(model, scored), weights)
        for name, gradient in found.items():
            error = (gradient - oracle[name]).norm() / oracle[name].norm()
            assert error < EXACT


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("group", [FORGET, RETAIN])
def test_sequence_nll_is_the_sum_over_each_sequence_that_has_a_label(model, side, group):
    for batch in forget_batches(side):
        # The first sequence has nothing of the group any more.
        batch["token_groups"][0] = 1 - group
        (scored,) = read(model, [batch], group)
        sums = [nll.sum().item() for nll in loop_nll(model, batch, group)]
        assert 1 <= len(sums) < len(batch["input_ids"])
        assert sequence_nll(model, scored).tolist() == pytest.approx(sums, rel=EXACT)


@pytest.mark.parametrize("side", ["right", "left"])
def test_kl_is_from_the_reference_to_the_model(model, side):
    weights = lora_weights(model)
    reference = Reference(model, weights)
    batch = retain_batches(side)[0]
    (scored,) = read(model, [batch], RETAIN)
    assert kl(reference, model, scored).item() == 0.0
    before = torch.cat([part for part, _ in scored_rows(model, batch, RETAIN)]).detach()
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(-2)
    after = torch.cat([part for part, _ in scored_rows(model, batch, RETAIN)]).detach()
    terms = []
    for row_p, row_q in zip(before, after, strict=True):
        p, q = row_p.softmax(-1), row_q.softmax(-1)
        terms.append(float((p * (p / q).log()).sum()))
    found = kl(reference, model, scored).item()
    assert found == pytest.approx(sum(terms) / len(terms), rel=EXACT)
    assert found != pytest.approx(kl(model, reference, scored).item(), rel=1e-4)


@pytest.mark.parametrize(("group", "name"), [(FORGET, "forget"), (RETAIN, "retain")])
def test_what_is_scored_is_what_the_package_scores(model, group, name):
    batches = forget_batches()
    scored = read(model, batches, group)
    expected = group_loss(model, batches, name)
    assert sum(part.labels.numel() for part in scored) == expected.tokens
    total = sum(mean_nll(model, part).item() * part.labels.numel() for part in scored)
    assert total == pytest.approx(expected.nll, rel=1e-6)


def test_labels_and_groups_do_not_reach_the_model_and_batches_without_a_label_are_dropped(model):
    empty = forget_batches()[0]
    empty["token_groups"].fill_(RETAIN)
    scored = read(model, [empty, *forget_batches()], FORGET)
    assert len(scored) == 2
    assert all(set(part.inputs) == {"input_ids", "attention_mask"} for part in scored)
    # No token_groups: all retain.
    del empty["token_groups"]
    assert len(read(model, [empty], RETAIN)) == 1
    with pytest.raises(UcanError, match=r"forget \(0\)"):
        read(model, [empty], FORGET)


def test_logits_of_a_16_bit_model_are_scored_in_fp32():
    model = tiny_model(torch.bfloat16)
    (scored,) = read(model, forget_batches()[:1], FORGET)
    assert logits(model, scored).dtype == torch.float32


def test_an_encoder_decoder_is_refused():
    batch = forget_batches()[0]
    with pytest.raises(UcanError, match="decoder-only"):
        read(t5(), [{**batch, "decoder_input_ids": batch["input_ids"]}], FORGET)
