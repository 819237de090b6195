"""Where a decode step goes: time per operator with FLOPs, bytes and share of the roof, a Chrome trace, and counts.

The same steps are decoded up to three times: plainly, for what a step takes; under torch's profiler, with the native
decoder timing its own sections, which torch does not see; and on torch operators alone under `FlopCounterMode` and the
profiler, to count FLOPs and bytes once more, on another way than `models/cost.py` does.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profiler

from zbench import engines, run, scenario, trace
from zbench.cache import atomic_write
from zbench.engines.base import Engine, Meter, Output, State, Stepper, commit
from zbench.errors import UserError
from zbench.hardware import counters as hardware
from zbench.hardware import roofs, specs
from zbench.hardware.device import Device
from zbench.kernels import cpu, registry
from zbench.models.cost import attended
from zbench.models.drafters import DFlashConfig, Eagle3Config
from zbench.models.model import Model
from zbench.records import CellRecord, ForwardRecord
from zbench.trace import Operator

PROFILE, TRACE = "profile.json", "trace.json"
SCHEMA_VERSION = 1
WARM = 2  # steps before those that count
COUNTED = 2  # steps that are counted on torch operators, which is slow
GAIN = 34  # tokens that a step of a drafting engine may gain at most: the largest block of masks and its bonus
DISAGREEMENT = 0.10  # of a count from the analytic one, beyond which it is flagged
STEP = "zbench step"
ABOVE = "*"  # beside a share of more than the whole roof


@dataclass(frozen=True, slots=True)
class Count:
    """One quantity of a decode step, counted on different ways; None with a reason where a way is not open."""

    what: str
    unit: str
    analytic: float
    counted: float | None
    measured: float | None
    why_not: dict[str, str]

    @property
    def disagreement(self) -> float | None:
        """The largest relative difference from the analytic count."""
        others = [value for value in (self.counted, self.measured) if value is not None]
        return max((abs(value / self.analytic - 1) for value in others), default=None)

    @property
    def flagged(self) -> bool:
        return (self.disagreement or 0) > DISAGREEMENT


class _Spans(Meter):
    """A meter that also names steps, forwards and phases in the trace."""

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        with record_function(STEP), super().step():
            yield

    @contextlib.contextmanager
    def phase(self, name: Literal["accept", "commit"]) -> Iterator[None]:
        with record_function(name), super().phase(name):
            yield

    def forward(self, model: Model, role: Any, rows: Any, *arguments: Any, **options: Any) -> Output:
        with record_function(f"{role}, {rows.ids.shape[1]} rows"):
            return super().forward(model, role, rows, *arguments, **options)


class _Ranges(Meter):
    """A meter whose steps are ranges to the vendor's profilers (NVTX, ROCTX)."""

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        ranged = torch.cuda.nvtx.range(STEP) if self.device.type == "cuda" else contextlib.nullcontext()
        with ranged, super().step():
            yield


class _TorchOnly(engines.Shared):
    """Everything on torch operators, which are what can be counted."""

    def target(self, execution: str) -> Model:
        return super().target("eager")


