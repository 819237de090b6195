"""What kinds of attention cost, against the cost model of whole models, torch's counter and the papers' own figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from zbench.models.attention import Shape, ccgqa, compare, gqa, mha, mla
from zbench.models.config import ModelConfig
from zbench.models.cost import Routing, forward_cost
from zbench.models.zaya_config import ZayaConfig

groups = st.sampled_from([1, 2, 4])
contexts = st.integers(1, 5000)


@given(group=groups, heads=st.integers(1, 4), head_dim=st.sampled_from([8, 64, 128]), context=contexts)
def test_gqa_and_mha_cost_what_a_layer_of_a_dense_model_does(
    group: int, heads: int, head_dim: int, context: int
) -> None:
    width = group * heads * head_dim
    one = ModelConfig("llama", 1, width, 64, group * heads, heads, head_dim, 100, 1)
    two = replace(one, layers=2)
    flops, cached = layer(one, two, context)
    kind = gqa(width, head_dim, group)
    assert kind.prefill_flops(context) * context == pytest.approx(flops - 6 * context * width * 64)
    assert kind.kv_bytes(2) == cached
    if group == 1:
        assert replace(kind, kind="MHA") == mha(width, head_dim)


@given(group=groups, heads=st.integers(1, 4), head_dim=st.sampled_from([8, 64, 128]), context=contexts)
def test_ccgqa_costs_what_a_layer_of_zaya_does_without_its_experts(
    group: int, heads: int, head_dim: int, context: int
) -> None:
    width, router, experts = 2 * group * heads * head_dim, 16, 8
    one = ZayaConfig("zaya", 1, width, 64, group * heads, heads, head_dim, 100, 1, experts, router)
    flops, cached = layer(one, replace(one, layers=2), context)
    gate = 2 * context * (width * router + 2 * router**2 + router * (experts + 1))
    kind = ccgqa(width, head_dim, group, 2)
    assert kind.prefill_flops(context) * context == pytest.approx(flops - gate)
    assert kind.kv_bytes(2) == cached


def layer(one: ModelConfig | ZayaConfig, two: ModelConfig | ZayaConfig, context: int) -> tuple[float, float]:
    """FLOPs of one layer's prefill without experts, and its KV bytes per token."""
    nothing = Routing(0.0, 0.0)
    flops, kv = [], []
    for config in (one, two):
        flops.append(forward_cost(config, context, [0], 0, 2, routing=nothing).flops)
        kv.append(forward_cost(config, 1, [11], 0, 2).kv_bytes - forward_cost(config, 1, [1], 0, 2).kv_bytes)
    return flops[1] - flops[0], (kv[1] - kv[0]) / 10


@pytest.mark.parametrize("context", [1, 7])
def test_mla_costs_what_torch_counts_in_prefill_and_in_decode(context: int) -> None:
    width, heads, d, latent, rope = 32, 4, 8, 12, 2
    x, cache = torch.randn(context, width), torch.randn(context, latent + rope)
    down, up = torch.randn(width, latent + rope), torch.randn(latent, heads * 2 * d)
    with FlopCounterMode(display=False) as prefill:  # keys and values written out (DeepSeek-V2, equations 9 to 19)
        q = (x @ torch.randn(width, heads * (d + rope))).view(context, heads, d + rope).transpose(0, 1)
        stored = x @ down
        keys, values = (stored[:, :latent] @ up).view(context, heads, 2 * d).transpose(0, 1).split(d, -1)
        keys = torch.cat([keys, stored[:, latent:].expand(heads, -1, -1)], -1)
        mixed = torch.bmm(torch.bmm(q, keys.transpose(1, 2)), values)
        _ = mixed.transpose(0, 1).reshape(context, -1) @ torch.randn(width, width)
    kind = mla(width, d, latent, rope)
    unseen = context * (context - 1) / 2 * kind.pair_flops  # torch multiplies what a mask would hide
    assert kind.prefill_flops(context) * context + unseen == prefill.get_total_flops()
    with FlopCounterMode(display=False) as decode:  # queries brought into the latent space
        scores = torch.randn(heads, latent + rope) @ cache.T
        _ = scores @ cache[:, :latent]
    assert kind.decode_flops * context == decode.get_total_flops()
    assert kind.kv_bytes(2) == cache[0].numel() * 2


def test_the_papers_own_figures() -> None:
    # DeepSeek-V2's latent of 512 with 64 rotated: the cache of GQA with 2.25 groups of 128 (arXiv 2405.04434, 2.1.4).
    assert mla(128 * 128, 128, 512, 64).cached == 2.25 * 2 * 128
    # ZAYA1-8B: keys and values compressed eightfold against MHA (arXiv 2510.04476), 40 KiB a token over 40 layers.
    zaya = ccgqa(2048, 128, 4, 2)
    assert mha(2048, 128).cached == 8 * zaya.cached
    assert 40 * zaya.kv_bytes(2) == 40 * 1024
    # One row's arithmetic per byte of bfloat16: the size of a group, but for MLA's shared latent.
    assert [round(row["decode_flops_per_kv_byte"], 1) for row in compare(Shape(), 4096, 2)] == [1.0, 4.0, 30.2, 4.0]


def test_shares_are_those_of_gqa() -> None:
    rows = {row["kind"]: row for row in compare(Shape(), 4096, 2)}
    assert rows["GQA"]["prefill_share_of_gqa"] == rows["GQA"]["kv_share_of_gqa"] == 1
    assert rows["CCGQA"]["kv_share_of_gqa"] == 0.5
    assert rows["MHA"]["kv_share_of_gqa"] == 4
    assert (
        rows["CCGQA"]["prefill_share_of_gqa"] < rows["MLA"]["kv_share_of_gqa"] < 1 < rows["MLA"]["prefill_share_of_gqa"]
    )
