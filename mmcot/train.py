"""Trains, predicts, scores and exports the system that a recipe describes. The same command resumes an interrupted run.

python -m mmcot.train --config configs/demo/two_stages.yaml
"""

import contextlib
import logging
import signal
import sys

from accelerate import PartialState
from safetensors import SafetensorError

from mmcot.evaluation.tables import format_table
from mmcot.problems.opening import Given
from mmcot.recipes.arguments import help_text
from mmcot.recipes.recipe import parse_recipe
from mmcot.storage.checkpoints import RunStopped
from mmcot.storage.files import read_json
from mmcot.training.preparation import Run, prepare
from mmcot.training.run import run
from modeling_mmcot.stage_mmcot import LETTERS


def describe_result(prepared: Run) -> str:
    """Return the final output of a run: the score table, one answered problem, and the run folder."""
    folder = prepared.folder
    arguments = prepared.recipe.arguments
    if arguments.fold is not None:
        return f"Fold {arguments.fold} is written: {folder.fold(arguments.fold)}"
    if arguments.stage is not None:
        return f"The {arguments.stage} stage is trained: {folder.stage(arguments.stage)}"
    split = folder.judged_split()
    problems, predictions, scores = prepared.problems[split], folder.predictions_so_far(split), folder.scores(split)
    problem = next((row for row in problems if row["images"]), problems[0])
    columns = predictions[problem["id"]]
    choices = "\n".join(
        f"  ({letter}) {choice}  {100 * probability:.1f} %"
        for letter, choice, probability in zip(LETTERS, problem["choices"], columns["scores"], strict=False)
    )
    texts = "".join(
        f"  {columns[stage.writes]}\n" if stage.generates else f"  {stage.writes}: {columns[stage.writes]}\n"
        for stage in prepared.stages.with_models
        if not stage.answers
    )
    return (
        f"{format_table(read_json(scores))}\n\n"
        f"One {split} problem, answered ({problem['id']}, gold: {problem['choices'][problem['answer']]}):\n"
        f"  {problem['question']}\n{texts}{choices}\n\nRun folder: {folder}"
    )


def main(argv: list[str] | None = None, dataset: Given | None = None) -> None:
    """
    Run a recipe.

    Args:
        argv: the command line; by default that of this process.
        dataset: the problems, in place of the recipe's `dataset`.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("mmcot").setLevel(logging.INFO)
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h"} & set(argv) and "--config" not in argv:
        print(help_text())
        return
    try:
        try:
            if dataset is not None and any(word.split("=")[0] == "--dataset" for word in argv):
                raise ValueError("--dataset is given together with a dataset in Python: give one of them.")
            recipe = parse_recipe(argv)
            prepared = prepare(recipe if dataset is None else recipe.with_dataset(dataset))
        except ValueError as error:
            sys.exit(f"error: {error}")
        with prepared.lock or contextlib.nullcontext():
            run(prepared)
    except (RunStopped, OSError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("SIGINT: finished work is kept. The same command resumes the run.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if PartialState().is_main_process:
        print(describe_result(prepared))


if __name__ == "__main__":
    main()
