"""Does code that a model wrote pass its tests? Run in processes of their own, without network, files or children.

What is run is not trusted. `_confined.py` is started without environment or site packages in a folder of its own. It
forks: one process holds the tests and the verdict, the other only the model's code. They talk in Python literals, so
that the code sees neither the tests nor the channel of the verdict, and what it prints, raises or exits with is no
verdict. Both give up, before anything is run, every system call but those that compute and read (seccomp), and have
limits on memory and time; when time is over their process group is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from zbench.errors import UserError

Outcome = Literal["passed", "failed", "timeout", "not judged"]

CONFINED = "seccomp: no network, no new processes, no signals, no file is written"
_MACHINES = {"x86_64", "aarch64"}
_CHILD = (resources.files("zbench") / "_confined.py").read_text(encoding="utf-8")
_VERDICT_BYTES = 4096
# Its indentation, which is that of its list's items and not the code's own, and its lines.
_FENCE = re.compile(
    r"^((?:[ \t]*(?:[-*+]|\d+[.)])(?=[ \t]))?[ \t]*)```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL
)
# Where a continuation ends that began within a function (Chen et al. 2021, arXiv 2107.03374, section 2.1).
_STOPS = re.compile(r"\n(?:class|def|#|if|print)")


@dataclass(frozen=True, slots=True)
class Problem:
    """A function to write, as HumanEval has it (Chen et al. 2021)."""

    prompt: str  # code up to the function's body, its helpers and docstring included
    entry_point: str  # the function's name
    test: str  # code that defines check(candidate)


@dataclass(frozen=True, slots=True)
class Limits:
    seconds: float  # of wall time, and of processor time of each process
    memory: int  # bytes of address space


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: Outcome
    why: str = ""  # the kind of error; never its text, which is the code's own


def program(problem: Problem, answer: str) -> str:
    """The code of an answer: its fenced block that defines the function, else the last one, else all of it; as the
    function's continuation where it does not define it."""
    defines = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(problem.entry_point)}\b", re.MULTILINE)
    blocks = [_outdented(lines, len(indent)) for indent, lines in _FENCE.findall(answer)]
    code = next((block for block in blocks if defines.search(block)), blocks[-1] if blocks else answer)
    if defines.search(code):
        return f"{problem.prompt}\n    pass\n\n{code}"  # the prompt's helpers, then the whole function again
    return problem.prompt + _STOPS.split(code, maxsplit=1)[0]


def _outdented(lines: str, by: int) -> str:
    """Without the indentation of their fence, where it is theirs too and not the fence's alone."""
    first = next(filter(str.strip, lines.splitlines()), "")
    return re.sub(rf"^[ \t]{{0,{by}}}", "", lines, flags=re.MULTILINE) if first[:1].isspace() else lines


def judge(problem: Problem, answer: str, limits: Limits) -> Verdict:
    """Run an answer against its problem's tests. Raises UserError where it cannot be confined here."""
    nonce = secrets.token_hex(16)
    job = {
        "program": program(problem, answer),
        "entry_point": problem.entry_point,
        "helpers": f"{problem.prompt}\n    pass\n",
        "test": problem.test,
        "seconds": limits.seconds,
        "memory": limits.memory,
    }
    with tempfile.TemporaryDirectory(prefix="zbench-code-", ignore_cleanup_errors=True) as folder:
        said = _run(job, nonce, folder, limits.seconds)
    if said is None:
        return Verdict("timeout")
    outcome, _, why = said.partition(" ")
    if outcome == "unconfined":
        raise UserError(f"generated code cannot be confined on this system ({why}), so it is not run")
    known: dict[str, Outcome] = {f"passed-{nonce}": "passed", "failed": "failed", "unjudged": "not judged"}
    return Verdict(known.get(outcome, "failed"), why if outcome in known else "its process ended")


def _run(job: dict[str, object], nonce: str, folder: str, seconds: float) -> str | None:
    """What the confined process says; None where its time was over. Its group, which it cannot leave, ends with it."""
    reader, writer = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD, str(reader)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env={},
            start_new_session=True, pass_fds=(reader,),
        )  # fmt: skip
        os.write(writer, nonce.encode())
    finally:
        os.close(reader)
        os.close(writer)
    try:
        said, _ = child.communicate(json.dumps(job).encode(), timeout=seconds + 1)
        return said[:_VERDICT_BYTES].decode(errors="replace").strip()
    except subprocess.TimeoutExpired:
        _end(child)
        return None
    except BaseException:
        _end(child)
        raise


def _end(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


@cache
def confinement() -> str:
    """How generated code is held here, for the record. Raises UserError where it cannot be, or a sandbox does not
    hold: it is tried with code that passes and with code that tries to write and to connect."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise UserError("generated code is run on Linux (x86-64 or ARM64) only, where it can be confined")
    limits = Limits(seconds=20, memory=256 << 20)
    tried = Problem(
        "def f(what):\n    ''", "f", "def check(f):\n    assert f('compute') and f('write') and f('connect')\n"
    )
    answer = (
        "def f(what):\n    import os\n    if what == 'compute':\n        return True\n    try:\n"
        "        if what == 'write':\n            os.open('x', os.O_CREAT | os.O_WRONLY)\n"
        "        else:\n            import socket\n            socket.socket()\n"
        "    except (OSError, ImportError):\n        return True\n    return False\n"
    )
    found = judge(tried, answer, limits)
    if found.outcome != "passed":
        raise UserError(f"generated code cannot be confined on this system ({found.outcome} {found.why})".rstrip())
    return CONFINED
