"""Requests in a row from one origin, and single interactions inside a history."""

from __future__ import annotations

import copy

import pytest
import torch
from trained_model import (
    assert_same_weights,
    forget_batches,
    retain_batches,
    trained,
    weights,
)

import ucan_fast as uf

FIXED = uf.UcanConfig(strength=2.0)


def requests() -> list[list[dict]]:
    """Three deletion requests of the same catalogue, two batches each."""
    return [forget_batches(seed=seed, count=8, size=4) for seed in (21, 22, 23)]


def everything() -> list[dict]:
    return [*(batch for request in requests() for batch in request), *retain_batches(count=16)]


def options(calibrated: bool) -> dict:
    """With a searched strength or a given one."""
    if calibrated:
        return {"calibration": retain_batches(count=16, seed=44), "evaluate": False}
    return {"config": FIXED, "evaluate": False}


@pytest.mark.parametrize("calibrated", [True, False], ids=["auto", "given strength"])
@pytest.mark.parametrize(
    ("kind", "count"),
    [("result", 2), ("result", 3), ("statistics", 2), ("saved statistics", 3)],
)
def test_requests_in_a_row_equal_one_with_the_union(calibrated, kind, count, tmp_path):
    model, at_once = trained(), trained()
    bank = uf.collect(model, everything())
    result = previous = None
    for request in requests()[:count]:
        if previous is not None and kind != "result":
            result.plan.undo(model)
        result = uf.unlearn(
            model, forget=request, bank=bank, previous=previous, **options(calibrated)
        )
        previous = result if kind == "result" else result.stats
        if kind == "saved statistics":
            previous.save(tmp_path / "stats.safetensors")
            previous = uf.ActivationStats.load(tmp_path / "stats.safetensors")
    union = [batch for request in requests()[:count] for batch in request]
    expected = uf.unlearn(at_once, forget=union, bank=bank, **options(calibrated))
    assert expected.plan.attenuated > 20
    assert_same_weights(model, weights(at_once))
    assert torch.equal(result.plan.flat_factors, expected.plan.flat_factors)
    assert result.plan.strength == expected.plan.strength
    assert result.report.request["forget_tokens"] == expected.report.request["forget_tokens"]
    assert result.report.request["includes_previous_requests"]
    assert not expected.report.request["includes_previous_requests"]
    assert result.report.fingerprint_before == expected.report.fingerprint_before
    assert result.report.fingerprint_after == expected.report.fingerprint_after


def test_the_second_request_matters():
    """Else the equality above would show nothing."""
    adapters = []
    for union in (requests()[0], requests()[0] + requests()[1]):
        model = trained()
        uf.unlearn(model, forget=union, bank=uf.collect(model, everything()), **options(False))
        adapters.append(weights(model))
    assert any(not torch.equal(adapters[0][n], adapters[1][n]) for n in adapters[0])


def test_retain_batches_serve_later_requests_too():
    model, at_once = trained(), trained()
    first, second, _ = requests()
    retain, other = retain_batches(count=16), retain_batches(count=8, seed=71)
    result = uf.unlearn(model, forget=first, retain=other)
    # Only the forget tokens of the first request carry over, not its retain tokens.
    uf.unlearn(model, forget=second, retain=retain, previous=result, evaluate=False)
    uf.unlearn(at_once, forget=first + second, retain=retain, evaluate=False)
    assert_same_weights(model, weights(at_once))


def test_undo_after_two_requests_leads_to_the_origin():
    model = trained()
    bank = uf.collect(model, everything())
    origin = weights(model)
    first, second, _ = requests()
    one = uf.unlearn(model, forget=first, bank=bank, **options(False))
    two = uf.unlearn(model, forget=second, bank=bank, previous=one, **options(False))
    with pytest.raises(uf.UcanError, match="cannot undo"):
        one.plan.undo(model)
    two.plan.undo(model)
    assert_same_weights(model, origin)


def test_the_result_serves_a_fresh_copy_of_the_origin():
    """As when the adapter was loaded again from its folder."""
    model, fresh = trained(), trained()
    bank = uf.collect(model, everything())
    first, second, _ = requests()
    one = uf.unlearn(model, forget=first, bank=bank, **options(False))
    stored = copy.deepcopy(one)
    uf.unlearn(model, forget=second, bank=bank, previous=one, **options(False))
    uf.unlearn(fresh, forget=second, bank=bank, previous=stored, **options(False))
    assert_same_weights(fresh, weights(model))


