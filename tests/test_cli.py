"""The command line: what it writes, what it refuses, and its exit codes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import helpers_models as hm
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trained_model import (
    as_lines,
    as_text,
    forget_batches,
    save_project,
    tokenizer,
    write_lines,
)

import ucan_fast as uf
from ucan_fast import cli, files
from ucan_fast import factors as influence_factors
from ucan_fast.audit import audit as library_audit
from ucan_fast.jsonl import read_jsonl
from ucan_fast.report import REPORT

WEIGHTS = "adapter_model.safetensors"
STRENGTH = ("--strength", "2")
# All that an audit needs, so that nothing but the option under test is wrong.
AUDIT = ("audit", "--base", "b", "--adapter", "a", "--unlearned", "u", "--forget", "f")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """base, adapter, the sets, a bank over all of them, and one finished request."""
    folder = save_project(tmp_path_factory.mktemp("project"))
    assert run(folder, "collect", data="all.jsonl", out="bank.safetensors")[0] == 0
    code, _, err = run(
        folder, "unlearn", "--keep-original", *STRENGTH, forget="forget.jsonl",
        retain="retain.jsonl", out="done",
    )  # fmt: skip
    assert code == 0, err
    return folder


class Tee:
    """Collects what is printed, also before pytest's own fixtures exist."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return False


def run(folder: Path, command: str, *flags: str, model: bool = True, **paths) -> tuple:
    """``ucan-fast command`` in process; paths are inside the folder unless absolute.

    Returns exit code, stdout, stderr.
    """
    arguments = [command]
    if model:
        paths = {"base": "base", "adapter": "adapter", **paths}
    for name, path in paths.items():
        if path is not None:
            arguments += [f"--{name}", str(folder / path)]
    out, err, saved = Tee(), Tee(), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = out, err
    try:
        code = cli.main([*arguments, *map(str, flags)])
    finally:
        sys.stdout, sys.stderr = saved
    assert "Traceback" not in out.text + err.text
    return code, out.text, err.text


@pytest.fixture
def out(tmp_path):
    """A folder that does not exist yet, in an otherwise empty one."""
    return tmp_path / "place" / "out"


def unlearn(project, out, *flags, forget="forget.jsonl", retain="retain.jsonl", **paths):
    return run(project, "unlearn", *flags, forget=forget, retain=retain, out=out, **paths)


def nothing_left(out: Path) -> bool:
    """Neither the folder nor a temporary one beside it."""
    return not out.parent.exists() or not list(out.parent.iterdir())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    # Copies: what load_file returns is the file itself, and tests write over it.
    return {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}


def assert_same_adapter(one: Path, two: Path) -> None:
    first, second = adapter_of(one), adapter_of(two)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def load(project: Path, adapter: Path) -> peft.PeftModel:
    """As any user of PEFT would."""
    base = transformers.AutoModelForCausalLM.from_pretrained(project / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing or unexpected weights
        return peft.PeftModel.from_pretrained(base, adapter)


# unlearn


def test_unlearn_writes_an_ordinary_adapter_that_is_the_plan_applied(project):
    done = project / "done"
    names = {p.name for p in done.iterdir()}
    assert {
        WEIGHTS,
        "adapter_config.json",
        "ucan_plan.safetensors",
        "ucan_statistics.safetensors",
        REPORT,
        "deletion_report.md",
        "deletion_report.png",
    } <= names
    plan = uf.AttenuationPlan.load(done / "ucan_plan.safetensors")
    assert plan.attenuated > 20
    origin, edited = adapter_of(project / "adapter"), adapter_of(done)
    assert set(origin) == set(edited)
    for name, factors in plan.factors.items():
        a, b = (f"{name}.lora_{which}.weight" for which in "AB")
        assert torch.equal(edited[a], origin[a] * factors), name
        assert torch.equal(edited[b], origin[b]), name
    # PEFT reads it, and it behaves as the plan applied to the original does.
    model, other = load(project, done), load(project, project / "adapter")
    plan = uf.AttenuationPlan.load(done / "ucan_plan.safetensors")
    plan.apply(other)
    ids = torch.tensor([[1, 4, 9, 20, 30]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_unlearn_equals_the_library(project, out):
    code, text, err = unlearn(project, out)
    assert (code, err) == (0, "")
    model = load(project, project / "adapter")
    uf.accelerate(model)
    batches = {n: read_jsonl(project / f"{n}.jsonl", None) for n in ("forget", "retain")}
    result = uf.unlearn(model, **batches)
    expected = peft.get_peft_model_state_dict(model)
    for name, value in adapter_of(out).items():
        assert torch.equal(value, expected[name]), name
    report = json.loads((out / REPORT).read_text())
    assert report["metrics"] == json.loads(result.report.to_json())["metrics"]
    assert report["search"] == json.loads(result.report.to_json())["search"]
    assert (out / "deletion_report.md").read_text().startswith("# Deletion report")
    # What is printed: the summary, the table of the four states, and where it lies.
    assert f"{result.plan.attenuated} of {result.plan.neurons} neurons attenuated" in text
    header = next(line for line in text.splitlines() if line.split()[:1] == ["before"])
    assert header.split() == ["before", "U-CAN", "uniform", "random"]
    row = next(line for line in text.splitlines() if line.startswith("forget/kl")).split()
    values = [state["forget/kl"] for state in result.report.metrics.values()]
    assert [float(cell) for cell in row[1:]] == pytest.approx(values, rel=1e-3)
    assert str(out) in text.splitlines()[-1]


def test_the_original_is_untouched_and_kept_only_on_request(project, out):
    before = snapshot(project / "adapter")
    assert unlearn(project, out, *STRENGTH, "--no-evaluate")[0] == 0
    assert snapshot(project / "adapter") == before
    origin = adapter_of(project / "adapter")
    changed = [n for n, v in adapter_of(out).items() if not torch.equal(v, origin[n])]
    # Without --keep-original no file holds the overwritten values.
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                assert not any(
                    tensor.shape == origin[n].shape and torch.equal(tensor, origin[n])
                    for n in changed
                ), (path.name, key)
    plan = uf.AttenuationPlan.load(out / "ucan_plan.safetensors")
    model = load(project, out)
    with pytest.raises(uf.UcanError, match="no original values"):
        plan.undo(model)
    # With it, undo works from the files alone.
    kept = uf.AttenuationPlan.load(project / "done" / "ucan_plan.safetensors")
    model = load(project, project / "done")
    kept.undo(model)
    state = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(state[n], v) for n, v in origin.items())


def test_a_bank_replaces_the_retain_set(project, out):
    code, text, _ = unlearn(
        project, out, *STRENGTH, retain=None, bank="bank.safetensors", calibration="retain.jsonl"
    )
    assert code == 0
    one, two = (
        uf.AttenuationPlan.load(f / "ucan_plan.safetensors") for f in (out, project / "done")
    )
    # The bank holds the second forget set too, so the retain sets differ by it.
    assert one.attenuated > 0
    retain = out.parent / "retain.jsonl"
    retain.write_text(
        (project / "second.jsonl").read_text() + (project / "retain.jsonl").read_text()
    )
    direct = out.parent / "direct"
    assert unlearn(project, direct, *STRENGTH, retain=retain)[0] == 0
    two = uf.AttenuationPlan.load(direct / "ucan_plan.safetensors")
    assert torch.equal(one.flat_factors != 1, two.flat_factors != 1)
    first, second = adapter_of(out), adapter_of(direct)
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=1e-4, atol=1e-7), name
    report = json.loads((out / REPORT).read_text())
    assert report["request"]["retain_from"] == "bank"
    assert set(report["metrics"]) == {"before", "U-CAN", "uniform", "random"}
    assert "random" in text


@pytest.mark.parametrize("strength", ["2", "auto"])
def test_previous_equals_one_request_with_the_union(project, out, strength):
    options = ["--strength", strength, "--no-evaluate"]
    paths = {"retain": None, "bank": "bank.safetensors", "calibration": "retain.jsonl"}
    first, second, union = (out.parent / name for name in ("first", "second", "union"))
    assert unlearn(project, first, *options, **paths)[0] == 0
    code, _, err = unlearn(
        project, second, *options, forget="second.jsonl", previous=first, **paths
    )
    assert code == 0, err
    assert unlearn(project, union, *options, forget="union.jsonl", **paths)[0] == 0
    assert_same_adapter(second, union)
    assert any(not torch.equal(v, adapter_of(first)[n]) for n, v in adapter_of(second).items())
    assert json.loads((second / REPORT).read_text())["request"]["includes_previous_requests"]


def test_text_through_the_saved_tokenizer_equals_input_ids(project, out):
    sets = {}
    for name in ("forget", "retain"):
        lines = [json.loads(line) for line in (project / f"{name}.jsonl").read_text().splitlines()]
        out.parent.mkdir(exist_ok=True)
        sets[name] = write_lines(out.parent / f"{name}.jsonl", as_text(lines))
    assert unlearn(project, out, *STRENGTH, "--no-evaluate", **sets)[0] == 0
    assert_same_adapter(out, project / "done")


def test_text_with_a_tokenizer_from_elsewhere(project, out, tmp_path):
    bare, words = tmp_path / "bare", tmp_path / "words"
    shutil.copytree(project / "base", bare, ignore=shutil.ignore_patterns("token*", "special*"))
    words.mkdir()
    for path in (project / "base").glob("token*"):
        shutil.copy(path, words)
    text = write_lines(tmp_path / "text.jsonl", [{"text": "i4 i5 i9 i7"}, {"text": "i8 i13"}])
    code, _, err = unlearn(project, out, *STRENGTH, base=bare, forget=text)
    assert code == 1
    assert f"{text}:1" in err
    assert "--tokenizer" in err
    assert unlearn(project, out, *STRENGTH, base=bare, forget=text, tokenizer=words)[0] == 0
    assert unlearn(project, out.parent / "ids", *STRENGTH, base=bare)[0] == 0


def test_options_reach_the_configuration(project, out):
    config = out.parent / "config.json"
    config.parent.mkdir()
    config.write_text('{"site": "output", "fraction": 0.3, "floor": 0.125, "seed": 4}')
    code, *_ = unlearn(
        project, out, "--site", "rank", "--decay", "linear", "--contrast", "difference",
        "--max-retain-loss-increase", "0.02", "--seed", "9", config=config,
    )  # fmt: skip
    assert code == 0
    written = json.loads((out / REPORT).read_text())["config"]
    expected = uf.UcanConfig(
        site="rank",
        decay="linear",
        contrast="difference",
        max_retain_loss_increase=0.02,
        seed=9,
        fraction=0.3,
        floor=0.125,
    )
    assert written == json.loads(expected.to_json())


def test_a_configuration_with_a_byte_order_mark(project, out):
    config = out.parent / "config.json"
    config.parent.mkdir()
    config.write_bytes(b'\xef\xbb\xbf{"strength": 2.0}')
    assert unlearn(project, out, "--no-evaluate", config=config)[0] == 0
    assert_same_adapter(out, project / "done")


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="no /dev/fd, as bash's <(...) uses it")
def test_a_configuration_that_can_be_read_once(project, out):
    reader, writer = os.pipe()
    with open(writer, "w") as file:
        file.write('{"strength": 2.0}')
    try:
        assert unlearn(project, out, "--no-evaluate", config=f"/dev/fd/{reader}")[0] == 0
    finally:
        os.close(reader)
    assert_same_adapter(out, project / "done")


