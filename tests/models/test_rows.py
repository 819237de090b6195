"""Visibility and positions of rows, from integers alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zbench.models.rows import Rows, ancestors

trees = st.integers(1, 20).flatmap(lambda n: st.tuples(*(st.integers(-1, i - 1) for i in range(n))))


@given(parents=trees)
def test_a_row_sees_itself_and_its_ancestors_and_nothing_else(parents: tuple[int, ...]) -> None:
    visible = ancestors(torch.tensor([parents]))[0]
    for row in range(len(parents)):
        line, at = set(), row
        while at >= 0:
            line.add(at)
            at = parents[at]
        assert set(visible[row].nonzero().flatten().tolist()) == line


@given(parents=trees, length=st.integers(0, 100))
def test_a_tree_rows_position_is_its_depth_after_the_prefix(parents: tuple[int, ...], length: int) -> None:
    rows = Rows.tree(torch.zeros(1, len(parents), dtype=torch.int64), torch.tensor([length]), torch.tensor([parents]))
    for row, parent in enumerate(parents):
        before = length - 1 if parent < 0 else int(rows.positions[0, parent])
        assert int(rows.positions[0, row]) == before + 1


@given(count=st.integers(1, 20), lengths=st.lists(st.integers(0, 50), min_size=1, max_size=4))
def test_a_chain_is_the_tree_whose_parents_are_the_rows_before(count: int, lengths: list[int]) -> None:
    ids, at = torch.zeros(len(lengths), count, dtype=torch.int64), torch.tensor(lengths)
    chain = Rows.chain(ids, at)
    tree = Rows.tree(ids, at, chain.parents)
    assert torch.equal(chain.visible, tree.visible)
    assert torch.equal(chain.positions, tree.positions)


def test_a_parent_that_does_not_precede_its_row_is_refused() -> None:
    with pytest.raises(ValueError, match="before"):
        ancestors(torch.tensor([[-1, 1]]))


MASK = 99
steps_of = st.integers(1, 8).flatmap(
    lambda drafts: st.tuples(
        st.just(drafts), st.integers(1, 8), st.sets(st.integers(1, drafts)).map(lambda kept: tuple(sorted(kept)))
    )
)


@given(shape=steps_of, length=st.integers(0, 50))
def test_a_block_sees_the_drafts_its_outcome_keeps_and_itself_and_nothing_else(
    shape: tuple[int, int, tuple[int, ...]], length: int
) -> None:
    drafts, block, outcomes = shape
    ids = torch.arange(drafts)[None]
    rows = Rows.draft_and_verify(ids, torch.tensor([length]), block, outcomes, MASK)
    assert rows.ids[0].tolist() == [*range(drafts), *[MASK] * (block * len(outcomes))]
    for row in range(drafts):
        assert rows.visible[0, row].nonzero().flatten().tolist() == list(range(row + 1))
        assert (int(rows.positions[0, row]), int(rows.parents[0, row])) == (length + row, row - 1)
    for index, kept in enumerate(outcomes):
        own = list(range(drafts + index * block, drafts + (index + 1) * block))
        for place, row in enumerate(own):
            assert rows.visible[0, row].nonzero().flatten().tolist() == [*range(kept), *own]
            assert int(rows.positions[0, row]) == length + kept + place
            assert int(rows.parents[0, row]) == (row - 1 if place else kept - 1)
            assert rows.masks is not None
            assert int(rows.masks[0, row]) == place


def test_without_outcomes_the_step_is_a_chain() -> None:
    ids, lengths = torch.tensor([[1, 2, 3]]), torch.tensor([4])
    step, chain = Rows.draft_and_verify(ids, lengths, 8, (), MASK), Rows.chain(ids, lengths)
    assert step.causal
    assert step.masks is None
    for name in ("ids", "positions", "parents", "visible"):
        assert torch.equal(getattr(step, name), getattr(chain, name))


def test_an_outcome_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="outcomes"):
        Rows.draft_and_verify(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0]), 4, (3,), MASK)


@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=3), block=st.integers(1, 5), length=st.integers(0, 9))
def test_a_prompts_block_stands_at_its_own_end(counts: list[int], block: int, length: int) -> None:
    ids, lengths = torch.zeros(len(counts), 6, dtype=torch.int64), torch.tensor([length] * len(counts))
    rows = Rows.prompt_and_block(ids, lengths, torch.tensor(counts), block, MASK)
    chain = Rows.chain(ids, lengths)
    assert torch.equal(rows.visible[:, :6, :6], chain.visible)
    assert torch.equal(rows.positions[:, :6], chain.positions)
    assert not rows.visible[:, :6, 6:].any()
    for sequence, count in enumerate(counts):
        for place in range(block):
            row = 6 + place
            seen = rows.visible[sequence, row].nonzero().flatten().tolist()
            assert seen == [*range(count), *range(6, 6 + block)]
            assert int(rows.positions[sequence, row]) == length + count + place
            assert int(rows.parents[sequence, row]) == (row - 1 if place else count - 1)
