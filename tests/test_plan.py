"""AttenuationPlan: apply all or nothing, undo bit exact, saved whole or not at all."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from plan_helpers import (
    MLP,
    SITES,
    assert_same_bits,
    batches,
    layer_names,
    lora_parameters,
    random_stats,
    randomize,
    snapshot,
    tiny_llama,
    weight,
)
from safetensors.torch import load_file, save_file

from ucan_fast import (
    AttenuationPlan,
    UcanConfig,
    UcanError,
    UcanWarning,
    accelerate,
    collect,
    files,
    make_plan,
    reversible,
)
from ucan_fast import ops as ops_package
from ucan_fast.adapter import fingerprint, tuner_layers
from ucan_fast.files import read_safetensors, write_safetensors
from ucan_fast.plan import FORMAT, FORMAT_VERSION

CONFIG = UcanConfig(strength=2.0, fraction=0.3)


def planned(dtype=torch.float32, site="input", **choices):
    """A model, and a plan for it that scales something."""
    model = tiny_llama(dtype=dtype)
    plan = make_plan(model, random_stats(model), CONFIG.replace(site=site, **choices))
    assert plan.attenuated > 0
    return model, plan


# apply and undo ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("site", SITES)
def test_undo_is_bit_exact(site, dtype):
    model, plan = planned(dtype, site)
    before = snapshot(model)
    # There is something that only bits can tell: -0.0 in every matrix (randomize puts it there).
    for parameter in lora_parameters(model).values():
        assert parameter[0, 0] == 0
        assert torch.signbit(parameter[0, 0])
    origin = fingerprint(model, "default")
    for _ in range(2):
        plan.apply(model)
        assert fingerprint(model, "default") == plan.applied_fingerprint != origin
        plan.undo(model)
        assert_same_bits(model, before)
        assert fingerprint(model, "default") == origin


def test_undo_restores_what_pruning_set_to_zero():
    model, plan = planned(decay="hard")
    before = snapshot(model)
    plan.apply(model)
    name = next(n for n, f in plan.factors.items() if (f == 0).any())
    assert (weight(model, name, "A")[:, plan.factors[name] == 0] == 0).all()
    plan.undo(model)
    assert_same_bits(model, before)


def test_parameters_stay_the_same_objects():
    model, plan = planned()
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    plan.apply(model)
    plan.undo(model)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())


def test_apply_works_in_training_and_with_gradients_on():
    model, plan = planned()
    model.train()
    for parameter in lora_parameters(model).values():
        parameter.requires_grad_(True)
    before = snapshot(model)
    with torch.enable_grad():
        plan.apply(model)
        assert all(p.is_leaf and p.requires_grad for p in lora_parameters(model).values())
        plan.undo(model)
    assert_same_bits(model, before)
    assert model.training


def test_the_output_changes_and_comes_back():
    model, plan = planned()
    tokens = torch.arange(10).view(2, 5)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        plan.apply(model)
        during = model(input_ids=tokens).logits
        plan.undo(model)
        after = model(input_ids=tokens).logits
    assert not torch.allclose(before, during)
    assert torch.equal(before, after)


def test_apply_twice_is_refused():
    model, plan = planned()
    other = make_plan(model, random_stats(model, seed=1), CONFIG)
    plan.apply(model)
    now = snapshot(model)
    for again in (plan, other, copy.deepcopy(plan)):
        with pytest.raises(UcanError, match="applied to adapter 'default' already; undo it first"):
            again.apply(model)
        assert_same_bits(model, now)
    plan.undo(model)
    other.apply(model)
    other.undo(model)


def test_apply_on_another_adapter_is_refused():
    _, plan = planned()
    for other in (tiny_llama(seed=3), tiny_llama(MLP), tiny_llama(layers=1)):
        before = snapshot(other)
        with pytest.raises(UcanError, match="this plan was made for an adapter with fingerprint"):
            plan.apply(other)
        assert_same_bits(other, before)
        assert plan.originals is None


def test_apply_on_a_retrained_adapter_is_refused():
    model, plan = planned()
    with torch.no_grad():
        weight(model, layer_names(model)[-1], "B")[0, 1] += 1.0
    before = snapshot(model)
    with pytest.raises(UcanError, match="Make a plan from statistics of this adapter"):
        plan.apply(model)
    assert_same_bits(model, before)


def test_undo_before_apply_is_refused():
    model, plan = planned()
    before = snapshot(model)
    with pytest.raises(UcanError, match="holds no original values: it was never applied"):
        plan.undo(model)
    assert_same_bits(model, before)


def test_undo_twice_is_refused():
    model, plan = planned()
    plan.apply(model)
    plan.undo(model)
    before = snapshot(model)
    with pytest.raises(UcanError, match="cannot undo: adapter 'default' has no plan applied"):
        plan.undo(model)
    assert_same_bits(model, before)


@pytest.mark.parametrize("where", ["attenuated", "untouched"])
def test_undo_on_weights_that_changed_since_is_refused(where):
    model, plan = planned()
    plan.apply(model)
    which = "A" if where == "attenuated" else "B"
    with torch.no_grad():
        weight(model, layer_names(model)[4], which)[1, 1] += 1e-3
    before = snapshot(model)
    with pytest.raises(UcanError, match=r"was changed since .*Nothing was changed"):
        plan.undo(model)
    assert_same_bits(model, before)


def test_undo_of_the_wrong_plan_is_refused():
    model, plan = planned()
    other = make_plan(model, random_stats(model, seed=1), CONFIG)
    other.apply(model)
    other.undo(model)
    plan.apply(model)
    before = snapshot(model)
    with pytest.raises(UcanError, match="cannot undo"):
        other.undo(model)
    assert_same_bits(model, before)
    plan.undo(model)


def test_an_adapter_trained_after_apply_is_a_new_origin():
    model, plan = planned()
    plan.apply(model)
    with torch.no_grad():
        weight(model, layer_names(model)[0], "B")[1, 1] += 1e-3
    stats = collect(model, batches())  # not refused: no plan left these weights
    make_plan(model, stats, CONFIG.replace(min_score=0.0)).apply(model)


def test_derived_plans_are_not_applied():
    model, plan = planned()
    plan.apply(model)
    for derived in (plan.with_strength(1.0), plan.with_fraction(0.5)):
        assert derived.originals is None
        assert derived.applied_fingerprint is None
        with pytest.raises(UcanError, match="holds no original values"):
            derived.undo(model)
    plan.undo(model)


@pytest.mark.parametrize("strength", [-1.0, float("nan")])
def test_with_strength_refuses_nonsense(strength):
    _, plan = planned()
    with pytest.raises(UcanError, match="strength must be a number >= 0"):
        plan.with_strength(strength)


def test_with_fraction_refuses_nonsense():
    _, plan = planned()
    with pytest.raises(UcanError, match="fraction must be"):
        plan.with_fraction(1.5)


def test_one_of_several_adapters():
    model, plan = planned()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    randomize(model, "second", seed=9)
    model.base_model.set_adapter(["default", "second"])
    before = snapshot(model)
    with pytest.raises(UcanError, match="2 adapters are active"):
        plan.apply(model)
    with pytest.raises(UcanError, match="this plan was made for an adapter"):
        plan.apply(model, adapter="second")
    assert_same_bits(model, before)
    plan.apply(model, adapter="default")
    now = snapshot(model)
    assert all(torch.equal(now[n], before[n]) for n in now if ".second." in n)
    # The other adapter is not marked.
    collect(model, batches(), adapter="second")
    with pytest.raises(UcanError, match="applied to adapter 'default'"):
        collect(model, batches(), adapter="default")
    with pytest.raises(UcanError, match="2 adapters are active"):
        plan.undo(model)
    plan.undo(model, adapter="default")
    assert_same_bits(model, before)


# A failure in the middle ------------------------------------------------------------------------


def nothing_happened(model, plan, before) -> None:
    assert_same_bits(model, before)
    collect(model, batches())  # not taken for an attenuated model
    with pytest.raises(UcanError, match=r"cannot undo|holds no original values"):
        plan.undo(model)
    assert_same_bits(model, before)
    # And it works once the obstacle is gone.
    plan.apply(model)
    assert plan.applied_fingerprint != plan.fingerprint
    plan.undo(model)
    assert_same_bits(model, before)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_failure_while_weights_are_written(monkeypatch, error, done):
    model, plan = planned()
    before = snapshot(model)

    def half(weights, factors, offsets, axes):
        for w in weights[:done]:
            w.mul_(0.5)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ops_package, "attenuate_", half)
        with pytest.raises(type(error)):
            plan.apply(model)
        assert_same_bits(model, before)
    nothing_happened(model, plan, before)


@pytest.mark.parametrize("name", ["fingerprint", "mark_applied"])
@pytest.mark.parametrize("error", [MemoryError("no memory"), KeyboardInterrupt()])
def test_a_failure_after_the_weights_were_written(monkeypatch, name, error):
    model, plan = planned()
    before = snapshot(model)
    original, calls = getattr(reversible, name), []

    def failing(*arguments):
        calls.append(1)
        if name == "fingerprint" and len(calls) == 1:
            return original(*arguments)
        # By now the weights are attenuated.
        assert not torch.equal(
            next(v for k, v in snapshot(model).items() if "lora_A" in k),
            next(v for k, v in before.items() if "lora_A" in k),
        )
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(reversible, name, failing)
        with pytest.raises(type(error)):
            plan.apply(model)
        assert_same_bits(model, before)
    nothing_happened(model, plan, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(value):
    model, plan = planned()
    before = snapshot(model)
    plan.flat_factors[3] = value
    with pytest.raises(UcanError, match="factors must be finite; nothing was changed"):
        plan.apply(model)
    assert_same_bits(model, before)


@pytest.mark.parametrize("name", ["fingerprint", "clear_mark"])
def test_a_failure_during_undo_leaves_the_plan_applied(monkeypatch, name):
    model, plan = planned()
    before = snapshot(model)
    plan.apply(model)
    applied = snapshot(model)
    original, calls = getattr(reversible, name), []

    def failing(*arguments):
        calls.append(1)
        if name == "fingerprint" and len(calls) == 1:
            return original(*arguments)
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(reversible, name, failing)
        with pytest.raises(MemoryError):
            plan.undo(model)
    if name == "fingerprint":
        assert_same_bits(model, applied)
        with pytest.raises(UcanError, match="a plan is applied"):
            collect(model, batches())
        plan.undo(model)
    assert_same_bits(model, before)
    # A stale mark says nothing about weights that are the origin's.
    collect(model, batches())


# Marks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle", "deepcopy of a pickle"])
def test_collecting_on_an_attenuated_model_is_refused(how, accelerated):
    model, plan = planned()
    if accelerated:
        accelerate(model)
    plan.apply(model)
    copied = model
    if "pickle" in how:
        copied = pickle.loads(pickle.dumps(copied))
    if "deepcopy" in how:
        copied = copy.deepcopy(copied)
    for group in ("retain", "forget"):
        with pytest.raises(UcanError, match=r"a plan is applied.*plan\.undo\(model\)"):
            collect(copied, batches(), group=group)
    with pytest.raises(UcanError, match="a plan is applied to adapter 'default' already"):
        plan.apply(copied)
    plan.undo(copied)
    collect(copied, batches())
    if copied is not model:
        with pytest.raises(UcanError, match="a plan is applied"):
            collect(model, batches())
        plan.undo(model)
    collect(model, batches())


def test_no_mark_is_left_behind():
    model, plan = planned()
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    plan.apply(model)
    assert not any("ucan" in key for key in model.state_dict())
    plan.undo(model)
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before


def test_a_copy_made_before_is_not_marked():
    model, plan = planned()
    other = copy.deepcopy(model)
    plan.apply(model)
    collect(other, batches())
    assert all("_ucan_applied" not in m.__dict__ for _, m in tuner_layers(other))


# Plans that change nothing ----------------------------------------------------------------------


@pytest.mark.parametrize("choices", [{"fraction": 0.0}, {"strength": 0.0}, {"floor": 1.0}])
def test_a_plan_that_changes_nothing_can_be_applied_and_undone(choices):
    model = tiny_llama()
    before = snapshot(model)
    with pytest.warns(UcanWarning, match="this plan changes nothing"):
        plan = make_plan(model, random_stats(model), CONFIG.replace(**choices))
    assert plan.summary().startswith("0 of 240 neurons attenuated (0.0 %) in 14 layers")
    plan.apply(model)
    assert_same_bits(model, before)
    collect(model, batches())  # the weights are the origin's, so this is fine
    plan.undo(model)
    assert_same_bits(model, before)


def test_a_plan_too_weak_for_bf16_can_be_undone():
    # Factors below 1 that round every weight back to itself.
    model, plan = planned(torch.bfloat16)
    plan = plan.with_strength(1e-6)
    assert plan.attenuated > 0
    before = snapshot(model)
    plan.apply(model)
    assert_same_bits(model, before)
    plan.undo(model)
    assert_same_bits(model, before)


# summary ----------------------------------------------------------------------------------------


def test_summary():
    _, plan = planned()
    text = plan.summary()
    share = 100 * plan.attenuated / 240
    assert f"{plan.attenuated} of 240 neurons attenuated ({share:.1f} %) in 14 layers" in text
    assert "site 'input'" in text
    assert f"largest {float(plan.flat_score.max()):.4g}, threshold {plan.threshold:.4g}" in text
    assert f"smallest factor {float(plan.flat_factors.min()):.4g}" in text


# save and load ----------------------------------------------------------------------------------


def assert_equal_plans(a: AttenuationPlan, b: AttenuationPlan) -> None:
    for key in ("config", "fingerprint", "groups", "sizes", "threshold", "strength", "note"):
        assert getattr(a, key) == getattr(b, key), key
    assert a.applied_fingerprint == b.applied_fingerprint
    for key in ("factors", "risk", "utility", "score"):
        mine, theirs = getattr(a, f"flat_{key}"), getattr(b, f"flat_{key}")
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs), key


@pytest.mark.parametrize("site", SITES)
def test_roundtrip_of_a_plan_that_was_not_applied(tmp_path, site):
    model, plan = planned(site=site)
    plan.save(tmp_path / "folder" / "plan.safetensors")  # missing folders are made
    loaded = AttenuationPlan.load(str(tmp_path / "folder" / "plan.safetensors"))
    assert_equal_plans(loaded, plan)
    assert loaded.originals is None
    before = snapshot(model)
    loaded.apply(model)
    loaded.undo(model)
    assert_same_bits(model, before)
    assert torch.equal(loaded.with_strength(0.7).flat_factors, plan.with_strength(0.7).flat_factors)
    # "auto" says that it did not search; that must not be lost on the way.
    auto = make_plan(model, random_stats(model), UcanConfig(site=site))
    assert auto.note
    auto.save(tmp_path / "auto")
    assert_equal_plans(AttenuationPlan.load(tmp_path / "auto"), auto)


def test_roundtrip_of_tied_layers(tmp_path):
    model = tiny_llama(layers=1)
    q, k = layer_names(model)[:2]
    model.get_submodule(k).lora_A["default"].weight = weight(model, q, "A")
    plan = make_plan(model, random_stats(model), CONFIG)
    assert (q, k) in plan.groups
    before = snapshot(model)
    plan.apply(model)
    plan.save(tmp_path / "plan", include_original=True)
    loaded = AttenuationPlan.load(tmp_path / "plan")
    assert_equal_plans(loaded, plan)
    loaded.undo(model)
    assert_same_bits(model, before)


def test_originals_are_saved_only_on_request(tmp_path):
    model, plan = planned()
    with pytest.raises(UcanError, match="no original values to save: the plan was not applied"):
        plan.save(tmp_path / "plan", include_original=True)
    assert not (tmp_path / "plan").exists()
    plan.apply(model)
    plan.save(tmp_path / "without")
    plan.save(tmp_path / "with", include_original=True)
    without, including = (load_file(tmp_path / name) for name in ("without", "with"))
    assert set(without) == {"factors", "risk", "utility", "score"}
    assert len(including) == len(without) + 14
    applied = snapshot(model)
    loaded = AttenuationPlan.load(tmp_path / "without")
    with pytest.raises(UcanError, match=r"saved without\s+save\(\.\.\., include_original=True\)"):
        loaded.undo(model)
    assert_same_bits(model, applied)
    AttenuationPlan.load(tmp_path / "with").undo(model)


CHILD = """
import sys
import torch
from peft import PeftModel
from plan_helpers import snapshot, tiny_llama
from ucan_fast import AttenuationPlan, UcanError

