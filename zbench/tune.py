"""Which setting of each engine is fastest here: runs over ever fewer settings, then one on prompts that chose nothing.

Successive halving (Karnin et al. 2013; Jamieson and Talwalkar 2016): a round measures every setting that is left, drops
the slower two thirds, and the next one measures the others on more prompts. Options are searched one group after
another, since what a draft should look like does not depend much on whether the text is asked first.

The fastest of many settings looks faster than it is, as noise helped to choose it. So half of the prompts choose, and
the last run, which every figure given is of, decodes the other half: the settings found, those of the scenario and
plain decoding. Every round is a run folder like any other.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from rich.console import Console

import zbench
from zbench import engines, metrics, prompts, ranks, scenario
from zbench import run as runner
from zbench.cache import atomic_write, new_folder
from zbench.errors import UserError
from zbench.hardware import projection
from zbench.metrics import Cell
from zbench.prompts import Prompt
from zbench.records import TUNE, TUNE_VERSION
from zbench.scenario import EngineSpec, PromptSpec, Scenario
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
class Tuning:
    folder: Path
    device: str
    choosing: int  # prompts
    rounds: tuple[Round, ...]
    last: Round  # on prompts that chose nothing
    found: tuple[Found, ...]

    def to_json(self) -> str:
        facts = {"schema_version": TUNE_VERSION, "zbench_version": zbench.__version__}
        paths = {"folder": str(self.folder), "tuned": str(self.folder / TUNED)}
        return json.dumps(facts | asdict(self) | paths, indent=1, allow_nan=False)


def tune(
    wanted: Scenario,
    out: Path,
    console: Console,
    count: int,
    resume: Path | None = None,
    allow_pickle: bool = False,
) -> Tuning:
    """Search the settings of a scenario's engines on `count` of its prompts, into a folder under `out`.

    Raises UserError for what cannot be tuned, and KeyboardInterrupt with the words for it: what was measured is kept.
    """
    at = _point(wanted)
    searched = groups(at.engines)
    if not searched:
        raise UserError(f"no engine of {wanted.name} has settings to choose from; {', '.join(SPACES)} have")
    if why := wanted.hardware and projection.elsewhere(wanted):
        raise UserError(f"{why}; tuning measures")
    if ranks.launched():
        raise UserError("zbench tune runs in one process: leave torchrun out")
    choosing, confirming = halves(prompts.load(_limited(at.prompts, count)), at.batch)
    config = runner.prepare(at, lambda line: None, allow_pickle)[0].shared.model.config
    folder = _opened(wanted, out, count, resume)

    def fits(engine: EngineSpec) -> bool:
        try:
            engines.check(engine.name, engine.options, config, allow_pickle)
        except UserError:
            return False
        return True

    def measured(name: str, chosen: Sequence[EngineSpec], asked: Sequence[Prompt], **keys: Any) -> metrics.Run:
        run = _scenario(at, name, chosen, _written(folder / f"{name}.jsonl", asked), keys)
        console.print(f"{name}: {len(chosen)} settings on {len(asked)} prompts", markup=False, highlight=False)
        try:
            outcome = runner.run(run, folder, console, _begun(folder, run), allow_pickle)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"continue with --resume {folder}") from None
        if outcome.stopped:
            raise KeyboardInterrupt(f"{outcome.stopped}; continue with --resume {folder}")
        return metrics.load_run(outcome.folder)

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
        asked = choosing[: _asked(index, total, len(choosing), at.batch)]
        if not race:
            continue
        run = measured(f"round-{index + 1}", [e for group in race for e in left[group.title]], asked, repeats=1)
        tried = list[Tried]()
        for group in race:
            ranked = _ranked(group, left[group.title], run)
            keep = 1 if index == total - 1 else max(2, math.ceil(len(ranked) / 3))
            good = [engine for engine, result in ranked if not result.error][:keep]
            left[group.title] = tuple(good) or left[group.title][:1]
            tried += [replace(result, kept=engine in good) for engine, result in ranked]
        rounds.append(Round(run.path.name, len(asked), tuple(tried)))
    chosen = {group.title: left[group.title][0] for group in searched}
    run = measured("tuned", [e for group in searched for e in _last(group, chosen[group.title])], confirming)
    cells = {cell.record.label: cell for cell in run.cells}
    found = tuple(_found(group, chosen[group.title], len(seen[group.title]), cells) for group in searched)
    last = tuple(one for each in found for one in (each.chosen, each.given) if one)
    device = run.manifest.environment["device"]["name"]
    tuning = Tuning(folder, device, len(choosing), tuple(rounds), Round(run.path.name, len(confirming), last), found)
    atomic_write(folder / TUNE, tuning.to_json())
    atomic_write(folder / TUNED, _tuned(wanted, searched, tuning))
    return tuning


def groups(chosen: Iterable[EngineSpec]) -> tuple[Group, ...]:
    """The engines that have settings, those together that differ in them alone."""
    found: dict[str, list[EngineSpec]] = {}
    for engine in chosen:
        if engine.name in SPACES:
            fixed = {key: value for key, value in engine.options.items() if key not in _keys(engine)}
            found.setdefault(json.dumps([engine.name, fixed], sort_keys=True), []).append(engine)
    titles = [_common(members) for members in found.values()]
    return tuple(
        Group(title if titles.count(title) == 1 else f"{title} {titles[: index + 1].count(title)}", tuple(members))
        for index, (title, members) in enumerate(zip(titles, found.values(), strict=True))
    )


def halves(chosen: Sequence[Prompt], batch: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Prompts to choose settings by, and others to measure what was chosen; whole batches, and of every category half.

    Raises UserError where there are too few.
    """
    categories = list(dict.fromkeys(prompt.category for prompt in chosen))
    seen, parts = Counter[int](), (list[Prompt](), list[Prompt]())
    for prompt in chosen:
        place = categories.index(prompt.category)
        parts[(place + seen[place]) % 2].append(prompt)
        seen[place] += 1
    one, other = (tuple(part[: len(part) // batch * batch]) for part in parts)
    if min(len(one), len(other)) < FEWEST // 2 * batch:
        raise UserError(
            f"{len(chosen)} prompts in batches of {batch} are too few to choose settings by one half and measure them"
            f" on the other: at least {FEWEST * batch} are needed (--prompts, or another set)"
        )
    return one, other


def newest(out: Path, wanted: Scenario) -> Path:
    """The newest tuning of this scenario under `out`. Raises UserError where there is none."""
    found = [path.parent for path in out.glob(f"{wanted.name}-tune-*/{_REQUEST}")]
    if not found:
        raise UserError(f"nothing to resume: no tuning of {wanted.name} in {out}")
    return max(found, key=lambda folder: (folder / _REQUEST).stat().st_mtime)


def _point(wanted: Scenario) -> Scenario:
    found = scenario.points(wanted)
    if len(found) > 1:
        raise UserError(
            f"{wanted.name} has a matrix of {len(found)} points, and each may have other settings that are best: tune"
            " them one by one, with -o 'matrix={}' and the point's own -o KEY=VALUE"
        )
    return found[0][0]


def _limited(spec: PromptSpec, count: int) -> PromptSpec:
    return spec.model_copy(update={"limit": count})


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
    plain = next((engine for engine in at.engines if engine.name == PLAIN), scenario.ENGINES[PLAIN](name=PLAIN))
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


def _opened(wanted: Scenario, out: Path, count: int, resume: Path | None) -> Path:
    """The folder of a new tuning, or of the one to go on with."""
    asked = {"schema": TUNE_VERSION, "scenario": scenario.content_hash(wanted), "prompts": count}
    if resume is None:
        folder = new_folder(out, f"{wanted.name}-tune")
        atomic_write(folder / _REQUEST, json.dumps(asked))
        return folder
    try:
        before = json.loads((resume / _REQUEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{resume} is no tuning that could be resumed") from None
    if before != asked:
        raise UserError(f"{resume} tunes another scenario, or the same with other options; start a new one")
    return resume


def _begun(folder: Path, run: Scenario) -> Path | None:
    """The run of this round, where it was begun."""
    try:
        return runner.latest(folder, run)
    except UserError:
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
    return Tried(group.title, _setting(engine), _options(engine), speedup, tokens, error=error)


def _last(group: Group, chosen: EngineSpec) -> Iterator[EngineSpec]:
    """What the last run compares of a group: what was found, and the scenario's own setting, where it has one."""
    yield _relabelled(chosen, group.title)
    if _given(group, chosen):
        yield _relabelled(group.given[0], _as_given(group))


def _as_given(group: Group) -> str:
    return f"{group.title} as given"


def _given(group: Group, chosen: EngineSpec) -> bool:
    """Whether a group has one setting in the scenario, and it is another one."""
    return len(group.given) == 1 and _options(group.given[0]) != _options(chosen)


def _found(group: Group, chosen: EngineSpec, settings: int, cells: dict[str, Cell]) -> Found:
    cell = cells[group.title]
    mine = replace(_tried(group, chosen, cell), kept=True)
    if not _given(group, chosen):
        return Found(mine, settings, None, None)
    own = cells[_as_given(group)]
    over = metrics.evaluate(metrics.METRICS["speedup"], replace(cell, baseline=own))[""]
    return Found(mine, settings, _tried(group, group.given[0], own), over)


def _tuned(wanted: Scenario, searched: Sequence[Group], tuning: Tuning) -> str:
    """The scenario with what was found in place of what was searched, as YAML."""
    found = {one.chosen.engine: one.chosen for one in tuning.found}
    of = {engine.title: group for group in searched for engine in group.given}
    chosen: dict[str, Options] = {}
    for engine in wanted.engines:
        group = of.get(engine.title)
        plain = engine.model_dump(mode="json", exclude_unset=True)
        if group and not found[group.title].error:
            options, fields = found[group.title].options, type(engine).model_fields
            plain = {key: value for key, value in plain.items() if key not in options} | {"label": group.title}
            plain |= {key: value for key, value in options.items() if value != fields[key].default}
        chosen.setdefault(group.title if group else engine.title, plain)
    data = wanted.model_dump(mode="json", exclude_unset=True) | {"engines": list(chosen.values())}
    if data.get("baseline") in of:
        data["baseline"] = of[data["baseline"]].title
    said = (
        f"# The settings that zbench tune found on {datetime.now():%Y-%m-%d} on {tuning.device}; {TUNE} has them all.\n"
    )
    return said + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
