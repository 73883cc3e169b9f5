"""Scores of predictions: accuracy by class of problem, BLEU-1, BLEU-4 and ROUGE-L of rationales, all in percent, with
confidence intervals and the calibration of the choices' probabilities.

A class without problems scores None, never 0. BLEU and ROUGE come from nltk and the package `rouge`, called as in the
original's metric code, so that scores are comparable with published ones.
Reading files and printing are in `predictions.py` and `evaluate.py`.
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

from .uncertainty import calibration, mean_interval

# A row of the schema (`problems/schema.py`); `Problems` is a `datasets.Dataset` or a list of such rows.
Problem = Mapping[str, Any]
Problems = Collection[Problem]

GRADES_1_TO_6 = {f"grade{number}" for number in range(1, 7)}
GRADES_7_TO_12 = {f"grade{number}" for number in range(7, 13)}

# The classes of ScienceQA's result tables, in their order. They overlap: a problem counts in each of its classes.
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

# The paper's targets begin with this cue, so generated rationales do too; the gold column `solution` does not.
RATIONALE_CUE = "Solution:"


def class_sizes(problems: Problems) -> dict[str, int]:
    """Return the number of problems in each class."""
    sizes = dict.fromkeys(CLASSES, 0)
    for problem in problems:
        for name in _classes_of(problem):
            sizes[name] += 1
    return sizes


def right_by_class(problems: Problems, answers: Mapping[str, int]) -> dict[str, list[bool]]:
    """Return for each class whether each answer is right, in the order of `problems`; every id must be in `answers`."""
    right: dict[str, list[bool]] = {name: [] for name in CLASSES}
    for problem in problems:
        for name in _classes_of(problem):
            # -1 means "no answer" in a prediction and "unknown" in a problem; a match of the two is not a right answer.
            right[name].append(problem["answer"] == answers[problem["id"]] >= 0)
    return right


def accuracy(problems: Problems, answers: Mapping[str, int]) -> dict[str, float | None]:
    """Return the percentage of right answers by class. `answers` maps every problem's id to an index (-1 = none)."""
    return {name: percentage(right) for name, right in right_by_class(problems, answers).items()}


def percentage(right: Sequence[bool]) -> float | None:
    return 100 * sum(right) / len(right) if right else None


def accuracy_intervals(problems: Problems, answers: Mapping[str, int]) -> dict[str, list[float] | None]:
    """Return 95 % bootstrap intervals of `accuracy` over problems, in percent."""
    intervals = {}
    for name, right in right_by_class(problems, answers).items():
        interval = mean_interval(right)
        intervals[name] = None if interval is None else [100 * bound for bound in interval]
    return intervals


def rationale_scores(problems: Problems, rationales: Mapping[str, str]) -> dict[str, float | None]:
    """
    Return BLEU-1, BLEU-4 and ROUGE-L in percent of `rationales` (by id) against `solution`.

    Only pairs in which both texts contain words are scored. If a problem has several gold `rationales` (A-OKVQA has
    three), BLEU uses all of them as references, as defined for it, and ROUGE-L uses the best-matching one.
    """
    pairs = rationale_pairs(problems, rationales)
    return {
        "bleu1": _mean_percent([_bleu(golds, generated, (1.0,)) for golds, generated in pairs]),
        "bleu4": _mean_percent([_bleu(golds, generated, (0.25,) * 4) for golds, generated in pairs]),
        "rougeL": _mean_percent([max(_rouge_l(gold, generated) for gold in golds) for golds, generated in pairs]),
    }


def rationale_pairs(problems: Problems, rationales: Mapping[str, str]) -> list[tuple[list[str], str]]:
    """Return each problem's gold rationales and generated rationale, where both contain words."""
    pairs = [
        ([gold for gold in _gold_rationales(problem) if words(gold)], _without_cue(rationales[problem["id"]]))
        for problem in problems
        if problem["id"] in rationales
    ]
    return [(golds, generated) for golds, generated in pairs if golds and words(generated)]


