"""Runs over time: an append-only file, one line of JSON per run, and where in it a metric changed.

Points are joined into one line only where the gate would compare them: same scenario, prompts, weights, device,
definition and trials. Along a line, counts are compared to the last digit; all else is split by E-divisive
(`zbench.changes`). It needs neither torch nor the run folders: a history outlives them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from zbench import gate
from zbench.changes import change_points
from zbench.errors import UserError
from zbench.hardware import environment
from zbench.metrics import METRICS, Better, caveats, load_run, summarise
from zbench.records import MANIFEST, Manifest

SCHEMA_VERSION = 1
_START = '{"kind":"zbench history"'  # of every line: tells the first one, cut off by a crash, from another file's

Finite = Annotated[float, Field(allow_inf_nan=False)]
Added = Literal[
    "added", "there already", "replaces what was added before it had finished",
    "not added: what is there already has as many trials or more",
]  # fmt: skip


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Number(_Part):
    """One value with its 95% interval; `n` counts prompts, or what the metric's estimator counts."""

    value: Finite
    low: Finite | None
    high: Finite | None
    n: int


class Meaning(_Part):
    unit: str
    better: Better
    definition: str  # digest


class CellNumbers(_Part):
    trials: str  # digest of the (group, repeat) that succeeded
    stable: bool  # False: greedy outputs vary by themselves, so no count is exact
    caveat: str  # what its engine's acceptance is not
    metrics: dict[str, dict[str, Number]]  # metric -> part -> number


class Entry(_Part):
    """One line: a run's numbers and what they are of."""

    kind: Literal["zbench history"] = "zbench history"
    schema_version: Literal[1] = 1
    run: str  # digest of its manifest
    trials: str  # digest of its trials
    scenario: str  # the name
    folder: str  # relative to the history's folder
    created: str  # ISO 8601, UTC
    commit: str | None
    note: str
    url: str | None
    zbench_version: str
    environment_hash: str
    identity: dict[str, JsonValue]  # what two points of one line have in common
    metrics: dict[str, Meaning]
    cells: dict[str, CellNumbers]


@dataclass(frozen=True, slots=True)
class Change:
    """The level is another one from point `index` of a line on. `p` is None for a count, which has no chance in it."""

    index: int
    before: float  # mean since the change before
    after: float
    p: float | None

    @property
    def relative(self) -> float | None:
        return self.after / self.before - 1 if self.before else None


@dataclass(frozen=True, slots=True)
class Line:
    """Points that may be compared with each other, by time. `differs` says in what from the series' first line."""

    points: tuple[tuple[Entry, Number], ...]
    differs: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def level(self) -> float:
        """Mean since the last change."""
        since = self.changes[-1].index if self.changes else 0
        return _mean([number.value for _, number in self.points[since:]])


@dataclass(frozen=True, slots=True)
class Series:
    """One metric of one cell over time. The last line is the one with the newest point."""

    scenario: str
    cell: str
    metric: str
    part: str
    unit: str
    better: Better
    caveat: str
    lines: tuple[Line, ...]

    @property
    def name(self) -> str:
        return f"{self.metric} ({self.part})" if self.part else self.metric

    @property
    def points(self) -> list[tuple[Entry, Number]]:
        return sorted((point for line in self.lines for point in line.points), key=lambda point: point[0].created)


# --- Write ---


def add(run: Path, file: Path, note: str = "", commit: str | None = None, url: str | None = None) -> Added:
    """Append a run to a history, which is made if it is not there. A run that it holds is not added twice, unless more
    of its trials have succeeded since.

    `commit` is of the program under test; None takes the commit of zbench that the run recorded. Two processes may add
    at once. Raises UserError where the run has no numbers, where the file is no history, or cannot be written.
    """
    if url and not url.startswith(("https://", "http://")):
        raise UserError(f"{url}: not a web address; --url takes one that begins with https://")
    entry = _entry(run, file, note, commit, url)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock"), timeout=60):
            entries, _ = read(file) if file.exists() else ((), ())
            same = next((old for old in entries if old.run == entry.run), None)
            if same and same.trials == entry.trials:
                return "there already"
            if same and _succeeded(same) >= _succeeded(entry):
                return "not added: what is there already has as many trials or more"
            _append(file, entry.model_dump_json())
    except Timeout:
        raise UserError(f"another zbench has been writing to {file} for a minute; try again") from None
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
    return "replaces what was added before it had finished" if same else "added"