def profile(
    wanted: scenario.Scenario,
    engine: str | None,
    steps: int,
    folder: Path,
    say: Callable[[str], None],
    files: Sequence[Path] = (),
) -> dict[str, Any]:
    """Profile one engine at the scenario's first point; write `profile.json` and `trace.json` into the folder.

    `files` are what `ncu` or `rocprofv3` counted while this very profile ran under them before.

    Raises UserError where the engine is not in the scenario, or cannot be taken step by step, or `files` do not fit.
    """
    counted = hardware.read(files, steps, STEP) if files else None
    at, cells = scenario.points(wanted)[0]
    cell = _chosen(cells, engine)
    (point,) = run.prepare(_with_engine(at, cell.label), say)
    built, device = _built(point, cell, steps), point.device
    say(f"decoding {steps} steps of {cell.label} plainly")
    plain, gpm = _Ranges(device), _gpm(device)
    _decode(point, cell, built, plain, steps, gpm.watching if isinstance(gpm, hardware.Gpm) else contextlib.nullcontext)
    measured_by = counted or (gpm.measured if isinstance(gpm, hardware.Gpm) else None)
    say("decoding them under the profiler")
    spans = _Spans(device)
    profiled = _Profiled(device)
    _decode(point, cell, built, spans, steps, profiled.running)
    say(f"counting {COUNTED} steps on torch operators")
    forwards = plain.records()[1]
    counts = [_with_measured(c, measured_by, steps, forwards) for c in _counts(point, cell)]
    measured = roofs.load_or_measure(device, (at.dtype,), progress=say)
    content = profiled.write(folder / TRACE)
    found = _operators(content, profiled.native, counted.timed if counted else ())
    launches = trace.launches(content, within=STEP)
    timed = bool(counted and counted.timed)
    prompt_tokens = [len(ids) for _, ids in point.batches[0]]
    record = _record(plain, spans, None if timed else found, steps)
    result = {
        "schema": SCHEMA_VERSION,
        "scenario": wanted.name,
        "engine": cell.label,
        "point": cell.point,
        "model": cell.model,
        "dtype": at.dtype,
        "device": device.name,
        "batch": len(prompt_tokens),
        "prompt_tokens": prompt_tokens,
        "kernels": built.kernels,
        "steps": steps,
        **record,
        "roofs": {"bandwidth": measured["bandwidth"]["read"], "flops": measured["flops"].get(at.dtype)},
        "operators": [_row(operator, steps, measured, at.dtype) for operator in found],
        "counts": [asdict(c) | {"disagreement": c.disagreement, "flagged": c.flagged} for c in counts],
        "counters": counters(device, gpm, counted),
        "kernel_launches_per_step": launches / steps if launches else None,
        "tensor_activity": measured_by.tensor_activity if measured_by else None,
        "notes": _notes(profiled.native, device, found, timed),
    }
    atomic_write(folder / PROFILE, json.dumps(result, indent=1, allow_nan=False))
    return result


def _chosen(cells: Sequence[CellRecord], engine: str | None) -> CellRecord:
    if engine is None:
        return next((cell for cell in cells if cell.baseline), cells[0])
    for name in ("label", "id", "engine"):
        for cell in cells:
            if getattr(cell, name) == engine:
                return cell
    raise UserError(f"no engine {engine!r} in the scenario; it has {', '.join(cell.label for cell in cells)}")


def _with_engine(at: scenario.Scenario, label: str) -> scenario.Scenario:
    """The scenario with that engine alone, so that nothing else is checked or loaded."""
    return at.model_copy(
        update={"engines": tuple(e for e in at.engines if e.title == label), "baseline": None, "matrix": {}}
    )


def _built(point: run.Point, cell: CellRecord, steps: int) -> Engine:
    """The engine. Raises UserError where it cannot be taken step by step, or so many steps may not fit."""
    point.shared.why_no_graphs = "within a graph no kernel belongs to an operator"
    built = engines.create(cell.engine, cell.options, point.shared)
    if not (hasattr(built, "start") and hasattr(built, "step")):
        raise UserError(f"{cell.label} decodes in a loop that is not zbench’s, which cannot be taken step by step")
    longest, most = max(len(ids) for _, ids in point.batches[0]), point.shared.model.config.max_positions
    if longest + (1 + WARM + steps) * _gain(cell) > most:
        raise UserError(f"{steps} steps after {longest} tokens may exceed the model’s {most}: fewer --steps")
    return built


def _gain(cell: CellRecord) -> int:
    """Tokens that a step may gain at most."""
    return 1 if cell.engine == "autoregressive" else GAIN


def _decode(
    point: run.Point, cell: CellRecord, engine: Engine, meter: Meter, count: int, around: Callable[[], Any]
) -> None:
    """Decode the first batch: a few steps to warm up, then, within `around`, `count` on that meter."""
    device, prompts = point.device, [ids for _, ids in point.batches[0]]
    limit = (2 + WARM + count) * _gain(cell)
    request = replace(run.request_of(point, [0] * len(prompts), limit), eos_ids=frozenset())
    stepper = cast("Stepper[State]", engine)
    finish: list[Any] = ["length"] * len(prompts)
    warm = Meter(device)
    with warm.step():
        state = stepper.start(prompts, request, warm)
        commit([[token] for token in state.last.tolist()], state.outputs, state.active, request, finish)

    def one(used: Meter) -> None:
        with used.step():
            step = stepper.step(state, used)
            gained = commit(step.tokens, state.outputs, state.active, request, finish)
            used.gained(gained, step.drafted, step.accepted)

    for _ in range(WARM):
        one(warm)
    device.synchronize()
    with around():
        for _ in range(count):
            one(meter)
        device.synchronize()