def test_a_preset_is_where_options_start_from(project, out):
    code, *_ = unlearn(project, out, "--preset", "best", "--seed", "3")
    assert code == 0
    written = json.loads((out / REPORT).read_text())["config"]
    assert written == json.loads(uf.UcanConfig.preset("best", seed=3).to_json())
    several = uf.UcanConfig.preset("thorough", influence_steps=2)
    options = ["--preset", "thorough", "--influence-steps", "2", "--overwrite"]
    assert unlearn(project, out, *options)[0] == 0
    assert json.loads((out / REPORT).read_text())["config"] == json.loads(several.to_json())
    options += ["--influence-batches", "1"]
    assert unlearn(project, out, *options)[0] == 0
    assert json.loads((out / REPORT).read_text())["config"]["influence_batches"] == 1
    # A file says everything: it and a preset exclude each other.
    assert unlearn(project, out, "--preset", "best", config="base/config.json")[0] == 2


@pytest.mark.parametrize("name", cli.FIELDS)
def test_every_option_that_names_a_field_sets_it(name):
    """Of the configuration; by its default's name no value would be missed."""
    values = {
        "method": "influence",
        "influence_variant": "diagonal",
        "influence_steps": 3,
        "influence_batches": 2,
        "influence_rank": 8,
        "influence_blocks": 1,
        "site": "mlp",
        "contrast": "none",
        "decay": "linear",
        "fraction": 0.25,
        "max_retain_loss_increase": 0.5,
        "seed": 7,
    }
    needed = {
        "influence_batches": ["--preset", "thorough"],
        "influence_steps": ["--preset", "best"],
        "influence_variant": ["--method", "influence"],
        "influence_rank": ["--method", "influence"],
        "influence_blocks": ["--method", "influence"],
    }
    words = ["--base", "b", "--adapter", "a", "--forget", "f", "--retain", "r", "--out", "o"]
    option = f"--{name.replace('_', '-')}"
    arguments = cli._parser().parse_args(
        ["unlearn", *words, *needed.get(name, []), option, str(values[name])]
    )
    assert getattr(cli._config(arguments, cli._start(arguments)), name) == values[name]


@pytest.mark.parametrize(
    ("given", "unread", "method"),
    [
        (("--preset", "best", "--site", "mlp"), "--site", "'influence' (--preset best)"),
        (("--preset", "thorough", "--decay", "hard"), "--decay", "'influence' (--preset thorough)"),
        (("--method", "gates", "--contrast", "none"), "--contrast", "'gates'"),
        (("--method", "gates", "--decay", "hard"), "--decay", "'gates'"),
        (("--influence-variant", "diagonal"), "--influence-variant", "'attenuate'"),
        (("--method", "attenuate", "--influence-steps", "3"), "--influence-steps", "'attenuate'"),
        (("--method", "gates", "--influence-variant", "all"), "--influence-variant", "'gates'"),
        (
            ("--method", "gates", "--site", "mlp", "--influence-rank", "3"),
            "--influence-rank, --site, which is for method 'attenuate' or 'influence'",
            "'gates'",
        ),
    ],
)
def test_an_option_that_the_method_does_not_read_is_no_silent_wish(
    project, out, given, unread, method
):
    code, _, err = unlearn(project, out, *given)
    assert code == 2
    assert f"method {method} does not read {unread}" in err
    assert not out.exists()


def test_a_method_that_does_not_read_the_preset_or_the_file(project, out):
    code, _, err = unlearn(project, out, "--preset", "best", "--method", "gates", "--seed", "1")
    assert code != 2, err  # nothing of it is for the influence step alone
    code, _, err = unlearn(project, out, "--preset", "thorough", "--method", "attenuate")
    assert code == 2
    assert (
        "--preset thorough sets damping=0.03, retain_gradient_weight=2.0, influence_steps=20, "
        in err
    )
    assert "which --method attenuate does not read: leave one out" in err
    config = out.parent / "other.json"
    config.parent.mkdir(exist_ok=True)
    config.write_text('{"site": "mlp"}')
    code, _, err = unlearn(project, out, "--method", "influence", config=config)
    assert code == 2
    assert f"--config {config} sets site='mlp', which --method influence does not read" in err


def test_a_budget_that_nothing_is_searched_in_is_no_silent_wish(project, out):
    budget = ["--max-retain-loss-increase", "0.001"]
    code, _, err = unlearn(project, out, "--strength", "8", *budget)
    assert code == 2
    assert "with a strength of 8 nothing is searched" in err
    config = out.parent / "config.json"
    config.parent.mkdir(exist_ok=True)
    config.write_text('{"strength": 2.5}')
    code, _, err = unlearn(project, out, *budget, config=config)
    assert code == 2
    assert "with a strength of 2.5 nothing is searched" in err
    assert not out.exists()
    assert unlearn(project, out, *budget, "--strength", "auto", config=config)[0] == 0


def test_no_evaluate(project, out):
    code, text, _ = unlearn(project, out, *STRENGTH, "--no-evaluate")
    assert code == 0
    assert json.loads((out / REPORT).read_text())["metrics"] == {}
    assert "forget/kl" not in text


def test_warnings_are_one_line_each(project, out):
    code, _, err = unlearn(
        project, out, *STRENGTH, "--contrast", "none", "--fraction", "0.9", "--no-evaluate"
    )
    assert code == 0
    assert err.startswith("warning: this plan attenuates")
    assert "more than half" in err
    assert len(err.splitlines()) == 1


