"""Plain block diffusion: a canvas of masks is denoised over several forwards, then its keys and values are kept.

As LLaDA and SDAR models decode (Nie et al. 2025, arXiv 2502.09992; Cheng et al. 2025, arXiv 2510.06303), with the
confidence threshold of Fast-dLLM (Wu et al. 2025, arXiv 2505.22618) and an exact block cache:

    denoise   feed the canvas, all rows seeing each other and the committed prefix; reveal every masked place whose
              token has at least `threshold` probability, and the most probable one in any case
    commit    once no mask is left, feed the finished canvas once more and keep its keys and values

A sequence's commit forward shares the batch with other sequences' denoising. The prompt is read causally, and its
forward denoises the first canvas once; its first token is revealed there whatever its probability, so that every
decode begins with one token as all engines do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zbench.engines.base import Generated, Meter, Request, State, Step, generate, new_state
from zbench.engines.diffusion import BLOCK_SIZES, prefill_and_draft, run_head
from zbench.engines.plans import check_diffusion_shift
from zbench.engines.sampling import on_device, probabilities
from zbench.errors import UserError
from zbench.models.adapter import MaskAdapter
from zbench.models.model import Model
from zbench.models.rows import Rows


@dataclass(slots=True)
class DenoiseState(State):
    canvas: Tensor  # [B, block] token ids; the mask id where a place is still open
    open: list[int]  # masks left in each canvas
    known: list[int]  # leading tokens of each canvas that are in the output already


class Denoise:
    """`block` places per canvas; `threshold` is the probability that reveals a place. Raises UserError for a setting
    that cannot be."""

    exact = None  # a diffusion model's own output: there is no autoregressive truth to compare it with

    def __init__(
        self, model: Model, mask_id: int, block: int = 8, threshold: float = 0.9, adapter: MaskAdapter | None = None
    ) -> None:
        if block not in BLOCK_SIZES:
            raise UserError(f"diffusion: block_size must be {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}, not {block}")
        check_diffusion_shift("denoise", adapter.config.shift if adapter else 0)
        if not 0 <= mask_id < model.config.vocab:
            raise UserError(f"diffusion: mask id {mask_id} is not in the vocabulary of {model.config.vocab}")
        self.model, self.mask_id, self.block = model, mask_id, block
        self.threshold, self.adapter = threshold, adapter
        self.kernels = dict(model.kernels)

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        return generate(self, prompts, request, meter)

    def start(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> DenoiseState:
        state = new_state(self.model, prompts, request, headroom=2 * self.block)
        _, hidden = prefill_and_draft(self.model, state.cache, prompts, self.block, self.mask_id, meter, self.adapter)
        logits = run_head(self.model, hidden, state.cache.sizes, meter)
        with meter.phase("accept"):
            canvas = torch.full((len(prompts), self.block), self.mask_id, device=self.model.device)
            started = DenoiseState(
                state.cache, state.sampler, canvas[:, 0], state.outputs, state.active,
                canvas, [0] * len(prompts), [1] * len(prompts),
            )  # fmt: skip
            first = torch.zeros_like(canvas, dtype=torch.bool)
            first[:, 0] = True
            started.canvas = self._revealed(started, logits, [0] * len(prompts), first)
            started.last = started.canvas[:, 0]
            started.open = (started.canvas == self.mask_id).sum(1).tolist()
        return started

    def step(self, state: DenoiseState, meter: Meter) -> Step:
        finished = [not left and active for left, active in zip(state.open, state.active, strict=True)]
        rows = Rows.canvas(state.canvas, state.cache.lengths, self.mask_id)
        # A finished canvas is fed to be kept: only where others are still denoised does anyone need logits.
        nobody = torch.empty(len(finished), 0, dtype=torch.int64, device=self.model.device)
        idle = all(done or not active for done, active in zip(finished, state.active, strict=True))
        out = meter.forward(
            self.model, "denoise", rows, state.cache, logits=nobody if idle else None, adapter=self.adapter
        )
        with meter.phase("accept"):
            before = state.canvas
            if not idle:
                index = [len(output) - known for output, known in zip(state.outputs, state.known, strict=True)]
                state.canvas = self._revealed(state, out.logits, index)
            fresh = torch.full_like(state.canvas, self.mask_id)
            state.canvas = torch.where(on_device(finished, fresh.device)[:, None], fresh, state.canvas)
            left = (state.canvas == self.mask_id).sum(1)
            gathered = torch.cat([left[:, None], before], 1).tolist()  # the step's only sync
        with meter.phase("commit"):
            state.cache.extend([self.block * done for done in finished])
            state.open = [row[0] for row in gathered]
            tokens = [
                row[1 + known :] if done else []
                for row, known, done in zip(gathered, state.known, finished, strict=True)
            ]
            state.known = [0 if done else known for known, done in zip(state.known, finished, strict=True)]
        return Step(tokens)

    def _revealed(
        self, state: DenoiseState, logits: Tensor, index: Sequence[int], always: Tensor | None = None
    ) -> Tensor:
        """The canvas after one denoising with logits [B, block, V]; index [B] is its first output position."""
        mask = torch.arange(logits.shape[-1], device=logits.device) == self.mask_id
        logits = logits.masked_fill(mask, float("-inf"))  # no place is ever filled with a mask
        places = on_device(index, logits.device)[:, None] + torch.arange(self.block, device=logits.device)
        tokens = state.sampler.pick(logits, places)
        sampling = state.sampler.sampling
        probs = logits.softmax(-1) if sampling.greedy else probabilities(logits, sampling)
        confidence = probs.gather(2, tokens[..., None]).squeeze(2)
        masked = state.canvas == self.mask_id
        confidence = confidence.where(masked, -1.0)
        best = torch.zeros_like(masked).scatter(1, confidence.argmax(1, keepdim=True), True)
        reveal = masked & ((confidence >= self.threshold) | best | (False if always is None else always))
        return torch.where(reveal, tokens, state.canvas)
