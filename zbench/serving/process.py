"""Servers that a run starts: one at a time, watched, logged, and gone with the run whatever ends it.

A small supervisor (`supervise.py`) stands between: it holds the server's process group and ends it when this process
closes the pipe between them, which the system does even if this process is killed.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from zbench.errors import UserError
from zbench.paths import expanded
from zbench.serving import supervise
from zbench.serving.client import EndpointError

if TYPE_CHECKING:
    from zbench.scenario import Scenario

POLL_SECONDS = 0.2
LOG_TAIL = 2  # lines of a dead server's log that an error repeats


@dataclass(frozen=True, slots=True)
class Wanted:
    """A server as a scenario names it; `{port}` and `{model}` are not filled in yet."""

    command: tuple[str, ...]
    health: str
    startup: float
    environment: Mapping[str, str]
    url: str | None
    model: str
    key_variable: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any], model: Path | None) -> Wanted:
        """From the options of an endpoint and the model's folder. Raises UserError where the program is not installed,
        or wants a folder that there is not."""
        server = options["server"]
        command = tuple(server["command"])
        if _program(command[0]) is None:
            raise UserError(f"endpoint: there is no program {command[0]!r} here to start the server with")
        if model is None and any("{model}" in word for word in command):
            raise UserError("endpoint: {model} is the folder of a model, and random weights have none")
        return cls(
            command,
            server["health"],
            server["startup"],
            dict(server["environment"]),
            options["url"],
            str(model),
            options["api_key_env"],
        )


class Servers:
    """The server that is up, if any. Starting another one stops it: they would share the device."""

    def __init__(self, logs: Path | None, say: Callable[[str], None]) -> None:
        self.logs, self.say = logs, say
        self._wanted: Wanted | None = None
        self._running: Server | None = None

    def ensure(self, wanted: Wanted) -> Server:
        """The server, started if it is not the one that is up. One that died is not started again."""
        if self._running is None or self._wanted != wanted:
            self.stop()
            self._running = Server(wanted, self.logs or Path(tempfile.mkdtemp(prefix="zbench-server-")), self.say)
            self._wanted = wanted
        return self._running

    def stop(self) -> None:
        if self._running is not None:
            self._running.stop()
            self._running = self._wanted = None


class Server:
    """A started server. Raises EndpointError unless it becomes healthy."""

    def __init__(self, wanted: Wanted, logs: Path, say: Callable[[str], None]) -> None:
        port = free_port()

        def filled(text: str) -> str:
            return text.replace("{port}", str(port)).replace("{model}", wanted.model)

        self.filled = filled
        self.url = filled(wanted.url or "http://127.0.0.1:{port}/v1")
        root = self.url.rstrip("/").removesuffix("/v1")
        if _answers(root, wanted.health):
            raise EndpointError(f"something answers at {root} already; stop it, or leave out server to measure it")
        self.command = command = [_program(wanted.command[0]) or wanted.command[0], *map(filled, wanted.command[1:])]
        self.log = _new_file(logs, "server-" + re.sub(r"[^\w.-]+", "-", Path(command[0]).name))
        say(f"starting {Path(command[0]).name} at {root}, log in {self.log}")
        environment = {**os.environ, **{key: filled(value) for key, value in wanted.environment.items()}}
        # A session of its own: Ctrl-C is for zbench, which then stops the server in order.
        self._process = subprocess.Popen(
            [sys.executable, supervise.__file__, wanted.key_variable or "", str(self.log), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            self._wait(root, wanted)
        except BaseException:
            self.stop()
            raise

    def why_dead(self, patience: float = 0.0) -> str | None:
        """How the server ended, with the end of its log; None while it runs, after so many seconds still."""
        try:
            code = self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            return None
        tail = self.log.read_text(encoding="utf-8", errors="replace").split("\n")[-LOG_TAIL - 1 :]
        said = " | ".join(line.strip() for line in tail if line.strip())
        how = f"was killed by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
        return f"the server {how}; its log ends: {said}" if said else f"the server {how} and logged nothing"

    def stop(self) -> None:
        """Close the pipe, on which the supervisor ends the whole group."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=supervise.GRACE + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _wait(self, root: str, wanted: Wanted) -> None:
        end = time.monotonic() + wanted.startup
        while time.monotonic() < end:
            if why := self.why_dead():
                raise EndpointError(why)
            if _answers(root, wanted.health) == httpx.codes.OK:
                return
            time.sleep(POLL_SECONDS)
        raise EndpointError(f"the server was not healthy after {wanted.startup:g} s; its log is {self.log.name}")


def serve(wanted: Scenario, label: str | None, logs: Path, say: Callable[[str], None]) -> None:
    """Start the server of one engine of a scenario and wait until it ends. Raises UserError where there is none, or
    where it ends by itself."""
    from zbench.models import loading

    named = {engine.title: engine.options for engine in wanted.engines if engine.options.get("server")}
    if not named:
        raise UserError(f"scenario {wanted.name} starts no server: give an endpoint the key server")
    if label is None and len(named) > 1:
        raise UserError(f"scenario {wanted.name} has several servers; choose one with --engine: {', '.join(named)}")
    if label is not None and label not in named:
        raise UserError(f"no engine with a server is labelled {label!r}; there are {', '.join(named)}")
    options = named[label or next(iter(named))]
    needs_model = any("{model}" in word for word in options["server"]["command"])
    folder = loading.load(wanted.model_spec, wanted.dtype).path if needs_model else Path()
    servers = Servers(logs, say)
    try:
        server = servers.ensure(Wanted.of(options, folder))
        say(f"ready: {server.url} (Ctrl-C stops it)")
        while not (why := server.why_dead(patience=1.0)):
            pass
        raise UserError(why)
    except EndpointError as error:
        raise UserError(str(error)) from error
    finally:
        servers.stop()


def _program(name: str) -> str | None:
    """The path of a program: from PATH, or installed beside this Python."""
    name = str(expanded(name)) if name.startswith("~") else name
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _answers(root: str, health: str) -> int | None:
    """The status of the health check, /v1/models where the server does not know that path; None if nothing answers."""
    with httpx.Client(trust_env=False, timeout=5) as client:
        try:
            status = client.get(root + health).status_code
            return client.get(f"{root}/v1/models").status_code if status == httpx.codes.NOT_FOUND else status
        except httpx.HTTPError:
            return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _new_file(folder: Path, stem: str) -> Path:
    """A log per start: a resumed run keeps the earlier ones."""
    for number in range(1, 10_000):
        path = folder / f"{stem}-{number}.log"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        return path
    raise UserError(f"{folder} holds too many server logs")
