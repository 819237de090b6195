"""A history as a table, as JSON, and as a page: one small figure per metric and cell, each point linked to its run.

The figures are SVG in the page itself, as points in an image cannot be links.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from zbench.changes import SEGMENT, SIGNIFICANCE
from zbench.history import SCHEMA_VERSION, Change, Entry, Line, Number, Series
from zbench.metrics import MetricRow
from zbench.report import figures, html
from zbench.report.findings import interval, quantity

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 340, 120, 6, 16, 18  # of a figure, in its own units
ROUNDING = 1e-12  # what sums of floats in another order may differ by, relative to them
NAMED = 8  # metrics that got worse with one run and are named in the lead


def table(found: Sequence[Series], every: bool = False) -> list[str]:
    """A line per metric and cell: the newest value and the last change. What never moved is counted unless `every`."""
    lines = []
    for scenario in dict.fromkeys(series.scenario for series in found):
        mine = [series for series in found if series.scenario == scenario]
        dates = sorted({entry.created[:10] for series in mine for entry, _ in series.points})
        runs = {entry.run for series in mine for entry, _ in series.points}
        lines.append(f"{scenario}: {_counted(len(runs), 'run')}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}")
        shown = [series for series in mine if every or _moves(series)]
        rows = [("metric", "cell", "runs", "newest", "last change")]
        for series in shown:
            rows.append((series.name, _cell(series), _compared(series), _newest(series), _last_change(series)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows if shown]
        if still := len(mine) - len(shown):
            lines.append(f"  {_counted(still, 'metric')} never moved")
        apart = {"; ".join(line.differs) for series in mine for line in series.lines if line.differs}
        lines += [f"  note: runs that differ in this are not compared with the others: {why}" for why in sorted(apart)]
    return lines


def as_json(found: Sequence[Series], warnings: Sequence[str]) -> str:
    """Every point with its evidence. Never NaN: JSON has none."""
    content = {"schema_version": SCHEMA_VERSION, "series": [_plain(series) for series in found], "warnings": warnings}
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def page(entries: Sequence[Entry], found: Sequence[Series], warnings: Sequence[str], history: Path, out: Path) -> str:
    """The HTML for a page at `out`, with links to the reports of those runs that still lie where `history` says."""
    links = {entry.run: _link(entry, history, out) for entry in entries}
    moving = [series for series in found if _moves(series)]
    return html.templates().get_template("history.html").render(
        name=history.name,
        lead=_lead(found),
        warnings=warnings,
        groups=[
            (scenario, metric, [_figure(series, links) for series in moving if (series.scenario, series.metric) == key])
            for key in dict.fromkeys((series.scenario, series.metric) for series in moving)
            for scenario, metric in [key]
        ],
        still=[
            (series.scenario, series.name, _cell(series), _newest(series), _counted(len(series.points), "run"))
            for series in found
            if not _moves(series)
        ],
        runs=[(entry, links[entry.run], _short(entry.commit)) for entry in reversed(entries)],
        segment=SEGMENT,
        significance=f"{SIGNIFICANCE:.0%}",
        width=WIDTH,
        height=HEIGHT,
        light=figures.LIGHT.series,
        dark=figures.DARK.series,
    )  # fmt: skip


def _cell(series: Series) -> str:
    """Its name, and what its engine's acceptance is not."""
    return f"{series.cell} ({series.caveat})" if series.caveat else series.cell


def _sentence(series: Series, line: Line, change: Change) -> str:
    """ "-8.1% (worse) from 2026-11-12, a1b2c3d on, p = 0.005"."""
    evidence = "a count, exactly" if change.p is None else f"p = {change.p:.2g}"
    return f"{_by(change)} ({_direction(series, change)}) from {_when(line.points[change.index][0])} on, {evidence}"


def _by(change: Change) -> str:
    if change.relative is None:
        return f"{change.before:g} → {change.after:.6g}"
    return f"{change.relative:+.1%}" if abs(change.relative) >= 0.001 else f"{change.relative * 100:+.2g}%"


def _direction(series: Series, change: Change) -> str:
    return "better" if (change.after > change.before) == (series.better == "higher") else "worse"


