"""Ceilings, predictions, and both beside what was measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks import measure as m
from benchmarks import roofline as r
from benchmarks.costs import Ceilings, Pass
from benchmarks.kernels import suite

from .synthetic import CEILINGS, case, document

SHAPE = {"model": "tiny", "tokens": 8}


def test_ceilings_of_this_machine_are_positive_and_ordered():
    found = r.measure_ceilings(torch.device("cpu"), seconds=0.0)
    assert found.source == "measured"
    assert set(found.flops) == {"float32", "bfloat16", "float16", "float64"}
    # From a very slow to a very fast machine; a wrong unit or count of bytes falls outside.
    assert 1e8 < found.bandwidth < 1e13
    assert 1e8 < found.flops["float32"] < 1e15
    assert 1e-8 < found.shortest == found.launch < 1e-3


def test_the_copy_counts_reads_and_writes(monkeypatch):
    # A clock that says 1 s for everything: the copy moves 2^28 bytes each way.
    monkeypatch.setattr(r, "_clock", lambda _device: lambda call: 1.0)
    found = r.measure_ceilings(torch.device("cpu"), seconds=0.0)
    assert found.bandwidth == 2 * 2**28
    assert found.flops["float32"] == 2 * 1024**3
    assert found.launch == 1 / 200


def test_a_file_carries_ceilings_and_what_they_predict(tmp_path):
    passes = [Pass("a", 1000), Pass("b", 10, 4000)]
    known = case("g", SHAPE, {"mine": [28.0]}, passes=passes)
    unknown = case("g", SHAPE, {"peer": [28.0]}, roofline_seconds=7.0)
    known[0].baseline = "peer"
    found = document(tmp_path / "a.json", [*known, *unknown])
    mine, peer = found["results"]
    assert found["environment"]["ceilings"] == CEILINGS.to_json()
    assert mine["roofline_seconds"] == 10 + 4
    assert mine["extra"]["traffic"] == {"bytes": 1010, "flops": 4000, "passes": 2}
    assert peer["roofline_seconds"] == 7
    text = r.side_by_side(found)
    (line,) = [one for one in text.splitlines() if "mine" in one]
    assert line.split() == ["mine", "14000.0000", "ms28000.0000", "ms", "2.00"]


def test_ceilings_are_measured_where_none_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr(r, "measured_ceilings", lambda: CEILINGS)
    path = m.write_results(
        tmp_path / "a.json", case("g", SHAPE, {"mine": [1.0]}), "x", profile=m.PROFILES["quick"]
    )
    assert m.read_results(path)["environment"]["ceilings"] == CEILINGS.to_json()


def test_launches_count_in_eager_time_only():
    result = case("g", SHAPE, {"mine": [1.0]}, passes=[Pass("a", 1)] * 3)[0]
    slow = Ceilings(1e9, {"float32": 1e9}, shortest=1.0, launch=5.0)
    result.extra["timing"] = "graph"
    assert result.predicted_seconds(slow) == 3
    result.extra["timing"] = "events"
    assert result.predicted_seconds(slow) == 15


def test_kernels_are_told_from_copies_and_host_events():
    class Event:
        def __init__(self, name, device=torch.autograd.DeviceType.CUDA, note=False):
            self.name, self.device_type, self.is_user_annotation = name, device, note

    events = [
        Event("attenuate_kernel"),
        Event("Memcpy HtoD"),
        Event("Memset (Device)"),
        Event("cudaLaunchKernel", torch.autograd.DeviceType.CPU),
        Event("a range", note=True),
        Event("fold_kernel"),
        Event("fold_kernel"),
    ]
    assert m.kernels_of(events) == {"attenuate_kernel": 1, "fold_kernel": 2}


def test_the_prediction_covers_every_target_and_is_labelled(capsys):
    assert r.main(["--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("PREDICTION for one H100, nothing was measured.")
    assert "assumed for an H100 SXM" in out
    assert "not measured" not in out
    table = out[out.index("predicted  ") :].splitlines()
    assert len(table) == 1 + 14
    with pytest.raises(ValueError, match="no ceilings for 'abacus'"):
        r.predict("abacus")


def test_a_slower_memory_is_predicted_to_take_longer():
    (bench, *_) = [one for one in suite.target_benches("cuda") if one.group == "attenuate"]
    rows = {}
    for name, bandwidth in (("fast", 2e12), ("slow", 1e12)):
        ceilings = Ceilings(bandwidth, {"float32": 1e15}, shortest=0.0)
        found = r.predicted_document([bench], ceilings, name)
        rows[name] = {row["candidate"]: row["seconds"]["median"] for row in found["results"]}
    for candidate, seconds in rows["slow"].items():
        assert seconds == pytest.approx(2 * rows["fast"][candidate])
    assert len(rows["slow"]) == len(bench.candidates)
