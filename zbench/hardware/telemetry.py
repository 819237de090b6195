"""Power, energy, clocks, temperature and throttling while a run lasts, sampled by a thread under 1% of a core.

A device has one source: NVML, amdsmi, or for a CPU the kernel's files (RAPL energy counters, cpufreq, hwmon). Each
sensor is asked once before the run; one that is missing, forbidden or says "N/A" is "unavailable: <why>" from then on,
and never a zero. A GPU is found by its UUID or PCI address, as its index means something else to torch than to the
vendor's library (CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES, partitions). `zbench/telemetry.py`
reads what is written.
"""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from zbench.telemetry import SCHEMA_VERSION, SENSORS, Key

if TYPE_CHECKING:
    from zbench.hardware.device import Device

SHARE = 0.01  # of one core: what sampling may cost; where a sample takes longer, they come less often
_POWERCAP = Path("/sys/class/powercap")
_CPUS = Path("/sys/devices/system/cpu")
_ABSENT = (None, "", "N/A", 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)  # what amdsmi says of a sensor that is not there
# NVML's reasons for a clock below the requested one (nvmlClocksEventReason*). Idling and a clock that the user asked
# for are reasons too, but no throttling.
_NVML_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
# amdsmi's counters of time spent under a limit (amdsmi_get_gpu_metrics_info, from gpu_metrics 1.6 on).
_AMD_RESIDENCIES = {
    "ppt_residency_acc": "power cap",
    "prochot_residency_acc": "processor hot",
    "socket_thm_residency_acc": "temperature (socket)",
    "vr_thm_residency_acc": "temperature (voltage regulator)",
    "hbm_thm_residency_acc": "temperature (memory)",
}


@dataclass(frozen=True)
class Sensor:
    """`read` returns the value in the unit of `SENSORS`, None where there is none just now; it may raise anything."""

    read: Callable[[], float | str | None]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """What can be asked about a device: a sensor, or the reason why it cannot be asked."""

    name: str
    device: str
    sensors: Mapping[str, Sensor | str]


class Watch(Protocol):
    def window(self, key: Key) -> AbstractContextManager[None]:
        """Mark a trial, with a sample of its own before and after, outside the trial's measured time."""
        ...


class _Off:
    def window(self, key: Key) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


OFF: Watch = _Off()


@contextmanager
def watching(device: Device, path: Path, period: float | None) -> Iterator[Watch]:
    """Append a segment to the telemetry file at `path` while the block runs; None as a period records nothing."""
    if period is None:
        yield OFF
        return
    with Sampler(source_of(device), path, period) as sampler:
        yield sampler


def source_of(device: Device) -> Source:
    """The source for a device that torch knows. Never raises: what cannot be asked says why."""
    if device.type == "cpu":
        return cpu_source(device.name)
    import torch

    found: Any = torch.cuda.get_device_properties(device.torch)
    address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    try:
        if device.backend == "rocm":
            return amd_source(device.name, address)
        return nvml_source(device.name, f"GPU-{found.uuid}", address)
    except Exception as error:  # vendor libraries raise what they like, KeyError at import included
        why = reason(error)
        return Source("amdsmi" if device.backend == "rocm" else "NVML", device.name, dict.fromkeys(SENSORS, why))


def reason(error: BaseException) -> str:
    """One line that completes "unavailable: "."""
    if isinstance(error, KeyError) and "libamd_smi" in str(error):
        return "amdsmi finds no libamd_smi.so: ROCm is not installed, or ROCM_PATH does not point to it"
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed"
    if isinstance(error, PermissionError):
        return f"{error.filename}: permission denied (the kernel lets only root read it; run as root or chmod a+r it)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


# NVIDIA --------------------------------------------------------------------------------------------------------------


