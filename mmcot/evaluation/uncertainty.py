"""Uncertainty of scores: bootstrap intervals, tests of paired answers, calibration.

The functions take plain numbers, independent of the problem schema. Resampling is seeded: equal values give equal
intervals.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
NUM_RESAMPLES = 9999
NUM_BINS = 10

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Interval | None:
    """Return the 95 % percentile bootstrap interval of the mean over problems; None for fewer than two values."""
    if len(values) < 2:
        return None
    result = stats.bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=num_resamples,
        method="percentile",
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """
    Return the p-value of McNemar's exact test that two systems are right equally often on the same problems: a binomial
    test with probability 0.5 on the problems that exactly one of them answers right.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)


def calibration(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> dict[str, Any]:
    """
    Measure whether answers with probability p are right with frequency p.

    Args:
        scores: for each problem, one probability for each choice.
        answers: the indices of the right choices.

    Returns:
        `ece`, the expected calibration error (Guo et al. 2017, arXiv 1706.04599) of the most probable choices over ten
        bins of equal width; `brier`, the mean over problems of the summed squared differences to the one-hot vector of
        the right answer; and the reliability `curve` with `low`, `high`, `n`, mean `confidence` and `accuracy` of each
        non-empty bin. All values are fractions of 1.
    """
    confidences = np.array([max(row) for row in scores])
    right = np.array([row.index(max(row)) == answer for row, answer in zip(map(list, scores), answers, strict=True)])
    bins = np.minimum((confidences * NUM_BINS).astype(int), NUM_BINS - 1)
    curve = []
    for number in np.unique(bins):
        inside = bins == number
        entry = {"low": number / NUM_BINS, "high": (number + 1) / NUM_BINS, "n": int(inside.sum())}
        entry |= {"confidence": float(confidences[inside].mean()), "accuracy": float(right[inside].mean())}
        curve.append(entry)
    ece = sum(entry["n"] * abs(entry["accuracy"] - entry["confidence"]) for entry in curve) / len(confidences)
    squares = [
        sum((probability - (choice == answer)) ** 2 for choice, probability in enumerate(row))
        for row, answer in zip(scores, answers, strict=True)
    ]
    return {"ece": ece, "brier": sum(squares) / len(squares), "curve": curve}
