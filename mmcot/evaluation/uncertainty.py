"""How sure a figure is: bootstrap intervals, tests of paired answers, agreement of labels, calibration.

Nothing here knows what a problem is. Randomness is seeded: the same values give the same interval.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
NUM_RESAMPLES = 9999
NUM_BINS = 10

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Interval | None:
    """The percentile bootstrap's 95 % interval of the mean over problems; None of fewer than two."""
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
    McNemar's exact test that two systems are right equally often, on the same problems: the p-value of those that just
    one of them has right, under a fair coin.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)


def kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Cohen's kappa of two labellings of the same things; nan where both use one label only, and the same one."""
    count = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / count
    expected = sum(first.count(label) * second.count(label) for label in {*first}) / count**2
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)


def calibration(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> dict[str, Any]:
    """
    Whether answers that are given a probability of p are right in a share of p.

    Args:
        scores: a problem's probabilities, one for each choice.
        answers: the right choices.

    Returns:
        `ece`, the expected calibration error (Guo et al. 2017, arXiv 1706.04599) of the likeliest choices over ten bins
        of equal width; `brier`, the mean over problems of the summed squared differences to the right answer's one-hot;
        and the reliability `curve`, of each bin that is not empty `low`, `high`, `n`, mean `confidence`, `accuracy`.
        All as fractions of 1.
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
