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


def test_read_sum_visits_every_value() -> None:
    for size in (1, 100, 4096, 5003):
        assert cpu.read_sum(torch.arange(size, dtype=torch.float32) % 7) == sum(i % 7 for i in range(size))
