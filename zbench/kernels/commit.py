"""What a verify keeps of the cache: the accepted path's rows move up behind the prefix, in place, in all layers.

A kept row never moves down and kept rows ascend, so what is moved up may lie where another row still has to be read
from. A program therefore holds all kept rows of its part of a head before it writes the first.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zbench.kernels import chips, jit
from zbench.kernels.registry import Case, Kernel, Work

if TYPE_CHECKING:
    import triton.language as tl


def reference(keys: Tensor, values: Tensor, lengths: Tensor, kept: Tensor) -> None:
    """keys, values [L, B, kv, S, d]: row kept[b, i] behind the prefix of lengths [B] becomes row i behind it.

    kept [B, K] int64 ascends, -1 padded; S has room for all rows.
    """
    target = lengths[:, None] + torch.arange(kept.shape[1], device=kept.device)
    # A padded entry copies its own target onto itself.
    source = torch.where(kept >= 0, kept + lengths[:, None], target).clamp(max=keys.shape[3] - 1)
    target = target.clamp(max=keys.shape[3] - 1)
    sequence = torch.arange(kept.shape[0], device=kept.device)[:, None]
    for store in (keys, values):
        store[:, sequence, :, target] = store[:, sequence, :, source]


class Launch(NamedTuple):
    held: int  # values that a program holds at once
    warps: int


# 32 values in each lane. By reasoning, tuned nowhere.
TABLE = {
    "": Launch(4096, 4),
    "gfx942": Launch(4096, 2),
    "gfx950": Launch(4096, 2),
    "sm90": Launch(4096, 4),
    "sm100": Launch(4096, 4),
}
CANDIDATES = {"held": (1024, 2048, 4096, 8192), "warps": (1, 2, 4, 8)}


def launch(keys: Tensor, values: Tensor, lengths: Tensor, kept: Tensor) -> None:
    """As `reference`. The last dimension is contiguous, others have any strides, which keys and values share."""
    layers, batch, heads, _, width = keys.shape
    block_k = _power(kept.shape[1])
    chosen = chips.pick(TABLE, keys.device)
    block_d = min(_power(width), max(16, chosen.held // block_k))
    with torch.cuda.device_of(keys):
        jit.compiled(_commit)[(layers * batch * heads, -(-width // block_d), 2)](
            keys, values, lengths, kept.contiguous(), batch, heads, kept.shape[1], width, *keys.stride()[:4],
            BLOCK_K=block_k, BLOCK_D=block_d, num_warps=chosen.warps,
        )  # fmt: skip


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _commit(
    keys, values, lengths, kept, batch, heads, places, width, by_layer, by_sequence, by_head, by_slot,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: some channels of one head, of the keys or of the values."""
    flat = tl.program_id(0).to(tl.int64)
    head, sequence, layer = flat % heads, flat // heads % batch, flat // heads // batch
    index = tl.arange(0, BLOCK_K)
    row = tl.load(kept + sequence * places + index, mask=index < places, other=-1)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    moved = ((row >= 0) & (row != index))[:, None] & (channel < width)[None, :]
    start = tl.load(lengths + sequence)
    origin = layer * by_layer + sequence * by_sequence + head * by_head
    source = origin + (start + row)[:, None] * by_slot + channel[None, :]
    target = origin + (start + index)[:, None] * by_slot + channel[None, :]
    if tl.program_id(2) == 0:
        held = tl.load(keys + source, mask=moved, other=0)
        tl.debug_barrier()  # nothing is written before all of it was read
        tl.store(keys + target, held, mask=moved)
    else:
        held = tl.load(values + source, mask=moved, other=0)
        tl.debug_barrier()
        tl.store(values + target, held, mask=moved)


def cost(keys: Tensor, values: Tensor, lengths: Tensor, kept: Tensor) -> Work:
    """Every row that moves, read and written once. Waits for the device."""
    layers, _, heads, _, width = keys.shape
    moves = int(((kept >= 0) & (kept != torch.arange(kept.shape[1], device=kept.device))).sum())
    moved = float(2 * moves * layers * heads * width * keys.itemsize)
    return Work(0.0, moved + kept.nbytes + lengths.nbytes, moved)


def example(device: torch.device, seed: int) -> tuple[Any, ...]:
    """Three layers of two heads of 40 dimensions; paths that overlap, do not move, and have moved past each other."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(3, 3, 2, 24, 40, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    kept = torch.tensor([[0, 1, 2, 3, -1], [0, 2, 3, 5, 9], [0, 7, -1, -1, -1]], device=device)
    return keys, values, torch.tensor([20, 14, 0], device=device), kept


def cases(device: torch.device) -> list[Case]:
    """Five rows of a tree of 32, three of which move, in all layers of an 8B model's cache (on a CPU in two layers)."""
    layers, slots = (2, 512) if device.type == "cpu" else (36, 4096)

    def make(batch: int, seed: int) -> tuple[Any, ...]:
        g = torch.Generator(device).manual_seed(seed)
        keys, values = (
            torch.randn(layers, batch, 8, slots, 128, generator=g, device=device, dtype=torch.bfloat16)
            for _ in range(2)
        )
        lengths = torch.full((batch,), slots - 96, device=device)
        return keys, values, lengths, torch.tensor([0, 1, 7, 11, 24, -1], device=device).repeat(batch, 1)

    return [Case(f"batch {batch}, 5 rows of {layers} layers", partial(make, batch)) for batch in (1, 8)]


KERNEL = Kernel(
    "commit", reference, launch, cost, example, tolerance=0.0, cases=cases, table=TABLE, candidates=CANDIDATES
)
