"""What one forward feeds: rows, and who sees whom."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch of B sequences, each feeding R rows (token positions), padded to the same R.

    A row always sees the committed prefix of its sequence (the cache knows its length) and itself; among the
    new rows it sees what `visible` says. A padding row sees itself only and is never committed.
    """

    ids: Tensor  # [B, R] int64; a mask position holds the mask id
    positions: Tensor  # [B, R] int64 rotary positions
    parents: Tensor  # [B, R] int64: the row (>= 0) that precedes it, or -1 for the end of the committed prefix
    visible: Tensor  # [B, R, R] bool: row i sees row j
    causal: bool = False  # visible is the plain lower triangle and positions are consecutive
    masks: Tensor | None = (
        None  # [B, R] int64: which mask of its block a row is (0 first), -1 for a token; None: none is
    )

    @classmethod
    def chain(cls, ids: Tensor, lengths: Tensor) -> Rows:
        """Consecutive tokens after each prefix: decode (R = 1), prefill, verification of a chain.

        ids [B, R], lengths [B] committed tokens per sequence.
        """
        batch, count = ids.shape
        steps, parents, visible = _chain(count, ids.device)
        return cls(
            ids=ids,
            positions=lengths[:, None] + steps,
            parents=parents.expand(batch, count),
            visible=visible.expand(batch, count, count),
            causal=True,
        )

    @classmethod
    def tree(cls, ids: Tensor, lengths: Tensor, parents: Tensor) -> Rows:
        """A tree per sequence: parents [B, R] with parents[b, i] < i (or -1); a row sees its ancestors and itself."""
        visible = ancestors(parents)
        return cls(ids, lengths[:, None] + visible.sum(-1) - 1, parents, visible)

    def clone(self) -> Rows:
        """The same in memory of its own, for rows without masks."""
        return replace(
            self,
            ids=self.ids.clone(),
            positions=self.positions.clone(),
            parents=self.parents.clone(),
            visible=self.visible.clone(),
        )

    @classmethod
    def draft_and_verify(cls, drafts: Tensor, lengths: Tensor, block: int, outcomes: Sequence[int], mask: int) -> Rows:
        """A TiDAR step (arXiv 2511.08923, figure 3): drafts [B, n] as a chain, then a block of masks per outcome.

        Outcome r says that the first r drafts are kept; its block stands where r kept drafts end, sees them, the
        prefix and itself in both directions, and nothing else. Rows: n + len(outcomes) * block.
        """
        batch, count = drafts.shape
        offsets, parents, visible, masks = _draft_and_verify(count, block, tuple(outcomes), drafts.device)
        total = len(offsets)
        ids = drafts.new_full((batch, total), mask)
        ids[:, :count] = drafts
        return cls(
            ids=ids,
            positions=lengths[:, None] + offsets,
            parents=parents.expand(batch, total),
            visible=visible.expand(batch, total, total),
            causal=not outcomes,
            masks=masks.expand(batch, total) if outcomes else None,
        )

    @classmethod
    def tree_and_blocks(cls, tree: Rows, ends: Tensor, block: int, mask: int) -> Rows:
        """A tree of N rows, then a block of masks for each of its rows `ends` [B, P]: the block stands where the path
        to that row ends, sees it, the prefix and itself in both directions, and nothing else. Rows: N + P * block.
        """
        (batch, count), proposals = tree.ids.shape, ends.shape[1]
        places, own = _blocks(proposals, block, tree.ids.device)
        after = tree.positions.gather(1, ends)[..., None] + 1
        first = count + block * torch.arange(proposals, device=ends.device)[:, None]
        parents = (first + torch.arange(-1, block - 1, device=ends.device)).repeat(batch, 1, 1)
        parents[..., :1] = ends[..., None]
        seen = tree.visible.gather(1, ends[..., None].expand(-1, -1, count)).repeat_interleave(block, 1)
        return cls(
            ids=F.pad(tree.ids, (0, proposals * block), value=mask),
            positions=torch.cat([tree.positions, (after + places[:block]).flatten(1)], 1),
            parents=torch.cat([tree.parents, parents.flatten(1)], 1),
            visible=torch.cat([F.pad(tree.visible, (0, len(own))), torch.cat([seen, own.expand(batch, -1, -1)], 2)], 1),
            masks=torch.cat([tree.ids.new_full((batch, count), -1), places.expand(batch, -1)], 1),
        )

    @classmethod
    def prompt_and_block(cls, ids: Tensor, lengths: Tensor, counts: Tensor, block: int, mask: int) -> Rows:
        """Prompts ids [B, R], of which counts [B] are real, then a block of masks that stands at each prompt's end."""
        batch, count = ids.shape
        steps = torch.arange(count + block, device=ids.device)
        place = steps - count  # of a mask in its block
        is_mask = (place >= 0).expand(batch, -1)
        own = (steps < counts[:, None]) | is_mask  # a padding row is seen by no block
        visible = (steps[:, None] >= steps) | (is_mask[:, :, None] & is_mask[:, None])
        return cls(
            ids=torch.cat([ids, ids.new_full((batch, block), mask)], 1),
            positions=lengths[:, None] + torch.where(is_mask, counts[:, None] + place, steps),
            parents=torch.where(is_mask & (place == 0), counts[:, None] - 1, steps - 1),
            visible=torch.where(is_mask[:, :, None], visible & own[:, None], visible),
            masks=place.clamp(min=-1).expand(batch, -1),
        )

    @classmethod
    def canvas(cls, ids: Tensor, lengths: Tensor, mask: int) -> Rows:
        """A block ids [B, n] after each prefix, partly masks, whose rows all see each other."""
        batch, count = ids.shape
        chain = cls.chain(ids, lengths)
        places = torch.arange(count, device=ids.device).expand(batch, count)
        return replace(
            chain,
            visible=torch.ones_like(chain.visible),
            causal=False,
            masks=torch.where(ids == mask, places, -1),
        )


