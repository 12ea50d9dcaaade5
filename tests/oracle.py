"""What statistics must be: forward hooks, summed in fp64.

Written from the definition alone and sharing no code with the package: every call is kept as it
happened, and tokens are picked by boolean indexing. On PEFT's own modules ``lora_A``'s input and
output are hooked. A fused layer never calls ``lora_A``, and in deeper layers it sees inputs that
differ from PEFT's by rounding; there the layer's own input is hooked and sent through ``lora_A``
afterwards, as PEFT would have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft.tuners import lora as peft_lora
from torch import nn

import ucan_fast as uf

OURS = ("token_groups", "decoder_token_groups")


def role_in_t5(name: str) -> str:
    """T5: cross-attention's k and v read what the encoder wrote."""
    if ".encoder." in name or name.endswith(("EncDecAttention.k", "EncDecAttention.v")):
        return "encoder"
    return "decoder"


def role_in_bart(name: str) -> str:
    """BART: the same, under its own names."""
    if ".encoder." in name or name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj")):
        return "encoder"
    return "decoder"


def hook_sums(
    model: nn.Module,
    batches: list[dict],
    *,
    adapter: str = "default",
    default: int = 1,
    role: Callable[[str], str] = lambda name: "encoder",
    context: Callable = torch.no_grad,
    accelerated: bool = False,
) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """``{layer: {site: (count [2], abs [2, n], sq [2, n])}}``, fp64.

    ``context`` surrounds the model's calls (for autocast). The model is copied, and the copy is
    accelerated if asked for. It runs where the model is; what it did is summed on the CPU.
    """
    model = copy.deepcopy(model).eval()
    if accelerated:
        assert uf.accelerate(model).fused
    else:
        uf.restore(model)
    seen: dict[str, list] = {}
    outputs: dict[str, list] = {}

    def keep_a(name):
        return lambda _m, args, z: seen[name].append((on_cpu(args[0]), on_cpu(z)))

    def keep_x(name, module):
        def keep(_m, args, _y):
            a = module.lora_A[adapter]
            x = args[0].to(a.weight.dtype, copy=True)
            seen[name].append((on_cpu(x), on_cpu(a(x))))

        return keep

    def keep_y(name):
        return lambda _m, args, y: outputs[name].append(on_cpu(y))

    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, peft_lora.LoraLayer) and adapter in module.lora_A:
            modules[name] = module
            seen[name], outputs[name] = [], []
            if type(module) is peft_lora.Linear:
                module.lora_A[adapter].register_forward_hook(keep_a(name))
            else:
                module.register_forward_hook(keep_x(name, module))
            module.register_forward_hook(keep_y(name))

    totals: dict[str, dict[str, list]] = {}
    for batch in batches:
        for name in modules:
            seen[name].clear()
            outputs[name].clear()
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in batch.items() if key not in OURS}
        if "decoder_input_ids" in inputs:
            inputs.pop("labels", None)
        with torch.no_grad(), context():
            if accelerated:
                # Its activations, to the last bit: collect computes z of q, k and v together.
                uf.collect(model, [batch], adapter=adapter)
            else:
                model(**inputs)
        groups = {"encoder": effective_groups(batch, "", default)}
        if "decoder_input_ids" in batch or "decoder_token_groups" in batch:
            groups["decoder"] = effective_groups(batch, "decoder_", default)
        elif role is role_in_t5:
            groups["decoder"] = torch.where(batch["labels"].cpu() != -100, default, -1)
        for name, module in modules.items():
            b = module.lora_B[adapter].weight.detach().cpu().double()
            scaling = module.scaling[adapter]
            here = groups[role(name)].reshape(-1)
            assert seen[name], f"{name} never ran"
            calls = {"input": [], "rank": [], "output": [], "layer": []}
            for x, z in seen[name]:
                if x.dim() == 2 and torch.equal(x, torch.eye(*x.shape, dtype=x.dtype)):
                    continue  # DoRA sends an identity matrix through lora_A for its weight norm
                calls["input"].append(x)
                calls["rank"].append(z)
                calls["output"].append(z.double() @ b.t() * scaling)
            calls["layer"] = outputs[name]
            for site, values in calls.items():
                assert values
                for h in values:
                    total = totals.setdefault(name, {}).setdefault(site, [0.0, 0.0, 0.0])
                    for index, part in enumerate(sums(h, here)):
                        total[index] = total[index] + part
    return {
        name: {site: tuple(parts) for site, parts in sites.items()}
        for name, sites in totals.items()
    }


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy there, since what was seen may be overwritten."""
    return tensor.detach().to("cpu", copy=True)


def sums(h: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """count [2], Σ|h| [2, n], Σh² [2, n] of one activation, group by group."""
    rows = h.reshape(-1, h.shape[-1]).double()
    parts = [rows[groups == g] for g in (0, 1)]
    return (
        torch.tensor([float(p.shape[0]) for p in parts], dtype=torch.float64),
        torch.stack([p.abs().sum(0) for p in parts]),
        torch.stack([(p * p).sum(0) for p in parts]),
    )


def effective_groups(batch: dict, prefix: str = "", default: int = 1) -> torch.Tensor:
    """token_groups, or the default where there are none; -1 in the padding whatever they say.

    On the CPU, wherever the batch is.
    """
    batch = {key: value.cpu() for key, value in batch.items()}
    ids = batch[f"{prefix}input_ids"]
    groups = batch.get(f"{prefix}token_groups")
    groups = torch.full_like(ids, default) if groups is None else groups.clone()
    mask = batch.get(f"{prefix}attention_mask")
    if mask is not None:
        groups[mask == 0] = -1
    return groups


def assert_equals_hooks(stats, expected: dict, sites=("input", "rank", "output"), rel=1e-6) -> None:
    """Every layer, site, group and neuron within ``rel``; counts exactly.

    z and δ are fp32 products, summed in another order where layers are computed together: a neuron
    whose z or δ nearly cancels is held to its layer's mean instead.
    """
    assert set(stats.layers) == set(expected)
    for name, by_site in stats.layers.items():
        assert set(by_site) == set(sites), name
        for site in sites:
            moments = by_site[site]
            count, abs_sum, sq_sum = expected[name][site]
            where = f"{name} {site}"
            assert moments.count.tolist() == count.tolist(), where
            to_mean = site in ("rank", "output")
            assert_relative(moments.abs_sum, abs_sum, rel, f"{where} abs_sum", to_mean)
            assert_relative(moments.sq_sum, sq_sum, rel, f"{where} sq_sum", to_mean)


def assert_relative(
    got: torch.Tensor, want: torch.Tensor, rel: float, where: str = "", to_mean: bool = False
) -> None:
    """Element by element: ``|got - want| <= rel |want|``. Zero must be zero; NaN never passes.

    With ``to_mean`` values below the mean of their row are held to ``rel`` times that mean.
    """
    assert got.dtype == torch.float64, where
    assert got.shape == want.shape, where
    scale = want.abs()
    if to_mean:
        scale = scale.maximum(scale.mean(-1, keepdim=True))
    bad = ~((got - want).abs() <= rel * scale)
    if bad.any():
        error = ((got - want).abs() / scale.clamp_min(1e-300))[bad].max()
        raise AssertionError(f"{where}: {int(bad.sum())} values off, relative error {error:.3g}")


def assert_same_stats(one, other, rel: float = 0.0) -> None:
    """The same layers and sites; counts equal; sums within ``rel``, bit by bit where it is 0."""
    assert list(one.layers) == list(other.layers)
    assert one.fingerprint == other.fingerprint
    for name, sites in one.layers.items():
        assert list(sites) == list(other.layers[name]), name
        for site, mine in sites.items():
            theirs = other.layers[name][site]
            assert torch.equal(mine.count, theirs.count), f"{name} {site}"
            assert_relative(mine.abs_sum, theirs.abs_sum, rel, f"{name} {site} abs_sum", rel > 0)
            assert_relative(mine.sq_sum, theirs.sq_sum, rel, f"{name} {site} sq_sum", rel > 0)
