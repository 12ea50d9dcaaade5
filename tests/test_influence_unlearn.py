"""unlearn(method="influence"): what it forgets, where it stops, and what it leaves behind."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from trained_model import (
    assert_same_weights,
    forget_batches,
    mean_nll,
    mixed_batches,
    random_batches,
    retain_batches,
    sequences,
    trained,
    weights,
)

import ucan_fast as uf
from ucan_fast import calibration, controls, evaluation, influence, influence_job, job
from ucan_fast.guidance import guide_step

main = importlib.import_module("ucan_fast.unlearn")
AUTO = uf.UcanConfig(method="influence")
FIXED = AUTO.replace(strength=0.3)
VARIANTS = ("all", "b-only", "last-blocks", "eigenbasis", "diagonal")


# What it brings.


@pytest.mark.parametrize(
    ("variant", "margin"),
    # Diagonals lose to attenuation here, where the two sets share no item.
    [("all", 2.0), ("b-only", 1.2), ("last-blocks", 1.2), ("eigenbasis", 1.2), ("diagonal", 0.7)],
)
def test_it_forgets_more_than_attenuation_and_shrinking_at_the_same_retain_loss(variant, margin):
    model, attenuated = trained(), trained()
    config = AUTO.replace(influence_variant=variant, influence_rank=8, influence_blocks=1)
    forget, retain = forget_batches(), retain_batches(count=128)
    step = uf.unlearn(model, forget=forget, retain=retain, config=config).report.metrics
    ucan = uf.unlearn(attenuated, forget=forget, retain=retain).report.metrics
    assert step["influence"]["retain/loss"] <= ucan["U-CAN"]["retain/loss"] * 1.002
    reached = step["influence"]["forget/kl"]
    assert reached > margin * ucan["U-CAN"]["forget/kl"]
    assert reached > 2 * max(step[state]["forget/kl"] for state in ("uniform", "random"))
    assert step["influence"]["forget/perplexity"] > step["uniform"]["forget/perplexity"]
    # Retained sequences that neither the step nor its search has seen.
    unseen = retain_batches(count=256, seed=77)  # of 32 the loss moves by 5 % more or less
    assert mean_nll(model, unseen, "retain") < 1.1 * mean_nll(trained(), unseen, "retain")


def test_the_report_tells_of_the_step(tmp_path):
    model = trained()
    origin = weights(model)
    result = uf.unlearn(model, forget=forget_batches(), retain=retain_batches(), config=AUTO)
    report, plan = result.report, result.plan
    sizes = [result.stats.tokens(group) for group in ("forget", "retain")]
    assert report.guidance == guide_step(*sizes, "influence")
    assert f"Recommendation: **{report.guidance.recommendation}**. The forget set is" in (
        report.to_markdown()
    )
    assert list(report.metrics) == ["before", "influence", "uniform", "random"]
    assert report.search.loss_after <= 1.05 * report.search.loss_before
    assert report.search.chosen == plan.strength == report.change["strength"] > 0
    after = math.log(report.metrics["influence"]["forget/perplexity"])
    assert after == pytest.approx(mean_nll(model, forget_batches(), "forget"), rel=1e-4)
    retained = report.metrics["influence"]["retain/loss"]
    assert retained == pytest.approx(mean_nll(model, retain_batches(), "retain"), rel=1e-4)
    for control in ("uniform", "random"):
        assert report.metrics[control]["retain/loss"] == pytest.approx(retained, rel=0.01)
    change = report.change
    assert change["parameters"] == sum(v["parameters"] for v in change["layers"].values()) == 6272
    assert sum(v["share"] for v in change["layers"].values()) == pytest.approx(1)
    name = "base_model.model.model.layers.1.mlp.up_proj"
    moved = origin_size = 0.0
    for letter in "AB":
        key = f"{name}.lora_{letter}.default.weight"
        moved += float((weights(model)[key].double() - origin[key].double()).square().sum())
        origin_size += float(origin[key].double().square().sum())
    relative = change["layers"][name]["relative_change"]
    assert relative == pytest.approx(math.sqrt(moved / origin_size), rel=1e-4)
    assert list(change["factor_bytes"]) == list(VARIANTS)
    assert change["factor_bytes"]["all"] > change["factor_bytes"]["diagonal"] > 0
    text = report.to_markdown()
    for part in (
        "28 matrices (6272 parameters) moved by one influence step, variant `all`",
        "| influence step | control: whole adapter scaled down | control: random direction |",
        f"| {name} | 448 | {100 * relative:.2f} % |",
        "not a formal guarantee",
        "`diagonal` 0.00909 MiB",
    ):
        assert part in text, part
    assert {file.suffix for file in report.save(tmp_path)} == {".json", ".md", ".png"}
    assert json.loads(report.to_json())["config"]["method"] == "influence"


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


def test_retain_bank_and_mixed_batches_give_the_same_adapter():
    forget, retain = forget_batches(), retain_batches(count=16)
    bank = uf.collect_factors(trained(), [*forget, *retain])
    found = {}
    for way, options in {
        "retain": {"forget": forget, "retain": retain},
        "bank": {"forget": forget, "bank": bank},
        "mixed": {"forget": mixed_batches()},
        "mixed and retain": {"forget": mixed_batches()[:1] + forget[1:], "retain": retain[1:]},
    }.items():
        model = trained()
        result = uf.unlearn(model, **options, config=FIXED, evaluate=False)
        tokens = [sum(int(b["attention_mask"].sum()) for b in part) for part in (forget, retain)]
        assert [result.stats.tokens(group) for group in ("forget", "retain")] == tokens, way
        found[way] = result.plan.directions
        request = result.report.request
        assert request["retain_from"] == ("bank" if way == "bank" else "batches")
        if "mixed" not in way:
            assert request["forget_sequences"] == 16
    for way, directions in found.items():
        for key, direction in directions.items():
            wanted = found["retain"][key]
            assert (direction - wanted).norm() < 1e-3 * wanted.norm(), (way, key)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_bank_serves_every_variant(variant, tmp_path):
    model, again = trained(), trained()
    data = [*forget_batches(), *retain_batches()]
    options = {"variant": variant, "rank": 8, "blocks": 1}
    bank = uf.collect_factors(model, data, **options)
    bank.save(tmp_path / "bank.safetensors")
    loaded = uf.InfluenceFactors.load(tmp_path / "bank.safetensors")
    config = FIXED.replace(influence_variant=variant, influence_rank=8, influence_blocks=1)
    for m, b in ((model, bank), (again, loaded)):
        uf.unlearn(m, forget=forget_batches(), bank=b, config=config, evaluate=False)
    assert_same_weights(again, weights(model))
    full = trained()
    bank = uf.collect_factors(full, data)
    uf.unlearn(full, forget=forget_batches(), bank=bank, config=config, evaluate=False)
    changed = [n for n, w in weights(full).items() if not torch.equal(w, trained().state_dict()[n])]
    expected = [
        n for n, w in weights(model).items() if not torch.equal(w, trained().state_dict()[n])
    ]
    assert changed == expected != []


def test_labels_of_a_bank_are_subtracted_with_its_own_seed():
    data = [*forget_batches(), *retain_batches()]
    plans = []
    for seed in (0, 5):
        bank = uf.collect_factors(trained(), data, seed=seed)
        result = uf.unlearn(
            trained(), forget=forget_batches(), bank=bank, config=FIXED, evaluate=False
        )
        rest = uf.collect_factors(trained(), retain_batches(), seed=seed)
        for name in rest.layers:
            got, wanted = result.stats.retain.factor(name, "s_h"), rest.factor(name, "s_h")
            assert (got - wanted).norm() < 1e-3 * wanted.norm()
        plans.append(result.plan)
    key = next(iter(plans[0].directions))
    assert not torch.equal(plans[0].directions[key], plans[1].directions[key])


def test_accelerated_models_give_the_same_request():
    plain, fast = trained(), trained()
    uf.accelerate(fast)
    results = [
        uf.unlearn(m, forget=forget_batches(), retain=retain_batches(), config=AUTO)
        for m in (plain, fast)
    ]
    assert results[0].plan.strength == pytest.approx(results[1].plan.strength, rel=1e-2)
    kl = [r.report.metrics["influence"]["forget/kl"] for r in results]
    assert kl[0] == pytest.approx(kl[1], rel=2e-2)


def test_twice_gives_the_same_bits():
    adapters = []
    for _ in range(2):
        model = trained()
        uf.unlearn(model, forget=forget_batches(), retain=retain_batches(), config=AUTO)
        adapters.append(weights(model))
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())


def test_one_shot_iterators_warn_and_work():
    model, expected = trained(), trained()
    with pytest.warns(uf.UcanWarning, match="one-shot iterator"):
        uf.unlearn(
            model,
            forget=iter(forget_batches()),
            retain=iter(retain_batches()),
            config=AUTO,
            evaluate=False,
        )
    uf.unlearn(
        expected, forget=forget_batches(), retain=retain_batches(), config=AUTO, evaluate=False
    )
    assert_same_weights(model, weights(expected))


def bank_of(kind: str):
    data = [*forget_batches(), *retain_batches()]
    return (uf.collect if kind == "statistics" else uf.collect_factors)(trained(), data)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (lambda: {"bank": bank_of("statistics"), "config": FIXED}, "needs a bank of factors"),
        (lambda: {"bank": bank_of("factors")}, "needs a bank of activation statistics"),
        (lambda: {"config": FIXED}, "there is no retain set"),
        (lambda: {"bank": bank_of("factors"), "config": AUTO}, "nothing to measure the retain"),
        (
            lambda: {"bank": uf.collect_factors(trained(), forget_batches()), "config": FIXED},
            "retain set is empty: the bank holds no more",
        ),
        (
            lambda: {"bank": uf.collect_factors(trained(), retain_batches()[:1]), "config": FIXED},
            "not contained in the bank",
        ),
        (
            lambda: {
                "bank": uf.collect_factors(trained(), bank_data(), variant="diagonal"),
                "config": FIXED,
            },
            "of variant 'diagonal', the configuration wants 'all'",
        ),
        (lambda: {"retain": retain_batches(), "holdout": 1.0}, "holdout= is for"),
        (lambda: {"retain": retain_batches(), "config": FIXED, "holdout": 1.0}, "holdout= is for"),
        (
            lambda: {"retain": retain_batches(), "config": AUTO, "holdout": -1.0},
            "nats per token > 0",
        ),
        (
            lambda: {"retain": retain_batches(), "config": AUTO, "holdout": []},
            "holdout set is empty",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, match):
    model = trained()
    before = weights(model)
    with pytest.raises(uf.UcanError, match=match):
        uf.unlearn(model, forget=forget_batches(), **options())
    assert_same_weights(model, before)


def bank_data() -> list[dict]:
    return [*forget_batches(), *retain_batches()]


# Where it stops.


def test_it_stops_at_the_loss_of_never_seen_data():
    model = trained()
    free = uf.unlearn(
        model, forget=forget_batches(), retain=retain_batches(), config=AUTO, evaluate=False
    )
    reached = mean_nll(model, forget_batches(), "forget")
    free.plan.undo(model)
    before = mean_nll(model, forget_batches(), "forget")
    limit = (before + reached) / 2
    bound = uf.unlearn(
        model,
        forget=forget_batches(),
        retain=retain_batches(),
        config=AUTO,
        evaluate=False,
        holdout=limit,
    )
    after = mean_nll(model, forget_batches(), "forget")
    assert limit - 0.02 < after <= limit + 1e-6
    assert 0 < bound.plan.strength < free.plan.strength
    assert f"as much as never-seen data ({limit:.4f} nats per token)" in bound.plan.note
    assert bound.plan.note in bound.report.to_markdown()


@pytest.mark.parametrize("method", ["influence", "gates"])
def test_what_was_never_known_does_not_take_earlier_requests_back(method):
    model, retain = trained(), retain_batches(count=64)
    known, unknown = forget_batches(), random_batches(7, count=8)
    limit = evaluation.group_loss(model, unknown, "forget").mean - 0.02
    options = {"retain": retain, "holdout": limit, "evaluate": False}
    options["config"] = uf.UcanConfig(method=method, max_retain_loss_increase=0.05)
    before = evaluation.group_loss(model, known, "forget").mean
    first = uf.unlearn(model, forget=known, **options)
    after = evaluation.group_loss(model, known, "forget").mean
    assert after > before + 0.2
    second = uf.unlearn(model, forget=unknown, previous=first, **options)
    assert "no better known" in second.plan.note
    assert "earlier requests stays" in second.plan.note
    assert evaluation.group_loss(model, known, "forget").mean == after
    assert second.stats.tokens("forget") > first.stats.tokens("forget")
    second.plan.undo(model)
    assert evaluation.group_loss(model, known, "forget").mean == before


def test_holdout_batches_are_measured_on_the_origin():
    model = trained()
    never = forget_batches(seed=99)
    shuffled = [{**b, "input_ids": b["input_ids"].clone()} for b in never]
    for batch in shuffled:
        batch["input_ids"][:4, 1:] = batch["input_ids"][:4, 1:].flip(1)
    limit = mean_nll(model, shuffled, "forget")
    data = {"forget": forget_batches(), "retain": retain_batches(), "evaluate": False}
    options = {"config": AUTO.replace(max_retain_loss_increase=3.0, trust_region=9.0)}
    by_number = uf.unlearn(model, **data, **options, holdout=limit).plan
    by_number.undo(model)
    by_batches = uf.unlearn(model, **data, **options, holdout=shuffled).plan
    assert by_batches.strength == pytest.approx(by_number.strength, rel=1e-3)
    assert "never-seen data" in by_batches.note


def test_what_is_known_no_better_than_never_seen_data_is_left_alone():
    model = trained()
    before = weights(model)
    with pytest.warns(uf.UcanWarning, match="no better known than never-seen data"):
        result = uf.unlearn(
            model,
            forget=forget_batches(),
            retain=retain_batches(),
            config=AUTO,
            holdout=0.5,
        )
    assert_same_weights(model, before)
    assert result.plan.is_noop
    assert "not run: the plan changes nothing" in result.report.notes["controls"]


def test_the_trust_region_stops_the_search():
    model = trained()
    data = {"forget": forget_batches(), "retain": retain_batches(), "evaluate": False}
    free = uf.unlearn(model, **data, config=AUTO.replace(trust_region=100.0)).plan
    free.undo(model)
    tight = uf.unlearn(model, **data, config=AUTO.replace(trust_region=0.1)).plan
    assert 0 < tight.strength < free.strength
    assert "stopped by the trust region" in tight.note
    rise = mean_nll(model, forget_batches(), "forget") - mean_nll(
        trained(), forget_batches(), "forget"
    )
    assert abs(rise - tight.strength) <= 0.1 * tight.strength * 1.001


def test_a_fall_of_the_forget_loss_stops_the_search(monkeypatch):
    costs = iter([1.0])

    def falling(*_arguments):
        return evaluation.Loss(next(costs, 0.9), 1)

    monkeypatch.setattr(influence_job, "group_loss", falling)
    data = {"forget": forget_batches(), "retain": retain_batches(), "evaluate": False}
    with pytest.warns(uf.UcanWarning, match="changes nothing.*nats was one of -0.1, a fall"):
        plan = uf.unlearn(trained(), **data, config=AUTO).plan
    assert plan.is_noop


def test_a_budget_of_everything_says_so():
    model = trained()
    config = AUTO.replace(max_retain_loss_increase=1e6, trust_region=1e6)
    result = uf.unlearn(
        model, forget=forget_batches(), retain=retain_batches(), config=config, evaluate=False
    )
    assert result.plan.strength == pytest.approx(math.log(40))
    assert "the most that is tried, stays within the budget" in result.plan.note
    # The rise that was predicted is ln V, the one that came is more.
    after = mean_nll(model, forget_batches(), "forget")
    assert after > math.log(40)
    assert f"now costs {after:.2f} nats per token, more than blind guessing" in result.plan.note


def test_a_step_that_ends_below_blind_guessing_says_nothing_of_it():
    model = trained()
    data = {"retain": retain_batches(), "evaluate": False}
    plan = uf.unlearn(model, forget=forget_batches(), **data, config=AUTO).plan
    assert mean_nll(model, forget_batches(), "forget") < math.log(40)
    assert "blind guessing" not in plan.note
    # Nor what was beyond it before, nor where never-seen data say what is too much.
    unknown = random_batches(3, count=8)
    assert mean_nll(trained(), unknown, "forget") > math.log(40)
    plan = uf.unlearn(trained(), forget=unknown, **data, config=AUTO).plan
    assert "blind guessing" not in plan.note
    config = AUTO.replace(max_retain_loss_increase=1e6, trust_region=1e6)
    model = trained()
    plan = uf.unlearn(model, forget=forget_batches(), **data, config=config, holdout=50.0).plan
    assert mean_nll(model, forget_batches(), "forget") > math.log(40)
    assert "blind guessing" not in plan.note


def test_the_report_says_what_the_search_was_held_against():
    data = {"forget": forget_batches(), "retain": retain_batches(), "evaluate": False}
    held = {"config": AUTO, "holdout": 2.5, "calibration": lambda model: 1.0}
    report = uf.unlearn(trained(), **data, **held).report
    assert report.request["never_seen_nats"] == 2.5
    assert report.request["budget_measured_on"] == "calibration function"
    assert "measured on calibration function. Never-seen data cost 2.5 nats per token." in (
        report.to_markdown()
    )
    held = {"config": AUTO, "calibration": retain_batches()}
    report = uf.unlearn(trained(), **data, **held).report
    assert report.request["never_seen_nats"] is None
    assert report.request["budget_measured_on"] == "calibration batches"
    # A bank alone: nothing to measure a budget on, so nothing was searched in one.
    bank = uf.collect(trained(), [*forget_batches(), *retain_batches()])
    report = uf.unlearn(trained(), forget=forget_batches(), bank=bank, evaluate=False).report
    assert report.request["budget_measured_on"] is None
    for config, source in ((AUTO, "a sample of the retain data"), (FIXED, None)):
        report = uf.unlearn(trained(), **data, config=config).report
        assert report.request["budget_measured_on"] == source
        assert ("retain budget is measured on" in report.to_markdown()) == (source is not None)


def test_a_bank_of_another_rank_is_refused():
    model, data = trained(), [*forget_batches(), *retain_batches()]
    bank = uf.collect_factors(model, data, variant="eigenbasis", rank=2)
    config = FIXED.replace(influence_variant="eigenbasis", influence_rank=4)
    options = {"forget": forget_batches(), "bank": bank, "evaluate": False}
    with pytest.raises(uf.UcanError, match=r"hold 2 eigenpairs each.*_rank=4; set it to 2"):
        uf.unlearn(model, **options, config=config)
    assert not uf.unlearn(model, **options, config=config.replace(influence_rank=2)).plan.is_noop
    # More than there are: all of them.
    whole = uf.collect_factors(trained(), data, variant="eigenbasis", rank=1000)
    options |= {"bank": whole, "config": config.replace(influence_rank=500)}
    assert not uf.unlearn(trained(), **options).plan.is_noop


# Requests in a row.


def requests() -> list[list[dict]]:
    return [forget_batches(seed=seed, count=8, size=4) for seed in (21, 22, 23)]


@pytest.mark.parametrize("source", ["bank", "retain"])
@pytest.mark.parametrize("kind", ["result", "statistics", "saved statistics"])
def test_requests_in_a_row_equal_one_with_the_union(kind, source, tmp_path):
    model, at_once = trained(), trained()
    everything = [*(batch for request in requests() for batch in request), *retain_batches()]
    if source == "bank":
        data = {"bank": uf.collect_factors(model, everything), "calibration": retain_batches()}
    else:
        data = {"retain": retain_batches()}
    options = {**data, "config": FIXED, "evaluate": False}
    result = previous = None
    for request in requests():
        if previous is not None and kind != "result":
            result.plan.undo(model)
        result = uf.unlearn(model, forget=request, previous=previous, **options)
        previous = result if kind == "result" else result.stats
        if kind == "saved statistics":
            previous.save(tmp_path / "stats.safetensors")
            previous = uf.InfluenceFactors.load(tmp_path / "stats.safetensors")
    union = [batch for request in requests() for batch in request]
    expected = uf.unlearn(at_once, forget=union, **options)
    assert result.report.request["includes_previous_requests"]
    for field in ("forget_tokens", "retain_tokens"):
        assert result.report.request[field] == expected.report.request[field]
    assert result.report.fingerprint_before == expected.report.fingerprint_before
    for key, direction in result.plan.directions.items():
        wanted = expected.plan.directions[key]
        assert (direction - wanted).norm() < 1e-4 * wanted.norm(), key
    first = uf.unlearn(trained(), forget=union[:2], **options).plan
    assert not torch.allclose(result.plan.directions[key], first.directions[key], rtol=0.1)
    result.plan.undo(model)
    assert_same_weights(model, weights(trained()))


@pytest.mark.parametrize("first", ["attenuate", "influence"])
def test_requests_of_both_methods_in_a_row_are_refused(first):
    model = trained()
    one, two, _ = requests()
    configs = {"attenuate": uf.UcanConfig(strength=2.0), "influence": FIXED}
    second = next(name for name in configs if name != first)
    data = {"retain": retain_batches(), "evaluate": False}
    previous = uf.unlearn(model, forget=one, config=configs[first], **data)
    before = weights(model)
    with pytest.raises(uf.UcanError, match="earlier request was"):
        uf.unlearn(model, forget=two, config=configs[second], previous=previous, **data)
    assert_same_weights(model, before)
    with pytest.raises(uf.UcanError, match="applied to adapter 'default'"):
        uf.unlearn(model, forget=two, config=configs[second], **data)


def test_a_bank_after_a_request_without_one_is_refused():
    """That request kept no factors of its forget set, which would have to come out of the bank."""
    model = trained()
    one, two, _ = requests()
    bank = uf.collect_factors(model, [*one, *two, *retain_batches()])
    first = uf.unlearn(model, forget=one, retain=retain_batches(), config=FIXED, evaluate=False)
    with pytest.raises(uf.UcanError, match="collected without factors"):
        uf.unlearn(model, forget=two, bank=bank, config=FIXED, previous=first, evaluate=False)


# What a failure leaves.


def fails_at(at: int, original, error=RuntimeError):
    calls = []

    def function(*args, **options):
        calls.append(1)
        if len(calls) == at:
            raise error("broken on purpose")
        return original(*args, **options)

    return function


STAGES = {
    "forget pass": (job, "collect_factors", 1),
    "retain pass": (job, "collect_factors", 2),
    "direction": (influence_job, "make_influence_plan", 1),
    "a solve": (influence, "solver", 9),
    "forget loss before": (influence_job, "group_loss", 1),
    "the guard": (influence_job, "group_loss", 2),
    "retain loss in the search": (calibration, "group_loss", 4),
    "uniform control": (controls, "match_loss", 1),
    "random control": (controls, "match_loss", 2),
    "metrics": (evaluation, "kl_divergence", 3),
    "write": (influence.StepEdit, "write", 5),
    "report": (main, "influence_change", 1),
    "environment": (main, "environment", 1),
}


def state_of(model) -> tuple:
    return (
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [m.__dict__.get("_ucan_applied") for m in model.modules()],
        torch.get_rng_state().tolist(),
    )


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
    model.base_model.model.model.layers[0].eval()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_A" in name)
    before, state = weights(model), state_of(model)
    where, name, at = STAGES[stage]
    error = KeyboardInterrupt if stage == "a solve" else RuntimeError
    monkeypatch.setattr(where, name, fails_at(at, getattr(where, name), error))
    with pytest.raises(error, match="broken on purpose"):
        uf.unlearn(model, forget=forget_batches(), retain=retain, config=AUTO, previous=previous)
    assert_same_weights(model, before)
    assert state_of(model) == state
    monkeypatch.undo()
    if earlier:
        previous.plan.undo(model)
    assert_same_weights(model, weights(trained()))


def test_success_leaves_modes_gradients_and_random_numbers():
    model = trained().train()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_A" in name)
    state = state_of(model)
    result = uf.unlearn(model, forget=forget_batches(), retain=retain_batches(), config=AUTO)
    now = state_of(model)
    assert (*now[:3], now[4]) == (*state[:3], state[4])
    result.plan.undo(model)
    assert state_of(model) == state


def test_the_callers_metrics_are_measured_in_every_state():
    model = trained()
    seen = []

    def measure(m) -> dict:
        seen.append(mean_nll(m, retain_batches(), "retain"))
        return {"mine": seen[-1]}

    report = uf.unlearn(
        model, forget=forget_batches(), retain=retain_batches(), config=AUTO, evaluate=measure
    ).report
    assert [state["mine"] for state in report.metrics.values()] == seen
    for state in report.metrics.values():
        assert state["mine"] == pytest.approx(state["retain/loss"], rel=1e-4)


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
