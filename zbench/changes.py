"""Where a series of numbers changed: E-divisive (Matteson & James 2014, doi 10.1080/01621459.2013.849605).

A series is split where the two sides differ most in distribution, by the energy distance. A permutation test says
whether such a split could be chance; if not, the sides are looked at in turn. MongoDB watches its benchmarks so (Daly
et al. 2020, doi 10.1145/3358960.3375791). The permutations are seeded: the same series has the same changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zbench.stats import FEW, SEED

SEGMENT = FEW  # the fewest values that are called a level: a change shows when that many have followed it
SIGNIFICANCE = 0.01  # of one split; a page shows many series, and 5% of them would change for nothing
PERMUTATIONS = 199  # as in the paper; p can then be 0.005 at least
_BLOCK = 2_000_000  # numbers that a batch of permuted matrices may hold

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Split:
    """A change between values `index - 1` and `index`. `p` is that of its permutation test."""

    index: int
    p: float


def change_points(
    values: ArrayLike, significance: float = SIGNIFICANCE, segment: int = SEGMENT, permutations: int = PERMUTATIONS
) -> list[Split]:
    """The changes of a series [n], in order; none where it has fewer than two segments' worth of values.

    Takes O(n²) time per permutation. It assumes that values between two changes are exchangeable: a series that drifts,
    or whose neighbours resemble each other, has more changes found than `significance` promises.
    Raises ValueError for a number that is not finite, or a segment of less than two values.
    """
    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or not np.isfinite(data).all():
        raise ValueError("expected a one-dimensional series of finite numbers")
    if segment < 2:
        raise ValueError("a segment needs two values: one has no spread")
    if len(data) < 2 * segment or np.ptp(data) <= 1e-12 * np.abs(data).max():
        return []
    scaled = (data - data.min()) / np.ptp(data)  # sums of distances then lose no digits to a large offset
    distances = np.abs(scaled[:, None] - scaled[None, :])
    rng = np.random.default_rng(SEED)
    bounds, found = [0, len(data)], list[Split]()
    while True:
        segments = [distances[a:b, a:b] for a, b in pairwise(bounds)]
        splits = [_best_split(each[None], segment) for each in segments]
        strengths = [float(q[0]) for q, _ in splits]
        best = int(np.argmax(strengths))
        p = _p_value(segments, strengths[best], segment, significance, permutations, rng)
        if p > significance:
            return sorted(found, key=lambda split: split.index)
        index = bounds[best] + int(splits[best][1][0])
        found.append(Split(index, p))
        bounds = sorted([*bounds, index])


def _best_split(distances: Matrix, segment: int) -> tuple[Matrix, NDArray[np.intp]]:
    """(strength, index) of the strongest split of each series, from its distances [batch, n, n].

    Strength is Q = mn / (m + n) * E with E = 2 mean|x - y| - mean|x - x'| - mean|y - y'| over pairs, for the m values x
    before the split and the n values y from it up to some later end: that end is free so that a second change, back
    again, does not hide the first (equations 5 to 7 of the paper, with exponent 1). -inf where n is too short to split.
    """
    batch, n, _ = distances.shape
    split, end = (grid.ravel() for grid in np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij"))
    allowed = (split >= segment) & (end - split >= segment)
    split, end = split[allowed], end[allowed]
    if not len(split):
        return np.full(batch, -np.inf), np.zeros(batch, dtype=np.intp)
    sums = np.zeros((batch, n + 1, n + 1))
    np.cumsum(np.cumsum(distances, axis=1), axis=2, out=sums[:, 1:, 1:])
    x, both, y = sums[:, split, split], sums[:, split, end], sums[:, end, end]
    before, after = split, end - split
    between = 2 * (both - x) / (before * after)
    within = x / (before * (before - 1)) + (y - 2 * both + x) / (after * (after - 1))
    strength = (between - within) * before * after / (before + after)
    best = strength.argmax(axis=1)
    return strength[np.arange(batch), best], split[best]


def _p_value(
    segments: list[Matrix],
    observed: float,
    segment: int,
    significance: float,
    permutations: int,
    rng: np.random.Generator,
) -> float:
    """How often the strongest split is as strong once the values within each segment are shuffled.

    Stops early where so many were that the split cannot be significant any more (Besag & Clifford 1991): p is then a
    lower bound.
    """
    if observed == -np.inf:
        return 1.0
    as_strong, drawn = 0, 0
    step = max(1, min(permutations, 50, _BLOCK // max(len(each) for each in segments) ** 2))
    while drawn < permutations:
        count = min(step, permutations - drawn)
        strongest = np.full(count, -np.inf)
        for each in segments:
            order = rng.permuted(np.tile(np.arange(len(each)), (count, 1)), axis=1)
            shuffled = each[order[:, :, None], order[:, None, :]]
            strongest = np.maximum(strongest, _best_split(shuffled, segment)[0])
        as_strong += int((strongest >= observed - 1e-9 * abs(observed)).sum())
        drawn += count
        if (1 + as_strong) / (1 + permutations) > significance:
            break
    return (1 + as_strong) / (1 + permutations)
