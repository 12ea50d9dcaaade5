"""ActivationStats: sums that can be added, subtracted, sent between processes and kept."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import json
import multiprocessing
import os
import weakref
from pathlib import Path

import helpers_models as hm
import peft
import pytest
import torch
import torch.distributed as dist
from oracle import assert_relative, assert_same_stats
from safetensors.torch import save_file
from torch import nn

import ucan_fast as uf
from ucan_fast import adapter
from ucan_fast.adapter import fingerprint
from ucan_fast.files import read_safetensors, write_safetensors
from ucan_fast.stats import FORMAT, FORMAT_VERSION

SITES = ("input", "rank", "output", "layer")


def make_data(seed: int = 0) -> list[dict]:
    """Sequences whose tokens are forget, retain or ignored, as single batches."""
    lengths = [[7, 3, 5], [2, 6], [8, 4, 4, 1]]
    return [hm.token_batch(n, seed=seed + i, groups="mixed") for i, n in enumerate(lengths)]


def with_groups(batches, rule) -> list[dict]:
    return [{**b, "token_groups": rule(b["token_groups"])} for b in batches]


def as_bank(batches):
    """Everything that is not ignored, as retain."""
    return with_groups(batches, lambda g: torch.where(g >= 0, 1, -1))


def as_forget(batches):
    """The same sequences, but only their forget tokens."""
    return with_groups(batches, lambda g: torch.where(g == 0, 0, -1))


def rebatched(batches) -> list[dict]:
    """Every sequence alone, in reverse order."""
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(v0(b)))]
    return rows[::-1]


def v0(batch: dict) -> torch.Tensor:
    return batch["input_ids"]


@pytest.fixture(scope="module")
def model():
    return hm.lora(hm.llama())


@pytest.fixture(scope="module")
def stats(model):
    return uf.collect(model, make_data(), sites=SITES)


@pytest.fixture(scope="module")
def bank(model):
    return uf.collect(model, as_bank(make_data()))


@pytest.fixture(scope="module")
def forget(model):
    return uf.collect(model, as_forget(make_data()), group="forget")


# ------------------------------------------------------------------ with_forget, +, -


def test_with_forget_equals_direct_collection(model):
    """Identical batches: whole sequences to forget, whole sequences to keep."""
    forget = [hm.token_batch([7, 3, 5]), hm.token_batch([2, 6], side="left", seed=1)]
    retain = [hm.token_batch([8, 4, 4, 1], seed=2), hm.token_batch([40], seed=3)]
    bank = uf.collect(model, forget + retain)
    request = uf.collect(model, forget, group="forget")
    direct = request + uf.collect(model, retain)
    split = bank.with_forget(request)
    assert (split.tokens("forget"), split.tokens("retain")) == (23, 57)
    assert_same_stats(split, direct, 1e-9)


def test_with_forget_of_single_tokens(model, bank, forget):
    """Forget tokens among retain tokens: the fp32 partial sums then span other tokens."""
    direct = uf.collect(model, make_data())
    split = bank.with_forget(forget)
    assert split.tokens("forget") == direct.tokens("forget") > 0
    assert split.tokens("retain") == direct.tokens("retain") > 0
    assert_same_stats(split, direct, 1e-6)


def test_with_forget_of_single_tokens_in_fp64():
    model = hm.lora(hm.llama()).double()
    bank = uf.collect(model, as_bank(make_data()))
    split = bank.with_forget(uf.collect(model, as_forget(make_data())))
    assert_same_stats(split, uf.collect(model, make_data()), 1e-9)


def test_with_forget_in_fp64_with_other_batching():
    model = hm.lora(hm.llama()).double()
    data = make_data()
    bank = uf.collect(model, as_bank(rebatched(data)))
    split = bank.with_forget(uf.collect(model, as_forget(data)))
    assert_same_stats(split, uf.collect(model, data), 1e-9)


def test_with_forget_in_fp32_with_other_batching(model):
    data = make_data()
    bank = uf.collect(model, as_bank(rebatched(data)))
    split = bank.with_forget(uf.collect(model, as_forget(data)))
    assert_same_stats(split, uf.collect(model, data), 1e-5)


def test_with_forget_leaves_out_what_the_request_counts_as_retain(model, bank):
    """A request's batches may carry retain tokens too; the bank has those already."""
    both = uf.collect(model, make_data())
    assert_same_stats(bank.with_forget(both), both, 1e-6)


