"""Raw forwards of several numbers of rows: what does it cost that more tokens ride in one forward?

Every step feeds each of the given numbers of rows once, at the same context: the token to decode next and, behind it,
riders, as a verify would feed drafts. Riders are the prompt's own tokens, so that a router of experts sees text. One
token is committed per step, the one that follows the row that all these forwards share, so that the output is the
target's own and is checked like any other. Row counts go down and up in turn: a drift of the machine falls on all.
Each forward begins on an idle device, as that of a decode step does: behind another one its launches would be hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zbench.engines.base import Generated, Meter, Request, State, Step, generate, new_state, prefill
from zbench.models.model import Model
from zbench.models.rows import Rows


@dataclass(slots=True)
class ForwardState(State):
    riders: Tensor  # [B, most rows - 1] token ids
    order: tuple[int, ...]  # numbers of rows of the next step


class Forward:
    """`rows` holds distinct numbers of rows, one of which is 1."""

    exact = True

    def __init__(self, model: Model, rows: Sequence[int]) -> None:
        self.model, self.rows = model, tuple(rows)
        self.kernels = model.kernels

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        return generate(self, prompts, request, meter)

    def start(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> ForwardState:
        most = max(self.rows)
        state = new_state(self.model, prompts, request, headroom=most)
        logits, _ = prefill(self.model, state.cache, prompts, meter)
        with meter.phase("accept"):
            riders = torch.tensor([[prompt[i % len(prompt)] for i in range(most - 1)] for prompt in prompts])
            return ForwardState(
                state.cache, state.sampler, state.sampler.pick(logits, [0] * len(prompts)), state.outputs, state.active,
                riders.to(self.model.device).long(), self.rows[::-1],
            )  # fmt: skip

    def step(self, state: ForwardState, meter: Meter) -> Step:
        for count in state.order:
            ids = torch.cat([state.last[:, None], state.riders[:, : count - 1]], 1)
            rows = Rows.chain(ids, state.cache.lengths)
            meter.device.synchronize()
            logits = meter.forward(self.model, "decode", rows, state.cache).logits
            if count == 1:
                decided = logits[:, 0]
        with meter.phase("accept"):
            state.last = state.sampler.pick(decided, [len(output) for output in state.outputs])
            tokens = [[token] for token in state.last.tolist()]
        with meter.phase("commit"):
            state.cache.extend([int(active) for active in state.active])
            state.order = state.order[::-1]
        return Step(tokens)
