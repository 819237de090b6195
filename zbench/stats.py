"""Intervals that respect how decoding is measured: prompts are the independent units, engines are compared in pairs.

Trials of one prompt share its tokens, so they are one cluster: resampling trials would pretend to more
evidence than there is. Every estimate says how many clusters it rests on, and gives no interval below `FEW`.
All randomness is seeded: the same records give the same interval, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

CONFIDENCE = 0.95
RESAMPLES = 9999
SEED = 20240229
FEW = 5  # below this many clusters an interval would mislead: five values cannot show what a 95% tail is
DRIFT_BOUND = 0.05  # a step time that moves by more than this over a run is not a steady state

Status = Literal["ok", "unavailable", "error"]


class Damaged(ValueError):
    """Numbers that no measurement gives: times of zero, not a number."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One number with its evidence. `n` counts clusters (prompts); `note` says why anything is missing or wrong."""

    value: float | str | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    estimator: str = ""
    note: str = ""
    status: Status = "ok"


_with_intervals = ContextVar("with_intervals", default=True)


@contextmanager
def values_only() -> Iterator[None]:
    """Within it estimates have no bootstrap interval: for who needs a hundred values, and of none how sure it is."""
    token = _with_intervals.set(False)
    try:
        yield
    finally:
        _with_intervals.reset(token)


def unavailable(reason: str) -> Estimate:
    """An estimate that is not known, and why."""
    return Estimate(None, note=f"unavailable: {reason}", status="unavailable")


def ratio(numerators: ArrayLike, denominators: ArrayLike, clusters: ArrayLike) -> Estimate:
    """Sum of `numerators` over sum of `denominators`, with a cluster-bootstrap interval.

    The three arrays have one entry per observation. Whole clusters are resampled, and the percentile interval is
    expanded for small samples (Hesterberg 2015, "What Teachers Should Know About the Bootstrap").
    Simulated coverage at a nominal 95%: 92% with 5 clusters, 94% from 6 on; about 90% where they are strongly skewed.
    Raises ValueError for unequal lengths, non-finite numbers or a numerator over a denominator of zero.
    """
    top, bottom = _cluster_sums(numerators, denominators, clusters)
    if bottom.sum() == 0:
        return unavailable("there is nothing to divide by")
    estimate = Estimate(float(top.sum() / bottom.sum()), n=len(top), estimator="ratio of sums")
    if len(top) < FEW:
        return replace(estimate, note=too_few(len(top)))
    if not _with_intervals.get():
        return estimate
    low, high = _interval(top, bottom)
    return replace(
        estimate, low=low, high=high, estimator=f"ratio of sums; {CONFIDENCE:.0%} cluster bootstrap by prompt"
    )


def mean(values: ArrayLike, clusters: ArrayLike) -> Estimate:
    """Mean over all observations, with a cluster-bootstrap interval; arguments and errors as in `ratio`."""
    data = np.asarray(values, dtype=float)
    estimate = ratio(data, np.ones_like(data), clusters)
    return replace(estimate, estimator=estimate.estimator.replace("ratio of sums", "mean"))


def share(holds: ArrayLike) -> Estimate:
    """Share of clusters for which something holds, one bool each, with Wilson's interval (Wilson 1927).

    A bootstrap would be sure of 100% after five successes; this interval is not.
    """
    found = np.asarray(holds, dtype=bool)
    n, hits = len(found), int(found.sum())
    if n == 0:
        return unavailable("there is nothing to divide by")
    estimate = Estimate(hits / n, n=n, estimator="share of prompts")
    if n < FEW:
        return replace(estimate, note=too_few(n))
    if not _with_intervals.get():
        return estimate
    from scipy.stats import binomtest

    low, high = binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return replace(estimate, low=float(low), high=float(high), estimator=f"share of prompts; {CONFIDENCE:.0%} Wilson")


def paired_ratio(baseline: ArrayLike, candidate: ArrayLike, clusters: ArrayLike) -> Estimate:
    """Geometric mean of `baseline / candidate` over pairs, interval by cluster bootstrap of the log-ratios.

    With seconds per token this is a speedup: above 1 the candidate is faster. Raises ValueError for a time that is not
    positive.
    """
    estimate = mean(_log_ratios(baseline, candidate), clusters)
    if not isinstance(estimate.value, float):
        return estimate
    low, high = (None if edge is None else float(np.exp(edge)) for edge in (estimate.low, estimate.high))
    estimator = "geometric mean of paired ratios" + estimate.estimator.removeprefix("mean")
    return replace(estimate, value=float(np.exp(estimate.value)), low=low, high=high, estimator=estimator)


