"""unlearn from start to end: inputs, the four measured states, and what a failure leaves."""

from __future__ import annotations

import copy
import importlib
import math
import warnings

import pytest
import torch
from helpers_models import llama, lora
from trained_model import (
    assert_same_weights,
    forget_batches,
    mean_nll,
    nll,
    retain_batches,
    scored_logits,
    trained,
    weights,
)

import ucan_fast as uf
from ucan_fast import calibration, controls, evaluation, plan, reversible, states
from ucan_fast.evaluation import group_loss

main = importlib.import_module("ucan_fast.unlearn")
FIXED = uf.UcanConfig(strength=2.0)


def lora_weights(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(model).items() if "lora_" in name}


def mixed(forget: list[dict], retain: list[dict]) -> list[dict]:
    """Batches that hold both sets, told apart by token_groups."""
    made = []
    for f, r in zip(forget, retain, strict=True):
        keys = ("input_ids", "attention_mask")
        batch = {key: torch.cat([f[key], r[key]]) for key in keys}
        groups = torch.ones_like(batch["input_ids"])
        groups[: len(f["input_ids"])] = 0
        made.append({**batch, "token_groups": groups})
    return made


@pytest.mark.parametrize("method", ["attenuate", "gates", "influence"])
@pytest.mark.parametrize("strength", ["auto", 1.0])
def test_a_default_device_changes_nothing(method, strength):
    """``torch.set_default_device("cuda")``; meta tensors have no values at all."""
    found = []
    for device in ("cpu", "meta"):
        model, forget, retain = trained(), forget_batches(), retain_batches(count=8)
        with torch.device(device):
            config = uf.UcanConfig(method=method, strength=strength)
            result = uf.unlearn(model, forget=forget, retain=retain, config=config)
        found.append((model, result.report.metrics))
    (first, metrics), (second, others) = found
    assert_same_weights(second, weights(first))
    assert metrics == others


@pytest.mark.parametrize("method", ["attenuate", "gates", "influence"])
def test_a_default_dtype_changes_nothing(method):
    """``torch.set_default_dtype(torch.bfloat16)``, as models are loaded in."""
    config, found = uf.UcanConfig(method=method), []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model, forget, retain = trained(), forget_batches(), retain_batches(count=8)
        torch.set_default_dtype(dtype)
        try:
            result = uf.unlearn(model, forget=forget, retain=retain, config=config)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append((model, result.report.metrics))
    for model, metrics in found[1:]:
        assert_same_weights(model, weights(found[0][0]))
        assert metrics == found[0][1]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("method", ["attenuate", "gates", "influence"])
def test_under_autocast_the_search_sees_its_edits(method, trainable):
    """Autocast keeps narrow copies of trainable weights until its with block ends."""
    model, forget, retain = trained(), forget_batches(), retain_batches(count=8)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and "lora_" in name)
    with torch.autocast("cpu", torch.bfloat16):
        result = uf.unlearn(
            model, forget=forget, retain=retain, config=uf.UcanConfig(method=method)
        )
        now = group_loss(model, retain, "retain").mean
        before = result.report.metrics["before"]["retain/loss"]
        said = next(
            values["retain/loss"]
            for state, values in result.report.metrics.items()
            if state not in ("before", "uniform", "random")
        )
        assert now == pytest.approx(said, rel=1e-6)
        assert abs(now - before) > 0.005 * before
        assert now <= before * 1.05 * 1.001
        result.plan.undo(model)
        assert group_loss(model, retain, "retain").mean == pytest.approx(before, rel=1e-6)


# What it is called with.


def test_retain_bank_and_mixed_batches_give_the_same_adapter():
    forget, retain = forget_batches(), retain_batches(count=16)
    results = {}
    for way in ("retain", "bank", "mixed", "mixed and retain"):
        model = trained()
        if way == "retain":
            options = {"forget": forget, "retain": retain}
        elif way == "bank":
            options = {"forget": forget, "bank": uf.collect(model, [*forget, *retain])}
        elif way == "mixed":
            options = {"forget": mixed(forget, retain)}
        else:
            options = {"forget": mixed(forget[:1], retain[:1]) + forget[1:], "retain": retain[1:]}
        result = uf.unlearn(model, **options, config=FIXED, evaluate=False)
        assert result.stats.tokens("forget") == sum(int(b["attention_mask"].sum()) for b in forget)
        assert result.stats.tokens("retain") == sum(int(b["attention_mask"].sum()) for b in retain)
        results[way] = (result, lora_weights(model))
    first, expected = results["retain"]
    assert first.plan.attenuated > 20
    for way, (result, got) in results.items():
        assert torch.equal(result.plan.flat_factors != 1, first.plan.flat_factors != 1), way
        for name, value in got.items():
            assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-8), (way, name)
    assert first.report.request["retain_from"] == "batches"
    assert results["bank"][0].report.request["retain_from"] == "bank"


