"""The cost model against what torch counts and what is really stored."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import FAMILIES, oracle, runtime
from zbench.engines.base import Meter
from zbench.hardware.device import resolve
from zbench.models import attend
from zbench.models.config import ModelConfig
from zbench.models.cost import Routing, forward_cost
from zbench.models.rows import Rows
from zbench.models.shard import Shard
from zbench.models.zaya_config import ZayaConfig

DENSE = [family for family in FAMILIES if family != "zaya"]  # its costs follow from its router: test_zaya.py


@pytest.mark.parametrize("family", sorted(set(DENSE) - {"mistral"}))
@pytest.mark.parametrize(("rows", "context"), [(1, 40), (5, 17), (32, 0)])
def test_flops_equal_torchs_counter_under_math_attention(family: str, rows: int, context: int) -> None:
    model = runtime(family, "eager")
    cache = model.new_cache(2, 64)
    ids = torch.randint(0, 300, (2, 64))
    if context:
        model.forward(Rows.chain(ids[:, :context], cache.lengths), cache)
        cache.extend([context] * 2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.forward(Rows.chain(ids[:, :rows], cache.lengths), cache)
    # torch's dense attention computes every new pair, visible or not: ask the cost model for the same.
    assert model.cost(rows, [context] * 2, 2 * rows, pairs=rows * rows).flops == counter.get_total_flops()


@pytest.mark.parametrize("family", DENSE)
def test_one_decoded_row_reads_every_stored_parameter_once(family: str) -> None:
    model = runtime(family, "eager")
    stored = sum(parameter.numel() for parameter in oracle(family).parameters())
    table = 0 if model.config.tied else model.config.vocab * model.config.width
    cost = model.cost(1, [0], 1)
    # Of an untied embedding only the looked-up row is read; a tied one is read as the head, and its row again.
    assert cost.weight_bytes == (stored - table + model.config.width) * 4
    assert cost.kv_bytes == 0


@given(
    rows=st.integers(1, 64),
    contexts=st.lists(st.integers(0, 500), min_size=1, max_size=5),
    more=st.integers(1, 100),
)
def test_traffic_of_the_cache_grows_once_per_sequence_and_weights_not_at_all(
    rows: int, contexts: list[int], more: int
) -> None:
    model = runtime("smollm", "eager")
    before, after = model.cost(rows, contexts, 1), model.cost(rows, [c + more for c in contexts], 1)
    per_token = 2 * model.config.kv_heads * model.config.head_dim * model.config.layers * 4
    assert after.weight_bytes == before.weight_bytes
    assert after.kv_bytes - before.kv_bytes == more * len(contexts) * per_token
    assert after.flops > before.flops


WINDOWED = ModelConfig(
    family="mistral", layers=3, width=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=300, max_positions=8192,
    windows=(512, None, 512),
)  # fmt: skip


def within(window: int) -> ModelConfig:
    return dataclasses.replace(WINDOWED, windows=(window, None, window))


def counted(config: ModelConfig, rows: Rows, contexts: list[int]) -> tuple[int, int]:
    """(FLOPs of attention, bytes of cached keys and values that some row sees), counted over the masks themselves."""
    cache: Any = SimpleNamespace(lengths=torch.tensor(contexts))
    span = max(contexts) + rows.ids.shape[1]
    committed = torch.arange(span) < cache.lengths[:, None]
    pairs = slots = 0
    for window in config.windows or ():
        seen = attend.attention_mask(rows, cache, span)[:, 0]
        if window is not None:
            seen = seen & attend.within_window(rows, cache, span, window)[:, 0]
        pairs += int(seen.sum())
        slots += int((seen.any(1) & committed).sum())
    return 4 * config.heads * config.head_dim * pairs, 2 * config.kv_heads * config.head_dim * 2 * slots


def predicted(config: ModelConfig, rows: Rows, contexts: list[int]) -> tuple[float, float]:
    """The same by the cost model, in bfloat16."""
    count = rows.ids.shape[1]
    places = None if rows.causal else (rows.positions - torch.tensor(contexts)[:, None]).tolist()
    pairs = None if rows.causal else int(rows.visible.sum()) / len(rows.ids)
    cost = forward_cost(config, count, contexts, 0, 2, pairs, places=places)
    rest = forward_cost(config, count, [0] * len(contexts), 0, 2, 0, places=[[0] * count] * len(contexts))
    return cost.flops - rest.flops, cost.kv_bytes


@pytest.mark.parametrize("context", [0, 100, 511, 4096])
@pytest.mark.parametrize("count", [1, 17, 272, 512])
def test_a_sliding_window_costs_what_its_mask_lets_rows_see(count: int, context: int) -> None:
    chain = Rows.chain(torch.zeros(1, count, dtype=torch.int64), torch.tensor([context]))
    assert predicted(WINDOWED, chain, [context]) == counted(WINDOWED, chain, [context])


@st.composite
def fed(draw: st.DrawFn) -> tuple[Rows, list[int]]:
    """A chain, a tree per sequence, or a TiDAR step, behind prefixes of their own."""
    contexts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    lengths, count = torch.tensor(contexts), draw(st.integers(1, 12))
    ids = torch.zeros(len(contexts), count, dtype=torch.int64)
    kind = draw(st.sampled_from(["chain", "tree", "blocks"]))
    if kind == "chain":
        return Rows.chain(ids, lengths), contexts
    if kind == "tree":
        trees = [[-1, *(draw(st.integers(0, row - 1)) for row in range(1, count))] for _ in contexts]
        return Rows.tree(ids, lengths, torch.tensor(trees)), contexts
    kept = sorted(draw(st.sets(st.integers(1, count), min_size=1)))
    return Rows.draft_and_verify(ids, lengths, draw(st.integers(1, 5)), kept, 9), contexts


@given(fed=fed(), window=st.integers(1, 60))
def test_within_any_window_rows_of_any_shape_cost_what_they_see(fed: tuple[Rows, list[int]], window: int) -> None:
    rows, contexts = fed
    assert predicted(within(window), rows, contexts) == pytest.approx(counted(within(window), rows, contexts))


@given(fed=fed(), window=st.integers(1, 60))
def test_rows_whose_places_are_not_told_cost_no_more_than_they_do(fed: tuple[Rows, list[int]], window: int) -> None:
    rows, contexts = fed
    pairs, count = int(rows.visible.sum()) / len(rows.ids), rows.ids.shape[1]
    told = forward_cost(within(window), count, contexts, 0, 2, pairs)
    places = (rows.positions - torch.tensor(contexts)[:, None]).tolist()
    assert told.flops <= forward_cost(within(window), count, contexts, 0, 2, pairs, places=places).flops


def test_a_recorded_tree_costs_what_its_rows_see_within_the_window() -> None:
    model = runtime("mistral", "eager")
    cache, context = model.new_cache(2, 64), [20, 20]
    model.forward(Rows.chain(torch.randint(0, 300, (2, 20)), cache.lengths), cache)
    cache.extend(context)
    parents = torch.tensor([[-1, 0, 1, 2, 2, 0], [-1, 0, 0, 0, 3, 4]])
    rows = Rows.tree(torch.randint(0, 300, (2, 6)), cache.lengths, parents)
    meter = Meter(resolve("cpu"))
    with meter.step():
        meter.forward(model, "verify", rows, cache)
        meter.gained((1, 1))
    [recorded] = meter.records()[1]
    bare = model.cost(6, [0, 0], 12, 0, places=[[0] * 6] * 2)
    flops, in_bfloat16 = counted(model.config, rows, context)
    assert recorded.flops - bare.flops == flops
    assert recorded.bytes_read - bare.bytes_read == 2 * in_bfloat16


def test_logits_are_written_whole_by_every_rank() -> None:
    whole, part = (forward_cost(WINDOWED, 1, [9], 5, 2, shard=Shard(0, n)) for n in (1, 2))
    none = [forward_cost(WINDOWED, 1, [9], 0, 2, shard=Shard(0, n)) for n in (1, 2)]
    written = [cost.bytes_written - bare.bytes_written for cost, bare in zip((whole, part), none, strict=True)]
    assert written == [5 * WINDOWED.vocab * 4] * 2


def test_only_rows_that_an_expert_computed_are_charged_for_one() -> None:
    config = ZayaConfig.from_hf({"model_type": "zaya"})
    costs = [forward_cost(config, 8, [9], 8, 2, routing=Routing(hit=4.0, rows=rows)) for rows in (8.0, 5.0)]
    assert costs[0].flops - costs[1].flops == config.layers * 3 * 2 * 3 * config.width * config.ffn
    assert costs[0].bytes_read == costs[1].bytes_read