@pytest.mark.parametrize("way", ["nothing", "statistics", "an older result"])
def test_a_second_request_that_would_stack_is_refused(way):
    model = trained()
    bank = uf.collect(model, everything())
    first, second, third = requests()
    one = uf.unlearn(model, forget=first, bank=bank, **options(False))
    previous = None
    if way == "statistics":
        previous = one.stats
    elif way == "an older result":
        previous = one
        uf.unlearn(model, forget=second, bank=bank, previous=one, **options(False))
    before = weights(model)
    with pytest.raises(uf.UcanError, match=r"a plan is applied.*previous="):
        uf.unlearn(model, forget=third, bank=bank, previous=previous, **options(False))
    assert_same_weights(model, before)


def test_collecting_for_the_bank_on_an_attenuated_model_is_refused():
    model = trained()
    result = uf.unlearn(
        model, forget=requests()[0], bank=uf.collect(model, everything()), **options(False)
    )
    for group in ("retain", "forget"):
        with pytest.raises(uf.UcanError, match=r"a plan is applied.*origin"):
            uf.collect(model, everything(), group=group)
    result.plan.undo(model)
    uf.collect(model, everything())


def test_statistics_of_another_adapter_are_refused_as_previous_and_as_bank():
    model, other = trained(), trained()
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "lora_B" in n).add_(0.01)
    bank = uf.collect(model, everything())
    result = uf.unlearn(
        other, forget=requests()[0], bank=uf.collect(other, everything()), **options(False)
    )
    before = weights(model)
    with pytest.raises(uf.UcanError, match="different adapters"):
        uf.unlearn(model, forget=requests()[1], bank=bank, previous=result.stats, **options(False))
    result.plan.undo(other)
    with pytest.raises(uf.UcanError, match="different adapters"):
        uf.unlearn(model, forget=requests()[1], bank=uf.collect(other, everything()))
    assert_same_weights(model, before)


def test_a_previous_request_larger_than_the_bank_is_refused():
    """The same set twice is counted twice; where that exceeds the bank it shows."""
    model = trained()
    first, *_ = requests()
    bank = uf.collect(model, [*first, *retain_batches(count=8, size=4)[:1]])
    one = uf.unlearn(model, forget=first, bank=bank, **options(False))
    before = weights(model)
    with pytest.raises(uf.UcanError, match="not contained in the bank"):
        uf.unlearn(model, forget=first, bank=bank, previous=one, **options(False))
    assert_same_weights(model, before)


def test_previous_statistics_without_the_site_are_refused():
    model = trained()
    bank = uf.collect(model, everything())
    one = uf.unlearn(model, forget=requests()[0], bank=bank, **options(False))
    before = weights(model)
    with pytest.raises(uf.UcanError, match="no 'rank' moments"):
        uf.unlearn(
            model,
            forget=requests()[1],
            bank=bank,
            previous=one,
            config=uf.UcanConfig(strength=1.0, site="rank"),
        )
    assert_same_weights(model, before)


# Single interactions inside a history.


def histories() -> tuple[list[dict], list[dict]]:
    """Histories of which some interactions are to be forgotten.

    Returns the request (forget tokens, everything else ignored context), and the same sequences
    with everything else marked as retain.
    """
    generator = torch.Generator().manual_seed(9)
    request, direct = [], []
    for f, r in zip(forget_batches(count=16), retain_batches(count=16), strict=True):
        # Items of the forget catalogue in the middle of retain histories.
        ids, mask = r["input_ids"].clone(), r["attention_mask"]
        chosen = torch.rand(ids.shape, generator=generator) < 0.3
        chosen[:, 0] = False
        ids[chosen] = f["input_ids"][chosen].clamp_min(4)
        groups = torch.where(chosen, 0, 1)
        batch = {"input_ids": ids, "attention_mask": mask}
        direct.append({**batch, "token_groups": groups})
        request.append({**batch, "token_groups": torch.where(chosen, 0, -1)})
    return request, direct


