"""Batches: what all sequences decode together, and what is said where the prompts do not fill them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.synthetic import write_run
from zbench import metrics, scenario
from zbench.checks import check
from zbench.errors import UserError
from zbench.records import read_trials
from zbench.report import html, readings, render
from zbench.report.findings import warnings
from zbench.results import Results


def cut(folder: Path, batch: int, sizes: list[int]) -> Results:
    """The run with trials of that batch cut to so many sequences, by group."""
    trials = []
    for trial in read_trials(folder)[0]:
        if f"batch={batch}" in trial.cell:
            count = sizes[trial.group % len(sizes)]
            steps = tuple(replace(step, committed=step.committed[:count]) for step in trial.steps)
            trial = replace(trial, requests=trial.requests[:count], steps=steps)
        trials.append(trial.to_json())
    (folder / "trials.jsonl").write_text("\n".join(trials) + "\n")
    return Results.of(metrics.load_run(folder))


def speeds(results: Results) -> dict[int, float]:
    cells = [cell for cell in results.run.cells if cell.record.label == "autoregressive"]
    return {cell.record.batch: readings.together(cell) or 0.0 for cell in cells}


def test_what_sequences_decode_together_is_of_those_that_ran(tmp_path: Path) -> None:
    write_run(tmp_path, points=[{"batch": 1}, {"batch": 4}], engines=["autoregressive"], prompts=4, repeats=1)
    whole = speeds(Results.of(metrics.load_run(tmp_path)))
    [trial] = [t for t in read_trials(tmp_path)[0] if t.cell == "autoregressive/batch=1" and t.group == 0]
    [request] = trial.requests
    alone = (request.tokens - 1) / (request.end_seconds - request.ttft_seconds)
    assert whole[1] == pytest.approx(alone, rel=0.1)
    results = cut(tmp_path, 4, [4, 1])
    assert speeds(results)[4] == pytest.approx(whole[4], rel=0.1)  # of the full ones
    said = [warning for warning in warnings(results) if "not fill" in warning]
    assert len(said) == 1 and said[0].startswith("The prompts do not fill the last batch of 4, which has 1:")
    none = cut(tmp_path, 4, [1])
    assert speeds(none)[4] == pytest.approx(whole[4] / 4, rel=0.1)  # not four times what one did


def test_what_sequences_decode_together_lasts_from_the_first_token_of_any_to_the_last_of_all(tmp_path: Path) -> None:
    """As from a server, which answers them one after another: 2 s to 6 s and 3 s to 5 s are 4 s of decode."""
    write_run(tmp_path, points=[{"batch": 2}], engines=["autoregressive"], prompts=1, repeats=1)
    [trial], _ = read_trials(tmp_path)
    one, other = trial.requests
    requests = (replace(one, ttft_seconds=2.0, end_seconds=6.0), replace(other, ttft_seconds=3.0, end_seconds=5.0))
    (tmp_path / "trials.jsonl").write_text(replace(trial, requests=requests).to_json() + "\n")
    results = Results.of(metrics.load_run(tmp_path))
    assert readings.together(results.run.cells[0]) == pytest.approx((one.tokens + other.tokens - 2) / 4)


def test_the_tokens_of_the_whole_batch_have_a_column_where_there_is_one(tmp_path: Path) -> None:
    write_run(tmp_path, points=[{"batch": 1}, {"batch": 4}], engines=["autoregressive"], prompts=4, repeats=1)
    results = Results.of(metrics.load_run(tmp_path))
    one, four = (html._engine_table(results, point) for point in results.points)
    assert "All tokens/s" not in one.headings
    texts = dict(zip(four.headings, (entry.text for entry in four.rows[0].entries), strict=True))
    assert float(texts["All tokens/s"]) == pytest.approx(4 * float(texts["Tokens/s"]), rel=0.2)  # less: of prefill too


@pytest.mark.parametrize(
    ("batches", "said"), [((1,), "whole prompts"), ((2,), "whole batches"), ((1, 2), "whole prompts or batches")]
)
def test_captions_say_what_was_resampled(batches: tuple[int, ...], said: str, tmp_path: Path) -> None:
    points = [{"batch": batch} for batch in batches]
    write_run(tmp_path, points=points, engines=["autoregressive"], prompts=2, repeats=1, tokens=6)
    page = render(tmp_path).read_text()
    assert set(re.findall(r"whole [a-z ]+ resampled", page)) == {f"{said} resampled"}


def test_a_batch_takes_as_many_prompts(tmp_path: Path) -> None:
    path = tmp_path / "few.yaml"
    path.write_text(
        "name: few\nmodel: zbench-tiny\nengines: [autoregressive]\nprompts: {set: quickstart, limit: 4}\n"
        "matrix: {batch: [4, 5]}\noutput_tokens: 4\n"
    )
    with pytest.raises(UserError, match="batch 5 takes as many prompts, and there are 4"):
        check(scenario.load(path, ()))


def test_a_figure_says_how_many_lines_it_leaves_out(tmp_path: Path) -> None:
    points = [{"batch": batch, "sampling.temperature": t / 10} for batch in (1, 2) for t in range(6)]
    write_run(tmp_path, points=points, engines=["autoregressive", "transformers generate"], prompts=2, repeats=1)
    render(tmp_path)
    assert "and 3 more, in the tables" in (tmp_path / "figures" / "batch.svg").read_text()
