"""InfluenceFactors: loss gradients and Kronecker factors of one token set, as sums."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from .config import VARIANTS
from .errors import UcanError
from .files import read_safetensors, write_safetensors

FORMAT = "ucan_fast.influence_factors"
#: 2: labels are drawn from softened logits. 3: B's factor is of gradients that hold the scaling.
FORMAT_VERSION = "3"
#: The factors of A (C_x, S_z) and of B (S_h, C_z).
FACTORS = ("c_x", "s_z", "s_h", "c_z")

#: How far a part may exceed the whole by rounding (bf16 with other batching), relatively.
_ROUNDING = 1e-2


@dataclass
class Eigen:
    """A symmetric factor as its largest eigenpairs, and the mean of the other eigenvalues.

    Attributes:
        vectors: ``[n, k]``, orthonormal columns.
        values: ``[k]``.
        rest: ``[]``, the eigenvalue that stands for each of the other n - k.
    """

    vectors: torch.Tensor
    values: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, full: torch.Tensor, k: int) -> Eigen:
        """The k largest eigenpairs of a full factor ``[n, n]``, and its trace kept."""
        n = full.shape[0]
        values, vectors = torch.linalg.eigh(full.double())
        k = min(k, n)
        rest = values[: n - k].mean() if k < n else values.new_zeros(())
        dtype = full.dtype
        return cls(vectors[:, n - k :].to(dtype), values[n - k :].to(dtype), rest.to(dtype))


#: ``[n, n]``, its diagonal ``[n]``, or eigenpairs.
Factor = torch.Tensor | Eigen


@dataclass
class LayerFactors:
    """Sums over the tokens that one LoRA layer saw.

    With h the gradient of the summed NLL (of drawn labels: :func:`ucan_fast.collect_factors`) by
    the output of ``lora_B`` (s times that by the layer's output) and g_z that by the output of
    ``lora_A``.

    Attributes:
        tokens: how many.
        owner: the layer that holds C_x for this one: itself, or one that reads the same tensor.
        c_x: ``Σ x xᵀ``, K x K (None where it is the owner's, or of no use to the variant).
        s_z: ``Σ g_z g_zᵀ``, r x r.
        s_h: ``Σ h hᵀ``, N x N.
        c_z: ``Σ z zᵀ``, r x r.
    """

    tokens: float
    owner: str
    c_x: Factor | None = None
    s_z: Factor | None = None
    s_h: Factor | None = None
    c_z: Factor | None = None


@dataclass
class InfluenceFactors:
    """What the influence step must know of a token set; additive over tokens, so subtractive.

    Attributes:
        gradients: ``{layer}.lora_A`` and ``.lora_B`` -> sum over the scored positions of the
            gradient of their NLL (true labels), fp64 on the CPU, in the Parameter's shape. A
            Parameter that several layers share has one entry, under the first of them.
        positions: how many scored positions.
        tokens: how many tokens of the group, in sequences that are scored anywhere.
        layers: name -> :class:`LayerFactors`; empty where they were not wanted.
        variant: which it is (:class:`UcanConfig`).
        blocks: for ``"last-blocks"``, how many; else 0.
        seed: with which labels were drawn.
        fingerprint: of the adapter they were taken on (the origin).
        context: of the other adapters that were active with it.
    """

    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    positions: float = 0.0
    tokens: float = 0.0
    layers: dict[str, LayerFactors] = field(default_factory=dict)
    variant: str = "all"
    blocks: int = 0
    seed: int = 0
    fingerprint: str = ""
    context: str = ""

    def __repr__(self) -> str:
        curvature = f"{len(self.layers)} layers" if self.layers else "gradients only"
        return (
            f"InfluenceFactors({curvature}, variant {self.variant!r}, {self.tokens:.0f} tokens, "
            f"{self.positions:.0f} scored positions, {self.bytes / 2**20:.1f} MiB, "
            f"fingerprint {self.fingerprint[:12]})"
        )

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        tensors = [*self.gradients.values(), *(t for _, t in self._tensors())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def factor(self, name: str, which: str) -> Factor | None:
        """One of :data:`FACTORS` of a layer; C_x from the layer that holds it."""
        layer = self.layers[name]
        return getattr(self.layers[layer.owner] if which == "c_x" else layer, which)

    def __add__(self, other: InfluenceFactors) -> InfluenceFactors:
        """Both token sets together. Factors that only one of them has are left out.

        Raises:
            UcanError: different adapters, variants, seeds or layers; eigenbases, which do not add.
        """
        self._check_same(other, "add")
        return self._combine(other, 1)

    def __sub__(self, other: InfluenceFactors) -> InfluenceFactors:
        """Without the tokens of ``other``, exact where they ran in the same sequences.

        An eigenbasis is the summary of a whole bank: only gradients are taken out of it, the
        factors stay those of all data.

        Raises:
            UcanError: different adapters, variants, seeds or layers, ``other`` holds tokens that
                are not in here, or it was collected without the factors that must be taken out.
        """
        self._check_same(other, "subtract")
        if self.layers and self.variant != "eigenbasis" and not other.layers:
            raise UcanError(
                "cannot subtract: the part to take out was collected without factors "
                "(curvature=False), so they would stay in. Collect it with them."
            )
        return self._combine(other, -1)

    def compressed(self, rank: int) -> InfluenceFactors:
        """C_x and S_h as their ``rank`` largest eigenpairs and a flat rest.

        Raises:
            UcanError: these are not full factors.
        """
        if self.variant != "all" or not self.layers:
            raise UcanError(
                f"only the full factors (variant 'all') have an eigenbasis, not {self.variant!r}"
                f"{'' if self.layers else ' without factors'}."
            )
        layers = {
            name: replace(
                layer,
                c_x=None if layer.c_x is None else Eigen.of(layer.c_x, rank),
                s_h=Eigen.of(layer.s_h, rank),
            )
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers, variant="eigenbasis")

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all.

        The gradients of a forget set say a good deal about it: treat the file like the set.

        Raises:
            UcanError: it could not be written; what stood there before is untouched.
        """
        tensors = {f"gradient.{i}": t for i, t in enumerate(self.gradients.values())}
        tensors |= dict(self._tensors())
        values = {
            "gradients": list(self.gradients),
            "positions": self.positions,
            "tokens": self.tokens,
            "layers": [[n, layer.tokens, layer.owner] for n, layer in self.layers.items()],
            "variant": self.variant,
            "blocks": self.blocks,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "context": self.context,
        }
        write_safetensors(path, FORMAT, FORMAT_VERSION, {"factors": json.dumps(values)}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike) -> InfluenceFactors:
        """Read what :meth:`save` wrote.

        Raises:
            UcanError: the file is missing, truncated, corrupt or of another kind.
        """
        metadata, tensors = read_safetensors(path, FORMAT, FORMAT_VERSION)
        try:
            values = json.loads(metadata["factors"])
            loaded = cls(
                gradients={n: tensors[f"gradient.{i}"] for i, n in enumerate(values["gradients"])},
                positions=float(values["positions"]),
                tokens=float(values["tokens"]),
                **{key: values[key] for key in ("variant", "blocks", "seed")},
                fingerprint=values["fingerprint"],
                context=values["context"],
            )
            if loaded.variant not in VARIANTS:
                raise ValueError(f"unknown variant {loaded.variant!r}")
            for index, (name, tokens, owner) in enumerate(values["layers"]):
                parts = {which: _read_factor(tensors, f"{index}.{which}") for which in FACTORS}
                loaded.layers[name] = LayerFactors(float(tokens), owner, **parts)
            if not {layer.owner for layer in loaded.layers.values()} <= set(loaded.layers):
                raise ValueError("a layer shares the factor of a layer that is not there")
            loaded.check_finite()
        except (KeyError, ValueError, TypeError) as error:
            raise UcanError(f"{path} is damaged: {error}; collect it again.") from error
        return loaded

    def check_finite(self) -> None:
        """Refuse NaN and Inf.

        Raises:
            UcanError: names the layers (at most five).
        """
        names = list(self.layers)
        tensors = [(key.rpartition(".")[0], t) for key, t in self.gradients.items()]
        tensors += [(names[int(key.partition(".")[0])], t) for key, t in self._tensors()]
        bad = list(dict.fromkeys(name for name, t in tensors if not torch.isfinite(t).all()))
        if bad:
            more = f" and {len(bad) - 5} more" if bad[5:] else ""
            raise UcanError(
                f"NaN or Inf activations or gradients in {', '.join(bad[:5])}{more}; nothing was "
                "recorded. Check the model's weights and dtype (fp16 overflows beyond 65504)."
            )

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the factors, by its name in a file."""
        for index, layer in enumerate(self.layers.values()):
            for which in FACTORS:
                factor = getattr(layer, which)
                if isinstance(factor, Eigen):
                    for part in ("vectors", "values", "rest"):
                        yield f"{index}.{which}.{part}", getattr(factor, part)
                elif factor is not None:
                    yield f"{index}.{which}", factor

    def _check_same(self, other: InfluenceFactors, verb: str) -> None:
        if self.fingerprint != other.fingerprint:
            raise UcanError(
                f"cannot {verb} factors of different adapters (fingerprints "
                f"{self.fingerprint[:12]} and {other.fingerprint[:12]}). Factors belong to the "
                "adapter before any unlearning: undo the applied plan, then collect again."
            )
        if self.context != other.context:
            raise UcanError(
                f"cannot {verb} factors taken with different other adapters active beside this "
                "one. Activate the same adapters, in the state they had when the bank was taken."
            )
        if verb == "add" and self.variant == "eigenbasis" and self.layers and other.layers:
            raise UcanError(
                "eigenbases do not add: collect with variant 'all', add, then compress."
            )
        mine, theirs = (
            {n: tuple(t.shape) for n, t in one.gradients.items()} for one in (self, other)
        )
        for name in {**mine, **theirs}:
            if mine.get(name) != theirs.get(name):
                raise UcanError(
                    f"cannot {verb} factors of different layers or ranks: {name} is "
                    f"{mine.get(name, 'not there')} in one and {theirs.get(name, 'not there')} in "
                    f"the other (variants {self.variant!r} and {other.variant!r})."
                )
        if not (self.layers and other.layers) or self.variant == "eigenbasis":
            return
        if (self.variant, self.blocks, list(self.layers)) != (
            *(other.variant, other.blocks),
            list(other.layers),
        ):
            raise UcanError(
                f"cannot {verb} factors of different variants ({self.variant!r} and "
                f"{other.variant!r}) or layers; collect both alike."
            )
        if self.seed != other.seed:
            raise UcanError(
                f"cannot {verb} factors whose labels were drawn with different seeds "
                f"({self.seed} and {other.seed}): a token would have another gradient in each. "
                "Collect both with one seed."
            )

    def _combine(self, other: InfluenceFactors, sign: int) -> InfluenceFactors:
        gradients = {n: t + sign * other.gradients[n] for n, t in self.gradients.items()}
        positions = self.positions + sign * other.positions
        tokens = self.tokens + sign * other.tokens
        if positions < 0 or tokens < 0:
            raise _not_contained("", "tokens")
        result = replace(self, gradients=gradients, positions=positions, tokens=tokens)
        if self.variant == "eigenbasis":
            return result
        result.layers = {}
        if not (self.layers and other.layers):
            return result
        # Two layers still share C_x where they did so in both.
        owners: dict[tuple[str, str], str] = {}
        for name, layer in self.layers.items():
            theirs = other.layers[name]
            owner = owners.setdefault((layer.owner, theirs.owner), name)
            parts = {}
            for which in FACTORS:
                if which == "c_x" and owner != name:
                    continue
                mine, part = self.factor(name, which), other.factor(name, which)
                if mine is not None:
                    parts[which] = _sum(mine, part, sign, name)
            tokens = layer.tokens + sign * theirs.tokens
            if tokens < 0:
                raise _not_contained(name, "tokens")
            result.layers[name] = LayerFactors(tokens, owner, **parts)
        return result


def _sum(mine: torch.Tensor, theirs: torch.Tensor, sign: int, name: str) -> torch.Tensor:
    total = mine + sign * theirs
    diagonal = (lambda t: t.diagonal()) if mine.dim() == 2 else (lambda t: t)
    if sign < 0 and (diagonal(total) < -_ROUNDING * diagonal(mine)).any():
        raise _not_contained(name, "sums of squares")
    return total


def _not_contained(name: str, what: str) -> UcanError:
    where = f"{name}: " if name else ""
    return UcanError(
        f"{where}the forget set is not contained in the bank (its {what} exceed the bank's). The "
        "bank must cover all data, the forget tokens included, run in the same sequences, and "
        "requests in a row must not overlap: a token deleted twice would be taken from it twice."
    )


def _read_factor(tensors: dict[str, torch.Tensor], key: str) -> Factor | None:
    if f"{key}.vectors" in tensors:
        return Eigen(*(tensors[f"{key}.{part}"] for part in ("vectors", "values", "rest")))
    factor = tensors.get(key)
    if factor is not None and (factor.dim() not in (1, 2) or len(set(factor.shape)) != 1):
        raise ValueError(f"factor {key} has the shape {tuple(factor.shape)}")
    return factor


def solver(
    factor: Factor, count: float, damping: float
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """``M -> (F + l I)⁻¹ M`` for the mean factor ``F = sum / count`` and ``l = damping tr(F)/n``.

    A full factor is solved by Cholesky in fp64, never inverted.

    Args:
        factor: a sum over ``count`` tokens.
        damping: relative to the mean eigenvalue.

    Returns:
        A function of fp64 ``[n, m]``, or None where the factor is zero.

    Raises:
        UcanError: the damped factor is not positive definite.
    """
    if isinstance(factor, Eigen):
        vectors, values = factor.vectors.double(), factor.values.double() / count
        rest, n = float(factor.rest) / count, vectors.shape[0]
        mean = (float(values.sum()) + rest * (n - values.numel())) / n
        if not mean > 0:
            return None
        flat = rest + damping * mean
        gains = 1 / (values + damping * mean).unsqueeze(1)

        def solve(m: torch.Tensor) -> torch.Tensor:
            inside = vectors.T @ m
            outside = 0.0 if vectors.shape[1] == n else (m - vectors @ inside) / flat
            return vectors @ (gains * inside) + outside

        return solve
    if factor.dim() == 1:
        # What subtraction left below zero is rounding.
        values = factor.double().clamp_min(0) / count
        if not values.sum() > 0:
            return None
        damped = (values + damping * values.mean()).unsqueeze(1)
        return lambda m: m / damped
    mean = factor.double() / count
    level = float(mean.diagonal().mean())
    if not level > 0:
        return None
    mean.diagonal().add_(damping * level)
    lower, failed = torch.linalg.cholesky_ex(mean)
    if failed:
        raise UcanError(
            f"a retain factor with damping={damping:g} is not positive definite (too few retain "
            "tokens for its size, or rounding); raise damping, or use influence_variant "
            "'diagonal'."
        )
    return lambda m: torch.cholesky_solve(m, lower)