def test_mixed_batches_alone_are_calibrated_on_their_retain_tokens():
    model = trained()
    batches = mixed(forget_batches(), retain_batches(count=16))
    before = mean_nll(model, batches, "retain")
    result = uf.unlearn(model, forget=batches, evaluate=False)
    search = result.report.search
    assert search.loss_before == pytest.approx(before, rel=1e-5)
    assert search.loss_after == pytest.approx(mean_nll(model, batches, "retain"), rel=1e-5)
    assert search.loss_after <= before * 1.05 * (1 + 1e-6)


def test_plain_forget_batches_are_never_calibrated_on():
    """Batches without token_groups are D_f, though group_loss would take them for D_r."""
    model = trained()
    one = mixed(forget_batches()[:1], retain_batches(count=8)[:1])
    result = uf.unlearn(model, forget=[*one, *forget_batches()[1:]], evaluate=False)
    assert result.report.search.loss_before == pytest.approx(
        mean_nll(trained(), one, "retain"), rel=1e-5
    )


def test_a_missing_retain_set_is_refused():
    model = trained()
    original = weights(model)
    with pytest.raises(uf.UcanError, match=r"there is no retain set.*retain=.*bank="):
        uf.unlearn(model, forget=forget_batches())
    assert_same_weights(model, original)


def masked(batches: list[dict], how: str) -> list[dict]:
    if how == "no batch":
        return []
    if how == "all padding":
        return [{**b, "attention_mask": torch.zeros_like(b["attention_mask"])} for b in batches]
    if how == "all ignored":
        return [{**b, "token_groups": torch.full_like(b["input_ids"], -1)} for b in batches]
    other = {"forget": 1, "retain": 0}[how.split()[-1]]
    return [{**b, "token_groups": torch.full_like(b["input_ids"], other)} for b in batches]


@pytest.mark.parametrize("how", ["no batch", "all padding", "all ignored", "none of forget"])
@pytest.mark.parametrize("source", ["retain", "bank"])
def test_an_empty_forget_set_is_refused(how, source):
    model = trained()
    original = weights(model)
    data = retain_batches()
    other = {"retain": data} if source == "retain" else {"bank": uf.collect(model, data)}
    with pytest.raises(uf.UcanError, match=r"no forget batch|no token|forget set is empty"):
        uf.unlearn(model, forget=masked(forget_batches(), how), **other)
    assert_same_weights(model, original)


@pytest.mark.parametrize("how", ["no batch", "all padding", "all ignored", "none of retain"])
def test_an_empty_retain_set_is_refused(how):
    model = trained()
    original = weights(model)
    with pytest.raises(uf.UcanError, match=r"no retain batch|no token|retain set is empty"):
        uf.unlearn(model, forget=forget_batches(), retain=masked(retain_batches(), how))
    assert_same_weights(model, original)


def test_a_bank_of_the_forget_set_alone_leaves_no_retain_set():
    model = trained()
    bank = uf.collect(model, forget_batches())
    with pytest.raises(uf.UcanError, match="retain set is empty"):
        uf.unlearn(model, forget=forget_batches(), bank=bank)


@pytest.mark.parametrize("how", ["no batch", "all padding"])
def test_empty_calibration_data_is_refused(how):
    model = trained()
    original = weights(model)
    with pytest.raises(uf.UcanError, match="calibration"):
        uf.unlearn(
            model,
            forget=forget_batches(),
            retain=retain_batches(),
            calibration=masked(retain_batches(), how),
        )
    assert_same_weights(model, original)


def test_nan_activations_are_named():
    model = trained()
    with torch.no_grad():
        model.base_model.model.model.layers[1].input_layernorm.weight[3] = math.nan
    original = weights(model)
    with pytest.raises(uf.UcanError, match=r"NaN.*layers\.1\.self_attn\.q_proj") as refusal:
        uf.unlearn(model, forget=forget_batches(), retain=retain_batches())
    assert "layers.0" not in str(refusal.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value.isnan(), original[name].isnan())


