"""Is a run worse than its baseline? Comparable first, then what is exact, then what a clock says.

A `Snapshot` is all that the gate knows of a run: small enough to be checked in, and made from a run folder or read
from a file. Metrics that are counted (forwards, rows, tokens, bytes) are compared to the last digit, because the same
code on the same prompts gives the same counts. Times are paired by prompt, judged by a t interval against a tolerance,
and corrected for how many are looked at (Holm): see docs/gates.md for how often that is wrong.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, field_validator, model_validator

from zbench import stats
from zbench.cache import write
from zbench.errors import UserError
from zbench.hardware import environment
from zbench.metrics import (
    DEFINITIONS_VERSION,
    METRICS,
    Better,
    Cell,
    Run,
    caveats,
    evaluate,
    has_own_prefixes,
    load_run,
)
from zbench.records import MANIFEST, SCHEMA_VERSION, read_manifest, schema_version
from zbench.scenario import STRICT, load_other
from zbench.stats import CONFIDENCE, FEW

BASELINE_SCHEMA = 1
KIND = "zbench baseline"
ROUNDING = 1e-9  # sums of the same counts in another order
OK, REGRESSED, BAD_INPUT, NOT_COMPARABLE, INCONCLUSIVE = 0, 1, 2, 3, 4  # exit codes

Verdict = Literal["ok", "regressed", "improved", "inconclusive", "not comparable"]
Value = float | str | None

# Counted metrics, with the relative difference that is none.
EXACT: dict[str, float] = {
    "failed_trials": 0.0,
    "output_hash": 0.0,
    "lossless": ROUNDING,
    "agreement": ROUNDING,
    "accuracy": ROUNDING,
    "pass_at_1": ROUNDING,
    "tokens_per_forward": ROUNDING,
    "tokens_per_weighted_forward": 1e-6,  # the bytes of its unit come from a fit
    "acceptance_length": ROUNDING,
    "forwards_per_sequence": ROUNDING,
    "rows_per_forward": ROUNDING,
    "proposal_coverage": ROUNDING,
    "diffusion_steps_per_canvas": ROUNDING,
    "flops_per_token": ROUNDING,
    "bytes_per_token": ROUNDING,
    "peak_bytes": 0.05,  # allocators round, and a process's memory has a history
}
# Timed metrics, with the slowdown that is tolerated: two runs at different times differ by more than their own noise.
TIMED: dict[str, float] = {"decode_tps": 0.05, "throughput": 0.05, "ttft": 0.10}

# Counts that say the same whether or not repeats gave the same tokens.
_OF_ANY_REPEAT = ("failed_trials", "lossless")
_VARIES = "repeats of one greedy prompt give different tokens, in the baseline they did not"

# What must be equal for two times to be compared; threads and the CPU's name count where the device is the CPU.
_SAME_DEVICE = ("backend", "name", "power_cap_watts", "compute_partition", "memory_partition")
_SAME_CPU = ("cpu.model", "cpu.usable_threads", "torch.threads")
# Of the program itself: what a gate is there to compare.
_PROGRAM = ("zbench.version", "zbench.commit", "zbench.dirty", "zbench.source")


class NotComparable(Exception):
    """Why a baseline cannot be compared with at all."""


class Rule(BaseModel):
    """How one metric is gated."""

    model_config = STRICT

    tolerance: float | None = Field(
        default=None, ge=0, lt=1, description="Relative change that is none; null takes the default of the metric."
    )
    required: bool = Field(default=True, description="false reports a regression and does not fail on it.")


class Policy(BaseModel):
    """What a gate looks at."""

    model_config = STRICT

    device: Literal["same", "any"] = Field(
        default="same",
        description="any compares across machines, and so only what is counted: it takes no timed metric.",
    )
    metrics: dict[str, Rule] = Field(
        default={name: Rule() for name in (*EXACT, *TIMED)},
        description="The metrics that are gated, each with its rule ({} for the defaults).",
    )

    @field_validator("metrics")
    @classmethod
    def _are_known(cls, metrics: dict[str, Rule]) -> dict[str, Rule]:
        for name in metrics:
            if name not in EXACT and name not in TIMED:
                close = difflib.get_close_matches(name, [*EXACT, *TIMED], n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join((*EXACT, *TIMED))}"
                raise ValueError(f"{name!r} cannot be gated; {hint}")
        return metrics

    @model_validator(mode="after")
    def _times_nothing_across_machines(self) -> Policy:
        if self.device == "any" and (timed := [name for name in self.metrics if name in TIMED]):
            raise ValueError(f"device: any cannot gate {', '.join(timed)}: times of two machines do not compare")
        return self

    @property
    def chosen(self) -> bool:
        """Whether the metrics were written down, not left to the default."""
        return "metrics" in self.model_fields_set

    def tolerance(self, metric: str) -> float:
        given = self.metrics[metric].tolerance
        return (EXACT | TIMED)[metric] if given is None else given


@dataclass(frozen=True, slots=True)
class Sample:
    """Times of one cell, lower is better: seconds, or seconds per token. One entry per request or trial."""

    value: float  # the metric itself, in its own unit
    keys: tuple[str, ...]  # what is paired: prompt (or group) and repeat
    clusters: tuple[int, ...]  # groups of prompts
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class CellSnapshot:
    trials: str  # digest of the (group, repeat) that succeeded
    stable: bool  # False: greedy outputs vary by themselves
    exact: dict[str, dict[str, Value]]  # metric -> part -> value
    timed: dict[str, Sample]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the gate knows of a run."""

    name: str
    created: str
    zbench_version: str
    scenario: str  # hashes
    prompts: str
    models: dict[str, str]
    definitions: dict[str, str]  # metric -> digest of what it means
    environment: dict[str, Any]  # flat; empty where the snapshot is of no one machine
    cells: dict[str, CellSnapshot]

    @property
    def of_known_device(self) -> bool:
        return "device.name" in self.environment

    @property
    def portable(self) -> bool:
        return not self.environment


