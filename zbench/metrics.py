"""What every number means: one function per metric, over the records of one cell.

A metric is a function from a `Cell` to an `Estimate`, or to one estimate per part (a phase, a kind of forward).
It raises `Unavailable` where the records cannot tell; such a metric is reported with the reason, never as zero.
Definitions travel with the results, so that figures of two definitions are never compared.

Decode means every step but step 0, the prefill. Where sequences of a batch end at different times, a forward counts
once for each sequence that was still live, so that autoregressive decoding has one token per forward exactly.
Intervals resample groups: a group is one prompt at batch 1, and otherwise the prompts of a batch, as they share steps.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from zbench import stats
from zbench.errors import UserError
from zbench.hardware.peaks import SLACK
from zbench.records import (
    CellRecord,
    ForwardRecord,
    Manifest,
    RoofSample,
    StepRecord,
    TrialRecord,
    columns,
    read_manifest,
    read_roof_samples,
    read_trials,
    uncollected,
)
from zbench.stats import Estimate, unavailable
from zbench.telemetry import NoEnergy, Telemetry, trial_energy
from zbench.telemetry import read as read_telemetry

DEFINITIONS_VERSION = 3  # bump it when a metric's function changes what it computes and its words do not
ROOF_TOLERANCE = 0.05  # run-to-run noise by which a measurement may pass a measured roof
WALL_TOLERANCE = 0.02  # phases must account for the wall to within this
# Measured over floor, beyond which neither memory nor arithmetic explains the time: not even one after the other, whose
# sum is at most twice the larger of them.
OVERHEAD = 2.0
# What notes say where a sweep of rows ended before what was looked for.
AT_LEAST = "at least: the most rows measured"
ALL_MEMORY = "memory takes longer than arithmetic"
READ_BACK = "the tokens were read back from a server's text, and may be others of the same spelling"

# Arguments of vLLM, SGLang and TensorRT-LLM.
_SPREAD = re.compile(r"(?<!\S)--?(?:(?:tensor|pipeline|data)[-_]parallel|[tpd]p)(?:[-_]size)?[ =](\d+)(?!\S)")

# Of the bytes and FLOPs of a step, up to which other prompts are no other work: a small part of the drift that counts.
ALIKE = 0.01

SWITCHING = ("accept", "commit", "host gap")
PHASES = ("prefill", "decode", "draft", "verify", "draft+verify", "denoise", *SWITCHING)
UNSEEN = "the forwards of a foreign engine are not seen"
SYNTHETIC, RANDOM_DRAFTER, RANDOM_ADAPTER = "synthetic acceptance", "random drafter", "random mask adapter"
NET_NEGATIVE = "net-negative: a step gains less than it costs"
MIXED = "over all prompts a step gains less than it costs, yet prompt by prompt the engine is faster"
NOT_THE_TARGETS = "acceptance is synthetic, so the tokens are not the target's"

# Of an engine that times raw forwards these would mix unlike ones.
NOT_OF_FORWARDS = frozenset({
    "tpot", "decode_tps", "throughput", "throughput_per_device", "tokens_per_forward", "tokens_per_weighted_forward",
    "speedup", "category_speedup", "minimal_detectable_effect", "rows_per_forward", "bytes_per_token",
    "flops_per_token", "joules_per_token", "tokens_per_joule", "energy_delay_product", "parallel_efficiency",
})  # fmt: skip
TIMES_FORWARDS = "times forwards of different numbers of rows at every token"

Better = Literal["higher", "lower", "none"]
Result = Estimate | dict[str, Estimate]
F = TypeVar("F", bound="Callable[[Cell], Result]")


class Unavailable(Exception):
    """The records of this cell cannot give the metric. The message completes "unavailable: "."""


@dataclass(frozen=True)
class Run:
    """A run folder as read: every successful trial's records by row, keyed by their trial.

    `verifies` has a row for each sequence and step that was offered drafts. Of those in a sequence's last step only the
    accepted ones were judged: the token that ends the output counts as the bonus, whoever proposed it.
    """

    path: Path
    manifest: Manifest
    trials: tuple[TrialRecord, ...]
    requests: pd.DataFrame
    steps: pd.DataFrame
    forwards: pd.DataFrame
    verifies: pd.DataFrame
    warnings: tuple[str, ...]
    telemetry: Telemetry | None = None  # None: none was recorded
    roof_samples: tuple[RoofSample, ...] = ()

    @cached_property
    def roofs(self) -> dict[str, Any] | None:
        """The manifest's, where the read roof is that of the run: the median of its samples, between the lowest and
        the highest, `sampled`. Without samples it is the manifest's too."""
        kept = self.manifest.roofs
        values = [sample.value for sample in self.roof_samples if sample.value is not None]
        if kept is None or not values:
            return kept
        median = float(np.median(values))
        of_run = {"value": median, "low": min(values), "high": max(values), "n": len(values), "sampled": True}
        read = kept["bandwidth"]["read"] | of_run
        ridge = {dtype: rate["value"] / median for dtype, rate in kept["flops"].items()}
        return kept | {"bandwidth": kept["bandwidth"] | {"read": read}, "ridge": ridge}

    @property
    def read_roof(self) -> dict[str, Any] | None:
        """Of `roofs`: value, low and high in B/s, n, and `sampled` where these are of samples beside the run."""
        return ((self.roofs or {}).get("bandwidth") or {}).get("read")

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The planned cells with their records, baselines attached, in the manifest's order."""
        bare = {record.id: self._cell(record) for record in self.manifest.cells}
        return tuple(
            replace(cell, baseline=_baseline_of(cell, bare.values()), alone=_alone(cell, bare.values()))
            for cell in bare.values()
        )

    def _cell(self, record: CellRecord) -> Cell:
        mine = [trial for trial in self.trials if trial.cell == record.id]
        return Cell(
            record=record,
            trials=tuple(trial for trial in mine if trial.status == "ok"),
            failed=tuple(trial for trial in mine if trial.status == "error"),
            requests=self.requests[self.requests["cell"] == record.id],
            steps=self.steps[self.steps["cell"] == record.id],
            forwards=self.forwards[self.forwards["cell"] == record.id],
            verifies=self.verifies[self.verifies["cell"] == record.id],
            roofs=self.roofs,
            specs=self.manifest.specs,
            telemetry=self.telemetry,
        )


