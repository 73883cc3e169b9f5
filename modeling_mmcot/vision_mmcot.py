"""Pixels -> patches: a picture tower of transformers, run over the pictures of a batch of problems.

Notable:
- there are no vision models in this code: every tower is an `AutoModel` (timm's through transformers'
  `TimmWrapperModel`);
- only `TOWERS` contains properties of particular towers; the patches of a tower that is not listed are its last states;
- the patches of a picture do not depend on the batch: the tower gets each picture in its own size, without padding.

This file does not depend on text.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_mmcot import vision_width


def last_states(outputs: ModelOutput) -> torch.Tensor:
    """Return the last states; a convolutional grid `(batch_size, width, rows, columns)` is flattened by rows."""
    states = outputs.last_hidden_state
    return states if states.dim() == 3 else states.flatten(2).transpose(1, 2)


def without_class_state(outputs: ModelOutput) -> torch.Tensor:
    """Return the patch states of a ViT without the class token before them."""
    return outputs.last_hidden_state[:, 1:]


def pooled_state(outputs: ModelOutput) -> torch.Tensor:
    """Return the pooled vector of the whole picture, as one patch."""
    return outputs.pooler_output.flatten(1)[:, None]


@dataclass(frozen=True)
class VisionTower:
    """
    The properties of one kind of tower.

    Args:
        model_type (`str`, *optional*):
            The `model_type` of the tower's configuration, by which `AutoModel` finds the class.
        checkpoint (`str`, *optional*):
            The default checkpoint of this kind.
        num_patches (`int`, *optional*):
            The number of patches of one picture with that checkpoint, including repetitions.
        hidden_size (`int`, *optional*):
            The width of a patch with that checkpoint.
        patches (`Callable`, *optional*):
            Converts the tower's output to patches `(batch_size, num_patches / repeats, hidden_size)`.
        repeats (`int`, *optional*, defaults to 1):
            How often each patch is repeated.
        settings (`dict`, *optional*):
            Fields to set in the tower's configuration, to disable unused computations.
        unread (`tuple[str, ...]`, *optional*):
            Modules whose output is not used. They are removed, because they would never get a gradient.
        detects (`bool`, *optional*, defaults to `False`):
            Whether the checkpoint is a detection model, whose heads predict the object of each patch.
        paper_image_processor (`dict`, *optional*):
            Settings of the image processor in the authors' extract_features.py, if they are published.
    """

    model_type: str | None = None
    checkpoint: str | None = None
    num_patches: int | None = None
    hidden_size: int | None = None
    patches: Callable[[ModelOutput], torch.Tensor] = last_states
    repeats: int = 1
    settings: dict = field(default_factory=dict)
    unread: tuple[str, ...] = ("pooler",)
    detects: bool = False
    paper_image_processor: dict | None = None


# For several rows with the same model type, the first one is the default.
TOWERS: dict[str, VisionTower] = {
    "detr": VisionTower(
        model_type="detr",
        checkpoint="facebook/detr-resnet-101-dc5",
        num_patches=100,
        hidden_size=256,
        detects=True,
        # The shorter side is resized to 224, without a crop. `longest_edge` prevents narrow pictures from exhausting
        # the memory; the authors have no such limit. The longest of the 915 ScienceQA pictures tested reaches 2206.
        paper_image_processor={
            "image_processor_type": "DetrImageProcessor",
            "size": {"shortest_edge": 224, "longest_edge": 4096},
            "do_pad": False,
        },
    ),
    "vit": VisionTower(
        model_type="vit",
        checkpoint="google/vit-large-patch32-384",
        num_patches=145,
        hidden_size=1024,
        # timm's transform for its pretrained_cfg of vit_large_patch32_384.
        paper_image_processor={
            "image_processor_type": "TimmWrapperImageProcessor",
            "data_config": {
                "input_size": [3, 384, 384],
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "crop_mode": "center",
                "mean": [0.5, 0.5, 0.5],
                "std": [0.5, 0.5, 0.5],
            },
        },
    ),
    "clip": VisionTower(
        model_type="timm_wrapper",
        checkpoint="timm/resnet50_clip.openai",
        num_patches=49,
        hidden_size=2048,
        settings={"do_pooling": False},
        unread=("timm_model.head",),
    ),
    "clip_vit": VisionTower(
        model_type="clip_vision_model",
        checkpoint="openai/clip-vit-base-patch32",
        num_patches=49,
        hidden_size=768,
        patches=without_class_state,
        unread=("post_layernorm",),
    ),
    "siglip": VisionTower(
        model_type="siglip_vision_model",
        checkpoint="google/siglip-base-patch16-224",
        num_patches=196,
        hidden_size=768,
        settings={"vision_use_head": False},
        unread=(),
    ),
    "resnet": VisionTower(
        model_type="resnet", checkpoint="microsoft/resnet-50", num_patches=49, hidden_size=2048, unread=()
    ),
    "resnet_pooled": VisionTower(
        model_type="resnet",
        checkpoint="microsoft/resnet-50",
        num_patches=512,
        hidden_size=2048,
        patches=pooled_state,
        repeats=512,  # as in the original's utils_data.py
        unread=(),
    ),
}


def find_tower(vision_config: PreTrainedConfig, name: str | None = None) -> VisionTower:
    """
    Return the tower with the given name, or without a name the first one of the configuration's model type.

    Raises:
        ValueError: If the name is unknown, or its tower has another model type.
    """
    model_type = vision_config.model_type
    if name is None:
        candidates = (tower for tower in TOWERS.values() if tower.model_type == model_type)
        return next(candidates, VisionTower(model_type))
    if name not in TOWERS:
        raise ValueError(f"vision_tower is {name!r}; known towers: {', '.join(TOWERS)}.")
    if TOWERS[name].model_type != model_type:
        raise ValueError(
            f"vision_tower is {name!r}, a tower with model_type {TOWERS[name].model_type!r}, but vision_config has "
            f"model_type {model_type!r}."
        )
    return TOWERS[name]


def build_vision_tower(vision_config: PreTrainedConfig) -> PreTrainedModel:
    """Build a tower with random weights."""
    return remove_unread_parts(AutoModel.from_config(prepare_config(vision_config)))


def load_vision_tower(checkpoint: str, **kwargs) -> PreTrainedModel:
    """
    Load a pre-trained tower.

    Args:
        checkpoint (`str`):
            A name in `TOWERS`, a folder or a Hub id. Only the picture tower of a CLIP or SigLIP model is loaded.
        kwargs:
            Passed to `from_pretrained`.

    Raises:
        ValueError: If the checkpoint does not contain a picture tower, or one of its files is damaged.
    """
    config = prepare_config(tower_config(checkpoint, kwargs.get("revision")))
    try:
        tower, info = AutoModel.from_pretrained(
            checkpoint_of(checkpoint), config=config, output_loading_info=True, trust_remote_code=False, **kwargs
        )
    except SafetensorError as error:
        raise ValueError(f"{checkpoint}: a file of its weights is damaged: {error}. Download it again.") from error
    unread = find_tower(config).unread
    missing = [name for name in info["missing_keys"] if not name.startswith(unread)]
    if missing:
        # transformers only logs a warning, and continues with random weights.
        raise ValueError(
            f"{checkpoint} does not contain a picture tower of model_type {config.model_type!r}: {len(missing)} of its "
            f"tensors are missing, for example {sorted(missing)[0]}."
        )
    return remove_unread_parts(tower)


def tower_config(checkpoint: str, revision: str | None = None) -> PreTrainedConfig:
    """Load a checkpoint's configuration; for a CLIP or SigLIP model, the one of its picture tower."""
    config = AutoConfig.from_pretrained(checkpoint_of(checkpoint), revision=revision, trust_remote_code=False)
    return getattr(config, "vision_config", config)


