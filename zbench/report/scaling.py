"""The part of a report that only a run across devices has: what each engine makes of more of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zbench.metrics import Cell, caveats
from zbench.report import figures
from zbench.report.figures import MARKERS, Drawn, Theme
from zbench.report.findings import interval, quantity
from zbench.report.html import MAIN_KIND, Line, Notes, Table, of_engine
from zbench.report.readings import families
from zbench.results import Results, main_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    ("Tokens/s", "decode_tps", ""),
    ("Per device", "throughput_per_device", ""),
    ("Efficiency", "parallel_efficiency", ""),
    ("In collectives", "communication_share", "decode"),
    MAIN_KIND,
    ("Sent per forward", "collective_bytes", "main"),
    ("Of bandwidth roof", "mbu", "main"),
    ("Bound by", "bound", "main"),
)


@dataclass(frozen=True)
class Group:
    """Cells that differ in engine and number of devices only."""

    label: str  # the rest of the point
    cells: tuple[Cell, ...]

    def of(self, engine: str) -> list[Cell]:
        """The engine's cells with results, by number of devices, replicas last."""
        mine = [cell for cell in self.cells if cell.record.label == engine and cell.trials]
        return sorted(mine, key=lambda cell: (cell.record.replicas, cell.devices))


@dataclass(frozen=True)
class Scaling:
    label: str
    sentences: list[str]
    table: Table
    figures: list[Drawn]


def sections(results: Results) -> list[Scaling]:
    """One for each point of the matrix that was measured on several devices."""
    return [
        Scaling(group.label, _sentences(results, group), _table(results, group), _figures(results, group))
        for group in _groups(results)
    ]


def _groups(results: Results) -> list[Group]:
    found: dict[str, list[Cell]] = {}
    for cell in results.run.cells:
        rest = (f"{axis} {value}" for axis, value in cell.record.point.items() if axis.split(".")[0] != "parallel")
        found.setdefault(", ".join(rest), []).append(cell)
    groups = [Group(label, tuple(cells)) for label, cells in found.items()]
    return [group for group in groups if any(cell.devices > 1 for cell in group.cells)]


def _place(cell: Cell) -> str:
    """ "4 devices", "2 replicas of 2 devices"."""
    each = f"{cell.record.tensor} device{'' if cell.record.tensor == 1 else 's'}"
    return each if cell.record.replicas == 1 else f"{cell.record.replicas} replicas of {each}"


def _table(results: Results, group: Group) -> Table:
    notes, rows = Notes(), []
    for engine in dict.fromkeys(cell.record.label for cell in group.cells):
        for cell in group.of(engine):
            entries = of_engine(results, cell, COLUMNS, notes)
            rows.append(Line(f"{engine}: {_place(cell)}", entries, ", ".join(caveats(cell.record))))
    return Table([heading for heading, *_ in COLUMNS], rows, notes.listed())


def _sentences(results: Results, group: Group) -> list[str]:
    said = []
    for engine in dict.fromkeys(cell.record.label for cell in group.cells):
        known = [cell for cell in group.of(engine) if results.value(cell, "parallel_efficiency") is not None]
        if known:
            last = known[-1]
            row = results.row(last, "parallel_efficiency")
            around = f" ({interval(row)})" if interval(row) else ""
            share = results.value(last, "communication_share", "decode")
            talking = "" if share is None else f", with {quantity(share, '1')} of decode in collectives"
            said.append(f"{engine} on {_place(last)}: {quantity(row.value, '1')} efficient{around}{talking}.")  # type: ignore[arg-type]
            break  # the table has the others
    return said + best_blocks(results, group.cells)


def best_blocks(results: Results, cells: Sequence[Cell]) -> list[str]:
    """For each number of devices, the number of proposed blocks that decodes fastest among those that were run."""
    found: dict[tuple[int, str, int, int], list[Cell]] = {}
    for (block, others), mine in families(cells).items():
        for cell in mine:
            if results.value(cell, "decode_tps") is not None:
                found.setdefault((block, others, cell.record.tensor, cell.record.replicas), []).append(cell)
    said = []
    for (block, others, tensor, replicas), mine in sorted(found.items()):
        if len({str(cell.record.options["proposals"]) for cell in mine}) < 2:
            continue
        ranked = sorted(mine, key=lambda cell: -(results.value(cell, "decode_tps") or 0))
        first, second = (results.row(cell, "decode_tps") for cell in ranked[:2])
        apart = first.low is not None and second.high is not None and first.low > second.high
        near = "" if apart else ", not clearly ahead of the next"
        where = f"{tensor} device{'' if tensor == 1 else 's'}" + (f", {replicas} replicas" if replicas > 1 else "")
        proposals = ranked[0].record.options["proposals"]
        what = "all outcomes" if proposals == "all" else f"{proposals} block{'' if proposals == 1 else 's'}"
        speed = quantity(float(first.value or 0), first.unit)
        around = f" ({interval(first)})" if interval(first) else ""
        family = f"Blocks of {block}" + (f" with {others}" if others else "")
        said.append(f"{family} on {where}: proposing {what} is fastest{near}, {speed}{around}.")
    return said