class _Profiled:
    """Torch's profiler and the native decoder's own clock around the same steps."""

    def __init__(self, device: Device) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profiler = torch_profiler(activities=activities, record_shapes=True, acc_events=True)
        self._mark = f"{STEP} clock"
        self._clock = 0
        self.native: list[cpu.Timed] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self._profiler, cpu.recording() as native:
            with record_function(self._mark):
                self._clock = time.perf_counter_ns()
            yield
        self.native = native

    def write(self, path: Path) -> dict[str, Any]:
        """The Chrome trace, native sections included, which have a track of their own; also as read back."""
        with tempfile.TemporaryDirectory(dir=path.parent) as made:
            exported = Path(made) / path.name
            self._profiler.export_chrome_trace(str(exported))
            if not exported.exists():  # torch raises nothing, and leaves a part under another name
                raise OSError(errno.ENOSPC, "torch could not write its trace; is the disk full?")
            content = json.loads(exported.read_text())
        events = content["traceEvents"]
        mark = next(e for e in events if e.get("cat") == "user_annotation" and e["name"] == self._mark)
        track = {"pid": mark["pid"], "tid": "native decoder"}
        for call in self.native:
            for name, start, end in call.spans():
                span = {"ts": mark["ts"] + (start - self._clock) / 1e3, "dur": (end - start) / 1e3}
                events.append({"ph": "X", "cat": "native", "name": name, **track, **span})
        atomic_write(path, json.dumps(content))
        return content


def _operators(
    content: dict[str, Any], native: Sequence[cpu.Timed], timed: Sequence[hardware.Timed] = ()
) -> list[Operator]:
    """Native sections and torch's operators within the steps; the device's kernels instead, where there are any:
    those that were `timed` beside counters, else those of the trace."""
    if timed:
        return [Operator(k.kernel, "kernel", k.launches, k.seconds, None, k.bytes) for k in timed]
    seen = trace.operators(content, within=STEP)
    kernels = [operator for operator in seen if operator.kind == "kernel"]
    return trace.gathered([*(kernels or seen), *(o for call in native for o in sections(call))])


def sections(call: cpu.Timed) -> list[Operator]:
    """The sections of one native call, with FLOPs and bytes as `models/cost.py` counts them: activations stay in cache,
    so a norm has none."""
    work: dict[str, tuple[float | None, float | None]] = {}
    m, size = call.rows, call.itemsize
    if call.shape:
        n, k = call.shape
        work["projection"] = 2.0 * m * n * k, float(n * k * size + m * n * 4)
    elif call.config:
        eagle3, dflash = (isinstance(call.config, kind) for kind in (Eagle3Config, DFlashConfig))
        c = call.config.layer if eagle3 else call.config.body if dflash else call.config
        vocab, inputs = (call.config.draft_vocab, 2 * c.width) if eagle3 else (c.vocab, c.width)
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        rows = m // len(call.contexts)
        each = call.pairs / len(call.contexts)
        read, seen = (n / c.layers for n in attended(c.windows or (None,) * c.layers, rows, call.contexts, each))
        work = {
            "embed": (0.0, float(m * c.width * size)),
            "qkv": _projection(m, inputs, q + 2 * kv, size),
            "rotate and store": (0.0, float(2 * m * kv * size)),
            "attention": (4.0 * q * seen, float(2 * kv * size * read)),  # of a mean layer
            "out": _projection(m, q, c.width, size),
            "gate_up": _projection(m, c.width, 2 * c.ffn, size),
            "down": _projection(m, c.ffn, c.width, size),
            "head": (
                2.0 * call.wanted * c.width * vocab,
                float(vocab * (c.width * size + 4 * call.wanted)) if call.wanted else 0.0,
            ),
        }
        if eagle3:
            work["fuse"] = _projection(m, len(call.config.taps) * call.config.target_width, c.width, size)
        if dflash:
            work["fuse"] = _projection(call.read, len(call.config.taps) * c.width, c.width, size)
            work["context kv"] = _projection(call.read, c.width, 2 * kv * c.layers, size)
            work["context rotate and store"] = (0.0, float(2 * call.read * kv * c.layers * size))
        if eagle3 or dflash:
            work = {f"draft {name}": value for name, value in work.items()}
    return [
        Operator(name, "native", 1, (end - start) / 1e9, *work.get(name, (None, None)))
        for name, start, end in call.spans()
    ]


