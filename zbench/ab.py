"""Two environments, or two servers, under one scenario, in turns until the clock can tell: `zbench gate --ab`.

Each run is a process of its own, because what a process is dealt (memory layout, clocks, neighbours) moves all its
times together (Kalibera and Jones 2013, "Rigorous Benchmarking in Reasonable Time"): a pair of runs is one observation,
however many prompts it has. Runs are ordered A B B A, B A A B: a steady drift of the machine cancels (Bulej et al.
2020, "Duet Benchmarking", pair runs for the same reason).

Looking at growing data again and again until it pleases raises false alarms. So the looks are few and planned, and each
spends its part of the level (Lan and DeMets 1983): K looks at 1 - 5%/K each, so that by the union bound all of them
together keep 5%, however they are correlated. Intervals are valid at every look (repeated confidence intervals,
Jennison and Turnbull 1989). docs/gates.md has what simulation says of it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import httpx

import zbench
from zbench import gate
from zbench.cache import atomic_write, new_folder
from zbench.errors import UserError
from zbench.gate import CellSnapshot, Gate, Policy, Row, Sample, Snapshot, Value
from zbench.paths import expanded
from zbench.stats import CONFIDENCE

if TYPE_CHECKING:
    from zbench.scenario import Scenario

RECORD, LOG = "ab.json", "log.txt"
INTERRUPTED = "interrupted"
SCHEMA = 1
FIRST_LOOK = 6  # pairs: fewer than five make no interval, and A B B A takes them by two
REACH_SECONDS = 10.0  # for a server to answer at all
GRACE_SECONDS = 30.0  # for a run that is told to end, to write down what it has

Side = Literal["baseline", "candidate"]
SIDES: tuple[Side, Side] = ("baseline", "candidate")
_DECIDED = ("ok", "improved", "regressed")
_WORST = {"failed_trials": max, "peak_bytes": max, "lossless": min}  # of a side's runs: nothing a lucky one hides


# --- Environments, and a run in one ---


@dataclass(frozen=True, slots=True)
class Environment:
    """A Python with a zbench in it, a checkout that this Python runs, or a server that this very zbench asks."""

    name: str
    python: str
    checkout: Path | None = None
    url: str | None = None  # what the scenario's endpoint engines are pointed at

    def variables(self) -> dict[str, str]:
        """Nothing but the environment itself decides which zbench is imported."""
        found = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if self.checkout:
            rest = os.environ.get("PYTHONPATH")
            found["PYTHONPATH"] = os.pathsep.join([str(self.checkout), *([rest] if rest else [])])
        return found

    def command(self, *arguments: str) -> list[str]:
        return [self.python, "-P", *arguments]  # -P: a zbench in the working folder is nobody's environment


def environment(given: str) -> Environment:
    """A virtual environment, a Python, the folder of a checkout, or a server's address. Raises UserError where it is
    none of them."""
    if given.startswith(("http://", "https://")):
        return Environment(given, sys.executable, Path(zbench.__file__).parent.parent, given)
    path = expanded(given).absolute()
    if path.is_dir():
        pythons = (path / "bin" / "python", path / "Scripts" / "python.exe")
        if python := next((p for p in pythons if p.is_file()), None):
            return Environment(given, str(python))
        if (path / "zbench" / "__init__.py").is_file():
            return Environment(given, sys.executable, path)
        raise UserError(f"{given}: neither a virtual environment (bin/python) nor a checkout (zbench/__init__.py)")
    if found := shutil.which(str(path)) or shutil.which(given):
        return Environment(given, found)
    raise UserError(f"{given}: no such environment; give a virtual environment, its python, or a checkout's folder")


def describe(where: Environment) -> dict[str, str]:
    """Version and place of the zbench that the environment runs. Raises UserError where there is none."""
    code = "import json, sys, zbench; print(json.dumps([zbench.__version__, zbench.__file__, sys.version.split()[0]]))"
    try:
        done = subprocess.run(
            where.command("-c", code), capture_output=True, text=True, timeout=120, env=where.variables()
        )
        version, file, python = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{where.name}: {where.python} does not run ({error})") from None
    except (IndexError, ValueError):
        raise UserError(f"{where.name}: cannot import zbench there ({_last(done.stderr)})") from None
    package = Path(file).parent
    if where.checkout and package.parent.resolve() != where.checkout.resolve():
        raise UserError(f"{where.name}: {where.python} imports {package} instead; give a virtual environment")
    return {"given": where.name, "python": where.python, "version": version, "package": str(package), "with": python}


def _pointed(where: Environment, scenario: Path, wanted: Scenario) -> list[str]:
    """The override that points a scenario's endpoint engines at the server, if `where` is one.

    Raises UserError where the scenario has none, or where nothing answers.
    """
    if where.url is None:
        return []
    if not any(engine.name == "endpoint" for engine in wanted.engines):
        raise UserError(f"{scenario}: no engine is an endpoint, so there is nothing to point at {where.name}")
    try:
        httpx.get(where.url, timeout=REACH_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"{where.name}: no server answers there ({error})") from None
    engines = []
    for engine in wanted.engines:
        said = engine.model_dump(mode="json", exclude_unset=True)
        if engine.name == "endpoint":
            elsewhere = {"url": None, "server": None}
            label = engine.model_copy(update=elsewhere).title  # cells of both sides are the same ones
            said |= {**elsewhere, "label": label, "url": where.url}
        engines.append(said)
    return [f"engines={json.dumps(engines)}"]


def measure(where: Environment, scenario: Path, overrides: Sequence[str], out: Path) -> Path:
    """Run a scenario in a process of its own, into a run folder under `out`, with what it says in `out`/log.txt.

    Raises UserError where the run did not end as a run does; cells that failed are left to the gate. On Ctrl-C the run
    is told to end, and given time to write down what it has.
    """
    given = [part for override in overrides for part in ("-o", override)]
    command = where.command(
        "-m", "zbench.cli", "run", str(scenario), "--out", str(out), "--no-report", "--json", *given
    )
    log = out / LOG
    try:
        out.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as errors:
            # In a session of its own, so that a Ctrl-C reaches it once, through us.
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=where.variables(), start_new_session=True
            )
            try:
                said, _ = process.communicate()
            except BaseException:
                _end(process)
                raise
    except OSError as error:
        raise UserError(f"cannot run {where.python} into {out}: {error.strerror}") from error
    if process.returncode not in (0, 5):  # 5: some cells failed
        last = _last(log.read_text(encoding="utf-8", errors="replace")).removeprefix("zbench: ")
        raise UserError(f"{where.name}: the run ended with exit code {process.returncode} ({last}); all it said: {log}")
    try:
        return Path(json.loads(said.splitlines()[-1])["folder"])
    except (IndexError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{where.name}: nothing was measured: is the scenario about another device? See {log}"
        ) from None


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=GRACE_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def _last(said: str) -> str:
    return next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "it said nothing")


# --- Several runs of two sides, to verdicts ---


@dataclass(frozen=True, slots=True)
class Look:
    """The verdicts after some pairs. Only a planned look, or the last one, says anything about times."""

    pairs: int
    found: Gate
    candidate: Snapshot  # all its runs as one
    planned: bool

    @property
    def undecided(self) -> tuple[Row, ...]:
        """The times that more pairs may decide."""
        return tuple(r for r in self.found.rows if r.timed and r.required and r.verdict == "inconclusive")

    @property
    def decided(self) -> bool:
        return self.found.verdict in ("regressed", "not comparable") or not self.undecided


def looks(most: int) -> tuple[int, ...]:
    """Pairs at which the clock is looked at: 6, 8, 12, 16, 24, ... and `most`. Few, as every look costs power."""
    steps = (int(FIRST_LOOK * 2 ** (i // 2) * (4 / 3 if i % 2 else 1)) for i in range(2 * max(1, most).bit_length()))
    return (*(pairs for pairs in steps if pairs < most), most)


def _confidence(plan: Sequence[int]) -> float:
    """Of each look: the level is spent in equal parts."""
    return 1 - (1 - CONFIDENCE) / len(plan)


def order(pair: int) -> tuple[Side, Side]:
    """A B, B A, B A, A B, from pair 1 on: what drifts falls on both, and neighbours in time are not always the same."""
    return SIDES if pair % 4 < 2 else (SIDES[1], SIDES[0])


def decide(pairs: Iterable[tuple[Snapshot, Snapshot]], policy: Policy, most: int) -> Iterator[Look]:
    """Take (baseline, candidate) pairs until they decide, and yield each look at them.

    The first pair already decides where counts changed. A time that a planned look has decided stays decided, as its
    part of the level is spent. Where the pairs end before a planned look, what there is gets the level of that look.
    """
    plan = looks(most)
    confidence = _confidence(plan)
    before: list[Snapshot] = []
    now: list[Snapshot] = []
    decided: dict[tuple[str, str], Row] = {}
    seen = 0
    for baseline, candidate in pairs:
        before.append(baseline)
        now.append(candidate)
        if len(now) == 1 or len(now) in plan:
            seen = len(now)
            found = _standing(judge(now, before, policy, confidence), decided)
            look = Look(seen, found, merged(now), seen in plan)
            if look.planned:
                decided = {(r.cell, r.metric): r for r in found.rows if r.timed and r.verdict in _DECIDED}
            yield look
            if look.decided:
                return
    if now and seen != len(now):
        found = _standing(judge(now, before, policy, confidence), decided)
        yield Look(len(now), found, merged(now), planned=True)


def _standing(found: Gate, decided: Mapping[tuple[str, str], Row]) -> Gate:
    """With the times that were decided before, unless their trials can no longer be compared."""
    rows = (row if row.verdict == "not comparable" else decided.get((row.cell, row.metric), row) for row in found.rows)
    return replace(found, rows=tuple(rows))


def judge(candidate: Sequence[Snapshot], baseline: Sequence[Snapshot], policy: Policy, confidence: float) -> Gate:
    """The gate's verdicts on runs made in pairs, times at `confidence` over pairs; p is as if looked at once."""
    # One file was run by both: that two versions of zbench number it otherwise says nothing.
    now, before = (replace(merged(runs), scenario="the same") for runs in (candidate, baseline))
    found = gate.judge(now, before, policy, confidence, "pairs of runs")
    shaky = _shaky(candidate, policy) | _shaky(baseline, policy)
    share = (1 - CONFIDENCE) / (1 - confidence)
    rows = []
    for row in found.rows:
        if (row.cell, row.metric, row.part) in shaky:
            note = "runs of one environment differ in it, so it is not exact"
            row = replace(row, verdict="inconclusive", note=note)
        if row.p is not None:
            row = replace(row, p=min(1.0, row.p * share))
        rows.append(row)
    return replace(found, rows=tuple(rows))


