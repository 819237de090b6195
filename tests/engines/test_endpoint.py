"""The engine `endpoint` in whole runs, against a server without a model: records, metrics, secrets, failure, resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from rich.console import Console

from zbench import compare, metrics, prompts, run, scenario
from zbench.engines import endpoint
from zbench.errors import UserError
from zbench.hardware import environment, roofs
from zbench.models import families
from zbench.models.tokenizer import byte_tokenizer
from zbench.report import render, vllm
from zbench.serving.client import Exchange, read_stream
from zbench.serving.process import free_port

ROOT = Path(__file__).parents[2]
KEY = "sk-very-secret"
SIZES = "layers: 2, width: 64, ffn: 96, heads: 4, kv_heads: 2, vocab: 300, max_positions: 256"
SHAPE = f"{{family: llama, {SIZES}, eos_ids: [2]}}"
START = f"command: [{sys.executable}, -m, tests.serving.server, '{{port}}'"
PATHS = f"environment: {{PYTHONPATH: {ROOT}}}"
SERVER = f"{{{START}], {PATHS}}}"
VLLM = f"{{{START}, vllm], {PATHS}}}"
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _no_measured_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = {"value": 1e12, "low": 1e12, "high": 1e12, "n": 1, "unit": "B/s"}
    made_up = {"bandwidth": {"read": rate}, "flops": {"float32": {**rate, "unit": "FLOP/s"}}, "ridge": {"float32": 1.0}}
    monkeypatch.setattr(roofs, "load_or_measure", lambda *_, **__: made_up)
    # How busy this machine is differs from one look to the next; resuming must not hang on it here.
    monkeypatch.setattr(environment, "differences", lambda *_: [])


@contextmanager
def served(owner: str) -> Iterator[str]:
    port = free_port()
    running = subprocess.Popen(
        [sys.executable, "-m", "tests.serving.server", str(port), owner], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert running.stdout and running.stdout.readline().strip() == "listening"
        yield f"http://127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait()


@pytest.fixture
def url() -> Iterator[str]:
    with served("me") as found:
        yield found


def wanted(tmp_path: Path, *endpoints: str, **changed: Any) -> scenario.Scenario:
    settings = {"output_tokens": 6, "repeats": 2, "batch": 1, "lossless_check": "true", **changed}
    lines = [f"{key}: {value}" for key, value in settings.items()]
    engines = ["autoregressive", *(f"{{name: endpoint, {endpoint}}}" for endpoint in endpoints)]
    text = f"""
