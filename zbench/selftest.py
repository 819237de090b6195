"""Does the gate do what it says? Runs that differ in nothing must pass, the smallest change for the worse must fail.

Simulated runs tell how often the verdict on times is wrong, where the noise is known. A real run of a tiny random model
tells whether counts repeat on this machine, and how far apart its clock puts two runs that differ in nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from zbench import ab, gate
from zbench.metrics import Run, load_run
from zbench.records import MANIFEST, TRIALS, LosslessCheck, Manifest, TrialRecord
from zbench.stats import CONFIDENCE

SIMULATIONS = 200
PROMPTS, REPEATS = 12, 2
REPETITIONS, SAME = 6, 40  # real and simulated, that must pass
SLOWDOWN = 3  # of the sleep that must fail, in units of the minimal detectable effect
PAIRS = 16  # of `--ab`
POWER = 0.8  # with which the gate promises to see a slowdown
CHANCE = 0.01  # below this probability a count is not what was promised
NOISE = 0.03  # standard deviation of the log of one simulated time

Noise = Callable[[np.random.Generator, int, int], NDArray[np.float64]]  # (prompts, repeats) -> log-times
TIMES = ("decode_tps", "throughput", "ttft")


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    passed: bool
    found: str


def checks() -> Iterator[Check]:
    """Each as soon as it is done. Needs torch, for the last of them."""
    yield from _simulated()
    with tempfile.TemporaryDirectory(prefix="zbench-self-test-") as folder:
        yield from _real(Path(folder))


# --- Simulated times ---


def normal(rng: np.random.Generator, prompts: int, repeats: int) -> NDArray[np.float64]:
    return np.log1p(rng.normal(0, NOISE, (prompts, repeats)))


def lognormal(rng: np.random.Generator, prompts: int, repeats: int) -> NDArray[np.float64]:
    """Skewed: a long tail of slow trials."""
    tail = rng.lognormal(0, 1, (prompts, repeats))
    return NOISE * (tail - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)


def bimodal(rng: np.random.Generator, prompts: int, repeats: int) -> NDArray[np.float64]:
    """One trial in five falls into a slower mode, as when a clock drops or a neighbour wakes."""
    return rng.normal(0, NOISE / 3, (prompts, repeats)) + 2.5 * NOISE * (rng.random((prompts, repeats)) < 0.2)


def autocorrelated(rng: np.random.Generator, prompts: int, repeats: int) -> NDArray[np.float64]:
    """A machine that is slow for a while: AR(1) with 0.5 from each trial to the next, all prompts, then again."""
    steps = rng.normal(0, NOISE * np.sqrt(1 - 0.5**2), prompts * repeats)
    logs = np.empty_like(steps)
    logs[0] = rng.normal(0, NOISE)
    for i in range(1, len(steps)):
        logs[i] = 0.5 * logs[i - 1] + steps[i]
    return logs.reshape(repeats, prompts).T


def another_day(rng: np.random.Generator, prompts: int, repeats: int) -> NDArray[np.float64]:
    """Each run as a whole is off by 2% either way, which no repetition within the run can show."""
    return normal(rng, prompts, repeats) + rng.normal(0, 0.02)


NOISES: dict[str, Noise] = {
    "normal": normal,
    "log-normal": lognormal,
    "bimodal": bimodal,
    "autocorrelated": autocorrelated,
    "another day": another_day,
}


def simulated(rng: np.random.Generator, noise: Noise, slowdown: float = 0.0, prompts: int = PROMPTS) -> gate.Snapshot:
    """A run of one cell with three independent times per trial; prompts differ by up to a factor of two."""
    keys = tuple(f"p{i}/{r}" for i in range(prompts) for r in range(REPEATS))
    clusters = tuple(i for i in range(prompts) for _ in range(REPEATS))
    base = np.linspace(0, np.log(2), prompts)[:, None] + np.log1p(slowdown)
    timed = {}
    for metric in TIMES:
        seconds = np.exp(base + noise(rng, prompts, REPEATS)).ravel().tolist()
        timed[metric] = gate.Sample(len(seconds) / sum(seconds), keys, clusters, tuple(seconds))
    cell = gate.CellSnapshot("", True, {}, timed)
    return gate.Snapshot("simulated", "", "", "", "", {}, dict.fromkeys(TIMES, ""), {"device.name": ""}, {"cell": cell})


def drifting(rng: np.random.Generator, prompts: int, repeats: int) -> NDArray[np.float64]:
    """A machine that warms up: each trial is 1% slower than the one before."""
    return normal(rng, prompts, repeats) + 0.01 * np.arange(repeats)


def in_turns(
    rng: np.random.Generator, noise: Noise, slowdown: float, pairs: int
) -> Iterator[tuple[gate.Snapshot, gate.Snapshot]]:
    """Pairs of simulated runs, (baseline, candidate), whose processes differ by `noise` in the order they are made."""
    logs = np.array([noise(rng, 1, 2 * pairs)[0] for _ in TIMES]).reshape(len(TIMES), pairs, 2)
    for pair in range(pairs):
        made = dict(zip(ab.order(pair + 1), logs[:, pair].T, strict=True))
        before, now = made["baseline"], made["candidate"]
        yield _one_time_each(before), _one_time_each(now + np.log1p(slowdown))


def _one_time_each(logs: NDArray[np.float64]) -> gate.Snapshot:
    timed = {
        metric: gate.Sample(1 / s, ("p/0",), (0,), (s,)) for metric, s in zip(TIMES, np.exp(logs).tolist(), strict=True)
    }
    cell = gate.CellSnapshot("", True, {}, timed)
    return gate.Snapshot("simulated", "", "", "", "", {}, dict.fromkeys(TIMES, ""), {"device.name": ""}, {"cell": cell})


def policy(tolerance: float) -> gate.Policy:
    return gate.Policy(device="same", metrics={m: gate.Rule(tolerance=tolerance, required=True) for m in TIMES})


def _simulated() -> Iterator[Check]:
    rng = np.random.default_rng(8)
    alarms = sum(
        bool(judged.of("regressed") or judged.of("improved"))
        for judged in (
            gate.judge(simulated(rng, normal), simulated(rng, normal), policy(0.0)) for _ in range(SIMULATIONS)
        )
    )
    # Without a tolerance the level is met exactly: more alarms than it allows would be a gate that lies.
    level = 1 - CONFIDENCE
    kept, tested = _promised(alarms, level, "greater")
    said = f"{alarms} of {SIMULATIONS} gave a false alarm among {len(TIMES)} times at no tolerance: {tested}"
    yield Check("simulated runs that differ in nothing", kept, said)

    passed = sum(
        gate.judge(simulated(rng, normal), simulated(rng, normal)).exit_code() == gate.OK for _ in range(SIMULATIONS)
    )
    share = passed / SIMULATIONS
    yield Check("the same at the default tolerances", share >= CONFIDENCE, f"{share:.1%} passed")

    found = 0
    for _ in range(SIMULATIONS):
        before = simulated(rng, normal)
        pilot = gate.judge(simulated(rng, normal), before, policy(0.05)).rows[0]
        worse = simulated(rng, normal, slowdown=pilot.detects or 0.0)
        found += "regressed" in {
            r.verdict for r in gate.judge(worse, before, policy(0.05)).rows if r.metric == TIMES[0]
        }
    kept, tested = _promised(found, POWER, "less")
    said = f"{found} of {SIMULATIONS} failed: {tested}"
    yield Check("a slowdown of the size that the gate says it sees", kept, said)

    alarms = 0
    for _ in range(SIMULATIONS):
        *_, last = ab.decide(in_turns(rng, normal, 0.0, PAIRS), policy(0.0), PAIRS)
        alarms += bool(last.found.of("regressed") or last.found.of("improved"))
    kept, tested = _promised(alarms, level, "greater")
    said = f"{alarms} of {SIMULATIONS} gave a false alarm at any of {len(ab.looks(PAIRS))} looks: {tested}"
    yield Check("simulated runs in turns that differ in nothing", kept, said)


def _promised(count: int, share: float, worse: str) -> tuple[bool, str]:
    """Whether so many of the simulations can be chance if the gate keeps its promise, and what was tested, in words."""
    p = float(binomtest(count, SIMULATIONS, share, alternative=worse).pvalue)
    verdict = "consistent with" if p > CHANCE else f"{'more' if worse == 'greater' else 'fewer'} than chance makes of"
    return p > CHANCE, f"{verdict} the {share:.0%} promised (binomial p = {p:.2g})"


# --- A real run ---

_SCENARIO: dict[str, Any] = {
    "name": "self_test",
    "model": {
        "config": {
            "family": "llama", "layers": 1, "width": 32, "ffn": 64, "heads": 2, "kv_heads": 1, "vocab": 260,
            "max_positions": 128, "tied": False,
        },
    },
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "engines": [
        "autoregressive", {"name": "eagle3", "drafter": {"random": True}, "depth": 2, "top_k": 8, "tokens": 16},
    ],
    "prompts": {"set": "quickstart", "limit": 6},
    "context": 24,
    "output_tokens": 24,
    "ignore_eos": True,
    "repeats": REPETITIONS * 2,
}  # fmt: skip


def _real(folder: Path) -> Iterator[Check]:
    """Odd repeats against even ones: the trials of the two alternate, so a drift of the machine falls on both."""
    from zbench import run, scenario

    manifest, trials = run.in_memory(scenario.Scenario.model_validate(_SCENARIO))
    failed = [t for t in trials if t.status != "ok"]
    yield Check("a real run", not failed, f"{len(trials)} trials, {len(failed)} failed")
    if failed:
        return
    halves = [_run(folder / name, manifest, trials, parity) for name, parity in (("even", 0), ("odd", 1))]
    before, now = (gate.snapshot(half) for half in halves)
    yield _same_as_itself(folder, manifest, trials)
    same = gate.judge(now, before)
    counts = [row for row in same.rows if not row.timed and row.metric != "peak_bytes"]
    moved = [f"{row.cell} {row.metric} {row.part}" for row in counts if row.verdict != "ok"]
    yield Check("counts of the two halves of it", not moved, ", ".join(moved) or f"{len(counts)} equal")
    times = [row for row in same.rows if row.timed]
    widest = max(abs(row.change or 0.0) for row in times)
    yield Check(
        "times of the two halves of it", not any(row.verdict == "regressed" for row in times),
        f"up to {widest:.1%} apart; sees what is {max(r.detects or 0 for r in times):.0%} slower",
    )  # fmt: skip
    for name, (change, metric) in CHANGES.items():
        worse = gate.snapshot(_worse(halves[1], folder / "worse", change))
        hit = [row for row in gate.judge(worse, before).rows if row.verdict == "regressed" and row.metric == metric]
        yield Check(name, bool(hit), f"{metric} regressed" if hit else f"{metric} did not notice")
    row = next(r for r in same.rows if r.metric == "decode_tps")
    slowdown = SLOWDOWN * (row.detects or 0)
    awake = before.cells[row.cell].timed["decode_tps"].seconds
    with _sleeping(slowdown * sum(awake) / len(awake)):
        manifest, trials = run.in_memory(scenario.Scenario.model_validate(_SCENARIO | {"repeats": REPETITIONS}))
    slow = gate.snapshot(_written(folder / "slow", manifest, trials))
    hit = [r for r in gate.judge(replace(slow, scenario=before.scenario), before).rows if r.verdict == "regressed"]
    yield Check(
        f"a sleep of {slowdown:.0%} in every forward", (row.cell, "decode_tps") in {(r.cell, r.metric) for r in hit},
        f"{SLOWDOWN} times the {row.detects or 0:.0%} that it says it sees; {len(hit)} metrics regressed",
    )  # fmt: skip


def _same_as_itself(folder: Path, manifest: Manifest, trials: list[TrialRecord]) -> Check:
    """Each repetition against the next, and as many simulated ones as say something of a share."""
    pairs = [
        tuple(gate.snapshot(_one(folder / f"{number}", manifest, trials, number)) for number in (first, first + 1))
        for first in range(0, 2 * REPETITIONS, 2)
    ]
    rng = np.random.default_rng(40)
    pairs += [(simulated(rng, normal), simulated(rng, normal)) for _ in range(SAME)]
    passed = [gate.judge(now, before).exit_code() == gate.OK for before, now in pairs]
    real, made_up = sum(passed[:REPETITIONS]), sum(passed[REPETITIONS:])
    said = f"{real} of {REPETITIONS} real and {made_up} of {SAME} simulated repetitions passed"
    return Check("repetitions that differ in nothing", sum(passed) >= CONFIDENCE * len(passed), said)


@contextmanager
def _sleeping(seconds: float) -> Iterator[None]:
    """Within it every forward of our own engines waits so long before it begins."""
    from zbench.engines.base import Meter

    forward = Meter.forward

    def later(self: Meter, *given: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return forward(self, *given, **named)

    Meter.forward = later  # type: ignore[method-assign]
    try:
        yield
    finally:
        Meter.forward = forward  # type: ignore[method-assign]


def one_token_less(trial: TrialRecord) -> TrialRecord:
    """The first step that accepted a draft loses it, and the last step of the output takes one token more."""
    index = next(i for i, step in enumerate(trial.steps) if any(step.accepted))
    steps = list(trial.steps)
    steps[index] = replace(
        steps[index], accepted=tuple(a - (a > 0) for a in steps[index].accepted),
        committed=tuple(c - (a > 0) for c, a in zip(steps[index].committed, steps[index].accepted, strict=True)),
    )  # fmt: skip
    last = len(steps) - 1
    extra = replace(steps[last], committed=(1,), accepted=(0,))
    forwards = [f for f in trial.forwards if f.step == last]
    return replace(
        trial, steps=(*steps, extra), forwards=(*trial.forwards, *(replace(f, step=last + 1) for f in forwards))
    )


def one_forward_more(trial: TrialRecord) -> TrialRecord:
    return replace(trial, forwards=(*trial.forwards, next(f for f in trial.forwards if f.step == 1)))


def one_token_flipped(trial: TrialRecord) -> TrialRecord:
    request = trial.requests[0]
    return replace(trial, requests=(replace(request, output_hash="0" * len(request.output_hash)), *trial.requests[1:]))


def one_repeat_flipped(trial: TrialRecord) -> TrialRecord:
    return one_token_flipped(trial) if trial.repeat == 1 else trial


def one_repeat_wrong(trial: TrialRecord) -> TrialRecord:
    """A token of that repeat alone is another one, and not the target's."""
    flipped = one_repeat_flipped(trial)
    if flipped is trial:
        return trial
    wrong = replace(flipped.requests[0], check=LosslessCheck("different", 1, 0, 1.0))
    return replace(flipped, requests=(wrong, *flipped.requests[1:]))


