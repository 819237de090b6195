"""Which setting of each engine is fastest here: runs over ever fewer settings, then one on prompts that chose nothing.

Successive halving (Karnin et al. 2013; Jamieson and Talwalkar 2016): a round measures every setting that is left, drops
the slower two thirds, and the next one measures the others on more prompts. Options are searched one group after
another, since what a draft should look like does not depend much on whether the text is asked first.

The fastest of many settings looks faster than it is, as noise helped to choose it. So half of the prompts choose, and
the last run, which every figure given is of, decodes the other half: the settings found, those of the scenario and
plain decoding. Every round is a run folder like any other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

import zbench
from zbench import checks, engines, metrics, prompts, ranks, scenario
from zbench import run as runner
from zbench.cache import atomic_write, new_folder
from zbench.engines import plans
from zbench.errors import UserError
from zbench.metrics import Cell
from zbench.models.families import AnyConfig
from zbench.paths import NEWEST
from zbench.progress import say
from zbench.prompts import Prompt
from zbench.records import MANIFEST, TUNE, TUNE_VERSION, read_manifest
from zbench.scenario import EngineSpec, Scenario
from zbench.stats import Estimate

TUNED, _REQUEST = "tuned.yaml", "request.json"
PLAIN = "autoregressive"  # what every setting is compared with
FEWEST = 4  # batches of prompts in all: no half of fewer than two can say anything
_FIRST = 4  # batches of a round, at the least, where the half that chooses has as many

Options = dict[str, Any]

# Per engine, groups of options that are searched one after another: each round tries every entry of the next group on
# what the last one left. Entries that an engine or its drafter refuses are left out.
SPACES: dict[str, tuple[tuple[Options, ...], ...]] = {
    "eagle3": (
        (
            *({"depth": d, "top_k": 1, "beam": None, "tokens": None, "confidence": 0.0} for d in (1, 2, 3, 4, 6)),
            *({"depth": d, "top_k": 1, "beam": None, "tokens": None, "confidence": 0.4} for d in (4, 6, 8)),
            *(
                {"depth": d, "top_k": k, "beam": 1, "tokens": tokens, "confidence": 0.25}
                for d, k, tokens in ((3, 3, 4), (5, 5, 5), (6, 8, 8), (6, 8, 12))
            ),
            *(
                {"depth": d, "top_k": k, "beam": None, "tokens": tokens, "confidence": 0.0}
                for d, k, tokens in ((3, 4, 8), (4, 4, 16), (6, 8, 32), (7, 8, 60))
            ),
        ),
        ({"confidence": 0.0}, {"confidence": 0.25}, {"confidence": 0.4}),
        ({"lookup": None}, {"lookup": 3}),
    ),
    "dflash": (
        (
            *({"block": block, "tokens": None} for block in (3, 4, 5, 6, 8, 12, 16)),
            *(
                {"block": block, "tokens": tokens}
                for block, tokens in ((3, 3), (4, 5), (5, 6), (8, 7), (8, 16), (16, 16), (16, 32), (16, 60))
            ),
        ),
        ({"draft_vocab": None}, {"draft_vocab": 8192}, {"draft_vocab": 32768}),
        ({"lookup": None}, {"lookup": 3}),
    ),
    "diffusion": (
        (
            *(
                {"block_size": block, "proposals": proposals, "tokens": None}
                for block, proposals in (
                    (2, "all"), (3, 2), (4, 2), (4, "all"), (8, 2), (8, 3), (8, "all"), (16, 3), (16, 5), (16, "all"),
                )
            ),
            *(
                {"block_size": block, "proposals": proposals, "tokens": tokens}
                for block, tokens, proposals in (
                    (3, 2, 1), (3, 3, 1), (4, 3, 1), (4, 4, 2), (8, 7, 1), (8, 7, 3), (8, 16, 5), (16, 15, 5),
                )
            ),
        ),
        ({"lookup": None}, {"lookup": 3}),
    ),
    "prompt_lookup": (
        tuple({"match": match, "tokens": tokens} for match in (1, 2, 3) for tokens in (4, 8, 16)),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    """Engines of a scenario that differ in options of `SPACES` alone."""

    title: str
    given: tuple[EngineSpec, ...]  # one, whose options are searched; or several, which are the settings to choose from

    @property
    def searched(self) -> tuple[tuple[Options, ...], ...]:
        return SPACES[self.given[0].name] if len(self.given) == 1 else ()


@dataclass(frozen=True, slots=True)
class Tried:
    """One setting in one round."""

    engine: str  # the group's title
    setting: str
    options: Options  # those of `SPACES`
    speedup: Estimate  # over plain decoding
    tokens_per_forward: Estimate
    caveats: tuple[str, ...]  # what its acceptance is not, see `metrics.caveats`
    kept: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Round:
    folder: str  # of the run, within the tuning's
    prompts: int
    tried: tuple[Tried, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What became of one group, by the last run, on prompts that chose nothing."""

    chosen: Tried
    settings: int  # tried in all
    given: Tried | None  # the scenario's own setting; None where it had several, or it is the one found
    over_given: Estimate | None  # how many times as fast as that


