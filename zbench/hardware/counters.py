"""Bytes and FLOPs of decode steps as the hardware counted them: files of `ncu` and `rocprofv3`, and NVML's GPM.

No torch here. A counter that is missing, or is there and counts nothing, is a reason and never a zero.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zbench.errors import UserError

GPM_SECONDS = 0.1  # the least between two samples of GPM, as NVML's documentation asks
# ncu scales every value of a metric by itself; its prefixes are powers of ten.
_NCU_BYTES = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}
_NCU_TIMES = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3}
_NCU = {
    "dram__bytes_read.sum": ("read", "bytes", _NCU_BYTES),
    "dram__bytes_write.sum": ("written", "bytes", _NCU_BYTES),
    "gpu__time_duration.sum": ("seconds", "time", _NCU_TIMES),
}
# FETCH_SIZE and WRITE_SIZE are in KiB, matrix operations in units of 512 (ROCm, "MI300 performance counters").
_ROCPROF = {"FETCH_SIZE": ("read", 1024.0), "WRITE_SIZE": ("written", 1024.0)} | {
    f"SQ_INSTS_VALU_MFMA_MOPS_{kind}": ("flops", 512.0) for kind in ("F16", "BF16", "F32", "F64", "F8", "XF32")
}


@dataclass(frozen=True, slots=True)
class Timed:
    """All launches of one kernel. `bytes` is None where they were not counted."""

    kernel: str
    launches: int
    seconds: float
    bytes: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """What was counted over some decode steps. None with a reason in `why_not` where it was not."""

    source: str
    bytes: float | None
    flops: float | None
    why_not: Mapping[str, str]  # "bytes", "flops" -> why
    kernels: int | None = None
    tensor_activity: float | None = None  # share of the time with a tensor pipe busy, 0 to 1
    timed: tuple[Timed, ...] = ()


def read(files: Sequence[Path], steps: int, range_name: str) -> Measured:
    """Totals over the kernels of `steps` decode steps, from what a profiler wrote while `zbench profile` ran.

    Of `ncu --csv` the file holds these kernels alone (`--nvtx-include`). Of rocprofv3 a counter collection and a marker
    trace are needed: kernels that began within the ranges `range_name` count. Raises UserError, one line, for files
    that are neither, or that do not fit.
    """
    tables = [_table(file) for file in files]
    counted = [t for t in tables if {"Counter_Name", "Counter_Value"} <= t.columns]
    marked = [t for t in tables if {"Function", "Start_Timestamp", "End_Timestamp"} <= t.columns]
    if counted:
        if not marked:
            raise UserError(
                f"{counted[0].file}: says nothing of which kernels belong to decode steps; collect with --marker-trace"
                " too and give its *_marker_api_trace.csv as another --counters"
            )
        return _rocprof(counted, marked, steps, range_name)
    ncu = [t for t in tables if {"ID", "Metric Name", "Metric Unit", "Metric Value"} <= t.columns]
    if len(ncu) != len(tables):
        raise UserError(
            f"{next(t.file for t in tables if t not in ncu)}: neither CSV of ncu (columns ID, Metric Name, Metric Unit,"
            " Metric Value) nor of rocprofv3 (Counter_Name, Counter_Value)"
        )
    return _ncu(ncu)


@dataclass(frozen=True, slots=True)
class _Table:
    file: Path
    columns: frozenset[str]
    rows: tuple[dict[str, str], ...]


def _table(file: Path) -> _Table:
    """CSV, below the lines that ncu and the program itself may have printed above it."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    start = next((i for i, line in enumerate(lines) if line.startswith('"') and line.count('","') > 2), len(lines))
    body = [line for line in lines[start:] if not line.startswith("==")]
    rows = tuple(csv.DictReader(body))
    return _Table(file, frozenset(rows[0] if rows else ()), rows)


def _ncu(tables: Iterable[_Table]) -> Measured:
    kernels: dict[tuple[str, str], dict[str, Any]] = {}
    for table in tables:
        for row in table.rows:
            if row["Metric Name"] not in _NCU:
                continue
            what, kind, units = _NCU[row["Metric Name"]]
            if row["Metric Unit"] not in units:
                raise UserError(
                    f"{table.file}: {row['Metric Name']} in {row['Metric Unit']!r}, which is no unit of {kind}"
                )
            value = _number(table.file, row["Metric Value"]) * units[row["Metric Unit"]]
            kernels.setdefault((str(table.file), row["ID"]), {"name": row.get("Kernel Name", "")})[what] = value
    total = {
        what: sum(kernel[what] for kernel in kernels.values() if what in kernel)
        for what in ("read", "written")
        if any(what in kernel for kernel in kernels.values())
    }
    flops = "no counter of ncu gives FLOPs of all data types; its tensor pipes are counted in instructions"
    found = _measured("ncu", total, len(kernels), flops, "dram__bytes_read.sum and dram__bytes_write.sum")
    return replace(found, timed=_timed(kernels.values()))


def _timed(kernels: Iterable[Mapping[str, Any]]) -> tuple[Timed, ...]:
    found: dict[str, Timed] = {}
    for kernel in kernels:
        if "seconds" in kernel:
            moved = kernel["read"] + kernel["written"] if {"read", "written"} <= kernel.keys() else None
            had = found.get(kernel["name"], Timed(kernel["name"], 0, 0.0, 0.0))
            moved = None if moved is None or had.bytes is None else had.bytes + moved
            found[had.kernel] = Timed(had.kernel, had.launches + 1, had.seconds + kernel["seconds"], moved)
    return tuple(sorted(found.values(), key=lambda kernel: -kernel.seconds))


