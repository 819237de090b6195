"""The page of `zbench compare`: runs side by side, from any machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from zbench import __version__
from zbench.cache import new_folder
from zbench.compare import Comparison, Side, main_metric
from zbench.imported import NOT_REPORTED, QUANTITIES, Imported, Quantity, Reported
from zbench.importers import definition
from zbench.metrics import DEFINITIONS_VERSION, METRICS, Cell, caveats, definitions_hash
from zbench.records import CellRecord
from zbench.report import figures, html
from zbench.report.figures import MARKERS, Drawn, Theme
from zbench.report.findings import clusters, interval, quantity, warnings
from zbench.report.html import MAIN_KIND, Entry, Line, Notes, Table, shown
from zbench.report.scaling import best_blocks
from zbench.results import point_label
from zbench.stats import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA_VERSION = 1
DRAWN = 6  # points with a figure of their own
# (heading, metric, part); those that a zbench does not know, or no run has, are left out.
COLUMNS = (
    ("Tokens/s per device", "throughput_per_device", ""),
    MAIN_KIND,
    ("Of bandwidth roof", "mbu", "main"),
    ("Of compute roof", "mfu", "main"),
    ("Bound by", "bound", "main"),
    ("Free rows", "free_token_slots", "measured"),
    ("Ridge in rows", "ridge_rows", "measured"),
    ("J/token", "joules_per_token", ""),
)


def render(comparison: Comparison, out: Path) -> Path:
    """Write `compare.html`, `compare.csv`, `compare.json` and `figures/` into a new folder under `out`; return the
    HTML's path. Raises UserError where that cannot be."""
    drawn = _figures(comparison)
    files: dict[str, str | bytes] = {
        "compare.html": _page(comparison, drawn),
        "compare.csv": pd.DataFrame(comparison.rows()).to_csv(index=False, lineterminator="\n"),
        "compare.json": to_json(comparison),
    }
    for figure in drawn:
        files |= {f"figures/{name}": content for name, content in figure.files().items()}
    return new_folder(out, "compare", files) / "compare.html"


