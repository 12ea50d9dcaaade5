"""The attenuate kernel against the reference, bit for bit, and the CUDA operator beside it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ucan_fast import native
from ucan_fast.kernels import attenuate
from ucan_fast.ops.attenuate import attenuate_reference_

# numpy, under the interpreter, warns of the NaN and infinities that the tests ask for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
LAYOUTS = ("plain", "transposed", "every other", "column slice", "row slice", "misaligned")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Small blocks, so that tiny matrices have several and end within one."""
    if DEVICE == "cpu":
        monkeypatch.setattr(attenuate, "UNITS", 32)
        monkeypatch.setattr(attenuate, "ELEMENTS", 128)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def random_values(shape, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary values, random bits of every exponent, and NaN of every payload and signal."""
    size = dtype.itemsize
    patterns = torch.randint(-(2 ** (8 * size - 1)), 2 ** (8 * size - 1) - 1, shape)
    patterns = patterns.to(BITS[size])
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(BITS[size]))
    patterns = torch.where(torch.rand(shape) < 0.2, patterns | infinity, patterns)
    ordinary = torch.randn(shape).to(dtype)
    return torch.where(torch.rand(shape) < 0.5, patterns.view(dtype), ordinary)


def laid_out(rows: int, cols: int, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """A ``[rows, cols]`` view into storage with more in it (all but plain and transposed)."""
    if layout == "transposed":
        return random_values((cols, rows), dtype).to(DEVICE).T
    if layout == "every other":
        return random_values((2 * rows, 2 * cols), dtype).to(DEVICE)[::2, ::2]
    if layout == "column slice":
        return random_values((rows, cols + 24), dtype).to(DEVICE)[:, 8 : 8 + cols]
    if layout == "row slice":
        return random_values((rows + 3, cols), dtype).to(DEVICE)[2 : 2 + rows]
    if layout == "misaligned":
        return random_values((rows * cols + 1,), dtype).to(DEVICE)[1:].view(rows, cols)
    return random_values((rows, cols), dtype).to(DEVICE)


def storage_of(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=weight.dtype, device=weight.device).set_(weight.untyped_storage())


def some_factors(n: int) -> torch.Tensor:
    factors = torch.rand(n)
    factors[torch.rand(n) < 0.4] = 1.0
    factors[torch.rand(n) < 0.1] = 0.0
    factors[torch.rand(n) < 0.05] = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    return factors


def described(weights, axes, gap: int = 0):
    """Factors of all weights with ``gap`` factors that nobody may read before each."""
    parts, offsets, total = [], [], 0
    for weight, axis in zip(weights, axes, strict=True):
        needed = weight.shape[axis]
        parts += [torch.full((gap,), torch.nan), some_factors(needed)]
        offsets.append(total + gap)
        total += gap + needed
    return torch.cat(parts) if parts else torch.empty(0), offsets


def assert_same(got: torch.Tensor, expected: torch.Tensor, what: object = "") -> None:
    """Equal bits; the payload of a NaN that was multiplied is the hardware's."""
    got, expected = got.cpu(), expected.cpu()
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan), what
    assert torch.equal(bits(got)[~nan], bits(expected)[~nan]), what


def check(weights, factors, offsets, axes, run=attenuate.attenuate_) -> None:
    """The kernel on the weights; the reference on copies of their whole storages, on the CPU."""
    before = [storage_of(weight).cpu().clone() for weight in weights]
    expected = [storage.clone() for storage in before]
    views = [
        storage.as_strided(weight.shape, weight.stride(), weight.storage_offset())
        for storage, weight in zip(expected, weights, strict=True)
    ]
    attenuate_reference_(views, factors, offsets, axes)
    run(weights, factors.to(DEVICE), offsets, axes)
    for i, weight in enumerate(weights):
        after = storage_of(weight).cpu()
        # Values around a view, and neurons with a factor of 1, keep even a NaN's bits.
        assert_same(after, expected[i], (i, axes[i], weight.shape, weight.stride()))
        factor = factors[offsets[i] : offsets[i] + weight.shape[axes[i]]].unsqueeze(1 - axes[i])
        touched = torch.zeros(after.shape, dtype=torch.bool)
        touched.as_strided(weight.shape, weight.stride(), weight.storage_offset()).copy_(
            (factor != 1).expand(weight.shape)
        )
        assert torch.equal(bits(after)[~touched], bits(before[i])[~touched])


