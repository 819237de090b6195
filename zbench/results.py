"""A run with its metrics, looked up by cell, metric and part: what reports and comparisons read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from zbench.metrics import Cell, MetricRow, Run, missing_part, summarise
from zbench.records import CellRecord


@dataclass(frozen=True)
class Point:
    """One point of the matrix: the cells that were measured under the same conditions."""

    label: str  # "batch 4, dtype float32"; "" where the scenario has no matrix
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Results:
    """A run with its metrics, looked up by cell, metric and part."""

    run: Run
    rows: tuple[MetricRow, ...]

    @classmethod
    def of(cls, run: Run) -> Results:
        return cls(run, tuple(summarise(run)))

    @cached_property
    def points(self) -> tuple[Point, ...]:
        cells: dict[str, list[Cell]] = {}
        for cell in self.run.cells:
            cells.setdefault(point_label(cell.record), []).append(cell)
        return tuple(Point(label, tuple(members)) for label, members in cells.items())

    @cached_property
    def engines(self) -> tuple[str, ...]:
        """Labels in order of first appearance; an engine keeps its colour and marker throughout a report."""
        return tuple(dict.fromkeys(cell.record.label for cell in self.run.cells))

    def row(self, cell: Cell, metric: str, part: str = "") -> MetricRow:
        """The row of that part, or the one that says why the metric has no parts here."""
        found = self._rows.get((cell.record.id, metric, part)) or self._rows.get((cell.record.id, metric, ""))
        return found or missing_part(cell, metric, part)

    def value(self, cell: Cell, metric: str, part: str = "") -> float | None:
        row = self._rows.get((cell.record.id, metric, part))
        return row.value if row and isinstance(row.value, float) else None

    @cached_property
    def _rows(self) -> dict[tuple[str, str, str], MetricRow]:
        return {(row.cell, row.metric, row.part): row for row in self.rows}


def point_label(record: CellRecord) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in record.point.items())


def main_kind(cell: Cell) -> str:
    """The kind of forward that takes most of decode; "" where forwards are not seen."""
    decode = cell.forwards[cell.forwards["step"] > 0]
    return "" if decode.empty else str(decode.groupby("kind", sort=False)["seconds"].sum().idxmax())
