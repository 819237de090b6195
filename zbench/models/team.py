"""The ranks that hold one model between them: its collectives, and how long they took.

Every rank of a team runs the same engine on the same prompts: sums and gathered logits are the same on all of them, to
the last bit, so that all take the same decisions and none has to be told. At the end of a trial `run.py` makes sure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zbench.models.families import AnyConfig
from zbench.models.shard import WHOLE, Shard

Mark = Any  # of `hardware.device`
Spans = list[tuple[Mark, Mark]]
# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class RankLost(Exception):
    """A collective failed: another rank is gone."""


class Team:
    """`group` None: one rank, and nothing to do. `mark` takes a point in time on the device."""

    def __init__(
        self,
        shard: Shard = WHOLE,
        group: Any = None,
        mark: Callable[[], Mark] = lambda: None,
        timed_every: int = 1,
    ) -> None:
        """`timed_every`: of so many forwards one has its collectives timed; marks on a GPU's stream cost the host more
        than the rest of the meter."""
        self.shard, self.group, self.timed_every = shard, group, timed_every
        self.alive = 0  # grows with every collective and every step: what a watch looks at
        self._mark, self._spans, self._forwards = mark, Spans(), 0

    @property
    def size(self) -> int:
        return self.shard.size

    @property
    def kernels(self) -> dict[str, str]:
        """For the record of what ran."""
        return {} if self.group is None else {"collectives": f"{dist.get_backend(self.group)}, {self.size} ranks"}

    def reduce(self, part: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The sum of all ranks' parts, which may be written over; it travels in `dtype`."""
        if self.group is None:
            return part
        whole = part.to(dtype or part.dtype).contiguous()
        self._timed(lambda: dist.all_reduce(whole, group=self.group))
        return whole.to(part.dtype)

    def gather_vocab(self, logits: Tensor, config: AnyConfig) -> Tensor:
        """Each rank's logits [..., its tokens] -> [..., V]."""
        if self.group is None:
            return logits
        sizes = [len(Shard(rank, self.size).vocab(config)) for rank in range(self.size)]
        flat = logits.reshape(-1, logits.shape[-1])
        # Equal parts on the wire: the shares differ by one token at most, and the first rank has the most.
        mine = torch.nn.functional.pad(flat, (0, sizes[0] - flat.shape[1])).contiguous()
        parts = mine.new_empty(self.size * len(mine), sizes[0])
        self._timed(lambda: _all_gather(parts, mine, group=self.group))
        each = zip(parts.view(self.size, *mine.shape), sizes, strict=True)
        whole = torch.cat([part[:, :size] for part, size in each], 1)
        return whole.view(*logits.shape[:-1], config.vocab)

    def taken(self) -> Spans | None:
        """The collectives since last asked, as marks of begin and end; None where they were not timed. One answer per
        forward."""
        timed, spans = self._times, self._spans
        self._spans, self._forwards = Spans(), self._forwards + 1
        return spans if timed and self.group is not None else None

    @property
    def _times(self) -> bool:
        return self._forwards % self.timed_every == 0

    def _timed(self, collective: Callable[[], Any]) -> None:
        self.alive += 1
        start = self._mark() if self._times else None
        try:
            collective()
        except RuntimeError as error:  # gloo: the connection was closed, or nobody answered in time
            raise RankLost(str(error).splitlines()[0]) from error
        if self._times:
            self._spans.append((start, self._mark()))


ALONE = Team()
