"""The shrink kernels: z = x Aᵀ, the moments of x and of z, and the choice of launch options."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton
from kernel_launches import Launches
from shrink_checks import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    assert_moments,
    assert_z,
    name_of,
    randn,
    random_groups,
    zeros,
)

from ucan_fast.kernels import moments, shrink_finish, tuning
from ucan_fast.kernels import shrink as module
from ucan_fast.kernels.shrink import chunks, compile_cases, dot_mode, pad_rank, shrink

I64 = torch.int64
ALL = list(itertools.product((FP32, BF16, FP16), repeat=3))  # of x, of A, of the product
MAIN = [(BF16, BF16, BF16), (BF16, FP32, FP32), (FP32, FP32, FP32), (FP32, FP32, BF16)]
WAYS = ("as chosen", "one chunk", "chunks of two blocks")


pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def way(request, monkeypatch):
    """Makes the launcher cut K in the way of the test's parameter."""

    def one(m, k, r, block_m, block_k):
        return 1, triton.cdiv(k, block_k) * block_k

    def twos(m, k, r, block_m, block_k):
        return triton.cdiv(k, 2 * block_k), 2 * block_k

    if request.param == WAYS[1]:
        monkeypatch.setattr(module, "chunks", one)
    elif request.param == WAYS[2]:
        monkeypatch.setattr(module, "chunks", twos)
    return request.param


def check(x, a, dtype, only=None):
    """One call with everything, and one without moments, which must give the same z."""
    groups = random_groups(x)
    of_x, of_z = zeros(x.shape[-1]), zeros(a.shape[0])
    z = shrink(x, a, dtype, groups, only, of_x, of_z)
    assert_z(z, x, a, dtype)
    assert_moments(of_x, x, groups, only)  # as given, whatever the product's dtype
    assert_moments(of_z, z, groups, only)  # as stored
    assert torch.equal(shrink(x, a, dtype), z)
    return z


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("dtypes", ALL, ids=name_of)
@pytest.mark.parametrize("k", [144, 150])
def test_every_mix_of_dtypes(dtypes, k):
    check(randn(37, k, dtype=dtypes[0]), randn(3, k, dtype=dtypes[1], seed=1), dtypes[2])


@pytest.mark.parametrize("dtypes", MAIN, ids=name_of)
@pytest.mark.parametrize("r", [1, 3, 8, 16, 48, 64, 100, 256])
@pytest.mark.parametrize("k", [77, 80])
def test_ranks(dtypes, r, k):
    x, a = randn(33, k, dtype=dtypes[0]), randn(r, k, dtype=dtypes[1], seed=1)
    check(x, a, dtypes[2])
    check(x[:2], a, dtypes[2])


@pytest.mark.parametrize("only", [None, 1])
def test_more_ranks_than_one_launch_takes(only):
    check(randn(7, 40, dtype=BF16), randn(2 * module.MAX_RANK + 3, 40, seed=1), FP32, only)


@pytest.mark.parametrize("dtypes", MAIN, ids=name_of)
@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize(("m", "k"), [(1, 45), (7, 150), (7, 80), (33, 64), (129, 31), (130, 208)])
def test_sizes(dtypes, way, m, k):
    check(randn(m, k, dtype=dtypes[0]), randn(5, k, dtype=dtypes[1], seed=1), dtypes[2])


@pytest.mark.parametrize("only", [0, 1])
@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("m", [7, 129])
def test_one_group(only, way, m):
    check(randn(m, 150, dtype=BF16), randn(5, 150, seed=1), FP32, only)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_fp32_keeps_its_digits(dtype):
    """A's lowest bits count although x is bf16, and so does every one of the three parts."""
    a = torch.tensor([1 + 2.0**-23, 1 + 2.0**-12, 3 - 2.0**-22, -(2.0**-100)], device=DEVICE)
    x = torch.eye(4, dtype=dtype, device=DEVICE) * 2
    assert torch.equal(shrink(x, a[None, :], FP32)[:, 0], 2 * a)


