"""The metrics: how far an edit moved the model, and what it still ranks first.

Pure functions of tensors and numbers. KL divergence, prediction shift and perplexity say what
happened on the forget set; Recall, MRR and NDCG with their drop and the trade-off say what it did
to the recommendations. There is exactly one relevant item per case throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from .errors import UcanError

__all__ = [
    "drop",
    "kl_divergence",
    "perplexity",
    "prediction_shift",
    "ranking_metrics",
    "target_ranks",
    "token_nll",
    "trade_off",
]

# Elements of logits that are converted at a time, for any vocabulary: 2^22 in fp64 are 32 MiB. On a
# CPU 2 MiB: larger temporaries leave the cache, and their pages are mapped anew for each (three
# times the time).
_CHUNK_ELEMENTS = 1 << 22
_CHUNK_ELEMENTS_CPU = 1 << 18


def kl_divergence(original_logits: torch.Tensor, unlearned_logits: torch.Tensor) -> float:
    """Mean over positions of KL(original || unlearned), in nats.

    Both logits are `[P, V]`, any float dtype, and are turned into log-probabilities and summed in
    fp64. A token that the original gives probability 0 (logit -inf) contributes 0; one that only
    the unlearned model gives 0 makes the result infinite. UcanError: shapes differ, P = 0, or NaN.
    """
    _same_logits(original_logits, unlearned_logits, "kl_divergence")
    total = 0.0
    for rows in _row_chunks(original_logits):
        log_p = torch.log_softmax(original_logits[rows].detach().double(), dim=-1)
        log_q = torch.log_softmax(unlearned_logits[rows].detach().double(), dim=-1)
        p = log_p.exp()
        # 0 * (-inf - x) is NaN in floating point but 0 in the sum; a NaN of p must stay.
        terms = torch.where(p == 0, torch.zeros_like(p), p * (log_p - log_q))
        total += float(terms.sum())
    if math.isnan(total):
        raise UcanError(
            "kl_divergence: the logits contain NaN or +inf, or a position whose logits are all "
            "-inf; check the models' outputs before comparing them."
        )
    return total / original_logits.shape[0]


def prediction_shift(original_logits: torch.Tensor, unlearned_logits: torch.Tensor) -> float:
    """Percentage (0 to 100) of positions whose highest-scoring token changes.

    Both logits are `[P, V]`. UcanError: shapes differ, P = 0, or NaN.
    """
    _same_logits(original_logits, unlearned_logits, "prediction_shift")
    for logits in (original_logits, unlearned_logits):
        _refuse_nan(logits, "prediction_shift: the logits")
    changed = original_logits.argmax(dim=-1) != unlearned_logits.argmax(dim=-1)
    return 100.0 * int(changed.sum()) / changed.numel()


def perplexity(nll_sum: float, tokens: int) -> float:
    """exp(nll_sum / tokens), `nll_sum` in nats over `tokens` tokens; inf where that overflows.

    UcanError when `tokens` is not positive.
    """
    if tokens <= 0:
        raise UcanError(
            f"perplexity: {tokens} scored tokens; it is undefined without any. Check that the set "
            "has a token with an attended token before it."
        )
    try:
        return math.exp(nll_sum / tokens)
    except OverflowError:
        return math.inf


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[label] per position: fp32 `[P]`, in nats.

    `logits` is `[P, V]` in any float dtype (computed in fp32), `labels` `[P]` holds token ids of
    any integer dtype. Differentiable. UcanError: shapes do not fit or a label is outside of 0..V-1
    (drop -100 first).
    """
    check_labels(logits, labels, "token_nll")
    labels = labels.long()
    parts = [
        torch.nn.functional.cross_entropy(logits[rows].float(), labels[rows], reduction="none")
        for rows in _row_chunks(logits)
    ]
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)


