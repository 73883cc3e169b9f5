"""Scores in the Hub's formats: `.eval_results/*.yaml`, `model-index`, and the scores file of a repository.

The Hub builds leaderboards only for the benchmarks that it lists, and ScienceQA is not listed: `mmcot.evaluate
--leaderboard` creates its own tables. `mmcot/evaluation/metrics.py` defines the scores, `card.py` publishes them.
"""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    eval_result_entries_to_yaml,
    parse_eval_result_entries,
)
from transformers.utils import cached_file

from mmcot.evaluation.metrics import CLASSES
from mmcot.storage.files import read_json
from mmcot.storage.run_folder import RunFolder

SCORES_FILE = "scores.json"  # in a repository, at its root


def scores_of(name: str) -> dict[str, Any]:
    """
    Read the scores of a scores file, a finished run, a folder in the Hub's layout, or a repository.

    Raises:
        ValueError: there is no scores file, or another version wrote it.
    """
    path = Path(name)
    if path.is_dir():
        files = (path / SCORES_FILE, RunFolder(path).scores("test"), RunFolder(path).scores("val"))
        path = next((file for file in files if file.is_file()), path / SCORES_FILE)
    elif not path.is_file() and path.suffix != ".json":
        try:
            path = Path(cached_file(name, SCORES_FILE))
        except OSError as error:
            raise ValueError(f"{name}: neither a scores file nor a repository with {SCORES_FILE} ({error})") from error
    if not path.is_file():
        raise ValueError(f"{path}: this scores file does not exist")
    scores = read_json(path)
    if not isinstance(scores.get("accuracy"), dict) or "intervals" not in scores:
        raise ValueError(f"{path}: not a scores file; `python -m mmcot.evaluate` writes one")
    return scores


def eval_entries(scores: dict[str, Any], dataset_id: str, notes: str) -> list[EvalResultEntry]:
    """Return the accuracy over all problems and the decoded accuracy, if any, in percent, for a dataset on the Hub."""
    accuracies = {"default": scores["accuracy"]["Avg"], "decoded_answer": scores.get("decoded_accuracy", {}).get("Avg")}
    return [
        EvalResultEntry(dataset_id, task, round(value, 2), notes=notes)
        for task, value in accuracies.items()
        if value is not None
    ]


def write_eval_results(file: Path, entries: list[EvalResultEntry]) -> None:
    """Write `.eval_results/NAME.yaml`, checked with huggingface_hub's parser."""
    data = eval_result_entries_to_yaml(entries)
    if parse_eval_result_entries(data) != entries:
        raise ValueError(f"{file}: huggingface_hub's parser reads other results than were written")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def eval_results(scores: dict[str, Any], dataset_type: str, split: str) -> list[EvalResult]:
    """Return the results of a card's `model-index`: accuracy by class, and the scores of rationales."""
    names = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
    values = {f"accuracy, {names.get(name, name)}": ("accuracy", scores["accuracy"][name]) for name in CLASSES}
    values |= {name: (name, value) for name, value in scores["rationale"].items()}
    return [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=dataset_type,
            dataset_name=dataset_type.split("/")[-1],
            dataset_split=split,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 2),
        )
        for name, (metric, value) in values.items()
        if value is not None
    ]
