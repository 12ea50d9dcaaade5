"""The expand kernel: y and the moments of δ against fp64, by dtype, rank, shape and stride."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from kernel_launches import Launches

from ucan_fast.kernels import expand as module
from ucan_fast.kernels.expand import expand, rank_class, rows_per_program
from ucan_fast.kernels.tuning import TABLE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINGLE, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
#: base_out, z, B: PEFT's default, an adapter in the base's dtype, autocast, and mixtures.
DTYPES = [
    (BF16, SINGLE, SINGLE),
    (BF16, BF16, BF16),
    (BF16, BF16, SINGLE),
    (SINGLE, SINGLE, SINGLE),
    (HALF, HALF, HALF),
    (HALF, HALF, SINGLE),
    (HALF, SINGLE, SINGLE),
    (SINGLE, BF16, SINGLE),
    (BF16, SINGLE, BF16),
    (BF16, BF16, HALF),
    (BF16, HALF, BF16),
]
RANKS = [1, 3, 8, 16, 24, 64, 65, 256]
S = -1.75


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory that a kernel forgets to write shows up as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=[1, 2, 2048], ids=lambda programs: f"{programs} programs")
def programs(request, monkeypatch):
    """One program with all rows, a few with two or more tiles, and one program per tile."""
    monkeypatch.setattr(module, "PROGRAMS", request.param)
    return request.param


def make(shape=(2, 7, 37), r=3, dtypes=(SINGLE, SINGLE, SINGLE), seed=0):
    """base_out, z, B, bias and groups -1, 0, 1."""
    generator = torch.Generator().manual_seed(seed)

    def randn(dtype, *size):
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    base, z, b = (
        randn(dtypes[0], *shape),
        randn(dtypes[1], *shape[:-1], r),
        randn(dtypes[2], shape[-1], r),
    )
    tokens = z[..., 0].numel()
    groups = torch.randint(-1, 2, (tokens,), generator=generator, dtype=torch.int8).to(DEVICE)
    return base, z, b, randn(dtypes[2], shape[-1]), groups


def totals(n: int) -> torch.Tensor:
    return torch.zeros(2, 2, n, dtype=torch.float64, device=DEVICE)


def moments_of(delta: torch.Tensor, groups: torch.Tensor, only_group=None) -> torch.Tensor:
    """Σ|δ| and Σδ² per group, summed in δ's dtype."""
    rows = delta.reshape(-1, delta.shape[-1])
    total = totals(rows.shape[1])
    for group in (0, 1) if only_group is None else (only_group,):
        part = rows[groups == group]
        total[0, group] = part.abs().sum(0)
        total[1, group] = (part * part).sum(0)
    return total


def assert_no_worse(got: torch.Tensor, torchs: torch.Tensor, want: torch.Tensor) -> None:
    """The tolerance rule: less than twice plain torch's error, plus 1e-6 relative."""
    assert got.shape == want.shape
    assert got.dtype == torchs.dtype
    if want.numel():
        error = (got.double() - want).abs().max().item()
        allowed = (torchs.double() - want).abs().max().item()
        assert error <= 2 * allowed + 1e-6 * want.abs().max().item()


def check(base, z, b, bias, groups, only_group=None):
    """One call with moments and one without, against fp64 and against plain torch."""
    before = base.clone()
    sums = totals(base.shape[-1]) + 1.0
    plain = expand(base, z, b, S, bias)
    y = expand(base, z, b, S, bias, groups, only_group, sums)
    assert torch.equal(base, before)
    assert y.is_contiguous()
    # Recording moments changes no bit of what the model computes.
    assert torch.equal(y, plain)

    rounded = b.to(z.dtype)
    bias = None if bias is None else bias.to(z.dtype)
    wide = None if bias is None else bias.double()
    want = base.double() + S * F.linear(z.double(), rounded.double(), wide)
    assert_no_worse(y, (base + S * F.linear(z, rounded, bias)).to(base.dtype), want)

    exact = moments_of(S * F.linear(z.double(), b.double()), groups, only_group)
    torchs = moments_of(S * F.linear(z.float(), b.float()), groups, only_group)
    for statistic in (0, 1):
        assert_no_worse(sums[statistic] - 1.0, torchs[statistic], exact[statistic])
    return y, sums - 1.0


