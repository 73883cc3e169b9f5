"""Detects leaks of gold text into predictions: predicts with changed gold columns, or measures text overlap.

This module runs no model itself; its caller passes the function that predicts. Text overlap needs only a predictions
file, and is reported as a warning: a rationale can resemble gold because it is right.
"""

import difflib
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

from mmcot.evaluation.metrics import Problems, rationale_pairs, words
from mmcot.problems.schema import FEATURES

# Maximum number of other problems whose gold rationales a rationale is compared with.
NUM_OTHERS = 5
# A warning is given when the overlap with a problem's own gold reaches MIN_OVERLAP and exceeds the overlap with other
# problems' gold by MIN_MARGIN.
MIN_OVERLAP, MIN_MARGIN = 0.9, 0.2

GARBAGE = "The answer is (A). zzz"


def find_leaks(problems: Dataset, predict_all: Callable[[Dataset], dict[str, dict]]) -> dict[str, list[str]]:
    """
    Find the problems whose predictions change when their gold columns change.

    Args:
        predict_all: maps problems to predictions by id. The problems have gold columns, which it must not use.

    Returns:
        For each such problem, the names of the predicted columns that change.
    """
    original, changed = predict_all(problems), predict_all(problems.map(with_garbage, features=FEATURES))
    leaks = {}
    for problem_id, columns in original.items():
        other = changed[problem_id]
        differing = sorted(name for name in columns | other if columns.get(name) != other.get(name))
        if differing:
            leaks[problem_id] = differing
    return leaks


def with_garbage(problem: dict[str, Any]) -> dict[str, Any]:
    """Replace the gold answer with another choice and all gold texts with garbage."""
    choices = problem["choices"]
    return {
        **problem,
        "answer": (problem["answer"] + 1) % len(choices) if choices else 0,
        "lecture": GARBAGE,
        "solution": GARBAGE,
        "rationales": [GARBAGE],
        "direct_answers": [GARBAGE],
        "observation": GARBAGE,
        "gold_passages": [GARBAGE],
    }


def gold_overlap(problems: Problems, rationales: Mapping[str, str]) -> dict[str, float] | None:
    """
    Measure how much of the gold rationales the generated rationales repeat verbatim.

    Overlap is the longest common run of words divided by the number of gold words.

    Returns:
        `own`, the mean overlap with each problem's own gold; `others`, the mean overlap with gold of other problems of
        the same skill; `n`, the number of problems for which both exist. None if there are no such problems.
    """
    pairs = {problem["id"]: pair for problem in problems for pair in rationale_pairs([problem], rationales)}
    by_skill: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        if problem["id"] in pairs:
            by_skill[problem["skill"]].append(problem["id"])
    own, others = [], []
    for problem in problems:
        if problem["id"] not in pairs:
            continue
        golds, generated = pairs[problem["id"]]
        neighbours = [id_ for id_ in by_skill[problem["skill"]] if pairs[id_][0] != golds][:NUM_OTHERS]
        if neighbours:
            own.append(max(overlap_share(gold, generated) for gold in golds))
            others.append(sum(overlap_share(pairs[id_][0][0], generated) for id_ in neighbours) / len(neighbours))
    if not own:
        return None
    return {"own": sum(own) / len(own), "others": sum(others) / len(others), "n": len(own)}


def overlap_share(gold: str, generated: str) -> float:
    """Return the length of the longest common run of words divided by the number of gold words."""
    gold_words, generated_words = words(gold), words(generated)
    matcher = difflib.SequenceMatcher(None, gold_words, generated_words, autojunk=False)
    return matcher.find_longest_match().size / len(gold_words)


def overlap_warnings(overlap: dict[str, float] | None) -> list[str]:
    """Return a warning if the overlap is suspiciously high, else an empty list."""
    if overlap is None or overlap["own"] < MIN_OVERLAP or overlap["own"] - overlap["others"] < MIN_MARGIN:
        return []
    return [
        f"warning: rationales copy {100 * overlap['own']:.0f} % of the words of their own gold rationales in one "
        f"sequence, and {100 * overlap['others']:.0f} % of those of other problems of the same skill "
        f"({overlap['n']} problems). Either the model is that good, or it saw gold text: check with "
        f"`mmcot.predict --leak_check`."
    ]