def _projection(rows: int, inputs: int, outputs: int, size: int) -> tuple[float, float]:
    return 2.0 * rows * inputs * outputs, float(inputs * outputs * size)


def _record(plain: Meter, spans: Meter, found: Sequence[Operator] | None, steps: int) -> dict[str, Any]:
    """What a step takes with and without the profiler, its phases, and how much of it the operators explain: nothing
    can be said where none of them were timed in these steps (None)."""
    (bare, _), (watched, forwards) = plain.records(), spans.records()
    seconds = np.array([step.seconds for step in watched])
    phases: dict[str, float] = {}
    for forward in forwards:
        phases[forward.role] = phases.get(forward.role, 0.0) + forward.seconds / steps
    phases["accept"] = sum(step.accept_seconds for step in watched) / steps
    phases["commit"] = sum(step.commit_seconds for step in watched) / steps
    phases["host gap"] = float(seconds.mean()) - sum(phases.values())
    here = found is not None and not _untimed(found)
    explained = sum(operator.seconds for operator in found or ()) / float(seconds.sum()) if here else None
    return {
        "step_seconds": _spread([step.seconds for step in bare]),
        "profiled_step_seconds": _spread(seconds),
        "phases_seconds_per_step": phases,
        "explained": explained,
    }


def _untimed(found: Sequence[Operator]) -> bool:
    """Kernels were seen, and none has a time: some virtual machines give the profiler none."""
    return any(o.kind == "kernel" for o in found) and not any(o.seconds for o in found)


