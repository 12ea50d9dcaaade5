"""The published methods that the comparison is against, each as its authors describe it."""

from __future__ import annotations

from .case import Method
from .dampening import DAMPENINGS, PREPARED, ssd
from .eraser import POST_TRAINING, llm_eraser
from .gradient import RATES, RETAIN_RATES, grad_diff, grad_diff_kl, gradient_ascent, npo

BASELINES = (
    Method("gradient ascent", gradient_ascent, RATES, backward=True),
    Method("GradDiff", grad_diff, RETAIN_RATES, backward=True),
    Method("GradDiff (KL)", grad_diff_kl, RETAIN_RATES, backward=True),
    Method("NPO", npo, RETAIN_RATES, backward=True),
    Method("SSD", ssd, DAMPENINGS, needs=(PREPARED,), backward=True),
    Method("LLM-Eraser-style (adapter)", llm_eraser, POST_TRAINING, backward=True),
)
