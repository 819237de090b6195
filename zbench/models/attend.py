"""What the attention of all layers shares in one forward, and what runs it on a device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.kernels import attention, registry
from zbench.models.cache import Cache
from zbench.models.rows import Rows

Packed = tuple[Tensor, Tensor, Tensor | None]  # lengths, visible, first: see `attention.reference`
Seen = Tensor | Packed  # what rows see, as the attention of the device takes it; the tensor [B, 1, R, span] bool
Masks = Callable[[int | None], Seen]  # by the sliding window: a row sees keys fewer positions behind it; None: all


@dataclass(frozen=True, slots=True)
class BlockAttention:
    """Attention of rows over the prefix of a cache and over each other, behind which they were written already."""

    # (queries [B, R, H, d], keys and values [B, kv, S, d] of a layer, Seen) -> [B, R, H d]
    attend: Callable[[Tensor, Tensor, Tensor, Seen], Tensor]
    # For the rows of one forward; the first `span` slots of the cache hold the prefixes and the rows.
    masks: Callable[[Rows, Cache, int], Masks]
    label: str  # for the run's record
    spans: bool  # whether `span` decides on what is computed


def block_attention(choice: registry.Choice) -> BlockAttention:
    """The Triton kernel where that is the choice, else torch's own attention, which is faster than its reference."""
    if choice.call is attention.KERNEL.reference:
        return BlockAttention(_dense, _dense_masks, choice.label.replace("torch", "torch sdpa", 1), True)
    return BlockAttention(functools.partial(_packed, choice.call), _packed_masks, choice.label, False)


def _dense(queries: Tensor, keys: Tensor, values: Tensor, seen: Seen) -> Tensor:
    assert isinstance(seen, Tensor)
    span = seen.shape[-1]
    mixed = F.scaled_dot_product_attention(
        queries.transpose(1, 2), keys[:, :, :span], values[:, :, :span], attn_mask=seen, enable_gqa=True
    )
    return mixed.transpose(1, 2).flatten(2)


def _packed(call: Callable[..., Tensor], queries: Tensor, keys: Tensor, values: Tensor, seen: Seen) -> Tensor:
    return call(queries, keys, values, *seen).flatten(2)


def _dense_masks(rows: Rows, cache: Cache, span: int) -> Masks:
    whole = attention_mask(rows, cache, span)

    @functools.cache  # layers with the same window share their mask
    def within(window: int | None) -> Seen:
        return whole if window is None else whole & within_window(rows, cache, span, window)

    return within


def _packed_masks(rows: Rows, cache: Cache, span: int) -> Masks:
    """The kernel has the lengths from the device, and so needs no span."""

    @functools.cache
    def within(window: int | None) -> Seen:
        if window is None:
            return cache.lengths, attention.pack(rows.visible), None
        first = rows.positions - window + 1  # a committed key's slot is its position
        among = rows.visible & (rows.positions[:, None] >= first[..., None])
        return cache.lengths, attention.pack(among), first.clamp(min=0)

    return within


def attention_mask(rows: Rows, cache: Cache, total: int) -> Tensor:
    """[B, 1, R, total] bool over cache slots: the committed prefix, then what `visible` allows."""
    batch, count = rows.ids.shape
    relative = torch.arange(total, device=rows.ids.device) - cache.lengths[:, None]  # [B, total]
    index = relative.clamp(0, count - 1)[:, None].expand(batch, count, total)
    seen = rows.visible.gather(2, index) & ((relative >= 0) & (relative < count))[:, None]
    return (seen | (relative < 0)[:, None])[:, None]


def within_window(rows: Rows, cache: Cache, total: int, window: int) -> Tensor:
    """[B, 1, R, total] bool: keys fewer than `window` positions behind the row."""
    batch, count = rows.ids.shape
    slots = torch.arange(total, device=rows.ids.device).expand(batch, total)
    relative = slots - cache.lengths[:, None]
    new = rows.positions.gather(1, relative.clamp(0, count - 1))
    positions = torch.where(relative < 0, slots, new)  # a committed key's slot is its position
    return (positions[:, None] > rows.positions[..., None] - window)[:, None]
