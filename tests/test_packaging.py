"""What a stranger's install depends on: metadata, the package list, imports without backends."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ucan_fast
from ucan_fast._version import __version__

ROOT = Path(__file__).resolve().parent.parent
in_checkout = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the checkout's setup.py"
)


def python(script: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build_wheel(tmp_path: Path, fails: bool = False, **environment: str) -> tuple[Path, str]:
    """Builds a copy of the checkout without build isolation; returns the wheel and the output."""
    source = tmp_path / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_native_build.txt")
    for name in ("ucan_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = ["wheel", "-v", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *command, str(source)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return next(tmp_path.glob("*.whl"), tmp_path), done.stdout


def test_one_version_everywhere():
    assert importlib.metadata.version("ucan-fast") == __version__
    assert ucan_fast.__version__ == __version__
    changelog = ROOT / "CHANGELOG.md"
    if changelog.exists():
        newest = re.search(r"^## (\S+)", changelog.read_text(), re.MULTILINE)
        assert newest is not None
        assert newest[1] == __version__


@in_checkout
def test_metadata_never_imports_torch(tmp_path):
    """setup.py runs with a torch that fails when it is imported, and still names the libraries."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')")
    done = subprocess.run(
        [sys.executable, "setup.py", "--name", "--version"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ucan-fast", __version__]
    project = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = (.*)$", project, re.MULTILINE)
    assert requires is not None
    assert "torch" not in requires[1]


@in_checkout
def test_every_constraint_is_an_exact_pin():
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert {"torch", "triton", "transformers", "peft"} <= {pin.name for pin in pins}
    for pin in pins:
        assert [s.operator for s in pin.specifier] == ["=="], f"{pin} is not pinned"


@in_checkout
def test_wheel_without_extension_is_pure_and_whole(tmp_path):
    wheel, output = build_wheel(tmp_path, UCAN_FAST_SKIP_EXTENSION="1")
    assert "ucan_fast: ucan_fast._C not built: UCAN_FAST_SKIP_EXTENSION is set" in output
    assert wheel.name == f"ucan_fast-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"ucan_fast"}
    assert names.count("ucan_fast/kernels/__init__.py") == 1
    own = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ucan_fast").rglob("*.py")}
    own |= {f"ucan_fast/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels").rglob("*.py")}
    assert own <= set(names)
    note = zipfile.ZipFile(wheel).read("ucan_fast/_native_build.txt").decode()
    assert "_C: not built: UCAN_FAST_SKIP_EXTENSION is set" in note


@in_checkout
def test_a_compiler_that_fails_is_a_reason_not_a_failure(tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1:1: error: no such luck'; exit 1\n")
    broken.chmod(0o755)
    environment = {"CXX": str(broken), "UCAN_FAST_SKIP_CUDA": "1"}
    wheel, output = build_wheel(tmp_path, **environment)
    reason = "not built: compiling failed: x.cpp:1:1: error: no such luck"
    assert f"ucan_fast: ucan_fast._C {reason}" in output
    files = zipfile.ZipFile(wheel)
    assert f"_C: {reason}" in files.read("ucan_fast/_native_build.txt").decode()
    assert not [name for name in files.namelist() if name.endswith(".so")]


@in_checkout
def test_a_required_extension_that_is_missing_fails_the_build(tmp_path):
    _, output = build_wheel(
        tmp_path, fails=True, UCAN_FAST_REQUIRE_EXTENSION="1", UCAN_FAST_SKIP_EXTENSION="1"
    )
    assert "UCAN_FAST_REQUIRE_EXTENSION is set, but ucan_fast._C not built" in output


@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_kernels_is_found_under_its_installed_name(place, tmp_path):
    script = """
import sys, ucan_fast.kernels as k
print(k.__name__, k.availability()["reason"])
print([m for m in ("matplotlib", "kernels") if m in sys.modules])
"""
    named, needlessly_loaded = python(
        script, ROOT if place == "checkout" else tmp_path
    ).splitlines()
    assert named.startswith("ucan_fast.kernels ")
    if place == "elsewhere":
        assert needlessly_loaded == "[]"


def test_an_install_offers_no_top_level_kernels(tmp_path):
    """PyPI has a package of that name; if it is there, it must be that one."""
    script = (
        "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    )
    origin = python(script, tmp_path).strip()
    assert origin == "None" or not Path(origin).is_relative_to(ROOT / "kernels")


@in_checkout
def test_a_checkout_on_the_path_does_not_pass_for_the_kernels_of_pypi():
    """transformers asks for `kernels` by import name and version; ours must not answer."""
    script = (
        "import kernels, transformers.utils.import_utils as u; "
        "print(kernels.__file__, hasattr(kernels, '__version__'), u.is_kernels_available())"
    )
    found = importlib.util.find_spec("kernels")
    # (Tests of the benchmarks put the checkout on the path of this process.)
    if found is not None and Path(found.origin or "").parent != ROOT / "kernels":
        pytest.skip("the package `kernels` is installed here")
    path, has_version, available = python(script, ROOT).split()
    assert Path(path).parent == ROOT / "kernels"
    assert (has_version, available) == ("False", "False")


def test_imports_without_triton_native_or_matplotlib(tmp_path):
    script = """
import sys
for name in ("triton", "matplotlib"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError("blocked"))
import ucan_fast, ucan_fast.kernels
from ucan_fast import native
print(native.status()["_C"])
print(ucan_fast.kernels.availability())
"""
    status, triton = python(script, tmp_path).splitlines()
    assert status != "available"
    assert "'triton': None" in triton