def test_two_requests_equal_one_with_their_union(model, bank):
    data = make_data()
    first = with_groups(data, lambda g: torch.where(g == 0, 0, -1))
    for batch in first[1:]:
        batch["token_groups"] = torch.full_like(batch["token_groups"], -1)
    second = with_groups(data, lambda g: torch.where(g == 0, 0, -1))[1:]
    one, two = uf.collect(model, first, group="forget"), uf.collect(model, second, group="forget")
    union = uf.collect(model, as_forget(data), group="forget")
    assert_same_stats(bank.with_forget(one.only("forget") + two), bank.with_forget(union), 1e-9)


def test_adding_and_subtracting(model, stats):
    data = make_data()
    parts = [uf.collect(model, [batch], sites=SITES) for batch in data]
    total = parts[0] + parts[1] + parts[2]
    assert_same_stats(total, stats, 1e-12)
    assert_same_stats(total - parts[2], parts[0] + parts[1], 1e-9)
    nothing = stats - stats
    assert nothing.tokens("forget") == nothing.tokens("retain") == 0
    for sites in nothing.layers.values():
        assert not any(m.abs_sum.any() or m.sq_sum.any() for m in sites.values())


def test_nothing_is_changed_by_arithmetic(bank, forget):
    kept = copy.deepcopy((bank, forget))
    bank.with_forget(forget)
    bank + forget
    assert_same_stats(bank, kept[0])
    assert_same_stats(forget, kept[1])


def test_only_one_group(stats):
    only = stats.only("forget")
    for name, sites in only.layers.items():
        for site, moments in sites.items():
            whole = stats.layers[name][site]
            assert moments.count.tolist() == [whole.count[0], 0]
            assert torch.equal(moments.abs_sum[0], whole.abs_sum[0])
            assert torch.equal(moments.sq_sum[0], whole.sq_sum[0])
            assert not moments.abs_sum[1].any()
            assert not moments.sq_sum[1].any()


def test_moments_by_hand():
    one = uf.Moments(*(torch.tensor(t).double() for t in ([1, 2], [[3, 4], [5, 6]], [[1, 1]] * 2)))
    two = one + one
    assert two.count.tolist() == [2, 4]
    assert two.abs_sum.tolist() == [[6, 8], [10, 12]]
    assert two.n == 2
    assert (uf.Moments.zeros(2) + one).abs_sum.tolist() == one.abs_sum.tolist()
    assert uf.Moments.zeros(5).sq_sum.shape == (2, 5)
    zeros = uf.Moments.zeros(3)
    zeros.abs_sum += 1
    assert not zeros.sq_sum.any()


def test_tokens_and_sites(stats):
    data = make_data()
    counted = [b["token_groups"][b["attention_mask"] == 1] for b in data]
    assert stats.tokens("forget") == sum(int((g == 0).sum()) for g in counted)
    assert stats.tokens("retain") == sum(int((g == 1).sum()) for g in counted)
    assert stats.sites == SITES
    assert stats.select(["rank"]).sites == ("rank",)
    with pytest.raises(uf.UcanError, match="'mlp'"):
        stats.select(["mlp"])


# ------------------------------------------------------------------ refusals


def refused(call, *words):
    with pytest.raises(uf.UcanError) as error:
        call()
    for word in words:
        assert word in str(error.value), str(error.value)


def test_refuses_statistics_of_another_adapter(model, bank, forget):
    other = copy.deepcopy(model)
    hm.randomise(other, seed=9)
    theirs = uf.collect(other, as_forget(make_data()), group="forget")
    for call in (
        lambda: bank.with_forget(theirs),
        lambda: bank + theirs,
        lambda: bank - theirs,
    ):
        refused(call, "different adapters", bank.fingerprint[:12], theirs.fingerprint[:12])