# ------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("dtypes", "r"),
    [
        *itertools.product(DTYPES, (3, 70)),
        *itertools.product(DTYPES[:3], sorted({*RANKS} - {3})),
    ],
    ids=str,
)
def test_values(dtypes, r):
    base, z, b, bias, groups = make((40, 40), r, dtypes)
    check(base, z, b, bias if r in (3, 16, 256) else None, groups)


@pytest.mark.parametrize(("m", "n"), [(1, 65), (7, 1), (32, 64), (33, 37), (129, 65)])
def test_ragged_sizes(m, n, programs):
    check(*make((m, n), r=5, dtypes=(BF16, SINGLE, SINGLE)))


@pytest.mark.parametrize(("only_group", "with_bias"), [(None, True), (0, False), (1, True)])
@pytest.mark.parametrize("r", [8, 70])
def test_several_tiles_with_all_flags(only_group, with_bias, r, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 4)
    base, z, b, bias, groups = make((70, 130), r, (BF16, BF16, SINGLE))
    check(base, z, b, bias if with_bias else None, groups, only_group)


def test_by_hand():
    z, b = torch.tensor([[5.0], [-1.0]], device=DEVICE), torch.tensor([[2.0], [-1.0]]).to(DEVICE)
    base = torch.tensor([[1.0, 1.0], [0.0, 0.0]], device=DEVICE)
    groups, sums = torch.tensor([0, 1], device=DEVICE), totals(2)
    y = expand(base, z, b, 0.5, torch.tensor([4.0, 0.0], device=DEVICE), groups, None, sums)
    # PEFT's own bias sits in lora_B, before the scaling; the moments are without it.
    assert y.tolist() == [[8, -1.5], [1, 0.5]]
    assert sums.tolist() == [[[5, 2.5], [1, 0.5]], [[25, 6.25], [1, 0.25]]]


@pytest.mark.parametrize("shape", [(37,), (2, 7, 37), (2, 3, 5, 37), (1, 1, 1, 1, 4)])
def test_dimensions(shape):
    base, z, b, bias, groups = make(shape, r=4)
    y, _ = check(base, z, b, bias, groups)
    assert y.shape == shape


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (5, 0), (0, 0)])
def test_nothing_to_do(shape):
    base, z, b, bias, groups = make(shape, r=4, dtypes=(BF16, SINGLE, SINGLE))
    sums = totals(shape[-1]) + 3.0
    y = expand(base, z, b, S, bias, groups, None, sums)
    assert y.shape == shape
    assert y.dtype == BF16
    assert (sums == 3.0).all()


# ------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_autocast_moments_take_b_in_full_and_y_takes_it_rounded(dtype):
    """One row per group and z = 1: every δ can be seen by itself."""
    generator = torch.Generator().manual_seed(3)
    b = (torch.randn(70, 1, generator=generator) * 0.02).to(DEVICE)
    z, base = torch.ones(2, 1, dtype=dtype, device=DEVICE), torch.zeros(2, 70, device=DEVICE)
    sums = totals(70)
    y = expand(base, z, b, 1.0, None, torch.tensor([0, 1], device=DEVICE), None, sums)
    assert torch.equal(y, b.to(dtype).float().T.expand(2, 70))
    assert not torch.equal(y[0], b[:, 0])
    want = b[:, 0].abs().double()
    assert ((sums[0] - want).abs() <= 2**-22 * want).all()


