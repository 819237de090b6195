"""DFlash: the drafter fills a block of masks in one forward, the target verifies it as a chain in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zbench.engines.base import PREFILL_ROWS, Generated, Meter, Request, State, Step, generate, new_state, prefill
from zbench.engines.sampling import Purpose, draw, probabilities
from zbench.engines.synthetic import Synthetic
from zbench.engines.verify import kernels, verify_chain
from zbench.errors import UserError
from zbench.hardware.device import Mark
from zbench.models.cache import Cache
from zbench.models.dflash import BLOCK_SIZES, DFlashDrafter, Drafts
from zbench.models.model import Model
from zbench.models.rows import Rows


@dataclass(slots=True)
class DFlashState(State):
    context: Cache  # the drafter's keys and values of committed tokens
    features: list[Tensor]  # per tap [B, R, D]: hidden states of the tokens the drafter has not read yet
    unread: list[int]  # how many of the R each sequence has


class DFlash:
    """`block` tokens per block, anchor included: block - 1 are drafted. None takes the checkpoint's.

    Drafts are the drafter's most likely tokens; `draft_sampling` draws them at the request's temperature instead, for
    true rejection sampling. Raises UserError for a block size that cannot be.
    """

    def __init__(
        self,
        model: Model,
        drafter: DFlashDrafter,
        block: int | None = None,
        draft_sampling: bool = False,
        synthetic: Synthetic | None = None,
    ) -> None:
        self.model, self.drafter, self.draft_sampling, self.synthetic = model, drafter, draft_sampling, synthetic
        self.block = drafter.config.block if block is None else block
        if self.block not in BLOCK_SIZES:
            raise UserError(f"dflash: block must be {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]} tokens, not {self.block}")
        self._capture = sorted(drafter.config.taps)
        self.exact = None if synthetic or draft_sampling else True
        self.kernels = {**model.kernels, **drafter.kernels, **kernels(model.device)}

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        return generate(self, prompts, request, meter)

    def start(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> DFlashState:
        # The step that reaches the limit may commit a block beyond it, and later steps still write one after that.
        state = new_state(self.model, prompts, request, headroom=2 * self.block)
        logits, hidden = prefill(self.model, state.cache, prompts, meter, self._capture)
        with meter.phase("accept"):
            last = state.sampler.pick(logits, [0] * len(prompts))
        context = self.drafter.new_cache(len(prompts), state.cache.capacity)
        self._prefill_drafter([hidden[tap] for tap in self.drafter.config.taps], context, state.cache.sizes, meter)
        return DFlashState(state.cache, state.sampler, last, state.outputs, state.active, context, [], [])

    def step(self, state: DFlashState, meter: Meter) -> Step:
        drafts, probs = self._draft(state, meter)
        rows = Rows.chain(torch.cat([state.last[:, None], drafts], 1), state.cache.lengths)
        out = meter.forward(self.model, "verify", rows, state.cache, capture=self._capture)
        with meter.phase("accept"):
            index = [len(output) for output in state.outputs]
            verdict = verify_chain(out.logits, drafts, state.sampler, index, probs, self.synthetic)
            gained = torch.cat([verdict.counts[:, None], verdict.tokens], 1).tolist()  # the step's only sync
        with meter.phase("commit"):
            counts = [row[0] * active for row, active in zip(gained, state.active, strict=True)]
            state.cache.extend(counts)
            state.last, state.unread = verdict.bonus, counts
            state.features = [out.hidden[tap] for tap in self.drafter.config.taps]
        return Step(
            tokens=[row[1 : 1 + count] for row, count in zip(gained, counts, strict=True)],
            drafted=tuple(drafts.shape[1] * active for active in state.active),
            accepted=tuple(max(count - 1, 0) for count in counts),
        )

    def _prefill_drafter(self, features: list[Tensor], context: Cache, sizes: list[int], meter: Meter) -> None:
        for start in range(0, max(sizes), PREFILL_ROWS):
            begin, before = meter.device.mark(), context.sizes
            chunk = [feature[:, start : start + PREFILL_ROWS] for feature in features]
            rows = chunk[0].shape[1]
            self.drafter.read(chunk, context, [max(0, min(size - start, rows)) for size in sizes])
            self._record(meter, begin, before, rows, 0)

    def _draft(self, state: DFlashState, meter: Meter) -> tuple[Tensor, Tensor | None]:
        """Read what the last step committed, then draft [B, block - 1]; with the distribution if drawn from one."""
        begin = meter.device.mark()
        read = state.features[0].shape[1] if state.features else 0
        drafts = self.drafter.draft(state.last, state.context, self.block, state.features, state.unread)
        chosen = self._choose(drafts, state)
        self._record(meter, begin, state.context.sizes, read, self.block)
        return chosen

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
