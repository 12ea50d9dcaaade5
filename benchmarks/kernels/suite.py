"""All groups in one list, for what needs the cases without timing them."""

from __future__ import annotations

import torch

from .. import targets
from ..measure import PROFILES, Profile
from . import attenuate, expand, linear, scores, shrink
from .cases import Bench

_GROUPS = (
    *(shrink.shrink, shrink.shrink_with_moments),
    *(expand.expand, expand.expand_with_moments),
    *(linear.forward, linear.forward_backward),
    *(linear.forward_with_moments, linear.forward_with_hooks),
    *(scores.scores, scores.scores_eager),
    *(attenuate.attenuate, attenuate.attenuate_wall),
)


def benches(profile: Profile, device: torch.device) -> list[Bench]:
    """Every case of a profile, as it would run there."""
    return [bench for group in _GROUPS for bench in group(profile, device)]


def target_benches(device: str) -> list[Bench]:
    """The cases that the targets ask for on a kind of device, which need not be here."""
    every = benches(PROFILES["full"], torch.device(device))
    return [bench for bench in every if targets.asks_for(bench, device)]