@dataclass(frozen=True, slots=True)
class Point:
    """What was found at one point of the matrix. Paths are within the tuning's folder."""

    at: Options  # the axes and their values; empty where there is no matrix
    tuned: str  # the scenario of this point with what was found
    choosing: int  # prompts
    rounds: tuple[Round, ...]
    last: Round  # on prompts that chose nothing
    found: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class Tuning:
    folder: Path
    device: str
    points: tuple[Point, ...]

    def to_json(self) -> str:
        facts = {"schema_version": TUNE_VERSION, "zbench_version": zbench.__version__}
        return json.dumps(facts | asdict(self) | {"folder": str(self.folder)}, indent=1, allow_nan=False)


@dataclass(frozen=True, slots=True)
class _Bench:
    """What measures at one point: `folder` / `place` gets its runs."""

    at: Scenario  # plain decoding and the engines that are searched, nothing else
    folder: Path
    place: str
    console: Console
    allow_pickle: bool

    def run(
        self, name: str, said: str, chosen: Sequence[EngineSpec], asked: Sequence[Prompt], **keys: Any
    ) -> metrics.Run:
        """Plain decoding and these settings, or what is left to measure of them."""
        within = self.folder / self.place
        run = _scenario(self.at, name, chosen, _written(within / f"{name}.jsonl", asked), keys)
        where = f"{self.place}: " if self.place else ""
        say(self.console, f"{where}{said}: {len(chosen)} settings on {len(asked)} prompts")
        # One that was begun is gone on with, or refused where it does not fit: never silently measured again.
        begun = runner.latest(within, run) if any(within.glob(f"{run.name}-*/{MANIFEST}")) else None
        outcome = runner.run(run, within, self.console, begun, self.allow_pickle)
        if outcome.stopped:
            raise KeyboardInterrupt("" if outcome.interrupted else f"{outcome.stopped}; ")
        return metrics.load_run(outcome.folder)

    def ended(self, run: metrics.Run, asked: Sequence[Prompt], tried: Sequence[Tried]) -> Round:
        return Round(str(run.path.relative_to(self.folder)), len(asked), tuple(tried))


