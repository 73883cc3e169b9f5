"""The figures of the field: accuracy by class of problem, BLEU-1, BLEU-4 and ROUGE-L of rationales, all in percent; how
sure they are, and how well the choices' probabilities are calibrated.

Notable: a class without problems scores None, never 0; BLEU and ROUGE come from nltk and the package `rouge`, called as
the original's metric code calls them, so that figures can be set beside published ones.
Not here: reading files and printing (evaluate.py), choosing an answer (pipeline_mmcot.py), the model.
"""

import hashlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nltk.translate.bleu_score import sentence_bleu
from rouge import Rouge

from mmcot.evaluation.uncertainty import calibration, mean_interval

# A row of the problem schema (DESIGN section 4); `Problems` is a datasets.Dataset or a list of such rows.
Problem = Mapping[str, Any]
Problems = Collection[Problem]

GRADES_1_TO_6 = {f"grade{number}" for number in range(1, 7)}
GRADES_7_TO_12 = {f"grade{number}" for number in range(7, 13)}

# The classes of ScienceQA's result tables, in their order. They overlap: a problem counts in each that it belongs to.
CLASSES: dict[str, Callable[[Problem], bool]] = {
    "NAT": lambda problem: problem["subject"] == "natural science",
    "SOC": lambda problem: problem["subject"] == "social science",
    "LAN": lambda problem: problem["subject"] == "language science",
    "TXT": lambda problem: bool(problem["context"]),
    "IMG": lambda problem: bool(problem["images"]),
    "NO": lambda problem: not problem["context"] and not problem["images"],
    "G1-6": lambda problem: problem["grade"] in GRADES_1_TO_6,
    "G7-12": lambda problem: problem["grade"] in GRADES_7_TO_12,
    "Avg": lambda problem: True,
}

UNREADABLE = -1

# The paper's targets open the rationale with this cue, so generated ones do too; the gold column `solution` does not.
RATIONALE_CUE = "Solution:"


def class_sizes(problems: Problems) -> dict[str, int]:
    """Number of problems in each class."""
    sizes = dict.fromkeys(CLASSES, 0)
    for problem in problems:
        for name in _classes_of(problem):
            sizes[name] += 1
    return sizes


def right_by_class(problems: Problems, answers: Mapping[str, int]) -> dict[str, list[bool]]:
    """Of each problem of a class, in their order, whether its answer is right; `answers` has every problem's id."""
    right: dict[str, list[bool]] = {name: [] for name in CLASSES}
    for problem in problems:
        for name in _classes_of(problem):
            # -1 is "no answer" in a prediction and "unknown" in a problem: the two together are not a right answer.
            right[name].append(problem["answer"] == answers[problem["id"]] >= 0)
    return right


def accuracy(problems: Problems, answers: Mapping[str, int]) -> dict[str, float | None]:
    """Percentage of right answers by class; `answers` (id -> index, -1 = none) has every problem's id."""
    return {name: percentage(right) for name, right in right_by_class(problems, answers).items()}


def percentage(right: Sequence[bool]) -> float | None:
    return 100 * sum(right) / len(right) if right else None


def accuracy_intervals(problems: Problems, answers: Mapping[str, int]) -> dict[str, list[float] | None]:
    """95 % bootstrap intervals of `accuracy`, over problems."""
    intervals = {}
    for name, right in right_by_class(problems, answers).items():
        interval = mean_interval(right)
        intervals[name] = None if interval is None else [100 * bound for bound in interval]
    return intervals


def rationale_scores(problems: Problems, rationales: Mapping[str, str]) -> dict[str, float | None]:
    """
    BLEU-1, BLEU-4 and ROUGE-L of `rationales` (by id) against `solution`, over pairs where both texts have words.

    Where a problem has several gold `rationales` (A-OKVQA's three), BLEU takes all of them as references, as it is
    defined to, and ROUGE-L is that of the nearest.
    """
    pairs = rationale_pairs(problems, rationales)
    return {
        "bleu1": _mean_percent([_bleu(golds, generated, (1.0,)) for golds, generated in pairs]),
        "bleu4": _mean_percent([_bleu(golds, generated, (0.25,) * 4) for golds, generated in pairs]),
        "rougeL": _mean_percent([max(_rouge_l(gold, generated) for gold in golds) for golds, generated in pairs]),
    }


