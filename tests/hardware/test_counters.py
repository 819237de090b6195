"""Hardware counters: files as ncu and rocprofv3 write them, and GPM through NVML's own structures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from zbench.errors import UserError
from zbench.hardware import counters
from zbench.hardware.counters import Gpm, Measured, read

RECORDED = Path(__file__).parent / "recorded"
NCU, PMC, MARKERS = (
    RECORDED / name
    for name in ("ncu-details.csv", "rocprofv3_counter_collection.csv", "rocprofv3_marker_api_trace.csv")
)


def edited(tmp_path: Path, file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert old in text
    copy = tmp_path / file.name
    copy.write_text(text.replace(old, new))
    return copy


def test_ncu_bytes_are_summed_in_their_own_units() -> None:
    found = read([NCU], 2, "zbench step")
    assert (found.source, found.kernels) == ("ncu", 2)
    assert found.bytes == 10.24e6 + 640e3 + 1_048_576
    assert found.flops is None and "instructions" in found.why_not["flops"]


def test_ncu_times_are_those_of_kernels_whose_launches_have_one(tmp_path: Path) -> None:
    (gemv,) = read([NCU], 2, "zbench step").timed
    assert (gemv.kernel, gemv.launches, gemv.bytes) == ("gemv_kernel", 1, 10.24e6 + 640e3)
    assert gemv.seconds == pytest.approx(41.28e-6)
    renamed = edited(tmp_path, NCU, "void attention_kernel<float, 64>(float *, int)", "gemv_kernel")
    renamed.write_text(
        renamed.read_text().replace('"dram__bytes_write.sum","byte","0"', '"gpu__time_duration.sum","ns","720"')
    )
    (gemv,) = read([renamed], 2, "zbench step").timed
    assert (gemv.launches, gemv.bytes) == (2, None)
    assert gemv.seconds == pytest.approx(42e-6)


def test_what_ncu_wrote_on_an_h200_is_read() -> None:
    found = read([RECORDED / "ncu-h200.csv"], 1, "zbench step")
    assert (found.kernels, found.bytes, found.timed) == (3, 4096 + 1024 + 3584 + 256 + 540_416 + 256, ())


def test_rocprofv3_counts_what_began_within_steps() -> None:
    found = read([PMC, MARKERS], 2, "zbench step")
    assert (found.source, found.kernels, found.why_not) == ("rocprofv3", 2, {})
    assert found.bytes == pytest.approx((1024 + 43.4259040 + 1024) * 1024)
    assert found.flops == 2 * 2048 * 512


def test_counters_that_are_not_there_or_count_nothing_are_a_reason_and_no_zero(tmp_path: Path) -> None:
    lacking = read([edited(tmp_path, NCU, "dram__bytes_write.sum", "dram__throughput.avg")], 2, "zbench step")
    assert lacking.bytes is None and "did not collect both" in lacking.why_not["bytes"]
    text = PMC.read_text()
    for value in ("1024.000000", "4.34259040e+01"):
        text = text.replace(value, "0.00000000e+00")  # what an RDNA 4 gives
    dead = tmp_path / "dead.csv"
    dead.write_text(text)
    assert read([dead, MARKERS], 2, "zbench step").why_not == {
        "bytes": "rocprofv3 counted 0 bytes: this GPU does not give FETCH_SIZE and WRITE_SIZE"
    }


@pytest.mark.parametrize(
    ("files", "steps", "fragment"),
    [
        ([PMC], 2, "--marker-trace"),
        ([PMC, MARKERS], 3, "2 ranges 'zbench step' for 3 steps"),
        ([RECORDED / "README.md"], 2, "neither CSV of ncu"),
        ([RECORDED / "nothing.csv"], 2, "cannot be read"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(files: Sequence[Path], steps: int, fragment: str) -> None:
    with pytest.raises(UserError, match=fragment) as refused:
        read(files, steps, "zbench step")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "old", "new", "fragment"),
    [
        (PMC, "Start_Timestamp", "Start", r"rocprofv3_counter_collection\.csv: lacks Start_Timestamp"),
        (PMC, "1010,1060", "soon,1060", r"counter_collection\.csv: 'soon' is no number"),
        (PMC, ",1024.000000,1010,1060", "", r"counter_collection\.csv: '' is no number"),
        (MARKERS, "1000,1100", "1000", r"marker_api_trace\.csv: '' is no number"),
        (NCU, '"10.24"', '"n/a"', r"ncu-details\.csv: 'n/a' is no number"),
    ],
)
def test_what_a_profilers_file_lacks_is_named(tmp_path: Path, file: Path, old: str, new: str, fragment: str) -> None:
    others = {PMC: [MARKERS], MARKERS: [PMC], NCU: []}
    with pytest.raises(UserError, match=fragment):
        read([edited(tmp_path, file, old, new), *others[file]], 2, "zbench step")


def test_an_unknown_unit_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no unit of bytes"):
        read([edited(tmp_path, NCU, '"Mbyte"', '"sector"')], 2, "zbench step")


def nvml(memory: float | None, tensor: float = 12.5) -> Any:
    """NVML's own structures, filled in as a driver would: percentages, and an error code for what it has not."""

    def filled(asked: Any) -> Any:
        assert isinstance(asked, pynvml.c_nvmlGpmMetricsGet_t) and asked.version == 1
        for metric in asked.metrics[: asked.numMetrics]:
            value = {pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: memory, pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: tensor}
            found = value[metric.metricId]
            metric.nvmlReturn = pynvml.NVML_SUCCESS if found is not None else pynvml.NVML_ERROR_NOT_SUPPORTED
            metric.value = found or 0.0
        return asked

    given = {
        name: getattr(pynvml, name) for name in dir(pynvml) if name.startswith(("NVML_", "NVMLError", "c_nvmlGpm"))
    }
    freed: list[Any] = []
    return SimpleNamespace(
        **given,
        freed=freed,
        nvmlGpmSampleAlloc=pynvml.c_nvmlGpmSample_t,
        nvmlGpmSampleGet=lambda gpu, sample: sample,
        nvmlGpmMetricsGet=filled,
        nvmlGpmSampleFree=freed.append,
    )


def watched(library: Any, bandwidth: float | None, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.5) -> Measured:
    clock = iter((10.0, 10.0 + seconds))
    monkeypatch.setattr(counters.time, "perf_counter", lambda: next(clock))
    gpm = Gpm(library, "gpu", bandwidth)
    with gpm.watching():
        pass
    assert gpm.measured is not None and len(library.freed) == 2
    return gpm.measured


def test_gpm_gives_bytes_from_activity_and_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    found = watched(nvml(40.0), 3.35e12, monkeypatch)
    assert found.bytes == pytest.approx(0.4 * 3.35e12 * 0.5) and found.tensor_activity == 0.125
    assert found.flops is None
    assert "not known for this GPU" in watched(nvml(40.0), None, monkeypatch).why_not["bytes"]
    assert watched(nvml(None), 1e12, monkeypatch).why_not["bytes"] == "GPM gives no DRAM activity on this GPU"
    assert "more --steps" in watched(nvml(40.0), 1e12, monkeypatch, seconds=0.04).why_not["bytes"]
    broken = nvml(40.0)

    def refused(*_: Any) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)

    broken.nvmlGpmMetricsGet = refused
    assert "Permission" in watched(broken, 1e12, monkeypatch).why_not["bytes"]
    broken = nvml(40.0)
    broken.nvmlGpmSampleGet = refused
    assert "Permission" in watched(broken, 1e12, monkeypatch).why_not["bytes"]