@dataclass(frozen=True, slots=True)
class Row:
    """The verdict on one metric of one cell. Changes are relative to the baseline, in the metric's own sense."""

    cell: str
    metric: str
    part: str
    verdict: Verdict
    baseline: Value
    candidate: Value
    unit: str
    better: Better
    tolerance: float
    required: bool
    change: float | None = None
    low: float | None = None
    high: float | None = None
    detects: float | None = None  # slowdown that would be called a regression with 80% power
    p: float | None = None  # two-sided, Holm-adjusted, of "no change beyond the tolerance"
    n: int = 0  # clusters: prompts, or pairs of runs
    note: str = ""

    @property
    def timed(self) -> bool:
        return self.metric in TIMED


@dataclass(frozen=True, slots=True)
class Gate:
    """All verdicts, or the reasons why there are none."""

    candidate: str
    baseline: str
    rows: tuple[Row, ...] = ()
    reasons: tuple[str, ...] = ()  # why the two cannot be compared
    notes: tuple[str, ...] = ()

    def of(self, verdict: Verdict, required: bool = True) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.verdict == verdict and row.required >= required)

    @property
    def verdict(self) -> Verdict:
        """The worst of the required ones."""
        if self.reasons:
            return "not comparable"
        order: tuple[Verdict, ...] = ("regressed", "not comparable", "inconclusive", "improved")
        return next((verdict for verdict in order if self.of(verdict)), "ok")

    def exit_code(self, strict: bool = False) -> int:
        codes = {"regressed": REGRESSED, "not comparable": NOT_COMPARABLE, "inconclusive": INCONCLUSIVE * strict}
        return codes.get(self.verdict, OK)

    def to_dict(self, strict: bool = False) -> dict[str, Any]:
        return {
            "schema_version": BASELINE_SCHEMA,
            "verdict": self.verdict,
            "exit_code": self.exit_code(strict),
            "candidate": self.candidate,
            "baseline": self.baseline,
            "reasons": self.reasons,
            "notes": self.notes,
            "metrics": [asdict(row) for row in self.rows],
        }


def load_policy(path: Path) -> Policy:
    """Raises UserError, one line for each thing that is wrong."""
    return load_other(path, Policy)


# --- Run to snapshot ---


