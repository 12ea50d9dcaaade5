"""Peak memory and energy of a pass, or the reason why they are unknown."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_RAPL = Path("/sys/class/powercap")
#: A pass shorter than a few periods of the counter cannot be told from its neighbours.
_PERIOD = {"RAPL": 0.001, "NVML": 0.1}


def peak_memory(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """``peak_memory_bytes`` of one pass beyond what was held before it, and how it was measured.

    CUDA: the allocator's ``max_memory_allocated``. Linux without CUDA: the kernel's high-water
    mark of resident memory (VmHWM), reset just before, minus resident memory at that moment; free
    memory is given back to the system first, for what is reused would not be seen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return {
            "peak_memory_bytes": peak,
            "peak_memory_growth_bytes": peak - before,
            "peak_memory_by": "torch.cuda.max_memory_allocated",
        }
    reason = _reset_high_water()
    before = _status("VmRSS")
    run()
    if reason is None and before is None:
        reason = "/proc/self/status names no VmRSS"
    if reason is not None:
        return {"peak_memory_bytes": None, "peak_memory_reason": reason}
    return {
        "peak_memory_bytes": max(0, (_status("VmHWM") or before) - before),
        "peak_memory_by": "VmHWM during the pass minus VmRSS before it",
    }


def _reset_high_water() -> str | None:
    try:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        # proc(5): 5 resets the peak resident set size to the current one.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        return f"the peak of resident memory cannot be reset ({error.strerror})"
    return None


def _status(key: str) -> int | None:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        if found:
            return int(found[1]) * 1024
    return None


class EnergyMeter:
    """Joules of the metered passes: NVML's counter on CUDA, else RAPL's package domains."""

    def __init__(self, device: torch.device) -> None:
        self.source = "NVML" if device.type == "cuda" else "RAPL"
        read = _nvml(device) if device.type == "cuda" else _rapl()
        self.read, self.reason = (None, read) if isinstance(read, str) else (read, None)
        self.joules, self.passes, self.seconds = 0.0, 0, 0.0

    @contextlib.contextmanager
    def metered(self) -> Iterator[None]:
        """Around one pass."""
        if self.read is None:
            yield
            return
        before, start = self.read(), time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        after = self.read()
        for domain, (value, wraps_at) in after.items():
            used = value - before[domain][0]
            self.joules += used + wraps_at if used < 0 else used
        self.passes += 1

    def per_pass(self, scale: float = 1.0) -> dict[str, Any]:
        """``energy_joules`` of a pass (the mean), else null and the reason."""
        reason = self.reason
        if reason is None and not self.passes:
            reason = "nothing was metered"
        if reason is None and self.seconds / self.passes < 5 * _PERIOD[self.source]:
            reason = f"a pass is shorter than five periods of the {self.source} counter"
        if reason is not None:
            return {"energy_joules": None, "energy_reason": reason}
        return {
            "energy_joules": self.joules / self.passes * scale,
            "energy_by": f"{self.source}, the whole "
            + ("GPU" if self.source == "NVML" else "processor package"),
        }


Counter = Callable[[], dict[str, tuple[float, float]]]


def _rapl(root: Path = _RAPL) -> Counter | str:
    # Domain -> (joules, where the counter wraps); packages only, their parts are inside them.
    domains = sorted(root.glob("intel-rapl:[0-9]*")) if root.is_dir() else []
    domains = [d for d in domains if d.name.count(":") == 1]
    if not domains:
        return "no RAPL counter (/sys/class/powercap/intel-rapl:*)"

    def read() -> dict[str, tuple[float, float]]:
        return {
            domain.name: (
                int((domain / "energy_uj").read_text()) * 1e-6,
                int((domain / "max_energy_range_uj").read_text()) * 1e-6,
            )
            for domain in domains
        }

    try:
        read()
    except OSError as error:
        return f"the RAPL counter cannot be read ({error.strerror})"
    return read


def _nvml(device: torch.device) -> Counter | str:
    try:
        import pynvml
    except ImportError:
        return "pynvml is not installed (pip install nvidia-ml-py)"
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

        def read() -> dict[str, tuple[float, float]]:
            return {uuid: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1e-3, 0.0)}

        read()
    except pynvml.NVMLError as error:
        return f"NVML has no energy counter here ({error})"
    return read
