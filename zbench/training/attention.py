"""Attention of many short blocks, each over its own prefix of one context and over itself."""

from __future__ import annotations

import torch
from torch import Tensor


def block_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, anchors: Tensor) -> Tensor:
    """A blocks of B rows per sequence, all of whose rows see the context before the block's anchor and the block.

    q [S, A, B, H, d], k and v [S, A, B, kv, d]; context keys and values [S, kv, T, d]; anchors [S, A] int64.
    Returns [S, A, B, H, d].

    One product of all blocks' queries with the shared context, and small ones within the blocks: nothing is computed
    between blocks, and no context is copied per block. A dense mask over A B + T keys would cost several times that.
    """
    s, a, b, h, d = q.shape
    kv, t = keys.shape[1], keys.shape[2]
    group = h // kv
    q = (q * d**-0.5).view(s, a, b, kv, group, d).permute(0, 3, 1, 4, 2, 5)  # [S, kv, A, group, B, d]
    flat = q.reshape(s * kv, a * group * b, d)
    k, v = (x.permute(0, 3, 1, 2, 4).reshape(s * kv * a, b, d) for x in (k, v))
    steps = torch.arange(t, device=q.device)
    hidden = torch.zeros(s, 1, a, 1, t, dtype=q.dtype, device=q.device)
    hidden.masked_fill_(steps >= anchors[:, None, :, None, None], float("-inf"))
    before = torch.bmm(flat, keys.reshape(s * kv, t, d).transpose(1, 2)).view(s, kv, a, group * b, t) + hidden
    own = torch.bmm(flat.view(s * kv * a, group * b, d), k.transpose(1, 2)).view(s, kv, a, group * b, b)
    weights = torch.cat([before, own], -1).softmax(-1)
    on_context, on_own = weights.split((t, b), -1)
    mixed = torch.bmm(on_context.reshape(s * kv, a * group * b, t), values.reshape(s * kv, t, d))
    mixed = mixed + torch.bmm(on_own.reshape(s * kv * a, group * b, b), v).view_as(mixed)
    return mixed.view(s, kv, a, group, b, d).permute(0, 2, 4, 1, 3, 5).reshape(s, a, b, h, d)


def draw_anchors(allowed: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` different places per sequence where allowed [S, T], at random: [S, A], and whether each is real [S, A].

    A sequence with too few gets places that are not allowed, marked as not real; there are as many as the one with the
    most has, and at least one.
    """
    count = min(count, max(int(allowed.sum(1).max()), 1))
    noise = torch.rand(allowed.shape, generator=generator).to(allowed.device)
    chosen = (noise + allowed).topk(count, 1).indices.sort(1).values
    return chosen, allowed.gather(1, chosen)
