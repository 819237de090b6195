"""Trees of drafts: the best candidates and no others, with their ancestors, natively as with torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zbench.kernels import cpu
from zbench.models.rows import Rows
from zbench.models.trees import BlockTree, rerank, tree_rows

needs_native = pytest.mark.skipif(not cpu.available(), reason=f"native CPU kernels: {cpu.unavailable_reason()}")
EXECUTIONS = ["torch", pytest.param("native", marks=needs_native)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_reranking_keeps_the_best_nodes_and_their_ancestors_even_among_ties(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 25))
    parents = [-1] + [data.draw(st.integers(-1, i - 1)) for i in range(1, count)]
    scores: list[float] = []
    for parent in parents:
        scores.append((scores[parent] if parent >= 0 else 0.0) - data.draw(st.sampled_from([0.0, 0.5, 1.0])))
    kept = data.draw(st.integers(1, count))
    ids, rows, worth = rerank(torch.arange(count)[None] + 100, torch.tensor([scores]), torch.tensor([parents]), kept)
    chosen = [token - 100 for token in ids[0].tolist()]
    assert worth[0].tolist() == [scores[i] for i in chosen]
    assert sorted(scores[i] for i in chosen) == sorted(scores, reverse=True)[:kept][::-1]
    assert rows[0, 0] == -1
    for row, candidate in enumerate(chosen, start=1):
        parent = int(rows[0, row])
        assert parent < row
        assert (chosen[parent - 1] if parent else -1) == parents[candidate]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tree_rows_are_the_rows_of_a_tree(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 20))
    parents = [-1] + [data.draw(st.integers(0, i - 1)) for i in range(1, count)]
    ids, lengths = torch.arange(count)[None], torch.tensor([7])
    want = Rows.tree(ids, lengths, torch.tensor([parents]))
    got = tree_rows(ids, lengths, torch.tensor([parents]), max(1, int(want.positions.max()) - 7))
    assert torch.equal(got.visible, want.visible)
    assert torch.equal(got.positions, want.positions)


@needs_native
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_native_tree_rows_are_those_of_torch(data: st.DataObject) -> None:
    batch, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 25))
    kept = data.draw(st.integers(1, count))
    parents = torch.tensor([[data.draw(st.integers(-1, i - 1)) for i in range(count)] for _ in range(batch)])
    scores = torch.zeros(batch, count)
    for b in range(batch):
        for i, parent in enumerate(parents[b].tolist()):
            above = float(scores[b, parent]) if parent >= 0 else 0.0
            scores[b, i] = above - data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    ids, last = torch.arange(batch * count).view(batch, -1) + 100, torch.arange(batch)
    lengths = torch.arange(batch) * 5
    drafts, above, _ = rerank(ids, scores, parents, kept)
    want = tree_rows(torch.cat([last[:, None], drafts], 1), lengths, above, count)
    got = Rows(*cpu.tree_rows(last, lengths, ids, scores, parents, kept))
    for name in ("ids", "positions", "parents", "visible"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def paths(rows: Rows, sequence: int = 0) -> list[tuple[int, ...]]:
    """Of every row but the root: the tokens from below the root to it. The rows must be a tree's."""
    found: list[tuple[int, ...]] = [()]
    ids, parents = rows.ids[sequence].tolist(), rows.parents[sequence].tolist()
    assert parents[0] == -1
    for row in range(1, len(ids)):
        assert 0 <= parents[row] < row
        found.append((*found[parents[row]], ids[row]))
    again = Rows.tree(rows.ids, rows.positions[:, 0], rows.parents)
    for name in ("positions", "visible"):
        assert torch.equal(getattr(rows, name), getattr(again, name)), name
    return found[1:]


def drafted(
    monkeypatch: pytest.MonkeyPatch, execution: str, logits: Tensor, tokens: int, whole: bool = False,
    ids: Tensor | None = None, usable: Tensor | None = None,
) -> tuple[Rows, Tensor]:  # fmt: skip
    tree = BlockTree(logits.shape[1], tokens, torch.device("cpu"), whole)
    last, lengths = torch.arange(len(logits)) + 70, torch.arange(len(logits)) * 3
    with monkeypatch.context() as patched:
        if execution == "torch":
            patched.setattr(cpu, "can_verify", lambda logits: False)
            patched.setattr(cpu, "available", lambda: False)
        rows, worth = tree.grow(last, lengths, logits, ids, usable)
    assert torch.equal(rows.ids[:, 0], last)
    assert torch.equal(rows.positions[:, 0], lengths)
    return rows, worth


