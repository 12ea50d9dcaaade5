"""Membership inference against pairs counted one by one and single sequences in fp64."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable

import pytest
import torch
from helpers_models import lora, t5, token_batch
from trained_model import (
    MEMBERS,
    forget_batches,
    memorised,
    not_memorised,
    random_batches,
    retain_batches,
    scored_logits,
    trained,
)

import ucan_fast as uf
from ucan_fast import evaluation
from ucan_fast.membership import (
    ATTACKS,
    MIN_SEQUENCES,
    Auc,
    auc,
    membership_auc,
    privleak,
    sequence_scores,
)

Z = 1.959963984540054


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The AUC and its interval


def wins(member: float, nonmember: float) -> float:
    return 1.0 if member < nonmember else 0.5 if member == nonmember else 0.0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [4, 10_000])
def test_auc_counts_pairs(seed, levels):
    draw = random.Random(seed)
    members = [draw.randrange(levels) / levels for _ in range(5 + 7 * seed)]
    nonmembers = [draw.randrange(levels) / levels + 0.1 for _ in range(23 - 3 * seed)]
    value = sum(wins(x, y) for x in members for y in nonmembers) / len(members) / len(nonmembers)
    found = auc(tensor(members), tensor(nonmembers))
    assert found.value == pytest.approx(value, rel=1e-12)
    assert (found.members, found.nonmembers) == (len(members), len(nonmembers))
    other = auc(tensor(nonmembers), tensor(members))
    assert other.value == pytest.approx(1 - value, rel=1e-12)


def newcombe(m: int, n: int) -> Callable[[float], float]:
    """Distance of an end of his interval from the AUC, by the end (his method 5)."""

    def distance(theta: float) -> float:
        k = (m + n) / 2 - 1
        spread = 1 + k * (1 - theta) / (2 - theta) + k * theta / (1 + theta)
        return Z * math.sqrt(theta * (1 - theta) * spread / (m * n))

    return distance


def test_low_scores_of_members_give_1():
    low, high = torch.arange(6.0), torch.arange(10.0, 17.0)
    assert auc(low, high).value == 1
    assert auc(high, low).value == 0
    assert auc(torch.cat([low, high]), torch.cat([low, high])).value == 0.5


def test_the_order_of_sequences_does_not_matter():
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, generator=draw), torch.randn(40, generator=draw) + 0.5
    found = auc(x, y)
    again = auc(x[torch.randperm(30, generator=draw)], y[torch.randperm(40, generator=draw)])
    for name in ("value", "low", "high"):
        assert getattr(again, name) == pytest.approx(getattr(found, name), rel=1e-12)


@pytest.mark.parametrize(("m", "n"), [(5, 5), (5, 60), (200, 300)])
@pytest.mark.parametrize("value", [1.0, 0.0, 0.5, 0.8])
def test_the_interval_is_newcombes(m, n, value):
    members, nonmembers = torch.full((m,), 1 - value), torch.full((n,), 0.5)
    if value == 0.8:
        members[: m // 5], members[m // 5 :] = 1.0, 0.0
    found = auc(members, nonmembers)
    distance = newcombe(m, n)
    assert found.value == pytest.approx(value, rel=1e-12)
    if value > 0:
        assert 0.01 < found.low < value - 0.005
        assert value - found.low == pytest.approx(distance(found.low), rel=1e-9)
    if value < 1:
        assert value + 0.005 < found.high < 0.99
        assert found.high - value == pytest.approx(distance(found.high), rel=1e-9)
    if value in (0.0, 1.0):
        assert (found.low if value == 0 else found.high) == value


@pytest.mark.parametrize(
    ("m", "n", "apart"), [(40, 60, 0.8), (40, 60, 0.0), (20, 20, 3.0), (10, 10, 2.0)]
)
def test_the_interval_covers_the_truth_about_95_times_in_100(m, n, apart):
    """Also where nearly all pairs are won."""
    draw = torch.Generator().manual_seed(0)
    truth = 0.5 * (1 + math.erf(apart / 2))  # Φ(d / √2)
    covered = 0
    for _ in range(400):
        x = torch.randn(m, generator=draw)
        y = torch.randn(n, generator=draw) + apart
        found = auc(x, y)
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 400 <= 0.99


@pytest.mark.parametrize(("m", "n"), [(1, 50), (50, 1), (0, 0), (MIN_SEQUENCES - 1, 50)])
def test_too_few_sequences_give_no_auc(m, n):
    with pytest.raises(uf.UcanError, match=f"there are {m} of the forget set and {n} of the"):
        auc(torch.zeros(m), torch.ones(n))
    assert auc(torch.zeros(MIN_SEQUENCES), torch.ones(MIN_SEQUENCES)).value == 1


def test_nan_is_refused_and_infinity_is_a_score():
    scores = torch.arange(6.0)
    for bad in ((scores / 0 * 0, scores), (scores, scores / 0 * 0)):
        with pytest.raises(uf.UcanError, match="not finite"):
            auc(*bad)
    assert auc(scores, torch.full((5,), math.inf)).value == 1


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((0.83, 0.75, 0.9), ["0.83 [0.75, 0.90]", "recognises", "83 of 100"]),
        ((0.5, 0.44, 0.56), ["0.50 [0.44, 0.56]", "cannot tell"]),
        ((0.3, 0.25, 0.4), ["0.30 [0.25, 0.40]", "less seen", "over-forgetting"]),
        ((0.5, 0.2, 0.8), ["cannot tell", "wide interval: 7 and 9 sequences"]),
    ],
)
def test_an_auc_says_what_it_means(interval, words):
    found = Auc(*interval, 7, 9)
    text = f"{found}: {found.meaning}"
    for word in words:
        assert word in text
    assert ("wide" in text) == (interval[2] - interval[1] > 0.2)


def test_privleak_is_negative_where_more_is_exposed_than_after_retraining():
    # ((1 - .75) - (1 - .5)) / (1 - .5)
    assert privleak(0.75, 0.5) == pytest.approx(-50, rel=1e-6)
    assert privleak(0.25, 0.5) == pytest.approx(50, rel=1e-6)
    assert privleak(0.6, 0.6) == 0
    assert math.isfinite(privleak(0.5, 1.0))


# The attacks


def oracle(model, batches: list[dict], group: str) -> list[dict[str, float]]:
    """Every attack on every sequence, by plain loops over tokens and vocabulary."""
    found = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            logits, labels = scored_logits(model, one, group)
            if not len(labels):
                continue
            losses, z = [], []
            for position, label in zip(logits, labels.tolist(), strict=True):
                log_p = position.log_softmax(-1).tolist()
                mean = sum(math.exp(v) * v for v in log_p)
                square = sum(math.exp(v) * v * v for v in log_p)
                losses.append(-log_p[label])
                z.append((log_p[label] - mean) / math.sqrt(max(square - mean**2, 1e-6)))
            least = max(1, len(losses) // 5)
            ids = b"".join(label.to_bytes(4, "little") for label in labels.tolist())
            found.append(
                {
                    "tokens": len(losses),
                    "loss": sum(losses) / len(losses),
                    "min-k": sum(sorted(losses)[-least:]) / least,
                    "min-k++": -sum(sorted(z)[:least]) / least,
                    "zlib": sum(losses) / len(losses) / len(zlib.compress(ids)),
                }
            )
    return found


def variant(batches: list[dict], kind: str) -> list[dict]:
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
            batch["token_groups"] = torch.randint(-1, 2, shape, generator=generator)
            batch["token_groups"][1] = -1  # a sequence without a scored token
        made.append(batch)
    return made


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["plain", "labels and groups"])
@pytest.mark.parametrize("group", ["forget", "retain"])
def test_attacks_are_those_of_single_sequences(side, kind, group):
    model = trained()
    batches = variant(forget_batches(side=side, count=10, length=16), kind)
    expected = oracle(model, batches, group)
    found = sequence_scores(model, batches, group)
    assert list(found.scores) == list(ATTACKS)
    assert found.tokens.tolist() == [one["tokens"] for one in expected]
    # More than one least likely token, so that a mean of several shows.
    assert kind != "plain" or max(found.tokens) >= 15
    for name in ATTACKS:
        assert found.scores[name].dtype == torch.float64
        assert found.scores[name].tolist() == pytest.approx(
            [one[name] for one in expected], rel=1e-4
        ), name
    total = sum(one["loss"] * one["tokens"] for one in expected)
    assert found.mean_nll == pytest.approx(total / sum(found.tokens.tolist()), rel=1e-5)


def test_only_tokens_of_the_group_count():
    """Of a user's history the deleted interactions alone are attacked."""
    model = trained()
    batch = forget_batches()[0]
    groups = torch.ones_like(batch["input_ids"])
    groups[:, 4:6] = 0
    found = sequence_scores(model, [{**batch, "token_groups": groups}])
    assert set(found.tokens.tolist()) == {2}


