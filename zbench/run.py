"""From a scenario to a run folder: plan the trials, interleave the engines, append each result as it ends."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

import zbench
from zbench import accuracy, checks, codejudge, engines, progress, prompts, ranks, scenario
from zbench.cache import check_writable, new_folder, write
from zbench.engines import launches, lossless
from zbench.engines.base import Engine, Generated, Launches, Meter, Request
from zbench.engines.sampling import Sampling
from zbench.errors import UserError
from zbench.hardware import environment, roofs, specs
from zbench.hardware import telemetry as sensors
from zbench.hardware.device import Device
from zbench.models import loading, zoo
from zbench.models.execution import ExecutionUnavailable
from zbench.models.families import parameter_count
from zbench.models.team import RankLost
from zbench.models.zaya_config import ZayaConfig
from zbench.ranks import Member, World
from zbench.records import (
    MANIFEST,
    PEERS,
    ROOFS,
    SCHEMA_VERSION,
    TRIALS,
    CellRecord,
    LosslessCheck,
    Manifest,
    PreparationRecord,
    RequestRecord,
    StepRecord,
    TrialRecord,
    read_manifest,
    read_trials,
)
from zbench.telemetry import TELEMETRY

INTERRUPTED = "interrupted"
SAMPLE_EVERY = 10.0  # seconds between samples of the read roof, or more:
SAMPLE_SHARE = 0.015  # they take at most this share of the time between the first and the last
DECODES = 4  # of a trial, at most: while something is compiled or captured in one, it is decoded again


Batch = tuple[tuple[prompts.Prompt, list[int]], ...]  # with their token ids


@dataclass(frozen=True, slots=True)
class Trial:
    """One execution of one cell on one batch of prompts."""

    cell: CellRecord
    group: int
    repeat: int
    order: int

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.cell.id, self.group, self.repeat)


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the matrix, made concrete: a model, tokenised prompts in batches, and the cells to compare."""

    scenario: scenario.Scenario
    cells: tuple[CellRecord, ...]
    device: Device
    shared: engines.Shared
    batches: tuple[Batch, ...]
    warmup: tuple[list[int], ...]
    member: Member | None  # this rank's place here; None: it has none
    checked: dict[tuple, LosslessCheck] = field(default_factory=dict)
    judged: dict[tuple[str, str], codejudge.Verdict] = field(default_factory=dict)  # by prompt and answer
    launches: dict[str, Launches] = field(default_factory=dict)  # by cell
    prepared: dict[str, tuple[PreparationRecord, ...]] = field(default_factory=dict)  # by cell: while warming up


@dataclass(frozen=True, slots=True)
class Outcome:
    folder: Path
    planned: int
    finished: int
    failed: int
    stopped: str | None = None  # why the run ended early

    @property
    def interrupted(self) -> bool:
        return self.stopped == INTERRUPTED

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    def summary(self) -> str:
        parts = [f"{self.finished} of {self.planned} trials measured"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.stopped}; continue with --resume {self.folder}"] if self.stopped else []
        return ", ".join(parts)


