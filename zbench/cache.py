"""Where zbench keeps what is expensive to make again, where runs go, and how a file is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from zbench.errors import UserError
from zbench.paths import expanded


def cache_dir() -> Path:
    """`$ZBENCH_CACHE`, else `$XDG_CACHE_HOME/zbench`, else `~/.cache/zbench`. It may not exist yet."""
    if chosen := os.environ.get("ZBENCH_CACHE"):
        return expanded(chosen).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification: a relative path is invalid and must be ignored.
    return (base if base.is_absolute() else expanded("~/.cache")) / "zbench"


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


def write(path: Path, data: bytes | str) -> None:
    """`atomic_write` of what a user asked for. Raises UserError where it cannot be written."""
    try:
        atomic_write(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def check_writable(out: Path) -> None:
    """Raises UserError where no file could be made in a folder, which need not be there; nothing is left behind."""
    missing: list[Path] = []
    try:
        missing += [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def new_folder(out: Path, name: str, files: Mapping[str, str | bytes] | None = None) -> Path:
    """A folder for a run under `out`, called after it and the time, with these files in it. Raises UserError where it
    or one of them cannot be written, and leaves none then."""
    folder = _made(out, name)
    try:
        for file, content in (files or {}).items():
            write(folder / file, content)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _made(out: Path, name: str) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{n}" for n in range(2, 100))):
            with contextlib.suppress(FileExistsError):
                folder = out / f"{name}-{stamp}{suffix}"
                folder.mkdir()
                return folder
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error
    raise UserError(f"{out} already holds a hundred runs named {name}-{stamp}")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
