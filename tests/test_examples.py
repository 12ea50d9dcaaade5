"""The demo: runs as a user would run it, and prints what its reports say."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

DEMO = Path(__file__).resolve().parents[1] / "examples" / "movielens.py"
REQUESTS = ("genre", "users", "one-user")
STATES = {
    "before": "before",
    "U-CAN": "U-CAN",
    "uniform shrink (control)": "uniform",
    "random neurons (control)": "random",
}
# Column of the table -> metric of the report, for columns that are one metric.
METRICS = {
    0: "forget_train/recall@10",
    1: "retain_train/recall@10",
    2: "forget_train/drop",
    3: "retain_train/drop",
    4: "trade_off/strict_train",
    5: "trade_off/paper",
    6: "forget/kl",
    7: "forget/perplexity",
}
DIGITS = (3, 3, 1, 1, 1, 1, 3, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small made-up ml-100k: three kinds of users, who mostly watch films of their own kind."""
    generator = np.random.default_rng(0)
    kinds = ("Horror", "Comedy", "Drama")
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    items += [f"{i}\tFilm {i}\t1990\t{kinds[i % 3]}" for i in range(60)]
    rows = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(90):
        own = np.arange(60)[np.arange(60) % 3 == user % 3]
        films = generator.permutation(np.union1d(own, generator.choice(60, 12, replace=False)))
        rows += [f"{user}\t{film}\t4\t{1000 + t}" for t, film in enumerate(films)]
    folder = tmp_path_factory.mktemp("ml-100k")
    (folder / "ml-100k.item").write_text("\n".join(items) + "\n")
    (folder / "ml-100k.inter").write_text("\n".join(rows) + "\n")
    return folder


def run(data: Path, cache: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO), "--fast", "--data", str(data)]
    command += ["--cache", str(cache), "--out", str(out), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )


def printed_tables(text: str) -> list[dict[str, list[str]]]:
    """The cells of every table at the end, by row."""
    tables: list[dict[str, list[str]]] = []
    for line in text.splitlines():
        label = next((name for name in STATES if line.startswith(f"  {name:25} ")), None)
        if label is None:
            continue
        if label == "before":
            tables.append({})
        tables[-1][label] = line[27:].split()
    return tables


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_demo_prints_what_its_reports_say(data: Path, tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "first"
    first = run(data, cache, out)
    assert first.returncode == 0, first.stderr

    tables = printed_tables(first.stdout)
    assert len(tables) == 3
    changed = 0
    for name, table in zip(REQUESTS, tables, strict=True):
        report = json.loads((out / name / "deletion_report.json").read_text())
        assert list(table) == list(STATES)
        for label, state in STATES.items():
            metrics = report["metrics"].get(state, {})
            for column, metric in METRICS.items():
                before = {"forget_train/drop": 0.0, "retain_train/drop": 0.0}
                value = metrics.get(metric, before.get(metric) if state == "before" else None)
                expected = "-" if value is None else f"{value:.{DIGITS[column]}f}"
                assert table[label][column] == expected, (name, label, metric)
            if metrics and state != "before":
                strict = metrics["forget_train/drop"] - metrics["retain_train/drop"]
                assert metrics["trade_off/strict_train"] == pytest.approx(strict, abs=1e-9)
        for image in ("trade-off.png", "deletion_report.png"):
            content = (out / name / image).read_bytes()
            assert content.startswith(b"\x89PNG")
            assert len(content) > 10_000

        (trained,) = cache.glob("recommender-*/adapter")
        origin, edited = adapter_of(trained), adapter_of(out / name / "adapter")
        assert origin.keys() == edited.keys()
        attenuated = report["change"]["attenuated"]
        same = all(torch.equal(origin[key], edited[key]) for key in origin)
        assert same == (attenuated == 0)
        assert ("uniform" in report["metrics"]) == (attenuated > 0)
        verdict = json.loads((out / "summary.json").read_text())[name]["verdict"]
        assert verdict.replace("\n", "\n  ") in first.stdout
        if attenuated < 0.01 * report["change"]["neurons"]:
            assert verdict.startswith("Next to nothing was changed")
        else:
            assert re.match("U-CAN (beats|loses to|is not clearly different from) its", verdict)
        changed += attenuated > 0
    assert changed, "no request attenuated anything, so nothing above was really tested"
    assert (out / "summary.txt").read_text() in first.stdout

    # The command that is printed for the first request selects the same neurons.
    command = shlex.split(re.search(r"  ucan-fast (unlearn .*)", first.stdout)[1])
    done = subprocess.run(
        [sys.executable, "-m", "ucan_fast", *command, "--no-evaluate"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    by_cli = json.loads((out / "by-cli" / "deletion_report.json").read_text())
    report = json.loads((out / "genre" / "deletion_report.json").read_text())
    for key in ("forget_tokens", "retain_tokens"):
        assert by_cli["request"][key] == report["request"][key]
    for key in ("threshold", "largest_score"):
        assert by_cli["change"][key] == pytest.approx(report["change"][key], rel=1e-4)

    second = run(data, cache, tmp_path / "second")
    assert second.returncode == 0, second.stderr
    assert "taken from" in second.stdout
    assert (
        [
            {label: cells[:-1] for label, cells in table.items()}  # the last column is time
            for table in printed_tables(second.stdout)
        ]
        == [{label: cells[:-1] for label, cells in table.items()} for table in tables]
    )


def test_an_unknown_genre_is_told_in_one_line(data: Path, tmp_path: Path) -> None:
    done = run(data, tmp_path / "cache", tmp_path / "out", "--genre", "Opera")
    assert done.returncode == 1
    assert "no item has the genre 'Opera'; known: Comedy, Drama, Horror" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache").exists()  # told before anything is trained


def test_training_twice_gives_the_same_weights(data: Path, tmp_path: Path) -> None:
    demo = load_demo()
    recipe = dataclasses.replace(demo.FAST, pretrain_epochs=1, finetune_epochs=2)
    prepared = demo.load_data(recipe, data, tmp_path)
    for name in ("a", "b"):
        torch.rand(7)  # earlier draws must not matter
        (tmp_path / name).mkdir()
        demo.train(recipe, prepared, tmp_path / name, tmp_path / "final")
    first, second = adapter_of(tmp_path / "a" / "adapter"), adapter_of(tmp_path / "b" / "adapter")
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = dataclasses.replace(recipe, lora_rank=8)
    assert demo.cache_key(recipe, prepared) != demo.cache_key(other, prepared)


def test_nobody_is_both_pretrained_and_finetuned_on_and_the_last_film_is_held_out(
    data: Path, tmp_path: Path
) -> None:
    demo = load_demo()
    prepared = demo.load_data(demo.FAST, data, tmp_path)
    assert not set(prepared.base_users) & set(prepared.tuned_users)
    assert len(prepared.test) == 90
    last = dict(zip(prepared.test.user, prepared.test.time, strict=True))
    assert all(
        time < last[user]
        for user, time in zip(prepared.train.user, prepared.train.time, strict=True)
    )
    tuned = np.isin(prepared.train.user, prepared.tuned_users)
    for request in demo.make_requests(prepared, "Horror", 0):
        assert request.forget_train.any()
        assert not (request.forget_train & ~tuned).any()


def load_demo():
    spec = importlib.util.spec_from_file_location("movielens_demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