def merged(runs: Sequence[Snapshot]) -> Snapshot:
    """Runs of one environment as one: counts of the first, times of all, paired and clustered by the run's place."""
    cells = {}
    for name in dict.fromkeys(name for run in runs for name in run.cells):
        numbered = [(number, run.cells[name]) for number, run in enumerate(runs) if name in run.cells]
        cells[name] = _merged_cell(numbered)
    definitions = {metric: digest for run in reversed(runs) for metric, digest in run.definitions.items()}
    return replace(runs[0], cells=cells, definitions=definitions)


def _merged_cell(numbered: Sequence[tuple[int, CellSnapshot]]) -> CellSnapshot:
    cells = [cell for _, cell in numbered]
    exact: dict[str, dict[str, Value]] = {}
    for cell in cells:
        for metric, parts in cell.exact.items():
            if metric in _WORST:
                known = exact.setdefault(metric, {})
                exact[metric] = {part: _worse(metric, value, known.get(part)) for part, value in parts.items()}
            else:
                exact.setdefault(metric, parts)
    timed = {}
    for metric in dict.fromkeys(metric for cell in cells for metric in cell.timed):
        samples = [(number, cell.timed[metric]) for number, cell in numbered if metric in cell.timed]
        timed[metric] = Sample(
            value=math.exp(math.fsum(math.log(sample.value) for _, sample in samples) / len(samples)),
            keys=tuple(f"{number}/{key}" for number, sample in samples for key in sample.keys),
            clusters=tuple(number for number, sample in samples for _ in sample.keys),
            seconds=tuple(seconds for _, sample in samples for seconds in sample.seconds),
        )
    trials = " ".join(dict.fromkeys(cell.trials for cell in cells))
    return CellSnapshot(trials, all(cell.stable for cell in cells), exact, timed)


