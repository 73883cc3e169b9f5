"""Scores side by side: two systems on the same problems, one system with many seeds, any number of scores files.

What a score is stands in `metrics.py`; nothing is read or written here.
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
    Two predictions files on the same problems: by class `first`, `second` and `difference` (second less first) in
    percent, the paired bootstrap's 95 % `interval` of the difference, and McNemar's exact `p`; None of an empty class.
    """
    rights = [right_by_class(problems, checked_answers(problems, predictions)) for predictions in (first, second)]
    compared: dict[str, dict[str, Any] | None] = {}
    for name in CLASSES:
        before, after = (right[name] for right in rights)
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


def spread(every: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float] | None]:
    """Of one system's scores with several seeds, by class `mean` and sample standard deviation `sd` of accuracy."""
    result: dict[str, dict[str, float] | None] = {}
    for name in CLASSES:
        values = [scores["accuracy"][name] for scores in every]
        empty = None in values
        result[name] = None if empty else {"mean": statistics.mean(values), "sd": statistics.stdev(values)}
    return result


def leaderboard(every: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """
    A table of scores files, the best `Avg` first; its first row are the names of the columns.

    Raises:
        ValueError: they are not of the same problems, or do not say of which they are.
    """
    check_same_problems(every)
    classes = [name for name in CLASSES if any(scores["accuracy"][name] is not None for scores in every.values())]
    table = [["system", "n", *classes, "Avg, 95 %"]]
    for name, scores in sorted(every.items(), key=lambda item: -item[1]["accuracy"]["Avg"]):
        interval = scores["intervals"]["accuracy"]["Avg"]
        cells = [two_places(scores["accuracy"][column]) for column in classes]
        table.append([name, str(scores["n"]), *cells, "–".join(map(two_places, interval)) if interval else "-"])
    return table


def check_same_problems(every: Mapping[str, Mapping[str, Any]]) -> None:
    for name, scores in every.items():
        if scores.get("problems") is None or scores.get("problems_digest") is None:
            raise ValueError(f"{name} does not say which problems it is of: score its predictions again.")
    for (first, one), (name, other) in itertools.combinations(every.items(), 2):
        if one["problems"] != other["problems"]:
            raise ValueError(
                f"{name} is of other problems ({other['n']}) than {first} ({one['n']}): scores of different splits or "
                f"subsets cannot stand in one table."
            )
        differing = differing_parts(one["problems_digest"], other["problems_digest"])
        if differing:
            raise ValueError(
                f"{name} ({other.get('dataset')}) is of problems with other {' and other '.join(differing)} than "
                f"{first} ({one.get('dataset')}), though their ids are the same: they cannot stand in one table."
            )


def two_places(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
