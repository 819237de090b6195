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
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.engines.base import Generated, Meter, Request, State, Step, generate, new_state
from zbench.engines.diffusion import prefill_and_draft, run_head
from zbench.engines.plans import LONGEST_LOOKUP, ONE_HEAD_ROWS, check_diffusion_tree
from zbench.engines.prompt_lookup import Lookup, proposed
from zbench.engines.sampling import on_device
from zbench.engines.synthetic import Synthetic
from zbench.engines.verify import commit_path, kernels, said, verify_tree
from zbench.errors import UserError
from zbench.kernels import cpu
from zbench.models.adapter import MaskAdapter
from zbench.models.model import Model
from zbench.models.rows import Rows
from zbench.models.trees import BlockTree, last_block, tree_and_blocks


@dataclass(slots=True)
class TreeState(State):
    tree: Rows  # [B, 1 + tokens] the last committed token and what is drafted below it
    worth: Tensor  # [B, 1 + tokens] the log of the chance that each of these is kept
    drafted: list[bool]  # [B] whether anything of it was predicted
    lookup: Lookup | None


class DiffusionTree:
    """`block` tokens per block, the known first one included, of which a tree of `tokens` is made and verified;
    `proposals` of its `tokens` + 1 nodes get a block of masks each (None: every one).

    A step that ends elsewhere takes what the block of the nearest node on its path predicted further on, or decodes
    one token. Where at least the last `lookup` tokens stood before, up to `tokens` of what followed then are verified
    instead, as a chain. Raises UserError for a setting that cannot be.
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
        lookup: int | None = None,
    ) -> None:
        self.model, self.mask_id, self.block, self.tokens, self.adapter = model, mask_id, block, tokens, adapter
        self.shift = adapter.config.shift if adapter else 0
        check_diffusion_tree(tokens, block, self.shift, model.config.vocab, synthetic is not None)
        self.masks = block - self.shift  # of a block
        if lookup and synthetic:
            raise UserError("diffusion: lookup copies drafts from the text, and verifies them exactly")
        self.lookup = lookup
        self._longest = max(block, 1 + min(tokens, LONGEST_LOOKUP) if lookup else 0)  # rows of an accepted path
        self.proposals = min(tokens + 1 if proposals is None else proposals, tokens + 1)
        self.synthetic, self.exact = synthetic, None if synthetic else True
        self.kernels = {**model.kernels, **kernels(model.device)}
        self._tree = BlockTree(block - 1, tokens, model.device, whole=synthetic is not None)
        self._drawn = None  # the log [1 + tokens] of the chance that so many drafts are accepted, or more
        if synthetic is not None:
            reached = torch.tensor(synthetic.chances, dtype=torch.float64).flip(0).cumsum(0).flip(0)
            reached = F.pad(reached, (0, tokens + 1 - len(reached))).log().clamp(min=cpu.NEVER)
            self._drawn = reached.float().to(model.device)

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        return generate(self, prompts, request, meter)

    def start(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> TreeState:
        # The step that reaches the limit may commit a path beyond it, and the next one still writes its rows.
        rows = 1 + self.tokens + self.proposals * self.masks
        state = new_state(self.model, prompts, request, headroom=self._longest + rows)
        logits, hidden = prefill_and_draft(
            self.model, state.cache, prompts, self.masks, self.mask_id, meter, self.adapter
        )
        with meter.phase("accept"):
            last = state.sampler.pick(logits, [0] * len(prompts))
        masks, first = hidden[:, 1 - self.shift :], torch.ones_like(last)
        drafts = self._predicted(masks, False, state.cache.sizes, first, meter)
        with meter.phase("accept"):
            tree, worth = self._tree.grow(last, state.cache.lengths, drafts)
        lookup = Lookup(prompts, request.limit, self.lookup, self.tokens) if self.lookup else None
        drafted = [True] * len(prompts)
        return TreeState(state.cache, state.sampler, last, state.outputs, state.active, tree, worth, drafted, lookup)

    def step(self, state: TreeState, meter: Meter) -> Step:
        model, contexts = self.model, state.cache.sizes
        drafted = self._drafts(state)
        proposal = proposed(state.lookup, state, lambda _: drafted)
        tree, count = proposal.rows, proposal.rows.ids.shape[1]
        worth = proposal.worth(state.worth[:, : drafted.ids.shape[1]])
        if self._drawn is not None:  # along first children, which come first, and no others
            path = (tree.parents == torch.arange(-1, count - 1, device=worth.device)).long().cumprod(1).bool()
            worth = self._drawn[:count].where(path & (worth > cpu.NEVER / 2), cpu.NEVER)
        rows, ends = tree_and_blocks(tree, worth, min(self.proposals, count), self.masks, self.mask_id)
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
            block, ahead = last_block(verdict.kept, verdict.counts, ends, self.block)
            chosen = self._chosen(out.logits if at_once else out.hidden[model.config.layers], count, block, ahead)
        drafts = self._predicted(chosen, at_once, contexts, index + verdict.counts, meter)
        with meter.phase("accept"):
            state.last = verdict.bonus
            usable = (self.block - 1 - ahead).clamp(min=0)
            lengths = state.cache.lengths + verdict.counts
            state.tree, state.worth = self._tree.grow(state.last, lengths, drafts, None, usable)
            kept = 1 + tree.positions.gather(1, ends) - tree.positions[:, :1]
            gained = torch.cat([said(verdict), ahead[:, None], kept], 1).tolist()  # the step's only sync
        with meter.phase("commit"):
            counts = [row[0] * active for row, active in zip(gained, state.active, strict=True)]
            commit_path(state.cache, verdict, gained, counts, self._longest, ())
            beside = 1 + 2 * count
            behind = [row[beside] for row in gained]
            looked_up = proposal.looked_up or [False] * len(behind)
            offered = zip(proposal.drafted, state.drafted, looked_up, strict=True)
            drafted_now = tuple(n * (own or copied) for n, own, copied in offered)
            state.drafted = [n < self.block - 1 for n in behind]
        return Step(
            tokens=[row[1 : 1 + kept] for row, kept in zip(gained, counts, strict=True)],
            drafted=drafted_now,
            accepted=tuple(max(kept - 1, 0) for kept in counts),
            covered=tuple(n == 0 for n in behind),
            prepared=tuple(gained[0][beside + 1 :]),
            looked_up=proposal.looked_up,
        )

    def _drafts(self, state: TreeState) -> Rows:
        """The tree, of those sequences [B] only for which something was predicted: others' nodes are filler."""
        wanted = [drafted for drafted, active in zip(state.drafted, state.active, strict=True) if active]
        if not any(wanted):
            return Rows.chain(state.last[:, None], state.cache.lengths)
        if all(wanted):
            return state.tree
        mine = on_device(state.drafted, state.last.device)[:, None]
        return replace(state.tree, parents=state.tree.parents.where(mine, -1))

    def _chosen(self, rows: Tensor, count: int, block: Tensor, ahead: Tensor) -> Tensor:
        """Of what the forward said at each row [B, R, ..], that of the masks of blocks [B], behind `count` rows, that
        predict what follows `ahead` [B] tokens and the next one: [B, block - 1, ..], as far as the block reaches."""
        if len(rows) == 1 and rows.device.type == "cpu" and not int(ahead):  # no copy, where asking costs nothing
            first = count + int(block) * self.masks + 1 - self.shift
            return rows[:, first : first + self.block - 1]
        places = ahead[:, None] + 1 - self.shift + torch.arange(self.block - 1, device=rows.device)
        places = count + block[:, None] * self.masks + places.clamp(max=self.masks - 1)
        return rows[torch.arange(len(rows), device=rows.device)[:, None], places]

    def _predicted(self, masks: Tensor, headed: bool, contexts: list[int], index: Tensor, meter: Meter) -> Tensor:
        """As in `Diffusion`."""
        return masks if headed else run_head(self.model, masks, contexts, meter)
