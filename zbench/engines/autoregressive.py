"""Autoregressive decoding: one row per sequence per forward, the sampled token is committed."""

from __future__ import annotations

from collections.abc import Sequence

from zbench.engines.base import Generated, Meter, Request, State, Step, generate, new_state, prefill
from zbench.models.model import Model
from zbench.models.rows import Rows


class Autoregressive:
    exact = True

    def __init__(self, model: Model) -> None:
        self.model = model
        self.kernels = model.kernels

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        return generate(self, prompts, request, meter)

    def start(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> State:
        state = new_state(self.model, prompts, request)
        logits, _ = prefill(self.model, state.cache, prompts, meter)
        with meter.phase("accept"):
            state.last = state.sampler.pick(logits, [0] * len(prompts))
        return state

    def step(self, state: State, meter: Meter) -> Step:
        rows = Rows.chain(state.last[:, None], state.cache.lengths)
        logits = meter.forward(self.model, "decode", rows, state.cache).logits[:, -1]
        with meter.phase("accept"):
            state.last = state.sampler.pick(logits, [len(output) for output in state.outputs])
            tokens = [[token] for token in state.last.tolist()]
        with meter.phase("commit"):
            # A finished sequence stays in the batch but no longer grows: its row is written over.
            state.cache.extend([int(active) for active in state.active])
        return Step(tokens)
