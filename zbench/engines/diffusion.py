"""TiDAR: one model drafts and verifies in ONE forward (Liu et al. 2025, arXiv 2511.08923, section 3.2).

A step feeds the drafted block d_0 .. d_{n-1} as a chain, d_0 being the last committed token, and P blocks of B masks.
Block r is prepared for the outcome "the first r of them are kept": it stands where those end, sees them, the committed
prefix and itself in both directions, and nothing else. With p the model's own next-token distribution at the chain,

    accept      d_1, d_2, .. while p confirms them (`verify.py`): r rows are kept, 1 <= r <= n, and p gives the token
                that follows, t
    next draft  [t, block r's predictions for the places after t]

A mask predicts the token at its own place, so block r's first mask stands where t does, which p has decided already.
With an adapter of `shift` 1 it predicts the one after, as a token's row does: then a block of B has B - 1 masks, whose
first stands in for t.
Kept rows' keys and values were written by this forward and stay; the rest is forgotten; nothing is computed twice.
The head runs on the chain first, then on the chosen block's rows alone, unless all rows are few.
Rows per forward: n + P (B - shift), where n = B once a whole block is drafted. An outcome that no block was prepared
for takes what the block of the nearest shorter outcome predicted for the places after t (drafted with less to go by,
verified like any other draft), or nothing: then the next forward decodes t and drafts anew. With `lookup` the text
itself is asked first for what follows t (`prompt_lookup.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.engines.base import Generated, Meter, Request, State, Step, chunks, generate, new_state
from zbench.engines.plans import ONE_HEAD_ROWS, check_diffusion_shift, prepared
from zbench.engines.prompt_lookup import Lookup, kept_chances
from zbench.engines.sampling import Purpose, draw, on_device, probabilities
from zbench.engines.synthetic import Synthetic
from zbench.engines.verify import Mix, Verdict, kernels, verify_chain
from zbench.errors import UserError
from zbench.kernels import cpu
from zbench.models.adapter import MaskAdapter
from zbench.models.cache import Cache
from zbench.models.cost import head_cost
from zbench.models.model import Model
from zbench.models.rows import Rows

BLOCK_SIZES = range(1, 33)
Choice = Literal["most_likely", "prefix", "uniform"]
Fallback = Literal["nearest", "redraft"]


@dataclass(slots=True)
class DiffusionState(State):
    ids: Tensor  # [B, m] the next block: the last committed token, then drafts, of which `offered` are real
    offered: list[int]  # drafts per sequence
    probs: Tensor | None  # [B, m - 1, V] the distribution that the drafts were drawn from
    confidence: Tensor | None  # [B, m - 1] what the drafter gave them, where a sampler asks
    histogram: list[int]  # [block + 1] steps with a whole block of drafts by rows kept, of this decode so far
    lookup: Lookup | None


class Diffusion:
    """`block` tokens per block, the known first one included; `proposals` of its outcomes get a block of masks each
    (None: every one), chosen by `choose`; 0 decodes autoregressively.

    `mix` (beta) verifies with beta * own + (1 - beta) * mask logits where both exist (the paper's section 4.4.3),
    `trust` accepts drafts whose probability when drafted reached it, whatever the model's own distribution says: with
    either the output is no longer the model's own. `draft_sampling` draws drafts at the request's temperature, for true
    rejection sampling. Where at least the last `lookup` tokens stood before, up to `block` - 1 of what followed then
    are verified instead of what masks predicted. Raises UserError for a setting that cannot be.
    """

    def __init__(
        self,
        model: Model,
        mask_id: int,
        block: int = 8,
        proposals: int | None = None,
        choose: Choice = "most_likely",
        fallback: Fallback = "nearest",
        adapter: MaskAdapter | None = None,
        mix: float | None = None,
        trust: float | None = None,
        draft_sampling: bool = False,
        synthetic: Synthetic | None = None,
        lookup: int | None = None,
    ) -> None:
        if block not in BLOCK_SIZES:
            raise UserError(f"diffusion: block_size must be {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}, not {block}")
        if not 0 <= mask_id < model.config.vocab:
            raise UserError(f"diffusion: mask id {mask_id} is not in the vocabulary of {model.config.vocab}")
        self.model, self.mask_id, self.block, self.adapter = model, mask_id, block, adapter
        self.shift = adapter.config.shift if adapter else 0
        check_diffusion_shift("logit_mix" if mix is not None else "lossless", self.shift)
        self.masks = block - self.shift  # of a block
        # A block's first token is known, so it has `block` outcomes.
        self.proposals = min(block if proposals is None else proposals, block if self.masks else 0)
        self.choose, self.fallback = choose, fallback
        self.mix, self.trust, self.draft_sampling, self.synthetic = mix, trust, draft_sampling, synthetic
        if lookup and (mix is not None or trust is not None or draft_sampling or synthetic):
            raise UserError("diffusion: lookup copies drafts from the text, and verifies them exactly")
        self.lookup = lookup
        lossy = mix is not None or trust is not None
        self.exact = None if lossy or synthetic or draft_sampling else True
        self.kernels = {**model.kernels, **kernels(model.device)}

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        return generate(self, prompts, request, meter)

    def start(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> DiffusionState:
        # The step that reaches the limit may commit a block beyond it, and the next one still writes its rows.
        state = new_state(self.model, prompts, request, headroom=(2 + self.proposals) * self.block)
        masks = self.masks if self.proposals else 0
        logits, hidden = prefill_and_draft(self.model, state.cache, prompts, masks, self.mask_id, meter, self.adapter)
        if self.mix is not None and masks:
            theirs = run_head(self.model, hidden[:, :1], state.cache.sizes, meter)[:, 0]
            logits = self.mix * logits + (1 - self.mix) * theirs
        with meter.phase("accept"):
            last = state.sampler.pick(logits, [0] * len(prompts))
        started = DiffusionState(
            state.cache, state.sampler, last, state.outputs, state.active,
            last[:, None], [0] * len(prompts), None, None, [0] * (self.block + 1),
            Lookup(prompts, request.limit, self.lookup, self.block - 1) if self.lookup else None,
        )  # fmt: skip
        if masks and self.block > 1:
            self._draft(started, hidden[:, 1 - self.shift :], False, torch.ones_like(last), meter)
            started.offered = [self.block - 1] * len(prompts)
        return started

    def step(self, state: DiffusionState, meter: Meter) -> Step:
        model, contexts = self.model, state.cache.sizes
        looked_up = self._look_up(state)
        count = 1 + max(n for n, active in zip(state.offered, state.active, strict=True) if active)
        state.offered = [min(n, count - 1) for n in state.offered]  # a finished sequence may have had more
        likelihood = kept_chances(count) if any(looked_up) else state.histogram[1:]
        ids, outcomes = state.ids[:, :count], prepared(count, self.proposals, self.choose, likelihood)
        rows = Rows.draft_and_verify(ids, state.cache.lengths, self.masks, outcomes, self.mask_id)
        at_once = rows.ids.numel() <= ONE_HEAD_ROWS
        asking = None if at_once else torch.arange(count, device=ids.device).expand(len(ids), count)
        out = meter.forward(
            model,
            "draft+verify" if outcomes else "decode" if count == 1 else "verify",
            rows,
            state.cache,
            logits=asking,
            capture=() if at_once or not outcomes else (model.config.layers,),
            adapter=self.adapter,
        )
        masks = out.logits if at_once else out.hidden.get(model.config.layers)
        logits = out.logits[:, :count]
        mix = self._mix(masks, at_once, count, outcomes, contexts, meter)
        with meter.phase("accept"):
            index = on_device([len(output) for output in state.outputs], ids.device)
            verdict = self._verify(state, logits, ids, index, mix)
        state.last = verdict.bonus
        if masks is not None and outcomes and self.block > 1:
            chosen = self._chosen(masks, verdict.counts, count, outcomes)
            self._draft(state, chosen, at_once, index + verdict.counts, meter)
        else:
            state.ids = state.last[:, None]
        with meter.phase("accept"):
            gained = torch.cat([verdict.counts[:, None], verdict.tokens], 1).tolist()  # the step's only sync
        with meter.phase("commit"):
            drafted = tuple(n * active for n, active in zip(state.offered, state.active, strict=True))
            counts = [row[0] * active for row, active in zip(gained, state.active, strict=True)]
            state.cache.extend(counts)
            usable = _sources(count, self.block, outcomes, self.fallback, self.shift)[1]
            state.offered = [usable[row[0]] for row in gained]
            for kept, offered in () if any(looked_up) else zip(counts, drafted, strict=True):
                if kept and offered == self.block - 1:  # fewer drafts would have cut the outcome short
                    state.histogram[kept] += 1
        return Step(
            tokens=[row[1 : 1 + kept] for row, kept in zip(gained, counts, strict=True)],
            drafted=drafted,
            accepted=tuple(max(kept - 1, 0) for kept in counts),
            covered=tuple(row[0] in outcomes for row in gained) if self.proposals else (),
            prepared=outcomes,
            looked_up=looked_up,
        )

    def _look_up(self, state: DiffusionState) -> tuple[bool, ...]:
        """Have what stands in the text instead of the drafts of sequences whose ends stood there before; which those
        are."""
        found = state.lookup.drafts(state.outputs, state.active) if state.lookup else []
        if any(found):
            state.offered = [len(drafts) or offered for drafts, offered in zip(found, state.offered, strict=True)]
            places = max(state.offered)
            copied = [[*drafts, *[0] * (places - len(drafts))] for drafts in found]
            is_copied = on_device([bool(drafts) for drafts in found], state.ids.device)[:, None]
            drafts = F.pad(state.ids[:, 1 : 1 + places], (0, max(places + 1 - state.ids.shape[1], 0)))
            drafts = torch.where(is_copied, on_device(copied, state.ids.device), drafts)
            state.ids = torch.cat([state.last[:, None], drafts], 1)
        return tuple(map(bool, found))

    def _verify(self, state: DiffusionState, logits: Tensor, ids: Tensor, index: Tensor, mix: Mix | None) -> Verdict:
        count = ids.shape[1]
        trusted = None if self.trust is None or state.confidence is None else state.confidence >= self.trust
        whole = self.synthetic is None and all(n == count - 1 for n in state.offered)
        return verify_chain(
            logits,
            ids[:, 1:],
            state.sampler,
            index,
            None if state.probs is None else state.probs[:, : count - 1],
            self.synthetic,
            None if whole else on_device(state.offered, ids.device),
            None if trusted is None else trusted[:, : count - 1],
            mix,
        )

    def _chosen(self, rows: Tensor, counts: Tensor, drafts: int, outcomes: tuple[int, ...]) -> Tensor:
        """Of what the forward said at each row [B, R, ..], that of the masks that predict the next drafts after
        outcomes `counts` [B]: [B, block - 1, ..]."""
        starts, _ = _sources(drafts, self.block, outcomes, self.fallback, self.shift)
        if len(rows) == 1 and rows.device.type == "cpu":  # where asking costs nothing and copying logits does
            first = starts[int(counts)]
            return rows[:, first : first + self.block - 1]  # fewer where the last block ends: `offered` knows
        start = on_device(starts, rows.device)[counts]
        places = start[:, None] + torch.arange(self.block - 1, device=rows.device)
        places = places.clamp(max=rows.shape[1] - 1)
        return rows[torch.arange(len(rows), device=rows.device)[:, None], places]

    def _draft(self, state: DiffusionState, masks: Tensor, headed: bool, index: Tensor, meter: Meter) -> None:
        """The next block: the last token, and what `masks` predict after it, the first at output position index [B]."""
        logits = self._predicted(masks, headed, state.cache.sizes, index, meter)
        with meter.phase("accept"):
            state.probs = state.confidence = None
            if self.draft_sampling and not state.sampler.sampling.greedy:
                probs = probabilities(logits, state.sampler.sampling)
                positions = index[:, None] + torch.arange(masks.shape[1], device=masks.device)
                drafts = draw(probs, state.sampler.uniforms(positions, Purpose.DRAFT))
                state.probs = probs
            else:
                drafts = cpu.argmax(logits)
            if self.trust is not None:
                state.confidence = logits.softmax(-1).gather(2, drafts[..., None]).squeeze(2)
            state.ids = torch.cat([state.last[:, None], drafts], 1)

    def _predicted(self, masks: Tensor, headed: bool, contexts: list[int], index: Tensor, meter: Meter) -> Tensor:
        """Logits [B, n, V] of masks, the first of which stands at output position index [B]: what `masks` holds if the
        forward ran the head on them (`headed`), else the head's on hidden states [B, n, D]."""
        return masks if headed else run_head(self.model, masks, contexts, meter)

    def _mix(
        self,
        masks: Tensor | None,
        headed: bool,
        count: int,
        outcomes: tuple[int, ...],
        contexts: list[int],
        meter: Meter,
    ) -> Mix | None:
        """The logits of the first mask of each block, for the row of the chain that stands at the same place."""
        if masks is None or not outcomes or self.mix is None:
            return None
        rows = on_device([kept - 1 for kept in outcomes], masks.device)
        firsts = masks[:, count + self.block * torch.arange(len(outcomes), device=rows.device)]
        return Mix(self._predicted(firsts, headed, contexts, rows, meter), rows, self.mix)


@functools.lru_cache(maxsize=1024)
def _sources(
    drafts: int, block: int, outcomes: tuple[int, ...], fallback: Fallback, shift: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """By rows kept, 0 to `drafts`: the row of the mask that predicts the token after t, and how many masks from there
    on predict something (0: nothing was prepared)."""
    starts, usable = [0] * (drafts + 1), [0] * (drafts + 1)
    for kept in range(1, drafts + 1):
        fitting = [r for r in outcomes if r == kept or (fallback == "nearest" and r < kept)]
        if fitting:
            ahead = kept - fitting[-1]  # masks of that block which stand on kept drafts
            starts[kept] = drafts + outcomes.index(fitting[-1]) * (block - shift) + ahead + 1 - shift
            usable[kept] = max(block - 1 - ahead, 0)
    return tuple(starts), tuple(usable)


def prefill_and_draft(
    model: Model,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    masks: int,
    mask_id: int,
    meter: Meter,
    adapter: MaskAdapter | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill the cache with ragged prompts; the forward that ends a prompt carries a block of masks behind it.

    Returns logits [B, V] after each prompt and the masks' hidden states [B, masks, D] (before the final norm).
    """
    layers = model.config.layers
    logits = torch.empty(len(prompts), model.config.vocab, device=model.device)
    hidden = torch.zeros(len(prompts), masks, model.config.width, device=model.device)
    for chunk in chunks(prompts, model, cache.capacity - masks):
        ending = [row for row, ends in enumerate(chunk.ends) if ends]
        if masks and ending:
            counts = on_device(chunk.counts, model.device)
            rows = Rows.prompt_and_block(chunk.ids, cache.lengths, counts, masks, mask_id)
        else:
            rows = Rows.chain(chunk.ids, cache.lengths)
        wanted = chunk.last if ending else chunk.last[:, :0]
        capture = (layers,) if masks and ending else ()
        out = meter.forward(model, "prefill", rows, cache, logits=wanted, capture=capture, adapter=adapter)
        cache.extend(chunk.counts)
        for row in ending:
            logits[row] = out.logits[row, 0]
            if masks:
                hidden[row] = out.hidden[layers][row, -masks:]
    return logits, hidden


def run_head(model: Model, hidden: Tensor, contexts: list[int], meter: Meter) -> Tensor:
    """Final norm and head on hidden states [B, n, D], recorded as a forward of the head alone -> logits [B, n, V]."""
    if not hidden.shape[1]:  # no masks stand behind what was accepted
        return hidden.new_zeros(len(hidden), 0, model.config.vocab, dtype=torch.float32)
    start = meter.device.mark()
    logits = model.logits(hidden)
    wanted = hidden.shape[0] * hidden.shape[1]
    meter.add_forward(
        "draft",
        hidden.shape[1],
        contexts,
        lambda: head_cost(model.config, wanted, model.dtype.itemsize, model.team.shard),
        start,
        meter.device.mark(),
        name="head",
    )
    return logits