def to_json(comparison: Comparison) -> str:
    """Every number, what it means, and what was left out. Never NaN: JSON has none."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "zbench_version": __version__,
        "definitions_version": DEFINITIONS_VERSION,
        "definitions_hash": definitions_hash(),
        "runs": [
            {
                "run": side.name, "device": side.device, "folder": side.run.path.name,
                "created": side.run.manifest.created, "zbench_version": side.run.manifest.zbench_version,
                "scenario_hash": side.run.manifest.scenario_hash,
                "environment_hash": side.run.manifest.environment_hash, "left_out": side.left_out,
            }
            for side in comparison.sides
        ],
        "imported": [asdict(found) for found in comparison.imported],
        "answers": answers(comparison),
        "notes": [*comparison.notes, *run_warnings(comparison)],
        "metrics": comparison.rows(),
    }  # fmt: skip
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def answers(comparison: Comparison) -> list[str]:
    """Which run is faster and by how much, which engine has the most tokens/s on each, how many blocks are best."""
    said = []
    for side in comparison.sides[1:]:
        for label, records in comparison.points.items():
            for record in records:
                ratio = comparison.ratio(side, record.id)
                if record.baseline and isinstance(ratio.value, float):
                    said.append(_faster(comparison, side, record, label, ratio))
    for side in comparison.sides:
        for label, records in comparison.points.items():
            if sentence := _fastest(side, label, records):
                said.append(sentence)
            mine = [side.cells[record.id] for record in records if record.id in side.cells]
            where = f"{side.name} at {label}" if label else side.name
            said += [f"{where}: {sentence}" for sentence in best_blocks(side.results, mine)]
    if not said and comparison.sides:
        said = ["No engine gave a decode speed in any of these runs."]
    return said + _beside(comparison)


def _beside(comparison: Comparison) -> list[str]:
    """How many results of other tools there are, and that they are no pairs of ours."""
    count = sum(len(found.results) for found in comparison.imported)
    if not count:
        return []
    tools = ", ".join(dict.fromkeys(found.tool for found in comparison.imported))
    what = f"{count} result{'' if count == 1 else 's'} of {tools} as reported there"
    return [f"{what}: other prompts, weights and machines may have been at work, so that no ratio is taken."]


def _faster(comparison: Comparison, side: Side, record: CellRecord, label: str, ratio: Estimate) -> str:
    value, first, at = float(ratio.value or 0), comparison.sides[0].name, f" at {label}" if label else ""
    if ratio.low is None or ratio.high is None:
        around = f"{clusters(side.cells[record.id], ratio.n)}: too few for an interval"
    elif ratio.low <= 1 <= ratio.high:
        return (
            f"{record.label}{at}: no difference between {side.name} and {first} is shown"
            f" ({value:.2f}×, {ratio.low:.2f}–{ratio.high:.2f})."
        )
    else:
        around = f"{ratio.low:.2f}–{ratio.high:.2f}"
    return f"{record.label}{at}: {side.name} decodes {value:.2f}× as fast as {first} ({around}, paired by prompt)."


def _fastest(side: Side, label: str, records: Sequence[CellRecord]) -> str:
    cells = [side.cells[r.id] for r in records if r.id in side.cells]
    known = [cell for cell in cells if side.results.value(cell, "decode_tps") is not None]
    if not known:
        return ""
    ranked = sorted(known, key=lambda cell: -(side.results.value(cell, "decode_tps") or 0))
    first, *others = (side.results.row(cell, "decode_tps") for cell in ranked)
    record = ranked[0].record
    ahead = not others or (
        first.low is not None and all(row.high is not None and first.low > row.high for row in others)
    )
    near = "" if ahead else ", not clearly ahead of the next"
    around = f" ({interval(first)})" if interval(first) else ""
    words = f" with {' and '.join(caveats(record))}" if caveats(record) else ""
    where = f"On {side.name} at {label}" if label else f"On {side.name}"
    speed = quantity(float(first.value or 0), first.unit)
    return f"{where} {record.label}{words} has the most tokens/s per sequence{near}: {speed}{around}."


# --- Tables ---


def _device_table(comparison: Comparison) -> Table:
    rows = []
    for side in comparison.sides:
        manifest = side.run.manifest
        roofs, dtype = side.run.roofs or {}, manifest.cells[0].dtype
        read, rate = roofs.get("bandwidth", {}).get("read"), roofs.get("flops", {}).get(dtype)
        entries = [
            Entry("Folder", side.run.path.resolve().name),
            Entry("Measured", manifest.created[:10]),
            Entry("zbench", manifest.zbench_version),
            Entry("Read bandwidth", quantity(read["value"], "B/s") if read else "not measured"),
            Entry("Arithmetic rate", quantity(rate["value"], "FLOP/s") if rate else "not measured", dtype),
            Entry("Ridge", quantity(rate["value"] / read["value"], "FLOP/B") if read and rate else "not measured"),
        ]
        rows.append(Line(side.name, entries))
    return Table([entry.heading for entry in rows[0].entries], rows, [])


def _speed_table(comparison: Comparison, records: Sequence[CellRecord]) -> Table:
    """Engines down, runs across: tokens/s with its interval, and how many times the first run's."""
    notes, rows = Notes(), []
    for record in records:
        entries = [_speed(comparison, side, record, notes) for side in comparison.sides]
        rows.append(Line(record.label, entries, ", ".join(caveats(record))))
    return Table([side.name for side in comparison.sides], rows, notes.listed())


