"""Cache commit and the fused operators around attention, shaped as in an 8B model: `pytest benchmarks/kernels -s`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.kernels.against import GPU, measure, needs_gpu
from zbench.kernels import add_norm, commit, rope_cache

pytestmark = needs_gpu

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 36, 4096, 32, 8, 128  # Qwen3-8B


def normal(*shape: int) -> torch.Tensor:
    generator = torch.Generator(GPU).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=GPU).bfloat16()


@pytest.mark.parametrize("batch", [1, 8])
def test_commit(benchmark: Any, batch: int) -> None:
    keys, values = (normal(LAYERS, batch, KV_HEADS, 4096, HEAD_DIM) for _ in range(2))
    lengths = torch.full((batch,), 4000, device=GPU)
    kept = torch.tensor([0, 2, 7, 11, 24, -1], device=GPU).expand(batch, 6)
    measure(benchmark, commit.KERNEL, (keys, values, lengths, kept), f"commit, {batch} x 5 rows")


@pytest.mark.parametrize("rows", [1, 16, 64, 272])
def test_rope_cache(benchmark: Any, rows: int) -> None:
    qkv, slots = normal(1, rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM), torch.arange(rows, device=GPU)[None]
    angles = torch.rand(1, rows, 1, HEAD_DIM // 2, device=GPU)
    norms = normal(HEAD_DIM), normal(HEAD_DIM)
    keys, values = (normal(1, KV_HEADS, 4096, HEAD_DIM) for _ in range(2))
    arguments = (qkv, angles.cos(), angles.sin(), *norms, 1e-6, keys, values, slots)
    measure(benchmark, rope_cache.KERNEL, arguments, f"norms, rotary and cache write, {rows} rows")


@pytest.mark.parametrize("rows", [1, 16, 64, 272])
def test_add_norm(benchmark: Any, rows: int) -> None:
    arguments = (normal(rows, WIDTH), normal(rows, WIDTH), normal(WIDTH), 1e-6)
    measure(benchmark, add_norm.KERNEL, arguments, f"residual add and norm, {rows} rows")