name: served
model: {{config: {SHAPE}, weights: random}}
dtype: float32
device: cpu
engines:
{"".join(f"  - {engine}" + chr(10) for engine in engines)}
prompts: {{set: quickstart, limit: 3}}
context: 24
warmup: {{prompts: 1, output_tokens: 2}}
{chr(10).join(lines)}
"""
    path = tmp_path / "scenario.yaml"
    path.write_text(text)
    return scenario.load(path)


def measured(found: run.Outcome, label: str) -> metrics.Cell:
    return next(cell for cell in metrics.load_run(found.folder).cells if cell.record.label == label)


def value(cell: metrics.Cell, name: str, part: str = "") -> Any:
    return metrics.evaluate(metrics.METRICS[name], cell)[part]


def test_a_server_stands_beside_an_engine_in_one_run(tmp_path: Path) -> None:
    asked = wanted(tmp_path, f"label: S, server: {SERVER}, limits: {{latency: 600}}", batch=3)
    outcome = run.run(asked, tmp_path / "runs", QUIET)
    assert (outcome.planned, outcome.finished, outcome.failed) == (4, 4, 0)
    cell = measured(outcome, "S")
    request = cell.trials[0].requests[0]
    assert request.text == "abcdef" and request.tokens == 6 and request.finish == "length"
    assert request.served and request.served.prompt_tokens == request.prompt_tokens
    assert 0 < request.ttft_seconds < request.end_seconds == request.served.chunk_seconds[-1]
    assert cell.trials[0].steps == () and (cell.trials[0].kernels or {})["prefix cache"] == "unique"
    assert value(cell, "tokens_per_chunk").value == 1
    assert value(cell, "client_queue").value == 0
    assert value(cell, "token_count_difference", "prompt").value == 0
    assert value(cell, "token_count_difference", "output").value == 0
    assert value(cell, "goodput").value == value(cell, "request_throughput").value > 0
    assert value(cell, "server_acceptance_length").note == "unavailable: not reported by the server"
    assert "prefix of its own" in value(cell, "agreement").note
    assert value(cell, "speedup").value > 0
    assert value(measured(outcome, "autoregressive"), "client_share").note == "unavailable: not a server"
    for share, said in ((0.01, ""), (0.1, "keep up with 10 times this rate"), (0.6, "may be what limits")):
        trials = [replace(t, server=replace(t.server, client_cpu_seconds=share * t.wall_seconds)) for t in cell.trials]  # type: ignore[type-var]
        note = value(replace(cell, trials=tuple(trials)), "client_share").note
        assert said in note and ("client" in note) == bool(said)
    assert (outcome.folder / f"server-{Path(sys.executable).name}-1.log").read_text().strip() == "listening"


@pytest.mark.parametrize(
    ("texts", "reason", "counted", "times"),
    [
        ("abc", "stop", 4, (1.0, 2.0, 3.0, 4.0)),
        ("abc", "stop", 3, (1.0, 2.0, 3.0)),
        ("abc", "length", 3, (1.0, 2.0, 3.0)),
        ("a", "stop", 2, (1.0, 2.0)),
        (["abc"], "stop", 4, (1.0,)),
    ],
)
def test_a_token_that_ends_a_text_and_is_counted_has_its_time(
    texts: Sequence[str], reason: str, counted: int, times: tuple[float, ...]
) -> None:
    """No text shows it, the reason of the end does: three tokens after the first one took 3 s, not 2. What came in one
    piece stays without times: three tokens did not take what the end took."""
    said = [{"text": text, "finish_reason": None} for text in texts] + [{"text": "", "finish_reason": reason}]
    events = [(float(at), {"choices": [choice]}) for at, choice in enumerate(said, start=1)]
    events.append((4.5, {"choices": [], "usage": {"completion_tokens": counted}}))
    answer = read_stream((at, f"data: {json.dumps(event)}\n\n".encode()) for at, event in events)
    words = SimpleNamespace(encode=lambda text, **_: list(map(ord, text)))
    engine: Any = SimpleNamespace(tokenizer=words, config=SimpleNamespace(eos_ids=(0,)))
    finish = "eos" if reason == "stop" else "length"
    ids, served = endpoint.Endpoint._record(engine, Exchange(), answer, finish)  # type: ignore[arg-type]
    assert len(ids) == counted and served.chunk_seconds == times


def test_vllm_is_known_reset_before_every_trial_and_read_by_difference(tmp_path: Path) -> None:
    asked = wanted(tmp_path, f"label: S, server: {VLLM}")
    outcome = run.run(asked, tmp_path / "runs", QUIET)
    cell = measured(outcome, "S")
    server = cell.trials[0].server
    assert server and server.kind == "vllm" and server.notes == ()
    assert (cell.trials[0].kernels or {})["prefix cache"] == "reset"
    # Every request adds 4 verify steps, 12 drafts and 6 accepted ones to counters that do not start at 0.
    assert server.speculation and (server.speculation.verifies, server.speculation.accepted) == (4, 6)
    assert value(cell, "server_acceptance_length").value == 2.5
    assert value(cell, "server_draft_acceptance_rate").value == 0.5
    assert "does not say at which position" in value(cell, "server_acceptance_at").note
    prompts_sent = {trial.requests[0].prompt_id: trial.requests[0].prompt_tokens for trial in cell.trials}
    assert set(prompts_sent.values()) == {24}  # nothing was put before them


def test_repeats_never_send_the_same_prompt_where_a_cache_cannot_be_reset(tmp_path: Path, url: str) -> None:
    asked = wanted(tmp_path, f"label: S, url: {url}")
    run.run(asked, tmp_path / "runs", QUIET)
    run.run(asked, tmp_path / "runs", QUIET)
    bodies = [each["body"] for each in httpx.get(f"{url}/seen").json()["bodies"]]
    assert len(bodies) == 2 * (1 + 6)
    starts = {tuple(body["prompt"][:14]) for body in bodies}
    assert len(starts) == len(bodies)
    assert all(body["stream_options"] == {"include_usage": True} and body["temperature"] == 0 for body in bodies)
    assert not any({"seed", "top_k", "ignore_eos", "return_token_ids"} & body.keys() for body in bodies)


def test_chat_sends_words_and_sampling_sends_seeds(tmp_path: Path, url: str) -> None:
    sampling = "{temperature: 0.7, top_p: 0.9, top_k: 5}"
    asked = wanted(
        tmp_path, f"label: S, url: {url}, api: chat, prefix_cache: keep", sampling=sampling, ignore_eos="true"
    )
    outcome = run.run(asked, tmp_path / "runs", QUIET)
    assert outcome.failed == 0
    bodies = [each["body"] for each in httpx.get(f"{url}/seen").json()["bodies"]][1:]
    assert {body["messages"][0]["role"] for body in bodies} == {"user"}
    assert all((b["temperature"], b["top_p"], b["top_k"], b["ignore_eos"]) == (0.7, 0.9, 5, True) for b in bodies)
    assert len({body["seed"] for body in bodies}) == 6  # one for each prompt and repeat


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_vllms_diffusion_models_are_left_their_own_schedule(tmp_path: Path, temperature: float) -> None:
    """vLLM 0.32 answers 400 to a temperature or a seed for such a model."""
    with served("vllm-diffusion") as url:
        asked = wanted(tmp_path, f"label: S, url: {url}", sampling=f"{{temperature: {temperature}}}")
        cell = measured(run.run(asked, tmp_path / "runs", QUIET), "S")
    assert not cell.failed
    assert value(cell, "server_diffusion_committed_per_step").value == 16 / 5
    assert value(cell, "server_diffusion_positions_per_step").value == 16
    server = cell.trials[0].server
    assert server and server.speculation is None and "the server's schedule" in server.notes[0]


def test_texts_that_go_on_after_their_end_are_asked_for_with_what_marks_it(tmp_path: Path) -> None:
    """Without its special tokens a text has fewer tokens than the server counts (seen with vLLM 0.32)."""
    fields = {}
    for ignore in ("true", "false"):
        with served("vllm") as url:
            asked = wanted(tmp_path, f"label: S, url: {url}", ignore_eos=ignore)
            run.run(asked, tmp_path / "runs", QUIET)
            body = httpx.get(f"{url}/seen").json()["bodies"][-1]["body"]
            fields[ignore] = (body.get("ignore_eos"), body.get("skip_special_tokens"))
    assert fields == {"true": (True, False), "false": (None, None)}


@pytest.mark.parametrize("repeats", ["refuses", "errs"])
def test_the_key_goes_to_the_server_and_nowhere_else(
    tmp_path: Path, url: str, repeats: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = wanted(tmp_path, f"label: S, url: {url}, served_model: {repeats}, api_key_env: SERVED_KEY")
    monkeypatch.delenv("SERVED_KEY", raising=False)
    with pytest.raises(UserError, match="the environment has no SERVED_KEY"):
        run.run(asked, tmp_path / "runs", QUIET)
    monkeypatch.setenv("SERVED_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(UserError, match="SERVED_KEY holds a line end") as refused:
        run.run(asked, tmp_path / "runs", QUIET)
    assert KEY not in str(refused.value)
    monkeypatch.setenv("SERVED_KEY", f" {KEY}\n")  # as files of secrets end
    outcome = run.run(asked, tmp_path / "runs", QUIET)
    assert outcome.failed == 6  # each says what the server said
    assert httpx.get(f"{url}/seen").json()["bodies"][0]["headers"]["authorization"] == f"Bearer {KEY}"
    written = "".join(path.read_text() for path in outcome.folder.rglob("*") if path.is_file())
    assert "Bearer ***" in written and KEY not in written


def test_tokens_are_the_servers_count_and_a_difference_is_told(tmp_path: Path, url: str) -> None:
    outcome = run.run(wanted(tmp_path, f"label: S, url: {url}, served_model: miscounts"), tmp_path / "runs", QUIET)
    cell = measured(outcome, "S")
    request = cell.trials[0].requests[0]
    assert request.tokens == 7 and len(request.output_ids) == 6
    assert request.check is None  # ids that may be others than those emitted are not judged
    difference = value(cell, "token_count_difference", "output")
    assert difference.value == 1 and "6 of 6 requests are counted differently" in difference.note


@pytest.mark.parametrize(
    ("usage", "said"),
    [
        ('{"completion_tokens": "6"}', "the server's usage has completion_tokens '6', which counts nothing"),
        ('{"completion_tokens": true}', "completion_tokens True, which counts nothing"),
        ('{"completion_tokens": -5}', "completion_tokens -5, which counts nothing"),
        ('{"completion_tokens": 31.5}', "completion_tokens 31.5, which counts nothing"),
        ('{"prompt_tokens": "3"}', "prompt_tokens '3', which counts nothing"),
        ('{"completion_tokens": 0}', "counts no completion tokens beside a text"),
    ],
)
def test_a_usage_that_counts_nothing_makes_its_trial_an_error(tmp_path: Path, url: str, usage: str, said: str) -> None:
    model = json.dumps(f"usage {usage}")
    outcome = run.run(
        wanted(tmp_path, f"label: S, url: {url}, served_model: {model}", repeats=1), tmp_path / "runs", QUIET
    )
    failed = measured(outcome, "S").failed
    assert failed and all(said in (trial.error or "") for trial in failed)


def test_responses_that_come_in_one_piece_have_no_time_per_token_and_spoil_nothing_else(
    tmp_path: Path, url: str
) -> None:
    limited = f"label: S, url: {url}, served_model: whole, limits: {{tpot: 1}}"
    outcome = run.run(wanted(tmp_path, limited), tmp_path / "runs", QUIET)
    found = metrics.load_run(outcome.folder)
    cell = measured(outcome, "S")
    for name in ("tpot", "decode_tps", "speedup", "goodput"):
        assert value(cell, name).value is None and "came in one piece" in value(cell, name).note
    assert value(cell, "throughput").value > 0
    assert render(outcome.folder).exists()
    exported = [json.loads(path.read_text()) for path in vllm.export(found.path, tmp_path / "vllm", False)]
    assert [one["request_goodput"] for one in exported if one["mean_tpot_ms"] is None] == [None]
    again = shutil.copytree(found.path, tmp_path / "again")
    sides = compare.compare([found.path, again])
    assert "came in one piece" in sides.ratio(sides.sides[1], cell.record.id).note


@pytest.mark.parametrize("listed", [b"<html>", b"[]", b'{"data": null}', b"{}"])
def test_a_list_of_models_that_is_none_is_no_list(listed: bytes) -> None:
    assert endpoint._models(httpx.Response(200, content=listed)) is None
    assert endpoint._models(httpx.Response(200, content=b'{"data": [3, {"id": "m"}]}')) == [{"id": "m"}]


def test_one_request_that_fails_makes_its_trial_an_error(tmp_path: Path, url: str) -> None:
    outcome = run.run(
        wanted(tmp_path, f"label: S, url: {url}, served_model: breaks", repeats=1, batch=3), tmp_path / "runs", QUIET
    )
    (trial,) = measured(outcome, "S").failed
    assert trial.error and trial.error.startswith("EndpointError: 3 of 3 requests failed") and not trial.requests


def test_a_server_killed_midway_gives_error_rows_and_the_run_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = wanted(tmp_path, f"label: S, server: {SERVER}")
    whole, seen = run.measure, 0

    def kill_after_two(point: Any, trial: Any, engine: Any, *rest: Any) -> Any:
        nonlocal seen
        record = whole(point, trial, engine, *rest)
        seen += trial.cell.engine == "endpoint"
        if seen == 2 and trial.cell.engine == "endpoint":
            supervisor = engine.server._process.pid
            for child in psutil.Process(supervisor).children():
                os.kill(child.pid, signal.SIGKILL)
            engine.server._process.wait(timeout=30)
        return record

    monkeypatch.setattr(run, "measure", kill_after_two)
    outcome = run.run(asked, tmp_path / "runs", QUIET)
    failed = measured(outcome, "S").failed
    assert len(failed) == outcome.failed == 4
    assert all("the server was killed by signal 9" in (trial.error or "") for trial in failed)
    assert outcome.finished == 12 - 4
    monkeypatch.setattr(run, "measure", whole)
    again = run.run(asked, tmp_path / "runs", QUIET, resume=outcome.folder)
    assert (again.finished, again.failed) == (12, 0)
    assert not measured(again, "S").failed


def test_servers_of_different_commands_take_turns_and_are_never_up_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = wanted(tmp_path, f"label: A, server: {SERVER}", f"label: B, server: {VLLM}")
    order = [trial.cell.label for _, trials in run.plan(run.prepare(asked, lambda _: None)) for trial in trials]
    assert order == ["autoregressive"] * 3 + ["A"] * 3 + ["B"] * 6 + ["A"] * 3 + ["autoregressive"] * 3
    outcome = run.run(asked, tmp_path / "runs", QUIET)
    assert (outcome.finished, outcome.failed) == (18, 0)
    logs = sorted(path.name for path in outcome.folder.glob("server-*.log"))
    assert len(logs) == 3  # A, B, A: B stays up from one repeat to the next


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("label: S", "give url, or server"),
        ("url: 'http://user:pass@host/v1'", "expected text that matches"),
        ("url: 'http://host/v1?key=1'", "expected text that matches"),
        ("url: 'http://127.0.0.1:{port}x/v1', server: {command: [x]}", "url: no server has this address: Invalid port"),
        ("url: 'http://[::1/v1'", "url: no server has this address: Invalid port"),
        ("url: 'http://a..b/v1'", "url: no server has this address"),
        ("url: 'http://host:99999/v1'", "url: no server has port 99999; ports are 1 to 65535"),
        ("server: {command: [x, '{port}', \"a\\0\"]}", "server.command[2]: expected text that matches"),
        ("server: {command: [x, '{port}'], environment: {A=B: x}}", "environment.A=B"),
        ("server: {command: [x, '{port}'], environment: {A: \"\\0\"}}", "environment.A: expected text that matches"),
        ("server: {command: [x, '{port}'], health: \"/\\0\"}", "server.health: expected text that matches"),
        ("server: {command: [x]}", "has no {port}"),
        ("server: {command: [x, '{port}', --api-key, abc]}", "set it in the environment"),
        ("server: {command: [x, '{port}'], environment: {HF_TOKEN: abc}}", "set it in the environment"),
        ("url: 'http://h', extra: {api_key: abc}", "use api_key_env"),
        ("url: 'http://h', extra: {max_tokens: 3}", "is set by the scenario itself"),
        ("url: 'http://h', load: {arrivals: constant, concurrency: 2}", "does nothing without rate"),
        ("url: 'http://h', load: {}", "give concurrency, rate or both"),
        ("url: 'http://h', limits: {}", "give ttft, tpot or latency"),
        ("url: 'http://h', api: chat, send: text", "send is for api: completions"),
    ],
)
def test_bad_endpoints_are_refused_with_one_line(tmp_path: Path, endpoint: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        wanted(tmp_path, endpoint)
    assert said in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_a_marked_prompt_keeps_its_template_and_gives_its_words_back() -> None:
    config = families.from_fields(
        {"family": "llama", "layers": 1, "width": 8, "ffn": 8, "heads": 1, "vocab": 300, "max_positions": 64}
    )
    tokenizer = byte_tokenizer(config)
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}</s>"
    (ids,) = prompts.encode([prompts.Prompt("p", "c", ("What?",))], tokenizer, None)
    assert prompts.user_text(ids, tokenizer) == "What?"
    marked = prompts.marked(ids, tokenizer, "[1] ")
    assert tokenizer.decode(marked) == "<s>[1] What?</s>"
    assert prompts.user_text(marked, tokenizer) == "[1] What?"
    with pytest.raises(UserError, match="cut within its chat template"):
        prompts.user_text(ids[1:], tokenizer)
