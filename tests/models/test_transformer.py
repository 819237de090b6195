"""The runtime's logits against `transformers` on the same weights, for every way rows can be fed."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import FAMILIES, oracle, relative_error, runtime
from zbench.kernels import cpu
from zbench.models.rows import Rows

needs_native = pytest.mark.skipif(not cpu.available(), reason=f"native CPU kernels: {cpu.unavailable_reason()}")
EXECUTIONS = ["eager", pytest.param("native", marks=needs_native)]
TOLERANCE = 1e-4
everywhere = pytest.mark.parametrize("execution", EXECUTIONS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def expected(family: str, ids: torch.Tensor) -> torch.Tensor:
    return oracle(family)(ids).logits


@everywhere
@every_family
def test_prefill_decode_and_many_row_verify_match_transformers(family: str, execution: str) -> None:
    model, ids = runtime(family, execution), tokens(2, 30)
    cache = model.new_cache(2, 40)
    parts = []
    for start, end in [(0, 15), (15, 16), (16, 17), (17, 30)]:
        parts.append(model.forward(Rows.chain(ids[:, start:end], cache.lengths), cache).logits)
        cache.extend([end - start] * 2)
    assert relative_error(torch.cat(parts, 1), expected(family, ids)) < TOLERANCE


@everywhere
@every_family
def test_ragged_batch_matches_each_prompt_alone(family: str, execution: str) -> None:
    model, sizes = runtime(family, execution), [3, 17, 9]
    ids = tokens(3, 24)
    cache = model.new_cache(3, 32)
    model.forward(Rows.chain(ids[:, :17], cache.lengths), cache)
    cache.extend(sizes)
    steps = torch.stack([ids[row, size : size + 4] for row, size in enumerate(sizes)])
    logits = model.forward(Rows.chain(steps, cache.lengths), cache).logits
    for row, size in enumerate(sizes):
        want = expected(family, ids[row : row + 1, : size + 4])[:, size:]
        assert relative_error(logits[row : row + 1], want) < TOLERANCE


def path_to(parents: list[int], row: int) -> list[int]:
    path = [row]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


trees = st.integers(1, 14).flatmap(lambda n: st.tuples(*(st.integers(-1, i - 1) for i in range(n)))).map(list)


@everywhere
@pytest.mark.parametrize("family", ["smollm", "mistral", "qwen3", "zaya"])
@settings(max_examples=15, deadline=None)
@given(parents=trees, seed=st.integers(0, 1000))
def test_tree_rows_match_their_unrolled_sequences(family: str, execution: str, parents: list[int], seed: int) -> None:
    model, prompt, drafts = runtime(family, execution), tokens(1, 11, seed=seed), tokens(1, len(parents), seed=seed + 1)
    cache = model.new_cache(1, 40)
    model.forward(Rows.chain(prompt, cache.lengths), cache)
    cache.extend([11])
    rows = Rows.tree(drafts, cache.lengths, torch.tensor([parents]))
    logits = model.forward(rows, cache).logits[0]
    for row in range(len(parents)):
        unrolled = torch.cat([prompt, drafts[:, path_to(parents, row)]], 1)
        assert relative_error(logits[row], expected(family, unrolled)[0, -1]) < TOLERANCE


@everywhere
@pytest.mark.parametrize("family", ["qwen3", "zaya"])
@settings(max_examples=15, deadline=None)
@given(parents=trees, seed=st.integers(0, 1000), pick=st.integers(0, 13))
def test_committed_tree_path_leaves_the_cache_a_fresh_prefill_would(
    family: str, execution: str, parents: list[int], seed: int, pick: int
) -> None:
    model, prompt, drafts = runtime(family, execution), tokens(2, 5, seed=seed), tokens(2, len(parents), seed=seed + 1)
    paths = [path_to(parents, pick % len(parents)), path_to(parents, 0)]
    cache = model.new_cache(2, 40)
    model.forward(Rows.chain(prompt, cache.lengths), cache)
    cache.extend([5, 5])
    model.forward(Rows.tree(drafts, cache.lengths, torch.tensor([parents, parents])), cache)
    longest = max(map(len, paths))
    kept = torch.tensor([path + [-1] * (longest - len(path)) for path in paths])
    cache.commit(kept, [len(path) for path in paths])
    after = tokens(2, 1, seed=seed + 2)
    logits = model.forward(Rows.chain(after, cache.lengths), cache).logits
    for row, path in enumerate(paths):
        unrolled = torch.cat([prompt[row], drafts[row, path], after[row]])[None]
        assert relative_error(logits[row], expected(family, unrolled)[0, -1:]) < TOLERANCE


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=20, deadline=None)
@given(prefix=st.integers(1, 40), count=st.integers(1, 24), seed=st.integers(0, 100))
def test_native_logits_do_not_depend_on_how_many_rows_share_the_forward(
    dtype: torch.dtype, prefix: int, count: int, seed: int
) -> None:
    model, ids = runtime("qwen3", "native", dtype), tokens(1, prefix + count, seed=seed)
    together = model.new_cache(1, 64)
    model.forward(Rows.chain(ids[:, :prefix], together.lengths), together)
    together.extend([prefix])
    many = model.forward(Rows.chain(ids[:, prefix:], together.lengths), together).logits
    alone = model.new_cache(1, 64)
    single = []
    for index in range(prefix + count):
        single.append(model.forward(Rows.chain(ids[:, index : index + 1], alone.lengths), alone).logits)
        alone.extend([1])
    assert torch.equal(many, torch.cat(single[prefix:], 1))


@everywhere
def test_logits_are_computed_for_the_rows_that_ask_only(execution: str) -> None:
    model, ids = runtime("smollm", execution), tokens(2, 9)
    every = model.forward(Rows.chain(ids, torch.zeros(2, dtype=torch.int64)), model.new_cache(2, 16)).logits
    asked = torch.tensor([[8, 0], [3, 3]])
    some = model.forward(Rows.chain(ids, torch.zeros(2, dtype=torch.int64)), model.new_cache(2, 16), logits=asked)
    torch.testing.assert_close(some.logits, every.gather(1, asked[..., None].expand(-1, -1, 300)))
    none = model.forward(
        Rows.chain(ids, torch.zeros(2, dtype=torch.int64)), model.new_cache(2, 16), logits=asked[:, :0]
    )
    assert none.logits.shape == (2, 0, 300)


@everywhere
@pytest.mark.parametrize("family", ["qwen3", "zaya"])
def test_captured_hidden_states_are_the_layers_inputs(family: str, execution: str) -> None:
    model, ids = runtime(family, execution), tokens(2, 9)
    with torch.no_grad():
        want = oracle(family)(ids, output_hidden_states=True).hidden_states
    cache = model.new_cache(2, 16)
    hidden = model.forward(Rows.chain(ids, cache.lengths), cache, capture=(0, 2)).hidden
    assert set(hidden) == {0, 2}
    for index in (0, 2):
        assert relative_error(hidden[index], want[index]) < TOLERANCE


@everywhere
def test_rows_beyond_the_caches_capacity_are_refused(execution: str) -> None:
    model = runtime("smollm", execution)
    cache = model.new_cache(1, 16)
    with pytest.raises(ValueError, match="exceed"):
        model.forward(Rows.chain(tokens(1, 17), cache.lengths), cache)


@everywhere
@pytest.mark.parametrize("family", ["smollm", "zaya"])
def test_bfloat16_rounds_no_worse_than_transformers_does(family: str, execution: str) -> None:
    ids, model = tokens(1, 20), runtime(family, execution, torch.bfloat16)
    exact = expected(family, ids)
    with torch.no_grad():
        peer = copy.deepcopy(oracle(family)).bfloat16()(ids).logits.float()
    got = model.forward(Rows.chain(ids, torch.zeros(1, dtype=torch.int64)), model.new_cache(1, 32)).logits
    assert (got - exact).norm() < 1.5 * (peer - exact).norm()


def test_switching_native_off_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZBENCH_NATIVE", "0")
    cpu._outcome.cache_clear()
    try:
        model = runtime("smollm", "auto")
        assert model.kernels["forward"] == "torch"
        assert model.kernels["attention"] == "torch sdpa (device is cpu)"
        assert model.kernels["why_not_native"] == "switched off by ZBENCH_NATIVE=0"
        with pytest.raises(cpu.NativeUnavailable):
            runtime("smollm", "native")
    finally:
        cpu._outcome.cache_clear()
