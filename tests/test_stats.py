"""What an interval promises, and where none is given."""

from statistics import NormalDist, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zbench import stats

positive = st.floats(1e-6, 1e6)
pairs = st.lists(st.tuples(positive, positive), min_size=1, max_size=20)
quick = settings(max_examples=25, deadline=None)  # a bootstrap per example


def test_a_ratio_of_sums_is_not_the_mean_of_ratios() -> None:
    assert stats.ratio([1, 30], [1, 10], ["a", "b"]).value == pytest.approx(31 / 11)


@pytest.mark.parametrize("n", range(1, stats.FEW))
def test_fewer_than_five_prompts_give_a_value_but_no_interval(n: int) -> None:
    estimate = stats.mean(np.arange(n) + 1.0, np.arange(n))
    assert (estimate.low, estimate.high, estimate.n) == (None, None, n)
    assert estimate.value is not None
    assert "too few" in estimate.note


def test_repeats_of_four_prompts_are_still_four_prompts() -> None:
    estimate = stats.mean(np.arange(40.0), np.arange(40) % 4)
    assert estimate.n == 4
    assert estimate.low is None


def test_repeating_every_trial_adds_no_certainty() -> None:
    values = np.random.default_rng(1).lognormal(size=12)
    once = stats.mean(values, np.arange(12))
    thrice = stats.mean(np.tile(values, 3), np.tile(np.arange(12), 3))
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high), rel=1e-3)


@quick
@given(pairs)
def test_an_interval_holds_its_estimate_and_stays_within_the_clusters(data: list[tuple[float, float]]) -> None:
    top, bottom = np.array(data).T
    estimate = stats.ratio(top, bottom, np.arange(len(data)))
    assert isinstance(estimate.value, float)
    if len(data) < stats.FEW:
        assert estimate.low is None
        return
    assert estimate.low is not None and estimate.high is not None
    slack = 1 + 1e-9
    assert (top / bottom).min() <= estimate.low * slack
    assert estimate.low <= estimate.high
    assert estimate.high <= (top / bottom).max() * slack


@quick
@given(pairs)
def test_swapping_baseline_and_candidate_inverts_the_ratio(data: list[tuple[float, float]]) -> None:
    top, bottom = np.array(data).T
    forth = stats.paired_ratio(top, bottom, np.arange(len(data)))
    back = stats.paired_ratio(bottom, top, np.arange(len(data)))
    assert forth.value == pytest.approx(1 / back.value)  # type: ignore[operator]


@quick
@given(pairs, st.floats(0.01, 100))
def test_a_slower_machine_changes_no_paired_ratio(data: list[tuple[float, float]], factor: float) -> None:
    top, bottom = np.array(data).T
    clusters = np.arange(len(data))
    assert stats.paired_ratio(top * factor, bottom * factor, clusters).value == pytest.approx(
        stats.paired_ratio(top, bottom, clusters).value
    )


def test_the_same_data_give_the_same_interval_to_the_last_bit() -> None:
    values = np.random.default_rng(2).normal(10, 1, 30)
    assert stats.mean(values, np.arange(30)) == stats.mean(values, np.arange(30))


def test_constant_data_give_an_interval_of_no_width() -> None:
    estimate = stats.mean([1.0] * 8, range(8))
    assert (estimate.low, estimate.value, estimate.high) == (1.0, 1.0, 1.0)


@given(st.lists(st.booleans(), min_size=stats.FEW, max_size=200))
def test_a_share_is_never_certain(holds: list[bool]) -> None:
    estimate = stats.share(holds)
    assert estimate.value == pytest.approx(sum(holds) / len(holds))
    assert 0 <= estimate.low < estimate.high <= 1  # type: ignore[operator]


def test_a_share_of_few_has_no_interval_and_a_share_of_none_no_value() -> None:
    assert (stats.share([True, False]).value, stats.share([True, False]).low) == (0.5, None)
    assert stats.share([]).value is None


def test_nothing_measured_is_unavailable_not_zero() -> None:
    estimate = stats.ratio([], [], [])
    assert estimate.value is None
    assert estimate.note.startswith("unavailable: ")


def test_a_prompt_with_nothing_on_both_sides_is_no_evidence() -> None:
    assert stats.ratio([0, 6], [0, 3], ["none", "some"]) == stats.ratio([6], [3], ["some"])


