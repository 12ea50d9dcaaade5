"""Every method of the comparison, in the order of the tables."""

from __future__ import annotations

from . import edits
from .baselines import BASELINES
from .case import Method

METHODS: tuple[Method, ...] = (
    edits.RETRAINING,
    *edits.CONTROLS,
    *edits.ATTENUATION,
    *edits.BEYOND,
    *BASELINES,
)
