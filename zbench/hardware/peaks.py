"""What a device gives at most, by its spec sheet or by the roofs measured on this machine (no torch until asked)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from zbench.errors import UserError
from zbench.hardware import specs
from zbench.models.cost import Cost

SLACK = 1.1  # rows are free while a forward takes at most this many times that of one row


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a device gives at most. The fractions are one assumption for each roof: how much of it is reached."""

    device: str
    kind: Literal["spec sheet", "measured"]
    bandwidth: float  # B/s
    flops: Mapping[str, float]  # dtype -> FLOP/s, dense
    sources: Mapping[str, str]
    memory_bytes: int | None = None  # None: not known
    memory_fraction: float = 1.0
    compute_fraction: float = 1.0

    def check(self, dtype: str) -> None:
        """Raises UserError where the rate of a dtype is not known."""
        if dtype not in self.flops:
            known = ", ".join(self.flops)
            remedy = f"zbench roofs --dtype {dtype} measures it" if self.kind == "measured" else "choose another dtype"
            raise UserError(f"no {dtype} rate of {self.device} is known (known: {known}); {remedy}")

    def memory_seconds(self, cost: Cost) -> float:
        return (cost.bytes_read + cost.bytes_written) / (self.memory_fraction * self.bandwidth)

    def compute_seconds(self, cost: Cost, dtype: str) -> float:
        return cost.flops / (self.compute_fraction * self.flops[dtype])

    def seconds(self, cost: Cost, dtype: str) -> float:
        return max(self.memory_seconds(cost), self.compute_seconds(cost, dtype))

    def ridge(self, dtype: str) -> float:
        """FLOP per byte from which on arithmetic is the slower one."""
        return self.compute_fraction * self.flops[dtype] / (self.memory_fraction * self.bandwidth)


def on_paper(name: str) -> Peaks:
    """The spec sheet of a device of `specs.yaml`. Raises UserError for an unknown name, with the nearest ones."""
    spec = specs.named(name)
    return Peaks(
        spec.name,
        "spec sheet",
        spec.bandwidth,
        dict(spec.flops),
        dict(spec.sources),
        spec.memory_bytes,
    )


def measured_here(device: str, threads: int | None) -> Peaks:
    """The roofs kept for a device of this machine, as a scenario names it. Raises UserError where none are."""
    import torch

    from zbench.hardware import device as devices
    from zbench.hardware import roofs

    if threads:
        torch.set_num_threads(threads)
    found = devices.resolve(device)
    kept = roofs.cached(found)
    if kept is None:
        raise UserError(f"the roofs of {found.name} are not measured under the present conditions; run: zbench roofs")
    return Peaks(
        found.name,
        "measured",
        kept["bandwidth"]["read"]["value"],
        {dtype: rate["value"] for dtype, rate in kept["flops"].items()},
        {"bandwidth": f"read, measured {kept['measured']}", "flops": f"measured {kept['measured']}"},
    )
