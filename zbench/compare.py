"""Runs beside one another, from any machines: which cells may be compared, and what each run says of them.

Runs are comparable that measured the same scenario on the same prompts with the same weights; where they were made does
not matter, that is what is compared. Ratios are of pairs, the same prompt and repeat, against the first run.

Imported results of other tools stand beside the runs, with what each tool means by its figures. Whether their prompts
and weights were the same is not known, so that no ratio is taken of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from zbench import stats
from zbench.errors import UserError
from zbench.gate import NotComparable
from zbench.imported import IMPORTED, QUANTITIES, Imported
from zbench.imported import load as load_imported
from zbench.importers import definition
from zbench.metrics import METRICS, SYNTHETIC, TIMES_FORWARDS, Cell, Run, caveats, load_run
from zbench.records import MANIFEST, SCHEMA_VERSION, CellRecord, schema_version
from zbench.results import Results, main_kind, point_label
from zbench.stats import Estimate, unavailable

# What must agree for two cells to be the same thing measured twice, beside their names and the model's weights.
_SAME = ("engine", "options", "dtype", "batch", "context", "output_tokens", "sampling", "tensor", "replicas")


@dataclass(frozen=True)
class Side:
    """One run, as the page calls it."""

    name: str
    results: Results
    cells: Mapping[str, Cell]  # by id: those that are compared
    left_out: Mapping[str, str]  # by id: why not

    @property
    def run(self) -> Run:
        return self.results.run

    @property
    def device(self) -> str:
        return device_name(self.run)


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; the first is what the others are held against. There may be none but imported ones."""

    sides: tuple[Side, ...]
    dropped: tuple[str, ...]  # whole runs that were left out, and why
    imported: tuple[Imported, ...] = ()

    @cached_property
    def cells(self) -> dict[str, CellRecord]:
        """Every cell that some run planned, by id, in the order of the runs."""
        found: dict[str, CellRecord] = {}
        for side in self.sides:
            for record in side.run.manifest.cells:
                found.setdefault(record.id, record)
        return found

    @cached_property
    def points(self) -> dict[str, list[CellRecord]]:
        """The cells by the label of their point."""
        found: dict[str, list[CellRecord]] = {}
        for record in self.cells.values():
            found.setdefault(point_label(record), []).append(record)
        return found

    @cached_property
    def notes(self) -> list[str]:
        """What is not in the comparison, or less comparable than it looks."""
        said = [*self.dropped]
        for side in self.sides:
            said += [f"{side.name}: {_title(self.cells[c])} is left out: {why}." for c, why in side.left_out.items()]
            planned = {record.id for record in side.run.manifest.cells}
            if absent := [_title(record) for cell, record in self.cells.items() if cell not in planned]:
                said.append(f"{side.name} has no {', '.join(absent)}.")
        for side in self.sides[1:]:
            first = self.sides[0].run.manifest
            if side.run.manifest.zbench_version != first.zbench_version:
                theirs = side.run.manifest.zbench_version
                said.append(
                    f"{side.name} was measured by zbench {theirs}, {self.sides[0].name} by {first.zbench_version}."
                )
        for found in self.imported:
            said += [f"{found.name}, {result.label}: {note}." for result in found.results for note in result.notes]
        return said

    def ratio(self, side: Side, cell: str) -> Estimate:
        """How many times as fast the cell decodes as in the first run: seconds per token there over those here, same
        prompt and repeat; geometric mean over pairs."""
        if side is self.sides[0]:
            return unavailable("this is the run that others are compared with")
        mine, theirs = side.cells.get(cell), self.sides[0].cells.get(cell)
        if mine is None or theirs is None or not mine.trials or not theirs.trials:
            return unavailable("one of the two has no result")
        if mine.record.engine == "forward":
            return unavailable(f"this engine {TIMES_FORWARDS}")
        columns = ["prompt_id", "repeat", "group", "later", "decode_seconds", "output_hash"]
        pairs = mine.requests[columns].merge(
            theirs.requests[columns], on=["prompt_id", "repeat"], suffixes=("", "_first")
        )
        pairs = pairs[(pairs["later"] > 0) & (pairs["later_first"] > 0)]
        if pairs.empty:
            return unavailable("no prompt emitted tokens after the first step in both")
        if (pairs[["decode_seconds", "decode_seconds_first"]] <= 0).any(axis=None):
            return unavailable("responses came in one piece: their tokens have no times")
        here, there = (pairs[f"decode_seconds{s}"] / pairs[f"later{s}"] for s in ("", "_first"))
        estimate = stats.paired_ratio(there, here, pairs["group"])
        notes = [estimate.note]
        if len(pairs) < (most := max(int((cell.requests["later"] > 0).sum()) for cell in (mine, theirs))):
            words = "the others do so, or have a result, in one run only"
            notes.append(f"{len(pairs)} of {most} requests that go on after their first step are paired; {words}")
        same = int((pairs["output_hash"] == pairs["output_hash_first"]).sum())
        if same < len(pairs) and SYNTHETIC not in caveats(mine.record):
            notes.append(f"{same} of {len(pairs)} pairs emitted the same tokens; the others are compared per token")
        return replace(estimate, note="; ".join(filter(None, notes)))

    def rows(self) -> list[dict[str, Any]]:
        """Every metric of every compared cell of every run, and the ratios: what the CSV and the JSON hold."""
        found = []
        for side in self.sides:
            for row in side.results.rows:
                if row.cell in side.cells:
                    found.append(
                        {
                            "run": side.name, "device": side.device, "cell": row.cell, "metric": row.metric,
                            "part": row.part, "value": row.value, "low": row.low, "high": row.high, "n": row.n,
                            "unit": row.unit, "status": row.status, "note": row.note, "caveat": row.caveat,
                        }
                    )  # fmt: skip
            for cell in self.cells:
                estimate = self.ratio(side, cell)
                found.append(
                    {
                        "run": side.name, "device": side.device, "cell": cell, "metric": "speed_against_first",
                        "part": "", "value": estimate.value, "low": estimate.low, "high": estimate.high,
                        "n": estimate.n, "unit": "ratio", "status": estimate.status, "note": estimate.note,
                        "caveat": "",
                    }
                )  # fmt: skip
        for imported in self.imported:
            for result in imported.results:
                for figure in result.figures:
                    found.append(
                        {
                            "run": imported.name, "device": result.settings.get("device", ""), "cell": result.label,
                            "metric": figure.quantity, "part": figure.statistic, "value": figure.value, "low": None,
                            "high": None, "n": 0, "unit": QUANTITIES[figure.quantity].unit, "status": "imported",
                            "note": figure.key, "caveat": definition(imported.tool, figure.quantity),
                        }
                    )  # fmt: skip
        return found


