"""attenuate_: rows and columns times their factors, rounded once, or refused untouched."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from ucan_fast import UcanError, native, ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The stored bytes, so that -0.0 and NaN payloads count."""
    return tensor.detach().contiguous().view(torch.uint8).clone()


def random_weight(shape, dtype, seed) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_factors(n, seed=0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def oracle(weight: torch.Tensor, factor: torch.Tensor, axis: int) -> torch.Tensor:
    """Exact product in fp64, rounded as the definition says; element by element."""
    result = weight.clone()
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            f = factor[(row, column)[axis]]
            if float(f) == 1.0:
                continue
            exact = weight[row, column].double() * f.double()  # of two 24-bit mantissas: exact
            if weight.dtype != torch.float64:
                exact = exact.float()
            result[row, column] = exact.to(weight.dtype)
    return result


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_an_oracle_bit_by_bit(backend, dtype, axis):
    for seed, shape in enumerate([(1, 1), (5, 7), (17, 3), (2, 33)]):
        weight = random_weight(shape, dtype, seed)
        factors = random_factors(shape[axis], seed + 10)
        expected = oracle(weight, factors, axis)
        ops.attenuate_([weight], factors, [0], [axis])
        assert torch.equal(bits(weight), bits(expected))


def round_to_bf16(value: float) -> float:
    """Nearest even, on the bits of the fp32 value."""
    raw = int(numpy.float32(value).view(numpy.uint32))
    raw = (raw + 0x7FFF + ((raw >> 16) & 1)) & 0xFFFF0000
    return float(numpy.uint32(raw).view(numpy.float32))


def test_bf16_is_multiplied_in_fp32_and_rounded_once(backend):
    weight = random_weight((40, 25), torch.bfloat16, 0)
    factors = random_factors(40)
    before = weight.clone()
    ops.attenuate_([weight], factors, [0], [0])
    for row in range(40):
        for column in range(25):
            # float * float in Python is exact here (8 + 24 bits), the fp32 cast is the product.
            exact = numpy.float32(float(before[row, column]) * float(factors[row]))
            assert float(weight[row, column]) == round_to_bf16(exact)
    # The shortcut (factors rounded to bf16 first) is another result, so this test can fail.
    assert not torch.equal(weight, before * factors.bfloat16().unsqueeze(1))


def test_fp64_is_multiplied_in_fp64(backend):
    weight = torch.tensor([[1.0 + 2.0**-40]], dtype=torch.float64)
    ops.attenuate_([weight], torch.tensor([0.5]), [0], [0])
    assert weight.item() == 0.5 + 2.0**-41


def test_known_numbers_rows_and_columns(backend):
    rows = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    columns = rows.clone()
    # factors: 0.5 and 2 for the rows, 10, 1, 0.1 for the columns
    factors = torch.tensor([0.5, 2.0, 10.0, 1.0, 0.25])
    ops.attenuate_([rows, columns], factors, [0, 2], [0, 1])
    assert rows.tolist() == [[0.5, 1.0, 1.5], [8.0, 10.0, 12.0]]
    assert columns.tolist() == [[10.0, 2.0, 0.75], [40.0, 5.0, 1.5]]


def test_strided_factors(backend):
    weight = torch.full((3, 2), 4.0)
    ops.attenuate_([weight], torch.tensor([0.5, 9.0, 1.0, 9.0, 0.25, 9.0])[::2], [0], [0])
    assert weight.tolist() == [[2.0, 2.0], [4.0, 4.0], [1.0, 1.0]]


def test_weights_may_share_a_range_of_factors_and_mix_dtypes(backend):
    factors = torch.tensor([9.0, 0.5, 0.25])
    first = torch.full((2, 3), 4.0)
    second = torch.full((3, 2), 4.0, dtype=torch.bfloat16)
    third = torch.full((2, 1), 4.0, dtype=torch.float64)
    ops.attenuate_([first, second, third], factors, [1, 1, 1], [0, 1, 0])
    assert first.tolist() == [[2.0] * 3, [1.0] * 3]
    assert second.tolist() == [[2.0, 1.0]] * 3
    assert third.tolist() == [[2.0], [1.0]]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "integer", "payload"),
    [
        (torch.float32, torch.int32, 0x7F800123),  # a signalling NaN with a payload
        (torch.bfloat16, torch.int16, 0x7F81),
        (torch.float16, torch.int16, 0x7C05),
        (torch.float64, torch.int64, 0x7FF0000000000123),
    ],
)
def test_a_factor_of_exactly_one_leaves_the_bits(backend, dtype, integer, payload, axis):
    weight = torch.zeros(3, 3, dtype=dtype)
    weight[1] = -0.0
    weight[:, 1] = -0.0
    weight.view(integer)[0, 0] = payload
    weight.view(integer)[2, 2] = payload
    before = bits(weight)
    ops.attenuate_([weight], torch.ones(3), [0], [axis])
    assert torch.equal(bits(weight), before)