@dataclass(frozen=True)
class Cell:
    """One cell's records: all that a metric may look at."""

    record: CellRecord
    trials: tuple[TrialRecord, ...]
    failed: tuple[TrialRecord, ...]
    requests: pd.DataFrame
    steps: pd.DataFrame
    forwards: pd.DataFrame
    verifies: pd.DataFrame
    roofs: dict[str, Any] | None
    specs: dict[str, Any] | None
    baseline: Cell | None = None
    telemetry: Telemetry | None = None
    alone: Cell | None = None  # the same engine on one device, where this one has several

    @property
    def devices(self) -> int:
        """That the cell takes: every replica's."""
        return self.record.tensor * self.record.replicas

    @property
    def spread(self) -> str:
        """The argument by which vLLM or a started server uses several devices; "" without one."""
        options = self.record.options
        given = [*(options.get("server") or {}).get("command", ())]
        given += [f"--{name}={value}" for name, value in (options.get("settings") or {}).items()]
        return next((found[0] for found in _SPREAD.finditer(" ".join(given)) if int(found[1]) > 1), "")

    @property
    def decoded(self) -> pd.DataFrame:
        """Requests with a decode phase: tokens after those of the first step."""
        requests = self.requests[self.requests["later"] > 0]
        if requests.empty:
            raise Unavailable("no request emitted a token after the first step")
        if whole := int((requests["decode_seconds"] <= 0).sum()):
            raise Unavailable(f"{whole} of {len(requests)} responses came in one piece: their tokens have no times")
        return requests

    @property
    def decode_steps(self) -> pd.DataFrame:
        if self.steps.empty:
            raise Unavailable("the engine does not report its steps")
        return self.steps[self.steps["step"] > 0]

    @property
    def seen_forwards(self) -> pd.DataFrame:
        if self.forwards.empty:
            raise Unavailable(UNSEEN)
        if without := sum(not trial.forwards for trial in self.trials):
            raise Unavailable(f"{without} of {len(self.trials)} trials have no forwards")
        return self.forwards

    @property
    def decode_forwards(self) -> pd.DataFrame:
        forwards = self.seen_forwards
        return forwards[forwards["step"] > 0]

    @property
    def seen_verifies(self) -> pd.DataFrame:
        if self.verifies.empty:
            raise Unavailable("no step reports draft tokens")
        return self.verifies

    @property
    def depth(self) -> int:
        """The longest path of drafts a step can accept, or where some were looked up, the longest accepted of these if
        that is longer."""
        return max(self.drafted_depth, int(self.seen_verifies["accepted"].max()))

    @property
    def always_drafts(self) -> bool:
        """Whether every decode step had drafts of every sequence."""
        return len(self.seen_verifies) == int(self.decode_steps["live"].sum())

    @property
    def drafted_depth(self) -> int:
        """The longest path that the engine drafts itself; a tree drafts more tokens than that."""
        options, verifies = self.record.options, self.seen_verifies
        drafted = int(verifies["drafted"].max())
        if options.get("depth") or options.get("tokens") is None or self.record.engine == "prompt_lookup":
            return int(options.get("depth") or drafted)
        block = options.get("block") or options.get("block_size")  # null: the drafter's, which the record does not say
        seen = verifies["accepted"].where(~verifies["looked_up"], 0).max()
        return min(drafted, block - 1 if block else int(seen))

    @property
    def pairs(self) -> pd.DataFrame:
        """Requests joined by prompt and repeat with the baseline's at this point, whose columns end in `_baseline`."""
        if self.record.baseline:
            raise Unavailable("this is the baseline")
        if self.baseline is None:
            raise Unavailable("no baseline was run at this point of the matrix")
        pairs = self.requests.merge(self.baseline.requests, on=["prompt_id", "repeat"], suffixes=("", "_baseline"))
        if pairs.empty:
            raise Unavailable("no prompt succeeded both here and in the baseline")
        return pairs

    @property
    def timed_pairs(self) -> pd.DataFrame:
        pairs = self.pairs
        if self.baseline and self.baseline.record.engine == "forward":
            raise Unavailable(f"the baseline {TIMES_FORWARDS}")
        pairs = pairs[(pairs["later"] > 0) & (pairs["later_baseline"] > 0)]
        if pairs.empty:
            raise Unavailable("no pair of requests emitted tokens after the first step")
        if whole := int((pairs[["decode_seconds", "decode_seconds_baseline"]] <= 0).any(axis=1).sum()):
            raise Unavailable(f"{whole} of {len(pairs)} pairs have a response that came in one piece, without times")
        return pairs

    def roof(self, kind: Literal["bandwidth", "flops"]) -> float:
        """The read bandwidth in B/s (see `Run.roofs`), or the measured rate of this cell's dtype in FLOP/s."""
        if self.roofs is None:
            raise Unavailable("the roofs of this device were not measured")
        key = "read" if kind == "bandwidth" else self.record.dtype
        if (roof := self.roofs.get(kind, {}).get(key)) is None:
            raise Unavailable(f"no {key} roof was measured on this device")
        return float(roof["value"])

    @property
    def last_level_cache(self) -> float:
        """Bytes, of the caches that were measured with the roofs; 0 where none was."""
        levels = ((self.roofs or {}).get("caches") or {}).get("levels") or {}
        return max((float(level["capacity"]) for level in levels.values()), default=0.0)

    @property
    def energy(self) -> pd.DataFrame:
        """`device_energy`, where the sampled device did all of the work."""
        if self.record.tensor > 1:
            raise Unavailable(f"only rank 0's device is sampled, and {self.record.tensor} hold the model")
        if self.record.replicas > 1:
            raise Unavailable(f"only rank 0's device is sampled, and {self.record.replicas} replicas share the prompts")
        if self.spread:
            raise Unavailable(f"only one device is sampled, and the engine may use several ({self.spread})")
        return self.device_energy

    @cached_property
    def device_energy(self) -> pd.DataFrame:
        """joules of rank 0's device, seconds, tokens, group and how they are known, one row per trial (see
        `telemetry.trial_energy`)."""
        trials = self.trials
        if self.record.replicas > 1:  # each has its own device, and windows are of rank 0's
            trials = tuple(trial for trial in trials if self._telemetry.segment(trial.key))
        try:
            joules, seconds, how = trial_energy(self._telemetry, [trial.key for trial in trials])
        except NoEnergy as reason:
            raise Unavailable(str(reason)) from None
        tokens = [sum(request.tokens for request in trial.requests) for trial in trials]
        groups = [trial.group for trial in trials]
        return pd.DataFrame({"joules": joules, "seconds": seconds, "tokens": tokens, "group": groups, "how": how})

    def sampled(self, sensor: str) -> tuple[list[np.ndarray], list[int]]:
        """(samples of each trial, group of each), for the trials that have any."""
        found = [(self._telemetry.samples(trial.key, sensor), trial.group) for trial in self.trials]
        found = [(values, group) for values, group in found if len(values)]
        if not found:
            raise Unavailable(self._telemetry.why_not(sensor))
        return [values for values, _ in found], [group for _, group in found]

    @property
    def _telemetry(self) -> Telemetry:
        if self.record.options.get("url"):
            raise Unavailable("only this machine's device is sampled, and the server may be elsewhere")
        if self.telemetry is None:
            raise Unavailable("no telemetry was recorded")
        return self.telemetry

    def spec(self, kind: Literal["bandwidth", "flops"]) -> float:
        """The dense spec-sheet peak, in B/s or in FLOP/s for this cell's dtype."""
        if self.specs is None:
            raise Unavailable("no spec sheet is known for this device")
        peak = self.specs.get("bandwidth") if kind == "bandwidth" else self.specs["flops"].get(self.record.dtype)
        if peak is None:
            raise Unavailable(f"the spec sheet of {self.specs['name']} has no {self.record.dtype} peak")
        return float(peak)


