"""ucan_fast: one-shot unlearning for LoRA-adapted LLM recommenders (U-CAN, arXiv 2602.23400)."""

from ._version import __version__
from .accelerate import AccelerationReport, accelerate, restore
from .collect import collect
from .config import UcanConfig
from .errors import UcanError, UcanWarning
from .plan import AttenuationPlan
from .report import DeletionReport
from .scoring import make_plan
from .stats import ActivationStats, Moments
from .unlearn import UnlearnResult, unlearn

__all__ = [
    "AccelerationReport",
    "ActivationStats",
    "AttenuationPlan",
    "DeletionReport",
    "Moments",
    "UcanConfig",
    "UcanError",
    "UcanWarning",
    "UnlearnResult",
    "__version__",
    "accelerate",
    "collect",
    "make_plan",
    "restore",
    "unlearn",
]
