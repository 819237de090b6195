"""How often a change point is right, for the table in docs/gates.md: python -m benchmarks.change_points"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from zbench.changes import change_points

SERIES = 400
STEPS = (2, 3, 5)  # in standard deviations of the noise


def normal(rng: np.random.Generator, runs: int) -> np.ndarray:
    return rng.normal(size=runs)


def autocorrelated(rng: np.random.Generator, runs: int) -> np.ndarray:
    """AR(1) with 0.5 from run to run."""
    series = rng.normal(size=runs)
    for i in range(1, runs):
        series[i] = 0.5 * series[i - 1] + np.sqrt(1 - 0.5**2) * series[i]
    return series


def found(noise: Callable[[np.random.Generator, int], np.ndarray], runs: int, step: float) -> float:
    """Share of series in which any change is found, with a step of that size in the middle."""
    rng = np.random.default_rng(runs)
    jump = step * (np.arange(runs) >= runs // 2)
    return float(np.mean([bool(change_points(noise(rng, runs) + jump)) for _ in range(SERIES)]))


def main() -> None:
    print("| runs | no change | " + " | ".join(f"step of {step}" for step in STEPS) + " | no change, autocorrelated |")
    print("|" + "---|" * (len(STEPS) + 3))
    for runs in (12, 20, 40):
        shares = [found(normal, runs, step) for step in (0, *STEPS)] + [found(autocorrelated, runs, 0)]
        print(f"| {runs} | " + " | ".join(f"{share:.1%}" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
