"""What a run writes down. Plain frozen dataclasses and their JSON form; no torch here.

A run folder holds `run.json` (the manifest: what was to be measured, on what), `trials.jsonl`
(one line per finished trial, appended and synced as it ends), `roofs.jsonl` (one line, synced likewise,
each time that the read roof was measured again between trials) and, where sensors were sampled,
`telemetry.jsonl` (see `telemetry.py`). A *cell* is one engine setting at one point of the scenario's
matrix; a *trial* is one execution of a cell on one batch of prompts.
"""

from __future__ import annotations

import atexit
import gc
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

import orjson

from zbench.errors import UserError

SCHEMA_VERSION = 1
MANIFEST, TRIALS, ROOFS = "run.json", "trials.jsonl", "roofs.jsonl"
# Engines whose decoder is not zbench's own: what it is held against.
PEERS = frozenset({"reference", "endpoint", "llama_cpp", "vllm", "dflash_reference"})
KERNELS, KERNELS_VERSION = "kernels.json", 1  # what a run of kernels writes instead (see `operators.py`)
TUNE, TUNE_VERSION = "tune.json", 1  # what was found by several runs (see `tune.py`)
PROJECTION, PROJECTION_VERSION = "projection.json", 1  # what was measured nowhere (see `projection.py`)

T = TypeVar("T")
Role = Literal["prefill", "decode", "draft", "verify", "draft+verify", "denoise"]


