"""Bytes and operations from shapes: against the counts in the literature, and against tensors."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import costs
from benchmarks.costs import Ceilings, LoraCost, Pass
from benchmarks.kernels import scores, suite
from benchmarks.measure import PROFILES
from benchmarks.shapes import Model
from ucan_fast import kernels, ops
from ucan_fast.ops.scores import factors_reference, scores_reference

M, K, N, R = 8192, 4096, 4096, 16
MIXED = LoraCost(M, K, N, R, "bfloat16", "float32", "cuda")
NARROW = LoraCost(M, K, N, R, "bfloat16", "bfloat16", "cuda")


def _output_passes(passes: list[Pass]) -> float:
    # Traffic in units of one pass over y in bf16, without what the small and base operands add.
    return round(sum(one.bytes for one in passes) / (2 * M * N))


def _without_inputs(passes: list[Pass], *names: str) -> list[Pass]:
    return [one for one in passes if one.name not in names]


def test_peft_moves_as_many_passes_over_the_output_as_its_source_says():
    inputs = ("base product", "lora_A", "cast x")
    # The base's write is one more: 7 passes with bf16 adapters, 15 with fp32 ones.
    assert 1 + _output_passes(_without_inputs(NARROW.peft(), *inputs)) == 7
    assert 1 + _output_passes(_without_inputs(MIXED.peft(), *inputs)) == 15
    cast = next(one for one in MIXED.peft() if one.name == "cast x")
    assert cast.bytes == 3 * 2 * M * K
    assert 1 + _output_passes([NARROW.addmm()[-1]]) == 3


@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
def test_ours_reads_x_once_and_passes_once_over_the_output(adapter):
    cost = LoraCost(M, K, N, R, "bfloat16", adapter, "cuda")
    assert cost.shrink()[0].bytes == pytest.approx(2 * M * K, rel=0.1)
    assert cost.expand()[0].bytes == pytest.approx(2 * 2 * M * N, rel=0.1)
    assert len(cost.expand(moments=True)) == 2
    more = costs.traffic(cost.ucan(moments=True))["bytes"]
    # Written and read: a slot of 16 bytes a column for 128 rows of x and for 1024 of y, and a part
    # of z for every 256 columns instead of every 1024.
    slots = 2 * 16 * (K * M / 128 + N * M / 1024)
    parts = 2 * 4 * M * R * (K / 256 - K / 1024)
    assert more - costs.traffic(cost.ucan())["bytes"] == pytest.approx(slots + parts, rel=0.05)
    assert more == pytest.approx(costs.traffic(cost.ucan())["bytes"], rel=0.065)


def test_statistics_by_hooks_cost_several_passes():
    boolean = _without_inputs(MIXED.hooks("boolean index"), *(p.name for p in MIXED.peft()))
    size = 4 * M * N  # one pass in fp32
    # Per value in a group, at both sites: index 2, |h| 2, sum 1, h² 2, sum 1; and times s at one.
    assert sum(p.bytes for p in boolean if p.name not in ("times s", "totals")) == pytest.approx(
        2 * 8 * size * 2 / 3
    )
    mask = [p for p in MIXED.hooks("mask matmul") if p.name in ("|h|", "h²", "mask product")]
    assert sum(p.bytes for p in mask) == 2 * 6 * size
    plain, hooked = costs.traffic(MIXED.peft()), costs.traffic(MIXED.hooks("boolean index"))
    assert hooked["bytes"] > 2 * plain["bytes"]


def test_a_product_is_counted_as_torch_counts_it():
    from torch.utils.flop_counter import FlopCounterMode

    cost = LoraCost(64, 48, 80, 8, "float32", "float32")
    x, w, a, b = (torch.randn(*s) for s in ((64, 48), (80, 48), (8, 48), (80, 8)))
    with FlopCounterMode(display=False) as counter:
        _ = x @ w.t() + (x @ a.t()) @ b.t()
    products = [p for p in cost.peft() if p.name in ("base product", "lora_A", "lora_B")]
    assert sum(p.flops for p in products) == counter.get_total_flops()
    moved = sum(t.nbytes for t in (x, w, x @ w.t()))
    assert cost.base()[0].bytes == moved


def test_a_step_costs_about_three_forward_passes_less_the_frozen_weight():
    # Forward and dx of the base; dW is not needed.
    flops = costs.traffic(NARROW.peft_step())["flops"]
    assert flops == pytest.approx(2 * costs.traffic(NARROW.peft())["flops"], rel=0.05)
    assert costs.traffic(MIXED.peft_step("bfloat16")) == costs.traffic(NARROW.peft_step())


def test_attenuation_in_one_kernel_leaves_out_rows_that_do_not_change():
    sizes = [(1000, 100), (2000, 200)] * 3
    loop = costs.attenuate_per_tensor(sizes, 2)
    assert len(loop) == 6
    (whole,) = costs.attenuate_at_once(sizes, 2, changed=1.0)
    assert whole.bytes == costs.traffic(loop)["bytes"]
    (half,) = costs.attenuate_at_once(sizes, 2, changed=0.5)
    assert whole.bytes - half.bytes == 2 * 2 * 3000


def test_seconds_take_the_slower_of_both_and_never_less_than_the_shortest_kernel():
    ceilings = Ceilings(100.0, {"float32": 1000.0, "bfloat16": 4000.0}, shortest=0.5, launch=2.0)
    assert ceilings.seconds([Pass("copy", 1000)]) == 10
    assert ceilings.seconds([Pass("product", 100, 8000, "bfloat16")]) == 2
    assert ceilings.seconds([Pass("product", 100, 8000)]) == 8
    # Not measured: as fp32.
    assert ceilings.seconds([Pass("product", 100, 8000, "float16")]) == 8
    assert ceilings.seconds([Pass("tiny", 1)] * 3) == 1.5
    assert ceilings.seconds([Pass("tiny", 1)] * 3, eager=True) == 6
    assert Ceilings.from_json(ceilings.to_json()) == ceilings


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_candidate_of_every_case_has_passes(device):
    # Without a GPU too: cases know what they would run there.
    for bench in suite.benches(PROFILES["full"], torch.device(device)):
        for one in bench.candidates:
            assert one.passes, (bench.group, one.name)
            total = costs.traffic(one.passes)
            assert total["bytes"] > 0
            # What the result needs is the least that anyone can move; a share of one per cent is
            # for A and B in another dtype.
            if one.bytes is not None:
                assert total["bytes"] >= 0.99 * one.bytes, (bench.group, bench.case, one.name)


# Scores: the counts against what a run moves

#: Few layers of many neurons, so that what is per layer does not matter.
FEW = Model("few", 1, hidden=4000, intermediate=4000, query=4000, key_value=4000)


class _Moved(TorchDispatchMode):
    """Bytes that go in and out of every operator which computes something."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        taken, given = (
            [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
            for value in ((arguments, options), out)
        )
        storages = {t.untyped_storage().data_ptr() for t in taken}
        if function is torch.ops.aten.new_zeros.default:
            taken = []  # its dtype alone
        if not any(t.untyped_storage().data_ptr() in storages for t in given):
            self.bytes += sum(t.nbytes for t in (*taken, *given))
        return out