def minimal_detectable_effect(
    baseline: ArrayLike, candidate: ArrayLike, clusters: ArrayLike, power: float = 0.8
) -> Estimate:
    """The smallest relative change that this many pairs, this noisy, would show with the given power.

    (t(1 - alpha/2) + t(power)) * sd / sqrt(n) of the per-cluster log-ratios, two-sided, n - 1 degrees of freedom.
    """
    logs = _log_ratios(baseline, candidate)
    top, bottom = _cluster_sums(logs, np.ones_like(logs), clusters)
    n = len(top)
    if n < FEW:
        return replace(unavailable(too_few(n)), n=n)
    effect = (_t(0.5 + CONFIDENCE / 2, n - 1) + _t(power, n - 1)) * np.std(top / bottom, ddof=1) / np.sqrt(n)
    return Estimate(float(np.expm1(effect)), n=n, estimator=f"paired t at {CONFIDENCE:.0%}, power {power:.0%}")


def resampled(
    rows: ArrayLike, clusters: ArrayLike, statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> Estimate:
    """A statistic of the means of several columns that were measured together, with a cluster-bootstrap interval.

    `rows` [observations, k]; `statistic` takes means [..., k] to [...] and may say nan where they do not tell. Every
    cluster counts alike. The interval leaves such resamples out; it is not given where they are more than a tail.
    """
    data, labels = np.asarray(rows, dtype=float), np.asarray(clusters)
    names, index = np.unique(labels, return_inverse=True)
    n = len(names)
    means = np.array([data[index == i].mean(0) for i in range(n)])
    value = float(statistic(means.mean(0)))
    if not np.isfinite(value):
        return unavailable("the columns do not tell")
    estimate = Estimate(value, n=n, estimator="statistic of means")
    if n < FEW:
        return replace(estimate, note=too_few(n))
    if not _with_intervals.get():
        return estimate
    counts = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    found = statistic(counts @ means / n)
    found, tail = found[np.isfinite(found)], _tail(n)
    if len(found) < (1 - tail) * RESAMPLES:
        return replace(estimate, note="no interval: many resamples of the prompts do not tell")
    low, high = np.quantile(found, [tail, 1 - tail])
    return replace(
        estimate, low=float(low), high=float(high), estimator=f"statistic of means; {CONFIDENCE:.0%} cluster bootstrap"
    )


@dataclass(frozen=True, slots=True)
class Shift:
    """How much slower a candidate is, as Student's t sees it on the log-ratios of paired clusters.

    Changes are relative: 0.05 is 5% slower. With fewer than `FEW` clusters nothing but `change` is to be used.
    """

    log: float  # mean of the per-cluster log-ratios candidate / baseline
    error: float  # its standard error
    n: int  # clusters

    @property
    def change(self) -> float:
        return float(np.expm1(self.log))

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        reach = _t(0.5 + confidence / 2, self.n - 1) * self.error
        return float(np.expm1(self.log - reach)), float(np.expm1(self.log + reach))

    def p_slower(self, than: float) -> float:
        """One-sided p of "slower by `than` at most": small where it surely is slower than that."""
        return self._tail(self.log - np.log1p(than))

    def p_faster(self, than: float) -> float:
        """One-sided p of "faster by `than` at most", where twice as fast is faster by 1."""
        return self._tail(-self.log - np.log1p(than))

    def detectable(self, alpha: float, power: float = 0.8) -> float:
        """The smallest slowdown beyond a tolerance that a one-sided test at `alpha` shows with this power."""
        return float(np.expm1((_t(1 - alpha, self.n - 1) + _t(power, self.n - 1)) * self.error))

    def _tail(self, distance: float) -> float:
        if self.error <= 1e-12:  # a clock that does not vary leaves nothing to test
            return 0.0 if distance > 1e-9 else 1.0
        return float(special.stdtr(self.n - 1, -distance / self.error))


def shift(baseline: ArrayLike, candidate: ArrayLike, clusters: ArrayLike) -> Shift:
    """Paired times of two runs, one entry per observation. Raises ValueError where a time is not positive."""
    logs = _log_ratios(candidate, baseline)
    top, bottom = _cluster_sums(logs, np.ones_like(logs), clusters)
    n = len(top)
    means = top / bottom
    error = float(np.std(means, ddof=1) / np.sqrt(n)) if n > 1 else float("inf")
    return Shift(float(means.mean()) if n else 0.0, error, n)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """p-values adjusted so that the chance of any false alarm among them keeps the level (Holm 1979)."""
    p = _vector(p_values)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def drift(order: ArrayLike, seconds: ArrayLike, alike: ArrayLike | None = None) -> Estimate:
    """Relative change of `seconds` from the first to the last `order`, with its interval.

    Theil-Sen slope of log seconds (Sen 1968): one slow trial does not make a trend. Where `alike` labels the trials,
    only those of one label are compared, as with seasons (Hirsch, Slack and Smith 1982; Gilbert 1987, chapter 17).
    `status` is "error" when the interval lies wholly beyond `DRIFT_BOUND`, that is, when the run was surely not in a
    steady state.
    """
    x, y = _vector(order), np.log(_positive(seconds))
    labels = np.zeros(len(x)) if alike is None else np.asarray(alike)
    _, counts = np.unique(labels, return_counts=True)
    counts = counts[counts > 1]
    first, second = np.triu_indices(len(x), 1)
    compared = (labels[first] == labels[second]) & (x[first] != x[second])
    first, second = first[compared], second[compared]
    n, pairs = int(counts.sum()), len(first)
    if min(n, pairs) < FEW:
        what = "trials" if n < FEW else "pairs of trials"
        return replace(unavailable(too_few(min(n, pairs), f"{what} that can be compared")), n=n)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first])) * np.ptp(x)
    reach = special.ndtri(0.5 + CONFIDENCE / 2) * np.sqrt((counts * (counts - 1) * (2 * counts + 5)).sum() / 18)
    edges = max(round((pairs - reach) / 2) - 1, 0), min(round((pairs + reach) / 2), pairs - 1)
    value, low, high = (float(np.expm1(edge)) for edge in (np.median(slopes), *slopes[[*edges]]))
    estimate = Estimate(value, low, high, n, f"Theil-Sen slope of log seconds; {CONFIDENCE:.0%} interval")
    if low > DRIFT_BOUND or high < -DRIFT_BOUND:
        note = f"not a steady state: step time moved by {value:+.1%} over the run, beyond {DRIFT_BOUND:.0%}"
        return replace(estimate, note=note, status="error")
    return estimate


