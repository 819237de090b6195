"""What a sweep says in words: how many rows ride along, who uses them, what takes over, how good predictions were."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from zbench import stats
from zbench.metrics import ALL_MEMORY, AT_LEAST, OVERHEAD, Cell, caveats
from zbench.records import TrialRecord
from zbench.report import findings
from zbench.report.findings import clusters, interval, quantity, title
from zbench.results import Point, Results, main_kind

ROOFS = ("memory", "compute")  # what bounds a forward that keeps to its roofs; else it is overhead or communication
ENOUGH = 5  # points, below which an error of predictions is not summarised
NAMED = 3  # engines that a sentence on rows names at most


def answers(results: Results) -> list[tuple[str, list[str]]]:
    """(point, sentences) as `findings.answers`, with what the sweeps of the run say; first what concerns all points."""
    if not any(cell.trials for cell in results.run.cells):
        return findings.answers(results)
    told = dict(findings.answers(results))
    found = [("", _everywhere(results))] if _everywhere(results) else []
    for point in results.points:
        rows = [sentence for cell in sweeping(point.cells) for sentence in row_sentences(results, cell, point)]
        only_rows = all(cell.record.engine == "forward" for cell in point.cells)
        sentences = [*rows, *([] if only_rows and rows else told[point.label]), *best_sentences(results, point)]
        found.append((point.label, sentences))
    if len(results.points) == 1 and len(found) == 2:  # one point: everything concerns it
        return [("", [*found[1][1], *found[0][1]])]
    return found


def sweeping(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that time forwards of several numbers of rows."""
    return [cell for cell in cells if cell.record.engine == "forward" and not cell.decode_forwards.empty]


# Rows ----------------------------------------------------------------------------------------------------------------


def row_kind(rows: int) -> str:
    """The kind of a decode forward of so many rows."""
    return f"decode, {rows} row{'s' if rows != 1 else ''}"


def row_bounds(results: Results, cell: Cell) -> dict[int, str]:
    """What limits a forward of so many rows, as the metric `bound`; "" where that is not known."""
    rows = sorted(int(rows) for rows in cell.decode_forwards["rows"].unique())
    return {count: str(results.row(cell, "bound", row_kind(count)).value or "") for count in rows}


def row_sentences(results: Results, cell: Cell, point: Point) -> list[str]:
    return [
        *filter(None, (_memory_bound(results, cell), _free(results, cell), _bounds(results, cell))),
        *_users(results, cell, point),
    ]


def _memory_bound(results: Results, cell: Cell) -> str:
    """Up to how many rows memory limits a forward; "" where it is not known what limits that of one row."""
    ridge, bounds = results.row(cell, "ridge_rows", "roofs"), row_bounds(results, cell)
    one = bounds.get(1, "")
    if not one:
        return ""
    most = cell.decode_forwards["rows"].max()
    if isinstance(ridge.value, float):
        limited = f"memory-bound up to {_rows(ridge.value)}" if ridge.value > 1 else "compute-bound from the first row"
    else:
        limited = f"memory-bound at all {most} rows measured"
    would = f"At its measured roofs decode would be {limited} (predicted)."
    if one not in ROOFS:
        measured, floor = (results.value(cell, name, row_kind(1)) or 0 for name in ("forward_seconds", "floor_seconds"))
        talking = results.value(cell, "communication_share", row_kind(1)) or 0
        why = findings.waiting(results) if one == "overhead" else f"; {quantity(talking, '1')} of it is in collectives"
        return (
            f"Decode is {one}-bound on this device: one row takes {measured / floor:.1f}× what memory or arithmetic "
            f"alone would need{why}. {would}"
        )
    below = [bound for rows, bound in bounds.items() if not isinstance(ridge.value, float) or rows <= ridge.value]
    if any(bound not in ROOFS for bound in below):
        return would
    return f"Decode is {limited} on this device (predicted from its measured roofs)."


def _free(results: Results, cell: Cell) -> str:
    free, knee = results.row(cell, "free_token_slots", "measured"), results.row(cell, "ridge_rows", "measured")
    if not isinstance(free.value, float):
        return ""
    rows, around = f"{at_least(free).capitalize()}{free.value:.1f} rows", _around(cell, free)
    said = f"{rows} ride in a forward within 1.1× the time of one, as measured ({around})"
    if not isinstance(knee.value, float):
        return f"{said}."
    return f"{said}; the curve’s knee, where further rows cost as much as the first, is at {_rows(knee.value)}."


