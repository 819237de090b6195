"""What the sensors said, in the report: sentences for what is missing, a table per point, and sensors over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zbench import telemetry
from zbench.metrics import Cell
from zbench.report.figures import Plot, Theme, _legend_lines, _legend_name, _legend_of_engines, _series
from zbench.report.findings import listed, name, quantity
from zbench.results import Results
from zbench.telemetry import SENSORS, Segment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 500  # of one line: what a figure of this width can show
# (heading, metric, part), as in html.ENGINE_COLUMNS; only those that are known somewhere are shown.
COLUMNS = (
    ("Energy per token", "joules_per_token", ""),
    ("Tokens per joule", "tokens_per_joule", ""),
    ("Energy × delay", "energy_delay_product", ""),
    ("Mean power", "mean_power", ""),
    ("Core clock", "core_clock", ""),
    ("Hottest", "temperature", ""),
    ("Device busy", "activity", ""),
    ("Memory busy", "memory_activity", ""),
    ("Throttled", "throttled", ""),
)
_NAMES = {
    "energy": "Energy",
    "power": "power",
    "core_clock": "core clock",
    "temperature": "temperature",
    "throttle": "throttling",
}


def said(results: Results) -> list[str]:
    """What was sampled, what is unavailable and why, what throttled, and what sampling itself took."""
    found = results.run.telemetry
    if found is None:
        asked = results.run.manifest.scenario.get("telemetry")
        off = isinstance(asked, dict) and asked.get("period_ms") is None
        return ["Telemetry was off." if off else "No telemetry was recorded."]
    last = found.last
    missing: dict[str, list[str]] = {}
    for sensor, words in _NAMES.items():
        if not last.has(sensor) and not (sensor == "power" and last.has("energy")):
            missing.setdefault(last.why_not(sensor), []).append(words)
    sentences = [f"{_capital(' and '.join(words))} unavailable: {why}." for why, words in missing.items()]
    if last.has("energy") or last.has("power"):
        sentences += _energy_words(results)
        facts = last.sensors["energy" if last.has("energy") else "power"]
        of = f" ({facts['of']})" if isinstance(facts, dict) and facts.get("of") else ""
        sentences.append(f"Energy is the whole device’s{of}, what it draws when idle included, by {last.source}.")
    sentences += [_throttled(results, cell) for cell in results.run.cells if results.value(cell, "throttled")]
    return [*sentences, _cost(last)] if any(map(last.has, SENSORS)) else sentences


def _energy_words(results: Results) -> list[str]:
    """Why engines have no energy although there is a sensor; one sentence for each reason."""
    reasons: dict[str, list[str]] = {}
    for cell in results.run.cells:
        row = results.row(cell, "joules_per_token")
        if row.value is None and cell.trials:
            reasons.setdefault(row.note.removeprefix("unavailable: "), []).append(name(cell))
    return [f"Energy of {listed(cells)} unavailable: {why}." for why, cells in reasons.items()]


def _throttled(results: Results, cell: Cell) -> str:
    row = results.row(cell, "throttled")
    share = quantity(float(row.value or 0), "1")
    return f"{name(cell)} was throttled in {share} of its samples: {row.note.partition(';')[0]}."


def _cost(segment: Segment) -> str:
    period = f"Sampled every {quantity(segment.period, 's')}"
    if not segment.cost.get("seconds"):
        return f"{period}; what that took is not known, as the run was cut off."
    if (slowed := segment.cost["period"]) > 1.05 * segment.period:
        period = (
            f"Sampled up to {quantity(slowed, 's')} apart, as a sample takes too long for"
            f" every {quantity(segment.period, 's')}"
        )
    share = segment.cost["cpu_seconds"] / segment.cost["seconds"]
    failures = "".join(
        f" {_capital(s)} could not always be read: {why}." for s, why in segment.cost["failures"].items()
    )
    return f"{period}, which took {share:.2%} of one CPU core.{failures}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:].replace("_", " ")


# Sensors over time ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Curve:
    sensor: str
    of: Callable[[Segment], np.ndarray | None]  # its values, in the unit that is drawn


def _clock(segment: Segment) -> np.ndarray | None:
    return segment.values["core_clock"] / 1e9 if segment.has("core_clock") else None


def _activity(segment: Segment) -> np.ndarray | None:
    return 100 * segment.values["activity"] if segment.has("activity") else None


def _timeline(results: Results, curve: _Curve) -> list[tuple[float, Segment, np.ndarray]]:
    """(seconds before it, segment, values) of the segments that have the values, one after another."""
    found, before = [], 0.0
    for segment in results.run.telemetry.segments if results.run.telemetry else ():
        values = curve.of(segment)
        if values is not None and np.isfinite(values).any():
            found.append((before, segment, values))
            before += float(segment.times[-1])
    return found


def _of_cell(results: Results, cell: Cell, curve: _Curve) -> list[tuple[np.ndarray, np.ndarray]]:
    """(seconds of the run, values) of each trial that counts."""
    lines = []
    for before, segment, values in _timeline(results, curve):
        for trial in cell.trials:
            assert results.run.telemetry is not None
            if results.run.telemetry.segment(trial.key) is segment:
                inside = segment.within(trial.key, curve.sensor) & np.isfinite(values)
                lines.append((before + segment.times[inside], values[inside]))
    return [(times, values) for times, values in lines if len(times)]


def _applies(curve: _Curve) -> Callable[[Results, Sequence[Cell]], bool]:
    return lambda results, cells: any(_of_cell(results, cell, curve) for cell in cells)


def _painter(curve: _Curve, label: str) -> Callable[[Axes, Theme, Results, Sequence[Cell]], None]:
    def paint(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
        drawn = {cell.record.id: _of_cell(results, cell, curve) for cell in cells}
        ends = np.concatenate([times for lines in drawn.values() for times, _ in lines])
        start, end = float(ends.min()), float(ends.max())
        for before, segment, values in _timeline(results, curve):
            times = before + segment.times
            inside = np.isfinite(values) & (times >= start) & (times <= end)
            axes.plot(*_thinned(times[inside], values[inside]), color=theme.line, lw=1, zorder=1)
        for cell in cells:
            colour, marker = _series(results, cell, theme)
            lines = drawn[cell.record.id]
            total = sum(len(times) for times, _ in lines)
            for times, values in lines:
                few = _thinned(times, values, max(2, POINTS * len(times) // total))
                axes.plot(*few, color=colour, lw=1.4, marker=marker if len(few[0]) < 3 else None, ms=3, zorder=2)
            axes.plot([], [], color=colour, lw=1.4, label=_legend_name(cell))
        axes.set(xlabel="seconds of the run", ylabel=label, xlim=(start, max(end, start + 1e-3)))
        bottom, top = (0, 105) if label.endswith("%") else axes.get_ylim()
        axes.set_ylim(0 if bottom < 0.7 * top else bottom, top)
        _legend_of_engines(axes, cells)

    return paint


def _thinned(times: np.ndarray, values: np.ndarray, most: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours, so that there are at most `most`."""
    if len(times) <= most:
        return times, values
    edges = np.linspace(0, len(times), most + 1).astype(int)[:-1]
    sizes = np.diff([*edges, len(times)])
    return np.add.reduceat(times, edges) / sizes, np.add.reduceat(values, edges) / sizes


