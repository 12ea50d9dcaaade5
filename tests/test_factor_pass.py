"""collect_factors against dense references: every sequence alone, every token by itself, fp64."""

from __future__ import annotations

import copy
import math

import helpers_models as hm
import influence_oracle as oracle
import pytest
import torch
from torch import nn
from trained_model import (
    BAD_LABELS,
    OTHER_MODELS,
    assert_same_weights,
    forget_batches,
    retain_batches,
    trained,
    weights,
)

import ucan_fast as uf
from ucan_fast import evaluation, factor_pass
from ucan_fast.factor_pass import (
    collect_factors,
    draw_labels,
    factor_memory,
    row_uniforms,
    softened,
)
from ucan_fast.factors import FACTORS

INDEX = {"forget": 0, "retain": 1}


#: Llama and T5 normalise in fp32 whatever the model's dtype, GPT-2 does not.
ROUNDING = {"llama": 1e-6, "gpt2": 1e-11}


def model64(kind: str = "gpt2") -> nn.Module:
    base = getattr(hm, kind)(dtype=torch.float64)
    return hm.lora(base, autocast_adapter_dtype=False).double()


def batches(side: str = "right", groups: str | None = "mixed") -> list[dict]:
    return [hm.token_batch([6, 4, 5], side=side, groups=groups), hm.token_batch([3, 7], seed=1)]


def assert_factors(factors, expected: dict, rtol: float) -> None:
    for name, sums in expected.items():
        assert factors.layers[name].tokens == sums["tokens"], name
        for which in FACTORS:
            got, wanted = factors.factor(name, which), sums[which]
            error = (got.double() - wanted).abs().max() / wanted.abs().max()
            assert error < rtol, (name, which, float(error))


def assert_gradients(factors, expected: dict, count: int, rtol: float) -> None:
    assert factors.positions == count
    assert set(factors.gradients) == set(expected)
    for key, wanted in expected.items():
        error = (factors.gradients[key] - wanted).abs().max() / wanted.abs().max()
        assert error < rtol, (key, float(error))


@pytest.mark.parametrize("group", ["forget", "retain"])
@pytest.mark.parametrize(
    # GPT-2 counts positions from the padding on.
    ("kind", "side"),
    [("llama", "right"), ("llama", "left"), ("gpt2", "right")],
)
def test_gradients_and_factors_are_those_of_the_references(group, kind, side):
    model, data, rtol = model64(kind), batches(side), ROUNDING[kind]
    data[0]["labels"] = data[0]["input_ids"].clone()
    data[0]["labels"][1, :4] = -100
    factors = collect_factors(model, data, group=group, seed=3)
    # A batch without token_groups is all of the default group.
    assert_gradients(factors, *oracle.gradients(model, data, INDEX[group]), rtol)
    assert_factors(factors, oracle.factors(model, data, INDEX[group], seed=3), rtol)


def surer(model: nn.Module, times: float) -> nn.Module:
    """The same with larger logits."""
    norm = next(m for name, m in model.named_modules() if name.endswith(("ln_f", "model.norm")))
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter *= times
    return model


@pytest.mark.parametrize(("kind", "times"), [("gpt2", 25.0), ("gpt2", 60.0), ("llama", 60.0)])
def test_factors_of_a_sure_model_are_those_of_the_references(kind, times):
    model, data = surer(model64(kind), times), batches()
    data[0]["labels"] = data[0]["input_ids"].clone()
    best = model(input_ids=data[0]["input_ids"]).logits.softmax(-1).amax(-1)
    assert (best > 0.5).any()
    assert times > 25 or (best < 0.5).any(), "a case with both"
    factors = collect_factors(model, data)
    rtol = ROUNDING[kind] * times
    assert_gradients(factors, *oracle.gradients(model, data, 1), rtol)
    assert_factors(factors, oracle.factors(model, data, 1), rtol)


