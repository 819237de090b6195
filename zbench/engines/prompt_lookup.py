"""Prompt lookup: drafts out of the text itself, namely what followed its last tokens where these stood before.

No drafter and no training, only the target. Saxena 2023 (github.com/apoorvumang/prompt-lookup-decoding) copies from
the prompt. As in SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975) what was decoded counts too, the longest match
wins, and more is drafted from a longer one. Engines with drafters ask a `Lookup` first (`proposed`): where it finds
something, nothing else has to draft.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.engines.base import Generated, Meter, Request, State, Step, generate, new_state, prefill
from zbench.engines.plans import LONGEST_LOOKUP
from zbench.engines.verify import commit_path, kernels, padded_rows, said, verify_rows
from zbench.kernels import cpu
from zbench.models.cache import on_device
from zbench.models.model import Model
from zbench.models.rows import Rows
from zbench.models.trees import tree_rows

LATEST = 1024  # places of two tokens or more, of which longer matches are looked for: bounds the time on any text
PER_MATCHED = 2  # drafts for every token that matched: SuffixDecoding's alpha; 1 gained less on the sets of docs/zoo.md
KEPT = 0.75  # about how often a looked-up draft is right if the one before it was; says where blocks of masks may pay


class Lookup:
    """What may follow in a batch of `prompts`, each continued by up to `limit` tokens.

    Drafts are found where at least the last `match` tokens stood before, and are at most `tokens`, or LONGEST_LOOKUP.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], limit: int, match: int, tokens: int) -> None:
        self._match, self._tokens = match, min(tokens, LONGEST_LOOKUP)
        self._texts = [np.empty(len(prompt) + limit, np.int64) for prompt in prompts]
        self._sizes = [len(prompt) for prompt in prompts]
        self._prompts = [len(prompt) for prompt in prompts]
        for text, prompt in zip(self._texts, prompts, strict=True):
            text[: len(prompt)] = prompt

    def drafts(self, outputs: Sequence[Sequence[int]], active: Sequence[bool]) -> list[list[int]]:
        """What follows prompts and `outputs` so far, most likely; nothing for a sequence that is not `active`."""
        found: list[list[int]] = []
        for index, output in enumerate(outputs):
            text, read, size = self._texts[index], self._sizes[index], self._prompts[index] + len(output)
            text[read:size] = output[read - self._prompts[index] :]
            self._sizes[index] = size
            found.append(continued(text[:size], self._match, self._tokens) if active[index] else [])
        return found


def continued(text: npt.NDArray[np.int64], match: int, tokens: int) -> list[int]:
    """What followed the latest of the longest earlier occurrences of the end of `text` [n], which may overlap it: up to
    `tokens` tokens and PER_MATCHED for each that matched, none where fewer than `match` did.

    A match that reaches the end of the text goes on with itself, as text does that repeats. Of the places where the
    last two tokens stood the LATEST are looked at.
    """
    ends = np.flatnonzero(text[:-1] == text[-1])
    length = min(1, len(ends))
    # Text that repeats itself fits as far as is compared, and need not be asked step by step.
    if length and np.array_equal(text[-LONGEST_LOOKUP:], text[: ends[-1] + 1][-LONGEST_LOOKUP:]):
        ends, length = ends[-1:], LONGEST_LOOKUP
    while 0 < length < LONGEST_LOOKUP:
        longer = ends[ends >= length]
        longer = longer[text[longer - length] == text[-1 - length]]
        if not len(longer):
            break
        ends, length = longer[-LATEST:], length + 1
    if not length or length < match:
        return []
    return np.resize(text[ends[-1] + 1 :], min(tokens, PER_MATCHED * length)).tolist()


