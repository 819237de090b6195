"""Probes against recorded shapes of the vendors' libraries and a made-up sysfs; the thread that samples them."""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest

from zbench import telemetry as records
from zbench.errors import UserError
from zbench.hardware import telemetry
from zbench.hardware.device import Device
from zbench.hardware.telemetry import Sensor, Source

RECORDED = Path(__file__).parent / "recorded"
VERSIONS = ("6.0.2", "6.4.4", "7.0.2")


def readings(source: Source) -> dict[str, Any]:
    """Each sensor's value, or why it has none."""

    def ask(sensor: Sensor | str) -> Any:
        if isinstance(sensor, str):
            return sensor
        try:
            return sensor.read()
        except Exception as error:
            return telemetry.reason(error)

    return {name: ask(sensor) for name, sensor in source.sensors.items()}


# AMD ----------------------------------------------------------------------------------------------------------------


class AmdError(Exception):
    """As amdsmi's AmdSmiLibraryException prints itself."""


def fake_amdsmi(monkeypatch: pytest.MonkeyPatch, version: str, power: str = "power_mi300", **replaced: Any) -> Any:
    recorded = json.loads((RECORDED / f"amdsmi-{version}.json").read_text())
    smi = types.ModuleType("amdsmi")

    def not_supported(*_: Any) -> Any:
        raise AmdError(recorded["not_supported"]["text"])

    kinds = types.SimpleNamespace(GFX="GFX", MEM="MEM", HOTSPOT="HOTSPOT", CURRENT="CURRENT", VRAM="VRAM")
    functions: dict[str, Any] = {
        "amdsmi_init": lambda: None,
        "amdsmi_get_processor_handle_from_bdf": lambda bdf: f"handle of {bdf}",
        "amdsmi_get_power_info": lambda gpu: recorded[power],
        "amdsmi_get_energy_count": lambda gpu: recorded["energy"],
        "amdsmi_get_gpu_activity": lambda gpu: recorded["activity"],
        "amdsmi_get_clock_info": lambda gpu, kind: recorded["clock"],
        "amdsmi_get_gpu_metrics_info": lambda gpu: recorded["metrics"],
        "amdsmi_get_temp_metric": lambda gpu, kind, metric: 47000 if version < "7" else 47,
        "amdsmi_get_gpu_memory_usage": lambda gpu, kind: 16_000_000_000,
    }
    for name, function in (functions | replaced).items():
        setattr(smi, name, not_supported if function is None else function)
    for name in ("AmdSmiClkType", "AmdSmiTemperatureType", "AmdSmiTemperatureMetric", "AmdSmiMemoryType"):
        setattr(smi, name, kinds)
    monkeypatch.setitem(sys.modules, "amdsmi", smi)
    return recorded


