"""Statistics and bootstrap intervals against cases that are known without a bootstrap, and against every resample."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import trim_mean

from resprout.benchmarks.stats import (
    RESAMPLES,
    STATISTICS,
    differences,
    ends,
    human_normalised,
    interquartile_mean,
    iqm,
    mean,
    median,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    resampled,
    stratified_interval,
)

FINITE = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([3], 3), ([1, 3], 2), ([0, 1, 100], 101 / 3), ([-50, 1, 3, 99], 2), ([9, 1, 2, 3, 4, 5, 6, 7], 4.5)],
)
def test_iqm_by_hand(scores, expected):
    assert iqm(np.array(scores, float)) == pytest.approx(expected)


@given(st.lists(FINITE, min_size=1, max_size=40))
def test_iqm_is_the_mean_trimmed_by_a_quarter(scores):
    assert iqm(np.array(scores)) == pytest.approx(trim_mean(scores, 0.25), rel=1e-9, abs=1e-6)


def test_iqm_works_on_the_last_axis():
    scores = np.random.default_rng(0).normal(size=(3, 5, 11))
    np.testing.assert_allclose(iqm(scores), trim_mean(scores, 0.25, axis=-1))


def test_two_runs_of_one_task():
    # a resample is (a, a), (a, b), (b, a) or (b, b), each as likely: a quarter of the means are a, a quarter are b
    assert stratified_interval([np.array([1.0, 5.0])]) == (3.0, 1.0, 5.0)


def test_runs_are_resampled_within_their_task():
    # one run of each task: every resample is the same, however far the tasks lie apart
    assert stratified_interval([np.array([1.0]), np.array([100.0])]) == (50.5, 50.5, 50.5)


def test_every_task_keeps_its_number_of_runs():
    # whatever is drawn, eight zeros and four ones: the middle half is five zeros and a one
    zeros_and_ones = [np.zeros(8), np.ones(4)]
    assert stratified_interval(zeros_and_ones) == pytest.approx((1 / 6, 1 / 6, 1 / 6))


def test_a_task_without_runs_counts_for_nothing_and_no_runs_give_nan():
    runs = np.array([1.0, 2.0, 4.0])
    assert stratified_interval([runs, np.array([])]) == stratified_interval([runs])
    assert np.isnan(stratified_interval([np.array([])])).all()


def test_a_seed_repeats():
    runs = [np.random.default_rng(3).normal(size=7)]
    assert stratified_interval(runs, seed=1) == stratified_interval(runs, seed=1) != stratified_interval(runs, seed=2)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.lists(FINITE, min_size=1, max_size=6), min_size=1, max_size=4), st.integers(-10, 10), st.integers(1, 8)
)
def test_shift_and_scale_go_through(tasks, shift, scale):
    plain = stratified_interval([np.array(task) for task in tasks])
    moved = stratified_interval([np.array(task) * scale + shift for task in tasks])
    np.testing.assert_allclose(moved, np.array(plain) * scale + shift, rtol=1e-6, atol=1e-3)


def test_intervals_cover_the_truth():
    # three tasks of ten normal runs with means -5, 0, 5: the truth is the interquartile mean of many such runs
    generator = np.random.default_rng(0)
    means = np.array([-5.0, 0.0, 5.0])[:, None]
    truth = np.mean([iqm((means + generator.normal(size=(3, 10))).ravel()) for _ in range(20_000)])
    covered = 0
    for _ in range(100):
        interval = stratified_interval(list(means + generator.normal(size=(3, 10))))
        covered += interval.low <= truth <= interval.high
    assert 0.85 <= covered / 100 <= 0.98  # a percentile bootstrap of ten runs is somewhat too narrow


# Statistics

UNEQUAL = [np.array([0.0, 4.0]), np.array([1.0]), np.array([0.25, 0.5, 3.0, 0.25])]


def test_statistics_by_hand():
    assert mean(UNEQUAL) == 4 / 3  # of the means 2, 1 and 1
    assert median(UNEQUAL) == 1
    assert optimality_gap(UNEQUAL) == pytest.approx((1 / 2 + 0 + (0.75 + 0.5 + 0.75) / 4) / 3)
    assert optimality_gap(UNEQUAL, target=3) == pytest.approx((3 / 2 + 2 + (2.75 + 2.5 + 2.75) / 4) / 3)
    assert interquartile_mean(UNEQUAL) == pytest.approx((0.25 + 0.25 + 0.5 + 1 + 3) / 5)  # 0 and 4 fall away


def test_human_normalised_scores():
    assert [human_normalised(score, random=2.0, human=12.0) for score in (2, 12, 22, -3)] == [0, 1, 2, -0.5]
    assert human_normalised(-20, random=-30, human=-10) == 0.5


def test_differences_are_of_seeds_that_both_have():
    np.testing.assert_array_equal(differences({0: 5.0, 3: 1.0, 4: 9.0}, {4: 2.0, 0: 4.0, 1: 7.0}), [1.0, 7.0])


# Against every resample there is


def every_resample(scores):
    """Each resample of all tasks once; all are equally likely."""
    draws = [itertools.product(task, repeat=len(task)) for task in scores]
    return [[np.array(task) for task in resample] for resample in itertools.product(*draws)]


def within(counts, exact, resamples=RESAMPLES):
    """Frequencies of each value against their probabilities, to five standard deviations."""
    assert set(counts) <= set(exact)
    for value, probability in exact.items():
        spread = np.sqrt(probability * (1 - probability) / resamples)
        assert abs(counts[value] / resamples - probability) <= 5 * spread + 1e-12, value


def probabilities(values):
    return {value: count / len(values) for value, count in Counter(values).items()}


@pytest.mark.parametrize("name", STATISTICS)
def test_resamples_come_as_often_as_they_should(name):
    scores = [np.array([0.0, 1.0]), np.array([0.5, 2.0, 0.25])]  # 4 x 27 resamples
    exact = [round(float(STATISTICS[name](resample)), 9) for resample in every_resample(scores)]
    drawn = [round(value, 9) for value in resampled(scores, STATISTICS[name], seed=5).tolist()]
    within(Counter(drawn), probabilities(exact))


def test_an_interval_has_the_quantiles_of_every_resample():
    scores = [np.array([0.0, 1.0, 7.0, 3.5]), np.array([2.0, 2.5, 40.0])]  # 256 x 27 resamples
    exact = np.array([float(mean(resample)) for resample in every_resample(scores)])
    interval = stratified_interval(scores, seed=1, statistic=mean)
    assert interval.estimate == mean(scores)
    for end, level in ((interval.low, 0.025), (interval.high, 0.975)):
        assert abs(np.mean(exact < end) - level) < 0.01 or abs(np.mean(exact <= end) - level) < 0.01


def test_probability_of_improvement_by_hand():
    # of six pairs the first arm wins three and ties one; on the second task it wins its only pair
    won = probability_of_improvement(
        [np.array([1.0, 3.0]), np.array([5.0])], [np.array([1.0, 2.0, 0.0]), np.array([4.0])]
    )
    assert won.estimate == pytest.approx((4.5 / 6 + 1) / 2)
    assert probability_of_improvement([np.ones(3)], [np.ones(4)]) == pytest.approx((0.5, 0.5, 0.5))
    assert probability_of_improvement([np.array([2.0, 3.0])], [np.array([0.0, 1.0])]) == pytest.approx((1, 1, 1))
    assert np.isnan(probability_of_improvement([np.array([])], [np.ones(2)])).all()


def test_probability_of_improvement_against_every_resample():
    arm, baseline = np.array([1.0, 4.0, 2.0]), np.array([2.0, 3.0])
    exact = np.array([np.mean((x[:, None] > y) + 0.5 * (x[:, None] == y)) for x, y in every_resample([arm, baseline])])
    interval = probability_of_improvement([arm], [baseline], seed=2)
    assert interval.estimate == np.mean((arm[:, None] > baseline) + 0.5 * (arm[:, None] == baseline))
    assert interval.low == pytest.approx(np.quantile(exact, 0.025), abs=1e-9)
    assert interval.high == pytest.approx(np.quantile(exact, 0.975), abs=1e-9)


def test_profile_by_hand_and_against_every_resample():
    scores, thresholds = [np.array([0.0, 1.0]), np.array([0.5, 2.0, 0.25])], np.array([-1.0, 0.0, 0.5, 2.0])
    profile = performance_profile(scores, thresholds, seed=3)
    np.testing.assert_allclose(profile.estimate, [1, (0.5 + 1) / 2, (0.5 + 1 / 3) / 2, 0])
    shares = np.array(
        [
            np.mean([(task[:, None] > thresholds).mean(axis=0) for task in resample], axis=0)
            for resample in every_resample(scores)
        ]
    )
    np.testing.assert_allclose(profile.low, np.quantile(shares, 0.025, axis=0), atol=1e-9)
    np.testing.assert_allclose(profile.high, np.quantile(shares, 0.975, axis=0), atol=1e-9)
    assert np.isnan(performance_profile([], thresholds).estimate).all()


@pytest.mark.parametrize(("tasks", "pairs", "rate"), [(1, 3, 0.26), (1, 5, 0.1), (3, 5, 0.09), (3, 10, 0.07)])
def test_how_often_an_interval_of_no_difference_leaves_out_zero(tasks, pairs, rate):
    """Of 2,000 comparisons of equal arms, normal differences: more often than one time in twenty, as docs/benchmarks.md says."""
    generator = np.random.default_rng(0)
    left_out = 0
    for trial in range(2_000):
        scores = list(generator.normal(size=(tasks, pairs)))
        low, high = ends(resampled(scores, interquartile_mean, trial, resamples=500))
        left_out += not low <= 0 <= high
    assert left_out / 2_000 == pytest.approx(rate, abs=0.02)
