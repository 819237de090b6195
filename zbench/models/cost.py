"""What one forward costs, counted from shapes: the numbers every roofline in this suite stands on.

Traffic is the least a forward can do: each weight once, each sequence's cached keys and values once, the new keys
and values and the logits written once. Activations between operators are left out, they stay in cache at decode
sizes; so a byte count never exceeds the real traffic and `floor_seconds` is a floor. Of a mixture of experts only the
experts that the router hit are read. Where several ranks share a model, a cost is that of one rank's shard, and what it
sends to the others is counted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zbench.models.config import ModelConfig
from zbench.models.shard import WHOLE, Shard, collective_bytes
from zbench.models.zaya_config import CONV_TAPS, ZayaConfig

LOGIT_BYTES = 4  # logits are float32 whatever the weights are


@dataclass(frozen=True, slots=True)
class Routing:
    """What the routers of a mixture of experts did in one forward; means over layers."""

    hit: float  # distinct experts that some row was sent to
    rows: float  # rows that an expert computed; the others skipped


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs and bytes of one forward; a multiply-add counts as two FLOPs."""

    flops: float
    weight_bytes: float
    kv_bytes: float  # the convolutions' state included, where there is one
    bytes_written: float
    experts: float | None = None  # distinct experts per layer, where a router was seen; never an expectation
    collective_bytes: float = 0.0  # sent to other ranks, beside the memory traffic

    @property
    def bytes_read(self) -> float:
        return self.weight_bytes + self.kv_bytes

    def __add__(self, other: Cost) -> Cost:
        """Of two forwards one after another, both of dense models."""
        return Cost(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
            self.bytes_written + other.bytes_written,
            collective_bytes=self.collective_bytes + other.collective_bytes,
        )

    @property
    def intensity(self) -> float:
        return self.flops / (self.bytes_read + self.bytes_written)


def expected_experts(experts: int, rows: float) -> float:
    """Distinct experts that `rows` rows hit if each is sent to one of them, all equally likely, on its own:
    E (1 - (1 - 1/E)^rows). A prediction: real routers are neither uniform nor independent from row to row."""
    return experts * (1 - (1 - 1 / experts) ** rows)


def attended(
    windows: Sequence[int | None],
    rows: int,
    contexts: Sequence[int],
    pairs: float,
    places: Sequence[Sequence[int]] | None = None,
) -> tuple[int, float]:
    """(cached tokens that are read, pairs of a row and a token that it sees) of all layers, whose sliding windows these
    are, and all sequences; see `forward_cost`.

    In a window w the row at place o sees none of the first C + o + 1 - w tokens. What the rows read of the cache is
    what the one at place 0 sees of it, w - 1 tokens.
    """
    behind = np.asarray(contexts)[:, None] + (np.arange(rows) if places is None else np.asarray(places)) + 1
    tokens, seen = 0, 0.0
    for window, layers in Counter(windows).items():
        hidden = 0 if window is None else int(np.maximum(behind - window, 0).sum())
        tokens += layers * sum(context if window is None else min(context, window - 1) for context in contexts)
        seen += layers * (rows * sum(contexts) + len(contexts) * pairs - hidden)
    return tokens, seen


