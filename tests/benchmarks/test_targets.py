"""Targets: each figure, each verdict, and the exit code."""

from __future__ import annotations

import pytest

from benchmarks import measure as m
from benchmarks import targets as t
from benchmarks.kernels import suite
from benchmarks.model import deletion, passes

from .synthetic import case, document

SHAPE = {"model": "tiny", "tokens": 8, "rank": 4}


def _target(**changes) -> t.Target:
    settings = {
        "name": "x",
        "device": "cpu",
        "group": "g",
        "where": {"tokens": 8},
        "dtype": "float32",
        "figure": "speedup",
        "candidate": "mine",
        "against": "peer",
        "at_least": 2.0,
    }
    settings.update(changes)
    return t.Target(**{key: value for key, value in settings.items() if value is not None})


def _judge(target: t.Target, *documents) -> t.Row:
    (row,) = t.evaluate([target], documents, devices={"cpu"})
    return row


def test_a_speedup_is_paired_within_each_round(tmp_path):
    # Over medians it would be 4 / 2 = 2; within the rounds it is 4, 1, 4.
    times = {"peer": [4.0, 2.0, 8.0], "mine": [1.0, 2.0, 2.0]}
    found = document(tmp_path / "a.json", case("g", SHAPE, times))
    row = _judge(_target(at_least=4.0), found)
    assert (row.result, row.measured) == ("pass", m.Spread(4.0, 2.5, 4.0))
    assert _judge(_target(at_least=4.01), found).result == "FAIL"
    slower = _target(figure="time", at_least=None, at_most=0.25)
    assert _judge(slower, found).measured.median == 0.25
    assert _judge(slower, found).result == "pass"
    assert _judge(_target(figure="time", at_least=None, at_most=0.24), found).result == "FAIL"


def test_the_figure_of_the_floor_stands_beside(tmp_path):
    times = {"peer": [4.0, 4.0], "mine": [2.0, 2.0], "less": [1.0, 1.0]}
    found = document(tmp_path / "a.json", case("g", SHAPE, times))
    row = _judge(_target(floor="less", at_least=2.5), found)
    assert (row.result, row.note) == ("FAIL", "less: 4.00x")
    share = _target(floor="less", figure="time", at_least=None, at_most=1.0)
    assert _judge(share, found).note == "less: 0.25x"
    # Results of before the candidate was there.
    assert _judge(_target(floor="nobody"), found).note == ""
    with pytest.raises(ValueError, match="floor belongs to"):
        _target(figure="launches", against=None, kernels="k", floor="less")


def test_bandwidth_is_a_share_of_the_files_own_ceiling(tmp_path):
    # 100 bytes per second: 200 bytes need 2 s.
    found = document(tmp_path / "a.json", case("g", SHAPE, {"mine": [4.0, 4.0]}, bytes=200))
    target = _target(figure="bandwidth", against=None, at_least=0.5)
    assert _judge(target, found).measured.median == 0.5
    assert _judge(target, found).result == "pass"
    assert _judge(_target(figure="bandwidth", against=None, at_least=0.51), found).result == "FAIL"
    del found["environment"]["ceilings"]
    row = _judge(target, found)
    assert row.result == "FAIL"
    assert "ceilings" in row.note


def test_launches_are_those_whose_names_match(tmp_path):
    launches = {"measure_kernel": 1, "finish_kernel": 1, "void at::reduce_kernel": 3}
    extra = {"launches": launches}
    found = document(tmp_path / "a.json", case("g", SHAPE, {"mine": [1.0]}, extra=extra))
    options = {"figure": "launches", "against": None, "at_least": None}
    ours = _target(kernels="^(measure|finish)_kernel", at_most=2, **options)
    assert (_judge(ours, found).result, _judge(ours, found).measured.median) == ("pass", 2)
    every = _target(kernels="kernel", at_most=4, **options)
    assert (_judge(every, found).result, _judge(every, found).measured.median) == ("FAIL", 5)
    # None at all is not "few": another backend ran.
    renamed = _target(kernels="^scale_kernel", at_most=2, **options)
    assert _judge(renamed, found).result == "FAIL"
    assert "no kernel is named like" in _judge(renamed, found).note
    uncounted = document(tmp_path / "b.json", case("g", SHAPE, {"mine": [1.0]}))
    assert "not counted" in _judge(ours, uncounted).note
    assert _judge(ours, uncounted).result == "FAIL"
    extra = {"launches_reason": "RuntimeError: no profiler"}
    refused = document(tmp_path / "c.json", case("g", SHAPE, {"mine": [1.0]}, extra=extra))
    assert _judge(ours, refused).note == "not measured: RuntimeError: no profiler"