def test_data_that_are_known_by_heart_have_curvature():
    """Where labels are drawn from the model itself it is e^-margin of this."""
    name, sizes = "", []
    for times in (20.0, 80.0):
        factors = collect_factors(surer(model64(), times), batches(groups=None))
        name = name or next(iter(factors.layers))
        sizes.append(float(factors.factor(name, "s_h").trace()) / times**2)
    assert 0.2 < sizes[1] / sizes[0] < 5


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    ("dtype", "adapter32", "rtol"),
    [(torch.float32, True, 2e-4), (torch.bfloat16, True, 0.1), (torch.bfloat16, False, 0.15)],
)
def test_other_dtypes_and_accelerated_models(accelerated, dtype, adapter32, rtol):
    model = hm.lora(hm.llama(dtype=dtype), autocast_adapter_dtype=adapter32)
    data = batches(groups=None)
    # The labels are drawn from the rounded model; the gradients below do not depend on them.
    expected = oracle.gradients(model, data, 1)
    if accelerated:
        uf.accelerate(model)
    factors = collect_factors(model, data)
    assert_gradients(factors, *expected, rtol=rtol)
    assert all(f.c_z.dtype == torch.float32 for f in factors.layers.values())
    if dtype == torch.float32:
        assert_factors(factors, oracle.factors(model, data, 1), rtol=rtol)


def test_layers_of_one_input_share_one_factor():
    factors = collect_factors(model64("llama"), batches())
    last = {name: name.rpartition(".")[2] for name in factors.layers}
    owners = {last[name]: last[layer.owner] for name, layer in factors.layers.items()}
    assert owners == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "q_proj"),
        **dict.fromkeys(("gate_proj", "up_proj"), "gate_proj"),
        "o_proj": "o_proj",
        "down_proj": "down_proj",
    }
    assert [n for n, f in factors.layers.items() if (f.c_x is None) != (f.owner != n)] == []


def test_layers_that_round_one_input_otherwise_do_not_share():
    model = hm.lora(hm.llama())
    for name, layer in oracle.lora_layers(model).items():
        if name.endswith("k_proj"):
            layer.to(torch.bfloat16)
            layer.base_layer.to(torch.float32)
    factors = collect_factors(model, batches())
    owners = {name.rpartition(".")[2]: layer.owner for name, layer in factors.layers.items()}
    assert owners["k_proj"].endswith("k_proj")
    assert owners["v_proj"].endswith(("q_proj", "v_proj"))