def test_a_plan_that_changes_nothing_is_refused(project, out):
    code, _, err = unlearn(project, out, retain="forget.jsonl")
    assert code == 1
    assert "refused: the plan changes nothing" in err
    assert "indistinguishable" in err
    assert nothing_left(out)


# --out


@pytest.mark.parametrize("kind", ["folder", "file", "empty folder"])
def test_an_existing_out_is_refused_and_untouched(project, out, kind, monkeypatch):
    out.parent.mkdir()
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("mine")
    before = snapshot(out.parent)
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("refused before any work"))
    code, _, err = unlearn(project, out, *STRENGTH)
    assert code == 1
    assert str(out) in err
    assert "exists" in err
    assert snapshot(out.parent) == before
    if kind == "file":
        assert unlearn(project, out, *STRENGTH, "--overwrite")[0] == 1
        assert snapshot(out.parent) == before


def earlier_output(out: Path) -> None:
    """What --overwrite may replace."""
    out.mkdir(parents=True)
    for name in ("mine", "ucan_plan.safetensors", REPORT):
        (out / name).write_text("mine")


def test_overwrite_replaces_the_folder(project, out):
    earlier_output(out)
    assert unlearn(project, out, *STRENGTH, "--overwrite", "--no-evaluate")[0] == 0
    assert not (out / "mine").exists()
    assert_same_adapter(out, project / "done")
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == out.parent.stat().st_mode & 0o777


def full(*_args, **_options):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for(kind: str):
    return lambda tensors, path, metadata: (
        full() if metadata["format"] == kind else save_file(tensors, path, metadata)
    )


FULL = {
    "adapter": lambda patch: patch(peft.PeftModel, "save_pretrained", full),
    "statistics": lambda patch: patch(files, "save_file", full_for("ucan_fast.statistics")),
    "plan": lambda patch: patch(files, "save_file", full_for("ucan_fast.plan")),
    "report": lambda patch: patch(uf.DeletionReport, "to_json", full),
    "figure": lambda patch: patch("matplotlib.figure.Figure.savefig", full),
    "rename": lambda patch: patch(
        files.os, "replace", lambda a, b: full() if Path(b).name == "out" else REPLACE(a, b)
    ),
}
REPLACE = files.os.replace


@pytest.mark.parametrize("step", list(FULL))
@pytest.mark.parametrize("exists", [False, True], ids=["new", "overwrite"])
def test_a_full_disk_leaves_what_was_there(project, out, step, exists, monkeypatch):
    if exists:
        earlier_output(out)
    before = snapshot(out) if exists else None
    FULL[step](monkeypatch.setattr)
    flags = ["--overwrite"] if exists else []
    if step == "rename" and exists:
        # Only the last step fails: the old folder was moved aside and must come back.
        calls = []

        def last(a, b):
            if Path(b) == out and ".old." not in str(a):
                calls.append(1)
                full()
            return REPLACE(a, b)

        monkeypatch.setattr(files.os, "replace", last)
    code, _, err = unlearn(project, out, *STRENGTH, "--no-evaluate", *flags)
    assert code == 1
    assert "could not write" in err
    assert "No space left" in err
    if exists:
        assert snapshot(out) == before
        assert [p.name for p in out.parent.iterdir()] == ["out"]
    else:
        assert nothing_left(out)


def test_an_interrupt_leaves_what_was_there(project, out, monkeypatch):
    earlier_output(out)
    before = snapshot(out)

    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(uf.DeletionReport, "save", interrupted)
    code, _, err = unlearn(project, out, *STRENGTH, "--overwrite", "--no-evaluate")
    assert (code, err) == (130, "ucan-fast unlearn: interrupted\n")
    assert snapshot(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("present", [[], ["ucan_plan.safetensors"], [REPORT]])
def test_overwrite_replaces_no_foreign_folder(project, out, present, no_loading):
    out.mkdir(parents=True)
    for name in ["mine", *present]:
        (out / name).write_text("mine")
    before = snapshot(out)
    code, _, err = unlearn(project, out, *STRENGTH, "--overwrite")
    assert code == 1
    assert f"{out} is no earlier output" in err
    assert snapshot(out.parent) == {f"out/{name}": text for name, text in before.items()}


def test_overwrite_fills_an_empty_folder(project, out):
    out.mkdir(parents=True)
    assert unlearn(project, out, *STRENGTH, "--overwrite", "--no-evaluate")[0] == 0
    assert_same_adapter(out, project / "done")


@pytest.fixture
def no_loading(monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("refused before any work"))


# Where --out points, in a project folder whose every folder looks like an earlier output.
NEAR = [
    *(".", "base", "adapter", "adapter/new", "done", "done/new", "words", "words/new"),
    *("link/adapter", "link", "sets", "link/adapter/new", "forget.jsonl/new", "hidden"),
]


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("near", NEAR)
def test_an_out_folder_among_the_inputs_is_refused(spoilt, near, flags, no_loading):
    for name in ("words", "sets", "hidden"):
        (spoilt / name).mkdir()
    (spoilt / "config.json").write_text("{}")
    shutil.move(spoilt / "retain.jsonl", spoilt / "sets" / "retain.jsonl")
    # An input that is a link: the folder with the link must stay too.
    (spoilt / "hidden" / "second.jsonl").symlink_to(spoilt / "second.jsonl")
    for folder in (spoilt, *(p for p in spoilt.iterdir() if p.is_dir())):
        for name in ("ucan_plan.safetensors", REPORT):
            (folder / name).touch()
    (spoilt / "link").symlink_to(spoilt)
    before = snapshot(spoilt)
    code, _, err = unlearn(
        spoilt, spoilt / near, *STRENGTH, *flags, retain="sets/retain.jsonl", previous="done",
        tokenizer="words", calibration="hidden/second.jsonl", config="config.json",
    )  # fmt: skip
    assert code == 1
    assert err.startswith("ucan-fast unlearn: refused: ")
    if near != "link" and (flags or near.endswith("new")):
        assert f"--out {spoilt / near} and --" in err
    assert snapshot(spoilt) == before


@pytest.mark.parametrize("what", ["retain", "bank", "calibration", "config", "forget"])
def test_an_out_folder_that_holds_one_input_is_refused(spoilt, out, what, no_loading):
    earlier_output(out)
    source = {"bank": "bank.safetensors", "config": None}.get(what, f"{what}.jsonl")
    if what == "calibration":
        source = "retain.jsonl"
    if source is None:
        (out / "input").write_text("{}")
    else:
        shutil.copy(spoilt / source, out / "input")
    paths = {what: out / "input", **({"retain": None} if what == "bank" else {})}
    before = snapshot(out)
    code, _, err = unlearn(spoilt, out, *STRENGTH, "--overwrite", **paths)
    assert code == 1
    assert f"--out {out} and --{what} {out / 'input'} must not" in err
    # The same through a link from elsewhere.
    link = out.parent / "link"
    link.symlink_to(out / "input")
    code, _, err = unlearn(spoilt, out, *STRENGTH, "--overwrite", **{**paths, what: link})
    assert code == 1
    assert f"--out {out} and --{what} {link} must not" in err
    assert snapshot(out) == before


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_as_out_is_refused(project, out, there, no_loading):
    target = out.parent / "target"
    earlier_output(target)
    out.symlink_to(target if there else out.parent / "nowhere")
    before = snapshot(target)
    runs = {
        "unlearn": lambda *flags: unlearn(project, out, *STRENGTH, *flags),
        "collect": lambda *flags: run(project, "collect", *flags, data="all.jsonl", out=out),
        "audit": lambda *flags: audit(project, *flags, out=out),
    }
    for command in runs.values():
        for flags in ([], ["--overwrite"]):
            code, _, err = command(*flags)
            assert code == 1
            assert f"{out} is a symbolic link" in err
    assert snapshot(target) == before
    assert out.is_symlink()


@pytest.mark.parametrize(
    "near",
    ["all.jsonl", "adapter/adapter_model.safetensors", "base/config.json", "base", "twin"],
)
def test_an_out_file_among_the_inputs_is_refused(spoilt, near, no_loading):
    (spoilt / "twin").hardlink_to(spoilt / "all.jsonl")
    before = snapshot(spoilt)
    for flags in ([], ["--overwrite"]):
        code, _, err = run(spoilt, "collect", *flags, data="all.jsonl", out=near)
        assert code == 1
        assert str(spoilt / near) in err
        code, _, err = audit(spoilt, *flags, forget="all.jsonl", out=near)
        assert code == 1
        assert str(spoilt / near) in err
    code, _, err = audit(spoilt, "--overwrite", out=f"done/{REPORT}")
    assert code == 1
    assert "belongs to --unlearned" in err
    assert snapshot(spoilt) == before


def test_a_new_file_inside_the_adapter_folder_is_fine(spoilt):
    assert run(spoilt, "collect", data="all.jsonl", out="adapter/bank.safetensors")[0] == 0
    assert audit(spoilt, out="done/audit.json")[0] == 0


# Refusals


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def renamed_tensors(path: Path, rename) -> None:
    """The file with every name rewritten; tensors named None are left out."""
    tensors = {rename(n): value.clone() for n, value in load_file(path).items()}
    tensors.pop(None, None)
    save_file(tensors, path, {"format": "pt"})


def pickled(folder: Path, content) -> None:
    """An adapter_model.bin of this content."""
    (folder / WEIGHTS).unlink()
    path = folder / "adapter_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)


def other_adapter(folder: Path) -> None:
    tensors = adapter_of(folder)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def without_a_layer(folder: Path) -> None:
    tensors = adapter_of(folder)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def fewer_layers(base: Path) -> None:
    path = base / "config.json"
    config = {**json.loads(path.read_text()), "num_hidden_layers": 1}
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))


