"""How often the gate's verdicts on times are wrong, by simulation. Prints the two tables of docs/gates.md:

python -m benchmarks.gate_statistics
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from zbench import ab, gate, selftest, stats

SIMULATIONS = 1000
BOOTSTRAPS = 300  # each with RESAMPLES resamples
RESAMPLES = 999
SLOWDOWN = 0.05  # the truth that the intervals are to cover
METRIC = selftest.TIMES[0]
PAIRS = 24  # of `--ab`, at most
PROCESSES: dict[str, selftest.Noise] = {
    "normal": selftest.normal,
    "log-normal": selftest.lognormal,
    "bimodal": selftest.bimodal,
    "autocorrelated": selftest.autocorrelated,
    "drifting": selftest.drifting,
}


def main() -> None:
    print("| noise | prompts | t interval | bootstrap | false alarms, no tolerance | false alarms, 5% | power |")
    print("|---|---|---|---|---|---|---|")
    for name, noise in selftest.NOISES.items():
        for prompts in (6, 12, 30):
            shares = " | ".join(f"{share:.1%}" for share in row(noise, prompts))
            print(f"| {name} | {prompts} | {shares} |", flush=True)
    print()
    print(
        "| noise of a process | false alarms, no tolerance | nothing changed: ok | 5% slower: ok | 12% slower: seen |"
    )
    print("|---|---|---|---|---|")
    for name, noise in PROCESSES.items():
        print(f"| {name} | {' | '.join(in_turns(noise))} |", flush=True)


def in_turns(noise: selftest.Noise) -> Iterator[str]:
    """Verdicts of `--ab` on three times, each of one process per run."""
    rng = np.random.default_rng(24)

    def last(slowdown: float, tolerance: float) -> list[ab.Look]:
        policy = selftest.policy(tolerance)
        return [
            list(ab.decide(selftest.in_turns(rng, noise, slowdown, PAIRS), policy, PAIRS))[-1]
            for _ in range(SIMULATIONS)
        ]

    same = last(0.0, 0.0)
    yield f"{np.mean([bool(look.found.of('regressed') or look.found.of('improved')) for look in same]):.1%}"
    same = last(0.0, 0.05)
    pairs = np.quantile([look.pairs for look in same], [0.5, 0.9])
    yield f"{np.mean([look.found.verdict == 'ok' for look in same]):.1%}, {pairs[0]:.0f} ({pairs[1]:.0f})"
    at_it = last(0.05, 0.05)
    yield f"{np.mean([row.verdict == 'ok' for look in at_it for row in look.found.rows]):.1%}"
    worse = last(0.12, 0.05)
    pairs = np.quantile([look.pairs for look in worse], [0.5, 0.9])
    yield f"{np.mean([look.found.verdict == 'regressed' for look in worse]):.1%}, {pairs[0]:.0f} ({pairs[1]:.0f})"


def row(noise: selftest.Noise, prompts: int) -> Iterator[float]:
    rng = np.random.default_rng(prompts)
    yield float(np.mean([covers_t(rng, noise, prompts) for _ in range(SIMULATIONS)]))
    yield float(np.mean([covers_bootstrap(rng, noise, prompts) for _ in range(BOOTSTRAPS)]))
    for tolerance in (0.0, 0.05):
        yield float(np.mean([alarms(rng, noise, prompts, tolerance) for _ in range(SIMULATIONS)]))
    yield float(np.mean([sees(rng, noise, prompts) for _ in range(SIMULATIONS)]))


def pair(rng: np.random.Generator, noise: selftest.Noise, prompts: int) -> tuple[gate.Sample, gate.Sample]:
    before, now = (selftest.simulated(rng, noise, slowdown, prompts) for slowdown in (0.0, SLOWDOWN))
    return before.cells["cell"].timed[METRIC], now.cells["cell"].timed[METRIC]


def covers_t(rng: np.random.Generator, noise: selftest.Noise, prompts: int) -> bool:
    before, now = pair(rng, noise, prompts)
    low, high = stats.shift(before.seconds, now.seconds, now.clusters).interval()
    return low <= SLOWDOWN <= high


def covers_bootstrap(rng: np.random.Generator, noise: selftest.Noise, prompts: int) -> bool:
    before, now = pair(rng, noise, prompts)
    stats.RESAMPLES = RESAMPLES
    estimate = stats.paired_ratio(now.seconds, before.seconds, now.clusters)
    assert estimate.low is not None and estimate.high is not None
    return estimate.low <= 1 + SLOWDOWN <= estimate.high


def alarms(rng: np.random.Generator, noise: selftest.Noise, prompts: int, tolerance: float) -> bool:
    """Whether any of three times is called regressed or improved, where nothing changed."""
    before, now = (selftest.simulated(rng, noise, prompts=prompts) for _ in range(2))
    judged = gate.judge(now, before, selftest.policy(tolerance))
    return bool(judged.of("regressed") or judged.of("improved"))


def sees(rng: np.random.Generator, noise: selftest.Noise, prompts: int) -> bool:
    """Whether a slowdown of the size that the gate said it sees is called a regression."""
    before, again = (selftest.simulated(rng, noise, prompts=prompts) for _ in range(2))
    size = gate.judge(again, before, selftest.policy(0.05)).rows[0].detects
    worse = selftest.simulated(rng, noise, size or 0.0, prompts)
    return gate.judge(worse, before, selftest.policy(0.05)).rows[0].verdict == "regressed"


if __name__ == "__main__":
    main()