class Siblings(nn.Module):
    """Two layers that read one tensor, until the second batch is another case."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
        self.head = nn.Linear(8, hm.VOCAB).double()
        self.case, self.runs = case, 0

    def forward(self, x):
        self.runs += 1
        if self.case == "called later" and self.runs == 1:
            return self.head(self.q(x))
        if self.runs != 2 or self.case == "called later":
            return self.head(self.q(x) + self.k(x))
        if self.case == "another tensor":
            return self.head(self.q(x) + self.k(x + 0.5))
        return self.head(self.q(x) + self.k(x) + self.q(x))


class Body(hm.Wrapped):
    def forward(self, input_ids, attention_mask=None):
        return {"logits": super().forward(input_ids)}


@pytest.mark.parametrize("case", ["another tensor", "one more call", "called later"])
def test_a_shared_input_that_is_no_longer_shared_gets_its_own_factor(case):
    import peft

    torch.manual_seed(0)
    base = Body(Siblings(case), 8, torch.float64)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q", "k"]), autocast_adapter_dtype=False
    )
    hm.randomise(model)
    model.eval()
    data = [hm.token_batch([4, 5], seed=i) for i in range(3)]
    seen = {name: [] for name in oracle.lora_layers(model)}
    handles = [
        module.register_forward_pre_hook(lambda _module, args, n=name: seen[n].append(args[0]))
        for name, module in oracle.lora_layers(model).items()
    ]
    factors = collect_factors(model, data)
    for handle in handles:
        handle.remove()
    for name, layer in factors.layers.items():
        calls = [0, 1, 1, 2] if case == "one more call" and name.endswith("q") else [0, 1, 2]
        calls = [1, 2] if case == "called later" and name.endswith("k") else calls
        expected = torch.zeros(8, 8, dtype=torch.float64)
        for x, index in zip(seen[name], calls, strict=True):
            tokens = x.detach()[data[index]["attention_mask"].bool()]
            expected += tokens.T @ tokens
        assert torch.allclose(factors.factor(name, "c_x"), expected, rtol=1e-12), name
        assert layer.tokens == 9 * len(calls)
    owners = [layer.owner for layer in factors.layers.values()]
    assert owners == list(factors.layers)


def test_slices_do_not_change_the_sums(monkeypatch):
    model, data = model64(), batches()
    whole = collect_factors(model, data)
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 1)
    single = collect_factors(model, data)
    for name in whole.layers:
        assert whole.layers[name].tokens == single.layers[name].tokens
        for which in FACTORS:
            a, b = whole.factor(name, which), single.factor(name, which)
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12 * float(a.abs().max())), (name, which)


def test_a_batch_that_cannot_be_cut_gives_the_same_sums(monkeypatch):
    """It is run whole, and sequences without a token of the group are left out all the same."""
    model, data = hm.lora(hm.llama(dtype=torch.float64)).double(), batches()
    data[0]["token_groups"][1] = -1
    data[0]["token_groups"][2] = 0
    cut = collect_factors(model, data)
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 1)
    calls = []
    model.register_forward_hook(lambda _m, _x, y: calls.append(len(y.logits)))
    marked = [{**batch, "of_the_caller": torch.arange(len(batch["input_ids"]))} for batch in data]
    whole = collect_factors(model, marked)
    assert calls == [3, 2]
    assert whole.positions == cut.positions
    for key, gradient in cut.gradients.items():
        assert torch.allclose(whole.gradients[key], gradient, rtol=1e-9, atol=1e-12), key
    for name in cut.layers:
        assert whole.layers[name].tokens == cut.layers[name].tokens
        for which in FACTORS:
            a, b = cut.factor(name, which), whole.factor(name, which)
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12 * float(a.abs().max())), (name, which)


# The labels.


def test_labels_follow_the_model():
    probabilities = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.125], dtype=torch.float64)
    u = torch.linspace(0, 1, 8001, dtype=torch.float64)[:-1] + 1e-6
    drawn = draw_labels(probabilities.log().expand(8000, -1), u)
    counts = torch.bincount(drawn, minlength=5).double() / 8000
    assert torch.allclose(counts, probabilities, atol=1e-3)
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert draw_labels(torch.tensor([[0.0, -math.inf]]), largest).item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_best_label_is_no_likelier_than_all_others(dtype, monkeypatch):
    monkeypatch.setattr(factor_pass, "_CHUNK_ELEMENTS", 8)  # several rows' worth of pieces
    torch.manual_seed(0)
    logits = torch.randn(6, 5).to(dtype)
    logits[0, 3], logits[1, 0], logits[2, 4] = 9.0, 60.0, 900.0
    logits[5] /= 4
    logits[3] = torch.tensor([0.0, -math.inf, -math.inf, -math.inf, -math.inf])
    logits[4] = torch.tensor([5.0, 0.0, -math.inf, 1.0, -math.inf])
    masked = torch.full((1, 5), torch.finfo(dtype).min, dtype=dtype)
    masked[0, 1] = 20.0
    logits = torch.cat([logits, masked])
    logits.requires_grad_()
    soft = softened(logits)
    assert soft.dtype == torch.promote_types(dtype, torch.float32)
    before, after = logits.detach().double().softmax(-1), soft.detach().double().softmax(-1)
    assert before[5].max() < 0.5 < before[0].max(), "a case with both"
    # What is not sure, or has nothing beside it, stays bit by bit.
    assert torch.equal(soft[[3, 5, 6]], logits[[3, 5, 6]].to(soft.dtype))
    for row in (0, 1, 2, 4):
        best = int(before[row].argmax())
        assert after[row, best] == pytest.approx(0.5, abs=1e-4 if row == 2 else 1e-6)
        others = torch.arange(5) != best
        assert torch.equal(soft[row, others], logits[row, others].to(soft.dtype))
    weight = torch.randn_like(soft)
    (gradient,) = torch.autograd.grad((soft * weight).sum(), logits)
    assert torch.equal(gradient, weight.to(dtype)), "how far it is lowered is a constant"
    alone = torch.full((2, 1), 3.0)
    assert softened(alone) is alone


def test_uniforms_depend_on_the_sequence_alone():
    def of(batch, seed=0):
        mask = batch["attention_mask"].bool()
        return row_uniforms(batch, mask, seed).split(mask.sum(1).tolist())

    right, left = hm.token_batch([5, 3]), hm.token_batch([5, 3])
    left["input_ids"][1] = right["input_ids"][1].roll(2)
    left["attention_mask"][1] = right["attention_mask"][1].roll(2)
    left = {key: value.flip(0) for key, value in left.items()}
    assert torch.equal(of(right)[1], of(left)[0])
    assert torch.equal(of(right)[0], of(left)[1])
    assert not torch.equal(of(right)[0], of(right, seed=1)[0])
    assert not torch.equal(of(right)[0][:3], of(right)[1])
    many = hm.token_batch([60] * 50, seed=7)
    values = torch.cat(of(many))
    assert abs(float(values.mean()) - 0.5) < 0.02
    assert 0 <= float(values.min()) < float(values.max()) < 1


def test_the_seed_changes_factors_but_not_gradients():
    one, other = (collect_factors(model64(), batches(), seed=seed) for seed in (0, 1))
    for key in one.gradients:
        assert torch.equal(one.gradients[key], other.gradients[key])
    name = next(iter(one.layers))
    assert torch.equal(one.factor(name, "c_x"), other.factor(name, "c_x"))
    assert not torch.equal(one.factor(name, "s_h"), other.factor(name, "s_h"))


# Additivity.


def test_subtracting_whole_sequences_leaves_the_others():
    model = model64()
    first, second = batches(groups=None)
    both, rest = collect_factors(model, [first, second]), collect_factors(model, [second])
    # The same sequences in another batch, with other padding.
    padding = torch.zeros(3, 2, dtype=torch.int64)
    shuffled = {k: torch.cat([v[[2, 0, 1]], padding], 1) for k, v in first.items()}
    left = both - collect_factors(model, [shuffled], group="forget")
    assert (left.positions, left.tokens) == (rest.positions, rest.tokens)
    for key, wanted in rest.gradients.items():
        assert torch.allclose(left.gradients[key], wanted, rtol=1e-9, atol=1e-9)
    for name in rest.layers:
        assert left.layers[name].tokens == rest.layers[name].tokens
        for which in FACTORS:
            wanted = rest.factor(name, which)
            error = (left.factor(name, which) - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-9, (name, which)


def test_tokens_inside_a_sequence_subtract_exactly():
    """Gradients of D_f inside a history are the bank's minus the retained ones, and so are the
    factors: each token keeps the gradient that it has in its whole sequence."""
    model, data = model64(), batches()[:1]
    data[0]["token_groups"] = data[0]["token_groups"].clamp_min(0)
    everything = [{k: v for k, v in data[0].items() if k != "token_groups"}]
    bank = collect_factors(model, everything)
    forget, retain = (collect_factors(model, data, group=g) for g in ("forget", "retain"))
    left = bank - forget
    assert left.positions == retain.positions
    for key, wanted in retain.gradients.items():
        assert torch.allclose(left.gradients[key], wanted, rtol=1e-10, atol=1e-12)
    for name in retain.layers:
        for which in FACTORS:
            a, b = left.factor(name, which), retain.factor(name, which)
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12 * float(b.abs().max()))


def test_parts_add_up():
    model = model64()
    data = batches()
    whole = collect_factors(model, data)
    total = collect_factors(model, data[:1]) + collect_factors(model, data[1:])
    assert (total.positions, total.tokens) == (whole.positions, whole.tokens)
    assert repr(total) == repr(whole)
    for name in whole.layers:
        assert total.layers[name].owner == whole.layers[name].owner
        for which in FACTORS:
            assert torch.allclose(total.factor(name, which), whole.factor(name, which))


# Variants.


def test_variants_keep_parts_of_the_full_factors():
    model, data = model64(), batches()
    full = collect_factors(model, data)
    diagonal = collect_factors(model, data, variant="diagonal")
    b_only = collect_factors(model, data, variant="b-only")
    last = collect_factors(model, data, variant="last-blocks", blocks=1)
    for name, layer in full.layers.items():
        for which in ("c_x", "s_h"):
            expected = full.factor(name, which).diagonal()
            assert torch.allclose(diagonal.factor(name, which), expected, rtol=1e-9)
        for which in ("c_z", "s_z"):
            assert torch.allclose(diagonal.factor(name, which), getattr(layer, which))
        assert (b_only.layers[name].c_x, b_only.layers[name].s_z) == (None, None)
        assert torch.allclose(b_only.layers[name].s_h, layer.s_h)
    assert {key.rpartition(".")[2] for key in b_only.gradients} == {"lora_B"}
    assert list(last.layers) == [name for name in full.layers if ".h.1." in name]
    for key, gradient in last.gradients.items():
        assert torch.allclose(gradient, full.gradients[key])
    assert len(last.gradients) == len(full.gradients) / 2


def test_an_eigenbasis_keeps_the_largest_pairs_and_the_trace():
    model, data = model64(), batches()
    full = collect_factors(model, data)
    eigen = collect_factors(model, data, variant="eigenbasis", rank=3)
    for name in full.layers:
        for which in ("c_x", "s_h"):
            values = torch.linalg.eigvalsh(full.factor(name, which))
            kept = eigen.factor(name, which)
            n = len(values)
            assert torch.allclose(kept.values, values[-3:], rtol=1e-9)
            trace = kept.values.sum() + (n - 3) * kept.rest
            assert torch.allclose(trace, values.sum())
            assert torch.allclose(kept.vectors.T @ kept.vectors, torch.eye(3).double(), atol=1e-9)


@pytest.mark.parametrize("variant", ["all", "b-only", "last-blocks", "eigenbasis", "diagonal"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_the_stated_memory_is_that_of_the_factors(variant, base):
    """Beside a bf16 base PEFT keeps its adapter in fp32, and every layer casts its input anew."""
    model = hm.lora(hm.llama(dtype=base))
    stated = factor_memory(model, rank=3, blocks=1)[variant]
    factors = collect_factors(model, batches(), variant=variant, rank=3, blocks=1)
    gradients = sum(8 * g.numel() for g in factors.gradients.values())
    assert factors.bytes == stated + gradients


def test_without_curvature_there_are_gradients_only():
    model, data = model64(), batches()
    full, plain = collect_factors(model, data), collect_factors(model, data, curvature=False)
    assert plain.layers == {}
    assert (plain.tokens, plain.positions) == (full.tokens, full.positions)
    assert all(torch.equal(plain.gradients[k], g) for k, g in full.gradients.items())


# Other architectures.


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder_models(kind):
    """Gradients against autograd's of the model's own loss; every layer with its own tokens."""
    model = hm.lora(getattr(hm, kind)()).double()
    batch = hm.pair_batch([5, 3], [4, 6])
    labels = batch["decoder_input_ids"].clone()
    labels[batch["decoder_attention_mask"] == 0] = -100
    batch["labels"] = labels
    batch = {k: v for k, v in batch.items() if not k.startswith("decoder_")}
    factors = collect_factors(model, [batch])
    model.requires_grad_(False)
    layers = oracle.lora_layers(model)
    for layer in layers.values():
        for p in oracle.weights_of(layer):
            p.requires_grad_(True)
    model(**batch).loss.backward()
    assert factors.positions == int((labels != -100).sum())
    for name, layer in layers.items():
        for letter, p in zip("AB", oracle.weights_of(layer), strict=True):
            got = factors.gradients[f"{name}.lora_{letter}"] / factors.positions
            assert (got - p.grad).abs().max() < 1e-6 * p.grad.abs().max(), (name, letter)
    tokens = {int(f.tokens) for f in factors.layers.values()}
    assert tokens == {8, 10}


# What is left behind, and what is refused.


def state_of(model: nn.Module) -> tuple:
    return (
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_model_is_as_it_was(fails, grad):
    model = trained().train()
    model.base_model.model.model.layers[0].eval()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_A" in name or "norm" in name)
    before, state = weights(model), None
    data = retain_batches()
    if fails:
        data = [data[0], {"input_ids": torch.zeros(2)}]
    with torch.set_grad_enabled(grad):
        state = state_of(model)
        if fails:
            with pytest.raises(uf.UcanError, match="batch 1: input_ids"):
                collect_factors(model, data)
        else:
            collect_factors(model, data)
        assert state_of(model) == state
    assert_same_weights(model, before)


def test_under_inference_mode_it_works_as_outside():
    model, data = trained(), retain_batches()
    expected = collect_factors(model, data)
    with torch.inference_mode():
        got = collect_factors(model, data)
    assert all(torch.equal(got.gradients[k], g) for k, g in expected.gradients.items())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.q = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
        self.head = nn.Linear(8, hm.VOCAB).double()
        self.reentrant = reentrant

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        x = self.first(x)
        if self.reentrant is None:
            return self.head(self.q(x))
        return self.head(checkpoint(self.q, x, use_reentrant=self.reentrant))


def checkpointed(reentrant: bool | None) -> nn.Module:
    import peft

    torch.manual_seed(0)
    base = Body(Checkpointed(reentrant), 8, torch.float64)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["first", "q"]), autocast_adapter_dtype=False
    )
    hm.randomise(model)
    return model.eval()


def test_checkpointed_blocks_count_once():
    data = batches()
    plain, saved = (collect_factors(checkpointed(kind), data) for kind in (None, False))
    for name in plain.layers:
        assert plain.layers[name].tokens == saved.layers[name].tokens
        for which in FACTORS:
            assert torch.allclose(plain.factor(name, which), saved.factor(name, which))
    with pytest.raises(uf.UcanError, match="reentrant"):
        collect_factors(checkpointed(True), data)


def test_checkpointing_in_training_mode_changes_nothing():
    plain, saving = trained(), trained().train()
    saving.gradient_checkpointing_enable()
    one, two = (collect_factors(model, retain_batches(count=8)) for model in (plain, saving))
    for key, gradient in one.gradients.items():
        assert torch.equal(two.gradients[key], gradient)
    assert saving.training


def test_under_autocast_it_describes_the_model_under_autocast():
    model, data = trained(), retain_batches(count=8)
    exact = collect_factors(model, data)
    with torch.autocast("cpu", torch.bfloat16):
        rough = collect_factors(model, data)
    for key, gradient in exact.gradients.items():
        error = (rough.gradients[key] - gradient).norm() / gradient.norm()
        assert 1e-5 < error < 0.2, (key, error)
    assert all(f.s_h.dtype == torch.float32 for f in rough.layers.values())


def no_grad_inside(model: nn.Module) -> nn.Module:
    forward = model.base_model.model.forward
    model.base_model.model.forward = torch.no_grad()(forward)
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: hm.lora(hm.llama(), use_dora=True), r"q_proj.*Dora.*method='attenuate'"),
        (lambda: no_grad_inside(hm.lora(hm.llama())), "runs without gradients"),
        (lambda: hm.llama(), "has no LoRA layer"),
    ],
)
def test_models_that_cannot_be_differentiated_are_named(make, match):
    with pytest.raises(uf.UcanError, match=match):
        collect_factors(make(), batches())


@pytest.mark.parametrize("state", ["merged", "disabled", "scaled by 0", "two active", "attenuated"])
def test_adapter_states_are_refused_by_name(state):
    model = trained()
    if state == "merged":
        model.merge_adapter()
    elif state == "disabled":
        model.base_model.disable_adapter_layers()
    elif state == "scaled by 0":
        for module in oracle.lora_layers(model).values():
            module.scaling["default"] = 0.0
    elif state == "two active":
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        model.base_model.set_adapter(["default", "other"])
        state = "adapters are active"
    else:
        uf.unlearn(
            model,
            forget=forget_batches(),
            retain=retain_batches(),
            config=uf.UcanConfig(strength=2.0),
            evaluate=False,
        )
        state = "a plan is applied"
    with pytest.raises(uf.UcanError, match=state):
        collect_factors(model, batches())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"variant": "half"}, "variant must be one of 'all'"),
        ({"rank": 0}, "rank must be an integer >= 1"),
        ({"blocks": 1.5}, "blocks must be an integer >= 1"),
        ({"group": "both"}, "group must be"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(uf.UcanError, match=match):
        collect_factors(trained(), batches(), **options)


def test_sets_without_a_scored_position_are_refused():
    with pytest.raises(uf.UcanError, match="there was no retain batch"):
        collect_factors(trained(), [])
    lonely = {"input_ids": torch.full((3, 1), 5)}
    with pytest.raises(uf.UcanError, match="no retain position is scored"):
        collect_factors(trained(), [lonely])


@pytest.mark.parametrize("kind", list(OTHER_MODELS))
def test_models_that_predict_no_next_token_are_refused_by_name(kind):
    with pytest.raises(uf.UcanError, match=f"{kind} cannot be scored: .*evaluate=False"):
        collect_factors(OTHER_MODELS[kind](), [hm.token_batch([6, 4])])


@pytest.mark.parametrize("kind", list(BAD_LABELS))
def test_labels_that_cannot_be_scored_are_named(kind):
    change, match = BAD_LABELS[kind]
    first, second = forget_batches()
    second = {**second, "labels": change(second["input_ids"])}
    with pytest.raises(uf.UcanError, match=match):
        collect_factors(trained(), [first, second])


def test_int32_batches_and_empty_ones_change_nothing():
    model, data = trained(), forget_batches()
    expected = collect_factors(model, data)
    narrow = [{key: value.int() for key, value in batch.items()} for batch in data]
    empty = [{key: value[:0] for key, value in data[0].items()}]
    empty.append({key: value[:, :0] for key, value in data[0].items()})
    got = collect_factors(model, empty + narrow)
    for key, gradient in expected.gradients.items():
        assert torch.equal(got.gradients[key], gradient), key
    for name in expected.layers:
        for which in FACTORS:
            assert torch.equal(got.factor(name, which), expected.factor(name, which))
    with pytest.raises(uf.UcanError, match=r"no (forget|retain) batch with a token"):
        collect_factors(model, empty)


def test_values_that_are_not_finite_are_named():
    model = trained()
    layer = list(oracle.lora_layers(model).values())[-1]
    with torch.no_grad():
        oracle.weights_of(layer)[1][0, 0] = math.inf
    # It reaches every layer before it with the gradients.
    with pytest.raises(uf.UcanError, match=r"NaN or Inf .*layers.0.self_attn.q_proj.* 9 more"):
        collect_factors(model, batches())


def test_tied_parameters_have_one_gradient():
    """k's A is q's: one entry, the sum over both layers."""
    model = model64("llama")
    layers = oracle.lora_layers(model)
    q, k = (next(m for n, m in layers.items() if n.endswith(f"0.self_attn.{p}_proj")) for p in "qk")
    k.lora_A["default"].weight = q.lora_A["default"].weight
    data = batches()
    factors = collect_factors(model, data)
    expected, _ = oracle.gradients(model, data, 1)
    shared = [n for n in expected if n.endswith("0.self_attn.q_proj.lora_A")]
    assert [n for n in expected if n not in factors.gradients] == [
        shared[0].replace("q_proj", "k_proj")
    ]
    error = (factors.gradients[shared[0]] - expected[shared[0]]).abs().max()
    assert error < 1e-6 * expected[shared[0]].abs().max()
