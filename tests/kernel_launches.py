"""What Triton would compile for a launch, and what the ahead-of-time gate compiles.

Worked out from the arguments by Triton's own rules: pointers and integers that are multiples of 16,
integers that are 1, and what a kernel is told to leave alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int64: "i64",
}

#: Kernel, constants, types, what is known to be divisible by 16, launch options.
Specialisation = tuple[str, dict[str, Any], dict[str, str], set[str], tuple]


def left_alone(kernel) -> set[str]:
    """The arguments that Triton compiles for any value, from the interpreter or the compiler."""
    if hasattr(kernel, "params"):
        return {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    return set(kernel.kwargs["do_not_specialize"])


class Launches:
    """Stands in for some kernels and keeps what they are launched with.

    Args:
        kernels: by the names that specialisations give them.
    """

    def __init__(self, kernels: Mapping[str, Any]) -> None:
        self.kernels = dict(kernels)
        self.alone = {name: left_alone(kernel) for name, kernel in kernels.items()}
        self._kept: list[tuple[str, tuple, dict]] = []

    def of(self, name: str) -> _Recorder:
        """What is put in the kernel's place."""
        return _Recorder(name, self._kept)

    def taken(self) -> list[Specialisation]:
        """What Triton would have compiled since the last call."""
        found = [self._specialisation(*launch) for launch in self._kept]
        self._kept.clear()
        return found

    def compiled(self, cases: Iterable) -> list[Specialisation]:
        """What the cases of these kernels compile."""
        found = []
        for case in cases:
            for name, kernel in self.kernels.items():
                if case.kernel is kernel:
                    constants = {k: v for k, v in case.constants.items() if k != "CAST_DOT"}
                    types = {k: v for k, v in case.signature.items() if v != "constexpr"}
                    options = (case.num_warps, case.num_stages, case.options["enable_fp_fusion"])
                    found.append((name, constants, types, set(case.divisible), options))
        return found

    def _specialisation(self, name: str, args: tuple, kwargs: dict) -> Specialisation:
        given = dict(zip(self.kernels[name].arg_names, args, strict=False)) | kwargs
        defaults = {"num_warps": 4, "num_stages": 3}
        options = tuple(
            given.pop(key, defaults.get(key))
            for key in ("num_warps", "num_stages", "enable_fp_fusion")
        )
        given.pop("CAST_DOT", None)
        constants, types, divisible = {}, {}, set()
        for key, value in given.items():
            known = key not in self.alone[name]
            if key.isupper() or value is None:
                constants[key] = value
            elif isinstance(value, torch.Tensor):
                types[key] = f"*{_TYPES[value.dtype]}"
                if known and value.data_ptr() % 16 == 0:
                    divisible.add(key)
            elif isinstance(value, float):
                types[key] = "fp32"
            elif known and value == 1:
                constants[key] = 1
            else:
                types[key] = "i32"
                if known and value % 16 == 0:
                    divisible.add(key)
        return name, constants, types, divisible, options


class _Recorder:
    def __init__(self, name: str, kept: list[tuple[str, tuple, dict]]) -> None:
        self.name, self.kept = name, kept

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.kept.append((self.name, args, kwargs))
