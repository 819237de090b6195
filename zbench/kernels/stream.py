"""Streams over memory that measure a GPU's roofs: reading, copying and the triad of McCalpin's STREAM benchmark.

Reading serves the caches too: a working set that is read again and again is served by the smallest cache that holds
it. From step to step every program moves on to another block, so that each processor walks through the whole set.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zbench.kernels import chips, jit
from zbench.kernels.registry import Case, Kernel, Work

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 4096  # elements that a program takes at a time: 16 KiB
_RESIDENT = 8  # programs per unit that keep enough reads in flight


class Launch(NamedTuple):
    read: int  # warps of each
    copy: int
    triad: int


# 16 values a lane, four loads of 16 bytes. By reasoning, tuned nowhere.
TABLE = {
    "": Launch(8, 8, 8),
    "gfx942": Launch(4, 4, 4),
    "gfx950": Launch(4, 4, 4),
    "sm90": Launch(8, 8, 8),
    "sm100": Launch(8, 8, 8),
}
WARPS = (2, 4, 8, 16)  # that tuning tries


@functools.cache
def programs(device: torch.device) -> int:
    """As many as `device` keeps resident, rounded down to a power of two."""
    return 1 << (_RESIDENT * chips.of(device).units).bit_length() - 1


def once(x: Tensor) -> tuple[Tensor, int, int]:
    """(out, stride, steps) with which `read` takes each block of x exactly once."""
    blocks = x.numel() // BLOCK
    count = math.gcd(blocks, programs(x.device))
    return x.new_empty(count), count, blocks // count


def again(x: Tensor, size: int) -> tuple[Tensor, int, int]:
    """(out, stride, steps) with which `read` takes about `size` bytes from x, over and over."""
    count = programs(x.device)
    return x.new_empty(count), count + 1, max(1, size // (count * BLOCK * x.itemsize))


def read_reference(x: Tensor, out: Tensor, stride: int, steps: int) -> None:
    """out[i] = the sum over steps t of block (i + stride t) mod n of x, of n blocks; all float32."""
    sums = _blocks(x).sum(1)
    places = torch.arange(len(out), device=x.device)[:, None] + stride * torch.arange(steps, device=x.device)
    out.copy_(sums[places % len(sums)].sum(1))


def read(x: Tensor, out: Tensor, stride: int, steps: int) -> None:
    """See `read_reference`. ValueError where x is not made of whole blocks."""
    warps = chips.pick(TABLE, x.device).read
    jit.compiled(_read)[(len(out),)](x, out, len(_blocks(x)), stride, steps, BLOCK=BLOCK, num_warps=warps)


def copy_reference(x: Tensor, out: Tensor) -> None:
    out.copy_(x)


def copy(x: Tensor, out: Tensor) -> None:
    """out = x."""
    warps = chips.pick(TABLE, x.device).copy
    jit.compiled(_copy)[(-(-x.numel() // BLOCK),)](x, out, x.numel(), BLOCK=BLOCK, num_warps=warps)


def triad_reference(b: Tensor, c: Tensor, scale: float, out: Tensor) -> None:
    torch.add(b, c, alpha=scale, out=out)


def triad(b: Tensor, c: Tensor, scale: float, out: Tensor) -> None:
    """out = b + scale c."""
    warps = chips.pick(TABLE, b.device).triad
    jit.compiled(_triad)[(-(-b.numel() // BLOCK),)](b, c, scale, out, b.numel(), BLOCK=BLOCK, num_warps=warps)


def _blocks(x: Tensor) -> Tensor:
    if x.numel() % BLOCK:
        raise ValueError(f"{x.numel()} elements are not whole blocks of {BLOCK}")
    return x.view(-1, BLOCK)


def _read(x, out, blocks, stride, steps, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(steps):
        total += tl.load(x + at % blocks * BLOCK + within)
        at += stride
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def _copy(x, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < count), at < count)


def _triad(b, c, scale, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(b + at, mask=at < count) + scale * tl.load(c + at, mask=at < count)
    tl.store(out + at, value, at < count)


def read_cost(x: Tensor, out: Tensor, stride: int, steps: int) -> Work:
    taken = len(out) * steps * BLOCK
    return Work(float(taken), float(taken * x.itemsize), float(out.nbytes))


def copy_cost(x: Tensor, out: Tensor) -> Work:
    return Work(0.0, float(x.nbytes), float(out.nbytes))


def triad_cost(b: Tensor, c: Tensor, scale: float, out: Tensor) -> Work:
    return Work(2.0 * b.numel(), float(b.nbytes + c.nbytes), float(out.nbytes))


def _vectors(device: torch.device, seed: int, count: int, size: int) -> list[Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    return [torch.randn(size, generator=g, device=device) for _ in range(count)]


def read_example(device: torch.device, seed: int) -> tuple[Any, ...]:
    """More programs than blocks, and a walk that wraps round."""
    [x] = _vectors(device, seed, 1, 3 * BLOCK)
    return x, torch.full((5,), torch.nan, device=device), 2, 4


def copy_example(device: torch.device, seed: int) -> tuple[Any, ...]:
    [x] = _vectors(device, seed, 1, BLOCK + 37)
    return x, torch.full_like(x, torch.nan)


def triad_example(device: torch.device, seed: int) -> tuple[Any, ...]:
    b, c = _vectors(device, seed, 2, BLOCK + 37)
    return b, c, 0.5, torch.full_like(b, torch.nan)


def _cases(make: Callable[[torch.device, int, int], tuple[Any, ...]], device: torch.device) -> list[Case]:
    """The least that dwarfs a launch."""
    size = 2**24 if device.type == "cpu" else 2**28
    return [Case(f"{size * 4 // 2**20} MiB a vector", partial(make, device, size))]


def _whole(device: torch.device, size: int, seed: int) -> tuple[Any, ...]:
    [x] = _vectors(device, seed, 1, size)
    return x, *once(x)


def _pair(device: torch.device, size: int, seed: int) -> tuple[Any, ...]:
    [x] = _vectors(device, seed, 1, size)
    return x, torch.empty_like(x)


def _triple(device: torch.device, size: int, seed: int) -> tuple[Any, ...]:
    b, c = _vectors(device, seed, 2, size)
    return b, c, 0.5, torch.empty_like(b)


READ = Kernel(
    "stream_read", read_reference, read, read_cost, read_example, tolerance=1e-4, cases=partial(_cases, _whole),
    table=TABLE, candidates={"read": WARPS},
)  # fmt: skip
COPY = Kernel(
    "stream_copy", copy_reference, copy, copy_cost, copy_example, tolerance=0.0, cases=partial(_cases, _pair),
    table=TABLE, candidates={"copy": WARPS},
)  # fmt: skip
TRIAD = Kernel(
    "stream_triad", triad_reference, triad, triad_cost, triad_example, tolerance=1e-6, cases=partial(_cases, _triple),
    table=TABLE, candidates={"triad": WARPS},
)  # fmt: skip