def too_few(n: int, what: str = "prompts") -> str:
    """The note that stands where an interval would mislead."""
    return f"too few {what} for an interval ({n} of at least {FEW})"


def _t(probability: float, freedom: int) -> float:
    """Quantile of Student's t. What scipy.stats would call, without the second that its import takes."""
    return float(special.stdtrit(freedom, probability))


def _log_ratios(baseline: ArrayLike, candidate: ArrayLike) -> NDArray[np.float64]:
    return np.log(_positive(baseline)) - np.log(_positive(candidate))


def _interval(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> tuple[float, float]:
    """Expanded percentile interval over clusters with the sums `top` and `bottom`, both [n]."""
    from scipy.stats import bootstrap

    n = len(top)
    ratios = top / bottom
    if np.ptp(ratios) <= 1e-12 * np.abs(ratios).max():
        return float(ratios.min()), float(ratios.max())
    tail = _tail(n)
    interval = bootstrap(
        (top, bottom),
        lambda t, b, axis: t.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 1_000_000 // n),
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _tail(n: int) -> float:
    """Of the resamples of n clusters, on either side: the plain percentile interval is too narrow by
    sqrt((n - 1) / n) and by normal in place of t (Hesterberg 2015)."""
    return float(special.ndtr(np.sqrt(n / (n - 1)) * _t((1 - CONFIDENCE) / 2, n - 1)))


def _cluster_sums(
    numerators: ArrayLike, denominators: ArrayLike, clusters: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    top, bottom, labels = _vector(numerators), _vector(denominators), np.asarray(clusters)
    if not len(top) == len(bottom) == len(labels):
        raise ValueError(f"expected equal lengths, found {len(top)}, {len(bottom)} and {len(labels)}")
    names, index = np.unique(labels, return_inverse=True)
    tops = np.bincount(index, top, minlength=len(names))
    bottoms = np.bincount(index, bottom, minlength=len(names))
    if np.any((bottoms == 0) & (tops != 0)):
        raise Damaged("a cluster has a numerator but its denominator is zero")
    return tops[bottoms != 0], bottoms[bottoms != 0]


def _vector(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise Damaged("expected a one-dimensional array of finite numbers")
    return array


def _positive(values: ArrayLike) -> NDArray[np.float64]:
    array = _vector(values)
    if np.any(array <= 0):
        raise Damaged("expected positive numbers: a time or a rate of zero cannot be compared")
    return array
