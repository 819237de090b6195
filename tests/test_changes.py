"""E-divisive: the statistic against its definition, and on simulated series what it promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from zbench.changes import SIGNIFICANCE, _best_split, change_points


def strength(x: np.ndarray, y: np.ndarray) -> float:
    """Equations 5 to 7 of the paper, written out over pairs."""
    m, n = len(x), len(y)
    between = 2 / (m * n) * sum(abs(a - b) for a in x for b in y)
    within = sum(2 / (len(z) * (len(z) - 1)) * sum(abs(a - b) for a, b in itertools.combinations(z, 2)) for z in (x, y))
    return m * n / (m + n) * (between - within)


@given(st.lists(st.floats(-10, 10), min_size=6, max_size=12), st.integers(2, 3))
@settings(max_examples=40, deadline=None)
def test_the_strongest_split_is_that_of_the_definition(values: list[float], segment: int) -> None:
    data = np.array(values)
    everything = {
        (split, end): strength(data[:split], data[split:end])
        for split in range(segment, len(data) + 1)
        for end in range(split + segment, len(data) + 1)
    }
    found, index = _best_split(np.abs(data[:, None] - data[None, :])[None], segment)
    assert found[0] == pytest.approx(max(everything.values()), abs=1e-9)
    assert max(q for (split, _), q in everything.items() if split == index[0]) == pytest.approx(found[0], abs=1e-9)


@pytest.mark.parametrize("noise", ["normal", "log-normal", "rounded"])
def test_where_nothing_changed_few_series_have_a_change(noise: str) -> None:
    rng = np.random.default_rng(5)
    draw = {
        "normal": rng.normal,
        "log-normal": lambda size: rng.lognormal(0, 1, size),
        "rounded": lambda size: np.round(rng.normal(size=size)),
    }[noise]
    series = 300
    changed = sum(bool(change_points(draw(size=16))) for _ in range(series))
    assert changed <= binom.ppf(0.999, series, SIGNIFICANCE)


def test_a_level_is_not_called_significant_more_often_than_asked() -> None:
    """At a level where it would show: half of all series."""
    rng = np.random.default_rng(6)
    changed = sum(bool(change_points(rng.normal(size=14), significance=0.5, permutations=39)) for _ in range(300))
    assert binom.ppf(0.001, 300, 0.35) <= changed <= binom.ppf(0.999, 300, 0.5)


@pytest.mark.parametrize("place", [5, 12, 19])
def test_a_step_is_found_where_it_is(place: int) -> None:
    rng = np.random.default_rng(place)
    data = rng.normal(100, 1, 24)
    data[place:] -= 8
    (found,) = change_points(data)
    assert found.index == place
    assert found.p <= SIGNIFICANCE


def test_two_steps_are_found_also_where_the_second_undoes_the_first() -> None:
    rng = np.random.default_rng(2)
    data = rng.normal(100, 1, 36)
    data[12:24] += 8
    assert [split.index for split in change_points(data)] == [12, 24]
    data[24:] += 16
    assert [split.index for split in change_points(data)] == [12, 24]


def test_a_small_step_in_much_noise_is_not_called_a_change() -> None:
    rng = np.random.default_rng(4)
    data = rng.normal(100, 5, 20)
    data[10:] += 0.5
    assert change_points(data) == []


@pytest.mark.parametrize("data", [[], [3.0], [0.0] * 40, [1e9] * 40, [1.0] * 4 + [9.0] * 5])
def test_a_series_without_changes_or_too_short_for_any_has_none(data: list[float]) -> None:
    assert change_points(data) == []


def test_one_odd_value_is_no_change() -> None:
    data = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 5.0, 1.0, 1.01, 0.99, 1.0, 1.01, 0.98, 1.0]
    assert change_points(data) == []


@given(st.floats(0.001, 1000), st.floats(-1e6, 1e6))
@settings(max_examples=15, deadline=None)
def test_unit_and_offset_change_nothing(scale: float, offset: float) -> None:
    rng = np.random.default_rng(8)
    data = rng.normal(0, 1, 20)
    data[11:] += 6
    assert [split.index for split in change_points(data * scale + offset)] == [11]


def test_the_same_series_has_the_same_changes() -> None:
    data = np.random.default_rng(9).normal(0, 1, 30)
    data[20:] += 2
    assert change_points(data) == change_points(data) != []


@pytest.mark.parametrize("data", [[1.0, float("nan")] * 10, [1.0, float("inf")] * 10, [[1.0, 2.0]] * 12])
def test_what_is_no_series_of_numbers_is_refused(data: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        change_points(data)


def test_a_segment_of_one_value_is_refused() -> None:
    with pytest.raises(ValueError, match="two values"):
        change_points(range(20), segment=1)
