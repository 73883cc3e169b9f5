"""Reads predictions files, checks them, and matches them with the problems that they answer.

`metrics.py` computes the scores.
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
    Read a predictions file, `{id: {column: value}}`, or a file `{id: answer}` of any system.

    Returns:
        The predicted columns by problem id.

    Raises:
        ValueError: the file is absent, not JSON or not a predictions file; an id occurs more than once; or the meta
            file beside it belongs to other predictions.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such predictions file; `python -m mmcot.predict … --output FILE` writes one")
    predictions = read_json(path)
    check_unique_ids(Path(path))
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


def check_unique_ids(path: Path) -> None:
    """Raise an error for a repeated id: JSON allows it, and the last value would silently replace the others."""
    pairs: list[list[tuple[str, Any]]] = []

    def record_pairs(object_pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs.append(object_pairs)
        return dict(object_pairs)

    json.loads(path.read_bytes(), object_pairs_hook=record_pairs)
    repeated = [name for name, count in Counter(name for name, _ in pairs[-1]).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: {len(repeated)} ids occur more than once: {first_few(repeated)}")


def load_answered_problems(dataset: str | Given, split: str, **reading: Any) -> Dataset:
    """
    Load the problems of a split, and require that each has a known answer.

    Args:
        reading: keyword arguments of `load_problems`.
    """
    problems = load_scored_problems(dataset, split, **reading)
    require_answers(problems)
    return problems


def load_scored_problems(dataset: str | Given, split: str, **reading: Any) -> Dataset:
    """Load the problems of a split with all pictures; if a picture file is absent, with picture paths only."""
    try:
        return load_problems(dataset, split, **reading)
    except ValueError:  # any error other than an absent picture occurs again when loading without picture files
        return load_problems(dataset, split, pictures=False, **reading)


def read_matching_predictions(
    file: str, problems: Dataset, allow_missing: bool, arguments: argparse.Namespace, pictures: bool = True
) -> Predictions:
    """
    Read the predictions for exactly these problems.

    Args:
        allow_missing: count a problem without a prediction as wrong, instead of raising an error.
        pictures: require that the predictions were made from the same pictures.

    Raises:
        ValueError: ids are missing or surplus (the message names the split that surplus ids belong to), or the
            predictions were made for other problems with the same ids.
    """
    predictions = read_predictions(file)
    surplus = set(predictions) - set(problems["id"])
    for split in SPLITS if surplus else ():
        if split != arguments.split and surplus <= set(split_ids(arguments, split)):
            raise ValueError(f"{len(surplus)} predictions belong to the split {split!r}, not to {arguments.split!r}")
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
    except ValueError:  # the split is absent or broken, so the predictions cannot belong to it
        return []


def submission(problems: Dataset, predictions: Predictions) -> dict[str, dict[str, str]]:
    """Return predictions in A-OKVQA's format: the chosen choice's text by id (allenai/aokvqa, README, Evaluation)."""
    check_same_ids(problems["id"], predictions)
    answers = checked_answers(problems, predictions)
    return {row["id"]: {"multiple_choice": row["choices"][answers[row["id"]]]} for row in problems}


def evaluate(predictions_file: str | Path, dataset: str | Given, split: str) -> dict[str, Any]:
    """Score a predictions file against the gold columns of a split of a dataset, as `metrics.score` does."""
    predictions, problems = read_predictions(predictions_file), load_answered_problems(dataset, split)
    scores = score(problems, predictions)
    check_problems(Path(predictions_file), predictions, problems, dataset)
    return scores