@pytest.mark.parametrize(
    ("top", "bottom"), [([1.0], [0.0]), ([float("nan")], [1.0]), ([1.0, 2.0], [1.0]), ([[1.0]], [[1.0]])]
)
def test_impossible_inputs_are_refused(top: list, bottom: list) -> None:
    with pytest.raises(ValueError):
        stats.ratio(top, bottom, range(len(top)))


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf")])
def test_a_paired_ratio_refuses_times_that_are_not_positive(seconds: float) -> None:
    with pytest.raises(ValueError):
        stats.paired_ratio([1.0], [seconds], ["p"])


def test_a_drift_wholly_beyond_the_bound_is_an_error() -> None:
    noise = np.random.default_rng(3).normal(0, 0.005, 30)
    estimate = stats.drift(np.arange(30), np.exp(np.linspace(0, 0.2, 30) + noise))
    assert estimate.value == pytest.approx(0.22, abs=0.02)
    assert estimate.status == "error"
    assert "not a steady state" in estimate.note


def test_the_drift_of_trials_that_are_all_alike_is_the_slope_of_theil_and_sen() -> None:
    from scipy.stats import theilslopes

    seconds = np.exp(np.linspace(0, 0.1, 17) + np.random.default_rng(8).normal(0, 0.02, 17))
    slope, _, low, high = theilslopes(np.log(seconds), np.linspace(0, 1, 17), alpha=stats.CONFIDENCE)
    found = stats.drift(np.arange(17), seconds)
    assert (found.value, found.low, found.high) == pytest.approx(tuple(np.expm1([slope, low, high])))


@pytest.mark.parametrize(("drift", "status"), [(0.0, "ok"), (0.2, "error"), (-0.2, "error")])
def test_prompts_that_take_longer_and_longer_are_no_drift_and_hide_none(drift: float, status: str) -> None:
    """Eight prompts, each half as long again as the one before, twice."""
    order, prompts = np.arange(16), np.tile(np.arange(8), 2)
    noise = np.random.default_rng(9).normal(0, 0.005, 16)
    found = stats.drift(order, np.exp(0.5 * prompts + drift * order / 15 + noise), prompts)
    assert found.value == pytest.approx(np.expm1(drift), abs=0.03)
    assert (found.status, found.n) == (status, 16)
    assert stats.drift(order[:8], np.exp(0.5 * prompts[:8]), prompts[:8]).value is None  # nothing was measured twice


def test_four_prompts_measured_twice_cannot_show_a_drift() -> None:
    found = stats.drift(range(8), np.exp(np.arange(8.0)), [0, 1, 2, 3] * 2)
    assert found.note == "unavailable: too few pairs of trials that can be compared for an interval (4 of at least 5)"


def test_noise_without_a_trend_is_no_drift_even_with_one_wild_trial() -> None:
    seconds = np.exp(np.random.default_rng(4).normal(0, 0.03, 30))
    seconds[-1] *= 20
    assert stats.drift(np.arange(30), seconds).status == "ok"


def test_four_trials_cannot_show_a_drift() -> None:
    assert stats.drift(range(4), [1, 2, 3, 4]).value is None


def test_more_prompts_detect_smaller_effects() -> None:
    noise = np.random.default_rng(5).lognormal(0, 0.05, 40)
    effects = [stats.minimal_detectable_effect(noise[:n], np.ones(n), range(n)).value for n in (6, 12, 40)]
    assert effects == sorted(effects, reverse=True)  # type: ignore[type-var]


LOGS = (0.01, 0.04, -0.02, 0.03, 0.08, 0.0)  # of pairs of times


def test_the_minimal_effect_is_that_of_a_paired_t_test() -> None:
    """t(97.5%) = 2.5706 and t(80%) = 0.9195 with 5 degrees of freedom."""
    effect = stats.minimal_detectable_effect(np.exp(LOGS), np.ones(6), range(6)).value
    assert effect == pytest.approx(np.expm1((2.5706 + 0.9195) * stdev(LOGS) / 6**0.5), rel=1e-4)


def test_a_shift_has_the_interval_of_a_paired_t_test() -> None:
    from scipy.stats import ttest_1samp

    found = stats.shift(np.ones(6), np.exp(LOGS), range(6))
    exact = ttest_1samp(LOGS, 0).confidence_interval(stats.CONFIDENCE)
    assert found.change == pytest.approx(np.expm1(np.mean(LOGS)))
    assert found.interval() == pytest.approx((np.expm1(exact.low), np.expm1(exact.high)))
    assert found.p_slower(0.0) == pytest.approx(ttest_1samp(LOGS, 0, alternative="greater").pvalue)


