"""The metrics against values worked out by hand, and against loops that spell them out."""

from __future__ import annotations

import math

import pytest
import torch

from ucan_fast import metrics
from ucan_fast.errors import UcanError
from ucan_fast.metrics import (
    drop,
    kl_divergence,
    perplexity,
    prediction_shift,
    ranking_metrics,
    target_ranks,
    token_nll,
    token_z_scores,
    trade_off,
)

INF = math.inf


def logits_of(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


# ------------------------------------------------------------------------------- KL, shift, NLL


def test_kl_is_original_against_unlearned_averaged_over_positions():
    original = logits_of([0.5, 0.5], [0.9, 0.1])
    unlearned = logits_of([0.25, 0.75], [0.9, 0.1])
    # Position 1: .5 ln(.5/.25) + .5 ln(.5/.75); position 2: 0.
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(original, unlearned) == pytest.approx(first / 2, rel=1e-12)
    # The other way round is another number: .25 ln(.25/.5) + .75 ln(.75/.5).
    swapped = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert kl_divergence(unlearned, original) == pytest.approx(swapped / 2, rel=1e-12)
    assert abs(first - swapped) > 0.01


def test_kl_equals_the_formula_written_as_loops():
    torch.manual_seed(3)
    a, b = torch.randn(7, 11) * 3, torch.randn(7, 11) * 3
    total = 0.0
    for p in range(7):
        pa = [math.exp(x) for x in a[p].tolist()]
        pb = [math.exp(x) for x in b[p].tolist()]
        za, zb = sum(pa), sum(pb)
        total += sum(x / za * math.log((x / za) / (y / zb)) for x, y in zip(pa, pb, strict=True))
    assert kl_divergence(a, b) == pytest.approx(total / 7, rel=1e-10)


def test_z_scores_equal_the_formula_written_as_loops(monkeypatch):
    torch.manual_seed(4)
    logits, labels = torch.randn(7, 11) * 3, torch.randint(0, 11, (7,))
    expected = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total = sum(math.exp(x) for x in row)
        log_p = [x - math.log(total) for x in row]
        mean = sum(math.exp(v) * v for v in log_p)
        variance = sum(math.exp(v) * (v - mean) ** 2 for v in log_p)
        expected.append((log_p[label] - mean) / math.sqrt(variance))
    found = token_z_scores(logits, labels)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(metrics, "_CHUNK_ELEMENTS_CPU", 22)
    assert torch.equal(token_z_scores(logits, labels), found)
    assert len(token_z_scores(logits[:0], labels[:0])) == 0


def test_z_scores_by_hand_and_at_the_edges():
    # p = 3/4, 1/4: μ = -.75 a - .25 b, σ = sqrt(3) / 4 |a - b| for log p = a, b.
    a, b = math.log(0.75), math.log(0.25)
    logits = logits_of([0.75, 0.25], [0.75, 0.25], [0.5, 0.5])
    found = token_z_scores(logits, torch.tensor([0, 1, 0]))
    sigma = math.sqrt(3) / 4 * (a - b)
    assert found[0].item() == pytest.approx((a - (0.75 * a + 0.25 * b)) / sigma, rel=1e-12)
    assert found[1].item() == pytest.approx((b - (0.75 * a + 0.25 * b)) / sigma, rel=1e-12)
    assert found[2].item() == pytest.approx(0, abs=1e-9)  # σ = 0, held at 1e-3
    # A token that cannot come has no weight, and as a label the lowest score there is.
    logits = torch.tensor([[0.0, 1.0, -INF]] * 2, dtype=torch.float64)
    found = token_z_scores(logits, torch.tensor([1, 2]))
    assert found[0] == token_z_scores(logits[:1, :2], torch.tensor([1]))[0]
    assert found[1] == -INF
    assert math.isnan(token_z_scores(torch.tensor([[math.nan, 1.0]]), torch.tensor([1])))


@pytest.mark.parametrize("function", [token_nll, token_z_scores])
def test_labels_that_do_not_fit_are_refused(function):
    with pytest.raises(UcanError, match=rf"{function.__name__}: labels reach from -100 to 1"):
        function(torch.zeros(2, 3), torch.tensor([-100, 1]))
    with pytest.raises(UcanError, match=rf"{function.__name__}: logits \(2, 3\) and labels"):
        function(torch.zeros(2, 3), torch.tensor([1]))


def test_kl_ignores_a_constant_added_to_all_logits_and_is_zero_for_equal_models():
    logits = torch.randn(4, 9, dtype=torch.float64)
    assert kl_divergence(logits, logits) == 0.0
    assert kl_divergence(logits, logits + 5.0) == pytest.approx(0.0, abs=1e-12)


def test_kl_with_impossible_tokens():
    possible, impossible = logits_of([0.5, 0.5]), logits_of([1.0, 0.0])
    assert kl_divergence(impossible, possible) == pytest.approx(math.log(2), rel=1e-12)
    assert kl_divergence(possible, impossible) == INF


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kl_accumulates_in_double(dtype):
    """Differences of 1e-3 in a KL of 5e-7 would drown in single precision over many positions."""
    row = torch.tensor([1.0, 1.5, -2.0], dtype=dtype)
    a = row.repeat(20_000, 1)
    b = (row + torch.tensor([0.0, 0.125, 0.0], dtype=dtype)).repeat(20_000, 1)
    one = kl_divergence(a[:1], b[:1])
    assert kl_divergence(a, b) == pytest.approx(one, rel=1e-10)


def test_chunking_changes_nothing(monkeypatch):
    a, b = torch.randn(13, 5), torch.randn(13, 5)
    labels = torch.randint(0, 5, (13,))
    whole = kl_divergence(a, b), token_nll(a, labels)
    monkeypatch.setattr(metrics, "_CHUNK_ELEMENTS_CPU", 10)  # two positions at a time
    assert kl_divergence(a, b) == pytest.approx(whole[0], rel=1e-12)
    assert torch.equal(token_nll(a, labels), whole[1])


def test_kl_refuses_nan_empty_and_unequal_shapes():
    nan = torch.tensor([[0.0, math.nan]])
    with pytest.raises(UcanError, match="NaN"):
        kl_divergence(nan, torch.zeros(1, 2))
    with pytest.raises(UcanError, match=r"\(2, 3\) and \(2, 4\)"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(UcanError, match="at least one position"):
        kl_divergence(torch.zeros(0, 3), torch.zeros(0, 3))


def test_prediction_shift_counts_changed_argmaxes_in_percent():
    before = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 1.0]])
    after = torch.tensor([[1.0, 1.5], [0.0, 3.0], [0.0, 9.0], [2.0, 1.0]])
    assert prediction_shift(before, after) == 25.0
    assert prediction_shift(before, before) == 0.0
    assert prediction_shift(before, -before) == 100.0
    with pytest.raises(UcanError, match="NaN in 1 of 4 rows"):
        prediction_shift(before, before.clone().index_fill_(0, torch.tensor([2]), math.nan))
    with pytest.raises(UcanError):
        prediction_shift(before[:0], before[:0])


