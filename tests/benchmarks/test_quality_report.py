"""Tables, the README's section, the page and the figures, from made-up result files."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks.measure import ROOT
from benchmarks.quality import __main__ as command
from benchmarks.quality import advice, report, seeds, summary, tables
from benchmarks.quality.advice import should_have_said
from benchmarks.quality.methods import METHODS
from benchmarks.quality.overview import SHOWN
from benchmarks.quality.report import (
    MARKERS,
    STYLES,
    Results,
    outdated,
    overviews,
    page,
    section,
    text_section,
    write,
)


def row(forget: float, retain: float = 2.0, **more):
    return {
        "backward": True,
        "needs": [],
        "settings": [{}],
        "setting": {},
        "best": 0,
        "curves": [[[1.0, 0.5, {"forget": forget, "retain": retain, "calibration": retain}]]],
        "at_budget": {b: [forget / n, "between"] for b, n in (("0.5", 10), ("1", 5), ("5", 1))},
        "peak_memory_bytes": 3 * 2**20,
        "value": 1.0,
        "seconds": 0.25,
        "drops": {"forget": forget, "retain": retain, "calibration": retain},
        "metrics": {"forget/kl": 0.125, "retain_train/recall@10": 0.4},
        "trade_off": {"strict_train": forget - retain, "paper": 9.0},
        **more,
    }


def document(seed: int = 0, scenario: str = "genre", data_set: str = "ml-100k"):
    names = [method.name for method in METHODS]
    methods = {name: row(10.0 + seed + i) for i, name in enumerate(names)}
    methods["SSD"] = {"error": "RuntimeError: no more"}
    return {
        "environment": {
            "hardware": "a machine",
            "threads": 1,
            "torch": "2",
            "peft": "0",
            "commit": "abc",
            "transformers": "5",
            "date": "2026-01-02T03:04:05",
        },
        "command": f"python -m benchmarks.quality.cell --seed {seed}",
        "data_set": data_set,
        "scenario": scenario,
        "seed": seed,
        "coarse": True,
        "share": command.PROFILES["quick"].share,
        "title": "all Horror films",
        "interactions": {"forget": 1234, "users": 9},
        "cases": {"forget": 40, "retain": 100},
        "recall@10": {"forget": 0.5, "retain": 0.4},
        "scores": {"contrast": {"excess": 0.05}},
        "before": {"forget/nll": 1.0, "retain_train/recall@10": 0.5},
        "bank_seconds": {"moments": 1.0},
        "total_seconds": 100.0,
        "methods": methods,
    }


@pytest.fixture
def documents():
    return [document(0), document(1), document(0, "users"), document(0, data_set="pantry")]


def cells(lines, name):
    found = [line for line in lines if line.startswith(f"| {name} |")]
    assert len(found) == 1, name
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def test_every_method_has_its_row_and_failures_say_why(documents):
    lines = tables.table(documents[:2], tables.COLUMNS)
    headings = [cell.strip() for cell in lines[0].strip("|").split("|")]
    for method in METHODS:
        if method.name != "SSD":
            cells(lines, method.name)
    (failed,) = [line for line in lines if line.startswith("| SSD (2 of 2 failed: RuntimeError")]
    assert set(failed.split("|")[2:-1]) == {" - "}
    first = cells(lines, "retraining")
    # Means over the seeds with their range; where both are the same too.
    assert first[headings.index("f@5")] == "10.5 [10.0, 11.0]"
    assert first[headings.index("time, s")] == "0.25 [0.25, 0.25]"
    assert first[headings.index("peak, MiB")] == "3 [3, 3]"
    assert first[headings.index("PPL")] == "-"
    assert cells(lines, "before")[headings.index("KL")] == "-"
    documents[1]["methods"]["NPO"]["at_budget"]["5"][1] = "first"
    documents[0]["methods"]["gates"]["at_budget"]["5"][1] = "end"
    lines = tables.table(documents[:2], tables.COLUMNS)
    assert cells(lines, "NPO")[headings.index("f@5")].startswith("(")
    assert cells(lines, "gates")[headings.index("f@5")].startswith("≥ ")
    assert cells(tables.table(documents[:1], tables.COLUMNS), "retraining")[3] == "10.0"


def test_one_seed_where_a_method_fails_counts_the_others(documents):
    documents[1]["methods"]["NPO"] = {"error": "ValueError: x"}
    lines = tables.table(documents[:2], tables.COLUMNS)
    (line,) = [line for line in lines if line.startswith("| NPO ")]
    assert "1 of 2 failed" in line
    alone = documents[0]["methods"]["NPO"]["at_budget"]["5"][0]
    assert f" {alone:.1f} " in line


def test_an_overview_marks_the_best_and_shows_the_gold_standard(documents):
    documents[0]["methods"]["influence"] = row(80.0)
    documents[1]["methods"]["influence"] = row(90.0)
    text = overviews(documents)
    lines = text.splitlines()
    genre = lines.index(next(line for line in lines if line.startswith("| | genre")))
    table = lines[genre : genre + 2 + len(SHOWN) + 1]
    assert cells(table, "influence")[1] == "**17.0 / 85.0**"
    assert sum("**" in cells(table, name)[1] for name in SHOWN if name != "SSD") == 1
    assert cells(table, "SSD")[1] == "-"
    assert cells(table, "retraining, forget drop")[1] == "10 (retain 2.0)"  # 10.5 to even
    assert "pantry" in text
    assert set(SHOWN) <= {m.name for m in METHODS}
    assert set(STYLES) <= {m.name for m in METHODS}


def test_baselines_are_shown_at_the_time_of_the_step_as_well(documents):
    def state(seconds, forget, calibration):
        return [1, seconds, {"forget": forget, "retain": 0.0, "calibration": calibration}]

    late, beyond = state(3.0, 95.0, 1.0), state(0.1, 94.0, 5.5)
    for found, other in zip(documents, (40.0, 20.0), strict=False):
        found["methods"]["influence"] = row(80.0, seconds=0.25)
        found["methods"]["influence, several steps"] = row(90.0, seconds=0.1)
        for name in ("GradDiff (KL)", "NPO", "gradient ascent"):
            found["methods"][name]["curves"] = [[late, beyond]]
        curves = [[state(0.1, 10.0, 0.0), late], [state(0.25, other, 5.0), beyond]]
        found["methods"]["GradDiff"]["curves"] = curves
    lines = overviews(documents[:2]).splitlines()
    assert cells(lines, "in the step's time: influence / best trained one")[1] == "80 / 30"
    steps = cells(lines, "in the steps' time: several steps / best trained one")
    assert steps[1] == "90 / 13"  # on the lines to 40 and 20 at 0.25 s, and 10 at 0.1 s


STEPS, FIFTH = "influence, several steps", "influence, several steps, a fifth of D_r each"


def at(document, name: str, at_1: float, at_5: float) -> None:
    document["methods"][name]["at_budget"] |= {"1": [at_1, "between"], "5": [at_5, "end"]}


def test_all_cells_in_one_table(documents):
    for found in documents:
        found["methods"]["retraining"] = row(80.0, 12.0)
        at(found, "influence", 60.0, 90.0)
        at(found, STEPS, 50.0, 90.0)
        at(found, FIFTH, 51.0, 91.0)
        at(found, "retraining", 99.0, 99.0)  # does not count
    documents[1]["methods"][FIFTH] = {"error": "ValueError: x"}
    for found, forget, retain in zip(documents, (60, 90, 82, 81), (-9, 1, 2, 3), strict=True):
        metrics = {"mia/loss": forget / 100, "retain_test/recall@10": 0.1}
        found["methods"][STEPS] |= {
            "drops": {"forget": forget, "retain": retain, "calibration": 0.0},
            "seconds": 2.0 + retain,
            "metrics": metrics,
        }
    documents[2]["scenario"] = "taste"  # never-seen data of another kind: no AUC
    lines = summary.over_all(documents).splitlines()
    first = cells(lines, STEPS)
    # At 5 % the fifth forgets more but is the same method; the one step at most as much.
    assert first[1:4] == ["4", "0", "4"]
    assert first[4:7] == ["2 [-20, 10]", "1.5 [-9.0, 3.0]", "3.5 [-7.0, 5.0]"]
    assert first[7] == "0.77 [0.60, 0.90]"
    assert first[8] == "0.100 [0.100, 0.100]"
    assert cells(lines, FIFTH)[1:4] == ["3", "0", "3"]
    assert cells(lines, "influence")[1:4] == ["4", "4", "1"]  # where the fifth is not there
    assert cells(lines, "retraining")[1:5] == ["4", "-", "-", "0 [0, 0]"]
    assert not any(line.startswith("| SSD") for line in lines)  # failed everywhere
    at(documents[0], "NPO", 1.0, 50.0)
    text = summary.judged_only(documents)
    # Several steps are first at 5 % in all four; in one the best baseline's curve ended before.
    assert "(at 1 % in 0 of 0, at 5 % in 1 of 4): it might forget more" in text
    for known, bound in (("between", 0), ("end", 1), ("first", 1)):
        documents[0]["methods"]["NPO"]["at_budget"]["5"][1] = known
        assert f"at 5 % in {bound} of 4)" in summary.judged_only(documents)
    # Only the second file has another seed than 0; the fifth is not there to be passed.
    assert "of the 1 other cells they are first in 0 at 1 % and in 1 at 5 %" in (
        summary.judged_only(documents)
    )
    chosen_on = [{**documents[1], "data_set": name, "seed": 2} for name in ("pantry", "ml-100k")]
    assert summary.judged_only(chosen_on[:1]) == ""
    assert "of the 1 other cells" in summary.judged_only(chosen_on)
    assert summary.judged_only(documents[2:]) == ""
    assert set(summary.ROWS) | set(summary.BASELINES) <= {m.name for m in METHODS}


def test_what_the_table_does_not_show_is_said(documents):
    rivals = ("gradient ascent", "one plain gradient step", "influence, diagonals")
    for found, steps in zip(documents, (3.0, 1.0, 5.0, 2.0), strict=True):
        found["methods"]["retraining"] = row(80.0, 2.0)
        found["methods"]["retraining"]["seconds"] = 2.0
        found["methods"][STEPS]["seconds"] = steps
        found["methods"] |= {name: row(1.0, 1.0) for name in ("gates", *rivals)}
        for name, at_5 in zip(("gates", *rivals), (20.0, 10.0, 20.0, 30.0), strict=True):
            at(found, name, 0.0, at_5)
    documents[2]["scenario"] = documents[3]["scenario"] = "taste"
    at(documents[3], "gates", 0.0, 40.0)
    kinds = [found["scenario"] for found in documents]
    text = summary.asides(documents)
    assert f"1 of 2 cells of {kinds[0]} (up to 1.5 times), 1 of 2 cells of taste (up to 2.5" in text
    assert "ascent in 4 of 4 cells, than one plain gradient step in 1 of 4 cells, than" in text
    assert "diagonals in 1 of 4 cells" in text
    for found in documents:
        found["methods"][STEPS]["seconds"] = 1.0
    assert "longer than retraining in no cell" in summary.asides(documents)
    del documents[0]["methods"][STEPS], documents[1]["methods"]["gates"]
    assert "diagonals in 1 of 3 cells" in summary.asides(documents)


def test_a_row_per_request(documents):
    for found, value in zip(documents, (10.0, 20.0, 30.0, 40.0), strict=True):
        for name in METHODS:
            if name.name != "SSD":
                at(found, name.name, 0.0, 0.0)
        at(found, "NPO", value / 2, value)
        at(found, STEPS, 1.0, 15.0)
        found["methods"]["NPO"]["seconds"] = value
    text = summary.by_request(documents, lambda d: f"{d['data_set']}, {d['scenario']}")
    lines = text.splitlines()
    # Two seeds of one request: means of 10 and 20; as much as several steps, so both are bold.
    genre = cells(lines, "ml-100k, genre")
    assert genre[1:3] == ["2", "**1.0 / ≥ 15.0**"]
    assert genre[5] == "NPO **7.5 / ≥ 15.0**"
    assert genre[7] == "10 (retain 2.0)"
    assert genre[8] == "0.25 / 15 / 0.25"
    users = cells(lines, "ml-100k, users")
    assert users[1:3] == ["1", "1.0 / ≥ 15.0"]
    assert users[5] == "NPO **15.0 / ≥ 30.0**"
    assert len(lines) == 2 + 3


def test_presets_against_retraining(documents):
    for found in documents:
        found["methods"]["retraining"] = row(80.0)

    def delivered(seed: int, forget: float, scenario: str = "genre"):
        row = {"drops": {"forget": forget, "retain": 4.0}, "seconds": 0.5}
        return {
            "data_set": "ml-100k",
            "scenario": scenario,
            "seed": seed,
            "presets": dict.fromkeys(("paper", "best", "thorough"), row),
        }

    three = [delivered(0, 90.0), delivered(1, 60.0), delivered(7, 10.0)]
    lines = summary.presets(three, documents).splitlines()
    # Seed 7 was never retrained: it counts where nothing is compared.
    assert cells(lines, '`"best"`')[1:4] == ["3", "60 [10, 90]", "-5 [-20, 10]"]
    assert summary.presets([], documents) == ""


def text(scenario: str, recipe: str, seed: int = 0):
    profile = {"name": "reduced", "blocks": 2, "candidates": 10, "title_tokens": 5}
    sizes = {"recipe": {"profile": profile}, "cases": {"forget": 40 + seed, "retain": 100}}
    return document(seed, scenario) | {"model": f"SmolLM2, {recipe}", **sizes}


def test_text_cases_stand_side_by_side_by_model(documents):
    cases = [text("genre", "all"), text("users", "all"), text("genre", "q/v")]
    cases[0]["methods"]["influence"]["at_budget"]["5"] = [61.0, "between"]
    results = Results(documents, texts=cases)
    lines = text_section(cases).splitlines()
    start = next(i for i, line in enumerate(lines) if "SmolLM2, all; reduced text" in line)
    assert lines[start + 2] == "| | genre | users |"
    row = next(line for line in lines[start:] if line.startswith("| influence |"))
    assert row.split(" | ")[1].endswith("/ 61.0**")
    assert sum("SmolLM2, q/v; reduced text" in line for line in lines) == 1
    (sizes,) = [line for line in lines if line.startswith("Text prompts: drops of")]
    assert "the last 2 of 30 blocks" in sizes
    assert "A prompt is up to 2.5 % of one seed's deleted side" in sizes
    assert "judged: genre, seed 0: 40 and 100; users, seed 0: 40 and 100." in sizes
    headings = [line for line in page(results).splitlines() if line.startswith("## SmolLM2")]
    assert len(headings) == 3


def test_seeds_of_a_text_case_stand_together(documents):
    cases = [text("genre", "all", seed) for seed in (0, 2)] + [text("users", "all", 2)]
    for case, forget in zip(cases, (10.0, 30.0, 80.0), strict=True):
        case["methods"]["influence"] = row(forget)
        case["methods"]["retraining"] = row(forget + 5)
    results = Results(documents, texts=cases)
    lines = page(results).splitlines()
    start = next(i for i, line in enumerate(lines) if "SmolLM2, all; reduced text" in line)
    assert "(seeds: genre 0, 2; users 2; a machine" in lines[start]
    influence = next(line for line in lines[start:] if line.startswith("| influence |"))
    assert [cell.split("/ ")[1].strip("* ") for cell in influence.split("|")[2:4]] == [
        "20.0",
        "80.0",
    ]
    assert "genre, seed 0: 40 and 100; genre, seed 2: 42 and 100; users, seed 2" in page(results)
    headings = [line for line in lines if line.startswith("## SmolLM2")]
    assert len(headings) == 2
    table = cells(lines[lines.index(headings[0]) :][:40], "influence")
    assert "20.0 [10.0, 30.0]" in table
    # A row each in the README, after the kinds of the small recommenders.
    kinds = seeds.by_kind(documents, cases).splitlines()
    assert cells(kinds, "SmolLM2, all, genre")[1:4] == ["2", "15 to 35", "2"]
    assert cells(kinds, "SmolLM2, all, users")[1:3] == ["1", "85"]
    assert len(kinds) == len(seeds.by_kind(documents).splitlines()) + 2
    # A panel each, a line per seed.
    panels = {f.name: f.data["panels"] for f in report.figures(results)}["quality-text"]
    assert [panel["scenario"] for panel in panels] == ["SmolLM2, all, genre", "SmolLM2, all, users"]
    assert [len(panel["curves"]["influence"]) for panel in panels] == [2, 1]


def test_the_page_shows_every_figure(documents):
    for texts in ([], [text("genre", "all")]):
        results = Results(documents, texts=texts)
        shown = page(results)
        names = [figure.name for figure in report.figures(results)]
        assert [name for name in names if f"]({name}.png)" in shown] == names
        assert shown.count("![") == len(names) == 2 + len(texts)


def test_the_page_names_how_to_reproduce_every_row(documents):
    text = page(Results(documents))
    for found in documents:
        assert f"`{found['command']}`" in text
    assert text.count("- seed") == len(documents)
    assert "commit abc, 2026-01-02" in text


def test_the_page_says_why_a_method_ended(documents):
    """Of the seed that it ended in, after how many states; files of before say nothing of it."""
    documents[1]["methods"]["influence, several steps"]["ended"] = "nothing left"
    text = page(Results(documents))
    assert text.count("ended after") == 1
    assert "- seed 1: influence, several steps ended after 1 of its states: nothing left" in text


def test_writing_and_finding_what_is_stale(tmp_path, documents):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    (tmp_path / "docs").mkdir()
    assert outdated(tmp_path, Results(documents))
    written = {path.name for path in write(tmp_path, Results(documents))}
    assert written == {"README.md", "quality.md", "quality-ml-100k.png", "quality-pantry.png"}
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("after\n")
    assert not outdated(tmp_path, Results(documents))
    assert not write(tmp_path, Results(documents))
    moved = copy.deepcopy(documents)
    moved[0]["methods"]["influence"]["curves"][0][0][2]["forget"] = 55.0
    assert outdated(tmp_path, Results(moved)) == ["quality-ml-100k"]


def test_reading_files(tmp_path, documents):
    for index, found in enumerate(reversed(documents)):
        (tmp_path / f"{index}.json").write_text(json.dumps(found))
    loaded = tables.load(tmp_path.glob("*.json"))
    assert [(d["data_set"], d["scenario"], d["seed"]) for d in loaded] == [
        *(("ml-100k", "genre", 0), ("ml-100k", "genre", 1), ("ml-100k", "users", 0)),
        ("pantry", "genre", 0),
    ]
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json holds no results"):
        tables.load([bad])


def test_presets_of_another_adapter_stand_beside_no_curves(tmp_path):
    for folder in ("quality", "delivered", "text", "in_a_row"):
        (tmp_path / folder).mkdir()
    both = {"data_set": "ml-100k", "scenario": "genre", "seed": 1}
    curves = {**both, "before": {"forget/nll": 1.5, "forget_train/recall@10": 0.3}}
    curves["methods"] = {"influence": {}}
    presets = {**both, "before": {"forget/nll": 1.5, "mia/loss": 0.5}, "presets": {"best": {}}}
    (tmp_path / "quality" / "one.json").write_text(json.dumps(curves))
    path = tmp_path / "delivered" / "one.json"
    path.write_text(json.dumps(presets))
    assert len(report.read(tmp_path).delivered) == 1
    presets["before"]["forget/nll"] = 1.500001
    path.write_text(json.dumps(presets))
    with pytest.raises(ValueError, match="ml-100k-genre-1: the presets were delivered on another"):
        report.read(tmp_path)
    path.write_text(json.dumps({**presets, "seed": 2}))  # nothing beside it
    report.read(tmp_path)


def test_the_repository_is_current():
    """README, page and figures show the committed results."""
    assert report.outdated(ROOT, report.read(ROOT / "benchmarks" / "results")) == []


def test_cells_that_are_there_are_kept(tmp_path, monkeypatch, capsys):
    jobs = []
    monkeypatch.setattr(command, "_all", lambda words, workers: jobs.append(words) or 0)
    kept = tmp_path / "ml-100k-0-genre.json"
    kept.write_text(json.dumps(document()))
    options = ["--out", str(tmp_path), "--scenarios", "genre", "users", "--seeds", "0", "1"]
    assert command.main([*options, "--data-sets", "ml-100k", "--workers", "1"]) == 0
    trained, cells = jobs
    assert trained == [["--data-set", "ml-100k", "--seed", str(seed)] for seed in (0, 1)]
    names = [words[words.index("--out") + 1].rpartition("/")[2] for words in cells]
    assert names == [f"ml-100k-{n}.json" for n in ("0-users", "1-genre", "1-users")]
    assert all("--coarse" in words for words in cells)
    out = capsys.readouterr().out
    assert "kept:" in out
    assert "| influence |" in out
    jobs.clear()
    command.main([*options, "--data-sets", "ml-100k", "--workers", "1", "--again"])
    assert len(jobs[1]) == 4
    # What was measured in another way, or with fewer methods, does not stand in.
    for changes in ({"share": 0.1}, {"methods": {"NPO": row(1.0)}}):
        kept.write_text(json.dumps(document() | changes))
        jobs.clear()
        command.main([*options, "--data-sets", "ml-100k", "--workers", "1"])
        assert len(jobs[1]) == 4, changes
    # What says more is not overwritten by what says less.
    for changes in ({"coarse": False}, {"share": 1.0}):
        kept.write_text(json.dumps(document() | changes))
        jobs.clear()
        assert command.main([*options, "--data-sets", "ml-100k", "--again"]) == 2
        assert not jobs
        assert "ml-100k-0-genre.json was measured on more users" in capsys.readouterr().err


def test_a_failing_cell_fails_the_run(tmp_path, capsys):
    options = ["--profile", "full", "--data-sets", "pantry", "--scenarios", "genre", "--seeds", "0"]
    assert command.main([*options, "--out", str(tmp_path)]) == 1  # no --data
    assert "name the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("attenuation", "shrinking", "step", "wanted"),
    [
        ((9.0, 2.0), 6.0, 90.0, "attenuate"),
        ((2.0, 9.0), 6.0, 10.0, "attenuate"),
        ((8.9, 2.0), 6.0, 50.0, "influence"),
        ((8.9, 2.0), 6.0, 49.9, "retrain"),
        # Neither forgets anything: no reason to attenuate.
        ((0.0, -5.0), 0.0, 90.0, "influence"),
        ((0.0, -5.0), -1.0, 10.0, "retrain"),
        ((0.5, -5.0), -1.0, 10.0, "attenuate"),
    ],
)
def test_what_the_curves_bear_out(attenuation, shrinking, step, wanted):
    found = document()
    for name, value in zip(("U-CAN, input", "U-CAN, mlp"), attenuation, strict=True):
        found["methods"][name]["at_budget"]["5"][0] = value
    found["methods"]["uniform shrink (control)"]["at_budget"]["5"][0] = shrinking
    found["methods"]["influence"]["at_budget"]["5"][0] = step
    assert should_have_said(found) == wanted
    del found["methods"]["influence"]
    assert should_have_said(found) is None


def test_presets_as_delivered_and_the_count_of_right_advice(documents):
    for found in documents:
        found["methods"]["U-CAN, mlp"]["at_budget"]["5"][0] = 1000.0  # attenuate is right

    def delivered(seed: int, advice: str, scenario: str = "genre"):
        row = {"drops": {"forget": 20.0 + seed, "retain": 4.0}, "seconds": 0.5}
        return {
            "data_set": "ml-100k",
            "scenario": scenario,
            "seed": seed,
            "environment": {"hardware": "a machine", "threads": 1},
            "presets": {
                "paper": row,
                "best": {**row, "seconds": 2.0},
                "thorough": {**row, "drops": {"forget": 70.0, "retain": -3.0}, "seconds": 40.0},
            },
            "guidance": {"recommendation": advice, "forget_share": 0.1},
        }

    results = Results(
        documents,
        [delivered(0, "attenuate"), delivered(1, "retrain"), delivered(0, "influence", "taste")],
    )
    text = page(results)
    assert (
        "| ml-100k, genre (seed 0, 1) | 20.5 / 4.0 | 0.5 | 20.5 / 4.0 | 2.0 | 70.0 / -3.0 | 40.0 "
        "| attenuate, retrain | attenuate, attenuate |"
    ) in text
    assert '| `"thorough"` | 3 | 70 [70, 70] |' in section(results)
    assert "| influence | - |" in text  # nothing to hold it against
    assert "right in 0 of 1 cases of ml-100k, and in 1 of 1 that" in text
    # Of the one case that nothing was chosen on: a tenth of the tokens is not beyond a tenth.
    assert "chosen on the advice was right in 0 of 1, size alone" in text
    assert "else *attenuate*) in 1 of 1." in text
    larger = delivered(1, "retrain")
    larger["guidance"]["forget_share"] = 0.101
    assert "else *attenuate*) in 0 of 1." in page(Results(documents, [larger]))


def test_the_advice_after_gradient_methods_is_counted(documents):
    def delivered(data_set: str, seed: int, share: float, note: str, forget: float):
        rows = {"thorough": {"drops": {"forget": forget, "retain": 0.0}, "note": note}}
        place = {"data_set": data_set, "scenario": "genre", "seed": seed}
        return {**place, "presets": rows, "guidance": {"forget_share": share}}

    for found in documents:
        found["methods"]["retraining"] = row(80.0)
        at(found, "influence", 10.0, 50.0 if found["seed"] == 0 else 49.0)
    ended = "ended after 3 influence steps: the forget set is known no better than its references."
    cases = [
        delivered("ml-100k", 0, 0.1, ended, 84.4),  # small, and half of it forgotten: right
        delivered("ml-100k", 1, 0.1, ended, 76.6),  # small, and less than that: wrong
        delivered("pantry", 0, 0.2, "", 60.0),  # large, and half: wrong
        delivered("pantry", 7, 0.2, "", 60.0),  # no curves
    ]
    text = advice.of_gradients(cases, documents)
    assert "right in 0 of 2 cases that nothing was chosen on (*influence* always: 1 of 2)" in text
    assert "and in 1 of 1 of ml-100k's seed 0." in text
    assert "seed 0. No forget set is between 10.0 and 20.0 % of the tokens: within" in text
    assert "ended where they aim in 2 of these requests: less theirs" in text
    assert "forget drop is -4 to 3 points there." in text
    assert "ended by the retain budget or their number in 1 of these requests" in text
    cases[1]["guidance"]["forget_share"] = 0.11
    assert "right in 1 of 2 cases" in advice.of_gradients(cases, documents)