def snapshot(run: Run, policy: Policy | None = None) -> Snapshot:
    """What `policy` gates of a run. Raises UserError where the records hold a time or a count that cannot be."""
    policy = policy or Policy()
    manifest = run.manifest
    with stats.values_only():
        cells = {cell.record.id: _cell(run.path, cell, policy) for cell in run.cells}
    gated = {metric for cell in cells.values() for metric in (*cell.exact, *cell.timed)}
    return Snapshot(
        name=run.path.name or manifest.name,
        created=manifest.created,
        zbench_version=manifest.zbench_version,
        scenario=manifest.scenario_hash,
        prompts=manifest.prompts_hash,
        models={name: str(facts.get("hash", "")) for name, facts in manifest.models.items()},
        definitions={metric: meaning(metric) for metric in METRICS if metric in gated},
        environment={} if policy.device == "any" else environment.identity(manifest.environment),
        cells=cells,
    )


def _cell(path: Path, cell: Cell, policy: Policy) -> CellSnapshot:
    keys = sorted((trial.group, trial.repeat) for trial in cell.trials)
    exact, timed = {}, {}
    for metric in policy.metrics:
        try:
            found = {part: e for part, e in evaluate(METRICS[metric], cell).items() if e.value is not None}
            if metric in EXACT and found:
                exact[metric] = {part: _finite(e.value) for part, e in found.items()}
            elif metric in TIMED and found:
                timed[metric] = _sample(metric, cell, float(_finite(found[""].value)))  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"{path}: {metric} of {cell.record.id}: {error}; the records are damaged") from None
    return CellSnapshot(digest(keys), stable(cell), exact, timed)


def _finite(value: Value) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def stable(cell: Cell) -> bool:
    """Whether the same again gives the same tokens. Repeats have their own seeds: only greedy tokens that nothing draws
    must be the same in all of them."""
    if has_own_prefixes(cell):
        return False
    if cell.record.sampling.get("temperature") or "synthetic acceptance" in caveats(cell.record):
        return True
    return bool((cell.requests.groupby("prompt_id")["output_hash"].nunique() <= 1).all())


def _sample(metric: str, cell: Cell, value: float) -> Sample:
    if metric == "throughput":
        tokens = {(t.group, t.repeat): sum(r.tokens for r in t.requests) for t in cell.trials}
        keys = [f"{t.group}/{t.repeat}" for t in cell.trials]
        clusters = [t.group for t in cell.trials]
        seconds = [t.wall_seconds / max(1, tokens[t.group, t.repeat]) for t in cell.trials]
    else:
        rows = cell.decoded if metric == "decode_tps" else cell.requests
        keys = [f"{prompt}/{repeat}" for prompt, repeat in zip(rows["prompt_id"], rows["repeat"], strict=True)]
        clusters = rows["group"].tolist()
        times: pd.Series = rows["decode_seconds"] / rows["later"] if metric == "decode_tps" else rows["ttft"]
        seconds = times.tolist()
    _check_times(seconds)
    return Sample(value, tuple(keys), tuple(clusters), tuple(seconds))


def _check_times(seconds: Iterable[Any]) -> None:
    if not all(isinstance(s, int | float) and math.isfinite(s) and s > 0 for s in seconds):
        raise ValueError("expected times that are positive and finite")


def meaning(metric: str) -> str:
    """A digest, equal only for definitions that mean the same."""
    said = METRICS[metric]
    return digest([DEFINITIONS_VERSION, said.name, said.unit, said.formula, said.better])


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# --- Snapshot to file and back ---


def save(taken: Snapshot, path: Path) -> None:
    """Write a baseline file. Raises UserError where it cannot be written."""
    content = {"kind": KIND, "schema_version": BASELINE_SCHEMA, **asdict(taken)}
    write(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read(path: Path, policy: Policy | None = None) -> Snapshot:
    """The snapshot of a run folder or of a baseline file.

    Raises UserError where it is neither or damaged, NotComparable where it was written in another schema.
    """
    if path.is_dir():
        if (found := schema_version(path / MANIFEST)) not in (None, SCHEMA_VERSION):
            raise NotComparable(f"{path} has schema {found}, this zbench reads {SCHEMA_VERSION}: run it again")
        return snapshot(load_run(path), policy)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("kind", None) != KIND:
            raise ValueError("it does not say that it is one")
        if (version := content.pop("schema_version")) != BASELINE_SCHEMA:
            raise NotComparable(
                f"{path} has schema {version}, this zbench reads {BASELINE_SCHEMA}: save the baseline again"
            )
        cells = {name: _read_cell(cell) for name, cell in content.pop("cells").items()}
        found = Snapshot(**content, cells=cells)
        TypeAdapter(Snapshot).validate_python({**content, "cells": cells})
        return found
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a run folder or a file of `zbench gate --save`") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{path}: not a baseline ({said}); write one with `zbench gate RUN --save`") from None


