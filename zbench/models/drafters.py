"""Shapes of EAGLE-3 and DFlash drafters and what their forwards cost, without weights: no torch here.

`models/eagle3.py` and `models/dflash.py` run these drafters; a projection asks their shapes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from zbench.errors import UserError
from zbench.models.config import ModelConfig
from zbench.models.cost import LOGIT_BYTES, Cost, forward_cost
from zbench.models.families import AnyConfig
from zbench.models.shard import WHOLE, Shard, collective_bytes

EAGLE3_VOCAB = 8192  # draft vocabulary of a drafter that nobody trained
DFLASH_LAYERS, DFLASH_BLOCK = 5, 16  # as released


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """One drafter's shape. `layer` is its decoder layer; layer.vocab is the target's vocabulary."""

    layer: ModelConfig
    draft_vocab: int  # equal to layer.vocab: no reduction
    taps: tuple[int, ...]  # target hidden states it reads: i is the input of layer i
    target_width: int
    norm_before_residual: bool = False  # the residual is hidden_norm(feature), not the feature
    norm_before_fc: bool = False  # an RMSNorm over the concatenated taps
    fc_norm: bool = False  # an RMSNorm per tap
    norm_output: bool = False  # the next feature is norm(h2), not h2 ("EAGLE 3.1")

    @classmethod
    def of_target(cls, target: AnyConfig, draft_vocab: int = EAGLE3_VOCAB) -> Eagle3Config:
        """The shape of a released drafter for such a target."""
        layer = ModelConfig(
            family="llama",
            layers=1,
            **{
                name: getattr(target, name)
                for name in ("width", "ffn", "heads", "kv_heads", "head_dim", "vocab", "rms_eps")
            },
            max_positions=target.max_positions,
            tied=False,
        )
        return cls(layer, min(draft_vocab, target.vocab), eagle3_taps(target.layers), target.width)

    def cost(
        self,
        rows: int,
        contexts: Sequence[int],
        wanted: int,
        pairs: int,
        fused: bool,
        itemsize: int,
    ) -> Cost:
        """Cost of reading `rows` tokens per sequence, as `cost.forward_cost` counts it.

        `wanted` rows over the whole batch ask for logits, `pairs` counts the (row, visible new row) pairs of one
        sequence, `fused` says whether the rows' features come from the target through `fc`. Weights, cached keys and
        values have `itemsize` bytes per element.
        """
        layer = self.layer
        total = rows * len(contexts)
        q, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        projections = layer.width * (2 * (q + 2 * kv) + q + 3 * layer.ffn)
        projections += len(self.taps) * self.target_width * layer.width if fused else 0
        head = layer.width * self.draft_vocab
        attended = rows * sum(contexts) + len(contexts) * pairs
        tap_norms = len(self.taps) * self.target_width * (self.norm_before_fc + self.fc_norm)
        norms = 3 * layer.width + (tap_norms if fused else 0)
        weights = projections + norms + total * layer.width + (head + layer.width if wanted else 0)
        kv_bytes = 2 * kv * itemsize
        return Cost(
            flops=float(2 * total * projections + 4 * q * attended + 2 * wanted * head),
            weight_bytes=float(weights * itemsize),
            kv_bytes=float(sum(contexts) * kv_bytes),
            bytes_written=float(total * kv_bytes + wanted * self.draft_vocab * LOGIT_BYTES),
        )


@dataclass(frozen=True, slots=True)
class DFlashConfig:
    """One drafter's shape. `body` are its layers; body.vocab is the vocabulary its logits are over."""

    body: ModelConfig
    taps: tuple[int, ...]  # target hidden states it reads: i is the input of layer i, or the output of layer i - 1
    mask_id: int
    block: int  # tokens of a block in training, anchor included
    own_head: bool = False  # a head of its own, over a reduced vocabulary perhaps

    @classmethod
    def of_target(cls, target: AnyConfig, layers: int = DFLASH_LAYERS, block: int = DFLASH_BLOCK) -> DFlashConfig:
        """The shape of a released drafter for such a target. Raises UserError for a target with too few layers.

        As many hidden states are read as there are layers, as released, or as many as the target has. The mask is the
        last token of the vocabulary: released drafters use an id that no text has, but nothing tells which that is.
        """
        shared = ("width", "ffn", "heads", "kv_heads", "head_dim", "vocab", "max_positions")
        rotary = ("rope_theta", "rope_scaling", "rms_eps")
        body = ModelConfig(
            family="qwen3",
            layers=layers,
            **{name: getattr(target, name) for name in (*shared, *rotary)},
            tied=False,
            qk_norm=True,
        )
        taps = dflash_taps(target.layers, min(layers, max(target.layers - 3, 1)))
        return cls(body, taps, target.vocab - 1, block)

    def reduced(self, vocab: int) -> DFlashConfig:
        """Of a drafter of tokens with ids below `vocab`, see `dflash.reduced`. Raises UserError where none can be."""
        if self.own_head:
            raise UserError("dflash: the drafter has a head of its own, which draft_vocab cannot reduce")
        check_draft_vocab(vocab, self.body.vocab)
        return replace(self, own_head=True, body=replace(self.body, vocab=vocab))

    def cost(self, read: int, block: int, contexts: Sequence[int], itemsize: int, shard: Shard = WHOLE) -> Cost:
        """Of reading `read` new tokens per sequence, then drafting a block (0: none) after contexts[b] tokens. Every
        rank has the drafter's layers whole; the head is the target's and shared as `shard` says, unless it has one."""
        body, batch = self.body, len(contexts)
        kv = body.layers * 2 * body.kv_heads * body.head_dim
        fusing = body.width * (len(self.taps) * body.width + kv) if read else 0
        norms = body.width + body.layers * body.head_dim if read else 0
        reading = Cost(
            flops=2.0 * batch * read * fusing,
            weight_bytes=float(itemsize * (fusing + norms)),
            kv_bytes=0.0,
            bytes_written=float(itemsize * batch * read * kv),
        )
        if not block:
            return reading
        layers = forward_cost(body, block, contexts, 0, itemsize, block * block)
        shard = WHOLE if self.own_head else shard
        logits, head = batch * (block - 1), body.width * len(shard.vocab(body))
        return Cost(
            flops=reading.flops + layers.flops + 2 * logits * head,
            weight_bytes=reading.weight_bytes + layers.weight_bytes + itemsize * (head + body.width),
            kv_bytes=layers.kv_bytes,
            bytes_written=reading.bytes_written + layers.bytes_written + LOGIT_BYTES * logits * body.vocab,
            collective_bytes=collective_bytes(body, 0, logits, itemsize, shard.size, LOGIT_BYTES),
        )


def check_draft_vocab(vocab: int, whole: int) -> None:
    """Raises UserError where a vocabulary of `whole` tokens has no such first part."""
    if not 1 <= vocab <= whole:
        raise UserError(f"dflash: draft_vocab {vocab} is not within the vocabulary of {whole} tokens")


def eagle3_taps(layers: int) -> tuple[int, ...]:
    """Inputs of layers 2, L/2 and L-3, as released; a target under seven layers has what there is of them."""
    return tuple(sorted({min(2, layers), layers // 2, max(layers - 3, 0)}))


def dflash_taps(layers: int, count: int) -> tuple[int, ...]:
    """`count` hidden states spread from the output of layer 1 to that of layer L - 3, as released.

    Raises UserError for a target with too few layers to have that many different ones there.
    """
    ids = [layers // 2] if count == 1 else [round(1 + i * (layers - 4) / (count - 1)) for i in range(count)]
    if len(set(ids)) != count or not all(0 <= index < layers for index in ids):
        raise UserError(f"dflash: a target of {layers} layers has no {count} different layers to read; ask for fewer")
    return tuple(index + 1 for index in ids)