def at_least(rows: findings.MetricRow) -> str:
    """What stands before a number of rows that is the most measured."""
    return "at least " if AT_LEAST in rows.note else ""


def _count(rows: float) -> str:
    return f"{rows:.1f}".removesuffix(".0")


def _rows(count: float) -> str:
    return f"{_count(count)} row{'s' if _count(count) != '1' else ''}"


def _around(cell: Cell, row: findings.MetricRow) -> str:
    return f"95% interval {interval(row)}" if interval(row) else f"{clusters(cell, row.n)}: too few for an interval"


def _bounds(results: Results, cell: Cell) -> str:
    bounds = row_bounds(results, cell)
    runs = [(bound, [rows for rows, _ in run]) for bound, run in groupby(bounds.items(), lambda item: item[1]) if bound]
    if not runs:
        return ""
    parts = [
        f"{rows[0]} to {rows[-1]} rows are {bound}-bound" if len(rows) > 1 else f"{_rows(rows[0])} are {bound}-bound"
        for bound, rows in runs
    ]
    return f"As measured, forwards of {', '.join(parts)}."


def _users(results: Results, cell: Cell, point: Point) -> list[str]:
    """What the fastest drafting engines of the point make of the rows that memory limits, or that are free."""
    limited = row_bounds(results, cell).get(1) == "memory"
    row, what = results.row(cell, "ridge_rows", "roofs"), "memory-bound rows"
    if not limited or not isinstance(row.value, float):
        row, what = results.row(cell, "free_token_slots", "measured"), "free rows"
    if not isinstance(row.value, float):
        return []
    limit, more = round(row.value, 1), at_least(row)
    drafting = [(fed, other) for other in point.cells if (fed := fed_rows(results, other))]
    drafting.sort(key=lambda pair: -(results.value(pair[1], "speedup") or 0))
    said = []
    for fed, other in drafting[:NAMED]:
        fed = round(fed, 1)
        if fed <= limit:
            said.append(f"{title(other)} uses {_count(fed)} of the {more}{_count(limit)} {what}.")
        elif more:
            said.append(f"{title(other)} feeds {_rows(fed)}; at least {_count(limit)} are free, the most measured.")
        else:
            over = _count(fed - limit)
            said.append(f"{title(other)} feeds {_rows(fed)}, {over} more than the {_count(limit)} {what}.")
    return said


def fed_rows(results: Results, cell: Cell) -> float | None:
    """Mean rows per sequence of the forward that verifies drafts; None where nothing is drafted."""
    if cell.verifies.empty:
        return None
    return results.value(cell, "rows_per_forward", "draft+verify") or results.value(cell, "rows_per_forward", "verify")


# Proposals -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Best:
    """The number of proposals with the most tokens/s for one block size. low to high: where it lies in 95% of the
    resamples of the prompts; None with too few prompts."""

    block: int
    proposals: int
    cell: Cell
    low: int | None = None
    high: int | None = None


def proposals_of(cell: Cell) -> int | None:
    """Blocks that single-pass diffusion proposes per forward behind a chain; None for other engines, trees, and where
    the text is asked first."""
    options = cell.record.options
    of_others = options.get("tokens") or options.get("lookup")
    if cell.record.engine != "diffusion" or options["sampler"] == "denoise" or of_others:
        return None
    return int(
        options["block_size"] if options["proposals"] == "all" else min(options["proposals"], options["block_size"])
    )


def families(cells: Sequence[Cell]) -> dict[tuple[int, str], list[Cell]]:
    """Cells that propose blocks, by block size and by what else sets them apart from others of that size: "sampler
    logit_mix"; "" where nothing does. Those of one family differ in their number of proposals only."""
    sizes: dict[int, list[Cell]] = {}
    for cell in cells:
        if proposals_of(cell) is not None:
            sizes.setdefault(cell.record.options["block_size"], []).append(cell)
    found: dict[tuple[int, str], list[Cell]] = {}
    for block, mine in sorted(sizes.items()):
        options = [{key: json.dumps(value) for key, value in cell.record.options.items()} for cell in mine]
        keys = dict.fromkeys(key for each in options for key in each if key != "proposals")
        apart = [key for key in keys if len({each.get(key) for each in options}) > 1]  # a usual execution is left out
        for cell, each in zip(mine, options, strict=True):
            words = ", ".join(f"{key} {each.get(key, 'auto')}".replace('"', "") for key in apart)
            found.setdefault((block, words), []).append(cell)
    return found