def nvml_source(name: str, uuid: str, address: str) -> Source:
    """By NVML. Raises NVMLError where the library or the device is not there."""
    import pynvml as nvml

    nvml.nvmlInit()  # stays so until the process ends: others in the process may be using it
    try:
        gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:
        gpu = nvml.nvmlDeviceGetHandleByPciBusId(address)

    def field_value(number: int) -> float:
        found = nvml.nvmlDeviceGetFieldValues(gpu, [number])[0]
        if found.nvmlReturn != nvml.NVML_SUCCESS:
            raise nvml.NVMLError(found.nvmlReturn)
        return float(found.value.uiVal)

    def clock(which: int) -> Callable[[], float]:
        return lambda: nvml.nvmlDeviceGetClockInfo(gpu, which) * 1e6

    def throttle() -> str:
        bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
        return ", ".join(why for bit, why in _NVML_REASONS.items() if bits & bit)

    try:
        field_value(nvml.NVML_FI_DEV_POWER_INSTANT)
        power = Sensor(
            lambda: field_value(nvml.NVML_FI_DEV_POWER_INSTANT) / 1e3, {"of": "NVML_FI_DEV_POWER_INSTANT, board"}
        )
    except Exception:  # the plain reading is a mean of the last second since Ampere; older ones are not told apart
        power = Sensor(
            lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3, {"of": "nvmlDeviceGetPowerUsage, board", "averaged": True}
        )
    sensors: dict[str, Sensor | str] = {
        "power": power,
        "energy": Sensor(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3, {"of": "board"}),
        "core_clock": Sensor(clock(nvml.NVML_CLOCK_SM), {"of": "SM"}),
        "memory_clock": Sensor(clock(nvml.NVML_CLOCK_MEM)),
        "temperature": Sensor(
            lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU), {"of": "GPU core"}
        ),
        "memory": Sensor(lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used, {"of": "device, all processes"}),
        "activity": Sensor(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100, {"of": "time with a kernel"}),
        "memory_activity": Sensor(
            lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).memory / 100, {"of": "time with memory traffic"}
        ),
        "throttle": Sensor(throttle),
    }
    return Source("NVML", name, sensors)


# AMD -----------------------------------------------------------------------------------------------------------------


def amd_source(name: str, address: str) -> Source:
    """By amdsmi, as of ROCm 6 and 7. Raises what the library raises where it or the device is not there."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints where its library is missing; stdout is for results
        import amdsmi as smi

        smi.amdsmi_init()
        gpu = smi.amdsmi_get_processor_handle_from_bdf(address)

    def power() -> float | None:
        """socket_power since ROCm 7; else current on MI300 and average on MI200, the other being absent."""
        # A GPU never draws 0 W: the second die of an MI250 reports the first one's power, and itself nothing.
        found = smi.amdsmi_get_power_info(gpu)
        value = _first(found, "socket_power", "current_socket_power", "average_socket_power")
        return value or None

    def energy() -> float | None:
        found = smi.amdsmi_get_energy_count(gpu)
        count = _first(found, "energy_accumulator", "power")  # the latter until ROCm 6.1
        return None if count is None else count * found["counter_resolution"] * 1e-6

    def clock(kind: Any) -> Callable[[], float | None]:
        def read() -> float | None:
            found = _first(smi.amdsmi_get_clock_info(gpu, kind), "clk", "cur_clk")  # the latter until ROCm 6.1
            return None if found is None else found * 1e6

        return read

    def temperature() -> float:
        kind, metric = smi.AmdSmiTemperatureType.HOTSPOT, smi.AmdSmiTemperatureMetric.CURRENT
        found = smi.amdsmi_get_temp_metric(gpu, kind, metric)
        return found / 1e3 if found > 1e3 else found  # millidegrees in some versions, degrees in others

    def activity(key: str) -> Callable[[], float | None]:
        def read() -> float | None:
            found = _first(smi.amdsmi_get_gpu_activity(gpu), key)
            return None if found is None else found / 100

        return read

    residencies: dict[str, float] = {}

    def throttle() -> str | None:
        found = smi.amdsmi_get_gpu_metrics_info(gpu)
        now = {why: value for key, why in _AMD_RESIDENCIES.items() if (value := _first(found, key)) is not None}
        if now:
            grown = [why for why, value in now.items() if value > residencies.get(why, value)]
            residencies.update(now)
            return ", ".join(grown)
        status = next(
            (found[k] for k in ("indep_throttle_status", "throttle_status") if not _absent(found.get(k))), None
        )
        return None if status is None else "of a reason that is not given" if status else ""

    averaged = True
    with contextlib.suppress(Exception):  # the sensor itself will say why
        averaged = _absent(smi.amdsmi_get_power_info(gpu).get("current_socket_power"))
    sensors: dict[str, Sensor | str] = {
        "power": Sensor(power, {"of": "socket", "averaged": averaged}),
        "energy": Sensor(energy, {"of": "socket"}),
        "core_clock": Sensor(clock(smi.AmdSmiClkType.GFX), {"of": "GFX"}),
        "memory_clock": Sensor(clock(smi.AmdSmiClkType.MEM)),
        "temperature": Sensor(temperature, {"of": "hotspot"}),
        "memory": Sensor(
            lambda: smi.amdsmi_get_gpu_memory_usage(gpu, smi.AmdSmiMemoryType.VRAM), {"of": "device, all processes"}
        ),
        "activity": Sensor(activity("gfx_activity"), {"of": "GFX engine"}),
        "memory_activity": Sensor(activity("umc_activity"), {"of": "memory controller"}),
        "throttle": Sensor(throttle),
    }
    return Source("amdsmi", name, sensors)


def _absent(value: Any) -> bool:
    return value in _ABSENT


def _first(found: Mapping[str, Any], *keys: str) -> float | None:
    return next((float(found[key]) for key in keys if not _absent(found.get(key))), None)


# CPU -----------------------------------------------------------------------------------------------------------------


class Rapl:
    """The energy counters of all packages, and of their memory where it is counted apart (Linux powercap, intel-rapl;
    AMD's are exposed under the same name). A counter wraps around at `max_energy_range_uj`."""

    def __init__(self, root: Path) -> None:
        """Raises OSError: no counters here, or not readable."""
        zones = sorted(root.glob("intel-rapl:*"))
        named = {zone: (zone / "name").read_text().strip() for zone in zones}
        self._zones = [zone for zone, name in named.items() if name.startswith("package-") or name == "dram"]
        if not self._zones:
            raise OSError(f"{root} has no energy counters (RAPL): usual in virtual machines and containers")
        self.names = [named[zone] for zone in self._zones]
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        self._last = self._counts()
        self._total = 0

    def joules(self) -> float:
        """Since this object was made."""
        now = self._counts()
        for count, before, span in zip(now, self._last, self._ranges, strict=True):
            self._total += count - before if count >= before else count - before + span
        self._last = now
        return self._total * 1e-6

    def _counts(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]


def cpu_source(name: str, powercap: Path = _POWERCAP, cpus: Path = _CPUS) -> Source:
    """By the kernel's files."""
    process = psutil.Process()
    sensors: dict[str, Sensor | str] = {
        "memory": Sensor(lambda: process.memory_info().rss, {"of": "this process, resident"}),
        "activity": Sensor(_Busy(), {"of": "all CPUs, all processes"}),
        "memory_clock": "a CPU does not report it",
        "memory_activity": "a CPU does not report it without performance counters",
        "temperature": Sensor(_temperature, {"of": "hottest sensor of the CPU"}),
        "throttle": _throttle_counts(cpus),
    }
    try:
        counters = Rapl(powercap)
        sensors["energy"] = Sensor(counters.joules, {"of": f"RAPL: {', '.join(counters.names)}; all processes"})
        sensors["power"] = "a CPU has no sensor for it, it follows from the energy counter"
    except (OSError, ValueError) as error:
        sensors["energy"] = sensors["power"] = reason(error)
    if (cpus / "cpu0/cpufreq/scaling_cur_freq").exists():
        sensors["core_clock"] = Sensor(lambda: psutil.cpu_freq().current * 1e6, {"of": "mean of all CPUs"})
    else:
        sensors["core_clock"] = (
            "the kernel reports no current frequency (no cpufreq; a virtual machine shows a nominal one)"
        )
    return Source("RAPL and the kernel", name, sensors)


class _Busy:
    """Share of all CPUs' time that was not idle since it was last asked; None over less than 50 ms, a few ticks."""

    def __init__(self) -> None:
        self._at, self._busy, self._all = time.monotonic(), *self._times()

    def __call__(self) -> float | None:
        now = time.monotonic()
        if now - self._at < 0.05:
            return None
        busy, everything = self._times()
        share = (busy - self._busy) / (everything - self._all) if everything > self._all else None
        self._at, self._busy, self._all = now, busy, everything
        return share

    @staticmethod
    def _times() -> tuple[float, float]:
        times = psutil.cpu_times()
        everything = sum(times) - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0)  # guest is in user
        return everything - times.idle - getattr(times, "iowait", 0), everything