def _speed(comparison: Comparison, side: Side, record: CellRecord, notes: Notes) -> Entry:
    if why := side.left_out.get(record.id):
        return Entry(side.name, "left out", mark=notes.mark(why))
    cell = side.cells.get(record.id)
    if cell is None:
        return Entry(side.name, "not in this run")
    if not cell.trials:
        if not cell.failed:
            return Entry(side.name, "not run yet")
        return Entry(side.name, "failed", mark=notes.mark(cell.failed[0].error or "no message"), wrong=True)
    speed = shown(side.name, side.results.row(cell, "decode_tps"), notes)
    ratio = comparison.ratio(side, record.id)
    against, note = "", ""
    if isinstance(ratio.value, float):
        note = "; ".join(part for part in ratio.note.split("; ") if not part.startswith("too few"))
        around = f" ({ratio.low:.2f}–{ratio.high:.2f})" if ratio.low is not None and ratio.high is not None else ""
        against = f"{ratio.value:.2f}×{around}"
    below, marks = (speed.below, against), (speed.mark, notes.mark(note))
    return Entry(side.name, speed.text, "; ".join(filter(None, below)), ", ".join(filter(None, marks)), speed.wrong)


def _detail_table(comparison: Comparison, records: Sequence[CellRecord]) -> Table:
    """What each run's engines make of their device, in every column that some run has."""
    columns = [
        (heading, metric, part)
        for heading, metric, part in COLUMNS
        if any(
            (row := main_metric(side, record.id, metric or "forward_seconds", part)) is not None
            and row.value is not None
            for side in comparison.sides
            for record in records
        )
    ]
    notes, rows = Notes(), []
    for record in records:
        for side in comparison.sides:
            if (cell := side.cells.get(record.id)) is not None and cell.trials:
                entries = html.of_engine(side.results, cell, columns, notes)
                rows.append(Line(f"{record.label}: {side.name}", entries))
    return Table([heading for heading, *_ in columns], rows, notes.listed())


def _frontier_table(comparison: Comparison) -> Table:
    rows = [
        Line(
            f"{side.name}: {label}",
            [Entry("Per user", quantity(x, "tokens/s")), Entry("Per device", quantity(y, "tokens/s"))],
        )
        for side in comparison.sides
        for x, y, label in frontier(_dots(side))
    ]
    return Table(["Per user", "Per device"], rows, [])


# --- Results of other tools ---

_STATISTICS = {"Mean": ("mean", ""), "Median": ("p50",), "90%": ("p90",), "99%": ("p99",)}  # "": a single value
_ABOUT = ("model", "device", "load", "requests", "measured")


def _imported_results(comparison: Comparison) -> Table:
    """Which tool reported what, on what."""
    rows = []
    for found in comparison.imported:
        for result in found.results:
            version = "" if found.version == NOT_REPORTED else found.version
            about = [Entry(name, result.settings.get(name, NOT_REPORTED)) for name in _ABOUT]
            more = [f"{name}: {value}" for name, value in result.settings.items() if name not in _ABOUT]
            rows.append(
                Line(_result_name(found, result), [Entry("Tool", found.tool, version), *about], "; ".join(more))
            )
    return Table(["Tool", *(name.capitalize() for name in _ABOUT)], rows, [])


def _result_name(found: Imported, result: Reported) -> str:
    return f"{found.name}: {result.label}"


def _imported_quantities(comparison: Comparison) -> list[dict[str, Any]]:
    """A table for each quantity that some tool reports: who says what, by which definition, zbench's runs below."""
    reported = [(found, result) for found in comparison.imported for result in found.results]
    sections = []
    for what, of in QUANTITIES.items():
        having = [(found, result) for found, result in reported if result.of(what)]
        if not having:
            continue
        rows = [_reported_line(found, result, what) for found, result in having]
        for side in comparison.sides:
            rows += [line for cell in side.cells.values() if (line := _own_line(side, cell, of))]
        silent = [_result_name(found, result) for found, result in reported if not result.of(what)]
        sections.append(
            {"heading": of.heading, "table": Table([*_STATISTICS, "Called"], rows, []), "silent": ", ".join(silent)}
        )
    return sections


def _reported_line(found: Imported, result: Reported, what: str) -> Line:
    figures = {statistic: figure.value for statistic, figure in result.of(what).items()}
    key = next(iter(result.of(what).values())).key
    return Line(
        _result_name(found, result),
        [*_spread(figures, QUANTITIES[what].unit, NOT_REPORTED), Entry("Called", key)],
        definition(found.tool, what),
    )


