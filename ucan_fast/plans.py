"""load_plan: reads a plan file of either method."""

from __future__ import annotations

import os

from .errors import UcanError
from .files import safetensors_kind
from .influence import FORMAT as INFLUENCE
from .influence import InfluencePlan
from .plan import AttenuationPlan


def load_plan(path: str | os.PathLike) -> AttenuationPlan | InfluencePlan:
    """Read what ``save`` of either plan wrote.

    Raises:
        UcanError: the file is missing, truncated, corrupt or of another kind.
    """
    try:
        influence = safetensors_kind(path) == INFLUENCE
    except UcanError:
        influence = False  # and let the other say what is wrong
    return InfluencePlan.load(path) if influence else AttenuationPlan.load(path)
