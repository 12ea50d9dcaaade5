"""LLM-Eraser-style pruning: importances by finite differences, masks and post-training by loops."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch

from benchmarks.quality.case import Case, lora_weights
from benchmarks.quality.eraser import RATIOS, kept_groups, llm_eraser, taylor_importance
from benchmarks.quality.losses import read
from benchmarks.quality.training import cycled
from ucan_fast.batches import FORGET, RETAIN

from .quality_case import (
    forget_batches,
    loop_gradients,
    loop_mean,
    loop_nll,
    retain_batches,
    same,
    snapshot,
    tiny_case,
    tiny_model,
)


def all_labels(model, batches, group) -> torch.Tensor:
    parts = [nll for batch in batches for nll in loop_nll(model, batch, group)]
    return torch.cat(parts).mean()


def groups_of(name: str, values: torch.Tensor) -> list[torch.Tensor]:
    """Columns of A, rows of B."""
    return list(values.T) if ".lora_A." in name else list(values)


def importances(model, batches, group) -> dict[str, list[float]]:
    gradients = loop_gradients(model, lambda: all_labels(model, batches, group))
    return {
        name: [
            sum(abs(x) for x in part.tolist())
            for part in groups_of(name, weight.detach() * gradients[name])
        ]
        for name, weight in lora_weights(model).items()
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("group", [FORGET, RETAIN])
def test_taylor_importance_is_that_of_all_labels_together(side, group):
    model = tiny_model(torch.float64)
    batches = [*forget_batches(side), *retain_batches(side)]
    scored = read(model, batches, group)
    assert len({part.labels.numel() for part in scored}) > 1
    found = taylor_importance(model, lora_weights(model), scored)
    for name, expected in importances(model, batches, group).items():
        assert found[name].tolist() == pytest.approx(expected, rel=1e-5)


def test_taylor_importance_is_a_derivative():
    # |w dL/dw| of one weight, by scaling it a little up and down.
    model = tiny_model(torch.float64)
    weights = lora_weights(model)
    batches = forget_batches()
    scored = read(model, batches, FORGET)
    found = taylor_importance(model, weights, scored)
    # Llama's norms are in fp32, so smaller differences drown.
    step = 1e-2
    checked = 0
    for name in [n for n in weights if "v_proj" in n or "down_proj" in n]:
        weight, slopes = weights[name], []
        column = weight.detach()[:, 3] if ".lora_A." in name else weight.detach()[3]
        for index in range(len(column)):
            value = column[index].item()
            losses = []
            for scale in (1 + step, 1 - step):
                with torch.no_grad():
                    column[index] = value * scale
                    losses.append(all_labels(model, batches, FORGET).item())
                    column[index] = value
            slopes.append(abs(losses[0] - losses[1]) / (2 * step))
        assert found[name][3].item() == pytest.approx(sum(slopes), rel=1e-2)
        checked += 1
    assert checked == 4


def test_the_lowest_groups_of_every_matrix_go():
    importance = {
        "x.lora_A.default.weight": torch.tensor([3.0, -1.0, 2.0, 0.5]),
        "x.lora_B.default.weight": torch.tensor([1.0, 1.0, 1.0, 5.0, 0.0, 1.0]),
    }
    masks = kept_groups(importance, 0.5)
    assert masks["x.lora_A.default.weight"].tolist() == [[1, 0, 1, 0]]
    # Ties go by position.
    assert masks["x.lora_B.default.weight"].tolist() == [[0], [0], [1], [1], [0], [1]]
    everything = kept_groups(importance, 1.0)
    assert not any(mask.any() for mask in everything.values())
    nothing = kept_groups(importance, 0.05)
    assert all(mask.all() for mask in nothing.values())


def sampled(case: Case) -> list:
    """Retain batches until they have as many labels as D_f."""
    wanted = sum(len(nll) for b in case.forget for nll in loop_nll(case.model, b, FORGET))
    taken, count = [], 0
    for batch in islice(cycled(case.retain, case.seed), len(case.retain)):
        if count < wanted:
            taken.append(batch)
            count += sum(len(nll) for nll in loop_nll(case.model, batch, RETAIN))
    assert 0 < len(taken) < len(case.retain)
    return taken


def test_states_prune_by_retain_less_a_fifth_of_forget_importance():
    case = tiny_case(torch.float64)
    start = snapshot(case.model)
    positive = importances(case.model, sampled(case), RETAIN)
    negative = importances(case.model, case.forget, FORGET)
    differs, values = 0, []
    for state in llm_eraser(case, ratios=(0.05, 0.25, 0.5)):
        values.append(state.value)
        for name, weight in lora_weights(case.model).items():
            score = [p - 0.2 * n for p, n in zip(positive[name], negative[name], strict=True)]
            order = sorted(range(len(score)), key=score.__getitem__)
            gone = set(order[: round(state.value * len(order))])
            whole = zip(groups_of(name, weight), groups_of(name, start[name]), strict=True)
            for index, (now, before) in enumerate(whole):
                assert torch.equal(now, torch.zeros_like(before) if index in gone else before)
            swapped = [n - 0.2 * p for p, n in zip(positive[name], negative[name], strict=True)]
            differs += gone != set(sorted(order, key=swapped.__getitem__)[: len(gone)])
    assert values == [0.05, 0.25, 0.5]
    # The sides exchanged would have pruned others.
    assert differs > 5


def test_a_ratio_that_prunes_no_more_is_left_out():
    case = tiny_case()
    widest = max(max(weight.shape) for weight in lora_weights(case.model).values())
    ratios = (0.1 / widest, 0.25, 0.25 + 0.1 / widest, 0.5)
    assert [state.value for state in llm_eraser(case, ratios=ratios)] == [0.25, 0.5]


def test_post_training_is_adam_on_retain_less_a_hundredth_of_forget_on_what_is_left():
    case = tiny_case(torch.float64)
    lr, steps = 1e-2, 3
    pruned = {s.value: snapshot(case.model) for s in llm_eraser(case, ratios=(0.25, 0.5))}
    seen = 0
    for state in llm_eraser(case, steps=steps, lr=lr, ratios=(0.25, 0.5)):
        found = snapshot(case.model)
        other = tiny_model(torch.float64)
        weights = lora_weights(other)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(pruned[state.value][name])
        left = {name: (value != 0).double() for name, value in pruned[state.value].items()}
        mean = {n: torch.zeros_like(w) for n, w in weights.items()}
        square = {n: torch.zeros_like(w) for n, w in weights.items()}
        retain, forget = cycled(case.retain, case.seed), cycled(case.forget, case.seed)
        for step in range(1, steps + 1):
            kept, deleted = next(retain), next(forget)
            gradients = loop_gradients(
                other,
                lambda m=other, k=kept, d=deleted: (
                    loop_mean(m, k, RETAIN) - 0.01 * loop_mean(m, d, FORGET)
                ),
            )
            gradients = {n: g * left[n] for n, g in gradients.items()}
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
            with torch.no_grad():
                for n, weight in weights.items():
                    g = gradients[n] / max(1.0, norm)
                    mean[n] = 0.9 * mean[n] + 0.1 * g
                    square[n] = 0.999 * square[n] + 0.001 * g**2
                    m, v = mean[n] / (1 - 0.9**step), square[n] / (1 - 0.999**step)
                    weight -= lr * m / (v.sqrt() + 1e-8)
        for name, weight in weights.items():
            moved = (weight - pruned[state.value][name]).norm()
            assert moved > 0
            assert (found[name] - weight).norm() < 1e-3 * moved
            # Bit by bit.
            assert not found[name][left[name] == 0].any()
        seen += 1
    assert seen == 2


def test_a_loss_that_is_not_finite_ends_the_states():
    case = tiny_case()
    start, sample = snapshot(case.model), len(sampled(case))
    calls = 0

    def spoil(_module, _args, output):
        nonlocal calls
        calls += 1
        # Importance takes that many forward passes, a state's post-training 4.
        if calls > 2 + sample + 4:
            output.logits = output.logits * math.inf
        return output

    handle = case.model.register_forward_hook(spoil)
    states = llm_eraser(case, steps=2, ratios=(0.25, 0.5, 0.75))
    assert [state.value for state in states] == [0.25]
    handle.remove()
    assert same(start, snapshot(case.model))


@pytest.mark.parametrize(
    "setting",
    [
        {"ratios": ()},
        {"ratios": (0.5, 0.1)},
        {"ratios": (0.0, 0.1)},
        {"ratios": (0.5, 1.1)},
        {"steps": -1},
        {"steps": 1, "lr": 0.0},
    ],
)
def test_settings_without_meaning_are_refused(setting):
    with pytest.raises(ValueError, match=r"ratios must rise|steps must be"):
        next(llm_eraser(tiny_case(), **setting))
    assert list(RATIOS) == sorted(set(RATIOS))
