"""What else could change a result: code, packages, clocks, caps, threads. A nested dict, ready for the manifest.

What cannot be read is the string "unavailable: <why>", never an absence or a zero. Environment variables are not
stored, arguments that look like credentials are masked, and the host's name is kept only as a hash.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import zbench
from zbench.hardware.device import cpu_info

if TYPE_CHECKING:
    from zbench.hardware.device import Device

_PACKAGES = (
    "torch", "triton", "pytorch-triton-rocm", "transformers", "tokenizers", "safetensors", "huggingface_hub", "gguf",
    "numpy", "scipy", "pandas", "nvidia-ml-py", "amdsmi",
)  # fmt: skip
# Flags that decide which CPU kernels run, under the names Linux gives them.
_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")  # of /proc/stat; guests are part of user and nice
_SYSFS_CPU = Path("/sys/devices/system/cpu")
# The last word of an option's name; `output_tokens` is not one.
_CREDENTIAL = re.compile(r"(^|[^a-z])(api_?key|key|token|secret|password|passwd|credentials?|authorization)$", re.I)
# Keys under which `identity` collects what two halves of one run must share.
_IDENTITY = {
    "zbench": ("version", "commit", "dirty", "source"),
    "python": ("version",),
    "packages": _PACKAGES,
    "torch": ("version", "cuda", "hip", "threads", "float32_matmul_precision"),
    "device": ("backend", "name", "uuid", "driver", "power_cap_watts", "compute_partition", "memory_partition"),
    "cpu": ("model", "physical_cores", "usable_threads", "flags", "governor"),
}


def snapshot(device: Device, threads: int | None = None) -> dict[str, Any]:
    """Everything known about this process and machine; takes about half a second, so call it once per run.

    `threads` are the CPU threads that the run will use; None means those torch is set to now.
    """
    torch = _torch(threads)
    return {
        "zbench": _zbench(),
        "command": _command(sys.argv),
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "packages": {name: _read(functools.partial(importlib.metadata.version, name)) for name in _PACKAGES}
        | {"torch": torch["version"]},  # which says what it was built for; metadata may not
        "torch": torch,
        "device": device_facts(device),
        "cpu": _cpu(),
        "memory": {"total_bytes": psutil.virtual_memory().total, "available_bytes": psutil.virtual_memory().available},
        "system": _system(),
    }


def identity(taken: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for two halves of one run to be mixed, flat: {"torch.version": ..., "cpu.model": ...}."""
    return {
        f"{section}.{key}": taken[section][key]
        for section, keys in _IDENTITY.items()
        for key in keys
        if key in taken.get(section, {})
    }


def identity_hash(taken: dict[str, Any]) -> str:
    """16 hexadecimal digits that are equal exactly when the identities are."""
    return hashlib.sha256(json.dumps(identity(taken), sort_keys=True).encode()).hexdigest()[:16]


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line per part of the identity that changed, for the message that refuses to mix the two."""
    old, new = identity(before), identity(now)
    return [
        f"{key}: was {old.get(key, 'not recorded')}, is {new.get(key, 'not recorded')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def device_facts(device: Device) -> dict[str, Any]:
    """What identifies the device and caps its speed: name, uuid, driver, power cap, clocks, partition."""
    facts: dict[str, Any] = {"id": str(device), "type": device.type, "backend": device.backend, "name": device.name}
    if device.type == "cpu":
        reason = "unavailable: a CPU has none"
        return facts | {"uuid": reason, "driver": reason, "power_cap_watts": reason}
    import torch

    properties = torch.cuda.get_device_properties(device.torch)
    facts |= {"memory_bytes": properties.total_memory, "compute_units": properties.multi_processor_count}
    return facts | (_amd_facts(properties) if device.backend == "rocm" else _nvidia_facts(properties))


def others_seconds() -> float | None:
    """A clock of the CPU time that other processes, and a hypervisor for other machines, take on the CPUs that this
    process may use; only differences mean something. In ticks of 10 ms on most systems; None where it is not known."""
    try:
        every = psutil.cpu_times(percpu=True)
        mine = psutil.Process().cpu_affinity()
        busy = sum(sum(getattr(every[cpu], name) for name in _BUSY) for cpu in mine)
    except (AttributeError, OSError, IndexError, psutil.Error):  # no Linux, or CPUs that the kernel does not list
        return None
    return float(busy) - time.process_time()


def cache_bytes() -> dict[str, int]:
    """CPU caches in bytes, {"L1d": ..., "L2": ..., "L3": ...}, each summed over the machine; empty without sysfs."""
    sizes: dict[tuple[str, str, str], int] = {}
    for index in sorted(_SYSFS_CPU.glob("cpu[0-9]*/cache/index[0-9]*")):
        with contextlib.suppress(OSError, ValueError):
            level, kind, shared, size = (
                (index / f).read_text().strip() for f in ("level", "type", "shared_cpu_map", "size")
            )
            suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
            sizes[(f"L{level}{suffix}", kind, shared)] = _size(size)
    totals: dict[str, int] = {}
    for (name, _, _), size_bytes in sizes.items():
        totals[name] = totals.get(name, 0) + size_bytes
    return totals


def _size(text: str) -> int:
    """sysfs writes cache sizes as "32768K"."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


