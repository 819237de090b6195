"""Servers that a run starts: healthy before they are used, logged without the key, and gone whatever ends the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from zbench.errors import UserError
from zbench.serving import supervise
from zbench.serving.client import EndpointError
from zbench.serving.process import Servers, Wanted

ROOT = Path(__file__).parents[2]
SERVER = (sys.executable, "-m", "tests.serving.server", "{port}")


def wanted(command: tuple[str, ...] = SERVER, **changed: Any) -> Wanted:
    settings: dict[str, Any] = {"health": "/health", "startup": 30, "environment": {"PYTHONPATH": str(ROOT)}}
    return Wanted(command, **{**settings, "url": None, "model": "MODEL", **changed})


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    found = Servers(tmp_path, lambda line: None)
    yield found
    found.stop()


def gone(pids: list[int]) -> bool:
    """Whether all of these processes are soon gone."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_a_server_is_healthy_once_it_is_handed_out_and_gone_once_stopped(servers: Servers) -> None:
    server = servers.ensure(wanted())
    family = [p.pid for p in psutil.Process(server._process.pid).children(recursive=True)]
    assert family and server.why_dead() is None
    assert servers.ensure(wanted()) is server  # not started twice
    servers.stop()
    assert gone([server._process.pid, *family])


def test_another_server_takes_the_place_of_the_first(servers: Servers) -> None:
    first = servers.ensure(wanted())
    second = servers.ensure(wanted((*SERVER, "vllm")))
    assert second is not first and first.why_dead() and second.why_dead() is None


def test_what_the_server_started_goes_with_it_even_out_of_its_session(servers: Servers, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = (
        "import subprocess, sys, runpy\n"
        "child = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "sys.argv = ['server', sys.argv[1]]\nrunpy.run_module('tests.serving.server', run_name='__main__')"
    )
    servers.ensure(wanted((sys.executable, "-c", script, "{port}")))
    child = int(pid.read_text())
    assert psutil.pid_exists(child)
    servers.stop()
    assert gone([child])


def test_a_killed_run_takes_its_server_along(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom tests.serving.test_process import wanted\n"
        "from zbench.serving.process import Servers\n"
        f"server = Servers(Path({str(tmp_path)!r}), lambda line: None).ensure(wanted())\n"
        "print(server._process.pid, flush=True)\ntime.sleep(300)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert run.stdout is not None
    supervisor = psutil.Process(int(run.stdout.readline()))
    family = [supervisor.pid, *(p.pid for p in supervisor.children(recursive=True))]
    assert len(family) > 1
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert gone(family)


def test_a_server_that_ignores_the_request_to_stop_is_killed(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import signal, sys, runpy\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sys.argv = ['server', sys.argv[1]]\nrunpy.run_module('tests.serving.server', run_name='__main__')"
    )
    server = servers.ensure(wanted((sys.executable, "-c", script, "{port}")))
    family = [p.pid for p in psutil.Process(server._process.pid).children(recursive=True)]
    servers.stop()
    assert gone(family)


def test_a_server_that_dies_is_reported_with_the_end_of_its_log(servers: Servers) -> None:
    with pytest.raises(EndpointError, match=r"exit code 3; its log ends: no such model"):
        servers.ensure(wanted((sys.executable, "-c", "print('no such model'); raise SystemExit(3)", "{port}")))


def test_a_server_that_is_never_healthy_is_given_up(servers: Servers) -> None:
    with pytest.raises(EndpointError, match="not healthy after 1 s"):
        servers.ensure(wanted((sys.executable, "-c", "import time; time.sleep(60)", "{port}"), startup=1))


def test_nothing_is_started_where_something_answers_already(servers: Servers, tmp_path: Path) -> None:
    url = servers.ensure(wanted()).url
    others = Servers(tmp_path, lambda line: None)
    with pytest.raises(EndpointError, match="something answers"):
        others.ensure(wanted(url=url))


def test_the_key_is_kept_out_of_the_log(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", "sk-very-secret")
    script = "import os; print('my key is', os.environ['SERVER_KEY']); raise SystemExit(1)"
    with pytest.raises(EndpointError, match=r"my key is \*\*\*"):
        servers.ensure(wanted((sys.executable, "-c", script, "{port}"), key_variable="SERVER_KEY"))
    assert "secret" not in "".join(path.read_text() for path in servers.logs.iterdir())  # type: ignore[union-attr]


def test_a_log_that_cannot_be_written_is_dropped_and_the_server_goes_on() -> None:
    script = "for _ in range(10_000): print('x' * 100)"
    run = subprocess.Popen(
        [sys.executable, supervise.__file__, "", "/dev/full", sys.executable, "-c", script],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert run.wait(timeout=60) == 0
    finally:
        _, said = run.communicate()
    assert said == "/dev/full: No space left on device; output of the server is lost\n"


def test_a_program_that_is_not_here_or_a_folder_that_does_not_exist_is_a_users_error() -> None:
    server = {"command": ["no-such-program"], "health": "/health", "startup": 1.0, "environment": {}}
    options = {"server": server, "url": None, "api_key_env": None}
    with pytest.raises(UserError, match="no program 'no-such-program'"):
        Wanted.of(options, Path())
    server["command"] = [sys.executable, "{model}"]
    with pytest.raises(UserError, match="random weights"):
        Wanted.of(options, None)


def test_port_and_model_are_filled_in(servers: Servers) -> None:
    server = servers.ensure(wanted((*SERVER, "{model}")))
    assert server.command[-1] == "MODEL" and server.command[-2].isdigit()
    assert server.url == f"http://127.0.0.1:{server.command[-2]}/v1"
