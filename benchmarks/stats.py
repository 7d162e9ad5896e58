"""Statistics of few runs on several tasks; Agarwal et al. (2021), "Deep RL at the Edge of the Statistical Precipice".

`scores[task]` holds the runs of one task throughout: [runs], or [resamples, runs] inside the bootstrap. Every interval is a
percentile interval of a stratified bootstrap: a resample draws with replacement as many runs of every task as it has. It says
how well the runs pin down a figure on these tasks, and nothing about other tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Scores = Sequence[Array]
Statistic = Callable[[Scores], Array]  # tasks of [..., runs] -> [...]

RESAMPLES = 10_000
LEVEL = 0.95  # of the intervals


class Interval(NamedTuple):
    """An estimate and the ends of its interval; NaN throughout where there are no runs."""

    estimate: float
    low: float
    high: float


class Profile(NamedTuple):
    """Shares of runs above each threshold, [thresholds] each, with the ends of the interval at each of them."""

    estimate: Array
    low: Array
    high: Array


# What is said of many runs in one number


def iqm(scores: Array) -> Array:
    """Mean of the middle half: of [..., N] scores, floor(N / 4) fall away at either end. Result: [...]."""
    cut = scores.shape[-1] // 4
    middle = np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut]
    means: Array = middle.mean(axis=-1)
    return means


def interquartile_mean(scores: Scores) -> Array:
    """`iqm` of all runs of all tasks together."""
    return iqm(np.concatenate(scores, axis=-1))


def task_means(scores: Scores) -> Array:
    """[..., tasks]"""
    return np.stack([task.mean(axis=-1) for task in scores], axis=-1)


def mean(scores: Scores) -> Array:
    """Mean over tasks of the mean over runs, so that a task with more runs counts no more."""
    means: Array = task_means(scores).mean(axis=-1)
    return means


def median(scores: Scores) -> Array:
    """Median over tasks of the mean over runs."""
    medians: Array = np.median(task_means(scores), axis=-1)
    return medians


def optimality_gap(scores: Scores, target: float = 1.0) -> Array:
    """How far runs stay below `target`, mean over tasks; what exceeds it makes up for nothing. Lower is better."""
    return mean([np.maximum(target - task, 0.0) for task in scores])


STATISTICS: dict[str, Statistic] = {
    "IQM": interquartile_mean,
    "median": median,
    "mean": mean,
    "optimality gap": optimality_gap,
}


def human_normalised(score: float, random: float, human: float) -> float:
    """0 for the random policy and 1 for the human."""
    return (score - random) / (human - random)


# How sure it is


def resampled(scores: Scores, statistic: Statistic, seed: int = 0, resamples: int = RESAMPLES) -> Array:
    """The statistic of each resample, [resamples]."""
    generator = np.random.default_rng(seed)
    return statistic([task[generator.integers(len(task), size=(resamples, len(task)))] for task in scores])


def stratified_interval(scores: Scores, seed: int = 0, statistic: Statistic = interquartile_mean) -> Interval:
    """A statistic of the runs with its interval; tasks without runs are left out. For paired arms, give it differences."""
    scores = [task for task in scores if len(task)]
    if not scores:
        return Interval(np.nan, np.nan, np.nan)
    return Interval(float(statistic(scores)), *ends(resampled(scores, statistic, seed)))


def ends(values: Array) -> tuple[float, float]:
    """Of the interval, from the statistic of each resample."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def probability_of_improvement(scores: Scores, baseline: Scores, seed: int = 0) -> Interval:
    """How likely a run of the first arm beats one of the second on the same task, mean over tasks; a tie counts half.

    Tasks in the same order; those on which an arm has no run are left out. Both arms are resampled, independently.
    """
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(scores, baseline, strict=True) if len(x) and len(y)]
    if not pairs:
        return Interval(np.nan, np.nan, np.nan)
    generator = np.random.default_rng(seed)
    wins = [(x[:, None] > y) + 0.5 * (x[:, None] == y) for x, y in pairs]  # [runs, runs of the baseline] of each task
    drawn = [np.sum((_shares(generator, len(win)) @ win) * _shares(generator, win.shape[1]), axis=-1) for win in wins]
    return Interval(float(np.mean([win.mean() for win in wins])), *ends(np.mean(drawn, axis=0)))


def _shares(generator: np.random.Generator, runs: int) -> Array:
    """The share that each run has of a resample, [RESAMPLES, runs]."""
    return generator.multinomial(runs, np.full(runs, 1 / runs), size=RESAMPLES) / runs


def performance_profile(scores: Scores, thresholds: Array, seed: int = 0) -> Profile:
    """Share of runs whose score is above each threshold, mean over tasks, with an interval at each threshold by itself."""
    scores = [task for task in scores if len(task)]
    if not scores:
        nothing = np.full(len(thresholds), np.nan)
        return Profile(nothing, nothing, nothing)
    generator = np.random.default_rng(seed)
    above = [(task[:, None] > thresholds).astype(np.float64) for task in scores]  # [runs, thresholds] of each task
    drawn = np.mean([_shares(generator, len(task)) @ task for task in above], axis=0)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Profile(np.mean([task.mean(axis=0) for task in above], axis=0), low, high)


def differences(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Array:
    """[pairs]: arm less baseline over the seeds that both have."""
    return np.array([arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())])
