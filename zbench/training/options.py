"""What the command line calls the settings of corpora and runs, for messages that say which differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OPTIONS = {
    "steps": "--depth",  # of training-time test, among EAGLE-3's settings
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            "seed", "written", "opened", "batch", "rate", "dtype", "block", "short_block", "rank", "draft_vocab",
            "reach", "ffn", "layers", "alpha", "mask_id", "prompts",
        )
    },
}  # fmt: skip


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`with --seed 0, not 4` for every setting that is not what it was."""
    return [
        f"with {_OPTIONS.get(name, name)} {_said(before.get(name))}, not {_said(now.get(name))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def _said(value: Any) -> str:
    return "none" if value is None else str(value)
