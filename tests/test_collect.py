"""collect: statistics equal forward hooks in fp64, no trace is left, bad input is refused."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import random
import threading
import types
import weakref
from typing import ClassVar

import helpers_models as hm
import numpy
import peft
import pytest
import torch
import transformers
from oracle import (
    assert_equals_hooks,
    assert_relative,
    assert_same_stats,
    hook_sums,
    role_in_bart,
    role_in_t5,
    sums,
)
from peft.tuners import lora as peft_lora
from torch import nn
from torch.utils.checkpoint import checkpoint

import ucan_fast as uf
from ucan_fast.collect import _SharedInput

RIGHT = [hm.token_batch([7, 3, 5]), hm.token_batch([2, 6], seed=1)]
LEFT = [hm.token_batch([7, 3, 5], side="left"), hm.token_batch([2, 6], side="left", seed=1)]
MIXED = [hm.token_batch([7, 3, 5], groups="mixed"), hm.token_batch([2, 6], seed=1, groups="mixed")]


@pytest.fixture(params=["plain", "accelerated"])
def way(request):
    """How the model runs while it is measured; the oracle is always PEFT's own modules."""
    return request.param


def collect(way: str, model: nn.Module, batches, **options) -> uf.ActivationStats:
    return collect_in_place(way, copy.deepcopy(model), batches, **options)


def collect_in_place(way: str, model: nn.Module, batches, **options) -> uf.ActivationStats:
    """On the model itself, where a test's hooks or batches run it too."""
    if way == "accelerated":
        report = uf.accelerate(model)
        assert report.fused, "nothing was accelerated: this would test the plain model twice"
    return uf.collect(model, batches, **options)


def expected_sums(way: str, model: nn.Module, batches, **options) -> dict:
    return hook_sums(model, batches, accelerated=way == "accelerated", **options)


# ------------------------------------------------------------------ equal to hooks, everywhere


CASES = {
    "llama": lambda: hm.lora(hm.llama()),
    "llama r=1": lambda: hm.lora(hm.llama(layers=1), r=1),
    "llama r=8": lambda: hm.lora(hm.llama(layers=1), r=8),
    "llama r=64": lambda: hm.lora(hm.llama(layers=1), r=64),
    "llama bf16, adapters fp32": lambda: hm.lora(hm.llama(dtype=torch.bfloat16)),
    "llama bf16 r=1": lambda: hm.lora(hm.llama(layers=1, dtype=torch.bfloat16), r=1),
    "llama bf16 r=64": lambda: hm.lora(hm.llama(layers=1, dtype=torch.bfloat16), r=64),
    "llama bf16, adapters bf16": lambda: hm.lora(
        hm.llama(dtype=torch.bfloat16), autocast_adapter_dtype=False
    ),
    "llama fp32, adapters bf16": lambda: narrow_adapters(hm.lora(hm.llama())),
    "llama fp64": lambda: hm.lora(hm.llama(layers=1)).double(),
    "rslora": lambda: hm.lora(hm.llama(layers=1), use_rslora=True),
    "lora_bias": lambda: with_lora_bias(),
    "rank and alpha patterns": lambda: hm.lora(
        hm.llama(), rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 1}
    ),
    "lm_head": lambda: hm.lora(hm.llama(layers=1), targets=["q_proj", "lm_head"]),
    "gpt2 Conv1D": lambda: hm.lora(hm.gpt2()),
    "gpt2 Conv1D bf16": lambda: hm.lora(hm.gpt2(dtype=torch.bfloat16)),
}


