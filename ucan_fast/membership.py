"""Membership inference: can an attacker tell forgotten sequences from never-seen ones?

A sample is one sequence: the tokens of its group that are scored. Every attack gives it a number
that is low where the model seems to know it. Members are the forget set, non-members a holdout
set that the adapter never saw. The AUC is the probability that a member scores lower than a
non-member, ties counting half: 1 means that members are fully exposed, 0.5 that they cannot be
told apart, and below 0.5 that they look *less* seen than never-seen data (over-forgetting, which
gives them away too).

An AUC tells two sets apart, whatever they differ in. The holdout set must be of the same kind as
the forget set: same source, similar lengths, the same tokens scored.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import UcanError
from .evaluation import evaluating, scored_slices
from .metrics import token_nll, token_z_scores
from .progress import Progress, track

#: The attacks, as in open-unlearning (locuslab/open-unlearning, src/evals/metrics/mia).
ATTACKS = ("loss", "min-k", "min-k++", "zlib")
#: Min-K and Min-K++ look at this share of a sequence's tokens, the least likely ones.
LEAST_LIKELY = 0.2
#: With fewer sequences on either side an AUC says nothing.
MIN_SEQUENCES = 5
# Of a normal distribution: two-sided 95 %.
_Z = 1.959963984540054

#: Text of token ids, such as ``tokenizer.decode``.
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class SequenceScores:
    """Attack scores of sequences, in the order of their batches.

    Attributes:
        tokens: int64 ``[S]``, scored tokens of every sequence.
        scores: attack -> fp64 ``[S]``; low where the model seems to know the sequence.
    """

    tokens: torch.Tensor
    scores: dict[str, torch.Tensor]

    @property
    def mean_nll(self) -> float:
        """Nats per token over all sequences (needs the attack "loss"); nan without any."""
        total = int(self.tokens.sum())
        return float((self.scores["loss"] * self.tokens).sum()) / total if total else math.nan


@dataclass(frozen=True)
class Auc:
    """An area under the ROC curve with its 95 % confidence interval.

    Attributes:
        value: 1: members fully exposed, 0.5: cannot be told apart, below: over-forgotten.
        low, high: ends of the interval.
        members, nonmembers: how many sequences of each it was computed from.
    """

    value: float
    low: float
    high: float
    members: int
    nonmembers: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def meaning(self) -> str:
        """One plain sentence."""
        if self.low > 0.5:
            text = (
                "the attacker recognises forget-set sequences: of one of them and a never-seen one "
                f"it picks the right one in {100 * self.value:.0f} of 100 cases"
            )
        elif self.high < 0.5:
            text = (
                "forget-set sequences look less seen than never-seen ones (over-forgetting), which "
                "gives them away too"
            )
        else:
            text = "the attacker cannot tell forget-set sequences from never-seen ones"
        if self.high - self.low > 0.2:
            text += f" (a wide interval: {self.members} and {self.nonmembers} sequences)"
        return text


def sequence_scores(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    group: str = "forget",
    *,
    attacks: Collection[str] = ATTACKS,
    decode: Decode | None = None,
    only: Collection[int] | None = None,
    progress: Progress = None,
) -> SequenceScores:
    """What every attack says of every sequence that has a scored token of the group.

    Which tokens are scored is said at :func:`ucan_fast.evaluation.group_loss`. With n of them:

    * ``"loss"``: their mean NLL, nats per token (Yeom et al., arXiv 1709.01604).
    * ``"min-k"``: the mean NLL of the max(1, ⌊0.2 n⌋) least likely ones (arXiv 2310.16789).
    * ``"min-k++"``: the same share of the lowest z-scores, their mean times -1 (arXiv 2404.02936);
      see :func:`ucan_fast.metrics.token_z_scores`.
    * ``"zlib"``: the mean NLL over the bytes of their compressed text (arXiv 2012.07805). Without
      ``decode`` the ids are compressed instead, as int32.

    Args:
        group: whose tokens; a batch without ``token_groups`` is all of this group.
        decode: the text of token ids, for ``"zlib"``.
        only: numbers of the sequences wanted, counted over all with a scored token; None: all.

    Raises:
        UcanError: an unknown attack, or a batch is malformed.
    """
    unknown = sorted(set(attacks) - set(ATTACKS))
    if unknown:
        raise UcanError(f"unknown attack {unknown[0]!r}; known: {', '.join(ATTACKS)}.")
    counts: list[int] = []
    scores: dict[str, list[float]] = {name: [] for name in attacks}
    with evaluating(model):
        slices = scored_slices(model, batches, group, only)
        for piece in track(slices, None, progress, f"attacks on the {group} group"):
            logits, labels = piece.run(model)
            sizes = piece.mask.sum(1).tolist()
            counts += sizes
            nll = token_nll(logits, labels).double().cpu().split(sizes)
            loss = [float(of_one.mean()) for of_one in nll]
            if "loss" in scores:
                scores["loss"] += loss
            if "min-k" in scores:
                scores["min-k"] += map(_mean_of_largest, nll)
            if "min-k++" in scores:
                z = token_z_scores(logits, labels).cpu().split(sizes)
                scores["min-k++"] += (_mean_of_largest(-of_one) for of_one in z)
            if "zlib" in scores:
                ids = labels.cpu().split(sizes)
                sized = zip(loss, ids, strict=True)
                scores["zlib"] += (value / _compressed(of_one, decode) for value, of_one in sized)
    return SequenceScores(
        torch.tensor(counts, dtype=torch.int64, device="cpu"),
        {
            name: torch.tensor(values, dtype=torch.float64, device="cpu")
            for name, values in scores.items()
        },
    )


def auc(members: torch.Tensor, nonmembers: torch.Tensor) -> Auc:
    """P(member scores lower than non-member) + P(tie) / 2, with a 95 % interval.

    The interval is Newcombe's (method 5, Statistics in Medicine 25, 2006, p. 559), which holds for
    small sets and near 0 and 1 too (``tests/test_membership.py`` counts how often it covers the
    truth). DeLong's is too narrow there, and claims certainty where both sets are fully apart.

    Args:
        members, nonmembers: scores ``[M]`` and ``[N]``, low where the model seems to know them.

    Raises:
        UcanError: fewer than 5 sequences on a side, or a score is NaN.
    """
    m, n = len(members), len(nonmembers)
    if min(m, n) < MIN_SEQUENCES:
        raise UcanError(
            f"an AUC needs at least {MIN_SEQUENCES} sequences on either side; there are {m} of the "
            f"forget set and {n} of the holdout set. One user's deletion is one sequence: what an "
            "attack says of it is no rate."
        )
    x, y = members.double().cpu(), nonmembers.double().cpu()
    if torch.isnan(x).any() or torch.isnan(y).any():
        raise UcanError("an attack score is NaN: the model's logits are not finite.")
    value = 1 - float(_share_below(y, x).mean())
    return Auc(value, _newcombe(value, m, n), 1 - _newcombe(1 - value, m, n), m, n)


def membership_auc(
    model: nn.Module,
    forget: Iterable[Mapping[str, Any]],
    holdout: Iterable[Mapping[str, Any]],
    *,
    attacks: Collection[str] = ATTACKS,
    decode: Decode | None = None,
    progress: Progress = None,
) -> dict[str, Auc]:
    """The AUC of every attack on the model as it is.

    Args:
        forget: members; of batches with ``token_groups`` the tokens of group 0.
        holdout: data that the adapter never saw; all of a plain batch, else group 0.

    Raises:
        UcanError: as :func:`sequence_scores` and :func:`auc`.
    """
    options = {"attacks": attacks, "decode": decode, "progress": progress}
    members = sequence_scores(model, forget, **options)
    nonmembers = sequence_scores(model, holdout, **options)
    return {name: auc(members.scores[name], nonmembers.scores[name]) for name in attacks}


def privleak(value: float, reference: float) -> float:
    """``((1 - AUC) - (1 - AUC_ref)) / ((1 - AUC_ref) + 1e-10) * 100``, in percent.

    As in open-unlearning, with the AUC of a retrained adapter as the reference. Negative: members
    are more exposed than after retraining; positive: less (over-forgetting); 0 is ideal.
    """
    return ((1 - value) - (1 - reference)) / ((1 - reference) + 1e-10) * 100


def _mean_of_largest(values: torch.Tensor) -> float:
    """Mean of the largest 20 %, rounded down, of at least one."""
    return float(values.topk(max(1, int(LEAST_LIKELY * len(values)))).values.mean())


def _compressed(ids: torch.Tensor, decode: Decode | None) -> int:
    if decode is None:
        content = ids.to(torch.int32).numpy().astype("<i4").tobytes()
    else:
        content = decode(ids.tolist()).encode()
    return len(zlib.compress(content))


def _share_below(values: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Of every point: the share of ``values`` below it, those equal to it counting half."""
    ordered = values.sort().values
    lower = torch.searchsorted(ordered, points, right=False)
    not_higher = torch.searchsorted(ordered, points, right=True)
    return (lower + not_higher).double() / (2 * len(values))


def _newcombe(value: float, m: int, n: int) -> float:
    """The lower end: θ < value with value - θ = z sqrt(V(θ)), by bisection."""
    k = (m + n) / 2 - 1
    low, high = 0.0, value
    for _ in range(60):
        theta = (low + high) / 2
        spread = 1 + k * (1 - theta) / (2 - theta) + k * theta / (1 + theta)
        variance = theta * (1 - theta) * spread / (m * n)
        if value - theta > _Z * math.sqrt(variance):
            low = theta
        else:
            high = theta
    return low
