"""Attention of a block: few query rows per sequence over a long static cache, and among themselves as a mask says.

Every row sees the committed prefix of its sequence, and of the rows written behind it those that its bits name: a
chain, a tree, the masked blocks of a TiDAR step. The prefix needs no mask, so none of its length is ever made.

    split    a program takes a tile of (rows x query heads of one key head) and a share of the slots, and keeps a
             running softmax (FlashAttention, arXiv 2205.14135; shares of the context: Flash-Decoding, Dao et al. 2023)
    merge    a program weighs the shares of one row and head by their log-sum-exp

A tile has the rows of all query heads that share a key head, so that what it loads serves them all. Up to 128 of them
are one tile, and the prefix is read once. More make several tiles, each of which reads it again, from the cache that
neighbouring programs share: by then a byte of the prefix is multiplied by 128 rows in every tile, and arithmetic takes
longer than memory. Shares are even: their number comes from the capacity, so that a captured graph stays valid, but
where they begin comes from the lengths, which only the device knows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.kernels import chips, jit
from zbench.kernels.chips import Chip
from zbench.kernels.registry import Case, Kernel, Unavailable, Work

if TYPE_CHECKING:
    import triton.language as tl

BITS = 32  # of a word of visibility


def pack(visible: Tensor) -> Tensor:
    """[..., R, R] bool, row i sees row j -> [..., R, ceil(R / 32)] int32: bit j % 32 of word j // 32."""
    words = -(-visible.shape[-1] // BITS)
    bits = F.pad(visible, (0, words * BITS - visible.shape[-1])).unflatten(-1, (words, BITS))
    weights = torch.ones(BITS, dtype=torch.int32, device=visible.device) << torch.arange(BITS, device=visible.device)
    return (bits * weights.int()).sum(-1, dtype=torch.int32)


def unpack(words: Tensor) -> Tensor:
    """[..., R, W] int32 -> [..., R, R] bool."""
    bits = words[..., None] >> torch.arange(BITS, dtype=torch.int32, device=words.device) & 1
    return bits.bool().flatten(-2)[..., : words.shape[-2]]


def reference(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, visible: Tensor, first: Tensor | None = None
) -> Tensor:
    """The definition -> [B, R, H, d]; scores, softmax and sums in float32. A row that sees nothing gets zeros.

    queries [B, R, H, d]; keys, values [B, kv, S, d] with the rows' own at slots lengths .. lengths + R, and whatever
    behind; lengths [B] of the committed prefixes; visible [B, R, W] from `pack`. `first` [B, R] is the first slot of
    the prefix that a row sees (a sliding window); None: all of it.
    """
    rows, heads, width = queries.shape[1:]
    slots = torch.arange(keys.shape[2], device=keys.device)
    seen, written = _seen(slots, lengths, visible, first)
    k, v = (torch.where(written[:, None, :, None], part.float(), 0.0) for part in (keys, values))
    grouped = queries.float().unflatten(2, (keys.shape[1], -1))
    scores = torch.einsum("brhgd,bhsd->bhgrs", grouped, k) / math.sqrt(width)
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    mixed = torch.einsum("bhgrs,bhsd->brhgd", weights, v)
    return mixed.reshape(-1, rows, heads, width).to(queries.dtype)


def _seen(slots: Tensor, lengths: Tensor, visible: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """(which slots each row sees [B, R, S], which slots of a sequence hold anything [B, S])."""
    batch, rows, _ = visible.shape
    place = slots - lengths[:, None]  # of a slot among the rows
    among = unpack(visible).gather(2, place.clamp(0, rows - 1)[:, None].expand(batch, rows, len(slots)))
    prefix = (place < 0)[:, None].expand_as(among)
    if first is not None:
        prefix = prefix & (slots >= first[..., None])
    return prefix | (among & ((place >= 0) & (place < rows))[:, None]), place < rows


def cost(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, visible: Tensor, first: Tensor | None = None
) -> Work:
    """4 d FLOPs per head and pair of a row and a slot that it sees; keys and values of every sequence once, from the
    first slot that a row of it sees. Waits for the device."""
    rows, heads, width = queries.shape[1:]
    prefix = lengths[:, None].expand(-1, rows) if first is None else (lengths[:, None] - first).clamp(min=0)
    pairs = float(prefix.sum() + unpack(visible).sum())
    slots = float(prefix.amax(1).sum()) + len(lengths) * rows
    cached = 2 * slots * keys.shape[1] * width * keys.itemsize
    return Work(4.0 * pairs * heads * width, cached + queries.nbytes + visible.nbytes, queries.nbytes)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a call is cut up and compiled."""

    tile: int  # (row, query head) pairs of a program; a power of two, 16 at least
    slots: int  # loaded at a time; likewise
    splits: int  # shares of the context; a power of two is not needed
    warps: int
    stages: int


class Launch(NamedTuple):
    warps: int  # of a tile up to 64; one of 128 has twice as many
    stages: int  # of the software pipeline
    programs: int  # wanted on a unit at once, so that one computes while another waits
    slots: int  # loaded at a time, at most


# Reasoned from sizes and from what the compiler then takes, and tuned nowhere. What an H200 has run is the first row,
# as its chip was not recognised then; the other rows have run on no GPU. On CDNA3 two stages keep the next tile in
# registers. AMD's tiles are padded: 128 slots at a time would take 165 KiB of CDNA4's 160. A unit of
# theirs has four SIMDs: fewer warps would leave some idle.
TABLE = {
    "": Launch(4, 2, 1, 64),
    "gfx942": Launch(4, 2, 1, 64),
    "gfx950": Launch(4, 2, 2, 64),
    "sm90": Launch(4, 3, 2, 128),
    "sm100": Launch(4, 3, 2, 128),
}
CANDIDATES = {"warps": (2, 4, 8), "stages": (2, 3), "programs": (1, 2), "slots": (32, 64, 128)}
MOST_SPLITS = 64  # the merge of one row and head holds them all in registers
LEAST_SLOTS = 256  # of a share, or it is not worth merging


def plan(rows: int, group: int, kv_heads: int, batch: int, capacity: int, width: int, itemsize: int, chip: Chip,
         wanted: Launch) -> Plan:  # fmt: skip
    """Tiles as tall as the rows need, up to 128; as many slots as fit into a program's part of shared memory beside
    its queries; shares so that all compute units are busy once."""
    width = _power(width)
    tile = min(128, _power(rows * group))
    if width > 128:
        tile = min(tile, 64)
    programs = wanted.programs if tile <= 64 else 1
    room = chip.shared // programs - tile * width * itemsize
    buffers = wanted.stages if chip.direct else wanted.stages - 1
    fitting = room // (2 * width * itemsize * max(buffers, 1))
    slots = max(16, min(wanted.slots, 1 << max(fitting, 1).bit_length() - 1))
    tiles = -(-rows * group // tile) * kv_heads * batch
    splits = max(1, min(chip.units * programs // tiles, capacity // max(LEAST_SLOTS, 2 * slots), MOST_SPLITS))
    return Plan(tile, slots, splits, wanted.warps * (2 if tile == 128 else 1), wanted.stages)


def _power(number: int) -> int:
    """The next power of two that a matrix unit takes."""
    return max(16, 1 << (number - 1).bit_length())


def launch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    visible: Tensor,
    first: Tensor | None = None,
    chosen: Plan | None = None,
) -> Tensor:
    """See `reference`. The last dimension is contiguous, others have any strides; `visible` and `first` are contiguous.
    Nothing is asked of the device, and what is launched follows from shapes alone."""
    batch, rows, heads, width = queries.shape
    kv_heads, capacity = keys.shape[1:3]
    group = heads // kv_heads
    if chosen is None:
        chip, wanted = chips.of(queries.device), chips.pick(TABLE, queries.device)
        chosen = plan(rows, group, kv_heads, batch, capacity, width, keys.itemsize, chip, wanted)
    tiles = -(-rows * group // chosen.tile)
    out = torch.empty(batch, rows, heads, width, dtype=queries.dtype, device=queries.device)
    shares = (batch, kv_heads, rows * group, chosen.splits)
    parts, weights = (
        (out, out) if chosen.splits == 1
        else (out.new_empty(*shares, width, dtype=torch.float32), out.new_empty(shares, dtype=torch.float32))
    )  # fmt: skip
    sizes = {"GROUP": group, "KV": kv_heads, "WIDTH": width, "BLOCK_D": _power(width), "SPLITS": chosen.splits}
    with torch.cuda.device_of(queries):
        jit.compiled(_split)[(tiles, chosen.splits, batch * kv_heads)](
            queries, keys, values, lengths, visible, lengths if first is None else first, out, parts, weights,
            rows, math.log2(math.e) / math.sqrt(width), *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            **sizes, WORDS=visible.shape[-1], BLOCK_M=chosen.tile, BLOCK_N=chosen.slots, STAGES=chosen.stages,
            WINDOWED=first is not None, WIDE=jit.interpreted(), num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
        if chosen.splits > 1:
            jit.compiled(_merge)[(rows * group, batch * kv_heads)](
                parts, weights, out, rows, **sizes, BLOCK_S=1 << (chosen.splits - 1).bit_length(), num_warps=4
            )
    return out


def _split(
    queries, keys, values, lengths, visible, first, out, parts, weights, rows, scale,
    query_b, query_r, query_h, key_b, key_h, key_s, value_b, value_h, value_s,
    GROUP: tl.constexpr, KV: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, WINDOWED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows and query heads, a share of the slots, one key head of one sequence."""
    split = tl.program_id(1)
    sequence = (tl.program_id(2) // KV).to(tl.int64)
    head = tl.program_id(2) % KV
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = place // GROUP
    query_head = head * GROUP + place % GROUP
    alive = row < rows
    channel = tl.arange(0, BLOCK_D)
    known = channel < WIDTH
    shown = alive[:, None] & known[None, :]
    at = queries + sequence * query_b + row[:, None] * query_r + query_head[:, None] * query_h + channel[None, :]
    q = tl.load(at, mask=shown, other=0)
    if WIDE:
        q = q.to(tl.float32)

    length = tl.load(lengths + sequence).to(tl.int32)
    total = length + rows
    whole = length // BLOCK_N * BLOCK_N  # up to here all slots of a load are in the prefix
    origin = 0
    if WINDOWED:
        begin = tl.load(first + sequence * rows + row, mask=alive, other=2**31 - 1).to(tl.int32)
        origin = tl.minimum(tl.min(begin, 0), length) // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(total - origin, BLOCK_N), SPLITS) * BLOCK_N
    low = origin + split * share
    high = tl.minimum(low + share, total)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    bits = visible + (sequence * rows + row) * WORDS
    key = keys + sequence * key_b + head * key_h
    value = values + sequence * value_b + head * value_h
    for MASKED in tl.static_range(2):  # loads within the prefix, then those that touch the rows
        if MASKED:
            one, end = tl.maximum(low, whole), high
        else:
            one, end = low, tl.minimum(high, whole)
        for start in tl.range(one, end, BLOCK_N, num_stages=1 if MASKED else STAGES):
            slot = start + tl.arange(0, BLOCK_N)
            at_key = key + slot[None, :] * key_s + channel[:, None]
            at_value = value + slot[:, None] * value_s + channel[None, :]
            if MASKED:  # what is behind the rows may be NaN, which no weight makes harmless
                written = slot < total
                k = tl.load(at_key, mask=known[:, None] & written[None, :], other=0)
                v = tl.load(at_value, mask=written[:, None] & known[None, :], other=0)
            elif WIDTH < BLOCK_D:
                k = tl.load(at_key, mask=known[:, None], other=0)
                v = tl.load(at_value, mask=known[None, :], other=0)
            else:
                k = tl.load(at_key)
                v = tl.load(at_value)
            if WIDE:
                k = k.to(tl.float32)
            scores = tl.dot(q, k, input_precision="ieee") * scale
            if MASKED:
                column = slot - length
                among = alive[:, None] & ((column >= 0) & (column < rows))[None, :]
                word = tl.load(bits[:, None] + (column >> 5)[None, :], mask=among, other=0)
                seen = (word >> (column & 31)[None, :]) & 1 != 0
                prefix = (column < 0)[None, :]
                if WINDOWED:
                    prefix = prefix & (slot[None, :] >= begin[:, None])
                scores = tl.where(seen | prefix, scores, float("-inf"))
            elif WINDOWED:
                scores = tl.where(slot[None, :] >= begin[:, None], scores, float("-inf"))
            new = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(scores - base[:, None])
            fade = tl.exp2(top - base)
            norm = norm * fade + tl.sum(p, 1)
            p = p.to(v.dtype)
            if WIDE:
                p = p.to(tl.float32)
                v = v.to(tl.float32)
            mixed = tl.dot(p, v, mixed * fade[:, None], input_precision="ieee")
            top = new

    mixed = mixed / tl.where(norm == 0.0, 1.0, norm)[:, None]
    if SPLITS == 1:
        at = (sequence * rows + row)[:, None] * (KV * GROUP * WIDTH) + query_head[:, None] * WIDTH + channel[None, :]
        tl.store(out + at, mixed.to(out.dtype.element_ty), mask=shown)
    else:
        own = ((sequence * KV + head) * rows * GROUP + place) * SPLITS + split
        tl.store(weights + own, top + tl.log2(tl.where(norm == 0.0, 1.0, norm)), mask=alive)
        tl.store(parts + own[:, None] * WIDTH + channel[None, :], mixed, mask=shown & (norm > 0.0)[:, None])


def _merge(
    parts, weights, out, rows,
    GROUP: tl.constexpr, KV: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: a row and query head, all shares at once. A share that saw nothing was never written."""
    place = tl.program_id(0)
    sequence = (tl.program_id(1) // KV).to(tl.int64)
    head = tl.program_id(1) % KV
    split = tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_D)
    own = ((sequence * KV + head) * rows * GROUP + place) * SPLITS + split
    weight = tl.load(weights + own, mask=split < SPLITS, other=float("-inf"))
    base = tl.max(weight, 0)
    weight = tl.exp2(weight - tl.where(base == float("-inf"), 0.0, base))
    shown = (weight > 0.0)[:, None] & (channel < WIDTH)[None, :]
    part = tl.load(parts + own[:, None] * WIDTH + channel[None, :], mask=shown, other=0.0)
    norm = tl.sum(weight, 0)
    mixed = tl.sum(part * weight[:, None], 0) / tl.where(norm == 0.0, 1.0, norm)
    at = (sequence * rows + place // GROUP) * (KV * GROUP * WIDTH) + (head * GROUP + place % GROUP) * WIDTH
    tl.store(out + at + channel, mixed.to(out.dtype.element_ty), mask=channel < WIDTH)


def example(device: torch.device, seed: int) -> tuple[Any, ...]:
    """Three sequences, one of them empty; trees; heads of 80 dimensions; in bfloat16, NaN behind the rows; several
    shares, as the capacity has it."""
    return random_call(device, torch.bfloat16, seed, (0, 90, 41), rows=5, heads=6, kv_heads=2, width=80, capacity=1100)


def random_call(
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    lengths: tuple[int, ...],
    rows: int,
    heads: int,
    kv_heads: int,
    width: int,
    capacity: int | None = None,
    visible: Tensor | None = None,
) -> tuple[Any, ...]:
    """Arguments of a call with random contents, NaN behind the rows; `visible` [B, R, R] defaults to random trees."""
    generator = torch.Generator(device).manual_seed(seed)
    batch = len(lengths)
    capacity = max(lengths) + rows + 7 if capacity is None else capacity

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    if visible is None:
        visible = torch.eye(rows, dtype=torch.bool, device=device).repeat(batch, 1, 1)
        for row in range(1, rows):
            parent = torch.randint(-1, row, (batch,), generator=generator, device=device)
            visible[:, row] |= visible[torch.arange(batch, device=device), parent.clamp(min=0)] & (parent >= 0)[:, None]
    keys, values = normal(batch, kv_heads, capacity, width), normal(batch, kv_heads, capacity, width)
    begun = torch.tensor(lengths, device=device)
    behind = torch.arange(capacity, device=device) >= begun[:, None] + rows
    for part in (keys, values):
        part.masked_fill_(behind[:, None, :, None], torch.nan)
    return normal(batch, rows, heads, width), keys, values, begun, pack(visible.to(device))


def cases(device: torch.device) -> list[Case]:
    """One sequence and the heads of an 8B model, 32 over 8 of 128 dimensions, in bfloat16; all rows see each other."""
    rows, contexts = ((16, 64), (512, 2048)) if device.type == "cpu" else ((16, 64, 272), (4096, 16384, 65536))

    def make(rows: int, context: int) -> Callable[[int], tuple[Any, ...]]:
        visible = torch.ones(1, rows, rows, dtype=torch.bool)
        return lambda seed: random_call(
            device, torch.bfloat16, seed, (context,), rows, 32, 8, 128, capacity=context + rows, visible=visible
        )

    return [Case(f"{r} rows, context {c:,}", make(r, c)) for c in contexts for r in rows]


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, visible: Tensor) -> Callable[[], Tensor]:
    """torch's own over the whole cache, with a dense mask that is made beforehand."""
    seen, _ = _seen(torch.arange(keys.shape[2], device=keys.device), lengths, visible, None)
    turned, mask = queries.transpose(1, 2), seen[:, None]

    def call() -> Tensor:
        mixed = F.scaled_dot_product_attention(turned, keys, values, attn_mask=mask, enable_gqa=True)
        return mixed.transpose(1, 2)

    return call


def _flex(queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, visible: Tensor) -> Callable[[], Tensor]:
    """FlexAttention, compiled, with a block mask that is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask

    if queries.device.type != "cuda":
        raise Unavailable(f"timed on GPUs only, device is {queries.device.type}")
    batch, rows = queries.shape[:2]
    among = unpack(visible)

    def seen(b: Tensor, _: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        place = slot - lengths[b]
        return (place < 0) | (among[b, row, place.clamp(0, rows - 1)] & (place < rows))

    blocks = create_block_mask(seen, batch, None, rows, keys.shape[2], device=str(queries.device))
    turned = queries.transpose(1, 2).contiguous()
    return lambda: _compiled_flex()(turned, keys, values, block_mask=blocks, enable_gqa=True).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


KERNEL = Kernel(
    "block_attention",
    reference,
    launch,
    cost,
    example,
    tolerance=1e-2,
    cases=cases,
    rivals={"scaled_dot_product_attention": _sdpa, "FlexAttention": _flex},
    table=TABLE,
    candidates=CANDIDATES,
)