def narrow_adapters(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    return model


def with_lora_bias() -> nn.Module:
    model = hm.lora(hm.gpt2(), lora_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("case", CASES)
def test_equals_hooks(case, way):
    model = CASES[case]()
    # GPT-2 has absolute positions and no position_ids here: right padding, as it is used.
    batches = MIXED + LEFT if "gpt2" not in case else MIXED
    sites = ("input", "rank", "output", "layer")
    stats = collect(way, model, batches, sites=sites)
    expected = expected_sums(way, model, batches)
    forget = [c["rank"][0][0].item() for c in expected.values()]
    assert min(forget) > 0, "no forget token: this case could not tell the groups apart"
    assert_equals_hooks(stats, expected, sites)


@pytest.mark.parametrize("case", [c for c in CASES if "bf16" not in c])
def test_accelerated_equals_pefts_own_run(case):
    """The accelerated model against hooks in PEFT's own run: x itself differs by its rounding."""
    model = CASES[case]()
    stats = collect("accelerated", model, MIXED)
    rel = 1e-9 if "fp64" in case else 1e-5
    expected = hook_sums(model, MIXED)
    for name, sites in stats.layers.items():
        for site, moments in sites.items():
            count, abs_sum, sq_sum = expected[name][site]
            assert torch.equal(moments.count, count)
            assert_relative(moments.abs_sum, abs_sum, rel, f"{name} {site}", to_mean=True)
            assert_relative(moments.sq_sum, sq_sum, rel, f"{name} {site}", to_mean=True)


def test_default_dtypes_are_the_ones_meant():
    adapted = hm.lora(hm.llama(layers=1, dtype=torch.bfloat16))
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {torch.float32}
    adapted = hm.lora(hm.llama(layers=1, dtype=torch.bfloat16), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {torch.bfloat16}


@pytest.mark.parametrize("batches", [RIGHT, LEFT], ids=["right", "left"])
def test_padding_is_never_counted(batches, way):
    model = hm.lora(hm.llama())
    stats = collect(way, model, batches)
    assert_equals_hooks(stats, expected_sums(way, model, batches))
    assert stats.tokens("retain") == 7 + 3 + 5 + 2 + 6
    assert stats.tokens("forget") == 0
    other_junk = []
    for batch in batches:
        ids = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 39)
        other_junk.append({**batch, "input_ids": ids})
    other = collect(way, model, other_junk)
    assert_same_stats(stats, other, rel=1e-5)


def test_group_argument_fills_in_and_token_groups_win(way):
    model = hm.lora(hm.llama(layers=1))
    for group, index in (("forget", 0), ("retain", 1)):
        stats = collect(way, model, RIGHT, group=group)
        assert_equals_hooks(stats, expected_sums(way, model, RIGHT, default=index))
        assert stats.tokens(group) == 23
        stats = collect(way, model, MIXED, group=group)
        assert_equals_hooks(stats, expected_sums(way, model, MIXED))
    both = [RIGHT[0], MIXED[1]]
    stats = collect(way, model, both, group="forget")
    assert_equals_hooks(stats, expected_sums(way, model, both, default=0))


def test_by_hand(way):
    """Two tokens, two inputs, rank 1, one output: every number written out."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(2, 1, bias=False)

        def forward(self, input_ids, attention_mask=None):
            vectors = torch.tensor([[1.0, -2.0], [3.0, 0.0], [-5.0, 1.0], [100.0, 100.0]])
            return self.dense(vectors[input_ids])

    model = peft.get_peft_model(
        Two(), peft.LoraConfig(r=1, lora_alpha=3, target_modules=["dense"])
    ).eval()
    layer = model.base_model.model.dense
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor([[2.0, 1.0]]))
        layer.lora_B["default"].weight.copy_(torch.tensor([[-0.5]]))
        layer.base_layer.weight.copy_(torch.tensor([[1.0, 1.0]]))
    batch = {
        "input_ids": torch.tensor([[0, 1, 2, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "token_groups": torch.tensor([[0, 1, 1, 0]]),
    }
    stats = collect(way, model, [batch], sites=["input", "rank", "output", "layer"])
    (sites,) = stats.layers.values()
    # z = 2 x1 + x2: token 0 -> 0, 1 -> 6, 2 -> -9. δ = 3 · -0.5 z: 0, -9, 13.5. y = x1 + x2 + δ.
    expected = {
        "input": ([[1, 2], [8, 1]], [[1, 4], [34, 1]]),
        "rank": ([[0], [15]], [[0], [117]]),
        "output": ([[0], [22.5]], [[0], [263.25]]),
        "layer": ([[1], [6 + 9.5]], [[1], [36 + 90.25]]),
    }
    for site, (abs_sum, sq_sum) in expected.items():
        assert sites[site].count.tolist() == [1, 2]
        assert sites[site].abs_sum.tolist() == abs_sum, site
        assert sites[site].sq_sum.tolist() == sq_sum, site


@pytest.mark.parametrize("measured", ["first", "second"])
def test_one_of_several_active_adapters(measured, way):
    model = hm.lora(hm.llama(), adapter="first")
    model.add_adapter(
        "second", peft.LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"])
    )
    hm.randomise(model, "second", seed=5)
    model.base_model.set_adapter(["first", "second"])
    stats = collect(way, model, MIXED, adapter=measured, sites=["input", "rank", "output", "layer"])
    expected = expected_sums(way, model, MIXED, adapter=measured)
    assert_equals_hooks(stats, expected, ("input", "rank", "output", "layer"))
    alone = copy.deepcopy(model)
    alone.set_adapter(measured)
    # δ is that adapter's own, but the model around it runs with both.
    assert_not_equal(stats, collect(way, alone, MIXED))


def assert_not_equal(one: uf.ActivationStats, other: uf.ActivationStats) -> None:
    assert any(
        not torch.equal(m.abs_sum, other.layers[name]["rank"].abs_sum)
        for name, m in ((n, s["rank"]) for n, s in one.layers.items())
    )


def test_scaling_is_read_when_it_runs(way):
    model = hm.lora(hm.llama(layers=1))
    for module in model.modules():
        if isinstance(module, peft_lora.LoraLayer):
            module.set_scale("default", 0.37)
    assert_equals_hooks(collect(way, model, MIXED), expected_sums(way, model, MIXED))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("lengths", [([7, 3], [4, 2]), ([5, 3], [2, 5]), ([3, 2], [6, 3])])
def test_t5(gated, lengths, way):
    """[5, 3] and [2, 5] have the same padded shape: only the module's role tells them apart."""
    model = hm.lora(hm.t5(gated=gated))
    batches = [hm.pair_batch(*lengths, groups="mixed"), hm.pair_batch(*lengths, seed=7)]
    stats = collect(way, model, batches)
    expected = expected_sums(way, model, batches, role=role_in_t5)
    assert len(expected) == (18 if gated else 16)
    assert_equals_hooks(stats, expected)


def test_t5_cross_attention_counts_by_role(way):
    """With one shape for both sides the counts alone show whose tokens were taken."""
    model = hm.lora(hm.t5())
    batch = hm.pair_batch([5, 5], [5, 2])
    stats = collect(way, model, [batch])
    counts = {name: s["rank"].count[1].item() for name, s in stats.layers.items()}
    prefix = "base_model.model.decoder.block.0.layer"
    assert counts[f"{prefix}.1.EncDecAttention.k"] == 10
    assert counts[f"{prefix}.1.EncDecAttention.v"] == 10
    assert counts[f"{prefix}.1.EncDecAttention.q"] == 7
    assert counts[f"{prefix}.1.EncDecAttention.o"] == 7
    assert counts[f"{prefix}.0.SelfAttention.k"] == 7
    assert counts["base_model.model.encoder.block.0.layer.0.SelfAttention.k"] == 10


def test_t5_lm_head_reads_decoder_tokens(way):
    model = hm.lora(hm.t5(), targets=["lm_head"])
    batch = hm.pair_batch([5, 4], [3, 5], groups="mixed")
    stats = collect(way, model, [batch])
    assert_equals_hooks(stats, expected_sums(way, model, [batch], role=role_in_t5))


def test_bart(way):
    """Another family's names for the same roles, on equal shapes."""
    model = hm.lora(hm.bart())
    batch = hm.pair_batch([5, 3], [2, 5], groups="mixed")
    stats = collect(way, model, [batch])
    assert len(stats.layers) == 16
    assert_equals_hooks(stats, expected_sums(way, model, [batch], role=role_in_bart))


def test_t5_decoder_groups_are_its_own(way):
    """Encoder all forget, decoder all retain."""
    model = hm.lora(hm.t5())
    batch = hm.pair_batch([5, 4], [3, 5])
    batch["token_groups"] = torch.zeros_like(batch["input_ids"])
    batch["decoder_token_groups"] = torch.ones_like(batch["decoder_input_ids"])
    stats = collect(way, model, [batch])
    for name, sites in stats.layers.items():
        wanted = [9, 0] if role_in_t5(name) == "encoder" else [0, 8]
        assert sites["input"].count.tolist() == wanted, name
    assert_equals_hooks(stats, expected_sums(way, model, [batch], role=role_in_t5))


def test_t5_with_labels_only(way):
    """The decoder's tokens come from the labels; ignored labels are padding."""
    model = hm.lora(hm.t5())
    batch = hm.token_batch([6, 4])
    batch["labels"] = torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100]])
    stats = collect(way, model, [batch])
    assert_equals_hooks(stats, expected_sums(way, model, [batch], role=role_in_t5))
    decoder = "base_model.model.decoder.block.0.layer.0.SelfAttention.q"
    assert stats.layers[decoder]["input"].count.tolist() == [0, 6]
    # A None beside the labels is what many collators leave there.
    again = collect(way, model, [{**batch, "decoder_input_ids": None}])
    assert again.layers[decoder]["input"].count.tolist() == [0, 6]


