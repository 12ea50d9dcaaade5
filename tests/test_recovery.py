"""Relearning and rounding against plain loops, and the model bit by bit as it was afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_models import llama, lora
from trained_model import (
    MEMBERS,
    assert_same_weights,
    forget_batches,
    memorised,
    nll,
    random_batches,
    scored_logits,
    trained,
    weights,
)

import ucan_fast as uf
from ucan_fast import recovery
from ucan_fast.evaluation import group_loss
from ucan_fast.membership import MIN_SEQUENCES, auc, sequence_scores
from ucan_fast.recovery import (
    PRECISIONS,
    draw_sequences,
    relearn,
    round_weight,
    rounded_adapter,
    rounded_losses,
)


def scaled(model, factor: float):
    """The adapter with every B times a factor: knowledge turned down, not removed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(factor)
    return model


def state_of(model) -> tuple:
    return (
        [(n, m.training) for n, m in model.named_modules()],
        [(n, p.requires_grad) for n, p in model.named_parameters()],
        [(n, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()],
        model.active_adapters,
    )


def assert_same_state(one: tuple, two: tuple) -> None:
    assert (one[0], one[1], one[3]) == (two[0], two[1], two[3])
    for (name, before), (_, after) in zip(one[2], two[2], strict=True):
        assert (before is None) == (after is None), name
        assert before is None or torch.equal(before, after), name


# Relearning


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(("count", "fraction", "size"), [(2, 0.1, 1), (40, 0.1, 4), (3, 0.99, 2)])
def test_a_part_is_drawn_by_the_seed(count, fraction, size, seed):
    drawn, others = draw_sequences(count, fraction, seed)
    assert drawn | others == set(range(count))
    assert not drawn & others
    assert len(drawn) == size
    assert draw_sequences(count, fraction, seed) == (drawn, others)
    if count == 40:
        assert draw_sequences(count, fraction, seed + 1)[0] != drawn


def test_fewer_than_two_sequences_cannot_be_relearnt():
    for count, words in ((0, "there are none"), (1, "there is 1")):
        with pytest.raises(uf.UcanError, match=words):
            draw_sequences(count, 0.1, 0)


def singles(batches: list[dict]) -> list[dict]:
    rows = [(batch, row) for batch in batches for row in range(len(batch["input_ids"]))]
    return [{k: v[row : row + 1] for k, v in batch.items()} for batch, row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accelerated", [False, True])
def test_relearning_is_adam_on_the_drawn_sequences(dtype, accelerated):
    model = scaled(trained(), 0.2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    if dtype == torch.bfloat16:
        model.base_model.model.to(dtype)
    ours = copy.deepcopy(model)
    if accelerated:
        uf.accelerate(ours)
    # Labels in part, so that a mean over tokens is no mean over sequences.
    batches = forget_batches(count=40, size=7)
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][0, 3:] = -100
    found = relearn(ours, batches, steps=3, learning_rate=2e-3, seed=4)

    drawn, others = draw_sequences(40, 0.1, 4)
    each = singles(batches)
    adapter = [p for n, p in model.named_parameters() if "lora_" in n]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    masters = [p.detach().float().clone().requires_grad_() for p in adapter]
    optimizer = torch.optim.Adam(masters, lr=2e-3)
    for parameter in adapter:
        parameter.requires_grad_()

    def one(index: int) -> tuple[torch.Tensor, int]:
        there = each[index]["attention_mask"][0].bool()
        ids, labels = (each[index][k][:, there] for k in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[0, :-1].float()
        wanted = labels[0, 1:]
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        return loss, int((wanted != -100).sum())

    def mean_of(indices) -> torch.Tensor:
        parts = [one(index) for index in sorted(indices)]
        return sum(loss for loss, _ in parts) / sum(tokens for _, tokens in parts)

    rel = 1e-4 if dtype == torch.float32 else 2e-2
    assert found.nll_before == pytest.approx(float(mean_of(others).detach()), rel=rel)
    for _ in range(3):
        for master, gradient in zip(
            masters, torch.autograd.grad(mean_of(drawn), adapter), strict=True
        ):
            master.grad = gradient.float()
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(adapter, masters, strict=True):
                parameter.copy_(master)
    assert found.nll_after == pytest.approx(float(mean_of(others).detach()), rel=rel)
    assert found.nll_after < found.nll_before - 0.3
    assert (found.trained, found.others, found.steps, found.seed) == (4, 36, 3, 4)


def test_what_was_only_hidden_returns_faster_than_what_was_never_known():
    batches = forget_batches(count=40)
    known = group_loss(trained(), batches, "forget").mean
    hidden = relearn(scaled(trained(), 0.2), batches)
    never = relearn(lora(llama(hidden=32), r=8), batches)
    rise = hidden.nll_before - known
    assert rise > 0.5
    assert hidden.nll_before - hidden.nll_after > 0.7 * rise
    assert hidden.nll_before - hidden.nll_after > 4 * (never.nll_before - never.nll_after)


def test_the_auc_is_that_of_the_other_sequences():
    model, members, never_seen = memorised(), random_batches(MEMBERS), random_batches(42)
    _, others = draw_sequences(32, 0.25, 3)
    found = relearn(model, members, holdout=never_seen, fraction=0.25, seed=3, learning_rate=1e-2)
    ours = sequence_scores(model, members, only=others).scores["loss"]
    assert found.auc_before == auc(ours, sequence_scores(model, never_seen).scores["loss"])
    assert found.auc_before.members == 24
    # Training on other random sequences spoils what was memorised.
    assert found.auc_after.value < found.auc_before.value - 0.05
    few = [{k: v[: MIN_SEQUENCES - 1] for k, v in never_seen[0].items()}]
    for holdout in (None, few):
        assert relearn(model, members, holdout=holdout, steps=0).auc_before is None
    assert relearn(model, few, holdout=members, steps=0).auc_before is None


def test_0_steps_measure_only():
    model = trained()
    calls = []
    model.register_forward_hook(lambda _m, _x, y: calls.append(y.logits.requires_grad))
    found = relearn(model, forget_batches(), steps=0)
    assert found.nll_after == found.nll_before
    assert not any(calls)
    _, others = draw_sequences(16, 0.1, 0)
    each = singles(forget_batches())
    parts = [scored_logits(model, each[i], "forget") for i in others]
    expected = sum(nll(*p) for p in parts) / sum(len(labels) for _, labels in parts)
    assert found.nll_before == pytest.approx(expected, rel=1e-5)


class Stop(Exception):
    pass


def stopping(at: str, after: int):
    """A progress function that fails in the middle."""

    def progress(done: int, _total, text: str) -> None:
        if text.startswith(at) and done == after:
            raise Stop

    return progress


def with_gradients(model):
    """Odd flags and gradients of the caller's, which must stay."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_("lora_A" in name)
        if index % 3 == 0:
            parameter.grad = torch.full_like(parameter, 0.5)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", ["fine", "stopped", "interrupted", "diverged", "dora"])
def test_relearning_leaves_the_model_bit_by_bit_as_it_was(monkeypatch, training, how):
    model = lora(llama(hidden=32), r=8, use_dora=True) if how == "dora" else trained()
    model = with_gradients(model).train(training)
    before, state = weights(model), state_of(model)
    seen = []
    real = recovery.sequence_scores

    def watched(*args, **options):
        seen.append(any(not torch.equal(v, before[n]) for n, v in model.state_dict().items()))
        if how == "interrupted" and len(seen) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(recovery, "sequence_scores", watched)
    if how in ("fine", "dora"):
        relearn(model, forget_batches(), steps=2)
    elif how == "stopped":
        with pytest.raises(Stop):
            relearn(model, forget_batches(), steps=4, progress=stopping("relearning", 2))
    elif how == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            relearn(model, forget_batches(), steps=2)
    else:
        with pytest.raises(uf.UcanError, match=r"diverged: the loss is (nan|inf) at step \d of 4"):
            relearn(model, forget_batches(), steps=4, learning_rate=1e30)
    # The weights were others while the second measurement ran.
    assert seen == ([False] if how in ("stopped", "diverged") else [False, True])
    assert_same_weights(model, before)
    assert_same_state(state_of(model), state)


def test_dora_magnitudes_are_trained_too(monkeypatch):
    model = lora(llama(hidden=32), r=8, use_dora=True)
    before, changed = weights(model), set()
    real = recovery.sequence_scores

    def watched(*args, **options):
        now = model.state_dict()
        changed.update(n for n in before if not torch.equal(now[n], before[n]))
        return real(*args, **options)

    monkeypatch.setattr(recovery, "sequence_scores", watched)
    relearn(model, forget_batches(), steps=1)
    kinds = {name.split(".default")[0].rpartition(".")[2] for name in changed}
    assert kinds == {"lora_A", "lora_B", "lora_magnitude_vector"}


def test_small_steps_add_up_in_half_precision(monkeypatch):
    """A step of 1e-4 is below half a unit in the last place of most bf16 weights; ten are not."""
    model = trained().to(torch.bfloat16)
    before, shares = weights(model), []
    real = recovery.sequence_scores

    def watched(*args, **options):
        now = model.state_dict()
        moved = [(now[n] != before[n]).float().mean() for n in before if "lora_" in n]
        shares.append(float(torch.stack(moved).mean()))
        return real(*args, **options)

    monkeypatch.setattr(recovery, "sequence_scores", watched)
    for steps in (1, 10):
        relearn(model, forget_batches(), steps=steps, learning_rate=1e-4)
    assert shares[0] == shares[2] == 0
    assert shares[1] < 0.4
    assert shares[3] > 0.6
    assert_same_weights(model, before)


def test_a_one_shot_iterator_is_kept():
    with pytest.warns(uf.UcanWarning, match="forget is a one-shot iterator"):
        found = relearn(trained(), iter(forget_batches()), steps=1)
    assert found == relearn(trained(), forget_batches(), steps=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -1}, "steps must be a whole number of at least 0, not -1"),
        ({"steps": 1.5}, "steps must be"),
        ({"steps": True}, "steps must be"),
        ({"fraction": 0.0}, "fraction must lie between 0 and 1"),
        ({"fraction": 1.0}, "fraction must lie"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"seed": 2**64}, "seed must be an integer in .*, not 18446744073709551616"),
        ({"seed": 1.0}, "seed must be an integer"),
        ({"adapter": "nobody"}, "there is no adapter 'nobody'"),
    ],
)
def test_bad_options_are_refused(options, words):
    model = trained()
    before = weights(model)
    with pytest.raises(uf.UcanError, match=words):
        relearn(model, forget_batches(), **options)
    assert_same_weights(model, before)


def test_a_model_without_gradients_is_refused():
    model = trained()
    forward = model.base_model.model.forward
    model.base_model.model.forward = torch.no_grad()(forward)
    before = weights(model)
    with pytest.raises(uf.UcanError, match="does not depend on the adapter"):
        relearn(model, forget_batches(), steps=1)
    assert_same_weights(model, before)


# Rounding


@pytest.mark.parametrize(("precision", "levels"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_integers_per_row(precision, levels, dtype):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(5, 13, generator=generator).mul(
        torch.tensor([[1e-3], [1], [30], [0], [2]])
    )
    weight = weight.to(dtype)
    found = round_weight(weight, precision)
    assert found.dtype == dtype
    for row, (values, rounded) in enumerate(zip(weight.tolist(), found.tolist(), strict=True)):
        step = max(map(abs, values)) / levels
        expected = [round(v / step) * step if step else 0.0 for v in values]
        assert rounded == pytest.approx(expected, rel=5e-3 if dtype == torch.bfloat16 else 1e-5)
        assert (row == 3) == (not any(rounded))
        assert len(set(rounded)) <= 2 * levels + 1
    vector = torch.randn(9, generator=generator)
    assert torch.equal(round_weight(vector, precision), vector)


def test_integers_of_a_row_do_not_depend_on_other_rows():
    weight = torch.tensor([[1.0, 0.49, 0.26], [700.0, 1.0, 300.0]])
    found = round_weight(weight, "int4")
    assert found.tolist() == [pytest.approx([1.0, 3 / 7, 2 / 7]), pytest.approx([700.0, 0, 300.0])]


def test_floats_are_rounded_to_their_type():
    weight = torch.tensor([[1 / 3, 1e-9]])
    assert torch.equal(round_weight(weight, "bf16"), weight.bfloat16().float())
    assert torch.equal(round_weight(weight, "fp16"), weight.half().float())
    assert not torch.equal(round_weight(weight, "bf16"), weight)
    assert torch.equal(round_weight(weight.half(), "fp16"), weight.half())


def test_unlearning_smaller_than_a_rounding_step_is_undone_by_it():
    model, batches = trained(), forget_batches()
    parameters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(round_weight(parameter, "int4"))
    known = group_loss(model, batches, "forget").mean
    # Up the forget loss by 0.4 of a step, but for each row's largest weight.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in parameters)
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
    with torch.no_grad():
        for parameter in parameters.values():
            largest = parameter.abs().amax(-1, keepdim=True)
            move = 0.4 * largest / 7 * parameter.grad.sign()
            parameter += move * (parameter.abs() < largest)
    unlearned = group_loss(model, batches, "forget").mean
    assert unlearned > known + 0.2
    before = weights(model)
    found = rounded_losses(model, batches)
    assert list(found) == list(PRECISIONS)
    assert found["int4"].mean == pytest.approx(known, rel=1e-5)
    for precision in ("fp16", "bf16", "int8"):
        assert found[precision].mean == pytest.approx(unlearned, abs=0.1)
        assert found[precision].mean != unlearned
    assert_same_weights(model, before)


def test_while_rounded_all_adapter_weights_and_nothing_else_are():
    model = trained()
    before = weights(model)
    with rounded_adapter(model, "default", "int8"):
        for name, value in model.state_dict().items():
            expected = round_weight(before[name], "int8") if "lora_" in name else before[name]
            assert torch.equal(value, expected), name
            assert ("lora_" in name) != torch.equal(value, before[name]), name
    assert_same_weights(model, before)


@pytest.mark.parametrize("how", ["broken batch", "stopped", "unknown precision"])
def test_rounding_leaves_the_model_bit_by_bit_as_it_was_on_errors(how):
    model = with_gradients(trained())
    before, state = weights(model), state_of(model)
    if how == "broken batch":
        with pytest.raises(uf.UcanError, match="batch 1"):
            rounded_losses(model, [*forget_batches()[:1], {}])
    elif how == "stopped":
        with pytest.raises(Stop):
            rounded_losses(model, forget_batches(), progress=stopping("forget loss", 1))
    else:
        with pytest.raises(uf.UcanError, match="unknown precision 'int2'; known: fp16, bf16"):
            rounded_losses(model, forget_batches(), precisions=("int8", "int2"))
    assert_same_weights(model, before)
    assert_same_state(state_of(model), state)
