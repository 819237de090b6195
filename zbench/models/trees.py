"""Drafts as trees: the best of many candidates as rows of one forward, and a tree out of a block's distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from zbench.kernels import cpu
from zbench.models.rows import Rows


class BlockTree:
    """The `tokens` likeliest paths through a block whose places were drafted at once (DDTree, Ringel and Romano 2026,
    arXiv 2604.12989): every prefix of places counts as a node with the product of its tokens' chances, and the best of
    these are verified as a tree. Exact, as the paper's heap is: no prefix is likelier than a shorter one of it.
    """

    def __init__(self, places: int, tokens: int, device: torch.device, whole: bool = False) -> None:
        """Of `places` distributions over at least `tokens` tokens; `whole` keeps the path of the likeliest tokens in
        full, whatever it is worth, for which `tokens` must reach."""
        self.tokens, self._places, self._whole = tokens, places, whole
        # Of two descending lists only pairs (i, j) with (i + 1) (j + 1) <= tokens can be among the best sums.
        pairs = [(i, j) for i in range(tokens) for j in range(tokens // (i + 1))]
        self._prefix, self._token = torch.tensor(pairs).T.contiguous().to(device)
        # Candidate numbers [places, tokens]: the path of the likeliest first, so that its rows stay where they are when
        # they are accepted.
        rest = torch.arange(places * (tokens - 1)).view(places, tokens - 1) + places
        self._number = torch.cat([torch.arange(places)[:, None], rest], 1).to(device)

    def grow(
        self, last: Tensor, lengths: Tensor, logits: Tensor, ids: Tensor | None = None, usable: Tensor | None = None
    ) -> tuple[Rows, Tensor]:
        """`last` [B], committed behind prefixes of `lengths` [B], and the tree below it, out of logits [B, places, V]
        for the tokens ids [V]; None: the target's own. Of the places only the first `usable` [B] say something; None:
        all. Besides, the log [B, 1 + tokens] of each node's chance. No host sync, and nothing that a graph could not
        record."""
        if cpu.can_verify(logits):
            named, positions, above, visible, worth = cpu.block_tree(
                last, lengths, logits, ids, usable, self.tokens, self._whole
            )
            return Rows(named, positions, above, visible), worth
        best = logits.topk(self.tokens)
        chances = best.values - logits.logsumexp(-1, keepdim=True)
        if self._whole:
            chances[..., 0] = 0
        if usable is not None:
            idle = torch.arange(self._places, device=logits.device) >= usable[:, None]
            chances = chances.masked_fill(idle[..., None], cpu.NEVER)
        tokens = best.indices if ids is None else ids[best.indices]
        scores, found = chances[:, 0], [(tokens[:, 0], chances[:, 0], torch.full_like(tokens[:, 0], -1))]
        for place in range(1, self._places):
            sums = scores[:, self._prefix] + chances[:, place, self._token]
            order = sums.sort(dim=1, descending=True, stable=True).indices[:, : self.tokens]
            scores, came_from = sums.gather(1, order), self._prefix[order]
            found.append((tokens[:, place].gather(1, self._token[order]), scores, self._number[place - 1, came_from]))
        named, sums, parents = (
            torch.cat([torch.stack([part[:, 0] for part in parts], 1), *(part[:, 1:] for part in parts)], 1)
            for parts in zip(*found, strict=True)
        )
        drafts, parents, worth = rerank(named, sums, parents, self.tokens)
        rows = tree_rows(torch.cat([last[:, None], drafts], 1), lengths, parents, self._places)
        return rows, torch.cat([torch.zeros_like(worth[:, :1]), worth], 1)


def tree_and_blocks(tree: Rows, worth: Tensor, proposals: int, block: int, mask: int) -> tuple[Rows, Tensor]:
    """A tree with a block of masks behind each of the `proposals` rows at which a path is likeliest to end, and these
    rows [B, proposals], ascending.

    With w the chance that a path reaches a row (`worth` [B, N] is its log), it ends there with w(v) less the sum of w
    over the row's children. Rows but the first that have no parent are padding, of worth `cpu.NEVER`.
    """
    if worth.device.type == "cpu" and cpu.available():
        fields = (tree.ids, tree.positions, tree.parents, tree.visible)
        ends, ids, positions, parents, masks, visible = cpu.tree_and_blocks(fields, worth, proposals, block, mask)
        return Rows(ids, positions, parents, visible, masks=masks), ends
    reached = worth.exp()
    chances = reached.scatter_add(1, tree.parents[:, 1:].clamp(min=0), -reached[:, 1:])
    ends = chances.sort(dim=1, descending=True, stable=True).indices[:, :proposals].sort(1).values
    return Rows.tree_and_blocks(tree, ends, block, mask), ends


def last_block(kept: Tensor, counts: Tensor, ends: Tensor, none: int) -> tuple[Tensor, Tensor]:
    """For accepted paths, rows kept [B, N] of which counts [B] are real, and rows `ends` [B, P] that blocks stand
    behind: which block is the last on the path, and how many rows of the path come after it; 0 and `none` where there
    is none."""
    if kept.device.type == "cpu" and cpu.available():
        return cpu.last_block(kept, counts, ends, none)
    blocks = torch.full_like(kept, -1)
    blocks.scatter_(1, ends, torch.arange(ends.shape[1], device=ends.device).expand_as(ends))
    along = torch.where(kept >= 0, blocks.gather(1, kept.clamp(min=0)), -1)
    place = torch.where(along >= 0, torch.arange(kept.shape[1], device=kept.device), -1).amax(1)
    block = along.gather(1, place.clamp(min=0)[:, None])[:, 0].clamp(min=0)
    return block, torch.where(place >= 0, counts - 1 - place, none)


def best_rows(
    last: Tensor, lengths: Tensor, ids: Tensor, scores: Tensor, parents: Tensor, tokens: int, depth: int
) -> Rows:
    """`last` [B] and below it the `tokens` best of candidates [B, N] on `depth` levels, or all; see `rerank`."""
    tokens = min(tokens, ids.shape[1])
    if ids.device.type == "cpu" and cpu.available():
        return Rows(*cpu.tree_rows(last, lengths, ids, scores, parents, tokens))
    drafts, parents, _ = rerank(ids, scores, parents, tokens)
    return tree_rows(torch.cat([last[:, None], drafts], 1), lengths, parents, depth)


def rerank(ids: Tensor, scores: Tensor, parents: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the best nodes of a draft: candidates [B, N] in order of level, parents as candidate numbers, -1 the root.

    Returns tokens [B, T], parents [B, 1 + T] as rows, row 0 the root, and scores [B, T]. A kept node's ancestors are
    kept: none has a lower score, and of equal scores the earlier candidate goes first.
    """
    batch, count = ids.shape
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :tokens].sort(1).values
    row_of = order.new_zeros(batch, count)
    row_of.scatter_(1, order, torch.arange(1, tokens + 1, device=ids.device).expand(batch, -1))
    above = parents.gather(1, order)
    rows = row_of.gather(1, above.clamp(min=0)).masked_fill(above < 0, 0)
    return ids.gather(1, order), torch.cat([rows.new_full((batch, 1), -1), rows], 1), scores.gather(1, order)


def tree_rows(ids: Tensor, lengths: Tensor, parents: Tensor, depth: int) -> Rows:
    """`Rows.tree` for a tree of at most `depth` levels below its root, without asking the device anything.

    A row sees what it saw and what the row 2^n levels above it saw, for n = 0, 1, ...; the root is above itself.
    """
    sequence = torch.arange(len(ids), device=ids.device)[:, None]
    up = parents.clamp(min=0)
    visible = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device).expand(len(ids), -1, -1)
    for _ in range(depth.bit_length()):
        visible = visible | visible[sequence, up]
        up = up.gather(1, up)
    return Rows(ids, lengths[:, None] + visible.sum(-1) - 1, parents, visible)
