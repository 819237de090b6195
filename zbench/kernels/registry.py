"""Which implementation runs an operator on a device: the Triton kernel where it is proven there, else its reference.

One file a kernel: the Triton kernel, the torch reference that defines it, its cost, an example to check it with. Triton
is imported when a kernel is launched, never before: a CPU machine has none, and a ROCm build of torch brings its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

MODULES: dict[str, str] = {  # operator -> module of `zbench.kernels` whose `KERNEL` it is, or "module:NAME" of it
    "add_norm": "add_norm",
    "block_attention": "attention",
    "ccgqa": "ccgqa",
    "commit": "commit",
    "experts": "experts",
    "rope_cache": "rope_cache",
    "stream_copy": "stream:COPY",
    "stream_read": "stream:READ",
    "stream_triad": "stream:TRIAD",
    "verify": "verify",
}


_PIECE = 2**24  # elements that are compared at once: a whole cache in float64, and its masks, may not fit beside it


class Work(NamedTuple):
    """What one call must do at least, from shapes: what a roof is held against."""

    flops: float
    bytes_read: float
    bytes_written: float


class Case(NamedTuple):
    """A call worth timing."""

    label: str
    make: Callable[[int], tuple[Any, ...]]  # seed -> arguments, on the device


class Unavailable(Exception):
    """Something cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """An operator. `reference`, `launch` and `cost` take the same arguments."""

    name: str
    reference: Callable[..., Any]  # torch; accumulates in float32; runs anywhere
    launch: Callable[..., Any]  # Triton; also in its interpreter
    cost: Callable[..., Work]
    example: Callable[[torch.device, int], tuple[Any, ...]]  # device, seed -> arguments of a small, awkward call
    tolerance: float  # of the example and the cases: error of each floating result by norm, relative to the reference's
    cases: Callable[[torch.device], Sequence[Case]] | None = None  # what `zbench run` times; None: the example
    # What else computes this: name -> arguments to the call that is timed. May raise Unavailable.
    rivals: Mapping[str, Callable[..., Callable[[], Any]]] = field(default_factory=dict)
    examples: int = 1  # seeds from 0 that between them run every launch
    table: dict[str, Any] = field(default_factory=dict)  # chip -> named tuple of launch parameters, see `chips`
    candidates: Mapping[str, Sequence[int]] = field(default_factory=dict)  # parameter -> the values that tuning tries


class Choice(NamedTuple):
    call: Callable[..., Any]
    label: str  # for the run's record: "triton", or "torch (why)"


def get(name: str) -> Kernel:
    """KeyError where there is no operator of that name."""
    module, _, attribute = MODULES[name].partition(":")
    return getattr(importlib.import_module(f"zbench.kernels.{module}"), attribute or "KERNEL")


_references_alone = False


@contextmanager
def references() -> Iterator[None]:
    """What is chosen within runs on torch's operators alone, which can be counted."""
    global _references_alone
    before, _references_alone = _references_alone, True
    try:
        yield
    finally:
        _references_alone = before


def choose(name: str, device: torch.device) -> Choice:
    """What runs `name` on `device`. A kernel is checked against its reference once per process and device first; one
    that fails or disagrees warns, is not used, and the label says so."""
    return Choice(get(name).reference, "torch (asked for)") if _references_alone else checked(name, device)


@functools.cache
def checked(name: str, device: torch.device) -> Choice:
    kernel = get(name)
    reason = unavailable(device)
    for seed in range(kernel.examples):
        reason = reason or disagreement(kernel, device, seed)
    return Choice(kernel.reference, f"torch ({reason})") if reason else Choice(kernel.launch, "triton")


def unavailable(device: torch.device) -> str | None:
    """Why Triton cannot be used on `device`; None where it can."""
    if device.type != "cuda":  # ROCm's devices are called so too
        return f"device is {device.type}"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def disagreement(kernel: Kernel, device: torch.device, seed: int = 0) -> str | None:
    """Run the example both ways; what differs, in one line, or None.

    Everything is compared: what is returned, and every argument as it is afterwards.
    """
    wanted, found = kernel.example(device, seed), kernel.example(device, seed)
    try:
        wanted_result = kernel.reference(*wanted)
        found_result = kernel.launch(*found)
        error = worst_error([found_result, *found], [wanted_result, *wanted])
    except Exception as failure:  # a compiler may raise anything
        first = next(iter(str(failure).splitlines()), "no message")
        reason = f"the Triton kernel failed: {type(failure).__name__}: {first}"
    else:
        if error <= kernel.tolerance:
            return None
        reason = f"the Triton kernel disagrees: relative error {error:.1e}, allowed {kernel.tolerance:.0e}"
    warnings.warn(f"{kernel.name} on {device}: {reason}; the torch reference is used", RuntimeWarning, stacklevel=2)
    return reason


def worst_error(found: Any, wanted: Any) -> float:
    """Largest ||found - wanted|| / ||wanted|| over all floating tensors within, in float64; infinity where an integer
    or a non-finite value differs, or a shape or dtype does. 0 where nothing is compared."""
    if isinstance(wanted, Tensor):
        if not isinstance(found, Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
            return float("inf")
        if not wanted.is_floating_point():
            return 0.0 if torch.equal(found, wanted) else float("inf")
        pieces = zip(*(each.reshape(-1).split(_PIECE) for each in (found, wanted)), strict=True)
        error, norm = (math.hypot(*each) for each in zip(*(_norms(*piece) for piece in pieces), strict=True))
        return (error / norm if norm else error) if error == error else float("inf")
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        if not isinstance(found, Sequence) or len(found) != len(wanted):
            return float("inf")
        return max((worst_error(*pair) for pair in zip(found, wanted, strict=True)), default=0.0)
    return 0.0


def _norms(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """(||found - wanted||, ||wanted||) where `wanted` is finite; the first is infinite where the rest differs."""
    finite = wanted.isfinite()
    if not torch.allclose(found[~finite], wanted[~finite], equal_nan=True):
        return float("inf"), 0.0
    found, wanted = found[finite].double(), wanted[finite].double()
    return (found - wanted).norm().item(), wanted.norm().item()
