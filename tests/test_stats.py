"""Interquartile means and bootstrap intervals against cases that are known without a bootstrap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import trim_mean

from resprout.benchmarks.stats import iqm, stratified_interval

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