@pytest.mark.parametrize("execution", EXECUTIONS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_blocks_tree_has_its_likeliest_paths(execution: str, data: st.DataObject) -> None:
    """Against all of them in float64."""
    batch, places, vocab = (data.draw(st.integers(1, most)) for most in (3, 4, 7))
    tokens = data.draw(st.integers(1, vocab))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = 3 * torch.randn(batch, places, vocab, generator=generator)
    ids = torch.randperm(50, generator=generator)[:vocab] if data.draw(st.booleans()) else None
    with pytest.MonkeyPatch.context() as patched:
        rows, found = drafted(patched, execution, logits, tokens, ids=ids)
    log_probs = logits.double().log_softmax(-1)
    named = list(range(vocab)) if ids is None else ids.tolist()
    for sequence in range(batch):
        worth = {
            tuple(named[token] for token in path): sum(
                float(log_probs[sequence, place, token]) for place, token in enumerate(path)
            )
            for length in range(1, places + 1)
            for path in itertools.product(range(vocab), repeat=length)
        }
        chosen = paths(rows, sequence)
        assert len(set(chosen)) == tokens
        assert found[sequence].tolist() == pytest.approx([0.0, *(worth[path] for path in chosen)], abs=1e-5)
        best = sorted(worth.values(), reverse=True)[:tokens]
        assert sorted((worth[path] for path in chosen), reverse=True) == pytest.approx(best, abs=1e-5)
        likeliest = tuple(named[token] for token in log_probs[sequence].argmax(-1).tolist())
        main = [path for path in chosen if path == likeliest[: len(path)]]
        assert chosen[: len(main)] == sorted(main, key=len)  # so that nothing moves when they are accepted


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("tokens", [3, 8])
def test_the_path_of_the_likeliest_tokens_is_kept_whole_where_acceptance_is_drawn_along_it(
    monkeypatch: pytest.MonkeyPatch, execution: str, tokens: int
) -> None:
    logits = torch.zeros(2, 3, 9)
    logits[:, :, 4] = 0.1  # nearly uniform: alone, short paths would be the best
    chain = [(4,), (4, 4), (4, 4, 4)]
    assert paths(drafted(monkeypatch, execution, logits, tokens)[0])[:3] != chain
    for sequence in range(2):
        assert paths(drafted(monkeypatch, execution, logits, tokens, whole=True)[0], sequence)[:3] == chain


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_places_that_say_nothing_are_drafted_last(monkeypatch: pytest.MonkeyPatch, execution: str) -> None:
    logits = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(1))
    rows, worth = drafted(monkeypatch, execution, logits, 9, usable=torch.tensor([3, 2, 1, 0]))
    longest = [max(len(path) for path in paths(rows, sequence)) for sequence in range(4)]
    assert longest[1:3] == [2, 1]
    assert set(paths(rows, 2)) == {(token,) for token in range(9)}
    alone, _ = drafted(monkeypatch, execution, logits[1:2, :2].contiguous(), 9)
    assert set(paths(rows, 1)) == set(paths(alone))
    assert (worth[:3].exp() > 0).all() and not worth[3, 1:].exp().any()


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_logits_that_are_no_numbers_still_give_a_tree(
    monkeypatch: pytest.MonkeyPatch, execution: str, bad: float
) -> None:
    """What such a run says is found out elsewhere; here nothing may be read or written out of place."""
    logits = torch.randn(1, 3, 200, generator=torch.Generator().manual_seed(0))
    logits[0, 1] = bad
    logits[0, 2, ::2] = bad
    found, _ = drafted(monkeypatch, execution, logits, 6)
    assert len(paths(found)) == 6
    assert int(found.ids.min()) >= 0
    assert int(found.ids[:, 1:].max()) < 200


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(1, 400), tokens=st.integers(1, 40), levels=st.integers(1, 5),
    usable=st.none() | st.integers(0, 5), whole=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_native_block_trees_are_those_of_torch(
    vocab: int, tokens: int, levels: int, usable: int | None, whole: bool, seed: int
) -> None:
    tokens, generator = min(tokens, vocab), torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, levels, vocab, generator=generator)
    some = None if usable is None else torch.tensor([min(usable, levels), levels])
    with pytest.MonkeyPatch.context() as patched:
        native, torchs = (drafted(patched, how, logits, tokens, whole, None, some) for how in ("native", "torch"))
    torch.testing.assert_close(native[1].sort().values, torchs[1].sort().values, rtol=1e-4, atol=1e-4)
    native, torchs = native[0], torchs[0]
    if usable == 0 or (usable is not None and vocab**usable < 2 * tokens):
        return  # what was not predicted is equally unlikely, and any of it will do
    for sequence in range(2):
        assert set(paths(native, sequence)) == set(paths(torchs, sequence))
