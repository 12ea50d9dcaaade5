"""Can activations tell a request's data from the rest? And what to do where they cannot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .batches import FORGET, RETAIN
from .errors import UcanError
from .stats import ActivationStats


@dataclass(frozen=True)
class Separability:
    """How far the mean activations of forget and retain set differ, over all neurons of a site.

    With a_g the mean ``|h_j|`` of group g, ``R_j = (a_f - a_r)/(a_f + a_r)``, the contrast that
    scores are made of (either sign):

    Attributes:
        contrast: root mean square of R over the neurons.
        noise: what it would be if both sets were drawn from one distribution: the root mean
            square of R's standard error, tokens taken as independent (delta method).
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
    sizes = torch.tensor([moments.n for moments in measured])
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
