"""What DESIGN asks of every kernel and no result can show, read from the source.

The interpreter gives 0 for a masked-out element without ``other``; a GPU gives anything.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ucan_fast import kernels

FILES = sorted(Path(kernels.__file__).parent.glob("*.py"))


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def named(call: ast.Call) -> set[str | None]:
    return {keyword.arg for keyword in call.keywords}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_masked_load_names_other(path):
    for call in calls(path):
        if ast.unparse(call.func) == "tl.load" and "mask" in named(call):
            assert "other" in named(call), f"{path.name}:{call.lineno} {ast.unparse(call)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_launch_says_whether_products_and_sums_are_fused(path):
    for call in calls(path):
        launch = isinstance(call.func, ast.Subscript) and ast.unparse(call.func.value)
        if launch and launch.endswith("_kernel"):
            assert "enable_fp_fusion" in named(call), f"{path.name}:{call.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_atomics(path):
    used = {ast.unparse(call.func) for call in calls(path)}
    assert not [name for name in used if "atomic" in name]


def test_the_rules_see_the_kernels():
    """Neither a renamed module nor another way of launching makes the rules above empty."""
    everything = [call for path in FILES for call in calls(path)]
    loads = [c for c in everything if ast.unparse(c.func) == "tl.load" and "mask" in named(c)]
    launches = [c for c in everything if "enable_fp_fusion" in named(c)]
    assert len(loads) > 20
    assert len(launches) >= 9
