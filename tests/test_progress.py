"""What plain lines say of work under way."""

from __future__ import annotations

import io

from rich.console import Console

from zbench.progress import amounts


def test_more_than_was_asked_for_is_all_of_it() -> None:
    """A corpus is made in shards, the last of which may bring more than is wanted."""
    said = io.StringIO()
    with amounts(3000, Console(file=said), interval=0.0) as advance:
        advance(0, "starting")
        advance(1500, "half")
        advance(7750, "7750 answer tokens")
    half, whole = said.getvalue().splitlines()
    assert half.startswith("[50%] half") and whole == "[100%] 7750 answer tokens, 0 s left"