SHAPES = [(16, 40), (40, 16), (8, 8), (3, 5), (1, 40), (40, 1), (1, 1), (7, 33), (70, 2), (5, 0)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference_bit_for_bit(dtype, layout):
    weights = [laid_out(*shape, layout, dtype) for shape in SHAPES for _ in range(2)]
    axes = [0, 1] * len(SHAPES)
    check(weights, *described(weights, axes), axes)


@pytest.mark.parametrize("gap", [1, 4], ids=["misaligned factors", "aligned factors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_anywhere_in_the_flat_tensor(dtype, gap):
    weights = [laid_out(16, 32, "plain", dtype), laid_out(32, 16, "transposed", dtype)]
    for axes in ([0, 0], [1, 1]):
        check(weights, *described(weights, axes, gap), axes)


def test_alignment_decides_what_is_scaled_in_wide_units():
    def wide(weight, axis=0, offset=0):
        factors = torch.empty(4096, device=DEVICE)
        assert factors.data_ptr() % 16 == 0
        return bool(attenuate._table_row(weight, factors, offset, axis)[0][-1])

    plain = torch.zeros(16, 64, dtype=torch.bfloat16, device=DEVICE)
    odd_stride = torch.zeros(4, 60, dtype=torch.bfloat16, device=DEVICE)
    column = torch.zeros(64, 1, dtype=torch.bfloat16, device=DEVICE)
    for case in [
        (plain,),
        (plain, 1),
        (plain.T,),
        (plain[:, 8:24], 1, 4),
        (plain, 0, 3),
        (column,),
    ]:
        assert wide(*case), case[0].stride()
    narrow = [
        (plain, 1, 3),
        (plain[:, 1:9],),
        (plain[:, :4],),
        (plain[:, ::2],),
        (odd_stride[:, :8],),
    ]
    for case in narrow:
        assert not wide(*case), case[0].stride()


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        self.launches.append(grid)
        return self.kernel[grid]


def test_hundreds_of_matrices_of_mixed_dtypes_in_one_launch_each(monkeypatch):
    counted = Counted(attenuate.attenuate_kernel)
    monkeypatch.setattr(attenuate, "attenuate_kernel", counted)
    shapes = [(4, 40), (40, 4), (0, 3), (2, 3)]
    weights = [random_values(shapes[i % 4], DTYPES[i % 3]).to(DEVICE) for i in range(130)]
    weights.insert(60, laid_out(40, 96, "plain", torch.bfloat16))  # one large among small
    axes = [i % 2 for i in range(len(weights))]
    check(weights, *described(weights, axes), axes)
    assert len(counted.launches) == 3


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9])
def test_the_search_finds_every_matrix(count):
    weights = [random_values((1 + 5 * i, 13), torch.float32).to(DEVICE) for i in range(count)]
    for order in (weights, weights[::-1]):
        axes = [i % 2 for i in range(count)]
        check(order, *described(order, axes), axes)


def test_shared_factors_and_nothing_to_do():
    weights = [laid_out(16, 24, "plain", torch.float32), laid_out(24, 5, "plain", torch.float16)]
    check(weights, some_factors(24), [0, 0], [1, 0])
    check([], torch.empty(0), [], [])
    check([laid_out(0, 8, "plain", torch.float32)], torch.empty(0), [0], [0])
    ones = torch.full((40, 8), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    before = bits(ones).clone()
    attenuate.attenuate_([ones], torch.ones(40, device=DEVICE), [0], [0])
    assert torch.equal(bits(ones), before)


def test_lines_too_long_for_32_bit_division(monkeypatch):
    """A line that exists only in the table, of 2^32 + 4 units: 4 of them if cut to 32 bits."""
    values = random_values((64,), torch.float32).to(DEVICE)
    expected = values.clone()
    attenuate_reference_([expected.view(1, 64)], torch.full((1,), 0.5, device=DEVICE), [0], [0])
    entry = attenuate._table_row

    def long_line(weight, factors, offset, axis):
        row, _ = entry(weight, factors, offset, axis)
        row[2:5] = [1, 4 * ((1 << 32) + 4), 0]  # one line, far longer than the block launched
        return row, 1

    monkeypatch.setattr(attenuate, "_table_row", long_line)
    monkeypatch.setattr(attenuate, "UNITS", 16)
    attenuate.attenuate_([values.view(1, 64)], torch.full((1,), 0.5, device=DEVICE), [0], [0])
    assert_same(values, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [60, 61, 448, 512, 513, 1100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cuda_operator_takes_any_number_of_matrices(dtype, count):
    assert native.status()["_C_cuda"] == "available", native.status()
    shapes = [(16, 256), (256, 16), (7, 33), (8, 640), (40, 1)]
    weights = [laid_out(*shapes[i % 5], LAYOUTS[i % 6], dtype) for i in range(count)]
    axes = [i % 2 for i in range(count)]
    native_operator = torch.ops.ucan_fast._attenuate_native_
    for gap in (0, 1):
        check(weights, *described(weights, axes, gap), axes, run=native_operator)


@pytest.mark.gpu
def test_the_cuda_operator_launches_once_and_can_be_captured():
    weights = [random_values((16, 128), torch.bfloat16).cuda() for _ in range(448)]
    factors, offsets = described(weights, [0] * 448)
    arguments = (weights, factors.cuda(), offsets, [0] * 448)
    native_operator = torch.ops.ucan_fast._attenuate_native_
    native_operator(*arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        native_operator(*arguments)
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if "attenuate" in event.key) == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        native_operator(*arguments)
    check(weights, factors, offsets, [0] * 448, run=lambda *_: graph.replay())