def by_block(results: Results, cells: Sequence[Cell]) -> dict[tuple[int, str], dict[int, Cell]]:
    """Family -> proposals -> cell, of families that were measured with three numbers of proposals or more."""
    found: dict[tuple[int, str], dict[int, Cell]] = {}
    for family, mine in families(cells).items():
        counts = {proposals_of(cell) or 0: cell for cell in mine if results.value(cell, "speedup") is not None}
        if len(counts) > 2:
            found[family] = dict(sorted(counts.items()))
    return found


def best(block: int, mine: Mapping[int, Cell]) -> Best | None:
    """Of the speedups paired by prompt: prompts are resampled, and each resample has its own best number. None where no
    prompt was decoded with every number."""
    counts = list(mine)
    logs = [_log_speedups(mine[count]) for count in counts]
    groups = sorted(set.intersection(*(set(each) for each in logs)))
    if not groups:
        return None
    table = np.array([[each[group] for group in groups] for each in logs]).T  # [groups, counts]
    numbers = np.array(counts, dtype=float)
    estimate = stats.resampled(table, groups, lambda means: numbers[means.argmax(-1)])
    value = int(estimate.value or 0)
    low, high = (None if edge is None else round(edge) for edge in (estimate.low, estimate.high))
    return Best(block, value, mine[value], low, high)


def _log_speedups(cell: Cell) -> dict[int, float]:
    """Log speedup over the baseline by group of prompts, mean over repeats."""
    pairs = cell.timed_pairs
    theirs = pairs["decode_seconds_baseline"] / pairs["later_baseline"]
    logs = np.log(theirs / (pairs["decode_seconds"] / pairs["later"]))
    return {int(group): float(log) for group, log in logs.groupby(pairs["group"]).mean().items()}


def best_sentences(results: Results, point: Point) -> list[str]:
    said = []
    for (block, apart), mine in by_block(results, point.cells).items():
        found = best(block, mine)
        if found is None:
            continue
        row = results.row(found.cell, "speedup")
        if found.low is None or found.high is None:
            around = f"{clusters(found.cell, row.n)}: too few for an interval"
        else:
            around = f"95% interval {found.low}" + (f" to {found.high}" if found.high > found.low else "")
        needed, gained = (
            results.value(found.cell, "break_even_acceptance"),
            results.value(found.cell, "tokens_per_forward"),
        )
        pays = f", {gained:.2f} tokens per forward where {needed:.2f} break even" if needed and gained else ""
        synthetic = f"; {', '.join(caveats(found.cell.record))}" if caveats(found.cell.record) else ""
        count = f"{found.proposals} proposal{'s' if found.proposals != 1 else ''}"
        family = f"Blocks of {block}" + (f" with {apart}" if apart else "")
        said.append(
            f"{family} are fastest with {count} ({around}): {quantity(float(row.value or 0), 'ratio')} as fast"
            f" as the baseline{pays}{synthetic}."
        )
    return said


# Batch and context ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes of an autoregressive forward by context C at one batch: fixed + per_token C, fitted to what was counted."""

    batch: int
    fixed: float  # weights, logits, new keys and values
    per_token: float  # the caches of all sequences
    flops: tuple[float, float]  # the same of FLOPs

    @property
    def takeover(self) -> float:
        """Context from which the cache is more than half of the traffic."""
        return self.fixed / self.per_token


def traffic(cells: Sequence[Cell]) -> Traffic | None:
    """From the baseline's forwards at several contexts and one batch. None where they do not grow evenly (as with
    sliding windows), or there are not enough."""
    forwards = [cell.decode_forwards for cell in cells if cell.record.baseline and not cell.forwards.empty]
    if len(forwards) < 2 or any(cell.record.engine != "autoregressive" for cell in cells if cell.record.baseline):
        return None
    context = np.concatenate([f["context"].to_numpy() for f in forwards])
    fits = []
    for column in ("bytes", "flops"):
        y = np.concatenate([f[column].to_numpy(dtype=float) for f in forwards])
        slope, fixed = np.polyfit(context, y, 1)
        if slope <= 0 or np.abs(slope * context + fixed - y).max() > 0.01 * y.max():
            return None
        fits.append((float(fixed), float(slope)))
    return Traffic(cells[0].record.batch, *fits[0], flops=fits[1])


