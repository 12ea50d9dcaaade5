"""AttenuationPlan: the factors of every neuron, put on a model and taken off again."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from . import ops
from .adapter import find_layers
from .config import UcanConfig
from .errors import UcanError, warn
from .files import read_safetensors, write_safetensors
from .neurons import NeuronGroup, neuron_groups
from .reversible import ReversiblePlan
from .weights import WeightEdit

FORMAT = "ucan_fast.plan"
FORMAT_VERSION = "1"
_FIELDS = ("factors", "risk", "utility", "score")


@dataclass
class AttenuationPlan(ReversiblePlan):
    """What will be scaled, by how much, and why.

    Attributes:
        config: the choices it was made with.
        fingerprint: of the adapter it is for.
        factors: name -> γ, fp32 ``[n]``; every layer of the plan is present, 1.0 where untouched.
            Layers that share a Parameter hold the same factors. The names of gates are
            ``{layer}.lora_A`` for inputs and ``{layer}.lora_B`` for outputs.
        risk, utility, score: name -> R, U, S, fp32 ``[n]`` (of gates:
            :func:`ucan_fast.make_gates_plan`).
        threshold: t; selected is S > t.
        strength: the β in use; of gates, the predicted rise of the forget NLL in nats.
        note: what a user must know about it (nothing selected, strength not searched for), or "".
    """

    config: UcanConfig
    fingerprint: str
    groups: list[tuple[str, ...]]
    flat_factors: torch.Tensor
    flat_risk: torch.Tensor
    flat_utility: torch.Tensor
    flat_score: torch.Tensor
    sizes: list[int]
    threshold: float
    strength: float
    note: str = ""
    applied_fingerprint: str | None = None
    originals: dict[str, torch.Tensor] | None = None

    def __repr__(self) -> str:
        return (
            f"AttenuationPlan({self.attenuated} of {self.neurons} neurons attenuated in "
            f"{self._where}, "
            f"strength {self.strength:.4g}, "
            f"fingerprint {self.fingerprint[:12]})"
        )

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        return self._by_name(self.flat_factors)

    @property
    def risk(self) -> dict[str, torch.Tensor]:
        return self._by_name(self.flat_risk.float())

    @property
    def utility(self) -> dict[str, torch.Tensor]:
        return self._by_name(self.flat_utility.float())

    @property
    def score(self) -> dict[str, torch.Tensor]:
        return self._by_name(self.flat_score.float())

    @property
    def neurons(self) -> int:
        """All neurons of the plan."""
        return self.flat_factors.numel()

    @property
    def selected(self) -> int:
        """Neurons with S > t."""
        return int((self.flat_score > self.threshold).sum())

    @property
    def is_noop(self) -> bool:
        """Whether it leaves every weight as it is."""
        return not self.attenuated

    @property
    def attenuated(self) -> int:
        """Neurons whose factor is not 1."""
        return int((self.flat_factors != 1).sum())

    def with_strength(self, strength: float) -> AttenuationPlan:
        """The same selection at another β (a new plan, not applied)."""
        if not strength >= 0:
            raise UcanError(f"strength must be a number >= 0, not {strength!r}.")
        # A decay is relative to the largest score; scores of gates are absolute: γ = exp(-t S).
        per_largest = self._largest() if self._gates else 1.0
        score = self.flat_score
        if ops.requested_backend() == "triton" and torch.cuda.is_available():
            score = score.cuda()  # a plan lies on the CPU; who asks for kernels by name gets them
        factors = ops.attenuation_factors(
            score,
            self.threshold,
            decay=self.config.decay,
            strength=float(strength) * per_largest,
            floor=float(self.config.floor),
        )
        return self._derive(flat_factors=factors.cpu(), strength=float(strength))

    def with_fraction(self, fraction: float) -> AttenuationPlan:
        """Another share of neurons selected, at the same β (a new plan, not applied)."""
        if self._gates:
            raise UcanError("gates are not selected by a fraction; use with_strength.")
        config = self.config.replace(fraction=fraction)
        threshold, note = select(self.flat_score, config)
        plan = self._derive(config=config, threshold=threshold, note=note)
        return plan.with_strength(self.strength)

    @property
    def _where(self) -> str:
        # Gates are at the inputs of A and at the outputs of B.
        parts = "matrices" if self.config.method == "gates" else "layers"
        return f"{len(self.sizes)} {parts}, site {self.config.effective_site!r}"

    def summary(self) -> str:
        """A few lines for people."""
        share = 100 * self.attenuated / max(self.neurons, 1)
        lines = [
            f"{self.attenuated} of {self.neurons} neurons attenuated ({share:.1f} %) in "
            f"{self._where}",
            f"score: largest {self._largest():.4g}, threshold {self.threshold:.4g}; "
            f"strength {self.strength:.4g}, smallest factor {self._smallest():.4g}",
        ]
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)

    def _edit(self, model: nn.Module, adapter: str) -> WeightEdit:
        return WeightEdit(self.match(model, adapter))

    def _write(self, edit: WeightEdit) -> None:
        edit.write(self.flat_factors)

    def match(self, model: nn.Module, adapter: str) -> list[NeuronGroup]:
        """The model's neurons, checked to be the plan's.

        Raises:
            UcanError: layers, sizes or shared parameters differ.
        """
        groups = neuron_groups(model, find_layers(model, adapter), self.config.effective_site)
        if [g.names for g in groups] != self.groups or [g.n for g in groups] != self.sizes:
            raise UcanError(
                "the model's LoRA layers are not those of the plan (names, sizes or shared "
                "parameters differ)."
            )
        return groups

    def save(self, path: str | os.PathLike, include_original: bool = False) -> None:
        """Write a safetensors file, whole or not at all.

        Args:
            include_original: also write the values that :meth:`apply` overwrote, so that a plan
                loaded elsewhere can undo.

        Raises:
            UcanError: the originals are asked for and there are none, or the file could not be
                written (what stood there before is untouched).
        """
        tensors = {
            "factors": self.flat_factors,
            "risk": self.flat_risk,
            "utility": self.flat_utility,
            "score": self.flat_score,
        }
        keys = sorted(self.originals or {}) if include_original else []
        if include_original and self.originals is None:
            raise UcanError("there are no original values to save: the plan was not applied.")
        for index, key in enumerate(keys):
            tensors[f"original.{index}"] = self.originals[key]
        values = {
            "config": json.loads(self.config.to_json()),
            "fingerprint": self.fingerprint,
            "applied_fingerprint": self.applied_fingerprint,
            "groups": self.groups,
            "sizes": self.sizes,
            "threshold": self.threshold,
            "strength": self.strength,
            "note": self.note,
            "originals": keys,
        }
        write_safetensors(path, FORMAT, FORMAT_VERSION, {"plan": json.dumps(values)}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike) -> AttenuationPlan:
        """Read what :meth:`save` wrote.

        Raises:
            UcanError: the file is missing, truncated, corrupt or of another kind.
        """
        metadata, tensors = read_safetensors(path, FORMAT, FORMAT_VERSION)
        try:
            values = json.loads(metadata["plan"])
            keys = values["originals"]
            plan = cls(
                config=UcanConfig.from_saved(values["config"]),
                fingerprint=values["fingerprint"],
                groups=[tuple(names) for names in values["groups"]],
                sizes=values["sizes"],
                threshold=values["threshold"],
                strength=values["strength"],
                note=values["note"],
                applied_fingerprint=values["applied_fingerprint"],
                originals={k: tensors[f"original.{i}"] for i, k in enumerate(keys)} or None,
                **{f"flat_{key}": tensors[key] for key in _FIELDS},
            )
            if len(plan.groups) != len(plan.sizes):
                raise ValueError("it has another number of sizes than of layers")
            if any(getattr(plan, f"flat_{key}").numel() != sum(plan.sizes) for key in _FIELDS):
                raise ValueError("the number of neurons does not fit the layers")
            # Written so that a NaN is refused too.
            if not ((plan.flat_factors >= 0) & (plan.flat_factors <= 1)).all():
                raise ValueError("a factor is not a number between 0 and 1")
        except UcanError as error:
            raise UcanError(f"{path}: {error}") from error
        except (KeyError, ValueError, TypeError) as error:
            raise UcanError(f"{path} is damaged: {error}; make the plan again.") from error
        return plan

    def warn_if_unusual(self) -> None:
        """Say aloud that the plan does nothing, or far too much."""
        if not self.attenuated:
            warn(f"this plan changes nothing: {self.note}")
        elif self.attenuated > self.neurons / 2 and not self._gates:
            warn(
                f"this plan attenuates {self.attenuated} of {self.neurons} neurons, more than "
                f"half: fraction={self.config.fraction:g}, threshold {self.threshold:.4g}, largest "
                f"score {self._largest():.4g}. It will harm the retain set; lower fraction or "
                "raise the threshold.",
            )

    def _derive(self, **changes) -> AttenuationPlan:
        return dataclasses.replace(self, **changes, applied_fingerprint=None, originals=None)

    def _by_name(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = flat.split(self.sizes)
        return {
            name: part for names, part in zip(self.groups, parts, strict=True) for name in names
        }

    @property
    def _gates(self) -> bool:
        return self.config.method == "gates"

    def _largest(self) -> float:
        return float(self.flat_score.max()) if self.neurons else 0.0

    def _smallest(self) -> float:
        return float(self.flat_factors.min()) if self.neurons else 1.0


def select(score: torch.Tensor, config: UcanConfig) -> tuple[float, str]:
    """The threshold t, and why nothing is selected ("" where something is).

    ``t = max(quantile(S, 1 - fraction) or risk_threshold, min_score)``; the quantile interpolates
    linearly, as numpy's and torch's do by default.
    """
    largest = float(score.max())
    if config.risk_threshold is not None:
        wanted, how = float(config.risk_threshold), f"risk_threshold={config.risk_threshold:g}"
    else:
        wanted = _quantile(score, 1 - config.fraction)
        how = f"the quantile of fraction={config.fraction:g}"
    threshold = max(wanted, config.effective_min_score)
    if largest > threshold:
        return threshold, ""
    if threshold > wanted or largest <= config.effective_min_score:
        note = (
            f"nothing is selected: D_f and D_r are indistinguishable to this method (largest score "
            f"{largest:.4g}, at most min_score={config.effective_min_score:g}). Retraining or a "
            "gradient-based method can still separate them."
        )
    else:
        note = f"nothing is selected: the largest score {largest:.4g} is not above {how}."
    return threshold, note


def _quantile(score: torch.Tensor, q: float) -> float:
    # torch.quantile refuses more than 2^24 values. Only two of them have to stand in their places.
    position = q * (score.numel() - 1)
    low = int(position)
    high = min(low + 1, score.numel() - 1)
    ordered = torch.from_numpy(np.partition(score.numpy(), (low, high)))
    return float(torch.lerp(ordered[low], ordered[high], position - low))