def test_of_the_holdout_set_group_0_counts():
    model, members = trained(), forget_batches()
    plain = retain_batches()
    marked = [{**b, "token_groups": torch.zeros_like(b["input_ids"])} for b in plain]
    assert membership_auc(model, members, marked) == membership_auc(model, members, plain)
    for batch in marked:
        batch["token_groups"][1::2] = 1
        batch["token_groups"][:, 8:] = -1
    found = membership_auc(model, members, marked)
    cut = [{k: v[::2, :8] for k, v in batch.items()} for batch in plain]
    expected = membership_auc(model, members, cut)
    for name in ATTACKS:
        assert found[name].nonmembers == 16
        assert found[name].value == pytest.approx(expected[name].value, abs=1e-12), name


@pytest.mark.parametrize("limit", [1, 3 * 12 * 4 * 40])
def test_padding_side_batch_order_and_slices_do_not_matter(monkeypatch, limit):
    model = trained()
    expected = sequence_scores(model, forget_batches(side="right"))
    right = membership_auc(model, forget_batches(side="right"), retain_batches())
    rows = []
    model.register_forward_hook(lambda _m, _x, y: rows.append(y.logits.shape[0]))
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", limit)
    shuffled = forget_batches(side="left")[::-1]
    found = sequence_scores(model, shuffled)
    assert max(rows) <= 3
    for name in ATTACKS:
        one, two = expected.scores[name].sort().values, found.scores[name].sort().values
        assert torch.allclose(one, two, rtol=1e-4), name
    left = membership_auc(model, shuffled, retain_batches(side="left")[::-1])
    for name in ATTACKS:
        assert left[name].value == pytest.approx(right[name].value, abs=1e-12)


