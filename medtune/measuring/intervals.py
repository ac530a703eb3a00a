"""Confidence intervals for rates and means, and a paired test of two models on the same items."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

N_RESAMPLES = 2000
BOOTSTRAP_SEED = 0


class Difference(NamedTuple):
    """By how much a figure of the second model exceeds that of the first: 95 % interval and two-sided p-value."""

    value: float
    low: float
    high: float
    p_value: float


def wilson_interval(n_right: float, n: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    z2 = 1.96**2
    rate = n_right / n
    center = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 / n * (rate * (1 - rate) + z2 / (4 * n))) / (1 + z2 / n)
    return max(center - half, 0.0), min(center + half, 1.0)


def bootstrap_interval(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """95 % interval of sum(sums) / sum(counts) over items, by the percentiles of resampled items (Efron 1979)."""
    low, high = np.percentile(_resampled(sums, counts), [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    first: tuple[Sequence[float], Sequence[float]], second: tuple[Sequence[float], Sequence[float]]
) -> Difference:
    """Compare two models on the same items, each given as (sums, counts) (Koehn 2004, W04-3250).

    The p-value is twice the share of resamples on the rarer side of no difference, at most 1; the observed value
    counts as one resample, so that no p-value is 0 (Davison and Hinkley 1997, chapter 4).
    """
    value = sum(second[0]) / sum(second[1]) - sum(first[0]) / sum(first[1])
    differences = _resampled(*second) - _resampled(*first)
    low, high = np.percentile(differences, [2.5, 97.5])
    n_rarer = min(int(np.sum(differences <= 0)), int(np.sum(differences >= 0)))
    p_value = min(1.0, 2 * (n_rarer + 1) / (N_RESAMPLES + 1))
    return Difference(float(value), float(low), float(high), p_value)


def _resampled(sums: Sequence[float], counts: Sequence[float]) -> np.ndarray:
    """[N_RESAMPLES] ratios; the same seed draws the same items for each model."""
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(sums), (N_RESAMPLES, len(sums)))
    return np.asarray(sums, float)[draws].sum(axis=1) / np.asarray(counts, float)[draws].sum(axis=1)