CHANGES: dict[str, tuple[Callable[[TrialRecord], TrialRecord], str]] = {
    "one token less accepted": (one_token_less, "acceptance_length"),
    "one forward more": (one_forward_more, "forwards_per_sequence"),
    "one token flipped": (one_token_flipped, "output_hash"),
    "one token flipped in one repeat": (one_repeat_flipped, "output_hash"),
    "one token in one repeat that is not the target's": (one_repeat_wrong, "lossless"),
}


def _run(folder: Path, manifest: Manifest, trials: list[TrialRecord], parity: int) -> Run:
    mine = [replace(t, repeat=t.repeat // 2) for t in trials if t.repeat % 2 == parity]
    return _written(folder, manifest, mine)


def _one(folder: Path, manifest: Manifest, trials: list[TrialRecord], repeat: int) -> Run:
    return _written(folder, manifest, [replace(t, repeat=0) for t in trials if t.repeat == repeat])


def _worse(run: Run, folder: Path, change: Callable[[TrialRecord], TrialRecord]) -> Run:
    """The run with every repeat of one prompt of the drafting engine changed."""
    cell = run.manifest.cells[-1].id
    group = next(t.group for t in run.trials if t.cell == cell and any(any(step.accepted) for step in t.steps))
    trials = [change(t) if (t.cell, t.group) == (cell, group) else t for t in run.trials]
    return _written(folder, run.manifest, trials)


def _written(folder: Path, manifest: Manifest, trials: list[TrialRecord]) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    (folder / TRIALS).write_text("".join(t.to_json() + "\n" for t in trials), encoding="utf-8")
    return load_run(folder)
