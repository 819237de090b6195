"""Operators on this device: each kernel against its reference and what else computes the same, under measured roofs.

What is timed goes round several sets of arguments, together larger than the last-level cache where that can be had, so
that a call finds nothing of its own there. On a GPU a pass is one recorded graph: otherwise a short kernel's time would
be that in which the host starts it. Implementations alternate, A B B A, and a ratio comes from pairs of passes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import zbench
from zbench import stats
from zbench.errors import UserError
from zbench.hardware import device as devices
from zbench.hardware import environment, roofs
from zbench.hardware.device import Device
from zbench.kernels import registry
from zbench.kernels.registry import Case, Kernel, Unavailable, Work
from zbench.records import KERNELS_VERSION
from zbench.scenario import KernelScenario

FEWEST, MOST = 5, 50  # rounds
MOST_SETS = 32  # of arguments

Thunk = Callable[[], Any]
Name = TypeVar("Name")


def chosen(wanted: KernelScenario) -> list[Kernel]:
    """Raises UserError for a name that no kernel has."""
    names = list(registry.MODULES) if wanted.kernels == "all" else list(wanted.kernels)
    if unknown := [name for name in names if name not in registry.MODULES]:
        raise UserError(f"no kernel is called {', '.join(unknown)}; known: {', '.join(registry.MODULES)}")
    return [registry.get(name) for name in names]


def cases(kernel: Kernel, device: Device) -> Sequence[Case]:
    """What is timed of a kernel: what it names, or else the call that it is checked with."""
    own = kernel.cases(device.torch) if kernel.cases else ()
    return own or [Case("the call it is checked with", partial(kernel.example, device.torch))]


def measure(wanted: KernelScenario, say: Callable[[str], None]) -> dict[str, Any]:
    """`kernels.json`. Raises UserError for an unknown kernel, or a device that is not there."""
    kernels = chosen(wanted)
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    device = devices.resolve(wanted.device)
    measured = roofs.load_or_measure(device, ("bfloat16", "float32"), progress=say)
    rows = []
    for kernel in kernels:
        for case in cases(kernel, device):
            say(f"{kernel.name}: {case.label}")
            rows.append(_row(kernel, case, device, measured, wanted))
    snapshot = environment.snapshot(device, wanted.threads)
    return {
        "schema_version": KERNELS_VERSION,
        "zbench_version": zbench.__version__,
        "name": wanted.name,
        "description": wanted.description,
        "scenario": wanted.model_dump(mode="json"),
        "rows": rows,
        "roofs": measured,
        "environment": snapshot,
    }


def _row(
    kernel: Kernel, case: Case, device: Device, measured: dict[str, Any], wanted: KernelScenario
) -> dict[str, Any]:
    sets, past_cache = argument_sets(case, device, wanted.seed)
    work = kernel.cost(*sets[0])
    least, bound = floor(work, sets[0], measured)
    ready, missing = implementations(kernel, device, sets)
    each = wanted.seconds / MOST / len(ready)
    passes = {name: make_pass(device, calls, each) for name, (_, calls) in ready.items()}
    times = alternate(device, passes, wanted.seconds)
    entries = []
    for name, taken in times.items():
        rounds = range(len(taken))
        seconds = stats.mean(taken, rounds)
        share = least / float(seconds.value)  # type: ignore[arg-type]
        against = None if name == "reference" else stats.paired_ratio(times["reference"], taken, rounds)
        entries.append(
            {
                "name": name,
                "implementation": ready[name][0],
                "started": passes[name].started,
                "seconds": _numbers(seconds),
                "share_of_roof": share,
                "above_roof": share > 1 + roofs.TOLERANCE,
                "speedup_over_reference": against and _numbers(against),
            }
        )
    return {
        "operator": kernel.name,
        "case": case.label,
        "dtype": _dtype(sets[0]),
        **work._asdict(),
        "floor_seconds": least,
        "bound": bound,
        "argument_sets": len(sets),
        "past_cache": past_cache,
        "times": entries,
        "missing": missing,
    }


def floor(work: Work, arguments: tuple[Any, ...], measured: Mapping[str, Any]) -> tuple[float, str]:
    """(the least seconds that a call can take under measured roofs, "memory" or "compute"). FLOPs are held against the
    matrix products of the first floating argument's type; where these were not measured, bytes alone count."""
    rate = measured["flops"].get(_dtype(arguments))
    memory = (work.bytes_read + work.bytes_written) / measured["bandwidth"]["read"]["value"]
    compute = work.flops / rate["value"] if rate else 0.0
    return max(memory, compute), "memory" if memory >= compute else "compute"