@dataclass(frozen=True, slots=True)
class Definition:
    name: str
    unit: str
    formula: str
    better: Better
    function: Callable[[Cell], Result]


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One number of the results, with everything needed to judge it."""

    cell: str
    metric: str
    part: str  # the phase or the kind of forward; "" for the whole cell
    value: float | str | None
    low: float | None
    high: float | None
    n: int
    unit: str
    better: Better
    estimator: str
    formula: str
    note: str
    status: stats.Status
    caveat: str  # what its engine's acceptance is not: see `caveats`


METRICS: dict[str, Definition] = {}


def metric(name: str, unit: str, formula: str, better: Better) -> Callable[[F], F]:
    """Register a metric. `formula` is its definition as the reports print it."""

    def register(function: F) -> F:
        METRICS[name] = Definition(name, unit, formula, better, function)
        return function

    return register


def definitions_hash() -> str:
    """16 hexadecimal digits, equal only for results that mean the same."""
    said = [(d.name, d.unit, d.formula, d.better) for d in METRICS.values()]
    return hashlib.sha256(json.dumps([DEFINITIONS_VERSION, said]).encode()).hexdigest()[:16]


def load_run(path: Path) -> Run:
    """Read a run folder.

    A torn last line (a crash while writing) is left out with a warning. Of several trials with one key the last
    successful one counts. Raises UserError when the folder is not a run or its files are damaged.
    """
    with uncollected():
        manifest = read_manifest(path)
        trials, warnings = read_trials(path)
        if strangers := sorted({t.cell for t in trials} - {c.id for c in manifest.cells}):
            warnings.append(f"cells that run.json does not plan have trials in trials.jsonl: {', '.join(strangers)}")
        good = [trial for trial in trials if trial.status == "ok"]
        try:
            rows = [row for trial in good for row in _request_rows(trial)]
            steps, forwards, verifies = _tables(good)
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(f"{path}: {error}; the records are damaged") from None
        _refuse_nan(path, steps, forwards)
        sensors = read_telemetry(path)
        samples, torn = read_roof_samples(path)
        warnings += [*(sensors.warnings if sensors else ()), *torn]
        return Run(
            path=path,
            manifest=manifest,
            trials=tuple(trials),
            requests=pd.DataFrame.from_records(rows, columns=list(_REQUEST_COLUMNS)),
            steps=steps,
            forwards=forwards,
            verifies=verifies,
            warnings=tuple(warnings),
            telemetry=sensors,
            roof_samples=tuple(samples),
        )


def caveats(record: CellRecord) -> tuple[str, ...]:
    """Why what the cell accepts is not what a trained drafter would have accepted; empty where it is."""

    def random(option: str) -> bool:
        chosen = record.options.get(option)
        return isinstance(chosen, Mapping) and "random" in chosen

    known = {
        SYNTHETIC: bool(record.options.get("synthetic")),
        RANDOM_DRAFTER: random("drafter"),
        RANDOM_ADAPTER: random("adapter"),
    }
    return tuple(caveat for caveat, holds in known.items() if holds)


def lossy(record: CellRecord) -> str:
    """The sampler, where it changes the output by design; else ""."""
    sampler = record.options.get("sampler")
    return sampler if sampler in ("logit_mix", "trust_diffusion", "denoise") else ""


def _why_other_tokens(cell: Cell) -> str:
    if sampler := lossy(cell.record):
        return f"sampler {sampler} changes the output by design"
    verdicts = {check.verdict for check in cell.requests["check"].dropna()}
    if cell.record.dtype == "float32" or "different" in verdicts:
        return ""
    unchecked = "" if verdicts else ", which was not checked"
    return f"in {cell.record.dtype} two near-equal logits can swap under another order of summation{unchecked}"


def step_split(cell: Cell) -> pd.DataFrame:
    """Seconds [decode steps, parts], indexed by (group, repeat, step): each role's forwards, and "switching", the
    rest of the step. Raises Unavailable where steps or forwards are not seen."""
    step = ["group", "repeat", "step"]
    steps = cell.decode_steps.set_index(step)["seconds"]
    roles = cell.decode_forwards.groupby([*step, "role"])["seconds"].sum().unstack(fill_value=0)
    roles = roles.reindex(steps.index, fill_value=0)
    return roles.assign(switching=steps - roles.sum(axis=1))


def _refuse_nan(path: Path, steps: pd.DataFrame, forwards: pd.DataFrame) -> None:
    """Sums of a table leave NaN out without a word, and a count that leaves something out is a wrong count."""
    for what, table in (("forward", forwards), ("step", steps)):
        numbers = table.select_dtypes("number").drop(columns=list(NOT_ALWAYS), errors="ignore")
        if (odd := ~np.isfinite(numbers.to_numpy(dtype=float))).any():
            row, column = np.argwhere(odd)[0]
            where = f"{numbers.columns[column]} of a {what} of {table['cell'].iloc[row]}"
            raise UserError(f"{path}: {where} is not a finite number; the records are damaged")


def summarise(run: Run) -> list[MetricRow]:
    """Every metric of every cell, in the order of the manifest and of the definitions. Raises UserError where the
    records hold a time or a count that cannot be."""
    rows = []
    for cell in run.cells:
        for definition in METRICS.values():
            try:
                found = evaluate(definition, cell)
            except stats.Damaged as error:
                what = f"{run.path}: {definition.name} of {cell.record.id}"
                raise UserError(f"{what}: {error}; the records are damaged") from error
            rows += [_row(cell, definition, part, estimate) for part, estimate in found.items()]
    return rows


def missing_part(cell: Cell, name: str, part: str) -> MetricRow:
    """The row of a part that a cell does not have."""
    prefilled = len(cell.steps) and not cell.steps["step"].any()
    why = "nothing was decoded after the first token" if prefilled else "it has nothing of this kind"
    return _row(cell, METRICS[name], part, unavailable(why))


def _row(cell: Cell, definition: Definition, part: str, estimate: Estimate) -> MetricRow:
    return MetricRow(
        cell=cell.record.id,
        metric=definition.name,
        part=part,
        **asdict(estimate),
        unit=definition.unit,
        better=definition.better,
        formula=definition.formula,
        caveat=", ".join(caveats(cell.record)),
    )


@metric("failed_trials", "trials", "trials that ended in an error; all other metrics leave them out", "lower")
def failed_trials(cell: Cell) -> Estimate:
    estimate = Estimate(float(len(cell.failed)), n=len(cell.trials) + len(cell.failed), estimator="count")
    if not cell.failed:
        return estimate
    first = (cell.failed[0].error or "no message").strip().splitlines()[0]
    return replace(estimate, note=f"first error: {first}", status="error")


@metric("ttft", "s", "first committed token - submit, prefill included; mean of requests", "lower")
def ttft(cell: Cell) -> Estimate:
    return stats.mean(cell.requests["ttft"], cell.requests["group"])


@metric(
    "tpot",
    "s/token",
    "sum(end - first token) / sum(tokens - those of the first step, usually one) over requests that go on after it",
    "lower",
)
def tpot(cell: Cell) -> Estimate:
    return stats.ratio(cell.decoded["decode_seconds"], cell.decoded["later"], cell.decoded["group"])


@metric(
    "decode_tps",
    "tokens/s",
    "sum(tokens - those of the first step, usually one) / sum(end - first token), per sequence",
    "higher",
)
def decode_tps(cell: Cell) -> Estimate:
    return stats.ratio(cell.decoded["later"], cell.decoded["decode_seconds"], cell.decoded["group"])


@metric(
    "throughput", "tokens/s", "all committed tokens / wall, whole batch (of one replica), prefill included", "higher"
)
def throughput(cell: Cell) -> Estimate:
    tokens = [sum(request.tokens for request in trial.requests) for trial in cell.trials]
    return stats.ratio(tokens, [t.wall_seconds for t in cell.trials], [t.group for t in cell.trials])


@metric(
    "throughput_per_device",
    "tokens/s",
    "throughput / devices that hold the model between them (parallel.tensor); each replica of several has its own",
    "higher",
)
def throughput_per_device(cell: Cell) -> Estimate:
    if cell.spread:
        raise Unavailable(f"the engine may use several devices ({cell.spread})")
    whole = throughput(cell)
    edges = (whole.value, whole.low, whole.high)
    value, low, high = (None if edge is None else float(edge) / cell.record.tensor for edge in edges)
    return replace(whole, value=value, low=low, high=high)


@metric(
    "tokens_per_forward",
    "tokens",
    "committed tokens / sum over forwards of the target in decode of the sequences live then, so that autoregressive "
    "decoding has 1 at any batch",
    "higher",
)
def tokens_per_forward(cell: Cell) -> Estimate:
    forwards, steps = cell.decode_forwards, cell.decode_steps
    target = forwards[forwards["model"] == "target"]
    estimate = _per_group(steps, "committed", target, "live")
    if (counted := cell.steps["committed"].sum()) != (emitted := cell.requests["tokens"].sum()):
        note = f"the steps committed {counted} tokens but the requests hold {emitted}: one of the counts is wrong"
        return replace(estimate, note=note, status="error")
    return estimate


@metric(
    "tokens_per_weighted_forward",
    "tokens",
    "committed tokens / sum over all forwards in decode of (sequences live then x its bytes / bytes of an "
    "autoregressive forward of that batch and context)",
    "higher",
)
def tokens_per_weighted_forward(cell: Cell) -> Estimate:
    forwards = cell.decode_forwards
    weights = forwards["live"] * forwards["bytes"] / _autoregressive_bytes(cell, forwards)
    return _per_group(cell.decode_steps, "committed", forwards.assign(weight=weights), "weight")


@metric(
    "acceptance_length",
    "tokens",
    "committed tokens / verify steps, each sequence's own, i.e. 1 + accepted drafts, the token that ends a step or the "
    "output being its bonus; micro: sum over sum, macro: mean of requests. Tokens beyond EOS or the limit do not count",
    "higher",
)
def acceptance_length(cell: Cell) -> dict[str, Estimate]:
    verifies = cell.seen_verifies.assign(gained=cell.seen_verifies["accepted"] + 1)
    requests = verifies.groupby(["group", "repeat", "prompt_id"])["gained"].mean()
    return {
        "micro": stats.mean(verifies["gained"], verifies["group"]),
        "macro": stats.mean(requests, requests.index.get_level_values("group")),
    }


@metric("category_acceptance_length", "tokens", "acceptance_length (micro) of the prompts of each category", "higher")
def category_acceptance_length(cell: Cell) -> dict[str, Estimate]:
    drafted = {str(name): verifies for name, verifies in cell.seen_verifies.groupby("category")}
    nothing = unavailable("nothing was drafted on the prompts of this category")
    return {
        name: stats.mean(drafted[name]["accepted"] + 1, drafted[name]["group"]) if name in drafted else nothing
        for name, _ in _by_category(cell.requests)
    }


@metric(
    "draft_acceptance_rate",
    "1",
    "accepted draft tokens / proposed draft tokens, of which those beyond the end of the output are never accepted",
    "higher",
)
def draft_acceptance_rate(cell: Cell) -> Estimate:
    verifies = cell.seen_verifies
    return stats.ratio(verifies["accepted"], verifies["drafted"], verifies["group"])


@metric(
    "acceptance_histogram", "steps", "verify steps by the number of draft tokens they accepted, bonus excluded", "none"
)
def acceptance_histogram(cell: Cell) -> dict[str, Estimate]:
    verifies = cell.seen_verifies
    n, steps = verifies["group"].nunique(), verifies["accepted"].value_counts()
    return {str(i): Estimate(float(steps.get(i, 0)), n=n, estimator="count") for i in range(cell.depth + 1)}


@metric(
    "acceptance_at",
    "1",
    "unconditional: verify steps that accepted i drafts or more / verify steps; in a tree, i is the depth",
    "higher",
)
def acceptance_at(cell: Cell) -> dict[str, Estimate]:
    verifies = cell.seen_verifies
    reached = {i: verifies["accepted"] >= i for i in range(1, cell.depth + 1)}
    return {str(i): stats.mean(reached[i], verifies["group"]) for i in reached}


@metric(
    "conditional_at",
    "1",
    "verify steps that accepted i drafts or more / verify steps that accepted i - 1 or more and were offered draft i "
    "before the end of the output; in a tree, i is the depth, and every path counts as offered to the full",
    "higher",
)
def conditional_at(cell: Cell) -> dict[str, Estimate]:
    verifies = cell.seen_verifies
    accepted = verifies["accepted"]
    judged = verifies["judged"].where(verifies["looked_up"], verifies["judged"].clip(upper=cell.drafted_depth))
    reached = {i: (accepted >= i - 1) & (judged >= i) for i in range(1, cell.depth + 1)}
    return {str(i): stats.ratio(accepted >= i, reached[i], verifies["group"]) for i in reached}


@metric(
    "proposal_coverage",
    "1",
    "decode steps with a whole block (or tree) of drafts, not looked up, whose outcome had a block of masks prepared "
    "for it / all such steps",
    "higher",
)
def proposal_coverage(cell: Cell) -> Estimate:
    options = cell.record.options
    whole = options.get("tokens") or options.get("block_size", 0) - 1
    found = [
        (covered, trial.group)
        for trial in cell.trials
        for *step, looked_up in _decode_columns(trial, "covered", "committed", "drafted", "looked_up")
        for covered, gained, drafts, copied in zip(*step, looked_up or repeat(False), strict=False)
        if gained and drafts == whole and not copied
    ]
    if not found:
        raise Unavailable("the engine prepares no proposals")
    covered, groups = zip(*found, strict=True)
    return stats.mean(covered, groups)


@metric(
    "lookup_share",
    "1",
    "decode steps of a sequence that verified what was copied from its text / all its decode steps",
    "none",
)
def lookup_share(cell: Cell) -> Estimate:
    looked_up, _, groups = _lookups(cell)
    return stats.mean(looked_up, groups)


@metric(
    "lookup_acceptance_length",
    "tokens",
    "committed tokens / steps that verified what was copied from the text, bonus included",
    "higher",
)
def lookup_acceptance_length(cell: Cell) -> Estimate:
    looked_up, gained, groups = _lookups(cell)
    if not any(looked_up):
        raise Unavailable("no end of a text stood there before")
    return stats.ratio([g * found for g, found in zip(gained, looked_up, strict=True)], looked_up, groups)


def _lookups(cell: Cell) -> tuple[tuple[bool, ...], tuple[int, ...], tuple[int, ...]]:
    """Of each decode step of each sequence: whether its drafts were looked up, what it gained, and its group."""
    found = [
        (looked_up, gained, trial.group)
        for trial in cell.trials
        for step in _decode_columns(trial, "looked_up", "committed")
        for looked_up, gained in zip(*step, strict=False)
        if gained
    ]
    if not found:
        raise Unavailable("the engine looks nothing up")
    looked_up, gained, groups = zip(*found, strict=True)
    return looked_up, gained, groups


@metric(
    "diffusion_steps_per_canvas",
    "steps",
    "denoising forwards of a sequence / its finished canvases, the forward that keeps a finished one excluded; 1 where "
    "a block is filled in one pass (vLLM's name)",
    "lower",
)
def diffusion_steps_per_canvas(cell: Cell) -> Estimate:
    canvases = _canvases(cell)
    return stats.ratio(canvases["steps"], canvases["finished"], canvases["group"])


@metric(
    "diffusion_committed_per_step",
    "tokens",
    "tokens committed in decode / denoising forwards of the sequence (vLLM's name)",
    "higher",
)
def diffusion_committed_per_step(cell: Cell) -> Estimate:
    canvases = _canvases(cell)
    return stats.ratio(canvases["committed"], canvases["steps"], canvases["group"])


@metric(
    "diffusion_canvas_positions",
    "positions",
    "masked places evaluated per request: denoising forwards x block, or with proposals the masks fed (vLLM's name)",
    "none",
)
def diffusion_canvas_positions(cell: Cell) -> Estimate:
    canvases = _canvases(cell)
    return stats.mean(canvases["positions"], canvases["group"])


@metric(
    "break_even_acceptance",
    "tokens",
    "median decode step of this / of the autoregressive baseline (mean / mean, where some steps have no drafts or look "
    "them up), same prompts and repeat; geometric mean over pairs. Steps that gain fewer tokens make the engine "
    "net-negative, unless its speedup is surely above 1",
    "lower",
)
def break_even_acceptance(cell: Cell) -> Estimate:
    gained = acceptance_length(cell)["micro"] if cell.always_drafts else tokens_per_forward(cell)
    baseline = _autoregressive_baseline(cell)
    alike = cell.always_drafts and not cell.seen_verifies["looked_up"].any()
    usual = "median" if alike else "mean"
    times = [c.decode_steps.groupby(["group", "repeat"])["seconds"].agg(usual) for c in (cell, baseline)]
    pairs = pd.concat(times, axis=1, keys=["mine", "theirs"], join="inner")
    if pairs.empty:
        raise Unavailable("no prompts succeeded both here and in the baseline")
    estimate = stats.paired_ratio(pairs["mine"], pairs["theirs"], pairs.index.get_level_values("group"))
    if gained.high is None or estimate.low is None or gained.high >= estimate.low:
        return estimate
    # Tokens per step are of sums, in which prompts with many steps weigh most; speed is a mean of prompts.
    faster = (evaluate(METRICS["speedup"], cell)[""].low or 0) > 1
    return replace(estimate, note=MIXED if faster else NET_NEGATIVE)


@metric(
    "switching_seconds",
    "s",
    "seconds of a decode step - seconds of its forwards = accept + commit + host gap; mean of steps",
    "lower",
)
def switching_seconds(cell: Cell) -> Estimate:
    split = step_split(cell)
    return stats.mean(split["switching"], split.index.get_level_values("group"))


@metric(
    "speedup",
    "ratio",
    "baseline / this, decode seconds per token of the same prompt and repeat; geometric mean over pairs",
    "higher",
)
def speedup(cell: Cell) -> Estimate:
    pairs = cell.timed_pairs
    estimate = stats.paired_ratio(*_seconds_per_token(pairs), pairs["group"])
    notes = [estimate.note]
    if len(pairs) < (most := int((cell.requests["later"] > 0).sum())):
        words = "the others end with the first step in the baseline, or have no result of it"
        notes.append(f"{len(pairs)} of {most} requests that go on after their first step are paired; {words}")
    same = int((pairs["output_hash"] == pairs["output_hash_baseline"]).sum())
    if same < len(pairs) and SYNTHETIC not in caveats(cell.record):
        notes.append(f"{same} of {len(pairs)} pairs emitted the same tokens; the others are compared per token")
    return replace(estimate, note="; ".join(filter(None, notes)))


@metric("category_speedup", "ratio", "speedup over the prompts of each category", "higher")
def category_speedup(cell: Cell) -> dict[str, Estimate]:
    names = [name for name, _ in _by_category(cell.requests)]
    paired = {str(name): pairs for name, pairs in cell.timed_pairs.groupby("category")}
    alone = unavailable("no prompt of this category ended both here and in the baseline")
    return {
        name: stats.paired_ratio(*_seconds_per_token(paired[name]), paired[name]["group"]) if name in paired else alone
        for name in names
    }


@metric(
    "minimal_detectable_effect",
    "1",
    "smallest relative change of seconds per token that these pairs show with 80% power: "
    "(t(97.5%) + t(80%)) * sd of the per-prompt log-ratios / sqrt(n)",
    "lower",
)
def minimal_detectable_effect(cell: Cell) -> Estimate:
    pairs = cell.timed_pairs
    return stats.minimal_detectable_effect(*_seconds_per_token(pairs), pairs["group"])


@metric(
    "agreement",
    "1",
    "tokens: equal to the baseline's up to the first divergence / emitted by the longer; prompts: share with "
    "identical outputs in every repeat",
    "higher",
)
def agreement(cell: Cell) -> dict[str, Estimate]:
    pairs = _comparable_pairs(cell)
    outputs = list(zip(pairs["output_ids"], pairs["output_ids_baseline"], strict=True))
    prefixes = [_common_prefix(mine, theirs) for mine, theirs in outputs]
    parts = {
        "tokens": stats.ratio(prefixes, [max(len(m), len(t)) for m, t in outputs], pairs["group"]),
        "prompts": stats.share(pairs.assign(same=[m == t for m, t in outputs]).groupby("prompt_id")["same"].all()),
    }
    if parts["prompts"].value != 1 and (note := _why_other_tokens(cell)):
        return {part: replace(e, note="; ".join(filter(None, (e.note, note)))) for part, e in parts.items()}
    return parts


@metric(
    "first_difference",
    "tokens",
    "output position, from 1, of the first token that is not the baseline's; the earliest over pairs of outputs",
    "higher",
)
def first_difference(cell: Cell) -> Estimate:
    pairs = _comparable_pairs(cell)
    outputs = zip(pairs["output_ids"], pairs["output_ids_baseline"], strict=True)
    places = [_common_prefix(mine, theirs) + 1 for mine, theirs in outputs if mine != theirs]
    if not places:
        raise Unavailable("every output is the baseline's")
    n = pairs["prompt_id"].nunique()
    return Estimate(
        float(min(places)), n=n, estimator="minimum", note=f"{len(places)} of {len(pairs)} outputs differ somewhere"
    )


def _comparable_pairs(cell: Cell) -> pd.DataFrame:
    """`Cell.pairs`, where equal outputs are to be expected."""
    compared = [one for one in (cell, cell.baseline) if one]
    if any(SYNTHETIC in caveats(one.record) for one in compared):
        raise Unavailable(NOT_THE_TARGETS)
    if cell.record.sampling.get("temperature"):
        raise Unavailable("outputs are sampled, so they may differ by design")
    if any(map(has_own_prefixes, compared)):
        raise Unavailable("every prompt to the server had a prefix of its own, so outputs differ by design")
    if any(map(_read_back, compared)):
        raise Unavailable(READ_BACK)
    return cell.pairs


def has_own_prefixes(cell: Cell) -> bool:
    """Whether a server got each prompt, in every repeat and run, behind a few tokens that no other had."""
    return any((trial.kernels or {}).get("prefix cache") == "unique" for trial in cell.trials)


def _read_back(cell: Cell) -> bool:
    """Whether tokens are known from a server's text alone, and are not as many as it counted."""
    return any(r.served and not r.served.as_emitted for trial in cell.trials for r in trial.requests)


