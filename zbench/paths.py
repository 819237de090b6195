"""Paths that a user names."""

from __future__ import annotations

from pathlib import Path

from zbench.errors import UserError

NEWEST = Path("newest")  # to resume: the last one that fits


def expanded(given: str | Path) -> Path:
    """With the home folder that `~` or `~NAME` stands for. Raises UserError where that is none, or this is no path."""
    if "\0" in str(given):
        raise UserError(f"{str(given)!r}: a path has no NUL in it")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise UserError(f"{given}: no such home folder is known") from error


def folder(given: str | Path, what: str) -> Path:
    """A folder that must be there. Raises UserError where it is not, or that cannot be told."""
    path = expanded(given)
    try:
        if path.is_dir():
            return path
    except OSError as error:
        raise UserError(f"{what} folder {path} cannot be read: {error.strerror}") from error
    raise UserError(f"{what} folder {path} does not exist")
