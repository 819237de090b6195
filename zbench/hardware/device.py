"""One facade over CPU, CUDA and ROCm: timing marks, memory and names, so that no other module asks which one it is."""

from __future__ import annotations

import contextlib
import functools
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from zbench.errors import UserError

if TYPE_CHECKING:
    import torch

# `perf_counter_ns` on a CPU, a recorded `torch.cuda.Event` on a GPU.
Mark: TypeAlias = Any

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Device:
    """A device that is there. ROCm presents itself as `torch.cuda`, so `type` is "cuda" for both GPU backends."""

    type: Literal["cpu", "cuda"]
    backend: Literal["cpu", "cuda", "rocm"]
    index: int | None
    name: str  # as the driver (GPU) or the kernel (CPU) reports it

    def __str__(self) -> str:
        """The form that `resolve` accepts: "cpu", "cuda:0", "rocm:1"."""
        return self.backend if self.index is None else f"{self.backend}:{self.index}"

    @property
    def torch(self) -> torch.device:
        import torch

        return torch.device(self.type) if self.index is None else torch.device(self.type, self.index)

    def synchronize(self) -> None:
        """Wait until all work that was submitted has finished. A CPU has none in flight."""
        if self.type == "cuda":
            import torch

            torch.cuda.synchronize(self.index)

    def mark(self) -> Mark:
        """A point in time, taken without waiting for the device."""
        if self.type == "cpu":
            return time.perf_counter_ns()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.index))
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Time between two marks, s. On a GPU, synchronise after `end` first: torch raises RuntimeError otherwise."""
        if self.type == "cpu":
            return (end - start) * 1e-9
        return start.elapsed_time(end) * 1e-3

    def reset_peak(self) -> None:
        """Start a new high-water mark for `peak_bytes`; nothing happens where that cannot be done."""
        if self.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.index)
        elif _peak_can_be_reset():
            _CLEAR_REFS.write_text("5")  # 5: reset VmHWM to the current resident set, see proc(5)

    def peak_bytes(self) -> int | None:
        """High-water mark since `reset_peak`, bytes.

        GPU: memory held by torch tensors. CPU: resident set of the whole process, interpreter and libraries
        included; None where the kernel cannot reset it, since it would then be some earlier moment's.
        """
        if self.type == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated(self.index))
        return _peak_resident_bytes() if _peak_can_be_reset() else None

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What is allocated within, and freed again within, goes back to the system: memory that torch keeps for the
        work around it is neither taken nor let go. On a CPU large buffers always do."""
        if self.type == "cpu":
            yield
            return
        import torch

        with torch.cuda.device(self.torch):
            pool = torch.cuda.MemPool()
            with torch.cuda.use_mem_pool(pool):
                yield

    def memory_bytes(self) -> int:
        """Memory that could be allocated now, bytes: within the container's limit (cgroup v2) where there is one."""
        if self.type == "cuda":
            import torch

            free, _ = torch.cuda.mem_get_info(self.index)
            # What torch's allocator holds but does not use is as good as free to this process.
            return int(free + torch.cuda.memory_reserved(self.index) - torch.cuda.memory_allocated(self.index))
        import psutil

        limit = _cgroup_free_bytes()
        available = int(psutil.virtual_memory().available)
        return available if limit is None else min(available, limit)


def resolve(name: str = "auto") -> Device:
    """The device called `name`: "auto" (first GPU, else CPU), "cpu", "cuda", "cuda:N", "rocm" or "rocm:N".

    "cuda" also accepts a ROCm device, as torch does; "rocm" accepts nothing else.

    Raises:
        UserError: not a device name, or a device that is not there; the message names those that are.
    """
    form = re.fullmatch(r"(auto|cpu|(cuda|rocm)(?::(\d+))?)", name)
    if form is None:
        raise UserError(f'"{name}" is not a device; use auto, cpu, cuda, cuda:N, rocm or rocm:N')
    if name == "cpu":
        return _cpu()
    gpus = _gpus()
    if name == "auto":
        return gpus[0] if gpus else _cpu()
    backend, index = form[2], int(form[3] or 0)
    if index < len(gpus) and backend in ("cuda", gpus[index].backend):
        return gpus[index]
    present = ", ".join(["cpu", *map(str, gpus)])
    raise UserError(f'device "{name}" is not there: {_torch_build()} sees {present}; choose one of these')


def bfloat16_cost() -> float:
    """How many times as long this CPU takes over torch's product in bfloat16 as in float32, timed in some milliseconds:
    several times as long without instructions for it."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        rows, weight = (torch.randn(128, 512).to(dtype) for _ in range(2))
        times = []
        for _ in range(8):
            began = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            times.append(time.perf_counter() - began)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def _cpu() -> Device:
    return Device("cpu", "cpu", None, cpu_info().get("brand_raw") or platform.processor() or platform.machine())


def _gpus() -> list[Device]:
    import torch

    if not torch.cuda.is_available():
        return []
    backend: Literal["cuda", "rocm"] = "rocm" if torch.version.hip else "cuda"
    return [Device("cuda", backend, i, torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]


def _torch_build() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} (built for CPU only)"
    return f"torch {torch.__version__}"


@functools.cache
def cpu_info() -> dict[str, Any]:
    """py-cpuinfo's answer, asked once: it starts a process of its own and takes a fifth of a second."""
    import cpuinfo

    return cpuinfo.get_cpu_info()


@functools.cache
def _peak_can_be_reset() -> bool:
    """Whether the kernel offers a resettable peak; sandboxes often list the file and refuse the write."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return _peak_resident_bytes() is not None


def _peak_resident_bytes() -> int | None:
    try:
        line = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(line[1]) * 1024 if line else None


def _cgroup_free_bytes() -> int | None:
    """What the cgroup's limit leaves, bytes; None without one. File pages that the kernel may drop count as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        inactive = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + (int(inactive[1]) if inactive else 0))