def compare(folders: Sequence[Path], cross_hardware: bool = False) -> Comparison:
    """Read the runs and see what of them is the same thing, measured more than once. Folders of `zbench import` are
    taken as they are.

    Raises NotComparable where they measured different scenarios, prompts or weights; with `cross_hardware` only where
    nothing is left that is the same in two of them. Raises UserError for folders that are no runs.
    """
    if doubled := sorted({str(f) for f in folders if [g.resolve() for g in folders].count(f.resolve()) > 1}):
        raise UserError(f"{doubled[0]} is given twice")
    imported = tuple(load_imported(folder) for folder in folders if (folder / IMPORTED).exists())
    runs = [_read(folder) for folder in folders if not (folder / IMPORTED).exists()]
    if not runs:
        return Comparison((), (), imported)
    if not cross_hardware and (reasons := list(_obstacles(runs))):
        raise NotComparable("; ".join(reasons) + "; --cross-hardware compares what is the same")
    dropped, kept = [], [runs[0]]
    for run in runs[1:]:
        if run.manifest.prompts_hash != runs[0].manifest.prompts_hash:
            dropped.append(
                f"{run.path.name} is left out: its prompts, as token ids, are not those of {runs[0].path.name}."
            )
        else:
            kept.append(run)
    names = _names(kept)
    sides = []
    for run, name in zip(kept, names, strict=True):
        cells, left_out = {}, {}
        for cell in run.cells:
            if why := _difference(run, runs[0], cell.record):
                left_out[cell.record.id] = why
            else:
                cells[cell.record.id] = cell
        sides.append(Side(name, Results.of(run), cells, left_out))
    if len(runs) > 1:
        shared = [cell for cell in sides[0].cells if any(cell in side.cells for side in sides[1:])]
        if not shared:
            raise NotComparable("nothing in these runs is the same thing measured twice; " + " ".join(dropped))
    return Comparison(tuple(sides), tuple(dropped), imported)


