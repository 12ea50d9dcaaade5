"""SSD, selective synaptic dampening (Foster et al., AAAI 2024), on the adapter's matrices.

After the authors' code (if-loops/selective-synaptic-dampening@cdfdc0e, ``src/ssd.py``:
``ParameterPerturber.calc_importance`` and ``modify_weight``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from ucan_fast.batches import FORGET, RETAIN, eval_mode
from ucan_fast.errors import UcanError

from .case import Batch, Case, Clock, State, as_before, lora_weights
from .losses import mean_nll, read
from .training import differentiable, gradients, thinned

#: Name of the importances of all data in ``case.prepared``.
PREPARED = "ssd"
#: Shares of the adapter's weights that thresholds α are chosen to select. (The authors set α by
#: hand, 10 and more. Where D_f has few labels, its batches' gradients are large and so are the
#: ratios I_Df / I_D: no fixed set of thresholds would fit all requests.)
SHARES = (
    *(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 7e-3, 0.01, 0.015, 0.02, 0.03, 0.045, 0.07, 0.1),
    *(0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
)
#: The authors' λ is 1; larger ones dampen softly where the ratios are large throughout.
DAMPENINGS = ({"dampening": 100.0}, {"dampening": 10.0}, {"dampening": 1.0})


def importance(model: nn.Module, batches: Iterable[Batch], *groups: int) -> dict[str, torch.Tensor]:
    """Diagonal Fisher information of the adapter's matrices, by name, fp64.

    As the authors take it: the mean over *batches* of the square of the gradient of a batch's mean
    NLL. It falls with the size of batches, so D_f's should be of the same size as those of all
    data. Batches without a label of these groups do not count. The model is as before afterwards.
    """
    weights = lora_weights(model)
    total = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
    scored = read(model, batches, *groups)
    with eval_mode(model), differentiable(weights):
        for batch in scored:
            for name, gradient in gradients(mean_nll(model, batch), weights).items():
                total[name] += gradient.double().square()
    return {name: value / len(scored) for name, value in total.items()}


def importance_of_all(model: nn.Module, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """I_D: over all training data, to be made before the request comes in (``prepared["ssd"]``).

    Labels of both groups count, forget and retain: the authors' D includes D_f.
    """
    return importance(model, batches, FORGET, RETAIN)


def dampening_factors(
    of_all: torch.Tensor,
    of_forget: torch.Tensor,
    alpha: float,
    dampening: float,
    exponent: float = 1.0,
) -> torch.Tensor:
    """min((λ I_D / I_Df)^p, 1) where I_Df > α I_D, and 1 elsewhere; the shape of both, fp64."""
    selected = of_forget > alpha * of_all
    # (Where nothing is selected I_Df may be 0.)
    ratio = dampening * of_all / torch.where(selected, of_forget, 1.0)
    return torch.where(selected, ratio.pow(exponent).clamp(max=1.0), 1.0)


def thresholds(
    of_all: Mapping[str, torch.Tensor],
    of_forget: Mapping[str, torch.Tensor],
    shares: Sequence[float] = SHARES,
) -> list[float]:
    """α that select these shares of all weights together, falling; without those that are inf."""
    ratios = torch.cat([(of_forget[name] / of_all[name]).flatten() for name in of_all])
    # 0 / 0: a weight that matters for neither is never selected.
    ordered = ratios.nan_to_num(nan=0.0, posinf=math.inf).sort(descending=True).values
    found = [ordered[min(round(share * len(ordered)), len(ordered) - 1)] for share in shares]
    return sorted({value.item() for value in found if value.isfinite()}, reverse=True)


def ssd(
    case: Case,
    *,
    dampening: float = 1.0,
    exponent: float = 1.0,
    alphas: Sequence[float] | None = None,
) -> Iterator[State]:
    """States: thresholds α from large to small (:func:`thresholds`), each on the original.

    A threshold that edits no more weights than the one before it is left out, so there may be no
    state at all. ``case.prepared["ssd"]`` is what :func:`importance_of_all` gives; the seconds of
    a state are those of I_Df and of one edit.
    """
    if alphas is not None and sorted(set(alphas), reverse=True) != list(alphas):
        raise ValueError(f"alphas must fall from the weakest edit to the strongest, not {alphas}.")
    with as_before(case.model) as weights:
        of_all = _prepared(case, weights)
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        request = Clock()
        with request:
            of_forget = importance(case.model, case.forget, FORGET)
            if alphas is None:
                alphas = thresholds(of_all, of_forget)
        edited = 0
        for alpha in thinned(case, alphas):
            edit, last = Clock(), edited
            with edit, torch.no_grad():
                edited = 0
                for name, weight in weights.items():
                    factors = dampening_factors(
                        of_all[name], of_forget[name], alpha, dampening, exponent
                    )
                    edited += int((factors < 1).sum())
                    weight.copy_(kept[name] * factors)
            # Selections are nested: as many edited weights are the same ones.
            if edited > last:
                yield State(alpha, request.seconds + edit.seconds)


def _prepared(case: Case, weights: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    found = case.prepared.get(PREPARED)
    if found is None:
        raise UcanError(
            f"{case.name}: SSD needs the importances of all data; store what importance_of_all "
            f"returns as case.prepared[{PREPARED!r}]."
        )
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    if shapes != {name: tuple(weight.shape) for name, weight in weights.items()}:
        raise UcanError(f"{case.name}: case.prepared[{PREPARED!r}] is of another adapter.")
    return {name: value.to(weights[name].device) for name, value in found.items()}
