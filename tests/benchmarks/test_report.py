"""The README's section, the details and the figures, from invented results."""

from __future__ import annotations

import pytest

from benchmarks import figures as f
from benchmarks import measure as m
from benchmarks import report as r

from .synthetic import case, document

COLLECT = {"model": "SmolLM2-135M", "blocks": 4, "tokens": 2048, "groups": "both groups"}
README = f"# Title\n\nBefore.\n\n{r.BEGIN}\nold\n{r.END}\n\nAfter.\n"
CPU_TIMES = {
    "peft, plain forward": [1.0, 1.0, 1.0],
    "peft + hooks, mask matmul": [1.6, 1.6, 1.6],
    "peft + hooks, boolean index": [2.2, 2.2, 2.2],
    "ucan_fast": [1.1, 1.1, 1.1],
}

DELETION = {
    "ucan_fast, both sets": [9.0],
    "ucan_fast, bank": [0.1],
    "peft, plain forward, both sets": [0.01],
}


def _scaling(model: str = "Llama", along: str = "tokens") -> list[list[m.Result]]:
    cases = []
    for tokens in (100, 200, 400, 800):
        shape = {"model": model, "varied": f"{along} varied", along: tokens}
        times = {"retrain": [0.01 * tokens] * 3, "ucan_fast, bank": [0.5] * 3}
        rows = case("scaling", shape, times)
        for row, value in zip(rows, (1.0, 0.0), strict=True):
            row.extra["slope"] = {"along": along, "value": value}
        cases.append(rows)
    return cases


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _write(folder, **changes) -> None:
    attenuate = {"weights": "200 small matrices", "elements": 10}
    one_user = {"model": "demo", "request": "one user"}
    document(
        folder / "cpu.json",
        case("collect", COLLECT, CPU_TIMES, extra={"timing": "wall", "tokens_per_second": 1234.5}),
        case(
            "attenuate",
            attenuate,
            {"mul_ loop": [3.0] * 3, "ucan_fast": [1.0] * 3},
            bytes=50,
            flops=25,
            roofline_seconds=0.5,
        ),
        case("deletion", one_user, DELETION),
        case("scores", {"layers": 3}, {"loop": [1.0] * 3, "ucan_fast": [4.0] * 3}),
        *_scaling(),
        skipped=[
            *(m.Skipped("scores", f"case {i}", "other", "not here") for i in (1, 2)),
            m.Skipped("scores", "case 1", "wrong", "is wrong", failed=True),
        ],
        **changes,
    )


def _load(folder) -> r.Results:
    return r.load(folder.glob("*.json"))


@pytest.fixture
def quick_figures(monkeypatch):
    """Empty figures: drawing takes a second each."""
    for name in ("draw_ratios", "draw_roofline", "draw_scaling"):
        monkeypatch.setattr(f, name, lambda _canvas, _data: None)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "README.md").write_text(README)
    results = tmp_path / "results"
    results.mkdir()
    _write(results)
    return tmp_path


def test_the_section_starts_with_the_figures_that_decide(root):
    text = r.section(_load(root / "results"))
    head = text.splitlines()
    assert head[0] == "## What it buys"
    assert head[2] == "| | 2 cores of an A CPU | GPU |"
    rows = head[4:8]
    assert "after `uf.accelerate(model)`" in rows[0]
    assert "**1.10x** [1.10, 1.10] its time" in rows[0]
    assert rows[1].startswith("| without `accelerate` | not measured |")
    assert "**1.45x** [1.45, 1.45] faster (mask products), **2.00x**" in rows[2]
    assert "**90x** [90, 90] faster" in rows[3]
    assert head[8] == ""
    assert all("not measured on a GPU yet" in row for row in rows)


def test_a_prediction_is_shown_as_one_until_a_gpu_was_measured(root):
    text = r.section(_load(root / "results"))
    assert "**Not measured on a GPU yet.** The table is a *prediction*" in _one_line(text)
    assert "| figure | predicted | target | |" in text
    document(
        root / "results" / "gpu.json",
        case("collect", {**COLLECT, "model": "Llama-2-7B"}, CPU_TIMES),
        device="cuda",
    )
    text = r.section(_load(root / "results"))
    assert "prediction" not in text
    assert "not measured on a GPU yet" not in text
    assert "| | 2 cores of an A CPU | A GPU |" in text
    assert "**falls short** (not measured: the case is in none of the files)" in text


