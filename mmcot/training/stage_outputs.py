"""Writes a trained stage's column for a split of a run's problems into the predictions file, with the weights' digests.

Prediction itself is in `mmcot/prediction/predictor.py`; `stage_inputs.py` selects the columns that later stages are
trained on.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from accelerate import PartialState

from mmcot.prediction.columns import columns_after
from mmcot.prediction.passages import add_passages
from mmcot.prediction.predictor import PredictOptions, predict_stage, send_back
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


def has_written(prepared: Run, stage: Stage, split: str) -> bool:
    """Whether the predictions file has the stage's column for every current problem, written by its current weights."""
    predictions = prepared.folder.predictions_so_far(split)
    is_complete = all(stage.writes in predictions.get(problem_id, {}) for problem_id in prepared.problems[split]["id"])
    return is_complete and recorded_weights(prepared, split).get(stage.name) == weights_of_stage(prepared, stage)


def weights_of_stage(prepared: Run, stage: Stage) -> str:
    """Return the digest of a stage's weights, or of its index, which folds share with their run."""
    folder = prepared.folder if stage.has_model else prepared.folder.run
    return stage_weights(folder.path, prepared.training_of(stage).name)


def recorded_weights(prepared: Run, split: str) -> dict[str, str]:
    """
    Return the digest of the weights of each stage that wrote for a split, from the meta file of its predictions. A
    stage is absent if an earlier stage has written other texts since. Predictions that do not match their meta file
    count as not written.
    """
    try:
        meta = read_meta(prepared.folder.predictions(split)) or {}
    except ValueError as error:
        logger.warning("%s The stages write their columns again.", error)
        return {}
    return meta.get("weights") or {}


def predict_split(
    prepared: Run,
    model: MMCoTForConditionalGeneration,
    stage: Stage,
    split: str,
    load_model: Callable[[str], MMCoTForConditionalGeneration],
) -> None:
    """
    Write the stage's column for a split into its predictions file, unless it is complete.

    Args:
        load_model: returns the trained model of an earlier stage, to which this stage can send problems back.
    """
    if has_written(prepared, stage, split):
        return
    recipe, problems = prepared.recipe, prepared.problems[split]
    predictions = columns_after(prepared.folder.predictions_so_far(split), prepared.stages.before(stage))
    journal = open_journal(prepared, stage, split, predictions)
    options = PredictOptions(
        batch_size=recipe.training_arguments.per_device_eval_batch_size,
        num_workers=recipe.training_arguments.dataloader_num_workers,
        decode_answer=recipe.arguments.decode_answer,
    )
    settings = (stage, problems, predictions, options, prepared.pictures)
    predict_stage(model, prepared.processor, *settings, journal=journal)
    send_back(load_model, prepared.processor, *settings, journal=journal)
    save_predictions(prepared, stage, split, predictions)
    journal.remove()
    PartialState().wait_for_everyone()


def retrieve_split(prepared: Run, stage: Stage, split: str) -> None:
    """Write the passages that a stage retrieves for a split into its predictions file, unless it is complete."""
    if has_written(prepared, stage, split):
        return
    predictions = columns_after(prepared.folder.predictions_so_far(split), prepared.stages.before(stage))
    add_passages(predictions, prepared.processor, stage, prepared.problems[split])
    PartialState().wait_for_everyone()  # every process has read the predictions file
    save_predictions(prepared, stage, split, predictions)
    PartialState().wait_for_everyone()


def save_predictions(prepared: Run, stage: Stage, split: str, predictions: dict[str, dict]) -> None:
    if PartialState().is_main_process:
        metadata = predictions_metadata(prepared, stage, split)
        write_predictions(prepared.folder.predictions(split), predictions, metadata)


def predictions_metadata(prepared: Run, stage: Stage, split: str) -> dict[str, Any]:
    """Return the metadata of a split's predictions after the stage has written its column."""
    arguments, weights = prepared.recipe.arguments, recorded_weights(prepared, split)
    # The weights of later stages are dropped: they read texts that this stage has just replaced.
    earlier = prepared.stages.before(stage).names
    weights = {name: weights[name] for name in earlier if name in weights}
    weights[stage.name] = weights_of_stage(prepared, stage)
    max_images = arguments.max_images if prepared.stages.see_pictures else None
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


def open_journal(prepared: Run, stage: Stage, split: str, predictions: dict[str, dict]) -> Journal:
    """Open the journal by which a killed call resumes at the batch that it was writing."""
    columns = [earlier.writes for earlier in prepared.stages.before(stage)]
    names = prepared.problems[split]["id"]
    given = {name: [predictions.get(name, {}).get(column) for column in columns] for name in names}
    settings = {
        "weights": weights_of_stage(prepared, stage),
        "problems": problems_digest(prepared.problems[split]),
        "given": sha256_of_json(given),
    }
    try:
        return Journal(prepared.folder.unfinished_predictions(split, stage.name), settings)
    except ValueError as error:
        raise RunStopped(str(error)) from error
