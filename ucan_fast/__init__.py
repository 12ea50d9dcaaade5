"""ucan_fast: one-shot unlearning for LoRA-adapted LLM recommenders (U-CAN, arXiv 2602.23400)."""

from ._version import __version__
from .accelerate import AccelerationReport, accelerate, restore
from .collect import collect
from .config import UcanConfig
from .errors import UcanError, UcanWarning
from .factor_pass import collect_factors, factor_memory
from .factors import InfluenceFactors
from .gates import make_gates_plan
from .guidance import Guidance, guide
from .influence import InfluencePlan, make_influence_plan
from .influence_walk import InfluenceWalk
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
    "Guidance",
    "InfluenceFactors",
    "InfluencePlan",
    "InfluenceWalk",
    "Moments",
    "UcanConfig",
    "UcanError",
    "UcanWarning",
    "UnlearnResult",
    "__version__",
    "accelerate",
    "collect",
    "collect_factors",
    "factor_memory",
    "guide",
    "make_gates_plan",
    "make_influence_plan",
    "make_plan",
    "restore",
    "unlearn",
]
