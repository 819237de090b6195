"""Tiny models run on one thread: a team that spins at barriers is slower than their work, above all when busy.

`pytest -n 2` keeps the tests of a file together, for what they share, and runs nothing beside a test marked `alone`.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

USUAL_THREADS = torch.get_num_threads()

# Where no GPU is there, Triton's kernels run in its interpreter. It asks when it is first imported, so here.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# An example takes as long as the machine lets it: 200 ms, the usual limit, fails whatever meets a busy one.
settings.register_profile("zbench", deadline=None)


def pytest_configure() -> None:
    torch.set_num_threads(1)
    settings.load_profile("zbench")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    config.option.loadscopereorder = False  # in the usual order, which begins with what is quick
    return LoadFileScheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test of one worker waits for those of the others where one of them is to be alone."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    place = item.config.cache.mkdir("alone")
    with (place / "door").open("w") as door, (place / "machine").open("w") as machine:
        fcntl.flock(door, fcntl.LOCK_EX)  # who waits to be alone is overtaken by nobody
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


@pytest.fixture(autouse=True)
def _all_threads_for_slow_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """But for those that run beside others."""
    marked = {mark.name for mark in request.node.iter_markers()}
    all_threads = "slow" in marked and ("alone" in marked or not hasattr(request.config, "workerinput"))
    if all_threads:
        torch.set_num_threads(USUAL_THREADS)
    yield
    if all_threads:
        torch.set_num_threads(1)


@pytest.fixture
def denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may not be searched, for root neither."""
    folder, stat = tmp_path / "denied", Path.stat

    def refused(path: Path, **options: Any) -> os.stat_result:
        if folder in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    folder.mkdir()
    monkeypatch.setattr(Path, "stat", refused)
    return folder
