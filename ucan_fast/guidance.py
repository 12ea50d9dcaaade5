"""Can activations tell a request's data from the rest? And what to do where they cannot.

Gradient methods measure no activations: of one step and of gates the advice goes by the size of the
forget set alone, of several steps by what is left of it where they ended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .batches import FORGET, RETAIN
from .errors import UcanError
from .stats import ActivationStats

#: Contrast beyond noise from which on attenuation is advised: chosen on four requests to one small
#: recommender (ml-100k). On another data set it was wrong more often than right (docs/quality.md).
SEPARABLE = 0.04
#: A larger share of all tokens is too much for any one-shot edit of ours: it forgot less than half.
LARGE_SHARE = 0.1
RECOMMENDATIONS = ("attenuate", "influence", "retrain")


@dataclass(frozen=True)
class Separability:
    """How far the mean activations of forget and retain set differ, over all neurons of a site.

    With a_g the mean ``|h_j|`` of group g, ``R_j = (a_f - a_r)/(a_f + a_r)``, the contrast that
    scores are made of (either sign):

    Attributes:
        contrast: root mean square of R over the neurons.
        noise: what it would be if both sets were drawn from one distribution: the root mean
            square of R's standard error (delta method), were its tokens independent. Those of one
            sequence are not: of a few sequences the true noise is a multiple of this, and
            :attr:`excess` is too large.
    """

    contrast: float
    noise: float

    @property
    def excess(self) -> float:
        """The contrast beyond sampling noise, ``sqrt(max(contrast² - noise², 0))``."""
        return math.sqrt(max(self.contrast**2 - self.noise**2, 0.0))


def separability(stats: ActivationStats, site: str = "input") -> Separability:
    """The contrast of the two groups of some statistics.

    Args:
        stats: with tokens of both groups.
        site: ``"input"`` (of ``"mlp"`` too), ``"rank"``, ``"output"`` or ``"layer"``.

    Raises:
        UcanError: the site was not measured, or a group is empty.
    """
    measured = []
    for name, sites in stats.layers.items():
        if site not in sites:
            raise UcanError(
                f"the statistics hold no {site!r} moments of {name}; collect with that site."
            )
        measured.append(sites[site])
    if not measured:
        raise UcanError("the statistics hold no layer.")
    counts = torch.stack([moments.count for moments in measured])
    for index, group in ((FORGET, "forget"), (RETAIN, "retain")):
        if not bool((counts[:, index] > 0).all()):
            name = list(stats.layers)[int((counts[:, index] <= 0).nonzero()[0])]
            raise UcanError(f"the {group} set is empty: {name} saw none of its tokens.")
    sizes = torch.tensor([moments.n for moments in measured], device="cpu")
    count = counts.T.repeat_interleave(sizes, dim=1)
    mean = torch.cat([moments.abs_sum for moments in measured], dim=1) / count
    square = torch.cat([moments.sq_sum for moments in measured], dim=1) / count
    # Of the mean: what its tokens vary by, over their number.
    variance = (square - mean.square()).clamp(min=0) / count
    total = mean.sum(0)
    # (A neuron that never fires is 0/0: the sets are alike there.)
    contrast = ((mean[FORGET] - mean[RETAIN]) / total).nan_to_num(0.0)
    # dR/da_f = 2 a_r / (a_f + a_r)², dR/da_r = -2 a_f / (a_f + a_r)².
    slopes = (2 * mean.flip(0) / total.square()).nan_to_num(0.0)
    error = (slopes.square() * variance).sum(0)
    return Separability(math.sqrt(float(contrast.square().mean())), math.sqrt(float(error.mean())))


@dataclass(frozen=True)
class Guidance:
    """What is to be expected of a request, from statistics, its size, or where steps ended.

    Attributes:
        recommendation: ``"attenuate"``: activations separate the sets, U-CAN has something to hold
            on to. ``"influence"``: they do not, a gradient step (preset ``"best"``) may; of
            several steps: they did. ``"retrain"``: they do not, and the forget set is a large part
            of all data; of several steps: they ended before it was forgotten.
        text: why, in words.
        separability: see there; None where no activations were measured (gradient methods).
        forget_share: of the tokens in the statistics. Where D_r is a sample of the retained data
            it is too large, and with it the advice to retrain: a bank holds all of them. Earlier
            requests (``previous=``) count.
        still_known: share of this request's forget positions that several steps left better known
            than their references (:class:`ucan_fast.InfluenceWalk`); None of other methods.
    """

    recommendation: str
    text: str
    separability: Separability | None
    forget_share: float
    still_known: float | None = None


def guide(stats: ActivationStats, site: str = "input") -> Guidance:
    """Advice for a request, from the activation statistics of both sets.

    A rule of thumb from one small recommender, no guarantee: ``docs/quality.md`` says how often it
    was right there and on other data, where it often was not.

    Args, Raises: as :func:`separability`.
    """
    apart = separability(stats, site)
    forget = stats.tokens("forget")
    share = _share(forget, stats.tokens("retain"))
    seen = (
        f"mean activations differ by {apart.contrast:.3f} (relative, root mean square over the "
        f"neurons), of which sampling {forget:,} forget tokens explains {apart.noise:.3f}, more "
        "where they are of a few sequences"
    )
    if apart.excess >= SEPARABLE:
        name, advice = (
            "attenuate",
            "activations separate the two sets, so attenuation can forget more than shrinking the "
            "adapter would. Where a backward pass can be paid, UcanConfig.preset('best') forgets "
            "several times as much, and 'thorough', with several, more again",
        )
    elif share <= LARGE_SHARE:
        name, advice = (
            "influence",
            "activations hardly tell the two sets apart, so attenuation would shrink anything. Use "
            "UcanConfig.preset('best') (one backward pass) or 'thorough' (several), or retrain",
        )
    else:
        name, advice = (
            "retrain",
            "activations hardly tell the two sets apart, and the forget set is "
            f"{100 * share:.0f} % of the tokens that were measured (of all, it is less where D_r "
            "is a sample): retrain, or use UcanConfig.preset('thorough'), which came near "
            "retraining on small recommenders. 'best' forgets a part of it",
        )
    return Guidance(name, f"{advice} ({seen}).", apart, share)


def guide_step(forget_tokens: int, retain_tokens: int, method: str = "influence") -> Guidance:
    """Advice for a request that one influence step or gates answer, from the sizes of its sets.

    A rule of thumb from small recommenders, no guarantee: ``docs/quality.md`` says how often it was
    right. It says nothing of how far this very step went: the search, and its note, do.

    Args:
        forget_tokens, retain_tokens: of all data, or as many as were run.
        method: ``"influence"`` or ``"gates"``.

    Raises:
        UcanError: a set is empty.
    """
    share = _share(forget_tokens, retain_tokens)
    size = f"the forget set is {100 * share:.1f} % of the tokens that were measured"
    if method == "gates":
        size += (
            ", and gates only attenuate: UcanConfig.preset('best'), a step by Kronecker factors, "
            "forgot more at the same retain drop"
        )
    if share <= LARGE_SHARE:
        name, advice = (
            "influence",
            "Of so few one step mostly forgot half or more within 5 % of the retained rankings on "
            "small recommenders, of a language model's less; UcanConfig.preset('thorough') came "
            "near retraining.",
        )
    else:
        name, advice = (
            "retrain",
            "Of so many (of all it is less where D_r is a sample) one step mostly forgot less than "
            "half within 5 % of the retained rankings: use UcanConfig.preset('thorough'), which "
            "came near retraining on small recommenders, or retrain.",
        )
    return Guidance(name, f"{size}. {advice}", None, share)


#: How several steps can have ended, and the advice then.
_ENDS = {
    "forgotten": (
        "influence",
        "the steps went as far as they aim: {left}. Retraining forgot about as much on small "
        "recommenders",
    ),
    "never-seen": (
        "influence",
        "the steps went as far as they may: the forget set costs about as much as never-seen data "
        "({left})",
    ),
    "before": (
        "retrain",
        "the steps ended before they were where they aim: {left}. The note says what ended them; a "
        "larger max_retain_loss_increase or influence_steps may help where it was one of these, "
        "else retrain",
    ),
}


def guide_steps(forget_tokens: int, retain_tokens: int, still_known: float, ended: str) -> Guidance:
    """Advice after several influence steps, from where they ended.

    Args:
        forget_tokens, retain_tokens: of all data, or as many as were run.
        still_known: share of this request's forget positions that are better known than their
            references (:meth:`ucan_fast.InfluenceWalk.known`).
        ended: ``"forgotten"``: that is as little as the steps aim at; ``"never-seen"``: the forget
            set costs about what never-seen data do; ``"before"``: neither.

    Raises:
        UcanError: a set is empty.
    """
    share = _share(forget_tokens, retain_tokens)
    name, text = _ENDS[ended]
    left = (
        f"{100 * still_known:.0f} % of the request's positions are still better known than their "
        "references"
    )
    return Guidance(name, text.format(left=left) + ".", None, share, still_known)


def _share(forget: int, retain: int) -> float:
    for tokens, group in ((forget, "forget"), (retain, "retain")):
        if not tokens > 0:
            raise UcanError(f"the {group} set is empty: no token of it was measured.")
    return forget / (forget + retain)
