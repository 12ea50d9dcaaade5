"""unlearn(method="gates"): what it forgets, where it stops, and what it leaves behind."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from trained_model import (
    RETAIN_ITEMS,
    assert_same_weights,
    batches,
    forget_batches,
    mean_nll,
    mixed_batches,
    retain_batches,
    sequences,
    trained,
    weights,
)

import ucan_fast as uf
from ucan_fast import calibration, controls, evaluation, influence_job, job
from ucan_fast.guidance import guide_step
from ucan_fast.weights import WeightEdit

main = importlib.import_module("ucan_fast.unlearn")
AUTO = uf.UcanConfig(method="gates")
FIXED = AUTO.replace(strength=0.3)


# What it brings.


def genre() -> list[dict]:
    """Sequences over the retain catalogue, in which four of its 24 items are to be forgotten."""
    made = batches(RETAIN_ITEMS, count=96, seed=3)
    for batch in made:
        ids = batch["input_ids"]
        batch["token_groups"] = ((ids < RETAIN_ITEMS[0]) | (ids >= RETAIN_ITEMS[4])).long()
    return made


@pytest.mark.parametrize(
    ("request_", "kl"),
    # Sets that share no item differ in their activations too: there U-CAN moves the predictions
    # as far, though less of it against the forgotten items.
    [("disjoint catalogues", 1.0), ("genre", 2.0)],
)
def test_it_forgets_more_than_attenuation_and_controls_at_the_same_retain_loss(request_, kl):
    model, attenuated = trained(), trained()
    data = {"forget": genre()}
    if request_ != "genre":
        data = {"forget": forget_batches(), "retain": retain_batches(count=128)}
    gates = uf.unlearn(model, **data, config=AUTO).report.metrics
    ucan = uf.unlearn(attenuated, **data).report.metrics
    assert gates["gates"]["retain/loss"] <= ucan["U-CAN"]["retain/loss"] * 1.002
    assert gates["gates"]["forget/kl"] > kl * ucan["U-CAN"]["forget/kl"]
    before = gates["before"]["forget/perplexity"]
    rise = gates["gates"]["forget/perplexity"] - before
    assert rise > 2 * (ucan["U-CAN"]["forget/perplexity"] - before) > 0
    for control in ("uniform", "random"):
        assert gates["gates"]["forget/kl"] > 2 * gates[control]["forget/kl"]
        assert rise > 2 * (gates[control]["forget/perplexity"] - before)
    # Retained sequences that neither the gates nor their search have seen.
    if request_ != "genre":
        unseen = retain_batches(seed=77)
        assert mean_nll(model, unseen, "retain") < 1.1 * mean_nll(trained(), unseen, "retain")


def test_the_report_tells_of_the_gates(tmp_path):
    model = trained()
    result = uf.unlearn(model, forget=forget_batches(), retain=retain_batches(), config=AUTO)
    report, plan = result.report, result.plan
    assert isinstance(plan, uf.AttenuationPlan)
    sizes = [result.stats.tokens(group) for group in ("forget", "retain")]
    assert report.guidance == guide_step(*sizes, "gates")
    assert list(report.metrics) == ["before", "gates", "uniform", "random"]
    assert report.search.loss_after <= 1.05 * report.search.loss_before
    assert report.search.chosen == plan.strength == report.change["strength"] > 0
    after = math.log(report.metrics["gates"]["forget/perplexity"])
    assert after == pytest.approx(mean_nll(model, forget_batches(), "forget"), rel=1e-4)
    retained = report.metrics["gates"]["retain/loss"]
    assert retained == pytest.approx(mean_nll(model, retain_batches(), "retain"), rel=1e-4)
    for control in ("uniform", "random"):
        assert report.metrics[control]["retain/loss"] == pytest.approx(retained, rel=0.01)
    change = report.change
    assert len(change["layers"]) == 28
    assert change["neurons"] == sum(v["neurons"] for v in change["layers"].values()) > 0
    assert 0 < change["attenuated"] < change["neurons"]
    text = report.to_markdown()
    for part in (
        f"{change['attenuated']} of {change['neurons']} neurons attenuated",
        "at site `input and output`",
        "| one-shot gates | control: whole adapter scaled down | control: random neurons |",
        "retain loss that the gates reached",
        "| base_model.model.model.layers.1.mlp.up_proj.lora_B |",
        "not a formal guarantee",
    ):
        assert part in text, part
    assert {file.suffix for file in report.save(tmp_path)} == {".json", ".md", ".png"}
    assert json.loads(report.to_json())["config"]["method"] == "gates"
    result.plan.undo(model)
    assert_same_weights(model, weights(trained()))


def test_the_adapter_stays_an_ordinary_one(tmp_path):
    from peft import PeftModel

    model = trained()
    uf.unlearn(
        model, forget=forget_batches(), retain=retain_batches(), config=FIXED, evaluate=False
    )
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(trained().unload(), tmp_path / "adapter")
    assert_same_weights(loaded, weights(model))
    ids = sequences(range(4, 16), 2, 8, 0)
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


# What it is called with.


def test_retain_bank_and_mixed_batches_give_the_same_gates():
    forget, retain = forget_batches(), retain_batches(count=16)
    found = {}
    for way, options in {
        "retain": {"forget": forget, "retain": retain},
        "bank": {"forget": forget, "bank": "diagonal"},
        "full bank": {"forget": forget, "bank": "all"},
        "mixed": {"forget": mixed_batches()},
    }.items():
        model = trained()
        if "bank" in options:
            bank = uf.collect_factors(model, [*forget, *retain], variant=options["bank"])
            options["bank"] = bank
        result = uf.unlearn(model, **options, config=FIXED, evaluate=False)
        tokens = [sum(int(b["attention_mask"].sum()) for b in part) for part in (forget, retain)]
        assert [result.stats.tokens(group) for group in ("forget", "retain")] == tokens, way
        # Nothing larger than diagonals is kept where nothing larger was given.
        if way != "full bank":
            assert result.stats.retain.variant == "diagonal"
        found[way] = result.plan.flat_factors
    for way, factors in found.items():
        assert torch.allclose(factors, found["retain"], rtol=1e-3, atol=1e-4), way
    assert float(found["retain"].min()) < 0.9


def test_accelerated_models_give_the_same_request():
    plain, fast = trained(), trained()
    uf.accelerate(fast)
    results = [
        uf.unlearn(m, forget=forget_batches(), retain=retain_batches(), config=AUTO)
        for m in (plain, fast)
    ]
    assert results[0].plan.strength == pytest.approx(results[1].plan.strength, rel=1e-2)
    kl = [r.report.metrics["gates"]["forget/kl"] for r in results]
    assert kl[0] == pytest.approx(kl[1], rel=2e-2)


def bank_of(kind: str):
    data = [*forget_batches(), *retain_batches()]
    if kind == "statistics":
        return uf.collect(trained(), data)
    return uf.collect_factors(trained(), data, variant=kind, rank=4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (lambda: {"bank": bank_of("statistics"), "config": FIXED}, "'gates' needs a bank of fact"),
        (
            lambda: {"bank": bank_of("eigenbasis"), "config": FIXED},
            "wants 'diagonal'",
        ),
        (lambda: {"bank": bank_of("b-only"), "config": FIXED}, "wants 'diagonal'"),
        (lambda: {"config": FIXED}, "there is no retain set"),
        (lambda: {"bank": bank_of("diagonal"), "config": AUTO}, "nothing to measure the retain"),
        (lambda: {"retain": retain_batches(), "config": FIXED, "holdout": 1.0}, "holdout= is for"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, match):
    model = trained()
    before = weights(model)
    with pytest.raises(uf.UcanError, match=match):
        uf.unlearn(model, forget=forget_batches(), **options())
    assert_same_weights(model, before)


# Where it stops.


def test_it_stops_at_the_loss_of_never_seen_data():
    model = trained()
    data = {"forget": forget_batches(), "retain": retain_batches(), "evaluate": False}
    free = uf.unlearn(model, **data, config=AUTO)
    reached = mean_nll(model, forget_batches(), "forget")
    free.plan.undo(model)
    limit = (mean_nll(model, forget_batches(), "forget") + reached) / 2
    bound = uf.unlearn(model, **data, config=AUTO, holdout=limit)
    after = mean_nll(model, forget_batches(), "forget")
    assert limit - 0.02 < after <= limit + 1e-6
    assert 0 < bound.plan.strength < free.plan.strength
    assert f"as much as never-seen data ({limit:.4f} nats per token)" in bound.plan.note


def test_a_budget_of_everything_goes_as_far_as_a_prediction_has_a_meaning():
    model = trained()
    config = AUTO.replace(max_retain_loss_increase=1e6, trust_region=1e6)
    data = {"forget": forget_batches(), "retain": retain_batches(), "evaluate": False}
    result = uf.unlearn(model, **data, config=config)
    assert result.plan.strength == pytest.approx(math.log(40))
    assert "the most that is tried, stays within the budget" in result.plan.note
    result.plan.undo(model)
    result = uf.unlearn(model, **data, config=config.replace(max_strength=0.5))
    assert result.plan.strength == 0.5


# Requests in a row.


def requests() -> list[list[dict]]:
    return [forget_batches(seed=seed, count=8, size=4) for seed in (21, 22, 23)]


@pytest.mark.parametrize("source", ["bank", "retain"])
@pytest.mark.parametrize("kind", ["result", "saved statistics"])
def test_requests_in_a_row_equal_one_with_the_union(kind, source, tmp_path):
    model, at_once = trained(), trained()
    union = [batch for request in requests() for batch in request]
    if source == "bank":
        bank = uf.collect_factors(model, [*union, *retain_batches()], variant="diagonal")
        data = {"bank": bank, "calibration": retain_batches()}
    else:
        data = {"retain": retain_batches()}
    options = {**data, "config": FIXED, "evaluate": False}
    result = previous = None
    for request in requests():
        if previous is not None and kind != "result":
            result.plan.undo(model)
        result = uf.unlearn(model, forget=request, previous=previous, **options)
        previous = result
        if kind != "result":
            result.stats.save(tmp_path / "stats.safetensors")
            previous = uf.InfluenceFactors.load(tmp_path / "stats.safetensors")
    expected = uf.unlearn(at_once, forget=union, **options)
    assert result.report.request["includes_previous_requests"]
    for field in ("forget_tokens", "retain_tokens"):
        assert result.report.request[field] == expected.report.request[field]
    assert result.report.fingerprint_before == expected.report.fingerprint_before
    wanted = expected.plan.flat_factors
    assert torch.allclose(result.plan.flat_factors, wanted, rtol=1e-4, atol=1e-5)
    first = uf.unlearn(trained(), forget=union[:2], **options).plan
    assert not torch.allclose(first.flat_factors, wanted, rtol=1e-2)
    result.plan.undo(model)
    assert_same_weights(model, weights(trained()))


@pytest.mark.parametrize(("first", "second"), [("influence", "gates"), ("gates", "influence")])
def test_gradient_methods_may_follow_each_other(first, second):
    """They keep the same sums; the plan of the last one is of all requests."""
    model = trained()
    one, two, _ = requests()
    data = {"retain": retain_batches(), "evaluate": False}
    configs = {"gates": FIXED, "influence": FIXED.replace(method="influence")}
    previous = uf.unlearn(model, forget=one, config=configs[first], **data)
    uf.unlearn(model, forget=two, config=configs[second], previous=previous, **data)
    expected = trained()
    uf.unlearn(expected, forget=[*one, *two], config=configs[second], **data)
    for name, value in weights(expected).items():
        assert torch.allclose(weights(model)[name], value, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("first", ["attenuate", "gates"])
def test_requests_of_attenuation_and_gates_in_a_row_are_refused(first):
    model = trained()
    one, two, _ = requests()
    configs = {"attenuate": uf.UcanConfig(strength=2.0), "gates": FIXED}
    second = next(name for name in configs if name != first)
    data = {"retain": retain_batches(), "evaluate": False}
    previous = uf.unlearn(model, forget=one, config=configs[first], **data)
    before = weights(model)
    with pytest.raises(uf.UcanError, match="earlier request was"):
        uf.unlearn(model, forget=two, config=configs[second], previous=previous, **data)
    assert_same_weights(model, before)
    with pytest.raises(uf.UcanError, match="applied to adapter 'default'"):
        uf.unlearn(model, forget=two, config=configs[second], **data)


# What a failure leaves.


def fails_at(at: int, original):
    calls = []

    def function(*args, **options):
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("broken on purpose")
        return original(*args, **options)

    return function


STAGES = {
    "forget pass": (job, "collect_factors", 1),
    "retain pass": (job, "collect_factors", 2),
    "gates": (influence_job, "score_gates", 1),
    "the guard": (influence_job, "group_loss", 2),
    "retain loss in the search": (calibration, "group_loss", 4),
    "random control": (controls, "match_loss", 2),
    "metrics": (evaluation, "kl_divergence", 3),
    "write": (WeightEdit, "write", 3),
    "report": (main, "environment", 1),
}


@pytest.mark.parametrize("earlier", [False, True], ids=["first request", "second request"])
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_failure_leaves_everything_as_it_was(stage, earlier, monkeypatch):
    model = trained()
    previous = None
    retain = retain_batches(count=16)
    if earlier:
        previous = uf.unlearn(
            model, forget=requests()[0], retain=retain, config=FIXED, evaluate=False
        )
    model.train()
    before = weights(model)
    where, name, at = STAGES[stage]
    monkeypatch.setattr(where, name, fails_at(at, getattr(where, name)))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        uf.unlearn(model, forget=forget_batches(), retain=retain, config=AUTO, previous=previous)
    assert_same_weights(model, before)
    assert all(m.training for m in model.modules())
    monkeypatch.undo()
    if earlier:
        previous.plan.undo(model)
    assert_same_weights(model, weights(trained()))


def test_only_the_named_adapter_changes():
    from helpers_models import randomise

    model = trained()
    model.add_adapter("other", model.peft_config["default"])
    randomise(model, "other")
    model.base_model.set_adapter(["default", "other"])
    for p in model.parameters():
        p.requires_grad_(False)
    before = weights(model)
    data = {"forget": forget_batches(), "retain": retain_batches(), "config": FIXED}
    result = uf.unlearn(model, **data, adapter="default", evaluate=False)
    changed = {n for n, w in weights(model).items() if not torch.equal(w, before[n])}
    assert changed
    assert all(".default." in name for name in changed)
    result.plan.undo(model, "default")
    assert_same_weights(model, before)
