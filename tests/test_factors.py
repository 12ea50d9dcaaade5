"""InfluenceFactors: sums that add and subtract, files that are checked, and the damped solve."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from influence_oracle import damped
from trained_model import forget_batches, retain_batches, trained

import ucan_fast as uf
from ucan_fast.factors import FACTORS, FORMAT, FORMAT_VERSION, Eigen, InfluenceFactors, solver
from ucan_fast.files import read_safetensors, write_safetensors

VARIANTS = ("all", "b-only", "last-blocks", "eigenbasis", "diagonal")


def collected(batches=None, **options) -> InfluenceFactors:
    return uf.collect_factors(trained(), batches or retain_batches(count=8), **options)


@pytest.fixture(scope="module")
def bank() -> InfluenceFactors:
    return collected([*retain_batches(count=8), *forget_batches(count=8)])


@pytest.fixture(scope="module")
def request_() -> InfluenceFactors:
    return collected(forget_batches(count=8), group="forget")


def assert_same(one: InfluenceFactors, other: InfluenceFactors) -> None:
    for field in ("positions", "tokens", "variant", "blocks", "seed", "fingerprint", "context"):
        assert getattr(one, field) == getattr(other, field), field
    assert list(one.gradients) == list(other.gradients)
    assert all(torch.equal(g, other.gradients[key]) for key, g in one.gradients.items())
    assert list(one.layers) == list(other.layers)
    mine, theirs = dict(one._tensors()), dict(other._tensors())
    assert list(mine) == list(theirs)
    assert all(torch.equal(t, theirs[key]) for key, t in mine.items())
    for name, layer in one.layers.items():
        assert (layer.owner, layer.tokens) == (other.layers[name].owner, other.layers[name].tokens)


# Sums.


def test_the_sum_of_two_that_share_other_inputs_shares_what_both_do():
    one, other = collected(), collected()
    names = list(one.layers)
    q, k, v = names[:3]
    assert (one.layers[k].owner, one.layers[v].owner) == (q, q)
    # As if k had read another tensor there, and v the same as k.
    other.layers[k].c_x = 2 * other.layers[q].c_x
    other.layers[k].owner = other.layers[v].owner = k
    for total in (one + other, other + one):
        assert [total.layers[n].owner for n in (q, k, v)] == [q, k, k]
        assert torch.equal(total.factor(q, "c_x"), 2 * one.factor(q, "c_x"))
        assert torch.equal(total.factor(v, "c_x"), 3 * one.factor(q, "c_x"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_subtracting_is_undone_by_adding(variant, request_):
    options = {"variant": variant, "rank": 4, "blocks": 1}
    both = collected([*retain_batches(count=8), *forget_batches(count=8)], **options)
    part = collected(forget_batches(count=8), group="forget", **options)
    rest = both - part
    assert rest.tokens == both.tokens - part.tokens > 0
    if variant == "eigenbasis":
        # The summary of the bank stays.
        assert all(rest.layers[n] is layer for n, layer in both.layers.items())
        with pytest.raises(uf.UcanError, match="eigenbases do not add"):
            rest + part
        return
    again = rest + part
    for (key, t), (_, wanted) in zip(again._tensors(), both._tensors(), strict=True):
        assert torch.allclose(t, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max())), key


def test_what_is_not_contained_is_refused(bank, request_):
    with pytest.raises(uf.UcanError, match=r"not contained in the bank \(its tokens exceed"):
        request_ - bank
    loud = dataclasses.replace(
        request_,
        layers={n: dataclasses.replace(f, s_z=1e3 * f.s_z) for n, f in request_.layers.items()},
    )
    with pytest.raises(uf.UcanError, match=r"q_proj: the forget set .*sums of squares exceed"):
        bank - loud


def altered(factors: InfluenceFactors, what: str) -> InfluenceFactors:
    if what == "layers":
        gradients = dict(list(factors.gradients.items())[1:])
        return dataclasses.replace(factors, gradients=gradients)
    values = {"fingerprint": "other", "context": "other", "seed": 1, "variant": "diagonal"}
    return dataclasses.replace(factors, **{what: values[what]})


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("fingerprint", "different adapters.*before any unlearning"),
        ("context", "different other adapters active"),
        ("layers", "different layers or ranks"),
        ("variant", "different variants"),
        ("seed", "different seeds"),
    ],
)
def test_sums_of_different_things_are_refused(what, match, bank, request_):
    for combine in (lambda a, b: a + b, lambda a, b: a - b):
        with pytest.raises(uf.UcanError, match=match):
            combine(bank, altered(request_, what))


def test_gradients_alone_do_not_subtract_from_factors(bank):
    plain = collected(forget_batches(count=8), group="forget", curvature=False)
    with pytest.raises(uf.UcanError, match="collected without factors"):
        bank - plain
    total = plain + collected(forget_batches(count=8), group="forget")
    assert total.layers == {}
    assert total.positions == 2 * plain.positions


# Files.


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_are_read_as_they_were_written(variant, tmp_path):
    factors = collected(variant=variant, rank=4, blocks=1, seed=5)
    factors.save(tmp_path / "factors.safetensors")
    loaded = InfluenceFactors.load(tmp_path / "factors.safetensors")
    assert_same(loaded, factors)
    assert repr(loaded) == repr(factors)


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "factors.safetensors"
    collected(variant="diagonal").save(path)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(0, len(content), (40,), generator=generator).tolist():
        broken = bytearray(content)
        broken[position] ^= 4
        path.write_bytes(bytes(broken))
        with pytest.raises(uf.UcanError):
            InfluenceFactors.load(path)
    for length in (0, 7, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(uf.UcanError, match="truncated or corrupt"):
            InfluenceFactors.load(path)
    path.write_bytes(content)
    assert InfluenceFactors.load(path).positions > 0


@pytest.mark.parametrize("what", ["owner", "variant", "missing", "shape", "nan", "field"])
def test_files_with_a_right_checksum_and_wrong_content_are_refused(what, tmp_path):
    path = tmp_path / "factors.safetensors"
    collected(variant="diagonal").save(path)
    metadata, tensors = read_safetensors(path, FORMAT, FORMAT_VERSION)
    values = json.loads(metadata["factors"])
    if what == "owner":
        values["layers"][0][2] = "nobody"
    elif what == "variant":
        values["variant"] = "half"
    elif what == "field":
        del values["positions"]
    elif what == "missing":
        del tensors["gradient.0"]
    elif what == "shape":
        tensors["0.s_z"] = torch.zeros(2, 3)
    else:
        tensors["0.s_z"][0, 0] = float("nan")
    write_safetensors(path, FORMAT, FORMAT_VERSION, {"factors": json.dumps(values)}, tensors)
    with pytest.raises(uf.UcanError, match=r"damaged|NaN or Inf"):
        InfluenceFactors.load(path)


def test_other_files_are_refused_by_kind(tmp_path):
    uf.collect(trained(), retain_batches(count=8)).save(tmp_path / "stats.safetensors")
    with pytest.raises(uf.UcanError, match=r"is no ucan_fast\.influence_factors file"):
        InfluenceFactors.load(tmp_path / "stats.safetensors")
    with pytest.raises(uf.UcanError, match="does not exist"):
        InfluenceFactors.load(tmp_path / "nothing")


# The solve.


def spd(n: int, count: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(count, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.T @ rows


@pytest.mark.parametrize("count", [50, 3])  # of full rank or not
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_the_solve_is_that_of_the_damped_mean(count, damping):
    total, m = spd(7, count), torch.randn(7, 4, dtype=torch.float64)
    expected = torch.linalg.solve(damped(total, count, damping), m)
    assert torch.allclose(solver(total, count, damping)(m), expected, rtol=1e-9)
    whole = Eigen.of(total, 7)
    assert torch.allclose(solver(whole, count, damping)(m), expected, rtol=1e-8)
    diagonal = damped(total.diagonal().diag(), count, damping)
    assert torch.allclose(
        solver(total.diagonal(), count, damping)(m), torch.linalg.solve(diagonal, m), rtol=1e-9
    )


def test_an_eigenbasis_solves_with_its_flat_rest():
    total, m = spd(7, 50), torch.randn(7, 4, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(total)
    values[:4] = values[:4].mean()
    flat = vectors @ values.diag() @ vectors.T
    expected = torch.linalg.solve(damped(flat, 50, 0.1), m)
    assert torch.allclose(solver(Eigen.of(total, 3), 50, 0.1)(m), expected, rtol=1e-8)


def test_a_factor_of_zeros_has_no_solve():
    for zero in (torch.zeros(3, 3), torch.zeros(3), Eigen.of(torch.zeros(3, 3), 2)):
        assert solver(zero, 5, 0.01) is None


def test_a_factor_that_is_not_positive_definite_is_named():
    with pytest.raises(uf.UcanError, match="damping=0 is not positive definite"):
        solver(spd(7, 3) - 1e-3 * torch.eye(7).double(), 3, 0.0)


def test_factors_have_the_names_of_the_fields(bank):
    assert {f.name for f in dataclasses.fields(next(iter(bank.layers.values())))} == {
        "tokens",
        "owner",
        *FACTORS,
    }
