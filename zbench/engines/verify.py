"""Acceptance: which drafts a target forward confirms, and the token that follows them. No host sync, no token loop.

Three rules, all of which leave the target's distribution p unchanged:

    T = 0                      accept draft x iff x = argmax p
    T > 0, x drawn from q      accept x with min(1, p(x)/q(x)), else draw from norm(max(p - q, 0))
                               (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1)
    T > 0, x chosen outright   try the siblings in turn: accept x with p(x), else p(x) := 0, renormalise, next
                               (the tree rule of Miao et al. 2024, arXiv 2305.09781, with one-hot q)

The last telescopes: sibling i is accepted with probability p(x_i), and what is left is drawn as p draws it. So draw
y ~ p once; if y is among the children it is accepted, otherwise it is the bonus. Drawn with the number that plain
decoding uses at that position, the output equals plain decoding token by token, at any temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zbench.engines.sampling import Purpose, Sampler, draw, on_device, probabilities
from zbench.engines.synthetic import Synthetic
from zbench.kernels import cpu


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step gains. K is the longest path a verify could accept plus one; unused places hold -1."""

    kept: Tensor  # [B, K] rows of the verify forward to commit: row 0, then the accepted path, ascending
    counts: Tensor  # [B] rows kept = tokens gained = accepted drafts + 1
    tokens: Tensor  # [B, K] accepted drafts, then the bonus token
    bonus: Tensor  # [B] the token after the accepted path


def verify_chain(
    logits: Tensor,
    drafts: Tensor,
    sampler: Sampler,
    index: Sequence[int] | Tensor,
    draft_probs: Tensor | None = None,
    synthetic: Synthetic | None = None,
    offered: Tensor | None = None,
    trusted: Tensor | None = None,
) -> Verdict:
    """logits [B, 1 + k, V] of the last committed token and the drafts [B, k]; index [B] is the output position of
    the first token to be gained. `draft_probs` [B, k, V] is q where the drafts were drawn from it, None where they
    were chosen outright. With `synthetic`, acceptance is drawn and the bonus is the target's argmax; ValueError
    if it was made for another number of drafts than k. `offered` [B] says how many of the k drafts are real (None:
    all; acceptance is cut there, and the token beyond is p's own). `trusted` [B, k] marks drafts that pass whatever
    the target says: the output is then no longer the target's.
    """
    if sampler.sampling.greedy and synthetic is None and trusted is None and cpu.can_verify(logits):
        return Verdict(*cpu.verify_chain(logits, drafts, offered))
    batch, count, _ = logits.shape
    steps = torch.arange(count, device=logits.device)
    first = on_device(index, logits.device)
    if synthetic is not None:
        made_for = len(synthetic.chances)
        if made_for < count or (offered is None and made_for != count):
            raise ValueError(f"{count - 1} drafts, but synthetic acceptance made for {made_for - 1}")
        accepted = _synthetic_count(synthetic, sampler, first)
        accepted = accepted if offered is None else torch.minimum(accepted, offered)
        bonus = _row(logits, accepted).argmax(-1)
    elif draft_probs is not None and not sampler.sampling.greedy:
        accepted, bonus = _reject(logits, drafts, draft_probs, sampler, first, offered)
    else:
        targets = sampler.pick(logits, first[:, None] + steps)
        passed = drafts == targets[:, :-1] if trusted is None else (drafts == targets[:, :-1]) | trusted
        accepted = _leading(passed if offered is None else passed & (steps[:-1] < offered[:, None]))
        bonus = _row(targets, accepted)
    drafts_and_bonus = torch.cat([drafts, bonus[:, None]], 1).scatter(1, accepted[:, None], bonus[:, None])
    gained = steps <= accepted[:, None]
    kept = steps.expand(batch, count).where(gained, -1)
    return Verdict(kept, accepted + 1, drafts_and_bonus.where(gained, -1), bonus)