def varied(results: Results, axis: str) -> dict[tuple[tuple[str, object], ...], list[Cell]]:
    """Measured cells by all axes but this one, ascending on it, where it takes several values: the lines of a scaling
    figure. What is null there, as the context of prompts left as they are, has no place on it."""
    found: dict[tuple[tuple[str, object], ...], list[Cell]] = {}
    for cell in results.run.cells:
        if cell.record.point.get(axis) is not None and cell.trials and cell.record.engine != "forward":
            rest = tuple((key, repr(value)) for key, value in sorted(cell.record.point.items()) if key != axis)
            found.setdefault((("engine", cell.record.label), *rest), []).append(cell)
    return {
        key: sorted(cells, key=lambda cell: cell.record.point[axis])
        for key, cells in found.items()
        if len({cell.record.point[axis] for cell in cells}) > 1
    }


def together(cell: Cell) -> float | None:
    """Tokens/s of all sequences in decode, from the first one's first token to the last one's last; of whole batches,
    where there is one."""
    trials = [trial for trial in cell.trials if len(trial.requests) == cell.record.batch] or cell.trials
    tokens = sum(sum(trial.later) for trial in trials)
    seconds = sum(_decoding_seconds(trial) for trial in trials)
    return tokens / seconds if tokens and seconds > 0 else None


def _decoding_seconds(trial: TrialRecord) -> float:
    """From the first token of all sequences to the last; a served request's times begin when it was due."""
    begun = [(r, r.served.due_seconds if r.served else 0.0) for r in trial.requests]
    return max(at + r.end_seconds for r, at in begun) - min(at + r.ttft_seconds for r, at in begun)


def _everywhere(results: Results) -> list[str]:
    return [
        *_rows_everywhere(results),
        *_context_sentences(results),
        *_batch_sentences(results),
        *prediction_sentences(results),
    ]


def _rows_everywhere(results: Results) -> list[str]:
    """The rows of all points in one sentence; nothing where only one has any, which says it itself."""
    cells = sweeping(results.run.cells)
    if len(cells) < 2:
        return []

    ridges, free = (
        [results.row(cell, metric, part) for cell in cells]
        for metric, part in (("ridge_rows", "roofs"), ("free_token_slots", "measured"))
    )
    beyond = sum(ALL_MEMORY in row.note for row in ridges)
    some = "" if beyond == len(cells) else f"in {beyond} of {len(cells)} sweeps "
    limits = [
        f"up to {_span(ridges)} rows, by context and batch" if _span(ridges) else "",
        f"{some}at all rows measured" if beyond else "",
    ]
    limited = ", and ".join(filter(None, limits))
    parts = [
        f"At the measured roofs memory limits decode {limited} (predicted)" if limited else "",
        f"{_span(free)} rows ride in one forward within 1.1× the time of one, as measured" if _span(free) else "",
    ]
    said = "; ".join(filter(None, parts))
    return [said[0].upper() + said[1:] + "."] if said else []


def _span(rows: Sequence[findings.MetricRow]) -> str:
    """ "5.6 to at least 32"; "" where no value is known."""
    values = [row.value for row in rows if isinstance(row.value, float)]
    if not values:
        return ""
    low, high = _count(min(values)), _count(max(values))
    more = max(map(at_least, rows))
    return f"{more}{high}" if low == high else f"{low} to {more}{high}"


def _context_sentences(results: Results) -> list[str]:
    said = []
    for cells in varied(results, "context").values():
        if (found := traffic(cells)) is not None:
            more = found.takeover > max(cell.record.point["context"] for cell in cells)
            said.append(
                f"Reading the cache takes over from the weights at {found.takeover:,.0f} tokens of context at batch"
                f" {found.batch} (from shapes{', beyond what was measured' if more else ''})."
            )
    return said


def _batch_sentences(results: Results) -> list[str]:
    said = []
    for cells in varied(results, "batch").values():
        if not cells[0].record.baseline:
            continue
        speeds = {cell.record.batch: speed for cell in cells if (speed := together(cell))}
        if len(speeds) > 1:
            low, high = min(speeds), max(speeds)
            place = ", ".join(f"{k} {v}" for k, v in cells[0].record.point.items() if k != "batch")
            said.append(
                f"{title(cells[0])}{f' at {place}' if place else ''} decodes {speeds[high] / speeds[low]:.2f}× as many"
                f" tokens/s in all at batch {high} as at batch {low}; {high / low:g}× would be perfect scaling."
            )
    return said


