"""From logits to tokens: greedy, or drawn from the filtered distribution with one seed per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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

    top_p keeps the smallest set of most likely tokens whose mass reaches top_p (Holtzman et al. 2020, arXiv 1904.09751).
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
    """Inverse-CDF draw: probs [B, V], uniforms [B] in [0, 1) float64 -> token ids [B].

    A token depends on its own distribution and its own uniform only, never on what else is in the batch.
    """
    cumulative = probs.double().cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    # First index whose cumulative mass exceeds the target: a token of probability zero is never drawn.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)


class Sampler:
    """Draws the t-th token of each request from the t-th number of that request's own stream."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int], limit: int, device: torch.device) -> None:
        self.sampling = sampling
        if not sampling.greedy:
            streams = [torch.rand(limit, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
            self._uniforms = torch.stack(streams).to(device)

    def pick(self, logits: Tensor, index: Sequence[int]) -> Tensor:
        """logits [B, V]; index[b] is the output position being filled -> token ids [B]."""
        if self.sampling.greedy:
            return logits.argmax(-1)
        rows = torch.arange(len(index), device=logits.device)
        columns = torch.tensor(index, device=logits.device).clamp(max=self._uniforms.shape[1] - 1)
        return draw(probabilities(logits, self.sampling), self._uniforms[rows, columns])
