"""Run a module as `python -m MODULE ...` does, and fail if threads of gloo are left when the interpreter ends.

Such a thread may still have to let go of a tensor, for which it needs the interpreter: it is aborted then ("terminate
called without an active exception"), once in some hundred times on a busy machine."""

from __future__ import annotations

import atexit
import os
import runpy
import sys
from pathlib import Path

LEFT = 99  # exit code


def _check() -> None:
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # it has just ended
            continue
    if left := [name for name in names if "gloo" in name]:
        sys.stderr.write(f"zbench: left running: {', '.join(left)}\n")
        sys.stderr.flush()
        os._exit(LEFT)


if __name__ == "__main__":
    atexit.register(_check)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