def test_refuses_other_sites_and_layers(model, bank):
    rank_only = uf.collect(model, as_forget(make_data()), sites=["rank"])
    refused(lambda: bank.with_forget(rank_only), "(input)", "sites")
    lacking = copy.deepcopy(bank)
    name = next(iter(lacking.layers))
    del lacking.layers[name]
    refused(lambda: bank + lacking, name)
    narrower = copy.deepcopy(bank)
    moments = narrower.layers[name]["rank"]
    moments.abs_sum, moments.sq_sum = moments.abs_sum[:, :2], moments.sq_sum[:, :2]
    refused(lambda: bank + narrower, name, "4", "2")


def test_refuses_a_bank_smaller_than_the_forget_set(model, forget):
    small = uf.collect(model, [hm.token_batch([2])])
    assert small.tokens("retain") < forget.tokens("forget")
    refused(lambda: small.with_forget(forget), "not contained in the bank", "its tokens exceeds")
    # One token too many is too many, however large the sums are.
    larger = uf.collect(model, as_bank(make_data()))
    for sites in larger.layers.values():
        for moments in sites.values():
            moments.count[1] = forget.tokens("forget") - 1
    refused(lambda: larger.with_forget(forget), "not contained in the bank", "its tokens exceeds")


def test_refuses_a_forget_set_that_is_not_in_the_bank(model, bank, forget):
    """As many tokens, but others: the sums cannot be part of the bank's."""
    loud = copy.deepcopy(forget)
    name = next(iter(loud.layers))
    moments = loud.layers[name]["rank"]
    moments.abs_sum *= 1e3
    refused(lambda: bank.with_forget(loud), name, "rank", "not contained")


def test_rounding_may_exceed_the_bank_a_little(model, bank):
    """bf16 with other batching: a neuron's forget sum may end a hair above the bank's."""
    everything = uf.collect(model, with_groups(make_data(), lambda g: torch.where(g >= 0, 0, -1)))
    for sites in everything.layers.values():
        for moments in sites.values():
            moments.abs_sum *= 1 + 1e-6
            moments.sq_sum *= 1 + 1e-6
    split = bank.with_forget(everything)
    for sites in split.layers.values():
        for moments in sites.values():
            assert moments.count[1] == 0
            assert (moments.abs_sum >= 0).all()
            assert (moments.sq_sum >= 0).all()


def test_refuses_a_bank_that_holds_forget_tokens(stats, model):
    forget = uf.collect(model, as_forget(make_data()), sites=SITES)
    refused(lambda: stats.with_forget(forget), "retain", str(stats.tokens("forget")))


def test_refuses_an_empty_forget_set(model, bank):
    nothing = uf.collect(model, as_bank(make_data()))
    refused(lambda: bank.with_forget(nothing), "no forget token")


# ------------------------------------------------------------------ files


def test_save_and_load_are_bit_exact(stats, tmp_path):
    path = tmp_path / "folder" / "bank.safetensors"
    stats.save(path)
    again = uf.ActivationStats.load(path)
    assert_same_stats(again, stats)
    assert again.fingerprint == stats.fingerprint != ""
    for sites in again.layers.values():
        for moments in sites.values():
            assert all(t.dtype == torch.float64 for t in moments.tensors())
    stats.save(str(path))  # over an existing file, as a str
    assert_same_stats(uf.ActivationStats.load(str(path)), stats)
    assert [p.name for p in path.parent.iterdir()] == ["bank.safetensors"]


def test_loaded_statistics_are_usable(model, bank, forget, tmp_path):
    bank.save(tmp_path / "bank")
    forget.save(tmp_path / "forget")
    load = uf.ActivationStats.load
    split = load(tmp_path / "bank").with_forget(load(tmp_path / "forget"))
    assert_same_stats(split, bank.with_forget(forget))