def _lead(found: Sequence[Series]) -> list[str]:
    """How many metrics got worse at the last change of their newest line, and from which runs on."""
    last = [(series, series.lines[-1], series.lines[-1].changes[-1]) for series in found if series.lines[-1].changes]
    worse: dict[str, tuple[Entry, list[str]]] = {}
    for series, line, change in last:
        if _direction(series, change) == "worse":
            entry, _ = line.points[change.index]
            worse.setdefault(entry.run, (entry, []))[1].append(f"{series.name} of {_cell(series)} {_by(change)}")
    if not found:
        return ["This history is empty."]
    counts = {way: sum(_direction(series, change) == way for series, _, change in last) for way in ("worse", "better")}
    told = ", ".join(f"{count} got {way}" for way, count in counts.items() if count) or "none changed"
    lines = [f"Of {_counted(len(found), 'metric')} at their last change: {told}."]
    for entry, names in sorted(worse.values(), key=lambda found: found[0].created, reverse=True):
        more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append(f"Worse from {_when(entry)} on: {', '.join(names[:NAMED])}{more}.")
    return lines


def _newest(series: Series) -> str:
    _, number = series.lines[-1].points[-1]
    around = _around(series, number)
    return quantity(number.value, series.unit) + (f" ({around})" if around else "")


def _around(series: Series, number: Number) -> str:
    row = MetricRow(
        "", series.metric, series.part, number.value, number.low, number.high, number.n, series.unit, series.better, "",
        "", "", "ok", "",
    )  # fmt: skip
    return interval(row)


def _compared(series: Series) -> str:
    """ "22 of 24": the runs of the newest line, of all."""
    mine, every = len(series.lines[-1].points), len(series.points)
    return str(every) if mine == every else f"{mine} of {every}"


def _last_change(series: Series) -> str:
    line = series.lines[-1]
    if line.changes:
        return _sentence(series, line, line.changes[-1])
    values = {number.value for _, number in line.points}
    if len(values) > 1 and len(line.points) < 2 * SEGMENT:
        return f"too few runs to tell ({len(line.points)} of {2 * SEGMENT})"
    return "none found"


def _plain(series: Series) -> dict[str, Any]:
    return {
        "scenario": series.scenario,
        "cell": series.cell,
        "metric": series.metric,
        "part": series.part,
        "unit": series.unit,
        "better": series.better,
        "caveat": series.caveat,
        "lines": [
            {
                "identity": line.points[0][0].identity,
                "differs": line.differs,
                "level": line.level,
                "changes": [{**asdict(change), "relative": change.relative} for change in line.changes],
                "points": [
                    {
                        **entry.model_dump(
                            include={"run", "folder", "created", "commit", "note", "url", "environment_hash"}
                        ),
                        **number.model_dump(),
                        "definition": entry.metrics[series.metric].definition,
                    }
                    for entry, number in line.points
                ],
            }
            for line in series.lines
        ],
    }


# --- Page ---


@dataclass(frozen=True)
class _Dot:
    x: float
    y: float
    line: int
    link: str
    said: str


@dataclass(frozen=True)
class _Figure:
    """One series, in the units of its SVG. Colours go by line, the newest first."""

    title: str
    caveat: str
    newest: str
    alt: str
    top: str  # of the axis, in words
    bottom: str
    first: str
    last: str
    dots: list[_Dot]
    bands: list[tuple[int, str]]  # (line, points of a polygon)
    paths: list[tuple[int, str]]  # (line, points of a polyline)
    levels: list[tuple[float, float, float]]  # (from x, to x, y)
    changes: list[tuple[float, str, str]]  # (x, better or worse, what is said)
    legend: list[tuple[int, str]]


def _moves(series: Series) -> bool:
    """By more than rounding, which a scale from the lowest to the highest would draw as large as any change."""
    values = [number.value for _, number in series.points]
    changed = any(line.changes for line in series.lines)
    return changed or not math.isclose(min(values), max(values), rel_tol=ROUNDING)