def check(model, name, wanted):
    got = {k.replace(f".{name}.", ".default."): v for k, v in snapshot(model).items()}
    assert set(got) == set(wanted)
    wrong = [k for k in got if not torch.equal(got[k], wanted[k])]
    assert not wrong, wrong

for argument in sys.argv[2:]:
    dtype, name = argument.split(":")
    folder = f"{sys.argv[1]}/{dtype}"
    model = PeftModel.from_pretrained(
        tiny_llama(dtype=getattr(torch, dtype)).unload(),
        f"{folder}/adapter",
        adapter_name=name,
        autocast_adapter_dtype=False,
    )
    attenuated, original = (torch.load(f"{folder}/{n}.pt") for n in ("attenuated", "original"))
    check(model, name, attenuated)
    try:
        AttenuationPlan.load(f"{folder}/without").undo(model)
        raise SystemExit("undo without originals was not refused")
    except UcanError as error:
        assert "include_original" in str(error), error
    check(model, name, attenuated)
    plan = AttenuationPlan.load(f"{folder}/plan")
    plan.undo(model)
    check(model, name, original)
    plan.apply(model)
    check(model, name, attenuated)
    print("restored", dtype, *model.peft_config)
"""


def test_undo_in_a_new_process(tmp_path):
    """The parent saves the attenuated adapter with PEFT; the child loads, undoes and compares."""
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        model, plan = planned(getattr(torch, dtype), site="mlp")
        folder.mkdir()
        torch.save(snapshot(model), folder / "original.pt")
        plan.apply(model)
        torch.save(snapshot(model), folder / "attenuated.pt")
        model.save_pretrained(folder / "adapter")
        plan.save(folder / "plan", include_original=True)
        plan.save(folder / "without")
    search_path = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), "float32:default", "bfloat16:other"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["restored float32 default", "restored bfloat16 other"]


def test_a_reloaded_adapter_of_another_name(tmp_path):
    model, plan = planned()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        tiny_llama().unload(), tmp_path / "adapter", adapter_name="renamed"
    )
    plan.apply(model)
    plan.apply(again)
    for (_, mine), (_, theirs) in zip(
        lora_parameters(model).items(), lora_parameters(again, "renamed").items(), strict=True
    ):
        assert torch.equal(mine, theirs)
    with pytest.raises(UcanError, match="applied to adapter 'renamed'"):
        collect(again, batches())
    with pytest.raises(UcanError, match="applied to adapter 'renamed' already"):
        plan.apply(again)
    plan.undo(again)
    collect(again, batches())
    plan.undo(model)


def test_an_adapter_loaded_in_a_narrower_dtype_is_refused():
    # Attenuated in fp32, loaded in bf16: not the weights that the plan left.
    model, plan = planned()
    plan.apply(model)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    before = snapshot(narrow)
    with pytest.raises(UcanError, match="was changed since"):
        plan.undo(narrow)
    assert_same_bits(narrow, before)


@pytest.mark.filterwarnings("ignore::ucan_fast.UcanWarning")
def test_originals_that_do_not_fit_the_dtype_are_refused():
    # Every attenuated value survives bf16 (the others are 0), but the originals would not.
    model = tiny_llama(layers=1)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.copy_(parameter.bfloat16())
    name = layer_names(model)[0]
    top = int(make_plan(model, random_stats(model), CONFIG).score[name].argmax())
    with torch.no_grad():
        weight(model, name, "A")[1, top] = 1 / 3
    config = CONFIG.replace(decay="hard", min_score=0.0, utility_weight=0.0, fraction=0.9)
    plan = make_plan(model, random_stats(model), config)
    assert plan.factors[name][top] == 0
    plan.apply(model)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    before = snapshot(narrow)
    with pytest.raises(UcanError, match=r"cannot undo bit exactly: .*another dtype"):
        plan.undo(narrow)
    assert_same_bits(narrow, before)
    plan.undo(model)


# Files that are not plans -----------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model, plan = planned()
    plan.apply(model)
    path = tmp_path / "plan.safetensors"
    plan.save(path, include_original=True)
    return model, plan, path


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UcanError, match=r"nowhere\.safetensors does not exist"):
        AttenuationPlan.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(saved, keep):
    _, _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UcanError, match="is truncated or corrupt"):
        AttenuationPlan.load(path)


def test_a_flipped_bit_is_refused(saved):
    _, _, path = saved
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    threshold = content.index(b"threshold")
    digit = next(i for i in range(threshold, start) if content[i] in b"0123456789")
    # Tensors, originals among them, and a digit of the threshold in the header.
    for place in (start, start + 7, (start + len(content)) // 2, len(content) - 1, digit):
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(UcanError, match=r"truncated or corrupt: .* checksum"):
            AttenuationPlan.load(path)
        content[place] ^= 1
    path.write_bytes(content)
    AttenuationPlan.load(path)


def test_garbage_and_folders_are_refused(tmp_path):
    (tmp_path / "garbage").write_bytes(b"not a plan " * 100)
    with pytest.raises(UcanError, match="garbage is truncated or corrupt"):
        AttenuationPlan.load(tmp_path / "garbage")
    with pytest.raises(UcanError, match="is a folder; name the file in it"):
        AttenuationPlan.load(tmp_path)


def test_another_kind_of_file_is_refused(tmp_path, saved):
    model, plan, _ = saved
    plan.undo(model)
    collect(model, batches()).save(tmp_path / "stats")
    with pytest.raises(UcanError, match=r"is no ucan_fast\.plan file.*ucan_fast\.statistics"):
        AttenuationPlan.load(tmp_path / "stats")
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(UcanError, match=r"is no ucan_fast\.plan file \(it says None\)"):
        AttenuationPlan.load(tmp_path / "other")


def rewritten(path, change_plan=lambda plan: None, change_tensors=lambda tensors: None, **metadata):
    """The file, with some of its content exchanged, and a checksum that fits."""
    header, tensors = read_safetensors(path, FORMAT, FORMAT_VERSION)
    values = json.loads(header["plan"])
    change_plan(values)
    change_tensors(tensors)
    header = {**header, "plan": json.dumps(values), **metadata}
    write_safetensors(path, FORMAT, header.pop("version"), header, tensors)


def test_another_version_is_refused(saved):
    rewritten(saved[2], version="2")
    with pytest.raises(UcanError, match="has format version 2, this ucan_fast reads 1"):
        AttenuationPlan.load(saved[2])


@pytest.mark.parametrize(
    "change",
    [
        {"change_plan": lambda plan: plan.pop("threshold")},
        {"change_plan": lambda plan: plan.pop("originals")},
        {"change_plan": lambda plan: plan.update(sizes=plan["sizes"][:-1])},
        {"change_plan": lambda plan: plan.update(sizes="many")},
        {"change_plan": lambda plan: plan.update(groups=None)},
        {"change_plan": lambda plan: plan.update(groups=plan["groups"][:-1])},
        {"change_tensors": lambda tensors: tensors.pop("factors")},
        {"change_tensors": lambda tensors: tensors.pop("original.3")},
        {"change_tensors": lambda tensors: tensors.update(risk=torch.ones(3))},
        {"change_tensors": lambda tensors: tensors["factors"][5:6].fill_(-1000.0)},
        {"change_tensors": lambda tensors: tensors["factors"][5:6].fill_(-1e-6)},
        {"change_tensors": lambda tensors: tensors["factors"][5:6].fill_(1.0001)},
        {"change_tensors": lambda tensors: tensors["factors"][5:6].fill_(float("nan"))},
        {"change_tensors": lambda tensors: tensors["factors"][5:6].fill_(float("inf"))},
        {"plan": "{"},
        {"plan": "[]"},
        {"plan": "3"},
    ],
)
def test_a_damaged_file_is_refused(saved, change):
    rewritten(saved[2])
    AttenuationPlan.load(saved[2])  # the rewriting itself does no harm
    rewritten(saved[2], **change)
    with pytest.raises(UcanError, match="is damaged"):
        AttenuationPlan.load(saved[2])


def test_the_repr_is_one_short_line():
    _, plan = planned()
    text = repr(plan)
    assert len(text) < 200
    assert "\n" not in text
    for part in (
        f"{plan.attenuated} of {plan.neurons} neurons",
        f"{len(plan.sizes)} layers",
        repr(plan.config.site),
        plan.fingerprint[:12],
    ):
        assert part in text


def test_a_damaged_configuration_is_refused(saved):
    rewritten(saved[2], lambda plan: plan["config"].update(fraction=7))
    with pytest.raises(UcanError, match="fraction must be"):
        AttenuationPlan.load(saved[2])


def test_originals_of_another_shape_change_nothing(saved):
    model, _, path = saved
    before = snapshot(model)
    # the second one would fit by broadcasting
    for shape in ((2, 3), (1, 1)):
        rewritten(path, change_tensors=lambda t, s=shape: t.update({"original.3": torch.ones(s)}))
        with pytest.raises(UcanError, match=r"cannot undo: .* have the shape"):
            AttenuationPlan.load(path).undo(model)
        assert_same_bits(model, before)


def test_originals_of_other_values_change_nothing(saved):
    model, _, path = saved
    rewritten(path, change_tensors=lambda tensors: tensors["original.3"].add_(1))
    before = snapshot(model)
    with pytest.raises(UcanError, match="cannot undo"):
        AttenuationPlan.load(path).undo(model)
    assert_same_bits(model, before)


# Writing whole or not at all --------------------------------------------------------------------


def test_a_failing_write_leaves_the_old_file(monkeypatch, saved):
    _, plan, path = saved
    old = path.read_bytes()

    def full_disk(tensors, target, metadata):
        Path(target).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(UcanError, match=r"could not write .*No space left on device"):
        plan.save(path)
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(UcanError, match="could not write"):
        plan.save(path.parent / "new")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_interrupted_write_leaves_the_old_file(monkeypatch, saved):
    _, plan, path = saved
    old = path.read_bytes()

    def interrupted(tensors, target, metadata):
        Path(target).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan.save(path)
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_successful_write_replaces_the_old_file(saved):
    _, plan, path = saved
    other = plan.with_strength(0.5)
    other.save(path)
    assert_equal_plans(AttenuationPlan.load(path), other)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