def test_negative_zero_stays_negative_when_scaled(backend):
    weight = torch.tensor([[-0.0, 0.0, -3.0]])
    ops.attenuate_([weight], torch.tensor([0.5, 0.5, 0.0]), [0], [1])
    assert [math.copysign(1, v) for v in weight[0].tolist()] == [-1.0, 1.0, -1.0]
    assert weight[0, 2] == 0


def test_factor_zero_and_subnormal_results(backend):
    weight = torch.tensor([[5.0, 1e-38, 2.0**-149]])
    expected = oracle(weight, torch.tensor([0.0, 0.125, 0.5]), 1)
    ops.attenuate_([weight], torch.tensor([0.0, 0.125, 0.5]), [0], [1])
    assert torch.equal(bits(weight), bits(expected))
    assert weight[0, 1] > 0


@pytest.mark.parametrize("axis", [0, 1])
def test_strided_weights(backend, axis):
    def layouts():
        yield random_weight((6, 4), torch.float32, 1).t()
        yield random_weight((9, 10), torch.bfloat16, 2)[1:8:2, 2:9:3]
        yield random_weight((12, 5), torch.float16, 3)[5:9]
        yield random_weight((1, 6), torch.float32, 4).t()
        yield random_weight((7,), torch.float64, 5)[2:6].unsqueeze(0)

    for weight in layouts():
        base = weight if weight._base is None else weight._base
        surroundings = bits(base)
        factors = random_factors(weight.shape[axis], 7)
        expected = oracle(weight, factors, axis)
        original = weight.clone()
        ops.attenuate_([weight], factors, [0], [axis])
        assert torch.equal(weight, expected)
        weight.copy_(original)
        assert torch.equal(bits(base), surroundings)  # nothing outside the view was written


def test_two_row_ranges_of_one_matrix(backend):
    weight = random_weight((6, 3), torch.float32, 0)
    before = weight.clone()
    factors = torch.tensor([0.5, 1.0, 0.25])
    ops.attenuate_([weight[:3], weight[3:]], factors, [0, 0], [0, 0])
    assert torch.equal(weight, before * torch.cat([factors, factors]).unsqueeze(1))


def test_nothing_to_do(backend):
    ops.attenuate_([], torch.ones(3), [], [])
    ops.attenuate_([torch.empty(0, 4)], torch.ones(4), [0], [1])
    ops.attenuate_([torch.empty(4, 0)], torch.ones(0), [0], [1])


def test_requires_grad_is_fine_under_no_grad(backend):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with torch.no_grad():
        ops.attenuate_([weight], torch.tensor([0.5, 1.0]), [0], [0])
    assert weight.tolist() == [[0.5, 0.5], [1.0, 1.0]]


