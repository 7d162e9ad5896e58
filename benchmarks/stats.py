"""Interquartile means and stratified bootstrap intervals; Agarwal et al. (2021), "Deep RL at the Edge of the Statistical Precipice"."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95  # of the intervals


class Interval(NamedTuple):
    """An estimate and the ends of its interval; NaN throughout where there are no runs."""

    estimate: float
    low: float
    high: float


def iqm(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the middle half: of [..., N] scores, floor(N / 4) fall away at either end. Result: [...]."""
    cut = scores.shape[-1] // 4
    middle = np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut]
    means: NDArray[np.float64] = middle.mean(axis=-1)
    return means


def stratified_interval(scores: Sequence[NDArray[np.float64]], seed: int = 0) -> Interval:
    """Interquartile mean of all runs of all tasks, `scores[task]` of shape [runs], with a 95 % percentile interval.

    Each resample draws with replacement as many runs of every task as it has. The interval says how well the runs pin
    down the figure on these tasks, and nothing about other tasks. For paired arms, give it the runs' differences.
    """
    scores = [task for task in scores if len(task)]
    if not scores:
        return Interval(np.nan, np.nan, np.nan)
    generator = np.random.default_rng(seed)
    drawn = [task[generator.integers(len(task), size=(RESAMPLES, len(task)))] for task in scores]
    low, high = np.quantile(iqm(np.concatenate(drawn, axis=1)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(iqm(np.concatenate(scores))), float(low), float(high))
