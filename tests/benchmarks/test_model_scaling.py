"""Slopes, resources and the command line of the whole-pass benchmarks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks import measure as m
from benchmarks import report
from benchmarks.model import __main__ as command
from benchmarks.model import resources, scaling
from benchmarks.model.slopes import Slope, attach_slopes, slope_table
from benchmarks.model.timing import PROFILES

CPU = torch.device("cpu")


def _result(size: int, seconds: list[float], name: str = "ucan_fast") -> m.Result:
    shape = {"model": "tiny", "blocks": size}
    return m.Result(name, "scaling", shape, "float32", "float32", seconds, baseline=name)


# Slopes


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_a_power_law_has_its_power_as_slope(power):
    slope = Slope.of([(x, 3.0 * x**power) for x in (1, 2, 4, 8, 16)])
    assert slope.value == pytest.approx(power, abs=1e-12)
    assert slope.standard_error == pytest.approx(0.0, abs=1e-7)


def test_slope_and_error_are_those_of_least_squares():
    sizes, seconds = np.array([1, 2, 4, 8, 20]), np.array([1.1, 1.9, 4.4, 7.0, 23.0])
    design = np.stack([np.log(sizes), np.ones(5)], 1)
    solution, (residual,), *_ = np.linalg.lstsq(design, np.log(seconds), rcond=None)
    covariance = residual / 3 * np.linalg.inv(design.T @ design)
    slope = Slope.of(list(zip(sizes.tolist(), seconds.tolist(), strict=True)))
    assert slope.value == pytest.approx(solution[0])
    assert slope.standard_error == pytest.approx(math.sqrt(covariance[0, 0]))


@pytest.mark.parametrize(
    "points",
    [
        [(1, 1.0), (2, 2.0), (4, 4.0)],
        [(1, 1.0), (2, 2.0), (4, 4.0), (4, 5.0)],
        [(0, 1.0), (1, 1.0), (2, 2.0), (4, 4.0)],
        [(1, 1.0), (2, 2.0), (4, 4.0), (8, 0.0)],
    ],
)
def test_too_few_or_impossible_points_are_refused(points):
    with pytest.raises(ValueError):
        Slope.of(points)


def test_slopes_use_medians_and_land_in_every_result():
    # One slow round must not tilt the line.
    results = [_result(x, [float(x), float(x), 50.0]) for x in (1, 2, 4, 8)]
    results += [_result(x, [2.0] * 3, "flat") for x in (1, 2, 4, 8)]
    attach_slopes(results, "blocks")
    assert {round(r.extra["slope"]["value"], 9) for r in results} == {1.0, 0.0}
    assert results[0].extra["slope"]["points"] == [[1, 1], [2, 2], [4, 4], [8, 8]]
    text = slope_table(results)
    assert len(text.splitlines()) == 2
    assert "along blocks" in text
    assert "1.00 ± 0.00 (4 points, 1 to 8)" in text
    assert slope_table([_result(1, [1.0])]) == ""


@pytest.mark.parametrize("profile", ["quick", "full"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_sweep_varies_one_size(profile, kind):
    sweeps = scaling.sweeps(PROFILES[profile], kind)
    wanted = {"forget_tokens", "blocks"} | ({"tokens", "rank"} if profile == "full" else set())
    assert set(sweeps) == wanted
    # What the report says a profile leaves out.
    assert set(scaling.sweeps(PROFILES["full"], kind)) == set(report._ALONG)
    for points in sweeps.values():
        assert len(points) >= 4
        differing = {
            key for key in vars(points[0]) if len({getattr(point, key) for point in points}) > 1
        }
        assert len(differing) == 1
        assert all(point.forget <= point.sequences / 2 for point in points)


def test_a_sweep_from_end_to_end(monkeypatch):
    tiny = scaling.Size(32, 1, 4, 8, batch=1, forget=1, sequences=3)
    points = [tiny, *(scaling.dataclasses.replace(tiny, blocks=b) for b in (2, 3, 4))]
    monkeypatch.setattr(scaling, "sweeps", lambda *_: {"blocks": points})
    profile = m.Profile("quick", rounds=1, seconds=0.0, min_sample=0.0, min_rounds=1)
    ((results, skipped),) = scaling.run(profile, CPU)
    assert not skipped
    swept = [r for r in results if r.group == "scaling"]
    assert len(swept) == 4 * len(scaling.CANDIDATES)
    assert len({r.case for r in results}) == 4
    assert all(r.extra["slope"]["along"] == "blocks" for r in swept)
    again = [r for r in results if r.group == "scaling_forward"]
    assert len(again) == 4 * 3
    assert {r.baseline for r in again} == {"peft, plain forward, both sets"}
    assert not any("slope" in r.extra for r in again)
    assert {r.extra["extrapolated"] for r in results if "retrain" in r.name} == {False}


# Memory and energy


def test_peak_memory_sees_what_is_freed_again():
    def pass_of(megabytes: int):
        return lambda: torch.ones(megabytes * 2**18).sum()

    small, large = (resources.peak_memory(pass_of(n), CPU) for n in (1, 256))
    if large["peak_memory_bytes"] is None:
        pytest.skip(large["peak_memory_reason"])
    assert small["peak_memory_bytes"] < 64 * 2**20
    assert 256 * 2**20 * 0.95 < large["peak_memory_bytes"] < 320 * 2**20


def test_memory_that_cannot_be_measured_is_null_with_the_reason(monkeypatch):
    monkeypatch.setattr(resources, "_reset_high_water", lambda: "not permitted")
    assert resources.peak_memory(lambda: None, CPU) == {
        "peak_memory_bytes": None,
        "peak_memory_reason": "not permitted",
    }


def _rapl(folder, joules: float, wraps: float = 100.0):
    domain = folder / "intel-rapl:0"
    domain.mkdir(exist_ok=True)
    (domain / "energy_uj").write_text(str(int(joules * 1e6)))
    (domain / "max_energy_range_uj").write_text(str(int(wraps * 1e6)))
    # Parts of the package: counted once, with it.
    part = folder / "intel-rapl:0:0"
    part.mkdir(exist_ok=True)
    (part / "energy_uj").write_text("5")


def test_energy_is_the_mean_per_pass_and_wraps(monkeypatch, tmp_path):
    _rapl(tmp_path, 90.0)
    read = resources._rapl(tmp_path)
    monkeypatch.setattr(resources, "_rapl", lambda: read)
    meter = resources.EnergyMeter(CPU)
    with meter.metered():
        _rapl(tmp_path, 96.0)
    with meter.metered():
        _rapl(tmp_path, 4.0)
    meter.seconds = 2.0
    assert meter.per_pass()["energy_joules"] == pytest.approx((6 + 8) / 2)
    assert meter.per_pass(3.0)["energy_joules"] == pytest.approx(21)
    assert "RAPL" in meter.per_pass()["energy_by"]
    meter.seconds = 1e-4
    assert meter.per_pass()["energy_joules"] is None
    assert "shorter than five periods" in meter.per_pass()["energy_reason"]


def test_energy_without_a_counter_is_null_with_the_reason(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert resources._rapl(folder).startswith("no RAPL counter")
    _rapl(tmp_path, 1.0)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert "cannot be read" in resources._rapl(tmp_path)


# Command line


def test_groups_are_chosen_and_unknown_ones_refused(capsys):
    assert command.parse([]).only == ["collect", "deletion", "scaling"]
    assert command.parse(["--only", "scaling,collect"]).only == ["collect", "scaling"]
    for wrong in ("collect,nothing", ","):
        with pytest.raises(SystemExit):
            command.parse(["--only", wrong])
    assert "collect,deletion,scaling" in capsys.readouterr().err


def test_the_file_holds_results_skips_and_how_to_run_it_again(monkeypatch, tmp_path, capsys):
    skip = m.Skipped("deletion", "a case", "ucan_fast, bank", "no data")
    swept = [_result(x, [float(x)]) for x in (1, 2, 4, 8)]
    attach_slopes(swept, "blocks")
    monkeypatch.setitem(command.GROUPS, "scaling", lambda *_: [(swept, [])])
    monkeypatch.setitem(command.GROUPS, "deletion", lambda *_: [([], [skip])])
    path = tmp_path / "model.json"
    arguments = ["--profile", "quick", "--only", "deletion,scaling", "--json", str(path)]
    assert command.main(arguments) == 0
    document = m.read_results(path)
    assert document["skipped"] == [vars(skip)]
    assert document["results"][0]["extra"]["slope"]["value"] == pytest.approx(1.0)
    assert document["environment"]["profile"] == "quick"
    said = document["environment"]["command"]
    assert said == "python -m benchmarks.model --profile quick --only deletion,scaling"
    assert str(tmp_path) not in path.read_text()
    printed = capsys.readouterr().out
    assert "skipped: deletion: a case: ucan_fast, bank: no data" in printed
    assert "log-log slope along blocks" in printed


def test_an_interrupted_run_keeps_what_came_before(monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        yield [_result(2, [1.0])], []
        raise KeyboardInterrupt

    monkeypatch.setitem(command.GROUPS, "collect", lambda *_: [([_result(1, [1.0])], [])])
    monkeypatch.setitem(command.GROUPS, "deletion", interrupted)
    monkeypatch.setitem(command.GROUPS, "scaling", lambda *_: pytest.fail("went on"))
    path = tmp_path / "model.json"
    assert command.main(["--json", str(path)]) == 130
    # The case of the group that was done, too, and it was printed.
    assert len(m.read_results(path)["results"]) == 2
    said = capsys.readouterr()
    assert "interrupted in deletion" in said.err
    assert "blocks=2" in said.out
    path.unlink()

    def at_once(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(command.GROUPS, "deletion", at_once)
    assert command.main(["--only", "deletion", "--json", str(path)]) == 130
    assert not path.exists()


def test_a_group_that_breaks_down_costs_its_own_cases_only(monkeypatch, tmp_path, capsys):
    def broken(*_):
        yield [_result(2, [1.0])], []
        raise m.CheckFailed("'ucan_fast' is wrong")

    monkeypatch.setitem(command.GROUPS, "collect", lambda *_: [([_result(1, [1.0])], [])])
    monkeypatch.setitem(command.GROUPS, "deletion", broken)
    monkeypatch.setitem(command.GROUPS, "scaling", lambda *_: [([_result(4, [1.0])], [])])
    path = tmp_path / "model.json"
    assert command.main(["--json", str(path)]) == 1
    assert len(m.read_results(path)["results"]) == 3
    assert "error: deletion: 'ucan_fast' is wrong" in capsys.readouterr().err
    failure = m.Skipped("collect", "a case", "ucan_fast", "OSError: no", failed=True)
    monkeypatch.setitem(command.GROUPS, "collect", lambda *_: [([_result(1, [1.0])], [failure])])
    assert command.main(["--only", "collect", "--json", str(path)]) == 1
    assert "FAILED: collect: a case: ucan_fast: OSError: no" in capsys.readouterr().out
    assert m.read_results(path)["skipped"] == [vars(failure)]
    path.unlink()
    # Why there is no row at all is worth a file.
    monkeypatch.setitem(command.GROUPS, "collect", lambda *_: [([], [failure])])
    assert command.main(["--only", "collect", "--json", str(path)]) == 1
    assert m.read_results(path)["skipped"] == [vars(failure)]


def test_a_red_check_writes_nothing(monkeypatch, tmp_path, capsys):
    def red(*_):
        raise m.CheckFailed("collect: tiny: 'peft' is wrong")

    monkeypatch.setitem(command.GROUPS, "collect", red)
    path = tmp_path / "model.json"
    assert command.main(["--only", "collect", "--json", str(path)]) == 1
    assert not path.exists()
    assert "is wrong" in capsys.readouterr().err