def _worse(metric: str, one: Value, other: Value) -> Value:
    return _WORST[metric](one, other) if isinstance(one, float) and isinstance(other, float) else one


def _shaky(runs: Sequence[Snapshot], policy: Policy) -> set[tuple[str, str, str]]:
    """Counts in which runs of one environment differ by more than is none."""
    found = set()
    for first, other in pairwise(runs):
        for name in first.cells.keys() & other.cells.keys():
            one, two = first.cells[name], other.cells[name]
            if one.trials != two.trials:  # other trials give other counts; that is said already
                continue
            for metric in (one.exact.keys() & two.exact.keys()).difference(_WORST):
                here, there = one.exact[metric], two.exact[metric]
                for part in here.keys() | there.keys():
                    if not _same(here.get(part), there.get(part), policy.tolerance(metric)):
                        found.add((name, metric, part))
    return found


def _same(one: Value, other: Value, tolerance: float) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance * max(abs(one), abs(other))
    return one == other


# --- From two environments to a verdict ---


@dataclass(frozen=True, slots=True)
class Compared:
    folder: Path
    found: Gate
    candidate: Snapshot
    interrupted: bool


@dataclass(slots=True)
class _Record:
    """`ab.json`: rewritten after each run, so that nothing is lost with the process."""

    folder: Path
    about: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = "running"

    def write(self, verdict: Mapping[str, Any] | None = None) -> None:
        content = {"kind": "zbench ab", "schema_version": SCHEMA, **self.about, "runs": self.runs}
        content |= {"stopped": self.stopped, "verdict": verdict}
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        try:
            atomic_write(self.folder / RECORD, text)
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}; runs that ended are kept") from error


