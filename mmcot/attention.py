"""Where on the picture the fusion looked: for each token of a source, a map over the picture.

Patch towers have their grid. DETR's object queries have no place of their own: each is where its last decoder layer
attended to. Nothing is drawn here; `report.py` shows the maps.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import BatchFeature, PreTrainedModel

from mmcot.pictures import read_pictures
from mmcot.problems import without_gold
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.pictures_mmcot import as_rgb
from modeling_mmcot.processing_mmcot import Stage

STRIDES = (8, 16, 32, 64)


@dataclass
class TokenMaps:
    """
    Args:
        tokens: the source's.
        maps (`torch.FloatTensor` of shape `(num_tokens, num_pictures, rows, columns)`): over all pictures of a problem
            a token's sum to 1, as far as its attention has a place (a class token has none).
    """

    tokens: list[str]
    maps: torch.FloatTensor


@torch.no_grad()
def token_maps(
    model: PreTrainedModel, processor: MMCoTProcessor, stage: Stage, problems: Dataset
) -> Iterator[tuple[str, TokenMaps]]:
    """For each problem with a picture, its id and its maps. `problems` have the columns that the stage reads."""
    encoder = model.get_encoder()
    for problem in without_gold(problems):
        if not problem["images"]:
            continue
        images = [as_rgb(picture) for picture in read_pictures(problem)]
        inputs = BatchFeature(processor([problem], stage=stage.name, images=[images])).to(model.device, model.dtype)
        weights = encoder(**inputs, output_attentions=True).fusion_attentions[0].float()
        weights = weights.view(len(weights), len(images), -1)
        maps = [
            weights[:, number] @ places(encoder.vision_tower, inputs["pixel_values"][0, number], weights.shape[-1])
            for number in range(len(images))
        ]
        rows, columns = grid(encoder.vision_tower, inputs["pixel_values"][0, 0], weights.shape[-1])
        tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        yield problem["id"], TokenMaps(tokens, torch.stack(maps, dim=1).view(len(tokens), len(images), rows, columns))


def grid(tower: PreTrainedModel, pixels: torch.FloatTensor, num_patches: int) -> tuple[int, int]:
    """Rows and columns of the map of a picture `(3, height, width)`."""
    if is_detr(tower):
        height, width = pixels.shape[1:]
        length = cross_attention(tower, pixels).shape[-1]
        sizes = ((math.ceil(height / stride), math.ceil(width / stride)) for stride in STRIDES)
        return next(size for size in sizes if size[0] * size[1] == length)
    side = math.isqrt(num_patches)  # of a class token and its grid too, whose side is as large
    return side, side


def places(tower: PreTrainedModel, pixels: torch.FloatTensor, num_patches: int) -> torch.FloatTensor:
    """How much of each patch lies in each cell of the map, `(num_patches, rows * columns)`."""
    if is_detr(tower):
        return cross_attention(tower, pixels)
    side = math.isqrt(num_patches)
    if num_patches - side**2 not in (0, 1):
        raise ValueError(f"{num_patches} patches are neither a square grid nor one and a class token.")
    identity = torch.eye(side**2, device=pixels.device)
    return torch.cat([identity.new_zeros(num_patches - side**2, side**2), identity])  # a class token comes first


def is_detr(tower: PreTrainedModel) -> bool:
    return tower.config.model_type == "detr"


def cross_attention(tower: PreTrainedModel, pixels: torch.FloatTensor) -> torch.FloatTensor:
    """Of DETR's last decoder layer, mean over its heads, `(num_queries, rows * columns)`."""
    tower.set_attn_implementation("eager")  # the others give no weights
    outputs = tower(pixel_values=pixels[None], output_attentions=True)
    return outputs.cross_attentions[-1][0].mean(dim=0).float()