def _why_not_checked(cell: Cell) -> str:
    if _read_back(cell):
        return READ_BACK
    return "not checked: these options may emit other tokens than the target's own, or lossless_check is false"


@metric(
    "lossless",
    "1",
    "prompts whose every output token is the one the target itself picks there, over prompts checked; "
    "one forward of the target over prompt and output",
    "higher",
)
def lossless(cell: Cell) -> Estimate:
    if SYNTHETIC in caveats(cell.record):
        raise Unavailable(NOT_THE_TARGETS)
    checked = cell.requests[cell.requests["check"].notna()]
    if checked.empty:
        raise Unavailable(_why_not_checked(cell))
    exact = checked.assign(exact=[c.verdict == "exact" for c in checked["check"]]).groupby("prompt_id")["exact"].all()
    wrong = [c for c in checked["check"] if c.verdict != "exact"]
    estimate = stats.share(exact)
    if not wrong:
        return estimate
    kinds = {c.verdict for c in wrong}
    what = "within rounding of the target's choice" if kinds == {"near-tie"} else "beyond rounding"
    unit = "probability" if cell.record.sampling.get("temperature") else "logits"
    gap = max(c.gap for c in wrong)
    return replace(estimate, note=f"the other tokens are off by up to {gap:.2g} {unit}: {what}")


@metric(
    "accuracy",
    "1",
    "prompts answered correctly in every repeat / prompts with a checkable reference: the last number of the output is "
    "that after the reference's ####",
    "higher",
)
def accuracy(cell: Cell) -> Estimate:
    scored = cell.requests[cell.requests["correct"].notna()]
    if SYNTHETIC in caveats(cell.record):
        raise Unavailable(NOT_THE_TARGETS)
    if scored.empty:
        raise Unavailable("no prompt has a reference that can be checked")
    return stats.share(scored.groupby("prompt_id")["correct"].all())


@metric(
    "pass_at_1",
    "1",
    "prompts whose code passes its tests, run once on the output of the first repeat / prompts with tests whose output "
    "could be judged (pass@1 of HumanEval, Chen et al. 2021); out of time or memory is not passed",
    "higher",
)
def pass_at_1(cell: Cell) -> Estimate:
    tested = cell.requests[cell.requests["verdict"].notna()]
    if SYNTHETIC in caveats(cell.record):
        raise Unavailable(NOT_THE_TARGETS)
    if tested.empty:
        raise Unavailable("no code was run: no prompt has tests, or the scenario does not allow it")
    first = tested.sort_values("repeat").drop_duplicates("prompt_id")
    judged = first[first["passed"].notna()]
    unknown = first[first["passed"].isna()]["verdict"]
    reasons = "; ".join(dict.fromkeys(verdict.removeprefix("not judged ") for verdict in unknown))
    why = f"{len(unknown)} of {len(first)} prompts are not judged: {reasons}" if reasons else ""
    if judged.empty:
        raise Unavailable(why)
    estimate = stats.share(judged["passed"])
    return replace(estimate, note="; ".join(filter(None, (estimate.note, why))))


@metric(
    "phase_seconds",
    "s/trial",
    "mean over trials of the seconds of each kind of forward, of accept and of commit; "
    "host gap: what these leave of the steps. Together the wall, to within 2%",
    "lower",
)
def phase_seconds(cell: Cell) -> dict[str, Estimate]:
    phases = _phases(cell)
    groups = phases.index.get_level_values("group")
    walls = pd.Series({(t.group, t.repeat): t.wall_seconds for t in cell.trials})
    share = phases.sum(axis=1).sum() / walls.sum()
    estimates = {name: stats.mean(phases[name], groups) for name in PHASES if name in phases}
    if abs(share - 1) > WALL_TOLERANCE:
        note = f"the phases sum to {share:.1%} of the wall"
        return {part: replace(estimate, note=note, status="error") for part, estimate in estimates.items()}
    return estimates