def tune(
    wanted: Scenario,
    out: Path,
    console: Console,
    count: int,
    resume: Path | None = None,
    allow_pickle: bool = False,
) -> Tuning:
    """Search the settings of a scenario's engines at each point of its matrix, on `count` of its prompts, into a folder
    under `out`, or in the one at `resume` (NEWEST: the last of this scenario and count) what it lacks.

    Raises UserError for what cannot be tuned, and KeyboardInterrupt with the words for it: what was measured is kept.
    """
    searched = groups(wanted.engines)
    if not searched:
        raise UserError(f"no engine of {wanted.name} has settings to choose from; {', '.join(SPACES)} have")
    if why := checks.elsewhere(wanted):
        raise UserError(f"{why}; tuning measures")
    whole = [at for at, _ in scenario.points(wanted)]
    if ranks.launched() or any(at.parallel.ranks > 1 for at in whole):
        raise UserError("zbench tune runs in one process: leave torchrun and parallel out")
    plain = _plain(wanted)
    asked = wanted.model_copy(
        update={
            "engines": (plain, *(engine for group in searched for engine in group.given)),
            "baseline": plain.title,
            "prompts": wanted.prompts.model_copy(update={"limit": count}),
        }
    )
    places = [(at, cells[0]) for at, cells in scenario.points(asked)]
    parts = [halves(prompts.load(at.prompts), at.batch) for at, _ in places]
    prepared = runner.prepare(asked, lambda line: say(console, line), allow_pickle)  # refuses what no round could run
    configs = [point.shared.model.config for point in prepared]
    del prepared
    request = {
        "schema": TUNE_VERSION,
        "scenario": scenario.content_hash(wanted),
        "prompts": count,
        "chosen": hashlib.sha256(repr(parts).encode()).hexdigest(),
    }
    folder = _opened(out, wanted.name, request, resume)
    points = list[Point]()
    try:
        for at, (bare, cell), (choosing, confirming), config in zip(whole, places, parts, configs, strict=True):
            bench = _Bench(bare, folder, cell.id.partition("/")[2], console, allow_pickle)
            points.append(_point(bench, at, searched, cell.point, choosing, confirming, config))
        device = read_manifest(folder / points[-1].last.folder).environment["device"]["name"]
        tuning = Tuning(folder, device, tuple(points))
        atomic_write(folder / TUNE, tuning.to_json())
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(f"{stopped}continue with --resume {folder}") from None
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; continue with --resume {folder}") from error
    return tuning


def _point(
    bench: _Bench,
    whole: Scenario,
    searched: Sequence[Group],
    at: Options,
    choosing: Sequence[Prompt],
    confirming: Sequence[Prompt],
    config: AnyConfig,
) -> Point:
    searched = [replace(group, given=tuple(_explicit(e, config) for e in group.given)) for group in searched]

    def fits(engine: EngineSpec) -> bool:
        try:
            engines.check(engine.name, engine.options, config, bench.allow_pickle)
        except UserError:
            return False
        return True

    chosen, tried, rounds = _search(bench, searched, choosing, fits)
    run = bench.run(
        "tuned",
        "the last run, on other prompts",
        [e for group in searched for e in _last(group, chosen[group.title])],
        confirming,
    )
    cells = {cell.record.label: cell for cell in run.cells}
    found = tuple(_found(group, chosen[group.title], tried[group.title], cells) for group in searched)
    last = tuple(one for each in found for one in (each.chosen, each.given) if one)
    tuned = Path(bench.place) / TUNED
    atomic_write(bench.folder / tuned, _tuned(whole, searched, found, run.manifest.environment["device"]["name"]))
    return Point(at, str(tuned), len(choosing), tuple(rounds), bench.ended(run, confirming, last), found)


def _search(
    bench: _Bench, searched: Sequence[Group], choosing: Sequence[Prompt], fits: Callable[[EngineSpec], bool]
) -> tuple[dict[str, EngineSpec], dict[str, int], list[Round]]:
    """Of each group the setting that is left, and how many were tried; and the rounds."""
    left = {group.title: tuple(_named(group, engine) for engine in group.given) for group in searched}
    seen: dict[str, set[str]] = {title: set() for title in left}
    rounds = list[Round]()
    total = max(len(group.searched) or _halvings(len(group.given)) for group in searched)
    for index in range(total):
        for group in searched:
            changes = group.searched[index] if index < len(group.searched) else ()
            left[group.title] = _varied(group, left[group.title], changes, fits)
            seen[group.title] |= {engine.title for engine in left[group.title]}
        race = [group for group in searched if len(left[group.title]) > 1]
        asked = choosing[: _asked(index, total, len(choosing), bench.at.batch)]
        if not race:
            continue
        name, said = f"round-{index + 1}", f"round {index + 1} of {total}"
        run = bench.run(name, said, [e for group in race for e in left[group.title]], asked, repeats=1)
        results = list[Tried]()
        for group in race:
            ranked = _ranked(group, left[group.title], run)
            keep = 1 if index == total - 1 else max(2, math.ceil(len(ranked) / 3))
            good = [engine for engine, result in ranked if not result.error][:keep]
            left[group.title] = tuple(good) or left[group.title][:1]
            results += [replace(result, kept=engine in good) for engine, result in ranked]
        rounds.append(bench.ended(run, asked, results))
    return (
        {title: settings[0] for title, settings in left.items()},
        {title: len(settings) for title, settings in seen.items()},
        rounds,
    )