def test_only_these_sequences():
    model = trained()
    batches = variant(forget_batches(), "labels and groups")
    everything = sequence_scores(model, batches)
    rows = []
    model.register_forward_hook(lambda _m, _x, y: rows.append(y.logits.shape[0]))
    wanted = [1, 4, len(everything.tokens) - 1]
    some = sequence_scores(model, batches, only=set(wanted))
    assert sum(rows) == 3
    assert torch.equal(some.tokens, everything.tokens[wanted])
    assert torch.allclose(some.scores["min-k++"], everything.scores["min-k++"][wanted], rtol=1e-4)


def test_batches_that_cannot_be_cut_have_the_same_sequences():
    model = trained()
    batches = forget_batches()
    batches[0]["token_groups"] = torch.zeros_like(batches[0]["input_ids"])
    batches[0]["token_groups"][1] = -1
    marked = [{**b, "of_the_caller": torch.arange(len(b["input_ids"]))} for b in batches]
    for only in (None, {0, 2, 5}):
        expected = sequence_scores(model, batches, only=only)
        whole = sequence_scores(model, marked, only=only)
        assert torch.equal(whole.tokens, expected.tokens)
        for attack in ATTACKS:
            torch.testing.assert_close(whole.scores[attack], expected.scores[attack])


def test_zlib_compresses_the_text_of_the_scored_tokens():
    model = trained()
    batches = variant(forget_batches(count=4, size=4), "labels")
    asked = []

    def decode(ids: list[int]) -> str:
        asked.append(ids)
        return "a film of Ærø, " * ids[0]

    found = sequence_scores(model, batches, attacks=("loss", "zlib"), decode=decode)
    assert list(found.scores) == ["loss", "zlib"]
    labels = [scored_logits(model, {k: v[r : r + 1] for k, v in batches[0].items()}, "forget")[1]
              for r in range(4)]  # fmt: skip
    assert asked == [one.tolist() for one in labels]
    for loss, value, ids in zip(*found.scores.values(), asked, strict=True):
        text = "a film of Ærø, " * ids[0]
        assert value == pytest.approx(float(loss) / len(zlib.compress(text.encode("utf-8"))))


