"""Runs side by side: what may be compared, what the ratios are, and that nothing missing goes unsaid."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from tests.report.synthetic import ROOFS, write_run
from zbench.cli import main
from zbench.compare import compare
from zbench.errors import UserError
from zbench.gate import NotComparable
from zbench.records import Manifest, TrialRecord, read_manifest, read_trials
from zbench.report.compare import _device_table, answers, frontier

ENGINES = ("autoregressive", "tidar 4 by 1", "tidar 4 by 2")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "first", engines=ENGINES, prompts=6, repeats=1, tokens=16)


def other(
    first: Path,
    name: str,
    edit: Callable[[Manifest], Manifest] = lambda m: m,
    pace: float = 1.0,
    device: str | None = None,
    without: str = "",
    trials: Callable[[TrialRecord], TrialRecord] = lambda t: t,
) -> Path:
    """A run like the first, all its times multiplied by `pace`, on a device of that name."""
    folder = first.parent / name
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    manifest = read_manifest(first)
    if device:
        facts = {**manifest.environment, "device": {**manifest.environment["device"], "name": device}}
        manifest = replace(manifest, environment=facts)
    (folder / "run.json").write_text(edit(manifest).to_json())
    made = [trials(_paced(trial, pace)) for trial in read_trials(first)[0] if trial.cell != without]
    (folder / "trials.jsonl").write_text("".join(trial.to_json() + "\n" for trial in made))
    return folder


def _paced(trial: TrialRecord, pace: float) -> TrialRecord:
    return replace(
        trial,
        wall_seconds=trial.wall_seconds * pace,
        requests=tuple(
            replace(r, ttft_seconds=r.ttft_seconds * pace, end_seconds=r.end_seconds * pace) for r in trial.requests
        ),
        steps=tuple(
            replace(
                s, seconds=s.seconds * pace, accept_seconds=s.accept_seconds * pace,
                commit_seconds=s.commit_seconds * pace,
            )
            for s in trial.steps
        ),
        forwards=tuple(replace(f, seconds=f.seconds * pace) for f in trial.forwards),
    )  # fmt: skip


def edited(**changes: Any) -> Callable[[Manifest], Manifest]:
    """A manifest with other fields of its own, or (as `cell_...`) of every cell."""

    def edit(manifest: Manifest) -> Manifest:
        of_cells = {key.removeprefix("cell_"): value for key, value in changes.items() if key.startswith("cell_")}
        own = {key: value for key, value in changes.items() if not key.startswith("cell_")}
        return replace(manifest, **own, cells=tuple(replace(cell, **of_cells) for cell in manifest.cells))

    return edit


def asked(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_a_run_at_half_the_time_is_twice_as_fast_on_every_engine(first: Path) -> None:
    half = other(first, "half", pace=0.5, device="Invented GPU")
    found = compare([first, half])
    assert [side.name for side in found.sides] == ["Invented CPU", "Invented GPU"]
    for cell in found.cells:
        ratio = found.ratio(found.sides[1], cell)
        assert ratio.value == pytest.approx(2.0)
        assert (ratio.low, ratio.high) == (pytest.approx(2.0), pytest.approx(2.0))
        assert ratio.n == 6
        assert found.ratio(found.sides[0], cell).status == "unavailable"
    said = answers(found)
    assert said[0].startswith("autoregressive: Invented GPU decodes 2.00× as fast as Invented CPU (2.00–2.00, paired")
    assert any("Invented GPU: Blocks of 4 on 1 device: proposing" in sentence for sentence in said)


def test_an_option_that_an_older_zbench_did_not_have_is_no_difference_while_it_is_null(first: Path) -> None:
    def edit(manifest: Manifest) -> Manifest:
        cells = tuple(replace(cell, options={**cell.options, "of_later": None}) for cell in manifest.cells)
        return replace(manifest, cells=cells)

    found = compare([first, other(first, "later", edit=edit)])
    assert all(found.ratio(found.sides[1], cell).status == "ok" for cell in found.cells)


def test_a_ratio_says_how_many_requests_it_is_of_where_one_run_lacks_some(first: Path) -> None:
    cut = other(first, "cut")
    lines = [line for line in (cut / "trials.jsonl").read_text().splitlines(keepends=True) if '"group":5' not in line]
    (cut / "trials.jsonl").write_text("".join(lines))
    found = compare([first, cut])
    note = found.ratio(found.sides[1], "autoregressive").note
    assert "5 of 6 requests that go on after their first step are paired" in note

    def short(trial: TrialRecord) -> TrialRecord:
        """Of one token in both runs, which no ratio is of."""
        if trial.group != 5:
            return trial
        return replace(
            trial,
            requests=tuple(replace(r, output_ids=r.output_ids[:1]) for r in trial.requests),
            steps=trial.steps[:1],
        )

    for name, trials in (("whole", lambda trial: trial), ("short", short)):
        whole = compare([other(first, f"{name}-{n}", trials=trials) for n in "ab"])
        assert not whole.ratio(whole.sides[1], "autoregressive").note


def test_a_sweep_of_forwards_has_no_speed_to_compare(first: Path) -> None:
    def swept(trial: TrialRecord) -> TrialRecord:
        return replace(trial, forwards=tuple(replace(f, rows=n) for f in trial.forwards for n in (1, 2)))

    edit = edited(cell_engine="forward")
    found = compare([other(first, name, edit=edit, trials=swept) for name in ("swept", "again")])
    ratio = found.ratio(found.sides[1], "autoregressive")
    assert ratio.note == "unavailable: this engine times forwards of different numbers of rows at every token"


def test_an_engine_with_another_drafter_of_the_same_name_is_left_out(first: Path) -> None:
    """One may have been trained again into the folder that the scenario names."""
    mine, theirs = (
        other(
            first,
            name,
            trials=lambda t, name=name: replace(t, kernels={"mask_adapter": name} if "4-by" in t.cell else {}),
        )
        for name in ("one", "two")
    )
    found = compare([mine, theirs])
    assert found.sides[1].cells.keys() == {"autoregressive"}
    assert set(found.sides[1].left_out.values()) == {"the drafter has other weights than in one"}


def test_runs_of_one_machine_are_told_apart_by_folder_and_no_difference_is_not_made_one(first: Path) -> None:
    again, third = other(first, "again"), other(first, "third", pace=1.5)
    found = compare([first, again, third])
    assert [side.name for side in found.sides] == [f"Invented CPU ({n})" for n in ("first", "again", "third")]
    said = answers(found)
    assert "no difference between Invented CPU (again) and Invented CPU (first) is shown (1.00×, 1.00–1.00)" in said[0]
    assert "Invented CPU (third) decodes 0.67× as fast" in said[1]


def test_one_run_stands_alone(first: Path, tmp_path: Path) -> None:
    result = asked(first, "--out", tmp_path)
    assert result.exit_code == 0
    assert (
        "On Invented CPU tidar 4 by 1 has the most tokens/s per sequence, not clearly ahead of the next"
        in result.output
    )
    assert len(list(tmp_path.glob("compare-*/compare.html"))) == 1


@pytest.mark.parametrize(("slower", "near"), [(2.0, ""), (1.001, ", not clearly ahead of the next")])
def test_the_most_tokens_per_second_have_their_interval_and_are_no_lead_within_it(
    first: Path, slower: float, near: str
) -> None:
    folder = other(first, f"slower-{slower}")
    trials = [replace(t, cell="tidar-4-by-1") for t in read_trials(first)[0] if t.cell == "tidar-4-by-2"]
    twins = [_paced(t, slower) for t in trials] + [t for t in read_trials(first)[0] if t.cell == "tidar-4-by-2"]
    (folder / "trials.jsonl").write_text("".join(t.to_json() + "\n" for t in twins))
    said = answers(compare([folder]))[0]
    assert re.fullmatch(
        rf"On Invented CPU tidar 4 by 2 has the most tokens/s per sequence{near}: \d+ tokens/s \(\d+–\d+\)\.", said
    )


def test_a_ratio_of_other_tokens_says_so_in_the_json_and_on_the_page(first: Path, tmp_path: Path) -> None:
    folder = other(first, "tokens")
    trials = read_trials(folder)[0]
    for at, t in enumerate(trials):
        if t.cell == "tidar-4-by-1" and t.group < 2:
            trials[at] = replace(t, requests=tuple(replace(r, output_hash="another") for r in t.requests))
    (folder / "trials.jsonl").write_text("".join(t.to_json() + "\n" for t in trials))
    found = compare([first, folder])
    words = "4 of 6 pairs emitted the same tokens; the others are compared per token"
    notes = {cell: found.ratio(found.sides[1], cell).note for cell in found.cells}
    assert notes == {"autoregressive": "", "tidar-4-by-1": words, "tidar-4-by-2": ""}
    asked(first, folder, "--out", tmp_path)
    [page] = tmp_path.glob("compare-*/compare.html")
    assert f"<li>{words}</li>" in page.read_text()


def test_too_few_of_a_batch_are_batches(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / name, points=[{"batch": 2}], engines=("autoregressive",), prompts=3, repeats=1, tokens=8)
        for name in ("one", "two")
    ]
    assert "(3 batches: too few for an interval, paired by prompt)" in answers(compare(folders))[0]


def test_rates_of_two_precisions_stand_under_no_heading_of_one(first: Path) -> None:
    rates = {**ROOFS["flops"], "float32": {**ROOFS["flops"]["bfloat16"], "value": 7e9}}
    single = other(first, "single", edited(cell_dtype="float32", cell_device="x", roofs={**ROOFS, "flops": rates}))
    found = compare([first])
    both = replace(found, sides=(*found.sides, *compare([single]).sides))
    table = _device_table(both)
    at = table.headings.index("Arithmetic rate")
    one, two = (line.entries[at] for line in table.rows)
    assert (one.below, two.below, two.text) == ("bfloat16", "float32", "7.00 GFLOP/s")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scenario_hash": "other"}, "other measured another scenario than first"),
        ({"prompts_hash": "other"}, "other decoded other prompts"),
        ({"models": {"invented-135m": {"hash": "other"}}}, "model invented-135m has other weights in other"),
        ({"schema_version": 0}, "has schema 0, this zbench reads 1"),
    ],
)
def test_what_is_not_the_same_measurement_is_refused(first: Path, changes: dict[str, Any], reason: str) -> None:
    result = asked(first, other(first, "other", edited(**changes)))
    assert result.exit_code == 3
    assert result.output.startswith("zbench: not comparable: ")
    assert reason in result.output
    assert result.output.count("\n") == 1


def test_cross_hardware_keeps_what_is_the_same_and_names_the_rest(first: Path, tmp_path: Path) -> None:
    def edit(manifest: Manifest) -> Manifest:
        cells = [
            replace(manifest.cells[0], device="cuda:0"),
            replace(manifest.cells[1], dtype="float32"),
            manifest.cells[2],
        ]
        return replace(manifest, scenario_hash="other", cells=tuple(cells))

    mixed = other(first, "mixed", edit, pace=0.5, device="Invented <GPU>", without="tidar-4-by-2")
    assert asked(first, mixed).exit_code == 3
    result = asked(first, mixed, "--cross-hardware", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    left = "Invented <GPU>: tidar 4 by 1 is left out: dtype is float32 here and bfloat16 in first."
    assert f"note: {left}" in result.output
    [page] = tmp_path.glob("compare-*/compare.html")
    html = page.read_text()
    assert "<GPU>" not in html
    assert "Invented &lt;GPU&gt;" in html
    assert "left out" in html
    assert "not run yet" in html, "a planned cell without a trial is not the same as one that was never planned"
    rows = list(csv.DictReader((page.parent / "compare.csv").open()))
    kept = {(row["run"], row["cell"]) for row in rows if row["metric"] == "decode_tps"}
    assert ("Invented <GPU>", "tidar-4-by-1") not in kept
    assert ("Invented CPU", "tidar-4-by-1") in kept


def test_cross_hardware_does_not_compare_other_prompts_or_weights(first: Path) -> None:
    for changes, reason in (
        ({"prompts_hash": "other"}, "its prompts, as token ids, are not those of first"),
        ({"models": {"invented-135m": {"hash": "other"}}}, "nothing in these runs is the same thing"),
    ):
        result = asked(first, other(first, "other", edited(scenario_hash="x", **changes)), "--cross-hardware")
        assert result.exit_code == 3
        assert reason in result.output


def test_missing_and_failed_cells_stay_visible(first: Path, tmp_path: Path) -> None:
    less = other(first, "less", lambda m: replace(m, cells=m.cells[:2]), device="Small", without="tidar-4-by-2")
    broken = write_run(
        first.parent / "broken", engines=ENGINES, prompts=6, repeats=1, tokens=16, failing=("tidar 4 by 1",)
    )
    result = asked(first, less, broken, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "note: Small has no tidar 4 by 2." in result.output
    [page] = tmp_path.glob("compare-*/compare.html")
    assert "not in this run" in page.read_text()
    assert "failed" in page.read_text()
    assert "out of &lt;memory&gt;" in page.read_text()


@pytest.mark.parametrize("what", ["nothing", "projection", "twice", "damaged"])
def test_bad_input_is_one_line(first: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / what
    folder.mkdir()
    if what == "projection":
        (folder / "projection.json").write_text("{}")
    if what == "damaged":
        (folder / "run.json").write_text("{")
    result = asked(first, first if what == "twice" else folder)
    assert result.exit_code == 2
    assert result.output.startswith("zbench: ")
    assert result.output.count("\n") == 1
    with pytest.raises(UserError):
        compare([first, first if what == "twice" else folder])


def test_json_has_every_number_with_its_interval(first: Path) -> None:
    result = asked(first, other(first, "half", pace=0.5), "--json")
    content = json.loads(result.output)
    speeds = [row for row in content["metrics"] if row["metric"] == "speed_against_first" and row["value"]]
    assert len(speeds) == 3
    assert all(row["value"] == pytest.approx(2) and row["n"] == 6 and row["low"] for row in speeds)
    assert {run["folder"] for run in content["runs"]} == {"first", "half"}
    assert any(row["metric"] == "throughput_per_device" for row in content["metrics"])


@pytest.mark.parametrize("gone", [True, False])
def test_what_a_run_lacks_is_said_on_the_terminal_and_in_the_json(first: Path, tmp_path: Path, gone: bool) -> None:
    empty = other(first, "empty")
    (empty / "trials.jsonl").unlink() if gone else (empty / "trials.jsonl").write_text("")
    lacking = "Invented CPU (empty): autoregressive was planned but not run: the run is incomplete."
    missing = "Invented CPU (empty): There is no trials.jsonl: no trial has ended yet."
    told = asked(empty, first, "--out", tmp_path)
    assert (told.exit_code, f"warning: {lacking}" in told.stderr) == (0, True)
    notes = json.loads(asked(empty, first, "--json").stdout)["notes"]
    assert lacking in notes and (missing in notes) == gone
    rendered = CliRunner().invoke(main, ["report", str(empty)])
    assert rendered.stdout.strip() == str(empty / "report.html")
    assert "warning: autoregressive was planned but not run: the run is incomplete." in rendered.stderr
    assert ("warning: There is no trials.jsonl: no trial has ended yet." in rendered.stderr) == gone


def test_a_run_that_was_cut_off_says_how_much_of_it_there_is(first: Path, tmp_path: Path) -> None:
    cut = other(first, "cut")
    lines = (cut / "trials.jsonl").read_text().splitlines(keepends=True)
    (cut / "trials.jsonl").write_text("".join(lines[:-1]))
    said = f"{len(lines) - 1} of {len(lines)} planned trials have ended"
    assert f"warning: Invented CPU (cut): {said}" in asked(first, cut, "--out", tmp_path).stderr
    assert any(said in note for note in json.loads(asked(first, cut, "--json").stdout)["notes"])
    [page] = tmp_path.glob("compare-*/compare.html")
    assert said in page.read_text()


def test_a_page_is_the_same_every_time(first: Path, tmp_path: Path) -> None:
    half = other(first, "half", pace=0.5)
    pages = []
    for name in ("one", "two"):
        assert asked(first, half, "--out", tmp_path / name).exit_code == 0
        [page] = (tmp_path / name).glob("compare-*/compare.html")
        pages.append(page.read_bytes())
    assert pages[0] == pages[1]


def test_it_says_why_runs_differ_only_once_they_do(first: Path) -> None:
    with pytest.raises(NotComparable):
        compare([first, other(first, "other", edited(scenario_hash="x"))])
    assert asdict(compare([first]).sides[0])["name"] == "Invented CPU"


@given(st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9)), min_size=1, max_size=12))
def test_the_frontier_holds_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    dots = [(x, y, str(i)) for i, (x, y) in enumerate(points)]
    kept = frontier(dots)
    for x, y, _ in dots:
        assert any(a >= x and b >= y for a, b, _ in kept)
    for one in kept:
        assert not any(o is not one and o[0] >= one[0] and o[1] >= one[1] for o in kept)
    assert [x for x, *_ in kept] == sorted(x for x, *_ in kept)