def _read_cell(data: dict[str, Any]) -> CellSnapshot:
    timed = {
        metric: Sample(sample["value"], *(tuple(sample[name]) for name in ("keys", "clusters", "seconds")))
        for metric, sample in data["timed"].items()
    }
    for sample in timed.values():
        if not len(sample.keys) == len(sample.clusters) == len(sample.seconds):
            raise ValueError("a sample has columns of different lengths")
    exact = {
        metric: {part: float(v) if isinstance(v, int) else v for part, v in parts.items()}
        for metric, parts in data["exact"].items()
    }
    for number in [v for parts in exact.values() for v in parts.values()] + [s.value for s in timed.values()]:
        _finite(number)
    for sample in timed.values():
        _check_times(sample.seconds)
    return CellSnapshot(str(data["trials"]), bool(data["stable"]), exact, timed)


def last(run: Path) -> Path:
    """The newest run of the same scenario beside `run` that is older than it."""
    mine, found = read_manifest(run), []
    for manifest in sorted(run.resolve().parent.glob(f"*/{MANIFEST}")):
        if manifest.parent == run.resolve() or schema_version(manifest) != SCHEMA_VERSION:
            continue
        other = read_manifest(manifest.parent)
        if other.scenario_hash == mine.scenario_hash and other.created <= mine.created:
            found.append((other.created, manifest.parent))
    if not found:
        raise UserError(f"{run.resolve().parent} holds no earlier run of scenario {mine.name}; give --baseline a run")
    return max(found)[1]


# --- Two snapshots to verdicts ---


def judge(
    candidate: Snapshot,
    baseline: Snapshot,
    policy: Policy | None = None,
    confidence: float = CONFIDENCE,
    clusters: str = "prompts",
) -> Gate:
    """Compare a run with its baseline. `confidence` is that of the verdicts on times, `clusters` what they are over.

    Raises UserError where the policy names a metric that neither has: a gate that looks at nothing passes everything.
    """
    policy = policy or Policy()
    whole = Gate(candidate.name, f"{baseline.name} of {baseline.created}")
    if reasons := tuple(_obstacles(candidate, baseline, policy)):
        return replace(whole, reasons=reasons)
    known = candidate.definitions.keys() | baseline.definitions.keys()
    if policy.chosen and (absent := [metric for metric in policy.metrics if metric not in known]):
        raise UserError(f"the policy gates {', '.join(absent)}, which no cell has; take it out or measure it")
    judged = [
        found
        for cell, before in baseline.cells.items()
        for found in _judge_cell(cell, candidate, baseline, before, policy, clusters)
    ]
    if not judged:
        return replace(whole, reasons=("the two have no metric in common that the policy gates",))
    notes = [*_notes(candidate, baseline, policy)]
    if small := _too_small(judged, baseline):
        judged = [(replace(row, required=row.required and row not in small), shift) for row, shift in judged]
        cells = ", ".join(dict.fromkeys(row.cell for row in small))
        said = f"too few {clusters} for a verdict on times, which --strict does not fail on: {cells}"
        notes.append(f"{said}; others show the same metrics")
    return replace(whole, rows=_decided(judged, confidence), notes=tuple(notes))


def _too_small(judged: Sequence[tuple[Row, stats.Shift | None]], baseline: Snapshot) -> list[Row]:
    """Times of cells with so few prompts, in the baseline too, that no run of the scenario could be judged there, where
    another cell shows the same metric: --strict would fail every run for them, the baseline's own too."""
    shown = {row.metric for row, shift in judged if shift is not None}
    return [
        row
        for row, _ in judged
        if row.timed and row.verdict == "inconclusive" and row.metric in shown
        and len(set(baseline.cells[row.cell].timed[row.metric].clusters)) < FEW
    ]  # fmt: skip