def test_a_missing_case_fails_only_on_the_device_it_is_for(tmp_path):
    found = document(tmp_path / "a.json", case("other", SHAPE, {"peer": [2.0], "mine": [1.0]}))
    row = _judge(_target(), found)
    assert row.result == "FAIL"
    assert "none of the files" in row.note
    (row,) = t.evaluate([_target(device="cuda")], [found], devices={"cpu"})
    assert row.result == "not measured"
    # A CPU file does not stand in for a GPU's.
    same = document(tmp_path / "b.json", case("g", SHAPE, {"peer": [9.0], "mine": [1.0]}))
    (row,) = t.evaluate([_target(device="cuda")], [same], devices={"cuda"})
    assert row.result == "FAIL"


def test_a_skipped_candidate_says_why(tmp_path):
    name = m.case_name(SHAPE, "float32")
    skipped = [m.Skipped("g", name, "mine", "no TMA here")]
    found = document(tmp_path / "a.json", case("g", SHAPE, {"peer": [2.0]}), skipped=skipped)
    for target in (_target(), _target(only_if_faster_than="peer"), _target(at_least=0.0)):
        row = _judge(target, found)
        assert (row.result, row.note, row.measured) == ("skipped", "no TMA here", None)
        assert t.failed([row]) == []
    # An older file does not stand in for it.
    older = document(
        tmp_path / "b.json",
        case("g", SHAPE, {"peer": [9.0], "mine": [1.0]}),
        date="2026-10-01T00:00:00+00:00",
    )
    assert _judge(_target(), older).result == "pass"
    assert _judge(_target(), older, found).result == "skipped"
    other = _target(candidate="peer", against="mine")
    assert _judge(other, found).note == "mine: no TMA here"


def test_a_candidate_that_broke_down_is_no_skip(tmp_path):
    name = m.case_name(SHAPE, "float32")
    failure = m.Skipped("g", name, "mine", "'mine' is wrong", failed=True)
    found = document(tmp_path / "a.json", case("g", SHAPE, {"peer": [2.0]}), skipped=[failure])
    row = _judge(_target(), found)
    assert (row.result, row.note) == ("FAIL", "'mine' is wrong")
    assert t.failed([row]) == [row]


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"where": {"tokens": 80}},
        {"where": {"model": "tin"}},
        {"dtype": "bfloat16"},
        {"adapter_dtype": "float32"},
        {"group": "h"},
    ],
)
def test_what_was_skipped_in_another_case_is_no_excuse(tmp_path, elsewhere):
    skipped = [m.Skipped("g", m.case_name(SHAPE, "float32"), "mine", "no TMA here")]
    found = document(tmp_path / "a.json", case("g", SHAPE, {"peer": [2.0]}), skipped=skipped)
    row = _judge(_target(**elsewhere), found)
    assert (row.result, row.note) == ("FAIL", "not measured: the case is in none of the files")


def test_where_everything_was_skipped_nothing_holds(tmp_path, monkeypatch, capsys):
    skipped = [m.Skipped("g", m.case_name(SHAPE, "float32"), "mine", "no TMA here")]
    document(tmp_path / "a.json", case("g", SHAPE, {"peer": [2.0]}), skipped=skipped)
    monkeypatch.setattr(t, "load_targets", lambda: [_target()])
    assert t.main([str(tmp_path / "a.json")]) == 1
    out = capsys.readouterr().out
    assert "skipped (no TMA here): x" in out
    assert "0 of 0 judged targets fall short, 1 skipped" in out
    document(
        tmp_path / "a.json",
        case("g", SHAPE, {"peer": [2.0], "also": [1.0]}),
        skipped=skipped,
    )
    monkeypatch.setattr(t, "load_targets", lambda: [_target(), _target(candidate="also")])
    assert t.main([str(tmp_path / "a.json")]) == 0
    assert "0 of 1 judged targets fall short, 1 skipped" in capsys.readouterr().out


def test_an_opt_in_counts_only_where_it_wins(tmp_path):
    target = _target(candidate="fused", against="floor", at_least=0.9, only_if_faster_than="plain")
    loses = {"floor": [1.0], "plain": [1.5], "fused": [1.6]}
    row = _judge(target, document(tmp_path / "a.json", case("g", SHAPE, loses)))
    assert (row.result, row.note) == ("not used", "slower than plain")
    wins = {"floor": [1.0], "plain": [1.5], "fused": [1.2]}
    row = _judge(target, document(tmp_path / "b.json", case("g", SHAPE, wins)))
    assert row.result == "FAIL"


def test_the_newest_file_counts(tmp_path):
    new = document(
        tmp_path / "a.json",
        case("g", SHAPE, {"peer": [9.0], "mine": [1.0]}),
        date="2026-11-02T00:00:00+00:00",
    )
    old = document(tmp_path / "b.json", case("g", SHAPE, {"peer": [1.0], "mine": [1.0]}))
    assert _judge(_target(), old, new).measured.median == 9
    assert _judge(_target(), new, old).measured.median == 9


def test_a_target_must_name_one_case(tmp_path):
    cases = [case("g", {**SHAPE, "rank": r}, {"peer": [2.0], "mine": [1.0]}) for r in (4, 8)]
    found = document(tmp_path / "a.json", *cases)
    with pytest.raises(ValueError, match=r"several cases: .*rank=4.*rank=8"):
        _judge(_target(), found)
    assert _judge(_target(where={"rank": 8}), found).result == "pass"