def _figures(results: Results, group: Group) -> list[Drawn]:
    drawn = [
        _curve(
            results, group, "throughput_per_device", "", "Tokens/s per device",
            "All committed tokens over the wall and the devices that hold the model: level where devices are put to as "
            "good a use as one alone. Bars: 95% interval.", "tokens/s per device",
        ),
        _curve(
            results, group, "communication_share", "decode", "Time in collectives",
            "Share of the time of decode forwards that rank 0 spent in collectives, waiting for the others included.",
            "share of decode forwards",
        ),
        _roofline(results, group),
    ]  # fmt: skip
    return [figure for figure in drawn if figure]


Dots = list[tuple[int, float, float | None, float | None]]  # devices, value, interval


def _curve(results: Results, group: Group, metric: str, part: str, title: str, caption: str, unit: str) -> Drawn | None:
    lines: dict[str, Dots] = {}
    for cell in group.cells:
        row = results.row(cell, metric, part)
        if cell.record.replicas == 1 and isinstance(row.value, float):
            lines.setdefault(cell.record.label, []).append((cell.record.tensor, row.value, row.low, row.high))
    lines = {engine: sorted(dots) for engine, dots in lines.items()}
    sizes = sorted({devices for dots in lines.values() for devices, *_ in dots})
    if len(sizes) < 2:
        return None

    def paint(axes: Axes, theme: Theme) -> None:
        for engine, dots in lines.items():
            index = results.engines.index(engine)
            colour, marker = theme.series[index % len(theme.series)], MARKERS[index % len(MARKERS)]
            x, y = [d[0] for d in dots], [d[1] for d in dots]
            axes.plot(x, y, f"{marker}-", ms=5, lw=1.2, color=colour, label=figures.shortened(engine, 30))
            for at, _, low, high in dots:
                if low is not None and high is not None:
                    axes.plot([at, at], [low, high], color=colour, lw=2, alpha=0.5)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, labels=[str(size) for size in sizes])
        axes.minorticks_off()
        axes.set(
            xlabel="devices that hold the model", ylabel=unit, ylim=(0, 1 if metric == "communication_share" else None)
        )
        figures.legend_below(axes, min(2, len(lines)))

    said = "; ".join(
        f"{engine} " + ", ".join(f"{value:.3g} on {devices}" for devices, value, *_ in dots)
        for engine, dots in lines.items()
    )
    return figures.drawn(metric, group.label, title, caption, f"{said}.", 2.6 + 0.2 * -(-len(lines) // 2), paint)


def _roofline(results: Results, group: Group) -> Drawn | None:
    """Each engine's main forward under one device's roofs, a dot per number of devices."""
    roofs = group.cells[0].roofs or {}
    dtype = group.cells[0].record.dtype
    read, rate = roofs.get("bandwidth", {}).get("read"), roofs.get("flops", {}).get(dtype)
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for cell in group.cells:
        kind = main_kind(cell)
        x, y = (results.value(cell, metric, kind) for metric in ("intensity", "achieved_flops"))
        if cell.record.replicas == 1 and x and y:
            lines.setdefault(cell.record.label, []).append((cell.record.tensor, x, y))
    if not lines or read is None or rate is None:
        return None
    bandwidth, peak = float(read["value"]), float(rate["value"])

    def paint(axes: Axes, theme: Theme) -> None:
        from matplotlib.ticker import EngFormatter

        xs = [x for dots in lines.values() for _, x, _ in dots] + [peak / bandwidth]
        left, right = min(xs) / 4, max(xs) * 6
        axes.plot([left, peak / bandwidth, right], [left * bandwidth, peak, peak], color=theme.ink, lw=1.2)
        for engine, dots in lines.items():
            index = results.engines.index(engine)
            colour, marker = theme.series[index % len(theme.series)], MARKERS[index % len(MARKERS)]
            _, x, y = zip(*sorted(dots), strict=True)
            axes.plot(x, y, f"{marker}-", ms=5.5, lw=0.8, color=colour, label=figures.shortened(engine, 30))
            for devices, at_x, at_y in dots:
                axes.annotate(
                    str(devices), (at_x, at_y), xytext=(6, -3), textcoords="offset points", fontsize=7,
                    color=theme.muted,
                )  # fmt: skip
        axes.set(
            xscale="log",
            yscale="log",
            xlim=(left, right),
            xlabel="intensity, FLOP per byte",
            ylabel="FLOP/s per device",
        )
        figures.name_log_ticks(axes.xaxis)
        figures.name_log_ticks(axes.yaxis, EngFormatter())
        figures.legend_below(axes, min(2, len(lines)))

    said = "; ".join(
        f"{engine} "
        + ", ".join(f"{x:.3g} FLOP per byte and {quantity(y, 'FLOP/s')} on {n}" for n, x, y in sorted(dots))
        for engine, dots in lines.items()
    )
    return figures.drawn(
        "device_roofline", group.label, "One device’s share under its roofs",
        "The forward that takes most of decode, as rank 0 runs its part of it; numbers: devices that hold the model. "
        "More devices read fewer weights each and take the same rows: dots move little to the side, and down where "
        "communication and overhead take over.",
        f"{said}.", 3.3 + 0.2 * -(-len(lines) // 2), paint,
    )  # fmt: skip
