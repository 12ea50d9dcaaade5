"""pytest benchmarks/kernels: what becomes of a case in which something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks import measure as m

#: A suite of three small cases, put in the place of the real one.
_CASES = """
import torch
from benchmarks.kernels import suite
from benchmarks.kernels.cases import Bench
from benchmarks.measure import Candidate


def breaks(x):
    raise RuntimeError("no such instruction")


def case(name, functions):
    return Bench(
        "g", {"case": name}, "float32", "torch",
        [Candidate(n, lambda x, f=f: lambda: f(x)) for n, f in functions.items()],
        inputs=lambda seed: (torch.randn(64, generator=torch.Generator().manual_seed(seed)),),
        reference=lambda x: x.double() * 2,
    )


def double(x):
    return x * 2


suite.benches = lambda profile, device: [
    case("one", {"torch": double, "wrong": lambda x: x * 3, "breaks": breaks, "mine": double}),
    case("two", {"torch": breaks, "mine": double}),
    case("three", {"torch": double, "mine": double}),
]
"""


def test_what_is_wrong_loses_its_row_and_fails_the_run(tmp_path):
    (tmp_path / "some_cases.py").write_text(_CASES)
    path = tmp_path / "kernels.json"
    paths = [str(tmp_path), str(m.ROOT), os.environ.get("PYTHONPATH", "")]
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "some_cases", "-p", "no:cacheprovider"),
            *("benchmarks/kernels", "--profile", "quick", "--json", str(path)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=m.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "4 passed" in ran.stdout
    assert "4 errors" in ran.stdout
    assert "FAILED: g: one float32: breaks: RuntimeError: no such instruction" in ran.stdout
    document = m.read_results(path)
    rows = [(row["case"], row["candidate"]) for row in document["results"]]
    assert rows == [
        *(("one float32", name) for name in ("torch", "mine")),
        *(("three float32", name) for name in ("torch", "mine")),
    ]
    lost = {(row["case"], row["candidate"]): row["reason"] for row in document["skipped"]}
    assert all(row["failed"] for row in document["skipped"])
    assert list(lost) == [
        *(("one float32", name) for name in ("wrong", "breaks")),
        *(("two float32", name) for name in ("torch", "mine")),
    ]
    assert "'wrong' is wrong: relative error 0.5" in lost["one float32", "wrong"]
    # Without its baseline nothing of a case can be compared.
    assert lost["two float32", "mine"] == "RuntimeError: no such instruction"
