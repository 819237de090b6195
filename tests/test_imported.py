"""Results of other tools: read as they reported them, with what each means, beside runs and never mixed with them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.report.synthetic import write_run
from zbench import importers
from zbench.cli import main
from zbench.errors import UserError
from zbench.imported import QUANTITIES, Imported, load, read, write

FILES = Path(__file__).parent / "imported"


def asked(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def changed(folder: Path, name: str, **changes: Any) -> Path:
    """A fixture with other values of its keys; None takes a key away."""
    content = json.loads((FILES / name).read_text())
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    (folder / name).write_text(json.dumps(content))
    return folder / name


def values(found: Imported, index: int = 0) -> dict[tuple[str, str], float]:
    return {(figure.quantity, figure.statistic): figure.value for figure in found.results[index].figures}


# Numbers from the files themselves, in seconds and shares.
@pytest.mark.parametrize(
    ("name", "tool", "version", "expected"),
    [
        (
            "vllm_serve.json",
            "vLLM bench serve",
            "not reported",
            {
                ("ttft", "mean"): 79.21358291745801, ("ttft", "p99"): 131.20661219619995,
                ("tpot", "p50"): 0.11666833750196199, ("inter_chunk", "p50"): 0.061734956500004046,
                ("output_throughput", ""): 656.0112310037472, ("request_throughput", ""): 2.5625438711083874,
            },
        ),
        (
            "vllm_serve_speculative.json",
            "vLLM bench serve",
            "not reported",
            {
                ("acceptance_length", ""): 1 + 11413 / 4994, ("acceptance_rate", ""): 11413 / 34958,
                ("request_latency", "p95"): 20.3717359947, ("tpot", "p90"): 0.032520065868688846,
            },
        ),
        (
            "vllm_latency.json",
            "vLLM bench latency",
            "not reported",
            {("request_latency", "mean"): 1.25, ("request_latency", "p99"): 1.299},
        ),
        (
            "vllm_throughput.json",
            "vLLM bench throughput",
            "not reported",
            {("total_throughput", ""): 2500.0, ("request_throughput", ""): 5.0},
        ),
        (
            "sglang.jsonl",
            "SGLang bench_serving",
            "0.5.5.post3",
            {
                ("ttft", "p50"): 0.033528951462358236, ("tpot", "mean"): 0.006627540826841212,
                ("inter_chunk", "p95"): 0.021319825435057282, ("prompt_throughput", ""): 1531.6175633353612,
            },
        ),
        (
            "guidellm.json",
            "GuideLLM",
            "0.5.0.dev0",
            {
                # What GuideLLM calls TPOT has the first token in it; its inter-token latency is what others call TPOT.
                ("tpot", "mean"): 0.02417877651496134, ("tpot_with_first", "mean"): 0.02432290418073535,
                ("request_latency", "p50"): 24.90842366218567, ("output_throughput", "mean"): 165.59511945248636,
            },
        ),
        (
            "aiperf.json",
            "AIPerf",
            "0.10.0",
            {
                ("tpot", "mean"): 0.00905019651281432, ("inter_chunk", "p99"): 0.10983235371374994,
                ("decode_tps", "p50"): 109.81511585703238, ("request_throughput", ""): 3.371709042256622,
            },
        ),
        ("genai_perf.json", "GenAI-Perf", "not reported", {("tpot", "p99"): 0.013, ("output_throughput", ""): 250.0}),
        ("llama_bench.json", "llama-bench", "b5606 (247e5c6e)", {("prompt_throughput", "mean"): 3024.404345}),
    ],
)  # fmt: skip
def test_each_tool_is_known_by_its_keys_and_read_in_our_units(
    name: str, tool: str, version: str, expected: dict[tuple[str, str], float]
) -> None:
    found = read(FILES / name)
    assert (found.tool, found.version) == (tool, version)
    told = values(found)
    for key, value in expected.items():
        assert told[key] == pytest.approx(value), key
    assert Imported.from_json(found.to_json()) == found


def test_every_figure_has_a_definition_and_a_place() -> None:
    for file in sorted(FILES.glob("*.json*")):
        found = read(file)
        for result in found.results:
            for figure in result.figures:
                assert figure.quantity in QUANTITIES
                assert importers.definition(found.tool, figure.quantity).startswith(f"{found.tool}: ")


def test_what_a_tool_reports_is_consistent_with_what_we_say_it_is() -> None:
    """The definitions, held against the counts that the published files have beside their figures."""
    serve = json.loads((FILES / "vllm_serve.json").read_text())
    assert values(read(FILES / "vllm_serve.json"))["output_throughput", ""] == pytest.approx(
        serve["total_output_tokens"] / serve["duration"]
    )
    guide = json.loads((FILES / "guidellm.json").read_text())["benchmarks"][0]["metrics"]
    requests, tokens = guide["request_totals"]["successful"], 4096
    assert guide["inter_token_latency_ms"]["successful"]["count"] == tokens - requests, (
        "weighted by tokens but the first"
    )
    assert guide["time_per_output_token_ms"]["successful"]["count"] == tokens, "weighted by all tokens"
    assert guide["time_per_output_token_ms"]["successful"]["total_sum"] == pytest.approx(
        guide["request_latency"]["successful"]["total_sum"] * 1e3, rel=1e-3
    ), "prefill is in it"
    aiperf = json.loads((FILES / "aiperf.json").read_text())
    per_user, between = aiperf["output_token_throughput_per_user"], aiperf["inter_token_latency"]
    assert per_user["min"] == pytest.approx(1e3 / between["max"]) and per_user["avg"] > 1e3 / between["avg"]
    assert aiperf["output_token_throughput"]["avg"] == pytest.approx(
        aiperf["total_osl"]["avg"] / aiperf["benchmark_duration"]["avg"]
    )
    bench = json.loads((FILES / "llama_bench.json").read_text())
    assert bench[1]["avg_ts"] == pytest.approx(sum(1280e9 / ns for ns in bench[1]["samples_ns"]) / 5, rel=1e-6)


def test_a_file_of_several_results_keeps_them_apart(tmp_path: Path) -> None:
    line = (FILES / "sglang.jsonl").read_text()
    (tmp_path / "two.jsonl").write_text(line + "\n" + line)
    assert [r.label for r in read(tmp_path / "two.jsonl").results] == [
        "agg_n50_in128_out64_c8", "agg_n50_in128_out64_c8 (2)",
    ]  # fmt: skip
    tests = read(FILES / "llama_bench.json").results
    assert [(t.label, {f.quantity for f in t.figures}) for t in tests] == [
        ("pp8192", {"prompt_throughput"}), ("tg1280", {"decode_tps"}),
    ]  # fmt: skip


def test_what_was_not_measured_is_not_reported_and_never_zero(tmp_path: Path) -> None:
    """Tools write zeros for requests that did not stream, and for a benchmark in which nothing came."""
    zeros = {f"{s}_{m}_ms": 0.0 for s in ("mean", "median", "std", "p99") for m in ("ttft", "itl")}
    found = read(changed(tmp_path, "vllm_serve.json", **zeros))
    assert {f.quantity for f in found.results[0].figures} == {
        "tpot", "output_throughput", "total_throughput", "request_throughput",
    }  # fmt: skip
    partial = read(changed(tmp_path, "vllm_serve.json", failed=3, median_ttft_ms=float("nan"), p99_tpot_ms=None))
    told = values(partial)
    assert ("ttft", "p50") not in told and ("tpot", "p99") not in told and ("ttft", "mean") in told
    assert partial.results[0].notes == ("3 requests failed and are in no figure",)
    with pytest.raises(UserError, match="without any figure"):
        read(changed(tmp_path, "vllm_serve.json", completed=0))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "line 1 is not JSON"),
        (b"[]", "holds no results"),
        (b"[1, 2]", "holds no results"),
        (b'{"a": 1}', "of no tool that zbench knows"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        ((FILES / "guidellm.json").read_bytes()[:3000], "is not JSON; the file is cut"),
        ((FILES / "sglang.jsonl").read_bytes() + b'\n{"tag": "cut', "line 3 is not JSON; the file is cut"),
        (b'{"benchmarks": [{"x": 1}]}', "not as GuideLLM writes them"),
        (b'{"input_sequence_throughput": 3.0}', "embeddings"),
        (b'[{"n_prompt": 1, "n_gen": 0, "avg_ts": "fast"}]', 'avg_ts is "fast", not a number'),
        (
            b'{"request_throughput": {"unit": "furlongs", "avg": 1}, "request_latency": {"unit": "ms", "avg": 1},'
            b' "input_config": {}}',
            'request_throughput has the unit "furlongs"',
        ),
        (
            b'{"request_throughput": {"unit": ["s"], "avg": 1}, "request_latency": {"unit": "ms", "avg": 1},'
            b' "input_config": {}}',
            'request_throughput has the unit ["s"]',
        ),
        (b'[{"n_prompt": 1, "n_gen": 0, "avg_ts": -3.5}]', "avg_ts is -3.5: no time, count or rate is below 0"),
        (b'{"avg_latency": 1.0, "percentiles": {"99": 2.0, "best": 0.5}}', 'percentiles has "best", not a percentile'),
        (b'{"avg_latency": 1.0, "percentiles": {"120": 2.0}}', 'percentiles has "120", not a percentile'),
        (b'[{"n_prompt": 1, "n_gen": 0, "avg_ts": 1' + b"0" * 400 + b"}]", "avg_ts is beyond any number"),
        (b'[{"n_prompt": 1, "n_gen": 0, "avg_ts": 1' + b"0" * 5000 + b"}]", "a number that is too long"),
        (
            (FILES / "vllm_serve.json").read_bytes().replace(b'"model_id": "', b'"model_id": "\\ud800'),
            "holds text that is not Unicode",
        ),
    ],
)
def test_what_cannot_be_taken_is_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "r.json").write_bytes(content)
    result = asked("import", tmp_path / "r.json", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.output.startswith(f"zbench: {tmp_path / 'r.json'}: ") and result.output.count("\n") == 1
    assert reason in result.output
    assert not (tmp_path / "out").exists()


def test_of_several_files_all_are_taken_or_none(tmp_path: Path) -> None:
    result = asked("import", FILES / "aiperf.json", tmp_path / "none.json", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "none.json: cannot be read" in result.output
    assert not (tmp_path / "out").exists()


_KEYS = (
    "benchmarks", "metrics", "n_prompt", "n_gen", "avg_ts", "completed", "request_throughput", "avg", "duration",
    "total_token_throughput", "request_latency", "input_config", "unit", "percentiles", "avg_latency",
    "output_throughput", "mean_e2e_latency_ms", "server_info", "config",
)  # fmt: skip
_LEAF = st.none() | st.integers(-1, 3) | st.just("x") | st.just(float("inf"))
_ANY = st.recursive(_LEAF, lambda x: st.lists(x, max_size=2) | st.dictionaries(st.sampled_from(_KEYS), x), max_leaves=8)


@settings(max_examples=60, deadline=None)
@given(_ANY | st.fixed_dictionaries(dict.fromkeys(_KEYS, _LEAF)))
def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    try:
        read(path)
    except UserError as refused:
        assert str(refused).startswith(str(path)) and "\n" not in str(refused)


# --- Beside runs ---


def test_imported_results_stand_beside_runs_with_their_definitions(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", prompts=5, repeats=1, tokens=8)
    taken = [write(read(FILES / name), tmp_path) for name in ("guidellm.json", "vllm_serve.json")]
    result = asked("compare", run, *taken, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "2 results of GuideLLM, vLLM bench serve as reported there" in result.output
    [page] = tmp_path.glob("compare-*/compare.html")
    html = page.read_text()
    for said in (
        "time_per_output_token_ms: (last token - request start) / output tokens: prefill is in it",
        "Not reported by vllm_serve: 4 requests/s.",
        "guidellm: concurrency 4",
        "zbench: sum(end - first token) / sum(tokens - those of the first step, usually one)",
    ):
        assert said in html
    rows = list(csv.DictReader((page.parent / "compare.csv").open()))
    [row] = [r for r in rows if r["run"] == "guidellm" and r["metric"] == "tpot" and r["part"] == "mean"]
    assert float(row["value"]) == 0.02417877651496134 and row["status"] == "imported"
    assert row["note"] == "inter_token_latency_ms"
    assert not [r for r in rows if r["run"] == "guidellm" and r["metric"] == "speed_against_first"]
    content = json.loads((page.parent / "compare.json").read_text())
    assert [found["tool"] for found in content["imported"]] == ["GuideLLM", "vLLM bench serve"]


def test_imported_results_alone_make_a_page(tmp_path: Path) -> None:
    assert asked("import", FILES / "aiperf.json", "--label", "A <GPU>", "--out", tmp_path).exit_code == 0
    [folder] = tmp_path.glob("imported-A-GPU-*")
    result = asked("compare", folder, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    [page] = tmp_path.glob("compare-*/compare.html")
    assert "A &lt;GPU&gt;: concurrency 8" in page.read_text() and "<GPU>" not in page.read_text()
    shown = json.loads(asked("compare", folder, "--json").output)
    assert shown["runs"] == [] and len(shown["metrics"]) == len(read(FILES / "aiperf.json").results[0].figures)


def test_a_damaged_import_is_one_line(tmp_path: Path) -> None:
    folder = write(read(FILES / "aiperf.json"), tmp_path)
    assert load(folder).tool == "AIPerf"
    for content, reason in (('{"schema_version": 2}', "has schema 2"), ("{", "damaged"), ('{"results": 3}', "damaged")):
        (folder / "imported.json").write_text(content)
        result = asked("compare", folder)
        assert result.exit_code == 2 and reason in result.output and result.output.count("\n") == 1