def _obstacles(candidate: Snapshot, baseline: Snapshot, policy: Policy) -> Iterator[str]:
    if candidate.scenario != baseline.scenario:
        yield f"another scenario was run: {candidate.scenario[:12]} here, {baseline.scenario[:12]} in the baseline"
    if candidate.prompts != baseline.prompts:
        yield "the prompts, as token ids, are not the same"
    for name in sorted(candidate.models.keys() | baseline.models.keys()):
        if candidate.models.get(name) != baseline.models.get(name):
            yield f"model {name} has other weights or is missing on one side"
    if policy.device == "any" or not (baseline.of_known_device and candidate.of_known_device):
        return  # counts are of no machine, and of times each row says it
    for key in same_device("cpu" in (of.environment.get("device.backend") for of in (candidate, baseline))):
        now, before = (taken.environment.get(key) for taken in (candidate, baseline))
        if now != before:
            yield f"{key} is {now}, the baseline's is {before}"


def same_device(on_cpu: bool) -> tuple[str, ...]:
    """The keys of a flat environment that must be equal for two times to be compared."""
    return (*(f"device.{name}" for name in _SAME_DEVICE), *(_SAME_CPU if on_cpu else ()))


def _notes(candidate: Snapshot, baseline: Snapshot, policy: Policy) -> Iterator[str]:
    gained = candidate.definitions.keys() - baseline.definitions.keys()
    if new := [metric for metric in policy.metrics if metric in gained]:
        yield f"not in the baseline, so not gated: {', '.join(new)}"
    for cell, mine in candidate.cells.items():
        theirs = baseline.cells.get(cell)
        if theirs is None:
            yield f"{cell}: not in the baseline, so not gated"
            continue
        here = [metric for metric in policy.metrics if metric not in gained and _values(mine, metric)]
        if lacking := [metric for metric in here if not _values(theirs, metric)]:
            yield f"{cell}: not in the baseline, so not gated: {', '.join(lacking)}"
        if theirs.stable and not mine.stable:
            yield f"{cell}: {_VARIES}"
    if not candidate.portable and not baseline.portable:
        for key in sorted(candidate.environment.keys() | baseline.environment.keys()):
            now, before = (taken.environment.get(key) for taken in (candidate, baseline))
            if now != before and key not in _PROGRAM:
                yield f"also changed: {key} is {now}, was {before}"


def _judge_cell(
    cell: str, candidate: Snapshot, baseline: Snapshot, before: CellSnapshot, policy: Policy, clusters: str
) -> Iterator[tuple[Row, stats.Shift | None]]:
    """Each metric's row; a time comes with its shift, and has no verdict before all times are known."""
    now = candidate.cells.get(cell)
    for metric, rule in policy.metrics.items():
        old, new = _values(before, metric), _values(now, metric)
        for part in dict.fromkeys((*old, *new)) if old else ():
            row = Row(
                cell, metric, part, "not comparable", old.get(part), new.get(part), METRICS[metric].unit,
                METRICS[metric].better, policy.tolerance(metric), rule.required,
            )  # fmt: skip
            if now is None or not new:
                yield replace(row, note="the run does not have it"), None
            elif candidate.definitions.get(metric) != baseline.definitions.get(metric):
                yield replace(row, note="it was defined otherwise when the baseline was taken"), None
            elif now.trials != before.trials and metric != "failed_trials":
                yield replace(row, note="other trials succeeded than in the baseline; an unfinished run?"), None
            elif metric in TIMED and (unknown := _of_unknown_device(candidate, baseline)):
                yield replace(row, note=f"the device of the {unknown} is not known"), None
            elif metric in TIMED:
                yield _compare_times(row, now.timed[metric], before.timed[metric], clusters)
            else:
                yield _judge_count(row, now.stable, before.stable), None


def _of_unknown_device(candidate: Snapshot, baseline: Snapshot) -> str:
    """Which of the two is; "" where neither is."""
    if not candidate.of_known_device:
        return "run"
    return "" if baseline.of_known_device else "baseline"