def _alt(curve: _Curve, unit: str) -> Callable[[Results, Sequence[Cell]], str]:
    def words(results: Results, cells: Sequence[Cell]) -> str:
        found = []
        for cell in cells:
            if lines := _of_cell(results, cell, curve):
                values = np.concatenate([values for _, values in lines])
                found.append(f"{cell.record.label} {values.min():.3g} to {values.max():.3g} {unit}")
        return "; ".join(found) + "."

    return words


def _plot(key: str, title: str, caption: str, curve: _Curve, label: str, unit: str) -> Plot:
    height: Any = lambda results, cells: 2.2 + 0.2 * _legend_lines(cells)  # noqa: E731
    words = f"{caption} Coloured: samples of an engine’s trials; grey: between them, or maybe of what was before."
    return Plot(key, title, words, _applies(curve), height, _painter(curve, label), _alt(curve, unit), "telemetry")


PLOTS = (
    _plot("power", "Power over time", "The device’s power.", _Curve("power", telemetry.power), "power, W", "W"),
    _plot(
        "clock",
        "Core clock over time",
        "The clock of the device’s cores.",
        _Curve("core_clock", _clock),
        "clock, GHz",
        "GHz",
    ),
    _plot("activity", "How busy the device was", "By its own account.", _Curve("activity", _activity), "busy, %", "%"),
)