@dataclass(frozen=True, slots=True)
class ForwardRecord:
    """One forward of one model.

    `rows` is per sequence, `batch` the sequences in the forward, `context` the mean committed tokens
    per sequence before it. `flops`, `bytes_read` and `bytes_written` are counted from shapes for the
    whole forward (all sequences). `committed` is summed over the batch. `experts` is the mean over layers of
    the distinct experts that the router sent a row to; None for a dense model.

    Where several ranks hold the model between them, all but `seconds` and `committed` are rank 0's part of it, and no
    rank has more. `collective_bytes` is what it sends to the others; `collective_seconds` the share of `seconds` spent
    in collectives, waiting for the others included (None: not timed in this forward, see `models/team.py`).

    `launches` is what the host starts one after another in such a forward, see `engines/launches.py`; counted once in a
    forward of this kind that is not timed, None where it was not. `passes` forwards that a graph ran as one, as the
    levels of a draft, are one record: everything in it is theirs together.
    """

    step: int  # index of the step it belongs to; step 0 is the prefill
    model: str  # "target", "drafter", or "head" where the target's head runs on its own
    role: Role
    rows: int
    batch: int
    context: float
    flops: float
    bytes_read: float
    bytes_written: float
    seconds: float
    committed: int
    experts: float | None = None
    collective_bytes: float | None = None
    collective_seconds: float | None = None
    launches: int | None = None
    passes: int = 1


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of an engine: one or more forwards, then accept and commit. Step 0 is the prefill.

    `seconds` is the wall time of the whole step; what forwards, accept and commit leave over is the host gap.
    `committed` counts the tokens each sequence gained (0 for a sequence that had finished);
    `drafted` the draft tokens each was offered, `accepted` how many of them were kept (bonus excluded), `prepared`
    the outcomes (rows kept) that next drafts were prepared for, `covered` whether each sequence's was among them
    (engines that draft and verify in one forward), `looked_up` whether each sequence's drafts were copied from its text
    (engines that look there).
    """

    seconds: float
    accept_seconds: float
    commit_seconds: float
    committed: tuple[int, ...]
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    covered: tuple[bool, ...] = ()
    prepared: tuple[int, ...] = ()
    looked_up: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class LosslessCheck:
    """Whether the target alone would have emitted an output (see `engines/lossless.py`).

    "near-tie": every mismatch is within what rounding can move; "different": one is not.
    """

    verdict: Literal["exact", "near-tie", "different"]
    mismatches: int = 0
    first: int | None = None  # output position of the first mismatch
    gap: float | None = None  # the largest: logits when greedy, probability mass when sampled


@dataclass(frozen=True, slots=True)
class Speculation:
    """What a server says of its drafting, over one request or one trial; None is what it does not say.

    `accepted_at[i]` counts the verify steps that accepted more than i drafts. `length` is only set where a server
    gives a mean and no counts.
    """

    source: str
    verifies: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    accepted_at: tuple[int, ...] = ()
    length: float | None = None


@dataclass(frozen=True, slots=True)
class ServedRecord:
    """How a server answered one request, as its client saw it. Times are seconds since the request was due.

    Due is the arrival that an open load drew; in a closed load it is when a place was free.
    """

    due_seconds: float  # since the trial's submit
    queued_seconds: float  # how long the client held it back, no place being free
    # When each chunk with text arrived, and what said that the text ends, where that is a token that no text shows.
    chunk_seconds: tuple[float, ...]
    tokenised: int  # tokens of the text by the model's own tokenizer, and 1 where the end of the text is a token
    ids_from: Literal["server", "text"]  # whether the server gave the token ids, or they come from its text
    prompt_tokens: int | None = None  # as the server counts, as below; None where it does not say
    output_tokens: int | None = None
    cached_tokens: int | None = None  # of the prompt, found in its prefix cache
    attempts: int = 1
    speculation: Speculation | None = None

    @property
    def as_emitted(self) -> bool:
        """Whether the ids are those that were emitted: read back from a text, they might be others of the same
        spelling."""
        return self.ids_from == "server" or self.output_tokens in (None, self.tokenised)


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """What was learnt of a server over one trial. Counters are differences between before and after."""

    kind: str  # "vllm", "sglang", "tensorrt_llm", "llama.cpp", ... or "unknown"
    version: str
    speculation: Speculation | None
    diffusion: dict[str, int] | None  # vLLM's diffusion counters
    why_not: str  # why there is no speculation; "" where there is
    client_cpu_seconds: float  # processor time of the client's thread while the load ran
    load: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One prompt's output within a trial. Times are seconds since the trial's submit, or since a served request was
    due."""

    prompt_id: str
    category: str
    prompt_tokens: int
    output_ids: tuple[int, ...]
    output_hash: str  # sha256 over the ids as little-endian int64
    text: str
    finish: Literal["eos", "length"]
    ttft_seconds: float
    end_seconds: float
    seed: int
    check: LosslessCheck | None = None  # None: not checked
    correct: bool | None = None  # against the prompt's reference; None where it has none that can be checked
    served: ServedRecord | None = None  # of a server; None for an engine of this process
    passed: bool | None = None  # whether the code in it passes its prompt's tests; None where it was not run
    verdict: str | None = None  # "passed", or why not: "failed AssertionError", "timeout", "not judged ..."

    @property
    def tokens(self) -> int:
        """Output tokens: as the server counted them, where it did."""
        counted = self.served.output_tokens if self.served else None
        return len(self.output_ids) if counted is None else counted


class Table(Sequence[T], Generic[T]):
    """Records of one kind as a file holds them, by column; one is made when it is asked for.

    Forwards are many: whoever sums them takes a column, and no record is made. Raises ValueError or TypeError where the
    columns are not those of the kind.
    """

    __slots__ = ("_columns", "_kind")

    def __init__(self, kind: type[T], columns: dict[str, list]) -> None:
        lengths = {len(values) for values in columns.values()}
        if len(lengths) > 1:
            raise ValueError(f"the columns of a {kind.__name__} have different lengths")
        rows = lengths.pop() if lengths else 0
        known = _defaults(kind)  # type: ignore[arg-type]
        if strange := columns.keys() - known.keys():
            raise TypeError(f"a {kind.__name__} has no {', '.join(sorted(strange))}")
        lacking = {name: default for name, default in known.items() if name not in columns}
        if rows and (needed := [name for name, default in lacking.items() if default is MISSING]):
            raise TypeError(f"a {kind.__name__} needs {', '.join(needed)}")
        self._kind = kind
        self._columns = {name: columns[name] if name in columns else [known[name]] * rows for name in known}

    def column(self, name: str) -> list[Any]:
        """One field of all records, as JSON has it: a tuple is a list here."""
        return self._columns[name]

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self._kind(**_frozen({name: values[index] for name, values in self._columns.items()}))

    def __iter__(self) -> Iterator[T]:
        for values in zip(*self._columns.values(), strict=True):
            yield self._kind(**_frozen(dict(zip(self._columns, values, strict=True))))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Table | tuple) else NotImplemented

    def __repr__(self) -> str:
        return repr(tuple(self))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class RankRecord:
    """What one rank did in a trial, summed over its forwards."""

    rank: int
    replica: int
    device: str  # as its driver names it
    wall_seconds: float
    forward_seconds: float
    collective_bytes: float
    flops: float
    bytes: float  # read and written
    collective_seconds: float | None = None  # of the forwards in which they were timed
    timed_seconds: float | None = None  # seconds of those forwards
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PreparationRecord:
    """Something that an execution had to do once before it could run forwards of a kind. No part of any other time."""

    kind: Literal["compile", "capture"]
    what: str  # which forwards it serves, in words
    seconds: float
    bytes: int | None = None  # device memory that it keeps; None: not known