def _temperature() -> float | None:
    if not hasattr(psutil, "sensors_temperatures"):
        raise OSError("this system does not report CPU temperatures")
    found = psutil.sensors_temperatures()
    cores = [t.current for chip in ("coretemp", "k10temp", "zenpower", "cpu_thermal") for t in found.get(chip, ())]
    if not cores:
        raise OSError("the kernel reports no CPU temperature (no coretemp or k10temp in hwmon)")
    return max(cores)


def _throttle_counts(cpus: Path) -> Sensor | str:
    """Thermal throttling events of the packages (Intel); one file per package is read."""
    files = {}
    for path in cpus.glob("cpu[0-9]*/thermal_throttle/package_throttle_count"):
        with contextlib.suppress(OSError):
            files[(path.parents[1] / "topology/physical_package_id").read_text()] = path
    if not files:
        return "the kernel counts no thermal throttling of this CPU"
    last: list[int] = []

    def read() -> str:
        counts = [int(path.read_text()) for path in files.values()]
        grown = any(now > before for now, before in zip(counts, last, strict=False))
        last[:] = counts
        return "temperature" if grown else ""

    return Sensor(read)


# The thread ----------------------------------------------------------------------------------------------------------


class Sampler:
    """Appends samples to a file, every `period` seconds and around each trial."""

    def __init__(self, source: Source, path: Path, period: float) -> None:
        self._source, self._path, self._period = source, path, period
        self._readers: dict[str, Callable[[], float | str | None]] = {}
        self._described: dict[str, dict[str, Any] | str] = {}
        self._failures: dict[str, str] = {}
        self._samples = 0
        self._slowest = period
        self._spent = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="zbench-telemetry", daemon=True)

    def __enter__(self) -> Sampler:
        for name in SENSORS:
            sensor = self._source.sensors.get(name, f"{self._source.name} has no such sensor")
            self._described[name] = self._probe(name, sensor)
        self._file = self._path.open("ab+")
        _cut_torn_line(self._file)
        self._began = time.monotonic()
        self._write(
            {
                "schema": SCHEMA_VERSION,
                "began": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "device": self._source.device,
                "source": self._source.name,
                "period": self._period,
                "sensors": self._described,
            }
        )
        if self._readers:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._readers:
            self._thread.join()
        spent = {"cpu_seconds": round(self._spent, 6), "seconds": round(time.monotonic() - self._began, 3)}
        counted = {"samples": self._samples, "period": round(self._slowest, 4), "failures": self._failures}
        self._write({"cost": spent | counted})
        with contextlib.suppress(OSError):  # of what a full disk left in the buffer
            self._file.close()

    @contextmanager
    def window(self, key: Key) -> Iterator[None]:
        start = self._sample(energy_last=True)
        yield
        end = self._sample(energy_last=False)
        self._write({"window": key, "start": start, "end": end})

    def _probe(self, name: str, sensor: Sensor | str) -> dict[str, Any] | str:
        if isinstance(sensor, str):
            return f"unavailable: {sensor}"
        try:
            value = sensor.read()
            if value is None and name != "activity":  # which needs some time between two readings
                return "unavailable: not reported"
            facts = dict(sensor.facts)
            if name == "energy":
                facts["update_seconds"] = _update_seconds(sensor.read)
        except Exception as error:
            return f"unavailable: {reason(error)}"
        self._readers[name] = sensor.read
        return {"unit": SENSORS[name], **facts}

    def _loop(self) -> None:
        due = time.monotonic()
        mean = 0.0
        while not self._stop.is_set():
            began = time.thread_time()
            self._sample()
            took = time.thread_time() - began
            self._spent += took
            mean = took if not mean else 0.9 * mean + 0.1 * took
            pause = max(self._period, mean / SHARE)
            self._slowest = max(self._slowest, pause)
            due = max(due + pause, time.monotonic())
            self._stop.wait(due - time.monotonic())

    def _sample(self, energy_last: bool = False) -> float:
        """Take one; returns its time. `energy_last` puts the reading that counts next to what follows."""
        with self._lock:
            row: dict[str, float | str | None] = {}
            if energy_last:
                self._read_into(row, [name for name in self._readers if name != "energy"])
            at = round(time.monotonic() - self._began, 6)
            if "energy" in self._readers:
                self._read_into(row, ["energy"])
            if not energy_last:
                self._read_into(row, [name for name in self._readers if name != "energy"])
            self._samples += 1
            self._append([at, *(row.get(name) for name in SENSORS)])
            return at

    def _read_into(self, row: dict[str, float | str | None], names: list[str]) -> None:
        for name in names:
            try:
                value = self._readers[name]()
                row[name] = _short(name, value) if isinstance(value, float | int) else value
            except Exception as error:
                self._failures[name] = reason(error)

    def _write(self, line: Any) -> None:
        with self._lock:
            self._append(line)
            with contextlib.suppress(OSError):
                self._file.flush()

    def _append(self, line: Any) -> None:
        # A full disk ends the run where trials are written; sampling must not be what ends it.
        with contextlib.suppress(OSError):
            self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def _short(name: str, value: float) -> float:
    digits = {"W": 2, "J": 6, "Hz": 0, "°C": 1, "B": 0, "1": 4}[SENSORS[name]]
    return round(float(value), digits) if digits else round(value)


def _update_seconds(read: Callable[[], float | str | None], patience: float = 0.4) -> float | None:
    """Mean s between changes of a counter, watched for `patience` s at most; None where it changes less than twice."""
    began = time.monotonic()
    last = read()
    changes: list[float] = []
    while time.monotonic() - began < patience and len(changes) < 5:
        time.sleep(5e-4)
        if (value := read()) != last:
            last = value
            changes.append(time.monotonic())
    return (changes[-1] - changes[0]) / (len(changes) - 1) if len(changes) > 1 else None


def _cut_torn_line(file: Any) -> None:
    """What a crash left of a last line goes, so that the next segment starts on a line of its own."""
    file.seek(0)
    data = file.read()
    file.truncate(data.rfind(b"\n") + 1)