def prepare(
    wanted: scenario.Scenario,
    say: Callable[[str], None],
    allow_pickle: bool = False,
    world: World | None = None,
) -> tuple[Point, ...]:
    """Load models, tokenise prompts and check that everything fits. Raises UserError before anything is measured."""
    checks.check(wanted, allow_pickle)
    matrix = scenario.points(wanted)
    for _, cells in matrix:
        for cell in cells:
            engines.check_here(cell.engine, cell.options)
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    world = world or World()
    device = world.device(wanted.device)
    models: dict[str, engines.Shared] = {}
    files: dict[str, loading.LoadedModel] = {}
    cut: set[str] = set()  # what is said of prompts, once for all points
    points = []
    sharded = any(at.parallel.tensor > 1 for at, _ in matrix)
    for at, cells in matrix:
        member = world.member(at.parallel)
        weights = repr((at.model_spec, at.dtype))
        if weights not in files:
            say(f"loading {at.model_name} ({at.dtype})")
            files[weights] = _load(at, device)
        key = f"{weights} {at.parallel.tensor} {at.parallel.data}"
        if key not in models:
            loaded, team = files[weights], member.team if member else None
            shared = engines.Shared(loaded, getattr(torch, at.dtype), device, allow_pickle, team)
            if sharded:
                shared.why_no_graphs = "graphs run on one rank only, and points of a run are compared"
            models[key] = shared
        shared = models[key]
        cells = tuple(replace(cell, absent=engines.absent(cell.engine, cell.options, at.batch)) for cell in cells)
        chosen = prompts.load(at.prompts)
        checks.check_point(at, cells, shared.model.config, chosen, allow_pickle, fetch=True)
        if at.accuracy.execute_generated_code:
            codejudge.confinement()
        encoded = prompts.encode(chosen, shared.tokenizer, at.context)
        checks.check_room(at, shared.model.config, max(map(len, encoded)) + at.output_tokens)
        if several := sum(len(prompt.turns) > 1 for prompt in chosen):
            cut.add(f"{several} of {len(chosen)} prompts have further turns, which are not decoded")
        pairs = list(zip(chosen, encoded, strict=True))
        batches = tuple(tuple(pairs[i : i + at.batch]) for i in range(0, len(pairs), at.batch))
        others = prompts.warmup_prompts(at.warmup.prompts, measured=chosen)
        warmup = tuple(prompts.encode(others, shared.tokenizer, at.context))
        for prompt, ids in [*pairs, *zip(others, warmup, strict=True)]:
            prompts.check_ids(ids, shared.model.config.vocab, f"prompt {prompt.id}")
        points.append(Point(at, cells, device, shared, batches, warmup, member))
    for line in sorted(cut):
        say(line)
    if all(cell.absent for point in points for cell in point.cells):
        why = (f"{cell.label}: {cell.absent}" for point in points for cell in point.cells)
        raise UserError("; ".join(dict.fromkeys(why)))
    return tuple(points)


def _load(at: scenario.Scenario, device: Device) -> loading.LoadedModel:
    if isinstance(at.model_spec, str) and not zoo.path(at.model_spec):
        with zoo.progress_bar() as bar:
            return loading.load(at.model_spec, at.dtype, bar)
    return loading.load(at.model_spec, at.dtype, device=device.torch)