def test_rows_that_lose_are_named_and_kept(root):
    text = _one_line(r.section(_load(root / "results")))
    assert "**Where it loses**: in 1 of" in text
    assert "- CPU: scores, layers=3 float32: loop takes 0.25 of the time" in text
    kept = r.details(_load(root / "results"))
    assert "| ucan_fast | 4 s | 0.25x [0.25, 0.25] | - | - |" in kept


def test_provenance_stands_with_the_tables(root):
    results = _load(root / "results")
    for text in (r.section(results), r.details(results)):
        for words in ("A CPU", "torch 2.13.0", "peft 0.21.2", "0123456789ab", "2026-11-01"):
            assert words in _one_line(text)
        assert "`make bench-quick`" in _one_line(text)
    for figure in r.device_figures(results, "cpu"):
        for words in ("A CPU", "torch 2.13.0", "0123456789ab", "2026-11-01", "make bench-quick"):
            assert words in figure.data["caption"]


def test_details_hold_every_row_and_every_reason(root):
    text = r.details(_load(root / "results"))
    document_ = m.read_results(root / "results" / "cpu.json")
    for row in document_["results"]:
        assert f"| {row['candidate']}" in text
        assert row["case"] in text
    assert "- scores: other: not here (2 cases)" in text
    assert "- scores: wrong: failed: is wrong" in text
    assert "| 1,234 |" in text
    # Predicted 0.5 s, measured 1 s.
    assert "| ucan_fast | 1 s | 3.00x [3.00, 3.00] | 500 ms | 2.00 |" in text


def test_the_newest_file_of_a_case_counts(root):
    _write(root / "results", date="2026-11-01T00:00:00+00:00")
    times = {**CPU_TIMES, "ucan_fast": [1.3, 1.3, 1.3]}
    document(
        root / "results" / "z-newer.json",
        case("collect", COLLECT, times),
        date="2026-11-02T00:00:00+00:00",
    )
    results = _load(root / "results")
    text = r.section(results)
    assert "**1.30x** [1.30, 1.30] its time" in text
    assert "**1.10x**" not in text
    # The rest still comes from the older one.
    assert "**90x**" in text
    assert len([case_ for case_ in results.cases["cpu"] if case_.group == "collect"]) == 1


@pytest.mark.usefixtures("quick_figures")
def test_only_the_section_of_the_readme_changes_and_the_rest_is_checked(root):
    results = _load(root / "results")
    assert r.outdated(root, results) == [
        "the performance section of README.md",
        "docs/benchmarks.md",
        "docs/bench-cpu-ratios.png",
        "docs/bench-cpu-roofline.png",
        "docs/bench-cpu-scaling.png",
    ]
    written = r.write(root, results)
    assert len(written) == 5
    readme = (root / "README.md").read_text()
    assert readme.startswith("# Title\n\nBefore.\n\n" + r.BEGIN)
    assert readme.endswith(r.END + "\n\nAfter.\n")
    assert "old" not in readme.split(r.BEGIN)[1].split(r.END)[0].split()
    assert r.outdated(root, results) == []
    assert r.write(root, results) == []


@pytest.mark.usefixtures("quick_figures")
def test_each_thing_that_is_out_of_date_is_found(root):
    results = _load(root / "results")
    r.write(root, results)
    readme = root / "README.md"
    good = readme.read_text()
    readme.write_text(good.replace("**90x**", "**91x**"))
    assert r.outdated(root, results) == ["the performance section of README.md"]
    readme.write_text(good.replace("Before.", "Something else."))
    assert r.outdated(root, results) == []
    (root / "docs" / "bench-cpu-roofline.png").unlink()
    (root / "docs" / "bench-cuda-ratios.png").write_bytes(b"")
    assert r.outdated(root, results) == [
        "docs/bench-cpu-roofline.png",
        "docs/bench-cuda-ratios.png (no longer made)",
    ]
    r.write(root, results)
    # New results: everything that shows them is out of date.
    _write(root / "results", hardware="Another CPU")
    assert len(r.outdated(root, _load(root / "results"))) == 5