@dataclass(frozen=True, slots=True)
class TrialRecord:
    cell: str
    group: int  # index of the batch of prompts
    repeat: int
    order: int  # position in the execution order of the run, for drift checks
    status: Literal["ok", "error"]
    started: str  # ISO 8601, UTC
    wall_seconds: float
    requests: tuple[RequestRecord, ...] = ()
    steps: Sequence[StepRecord] = ()
    forwards: Sequence[ForwardRecord] = ()
    error: str | None = None
    peak_bytes: int | None = None  # device memory high-water mark; None where the device does not say
    kernels: dict[str, str] | None = None  # operator -> implementation that ran
    ranks: tuple[RankRecord, ...] = ()  # of the replica that ran it; empty for a run of one process
    server: ServerRecord | None = None
    prepared: tuple[PreparationRecord, ...] = ()  # for it, and before an engine's first trial in its warm-up
    others_seconds: float | None = None  # CPU time that other processes took meanwhile; None where it cannot be told

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.cell, self.group, self.repeat)

    @property
    def later(self) -> tuple[int, ...]:
        """Tokens of each request after those of the first step, usually one: a peer may verify drafts with the prompt,
        and what that gains takes no time after the first token. ValueError where that step is of other sequences."""
        first = self.steps[0].committed if self.steps else (1,) * len(self.requests)
        return tuple(request.tokens - gained for request, gained in zip(self.requests, first, strict=True))

    def to_json(self) -> str:
        """One line of JSON. Steps and forwards are stored by column: they are many and small."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["requests"] = [asdict(r) for r in self.requests]
        data["steps"] = columns(StepRecord, self.steps)
        data["forwards"] = _stored(ForwardRecord, self.forwards)
        data["ranks"] = _stored(RankRecord, self.ranks)
        data["prepared"] = [asdict(p) for p in self.prepared]
        data["server"] = asdict(self.server) if self.server else None
        return json.dumps({"schema": SCHEMA_VERSION, **data}, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> TrialRecord:
        """Inverse of `to_json`. Raises ValueError on another schema version or malformed JSON."""
        try:
            data = orjson.loads(line)
        except orjson.JSONDecodeError:  # so it says of NaN too, which `json` writes
            data = json.loads(line)
        if (version := data.pop("schema", None)) != SCHEMA_VERSION:
            raise ValueError(f"trial record has schema {version}, this zbench reads {SCHEMA_VERSION}")
        data["requests"] = tuple(_request(r) for r in data["requests"])
        data["steps"] = Table(StepRecord, data["steps"])
        data["forwards"] = Table(ForwardRecord, data["forwards"])
        data["ranks"] = tuple(Table(RankRecord, data.get("ranks", {})))
        data["server"] = _told(ServerRecord, data.get("server"))
        data["prepared"] = tuple(PreparationRecord(**p) for p in data.get("prepared", ()))
        return _sound(cls(**data))


@dataclass(frozen=True, slots=True)
class RoofSample:
    """The read roof measured again beside a run, the way that the manifest's was, on the device of rank 0.

    B/s, median and quartiles of `n` reads of the whole buffer; without any, `unavailable` says why.
    """

    taken: str  # ISO 8601, UTC
    seconds: float  # that it took between trials, its buffer included
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unavailable: str = ""

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA_VERSION, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> RoofSample:
        """Inverse of `to_json`. Raises ValueError or TypeError on another schema version or anything else."""
        data = json.loads(line)
        if (version := data.pop("schema", None)) != SCHEMA_VERSION:
            raise ValueError(f"roof sample has schema {version}, this zbench reads {SCHEMA_VERSION}")
        return cls(**data)


@dataclass(frozen=True, slots=True)
class CellRecord:
    """One engine setting at one point of the matrix, as planned. Part of the manifest."""

    id: str
    label: str
    engine: str
    options: dict[str, Any]
    point: dict[str, Any]  # the matrix axes and their values here
    model: str
    dtype: str
    device: str
    batch: int
    context: int | None  # prompt tokens every prompt is cut or extended to; None keeps them as they are
    output_tokens: int
    sampling: dict[str, Any]
    baseline: bool  # the cell others at the same point are compared with
    tensor: int = 1  # ranks that hold a model between them
    replicas: int = 1  # of the model, each on so many ranks, which share the prompts
    absent: str = ""  # why it cannot be measured here, such as what is not installed


@dataclass(frozen=True, slots=True)
class Manifest:
    """`run.json`: everything about a run that is known before its first trial."""

    schema_version: int
    zbench_version: str
    created: str
    name: str
    description: str
    command: str
    scenario: dict[str, Any]
    scenario_hash: str
    cells: tuple[CellRecord, ...]
    environment: dict[str, Any]
    environment_hash: str
    models: dict[str, Any]  # name -> parameters, bytes, layers, hash, ...
    prompts_hash: str  # over the token ids of every prompt at every point
    roofs: dict[str, Any] | None
    specs: dict[str, Any] | None  # the spec-sheet row of a known device, else None
    planned: dict[str, int] = field(default_factory=dict)  # cell -> trials; empty in runs from before it was recorded

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        data = json.loads(text)
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"run has schema {data.get('schema_version')}, this zbench reads {SCHEMA_VERSION}")
        for name in ("scenario", "environment", "models"):
            _object(name, data[name])
        for name in ("device", "cpu", "torch", "zbench"):
            _object(f"environment.{name}", data["environment"].get(name, {}))
        for name, facts in data["models"].items():
            _object(f"models.{name}", facts)
        _object("planned", data.get("planned", {}))
        if not all(isinstance(count, int) for count in data.get("planned", {}).values()):
            raise ValueError("planned has counts that are no numbers")
        data["cells"] = tuple(CellRecord(**c) for c in data["cells"])
        for cell in data["cells"]:
            for name in ("options", "point", "sampling"):
                _object(f"{name} of cell {cell.id}", getattr(cell, name))
            if not (isinstance(cell.batch, int) and cell.batch > 0):
                raise ValueError(f"cell {cell.id} has batch {cell.batch!r}")
        return cls(**data)


def _object(name: str, value: Any) -> None:
    """Raises ValueError where a part of JSON is not one with keys."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}, not an object")


