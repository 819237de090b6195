"""Figures and sentences of sweeps, on invented runs whose rows, ridges and takeovers are worked out by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text

from tests.report.synthetic import GRID, RATE, READ, ROOFS, write_run
from tests.report.test_figures import assert_readable
from tests.test_compare import _paced
from zbench import metrics, projection, run, scenario
from zbench.compare import compare
from zbench.hardware.peaks import Peaks
from zbench.metrics import ALL_MEMORY, AT_LEAST
from zbench.records import CellRecord, ForwardRecord, ServedRecord, StepRecord, read_manifest, read_trials
from zbench.report import figures, html, readings, render, sweeps, vllm
from zbench.results import Results

WEIGHTS, KV, FLOPS = 250e6, 50e3, 250e6  # bytes; bytes per cached token; FLOPs per row
SAMPLERS = ("lossless", "logit_mix")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
MEMORY = WEIGHTS / READ  # seconds that reading the weights takes
RIDGE = WEIGHTS / READ / (FLOPS / RATE)  # rows
PLANNED = {"rows": list(ROWS)}


def forward(step: int, rows: int, seconds: float, context: float, batch: int = 1) -> ForwardRecord:
    return ForwardRecord(
        step,
        "target",
        "decode",
        rows,
        batch,
        context,
        FLOPS * rows * batch,
        WEIGHTS + batch * context * KV,
        0.0,
        seconds,
        1,
    )


def swept(
    folder: Path, time: Callable[[float, float], float], points: Sequence[dict[str, Any]] = ({},), engines: Any = ()
) -> Results:
    """A run with a sweep of rows beside invented engines; `time` makes seconds of (memory seconds, compute seconds)."""
    labels = ("autoregressive", *engines)
    write_run(folder, engines=labels, points=points, prompts=6, repeats=1)
    manifest, (trials, _) = read_manifest(folder), read_trials(folder)
    cells, extra = list(manifest.cells), []
    for own in [cell for cell in manifest.cells if cell.label == "autoregressive"]:
        cell = dataclasses.replace(
            own, id=own.id.replace("autoregressive", "forward"), label="forward", engine="forward", options=PLANNED,
            baseline=False,
        )  # fmt: skip
        cells.append(cell)
        for trial in [trial for trial in trials if trial.cell == own.id]:
            extra.append(dataclasses.replace(trial, cell=cell.id, **_records(cell, trial.group, time)))
    manifest = dataclasses.replace(manifest, cells=tuple(cells))
    (folder / "run.json").write_text(manifest.to_json())
    (folder / "trials.jsonl").write_text("".join(trial.to_json() + "\n" for trial in [*trials, *extra]))
    return Results.of(metrics.load_run(folder))


def _records(cell: CellRecord, group: int, time: Callable[[float, float], float]) -> dict[str, Any]:
    context, pace = cell.point.get("context", 0), 1 + 0.004 * group
    forwards = [forward(0, 4, 0.01, 0, cell.batch)]
    for step in (1, 2):
        for rows in ROWS:
            at = forward(step, rows, 0, context, cell.batch)
            seconds = time(at.bytes_read / READ, at.flops / RATE) * pace
            forwards.append(dataclasses.replace(at, seconds=seconds))
    spent = [sum(f.seconds for f in forwards if f.step == step) for step in (0, 1, 2)]
    steps = tuple(StepRecord(seconds, 0.0, 0.0, (1,) * cell.batch) for seconds in spent)
    return {"steps": steps, "forwards": tuple(forwards), "wall_seconds": sum(spent)}


def said(results: Results) -> str:
    return " ".join(sentence for _, sentences in readings.answers(results) for sentence in sentences)


def test_on_a_device_at_its_roofs_the_reading_gives_the_ridge_and_who_uses_its_rows(tmp_path: Path) -> None:
    found = swept(tmp_path, max, engines=("tidar 4 by 1", "tidar 8 by 8"))
    told = said(found)
    assert f"Decode is memory-bound up to {RIDGE:.1f} rows on this device (predicted" in told
    assert f"is at {RIDGE:.1f} rows" in told  # the knee: past it each row costs its arithmetic
    free = found.value(next(c for c in found.run.cells if c.record.engine == "forward"), "free_token_slots", "measured")
    assert free is not None
    assert f"{free:.1f} rows ride in a forward within 1.1×" in told
    assert free == pytest.approx(16 + 16 * 0.1 / (32 / RIDGE - 1))  # between 16 rows and 32, the first that cost more
    memory, compute = ([r for r in ROWS if (r < RIDGE) == below] for below in (True, False))
    assert (
        f"{memory[0]} to {memory[-1]} rows are memory-bound, {compute[0]} to {compute[-1]} rows are compute-bound"
        in told
    )
    # A forward of B drafts and P blocks of B masks has B (1 + P) rows.
    assert f"tidar 4 by 1 uses 8 of the {RIDGE:.1f} memory-bound rows." in told
    assert f"tidar 8 by 8 feeds 72 rows, {72 - RIDGE:.1f} more than the {RIDGE:.1f} memory-bound rows." in told


BEYOND = f"unavailable: {ALL_MEMORY} at {ROWS[-1]} rows, the most measured"


def with_rows(found: Results, metric: str, part: str, told: Sequence[tuple[float | None, str]]) -> Results:
    """The results as if that metric of rows had these values and notes, one for each cell that sweeps rows."""
    ids = [cell.record.id for cell in readings.sweeping(found.run.cells)]
    by_id = dict(zip(ids, told, strict=True))
    rows = []
    for row in found.rows:
        if (row.metric, row.part) == (metric, part) and row.cell in by_id:
            value, note = by_id[row.cell]
            row = dataclasses.replace(row, value=value, low=None, high=None, note=note)
        rows.append(row)
    return Results(found.run, tuple(rows))


@pytest.mark.parametrize(
    ("free", "sentence"),
    [
        (5.6, "feeds 8 rows, 2.4 more than the 5.6 free rows."),
        (7.96, "uses 8 of the 8 free rows."),
        (8.0, "uses 8 of the 8 free rows."),
        (7.6, "feeds 8 rows, 0.4 more than the 7.6 free rows."),
    ],
)
def test_rows_that_an_engine_feeds_and_those_that_are_free_are_rounded_alike(
    free: float, sentence: str, tmp_path: Path
) -> None:
    found = swept(tmp_path, lambda memory, compute: max(memory, compute) + 5 * MEMORY, engines=("tidar 4 by 1",))
    assert f"tidar 4 by 1 {sentence}" in said(with_rows(found, "free_token_slots", "measured", [(free, "")]))


def test_nothing_is_said_of_rows_beyond_the_most_that_were_measured(tmp_path: Path) -> None:
    engines = ("tidar 4 by 1", "tidar 8 by 8")
    found = swept(tmp_path, lambda memory, compute: max(memory, compute) + 5 * MEMORY, engines=engines)
    found = with_rows(found, "free_token_slots", "measured", [(32.0, AT_LEAST)])
    told = said(found)
    assert "tidar 4 by 1 uses 8 of the at least 32 free rows." in told
    assert "tidar 8 by 8 feeds 72 rows; at least 32 are free, the most measured." in told
    assert "more than" not in told
    [curve, curves] = [plot for plot in (*sweeps.PLOTS, *sweeps.OVERVIEWS) if plot.name in ("rows", "row-curves")]
    drawn = figures.figure(curve, figures.LIGHT, found, found.run.cells)
    assert "free: at least 32 rows" in [text.get_text() for text in drawn.findobj(Text)]
    assert curves.alt(found, found.run.cells).endswith("; at least 32.0 rows are free.")


def test_the_rows_of_all_points_say_where_memory_limits_all_that_were_measured(tmp_path: Path) -> None:
    found = swept(tmp_path, max, POINTS)
    some = with_rows(found, "ridge_rows", "roofs", [(40.0, ""), (60.5, ""), (None, BEYOND), (None, BEYOND)])
    assert readings._rows_everywhere(some)[0].startswith(
        "At the measured roofs memory limits decode up to 40 to 60.5 rows, by context and batch, and in 2 of 4 sweeps "
        "at all rows measured (predicted); "
    )
    every = with_rows(found, "ridge_rows", "roofs", [(None, BEYOND)] * 4)
    assert readings._rows_everywhere(every)[0].startswith(
        "At the measured roofs memory limits decode at all rows measured (predicted); "
    )


@pytest.mark.parametrize(("some", "words"), [((20.4, ""), "20.4 to at least 128"), ((128.0, AT_LEAST), "at least 128")])
def test_the_free_rows_of_all_points_are_at_least_the_most_measured(
    some: tuple[float, str], words: str, tmp_path: Path
) -> None:
    found = swept(tmp_path, max, POINTS)
    told = with_rows(found, "free_token_slots", "measured", [(128.0, AT_LEAST), some, some, some])
    assert f"; {words} rows ride in one forward within 1.1×" in readings._rows_everywhere(told)[0]
    alone = Results(told.run, tuple(row for row in told.rows if row.metric != "ridge_rows"))
    assert readings._rows_everywhere(alone) == [
        f"{words[0].upper()}{words[1:]} rows ride in one forward within 1.1× the time of one, as measured."
    ]


def test_overhead_is_said_to_be_overhead_and_its_points_are_left_out_of_the_error_of_predictions(
    tmp_path: Path,
) -> None:
    found = swept(tmp_path, lambda memory, compute: max(memory, compute) + 5 * MEMORY)
    told = said(found)
    assert "Decode is overhead-bound on this device: one row takes 6." in told
    assert f"would be memory-bound up to {RIDGE:.1f} rows (predicted)" in told
    points = readings.predictions(found)
    left = [p for p in points if p.bound == "overhead"]
    assert len(left) >= 5
    assert f"{len(left)} of {len(points)} " in told


def talking(folder: Path, share: float) -> Results:
    """The run as if two ranks had held the model and spent this share of every forward in collectives."""
    manifest = read_manifest(folder)
    cells = tuple(dataclasses.replace(cell, tensor=2) for cell in manifest.cells)
    (folder / "run.json").write_text(dataclasses.replace(manifest, cells=cells).to_json())
    trials = [
        dataclasses.replace(trial, forwards=tuple(
            dataclasses.replace(f, collective_seconds=share * f.seconds, collective_bytes=1e6) for f in trial.forwards
        ))
        for trial in read_trials(folder)[0]
    ]  # fmt: skip
    (folder / "trials.jsonl").write_text("".join(trial.to_json() + "\n" for trial in trials))
    return Results.of(metrics.load_run(folder))


def test_what_collectives_bound_is_said_drawn_and_left_out_of_the_error_of_predictions(tmp_path: Path) -> None:
    swept(tmp_path, lambda memory, compute: max(memory, compute) + 5 * MEMORY, engines=GRID)
    found = talking(tmp_path, 0.8)
    told = said(found)
    assert "Decode is communication-bound on this device: one row takes 6." in told
    assert "; 80% of it is in collectives." in told
    assert f"decode would be memory-bound up to {RIDGE:.1f} rows (predicted)" in told
    assert "Decode is memory-bound" not in told and "memory-bound rows" not in told
    points = readings.predictions(found)
    left = [p for p in points if p.bound == "communication"]
    assert len(left) >= 5 and not any(p.bound == "overhead" for p in points)
    assert f"{len(left)} of {len(points)} points are communication-bound and left out" in told
    render(tmp_path)
    for plot in (plot for plot in (*sweeps.PLOTS, *sweeps.OVERVIEWS) if plot.applies(found, found.run.cells)):
        assert_readable(figures.figure(plot, figures.LIGHT, found, found.run.cells))


@pytest.mark.parametrize(("share", "bound"), [(0.8, "communication"), (0.05, "overhead")])
def test_a_step_beyond_its_roofs_is_bound_by_what_takes_most_of_the_rest(
    tmp_path: Path, share: float, bound: str
) -> None:
    write_run(tmp_path, engines=("autoregressive",), points=({"batch": 1}, {"batch": 2}), prompts=2, repeats=1)
    trials = [_paced(trial, 5.0) for trial in read_trials(tmp_path)[0]]
    (tmp_path / "trials.jsonl").write_text("".join(trial.to_json() + "\n" for trial in trials))
    assert {point.bound for point in readings.predictions(talking(tmp_path, share))} == {bound}


def test_rows_that_memory_should_limit_and_collectives_do_are_not_said_to_be_memory_bound(tmp_path: Path) -> None:
    swept(tmp_path, lambda memory, compute: max(memory, compute) if compute < 4 * FLOPS / RATE else 3 * MEMORY)
    told = said(talking(tmp_path, 0.6))
    assert (
        "1 to 2 rows are memory-bound, 4 to 32 rows are communication-bound, 64 to 128 rows are compute-bound" in told
    )
    assert f"At its measured roofs decode would be memory-bound up to {RIDGE:.1f} rows (predicted)." in told
    assert "Decode is" not in told


def test_forwards_of_unknown_bound_are_drawn_as_such(tmp_path: Path) -> None:
    """As a metric says where a cache may have served them."""
    swept(tmp_path, max, engines=GRID)
    run = metrics.load_run(tmp_path)
    why = "unavailable: the last-level cache may have served it"
    rows = [
        dataclasses.replace(row, value=None, note=why)
        if row.metric == "bound" and not row.part.startswith("decode, 128") else row
        for row in metrics.summarise(run)
    ]  # fmt: skip
    found = Results(run, tuple(rows))
    told = said(found)
    assert "memory-bound" not in told.replace("memory- or compute-bound", "")
    assert "forwards of 128 rows are compute-bound" in told
    for plot in (plot for plot in (*sweeps.PLOTS, *sweeps.OVERVIEWS) if plot.applies(found, found.run.cells)):
        drawn = figures.figure(plot, figures.LIGHT, found, found.run.cells)
        assert_readable(drawn)
        alt = plot.alt(found, found.run.cells)
        assert ", -bound" not in alt
        if plot.name == "row-roofline":
            assert "not classified" in alt
            assert "not classified" in [text.get_text() for text in drawn.findobj(Text)]


@pytest.mark.parametrize(("rows", "bound"), [(4, "memory"), (64, "compute")])
def test_a_step_within_its_roofs_is_bound_by_them_though_its_main_forward_is_not(
    tmp_path: Path, rows: int, bound: str
) -> None:
    """A drafter at its roof makes up for a target at 2.2 times its own."""
    write_run(tmp_path, engines=("autoregressive", "chain drafter"), points=({}, {"batch": 2}), prompts=2, repeats=1)
    floor = max(WEIGHTS / READ, rows * FLOPS / RATE)
    trials = []
    for trial in read_trials(tmp_path)[0]:
        forwards = []
        for step in range(len(trial.steps)):
            target = dataclasses.replace(forward(step, rows, 2.2 * floor, 0), role="verify" if step else "prefill")
            drafts = dataclasses.replace(target, model="drafter", role="draft", seconds=floor)
            forwards += [target, drafts] if trial.cell.startswith("chain") else [target]
        steps = [dataclasses.replace(step, seconds=3.2 * floor) for step in trial.steps]
        trials.append(dataclasses.replace(trial, forwards=tuple(forwards), steps=tuple(steps)))
    (tmp_path / "trials.jsonl").write_text("".join(trial.to_json() + "\n" for trial in trials))
    found = Results.of(metrics.load_run(tmp_path))
    [drafting, *_] = [cell for cell in found.run.cells if cell.record.label == "chain drafter"]
    assert found.row(drafting, "bound", f"verify, {rows} rows").value == "overhead"
    assert {p.bound for p in readings.predictions(found) if "chain drafter" in p.name} == {bound}
    assert {p.bound for p in readings.predictions(found) if "autoregressive" in p.name} == {"overhead"}


def test_predictions_at_the_share_of_the_roof_that_others_reach_leave_out_the_own_time(tmp_path: Path) -> None:
    found = swept(tmp_path, lambda memory, compute: max(memory / 0.8, compute / 0.6))
    points = [p for p in readings.predictions(found) if "forward" in p.name]
    shares, errors = readings.calibrated_errors(points)
    assert shares["memory"] == pytest.approx(0.79, abs=0.02)
    assert shares["compute"] == pytest.approx(0.59, abs=0.02)
    assert np.median(errors) < 0.03 < 0.18 < np.median([p.error for p in points])
    [first, *rest] = [p for p in points if p.bound == "memory"]
    slow = [dataclasses.replace(first, measured=first.measured * 3), *rest]
    assert readings.calibrated_errors(slow)[1][0] == pytest.approx(2 / 3, abs=0.03)  # it cannot excuse itself


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), max_size=12))
def test_shares_of_a_roof_are_those_of_its_own_points(pairs: list[tuple[float, float]]) -> None:
    points = [readings.Predicted("p", measured, predicted, "memory") for measured, predicted in pairs]
    shares, errors = readings.calibrated_errors(points)
    assert list(shares) == (["memory"] if points else [])
    assert len(errors) == (len(points) if len(points) > 2 else 0)
    assert all(error >= 0 for error in errors)


def test_the_best_number_of_proposals_is_that_of_the_highest_speed_with_its_interval(tmp_path: Path) -> None:
    write_run(tmp_path, engines=("autoregressive", *GRID), prompts=8, repeats=1)
    found = Results.of(metrics.load_run(tmp_path))
    blocks = readings.by_block(found, found.run.cells)
    assert {key: list(mine) for key, mine in blocks.items()} == {(4, ""): [1, 2, 4], (8, ""): [1, 2, 8]}
    for (block, _), mine in blocks.items():
        best = readings.best(block, mine)
        assert best is not None
        assert found.value(best.cell, "speedup") == max(found.value(cell, "speedup") or 0 for cell in mine.values())
        assert best.low is not None and best.high is not None
        assert best.low <= best.proposals <= best.high
        assert f"Blocks of {block} are fastest with {best.proposals} proposal" in said(found)


def test_no_number_of_proposals_is_the_best_where_no_prompt_was_decoded_with_all_of_them(tmp_path: Path) -> None:
    write_run(tmp_path, engines=("autoregressive", *GRID), prompts=6, repeats=1)
    kept = {"tidar-4-by-1": range(3), "tidar-4-by-2": range(3, 6)}  # every other trial of the two failed
    failed = [
        dataclasses.replace(trial, status="error", error="out of memory", requests=(), steps=(), forwards=())
        if trial.group not in kept.get(trial.cell, range(6)) else trial
        for trial in read_trials(tmp_path)[0]
    ]  # fmt: skip
    (tmp_path / "trials.jsonl").write_text("".join(trial.to_json() + "\n" for trial in failed))
    found = Results.of(metrics.load_run(tmp_path))
    assert list(readings.by_block(found, found.run.cells)) == [(4, ""), (8, "")]
    told = said(found)
    assert "Blocks of 8 are fastest with" in told and "Blocks of 4" not in told
    assert "Every number of proposals" in render(tmp_path).read_text()
    [plot] = [plot for plot in sweeps.PLOTS if plot.name == "proposals"]
    axes = figures.figure(plot, figures.LIGHT, found, found.run.cells).axes[0]
    assert len([line for line in axes.lines if line.get_markerfacecolor() == "none"]) == 1
    four, eight = plot.alt(found, found.run.cells).split("; ")
    assert "best" not in four and "best" in eight


def test_no_proposals_that_were_measured_stand_at_0_in_place_of_the_baseline(tmp_path: Path) -> None:
    write_run(tmp_path, engines=("autoregressive", *GRID), prompts=6, repeats=1)
    manifest = read_manifest(tmp_path)
    cells = tuple(
        dataclasses.replace(cell, options={**cell.options, "proposals": 0}) if cell.label == "tidar 4 by 1" else cell
        for cell in manifest.cells
    )
    (tmp_path / "run.json").write_text(dataclasses.replace(manifest, cells=cells).to_json())
    found = Results.of(metrics.load_run(tmp_path))
    [plot] = [plot for plot in sweeps.PLOTS if plot.name == "proposals"]
    axes = figures.figure(plot, figures.LIGHT, found, found.run.cells).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    four, eight = lines["block 4"], lines["block 8"]
    assert (list(four.get_xdata()), list(eight.get_xdata())) == ([0, 2, 4], [0, 1, 2, 8])
    own = readings.by_block(found, found.run.cells)[4, ""][0]
    assert (four.get_ydata()[0], eight.get_ydata()[0]) == (found.value(own, "speedup"), 1)


MIXED = {1: 0.9, 2: 0.3, 4: 0.6}  # the time of one token over that of the lossless engine with as many proposals


def mixing(folder: Path, **changes: Any) -> Results:
    """Blocks of 4 as lossless engines, and as engines with other options that take `MIXED` of their time."""
    write_run(folder, engines=("autoregressive", *(f"tidar 4 by {n}" for n in MIXED)), prompts=6, repeats=1)
    manifest, (trials, _) = read_manifest(folder), read_trials(folder)
    cells, extra = list(manifest.cells), []
    for own in [cell for cell in manifest.cells if cell.engine == "diffusion"]:
        options = {**own.options, **changes}
        cells.append(dataclasses.replace(own, id=f"{own.id}-mixed", label=f"{own.label} mixed", options=options))
        pace = MIXED[int(own.label[-1])]
        mine = [trial for trial in trials if trial.cell == own.id]
        extra += [dataclasses.replace(_paced(trial, pace), cell=cells[-1].id) for trial in mine]
    (folder / "run.json").write_text(dataclasses.replace(manifest, cells=tuple(cells)).to_json())
    (folder / "trials.jsonl").write_text("".join(trial.to_json() + "\n" for trial in [*trials, *extra]))
    return Results.of(metrics.load_run(folder))


def test_the_best_number_of_proposals_is_told_for_engines_that_differ_in_nothing_else(tmp_path: Path) -> None:
    found = mixing(tmp_path, sampler="logit_mix")
    lossless, mixed = ([c for c in found.run.cells if c.record.options.get("sampler") == each] for each in SAMPLERS)
    assert readings.by_block(found, found.run.cells) == {
        (4, f"sampler {sampler}"): {readings.proposals_of(cell): cell for cell in cells}
        for sampler, cells in zip(SAMPLERS, (lossless, mixed), strict=True)
    }
    told = said(found)
    assert "Blocks of 4 with sampler lossless are fastest with 1 proposal (" in told
    assert "Blocks of 4 with sampler logit_mix are fastest with 2 proposals (" in told
    [plot] = [plot for plot in sweeps.PLOTS if plot.name == "proposals"]
    drawn = figures.figure(plot, figures.LIGHT, found, found.run.cells)
    assert_readable(drawn)
    names = {line.get_label() for line in drawn.axes[0].lines}
    assert {"block 4, sampler lossless", "block 4, sampler logit_mix"} <= names
    assert plot.alt(found, found.run.cells).count("block 4, sampler") == 2


def test_an_execution_that_only_some_cells_name_sets_them_apart(tmp_path: Path) -> None:
    found = mixing(tmp_path, execution="graph")
    assert list(readings.by_block(found, found.run.cells)) == [(4, "execution auto"), (4, "execution graph")]


def test_the_cache_takes_over_where_it_is_as_large_as_the_weights(tmp_path: Path) -> None:
    points = [{"context": context} for context in (64, 1024, 4096)]
    found = swept(tmp_path, max, points)
    cells = [c for c in found.run.cells if c.record.label == "autoregressive"]
    grown = [
        dataclasses.replace(cell, forwards=cell.forwards.assign(context=(c := cell.record.point["context"]), batch=1,
                                                                bytes=WEIGHTS + 2 * c * KV, flops=FLOPS + c * 10.0))
        for cell in cells
    ]  # fmt: skip
    told = readings.traffic(grown)
    assert told is not None
    assert (told.fixed, told.per_token) == pytest.approx((WEIGHTS, 2 * KV))
    assert told.takeover == pytest.approx(2500)
    assert sweeps._seconds(told, grown[0], 131_072) == pytest.approx((WEIGHTS + 2 * 131_072 * KV) / READ)
    bent = [grown[0], grown[1], dataclasses.replace(grown[2], forwards=grown[2].forwards.assign(bytes=WEIGHTS * 1.2))]
    assert readings.traffic(bent) is None  # a sliding window: no straight line, so nothing is continued


def test_a_prompt_left_as_long_as_it_is_has_no_place_on_an_axis_of_contexts(tmp_path: Path) -> None:
    write_run(tmp_path, engines=("autoregressive",), points=[{"context": c} for c in (None, 64, 1024)], prompts=2)
    found = Results.of(metrics.load_run(tmp_path))
    [line] = readings.varied(found, "context").values()
    assert [cell.record.point["context"] for cell in line] == [64, 1024]
    page = render(tmp_path).read_text()
    assert (tmp_path / "figures" / "context.svg").exists()
    assert "context None" in page  # its tables stay


def test_two_lengths_of_which_one_is_not_set_are_no_sweep_of_contexts(tmp_path: Path) -> None:
    write_run(tmp_path, engines=("autoregressive",), points=[{"context": None}, {"context": 256}], prompts=2)
    found = Results.of(metrics.load_run(tmp_path))
    assert not readings.varied(found, "context")
    render(tmp_path)
    assert not (tmp_path / "figures" / "context.svg").exists()


def test_tokens_per_second_of_a_load_count_from_its_first_token_to_its_last(tmp_path: Path) -> None:
    """Four requests of 1 s and 11 tokens each, one after another at the server: not 40 tokens in a second."""
    write_run(tmp_path, engines=("autoregressive",), prompts=1, repeats=1, points=({"batch": 4},))
    [trial], _ = read_trials(tmp_path)
    waiting = tuple(
        dataclasses.replace(
            r, output_ids=(1,) * 11, ttft_seconds=0.25, end_seconds=1.25,
            served=ServedRecord(1.25 * place, 0.0, (0.25, 1.25), 11, "server"),
        )
        for place, r in enumerate(trial.requests)
    )  # fmt: skip
    load = dataclasses.replace(trial, requests=waiting, steps=(), forwards=())
    (tmp_path / "trials.jsonl").write_text(load.to_json() + "\n")
    [cell] = metrics.load_run(tmp_path).cells
    assert readings.together(cell) == pytest.approx(40 / 4.75)


@pytest.mark.parametrize("axis", ["batch", "context"])
def test_points_are_joined_from_left_to_right_however_the_matrix_lists_them(axis: str, tmp_path: Path) -> None:
    write_run(tmp_path, engines=("autoregressive",), points=[{axis: value} for value in (8, 1, 4)], prompts=2)
    found = Results.of(metrics.load_run(tmp_path))
    [plot] = [plot for plot in sweeps.OVERVIEWS if plot.name == axis]
    lines = [line.get_xdata() for line in figures.figure(plot, figures.LIGHT, found, found.run.cells).axes[0].lines]
    assert [list(x) for x in lines if len(x) == 3] == [[1, 4, 8]] * 2  # as measured, and at the roofs


POINTS: list[dict[str, Any]] = [{"batch": batch, "context": context} for batch in (1, 4) for context in (64, 4096)]


@pytest.fixture(scope="module", params=["at the roofs", "overhead", "many points"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("run")
    if request.param == "overhead":
        return swept(folder, lambda memory, compute: max(memory, compute) + 9 * MEMORY, engines=GRID)
    return swept(
        folder, max, POINTS if request.param == "many points" else ({},), () if "many" in request.param else GRID
    )


@pytest.mark.parametrize("plot", [pytest.param(plot, id=plot.name) for plot in (*sweeps.PLOTS, *sweeps.OVERVIEWS)])
def test_no_text_of_a_sweep_lies_upon_another(plot: figures.Plot, results: Results) -> None:
    several = len(results.points) > 1
    cells = results.run.cells if plot in sweeps.OVERVIEWS else results.points[0].cells
    if plot.applies(results, cells):
        assert_readable(figures.figure(plot, figures.LIGHT, results, cells))
        assert plot.alt(results, cells).endswith(".")
    else:
        assert plot.name in ({"proposals"} if several else {"row-curves", "batch", "context"})


def test_a_page_tells_every_number_of_rows_and_labels_what_is_predicted(tmp_path: Path) -> None:
    found = swept(tmp_path, max, engines=GRID)
    page = render(tmp_path).read_text()
    [table] = [html._row_table(found, c) for c in readings.sweeping(found.run.cells)]
    assert [line.name for line in table.rows] == [f"{r} row{'s' if r > 1 else ''}" for r in ROWS]
    assert "Floor (predicted)" in page and "Step at the roofs (predicted)" in page
    assert "the ridge" not in page.split("</style>")[0]
    assert (tmp_path / "figures" / "rows.svg").exists() and (tmp_path / "figures" / "prediction.svg").exists()


def test_without_roofs_a_sweep_still_tells_its_free_rows(tmp_path: Path) -> None:
    swept(tmp_path, max)
    manifest = dataclasses.replace(read_manifest(tmp_path), roofs=None)
    (tmp_path / "run.json").write_text(manifest.to_json())
    found = Results.of(metrics.load_run(tmp_path))
    told = said(found)
    assert "rows ride in a forward" in told and "memory-bound" not in told and "predicted" not in told
    [cell] = readings.sweeping(found.run.cells)
    plots = [plot.name for plot in (*sweeps.PLOTS, *sweeps.OVERVIEWS) if plot.applies(found, found.run.cells)]
    assert plots == ["rows"]
    assert_readable(figures.figure(sweeps.PLOTS[0], figures.LIGHT, found, [cell]))


TINY = """\
name: tiny
model:
  config: {family: llama, layers: 2, width: 64, ffn: 96, heads: 4, kv_heads: 2, vocab: 260, max_positions: 512}
  weights: random