def _dtype(arguments: tuple[Any, ...]) -> str:
    floating = (tensor for tensor in _tensors(arguments) if tensor.is_floating_point())
    return next((str(tensor.dtype).removeprefix("torch.") for tensor in floating), "")


def argument_sets(case: Case, device: Device, seed: int) -> tuple[list[tuple[Any, ...]], bool]:
    """Sets of arguments to go round, and whether they are together four times the last-level cache."""
    first = case.make(seed)
    size = max(1, sum(tensor.nbytes for tensor in _tensors(first)))
    wanted = roofs.past_cache_bytes(device)
    count = max(1, min(-(-wanted // size), MOST_SETS, device.memory_bytes() // 4 // size))
    return [first, *(case.make(seed + i) for i in range(1, count))], count * size >= wanted


def implementations(
    kernel: Kernel, device: Device, sets: Sequence[tuple[Any, ...]]
) -> tuple[dict[str, tuple[str, list[Thunk]]], dict[str, str]]:
    """(name -> what runs and its calls, name -> why it is not timed). The reference is always among them, and whatever
    disagrees with it is not. The kernel that is used comes first, if it is timed."""
    choice = registry.choose(kernel.name, device.torch)
    own = choice.call is kernel.reference
    others = {} if own else {"kernel": lambda *arguments: partial(choice.call, *arguments)}
    references: list[Thunk] = [partial(kernel.reference, *arguments) for arguments in sets]
    ready: dict[str, tuple[str, list[Thunk]]] = {"reference": (choice.label if own else "torch", references)}
    missing: dict[str, str] = {}
    for name, prepare in {**others, **kernel.rivals}.items():
        try:
            calls = [prepare(*arguments) for arguments in sets]
            error = _error(kernel, calls[0], sets[0], written=name == "kernel")
        except Unavailable as reason:
            missing[name] = str(reason)
        except Exception as failure:  # what is not ours may fail in any way, and the rest goes on
            missing[name] = f"failed: {type(failure).__name__}: {next(iter(str(failure).splitlines()), 'no message')}"
        else:
            if error <= kernel.tolerance:
                ready[name] = (choice.label if name == "kernel" else name, calls)
            else:
                missing[name] = f"disagrees with the reference: relative error {error:.1e}"
    return dict(sorted(ready.items(), key=lambda entry: entry[0] != "kernel")), missing


def _error(kernel: Kernel, call: Thunk, arguments: tuple[Any, ...], written: bool) -> float:
    """Of what a call returns; if `written`, of its arguments afterwards too, which a rival need not write."""
    theirs = copy.deepcopy(arguments)
    found, wanted = [call()], [kernel.reference(*theirs)]
    if written:
        found, wanted = [*found, *arguments], [*wanted, *theirs]
    return registry.worst_error(found, wanted)


class Pass(NamedTuple):
    """Some calls of one implementation, which are timed together."""

    run: Thunk
    calls: int
    started: str  # how the calls are


def make_pass(device: Device, calls: Sequence[Thunk], seconds: float) -> Pass:
    """Warmed up. On a GPU all calls, as a graph; else about as many as `seconds` take, the next pass going on from
    there, so that arguments are met again only after all others."""
    calls[0]()
    start = device.mark()
    calls[0]()
    end = device.mark()
    device.synchronize()
    if device.type == "cuda":
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
            return Pass(graph.replay, len(calls), "as a graph")
        except RuntimeError:  # something in it asks the device
            device.synchronize()
    count = max(1, min(len(calls), int(seconds / device.seconds(start, end))))
    turns = itertools.cycle(calls)

    def run() -> None:
        for _ in range(count):
            next(turns)()

    return Pass(run, count, "one after another")


def alternate(device: Device, passes: dict[Name, Pass], seconds: float) -> dict[Name, list[float]]:
    """Seconds of a call in each round, A B B A; of all together about `seconds`."""

    def once(one: Pass) -> float:
        start = device.mark()
        one.run()
        end = device.mark()
        device.synchronize()
        return device.seconds(start, end) / one.calls

    together = sum(once(one) * one.calls for one in passes.values())
    rounds = int(max(FEWEST, min(MOST, seconds / together)))
    taken: dict[Name, list[float]] = {name: [] for name in passes}
    for index in range(rounds):
        for name in passes if index % 2 == 0 else reversed(passes):
            taken[name].append(once(passes[name]))
    return taken


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors within arguments."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            yield from _tensors(each)


def _numbers(estimate: stats.Estimate) -> dict[str, Any]:
    found = asdict(estimate)
    return {key: found[key] for key in ("value", "low", "high", "n")}
