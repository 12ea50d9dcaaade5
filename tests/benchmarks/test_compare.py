"""What counts as moved, and what does not."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import compare as c

from .synthetic import case, document

SHAPE = {"model": "tiny", "tokens": 8}


def _times(factor: float, seed: int, machine: float = 1.0) -> dict[str, list[float]]:
    # The peer takes about 1 s, ours factor as long; 3 % of noise, and a machine as slow as it is.
    noise = np.random.default_rng(seed).normal(1, 0.03, (2, 15)).clip(0.9, 1.1) * machine
    return {"peer": noise[0].tolist(), "ucan_fast": (factor * noise[1]).tolist()}


def _compare(tmp_path, before, after, group="g"):
    old = document(tmp_path / "a.json", case(group, SHAPE, before))
    new = document(tmp_path / "b.json", case(group, SHAPE, after))
    return c.compare(old, new)


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_slower_machine_move_nothing(tmp_path, seed):
    found = _compare(tmp_path, _times(0.5, seed), _times(0.5, seed + 100, machine=3.0))
    assert [one.moved for one in found.changes] == [False]


@pytest.mark.parametrize(("factor", "slower"), [(0.6, True), (0.4, False)])
def test_twenty_per_cent_move(tmp_path, factor, slower):
    (change,) = _compare(tmp_path, _times(0.5, 0), _times(factor, 1)).changes
    assert change.moved
    assert change.slower is slower
    assert change.low < 0.5 / factor < change.high
    assert change.low < change.factor < change.high


def test_a_small_step_is_not_told_from_chance(tmp_path):
    # Certain within each file, and still 4 % only.
    before = {"peer": [1.0] * 9, "ucan_fast": [0.5] * 9}
    after = {"peer": [1.0] * 9, "ucan_fast": [0.52] * 9}
    (change,) = _compare(tmp_path, before, after).changes
    assert change.high < 1
    assert not change.moved


def test_wide_rounds_need_a_wide_step(tmp_path):
    before = {"peer": [1.0] * 7, "ucan_fast": [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]}
    after = {"peer": [1.0] * 7, "ucan_fast": [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]}
    (change,) = _compare(tmp_path, before, after).changes
    assert change.factor < 0.95
    assert not change.moved


def test_the_same_files_give_the_same_interval():
    before, after = np.array([1.0, 1.1, 0.9, 1.2]), np.array([2.0, 2.1, 1.9])
    assert c.bootstrap(before, after) == c.bootstrap(before, after)


def test_cases_come_and_go(tmp_path):
    times = {"peer": [1.0, 1.0], "ucan_fast": [0.5, 0.5]}
    old = document(tmp_path / "a.json", case("g", SHAPE, times), case("old", SHAPE, times))
    new = document(tmp_path / "b.json", case("g", SHAPE, times), case("new", SHAPE, times))
    found = c.compare(old, new)
    assert [key[0] for key in found.disappeared] == ["old"]
    assert [key[0] for key in found.appeared] == ["new"]
    text = c.render(found)
    assert "only in the first file: old: tiny tokens=8 float32: ucan_fast" in text
    assert "only in the second file: new: tiny tokens=8 float32: ucan_fast" in text


def test_the_exit_code_is_about_our_own_rows(tmp_path, capsys):
    def main(before, after, *options) -> int:
        _compare(tmp_path, before, after)
        return c.main([str(tmp_path / "a.json"), str(tmp_path / "b.json"), *options])

    fast, slow = _times(0.5, 0), _times(0.8, 1)
    assert main(fast, slow) == 0
    assert "slower: g: tiny tokens=8 float32: ucan_fast: " in capsys.readouterr().out
    assert main(fast, slow, "--fail-on-slower") == 1
    assert main(slow, fast, "--fail-on-slower") == 0

    def renamed(times: dict) -> dict:
        return {"peer": times["peer"], "other": times["ucan_fast"]}

    assert main(renamed(fast), renamed(slow), "--fail-on-slower") == 0
    assert "slower" in capsys.readouterr().out
    assert c.main([str(tmp_path / "a.json"), str(tmp_path / "none.json")]) == 2


def test_another_machine_is_named(tmp_path, capsys):
    times = {"peer": [1.0, 1.0], "ucan_fast": [0.5, 0.5]}
    document(tmp_path / "a.json", case("g", SHAPE, times))
    document(tmp_path / "b.json", case("g", SHAPE, times), hardware="Another CPU")
    c.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "note: hardware differs: A CPU and Another CPU" in capsys.readouterr().out
