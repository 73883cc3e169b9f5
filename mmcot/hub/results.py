"""Scores on the Hub's own terms: `.eval_results/*.yaml`, `model-index`, and the scores file that a repository brings.

The Hub builds leaderboards only for benchmarks that it lists, and ScienceQA is none of them: `mmcot.evaluate
--leaderboard` makes tables of our own. What a score is stands in `metrics.py`; who publishes them is `card.py`.
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
    The scores of a scores file, a finished run, a folder in the Hub's layout, or a repository.

    Raises:
        ValueError: there is none, or it is not one of this version.
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
        raise ValueError(f"{path}: there is no such scores file")
    scores = read_json(path)
    if not isinstance(scores.get("accuracy"), dict) or "intervals" not in scores:
        raise ValueError(f"{path}: not a scores file; `python -m mmcot.evaluate` writes one")
    return scores


def eval_entries(scores: dict[str, Any], dataset_id: str, notes: str) -> list[EvalResultEntry]:
    """The accuracy over all problems, and the decoded one where there is one, in percent, on a dataset of the Hub."""
    found = {"default": scores["accuracy"]["Avg"], "decoded_answer": scores.get("decoded_accuracy", {}).get("Avg")}
    return [
        EvalResultEntry(dataset_id, task, round(value, 2), notes=notes)
        for task, value in found.items()
        if value is not None
    ]


def write_eval_results(file: Path, entries: list[EvalResultEntry]) -> None:
    """`.eval_results/NAME.yaml`, found good by the library's own parser."""
    data = eval_result_entries_to_yaml(entries)
    if parse_eval_result_entries(data) != entries:
        raise ValueError(f"{file}: the Hub's parser reads other results than were written")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def eval_results(scores: dict[str, Any], dataset_type: str, split: str) -> list[EvalResult]:
    """What makes a card's `model-index`: accuracy by class, and the rationales' scores."""
    names = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
    figures = {f"accuracy, {names.get(name, name)}": ("accuracy", scores["accuracy"][name]) for name in CLASSES}
    figures |= {name: (name, value) for name, value in scores["rationale"].items()}
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
        for name, (metric, value) in figures.items()
        if value is not None
    ]
