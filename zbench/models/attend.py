"""What the attention of all layers shares in one forward, and what runs it on this device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.kernels import attention, registry
from zbench.models.cache import Cache
from zbench.models.rows import Rows


class BlockAttention:
    """Attention of a device: the Triton kernel where it is proven, else torch's own over a dense mask, which is faster
    than the kernel's reference. `label` says which, for the run's record."""

    def __init__(self, device: torch.device) -> None:
        call, label = registry.choose(attention.KERNEL.name, device)
        self.kernel = None if call is attention.KERNEL.reference else call
        self.label = label if self.kernel else label.replace("torch", "torch sdpa", 1)

    def of(self, rows: Rows, cache: Cache, span: int) -> Attend:
        """For the rows of one forward; the first `span` slots of the cache hold the prefixes and the rows."""
        return Attend(self.kernel, rows, cache, span)


class Attend:
    """Rows over the prefix of a cache and over each other, after their keys and values were written behind it."""

    def __init__(self, kernel: Callable[..., Tensor] | None, rows: Rows, cache: Cache, span: int) -> None:
        self._kernel, self._rows, self._cache, self._span = kernel, rows, cache, span
        self._whole = attention.pack(rows.visible) if kernel else attention_mask(rows, cache, span)
        self._windows: dict[int, tuple[Tensor, Tensor | None]] = {}  # layers with the same window share their mask

    def __call__(self, index: int, queries: Tensor, window: int | None = None) -> Tensor:
        """queries [B, R, H, d] of layer `index` -> [B, R, H d]. `window`: a row sees keys fewer positions behind it."""
        mask, first = (self._whole, None) if window is None else self._within(window)
        keys, values = self._cache.keys[index], self._cache.values[index]
        if self._kernel:
            return self._kernel(queries, keys, values, self._cache.lengths, mask, first).flatten(2)
        mixed = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys[:, :, : self._span], values[:, :, : self._span], attn_mask=mask,
            enable_gqa=True,
        )  # fmt: skip
        return mixed.transpose(1, 2).flatten(2)

    def _within(self, window: int) -> tuple[Tensor, Tensor | None]:
        """The mask of a sliding window; for the kernel also the first slot of the prefix that each row sees."""
        if window not in self._windows:
            rows, first = self._rows, self._rows.positions - window + 1  # a committed key's slot is its position
            if self._kernel:
                among = rows.visible & (rows.positions[:, None] >= first[..., None])
                self._windows[window] = (attention.pack(among), first.clamp(min=0))
            else:
                self._windows[window] = (self._whole & within_window(rows, self._cache, self._span, window), None)
        return self._windows[window]


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
