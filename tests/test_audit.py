"""audit: passes on what unlearn wrote, fails on anything else, and leaves the model alone."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_model import (
    assert_same_weights,
    forget_batches,
    mean_nll,
    retain_batches,
    scored_logits,
    trained,
    weights,
)

import ucan_fast as uf
from ucan_fast.audit import audit
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