def test_attacks_that_nobody_asks_for_are_not_computed(monkeypatch):
    from ucan_fast import membership

    def refuse(*_):
        raise AssertionError("not asked for")

    monkeypatch.setattr(membership, "token_z_scores", refuse)
    found = sequence_scores(trained(), forget_batches(), attacks=("min-k",))
    assert list(found.scores) == ["min-k"]


def test_encoder_decoder_models_are_attacked_at_their_labels():
    model = lora(t5())
    batch = token_batch([5, 9, 7])
    batch["labels"] = torch.randint(3, 40, (3, 6))
    batch["labels"][1, 4:] = -100
    batch["decoder_token_groups"] = torch.zeros(3, 6).long()
    batch["decoder_token_groups"][2, :4] = 1
    found = sequence_scores(model, [batch])
    assert found.tokens.tolist() == [6, 4, 2]
    loss = evaluation.group_loss(model, [batch], "forget")
    assert found.mean_nll == pytest.approx(loss.mean, rel=1e-6)


# What they show


def test_a_model_that_memorised_the_members_exposes_them():
    members, never_seen = random_batches(MEMBERS), random_batches(42)
    found = membership_auc(memorised(), members, never_seen)
    for name in ("loss", "min-k", "min-k++"):
        assert found[name].value > 0.97, name
        assert found[name].low > 0.9, name
    # Padding makes lengths, and so their compressed sizes, unequal: a weaker attack here.
    assert found["zlib"].low > 0.55
    assert "recognises" in found["loss"].meaning


def test_an_adapter_that_never_saw_them_does_not():
    found = membership_auc(not_memorised(), random_batches(MEMBERS), random_batches(42))
    for name in ATTACKS:
        assert found[name].low < 0.5 < found[name].high, name
        assert abs(found[name].value - 0.5) < 0.1, name


def test_members_less_seen_than_never_seen_data_give_less_than_half():
    found = membership_auc(memorised(), random_batches(42), random_batches(MEMBERS))
    assert found["loss"].high < 0.1
    assert "over-forgetting" in found["loss"].meaning


# Refusals


def test_bad_input_is_refused():
    model, batches = trained(), forget_batches()
    with pytest.raises(uf.UcanError, match="unknown attack 'gradient'; known: loss, min-k"):
        sequence_scores(model, batches, attacks=("loss", "gradient"))
    with pytest.raises(uf.UcanError, match="group must be"):
        sequence_scores(model, batches, "members")
    with pytest.raises(uf.UcanError, match="iterable of batches"):
        sequence_scores(model, batches[0])
    with pytest.raises(uf.UcanError, match="batch 1"):
        sequence_scores(model, [batches[0], {"input_ids": torch.ones(3).long()}])
    with pytest.raises(uf.UcanError, match="One user's deletion is one sequence"):
        membership_auc(model, [{k: v[:1] for k, v in batches[0].items()}], batches)


def test_nothing_scored_is_no_sequence():
    batch = forget_batches()[0]
    nothing = {**batch, "token_groups": torch.full_like(batch["input_ids"], -1)}
    found = sequence_scores(trained(), [nothing])
    assert len(found.tokens) == 0
    assert all(len(values) == 0 for values in found.scores.values())
    assert math.isnan(found.mean_nll)


def test_the_model_and_its_modes_stay_as_they_are():
    model = trained().train()
    modes = [m.training for m in model.modules()]
    outputs = []
    model.register_forward_hook(lambda _m, _x, y: outputs.append(y.logits.requires_grad))
    found = sequence_scores(model, forget_batches())
    assert [m.training for m in model.modules()] == modes
    assert not any(outputs)
    expected = sequence_scores(trained(), forget_batches())
    assert torch.equal(found.scores["loss"], expected.scores["loss"])


def test_a_default_device_changes_nothing():
    """``torch.set_default_device("cuda")``; meta tensors have no values at all."""
    expected = sequence_scores(trained(), forget_batches())
    model, batches = trained(), forget_batches()
    with torch.device("meta"):
        found = sequence_scores(model, batches)
    assert found.tokens.tolist() == expected.tokens.tolist()
    for attack, values in expected.scores.items():
        assert torch.equal(found.scores[attack], values), attack


def test_progress_counts_slices():
    seen = []
    sequence_scores(trained(), forget_batches(), progress=lambda *args: seen.append(args))
    assert [done for done, *_ in seen] == [0, 1, 2]
