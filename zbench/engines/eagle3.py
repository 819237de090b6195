"""EAGLE-3: the drafter proposes a chain or a dynamic tree, one forward of the target verifies it.

Li et al. 2025, arXiv 2503.01840; the dynamic tree is EAGLE-2's (arXiv 2406.16858, section 4).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.engines.base import Generated, Meter, Request, State, Step, generate, new_state, prefill
from zbench.engines.plans import LONGEST_LOOKUP, PREFILL_ROWS, eagle3_tokens
from zbench.engines.prompt_lookup import Lookup, proposed
from zbench.engines.sampling import on_device
from zbench.engines.synthetic import Synthetic
from zbench.engines.verify import commit_path, gather_rows, kernels, padded_rows, said, verify_rows
from zbench.errors import UserError
from zbench.hardware.device import Mark
from zbench.models.cost import Cost
from zbench.models.eagle3 import DraftCache, Eagle3Drafter
from zbench.models.execution import Given, Recorded, span_of
from zbench.models.model import Model
from zbench.models.rows import Rows
from zbench.models.trees import best_rows


@dataclass(slots=True)
class Eagle3State(State):
    """Between steps: what the target committed last and the drafter has not read yet."""

    draft_cache: DraftCache
    taps: list[Tensor]  # per tap [B, K, D]: the target's hidden states at the committed tokens, the real ones first
    following: Tensor  # [B, K] the token after each
    unread: Tensor  # [B] how many of the K are real
    unread_sizes: list[int]  # the same on the host; 0 for a sequence that has finished
    lookup: Lookup | None


@dataclass(frozen=True, slots=True)
class _Start:
    """What a draft goes out from: of the pairs that the drafter reads first, counts[b] are committed."""

    last: Tensor  # [B] the token that the target committed last
    lengths: Tensor  # [B] what is committed in the target's cache
    taps: Sequence[Tensor]  # per tap [B, R, D]
    following: Tensor  # [B, R]
    ends: Tensor  # [B] the pair that the draft follows
    counts: Sequence[int] | Tensor
    cache: DraftCache
    wanting: Sequence[bool] = ()  # sequences that what is drafted matters to


@dataclass(frozen=True, slots=True)
class _Signature:
    """What the graph of a draft has fixed."""

    batch: int
    depth: int
    top_k: int
    beam: int
    tokens: int
    synthetic: bool
    pairs: int
    span: int

    def __str__(self) -> str:
        levels = f"{self.depth} levels of {self.beam} x {self.top_k}"
        return f"EAGLE-3 draft of {self.batch} x {self.tokens} tokens, {levels}, {self.span} slots"


class Eagle3:
    """Draft in `depth` levels, each of which finds the `top_k` likeliest tokens after every node of the `beam` best of
    the level before; the `tokens` best of all are verified. top_k 1 is a chain, a beam of 1 a chain with siblings.

    With a beam of 1 drafting may end early: it goes on while the drafter gives the chain that it has drafted in this
    step at least the chance `confidence` of being right, in one sequence of the batch that has not finished.

    Where at least the last `lookup` tokens stood before, up to `tokens` of what followed then are verified instead
    (`prompt_lookup.py`), and the drafter only reads what was committed.
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
        lookup: int | None = None,
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
        if lookup and synthetic:
            raise UserError("eagle3: lookup copies drafts from the text, so that none are drawn")
        self.depth, self.top_k, self.beam, self.tokens, self.synthetic = depth, top_k, beam, tokens, synthetic
        self.confidence, self.lookup = confidence, lookup
        self._longest = max(depth, min(tokens, LONGEST_LOOKUP) if lookup else 0) + 1  # rows of an accepted path
        self.kernels = {**model.kernels, **drafter.kernels, **kernels(model.device)}
        self.exact = None if synthetic else True
        self._capture = tuple(sorted(drafter.config.taps))
        self._nodes = (depth - 1) * beam  # the last level is drafted, but nothing follows from it
        # own[level, j] marks node j of a level among all nodes.
        self._own = torch.eye(self._nodes, dtype=torch.bool, device=model.device)
        self._own = self._own.view(depth - 1, beam, self._nodes)
        self._whole = _chain_first(depth, top_k, model.device)

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        return generate(self, prompts, request, meter)

    def start(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Eagle3State:
        # The last step may gain a whole path of tokens beyond the limit, and the sequence stays in the batch.
        headroom = self._longest + self.tokens
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
            taps=gather_rows(taps, ends[:, None]),
            following=last[:, None],
            unread=torch.ones_like(ends),
            unread_sizes=[1] * len(prompts),
            lookup=Lookup(prompts, request.limit, self.lookup, self.tokens) if self.lookup else None,
        )

    def step(self, state: Eagle3State, meter: Meter) -> Step:
        proposal = proposed(
            state.lookup, state, lambda wanting: self._draft(state, meter, wanting), lambda: self._skip(state, meter)
        )
        out = meter.forward(self.model, "verify", proposal.rows, state.cache, capture=self._capture)
        with meter.phase("accept"):
            verdict = verify_rows(out.logits, proposal.rows, state.sampler, state.outputs, self.synthetic)
            gained = said(verdict).tolist()  # the step's only sync
        with meter.phase("commit"):
            counts = [row[0] * active for row, active in zip(gained, state.active, strict=True)]
            taps = [out.hidden[tap] for tap in self.drafter.config.taps]
            state.taps = commit_path(state.cache, verdict, gained, counts, self._longest, taps)
            state.last, state.unread, state.unread_sizes = verdict.bonus, verdict.counts, counts
            state.following = verdict.tokens[:, : self._longest].clamp(min=0)
        return Step(
            tokens=[row[1 : 1 + count] for row, count in zip(gained, counts, strict=True)],
            drafted=proposal.drafted,
            accepted=tuple(max(count - 1, 0) for count in counts),
            looked_up=proposal.looked_up,
        )

    def _prefill_drafter(
        self, prompts: Sequence[Sequence[int]], taps: Sequence[Tensor], cache: DraftCache, meter: Meter
    ) -> None:
        """Read all pairs within the prompts, PREFILL_ROWS at a time."""
        sizes = [len(prompt) - 1 for prompt in prompts]
        following = torch.zeros(len(prompts), max(sizes), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            following[row, : len(prompt) - 1] = torch.tensor(prompt[1:])
        following = following.to(self.model.device)
        for begin in range(0, max(sizes), PREFILL_ROWS):
            ids = following[:, begin : begin + PREFILL_ROWS]
            count = ids.shape[1]
            part = [tap[:, begin : begin + count] for tap in taps]
            self._read(part, ids, [max(0, min(size - begin, count)) for size in sizes], cache, meter)

    def _skip(self, state: Eagle3State, meter: Meter) -> None:
        """Read what was committed, and draft nothing."""
        count = max(*state.unread_sizes, 1)
        taps, ids = [tap[:, :count] for tap in state.taps], state.following[:, :count]
        self._read(taps, ids, state.unread_sizes, state.draft_cache, meter)

    def _read(self, taps: Sequence[Tensor], ids: Tensor, sizes: list[int], cache: DraftCache, meter: Meter) -> None:
        """Pairs of taps, each [B, R, D], and the tokens after them [B, R], of which sizes [B] are real."""
        mark, count = meter.device.mark(), ids.shape[1]
        self.drafter.extend(taps, ids, cache)
        pairs = count * (count + 1) // 2
        self._record(meter, mark, meter.device.mark(), _Read(count, cache.sizes, pairs, wanted=0, fused=True))
        cache.extend(sizes)

    def _draft(self, state: Eagle3State, meter: Meter, wanting: Sequence[bool]) -> Rows:
        """The last committed token and what is drafted behind it, for the sequences that are `wanting` it."""
        if self.drafter.graphs and not self.confidence:
            return self._replayed(self.drafter.graphs, state, meter)
        cache, mark = state.draft_cache, meter.device.mark
        start, contexts = mark(), cache.sizes
        count = max(*state.unread_sizes, 1)  # as many of each sequence as the longest has
        found, ends = self._drafted(
            _Start(
                state.last,
                state.cache.lengths,
                [tap[:, :count] for tap in state.taps],
                state.following[:, :count],
                (state.unread - 1).clamp(max=count - 1),  # of a sequence that has finished nothing is read
                state.unread_sizes,
                cache,
                wanting,
            ),
            mark,
        )
        for level, end in enumerate(ends):
            self._record(meter, start, end, self._level(contexts, level, count))
            start, contexts = end, cache.sizes
        return Rows.chain(found, state.cache.lengths) if isinstance(found, Tensor) else found

    def _replayed(self, graphs: Recorded[DraftCache], state: Eagle3State, meter: Meter) -> Rows:
        """As one graph, which reads as many pairs as a step can leave, whatever was left: pairs beyond are written
        behind those that are committed, where nothing sees them."""
        cache, count = state.draft_cache, self._longest
        start, contexts = meter.device.mark(), cache.sizes
        span = span_of(contexts, count, cache.capacity)
        fixed = (self.depth, self.top_k, self.beam, self.tokens, self.synthetic is not None)
        signature = _Signature(len(contexts), *fixed, count, span)

        def work(memory: DraftCache, given: Given) -> Tensor | Rows:
            last, lengths, following, unread, counts, *taps = (tensor for tensor in given if tensor is not None)
            seen, ends = memory.within(span), (unread - 1).clamp(max=count - 1)
            return self._drafted(_Start(last, lengths, taps, following, ends, counts, seen), lambda: None)[0]

        counts = on_device(state.unread_sizes, self.model.device)
        pairs = [padded_rows(tensor, count) for tensor in (state.following, *state.taps)]
        given = (state.last, state.cache.lengths, pairs[0], state.unread, counts, *pairs[1:])
        found = graphs.run(cache, signature, given, work).clone()
        rows = Rows.chain(found, state.cache.lengths) if isinstance(found, Tensor) else found
        cache.extend(state.unread_sizes)
        end, after = meter.device.mark(), cache.sizes
        levels = (self._level(after if level else contexts, level, count) for level in range(self.depth))
        self._record(meter, start, end, *levels)
        return rows

    def _drafted(self, start: _Start, mark: Callable[[], Mark]) -> tuple[Tensor | Rows, list[Mark]]:
        """The rows, of a chain without siblings only their ids, and a mark at the end of each level. Commits the pairs.

        Can be recorded: no tensor that others keep is read, as those of `Rows.chain` are, which may be gone by then.
        """
        return self._chain(start, mark) if self.beam == 1 else self._tree(start, mark)

    def _chain(self, start: _Start, mark: Callable[[], Mark]) -> tuple[Tensor | Rows, list[Mark]]:
        """The last committed token and up to `depth` drafts, each the likeliest after the one before it, or the best of
        these and their siblings."""
        ids, scores, ends = self.drafter.chain(
            start.taps, start.following, start.ends, start.counts, start.cache, self.depth, mark, self.top_k,
            self.confidence, start.wanting,
        )  # fmt: skip
        if scores is None:
            return torch.cat([start.last[:, None], ids[..., 0]], 1), ends
        if self.synthetic is not None:  # have the chain, along which acceptance is drawn, in full
            scores = F.pad(scores[..., 1:], (1, 0))
        whole = len(ends) == self.depth
        order, parents = self._whole if whole else _chain_first(len(ends), self.top_k, ids.device)
        ids, scores = ids.flatten(1)[:, order], scores.flatten(1)[:, order]
        parents = parents.expand(ids.shape)
        return best_rows(start.last, start.lengths, ids, scores, parents, self.tokens, len(ends)), ends

    def _tree(self, start: _Start, mark: Callable[[], Mark]) -> tuple[Rows, list[Mark]]:
        """The last committed token as the root, and below it the `tokens` likeliest nodes of a beam search."""
        drafter, cache, k, width = self.drafter, start.cache, self.top_k, self.beam
        features = drafter.extend(start.taps, start.following, cache)[cache.sequence, start.ends[:, None]]
        cache.extend(start.counts)
        batch, sequence = len(features), cache.sequence
        beam = torch.full((batch, 1), -1, device=features.device)  # candidate numbers; the root is none
        beam_scores = features.new_zeros(batch, 1)
        visible = self._own.new_zeros(batch, 1, self._nodes)
        candidates: list[tuple[Tensor, Tensor, Tensor]] = []
        ends: list[Mark] = []
        for level in range(self.depth):
            children, log_probs = self._children(features)  # [B, beam, k]
            scores = (beam_scores[..., None] + log_probs).flatten(1)
            if self.synthetic is not None:
                scores[:, :1].zero_()  # what is drawn as accepted is a path of first children: have one of full depth
            ids, parents = children.flatten(1), beam[..., None].expand(-1, -1, k).flatten(1)
            first = sum(found.shape[1] for found, _, _ in candidates)
            candidates.append((ids, scores, parents))
            if level + 1 < self.depth:
                beam_scores, best = scores.topk(width)
                beam, came_from = first + best, best // k
                visible = visible[sequence, came_from] | self._own[level]
                inherited = features[sequence, came_from]
                ends.append(mark())
                features = drafter.expand(ids.gather(1, best), inherited, cache, level, visible)
        ids, scores, parents = (torch.cat(parts, 1) for parts in zip(*candidates, strict=True))
        rows = best_rows(start.last, start.lengths, ids, scores, parents, self.tokens, self.depth)
        return rows, [*ends, mark()]

    def _children(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, n, h] -> the top_k next tokens of each [B, n, k] and their log-probabilities, untempered."""
        logits = self.drafter.logits(features)
        best = logits.topk(self.top_k)
        return self.drafter.target_ids(best.indices), best.values - logits.logsumexp(-1, keepdim=True)

    def _level(self, contexts: list[int], level: int, unread: int) -> _Read:
        """Level 0 reads what was committed, the others the beam; each asks for as many logits as it has nodes."""
        batch, k = len(contexts), self.beam
        if level == 0:
            return _Read(unread, contexts, unread * (unread + 1) // 2, batch, True)
        return _Read(k, contexts, k * level, batch * k, False)

    def _record(self, meter: Meter, start: Mark, end: Mark, *reads: _Read) -> None:
        """A forward of the drafter, or several as one, with the choice of tokens that follows each."""

        def cost() -> Cost:
            each = [self.drafter.cost(r.rows, r.contexts, r.wanted, r.pairs, r.fused) for r in reads]
            return functools.reduce(operator.add, each)

        rows, contexts = sum(r.rows for r in reads), reads[0].contexts
        meter.add_forward("draft", rows, contexts, cost, start, end, "drafter", len(reads))


@dataclass(frozen=True, slots=True)
class _Read:
    """What one forward of the drafter reads; see `Eagle3Config.cost`."""

    rows: int
    contexts: list[int]
    pairs: int
    wanted: int
    fused: bool


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _chain_first(levels: int, top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a chain with siblings, [levels, top_k] flattened: an order in which the chain comes first, so that its rows
    stay where they are when they are accepted, and which candidate, in that order, each one then follows."""
    above = torch.arange(-1, levels - 1, device=device)
    places = torch.arange(levels * top_k, device=device).view(levels, top_k)
    order = torch.cat([places[:, 0], places[:, 1:].flatten()])
    return order, torch.cat([above, above.repeat_interleave(top_k - 1)])
