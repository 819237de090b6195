"""Tiny models run on one thread: a team that spins at barriers is slower than their work, above all when busy."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

USUAL_THREADS = torch.get_num_threads()

# Where no GPU is there, Triton's kernels run in its interpreter. It asks when it is first imported, so here.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# An example takes as long as the machine lets it: 200 ms, the usual limit, fails whatever meets a busy one.
settings.register_profile("zbench", deadline=None)


def pytest_configure() -> None:
    torch.set_num_threads(1)
    settings.load_profile("zbench")


@pytest.fixture(autouse=True)
def _all_threads_for_slow_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    slow = request.node.get_closest_marker("slow") is not None
    if slow:
        torch.set_num_threads(USUAL_THREADS)
    yield
    if slow:
        torch.set_num_threads(1)
