"""From predictions files to scores: read, score, compare, print tables, write the scores file.

    python -m mmcot.evaluate FILE --dataset PATH_OR_ID --split test [--output SCORES]
    python -m mmcot.evaluate FILE --dataset PATH_OR_ID --compare OTHER          # two systems on the same problems
    python -m mmcot.evaluate FILE --dataset PATH_OR_ID --seeds OTHER OTHER      # one system, trained with other seeds
    python -m mmcot.evaluate FILE --dataset PATH_OR_ID --report DIR             # a page to look through the problems
    python -m mmcot.evaluate --leaderboard SCORES_OR_REPO SCORES_OR_REPO …      # any number of scores files
    python -m mmcot.evaluate FILE --dataset AOKVQA_DIR --split test --submission predictions_test.json

The last writes what A-OKVQA's leaderboard takes, of problems whose answers nobody here knows.
Not here: what the figures mean and how they are computed (metrics.py, comparison.py), making predictions (predict.py).
"""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcot.evaluation.comparison import compare, leaderboard, spread
from mmcot.evaluation.leaks import suspicion, warnings_of
from mmcot.evaluation.metrics import check_same_ids, checked_answers, rationales_of, score, score_by
from mmcot.evaluation.tables import format_comparison, format_leaderboard, format_spread, format_table
from mmcot.hub.results import scores_of
from mmcot.prediction.provenance import origin_of_scores, weights_of
from mmcot.problems.opening import SOURCES, Given
from mmcot.problems.predictions import check_problems, read_meta
from mmcot.problems.schema import SPLITS, first_few, join_captions, require_answers
from mmcot.problems.sources import add_dataset_options, choose_source, load_problems, reading_options, said_options
from mmcot.problems.subsets import add_selection, select
from mmcot.recipes.command_line import (
    check_output_file,
    check_output_folder,
    given_options,
    refuse_absent_path,
    refuse_without_effect,
)
from mmcot.storage.files import read_json, write_json
from mmcot.storage.run_folder import judged_split, scores_file

logger = logging.getLogger(__name__)

Predictions = dict[str, dict[str, Any]]
SUBMISSION_OPTIONS = {"file", "dataset", "columns", "split_seed", "split", "submission"}


def evaluate(predictions_file: str | Path, dataset: str | Given, split: str) -> dict[str, Any]:
    """The scores (DESIGN section 4) of a predictions file against the gold columns of `split` of `dataset`."""
    predictions, problems = read_predictions(predictions_file), load_answered_problems(dataset, split)
    scores = score(problems, predictions)
    check_problems(Path(predictions_file), predictions, problems, dataset)
    return scores


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
    json.loads(path.read_bytes(), object_pairs_hook=lambda found: pairs.append(found) or dict(found))
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


def reported_scores(run_folder: Path) -> tuple[str, dict[str, Any]]:
    """The split that a run is judged by, and its scores: test, or val where the answers of test are not known."""
    split = judged_split(run_folder) or "val"
    return split, read_json(scores_file(run_folder, split))


def submission(problems: Dataset, predictions: Predictions) -> dict[str, dict[str, str]]:
    """A-OKVQA's format: the chosen choice's text by question id (allenai/aokvqa, README, Evaluation)."""
    check_same_ids(problems["id"], predictions)
    answers = checked_answers(problems, predictions)
    return {row["id"]: {"multiple_choice": row["choices"][answers[row["id"]]]} for row in problems}


