"""Residual add with RMSNorm against float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zbench.kernels import add_norm, jit

# Of a norm. Triton's interpreter cuts bfloat16 off where a GPU rounds: twice a unit of last place, twice.
ALLOWED = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2**-6}


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    width=st.sampled_from([1, 48, 64, 100]),
    dtype=st.sampled_from(list(ALLOWED)),
    adds=st.booleans(),
    strided=st.booleans(),
)
def test_sum_and_norm_are_those_of_float64(
    seed: int, rows: int, width: int, dtype: torch.dtype, adds: bool, strided: bool, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        wide = torch.randn(*shape[:-1], shape[-1] + strided, generator=generator)
        return wide.to(device, dtype)[..., : shape[-1]]

    x, added, weight = (
        normal(2, rows, width),
        normal(2, rows, width) if adds else None,
        normal(1, width)[0].contiguous(),
    )
    before = x.clone()
    exact = x.double() if added is None else (x + added).double()  # the sum is rounded once, to the stream's type
    normed = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    for call in (add_norm.reference, add_norm.launch):
        total, found = call(x, added, weight, 1e-5)
        assert total.dtype == found.dtype == dtype and total.shape == found.shape == x.shape
        assert (total.double() - exact).norm() <= ALLOWED[dtype] * exact.norm()
        assert (found.double() - normed).norm() <= ALLOWED[dtype] * normed.norm()
        assert torch.equal(x, before)  # a captured hidden state is not written over


def test_every_launch_is_counted(device: torch.device) -> None:
    x = torch.ones(2, 8, device=device)
    for _ in range(2):
        before = jit.launches
        add_norm.launch(x, x, x[0], 1e-5)
        assert jit.launches == before + 1
