"""Predictions files: read, checked, and matched with the problems that they answer.

Scores are computed in `metrics.py`.
"""

import argparse
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcot.evaluation.metrics import check_same_ids, checked_answers, score
from mmcot.problems.digests import check_problems
from mmcot.problems.opening import Given
from mmcot.problems.schema import SPLITS, first_few, require_answers
from mmcot.problems.sources import load_problems, reading_options
from mmcot.storage.files import read_json
from mmcot.storage.predictions import read_meta

logger = logging.getLogger(__name__)

Predictions = dict[str, dict[str, Any]]


def read_predictions(path: str | Path) -> Predictions:
    """
    A predictions file (DESIGN section 4), id -> what was predicted for that problem; or `{id: answer}` of any system.

    Raises:
        ValueError: it is not there, not JSON, or not such a file; an id stands there twice; the meta file beside it
            belongs to other predictions.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such predictions file; `python -m mmcot.predict … --output FILE` writes one")
    predictions = read_json(path)
    check_once(Path(path))
    read_meta(Path(path))
    for id_, prediction in predictions.items():
        if type(prediction) is int:
            predictions[id_] = {"answer": prediction}
        elif not isinstance(prediction, dict):
            raise ValueError(
                f"{path}: prediction {id_} is {prediction!r}, expected an object with the key 'answer', or the answer "
                f"itself"
            )
    return predictions


def check_once(path: Path) -> None:
    """JSON lets a key stand twice, and the last one wins silently."""
    pairs: list[list[tuple[str, Any]]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs.append(found)
        return dict(found)

    json.loads(path.read_bytes(), object_pairs_hook=keep)
    twice = [name for name, count in Counter(name for name, _ in pairs[-1]).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: {len(twice)} ids stand there twice: {first_few(twice)}")


def load_answered_problems(dataset: str | Given, split: str, **reading: Any) -> Dataset:
    """
    The problems of a split, all with a known answer: without it there is nothing to score against.

    Args:
        reading: of `load_problems`.
    """
    problems = load_scored_problems(dataset, split, **reading)
    require_answers(problems)
    return problems


def load_scored_problems(dataset: str | Given, split: str, **reading: Any) -> Dataset:
    """The problems of a split as the dataset gives them: every picture, or where one is absent their names alone."""
    try:
        return load_problems(dataset, split, **reading)
    except ValueError:  # what else is wrong, loading without the pictures' files finds too
        return load_problems(dataset, split, pictures=False, **reading)


def fitting(
    file: str, problems: Dataset, allow_missing: bool, arguments: argparse.Namespace, pictures: bool = True
) -> Predictions:
    """
    The predictions for just these problems; with `allow_missing` a problem without one is answered wrong, and without
    `pictures` they may have been predicted from others, or from none.

    Raises:
        ValueError: ids are missing or surplus; where the surplus ones are another split's, it is named. Or the
            predictions were made for other problems with the same ids.
    """
    predictions = read_predictions(file)
    surplus = set(predictions) - set(problems["id"])
    for split in SPLITS if surplus else ():
        if split != arguments.split and surplus <= set(split_ids(arguments, split)):
            raise ValueError(f"{len(surplus)} predictions are of the split {split!r}, not of {arguments.split!r}")
    missing = [problem_id for problem_id in problems["id"] if problem_id not in predictions]
    if surplus or not allow_missing:
        check_same_ids(problems["id"], predictions)
    check_problems(Path(file), predictions, problems, arguments.dataset, pictures)
    if missing:
        logger.warning("%d of %d problems have no prediction and count as wrong", len(missing), len(problems))
        wrong = {"answer": -1, "missing": True}
        if any("decoded_answer" in prediction for prediction in predictions.values()):
            wrong["decoded_answer"] = -1
        predictions |= dict.fromkeys(missing, wrong)
    return predictions


def split_ids(arguments: argparse.Namespace, split: str) -> list[str]:
    try:
        return load_problems(arguments.source, split, pictures=False, **reading_options(arguments))["id"]
    except ValueError:  # there is no such split, or it is broken: nothing of it can be meant
        return []


def submission(problems: Dataset, predictions: Predictions) -> dict[str, dict[str, str]]:
    """A-OKVQA's format: the chosen choice's text by question id (allenai/aokvqa, README, Evaluation)."""
    check_same_ids(problems["id"], predictions)
    answers = checked_answers(problems, predictions)
    return {row["id"]: {"multiple_choice": row["choices"][answers[row["id"]]]} for row in problems}


def evaluate(predictions_file: str | Path, dataset: str | Given, split: str) -> dict[str, Any]:
    """The scores (DESIGN section 4) of a predictions file against the gold columns of `split` of `dataset`."""
    predictions, problems = read_predictions(predictions_file), load_answered_problems(dataset, split)
    scores = score(problems, predictions)
    check_problems(Path(predictions_file), predictions, problems, dataset)
    return scores
