"""The configuration: a T5 config plus the few fields that say how a picture is seen and fused.

Flat on purpose: the text model's fields are T5's own, under T5's names, so that any T5 `config.json` is a valid start.
"""

from typing import ClassVar

from .versions_mmcot import check_versions  # noqa: F401  # isort: skip (it must run before the imports below)

from transformers import AutoConfig, MT5Config, PreTrainedConfig, T5Config

__version__ = "0.1.0"

# Of the files that make a model: rises when code can no longer read what an earlier version wrote, or the other way.
FORMAT_VERSION = 1


# Checkpoints that a model starts from, beside its own: T5 (v1.0, v1.1, FLAN-T5, UnifiedQA, FLAN-Alpaca, ByT5) and mT5.
TEXT_MODELS = ("t5", "mt5")


class MMCoTConfig(T5Config):
    """
    Args:
        tied_head (`bool`, *optional*):
            Whether the output head is the embedding. By default it is where outputs are scaled (T5 v1.0), and of an
            unscaled checkpoint (T5 v1.1, mT5) where its file holds no head.
        fusion (`str`, defaults to `"gated"`):
            How the picture enters the encoder's states; a name in `fusion_mmcot.FUSIONS`.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the picture tower (a dict names its `model_type`). `None` when features come from outside.
        vision_tower (`str`, *optional*):
            How the tower's output becomes patches; a name in `vision_mmcot.TOWERS`. By default the one that goes with
            the `model_type` of `vision_config`.
        vision_hidden_size (`int`, *optional*):
            Width of one picture patch. Taken from `vision_config` where that says it (timm's does not); `None` without
            a tower makes a model that reads text only.
        num_vision_tokens (`int`, *optional*):
            Patches of one picture. Nothing is computed from it; a feature store of another number is refused.
        max_images (`int`, defaults to 1):
            The most pictures that one problem may have.
        freeze_vision (`bool`, defaults to `False`):
            Keep the tower as it is: no gradient, evaluation mode.
        zeros_for_missing_pictures (`bool`, defaults to `False`):
            Fuse a problem without picture with a patch of zeros, as the authors' checkpoints were trained. By default
            such a problem is not fused at all and is plain T5's.
        stage_adapters (`list[str]`, *optional*):
            Of a base that stages adapt: the subfolders of its repository that hold their adapters.
        format_version (`int`):
            Of the model's files. Any other than this code's is refused.

    Example:

    ```python
    >>> from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration

    >>> # FLAN-T5 small's text model, to be fed with DETR's features from outside
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
    vision_config: dict | PreTrainedConfig | None = None
    vision_tower: str | None = None
    vision_hidden_size: int | None = None
    num_vision_tokens: int | None = None
    max_images: int = 1
    freeze_vision: bool = False
    zeros_for_missing_pictures: bool = False
    stage_adapters: list[str] | None = None
    format_version: int = FORMAT_VERSION
    # `register_for_auto_class` writes one Auto class per class of ours; these entries stand for all of them.
    auto_map: dict | None = None
    custom_pipelines: dict | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """
        Raises:
            ValueError: the checkpoint is of a `model_type` that is no T5.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return from_text_model(config_dict, pretrained_model_name_or_path), kwargs

    def __post_init__(self, **kwargs):
        if isinstance(self.vision_config, dict):
            self.vision_config = AutoConfig.for_model(**{"model_type": "vit", **self.vision_config})
        super().__post_init__(**kwargs)
        if "/" in str(self._attn_implementation):
            # A kernel of the Hub is code, and a model's file may not choose code.
            raise ValueError(
                f"attn_implementation is {self._attn_implementation!r}, code of the Hub; expected a name that "
                f"transformers has."
            )
        if self.format_version != FORMAT_VERSION:
            age = "a newer" if self.format_version > FORMAT_VERSION else "an older"
            raise ValueError(
                f"format_version is {self.format_version}: this model was made by {age} mmcot, and this code "
                f"({__version__}) reads format {FORMAT_VERSION}. Load it with the code that lies beside it "
                f"(trust_remote_code=True, without code_revision), or use the mmcot that made it."
            )
        if self.vision_config is not None:
            width = vision_width(self.vision_config)
            if width is None and self.vision_hidden_size is None:
                raise ValueError(
                    f"vision_config (model_type {self.vision_config.model_type!r}) does not say how wide the tower's "
                    f"patches are: give vision_hidden_size."
                )
            if None not in (width, self.vision_hidden_size) and width != self.vision_hidden_size:
                raise ValueError(
                    f"vision_hidden_size is {self.vision_hidden_size}, but vision_config describes a tower of width "
                    f"{width}: leave vision_hidden_size out, or give a tower of that width."
                )
            self.vision_hidden_size = width or self.vision_hidden_size
        model_class = "modeling_mmcot.MMCoTForConditionalGeneration"
        self.auto_map = {
            "AutoConfig": "configuration_mmcot.MMCoTConfig",
            "AutoModel": model_class,
            "AutoModelForSeq2SeqLM": model_class,
            "AutoModelForImageTextToText": model_class,
        }
        # The second name is that of the card's `pipeline_tag`, which the Hub's own snippets use.
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
    The configuration of a text checkpoint as one of this model.

    Raises:
        ValueError: its `model_type` is another.
    """
    model_type = config_dict.get("model_type")
    if model_type in (None, MMCoTConfig.model_type):
        return config_dict
    if model_type not in TEXT_MODELS:
        reason = " (UMT5 has a position bias in each layer)" if model_type == "umt5" else ""
        raise ValueError(
            f"{name}: its model_type is {model_type!r}{reason}; expected a text model that is a T5 "
            f"({', '.join(TEXT_MODELS)}), or a model of this package ({MMCoTConfig.model_type})."
        )
    if model_type == "mt5":
        # Its class never scales outputs, whatever `tie_word_embeddings` is in the file, by which T5's decides it.
        config_dict = {**MT5Config.from_dict(config_dict).to_dict(), "scale_decoder_outputs": False}
    return {**config_dict, "model_type": MMCoTConfig.model_type}


def vision_width(vision_config: PreTrainedConfig) -> int | None:
    """Width of a tower's patches, as far as its configuration says it."""
    stages = getattr(vision_config, "hidden_sizes", None)  # a convolutional tower's, one for each stage
    return stages[-1] if stages else getattr(vision_config, "hidden_size", None)


MMCoTConfig.register_for_auto_class()