def _succeeded(entry: Entry) -> float:
    """Trials of all its cells; `n` of failed ones counts both."""
    told = (number for cell in entry.cells.values() for number in cell.metrics.get("failed_trials", {}).values())
    return sum(number.n - number.value for number in told)


def _append(file: Path, line: str) -> None:
    """Whole or not at all. What a crash left of the last line becomes a line of its own."""
    with file.open("a+b") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - 1))
        torn = opened.read(1) not in (b"", b"\n")
        try:
            opened.write(b"\n" * torn + line.encode() + b"\n")
            opened.flush()
            os.fsync(opened.fileno())
        except BaseException:
            os.truncate(file, size)
            raise


def _entry(folder: Path, file: Path, note: str, commit: str | None, url: str | None) -> Entry:
    run = load_run(folder)
    if not any(cell.trials for cell in run.cells):
        raise UserError(f"{folder}: no trial succeeded, so there is nothing to keep")
    manifest = run.manifest
    numbers: dict[str, dict[str, dict[str, Number]]] = {cell.record.id: {} for cell in run.cells}
    for row in summarise(run):
        if isinstance(row.value, float) and row.better != "none":
            number = Number(value=row.value, low=row.low, high=row.high, n=row.n)
            numbers[row.cell].setdefault(row.metric, {})[row.part] = number
    told = {metric for cell in numbers.values() for metric in cell}
    recorded = manifest.environment.get("zbench", {}).get("commit", "unavailable")
    return Entry(
        run=hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16],
        trials=gate.digest(sorted(trial.key for trial in run.trials if trial.status == "ok")),
        scenario=manifest.name,
        folder=_relative(folder, file.parent),
        created=manifest.created,
        commit=commit or (None if recorded.startswith("unavailable") else recorded),
        note=note,
        url=url,
        zbench_version=manifest.zbench_version,
        environment_hash=manifest.environment_hash,
        identity=_identity(manifest),
        metrics={
            name: Meaning(unit=said.unit, better=said.better, definition=gate.meaning(name))
            for name, said in METRICS.items()
            if name in told
        },
        cells={
            cell.record.id: CellNumbers(
                trials=gate.digest(sorted((trial.group, trial.repeat) for trial in cell.trials)),
                stable=gate.stable(cell),
                caveat=", ".join(caveats(cell.record)),
                metrics=numbers[cell.record.id],
            )
            for cell in run.cells
        },
    )


def _identity(manifest: Manifest) -> dict[str, JsonValue]:
    flat = environment.identity(manifest.environment)
    return {
        "scenario": manifest.scenario_hash[:16],
        "prompts": manifest.prompts_hash[:16],
        **{f"model {name}": str(facts.get("hash", ""))[:16] for name, facts in sorted(manifest.models.items())},
        **{key: flat.get(key) for key in gate.same_device(flat.get("device.backend") == "cpu")},
    }


def _relative(folder: Path, base: Path) -> str:
    try:
        return Path(os.path.relpath(folder.resolve(), base.resolve())).as_posix()
    except ValueError:  # another drive
        return folder.resolve().as_posix()


# --- Read ---