def read_versioned(path: Path, version: int, what: str, command: str) -> dict[str, Any]:
    """A JSON record that `command` wrote. Raises UserError where the file is none, or of another version."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = found["schema_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is not {what}; make one with `{command}`") from None
    if known != version:
        raise UserError(f"{path}: has schema {known}, this zbench reads {version}; run `{command}` again")
    return found


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run folder. Raises UserError: no run folder, damaged, or another schema version."""
    path = folder / MANIFEST
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder that `zbench run` wrote") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not the manifest of a run ({_one_line(error)}); run the scenario again") from None


def schema_version(manifest: Path) -> Any:
    """Of a manifest file, whatever else is wrong with it; None where it does not say."""
    try:
        return json.loads(manifest.read_text(encoding="utf-8")).get("schema_version")
    except (OSError, ValueError, AttributeError):
        return None


def read_trials(folder: Path) -> tuple[list[TrialRecord], list[str]]:
    """The trials of a run folder, the last good one of each key, and what is to be said about the file.

    A last line torn by a crash is left out. Raises UserError where anything else is damaged.
    """
    path = folder / TRIALS
    if not path.exists():
        return [], [f"there is no {TRIALS}: no trial has ended yet"]
    trials, warnings = _lines(path, TrialRecord.from_json, "a trial record")
    latest: dict[tuple[str, int, int], TrialRecord] = {}
    for trial in trials:
        if trial.status == "ok" or trial.key not in latest or latest[trial.key].status == "error":
            latest[trial.key] = trial
    return list(latest.values()), warnings


