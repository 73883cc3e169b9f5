"""Cross-fitting: a stage's column for each training problem, written by a stage that was trained without it."""

import contextlib
import logging
from dataclasses import replace

from accelerate import PartialState

from mmcot.storage.files import write_json
from mmcot.storage.run_folder import CROSS_FITTED
from mmcot.training.preparation import Run, lock_folder
from mmcot.training.stage import train_and_write
from mmcot.training.stage_inputs import fold_of_each
from modeling_mmcot.stage_mmcot import Stage, Stages

logger = logging.getLogger(__name__)


def cross_fitted(prepared: Run) -> Stages:
    """The stages before the last one that reads what stages trained without its problems wrote."""
    reading = [
        number for number, arguments in enumerate(prepared.recipe.stages) if arguments.inputs_from == "cross_fit"
    ]
    return Stages(prepared.stages[: max(reading, default=0)])


def cross_fit(prepared: Run, stage: Stage) -> None:
    """The stage's column for the training problems, each written by a stage that was trained without it."""
    written = prepared.folder.predictions_so_far(CROSS_FITTED)
    for fold in range(prepared.recipe.arguments.num_folds):
        for problem_id, columns in write_fold(prepared, stage, fold).items():
            written.setdefault(problem_id, {})[stage.writes] = columns[stage.writes]
    if PartialState().is_main_process:
        write_json(prepared.folder.predictions(CROSS_FITTED), written)
    PartialState().wait_for_everyone()


def write_fold(prepared: Run, stage: Stage, fold: int) -> dict[str, dict]:
    """The predictions for the problems of a fold, of stages up to this one that were trained without them."""
    arguments, problems = prepared.recipe.arguments, prepared.problems["train"]
    folds = fold_of_each(len(problems), arguments.num_folds, prepared.recipe.training_arguments.seed)
    others = problems.select([index for index, number in enumerate(folds) if number != fold])
    held_out = problems.select([index for index, number in enumerate(folds) if number == fold])
    folder = prepared.folder.fold(fold)
    splits = {"train": others, "val": prepared.problems["val"], "held_out": held_out}
    logger.info("fold %d of %d: the %s stage", fold, arguments.num_folds, stage.name)
    with lock_folder(folder) or contextlib.nullcontext():
        of_fold = replace(prepared, folder=folder, problems=splits)
        train_and_write(of_fold, stage, {"held_out"}, cross_fitted(prepared))
    return folder.predictions_so_far("held_out")
