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
import torch
from rich.console import Console

from zbench import metrics, run, scenario
from zbench.hardware import environment, roofs
from zbench.models import loading, zoo
from zbench.models.gguf import gguf_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(zoo.path("smollm2-135m") is None, reason="smollm2-135m is not on this machine"),
]
QUIET = Console(quiet=True)
NEEDED = ("fastapi", "uvicorn", "openai", "accelerate")
LLAMA_NEEDS = ("fastapi", "uvicorn", "pydantic_settings", "sse_starlette", "starlette_context")
PROMPTS, TOKENS = 3, 12


@pytest.fixture(autouse=True)
def _only_tokens_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "load_or_measure", lambda *_, **__: None)
    monkeypatch.setattr(environment, "differences", lambda *_: [])


def wanted(tmp_path: Path, command: list[str], dtype: str, send: str, more: str = "") -> scenario.Scenario:
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
  - {{name: endpoint, label: S, send: {send}, server: {{command: [{words}], startup: 600}}{more}}}
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


def llama_server(dtype: str) -> list[str]:
    """llama.cpp's own server where LLAMA_SERVER names one or it is on the path, else that of llama-cpp-python."""
    weights = ["--model", str(gguf_file(loading.load("smollm2-135m", dtype), getattr(torch, dtype)))]
    if found := os.environ.get("LLAMA_SERVER") or shutil.which("llama-server"):
        kind = {"float32": "f32", "bfloat16": "f16"}[dtype]
        return [*shlex.split(found), *weights, "--port", "{port}", "--cache-type-k", kind, "--cache-type-v", kind]
    if missing := [name for name in ("llama_cpp", *LLAMA_NEEDS) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"no llama-server, and llama-cpp-python's server needs {', '.join(missing)}")
    kind = {"float32": "0", "bfloat16": "1"}[dtype]  # ggml's numbers of float32 and float16
    command = [sys.executable, "-m", "llama_cpp.server", *weights, "--port", "{port}"]
    return [*command, "--type_k", kind, "--type_v", kind, "--n_ctx", "512", "--n_threads", str(torch.get_num_threads())]


def test_llama_cpps_server_says_what_we_say(tmp_path: Path) -> None:
    command = llama_server("float32")
    ids = "llama_cpp.server" not in command
    # The prompts are all different: there is no cache to measure, and outputs are to be compared.
    asked = wanted(tmp_path, command, "float32", "tokens" if ids else "text", ", prefix_cache: keep")
    outcome = run.run(asked, tmp_path / "runs", QUIET)
    assert (outcome.failed, outcome.finished) == (0, 2 * PROMPTS)
    assert outputs(outcome.folder, "S") == outputs(outcome.folder, "autoregressive")
    cell = next(cell for cell in metrics.load_run(outcome.folder).cells if cell.record.label == "S")

    def value(name: str, part: str = "") -> Any:
        return metrics.evaluate(metrics.METRICS[name], cell)[part].value

    assert value("lossless") == value("agreement", "prompts") == 1
    assert value("token_count_difference", "output") in (0, None), "llama-cpp-python does not count when it streams"
    assert 0.5 < value("tokens_per_chunk") <= 2
    assert 0 < value("served_ttft", "p50") < value("request_latency", "p50")
    assert value("server_acceptance_length") is None
    for trial in cell.trials:
        assert trial.server and trial.server.kind == ("llama.cpp" if ids else "llama-cpp-python")
        for request in trial.requests:
            times = request.served.chunk_seconds  # type: ignore[union-attr]
            assert list(times) == sorted(times) and times[-1] == request.end_seconds <= trial.wall_seconds
