"""The influence step: one preconditioned ascent step on the forget set, as a reversible plan."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .adapter import active_context, fingerprint, resolve_adapter, unwrap
from .config import UcanConfig, config_or
from .errors import UcanError, warn
from .factor_pass import Target, find_targets, influence_layers
from .factors import Eigen, Factor, InfluenceFactors, solver
from .files import read_safetensors, write_safetensors
from .reversible import ReversiblePlan
from .weights import ParameterEdit

FORMAT = "ucan_fast.influence_plan"
FORMAT_VERSION = "1"


class StepEdit(ParameterEdit):
    """The adapter's matrices, to be moved along given directions."""

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], directions: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__(parameters)
        self._directions = directions

    def write(self, strength: float) -> None:
        """Set every matrix W to ``W + strength · direction``, computed in fp32 (fp64 where W is)
        and rounded once; on any error all are the originals again.

        Raises:
            UcanError: a value is not finite in its dtype.
        """
        try:
            with torch.no_grad():
                for key, parameter in self._parameters.items():
                    original, direction = self.originals[key], self._directions[key]
                    wide = torch.promote_types(original.dtype, torch.float32)
                    moved = original.to(wide)
                    if strength:
                        moved = moved.add(direction.to(moved.device, wide), alpha=strength)
                    moved = moved.to(original.dtype)
                    if not torch.isfinite(moved).all():
                        raise UcanError(
                            f"{key} would not be finite in {original.dtype} at strength "
                            f"{strength:g}; nothing was changed."
                        )
                    parameter.copy_(moved)
            self._written()
        except BaseException:
            self.restore()
            raise

    @contextlib.contextmanager
    def applied(self, strength: float) -> Iterator[None]:
        """The step in force for the length of a with block."""
        try:
            self.write(strength)
            yield
        finally:
            self.restore()


