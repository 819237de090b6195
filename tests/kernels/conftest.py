"""Triton kernels are tested compiled where there is a GPU, else on the CPU in the interpreter (`tests/conftest.py`)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run here. Skips where they cannot."""
    pytest.importorskip("triton", reason='triton is not installed: pip install "zbench[kernels]"')
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
