"""The result files of other tools: which tool wrote one, what it reports, and what its figures are.

Each tool has its definitions and its reader, written from its sources (docs/import.md names the versions). A new tool
is one more of both and a line in `_TOOLS`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zbench.errors import UserError
from zbench.imported import Figure, Reported

Data = Mapping[str, Any]
Results = tuple[str, list[Reported]]  # the tool's version, "" where the file does not say, and what it reports


class Refused(Exception):
    """Why a file is not taken; completes "FILE: "."""


@dataclass(frozen=True, slots=True)
class _Tool:
    name: str
    keys: frozenset[str]  # that every object of its files has
    read: Callable[[Sequence[Data]], Results]
    definitions: Mapping[str, str]  # quantity -> what the tool's figure is, and where it differs from zbench's


def objects(path: Path, content: bytes) -> list[Data]:
    """The JSON objects of a file: one, a list of them, or one per line. Raises UserError in one line."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; give the JSON that the tool wrote") from None
    try:
        found = _parsed(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno} is not JSON; the file is cut, or of another kind") from None
    except ValueError:  # of thousands of digits
        raise UserError(f"{path}: holds a number that is too long to be a result") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deep to be a result") from None
    if not found or not all(isinstance(one, dict) for one in found):
        raise UserError(f"{path}: holds no results; give the JSON or JSONL that the tool wrote")
    return found


