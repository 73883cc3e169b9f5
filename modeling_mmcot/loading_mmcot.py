"""Each stage's model of a repository: a whole one in a subfolder, or an adapter over the base at the root.

What a stage does with its model is `pipeline_mmcot.py`'s. PEFT is imported only where stages are adapters.
"""

import contextlib
import copy
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import cached_file

from .settings_mmcot import check_own_settings
from .versions_mmcot import check_versions
from .virtual_tokens_mmcot import VirtualTokens

# What `from_pretrained` was given for a repository's root and its other stages need too.
HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download", "proxies", "revision")
PLACEMENT_OPTIONS = ("device_map", "max_memory", "offload_folder", "offload_buffers", "tp_plan", "quantization_config")
FILE_OPTIONS = ("variant", "use_safetensors")  # not of adapters, which have one file


class LoadingOptions(dict):
    """How a model was loaded, in memory only: a token among it reaches no file, not even a pickle."""

    def __reduce__(self):
        return LoadingOptions, ()

    def __deepcopy__(self, memo):
        return LoadingOptions(self)


def load_stages(root: PreTrainedModel, repository: str, names: list[str]) -> Mapping[str, PreTrainedModel]:
    """
    The model of each stage, in evaluation mode, by the stage's name: loaded as the root was (token, cache, device map,
    quantization), from the commit that it came from.

    Args:
        root (`PreTrainedModel`): what stands at the repository's root: the last stage, or the base that all adapt.
        repository (`str`): a folder or a Hub id.
        names (`list[str]`): the stages in order.

    Raises:
        ValueError: a stage's generation config holds a setting that stages do not take.
    """
    if root.config.stage_adapters:
        adapters = StageAdapters(root, repository, names)
        for name, config in adapters.generation_configs.items():
            check_own_settings(config, os.path.join(repository, name))
        return adapters
    options = {"dtype": root.dtype, **hub_options(root), **given_of(root, PLACEMENT_OPTIONS + FILE_OPTIONS)}
    check_own_settings(root.generation_config, repository)
    models = {}
    for name in names[:-1]:
        model = type(root).from_pretrained(repository, subfolder=name, **options).eval()
        check_own_settings(model.generation_config, os.path.join(repository, name))
        if not given_of(root, PLACEMENT_OPTIONS):
            model = model.to(root.device)
        attention = root.config._attn_implementation  # Auto classes keep what was asked for in the configuration alone
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        share_tower(model, root)
        models[name] = model
    return {**models, names[-1]: root.eval()}


def hub_options(root: PreTrainedModel) -> dict[str, Any]:
    """Where a root's files come from: as it was asked for, at the commit that it was loaded from."""
    options = given_of(root, HUB_OPTIONS)
    commit = getattr(root.config, "_commit_hash", None)
    return options if commit is None else {**options, "revision": commit}


def given_of(root: PreTrainedModel, names: tuple[str, ...]) -> dict[str, Any]:
    """Of these options those that a root was loaded with."""
    return {name: root.loading_options[name] for name in names if name in root.loading_options}


def quantization_of_text(config: Any) -> Any:
    """
    A quantization's configuration (or its dict), by which only the text model's linear layers are quantized, unless it
    lists the modules to skip: each stage has a fusion of its own, beside its adapter, and the tower is small.
    """
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.copy(config)
    for name in ("llm_int8_skip_modules", "skip_modules", "modules_to_not_convert"):  # bitsandbytes, HQQ, most others
        if getattr(config, name, ()) in (None, ["lm_head"]):  # the defaults
            setattr(config, name, ["lm_head", "encoder.fusion", "encoder.vision_tower"])
    return config