def test_autocast(way):
    model = hm.lora(hm.llama())

    def context():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    with context():
        stats = collect(way, model, MIXED, sites=["input", "rank", "output", "layer"])
    expected = expected_sums(way, model, MIXED, context=context)
    assert_equals_hooks(stats, expected, ("input", "rank", "output", "layer"))
    assert_not_equal(stats, collect(way, model, MIXED))


def test_dora_keeps_pefts_forward_and_is_measured_all_the_same():
    """16 tokens of width 16: the identity matrix that DoRA sends through lora_A must not count."""
    plain = hm.lora(hm.llama(layers=1), use_dora=True)
    fused = copy.deepcopy(plain)
    assert not uf.accelerate(fused).fused
    for batches in (MIXED, [hm.token_batch([8, 5], groups="mixed")]):
        expected = hook_sums(plain, batches)
        for model in (plain, fused):
            assert_equals_hooks(uf.collect(model, batches), expected)


def test_dora_beside_plain_lora():
    model = hm.lora(hm.llama(layers=1), adapter="first")
    model.add_adapter(
        "second", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True)
    )
    hm.randomise(model, "second", seed=5)
    model.base_model.set_adapter(["first", "second"])
    uf.accelerate(model)
    for adapter in ("first", "second"):
        stats = uf.collect(model, MIXED, adapter=adapter)
        expected = hook_sums(model, MIXED, adapter=adapter, accelerated=True)
        assert_equals_hooks(stats, expected)


@pytest.mark.parametrize("sites", [["layer"], ["input", "rank", "output", "layer"]])
def test_fused_layer_that_falls_back_is_measured(sites):
    """A user's hook on lora_A makes that call PEFT's own; no site may be lost by it."""
    model = hm.lora(hm.llama(layers=1))
    expected = hook_sums(model, MIXED)
    uf.accelerate(model)
    calls = []
    for module in model.modules():
        if isinstance(module, peft_lora.LoraLayer):
            module.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    assert_equals_hooks(uf.collect(model, MIXED, sites=sites), expected, sites)
    assert calls


# ------------------------------------------------------------------ unusual model structure


class Body(nn.Module):
    """Calls ``first`` twice and ``second`` once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, h):
        return self.second(torch.tanh(self.first(torch.tanh(self.first(h)))))


def toy(body: nn.Module, width: int = 8, **config) -> peft.PeftModel:
    base = hm.Wrapped(body, width)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.5, generator=generator)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"], **config}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    hm.randomise(model)
    return model.eval()


def test_module_called_twice_sums_both_calls(way):
    model = toy(Body(8))
    stats = collect(way, model, MIXED)
    assert_equals_hooks(stats, expected_sums(way, model, MIXED))
    counts = {n: s["input"].count.sum().item() for n, s in stats.layers.items()}
    assert counts["base_model.model.body.first"] == 2 * counts["base_model.model.body.second"]


def test_modules_sharing_parameters_keep_their_own_moments(way):
    model = toy(Body(8))
    body = model.base_model.model.body
    body.second.lora_A["default"].weight = body.first.lora_A["default"].weight
    body.second.lora_B["default"].weight = body.first.lora_B["default"].weight
    stats = collect(way, model, MIXED)
    assert_equals_hooks(stats, expected_sums(way, model, MIXED))
    assert_not_equal(stats, permuted(stats))


def permuted(stats):
    names = list(stats.layers)
    swapped = {n: stats.layers[m] for n, m in zip(names, reversed(names), strict=True)}
    return uf.ActivationStats(swapped, stats.fingerprint)


def test_one_parameter_used_by_two_layers_of_one_input(way):
    """Tied A on the same x: both layers have the same moments, neither has twice."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)

        def forward(self, h):
            return self.first(h) + self.second(h)

    model = toy(Tied())
    body = model.base_model.model.body
    body.second.lora_A["default"].weight = body.first.lora_A["default"].weight
    stats = collect(way, model, MIXED)
    assert_equals_hooks(stats, expected_sums(way, model, MIXED))
    one, two = stats.layers.values()
    assert torch.equal(one["input"].abs_sum, two["input"].abs_sum)


def test_one_lora_module_inside_two_layers(way):
    """lora_A tied as a module: each layer counts its own calls only."""
    model = toy(Body(8))
    body = model.base_model.model.body
    untied = copy.deepcopy(model)
    body.second.lora_A["default"] = body.first.lora_A["default"]
    untied.base_model.model.body.second.lora_A["default"].weight.data.copy_(
        body.first.lora_A["default"].weight
    )
    # The oracle hooks lora_A itself, so it is run on the untied twin, whose numbers are the same.
    assert_equals_hooks(collect(way, model, MIXED), expected_sums(way, untied, MIXED))