@pytest.mark.parametrize("version", VERSIONS)
def test_amdsmi_of_rocm_6_and_7_reads_alike(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    fake_amdsmi(monkeypatch, version)
    source = telemetry.amd_source("MI300X", "0000:c5:00.0")
    found = readings(source)
    assert found["power"] == 717
    assert found["energy"] == pytest.approx(8152136 * 15.3e-6)
    assert found["core_clock"] == 2105e6
    assert found["temperature"] == 47
    assert (found["activity"], found["memory_activity"]) == (1.0, 0.37)
    assert found["memory"] == 16e9
    assert isinstance(power := source.sensors["power"], Sensor) and power.facts["averaged"] is False


@pytest.mark.parametrize("version", VERSIONS)
def test_mi200_has_only_an_average_of_power_and_says_so(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    fake_amdsmi(monkeypatch, version, "power_mi200")
    source = telemetry.amd_source("MI210", "0000:c5:00.0")
    assert readings(source)["power"] == 94
    assert isinstance(power := source.sensors["power"], Sensor) and power.facts["averaged"] is True


def test_the_second_die_of_an_mi250_has_no_power_rather_than_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"socket_power": 0, "current_socket_power": "N/A", "average_socket_power": 0}
    fake_amdsmi(monkeypatch, "7.0.2", amdsmi_get_power_info=lambda gpu: nothing)
    assert readings(telemetry.amd_source("MI250", "0000:c5:00.0"))["power"] is None


def test_amd_throttling_is_a_residency_that_grew(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = fake_amdsmi(monkeypatch, "7.0.2")
    throttle = telemetry.amd_source("MI300X", "0000:c5:00.0").sensors["throttle"]
    assert isinstance(throttle, Sensor)
    assert throttle.read() == ""  # nothing to compare with yet
    assert throttle.read() == ""
    recorded["metrics"]["ppt_residency_acc"] += 5
    recorded["metrics"]["hbm_thm_residency_acc"] += 1
    assert throttle.read() == "power cap, temperature (memory)"
    assert throttle.read() == ""


def test_amd_throttling_is_unknown_where_every_field_is_a_sentinel(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_amdsmi(monkeypatch, "6.0.2")
    assert readings(telemetry.amd_source("MI210", "0000:c5:00.0"))["throttle"] is None


def test_an_amd_sensor_that_is_not_supported_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_amdsmi(monkeypatch, "7.0.2", amdsmi_get_energy_count=None)
    found = readings(telemetry.amd_source("MI300X", "0000:c5:00.0"))
    assert found["energy"] == "Error code: 2 | AMDSMI_STATUS_NOT_SUPPORTED - Feature not supported"
    assert found["power"] == 717


def test_the_amd_gpu_is_asked_for_by_its_pci_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    fake_amdsmi(monkeypatch, "7.0.2", amdsmi_get_power_info=lambda gpu: asked.append(gpu) or {"socket_power": 1})
    readings(telemetry.amd_source("MI300X", "0000:c5:00.0"))
    assert set(asked) == {"handle of 0000:c5:00.0"}


# NVIDIA -------------------------------------------------------------------------------------------------------------


class Nvml:
    """Stands in for libnvidia-ml.so beneath the real bindings: GPUs by UUID and PCI address, any function can fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **failing: int) -> None:
        self.failing, self.asked = failing, []
        self.by_uuid = {"GPU-one": 11, "GPU-two": 22}
        self.by_address = {"0000:3b:00.0": 11, "0000:86:00.0": 22}
        self.reasons = 0x04 | 0x01 | 0x40
        monkeypatch.setattr(pynvml, "_LoadNvmlLibrary", lambda: None)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer", self.function)

    def function(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.asked.append(name)
            bare = name.removesuffix("_v2")
            if bare in self.failing:
                return self.failing[bare]
            return getattr(self, bare)(*arguments) or pynvml.NVML_SUCCESS

        return call

    def nvmlInitWithFlags(self, flags: Any) -> None: ...

    def _handle(self, known: dict[str, int], key: ctypes.c_char_p, device: Any) -> int:
        assert key.value is not None
        if key.value.decode() not in known:
            return pynvml.NVML_ERROR_NOT_FOUND
        # The handle is a pointer; its address tells the GPUs apart.
        ctypes.cast(device, ctypes.POINTER(ctypes.c_void_p))[0] = known[key.value.decode()]
        return pynvml.NVML_SUCCESS

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, device: Any) -> int:
        return self._handle(self.by_uuid, uuid, device)

    def nvmlDeviceGetHandleByPciBusId(self, address: Any, device: Any) -> int:
        return self._handle(self.by_address, address, device)

    def nvmlDeviceGetFieldValues(self, gpu: Any, count: Any, values: Any) -> None:
        value = values._obj[0]
        assert value.fieldId == pynvml.NVML_FI_DEV_POWER_INSTANT
        value.nvmlReturn = self.failing.get("power_instant", pynvml.NVML_SUCCESS)
        value.value.uiVal = 300_000 + ctypes.cast(gpu, ctypes.c_void_p).value  # type: ignore[operator]

    def nvmlDeviceGetPowerUsage(self, gpu: Any, out: Any) -> None:
        out._obj.value = 250_000

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: Any, out: Any) -> None:
        out._obj.value = 1_234_567

    def nvmlDeviceGetClockInfo(self, gpu: Any, kind: Any, out: Any) -> None:
        out._obj.value = 1980 if kind.value == pynvml.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetTemperature(self, gpu: Any, sensor: Any, out: Any) -> None:
        out._obj.value = 56

    def nvmlDeviceGetMemoryInfo(self, gpu: Any, out: Any) -> None:
        out._obj.used = 17_000_000_000

    def nvmlDeviceGetUtilizationRates(self, gpu: Any, out: Any) -> None:
        out._obj.gpu, out._obj.memory = 97, 41

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: Any, out: Any) -> None:
        out._obj.value = self.reasons

    nvmlDeviceGetCurrentClocksThrottleReasons = nvmlDeviceGetCurrentClocksEventReasons


def test_nvml_values_come_in_our_units(monkeypatch: pytest.MonkeyPatch) -> None:
    Nvml(monkeypatch)
    found = readings(telemetry.nvml_source("H100", "GPU-two", "0000:86:00.0"))
    assert found == {
        "power": 300.022,
        "energy": 1234.567,
        "core_clock": 1.98e9,
        "memory_clock": 2.619e9,
        "temperature": 56,
        "memory": 17e9,
        "activity": 0.97,
        "memory_activity": 0.41,
        "throttle": "power cap, temperature (hardware)",  # that it idles is no throttling
    }


def test_a_gpu_is_found_by_uuid_and_else_by_pci_address(monkeypatch: pytest.MonkeyPatch) -> None:
    Nvml(monkeypatch)
    assert readings(telemetry.nvml_source("H100", "GPU-one", "nowhere"))["power"] == 300.011
    assert readings(telemetry.nvml_source("H100", "MIG-unknown", "0000:86:00.0"))["power"] == 300.022
    with pytest.raises(pynvml.NVMLError_NotFound):
        telemetry.nvml_source("H100", "GPU-none", "nowhere")


def test_without_the_instant_reading_power_is_marked_as_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    Nvml(monkeypatch, power_instant=pynvml.NVML_ERROR_NOT_SUPPORTED)
    power = telemetry.nvml_source("A100", "GPU-one", "").sensors["power"]
    assert isinstance(power, Sensor) and power.read() == 250 and power.facts["averaged"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_NOT_SUPPORTED, "Not Supported"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "Insufficient Permissions"),
        (pynvml.NVML_ERROR_GPU_IS_LOST, "GPU is lost"),
    ],
)
def test_an_nvml_error_is_the_reason_and_not_a_zero(monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    Nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=code)
    found = readings(telemetry.nvml_source("V100", "GPU-one", ""))
    assert found["energy"] == words
    assert found["temperature"] == 56


def test_a_missing_library_makes_every_sensor_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    properties = types.SimpleNamespace(uuid="one", pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: (_ for _ in ()).throw(pynvml.NVMLError_LibraryNotFound()))
    source = telemetry.source_of(Device("cuda", "cuda", 0, "H100"))
    assert set(source.sensors) == set(records.SENSORS)
    assert set(source.sensors.values()) == {"NVML Shared Library Not Found"}
    monkeypatch.setitem(sys.modules, "amdsmi", None)  # what an import then raises is ModuleNotFoundError
    source = telemetry.source_of(Device("cuda", "rocm", 0, "MI300X"))
    assert "amdsmi" in str(source.sensors["power"])
    assert "ROCm" in telemetry.reason(KeyError("libamd_smi.so"))  # what importing amdsmi raises without ROCm


# CPU ----------------------------------------------------------------------------------------------------------------


def powercap(root: Path, **zones: tuple[str, int, int]) -> Path:
    """zones: intel-rapl number -> (name, energy_uj, max_energy_range_uj)."""
    for number, (name, energy, span) in zones.items():
        folder = root / f"intel-rapl:{number.removeprefix('z').replace('_', ':')}"
        folder.mkdir(parents=True)
        for file, content in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", span)):
            (folder / file).write_text(f"{content}\n")
    return root


def test_rapl_sums_packages_and_memory_and_leaves_out_what_they_contain(tmp_path: Path) -> None:
    root = powercap(
        tmp_path,
        z0=("package-0", 1000, 10**9), z0_0=("core", 500, 10**9), z0_1=("dram", 300, 10**9),
        z1=("package-1", 2000, 10**9), z2=("psys", 9000, 10**9),
    )  # fmt: skip
    rapl = telemetry.Rapl(root)
    assert sorted(rapl.names) == ["dram", "package-0", "package-1"]
    for zone, energy in (("0", 2_001_000), ("0:0", 10**8), ("0:1", 1_000_300), ("1", 502_000), ("2", 10**8)):
        (root / f"intel-rapl:{zone}/energy_uj").write_text(str(energy))
    assert rapl.joules() == pytest.approx(2 + 1 + 0.5)


def test_rapl_counts_through_a_wrap_around(tmp_path: Path) -> None:
    root = powercap(tmp_path, z0=("package-0", 262_143_000_000, 262_143_328_850))
    rapl = telemetry.Rapl(root)
    counter = root / "intel-rapl:0/energy_uj"
    counter.write_text("1000000")
    assert rapl.joules() == pytest.approx((262_143_328_850 - 262_143_000_000 + 1_000_000) * 1e-6)
    counter.write_text("3000000")
    assert rapl.joules() == pytest.approx((262_143_328_850 - 262_143_000_000 + 3_000_000) * 1e-6)


def test_rapl_that_only_root_may_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = powercap(tmp_path, z0=("package-0", 1000, 10**9))
    read = Path.read_text

    def denied(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", denied)
    sensors = telemetry.cpu_source("CPU", root, tmp_path).sensors
    assert isinstance(why := sensors["energy"], str) and "energy_uj: permission denied" in why
    assert sensors["power"] == why


def test_without_sysfs_every_cpu_sensor_says_why(tmp_path: Path) -> None:
    sensors = telemetry.cpu_source("CPU", tmp_path / "none", tmp_path / "none").sensors
    assert "no energy counters" in str(sensors["energy"])
    assert "no current frequency" in str(sensors["core_clock"])
    assert "counts no thermal throttling" in str(sensors["throttle"])
    assert set(sensors) == set(records.SENSORS)


def test_cpu_throttling_is_a_count_that_grew(tmp_path: Path) -> None:
    counts = []
    for cpu, package in ((0, 0), (1, 1), (2, 1)):
        folder = tmp_path / f"cpu{cpu}"
        (folder / "thermal_throttle").mkdir(parents=True)
        (folder / "topology").mkdir()
        (folder / "topology/physical_package_id").write_text(f"{package}\n")
        (folder / "thermal_throttle/package_throttle_count").write_text("5\n")
        counts.append(folder / "thermal_throttle/package_throttle_count")
    throttle = telemetry.cpu_source("CPU", tmp_path, tmp_path).sensors["throttle"]
    assert isinstance(throttle, Sensor)
    assert [throttle.read(), throttle.read()] == ["", ""]
    for count in counts[1:]:
        count.write_text("6\n")
    assert [throttle.read(), throttle.read()] == ["temperature", ""]


# The thread ---------------------------------------------------------------------------------------------------------


def sampled(path: Path, sensors: dict[str, Sensor | str], period: float = 0.01) -> records.Segment:
    with telemetry.Sampler(Source("made up", "device", sensors), path, period) as sampler, sampler.window(("a", 0, 1)):
        time.sleep(0.15)
    found = records.read(path.parent)
    assert found is not None
    return found.last


def test_samples_surround_a_trial_and_missing_sensors_keep_their_reason(tmp_path: Path) -> None:
    counted = iter(range(10**6))
    segment = sampled(
        tmp_path / records.TELEMETRY,
        {
            "energy": Sensor(lambda: next(counted), {"of": "all of it"}),
            "power": "there is none",
            "temperature": Sensor(lambda: None),
            "core_clock": Sensor(lambda: 1 / 0),
            "throttle": Sensor(lambda: "power cap"),
        },
    )
    start, end = segment.windows["a", 0, 1]
    assert end - start >= 0.15
    assert start in segment.times and end in segment.times
    energy = dict(zip(segment.times, segment.values["energy"], strict=True))
    assert energy[end] - energy[start] == segment.within(("a", 0, 1)).sum()
    assert segment.sensors["energy"]["of"] == "all of it"  # type: ignore[index]
    assert segment.sensors["energy"]["update_seconds"] > 0  # type: ignore[index]
    assert segment.sensors["power"] == "unavailable: there is none"
    assert segment.sensors["temperature"] == "unavailable: not reported"
    assert segment.sensors["core_clock"] == "unavailable: division by zero"
    assert segment.sensors["memory"] == "unavailable: made up has no such sensor"
    assert set(segment.values["throttle"]) == {"power cap"}
    assert not segment.has("power") and segment.why_not("power") == "there is none"
    assert segment.cost["samples"] == len(segment.times)


def test_what_was_before_a_trial_is_not_the_trials(tmp_path: Path) -> None:
    counts, last = [0], [0]

    def throttle() -> str:
        grown = counts > last
        last[:] = counts
        return "temperature" if grown else ""

    path = tmp_path / records.TELEMETRY
    sensors = {"throttle": Sensor(throttle), "core_clock": Sensor(lambda: 2e9 if running else 3e8)}
    running = False
    with telemetry.Sampler(Source("made up", "device", sensors), path, 10.0) as sampler:
        time.sleep(0.05)
        counts[0] = 1
        with sampler.window(("a", 0, 0)):
            running = True
        with sampler.window(("a", 0, 1)):
            counts[0] = 2
    found = records.read(tmp_path)
    assert found is not None
    assert set(found.samples(("a", 0, 0), "throttle")) == {""}
    assert "temperature" in found.samples(("a", 0, 1), "throttle")
    assert set(found.samples(("a", 0, 0), "core_clock")) == {2e9}


def test_a_full_disk_does_not_replace_the_error_that_ends_the_run(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"cannot write trials\.jsonl"),
        telemetry.Sampler(Source("none", "device", {}), tmp_path / records.TELEMETRY, 0.01) as sampler,
    ):
        sampler._file = Path("/dev/full").open("ab+")  # noqa: SIM115, the sampler closes it
        sampler._write({})
        raise UserError("cannot write trials.jsonl")


def test_a_reading_that_fails_later_is_a_gap_with_a_reason(tmp_path: Path) -> None:
    calls = iter(range(10**6))

    def read() -> float:
        if next(calls) > 2:
            raise OSError("GPU is lost")
        return 60.0

    segment = sampled(tmp_path / records.TELEMETRY, {"temperature": Sensor(read)})
    values = segment.values["temperature"]
    assert (values[:2] == 60).all() and (values[2:] != values[2:]).all()
    assert segment.cost["failures"] == {"temperature": "GPU is lost"}


def test_costly_sensors_are_sampled_less_often(tmp_path: Path) -> None:
    def slow() -> float:
        spent = time.thread_time()
        while time.thread_time() - spent < 0.002:
            pass
        return 1.0

    segment = sampled(tmp_path / records.TELEMETRY, {"temperature": Sensor(slow)})
    assert segment.cost["period"] >= 0.002 / telemetry.SHARE


def test_with_no_sensor_at_all_no_thread_runs(tmp_path: Path) -> None:
    before = threading.active_count()
    with telemetry.Sampler(Source("none", "device", {}), tmp_path / records.TELEMETRY, 0.01):
        assert threading.active_count() == before
    found = records.read(tmp_path)
    assert found is not None and all(isinstance(s, str) for s in found.last.sensors.values())


def test_a_second_start_appends_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / records.TELEMETRY
    sampled(path, {"temperature": Sensor(lambda: 1.0)})
    with path.open("ab") as file:
        file.write(b"[0.5,nul")
    sampled(path, {"temperature": Sensor(lambda: 2.0)})
    found = records.read(tmp_path)
    assert found is not None and len(found.segments) == 2 and not found.warnings
    assert set(found.samples(("a", 0, 1), "temperature")) == {2.0}


def test_off_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / records.TELEMETRY
    with telemetry.watching(Device("cpu", "cpu", None, "CPU"), path, None) as watch, watch.window(("a", 0, 0)):
        pass
    assert not path.exists() and records.read(tmp_path) is None
