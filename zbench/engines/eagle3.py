"""EAGLE-3: the drafter proposes a chain or a dynamic tree, one forward of the target verifies it.

Li et al. 2025, arXiv 2503.01840; the dynamic tree is EAGLE-2's (arXiv 2406.16858, section 4).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.engines import base
from zbench.engines.base import Generated, Meter, Request, State, Step, generate, new_state, prefill
from zbench.engines.plans import eagle3_tokens
from zbench.engines.synthetic import Synthetic
from zbench.engines.verify import Verdict, kernels, verify_chain, verify_tree
from zbench.errors import UserError
from zbench.hardware.device import Mark
from zbench.kernels import cpu
from zbench.models.eagle3 import DraftCache, Eagle3Drafter
from zbench.models.model import Model
from zbench.models.rows import Rows


@dataclass(slots=True)
class Eagle3State(State):
    """Between steps: what the target committed last and the drafter has not read yet."""

    draft_cache: DraftCache
    taps: list[Tensor]  # per tap [B, K, D]: the target's hidden states at the committed tokens, the real ones first
    following: Tensor  # [B, K] the token after each
    unread: Tensor  # [B] how many of the K are real
    unread_sizes: list[int]  # the same on the host; 0 for a sequence that has finished


class Eagle3:
    """Draft in `depth` levels, each of which finds the `top_k` likeliest tokens after every node of the `beam` best of
    the level before; the `tokens` best of all are verified. top_k 1 is a chain, a beam of 1 a chain with siblings.

    With a beam of 1 drafting may end early: it goes on while the drafter gives the chain that it has drafted in this
    step at least the chance `confidence` of being right, in one sequence of the batch that has not finished.
    """

    def __init__(
        self,
        model: Model,
        drafter: Eagle3Drafter,
        depth: int = 4,
        top_k: int = 1,
        tokens: int | None = None,
        synthetic: Synthetic | None = None,
        confidence: float = 0.0,
        beam: int | None = None,
    ) -> None:
        """`tokens` None drafts a whole chain, or the best 4 x depth nodes of a tree; `beam` None is top_k. Raises
        UserError for a setting that cannot be."""
        beam = top_k if beam is None else beam
        tokens = eagle3_tokens(depth, top_k, tokens, drafter.config.draft_vocab, beam)
        self.model, self.drafter = model, drafter
        if confidence and beam > 1:
            raise UserError(f"eagle3: confidence {confidence:g} ends chains; a beam of {beam} drafts trees")
        if confidence and synthetic:
            raise UserError("eagle3: acceptance is synthetic, so that the drafter's confidence means nothing")
        self.depth, self.top_k, self.beam, self.tokens, self.synthetic = depth, top_k, beam, tokens, synthetic
        self.confidence = confidence
        self.kernels = {**model.kernels, **drafter.kernels, **kernels(model.device)}
        self.exact = None if synthetic else True
        self._capture = tuple(sorted(drafter.config.taps))
        self._nodes = (depth - 1) * beam  # the last level is drafted, but nothing follows from it
        # own[level, j] marks node j of a level among all nodes.
        self._own = torch.eye(self._nodes, dtype=torch.bool, device=model.device)
        self._own = self._own.view(depth - 1, beam, self._nodes)

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        return generate(self, prompts, request, meter)

    def start(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Eagle3State:
        # The last step may gain depth + 1 tokens beyond the limit, and the sequence stays in the batch.
        headroom = self.depth + 1 + self.tokens
        state = new_state(self.model, prompts, request, headroom)
        logits, hidden = prefill(self.model, state.cache, prompts, meter, self._capture)
        with meter.phase("accept"):
            last = state.sampler.pick(logits, [0] * len(prompts))
        draft_cache = self.drafter.new_cache(len(prompts), state.cache.capacity, self._nodes)
        taps = [hidden[tap] for tap in self.drafter.config.taps]
        self._prefill_drafter(prompts, taps, draft_cache, meter)
        # The pair of the prompt's last token waits for the first step, as every step leaves some.
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.model.device)
        return Eagle3State(
            state.cache,
            state.sampler,
            last,
            state.outputs,
            state.active,
            draft_cache,
            taps=_rows(taps, ends[:, None]),
            following=last[:, None],
            unread=torch.ones_like(ends),
            unread_sizes=[1] * len(prompts),
        )

    def step(self, state: Eagle3State, meter: Meter) -> Step:
        rows = self._draft_chain(state, meter) if self.beam == 1 else self._draft_tree(state, meter)
        out = meter.forward(self.model, "verify", rows, state.cache, capture=self._capture)
        with meter.phase("accept"):
            verdict = self._verify(out.logits, rows, state)
            said = torch.cat([verdict.counts[:, None], verdict.tokens, verdict.kept], 1)
            gained = said.tolist()  # the step's only sync
        with meter.phase("commit"):
            counts = [row[0] * active for row, active in zip(gained, state.active, strict=True)]
            taps = [out.hidden[tap] for tap in self.drafter.config.taps]
            first_kept = 1 + verdict.tokens.shape[1]
            if rows.causal or all(
                row[first_kept : first_kept + count] == list(range(count))
                for row, count in zip(gained, counts, strict=True)
            ):  # what is kept are the first rows, in their order
                state.cache.extend(counts)
            else:
                kept = verdict.kept[:, : self.depth + 1]
                state.cache.commit(kept, counts)
                taps = _rows(taps, kept.clamp(min=0))
            state.last, state.unread, state.unread_sizes = verdict.bonus, verdict.counts, counts
            state.taps, state.following = taps, verdict.tokens[:, : self.depth + 1].clamp(min=0)
        return Step(
            tokens=[row[1 : 1 + count] for row, count in zip(gained, counts, strict=True)],
            drafted=tuple((rows.ids.shape[1] - 1) * active for active in state.active),
            accepted=tuple(max(count - 1, 0) for count in counts),
        )

    def _verify(self, logits: Tensor, rows: Rows, state: Eagle3State) -> Verdict:
        index = [len(output) for output in state.outputs]
        if rows.causal:
            return verify_chain(logits, rows.ids[:, 1:], state.sampler, index, synthetic=self.synthetic)
        return verify_tree(logits, rows.ids, rows.parents, state.sampler, index, synthetic=self.synthetic)

    def _prefill_drafter(
        self, prompts: Sequence[Sequence[int]], taps: Sequence[Tensor], cache: DraftCache, meter: Meter
    ) -> None:
        """Read all pairs within the prompts, PREFILL_ROWS at a time."""
        sizes = [len(prompt) - 1 for prompt in prompts]
        following = torch.zeros(len(prompts), max(sizes), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            following[row, : len(prompt) - 1] = torch.tensor(prompt[1:])
        following = following.to(self.model.device)
        for begin in range(0, max(sizes), base.PREFILL_ROWS):
            mark = meter.device.mark()
            ids = following[:, begin : begin + base.PREFILL_ROWS]
            count = ids.shape[1]
            self.drafter.extend([tap[:, begin : begin + count] for tap in taps], ids, cache)
            pairs = count * (count + 1) // 2
            self._record(meter, mark, meter.device.mark(), count, cache.sizes, pairs, wanted=0, fused=True)
            cache.extend([max(0, min(size - begin, count)) for size in sizes])

    def _draft_chain(self, state: Eagle3State, meter: Meter) -> Rows:
        """The last committed token and up to `depth` drafts, each the likeliest after the one before it, or the best of
        these and their siblings."""
        cache, counts = state.draft_cache, state.unread_sizes
        start, contexts = meter.device.mark(), cache.sizes
        taps, following, last = self._unread(state)
        mark = meter.device.mark
        ids, scores, ends = self.drafter.chain(
            taps, following, last, counts, cache, self.depth, mark, self.top_k, self.confidence, state.active
        )
        for level, end in enumerate(ends):
            self._record_level(meter, start, end, contexts, level, following.shape[1])
            start, contexts = end, cache.sizes
        if scores is None:
            return Rows.chain(torch.cat([state.last[:, None], ids[..., 0]], 1), state.cache.lengths)
        if self.synthetic is not None:  # have the chain, along which acceptance is drawn, in full
            scores = F.pad(scores[..., 1:], (1, 0))
        order, parents = _chain_first(len(ends), self.top_k, ids.device)
        ids, scores = ids.flatten(1)[:, order], scores.flatten(1)[:, order]
        return self._tree(state, ids, scores, parents.expand(ids.shape), len(ends))

    def _draft_tree(self, state: Eagle3State, meter: Meter) -> Rows:
        """The last committed token as the root, and below it the `tokens` likeliest nodes of a beam search."""
        drafter, cache, k, width = self.drafter, state.draft_cache, self.top_k, self.beam
        start, contexts = meter.device.mark(), cache.sizes
        taps, following, last = self._unread(state)
        features = drafter.extend(taps, following, cache)[cache.sequence, last[:, None]]
        cache.extend(state.unread_sizes)
        batch, sequence = len(features), cache.sequence
        beam = torch.full((batch, 1), -1, device=features.device)  # candidate numbers; the root is none
        beam_scores = features.new_zeros(batch, 1)
        visible = self._own.new_zeros(batch, 1, self._nodes)
        candidates: list[tuple[Tensor, Tensor, Tensor]] = []
        for level in range(self.depth):
            children, log_probs = self._children(features)  # [B, beam, k]
            scores = (beam_scores[..., None] + log_probs).flatten(1)
            if self.synthetic is not None:
                scores[:, 0] = 0.0  # what is drawn as accepted is a path of first children: have one of full depth
            ids, parents = children.flatten(1), beam.repeat_interleave(k, 1)
            first = sum(found.shape[1] for found, _, _ in candidates)
            candidates.append((ids, scores, parents))
            if level + 1 < self.depth:
                beam_scores, best = scores.topk(width)
                beam, came_from = first + best, best // k
                visible = visible[sequence, came_from] | self._own[level]
                inherited = features[sequence, came_from]
                end = meter.device.mark()
                self._record_level(meter, start, end, contexts, level, following.shape[1])
                start, contexts = end, cache.sizes
                features = drafter.expand(ids.gather(1, best), inherited, cache, level, visible)
        ids, scores, parents = (torch.cat(parts, 1) for parts in zip(*candidates, strict=True))
        rows = self._tree(state, ids, scores, parents, self.depth)
        self._record_level(meter, start, meter.device.mark(), contexts, self.depth - 1, following.shape[1])
        return rows

    def _tree(self, state: Eagle3State, ids: Tensor, scores: Tensor, parents: Tensor, depth: int) -> Rows:
        """The best of candidates [B, N] of `depth` levels, below the last committed token."""
        tokens, lengths = min(self.tokens, ids.shape[1]), state.cache.lengths
        if ids.device.type == "cpu" and cpu.available():
            picked = cpu.tree_rows(state.last, lengths, ids, scores, parents, tokens)
            return Rows(*picked)
        drafts, parents = rerank(ids, scores, parents, tokens)
        return tree_rows(torch.cat([state.last[:, None], drafts], 1), lengths, parents, depth)

    def _unread(self, state: Eagle3State) -> tuple[list[Tensor], Tensor, Tensor]:
        """The pairs that the last step left, as many of each sequence as the longest has, and where each ends [B]."""
        count = max(*state.unread_sizes, 1)
        last = (state.unread - 1).clamp(max=count - 1)  # of a sequence that has finished nothing is read
        return [tap[:, :count] for tap in state.taps], state.following[:, :count], last

    def _children(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, n, h] -> the top_k next tokens of each [B, n, k] and their log-probabilities, untempered."""
        logits = self.drafter.logits(features)
        best = logits.topk(self.top_k)
        return self.drafter.target_ids(best.indices), best.values - logits.logsumexp(-1, keepdim=True)

    def _record_level(self, meter: Meter, start: Mark, end: Mark, contexts: list[int], level: int, unread: int) -> None:
        """Level 0 reads what was committed, the others the beam; each asks for as many logits as it has nodes."""
        batch = len(contexts)
        if level == 0:
            self._record(meter, start, end, unread, contexts, unread * (unread + 1) // 2, wanted=batch, fused=True)
        else:
            k = self.beam
            self._record(meter, start, end, k, contexts, k * level, wanted=batch * k, fused=False)

    def _record(
        self, meter: Meter, start: Mark, end: Mark, rows: int, contexts: list[int], pairs: int, wanted: int, fused: bool
    ) -> None:
        """A forward of the drafter, with the choice of tokens that follows it."""
        cost = partial(self.drafter.cost, rows, contexts, wanted, pairs, fused)
        meter.add_forward("draft", rows, contexts, cost, start, end, "drafter")


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _chain_first(levels: int, top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a chain with siblings, [levels, top_k] flattened: an order in which the chain comes first, so that its rows
    stay where they are when they are accepted, and which candidate, in that order, each one then follows."""
    above = torch.arange(-1, levels - 1, device=device)
    places = torch.arange(levels * top_k, device=device).view(levels, top_k)
    order = torch.cat([places[:, 0], places[:, 1:].flatten()])
    return order, torch.cat([above, above.repeat_interleave(top_k - 1)])


def rerank(ids: Tensor, scores: Tensor, parents: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Keep the best nodes of a draft: candidates [B, N] in order of level, parents as candidate numbers, -1 the root.

    Returns tokens [B, T] and parents [B, 1 + T] as rows, row 0 the root. A kept node's ancestors are kept: none has a
    lower score, and of equal scores the earlier candidate goes first.
    """
    batch, count = ids.shape
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :tokens].sort(1).values
    row_of = order.new_zeros(batch, count)
    row_of.scatter_(1, order, torch.arange(1, tokens + 1, device=ids.device).expand(batch, -1))
    above = parents.gather(1, order)
    rows = torch.where(above < 0, 0, row_of.gather(1, above.clamp(min=0)))
    return ids.gather(1, order), torch.cat([rows.new_full((batch, 1), -1), rows], 1)


def tree_rows(ids: Tensor, lengths: Tensor, parents: Tensor, depth: int) -> Rows:
    """`Rows.tree` for a tree of at most `depth` levels below its root, without asking the device anything.

    A row sees what it saw and what the row 2^n levels above it saw, for n = 0, 1, ...; the root is above itself.
    """
    sequence = torch.arange(len(ids), device=ids.device)[:, None]
    up = parents.clamp(min=0)
    visible = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device).expand(len(ids), -1, -1)
    for _ in range(depth.bit_length()):
        visible = visible | visible[sequence, up]
        up = up.gather(1, up)
    return Rows(ids, lengths[:, None] + visible.sum(-1) - 1, parents, visible)


def _rows(taps: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Each [B, R, D] at rows index [B, K] -> [B, K, D]."""
    sequence = torch.arange(len(index), device=index.device)[:, None]
    return [tap[sequence, index] for tap in taps]
