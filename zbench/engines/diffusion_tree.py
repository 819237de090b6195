"""TiDAR that verifies a tree: of what the masks predict, the likeliest paths instead of one (see `diffusion.py`).

A block's masks give a distribution for each of its places, whose likeliest paths are the tree of DDTree (Ringel and
Romano 2026, arXiv 2604.12989). A step ends at one of the tree's nodes, and a block of masks can stand behind any.
With w(v) the chance that the drafter gives the path to node v, it ends there with

    P(v) = w(v) - sum over children c of w(c)

and the P likeliest nodes get a block. A tree of as many tokens as a chain has drafts, all of whose nodes get one, takes
just as many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.engines.base import Generated, Meter, Request, State, Step, generate, new_state
from zbench.engines.diffusion import prefill_and_draft, run_head
from zbench.engines.plans import ONE_HEAD_ROWS, check_diffusion_tree
from zbench.engines.sampling import on_device
from zbench.engines.synthetic import Synthetic
from zbench.engines.verify import commit_path, kernels, said, verify_tree
from zbench.models.adapter import MaskAdapter
from zbench.models.model import Model
from zbench.models.rows import Rows
from zbench.models.trees import BlockTree


@dataclass(slots=True)
class TreeState(State):
    tree: Rows  # [B, 1 + tokens] the last committed token and what is drafted below it
    chances: Tensor  # [B, 1 + tokens] that the next step ends at each of these
    drafted: bool  # whether anything of it was predicted


class DiffusionTree:
    """`block` tokens per block, the known first one included, of which a tree of `tokens` is made and verified;
    `proposals` of its `tokens` + 1 nodes get a block of masks each (None: every one).

    A step that ends elsewhere takes what the block of the nearest node on its path predicted further on, or decodes
    one token. Raises UserError for a setting that cannot be.
    """

    def __init__(
        self,
        model: Model,
        mask_id: int,
        block: int,
        tokens: int,
        proposals: int | None = None,
        adapter: MaskAdapter | None = None,
        synthetic: Synthetic | None = None,
    ) -> None:
        self.model, self.mask_id, self.block, self.tokens, self.adapter = model, mask_id, block, tokens, adapter
        self.shift = adapter.config.shift if adapter else 0
        check_diffusion_tree(tokens, block, self.shift, model.config.vocab, synthetic is not None)
        self.masks = block - self.shift  # of a block
        self.proposals = min(tokens + 1 if proposals is None else proposals, tokens + 1)
        self.synthetic, self.exact = synthetic, None if synthetic else True
        self.kernels = {**model.kernels, **kernels(model.device)}
        self._tree = BlockTree(block - 1, tokens, model.device, whole=synthetic is not None)
        self._drawn = None  # the chances that acceptance is drawn with; what is accepted are first children, whole
        if synthetic is not None:
            chances = torch.tensor(synthetic.chances, device=model.device)
            self._drawn = F.pad(chances, (0, tokens + 1 - len(chances)))

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        return generate(self, prompts, request, meter)

    def start(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> TreeState:
        # The step that reaches the limit may commit a block beyond it, and the next one still writes its rows.
        rows = 1 + self.tokens + self.proposals * self.masks
        state = new_state(self.model, prompts, request, headroom=self.block + rows)
        logits, hidden = prefill_and_draft(
            self.model, state.cache, prompts, self.masks, self.mask_id, meter, self.adapter
        )
        with meter.phase("accept"):
            last = state.sampler.pick(logits, [0] * len(prompts))
        whole = torch.full_like(last, self.block - 1)
        masks, first = hidden[:, 1 - self.shift :], torch.ones_like(last)
        drafts = self._predicted(masks, False, state.cache.sizes, first, meter)
        with meter.phase("accept"):
            tree, chances = self._grown(last, state.cache.lengths, drafts, whole)
        return TreeState(state.cache, state.sampler, last, state.outputs, state.active, tree, chances, True)

    def step(self, state: TreeState, meter: Meter) -> Step:
        model, tree, contexts = self.model, state.tree, state.cache.sizes
        if state.drafted:
            ends = state.chances.topk(self.proposals).indices.sort().values
        else:
            tree = Rows.chain(state.last[:, None], state.cache.lengths)
            ends = torch.zeros_like(tree.ids)
        count = tree.ids.shape[1]
        rows = Rows.tree_and_blocks(tree, ends, self.masks, self.mask_id)
        at_once = rows.ids.numel() <= ONE_HEAD_ROWS
        out = meter.forward(
            model,
            "draft+verify",
            rows,
            state.cache,
            logits=None if at_once else torch.arange(count, device=ends.device).expand(len(ends), count),
            capture=() if at_once else (model.config.layers,),
            adapter=self.adapter,
        )
        with meter.phase("accept"):
            index = on_device([len(output) for output in state.outputs], ends.device)
            logits = out.logits[:, :count]
            verdict = verify_tree(logits, tree.ids, tree.parents, state.sampler, index, self.synthetic)
            start, ahead = self._next_block(verdict.kept, verdict.counts, ends)
            usable = (self.block - 1 - ahead).clamp(min=0)
            chosen = self._chosen(out.logits if at_once else out.hidden[model.config.layers], start, ahead)
        drafts = self._predicted(chosen, at_once, contexts, index + verdict.counts, meter)
        with meter.phase("accept"):
            lengths = state.cache.lengths + verdict.counts
            state.last = verdict.bonus
            state.tree, state.chances = self._grown(state.last, lengths, drafts, usable)
            kept = 1 + tree.positions.gather(1, ends) - tree.positions[:, :1]
            told = torch.cat([said(verdict), ahead[:, None], usable[:, None], kept], 1)
            gained = told.tolist()  # the step's only sync
        with meter.phase("commit"):
            counts = [row[0] * active for row, active in zip(gained, state.active, strict=True)]
            commit_path(state.cache, verdict, gained, counts, self.block, ())
            drafted = count - 1
            beside = 1 + 2 * count
            state.drafted = any(row[beside + 1] for row, active in zip(gained, state.active, strict=True) if active)
        return Step(
            tokens=[row[1 : 1 + kept] for row, kept in zip(gained, counts, strict=True)],
            drafted=tuple(drafted * active for active in state.active),
            accepted=tuple(max(kept - 1, 0) for kept in counts),
            covered=tuple(row[beside] == 0 for row in gained),
            prepared=tuple(gained[0][beside + 2 :]),
        )

    def _next_block(self, kept: Tensor, counts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """For accepted paths, rows `kept` [B, N] of which counts [B] are real: the row of the mask that predicts the
        token after the next, and how many tokens of the path its block had not seen; a whole block, at least, where
        none was prepared on the path."""
        blocks = torch.full_like(kept, -1).scatter_(
            1, ends, torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
        )
        along = torch.where(kept >= 0, blocks.gather(1, kept.clamp(min=0)), -1)
        place = torch.where(along >= 0, torch.arange(kept.shape[1], device=kept.device), -1).amax(1)
        ahead = torch.where(place >= 0, counts - 1 - place, self.block)
        block = along.gather(1, place.clamp(min=0)[:, None])[:, 0].clamp(min=0)
        return kept.shape[1] + block * self.masks, ahead

    def _chosen(self, rows: Tensor, start: Tensor, ahead: Tensor) -> Tensor:
        """Of what the forward said at each row [B, R, ..]: [B, block - 1, ..], as long as the block has masks."""
        if len(rows) == 1 and rows.device.type == "cpu" and not int(ahead):  # no copy, where asking costs nothing
            first = int(start) + 1 - self.shift
            return rows[:, first : first + self.block - 1]
        places = ahead[:, None] + 1 - self.shift + torch.arange(self.block - 1, device=rows.device)
        places = start[:, None] + places.clamp(max=self.masks - 1)
        return rows[torch.arange(len(rows), device=rows.device)[:, None], places]

    def _predicted(self, masks: Tensor, headed: bool, contexts: list[int], index: Tensor, meter: Meter) -> Tensor:
        """As in `Diffusion`."""
        return masks if headed else run_head(self.model, masks, contexts, meter)

    def _grown(self, last: Tensor, lengths: Tensor, logits: Tensor, usable: Tensor) -> tuple[Rows, Tensor]:
        """The next tree, and the chance [B, 1 + tokens] that a step ends at each of its nodes."""
        tree, worth = self._tree.grow(last, lengths, logits, None, usable)
        if self._drawn is not None:
            return tree, self._drawn.expand_as(worth)
        worth = worth.exp()
        return tree, worth.scatter_add(1, tree.parents[:, 1:], -worth[:, 1:])
