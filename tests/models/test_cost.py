"""The cost model against what torch counts and what is really stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import FAMILIES, oracle, runtime
from zbench.models.rows import Rows

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


def test_a_sliding_window_bounds_the_cache_traffic() -> None:
    model = runtime("mistral", "eager")
    assert model.cost(1, [400], 1).kv_bytes == model.cost(1, [40], 1).kv_bytes
