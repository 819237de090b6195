"""Static KV storage: a forward writes its rows after the committed prefix; they are kept or forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor

from zbench.kernels import cpu, registry
from zbench.models.families import AnyConfig


class Cache:
    """Keys and values of B sequences of up to `capacity` tokens each, allocated once.

    `lengths` [B] lives on the device, `sizes` mirrors it on the host so that no forward has to ask the device.
    Values are [L, B, kv_heads, S, d]; keys likewise, or in panels of 16 positions for the native CPU
    decoder (`cpu.key_panels`).
    """

    def __init__(
        self,
        config: AnyConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        panels: bool = False,
    ) -> None:
        self.capacity = -(-capacity // cpu.PANEL) * cpu.PANEL
        self.panels = panels
        shape = (config.layers, batch, config.kv_heads, self.capacity, config.head_dim)
        # Zeros, not garbage: an invisible row is multiplied by zero, and 0 x NaN is NaN.
        if panels:
            self.keys, self.values = (cpu.Pages().zeros(shape, dtype) for _ in range(2))
        else:
            self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        # On a CPU a step writes the lengths as they are, which costs less than two of torch's operators.
        self._shared = self.lengths.numpy() if self.lengths.device.type == "cpu" else None
        self.sizes = [0] * batch
        self.pending: Any = None  # what the last forward left for `commit`, beside keys and values

    @torch.inference_mode()
    def emptied(self) -> Self:
        """See `execution.Memory`."""
        cache = copy(self)
        cache.keys.zero_(), cache.values.zero_()
        cache.truncate([0] * len(self.sizes))
        cache.pending = None
        return cache

    def extend(self, counts: Sequence[int]) -> None:
        """Commit the first counts[b] rows of the last forward: nothing moves."""
        self._grow(counts)

    def commit(self, kept: Tensor, counts: Sequence[int]) -> None:
        """Commit rows `kept` [B, K] of the last forward, ascending, -1 padded after counts[b] of them."""
        if self.panels:
            slots = torch.where(kept >= 0, kept + self.lengths[:, None], kept)
            cpu.commit(self.keys, self.values, self.capacity, self.lengths, slots.contiguous())
        else:
            registry.choose("commit", self.keys.device).call(self.keys, self.values, self.lengths, kept)
        self._grow(counts)

    def truncate(self, sizes: Sequence[int]) -> None:
        """Forget committed tokens beyond sizes[b]."""
        if any(new > old for new, old in zip(sizes, self.sizes, strict=True)):
            raise ValueError(f"cannot truncate {self.sizes} to {list(sizes)}")
        self.sizes = list(sizes)
        self.lengths.copy_(torch.tensor(self.sizes))

    def _grow(self, counts: Sequence[int]) -> None:
        self.sizes = [size + count for size, count in zip(self.sizes, counts, strict=True)]
        if self._shared is not None:
            self._shared[:] = self.sizes
        else:
            self.lengths += on_device(counts, self.lengths.device)


def on_device(values: Sequence[float] | Sequence[Sequence[int]] | Tensor, device: torch.device) -> Tensor:
    """Host numbers as a device tensor, without waiting for the work queued there (a plain copy would)."""
    return torch.as_tensor(values).to(device, non_blocking=True)