@metric(
    "forward_seconds",
    "s",
    "mean seconds of one forward of this kind, or of as many as a graph runs as one; where an engine times several "
    "numbers of rows, mean of the trials' medians, as in row_cost",
    "lower",
)
def forward_seconds(cell: Cell) -> dict[str, Estimate]:
    return {kind: stats.mean(f["seconds"], f["group"]) for kind, f in _kinds(cell)}


@metric("intensity", "FLOP/B", "FLOPs / (bytes read + written) of the forward, both counted from shapes", "none")
def intensity(cell: Cell) -> dict[str, Estimate]:
    return {kind: stats.ratio(f["flops"], f["bytes"], f["group"]) for kind, f in _kinds(cell)}


@metric(
    "experts_per_forward",
    "experts",
    "distinct experts of a layer that the forward's rows were sent to, counted from the router, rows of padding and of "
    "finished sequences included; mean of layers and forwards",
    "none",
)
def experts_per_forward(cell: Cell) -> dict[str, Estimate]:
    kinds = [(kind, f.dropna(subset="experts")) for kind, f in _kinds(cell)]
    if all(f.empty for _, f in kinds):
        raise Unavailable("no forward has experts: the model is dense")
    dense = unavailable("the model of this forward is dense")
    return {kind: dense if f.empty else stats.mean(f["experts"], f["group"]) for kind, f in kinds}


@metric("achieved_bandwidth", "B/s", "(bytes read + written) / forward_seconds", "higher")
def achieved_bandwidth(cell: Cell) -> dict[str, Estimate]:
    return {kind: stats.ratio(f["bytes"], f["seconds"], f["group"]) for kind, f in _kinds(cell)}


@metric("achieved_flops", "FLOP/s", "FLOPs / forward_seconds", "higher")
def achieved_flops(cell: Cell) -> dict[str, Estimate]:
    return {kind: stats.ratio(f["flops"], f["seconds"], f["group"]) for kind, f in _kinds(cell)}


@metric(
    "mbu",
    "1",
    "achieved bandwidth / read bandwidth of this device's memory, the median of samples taken between trials of the "
    "run, or where there are none the roof measured before it; traffic that fits into the last-level cache, as of a "
    "small drafter that runs again and again, may not have come from memory: not given where it passes the roof",
    "higher",
)
def mbu(cell: Cell) -> dict[str, Estimate]:
    peak = cell.roof("bandwidth")
    read = (cell.roofs or {})["bandwidth"]["read"]
    if read.get("sampled"):
        shares = _utilisation(achieved_bandwidth(cell), peak, "read bandwidth beside the run", most=read["high"])
    else:
        shares = _utilisation(achieved_bandwidth(cell), peak, "measured read bandwidth")
    traffic = {kind: (f["bytes"] / f["passes"]).max() for kind, f in _kinds(cell)}  # a cache serves pass after pass
    return {kind: _cached(share, traffic[kind], cell.last_level_cache) for kind, share in shares.items()}


def _cached(share: Estimate, traffic: float, cache: float) -> Estimate:
    """What a share of the memory's roof is worth where a cache may have served the traffic, which nothing counts."""
    if traffic > cache or share.value is None:
        return share
    sizes = f"its {traffic / 1e6:.0f} MB fit into the last-level cache of {cache / 1e6:.0f} MB"
    if float(share.value) > 1 + ROOF_TOLERANCE:
        return unavailable(f"{sizes}, so that the memory does not bound it")
    return replace(share, note=f"{sizes}, which may have served it")


@metric("mfu", "1", "achieved FLOP/s / rate measured on this device for this dtype", "higher")
def mfu(cell: Cell) -> dict[str, Estimate]:
    return _utilisation(achieved_flops(cell), cell.roof("flops"), f"measured {cell.record.dtype} rate")


@metric("mbu_spec", "1", "achieved bandwidth / spec-sheet bandwidth", "higher")
def mbu_spec(cell: Cell) -> dict[str, Estimate]:
    return _utilisation(achieved_bandwidth(cell), cell.spec("bandwidth"), "spec-sheet bandwidth")


@metric("mfu_spec", "1", "achieved FLOP/s / dense spec-sheet peak of this dtype", "higher")
def mfu_spec(cell: Cell) -> dict[str, Estimate]:
    return _utilisation(achieved_flops(cell), cell.spec("flops"), f"spec-sheet {cell.record.dtype} peak")


@metric(
    "floor_seconds",
    "s",
    "max(bytes / read bandwidth as in mbu, FLOPs / measured rate of this dtype); mean of forwards",
    "lower",
)
def floor_seconds(cell: Cell) -> dict[str, Estimate]:
    return {kind: stats.mean(np.maximum(*_floors(cell, f)), f["group"]) for kind, f in _kinds(cell)}


@metric(
    "floor_gap",
    "s",
    "forward_seconds - floor_seconds: what neither memory nor arithmetic at the measured roofs explains; "
    "mean of forwards",
    "lower",
)
def floor_gap(cell: Cell) -> dict[str, Estimate]:
    return {kind: stats.mean(f["seconds"] - np.maximum(*_floors(cell, f)), f["group"]) for kind, f in _kinds(cell)}


@metric(
    "launches_per_forward",
    "launches",
    "what the host starts one after another in a forward of the target: operators of torch but views and allocations, "
    "calls of the native decoder, compiled layers, graph replays; counted in a forward of this kind that is not timed",
    "lower",
)
def launches_per_forward(cell: Cell) -> dict[str, Estimate]:
    kinds = {kind: f.dropna(subset="launches") for kind, f in _kinds(cell)}
    if all(f.empty for f in kinds.values()):
        raise Unavailable("launches were not counted")
    unseen = unavailable("launches of this kind of forward were not counted")
    return {
        kind: unseen if f.empty else Estimate(float(f["launches"].iloc[0]), n=1, estimator="counted once")
        for kind, f in kinds.items()
    }


@metric(
    "preparation_seconds",
    "s",
    "seconds that the execution compiled or captured for this engine, warm-up included; part of no other figure",
    "lower",
)
def preparation_seconds(cell: Cell) -> dict[str, Estimate]:
    made = [p for trial in cell.trials for p in trial.prepared]
    if not made:
        raise Unavailable("nothing was compiled or captured for this engine")
    kinds = dict.fromkeys(p.kind for p in made)
    return {
        kind: Estimate(
            sum(p.seconds for p in made if p.kind == kind),
            n=sum(p.kind == kind for p in made),
            estimator="sum",
            note=_kept(sum(p.bytes or 0 for p in made if p.kind == kind)),
        )
        for kind in kinds
    }


def _kept(size: int) -> str:
    return f"keeps {size / 1e6:.0f} MB of device memory" if size else ""


@metric(
    "parallel_efficiency",
    "1",
    "decode seconds per token of the same engine on one device / (devices that hold the model x those here), same "
    "prompt and repeat; geometric mean over pairs",
    "higher",
)
def parallel_efficiency(cell: Cell) -> Estimate:
    if cell.devices == 1:
        raise Unavailable("this is one device")
    if cell.alone is None or not cell.alone.trials:
        raise Unavailable("the engine was not run on one device at this point of the matrix")
    ran, before = ((c.trials[0].kernels or {}).get("forward") for c in (cell, cell.alone))
    if ran != before:
        raise Unavailable(f"one device ran other kernels ({before}) than these ({ran})")
    pairs = cell.decoded.merge(cell.alone.decoded, on=["prompt_id", "repeat"], suffixes=("", "_baseline"))
    if pairs.empty:
        raise Unavailable("no prompt succeeded both here and on one device")
    theirs, mine = _seconds_per_token(pairs)
    return stats.paired_ratio(theirs, mine * cell.record.tensor, pairs["group"])


@metric(
    "communication_share",
    "1",
    "seconds in collectives, waiting for other ranks included / seconds of the same forwards, where they were timed; "
    "of rank 0, in decode and by kind of forward",
    "lower",
)
def communication_share(cell: Cell) -> dict[str, Estimate]:
    timed = {kind: f.dropna(subset="collective_seconds") for kind, f in _shared(cell)}
    decode = [f[f["step"] > 0] for f in timed.values()]
    parts = {"decode": pd.concat(decode)} | timed
    return {
        part: stats.ratio(f["collective_seconds"], f["seconds"], f["group"])
        if len(f)
        else unavailable("the collectives of no such forward were timed")
        for part, f in parts.items()
    }


@metric(
    "collective_bytes",
    "B",
    "bytes that a rank sends in the collectives of one forward of this kind, counted from shapes: 2 (n - 1)/n of what "
    "n ranks sum, (n - 1)/n of the logits they gather",
    "lower",
)
def collective_bytes(cell: Cell) -> dict[str, Estimate]:
    return {kind: stats.mean(f["collective_bytes"], f["group"]) for kind, f in _shared(cell)}


@metric(
    "bound",
    "",
    "overhead where forward_seconds > 2 x floor_seconds (communication, if collectives are most of what is beyond it), "
    "else the larger term of floor_seconds: memory or compute; not given where that is memory but a cache served the "
    "traffic, as in mbu",
    "none",
)
def bound(cell: Cell) -> dict[str, Estimate]:
    found = {kind: _bound(cell, forwards) for kind, forwards in _kinds(cell)}
    with stats.values_only():
        shares = mbu(cell)
    return {
        kind: shares[kind] if estimate.value == "memory" and shares[kind].value is None else estimate
        for kind, estimate in found.items()
    }


@metric(
    "steady_state_slope",
    "1",
    "relative change of the median decode step from the first to the last trial, in execution order, by the slope of "
    "trials of the same prompts; where none was repeated, of all trials, if bytes and FLOPs of their steps differ by "
    "1% at most",
    "none",
)
def steady_state_slope(cell: Cell) -> Estimate:
    trials = cell.decode_steps.groupby("order")
    medians, groups = trials["seconds"].median(), trials["group"].first()
    if groups.duplicated().any():
        return stats.drift(medians.index, medians, groups)
    if cell.forwards.empty:
        raise Unavailable(f"no prompt was repeated, so that drift is not told from what prompts cost, and {UNSEEN}")
    steps = cell.decode_forwards.groupby(["order", "step"])[["bytes", "flops"]].sum().groupby("order").median()
    if (differ := float((steps.max() / steps.min() - 1).max())) > ALIKE:
        raise Unavailable(
            f"no prompt was repeated, and bytes or FLOPs of their steps differ by up to {differ:.0%}: drift is not told"
            " from that"
        )
    return stats.drift(medians.index, medians)


