"""Compares scores: two systems on the same problems, one system with several seeds, any number of scores files.

`metrics.py` defines the scores. This module reads and writes no files.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mmcot.evaluation.metrics import CLASSES, Problems, checked_answers, percentage, right_by_class
from mmcot.evaluation.uncertainty import mcnemar, mean_interval
from mmcot.problems.digests import differing_parts


def compare(
    problems: Problems, first: Mapping[str, Mapping[str, Any]], second: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any] | None]:
    """
    Compare two predictions files on the same problems.

    Returns:
        For each class: `n`, `first`, `second` and `difference` (second minus first) in percent, the 95 % paired
        bootstrap `interval` of the difference, and the exact McNemar `p`. None for an empty class.
    """
    right = [right_by_class(problems, checked_answers(problems, predictions)) for predictions in (first, second)]
    compared: dict[str, dict[str, Any] | None] = {}
    for name in CLASSES:
        before, after = (by_class[name] for by_class in right)
        accuracy_before, accuracy_after = percentage(before), percentage(after)
        if accuracy_before is None or accuracy_after is None:
            compared[name] = None
            continue
        interval = mean_interval([int(b) - int(a) for a, b in zip(before, after, strict=True)])
        compared[name] = {
            "n": len(before),
            "first": accuracy_before,
            "second": accuracy_after,
            "difference": accuracy_after - accuracy_before,
            "interval": None if interval is None else [100 * bound for bound in interval],
            "p": mcnemar(before, after),
        }
    return compared


def seed_spread(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float] | None]:
    """Return the `mean` and sample standard deviation `sd` of the accuracy over seeds, for each class."""
    result: dict[str, dict[str, float] | None] = {}
    for name in CLASSES:
        values = [scores["accuracy"][name] for scores in runs]
        empty = None in values
        result[name] = None if empty else {"mean": statistics.mean(values), "sd": statistics.stdev(values)}
    return result


def leaderboard(scores_files: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """
    Return a table of scores files, sorted by `Avg` from best to worst. Its first row contains the column names.

    Raises:
        ValueError: the scores files cover different problems, or do not identify their problems.
    """
    check_same_problems(scores_files)
    classes = [
        name for name in CLASSES if any(scores["accuracy"][name] is not None for scores in scores_files.values())
    ]
    table = [["system", "n", *classes, "Avg, 95 %"]]
    for name, scores in sorted(scores_files.items(), key=lambda item: -item[1]["accuracy"]["Avg"]):
        interval = scores["intervals"]["accuracy"]["Avg"]
        cells = [two_places(scores["accuracy"][column]) for column in classes]
        table.append([name, str(scores["n"]), *cells, "–".join(map(two_places, interval)) if interval else "-"])
    return table


def check_same_problems(scores_files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, scores in scores_files.items():
        if scores.get("problems") is None or scores.get("problems_digest") is None:
            raise ValueError(f"{name} does not identify its problems: score its predictions again.")
    for (first, one), (name, other) in itertools.combinations(scores_files.items(), 2):
        if one["problems"] != other["problems"]:
            raise ValueError(
                f"{name} covers other problems ({other['n']}) than {first} ({one['n']}): scores of different splits or "
                f"subsets cannot be compared in one table."
            )
        differing = differing_parts(one["problems_digest"], other["problems_digest"])
        if differing:
            raise ValueError(
                f"{name} ({other.get('dataset')}) covers problems with other {' and other '.join(differing)} than "
                f"{first} ({one.get('dataset')}), although their ids are equal: they cannot be compared in one table."
            )


def two_places(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
