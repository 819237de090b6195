"""Spec-sheet peaks of known GPUs, from `specs.yaml`. An unknown device has none: no neighbour's, no default."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from zbench.errors import UserError

if TYPE_CHECKING:
    from zbench.hardware.device import Device


@dataclass(frozen=True, slots=True)
class Spec:
    """One GPU's paper peaks, all dense. `sources` says where each figure was read, under the figure's name."""

    name: str
    patterns: tuple[str, ...]  # regular expressions for the whole reported name
    compute_units: int
    memory_bytes: int
    bandwidth: float  # B/s
    flops: Mapping[str, float]  # dtype -> FLOP/s
    power_watts: float
    sources: Mapping[str, str]


def lookup(device_name: str) -> Spec | None:
    """The spec of the GPU that torch or the driver calls `device_name`; None when none or more than one matches."""
    found = [spec for spec in known() if any(re.fullmatch(p, device_name, re.IGNORECASE) for p in spec.patterns)]
    return found[0] if len(found) == 1 else None


def named(name: str) -> Spec:
    """The spec that `specs.yaml` calls `name`, or the only one whose name begins so, in capitals or not. Raises
    UserError with the names that it could be."""
    by_name = {spec.name.casefold(): spec for spec in known()}
    if found := by_name.get(name.casefold()):
        return found
    begun = [spec for key, spec in by_name.items() if key.startswith(name.casefold())]
    if len(begun) == 1:
        return begun[0]
    if begun:
        raise UserError(f"hardware {name!r} could be {', '.join(spec.name for spec in begun)}: write more of its name")
    close = difflib.get_close_matches(name.casefold(), by_name, n=3, cutoff=0.5)
    near = " or ".join(repr(by_name[key].name) for key in close)
    raise UserError(
        f"unknown hardware {name!r}; "
        + (f"did you mean {near}?" if near else f"known: {', '.join(spec.name for spec in known())}")
    )


def of_device(device: Device) -> Spec | None:
    """The spec of a device that is there; None also for a partition (MIG, CPX): it keeps the name, not the peaks."""
    spec = lookup(device.name) if device.type == "cuda" else None
    if spec is None:
        return None
    import torch

    units = torch.cuda.get_device_properties(device.torch).multi_processor_count
    return spec if units == spec.compute_units else None


@functools.cache
def known() -> tuple[Spec, ...]:
    """Every GPU in `specs.yaml`, in its order."""
    text = resources.files(__package__).joinpath("specs.yaml").read_text(encoding="utf-8")
    return tuple(_spec(name, entry) for name, entry in yaml.safe_load(text).items())


def _spec(name: str, entry: dict[str, Any]) -> Spec:
    flops = entry["flops"]
    single = ("compute_units", "memory_bytes", "bandwidth", "power_watts")
    return Spec(
        name=name,
        patterns=tuple(entry["names"]),
        flops={dtype: figure["value"] for dtype, figure in flops.items()},
        sources={key: entry[key]["source"] for key in single}
        | {f"flops.{dtype}": figure["source"] for dtype, figure in flops.items()},
        **{key: entry[key]["value"] for key in single},
    )