@dataclass
class InfluencePlan(ReversiblePlan):
    """Where every matrix of the adapter will be moved, and how far.

    Attributes:
        config: the choices it was made with.
        fingerprint: of the adapter it is for.
        directions: ``{layer}.lora_A`` and ``.lora_B`` -> ``c d``, fp32 (fp64 for an fp64 adapter)
            on the CPU: a strength of 1 predicts that the mean forget NLL rises by one nat. Of
            several steps: the straight line from the origin to where they led, over the strength.
            Parameters that several layers share have one entry, under the first of them.
        shares: the part of the predicted rise that each of them brings; they add up to 1.
        strength: t, the predicted rise of the forget NLL in nats; of several steps, the measured
            one, from where the first of them began.
        note: what a user must know about it, or "".

    It holds the direction that leads back to the original weights, and so what was to be
    forgotten: treat a saved plan like the original adapter.
    """

    config: UcanConfig
    fingerprint: str
    directions: dict[str, torch.Tensor]
    shares: dict[str, float]
    strength: float
    note: str = ""
    applied_fingerprint: str | None = None
    originals: dict[str, torch.Tensor] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return (
            f"InfluencePlan({len(self.directions)} matrices, variant "
            f"{self.config.influence_variant!r}, strength {self.strength:.4g} nats, "
            f"fingerprint {self.fingerprint[:12]})"
        )

    @property
    def is_noop(self) -> bool:
        """Whether it leaves every weight as it is."""
        return not self.strength or not any(d.any() for d in self.directions.values())

    def with_strength(self, strength: float) -> InfluencePlan:
        """The same direction at another t (a new plan, not applied)."""
        if not strength >= 0 or math.isinf(strength):
            raise UcanError(f"strength must be a finite number >= 0, not {strength!r}.")
        return replace(self, strength=float(strength), applied_fingerprint=None, originals=None)

    def warn_if_unusual(self) -> None:
        """Say aloud that the plan does nothing."""
        if self.is_noop:
            warn(f"this plan changes nothing: {self.note}")

    def summary(self) -> str:
        """A few lines for people."""
        by_layer = {}
        for key, share in self.shares.items():
            name = key.rpartition(".")[0]
            by_layer[name] = by_layer.get(name, 0.0) + share
        top = sorted(by_layer.items(), key=lambda pair: -pair[1])[:3]
        several = self.config.influence_steps > 1
        lines = [
            f"influence step{'s' if several else ''} on {len(self.directions)} matrices, variant "
            f"{self.config.influence_variant!r}: {'measured' if several else 'predicted'} rise of "
            f"the forget NLL {self.strength:.4g} nats",
            "most of it in " + ", ".join(f"{name} ({100 * s:.0f} %)" for name, s in top),
        ]
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)

    def match(self, model: nn.Module, adapter: str) -> list[Target]:
        """The model's matrices, checked to be the plan's.

        Raises:
            UcanError: layers, sizes or shared parameters differ.
        """
        found = targets_of(model, adapter, self.config)
        if {t.key: t.parameter.shape for t in found} != {
            key: d.shape for key, d in self.directions.items()
        }:
            raise UcanError(
                "the model's LoRA layers are not those of the plan (names, sizes or shared "
                "parameters differ)."
            )
        return found

    def edit(self, model: nn.Module, adapter: str) -> StepEdit:
        """The matrices, ready to be moved to any strength and back."""
        found = self.match(model, adapter)
        return StepEdit({t.key: t.parameter for t in found}, self.directions)

    def _edit(self, model: nn.Module, adapter: str) -> StepEdit:
        return self.edit(model, adapter)

    def _write(self, edit: StepEdit) -> None:
        edit.write(self.strength)

    def save(self, path: str | os.PathLike, include_original: bool = False) -> None:
        """Write a safetensors file, whole or not at all.

        Args:
            include_original: also write the values that :meth:`apply` overwrote, so that a plan
                loaded elsewhere can undo bit exactly.

        Raises:
            UcanError: the originals are asked for and there are none, or the file could not be
                written (what stood there before is untouched).
        """
        if include_original and self.originals is None:
            raise UcanError("there are no original values to save: the plan was not applied.")
        keys = list(self.directions)
        kept = sorted(self.originals or {}) if include_original else []
        tensors = {f"direction.{i}": self.directions[key] for i, key in enumerate(keys)}
        tensors |= {f"original.{i}": self.originals[key] for i, key in enumerate(kept)}
        values = {
            "config": json.loads(self.config.to_json()),
            "fingerprint": self.fingerprint,
            "applied_fingerprint": self.applied_fingerprint,
            "directions": keys,
            "shares": [self.shares[key] for key in keys],
            "strength": self.strength,
            "note": self.note,
            "originals": kept,
        }
        write_safetensors(path, FORMAT, FORMAT_VERSION, {"plan": json.dumps(values)}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike) -> InfluencePlan:
        """Read what :meth:`save` wrote.

        Raises:
            UcanError: the file is missing, truncated, corrupt or of another kind.
        """
        metadata, tensors = read_safetensors(path, FORMAT, FORMAT_VERSION)
        try:
            values = json.loads(metadata["plan"])
            keys = values["directions"]
            plan = cls(
                config=UcanConfig.from_saved(values["config"]),
                fingerprint=values["fingerprint"],
                directions={key: tensors[f"direction.{i}"] for i, key in enumerate(keys)},
                shares=dict(zip(keys, values["shares"], strict=True)),
                strength=float(values["strength"]),
                note=values["note"],
                applied_fingerprint=values["applied_fingerprint"],
                originals={k: tensors[f"original.{i}"] for i, k in enumerate(values["originals"])}
                or None,
            )
            if not all(torch.isfinite(d).all() for d in plan.directions.values()):
                raise ValueError("a direction is not finite")
            # Written so that a NaN is refused too.
            if not 0 <= plan.strength < math.inf:
                raise ValueError("the strength is no number >= 0")
        except UcanError as error:
            raise UcanError(f"{path}: {error}") from error
        except (KeyError, ValueError, TypeError) as error:
            raise UcanError(f"{path} is damaged: {error}; make the plan again.") from error
        return plan


