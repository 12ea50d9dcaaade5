"""The interpreter of the tests prepares Triton's language once per launch, and takes it back."""

from __future__ import annotations

import fast_interpreter
import pytest
import torch

from ucan_fast import kernels

if torch.cuda.is_available() or kernels.obstacle("cpu"):
    pytest.skip("kernels run compiled here, or not at all", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter

if not hasattr(interpreter, "_LangPatchScope"):
    pytest.skip(f"Triton {triton.__version__} prepares otherwise", allow_module_level=True)


@triton.jit
def twice(x):
    return x + x


@triton.jit
def power_kernel(x, y, n, DOUBLINGS: tl.constexpr, FAILS: tl.constexpr):
    at = tl.arange(0, 8)
    value = tl.load(x + at, mask=at < n, other=0.0)
    for _ in tl.static_range(DOUBLINGS):
        value = twice(value)
    tl.static_assert(not FAILS)
    tl.store(y + at, value, mask=at < n)
    tl.store(y + n, tl.sum(value))


def run(doublings: int, fails: bool = False) -> list[float]:
    x = torch.tensor([1.0, 2.0, 3.0])
    y = torch.full((5,), 9.0)
    power_kernel[(1,)](x, y, 3, DOUBLINGS=doublings, FAILS=fails)
    return y.tolist()


def test_once_per_launch_however_many_calls(monkeypatch):
    seen = []
    real = interpreter._patch_lang_tensor
    monkeypatch.setattr(
        interpreter, "_patch_lang_tensor", lambda *args: seen.append(args) or real(*args)
    )
    run(1)  # what a first launch leaves in place, the interpreter keeps
    load, counts = tl.load, []
    for doublings, values in ((1, [2.0, 4.0, 6.0, 12.0, 9.0]), (3, [8.0, 16.0, 24.0, 48.0, 9.0])):
        seen.clear()
        assert run(doublings) == values
        assert tl.load is load
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


def test_a_launch_that_fails_leaves_the_next_as_it_was():
    load = tl.load
    with pytest.raises(Exception, match="AssertionError"):
        run(1, fails=True)
    assert tl.load is load
    assert run(1) == [2.0, 4.0, 6.0, 12.0, 9.0]


def test_a_device_function_may_be_called_on_its_own():
    assert twice(2) == 4
    assert run(1) == [2.0, 4.0, 6.0, 12.0, 9.0]


def test_a_grid_may_launch_a_kernel_itself():
    x, y = torch.ones(3), torch.zeros(5)
    inner = []

    def grid(_arguments):
        inner.append(run(3))
        return (1,)

    # What the inner launch takes back, the outer one's device functions put in place again.
    power_kernel[grid](x, y, 3, DOUBLINGS=1, FAILS=False)
    assert inner == [[8.0, 16.0, 24.0, 48.0, 9.0]]
    assert y.tolist() == [2.0, 2.0, 2.0, 6.0, 0.0]


def test_numpys_dtypes_are_the_interpreters_and_kept():
    looked_up = interpreter._get_np_dtype
    run(1)
    assert "fp32" in looked_up.known
    for dtype in (tl.float32, tl.bfloat16, tl.int1, tl.int64, tl.pointer_type(tl.bfloat16)):
        for asked in (dtype, tl.block_type(dtype, [4])):
            assert looked_up(asked) == looked_up.real(asked)


def test_installing_twice_changes_nothing():
    installed = interpreter._patch_lang
    fast_interpreter.install()
    assert interpreter._patch_lang is installed
    assert installed.once_per_launch
