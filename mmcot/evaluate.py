"""Scores predictions files, compares systems, prints tables and writes the scores file.

    python -m mmcot.evaluate FILE --dataset PATH_OR_ID --split test [--output SCORES]
    python -m mmcot.evaluate FILE --dataset PATH_OR_ID --compare OTHER          # two systems on the same problems
    python -m mmcot.evaluate FILE --dataset PATH_OR_ID --seeds OTHER OTHER      # one system, trained with other seeds
    python -m mmcot.evaluate FILE --dataset PATH_OR_ID --report DIR             # an HTML page of the problems
    python -m mmcot.evaluate --leaderboard SCORES_OR_REPO SCORES_OR_REPO …      # any number of scores files
    python -m mmcot.evaluate FILE --dataset AOKVQA_DIR --split test --submission predictions_test.json

The last command writes A-OKVQA's submission file, because the answers of that test split are not public.
The scores are defined in `evaluation/metrics.py` and `evaluation/comparison.py`.
"""

import argparse
import logging
from pathlib import Path

from mmcot.analysis.page import write_page
from mmcot.evaluation.comparison import compare, leaderboard, seed_spread
from mmcot.evaluation.leaks import gold_overlap, overlap_warnings
from mmcot.evaluation.metrics import rationales_of, score, score_by
from mmcot.evaluation.predictions import (
    load_answered_problems,
    load_scored_problems,
    read_matching_predictions,
    read_predictions,
    submission,
)
from mmcot.evaluation.tables import format_comparison, format_leaderboard, format_spread, format_table
from mmcot.hub.results import scores_of
from mmcot.prediction.provenance import origin_of_scores
from mmcot.problems.digests import check_problems
from mmcot.problems.opening import SOURCES, Given
from mmcot.problems.schema import SPLITS
from mmcot.problems.sources import add_dataset_options, choose_source, non_default_options, reading_options
from mmcot.problems.subsets import add_selection_options, select
from mmcot.recipes.command_line import given_options, refuse_without_effect
from mmcot.storage.files import write_json
from mmcot.storage.paths import check_output_file, check_output_folder, refuse_absent_path
from mmcot.storage.run_folder import RunFolder

SUBMISSION_OPTIONS = {"file", "dataset", "columns", "split_seed", "split", "submission"}


def default_scores_file(predictions_file: str | Path) -> Path:
    """Return RUN/scores/SPLIT.json for RUN/predictions/SPLIT.json, else NAME.scores.json beside NAME.json."""
    path = Path(predictions_file).absolute()
    run_folder = RunFolder(path.parent.parent)
    if path == run_folder.predictions(path.stem):
        return run_folder.scores(path.stem)
    return path.with_suffix(".scores.json")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmcot.evaluate", description="Score predictions files.")
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="predictions, as mmcot.predict writes them, or {id: answer}"
    )
    parser.add_argument("--dataset", metavar="PATH_OR_ID", help=SOURCES)
    add_dataset_options(parser)
    parser.add_argument("--split", default="test", choices=SPLITS)
    add_selection_options(parser)
    parser.add_argument("--by", nargs="+", metavar="COLUMN", help="also score by the values of these columns")
    parser.add_argument("--allow_missing", action="store_true", help="count a problem without a prediction as wrong")
    parser.add_argument(
        "--similarity",
        metavar="MODEL",
        help="also score rationales by similarity in meaning to gold, with this encoder",
    )
    parser.add_argument("--output", metavar="SCORES", help="default: RUN/scores/SPLIT.json, else beside FILE")
    parser.add_argument("--compare", metavar="OTHER", help="predictions of another system on the same problems")
    parser.add_argument(
        "--seeds", nargs="+", metavar="OTHER", help="predictions of the same system, trained with other seeds"
    )
    parser.add_argument("--submission", metavar="FILE", help="write the file for A-OKVQA's leaderboard, and no scores")
    parser.add_argument(
        "--leaderboard",
        nargs="+",
        metavar="SCORES",
        help="print a table of scores files, finished runs or Hub repositories",
    )
    parser.add_argument("--report", metavar="DIR", help="write an HTML page of the problems")
    parser.add_argument("--without_picture", metavar="OTHER", help="for the report: predictions with pictures withheld")
    parser.add_argument("--attention", metavar="MODEL", help="for the report: the model, to show its attention maps")
    parser.add_argument(
        "--format", default="text", choices=("text", "markdown", "csv"), help="the format of the leaderboard"
    )
    return parser


def main(argv: list[str] | None = None, dataset: Given | None = None) -> None:
    """
    Score, compare or tabulate predictions.

    Args:
        argv: the command line; by default that of this process.
        dataset: the problems, in place of `--dataset`.
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


def check_options(arguments: argparse.Namespace, given: set[str]) -> None:
    """
    Args:
        given: the names of the options on the command line.

    Raises:
        ValueError: an option has no effect together with the others, or an output cannot be written.
    """
    if arguments.leaderboard is not None:
        reason = "--leaderboard makes a table of scores files"
        refuse_without_effect(given, sorted(given - {"leaderboard", "format"}), reason)
        for name in arguments.leaderboard:
            refuse_absent_path(name, "a scores file, a finished run, or a Hub id (USER/NAME)")
        return
    refuse_without_effect(given, ("format",), "it applies to --leaderboard")
    if arguments.submission is not None:
        reason = "--submission writes the predictions of a whole split, without scores"
        refuse_without_effect(given, sorted(given - SUBMISSION_OPTIONS), reason)
        check_output_file(arguments.submission, "--submission")
        return
    if arguments.similarity is not None:
        refuse_absent_path(arguments.similarity, "an encoder's folder, or a Hub id (USER/NAME)")
    if arguments.report is None:
        refuse_without_effect(given, ("without_picture", "attention"), "it applies to --report")
    else:
        check_output_folder(arguments.report, "--report")
    if arguments.compare is not None:
        refuse_without_effect(given, ("seeds",), "--compare is given, and only one of the two is computed")
    if arguments.output is not None:
        check_output_file(arguments.output)


def evaluate_files(arguments: argparse.Namespace) -> None:
    """Score FILE, compare it with other files if asked, and write and print the results."""
    output = Path(arguments.output or default_scores_file(arguments.file))
    others = [arguments.compare] if arguments.compare is not None else arguments.seeds or []
    if output.resolve() in (Path(file).resolve() for file in (arguments.file, *others)):
        raise ValueError(f"--output {output} is one of the predictions files")
    reading = reading_options(arguments)
    problems = load_answered_problems(arguments.source, arguments.split, extra_columns=arguments.by or (), **reading)
    problems = select(problems, arguments.ids, arguments.filter, arguments.limit)
    first, *rest = (
        read_matching_predictions(file, problems, arguments.allow_missing, arguments)
        for file in (arguments.file, *others)
    )
    selection = {name: getattr(arguments, name) for name in ("ids", "filter", "limit", "allow_missing", "by")}
    selection |= non_default_options(arguments)
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
        result = seed_spread([scores, *(score(problems, predictions) for predictions in rest)])
        scores["seeds"] = {"n": 1 + len(rest), "accuracy": result}
        tables.append(format_spread(result, 1 + len(rest)))
    write_json(output, scores)
    print("\n\n".join(tables))
    for line in overlap_warnings(gold_overlap(problems, rationales_of(first))):
        print(line)
    print(f"scores: {output}")
    if arguments.report is not None:
        write_page(arguments, problems, first, scores)
        print(f"report: {Path(arguments.report) / 'index.html'}")


if __name__ == "__main__":
    main()