def edit_config(folder: Path, *, file: str = "adapter_config.json", **changes) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# What is spoilt in a copy of the project, the options, and what the message must name.
BANKED = {"retain": None, "bank": "bank.safetensors"}
REFUSED = {
    "truncated bank": (lambda p: truncate(p / "bank.safetensors"), BANKED, "bank.safetensors"),
    "empty bank": (lambda p: (p / "bank.safetensors").write_bytes(b""), BANKED, "bank.safetensors"),
    "bank that is a plan": (
        lambda p: shutil.copy(p / "done" / "ucan_plan.safetensors", p / "bank.safetensors"),
        BANKED,
        "bank.safetensors is no ucan_fast.statistics",
    ),
    "no bank": (lambda p: (p / "bank.safetensors").unlink(), BANKED, "bank.safetensors does not"),
    "bank of another adapter": (lambda p: other_adapter(p / "adapter"), BANKED, "different adapt"),
    "bank of too little": (
        lambda p: shutil.copy(p / "small.safetensors", p / "bank.safetensors"),
        BANKED,
        "not contained in the bank",
    ),
    "malformed forget set": (
        lambda p: (p / "forget.jsonl").write_text('{"input_ids": [4, 5]}\n{"input_ids": [4\n'),
        {},
        "forget.jsonl:2",
    ),
    "misspelt key in the forget set": (
        lambda p: (p / "forget.jsonl").write_text('{"input_ids": [4, 5], "token_group": [1, 0]}'),
        {},
        "forget.jsonl:1: unknown key 'token_group'",
    ),
    "truncated retain set": (lambda p: truncate(p / "retain.jsonl"), {}, "retain.jsonl:"),
    "empty forget set": (
        lambda p: (p / "forget.jsonl").write_text(""),
        {},
        "forget.jsonl holds no",
    ),
    "no forget set": (lambda p: (p / "forget.jsonl").unlink(), {}, "forget.jsonl does not exist"),
    "binary calibration set": (
        lambda p: (p / "bin").write_bytes(b"\x00\xff\xfe\n"),
        {"calibration": "bin"},
        "bin:1",
    ),
    "ids beyond the vocabulary": (
        lambda p: (p / "retain.jsonl").write_text('{"input_ids": [4, 5]}\n{"input_ids": [4, 40]}'),
        {},
        "retain.jsonl:2",
    ),
    "nothing of the forget group": (
        lambda p: (p / "forget.jsonl").write_text('{"input_ids": [4, 5], "token_groups": [1, 1]}'),
        {},
        "forget set is empty",
    ),
    "truncated adapter": (lambda p: truncate(p / "adapter" / WEIGHTS), {}, "adapter"),
    "adapter without a layer": (lambda p: without_a_layer(p / "adapter"), {}, "lora_A"),
    "adapter for more layers": (lambda p: fewer_layers(p / "base"), {}, "layers.1."),
    "adapter without weights": (lambda p: (p / "adapter" / WEIGHTS).unlink(), {}, "adapter"),
    "adapter of another rank": (lambda p: edit_config(p / "adapter", r=3), {}, "adapter"),
    "adapter for other layers": (
        lambda p: edit_config(p / "adapter", target_modules=["nowhere"]),
        {},
        "nowhere",
    ),
    "adapter of no known kind": (
        lambda p: edit_config(p / "adapter", peft_type="FUTURE"),
        {},
        "cannot load the adapter",
    ),
    "malformed adapter config": (
        lambda p: (p / "adapter" / "adapter_config.json").write_text("{oops"),
        {},
        "cannot load the adapter",
    ),
    "no adapter": (lambda p: shutil.rmtree(p / "adapter"), {}, "cannot load the adapter"),
    "truncated base": (
        lambda p: truncate(p / "base" / "model.safetensors"),
        {},
        "cannot load the base model",
    ),
    "malformed base config": (
        lambda p: (p / "base" / "config.json").write_text("{oops"),
        {},
        "cannot load the base model",
    ),
    "base without a matrix": (
        lambda p: renamed_tensors(
            p / "base" / "model.safetensors", lambda n: None if "1.mlp.up_proj" in n else n
        ),
        {},
        "no weights for model.layers.1.mlp.up_proj.weight; give",
    ),
    "base without its head": (
        lambda p: renamed_tensors(
            p / "base" / "model.safetensors", lambda n: None if "lm_head" in n else n
        ),
        {},
        "no weights for lm_head.weight; give",
    ),
    "base of other names": (
        lambda p: renamed_tensors(p / "base" / "model.safetensors", lambda n: f"module.{n}"),
        {},
        "no weights for lm_head.weight and 20 more; give",
    ),
    "base of other shapes": (
        lambda p: edit_config(p / "base", file="config.json", vocab_size=41),
        {},
        "by its config.json lm_head.weight has the shape (41, 32), in its file (40, 32); give",
    ),
    "base of an unknown activation": (
        lambda p: edit_config(p / "base", file="config.json", hidden_act="nope"),
        {},
        "base: its config.json or a file of its weights is damaged or holds what does not belong "
        "there (KeyError: 'nope').",
    ),
    "base of an unknown dtype": (
        lambda p: edit_config(p / "base", file="config.json", dtype="nope"),
        {},
        "(AttributeError: module 'torch' has no attribute 'nope')",
    ),
    "base of impossible heads": (
        lambda p: edit_config(p / "base", file="config.json", num_attention_heads=3),
        {},
        "cannot load the base model",
    ),
    "adapter whose pattern is none": (
        lambda p: edit_config(p / "adapter", target_modules="((("),
        {},
        "'(((' in its adapter_config.json or the file of its weights is no regular expression",
    ),
    "adapter of an impossible rank": (
        lambda p: edit_config(p / "adapter", r="four"),
        {},
        "adapter: its adapter_config.json or the file of its weights is damaged or holds what does "
        "not belong there (TypeError",
    ),
    "adapter config nested too deeply": (
        lambda p: (p / "adapter" / "adapter_config.json").write_text("[" * 100_000),
        {},
        "not belong there (RecursionError",
    ),
    "adapter of junk": (lambda p: pickled(p / "adapter", b"junk"), {}, "there (error: unpack"),
    "empty adapter": (lambda p: pickled(p / "adapter", b""), {}, "there (EOFError: no more is"),
    "adapter of a list": (
        lambda p: pickled(p / "adapter", [1]),
        {},
        "(AttributeError: 'list' object",
    ),
    "adapter of code": (
        lambda p: pickled(p / "adapter", {"a": Path("x")}),
        {},
        "(UnpicklingError: it holds more than tensors)",
    ),
    "half a character in the forget set": (
        lambda p: (p / "forget.jsonl").write_text('{"text": "i4 \\ud83d i5"}'),
        {},
        "forget.jsonl:1: the text holds \\ud83d",
    ),
    "no base": (lambda p: shutil.rmtree(p / "base"), {}, "cannot load the base model"),
    "unknown key in the config": (
        lambda p: (p / "config.json").write_text('{"sight": "input"}'),
        {"config": "config.json"},
        "unknown field 'sight'",
    ),
    "value out of range in the config": (
        lambda p: (p / "config.json").write_text('{"fraction": 5}'),
        {"config": "config.json"},
        "fraction",
    ),
    "config nested too deeply": (
        lambda p: (p / "config.json").write_text("[" * 100_000),
        {"config": "config.json"},
        "config.json: UcanConfig: not valid JSON",
    ),
    "malformed config": (
        lambda p: (p / "config.json").write_text("{oops"),
        {"config": "config.json"},
        "not valid JSON",
    ),
    "binary config": (
        lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"),
        {"config": "config.json"},
        "config.json",
    ),
    "no config": (lambda p: None, {"config": "config.json"}, "config.json"),
    "previous without statistics": (
        lambda p: (p / "done" / "ucan_statistics.safetensors").unlink(),
        {"previous": "done"},
        "ucan_statistics.safetensors does not exist",
    ),
    "previous with truncated statistics": (
        lambda p: truncate(p / "done" / "ucan_statistics.safetensors"),
        {"previous": "done"},
        "ucan_statistics.safetensors",
    ),
    "previous of another adapter": (
        lambda p: other_adapter(p / "adapter"),
        {"previous": "done"},
        "different adapters",
    ),
    "the previous output as the adapter": (
        lambda p: None,
        {"adapter": "done", "previous": "done"},
        "done is an unlearned adapter already",
    ),
    "no tokenizer there": (lambda p: None, {"tokenizer": "nowhere"}, "tokenizer"),
}
FLAGS = {
    "unknown site": (["--site", "everywhere"], "site"),
    "site that the model lacks": (["--site", "mlp"], "mlp"),
    "negative strength": (["--strength", "-1"], "strength"),
    "fraction out of range": (["--fraction", "1.5"], "fraction"),
    "seed beyond 64 bits": (["--seed", str(2**64)], "seed must be an integer in"),
    "unknown dtype": (["--dtype", "int3"], "--dtype"),
    "unknown device": (["--device", "abacus"], "abacus"),
    "no such CUDA device": (["--device", "cuda:77"], "cuda:77"),
    "a device without values": (["--device", "meta"], "--device meta"),
}