def test_operands_are_rounded_to_the_product():
    """1 + 2^-9 is 1 in bf16, and 1 + 3·2^-9 is 1 + 2^-7: not what truncation would make of it."""
    x = torch.tensor([[1 + 2.0**-9, 1 + 3 * 2.0**-9]], device=DEVICE)
    eye = torch.eye(2, device=DEVICE)
    want = torch.tensor([[1.0, 1 + 2.0**-7]], dtype=BF16, device=DEVICE)
    assert torch.equal(shrink(x, eye, BF16), want)
    assert torch.equal(shrink(eye, x, BF16)[:, 0], want[0])
    of_x = zeros(2)
    shrink(x, eye, BF16, torch.zeros(1, dtype=torch.int8, device=DEVICE), None, of_x)
    assert torch.equal(of_x[0, 0], x[0].double())


# ------------------------------------------------------------------ shapes and strides


@pytest.mark.parametrize("shape", [(12,), (1, 12), (2, 3, 12), (2, 3, 4, 12), (0, 12), (2, 0, 12)])
def test_shapes(shape):
    z = check(randn(*shape), randn(3, 12, seed=1), FP32)
    assert z.shape == (*shape[:-1], 3)


def test_no_columns():
    z = shrink(randn(4, 0), randn(3, 0), BF16)
    assert torch.equal(z, torch.zeros(4, 3, dtype=BF16, device=DEVICE))


