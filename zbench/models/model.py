"""What every target model is to the engines: one forward over rows, whatever the architecture."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from zbench.models.adapter import MaskAdapter
from zbench.models.cache import Cache
from zbench.models.cost import Cost, Routing
from zbench.models.families import AnyConfig
from zbench.models.rows import Rows
from zbench.models.team import ALONE, Team
from zbench.models.zaya_config import ZayaConfig
from zbench.records import PreparationRecord

if TYPE_CHECKING:
    from zbench.models.execution import Graphs
    from zbench.models.loading import LoadedModel


@dataclass(frozen=True, slots=True)
class Output:
    logits: Tensor  # [B, n, V] float32, for the rows that asked
    hidden: dict[int, Tensor]  # captured hidden states [B, R, D] by index
    routed: Tensor | None = None  # [L, E + 1] int64: rows that each expert got, those that skip last; None where dense


class Model(Protocol):
    """`embedding` [V, D] and `head` may be shared by a drafter; `kernels` says what runs each operator; `team` are the
    ranks that hold it between them, `config` is that of the whole model.

    `execution` is what runs it: native (own CPU kernels), eager (torch's operators), compiled or graph; what that had
    to prepare is appended to `prepared`.
    """

    kernels: dict[str, str]
    execution: str
    prepared: list[PreparationRecord]
    graphs: Graphs | None  # where the execution is graph; a drafter records its own beside them
    dtype: torch.dtype
    device: torch.device
    embedding: Tensor
    team: Team

    @property
    def config(self) -> AnyConfig: ...

    @property
    def packed_head(self) -> Tensor | None:
        """The whole head as native CPU kernels read it (`cpu.pack`); None where torch runs it."""
        ...

    def executed(self, execution: str) -> Model:
        """The same weights run as eager, compiled or graph. ValueError where they are packed for the native kernels,
        ExecutionUnavailable where that cannot be."""
        ...

    def new_cache(self, batch: int, capacity: int) -> Cache: ...

    def cost(
        self,
        rows: int,
        contexts: Sequence[int],
        wanted: int,
        pairs: float | None = None,
        routing: Routing | None = None,
        places: Sequence[Sequence[int]] | None = None,
    ) -> Cost:
        """What a forward of `rows` rows per sequence after prefixes `contexts` costs; see `cost.forward_cost`."""
        ...

    def forward(
        self,
        rows: Rows,
        cache: Cache,
        *,
        logits: Tensor | None = None,
        capture: Sequence[int] = (),
        adapter: MaskAdapter | None = None,
    ) -> Output:
        """Run `rows`, writing what they leave behind the committed prefix (commit decides what stays).

        `logits` [B, n] names the rows of each sequence that need logits (None: all rows; [B, 0]: none).
        `capture` lists hidden states to return, ascending: index i is the input of layer i (0 the embedding,
        `config.layers` the output of the last layer before the final norm).
        `adapter` acts on the rows that `rows.masks` says are masks, on no other; ValueError where the architecture has
        no place for one.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] captured at `config.layers` -> logits [..., V] float32, by final norm and head."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] that passed a final norm -> logits [..., V] float32."""
        ...


def build(model: LoadedModel, dtype: torch.dtype, device: torch.device, execution: str, team: Team = ALONE) -> Model:
    """The loaded model on a device, by its architecture. `execution` auto is native on a CPU if it can, else eager.

    Raises NativeUnavailable and ExecutionUnavailable as the architectures do.
    """
    from zbench.models import transformer, zaya

    if isinstance(model.config, ZayaConfig):
        return zaya.Zaya(model.config, model.tensors, dtype, device, execution, team)
    return transformer.Transformer(model.config, model.tensors, dtype, device, execution, team=team)


def check_room(count: int, cache: Cache) -> None:
    """Raises ValueError where so many rows do not fit the cache."""
    if max(cache.sizes) + count > cache.capacity:
        raise ValueError(f"{count} rows after {max(cache.sizes)} tokens exceed the cache's {cache.capacity}")


def wanted_rows(rows: Rows, logits: Tensor | None) -> Tensor:
    """[n] flat indices of the rows that ask for logits."""
    batch, count = rows.ids.shape
    if logits is None:
        return _all_rows(batch * count, rows.ids.device)
    offsets = torch.arange(batch, device=rows.ids.device)[:, None] * count
    return (logits + offsets).reshape(-1)


def asked(x: Tensor, rows: Rows, logits: Tensor | None) -> Tensor:
    """Of x [B R, D] the rows that ask for logits. All of them take no index that is kept elsewhere: a graph that holds
    its address would outlive it."""
    return x if logits is None else x[wanted_rows(rows, logits)]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _all_rows(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def count_choices(choices: Sequence[Tensor], experts: int) -> Tensor:
    """`Output.routed` from each layer's choices [N], of which E skips."""
    chosen = torch.stack(list(choices))
    return chosen.new_zeros(len(chosen), experts + 1).scatter_add_(1, chosen, torch.ones_like(chosen))


def routing(routed: Tensor) -> Routing:
    """What `Output.routed` says about a forward's cost. Waits for the device."""
    experts = routed[:, :-1]
    return Routing(
        hit=float((experts > 0).sum(1, dtype=torch.float64).mean()),
        rows=float(experts.sum(1, dtype=torch.float64).mean()),
    )
