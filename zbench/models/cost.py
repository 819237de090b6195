"""What one forward costs, counted from shapes: the numbers every roofline in this suite stands on.

Traffic is the least a forward can do: each weight once, each sequence's cached keys and values once, the new keys
and values and the logits written once. Activations between operators are left out, they stay in cache at decode
sizes; so a byte count never exceeds the real traffic and `floor_seconds` is a floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zbench.models.config import ModelConfig

LOGIT_BYTES = 4  # logits are float32 whatever the weights are


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs and bytes of one forward; a multiply-add counts as two FLOPs."""

    flops: float
    weight_bytes: float
    kv_bytes: float
    bytes_written: float

    @property
    def bytes_read(self) -> float:
        return self.weight_bytes + self.kv_bytes

    @property
    def intensity(self) -> float:
        return self.flops / (self.bytes_read + self.bytes_written)


def forward_cost(
    config: ModelConfig, rows: int, contexts: Sequence[int], wanted: int, itemsize: int, pairs: int | None = None
) -> Cost:
    """Cost of a forward of `rows` rows for each of len(contexts) sequences with that many committed tokens.

    `wanted` rows over the whole batch ask for logits. `pairs` counts the (row, visible new row) pairs of one
    sequence; None is the causal triangle rows (rows + 1) / 2. Per layer, with R = rows and C = context:
    qkv 2 R D (q + 2 kv) d, scores and values 4 q d (R C + pairs), output 2 R q d D, gated MLP 6 R D F;
    then the head 2 wanted D V.
    """
    c = config
    batch, total_rows = len(contexts), rows * len(contexts)
    pairs = rows * (rows + 1) // 2 if pairs is None else pairs
    qkv_width, q_width = (c.heads + 2 * c.kv_heads) * c.head_dim, c.heads * c.head_dim
    projections = qkv_width * c.width + q_width * c.width + 3 * c.width * c.ffn
    # A sliding-window layer reads no further back than its window.
    windows = c.windows or (None,) * c.layers
    tokens = sum(min(context, w + rows - 1) if w else context for w in windows for context in contexts)
    attended = rows * tokens + c.layers * batch * pairs
    flops = 2 * c.layers * total_rows * projections + 4 * q_width * attended + 2 * wanted * c.width * c.vocab

    small = 2 * c.width + (2 * c.head_dim if c.qk_norm else 0)
    small += (qkv_width if c.qkv_bias else 0) + (c.width if c.out_bias else 0)
    small += (2 * c.ffn + c.width) if c.mlp_bias else 0
    head = (c.vocab + 1) * c.width if wanted else 0
    weights = c.layers * (projections + small) + head + total_rows * c.width  # the last: embedding rows looked up
    per_token = 2 * c.kv_heads * c.head_dim
    return Cost(
        flops=float(flops),
        weight_bytes=float(weights * itemsize),
        kv_bytes=float(tokens * per_token * itemsize),
        bytes_written=float(batch * rows * c.layers * per_token * itemsize + wanted * c.vocab * LOGIT_BYTES),
    )
