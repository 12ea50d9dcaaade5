"""Neurons: what a site calls a neuron, and which parameters each one owns."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from .adapter import LoraLayer, unwrap
from .config import BOTH_SITES, UcanConfig
from .errors import UcanError

# (gate, up, down) as Llama-like and T5-like models name them; None: gate and up are one layer.
_GATED_FORMS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("wi_0", "wi_1", "wo"),
    (None, "gate_up_proj", "down_proj"),
)
# Matrices whose norms are taken in one go: bounds the fp64 copy that is made of them.
_NORMS_AT_ONCE = 32
_SECOND_LAYERS = ("down_proj", "wo", "fc2", "c_proj", "w2", "dense_4h_to_h")


@dataclass(frozen=True)
class Piece:
    """A matrix whose rows (axis 0) or columns (axis 1) belong to neurons 0, 1, ... in order.

    ``parameter`` is the whole Parameter; the neurons own ``parameter[start : start + n]`` along
    ``axis``.
    """

    layer: str
    which: str
    parameter: nn.Parameter
    axis: int
    start: int = 0

    @property
    def key(self) -> str:
        """Name of the parameter, for files and messages."""
        return f"{self.layer}.lora_{self.which}"

    def view(self, n: int) -> torch.Tensor:
        """The part that n neurons own."""
        return self.parameter.detach().narrow(self.axis, self.start, n)

    @cached_property
    def storage_key(self) -> tuple:
        """Equal for Parameters that are the same storage, whatever module holds them."""
        p = self.parameter
        return (p.device, p.untyped_storage().data_ptr(), p.storage_offset(), p.shape, p.stride())


@dataclass
class NeuronGroup:
    """n neurons that are scored and scaled together.

    Attributes:
        names: the layers they stand for; several where modules share one Parameter.
        n: how many.
        pieces: what they own, every storage once.
        norms: what the weight norm is taken over, every storage once: (matrix, axis) along whose
            rows (0) or columns (1) the neurons lie; for two of them the product of both norms.
    """

    names: tuple[str, ...]
    n: int
    pieces: list[Piece]
    norms: list[tuple[tuple[torch.Tensor, int], ...]]

    @property
    def weight_norm(self) -> torch.Tensor:
        """:func:`weight_norms` of this group."""
        return weight_norms([self])[0]


def weight_norms(groups: Sequence[NeuronGroup]) -> list[torch.Tensor]:
    """L2 norm of each neuron's own parameters as they are now, fp64 ``[n]`` per group.

    On the parameters' device, on the CPU where that has no fp64.
    """
    norms = iter(_norms([matrix for g in groups for factors in g.norms for matrix in factors]))
    found = []
    for group in groups:
        terms = [functools.reduce(operator.mul, (next(norms) for _ in f)) for f in group.norms]
        found.append(terms[0] if len(terms) == 1 else torch.stack(terms).square().sum(0).sqrt())
    return found


def _norms(matrices: Sequence[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
    # Side by side where they fit: one norm per matrix would take longer than a short forward.
    alike: dict[tuple, list[int]] = {}
    for index, (matrix, axis) in enumerate(matrices):
        kind = (axis, matrix.shape[1 - axis], matrix.device, matrix.dtype)
        alike.setdefault(kind, []).append(index)
    norms: list[torch.Tensor | None] = [None] * len(matrices)
    for (axis, _, device, _), indices in alike.items():
        to = device if device.type == "cuda" else torch.device("cpu")
        for start in range(0, len(indices), _NORMS_AT_ONCE):
            some = indices[start : start + _NORMS_AT_ONCE]
            joined = torch.cat([matrices[i][0].detach() for i in some], axis)
            # Not norm: along columns it takes ten times as long.
            found = joined.to(to, torch.float64).square().sum(1 - axis).sqrt()
            sizes = [matrices[i][0].shape[axis] for i in some]
            for i, norm in zip(some, found.split(sizes), strict=True):
                norms[i] = norm
    return norms


def moments_site(config: UcanConfig) -> str:
    """The site whose moments a configuration reads."""
    if config.site == "mlp":
        return "input"
    if config.site == "output" and config.output_signal == "layer":
        return "layer"
    return config.site


def neuron_groups(model: nn.Module, layers: list[LoraLayer], site: str) -> list[NeuronGroup]:
    """The neurons of a site, in module order. Modules that share a Parameter form one group.

    ``"input and output"``: all inputs, named ``{layer}.lora_A``, then all outputs, named
    ``{layer}.lora_B``.

    Raises:
        UcanError: ``site="mlp"`` and the adapter has no gated MLP of a known form.
    """
    if site == BOTH_SITES:
        return [
            replace(group, names=tuple(f"{name}.lora_{which}" for name in group.names))
            for one, which in (("input", "A"), ("output", "B"))
            for group in neuron_groups(model, layers, one)
        ]
    units = _mlp_units(model, layers) if site == "mlp" else [_unit(layer, site) for layer in layers]
    return [_pool(members) for members in _sharing(units)]


@dataclass
class _Unit:
    name: str
    n: int
    pieces: list[Piece]
    # As in NeuronGroup.norms, and which storages these are (so shared ones count once).
    norm: tuple[tuple[torch.Tensor, int], ...]
    norm_key: tuple


def _unit(layer: LoraLayer, site: str) -> _Unit:
    a, b = layer.a, layer.b
    if site == "input":
        piece = Piece(layer.name, "A", a, axis=1)
        norm, key = ((a, 1),), piece.storage_key
    elif site == "rank":
        piece = Piece(layer.name, "B", b, axis=1)
        other = Piece(layer.name, "A", a, axis=0)
        norm, key = ((a, 0), (b, 1)), (piece.storage_key, other.storage_key)
    else:
        piece = Piece(layer.name, "B", b, axis=0)
        norm, key = ((b, 0),), piece.storage_key
    return _Unit(layer.name, piece.parameter.shape[piece.axis], [piece], norm, key)


def _mlp_units(model: nn.Module, layers: list[LoraLayer]) -> list[_Unit]:
    units = []
    for down, rows in gated_mlps(model, layers):
        unit = _unit(down, "input")
        for layer, start in rows:
            unit.pieces.append(Piece(layer.name, "B", layer.b, axis=0, start=start))
        units.append(unit)
    return units


def gated_mlps(
    model: nn.Module, layers: list[LoraLayer]
) -> list[tuple[LoraLayer, list[tuple[LoraLayer, int]]]]:
    """The gated MLPs whose second layer is adapted.

    Returns:
        Per MLP the ``down_proj`` layer and the adapted layers that produce its input, with the
        row at which intermediate neuron 0 lies (``gate_up_proj`` appears twice: 0 and I).

    Raises:
        UcanError: there is none, or an MLP is of an unknown form (it is named).
    """
    modules = dict(unwrap(model).named_modules())
    adapted = {layer.name: layer for layer in layers}
    found = []
    for layer in layers:
        parent, _, last = layer.name.rpartition(".")
        if last not in _SECOND_LAYERS or (last == "c_proj" and "mlp" not in parent):
            continue
        children = set(dict(modules[parent].named_children())) if parent in modules else set()
        form = next(
            (f for f in _GATED_FORMS if f[2] == last and {f[0] or f[1], f[1]} <= children), None
        )
        size = layer.a.shape[1]
        if form is None:
            raise UcanError(
                f"site 'mlp': {parent} ({', '.join(sorted(children))}) is no gated MLP of a known "
                "form (gate_proj/up_proj/down_proj, wi_0/wi_1/wo, gate_up_proj/down_proj). Use "
                "site='input'."
            )
        gate, up, _ = form
        starts = [(gate, 0), (up, 0)] if gate else [(up, 0), (up, size)]
        rows = [
            (adapted[f"{parent}.{child}"], start)
            for child, start in starts
            if f"{parent}.{child}" in adapted
        ]
        for row, _ in rows:
            if row.b.shape[0] != (size if gate else 2 * size):
                raise UcanError(
                    f"site 'mlp': {row.name} has {row.b.shape[0]} outputs, which do not fit the "
                    f"{size} inputs of {layer.name}. Use site='input'."
                )
        found.append((layer, rows))
    if not found:
        suffixes = sorted({name.rpartition(".")[2] for name in adapted})
        raise UcanError(
            "site 'mlp' reads the input of a gated MLP's down_proj (or wo), but this adapter only "
            f"adapts {', '.join(suffixes)}. Use site='input'."
        )
    return found


def _sharing(units: list[_Unit]) -> list[list[_Unit]]:
    """Units connected by a shared storage, in order of their first member."""
    groups: list[list[_Unit]] = []
    owner: dict[tuple, list[_Unit]] = {}
    for unit in units:
        merged: list[_Unit] = []
        for key in {piece.storage_key for piece in unit.pieces}:
            if key in owner and owner[key] is not merged:
                other = owner[key]
                groups.remove(other)
                merged += other
                for member in other:
                    for piece in member.pieces:
                        owner[piece.storage_key] = merged
        merged.append(unit)
        for piece in unit.pieces:
            owner[piece.storage_key] = merged
        groups.append(merged)
    order = {unit.name: index for index, unit in enumerate(units)}
    for group in groups:
        group.sort(key=lambda unit: order[unit.name])
    return sorted(groups, key=lambda group: order[group[0].name])


def _pool(units: list[_Unit]) -> NeuronGroup:
    if len(units) == 1 and len(units[0].pieces) == 1:  # the usual case: nothing is shared
        unit = units[0]
        return NeuronGroup((unit.name,), unit.n, unit.pieces, [unit.norm])
    if len({unit.n for unit in units}) > 1:
        raise UcanError(
            "these layers share a parameter but differ in neurons: "
            + ", ".join(f"{u.name} ({u.n})" for u in units)
        )
    pieces = {(p.storage_key, p.axis, p.start): p for u in units for p in u.pieces}
    norms = {unit.norm_key: unit.norm for unit in units}
    names = tuple(unit.name for unit in units)
    return NeuronGroup(names, units[0].n, list(pieces.values()), list(norms.values()))