def rationale_pairs(problems: Problems, rationales: Mapping[str, str]) -> list[tuple[list[str], str]]:
    """Of each problem the gold rationales and the one that was written, where both have words."""
    pairs = [
        ([gold for gold in _gold_rationales(problem) if words(gold)], _without_cue(rationales[problem["id"]]))
        for problem in problems
        if problem["id"] in rationales
    ]
    return [(golds, generated) for golds, generated in pairs if golds and words(generated)]


def score(problems: Problems, predictions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The scores file (DESIGN section 4) of a predictions file: `accuracy`, `rationale`, `n`, and what they stand on.

    Predictions with a `decoded_answer` add `decoded_accuracy`: the paper's way, where an answer that cannot be
    read (-1) is wrong. Predictions without rationales have None for each rationale score, those without `scores` for
    `calibration`.

    `intervals` are those of both accuracies, `class_n` the problems of each class, `problems` tells one set of problems
    from another.
    """
    check_same_ids([problem["id"] for problem in problems], predictions)
    answers = checked_answers(problems, predictions)
    scores: dict[str, Any] = {"accuracy": accuracy(problems, answers)}
    intervals = {"accuracy": accuracy_intervals(problems, answers)}
    if any("decoded_answer" in prediction for prediction in predictions.values()):
        decoded = checked_answers(problems, predictions, "decoded_answer")
        scores["decoded_accuracy"] = accuracy(problems, decoded)
        intervals["decoded_accuracy"] = accuracy_intervals(problems, decoded)
    return scores | {
        "rationale": rationale_scores(problems, rationales_of(predictions)),
        "n": len(problems),
        "class_n": class_sizes(problems),
        "intervals": intervals,
        "calibration": _calibration(problems, predictions),
        "problems": problems_key(problems),
    }


def score_by(
    problems: Problems, predictions: Mapping[str, Mapping[str, Any]], columns: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """
    By column and by its classes, in their order, `n` problems, their `accuracy` in percent and its 95 % `interval`. An
    empty text is the class `(none)`.

    Raises:
        ValueError: problems have no such column of texts.
    """
    answers, rows = checked_answers(problems, predictions), list(problems)
    return {column: _scores_of_classes(rows, answers, column) for column in columns}


def _scores_of_classes(problems: Sequence[Problem], answers: Mapping[str, int], column: str) -> dict[str, Any]:
    right: dict[str, list[bool]] = {}
    for problem in problems:
        if not isinstance(problem.get(column), str):
            known = ", ".join(name for name, value in problem.items() if isinstance(value, str))
            raise ValueError(f"--by {column}: problems have no such column of texts; known: {known}")
        right.setdefault(problem[column] or "(none)", []).append(problem["answer"] == answers[problem["id"]] >= 0)
    found = {}
    for name in sorted(right):
        interval = mean_interval(right[name])
        bounds = None if interval is None else [100 * bound for bound in interval]
        found[name] = {"n": len(right[name]), "accuracy": percentage(right[name]), "interval": bounds}
    return found


def problems_key(problems: Problems) -> str:
    """Tells a set of problems from another, by their ids and right answers."""
    rows = sorted((problem["id"], problem["answer"]) for problem in problems)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _calibration(problems: Problems, predictions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Over the problems with choices, where all of them have `scores`."""
    scores, answers = [], []
    for problem in problems:
        if problem["choices"] and "missing" not in predictions[problem["id"]]:
            row = predictions[problem["id"]].get("scores")
            if row is None:
                return None
            _check_scores(problem, row)
            scores.append(row)
            answers.append(problem["answer"])
    return calibration(scores, answers) if scores else None


def _check_scores(problem: Problem, scores: Any) -> None:
    id_, num_choices = problem["id"], len(problem["choices"])
    if not isinstance(scores, list) or len(scores) != num_choices:
        raise ValueError(f"prediction {id_}: 'scores' is {scores!r}, expected {num_choices} probabilities")
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in scores) or abs(sum(scores) - 1) > 1e-3:
        raise ValueError(f"prediction {id_}: 'scores' is {scores!r}, expected probabilities that add up to 1")


