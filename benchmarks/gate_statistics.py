"""How often the gate's verdicts on times are wrong, by simulation. Prints the table of docs/gates.md:

python -m benchmarks.gate_statistics
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from zbench import gate, selftest, stats

SIMULATIONS = 1000
BOOTSTRAPS = 300  # each with RESAMPLES resamples
RESAMPLES = 999
SLOWDOWN = 0.05  # the truth that the intervals are to cover
METRIC = selftest.TIMES[0]


def main() -> None:
    print("| noise | prompts | t interval | bootstrap | false alarms, no tolerance | false alarms, 5% | power |")
    print("|---|---|---|---|---|---|---|")
    for name, noise in selftest.NOISES.items():
        for prompts in (6, 12, 30):
            shares = " | ".join(f"{share:.1%}" for share in row(noise, prompts))
            print(f"| {name} | {prompts} | {shares} |", flush=True)


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
