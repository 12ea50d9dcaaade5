"""The native operator against its definition, its refusals, and what its libraries ask for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ucan_fast import native

FOLDER = Path(native.__file__).parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SKIPPED = native.status()["_C"]

needs_library = pytest.mark.skipif(SKIPPED != "available", reason=f"_C: {SKIPPED}")


def run(weights, factors, offsets, axes) -> None:
    torch.ops.ucan_fast._attenuate_native_(weights, factors, offsets, axes)


def expected(weight: torch.Tensor, factor: torch.Tensor, axis: int) -> torch.Tensor:
    """The exact product in fp64, rounded once: the product of an fp32 factor and any value of
    fp32 or less has at most 48 significant bits, so fp64 holds it exactly. (fp16 and bf16 go
    through fp32 by definition; that product is rounded to fp32 first.)"""
    wide = weight.double() * factor.double().unsqueeze(1 - axis)
    if weight.dtype in (torch.bfloat16, torch.float16):
        wide = wide.float()
    return torch.where(factor.unsqueeze(1 - axis) == 1, weight, wide.to(weight.dtype))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])


def some_factors(n: int) -> torch.Tensor:
    factors = torch.rand(n)
    factors[torch.rand(n) < 0.4] = 1.0
    factors[torch.rand(n) < 0.1] = 0.0
    return factors


@needs_library
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("layout", ["plain", "transposed", "every other", "column slice"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition_bit_for_bit(dtype, layout, axis):
    weights, kept, offsets, parts = [], [], [], [torch.full((3,), torch.nan)]
    shapes = [(0, 5), (5, 0), (1, 1), (7, 129), (129, 7), (1, 64), (64, 1), (16, 300)]
    shapes += [(300, 16), (40, 8)]  # of these lengths the loops are compiled for their own
    for rows, cols in shapes:
        if layout == "plain":
            weight = torch.randn(rows, cols).to(dtype)
        elif layout == "transposed":
            weight = torch.randn(cols, rows).to(dtype).t()
        elif layout == "every other":
            weight = torch.randn(2 * rows, 3 * cols).to(dtype)[::2, ::3]
        else:
            weight = torch.randn(rows, cols + 9).to(dtype)[:, 4 : 4 + cols]
        weights.append(weight)
        kept.append(weight.clone())
        offsets.append(sum(map(len, parts)))
        parts.append(some_factors(weight.shape[axis]))
    run(weights, torch.cat(parts), offsets, [axis] * len(weights))
    for weight, before, factor in zip(weights, kept, parts[1:], strict=True):
        torch.testing.assert_close(
            bits(weight), bits(expected(before, factor, axis)), rtol=0, atol=0
        )


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_between_the_elements_of_a_view_is_not_touched(dtype):
    base = torch.randn(14, 40).to(dtype)
    before = base.clone()
    inside = torch.zeros_like(base, dtype=torch.bool)
    inside[::2, 3:30:3] = True
    run([base[::2, 3:30:3]], torch.full((7,), 0.5), [0], [0])
    assert torch.equal(base[~inside], before[~inside])
    assert torch.equal(base[inside], before[inside] * 0.5)


@needs_library
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_factor_one_keeps_every_bit(dtype, axis):
    """Signalling NaNs, NaN payloads and -0.0: multiplying by 1 would change the first."""
    size = torch.empty(0, dtype=dtype).element_size()
    patterns = {
        2: [0x7C01, 0x7F81, 0xFE00, 0x8000, 0x0001],
        4: [0x7F800001, 0x7FC12345, 0xFF812345, 0x80000000, 0x00000001],
        8: [0x7FF0000000000001, 0x7FF8123456789ABC, 0xFFF0123456789ABC, 1 << 63, 1],
    }[size]
    signed = [p - (1 << (8 * size)) if p >> (8 * size - 1) else p for p in patterns]
    weight = torch.tensor([signed] * 5, dtype=bits(torch.empty(1, dtype=dtype)).dtype).view(dtype)
    before = bits(weight).clone()
    factors = torch.tensor([1.0, 0.5, 1.0, 1.0, 0.5])
    run([weight], factors, [0], [axis])
    untouched = factors == 1
    select = (lambda t: t[untouched]) if axis == 0 else (lambda t: t[:, untouched])
    assert torch.equal(select(bits(weight)), select(before))


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_nearest_even_over_all_16_bit_values(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    factors = torch.tensor([0.75, 0.1, 1e-3, 0.99999994, 3.0, 0.0])
    weight = every.repeat(len(factors), 1)
    run([weight], factors, [0], [0])
    wanted = expected(every.repeat(len(factors), 1), factors, 0)
    nan = wanted.isnan()
    assert torch.equal(nan, weight.isnan())
    assert torch.equal(bits(weight)[~nan], bits(wanted)[~nan])


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
def test_many_matrices_and_long_ones_over_several_threads(threads):
    """Enough elements for several tasks, whose borders fall inside lines and matrices."""
    shapes = [(16, 1000), (1000, 16), (3, 70001), (1, 1)] * 4 + [(8, 64)] * 50
    weights = [torch.randn(shape) for shape in shapes]
    axes = [i % 2 for i in range(len(weights))]
    parts = [some_factors(w.shape[a]) for w, a in zip(weights, axes, strict=True)]
    offsets = [sum(map(len, parts[:i])) for i in range(len(parts))]
    wanted = [expected(w, f, a) for w, f, a in zip(weights, parts, axes, strict=True)]
    was = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run(weights, torch.cat(parts), offsets, axes)
    finally:
        torch.set_num_threads(was)
    for weight, right in zip(weights, wanted, strict=True):
        assert torch.equal(weight, right)


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [torch.ones(4)]}, "weight 0 must be 2-D, not 1-D"),
        ({"weights": [torch.ones(2, 2, dtype=torch.int64)]}, "weight 0 must be float32, float64"),
        ({"weights": [torch.ones(1, 3).expand(2, 3)]}, "weight 0 overlaps itself"),
        ({"weights": [torch.ones(9).as_strided((3, 3), (1, 2))]}, "weight 0 overlaps itself"),
        ({"factors": torch.ones(4, dtype=torch.float64)}, "contiguous 1-D float32"),
        ({"factors": torch.ones(2, 2)}, "contiguous 1-D float32"),
        ({"factors": torch.ones(8)[::2]}, "contiguous 1-D float32"),
        ({"offsets": [3]}, "weight 0 needs 2 factors from 3 on, but there are 4"),
        ({"offsets": [-1]}, "weight 0 needs 2 factors from -1 on"),
        ({"offsets": [2**63 - 1]}, "weight 0 needs 2 factors from"),
        ({"axes": [2]}, r"axis of weight 0 must be 0 \(rows\) or 1 \(columns\), not 2"),
        ({"axes": [-1]}, "axis of weight 0 must be"),
        ({"axes": [0, 0]}, "1 weights, 1 offsets and 2 axes"),
    ],
)
def test_refuses_and_changes_nothing(change, message):
    weight = torch.ones(2, 2)
    arguments = {"weights": [weight], "factors": torch.zeros(4), "offsets": [0], "axes": [0]}
    if "weights" in change:  # a good one ahead of the bad one must stay as it was, too
        change = {"weights": [*change["weights"], weight], "offsets": [0, 0], "axes": [0, 0]}
    with pytest.raises(RuntimeError, match=message):
        run(**(arguments | change))
    assert torch.equal(weight, torch.ones(2, 2))


@needs_library
def test_refuses_factors_in_a_weights_memory():
    buffer = torch.full((6,), 0.5)
    for factors in (buffer[:4], buffer[:3], buffer[3:]):
        with pytest.raises(RuntimeError, match="weight 0 and the factors overlap in memory"):
            run([buffer[:4].view(2, 2)], factors, [0], [0])
    assert torch.equal(buffer, torch.full((6,), 0.5))
    run([buffer[:4].view(2, 2)], buffer[4:], [0], [0])
    assert buffer.tolist() == [0.25] * 4 + [0.5] * 2


@needs_library
def test_interleaved_columns_without_overlap_are_accepted():
    base = torch.randn(12)
    view = base.as_strided((2, 3), (3, 2))  # 0 2 4 / 3 5 7: no element twice
    before = view.clone()
    run([view], torch.tensor([0.5, 0.25]), [0], [0])
    assert torch.equal(view, before * torch.tensor([[0.5], [0.25]]))


@needs_library
def test_opcheck_and_compile():
    weights = [torch.randn(3, 5), torch.randn(5, 3).t()]
    factors = torch.rand(8)
    torch.library.opcheck(
        torch.ops.ucan_fast._attenuate_native_.default, (weights, factors, [0, 3], [0, 1])
    )
    with torch.device("meta"):
        run([torch.empty(3, 5)], torch.empty(3), [0], [0])


def test_loading_is_idempotent_and_reports_both_libraries():
    first = native.status()
    assert set(first) == {"_C", "_C_cuda"}
    assert native.load() == (first["_C"] == "available")
    assert native.status() == first
    assert native.status() is not first
    for reason in first.values():
        assert "\n" not in reason
        assert reason


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("/x/_C.so: undefined symbol: torch_library_impl", "it wants torch 2.10 or later"),
        ("/x/_C.so: undefined symbol: _ZN3c105ErrorC2E", "was built with another compiler"),
        (
            "/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by /x/_C.so)",
            "newer system (GLIBCXX_3.4.32 is missing here)",
        ),
        ("libtorch_cuda.so: cannot open shared object file: No such", "needs libtorch_cuda.so"),
        ("/x/_C.so: invalid ELF header", "damaged or made for another kind of processor"),
        ("something\nelse", "could not be loaded: something else"),
    ],
)
def test_linker_messages_become_one_readable_reason(said, reason):
    text = native.diagnose(said, "_C.abi3.so")
    assert reason in text
    assert text.startswith("_C.abi3.so")
    assert "\n" not in text


def loader_beside(folder: Path, library: bytes | None, **environment: str) -> str:
    """Status of _C as a fresh process sees it, from a copy of the loader beside that library."""
    shutil.copy(native.__file__, folder / "native.py")
    if library is not None:
        (folder / "_C.abi3.so").write_bytes(library)
    script = "import native; native.load(); print(native.load(), native.status()['_C'])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_damaged_library_is_a_reason_not_a_crash(tmp_path):
    said = loader_beside(tmp_path, b"not a library at all" * 50)
    assert said.startswith("False _C.abi3.so is damaged or made for another kind of processor")


def test_the_switch_leaves_it_out(tmp_path):
    said = loader_beside(tmp_path, b"never looked at", UCAN_FAST_SKIP_EXTENSION="1")
    assert said == "False UCAN_FAST_SKIP_EXTENSION is set\n"


def test_without_a_library_the_build_note_is_quoted(tmp_path):
    assert "not built: this copy of ucan_fast was not installed" in loader_beside(tmp_path, None)
    (tmp_path / "_native_build.txt").write_text("_C: not built: the cat sat on it\n")
    assert loader_beside(tmp_path, None) == "False not built: the cat sat on it\n"


def undefined_symbols(library: Path) -> list[str]:
    """Demangled, without argument lists and version suffixes."""
    listed = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    return [line.split(None, 1)[1].split("@")[0] for line in listed.splitlines()]


def library_or_skip(name: str) -> Path:
    found = sorted(FOLDER.glob(f"{name}.*so"))
    if found:
        return found[0]
    note = FOLDER / "_native_build.txt"
    said = note.read_text() if note.exists() else "never built here"
    if name == "_C_cuda" and shutil.which("nvcc") and "compiling failed" in said:
        pytest.fail(f"nvcc is here, yet {said}")
    pytest.skip(f"{name} is not built: {said.strip()}")


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_only_the_stable_interface_of_torch_is_used(name):
    symbols = undefined_symbols(library_or_skip(name))
    torch_symbols = [s for s in symbols if s.startswith(("aoti_torch_", "torch_"))]
    assert "torch_library_impl" in torch_symbols
    cpp = [s for s in symbols if "::" in s]
    assert any("std::" in s for s in cpp)
    assert not [s for s in cpp if re.search(r"\b(torch|c10|at|caffe2|pybind11)::", s)]
    assert not [s for s in symbols if s.startswith(("Py", "_Py"))]
    if name == "_C_cuda":
        assert "aoti_torch_get_current_cuda_stream" in symbols


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
def test_the_cuda_library_asks_for_torchs_cuda_library_and_no_cuda_runtime():
    library = library_or_skip("_C_cuda")
    listed = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed)
    assert "libtorch_cuda.so" in needed
    assert not [name for name in needed if name.startswith("libcudart")]


def cuobjdump(*arguments: str | Path) -> str:
    """From the CUDA toolkit, else from Triton's wheel."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="no cuobjdump: no CUDA toolkit, no Triton")
        tool = triton.knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_cuda_library_serves_every_architecture():
    """sm_80, sm_90, sm_100 and PTX for what comes later, or what this nvcc knows of them."""
    library = library_or_skip("_C_cuda")
    known = None
    if nvcc := shutil.which("nvcc"):
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    wanted = [a for a in ("80", "90", "100") if known is None or f"compute_{a}" in known.split()]
    if chosen := os.environ.get("UCAN_FAST_CUDA_ARCHS"):
        wanted = chosen.replace(",", ";").split(";")
    elves, ptx = cuobjdump("--list-elf", library), cuobjdump("--list-ptx", library)
    assert set(wanted) <= set(re.findall(r"\.sm_(\d+)\.cubin", elves))
    assert wanted[-1] in re.findall(r"\.sm_(\d+)\.ptx", ptx)