def _parsed(text: str) -> list[Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        if len(lines) < 2 or not all(line.lstrip().startswith("{") for _, line in lines):
            raise
        return [_line(number, line) for number, line in lines]
    return found if isinstance(found, list) else [found]


def _line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        error.lineno = number
        raise


def recognised(found: Sequence[Data]) -> tuple[str, str, list[Reported]]:
    """(tool, its version, results) of a file's objects. Raises Refused."""
    for tool in _TOOLS:
        if all(tool.keys <= one.keys() for one in found):
            return (tool.name, *tool.read(found))
    if any("input_sequence_throughput" in one for one in found):
        raise Refused("a vLLM benchmark of embeddings, in which nothing is decoded")
    known = ", ".join(tool.name for tool in _TOOLS)
    raise Refused(f"of no tool that zbench knows, or only a part of its result ({known})")


def definition(tool: str, quantity: str) -> str:
    """What a tool's figure is, and where it differs from zbench's."""
    return f"{tool}: {next(known for known in _TOOLS if known.name == tool).definitions[quantity]}"


# --- What several tools mean alike ---

_FIRST_CHUNK = "first chunk - request sent: waiting at the client for a place is left out, zbench counts it"
_PER_REQUEST = (
    "(end - first chunk) / (output tokens - 1) of each request, then over requests: long and short answers count alike,"
    " in zbench every token does"
)
_GAPS = (
    "gap between chunks, the gaps of all requests together; a chunk may hold several tokens, so that speculation makes"
    " it longer, not shorter"
)
_WALL = "output tokens of finished requests / duration of the whole benchmark, ramp-up and tail included"
_ALL = "prompt and output tokens / duration: mostly prompt where prompts are long, never a decode speed"
_REQUESTS = "finished requests / duration of the whole benchmark"
_LATENCY = "last chunk - request sent, without waiting at the client"

_MS, _PERCENT = 1e-3, 1e-2
_STATISTICS = {"mean": "mean", "median": "p50", "std": "std"}


def _number(of: Data, key: str) -> float | None:
    """A finite number; None where the tool says nothing. Raises Refused for what is no number, or below 0: none is."""
    value = of.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(f"{key} is {json.dumps(value)[:40]}, not a number")
    if value < 0:
        raise Refused(f"{key} is {json.dumps(value)[:40]}: no time, count or rate is below 0")
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        raise Refused(f"{key} is beyond any number that was measured") from None


def _inner(of: Data, key: str) -> Data:
    """A mapping within another; an empty one where there is none."""
    found = of.get(key)
    return found if isinstance(found, dict) else {}


def _spread(of: Data, names: Mapping[str, str], quantity: str, scale: float, key: str) -> list[Figure]:
    """One figure for each statistic that a summary has; `names` maps its keys to statistics."""
    values = {statistic: _number(of, name) for name, statistic in names.items()}
    return [Figure(quantity, name, value * scale, key) for name, value in values.items() if value is not None]


def _single(of: Data, key: str, quantity: str, scale: float = 1.0) -> list[Figure]:
    return _spread(of, {key: ""}, quantity, scale, key)


def _milliseconds(of: Data, names: Mapping[str, str]) -> list[Figure]:
    """`mean_NAME_ms`, `median_NAME_ms`, `std_NAME_ms`, `pN_NAME_ms`. Tools write 0 where they timed nothing."""
    found: dict[tuple[str, str], Figure] = {}
    for key in of:
        match = re.fullmatch(r"(mean|median|std|p\d+(?:\.\d+)?)_(\w+?)_ms", key)
        if match and match[2] in names and (value := _number(of, key)) is not None:
            quantity, statistic = names[match[2]], _STATISTICS.get(match[1], match[1])
            found.setdefault((quantity, statistic), Figure(quantity, statistic, value * _MS, key))
    timed = {figure.quantity for figure in found.values() if figure.statistic != "std" and figure.value > 0}
    return [figure for figure in found.values() if figure.quantity in timed]


def _settings(**values: Any) -> dict[str, str]:
    """What is known of a result's circumstances, as text."""
    return {name.replace("_", " "): _text(value) for name, value in values.items() if value not in (None, "", [])}


def _text(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _load(concurrency: Any, rate: Any) -> str:
    """'concurrency 8, 4 requests/s'; an infinite rate sends all requests at once."""
    said = [f"concurrency {_text(concurrency)}"] if concurrency else []
    if rate not in (None, "inf", math.inf):
        said.append(f"{_text(rate)} requests/s")
    return ", ".join(said) or "all at once"


def _failed(count: float | None) -> tuple[str, ...]:
    return (f"{count:g} requests failed and are in no figure",) if count else ()


# --- vLLM ---

_SERVE = {
    "ttft": _FIRST_CHUNK,
    "tpot": f"TPOT: {_PER_REQUEST}",
    "inter_chunk": f"ITL: {_GAPS}",
    "output_throughput": _WALL,
    "total_throughput": _ALL,
    "request_throughput": _REQUESTS,
    "request_latency": f"E2EL: {_LATENCY}",
    "acceptance_length": (
        "1 + accepted / drafts from the server's counters by difference over the benchmark, as zbench's; what others"
        " asked of the server meanwhile is in it"
    ),
    "acceptance_rate": "accepted / proposed draft tokens, by difference; the file has per cent",
}
_LATENCY_BENCH = {
    "request_latency": (
        "one whole batch of random prompts, offline, sampled at temperature 1 to a fixed length, prefill included; over"
        " iterations, not over requests"
    )
}
_THROUGHPUT_BENCH = {
    "total_throughput": f"offline, all requests at once; {_ALL}",
    "request_throughput": "requests / seconds of one offline call with all of them",
}


def _vllm_serve(found: Sequence[Data]) -> Results:
    names = {"ttft": "ttft", "tpot": "tpot", "itl": "inter_chunk", "e2el": "request_latency"}
    results = []
    for one in found:
        completed = _number(one, "completed")
        figures = (
            *_milliseconds(one, names),
            *_single(one, "output_throughput", "output_throughput"),
            *_single(one, "total_token_throughput", "total_throughput"),
            *_single(one, "request_throughput", "request_throughput"),
            *_single(one, "spec_decode_acceptance_length", "acceptance_length"),
            *_single(one, "spec_decode_acceptance_rate", "acceptance_rate", _PERCENT),
        )
        conversations = one.get("mode") == "multi_turn"
        load = _load(one.get("multi_turn_concurrency" if conversations else "max_concurrency"), one.get("request_rate"))
        settings = _settings(
            model=one.get("model_id"),
            backend=one.get("backend"),
            load=load,
            requests=completed,
            output_tokens=_number(one, "total_output_tokens"),
            measured=one.get("date"),
        )
        turns = ["turns of conversations: a prompt holds what went before"] if conversations else []
        notes = (*turns, *_failed(_number(one, "failed")))
        results.append(Reported(str(one.get("label") or load), settings, figures if completed else (), notes))
    return "", results


def _vllm_latency(found: Sequence[Data]) -> Results:
    results = []
    for one in found:
        means = _spread(one, {"avg_latency": "mean", "std_latency": "std"}, "request_latency", 1.0, "avg_latency")
        percentiles = _inner(one, "percentiles")
        if odd := [p for p in percentiles if not re.fullmatch(r"(\d\d?|100)(\.\d+)?", p)]:
            raise Refused(f"percentiles has {json.dumps(odd[0])[:40]}, not a percentile")
        tail = _spread(percentiles, {p: f"p{p}" for p in percentiles}, "request_latency", 1.0, "percentiles")
        latencies = one.get("latencies")
        settings = _settings(iterations=len(latencies) if isinstance(latencies, list) else None)
        results.append(Reported("latency of a batch", settings, (*means, *tail)))
    return "", results


def _vllm_throughput(found: Sequence[Data]) -> Results:
    return "", [
        Reported(
            "offline throughput",
            _settings(requests=_number(one, "num_requests"), seconds=_number(one, "elapsed_time")),
            (
                *_single(one, "tokens_per_second", "total_throughput"),
                *_single(one, "requests_per_second", "request_throughput"),
            ),
        )
        for one in found
    ]


# --- SGLang ---

_SGLANG = {
    "ttft": _FIRST_CHUNK,
    "tpot": f"TPOT: {_PER_REQUEST}",
    "inter_chunk": (
        "ITL: with backend sglang the gap before a chunk / its tokens, once for each of them, so a time per token; with"
        " an OpenAI backend the release decides"
    ),
    "output_throughput": _WALL,
    "prompt_throughput": "prompt tokens / duration of the whole benchmark, not of prefill",
    "total_throughput": _ALL,
    "request_throughput": _REQUESTS,
    "request_latency": _LATENCY,
    "acceptance_length": (
        "avg_spec_accept_length of the server's state after the benchmark: its mean since it started, warm-up and"
        " earlier work included; zbench takes the difference over each trial"
    ),
}


def _sglang(found: Sequence[Data]) -> Results:
    names = {"ttft": "ttft", "tpot": "tpot", "itl": "inter_chunk", "e2e_latency": "request_latency"}
    results = []
    for one in found:
        server = _inner(one, "server_info")
        completed = _number(one, "completed")
        figures = (
            *_milliseconds(one, names),
            *_single(one, "output_throughput", "output_throughput"),
            *_single(one, "input_throughput", "prompt_throughput"),
            *_single(one, "total_throughput", "total_throughput"),
            *_single(one, "request_throughput", "request_throughput"),
            *_single(one, "accept_length", "acceptance_length"),
        )
        load = _load(one.get("max_concurrency"), one.get("request_rate"))
        settings = _settings(
            model=server.get("served_model_name") or server.get("model_path"),
            backend=one.get("backend"),
            prompts=one.get("dataset_name"),
            load=load,
            requests=completed,
            output_tokens=_number(one, "total_output_tokens"),
        )
        results.append(Reported(str(one.get("tag") or load), settings, figures if completed != 0 else ()))
    return str(_inner(found[0], "server_info").get("version") or ""), results


# --- GuideLLM ---

_GUIDELLM = {
    "ttft": "first token - request start of successful requests",
    "tpot": (
        "inter_token_latency_ms: (last - first token) / (output tokens - 1) of each request, weighted by its tokens:"
        " the mean is zbench's tpot; percentiles are of tokens that each have their request's mean"
    ),
    "tpot_with_first": (
        "time_per_output_token_ms: (last token - request start) / output tokens: prefill is in it, so it is not what"
        " the other tools call TPOT"
    ),
    "output_throughput": "mean over time of the rate between events, not tokens / duration",
    "prompt_throughput": "mean over time of the rate between events; a prompt counts when its first token comes",
    "total_throughput": "mean over time of the rate of prompt and output tokens, never a decode speed",
    "request_throughput": "mean over time of the rate of finished requests, not requests / duration",
    "request_latency": "request end - request start of successful requests",
}
# GuideLLM's name -> (quantity, factor to its unit, statistics). Percentiles of a rate between events say little.
_SUMMARY = {"mean": "mean", "std_dev": "std"}
_GUIDELLM_KEYS = {
    "time_to_first_token_ms": ("ttft", _MS, _SUMMARY),
    "inter_token_latency_ms": ("tpot", _MS, _SUMMARY),
    "time_per_output_token_ms": ("tpot_with_first", _MS, _SUMMARY),
    "request_latency": ("request_latency", 1.0, _SUMMARY),
    "output_tokens_per_second": ("output_throughput", 1.0, {"mean": "mean"}),
    "prompt_tokens_per_second": ("prompt_throughput", 1.0, {"mean": "mean"}),
    "tokens_per_second": ("total_throughput", 1.0, {"mean": "mean"}),
    "requests_per_second": ("request_throughput", 1.0, {"mean": "mean"}),
}
_TAIL = {p: p for p in ("p50", "p90", "p95", "p99")}


def _guidellm(found: Sequence[Data]) -> Results:
    report, *others = found
    benchmarks = report["benchmarks"]
    if (
        others
        or not isinstance(benchmarks, list)
        or not all(isinstance(b, dict) and b.get("metrics") for b in benchmarks)
    ):
        raise Refused("has benchmarks, but not as GuideLLM writes them")
    results = []
    for benchmark in benchmarks:
        metrics = _inner(benchmark, "metrics")
        figures = tuple(figure for key in _GUIDELLM_KEYS for figure in _guidellm_figures(metrics, key))
        strategy = _inner(_inner(benchmark, "config") or _inner(benchmark, "args"), "strategy")
        concurrency, rate = strategy.get("streams"), strategy.get("rate")
        load = _load(concurrency, rate) if concurrency or rate else str(strategy.get("type_") or "benchmark")
        totals = _inner(metrics, "request_totals")
        settings = _settings(
            model=_inner(report, "args").get("model"),
            load=load,
            requests=totals.get("successful"),
            measured=_day(_inner(benchmark, "scheduler_metrics").get("start_time", benchmark.get("start_time"))),
        )
        left = {name: _number(totals, name) for name in ("errored", "incomplete")}
        notes = tuple(f"{count:g} requests {name}, in no figure" for name, count in left.items() if count)
        results.append(Reported(load, settings, figures, notes))
    return str(_inner(report, "metadata").get("guidellm_version") or ""), results


def _guidellm_figures(metrics: Data, key: str) -> list[Figure]:
    """Of the successful requests. A summary of nothing is all zeros."""
    quantity, scale, names = _GUIDELLM_KEYS[key]
    found = _inner(_inner(metrics, key), "successful")
    if not found.get("count"):
        return []
    tail = _TAIL if names is _SUMMARY else {}
    return [
        *_spread(found, names, quantity, scale, key),
        *_spread(_inner(found, "percentiles"), tail, quantity, scale, key),
    ]


def _day(seconds: Any) -> str | None:
    try:
        return datetime.fromtimestamp(float(seconds), UTC).date().isoformat()
    except (TypeError, ValueError, OverflowError, OSError):
        return None


# --- AIPerf, and GenAI-Perf before it ---

_AIPERF = {
    "ttft": f"{_FIRST_CHUNK}; empty chunks are skipped",
    "tpot": f"inter_token_latency: {_PER_REQUEST}; reasoning tokens count",
    "inter_chunk": f"inter_chunk_latency: {_GAPS} (vLLM calls this ITL)",
    "decode_tps": (
        "1 / inter_token_latency of each request, then over requests: the mean of such rates lies above the rate of the"
        " mean time"
    ),
    "output_throughput": f"{_WALL}; tokens as the tool's own tokenizer counts the text",
    "total_throughput": _ALL,
    "request_throughput": _REQUESTS,
    "request_latency": _LATENCY,
}
_AIPERF_KEYS = {
    "time_to_first_token": "ttft",
    "inter_token_latency": "tpot",
    "inter_chunk_latency": "inter_chunk",
    "output_token_throughput_per_user": "decode_tps",
    "output_token_throughput": "output_throughput",
    "total_token_throughput": "total_throughput",
    "request_throughput": "request_throughput",
    "request_latency": "request_latency",
}
_UNITS = {
    "ms": _MS, "s": 1.0, "sec": 1.0, "us": 1e-6, "ns": 1e-9, "tokens/sec": 1.0, "tokens/s": 1.0,
    "tokens/sec/user": 1.0, "requests/sec": 1.0, "requests/s": 1.0,
}  # fmt: skip
_AVERAGE = {"avg": "mean", "std": "std", **_TAIL}


def _aiperf(found: Sequence[Data]) -> Results:
    results = []
    for one in found:
        figures = tuple(figure for key in _AIPERF_KEYS if key in one for figure in _aiperf_figures(one, key))
        asked = _inner(one, "input_config")
        concurrency, rate = (_last_named(asked.get("phases", asked), name) for name in ("concurrency", "request_rate"))
        models = asked.get("model_names") or asked.get("model")
        settings = _settings(
            model=_last_named(asked.get("models"), "name")
            or (", ".join(map(str, models)) if isinstance(models, list) else models),
            load=_load(concurrency, rate) if concurrency or rate else None,
            requests=_number(_inner(one, "request_count"), "avg"),
            measured=str(one.get("start_time") or "")[:10],
        )
        cancelled = ["the benchmark was cancelled"] if one.get("was_cancelled") else []
        notes = (*cancelled, *_failed(_number(_inner(one, "error_request_count"), "avg")))
        results.append(Reported(settings.get("load", "benchmark"), settings, figures, notes))
    return str(found[0].get("aiperf_version") or ""), results


def _aiperf_figures(one: Data, key: str) -> list[Figure]:
    summary, quantity = _inner(one, key), _AIPERF_KEYS[key]
    unit = summary.get("unit")
    if not isinstance(unit, str) or unit not in _UNITS:
        raise Refused(f"{key} has the unit {json.dumps(unit)}, which zbench does not know")
    if "p50" not in summary:  # one value of the whole benchmark, which is its own average
        return _spread(summary, {"avg": ""}, quantity, _UNITS[unit], key)
    return _spread(summary, _AVERAGE, quantity, _UNITS[unit], key)


def _last_named(within: Any, name: str) -> Any:
    """The last value of that name in a nested configuration: of its phases, the last is the one that is measured."""
    found = None
    parts = within.items() if isinstance(within, dict) else enumerate(within) if isinstance(within, list) else ()
    for key, part in parts:
        inner = part if key == name and not isinstance(part, dict | list) else _last_named(part, name)
        found = inner if inner is not None else found
    return found


# --- llama-bench ---

_LLAMA_BENCH = {
    "prompt_throughput": "prompt tokens / seconds to fill the cache with random tokens; mean of repetitions",
    "decode_tps": (
        "random tokens fed one by one: no sampling, no text, one sequence, the first token is in it; mean of"
        " repetitions"
    ),
    "total_throughput": "tokens of prompt and generation together / seconds of both; mean of repetitions",
}


def _llama_bench(found: Sequence[Data]) -> Results:
    results = []
    for one in found:
        prompt, generated, depth = (int(_number(one, key) or 0) for key in ("n_prompt", "n_gen", "n_depth"))
        quantity = "total_throughput" if prompt and generated else "decode_tps" if generated else "prompt_throughput"
        tests = [f"pp{prompt}"] * bool(prompt) + [f"tg{generated}"] * bool(generated)
        label = "+".join(tests) + (f" @ d{depth}" if depth else "")
        samples = one.get("samples_ts")
        settings = _settings(
            model=one.get("model_type") or Path(str(one.get("model_filename", ""))).name,
            device=one.get("gpu_info") or one.get("cpu_info"),
            backend=one.get("backends"),
            threads=one.get("n_threads"),
            repetitions=len(samples) if isinstance(samples, list) else None,
            measured=str(one.get("test_time") or "")[:10],
        )
        figures = tuple(_spread(one, {"avg_ts": "mean", "stddev_ts": "std"}, quantity, 1.0, "avg_ts"))
        results.append(Reported(label, settings, figures))
    build, commit = found[0].get("build_number"), found[0].get("build_commit")
    return f"b{build} ({commit})" if build else "", results


# In this order: the first whose keys a file has. An AIPerf file is a GenAI-Perf file with its version in it.
_TOOLS = (
    _Tool("SGLang bench_serving", frozenset({"mean_e2e_latency_ms", "output_throughput"}), _sglang, _SGLANG),
    _Tool("vLLM bench serve", frozenset({"completed", "duration", "total_token_throughput"}), _vllm_serve, _SERVE),
    _Tool("vLLM bench latency", frozenset({"avg_latency", "percentiles"}), _vllm_latency, _LATENCY_BENCH),
    _Tool(
        "vLLM bench throughput",
        frozenset({"elapsed_time", "num_requests", "tokens_per_second"}),
        _vllm_throughput,
        _THROUGHPUT_BENCH,
    ),
    _Tool("GuideLLM", frozenset({"benchmarks"}), _guidellm, _GUIDELLM),
    _Tool("AIPerf", frozenset({"aiperf_version", "request_latency", "input_config"}), _aiperf, _AIPERF),
    _Tool("GenAI-Perf", frozenset({"request_throughput", "request_latency", "input_config"}), _aiperf, _AIPERF),
    _Tool("llama-bench", frozenset({"n_prompt", "n_gen", "avg_ts"}), _llama_bench, _LLAMA_BENCH),
)
