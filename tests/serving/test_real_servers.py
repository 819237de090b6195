"""Against servers that people run, with the default model: the same tokens as our own engine, sane times, and a run
that survives the death of its server."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from zbench import metrics, run, scenario
from zbench.hardware import environment, roofs
from zbench.models import zoo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(zoo.path("smollm2-135m") is None, reason="smollm2-135m is not on this machine"),
]
QUIET = Console(quiet=True)
NEEDED = ("fastapi", "uvicorn", "openai", "accelerate")
PROMPTS, TOKENS = 3, 12


@pytest.fixture(autouse=True)
def _only_tokens_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "load_or_measure", lambda *_, **__: None)
    monkeypatch.setattr(environment, "differences", lambda *_: [])


def wanted(tmp_path: Path, command: list[str], dtype: str, send: str) -> scenario.Scenario:
    words = ", ".join(f"'{word}'" for word in command)
    path = tmp_path / "scenario.yaml"
    path.write_text(
        f"""
name: real
model: smollm2-135m
dtype: {dtype}
device: cpu
engines:
  - autoregressive
  - {{name: endpoint, label: S, send: {send}, server: {{command: [{words}], startup: 600}}}}
prompts: {{set: quickstart, limit: {PROMPTS}}}
output_tokens: {TOKENS}
repeats: 1
warmup: {{prompts: 1, output_tokens: 2}}
"""
    )
    return scenario.load(path)


def outputs(folder: Path, label: str) -> dict[str, tuple[int, ...]]:
    cell = next(cell for cell in metrics.load_run(folder).cells if cell.record.label == label)
    return {r.prompt_id: r.output_ids for trial in cell.trials for r in trial.requests}


def transformers_serve() -> list[str]:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"transformers serve needs {', '.join(missing)}")
    program = Path(sys.executable).parent / "transformers"
    return [str(program), "serve", "{model}", "--port", "{port}", "--dtype", "float32", "--device", "cpu"]


def test_transformers_serve_says_what_we_say_dies_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = wanted(tmp_path, transformers_serve(), "float32", "text")
    whole, seen, killers = run.measure, 0, []

    def kill_in_the_second(point: Any, trial: Any, engine: Any, *rest: Any) -> Any:
        nonlocal seen
        seen += trial.cell.engine == "endpoint"
        if trial.cell.engine == "endpoint" and seen == 2:
            (server,) = psutil.Process(engine.server._process.pid).children()
            killers.append(threading.Timer(0.2, server.kill))
            killers[0].start()
        return whole(point, trial, engine, *rest)

    monkeypatch.setattr(run, "measure", kill_in_the_second)
    outcome = run.run(asked, tmp_path / "runs", QUIET)
    killers[0].join()
    assert outcome.failed == PROMPTS - 1 and outcome.finished == PROMPTS + 1
    cell = next(cell for cell in metrics.load_run(outcome.folder).cells if cell.record.label == "S")
    assert all("the server was killed by signal 9" in (trial.error or "") for trial in cell.failed)

    monkeypatch.setattr(run, "measure", whole)
    outcome = run.run(asked, tmp_path / "runs", QUIET, resume=outcome.folder)
    assert (outcome.failed, outcome.finished) == (0, 2 * PROMPTS)
    assert outputs(outcome.folder, "S") == outputs(outcome.folder, "autoregressive")
    cell = next(cell for cell in metrics.load_run(outcome.folder).cells if cell.record.label == "S")

    def value(name: str, part: str = "") -> Any:
        return metrics.evaluate(metrics.METRICS[name], cell)[part].value

    assert value("lossless") == value("agreement", "prompts") == 1
    assert value("token_count_difference", "prompt") == value("token_count_difference", "output") == 0
    assert 0.5 < value("tokens_per_chunk") <= 2
    assert 0 < value("served_ttft", "p50") < value("request_latency", "p50")
    assert value("client_queue") == 0 and value("client_share") < 0.5
    assert value("server_acceptance_length") is None
    for trial in cell.trials:
        for request in trial.requests:
            times = request.served.chunk_seconds  # type: ignore[union-attr]
            assert times[0] == request.ttft_seconds and times[-1] == request.end_seconds <= trial.wall_seconds


def llama_server() -> list[str]:
    """LLAMA_SERVER: the command without model and port; LLAMA_GGUF: the default model in bfloat16."""
    gguf = os.environ.get("LLAMA_GGUF")
    if not gguf:
        pytest.skip("LLAMA_GGUF names no model for llama.cpp's server")
    if given := os.environ.get("LLAMA_SERVER"):
        command = shlex.split(given)
    elif found := shutil.which("llama-server"):
        command = [found]
    elif importlib.util.find_spec("llama_cpp"):
        command = [sys.executable, "-m", "llama_cpp.server"]
    else:
        pytest.skip("neither llama-server nor llama-cpp-python is installed")
    return [*command, "--model", gguf, "--port", "{port}"]


def takes_ids(command: list[str]) -> bool:
    return "llama_cpp.server" not in command


def test_llama_cpps_server_says_what_the_target_picks_within_rounding(tmp_path: Path) -> None:
    command = llama_server()
    asked = wanted(tmp_path, command, "bfloat16", "tokens" if takes_ids(command) else "text")
    outcome = run.run(asked, tmp_path / "runs", QUIET)
    assert outcome.failed == 0
    cell = next(cell for cell in metrics.load_run(outcome.folder).cells if cell.record.label == "S")
    requests = [request for trial in cell.trials for request in trial.requests]
    assert all(request.tokens in (TOKENS, len(request.output_ids)) for request in requests)
    assert all(r.served and r.served.prompt_tokens in (None, r.prompt_tokens) for r in requests)
    checked = [request.check for request in requests if request.check]
    assert checked and all(check.verdict != "different" for check in checked)
