"""Whether gold text reaches what is predicted. By trying it, where the model is at hand; from the texts, as a hint.

Nothing is predicted here, and no verdict is given on texts: a rationale can be near to gold because it is right.
"""

import difflib
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

from mmcot.evaluation.metrics import Problems, rationale_pairs, words
from mmcot.problems.schema import FEATURES

# A rationale is compared with so many other problems' golds at most.
OTHERS = 5
# Rationales that share more of gold than this, and so much more than of other problems' golds, are told.
NEAR, NEARER = 0.9, 0.2

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


def suspicion(problems: Problems, rationales: Mapping[str, str]) -> dict[str, float] | None:
    """
    How much of gold stands in the rationales in one piece: the longest run of words that both have, as a share of
    gold's. `own` is the mean for each problem's own gold, `others` for the golds of other problems of the same skill,
    `n` the number of problems that have both. None where none has.
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
        neighbours = [id_ for id_ in by_skill[problem["skill"]] if pairs[id_][0] != golds][:OTHERS]
        if neighbours:
            own.append(max(shared(gold, generated) for gold in golds))
            others.append(sum(shared(pairs[id_][0][0], generated) for id_ in neighbours) / len(neighbours))
    if not own:
        return None
    return {"own": sum(own) / len(own), "others": sum(others) / len(others), "n": len(own)}


def shared(gold: str, generated: str) -> float:
    """The longest run of words that both have, as a share of gold's words."""
    gold_words, generated_words = words(gold), words(generated)
    matcher = difflib.SequenceMatcher(None, gold_words, generated_words, autojunk=False)
    return matcher.find_longest_match().size / len(gold_words)


def warnings_of(found: dict[str, float] | None) -> list[str]:
    """What there is to say of it: a warning, no verdict."""
    if found is None or found["own"] < NEAR or found["own"] - found["others"] < NEARER:
        return []
    return [
        f"warning: in one piece, rationales hold {100 * found['own']:.0f} % of the words of their own gold rationales, "
        f"and {100 * found['others']:.0f} % of those of other problems of the same skill ({found['n']} problems). They "
        f"may be that good; or gold text was there when they were decoded: try `mmcot.predict --leak_check`."
    ]
