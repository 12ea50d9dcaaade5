"""Cells and delivered presets end to end, on the toy data set."""

from __future__ import annotations

import json

import pytest
import torch

import ucan_fast as uf
from benchmarks.quality import cell, delivered, tables
from benchmarks.quality import recommender as module
from benchmarks.quality.case import lora_weights
from benchmarks.quality.cell import attacks
from benchmarks.quality.recommender import make_case, make_request

from .quality_toy import TOY, toy

__all__ = ["toy"]


@pytest.fixture(autouse=True)
def known(toy, monkeypatch):
    """The toy is one of the data sets, and its trained recommender is in the cache."""
    monkeypatch.setitem(module.DATA_SETS, "toy", TOY)
    monkeypatch.setenv("UCAN_FAST_CACHE", str(toy.folder.parents[1]))


def test_a_cell_writes_what_tables_read(tmp_path):
    out = tmp_path / "toy.json"
    options = ["--data-set", "toy", "--scenario", "users", "--coarse"]
    methods = "uniform|U-CAN, input$|influence$|GradDiff$"
    assert cell.main([*options, "--methods", methods, "--out", str(out)]) == 0
    (found,) = tables.load([out])
    assert list(found["methods"]) == [
        *("uniform shrink (control)", "U-CAN, input", "influence", "GradDiff")
    ]
    assert all("error" not in row for row in found["methods"].values())
    assert set(found["bank_seconds"]) == {"moments", "factors"}
    assert {"excess", "noise", "all"} == set(found["scores"]["contrast"])
    # The command under the table makes the same file.
    words = found["command"].split()
    assert words[:3] == ["python", "-m", "benchmarks.quality.cell"]
    again = cell.parser().parse_args([w.strip("'") for w in words[3:5]])
    assert again.data_set == "toy"
    assert "--coarse" in words
    lines = tables.table([found], tables.COLUMNS)
    assert len(lines) == 3 + 4


def test_without_a_scenario_a_cell_only_trains(tmp_path, capsys):
    out = tmp_path / "none.json"
    assert cell.main(["--data-set", "toy", "--out", str(out)]) == 0
    assert not out.exists()


def test_attacks_compare_like_with_like(toy):
    model = toy.model()
    found = attacks(make_case(toy, make_request(toy, "genre"), model))
    # Too few never-seen users for a figure, or all four attacks.
    assert set(found) in (set(), {f"mia/{a}" for a in ("loss", "min-k", "min-k++", "zlib")})
    one = attacks(make_case(toy, make_request(toy, "one-user"), model))
    assert one == {}


def test_presets_as_delivered(toy, tmp_path, capsys):
    options = ["--data-set", "toy", "--scenarios", "users", "genre", "--out", str(tmp_path)]
    assert delivered.main(options) == 0
    found = tables.load(tmp_path.glob("*.json"), holding="presets")
    assert [document["scenario"] for document in found] == ["genre", "users"]
    for document in found:
        assert set(document["presets"]) == {"paper", "best"}
        best = document["presets"]["best"]
        assert best["seconds"] > 0
        assert {"forget", "calibration", "retain"} == set(best["drops"])
        assert document["guidance"]["recommendation"] in ("attenuate", "influence", "retrain")
    assert "advice:" in capsys.readouterr().out


def test_delivering_leaves_the_model_as_it_was(toy):
    model = toy.model()
    case = make_case(toy, make_request(toy, "genre"), model)
    everything = toy.data.batches(toy.recipe, toy.data.tuned_users)
    banks = {
        "moments": uf.collect(model, everything),
        "factors": uf.collect_factors(model, everything),
    }
    origin = {n: w.detach().clone() for n, w in lora_weights(model).items()}
    found = delivered.deliver(case, banks)
    assert found["presets"]["best"]["changed"]
    assert found["presets"]["best"]["drops"]["forget"] != 0
    assert all(torch.equal(w, origin[n]) for n, w in lora_weights(model).items())


def test_a_table_of_failures_is_still_json(tmp_path, monkeypatch):
    def broken(case):
        raise RuntimeError("no")
        yield

    monkeypatch.setattr(cell, "METHODS", (cell.METHODS[1].__class__("broken", broken),))
    out = tmp_path / "toy.json"
    assert cell.main(["--data-set", "toy", "--scenario", "users", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["methods"]["broken"] == {"error": "RuntimeError: no"}
