"""Dense references for the influence step: one sequence at a time, one token at a time, fp64."""

from __future__ import annotations

import copy

import torch
from peft.tuners import lora as peft_lora
from torch import nn

from ucan_fast.factor_pass import draw_labels, row_uniforms


def fp64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().eval()


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, peft_lora.LoraLayer)}


def weights_of(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def rows(batches: list[dict], group: int):
    """Every sequence without its padding: ids, labels, which tokens are in the group."""
    for batch in batches:
        for index in range(batch["input_ids"].shape[0]):
            there = batch["attention_mask"][index].bool()
            ids = batch["input_ids"][index][there]
            groups = batch.get("token_groups")
            member = (
                torch.ones_like(ids).bool() if groups is None else groups[index][there] == group
            )
            labels = batch.get("labels", batch["input_ids"])[index][there]
            yield ids, labels, member


def gradients(
    model: nn.Module,
    batches: list[dict],
    group: int,
    below: list[float] | None = None,
    by_heart: bool = False,
) -> tuple[dict, int]:
    """Sum over the scored positions of the group of the NLL's gradient, and how many there are.

    Args:
        below: one number per scored position: those that cost as much or more add nothing.
        by_heart: whether every gradient counts max(1, 0.1 / (1 - p)) times, 1 - p being at least
            1e-4.
    """
    model = fp64(model)
    for p in model.parameters():
        p.requires_grad_(False)
    for layer in lora_layers(model).values():
        for p in weights_of(layer):
            p.requires_grad_(True)
    count = 0
    for ids, labels, member in rows(batches, group):
        logits = model(input_ids=ids[None]).logits[0]
        for t in range(1, len(ids)):
            if member[t] and labels[t] != -100:
                count += 1
                nll = -logits[t - 1].log_softmax(-1)[labels[t]]
                if below is None or nll < below[count - 1]:
                    unsure = max(1 - float((-nll.detach()).exp()), 1e-4)
                    weight = max(1.0, 0.1 / unsure) if by_heart else 1.0
                    (weight * nll).backward(retain_graph=True)
    found = {}
    for name, layer in lora_layers(model).items():
        for letter, p in zip("AB", weights_of(layer), strict=True):
            found[f"{name}.lora_{letter}"] = p.grad
    return found, count


@torch.no_grad()
def costs(model: nn.Module, batches: list[dict], group: int) -> list[float]:
    """NLL of every scored position of the group, in nats."""
    model, found = fp64(model), []
    for ids, labels, member in rows(batches, group):
        logits = model(input_ids=ids[None]).logits[0]
        for t in range(1, len(ids)):
            if member[t] and labels[t] != -100:
                found.append(float(-logits[t - 1].log_softmax(-1)[labels[t]]))
    return found


def factors(model: nn.Module, batches: list[dict], group: int, seed: int = 0) -> dict[str, dict]:
    """Σ x xᵀ, Σ z zᵀ, Σ g gᵀ, Σ g_z g_zᵀ and the token count per layer, by outer products.

    g is the gradient by a zero that is added to the layer's whole output.
    """
    model = fp64(model)
    layers = lora_layers(model)
    sums = {}
    for name, layer in layers.items():
        (r, k), n = weights_of(layer)[0].shape, weights_of(layer)[1].shape[0]
        sizes = {"c_x": k, "c_z": r, "s_h": n, "s_z": r}
        sums[name] = {w: torch.zeros(m, m, dtype=torch.float64) for w, m in sizes.items()}
        sums[name]["tokens"] = 0
    for ids, labels, member in rows(batches, group):
        scored = torch.zeros(len(ids)).bool()
        scored[:-1] = labels[1:] != -100
        if not (scored.any() and member.any()):
            continue
        inputs, probes, handles = {}, {}, []

        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(_remember(inputs, name)))
            handles.append(layer.register_forward_hook(_probe(probes, name)))
        logits = model(input_ids=ids[None]).logits[0]
        for handle in handles:
            handle.remove()
        uniforms = row_uniforms({"input_ids": ids[None]}, scored[None], seed)
        soft = torch.stack([less_sure(row) for row in logits[scored]])
        drawn = draw_labels(soft.detach(), uniforms)
        loss = -soft.log_softmax(-1)[torch.arange(len(drawn)), drawn].sum()
        found = torch.autograd.grad(loss, list(probes.values()))
        for name, g in zip(probes, found, strict=True):
            layer = layers[name]
            a, b = (w.detach() for w in weights_of(layer))
            s = layer.scaling["default"]
            for t in range(len(ids)):
                if member[t]:
                    x = inputs[name][t]
                    vectors = {"c_x": x, "c_z": a @ x, "s_h": s * g[0, t], "s_z": s * b.T @ g[0, t]}
                    for which, v in vectors.items():
                        sums[name][which] += torch.outer(v, v)
                    sums[name]["tokens"] += 1
    return sums


def less_sure(row: torch.Tensor) -> torch.Tensor:
    """Logits ``[V]`` with the best no likelier than all others together."""
    best = int(row.argmax())
    rest = torch.cat([row[:best], row[best + 1 :]]).detach().exp().sum()
    surplus = row[best].detach().exp() / rest
    if surplus <= 1:
        return row
    lower = torch.zeros_like(row)
    lower[best] = surplus.log()
    return row - lower


def _remember(inputs: dict, name: str):
    def hook(_module, args):
        inputs[name] = args[0].detach()[0]

    return hook


def _probe(probes: dict, name: str):
    def hook(_module, _args, y):
        probes[name] = torch.zeros_like(y, requires_grad=True)
        return y + probes[name]

    return hook


def kronecker_solve(left: torch.Tensor, g: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """X with ``left X right = G``, from the dense system of all entries."""
    dense = torch.kron(left, right)
    return torch.linalg.solve(dense, g.reshape(-1)).reshape(g.shape)


def damped(total: torch.Tensor, count: float, damping: float) -> torch.Tensor:
    mean = total / count
    return mean + damping * mean.trace() / len(mean) * torch.eye(len(mean), dtype=mean.dtype)
