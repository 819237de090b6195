"""The parts of a model: together they are the whole, and counts of one rank are those of its shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from zbench.errors import UserError
from zbench.models import families
from zbench.models.config import ModelConfig
from zbench.models.cost import forward_cost
from zbench.models.families import tensor_shapes
from zbench.models.shard import Shard, collective_bytes

SHAPE = {"family": "llama", "layers": 2, "width": 96, "ffn": 160, "vocab": 301, "max_positions": 64, "head_dim": 16}


def config(heads: int, kv_heads: int, **more) -> ModelConfig:
    return ModelConfig.from_fields({**SHAPE, "heads": heads, "kv_heads": kv_heads, **more})


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_every_query_head_is_on_one_rank_beside_its_own_key_head(kv: int, group: int, size: int) -> None:
    whole = config(kv * group, kv)
    shards = [Shard(rank, size) for rank in range(size)]
    if size > kv and (size % kv or kv * group % size):
        with pytest.raises(UserError, match="cannot be spread over"):
            shards[0].check(whole)
        return
    assert [h for shard in shards for h in shard.heads(whole)] == list(range(whole.heads))
    assert [f for shard in shards for f in shard.ffn(whole)] == list(range(whole.ffn))
    assert [t for shard in shards for t in shard.vocab(whole)] == list(range(whole.vocab))
    for shard in shards:
        local, first = shard.of(whole), shard.kv_heads(whole).start
        for place, head in enumerate(shard.heads(whole)):
            own = first + place // (local.heads // local.kv_heads)
            assert own == head // group
        assert shard.parameters(whole) <= shards[0].parameters(whole)


def test_an_impossible_spread_says_what_is_possible() -> None:
    with pytest.raises(UserError, match=r"6 query heads over 2 key/value heads .* over 4 ranks; possible: 1, 2, 6"):
        Shard(0, 4).check(config(6, 2))


def test_a_group_that_zaya_mixes_is_not_split() -> None:
    whole = families.from_hf(tiny.oracle("zaya").config.to_dict())
    with pytest.raises(UserError, match=r"possible: 1, 2$"):
        Shard(0, 6).check(whole)


@pytest.mark.parametrize(
    ("family", "size"), [(family, size) for family in tiny.FAMILIES for size in (2, 6) if (family, size) != ("zaya", 6)]
)
def test_parts_have_the_shapes_of_their_config(family: str, size: int) -> None:
    model = tiny.oracle(family)
    whole = families.from_hf(model.config.to_dict())
    tensors = dict(model.state_dict())
    for rank in range(size):
        shard = Shard(rank, size)
        part = shard.tensors(tensors, whole)
        shapes = tensor_shapes(shard.of(whole))
        current, late = shard.values(whole) if family == "zaya" else ((), ())
        for name, shape in shapes.items():
            if name.endswith(("v_proj_current.weight", "v_proj_delayed.weight")):
                shape = (len(current if "current" in name else late), whole.width)
            if name == "lm_head.weight":
                shape = (len(shard.vocab(whole)), whole.width)
            if name not in part:
                assert rank and name.endswith(("o_proj.bias", "down_proj.bias"))
                continue
            assert tuple(part[name].shape) == shape, name
    held = [Shard(rank, 2).tensors(tensors, whole) for rank in range(2)]
    down = "mlp.experts.down_proj" if family == "zaya" else "mlp.down_proj.weight"
    name = f"model.layers.1.{down}"
    assert torch.equal(torch.cat([part[name] for part in held], -1), tensors[name])


@pytest.mark.parametrize("family", ["smollm", "llama3", "zaya"])
def test_the_parts_cost_what_the_whole_costs_beside_what_every_rank_repeats(family: str) -> None:
    whole = families.from_hf(tiny.oracle(family).config.to_dict())
    one = forward_cost(whole, 4, [20, 30], 8, 4)
    parts = [forward_cost(whole, 4, [20, 30], 8, 4, shard=Shard(rank, 2)) for rank in range(2)]
    assert one.collective_bytes == 0
    assert sum(p.kv_bytes for p in parts) == one.kv_bytes
    router = 0
    if family == "zaya":
        router = 2 * whole.layers * 8 * (96 * 24 + 2 * 24**2 + 24 * 6)
    assert sum(p.flops for p in parts) == one.flops + router
    for part in parts:
        assert one.weight_bytes / 2 < part.weight_bytes < 0.75 * one.weight_bytes
        # An all-reduce of 8 rows after each of two halves of 3 layers, then 8 rows of 300 logits.
        assert part.collective_bytes == 0.5 * (2 * 2 * 3 * 8 * 96 * 4 + 8 * 300 * 4)


def test_more_ranks_send_more_each() -> None:
    sent = [collective_bytes(config(8, 8), 4, 4, 2, size, 4) for size in (1, 2, 4, 8)]
    assert sent[0] == 0
    assert sent == sorted(sent)
    assert sent[3] < 2 * sent[1]