def make_influence_plan(
    model: nn.Module,
    forget: InfluenceFactors,
    retain: InfluenceFactors,
    config: UcanConfig | None = None,
    *,
    adapter: str | None = None,
) -> InfluencePlan:
    """The direction of the step, from sums over both token sets. The model is only read.

    Per matrix, with mean gradients G of the forget NLL and R of the retain NLL, and mean retain
    factors (:class:`ucan_fast.factors.LayerFactors`) damped by ``l = damping tr(C)/n``::

        d_A = S_z⁻¹ (G_A - κ R_A) C_x⁻¹        d_B = S_h⁻¹ (G_B - κ R_B) C_z⁻¹

    each times scored positions per token of its layer (the same for all layers of a decoder), and
    the same factor c for all: ``c = 1 / Σ⟨G, d⟩``, so that a strength of t predicts a rise of t
    nats (first order). Kronecker-factored curvature: Martens and Grosse, arXiv 1503.05671; for
    layers that see many tokens: Eschenhagen et al., arXiv 2311.00636. The product s B A moves alike
    however a factor is shared between the layer's scaling s and its B.

    Args:
        model: the model the sums were taken on.
        forget: ``collect_factors(model, forget_batches, group="forget")``, of all requests.
        retain: the factors of the retain set: ``bank - forget``, or collected.
        config: with ``method="influence"`` and a given ``strength`` in nats; ``unlearn`` searches
            for one. ``"auto"`` gives the plan a strength of 0 (see ``with_strength``).
        adapter: needed when several adapters are active.

    Raises:
        UcanError: sums of another adapter or variant, an empty set, or a factor that cannot be
            solved.
    """
    config = config_or(config, "influence")
    model = unwrap(model)
    adapter = resolve_adapter(model, adapter)
    direction, targets = direction_of(model, forget, retain, config, adapter)
    directions, rises = {}, {}
    last = {solve: target.key for target in targets for solve in direction.solves(target)}
    for target in targets:
        directions[target.key], rises[target.key] = direction.of(target)
        # A solve in fp64 is twice its factor; all of them at once would be most of the memory.
        direction.drop(s for s in direction.solves(target) if last[s] == target.key)
    total = sum(rises.values())
    note = ""
    if not (total > 0 and math.isfinite(total)):
        note = (
            "no direction raises the forget loss against the retain gradient (predicted slope "
            f"{total:.3g}): to this method D_f and D_r are the same, or the adapter does nothing."
        )
        directions = {key: torch.zeros_like(d) for key, d in directions.items()}
        rises, total = dict.fromkeys(rises, 0.0), 1.0
    dtypes = {t.key: torch.promote_types(t.parameter.dtype, torch.float32) for t in targets}
    plan = InfluencePlan(
        config=config,
        fingerprint=forget.fingerprint,
        directions={key: (d / total).to(dtypes[key]) for key, d in directions.items()},
        shares={key: rise / total for key, rise in rises.items()},
        strength=0.0 if config.auto_strength else float(config.strength),
        note=note,
    )
    bad = [key for key, d in plan.directions.items() if not torch.isfinite(d).all()]
    if bad:
        raise UcanError(f"the step of {bad[0]} is not finite; raise damping.")
    return plan


def direction_of(
    model: nn.Module,
    forget: InfluenceFactors,
    retain: InfluenceFactors,
    config: UcanConfig,
    adapter: str,
) -> tuple[Direction, list[Target]]:
    """The solves of a configuration, and the matrices that it moves, both checked.

    Raises:
        UcanError: as :func:`make_influence_plan`.
    """
    if config.method != "influence":
        raise UcanError(f"make_influence_plan needs method='influence', not {config.method!r}.")
    _check_origin(model, adapter, forget, retain)
    retain = of_variant(retain, config)
    targets = targets_of(model, adapter, config)
    _check_sets(targets, forget, retain)
    return Direction(forget, retain, config), targets


#: The layers that a factor is of, and which factor.
_Solve = tuple[tuple[str, ...], str]


class Direction:
    """Solves for one matrix at a time; what several of them need is factorised once.

    Made by :func:`direction_of`.
    """

    def __init__(
        self, forget: InfluenceFactors, retain: InfluenceFactors, config: UcanConfig
    ) -> None:
        self.forget, self.retain, self.config = forget, retain, config
        self._known: dict[_Solve, object] = {}

    def retain_gradients(self) -> dict[str, torch.Tensor]:
        """R, by the keys of the targets."""
        found = self.retain.gradients.items()
        return {key: total / self.retain.positions for key, total in found}

    def of(self, target: Target) -> tuple[torch.Tensor, float]:
        """d in fp64, and ⟨G, d⟩."""
        forget = self.forget.gradients[target.key] / self.forget.positions
        retain = self.retain.gradients[target.key] / self.retain.positions
        step = self.solve(target, forget - self.config.retain_gradient_weight * retain)
        return step, float((forget * step).sum())

    def solve(self, target: Target, gradient: torch.Tensor) -> torch.Tensor:
        """F⁻¹ of one matrix's gradient, fp64."""
        solve_left, solve_right = (self._solver(target, which) for which in _sides(target))
        # Where the retain set has no curvature at all there is nothing to measure a step by.
        if solve_left is None or solve_right is None:
            return torch.zeros_like(gradient)
        tokens = sum(self.retain.layers[name].tokens for name in target.layers)
        return solve_right(solve_left(gradient).T).T * (self.retain.positions / tokens)

    def solves(self, target: Target) -> tuple[_Solve, _Solve]:
        """What is solved for a matrix, from the left and from the right; others may share it."""
        left, right = _sides(target)
        return self._solve_of(target, left), self._solve_of(target, right)

    def drop(self, solves: Iterable[_Solve]) -> None:
        """Free what no later matrix needs."""
        for solve in solves:
            self._known.pop(solve, None)

    def _solve_of(self, target: Target, which: str) -> _Solve:
        layers = self.retain.layers
        return tuple(layers[n].owner if which == "c_x" else n for n in target.layers), which

    def _solver(self, target: Target, which: str):
        solve = self._solve_of(target, which)
        if solve not in self._known:
            tokens = sum(self.retain.layers[name].tokens for name in target.layers)
            self._known[solve] = solver(self._pooled(target, which), tokens, self.config.damping)
        return self._known[solve]

    def _pooled(self, target: Target, which: str) -> Factor:
        factors = [self.retain.factor(name, which) for name in target.layers]
        if len(factors) > 1 and isinstance(factors[0], Eigen):
            raise UcanError(
                f"{target.key} is shared by {len(factors)} layers, whose eigenbases do not add; "
                "use another influence_variant."
            )
        return factors[0] if len(factors) == 1 else sum(factors[1:], start=factors[0])


