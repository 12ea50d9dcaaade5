"""audit: passes on what unlearn wrote, fails on anything else, and leaves the model alone."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import warnings

import peft
import pytest
import torch
from helpers_models import gpt2, llama, lora
from safetensors.torch import load_file, save_file
from trained_model import (
    MEMBERS,
    assert_same_weights,
    forget_batches,
    mean_nll,
    memorised,
    not_memorised,
    random_batches,
    retain_batches,
    scored_logits,
    trained,
    weights,
)

import ucan_fast as uf
from ucan_fast import recovery
from ucan_fast.audit import Audit, audit
from ucan_fast.evaluation import group_loss
from ucan_fast.membership import ATTACKS, membership_auc, privleak
from ucan_fast.recovery import PRECISIONS, relearn, rounded_losses
from ucan_fast.report import REPORT

WEIGHTS = "adapter_model.safetensors"
PLAN = "ucan_plan.safetensors"


def tensors_of(path) -> dict[str, torch.Tensor]:
    # Copies: what load_file returns is the file itself, and tests write over it.
    return {name: value.clone() for name, value in load_file(path).items()}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Two requests of the same origin, and the origin itself."""
    folder = tmp_path_factory.mktemp("outputs")
    trained().save_pretrained(folder / "original")
    for name, strength in (("one", 2.0), ("two", 5.0)):
        model = trained()
        result = uf.unlearn(
            model,
            forget=forget_batches(),
            retain=retain_batches(count=16),
            config=uf.UcanConfig(strength=strength),
        )
        model.save_pretrained(folder / name)
        result.plan.save(folder / name / PLAN)
        result.report.save(folder / name)
    return folder


@pytest.fixture
def output(outputs, tmp_path):
    """A copy of the first, to be tampered with."""
    return shutil.copytree(outputs / "one", tmp_path / "one")


def run(folder, **options):
    if "plan" not in options and (folder / PLAN).exists():
        options["plan"] = folder / PLAN
    return audit(
        trained(), folder, forget=forget_batches(), retain=retain_batches(count=16), **options
    )


def failed(findings) -> list[str]:
    return [name for name, (passed, _) in findings.checks.items() if not passed]


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_genuine_output_passes(outputs, accelerated):
    model = trained()
    if accelerated:
        uf.accelerate(model)
    original = weights(model)
    findings = audit(
        model,
        outputs / "one",
        forget=forget_batches(),
        retain=retain_batches(count=16),
        plan=outputs / "one" / PLAN,
    )
    assert findings.passed
    assert list(findings.checks) == ["adapters differ", "plan", "report"]
    report = json.loads((outputs / "one" / REPORT).read_text())
    assert findings.fingerprints == {
        "original": report["fingerprint_before"],
        "unlearned": report["fingerprint_after"],
    }
    assert_same_weights(model, original)
    text = str(findings)
    assert text.count("pass  ") == 3
    assert "FAIL" not in text
    assert "not a formal guarantee" in text


def test_it_measures_what_the_request_measured(outputs):
    findings = run(outputs / "one")
    report = json.loads((outputs / "one" / REPORT).read_text())
    for mine, theirs in (("original", "before"), ("unlearned", "U-CAN")):
        for name, value in findings.metrics[mine].items():
            assert value == pytest.approx(report["metrics"][theirs][name], rel=1e-4), name
    # And by hand, from the original and the unlearned adapter.
    origin, edited = trained(), trained()
    tensors = tensors_of(outputs / "one" / WEIGHTS)
    state = edited.state_dict()
    for name, value in tensors.items():
        state[name.replace(".weight", ".default.weight")].copy_(value)
    p, q = (
        torch.cat([scored_logits(m, b, "forget")[0] for b in forget_batches()]).log_softmax(-1)
        for m in (origin, edited)
    )
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert findings.metrics["unlearned"]["forget/kl"] == pytest.approx(kl, rel=1e-3)
    for name, model in (("original", origin), ("unlearned", edited)):
        assert findings.metrics[name]["retain/loss"] == pytest.approx(
            mean_nll(model, retain_batches(count=16), "retain"), rel=1e-5
        )
        assert findings.metrics[name]["forget/perplexity"] == pytest.approx(
            math.exp(mean_nll(model, forget_batches(), "forget")), rel=1e-5
        )


