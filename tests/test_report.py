"""The deletion report: strict JSON, clean Markdown, a figure for every shape of model."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import re
import sys

import pytest
import torch
from helpers_models import llama, lora, pair_batch, t5
from trained_model import forget_batches, retain_batches, trained

import ucan_fast as uf
from ucan_fast.guidance import Separability
from ucan_fast.report import environment
from ucan_fast.strength import StrengthSearch

PNG = b"\x89PNG\r\n\x1a\n"
STATES = ("before", "U-CAN", "uniform", "random")


def no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def strict(text: str) -> dict:
    return json.loads(text, parse_constant=no_constant)


def made(**changes) -> uf.DeletionReport:
    """A report of made-up numbers, all different."""
    states = {}
    for index, state in enumerate(STATES):
        states[state] = {
            "forget/kl": 0.5 * index,
            "forget/prediction_shift": 11.0 * index,
            "forget/perplexity": 3.0 + index,
            "retain/loss": 1.25 + 0.125 * index,
            "retain/perplexity": 4.0 + index,
        }
    layers = {
        f"base_model.model.model.layers.{block}.{kind}": {
            "neurons": 10,
            "attenuated": block + number,
            "mean_factor": 0.9,
            "min_factor": 0.25,
        }
        for block in range(3)
        for number, kind in enumerate(["self_attn.q_proj", "mlp.up_proj"])
    }
    values = {
        "request": {
            "forget_tokens": 123,
            "retain_tokens": 4567,
            "forget_sequences": 12,
            "retain_from": "batches",
            "includes_previous_requests": False,
            "adapter": "default",
        },
        "config": uf.UcanConfig(),
        "change": {
            "neurons": 60,
            "attenuated": 9,
            "threshold": 0.0625,
            "largest_score": 0.75,
            "strength": 2.5,
            "fraction": 0.15,
            "note": "",
            "layers": layers,
        },
        "metrics": states,
        "notes": {},
        "search": StrengthSearch("strength", 0.05, 1.25, [(32.0, 2.0), (2.5, 1.3)], 2.5, 1.3, ""),
        "guidance": uf.Guidance("attenuate", "they are apart.", Separability(0.5, 0.3), 0.25),
        "seconds": {"collect": 1.5, "score": 0.25},
        "samples_per_second": 99.5,
        "fingerprint_before": "b" * 64,
        "fingerprint_after": "a" * 64,
        "environment": {"ucan_fast": uf.__version__, "torch": "x", "device": "cpu: x"},
    }
    return uf.DeletionReport(**{**values, **changes})


def tables(markdown: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of cells; all rows of one must have as many cells."""
    found, current = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            assert line.endswith("|"), line
            current.append([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif current:
            assert len({len(row) for row in current}) == 1, current
            found.append(current)
            current = []
        else:
            assert not re.search(r"(?<!\\)\|", line), line
    return found


def test_json_holds_every_field_and_parses_strictly():
    report = made()
    values = strict(report.to_json())
    fields = {f.name for f in dataclasses.fields(report)}
    assert set(values) == fields | {"format", "version", "disclaimer"}
    for name in fields - {"config", "search", "guidance"}:
        assert values[name] == getattr(report, name), name
    assert values["config"] == json.loads(report.config.to_json())
    assert values["guidance"] == dataclasses.asdict(report.guidance)
    assert values["search"]["curve"] == [[32.0, 2.0], [2.5, 1.3]]
    assert "not a formal guarantee" in values["disclaimer"]
    assert values["format"] == "ucan_fast.deletion_report"


def test_figures_that_are_not_finite():
    report = made()
    report.metrics["U-CAN"]["forget/perplexity"] = math.inf
    report.metrics["U-CAN"]["own"] = -math.inf
    report.metrics["random"]["forget/kl"] = math.nan
    report.metrics["uniform"]["forget/kl"] = None
    report.search.curve.append((1.0, math.nan))
    values = strict(report.to_json())
    assert values["metrics"]["U-CAN"]["forget/perplexity"] == "inf"
    assert values["metrics"]["U-CAN"]["own"] == "-inf"
    assert values["metrics"]["random"]["forget/kl"] is None
    assert values["search"]["curve"][-1] == [1.0, None]
    table = tables(report.to_markdown())[0]
    row = next(r for r in table if "perplexity of the forget" in r[0])
    assert row[2] == "inf"
    assert next(r for r in table if r[0].startswith("mean KL"))[3:] == ["n/a", "n/a"]


def test_markdown_tables_have_the_right_numbers_in_the_right_columns():
    report = made()
    metrics, search, layers = tables(report.to_markdown())
    assert metrics[0][1:3] == ["before", "U-CAN"]
    assert "whole adapter" in metrics[0][3]
    assert "random neurons" in metrics[0][4]
    rows = {row[0]: row[1:] for row in metrics[2:]}
    assert rows["mean KL(original ‖ edited) on forget positions, nats"] == ["0", "0.5", "1", "1.5"]
    assert rows["perplexity of the forget tokens"] == ["3", "4", "5", "6"]
    assert rows["mean retain loss, nats per token"] == ["1.25", "1.375", "1.5", "1.625"]
    assert search[0] == ["strength", "retain loss", "change"]
    assert search[2] == ["32", "2.0000", "+60.00 %"]
    assert search[3] == ["2.5", "1.3000", "+4.00 %"]
    assert [row[0] for row in layers[2:]] == list(report.change["layers"])
    assert layers[2][1:] == ["10", "0", "0.9000", "0.2500"]


def test_markdown_says_what_was_asked_what_changed_and_with_what():
    report = made()
    text = report.to_markdown()
    for piece in (
        "not a formal guarantee",
        "Forget 123 tokens of adapter `default`",
        "keep 4567",
        "9 of 60 neurons attenuated (15.0 %)",
        "strength 2.5",
        "threshold 0.0625",
        "may rise by 5 %",
        "+4.00 %",
        "Recommendation: **attenuate**. They are apart.",
        "99.5 sequences/s",
        "collect: 1.500 s",
        "b" * 64,
        "a" * 64,
        "seed: 0",
        uf.__version__,
        '"contrast": "symmetric"',
    ):
        assert piece in text, piece
    assert "Note" not in text
    assert "earlier requests included" not in text
    report.change["note"] = "something to know"
    report.request["includes_previous_requests"] = True
    report.notes["random"] = "could not reach it"
    text = report.to_markdown()
    assert "**Note:** something to know" in text
    assert "earlier requests included" in text
    assert "- random: could not reach it" in text


def test_metrics_of_the_caller_keep_their_names_and_the_table_whole():
    report = made()
    for number, state in enumerate(STATES):
        report.metrics[state]["p(item | user)"] = number / 8
    tables(report.to_markdown())
    metrics = tables(report.to_markdown())[0]
    row = next(r for r in metrics if r[0].startswith("p(item"))
    assert row[1:] == ["0", "0.125", "0.25", "0.375"]
    assert row[0].replace("\\|", "|") == "p(item | user)"


@pytest.mark.parametrize("before", [0.0, -1.0])
def test_a_loss_of_zero_or_less_is_reported(before):
    """A calibration function may return anything, 1 - recall for example."""
    search = StrengthSearch("strength", 0.05, before, [(2.0, before + 0.25)], 2.0, before + 0.25)
    text = made(search=search).to_markdown()
    assert tables(text)[1][2][1] == f"{before + 0.25:.4f}"
    # A rise is shown as one.
    assert tables(text)[1][2][2] == ("n/a" if before == 0 else "+25.00 %")


def test_without_metrics_and_without_search():
    report = made(metrics={}, search=None)
    text = report.to_markdown()
    assert "Not measured" in text
    assert len(tables(text)) == 1
    assert strict(report.to_json())["search"] is None


def layers_of(names: list[str]) -> dict:
    return {
        name: {"neurons": 8, "attenuated": i % 3, "mean_factor": 0.5, "min_factor": 0.1}
        for i, name in enumerate(names)
    }


SHAPES = {
    "one layer": ["base_model.model.model.layers.0.mlp.down_proj"],
    "30 blocks": [
        f"base_model.model.model.layers.{b}.{k}"
        for b in range(30)
        for k in ("self_attn.q_proj", "mlp.down_proj")
    ],
    "no numbers": ["base_model.model.first", "base_model.model.head.second"],
    "only a number": ["0", "1"],
    "shared": ["model.layers.0.q_proj + model.layers.1.q_proj"],
}


@pytest.mark.parametrize(
    ("shape", "suffix"), [*((shape, "png") for shape in SHAPES), ("30 blocks", "svg")]
)
def test_figures_of_all_shapes(shape, suffix, tmp_path):
    report = made()
    report.change["layers"] = layers_of(SHAPES[shape])
    path = tmp_path / f"figure.{suffix}"
    report.figure(path)
    content = path.read_bytes()
    assert len(content) > 5000
    assert content.startswith(PNG) if suffix == "png" else b"<svg" in content
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def drawn(report, monkeypatch) -> tuple:
    """The axes of the figure, before it is written."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: kept.append(self))
    report.figure("unused.png")
    return kept[0].axes


def test_the_picture_shows_each_layers_own_share(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    report = made()
    axes = drawn(report, monkeypatch)
    grid = axes[0].images[0].get_array()
    kinds = [label.get_text() for label in axes[0].get_yticklabels()]
    assert kinds == ["self_attn.q_proj", "mlp.up_proj"]
    assert grid.tolist() == [[0, 10, 20], [10, 20, 30]]


def test_the_picture_shows_before_and_after_where_they_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    axes = drawn(made(), monkeypatch)
    points = {c.get_label(): c.get_offsets().tolist()[0] for c in axes[1].collections}
    assert points["before"] == [0, 0]
    assert points["U-CAN"] == [0.125, 0.5]
    assert points["control: whole adapter scaled down"] == [0.25, 1.0]
    assert points["control: random neurons"] == [0.375, 1.5]


def test_experts_of_one_block_are_one_cell_of_their_mean(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    report = made()
    report.change["layers"] = {
        f"model.layers.0.mlp.experts.{e}.up_proj": {
            "neurons": 10,
            "attenuated": attenuated,
            "mean_factor": 1.0,
            "min_factor": 1.0,
        }
        for e, attenuated in enumerate([5, 1, 0])
    }
    axes = drawn(report, monkeypatch)
    assert axes[0].images[0].get_array().tolist() == [[20.0]]


@pytest.mark.parametrize("what", ["nothing measured", "no controls", "infinite"])
def test_figures_of_incomplete_reports(what, tmp_path):
    report = made()
    if what == "nothing measured":
        report = made(metrics={})
    elif what == "no controls":
        report = made(metrics={"before": {"forget/kl": 0.0}, "U-CAN": {"forget/kl": 1.0}})
    else:
        report.metrics["random"]["forget/kl"] = math.inf
        report.metrics["uniform"]["retain/loss"] = math.inf
    report.figure(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)


def test_save_writes_three_files(tmp_path):
    report = made()
    written = report.save(tmp_path / "new")
    names = ["deletion_report.json", "deletion_report.md", "deletion_report.png"]
    assert [p.name for p in written] == names
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == names
    assert (tmp_path / "new" / names[0]).read_text() == report.to_json()
    assert (tmp_path / "new" / names[1]).read_text() == report.to_markdown()


def test_save_without_matplotlib_writes_the_other_two(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = made()
    assert [p.suffix for p in report.save(tmp_path)] == [".json", ".md"]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".md"]
    with pytest.raises(uf.UcanError, match="pip install"):
        report.figure(tmp_path / "figure.png")


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    made().save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(Figure, "savefig", full)
    changed = made()
    changed.metrics["before"]["forget/kl"] = 7.0
    with pytest.raises(uf.UcanError, match=r"report.png.*No space left.*Nothing was changed"):
        changed.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_figure_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(uf.UcanError, match="could not write"):
        made().save(tmp_path / "file")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_real_request_reports_itself(kind, tmp_path):
    if kind == "llama":
        model = trained()
        forget, retain = forget_batches(), retain_batches(count=16)
    else:
        model = lora(t5(), r=4)
        with_labels = []
        for seed in (1, 2):
            batch = pair_batch([5, 7], [4, 6], seed=seed)
            labels = batch["decoder_input_ids"].clone()
            labels[batch["decoder_attention_mask"] == 0] = -100
            keys = ("input_ids", "attention_mask")
            with_labels.append([{**{k: batch[k] for k in keys}, "labels": labels}])
        forget, retain = with_labels
    result = uf.unlearn(model, forget=forget, retain=retain, config=uf.UcanConfig(strength=1.0))
    report = result.report
    values = strict(report.to_json())
    assert values["change"]["attenuated"] == result.plan.attenuated > 0
    assert values["change"]["neurons"] == result.plan.neurons
    layers = values["change"]["layers"]
    assert sum(v["attenuated"] for v in layers.values()) == result.plan.attenuated
    for name, factors in result.plan.factors.items():
        assert layers[name]["attenuated"] == int((factors != 1).sum())
        assert layers[name]["min_factor"] == pytest.approx(float(factors.min()))
        assert layers[name]["mean_factor"] == pytest.approx(float(factors.mean()), rel=1e-5)
    assert values["guidance"] == dataclasses.asdict(uf.guide(result.stats))
    assert values["fingerprint_before"] == result.stats.fingerprint
    assert values["fingerprint_after"] == result.plan.applied_fingerprint
    assert values["fingerprint_after"] != values["fingerprint_before"]
    assert values["request"]["forget_sequences"] == sum(len(b["input_ids"]) for b in forget)
    assert set(values["seconds"]) == {"collect", "score", "search strength", "evaluate"}
    assert all(seconds >= 0 for seconds in values["seconds"].values())
    assert values["samples_per_second"] > 0
    assert len(report.save(tmp_path)) == 3
    tables(report.to_markdown())


def test_the_environment_names_versions_and_the_device():
    import peft
    import transformers

    found = environment(lora(llama()))
    assert found["ucan_fast"] == uf.__version__
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (found["transformers"], found["peft"]) == (transformers.__version__, peft.__version__)
    assert found["device"].startswith("cpu")
