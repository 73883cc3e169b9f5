"""Each stage's model of a repository: a whole one in a subfolder, or an adapter over the base at the root.

What a stage does with its model is `pipeline_mmcot.py`'s. PEFT is imported only where stages are adapters.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from .prompts_mmcot import VirtualTokens


def load_stages(
    root: PreTrainedModel, repository: str, names: list[str], revision: str | None = None
) -> Mapping[str, PreTrainedModel]:
    """
    The model of each stage, in evaluation mode, by the stage's name.

    Args:
        root (`PreTrainedModel`): what stands at the repository's root: the last stage, or the base that all adapt.
        repository (`str`): a folder or a Hub id.
        names (`list[str]`): the stages in order.
    """
    if root.config.stage_adapters:
        return StageAdapters(root, repository, names, revision)
    models = {}
    for name in names[:-1]:
        model = load_stage_model(type(root), repository, name, revision, dtype=root.dtype).to(root.device).eval()
        share_tower(model, root)
        models[name] = model
    return {**models, names[-1]: root.eval()}


def load_stage_model(
    model_class: type[PreTrainedModel], repository: str, subfolder: str, revision: str | None = None, **kwargs
) -> PreTrainedModel:
    """A stage's model from its subfolder, with the generation config that lies there."""
    model = model_class.from_pretrained(repository, subfolder=subfolder, revision=revision, **kwargs)
    # Of a local folder transformers takes the root's: every stage would write as long as the last one does.
    model.generation_config = load_generation_config(repository, subfolder, revision)
    return model


def load_generation_config(repository: str, subfolder: str, revision: str | None) -> GenerationConfig:
    file = os.path.join(subfolder, "generation_config.json")
    return GenerationConfig.from_pretrained(repository, file, revision=revision)


def share_tower(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Let `model` use the other's tower where its own is the same, weight for weight: it is held and run once."""
    own, tower = model.get_encoder().vision_tower, other.get_encoder().vision_tower
    if own is None or tower is None or model.config.vision_tower != other.config.vision_tower:
        return
    weights, others = own.state_dict(), tower.state_dict()
    if weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights):
        model.get_encoder().vision_tower = tower


class StageAdapters(Mapping):
    """
    Stages that are adapters of one base, which is in memory once. Asking for a stage makes its adapter the active one,
    and gives the base.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: an adapter was trained on another base or another fusion.
    """

    def __init__(self, base: PreTrainedModel, repository: str, names: list[str], revision: str | None = None):
        try:
            from peft import PeftConfig, PeftModelForSeq2SeqLM
        except ImportError as error:
            raise ImportError(f"The stages of {repository} are adapters, which PEFT loads: pip install peft") from error
        folders = {name: adapter_folder(repository, name, revision) for name in names}
        config = PeftConfig.from_pretrained(folders[names[0]])
        digest = base_digest(base)
        self.model = PeftModelForSeq2SeqLM(base, config, adapter_name=names[0], autocast_adapter_dtype=False)
        self.generation_configs = {}
        for name, folder in folders.items():
            self.load(folder, name)
            trained_on = self.model.peft_config[name].revision
            if None not in (digest, trained_on) and trained_on != digest:
                raise ValueError(
                    f"The adapter in {folder} was trained on another base: {trained_on}, this one is {digest}"
                )
            self.generation_configs[name] = load_generation_config(repository, name, revision)
        if config.is_prompt_learning:
            base.virtual_tokens = VirtualTokens(self.model)

    def load(self, folder: str, name: str) -> None:
        try:
            result = self.model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
            # PEFT loads virtual tokens, and then tells of them both as missing and as unexpected.
            found: Any = [key for key in result.missing_keys + result.unexpected_keys if not key.startswith("prompt_")]
        except (KeyError, RuntimeError) as error:  # no tensor of a part of the fusion; tensors of other shapes
            found = str(error)
        if found:
            raise ValueError(f"The adapter in {folder} was trained on another base or fusion: {found}")

    def __getitem__(self, name: str) -> PreTrainedModel:
        self.model.set_adapter(name, inference_mode=True)
        base = self.model.get_base_model()
        base.generation_config = self.generation_configs[name]
        return base

    def __iter__(self) -> Iterator[str]:
        return iter(self.generation_configs)

    def __len__(self) -> int:
        return len(self.generation_configs)


def base_digest(base: PreTrainedModel) -> str | None:
    """
    Tells a base from another of the same shape, by the beginnings of its weights in bfloat16, without the fusion's,
    which each adapter brings. An adapter says it in its configuration, as the `revision` of its base. None of a base
    whose weights are quantized, in shards, not there, or in float16, which rounds otherwise.
    """
    if getattr(base, "is_quantized", False) or base.dtype == torch.float16:
        return None
    digest = hashlib.sha256()
    for name, parameter in base.named_parameters():
        if parameter.is_meta or parameter.numel() == 0 or not parameter.is_floating_point():
            return None
        if ".fusion." not in name:
            beginning = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16)
            digest.update(name.encode() + beginning.view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def adapter_folder(repository: str, name: str, revision: str | None) -> str:
    """Where a stage's adapter lies on this machine. PEFT (0.21) finds none in a subfolder when it is offline."""
    files = [
        cached_file(repository, file, subfolder=name, revision=revision)
        for file in ("adapter_config.json", "adapter_model.safetensors")
    ]
    return os.path.dirname(files[0])