@pytest.fixture
def spoilt(project, tmp_path):
    """A copy of the project, to be spoilt."""
    return shutil.copytree(project, tmp_path / "copy")


def test_the_copy_is_good(spoilt, out):
    assert unlearn(spoilt, out, *STRENGTH, "--no-evaluate")[0] == 0


@pytest.mark.parametrize("what", list(REFUSED))
def test_bad_input_is_refused_by_name(spoilt, out, what):
    if what == "bank of too little":
        assert run(spoilt, "collect", data="second.jsonl", out="small.safetensors")[0] == 0
    spoil, paths, message = REFUSED[what]
    spoil(spoilt)
    before = snapshot(spoilt)
    code, text, err = unlearn(spoilt, out, *STRENGTH, "--no-evaluate", **paths)
    assert code == 1, err
    assert err.startswith("ucan-fast unlearn: refused: ")
    assert message in err
    assert text == ""
    assert snapshot(spoilt) == before
    assert nothing_left(out)


@pytest.mark.parametrize("what", list(FLAGS))
def test_bad_options_are_refused_by_name(project, spoilt, out, what):
    flags, message = FLAGS[what]
    if what == "site that the model lacks":
        edit_config(spoilt / "adapter", target_modules=["q_proj", "v_proj"])
        kept = {
            n: v for n, v in adapter_of(spoilt / "adapter").items()
            if "q_proj" in n or "v_proj" in n
        }  # fmt: skip
        save_file(kept, spoilt / "adapter" / WEIGHTS, {"format": "pt"})
        assert unlearn(spoilt, out.parent / "fine", *STRENGTH, "--no-evaluate")[0] == 0
        shutil.rmtree(out.parent)
    code, _, err = unlearn(spoilt, out, "--no-evaluate", *flags)
    assert code == 1
    assert err.startswith("ucan-fast unlearn: refused: ")
    assert message in err
    assert nothing_left(out)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["forget"],
        ["unlearn"],
        ["unlearn", "--nothing"],
        ["collect", "--base", "b", "--adapter", "a", "--data", "d"],
        ["audit", "--base", "b", "--adapter", "a"],
        [*AUDIT, "--relearn-steps", "-1"],
        [*AUDIT, "--relearn-steps", "ten"],
        [*AUDIT, "--seed", "x"],
        ["unlearn", "--strength", "strong"],
        ["unlearn", "--batch-size", "0"],
        ["doctor", "--loud"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("paths", [{"retain": None}, {"bank": "bank.safetensors"}])
def test_exactly_one_of_retain_and_bank(project, out, paths):
    code, _, err = unlearn(project, out, *STRENGTH, **paths)
    assert code == 2
    assert "exactly one of --retain and --bank" in err
    assert nothing_left(out)
    out.mkdir(parents=True)
    (out / "mine").write_text("mine")
    assert unlearn(project, out, *STRENGTH, **paths)[0] == 2


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (None, ["unlearn", "collect", "audit", "doctor", "Exit code: 0 done, 1 refused", "text"]),
        (
            "unlearn",
            ["--forget", "--retain", "--bank", "--overwrite", "input_ids", "not overlap", "labels"],
        ),
        ("collect", ["--data", "--sites", "--group", "token_groups"]),
        (
            "audit",
            ["--unlearned", "ORIGINAL", "Exit code", "--holdout", "never saw", "no proof"],
        ),
        ("doctor", ["--json"]),
    ],
)
def test_help_explains(command, words, capsys):
    assert cli.main([command, "--help"] if command else ["--help"]) == 0
    text = capsys.readouterr().out
    for word in words:
        assert word in text


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"ucan-fast {uf.__version__}"


def test_a_head_that_is_tied_is_not_missing(tmp_path):
    base = hm.gpt2()
    model = hm.lora(base)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    assert not any("lm_head" in name for name in load_file(weights))
    # What the model has no place for is no fault.
    tensors = {"optimizer.step": torch.zeros(1), **load_file(weights)}
    save_file({n: value.clone() for n, value in tensors.items()}, weights, {"format": "pt"})
    write_lines(tmp_path / "set.jsonl", [{"input_ids": [5, 6, 7]}])
    code, _, err = run(tmp_path, "collect", data="set.jsonl", out="bank")
    assert (code, err) == (0, "")
    # The embedding that the head is tied to is.
    renamed_tensors(weights, lambda n: None if n.endswith("wte.weight") else n)
    code, _, err = run(tmp_path, "collect", data="set.jsonl", out="other")
    assert code == 1
    assert "no weights for lm_head.weight and 1 more; give" in err


# An unlearned adapter is no origin


def test_an_unlearned_adapter_is_refused_as_the_original(spoilt, out):
    runs = {
        "unlearn": lambda adapter, out: unlearn(
            spoilt, out, *STRENGTH, "--no-evaluate", adapter=adapter
        ),
        "collect": lambda adapter, out: run(
            spoilt, "collect", data="all.jsonl", adapter=adapter, out=out
        ),
        "audit": lambda adapter, out: audit(spoilt, adapter=adapter, out=out),
    }
    for command in runs.values():
        code, _, err = command("done", out)
        assert code == 1
        assert "done is an unlearned adapter already" in err
        assert "--previous" in err
        assert nothing_left(out)
    # Trained on since, it is an origin of its own; the plan in its folder is only a file.
    other_adapter(spoilt / "done")
    assert runs["unlearn"]("done", out)[0] == 0
    truncate(spoilt / "done" / "ucan_plan.safetensors")
    code, _, err = runs["collect"]("done", out.parent / "bank")
    assert code == 1
    assert "ucan_plan.safetensors" in err


# Sequences longer than the model has positions


def test_sequences_beyond_the_models_positions_lose_their_beginning(tmp_path):
    model = hm.lora(hm.gpt2())
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    ids = [4 + i % 30 for i in range(100)]
    write_lines(tmp_path / "long.jsonl", [{"input_ids": ids}, {"input_ids": [5, 6]}])
    write_lines(tmp_path / "cut.jsonl", [{"input_ids": ids[-64:]}, {"input_ids": [5, 6]}])
    code, text, err = run(tmp_path, "collect", data="long.jsonl", out="long")
    assert code == 0, err
    assert "1 of 2 sequences are longer than 64 tokens" in err
    assert "--max-length" not in err
    code, _, err = run(tmp_path, "collect", "--max-length", "99", data="long.jsonl", out="asked")
    assert code == 0, err
    assert "--max-length 99 is more than the model's 64 positions; 64 is used" in err
    code, cut, err = run(tmp_path, "collect", data="cut.jsonl", out="cut")
    assert (code, err) == (0, "")
    assert text.split(":")[0] == cut.split(":")[0]
    assert cut.startswith("66 ")
    code, short, _ = run(tmp_path, "collect", "--max-length", "9", data="cut.jsonl", out="short")
    assert short.startswith("11 ")


