"""Predicts a split of problems with a trained system.

    python -m mmcot.predict RUN_OR_HUB_DIR --dataset demo --split test --output FILE

Gold columns are removed before any source is rendered; `--leak_check` verifies that. The command resumes after a kill,
and writes the origin of the predictions beside FILE (`prediction/provenance.py`).
"""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset

from mmcot.evaluation.leaks import find_leaks
from mmcot.prediction.predictor import PredictOptions, predict
from mmcot.prediction.provenance import provenance
from mmcot.prediction.self_consistency import Drawing
from mmcot.prediction.system import load_inputs, load_system
from mmcot.problems.opening import SOURCES, Given
from mmcot.problems.schema import (
    SPLITS,
)
from mmcot.problems.sources import add_dataset_options, choose_source, non_default_options
from mmcot.problems.subsets import add_selection_options
from mmcot.recipes.command_line import given_options, refuse_below, refuse_without_effect
from mmcot.storage.files import resolve_path
from mmcot.storage.journal import Journal
from mmcot.storage.paths import check_output_file
from mmcot.storage.predictions import write_predictions
from modeling_mmcot.self_consistency_mmcot import TEMPERATURE

# Options that do not change the predictions, or that the meta file records in another form.
UNRECORDED_OPTIONS = ("model", "output", "leak_check", "num_workers", "source", "columns", "split_seed")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmcot.predict", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run folder, a folder in the Hub's layout, or a Hub id")
    parser.add_argument("--dataset", help=SOURCES)
    add_dataset_options(parser)
    parser.add_argument("--split", default="test", choices=SPLITS)
    add_selection_options(parser)
    parser.add_argument("--output", help="the predictions file to write")
    parser.add_argument("--leak_check", action="store_true", help="predict again with other gold columns, and compare")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument(
        "--max_tokens",
        type=int,
        metavar="N",
        help="limit a batch to N tokens of padded sources, in place of --batch_size",
    )
    parser.add_argument(
        "--num_rationales", type=int, default=1, metavar="N", help="sample N rationales and take the majority answer"
    )
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="the temperature of the sampling")
    parser.add_argument("--seed", type=int, default=42, help="the seed of the sampling")
    parser.add_argument("--decode_answer", action="store_true", help='also generate and read "The answer is (B)."')
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read pictures or features ahead")
    parser.add_argument("--bf16", action="store_true", help="run the models in bfloat16")
    parser.add_argument("--features", metavar="DIR", help="features of the pictures, as mmcot.features wrote them")
    parser.add_argument("--captions", metavar="FILE", help="captions.json, as mmcot.features --captions wrote it")
    return parser


def main(argv: list[str] | None = None, dataset: Given | None = None) -> None:
    """
    Write a predictions file, or check for leaks.

    Args:
        argv: the command line; by default that of this process.
        dataset: the problems, in place of `--dataset`.
    """
    arguments = build_parser().parse_args(argv)
    # Without an accelerator, several processes connect to each other only if `cpu` is set.
    PartialState(cpu=not torch.accelerator.is_available())
    try:
        check_options(arguments, given_options(build_parser(), argv))
        arguments.source = choose_source(arguments, dataset)
        arguments.captions = arguments.captions and resolve_path(arguments.captions)
        processor, models = load_system(arguments.model, torch.bfloat16 if arguments.bf16 else "auto")
        if arguments.num_rationales > 1 and len(processor.stages) == 1:
            raise ValueError(
                f"--num_rationales is {arguments.num_rationales}, but {arguments.model} has one stage and writes no "
                f"rationale."
            )
        problems, store = load_inputs(arguments, processor, models)
        settings = {name: value for name, value in vars(arguments).items() if name not in UNRECORDED_OPTIONS}
        settings |= non_default_options(arguments)
        options = PredictOptions(
            arguments.batch_size, arguments.max_tokens, arguments.num_workers, arguments.decode_answer
        )
        drawing = Drawing(arguments.num_rationales, arguments.temperature, arguments.seed)
        if arguments.leak_check:
            # The passages that are left out stay the same, because only the prompts must not depend on gold.
            report_leaks(
                problems,
                lambda rows: predict(processor, models, rows, options, store, drawing=drawing, gold_problems=problems),
            )
            return
        meta = {**provenance(arguments.model, processor, models, problems, store), **settings}
        output = Path(arguments.output)
        journal = Journal(output, meta)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        predictions = predict(processor, models, problems, options, store, journal, drawing)
        if PartialState().is_main_process:
            write_predictions(output, predictions, meta)
            print(f"{len(predictions)} predictions: {output}")
        journal.remove()
    except OSError as error:  # a full disk
        journal.close_after_error()
        sys.exit(f"error: {output} could not be written: {error}. The same command resumes the prediction.")
    except KeyboardInterrupt:
        message = f"SIGINT: finished predictions are kept beside {output}. The same command resumes the prediction."
        print(message, file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def check_options(arguments: argparse.Namespace, given: set[str]) -> None:
    """
    Args:
        given: the names of the options on the command line.

    Raises:
        ValueError: an option is missing, is out of range, or has no effect together with the others.
    """
    if arguments.output is None and not arguments.leak_check:
        raise ValueError("--output is missing: the predictions file to write.")
    refuse_below(arguments, 1, "batch_size", "max_tokens", "num_rationales")
    refuse_below(arguments, 0, "num_workers")
    if arguments.temperature <= 0:
        raise ValueError(f"--temperature is {arguments.temperature:g}; expected more than 0.")
    if arguments.num_rationales == 1:
        reason = "rationales are sampled only with --num_rationales of 2 or more"
        refuse_without_effect(given, ("temperature", "seed"), reason)
    if arguments.leak_check:
        refuse_without_effect(given, ("output",), "--leak_check compares predictions and writes no file")
    else:
        check_output_file(arguments.output)
    if arguments.max_tokens is not None:
        refuse_without_effect(given, ("batch_size",), "--max_tokens replaces it")
    if arguments.num_rationales > 1 and arguments.decode_answer:
        raise ValueError(
            "--decode_answer reads one generated answer, and --num_rationales produces several: leave one out."
        )


def report_leaks(problems: Dataset, predict_all: Callable[[Dataset], dict[str, dict]]) -> None:
    """Predict with the gold columns and with garbage in their place, and exit with an error if a prediction differs."""
    leaks = find_leaks(problems, predict_all)
    if not PartialState().is_main_process:
        return
    if leaks:
        for problem_id, columns in list(leaks.items())[:20]:
            print(f"{problem_id}: {', '.join(columns)}")
        sys.exit(
            f"error: {len(leaks)} of {len(problems)} predictions differ when the gold columns are replaced by garbage: "
            f"gold columns reach the model."
        )
    print(f"No prediction of {len(problems)} differs when the gold columns are replaced by garbage.")


if __name__ == "__main__":
    main()