def test_perplexity():
    assert perplexity(3 * math.log(8), 3) == pytest.approx(8.0)
    assert perplexity(0.0, 5) == 1.0
    assert perplexity(1e6, 1) == INF
    with pytest.raises(UcanError, match="0 scored tokens"):
        perplexity(1.0, 0)


def test_token_nll_by_hand_and_its_limits():
    logits = logits_of([0.5, 0.25, 0.25], [0.1, 0.1, 0.8]).float()
    nll = token_nll(logits, torch.tensor([1, 2]))
    assert nll.dtype == torch.float32
    assert nll.tolist() == pytest.approx([math.log(4), -math.log(0.8)], rel=1e-6)
    assert token_nll(logits.bfloat16(), torch.tensor([1, 2])).dtype == torch.float32
    assert token_nll(logits[:0], torch.tensor([], dtype=torch.int64)).shape == (0,)
    with pytest.raises(UcanError, match="-100"):
        token_nll(logits, torch.tensor([0, -100]))
    with pytest.raises(UcanError, match=r"0\.\.2"):
        token_nll(logits, torch.tensor([0, 3]))
    with pytest.raises(UcanError, match=r"\[P, V\] and \[P\]"):
        token_nll(logits, torch.tensor([0]))


@pytest.mark.parametrize("function", [token_nll, token_z_scores])
def test_labels_of_every_integer_dtype(function):
    logits, labels = torch.randn(3, 5), torch.tensor([1, 4, 0])
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(function(logits, labels.to(dtype)), function(logits, labels))
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(UcanError, match=f"labels are {dtype}; expected integer"):
            function(logits, labels.clamp_max(1).to(dtype))


def test_token_nll_has_the_gradient_of_cross_entropy():
    logits = torch.tensor([[0.0, 0.0]], requires_grad=True)
    token_nll(logits, torch.tensor([1])).sum().backward()
    assert torch.allclose(logits.grad, torch.tensor([[0.5, -0.5]]))


# --------------------------------------------------------------------------------------- ranking


def test_ranks_by_hand_ties_count_against():
    scores = torch.tensor(
        [
            [0.9, 0.5, 0.7, 0.1],  # target 2: only item 0 is higher
            [0.5, 0.5, 0.5, 0.5],  # all tied: last
            [0.2, 0.8, 0.8, 0.8],  # target 1: tied with two others
            [0.1, 0.2, 0.3, 0.4],  # target 3: first
        ]
    )
    ranks = target_ranks(scores, torch.tensor([2, 0, 1, 3]))
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == [2, 4, 3, 1]


def test_excluded_items_do_not_count_and_the_target_always_does():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.7]])
    exclude = torch.tensor([[True, False, False, False]])
    assert target_ranks(scores, torch.tensor([2]), exclude).tolist() == [3]
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert target_ranks(scores, torch.tensor([2]), everything).tolist() == [1]
    minus_inf = torch.tensor([[-INF, 0.0, -INF]])
    assert target_ranks(minus_inf, torch.tensor([0])).tolist() == [3]