# What steps of one setting have in common is made once. Not in inference mode, whatever the first caller is in: such
# tensors are of no use to training.


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _chain(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(positions after the prefix [R], parents [R], visible [R, R]) of `Rows.chain`."""
    steps = torch.arange(count, device=device)
    return steps, steps - 1, torch.ones(count, count, dtype=torch.bool, device=device).tril_()


@functools.lru_cache(maxsize=512)
@torch.inference_mode(False)
def _draft_and_verify(
    drafts: int, block: int, outcomes: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(positions after the prefix [R], parents [R], visible [R, R], masks [R]) of `Rows.draft_and_verify`."""
    if not all(1 <= kept <= drafts for kept in outcomes):
        raise ValueError(f"outcomes {outcomes} of {drafts} drafts")
    total = drafts + len(outcomes) * block
    offsets, parents = torch.arange(total), torch.arange(total) - 1
    visible, masks = torch.zeros(total, total, dtype=torch.bool), torch.full((total,), -1)
    visible[:drafts, :drafts] = torch.ones(drafts, drafts, dtype=torch.bool).tril()
    for index, kept in enumerate(outcomes):
        own = slice(drafts + index * block, drafts + (index + 1) * block)
        offsets[own] = kept + torch.arange(block)
        parents[own.start] = kept - 1
        visible[own, :kept] = True
        visible[own, own] = True
        masks[own] = torch.arange(block)
    return offsets.to(device), parents.to(device), visible.to(device), masks.to(device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _blocks(count: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(which mask of its block a row is [R], visible [R, R]) of `count` blocks that see themselves alone."""
    whose = torch.arange(count, device=device).repeat_interleave(block)
    return torch.arange(block, device=device).repeat(count), whose[:, None] == whose


def ancestors(parents: Tensor) -> Tensor:
    """parents [B, R] -> [B, R, R] bool: j is i or an ancestor of i. Raises ValueError unless parents precede rows."""
    batch, count = parents.shape
    steps = torch.arange(count, device=parents.device)
    if bool((parents >= steps).any()):
        raise ValueError("a row's parent must come before it")
    visible = torch.eye(count, dtype=torch.bool, device=parents.device).repeat(batch, 1, 1)
    sequences = torch.arange(batch, device=parents.device)
    for row in range(count):
        parent = parents[:, row]
        inherited = visible[sequences, parent.clamp(min=0)] & (parent >= 0)[:, None]
        visible[:, row] |= inherited
    return visible