def checkpoint_of(name_or_checkpoint: str) -> str:
    """Return the default checkpoint of a name in `TOWERS`; any other argument is a checkpoint itself."""
    return TOWERS[name_or_checkpoint].checkpoint if name_or_checkpoint in TOWERS else name_or_checkpoint


def tower_name(name_or_checkpoint: str, name: str | None = None) -> str | None:
    """Return the tower's name in `TOWERS`: the given name, or the checkpoint if that is a name; otherwise None."""
    return name or (name_or_checkpoint if name_or_checkpoint in TOWERS else None)


def resolved_name(vision_config: PreTrainedConfig, name: str | None = None) -> str:
    """Return the name of the tower that `find_tower` returns; for a tower not in `TOWERS`, its model type."""
    candidates = (known for known, tower in TOWERS.items() if tower.model_type == vision_config.model_type)
    return name or next(candidates, vision_config.model_type)


def check_sources(settings: dict) -> None:
    """
    Check that a tower's configuration does not refer to other files or repositories, which timm would open.

    Raises:
        ValueError: If it does.
    """
    for name, value in settings.items():
        if isinstance(value, dict):
            check_sources(value)
        elif (name in ("architecture", "backbone") and ":" in str(value)) or (name == "checkpoint_path" and value):
            raise ValueError(f"vision_config: {name} is {value!r}, another file or repository; expected a timm name.")