@pytest.mark.parametrize("name", ["torch, loop over layers", "ucan_fast, reference backend"])
def test_the_bytes_of_scores_in_torch_are_those_that_operators_move(name, monkeypatch):
    # Past the operators' own dispatch, which would hide what they do.
    monkeypatch.setattr(scores.ops, "contrastive_scores", _by_name(scores_reference))
    monkeypatch.setattr(
        scores.ops,
        "attenuation_factors",
        lambda score, *rest, **choices: factors_reference(
            score, score.max(), *rest, *choices.values()
        ),
    )
    bench = scores._bench("scores", FEW, torch.device("cpu"))
    candidate = next(one for one in bench.candidates if one.name == name)
    call = candidate.bind(*bench.inputs(0))
    with _Moved() as moved:
        call()
    n = bench.shape["neurons"]
    counted = costs.traffic(candidate.passes)["bytes"]
    assert moved.bytes / n == pytest.approx(counted / n, abs=0.5)


def _by_name(function):
    # The operators take their choices by name, the definitions in the same order.
    return lambda *tensors, **choices: function(*tensors, *choices.values())


@pytest.mark.skipif(
    kernels.obstacle("cpu") is not None, reason="the interpreter counts loads and stores"
)
def test_the_bytes_of_scores_in_triton_are_its_loads_and_stores(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    from ucan_fast.kernels import scores as launched

    # The maxima of the chunks are few, but every program reads them: one chunk, one maximum.
    monkeypatch.setattr(launched, "_chunks", lambda n, layers: 1)
    moved = {"load": 0, "store": 0}

    def counted(kind, function, mask_at):
        def call(self, pointers, *rest):
            moved[kind] += int(rest[mask_at].data.sum()) * (
                pointers.get_element_ty().primitive_bitwidth // 8
            )
            return function(self, pointers, *rest)

        return call

    for kind, mask_at in (("load", 0), ("store", 1)):
        name = f"create_masked_{kind}"
        original = getattr(InterpreterBuilder, name)
        monkeypatch.setattr(InterpreterBuilder, name, counted(kind, original, mask_at))
    bench = scores._bench("scores", FEW, torch.device("cpu"))
    ours = next(one for one in bench.candidates if one.name == "ucan_fast")
    with ops.use_backend("triton"):
        ours.bind(*bench.inputs(0))()
    n = bench.shape["neurons"]
    per_neuron = costs.traffic(costs.scores_ucan(n, "cuda"))["bytes"] / n
    # The maximum over S is torch's: 8 bytes.
    assert (moved["load"] + moved["store"]) / n + 8 == pytest.approx(per_neuron, abs=0.5)
