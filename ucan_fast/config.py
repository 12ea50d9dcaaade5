"""UcanConfig: every choice that the method leaves open, validated."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from typing import Any

from .errors import UcanError

METHODS = ("attenuate", "influence", "gates")
SITES = ("input", "rank", "output", "mlp")
#: Where gates are.
BOTH_SITES = "input and output"
#: What is kept of the Kronecker factors of the influence step.
VARIANTS = ("all", "b-only", "last-blocks", "eigenbasis", "diagonal")
_CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "site": SITES,
    "statistic": ("mean_abs", "rms"),
    "contrast": ("symmetric", "difference", "ratio", "zscore", "none"),
    "normalization": ("none", "layer", "global"),
    "fusion": ("protect", "subtract"),
    "decay": ("exponential", "inverse", "linear", "hard"),
    "output_signal": ("delta", "layer"),
    "influence_variant": VARIANTS,
}
_RANGES: dict[str, tuple[float, float]] = {
    "utility_weight": (0.0, math.inf),
    "fraction": (0.0, 1.0),
    "floor": (0.0, 1.0),
    "max_retain_loss_increase": (0.0, math.inf),
    "max_strength": (0.0, math.inf),
    "damping": (0.0, math.inf),
    "retain_gradient_weight": (0.0, math.inf),
    "trust_region": (0.0, math.inf),
    "influence_radius": (1e-12, math.inf),
}
#: What a seed must be.
SEEDS = "an integer in [-2**63, 2**64 - 1]"
_COUNTS = ("influence_rank", "influence_blocks", "influence_steps")
#: Of fields that not every method reads: those that do.
READERS: dict[str, tuple[str, ...]] = {
    name: methods
    for methods, names in {
        ("attenuate",): (
            *("site", "statistic", "contrast", "normalization", "fusion", "utility_weight"),
            *("fraction", "risk_threshold", "min_score", "decay", "output_signal"),
        ),
        ("attenuate", "gates"): ("floor",),
        ("influence",): (
            *("influence_variant", "influence_rank", "influence_blocks"),
            *("influence_steps", "influence_radius", "influence_batches"),
        ),
        ("influence", "gates"): ("damping", "retain_gradient_weight", "trust_region"),
    }.items()
    for name in names
}
#: Named choices: what differs from the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # 5 % of retain loss cost 20 % of retained rankings in the comparison, 1 % about 4 %.
    "best": {"method": "influence", "max_retain_loss_increase": 0.01},
    "thorough": {
        "method": "influence",
        "influence_steps": 20,
        "damping": 0.03,
        "retain_gradient_weight": 2.0,
        # Of data that the steps do not run; what they run gets better.
        "max_retain_loss_increase": 0.02,
    },
}


@dataclass(frozen=True)
class UcanConfig:
    """All choices of the method. The paper (arXiv 2602.23400) gives none of the values below:
    the defaults are *ours*, the best of those tried on a small recommender.

    Attributes:
        method: ``"attenuate"``, the paper's soft attenuation, or ``"influence"``, one
            preconditioned step up the forget loss, or several (not in the paper). It reads the
            last nine fields, and ``strength``, ``max_strength``, ``max_retain_loss_increase`` and
            ``seed``. ``"gates"``, the strongest attenuation (not in the paper): all inputs and
            outputs, each by its slope and curvature. It reads the same fields but those of
            ``influence_...``, and ``floor``.
        site: which neurons are measured and scaled. ``"input"``: the K inputs of a layer
            (column j of A). ``"rank"``: the r rank dimensions (column j of B). ``"output"``: the
            N outputs (row j of B). ``"mlp"``: the intermediate neurons of a gated MLP (column j
            of A of ``down_proj``, row j of B of ``gate_proj`` and ``up_proj``).
        statistic: a_g = mean of ``|h|`` (``"mean_abs"``) or sqrt of the mean of h² (``"rms"``).
        contrast: ``"symmetric"`` (a_f - a_r)/(a_f + a_r); ``"difference"`` a_f - a_r;
            ``"ratio"`` a_f/a_r - 1 (unbounded: one neuron that never fires on D_r outweighs all
            others); ``"zscore"`` the difference over its standard error;
            ``"none"`` a_f over the layer's maximum (the paper's ablation w/o C).
        normalization: risk as it is, or divided by the maximum of its layer or of all layers.
        fusion: score S = R (1 - U)^λ (``"protect"``) or R - λ U (``"subtract"``).
        utility_weight: λ. 0 is the paper's ablation w/o F.
        fraction: the share of all neurons of the plan that may be selected.
        risk_threshold: a fixed threshold t on the score, instead of the quantile.
        min_score: t is never below this. ``None``: 0.05 for the symmetric contrast, else 0.
        decay: γ(u) = exp(-βu), 1/(1+βu), max(1-βu, 0), or 0 (``"hard"``, the ablation w/o H).
        strength: β, or ``"auto"``: the largest β whose retain loss stays within the budget. Of an
            influence step and of gates: t, the predicted rise of the forget NLL in nats per token.
        floor: γ is never below this.
        max_retain_loss_increase: the budget for ``"auto"``: how far the mean retain NLL may
            rise, relative to its value before (0.05 = 5 %). An influence step moves rankings more
            than this loss: start with 0.01 there, or search on a loss of your own
            (``calibration=`` a function): a must where the retain set is known by heart, since a
            share of next to nothing is nothing.
        max_strength: ``"auto"`` searches β in [0, max_strength]; t at most up to ln V. (Not
            of several steps.)
        output_signal: for ``site="output"``: ``"delta"``, the adapter's own contribution, or
            ``"layer"``, the whole output of the layer.
        seed: for the random control, for drawing calibration batches, and for the labels that
            the factors of an influence step are drawn with (of a bank: with its own, which is kept
            in it). An integer of 64 bits.
        influence_variant: which matrices an influence step moves, and what is kept of their
            Kronecker factors. ``"all"``: everything. ``"b-only"``: B alone. ``"last-blocks"``: A
            and B of the last ``influence_blocks`` blocks. ``"eigenbasis"``: the large factors as
            ``influence_rank`` eigenpairs and a flat rest. ``"diagonal"``: only their diagonals.
            :func:`ucan_fast.factor_memory` says what each takes.
        influence_rank, influence_blocks: see there.
        damping: added to every factor, relative to its mean eigenvalue; for gates, to every
            curvature, relative to the mean over its matrix.
        retain_gradient_weight: κ, how much of the retain gradient is taken off the forget
            gradient.
        trust_region: ``"auto"`` goes no further than where the measured rise of the forget NLL is
            off the predicted one by this share of it, or is a fall. (Of what is known well the
            slope grows on the way, and the rise is some times the predicted one.) Of one step;
            several are short.
        influence_steps: how many at most. More than one (:class:`ucan_fast.InfluenceWalk`) take
            the gradients of both sets anew before each, stop by themselves where the forget set
            is known no better than without the adapter, and need retain data at every step.
        influence_radius: ε, how far one of several steps goes: nats of KL per retained token by
            the factors' quadratic model (which is above the true one where labels are sure).
        influence_batches: retain batches that one of several steps runs, drawn anew before each
            (``seed``); 0: all of them.

    Raises:
        UcanError: a value is of the wrong type or out of its range, or the method does not read
            it and it is not the default; the field is named.
    """

    method: str = "attenuate"
    site: str = "input"
    statistic: str = "mean_abs"
    contrast: str = "symmetric"
    normalization: str = "none"
    fusion: str = "protect"
    utility_weight: float = 1.0
    fraction: float = 0.15
    risk_threshold: float | None = None
    min_score: float | None = None
    decay: str = "exponential"
    strength: float | str = "auto"
    floor: float = 0.0
    max_retain_loss_increase: float = 0.05
    max_strength: float = 32.0
    output_signal: str = "delta"
    seed: int = 0
    influence_variant: str = "all"
    influence_rank: int = 32
    influence_blocks: int = 2
    damping: float = 0.01
    retain_gradient_weight: float = 1.0
    trust_region: float = 3.0
    influence_steps: int = 1
    influence_radius: float = 5e-4
    influence_batches: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                _refuse(name, getattr(self, name), "one of " + ", ".join(map(repr, choices)))
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not _is_number(value) or not low <= value <= high:
                _refuse(name, value, f"a number in [{low:g}, {high:g}]")
        for name in ("risk_threshold", "min_score"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                _refuse(name, value, "a finite number or None")
        if self.strength != "auto" and (not _is_number(self.strength) or self.strength < 0):
            _refuse("strength", self.strength, "'auto' or a number >= 0")
        if not is_seed(self.seed):
            _refuse("seed", self.seed, SEEDS)
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                _refuse(name, value, "an integer >= 1")
        count = self.influence_batches
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            _refuse("influence_batches", count, "an integer >= 0")
        self._check_read()
        if self.influence_steps > 1 and not self.auto_strength:
            raise UcanError(
                f"UcanConfig: influence_steps={self.influence_steps} is for strength='auto', not "
                f"strength={self.strength!r}."
            )
        if count and self.influence_steps == 1:
            raise UcanError(
                f"UcanConfig: influence_batches={count} is for influence_steps > 1; one step runs "
                "no retain batches but those of its statistics."
            )
        if self.decay == "hard" and self.auto_strength and self.risk_threshold is not None:
            raise UcanError(
                "UcanConfig: decay='hard' with a fixed risk_threshold leaves strength='auto' "
                "nothing to search over; give strength a number or drop risk_threshold."
            )

    def _check_read(self) -> None:
        """Refuse what the method does not read: it would change nothing, silently."""
        unread = self.unread_by(self.method)
        if unread:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in unread)
            readers = sorted({reader for name in unread for reader in READERS[name]})
            raise UcanError(
                f"UcanConfig: method={self.method!r} does not read {given} (for method "
                f"{' or '.join(map(repr, readers))}): leave {'it' if len(unread) == 1 else 'them'} "
                "out."
            )

    def unread_by(self, method: str) -> list[str]:
        """Names of the fields that are not as by default, and that this method does not read."""
        return [
            field.name
            for field in dataclasses.fields(self)
            if method not in READERS.get(field.name, (method,))
            and getattr(self, field.name) != field.default
        ]

    @property
    def auto_strength(self) -> bool:
        """Whether β (for ``decay="hard"``: the fraction) is searched for."""
        return self.strength == "auto"

    @property
    def effective_min_score(self) -> float:
        """``min_score`` with its default filled in."""
        if self.min_score is not None:
            return float(self.min_score)
        return 0.05 if self.contrast == "symmetric" else 0.0

    @property
    def effective_site(self) -> str:
        """``site``, or for gates both sites that they are at."""
        return BOTH_SITES if self.method == "gates" else self.site

    @property
    def effective_variant(self) -> str:
        """``influence_variant``, or for gates the variant that is enough for them."""
        return "diagonal" if self.method == "gates" else self.influence_variant

    @classmethod
    def preset(cls, name: str, **changes: Any) -> UcanConfig:
        """A named choice, with some fields changed.

        Args:
            name: ``"paper"``, U-CAN as we read the paper (the defaults): soft attenuation, forward
                passes only. ``"best"``, what forgets most per retained recommendation on the small
                recommenders of our comparison (``docs/quality.md``; not in every case on a real
                language model): the influence step, within 1 % of retain loss; one backward pass
                over the forget set, and a bank of factors. ``"thorough"``, up to twenty such steps
                on the way to where the forget set is known no better than without the adapter:
                as many passes over it and over retain data.
            changes: fields on top of it.

        Raises:
            UcanError: an unknown preset or field, or a value out of range.
        """
        if name not in PRESETS:
            raise UcanError(
                f"UcanConfig: there is no preset {name!r}; known are "
                + ", ".join(map(repr, PRESETS))
                + "."
            )
        return cls().replace(**{**PRESETS[name], **changes})

    def replace(self, **changes: Any) -> UcanConfig:
        """A copy with some fields changed, validated again."""
        self._check_keys(changes)
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> UcanConfig:
        """The inverse of :meth:`to_json`; missing fields take their defaults.

        Raises:
            UcanError: not a JSON object, an unknown field, or a value out of range.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UcanError(f"UcanConfig: not valid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise UcanError("UcanConfig: the JSON must be an object of fields.")
        cls._check_keys(fields)
        return cls(**fields)

    @classmethod
    def from_saved(cls, fields: Any) -> UcanConfig:
        """The configuration that a saved plan holds.

        As :meth:`from_json` of the same fields, but what the method does not read is passed over:
        it changed nothing when the plan was made, and a plan must stay readable.

        Raises:
            UcanError: as :meth:`from_json`.
        """
        if isinstance(fields, dict):
            method = fields.get("method", cls.method)
            fields = {n: v for n, v in fields.items() if method in READERS.get(n, (method,))}
        return cls.from_json(json.dumps(fields))

    @classmethod
    def _check_keys(cls, fields: dict[str, Any]) -> None:
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise UcanError(
                f"UcanConfig: unknown field {', '.join(map(repr, unknown))}; "
                f"known are {', '.join(known)}."
            )


def config_or(config: UcanConfig | None, method: str = "attenuate") -> UcanConfig:
    """The configuration that was given, or the defaults of a method.

    Raises:
        UcanError: something else was given (a preset's name, a dict).
    """
    if config is None:
        return UcanConfig(method=method)
    if not isinstance(config, UcanConfig):
        raise UcanError(
            f"config must be a UcanConfig, not {config!r}: UcanConfig(method=...), or "
            "UcanConfig.preset(name)."
        )
    return config


def is_seed(value: Any) -> bool:
    """Whether torch's generators take it as a seed."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # A comparison rather than isfinite, which raises on integers beyond a float.
    return number and abs(value) <= sys.float_info.max


def _refuse(name: str, value: Any, wanted: str) -> None:
    raise UcanError(f"UcanConfig: {name} must be {wanted}, not {value!r}.")
