"""The two controls: what shrinking *anything* would have done, at the same retain loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .adapter import find_layers
from .influence import InfluencePlan, StepEdit
from .neurons import neuron_groups
from .plan import AttenuationPlan
from .strength import match_loss
from .weights import WeightEdit

#: A control whose loss is further off than this share of U-CAN's rise is reported as not matched.
_MATCHED = 0.1
#: How far a random step may go, in lengths of the plan's step.
_LONGEST = 8.0


@dataclass
class Control:
    """One control, ready to be put on the model.

    Attributes:
        name: ``"uniform"`` or ``"random"``.
        edit, factors: ``edit.applied(factors)`` puts it in force.
        value: uniform: how far the adapter is scaled down (0 nothing, 1 off). random: the share
            of all neurons that are attenuated; of an influence step, its length (1 is 8 times the
            plan's).
        loss: mean retain NLL with it, nats.
        note: says so where U-CAN's retain loss could not be matched.
    """

    name: str
    edit: WeightEdit | StepEdit
    factors: torch.Tensor | float
    value: float
    loss: float
    note: str = ""


def uniform_control(
    model: nn.Module, adapter: str, retain_loss: Callable[[], float], before: float, target: float
) -> Control:
    """The whole adapter scaled by one constant: B of every layer times 1 - v."""
    groups = neuron_groups(model, find_layers(model, adapter), "output")
    n = sum(group.n for group in groups)
    return _matched(
        "uniform",
        WeightEdit(groups),
        lambda v: torch.full((n,), 1 - v, dtype=torch.float32, device="cpu"),
        retain_loss,
        before,
        target,
    )


def random_control(
    model: nn.Module,
    adapter: str,
    plan: AttenuationPlan,
    retain_loss: Callable[[], float],
    before: float,
    target: float,
) -> Control:
    """The plan's own factors on random neurons of the same site.

    Factors are drawn in random order for neurons in random order; how many neurons get one is
    what is varied until the retain loss is the plan's. The last of them gets a part of its factor:
    with whole neurons only, small plans could not be matched.
    """
    generator = torch.Generator().manual_seed(plan.config.seed)
    used = plan.flat_factors[plan.flat_factors != 1]
    used = used[torch.randperm(used.numel(), generator=generator, device="cpu")]
    order = torch.randperm(plan.neurons, generator=generator, device="cpu")

    def factors_at(share: float) -> torch.Tensor:
        whole = int(share * plan.neurons)
        part = share * plan.neurons - whole
        chosen = order[: whole + 1]
        drawn = used[torch.arange(chosen.numel(), device="cpu") % used.numel()]
        drawn[whole:] = 1 - part * (1 - drawn[whole:])
        factors = torch.ones(plan.neurons, dtype=torch.float32, device="cpu")
        factors[chosen] = drawn
        return factors

    edit = WeightEdit(plan.match(model, adapter))
    return _matched("random", edit, factors_at, retain_loss, before, target)


def random_step_control(
    model: nn.Module,
    adapter: str,
    plan: InfluencePlan,
    retain_loss: Callable[[], float],
    before: float,
    target: float,
) -> Control:
    """A step of random direction, every matrix moved as far as the plan moves it, times one
    length that is varied until the retain loss is the plan's."""
    generator = torch.Generator().manual_seed(plan.config.seed)
    directions = {}
    for key, direction in plan.directions.items():
        drawn = torch.randn(
            direction.shape, generator=generator, dtype=direction.dtype, device="cpu"
        )
        directions[key] = drawn * (_LONGEST * plan.strength * direction.norm() / drawn.norm())
    parameters = {target.key: target.parameter for target in plan.match(model, adapter)}
    edit = StepEdit(parameters, directions)
    return _matched("random", edit, lambda value: value, retain_loss, before, target)


def _matched(
    name: str,
    edit: WeightEdit | StepEdit,
    factors_at: Callable[[float], torch.Tensor | float],
    retain_loss: Callable[[], float],
    before: float,
    target: float,
) -> Control:
    def loss_at(value: float) -> float:
        with edit.applied(factors_at(value)):
            return retain_loss()

    value, loss = match_loss(loss_at, before, target)
    note = ""
    if target <= before:
        note = "the plan does not raise the retain loss, so the control changes nothing"
    elif not abs(loss - target) <= _MATCHED * (target - before):
        note = f"could not reach the plan's retain loss {target:.4f}, the closest is {loss:.4f}"
    return Control(name, edit, factors_at(value), value, loss, note)
