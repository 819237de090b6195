"""Triton kernels are tested compiled where there is a GPU, else on the CPU in the interpreter (`tests/conftest.py`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run here. Skips where they cannot."""
    pytest.importorskip("triton", reason='triton is not installed: pip install "zbench[kernels]"')
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """Memory that nothing was written to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
