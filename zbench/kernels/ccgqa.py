"""The front of compressed convolutional attention, fused: from one projection to queries and a written cache.

ZAYA1 (arXiv 2605.05365; CCGQA: arXiv 2510.04476), as `models/zaya.py` writes it. With z = [q~, k~] of a row, prev(x)
the value of x at its parent, and heads of d dimensions:

    y1   = wd0 prev(z) + wd1 z + bd;  y2 = Wg0 prev(y1) + Wg1 y1 + bg     depthwise, then one matrix per head
    q, k = y2 + [(q~ + k~)/2, mean of those of a group]                    per head; k~ shared by its group of heads
    q, k = sqrt(d) q/|q|, temp sqrt(d) k/|k|;  rotary positions on the first dimensions of each head
    v    = [current, prev(late)]

In torch these are some thirty operators, each a launch over a few kilobytes; the kernel is one launch that reads the
projection, the state and each head's matrix once per tile of rows.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.kernels import chips, jit
from zbench.kernels.registry import Case, Kernel, Work

if TYPE_CHECKING:
    import triton.language as tl

TAPS = 2  # both convolutions look at a token and the one before it


class Launch(NamedTuple):
    taken: int  # input channels at a time
    warps: int  # of a tile of 16 rows; one of 64 has twice as many


# 16 sums a lane for heads of 128. On AMD 8, one warp for each SIMD of a unit: there are far fewer programs than units.
# By reasoning, tuned nowhere.
TABLE = {
    "": Launch(32, 4),
    "gfx942": Launch(32, 4),
    "gfx950": Launch(32, 4),
    "sm90": Launch(32, 4),
    "sm100": Launch(32, 4),
}
CANDIDATES = {"taken": (16, 32, 64), "warps": (2, 4, 8)}


class Front(NamedTuple):
    """One layer's parameters, of H query heads, then kv key heads: z = (H + kv) d channels."""

    depthwise: Tensor  # [2, z]: for the parent, for the row
    depthwise_bias: Tensor  # [z]
    grouped: Tensor  # [H + kv, 2 d, d]: inputs of the parent, of the row
    grouped_bias: Tensor  # [H + kv, d]
    temp: Tensor  # [kv]


class Places(NamedTuple):
    """Where the rows of a forward and their parents stand, the same in all layers."""

    sequence: Tensor  # [B, 1]
    slots: Tensor  # [B, R]: the cache slot of each row
    parents: Tensor  # [B, R]: 0 for the end of the prefix, 1 + i for row i
    before: Tensor  # [B, 1 + R]: the parent of the prefix's end and of each row; 0, 1 in the prefix, 2 + i for row i

    @classmethod
    def of(cls, parents: Tensor, lengths: Tensor) -> Places:
        """parents [B, R] as in `Rows`, lengths [B] of the prefixes."""
        batch, count = parents.shape
        return cls(
            torch.arange(batch, device=parents.device)[:, None],
            lengths[:, None] + torch.arange(count, device=parents.device),
            parents + 1,
            F.pad(parents + TAPS, (1, 0)),
        )


