"""The operators, one a file. They know tensors only: nothing of PEFT, nothing of models."""

from .attenuate import attenuate_
from .backend import (
    BACKENDS,
    LAUNCH_BOUND,
    backends_in_use,
    is_launch_bound,
    requested_backend,
    use_backend,
)
from .expand import expand
from .fused_linear import fused_linear, fused_linear_switch, fused_linear_wanted
from .lora import add_lora
from .moments import accumulate_moments
from .scores import attenuation_factors, contrastive_scores
from .shrink import shrink

__all__ = [
    "BACKENDS",
    "LAUNCH_BOUND",
    "accumulate_moments",
    "add_lora",
    "attenuate_",
    "attenuation_factors",
    "backends_in_use",
    "contrastive_scores",
    "expand",
    "fused_linear",
    "fused_linear_switch",
    "fused_linear_wanted",
    "is_launch_bound",
    "requested_backend",
    "shrink",
    "use_backend",
]
