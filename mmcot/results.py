"""Scores on the Hub's own terms: `.eval_results/*.yaml`, `model-index`, and the scores file that a repository brings.

The Hub builds leaderboards only for benchmarks that it lists, and ScienceQA is none of them: `mmcot.evaluate
--leaderboard` makes tables of our own. What a score is stands in `metrics.py`.

    python -m mmcot.results SCORES RUN/hub --dataset_id derek-thomas/ScienceQA --split test [--revision COMMIT]

puts the scores into a folder that goes to the Hub.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    eval_result_entries_to_yaml,
    metadata_load,
    metadata_save,
    parse_eval_result_entries,
)
from huggingface_hub.repocard_data import eval_results_to_model_index
from transformers.utils import cached_file

from mmcot.files import read_json
from mmcot.metrics import CLASSES

SCORES_FILE = "scores.json"  # in a repository, at its root


def scores_of(name: str) -> dict[str, Any]:
    """
    The scores of a scores file, a finished run, a folder in the Hub's layout, or a repository.

    Raises:
        ValueError: there is none, or it is not one of this version.
    """
    path = Path(name)
    if path.is_dir():
        files = (path / SCORES_FILE, path / "scores" / "test.json", path / "scores" / "val.json")
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


def eval_entries(
    scores: dict[str, Any],
    dataset_id: str,
    revision: str | None = None,
    date: str | None = None,
    notes: str | None = None,
) -> list[EvalResultEntry]:
    """
    The accuracy over all problems, and the decoded one where there is one, in percent.

    Args:
        dataset_id, revision: of the Hub's dataset.
        date: of the evaluation, ISO 8601.
    """
    found = {"default": scores["accuracy"]["Avg"], "decoded_answer": scores.get("decoded_accuracy", {}).get("Avg")}
    return [
        EvalResultEntry(dataset_id, task, round(value, 2), dataset_revision=revision, date=date, notes=notes)
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


def model_index(
    scores: dict[str, Any], model_name: str, dataset_id: str, split: str, revision: str | None = None
) -> list[dict[str, Any]]:
    """The `model-index` of a model card: accuracy by class, and the rationales' scores."""
    names = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
    figures = {f"accuracy, {names.get(name, name)}": ("accuracy", scores["accuracy"][name]) for name in CLASSES}
    figures |= {name: (name, value) for name, value in scores["rationale"].items()}
    results = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=dataset_id,
            dataset_name=dataset_id.split("/")[-1],
            dataset_split=split,
            dataset_revision=revision,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 2),
        )
        for name, (metric, value) in figures.items()
        if value is not None
    ]
    return eval_results_to_model_index(model_name, results)


def publish(
    scores_file: Path, folder: Path, dataset_id: str, split: str, revision: str | None = None, date: str | None = None
) -> None:
    """The scores into a folder in the Hub's layout: as they are, as the Hub's results, in its card's metadata."""
    scores, card = scores_of(str(scores_file)), folder / "README.md"
    if not card.is_file():
        raise ValueError(f"{folder} has no README.md; expected a folder in the Hub's layout, as RUN/hub")
    notes = f"{split}, {scores['n']} problems"
    entries = eval_entries(scores, dataset_id, revision, date, notes)
    write_eval_results(folder / ".eval_results" / f"{dataset_id.replace('/', '--')}.yaml", entries)
    index = model_index(scores, folder.resolve().parent.name, dataset_id, split, revision)
    metadata_save(card, {**(metadata_load(card) or {}), "model-index": index})
    shutil.copyfile(scores_file, folder / SCORES_FILE)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmcot.results", description=__doc__.splitlines()[0])
    parser.add_argument("scores", type=Path, metavar="SCORES", help="a scores file of mmcot.evaluate")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="one that goes to the Hub, as RUN/hub")
    parser.add_argument("--dataset_id", required=True, help="the dataset's id on the Hub")
    parser.add_argument("--split", default="test")
    parser.add_argument("--revision", help="the dataset's commit")
    parser.add_argument("--date", help="of the evaluation, ISO 8601")
    arguments = parser.parse_args(argv)
    try:
        publish(
            arguments.scores,
            arguments.folder,
            arguments.dataset_id,
            arguments.split,
            arguments.revision,
            arguments.date,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
