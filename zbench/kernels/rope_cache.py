"""From the projection to attention's inputs in one pass: norms of queries and keys, rotary positions, cache write."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zbench.kernels import chips, jit
from zbench.kernels.add_norm import rms_norm
from zbench.kernels.registry import Case, Kernel, Work

if TYPE_CHECKING:
    import triton.language as tl


class Launch(NamedTuple):
    warps: int  # for one head of one row


# A head of 128 is 4 values for each of 32 lanes, 2 for each of 64. By reasoning, tuned nowhere.
TABLE = {"": Launch(1), "gfx942": Launch(1), "gfx950": Launch(1), "sm90": Launch(1), "sm100": Launch(1)}
CANDIDATES = {"warps": (1, 2, 4)}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, pairs (i, i + d/2) (Su et al. 2021, arXiv 2104.09864). x [B, R, H, d], cos [B, R, 1, d/2]."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> Tensor:
    """qkv [B, R, (H + 2 kv) d], queries first, then keys, then values -> the queries [B, R, H, d].

    cos, sin [B, R, 1, r / 2] float32 turn the first r dimensions of each head, the others stay; keys, values
    [B, kv, S, d] are written at slots [B, R]; the norms' weights [d], of qkv's dtype, act before the rotation.
    """
    batch, rows, _ = qkv.shape
    kv_heads, width, turned = keys.shape[1], keys.shape[3], 2 * cos.shape[-1]
    heads = qkv.shape[-1] // width - 2 * kv_heads
    q, k, v = qkv.view(batch, rows, -1, width).split((heads, kv_heads, kv_heads), 2)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    if turned == width:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    else:
        q, k = (torch.cat([rotate(x[..., :turned], cos, sin), x[..., turned:]], -1) for x in (q, k))
    sequence = torch.arange(batch, device=qkv.device)[:, None]
    keys[sequence, :, slots] = k
    values[sequence, :, slots] = v
    return q


def launch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> Tensor:
    """As `reference`. The caches' last dimension is contiguous, the others have any strides, which both share."""
    batch, rows, _ = qkv.shape
    kv_heads, width = keys.shape[1], keys.shape[3]
    heads = qkv.shape[-1] // width - 2 * kv_heads
    qkv = qkv.contiguous()
    queries = torch.empty(batch, rows, heads, width, dtype=qkv.dtype, device=qkv.device)
    normed = q_norm is not None and k_norm is not None
    with torch.cuda.device_of(qkv):
        jit.compiled(_rope_cache)[(batch * rows, heads + 2 * kv_heads)](
            qkv, cos.contiguous(), sin.contiguous(), q_norm if normed else None, k_norm if normed else None, eps,
            queries, keys, values, slots.contiguous(), rows, *keys.stride()[:3],
            HEADS=heads, KV=kv_heads, WIDTH=width, HALF=cos.shape[-1], BLOCK=1 << (width - 1).bit_length(),
            num_warps=chips.pick(TABLE, qkv.device).warps,
        )  # fmt: skip
    return queries