@metric("step_seconds", "s", "mean seconds of a decode step", "lower")
def step_seconds(cell: Cell) -> Estimate:
    return stats.mean(cell.decode_steps["seconds"], cell.decode_steps["group"])


@metric(
    "predicted_step_seconds",
    "s",
    "predicted: sum over the forwards of a decode step of max(bytes / read bandwidth as in mbu, FLOPs / measured rate)"
    ", nothing else taking time; mean of steps",
    "none",
)
def predicted_step_seconds(cell: Cell) -> Estimate:
    forwards, steps = cell.decode_forwards, cell.decode_steps
    return _per_group(
        forwards.assign(floor=np.maximum(*_floors(cell, forwards))), "floor", steps.assign(steps=1), "steps"
    )


@metric(
    "row_cost",
    "ratio",
    "t(R) / t(1): median decode forward of R rows / of one row, same prompts and repeat; geometric mean over pairs",
    "lower",
)
def row_cost(cell: Cell) -> dict[str, Estimate]:
    medians = row_medians(cell)
    groups = medians.index.get_level_values("group")
    return {str(rows): stats.paired_ratio(medians[rows], medians[1], groups) for rows in medians.columns}


@metric(
    "free_token_slots",
    "rows",
    "the most rows R, interpolated between those measured, up to which no forward takes more than 1.1 x t(1); "
    "measured: from row_cost; roofs: predicted, from max(bytes / read bandwidth as in mbu, FLOPs / measured rate)",
    "higher",
)
def free_token_slots(cell: Cell) -> dict[str, Estimate]:
    rows, logs, groups = row_logs(cell)
    measured = stats.resampled(logs, groups, lambda means: crossing(rows, np.exp(means), SLACK))
    if measured.value == rows[-1]:
        measured = replace(measured, note="; ".join(filter(None, (measured.note, AT_LEAST))))
    return {"measured": measured, "roofs": _at_roofs(cell, _free_at_roofs)}


@metric(
    "ridge_rows",
    "rows",
    "measured: t(1) / seconds of each further row between the two largest numbers of rows, where the largest takes 2 x "
    "t(1) or more; roofs: predicted, the rows from which FLOPs / measured rate exceeds bytes / read bandwidth as in "
    "mbu",
    "none",
)
def ridge_rows(cell: Cell) -> dict[str, Estimate]:
    rows, logs, groups = row_logs(cell)

    def ridge(means: np.ndarray) -> np.ndarray:
        times = np.exp(means)  # over t(1)
        slope = (times[..., -1] - times[..., -2]) / (rows[-1] - rows[-2])
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where((times[..., -1] >= 2) & (slope > 0), 1 / slope, np.nan)

    measured = stats.resampled(logs, groups, ridge)
    if measured.value is None:
        measured = unavailable(f"{rows[-1]:.0f} rows, the most measured, take less than twice as long as one")
    return {"measured": measured, "roofs": _at_roofs(cell, _ridge_at_roofs)}


@metric("peak_bytes", "B", "high-water mark of device memory, largest of all trials", "lower")
def peak_bytes(cell: Cell) -> Estimate:
    peaks = [trial.peak_bytes for trial in cell.trials if trial.peak_bytes is not None]
    if not peaks:
        raise Unavailable("the device does not report its peak memory")
    n = len({trial.group for trial in cell.trials})
    in_graphs = any((trial.kernels or {}).get("forward") == "torch, graph" for trial in cell.trials)
    note = "without what a recorded forward needs within" if in_graphs else ""
    return Estimate(float(max(peaks)), n=n, estimator="maximum", note=note)


@metric(
    "joules_per_token",
    "J/token",
    "energy of the device over the trials / all committed tokens, prefill and idle power included; by its counter, "
    "else by the integral of power. Only of one device that does all of the work, from 10 s of trials on, if both "
    "agree to 5% over the run and the counter's update interval adds at most 5%",
    "lower",
)
def joules_per_token(cell: Cell) -> Estimate:
    return _of_energy(cell.energy, "joules", "tokens")


@metric("tokens_per_joule", "token/J", "all committed tokens / energy of the device, as in joules_per_token", "higher")
def tokens_per_joule(cell: Cell) -> Estimate:
    return _of_energy(cell.energy, "tokens", "joules")


@metric(
    "energy_delay_product",
    "J·s/token²",
    "sum of (joules of a trial x its seconds) / sum of (its tokens squared), with joules as in joules_per_token",
    "lower",
)
def energy_delay_product(cell: Cell) -> Estimate:
    energy = cell.energy
    products = energy.assign(delayed=energy["joules"] * energy["seconds"], squared=energy["tokens"] ** 2)
    return _of_energy(products, "delayed", "squared")


@metric(
    "mean_power",
    "W",
    "energy of the device, of several rank 0's, over the trials / their seconds, believed as in joules_per_token",
    "none",
)
def mean_power(cell: Cell) -> Estimate:
    return _of_energy(cell.device_energy, "joules", "seconds")


@metric("core_clock", "Hz", "mean of the samples of the core clock during trials, the first of each left out", "none")
def core_clock(cell: Cell) -> Estimate:
    return _mean_of_samples(cell, "core_clock")


@metric("temperature", "°C", "highest sample of the temperature during trials, the first of each left out", "none")
def temperature(cell: Cell) -> Estimate:
    trials, groups = cell.sampled("temperature")
    hottest = max(float(values.max()) for values in trials)
    return Estimate(hottest, n=len(set(groups)), estimator="maximum")


@metric(
    "activity",
    "1",
    "mean of the samples of the device's activity during trials, without the first second of each, whose samples may "
    "be of what was before: what is busy, the device says",
    "none",
)
def activity(cell: Cell) -> Estimate:
    return _mean_of_samples(cell, "activity")


@metric(
    "memory_activity",
    "1",
    "mean of the samples of the memory controller's activity during trials, as activity's",
    "none",
)
def memory_activity(cell: Cell) -> Estimate:
    return _mean_of_samples(cell, "memory_activity")


@metric(
    "throttled",
    "1",
    "samples during trials, the first of each left out, at which the device says that it throttles / all of them",
    "lower",
)
def throttled(cell: Cell) -> Estimate:
    trials, groups = cell.sampled("throttle")
    estimate = stats.ratio([sum(map(bool, values)) for values in trials], [len(values) for values in trials], groups)
    reasons = dict.fromkeys(why for values in trials for value in values if value for why in value.split(", "))
    return replace(estimate, note="; ".join(filter(None, (", ".join(reasons), estimate.note))))


@metric(
    "forwards_per_sequence",
    "forwards",
    "sum over forwards in decode (each of those that a graph runs as one) of the sequences live then / sequences, by "
    "model",
    "lower",
)
def forwards_per_sequence(cell: Cell) -> dict[str, Estimate]:
    return {
        str(model): _per_group(
            forwards.assign(passes=forwards["live"] * forwards["passes"]),
            "passes",
            cell.requests.assign(sequences=1),
            "sequences",
        )
        for model, forwards in cell.decode_forwards.groupby("model", sort=False)
    }


@metric(
    "rows_per_forward",
    "rows",
    "mean rows per sequence that a forward in decode (each of those that a graph runs as one) feeds, by its role",
    "lower",
)
def rows_per_forward(cell: Cell) -> dict[str, Estimate]:
    by_role = cell.decode_forwards.groupby("role", sort=False)
    return {str(role): stats.ratio(f["rows"], f["passes"], f["group"]) for role, f in by_role}


@metric(
    "bytes_per_token",
    "B/token",
    "bytes read and written by all forwards in decode, where several devices hold the model on the first of them / "
    "committed tokens",
    "lower",
)
def bytes_per_token(cell: Cell) -> Estimate:
    return _per_group(cell.decode_forwards, "bytes", cell.decode_steps, "committed")


@metric(
    "flops_per_token",
    "FLOP/token",
    "FLOPs of all forwards in decode, where several devices hold the model on the first of them / committed tokens",
    "lower",
)
def flops_per_token(cell: Cell) -> Estimate:
    return _per_group(cell.decode_forwards, "flops", cell.decode_steps, "committed")


@metric("output_hash", "", "sha256 over the distinct outputs of each prompt, prompts in order of their ids", "none")
def output_hash(cell: Cell) -> Estimate:
    outputs = {prompt: sorted(set(hashes)) for prompt, hashes in cell.requests.groupby("prompt_id")["output_hash"]}
    digest = hashlib.sha256(json.dumps(sorted(outputs.items())).encode()).hexdigest()[:16]
    # Every repeat has its own seeds, so drawn tokens and drawn acceptance differ by design.
    drawn = cell.record.sampling.get("temperature") or cell.record.options.get("synthetic")
    varying = 0 if drawn else sum(len(hashes) > 1 for hashes in outputs.values())
    note = f"{varying} of {len(outputs)} prompts gave different outputs in different repeats" if varying else ""
    return Estimate(digest, n=len(outputs), estimator="exact", note=note)


def evaluate(definition: Definition, cell: Cell) -> dict[str, Estimate]:
    """The metric of one cell by part, {"": ...} where it has none; what is not known says why. Raises `stats.Damaged`
    where the records hold a time or a count that cannot be."""
    if not cell.trials and definition.name != "failed_trials":
        return {"": unavailable("every trial failed" if cell.failed else "no trial was run")}
    if cell.record.engine == "forward" and definition.name in NOT_OF_FORWARDS:
        return {"": unavailable(f"this engine {TIMES_FORWARDS}")}
    try:
        result = definition.function(cell)
    except Unavailable as reason:
        return {"": unavailable(str(reason))}
    return result if isinstance(result, dict) else {"": result}


def _alone(cell: Cell, cells: Iterable[Cell]) -> Cell | None:
    def place(other: Cell) -> tuple[str, dict[str, Any]]:
        point = {axis: v for axis, v in other.record.point.items() if axis.split(".")[0] != "parallel"}
        return other.record.label, point

    if cell.devices == 1:
        return None
    return next((c for c in cells if c.devices == 1 and place(c) == place(cell)), None)