@pytest.mark.parametrize("which", ["forget", "retain", "calibration"])
def test_one_batch_instead_of_batches_is_refused(which):
    data = {"forget": forget_batches(), "retain": retain_batches(), "calibration": retain_batches()}
    data[which] = data[which][0]
    with pytest.raises(uf.UcanError, match=f"{which} must be an iterable of batches"):
        uf.unlearn(trained(), **data)


def test_one_shot_iterators_warn_and_work():
    model, again = trained(), trained()
    with pytest.warns(uf.UcanWarning, match="one-shot") as caught:
        result = uf.unlearn(
            model,
            forget=iter(forget_batches()),
            retain=(b for b in retain_batches()),
            calibration=iter(retain_batches(count=8)),
        )
    assert sorted(str(w.message).split()[0] for w in caught) == ["calibration", "forget", "retain"]
    assert {w.filename for w in caught} == {__file__}, "shown at the caller's line, however deep"
    expected = uf.unlearn(
        again,
        forget=forget_batches(),
        retain=retain_batches(),
        calibration=retain_batches(count=8),
    )
    assert_same_weights(model, weights(again))
    assert result.report.metrics == expected.report.metrics


def test_iterables_that_are_no_lists_are_read_without_notice():
    class Loader:
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            return iter(self.batches)

    with warnings.catch_warnings():
        warnings.simplefilter("error", uf.UcanWarning)
        result = uf.unlearn(
            trained(), forget=Loader(forget_batches()), retain=Loader(retain_batches())
        )
    assert result.report.metrics["U-CAN"]["forget/kl"] > 0
    assert result.report.request["forget_sequences"] == 16


# What it measures.


