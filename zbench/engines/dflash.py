"""DFlash: the drafter fills a block of masks in one forward, the target verifies it in another.

Chen et al. 2026, arXiv 2602.06036, verifies the likeliest tokens as a chain; DDTree (Ringel and Romano 2026, arXiv
2604.12989) the likeliest paths through the same block as a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zbench.engines.base import Generated, Meter, Request, State, Step, generate, new_state, prefill
from zbench.engines.plans import LONGEST_LOOKUP, PREFILL_ROWS, check_dflash_tree
from zbench.engines.prompt_lookup import Lookup, proposed
from zbench.engines.sampling import Purpose, draw, probabilities
from zbench.engines.synthetic import Synthetic
from zbench.engines.verify import commit_path, kernels, padded_rows, said, verify_rows
from zbench.errors import UserError
from zbench.hardware.device import Mark
from zbench.models.cache import Cache
from zbench.models.dflash import BLOCK_SIZES, DFlashDrafter, Drafts
from zbench.models.model import Model
from zbench.models.rows import Rows
from zbench.models.trees import BlockTree


@dataclass(slots=True)
class DFlashState(State):
    context: Cache  # the drafter's keys and values of committed tokens
    features: list[Tensor]  # per tap [B, R, D]: hidden states of the tokens the drafter has not read yet
    unread: list[int]  # how many of the R each sequence has
    lookup: Lookup | None
    probs: Tensor | None = None  # [B, block - 1, V] the distribution that this step's drafts were drawn from


class DFlash:
    """`block` tokens per block, anchor included: block - 1 are drafted. None takes the checkpoint's.

    Drafts are the drafter's most likely tokens, or with `tokens` the tree of so many likeliest paths through the block;
    `draft_sampling` draws them at the request's temperature instead, for true rejection sampling. Where at least the
    last `lookup` tokens stood before, as many of what followed then are verified instead (`prompt_lookup.py`), and the
    drafter only reads what was committed. Raises UserError for settings that cannot be.
    """

    def __init__(
        self,
        model: Model,
        drafter: DFlashDrafter,
        block: int | None = None,
        draft_sampling: bool = False,
        synthetic: Synthetic | None = None,
        tokens: int | None = None,
        lookup: int | None = None,
    ) -> None:
        self.model, self.drafter, self.draft_sampling, self.synthetic = model, drafter, draft_sampling, synthetic
        self.block = drafter.config.block if block is None else block
        if self.block not in BLOCK_SIZES:
            raise UserError(f"dflash: block must be {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]} tokens, not {self.block}")
        if lookup and (draft_sampling or synthetic):
            raise UserError("dflash: lookup copies drafts from the text, so that none are drawn")
        self.tree: BlockTree | None = None
        if tokens is not None:
            check_dflash_tree(tokens, self.block, drafter.config.body.vocab, draft_sampling, synthetic is not None)
            self.tree = BlockTree(self.block - 1, tokens, model.device, whole=synthetic is not None)
        self.lookup, self._drafts = lookup, self.block - 1 if tokens is None else tokens
        self._longest = max(
            self.block, 1 + min(self._drafts, LONGEST_LOOKUP) if lookup else 0
        )  # rows of an accepted path
        self._capture = sorted(drafter.config.taps)
        self.exact = None if synthetic or draft_sampling else True
        self.kernels = {**model.kernels, **drafter.kernels, **kernels(model.device)}

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        return generate(self, prompts, request, meter)

    def start(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> DFlashState:
        # The step that reaches the limit may commit a whole path beyond it, and later ones still write rows after that.
        rows = max(1 + self._drafts, self.block)
        state = new_state(self.model, prompts, request, headroom=self._longest + rows)
        logits, hidden = prefill(self.model, state.cache, prompts, meter, self._capture)
        with meter.phase("accept"):
            last = state.sampler.pick(logits, [0] * len(prompts))
        context = self.drafter.new_cache(len(prompts), state.cache.capacity)
        self._prefill_drafter([hidden[tap] for tap in self.drafter.config.taps], context, state.cache.sizes, meter)
        lookup = Lookup(prompts, request.limit, self.lookup, self._drafts) if self.lookup else None
        return DFlashState(state.cache, state.sampler, last, state.outputs, state.active, context, [], [], lookup)

    def step(self, state: DFlashState, meter: Meter) -> Step:
        proposal = proposed(state.lookup, state, lambda _: self._draft(state, meter), lambda: self._skip(state, meter))
        rows = proposal.rows
        out = meter.forward(self.model, "verify", rows, state.cache, capture=self._capture)
        with meter.phase("accept"):
            verdict = verify_rows(out.logits, rows, state.sampler, state.outputs, self.synthetic, state.probs)
            gained = said(verdict).tolist()  # the step's only sync
        with meter.phase("commit"):
            counts = [row[0] * active for row, active in zip(gained, state.active, strict=True)]
            features = [out.hidden[tap] for tap in self.drafter.config.taps]
            state.features = commit_path(state.cache, verdict, gained, counts, self._longest, features)
            if self.lookup and self.model.graphs:  # one graph reads what is left, however much was looked up
                state.features = [padded_rows(feature, self._longest) for feature in state.features]
            state.last, state.unread = verdict.bonus, counts
        return Step(
            tokens=[row[1 : 1 + count] for row, count in zip(gained, counts, strict=True)],
            drafted=proposal.drafted,
            accepted=tuple(max(count - 1, 0) for count in counts),
            looked_up=proposal.looked_up,
        )

    def _prefill_drafter(self, features: list[Tensor], context: Cache, sizes: list[int], meter: Meter) -> None:
        for start in range(0, max(sizes), PREFILL_ROWS):
            chunk = [feature[:, start : start + PREFILL_ROWS] for feature in features]
            rows = chunk[0].shape[1]
            self._read(chunk, context, [max(0, min(size - start, rows)) for size in sizes], meter)

    def _skip(self, state: DFlashState, meter: Meter) -> None:
        """Read what the last step committed, and draft nothing."""
        if state.features:
            self._read(state.features, state.context, state.unread, meter)

    def _read(self, features: Sequence[Tensor], context: Cache, sizes: Sequence[int], meter: Meter) -> None:
        begin, before = meter.device.mark(), context.sizes
        self.drafter.read(features, context, sizes)
        self._record(meter, begin, before, features[0].shape[1], 0)

    def _draft(self, state: DFlashState, meter: Meter) -> Rows:
        """Read what the last step committed, then draft what is verified."""
        begin = meter.device.mark()
        read = state.features[0].shape[1] if state.features else 0
        drafts = self.drafter.draft(state.last, state.context, self.block, state.features, state.unread, self.tree)
        rows = drafts.rows
        if rows is None:
            chosen, state.probs = self._choose(drafts, state)
            rows = Rows.chain(torch.cat([state.last[:, None], chosen], 1), state.cache.lengths)
        self._record(meter, begin, state.context.sizes, read, self.block)
        return rows

    def _choose(self, drafts: Drafts, state: DFlashState) -> tuple[Tensor, Tensor | None]:
        if not self.draft_sampling or state.sampler.sampling.greedy:
            return drafts.tokens, None
        probs = probabilities(self.drafter.target_logits(drafts.logits), state.sampler.sampling)
        first = torch.tensor([len(output) for output in state.outputs], device=probs.device)
        positions = first[:, None] + torch.arange(probs.shape[1], device=probs.device)
        return draw(probs, state.sampler.uniforms(positions, Purpose.DRAFT)), probs

    def _record(self, meter: Meter, begin: Mark, contexts: list[int], read: int, block: int) -> None:
        """One draft forward since `begin`: `read` committed tokens and a block of drafts, per sequence."""
        meter.add_forward(
            "draft",
            block or read,
            contexts,
            lambda: self.drafter.cost(read, block, contexts),
            begin,
            meter.device.mark(),
            name="drafter",
        )
