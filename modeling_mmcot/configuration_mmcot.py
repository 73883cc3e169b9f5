"""The model's configuration: T5's, plus fields for the picture tower and the fusion.

The configuration is flat: the text model's fields keep T5's names, so that any T5 `config.json` can be loaded.
"""

from typing import ClassVar

from .versions_mmcot import check_versions  # noqa: F401  # isort: skip (it must run before the imports below)

from transformers import AutoConfig, MT5Config, PreTrainedConfig, T5Config

__version__ = "0.1.0"

# Version of the format of a model's files. Raise it when new code cannot read old files, or old code new files.
FORMAT_VERSION = 1

NO_FUSION = "none"  # the fusion of a model that reads text only

# Supported model types of text checkpoints: T5 (v1.0, v1.1, FLAN-T5, UnifiedQA, FLAN-Alpaca, ByT5) and mT5.
TEXT_MODELS = ("t5", "mt5")


class MMCoTConfig(T5Config):
    """
    Configuration of [`MMCoTForConditionalGeneration`]: the fields of [`T5Config`], and the fields below for the picture
    tower and the fusion.

    Args:
        tied_head (`bool`, *optional*):
            Whether the output head shares the embedding's weights. By default it does if outputs are scaled (T5 v1.0),
            or if the file of an unscaled checkpoint (T5 v1.1, mT5) has no head.
        fusion (`str`, *optional*, defaults to `"gated"`):
            The fusion of text and picture; a name in `fusion_mmcot.FUSIONS`, or `"none"` for a model that reads text
            only.
        fusion_options (`dict`, *optional*):
            Options of the fusion: arguments of its class in `fusion_mmcot.py`, such as `{"every": 2}` of `"flamingo"`.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the picture tower; a dict contains its `model_type` (default `"vit"`). `None` for a model
            that takes precomputed `vision_features`.
        vision_tower (`str`, *optional*):
            A name in `vision_mmcot.TOWERS`, which defines the conversion of the tower's output to patches. By default
            the tower is selected by the `model_type` of `vision_config`.
        vision_hidden_size (`int`, *optional*):
            Width of one picture patch. Read from `vision_config` if that contains it (timm's does not). If it is `None`
            and there is no tower, the model reads text only.
        num_vision_tokens (`int`, *optional*):
            Number of patches of one picture. Only used to reject a feature store with another number of patches.
        max_images (`int`, *optional*, defaults to 1):
            Maximum number of pictures per problem.
        freeze_vision (`bool`, *optional*, defaults to `False`):
            Whether to freeze the tower: no gradients, always in evaluation mode.
        zeros_for_missing_pictures (`bool`, *optional*, defaults to `False`):
            Whether to fuse a problem without picture with a patch of zeros, as in the training of the authors'
            checkpoints. By default such a problem is not fused, and its states are those of plain T5.
        stage_adapters (`list[str]`, *optional*):
            For a base model whose stages are adapters: the subfolders of the repository that contain the adapters.
        shared_stages (`dict[str, dict]`, *optional*):
            For a model that all stages of the repository share: by the name of each stage, its settings of `generate`.
        format_version (`int`, *optional*):
            Version of the format of the model's files. Versions other than this code's are rejected.

    Example:

    ```python
    >>> from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration

    >>> # FLAN-T5 small's text model, for DETR features that are computed outside of the model
    >>> config = MMCoTConfig(d_model=512, d_ff=1024, num_layers=8, num_heads=6, vision_hidden_size=256)
    >>> model = MMCoTForConditionalGeneration(config)
    >>> model.config.fusion, model.config.vision_hidden_size
    ('gated', 256)

    >>> # with a small ViT as its picture tower
    >>> vision_config = {"model_type": "vit", "image_size": 32, "patch_size": 16, "hidden_size": 24}
    >>> MMCoTConfig(vision_config=vision_config).vision_hidden_size
    24

    ```
    """

    model_type = "mmcot"
    sub_configs: ClassVar[dict] = {"vision_config": AutoConfig}

    tied_head: bool | None = None
    fusion: str = "gated"
    fusion_options: dict | None = None
    vision_config: dict | PreTrainedConfig | None = None
    vision_tower: str | None = None
    vision_hidden_size: int | None = None
    num_vision_tokens: int | None = None
    max_images: int = 1
    freeze_vision: bool = False
    zeros_for_missing_pictures: bool = False
    stage_adapters: list[str] | None = None
    shared_stages: dict[str, dict] | None = None
    format_version: int = FORMAT_VERSION
    # `register_for_auto_class` writes only one Auto class per class; these fields list all of them.
    auto_map: dict | None = None
    custom_pipelines: dict | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """
        Load the configuration's dict, also from a T5 checkpoint.

        Raises:
            ValueError: If the checkpoint's `model_type` is not a supported T5.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return from_text_model(config_dict, pretrained_model_name_or_path), kwargs

    def __post_init__(self, **kwargs):
        if isinstance(self.vision_config, dict):
            self.vision_config = AutoConfig.for_model(**{"model_type": "vit", **self.vision_config})
        super().__post_init__(**kwargs)
        if "/" in str(self._attn_implementation):
            # A kernel from the Hub is code, and a model's file must not select code to run.
            raise ValueError(
                f"attn_implementation is {self._attn_implementation!r}, code of the Hub; expected an implementation in "
                f"transformers."
            )
        if self.format_version != FORMAT_VERSION:
            age = "a newer" if self.format_version > FORMAT_VERSION else "an older"
            raise ValueError(
                f"format_version is {self.format_version}: this model was saved by {age} mmcot, and this code "
                f"({__version__}) reads format {FORMAT_VERSION}. Load it with the code in its own repository "
                f"(trust_remote_code=True, without code_revision), or with the mmcot version that saved it."
            )
        if self.vision_config is not None and self.fusion == NO_FUSION:
            raise ValueError(f"fusion is {NO_FUSION!r}, but vision_config describes a picture tower: omit one of them.")
        if self.vision_config is not None:
            width = vision_width(self.vision_config)
            if width is None and self.vision_hidden_size is None:
                raise ValueError(
                    f"vision_config (model_type {self.vision_config.model_type!r}) does not contain the width of the "
                    f"tower's patches: set vision_hidden_size."
                )
            if None not in (width, self.vision_hidden_size) and width != self.vision_hidden_size:
                raise ValueError(
                    f"vision_hidden_size is {self.vision_hidden_size}, but vision_config describes a tower of width "
                    f"{width}: omit vision_hidden_size, or use a tower of that width."
                )
            self.vision_hidden_size = width or self.vision_hidden_size
        model_class = "modeling_mmcot.MMCoTForConditionalGeneration"
        self.auto_map = {
            "AutoConfig": "configuration_mmcot.MMCoTConfig",
            "AutoModel": model_class,
            "AutoModelForSeq2SeqLM": model_class,
            "AutoModelForImageTextToText": model_class,
        }
        # The second task is the card's `pipeline_tag`, which the Hub's snippets use.
        self.custom_pipelines = {
            task: {
                "impl": "pipeline_mmcot.MultimodalCoTPipeline",
                "pt": ["AutoModelForSeq2SeqLM"],
                "type": "multimodal",
            }
            for task in ("multimodal-cot", "image-text-to-text")
        }


def from_text_model(config_dict: dict, name: str) -> dict:
    """
    Convert the configuration of a text checkpoint to one of this model.

    Raises:
        ValueError: If its `model_type` is not supported.
    """
    model_type = config_dict.get("model_type")
    if model_type in (None, MMCoTConfig.model_type):
        return config_dict
    if model_type not in TEXT_MODELS:
        reason = " (UMT5 has a position bias in each layer)" if model_type == "umt5" else ""
        raise ValueError(
            f"{name}: model_type is {model_type!r}{reason}; expected a T5 text model ({', '.join(TEXT_MODELS)}), or a "
            f"model of this package ({MMCoTConfig.model_type})."
        )
    if model_type == "mt5":
        # mT5 never scales outputs, but T5's config derives the scaling from `tie_word_embeddings` in the file.
        config_dict = {**MT5Config.from_dict(config_dict).to_dict(), "scale_decoder_outputs": False}
    return {**config_dict, "model_type": MMCoTConfig.model_type}


def vision_width(vision_config: PreTrainedConfig) -> int | None:
    """Return the width of a tower's patches, or None if its configuration does not contain it."""
    widths = getattr(vision_config, "hidden_sizes", None)  # of a convolutional tower, one for each of its stages
    return widths[-1] if widths else getattr(vision_config, "hidden_size", None)


MMCoTConfig.register_for_auto_class()