def test_every_state_is_measured_with_its_own_weights():
    model = trained()
    origin = lora_weights(model)
    forget, retain = forget_batches(), retain_batches(count=16)
    states = []

    def measure(given) -> dict[str, float]:
        assert given is model
        assert not torch.is_grad_enabled()
        logits = [scored_logits(given, batch, "forget") for batch in forget]
        states.append(
            {
                "weights": lora_weights(given),
                "logits": torch.cat([x for x, _ in logits]),
                "nll": sum(nll(*pair) for pair in logits),
                "retain": mean_nll(given, retain, "retain"),
            }
        )
        return {"own/number": float(len(states)), "forget/recall@10": 0.5}

    result = uf.unlearn(model, forget=forget, retain=retain, evaluate=measure)
    metrics = result.report.metrics
    assert list(metrics) == ["before", "U-CAN", "uniform", "random"]
    assert [m["own/number"] for m in metrics.values()] == [1, 2, 3, 4]
    assert all(m["forget/recall@10"] == 0.5 for m in metrics.values())

    before, ucan, uniform, random = (state["weights"] for state in states)
    after = lora_weights(model)
    for name, value in origin.items():
        assert torch.equal(before[name], value), name
        assert torch.equal(ucan[name], after[name]), name
    assert any(not torch.equal(ucan[name], origin[name]) for name in origin)
    # uniform: one constant on every B.
    ratios = torch.cat([(uniform[n] / origin[n]).flatten() for n in origin if "lora_B" in n])
    assert 0 < ratios.mean() < 1
    assert ratios.max() - ratios.min() < 1e-5
    assert all(torch.equal(uniform[n], origin[n]) for n in origin if "lora_A" in n)
    # random: other columns of A than the plan's.
    assert all(torch.equal(random[n], origin[n]) for n in origin if "lora_B" in n)
    changed = {
        state: torch.cat([(w[n] != origin[n]).any(0) for n in origin if "lora_A" in n])
        for state, w in (("U-CAN", ucan), ("random", random))
    }
    assert 0 < int(changed["random"].sum()) < changed["random"].numel()
    assert not torch.equal(changed["random"], changed["U-CAN"])

    for state, measured in zip(metrics.values(), states, strict=True):
        p, q = (s["logits"].log_softmax(-1) for s in (states[0], measured))
        tokens = len(p)
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert state["forget/kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)
        shift = 100 * float((p.argmax(-1) != q.argmax(-1)).double().mean())
        assert state["forget/prediction_shift"] == pytest.approx(shift)
        perplexity = math.exp(measured["nll"] / tokens)
        assert state["forget/perplexity"] == pytest.approx(perplexity, rel=1e-5)
        assert state["retain/loss"] == pytest.approx(measured["retain"], rel=1e-5)
        assert state["retain/perplexity"] == pytest.approx(math.exp(measured["retain"]), rel=1e-5)
    assert metrics["U-CAN"]["forget/perplexity"] > metrics["before"]["forget/perplexity"]
    assert metrics["before"]["forget/kl"] == metrics["before"]["forget/prediction_shift"] == 0


@pytest.mark.parametrize("kind", [torch.tensor, lambda v: torch.tensor(v).numpy()])
def test_metrics_of_the_caller_may_be_tensors_and_numpy_numbers(kind):
    result = uf.unlearn(
        trained(),
        forget=forget_batches(),
        retain=retain_batches(),
        config=FIXED,
        evaluate=lambda model: {"mine": kind(0.25)},
    )
    assert '"mine": 0.25' in result.report.to_json()
    assert "| mine | 0.25 |" in result.report.to_markdown()


def test_metrics_that_are_no_numbers_are_refused():
    model = trained()
    original = weights(model)
    with pytest.raises(uf.UcanError, match="'mine'"):
        uf.unlearn(
            model,
            forget=forget_batches(),
            retain=retain_batches(),
            config=FIXED,
            evaluate=lambda model: {"mine": "high"},
        )
    assert_same_weights(model, original)


def test_evaluate_false_skips_metrics_and_controls(monkeypatch):
    def never(*_args, **_options):
        raise AssertionError("not to be called")

    for name in ("forget_shift", "uniform_control", "random_control"):
        monkeypatch.setattr(states, name, never)
    result = uf.unlearn(trained(), forget=forget_batches(), retain=retain_batches(), evaluate=False)
    assert result.report.metrics == {}
    assert result.report.search is not None
    assert "Not measured" in result.report.to_markdown()


def test_a_report_without_advice_says_why(monkeypatch):
    """A tower that the plan has no neurons in may have seen nothing of a set."""

    def refuse(*_):
        raise uf.UcanError("the forget set is empty: q_proj saw none of its tokens.")

    monkeypatch.setattr(main, "guide", refuse)
    result = uf.unlearn(trained(), forget=forget_batches(), retain=retain_batches(), evaluate=False)
    report = result.report
    assert report.guidance is None
    assert report.notes["advice"].startswith("none: the forget set is empty: q_proj")
    assert "- advice: none" in report.to_markdown()


def test_without_a_scored_forget_position_the_report_says_why():
    forget = [{**b, "labels": torch.full_like(b["input_ids"], -100)} for b in forget_batches()]
    result = uf.unlearn(trained(), forget=forget, retain=retain_batches())
    report = result.report
    for state in report.metrics.values():
        assert state["forget/kl"] is None
        assert state["forget/prediction_shift"] is None
        assert state["forget/perplexity"] is None
        assert state["retain/loss"] > 0
    assert "no forget position is scored" in report.notes["forget"]
    assert "n/a" in report.to_markdown()


def test_a_retain_set_without_a_scored_position_is_refused():
    retain = [{**b, "labels": torch.full_like(b["input_ids"], -100)} for b in retain_batches()]
    model = trained()
    original = weights(model)
    with pytest.raises(uf.UcanError, match="no retain token of the calibration data is scored"):
        uf.unlearn(model, forget=forget_batches(), retain=retain)
    assert_same_weights(model, original)
    # With a given strength nothing needs the budget: the report says what it could not measure.
    report = uf.unlearn(model, forget=forget_batches(), retain=retain, config=FIXED).report
    assert "no retain token of the calibration data is scored" in report.notes["retain"]
    assert "retain/loss" not in report.metrics["U-CAN"]


@pytest.mark.parametrize(
    ("measured", "match"),
    [({"forget/kl": 1.0}, "'forget/kl', which is a metric of the report"), (None, "NoneType")],
)
def test_metrics_of_the_caller_that_cannot_be_reported_are_refused(measured, match):
    model = trained()
    original = weights(model)
    with pytest.raises(uf.UcanError, match=match):
        uf.unlearn(
            model, forget=forget_batches(), retain=retain_batches(), evaluate=lambda _: measured
        )
    assert_same_weights(model, original)


def test_one_batch_is_refused_by_name_also_where_it_is_read_once():
    options = {"config": FIXED, "evaluate": False, "retain": retain_batches()}
    with pytest.raises(uf.UcanError, match="forget must be an iterable of batches, not one dict"):
        uf.unlearn(trained(), forget=forget_batches()[0], **options)


def test_an_iterator_that_is_read_once_is_not_kept():
    model = trained()
    bank = uf.collect(model, [*forget_batches(), *retain_batches(count=8)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", uf.UcanWarning)
        uf.unlearn(model, forget=iter(forget_batches()), bank=bank, config=FIXED, evaluate=False)


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}], ids=str)
def test_trained_parts_that_stay_are_named(options):
    model = lora(llama(), init_lora_weights=False, **options)
    config = uf.UcanConfig(strength=1.0, min_score=0.0)
    word = "lora_bias" if "lora_bias" in options else "DoRA magnitudes"
    with pytest.warns(uf.UcanWarning, match=f"also trained {word}"):
        uf.unlearn(
            model,
            forget=forget_batches(),
            retain=retain_batches(),
            config=config,
            evaluate=False,
        )


