"""Intervals have their nominal coverage. McNemar's test and the calibration equal those of established libraries."""

import numpy as np
import pytest
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from statsmodels.stats import contingency_tables

from mmcot.evaluation.uncertainty import calibration, mcnemar, mean_interval


def test_intervals_have_nominal_coverage():
    """1,000 systems that are right with probability 0.8, on 361 problems each."""
    random = np.random.default_rng(0)
    covered = 0
    for draw in range(1000):
        low, high = mean_interval(random.random(361) < 0.8, num_resamples=999, seed=draw)
        covered += low <= 0.8 <= high
    assert 930 <= covered <= 970


def test_intervals_of_differences_have_nominal_coverage():
    """Pairs of systems that are right with probabilities 0.7 and 0.8, mostly on the same problems."""
    random = np.random.default_rng(1)
    covered = 0
    for draw in range(1000):
        first = random.random(361) < 0.7
        second = np.where(first, random.random(361) < 0.9, random.random(361) < 17 / 30)
        low, high = mean_interval(second.astype(int) - first.astype(int), num_resamples=999, seed=draw)
        covered += low <= 0.1 <= high
    assert 930 <= covered <= 970


def test_interval_is_deterministic_and_none_for_one_problem():
    assert mean_interval([1, 0, 1, 1], seed=3) == mean_interval([1, 0, 1, 1], seed=3)
    assert mean_interval([True]) is None
    assert mean_interval([1, 1, 1]) == (1, 1)


@pytest.mark.parametrize(("both", "first", "second", "neither"), [(50, 9, 3, 8), (5, 0, 7, 1), (9, 4, 4, 0)])
def test_mcnemar_matches_statsmodels_and_scipy(both, first, second, neither):
    a = [True] * both + [True] * first + [False] * second + [False] * neither
    b = [True] * both + [False] * first + [True] * second + [False] * neither
    expected = contingency_tables.mcnemar([[both, first], [second, neither]], exact=True).pvalue
    assert mcnemar(a, b) == pytest.approx(expected)
    assert mcnemar(a, b) == pytest.approx(stats.binomtest(first, first + second).pvalue)


def test_mcnemar_of_equal_systems_is_one():
    assert mcnemar([True, False], [True, False]) == 1


def test_calibration_matches_scikit_learn():
    random = np.random.default_rng(0)
    scores = random.dirichlet([1, 1, 1], size=500).tolist()
    answers = random.integers(0, 3, 500).tolist()
    found = calibration(scores, answers)
    one_hot = np.eye(3)[answers]
    assert found["brier"] == pytest.approx(brier_score_loss(one_hot.argmax(1), np.array(scores), scale_by_half=False))
    confidences = np.array(scores).max(axis=1)
    right = np.array(scores).argmax(axis=1) == answers
    accuracies, means = calibration_curve(right, confidences, n_bins=10)
    assert [entry["accuracy"] for entry in found["curve"]] == pytest.approx(accuracies)
    assert [entry["confidence"] for entry in found["curve"]] == pytest.approx(means)
    assert sum(entry["n"] for entry in found["curve"]) == 500
    gaps = [entry["n"] * abs(entry["accuracy"] - entry["confidence"]) for entry in found["curve"]]
    assert found["ece"] == pytest.approx(sum(gaps) / 500)


def test_certain_right_answers_are_perfectly_calibrated():
    assert calibration([[1.0, 0.0], [0.0, 1.0]], [0, 1]) == {
        "ece": 0,
        "brier": 0,
        "curve": [{"low": 0.9, "high": 1.0, "n": 2, "confidence": 1.0, "accuracy": 1.0}],
    }
