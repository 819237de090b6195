"""From logits to tokens: greedy, or drawn from the filtered distribution with one seed per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from zbench.kernels import cpu


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
    """logits [..., V] float32 -> the float32 distribution [..., V] that sampling draws from (temperature > 0).

    top_p keeps the smallest set of most likely tokens whose mass reaches it (Holtzman et al. 2020, arXiv 1904.09751).
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probs = logits.softmax(-1)
    if sampling.top_p < 1.0:
        ordered, order = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, order, before >= sampling.top_p)
        probs = probs.masked_fill(dropped, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF draw: probs [..., V] (need not sum to 1), uniforms [...] in [0, 1) float64 -> token ids [...].

    A token depends on its own distribution and its own uniform only, never on what else is in the batch.
    """
    cumulative = probs.double().cumsum(-1)
    target = uniforms[..., None] * cumulative[..., -1:]
    # First index whose cumulative mass exceeds the target: a token of probability zero is never drawn.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)


def on_device(index: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Host integers as a device tensor, without waiting for the work queued there (a plain copy would)."""
    return torch.as_tensor(index).to(device, non_blocking=True)


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
