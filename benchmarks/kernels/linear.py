"""A whole LoRA linear: forward, forward + backward, and forward while statistics are taken."""

from __future__ import annotations

from dataclasses import replace

import torch

from ucan_fast.ops.backend import triton_obstacle

from .. import peers
from ..measure import Candidate, Profile
from .cases import SUMS, Bench, LoraCase, lora_cases, name_of


def _inputs(case: LoraCase, device: torch.device):
    k, n = case.size
    return peers.lora_inputs(k, n, case.rank, case.tokens, case.dtype, device)


def _other_adapter(case: LoraCase) -> torch.dtype | None:
    # fp32 adapters on a narrow base are PEFT's default; the other way to run it is beside it.
    if case.dtype == torch.float32 or case.adapter_dtype == case.dtype:
        return None
    return case.dtype


def _base_alone(case: LoraCase, device: torch.device) -> Candidate:
    t = case.traffic()
    return Candidate(
        "base layer alone",
        peers.base_forward(),
        reference=peers.reference_base,
        bytes=t["x"] + t["w"] + t["y"],
        flops=case.base_flops,
        passes=case.cost(device).base(),
    )


def forward(profile: Profile, device: torch.device) -> list[Bench]:
    """Without gradients."""
    benches = []
    for case in lora_cases(profile):
        adapter, t, passes = case.adapter_dtype, case.traffic(), case.cost(device)
        cost = {
            "bytes": t["x"] + t["w"] + t["a"] + t["b"] + t["y"],
            "flops": case.base_flops + case.lora_flops,
        }
        candidates = [
            Candidate(
                "peft", peers.forward(peers.peft_layer, adapter), passes=passes.peft(), **cost
            ),
            Candidate(
                "ucan_fast", peers.forward(peers.ucan_layer, adapter), passes=passes.ucan(), **cost
            ),
            Candidate("addmm_", peers.addmm_forward(adapter), passes=passes.addmm(), **cost),
            _base_alone(case, device),
        ]
        if other := _other_adapter(case):
            narrow = replace(case, adapter_dtype=other).cost(device)
            for name, make, same, cast in (
                ("peft", peers.peft_layer, narrow.peft(), passes.peft_autocast()),
                # Under autocast A and B are narrowed; the rest is the same as above.
                ("ucan_fast", peers.ucan_layer, narrow.ucan(), narrow.ucan()),
            ):
                candidates += [
                    Candidate(
                        f"{name}, {name_of(other)} adapters",
                        peers.forward(make, other),
                        passes=same,
                    ),
                    Candidate(
                        f"{name}, autocast",
                        peers.autocast_forward(make, adapter, case.dtype),
                        passes=cast,
                    ),
                ]
        if case.compiled:
            for name, make, all_passes in (
                ("peft", peers.peft_layer, passes.peft_compiled()),
                ("ucan_fast", peers.ucan_layer, passes.ucan()),
            ):
                candidates.append(
                    Candidate(
                        f"{name}, compiled",
                        peers.forward(make, adapter, compiled=True),
                        passes=all_passes,
                    )
                )
        benches.append(
            Bench(
                "linear_forward",
                case.shape,
                baseline="peft",
                candidates=candidates,
                inputs=_inputs(case, device),
                reference=peers.reference_linear,
                obstacle=case.too_large(cost["flops"], device),
                **case.dtypes,
            )
        )
    return benches