def test_the_markers_must_be_there():
    assert r.replaced(f"a {r.BEGIN} b {r.END} c", "new\n") == f"a {r.BEGIN}\nnew\n{r.END} c"
    for broken in ("", r.BEGIN, f"{r.END}{r.BEGIN}", f"{r.BEGIN}{r.BEGIN}{r.END}"):
        with pytest.raises(ValueError, match="once each"):
            r.replaced(broken, "new")


def test_nothing_measured_is_said_so(root):
    empty = r.Results()
    text = r.section(empty)
    assert text.count("not measured on a GPU yet") >= 3
    assert "not measured" in text
    assert "Nothing was measured yet." in r.details(empty)
    assert r.device_figures(empty, "cpu") == []


@pytest.mark.usefixtures("quick_figures")
def test_the_check_exits_with_one(root, monkeypatch, capsys):
    monkeypatch.setattr(r, "ROOT", root)
    (root / "benchmarks").mkdir()
    (root / "results").rename(root / "benchmarks" / "results")
    assert r.main(["--check"]) == 1
    assert "out of date: docs/benchmarks.md" in capsys.readouterr().out
    assert r.main([]) == 0
    assert r.main(["--check"]) == 0
    (root / "README.md").write_text("no markers")
    assert r.main(["--check"]) == 2


def test_figures_hold_what_was_measured(root):
    ratios, roofline, scaling = r.device_figures(_load(root / "results"), "cpu")
    bars = {entry["title"]: {b[0]: b[1] for b in entry["bars"]} for entry in ratios.data["cases"]}
    collect = next(bars[title] for title in bars if title.startswith("collect"))
    assert collect == pytest.approx(
        {"peft + hooks, mask matmul": 1.6 / 1.1, "peft + hooks, boolean index": 2.0}
    )
    assert {(p["ours"], p["intensity"], p["rate"]) for p in roofline.data["points"]} == {
        (False, 0.5, 25 / 3),
        (True, 0.5, 25.0),
    }
    (panel,) = scaling.data["panels"]
    assert panel["xlabel"] == "tokens of the whole data set"
    curves = {curve["name"]: curve for curve in panel["curves"]}
    assert [point[0] for point in curves["retrain"]["points"]] == [100, 200, 400, 800]
    assert curves["retrain"]["slope"] == 1.0
    assert curves["ucan_fast, bank"]["ours"]


def test_the_model_that_most_was_varied_of_is_drawn(root):
    wide = (*_scaling("wide"), *_scaling("wide", "rank"))
    document(root / "results/full.json", *wide, command="python -m benchmarks --profile full")
    results = _load(root / "results")
    scaling = r.device_figures(results, "cpu")[2]
    assert [(p["title"], p["xlabel"]) for p in scaling.data["panels"]] == [
        ("wide", "tokens of the whole data set"),
        ("wide", "rank of the adapter"),
    ]
    assert len(scaling.data["caption"].splitlines()) == 1  # not of the file that is not drawn
    assert "--profile full" in scaling.data["caption"]
    # The other is on the page.
    assert "Llama tokens varied" in r.details(results)


def test_what_the_scaling_curves_leave_out_is_said(root, monkeypatch):
    text = _one_line(r.section(_load(root / "results")))
    assert (
        "The quick profile varies the tokens of the whole data set; growth with the tokens of the "
        "forget set and the blocks of the model and the rank of the adapter is left out there and "
        "measured by `make bench` alone."
    ) in text
    monkeypatch.setattr(r, "_ALONG", {"tokens": "tokens of the whole data set"})
    assert "The quick profile varies" not in _one_line(r.section(_load(root / "results")))


def test_every_figure_can_be_drawn(root):
    for figure in r.device_figures(_load(root / "results"), "cpu"):
        assert figure.write(root / "docs").stat().st_size > 5000


def test_a_figure_knows_its_data(tmp_path):
    def draw(canvas, data):
        canvas.subplots().plot(data["y"])

    one = f.Figure("a", {"y": [1, 2]}, draw)
    assert not one.is_current(tmp_path)
    path = one.write(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert one.is_current(tmp_path)
    assert not f.Figure("a", {"y": [1, 3]}, draw).is_current(tmp_path)


def test_what_is_committed_is_current():
    # After new results or targets: make report.
    assert r.outdated(m.ROOT, r.load((m.ROOT / "benchmarks" / "results").glob("*.json"))) == []