def read_roof_samples(folder: Path) -> tuple[list[RoofSample], list[str]]:
    """What was measured of the read roof beside a run, in order; as `read_trials`. Empty where nothing was."""
    path = folder / ROOFS
    return _lines(path, RoofSample.from_json, "a roof sample") if path.exists() else ([], [])


def _lines(path: Path, parse: Callable[[bytes], T], kind: str) -> tuple[list[T], list[str]]:
    """The records of a file that is appended to, and what is to be said about it. Raises UserError."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)})") from None
    found: list[T] = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse(line))
        except (json.JSONDecodeError, UnicodeDecodeError):
            if number == len(lines):
                return found, [f"the last line of {path.name} is torn (a crash?) and was left out"]
            raise UserError(f"{path}:{number}: not JSON; the file is damaged, remove the line or run again") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}:{number}: not {kind} ({_one_line(error)})") from None
    return found, []


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it nothing looks for cycles, and what was made in it is never searched for any: records have none, and
    going through them again and again took longer than reading them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
        atexit.register(gc.unfreeze)  # held at the interpreter's end, nanobind's modules (Triton) report leaks
    finally:
        if was:
            gc.enable()


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _sound(trial: TrialRecord) -> TrialRecord:
    """The trial. Raises ValueError where it succeeded in what cannot be."""
    if trial.status == "error":
        return trial
    if trial.status != "ok":
        raise ValueError(f"its status is {trial.status!r}")
    if not trial.requests:
        raise ValueError("it succeeded without a request")
    for request in trial.requests:
        times = (request.ttft_seconds, request.end_seconds, trial.wall_seconds)
        if not all(isinstance(time, int | float) and math.isfinite(time) for time in times):
            raise ValueError(f"request {request.prompt_id} has times that are no numbers: {times}")
        if not 0 <= request.ttft_seconds <= request.end_seconds or min(request.end_seconds, trial.wall_seconds) <= 0:
            raise ValueError(f"request {request.prompt_id} has times that cannot be: {times}")
    return trial


def _request(data: dict[str, Any]) -> RequestRecord:
    check = LosslessCheck(**data["check"]) if data["check"] else None
    return RequestRecord(**{**_frozen(data), "check": check, "served": _told(ServedRecord, data.get("served"))})


def _told(kind: type, data: dict[str, Any] | None) -> Any:
    """A record with what a server said of its drafting within."""
    if data is None:
        return None
    speculation = data.get("speculation")
    return kind(**{**_frozen(data), "speculation": Speculation(**_frozen(speculation)) if speculation else None})


def _frozen(row: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


@cache
def _defaults(kind: type) -> dict[str, Any]:
    """Of each field, in their order; MISSING where it has none."""
    return {f.name: f.default for f in fields(kind)}


def columns(kind: type[T], records: Sequence[T]) -> dict[str, list]:
    """Records by column, as they are stored."""
    names = _defaults(kind)  # type: ignore[arg-type]
    if isinstance(records, Table):
        return {name: records.column(name) for name in names}
    return {name: [getattr(r, name) for r in records] for name in names}


def _stored(kind: type[T], records: Sequence[T]) -> dict[str, list]:
    """`columns` without those that are None throughout: most models have no experts, most runs one rank."""
    return {name: values for name, values in columns(kind, records).items() if set(map(type, values)) != {type(None)}}
