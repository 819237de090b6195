"""Which chip a device is, and with that which row of a kernel's table of launch parameters.

A table maps names of chips to the parameters of one kernel, and "" to those of any other chip and of the interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch

Row = TypeVar("Row")


class Chip(NamedTuple):
    name: str  # "gfx942" (CDNA3), "gfx950" (CDNA4), "sm90" (Hopper), "sm100" (Blackwell), ...; "" in the interpreter
    units: int  # that programs run on: streaming multiprocessors, compute units
    shared: int  # bytes of shared memory (LDS) that the programs of one unit have
    direct: bool  # whether what is loaded ahead goes to shared memory at once, not by way of registers


KNOWN = {  # what the driver does not say: shared, direct
    "gfx942": (64 * 2**10, False),
    "gfx950": (160 * 2**10, True),
    "sm90": (227 * 2**10, True),
    "sm100": (227 * 2**10, True),
}


@functools.cache
def of(device: torch.device) -> Chip:
    """A chip that is not known has the least shared memory of those that are."""
    if device.type != "cuda":  # the interpreter's; ROCm's devices are called cuda too
        return Chip("", 8, 64 * 2**10, True)
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", "").split(":")[0]
    if not name.startswith("gfx"):  # torch for CUDA puts the device's own name there
        name = f"sm{properties.major}{properties.minor}"
    return Chip(name, properties.multi_processor_count, *KNOWN.get(name, (64 * 2**10, True)))


def pick(table: Mapping[str, Row], device: torch.device) -> Row:
    """The parameters to launch with on `device`."""
    name = of(device).name
    return table[name if name in table else ""]