# Predictions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicted:
    """One point of a sweep: a decode step, or one forward where an engine times them one by one."""

    name: str
    measured: float  # s
    predicted: float  # s, at the measured roofs
    bound: str  # as the metric `bound`

    @property
    def error(self) -> float:
        return abs(self.predicted / self.measured - 1)


def predictions(results: Results) -> list[Predicted]:
    """Of a sweep; the few steps of one point say little about a model of their time."""
    if len(results.points) == 1 and all(cell.record.engine != "forward" for cell in results.run.cells):
        return []
    found = []
    for cell in results.run.cells:
        if cell.forwards.empty or cell.roofs is None:
            continue
        if cell.record.engine == "forward":
            for rows, bound in row_bounds(results, cell).items():
                times = [results.value(cell, m, row_kind(rows)) for m in ("forward_seconds", "floor_seconds")]
                found += _predicted(f"{findings.name(cell)}, {rows} rows", times, bound)
        else:
            times = [results.value(cell, m) for m in ("step_seconds", "predicted_step_seconds")]
            found += _predicted(findings.name(cell), times, _step_bound(results, cell, times))
    return found


def _predicted(name: str, times: Sequence[float | None], bound: str) -> list[Predicted]:
    measured, predicted = times
    return [Predicted(name, measured, predicted, bound)] if measured and predicted and bound else []


def _step_bound(results: Results, cell: Cell, times: Sequence[float | None]) -> str:
    """Of a whole step: its forwards' larger sum, or overhead or communication as for a forward; "" where unknown."""
    measured, predicted = times
    if not measured or not predicted:
        return ""
    bound = str(results.row(cell, "bound", main_kind(cell)).value or "")
    if measured > OVERHEAD * predicted:
        return "communication" if bound == "communication" else "overhead"
    if bound in ("", *ROOFS):
        return bound
    intensity = results.value(cell, "intensity", main_kind(cell)) or 0
    return "compute" if intensity > cell.roof("flops") / cell.roof("bandwidth") else "memory"


def calibrated_errors(points: Sequence[Predicted]) -> tuple[dict[str, float], list[float]]:
    """(share of the roof that is reached by bound, median of its points; error of each point if predicted at the share
    that the other points of its bound reach: its own time plays no part)."""
    shares: dict[str, float] = {}
    errors = []
    for bound in ROOFS:
        reached = [point.predicted / point.measured for point in points if point.bound == bound]
        if reached:
            shares[bound] = float(np.median(reached))
        for index, own in enumerate(reached):
            others = reached[:index] + reached[index + 1 :]
            if len(others) >= 2:
                errors.append(abs(own / float(np.median(others)) - 1))
    return shares, errors


def prediction_sentences(results: Results) -> list[str]:
    """Median absolute error of predicted against measured step time; nothing where there are few points."""
    every = predictions(results)
    points = [point for point in every if point.bound in ROOFS]
    if len(every) < ENOUGH:
        return []
    left_out = len(every) - len(points)
    beyond = "- or ".join(sorted({point.bound for point in every} - {*ROOFS}, reverse=True))
    aside = f"; {left_out} of {len(every)} points are {beyond}-bound and left out" if left_out else ""
    if len(points) < ENOUGH:
        return [f"Too few points to judge predictions: {left_out} of {len(every)} are {beyond}-bound."]
    error = float(np.median([point.error for point in points]))
    said = (
        f"Step times predicted from the measured roofs differ from measured ones by {quantity(error, '1')} (median"
        f" absolute error of {len(points)} memory- or compute-bound points{aside})."
    )
    shares, errors = calibrated_errors(points)
    if len(errors) < ENOUGH:
        return [said]
    names = {"memory": "the bandwidth", "compute": "the arithmetic rate"}
    reached = " and ".join(f"{quantity(share, '1')} of {names[bound]}" for bound, share in shares.items())
    return [
        said,
        f"The median point reaches {reached}; with the share that the other points reach, each is predicted to within "
        f"{quantity(float(np.median(errors)), '1')} (median).",
    ]
