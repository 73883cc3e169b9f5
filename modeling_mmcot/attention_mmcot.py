"""Maps of the fusion's attention: for each token of a source, its attention over the area of each picture.

The patches of most towers form a grid. DETR's object queries have no fixed position: the cross-attention of the last
decoder layer locates each of them. This file draws nothing: the Space and `mmcot`'s report page show the maps.
"""

import copy
import math
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel

from .processing_mmcot import MMCoTProcessor
from .stage_mmcot import Stage
from .vision_mmcot import real_sizes

STRIDES = (8, 16, 32, 64)


@dataclass
class TokenMaps:
    """
    The attention of each token of a source over the pictures of its problem.

    Args:
        tokens (`list[str]`):
            The tokens of the source.
        maps (`list[torch.FloatTensor]`):
            One map per picture, of shape `(num_tokens, rows, columns)`. The maps of one token sum to 1 over all
            pictures of the problem, minus its attention to patches without a position (class tokens).
    """

    tokens: list[str]
    maps: list[torch.FloatTensor]


@torch.no_grad()
def token_maps(
    model: PreTrainedModel, processor: MMCoTProcessor, stage: Stage, problem: dict, images: list[Image.Image]
) -> TokenMaps:
    """
    Compute the attention maps of one stage for one problem.

    Args:
        problem (`dict`):
            The columns that the stage reads, including the columns that earlier stages write.
        images (`list[Image.Image]`):
            The pictures of the problem, in RGB.

    Raises:
        ValueError: If the fusion has no attention over patches, or the positions of the tower's patches are unknown.
    """
    encoder = model.get_encoder()
    problem = {name: value for name, value in problem.items() if name not in ("image", "images")}
    inputs = BatchFeature(processor([problem], stage=stage.name, images=[images])).to(model.device, model.dtype)
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    read = inputs if model.virtual_tokens is None else model.virtual_tokens.before_source(inputs)
    attentions = encoder(**read, output_fusion_attentions=True).fusion_attentions
    if attentions is None:
        raise ValueError(f"The fusion {model.config.fusion!r} has no attention over patches, so there are no maps.")
    weights = attentions[0, -len(tokens) :].float().view(len(tokens), len(images), -1)  # without virtual tokens
    maps = []
    for number, pixels in enumerate(inputs["pixel_values"][0]):
        height, width = real_sizes(inputs["pixel_mask"][0, number, None].bool())[0].tolist()
        patch_maps = locate_patches(encoder.vision_tower, pixels[:, :height, :width], weights.shape[-1])
        maps.append(torch.einsum("tp,prc->trc", weights[:, number], patch_maps))
    return TokenMaps(tokens, maps)


def locate_patches(tower: PreTrainedModel, pixels: torch.FloatTensor, num_patches: int) -> torch.FloatTensor:
    """Return a map of each patch of a picture `(3, height, width)`, in shape `(num_patches, rows, columns)`."""
    if is_detr(tower):
        attended = cross_attention(tower, pixels)
        sizes = ([math.ceil(side / stride) for side in pixels.shape[1:]] for stride in STRIDES)
        return attended.unflatten(1, next(size for size in sizes if math.prod(size) == attended.shape[1]))
    side = math.isqrt(num_patches)
    if num_patches - side**2 not in (0, 1) or pixels.shape[1] != pixels.shape[2]:
        raise ValueError(
            f"{num_patches} patches of a picture of {tuple(pixels.shape[1:])} pixels: expected a square picture whose "
            f"patches form a square grid, with or without a class token."
        )
    identity = torch.eye(side**2, device=pixels.device)
    # A class token comes first and has no position.
    return torch.cat([identity.new_zeros(num_patches - side**2, side**2), identity]).unflatten(1, (side, side))


def is_detr(tower: PreTrainedModel) -> bool:
    return tower.config.model_type == "detr"


def cross_attention(tower: PreTrainedModel, pixels: torch.FloatTensor) -> torch.FloatTensor:
    """Return the cross-attention of DETR's last decoder layer, averaged over heads, `(num_queries, rows * columns)`."""
    # Only eager attention returns weights. It is set on a copy, because other threads may be using the tower.
    tower = copy.deepcopy(tower)
    tower.set_attn_implementation("eager")
    outputs = tower(pixel_values=pixels[None], output_attentions=True)
    return outputs.cross_attentions[-1][0].mean(dim=0).float()