def verify_tree(
    logits: Tensor,
    ids: Tensor,
    parents: Tensor,
    sampler: Sampler,
    index: Sequence[int] | Tensor,
    synthetic: Synthetic | None = None,
) -> Verdict:
    """logits [B, R, V], ids [B, R], parents [B, R]: row 0 is the last committed token, parents precede their
    children, siblings are chosen outright and tried in row order; another row without a parent (-1) is padding.
    index as in `verify_chain`. With `synthetic`, acceptance is drawn along first children, as far as they reach.
    """
    count = ids.shape[1]
    steps = torch.arange(count, device=ids.device)
    first = on_device(index, ids.device)
    depth = _sum_to_root((steps > 0).expand_as(ids), parents)
    siblings = (parents[:, :, None] == parents[:, None]).tril(-1)  # [B, R, R]: an earlier row has the same parent
    if synthetic is not None:
        targets = logits.argmax(-1)
        refused = siblings.any(-1) | (depth > _synthetic_count(synthetic, sampler, first)[:, None])
    else:
        targets = sampler.pick(logits, first[:, None] + depth)
        repeated = (siblings & (ids[:, :, None] == ids[:, None])).any(-1)
        refused = repeated | (ids != targets.gather(1, parents.clamp(min=0)))
    refused = (refused | (parents < 0)) & (steps > 0)
    on_path = _sum_to_root(refused, parents) == 0
    counts = on_path.sum(1)
    kept = steps.where(on_path, count).sort(1).values
    gained = steps < counts[:, None]
    bonus = _row(targets, _row(kept, counts - 1))
    # The token after a kept row is the next kept row's, and the bonus after the last.
    following = torch.cat([kept[:, 1:], kept[:, :1]], 1).clamp(max=count - 1)
    tokens = ids.gather(1, following).scatter(1, counts[:, None] - 1, bonus[:, None])
    return Verdict(kept.where(gained, -1), counts, tokens.where(gained, -1), bonus)


def _reject(
    logits: Tensor, drafts: Tensor, draft_probs: Tensor, sampler: Sampler, first: Tensor, offered: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rejection sampling of a chain: accepted drafts [B] and the token [B] after them."""
    p = probabilities(logits, sampler.sampling)
    positions = first[:, None] + torch.arange(drafts.shape[1], device=drafts.device)
    p_x = p[:, :-1].gather(2, drafts[..., None]).squeeze(2)
    q_x = draft_probs.gather(2, drafts[..., None]).squeeze(2)
    accepted = _leading(sampler.uniforms(positions, Purpose.ACCEPT) * q_x < p_x)
    accepted = accepted if offered is None else torch.minimum(accepted, offered)
    if offered is not None:
        draft_probs = draft_probs * (torch.arange(drafts.shape[1], device=p.device) < offered[:, None])[..., None]
    q = torch.cat([draft_probs, torch.zeros_like(p[:, :1])], 1)  # nothing was drafted after the last
    p_next = _row(p, accepted)
    residual = (p_next - _row(q, accepted)).clamp(min=0)
    # Where p = q up to rounding a draft can be rejected with nothing left over.
    residual = residual.where(residual.sum(-1, keepdim=True) > 0, p_next)
    return accepted, draw(residual, sampler.uniforms(first + accepted, Purpose.TOKEN))


def _synthetic_count(synthetic: Synthetic, sampler: Sampler, first: Tensor) -> Tensor:
    """[B] drafts to accept."""
    chances = torch.tensor(synthetic.chances, dtype=torch.float64).to(first.device, non_blocking=True)
    return draw(chances.expand(len(first), -1), sampler.uniforms(first, Purpose.ACCEPT))


def _leading(accepted: Tensor) -> Tensor:
    """[B, k] bool -> [B] how many are true before the first false."""
    return accepted.long().cumprod(1).sum(1)


def _row(values: Tensor, rows: Tensor) -> Tensor:
    """values [B, n, ...], rows [B] -> [B, ...]."""
    return values[torch.arange(len(rows), device=rows.device), rows]


def _sum_to_root(values: Tensor, parents: Tensor) -> Tensor:
    """values [B, R] summed over each row and its ancestors, row 0 excepted, in log2(R) pointer jumps."""
    up = parents.clamp(min=0)
    total = values.long()
    for _ in range((parents.shape[1] - 1).bit_length()):
        total = total + total.gather(1, up)
        up = up.gather(1, up)
    return total
