"""Several influence steps, the gradients of both sets taken anew before each: InfluenceWalk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .adapter import resolve_adapter, unwrap
from .batches import check_iterable, reusable
from .calibration import BY_HEART, counted_batches
from .collect import _quiet
from .config import UcanConfig, config_or
from .errors import UcanError
from .evaluation import (
    IGNORED_LABELS,
    _vocabulary,
    check_predicts_tokens,
    evaluating,
    group_loss,
    scored_slices,
    token_logits,
)
from .factor_pass import differentiable, gradients, influence_layers, trainable
from .factors import InfluenceFactors
from .influence import InfluencePlan, StepEdit, direction_of
from .metrics import check_labels, token_nll
from .weights import ParameterEdit

Batches = Iterable[Mapping[str, Any]]
Gradients = dict[str, torch.Tensor]

#: Share of the direction so far in the next one: without it steps swing across the retain set's
#: steep directions, whose curvature was measured at the origin.
_MOMENTUM = 0.7
#: Nats that one step may raise the forget NLL by, as predicted (weighted, if that set is known by
#: heart): where the retain set is, its curvature, softened as it is, lets a step go far.
_MOST_RISE = 0.3
#: Where the forget set is known by heart: the slope of a position's NLL by its logits is 1 - p; it
#: counts as this at least, down to _SUREST; what is surer still comes last.
_LEAST_PULL = 0.1
#: 1 - p below this counts as this: fp32 knows 1 - p of what is surer to few digits.
_SUREST = 1e-4
#: The walk ends where a smaller share of the forget positions is below its references. Of
#: never-seen positions, too, some are better known with the adapter than without; but steps leave
#: what was known best for last, so that all is as good as forgotten only where few are left.
FORGOTTEN = 0.2
#: Nats that the retain batches may cost more after a step than before it: that much more than ε
#: says that the factors do not describe the model there, and the step is halved.
_MOST_LOSS = 0.02
#: Where the forget set is known by heart: nats that it may come back by in a step, in the mean over
#: its positions of the lesser of NLL and reference. More is no repair of the retain set, but a step
#: too long.
_MOST_RETURN = 0.1
#: How often, and how much longer a step may be than one that was halved. (Where a language model
#: knew its data by heart the second step was halved four times, and growth by a quarter used twelve
#: up before lengths were what they had been.)
_HALVINGS = 8
_GROWTH = 2.0
#: Initialisations of PEFT that leave the base weights as they are, beside its default. Not: PiSSA,
#: OLoRA, CorDA, LoftQ, LoRA-GA, and what may come.
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")


@dataclass
class Measured:
    """What was known before a step.

    Attributes:
        forget_nll: mean over the scored forget positions, nats.
        retain_nll: mean over the scored positions of the retain batches, nats.
        known: share of the forget positions that are still more likely than their references.
        rise: the rise of the forget NLL that the step predicts, nats; weighted as in
            :class:`InfluenceWalk` where the forget set is known by heart.
    """

    forget_nll: float
    retain_nll: float
    known: float
    rise: float


@dataclass
class _Side:
    """One set where the model is.

    Attributes:
        gradient: G or R of :class:`InfluenceWalk`.
        nll: mean over the scored positions, nats.
        known: share of the positions that count: those below their references, if there are any.
        reached: mean over the positions of the lesser of NLL and reference, nats (0 without).
    """

    gradient: Gradients
    nll: float
    known: float
    reached: float


class InfluenceWalk:
    """Natural-gradient steps up the forget loss and down the retain loss, on an adapter in place.

    Before step k both gradients are taken where the last one ended, by one pass over the forget
    batches (and a forward pass after it, where they are known by heart) and one over the retain
    batches; the Kronecker factors stay those of the origin::

        G = 1/n Σ w_i ∇ nll_i   over the forget positions i with nll_i < reference_i
        R = R_0 + R_S(now) - R_S(origin)
        v = μ v + (1 - μ) (G - κ R),   d = F⁻¹ v,   W += c d
        c = min(sqrt(2 ε / ⟨v, d⟩), ρ / ⟨G, d⟩)

    with ε = ``influence_radius`` (c d is then ε nats of KL away by the factors' quadratic model),
    κ = ``retain_gradient_weight``, μ = 0.7, ρ = 0.3 nats, and w_i = 1 (but see below). R_0 is the
    retain gradient of the bank; that of the retain batches S comes in as a difference to the
    origin (a control variate: Johnson and Zhang 2013). S are all batches, or ``influence_batches``
    of them, drawn anew before each step and run at the origin as well: what a step costs then does
    not grow with D_r. (A small set that stays the same would be learned by heart.)

    A step after which S cost over 0.02 nats more than before it is halved, up to eight times; the
    next may be twice as long as it ended, and so on up to c.

    Where the forget set is known by heart (below 0.2 nats per position at the origin) w_i is
    max(1, 0.1 / (1 - p_i)), 1 - p_i being at least 1e-4: the slope of nll_i by its logits is
    1 - p_i, next to nothing, and steps would be of the first few positions that are not known so
    well any more. There a step is also halved that brings back over 0.1 nats of the forget set (of
    the lesser of NLL and reference).

    A position counts as long as the model knows it better than its reference, the least of: the
    model *without the adapter's A and B*, blind guessing (ln V), and never-seen data where their
    cost is given. Where less than a fifth of the positions count the walk ends. Those that do not
    count are moved by the others all the same: the mean NLL may end above the mean reference, as
    that of a retrained adapter does. Where the base model does not know the task at all its
    references are high: give the cost of never-seen data.

    (Ours; not in the paper.) Natural gradients: Amari 1998; Kronecker factors and the trust region:
    Martens and Grosse, arXiv 1503.05671. Unlikelihood training (Welleck et al., arXiv 1908.04319)
    has a slope where probabilities are near 1, too: p / (1 - p) of the NLL's.

    With ``start`` the steps go on from where an earlier request's plan leads to. That request's
    data are not run again: nothing pulls them back, since R is of neither forget set, and nothing
    holds them either.

    The weights are written in place. :meth:`restore` brings the originals back bit by bit, and
    :meth:`plan` makes a plan of where the model is.
    """

    # Tensors made in inference mode could not be written to outside.
    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        forget: Batches,
        retain: Batches,
        forget_factors: InfluenceFactors,
        retain_factors: InfluenceFactors,
        config: UcanConfig | None = None,
        *,
        never_seen: float = math.inf,
        start: InfluencePlan | None = None,
        adapter: str | None = None,
    ) -> None:
        """Check everything, and measure the references (two forward passes over ``forget``).

        Args:
            model: with the adapter that the factors were taken on.
            forget: batches of D_f (see :func:`ucan_fast.collect`); kept in memory.
            retain: batches of D_r; run once per step, or drawn from (then a sequence of batches, or
                kept in memory).
            forget_factors, retain_factors: as for :func:`ucan_fast.make_influence_plan`.
            config: with ``method="influence"``.
            never_seen: nats per token that never-seen data cost; no reference is above it.
            start: the plan of an earlier request on the same adapter (not applied now): the first
                step begins where it leads to, and what it moved stays moved.
            adapter: needed when several adapters are active.

        Raises:
            UcanError: as :func:`ucan_fast.make_influence_plan`; bad batches; an initialisation that
                changed the base model (PiSSA, LoRA-GA, ...), without ``never_seen``; a
                ``start`` for another adapter or other matrices.
        """
        if not never_seen > 0:  # nan too
            raise UcanError(f"never_seen must be nats per token > 0, not {never_seen!r}.")
        check_iterable(forget, "forget")
        check_iterable(retain, "retain")
        self.config = config_or(config, "influence")
        self.model = unwrap(model)
        self.adapter = resolve_adapter(self.model, adapter)
        if never_seen == math.inf:
            check_base(self.model, self.adapter)
        self._direction, self.targets = direction_of(
            self.model, forget_factors, retain_factors, self.config, self.adapter
        )
        check_predicts_tokens(self.model)
        self._forget = list(forget)
        # Those of the present step: all, or drawn from all.
        self._batches, self._all = self._retain_batches(retain)
        self._bank = self._direction.retain_gradients()
        parameters = {t.key: t.parameter for t in self.targets}
        # Like the directions of a plan: on the CPU, and at least in fp32.
        self._moved = {
            key: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32))
            for key, p in parameters.items()
        }
        self._edit = StepEdit(parameters, self._moved)
        if not isinstance(start, InfluencePlan | None):
            raise UcanError(f"start must be an InfluencePlan, not {start!r}.")
        self._start = None if start is None or start.is_noop else self._checked(start)
        # Nats per token of a guess that knows nothing.
        self._blind = math.log(_vocabulary(self.model))
        self._references = self._measure_references(never_seen)
        loss = group_loss(self.model, self._forget, "forget")
        if loss.tokens and not math.isfinite(loss.mean):  # no rise could be measured from there
            raise UcanError(
                f"the forget loss is {loss.mean} nats per token: the model gives a forget token no "
                "probability at all, or no number. Give such tokens the label -100, and check that "
                "the model does not overflow (fp16)."
            )
        self._by_heart = loss.tokens > 0 and loss.mean < BY_HEART
        self._begin()

    def _begin(self) -> None:
        """The state of a walk that has not begun."""
        self.measured: list[Measured] = []
        self.ended = ""
        start = self._start
        for key, moved in self._moved.items():
            moved.zero_()
            if start is not None:
                moved.add_(start.directions[key], alpha=start.strength)
        self._rises = {
            key: 0.0 if start is None else start.strength * start.shares[key] for key in self._moved
        }
        # The step that led here, and what it predicted by matrix; none at the origin.
        self._last: Gradients = {}
        self._last_rises: dict[str, float] = {}
        self._momentum: Gradients | None = None
        self._momentum_before: Gradients | None = None
        # Gradient and NLL of the retain batches here, once they were taken, and at the origin.
        self._here: _Side | None = None
        self._at_origin: Gradients = {}
        self._scale = 1.0
        self._random = torch.Generator().manual_seed(self.config.seed)

    def _checked(self, start: InfluencePlan) -> InfluencePlan:
        """A plan that can be gone on from."""
        if start.fingerprint != self._direction.forget.fingerprint:
            raise UcanError(
                "the plan to start from is for another adapter than the one that the factors were "
                "taken on."
            )
        shapes = {key: moved.shape for key, moved in self._moved.items()}
        if {key: d.shape for key, d in start.directions.items()} != shapes:
            raise UcanError(
                f"the plan to start from moved other matrices (influence_variant="
                f"{start.config.influence_variant!r}) than these steps would "
                f"({self.config.influence_variant!r})."
            )
        return start

    def _retain_batches(self, retain: Batches) -> tuple[Batches, list]:
        """What the first step runs, and what every step draws from (nothing where it runs all)."""
        count = self.config.influence_batches
        if not count:
            return reusable(retain, "retain"), []
        # A batch without a scored retain position has no gradient.
        scored = [b for b, tokens, _ in counted_batches(self.model, retain, "retain") if tokens]
        return (scored, []) if count >= len(scored) else (scored[:count], scored)

    @property
    def steps(self) -> int:
        """How many steps led here."""
        return len(self.measured)

    def advance(self, last: bool = False) -> bool:
        """Take one step from where the model is, halved until both sets bear it.

        Args:
            last: whether no step will follow, which spares the retain gradient there (a step that
                follows all the same takes it).

        Returns:
            False, and no step, where the walk has ended: ``ended`` says why.

        Raises:
            UcanError: a gradient or a weight would not be finite; the weights are the originals.
        """
        with self._restoring():
            if self._start is not None and not self.steps:
                self._edit.write(1.0)
            retain, retain_nll = self._retain_side()
            side = self._side(self._forget, "forget", self._references)
            forget = side.gradient
            for group, gradient in (("retain", retain), ("forget", forget)):
                if not _is_finite(gradient):
                    raise UcanError(
                        f"the {group} gradient is not finite after {counted(self.steps)}; the "
                        "weights are the original ones again. Raise damping or lower "
                        "influence_radius."
                    )
            if side.known < FORGOTTEN:
                self.ended = "the forget set is known no better than its references"
                return False
            ahead = self._ahead(forget, retain)
            step = {t.key: self._direction.solve(t, ahead[t.key]) for t in self.targets}
            square, slopes = _dot(ahead, step), _dots(forget, step)
            slope = sum(slopes.values())
            if not (square > 0 and math.isfinite(square)):
                self.ended = "there is no direction left"
                return False
            length = math.sqrt(2 * self.config.influence_radius / square)
            if slope > 0:
                length = min(length, _MOST_RISE / slope)
            length *= self._scale
            self._last = {key: length * value for key, value in step.items()}
            self._last_rises = {key: length * value for key, value in slopes.items()}
            self.measured.append(Measured(side.nll, retain_nll, side.known, length * slope))
            self._momentum_before, self._momentum = self._momentum, ahead
            self._write(1.0)
            lost = self._what_is_lost(side.reached, last)
            if lost:
                self.back()
                self.ended = f"no shorter step {self.steps + 1} kept {lost}"
                return False
            self._scale = min(1.0, _GROWTH * self._scale)
        return True

    def shorten(self) -> None:
        """Halve the last step. The next is at most twice as long; those after it grow again.

        Raises:
            UcanError: there is no last step: none was taken, or it was taken back.
        """
        self._check_last()
        with self._restoring():
            self._write(-0.5)
            self._last = {key: value / 2 for key, value in self._last.items()}
            self._last_rises = {key: value / 2 for key, value in self._last_rises.items()}
            self.measured[-1].rise /= 2
            self._scale /= 2

    def back(self) -> None:
        """Take the last step back; only one.

        Raises:
            UcanError: as :meth:`shorten`.
        """
        self._check_last()
        with self._restoring():
            self._write(-1.0)
            self.measured.pop()
            self._momentum, self._last = self._momentum_before, {}

    def _check_last(self) -> None:
        if not self._last:
            raise UcanError("there is no last step: none was taken, or it was taken back already.")

    def restore(self) -> None:
        """Every weight as it was before the walk, bit by bit; the walk begins anew."""
        self._edit.restore()
        self._begin()

    def known(self) -> float:
        """Share of the forget positions, in [0, 1], that the model as it is now knows better than
        their references; one forward pass over the forget batches. (Before the first step that is
        the origin, also with ``start``.)"""
        return self._standing()[0]

    def plan(self) -> InfluencePlan:
        """The way from the origin to here, as a plan for the origin (not applied).

        Its strength is the *measured* rise of the forget NLL since the first step; on the way back
        to 0 the weights move in a straight line, not along the steps. Where nothing rose it is the
        plan that the walk started from, if any, else one that does nothing.

        Raises:
            UcanError: the forget loss is not finite any more.
        """
        rise, note = 0.0, ""
        if self.steps:
            after = group_loss(self.model, self._forget, "forget").mean
            rise = after - self.measured[0].forget_nll
            if not math.isfinite(rise):
                raise UcanError(
                    f"after {counted(self.steps)} the forget loss is {after} nats per token: a "
                    "plan needs a finite rise. Take fewer steps, or give what never-seen data "
                    "cost (holdout=)."
                )
        moves = rise > 0
        if self.steps and not moves:
            note = f"{counted(self.steps)} did not raise the forget loss ({rise:.3g} nats)."
        elif moves and after > self._blind:
            note = (
                f"the forget set now costs {after:.2f} nats per token, more than blind guessing "
                f"({self._blind:.2f}): positions that no longer counted were moved by the others. "
                "Where that matters give what never-seen data cost (holdout=)."
            )
        if self._start is not None and not moves:
            unapplied = {"applied_fingerprint": None, "originals": None}
            return replace(self._start, config=self.config, note=note, **unapplied)
        parts = self._rises
        if not sum(parts.values()) > 0:  # the way up was predicted by no step: by what was moved
            parts = {key: float(m.double().square().sum()) for key, m in self._moved.items()}
        total = sum(parts.values())
        return InfluencePlan(
            config=self.config,
            fingerprint=self._direction.forget.fingerprint,
            directions={
                key: moved / rise if moves else torch.zeros_like(moved)
                for key, moved in self._moved.items()
            },
            shares={key: value / total if moves else 0.0 for key, value in parts.items()},
            strength=rise if moves else 0.0,
            note=note,
        )

    def _standing(self) -> tuple[float, float]:
        """``known`` and ``reached`` (:class:`_Side`) of the model as it is, by a forward pass."""
        known = positions = 0
        reached = 0.0
        with evaluating(self.model):
            pieces = scored_slices(self.model, self._forget, "forget")
            for piece, reference in zip(pieces, self._references, strict=True):
                nll = token_nll(*piece.run(self.model))
                known += int((nll < reference).sum())
                reached += float(torch.minimum(nll, reference).double().sum())
                positions += len(reference)
        return known / max(positions, 1), reached / max(positions, 1)

    def _retain_side(self) -> tuple[Gradients, float]:
        """R here, and the NLL of the batches that it was taken on."""
        if self._all:
            order = torch.randperm(len(self._all), generator=self._random, device="cpu")
            chosen = sorted(order[: self.config.influence_batches].tolist())
            self._batches = [self._all[index] for index in chosen]
            self._here = None
        if self._here is None:
            self._here = self._side(self._batches, "retain")
        now, nll = self._here.gradient, self._here.nll
        if not self.steps and self._start is None:
            self._at_origin = now
        elif self._all or not self._at_origin:
            self._edit.restore()
            self._at_origin = self._side(self._batches, "retain").gradient
            self._edit.write(1.0)
        found = {key: self._bank[key] + (now[key] - self._at_origin[key]) for key in now}
        return found, nll

    def _ahead(self, forget: Gradients, retain: Gradients) -> Gradients:
        """v: the gradients of both sides as one, with the momentum."""
        weight = self.config.retain_gradient_weight
        ahead = {key: forget[key] - weight * retain[key] for key in forget}
        if self._momentum is None:
            return ahead
        return {
            key: _MOMENTUM * self._momentum[key] + (1 - _MOMENTUM) * value
            for key, value in ahead.items()
        }

    def _what_is_lost(self, reached: float, last: bool) -> str:
        """What the last step costs too much of, however often it is halved; "" if it is borne."""
        before = self.measured[-1].retain_nll
        for tried in range(_HALVINGS + 1):
            if tried:
                self.shorten()
            # NaN is no number to go on from.
            if self._by_heart and not self._standing()[1] >= reached - _MOST_RETURN:
                lost = "what was forgotten"
                continue
            lost = "the retain batches"
            ahead = not (self._all or last)  # the next step starts with these gradients
            # A step is borne more often than not; the half of one that was not is looked at first.
            if tried or not ahead:
                nll = group_loss(self.model, self._batches, "retain").mean
                if not nll <= before + _MOST_LOSS:
                    continue
            if not ahead:
                return ""
            self._here = self._side(self._batches, "retain")
            if _is_finite(self._here.gradient) and self._here.nll <= before + _MOST_LOSS:
                return ""
        return lost

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def _write(self, times: float) -> None:
        """Move by so many of the last step."""
        self._here = None
        for key, value in self._last.items():
            self._moved[key] += (times * value).to(self._moved[key])
            self._rises[key] += times * self._last_rises[key]
        self._edit.write(1.0)

    @torch.inference_mode(False)
    def _side(
        self, batches: Batches, group: str, references: list[torch.Tensor] | None = None
    ) -> _Side:
        """By a pass forward and back: of the positions below their references, or of all where
        there are no references."""
        uses = [tensor for target in self.targets for tensor in target.parameters]
        sums = {t.key: torch.zeros_like(t.parameter, dtype=torch.float64) for t in self.targets}
        total = reached = 0.0
        positions = known = 0
        with (
            _quiet(self.model),
            trainable(self.model, uses),
            differentiable(self.model),
            torch.enable_grad(),
        ):
            for index, piece in enumerate(scored_slices(self.model, batches, group)):
                logits = token_logits(self.model, piece.inputs, piece.positions.shape)
                logits = logits[piece.positions]
                check_labels(logits, piece.labels, piece.where, IGNORED_LABELS)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = nn.functional.cross_entropy(logits, piece.labels, reduction="none")
                nll = loss.detach()
                total += float(nll.double().sum())
                positions += len(nll)
                if references is not None:
                    reference = references[index]
                    reached += float(torch.minimum(nll, reference).double().sum())
                    below = nll < reference
                    loss = loss[below]
                    if self._by_heart:
                        loss = loss * pull(nll[below])
                known += len(loss)
                if not len(loss):
                    continue
                found = iter(gradients(loss.sum(), uses))
                for target in self.targets:
                    for _ in target.parameters:
                        gradient = next(found)
                        if gradient is not None:
                            sums[target.key] += gradient
        if not positions:
            raise UcanError(
                f"no {group} position is scored: a {group} token needs a token before it and, "
                "where there are labels, a label other than -100."
            )
        means = {key: (value / positions).cpu() for key, value in sums.items()}
        figures = (number / positions for number in (total, known, reached))
        return _Side(means, *figures)

    def _measure_references(self, never_seen: float) -> list[torch.Tensor]:
        """Of every slice of the forget batches, the NLL ``[P]`` that its positions may cost."""
        layers = influence_layers(self.model, self.adapter)
        off = ParameterEdit({layer.name: layer.b.detach() for layer in layers})
        most = min(never_seen, self._blind)
        found = []
        try:
            with torch.no_grad():
                for layer in layers:
                    layer.b.zero_()
            off._written()
            with evaluating(self.model):
                for piece in scored_slices(self.model, self._forget, "forget"):
                    nll = token_nll(*piece.run(self.model))
                    if nll.isnan().any():  # a position that would never count
                        raise UcanError(
                            f"{piece.where}: the loss of the model without its adapter is not a "
                            "number. Does the base overflow in fp16? Load it in bf16 or fp32."
                        )
                    found.append(nll.clamp(max=most))
        finally:
            off.restore()
        return found


def pull(nll: torch.Tensor) -> torch.Tensor:
    """max(1, 0.1 / (1 - p)) of labels with this NLL, 1 - p being at least :data:`_SUREST`."""
    unsure = -torch.expm1(-nll).clamp_max(-_SUREST)
    return (_LEAST_PULL / unsure).clamp_min(1)


def counted(steps: int) -> str:
    """A number of steps, in words."""
    return f"{steps} influence step{'s' if steps != 1 else ''}"


def check_base(model: nn.Module, adapter: str) -> None:
    """Refuse what would take a base without its main directions for one that knows nothing.

    Raises:
        UcanError: the adapter's initialisation took its first values out of the base weights.
    """
    kind = getattr(model.peft_config[adapter], "init_lora_weights", None)
    if isinstance(kind, str) and kind.lower() not in _KEEPS_BASE:
        raise UcanError(
            f"adapter {adapter!r} was initialised by {kind!r}, which changed the base model: what "
            "it knows without the adapter says nothing of what was learned. Give the cost of "
            "never-seen data (holdout=)."
        )


def _is_finite(gradients: Gradients) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in gradients.values())


def _dots(one: Gradients, other: Gradients) -> dict[str, float]:
    return {key: float((one[key] * other[key]).sum()) for key in one}


def _dot(one: Gradients, other: Gradients) -> float:
    return sum(_dots(one, other).values())
