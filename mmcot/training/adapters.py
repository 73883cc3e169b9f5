"""What of a model is trained: all but its frozen parts, or by PEFT adapters of a large base.

Adapters are made here. Loading them beside their base, to predict, is `loading_mmcot.py`'s, which ships.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig
from trl import ModelConfig, get_peft_config, get_quantization_config

from mmcot.hub.merging import check_not_adapted, shared_modules
from mmcot.storage.folders import replaced_folder
from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration
from modeling_mmcot.loading_mmcot import base_digest
from modeling_mmcot.virtual_tokens_mmcot import VirtualTokens

# Trained and saved whole, beside what adapts the text model: it is new, there is nothing in it to adapt.
FUSION = "fusion"
NOT_TEXT = r".*\b(fusion|vision_tower)\b.*"


def freeze(model: MMCoTForConditionalGeneration, text: bool, fusion: bool) -> None:
    """Leave parts of a model as they are. (The tower is the configuration's affair, `freeze_vision`.)"""
    for name, parameter in model.named_parameters():
        is_fusion, is_tower = f".{FUSION}." in name, ".vision_tower." in name
        if (fusion and is_fusion) or (text and not is_fusion and not is_tower):
            parameter.requires_grad_(False)


def adapt(
    model: MMCoTForConditionalGeneration,
    model_config: ModelConfig,
    freeze_fusion: bool = False,
    peft_type: str = "LORA",
    num_virtual_tokens: int = 20,
) -> PeftModel:
    """The model with a fresh adapter: what is trained of it are the adapter and the fusion, in float32."""
    if peft_type == "LORA":
        config = lora_config(model_config)
    else:
        config = prompt_config(model.config, peft_type, num_virtual_tokens)
    digest = base_digest(model)
    trains_fusion = model.encoder.fusion is not None and not freeze_fusion
    saved = {*(model_config.lora_modules_to_save or []), *([FUSION] if trains_fusion else [])}
    config.modules_to_save = sorted(saved) or None
    shared = shared_modules(model)
    adapted = get_peft_model(model, config)
    check_not_adapted(adapted, shared)
    if config.is_prompt_learning:
        model.virtual_tokens = VirtualTokens(adapted)
    # A path of this machine, which PEFT would publish. An adapter lies beside its base.
    adapted.peft_config["default"].base_model_name_or_path = ""
    adapted.peft_config["default"].revision = digest
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # a bfloat16 weight would swallow most of its updates
            parameter.data = parameter.data.float()
    return adapted


def lora_config(model_config: ModelConfig) -> LoraConfig:
    config = get_peft_config(model_config)
    config.task_type = TaskType.SEQ_2_SEQ_LM
    config.target_modules = target_modules(model_config)
    config.exclude_modules = NOT_TEXT
    return config


def prompt_config(
    config: MMCoTConfig, peft_type: str, num_virtual_tokens: int
) -> PromptTuningConfig | PrefixTuningConfig:
    """
    Virtual tokens before the encoder's input (Lester et al. 2021, arXiv 2104.08691, begun as tokens of the vocabulary),
    or keys and values in the decoder's attention (Li and Liang 2021, arXiv 2101.00190, without their projection).
    """
    common = {"task_type": TaskType.SEQ_2_SEQ_LM, "num_virtual_tokens": num_virtual_tokens}
    if peft_type == "PROMPT_TUNING":
        return PromptTuningConfig(
            **common, num_transformer_submodules=1, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB
        )
    # T5's heads together can be of another width than its states.
    width = config.num_heads * config.d_kv
    return PrefixTuningConfig(
        **common, num_layers=config.num_decoder_layers, num_attention_heads=config.num_heads, token_dim=width
    )


def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Those of an adapter that was saved, fusion included, into the model's own."""
    result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    unexpected = [key for key in result.unexpected_keys if key != "prompt_embeddings"]  # which PEFT has loaded
    if unexpected:
        raise ValueError(f"The adapter in {folder} is another one: {unexpected}")


def target_modules(model_config: ModelConfig) -> list[str] | str:
    """Names, or a pattern or "all-linear" for PEFT to read; by default PEFT's own choice for T5."""
    names = model_config.lora_target_modules
    if names is None:
        return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["t5"]
    # trl makes a list of one name that name, which PEFT would read as a pattern of whole names.
    return [names] if isinstance(names, str) and re.fullmatch(r"\w+(\.\w+)*", names) else names


def check_adapters(
    model_config: ModelConfig, linear_layers: list[str], peft_type: str = "LORA", shared: Sequence[str] = ()
) -> None:
    """
    Args:
        linear_layers: the names of the text model's.
        shared: `shared_modules` of the text model.

    Raises:
        ValueError: `lora_target_modules` matches nothing, or a module whose weight another one shares, which merging
            would change too; quantization was asked for without bitsandbytes or a GPU.
    """
    check_not_shared(model_config.lora_modules_to_save or [], "lora_modules_to_save", shared)
    quantization(model_config)
    if peft_type != "LORA":
        return
    targets = target_modules(model_config)
    if targets != "all-linear":  # which leaves the output head out
        check_not_shared(targets, "lora_target_modules", shared)
    if isinstance(targets, list):
        unknown = [name for name in targets if not any(f".{layer}".endswith(f".{name}") for layer in linear_layers)]
    else:
        is_known = targets == "all-linear" or any(re.fullmatch(targets, layer) for layer in linear_layers)
        unknown = [] if is_known else [targets]
    if unknown:
        ends = sorted({layer.rsplit(".", 1)[-1] for layer in linear_layers})
        raise ValueError(
            f"lora_target_modules: {unknown[0]!r} matches no linear layer of the text model; there are "
            f"{', '.join(ends)}."
        )


def check_not_shared(targets: list[str] | str, option: str, shared: Sequence[str]) -> None:
    for module in shared:
        is_meant = (
            any(f".{module}".endswith(f".{name}") for name in targets)
            if isinstance(targets, list)
            else re.fullmatch(targets, module) is not None
        )
        if is_meant:
            others = ", ".join(name for name in shared if name != module)
            raise ValueError(
                f"{option}: {module} shares its weight with {others}, which merging an adapter would change too: leave "
                f"it out."
            )


def quantization(model_config: ModelConfig) -> BitsAndBytesConfig | None:
    """How the base's text model is quantized while adapters are trained."""
    config = get_quantization_config(model_config)
    if config is None:
        return None
    asked = "load_in_4bit" if model_config.load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{asked} is set, which needs bitsandbytes, and that is not installed.")
    if not torch.cuda.is_available():
        raise ValueError(f"{asked} is set, which needs a GPU, and this machine has none.")
    return config


def save_base(model: MMCoTForConditionalGeneration, folder: Path, stage_names: list[str]) -> None:
    """The base that the stages adapt, whole or not at all."""
    model.config.stage_adapters = stage_names
    with replaced_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
