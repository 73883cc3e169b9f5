"""Attention maps of the fusion for the problems of a dataset; `attention_mmcot.py` computes the maps of one problem."""

from collections.abc import Iterator

from datasets import Dataset
from transformers import PreTrainedModel

from mmcot.pictures.reading import read_pictures
from mmcot.problems.schema import without_gold
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.attention_mmcot import TokenMaps, token_maps
from modeling_mmcot.pictures_mmcot import as_rgb
from modeling_mmcot.stage_mmcot import Stage


def maps_of_problems(
    model: PreTrainedModel, processor: MMCoTProcessor, stage: Stage, problems: Dataset
) -> Iterator[tuple[str, TokenMaps]]:
    """
    Yield the id and the maps of each problem with a picture.

    Args:
        problems: rows with the columns that the stage reads.

    Raises:
        ValueError: the positions of the tower's patches in the picture are unknown.
    """
    for problem in without_gold(problems):
        if problem["images"]:
            images = [as_rgb(picture) for picture in read_pictures(problem)]
            yield problem["id"], token_maps(model, processor, stage, problem, images)
