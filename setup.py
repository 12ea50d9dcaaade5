"""Packages and the optional native extension; everything else stands in pyproject.toml.

The extension is two libraries without a Python interface, loaded by ``ucan_fast.native``:

- ``ucan_fast/_C.abi3.so``: operator schemas and CPU code (any C++20 compiler);
- ``ucan_fast/_C_cuda.abi3.so``: the CUDA kernel (nvcc; needs neither a GPU nor a CUDA torch here).

Both use PyTorch's stable ABI, so one build serves every torch from 2.10 on and every Python from
3.10 on. They are optional: what cannot be built is left out, one printed line says why, and the
reason is kept in ``ucan_fast/_native_build.txt`` for ``ucan-fast doctor``.

Environment: ``UCAN_FAST_SKIP_EXTENSION=1`` builds neither, ``UCAN_FAST_SKIP_CUDA=1`` not the CUDA
one, ``UCAN_FAST_REQUIRE_EXTENSION=1`` turns a left-out library into a failed build,
``UCAN_FAST_CUDA_ARCHS="80;90"`` names the architectures, ``MAX_JOBS`` limits parallel compilers,
``CXX`` and ``CUDA_HOME`` choose the tools.

torch is imported only while the extension compiles, never for metadata.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

# The stable ABI of torch 2.10: the oldest torch whose C interface has everything we call.
TORCH_TARGET = "0x020a000000000000"
CPU, CUDA = "ucan_fast._C", "ucan_fast._C_cuda"
CUDA_ARCHS = ("80", "90", "100")
CUDA_STUB = "csrc/torch_cuda_stub.cpp"
MACOS = sys.platform == "darwin"

#: library -> one line on what became of it; written into the package by BuildNote.
NOTES: dict[str, str] = {}


def switch(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def skip(library: str, reason: str) -> None:
    NOTES[library] = f"not built: {reason}"


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:  # an explicit choice is not overruled by whatever is on PATH
            return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc")


def find_cxx() -> str | None:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        found = shutil.which(shlex.split(name)[0])
        if found:
            return name
    return None


def extensions() -> list[Extension]:
    """The libraries to try; the others are noted as left out. Must not import torch."""
    if switch("UCAN_FAST_SKIP_EXTENSION"):
        reason = "UCAN_FAST_SKIP_EXTENSION is set"
    elif sys.platform == "win32":
        reason = "Windows is not supported by the native extension"
    elif importlib.util.find_spec("torch") is None:
        reason = (
            "torch cannot be imported while building (pip isolates builds); "
            "with torch installed, use: pip install --no-build-isolation ."
        )
    elif find_cxx() is None:
        reason = "no C++ compiler was found (looked for $CXX, c++, g++, clang++)"
    else:
        reason = None
    if reason:
        skip(CPU, reason)
        NOTES[CUDA] = NOTES[CPU]
        return []

    common = ["csrc/checks.h", "csrc/cpu.h", "csrc/matrix.h", "csrc/rows.h"]
    names = ("attenuate", "expand", "moments", "shrink")
    sources = [f"csrc/{name}_cpu.cpp" for name in names]
    libraries = [Extension(CPU, sources, depends=common, py_limited_api=True)]
    if switch("UCAN_FAST_SKIP_CUDA"):
        skip(CUDA, "UCAN_FAST_SKIP_CUDA is set")
    elif find_nvcc() is None:
        skip(CUDA, "nvcc was not found (put it on PATH or set CUDA_HOME)")
    else:
        sources = ["csrc/attenuate_cuda.cpp", "csrc/attenuate.cu"]
        depends = [*common, "csrc/attenuate_cuda.h", CUDA_STUB]
        libraries.append(Extension(CUDA, sources, depends=depends, py_limited_api=True))
    return libraries


class BuildNative(build_ext):
    """Compiles with our own commands.

    torch's CUDAExtension refuses to build with a CPU torch even where nvcc is there, and nothing
    here needs Python's or CUDA-enabled torch's headers.
    """

    def build_extensions(self) -> None:
        try:
            import torch  # only now: metadata and pure builds never get here

            if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
                raise OSError(
                    f"torch {torch.__version__} is too old; its stable ABI begins at 2.10"
                )
        except Exception as error:  # a broken torch must not break this install
            for extension in self.extensions:
                skip(extension.name, f"torch cannot be used: {' '.join(str(error).split())[:300]}")
            self.extensions = []
            return
        self.torch = Path(torch.__file__).parent
        built = []
        for extension in self.extensions:
            try:
                self.build_extension(extension)
            except subprocess.CalledProcessError as error:
                print(error.stdout, file=sys.stderr, flush=True)
                lines = [line for line in error.stdout.splitlines() if "error" in line.lower()]
                skip(
                    extension.name, f"compiling failed: {(lines or [str(error)])[0].strip()[:300]}"
                )
            except OSError as error:
                skip(extension.name, str(error))
            else:
                built.append(extension)
                NOTES[extension.name] = f"built with torch {torch.__version__}"
        self.extensions = built  # nothing looks for the files of the others

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        objects = Path(self.build_temp).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        depends = [str(Path(path).resolve()) for path in extension.depends]
        steps = []  # (output, inputs, command)
        for source in extension.sources:
            output = str(objects / (Path(source).name + ".o"))
            source = str(Path(source).resolve())
            command = self.nvcc() if source.endswith(".cu") else self.cxx()
            steps.append((output, [source, *depends], [*command, "-c", source, "-o", output]))
        inputs = [step[0] for step in steps]
        if extension.name == CUDA:
            # torch's CUDA library as the linker sees it: the same for every torch, also a CPU one.
            stub = str(objects / "libtorch_cuda.so")
            shared = ["-shared", "-Wl,-soname,libtorch_cuda.so", str(Path(CUDA_STUB).resolve())]
            steps.append((stub, depends, [*self.cxx(), *shared, "-o", stub]))
            # The static runtime, so that the library does not ask for one CUDA version's libcudart.
            link = [find_nvcc() or "nvcc", "-shared", "-cudart", "static", *inputs, stub]
            inputs.append(stub)
        else:
            shared = ["-bundle", "-undefined", "dynamic_lookup"] if MACOS else ["-shared"]
            link = [*shlex.split(find_cxx() or "c++"), *shared, *inputs]
            link += shlex.split(os.environ.get("LDFLAGS", ""))
        link += [f"-L{self.torch / 'lib'}", "-ltorch_cpu", "-o", str(target)]
        steps.append((str(target), inputs, link))
        run(steps, objects / f"{extension.name}.ninja")

    def cxx(self) -> list[str]:
        include = [self.torch / "include", self.torch / "include/torch/csrc/api/include"]
        return [
            *shlex.split(find_cxx() or "c++"),
            *shlex.split(os.environ.get("CPPFLAGS", "") + " " + os.environ.get("CXXFLAGS", "")),
            *(
                "-std=c++20",
                "-O3",
                "-fno-trapping-math",
                "-fPIC",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
            ),
            f"-ffile-prefix-map={Path().resolve()}/=",  # no path of this machine in the result
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            *(part for path in include for part in ("-isystem", str(path))),
        ]

    def nvcc(self) -> list[str]:
        nvcc = find_nvcc() or "nvcc"
        listed = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
        ).stdout
        chosen = os.environ.get("UCAN_FAST_CUDA_ARCHS")
        wanted = chosen.replace(",", ";").split(";") if chosen else CUDA_ARCHS
        # An older nvcc builds what it knows; its newest PTX serves the later chips.
        known = [arch for arch in wanted if f"compute_{arch}" in listed.split()]
        if not known:
            raise OSError(f"{nvcc} knows none of the architectures {', '.join(wanted)}")
        codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in known]
        codes.append(f"arch=compute_{known[-1]},code=compute_{known[-1]}")
        return [
            *(nvcc, "-std=c++17", "-O3", "--threads", "0" if jobs() is None else str(jobs())),
            *(part for code in codes for part in ("-gencode", code)),
            *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
        ]


def jobs() -> int | None:
    text = os.environ.get("MAX_JOBS", "")
    return int(text) if text.isdigit() and int(text) > 0 else None


def run(steps: list[tuple[str, list[str], list[str]]], script: Path) -> None:
    """Runs the commands: through ninja (parallel, only what changed) or one after the other."""
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if ninja is None:
        for _, _, command in steps:
            execute(command)
        return

    def escape(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule run", "  command = $line"]
    for output, inputs, command in steps:
        lines.append(f"build {escape(output)}: run {' '.join(map(escape, inputs))}")
        lines.append("  line = " + shlex.join(command).replace("$", "$$"))
    script.write_text("\n".join(lines) + "\n")
    # ninja's own files (the log of commands) belong beside the objects, not into the checkout.
    command = [ninja, "-C", str(script.parent), "-f", str(script)]
    execute(command if jobs() is None else [*command, "-j", str(jobs())])


def execute(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, output=done.stdout)
    print(done.stdout, end="", flush=True)


class BuildNote(Command):
    """Last step of a build: says what became of each library, here and beside the package."""

    description = "write ucan_fast/_native_build.txt"
    user_options: ClassVar[list[tuple[str, str, str]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        folder = Path() if self.editable_mode else Path(self.build_lib)
        folder /= "ucan_fast"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in NOTES.items():
            print(f"ucan_fast: {name} {text}", flush=True)
            if text.startswith("not built"):
                # A library of an earlier build must not stand in for the one left out.
                for stale in folder.glob(f"{name.split('.')[-1]}.*so"):
                    stale.unlink()
        lines = [f"{name.split('.')[-1]}: {text}\n" for name, text in NOTES.items()]
        (folder / "_native_build.txt").write_text("".join(lines))
        if switch("UCAN_FAST_REQUIRE_EXTENSION"):
            left_out = [
                f"{name} {text}"
                for name, text in NOTES.items()
                if text.startswith("not built") and not text.endswith("SKIP_CUDA is set")
            ]
            if left_out:
                raise SystemExit("UCAN_FAST_REQUIRE_EXTENSION is set, but " + "; ".join(left_out))

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, "ucan_fast", "_native_build.txt"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_note", None)]


def packages() -> list[str]:
    # kernels/ is installed as ucan_fast.kernels only; a checkout reaches it through the link
    # ucan_fast/kernels, which must not make it a second copy (and is no folder on Windows).
    own = find_packages(include=["ucan_fast", "ucan_fast.*"], exclude=["ucan_fast.kernels*"])
    inner = [f"ucan_fast.kernels.{name}" for name in find_packages("kernels")]
    return [*own, "ucan_fast.kernels", *inner]


modules = extensions()
# abi3 wheels are not for free-threaded Pythons, whose wheels get their own tag.
limited = bool(modules) and not sysconfig.get_config_var("Py_GIL_DISABLED")
setup(
    packages=packages(),
    package_dir={"ucan_fast.kernels": "kernels"},
    ext_modules=modules,
    cmdclass={"build": Build, "build_ext": BuildNative, "build_note": BuildNote},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if limited else {},
)