@pytest.mark.parametrize("number", [0, 7, -1])
def test_a_tampered_adapter_fails(output, number):
    tensors = tensors_of(output / WEIGHTS)
    name = sorted(tensors)[number]
    value = tensors[name].view(-1)[3]
    tensors[name].view(-1)[3] = torch.nextafter(value, value + 1)  # the last bit
    save_file(tensors, output / WEIGHTS, {"format": "pt"})
    findings = run(output)
    assert failed(findings) == ["plan", "report"]
    assert not findings.passed
    assert "FAIL  plan" in str(findings)


def test_a_changed_scaling_fails(output):
    config = json.loads((output / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (output / "adapter_config.json").write_text(json.dumps(config))
    assert failed(run(output)) == ["plan", "report"]


@pytest.mark.parametrize("key", ["fingerprint_before", "fingerprint_after"])
def test_a_tampered_report_fails(output, key):
    report = json.loads((output / REPORT).read_text())
    report[key] = report[key][:-1] + ("0" if report[key][-1] != "0" else "1")
    (output / REPORT).write_text(json.dumps(report))
    assert failed(run(output)) == ["report"]


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "{oops", b"\xff\xfe"])
def test_a_report_that_cannot_be_read_fails(output, content):
    (output / REPORT).write_bytes(content if isinstance(content, bytes) else content.encode())
    findings = run(output)
    assert failed(findings) == ["report"]
    assert REPORT in findings.checks["report"][1]


def test_an_unrelated_plan_fails(outputs, output):
    shutil.copy(outputs / "two" / PLAN, output / PLAN)
    findings = run(output)
    assert failed(findings) == ["plan"]
    assert "another adapter" in findings.checks["plan"][1]


def test_a_plan_of_another_origin_fails(output):
    other = trained()
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "lora_B" in n).mul_(1.01)
    result = uf.unlearn(
        other,
        forget=forget_batches(),
        retain=retain_batches(),
        config=uf.UcanConfig(strength=2.0),
        evaluate=False,
    )
    result.plan.save(output / PLAN)
    findings = run(output)
    assert failed(findings) == ["plan"]
    assert "was made for an adapter" in findings.checks["plan"][1]


def test_a_tampered_plan_fails(output):
    plan = uf.AttenuationPlan.load(output / PLAN)
    index = int((plan.flat_factors == 1).nonzero()[0])
    plan.flat_factors[index] = 0.5
    plan.save(output / PLAN)
    assert failed(run(output)) == ["plan"]


def test_an_unlearned_adapter_that_is_the_original_fails(outputs):
    findings = run(outputs / "original")
    assert failed(findings) == ["adapters differ"]
    assert "IS the original" in str(findings)


def test_without_plan_and_report_only_the_difference_is_checked(output):
    (output / PLAN).unlink()
    (output / REPORT).unlink()
    findings = run(output)
    assert list(findings.checks) == ["adapters differ"]
    assert findings.passed


def test_without_a_retain_set_and_without_a_scored_position(outputs):
    ignored = [{**b, "labels": torch.full_like(b["input_ids"], -100)} for b in forget_batches()]
    findings = audit(trained(), outputs / "one", forget=ignored)
    for values in findings.metrics.values():
        assert "retain/loss" not in values
        assert values["forget/perplexity"] is None
    assert findings.metrics["unlearned"]["forget/kl"] is None
    assert "n/a" in str(findings)
    json.loads(findings.to_json())


def test_json_is_strict(outputs, monkeypatch):
    from ucan_fast import evaluation

    def infinite(logits, labels):
        return torch.full(labels.shape, 1e4)

    monkeypatch.setattr(evaluation, "token_nll", infinite)
    findings = run(outputs / "one")
    assert findings.metrics["unlearned"]["forget/perplexity"] == math.inf

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    values = json.loads(findings.to_json(), parse_constant=refuse)
    assert values["passed"] is True
    assert values["metrics"]["unlearned"]["forget/perplexity"] == "inf"
    assert "not a formal guarantee" in values["disclaimer"]
    assert values["checks"]["plan"][0] is True