def _sides(target: Target) -> tuple[str, str]:
    return ("s_z", "c_x") if target.which == "A" else ("s_h", "c_z")


def targets_of(model: nn.Module, adapter: str, config: UcanConfig) -> list[Target]:
    """The matrices that a configuration moves."""
    variant = config.effective_variant
    layers = influence_layers(model, adapter, variant, config.influence_blocks)
    return find_targets(layers, variant)


def _check_origin(
    model: nn.Module, adapter: str, forget: InfluenceFactors, retain: InfluenceFactors
) -> None:
    now, context = fingerprint(model, adapter), active_context(model, adapter)
    for what, sums in (("forget", forget), ("retain", retain)):
        if sums.fingerprint != now:
            raise UcanError(
                f"the {what} factors were taken on an adapter with fingerprint "
                f"{sums.fingerprint[:12]}, but adapter {adapter!r} has {now[:12]}. Undo the "
                "applied plan first, or collect factors on this adapter."
            )
        if sums.context != context:
            raise UcanError(
                f"the {what} factors of adapter {adapter!r} were taken with different other "
                "adapters active beside it; activate the same ones, or collect again."
            )


def of_variant(retain: InfluenceFactors, config: UcanConfig) -> InfluenceFactors:
    """The factors as the configuration wants them; full ones serve every variant but diagonals."""
    wanted = config.effective_variant
    if not retain.layers:
        raise UcanError("the retain factors hold gradients only; collect with curvature=True.")
    if wanted == "eigenbasis" and retain.variant == "all":
        return retain.compressed(config.influence_rank)
    same = retain.variant == wanted and (
        wanted != "last-blocks" or retain.blocks == config.influence_blocks
    )
    if same and wanted == "eigenbasis":
        _check_rank(retain, config.influence_rank)
    if same or (retain.variant == "all" and wanted in ("b-only", "last-blocks")):
        return retain
    if retain.variant == "all" and wanted == "diagonal":
        layers = {
            name: replace(
                layer,
                c_x=None if layer.c_x is None else layer.c_x.diagonal(),
                s_h=layer.s_h.diagonal(),
            )
            for name, layer in retain.layers.items()
        }
        return replace(retain, layers=layers, variant="diagonal")
    raise UcanError(
        f"the retain factors are of variant {retain.variant!r}"
        f"{f' ({retain.blocks} blocks)' if retain.blocks else ''}, the configuration wants "
        f"{wanted!r}; collect them with variant={wanted!r}"
        f"{f' and blocks={config.influence_blocks}' if wanted == 'last-blocks' else ''}."
    )


def _check_rank(retain: InfluenceFactors, rank: int) -> None:
    shapes = [
        factor.vectors.shape
        for layer in retain.layers.values()
        for factor in (layer.c_x, layer.s_h)
        if factor is not None
    ]
    if any(kept != min(rank, size) for size, kept in shapes):
        most = max(kept for _, kept in shapes)
        raise UcanError(
            f"the retain factors hold {most} eigenpairs each, the configuration wants "
            f"influence_rank={rank}; set it to {most}, or collect them with rank={rank}."
        )


def _check_sets(targets: list[Target], forget: InfluenceFactors, retain: InfluenceFactors) -> None:
    for what, sums in (("forget", forget), ("retain", retain)):
        if not sums.positions > 0:
            raise UcanError(
                f"the {what} set is empty: it holds no scored position"
                + (" (does the bank hold more than the forget set?)." if what == "retain" else ".")
            )
        for target in targets:
            if target.key not in sums.gradients:
                raise UcanError(
                    f"the {what} factors hold no gradient of {target.key}; collect both with the "
                    "configuration's variant."
                )
    for target in targets:
        for name in target.layers:
            if name not in retain.layers or not retain.layers[name].tokens > 0:
                raise UcanError(f"the retain set is empty: {name} saw no token of it.")
