"""The loss that every objective ends in: cross-entropy of a vocabulary's logits against sparse targets."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CHUNK = {"cpu": 256, "cuda": 8192}  # rows whose logits exist at the same time: fit a cache, or fill a GPU
OTHERS = 4096  # tokens that stand for all that are no target of a step, see `sampled_head`
ALIGNED = 64  # matrices of other widths are multiplied at a fraction of the speed on a GPU


def head_loss(
    hidden: Tensor,
    head: Tensor,
    target_ids: Tensor,
    target_probs: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    best: int = 1,
) -> tuple[Tensor, Tensor]:
    """sum_n weights[n] * H(target n, softmax(hidden[n] head^T + bias)), and the likeliest tokens of each row [N, best].

    hidden [N, D], head [V, D], bias [V] float32, not learnt; a row's target has probability target_probs [N, K] at
    target_ids [N, K] (an id may come twice) and none elsewhere; where they sum to less than 1 the rest is not asked
    for. The logits of a chunk live only while its gradient is made, so memory does not grow with N times V.
    """
    return _HeadLoss.apply(hidden, head, target_ids, target_probs, weights, bias, best)


def sampled_head(
    head: Tensor, target_ids: Tensor, others: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A head over fewer tokens: those in `target_ids`, and `others` of the rest or some more, drawn evenly.

    Returns its weight [n, D], its bias [n], which makes the drawn ones count for all of the rest in the normaliser
    (importance sampling, Bengio & Senecal 2008), and `target_ids` as rows of it. For a frozen head that costs more
    than the layers before it; what is likeliest over all tokens it does not know.
    """
    wanted = torch.zeros(len(head), dtype=torch.bool, device=head.device)
    wanted[target_ids.flatten()] = True
    known, rest = wanted.nonzero().squeeze(1), (~wanted).nonzero().squeeze(1)
    others += -(len(known) + others) % ALIGNED
    drawn = torch.randperm(len(rest), generator=generator)[:others].to(head.device)
    kept = torch.cat([known, rest[drawn]])
    bias = torch.zeros(len(kept), device=head.device)
    if len(drawn):
        bias[-len(drawn) :] = math.log(len(rest) / len(drawn))
    rows = torch.empty(len(head), dtype=torch.int64, device=head.device)
    rows[kept] = torch.arange(len(kept), device=head.device)
    return head[kept], bias, rows[target_ids]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        ids: Tensor,
        probs: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        count: int,
    ) -> tuple[Tensor, Tensor]:
        learns = hidden.requires_grad or head.requires_grad
        total = torch.zeros((), device=hidden.device)
        best = torch.empty(len(hidden), count, dtype=torch.int64, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if learns else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if head.requires_grad else None
        chunk = CHUNK[hidden.device.type]
        for begin in range(0, len(hidden), chunk):
            rows = slice(begin, begin + chunk)
            weighted = probs[rows].float() * weights[rows, None]
            mass = weighted.sum(1)
            logits = (hidden[rows] @ head.T).float()
            if bias is not None:
                logits += bias
            best[rows] = logits.topk(count).indices
            norm = logits.logsumexp(1)
            total += (mass * norm).sum() - (weighted * logits.gather(1, ids[rows])).sum()
            if d_hidden is None:
                continue
            d_logits = logits.sub_(norm[:, None]).exp_().mul_(mass[:, None])
            d_logits.scatter_add_(1, ids[rows], -weighted)
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[rows] = d_logits @ head
            if d_head is not None:
                d_head += d_logits.T @ hidden[rows]
        ctx.gradients = d_hidden, d_head
        ctx.mark_non_differentiable(best)
        return total, best

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.gradients
        scale = outputs[0]
        return (
            d_hidden * scale if ctx.needs_input_grad[0] else None,
            (d_head * scale).to(torch.float32) if ctx.needs_input_grad[1] else None,
            *[None] * 5,
        )
