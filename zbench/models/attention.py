"""What kinds of attention cost at the same width: arithmetic per prompt token, and what each token leaves in the cache.

Counts are per layer and from shapes alone, as in `cost.py`: a multiply-add is two FLOPs; norms, rotations and softmax
are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from zbench.errors import UserError
from zbench.models.zaya_config import CONV_TAPS


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention, for one token."""

    kind: str
    weights: int  # multiply-adds with weights, projections and convolutions
    pair_flops: int  # of a query and a key it sees, in prefill: scores and values of all heads
    decode_flops: int  # of a decoded row and a cached token
    cached: int  # values that a token leaves in the cache

    def prefill_flops(self, context: int) -> float:
        """FLOPs per token of a prompt of `context` tokens: a token sees half of it on average."""
        return 2 * self.weights + self.pair_flops * (context + 1) / 2

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes per token in the cache."""
        return self.cached * itemsize

    def intensity(self, itemsize: int) -> float:
        """FLOPs per byte read of one decoded row over the cache, whatever its length."""
        return self.decode_flops / self.kv_bytes(itemsize)


def mha(width: int, head_dim: int) -> Attention:
    """Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762), heads as wide as the model: 4 D² weights; scores
    and values 4 D per pair; a key and a value of D in the cache."""
    return _grouped("MHA", width, head_dim, 1)


def gqa(width: int, head_dim: int, group: int) -> Attention:
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245): `group` query heads share a key/value head, so
    that 2 D² (1 + 1/group) weights and 2 D / group cached values remain."""
    return _grouped("GQA", width, head_dim, group)


def mla(width: int, head_dim: int, latent: int, rope: int) -> Attention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1, and the Lite model's appendix B, which
    does not compress queries). H heads of d dimensions and `rope` more that are rotated; keys and values come from a
    latent of c, which is cached with one rotated key that all heads share:

        weights   D H (d + r) for queries, D (c + r) down, 2 c H d up, H d D out
        prefill   2 H (d + r) + 2 H d per pair, keys and values written out
        decode    2 H (c + r) + 2 H c per cached token: the up-projections are absorbed into queries and outputs
        cached    c + r
    """
    heads = _heads(width, head_dim)
    inner = heads * head_dim
    return Attention(
        "MLA",
        weights=width * (inner + heads * rope + latent + rope) + 2 * latent * inner + inner * width,
        pair_flops=2 * (inner + heads * rope) + 2 * inner,
        decode_flops=2 * heads * (2 * latent + rope),
        cached=latent + rope,
    )


def ccgqa(width: int, head_dim: int, group: int, compression: int) -> Attention:
    """Compressed convolutional attention with grouped queries (arXiv 2510.04476; ZAYA1 in `zaya_config.py`): GQA within
    a space of D / `compression`, behind two convolutions of two taps over its z = (H + kv) d channels, one of them
    mixing each head: 2 z (1 + d) further multiply-adds."""
    heads = _heads(width, head_dim * compression)
    inside = _grouped("CCGQA", heads * head_dim, head_dim, group)
    mixed = heads * head_dim + inside.cached // 2
    return Attention(
        "CCGQA",
        weights=width * (2 * heads * head_dim + inside.cached) + CONV_TAPS * mixed * (1 + head_dim),
        pair_flops=inside.pair_flops,
        decode_flops=inside.decode_flops,
        cached=inside.cached,
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """What is compared; the defaults are ZAYA1-8B's width, heads and compression, and DeepSeek-V2-Lite's latent."""

    width: int = 2048
    head_dim: int = 128
    group: int = 4  # query heads per key/value head, of GQA and CCGQA
    compression: int = 2  # of CCGQA's queries; its keys and values are compressed `group` times more
    latent: int = 512  # MLA's
    rope: int = 64  # MLA's rotated dimensions

    def kinds(self) -> tuple[Attention, ...]:
        """Raises UserError where the heads do not divide the width."""
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name} must be a positive whole number, not {value}")
        return (
            mha(self.width, self.head_dim),
            gqa(self.width, self.head_dim, self.group),
            mla(self.width, self.head_dim, self.latent, self.rope),
            ccgqa(self.width, self.head_dim, self.group, self.compression),
        )


def compare(shape: Shape, context: int, itemsize: int) -> list[dict[str, Any]]:
    """One row per kind, with its shares of GQA."""
    kinds = shape.kinds()
    [base] = [kind for kind in kinds if kind.kind == "GQA"]

    def share(of: Callable[[Attention], float], kind: Attention) -> float:
        return of(kind) / of(base)

    return [
        {
            "kind": kind.kind,
            "prefill_flops_per_token": kind.prefill_flops(context),
            "prefill_share_of_gqa": share(lambda k: k.prefill_flops(context), kind),
            "kv_bytes_per_token": kind.kv_bytes(itemsize),
            "kv_share_of_gqa": share(lambda k: k.kv_bytes(itemsize), kind),
            "decode_flops_per_kv_byte": kind.intensity(itemsize),
        }
        for kind in kinds
    ]


def table(rows: list[dict[str, Any]], shape: Shape, context: int) -> str:
    """The comparison in words and columns."""
    lines = [
        f"Per layer, {shape.width} wide, counted from shapes (predicted); prefill is the mean over {context} tokens.",
        f"{'':6} {'prefill per token':>17} {'of GQA':>7} {'KV per token':>13} {'of GQA':>7}  decode FLOP per KV byte",
    ]
    for row in rows:
        lines.append(
            f"{row['kind']:6} {row['prefill_flops_per_token'] / 1e6:>11.2f} MFLOP {row['prefill_share_of_gqa']:>6.2f}×"
            f" {row['kv_bytes_per_token']:>11,} B {row['kv_share_of_gqa']:>6.2f}×"
            f"  {row['decode_flops_per_kv_byte']:>23.1f}"
        )
    return "\n".join(lines)


def _grouped(kind: str, width: int, head_dim: int, group: int) -> Attention:
    heads = _heads(width, head_dim)
    if heads % group:
        raise UserError(f"{heads} heads of {kind} cannot be grouped by {group}")
    cached = 2 * width // group
    return Attention(kind, width * (2 * width + cached), 4 * width, 4 * width, cached)


def _heads(width: int, head_dim: int) -> int:
    if width % head_dim:
        raise UserError(f"width {width} is not a multiple of {head_dim}, which a head takes of it")
    return width // head_dim