@pytest.mark.parametrize("inference", [False, True])
def test_input_changed_in_place_between_two_layers(inference, way):
    """Two layers read the same tensor object, but not the same values."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)

        def forward(self, h):
            one = self.first(h)
            h += 1.5
            return one + self.second(h)

    model = toy(InPlace())
    with torch.inference_mode() if inference else contextlib.nullcontext():
        stats = collect(way, model, MIXED)
    assert_equals_hooks(stats, expected_sums(way, model, MIXED))


def test_layers_of_one_input_with_adapters_that_cannot_be_stacked(way):
    """q, k and v are computed together only where their matrices are of one kind."""
    model = hm.lora(hm.llama(layers=1), rank_pattern={"v_proj": 300})
    attention = model.base_model.model.model.layers[0].self_attn
    for holder in (attention.k_proj.lora_A, attention.k_proj.lora_B):
        holder["default"].to(torch.bfloat16)
    hm.randomise(model)
    stats = collect(way, model, MIXED)
    expected = expected_sums(way, model, MIXED)
    k_proj = "base_model.model.model.layers.0.self_attn.k_proj"
    for name in (k_proj,):
        for site in ("rank", "output"):
            count, abs_sum, _ = expected[name][site]
            moments = stats.layers[name][site]
            assert moments.count.tolist() == count.tolist()
            assert_relative(moments.abs_sum, abs_sum, 1e-2, f"{name} {site}", to_mean=True)
    del stats.layers[k_proj], expected[k_proj]
    assert_equals_hooks(stats, expected)


def test_companions_by_name_that_read_inputs_of_another_width(way):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(8, 8)
            self.k_proj = nn.Linear(5, 8)

        def forward(self, h):
            return self.q_proj(h) + self.k_proj(h[..., :5])

    model = toy(Odd(), target_modules=["q_proj", "k_proj"])
    assert_equals_hooks(collect(way, model, MIXED), expected_sums(way, model, MIXED))


def test_calls_of_other_threads_are_not_counted(way):
    """A server goes on answering; whichever call is in the middle, the sums are the batches'."""
    model = hm.lora(hm.llama(layers=1))
    hm.randomise(model)
    expected = expected_sums(way, model, MIXED)
    failed = []

    def elsewhere():
        try:
            with torch.no_grad():
                model(**{k: v for k, v in MIXED[0].items() if k != "token_groups"})
        except Exception as error:
            failed.append(error)

    main = threading.get_ident()

    def answer(*_):
        if threading.get_ident() == main:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()

    attention = model.base_model.model.model.layers[0].self_attn
    # In the middle of a layer's own call, and between two layers.
    places = (attention.q_proj.base_layer, attention.o_proj)
    handles = [place.register_forward_pre_hook(answer) for place in places]
    try:
        stats = collect_in_place(way, model, MIXED)
    finally:
        for handle in handles:
            handle.remove()
    assert not failed
    assert_equals_hooks(stats, expected)


def test_the_model_may_be_run_between_two_batches(way):
    model = hm.lora(hm.llama(layers=1))
    hm.randomise(model)
    expected = expected_sums(way, model, MIXED)

    def batches():
        for batch in MIXED:
            with torch.no_grad():
                model(input_ids=torch.ones(1, 3, dtype=torch.int64))
            yield batch

    assert_equals_hooks(collect_in_place(way, model, batches()), expected)


def test_a_collection_between_two_batches_of_another(way):
    model = hm.lora(hm.llama(layers=1))
    hm.randomise(model)
    expected, inner = expected_sums(way, model, MIXED), []

    def batches():
        for batch in MIXED:
            inner.append(uf.collect(model, MIXED[:1]))
            yield batch

    assert_equals_hooks(collect_in_place(way, model, batches()), expected)
    wanted = expected_sums(way, model, MIXED[:1])
    for stats in inner:
        assert_equals_hooks(stats, wanted)


def test_two_collections_at_once(way):
    """In two threads, the second beginning and ending while the first is under way."""
    model = hm.lora(hm.llama(layers=1))
    hm.randomise(model)
    expected, found = expected_sums(way, model, MIXED), []

    def second():
        found.append(uf.collect(model, MIXED))

    def batches():
        for batch in MIXED:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
            yield batch

    found.append(collect_in_place(way, model, batches()))
    assert len(found) == 1 + len(MIXED)
    for stats in found:
        assert_equals_hooks(stats, expected)


def test_a_layer_that_runs_in_another_thread_for_some_batches_is_an_error(way):
    """Half of its tokens would be missing."""
    model = hm.lora(hm.llama(layers=1))
    layer, turns = model.base_model.model.model.layers[0].mlp, itertools.count()
    real = layer.forward

    def sometimes_elsewhere(x):
        if next(turns) % 2:
            return real(x)
        found = []
        thread = threading.Thread(target=lambda: found.append(no_grad(real)(x)))
        thread.start()
        thread.join()
        return found[0]

    no_grad = torch.no_grad()
    layer.forward = sometimes_elsewhere
    with pytest.raises(uf.UcanError, match=r"mlp\.\w+_proj was run in another thread"):
        collect_in_place(way, model, [*MIXED, *MIXED])


def test_a_layer_that_one_batch_does_not_need_may_have_answered_others_before(way):
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
            self.both = True

        def forward(self, h):
            return self.q_proj(h) + (self.k_proj(h) if self.both else 0)

    model = toy(Optional(), target_modules=["q_proj", "k_proj"])
    (inner,) = (m for m in model.modules() if isinstance(m, Optional))
    main = threading.get_ident()

    def answer(*_):
        if inner.both and threading.get_ident() == main:
            thread = threading.Thread(target=lambda: torch.no_grad()(inner)(torch.ones(1, 2, 8)))
            thread.start()
            thread.join()

    def batches():
        for both in (True, False):
            inner.both = both
            yield MIXED[0]

    inner.register_forward_pre_hook(answer)
    stats = collect_in_place(way, model, batches())
    counts = {name.rpartition(".")[2]: m["input"].count.sum() for name, m in stats.layers.items()}
    assert counts["q_proj"] == 2 * counts["k_proj"] > 0


