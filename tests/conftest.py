"""Tiny models run on one thread: a team that spins at barriers is slower than their work, above all when busy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _one_thread_unless_slow(request: pytest.FixtureRequest) -> Iterator[None]:
    import torch

    usual = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)