def test_native_and_reference_agree_bit_by_bit(monkeypatch):
    if native.status()["_C"] != "available":
        pytest.skip(f"no native library: {native.status()['_C']}")
    results = []
    for name in ("reference", "native"):
        monkeypatch.setenv("UCAN_FAST_BACKEND", name)
        weights, offsets, axes = [], [], []
        for index, dtype in enumerate(DTYPES * 3):
            weights.append(random_weight((65, 37), dtype, index))
            axes.append(index % 2)
            offsets.append(index)
        factors = random_factors(100)
        factors[::7] = 1.0
        ops.attenuate_(weights, factors, offsets, axes)
        results.append([bits(w) for w in weights])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Refusals: the culprit is named, and no weight is touched (the good ones in the list included).


def refused(match, weights, factors=None, offsets=None, axes=None):
    factors = torch.full((8,), 0.5) if factors is None else factors
    offsets = [0] * len(weights) if offsets is None else offsets
    axes = [0] * len(weights) if axes is None else axes
    before = [w.detach().clone() for w in weights]
    with pytest.raises(UcanError, match=match):
        ops.attenuate_(weights, factors, offsets, axes)
    assert all(
        torch.equal(bits(w), bits(b))
        for w, b in zip(weights, before, strict=True)
        if w.device.type != "meta"
    )


def test_refuses_weights_of_another_kind(backend):
    good = torch.ones(2, 2)
    refused("weight 1 must be a floating matrix", [good, torch.ones(2, 2, dtype=torch.int32)])
    refused("weight 1 must be a floating matrix", [good, torch.ones(2, 2, dtype=torch.complex64)])
    refused("weight 1 must be a floating matrix", [good, torch.ones(2)])
    refused("weight 1 must be a floating matrix", [good, torch.ones(2, 2, 2)])


def test_refuses_factors_of_another_kind(backend):
    good = torch.ones(2, 2)
    refused("factors must be one flat float32", [good], torch.ones(2, dtype=torch.float64))
    refused("factors must be one flat float32", [good], torch.ones(2, dtype=torch.bfloat16))
    refused("factors must be one flat float32", [good], torch.ones(2, 1))


def test_refuses_lists_of_different_lengths(backend):
    good = torch.ones(2, 2)
    refused("2 weights, 1 offsets and 2 axes", [good, torch.ones(2, 2)], offsets=[0], axes=[0, 0])
    refused("1 weights, 1 offsets and 2 axes", [good], offsets=[0], axes=[0, 0])


@pytest.mark.parametrize("offset", [-1, 7, 1000])
def test_refuses_offsets_out_of_range(backend, offset):
    refused("weight 1 needs factors", [torch.ones(2, 2), torch.ones(2, 3)], offsets=[0, offset])


def test_the_last_factor_can_be_used(backend):
    weight = torch.ones(2, 3)
    ops.attenuate_([weight], torch.full((8,), 0.5), [6], [0])
    assert weight.tolist() == [[0.5] * 3] * 2
    refused("weight 0 needs factors", [torch.ones(2, 3)], offsets=[6], axes=[1])


@pytest.mark.parametrize("axis", [2, -1])
def test_refuses_another_axis(backend, axis):
    refused("weight 0: axis must be 0", [torch.ones(2, 2)], axes=[axis])


def test_refuses_another_device(backend):
    refused("weight 1 is on meta", [torch.ones(2, 2), torch.ones(2, 2, device="meta")])


