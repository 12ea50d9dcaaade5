"""The front end: every candidate of a case is a test, all of them measured in one go.

``pytest benchmarks/kernels --profile quick`` prints one table and writes one JSON file; with
``-k shrink`` of one group. Where pytest-benchmark is installed, it is handed the same times, so
that its tables, comparisons and files work too (``--benchmark-only``, ``--benchmark-autosave``,
...); it measures nothing itself, since it times one function after another and these are
interleaved.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import targets
from benchmarks.kernels import suite
from benchmarks.kernels.cases import benchmark_device
from benchmarks.measure import (
    ROOT,
    Profile,
    Result,
    Skipped,
    chosen_profile,
    described,
    output_path,
    table,
    write_results,
)

_PROFILE = pytest.StashKey[Profile]()
_RESULTS = pytest.StashKey[list[Result]]()
_SKIPPED = pytest.StashKey[list[Skipped]]()
_WRITTEN = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[_PROFILE] = chosen_profile(config.getoption("--profile"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[_RESULTS], config.stash[_SKIPPED] = [], []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "timed" not in metafunc.fixturenames:
        return
    device = benchmark_device()
    benches = suite.benches(metafunc.config.stash[_PROFILE], device)
    if metafunc.config.option.targets:
        asked = [(bench, targets.asked_of(bench, device.type)) for bench in benches]
        benches = [bench.narrowed(names) for bench, names in asked if names]
    chosen = [(bench, candidate.name) for bench in benches for candidate in bench.candidates]
    ids = [_slug(f"{bench.group} {bench.case} {name}") for bench, name in chosen]
    metafunc.parametrize("timed", chosen, ids=ids, indirect=True)


@pytest.fixture
def timed(request: pytest.FixtureRequest) -> Result:
    """The times of one candidate of one case."""
    bench, name = request.param
    stash = request.config.stash
    if skipped := bench.skipped(name):
        stash[_SKIPPED].append(skipped)
        pytest.skip(skipped.reason)
    try:
        result = bench.result(name, stash[_PROFILE])
    except Exception as error:
        # Into the file and the table; the failed test is the exit status.
        failure = Skipped(bench.group, bench.case, name, described(error), failed=True)
        stash[_SKIPPED].append(failure)
        raise
    stash[_RESULTS].append(result)
    if request.config.pluginmanager.hasplugin("benchmark"):
        _hand_over(request, result)
    return result


def _hand_over(request: pytest.FixtureRequest, result: Result) -> None:
    marker = pytest.mark.benchmark(
        group=f"{result.group}: {result.case}", timer=_replay(result.seconds)
    )
    request.node.add_marker(marker)
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info.update(result.extra, bytes=result.bytes, flops=result.flops)
    benchmark.pedantic(lambda: None, rounds=len(result.seconds))


def _replay(seconds: list[float]) -> Callable[[], float]:
    # pytest-benchmark reads its clock before and after each round.
    readings = [reading for duration in seconds for reading in (0.0, duration)]
    return iter(readings).__next__


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    results = config.stash[_RESULTS]
    if not results:
        return
    profile = config.stash[_PROFILE]
    named = config.getoption("--json")
    path = (
        Path(named) if named else output_path("kernels", save=config.option.save, profile=profile)
    )
    # Where the file goes does not belong to what was measured.
    given = iter(config.invocation_params.args)
    kept = [a for a in given if not a.startswith("--json=") and (a != "--json" or not next(given))]
    arguments = shlex.join(kept).replace(f"{ROOT}/", "")
    write_results(
        path,
        results,
        command=f"pytest {arguments}",
        skipped=config.stash[_SKIPPED],
        profile=profile,
    )
    config.stash[_WRITTEN] = path


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if _WRITTEN not in config.stash:
        return
    terminalreporter.section("side by side", sep="=")
    terminalreporter.write_line(table(config.stash[_RESULTS], config.stash[_SKIPPED]))
    terminalreporter.write_line(f"written: {config.stash[_WRITTEN]}")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=]+", "-", text).strip("-")