def prepare_config(vision_config: PreTrainedConfig) -> PreTrainedConfig:
    """Check a tower's configuration and apply the `settings` of its kind, in place."""
    check_sources(vision_config.to_dict())
    for name, value in find_tower(vision_config).settings.items():
        setattr(vision_config, name, value)
    return vision_config


def remove_unread_parts(tower: PreTrainedModel) -> PreTrainedModel:
    """Replace the modules whose output is not used by identities, in place."""
    for path in find_tower(tower.config).unread:
        parent, _, name = path.rpartition(".")
        if getattr(tower.get_submodule(parent), name, None) is not None:
            setattr(tower.get_submodule(parent), name, nn.Identity())
    return tower


def tower_width(tower: PreTrainedModel) -> int:
    """Return the width of a tower's patches, which for timm is known only to the model."""
    return vision_width(tower.config) or tower.timm_model.num_features


def encode_pictures(
    tower: PreTrainedModel, name: str | None, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    Run the tower over the real pictures of a batch, each in its own size.

    Args:
        tower (`PreTrainedModel`):
            The picture tower.
        name (`str`, *optional*):
            Its name in `TOWERS`.
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_images, 3, height, width)`):
            The pictures. The shape `(batch_size, 3, height, width)`, with one picture per problem, is also accepted.
        pixel_mask (`torch.Tensor` of shape `(batch_size, num_images, height, width)`, *optional*):
            1 for a real pixel, 0 for padding on the right and at the bottom, where image processors pad; all zeros for
            a missing picture. By default all pixels are real.

    Returns:
        The patches, `(batch_size, num_images * num_patches, width)`, with zeros for missing pictures, and their mask,
        `(batch_size, num_images * num_patches)`, True for the patches of a real picture; None, None if there is no
        picture.

    Raises:
        ValueError: If the mask does not match the pixels, or the tower's output does not have its width.
    """
    if pixel_values.dim() == 4:
        pixel_values = pixel_values[:, None]
        pixel_mask = pixel_mask[:, None] if pixel_mask is not None else None
    batch_size, num_images, _, *size = pixel_values.shape
    if pixel_mask is not None and pixel_mask.shape != (batch_size, num_images, *size):
        raise ValueError(
            f"pixel_mask has the shape {tuple(pixel_mask.shape)}; pixel_values of shape {tuple(pixel_values.shape)} "
            f"require a mask of shape {(batch_size, num_images, *size)}."
        )
    pixels = pixel_values.flatten(0, 1).to(tower.dtype)
    kind = find_tower(tower.config, name)
    if pixel_mask is None:
        patches = kind.patches(tower(pixel_values=pixels))
        is_real = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
    else:
        sizes = real_sizes(pixel_mask.flatten(0, 1).bool())
        is_real = (sizes > 0).all(dim=1)
        if not is_real.any():
            return None, None
        patches = None
        for height, width in sizes[is_real].unique(dim=0).tolist():
            group = (sizes == sizes.new_tensor([height, width])).all(dim=1)
            group_patches = kind.patches(tower(pixel_values=pixels[group, :, :height, :width]))
            if patches is None:
                patches = group_patches.new_zeros(len(pixels), *group_patches.shape[1:])
            patches[group] = group_patches
    if patches.shape[-1] != tower_width(tower):
        raise ValueError(
            f"The tower's output has patches {patches.shape[-1]} wide, but its width is {tower_width(tower)}: expected "
            f"states (batch_size, num_patches, width) or (batch_size, width, rows, columns)."
        )
    patches = patches.repeat(1, kind.repeats, 1)
    mask = is_real[:, None].expand(-1, patches.shape[1])
    return patches.reshape(batch_size, -1, patches.shape[-1]), mask.reshape(batch_size, -1)


def real_sizes(pixel_mask: torch.BoolTensor) -> torch.LongTensor:
    """
    Return the height and width of each picture without its padding on the right and at the bottom, `(num_pictures, 2)`.

    Raises:
        ValueError: If the real pixels of a picture are not a rectangle in the upper left corner.
    """
    heights, widths = pixel_mask.any(dim=2).sum(dim=1), pixel_mask.any(dim=1).sum(dim=1)
    rows, columns = (torch.arange(size, device=pixel_mask.device) for size in pixel_mask.shape[1:])
    rectangle = (rows[None, :, None] < heights[:, None, None]) & (columns[None, None, :] < widths[:, None, None])
    if not torch.equal(rectangle, pixel_mask):
        raise ValueError("pixel_mask: the real pixels of a picture are not a rectangle in its upper left corner.")
    return torch.stack([heights, widths], dim=1)
