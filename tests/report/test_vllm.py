"""Runs in vLLM's keys: the figures are vLLM's, and importing them again gives the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.report.synthetic import write_run
from zbench.cli import main
from zbench.imported import read
from zbench.metrics import load_run
from zbench.records import RequestRecord, ServedRecord, ServerRecord, Speculation, TrialRecord
from zbench.report import vllm

PUBLISHED = Path(__file__).parent.parent / "imported"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    engines = ("autoregressive", "transformers generate", "chain drafter")
    return write_run(folder, engines=engines, prompts=5, repeats=1, tokens=8)


@pytest.fixture
def served(run: Path, tmp_path: Path) -> Path:
    """The run as if its first engine were a server: two requests in one window, the second held back for a second."""
    folder = tmp_path / "served"
    folder.mkdir()
    manifest = json.loads((run / "run.json").read_text())
    manifest["cells"] = [
        {
            **manifest["cells"][0],
            "engine": "endpoint",
            "options": {"api": "chat", "limits": {"ttft": 0.5, "tpot": None}},
        }
    ]
    (folder / "run.json").write_text(json.dumps(manifest))
    trial = TrialRecord.from_json((run / "trials.jsonl").read_text().splitlines()[0])
    one = trial.requests[0]

    def request(name: str, due: float, queued: float, chunks: tuple[float, ...], tokens: int) -> RequestRecord:
        record = ServedRecord(due, queued, chunks, tokens, "text", prompt_tokens=10, output_tokens=tokens)
        return replace(
            one, prompt_id=name, prompt_tokens=10, ttft_seconds=chunks[0], end_seconds=chunks[-1], served=record
        )

    server = ServerRecord(
        "vllm",
        "",
        Speculation("x", 4, 12, 6, (4, 2, 0)),
        None,
        "",
        0.1,
        {"concurrency": 1, "rate": None, "arrivals": "x"},
    )
    both = (request("a", 0.0, 0.0, (0.4, 0.5, 0.7), 7), request("b", 0.0, 1.0, (1.6, 2.0), 3))
    trial = replace(trial, requests=both, steps=(), forwards=(), wall_seconds=2.0, server=server)
    (folder / "trials.jsonl").write_text(trial.to_json() + "\n")
    return folder


def test_a_servers_run_has_vllms_figures(served: Path) -> None:
    whole = load_run(served)
    found = vllm.result(whole, whole.cells[0], detailed=True)
    assert found["backend"] == "openai-chat" and found["max_concurrency"] == 1 and found["request_rate"] == "inf"
    assert found["ttfts"] == pytest.approx([0.4, 0.6]), "since sent, without the second at the client"
    assert found["latencies"] == pytest.approx([0.7, 1.0]) and found["queue_times"] == [0.0, 1.0]
    assert found["itls"] == [pytest.approx((0.1, 0.2)), pytest.approx((0.4,))]
    assert found["start_times"] == [0.0, 1.0] and found["max_concurrent_requests"] == 1
    tpots = [0.3 / 6, 0.4 / 2]
    assert found["mean_tpot_ms"] == pytest.approx(sum(tpots) / 2 * 1e3), "every request once"
    assert found["mean_itl_ms"] == pytest.approx((0.1 + 0.2 + 0.4) / 3 * 1e3), "every gap once"
    assert found["output_throughput"] == 10 / 2.0 and found["total_token_throughput"] == 30 / 2.0
    assert found["request_goodput"] == 1 / 2.0, "only the first has its token within half a second"
    assert found["spec_decode_acceptance_length"] == 1 + 6 / 4 and found["spec_decode_acceptance_rate"] == 50.0
    assert found["spec_decode_per_position_acceptance_rates"] == [1.0, 0.5, 0.0]


def test_replicas_decode_side_by_side(run: Path, tmp_path: Path) -> None:
    """Five prompts on two replicas take three rounds, and the device of each gives its tokens meanwhile."""
    manifest = json.loads((run / "run.json").read_text())
    manifest["cells"][0]["replicas"] = 2
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    (tmp_path / "trials.jsonl").write_text((run / "trials.jsonl").read_text())
    whole = load_run(tmp_path)
    walls = [trial.wall_seconds for trial in whole.cells[0].trials]
    found = vllm.result(whole, whole.cells[0], detailed=True)
    assert found["duration"] == pytest.approx(max(walls[:2]) + max(walls[2:4]) + walls[4])
    assert found["output_throughput"] == pytest.approx(5 * 8 / found["duration"])
    assert found["max_concurrency"] == found["max_concurrent_requests"] == 2
    assert found["start_times"][:3] == [0.0, 0.0, pytest.approx(max(walls[:2]))]


def test_an_export_is_read_as_vllms_and_gives_the_same(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(run), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    paths = [Path(line) for line in result.output.splitlines()]
    assert [path.name for path in paths] == ["autoregressive.json", "transformers-generate.json", "chain-drafter.json"]
    whole = load_run(run)
    for path, cell in zip(paths, whole.cells, strict=True):
        content, found = json.loads(path.read_text()), read(path)
        assert found.tool == "vLLM bench serve" and "ttfts" not in content
        figures = {(f.quantity, f.statistic): f.value for f in found.results[0].figures}
        assert figures["ttft", "mean"] == pytest.approx(cell.requests["ttft"].mean())
        assert figures["output_throughput", ""] == pytest.approx(
            sum(r.tokens for t in cell.trials for r in t.requests) / sum(t.wall_seconds for t in cell.trials)
        )
    drafting = json.loads(paths[2].read_text())
    assert drafting["spec_decode_acceptance_length"] == pytest.approx(3.0), "two of four drafts, and the bonus"
    assert json.loads(paths[0].read_text())["mean_itl_ms"] == pytest.approx(
        json.loads(paths[0].read_text())["mean_tpot_ms"]
    )


def test_the_keys_are_those_of_a_published_result(run: Path) -> None:
    published = json.loads((PUBLISHED / "vllm_serve.json").read_text()).keys()
    whole = load_run(run)
    ours = vllm.result(whole, whole.cells[0])
    assert published - ours.keys() == {"max_output_tokens_per_s", "rtfx"}
    assert {key for key in ours.keys() - published if not key.startswith("zbench_")} == {
        "mean_e2el_ms", "median_e2el_ms", "std_e2el_ms", "p99_e2el_ms",
    }  # fmt: skip


def test_what_a_run_cannot_tell_is_null_and_nothing_measured_is_one_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", engines=("autoregressive", "chain drafter"), prompts=1, repeats=1, tokens=2,
                       failing=("chain drafter",))  # fmt: skip
    lines = [TrialRecord.from_json(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    unseen = [replace(t, steps=(), forwards=()) for t in lines]
    (folder / "trials.jsonl").write_text("".join(t.to_json() + "\n" for t in unseen))
    whole = load_run(folder)
    found = vllm.result(whole, whole.cells[0])
    assert found["mean_itl_ms"] is None and found["mean_ttft_ms"] > 0 and found["failed"] == 0
    (folder / "trials.jsonl").write_text("")
    for argument in (folder, tmp_path):
        result = CliRunner().invoke(main, ["export", str(argument)])
        assert result.exit_code == 2 and result.output.count("\n") == 1