def state_of(model) -> tuple:
    return (
        [(n, m.training) for n, m in model.named_modules()],
        [(n, p.requires_grad) for n, p in model.named_parameters()],
        list(model.peft_config),
        model.active_adapters,
    )


def broken(outputs, tmp_path, how):
    folder = shutil.copytree(outputs / "one", tmp_path / "broken")
    if how == "truncated":
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    elif how == "rank":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    elif how == "modules":
        config = json.loads((folder / "adapter_config.json").read_text())
        config["target_modules"] = ["nowhere"]
        (folder / "adapter_config.json").write_text(json.dumps(config))
    elif how == "no weights":
        (folder / WEIGHTS).unlink()
    elif how == "a layer too many":
        tensors = load_file(folder / WEIGHTS)
        name = sorted(tensors)[0]
        tensors[name.replace("layers.0", "layers.9")] = tensors[name].clone()
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    elif how == "a layer is missing":
        tensors = tensors_of(folder / WEIGHTS)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    else:
        shutil.rmtree(folder)
    return folder


@pytest.mark.parametrize(
    "how",
    [
        *("truncated", "rank", "modules", "no weights", "a layer is missing", "a layer too many"),
        "no folder",
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_named(outputs, tmp_path, how):
    folder = broken(outputs, tmp_path, how)
    model = trained().train()
    before, state = weights(model), state_of(model)
    with pytest.raises(uf.UcanError, match="broken"):
        audit(model, folder, forget=forget_batches())
    assert_same_weights(model, before)
    assert state_of(model) == state


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_the_same_afterwards(outputs, fails, training):
    model = trained().train(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    before, state = weights(model), state_of(model)

    def forget():
        yield forget_batches()[0]
        if fails:
            raise RuntimeError("broken on purpose")

    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            audit(model, outputs / "one", forget=forget(), plan=outputs / "one" / PLAN)
    else:
        audit(model, outputs / "one", forget=forget(), plan=outputs / "one" / PLAN)
    assert_same_weights(model, before)
    assert state_of(model) == state
    uf.collect(model, forget_batches())  # no mark of the plan is left


# Adapters that have to do with the base weights


# The base, and the adapter's settings.
BESIDE = {
    "pissa": (llama, {"init_lora_weights": "pissa"}),
    "olora": (llama, {"init_lora_weights": "olora"}),
    "replicated layers": (llama, {"layer_replication": [[0, 2], [1, 2]]}),
    "all biases": (gpt2, {"bias": "all"}),
    "biases of its layers": (gpt2, {"bias": "lora_only"}),
}


def written_adapter(folder, make, *, factor=1.0, **settings):
    model = lora(make(), **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.add_(0.1 * factor)
    model.save_pretrained(folder)
    return folder


def reloaded(make, folder):
    return peft.PeftModel.from_pretrained(make(), folder).eval()


@pytest.mark.parametrize("kind", list(BESIDE))
def test_the_base_is_the_same_for_both_adapters(tmp_path, kind):
    make, settings = BESIDE[kind]
    folder = written_adapter(tmp_path / "original", make, **settings)
    model = reloaded(make, folder)
    sets = {"forget": forget_batches(), "retain": retain_batches(count=16)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", uf.UcanWarning)  # biases are not attenuated
        result = uf.unlearn(model, **sets, config=uf.UcanConfig(strength=2.0))
    model.save_pretrained(tmp_path / "done")
    result.plan.save(tmp_path / "done" / PLAN)
    result.report.save(tmp_path / "done")
    model = reloaded(make, folder)
    before, state = weights(model), state_of(model)
    findings = audit(model, tmp_path / "done", **sets, plan=tmp_path / "done" / PLAN)
    assert findings.passed, str(findings)
    assert_same_weights(model, before)
    assert state_of(model) == state
    for mine, theirs in (("original", "before"), ("unlearned", "U-CAN")):
        expected = result.report.metrics[theirs]
        for name, value in findings.metrics[mine].items():
            assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-7), (mine, name)


@pytest.mark.parametrize(
    ("make", "ours", "theirs", "message"),
    [
        (llama, {}, {"init_lora_weights": "pissa"}, "its init_lora_weights is pissa, the orig"),
        (llama, {"init_lora_weights": "olora"}, {}, "init_lora_weights is True, the original's o"),
        (
            llama,
            {"init_lora_weights": "pissa"},
            {"init_lora_weights": "pissa", "lora_alpha": 5},
            "its lora_alpha is 5, the original's 9, so the two stand on different base weights",
        ),
        (
            llama,
            {},
            {"layer_replication": [[0, 2], [1, 2]]},
            "its layer_replication is [[0, 2], [1, 2]], the original's None",
        ),
        (gpt2, {"bias": "all"}, {"bias": "all", "factor": 2}, "bias are not those of the original"),
        (gpt2, {}, {"bias": "all"}, "bias are not those of the original"),
    ],
)
def test_an_adapter_on_another_base_is_refused(tmp_path, make, ours, theirs, message):
    folder = written_adapter(tmp_path / "original", make, **ours)
    other = written_adapter(tmp_path / "other", make, **{"seed": 2, **theirs})
    model = reloaded(make, folder)
    before, state = weights(model), state_of(model)
    with pytest.raises(uf.UcanError, match="other beside the original") as refusal:
        audit(model, other, forget=forget_batches())
    assert message in str(refusal.value)
    assert_same_weights(model, before)
    assert state_of(model) == state


def test_the_global_random_numbers_are_not_used_up(outputs):
    model = trained()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    audit(model, outputs / "one", forget=forget_batches(), holdout=forget_batches(seed=77))
    assert torch.equal(torch.rand(3), expected)


# Attacks


def scaled(model, factor: float):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(factor)
    return model


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """An adapter that memorised its members, one that hides it badly, one that never saw them."""
    folder = tmp_path_factory.mktemp("attacked")
    scaled(memorised(), 0.6).save_pretrained(folder / "unlearned")
    not_memorised().save_pretrained(folder / "retrained")
    memorised().save_pretrained(folder / "original")
    sets = {"forget": random_batches(MEMBERS), "holdout": random_batches(42)}
    findings = audit(
        memorised(), folder / "unlearned", retrained=folder / "retrained", relearn_steps=2, seed=5,
        **sets,
    )  # fmt: skip
    return folder, sets, findings


STATES = {
    "original": memorised,
    "unlearned": lambda: scaled(memorised(), 0.6),
    "retrained": lambda: not_memorised(),
}


def test_figures_of_every_adapter_are_those_of_the_library(attacked):
    _, sets, findings = attacked
    forget = sets["forget"]
    assert list(findings.metrics) == list(findings.fingerprints) == list(STATES)
    for state, make in STATES.items():
        found = membership_auc(make(), **sets)
        assert findings.membership[state] == found
        steps = 0 if state == "original" else 2
        expected = relearn(make(), forget, holdout=sets["holdout"], steps=steps, seed=5)
        assert findings.relearning[state] == expected
        perplexity = group_loss(make(), forget, "forget").perplexity
        assert findings.metrics[state]["forget/perplexity"] == pytest.approx(perplexity)
        assert (findings.metrics[state]["forget/kl"] > 0) == (state != "original")
    for name in ATTACKS:
        ours, theirs = (findings.membership[s][name].value for s in ("unlearned", "retrained"))
        assert findings.privleak[name] == privleak(ours, theirs)
    assert findings.privleak["loss"] < -50
    for state in ("original", "unlearned"):
        whole = group_loss(STATES[state](), forget, "forget")
        rounded = {"unrounded": whole, **rounded_losses(STATES[state](), forget)}
        assert findings.rounding[state] == {name: loss.mean for name, loss in rounded.items()}
    # What an attack finds does not decide whether the adapter is what its plan says.
    assert findings.passed
    assert list(findings.checks) == ["adapters differ"]
    assert findings.notes == {"zlib": "no text at hand: token ids are compressed instead"}


def test_every_figure_comes_with_a_sentence(attacked):
    _, _, findings = attacked
    names = [f"membership/{state}/{name}" for state in STATES for name in ATTACKS]
    names += [f"privleak/{name}" for name in ATTACKS]
    names += ["relearning", *(f"rounding/{precision}" for precision in PRECISIONS)]
    assert list(findings.meanings) == names
    meanings = findings.meanings
    area = findings.membership["unlearned"]["loss"]
    assert meanings["membership/unlearned/loss"] == f"{area}: {area.meaning}"
    assert "recognises" in area.meaning
    assert "cannot tell" in meanings["membership/retrained/loss"]
    assert "more exposed than after retraining" in meanings["privleak/loss"]
    assert meanings["relearning"].startswith("2 steps on 3 forget sequences: NLL of the other 29 ")
    text, written = str(findings), json.loads(findings.to_json())
    assert written["meanings"] == meanings
    for name, sentence in meanings.items():
        assert f"{name}: {sentence}" in text.splitlines()
    assert "zlib: no text at hand" in text
    header = next(line for line in text.splitlines() if line.split()[:1] == ["original"])
    assert header.split() == list(STATES)
    assert written["membership"]["original"]["loss"]["value"] > 0.97
    assert set(written["membership"]["original"]["loss"]) == {
        *("value", "low", "high", "members", "nonmembers"),
    }
    assert written["relearning"]["unlearned"]["steps"] == 2
    assert written["rounding"] == findings.rounding
    assert set(findings.rounding) == {"original", "unlearned"}
    assert written["privleak"]["min-k"] == findings.privleak["min-k"]


def findings_of(rounding=None, relearning=None) -> Audit:
    def one(before, after, steps=10):
        return recovery.Relearning(steps, 1e-3, 0, 1, 9, before, after)

    known, ours, theirs = relearning or (1.0, (3.0, 3.0), None)
    states = {"original": one(known, known, 0), "unlearned": one(*ours)}
    if theirs:
        states["retrained"] = one(*theirs)
    return Audit(rounding=rounding or {}, relearning=states)


@pytest.mark.parametrize(
    ("known", "ours", "theirs", "words"),
    [
        (1.0, (3.0, 2.5), None, ["3 -> 2.5", "original 1", "25 % of the rise", "Without a retr"]),
        (1.0, (3.0, 2.5), (3.0, 2.8), ["retrained adapter's: 3 -> 2.8", "was hidden"]),
        (1.0, (3.0, 2.8), (3.0, 2.5), ["retrained adapter's: 3 -> 2.5", "never knew them"]),
        # A hundredth of the NLL decides nothing.
        (1.0, (3.0, 2.5), (3.0, 2.52), ["never knew them"]),
        # Driven far beyond, it falls fast, and is no better known for that.
        (1.0, (20.0, 6.0), (3.0, 2.5), ["74 %", "never knew them"]),
        (1.0, (20.0, 2.0), (3.0, 2.5), ["was hidden"]),
        (1.0, (3.0, 0.9), None, ["all of the rise is back"]),
        (1.0, (3.0, 3.0), None, ["nothing of the rise is back"]),
        # The steps themselves did harm: no verdict, whatever the retrained adapter does.
        (1.0, (3.0, 4.0), None, ["made them dearer"]),
        (1.0, (3.0, 4.0), (3.0, 4.5), ["made them dearer", "did harm"]),
        (1.0, (3.0, 4.0), (3.0, 2.5), ["made them dearer", "did harm"]),
        (1.0, (3.0, 2.5), (3.0, 8.0), ["did harm"]),
        (1.0, (3.0, 3.0), (3.0, 3.0), ["hardly moved"]),
        (1.0, (12.0, 12.1), (3.0, 2.0), ["hardly moved"]),
        (0.0, (0.0, 0.0), None, ["no more than the original"]),
        # Nothing was forgotten: no reassurance.
        (1.0, (1.001, 0.5), None, ["no more than the original, or hardly more"]),
        (1.0, (1.5, 1.2), (3.0, 2.0), ["60 %", "not forgotten them as retraining does"]),
        (math.nan, (3.0, 2.0), None, ["not comparable"]),
        (1.0, (3.0, 2.0), (math.inf, 2.0), ["not comparable"]),
    ],
)
def test_what_relearning_means(known, ours, theirs, words):
    text = findings_of(relearning=(known, ours, theirs)).meanings["relearning"]
    for word in words:
        assert word in text
    for verdict in ("never knew them", "was hidden"):
        assert (verdict in text) == (verdict in words)


def test_what_rounding_means():
    """The original is rounded, too: int4 alone may cost as much as unlearning did."""
    known = {"unrounded": 1.0, "fp16": 1.0, "bf16": 1.2, "int8": 1.5, "int4": 2.7}
    ours = {"unrounded": 3.0, "fp16": 3.0, "bf16": 2.2, "int8": 1.4, "int4": 2.6}
    found = findings_of(rounding={"original": known, "unlearned": ours}).meanings
    assert found["rounding/fp16"].endswith("100 % is left of what lies between them")
    assert found["rounding/bf16"] == (
        "forget NLL 3 -> 2.2 nats, the original's 1 -> 1.2; 50 % is left of what lies between them"
    )
    assert found["rounding/int8"].endswith("rounded, it is not unlearned")
    assert found["rounding/int4"].endswith(
        "rounding costs the original 1.7 nats itself, unlearning 2: nothing tells what is left"
    )
    further = findings_of(rounding={"original": known, "unlearned": {**ours, "fp16": 3.2}})
    assert further.meanings["rounding/fp16"].endswith("more lies between them than before")
    nothing = dict.fromkeys(known, 0.0)
    text = findings_of(rounding={"original": nothing, "unlearned": nothing}).meanings
    assert "nothing that rounding could undo" in text["rounding/int8"]
    same = findings_of(rounding={"original": known, "unlearned": known}).meanings
    assert all(
        "next to nothing that rounding could undo" in same[f"rounding/{p}"] for p in PRECISIONS
    )
    broken = findings_of(rounding={"original": known, "unlearned": {**ours, "int4": math.nan}})
    assert broken.meanings["rounding/int4"].endswith("not comparable")


def test_figures_that_are_missing_say_why(outputs):
    findings = run(outputs / "one", relearn_steps=0)
    assert findings.membership == {}
    assert findings.privleak == {}
    assert findings.relearning == {}
    assert findings.notes == {
        "membership": "not computed: no holdout set (data never seen)",
        "relearning": "not tried (0 steps)",
    }
    assert "membership: not computed: no holdout set" in str(findings)
    assert json.loads(findings.to_json())["notes"] == findings.notes
    findings = run(outputs / "one", holdout=forget_batches(seed=77), decode=lambda ids: str(ids))
    assert findings.notes == {"privleak": "not computed: no retrained adapter"}
    assert list(findings.membership) == list(findings.relearning) == ["original", "unlearned"]


def test_the_deletion_of_one_user_has_no_auc(outputs):
    one = [{key: value[:1] for key, value in forget_batches()[0].items()}]
    findings = audit(trained(), outputs / "one", forget=one, holdout=forget_batches(seed=77))
    assert findings.membership == {}
    for state in ("original", "unlearned"):
        assert "there are 1 of the forget set and 16 of" in findings.notes[f"membership/{state}"]
        assert "One user's deletion is one sequence" in findings.notes[f"membership/{state}"]
    assert "at least 2 forget sequences" in findings.notes["relearning"]
    assert "rounding/int8" in findings.meanings


def test_a_set_without_a_scored_position_says_so(outputs):
    ignored = [{**b, "labels": torch.full_like(b["input_ids"], -100)} for b in forget_batches()]
    findings = audit(trained(), outputs / "one", forget=ignored, holdout=forget_batches())
    assert "there are 0 of the forget set" in findings.notes["membership/original"]
    assert "there are none" in findings.notes["relearning"]
    assert findings.notes["rounding"] == "not computed: no position of the forget set is scored"
    assert findings.meanings == {}
    json.loads(findings.to_json())


def test_a_model_that_cannot_be_trained_is_audited_all_the_same(outputs):
    model = trained()
    model.base_model.model.forward = torch.no_grad()(model.base_model.model.forward)
    findings = audit(model, outputs / "one", forget=forget_batches())
    assert findings.notes["relearning"].startswith("not computed for unlearned: the loss does not")
    assert "relearning" not in findings.meanings
    assert findings.passed


def test_the_text_is_what_zlib_compresses(outputs):
    asked = []

    def decode(ids) -> str:
        asked.append(ids)
        return "x"

    findings = run(outputs / "one", holdout=forget_batches(seed=77), decode=decode)
    assert "zlib" not in findings.notes
    assert len(asked) == 2 * (16 + 16)
    # The same length of text everywhere leaves the loss alone.
    for state in ("original", "unlearned"):
        areas = findings.membership[state]
        assert areas["zlib"].value == areas["loss"].value


def test_a_retrained_adapter_that_is_the_original_is_refused(attacked):
    folder, sets, _ = attacked
    model = memorised()
    before, state = weights(model), state_of(model)
    with pytest.raises(uf.UcanError, match="original is the original one"):
        audit(model, folder / "unlearned", retrained=folder / "original", **sets)
    assert_same_weights(model, before)
    assert state_of(model) == state


@pytest.mark.parametrize("how", ["truncated", "a layer is missing", "no folder"])
def test_a_retrained_adapter_that_cannot_be_loaded_is_named(outputs, tmp_path, how):
    folder = broken(outputs, tmp_path, how)
    model = trained().train()
    before, state = weights(model), state_of(model)
    with pytest.raises(uf.UcanError, match="broken"):
        audit(model, outputs / "one", retrained=folder, forget=forget_batches())
    assert_same_weights(model, before)
    assert state_of(model) == state


def test_a_reference_of_more_layers_leaves_the_model_as_it_was(tmp_path):
    model = lora(llama(hidden=32), r=8, targets=["q_proj"])
    scaled(lora(llama(hidden=32), r=8, targets=["q_proj"]), 0.5).save_pretrained(tmp_path / "half")
    lora(llama(hidden=32), r=4).save_pretrained(tmp_path / "all")
    before, state = weights(model), state_of(model)
    findings = audit(
        model, tmp_path / "half", retrained=tmp_path / "all", forget=forget_batches(),
        relearn_steps=1,
    )  # fmt: skip
    assert set(findings.relearning) == {"original", "unlearned", "retrained"}
    assert_same_weights(model, before)
    assert state_of(model) == state


@pytest.mark.parametrize("steps", [-1, 1.5, True, "10"])
def test_a_bad_number_of_steps_is_refused(outputs, steps):
    with pytest.raises(uf.UcanError, match="relearn_steps must be a whole number"):
        run(outputs / "one", relearn_steps=steps)


def test_a_seed_beyond_64_bits_is_refused(outputs):
    with pytest.raises(uf.UcanError, match="seed must be an integer in"):
        run(outputs / "one", seed=2**64)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("where", ["fine", "holdout", "relearning", "rounding", "attacks"])
def test_attacks_leave_the_model_as_it_was(attacked, where, training):
    folder, sets, _ = attacked
    model = memorised().train(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    before, state = weights(model), state_of(model)
    seen = []

    def progress(done, _total, text):
        seen.append(text)
        if where == "relearning" and text == "relearning" and done == 1:
            raise RuntimeError("on purpose")
        if where == "attacks" and text.startswith("attacks") and done == 1:
            raise RuntimeError("on purpose")
        # The last pass is that over the rounded adapter.
        if where == "rounding" and text == "forget loss" and done == 1:
            raise RuntimeError("on purpose")

    class Holdout:
        def __iter__(self):
            yield sets["holdout"][0]
            if where == "holdout":
                raise RuntimeError("on purpose")

    expected = pytest.raises(RuntimeError, match="on purpose")
    with contextlib.nullcontext() if where == "fine" else expected:
        audit(
            model, folder / "unlearned", retrained=folder / "retrained", relearn_steps=2,
            forget=sets["forget"], holdout=Holdout(), progress=progress,
        )  # fmt: skip
    assert ("forget loss" in seen) == (where in ("fine", "rounding"))
    assert_same_weights(model, before)
    assert state_of(model) == state