def test_fp32_is_not_tf32():
    """On a bf16 base the moments show in which precision the product was taken."""
    base, z, b, _, groups = make((64, 64), 16, (BF16, SINGLE, SINGLE), seed=1)
    z, b = z.abs() + 1, b.abs() + 1
    sums = totals(64)
    expand(base, z, b, S, None, groups, None, sums)
    torch.testing.assert_close(
        sums, moments_of(S * (z.double() @ b.double().T), groups), rtol=1e-6, atol=0
    )


def test_y_is_rounded_once():
    """A δ of less than half a unit of bf16 still counts before the one rounding."""
    base = torch.full((1, 4), 256.0, dtype=BF16, device=DEVICE)
    z = torch.tensor([[1.0, 2.0**-7]], device=DEVICE)
    b = torch.ones(4, 2, device=DEVICE)
    # 257.0078125: halfway between 256 and 258 and a little, so up; 257 alone would go to 256.
    assert expand(base, z, b, 1.0).tolist() == [[258.0] * 4]
    assert expand(base, z[:, :1].contiguous(), b[:, :1], 1.0).tolist() == [[256.0] * 4]


@pytest.mark.parametrize("s", [0, 1, 2, 1e-3, -16.0])
def test_scaling(s):
    base, z, b, bias, groups = make((33, 40))
    sums = totals(40)
    y = expand(base, z, b, s, bias, groups, None, sums)
    delta = s * (z.double() @ b.double().T)
    torch.testing.assert_close(y.double(), base + delta + s * bias, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sums, moments_of(delta, groups), rtol=1e-6, atol=0)


# ------------------------------------------------------------------ groups and sums


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_groups_of_any_integer_dtype_and_stride(dtype, programs):
    base, z, b, bias, groups = make((70, 20))
    groups = groups.abs() * 2 if dtype == torch.uint8 else groups
    groups[:5] = torch.tensor([7, 100, 0, 1, 2], dtype=torch.int8)
    wide = torch.stack([groups.to(dtype), torch.zeros(70, dtype=dtype, device=DEVICE)], 1)
    assert not wide[:, 0].is_contiguous()
    check(base, z, b, bias, wide[:, 0])


@pytest.mark.parametrize("dtypes", [(BF16, SINGLE, SINGLE), (BF16, BF16, SINGLE)], ids=str)
@pytest.mark.parametrize("only_group", [None, 0, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_bad_values_in_ignored_rows_do_not_spread(dtypes, only_group, bad, programs):
    base, z, b, _, groups = make((70, 40), 8, dtypes)
    clean = totals(40)
    want = expand(base, z, b, S, None, groups, only_group, clean)
    counted = groups == only_group if only_group is not None else groups >= 0
    z[~counted] = bad
    base[~counted] = bad
    sums = totals(40)
    y = expand(base, z, b, S, None, groups, only_group, sums)
    assert torch.equal(sums, clean)
    assert clean.any()
    assert torch.equal(y[counted], want[counted])
    assert not y[~counted].isfinite().any()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000])
@pytest.mark.parametrize("place", ["z", "b"])
def test_every_nan_stays_one(bits, place):
    """A GPU's own has all bits set: rounded like a number it would be a zero."""
    base, z, b, _, groups = make((40, 33), 8, (SINGLE, SINGLE, SINGLE))
    nan = torch.tensor(bits, dtype=torch.int32, device=DEVICE).view(SINGLE)
    where = {"z": z, "b": b}[place]
    where[3, 5] = nan
    sums = totals(33)
    groups[:] = 1
    y = expand(base, z, b, S, None, groups, None, sums)
    lost = y[3] if place == "z" else y[:, 3]
    assert lost.isnan().all()
    assert y.isnan().sum() == lost.numel()
    assert sums[:, 1].isnan().any()