def test_a_restore_between_two_batches_is_an_error():
    model = hm.lora(hm.llama(layers=1))
    uf.accelerate(model)

    def batches():
        yield MIXED[0]
        uf.restore(model)
        yield MIXED[0]

    with pytest.raises(uf.UcanError, match="q_proj was given PEFT's forward back"):
        uf.collect(model, batches())
    assert not any("_ucan_recorders" in vars(module) for module in model.modules())


def test_a_default_device_changes_nothing(way):
    """``torch.set_default_device("cuda")``; meta tensors have no values at all."""
    model = hm.lora(hm.llama(layers=1))
    hm.randomise(model)
    expected = expected_sums(way, model, MIXED)
    with torch.device("meta"):
        stats = collect(way, model, MIXED)
        plan = uf.make_plan(model, stats, uf.UcanConfig(strength=1.0, min_score=0.0))
        assert torch.isfinite(plan.flat_factors).all()
        rest = stats - stats
    assert_equals_hooks(stats, expected)
    assert rest.tokens("forget") == 0


@pytest.mark.parametrize("patched", [False, True])
def test_no_model_is_kept_alive(way, patched):
    model = hm.lora(hm.llama(layers=1))
    base = model.base_model.model
    if patched:
        wrapped = functools.partial(lambda own, _, **inputs: own(**inputs), base.forward)
        base.forward = types.MethodType(wrapped, base)
        del wrapped
    collect_in_place(way, model, MIXED)
    known = weakref.ref(base)
    del model, base
    gc.collect()
    assert known() is None


def test_an_input_is_not_kept_for_layers_that_may_read_it_next(way):
    """Held by us, its memory could not be had by the activations that follow."""
    alive = []

    class Frees(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(8, 8)

        def forward(self, h):
            x = h * 2
            known = weakref.ref(x)
            y = self.q_proj(x)
            del x
            alive.append(known() is not None)
            return y

    model = toy(Frees(), target_modules=["q_proj"])
    collect(way, model, MIXED)
    assert alive
    assert not any(alive)


def test_a_shared_input_is_known_by_itself_its_version_and_its_role():
    h = torch.zeros(2, 3)
    shared = _SharedInput(h, "encoder", None)
    assert shared.is_for(h, "encoder")
    assert not shared.is_for(h, "decoder")
    assert not shared.is_for(h.clone(), "encoder")
    h += 1
    assert not shared.is_for(h, "encoder")
    with torch.inference_mode():
        silent = torch.zeros(2, 3)
        assert not _SharedInput(silent, "encoder", None).is_for(silent, "encoder")


def test_layers_that_share_an_input_get_equal_moments(way):
    stats = collect(way, hm.lora(hm.llama(layers=1)), MIXED)
    layer = "base_model.model.model.layers.0"
    q, k, v = (stats.layers[f"{layer}.self_attn.{p}_proj"]["input"] for p in "qkv")
    assert torch.equal(q.abs_sum, k.abs_sum)
    assert torch.equal(q.sq_sum, v.sq_sum)
    gate = stats.layers[f"{layer}.mlp.gate_proj"]["input"]
    assert not torch.equal(q.abs_sum, gate.abs_sum)


class Flat(Body):
    """Some models run their MLP on [B·T, n]."""

    def forward(self, h):
        return super().forward(h.reshape(-1, h.shape[-1])).reshape(h.shape)


def test_flattened_tokens_under_dora():
    """8 flattened tokens of width 8 have the identity's shape, and are tokens all the same."""
    model = toy(Flat(8), use_dora=True)
    batches = [hm.token_batch([4, 3], groups="mixed")]
    assert_equals_hooks(uf.collect(model, batches), hook_sums(model, batches))


def test_flattened_tokens_are_recognised(way):
    model = toy(Flat(8))
    assert_equals_hooks(collect(way, model, MIXED), expected_sums(way, model, MIXED))


def test_nan_in_ignored_rows_does_not_spread(way):
    model = toy(Body(8))
    clean = expected_sums(way, model, MIXED)
    poisoned = []
    for batch in MIXED:
        ignored = (batch["token_groups"] == -1) | (batch["attention_mask"] == 0)
        ids = torch.where(ignored, 1, batch["input_ids"])
        poisoned.append({**batch, "input_ids": ids})
    with torch.no_grad():
        model.base_model.model.embed.weight[1] = float("nan")
    assert_equals_hooks(collect(way, model, poisoned), clean)


def test_a_torch_compiled_wrapper_is_seen_through(way):
    model = hm.lora(hm.llama(layers=1))
    expected = expected_sums(way, model, MIXED)
    if way == "accelerated":
        uf.accelerate(model)
    compiled = torch.compile(model, backend="eager")
    assert_equals_hooks(uf.collect(compiled, MIXED), expected)


def test_a_decoder_layer_that_was_compiled_is_measured(way):
    model = hm.lora(hm.llama())
    expected = expected_sums(way, model, MIXED)
    if way == "accelerated":
        uf.accelerate(model)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager")
    inputs = [{k: batch[k] for k in ("input_ids", "attention_mask")} for batch in MIXED]
    with torch.no_grad():
        for batch in inputs:  # as collect will call it: what was compiled here fits there
            model.eval()(**batch, use_cache=False)
    assert_equals_hooks(uf.collect(model, MIXED), expected)


# ------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_enabled(reentrant, way):
    model = hm.lora(hm.llama())
    expected = expected_sums(way, model, MIXED)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equals_hooks(collect(way, model, MIXED), expected)


class TrainsInside(nn.Module):
    """Runs a whole training step in its forward, with both layers under a checkpoint."""

    runs_in_backward: ClassVar[list] = []  # of the class: instances are copied

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.reentrant = reentrant

    def block(self, h):
        self.runs_in_backward.append(torch._C._current_graph_task_id() != -1)
        return self.second(torch.tanh(self.first(h)))

    def forward(self, h):
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            out = checkpoint(self.block, h, use_reentrant=self.reentrant)
            out.square().sum().backward()
        return out


@pytest.mark.parametrize(
    ("which", "reentrant"),
    [
        ("plain", True),
        ("plain", False),
        # The recording operators are not differentiable, so only a checkpoint that runs its first
        # forward without gradients can be trained through while it is measured.
        ("accelerated", True),
    ],
)
def test_recompute_of_a_real_training_step_is_not_counted(which, reentrant):
    TrainsInside.runs_in_backward.clear()
    model = toy(TrainsInside(reentrant))
    twin = toy(Straight(8))
    stats = collect(which, model, MIXED)
    assert TrainsInside.runs_in_backward == [False, True] * len(MIXED), "nothing was recomputed"
    assert_equals_hooks(stats, expected_sums(which, twin, MIXED))


class Straight(Body):
    def forward(self, h):
        return self.second(torch.tanh(self.first(h)))


# ------------------------------------------------------------------ no trace


def snapshot(model: nn.Module) -> dict:
    state = {}
    for name, module in model.named_modules():
        hooks = [len(v) for k, v in module.__dict__.items() if k.endswith("hooks")]
        state[name] = (module.training, sorted(module.__dict__), hooks, type(module))
    return state


def rng() -> tuple:
    return (
        torch.get_rng_state().tolist(),
        numpy.random.get_state()[1].tolist(),
        random.getstate(),
    )


@pytest.fixture
def mixed_mode(way):
    """Some modules in training mode, some not, with dropout inside."""
    model = hm.lora(hm.llama(layers=1), lora_dropout=0.5)
    if way == "accelerated":
        uf.accelerate(model)
    model.train()
    model.base_model.model.model.layers[0].mlp.eval()
    return model


def noisy(batches):
    """Batches whose loading uses every random number generator."""
    for batch in batches:
        torch.rand(3)
        numpy.random.rand(3)
        random.random()
        yield batch


@pytest.mark.parametrize("grad", [True, False])
def test_no_trace(mixed_mode, grad):
    before, states = snapshot(mixed_mode), rng()
    weights = {k: v.clone() for k, v in mixed_mode.state_dict().items()}
    with torch.set_grad_enabled(grad):
        uf.collect(mixed_mode, noisy(MIXED), sites=["input", "rank", "output", "layer"])
        assert torch.is_grad_enabled() == grad
    assert snapshot(mixed_mode) == before
    assert rng() == states
    after = mixed_mode.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[k], weights[k]) for k in weights)
    assert all(p.grad is None for p in mixed_mode.parameters())


