"""Measured ceilings: what memory and arithmetic really give on this device, with this driver, power cap and threads.

A roof is the best of several implementations, since an engine may use any of them: adding one is one line in
`_read_candidates` or `_product_candidates`. Each figure is the median of its repetitions, with their quartiles.
Beside the roofs stands what the caches give: reading a working set again and again, by its size.

Roofs are kept, but what memory gives drifts on a machine that is shared: `sample_read` measures its read roof again,
in a fraction of a second, beside a run.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
from filelock import FileLock

from zbench.cache import atomic_write, cache_dir
from zbench.errors import UserError
from zbench.hardware.device import Device
from zbench.hardware.environment import cache_bytes, device_facts
from zbench.records import RoofSample

if TYPE_CHECKING:
    from torch import Tensor

METHOD_VERSION = 4  # part of the cache key: bump it when a figure would change
ROUNDS = 3
SAMPLE_SECONDS = 0.08  # of reading in one sample beside a run
TOLERANCE = 0.05  # run-to-run noise by which a measurement may pass a measured roof
DTYPES = ("bfloat16", "float16", "float32", "float8")

_METHOD = (
    "Median of repeated calls, low and high are their quartiles; the best of several implementations, named, and of "
    "three rounds: a machine shared with others is slower now and then, never faster than it can be. "
    "Bandwidth: float32 buffers of at least 4x the last-level cache (1 GiB where that is unknown). "
    "Compute: square products of random matrices, best of a sweep of sizes. "
    "Caches: one working set read again and again; a level's figure is that of half its capacity."
)
_CONVENTIONS = {
    "read": "every byte of one buffer, read once",
    "copy": "a = b: bytes read plus bytes written, without write-allocate",
    "triad": "a = b + s * c: bytes read (two buffers) plus bytes written (one), without write-allocate",
}
# AMD's Infinity Cache sits behind the L2 that torch reports: 256 MiB on CDNA 3 and 4 (ROCm documentation).
_INFINITY_CACHE_BYTES = {"gfx942": 256 * 2**20, "gfx950": 256 * 2**20}
_UNKNOWN_CACHE_BYTES = 2**30  # taken for four times a cache of unknown size
# Long enough for one call to dwarf its launch, and for a cache that the system under-reports.
_SMALLEST_BUFFER_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
_SIZES = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384)}
_SMALLEST_SET_BYTES = {"cpu": 2**14, "cuda": 2**16}
_READ_AGAIN_BYTES = {"cpu": 2**25, "cuda": 2**30}  # in one call, so that it dwarfs its launch
_SWEEP_SECONDS = 0.03  # of one working set in one round
_QUIET_PERCENT = 10
_FEWEST, _MOST = 5, 50  # repetitions: quartiles of fewer mean nothing, more teach nothing

Candidate = tuple[str, Callable[[], object]]


class _Rate(NamedTuple):
    """Work per second of one implementation: median and quartiles of `n` repetitions."""

    value: float
    low: float
    high: float
    n: int


def measure(
    device: Device,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    progress: Callable[[str], None] | None = None,
    budget_seconds: float = 20,
) -> dict[str, Any]:
    """Measure the roofs of `device`, on the CPU threads torch is set to. JSON-able.

    Bandwidths are B/s, `flops` FLOP/s by dtype, `ridge` FLOP/B (a product's rate over the read bandwidth). The
    budget is what the repetitions aim for, not a hard limit: a few calls of each kind are made however slow they are.
    `warning` is a line about a machine that was busy with something else, or None. `caches` is as `measure_caches`
    says, beside the budget.

    Raises:
        UserError: an unknown dtype or one that the device does not multiply, or too little free memory to get past
            the caches.
    """
    if unknown := [d for d in dtypes if d not in DTYPES]:
        raise UserError(f"no roof for dtype {', '.join(unknown)}; choose from {', '.join(DTYPES)}")
    if "float8" in dtypes and _float8(device) is None:
        raise UserError(f"no roof for dtype float8: {device.name} does not multiply it")
    say = progress or (lambda line: None)
    if warning := _disturbance(device):
        say(warning)
    share = budget_seconds / (len(_CONVENTIONS) + len(dtypes)) / ROUNDS
    rounds = []
    for index in range(ROUNDS):
        say(f"roofs of {device.name} ({', '.join([*_CONVENTIONS, *dtypes])}), round {index + 1} of {ROUNDS}")
        rates = {dtype: _product_rate(device, dtype, share) for dtype in dtypes}
        rounds.append((_bandwidths(device, share), rates))
    bandwidth = {kind: max((b[kind] for b, _ in rounds), key=_value) for kind in _CONVENTIONS}
    flops = {dtype: max((f[dtype] for _, f in rounds), key=_value) for dtype in dtypes}
    facts = conditions(device)
    return {
        "device": device.name,
        "key": _digest(facts),
        "conditions": facts,
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "warning": warning,
        "method": _METHOD,
        "bandwidth": bandwidth,
        "flops": flops,
        "ridge": {dtype: rate["value"] / bandwidth["read"]["value"] for dtype, rate in flops.items()},
        "caches": measure_caches(device),
    }


def measure_caches(device: Device) -> dict[str, Any]:
    """Read bandwidth by the size of a working set that is read again and again, about two seconds. JSON-able.

    `sweep` holds a rate for each size, `bytes`. `levels` holds by name, the smallest cache first, the rate of the
    largest size up to half of the `capacity` that all processors (a CPU: the threads in use) have there between them,
    where a smaller cache does not hold it. Where it cannot be measured there is `unavailable` with the reason alone.
    """
    read = _read_again(device)
    if isinstance(read, str):
        return {"unavailable": read}
    capacities = _cache_capacities(device)
    largest = min(2 * max(capacities.values(), default=_SMALLEST_BUFFER_BYTES[device.type]), device.memory_bytes() // 8)
    sizes = [_SMALLEST_SET_BYTES[device.type]]
    while 2 * sizes[-1] <= largest:
        sizes.append(2 * sizes[-1])
    rounds = []
    for _ in range(ROUNDS):
        calls = [read(size, max(size, _READ_AGAIN_BYTES[device.type])) for size in sizes]
        rounds.append([_rate(_times(device, call, _SWEEP_SECONDS), taken) for call, taken in calls])
    sweep = [
        {"bytes": size, **max(rates)._asdict(), "unit": "B/s"}
        for size, rates in zip(sizes, zip(*rounds, strict=True), strict=True)
    ]
    levels, held = {}, 0
    for name, capacity in capacities.items():
        fitting = [rate for rate in sweep if held < rate["bytes"] <= capacity // 2]
        if fitting:
            levels[name] = fitting[-1] | {"capacity": capacity}
        held = capacity
    return {"sweep": sweep, "levels": levels}


def sample_read(device: Device, roof: Mapping[str, Any], seconds: float = SAMPLE_SECONDS) -> RoofSample:
    """Measure a read roof again: as many bytes, by the implementation that gave `roof`, for about `seconds`.

    Its buffer is gone when this returns. What stands in the way of it is said in the sample, never raised.
    """
    began, taken = time.perf_counter(), datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    try:
        with device.apart():
            rate = _read_rate(device, roof, seconds)
    except Exception as error:  # a full GPU, say: nothing that the trials around it should end for
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        return RoofSample(taken, time.perf_counter() - began, unavailable=why)
    return RoofSample(taken, time.perf_counter() - began, **rate._asdict())


def _read_rate(device: Device, roof: Mapping[str, Any], seconds: float) -> _Rate:
    """B/s. Raises UserError where memory is short, or the way in which the roof was read is not there."""
    size, implementation = roof.get("bytes"), roof.get("implementation")
    if not size or not implementation:
        raise UserError("the roof does not say how it was read")
    if 2 * size > (free := device.memory_bytes()):
        raise UserError(f"reading {size / 2**30:.2g} GiB would take more than half of the {free / 2**30:.2g} GiB free")
    buffer = _buffer(device, size)
    call = dict(_read_candidates(device, buffer)).get(implementation)
    if call is None:
        raise UserError(f"{implementation} cannot be used here")
    return _rate(_times(device, call, seconds), buffer.nbytes)


def load_or_measure(
    device: Device,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    refresh: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The roofs under the present conditions: from the cache folder where they cover `dtypes`, else measured and kept.
    Those of a busy moment are measured again in an idle one.

    Two processes at once: the second waits, so that neither disturbs the other's measurement, and reads the first's.

    Raises:
        UserError: as `measure`; or the cache folder cannot be written.
    """
    path = cache_dir() / "roofs" / f"{_digest(conditions(device))}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            kept = _load(path.read_text() if path.exists() else "")
            if kept and not refresh and kept.get("warning") and _disturbance(device) is None:
                refresh = True
                if progress:
                    progress("the roofs that are kept were measured beside other work: again, now that there is none")
            if kept and not refresh and set(dtypes) <= kept["flops"].keys():
                if "caches" in kept:
                    return kept
                roofs = kept | {"caches": measure_caches(device)}  # kept before they were measured
            else:
                wanted = dict.fromkeys([*dtypes, *(kept["flops"] if kept else ())])
                roofs = measure(device, tuple(wanted), progress)
            atomic_write(path, json.dumps(roofs, indent=1))
            return roofs
    except OSError as error:
        raise UserError(
            f"cannot keep roofs in {path.parent}: {error.strerror or error}; set ZBENCH_CACHE to a writable folder"
        ) from error


def usual_dtypes(device: Device) -> tuple[str, ...]:
    """What `zbench roofs` measures unasked: the types that decoding uses on such a device."""
    if device.type == "cpu":
        return ("bfloat16", "float32")
    return ("bfloat16", "float16", "float32", *(["float8"] if _float8(device) else []))


def cached(device: Device) -> dict[str, Any] | None:
    """The roofs kept for the present conditions, or None. Measures nothing."""
    path = cache_dir() / "roofs" / f"{_digest(conditions(device))}.json"
    return _load(path.read_text()) if path.exists() else None


def table(roofs: dict[str, Any]) -> str:
    """The roofs as lines for a person."""
    spread = "{name:10} {value:8.1f} {unit}  ({low:.1f}-{high:.1f}, n={n})  {how}"
    lines = [f"{roofs['device']}, measured {roofs['measured']}"]
    for name, roof in roofs["bandwidth"].items():
        lines.append(_line(spread, name, roof, 1e9, "GB/s", roof["convention"]))
    for name, roof in roofs["flops"].items():
        lines.append(_line(spread, name, roof, 1e9, "GFLOP/s", roof["implementation"]))
    lines += [f"ridge {name}: {value:.1f} FLOP/B" for name, value in roofs["ridge"].items()]
    caches = roofs.get("caches", {})
    for name, level in caches.get("levels", {}).items():
        held = f"{_size(level['bytes'])} read again and again, of {_size(level['capacity'])}"
        lines.append(_line(spread, name, level, 1e9, "GB/s", held))
    if "unavailable" in caches:
        lines.append(f"caches: unavailable: {caches['unavailable']}")
    return "\n".join([*lines, *filter(None, [roofs.get("warning")])])


def _line(form: str, name: str, roof: dict[str, Any], scale: float, unit: str, how: str) -> str:
    numbers = {key: roof[key] / scale for key in ("value", "low", "high")}
    return form.format(name=name, unit=unit, n=roof["n"], how=how, **numbers)


def _size(count: int) -> str:
    """Bytes in the units of caches: "48 KiB"."""
    return f"{count / 2**20:.4g} MiB" if count >= 2**20 else f"{count / 2**10:.4g} KiB"


def conditions(device: Device) -> dict[str, Any]:
    """What a measured roof depends on; roofs are valid only where all of it is equal."""
    import torch

    facts, native = device_facts(device), _native(device)
    kept = ("name", "uuid", "driver", "power_cap_watts", "compute_units", "compute_partition", "memory_partition")
    return (
        {key: facts[key] for key in kept if key in facts}
        | {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu_threads_of_machine": os.cpu_count(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "native_kernels": native.source() if native else None,  # faster ones reach more
            "method_version": METHOD_VERSION,
        }
        | ({} if device.type == "cpu" else {"triton": _triton(device, "stream_read") is not None})
    )


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _load(text: str) -> dict[str, Any] | None:
    """Roofs from their JSON; None for a file that is not that (damaged by hand or by a full disk): measure again."""
    try:
        roofs = json.loads(text)
    except ValueError:
        return None
    return roofs if isinstance(roofs, dict) and isinstance(roofs.get("flops"), dict) else None


def _disturbance(device: Device) -> str | None:
    """Why the roofs may come out low, asked before this process puts load on the CPU itself."""
    if device.type != "cpu":
        return None
    busy = psutil.cpu_percent(interval=0.3)
    if busy <= _QUIET_PERCENT:
        return None
    return f"the CPU is {busy:.0f}% busy with other work: roofs may come out low; measure them again when it is idle"


def _value(rate: dict[str, Any]) -> float:
    return rate["value"]


def _bandwidths(device: Device, share: float) -> dict[str, dict[str, Any]]:
    """Read, copy and triad over the same three buffers; `share` seconds each."""
    import torch

    buffer_bytes = _buffer_bytes(device, _last_level_cache_bytes(device), device.memory_bytes())
    a, b, c = (_buffer(device, buffer_bytes) for _ in range(3))
    candidates: dict[str, list[Candidate]] = {
        "read": _read_candidates(device, b),
        "copy": [("torch copy_", lambda: a.copy_(b))],
        "triad": [("torch add", lambda: torch.add(b, c, alpha=0.5, out=a))],
    }
    if copy := _triton(device, "stream_copy"):
        candidates["copy"].append(("triton copy", lambda: copy(b, a)))
    if triad := _triton(device, "stream_triad"):
        candidates["triad"].append(("triton triad", lambda: triad(b, c, 0.5, a)))
    traffic = {"read": b.nbytes, "copy": 2 * b.nbytes, "triad": 3 * b.nbytes}
    roofs = {}
    for kind, convention in _CONVENTIONS.items():
        rates = _rates(device, candidates[kind], traffic[kind], share)
        implementation = max(rates, key=lambda name: rates[name].value)
        roofs[kind] = rates[implementation]._asdict() | {
            "unit": "B/s", "bytes": traffic[kind], "convention": convention, "implementation": implementation,
        }  # fmt: skip
    return roofs


def _buffer(device: Device, size: int) -> Tensor:
    """`size` bytes of float32, a multiple of 4 MiB, in memory like that of a model's weights: a roof measured on
    smaller pages could be too low for them."""
    import torch

    # Random, since untouched zeros may all be one shared page; repeated, since generating them all takes seconds.
    block = torch.rand(2**20, device=device.torch)
    whole = block.expand(size // block.nbytes, -1)
    native = _native(device)
    return (native.Pages().copy(whole) if native else whole.contiguous()).view(-1)


def _read_candidates(device: Device, buffer: Tensor) -> list[Candidate]:
    """Ways to stream `buffer` (float32, one dimension) through the processor."""
    matrix = buffer.view(-1, 4096)
    vector = buffer[:4096].clone()
    candidates: list[Candidate] = [("torch sum", buffer.sum), ("torch mv", lambda: matrix.mv(vector))]
    if native := _native(device):
        candidates += [
            ("zbench native, 8 streams", lambda: native.read_sum(buffer)),
            ("zbench native, 1 stream", lambda: native.read_sum(buffer, streams=1)),
        ]
    if read := _triton(device, "stream_read"):
        walk = _stream().once(buffer)
        candidates.append(("triton read", lambda: read(buffer, *walk)))
    return candidates


def _read_again(device: Device) -> Callable[[int, int], tuple[Callable[[], object], int]] | str:
    """(bytes of a working set, bytes to read) -> a call that does so, and the bytes it reads; or why there is none."""
    import torch

    def buffer(size: int) -> Tensor:
        return torch.rand(size // 4, device=device.torch)

    if native := _native(device):

        def on_cpu(size: int, wanted: int) -> tuple[Callable[[], object], int]:
            x, passes = buffer(size), -(-wanted // size)
            return lambda: native.read_sum(x, passes), passes * size

        return on_cpu
    if device.type == "cpu":
        return "the native kernels cannot be built here, and calls of torch take longer than small reads"
    if read := _triton(device, "stream_read"):

        def on_gpu(size: int, wanted: int) -> tuple[Callable[[], object], int]:
            x = buffer(size)
            out, stride, steps = _stream().again(x, wanted)
            return lambda: read(x, out, stride, steps), len(out) * steps * _stream().BLOCK * x.itemsize

        return on_gpu
    return f"the Triton kernel that reads cannot be used: {_choice(device, 'stream_read').label}"


def _product_rate(device: Device, dtype: str, share: float) -> dict[str, Any]:
    """The best rate of square products in `dtype`, in about `share` seconds: sizes grow while they fit.

    An implementation at less than half the best rate is dropped before the next size, which has eight times the work:
    bfloat16 without hardware for it can be a hundred times slower than another way to the same product.
    """
    sizes = _SIZES[device.type]
    found: list[tuple[_Rate, str, int]] = []
    contenders: list[str] | None = None
    for size in sizes:
        flops = 2 * size**3
        if contenders and len(contenders) * _FEWEST * flops / max(found)[0].value > share / 2:
            break
        candidates = [c for c in _product_candidates(device, dtype, size) if contenders is None or c[0] in contenders]
        rates = _rates(device, candidates, flops, share / len(sizes))
        found += [(rate, name, size) for name, rate in rates.items()]
        fastest = max(rates.values()).value
        contenders = [name for name, rate in rates.items() if rate.value > fastest / 2]
    rate, implementation, size = max(found)
    return rate._asdict() | {"unit": "FLOP/s", "shape": [size, size, size], "implementation": implementation}


def _product_candidates(device: Device, dtype: str, size: int) -> Iterator[Candidate]:
    """Ways to multiply x [size, size] by a weight [size, size] whose elements are `dtype`."""
    import torch
    from torch.nn.functional import linear

    if dtype == "float8":
        yield from _float8_candidates(device, size)
        return
    # Random data: zeros switch fewer transistors and run faster on a device that is bound by power.
    x, weight = (torch.randn(size, size, device=device.torch).to(getattr(torch, dtype)) for _ in range(2))
    yield "torch matmul", lambda: torch.matmul(x, weight)
    yield "torch linear", lambda: linear(x, weight)
    native = _native(device)
    if native and dtype in ("bfloat16", "float32"):
        packed, rows = native.pack(weight), x.float()
        yield "zbench native linear", lambda: native.linear(rows, packed, size)


def _float8_candidates(device: Device, size: int) -> Iterator[Candidate]:
    """x [size, size] by a weight [size, size], both with one scale, into bfloat16."""
    import torch

    kind = _float8(device)
    assert kind is not None
    x, weight = (torch.randn(size, size, device=device.torch).to(getattr(torch, kind)) for _ in range(2))
    one = torch.ones((), device=device.torch)
    yield (
        f"torch scaled matmul ({kind})",
        lambda: torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
    )


@functools.cache
def _float8(device: Device) -> str | None:
    """The eight-bit type that the device's matrix units multiply, as torch calls it; None where they have none.

    Ada, Hopper and later; CDNA 4 as those, and CDNA 3 a type with other zeros (ROCm documentation).
    """
    if device.type == "cpu":
        return None
    import torch

    properties = torch.cuda.get_device_properties(device.torch)
    if device.backend == "rocm":
        architecture = properties.gcnArchName.split(":")[0]
        return {"gfx942": "float8_e4m3fnuz", "gfx950": "float8_e4m3fn"}.get(architecture)
    return "float8_e4m3fn" if (properties.major, properties.minor) >= (8, 9) else None


def _native(device: Device) -> ModuleType | None:
    """The native CPU kernels, where they can be built: what an engine may run, the roof has to include."""
    if device.type != "cpu":
        return None
    native = importlib.import_module("zbench.kernels.cpu")
    return native if native.available() else None


def _choice(device: Device, operator: str) -> Any:
    return importlib.import_module("zbench.kernels.registry").choose(operator, device.torch)


def _triton(device: Device, operator: str) -> Callable[..., object] | None:
    """The Triton kernel of an operator, on a device where it does what its reference does."""
    choice = _choice(device, operator)
    return choice.call if choice.label == "triton" else None


def _stream() -> ModuleType:
    return importlib.import_module("zbench.kernels.stream")


def _rates(device: Device, candidates: Sequence[Candidate], work: float, seconds: float) -> dict[str, _Rate]:
    """Rate by implementation; they share `seconds`."""
    return {name: _rate(_times(device, call, seconds / len(candidates)), work) for name, call in candidates}


def _times(device: Device, call: Callable[[], object], seconds: float) -> list[float]:
    """Durations of repeated calls, s: as many as fit into `seconds`, within `_FEWEST` and `_MOST`."""
    call()  # first calls load libraries, choose algorithms and touch pages
    start = device.mark()
    call()
    end = device.mark()
    device.synchronize()
    repetitions = int(max(_FEWEST, min(_MOST, seconds / device.seconds(start, end))))
    marks = [device.mark()]
    for _ in range(repetitions):
        call()
        marks.append(device.mark())
    device.synchronize()
    return [device.seconds(a, b) for a, b in pairwise(marks)]


def _rate(times: Sequence[float], work: float) -> _Rate:
    fast, median, slow = statistics.quantiles(times, n=4, method="inclusive")
    return _Rate(value=work / median, low=work / slow, high=work / fast, n=len(times))


def past_cache_bytes(device: Device) -> int:
    """How much has to be gone through before the last-level cache holds none of it: four times its size."""
    cache = _last_level_cache_bytes(device)
    return _UNKNOWN_CACHE_BYTES if cache is None else 4 * cache


@functools.cache
def _last_level_cache_bytes(device: Device) -> int | None:
    """Bytes a buffer must dwarf; None where the system does not tell."""
    if device.type == "cpu":
        caches = cache_bytes()
        return caches[max(caches)] if caches else None
    import torch

    properties = torch.cuda.get_device_properties(device.torch)
    architecture = getattr(properties, "gcnArchName", "").split(":")[0]
    return max(properties.L2_cache_size, _INFINITY_CACHE_BYTES.get(architecture, 0))


def _cache_capacities(device: Device) -> dict[str, int]:
    """Bytes by level, the smallest first, that hold a set which all processors read; empty where that is not known.

    Of a CPU the share of the threads in use; its threads read a part each, so that their own caches add up. Every
    processor of a GPU reads the whole set.
    """
    if device.type == "cpu":
        import torch

        share = min(1.0, torch.get_num_threads() / (os.cpu_count() or 1))
        found = {name: int(size * share) for name, size in cache_bytes().items() if name in ("L1d", "L2", "L3")}
        return dict(sorted(found.items()))
    import torch

    properties = torch.cuda.get_device_properties(device.torch)
    found = {"L2": properties.L2_cache_size}
    if device.backend == "cuda":  # one memory serves as cache and as shared memory
        found = {"L1": properties.shared_memory_per_multiprocessor} | found
    architecture = getattr(properties, "gcnArchName", "").split(":")[0]
    if behind := _INFINITY_CACHE_BYTES.get(architecture):
        found["Infinity Cache"] = behind
    return found


def _buffer_bytes(device: Device, cache: int | None, free: int) -> int:
    """Size of one of three buffers: at least 4x the cache (1 GiB where it is unknown), a multiple of 4 MiB.

    Raises:
        UserError: the three would take more than half of the free memory.
    """
    unit = 4 * 2**20  # whole rows of the matrix-vector product, whole repeats of the random block
    least = -(-(_UNKNOWN_CACHE_BYTES if cache is None else 4 * cache) // unit) * unit
    affordable = free // 6 // unit * unit
    if affordable < least:
        raise UserError(
            f"measuring the roofs of {device} takes {6 * least / 2**30:.1f} GiB of free memory, there are "
            f"{free / 2**30:.1f}; free some, or run without roofs"
        )
    return min(max(least, _SMALLEST_BUFFER_BYTES[device.type]), affordable)
