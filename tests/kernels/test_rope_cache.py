"""Norms, rotary positions and the cache write against float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zbench.kernels import rope_cache

# Of a norm. Triton's interpreter cuts bfloat16 off where a GPU rounds: twice a unit of last place, three times.
ALLOWED = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 3 * 2**-7}


def exactly(x: torch.Tensor, weight: torch.Tensor | None, angles: torch.Tensor, eps: float) -> torch.Tensor:
    """x [B, R, H, d] float64, normalised and turned, pairs as complex numbers; angles [B, R, r / 2]."""
    if weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    half = angles.shape[-1]
    pairs = torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous())
    pairs = pairs * torch.polar(torch.ones_like(angles.double()), angles.double())[:, :, None]
    return torch.cat([pairs.real, pairs.imag, x[..., 2 * half :]], -1)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=2),
    rows=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 1)]),
    width=st.sampled_from([16, 24, 40]),
    normed=st.booleans(),
    partial=st.booleans(),
    dtype=st.sampled_from(list(ALLOWED)),
)
def test_queries_and_cache_are_those_of_float64(
    seed: int, lengths: list[int], rows: int, heads: tuple[int, int], width: int, normed: bool, partial: bool,
    dtype: torch.dtype, device: torch.device,
) -> None:  # fmt: skip
    """Caches are poisoned, and part of wider ones: what a call does not own must stay."""
    generator = torch.Generator().manual_seed(seed)
    (q_heads, kv_heads), batch = heads, len(lengths)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    qkv = normal(batch, rows, (q_heads + 2 * kv_heads) * width)
    angles = (6 * torch.rand(batch, rows, width // (4 if partial else 2), generator=generator)).to(device)
    norms = (normal(width), normal(width)) if normed else (None, None)
    slots = torch.tensor(lengths, device=device)[:, None] + torch.arange(rows, device=device)
    q, k, v = qkv.view(batch, rows, -1, width).double().split((q_heads, kv_heads, kv_heads), 2)
    wanted = exactly(q, norms[0], angles, 1e-6), exactly(k, norms[1], angles, 1e-6), v
    sequence = torch.arange(batch, device=device)[:, None]
    for call in (rope_cache.reference, rope_cache.launch):
        stores = [torch.full((batch, kv_heads, 9, width + 8), torch.nan, device=device, dtype=dtype) for _ in range(2)]
        keys, values = (store[:, :, :8, :width] for store in stores)
        cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
        queries = call(qkv, cos, sin, *norms, 1e-6, keys, values, slots)
        found = queries, keys[sequence, :, slots], values[sequence, :, slots]
        for one, want in zip(found, wanted, strict=True):
            assert one.dtype == dtype and one.shape == want.shape
            assert (one.double() - want).norm() <= ALLOWED[dtype] * want.norm(), call.__module__
        written = batch * rows * kv_heads * width
        assert all(int(store.isfinite().sum()) == written for store in stores)