@pytest.mark.parametrize("site", ["input", "rank", "output", "mlp"])
def test_single_interactions_through_a_bank_equal_direct_collection(site):
    request, direct = histories()
    others = retain_batches(count=8, seed=55)
    plain = [{k: v for k, v in b.items() if k != "token_groups"} for b in direct]
    through, directly = trained(), trained()
    config = uf.UcanConfig(site=site, strength=2.0)
    bank = uf.collect(through, [*plain, *others])
    got = uf.unlearn(through, forget=request, bank=bank, config=config, evaluate=False)
    expected = uf.unlearn(directly, forget=direct, retain=others, config=config, evaluate=False)
    marked = sum(int(((b["token_groups"] == 0) & (b["attention_mask"] == 1)).sum()) for b in direct)
    attended = sum(int(b["attention_mask"].sum()) for b in [*direct, *others])
    assert got.stats.tokens("forget") == expected.stats.tokens("forget") == marked
    assert got.stats.tokens("retain") == expected.stats.tokens("retain") == attended - marked
    for name, sites in expected.stats.layers.items():
        for where, moments in sites.items():
            mine = got.stats.layers[name][where]
            assert torch.equal(mine.count, moments.count)
            for a, b in zip(mine.tensors()[1:], moments.tensors()[1:], strict=True):
                assert torch.allclose(a, b, rtol=1e-6, atol=1e-9), (name, where)
    assert got.plan.attenuated > 0
    assert torch.equal(got.plan.flat_factors != 1, expected.plan.flat_factors != 1)
    for name, value in directly.state_dict().items():
        assert torch.allclose(through.state_dict()[name], value, rtol=1e-5, atol=1e-7), name


def test_single_interactions_in_a_float64_model_are_exact():
    request, direct = histories()
    model = trained().double()
    plain = [{k: v for k, v in b.items() if k != "token_groups"} for b in direct]
    stats = uf.collect(model, plain).with_forget(uf.collect(model, request, group="forget"))
    expected = uf.collect(model, direct)
    for name, sites in expected.layers.items():
        for where, moments in sites.items():
            for a, b in zip(stats.layers[name][where].tensors(), moments.tensors(), strict=True):
                assert torch.allclose(a, b, rtol=1e-9, atol=0), (name, where)


def test_the_neighbours_of_a_forgotten_interaction_are_not_forgotten():
    """The group belongs to the token itself, not to the one before or after it."""
    request, _ = histories()
    model = trained()
    embed = model.get_input_embeddings().weight
    stats = uf.collect(model, request, group="forget", sites=("input",))
    first = next(name for name in stats.layers if name.endswith("layers.0.self_attn.q_proj"))
    norm = model.base_model.model.model.layers[0].input_layernorm
    total = torch.zeros(embed.shape[1], dtype=torch.float64)
    for batch in request:
        marked = (batch["token_groups"] == 0) & (batch["attention_mask"] == 1)
        total += norm(embed[batch["input_ids"][marked]]).abs().double().sum(0)
    assert torch.allclose(stats.layers[first]["input"].abs_sum[0], total, rtol=1e-5)


def test_a_later_request_that_selects_nothing_says_that_the_earlier_ones_were_taken_back():
    model = trained()
    bank = uf.collect(model, everything())
    origin = weights(model)
    first, second, _ = requests()
    result = uf.unlearn(model, forget=first, bank=bank, **options(False))
    assert result.plan.attenuated
    config = uf.UcanConfig(strength=2.0, min_score=0.999)
    with pytest.warns(uf.UcanWarning, match="the adapter is the ORIGIN"):
        later = uf.unlearn(
            model, forget=second, bank=bank, previous=result, config=config, evaluate=False
        )
    assert "apply the earlier result's plan" in later.report.to_markdown()
    assert_same_weights(model, origin)
    with pytest.warns(uf.UcanWarning, match="earlier requests' forget sets") as warned:
        uf.unlearn(
            model, forget=second, bank=bank, previous=result.stats, config=config, evaluate=False
        )
    assert not any("ORIGIN" in str(w.message) for w in warned), "no plan was taken off here"
    result.plan.apply(model)  # the way back that the message names
    assert any(not torch.equal(value, origin[name]) for name, value in weights(model).items())


def test_the_report_of_a_later_request_says_which_data_its_metrics_cover():
    model = trained()
    bank = uf.collect(model, everything())
    first, second, _ = requests()
    one = uf.unlearn(model, forget=first, bank=bank, config=FIXED)
    two = uf.unlearn(model, forget=second, bank=bank, config=FIXED, previous=one)
    assert "earlier requests" not in one.report.notes
    assert "this request only" in two.report.notes["earlier requests"]


@pytest.mark.parametrize("method", ["attenuate", "influence"])
def test_a_result_without_statistics_is_refused(method):
    """Without them what the earlier requests forgot would come back."""
    model, retain = trained(), retain_batches()
    config = uf.UcanConfig(method=method, strength=0.2)
    first = uf.unlearn(model, forget=forget_batches(), retain=retain, config=config, evaluate=False)
    before = weights(model)
    with pytest.raises(uf.UcanError, match="holds no statistics of the earlier requests"):
        uf.unlearn(
            model,
            forget=forget_batches(seed=3),
            retain=retain,
            config=config,
            previous=uf.UnlearnResult(None, first.plan, None),
        )
    assert_same_weights(model, before)
