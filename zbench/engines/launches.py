"""How many things the host starts for one forward: what a forward costs that neither memory nor arithmetic explains.

Counted by torch's profiler in a decode that is not timed, on the host, so that no tracing of the device is left behind:

    operators that torch runs, without those that call others, views and allocations
  + Triton's kernels
  + calls into the native decoder, each one parallel region
  + compiled layers, beside the operators of torch that they call
  + replayed graphs, within which the host starts nothing

On a GPU an eager operator starts one kernel or a few: `zbench profile` counts kernels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch.autograd.profiler import profile

from zbench.engines.base import Engine, Launches, Meter, Request
from zbench.hardware.device import Device
from zbench.kernels import cpu, jit
from zbench.models.execution import GRAPH
from zbench.models.model import Model, Output
from zbench.models.team import Team

# Kineto, which every profiler of torch starts, tells when on the terminal. It asks once, when first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

TOKENS = 4  # decoded to see every kind of forward once or more
# They move nothing.
_FREE = frozenset(
    f"aten::{name}"
    for name in (
        "view", "_unsafe_view", "as_strided", "reshape", "_reshape_alias", "alias", "detach", "lift_fresh", "empty",
        "empty_strided", "empty_like", "new_empty", "resize_", "expand", "expand_as", "to", "result_type", "transpose",
        "permute", "slice", "select", "unsqueeze", "squeeze", "unbind", "split", "chunk", "contiguous", "item",
        "_local_scalar_dense", "is_nonzero", "narrow", "t", "unflatten", "flatten",
        "resolve_conj", "resolve_neg",
    )
)  # fmt: skip


def count(engine: Engine, prompts: Sequence[Sequence[int]], request: Request, device: Device, team: Team) -> Launches:
    """Of each kind of forward that a short decode makes with the target. Empty where the engine is not one of ours."""
    if not hasattr(engine, "step"):
        return {}
    meter = _Counting(device, team)
    for _ in range(2):  # the first forward of a kind does what later ones need not do again
        meter.found.clear()
        engine.generate(prompts, request, meter)
    return meter.found


class _Counting(Meter):
    """Counts the first forward of each kind instead of timing, but none that was compiled or recorded in it."""

    def __init__(self, device: Device, team: Team) -> None:
        super().__init__(device, team)
        self.found: dict[tuple[str, str, int], int] = {}

    def forward(
        self, model: Model, role: Any, rows: Any, *arguments: Any, name: str = "target", **options: Any
    ) -> Output:
        key = (name, role, rows.ids.shape[1])
        if key in self.found:
            return super().forward(model, role, rows, *arguments, name=name, **options)
        ready, before = len(model.prepared), jit.launches
        with profile(use_kineto=False) as seen, cpu.recording() as native:
            out = super().forward(model, role, rows, *arguments, name=name, **options)
        if len(model.prepared) > ready:
            return out
        self.found[key] = jit.launches - before + len(native) + sum(map(_starts, seen.function_events or ()))
        return out


def _starts(event: Any) -> bool:
    """Whether a span of the profiler is something that the host started by itself."""
    if event.name.startswith("aten::"):
        calls = any(child.name.startswith("aten::") and child.name not in _FREE for child in event.cpu_children)
        return not calls and event.name not in _FREE
    return event.name == GRAPH or event.name.startswith(("Torch-Compiled Region", "triton_"))