def _rocprof(counted: Sequence[_Table], marked: Sequence[_Table], steps: int, range_name: str) -> Measured:
    spans = sorted(
        (_number(table.file, row["Start_Timestamp"], int), _number(table.file, row["End_Timestamp"], int))
        for table in marked
        for row in table.rows
        if row["Function"] == range_name
    )
    if len(spans) != steps:
        raise UserError(
            f"{marked[0].file}: {len(spans)} ranges {range_name!r} for {steps} steps; give the same --steps"
        )
    total: dict[str, float] = {}
    kernels = set()
    for table in counted:
        if lacking := {"Start_Timestamp", "Process_Id", "Dispatch_Id"} - table.columns:
            raise UserError(f"{table.file}: lacks {', '.join(sorted(lacking))}, which rocprofv3 writes")
        for row in table.rows:
            began = _number(table.file, row["Start_Timestamp"], int)
            if row["Counter_Name"] not in _ROCPROF or not any(start <= began <= end for start, end in spans):
                continue
            what, unit = _ROCPROF[row["Counter_Name"]]
            total[what] = total.get(what, 0.0) + _number(table.file, row["Counter_Value"]) * unit
            kernels.add((row["Process_Id"], row["Dispatch_Id"]))
    flops = "no SQ_INSTS_VALU_MFMA_MOPS counter was collected"
    return _measured("rocprofv3", total, len(kernels), flops, "FETCH_SIZE and WRITE_SIZE")


def _measured(source: str, total: Mapping[str, float], kernels: int, no_flops: str, counters: str) -> Measured:
    why: dict[str, str] = {}
    moved, flops = None, total.get("flops")
    if not {"read", "written"} <= total.keys():
        why["bytes"] = f"{source} did not collect both {counters} in decode steps"
    elif not (moved := total["read"] + total["written"]):
        moved, why["bytes"] = None, f"{source} counted 0 bytes: this GPU does not give {counters}"
    if not flops:
        flops, why["flops"] = None, no_flops if flops is None else f"{source} counted no matrix operations"
    return Measured(source, moved, flops, why, kernels)


def _number(file: Path, text: str | None, kind: Callable[[str], float] = float) -> float:
    """`text` is None where the row ends before it."""
    try:
        return kind((text or "").replace(",", ""))
    except ValueError:
        raise UserError(f"{file}: {text or ''!r} is no number") from None


# --- GPM ---


class Gpm:
    """NVML's GPU performance monitoring (Hopper and later) between two moments: `measured` after `watching`."""

    def __init__(self, nvml: Any, gpu: Any, bandwidth: float | None) -> None:
        """`gpu` a handle, `bandwidth` the peak that the driver's percentage is of, B/s (None: not known)."""
        self._nvml, self._gpu, self._bandwidth = nvml, gpu, bandwidth
        self.measured: Measured | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The device must be idle when it begins and ends: what runs within is what is measured."""
        nvml, samples = self._nvml, []
        self.measured = None
        try:
            try:
                samples += [nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()]
                nvml.nvmlGpmSampleGet(self._gpu, samples[0])
            except nvml.NVMLError as error:
                self.measured = self._none(str(error))
            start = time.perf_counter()
            yield
            if self.measured:
                return
            seconds = time.perf_counter() - start
            if seconds < GPM_SECONDS:
                self.measured = self._none(f"the steps took {seconds * 1e3:.0f} ms, GPM needs 100: more --steps")
                return
            nvml.nvmlGpmSampleGet(self._gpu, samples[1])
            self.measured = self._between(samples[0], samples[1], seconds)
        except nvml.NVMLError as error:
            self.measured = self._none(str(error))
        finally:
            for sample in samples:
                nvml.nvmlGpmSampleFree(sample)

    def _between(self, first: Any, second: Any, seconds: float) -> Measured:
        nvml = self._nvml
        asked = nvml.c_nvmlGpmMetricsGet_t()
        asked.version, asked.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, 2
        asked.sample1, asked.sample2 = first, second
        asked.metrics[0].metricId = nvml.NVML_GPM_METRIC_DRAM_BW_UTIL
        asked.metrics[1].metricId = nvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL
        nvml.nvmlGpmMetricsGet(asked)
        memory, tensor = (
            metric.value / 100 if metric.nvmlReturn == nvml.NVML_SUCCESS else None for metric in asked.metrics[:2]
        )
        why = {"flops": "GPM gives the share of time that tensor pipes are busy, not FLOPs"}
        moved = None
        if memory is None:
            why["bytes"] = "GPM gives no DRAM activity on this GPU"
        elif self._bandwidth is None:
            why["bytes"] = f"DRAM was active for {memory:.1%} of a peak bandwidth that is not known for this GPU"
        else:
            moved = memory * self._bandwidth * seconds
        return Measured("NVML GPM", moved, None, why, tensor_activity=tensor)

    def _none(self, reason: str) -> Measured:
        return Measured("NVML GPM", None, None, {"bytes": reason, "flops": reason})
