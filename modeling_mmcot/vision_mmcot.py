"""Pixels -> patches: a picture tower of transformers, run over the pictures of a batch of problems.

Any tower whose output has a `last_hidden_state` of shape `(batch_size, num_patches, width)` serves. Nothing here is
hand-written vision code, and nothing here knows of text.
"""

import inspect

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig


def build_vision_tower(vision_config: PreTrainedConfig) -> nn.Module:
    """A tower with fresh weights."""
    return without_pooler(AutoModel.from_config(vision_config))


def without_pooler(tower: nn.Module) -> nn.Module:
    """The tower without its pooling head, which reads patches we use one by one and would never get a gradient."""
    if getattr(tower, "pooler", None) is not None:
        tower.pooler = None
    return tower


def encode_pictures(
    tower: nn.Module, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    Args:
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_images, 3, height, width)`):
            One picture each may come as `(batch_size, 3, height, width)`.
        pixel_mask (`torch.Tensor` of shape `(batch_size, num_images, height, width)`, *optional*):
            1 for a real pixel; all zero where there is no picture. Without it every picture is real.

    Returns:
        The patches, `(batch_size, num_images * num_patches, width)`, zero where there is no picture, and their mask,
        `(batch_size, num_images * num_patches)`, True for the patches of a real picture. The tower runs over the real
        pictures only; one that asks for a mask (DETR) gets theirs; None, None where there is not one.
    """
    if pixel_values.dim() == 4:
        pixel_values = pixel_values[:, None]
        pixel_mask = pixel_mask[:, None] if pixel_mask is not None else None
    batch_size, num_images = pixel_values.shape[:2]
    pixels = pixel_values.flatten(0, 1)
    if pixel_mask is None:
        is_real = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
    else:
        is_real = pixel_mask.flatten(0, 1).flatten(1).any(dim=1)
    if not is_real.any():
        return None, None
    inputs = {"pixel_values": pixels[is_real]}
    if pixel_mask is not None and "pixel_mask" in inspect.signature(tower.forward).parameters:
        inputs["pixel_mask"] = pixel_mask.flatten(0, 1)[is_real]
    real_patches = tower(**inputs).last_hidden_state
    patches = real_patches.new_zeros(len(pixels), *real_patches.shape[1:])
    patches[is_real] = real_patches
    mask = is_real[:, None].expand(-1, patches.shape[1])
    return patches.reshape(batch_size, -1, patches.shape[-1]), mask.reshape(batch_size, -1)
