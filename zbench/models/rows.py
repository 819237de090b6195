"""What one forward feeds: rows, and who sees whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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

    @classmethod
    def chain(cls, ids: Tensor, lengths: Tensor) -> Rows:
        """Consecutive tokens after each prefix: decode (R = 1), prefill, verification of a chain.

        ids [B, R], lengths [B] committed tokens per sequence.
        """
        batch, count = ids.shape
        steps = torch.arange(count, device=ids.device)
        visible = torch.ones(count, count, dtype=torch.bool, device=ids.device).tril_()
        return cls(
            ids=ids,
            positions=lengths[:, None] + steps,
            parents=(steps - 1).expand(batch, count),
            visible=visible.expand(batch, count, count),
            causal=True,
        )

    @classmethod
    def tree(cls, ids: Tensor, lengths: Tensor, parents: Tensor) -> Rows:
        """A tree per sequence: parents [B, R] with parents[b, i] < i (or -1); a row sees its ancestors and itself."""
        visible = ancestors(parents)
        return cls(ids, lengths[:, None] + visible.sum(-1) - 1, parents, visible)


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