def test_dtypes_tell_cases_apart(tmp_path):
    times = {"peer": [2.0], "mine": [1.0]}
    found = document(tmp_path / "a.json", case("g", SHAPE, times, adapter_dtype="bfloat16"))
    assert _judge(_target(), found).result == "FAIL"
    assert _judge(_target(adapter_dtype="bfloat16"), found).result == "pass"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device 'tpu'"),
        ({"figure": "beauty"}, "figure 'beauty'"),
        ({"at_most": 1.0}, "either at_least or at_most"),
        ({"at_least": None}, "either at_least or at_most"),
        ({"against": None}, "against belongs"),
        ({"figure": "bandwidth"}, "against belongs"),
        ({"kernels": "x"}, "kernels belongs"),
    ],
)
def test_a_target_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _target(**changes)


def test_a_file_of_targets_is_refused_with_the_place(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text('[[target]]\nname = "a"\ncolour = "red"\n')
    with pytest.raises(ValueError, match=r"t.toml: target 1 \(a\): unknown key colour"):
        t.load_targets(path)
    path.write_text('[[target]]\nname = "a"\n')
    with pytest.raises(ValueError, match=r"target 1 \(a\): .*missing"):
        t.load_targets(path)


def test_every_gpu_target_is_a_case_of_the_suite_with_its_candidates():
    benches = suite.target_benches("cuda")
    for target in t.load_targets():
        if target.device != "cuda":
            continue
        mine = [
            bench
            for bench in benches
            if target.describes(bench.group, bench.shape, bench.dtype, bench.adapter_dtype)
        ]
        assert len(mine) == 1, target.name
        names = {candidate.name for candidate in mine[0].candidates}
        named = (target.candidate, target.against, target.only_if_faster_than, target.floor)
        for name in named:
            assert not name or name in names, (target.name, name)
        if target.figure == "launches":
            (one,) = [c for c in mine[0].candidates if c.name == target.candidate]
            assert one.count_launches
        if target.figure == "bandwidth":
            (one,) = [c for c in mine[0].candidates if c.name == target.candidate]
            assert one.bytes


def test_only_what_targets_name_is_asked_of_a_case():
    asked = {
        (bench.group, bench.adapter_dtype): t.asked_of(bench, "cuda")
        for bench in suite.target_benches("cuda")
    }
    # No target names the peer, but it is the baseline that rows are written against.
    peer = "peft + hooks, mask matmul"
    assert asked["linear_moments", "float32"] == {
        *(peer, "base layer alone"),
        *("ucan_fast", "ucan_fast, no moments", "ucan_fast, fused_linear"),
    }
    assert asked["linear_moments", "bfloat16"] == {peer, "peft, no moments", "ucan_fast"}
    assert asked["attenuate", ""] == {"mul_ loop", "ucan_fast"}
    bench = next(one for one in suite.target_benches("cuda") if one.group == "attenuate")
    narrowed = bench.narrowed(asked["attenuate", ""])
    assert [one.name for one in narrowed.candidates] == ["mul_ loop", "ucan_fast"]
    assert len(bench.candidates) > 2
    assert not t.asked_of(bench, "cpu")


def test_the_whole_passes_have_the_candidates_that_targets_name():
    known = {passes.GROUP: passes.CANDIDATES, deletion.GROUP: deletion.CANDIDATES}
    targets = [target for target in t.load_targets() if target.group in known]
    assert {target.group for target in targets} == set(known)
    for target in targets:
        for name in (*target.candidates, *filter(None, [target.floor])):
            assert name in known[target.group], (target.name, name)


def test_the_table_and_the_exit_code(tmp_path, monkeypatch, capsys):
    times = {"peer": [4.0, 4.0, 5.0], "mine": [1.0, 2.0, 2.0]}
    document(tmp_path / "a.json", case("g", SHAPE, times))
    wanted = [_target(name="good", at_least=2.0, stretch=3.0), _target(name="gpu", device="cuda")]
    monkeypatch.setattr(t, "load_targets", lambda: wanted)
    path = str(tmp_path / "a.json")
    assert t.main([path]) == 0
    out = capsys.readouterr().out
    assert "2.50x [2.25x, 3.25x]  >= 2.00x  3.00x not met  pass: good" in out
    assert "not measured (needs a cuda result): gpu" in out
    assert "0 of 1 judged targets fall short" in out
    assert t.main([path, "--device", "cuda"]) == 1
    out = capsys.readouterr().out
    assert "FAIL (not measured: the case is in none of the files): gpu" in out
    wanted[0] = _target(name="bad", at_least=9.0)
    assert t.main([path]) == 1
    assert "FAIL: bad" in capsys.readouterr().out
    assert t.main([str(tmp_path / "none.json")]) == 2