STRIDED = {
    "every other row": lambda: randn(80, 70)[::2],
    "every other column": lambda: randn(20, 140)[:, ::2],
    "transposed": lambda: randn(70, 37).t(),
    "one row repeated": lambda: randn(1, 70).expand(9, 70),
    "permuted 3-D": lambda: randn(4, 70, 5).permute(2, 0, 1),
    "a slice of a wider row": lambda: randn(3, 4, 100)[..., 7:77],
    # Columns enough for 16-byte pieces, but not in their places.
    "one element late": lambda: randn(40 * 80 + 1)[1:].view(40, 80),
    "rows of odd length": lambda: randn(40, 81)[:, :80],
    "every other column of 80": lambda: randn(40, 160)[:, ::2],
    "aligned rows, wide apart": lambda: randn(40, 160)[:, 16:96],
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_strides_of_x(name, dtype):
    plain = STRIDED[name]()
    x = torch.empty(0, dtype=dtype, device=DEVICE)
    # The same strides and offset in the other dtype, which a conversion would not keep.
    storage = torch.empty(0, device=DEVICE).set_(plain.untyped_storage()).to(dtype)
    x.set_(storage.untyped_storage(), plain.storage_offset(), plain.shape, plain.stride())
    assert torch.equal(x, plain.to(dtype))
    check(x, randn(5, x.shape[-1], seed=1), FP32)


@pytest.mark.parametrize("m", [7, 70])
def test_a_begins_at_an_odd_place(m):
    x, a = randn(m, 80, dtype=BF16), randn(5 * 80 + 1, seed=1)[1:].view(5, 80)
    assert not module.aligned(x, a)
    check(x, a, FP32)


def test_strides_of_a():
    x = randn(7, 70)
    check(x, randn(70, 5, seed=1).t(), FP32)
    check(x, randn(10, 140, seed=1)[::2, ::2], FP32)


def test_stacked_adapters_give_each_its_own():
    """Layers that read the same x are served by one call with their A's stacked."""
    x, parts = randn(40, 150, dtype=BF16), [randn(16, 150, dtype=BF16, seed=s) for s in (1, 2, 3)]
    z = check(x, torch.cat(parts), BF16)
    for part, own in zip(z.split(16, dim=-1), parts, strict=True):
        assert_z(part.contiguous(), x, own, BF16)


# ------------------------------------------------------------------ moments


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("only", [None, 0, 1])
def test_moments_are_added_and_each_can_be_had_alone(way, only):
    x, a = randn(131, 150), randn(5, 150, seed=1)
    groups = random_groups(x, torch.int64)
    of_x, of_z = zeros(150) + 3, zeros(5) + 4
    z = shrink(x, a, FP32, groups, only, input_moments=of_x)
    again = shrink(x, a, FP32, groups, only, rank_moments=of_z)
    assert torch.equal(z, again)
    assert_z(z, x, a, FP32)
    assert_moments(of_x - 3, x, groups, only)
    assert_moments(of_z - 4, z, groups, only)
    if only is not None:
        assert torch.all(of_x[:, 1 - only] == 3)
        assert torch.all(of_z[:, 1 - only] == 4)


@pytest.mark.parametrize("way", WAYS[:2], indirect=True)
@pytest.mark.parametrize("m", [20, 135])
def test_ignored_rows_do_not_spread(way, m):
    x, a = randn(m, 150), randn(5, 150, seed=1)
    groups = torch.tensor([0, 1, -1, 2, -100] * (m // 5), device=DEVICE)
    counted = (groups == 0) | (groups == 1)
    x[~counted] = torch.nan
    of_x, of_z = zeros(150), zeros(5)
    z = shrink(x, a, FP32, groups, None, of_x, of_z)
    assert z[~counted].isnan().all()
    assert_z(z[counted], x[counted], a, FP32)
    assert_moments(of_x, x[counted], groups[counted])
    assert_moments(of_z, z[counted], groups[counted])


@pytest.mark.parametrize("m", [3, 140])
def test_same_input_same_bits(m):
    x, a = randn(m, 150, dtype=BF16), randn(5, 150, seed=1)
    groups = random_groups(x)
    runs = []
    for _ in range(2):
        of_x, of_z = zeros(150), zeros(5)
        runs.append((shrink(x, a, FP32, groups, None, of_x, of_z), of_x, of_z))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


# ------------------------------------------------------------------ what is launched


def test_chunks_cover_k_once():
    for m, k, r, (block_m, block_k) in itertools.product(
        (1, 7, 33, 128, 129, 4096, 8192, 65536),
        (1, 31, 64, 65, 576, 4096, 14336),
        (1, 16, 256),
        ((16, 64), (128, 32), (64, 16)),
    ):
        splits, chunk = chunks(m, k, r, block_m, block_k)
        assert 1 <= splits <= module.MAX_SPLITS
        assert chunk % block_k == 0
        assert (splits - 1) * chunk < k <= splits * chunk


def test_chunks_fill_the_gpu():
    assert chunks(8192, 4096, 16, 128, 64) == (4, 1024)  # 256 programs: two on each of 132 SMs
    assert chunks(1, 4096, 16, 16, 64) == (64, 64)  # decoding: parallelism from K alone
    assert chunks(65536, 4096, 16, 128, 64) == (1, 4096)  # rows enough: no workspace
    assert chunks(8192, 4096, 256, 128, 64) == (2, 2048)  # wide z: partial sums are not free
    assert chunks(8192, 1 << 20, 16, 128, 64)[0] == 4


def test_few_many_and_ragged_rows_take_their_own_tiles(monkeypatch):
    seen = []
    config = tuning.config
    monkeypatch.setattr(tuning, "config", lambda *args: seen.append(args[:2]) or config(*args))
    for m, x, a, dtype in (
        (module.FEW_ROWS, BF16, BF16, BF16),
        (module.FEW_ROWS + 1, BF16, FP32, FP32),
        (1, FP32, BF16, BF16),
        (1, FP16, FP32, FP32),
    ):
        shrink(randn(m, 32, dtype=x), randn(48, 32, dtype=a), dtype)
        shrink(randn(m, 20, dtype=x), randn(48, 20, dtype=a), dtype)
    assert [key for kernel, key in seen if kernel == "shrink"] == [
        (64, "16-bit", "few"),
        (64, "16-bit", "ragged"),
        (64, "three", "many"),
        (64, "three", "ragged"),
        (64, "32-bit", "few"),
        (64, "32-bit", "ragged"),
        (64, "32-bit", "few"),
        (64, "32-bit", "ragged"),
    ]


def test_aligned():
    x, a = randn(8, 160, dtype=BF16), randn(3, 80, dtype=BF16)
    odd = randn(3 * 80 + 1, dtype=BF16)[1:].view(3, 80)
    assert module.aligned(x[:, :80], a)
    assert module.aligned(x[:, 8:88], a)  # 16 bytes on
    assert not module.aligned(x[:, 4:84], a)
    assert not module.aligned(x[:, :80], odd)
    assert not module.aligned(x[:, ::2], a)
    assert not module.aligned(x[:, :72], a[:, :72])
    assert not module.aligned(randn(8, 88, dtype=BF16)[:, :80], a)
    assert not module.aligned(randn(80, 16, dtype=BF16).t(), a)
    for rank, whole in ((64, True), (60, True), (100, False), (112, True), (250, False)):
        assert module.aligned(x[:, :80], randn(rank, 80, dtype=BF16)) == whole, rank


def test_what_is_launched_is_what_is_compiled(monkeypatch):
    """Every launch has an ahead-of-time case with its types, constants, options and alignment."""
    names = {
        "shrink_kernel": module,
        "shrink_odd_rank": module,
        "shrink_ragged": module,
        "finish_kernel": shrink_finish,
        "finish_odd": shrink_finish,
    }
    launches = Launches({name: getattr(place, name) for name, place in names.items()})
    assert launches.alone["shrink_odd_rank"] == set(module.ODD_RANK)
    assert launches.alone["shrink_ragged"] == set(module.RAGGED)

    def kind(what):
        name, constants, types, *_ = what
        return name, constants["R_PAD"], types.get("x"), types.get("a")

    compiled = {}
    for what in launches.compiled([*compile_cases(), *shrink_finish.compile_cases()]):
        compiled.setdefault(kind(what), []).append(what)
    for name, place in names.items():
        monkeypatch.setattr(place, name, launches.of(name))
        monkeypatch.setattr(place, "fold_", lambda *args: None)

    def check_launch(x, a, product, moments, only=None, groups=torch.int8, of_z=True):
        groups = torch.zeros(x.shape[0] + 16, dtype=groups, device=DEVICE)
        if groups.dtype == torch.int64:
            groups = groups[1:]
        sums = zeros(x.shape[1]) if moments else None
        z_sums = zeros(a.shape[0]) if moments and of_z else None
        shrink(x, a, product, groups[: x.shape[0]], only, sums, z_sums)
        taken = launches.taken()
        for what in taken:
            where = (x.shape, x.stride(), x.dtype, a.shape, a.dtype, product, what)
            assert what in compiled.get(kind(what), ()), where
        return taken[0][0]

    # One chunk without moments writes z itself: half of the launches below.
    for one in (False, True):
        if one:
            monkeypatch.setattr(module, "chunks", lambda m, k, r, block_m, block_k: (1, 256))
        for dtypes, r, m in itertools.product(module._DTYPES, (16, 32, 64, 128, 256), (4, 64)):
            x, a, product = (module._NAMES[name] for name in dtypes)
            main, many = dtypes in module._DTYPES[:3], m > module.FEW_ROWS
            regular = randn(m, 256, dtype=x), randn(r, 256, dtype=a)
            odd = [
                (randn(m, 255, dtype=x), randn(r, 255, dtype=a)),
                (randn(m, 512, dtype=x)[:, ::2], regular[1]),
                (randn(256, m, dtype=x).t(), regular[1]),
                (randn(m * 256 + 1, dtype=x)[1:].view(m, 256), regular[1]),
                (regular[0], randn(r * 256 + 1, dtype=a)[1:].view(r, 256)),
                (randn(m, 257, dtype=x)[:, :256], regular[1]),
                (randn(m, 1, dtype=x), randn(r, 1, dtype=a)),
            ]
            if r > 16 and "fp16" in dtypes:
                odd = []
            for operands in (regular, *odd):
                ragged = operands is not regular
                kernel = check_launch(*operands, product, True)
                assert kernel == ("shrink_ragged" if ragged else "shrink_kernel")
                if main:
                    check_launch(*operands, product, True, only=1)
                    # Ranks that are no multiple of 16; 1 would be a constant if it were told.
                    for few in (-3, 1) if r == 16 else (-3,):
                        narrow = operands[1][:few]
                        kernel = check_launch(operands[0], narrow, product, True, groups=I64)
                        odd_rank = "shrink_ragged" if ragged or r > 64 else "shrink_odd_rank"
                        assert kernel == odd_rank
                        if dtypes == module._DTYPES[0] and not ragged and r <= 64:
                            more = {"groups": I64, "of_z": False}
                            check_launch(operands[0], narrow, product, True, **more)
                if main or (one and product != FP32 and many and not ragged):
                    check_launch(*operands, product, False)
                if dtypes == module._DTYPES[0]:
                    check_launch(*operands, product, True, of_z=False)


def test_dot_modes():
    assert dot_mode(BF16, BF16, FP32) == (BF16, False)  # exact products
    assert dot_mode(BF16, FP32, FP32) == (BF16, True)
    assert dot_mode(FP32, BF16, FP32) == (FP32, False)
    assert dot_mode(FP16, FP32, FP32) == (FP32, False)
    assert dot_mode(BF16, FP16, FP32) == (FP32, False)
    assert dot_mode(FP32, FP32, FP32) == (FP32, False)
    assert dot_mode(FP32, FP32, BF16) == (BF16, False)
    assert dot_mode(BF16, FP32, FP16) == (FP16, False)


def test_totals_of_x_that_are_no_matrix_of_their_own():
    x, a = randn(131, 160, dtype=BF16), randn(5, 160, seed=1)
    groups, room, of_z = random_groups(x), zeros(200), zeros(5)
    shrink(x, a, FP32, groups, None, room[..., 20:180], of_z)
    assert_moments(room[..., 20:180], x, groups)
    assert not room[..., :20].any()
    assert not room[..., 180:].any()


def test_pad_rank():
    assert [pad_rank(r) for r in (1, 16, 17, 48, 64, 65, 256)] == [16, 16, 32, 64, 64, 128, 256]


def test_table_has_every_class_and_falls_back(monkeypatch, request):
    for rank, kind, rows in itertools.product(
        (16, 32, 64, 128, 256), ("16-bit", "three", "32-bit"), ("few", "many", "ragged")
    ):
        # A program of the moments takes whole blocks of rows.
        row = tuning.config("shrink", (rank, kind, rows))
        assert moments.PROGRAM_ROWS % row["BLOCK_M"] == 0
        assert moments.ROWS % row["num_warps"] == moments.RAGGED_ROWS % row["num_warps"] == 0
        if rows != "ragged":
            assert tuning.config("shrink_finish", (rank, rows))["ROWS"] <= 128
    key = (16, "16-bit", "many")
    default = tuning.config("shrink", key)
    other = {**default, "num_warps": 16}
    monkeypatch.setitem(tuning.TABLE["shrink"], ("h100", key), other)
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    tuning._gpu_at.cache_clear()
    request.addfinalizer(tuning._gpu_at.cache_clear)
    assert tuning.config("shrink", key, torch.device("cuda:0")) == other
    assert tuning.config("shrink", key, torch.device("cuda:1")) == default
    assert tuning.config("shrink", key, torch.device("cpu")) == default
    assert ("h100", key, other, (90,)) in tuning.rows("shrink")
    with pytest.raises(KeyError):
        tuning.config("shrink", (17, "16-bit", "many"))
    tuning.config("shrink", key)["num_warps"] = 1  # a copy, not the table's own row
    assert tuning.config("shrink", key) == default


@pytest.mark.parametrize("cases", [compile_cases, shrink_finish.compile_cases])
def test_cases_describe_the_kernels(cases):
    cases = cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert list(case.signature) == case.kernel.arg_names
        constants = {name for name, kind in case.signature.items() if kind == "constexpr"}
        assert constants == set(case.constants)