def kept_chances(count: int) -> list[float]:
    """Of a chain of `count` rows, drafts of which were looked up, about how likely 1 to `count` of them are kept."""
    return [KEPT**kept * (1 - KEPT if kept + 1 < count else 1) for kept in range(count)]


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a step verifies, how many drafts that offers each sequence, and whether they were looked up."""

    rows: Rows
    drafted: tuple[int, ...]
    looked_up: tuple[bool, ...] = ()

    def worth(self, others: Tensor) -> Tensor:
        """The log [B, R] of about how likely each row is kept, where it is `others` [B, N] for rows that were drafted
        otherwise; of what is no draft, none."""
        if not any(self.looked_up):
            return others
        rows, device = self.rows.ids.shape[1], others.device
        copied = torch.arange(rows, device=device) * math.log(KEPT)
        others = F.pad(others[:, :rows], (0, max(rows - others.shape[1], 0)), value=cpu.NEVER)
        worth = torch.where(on_device(self.looked_up, device)[:, None], copied, others)
        idle = F.pad(self.rows.parents[:, 1:] < 0, (1, 0))  # of a sequence that has finished, all but the first
        return worth.masked_fill(idle, cpu.NEVER)


def proposed(
    lookup: Lookup | None, state: State, draft: Callable[[list[bool]], Rows], skip: Callable[[], None] = lambda: None
) -> Proposal:
    """What `lookup` finds, and for the sequences [B] of which it finds nothing what `draft` says, asked with those that
    want it. Where none does, `skip` is called instead."""
    found = lookup.drafts(state.outputs, state.active) if lookup else [[]] * len(state.outputs)
    wanting = [active and not drafts for drafts, active in zip(found, state.active, strict=True)]
    others, own = None, 0
    if any(wanting):
        others = draft(wanting)
        own = others.ids.shape[1] - 1
    else:
        skip()
    rows = others if others and not any(found) else _chains(found, state, others)
    drafted = tuple((len(drafts) or own) * active for drafts, active in zip(found, state.active, strict=True))
    return Proposal(rows, drafted, tuple(map(bool, found)) if lookup else ())


def _chains(found: Sequence[Sequence[int]], state: State, others: Rows | None) -> Rows:
    """The last committed tokens and behind each, as a chain, what was found, or of a sequence of which nothing was its
    rows of `others`."""
    device, lengths, sizes = state.last.device, state.cache.lengths, [len(drafts) for drafts in found]
    ids = on_device([[*drafts, *[0] * (max(sizes) - size)] for drafts, size in zip(found, sizes, strict=True)], device)
    ids = torch.cat([state.last[:, None], ids], 1)
    if all(size == max(sizes) for size, active in zip(sizes, state.active, strict=True) if active):
        return Rows.chain(ids, lengths)
    count = on_device(sizes, device)[:, None]
    above = torch.arange(-1, ids.shape[1] - 1, device=device)
    parents = torch.where(above < count, above, -1)
    if others is not None:
        longest = max(ids.shape[1], others.ids.shape[1])
        ids = torch.where(count > 0, padded_rows(ids, longest), padded_rows(others.ids, longest))
        parents = torch.where(count > 0, padded_rows(parents, longest, -1), padded_rows(others.parents, longest, -1))
    return tree_rows(ids, lengths, parents, ids.shape[1] - 1)


@dataclass(slots=True)
class LookupState(State):
    lookup: Lookup


class PromptLookup:
    """Verifies up to `tokens` looked-up drafts where at least the last `match` tokens stood before, and decodes one
    token where not."""

    exact = True

    def __init__(self, model: Model, match: int = 1, tokens: int = 8) -> None:
        self.model, self.match, self.tokens = model, match, tokens
        self.kernels = {**model.kernels, **kernels(model.device)}

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        return generate(self, prompts, request, meter)

    def start(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> LookupState:
        # The step that reaches the limit may commit all drafts beyond it, and later steps still write rows after that.
        state = new_state(self.model, prompts, request, headroom=2 * (1 + self.tokens))
        logits, _ = prefill(self.model, state.cache, prompts, meter)
        with meter.phase("accept"):
            last = state.sampler.pick(logits, [0] * len(prompts))
        lookup = Lookup(prompts, request.limit, self.match, self.tokens)
        return LookupState(state.cache, state.sampler, last, state.outputs, state.active, lookup)

    def step(self, state: LookupState, meter: Meter) -> Step:
        proposal = proposed(state.lookup, state, lambda _: Rows.chain(state.last[:, None], state.cache.lengths))
        rows = proposal.rows
        out = meter.forward(self.model, "verify" if rows.ids.shape[1] > 1 else "decode", rows, state.cache)
        with meter.phase("accept"):
            verdict = verify_rows(out.logits, rows, state.sampler, state.outputs)
            gained = said(verdict).tolist()  # the step's only sync
        with meter.phase("commit"):
            counts = [row[0] * active for row, active in zip(gained, state.active, strict=True)]
            commit_path(state.cache, verdict, gained, counts, 1 + self.tokens, ())
            state.last = verdict.bonus
        return Step(
            tokens=[row[1 : 1 + count] for row, count in zip(gained, counts, strict=True)],
            drafted=proposal.drafted,
            accepted=tuple(max(count - 1, 0) for count in counts),
            looked_up=proposal.looked_up,
        )