def _spread(seconds: Any) -> dict[str, float | int]:
    low, middle, high = (float(v) for v in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return {
        "median": middle,
        "quarter": low,
        "three_quarters": high,
        "mean": float(np.mean(seconds)),
        "n": len(seconds),
    }


def _row(operator: Operator, steps: int, measured: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Per step. `of_roof` is what memory or arithmetic alone would need at the measured roofs, over the time."""
    bandwidth = measured["bandwidth"]["read"]["value"]
    rate = measured["flops"].get(dtype)
    of_roof, bound = None, None
    if operator.flops is not None and operator.bytes is not None and rate and (operator.flops or operator.bytes):
        memory, compute = operator.bytes / bandwidth, operator.flops / rate["value"]
        bound = "memory" if memory >= compute else "compute"
        of_roof = max(memory, compute) / operator.seconds if operator.seconds else None
    per_step = {
        key: None if v is None else v / steps for key, v in asdict(operator).items() if key not in ("name", "kind")
    }
    if operator.kind == "kernel" and not operator.seconds:
        per_step["seconds"] = None
    return {"name": operator.name, "kind": operator.kind, **per_step, "of_roof": of_roof, "roof": bound}


def _counts(point: run.Point, cell: CellRecord) -> list[Count]:
    """FLOPs and bytes of a step: analytic, and counted on torch's operators; per step, over the same steps."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    device = point.device
    shared = _TorchOnly(point.shared.model, point.shared.dtype, device, point.shared.allow_pickle)
    counter = FlopCounterMode(display=False)
    native: list[cpu.Timed] = []

    @contextlib.contextmanager
    def counting() -> Iterator[None]:
        # The counter knows no fused attention on a CPU (pytorch issue 195460) and would say 0.
        with sdpa_kernel(SDPBackend.MATH), counter, cpu.recording() as called:
            yield
        native.extend(called)

    first, second = Meter(device), _Spans(device)
    profiled = _Profiled(device)
    with registry.references():
        built = engines.create(cell.engine, cell.options, shared)
        _decode(point, cell, built, first, COUNTED, counting)
        _decode(point, cell, built, second, COUNTED, profiled.running)
    shared.release()
    # A drafter stays native on a CPU, out of sight of both: its shapes are known.
    counted = counter.get_total_flops() + sum(o.flops or 0 for call in native for o in sections(call))
    forwards, again = first.records()[1], second.records()[1]
    moved = _moved(profiled)
    unread = {"measured": "no hardware counter was read, see below"}
    pairs = (
        ("FLOPs", "FLOP/step", sum(f.flops for f in forwards), counted),
        ("bytes", "B/step", sum(f.bytes_read + f.bytes_written for f in again), moved),
    )
    return [Count(what, unit, one / COUNTED, other / COUNTED, None, unread) for what, unit, one, other in pairs]


def _moved(profiled: _Profiled) -> float:
    """Bytes of the operands and results of all products and attentions: weights, cache, and their activations."""
    with tempfile.TemporaryDirectory() as folder:
        seen = trace.operators(profiled.write(Path(folder) / TRACE), within=STEP)
    seen = [operator for operator in seen if operator.kind == "torch"]
    found = [*seen, *(o for call in profiled.native for o in sections(call))]
    return sum(o.bytes for o in found if o.flops and o.bytes)


def _with_measured(
    count: Count, measured: hardware.Measured | None, steps: int, forwards: Sequence[ForwardRecord]
) -> Count:
    """The count with what the hardware counted per step. Contexts grow, and the other counts are of steps of their own:
    what was measured is scaled by the analytic counts of both."""
    if measured is None:
        return count
    flops = count.what == "FLOPs"
    value, why = (measured.flops, "flops") if flops else (measured.bytes, "bytes")
    if value is None:
        return replace(count, why_not={"measured": f"{measured.source}: {measured.why_not[why]}"})
    there = sum(f.flops if flops else f.bytes_read + f.bytes_written for f in forwards) / steps
    return replace(count, measured=value / steps * count.analytic / there, why_not={})


def counters(device: Device, gpm: hardware.Gpm | str, given: hardware.Measured | None = None) -> list[dict[str, str]]:
    """What could measure bytes and FLOPs, and what came of it."""
    if device.type == "cpu":
        folder = Path("/sys/bus/event_source/devices")
        found = [p.name for p in folder.glob("*") if p.name.startswith(("uncore_imc", "amd_df", "amd_umc"))]
        why = f"unavailable: {folder} has no memory controller (uncore_imc, amd_umc), usual in virtual machines"
        unread = f"here, but not read by zbench: use it beside ({', '.join(sorted(found))})"
        return [{"name": "memory controller (perf)", "status": unread if found else why}]
    rocm = device.backend == "rocm"
    tool, counts = ("rocprofv3", "FETCH_SIZE, WRITE_SIZE") if rocm else ("ncu", "dram__bytes")
    if given:
        status = f"read: {given.kernels} kernels"
    elif shutil.which(tool):
        status = "here: run this profile under it and give its CSV as --counters (docs/profiling.md)"
    else:
        status = f"unavailable: {tool} is not on the PATH"
    known = [{"name": f"{tool} ({counts})", "status": status}]
    if not rocm:
        told = gpm if isinstance(gpm, str) else None
        if told is None and isinstance(gpm, hardware.Gpm) and gpm.measured:
            told = gpm.measured.why_not.get("bytes")
        known.append(
            {"name": "NVML GPM (DRAM and tensor activity)", "status": f"unavailable: {told}" if told else "read"}
        )
    proton = importlib.util.find_spec("triton") and importlib.util.find_spec("triton.profiler")
    unread = "here, but not read by zbench: torch’s profiler sees the same kernels"
    return [*known, {"name": "Proton", "status": unread if proton else "unavailable: triton.profiler is not installed"}]


def _gpm(device: Device) -> hardware.Gpm | str:
    """GPM of the device, or why there is none."""
    if device.backend != "cuda":
        return f"{device.name} is no NVIDIA GPU"
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device.torch).uuid}")
        if not nvml.nvmlGpmQueryDeviceSupport(gpu).isSupportedDevice:
            return "this GPU has no GPM (Hopper and later have)"
    except Exception as error:
        return str(error)
    spec = specs.of_device(device)
    return hardware.Gpm(nvml, gpu, spec.bandwidth if spec else None)


def _notes(native: Sequence[cpu.Timed], device: Device, found: Sequence[Operator], counted: bool) -> list[str]:
    if counted:
        return ["Kernels have the times and bytes that were counted, in steps of their own, at the clocks of then."]
    notes = ["FLOPs and bytes of operators follow from shapes: every operand once, as if nothing else were cached."]
    if native:
        notes.append(
            "The native decoder times its own sections, at the barriers between them; torch’s profiler sees none of it."
            " What happens within a section (waiting at its barrier included) is not seen."
        )
    elif device.type == "cpu":
        notes.append("Operators of torch have the time of their own on the calling thread.")
    elif _untimed(found):
        notes.append(
            "Torch’s profiler saw kernels here but no times (CUPTI gives none on this machine): only counts hold."
        )
    else:
        notes.append("Kernels have their time on the device; what they leave of the step is the device waiting.")
    return notes