def forward_backward(profile: Profile, device: torch.device) -> list[Bench]:
    """With the gradients of x, A and B."""
    benches = []
    for case in lora_cases(profile, few=True):
        adapter, t, passes = case.adapter_dtype, case.traffic(), case.cost(device)
        # Forward; then dy, W, x and both adapters in, dx and both adapters' gradients out.
        cost = {
            "bytes": 3 * t["x"] + 2 * t["w"] + 2 * t["y"] + 3 * (t["a"] + t["b"]),
            "flops": 2 * case.base_flops + 3 * case.lora_flops,
        }
        candidates = [
            Candidate(
                "peft",
                peers.training_step(peers.peft_layer, adapter),
                passes=passes.peft_step(),
                **cost,
            ),
            Candidate(
                "ucan_fast",
                peers.training_step(peers.ucan_layer, adapter),
                passes=passes.ucan_step(),
                **cost,
            ),
            Candidate(
                "addmm_", peers.addmm_training_step(adapter), passes=passes.addmm_step(), **cost
            ),
        ]
        if other := _other_adapter(case):
            candidates.append(
                Candidate(
                    f"peft, {name_of(other)} adapters",
                    peers.training_step(peers.peft_layer, other),
                    passes=passes.peft_step(name_of(other)),
                )
            )
            for name, make, cast in (
                ("peft", peers.peft_layer, passes.peft_step_autocast()),
                ("ucan_fast", peers.ucan_layer, passes.ucan_step_autocast()),
            ):
                candidates.append(
                    Candidate(
                        f"{name}, autocast",
                        peers.training_step(make, adapter, autocast=case.dtype),
                        passes=cast,
                    )
                )
        if case.compiled:
            candidates.append(
                Candidate(
                    "peft, compiled",
                    peers.training_step(peers.peft_layer, adapter, compiled=True),
                    passes=passes.peft_step_compiled(),
                )
            )
        benches.append(
            Bench(
                "linear_forward_backward",
                case.shape,
                baseline="peft",
                candidates=candidates,
                inputs=_with_gradient(case, device),
                reference=peers.reference_gradients,
                obstacle=case.too_large(cost["flops"], device),
                **case.dtypes,
            )
        )
    return benches


def _with_gradient(case: LoraCase, device: torch.device):
    make = _inputs(case, device)

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        x, *rest = make(seed)
        generator = torch.Generator(x.device).manual_seed(seed + 1)
        dy = torch.randn(case.tokens, case.size[1], generator=generator, device=x.device)
        return x, *rest, dy.to(x.dtype)

    return inputs


#: Tokens over which the rounding of δ averages out to less than cases.SUMS.
_AVERAGED = 64
_HOOKS = {"boolean index": peers.BooleanIndex, "mask matmul": peers.MaskMatmul}


def _moments_cost(case: LoraCase) -> dict[str, int]:
    # Beyond the forward pass: fp64 totals of four sums a column, read and written.
    return {
        "bytes": sum(case.traffic()[name] for name in "xwaby") + 2 * 4 * 8 * sum(case.size),
        "flops": case.base_flops + case.lora_flops,
    }


def _hooked(case: LoraCase, device: torch.device, statistics: str) -> list[Candidate]:
    # With torch.compile too where the case has it.
    passes, kind = case.cost(device), _HOOKS[statistics]
    plain = Candidate(
        f"peft + hooks, {statistics}",
        peers.hooked_forward(kind, case.adapter_dtype),
        capturable=kind.capturable,
        passes=passes.hooks(statistics),
        **_moments_cost(case),
    )
    compiled = Candidate(
        f"peft + hooks, {statistics}, compiled",
        peers.hooked_forward(kind, case.adapter_dtype, compiled=True),
        capturable=kind.capturable,
        passes=passes.hooks_compiled(statistics),
    )
    return [plain, compiled] if case.compiled else [plain]


def _autocast(case: LoraCase, device: torch.device, *statistics: str) -> list[Candidate]:
    """Hooks and ours under autocast to the base's dtype, where the adapters are wider."""
    if not (other := _other_adapter(case)):
        return []
    passes = case.cost(device)
    hooked = [
        Candidate(
            f"peft + hooks, {name}, autocast",
            peers.hooked_forward(_HOOKS[name], case.adapter_dtype, autocast=other),
            capturable=_HOOKS[name].capturable,
            passes=passes.hooks(name, autocast=True),
        )
        for name in statistics
    ]
    narrow = replace(case, adapter_dtype=other).cost(device)
    ours = Candidate(
        "ucan_fast, autocast",
        peers.recorded_forward(case.adapter_dtype, autocast=other),
        # A and B are narrowed; the rest is as with narrow adapters.
        passes=narrow.ucan(moments=True),
    )
    return [*hooked, ours]