def test_dropout_is_off_while_measuring(mixed_mode, way):
    assert_equals_hooks(uf.collect(mixed_mode, MIXED), expected_sums(way, mixed_mode, MIXED))


@pytest.mark.parametrize("where", ["batches", "progress", "model", "malformed"])
def test_no_trace_after_an_exception(mixed_mode, where, way):
    class Broken(RuntimeError):
        pass

    def batches():
        yield MIXED[0]
        if where == "batches":
            raise Broken
        yield {**MIXED[1], "token_groups": torch.ones(1, 1)} if where == "malformed" else MIXED[1]

    def progress(done, total, text):
        if where == "progress" and done == 1:
            raise Broken

    if where == "model":
        head = mixed_mode.base_model.model.lm_head
        count = []

        def fail(*_):
            count.append(1)
            if len(count) == 2:
                raise Broken

        head.register_forward_hook(fail)
    before, states = snapshot(mixed_mode), rng()
    with pytest.raises((Broken, uf.UcanError)):
        uf.collect(mixed_mode, noisy(batches()), progress=progress, sites=["input", "layer"])
    assert torch.is_grad_enabled()
    assert snapshot(mixed_mode) == before
    assert rng() == states
    if where == "model":
        head._forward_hooks.clear()
    # A recorder left behind would now count twice, or raise.
    assert_equals_hooks(uf.collect(mixed_mode, MIXED), expected_sums(way, mixed_mode, MIXED))


def test_running_the_model_afterwards_records_nothing(way):
    model = hm.lora(hm.llama(layers=1))
    if way == "accelerated":
        uf.accelerate(model)
    stats = uf.collect(model, MIXED)
    before = copy.deepcopy(stats)
    model(input_ids=MIXED[0]["input_ids"])
    assert_same_stats(stats, before)


# ------------------------------------------------------------------ what goes in


def test_any_iterable_and_only_once(way):
    model = hm.lora(hm.llama(layers=1))
    expected = expected_sums(way, model, MIXED)
    pulled = []

    def once():
        for batch in MIXED:
            pulled.append(1)
            yield batch

    assert_equals_hooks(collect(way, model, once()), expected)
    assert len(pulled) == len(MIXED)
    assert_equals_hooks(collect(way, model, tuple(MIXED)), expected)
    loader = torch.utils.data.DataLoader(MIXED, batch_size=None)
    assert_equals_hooks(collect(way, model, loader), expected)


def test_empty_batches_are_skipped(way):
    model = hm.lora(hm.llama(layers=1))
    empty = [{key: value[:0] for key, value in MIXED[0].items()}]
    empty.append({key: value[:, :0] for key, value in MIXED[0].items()})
    expected = expected_sums(way, model, MIXED)
    assert_equals_hooks(collect(way, model, [*empty, *MIXED, *empty]), expected)
    with pytest.raises(uf.UcanError, match=r"no (forget|retain) batch with a token"):
        collect(way, model, empty)


def test_progress():
    model = hm.lora(hm.llama(layers=1))
    told = []
    uf.collect(model, MIXED, progress=lambda *args: told.append(args))
    assert [(done, total) for done, total, _ in told] == [(0, 2), (1, 2), (2, 2)]
    assert all(isinstance(text, str) and text for _, _, text in told)
    told.clear()
    uf.collect(model, iter(MIXED), progress=lambda *args: told.append(args))
    assert [(done, total) for done, total, _ in told] == [(0, None), (1, None), (2, None)]


def test_progress_bar(capsys):
    uf.collect(hm.lora(hm.llama(layers=1)), MIXED, progress=True)
    assert "collect" in capsys.readouterr().err