def plan(points: Iterable[Point]) -> list[tuple[Point, list[Trial]]]:
    """Every trial in execution order. Engines alternate A B, B A from one batch of prompts to the next, so that a
    drift of the machine falls on all of them alike. Servers that the run starts share the device, so that only one is
    up at a time: with several, it is they that alternate, from one repeat to the next. Cells that cannot run here have
    no trials."""
    planned, order = [], 0
    for point in points:
        trials, replicas = [], point.scenario.parallel.data
        for repeat in range(point.scenario.repeats):
            together = _together([cell for cell in point.cells if not cell.absent])
            for part in together if repeat % 2 == 0 else reversed(together):
                for first in range(0, len(point.batches), replicas):  # what the replicas decode side by side
                    for cell in part if (repeat + first // replicas) % 2 == 0 else tuple(reversed(part)):
                        for group in range(first, first + replicas):
                            trials.append(Trial(cell, group, repeat, order))
                            order += 1
        planned.append((point, trials))
    return planned


def _together(cells: Sequence[CellRecord]) -> list[tuple[CellRecord, ...]]:
    """Cells that can alternate: all of them, unless they start more than one server."""
    parts: dict[str, list[CellRecord]] = {}
    for cell in cells:
        parts.setdefault(_server(cell), []).append(cell)
    return [tuple(part) for part in parts.values()] if len(parts.keys() - {""}) > 1 else [tuple(cells)]


def _server(cell: CellRecord) -> str:
    """The server that a cell starts; "" for none."""
    server = cell.options.get("server")
    return json.dumps([server, cell.options["url"], cell.options["api_key_env"]], sort_keys=True) if server else ""


def run(
    wanted: scenario.Scenario,
    out: Path,
    console: Console,
    resume: Path | None = None,
    allow_pickle: bool = False,
) -> Outcome:
    """Measure a scenario into a run folder under `out`, or finish the one at `resume`."""
    with ranks.joined() as world:
        return _run(wanted, out, console, resume, allow_pickle, world)


def _run(
    wanted: scenario.Scenario, out: Path, console: Console, resume: Path | None, allow_pickle: bool, world: World
) -> Outcome:
    deadline = time.monotonic() + wanted.budget_seconds if wanted.budget_seconds is not None else None

    def say(line: str) -> None:
        if world.rank == 0:
            progress.say(console, line)

    def ready() -> tuple[Point, ...]:
        if world.rank == 0 and resume is None:
            check_writable(out)
        return prepare(wanted, say, allow_pickle, world)

    world.meet([at.parallel for at, _ in scenario.points(wanted)], wanted.device)
    points = world.together(ready)
    device = points[0].device
    snapshot = _snapshot(wanted, device, world)
    planned = plan(points)
    total = sum(len(trials) for _, trials in planned)
    folder, finished = Path(), set[tuple[str, int, int]]()
    if world.rank == 0:
        if resume is None:
            folder = _begun(out, wanted, points, snapshot, say)
        else:
            folder, finished = resume, _finished(resume, wanted, points, snapshot)
    folder, finished = world.told((folder, finished))
    if world.rank:
        try:
            world.told(None)  # the first sample of the read roof, below, is over
            for _ in _measure(planned, finished, deadline, world):
                pass
        except KeyboardInterrupt:
            world.interrupted()
        except _BudgetSpent:
            pass
        return Outcome(folder, total, len(finished), 0)
    for point in points:
        point.shared.logs, point.shared.say = folder, say
    failed, stopped = 0, None
    roof = _sampled_roof(planned, finished, read_manifest(folder).roofs)
    period = wanted.telemetry.period_ms and wanted.telemetry.period_ms / 1e3
    with (
        _locked(folder),
        _Log(folder / TRIALS) as log,
        sensors.watching(device, folder / TELEMETRY, period) as watch,
        progress.track(total, len(finished), console) as advance,
    ):
        # Between the trials that come out here no rank is in one: the others wait for this one.
        read_roof = _ReadRoof(device, roof, folder / ROOFS)
        try:
            read_roof.sample()  # before engines are warmed up: the first trial finds the caches as they leave them
            world.told(None)
            try:
                for record in _measure(planned, finished, deadline, world, watch):
                    log.append(record.to_json())
                    failed += record.status == "error"
                    if record.status == "ok":
                        finished.add(record.key)
                    advance(_headline(record))
                    read_roof.sample_if_due()
            except _BudgetSpent:
                stopped = "the scenario's time budget is spent"
            read_roof.sample_last()
        except KeyboardInterrupt:
            stopped = INTERRUPTED
            world.interrupted()
    return Outcome(folder, total, len(finished), failed, stopped)


def _snapshot(wanted: scenario.Scenario, device: Device, world: World) -> dict[str, Any]:
    """The environment, with what confines generated code and which devices the ranks have."""
    snapshot = environment.snapshot(device, wanted.threads)
    if wanted.accuracy.execute_generated_code:
        snapshot["generated_code"] = {"confined": codejudge.confinement()}
    if world.size > 1:
        snapshot["ranks"] = _ranks(world.all((snapshot["system"]["host"], snapshot["device"])))
    return snapshot


def _ranks(found: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """Which device each rank has, on which of the hosts, for the record: "host 0, NVIDIA ..., uuid"."""
    hosts = list(dict.fromkeys(host for host, _ in found))
    return {
        f"rank {rank}": f"host {hosts.index(host)}, {facts['id']}, {facts['name']}, {facts['uuid']}"
        for rank, (host, facts) in enumerate(found)
    }


def in_memory(wanted: scenario.Scenario) -> tuple[Manifest, list[TrialRecord]]:
    """Measure a scenario without a run folder and without roofs."""
    points = prepare(wanted, lambda _: None)
    manifest = _manifest(wanted, points, environment.snapshot(points[0].device, wanted.threads), None)
    return manifest, list(_measure(plan(points), set()))


class _BudgetSpent(Exception):
    pass


def _measure(
    planned: list[tuple[Point, list[Trial]]],
    finished: set[tuple[str, int, int]],
    deadline: float | None = None,
    world: World | None = None,
    watch: sensors.Watch = sensors.OFF,
) -> Iterator[TrialRecord]:
    world = world or World()
    done = frozenset(finished)  # rank 0 goes on to add to it, and ranks must not differ in what is left
    before: engines.Shared | None = None
    try:
        for point, trials in planned:
            if before is not None and before is not point.shared:
                before.release()
            before = point.shared
            limit, replicas = point.scenario.parallel.timeout_seconds, point.scenario.parallel.data
            rounds = [trials[i : i + replicas] for i in range(0, len(trials), replicas)]  # as `plan` lays them out
            open_rounds = [side for side in rounds if any(trial.key not in done for trial in side)]
            if not open_rounds:
                continue
            world.follow(point.member)
            for cells, sides in _parts(point, open_rounds):
                with contextlib.ExitStack() as engines_of_part:
                    ready: dict[str, Engine | Exception] = {}
                    with world.measuring(limit * ranks.LOADING):
                        if point.member:
                            ready = engines_of_part.enter_context(_engines(point, cells))
                        world.told(None)
                    with world.measuring(limit):
                        for side in sides:
                            if world.told(deadline is not None and time.monotonic() > deadline):
                                raise _BudgetSpent
                            member = point.member
                            mine = next((t for t in side if member and t.group % replicas == member.replica), None)
                            record = measure(point, mine, ready[mine.cell.id], watch) if mine else None
                            yield from world.collected(record, member, point.device)
    finally:
        if before is not None:
            before.release()


def _parts(point: Point, rounds: Iterable[list[Trial]]) -> Iterator[tuple[tuple[CellRecord, ...], list[list[Trial]]]]:
    """Runs of rounds whose cells can alternate, with those cells."""
    here = [cell for cell in point.cells if not cell.absent]
    together = {cell.id: cells for cells in _together(here) for cell in cells}
    for cells, part in itertools.groupby(rounds, key=lambda side: together[side[0].cell.id]):
        yield cells, list(part)


@contextlib.contextmanager
def _engines(point: Point, cells: Sequence[CellRecord]) -> Iterator[dict[str, Engine | Exception]]:
    """Build and warm up the engines of these cells; one that fails is kept as its exception. Closes what holds more
    than memory, and lets go of the rest: engines hold their model."""
    ready: dict[str, Engine | Exception] = {}
    try:
        ready |= _ready(point, cells)
        yield ready
    finally:
        _close(ready)


def _close(ready: dict[str, Engine | Exception]) -> None:
    for engine in ready.values():
        getattr(engine, "close", lambda: None)()
    ready.clear()


def _ready(point: Point, cells: Sequence[CellRecord]) -> dict[str, Engine | Exception]:
    built = {cell.id: _warmed(point, cell) for cell in cells}
    automatic = {cell.id for cell in cells if cell.options.get("execution", "auto") == "auto"}
    refused = [e for at, e in built.items() if at in automatic and isinstance(e, ExecutionUnavailable)]
    if refused and point.shared.eagerly(str(refused[0])):  # all of them, so that they can be compared
        _close(built)
        built = {cell.id: _warmed(point, cell) for cell in cells}
    return built


def _warmed(point: Point, cell: CellRecord) -> Engine | Exception:
    at = point.scenario

    def warm() -> Engine:
        engine = engines.create(cell.engine, cell.options, point.shared)
        batch = len(point.batches[0])
        for start in range(0, len(point.warmup), batch):
            ids = point.warmup[start : start + batch]
            ids = ids + (ids[-1],) * (batch - len(ids))
            request = request_of(point, [0] * len(ids), min(at.warmup.output_tokens, at.output_tokens))
            engine.generate(ids, request, Meter(point.device, point.shared.team))
        point.launches[cell.id] = _launches(point, engine)
        return engine

    try:
        return point.shared.sparing(warm)
    except RankLost:
        raise
    except Exception as error:  # one engine that cannot run here must not end the others' run
        error.__context__ = error.__cause__ = None
        return error.with_traceback(None)  # whose frames have caches
    finally:
        point.prepared[cell.id] = point.shared.prepared()


def _launches(point: Point, engine: Engine) -> Launches:
    """Counted over a few steps on the first batch of prompts; nothing here is timed."""
    ids = [row for _, row in point.batches[0]]
    request = request_of(point, [0] * len(ids), min(launches.TOKENS, point.scenario.output_tokens))
    return launches.count(engine, ids, request, point.device, point.shared.team)


def measure(point: Point, trial: Trial, engine: Engine | Exception, watch: sensors.Watch = sensors.OFF) -> TrialRecord:
    """Run one trial. Whatever goes wrong in an engine becomes an error record."""
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    batch = point.batches[trial.group]
    begin = time.perf_counter()
    blank = TrialRecord(trial.cell.id, trial.group, trial.repeat, trial.order, "error", started, 0.0)
    try:
        if isinstance(engine, Exception):
            raise engine
        seeds = [_seed(point.scenario.seed, prompt.id, trial.repeat) for prompt, _ in batch]
        request = request_of(point, seeds, point.scenario.output_tokens)
        prepared = point.prepared.pop(trial.cell.id, ()) + point.shared.prepared()

        def decode() -> _Decoded:
            nonlocal begin
            meter = Meter(point.device, point.shared.team, point.launches.get(trial.cell.id, {}))
            point.device.reset_peak()
            with watch.window(trial.key):
                before = environment.others_seconds()
                begin = time.perf_counter()
                generated = engine.generate([ids for _, ids in batch], request, meter)
                wall = generated.wall_seconds or time.perf_counter() - begin
                return _Decoded(meter, generated, wall, _since(before, environment.others_seconds()))

        for _ in range(DECODES):
            decoded = point.shared.sparing(decode)
            if not (now := point.shared.prepared()):
                break
            prepared += now
        else:
            raise RuntimeError(f"something was compiled or captured in each of {DECODES} decodes, none can be timed")
        peak = point.device.peak_bytes()
        if peak is not None:
            peak -= point.shared.unused(begin)
        steps, forwards = decoded.meter.records()
        requests = _requests(point, engine, batch, request, decoded, steps)
        wrong = [r for r in requests if engine.exact and r.check and r.check.verdict == "different"]
        return replace(
            blank,
            status="error" if wrong else "ok",
            error=_not_lossless(wrong[0]) if wrong else None,
            wall_seconds=decoded.wall_seconds,
            requests=requests,
            steps=steps,
            forwards=forwards,
            peak_bytes=peak,
            kernels=engine.kernels,
            server=decoded.generated.server,
            prepared=prepared,
            others_seconds=None if _several_processes(point, trial) else decoded.others_seconds,
        )
    except RankLost:
        raise
    except Exception as error:  # out of memory, a kernel that fails: an error row, and the rest goes on
        message = next(iter(str(error).splitlines()), "") or "no message"
        if point.device.type == "cuda":
            torch.cuda.empty_cache()
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "  # such a sentence needs no name
        return replace(blank, wall_seconds=time.perf_counter() - begin, error=f"{kind}{message}")


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A batch decoded once, in `wall_seconds`, and the seconds of a core that other processes took meanwhile."""

    meter: Meter
    generated: Generated
    wall_seconds: float
    others_seconds: float | None


def _requests(
    point: Point, engine: Engine, batch: Batch, request: Request, decoded: _Decoded, steps: Sequence[StepRecord]
) -> tuple[RequestRecord, ...]:
    """What became of each prompt of a batch, checked and judged."""
    generated, ends = decoded.generated, decoded.meter.step_ends()
    sent = generated.prompts or [ids for _, ids in batch]
    found = []
    for row, ((prompt, _), ids, output, finish) in enumerate(
        zip(batch, sent, generated.outputs, generated.finish, strict=True)
    ):
        served = generated.served[row] if generated.served else None
        if served:
            first, end = served.chunk_seconds[0], served.chunk_seconds[-1]
        else:
            first, end = ends[0], ends[max(i for i, step in enumerate(steps) if step.committed[row])]
        text = point.shared.tokenizer.decode(output, skip_special_tokens=True)
        judged = _judge(point, prompt, text)
        record = RequestRecord(
            prompt_id=prompt.id,
            category=prompt.category,
            prompt_tokens=len(ids),
            output_ids=tuple(output),
            output_hash=hash_ids(output),
            text=text,
            finish=finish,
            ttft_seconds=first,
            end_seconds=end,
            seed=request.seeds[row],
            check=None if served and not served.as_emitted else _check(point, engine, ids, output, request, row),
            correct=accuracy.correct(text, prompt.reference),
            served=served,
            passed=judged.outcome == "passed" if judged and judged.outcome != "not judged" else None,
            verdict=f"{judged.outcome} {judged.why}".rstrip() if judged else None,
        )
        found.append(record)
    return tuple(found)


def _several_processes(point: Point, trial: Trial) -> bool:
    """Whether processes beside this one may work for the trial: a server's, or other ranks."""
    parallel = point.scenario.parallel
    return trial.cell.engine in PEERS - {"reference"} or parallel.tensor * parallel.data > 1


def _since(before: float | None, after: float | None) -> float | None:
    # Not cut at zero: the system counts in ticks, and of short trials half are off in either direction.
    return None if before is None or after is None else after - before


def _check(
    point: Point, engine: Engine, prompt: Sequence[int], output: list[int], request: Request, row: int
) -> LosslessCheck | None:
    skipped = engine.exact is None or (not engine.exact and not request.sampling.greedy)
    if skipped or not point.scenario.lossless_check:
        return None
    key = (tuple(prompt), tuple(output), request.seeds[row] if not request.sampling.greedy else 0)
    if key not in point.checked:  # a repeat of the same output needs no second forward
        point.checked[key] = point.shared.sparing(
            lambda: lossless.check(point.shared.reader, prompt, output, request, row)
        )
    return point.checked[key]


def _judge(point: Point, prompt: prompts.Prompt, answer: str) -> codejudge.Verdict | None:
    """What the tests of the prompt say of the code in an answer; None where it has none, or code may not be run."""
    asked = point.scenario.accuracy
    if prompt.problem is None or not asked.execute_generated_code:
        return None
    key = (prompt.id, answer)
    if key not in point.judged:  # a repeat of the same answer needs no second run
        limits = codejudge.Limits(asked.seconds, asked.memory_mb << 20)
        point.judged[key] = codejudge.judge(prompt.problem, answer, limits)
    return point.judged[key]


def _not_lossless(request: RequestRecord) -> str:
    check = request.check
    assert check is not None
    return (
        f"NotLossless: {request.prompt_id}: output token {check.first} is not what the target picks"
        f" ({check.mismatches} such tokens, off by up to {check.gap:.3g})"
    )


def hash_ids(ids: Sequence[int]) -> str:
    """sha256 over token ids as little-endian int64."""
    return hashlib.sha256(b"".join(token.to_bytes(8, "little", signed=True) for token in ids)).hexdigest()


def request_of(point: Point, seeds: Sequence[int], limit: int) -> Request:
    at = point.scenario
    sampling = Sampling(at.sampling.temperature, at.sampling.top_p, at.sampling.top_k)
    eos = frozenset() if at.ignore_eos else frozenset(point.shared.model.config.eos_ids)
    return Request(limit, sampling, tuple(seeds), eos)


def _seed(base: int, prompt_id: str, repeat: int) -> int:
    """The same request gets the same seed in every engine, whatever batch it falls into."""
    digest = hashlib.sha256(f"{base}/{prompt_id}/{repeat}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _headline(record: TrialRecord) -> str:
    if record.status == "error":
        return f"{record.cell} failed: {record.error}"
    tokens = sum(request.tokens for request in record.requests)
    return f"{record.cell} {tokens / record.wall_seconds:.1f} tokens/s"


def latest(out: Path, wanted: scenario.Scenario) -> Path:
    """The newest run folder of this scenario under `out`."""
    digest = scenario.content_hash(wanted)
    found, others = [], []
    for folder in (path.parent for path in out.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(UserError):  # another run's damaged folder is no obstacle
            manifest = read_manifest(folder)
            if manifest.scenario_hash == digest:
                found.append(folder)
            elif manifest.name == wanted.name:
                others.append(folder)

    def newest(folders: list[Path]) -> Path:
        return max(folders, key=lambda folder: (folder / MANIFEST).stat().st_mtime)

    if not found and others:
        raise UserError(
            f"nothing to resume: {newest(others)} is a run of {wanted.name}, but with other settings than these (-o"
            " counts too); give the same again, or start a new run"
        )
    if not found:
        raise UserError(f"nothing to resume: no run of scenario {wanted.name} in {out}")
    return newest(found)


def _begun(
    out: Path,
    wanted: scenario.Scenario,
    points: Sequence[Point],
    snapshot: dict[str, Any],
    say: Callable[[str], None],
) -> Path:
    """A new run folder with its manifest, roofs included."""
    folder = new_folder(out, wanted.name)
    dtypes = tuple(dict.fromkeys(point.scenario.dtype for point in points))
    try:
        measured = roofs.load_or_measure(points[0].device, dtypes, progress=say)
        write(folder / MANIFEST, _manifest(wanted, points, snapshot, measured).to_json())
    except BaseException:  # an interrupt too leaves no folder that nothing can be made of
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    return folder


def _finished(
    folder: Path, wanted: scenario.Scenario, points: Sequence[Point], snapshot: dict[str, Any]
) -> set[tuple[str, int, int]]:
    """Keys of the trials a run folder already holds. Raises UserError where resuming would mix two things."""
    manifest = read_manifest(folder)
    if manifest.scenario_hash != scenario.content_hash(wanted):
        raise UserError(f"{folder} was made from another scenario than this one; start a new run")
    if manifest.prompts_hash != _prompts_hash(points):
        raise UserError(f"{folder} was measured on other prompts than these; start a new run")
    if changed := environment.differences(manifest.environment, snapshot):
        raise UserError(f"{folder} was measured in another environment ({'; '.join(changed)}); start a new run")
    trials = [record for record in read_trials(folder)[0] if record.status == "ok"]
    if changed := _other_weights(manifest, trials, points):
        raise UserError(f"{folder} was measured with other weights of {', '.join(changed)}; start a new run")
    return {record.key for record in trials}


def _other_weights(manifest: Manifest, trials: Sequence[TrialRecord], points: Sequence[Point]) -> list[str]:
    """The models and drafters that are not those of a run any more: one may be trained again into the same folder."""
    here = {point.scenario.model_name: point.shared.model.weights_hash for point in points}
    changed = [name for name, found in here.items() if manifest.models.get(name, {}).get("hash") != found]
    kernels = {record.cell: record.kernels or {} for record in trials}
    for cell in (cell for point in points for cell in point.cells if cell.id in kernels and not cell.absent):
        kept = kernels[cell.id].get("drafter_weights") or kernels[cell.id].get("mask_adapter")
        if kept and engines.drafter_weights(cell.engine, cell.options) not in ("", kept):
            chosen = cell.options.get("drafter") or cell.options["adapter"]
            changed.append(next(chosen[key] for key in ("zoo", "path", "hub") if key in chosen))
    return list(dict.fromkeys(changed))


def _sampled_roof(
    planned: Iterable[tuple[Point, list[Trial]]],
    finished: set[tuple[str, int, int]],
    measured: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """The read roof to measure again; None where none is known, or no trial to come has forwards to hold against it:
    those of a server are not seen, wherever it is."""
    to_come = (trial for _, trials in planned for trial in trials if trial.key not in finished)
    if measured is None or all(trial.cell.engine == "endpoint" for trial in to_come):
        return None
    return measured["bandwidth"].get("read")


class _ReadRoof:
    """The read roof measured again between trials, as what memory gives drifts; does nothing where there is none."""

    def __init__(self, device: Device, roof: dict[str, Any] | None, path: Path) -> None:
        self._device, self._roof, self._path = device, roof, path
        self._due, self._behind = 0.0, False

    def sample(self) -> None:
        if self._roof is None:
            return
        sample = roofs.sample_read(self._device, self._roof)
        with _Log(self._path) as log:
            log.append(sample.to_json())
        self._due = time.monotonic() + max(SAMPLE_EVERY, sample.seconds / SAMPLE_SHARE)
        self._behind = False

    def sample_if_due(self) -> None:
        """After a trial."""
        self._behind = True
        if time.monotonic() >= self._due:
            self.sample()

    def sample_last(self) -> None:
        """After the last trial, unless that was just done."""
        if self._behind:
            self.sample()


class _Log:
    """Appends lines and makes sure that each is on the disk, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Log:
        try:
            self._file = self._path.open("ab+")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error
        self._end = self._whole()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, text: str) -> None:
        line = text.encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file = self._path.open("ab+")
                self._file.truncate(self._end)
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; what was finished is kept, continue with --resume"
            ) from error
        self._end += len(line)

    def _whole(self) -> int:
        """Cut a line torn by a crash; returns the length of the whole lines."""
        self._file.seek(0)
        data = self._file.read()
        end = data.rfind(b"\n") + 1
        self._file.truncate(end)
        return end


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        lock = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise UserError(f"another zbench is writing to {folder}") from error
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    with lock:
        yield


def _manifest(
    wanted: scenario.Scenario,
    points: Sequence[Point],
    snapshot: dict[str, Any],
    measured: dict[str, Any] | None,
) -> Manifest:
    spec = specs.of_device(points[0].device)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        zbench_version=zbench.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        name=wanted.name,
        description=wanted.description,
        command=snapshot["command"],
        scenario=wanted.model_dump(mode="json"),
        scenario_hash=scenario.content_hash(wanted),
        cells=tuple(cell for point in points for cell in point.cells),
        environment=snapshot,
        environment_hash=environment.identity_hash(snapshot),
        models={point.scenario.model_name: _model_facts(point) for point in points},
        prompts_hash=_prompts_hash(points),
        roofs=measured,
        specs=asdict(spec) if spec else None,
        planned=dict(Counter(trial.cell.id for _, trials in plan(points) for trial in trials)),
    )


def _prompts_hash(points: Sequence[Point]) -> str:
    ids = [[[row for _, row in batch] for batch in point.batches] for point in points]
    return hashlib.sha256(repr(ids).encode()).hexdigest()


def _model_facts(point: Point) -> dict[str, Any]:
    model = point.shared.model
    config, count = model.config, parameter_count(model.config)
    return {
        "parameters": count,
        "bytes": count * point.shared.dtype.itemsize,
        "layers": config.layers,
        "width": config.width,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "vocab": config.vocab,
        **({"experts": config.experts} if isinstance(config, ZayaConfig) else {}),
        "hash": model.weights_hash,
        "source": model.source,
    }
