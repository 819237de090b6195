"""Figures of sweeps: rows per forward, proposals, batch and context, and how good predictions were.

A mark's shape says what limits it wherever that is known: memory, compute, communication, or overhead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from zbench.hardware.peaks import SLACK
from zbench.metrics import Cell, caveats, row_floors, row_medians
from zbench.report.figures import MARKERS, Plot, Theme, legend_below, name_log_ticks, shortened
from zbench.report.findings import quantity
from zbench.report.readings import (
    Traffic,
    at_least,
    best,
    by_block,
    predictions,
    row_bounds,
    row_kind,
    sweeping,
    together,
    traffic,
    varied,
)
from zbench.results import Results, point_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BOUND_MARKERS = {"memory": "o", "compute": "s", "communication": "v", "overhead": "^", "": "D"}
FAR_CONTEXT = 131_072  # tokens up to which a context sweep is continued by prediction
DASHED = (0, (4, 3))
LINES = 9  # that one figure can tell apart


def _ticks(axes: Axes, which: str, values: Sequence[float], suffix: str = "") -> None:
    """At most seven of the values measured, as plain numbers; the others stay without a name."""
    from matplotlib.ticker import NullLocator

    shown = sorted(set(values))
    shown = shown[:: -(-len(shown) // 7)] if len(shown) > 7 else shown
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(shown, labels=[f"{_short(value)}{suffix}" for value in shown])
    axis.set_minor_locator(NullLocator())


def _short(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def _log_ratio_ticks(axes: Axes) -> None:
    from matplotlib.ticker import NullLocator

    low, high = axes.get_ylim()
    every = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]
    shown = [tick for tick in every if low <= tick <= high]
    axes.set_yticks(shown, labels=[f"{tick:g}×" for tick in shown])
    axes.yaxis.set_minor_locator(NullLocator())


def _bound_legend(axes: Axes, theme: Theme, bounds: set[str]) -> int:
    """Names the shapes, where any says something; returns how many there are."""
    named = [bound for bound in BOUND_MARKERS if bound in bounds and any(bounds)]
    for bound in named:
        axes.plot([], [], BOUND_MARKERS[bound], ms=6, color=theme.muted, mew=0, label=_bound_name(bound))
    return len(named)


def _bound_name(bound: str) -> str:
    return f"{bound}-bound" if bound else "not classified"


# Rows ----------------------------------------------------------------------------------------------------------------


def _row_costs(results: Results, cell: Cell) -> dict[int, tuple[float, float | None, float | None]]:
    """(t(R) / t(1), its interval) by R."""
    found = {}
    for rows in row_bounds(results, cell):
        row = results.row(cell, "row_cost", str(rows))
        if isinstance(row.value, float):
            found[rows] = (row.value, row.low, row.high)
    return found


def _rows(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    [cell, *_] = sweeping(cells)
    costs, bounds = _row_costs(results, cell), row_bounds(results, cell)
    rows = list(costs)
    colour = theme.series[0]
    axes.axhline(SLACK, color=theme.muted, lw=0.9, ls=(0, (1, 2)))
    if any(bounds.values()):
        floors = row_floors(cell)
        one = float(np.exp(np.log(row_medians(cell)[1]).mean()))
        fine = np.geomspace(1, max(rows), 200)
        memory, compute = (np.interp(fine, floors.index, floors[name]) / one for name in ("memory", "compute"))
        axes.plot(fine, np.maximum(memory, compute), color=theme.ink, lw=1.2, ls=DASHED,
                  label="at the measured roofs (predicted)")  # fmt: skip
    axes.plot(rows, [costs[r][0] for r in rows], color=colour, lw=1.4)
    for count, (value, low, high) in costs.items():
        if low is not None and high is not None:
            axes.plot([count, count], [low, high], color=colour, lw=1)
        axes.plot(count, value, BOUND_MARKERS[bounds[count]], ms=5.5, color=colour, mew=0)
    axes.set(xscale="log", yscale="log", xlabel="rows per sequence in one forward", ylabel="times the time of one row")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), high * 1.25)
    _log_ratio_ticks(axes)
    _ticks(axes, "x", rows)
    _mark_rows(axes, theme, results, cell)
    _bound_legend(axes, theme, set(bounds.values()))
    if any(bounds.values()):
        legend_below(axes, 2)


def _mark_rows(axes: Axes, theme: Theme, results: Results, cell: Cell) -> None:
    """Upright lines at the free rows, the knee and the ridge; their names stand at the upper left, out of the way."""
    marks = [
        ("free", "free_token_slots", "measured", theme.series[2], "-"),
        ("knee", "ridge_rows", "measured", theme.series[1], "-"),
        ("ridge at the roofs (predicted)", "ridge_rows", "roofs", theme.series[3], DASHED),
    ]
    height = 0.97
    for name, metric, part, colour, line in marks:
        row = results.row(cell, metric, part)
        if not isinstance(row.value, float):
            continue
        axes.axvline(row.value, color=colour, lw=1.2, ls=line)
        count = f"{row.value:.3g}"
        rows = f"{at_least(row)}{count} row{'s' if count != '1' else ''}"
        axes.text(
            0.02, height, f"{name}: {rows}", transform=axes.transAxes, va="top", fontsize=7.5, color=colour,
            bbox={"fc": theme.paper, "ec": "none", "pad": 0.8, "alpha": 0.85},
        )  # fmt: skip
        height -= 0.075


def _rows_alt(results: Results, cells: Sequence[Cell]) -> str:
    [cell, *_] = sweeping(cells)
    bounds = row_bounds(results, cell)
    said = [
        f"{rows} rows {v:.2f}×" + f" {bounds[rows]}" * bool(bounds[rows])
        for rows, (v, *_) in _row_costs(results, cell).items()
    ]
    return "; ".join(said) + "."


def _row_roofline(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    from matplotlib.ticker import EngFormatter

    [cell, *_] = sweeping(cells)
    bounds, floors = row_bounds(results, cell), row_floors(cell)
    flops = cell.decode_forwards.groupby("rows")["flops"].mean()
    fine = np.geomspace(1, max(bounds), 200)
    work = np.interp(fine, flops.index, flops)
    memory, compute = (np.interp(fine, floors.index, floors[name]) for name in ("memory", "compute"))
    axes.plot(fine, work / np.maximum(memory, compute), color=theme.ink, lw=1.2, label="measured roofs")
    axes.plot(fine, work / (memory + compute), color=theme.muted, lw=0.9, ls=DASHED, label="one after the other")
    rates = [results.value(cell, "achieved_flops", row_kind(rows)) or np.nan for rows in bounds]
    for (rows, bound), rate in zip(bounds.items(), rates, strict=True):
        axes.plot(rows, rate, BOUND_MARKERS[bound], ms=6, color=theme.series[0], mew=0)
    axes.set(xscale="log", yscale="log", xlabel="rows per sequence in one forward", ylabel="FLOP/s")
    name_log_ticks(axes.yaxis, EngFormatter())
    _ticks(axes, "x", list(bounds))
    _bound_legend(axes, theme, set(bounds.values()))
    legend_below(axes, 2)


def _row_roofline_alt(results: Results, cells: Sequence[Cell]) -> str:
    [cell, *_] = sweeping(cells)
    said = [
        f"{rows} rows {quantity(results.value(cell, 'achieved_flops', row_kind(rows)) or 0, 'FLOP/s')}, "
        + _bound_name(bound)
        for rows, bound in row_bounds(results, cell).items()
    ]
    return "; ".join(said) + "."


def _with_roofs(cells: Sequence[Cell]) -> bool:
    return any(
        cell.roofs and cell.record.dtype in cell.roofs.get("flops", {}) and cell.roofs.get("bandwidth", {}).get("read")
        for cell in cells
    )


def _row_curves(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    swept = sweeping(cells)
    shown = swept[:LINES]
    every: set[int] = set()
    for index, cell in enumerate(shown):
        costs = _row_costs(results, cell)
        every |= set(costs)
        axes.plot(
            list(costs), [value for value, *_ in costs.values()], f"{MARKERS[index % len(MARKERS)]}-", ms=4, lw=1.3,
            color=theme.series[index], mew=0, label=shortened(point_label(cell.record), 38),
        )  # fmt: skip
    axes.axhline(SLACK, color=theme.muted, lw=0.9, ls=(0, (1, 2)))
    axes.set(xscale="log", yscale="log", xlabel="rows per sequence in one forward", ylabel="times the time of one row")
    axes.set_ylim(0.8, max(2.2, axes.get_ylim()[1]))
    _log_ratio_ticks(axes)
    _ticks(axes, "x", sorted(every))
    _left_out(axes, len(swept))
    legend_below(axes, 2)


def _row_curves_alt(results: Results, cells: Sequence[Cell]) -> str:
    said = []
    for cell in sweeping(cells):
        free = results.row(cell, "free_token_slots", "measured")
        costs = ", ".join(f"{rows} rows {value:.2f}×" for rows, (value, *_) in _row_costs(results, cell).items())
        said.append(
            f"{point_label(cell.record)}: {costs}"
            + (f"; {at_least(free)}{free.value:.1f} rows are free" if isinstance(free.value, float) else "")
        )
    return ". ".join(said) + "."


# Proposals -----------------------------------------------------------------------------------------------------------


def _main_bound(results: Results, cell: Cell) -> str:
    from zbench.results import main_kind

    return str(results.row(cell, "bound", main_kind(cell)).value or "")


def _proposals(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    from matplotlib.ticker import MaxNLocator

    bounds, words = set(), dict[str, None]()
    swept = by_block(results, cells)
    for index, ((block, apart), mine) in enumerate(swept.items()):
        colour = theme.series[index % len(theme.series)]
        values = [results.row(cell, "speedup") for cell in mine.values()]
        speeds = {0: 1.0} | {count: float(row.value or np.nan) for count, row in zip(mine, values, strict=True)}
        axes.plot(
            list(speeds), list(speeds.values()), color=colour, lw=1.3, label=shortened(_block_name(block, apart), 60)
        )
        for (count, cell), row in zip(mine.items(), values, strict=True):
            if row.low is not None and row.high is not None:
                axes.plot([count, count], [row.low, row.high], color=colour, lw=1)
            bounds.add(bound := _main_bound(results, cell))
            axes.plot(count, float(row.value or np.nan), BOUND_MARKERS[bound], ms=5, color=colour, mew=0)
            words |= dict.fromkeys(caveats(cell.record))
        if (found := best(block, mine)) is not None:
            speed = results.value(found.cell, "speedup") or np.nan
            axes.plot(found.proposals, speed, "o", ms=12, mfc="none", color=colour, mew=1.4)
    axes.axhline(1, color=theme.ink, lw=1, ls=DASHED)
    axes.set(xlabel="proposals (masked blocks per forward)", ylabel="times the baseline’s speed")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(", ".join(words), fontsize=7, style="italic", color=theme.muted, loc="left")
    most = 2 if any(apart for _, apart in swept) else 3
    legend_below(axes, min(most, len(swept) + _bound_legend(axes, theme, bounds)))


def _block_name(block: int, apart: str) -> str:
    return ", ".join(filter(None, (f"block {block}", apart)))


def _proposals_alt(results: Results, cells: Sequence[Cell]) -> str:
    said = []
    for (block, apart), mine in by_block(results, cells).items():
        speeds = ", ".join(f"{count}: {results.value(cell, 'speedup') or 0:.2f}×" for count, cell in mine.items())
        found = best(block, mine)
        fastest = f", best {found.proposals}" if found is not None else ""
        said.append(f"{_block_name(block, apart)} by proposals {speeds}{fastest}")
    return "; ".join(said) + "."


# Batch and context ---------------------------------------------------------------------------------------------------


def _left_out(axes: Axes, lines: int) -> None:
    """Says in the legend how many lines there was no room for."""
    if lines > LINES:
        axes.plot([], [], " ", label=f"and {lines - LINES} more, in the tables")


def _line_name(results: Results, axis: str, key: tuple[tuple[str, object], ...], cell: Cell) -> str:
    rest = ", ".join(f"{name} {value}" for name, value in cell.record.point.items() if name != axis)
    label = shortened(cell.record.label, 26)
    words = "synthetic" if "synthetic acceptance" in caveats(cell.record) else ""
    return ", ".join(filter(None, (label, rest, words)))


def _batch(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    every = list(varied(results, "batch").items())
    lines = every[:LINES]
    batches: set[int] = set()
    for index, (key, mine) in enumerate(lines):
        colour, marker = theme.series[index], MARKERS[index % len(MARKERS)]
        speeds = {cell.record.batch: speed for cell in mine if (speed := together(cell))}
        batches |= set(speeds)
        axes.plot(list(speeds), list(speeds.values()), f"{marker}-", ms=5, lw=1.4, color=colour, mew=0,
                  label=_line_name(results, "batch", key, mine[0]))  # fmt: skip
        at_roofs = {cell.record.batch: speed for cell in mine if (speed := _together_at_roofs(results, cell))}
        axes.plot(list(at_roofs), list(at_roofs.values()), color=colour, lw=0.9, ls=DASHED)
    axes.set(xscale="log", yscale="log", xlabel="batch (sequences)", ylabel="tokens/s of all sequences, decode")
    _ticks(axes, "x", sorted(batches))
    name_log_ticks(axes.yaxis, "{:,g}".format)
    axes.plot([], [], color=theme.muted, lw=0.9, ls=DASHED, label="at the roofs (predicted)")
    _left_out(axes, len(every))
    legend_below(axes, 1 if len(lines) > 2 else 2)


def _together_at_roofs(results: Results, cell: Cell) -> float | None:
    """Tokens/s of all sequences if steps took what their forwards need at the measured roofs."""
    speed, step, predicted = (
        together(cell),
        *(results.value(cell, m) for m in ("step_seconds", "predicted_step_seconds")),
    )
    return speed * step / predicted if speed and step and predicted else None


def _batch_alt(results: Results, cells: Sequence[Cell]) -> str:
    said = [
        f"{_line_name(results, 'batch', key, mine[0])}: "
        + ", ".join(f"batch {cell.record.batch} {together(cell) or 0:.0f} tokens/s" for cell in mine)
        for key, mine in varied(results, "batch").items()
    ]
    return "; ".join(said) + "."


def _context(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    every = list(varied(results, "context").items())
    lines = every[:LINES]
    contexts: set[float] = set()
    for index, (key, mine) in enumerate(lines):
        colour, marker = theme.series[index], MARKERS[index % len(MARKERS)]
        times = {cell.record.point["context"]: results.value(cell, "step_seconds") for cell in mine}
        contexts |= set(times)
        axes.plot(list(times), [(t or np.nan) * 1e3 for t in times.values()], f"{marker}-", ms=5, lw=1.4, color=colour,
                  mew=0, label=_line_name(results, "context", key, mine[0]))  # fmt: skip
        predicted = {cell.record.point["context"]: results.value(cell, "predicted_step_seconds") for cell in mine}
        axes.plot(list(predicted), [(t or np.nan) * 1e3 for t in predicted.values()], color=colour, lw=0.9, ls=DASHED)
        found = traffic(mine)
        if found is not None and _with_roofs(mine):
            further = _further(max(times))
            axes.plot(further, [_seconds(found, mine[0], c) * 1e3 for c in further], marker, ms=5, mfc=theme.paper,
                      color=colour, ls=DASHED, lw=0.9)  # fmt: skip
            contexts |= set(further[1:])
    axes.plot(
        [], [], "o", ms=5, mfc=theme.paper, color=theme.muted, ls=DASHED, lw=0.9, label="at the roofs (predicted)"
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="context (committed tokens per sequence)",
        ylabel="milliseconds per decode step",
    )
    _ticks(axes, "x", sorted(contexts))
    name_log_ticks(axes.yaxis)
    _mark_takeover(axes, theme, [mine for _, mine in lines])
    _left_out(axes, len(every))
    legend_below(axes, 1 if len(lines) > 2 else 2)


def _further(most: int) -> list[int]:
    """Contexts from the largest measured one on, doubling, to `FAR_CONTEXT`."""
    found = [most]
    while found[-1] * 2 <= FAR_CONTEXT:
        found.append(found[-1] * 2)
    return found


def _seconds(found: Traffic, cell: Cell, context: float) -> float:
    flops, per_token = found.flops
    return max(
        (found.fixed + found.per_token * context) / cell.roof("bandwidth"),
        (flops + per_token * context) / cell.roof("flops"),
    )


def _mark_takeover(axes: Axes, theme: Theme, lines: Sequence[Sequence[Cell]]) -> None:
    known = [found for cells in lines if (found := traffic(cells)) is not None]
    low, high = axes.get_xlim()
    for place, found in enumerate(known[:3]):
        if low < found.takeover < high:
            axes.axvline(found.takeover, color=theme.muted, lw=0.9, ls=(0, (1, 2)))
            text = f"batch {found.batch}: cache = weights at {found.takeover:,.0f} tokens"
            axes.text(0.02, 0.97 - 0.075 * place, text, transform=axes.transAxes, va="top", fontsize=7.5,
                      color=theme.muted, bbox={"fc": theme.paper, "ec": "none", "pad": 0.8, "alpha": 0.85})  # fmt: skip


def _context_alt(results: Results, cells: Sequence[Cell]) -> str:
    said = []
    for key, mine in varied(results, "context").items():
        times = ", ".join(
            f"{cell.record.point['context']:,} tokens {quantity(results.value(cell, 'step_seconds') or 0, 's')}"
            for cell in mine
        )
        said.append(f"{_line_name(results, 'context', key, mine[0])}: {times} per step")
        if (found := traffic(mine)) is not None and _with_roofs(mine) and _further(1):
            far = _further(max(cell.record.point["context"] for cell in mine))[-1]
            said[-1] += f", predicted at {far:,} {quantity(_seconds(found, mine[0], far), 's')}"
    return "; ".join(said) + "."


# Predictions ---------------------------------------------------------------------------------------------------------


def _prediction(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    points = predictions(results)
    edges = np.array(
        [min(min(p.measured, p.predicted) for p in points), max(max(p.measured, p.predicted) for p in points)]
    )
    edges = edges * 1e3 * np.array([0.7, 1.4])
    axes.plot(edges, edges, color=theme.ink, lw=1.2, label="as predicted")
    axes.plot(edges, edges * 2, color=theme.muted, lw=0.9, ls=DASHED, label="twice that: no roof explains more")
    colours = {"memory": theme.series[0], "compute": theme.series[1], "communication": theme.series[3],
               "overhead": theme.series[7]}  # fmt: skip
    for bound in dict.fromkeys(p.bound for p in points):
        mine = [p for p in points if p.bound == bound]
        axes.plot([p.predicted * 1e3 for p in mine], [p.measured * 1e3 for p in mine], BOUND_MARKERS[bound], ms=5,
                  color=colours[bound], mew=0, alpha=0.8, label=f"{bound}-bound ({len(mine)})")  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlim=edges, xlabel="predicted from the measured roofs, ms", ylabel="measured, ms"
    )
    for axis in (axes.xaxis, axes.yaxis):
        name_log_ticks(axis)
    legend_below(axes, 2)


def _prediction_alt(results: Results, cells: Sequence[Cell]) -> str:
    return (
        "; ".join(
            f"{p.name} predicted {quantity(p.predicted, 's')}, measured {quantity(p.measured, 's')}, {p.bound}-bound"
            for p in predictions(results)
        )
        + "."
    )


# ---------------------------------------------------------------------------------------------------------------------


PLOTS = (
    Plot(
        "rows", "What it costs that more rows ride in one forward",
        "Time of a forward of R rows, logits for all of them, over that of one row at the same context; upright "
        "strokes are 95% intervals, the shape says what limits. Dotted: 1.1 times, up to where rows count as free. "
        "Dashed: what memory or arithmetic alone need at the measured roofs, predicted; the gap to it is overhead or "
        "inefficiency.",
        lambda results, cells: bool(sweeping(cells)), lambda results, cells: 3.9, _rows, _rows_alt,
    ),
    Plot(
        "row-roofline", "The roofline in rows",
        "FLOP/s that forwards of R rows reach. Line: the most that the measured roofs allow, if traffic and arithmetic "
        "overlap. Dashed: if they come one after the other. Marks below half of the line are overhead- or "
        "communication-bound: neither explains their time.",
        lambda results, cells: bool(sweeping(cells)) and _with_roofs(cells), lambda results, cells: 3.6,
        _row_roofline, _row_roofline_alt,
    ),
    Plot(
        "proposals", "How many blocks to propose",
        "Single-pass diffusion: speed over the baseline, paired by prompt, by number of proposals; 0 is the baseline "
        "unless it was measured too. Upright strokes are 95% intervals, the shape says what limits the forward, the "
        "circle marks the best number for the prompts decoded with all of them.",
        lambda results, cells: bool(by_block(results, cells)), lambda results, cells: 3.6, _proposals, _proposals_alt,
        "speculation",
    ),
)  # fmt: skip

OVERVIEWS = (
    Plot(
        "row-curves", "What more rows cost at every point",
        "Time of a forward of R rows over that of one row at the same context and batch. Dotted: 1.1 times.",
        lambda results, cells: len(sweeping(cells)) > 1,
        lambda results, cells: 3.2 + 0.2 * -(-min(LINES, len(sweeping(cells))) // 2), _row_curves, _row_curves_alt,
    ),
    Plot(
        "batch", "What a larger batch gives",
        "Tokens/s of all sequences of a batch, in decode. Dashed: what the same steps would give if their forwards "
        "took what memory or arithmetic alone need at the measured roofs.",
        lambda results, cells: bool(varied(results, "batch")),
        lambda results, cells: 3.2 + 0.2 * min(LINES, len(varied(results, "batch"))), _batch, _batch_alt,
    ),
    Plot(
        "context", "What a longer context costs",
        "Mean time of a decode step. Dashed: its forwards at the measured roofs, predicted; open marks continue it, "
        "for autoregressive decoding, beyond what was measured, as traffic and arithmetic grow evenly with context.",
        lambda results, cells: bool(varied(results, "context")),
        lambda results, cells: 3.2 + 0.2 * min(LINES, len(varied(results, "context"))), _context, _context_alt,
    ),
    Plot(
        "prediction", "How good predictions are",
        "One mark per decode step of an engine at a point, or per number of rows: the time that its forwards need at "
        "the measured roofs against the time that it took. Below the line lies what "
        "memory never bounded, as a model that stays in the caches, or what ran while memory was faster than the roof; "
        "else a roof or a count errs. What is not classified is left out.",
        lambda results, cells: len(predictions(results)) >= 5, lambda results, cells: 3.7, _prediction, _prediction_alt,
    ),
)  # fmt: skip