def test_refuses_while_gradients_are_recorded(backend):
    refused("weight 0 requires a gradient", [torch.nn.Parameter(torch.ones(2, 2))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_refuses_weights_that_overlap(backend, dtype):
    weight = torch.ones(4, 4, dtype=dtype)
    refused("weights 0 and 1 overlap", [weight, weight])
    refused("weights 0 and 1 overlap", [weight[:3], weight[2:]])
    refused("weights 1 and 2 overlap", [torch.ones(2, 2), weight[2:], weight.t()])
    refused("weights 0 and 1 overlap", [weight, weight[1:2, 1:2]])
    refused("weights 0 and 1 overlap", [weight[3:], weight])  # the later address first
    line = torch.ones(1, 7, dtype=dtype)
    refused("weights 0 and 1 overlap", [line[:, :4], line[:, 3:]])  # by one element


def test_refuses_factors_in_a_weights_memory(backend):
    """They would change while they are applied: the result would be the backend's order."""
    flat = torch.full((4,), 0.5)
    for factors in (flat, flat[1:3], flat[2:]):
        refused("weight 1 and the factors overlap", [torch.ones(1, 1), flat.view(2, 2)], factors)
    wide = torch.full((2, 2), 0.5, dtype=torch.float64)
    refused("weight 0 and the factors overlap", [wide], wide.view(torch.float32).flatten())
    # Half a factor, at its end.
    narrow = torch.full((9,), 0.5, dtype=torch.bfloat16)
    refused(
        "weight 0 and the factors overlap",
        [narrow[3:].view(2, 3)],
        narrow[:4].view(torch.float32),
    )


def test_factors_beside_a_weight_in_one_buffer_are_taken(backend):
    for weight, factors in ((slice(0, 4), slice(4, 6)), (slice(2, 6), slice(0, 2))):
        buffer = torch.full((6,), 0.5)
        ops.attenuate_([buffer[weight].view(2, 2)], buffer[factors], [0], [0])
        assert buffer[weight].tolist() == [0.25] * 4
        assert buffer[factors].tolist() == [0.5] * 2
    # Strided factors are copied first, so that it does not matter where they lie.
    buffer = torch.full((2, 3), 0.5)
    ops.attenuate_([buffer], buffer[:, 0], [0], [0])
    assert (buffer == 0.25).all()
    # Nothing lies in an empty weight or an empty list of factors.
    buffer = torch.full((4,), 0.5)
    ops.attenuate_([buffer[:0].view(0, 2)], buffer, [0], [1])
    ops.attenuate_([], buffer[:0], [], [])


def test_refuses_weights_that_overlap_themselves(backend):
    refused("weight 0 overlaps itself", [torch.ones(1, 3).expand(4, 3)])
    refused("weight 0 overlaps itself", [torch.ones(3, 1).expand(3, 4)])
    # a sliding window: every element but the corners is in there more than once
    refused("weight 0 overlaps itself", [torch.ones(6).as_strided((3, 3), (1, 1))])
    refused("weight 0 overlaps itself", [torch.ones(9).as_strided((3, 4), (2, 1))])


def test_unusual_strides_that_do_not_overlap_are_taken(backend):
    # offsets 0, 2, 4 and 3, 5, 7: interleaved, no element twice
    base = torch.full((8,), 4.0)
    ops.attenuate_([base.as_strided((2, 3), (3, 2))], torch.tensor([0.5, 0.25]), [0], [0])
    assert base.tolist() == [2.0, 4.0, 2.0, 1.0, 2.0, 1.0, 4.0, 1.0]


def test_one_row_or_column_never_overlaps_itself(backend):
    weight = torch.ones(6).as_strided((1, 4), (0, 1))
    ops.attenuate_([weight], torch.full((4,), 0.5), [0], [1])
    assert weight.tolist() == [[0.5] * 4]


def test_opcheck(backend):
    for dtype in DTYPES:
        weights = [random_weight((4, 3), dtype, 0), random_weight((2, 5), dtype, 1)]
        torch.library.opcheck(
            torch.ops.ucan_fast.attenuate_.default,
            (weights, random_factors(7), [0, 2], [0, 1]),
        )


def test_schema_declares_the_mutation():
    schema = torch.ops.ucan_fast.attenuate_.default._schema
    assert [a.is_write for a in schema.arguments] == [True, False, False, False]
    assert not schema.returns


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_backward_that_saved_the_old_values_notices(backend, monkeypatch):
    monkeypatch.setenv("UCAN_FAST_BACKEND", backend)
    weight = torch.randn(4, 3, requires_grad=True)
    loss = (torch.randn(2, 3, requires_grad=True) @ weight.T).sum()
    with torch.no_grad():
        ops.attenuate_([weight], torch.full((4,), 0.5), [0], [0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