def compare(
    environments: Sequence[str],
    scenario: Path,
    overrides: Sequence[str],
    out: Path,
    policy: Policy,
    most: int,
    minutes: float | None,
    strict: bool,
    console: Any,
) -> Compared:
    """Run `scenario` in (baseline, candidate) until the gate decides, at most `most` pairs or about `minutes`.

    Raises UserError: bad input, or a run that broke; NotComparable: a run folder of another schema. Runs that ended
    stay in the folder.
    """
    from zbench import progress
    from zbench import scenario as scenarios

    where = dict(zip(SIDES, map(environment, environments), strict=True))
    wanted = scenarios.load(scenario, overrides)
    given = {side: (*overrides, *_pointed(where[side], scenario, wanted)) for side in SIDES}
    for side in SIDES:
        scenarios.load(scenario, given[side])
    about: dict[str, Any] = {side: describe(where[side]) for side in SIDES}
    plan = looks(most)
    about |= {"scenario": str(scenario), "overrides": list(overrides), "looks": plan}
    about |= {"confidence_per_look": _confidence(plan)}
    say = partial(progress.say, console)
    for side in SIDES:
        served = f"{where[side].url}, asked by " if where[side].url else ""
        say(
            f"{side}: {served}zbench {about[side]['version']} of {about[side]['package']}, Python {about[side]['with']}"
        )
    record = _Record(new_folder(out, f"{wanted.name}-ab"), about)
    record.write()

    def run(side: Side, pair: int) -> Snapshot:
        began = time.monotonic()
        folder = measure(where[side], scenario, given[side], record.folder / f"pair-{pair:02d}" / side)
        seconds = time.monotonic() - began
        record.runs.append(
            {"pair": pair, "side": side, "folder": str(folder.relative_to(record.folder)), "seconds": round(seconds, 3)}
        )
        record.write()
        return gate.read(folder, policy)

    look = None
    try:
        pairs = _measured(run, most, minutes, record, console)
        for look in decide(pairs, policy, most):
            if not look.decided and look.pairs < most and record.stopped == "running":
                say(_still(look, plan))
    except (UserError, gate.NotComparable) as error:
        record.stopped = "a run broke"
        record.write()
        raise type(error)(f"{error}; what was measured is in {record.folder}") from None
    if look is None:
        record.write()
        say(f"no pair of runs has ended yet; what was measured is in {record.folder}")
        raise KeyboardInterrupt
    if record.stopped == "running":
        record.stopped = "decided" if look.decided else "all pairs were run"
    names = {side: f"{side} {where[side].name}" for side in SIDES}
    found = replace(
        look.found, candidate=names["candidate"], baseline=names["baseline"],
        notes=(*look.found.notes, *_notes(look, plan, record)),
    )  # fmt: skip
    record.write(found.to_dict(strict))
    return Compared(record.folder, found, look.candidate, record.stopped == INTERRUPTED)


