"""Pixels -> patches: a picture tower of transformers, run over the pictures of a batch of problems.

Notable:
- no vision code of our own: every tower is an `AutoModel` (timm's through transformers' `TimmWrapperModel`);
- `TOWERS` is the one place that knows what is particular to a tower; an unlisted one is used by its last states;
- a picture's patches do not depend on the batch: the tower sees each picture in its own size, without padding.

Nothing here knows of text.
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
    """A transformer's states as they are; a convolutional tower's grid `(batch_size, width, rows, columns)` by rows."""
    states = outputs.last_hidden_state
    return states if states.dim() == 3 else states.flatten(2).transpose(1, 2)


def without_class_state(outputs: ModelOutput) -> torch.Tensor:
    """The patch states of a ViT that has a class token before them."""
    return outputs.last_hidden_state[:, 1:]


def pooled_state(outputs: ModelOutput) -> torch.Tensor:
    """One vector for the whole picture."""
    return outputs.pooler_output.flatten(1)[:, None]


@dataclass(frozen=True)
class VisionTower:
    """
    What is particular to one kind of tower.

    Args:
        model_type (`str`): of the tower's configuration; `AutoModel` finds the class by it.
        checkpoint (`str`): the one that stands for the name.
        num_patches (`int`), hidden_size (`int`): of one picture at that checkpoint.
        patches: the tower's output -> patches `(batch_size, num_patches / repeats, hidden_size)`.
        repeats (`int`): how often each of them is given.
        settings: fields of its configuration that are set, so that nothing is computed that is not read.
        unread: parts whose output is not read. They are taken out: they would never get a gradient.
        detects (`bool`): the checkpoint is a detection model's, whose heads say what each patch found.
        paper_image_processor: how the authors' extract_features.py prepared a picture, where they published it.
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