def token_z_scores(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(log p(label) - μ) / σ per position: fp64 `[P]`, without a unit.

    μ and σ are the mean and the standard deviation of log p(token) over tokens drawn from p, the
    model's own distribution at that position (Min-K++, arXiv 2404.02936). `logits` is
    `[P, V]` in any float dtype (computed in fp64), `labels` `[P]` holds token ids. σ² is at least
    1e-6, as in open-unlearning: where all tokens are equally likely the score is 0. UcanError as
    for `token_nll`.
    """
    check_labels(logits, labels, "token_z_scores")
    labels = labels.long()
    parts = []
    for rows in _row_chunks(logits):
        log_p = torch.log_softmax(logits[rows].detach().double(), dim=-1)
        p = log_p.exp()
        # A token of probability 0 has no weight, but 0 * -inf is NaN; a NaN of p must stay.
        finite = torch.where(p == 0, torch.zeros_like(p), log_p)
        mean = (p * finite).sum(-1)
        variance = (p * (finite - mean[:, None]).square()).sum(-1).clamp_min(1e-6)
        label = log_p.gather(1, labels[rows][:, None]).squeeze(1)
        parts.append((label - mean) / variance.sqrt())
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float64)


def target_ranks(
    scores: torch.Tensor, target: torch.Tensor, exclude: torch.Tensor | None = None
) -> torch.Tensor:
    """Rank of each case's target item: 1 + items scored higher + *other* items tied with it.

    `scores` is `[C, I]`, `target` `[C]` the index of the relevant item, `exclude` a bool `[C, I]`
    of items that do not count (a user's history). The target's own entry in `exclude` is ignored.
    Returns int64 `[C]`, on the device of `scores`. Counting ties against the target means that a
    model which scores everything alike gets the last rank, never the first.

    UcanError: shapes do not fit, a target is out of range, or a score is NaN.
    """
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise UcanError(
            f"target_ranks: scores {tuple(scores.shape)} and target {tuple(target.shape)}; "
            "expected [C, I] and [C]."
        )
    if exclude is not None and (exclude.shape != scores.shape or exclude.dtype != torch.bool):
        raise UcanError(
            f"target_ranks: exclude is {exclude.dtype} {tuple(exclude.shape)}; expected bool "
            f"{tuple(scores.shape)}."
        )
    if target.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=scores.device)
    if not (int(target.min()) >= 0 and int(target.max()) < scores.shape[1]):
        raise UcanError(
            f"target_ranks: targets reach from {int(target.min())} to {int(target.max())}, but "
            f"there are {scores.shape[1]} items."
        )
    _refuse_nan(scores, "target_ranks: the scores")
    target = target.to(scores.device, torch.int64)[:, None]
    ahead = scores >= scores.gather(1, target)
    if exclude is not None:
        ahead &= ~exclude.to(scores.device)
    ahead.scatter_(1, target, False)
    return 1 + ahead.sum(dim=1)


def ranking_metrics(
    ranks: torch.Tensor | Sequence[int], ks: Sequence[int] = (5, 10)
) -> dict[str, float]:
    """Recall@K, MRR@K and NDCG@K as means over cases with one relevant item each, in [0, 1].

    `ranks` are 1-based. With h = [rank <= K]: recall = h, mrr = h / rank, ndcg = h / log2(1 + rank)
    (the ideal DCG is 1). Keys: "recall@5", "mrr@5", "ndcg@5", "recall@10", ... UcanError: no case,
    a rank below 1, or a K below 1.
    """
    ranks = torch.as_tensor(ranks)
    if ranks.ndim != 1 or ranks.numel() == 0:
        raise UcanError(
            f"ranking_metrics: ranks of shape {tuple(ranks.shape)}; a mean needs a list of at "
            "least one rank."
        )
    if int(ranks.min()) < 1:
        raise UcanError(f"ranking_metrics: a rank is {int(ranks.min())}; ranks count from 1.")
    if any(k < 1 for k in ks):
        raise UcanError(f"ranking_metrics: K is {min(ks)}; it must be at least 1.")
    ranks = ranks.double()
    metrics = {}
    for k in ks:
        hit = (ranks <= k).double()
        metrics[f"recall@{k}"] = float(hit.mean())
        metrics[f"mrr@{k}"] = float((hit / ranks).mean())
        metrics[f"ndcg@{k}"] = float((hit / torch.log2(1 + ranks)).mean())
    return metrics


def drop(before: float, after: float) -> float:
    """100 (before - after) / before, in percent; negative where the metric rose.

    NaN where `before` is 0: nothing could drop, and neither 0 nor 100 would be true.
    """
    return 100.0 * (before - after) / before if before else math.nan


def trade_off(
    forget_before: Mapping[str, float],
    forget_after: Mapping[str, float],
    retain_before: Mapping[str, float],
    retain_after: Mapping[str, float],
    k: int = 10,
) -> float:
    """Trade-off@K: mean drop on the forget side minus mean drop on the retain side, in points.

    Each mean is over the drops (percent) of Recall, MRR and NDCG @K; the arguments are what
    `ranking_metrics` returns. That the paper averages the three is our reading. NaN where a metric
    was 0 before. UcanError when a metric @K is missing.
    """

    def mean_drop(before: Mapping[str, float], after: Mapping[str, float], side: str) -> float:
        drops = []
        for name in (f"recall@{k}", f"mrr@{k}", f"ndcg@{k}"):
            if name not in before or name not in after:
                raise UcanError(
                    f"trade_off: {name} is missing on the {side} side; compute both with "
                    f"ranking_metrics(ranks, ks=({k},))."
                )
            drops.append(drop(before[name], after[name]))
        return sum(drops) / len(drops)

    return mean_drop(forget_before, forget_after, "forget") - mean_drop(
        retain_before, retain_after, "retain"
    )


def _same_logits(original: torch.Tensor, unlearned: torch.Tensor, name: str) -> None:
    if original.ndim != 2 or original.shape != unlearned.shape or original.numel() == 0:
        raise UcanError(
            f"{name}: logits {tuple(original.shape)} and {tuple(unlearned.shape)}; expected two "
            "of the same shape [P, V] with at least one position."
        )


def check_labels(
    logits: torch.Tensor,
    labels: torch.Tensor,
    name: str,
    ignored: str = "leave ignored positions (-100) out",
) -> None:
    """Refuse labels `[P]` that are no tokens of logits `[P, V]`.

    `name` begins the message, `ignored` ends it.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise UcanError(
            f"{name}: logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected "
            "[P, V] and [P]."
        )
    if not labels.numel():
        return
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise UcanError(f"{name}: labels are {labels.dtype}; expected integer token ids.")
    if not (int(labels.min()) >= 0 and int(labels.max()) < logits.shape[1]):
        raise UcanError(
            f"{name}: labels reach from {int(labels.min())} to {int(labels.max())}, but the "
            f"vocabulary is 0..{logits.shape[1] - 1}; {ignored}."
        )


def _refuse_nan(values: torch.Tensor, what: str) -> None:
    bad = torch.isnan(values).any(dim=-1)
    if bool(bad.any()):
        raise UcanError(
            f"{what} contain NaN in {int(bad.sum())} of {bad.numel()} rows (first: row "
            f"{int(bad.nonzero()[0, 0])}); check the model's outputs."
        )


def _row_chunks(logits: torch.Tensor) -> Iterator[slice]:
    elements = _CHUNK_ELEMENTS_CPU if logits.device.type == "cpu" else _CHUNK_ELEMENTS
    step = max(1, elements // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)