def test_the_cuda_kernels_spill_nothing_and_move_16_bytes_at_a_time():
    library = library_or_skip("_C_cuda")
    usage = cuobjdump("--dump-resource-usage", library)
    kernels = re.findall(r"Function (\S*attenuate_kernel\S*):\s+REG:(\d+) STACK:(\d+)", usage)
    assert len(kernels) >= 4 * 2  # fp32, fp64, fp16, bf16; few matrices and many
    for name, registers, stack in kernels:
        assert stack == "0", name
        assert int(registers) <= 64, name
    for part in cuobjdump("--dump-sass", library).split("Function : ")[1:]:
        name = part.split(None, 1)[0]
        if "attenuate_kernel" not in name:
            continue
        assert re.search(r"\bLDG\.E\.128\b(?!\.CONSTANT)", part), name  # a unit of a weight
        assert re.search(r"\bLDG\.E\.128\.CONSTANT\b", part) or "kernelId" in name  # factors
        assert re.search(r"\bSTG\.E\.128\b", part), name
        assert not re.search(r"\b(?:LDL|STL)\b", part), name


@needs_library
@pytest.mark.gpu
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu_bit_for_bit(dtype, axis):
    if native.status()["_C_cuda"] != "available":
        pytest.skip(native.status()["_C_cuda"])
    shapes = [(16, 4096), (4096, 16), (7, 129), (0, 8), (1, 1), (33, 64)] * 20
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    parts = [some_factors(w.shape[axis]) for w in weights]
    offsets = [sum(map(len, parts[:i])) for i in range(len(parts))]
    axes = [axis] * len(weights)
    on_gpu = [w.cuda() for w in weights]
    on_gpu += [w.cuda().t() for w in weights]
    run(on_gpu, torch.cat(parts).cuda(), offsets * 2, axes + [1 - axis] * len(axes))
    run(weights, torch.cat(parts), offsets, axes)
    for i, weight in enumerate(weights):
        assert torch.equal(bits(on_gpu[i].cpu()), bits(weight))
        assert torch.equal(bits(on_gpu[len(weights) + i].t().cpu()), bits(weight))