def _classes_of(problem: Problem) -> list[str]:
    return [name for name, belongs in CLASSES.items() if belongs(problem)]


def check_same_ids(problem_ids: Collection[str], prediction_ids: Collection[str]) -> None:
    missing = sorted(set(problem_ids) - set(prediction_ids))
    unknown = sorted(set(prediction_ids) - set(problem_ids))
    if missing or unknown:
        raise ValueError(
            f"predictions and problems are not of the same ids ({len(prediction_ids)} predictions, "
            f"{len(problem_ids)} problems): {_some_of(missing)} without a prediction, "
            f"{_some_of(unknown)} without a problem"
        )


def _some_of(ids: list[str], shown: int = 5) -> str:
    return f"{len(ids)} ({', '.join(ids[:shown])}{', …' if len(ids) > shown else ''})" if ids else "0"


def checked_answers(
    problems: Problems, predictions: Mapping[str, Mapping[str, Any]], key: str = "answer"
) -> dict[str, int]:
    """The answers under `key` by id, each an index of its problem's choices, or -1 where that may be."""
    answers = {}
    for problem in problems:
        id_, num_choices = problem["id"], len(problem["choices"])
        answer = predictions[id_].get(key)
        # Choices are scored, so with choices there is always an answer; only a decoded one can be unreadable.
        may_be_none = key == "decoded_answer" or not num_choices or "missing" in predictions[id_]
        lowest = UNREADABLE if may_be_none else 0
        if type(answer) is not int or not lowest <= answer < num_choices:
            raise ValueError(
                f"prediction {id_}: {key!r} is {answer!r}, expected an integer from {lowest} to {num_choices - 1} "
                f"({num_choices} choices)"
            )
        answers[id_] = answer
    return answers


def rationales_of(predictions: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    rationales = {id_: prediction["rationale"] for id_, prediction in predictions.items() if "rationale" in prediction}
    for id_, rationale in rationales.items():
        if not isinstance(rationale, str):
            raise ValueError(f"prediction {id_}: 'rationale' is {rationale!r}, expected a text")
    return rationales


def _gold_rationales(problem: Problem) -> list[str]:
    return problem.get("rationales") or [problem["solution"]]


def _without_cue(rationale: str) -> str:
    return rationale.strip().removeprefix(RATIONALE_CUE).strip()


def words(text: str) -> list[str]:
    """Split at white space and full stops, as the original does; decimal numbers come apart too."""
    return [word for word in re.split(r"\s|\.", text) if word]


def _mean_percent(values: list[float]) -> float | None:
    return 100 * sum(values) / len(values) if values else None


def _bleu(golds: list[str], generated: str, weights: tuple[float, ...]) -> float:
    with warnings.catch_warnings():
        # A pair without a common n-gram scores 0; that is a result, not something to warn of once per pair.
        warnings.filterwarnings("ignore", message=r"\s*The hypothesis contains 0 counts")
        return sentence_bleu([words(gold) for gold in golds], words(generated), weights)


def _rouge_l(gold: str, generated: str) -> float:
    # The gold text goes in as the *hypothesis*: so does the original, and in this package the order changes the score.
    with _room_to_recurse(len(words(gold)) + len(words(generated))):
        return Rouge(metrics=["rouge-l"]).get_scores(gold, generated)[0]["rouge-l"]["f"]


@contextmanager
def _room_to_recurse(depth: int) -> Iterator[None]:
    """Raise the recursion limit: package rouge calls itself once per word, and a text may have more than 1,000."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