def test_labels_make_no_difference(way):
    model = hm.lora(hm.llama(layers=1))
    labelled = [{**b, "labels": b["input_ids"].clone()} for b in MIXED]
    assert_same_stats(collect(way, model, MIXED), collect(way, model, labelled))


def test_the_callers_batches_are_left_alone():
    batch = {**MIXED[0], "labels": MIXED[0]["input_ids"].clone()}
    before = {k: v.clone() for k, v in batch.items()}
    uf.collect(hm.lora(hm.llama(layers=1)), [batch])
    assert list(batch) == list(before)
    assert all(torch.equal(batch[k], before[k]) for k in before)


@pytest.mark.parametrize("adapted_head", [True, False])
def test_full_logits_only_where_the_head_is_measured(adapted_head, way):
    targets = ["q_proj", "lm_head"] if adapted_head else ["q_proj"]
    model = hm.lora(hm.llama(layers=1), targets=targets)
    if way == "accelerated":
        uf.accelerate(model)
    shapes = []
    head = model.base_model.model.lm_head
    head.register_forward_hook(lambda _m, _x, y: shapes.append(tuple(y.shape)))
    stats = uf.collect(model, MIXED)
    if adapted_head:
        assert shapes == [(3, 7, hm.VOCAB), (2, 6, hm.VOCAB)]
        assert "base_model.model.lm_head" in stats.layers
    else:
        assert shapes == [(3, 1, hm.VOCAB), (2, 1, hm.VOCAB)]


def test_layers_between_trunk_and_head_see_every_token(way):
    """BERT's head has a dense layer before its output embeddings."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=hm.VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=True,
    )
    model = hm.lora(transformers.BertLMHeadModel(config), targets="all-linear")
    stats = collect(way, model, MIXED)
    assert "base_model.model.cls.predictions.transform.dense" in stats.layers
    assert_equals_hooks(stats, expected_sums(way, model, MIXED))


def test_only_the_sites_asked_for(way):
    model = hm.lora(hm.llama(layers=1))
    expected = expected_sums(way, model, MIXED)
    for sites in (["input"], ["rank"], ["output"], ["layer"], ["output", "input"]):
        assert_equals_hooks(collect(way, model, MIXED, sites=sites), expected, sorted(sites))
    assert_equals_hooks(collect(way, model, MIXED, sites="rank"), expected, ["rank"])
    assert_equals_hooks(collect(way, model, MIXED, sites=["mlp"]), expected, ["input"])
    assert_equals_hooks(collect(way, model, MIXED), expected, ["input", "rank", "output"])


def test_repeated_collection_is_bit_equal(way):
    model = hm.lora(hm.llama())
    assert_same_stats(collect(way, model, MIXED), collect(way, model, MIXED))


def test_layer_names_are_those_of_named_modules(way):
    model = hm.lora(hm.llama())
    names = dict(model.named_modules())
    stats = collect(way, model, MIXED)
    assert len(stats.layers) == 14
    assert all(isinstance(names[n], peft_lora.Linear) for n in stats.layers)
    # also without the PeftModel around it
    inner = copy.deepcopy(model.base_model.model)
    assert list(uf.collect(inner, MIXED).layers) == [
        n.removeprefix("base_model.model.") for n in stats.layers
    ]


# ------------------------------------------------------------------ refusals


def assert_refused(model, batches, *words, **options):
    """UcanError that names every word; nothing about the model changed."""
    before = snapshot(model)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(uf.UcanError) as error:
        uf.collect(model, batches, **options)
    for word in words:
        assert word in str(error.value), f"{word!r} is not named: {error.value}"
    assert snapshot(model) == before
    for key, value in model.state_dict().items():
        assert torch.allclose(value, weights[key], rtol=0, atol=0, equal_nan=True), key


@pytest.fixture(scope="module")
def ready():
    return hm.lora(hm.llama(layers=1))


def test_refuses_a_model_without_lora():
    assert_refused(hm.llama(layers=1), MIXED, "LlamaForCausalLM", "no LoRA")


def test_refuses_a_model_on_the_meta_device():
    model = hm.lora(hm.llama(layers=1)).to("meta")
    with pytest.raises(uf.UcanError, match=r"self_attn\.\w_proj .*meta device \(offloaded\)"):
        uf.collect(model, MIXED)


def test_refuses_a_merged_adapter(way):
    model = hm.lora(hm.llama(layers=1))
    if way == "accelerated":
        uf.accelerate(model)
    model.merge_adapter()
    assert_refused(model, MIXED, "merged", "unmerge_adapter", "q_proj")


def test_refuses_a_disabled_adapter(way):
    model = hm.lora(hm.llama(layers=1))
    if way == "accelerated":
        uf.accelerate(model)
    with model.disable_adapter():
        assert_refused(model, MIXED, "disabled")


def test_refuses_ambiguous_unknown_and_inactive_adapters():
    model = hm.lora(hm.llama(layers=1), adapter="first")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model.add_adapter("second", config)
    model.add_adapter("third", config)
    model.base_model.set_adapter(["first", "second"])
    assert_refused(model, MIXED, "first", "second", "adapter=")
    assert_refused(model, MIXED, "'fourth'", "first", "third", adapter="fourth")
    assert_refused(model, MIXED, "'third'", "not active", "set_adapter", adapter="third")


def test_refuses_no_tokens(ready):
    assert_refused(ready, [], "batch with a token")
    assert_refused(ready, iter(()), "batch with a token")
    padding = hm.token_batch([4, 2])
    padding["attention_mask"][:] = 0
    assert_refused(ready, [padding], "no token", "padding")
    ignored = hm.token_batch([4, 2])
    ignored["token_groups"] = torch.full((2, 4), -1)
    assert_refused(ready, [ignored], "no token")


def bad_groups():
    ids = MIXED[0]["input_ids"]
    return {
        "shape": (torch.ones(3, 6, dtype=torch.int64), ["(3, 6)", "(3, 7)"]),
        "one per sequence": (torch.ones(3, dtype=torch.int64), ["(3,)", "(3, 7)"]),
        "float": (torch.ones(ids.shape), ["float32"]),
        "bool": (torch.ones(ids.shape, dtype=torch.bool), ["bool"]),
        "complex": (torch.ones(ids.shape, dtype=torch.complex64), ["complex64"]),
        "two": (torch.full(ids.shape, 2), ["2"]),
        "minus two": (torch.full(ids.shape, -2), ["-2"]),
        "list": (torch.ones_like(ids).tolist(), ["list"]),
    }


@pytest.mark.parametrize("kind", bad_groups())
def test_refuses_bad_token_groups(ready, kind):
    groups, words = bad_groups()[kind]
    bad = {**RIGHT[0], "token_groups": groups}
    assert_refused(ready, [RIGHT[1], bad], "batch 1", "token_groups", *words)


def test_refuses_other_malformed_batches(ready):
    ids = RIGHT[0]["input_ids"]
    four_d = torch.ones(3, 1, 7, 7)
    assert_refused(
        ready, [{**RIGHT[0], "attention_mask": four_d}], "batch 0", "(3, 1, 7, 7)", "2-D"
    )
    short = {**RIGHT[0], "attention_mask": torch.ones(3, 6)}
    assert_refused(ready, [short], "batch 0", "attention_mask", "(3, 6)")
    assert_refused(ready, [{"input_ids": ids[0]}], "batch 0", "input_ids", "(7,)")
    assert_refused(ready, [{"attention_mask": ids}], "batch 0", "input_ids")
    assert_refused(ready, [ids], "batch 0", "Tensor", "dict")
    assert_refused(ready, RIGHT[0], "iterable of batches")
    assert_refused(ready, ids, "iterable of batches")
    both = {**RIGHT[0], "decoder_token_groups": torch.ones_like(ids)}
    assert_refused(ready, [both], "batch 0", "decoder_token_groups")
    assert_refused(ready, RIGHT, "'both'", "forget", "retain", group="both")


def test_refuses_t5_batches_without_decoder_tokens():
    model = hm.lora(hm.t5())
    assert_refused(model, [RIGHT[0]], "batch 0", "decoder_input_ids", "labels")
    bad = hm.pair_batch([5, 3], [4, 2])
    bad["decoder_token_groups"] = torch.ones(2, 5, dtype=torch.int64)
    assert_refused(model, [bad], "batch 0", "decoder_token_groups", "(2, 5)", "(2, 4)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_activations_that_are_not_finite(value, way):
    model = hm.lora(hm.llama())
    if way == "accelerated":
        uf.accelerate(model)
    with torch.no_grad():
        down = model.base_model.model.model.layers[1].mlp.down_proj
        down.lora_A["default"].weight[0, 0] = value
    # Layer 1's down_proj is the first to see it; all before it are finite.
    assert_refused(model, MIXED, "NaN or Inf", "layers.1.mlp.down_proj (rank)")
    with pytest.raises(uf.UcanError) as error:
        uf.collect(model, MIXED)
    assert "layers.0" not in str(error.value)


def test_refuses_lora_on_an_embedding():
    model = hm.lora(hm.llama(layers=1), targets=["q_proj", "embed_tokens"])
    assert_refused(model, MIXED, "embed_tokens", "Embedding", "target_modules")


class Pools(nn.Module):
    """``second`` sees one pooled token per sequence."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, h):
        return self.second(self.first(h)[:, 0])


