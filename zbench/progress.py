"""Progress of a long run: a live bar with ETA on a terminal, plain lines elsewhere (CI logs)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINES = 60  # at most about this many plain lines for one run


def say(console: Console, line: str) -> None:
    """A line as it is: nothing in it is markup, coloured or wrapped."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def track(total: int, done: int, console: Console) -> Iterator[Callable[[str], None]]:
    """Yields `advance(what)`, to be called after each finished item; `done` items were finished before."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("starting", total=total, completed=done)

            def advance(what: str) -> None:
                bar.update(task, advance=1, description=what)

            yield advance
        return

    began, position = time.monotonic(), done
    every = max(1, (total - done) // LINES)

    def advance_plain(what: str) -> None:
        nonlocal position
        position += 1
        if (position - done) % every and position != total:
            return
        left = (time.monotonic() - began) / (position - done) * (total - position)
        say(console, f"[{position}/{total}] {what}, {left:.0f} s left")

    yield advance_plain


@contextmanager
def amounts(total: float, console: Console, interval: float = 10.0) -> Iterator[Callable[[float, str], None]]:
    """Yields `advance(done, what)` for work that is measured, not counted; plain lines come every `interval` seconds.

    What is done when it is first called counts as done before. More than the total is the total.
    """
    began, first, last = time.monotonic(), -1.0, float("-inf")

    def left(done: float) -> float:
        return (time.monotonic() - began) / max(done - first, 1e-9) * (total - done)

    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("starting", total=total)
            yield lambda done, what: bar.update(task, completed=min(done, total), description=what)
        return

    def advance(done: float, what: str) -> None:
        nonlocal first, last
        done = min(done, total)
        if first < 0:
            first = done
        elif time.monotonic() - last >= interval or done >= total:
            last = time.monotonic()
            share = 100 * done / total
            say(console, f"[{share:.0f}%] {what}, {left(done):.0f} s left")

    yield advance