def test_with_a_bank_alone_there_are_no_controls_and_the_report_says_so():
    model = trained()
    bank = uf.collect(model, [*forget_batches(), *retain_batches()])
    result = uf.unlearn(model, forget=forget_batches(), bank=bank)
    assert list(result.report.metrics) == ["before", "U-CAN"]
    assert "retain/loss" not in result.report.metrics["U-CAN"]
    assert "calibration" in result.report.notes["controls"]
    assert "calibration" in result.report.notes["retain"]


# What it says.


def test_indistinguishable_sets_select_nothing_and_it_is_said():
    model = trained()
    original = weights(model)
    with pytest.warns(uf.UcanWarning, match="changes nothing.*indistinguishable"):
        result = uf.unlearn(model, forget=forget_batches(), retain=forget_batches())
    assert_same_weights(model, original)
    assert result.plan.attenuated == 0
    assert result.report.change["attenuated"] == 0
    assert "indistinguishable" in result.report.to_markdown()
    assert "indistinguishable" in result.report.notes["controls"]
    assert result.report.search is None
    before, after = result.report.metrics["before"], result.report.metrics["U-CAN"]
    assert before == after
    assert result.report.fingerprint_before == result.report.fingerprint_after


def test_overkill_warns():
    with pytest.warns(uf.UcanWarning, match="more than half"):
        uf.unlearn(
            trained(),
            forget=forget_batches(),
            retain=retain_batches(),
            config=uf.UcanConfig(strength=1.0, fraction=0.9, min_score=0.0, contrast="none"),
            evaluate=False,
        )


def test_an_ordinary_request_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", uf.UcanWarning)
        uf.unlearn(trained(), forget=forget_batches(), retain=retain_batches(), evaluate=False)


def test_progress_is_told_about_every_step():
    seen = []
    forget, retain = forget_batches(), retain_batches()
    uf.unlearn(trained(), forget=forget, retain=retain, progress=lambda *args: seen.append(args))
    steps = {}
    for done, total, text in seen:
        steps.setdefault(text, []).append((done, total))
    n, m = len(forget), len(retain)
    assert steps["collect"] == [(i, n) for i in range(n + 1)] + [(i, m) for i in range(m + 1)]
    assert steps["forget metrics"] == [(i, None) for i in range(n + 1)]


@pytest.mark.parametrize("where", ["progress", "batches", "a hook"])
def test_a_weight_changed_on_the_way_is_noticed(where):
    """By a write of one bit to .data, which moves no version counter, after it was hashed."""
    model = trained()
    name, weight = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    expected = lora_weights(model)
    value = torch.nextafter(weight.data[-1, -1], torch.tensor(9.0))
    expected[name] = expected[name].clone()
    expected[name][-1, -1] = value

    def change(*_) -> None:
        weight.data[-1, -1] = value

    def changing_batches():
        yield from forget_batches()
        change()

    options = {"forget": forget_batches()}
    bank = uf.collect(model, [*forget_batches(), *retain_batches()])
    if where == "progress":
        options["progress"] = change
    elif where == "batches":
        options["forget"] = changing_batches()
    else:
        model.get_base_model().register_forward_hook(change)
    with pytest.raises(uf.UcanError, match="this plan was made for an adapter with fingerprint"):
        uf.unlearn(model, bank=bank, config=FIXED, evaluate=False, **options)
    assert all(torch.equal(got, expected[name]) for name, got in lora_weights(model).items())