def _plain(name: str) -> str:
    """Without what all of torch's names begin with, as a table has no room for it."""
    for part in ("aten::", "void ", "at::native::", "(anonymous namespace)::"):
        name = name.replace(part, "")
    return name


def table(result: dict[str, Any], most: int = 20) -> str:
    """The result for people: the step, its operators, the counts, and what is not seen."""
    from zbench.report.findings import quantity

    def shown(value: float | None, unit: str) -> str:
        return "unknown" if value is None else quantity(value, unit) if value else "–"

    def rate(amount: float | None, seconds: float | None, unit: str) -> str:
        return shown(amount and (amount / seconds if seconds else None), unit)

    step, watched = result["step_seconds"], result["profiled_step_seconds"]
    lines = [
        f"{result['engine']} on {result['device']}, {result['model']}, {result['dtype']}, batch {result['batch']}",
        f"step {quantity(step['median'], 's')} (middle half {quantity(step['quarter'], 's')} to "
        f"{quantity(step['three_quarters'], 's')}, n = {step['n']});"
        f" under the profiler {quantity(watched['median'], 's')}, mean {quantity(watched['mean'], 's')}, of which"
        " shares and phases are",
        f"operators explain {result['explained']:.1%} of the profiled steps; the rest is Python, launches and gaps"
        if result["explained"] is not None
        else "the profiler has no times of kernels in these steps",
        "",
    ]
    rows: list[tuple[str, ...]] = [
        ("operator", "", "calls", "time", "share", "FLOPs", "bytes", "FLOP/s", "B/s", "of roof")
    ]

    def share(seconds: float | None) -> str:
        return "unknown" if seconds is None or result["explained"] is None else f"{seconds / watched['mean']:.1%}"

    for entry in result["operators"][:most]:
        seconds, flops, moved = entry["seconds"], entry["flops"], entry["bytes"]
        rows.append((
            _plain(entry["name"])[:44], entry["kind"], f"{entry['calls']:g}",
            "unknown" if seconds is None else quantity(seconds, "s"),
            share(seconds),
            shown(flops, "FLOP"), shown(moved, "B"), rate(flops, seconds, "FLOP/s"), rate(moved, seconds, "B/s"),
            "unknown" if entry["of_roof"] is None else f"{entry['of_roof']:.0%} {entry['roof']}{_mark(entry)}",
        ))  # fmt: skip
    if rest := result["operators"][most:]:
        seconds = sum(entry["seconds"] or 0.0 for entry in rest)
        rows.append((f"{len(rest)} others", "", "", quantity(seconds, "s"), share(seconds), *[""] * 5))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    lines += ["", "phases of a step: " + ", ".join(
        f"{name} {quantity(seconds, 's')}" for name, seconds in result["phases_seconds_per_step"].items()
    )]  # fmt: skip
    for count in result["counts"]:
        ways = [f"analytic {shown(count['analytic'], count['unit'].removesuffix('/step'))}"]
        ways.append(f"counted {shown(count['counted'], count['unit'].removesuffix('/step'))}")
        if count["measured"] is None:
            ways.append(f"measured unavailable: {count['why_not']['measured']}")
        else:
            ways.append(f"measured {shown(count['measured'], count['unit'].removesuffix('/step'))}")
        flag = f"  DISAGREE by {count['disagreement']:.0%}" if count["flagged"] else ""
        lines.append(f"{count['what']} of a step: {'; '.join(ways)}{flag}")
    if result["kernel_launches_per_step"]:
        lines.append(f"launches on the device: {result['kernel_launches_per_step']:.0f} per step")
    if result["tensor_activity"] is not None:
        lines.append(f"tensor pipes were busy for {result['tensor_activity']:.1%} of the plain steps")
    lines += [f"{counter['name']}: {counter['status']}" for counter in result["counters"]]
    if any(_mark(entry) for entry in result["operators"][:most]):
        lines.append(f"{ABOVE} above the measured roof: caches hold what it reads, or the machine was slower when the"
                     " roof was measured")  # fmt: skip
    return "\n".join([*lines, *result["notes"]])


def _mark(operator: dict[str, Any]) -> str:
    return ABOVE if (operator["of_roof"] or 0) > 1 else ""
