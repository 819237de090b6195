"""Which part of a model each of several ranks holds (tensor parallelism). Sizes and slices only: no torch here.

Attention is cut between heads, MLPs (a mixture's: every expert's) between inner channels, the head between tokens of
the vocabulary; norms, routers and the embedding table, which is looked up and not multiplied, are whole on every rank.
A rank's product with its columns of `out` and `down` is one part of a sum, so each layer ends its two halves in an
all-reduce (Shoeybi et al. 2019, arXiv 1909.08053); the logits are gathered.

Shares differ by one unit at most, larger ones first: no rank has more to do than rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from zbench.errors import UserError
from zbench.models import families
from zbench.models.families import AnyConfig
from zbench.models.zaya_config import ZayaConfig

if TYPE_CHECKING:
    from torch import Tensor

Config = TypeVar("Config", bound=AnyConfig)
CHANNELS = 8  # inner channels go in such units where they can: GPU products want rows of 16 bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of rank `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def check(self, config: AnyConfig) -> None:
        """Raises UserError for heads that cannot be spread over so many ranks."""
        heads, kv = config.heads, config.kv_heads
        # ZAYA1 mixes the queries of a group into its key, so that a group cannot be split.
        whole = isinstance(config, ZayaConfig)
        fitting = [n for n in range(1, heads + 1) if n <= kv or (not whole and n % kv == 0 and heads % n == 0)]
        if (size := self.size) not in fitting:
            raise UserError(
                f"parallel.tensor: {heads} query heads over {kv} key/value heads cannot be spread over {size} ranks;"
                f" possible: {', '.join(map(str, fitting))}"
            )
        if config.ffn < size:
            raise UserError(f"parallel.tensor: {config.ffn} MLP channels cannot be spread over {size} ranks")

    def kv_heads(self, config: AnyConfig) -> range:
        """Where there are fewer than ranks, several hold the same one."""
        if self.size > config.kv_heads:
            first = self.rank * config.kv_heads // self.size
            return range(first, first + 1)
        return self._share(config.kv_heads)

    def heads(self, config: AnyConfig) -> range:
        if self.size > config.kv_heads:
            return self._share(config.heads)
        group, mine = config.heads // config.kv_heads, self.kv_heads(config)
        return range(mine.start * group, mine.stop * group)

    def ffn(self, config: AnyConfig) -> range:
        unit = CHANNELS if config.ffn % CHANNELS == 0 and config.ffn // CHANNELS >= self.size else 1
        mine = self._share(config.ffn // unit)
        return range(mine.start * unit, mine.stop * unit)

    def vocab(self, config: AnyConfig) -> range:
        """Tokens whose logits are computed here."""
        return self._share(config.vocab)

    def values(self, config: ZayaConfig) -> tuple[range, range]:
        """ZAYA1's value channels of the heads here: of the current token's projection, and of the delayed one's."""
        mine = channels(self.kv_heads(config), config.head_dim)
        half = config.delayed
        current = range(min(mine.start, half), min(mine.stop, half))
        return current, range(max(mine.start, half) - half, max(mine.stop, half) - half)

    def of(self, config: Config) -> Config:
        """The shape of this part; what is whole on every rank keeps its size, the vocabulary too."""
        if self.size == 1:
            return config
        self.check(config)
        heads, kv, ffn = len(self.heads(config)), len(self.kv_heads(config)), len(self.ffn(config))
        return replace(config, heads=heads, kv_heads=kv, ffn=ffn)

    def parameters(self, config: AnyConfig) -> int:
        """Weights that this rank holds."""
        part = families.parameter_count(self.of(config))
        return part if config.tied else part - (config.vocab - len(self.vocab(config))) * config.width

    def tensors(self, whole: Mapping[str, Tensor], config: AnyConfig) -> Mapping[str, Tensor]:
        """This part of a model's tensors, by their Hugging Face names; a tied head is sliced by `vocab`."""
        if self.size == 1:
            return whole
        return {name: part for name, tensor in whole.items() if (part := self._part(name, tensor, config)) is not None}

    def _part(self, name: str, tensor: Tensor, config: AnyConfig) -> Tensor | None:
        owner, _, kind = name.rpartition(".")
        module = owner.rpartition(".")[2]
        if kind == "bias" and module in ("o_proj", "down_proj") and ".gate." not in name:
            return tensor if self.rank == 0 else None  # of a sum of parts it is added once
        heads, kv = (channels(r(config), config.head_dim) for r in (self.heads, self.kv_heads))
        ffn = self.ffn(config)
        if kind == "gate_up_proj":  # of all experts [E, 2 F, D]: gates first
            return _pick(tensor, 1, ffn, range(ffn.start + config.ffn, ffn.stop + config.ffn))
        if kind == "down_proj":  # of all experts [E, D, F]
            return _pick(tensor, 2, ffn)
        if name == "lm_head.weight":
            return _pick(tensor, 0, self.vocab(config))
        if ".self_attn." in name:
            if module == "o_proj":
                return _pick(tensor, 1, heads)
            if module.startswith("conv_qk"):
                offset = config.heads * config.head_dim  # the keys' channels follow the queries'
                return _pick(tensor, 0, heads, range(kv.start + offset, kv.stop + offset))
            if kind == "temp":
                return _pick(tensor, 0, self.kv_heads(config))
            if isinstance(config, ZayaConfig) and module.startswith("v_proj"):
                current, late = self.values(config)
                return _pick(tensor, 0, current if module == "v_proj_current" else late)
            if module in ("q_proj", "k_proj", "v_proj"):
                return _pick(tensor, 0, heads if module == "q_proj" else kv)
        elif ".mlp." in name and ".gate." not in name:
            return _pick(tensor, 1 if module == "down_proj" else 0, ffn)
        return tensor

    def _share(self, units: int) -> range:
        whole, rest = divmod(units, self.size)
        start = self.rank * whole + min(self.rank, rest)
        return range(start, start + whole + (self.rank < rest))


WHOLE = Shard()


def channels(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def collective_bytes(config: AnyConfig, rows: int, wanted: int, itemsize: int, size: int, logit_bytes: int) -> float:
    """Bytes that a rank must send, and receive, in the collectives of one forward of `rows` rows over all sequences:
    2 (n - 1)/n of what is all-reduced, twice per layer, and (n - 1)/n of the logits gathered for `wanted` rows (the
    least for n ranks: Patarasuk & Yuan 2009, and what nccl-tests calls bus bandwidth)."""
    reduced = 2 * config.layers * rows * config.width * itemsize
    return (size - 1) / size * (2 * reduced + wanted * config.vocab * logit_bytes)


def _pick(tensor: Tensor, dim: int, *ranges: range) -> Tensor:
    """The given indices of one dimension, contiguous."""
    if len(ranges) == 1:
        return tensor.narrow(dim, ranges[0].start, len(ranges[0])).contiguous()
    index = [i for part in ranges for i in part]
    return tensor[(slice(None),) * dim + (index,)]