def _zbench() -> dict[str, Any]:
    package = Path(zbench.__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10)
        if done.returncode:
            raise RuntimeError(done.stderr.strip() or f"git {arguments[0]} failed")
        return done.stdout.strip()

    def tracked(*arguments: str) -> str:
        # A package installed inside somebody else's repository must not report that repository's commit.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git(*arguments)

    return {
        "version": zbench.__version__,
        "commit": _read(lambda: tracked("rev-parse", "HEAD")),
        "dirty": _read(lambda: bool(tracked("status", "--porcelain", "--", "."))),
        "source": _source_hash(package),
    }


def _source_hash(package: Path) -> str:
    """Hash of the installed package's files: tells two dirty checkouts apart, and works without git."""
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in {".py", ".cpp", ".h", ".yaml"}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _command(arguments: Sequence[str]) -> str:
    """The command line as one could type it, credentials in options and URLs masked."""
    shown = [Path(arguments[0]).name] if arguments else []
    masked = False
    for argument in arguments[1:]:
        name, equals, _ = argument.partition("=")
        if masked:
            argument = "***"
        elif equals and _CREDENTIAL.search(name):
            argument = f"{name}=***"
        masked = not equals and not masked and name.startswith("-") and _CREDENTIAL.search(name) is not None
        shown.append(re.sub(r"(?<=://)[^/@\s]+@", "***@", argument))
    return shlex.join(shown)


def _torch(threads: int | None) -> dict[str, Any]:
    import torch

    none = "unavailable: torch was built without it"
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda or none,
        "hip": torch.version.hip or none,
        "git": torch.version.git_version,
        "threads": torch.get_num_threads() if threads is None else threads,
        "interop_threads": torch.get_num_interop_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "build": torch.__config__.show().partition("  - Build settings")[0].rstrip(),
    }


def _cpu() -> dict[str, Any]:
    info = cpu_info()
    present = info.get("flags")
    return {
        "model": info.get("brand_raw") or "unavailable: the system does not name its CPU",
        "architecture": platform.machine(),
        "physical_cores": _read(lambda: psutil.cpu_count(logical=False)),
        "logical_cores": _read(lambda: psutil.cpu_count()),
        "cgroup_quota": _read(lambda: Path("/sys/fs/cgroup/cpu.max").read_text().strip()),
        "usable_threads": _read(lambda: len(psutil.Process().cpu_affinity())),
        "flags": [flag for flag in _CPU_FLAGS if flag in present]
        if present
        else "unavailable: the system lists no CPU flags",
        "mhz": _read(lambda: psutil.cpu_freq().current),
        "max_mhz": _read(lambda: psutil.cpu_freq().max or None),
        "governor": _read(lambda: (_SYSFS_CPU / "cpu0/cpufreq/scaling_governor").read_text().strip()),
        "cache_bytes": cache_bytes() or f"unavailable: {_SYSFS_CPU} describes no caches",
        "load_average": _read(lambda: list(os.getloadavg())),
    }