def _measured(
    run: Callable[[Side, int], Snapshot], most: int, minutes: float | None, record: _Record, console: Any
) -> Iterator[tuple[Snapshot, Snapshot]]:
    """Pairs of runs, in turns, until `most`, the budget or Ctrl-C ends them. Pair 0 warms up and is not yielded: what a
    first run compiles, fetches and caches is no time of the code."""
    from zbench.progress import track

    began = time.monotonic()
    with track(2 * most + 2, 0, console) as advance:
        for pair in range(most + 1):
            spent = time.monotonic() - began
            if minutes is not None and pair > 1 and spent + spent / pair > 60 * minutes:
                record.stopped = f"the budget of {minutes:g} minutes is spent"
                return
            taken = {}
            try:
                for side in order(pair):
                    taken[side] = run(side, pair)
                    advance(f"{f'pair {pair} of at most {most}' if pair else 'warm-up'}, {side}")
            except KeyboardInterrupt:
                record.stopped = INTERRUPTED
                return
            if pair:
                yield taken["baseline"], taken["candidate"]


def _still(look: Look, plan: Sequence[int]) -> str:
    then = next(pairs for pairs in plan if pairs > look.pairs)
    times = sum(row.timed and row.required for row in look.found.rows)
    if not look.planned:
        return f"counts of the first pair agree; the clock is looked at after {then} pairs"
    open_rows = ", ".join(f"{row.cell} {row.metric}" for row in look.undecided[:3])
    more = f" and {len(look.undecided) - 3} more" if len(look.undecided) > 3 else ""
    return f"after {look.pairs} pairs {len(look.undecided)} of {times} times are open ({open_rows}{more}); on to {then}"


def _notes(look: Look, plan: Sequence[int], record: _Record) -> Iterator[str]:
    pairs = f"{look.pairs} pair{'s' if look.pairs != 1 else ''} of runs in turns"
    if len(plan) > 1 and any(row.timed for row in look.found.rows):
        level = _confidence(plan)
        pairs += f"; intervals are {level:.1%} each, so that {len(plan)} planned looks together keep {CONFIDENCE:.0%}"
    yield f"{pairs}; stopped: {record.stopped}; all runs are in {record.folder}"
    if look.undecided and look.found.verdict == "inconclusive":
        yield "more pairs (--max-pairs), more prompts or a wider tolerance would decide what is inconclusive"