def forward_cost(
    config: ModelConfig | ZayaConfig,
    rows: int,
    contexts: Sequence[int],
    wanted: int,
    itemsize: int,
    pairs: float | None = None,
    routing: Routing | None = None,
    shard: Shard = WHOLE,
    places: Sequence[Sequence[int]] | None = None,
) -> Cost:
    """Cost of a forward of `rows` rows for each of len(contexts) sequences with that many committed tokens.

    `wanted` rows over the whole batch ask for logits. `pairs` counts the (row, visible new row) pairs of one
    sequence, on average; None is the causal triangle rows (rows + 1) / 2. `routing` is what the routers of a mixture
    of experts did; None predicts it: `expected_experts` under uniform routing, and no row that skips. `places` say how
    far behind the committed tokens each row of each sequence stands, which matters within a sliding window only; None
    is one after another, and no more than what rows cost that stand nearer, as those of a tree do.

    Per layer, with R = rows and C = context: qkv 2 R D (q + 2 kv) d, scores and values 4 q d (R C + pairs), less what a
    sliding window hides (`attended`), output 2 R q d D, gated MLP 6 R D F; then the head 2 wanted D V. ZAYA's layers
    have further, with z = (q + kv) d channels, W the router's width and E experts: convolutions 4 R z (1 + d), router
    2 R (D W + 2 W² + W (E + 1)); the MLP counts for the rows that an expert computes. With a `shard`, heads, F and V
    are those of that rank; each rank looks up every row's embedding and ends with all logits.
    """
    if isinstance(config, ZayaConfig):
        return _zaya_cost(config, rows, contexts, wanted, itemsize, pairs, routing, shard)
    c, vocab = shard.of(config), len(shard.vocab(config))
    batch, total_rows = len(contexts), rows * len(contexts)
    pairs = rows * (rows + 1) // 2 if pairs is None else pairs
    qkv_width, q_width = (c.heads + 2 * c.kv_heads) * c.head_dim, c.heads * c.head_dim
    projections = qkv_width * c.width + q_width * c.width + 3 * c.width * c.ffn
    tokens, seen = attended(c.windows or (None,) * c.layers, rows, contexts, pairs, places)
    flops = 2 * c.layers * total_rows * projections + 4 * q_width * seen + 2 * wanted * c.width * vocab

    small = 2 * c.width + (2 * c.head_dim if c.qk_norm else 0)
    small += (qkv_width if c.qkv_bias else 0) + (c.width if c.out_bias else 0)
    small += (2 * c.ffn + c.width) if c.mlp_bias else 0
    head = (vocab + 1) * c.width if wanted else 0
    weights = c.layers * (projections + small) + head + total_rows * c.width  # the last: embedding rows looked up
    per_token = 2 * c.kv_heads * c.head_dim
    return Cost(
        flops=float(flops),
        weight_bytes=float(weights * itemsize),
        kv_bytes=float(tokens * per_token * itemsize),
        bytes_written=float(batch * rows * c.layers * per_token * itemsize + wanted * c.vocab * LOGIT_BYTES),
        collective_bytes=collective_bytes(config, total_rows, wanted, itemsize, shard.size, LOGIT_BYTES),
    )


def _zaya_cost(
    config: ZayaConfig,
    rows: int,
    contexts: Sequence[int],
    wanted: int,
    itemsize: int,
    pairs: float | None,
    routing: Routing | None,
    shard: Shard,
) -> Cost:
    c, vocab = shard.of(config), len(shard.vocab(config))
    values, delayed = map(len, shard.values(config))
    batch, total_rows = len(contexts), rows * len(contexts)
    pairs = rows * (rows + 1) // 2 if pairs is None else pairs
    used = routing or Routing(expected_experts(c.experts, total_rows), total_rows)
    q_width, router, expert = c.heads * c.head_dim, c.router_width, 3 * c.width * c.ffn
    projections = c.width * (c.mixed + values + delayed) + q_width * c.width
    convolutions = CONV_TAPS * c.mixed * (1 + c.head_dim)
    gate = c.width * router + 2 * router**2 + router * (c.experts + 1)
    products = projections + convolutions + gate
    attended = rows * sum(contexts) + batch * pairs
    per_layer = 2 * total_rows * products + 2 * used.rows * expert + 4 * q_width * attended

    norms_and_scales = 2 * c.width + 8 * c.width + c.kv_heads
    biases = 2 * c.mixed + 3 * router + c.experts + 1
    small = norms_and_scales + biases + router  # the last: the router's norm
    states = (c.layers - 1) * router
    head = (vocab + 1) * c.width if wanted else 0
    outside = states + head + (total_rows + 2) * c.width  # embedding rows looked up, their scale and bias
    weights = c.layers * (products + small + used.hit * expert) + outside
    per_token = 2 * c.kv_heads * c.head_dim
    state = CONV_TAPS * c.mixed + delayed  # of a sequence: the last inputs of the convolutions, the delayed value
    begun = sum(context > 0 for context in contexts)
    return Cost(
        flops=float(c.layers * per_layer + 2 * wanted * c.width * vocab),
        weight_bytes=float(weights * itemsize),
        kv_bytes=float(c.layers * (sum(contexts) * per_token + begun * state) * itemsize),
        bytes_written=float(
            c.layers * (total_rows * per_token + batch * state) * itemsize + wanted * c.vocab * LOGIT_BYTES
        ),
        experts=routing.hit if routing else None,
        collective_bytes=collective_bytes(config, total_rows, wanted, itemsize, shard.size, LOGIT_BYTES),
    )


def head_cost(config: ModelConfig | ZayaConfig, wanted: int, itemsize: int, shard: Shard = WHOLE) -> Cost:
    """Cost of the final norm and the head alone, on `wanted` rows."""
    vocab = len(shard.vocab(config))
    return Cost(
        flops=float(2 * wanted * config.width * vocab),
        weight_bytes=float((vocab + 1) * config.width * itemsize),
        kv_bytes=0.0,
        bytes_written=float(wanted * config.vocab * LOGIT_BYTES),
        collective_bytes=collective_bytes(config, 0, wanted, itemsize, shard.size, LOGIT_BYTES),
    )