def default_scores_file(predictions_file: str | Path) -> Path:
    """RUN/scores/SPLIT.json for RUN/predictions/SPLIT.json, else NAME.scores.json beside NAME.json."""
    path = Path(predictions_file).absolute()
    if path.parent.name == "predictions":
        return path.parent.parent / "scores" / path.name
    return path.with_suffix(".scores.json")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmcot.evaluate", description="Score predictions files.")
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="predictions, as mmcot.predict writes them, or {id: answer}"
    )
    parser.add_argument("--dataset", metavar="PATH_OR_ID", help=SOURCES)
    add_dataset_options(parser)
    parser.add_argument("--split", default="test", choices=SPLITS)
    add_selection(parser)
    parser.add_argument("--by", nargs="+", metavar="COLUMN", help="scores by the classes of these columns too")
    parser.add_argument("--allow_missing", action="store_true", help="a problem without a prediction counts as wrong")
    parser.add_argument("--similarity", metavar="MODEL", help="an encoder that compares rationales in meaning")
    parser.add_argument("--output", metavar="SCORES", help="default: RUN/scores/SPLIT.json, else beside FILE")
    parser.add_argument("--compare", metavar="OTHER", help="predictions of another system on the same problems")
    parser.add_argument("--seeds", nargs="+", metavar="OTHER", help="predictions of the same system, of other seeds")
    parser.add_argument("--submission", metavar="FILE", help="in place of scores: the file for A-OKVQA's leaderboard")
    parser.add_argument(
        "--leaderboard", nargs="+", metavar="SCORES", help="scores files, or repositories that have one"
    )
    parser.add_argument("--report", metavar="DIR", help="write a page to look through the problems")
    parser.add_argument("--without_picture", metavar="OTHER", help="for the report: predictions with pictures withheld")
    parser.add_argument("--attention", metavar="MODEL", help="for the report: what predicted, to show where it looked")
    parser.add_argument("--format", default="text", choices=("text", "markdown", "csv"), help="of the leaderboard")
    return parser