def _own_line(side: Side, cell: Cell, of: Quantity) -> Line | None:
    """What a run of zbench has of a quantity: of a server where it is one, else of the engine; None for neither."""
    served = [(of.metric, {"mean": "mean", "p50": "p50", "p90": "p90", "p99": "p99"} if of.spread else {"mean": ""})]
    for metric, parts in served + [(metric, {"mean": part}) for metric, part in _IN_PROCESS.get(of.metric, ())]:
        values = {name: side.results.value(cell, metric, part) for name, part in parts.items()}
        known = {name: value for name, value in values.items() if value is not None}
        if known:
            where = point_label(cell.record)
            name = f"{side.name}: {cell.record.label}" + (f" ({where})" if where else "")
            meaning = f"zbench: {METRICS[metric].formula}"
            return Line(name, [*_spread(known, of.unit, "not given"), Entry("Called", metric)], meaning)
    return None


def _spread(values: Mapping[str, float], unit: str, absent: str) -> list[Entry]:
    """One entry for each statistic, with the standard deviation below the mean."""
    entries = []
    for heading, names in _STATISTICS.items():
        found = next((values[name] for name in names if name in values), None)
        below = f"± {html.in_column(values['std'], unit)}" if heading == "Mean" and "std" in values else ""
        entries.append(Entry(heading, absent if found is None else html.in_column(found, unit), below))
    return entries


# What stands for a server's metric in an engine of this process.
_IN_PROCESS = {
    "served_ttft": (("ttft", ""),),
    "server_acceptance_length": (("acceptance_length", "micro"),),
    "server_draft_acceptance_rate": (("draft_acceptance_rate", ""),),
}


# --- Figures ---

Dot = tuple[float, float, str]  # tokens/s per user, tokens/s per device, which cell


def _dots(side: Side) -> list[Dot]:
    found = []
    for cell in side.cells.values():
        x, y = (side.results.value(cell, metric) for metric in ("decode_tps", "throughput_per_device"))
        if x is not None and y is not None:
            where = point_label(cell.record)
            found.append((x, y, f"{cell.record.label}, {where}" if where else cell.record.label))
    return found


def frontier(dots: Sequence[Dot]) -> list[Dot]:
    """The dots that no other one equals or beats in both directions, by tokens/s per user."""
    best, kept = float("-inf"), []
    for dot in sorted(dots, key=lambda d: (-d[0], -d[1])):
        if dot[1] > best:
            best = dot[1]
            kept.append(dot)
    return kept[::-1]


def _figures(comparison: Comparison) -> list[Drawn]:
    found = [_speeds(comparison, label, records) for label, records in list(comparison.points.items())[:DRAWN]]
    return [figure for figure in [*found, _pareto(comparison)] if figure]


def _speeds(comparison: Comparison, label: str, records: Sequence[CellRecord]) -> Drawn | None:
    known = {
        (record.id, index): row
        for record in records
        for index, side in enumerate(comparison.sides)
        if (row := main_metric(side, record.id, "decode_tps")) is not None and row.value is not None
    }
    if not known:
        return None
    count = len(comparison.sides)

    def paint(axes: Axes, theme: Theme) -> None:
        for index, side in enumerate(comparison.sides):
            colour, marker = theme.series[index % len(theme.series)], MARKERS[index % len(MARKERS)]
            for place, record in enumerate(records):
                if (row := known.get((record.id, index))) is None:
                    continue
                at = place + 0.05 + 0.34 * (index / max(count - 1, 1) - 0.5) * (count > 1)
                if row.low is not None and row.high is not None:
                    axes.plot([row.low, row.high], [at, at], color=colour, lw=2.2, alpha=0.6, solid_capstyle="butt")
                axes.plot(row.value, at, marker, ms=5.5, color=colour, mew=0)
            axes.plot([], [], marker, ms=5.5, ls="none", color=colour, label=figures.shortened(side.name, 34))
        figures.named_rows(axes, [record.label for record in records])
        axes.set(xlabel="tokens per second and sequence, decode", xlim=(0, None))
        figures.legend_below(axes, 1)

    said = "; ".join(
        f"{record.label} "
        + ", ".join(
            f"{comparison.sides[index].name} {quantity(known[record.id, index].value, 'tokens/s')}"
            if (record.id, index) in known
            else f"{comparison.sides[index].name} nothing"
            for index in range(count)
        )
        for record in records
    )
    return figures.drawn(
        "speeds", label, "Decode speed of every engine on every run",
        "Tokens per second of one sequence; line: 95% interval. An engine without a mark has no result in that run.",
        f"{said}.", figures.row_height(len(records), legend_lines=count), paint,
        added=f" at {label}" if label else "",
    )  # fmt: skip


