"""The report page of a predictions file, as `python -m mmcot.evaluate --report` writes it."""

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
from mmcot.prediction.columns import with_columns
from mmcot.prediction.provenance import weights_of
from mmcot.problems.schema import first_few, join_captions
from mmcot.problems.sources import load_problems, reading_options
from mmcot.problems.subsets import select

logger = logging.getLogger(__name__)


def write_page(
    arguments: argparse.Namespace, problems: Dataset, predictions: Predictions, scores: dict[str, Any]
) -> None:
    from mmcot.analysis.report import origin_of, write_report  # what draws is not needed to score
    from mmcot.prediction.system import load_system

    blind, origin = None, origin_of(Path(arguments.file))
    if arguments.without_picture is not None:
        blind = read_matching_predictions(arguments.without_picture, problems, False, arguments, pictures=False)
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

    seeing = [stage for stage in processor.stages if stage.sees_pictures]
    if not seeing or models[seeing[-1].name].get_encoder().vision_tower is None:
        raise ValueError("--attention: no stage of that model sees pictures, or it has no picture tower")
    earlier = processor.stages.before(seeing[-1])
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
