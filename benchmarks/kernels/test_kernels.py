"""Time of every kernel, its reference and what else computes the same, going round more arguments than caches hold.

    pytest benchmarks/kernels                                            compare within a group
    pytest benchmarks/kernels --benchmark-json now.json --benchmark-compare   against an earlier run

`share_of_roof` among the extra information is the floor under the measured roofs over the mean time; roofs are those
that `zbench roofs` keeps. Where Triton does not run, kernels are skipped and say why; what is plain torch still runs.
"""

from __future__ import annotations

from typing import Any

import pytest

from zbench import operators
from zbench.hardware import device, roofs
from zbench.kernels import registry

HERE = device.resolve()
ROUND_SECONDS = 0.1


def _cases() -> list[Any]:
    return [
        pytest.param(kernel, case, name, id=f"{kernel.name}-{case.label}-{name}")
        for kernel in map(registry.get, registry.MODULES)
        for case in operators.cases(kernel, HERE)
        for name in ("kernel", "reference", *kernel.rivals)
    ]


@pytest.mark.parametrize("kernel, case, name", _cases())
def test_kernel(benchmark: Any, kernel: registry.Kernel, case: registry.Case, name: str) -> None:
    reason = registry.unavailable(HERE.torch)
    if name == "kernel" and reason:
        pytest.skip(f"the Triton kernel cannot run: {reason}")
    sets, past_cache = operators.argument_sets(case, HERE, seed=0)
    ready, missing = operators.implementations(kernel, HERE, sets)
    if name not in ready:
        pytest.skip(missing.get(name, registry.choose(kernel.name, HERE.torch).label))
    one = operators.make_pass(HERE, ready[name][1], ROUND_SECONDS)

    def run() -> None:
        one.run()
        HERE.synchronize()

    benchmark.group = f"{kernel.name}: {case.label}, {one.calls} calls"
    benchmark.pedantic(run, rounds=10, warmup_rounds=1)
    seconds = benchmark.stats.stats.mean / one.calls
    floor, bound = operators.floor(kernel.cost(*sets[0]), sets[0], roofs.load_or_measure(HERE))
    benchmark.extra_info |= {
        "ran": ready[name][0], "seconds_per_call": seconds, "share_of_roof": floor / seconds, "bound": bound,
        "past_cache": past_cache,
    }  # fmt: skip
