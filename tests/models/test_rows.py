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