def test_what_a_one_sided_test_shows_needs_its_level_and_its_power() -> None:
    """t(95%) = 2.0150 and t(80%) = 0.9195 with 5 degrees of freedom."""
    found = stats.shift(np.ones(6), np.exp(LOGS), range(6)).detectable(0.05)
    assert found == pytest.approx(np.expm1((2.0150 + 0.9195) * stdev(LOGS) / 6**0.5), rel=1e-4)


@pytest.mark.parametrize(("n", "t", "tail"), [(5, 2.7764, 0.00095), (6, 2.5706, 0.00243), (20, 2.0930, 0.01588)])
def test_percentiles_are_expanded_for_few_clusters(n: int, t: float, tail: float) -> None:
    """Hesterberg 2015: the normal tail beyond t sqrt(n / (n - 1)), by tables of t and of the normal."""
    assert stats._tail(n) == pytest.approx(NormalDist().cdf(-t * (n / (n - 1)) ** 0.5), rel=1e-3)
    assert stats._tail(n) == pytest.approx(tail, abs=1e-5)


def test_the_minimal_effect_needs_enough_pairs() -> None:
    assert stats.minimal_detectable_effect([1, 2], [1, 2], ["a", "b"]).value is None


@pytest.mark.slow
@pytest.mark.parametrize(("clusters", "at_least"), [(6, 0.9), (30, 0.92)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(
    clusters: int, at_least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 999)
    rng, truth, hits, trials = np.random.default_rng(6), 1.3, 0, 300
    for _ in range(trials):
        prompt = rng.normal(0, 0.1, clusters).repeat(3)
        candidate = np.exp(rng.normal(0, 0.05, clusters * 3))
        baseline = truth * candidate * np.exp(prompt)
        estimate = stats.paired_ratio(baseline, candidate, np.arange(clusters).repeat(3))
        hits += estimate.low <= truth <= estimate.high  # type: ignore[operator]
    assert at_least <= hits / trials <= 0.99


@pytest.mark.slow
def test_the_minimal_effect_is_found_about_as_often_as_its_power_says() -> None:
    from scipy.stats import ttest_1samp

    rng, n, sd = np.random.default_rng(7), 12, 0.03
    noise = np.exp(rng.normal(0, sd, 4000))
    effect = stats.minimal_detectable_effect(noise, np.ones(4000), np.arange(4000) % n).value
    scale = np.std([np.log(noise)[i::n].mean() for i in range(n)], ddof=1)
    found = [ttest_1samp(rng.normal(np.log1p(effect), scale, n), 0).pvalue < 0.05 for _ in range(1000)]  # type: ignore[arg-type]
    assert 0.75 <= np.mean(found) <= 0.85


@quick
@given(st.lists(positive, min_size=stats.FEW, max_size=12))
def test_a_statistic_of_means_has_the_interval_of_the_mean_where_it_is_the_mean(values: list[float]) -> None:
    table = np.column_stack([values, np.ones(len(values))])
    found = stats.resampled(table, np.arange(len(values)), lambda means: means[..., 0])
    plain = stats.mean(values, np.arange(len(values)))
    assert found.value == pytest.approx(plain.value)
    assert found.low is not None and plain.low is not None and found.high is not None and plain.high is not None
    spread = float(np.ptp(values)) or 1.0
    assert abs(found.low - plain.low) < 0.05 * spread  # two draws of resamples
    assert abs(found.high - plain.high) < 0.05 * spread


def test_a_statistic_that_cannot_tell_is_unavailable_and_one_that_often_cannot_has_no_interval() -> None:
    table, clusters = np.arange(6.0)[:, None], np.arange(6)
    assert stats.resampled(table, clusters, lambda m: np.where(m[..., 0] > 9, 1.0, np.nan)).value is None
    found = stats.resampled(table, clusters, lambda m: np.where(m[..., 0] >= 2.5, m[..., 0], np.nan))
    assert (found.value, found.low, found.high) == (2.5, None, None)
    assert "do not tell" in found.note
    few = stats.resampled(table[:4], clusters[:4], lambda m: m[..., 0])
    assert (few.value, few.low) == (1.5, None)
