"""What a verify keeps of the cache: the accepted path's rows move up behind the prefix, in place, in all layers.

A kept row never moves down and kept rows ascend, so what is moved up may lie where another row still has to be read
from. A program therefore holds all kept rows of its part of a head before it writes the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zbench.kernels import jit
from zbench.kernels.registry import Kernel, Work

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


HELD = 4096  # values that a program holds at once, 16 or 32 in each of its lanes


def launch(keys: Tensor, values: Tensor, lengths: Tensor, kept: Tensor) -> None:
    """As `reference`. The last dimension is contiguous, others have any strides, which keys and values share."""
    layers, batch, heads, _, width = keys.shape
    block_k = _power(kept.shape[1])
    block_d = min(_power(width), max(16, HELD // block_k))
    with torch.cuda.device_of(keys):
        jit.compiled(_commit)[(layers * batch * heads, -(-width // block_d), 2)](
            keys, values, lengths, kept.contiguous(), batch, heads, kept.shape[1], width, *keys.stride()[:4],
            BLOCK_K=block_k, BLOCK_D=block_d, num_warps=4,
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


KERNEL = Kernel("commit", reference, launch, cost, example, tolerance=0.0)
