"""Who sees whom, felt in the numbers: a token that a row must not see changes nothing in it, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import relative_error, runtime
from zbench.kernels import cpu
from zbench.models.rows import Rows

MASK = 299
needs_native = pytest.mark.skipif(not cpu.available(), reason=f"native CPU kernels: {cpu.unavailable_reason()}")
EXECUTIONS = ["eager", pytest.param("native", marks=needs_native)]
PREFIX, DRAFTS, BLOCK = 6, 4, 3


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(3, 299, (1, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["smollm", "qwen3", "zaya"])
def test_a_changed_row_changes_the_rows_that_see_it_and_no_other_by_a_bit(
    family: str, dtype: torch.dtype, execution: str
) -> None:
    if (family, execution) == ("zaya", "eager"):
        pytest.skip("torch rounds grouped products by what else is in them")
    # ZAYA has no native decoder of its own: "auto" runs its products on the native kernel.
    model, outcomes = runtime(family, "auto" if family == "zaya" else execution, dtype), (1, 3, 4)
    prefix, drafts = tokens(PREFIX, 1), tokens(DRAFTS, 2)

    def logits(changed: int | None) -> tuple[Tensor, Rows]:
        cache = model.new_cache(1, 64)
        model.forward(Rows.chain(prefix, cache.lengths), cache)
        cache.extend([PREFIX])
        rows = Rows.draft_and_verify(drafts, cache.lengths, BLOCK, outcomes, MASK)
        if changed is not None:
            rows.ids[0, changed] = (rows.ids[0, changed] + 7) % 290
        return model.forward(rows, cache).logits[0], rows

    base, rows = logits(None)
    for changed in range(rows.ids.shape[1]):
        other, _ = logits(changed)
        for row in range(rows.ids.shape[1]):
            assert torch.equal(base[row], other[row]) != bool(rows.visible[0, row, changed]), (row, changed)


@pytest.mark.parametrize("family", ["smollm", "mistral", "qwen3", "zaya"])
@settings(max_examples=15, deadline=None)
@given(
    drafts=st.integers(1, 6),
    block=st.integers(1, 5),
    kept=st.sets(st.integers(1, 6), min_size=1),
    prefix=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_every_block_computes_what_it_would_on_its_own_after_its_outcome(
    family: str, drafts: int, block: int, kept: set[int], prefix: int, seed: int
) -> None:
    model, outcomes = runtime(family, "auto"), tuple(sorted({min(r, drafts) for r in kept}))
    start, chain = tokens(prefix, seed), tokens(drafts, seed + 1)
    cache = model.new_cache(1, 96)
    model.forward(Rows.chain(start, cache.lengths), cache)
    cache.extend([prefix])
    together = model.forward(Rows.draft_and_verify(chain, cache.lengths, block, outcomes, MASK), cache).logits[0]
    for index, outcome in enumerate(outcomes):
        alone = model.new_cache(1, 96)
        model.forward(Rows.chain(torch.cat([start, chain[:, :outcome]], 1), alone.lengths), alone)
        alone.extend([prefix + outcome])
        canvas = Rows.canvas(torch.full((1, block), MASK), alone.lengths, MASK)
        want = model.forward(canvas, alone).logits[0]
        got = together[drafts + index * block : drafts + (index + 1) * block]
        assert relative_error(got, want) < 1e-4
    plain = model.new_cache(1, 96)
    want = model.forward(Rows.chain(torch.cat([start, chain], 1), plain.lengths), plain).logits[0, prefix:]
    assert relative_error(together[:drafts], want) < 1e-4


@pytest.mark.parametrize("family", ["smollm", "zaya"])
def test_a_prompts_block_computes_what_it_would_after_the_prompt(family: str) -> None:
    model, sizes, block = runtime(family, "auto"), [7, 3, 5], 4
    ids = torch.cat([tokens(7, seed) for seed in range(3)])
    cache = model.new_cache(3, 32)
    got = model.forward(Rows.prompt_and_block(ids, cache.lengths, torch.tensor(sizes), block, MASK), cache).logits
    for sequence, size in enumerate(sizes):
        alone = model.new_cache(1, 32)
        prompt = model.forward(Rows.chain(ids[sequence : sequence + 1, :size], alone.lengths), alone).logits[0]
        alone.extend([size])
        want = model.forward(Rows.canvas(torch.full((1, block), MASK), alone.lengths, MASK), alone).logits[0]
        assert relative_error(got[sequence, :size], prompt) < 1e-4
        assert relative_error(got[sequence, 7:], want) < 1e-4