@contextlib.contextmanager
def stage_model(models: Mapping[str, PreTrainedModel], name: str) -> Iterator[PreTrainedModel]:
    """A stage's model for the length of the block. Where stages adapt one base, one thread at a time has it."""
    if isinstance(models, StageAdapters):
        with models.activated(name) as model:
            yield model
    else:
        yield models[name]


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
        ImportError: PEFT is not installed, or too old.
        ValueError: an adapter was trained on another base or another fusion.
    """

    def __init__(self, base: PreTrainedModel, repository: str, names: list[str]):
        try:
            check_versions("peft")
            from peft import PeftConfig, PeftModelForSeq2SeqLM
        except ModuleNotFoundError as error:
            raise ImportError(f"The stages of {repository} are adapters, which PEFT loads: pip install peft") from error
        options = hub_options(base)
        folders = {name: adapter_folder(repository, name, options) for name in names}
        config = PeftConfig.from_pretrained(folders[names[0]])
        digest = base_digest(base)
        self.model = PeftModelForSeq2SeqLM(base, config, adapter_name=names[0], autocast_adapter_dtype=False)
        self.base_generation_config = base.generation_config
        self.generation_configs = {}
        self.lock = threading.RLock()
        for name, folder in folders.items():
            self.load(folder, name)
            trained_on = self.model.peft_config[name].revision
            if None not in (digest, trained_on) and trained_on != digest:
                raise ValueError(
                    f"The adapter in {folder} was trained on another base: {trained_on}, this one is {digest}"
                )
            self.generation_configs[name] = GenerationConfig.from_pretrained(folder)
        if config.is_prompt_learning:
            base.virtual_tokens = VirtualTokens(self.model)

    def load(self, folder: str, name: str) -> None:
        try:
            result = self.model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
            # PEFT loads virtual tokens, and then tells of them both as missing and as unexpected.
            found: Any = [key for key in result.missing_keys + result.unexpected_keys if not key.startswith("prompt_")]
        except SafetensorError as error:
            raise ValueError(f"{folder}/adapter_model.safetensors is damaged: {error}. Download it again.") from error
        except (KeyError, RuntimeError) as error:  # no tensor of a part of the fusion; tensors of other shapes
            found = str(error)
        if found:
            raise ValueError(f"The adapter in {folder} was trained on another base or fusion: {found}")

    def __getitem__(self, name: str) -> PreTrainedModel:
        self.model.set_adapter(name, inference_mode=True)
        base = self.model.get_base_model()
        base.generation_config = self.generation_configs[name]
        return base

    @contextlib.contextmanager
    def activated(self, name: str) -> Iterator[PreTrainedModel]:
        """The base with that stage's adapter, for this thread alone; afterwards it is as it was before."""
        with self.lock:
            base = self.model.get_base_model()
            active, generation_config = self.model.active_adapter, base.generation_config
            try:
                yield self[name]
            finally:
                self.model.set_adapter(active, inference_mode=True)
                base.generation_config = generation_config

    def save_pretrained(self, folder: str | os.PathLike, **kwargs) -> None:
        """The base as it was before it was adapted, and a subfolder with each stage's adapter."""
        base = self.model.get_base_model()
        with self.lock:
            self.model.save_pretrained(folder, selected_adapters=list(self), save_embedding_layers=False)
            generation_config, base.generation_config = base.generation_config, self.base_generation_config
            try:
                base.save_pretrained(folder, state_dict=weights_before_adapting(base), **kwargs)
            finally:
                base.generation_config = generation_config
        for name, stage_config in self.generation_configs.items():
            stage_config.save_pretrained(os.path.join(folder, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.generation_configs)

    def __len__(self) -> int:
        return len(self.generation_configs)


def weights_before_adapting(base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A base's weights by its own names, without what PEFT put beside them."""
    weights = {}
    for name, tensor in base.state_dict().items():
        if not any(part in name for part in (".lora_", ".modules_to_save.")):
            weights[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return weights


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


def adapter_folder(repository: str, name: str, options: dict[str, Any]) -> str:
    """Where a stage's adapter lies on this machine. PEFT (0.21) finds none in a subfolder when it is offline."""
    files = [
        cached_file(repository, file, subfolder=name, **options)
        for file in ("adapter_config.json", "adapter_model.safetensors", "generation_config.json")
    ]
    return os.path.dirname(files[0])