def _autocast_obstacles(case: LoraCase, candidates: list[Candidate]) -> dict[str, str]:
    # δ is rounded to the base's dtype, 2^-9 in bf16, and the sums may be wrong by SUMS at most.
    if case.tokens >= _AVERAGED:
        return {}
    reason = (
        f"δ is rounded to {name_of(case.dtype)}, which does not average out over so few tokens "
        f"({case.tokens}): its sums cannot be checked as closely as the others'"
    )
    return {one.name: reason for one in candidates}


def forward_with_moments(profile: Profile, device: torch.device) -> list[Bench]:
    """As ``collect`` runs a layer: the moments of x and of δ in the same pass; beside it less work.

    Only candidates that a CUDA graph can hold, so that GPUs are timed without launch overhead.
    """
    benches = []
    for case in lora_cases(profile, few=True):
        adapter, cost, passes = case.adapter_dtype, _moments_cost(case), case.cost(device)
        plain = {"reference": peers.reference_linear}
        candidates = [
            *_hooked(case, device, "mask matmul"),
            Candidate(
                "ucan_fast",
                peers.recorded_forward(adapter),
                passes=passes.ucan(moments=True),
                **cost,
            ),
            Candidate(
                "ucan_fast, fused_linear",
                peers.fused_linear_moments(adapter),
                passes=passes.fused_linear(moments=True),
                **cost,
            ),
            Candidate(
                "ucan_fast, no moments",
                peers.forward(peers.ucan_layer, adapter),
                passes=passes.ucan(),
                **plain,
            ),
            Candidate(
                "peft, no moments",
                peers.forward(peers.peft_layer, adapter),
                passes=passes.peft(),
                **plain,
            ),
            _base_alone(case, device),
        ]
        if other := _other_adapter(case):
            candidates.append(
                Candidate(
                    f"peft, no moments, {name_of(other)} adapters",
                    peers.forward(peers.peft_layer, other),
                    passes=passes.peft(name_of(other)),
                    **plain,
                )
            )
        cast = _autocast(case, device, "mask matmul")
        obstacles = _autocast_obstacles(case, cast)
        if obstacle := fused_linear_obstacle(device):
            obstacles["ucan_fast, fused_linear"] = obstacle
        benches.append(
            Bench(
                "linear_moments",
                case.shape,
                baseline="peft + hooks, mask matmul",
                candidates=[*candidates, *cast],
                inputs=_inputs(case, device),
                reference=peers.reference_linear_moments,
                tolerances=SUMS,
                obstacle=case.too_large(cost["flops"], device),
                obstacles=obstacles,
                **case.dtypes,
            )
        )
    return benches


def forward_with_hooks(profile: Profile, device: torch.device) -> list[Bench]:
    """The same against both kinds of hooks, one of which synchronises: eager calls on CUDA."""
    benches = []
    for case in lora_cases(profile, few=True):
        cost = _moments_cost(case)
        ours = Candidate(
            "ucan_fast",
            peers.recorded_forward(case.adapter_dtype),
            passes=case.cost(device).ucan(moments=True),
            **cost,
        )
        boolean = _hooked(case, device, "boolean index")
        mask, *_ = _hooked(case, device, "mask matmul")
        cast = _autocast(case, device, "boolean index", "mask matmul")
        benches.append(
            Bench(
                "linear_hooks",
                case.shape,
                baseline="peft + hooks, boolean index",
                candidates=[*boolean, mask, ours, *cast],
                inputs=_inputs(case, device),
                reference=peers.reference_linear_moments,
                tolerances=SUMS,
                obstacle=case.too_large(cost["flops"], device),
                obstacles=_autocast_obstacles(case, cast),
                **case.dtypes,
            )
        )
    return benches


def fused_linear_obstacle(device: torch.device) -> str | None:
    """Why ``fused_linear`` has no kernel there, or None; on any other machine it is not known."""
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < (9, 0):
            return (
                f"fused_linear needs TMA, sm_90 or later; this is sm_{capability[0]}{capability[1]}"
            )
    return triton_obstacle("fused_linear", device)