def test_twice_gives_the_same():
    results, models = [], []
    for _ in range(2):
        torch.manual_seed(len(models))
        models.append(trained())
        results.append(uf.unlearn(models[-1], forget=forget_batches(), retain=retain_batches()))
    assert_same_weights(models[0], weights(models[1]))
    first, second = (r.report for r in results)
    assert first.metrics == second.metrics
    assert first.search == second.search
    assert first.fingerprint_after == second.fingerprint_after
    assert torch.equal(results[0].plan.flat_factors, results[1].plan.flat_factors)


def test_accelerated_models_give_the_same_request():
    plain, fast = trained(), trained()
    uf.accelerate(fast)
    expected = uf.unlearn(plain, forget=forget_batches(), retain=retain_batches(), config=FIXED)
    result = uf.unlearn(fast, forget=forget_batches(), retain=retain_batches(), config=FIXED)
    assert torch.equal(result.plan.flat_factors != 1, expected.plan.flat_factors != 1)
    for state, values in expected.report.metrics.items():
        assert result.report.metrics[state] == pytest.approx(values, rel=1e-3, abs=1e-5)


def test_only_the_named_adapter_changes():
    model = trained()
    # A second adapter beside the first, both active.
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.base_model.set_adapter(["default", "other"])
    original = weights(model)
    with pytest.raises(uf.UcanError, match="2 adapters are active"):
        uf.unlearn(model, forget=forget_batches(), retain=retain_batches())
    result = uf.unlearn(
        model, forget=forget_batches(), retain=retain_batches(), adapter="other", config=FIXED
    )
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, original[n])}
    assert changed
    assert all(".other." in name for name in changed)
    assert result.report.request["adapter"] == "other"


def test_an_adapter_with_other_trained_parts_is_told_of_them():
    model = lora(llama(), modules_to_save=["lm_head"])
    with pytest.warns(uf.UcanWarning, match="modules_to_save"):
        result = uf.unlearn(
            model,
            forget=forget_batches(),
            retain=retain_batches(),
            config=FIXED.replace(min_score=0.0),
            evaluate=False,
        )
    assert "modules_to_save" in result.report.notes["untouched"]
    assert "modules_to_save" in result.report.to_markdown()


# What a failure leaves.


class Broken(list):
    """Batches that fail on the way, from the given run over them on."""

    def __init__(self, batches, run=1):
        super().__init__(batches)
        self.run = run

    def __iter__(self):
        self.run -= 1
        for index, batch in enumerate(list.__iter__(self)):
            if self.run <= 0 and index:
                raise RuntimeError("broken on purpose")
            yield batch


def fails_at(at: int, original=lambda *_args: 1.0, error=RuntimeError):
    """The function, failing at its nth call."""
    calls = []

    def function(*args, **options):
        calls.append(1)
        if len(calls) == at:
            raise error("broken on purpose")
        return original(*args, **options)

    return function


# Each takes patch(module, name, at), which makes a function fail at its nth call, and returns
# arguments of unlearn.
STAGES = {
    "forget batches": lambda patch: {"forget": Broken(forget_batches())},
    "retain batches": lambda patch: {"retain": Broken(retain_batches())},
    "forget batches, second run": lambda patch: {"forget": Broken(forget_batches(), run=2)},
    "retain batches, second run": lambda patch: {"retain": Broken(retain_batches(), run=2)},
    "score": lambda patch: patch(main, "score_plan", 1),
    "loss function before": lambda patch: {"calibration": fails_at(1)},
    "loss function in the search": lambda patch: {"calibration": fails_at(3)},
    "interrupted": lambda patch: {"calibration": fails_at(3, error=KeyboardInterrupt)},
    "loss in the search": lambda patch: patch(calibration, "group_loss", 4),
    "uniform control": lambda patch: patch(controls, "match_loss", 1),
    "random control": lambda patch: patch(controls, "match_loss", 2),
    "forget metrics": lambda patch: patch(evaluation, "kl_divergence", 3),
    "evaluate before": lambda patch: {"evaluate": fails_at(1, lambda model: {"x": 1.0})},
    "evaluate U-CAN": lambda patch: {"evaluate": fails_at(2, lambda model: {"x": 1.0})},
    "evaluate random": lambda patch: {"evaluate": fails_at(4, lambda model: {"x": 1.0})},
    "apply": lambda patch: patch(plan.AttenuationPlan, "apply", 1),
    "apply, weights written": lambda patch: patch(reversible, "mark_applied", 1),
    "report": lambda patch: patch(main, "environment", 1),
}