def _figure(series: Series, links: dict[str, str]) -> _Figure:
    points = series.points
    lows = [_or(number.low, number.value) for _, number in points]
    highs = [_or(number.high, number.value) for _, number in points]
    bottom, top = min(lows), max(highs)
    if math.isclose(bottom, top, rel_tol=ROUNDING):
        bottom = top
    spread = top - bottom or abs(top) or 1.0
    place = {entry.run: index for index, (entry, _) in enumerate(points)}
    lines = list(enumerate(reversed(series.lines)))

    def x(entry: Entry) -> float:
        return round(LEFT + (WIDTH - 2 * LEFT) * (place[entry.run] + 0.5) / len(points), 2)

    def y(value: float) -> float:
        share = (value - bottom) / spread if top > bottom else 0.5
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - share), 2)

    def outline(line: Line) -> str:
        over = [(x(entry), y(_or(number.high, number.value))) for entry, number in line.points]
        under = [(x(entry), y(_or(number.low, number.value))) for entry, number in reversed(line.points)]
        if len(line.points) == 1:  # a polygon needs a width
            over = [(at - 1, height) for at, height in over] + [(at + 1, height) for at, height in over]
            under = [(at + 1, height) for at, height in under] + [(at - 1, height) for at, height in under]
        return _joined([*over, *under])

    changes, levels = [], []
    for line in series.lines:
        for change in line.changes:
            before, now = (x(line.points[at][0]) for at in (change.index - 1, change.index))
            changes.append(((before + now) / 2, _direction(series, change), _sentence(series, line, change)))
        bounds = [0, *(change.index for change in line.changes), len(line.points)] if line.changes else []
        means = [line.changes[0].before, *(change.after for change in line.changes)] if line.changes else []
        for (start, end), mean in zip(pairwise(bounds), means, strict=True):
            levels.append((x(line.points[start][0]), x(line.points[end - 1][0]), y(mean)))
    dots = [
        _Dot(x(entry), y(number.value), index, links[entry.run], _hover(series, entry, number))
        for index, line in lines
        for entry, number in line.points
    ]
    legend = [(index, _about(line)) for index, line in lines] if len(series.lines) > 1 else []
    high, low = _edges(top, bottom, series.unit)
    return _Figure(
        title=f"{series.cell}: {series.part}" if series.part else series.cell,
        caveat=series.caveat,
        newest=_newest(series),
        alt=f"{series.name} of {series.cell} in {_counted(len(points), 'run')}: newest {_newest(series)}; "
        f"last change: {_last_change(series)}",
        top=high,
        bottom=low,
        first=points[0][0].created[:10],
        last=points[-1][0].created[:10] if len(points) > 1 else "",
        dots=dots,
        bands=[
            (index, outline(line)) for index, line in lines if any(number.low is not None for _, number in line.points)
        ],
        paths=[
            (index, _joined([(x(entry), y(number.value)) for entry, number in line.points])) for index, line in lines
        ],
        levels=levels,
        changes=sorted(changes),
        legend=legend,
    )


def _edges(top: float, bottom: float, unit: str) -> tuple[str, str]:
    """The ends of the axis in words: with more digits where they would read the same; one where they are the same."""
    high, low = quantity(top, unit), quantity(bottom, unit)
    if top == bottom:
        return high, ""
    digits = 3
    while high == low and digits < 15:
        digits += 1
        high, low = (quantity(value, unit, digits) for value in (top, bottom))
    return high, low


def _or(edge: float | None, value: float) -> float:
    return value if edge is None else edge


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _about(line: Line) -> str:
    return "; ".join(line.differs) or f"as in {line.points[0][0].created[:10]}"


def _hover(series: Series, entry: Entry, number: Number) -> str:
    around = _around(series, number)
    value = quantity(number.value, series.unit) + (f" (95%: {around}, n = {number.n})" if around else "")
    said = [Path(entry.folder).name, f"commit {_short(entry.commit) or 'not recorded'}", entry.created, value]
    return "\n".join([*said, *([entry.note] if entry.note else [])])


def _link(entry: Entry, history: Path, out: Path) -> str:
    """Of the run's report seen from the page; else the address it was added with; else nothing."""
    report = Path(os.path.normpath(history.resolve().parent / entry.folder / "report.html"))
    if not report.is_file():
        return entry.url or ""
    try:
        return quote(Path(os.path.relpath(report, out.resolve().parent)).as_posix())
    except ValueError:  # another drive
        return report.as_uri()


def _when(entry: Entry) -> str:
    return ", ".join(filter(None, (entry.created[:10], _short(entry.commit))))


def _short(commit: str | None) -> str:
    return (commit or "")[:10]


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