def read(file: Path) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """The runs of a history by time, the last line of each, and what is to be said about the file.

    What a crash left of a line and lines of another schema are left out and reported. Raises UserError where the file
    cannot be read or holds anything else.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give the file of `zbench history add RUN --file FILE`") from None
    found, said = dict[str, Entry](), list[str]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = Entry.model_validate_json(line)
        except ValidationError as error:
            why = _left_out(file, number, line, error, ours=bool(found))
            said.append(f"{file}:{number}: {why}, and was left out")
            continue
        found.pop(entry.run, None)
        found[entry.run] = entry
    return tuple(sorted(found.values(), key=lambda entry: entry.created)), tuple(said)


def _left_out(file: Path, number: int, line: str, error: ValidationError, ours: bool) -> str:
    """Why the line is left out. Raises UserError where that would lose something unseen, or where the file is not known
    to be `ours` by the lines before."""
    begun = line.startswith(_START) or _START.startswith(line)
    try:
        content = json.loads(line)
    except ValueError:
        if begun or ours:  # what a crash leaves need not be the start of a line
            return "the line is torn (a crash?)"
    if not begun:
        raise UserError(f"{file}:{number}: not a line of a history; is it the file of `zbench history add`?")
    if (version := content.get("schema_version")) != SCHEMA_VERSION:
        return f"the line has schema {version}, this zbench reads {SCHEMA_VERSION}"
    where = ".".join(map(str, error.errors()[0]["loc"]))
    raise UserError(f"{file}:{number}: {where}: {error.errors()[0]['msg']}; the line is damaged, remove it") from None


# --- What changed ---


def series(entries: Iterable[Entry], metrics: Sequence[str] = (), cell: str = "") -> list[Series]:
    """Every metric (of `metrics`, else those that a gate looks at) of every cell whose name contains `cell`.

    `entries` by time. Raises UserError for a metric that no run has, or where no cell is of that name.
    """
    entries = list(entries)
    known = dict.fromkeys(metric for entry in entries for metric in entry.metrics)
    if strangers := [metric for metric in metrics if metric not in known]:
        raise UserError(f"no run of this history has {', '.join(strangers)}; it has {', '.join(known)}")
    order = list(metrics) or [metric for metric in (*gate.TIMED, *gate.EXACT) if metric in known]
    found: dict[tuple[str, str, str, str], list[tuple[Entry, Number]]] = {}
    for entry in entries:
        for name, numbers in entry.cells.items():
            for metric in order if cell in name else ():
                for part, number in numbers.metrics.get(metric, {}).items():
                    found.setdefault((entry.scenario, name, metric, part), []).append((entry, number))
    if entries and not found:
        raise UserError(f"no run of this history has a cell named like {cell!r}")
    newest = {entry.scenario: place for place, entry in enumerate(entries)}
    by_metric = sorted(found, key=lambda key: (-newest[key[0]], order.index(key[2])))  # stable: cells as they ran
    return [_series(key, found[key]) for key in by_metric]


def _series(key: tuple[str, str, str, str], points: Sequence[tuple[Entry, Number]]) -> Series:
    scenario, cell, metric, part = key
    groups: dict[str, list[tuple[Entry, Number]]] = {}
    for entry, number in points:
        groups.setdefault(json.dumps(_kept_equal(entry, cell, metric), sort_keys=True), []).append((entry, number))
    ordered = sorted(groups.values(), key=lambda line: line[-1][0].created)
    first = _kept_equal(points[0][0], cell, metric)
    newest = ordered[-1][-1][0]
    return Series(
        scenario, cell, metric, part, newest.metrics[metric].unit, newest.metrics[metric].better,
        newest.cells[cell].caveat,
        tuple(
            Line(
                tuple(line),
                tuple(_differences(first, _kept_equal(line[0][0], cell, metric))),
                tuple(_changes(line, cell, metric)),
            )
            for line in ordered
        ),
    )  # fmt: skip


def _kept_equal(entry: Entry, cell: str, metric: str) -> dict[str, JsonValue]:
    """What is equal along a line."""
    trials = {} if metric == "failed_trials" else {"trials": entry.cells[cell].trials}
    return {**entry.identity, **trials, "definition": entry.metrics[metric].definition}


def _differences(first: dict[str, JsonValue], now: dict[str, JsonValue]) -> Iterator[str]:
    for key in dict.fromkeys((*first, *now)):
        if first.get(key) == now.get(key):
            continue
        if key.startswith("device.") or key in gate.same_device(True):
            yield f"{key} {now.get(key)}, not {first.get(key)}"
        elif key.startswith("model "):
            yield f"other weights of {key}"
        else:
            yield {"trials": "other trials succeeded", "definition": "defined otherwise"}.get(key, f"another {key}")


def _changes(line: Sequence[tuple[Entry, Number]], cell: str, metric: str) -> Iterator[Change]:
    values = [number.value for _, number in line]
    found: list[tuple[int, float | None]]
    if metric in gate.EXACT and all(entry.cells[cell].stable for entry, _ in line):
        room = gate.EXACT[metric]
        found, level = [], values[0]  # neighbours would never show what moves a little every time
        for index, value in enumerate(values):
            if abs(value - level) > room * abs(level):
                found.append((index, None))
                level = value
    else:
        found = [(split.index, split.p) for split in change_points(values)]
    bounds = [0, *(index for index, _ in found), len(values)]
    levels = [_mean(values[start:end]) for start, end in pairwise(bounds)]
    for (index, p), (before, after) in zip(found, pairwise(levels), strict=True):
        yield Change(index, before, after, p)


def _mean(values: Sequence[float]) -> float:
    """Of equal values exactly that value."""
    return values[0] if min(values) == max(values) else sum(values) / len(values)