def _pareto(comparison: Comparison) -> Drawn | None:
    sides = [(index, side, dots) for index, side in enumerate(comparison.sides) if (dots := _dots(side))]
    if not sides:
        return None

    def paint(axes: Axes, theme: Theme) -> None:
        for index, side, dots in sides:
            colour, marker = theme.series[index % len(theme.series)], MARKERS[index % len(MARKERS)]
            x, y, _ = zip(*dots, strict=True)
            axes.plot(x, y, marker, ms=5.5, ls="none", color=colour, mfc="none", mew=1.2)
            x, y, _ = zip(*frontier(dots), strict=True)
            axes.plot(x, y, f"{marker}-", ms=5.5, lw=1.2, color=colour, mew=1.2, label=figures.shortened(side.name, 34))
        axes.set(xlabel="tokens/s per user", ylabel="tokens/s per device", xlim=(0, None), ylim=(0, None))
        figures.legend_below(axes, 1)

    said = "; ".join(
        f"{side.name}: " + ", ".join(f"{label} at {x:.3g} and {y:.3g}" for x, y, label in frontier(dots))
        for _, side, dots in sides
    )
    return figures.drawn(
        "pareto", "", "Speed of one user against use of the device",
        "One mark for each engine at each point. Filled and joined: those that no other of the same run beats in both. "
        "A user sees decode only; per device, prefill counts too.",
        f"{said}.", 3.2 + 0.2 * len(sides), paint,
    )  # fmt: skip


# --- Page ---


def _page(comparison: Comparison, drawn: Sequence[Drawn]) -> str:
    first = comparison.sides[0] if comparison.sides else None
    speeds = {figure.name: figure for figure in drawn}

    def point(label: str, records: Sequence[CellRecord]) -> dict[str, Any]:
        figure = speeds.get(figures.file_name("speeds", label))
        return {
            "label": label,
            "speeds": _speed_table(comparison, records),
            "figure": html.image(figure) if figure else None,
            "details": _detail_table(comparison, records),
        }

    pareto = speeds.get("pareto")
    return (
        html.templates()
        .get_template("compare.html")
        .render(
            name=first.run.manifest.name if first else "Results of other tools",
            description=first.run.manifest.description if first else "",
            count=len(comparison.sides) + len(comparison.imported),
            answers=answers(comparison),
            notes=[*comparison.notes, *run_warnings(comparison)],
            devices=_device_table(comparison) if first else None,
            clusters=html.clusters_of(comparison.cells.values()),
            points=[point(label, records) for label, records in comparison.points.items()],
            pareto=html.image(pareto) if pareto else None,
            frontier=_frontier_table(comparison),
            imported=_imported_results(comparison) if comparison.imported else None,
            quantities=_imported_quantities(comparison),
            first=first.name if first else "",
            definitions=[METRICS[metric] for _, metric, _ in COLUMNS if metric in METRICS],
            definitions_version=DEFINITIONS_VERSION,
            definitions_hash=definitions_hash(),
            version=__version__,
        )
    )


def run_warnings(comparison: Comparison) -> list[str]:
    """What each run warns of, once where several say the same."""
    found: dict[str, list[str]] = {}
    for side in comparison.sides:
        for sentence in warnings(side.results):
            found.setdefault(sentence, []).append(side.name)
    everyone = len(comparison.sides)
    return [
        sentence if len(names) == everyone else f"{', '.join(names)}: {sentence}" for sentence, names in found.items()
    ]
