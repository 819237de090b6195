"""Native projections against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zbench.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"native CPU kernels: {cpu.unavailable_reason()}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 60).map(lambda n: 2 * n),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_linear_is_the_float64_product(
    dtype: torch.dtype, rows: int, outputs: int, inputs: int, threads: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = cpu.linear(x.float(), cpu.pack(weight), outputs).double()
    finally:
        torch.set_num_threads(before)
    want = x.double() @ weight.double().T
    assert (got - want).norm() <= 1e-5 * want.norm() + 1e-6


def test_linear_rounds_its_input_to_bfloat16_as_its_weights_are() -> None:
    x, weight = torch.full((1, 16), 1.003), torch.ones(16, 16, dtype=torch.bfloat16)
    got = cpu.linear(x, cpu.pack(weight), 16)
    assert torch.equal(got, torch.full((1, 16), 16 * float(torch.tensor(1.003).bfloat16())))


@given(
    parts=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=3),
    interleaved=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_low_rank_panels_hold_every_column_that_is_not_zero(
    parts: list[tuple[int, int]], interleaved: bool, dtype: torch.dtype, seed: int
) -> None:
    """`parts` of a block diagonal matrix: panels of outputs, and rank (0: a projection that is not adapted)."""
    parts = [(parts[0][0], rank) for _, rank in (parts * 2)[:2]] if interleaved else parts
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.randn(cpu.PANEL * panels, rank, generator=generator) for panels, rank in parts]
    b = torch.block_diag(*blocks).to(dtype)
    b = torch.nn.functional.pad(b, (0, -b.shape[1] % cpu.PANEL or cpu.PANEL * (not b.shape[1])))
    packed, source = cpu.pack_low_rank(b, interleaved)
    rank = packed.numel() // len(b)
    assert rank <= max(2 * ((max(r for _, r in parts) + 2) // 2), 2)  # each part's own columns, from an even one on
    panels = packed.transpose(1, 2).reshape(-1, cpu.PANEL, rank)
    order = [p for pair in zip(*torch.arange(len(panels)).chunk(2), strict=True) for p in pair] if interleaved else None
    for index, (panel, start) in enumerate(zip(panels, source.tolist(), strict=True)):
        at = index if order is None else int(order[index])
        want, got = b[at * cpu.PANEL : (at + 1) * cpu.PANEL], torch.zeros(cpu.PANEL, b.shape[1], dtype=dtype)
        assert start >= 0 or not want.any()
        if start >= 0:
            got[:, start : start + rank] = panel
        assert start % 2 == 0 or start == -1
        assert torch.equal(got, want)


logits = st.floats(allow_nan=True, allow_infinity=True, width=32) | st.sampled_from([0.0, 1.0, float("-inf")])


@given(
    rows=st.integers(0, 3), size=st.integers(1, 2500), values=st.lists(logits, min_size=1, max_size=40), data=st.data()
)
def test_argmax_is_the_first_largest_number(rows: int, size: int, values: list[float], data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, max(rows * size - 1, 0)), min_size=len(values), max_size=len(values)))
    x = torch.full((rows * size,), data.draw(st.sampled_from([0.0, float("-inf"), float("nan")])))
    if rows:
        x[torch.tensor(places)] = torch.tensor(values)
    x = x.view(rows, size)
    numbers = x.where(~x.isnan(), float("-inf")).double().numpy()
    assert cpu.argmax(x).tolist() == numbers.argmax(1).tolist()


def test_argmax_takes_any_shape_and_dtype() -> None:
    x = torch.randn(2, 3, 5000, generator=torch.Generator().manual_seed(0))
    for other in (x, x.transpose(0, 1), x.bfloat16(), x.double(), x[..., ::2]):
        assert torch.equal(cpu.argmax(other), other.argmax(-1))


def test_memory_is_given_out_again_only_once_nothing_lies_in_it() -> None:
    memory = cpu.Recycled()
    first = memory.floats(3, 50)
    place, row = first.data_ptr(), first[1:].fill_(7.0)[0]
    del first
    other = memory.floats(3, 50).fill_(1.0)  # `row` is still read
    assert other.data_ptr() != place
    assert torch.equal(row, torch.full((50,), 7.0))
    del row
    place = other.data_ptr()
    del other
    assert memory.floats(2, 40).data_ptr() == place
    assert memory.floats(0, 40).shape == (0, 40)
    assert memory.floats(1, 1 << 24).shape == (1, 1 << 24)


def test_read_sum_visits_every_value() -> None:
    for size in (1, 100, 4096, 5003):
        for streams in (1, 8):
            x = torch.arange(size, dtype=torch.float32) % 7
            assert cpu.read_sum(x, streams=streams) == sum(i % 7 for i in range(size))
