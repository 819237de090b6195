"""A Triton kernel and its torch reference on the same arguments, timed by the device's own events."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from zbench.kernels.registry import Kernel

GPU = torch.device("cuda")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: what the interpreter takes says nothing"
)


def measure(benchmark: Any, kernel: Kernel, arguments: tuple[Any, ...], title: str) -> None:
    """Medians of both, alternating, the level-2 cache flushed before each call. The kernel must have done at least
    `cost`; its rate is printed and kept in `extra_info`, with the ratio."""
    from triton.testing import do_bench

    sides = {"triton": kernel.launch, "torch": kernel.reference}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for order in (list(sides), list(sides)[::-1]):
        for name in order:
            times[name] += do_bench(lambda call=sides[name]: call(*arguments), return_mode="all")
    medians = {name: statistics.median(values) * 1e-3 for name, values in times.items()}
    work = kernel.cost(*arguments)
    rate = (work.bytes_read + work.bytes_written) / medians["triton"]
    ratio = medians["torch"] / medians["triton"]
    benchmark.extra_info.update({"ratio": ratio, "medians": medians, "bytes_per_second": rate})
    speed = f"{medians['triton'] * 1e6:.1f} us, {rate / 1e9:.0f} GB/s"
    print(f"\n{title}: {ratio:.2f}x  {speed} on {torch.cuda.get_device_name()}")

    def once() -> None:
        kernel.launch(*arguments)
        torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=50, warmup_rounds=5)