def _values(cell: CellSnapshot | None, metric: str) -> Mapping[str, Value]:
    if cell is None:
        return {}
    return {"": cell.timed[metric].value} if metric in cell.timed else cell.exact.get(metric, {})


def _judge_count(row: Row, stable: bool, was_stable: bool) -> Row:
    """The verdict on a count. It is inconclusive where repeats differed in the baseline already; that they do now is no
    excuse."""
    now, before = row.candidate, row.baseline
    verdict: Verdict = "regressed"
    if isinstance(now, float) and isinstance(before, float):
        row = replace(row, change=now / before - 1 if before else None)
        if abs(now - before) <= row.tolerance * abs(before):
            return replace(row, verdict="ok")
        if row.better != "none" and (now > before) == (row.better == "higher"):
            verdict = "improved"
    elif now == before:
        return replace(row, verdict="ok")
    else:  # another hash, or a kind of forward that only one of the two has
        row = replace(row, note="gone" if now is None else "new" if before is None else "changed")
    if row.metric in _OF_ANY_REPEAT or (stable and was_stable):
        return replace(row, verdict=verdict)
    if was_stable and verdict == "regressed":
        return replace(row, verdict=verdict, note=_VARIES)
    note = "greedy outputs vary by themselves here, so nothing is exact"
    return replace(row, verdict="inconclusive", note=note)


def _compare_times(row: Row, now: Sample, before: Sample, of: str) -> tuple[Row, stats.Shift | None]:
    theirs = dict(zip(before.keys, before.seconds, strict=True))
    pairs = [
        (theirs[key], seconds, cluster)
        for key, cluster, seconds in zip(now.keys, now.clusters, now.seconds, strict=True)
        if key in theirs
    ]
    row = replace(row, verdict="inconclusive")
    if not pairs:
        return replace(row, note="no prompt was measured in both"), None
    old, new, clusters = (np.array(column) for column in zip(*pairs, strict=True))
    moved = stats.shift(old, new, clusters)
    row = replace(row, baseline=_typical(row, old, clusters), candidate=_typical(row, new, clusters))
    row = replace(row, change=_own_sense(row, moved.change), n=moved.n)
    if moved.n < FEW:
        return replace(row, note=stats.too_few(moved.n, of)), None
    return row, moved


def _typical(row: Row, seconds: NDArray[np.float64], clusters: NDArray[Any]) -> float:
    """The metric as the geometric mean over clusters, so that the ratio of two is the change that is judged."""
    mean = math.exp(stats.shift(np.ones_like(seconds), seconds, clusters).log)
    return 1 / mean if row.better == "higher" else mean


def _own_sense(row: Row, slowdown: float) -> float:
    """The change of the metric where its seconds change by `slowdown`: a rate falls where the time rises."""
    return 1 / (1 + slowdown) - 1 if row.better == "higher" else slowdown


def _decided(judged: Iterable[tuple[Row, stats.Shift | None]], confidence: float) -> tuple[Row, ...]:
    """Verdicts on the times: a change counts where its p, adjusted for all the times looked at, is small enough."""
    judged = list(judged)
    alpha = 1 - confidence
    shifts = [(row, shift) for row, shift in judged if shift is not None]
    raw = [2 * min(shift.p_slower(row.tolerance), shift.p_faster(row.tolerance)) for row, shift in shifts]
    adjusted = iter(zip(raw, stats.holm(raw), strict=True))
    rows = []
    for row, shift in judged:
        if shift is not None:
            alone, p = next(adjusted)
            detects = (1 + row.tolerance) * (1 + shift.detectable(alpha / 2 / len(shifts))) - 1
            edges = shift.interval(confidence)
            low, high = sorted(_own_sense(row, edge) for edge in edges)
            row = replace(row, low=low, high=high, p=float(p), detects=detects)
            if p <= alpha:
                row = replace(row, verdict="regressed" if shift.log > 0 else "improved")
            elif edges[1] < row.tolerance:
                row = replace(row, verdict="ok")
            elif alone <= alpha:
                row = replace(row, note=f"beyond the tolerance on its own, not among {len(shifts)} times looked at")
        rows.append(row)
    return tuple(rows)
