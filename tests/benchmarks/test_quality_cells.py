"""Cells and delivered presets end to end, on the toy data set."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import shlex

import pytest
import torch

import ucan_fast as uf
from benchmarks.quality import cell, delivered, in_a_row, tables
from benchmarks.quality import recommender as module
from benchmarks.quality.case import lora_weights
from benchmarks.quality.cell import attacks
from benchmarks.quality.recommender import make_case, make_request
from ucan_fast import UcanError
from ucan_fast.config import PRESETS

from .quality_toy import TOY, toy

__all__ = ["toy"]
ENDS = ("", "/low", "/high")


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
    words = shlex.split(found["command"])
    assert words[:3] == ["python", "-m", "benchmarks.quality.cell"]
    asked = vars(
        cell.parser().parse_args([*options, "--methods", methods, "--out", "build/toy.json"])
    )
    assert vars(cell.parser().parse_args(words[3:])) == asked
    lines = tables.table([found], tables.COLUMNS)
    assert len(lines) == 3 + 4


def test_rows_of_a_later_run_replace_those_of_a_file(tmp_path, capsys):
    out = tmp_path / "toy.json"
    options = ["--data-set", "toy", "--scenario", "users", "--coarse"]
    assert cell.main([*options, "--methods", "uniform|U-CAN, input$", "--out", str(out)]) == 0
    (first,) = tables.load([out])
    again = [*options, "--methods", "SSD$|uniform", "--into", str(out)]
    assert cell.main(again) == 0
    (second,) = tables.load([out])
    assert list(second["methods"]) == ["uniform shrink (control)", "U-CAN, input", "SSD"]
    assert second["methods"]["U-CAN, input"] == first["methods"]["U-CAN, input"]
    assert second["command"] == first["command"]
    (later,) = second["later"]
    assert later["methods"] == ["uniform shrink (control)", "SSD"]
    assert "--into benchmarks/results/quality/toy.json" in later["command"]
    # Once more: the earlier source has no row left.
    assert cell.main(again) == 0
    (third,) = tables.load([out])
    assert len(third["later"]) == 1
    # Another cell is refused, and the file stays as it is.
    kept = out.read_bytes()
    for wrong in (["--share", "0.5"], ["--seed", "1"]):
        assert cell.main([*again, *wrong]) == 1
        assert out.read_bytes() == kept
    broken = {**third, "recall@10": dict.fromkeys(third["recall@10"], 0.5)}
    out.write_text(json.dumps(broken))
    kept = out.read_bytes()
    assert cell.main(again) == 1
    assert "another model" in capsys.readouterr().err
    assert out.read_bytes() == kept


def test_without_a_scenario_a_cell_only_trains(tmp_path, capsys):
    out = tmp_path / "none.json"
    assert cell.main(["--data-set", "toy", "--out", str(out)]) == 0
    assert not out.exists()


def test_what_imports_made_is_set_aside_while_a_cell_runs():
    counts = []

    def run(_options):
        counts.append(gc.get_freeze_count())
        raise UcanError("no data")

    assert cell.measure(argparse.Namespace(into=None, out=None), run) == 1
    assert counts[0] > 0
    assert gc.get_freeze_count() == 0


def test_a_scenario_needs_a_file_and_a_share_of_users(tmp_path):
    options = ["--data-set", "toy", "--scenario", "users"]
    for wrong in (
        [],
        ["--out", str(tmp_path / "x"), "--share", "0"],
        ["--out", "x", "--share", "2"],
    ):
        with pytest.raises(SystemExit) as error:
            cell.main([*options, *wrong])
        assert error.value.code == 2


def test_attacks_on_enough_sequences(toy, monkeypatch):
    model = toy.model()
    monkeypatch.setattr(cell, "MIN_SEQUENCES", 2)
    monkeypatch.setattr("ucan_fast.membership.MIN_SEQUENCES", 2)
    case = make_case(toy, make_request(toy, "genre"), model)
    found = attacks(case)
    names = [f"mia/{a}{end}" for a in ("loss", "min-k", "min-k++", "zlib") for end in ENDS]
    assert list(found) == names
    assert found["mia/loss/low"] <= found["mia/loss"] <= found["mia/loss/high"]
    assert attacks(make_case(toy, make_request(toy, "one-user"), model)) == {}
    # Other errors are not taken for too few sequences.
    case.holdout[0]["input_ids"] = case.holdout[0]["input_ids"][:, :-1]
    with pytest.raises(UcanError):
        attacks(case)


def test_presets_as_delivered(toy, tmp_path, capsys):
    options = ["--data-set", "toy", "--scenarios", "users", "genre", "--out", str(tmp_path)]
    assert delivered.main(options) == 0
    found = tables.load(tmp_path.glob("*.json"), holding="presets")
    assert [document["scenario"] for document in found] == ["genre", "users"]
    for document in found:
        assert set(document["presets"]) == {"paper", "best", "thorough"}
        best = document["presets"]["best"]
        assert best["seconds"] > 0
        assert {"forget", "calibration", "retain"} == set(best["drops"])
        # The advice on the request is that of the statistics; every preset's report has its own.
        advice = document["guidance"]
        assert advice["separability"]["noise"] > 0
        assert document["presets"]["paper"]["guidance"] == advice
        for name in ("best", "thorough"):
            own = document["presets"][name].get("guidance")
            assert (own is not None) == document["presets"][name]["changed"]
            if own is not None:
                assert own["separability"] is None
                assert (own["still_known"] is None) == (name == "best")
                assert own["forget_share"] == pytest.approx(advice["forget_share"])
    assert "advice:" in capsys.readouterr().out


@pytest.fixture
def small_batches(toy, monkeypatch):
    """The toy with enough of them for some to be kept for the budget."""
    found = dataclasses.replace(toy, recipe=dataclasses.replace(toy.recipe, batch_size=4))
    monkeypatch.setattr(in_a_row, "load_recommender", lambda *_: found)
    # The first request on so little data would leave the second nothing of 2 %.
    monkeypatch.setitem(PRESETS["thorough"], "max_retain_loss_increase", 0.3)
    return found


@pytest.mark.usefixtures("small_batches")
def test_requests_in_a_row(tmp_path, capsys):
    options = ["--data-set", "toy", "--requests", "2", "--out", str(tmp_path)]
    assert in_a_row.main(options) == 0
    (found,) = tables.load(tmp_path.glob("*.json"), holding="requests")
    first, second = found["requests"]
    assert first["users"] + second["users"] == found["at once"]["users"]
    assert first["forget"][0] > 0
    # The data of the second had not been asked for yet.
    assert second["forget"][1] > first["forget"][1]
    assert len(found["at once"]["forget"]) == 2
    printed = capsys.readouterr().out
    assert "| toy, seed 0 |" in printed
    text = in_a_row.section([found])
    assert found["command"] in text
    assert in_a_row.table([found]) in text
    with pytest.raises(SystemExit):
        in_a_row.main([*options, "--requests", "1"])
    assert "at least 2" in capsys.readouterr().err


def sequences(batches) -> set[tuple[int, ...]]:
    return {
        tuple(row[mask.bool()].tolist())
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }


def test_a_row_of_requests_leaves_the_model_at_its_origin(small_batches, monkeypatch):
    models, real = [], small_batches.model

    def kept():
        models.append(real())
        return models[-1]

    monkeypatch.setattr(small_batches, "model", kept)
    asked, answer = [], in_a_row._answer

    def spied(model, forget, **options):
        asked.append({"forget": forget, **options})
        return answer(model, forget, **options)

    monkeypatch.setattr(in_a_row, "_answer", spied)
    in_a_row.compare(small_batches, 2)
    # No request runs the data that the budget is measured on, nor those of who left before.
    assert len(asked) == 3
    gone = set()
    for request in asked[:2]:
        gone |= sequences(request["forget"])
        assert not sequences(request["retain"]) & (gone | sequences(asked[0]["calibration"]))
        assert request["calibration"] is asked[0]["calibration"]
    assert sequences(asked[2]["forget"]) == gone
    origin = real()
    pairs = zip(lora_weights(models[0]).values(), lora_weights(origin).values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


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