def test_difficult_layer_names(tmp_path):
    names = ["a.b", "", 'quote"and\\', "ünïcode", "a b"]
    layers = {n: {"rank": uf.Moments.zeros(2) + uf.Moments.zeros(2)} for n in names}
    stats = uf.ActivationStats(layers, "f")
    stats.save(tmp_path / "s")
    assert list(uf.ActivationStats.load(tmp_path / "s").layers) == names


def damaged_files(folder: Path, stats) -> dict[str, tuple[Path, str]]:
    whole = folder / "whole"
    stats.save(whole)
    content = whole.read_bytes()
    files = {
        "half": content[: len(content) // 2],
        "one byte short": content[:-1],
        "header only": content[:200],
        "empty": b"",
        "random bytes": os.urandom(500),
        "text": b"not a statistics file\n" * 30,
    }
    paths = {}
    for name, data in files.items():
        path = folder / name
        path.write_bytes(data)
        paths[name] = (path, "truncated or corrupt")
    paths["missing"] = (folder / "missing", "does not exist")
    (folder / "folder").mkdir()
    paths["folder"] = (folder / "folder", "")
    other = folder / "other"
    save_file({"x": torch.ones(2)}, other)
    paths["other kind"] = (other, "no ucan_fast.statistics file")
    adapter = folder / "plan"
    save_file({"x": torch.ones(2)}, adapter, {"format": "ucan_fast.plan", "version": "1"})
    paths["a plan"] = (adapter, "ucan_fast.plan")
    return paths


@pytest.mark.parametrize(
    "kind",
    [
        "half",
        "one byte short",
        "header only",
        "empty",
        "random bytes",
        "text",
        "missing",
        "folder",
        "other kind",
        "a plan",
    ],
)
def test_refuses_damaged_files(kind, stats, tmp_path):
    path, word = damaged_files(tmp_path, stats)[kind]
    refused(lambda: uf.ActivationStats.load(path), str(path), word)


def rewritten(path: Path, change) -> None:
    """The file with its metadata and tensors changed, and a checksum that fits."""
    metadata, tensors = read_safetensors(path, FORMAT, FORMAT_VERSION)
    change(metadata, tensors)
    version = metadata.pop("version")
    write_safetensors(path, FORMAT, version, metadata, tensors)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m, t: m.update(version="99"), "version 99"),
        (lambda m, t: m.pop("layers"), "damaged"),
        (lambda m, t: m.update(layers="[[1"), "damaged"),
        (lambda m, t: m.update(layers="3"), "damaged"),
        (lambda m, t: m.update(layers=json.dumps([["a"]])), "damaged"),
        (lambda m, t: t.pop("0.abs_sum"), "damaged"),
        (lambda m, t: t.update({"0.count": torch.ones(3).double()}), "damaged"),
        (lambda m, t: t.update({"0.sq_sum": t["0.sq_sum"][:, :1].clone()}), "damaged"),
        (lambda m, t: t["0.abs_sum"].fill_(float("nan")), "damaged"),
        (lambda m, t: t["0.sq_sum"].fill_(-1.0), "damaged"),
        (lambda m, t: t["0.count"].fill_(float("inf")), "damaged"),
    ],
)
def test_refuses_files_with_wrong_content(change, word, stats, tmp_path):
    path = tmp_path / "bank"
    stats.save(path)
    rewritten(path, change)
    refused(lambda: uf.ActivationStats.load(path), str(path), word)


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_a_tensor_is_noticed(bit, stats, tmp_path):
    path = tmp_path / "bank"
    stats.save(path)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for place in (start, start + 1001, (start + len(content)) // 2, len(content) - 1):
        content[place] ^= 1 << bit
        path.write_bytes(content)
        refused(lambda: uf.ActivationStats.load(path), str(path), "truncated or corrupt")
        content[place] ^= 1 << bit
    path.write_bytes(content)
    assert_same_stats(uf.ActivationStats.load(path), stats)


def test_the_repr_is_one_short_line(stats):
    text = repr(stats)
    assert len(text) < 200
    assert "\n" not in text
    for part in (
        f"{len(stats.layers)} layers",
        ", ".join(stats.sites),
        f"{stats.tokens('forget')} forget",
        f"{stats.tokens('retain')} retain tokens",
        stats.fingerprint[:12],
    ):
        assert part in text
    assert "0 layers, sites none" in repr(uf.ActivationStats())


def test_a_failed_save_keeps_the_old_file(stats, bank, tmp_path, monkeypatch):
    path = tmp_path / "bank"
    bank.save(path)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    refused(lambda: stats.save(path), str(path), "No space left")
    monkeypatch.undo()
    assert_same_stats(uf.ActivationStats.load(path), bank)
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]