def _rope_cache(
    qkv, cos, sin, q_norm, k_norm, eps, queries, keys, values, slots, rows, by_sequence, by_head, by_slot,
    HEADS: tl.constexpr, KV: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row. A channel and its partner are both loaded, so that nothing is exchanged."""
    flat = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    turns = channel < 2 * HALF
    origin = qkv + (flat * (HEADS + 2 * KV) + head) * WIDTH
    slot = flat // rows * by_sequence + tl.load(slots + flat) * by_slot + channel
    stored = queries.dtype.element_ty
    loaded = tl.load(origin + channel, mask=inside, other=0.0)
    if head >= HEADS + KV:
        tl.store(values + slot + (head - HEADS - KV) * by_head, loaded, mask=inside)
    else:
        partner = tl.where(channel < HALF, channel + HALF, channel - HALF)
        y = tl.load(origin + partner, mask=turns, other=0.0).to(tl.float32)
        x = loaded.to(tl.float32)
        if q_norm is not None:
            scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
            weight = q_norm
            if head >= HEADS:
                weight = k_norm
            own = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
            its = tl.load(weight + partner, mask=turns, other=0.0).to(tl.float32)
            # Rounded where the reference rounds.
            x = ((x * scale).to(stored).to(tl.float32) * own).to(stored).to(tl.float32)
            y = ((y * scale).to(stored).to(tl.float32) * its).to(stored).to(tl.float32)
        angle = flat * HALF + tl.where(channel < HALF, channel, channel - HALF)
        c = tl.load(cos + angle, mask=turns, other=1.0)
        s = tl.load(sin + angle, mask=turns, other=0.0)
        turned = (x * c + tl.where(channel < HALF, -y, y) * s).to(stored)
        if head < HEADS:
            tl.store(queries + (flat * HEADS + head) * WIDTH + channel, turned, mask=inside)
        else:
            tl.store(keys + slot + (head - HEADS) * by_head, turned, mask=inside)


def cost(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> Work:
    """Everything read once and written once; three operations for each turned value, four for each normalised."""
    rows, kv_heads, width = slots.numel(), keys.shape[1], keys.shape[3]
    heads = qkv.shape[-1] // width - 2 * kv_heads
    per_head = 3.0 * 2 * cos.shape[-1] + (4.0 * width if q_norm is not None else 0.0)
    norms = sum(weight.nbytes for weight in (q_norm, k_norm) if weight is not None)
    read = qkv.nbytes + cos.nbytes + sin.nbytes + norms + slots.nbytes
    return Work(rows * (heads + kv_heads) * per_head, float(read), float(qkv.nbytes))


def example(device: torch.device, seed: int) -> tuple[Any, ...]:
    """Even seeds: norms, the whole of heads of 48 dimensions turns; odd ones: no norms, half of it."""
    generator = torch.Generator().manual_seed(seed)
    batch, rows, heads, kv_heads, width = 2, 3, 4, 2, 48

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    angles = torch.rand(batch, rows, 1, width // (4 if seed % 2 else 2), generator=generator).to(device) * 6
    norms = (None, None) if seed % 2 else (normal(width), normal(width))
    keys, values = normal(batch, kv_heads, 16, width), normal(batch, kv_heads, 16, width)
    slots = torch.tensor([[0, 1, 2], [13, 14, 15]], device=device)
    qkv = normal(batch, rows, (heads + 2 * kv_heads) * width)
    return qkv, angles.cos(), angles.sin(), *norms, 1e-6, keys, values, slots


def cases(device: torch.device) -> list[Case]:
    """An 8B model's heads in bfloat16, a cache of 4096 (on a CPU a quarter of each): a token, a verify, TiDAR steps."""
    heads, kv_heads, slots = (8, 2, 1024) if device.type == "cpu" else (32, 8, 4096)

    def make(rows: int, seed: int, width: int = 128) -> tuple[Any, ...]:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(device, torch.bfloat16)

        angles = torch.rand(1, rows, 1, width // 2, generator=g).to(device) * 6
        norms = normal(width), normal(width)
        keys, values = (torch.zeros(1, kv_heads, slots, width, dtype=torch.bfloat16, device=device) for _ in range(2))
        qkv = normal(1, rows, (heads + 2 * kv_heads) * width)
        place = torch.arange(slots // 2, slots // 2 + rows, device=device)[None]
        return qkv, angles.cos(), angles.sin(), *norms, 1e-6, keys, values, place

    return [Case(f"{rows} rows, {heads} and {kv_heads} heads", partial(make, rows)) for rows in (1, 16, 64, 272)]


KERNEL = Kernel(
    "rope_cache", reference, launch, cost, example, tolerance=1e-2, cases=cases, examples=2, table=TABLE,
    candidates=CANDIDATES,
)  # fmt: skip
