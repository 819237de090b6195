"""Block attention against float64, and the model that runs on it against the model that does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import oracle
from zbench.kernels import attention, registry
from zbench.kernels.attention import TABLE, Plan
from zbench.kernels.chips import KNOWN, Chip
from zbench.models import families
from zbench.models.loading import LoadedModel
from zbench.models.model import build
from zbench.models.rows import Rows

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of one rounding to the type, and room


def exact(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, visible: Tensor, first: Tensor | None = None
) -> Tensor:
    """One row and head at a time, in float64, over just the slots that it sees; `visible` [B, R, R] bool."""
    batch, rows, heads, width = queries.shape
    out = torch.zeros(batch, rows, heads, width, dtype=torch.float64)
    for b in range(batch):
        length = int(lengths[b])
        for r in range(rows):
            begin = 0 if first is None else int(first[b, r])
            slots = [*range(begin, length), *(length + i for i in range(rows) if visible[b, r, i])]
            for h in range(heads if slots else 0):
                kv = h // (heads // keys.shape[1])
                k, v = (part[b, kv, slots].double().cpu() for part in (keys, values))
                out[b, r, h] = (k @ queries[b, r, h].double().cpu() / math.sqrt(width)).softmax(0) @ v
    return out


def error(found: Tensor, wanted: Tensor) -> float:
    return registry.worst_error(found.double().cpu(), wanted)


@contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated meanwhile holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def chain(rows: int, _: int) -> Tensor:
    return torch.ones(rows, rows, dtype=torch.bool).tril()


def blocks(rows: int, seed: int) -> Tensor:
    """Drafts and the masked blocks of their outcomes, as TiDAR feeds them."""
    size = 1 + seed % 5
    drafts = min(rows, size)
    outcomes = [1 + i % drafts for i in range((rows - drafts) // size)]
    ids = torch.zeros(1, drafts, dtype=torch.int64)
    fed = Rows.draft_and_verify(ids, torch.zeros(1, dtype=torch.int64), size, outcomes, mask=0).visible[0]
    visible = torch.eye(rows, dtype=torch.bool)
    visible[: len(fed), : len(fed)] = fed
    return visible


def any_rows(rows: int, seed: int) -> Tensor:
    """Rows that may see nothing, not even themselves."""
    return torch.rand(rows, rows, generator=torch.Generator().manual_seed(seed)) < 0.3


@settings(max_examples=8, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(list(TOLERANCE)), seed=st.integers(0, 999))
def test_kernel_and_reference_are_the_float64_sum(
    device: torch.device, data: st.DataObject, dtype: torch.dtype, seed: int
) -> None:
    rows = data.draw(st.one_of(st.just(1), st.integers(1, 40)), "rows")
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (1, 8)]), "key heads, group")
    width = data.draw(st.sampled_from([16, 24, 80]), "width")
    lengths = tuple(data.draw(st.lists(st.one_of(st.just(0), st.integers(0, 90)), min_size=1, max_size=2), "lengths"))
    mask = data.draw(st.sampled_from([chain, blocks, any_rows, None]), "mask")
    chosen = Plan(
        data.draw(st.sampled_from([16, 32]), "tile"),
        data.draw(st.sampled_from([16, 32]), "slots"),
        data.draw(st.integers(1, 5), "splits"),
        warps=4,
        stages=2,
    )
    visible = None if mask is None else torch.stack([mask(rows, seed + i) for i in range(len(lengths))])
    args = attention.random_call(device, dtype, seed, lengths, rows, group * kv_heads, kv_heads, width, visible=visible)
    wanted = exact(*args[:4], attention.unpack(args[4]))
    with poisoned():
        found = attention.launch(*args, chosen=chosen)
    assert error(found, wanted) < TOLERANCE[dtype]
    assert error(attention.reference(*args), wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("width, rows, splits", [(96, 3, 2), (128, 1, 7), (64, 70, 1)])
def test_the_heads_and_blocks_of_real_models(device: torch.device, width: int, rows: int, splits: int) -> None:
    visible = blocks(rows, 3)[None]
    args = attention.random_call(device, torch.bfloat16, 1, (130,), rows, 4, 1, width, visible=visible)
    found = attention.launch(*args, chosen=Plan(64, 64, splits, 4, 2))
    assert error(found, exact(*args[:4], visible)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("splits", [1, 3])
def test_a_sliding_window_hides_the_start_of_the_prefix(device: torch.device, splits: int) -> None:
    *args, bits = attention.random_call(device, torch.float32, 2, (75, 9, 0), 4, 2, 1, 16)
    first = torch.tensor([[50, 51, 60, 75], [0, 0, 3, 9], [0, 0, 0, 0]], device=device)
    found = attention.launch(*args, bits, first, chosen=Plan(16, 16, splits, 4, 2))
    wanted = exact(*args, attention.unpack(bits), first)
    assert error(found, wanted) < 1e-5 and error(attention.reference(*args, bits, first), wanted) < 1e-5


def test_queries_and_caches_may_have_any_strides(device: torch.device) -> None:
    """As a model has them: queries are a part of a fused projection, a layer is a part of the cache."""
    queries, keys, values, lengths, bits = attention.random_call(device, torch.float32, 3, (20, 33), 5, 4, 2, 16)
    fused = torch.full((2, 5, 8, 16), torch.nan, device=device)
    fused[:, :, :4] = queries
    layers = torch.full((3, 2, 2, keys.shape[2] + 5, 16), torch.nan, device=device)
    layers[1, :, :, : keys.shape[2]] = keys
    turned = values.transpose(1, 2).contiguous().transpose(1, 2)
    found = attention.launch(fused[:, :, :4], layers[1], turned, lengths, bits, chosen=Plan(16, 32, 2, 4, 2))
    assert error(found, exact(queries, keys, values, lengths, attention.unpack(bits))) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_follows_the_lengths(device: torch.device) -> None:
    args = attention.random_call(device, torch.bfloat16, 4, (700, 20), 16, 8, 2, 128, capacity=1024)
    args[1].nan_to_num_(), args[2].nan_to_num_()
    attention.launch(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.launch(*args)
    args[3].copy_(torch.tensor([3, 900]))
    graph.replay()
    assert error(out, exact(*args[:4], attention.unpack(args[4]))) < TOLERANCE[torch.bfloat16]


def test_the_registry_accepts_it(device: torch.device) -> None:
    assert registry.disagreement(attention.KERNEL, device) is None


@given(rows=st.integers(1, 100), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_packed_bits_are_the_mask(rows: int, seed: int) -> None:
    visible = torch.stack([any_rows(rows, seed), chain(rows, 0)])
    words = attention.pack(visible)
    assert words.dtype == torch.int32 and words.shape == (2, rows, -(-rows // 32))
    assert torch.equal(attention.unpack(words), visible)


def test_cost_counts_pairs_and_reads_the_prefix_once() -> None:
    args = attention.random_call(torch.device("cpu"), torch.bfloat16, 0, (100, 0), 3, 4, 2, 16, visible=torch.ones(
        2, 3, 3, dtype=torch.bool).tril())  # fmt: skip
    work = attention.cost(*args)
    assert work.flops == 4 * 16 * 4 * (3 * 100 + 2 * 6)
    assert work.bytes_read == 2 * 2 * 16 * 2 * (103 + 3) + 2 * 3 * 4 * 16 * 2 + 2 * 3 * 4
    assert work.bytes_written == 2 * 3 * 4 * 16 * 2
    first = torch.tensor([[60, 61, 62], [0, 0, 0]])
    narrow = attention.cost(*args, first)
    assert narrow.flops == 4 * 16 * 4 * (40 + 39 + 38 + 2 * 6)
    assert work.bytes_read - narrow.bytes_read == 2 * 2 * 16 * 2 * 60


@given(
    rows=st.integers(1, 320), group=st.integers(1, 16), kv_heads=st.integers(1, 16), batch=st.integers(1, 64),
    capacity=st.integers(16, 1 << 17), width=st.sampled_from([64, 80, 96, 128, 256]), itemsize=st.sampled_from([2, 4]),
    name=st.sampled_from([*TABLE]), units=st.integers(80, 304),
)  # fmt: skip
def test_plans_fit_into_shared_memory_and_fill_the_device_once(
    rows, group, kv_heads, batch, capacity, width, itemsize, name, units
) -> None:  # fmt: skip
    chip, wanted = Chip(name, units, *KNOWN.get(name, (64 * 2**10, True))), TABLE[name]
    chosen = attention.plan(rows, group, kv_heads, batch, capacity, width, itemsize, chip, wanted)
    buffers = {"": 2, "gfx942": 1, "gfx950": 2, "sm90": 3, "sm100": 3}[name]  # of the loaded tile
    padded = max(16, 1 << (width - 1).bit_length())
    loaded = padded * itemsize * (chosen.tile + 2 * chosen.slots * buffers)
    assert loaded <= chip.shared or chosen.slots == 16
    assert chosen.tile & (chosen.tile - 1) == 0 and 16 <= chosen.tile <= 128
    tiles = -(-rows * group // chosen.tile) * kv_heads * batch
    assert chosen.splits == 1 or chosen.splits * tiles <= units * wanted.programs
    assert chosen.splits == 1 or capacity // chosen.splits >= attention.LEAST_SLOTS


@pytest.mark.parametrize("family", ["mistral", "zaya"])  # mistral has a sliding window
def test_a_model_gives_the_same_logits_with_the_kernel(
    device: torch.device, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = families.from_hf(oracle(family).config.to_dict())
    loaded = LoadedModel("tiny", None, config, oracle(family).state_dict(), "", None, "")

    def run(unavailable: str | None) -> tuple[str, list[Tensor]]:
        """What runs attention, and the logits of a prompt and of a tree after it."""
        monkeypatch.setattr(registry, "unavailable", lambda device: unavailable)
        registry.checked.cache_clear()
        model = build(loaded, torch.float32, device, "torch")
        registry.checked.cache_clear()
        cache = model.new_cache(2, 40)
        ids = torch.arange(16, device=device).view(2, 8)
        found = [model.forward(Rows.chain(ids, cache.lengths), cache).logits]
        cache.extend([8, 5])
        tree = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2]], device=device)
        found.append(model.forward(Rows.tree(ids[:, :4], cache.lengths, tree), cache).logits)
        return model.kernels["attention"], found

    ran, wanted = run("switched off")
    assert ran == "torch sdpa (switched off)"
    ran, found = run(None)
    assert ran == "triton"
    assert registry.worst_error(found, wanted) < 1e-5
