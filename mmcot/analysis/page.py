"""Write the report page of a predictions file, for `python -m mmcot.evaluate --report`."""

import argparse
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcot.evaluation.predictions import (
    Predictions,
    read_matching_predictions,
)
from mmcot.prediction.columns import rejected_by, with_columns
from mmcot.prediction.provenance import weights_of
from mmcot.problems.schema import first_few, join_captions
from mmcot.problems.sources import load_problems, reading_options
from mmcot.problems.subsets import select

logger = logging.getLogger(__name__)


def write_page(
    arguments: argparse.Namespace, problems: Dataset, predictions: Predictions, scores: dict[str, Any]
) -> None:
    from mmcot.analysis.report import origin_of, write_report  # scoring does not need the plotting libraries
    from mmcot.prediction.system import load_system

    blind_predictions, origin = None, origin_of(Path(arguments.file))
    if arguments.without_picture is not None:
        blind_predictions = read_matching_predictions(
            arguments.without_picture, problems, allow_missing=False, arguments=arguments, pictures=False
        )
    attention: Iterable[tuple[str, Any]] = ()
    if arguments.attention is not None:
        processor, models = load_system(arguments.attention)
        check_attention(arguments, weights_of(arguments.attention, processor), origin.weights)
        if origin.max_images is None:
            origin.max_images = min(models[stage.name].config.max_images for stage in processor.stages.with_models)
        shown = problems_as_predicted(arguments, problems, origin)
        attention = token_maps_of(processor, models, shown, predictions)
    else:
        shown = problems_as_predicted(arguments, problems, origin)
    report = Path(arguments.report)
    write_report(report, shown, predictions, scores, Path(arguments.file), origin.stages, blind_predictions, attention)


def check_attention(
    arguments: argparse.Namespace, of_model: dict[str, str] | None, of_predictions: dict[str, str] | None
) -> None:
    """
    Raise a `ValueError` if the maps and the predictions come from models with different weights.

    Args:
        of_model, of_predictions: the weights digest of each stage; None if unknown.
    """
    if None not in (of_model, of_predictions) and of_model != of_predictions:
        stages = of_model | of_predictions
        differing = ", ".join(stage for stage in stages if of_model.get(stage) != of_predictions.get(stage))
        raise ValueError(
            f"--attention {arguments.attention} has other weights than the model that wrote {arguments.file} "
            f"({differing}); expected the same model."
        )


def problems_as_predicted(arguments: argparse.Namespace, problems: Dataset, origin: Any) -> Dataset:
    """
    Load the problems with the pictures and captions that the model read during prediction. If some are absent, the
    report shows none and a warning is logged; with `--attention`, an error is raised.
    """
    source, reading = (arguments.source, arguments.split, origin.max_images), reading_options(arguments)
    try:
        shown = load_problems(*source, **reading)
    except ValueError as error:
        if arguments.attention is not None:
            raise
        logger.warning("the report shows no pictures: %s", error)
        shown = load_problems(*source, pictures=False, **reading)
    shown = select(shown, problems["id"])
    try:
        return shown if origin.captions is None else join_captions(shown, origin.captions)
    except ValueError as error:
        if arguments.attention is not None:
            raise
        logger.warning("the report shows prompts without their captions: %s", error)
        return shown


def token_maps_of(
    processor: Any, models: Mapping[str, Any], problems: Dataset, predictions: Predictions
) -> Iterator[tuple[str, Any]]:
    """Yield the maps of the last stage that sees pictures, with the columns of earlier stages that it read."""
    from mmcot.analysis.attention import maps_of_problems

    stages_with_pictures = [stage for stage in processor.stages if stage.sees_pictures]
    if not stages_with_pictures or models[stages_with_pictures[-1].name].get_encoder().vision_tower is None:
        raise ValueError("--attention: no stage of that model sees pictures, or the model has no picture tower")
    last = stages_with_pictures[-1]
    earlier = processor.stages.before(last)
    for stage in earlier:
        absent = [name for name in problems["id"] if stage.writes not in predictions[name]]
        if absent:
            raise ValueError(
                f"--attention: {len(absent)} predictions have no {stage.writes!r}, which the {last.name} stage "
                f"reads: {first_few(absent)}"
            )
    read = {name: {**columns, **rejected_by(last, columns)} for name, columns in predictions.items()}
    return maps_of_problems(models[last.name], processor, last, with_columns(problems, read, earlier))