def main(argv: list[str] | None = None, dataset: Given | None = None) -> None:
    """
    Args:
        argv: the command line; by default this process's.
        dataset: in place of `--dataset`.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    arguments = build_parser().parse_args(argv)
    try:
        check_options(arguments, given_options(build_parser(), argv))
        if arguments.leaderboard is not None:
            table = leaderboard({name: scores_of(name) for name in arguments.leaderboard})
            print(format_leaderboard(table, arguments.format))
            return
        if arguments.file is None:
            raise ValueError("expected a predictions FILE and --dataset, or --leaderboard")
        arguments.source = choose_source(arguments, dataset)
        if arguments.submission is not None:
            problems = load_scored_problems(arguments.source, arguments.split, **reading_options(arguments))
            predictions = read_predictions(arguments.file)
            texts = submission(problems.remove_columns("images"), predictions)
            check_problems(Path(arguments.file), predictions, problems, arguments.dataset)
            write_json(arguments.submission, texts)
            print(f"submission: {arguments.submission}")
        else:
            evaluate_files(arguments)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def check_options(arguments: argparse.Namespace, said: set[str]) -> None:
    """
    Raises:
        ValueError: an option has no effect beside the others, or what is to be written cannot be.
    """
    if arguments.leaderboard is not None:
        reason = "--leaderboard makes a table of scores files"
        refuse_without_effect(said, sorted(said - {"leaderboard", "format"}), reason)
        for name in arguments.leaderboard:
            refuse_absent_path(name, "a scores file, a finished run, or an id of the Hub (USER/NAME)")
        return
    refuse_without_effect(said, ("format",), "it is of the --leaderboard")
    if arguments.submission is not None:
        refuse_without_effect(said, sorted(said - SUBMISSION_OPTIONS), "--submission takes a split as it is, unscored")
        check_output_file(arguments.submission, "--submission")
        return
    if arguments.similarity is not None:
        refuse_absent_path(arguments.similarity, "an encoder's folder, or an id of the Hub (USER/NAME)")
    if arguments.report is None:
        refuse_without_effect(said, ("without_picture", "attention"), "they are for the page of --report")
    else:
        check_output_folder(arguments.report, "--report")
    if arguments.compare is not None:
        refuse_without_effect(said, ("seeds",), "--compare is given, and one of them is shown")
    if arguments.output is not None:
        check_output_file(arguments.output)


def evaluate_files(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output or default_scores_file(arguments.file))
    others = [arguments.compare] if arguments.compare is not None else arguments.seeds or []
    if output.resolve() in (Path(file).resolve() for file in (arguments.file, *others)):
        raise ValueError(f"--output {output} is a predictions file itself")
    reading = reading_options(arguments)
    problems = load_answered_problems(arguments.source, arguments.split, keep=arguments.by or (), **reading)
    problems = select(problems, arguments.ids, arguments.filter, arguments.limit)
    first, *rest = (fitting(file, problems, arguments.allow_missing, arguments) for file in (arguments.file, *others))
    selection = {name: getattr(arguments, name) for name in ("ids", "filter", "limit", "allow_missing", "by")}
    selection |= said_options(arguments)
    scores = score(problems, first)
    if arguments.by:
        scores["by"] = score_by(problems, first, arguments.by)
    scores |= origin_of_scores(Path(arguments.file), output, problems, arguments.dataset, arguments.split, selection)
    if arguments.similarity is not None:
        from mmcot.analysis.similarity import similarity

        scores["rationale"]["similarity"] = similarity(problems, rationales_of(first), arguments.similarity)
    tables = [format_table(scores)]
    if arguments.compare is not None:
        scores["compared"] = compare(problems, first, rest[0])
        tables.append(format_comparison(scores["compared"]))
    elif arguments.seeds is not None:
        result = spread([scores, *(score(problems, predictions) for predictions in rest)])
        scores["seeds"] = {"n": 1 + len(rest), "accuracy": result}
        tables.append(format_spread(result, 1 + len(rest)))
    write_json(output, scores)
    print("\n\n".join(tables))
    for line in warnings_of(suspicion(problems, rationales_of(first))):
        print(line)
    print(f"scores: {output}")
    if arguments.report is not None:
        write_page(arguments, problems, first, scores)
        print(f"report: {Path(arguments.report) / 'index.html'}")


def write_page(
    arguments: argparse.Namespace, problems: Dataset, predictions: Predictions, scores: dict[str, Any]
) -> None:
    from mmcot.analysis.report import origin_of, write_report  # what draws is not needed to score
    from mmcot.prediction.predictor import load_system

    blind, origin = None, origin_of(Path(arguments.file))
    if arguments.without_picture is not None:
        blind = fitting(arguments.without_picture, problems, False, arguments, pictures=False)
    attention: Iterable[tuple[str, Any]] = ()
    if arguments.attention is not None:
        processor, models = load_system(arguments.attention)
        check_attention(arguments, weights_of(arguments.attention, processor), origin.weights)
        if origin.max_images is None:
            origin.max_images = min(models[stage.name].config.max_images for stage in processor.stages)
        seen = problems_as_predicted(arguments, problems, origin)
        attention = token_maps_of(processor, models, seen, predictions)
    else:
        seen = problems_as_predicted(arguments, problems, origin)
    report = Path(arguments.report)
    write_report(report, seen, predictions, scores, Path(arguments.file), origin.stages, blind, attention)


def check_attention(
    arguments: argparse.Namespace, here: dict[str, str] | None, predicted: dict[str, str] | None
) -> None:
    """Maps of another model than the one that predicted would show where it did not look."""
    if None not in (here, predicted) and here != predicted:
        differing = ", ".join(stage for stage in here | predicted if here.get(stage) != predicted.get(stage))
        raise ValueError(
            f"--attention {arguments.attention} is of other weights than those that wrote {arguments.file} "
            f"({differing}); expected the model that predicted."
        )


def problems_as_predicted(arguments: argparse.Namespace, problems: Dataset, origin: Any) -> Dataset:
    """With the pictures and captions that were predicted from; a page without maps does without what is absent."""
    source, reading = (arguments.source, arguments.split, origin.max_images), reading_options(arguments)
    try:
        seen = load_problems(*source, **reading)
    except ValueError as error:
        if arguments.attention is not None:
            raise
        logger.warning("the report shows no pictures: %s", error)
        seen = load_problems(*source, pictures=False, **reading)
    seen = select(seen, problems["id"])
    try:
        return seen if origin.captions is None else join_captions(seen, origin.captions)
    except ValueError as error:
        if arguments.attention is not None:
            raise
        logger.warning("the report shows prompts without their captions: %s", error)
        return seen


def token_maps_of(
    processor: Any, models: Mapping[str, Any], problems: Dataset, predictions: Predictions
) -> Iterator[tuple[str, Any]]:
    """Of the last stage that sees pictures, over the columns that were predicted for it."""
    from mmcot.analysis.attention import maps_of_problems
    from mmcot.prediction.predictor import with_columns

    seeing = [stage for stage in processor.stages if "images" in stage.reads]
    if not seeing or models[seeing[-1].name].get_encoder().vision_tower is None:
        raise ValueError("--attention: no stage of that model sees pictures, or it has no picture tower")
    earlier = processor.stages[: processor.stages.index(seeing[-1])]
    for stage in earlier:
        absent = [name for name in problems["id"] if stage.writes not in predictions[name]]
        if absent:
            raise ValueError(
                f"--attention: {len(absent)} predictions have no {stage.writes!r}, which the {seeing[-1].name} stage "
                f"reads: {first_few(absent)}"
            )
    return maps_of_problems(
        models[seeing[-1].name], processor, seeing[-1], with_columns(problems, predictions, earlier)
    )


if __name__ == "__main__":
    main()