def device_name(run: Run) -> str:
    """As its driver names it, and how many where a model or its replicas were spread."""
    name = run.manifest.environment.get("device", {}).get("name", "an unrecorded device")
    most = max((cell.tensor * cell.replicas for cell in run.manifest.cells), default=1)
    return f"{most} x {name}" if most > 1 else str(name)


def _title(record: CellRecord) -> str:
    where = point_label(record)
    return f"{record.label} ({where})" if where else record.label


def main_metric(side: Side, cell: str, metric: str, part: str = "") -> Any:
    """The metric row of a compared cell; part "main" is the kind of forward that takes most of decode. None where the
    cell is not compared, or the metric is not one of this zbench's."""
    if cell not in side.cells or metric not in METRICS:
        return None
    found = side.cells[cell]
    return side.results.row(found, metric, main_kind(found) if part == "main" else part)


def _read(folder: Path) -> Run:
    if (folder / "projection.json").exists():
        raise UserError(f"{folder} is a projection: nothing was measured that could be compared")
    if (found := schema_version(folder / MANIFEST)) not in (None, SCHEMA_VERSION):
        raise NotComparable(f"{folder} has schema {found}, this zbench reads {SCHEMA_VERSION}: run it again")
    return load_run(folder)


def _obstacles(runs: Sequence[Run]) -> Iterator[str]:
    first = runs[0]
    for run in runs[1:]:
        name, mine, theirs = run.path.name, run.manifest, first.manifest
        if mine.scenario_hash != theirs.scenario_hash:
            yield f"{name} measured another scenario than {first.path.name}"
        if mine.prompts_hash != theirs.prompts_hash:
            yield f"{name} decoded other prompts"
        for model in sorted(mine.models.keys() & theirs.models.keys()):
            if mine.models[model].get("hash") != theirs.models[model].get("hash"):
                yield f"model {model} has other weights in {name}"


def _difference(run: Run, first: Run, record: CellRecord) -> str:
    """Why a cell is not what the first run calls so; "" where it is, or the first has none of that name."""
    theirs = next((cell for cell in first.manifest.cells if cell.id == record.id), None)
    if theirs is None or run is first:
        return ""
    for name in _SAME:
        mine, other = (_given(getattr(cell, name)) for cell in (record, theirs))
        if mine != other:
            return f"{name} is {mine} here and {other} in {first.path.name}"
    weights = [r.manifest.models.get(c.model, {}).get("hash") for r, c in ((run, record), (first, theirs))]
    if weights[0] != weights[1]:
        return f"the model has other weights than in {first.path.name}"
    mine, other = (_drafters(r, record.id) for r in (run, first))
    return f"the drafter has other weights than in {first.path.name}" if mine and other and mine != other else ""


def _drafters(run: Run, cell: str) -> set[str]:
    """Hashes of the drafters or adapters that a cell's trials say they had."""
    kernels = [trial.kernels or {} for trial in run.trials if trial.cell == cell and trial.status == "ok"]
    return {each[key] for each in kernels for key in ("drafter_weights", "mask_adapter") if key in each}


def _given(value: Any) -> Any:
    """Options without those that are null: an older zbench may not have had them."""
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


def _names(runs: Sequence[Run]) -> list[str]:
    """The device, and the folder where several runs are of one device."""
    devices = [device_name(run) for run in runs]
    named = [
        f"{device} ({run.path.resolve().name})" if devices.count(device) > 1 else device
        for device, run in zip(devices, runs, strict=True)
    ]
    return [f"{name} ({i + 1})" if named.count(name) > 1 else name for i, name in enumerate(named)]
