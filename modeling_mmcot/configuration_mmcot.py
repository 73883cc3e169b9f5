"""The configuration: a T5 config plus the few fields that say how a picture is seen and fused.

Flat on purpose: the text model's fields are T5's own, under T5's names, so that any T5 `config.json` is a valid start.
"""

from typing import ClassVar

from transformers import AutoConfig, PreTrainedConfig, T5Config
from transformers.configuration_utils import SubConfigSpec


class MMCoTConfig(T5Config):
    """
    Args:
        fusion (`str`, defaults to `"gated"`):
            How the picture enters the encoder's states; a name in `fusion_mmcot.FUSIONS`.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the picture tower (a dict names its `model_type`). `None` when features come from outside.
        vision_hidden_size (`int`, *optional*):
            Width of one picture patch. Taken from `vision_config` when that is given; `None` without either makes a
            model that reads text only.
        num_vision_tokens (`int`, *optional*):
            Patches of one picture. Informative: nothing is computed from it.
        max_images (`int`, defaults to 1):
            The most pictures that one problem may have.
        freeze_vision (`bool`, defaults to `False`):
            Keep the tower as it is: no gradient, evaluation mode.
    """

    model_type = "mmcot"
    sub_configs_defaults: ClassVar[dict] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit", optional=True)
    }

    fusion: str = "gated"
    vision_config: dict | PreTrainedConfig | None = None
    vision_hidden_size: int | None = None
    num_vision_tokens: int | None = None
    max_images: int = 1
    freeze_vision: bool = False
    # `register_for_auto_class` writes one Auto class per class of ours; these entries stand for all of them.
    auto_map: dict | None = None
    custom_pipelines: dict | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.vision_config is not None:
            tower_width = self.vision_config.hidden_size
            if self.vision_hidden_size not in (None, tower_width):
                raise ValueError(
                    f"vision_hidden_size is {self.vision_hidden_size}, but vision_config describes a tower of width "
                    f"{tower_width}: leave vision_hidden_size out, or give a tower of that width."
                )
            self.vision_hidden_size = tower_width
        model_class = "modeling_mmcot.MMCoTForConditionalGeneration"
        self.auto_map = {
            "AutoConfig": "configuration_mmcot.MMCoTConfig",
            "AutoModel": model_class,
            "AutoModelForSeq2SeqLM": model_class,
            "AutoModelForImageTextToText": model_class,
        }
        self.custom_pipelines = {
            "multimodal-cot": {
                "impl": "pipeline_mmcot.MultimodalCoTPipeline",
                "pt": ["AutoModelForSeq2SeqLM"],
                "type": "multimodal",
            }
        }


MMCoTConfig.register_for_auto_class()
