"""The measuring core: the gate, the ratios, the file."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import measure as m

QUICK = m.Profile("quick", rounds=5, seconds=0.2, min_sample=1e-5, min_rounds=3)


def _inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator), torch.randn(6, 4, generator=generator)


def _product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.double() @ w.double()


def _candidate(name: str, function=torch.matmul, **options) -> m.Candidate:
    return m.Candidate(name, lambda x, w: lambda: function(x, w), **options)


def _measure(*candidates: m.Candidate, **options) -> list[m.Result]:
    settings = {
        "group": "g",
        "shape": {"model": "tiny", "tokens": 8},
        "dtype": "float32",
        "baseline": "torch",
        "reference": _product,
        "profile": QUICK,
    }
    return m.measure(candidates, _inputs, **{**settings, **options})


def _result(name: str, seconds: list[float], **options) -> m.Result:
    shape = {"model": "tiny", "tokens": 8}
    return m.Result(name, "g", shape, "float32", "float32", seconds, baseline="torch", **options)


def test_every_candidate_gets_a_time_per_round():
    results = _measure(_candidate("torch", bytes=10, flops=20), _candidate("mine"))
    assert [r.name for r in results] == ["torch", "mine"]
    assert all(len(r.seconds) >= 3 and min(r.seconds) > 0 for r in results)
    assert len(results[0].seconds) == len(results[1].seconds)
    assert (results[0].bytes, results[0].flops, results[1].bytes) == (10, 20, None)
    assert results[0].case == "tiny tokens=8 float32"
    assert results[0].extra["timing"] == "wall"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w: x @ w * 1.0001,
        lambda x, w: x @ w + math.nan,
        lambda x, w: torch.zeros(8, 4),
        lambda x, w: (x @ w)[:7],
        lambda x, w: (x @ w, x),
        lambda x, w: "a string",
    ],
)
def test_a_wrong_result_raises_by_name_and_nothing_is_timed(wrong, monkeypatch):
    monkeypatch.setattr(m, "_warm", lambda *_: pytest.fail("timed after a red check"))
    with pytest.raises(m.CheckFailed, match=r"g: tiny tokens=8 float32.*'mine'|cannot be checked"):
        _measure(_candidate("torch"), _candidate("mine", wrong))


def _breaks(after: int):
    """Right at first; breaks down in call number ``after``."""
    calls: list[int] = []

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError("out of registers\nand a stack of frames")
        return x @ w

    return product


def test_a_wrong_or_failing_candidate_loses_its_own_row_only():
    failures: dict[str, str] = {}

    def no_reference(x, w):
        raise OSError("no such thing")

    results = _measure(
        _candidate("torch"),
        _candidate("wrong", lambda x, w: x @ w * 1.01),
        _candidate("breaks", _breaks(0)),
        _candidate("breaks later", _breaks(1)),
        _candidate("floor", lambda x, w: x, reference=no_reference),
        _candidate("mine"),
        failures=failures,
    )
    assert [r.name for r in results] == ["torch", "mine"]
    assert len(results[0].seconds) == len(results[1].seconds) >= 3
    assert list(failures) == ["floor", "wrong", "breaks", "breaks later"]
    assert "'wrong' is wrong: relative error 0.01" in failures["wrong"]
    assert failures["breaks"] == failures["breaks later"] == "RuntimeError: out of registers"
    assert failures["floor"] == "OSError: no such thing"


def test_a_wrong_baseline_costs_the_case():
    failures: dict[str, str] = {}
    with pytest.raises(m.CheckFailed, match="'torch' is wrong"):
        _measure(_candidate("torch", lambda x, w: x @ w * 2), _candidate("mine"), failures=failures)
    with pytest.raises(RuntimeError, match="out of registers"):
        _measure(_candidate("torch", _breaks(1)), _candidate("mine"), failures=failures)
    assert not failures


def test_launches_that_cannot_be_counted_cost_no_times(monkeypatch):
    def refused(call):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\nmore")

    monkeypatch.setattr(m, "count_launches", refused)
    reason = "RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
    assert m._launches(lambda: None) == {"launches_reason": reason}


@pytest.mark.parametrize("size", [1 << 10, 1 << 14])
def test_an_output_that_is_not_written_is_not_taken_for_right(size):
    def inputs(seed: int):
        return (torch.randn(size, generator=torch.Generator().manual_seed(seed)),)

    candidates = [
        m.Candidate("torch", lambda x: lambda: x * 2),
        m.Candidate("lazy", lambda x: lambda: torch.empty_like(x)),
    ]
    with pytest.raises(m.CheckFailed, match="'lazy' is wrong"):
        m.check(candidates, inputs, reference=lambda x: x.double() * 2, dtype="float32")


def test_a_narrower_candidate_has_its_own_tolerance_and_a_floor_its_own_reference():
    narrow = _candidate(
        "bf16", lambda x, w: (x.bfloat16() @ w.bfloat16()).float(), dtype="bfloat16"
    )
    floor = _candidate("floor", lambda x, w: x * 2, reference=lambda x, w: x.double() * 2)
    assert len(_measure(_candidate("torch"), narrow, floor)) == 3
    with pytest.raises(m.CheckFailed, match="bf16"):
        _measure(_candidate("torch"), _candidate("bf16", lambda x, w: narrow.bind(x, w)()))


def test_a_part_of_a_result_may_have_to_be_more_exact():
    # Sums that lack a row in a hundred, beside a bf16 result.
    def both(rows: int):
        return lambda x, w: lambda: {"y": x.bfloat16(), "sums": x[:rows].abs().sum(0)}

    def inputs(seed: int):
        return torch.randn(128, 6, generator=torch.Generator().manual_seed(seed)), None

    options = {
        "reference": lambda x, w: {"y": x.double(), "sums": x.double().abs().sum(0)},
        "dtype": "bfloat16",
    }
    floor = m.Candidate("floor", lambda x, w: lambda: x, reference=lambda x, w: x.double())
    short = m.Candidate("short", both(127))
    m.check([short], inputs, **options)
    m.check([m.Candidate("whole", both(128)), floor], inputs, tolerances={"sums": 1e-3}, **options)
    with pytest.raises(m.CheckFailed, match=r"'short' is wrong.*allowed 0\.001"):
        m.check([short], inputs, tolerances={"sums": 1e-3}, **options)


def test_inputs_of_the_check_may_be_others_than_those_timed():
    seen: list[float] = []

    def bind(x: torch.Tensor):
        seen.append(float(x))
        return lambda: x * 2

    def inputs(value: float):
        return lambda seed: (torch.tensor(value),)

    m.measure(
        [m.Candidate("torch", bind)],
        inputs(3.0),
        check_inputs=inputs(5.0),
        group="g",
        shape={},
        dtype="float32",
        baseline="torch",
        reference=lambda x: x.double() * 2,
        profile=QUICK,
    )
    assert seen == [5.0, 3.0]


def test_in_place_candidates_are_checked_on_their_own_copy():
    def double_(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)

    candidates = [_candidate("torch", double_), _candidate("mine", double_)]
    options = {"reference": lambda x, w: x.double() * 2, "dtype": "float32"}
    assert m.check(candidates, _inputs, mutates=True, **options) == {"torch": 0.0, "mine": 0.0}
    with pytest.raises(m.CheckFailed, match="'mine'"):
        m.check(candidates, _inputs, **options)


def test_the_baseline_must_be_there_and_names_distinct():
    with pytest.raises(ValueError, match="distinct"):
        _measure(_candidate("mine"))
    with pytest.raises(ValueError, match="distinct"):
        _measure(_candidate("torch"), _candidate("torch"))


def test_rounds_alternate_their_order_and_stop_in_time():
    order: list[int] = []

    def sampler(i: int):
        def sample(passes: int) -> float:
            order.append(i)
            return 1e-3

        return sample

    seconds = m._rounds([sampler(0), sampler(1)], m.Profile("quick", 4, 60.0, 1e-4))
    # One sample each to set the number of passes, then the rounds.
    assert order[-8:] == [0, 1, 1, 0, 0, 1, 1, 0]
    assert seconds == [[1e-3] * 4] * 2
    late = m._rounds([sampler(0)], m.Profile("quick", 50, -1.0, 1e-4, min_rounds=3))
    assert len(late[0]) == 3


def test_ratios_are_taken_within_a_round():
    # The machine was twice as slow in the last round: it hits both, and the ratio stays.
    results = [_result("torch", [2.0, 2.0, 4.0]), _result("mine", [1.0, 1.0, 2.0])]
    assert m.ratios(results, "torch") == {
        "torch": m.Spread(1.0, 1.0, 1.0),
        "mine": m.Spread(2.0, 2.0, 2.0),
    }
    results = [_result("torch", [1.0] * 5), _result("mine", [1.0, 0.5, 0.25, 0.2, 0.125])]
    assert m.ratios(results, "torch")["mine"] == m.Spread(4.0, 2.0, 5.0)
    with pytest.raises(ValueError):
        m.ratios([_result("torch", [1.0]), _result("mine", [1.0, 2.0])], "torch")


def test_the_file_comes_back_as_it_was_written(tmp_path):
    results = [
        _result("torch", [2.0, 2.0, 4.0], bytes=8, flops=16, roofline_seconds=0.5),
        _result("mine", [1.0, 1.0, 2.0], extra={"peak_bytes": 3}),
    ]
    skipped = [m.Skipped("g", "case", "peer", "not installed")]
    path = m.write_results(
        tmp_path / "new" / "a.json", results, "pytest x", skipped=skipped, profile=QUICK
    )
    document = m.read_results(path)
    torch_row, mine = document["results"]
    assert torch_row["case"] == "tiny tokens=8 float32, float32 adapters"
    assert torch_row["seconds"] == {"median": 2.0, "q1": 2.0, "q3": 3.0, "rounds": [2.0, 2.0, 4.0]}
    assert (torch_row["bytes"], torch_row["flops"], torch_row["roofline_seconds"]) == (8, 16, 0.5)
    assert mine["ratio"] == {"median": 2.0, "q1": 2.0, "q3": 2.0}
    assert mine["baseline"] == "torch"
    assert mine["extra"] == {"peak_bytes": 3}
    assert mine["bytes"] is None
    assert document["skipped"] == [vars(skipped[0])]
    environment = document["environment"]
    assert environment["command"] == "pytest x"
    assert environment["torch"] == torch.__version__
    assert environment["profile"] == "quick"
    assert str(m.ROOT) not in path.read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(schema=99), "schema"),
        (lambda d: d["environment"].pop("commit"), "environment.commit"),
        (lambda d: d["results"][0].pop("baseline"), r"results\[0\].baseline"),
        (lambda d: d["results"][0].update(bytes="many"), r"results\[0\].bytes"),
        (lambda d: d["results"][0]["ratio"].pop("q3"), r"results\[0\].ratio.q3"),
        (lambda d: d["results"][0]["seconds"].update(rounds=[]), "rounds"),
        (lambda d: d["results"][0]["seconds"].update(rounds=[0.0]), "time of every round"),
        (lambda d: d["results"][0]["seconds"].update(rounds=["1"]), "time of every round"),
        (lambda d: d["results"][0]["seconds"].update(median=2.0), "its rounds say 1.0"),
        (lambda d: d["results"][0]["ratio"].update(median=9.0), "ratio.median is 9.0"),
        (lambda d: d["results"][0].update(baseline="other"), "baseline is missing"),
        (lambda d: d.update(results=None), "results is missing or no list"),
        (lambda d: d["environment"].update(device="tpu"), "environment.device"),
        (lambda d: d["environment"].update(date=None), "environment.date"),
        (lambda d: d.pop("skipped"), "skipped"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(tmp_path, damage, message):
    path = m.write_results(tmp_path / "a.json", [_result("torch", [1.0])], "x", profile=QUICK)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        m.read_results(path)


def test_a_file_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not a JSON file"):
        m.read_results(path)


def test_the_profile_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("BENCH_PROFILE", raising=False)
    assert m.chosen_profile().name == "quick"
    monkeypatch.setenv("BENCH_PROFILE", "full")
    assert m.chosen_profile().name == "full"
    assert m.chosen_profile("quick").name == "quick"
    monkeypatch.setenv("BENCH_PROFILE", "fast")
    with pytest.raises(ValueError, match="fast"):
        m.chosen_profile()


def test_output_path_says_what_it_holds(monkeypatch):
    monkeypatch.setattr(m, "hardware", lambda: "NVIDIA H100 80GB HBM3")
    name = m.output_path("kernels", profile=m.PROFILES["full"])
    assert name.parent == m.ROOT / "build" / "bench"
    assert name.name.startswith("nvidia-h100-80gb-hbm3-full-2")
    assert name.name.endswith("-kernels.json")
    assert m.output_path("model", save=True).parent == m.ROOT / "benchmarks" / "results"


def test_shared_storage_is_counted_once():
    x = torch.zeros(4, 4)
    assert m.input_bytes((x, x[1:], [x.t()], torch.nn.Linear(2, 3, bias=False))) == 64 + 24


def test_the_table_keeps_rows_that_lose():
    text = m.table(
        [_result("torch", [1.0, 1.0]), _result("mine", [2.0, 2.0])],
        [m.Skipped("g", "c", "peer", "why"), m.Skipped("g", "c", "bad", "it broke", failed=True)],
    )
    assert "FAILED: g: c: bad: it broke" in text
    assert "mine" in text
    assert "0.50x" in text
    assert "skipped: g: c: peer: why" in text


def test_on_cuda_a_sample_follows_its_own_candidate(monkeypatch):
    # Order only; the clocks that it is for need a GPU.
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            self.name = "start" if "made" not in happened else "end"
            happened.append("made")

        def record(self):
            happened.append(self.name)

        def synchronize(self):
            happened.append("waited")

        def elapsed_time(self, end):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: happened.append("waited"))
    sample = m._event_sampler(lambda: happened.append("run"), 2, settle=1e-3)
    assert sample(3) == pytest.approx(1e-3)  # 6 ms, three passes of two calls
    start, end = happened.index("start"), happened.index("end")
    assert happened[start + 1 : end] == ["run"] * 3
    before = happened[happened.index("waited") : start]
    assert before.count("run") >= 3
    assert before[-1] == "waited"
    happened.clear()
    m._event_sampler(lambda: happened.append("run"), 2)(3)
    assert happened.count("run") == 3


def test_on_cuda_a_case_is_timed_in_one_way(monkeypatch):
    # The choice only; graphs and events themselves need a GPU.
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    settled: list[float] = []
    monkeypatch.setattr(
        m, "_event_sampler", lambda run, calls, settle: settled.append(settle) or calls
    )
    monkeypatch.setattr(m, "_capture", lambda calls: None)
    one, other = m.Candidate("a", lambda x: lambda: x), m.Candidate("b", lambda x: lambda: x)
    syncs = m.Candidate("syncs", lambda x: lambda: x, capturable=False)
    calls = [[lambda: 1, lambda: 2]] * 2
    assert m._samplers([one, other], calls, cuda, settle=0.25) == ([2, 2], {"timing": "graph"})
    assert settled == [0.25] * 4  # eager and captured
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append(1))
    (sample, _), how = m._samplers([one, other], calls, cuda, wall=True)
    assert how == {"timing": "wall"}
    waited.clear()
    assert sample(3) > 0
    # Before the clock starts and before it is read again.
    assert len(waited) == 2
    how = {"timing": "events", "not_captured": "syncs"}
    assert m._samplers([one, syncs], calls, cuda) == ([2, 2], how)

    def refuse(calls):
        raise RuntimeError("operation not permitted\nwhen capturing")

    monkeypatch.setattr(m, "_capture", refuse)
    how = {"timing": "events", "not_captured": "a: operation not permitted"}
    assert m._samplers([one, other], calls, cuda) == ([2, 2], how)