def _system() -> dict[str, Any]:
    return {
        "os": platform.system(),
        "kernel": platform.release(),
        "distribution": _read(lambda: platform.freedesktop_os_release()["PRETTY_NAME"]),
        "host": hashlib.sha256(socket.gethostname().encode()).hexdigest()[:16],
        "container": _container(),
        "hypervisor": "present" if "hypervisor" in cpu_info().get("flags", ()) else "no sign of one",
        "transparent_hugepages": _read(
            lambda: re.findall(r"\[(\w+)\]", Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())[0]
        ),
    }


def _container() -> str:
    signs = {"docker": "/.dockerenv", "podman": "/run/.containerenv", "kubernetes": "/var/run/secrets/kubernetes.io"}
    found = [name for name, path in signs.items() if Path(path).exists()]
    return ", ".join(found) or "no sign of one"


def _nvidia_facts(properties: Any) -> dict[str, Any]:
    import pynvml as nvml

    def gpu() -> Any:
        nvml.nvmlInit()
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")

    # An initialised NVML stays so until the process ends: others in the process may be using it.
    return {
        "uuid": _read(lambda: f"GPU-{properties.uuid}"),
        "driver": _read(lambda: (gpu(), nvml.nvmlSystemGetDriverVersion())[1]),
        "power_cap_watts": _read(lambda: nvml.nvmlDeviceGetPowerManagementLimit(gpu()) / 1e3),
        "sm_mhz": _read(lambda: nvml.nvmlDeviceGetClockInfo(gpu(), nvml.NVML_CLOCK_SM)),
        "max_sm_mhz": _read(lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu(), nvml.NVML_CLOCK_SM)),
        "memory_mhz": _read(lambda: nvml.nvmlDeviceGetClockInfo(gpu(), nvml.NVML_CLOCK_MEM)),
        "mig": _read(lambda: bool(nvml.nvmlDeviceGetMigMode(gpu())[0])),
    }


def _amd_facts(properties: Any) -> dict[str, Any]:
    # HIP's order is not amdsmi's (HIP_VISIBLE_DEVICES, partitions), so the PCI address finds the device.
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"

    def ask(question: Callable[[Any, Any], Any]) -> Any:
        # amdsmi prints to stdout where its library is missing; stdout is for results.
        with contextlib.redirect_stdout(io.StringIO()):
            smi, gpu = _amdsmi_handle(address)
            return question(smi, gpu)

    return {
        "architecture": properties.gcnArchName,
        "uuid": _read(lambda: ask(lambda smi, gpu: smi.amdsmi_get_gpu_device_uuid(gpu))),
        "driver": _read(lambda: ask(lambda smi, gpu: smi.amdsmi_get_gpu_driver_info(gpu)["driver_version"])),
        "power_cap_watts": _read(lambda: ask(lambda smi, gpu: smi.amdsmi_get_power_cap_info(gpu)["power_cap"] / 1e6)),
        "gfx_mhz": _read(lambda: ask(lambda smi, gpu: smi.amdsmi_get_clock_info(gpu, smi.AmdSmiClkType.GFX)["clk"])),
        "max_gfx_mhz": _read(
            lambda: ask(lambda smi, gpu: smi.amdsmi_get_clock_info(gpu, smi.AmdSmiClkType.GFX)["max_clk"])
        ),
        "memory_mhz": _read(lambda: ask(lambda smi, gpu: smi.amdsmi_get_clock_info(gpu, smi.AmdSmiClkType.MEM)["clk"])),
        "compute_partition": _read(lambda: ask(lambda smi, gpu: smi.amdsmi_get_gpu_compute_partition(gpu))),
        "memory_partition": _read(lambda: ask(lambda smi, gpu: smi.amdsmi_get_gpu_memory_partition(gpu))),
    }


@functools.lru_cache
def _amdsmi_handle(address: str) -> tuple[Any, Any]:
    import amdsmi

    amdsmi.amdsmi_init()
    return amdsmi, amdsmi.amdsmi_get_processor_handle_from_bdf(address)


def _read(ask: Callable[[], Any]) -> Any:
    """The answer, or "unavailable: why". Vendor libraries raise what they like, KeyError at import included."""
    try:
        answer = ask()
    except Exception as error:
        return f"unavailable: {next(iter(str(error).strip().splitlines()), '') or type(error).__name__}"
    return "unavailable: not reported" if answer in (None, "", "N/A") else answer