def test_refuses_tokens_that_do_not_fit(way):
    model = toy(Pools())
    if way == "accelerated":
        uf.accelerate(model)
    for sites in (None, ["layer"]):
        assert_refused(model, MIXED, "body.second", "(3,)", "(3, 7)", sites=sites)


def test_refuses_a_layer_that_never_ran(way):
    class Skips(Pools):
        def forward(self, h):
            return self.first(h)

    model = toy(Skips())
    if way == "accelerated":
        uf.accelerate(model)
    assert_refused(model, MIXED, "body.second", "never called")


def test_refuses_unknown_sites(ready):
    assert_refused(ready, MIXED, "'hidden'", "input", "mlp", sites=["input", "hidden"])
    assert_refused(ready, MIXED, "site", sites=[])
    gpt = hm.lora(hm.gpt2())
    assert_refused(gpt, MIXED, "mlp", "c_proj", "site='input'", sites=["mlp"])
    attention = hm.lora(hm.llama(layers=1), targets=["q_proj"])
    assert_refused(attention, MIXED, "mlp", "q_proj", sites=["mlp"])


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_a_parametrised_weight_is_refused_by_name(which):
    """Writing to it would change nothing: it is computed from others in every call."""
    model = hm.lora(hm.llama(layers=1))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    torch.nn.utils.parametrizations.weight_norm(getattr(layer, which)["default"])
    assert_refused(model, MIXED, "up_proj", which, "parametrised")


def test_refuses_an_attenuated_adapter(way):
    model = hm.lora(hm.llama(layers=1))
    if way == "accelerated":
        uf.accelerate(model)
    stats = uf.collect(model, MIXED)
    plan = uf.make_plan(model, stats, uf.UcanConfig(fraction=0.3, min_score=0.0, strength=1.0))
    plan.apply(model)
    assert_refused(model, MIXED, "'default'", "plan", "undo")
    assert_refused(copy.deepcopy(model), MIXED, "plan")
    plan.undo(model)
    again = uf.collect(model, MIXED)
    assert again.fingerprint == stats.fingerprint


def test_sums_of_the_oracle_by_hand():
    """The oracle itself: wrong tests would agree with wrong code."""
    h = torch.tensor([[[1.0, -2.0], [3.0, 4.0]], [[-5.0, 0.5], [7.0, 8.0]]])
    count, abs_sum, sq_sum = sums(h, torch.tensor([0, 1, 0, -1]))
    assert count.tolist() == [2, 1]
    assert abs_sum.tolist() == [[6, 2.5], [3, 4]]
    assert sq_sum.tolist() == [[26, 4.25], [9, 16]]
