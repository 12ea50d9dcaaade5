"""The search over rows of the launch table, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from benchmarks import tune
from benchmarks.costs import Ceilings
from benchmarks.kernels.cases import LoraCase
from benchmarks.measure import Profile, describe_environment, read_results, write_results
from benchmarks.shapes import Model
from ucan_fast import ops
from ucan_fast.kernels import expand as expand_module
from ucan_fast.kernels import tuning

CPU = torch.device("cpu")
TINY = Model("Tiny", 1, hidden=64, intermediate=64, query=32, key_value=32)
QUICK = Profile("tune", rounds=2, seconds=0.1, min_sample=0.0, min_rounds=2)


def _case(kernel: str, *, moments: bool = True) -> tune.Case:
    return tune.Case(kernel, LoraCase(TINY, "q_proj", 128), moments)


def test_a_row_holds_for_the_block_only_also_after_an_error():
    key = ("fp32", 16)
    before, programs = tuning.config("expand", key), expand_module.PROGRAMS
    row = tune.current_row("expand", key, CPU) | {"BLOCK_M": 64, "PROGRAMS": 7}
    for place in (("default", key), ("h100", key)):
        known = dict(tuning.TABLE["expand"])
        with tune.row_set("expand", place, row):
            assert tuning.TABLE["expand"][place]["BLOCK_M"] == 64
            assert "PROGRAMS" not in tuning.TABLE["expand"][place]
            assert expand_module.PROGRAMS == 7
        assert tuning.TABLE["expand"] == known
        with pytest.raises(RuntimeError), tune.row_set("expand", place, row):
            raise RuntimeError
        assert tuning.TABLE["expand"] == known
    assert tuning.config("expand", key) == before
    assert programs == expand_module.PROGRAMS


@pytest.mark.parametrize("kernel", tune.GRIDS)
def test_the_current_row_is_in_no_grid_and_every_row_is_there_once(kernel):
    for key in (key for gpu, key in tuning.TABLE[kernel] if gpu == "default"):
        row = tune.current_row(kernel, key, CPU)
        rows = tune.grid(kernel, row)
        second = tune.grid_two(kernel, rows[-1], row)
        assert rows[-1] in second
        for some in (rows, second, tune.grid_two(kernel, row, row)):
            names = [tune.name_of_row(one) for one in (row, *some)]
            assert len(set(names)) == len(names)
            assert all(one.keys() == row.keys() for one in some)


@pytest.mark.parametrize(
    ("kernel", "moments", "key"),
    [
        ("shrink", True, (16, "three", "many")),
        ("expand", True, ("fp32", 16)),
        ("expand", False, ("fp32", 16)),
    ],
)
def test_the_shape_class_is_what_the_call_asks_for(kernel, moments, key):
    case = _case(kernel, moments=moments)
    assert tune.place_of(case, case.bench(CPU), CPU) == ("default", key)


def test_a_kernel_that_is_not_launched_has_no_class():
    x, a = torch.randn(40, 32), torch.randn(16, 32)
    with ops.use_backend("triton"):
        assert tune.recorded_key("expand", lambda: ops.shrink(x, a)) is None


def test_rows_are_measured_and_a_broken_one_loses_its_line_only(tmp_path, monkeypatch, capsys):
    # 48 is no power of two: the kernel cannot be compiled.
    grids = ({"BLOCK_M": (32, 48)}, {"PROGRAMS": (1, 2048)})
    monkeypatch.setitem(tune.GRIDS, "expand", grids)
    monkeypatch.setattr(tuning, "TABLE", tuning.TABLE | {"expand": dict(tuning.TABLE["expand"])})
    monkeypatch.setitem(
        tuning.TABLE["expand"],
        ("default", ("fp32", 16)),
        tuning.config("expand", ("fp32", 16)) | {"BLOCK_M": 16},
    )
    ceilings = Ceilings(bandwidth=1e9, flops={"float32": 1e9}, source="made up")
    first, second = tune.tune(_case("expand"), CPU, ceilings, profile=QUICK)
    assert [one.extra["row"]["BLOCK_M"] for one in first.results] == [16, 32]
    assert len(first.failures) == 1
    assert "M48" in next(iter(first.failures))
    assert tune.BASELINE in {one.name for one in second.results}
    output = capsys.readouterr().out
    assert "1 failed, such as M48" in output
    assert "fastest: ('default', ('fp32', 16)): {'BLOCK_M'" in output
    environment = {**describe_environment(), "ceilings": ceilings.to_json()}
    path = write_results(
        tmp_path / "tune.json",
        [*first.results, *second.results],
        "tune",
        skipped=first.skipped(),
        profile=QUICK,
        environment=environment,
    )
    assert len(read_results(path)["results"]) == len(first.results) + len(second.results)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--adapter-dtype", "float32,bfloat16"]) == 2
    assert "CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--layer", "no_proj"])