def reference(
    projected: Tensor,
    mixed: Tensor,
    delayed: Tensor,
    places: Places,
    cos: Tensor,
    sin: Tensor,
    front: Front,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """The definition -> queries [B, R, H, d] in the cache's type. Products accumulate in float32; what flows between
    operators has the type of `projected` up to the norm, and is float32 from there on.

    projected [B, R, z + current + late]: [q~, k~], the values' channels of this token, and those seen a token late
    mixed [B, 2 + R, z], delayed [B, 1 + R, late]: the prefix's last inputs; those of the rows are written behind
    cos, sin [B, R, rotary / 2] float32; keys, values [B, kv, S, d]: written at the rows' slots
    """
    batch, count, _ = projected.shape
    heads, kv_heads, width = len(front.grouped), keys.shape[1], keys.shape[3]
    current = kv_heads * width - delayed.shape[2]
    z, v, late = projected.split((heads * width, current, delayed.shape[2]), -1)
    mixed[:, TAPS:], delayed[:, 1:] = z, late
    y = mixed[places.sequence, places.before] * front.depthwise[0]
    y = y + mixed[:, 1:] * front.depthwise[1] + front.depthwise_bias
    pairs = torch.stack([y[places.sequence, places.parents], y[:, 1:]], 2)  # [B, R, 2, z]
    pairs = pairs.view(batch * count, TAPS, heads, width).permute(2, 0, 1, 3).flatten(2)
    y = torch.bmm(pairs, front.grouped).transpose(0, 1) + front.grouped_bias  # [B R, H + kv, d]

    parts = (heads - kv_heads, kv_heads)
    raw_q, raw_k = z.view(batch, count, heads, width).split(parts, 2)
    coupled = (raw_q.reshape(batch, count, kv_heads, -1, width) + raw_k[:, :, :, None]) / 2
    q, k = y.view(batch, count, heads, width).split(parts, 2)
    eps = torch.finfo(keys.dtype).eps
    q = _unit(q + coupled.flatten(2, 3), eps)
    k = _unit(k + coupled.mean(3), eps) * front.temp[:, None]
    keys[places.sequence, :, places.slots] = _rotated(k, cos, sin).to(keys.dtype)
    v = torch.cat([v, delayed[places.sequence, places.parents]], -1).view(batch, count, kv_heads, width)
    values[places.sequence, :, places.slots] = v.to(values.dtype)
    return _rotated(q, cos, sin).to(keys.dtype)


def _unit(x: Tensor, eps: float) -> Tensor:
    """Each head scaled to length sqrt(d); float32."""
    return F.normalize(x.float(), dim=-1, eps=eps) * math.sqrt(x.shape[-1])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + rotary / 2) turned, the rest left as it is; x [B, R, heads, d] float32."""
    half = cos.shape[-1]
    first, second, still = x.split((half, half, x.shape[-1] - 2 * half), -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, still], -1)


def launch(
    projected: Tensor,
    mixed: Tensor,
    delayed: Tensor,
    places: Places,
    cos: Tensor,
    sin: Tensor,
    front: Front,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """See `reference`. Contiguous but for the cache, of which only the last dimension has to be; float32 within, but
    for the input of the heads' matrices, which is rounded to their type."""
    batch, count, _ = projected.shape
    heads, kv_heads, width = len(front.grouped), keys.shape[1], keys.shape[3]
    queries = torch.empty(batch, count, heads - kv_heads, width, dtype=keys.dtype, device=keys.device)
    total = batch * count
    rows, taken, warps = tiles(total, chips.pick(TABLE, projected.device))
    jit.compiled(_front)[(-(-total // rows), heads + kv_heads)](
        projected, mixed, delayed, places.parents, places.before, places.slots, cos, sin, *front,
        keys, values, queries, total, count, *keys.stride()[:3], *values.stride()[:3],
        HEADS=heads - kv_heads, KV=kv_heads, WIDTH=width, HALF=cos.shape[-1], LATE=delayed.shape[2],
        EPS=torch.finfo(keys.dtype).eps, ROWS=rows, TAKEN=taken, BLOCK=max(16, 1 << (width - 1).bit_length()),
        WIDE=jit.interpreted(), num_warps=warps,
    )  # fmt: skip
    return queries


def tiles(rows: int, chosen: Launch) -> tuple[int, int, int]:
    """(rows of a tile, input channels taken at a time, warps). The smallest tile that matrix units have while there
    are few rows, for the most programs; a taller one where a head's matrix would be read by many tiles."""
    return (16, *chosen) if rows <= 1024 else (64, chosen.taken, 2 * chosen.warps)


def _front(
    projected, mixed, delayed, parents, before, slots, cos, sin, depthwise, depthwise_bias, grouped, grouped_bias, temp,
    keys, values, queries, total, count, key_b, key_h, key_s, value_b, value_h, value_s,
    HEADS: tl.constexpr, KV: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, LATE: tl.constexpr,
    EPS: tl.constexpr, ROWS: tl.constexpr, TAKEN: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows, of all sequences, times one head: queries, then keys, then values."""
    MIXED: tl.constexpr = (HEADS + KV) * WIDTH
    ALL: tl.constexpr = MIXED + KV * WIDTH
    CURRENT: tl.constexpr = KV * WIDTH - LATE
    head = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    alive = row < total
    sequence = row // count
    slot = tl.load(slots + row, mask=alive, other=0)
    parent = tl.load(parents + row, mask=alive, other=0)
    channel = tl.arange(0, BLOCK)
    shown = alive[:, None] & (channel < WIDTH)[None, :]

    if head < HEADS + KV:
        # Where z of the row, of its parent and of the parent's parent begins: a token of the prefix is in `mixed`,
        # a row in `projected`, since no other program's writes can be relied upon.
        state = mixed + sequence * (2 + count) * MIXED
        here = projected + row * ALL
        older = tl.load(before + sequence * (1 + count) + parent, mask=alive, other=0)
        first = projected + (sequence * count - 2) * ALL
        at_parent = tl.where(parent < 1, state + (parent + 1) * MIXED, first + (parent + 1) * ALL)
        at_older = tl.where(older < 2, state + older * MIXED, first + older * ALL)

        y = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, WIDTH, TAKEN):
            inner = start + tl.arange(0, TAKEN)
            within = inner < WIDTH
            seen = alive[:, None] & within[None, :]
            at = head * WIDTH + inner
            z0 = tl.load(at_older[:, None] + at[None, :], mask=seen, other=0).to(tl.float32)
            z1 = tl.load(at_parent[:, None] + at[None, :], mask=seen, other=0).to(tl.float32)
            z2 = tl.load(here[:, None] + at[None, :], mask=seen, other=0).to(tl.float32)
            of_parent = tl.load(depthwise + at, mask=within, other=0).to(tl.float32)[None, :]
            of_row = tl.load(depthwise + MIXED + at, mask=within, other=0).to(tl.float32)[None, :]
            bias = tl.load(depthwise_bias + at, mask=within, other=0).to(tl.float32)[None, :]
            before_y = z0 * of_parent + z1 * of_row + bias
            this_y = z1 * of_parent + z2 * of_row + bias
            matrix = grouped + (head * 2 * WIDTH + inner[:, None]) * WIDTH + channel[None, :]
            known = within[:, None] & (channel < WIDTH)[None, :]
            w0 = tl.load(matrix, mask=known, other=0)
            w1 = tl.load(matrix + WIDTH * WIDTH, mask=known, other=0)
            before_y, this_y = before_y.to(w0.dtype), this_y.to(w1.dtype)
            if WIDE:
                before_y, this_y, w0, w1 = (
                    before_y.to(tl.float32), this_y.to(tl.float32), w0.to(tl.float32), w1.to(tl.float32),
                )  # fmt: skip
            y = tl.dot(before_y, w0, y, input_precision="ieee")
            y = tl.dot(this_y, w1, y, input_precision="ieee")
        bias = tl.load(grouped_bias + head * WIDTH + channel, mask=channel < WIDTH, other=0)
        own = tl.load(here[:, None] + head * WIDTH + channel[None, :], mask=shown, other=0)
        tl.store(state[:, None] + (2 + row - sequence * count)[:, None] * MIXED + head * WIDTH + channel, own, shown)
        other = tl.zeros((ROWS, BLOCK), tl.float32)
        if head < HEADS:
            key = HEADS + head // (HEADS // KV)
            other += tl.load(here[:, None] + key * WIDTH + channel[None, :], mask=shown, other=0).to(tl.float32)
        else:
            for member in range(HEADS // KV):
                query = (head - HEADS) * (HEADS // KV) + member
                raw = tl.load(here[:, None] + query * WIDTH + channel[None, :], mask=shown, other=0)
                other += raw.to(tl.float32)
            other /= HEADS // KV
        y = y + bias.to(tl.float32)[None, :] + (own.to(tl.float32) + other) * 0.5
        y = tl.where(shown, y, 0.0)
        length = tl.maximum(tl.sqrt(tl.sum(y * y, 1)), EPS)
        y = y / length[:, None] * tl.sqrt(WIDTH * 1.0)
        if head >= HEADS:
            y *= tl.load(temp + head - HEADS).to(tl.float32)

        # A channel turns with the one half the rotary dimensions away.
        turning = channel < 2 * HALF
        partner = tl.where(turning, tl.where(channel < HALF, channel + HALF, channel - HALF), channel)
        turned = tl.gather(y, tl.broadcast_to(partner[None, :], (ROWS, BLOCK)), 1)
        angle = row[:, None] * HALF + (channel % HALF)[None, :]
        turns = alive[:, None] & turning[None, :]
        cosine = tl.load(cos + angle, mask=turns, other=1)
        sine = tl.load(sin + angle, mask=turns, other=0)
        y = y * cosine + turned * tl.where(channel < HALF, -sine, sine)
        if head < HEADS:
            tl.store(queries + (row * HEADS + head)[:, None] * WIDTH + channel, y.to(queries.dtype.element_ty), shown)
        else:
            to = keys + sequence * key_b + (head - HEADS) * key_h + slot * key_s
            tl.store(to[:, None] + channel, y.to(keys.dtype.element_ty), shown)
    else:
        head -= HEADS + KV
        at = head * WIDTH + channel
        here = projected + row * ALL + MIXED
        new = tl.load(here[:, None] + at[None, :], mask=shown, other=0)
        late = shown & (at >= CURRENT)[None, :]
        state = delayed + sequence * (1 + count) * LATE - CURRENT
        tl.store(state[:, None] + (1 + row - sequence * count)[:, None] * LATE + at[None, :], new, late)
        parent_row = projected + (sequence * count + parent - 1) * ALL + MIXED
        old = tl.load(tl.where(parent < 1, state, parent_row)[:, None] + at[None, :], mask=late, other=0)
        to = values + sequence * value_b + head * value_h + slot * value_s
        tl.store(to[:, None] + channel, tl.where(late, old, new).to(values.dtype.element_ty), shown)


def cost(
    projected: Tensor,
    mixed: Tensor,
    delayed: Tensor,
    places: Places,
    cos: Tensor,
    sin: Tensor,
    front: Front,
    keys: Tensor,
    values: Tensor,
) -> Work:
    """Two FLOPs a multiply-add of the convolutions, 4 z (1 + d) a row; the rest is left out. Parameters, the projection
    and the state are read once, the state behind it, queries, keys and values are written."""
    rows = projected.shape[0] * projected.shape[1]
    channels, width, itemsize = mixed.shape[2], keys.shape[3], projected.itemsize
    state = len(mixed) * (TAPS * channels + delayed.shape[2]) * itemsize
    kept = channels + delayed.shape[2]
    return Work(
        flops=2.0 * TAPS * rows * channels * (1 + width),
        bytes_read=float(sum(part.nbytes for part in (*front, cos, sin, *places[1:], projected)) + state),
        bytes_written=float(rows * (kept * itemsize + (channels + keys.shape[1] * width) * keys.itemsize)),
    )


def example(device: torch.device, seed: int) -> tuple[Any, ...]:
    """Two sequences, one of them empty; trees; heads of 24 dimensions; in bfloat16, in slots that hold NaN."""
    return random_call(device, torch.bfloat16, seed)


def random_call(
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    lengths: tuple[int, ...] = (0, 7),
    count: int = 6,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 24,
    half: int = 6,
    parents: Tensor | None = None,
    capacity: int = 16,
    late: int | None = None,
) -> tuple[Any, ...]:
    """Arguments of a call with random contents; `parents` [B, R] default to random trees. What is to be written holds
    NaN; the state of an empty sequence holds zeros."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    batch, z = len(lengths), (heads + kv_heads) * width
    late = kv_heads * width // 2 if late is None else late
    if parents is None:
        parents = (torch.rand(batch, count, generator=g) * (torch.arange(count) + 1)).long() - 1
    begun = torch.tensor(lengths, device=device)
    angles = torch.rand(batch, count, half, generator=g) * 100
    mixed, delayed = normal(batch, TAPS + count, z), normal(batch, 1 + count, late)
    mixed[begun == 0], delayed[begun == 0] = 0, 0
    mixed[:, TAPS:], delayed[:, 1:] = torch.nan, torch.nan
    keys, values = (torch.full((batch, kv_heads, capacity, width), torch.nan, dtype=dtype).to(device) for _ in range(2))
    front = Front(
        normal(TAPS, z, scale=0.7), normal(z, scale=0.1), normal(heads + kv_heads, TAPS * width, width, scale=0.2),
        normal(heads + kv_heads, width, scale=0.1), normal(kv_heads) + 1,
    )  # fmt: skip
    return (
        normal(batch, count, z + kv_heads * width), mixed, delayed, Places.of(parents.to(device), begun),
        angles.cos().to(device), angles.sin().to(device), front, keys, values,
    )  # fmt: skip


def cases(device: torch.device) -> list[Case]:
    """ZAYA1-8B's heads, in bfloat16: a decoded token, a verify and a TiDAR step of one sequence, a batch of 64."""
    heads = partial(random_call, device, torch.bfloat16, heads=8, kv_heads=2, width=128, half=32)
    shapes = ((1, 1), (1, 16), (1, 272), (64, 1))
    return [
        Case(f"batch {batch}, {rows} rows", partial(heads, lengths=(8,) * batch, count=rows, capacity=rows + 8))
        for batch, rows in shapes
    ]


KERNEL = Kernel(
    "ccgqa", reference, launch, cost, example, tolerance=2e-2, cases=cases, table=TABLE, candidates=CANDIDATES
)