def _baseline_of(cell: Cell, cells: Iterable[Cell]) -> Cell | None:
    return next((c for c in cells if c.record.baseline and c.record.point == cell.record.point), None)


def _per_group(top: pd.DataFrame, numerator: str, bottom: pd.DataFrame, denominator: str) -> Estimate:
    """Ratio of two columns that live in different frames, summed within each group of prompts first."""
    sums = pd.concat([top.groupby("group")[numerator].sum(), bottom.groupby("group")[denominator].sum()], axis=1)
    sums = sums.fillna(0)
    if wrong := int(((sums[denominator] == 0) & (sums[numerator] != 0)).sum()):
        raise Unavailable(f"{wrong} of {len(sums)} groups of prompts have nothing to divide by")
    return stats.ratio(sums[numerator], sums[denominator], sums.index)


def _of_energy(energy: pd.DataFrame, top: str, bottom: str) -> Estimate:
    estimate = stats.ratio(energy[top], energy[bottom], energy["group"])
    return replace(estimate, estimator=f"{estimate.estimator}; {energy['how'].iloc[0]}")


def _mean_of_samples(cell: Cell, sensor: str) -> Estimate:
    trials, groups = cell.sampled(sensor)
    return stats.ratio([values.sum() for values in trials], [len(values) for values in trials], groups)