# Of several rows with one model type the first is the default.
TOWERS: dict[str, VisionTower] = {
    "detr": VisionTower(
        model_type="detr",
        checkpoint="facebook/detr-resnet-101-dc5",
        num_patches=100,
        hidden_size=256,
        detects=True,
        # The shorter side to 224, no crop. `longest_edge` keeps a strip of a picture from filling the memory; the
        # authors have no such bound. The longest of the ScienceQA pictures tried (915) comes to 2206.
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
        # timm's own transform by its own pretrained_cfg of vit_large_patch32_384.
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
    """The tower of that name, which must fit the configuration; without a name, by the configuration's model type."""
    model_type = vision_config.model_type
    if name is None:
        fitting = (tower for tower in TOWERS.values() if tower.model_type == model_type)
        return next(fitting, VisionTower(model_type))
    if name not in TOWERS:
        raise ValueError(f"vision_tower is {name!r}; known towers: {', '.join(TOWERS)}.")
    if TOWERS[name].model_type != model_type:
        raise ValueError(
            f"vision_tower is {name!r}, a tower of model_type {TOWERS[name].model_type!r}; vision_config is of "
            f"model_type {model_type!r}."
        )
    return TOWERS[name]


def build_vision_tower(vision_config: PreTrainedConfig) -> PreTrainedModel:
    """A tower with fresh weights."""
    return without_unread_parts(AutoModel.from_config(prepared(vision_config)))


def load_vision_tower(checkpoint: str, **kwargs) -> PreTrainedModel:
    """
    A pre-trained tower.

    Args:
        checkpoint (`str`): a name in `TOWERS`, a folder or a Hub id; of a CLIP or SigLIP model its picture tower.
        kwargs: passed to `from_pretrained`.

    Raises:
        ValueError: it is no picture tower, or a file of it is damaged.
    """
    config = prepared(tower_config(checkpoint, kwargs.get("revision")))
    try:
        tower, info = AutoModel.from_pretrained(
            checkpoint_of(checkpoint), config=config, output_loading_info=True, trust_remote_code=False, **kwargs
        )
    except SafetensorError as error:
        raise ValueError(f"{checkpoint}: a file of its weights is damaged: {error}. Download it again.") from error
    unread = find_tower(config).unread
    missing = [name for name in info["missing_keys"] if not name.startswith(unread)]
    if missing:
        # transformers only warns, and goes on with random weights.
        raise ValueError(
            f"{checkpoint} does not hold a picture tower of model_type {config.model_type!r}: {len(missing)} of its "
            f"tensors are missing, {sorted(missing)[0]} for one."
        )
    return without_unread_parts(tower)


def tower_config(checkpoint: str, revision: str | None = None) -> PreTrainedConfig:
    """A checkpoint's configuration; of a CLIP or SigLIP model that of its picture tower."""
    config = AutoConfig.from_pretrained(checkpoint_of(checkpoint), revision=revision, trust_remote_code=False)
    return getattr(config, "vision_config", config)


def checkpoint_of(name_or_checkpoint: str) -> str:
    """The checkpoint that stands for a name in `TOWERS`; anything else is a checkpoint itself."""
    return TOWERS[name_or_checkpoint].checkpoint if name_or_checkpoint in TOWERS else name_or_checkpoint


def tower_name(name_or_checkpoint: str, name: str | None = None) -> str | None:
    """The tower's name in `TOWERS`: as given, or as which the checkpoint was given."""
    return name or (name_or_checkpoint if name_or_checkpoint in TOWERS else None)


def resolved_name(vision_config: PreTrainedConfig, name: str | None = None) -> str:
    """The name of what `find_tower` finds; of a tower that is in no table its model type."""
    fitting = (known for known, tower in TOWERS.items() if tower.model_type == vision_config.model_type)
    return name or next(fitting, vision_config.model_type)


def check_sources(settings: dict) -> None:
    """
    Raises:
        ValueError: a tower's configuration names another file or repository, which timm would open.
    """
    for name, value in settings.items():
        if isinstance(value, dict):
            check_sources(value)
        elif (name in ("architecture", "backbone") and ":" in str(value)) or (name == "checkpoint_path" and value):
            raise ValueError(f"vision_config: {name} is {value!r}, another file or repository; expected a timm name.")


def prepared(vision_config: PreTrainedConfig) -> PreTrainedConfig:
    check_sources(vision_config.to_dict())
    for name, value in find_tower(vision_config).settings.items():
        setattr(vision_config, name, value)
    return vision_config


def without_unread_parts(tower: PreTrainedModel) -> PreTrainedModel:
    for path in find_tower(tower.config).unread:
        parent, _, name = path.rpartition(".")
        if getattr(tower.get_submodule(parent), name, None) is not None:
            setattr(tower.get_submodule(parent), name, nn.Identity())
    return tower


def tower_width(tower: PreTrainedModel) -> int:
    """Width of a tower's patches; timm says it in the model only."""
    return vision_width(tower.config) or tower.timm_model.num_features


def encode_pictures(
    tower: PreTrainedModel, name: str | None, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    Args:
        tower: the picture tower.
        name (`str`, *optional*): its name in `TOWERS`.
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_images, 3, height, width)`):
            One picture each may come as `(batch_size, 3, height, width)`.
        pixel_mask (`torch.Tensor` of shape `(batch_size, num_images, height, width)`, *optional*):
            1 for a real pixel, which are at the left and above, as image processors pad; all zero where there is no
            picture. Without it every pixel is real.

    Returns:
        The patches, `(batch_size, num_images * num_patches, width)`, zero where there is no picture, and their mask,
        `(batch_size, num_images * num_patches)`, True for the patches of a real picture. The tower runs over the real
        pictures only, each in its own size; None, None where there is not one.
    """
    if pixel_values.dim() == 4:
        pixel_values = pixel_values[:, None]
        pixel_mask = pixel_mask[:, None] if pixel_mask is not None else None
    batch_size, num_images, _, *size = pixel_values.shape
    if pixel_mask is not None and pixel_mask.shape != (batch_size, num_images, *size):
        raise ValueError(
            f"pixel_mask is of shape {tuple(pixel_mask.shape)}; pixel_values of shape {tuple(pixel_values.shape)} go "
            f"with one of shape {(batch_size, num_images, *size)}."
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
            f"The tower's last states become patches {patches.shape[-1]} wide, where it is {tower_width(tower)} wide: "
            f"expected states (batch_size, num_patches, width) or (batch_size, width, rows, columns)."
        )
    patches = patches.repeat(1, kind.repeats, 1)
    mask = is_real[:, None].expand(-1, patches.shape[1])
    return patches.reshape(batch_size, -1, patches.shape[-1]), mask.reshape(batch_size, -1)


def real_sizes(pixel_mask: torch.BoolTensor) -> torch.LongTensor:
    """Height and width of each picture, `(num_pictures, 2)`, within its padding, which is at the right and below."""
    heights, widths = pixel_mask.any(dim=2).sum(dim=1), pixel_mask.any(dim=1).sum(dim=1)
    rows, columns = (torch.arange(size, device=pixel_mask.device) for size in pixel_mask.shape[1:])
    rectangle = (rows[None, :, None] < heights[:, None, None]) & (columns[None, None, :] < widths[:, None, None])
    if not torch.equal(rectangle, pixel_mask):
        raise ValueError("pixel_mask: the real pixels of a picture are not a rectangle at its left upper corner.")
    return torch.stack([heights, widths], dim=1)
