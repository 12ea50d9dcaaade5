"""WeightEdit: scales the parameters of neuron groups, with the way back in hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch

from . import ops
from .errors import UcanError
from .interrupts import finished
from .neurons import NeuronGroup


class ParameterEdit:
    """Some parameters, and the values they had when this was made.

    Every write starts from those values, so writes do not accumulate. Holds one copy of the
    parameters (an adapter's worth of memory, on their own devices).
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = dict(parameters)
        self.originals = {key: p.detach().clone() for key, p in self._parameters.items()}

    def restore(self) -> None:
        """Every parameter as it was, bit by bit."""
        with finished(), torch.no_grad():
            for key, parameter in self._parameters.items():
                parameter.copy_(self.originals[key])
            self._written()

    @staticmethod
    def _written() -> None:
        """To be called after every write.

        Under autocast, copies of trainable weights in the narrow dtype live until the outermost
        with block ends: a model that is called in it would go on with the old values.
        """
        torch.clear_autocast_cache()


class WeightEdit(ParameterEdit):
    """The parameters that some neurons own, to be scaled."""

    def __init__(self, groups: Sequence[NeuronGroup]) -> None:
        self._groups = list(groups)
        parameters, seen = {}, set()
        for group in groups:
            for piece in group.pieces:
                if piece.storage_key not in seen:
                    seen.add(piece.storage_key)
                    parameters[piece.key] = piece.parameter
        super().__init__(parameters)

    def write(self, factors: torch.Tensor) -> None:
        """Set every parameter to original x factor; on any error all are the originals again.

        Args:
            factors: fp32 ``[n]``, the factors of all groups one after the other.

        Raises:
            UcanError: the factors are not finite.
        """
        if not torch.isfinite(factors).all():
            raise UcanError("attenuation factors must be finite; nothing was changed.")
        try:
            self.restore()
            with torch.no_grad():
                for device, (weights, offsets, axes) in self._calls().items():
                    ops.attenuate_(weights, factors.to(device), offsets, axes)
            self._written()
        except BaseException:
            self.restore()
            raise

    @contextlib.contextmanager
    def applied(self, factors: torch.Tensor) -> Iterator[None]:
        """The factors in force for the length of a with block."""
        try:
            self.write(factors)
            yield
        finally:
            self.restore()

    def _calls(self) -> dict[torch.device, tuple[list[torch.Tensor], list[int], list[int]]]:
        calls: dict[torch.device, tuple[list, list, list]] = {}
        offset = 0
        for group in self._groups:
            for piece in group.pieces:
                weights, offsets, axes = calls.setdefault(piece.parameter.device, ([], [], []))
                weights.append(piece.view(group.n))
                offsets.append(offset)
                axes.append(piece.axis)
            offset += group.n
        return calls