def score(problems: Problems, predictions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """
    Return the scores of predictions, the part of a scores file that depends only on problems and predictions.

    Returns:
        `accuracy` by class; `decoded_accuracy`, the paper's metric, which counts an unreadable answer (-1) as wrong,
        only if predictions have a `decoded_answer`; `check`, only if a stage checked answers (`check_scores`);
        `rationale`, with None for each score if there are no rationales; `n`, the number of problems; `class_n`, that
        of each class; `intervals` of both accuracies; `calibration`, None without `scores`; and `problems`, an
        identifier of the set of problems.
    """
    check_same_ids([problem["id"] for problem in problems], predictions)
    answers = checked_answers(problems, predictions)
    scores: dict[str, Any] = {"accuracy": accuracy(problems, answers)}
    intervals = {"accuracy": accuracy_intervals(problems, answers)}
    if any("decoded_answer" in prediction for prediction in predictions.values()):
        decoded = checked_answers(problems, predictions, "decoded_answer")
        scores["decoded_accuracy"] = accuracy(problems, decoded)
        intervals["decoded_accuracy"] = accuracy_intervals(problems, decoded)
    check = check_scores(problems, predictions)
    return (
        scores
        | ({} if check is None else {"check": check})
        | {
            "rationale": rationale_scores(problems, rationales_of(predictions)),
            "n": len(problems),
            "class_n": class_sizes(problems),
            "intervals": intervals,
            "calibration": _calibration(problems, predictions),
            "problems": problems_key(problems),
        }
    )


def check_scores(problems: Problems, predictions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """
    Return the effect of a stage that checks answers. None if no prediction has a verdict, or if answers are those of
    several rationales, which belong to several verdicts.

    Returns:
        `n`, the number of problems with a verdict; `sent_back`, the number of those with the verdict "wrong"; in
        percent, `accuracy_before` and `accuracy_after` they were sent back, and `verdict_accuracy`.
    """
    checked = [problem for problem in problems if has_verdict(predictions[problem["id"]])]
    if not checked or any("agreement" in predictions[problem["id"]] for problem in checked):
        return None
    after = {problem["id"]: predictions[problem["id"]] for problem in checked}
    before = {name: columns.get("rejected", columns) for name, columns in after.items()}
    right_before, right_after = (
        right_by_class(checked, checked_answers(checked, columns))["Avg"] for columns in (before, after)
    )
    is_kept = ["rejected" not in columns for columns in after.values()]
    return {
        "n": len(checked),
        "sent_back": is_kept.count(False),
        "accuracy_before": percentage(right_before),
        "accuracy_after": percentage(right_after),
        "verdict_accuracy": percentage([right == kept for right, kept in zip(right_before, is_kept, strict=True)]),
    }


def has_verdict(prediction: Mapping[str, Any]) -> bool:
    """Whether a stage checked the answer: it writes "right" or "wrong" into a column, and COLUMN`_score`."""
    return any(f"{name}_score" in prediction and text in ("right", "wrong") for name, text in prediction.items())


def score_by(
    problems: Problems, predictions: Mapping[str, Mapping[str, Any]], columns: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Return scores grouped by the values of columns.

    Returns:
        For each column and each of its values, in sorted order: the number `n` of problems, `accuracy` in percent and
        its 95 % `interval`. An empty text is the class `(none)`.

    Raises:
        ValueError: the problems have no text column of that name.
    """
    answers, rows = checked_answers(problems, predictions), list(problems)
    return {column: _scores_of_classes(rows, answers, column) for column in columns}


def _scores_of_classes(problems: Sequence[Problem], answers: Mapping[str, int], column: str) -> dict[str, Any]:
    right: dict[str, list[bool]] = {}
    for problem in problems:
        if not isinstance(problem.get(column), str):
            known = ", ".join(name for name, value in problem.items() if isinstance(value, str))
            raise ValueError(f"--by {column}: problems have no text column of that name; text columns: {known}")
        right.setdefault(problem[column] or "(none)", []).append(problem["answer"] == answers[problem["id"]] >= 0)
    scores = {}
    for name in sorted(right):
        interval = mean_interval(right[name])
        bounds = None if interval is None else [100 * bound for bound in interval]
        scores[name] = {"n": len(right[name]), "accuracy": percentage(right[name]), "interval": bounds}
    return scores


def problems_key(problems: Problems) -> str:
    """Return an identifier of a set of problems, a digest of their ids and right answers."""
    rows = sorted((problem["id"], problem["answer"]) for problem in problems)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _calibration(problems: Problems, predictions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the calibration over problems with choices; None if any of their predictions has no `scores`."""
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
            f"predictions and problems have different ids ({len(prediction_ids)} predictions, "
            f"{len(problem_ids)} problems): {_some_of(missing)} without a prediction, "
            f"{_some_of(unknown)} without a problem"
        )


def _some_of(ids: list[str], shown: int = 5) -> str:
    return f"{len(ids)} ({', '.join(ids[:shown])}{', …' if len(ids) > shown else ''})" if ids else "0"


def checked_answers(
    problems: Problems, predictions: Mapping[str, Mapping[str, Any]], key: str = "answer"
) -> dict[str, int]:
    """Return the answers under `key` by id, each checked to be an index of the choices, or -1 where that is allowed."""
    answers = {}
    for problem in problems:
        id_, num_choices = problem["id"], len(problem["choices"])
        answer = predictions[id_].get(key)
        # Scoring the choices always gives an answer; only a decoded answer can be unreadable.
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
    """Split at white space and full stops, as the original does. This splits decimal numbers too."""
    return [word for word in re.split(r"\s|\.", text) if word]


def _mean_percent(values: list[float]) -> float | None:
    return 100 * sum(values) / len(values) if values else None


def _bleu(golds: list[str], generated: str, weights: tuple[float, ...]) -> float:
    with warnings.catch_warnings():
        # A pair without a common n-gram scores 0: a valid result that needs no warning.
        warnings.filterwarnings("ignore", message=r"\s*The hypothesis contains 0 counts")
        return sentence_bleu([words(gold) for gold in golds], words(generated), weights)


def _rouge_l(gold: str, generated: str) -> float:
    # As in the original, the gold text is passed as the *hypothesis*; in this package the order changes the score.
    with _room_to_recurse(len(words(gold)) + len(words(generated))):
        return Rouge(metrics=["rouge-l"]).get_scores(gold, generated)[0]["rouge-l"]["f"]


@contextmanager
def _room_to_recurse(depth: int) -> Iterator[None]:
    """Raise the recursion limit: package `rouge` recurses once per word, and texts can have more than 1,000 words."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
