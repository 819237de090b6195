"""From logits to tokens: greedy, or drawn from the filtered distribution with one seed per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from zbench.kernels import cpu
from zbench.kernels import verify as kernel
from zbench.kernels.verify import draw as draw
from zbench.models.cache import on_device as on_device


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy. Filters apply after the temperature: top_k first, then top_p (nucleus)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [..., V] float32 -> the float32 distribution [..., V] that sampling draws from (temperature > 0)."""
    return kernel.probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)


class Purpose(IntEnum):
    """What a random number decides. An output position has one number for each, so no two decisions share one."""

    TOKEN = 0  # which token the target puts at this position: plain decoding, bonus, residual
    ACCEPT = 1  # whether the draft at this position is accepted; in synthetic acceptance, how many drafts are
    DRAFT = 2  # which token a sampling drafter proposes at this position


# A verify reaches past the limit: those tokens are cut, but whether they were accepted is still counted.
BEYOND_LIMIT = 256


class Sampler:
    """The random numbers of a batch: one stream per request, addressed by output position and purpose.

    A position is decided in one step only, and what a step drafted beyond its first rejection has no influence on
    what it commits. Numbers addressed by position may therefore be looked at again by the next step.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], limit: int, device: torch.device) -> None:
        self.sampling = sampling
        shape = (limit + BEYOND_LIMIT, len(Purpose))
        streams = [torch.rand(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        self._uniforms = torch.stack(streams).to(device)  # [B, positions, purposes]

    def uniforms(self, index: Sequence[int] | Tensor, purpose: Purpose) -> Tensor:
        """index [B] or [B, n] output positions -> float64 in [0, 1) of the same shape."""
        stream = self._uniforms[..., purpose]
        columns = on_device(index, stream.device)
        flat = columns.reshape(len(stream), -1).clamp(max=stream.shape[1] - 1)
        return stream.gather(1, flat).view(columns.shape)

    def pick(self, logits: Tensor, index: Sequence[int] | Tensor, purpose: Purpose = Purpose.TOKEN) -> Tensor:
        """logits [B, V] or [B, n, V] for the output positions index [B] or [B, n] -> token ids like index."""
        if self.sampling.greedy:
            return cpu.argmax(logits)
        return draw(probabilities(logits, self.sampling), self.uniforms(index, purpose))
