"""Runs a server's command in a process group of its own, and ends the whole group when the parent is gone.

    python supervise.py SECRET_VARIABLE LOG COMMAND [ARGUMENT ...]

The parent holds this program's standard input open; its end, however the parent ended, is the signal to stop. Output
goes to LOG, from which the value of SECRET_VARIABLE is kept out. Only the standard library and psutil are used.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import BinaryIO

import psutil

GRACE = 10.0  # seconds between asking and killing


def main(secret_variable: str, log: str, command: list[str]) -> int:
    secret = os.environ.get(secret_variable, "").strip().encode() if secret_variable else b""
    with open(log, "ab", buffering=0) as file:  # noqa: PTH123
        try:
            server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            file.write(f"cannot start {command[0]}: {error.strerror}\n".encode())
            return 127
        copier = threading.Thread(target=_copy, args=(server.stdout, file, secret), daemon=True)
        copier.start()
        threading.Thread(target=_wait_for_parent, args=(server,), daemon=True).start()
        code = server.wait()
        stop(server.pid)  # what the server left behind
        copier.join(timeout=1)
    return code if code >= 0 else 128 - code


def _wait_for_parent(server: subprocess.Popen) -> None:
    while os.read(0, 1024):
        pass
    stop(server.pid)


def stop(group: int) -> None:
    """End a process group and all that descends from it: first politely, then for good."""
    family = _family(group)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        end = time.monotonic() + (GRACE if number == signal.SIGTERM else 1.0)
        while (family := [p for p in {*family, *_family(group)} if _alive(p)]) and time.monotonic() < end:
            time.sleep(0.05)
        if not family:
            return


def _family(group: int) -> list[psutil.Process]:
    """The processes of a group, and their descendants even where they left it."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group:
                found |= {process, *process.children(recursive=True)}
    return list(found)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _copy(source: BinaryIO, target: BinaryIO, secret: bytes) -> None:
    """Line by line, so that a secret is never written in two halves. What cannot be written is dropped: a server whose
    output nobody reads would stand still."""
    said = False
    for line in iter(source.readline, b""):
        try:
            target.write(line.replace(secret, b"***") if secret else line)
        except OSError as error:
            if not said:
                with contextlib.suppress(OSError):
                    print(f"{target.name}: {error.strerror}; output of the server is lost", file=sys.stderr, flush=True)
            said = True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
