"""A prepared run -> a trained, scored and exported system, with the Trainer of transformers.

For each stage in order: train it, then write its column for val and test, free-running. Then score and export. Calling
the same command again resumes an interrupted run: finished stages are kept, an unfinished stage resumes from its last
complete checkpoint. `preparation.py` checks recipe and data beforehand.
"""

from accelerate import PartialState
from filelock import FileLock

from mmcot.evaluation.metrics import score
from mmcot.evaluation.predictions import load_scored_problems
from mmcot.hub.export import export
from mmcot.prediction.provenance import origin_of_scores
from mmcot.problems.digests import check_problems
from mmcot.problems.schema import is_answered
from mmcot.problems.sources import non_default_options, reading_options
from mmcot.recipes.recipe import Recipe
from mmcot.storage.checkpoints import RunStopped
from mmcot.storage.files import write_json
from mmcot.storage.run_folder import RunFolder
from mmcot.training.adapters import save_base
from mmcot.training.folds import cross_fit, cross_fitted_stages, write_fold
from mmcot.training.passages import open_searchers
from mmcot.training.preparation import Run
from mmcot.training.stage import saves_adapters, train_and_write, train_stage


def run(prepared: Run) -> None:
    """
    Train, predict, score and export into the run folder; with `fold`, train and predict that fold only; with `stage`,
    train that stage only.
    """
    recipe, folder = prepared.recipe, prepared.folder
    if saves_adapters(recipe):
        with PartialState().main_process_first():
            prepare_base(prepared)
    open_searchers(prepared)
    if recipe.arguments.fold is not None:
        for stage in cross_fitted_stages(prepared):
            write_fold(prepared, stage, recipe.arguments.fold)
        return
    if recipe.arguments.stage is not None:
        train_stage(prepared, prepared.stages.named(recipe.arguments.stage))
        return
    for stage in prepared.stages:
        train_and_write(prepared, stage, {"val", "test"}, prepared.stages)
        if stage in cross_fitted_stages(prepared):
            cross_fit(prepared, stage)
    prepared.initial_model.discard()  # no stage has taken it if all were trained before
    if PartialState().is_main_process:
        try:
            for split in ("val", "test"):
                if is_answered(prepared.problems[split]):
                    write_scores(folder, recipe, split)
            export(folder, prepared.processor)
        except ValueError as error:  # e.g. scores from an earlier training
            raise RunStopped(str(error)) from error
    PartialState().wait_for_everyone()


def write_scores(folder: RunFolder, recipe: Recipe, split: str) -> None:
    """
    Write the scores of a split's predictions as `mmcot.evaluate` does. The problems are loaded with pictures even if no
    stage reads them, because the class of a problem depends on its pictures.
    """
    file, predictions = folder.predictions(split), folder.predictions_so_far(split)
    dataset, options = recipe.arguments.dataset, non_default_options(recipe.arguments)
    problems = load_scored_problems(recipe.source, split, **reading_options(recipe.arguments))
    check_problems(file, predictions, problems, dataset)
    scores = score(problems, predictions)
    scores |= origin_of_scores(file, folder.scores(split), problems, dataset, split, options)
    write_json(folder.scores(split), scores)


def prepare_base(prepared: Run) -> None:
    """Save the base that all stages adapt into the run folder."""
    base = prepared.folder.base
    with FileLock(base.with_suffix(".lock")):  # folds are separate commands, which can run at the same time
        if not base.exists():
            save_base(prepared.initial_model.take(), base, prepared.stages.with_models.names)
