"""Selects the trained parameters of a model: all but its frozen parts, or PEFT adapters of a large base.

Adapters are created here. `loading_mmcot.py`, which ships, loads them with their base for prediction.
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

# Trained and saved as a full module beside the adapter: its weights are new, so there is nothing to adapt.
FUSION = "fusion"
NOT_TEXT = r".*\b(fusion|vision_tower)\b.*"


def freeze(model: MMCoTForConditionalGeneration, text: bool, fusion: bool) -> None:
    """Freeze the text model or the fusion. (The configuration's `freeze_vision` freezes the tower.)"""
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
    """Return the model with a new adapter. Only the adapter and the fusion are trained, in float32."""
    if peft_type == "LORA":
        config = lora_config(model_config)
    else:
        config = prompt_config(model.config, peft_type, num_virtual_tokens)
    digest = base_digest(model)
    trains_fusion = model.encoder.fusion is not None and not freeze_fusion
    modules_to_save = {*(model_config.lora_modules_to_save or []), *([FUSION] if trains_fusion else [])}
    config.modules_to_save = sorted(modules_to_save) or None
    shared = shared_modules(model)
    adapted = get_peft_model(model, config)
    check_not_adapted(adapted, shared)
    if config.is_prompt_learning:
        model.virtual_tokens = VirtualTokens(adapted)
    # PEFT would publish this path of the local machine. An adapter is always stored beside its base.
    adapted.peft_config["default"].base_model_name_or_path = ""
    adapted.peft_config["default"].revision = digest
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # most updates of a bfloat16 weight round to zero
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
    Configure prompt tuning, with virtual tokens before the encoder's input (Lester et al. 2021, arXiv 2104.08691,
    initialized from the vocabulary), or prefix tuning, with keys and values in the decoder's attention (Li and Liang
    2021, arXiv 2101.00190, without the projection in that paper).
    """
    common = {"task_type": TaskType.SEQ_2_SEQ_LM, "num_virtual_tokens": num_virtual_tokens}
    if peft_type == "PROMPT_TUNING":
        return PromptTuningConfig(
            **common, num_transformer_submodules=1, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB
        )
    # The total width of T5's heads can differ from the width of its states.
    width = config.num_heads * config.d_kv
    return PrefixTuningConfig(
        **common, num_layers=config.num_decoder_layers, num_attention_heads=config.num_heads, token_dim=width
    )


def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Load the weights of a saved adapter, fusion included, into the model's adapter."""
    result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    unexpected = [key for key in result.unexpected_keys if key != "prompt_embeddings"]  # PEFT has loaded these
    if unexpected:
        raise ValueError(f"The adapter in {folder} has weights that this model's adapter lacks: {unexpected}")


def target_modules(model_config: ModelConfig) -> list[str] | str:
    """Return PEFT's `target_modules`: names, a pattern or "all-linear"; by default PEFT's own choice for T5."""
    names = model_config.lora_target_modules
    if names is None:
        return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["t5"]
    # trl turns a list of one name into a string, which PEFT would read as a pattern for the full module name.
    return [names] if isinstance(names, str) and re.fullmatch(r"\w+(\.\w+)*", names) else names


def check_adapters(
    model_config: ModelConfig, linear_layers: list[str], peft_type: str = "LORA", shared: Sequence[str] = ()
) -> None:
    """
    Check the adapter options against the text model.

    Args:
        linear_layers: the names of the text model's linear layers.
        shared: `shared_modules` of the text model.

    Raises:
        ValueError: `lora_target_modules` matches no layer; an option selects a module that shares its weight with
            another module, which merging would change too; or quantization is set without bitsandbytes or a GPU.
    """
    check_not_shared(model_config.lora_modules_to_save or [], "lora_modules_to_save", shared)
    quantization(model_config)
    if peft_type != "LORA":
        return
    targets = target_modules(model_config)
    if targets != "all-linear":  # "all-linear" excludes the output head
        check_not_shared(targets, "lora_target_modules", shared)
    if isinstance(targets, list):
        unknown = [name for name in targets if not any(f".{layer}".endswith(f".{name}") for layer in linear_layers)]
    else:
        is_known = targets == "all-linear" or any(re.fullmatch(targets, layer) for layer in linear_layers)
        unknown = [] if is_known else [targets]
    if unknown:
        endings = sorted({layer.rsplit(".", 1)[-1] for layer in linear_layers})
        raise ValueError(
            f"lora_target_modules: {unknown[0]!r} matches no linear layer of the text model; expected one of "
            f"{', '.join(endings)}."
        )


def check_not_shared(targets: list[str] | str, option: str, shared: Sequence[str]) -> None:
    """Raise an error if an option selects a module that shares its weight."""
    for module in shared:
        is_selected = (
            any(f".{module}".endswith(f".{name}") for name in targets)
            if isinstance(targets, list)
            else re.fullmatch(targets, module) is not None
        )
        if is_selected:
            others = ", ".join(name for name in shared if name != module)
            raise ValueError(
                f"{option}: {module} shares its weight with {others}, which merging an adapter would change too: "
                f"remove it."
            )


def quantization(model_config: ModelConfig) -> BitsAndBytesConfig | None:
    """Return the quantization of the base's text model during adapter training."""
    config = get_quantization_config(model_config)
    if config is None:
        return None
    option = "load_in_4bit" if model_config.load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{option} is set, but needs bitsandbytes, which is not installed.")
    if not torch.cuda.is_available():
        raise ValueError(f"{option} is set, but needs a GPU, which this machine lacks.")
    return config


def save_base(model: MMCoTForConditionalGeneration, folder: Path, stage_names: list[str]) -> None:
    """Save the base that the stages adapt; the folder is complete or absent."""
    model.config.stage_adapters = stage_names
    with replaced_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