def test_sums_over_many_ranks_are_not_drawn_to_zero():
    """Tensor cores cut sums off instead of rounding them: 96 in a row lose 1.8e-6 of the last."""
    z, b = (torch.rand(16, 256, device=DEVICE) + 0.5 for _ in range(2))
    y = expand(torch.zeros(16, 16, device=DEVICE), z, b, 1.0)
    exact = z.double() @ b.double().T
    # Within a part of the ranks they still do.
    mean, largest = (2e-8, 3e-7) if DEVICE == "cpu" else (3e-7, 1e-6)
    assert ((y - exact) / exact).mean().abs() < mean
    assert ((y - exact) / exact).abs().max() < largest


def test_only_one_group_leaves_the_other_alone(programs):
    base, z, b, _, groups = make((70, 40))
    both = totals(40)
    expand(base, z, b, S, None, groups, None, both)
    for only_group in (0, 1):
        sums = totals(40) + 5.0
        expand(base, z, b, S, None, groups, only_group, sums)
        torch.testing.assert_close(
            sums[:, only_group] - 5.0, both[:, only_group], rtol=1e-6, atol=0
        )
        assert (sums[:, 1 - only_group] == 5.0).all()


def test_totals_may_be_a_view():
    base, z, b, _, groups = make((40, 12))
    want, room = totals(12), torch.zeros(2, 2, 30, dtype=torch.float64, device=DEVICE)
    expand(base, z, b, S, None, groups, None, want)
    expand(base, z, b, S, None, groups, None, room[..., 5:17])
    assert torch.equal(room[..., 5:17], want)
    assert not room[..., :5].any()
    assert not room[..., 17:].any()


def test_same_input_same_bits(programs):
    base, z, b, bias, groups = make((129, 70), 8, (BF16, SINGLE, SINGLE))
    results = []
    for _ in range(2):
        sums = totals(70)
        results.append((expand(base, z, b, S, bias, groups, None, sums), sums))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_more_rows_than_one_slot_holds(monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 1)
    monkeypatch.setattr(module, "MAX_ROWS", 64)
    check(*make((290, 20), 4))


# ------------------------------------------------------------------ strides