def groups(chosen: Sequence[EngineSpec]) -> tuple[Group, ...]:
    """The lossless engines that have settings, those together that differ in settings alone."""
    found: dict[str, list[EngineSpec]] = {}
    for engine in chosen:
        if engine.name in SPACES and engine.options.get("sampler", "lossless") == "lossless":
            fixed = {key: value for key, value in engine.options.items() if key not in _keys(engine)}
            found.setdefault(json.dumps([engine.name, fixed], sort_keys=True), []).append(engine)
    named = list[Group]()
    for members in found.values():
        others = [engine.title for engine in chosen if engine not in members] + [PLAIN]
        taken = {scenario.slug(title) for group in named for title in (group.title, _as_given(group.title))}
        taken |= {scenario.slug(title) for title in others}
        words = _common(members)
        titles = (words if n == 1 else f"{words} {n}" for n in itertools.count(1))
        free = next(t for t in titles if taken.isdisjoint({scenario.slug(t), scenario.slug(_as_given(t))}))
        named.append(Group(free, tuple(members)))
    return tuple(named)


def halves(chosen: Sequence[Prompt], batch: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Prompts to choose settings by, and others to measure what was chosen: half of every category, in whole batches,
    each category's first before any second one. Of prompts that say the same only the first counts.

    Raises UserError where there are too few.
    """
    by_category: dict[str, list[Prompt]] = {}
    for prompt in {prompt.text: prompt for prompt in reversed(chosen)}.values():
        by_category.setdefault(prompt.category, []).insert(0, prompt)
    parts: tuple[list[tuple[int, Prompt]], list[tuple[int, Prompt]]] = ([], [])
    for members in by_category.values():
        for place, prompt in enumerate(members):
            odd = place == len(members) - 1 and place % 2 == 0
            part = min(parts, key=len) if odd else parts[place % 2]
            part.append((place // 2, prompt))
    one, other = ([prompt for _, prompt in sorted(part, key=lambda entry: entry[0])] for part in parts)
    one, other = (part[: len(part) // batch * batch] for part in (one, other))
    if min(len(one), len(other)) < FEWEST // 2 * batch:
        raise UserError(
            f"{len(chosen)} prompts in batches of {batch} are too few to choose settings by one half and measure them"
            f" on the other: at least {FEWEST * batch} different ones are needed (--prompts, or another set)"
        )
    return tuple(one), tuple(other)


def _plain(wanted: Scenario) -> EngineSpec:
    """Plain decoding as the scenario has it, or as usual."""
    own = [engine for engine in wanted.engines if engine.name == PLAIN]
    return next((e for e in own if e.title == wanted.baseline_label), (*own, scenario.ENGINES[PLAIN](name=PLAIN))[0])


def _explicit(engine: EngineSpec, config: AnyConfig) -> EngineSpec:
    """With the number in place of a null that stands for it, so that no setting is tried under two names."""
    options, known = engine.options, dict[str, int]()
    try:
        if engine.name == "dflash" and options["block"] is None:
            known["block"] = plans.dflash_drafter(options["drafter"], config).block
        if engine.name == "eagle3" and options["tokens"] is None and options["top_k"] > 1:
            vocab = plans.eagle3_drafter(options["drafter"], config).draft_vocab
            asked = (options["depth"], options["top_k"], None, vocab, options["beam"])
            known["tokens"] = plans.eagle3_tokens(*asked)
    except UserError:  # a drafter of the hub
        return engine
    return _relabelled(engine, engine.title, known) if known else engine


def _keys(engine: EngineSpec) -> tuple[str, ...]:
    """The options that are searched, those first that come first."""
    return tuple(dict.fromkeys(key for entries in SPACES[engine.name] for entry in entries for key in entry))


def _options(engine: EngineSpec) -> Options:
    return {key: engine.options[key] for key in _keys(engine)}


def _setting(engine: EngineSpec) -> str:
    """In words: the first option, and every other that is not as usual."""
    fields = type(engine).model_fields
    words = [
        f"its own {key}" if value is None else f"{key} {value}"
        for place, (key, value) in enumerate(_options(engine).items())
        if place == 0 or value != fields[key].default
    ]
    return ", ".join(words)


def _common(members: Sequence[EngineSpec]) -> str:
    """What a group is called: its engine's label, the words that all labels begin with, or the engine's name."""
    if len(members) == 1:
        return members[0].label or members[0].name
    heads = {engine.label.split(", ")[0] if engine.label else engine.name for engine in members}
    return heads.pop() if len(heads) == 1 else members[0].name


def _relabelled(engine: EngineSpec, label: str, changes: Options | None = None) -> EngineSpec:
    """Raises ValidationError for options that do not go together."""
    plain = engine.model_dump(exclude_unset=True) | (changes or {}) | {"label": label}
    return type(engine).model_validate(plain)


def _named(group: Group, engine: EngineSpec) -> EngineSpec:
    return _relabelled(engine, f"{group.title}: {_setting(engine)}")


def _varied(
    group: Group, settings: Sequence[EngineSpec], changes: Sequence[Options], fits: Callable[[EngineSpec], bool]
) -> tuple[EngineSpec, ...]:
    """These settings, and each with each of the changes, where that is another one and can be."""
    found = {engine.title: engine for engine in settings}
    for engine, change in itertools.product(settings, changes):
        try:
            varied = _named(group, _relabelled(engine, "varied", change))
        except ValidationError:
            continue
        if varied.title not in found and fits(varied):
            found[varied.title] = varied
    return tuple(found.values())


def _halvings(settings: int) -> int:
    """Rounds until one of so many is left."""
    rounds = 1
    while settings > 3:
        settings, rounds = max(2, math.ceil(settings / 3)), rounds + 1
    return rounds


def _asked(index: int, total: int, prompts: int, batch: int) -> int:
    """Prompts of a round: all in the last, half as many in each one before, but no fewer than _FIRST batches."""
    batches = prompts // batch
    return batch * min(batches, max(_FIRST, math.ceil(batches / 2 ** (total - 1 - index))))


def _scenario(at: Scenario, name: str, chosen: Sequence[EngineSpec], file: Path, keys: Options) -> Scenario:
    plain = at.engines[0]
    data = at.model_dump(exclude_unset=True) | {
        "name": f"{at.name[:60]}-{name}",
        "description": f"{at.name}: settings to choose from" if keys else f"{at.name}, tuned",
        "engines": [engine.model_dump(exclude_unset=True) for engine in (plain, *chosen)],
        "baseline": plain.title,
        "prompts": {"file": str(file)},
        **keys,
    }
    data.pop("accuracy", None)  # the prompts in the file have no tests
    return Scenario.model_validate(data)


def _written(file: Path, chosen: Sequence[Prompt]) -> Path:
    def line(prompt: Prompt) -> str:
        kept = {"id": prompt.id, "category": prompt.category, "turns": prompt.turns, "reference": prompt.reference}
        return json.dumps({key: value for key, value in kept.items() if value is not None}, ensure_ascii=False)

    if not file.exists():
        atomic_write(file, "".join(f"{line(prompt)}\n" for prompt in chosen))
    return file


def _opened(out: Path, name: str, request: Options, resume: Path | None) -> Path:
    """The folder of a new tuning, or of the one to go on with; absolute, as the runs within name files of theirs."""
    if resume is None:
        folder = new_folder(out, f"{name}-tune").resolve()
        try:
            atomic_write(folder / _REQUEST, json.dumps(request))
        except OSError as error:
            folder.rmdir()
            raise UserError(f"cannot write {folder}: {error.strerror}; choose another folder with --out") from error
        return folder
    if resume == NEWEST:
        found = [path.parent for path in out.glob(f"{name}-tune-*/{_REQUEST}") if _asked_for(path.parent) == request]
        if not found:
            raise UserError(f"nothing to resume: no tuning of {name} with these options and prompts in {out}")
        return max(found, key=lambda folder: (folder / _REQUEST).stat().st_mtime).resolve()
    before = _asked_for(resume)
    if before is None:
        raise UserError(f"{resume} is no tuning that could be resumed")
    if before != request:
        raise UserError(f"{resume} tunes another scenario, or has other options or prompts; start a new one")
    return resume.resolve()


def _asked_for(folder: Path) -> Any:
    try:
        return json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _ranked(group: Group, settings: Sequence[EngineSpec], run: metrics.Run) -> list[tuple[EngineSpec, Tried]]:
    """Fastest first, those that failed last."""
    cells = {cell.record.label: cell for cell in run.cells}
    results = [(engine, _tried(group, engine, cells[engine.title])) for engine in settings]
    return sorted(results, key=lambda one: (bool(one[1].error), -float(one[1].speedup.value or 0)))


def _tried(group: Group, engine: EngineSpec, cell: Cell) -> Tried:
    speedup, tokens = (metrics.evaluate(metrics.METRICS[name], cell)[""] for name in ("speedup", "tokens_per_forward"))
    error = "" if isinstance(speedup.value, float) else speedup.note
    if cell.failed:
        error = cell.failed[0].error or "failed"
    caveats = metrics.caveats(cell.record)
    return Tried(group.title, _setting(engine), _options(engine), speedup, tokens, caveats, error=error)


def _last(group: Group, chosen: EngineSpec) -> Iterator[EngineSpec]:
    """What the last run compares of a group: what was found, and the scenario's own setting, where it has one."""
    yield _relabelled(chosen, group.title)
    if _given(group, chosen):
        yield _relabelled(group.given[0], _as_given(group.title))


def _as_given(title: str) -> str:
    return f"{title} as given"


def _given(group: Group, chosen: EngineSpec) -> bool:
    """Whether a group has one setting in the scenario, and it is another one."""
    return len(group.given) == 1 and _options(group.given[0]) != _options(chosen)


def _found(group: Group, chosen: EngineSpec, settings: int, cells: dict[str, Cell]) -> Found:
    cell = cells[group.title]
    mine = replace(_tried(group, chosen, cell), kept=True)
    if not _given(group, chosen):
        return Found(mine, settings, None, None)
    own = cells[_as_given(group.title)]
    over = metrics.evaluate(metrics.METRICS["speedup"], replace(cell, baseline=own))[""]
    theirs = _tried(group, group.given[0], own)
    if over.high is not None and over.high < 1 and not theirs.error:  # the rounds were wrong
        return Found(replace(theirs, kept=True), settings, None, None)
    return Found(mine, settings, theirs, over)


def _tuned(at: Scenario, searched: Sequence[Group], results: Sequence[Found], device: str) -> str:
    """The scenario with what was found in place of what was searched, as YAML."""
    kept = list[EngineSpec]()
    found = {one.chosen.engine: one.chosen for one in results if not one.chosen.error}
    of = {engine.title: group for group in searched for engine in group.given if group.title in found}
    for engine in at.engines:
        group = of.get(engine.title)
        if group is None:
            kept.append(engine)
        elif engine.title == group.given[0].title:
            options, fields = found[group.title].options, type(engine).model_fields
            plain = {key: value for key, value in engine.model_dump(exclude_unset=True).items() if key not in options}
            unusual = {key: value for key, value in options.items() if value != fields[key].default}
            kept.append(type(engine).model_validate(plain | unusual | {"label": group.title}))
    update: dict[str, Any] = {"engines": tuple(kept)}
    if at.baseline in of:
        update["baseline"] = of[at.baseline].title
    said = f"# The settings that zbench tune found on {datetime.now():%Y-%m-%d} on {device}; {TUNE} has them all.\n"
    return said + scenario.to_yaml(at.model_copy(update=update))