def test_ranks_equal_brute_force():
    generator = torch.Generator().manual_seed(5)
    # Coarse scores make many ties.
    scores = torch.randint(0, 6, (200, 17), generator=generator).float()
    target = torch.randint(0, 17, (200,), generator=generator)
    exclude = torch.rand(200, 17, generator=generator) < 0.3
    expected = []
    for c in range(200):
        own, rank = scores[c, target[c]], 1
        for i in range(17):
            if i != target[c] and not exclude[c, i]:
                rank += int(scores[c, i] > own) + int(scores[c, i] == own)
        expected.append(rank)
    assert target_ranks(scores, target, exclude).tolist() == expected


def test_ranks_refuse_bad_input():
    scores = torch.zeros(2, 3)
    with pytest.raises(UcanError, match="NaN in 1 of 2 rows"):
        target_ranks(torch.tensor([[0.0, 1.0], [0.0, math.nan]]), torch.tensor([0, 0]))
    with pytest.raises(UcanError, match="there are 3 items"):
        target_ranks(scores, torch.tensor([0, 3]))
    with pytest.raises(UcanError, match="expected bool"):
        target_ranks(scores, torch.tensor([0, 1]), torch.zeros(2, 3))
    with pytest.raises(UcanError, match=r"\[C, I\] and \[C\]"):
        target_ranks(scores, torch.tensor([0]))
    assert target_ranks(scores[:0], torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_ranking_metrics_of_known_rankings():
    got = ranking_metrics(torch.tensor([1, 3, 6, 11]))
    assert got["recall@5"] == pytest.approx(2 / 4)
    assert got["recall@10"] == pytest.approx(3 / 4)
    assert got["mrr@5"] == pytest.approx((1 + 1 / 3) / 4)
    assert got["mrr@10"] == pytest.approx((1 + 1 / 3 + 1 / 6) / 4)
    # 1/log2(2) = 1, 1/log2(4) = 0.5, 1/log2(7)
    assert got["ndcg@5"] == pytest.approx(1.5 / 4)
    assert got["ndcg@10"] == pytest.approx((1.5 + 1 / math.log2(7)) / 4)
    assert list(got) == ["recall@5", "mrr@5", "ndcg@5", "recall@10", "mrr@10", "ndcg@10"]


def test_rank_equal_to_k_is_a_hit_and_k_plus_one_is_not():
    assert ranking_metrics([5], ks=(5,))["recall@5"] == 1.0
    assert ranking_metrics([6], ks=(5,)) == {"recall@5": 0.0, "mrr@5": 0.0, "ndcg@5": 0.0}
    assert ranking_metrics([1] * 4, ks=(1,)) == {"recall@1": 1.0, "mrr@1": 1.0, "ndcg@1": 1.0}


def test_ranking_metrics_refuse_bad_input():
    with pytest.raises(UcanError, match="at least one rank"):
        ranking_metrics(torch.zeros(0, dtype=torch.int64))
    with pytest.raises(UcanError, match="count from 1"):
        ranking_metrics([0, 3])
    with pytest.raises(UcanError, match="K is 0"):
        ranking_metrics([1], ks=(0, 5))


# --------------------------------------------------------------------------------------- trade-off


def test_drop():
    assert drop(0.2, 0.1) == pytest.approx(50.0)
    assert drop(0.1, 0.2) == pytest.approx(-100.0)
    assert math.isnan(drop(0.0, 0.0))
    assert math.isnan(drop(0.0, 0.5))


def at10(recall: float, mrr: float, ndcg: float) -> dict[str, float]:
    return {"recall@10": recall, "mrr@10": mrr, "ndcg@10": ndcg}


def test_trade_off_of_the_specification_is_45():
    forget = at10(0.20, 0.10, 0.12), at10(0.10, 0.05, 0.06)
    retain = at10(0.100, 0.050, 0.060), at10(0.095, 0.0475, 0.057)
    assert trade_off(*forget, *retain) == pytest.approx(45.0)
    assert trade_off(*retain, *forget) == pytest.approx(-45.0)


def test_trade_off_averages_the_drops_of_the_three_metrics():
    # Forget drops 60, 30, 0 (mean 30); retain drops -10, 0, 20 (mean 10/3).
    forget = at10(0.5, 0.5, 0.5), at10(0.2, 0.35, 0.5)
    retain = at10(0.5, 0.5, 0.5), at10(0.55, 0.5, 0.4)
    assert trade_off(*forget, *retain) == pytest.approx(30 - 10 / 3)


def test_trade_off_degenerate_and_incomplete():
    zero, some = at10(0.0, 0.0, 0.0), at10(0.1, 0.1, 0.1)
    assert math.isnan(trade_off(zero, zero, some, some))
    assert trade_off(some, some, some, some) == 0.0
    with pytest.raises(UcanError, match="recall@5 is missing on the forget side"):
        trade_off(some, some, some, some, k=5)
