"""What a trained stage writes for a split of a run's problems: its column in the predictions file, and what wrote it.

How a stage predicts stands in `predict.py`, what later stages are trained on in `stage_inputs.py`.
"""

import logging
from dataclasses import asdict
from typing import Any

from accelerate import PartialState

from mmcot.prediction.predictor import PredictOptions, predict_stage
from mmcot.prediction.provenance import problems_digest, stage_weights
from mmcot.problems.digests import digest_of_problems
from mmcot.problems.sources import non_default_options
from mmcot.storage.checkpoints import RunStopped
from mmcot.storage.digests import sha256_of_json
from mmcot.storage.journal import Journal
from mmcot.storage.predictions import read_meta, write_predictions
from mmcot.training.preparation import Run
from modeling_mmcot import MMCoTForConditionalGeneration
from modeling_mmcot.stage_mmcot import Stage

logger = logging.getLogger(__name__)


def is_written(prepared: Run, stage: Stage, split: str) -> bool:
    """Whether its column is there for every problem, as the stage's weights write it for the problems of now."""
    predictions = prepared.folder.predictions_so_far(split)
    is_whole = all(stage.writes in predictions.get(problem_id, {}) for problem_id in prepared.problems[split]["id"])
    return is_whole and written_by(prepared, split).get(stage.name) == stage_weights(prepared.folder.path, stage.name)


def written_by(prepared: Run, split: str) -> dict[str, str]:
    """
    The weights of each stage that wrote for a split, as far as what later ones read has not changed since. Predictions
    that do not belong to their meta file are as if nobody had written them.
    """
    try:
        meta = read_meta(prepared.folder.predictions(split)) or {}
    except ValueError as error:
        logger.warning("%s The stages write again.", error)
        return {}
    return meta.get("weights") or {}


def predict_split(prepared: Run, model: MMCoTForConditionalGeneration, stage: Stage, split: str) -> None:
    """The stage's column for a split, into its predictions file, unless it is there."""
    if is_written(prepared, stage, split):
        return
    recipe, problems = prepared.recipe, prepared.problems[split]
    predictions = prepared.folder.predictions_so_far(split)
    journal = journal_of(prepared, stage, split, predictions)
    options = PredictOptions(
        batch_size=recipe.training_arguments.per_device_eval_batch_size,
        num_workers=recipe.training_arguments.dataloader_num_workers,
        decode_answer=recipe.arguments.decode_answer,
    )
    predict_stage(model, prepared.processor, stage, problems, predictions, options, prepared.pictures, journal=journal)
    if PartialState().is_main_process:
        origin = origin_of_predictions(prepared, stage, split)
        write_predictions(prepared.folder.predictions(split), predictions, origin)
    journal.remove()
    PartialState().wait_for_everyone()


def origin_of_predictions(prepared: Run, stage: Stage, split: str) -> dict[str, Any]:
    """What made a split's predictions, when the stage has written its column."""
    arguments, weights = prepared.recipe.arguments, written_by(prepared, split)
    sees = prepared.stages.see_pictures
    # What stages after this one wrote is of other texts than it writes now.
    earlier = prepared.stages.before(stage).names
    weights = {name: weights[name] for name in earlier if name in weights}
    weights[stage.name] = stage_weights(prepared.folder.path, stage.name)
    max_images = arguments.max_images if sees else None
    return {
        "dataset": arguments.dataset,
        "split": split,
        **non_default_options(arguments),
        "decode_answer": arguments.decode_answer,
        "features": arguments.features,
        "captions": arguments.captions,
        "max_images": max_images,
        "problems": digest_of_problems(prepared.problems[split], max_images),
        "stages": [asdict(stage) for stage in prepared.stages],
        "weights": weights,
    }


def journal_of(prepared: Run, stage: Stage, split: str, predictions: dict[str, dict]) -> Journal:
    """So that a call that is killed while a stage writes goes on with the batch that it was at."""
    read = [earlier.writes for earlier in prepared.stages.before(stage)]
    names = prepared.problems[split]["id"]
    given = {name: [predictions.get(name, {}).get(column) for column in read] for name in names}
    settings = {
        "weights": stage_weights(prepared.folder.path, stage.name),
        "problems": problems_digest(prepared.problems[split]),
        "given": sha256_of_json(given),
    }
    try:
        return Journal(prepared.folder.unfinished_predictions(split, stage.name), settings)
    except ValueError as error:
        raise RunStopped(str(error)) from error
