"""Acceptance at a vocabulary of 152k against the chain of torch operators: `pytest benchmarks/kernels -s`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.kernels.against import GPU, measure, needs_gpu
from zbench.kernels import verify
from zbench.kernels.verify import Drafts, Draws, Mix

pytestmark = needs_gpu

VOCAB, ROWS = 151_936, 16  # Qwen3's; a chain of 15 drafts or a tree of as many


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", ["greedy", "sampled", "tree", "drawn", "mixed", "forced"])
def test_verify(benchmark: Any, kind: str, batch: int) -> None:
    measure(benchmark, verify.KERNEL, call(kind, batch), f"verify, {kind}, {batch} x {ROWS} rows")


def call(kind: str, batch: int) -> tuple[Any, ...]:
    """Drafts are the target's own argmax, so that sampled ones are kept for some rows and then refused."""
    generator = torch.Generator(GPU).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=GPU)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=GPU, dtype=torch.float64)

    logits = 3 * normal(batch, ROWS, VOCAB)
    parents = torch.arange(-1, ROWS - 1, device=GPU).expand(batch, ROWS)
    if kind == "tree":
        parents = torch.tensor([-1, *((row - 1) // 3 for row in range(1, ROWS))], device=GPU).expand(batch, ROWS)
    favoured = torch.randint(VOCAB, (batch, ROWS), generator=generator, device=GPU)
    logits.scatter_(2, favoured[..., None], 18.0)  # most of the mass
    drafts = Drafts(
        favoured.gather(1, parents.clamp(min=0)),
        parents if kind == "tree" else None,
        probs=(logits[:, :-1] + 0.3 * normal(batch, ROWS - 1, VOCAB)).softmax(-1) if kind == "drawn" else None,
        forced=torch.full((batch,), 4, device=GPU) if kind == "forced" else None,
    )
    draws = Draws(0.0 if kind == "greedy" else 1.0, token=uniform(batch, ROWS), accept=uniform(batch, ROWS - 1))
    mix = Mix(normal(batch, ROWS, VOCAB), torch.arange(ROWS, device=GPU), 0.9) if kind == "mixed" else None
    return logits, drafts, draws, mix