dtype: float32
device: cpu
engines:
  - autoregressive
  - {name: forward, rows: [1, 4, 32]}
  - {name: diffusion, block_size: 4, synthetic: {length: 4}}
prompts: {set: quickstart, limit: 1}
context: 40
output_tokens: 3
ignore_eos: true
repeats: 1
threads: 1
"""


def test_what_a_report_predicts_is_what_a_projection_at_the_same_roofs_predicts(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(TINY)
    wanted = scenario.load(tmp_path / "s.yaml")
    manifest, trials = run.in_memory(wanted)
    roofs = {"bandwidth": {"read": ROOFS["bandwidth"]["read"]}, "flops": {"float32": ROOFS["flops"]["bfloat16"]}}
    (tmp_path / "run.json").write_text(dataclasses.replace(manifest, roofs=roofs).to_json())
    (tmp_path / "trials.jsonl").write_text("".join(trial.to_json() + "\n" for trial in trials))
    found = Results.of(metrics.load_run(tmp_path))
    peaks = Peaks("here", "measured", READ, {"float32": RATE}, {})
    [point] = projection.project(wanted, peaks).points
    autoregressive, rows, _ = found.run.cells
    steps = {step.label: step for step in point.engines}
    mine = found.value(autoregressive, "predicted_step_seconds")
    assert mine == pytest.approx(steps["autoregressive"].predicted_step_seconds, rel=0.01)  # its context grows by one
    for forward in steps[rows.record.label].forwards:
        floor = found.value(rows, "floor_seconds", readings.row_kind(forward.rows))
        assert floor == pytest.approx(forward.predicted_seconds, rel=0.01)
    assert steps[rows.record.label].predicted_step_seconds is None


def test_of_a_sweep_of_forwards_no_ratio_is_taken_and_no_speed_is_exported(tmp_path: Path) -> None:
    for name in ("first", "again"):
        swept(tmp_path / name, max)
    found = compare([tmp_path / "first", tmp_path / "again"])
    assert found.ratio(found.sides[1], "autoregressive").value == pytest.approx(1)
    assert "different numbers of rows" in found.ratio(found.sides[1], "forward").note
    assert [path.stem for path in vllm.export(tmp_path / "first", None, detailed=False)] == ["autoregressive"]


def test_a_forward_that_waited_changes_neither_the_verdict_nor_the_table_nor_the_figure(tmp_path: Path) -> None:
    """Of three forwards of one row one waits: their mean is 17 times their median, which t(R) / t(1) is of."""
    found = swept(tmp_path, max)
    trials, _ = read_trials(tmp_path)
    waited = []
    for trial in trials:
        if trial.cell == "forward":
            step = trial.steps[-1]
            late = [f for f in trial.forwards if f.step == 2]
            late = [dataclasses.replace(f, step=3, seconds=f.seconds * (50 if f.rows == 1 else 1)) for f in late]
            step = dataclasses.replace(step, seconds=sum(f.seconds for f in late))
            trial = dataclasses.replace(
                trial, steps=(*trial.steps, step), forwards=(*trial.forwards, *late),
                wall_seconds=trial.wall_seconds + step.seconds,
            )  # fmt: skip
        waited.append(trial)
    (tmp_path / "trials.jsonl").write_text("".join(trial.to_json() + "\n" for trial in waited))
    again = Results.of(metrics.load_run(tmp_path))
    told, table = said(again), html._row_table(again, readings.sweeping(again.run.cells)[0])
    assert "overhead-bound" not in told and told == said(found)
    times = {rows: again.value(again.run.cells[-1], "forward_seconds", readings.row_kind(rows)) or 0 for rows in ROWS}
    for line, rows in zip(table.rows, ROWS, strict=True):
        ratio = again.value(again.run.cells[-1], "row_cost", str(rows)) or 0
        assert times[rows] / times[1] == pytest.approx(ratio, rel=1e-3)
        assert line.entries[0].text == figures.quantity(times[rows], "s")
        assert line.entries[-1].text == ("memory" if rows < RIDGE else "compute")