def strided(x: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens, width = x.shape
    return {
        "transposed": x.t().contiguous().t(),
        "every second row": x.repeat_interleave(2, 0)[::2],
        "every second column": x.repeat_interleave(2, 1)[:, ::2],
        "padded rows": F.pad(x, (3, 2))[:, 3 : 3 + width],
        "3-D permuted": x.view(2, tokens // 2, width).transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize(
    "kind",
    ["transposed", "every second row", "every second column", "padded rows", "3-D permuted"],
)
@pytest.mark.parametrize("what", ["base", "z", "both"])
def test_strides(kind, what):
    base, z, b, bias, groups = make((66, 40), 8, (BF16, SINGLE, SINGLE))
    want, want_sums = check(base, z, b, bias, groups)
    odd_base = strided(base)[kind] if what != "z" else base
    odd_z = strided(z)[kind] if what != "base" else z
    assert not (odd_base.is_contiguous() and odd_z.is_contiguous())
    if kind == "3-D permuted":
        odd_base, odd_z = odd_base.reshape(2, 33, 40), odd_z.reshape(2, 33, 8)
    sums = totals(40)
    y = expand(odd_base, odd_z, b, S, bias, groups, None, sums)
    assert torch.equal(y.reshape(want.shape), want)
    assert torch.equal(sums, want_sums)


def test_z_may_be_a_slice_of_a_stacked_z():
    """Layers that share an input share one product: z of each is a slice of it."""
    base, z, b, bias, groups = make((2, 20, 40), 24, (BF16, BF16, BF16))
    for part in (slice(0, 8), slice(8, 16), slice(16, 24)):
        piece = z[..., part]
        assert not piece.is_contiguous()
        want = expand(base, piece.contiguous(), b[:, :8], S, bias)
        assert torch.equal(expand(base, piece, b[:, :8], S, bias), want)
        check(base, piece, b[:, part], bias, groups)


def test_expanded_base():
    """A base output of stride 0, as from a broadcast."""
    base, z, b, bias, groups = make((33, 40))
    check(base[:1].expand(33, 40), z, b, bias, groups)


# ------------------------------------------------------------------ the launch


def test_rows_per_program():
    assert rows_per_program(1, 1, 32) == 32
    assert rows_per_program(0, 5, 32) == 32
    # Two programs per SM at a common size; 8 slots.
    assert rows_per_program(8192, 64, 32) == 1024
    assert rows_per_program(8192, 32, 32) == 1024
    assert rows_per_program(4096, 32, 32) == 512
    # Small and tall.
    assert rows_per_program(512, 64, 32) == 128
    assert rows_per_program(10**6, 64, 32) == 1024
    assert rows_per_program(10**8, 1, 32) == 1024
    for m, tiles in itertools.product((1, 100, 8192, 20000), (1, 3, 64, 1000)):
        rows = rows_per_program(m, tiles, 32)
        assert rows % 32 == 0
        assert 32 <= rows <= 1024
        launched = -(-m // rows) * tiles
        # Enough programs for every SM, unless the matrix has not that many tiles.
        assert launched >= min(module.PROGRAMS // 2, -(-m // 32) * tiles)


def test_rank_class():
    ranks = [1, 8, 16, 17, 32, 33, 64, 65, 128, 256]
    assert [rank_class(r) for r in ranks] == [16, 16, 16, 32, 32, 64, 64, 256, 256, 256]


def test_variant():
    """Regular where everything can be read in 16-byte pieces."""

    def of(base, z, b, bias=None):
        return module.variant(base, z, b, bias)

    base, z, b, bias, _ = make((8, 48), 16, (BF16, BF16, BF16))
    assert of(base, z, b) == of(base, z, b, bias) == "regular"
    wide, stacked = torch.zeros(8, 96, dtype=BF16), torch.zeros(8, 24, dtype=BF16)
    assert of(wide[:, 48:], z, b) == "regular"
    assert of(base, z[:, :8], b[:, :8].contiguous()) == "odd ranks"
    assert of(base, z[:, :1], b[:, :1].contiguous()) == "odd ranks"
    assert of(base, stacked[:, 8:], b) == "odd ranks"  # rows of 24
    assert of(base, wide[:, 4:20], b) == "odd ranks"  # begins 8 bytes on
    assert of(base, z, torch.zeros(48 * 16 + 1, dtype=BF16)[1:].view(48, 16)) == "odd ranks"
    for ragged in (
        wide[:, :96:2],
        wide[:, 4:52],
        torch.zeros(8, 49, dtype=BF16)[:, :48],
        torch.zeros(48, 8, dtype=BF16).t(),
    ):
        assert of(ragged, z, b) == of(ragged, z[:, :8], b[:, :8].contiguous()) == "ragged"
    assert of(torch.zeros(8, 33, dtype=BF16), z, b[:33]) == "ragged"
    assert of(base, z, b, torch.zeros(49, dtype=BF16)[1:]) == "ragged"


def test_every_specialisation_that_is_launched_is_compiled(monkeypatch):
    """Every launch has an ahead-of-time case with its types, constants, options and alignment."""
    variants = module._VARIANTS
    launches = Launches({kind: kernel for kind, (kernel, _) in variants.items()})
    assert launches.alone == {kind: set(unknown) for kind, (_, unknown) in variants.items()}
    compiled = launches.compiled(module.compile_cases())
    recorders = {kind: (launches.of(kind), unknown) for kind, (_, unknown) in variants.items()}
    monkeypatch.setattr(module, "_VARIANTS", recorders)
    monkeypatch.setattr(module, "fold_", lambda *args: None)

    def check_launch(base, z, b, bias=None, only=None, moments=True, first_group=0):
        groups = torch.zeros(base.shape[0] + 1, dtype=torch.int8, device=DEVICE)
        groups = groups[first_group : first_group + base.shape[0]]
        sums = totals(base.shape[1]) if moments else None
        expand(base, z, b, S, bias, groups, only, sums)
        (what,) = launches.taken()
        assert what in compiled, (base.shape, base.stride(), z.shape, z.stride(), what)
        return what[0]

    main = [(BF16, SINGLE, SINGLE), (BF16, BF16, BF16), (BF16, BF16, SINGLE), (SINGLE,) * 3]
    fp16 = [(HALF, SINGLE, SINGLE), (HALF, HALF, HALF), (HALF, HALF, SINGLE)]
    for dtypes, rank in itertools.product(main + fp16, (16, 32, 64, 256)):
        base, z, b, bias, _ = make((8, 48), rank, dtypes)
        narrow = [1, 8] if rank == 16 else [rank - 8]
        operands = [("regular", base, z, b)]
        operands += [("odd ranks", base, z[:, :r].contiguous(), b[:, :r]) for r in narrow]
        operands += [
            ("odd ranks", base, make((8, 48), rank + 8, dtypes)[1][:, 8:], b),
            ("ragged", base[:, :33].contiguous(), z, b[:33]),
            ("ragged", base[:, :33], z[:, :1], b[:33, :1]),
            ("ragged", base[:, :1].contiguous(), z, b[:1]),
            ("ragged", base[:, ::2], z, b[:24]),
        ]
        for kind, *tensors in operands:
            assert check_launch(*tensors) == check_launch(*tensors, first_group=1) == kind
            if dtypes in main:
                assert check_launch(*tensors, moments=False) == kind
                assert check_launch(*tensors, only=1) == kind
            if dtypes in main:
                n = tensors[2].shape[0]
                assert check_launch(*tensors, bias[:n].contiguous()) == kind


def test_the_cases_are_the_launches_of_every_dtype(monkeypatch):
    """Types, flags and block sizes, of mixtures of dtypes too."""
    names = {SINGLE: "fp32", BF16: "bf16", HALF: "fp16"}
    launched = []

    class Recorder:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                launched.append((args, kwargs))

            return launch

    cases = module.compile_cases()
    assert len({case.name for case in cases}) == len(cases)
    arguments = module.expand_kernel.arg_names
    for case in cases:
        assert set(case.signature) == set(arguments)
        assert {k for k, kind in case.signature.items() if kind == "constexpr"} == set(
            case.constants
        )
    keys = {(case.constants["BLOCK_R"], case.constants["BLOCK_N"]) for case in cases}
    assert keys == {(row["BLOCK_R"], row["BLOCK_N"]) for row in TABLE["expand"].values()}

    monkeypatch.setattr(module, "_VARIANTS", {"regular": (Recorder(), [])})
    monkeypatch.setattr(module, "fold_", lambda *args: None)
    for dtypes, r in itertools.product(DTYPES, (16, 64, 256)):
        base, z, b, _, groups = make((4, 16), r, dtypes)
        for sums in (None, totals(16)):
            expand(base, z, b, S, None, groups, None, sums)
            args, kwargs = launched.pop()
            types_ = {
                name: f"*{names[value.dtype]}"
                for name, value in zip(arguments, args, strict=False)
                if isinstance(value, torch.Tensor) and name != "groups"
            }
            flags = {k: v for k, v in kwargs.items() if k.isupper()}
            # Three dots only where rounding B makes a difference to what is asked for.
            rounds = dtypes[1] != SINGLE and dtypes[2] != dtypes[1]
            assert flags["SPLIT"] == (rounds and sums is not None)
            options = types.SimpleNamespace(**{k: v for k, v in kwargs.items() if not k.isupper()})
            matching = [
                case
                for case in cases
                if case.kernel is module.expand_kernel
                and {k: v for k, v in case.constants.items() if k.isupper()} == flags
                and all(case.signature[k] == v for k, v in types_.items())
            ]
            assert matching, (dtypes, r, sums is not None)
            for case in matching:
                assert case.num_warps == options.num_warps
                assert case.num_stages == options.num_stages
                assert case.options["enable_fp_fusion"] == options.enable_fp_fusion