def _canvases(cell: Cell) -> pd.DataFrame:
    """One row per request of a diffusion engine: its denoising steps, finished canvases, masked places, tokens."""
    options = cell.record.options
    if cell.record.engine != "diffusion" or options.get("proposals") == 0:
        raise Unavailable("the engine fills no canvas of masks")
    block, denoises = options["block_size"], options["sampler"] == "denoise"
    rows = []
    for trial in cell.trials:
        masked = {f.step: f.rows for f in trial.forwards if f.role == "draft+verify"}
        for index in range(len(trial.requests)):
            gained = [step.committed[index] for step in trial.steps]
            live = range(1, max((i for i, n in enumerate(gained) if n), default=0) + 1)
            if not live:
                continue
            if denoises:  # the prompt's own forward is a denoising step of the first canvas
                finished = -(-sum(gained) // block)  # a canvas covers `block` places of the output
                steps = 1 + len(live) - finished
                positions = steps * block
            else:
                finished = steps = len(live)
                masks = {i: masked[i] - 1 - max(trial.steps[i].drafted, default=0) for i in live if i in masked}
                blocks = {i: len(trial.steps[i].prepared) for i in masks}
                each = max((n // blocks[i] for i, n in masks.items() if blocks[i]), default=block)
                positions = each + sum(masks.values())  # the prompt's own forward carries a block too
            rows.append((trial.group, steps, finished, positions, sum(gained[i] for i in live)))
    return pd.DataFrame(rows, columns=["group", "steps", "finished", "positions", "committed"])


def _by_category(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Requests, pairs or verifies by the category of their prompts, in alphabetical order."""
    found = [(str(name), mine) for name, mine in rows.groupby("category", sort=True)]
    if len(found) < 2:
        raise Unavailable("the prompts are all of one category")
    return found


def _seconds_per_token(pairs: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Decode seconds per token of (baseline, this)."""
    theirs = pairs["decode_seconds_baseline"] / pairs["later_baseline"]
    return theirs, pairs["decode_seconds"] / pairs["later"]


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _autoregressive_bytes(cell: Cell, forwards: pd.DataFrame) -> np.ndarray:
    """Bytes [len(forwards)] of a one-row forward of the target at each forward's batch and context.

    Fitted to the baseline's own forwards: weights once, keys and values in proportion to batch x context.
    """
    reference = _autoregressive_baseline(cell)

    def terms(frame: pd.DataFrame) -> np.ndarray:
        return np.column_stack([np.ones(len(frame)), frame["batch"], frame["batch"] * frame["context"]])

    known = reference.decode_forwards
    if known.empty:
        raise Unavailable("no request of the autoregressive baseline emitted a second token")
    # The context of a step is the target's: a drafter's own cache may lag behind it or hold nothing.
    context = forwards.groupby(["group", "repeat", "step"])["context"].transform("max")
    told, asked = terms(known), terms(forwards.assign(context=context))
    if np.linalg.matrix_rank(np.concatenate([told, asked])) > np.linalg.matrix_rank(told):
        raise Unavailable("the autoregressive baseline ran at too few batches and contexts to tell its bytes at these")
    coefficients, *_ = np.linalg.lstsq(told, known["bytes"].to_numpy(), rcond=None)
    return asked @ coefficients


def _autoregressive_baseline(cell: Cell) -> Cell:
    baseline = cell if cell.record.baseline else cell.baseline
    if baseline is None or baseline.record.engine != "autoregressive" or baseline.forwards.empty:
        raise Unavailable("no autoregressive baseline was run at this point of the matrix")
    return baseline


def _phases(cell: Cell) -> pd.DataFrame:
    """Seconds per trial, [trials, phases], indexed by (group, repeat); only phases that occur."""
    trial = ["group", "repeat"]
    # Step 0 is the prefill, the drafter's too.
    seen = cell.seen_forwards.assign(phase=lambda f: f["role"].where(f["step"] > 0, "prefill"))
    forwards = seen.groupby([*trial, "phase"])["seconds"].sum().unstack(fill_value=0)
    steps = cell.steps.groupby(trial)[["seconds", "accept_seconds", "commit_seconds"]].sum()
    named = forwards.assign(accept=steps["accept_seconds"], commit=steps["commit_seconds"])
    return named.assign(**{"host gap": steps["seconds"] - named.sum(axis=1)})


def _kinds(cell: Cell) -> list[tuple[str, pd.DataFrame]]:
    forwards = cell.seen_forwards
    if cell.record.engine == "forward":
        # It times few forwards of each number of rows, of which one that waited would be most of a mean: row_cost, of
        # medians, would contradict it.
        trials = forwards.groupby(["group", "repeat", "kind"], sort=False)
        alike = forwards["role"] != "prefill"  # whose chunks differ in rows
        medians = {name: trials[name].transform("median") for name in ("seconds", "collective_seconds")}
        forwards = forwards.assign(
            **{name: found.where(alike & forwards[name].notna(), forwards[name]) for name, found in medians.items()}
        )
    return [(str(kind), of_kind) for kind, of_kind in forwards.groupby("kind", sort=False)]


def _shared(cell: Cell) -> list[tuple[str, pd.DataFrame]]:
    """By kind, the forwards of models that several ranks hold between them; raises Unavailable on one device."""
    if cell.record.tensor == 1:
        raise Unavailable("one device holds the model: there is nothing to communicate")
    return _kinds(cell)


def _floors(cell: Cell, forwards: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Seconds that memory and arithmetic would need at the measured roofs, per forward."""
    return forwards["bytes"] / cell.roof("bandwidth"), forwards["flops"] / cell.roof("flops")


def row_medians(cell: Cell) -> pd.DataFrame:
    """Median seconds of a decode forward [(group, repeat), rows], where the engine times several numbers of rows."""
    if cell.record.engine != "forward":
        raise Unavailable("the engine does not time forwards of several numbers of rows")
    forwards = cell.decode_forwards
    if forwards.empty:
        raise Unavailable("no request emitted a token after the first step")
    return forwards.groupby(["group", "repeat", "rows"])["seconds"].median().unstack()


def row_logs(cell: Cell) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows [k], log t(R) / t(1) [trials, k], group [trials]) of `row_medians`."""
    medians = row_medians(cell)
    logs = np.log(medians.to_numpy())
    return medians.columns.to_numpy(dtype=float), logs - logs[:, :1], medians.index.get_level_values("group").to_numpy()


def row_floors(cell: Cell) -> pd.DataFrame:
    """Predicted seconds [rows, (memory, compute)] at the measured roofs, of a decode forward of so many rows."""
    forwards = cell.decode_forwards
    memory, compute = _floors(cell, forwards)
    return pd.DataFrame({"memory": memory, "compute": compute}).groupby(forwards["rows"]).mean()


def crossing(rows: np.ndarray, values: np.ndarray, limit: float) -> np.ndarray:
    """Rows [...] at which values [..., len(rows)] first pass a limit, interpolated; the last where they never do."""
    over = values > limit
    at = np.where(over.any(-1), over.argmax(-1), len(rows))  # never 0 where the first value is within the limit
    after, before = np.clip(at, 1, len(rows) - 1), np.clip(at - 1, 0, len(rows) - 2)
    left, right = (np.take_along_axis(values, index[..., None], -1)[..., 0] for index in (before, after))
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.clip((limit - left) / (right - left), 0, 1)
    found = rows[before] + part * (rows[after] - rows[before])
    return np.where(at == len(rows), rows[-1], np.where(at == 0, rows[0], found))


def _at_roofs(cell: Cell, tell: Callable[[pd.DataFrame], Estimate]) -> Estimate:
    try:
        floors = row_floors(cell)
    except Unavailable as reason:
        return unavailable(str(reason))
    return replace(tell(floors), n=cell.decode_forwards["group"].nunique(), estimator="predicted from measured roofs")


def _free_at_roofs(floors: pd.DataFrame) -> Estimate:
    rows, floor = floors.index.to_numpy(dtype=float), floors.max(axis=1).to_numpy()
    value = float(crossing(rows, floor / floor[0], SLACK))
    return Estimate(value, note=AT_LEAST if value == rows[-1] else "")


def _ridge_at_roofs(floors: pd.DataFrame) -> Estimate:
    rows, share = floors.index.to_numpy(dtype=float), (floors["compute"] / floors["memory"]).to_numpy()
    if share[-1] <= 1:
        return unavailable(f"{ALL_MEMORY} at {rows[-1]:.0f} rows, the most measured")
    return Estimate(float(crossing(rows, share, 1.0)))


def _bound(cell: Cell, forwards: pd.DataFrame) -> Estimate:
    memory, compute = _floors(cell, forwards)
    over_floor = forwards["seconds"].sum() / np.maximum(memory, compute).sum()
    larger = "memory" if memory.sum() >= compute.sum() else "compute"
    beyond = 1 - 1 / over_floor  # share of the time
    timed = forwards.dropna(subset="collective_seconds")
    talking = timed["collective_seconds"].sum() / timed["seconds"].sum() if len(timed) else 0.0
    return Estimate(
        larger if over_floor <= OVERHEAD else "communication" if talking > beyond / 2 else "overhead",
        n=forwards["group"].nunique(),
        estimator="sums over forwards",
        note=f"measured {over_floor:.2f} × floor",
    )


def _utilisation(
    achieved: dict[str, Estimate], peak: float, name: str, most: float | None = None
) -> dict[str, Estimate]:
    """Shares of a peak that was seen to reach `most` at times; more than that is an error."""
    return {kind: _share(estimate, peak, name, most or peak) for kind, estimate in achieved.items()}


def _share(achieved: Estimate, peak: float, name: str, most: float) -> Estimate:
    value, low, high = (
        None if edge is None else float(edge) / peak for edge in (achieved.value, achieved.low, achieved.high)
    )
    share = replace(achieved, value=value, low=low, high=high)
    if value is None or value <= 1 + ROOF_TOLERANCE:
        return share
    if value * peak <= most * (1 + ROOF_TOLERANCE):
        return replace(share, note=f"{value:.0%} of the {name}, which reached {most / peak:.0%} of its median")
    return replace(share, note=f"{value:.0%} of the {name}: the roof or the count is wrong", status="error")


# Of a forward, and NaN for a dense model, where one device has it all, or where nothing counted them.
NOT_ALWAYS = ("experts", "collective_bytes", "collective_seconds", "launches")
_TRIAL_COLUMNS = ("cell", "group", "repeat", "order")
_REQUEST_COLUMNS = (
    *_TRIAL_COLUMNS, "prompt_id", "category", "prompt_tokens", "tokens", "later", "ttft", "decode_seconds",
    "output_ids", "output_hash", "check", "correct", "passed", "verdict",
)  # fmt: skip
_STEP_COLUMNS = (
    *_TRIAL_COLUMNS, "step", "seconds", "accept_seconds", "commit_seconds", "committed", "live",
)  # fmt: skip
_VERIFY_COLUMNS = (*_TRIAL_COLUMNS, "step", "prompt_id", "category", "drafted", "accepted", "judged", "looked_up")
_FORWARD_COLUMNS = (
    *_TRIAL_COLUMNS, "step", "model", "role", "rows", "batch", "context", "flops", "bytes", "seconds", "live", "kind",
    "passes", *NOT_ALWAYS,
)  # fmt: skip


def _frame(names: Sequence[str], found: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame({name: found[name] for name in names}, copy=False)


def _of_trial(trial: TrialRecord) -> tuple[str, int, int, int]:
    return trial.cell, trial.group, trial.repeat, trial.order


def _request_rows(trial: TrialRecord) -> Iterable[tuple]:
    for r, later in zip(trial.requests, trial.later, strict=True):
        yield (
            *_of_trial(trial), r.prompt_id, r.category, r.prompt_tokens, r.tokens, later, r.ttft_seconds,
            r.end_seconds - r.ttft_seconds, r.output_ids, r.output_hash, r.check, r.correct, r.passed, r.verdict,
        )  # fmt: skip


def _tables(trials: Sequence[TrialRecord]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(steps, forwards, verifies) of all trials, by column: a record of each would take longer than its metrics."""
    steps, forwards = (
        {name: [*chain.from_iterable(part[name] for part in parts)] for name in parts[0]}
        if parts
        else columns(kind, ())
        for kind, parts in (
            (StepRecord, [columns(StepRecord, trial.steps) for trial in trials]),
            (ForwardRecord, [columns(ForwardRecord, trial.forwards) for trial in trials]),
        )
    )
    counts = np.array([len(trial.steps) for trial in trials], dtype=int)
    of = np.repeat(np.arange(len(trials)), counts)
    step = _places(counts)
    gained = _ragged(steps["committed"])
    last = _last_gains(gained, of, step)
    live = np.bincount(gained.row, step[gained.row] <= last, minlength=len(of)).astype(int)
    step_table = _frame(_STEP_COLUMNS, {
        **_trial_columns(trials, of),
        "step": step,
        **{name: _numbers(steps[name]) for name in ("seconds", "accept_seconds", "commit_seconds")},
        "committed": np.bincount(gained.row, gained.values, minlength=len(of)).astype(gained.values.dtype),
        "live": live,
    })  # fmt: skip
    ending = _Ragged(*(column[step[gained.row] == last] for column in gained))
    return step_table, _forwards(trials, forwards, live, counts), _verifies(trials, steps, of, step, ending)


def _forwards(
    trials: Sequence[TrialRecord], stored: dict[str, list], live: np.ndarray, steps: np.ndarray
) -> pd.DataFrame:
    """`live` [all steps] and the number of `steps` [trials]; a last step that gained nothing is not among them."""
    of = np.repeat(np.arange(len(trials)), [len(trial.forwards) for trial in trials])
    step = _numbers(stored["step"]).astype(int)
    recorded = step < steps[of]
    live_then = np.zeros(len(of), dtype=int)
    live_then[recorded] = live[((np.cumsum(steps) - steps)[of] + step)[recorded]]
    kinds = zip((step == 0).tolist(), *(stored[name] for name in ("model", "role", "rows", "passes")), strict=True)
    return _frame(_FORWARD_COLUMNS, {
        **_trial_columns(trials, of),
        "step": step,
        "model": _words(stored["model"]),
        "role": _words(stored["role"]),
        **{name: _numbers(stored[name]) for name in ("rows", "batch", "context", "flops", "seconds", *NOT_ALWAYS)},
        "passes": _numbers(stored["passes"]),
        "bytes": _numbers(stored["bytes_read"]) + _numbers(stored["bytes_written"]),
        "live": live_then,
        "kind": _words([_kind(*each) for each in kinds]),
    })  # fmt: skip


def _verifies(
    trials: Sequence[TrialRecord], steps: dict[str, list], of: np.ndarray, step: np.ndarray, ending: _Ragged
) -> pd.DataFrame:
    """A row for each sequence that a step offered drafts; `of` and `step` [all steps] are its trial and number, and
    `ending` has what each sequence gained last."""
    drafted, accepted = _ragged(steps["drafted"]), _ragged(steps["accepted"])
    if not np.array_equal(drafted.row, accepted.row):
        raise ValueError("a step drafted for other sequences than it accepted for")
    offered = drafted.values > 0
    row = drafted.row[offered]
    requests = [trial.requests for trial in trials]
    place = drafted.place[offered]
    asked = [requests[trial][at] for trial, at in zip(of[row].tolist(), place.tolist(), strict=True)]
    most = 1 + max(place.max(initial=0), ending.place.max(initial=0))
    ends = np.isin(row * most + place, ending.row * most + ending.place)
    looks = _ragged(steps["looked_up"])
    found = looks.values.astype(bool)
    return _frame(_VERIFY_COLUMNS, {
        **_trial_columns(trials, of[row]),
        "step": step[row],
        "prompt_id": _words([request.prompt_id for request in asked]),
        "category": _words([request.category for request in asked]),
        "drafted": drafted.values[offered],
        "accepted": accepted.values[offered],
        "judged": np.where(ends, accepted.values[offered], drafted.values[offered]),
        "looked_up": np.isin(row * most + place, looks.row[found] * most + looks.place[found]),
    })  # fmt: skip


class _Ragged(NamedTuple):
    """Lists of different lengths, end to end."""

    values: np.ndarray
    row: np.ndarray  # which list each is of
    place: np.ndarray  # and where in it


def _ragged(lists: Sequence[Sequence[int]]) -> _Ragged:
    lengths = np.fromiter(map(len, lists), dtype=int, count=len(lists))
    values = _numbers([*chain.from_iterable(lists)])
    return _Ragged(values, np.repeat(np.arange(len(lists)), lengths), _places(lengths))


def _places(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... of each list, end to end."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _last_gains(gained: _Ragged, of: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The step in which the sequence last gained a token [len(gained.row)]; `of`, `step` as in `_verifies`."""
    sequence = of[gained.row] * (gained.place.max(initial=0) + 1) + gained.place
    last = np.full(sequence.max(initial=0) + 1, -1)
    more = gained.values > 0
    np.maximum.at(last, sequence[more], step[gained.row][more])
    return last[sequence]


def _decode_columns(trial: TrialRecord, *names: str) -> Iterable[tuple]:
    """These fields of every step but the prefill."""
    stored = columns(StepRecord, trial.steps)
    return islice(zip(*(stored[name] for name in names), strict=True), 1, None)


def _trial_columns(trials: Sequence[TrialRecord], of: np.ndarray) -> dict[str, Any]:
    """What a row says of its trial; `of` [rows] indexes the trials."""
    found = [[getattr(trial, name) for trial in trials] for name in _TRIAL_COLUMNS]
    cell, *numbers = (
        np.array(values, dtype=object if name == "cell" else int)[of]
        for name, values in zip(_TRIAL_COLUMNS, found, strict=True)
    )
    return dict(zip(_TRIAL_COLUMNS, (_words(cell), *numbers), strict=True))


def _numbers(values: list) -> np.ndarray:
    """Integers where all are; None is nan."""
    array = np.array(values)
    return array.astype(float) if array.dtype == object or not len(array) else array


def _words(values: Any) -> pd.Series:
    """Not as pandas' own strings: making those of a hundred thousand takes longer than what is done with them."""
    return pd.Series(values, dtype=object)


@cache
def _kind(first: bool, model: str, role: str, rows: int, passes: int) -> str:
    """Forwards that share a point of the roofline. Prefills differ in rows with every prompt, and are one kind."""
    if role == "prefill" or first:
        return "prefill" if model == "target" else f"{model} prefill"
    return f"{role}, {rows} row{'s' if rows != 1 else ''}" + (f" in {passes} forwards" if passes > 1 else "")


from zbench import serving_metrics  # noqa: E402, F401  (registers what servers are measured by)