def roberta():
    # Positions 2..9: those of the padding and before are none.
    return transformers.RobertaForCausalLM(
        transformers.RobertaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=10, is_decoder=True, pad_token_id=1,
            bos_token_id=0, eos_token_id=2,
        )
    )  # fmt: skip


def mpt():
    config = transformers.MptConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=8, vocab_size=40)
    return transformers.MptForCausalLM(config)


@pytest.mark.parametrize(("make", "targets"), [(roberta, ["query", "value"]), (mpt, ["Wqkv"])])
def test_positions_that_a_model_counts_in_its_own_way(tmp_path, make, targets):
    model = hm.lora(make(), targets=targets)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    write_lines(tmp_path / "set.jsonl", [{"input_ids": [4 + i % 30 for i in range(12)]}])
    code, text, err = run(tmp_path, "collect", data="set.jsonl", out="bank")
    assert code == 0, err
    assert "1 of 1 sequences are longer than 8 tokens" in err
    assert text.startswith("8 ")


# Encoder-decoder models


@pytest.mark.parametrize("make", [hm.t5, hm.bart])
def test_an_encoder_decoder_model(tmp_path, make):
    model = hm.lora(make())
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    pairs = {
        "forget": [("i4 i5 i6", "i7"), ("i8 i9", "i10 i11")],
        "retain": [("i20 i21", "i22 i23 i24"), ("i25 i26 i27", "i28")],
    }
    for name, lines in pairs.items():
        write_lines(tmp_path / f"{name}.jsonl", [{"prompt": a, "completion": b} for a, b in lines])
        ids = [
            {
                key: [1, *(int(w[1:]) for w in t.split())]
                for key, t in zip(("input_ids", "labels"), p, strict=True)
            }
            for p in lines
        ]
        write_lines(tmp_path / f"{name}_ids.jsonl", ids)
    code, text, err = unlearn(tmp_path, tmp_path / "out", *STRENGTH)
    assert code == 0, err
    assert "forget/kl" in text
    code, _, err = unlearn(
        tmp_path, tmp_path / "ids", *STRENGTH, forget="forget_ids.jsonl", retain="retain_ids.jsonl"
    )
    assert code == 0, err
    assert_same_adapter(tmp_path / "out", tmp_path / "ids")
    # The library on batches written out.
    model = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter")
    forget = {
        "input_ids": torch.tensor([[1, 4, 5, 6], [1, 8, 9, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[1, 7, -100], [1, 10, 11]]),
    }
    retain = {
        "input_ids": torch.tensor([[1, 20, 21, 3], [1, 25, 26, 27]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([[1, 22, 23, 24], [1, 28, -100, -100]]),
    }
    result = uf.unlearn(model, forget=[forget], retain=[retain], config=uf.UcanConfig(strength=2.0))
    expected = peft.get_peft_model_state_dict(model)
    for name, value in adapter_of(tmp_path / "out").items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-7), name
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    for name, value in result.report.metrics["U-CAN"].items():
        assert report["metrics"]["U-CAN"][name] == pytest.approx(value, rel=1e-3), name
    write_lines(tmp_path / "text.jsonl", [{"text": "i4 i5"}])
    code, _, err = unlearn(tmp_path, tmp_path / "no", *STRENGTH, forget="text.jsonl")
    assert code == 1
    assert "text.jsonl:1: found 'text'; an encoder-decoder model" in err


# collect


def test_collect_equals_the_library(project, out):
    code, text, _ = run(project, "collect", "--sites", "input", "rank", data="all.jsonl", out=out)
    assert code == 0
    stats = uf.ActivationStats.load(out)
    model = load(project, project / "adapter")
    uf.accelerate(model)
    expected = uf.collect(model, read_jsonl(project / "all.jsonl", None), sites=("input", "rank"))
    assert stats.sites == ("input", "rank")
    assert stats.fingerprint == expected.fingerprint
    for name, sites in expected.layers.items():
        for site, moments in sites.items():
            for mine, theirs in zip(
                stats.layers[name][site].tensors(), moments.tensors(), strict=True
            ):
                assert torch.equal(mine, theirs)
    assert f"{expected.tokens('retain')} retain tokens over 14 layers" in text
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_collect_for_the_forget_group(project, out):
    assert run(project, "collect", "--group", "forget", data="forget.jsonl", out=out)[0] == 0
    stats = uf.ActivationStats.load(out)
    assert stats.tokens("forget") > 0 == stats.tokens("retain")


def test_collect_replaces_only_its_own_output_and_only_when_asked(project, out, monkeypatch):
    out.parent.mkdir()
    out.write_text("mine")
    for flags in ([], ["--overwrite"]):
        code, _, err = run(project, "collect", *flags, data="all.jsonl", out=out)
        assert (code, out.read_text()) == (1, "mine")
        assert str(out) in err
    assert "no earlier output" in err
    out.unlink()
    assert run(project, "collect", data="forget.jsonl", out=out)[0] == 0
    earlier = out.read_bytes()
    assert run(project, "collect", data="all.jsonl", out=out)[0] == 1
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        code, _, err = run(project, "collect", "--overwrite", data="all.jsonl", out=out)
        assert (code, out.read_bytes()) == (1, earlier)
        assert "No space left" in err
    assert run(project, "collect", "--overwrite", data="all.jsonl", out=out)[0] == 0
    assert out.read_bytes() != earlier
    uf.ActivationStats.load(out)
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_collect_replaces_factors_of_another_version(project, out, monkeypatch):
    out.parent.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(influence_factors, "FORMAT_VERSION", "1")
        assert run(project, "collect", "--factors", "all", data="all.jsonl", out=out)[0] == 0
    now = influence_factors.FORMAT_VERSION
    assert now != "1"
    with pytest.raises(uf.UcanError, match=rf"has format version 1, .* reads {now}: make it again"):
        uf.InfluenceFactors.load(out)
    again = ("collect", "--overwrite", "--factors", "all")
    assert run(project, *again, data="all.jsonl", out=out)[0] == 0
    uf.InfluenceFactors.load(out)


def test_collect_refuses_unknown_sites_and_bad_data(project, out):
    code, _, err = run(project, "collect", "--sites", "roof", data="all.jsonl", out=out)
    assert code == 1
    assert "unknown site 'roof'" in err
    code, _, err = run(project, "collect", data="none.jsonl", out=out)
    assert code == 1
    assert "none.jsonl does not exist" in err
    assert nothing_left(out)


def test_collect_takes_sites_or_factors(project, out, no_loading):
    code, _, err = run(
        project, "collect", "--factors", "diagonal", "--sites", "input", data="all.jsonl", out=out
    )
    assert code == 2
    assert "leave it out with --factors" in err
    assert nothing_left(out)


# audit


def audit(folder, *flags, unlearned="done", **paths):
    paths = {"forget": "forget.jsonl", "retain": "retain.jsonl", **paths}
    return run(folder, "audit", *flags, unlearned=unlearned, **paths)


def test_audit_passes_on_what_unlearn_wrote(project, out):
    code, text, _ = audit(project, out=out)
    assert code == 0
    assert text.count("pass  ") == 3
    assert "FAIL" not in text
    findings = json.loads(out.read_text())
    assert findings["passed"] is True
    report = json.loads((project / "done" / REPORT).read_text())
    for mine, theirs in (("original", "before"), ("unlearned", "U-CAN")):
        for name, value in findings["metrics"][mine].items():
            assert value == pytest.approx(report["metrics"][theirs][name], rel=1e-4), name


def spoil_report(folder: Path) -> None:
    report = json.loads((folder / REPORT).read_text())
    report["fingerprint_after"] = "0" * 64
    (folder / REPORT).write_text(json.dumps(report))


@pytest.mark.parametrize("what", ["adapter", "report", "plan", "original"])
def test_audit_fails_on_what_was_tampered_with(spoilt, what, out):
    failing = {what}
    if what == "adapter":
        other_adapter(spoilt / "done")
        failing = {"plan", "report"}
    elif what == "report":
        spoil_report(spoilt / "done")
    elif what == "plan":
        other = spoilt / "other"
        assert unlearn(spoilt, other, "--strength", "1", "--no-evaluate")[0] == 0
        shutil.copy(other / "ucan_plan.safetensors", spoilt / "done" / "ucan_plan.safetensors")
    else:
        shutil.copy(spoilt / "adapter" / WEIGHTS, spoilt / "done" / WEIGHTS)
        failing = {"adapters differ", "plan", "report"}
    code, text, _ = audit(spoilt, out=out)
    assert code == 1
    lines = [line for line in text.splitlines() if line.startswith("FAIL")]
    assert {line.split(":")[0].removeprefix("FAIL").strip() for line in lines} == failing
    findings = json.loads(out.read_text())
    assert findings["passed"] is False
    assert {n for n, (passed, _) in findings["checks"].items() if not passed} == failing


def test_audit_refuses_what_it_cannot_read(spoilt, out):
    code, _, err = audit(spoilt, unlearned="nowhere")
    assert code == 1
    assert "nowhere is no folder" in err
    truncate(spoilt / "done" / "ucan_plan.safetensors")
    code, _, err = audit(spoilt)
    assert code == 1
    assert "ucan_plan.safetensors" in err
    truncate(spoilt / "done" / WEIGHTS)
    code, _, err = audit(spoilt, out=out)
    assert code == 1
    assert "cannot load the adapter" in err
    assert nothing_left(out)


def test_audit_refuses_a_seed_beyond_64_bits(project, out, no_loading):
    code, _, err = audit(project, "--seed", str(2**64), out=out)
    assert code == 1
    assert f"refused: seed must be an integer in [-2**63, 2**64 - 1], not {2**64}" in err


def test_audit_replaces_only_its_own_output_and_only_when_asked(project, out):
    out.parent.mkdir()
    out.write_text("mine")
    for flags in ([], ["--overwrite"]):
        code, _, err = audit(project, *flags, out=out)
        assert (code, out.read_text()) == (1, "mine")
    assert "no earlier output" in err
    out.unlink()
    assert audit(project, out=out)[0] == 0
    code, _, err = audit(project, out=out)
    assert code == 1
    assert "--overwrite" in err
    assert audit(project, "--overwrite", out=out)[0] == 0
    json.loads(out.read_text())


@pytest.fixture(scope="module")
def retrained(project):
    """Another adapter, as the reference, and sequences that none of them saw."""
    shutil.copytree(project / "adapter", project / "retrained")
    tensors = adapter_of(project / "retrained")
    halves = {n: t * 0.5 if "lora_B" in n else t for n, t in tensors.items()}
    save_file(halves, project / "retrained" / WEIGHTS, {"format": "pt"})
    write_lines(project / "holdout.jsonl", as_lines(forget_batches(seed=33, count=9, size=3)))
    return project / "retrained"


ATTACKS = {"holdout": "holdout.jsonl", "retrained": "retrained"}


def test_audit_attacks_as_the_library_does(project, retrained, out):
    flags = ["--relearn-steps", "3", "--seed", "4"]
    code, text, err = audit(project, *flags, **ATTACKS, out=out)
    assert (code, err) == (0, "")
    model = load(project, project / "adapter")
    uf.accelerate(model)
    sets = {n: read_jsonl(project / f"{n}.jsonl", None) for n in ("forget", "retain", "holdout")}
    words = tokenizer()
    expected = library_audit(
        model, project / "done", **sets, plan=project / "done" / "ucan_plan.safetensors",
        retrained=retrained, relearn_steps=3, seed=4,
        decode=lambda ids: words.decode(ids, skip_special_tokens=True),
    )  # fmt: skip
    assert json.loads(out.read_text()) == json.loads(expected.to_json())
    assert str(expected) in text
    assert expected.notes == {}
    assert len(expected.meanings) == 3 * 4 + 4 + 1 + 4
    assert "relearning: 3 steps on 1 forget sequences" in text
    # The text that zlib compresses is the tokenizer's, not the ids.
    ids = library_audit(model, project / "done", **sets, relearn_steps=0).membership
    assert ids["original"]["zlib"] != expected.membership["original"]["zlib"]
    assert ids["original"]["loss"] == expected.membership["original"]["loss"]


def test_audit_says_what_is_missing(project, retrained, out):
    code, text, _ = audit(project, "--relearn-steps", "0", out=out)
    assert code == 0
    for line in ("membership: not computed: no holdout set", "relearning: not tried (0 steps)"):
        assert line in text
    code, text, _ = audit(project, holdout="holdout.jsonl", forget="holdout.jsonl")
    assert code == 0
    assert "privleak: not computed: no retrained adapter" in text
    assert "membership/original/loss: 0.50 [" in text
    # One line is one sequence.
    line = json.loads((project / "forget.jsonl").read_text().splitlines()[0])
    alone = write_lines(out.parent / "one.jsonl", [line])
    code, text, _ = audit(project, forget=alone, holdout="holdout.jsonl")
    assert code == 0
    assert "there are 1 of the forget set and 9 of the holdout set" in text
    assert "relearning: not computed" in text


def test_audit_refuses_bad_references_and_holdouts_by_name(spoilt, retrained, out):
    shutil.copytree(retrained, spoilt / "other")
    refused = {
        "nowhere is no folder with a retrained adapter": {"retrained": "nowhere"},
        "adapter is the original one": {"retrained": "adapter"},
        "none.jsonl does not exist": {"holdout": "none.jsonl"},
    }
    for message, paths in refused.items():
        code, _, err = audit(spoilt, out=out, **{**ATTACKS, **paths})
        assert code == 1
        assert err.startswith("ucan-fast audit: refused: ")
        assert message in err
    truncate(spoilt / "other" / WEIGHTS)
    code, _, err = audit(spoilt, out=out, **{**ATTACKS, "retrained": "other"})
    assert code == 1
    assert "cannot load the adapter" in err
    assert nothing_left(out)
    # What the command reads is never its output.
    before = snapshot(spoilt)
    for near in ("holdout.jsonl", f"retrained/{WEIGHTS}"):
        code, _, err = audit(spoilt, "--overwrite", **ATTACKS, out=near)
        assert code == 1
        assert "where nothing is replaced" in err
    assert snapshot(spoilt) == before


# doctor


def test_doctor_prints_what_works_and_why_not(project):
    code, text, _ = run(project, "doctor", model=False)
    assert code == 0
    for piece in ("versions:", "operators:", "native extension:", "triton kernels:", "cuda"):
        assert piece in text
    assert uf.__version__ in text


@pytest.mark.parametrize("variable", ["UCAN_FAST_BACKEND", "UCAN_FAST_FUSED_LINEAR"])
def test_doctor_refuses_unknown_settings(project, monkeypatch, variable):
    monkeypatch.setenv(variable, "maybe")
    code, _, errors = run(project, "doctor", model=False)
    assert code == 1
    assert f"{variable}='maybe'" in errors


def test_doctor_as_json(project):
    code, text, _ = run(project, "doctor", "--json", model=False)
    assert code == 0
    facts = json.loads(text)
    assert facts["versions"]["ucan_fast"] == uf.__version__
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    for operator, backend in facts["operators"].items():
        assert isinstance(operator, str)
        assert backend
    assert facts["native extension"]


# As a process of its own


def started(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ucan_fast", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_process_unlearns(project, out):
    process = started(
        "unlearn", "--base", project / "base", "--adapter", project / "adapter",
        "--forget", project / "forget.jsonl", "--retain", project / "retain.jsonl",
        "--out", out, *STRENGTH, "--no-evaluate",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert_same_adapter(out, project / "done")
    assert "neurons attenuated" in process.stdout


def test_the_command_lines_own_module_runs_it(tmp_path):
    command = [sys.executable, "-m", "ucan_fast.cli", "unlearn", "--base", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert process.returncode == 2
    assert "the following arguments are required: --adapter" in process.stderr


def test_a_process_refuses_without_a_traceback(spoilt, out):
    truncate(spoilt / "bank.safetensors")
    process = started(
        "unlearn", "--base", spoilt / "base", "--adapter", spoilt / "adapter",
        "--forget", spoilt / "forget.jsonl", "--bank", spoilt / "bank.safetensors", "--out", out,
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stdout == ""
    assert "bank.safetensors is truncated or corrupt" in process.stderr
    assert "Traceback" not in process.stderr
    assert nothing_left(out)


# The influence step.


def test_unlearn_by_influence_equals_the_library(project, out):
    code, text, _ = unlearn(project, out, "--method", "influence", "--strength", "0.3")
    assert code == 0
    assert "influence step on 28 matrices" in text
    model = load(project, project / "adapter")
    config = uf.UcanConfig(method="influence", strength=0.3)
    sets = {
        name: read_jsonl(project / f"{name}.jsonl", None, batch_size=8, max_length=64)
        for name in ("forget", "retain")
    }
    uf.accelerate(model)
    uf.unlearn(model, **sets, config=config, evaluate=False)
    expected = peft.get_peft_model_state_dict(model)
    written = adapter_of(out)
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    report = json.loads((out / REPORT).read_text())
    assert list(report["metrics"]) == ["before", "influence", "uniform", "random"]
    findings = run(project, "audit", unlearned=out, forget="forget.jsonl", retain="retain.jsonl")
    assert findings[0] == 0
    assert findings[1].count("pass  ") == 3


def test_unlearn_by_gates_from_a_bank_equals_the_library(project, out):
    bank = out.parent / "bank.safetensors"
    code, *_ = run(project, "collect", "--factors", "diagonal", data="all.jsonl", out=bank)
    assert code == 0
    flags = ["--method", "gates", "--strength", "0.3", "--no-evaluate", "--keep-original"]
    paths = {"retain": None, "bank": bank}
    code, text, _ = unlearn(project, out, *flags, **paths)
    assert code == 0
    assert "site 'input and output'" in text
    model = load(project, project / "adapter")
    forget = read_jsonl(project / "forget.jsonl", None, batch_size=8, max_length=64)
    uf.accelerate(model)
    config = uf.UcanConfig(method="gates", strength=0.3)
    factors = uf.InfluenceFactors.load(bank)
    uf.unlearn(model, forget=forget, bank=factors, config=config, evaluate=False)
    expected = peft.get_peft_model_state_dict(model)
    written = adapter_of(out)
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    findings = run(project, "audit", unlearned=out, forget="forget.jsonl", retain="retain.jsonl")
    assert findings[0] == 0
    assert findings[1].count("pass  ") == 3
    both, union = out.parent / "both", out.parent / "union"
    code, *_ = unlearn(project, both, *flags, forget="second.jsonl", previous=out, **paths)
    assert code == 0
    assert unlearn(project, union, *flags, forget="union.jsonl", **paths)[0] == 0
    one, two = adapter_of(both), adapter_of(union)
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-3, atol=1e-5), name


def test_a_bank_of_factors_a_holdout_and_a_second_request(project, out):
    bank = out.parent / "bank.safetensors"
    code, text, _ = run(project, "collect", "--factors", "diagonal", data="all.jsonl", out=bank)
    assert code == 0
    assert "factors 'diagonal'" in text
    assert run(project, "collect", "--overwrite", data="all.jsonl", out=bank)[0] == 0
    code, *_ = run(
        project, "collect", "--factors", "diagonal", "--overwrite", data="all.jsonl", out=bank
    )
    assert code == 0
    flags = ["--method", "influence", "--influence-variant", "diagonal"]
    paths = {"retain": None, "bank": bank, "calibration": "retain.jsonl"}
    first = out.parent / "first"
    code, _, err = unlearn(project, first, *flags, holdout="forget.jsonl", **paths)
    assert code == 1
    assert "no better known than never-seen data" in err
    assert not first.exists()
    flags += ["--strength", "0.2", "--no-evaluate"]
    assert unlearn(project, out, *flags, **paths)[0] == 0
    both, union = out.parent / "both", out.parent / "union"
    code, *_ = unlearn(project, both, *flags, forget="second.jsonl", previous=out, **paths)
    assert code == 0
    assert unlearn(project, union, *flags, forget="union.jsonl", **paths)[0] == 0
    one, two = adapter_of(both), adapter_of(union)
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-3, atol=1e-5), name
    code, _, err = run(
        project,
        "unlearn",
        adapter=both,
        forget="second.jsonl",
        retain="retain.jsonl",
        out=out.parent / "again",
    )
    assert code == 1
    assert "is an unlearned adapter already" in err


@pytest.mark.parametrize(
    ("variant", "option", "value"), [("eigenbasis", "rank", "2"), ("last-blocks", "blocks", "1")]
)
def test_a_bank_of_another_size_than_the_default(project, out, variant, option, value):
    bank = out.parent / "bank.safetensors"
    size = ["--factors", variant, f"--{option}", value]
    assert run(project, "collect", *size, data="all.jsonl", out=bank)[0] == 0
    flags = ["--method", "influence", "--influence-variant", variant, "--strength", "0.1"]
    paths = {"retain": None, "bank": bank}
    code, _, err = unlearn(project, out, *flags, "--no-evaluate", **paths)
    assert code == 1
    assert f"{option}=" in err
    flags += ["--no-evaluate", f"--influence-{option}", value]
    assert unlearn(project, out, *flags, **paths)[0] == 0
    other = ["--factors", "diagonal", f"--{option}", value]
    code, _, err = run(project, "collect", *other, "--overwrite", data="all.jsonl", out=bank)
    assert code == 2
    assert f"--{option} is for --factors {variant}" in err
    assert run(project, "collect", f"--{option}", value, data="all.jsonl", out=bank)[0] == 2


def test_a_bank_of_the_other_kind_is_refused(project, out):
    code, _, err = unlearn(
        project, out, "--method", "influence", retain=None, bank="bank.safetensors"
    )
    assert code == 1
    assert "is no ucan_fast.influence_factors file" in err
    assert nothing_left(out)


@pytest.mark.parametrize("flags", [["--preset", "best"], ["--method", "gates"]])
def test_a_bank_without_calibration_is_refused_before_any_work(project, out, flags, monkeypatch):
    bank = out.parent / "bank.safetensors"
    code, *_ = run(project, "collect", "--factors", "diagonal", data="all.jsonl", out=bank)
    assert code == 0
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("refused before any work"))
    code, _, err = unlearn(project, out, *flags, retain=None, bank=bank)
    assert code == 1
    assert "give retain data with --calibration, or --strength in nats" in err
    assert not out.exists()


def test_several_steps_take_retain_data_beside_a_bank(project, out, monkeypatch):
    bank = out.parent / "bank.safetensors"
    code, *_ = run(project, "collect", "--factors", data="all.jsonl", out=bank)
    assert code == 0
    flags = ["--preset", "thorough", "--influence-steps", "2", "--no-evaluate"]
    assert unlearn(project, out, *flags, bank=bank)[0] == 0
    report = json.loads((out / REPORT).read_text())
    assert report["request"]["retain_from"] == "bank"
    assert len(report["change"]["steps"]) == 2
    # One step has the bank instead.
    one = out.parent / "one"
    code, _, err = unlearn(project, one, "--preset", "best", bank=bank)
    assert code == 2
    assert "exactly one of --retain and --bank" in err
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("refused before any work"))
    code, _, err = unlearn(project, one, *flags, retain=None, bank=bank)
    assert code == 1
    assert "several influence steps run retain data, which a bank does not hold" in err
    assert not one.exists()


def test_several_steps_go_on_from_the_earlier_output(project, out):
    """Whose adapter need not be there: the plan leads from the original one to it."""
    steps = ["--preset", "thorough", "--influence-steps", "2"]
    assert unlearn(project, out, *steps, "--no-evaluate")[0] == 0
    second = out.parent / "second"
    code, *_ = unlearn(project, second, *steps, forget="second.jsonl", previous=out)
    assert code == 0
    report = json.loads((second / REPORT).read_text())
    assert report["request"]["includes_previous_requests"]
    first, both = (uf.InfluencePlan.load(folder / cli.ADAPTER_PLAN) for folder in (out, second))
    # What the first moved is in the second's way: of the two the latter is as far along it.
    along = [
        sum(float((p.strength * p.directions[k] * first.directions[k]).sum()) for k in p.directions)
        for p in (first, both)
    ]
    assert along[1] > 0.8 * along[0] > 0


@pytest.mark.parametrize(
    ("earlier", "later", "says"),
    [
        ("thorough", "best", "would not take them again: answer this request by several"),
        ("gates", "thorough", "was not answered by influence steps"),
        ("paper", "thorough", "ucan_statistics.safetensors"),
        ("no plan", "thorough", "ucan_plan.safetensors does not exist"),
    ],
)
def test_requests_that_cannot_follow_each_other(project, out, earlier, later, says, monkeypatch):
    flags = {
        "thorough": ["--preset", "thorough", "--influence-steps", "2"],
        "gates": ["--method", "gates"],
        "paper": [*STRENGTH],
        "no plan": ["--preset", "best"],
    }
    assert unlearn(project, out, *flags[earlier], "--no-evaluate")[0] == 0
    if earlier == "no plan":
        (out / cli.ADAPTER_PLAN).unlink()
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("refused before any work"))
    code, _, err = unlearn(project, out.parent / "next", "--preset", later, previous=out)
    assert code == 1
    assert says in err
    assert not (out.parent / "next").exists()
