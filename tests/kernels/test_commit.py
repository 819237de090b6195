"""Rows of the cache that move up in place, against indexing a copy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zbench.kernels import commit


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(1, 2),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=2),
    heads=st.integers(1, 2),
    width=st.sampled_from([16, 40, 80]),
    rows=st.integers(1, 11),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_kept_rows_stand_behind_the_prefix_and_the_rest_is_untouched(
    seed: int, layers: int, lengths: list[int], heads: int, width: int, rows: int, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    """Ragged prefixes, ranges that overlap, a cache that is part of a wider one, NaN where nothing is kept."""
    generator = torch.Generator().manual_seed(seed)
    batch, capacity = len(lengths), max(lengths) + rows
    stores = [
        torch.randn(layers, batch, heads, capacity + 2, width + 8, generator=generator).to(device, dtype)
        for _ in range(2)
    ]
    paths = [torch.nonzero(torch.rand(rows, generator=generator) < 0.6)[:, 0] for _ in lengths]
    kept = torch.full((batch, rows), -1)
    for row, path in zip(kept, paths, strict=True):
        row[: len(path)] = path
    for store in stores:
        for sequence, (length, path) in enumerate(zip(lengths, paths, strict=True)):
            forgotten = torch.ones(rows, dtype=torch.bool)
            forgotten[path] = False
            store[:, sequence, :, length : length + rows][:, :, forgotten.to(device)] = torch.nan
    wanted = [store.clone() for store in stores]
    for new, old in zip(wanted, stores, strict=True):
        for sequence, (length, path) in enumerate(zip(lengths, paths, strict=True)):
            moved = old[:, sequence, :, (length + path).to(device), :width]
            new[:, sequence, :, length : length + len(path), :width] = moved
    there = torch.tensor(lengths, device=device), kept.to(device)
    for call in (commit.reference, commit.launch):
        given_ = [store.clone() for store in stores]
        call(*(store[:, :, :, :capacity, :width] for store in given_), *there)
        for found, want in zip(given_, wanted, strict=True):
            assert torch.equal(found.nan_to_num(nan=777.0), want.nan_to_num(nan=777.0)), call.__module__


def test_a_row_is_read_before_another_is_written_over_it(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row moves up by one, so that each target is another's source; also when channels are split."""
    monkeypatch.setattr(commit, "TABLE", {"": commit.Launch(64, 4)})
    keys = torch.arange(7.0, device=device)[:, None].expand(7, 40).repeat(1, 1, 1, 1, 1)
    values, kept = -keys, torch.arange(1, 7, device=device)[None]
    commit.launch(keys, values, torch.zeros(1, dtype=torch.int64, device=device), kept)
    assert keys[0, 0, 0, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 6]
    assert torch.equal(keys, keys[..., :1].expand_as(keys)) and torch.equal(values, -keys)
