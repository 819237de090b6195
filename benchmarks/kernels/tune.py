"""With which launch parameters a kernel is fastest on the GPU that is here: the row of its table, to paste.

    python -m benchmarks.kernels.tune [KERNEL...] [--seconds S]

Every candidate is held to the reference, on the kernel's examples and on its cases. Those that agree are timed on the
cases in turn, as `zbench run scenarios/kernels.yaml` does. The best by the geometric mean over cases is timed again
beside what the table says now: the best of many is partly luck, so only the second times are shown.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import geometric_mean, mean
from typing import Any, NamedTuple

from zbench import operators, stats
from zbench.hardware import device as devices
from zbench.hardware.device import Device
from zbench.kernels import chips, registry
from zbench.kernels.registry import Kernel

Times = dict[str, dict[Any, list[float]]]  # case -> row -> seconds of a call in each round


class Found(NamedTuple):
    chip: str
    now: Any  # the row that the table had
    best: Any  # None: no candidate agrees with the reference
    rejected: dict[Any, str]  # row -> why
    times: Times  # of both, where both agree


def candidates(kernel: Kernel, now: Any) -> list[Any]:
    """What the table says now, and every combination of the values to try."""
    tried = itertools.product(*kernel.candidates.values())
    rows = (now._replace(**dict(zip(kernel.candidates, values, strict=True))) for values in tried)
    return list(dict.fromkeys([now, *rows]))


def search(kernel: Kernel, device: Device, seconds: float) -> Found:
    """`seconds` go to each case, twice. The kernel's table has the best row from then on, in this process."""
    chip, now = chips.of(device.torch).name, chips.pick(kernel.table, device.torch)
    rejected: dict[Any, str] = {}
    best = None
    times: Times = {}
    try:
        for row in candidates(kernel, now):
            kernel.table[chip] = row
            if reason := refusal(kernel, device):
                rejected[row] = reason
        agreeing = [row for row in candidates(kernel, now) if row not in rejected]
        if agreeing:
            first = timed(kernel, device, agreeing, seconds)
            best = min(agreeing, key=lambda row: geometric_mean(mean(each[row]) for each in first.values()))
            times = timed(kernel, device, [row for row in agreeing if row in (now, best)], seconds)
    finally:
        kernel.table[chip] = best or now
    return Found(chip, now, best, rejected, times)


def refusal(kernel: Kernel, device: Device) -> str | None:
    """Why the kernel may not be launched as its table says; None where it agrees with the reference everywhere."""
    calls = [(kernel, seed) for seed in range(kernel.examples)]
    calls += [(replace(kernel, example=partial(_made, case)), 0) for case in operators.cases(kernel, device)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return next(filter(None, (registry.disagreement(one, device.torch, seed) for one, seed in calls)), None)


def _made(case: registry.Case, _: object, seed: int) -> tuple[Any, ...]:
    return case.make(seed)


def timed(kernel: Kernel, device: Device, rows: Sequence[Any], seconds: float) -> Times:
    chip, times = chips.of(device.torch).name, {}
    for case in operators.cases(kernel, device):
        sets, _ = operators.argument_sets(case, device, seed=0)

        def call(row: Any, arguments: tuple[Any, ...]) -> None:
            kernel.table[chip] = row
            kernel.launch(*arguments)

        passes = {
            row: operators.make_pass(
                device, [partial(call, row, arguments) for arguments in sets], seconds / operators.MOST / len(rows)
            )
            for row in rows
        }
        times[case.label] = operators.alternate(device, passes, seconds)
    return times


def show(kernel: Kernel, found: Found, device: Device, say: Callable[[str], None]) -> None:
    for row, reason in found.rejected.items():
        say(f"{kernel.name}: rejected {row}: {reason}")
    if found.best is None:
        say(f"{kernel.name}: no candidate agrees with the reference on {device.name}")
        return
    compared = found.now != found.best and found.now not in found.rejected
    ratios = []
    for label, times in found.times.items():
        line = f"{kernel.name}: {label}: {_microseconds(times[found.best])}"
        if compared:
            rounds = range(len(times[found.best]))
            ratio = stats.paired_ratio(times[found.now], times[found.best], rounds)
            ratios.append(float(ratio.value))  # type: ignore[arg-type]
            line += f", now {_microseconds(times[found.now])}: {ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
        say(line)
    gain = f"{geometric_mean(ratios):.2f}x of {tuple(found.now)}" if compared else "as before"
    best = found.best
    if compared and geometric_mean(ratios) <= 1:  # the best of many is partly luck
        best, gain = found.now, f"as before: {tuple(found.best)} gave {geometric_mean(ratios):.2f}x of it"
    row = f"Launch({', '.join(map(str, best))})"
    say(f'{kernel.name}:    "{found.chip}": {row},  # tuned on {device.name}: {gain}')


def _microseconds(times: list[float]) -> str:
    found = stats.mean([1e6 * each for each in times], range(len(times)))
    return f"{found.value:.1f} us [{found.low:.1f}, {found.high:.1f}]"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.tune", description="Tune kernels' launches.")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(registry.MODULES)}; all if none")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case, twice")
    wanted = parser.parse_args(arguments)
    device = devices.resolve()
    reason = registry.unavailable(device.torch)
    if unknown := [name for name in wanted.kernels if name not in registry.MODULES]:
        reason = f"no kernel is called {', '.join(unknown)}; known: {', '.join(registry.MODULES)}"
    if reason:
        print(f"nothing can be tuned: {reason}", file=sys.stderr)
        return 2
    for name in wanted.kernels or registry.MODULES:
        kernel = registry.get(name)
        show(kernel, search(kernel, device, wanted.seconds), device, partial(print, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
