"""From a predictions file to its scores: read, score, print a table, write the scores file.

    python -m mmcot.evaluate FILE --dataset PATH_OR_ID --split test [--output SCORES]
    python -m mmcot.evaluate FILE --dataset AOKVQA_DIR --split test --submission predictions_test.json

The second writes what A-OKVQA's leaderboard takes, of problems whose answers nobody here knows.
Not here: what the figures mean and how they are computed (metrics.py), and making predictions (predict.py).
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcot.files import read_json, write_json
from mmcot.metrics import CLASSES, check_same_ids, checked_answers, class_sizes, score
from mmcot.problems import SOURCES, load_problems, require_answers

RATIONALE_NAMES = {"bleu1": "BLEU-1", "bleu4": "BLEU-4", "rougeL": "ROUGE-L"}


def evaluate(predictions_file: str | Path, dataset: str, split: str) -> dict[str, Any]:
    """The scores (DESIGN section 4) of a predictions file against the gold columns of `split` of `dataset`."""
    predictions = read_predictions(predictions_file)
    return score(load_answered_problems(dataset, split), predictions)


def read_predictions(path: str | Path) -> dict[str, dict[str, Any]]:
    """A predictions file (DESIGN section 4): id -> what was predicted for that problem."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such predictions file; `python -m mmcot.predict … --output FILE` writes one")
    predictions = read_json(path)
    for id_, prediction in predictions.items():
        if not isinstance(prediction, dict):
            raise ValueError(f"{path}: prediction {id_} is {prediction!r}, expected an object with the key 'answer'")
    return predictions


def load_answered_problems(dataset: str, split: str):
    """The problems of a split, all with a known answer: without it there is nothing to score against."""
    problems = load_problems(dataset, split, pictures=False)
    require_answers(problems)
    return problems


def reported_scores(run_folder: Path) -> tuple[str, dict[str, Any]]:
    """The split that a run is judged by, and its scores: test, or val where the answers of test are not known."""
    split = "test" if (run_folder / "scores" / "test.json").exists() else "val"
    return split, read_json(run_folder / "scores" / f"{split}.json")


def submission(problems: Dataset, predictions: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """A-OKVQA's format: the chosen choice's text by question id (allenai/aokvqa, README, Evaluation)."""
    check_same_ids(problems["id"], predictions)
    answers = checked_answers(problems, predictions)
    return {row["id"]: {"multiple_choice": row["choices"][answers[row["id"]]]} for row in problems}


def format_table(scores: dict[str, Any], sizes: dict[str, int] | None = None) -> str:
    """The scores as aligned text: one column per class, then the rationales; `sizes` adds the problems per class."""
    rows = {"": list(CLASSES)}
    if sizes is not None:
        rows["problems"] = [str(sizes[name]) for name in CLASSES]
    for key in ("accuracy", "decoded_accuracy"):
        if key in scores:
            rows[key.replace("_", " ")] = [_percent(scores[key][name]) for name in CLASSES]
    lines = [f"{title:<16}" + "".join(f"{cell:>8}" for cell in cells) for title, cells in rows.items()]
    rationale = "   ".join(f"{name} {_percent(scores['rationale'][key])}" for key, name in RATIONALE_NAMES.items())
    return "\n".join([*lines, f"{'rationale':<16}  {rationale}"])


def default_scores_file(predictions_file: str | Path) -> Path:
    """RUN/scores/SPLIT.json for RUN/predictions/SPLIT.json, else NAME.scores.json beside NAME.json."""
    path = Path(predictions_file).absolute()
    if path.parent.name == "predictions":
        return path.parent.parent / "scores" / path.name
    return path.with_suffix(".scores.json")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mmcot.evaluate", description="Score a predictions file.")
    parser.add_argument("file", metavar="FILE", help="predictions, as mmcot.predict writes them")
    parser.add_argument("--dataset", required=True, metavar="PATH_OR_ID", help=SOURCES)
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", metavar="SCORES", help="default: RUN/scores/SPLIT.json, else beside FILE")
    parser.add_argument("--submission", metavar="FILE", help="in place of scores: the file for A-OKVQA's leaderboard")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = _parse(argv)
    scores_file = Path(arguments.output or default_scores_file(arguments.file))
    try:
        if scores_file.resolve() == Path(arguments.file).resolve():
            raise ValueError(f"--output {scores_file} is the predictions file itself")
        predictions = read_predictions(arguments.file)
        if arguments.submission is not None:
            problems = load_problems(arguments.dataset, arguments.split, pictures=False)
            write_json(arguments.submission, submission(problems.remove_columns("images"), predictions))
            print(f"submission: {arguments.submission}")
            return
        problems = load_answered_problems(arguments.dataset, arguments.split)
        scores = score(problems, predictions)
        write_json(scores_file, scores)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(format_table(scores, class_sizes(problems)))
    print(f"scores: {scores_file}")


if __name__ == "__main__":
    main()
