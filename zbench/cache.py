"""Where zbench keeps what is expensive to make again, and how it writes a file that is whole or absent."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """`$ZBENCH_CACHE`, else `$XDG_CACHE_HOME/zbench`, else `~/.cache/zbench`. It may not exist yet."""
    if chosen := os.environ.get("ZBENCH_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification: a relative path is invalid and must be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "zbench"


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) so that a reader sees the old file or the new one, never a part.

    Makes the parent folders. Raises OSError where the folder cannot be written or the disk is full; `path` is then
    untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode() if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a cache may be shared, so the process's umask decides as for any other file.
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
