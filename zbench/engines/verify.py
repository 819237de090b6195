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

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.engines.sampling import Purpose, Sampler, draw, on_device
from zbench.engines.synthetic import Synthetic
from zbench.kernels import cpu, registry
from zbench.kernels.verify import Drafts, Draws, Mix, Verdict
from zbench.models.cache import Cache
from zbench.models.rows import Rows


def kernels(device: torch.device) -> dict[str, str]:
    """What runs acceptance, for an engine's record."""
    label = registry.choose("verify", device).label
    if label == "triton":
        label = "triton (torch with top_k or top_p)"
    elif device.type == "cpu" and cpu.available():
        label = f"native where greedy, else {label}"
    return {"verify": label}


def verify_chain(
    logits: Tensor,
    drafts: Tensor,
    sampler: Sampler,
    index: Sequence[int] | Tensor,
    draft_probs: Tensor | None = None,
    synthetic: Synthetic | None = None,
    offered: Tensor | None = None,
    trusted: Tensor | None = None,
    mix: Mix | None = None,
) -> Verdict:
    """logits [B, 1 + k, V] of the last committed token and the drafts [B, k]; index [B] is the output position of
    the first token to be gained. `draft_probs` [B, k, V] is q where the drafts were drawn from it, None where they
    were chosen outright. With `synthetic`, acceptance is drawn and the bonus is the target's argmax; ValueError
    if it was made for another number of drafts than k. `offered` [B] says how many of the k drafts are real (None:
    all; acceptance is cut there, and the token beyond is p's own). `trusted` [B, k] marks drafts that pass whatever
    the target says, `mix` blends another's logits into those of some rows: the output is then no longer the target's.
    """
    plain = synthetic is None and trusted is None and mix is None
    if sampler.sampling.greedy and plain and cpu.can_verify(logits):
        return Verdict(*cpu.verify_chain(logits, drafts, offered))
    count = logits.shape[1]
    first = on_device(index, logits.device)
    if synthetic is not None:
        made_for = len(synthetic.chances)
        if made_for < count or (offered is None and made_for != count):
            raise ValueError(f"{count - 1} drafts, but synthetic acceptance made for {made_for - 1}")
    ids = F.pad(drafts, (1, 0))  # of row 0 nothing is asked
    forced = None if synthetic is None else _synthetic_count(synthetic, sampler, first)
    asked = Drafts(ids, None, offered, trusted, draft_probs, forced)
    return _verify(logits, asked, sampler, first, mix)


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
    if sampler.sampling.greedy and synthetic is None and cpu.can_verify(logits):
        return Verdict(*cpu.verify_tree(logits, ids, parents))
    first = on_device(index, ids.device)
    forced = None if synthetic is None else _synthetic_count(synthetic, sampler, first)
    return _verify(logits, Drafts(ids, parents, forced=forced), sampler, first)


def verify_rows(
    logits: Tensor,
    rows: Rows,
    sampler: Sampler,
    outputs: Sequence[Sequence[int]],
    synthetic: Synthetic | None = None,
    draft_probs: Tensor | None = None,
) -> Verdict:
    """What follows `outputs`, by logits [B, R, V] of rows that are a chain or a tree; see `verify_chain`."""
    index = [len(output) for output in outputs]
    if rows.causal:
        return verify_chain(logits, rows.ids[:, 1:], sampler, index, draft_probs, synthetic)
    return verify_tree(logits, rows.ids, rows.parents, sampler, index, synthetic)


def said(verdict: Verdict) -> Tensor:
    """[B, 1 + 2 K]: how many tokens were gained, the tokens and the rows kept; what the host is told of a step."""
    return torch.cat([verdict.counts[:, None], verdict.tokens, verdict.kept], 1)


def commit_path(
    cache: Cache,
    verdict: Verdict,
    gained: Sequence[Sequence[int]],
    counts: Sequence[int],
    longest: int,
    features: Sequence[Tensor],
) -> list[Tensor]:
    """Keep the first counts[b] <= `longest` rows of each accepted path in the cache; `gained` is `said` on the host.

    Returns the features, each [B, R, D], of the rows that may have been kept, in the order of the path.
    """
    first = 1 + verdict.tokens.shape[1]
    if all(row[first : first + count] == list(range(count)) for row, count in zip(gained, counts, strict=True)):
        cache.extend(counts)
        return [feature[:, :longest] for feature in features]
    kept = verdict.kept[:, :longest]
    cache.commit(kept, counts)
    return gather_rows(features, kept.clamp(min=0))


def gather_rows(features: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Each [B, R, D] at rows index [B, K] -> [B, K, D]."""
    sequence = torch.arange(len(index), device=index.device)[:, None]
    return [feature[sequence, index] for feature in features]


def padded_rows(rows: Tensor, count: int, value: int = 0) -> Tensor:
    """[B, R, ...] -> its first `count` rows, or all and `value` behind them: [B, count, ...]."""
    missing = count - rows.shape[1]
    if missing <= 0:
        return rows[:, :count]
    return torch.cat([rows, rows.new_full((len(rows), missing, *rows.shape[2:]), value)], 1)


def _verify(logits: Tensor, drafts: Drafts, sampler: Sampler, first: Tensor, mix: Mix | None = None) -> Verdict:
    sampling, token, accept = sampler.sampling, None, None
    if not sampling.greedy and drafts.forced is None:
        positions = first[:, None] + torch.arange(logits.shape[1], device=logits.device)
        token = sampler.uniforms(positions, Purpose.TOKEN)
        if drafts.probs is not None:
            accept = sampler.uniforms(positions[:, :-1], Purpose.ACCEPT)
    draws = Draws(sampling.temperature, sampling.top_k, sampling.top_p, token, accept)
    return registry.choose("verify", logits.device).call(logits, drafts, draws, mix)


def _synthetic_count(synthetic: Synthetic, sampler: Sampler, first: Tensor) -> Tensor:
    """[B] drafts to accept."""
    chances = torch.tensor(synthetic.chances, dtype=torch.float64).to(first.device, non_blocking=True)
    return draw(chances.expand(len(first), -1), sampler.uniforms(first, Purpose.ACCEPT))