def state_of(model) -> tuple:
    marks = [m.__dict__.get("_ucan_applied") for m in model.modules()]
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [len(m._forward_hooks) for m in model.modules()],
        marks,
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("earlier", [False, True], ids=["first request", "second request"])
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_failure_leaves_everything_as_it_was(stage, earlier, monkeypatch):
    model = trained()
    origin = weights(model)
    previous = None
    if earlier:
        previous = uf.unlearn(
            model,
            forget=forget_batches(seed=31, count=8),
            retain=retain_batches(count=8),
            config=FIXED,
            evaluate=False,
        )
        left = previous.plan.applied_fingerprint, dict(previous.plan.originals)
    model.train()
    model.base_model.model.model.layers[0].eval()
    before, state = weights(model), state_of(model)
    data = {"forget": forget_batches(count=16), "retain": retain_batches(count=16)}

    def patch(where, name, at):
        monkeypatch.setattr(where, name, fails_at(at, getattr(where, name)))
        return {}

    data.update(STAGES[stage](patch))
    with pytest.raises((RuntimeError, KeyboardInterrupt), match="broken on purpose"):
        uf.unlearn(model, **data, previous=previous)
    assert_same_weights(model, before)
    assert state_of(model) == state
    monkeypatch.undo()
    if not earlier:
        uf.collect(model, retain_batches(count=8))  # it is an origin still
        return
    assert previous.plan.applied_fingerprint == left[0]
    assert all(torch.equal(previous.plan.originals[k], v) for k, v in left[1].items())
    with pytest.raises(uf.UcanError, match="a plan is applied"):
        uf.collect(model, retain_batches(count=8))
    previous.plan.undo(model)
    assert_same_weights(model, origin)


def test_success_leaves_modes_gradients_and_random_numbers():
    model = trained()
    model.train()
    model.base_model.model.model.layers[0].eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    state = state_of(model)
    result = uf.unlearn(model, forget=forget_batches(), retain=retain_batches())
    now = state_of(model)
    assert (now[:3], now[4]) == (state[:3], state[4])
    origin = trained().state_dict()
    result.plan.undo(model)
    assert_same_weights(model, dict(origin))


def test_the_report_counts_per_layer_what_the_plan_holds():
    model = trained()
    options = {"retain": retain_batches(count=16), "config": FIXED, "evaluate": False}
    result = uf.unlearn(model, forget=forget_batches(), **options)
    change = result.report.change
    assert list(change["layers"]) == list(result.plan.factors)
    for name, factors in result.plan.factors.items():
        values = [float(f) for f in factors]
        assert change["layers"][name] == {
            "neurons": len(values),
            "attenuated": sum(v != 1 for v in values),
            "mean_factor": pytest.approx(sum(values) / len(values), rel=1e-12),
            "min_factor": min(values),
        }
    assert change["attenuated"] == sum(v["attenuated"] for v in change["layers"].values()) > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"config": "best"},
            r"config must be a UcanConfig, not 'best': .*preset\(name",
        ),
        ({"config": {"method": "gates"}}, r"config must be a UcanConfig, not \{'method'"),
        ({"bank": "bank.safetensors"}, r"bank must be what collect .* 'bank.safetensors'.*load"),
        ({"previous": "out"}, r"previous must be the result of an earlier unlearn .*, not 'out'"),
    ],
)
def test_arguments_of_another_kind_are_named(options, match):
    model = trained()
    before = weights(model)
    with pytest.raises(uf.UcanError, match=match):
        uf.unlearn(model, forget=forget_batches(), retain=retain_batches(), **options)
    assert_same_weights(model, before)


def test_configurations_of_another_kind_are_named_by_every_plan():
    for make in (uf.make_plan, uf.make_influence_plan, uf.make_gates_plan):
        sums = (None,) if make is uf.make_plan else (None, None)
        with pytest.raises(uf.UcanError, match="config must be a UcanConfig, not 'best'"):
            make(trained(), *sums, "best")