# ------------------------------------------------------------------ processes


def reduce_in_process(rank: int, store: str, folder: Path, part: uf.ActivationStats) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    part.all_reduce().save(folder / f"total{rank}")
    try:
        (part.select(["rank"]) if rank else part).all_reduce()
    except uf.UcanError as error:
        (folder / f"refused{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks, to start in milliseconds")
def test_all_reduce_over_two_processes(model, tmp_path):
    data = make_data()
    parts = [uf.collect(model, data[:1]), uf.collect(model, data[1:])]
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=reduce_in_process, args=(rank, tmp_path / "store", tmp_path, part))
        for rank, part in enumerate(parts)
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=60)
        assert [worker.exitcode for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    totals = [uf.ActivationStats.load(tmp_path / f"total{rank}") for rank in (0, 1)]
    assert_same_stats(totals[0], totals[1])
    assert_same_stats(totals[0], parts[0] + parts[1])
    for rank in (0, 1):
        assert "different layers" in (tmp_path / f"refused{rank}").read_text()


def test_all_reduce_without_processes(stats):
    assert_same_stats(stats.all_reduce(), stats)


# ------------------------------------------------------------------ long runs


class Constant(nn.Module):
    """Every token's activation is 0.1, however many there are."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(1, 1, bias=False)

    def forward(self, input_ids, attention_mask=None):
        return self.dense(torch.full((*input_ids.shape, 1), 0.1))


def test_thirty_million_tokens_through_collect():
    """fp32 totals stall at 2^24 equal tokens; the counts and sums here must not even drift."""
    model = peft.get_peft_model(Constant(), peft.LoraConfig(r=1, target_modules=["dense"]))
    rows, runs = 1_000_000, 30
    batch = {"input_ids": torch.zeros(1, rows, dtype=torch.int64)}
    stats = uf.collect(model, (batch for _ in range(runs)), sites=["input"])
    ((sites,),) = (stats.layers.values(),)
    moments = sites["input"]
    value = torch.tensor(0.1).double()
    assert moments.count.tolist() == [0, rows * runs]
    assert_relative(moments.abs_sum[1], rows * runs * value.view(1), 1e-6)
    assert_relative(moments.sq_sum[1], rows * runs * value.view(1) ** 2, 1e-6)


# ------------------------------------------------------------------ fingerprint


# Bytes up to which what was hashed is kept, and remembered within one walk.
MEMORY = {"kept": (1 << 24, 1 << 28), "remembered": (0, 1 << 28), "too large": (0, 0)}


@pytest.mark.parametrize("in_one_walk", [False, True])
@pytest.mark.parametrize("memory", [*MEMORY, "on the device"])
def test_fingerprint_changes_with_every_value_and_the_scaling(memory, in_one_walk, monkeypatch):
    """Also where what was hashed last is remembered: writes to .data leave no other trace."""
    model = hm.lora(hm.llama(layers=1))
    if memory == "on the device":
        monkeypatch.setattr(adapter, "_on_one_gpu", lambda values: True)
        memory = "too large"
    set_memory(monkeypatch, memory)
    alone = fingerprint(copy.deepcopy(model), "default")
    with adapter.one_walk(model) if in_one_walk else contextlib.nullcontext():
        check_every_value_and_the_scaling(model, alone)


def set_memory(monkeypatch, memory: str) -> None:
    kept, remembered = MEMORY[memory]
    monkeypatch.setattr(adapter, "_KEPT_BYTES", kept)
    monkeypatch.setattr(adapter, "_REMEMBERED_BYTES", remembered)


def check_every_value_and_the_scaling(model: nn.Module, origin: str) -> None:
    assert fingerprint(model, "default") == origin
    assert fingerprint(model, "default") == origin
    seen = {origin}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        index = (-1, -1)
        kept = parameter.data[index].clone()
        parameter.data[index] = torch.nextafter(kept, kept + 1)
        now = fingerprint(model, "default")
        assert now not in seen, name
        seen.add(now)
        parameter.data[index] = kept
    assert fingerprint(model, "default") == origin
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    b = layer.lora_B["default"].weight
    kept = b.data
    b.data = kept.reshape(kept.shape[1], kept.shape[0])  # the same bytes
    assert fingerprint(model, "default") not in seen
    b.data = kept
    assert fingerprint(model, "default") == origin
    config = adapter.base_config(model)
    config.vocab_size += 1
    assert fingerprint(model, "default") not in seen
    config.vocab_size -= 1
    assert fingerprint(model, "default") == origin
    layer.scaling["default"] *= 1.0001
    assert fingerprint(model, "default") not in seen


def test_fingerprint_sees_weights_leave_within_one_walk():
    model = hm.lora(hm.llama(layers=1))
    down = model.base_model.model.model.layers[0].mlp.down_proj
    with adapter.one_walk(model):
        fingerprint(model, "default")
        down.lora_B["default"].to("meta")
        with pytest.raises(uf.UcanError, match=r"down_proj \(lora_B.weight\): .* meta device"):
            fingerprint(model, "default")


@pytest.mark.parametrize(
    ("memory", "hashes"), [("kept", 1), ("remembered", 3), ("too large", 4)], ids=list(MEMORY)
)
def test_fingerprint_hashes_the_same_bytes_once(memory, hashes, monkeypatch):
    model = hm.lora(hm.llama(layers=1))
    set_memory(monkeypatch, memory)
    hashed = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(
        adapter.hashlib, "sha256", lambda *args: hashed.append(args) or sha256(*args)
    )
    found = {fingerprint(model, "default")}
    with adapter.one_walk(model):
        found |= {fingerprint(model, "default") for _ in range(2)}
    found.add(fingerprint(model, "default"))
    assert (len(found), len(hashed)) == (1, hashes)


def test_on_a_gpu_the_same_bits_are_sent_and_hashed_once(monkeypatch):
    """The CPU stands for the GPU: its weights are compared where they lie."""
    model = hm.lora(hm.llama(layers=1))
    alone = fingerprint(copy.deepcopy(model), "default")
    monkeypatch.setattr(adapter, "_on_one_gpu", lambda values: True)
    sent = []
    send = adapter.to_cpu
    monkeypatch.setattr(adapter, "to_cpu", lambda *args: sent.append(1) or send(*args))
    assert {fingerprint(model, "default") for _ in range(3)} == {alone}
    assert len(sent) == 1
    weight = model.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].weight
    kept = weight.data.clone()
    weight.data[0, 0] = 0.0
    zero = fingerprint(model, "default")
    weight.data[0, 0] = -0.0
    assert fingerprint(model, "default") not in (zero, alone)  # equal, but other bits
    weight.data[0, 0] = torch.nan
    seen = [len(sent)]
    assert fingerprint(model, "default") == fingerprint(model, "default")
    assert len(sent) == seen[0] + 1  # a NaN is the same NaN
    weight.data.copy_(kept)
    assert fingerprint(model, "default") == alone
    model.to(torch.bfloat16)
    assert fingerprint(model, "default") == fingerprint(copy.deepcopy(model), "default") != alone
    monkeypatch.setattr(adapter, "_KEPT_ON_DEVICE_BYTES", 0)
    before = len(sent)
    assert len({fingerprint(model, "default") for _ in range(2)}) == 1
    assert len(sent) == before + 2


def test_what_was_hashed_does_not_keep_the_model():
    model = hm.lora(hm.llama(layers=1))
    fingerprint(model, "default")
    assert model in adapter._kept
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_fingerprint_of_two_adapters_in_one_walk():
    model = hm.lora(hm.llama(layers=1))
    model.add_adapter("other", model.peft_config["default"])
    alone = [fingerprint(model, name) for name in ("default", "other")]
    assert alone[0] != alone[1]
    with adapter.one_walk(model):
        for _ in range(2):
            assert [fingerprint(model, name) for name in ("default", "other")] == alone


def test_fingerprint_sees_swapped_layers():
    """q and k have the same values as before, but in each other's place."""
    model = hm.lora(hm.llama(layers=1))
    mlp = model.base_model.model.model.layers[0].mlp
    origin = fingerprint(model, "default")
    gate, up = mlp.gate_proj.lora_A["default"].weight, mlp.up_proj.lora_A["default"].weight
    gate.data, up.data = up.data, gate.data
    assert fingerprint(model, "default") != origin


def test_fingerprint_stays_the_same_where_the_adapter_does(tmp_path):
    model = hm.lora(hm.llama(layers=1))
    origin = fingerprint(model, "default")
    uf.accelerate(model)
    assert fingerprint(model, "default") == origin
    assert fingerprint(copy.deepcopy(model), "default") == origin
    model.train()
    assert fingerprint(model, "default") == origin
    model.save_pretrained(tmp_path)
    load = peft.PeftModel.from_pretrained
    assert fingerprint(load(hm.llama(layers=1), tmp_path), "default") == origin
    named = load(hm.llama(layers=1), tmp_path, adapter_name="other")
    assert fingerprint(named, "other") == origin
    # The base's weights do not enter, only its configuration and the layers' shapes.
    assert fingerprint(load(hm.llama(layers=1, seed=7), tmp_path), "default") == origin
    # bf16 values survive being loaded in fp32.
    narrow = hm.lora(hm.llama(layers=1), autocast_adapter_dtype=False)
    for parameter in narrow.parameters():
        parameter.data = parameter.data.bfloat16()
    wide = copy.deepcopy(narrow).float()
    assert fingerprint(narrow, "default") == fingerprint(wide, "default")


def test_fingerprint_differs_for_another_base_configuration():
    base = hm.llama(layers=1)
    origin = fingerprint(hm.lora(base, targets=["q_proj"]), "default")
    for change in ({"vocab_size": 41}, {"num_hidden_layers": 2}):
        config = copy.deepcopy(base.config)
        config.update(change)
        other = type(hm.llama(layers=1))(config)
        adapted = hm.lora(other, targets=["layers.0.self_attn.q_proj"])
        first = copy.deepcopy(adapted)
        assert fingerprint(first, "default") != origin
    same = hm.lora(hm.llama(layers=1), targets=["layers.0.self_attn.q_proj"])
    assert fingerprint(same, "default") == origin


def test_fingerprint_is_of_one_adapter_alone():
    model = hm.lora(hm.llama(layers=1), adapter="first")
    origin = fingerprint(model, "first")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert fingerprint(model, "first") == origin
    hm.randomise(model, "second", seed=4)
    assert fingerprint(model, "first") == origin
    assert fingerprint(model, "second") != origin


def test_collected_statistics_carry_the_fingerprint(model, stats):
    assert stats.fingerprint == fingerprint(model, "default")
    fused = copy.deepcopy(model)
    uf.accelerate(fused)
    assert uf.collect(fused, make_data()).fingerprint == stats.fingerprint


def test_refuses_statistics_taken_beside_other_adapters():
    model = hm.lora(hm.llama())
    model.add_adapter("second", model.peft_config["default"])
    batches = [{"input_ids": torch.randint(3, 16, (2, 7))}]
    alone = uf.collect(model, batches)
    split = alone + uf.collect(model, batches, group="forget")
    model.base_model.set_adapter(["default", "second"])
    beside = uf.collect(model, batches, adapter="default")
    assert beside.fingerprint == alone.fingerprint
    with pytest.raises(uf.UcanError, match="different other adapters active"):
        uf.make_plan(model, split, adapter="default")
    with pytest.raises(uf.UcanError, match="different other adapters active"):
        beside.with_forget(uf.ActivationStats(alone.layers, alone.fingerprint, alone.context))
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["second"].weight += 1
    with pytest.raises(uf.UcanError, match="different other adapters active"):
        beside + uf.collect(model, batches, adapter="default")


# ------------------------------------------------------------------ all layers at once


def made_up(sizes: dict[str, int], seed: int) -> uf.ActivationStats:
    """Retain tokens only, random sums, layers of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    stats = uf.ActivationStats({}, "some adapter")
    for name, n in sizes.items():
        sums = torch.zeros(2, 2, n, dtype=torch.float64)
        sums[:, 1] = 1 + torch.rand(2, n, generator=generator, dtype=torch.float64)
        stats.layers[name] = {"input": uf.Moments(torch.tensor([0.0, 9.0]).double(), *sums)}
    return stats


SIZES = {"a": 3, "b": 1, "c": 4, "d": 2}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    ("what", "word"), [("count", "tokens"), ("abs_sum", "of |h|"), ("sq_sum", "of h²")]
)
def test_the_layer_and_the_sum_that_do_not_fit_are_named(name, what, word):
    bank, part = made_up(SIZES, 0), made_up(SIZES, 0)
    part.layers = dict(reversed(part.layers.items()))
    getattr(part.layers[name]["input"], what)[1].view(-1)[-1] += 1
    refused(lambda: bank - part, f"{name} (input): ", word)
    request = part.only("retain")
    for moments in (sites["input"] for sites in request.layers.values()):
        for tensor in moments.tensors():
            tensor.copy_(tensor.flip(0))
    refused(lambda: bank.with_forget(request), f"{name} (input): ", word)


def test_the_first_of_several_layers_that_do_not_fit_is_named():
    bank, part = made_up(SIZES, 0), made_up(SIZES, 0)
    part.layers["d"]["input"].count[1] += 1
    part.layers["b"]["input"].sq_sum[1, 0] += 1
    part.layers["c"]["input"].abs_sum[1, 0] += 1
    refused(lambda: bank - part, "b (input): ", "of h²")


def test_layers_are_matched_by_name_not_by_order():
    one, two = made_up(SIZES, 0), made_up(dict(reversed(SIZES.items())), 1)
    total = one + two
    assert list(total.layers) == list(SIZES)
    for name in SIZES:
        mine, theirs = (stats.layers[name]["input"].tensors() for stats in (one, two))
        pairs = zip(mine, theirs, strict=True)
        for got, (x, y) in zip(total.layers[name]["input"].tensors(), pairs, strict=True):
            assert torch.equal(got, x + y)


def test_a_split_bank_is_saved_like_any_other(bank, forget, tmp_path):
    split = bank.with_forget(forget)
    split.save(tmp_path / "split")
    loaded = uf.ActivationStats.load(tmp_path / "split")
    assert list(loaded.layers) == list(split.layers)
    for name, sites in split.layers.items():
        for site, moments in sites.items():
            pairs = zip(moments.tensors(), loaded.layers[name][site].tensors(), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_sums_that_overflow_only_together_are_finite():
    stats = made_up(SIZES, 0)
    for sites in stats.layers.values():
        sites["input"].sq_sum[1, 0] = 1e308
    stats.check_finite()
    stats.layers["c"]["input"].abs_sum[1, 2] = float("nan")
    refused(stats.check_finite, "c (input)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fingerprint_is_the_digest_that_files_hold(dtype):
    # Spelled out: files of earlier versions hold it.
    model = hm.lora(hm.llama(layers=1))
    module = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    linear = module.lora_A["default"]
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())  # other strides
    model = model.to(dtype)
    config = model.get_base_model().config
    known = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "d_model")
    identity = {key: getattr(config, key) for key in known if hasattr(config, key)}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            digest.update(f"{name}|{float(module.scaling['default'])!r}".encode())
            for key in ("lora_A", "lora_B"):
                weight = getattr(module, key)["default"].weight.detach().to(wide)
                digest.update(f"|{key}.weight{tuple(weight.shape)}".encode())
                digest.update(weight.numpy().tobytes())
    assert fingerprint(model, "default") == digest.hexdigest()
