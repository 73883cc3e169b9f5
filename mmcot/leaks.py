"""Whether gold text reaches what is predicted. By trying it, where the model is at hand; from the texts, as a hint.

Nothing is predicted here, and no verdict is given on texts: a rationale can be near to gold because it is right.
"""

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from mmcot.problems import FEATURES

GARBAGE = "The answer is (A). zzz"


def leaking(problems: Dataset, predict_all: Callable[[Dataset], dict[str, dict]]) -> dict[str, list[str]]:
    """
    The problems whose predictions change with their gold columns, each with the columns that do.

    Args:
        predict_all: the predictions of problems, by their ids; it is given the gold columns too, as it always is.
    """
    expected, found = predict_all(problems), predict_all(problems.map(with_garbage, features=FEATURES))
    leaks = {}
    for problem_id, columns in expected.items():
        other = found[problem_id]
        differing = sorted(name for name in columns | other if columns.get(name) != other.get(name))
        if differing:
            leaks[problem_id] = differing
    return leaks


def with_garbage(problem: dict[str, Any]) -> dict[str, Any]:
    """Another answer, and other texts in place of gold."""
    choices = problem["choices"]
    return {
        **problem,
        "answer": (problem["answer"] + 1) % len(choices) if choices else 0,
        "lecture": GARBAGE,
        "solution": GARBAGE,
        "rationales": [GARBAGE],
        "direct_answers": [GARBAGE],
    }
