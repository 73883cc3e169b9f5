"""Cross-fitting: writes a stage's column for each training problem, by a model trained without that problem."""

import contextlib
import logging
from dataclasses import replace

from accelerate import PartialState

from mmcot.storage.files import write_json
from mmcot.storage.run_folder import CROSS_FITTED
from mmcot.training.preparation import Run, lock_file
from mmcot.training.stage import train_and_write
from mmcot.training.stage_inputs import assign_folds
from modeling_mmcot.stage_mmcot import Stage, Stages

logger = logging.getLogger(__name__)


def cross_fitted_stages(prepared: Run) -> Stages:
    """Return all stages before the last stage with `inputs_from: cross_fit`: these are trained in folds."""
    readers = [
        number for number, arguments in enumerate(prepared.recipe.stages) if arguments.inputs_from == "cross_fit"
    ]
    return Stages(prepared.stages[: max(readers, default=0)])


def cross_fit(prepared: Run, stage: Stage) -> None:
    """Write a stage's column for the training problems, each by a model that was trained without that problem."""
    predictions: dict[str, dict] = {}
    for fold in range(prepared.recipe.arguments.num_folds):
        predictions |= write_fold(prepared, stage, fold)
    if PartialState().is_main_process:
        write_json(prepared.folder.predictions(CROSS_FITTED), predictions)
    PartialState().wait_for_everyone()


def write_fold(prepared: Run, stage: Stage, fold: int) -> dict[str, dict]:
    """Train the stages up to this one without the problems of a fold, and return their predictions for that fold."""
    arguments, problems = prepared.recipe.arguments, prepared.problems["train"]
    folds = assign_folds(len(problems), arguments.num_folds, prepared.recipe.training_arguments.seed)
    rest = problems.select([index for index, number in enumerate(folds) if number != fold])
    held_out = problems.select([index for index, number in enumerate(folds) if number == fold])
    folder = prepared.folder.fold(fold)
    splits = {"train": rest, "val": prepared.problems["val"], "held_out": held_out}
    logger.info("fold %d of %d: the %s stage", fold, arguments.num_folds, stage.name)
    with lock_file(folder.lock) or contextlib.nullcontext():
        fold_run = replace(prepared, folder=folder, problems=splits)
        train_and_write(fold_run, stage, {"held_out"}, cross_fitted_stages(prepared))
    return folder.predictions_so_far("held_out")
