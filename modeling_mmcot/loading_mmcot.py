"""Loading of the stages' models: full models in subfolders of a repository, adapters of the base model at its root, or
one model at the root that all stages share.

`inference_mmcot.py` runs the models. PEFT is imported only if the stages are adapters.
"""

import contextlib
import copy
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import cached_file, logging

from .fusion_contract_mmcot import Fusion
from .processing_mmcot import MMCoTProcessor
from .retrieval_mmcot import INDEX_FILES, MANIFEST, BM25Searcher, Passage, SearchError
from .settings_mmcot import check_own_settings, given_settings
from .versions_mmcot import check_versions
from .virtual_tokens_mmcot import VirtualTokens

logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that are passed on from the root's model to the other stages.
HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download", "proxies", "revision")
PLACEMENT_OPTIONS = ("device_map", "max_memory", "offload_folder", "offload_buffers", "tp_plan", "quantization_config")
FILE_OPTIONS = ("variant", "use_safetensors")  # not for adapters, which have one file of weights


class LoadingOptions(dict):
    """The arguments a model was loaded with. They stay in memory: a token is never written, not even to a pickle."""

    def __reduce__(self):
        return LoadingOptions, ()

    def __deepcopy__(self, memo):
        return LoadingOptions(self)


def load_stages(root: PreTrainedModel, repository: str, processor: MMCoTProcessor) -> Mapping[str, PreTrainedModel]:
    """
    Load the model of each stage, in evaluation mode, with the root's arguments (token, cache, device map, quantization)
    and from the root's commit. The processor gets a searcher for each stage that retrieves and has none.

    Args:
        root (`PreTrainedModel`):
            The model at the repository's root: that of the stage that answers, the base model of all adapters, or the
            model that all stages share.
        repository (`str`):
            A folder or a Hub id.
        processor (`MMCoTProcessor`):
            The repository's processor.

    Returns:
        `Mapping[str, PreTrainedModel]`: The models by the names of their stages.

    Raises:
        ValueError: If a stage's generation config contains a setting that stages do not support, or a shared model has
            no settings for a stage.
    """
    add_searchers(processor, root, repository)
    stages = processor.stages.with_models
    if root.config.stage_adapters:
        adapters = StageAdapters(root, repository, stages.names)
        for name, config in adapters.generation_configs.items():
            check_own_settings(config, os.path.join(repository, name))
        return adapters
    options = {"dtype": root.dtype, **hub_options(root), **select_options(root, PLACEMENT_OPTIONS + FILE_OPTIONS)}
    check_own_settings(root.generation_config, repository)
    if root.config.shared_stages is not None:
        return share_model(root.eval(), stages.names)
    models = {}
    for name in stages.names:
        if name == stages.answering.name:
            models[name] = root.eval()
            continue
        model = type(root).from_pretrained(repository, subfolder=name, **options).eval()
        check_own_settings(model.generation_config, os.path.join(repository, name))
        if not select_options(root, PLACEMENT_OPTIONS):
            model = model.to(root.device)
        attention = root.config._attn_implementation  # Auto classes store this argument only in the configuration
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        share_tower(model, root)
        models[name] = model
    return models


def share_model(model: PreTrainedModel, names: list[str]) -> dict[str, PreTrainedModel]:
    """
    Return a model for each stage. All of them consist of the modules of `model`; each has the generation config of its
    stage.

    Raises:
        ValueError: If `config.shared_stages` has no settings for a stage, or settings that stages do not support.
    """
    models = {}
    for name in names:
        if name not in model.config.shared_stages:
            raise ValueError(
                f"{model.name_or_path}: shared_stages in config.json has no settings for the stage {name!r}; found "
                f"{', '.join(model.config.shared_stages) or 'none'}."
            )
        models[name] = copy.copy(model)  # a shallow copy has the same modules and weights
        models[name].generation_config = copy.deepcopy(model.generation_config)
        models[name].generation_config.update(**given_settings(model.config.shared_stages[name]))
    return models


def add_searchers(processor: MMCoTProcessor, root: PreTrainedModel, repository: str) -> None:
    """Give the processor a searcher of the repository's index for each stage that retrieves and has none."""
    for stage in processor.stages.retrieving:
        processor.searchers.setdefault(stage.name, RepositorySearcher(repository, stage.name, hub_options(root)))


class RepositorySearcher:
    """
    Searches the index in a stage's subfolder of a repository. The first search opens it, after a download if necessary.

    Args:
        repository (`str`):
            A folder or a Hub id.
        stage (`str`):
            The name of the stage that retrieves, which is also the subfolder of its index.
        options (`dict[str, Any]`):
            The options for the download of the repository's files.
    """

    def __init__(self, repository: str, stage: str, options: dict[str, Any]):
        self.repository, self.stage, self.options = repository, stage, options
        self.lock = threading.Lock()
        self.index: BM25Searcher | None = None

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """Return up to `k` passages for each query."""
        with self.lock:
            if self.index is None:
                self.index = self.open()
        return self.index.search(queries, k)

    def open(self) -> BM25Searcher:
        """
        Open the index.

        Raises:
            SearchError: If the repository has no index.
        """
        return BM25Searcher(os.path.dirname(self.download()[0]))

    def download(self) -> list[str]:
        """Return the paths of the index's files, after their download if necessary."""
        names = (MANIFEST, *INDEX_FILES)
        try:
            return [cached_file(self.repository, f"{self.stage}/{name}", **self.options) for name in names]
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if self.repository else "the model was not loaded from a repository"
            raise SearchError(
                f"The {self.stage} stage has no index to search: {reason} Pass searcher= to the pipeline, or passages "
                f"with each problem."
            ) from error

    def save(self, folder: str) -> None:
        """Copy the index into a folder; warn if there is none."""
        try:
            paths = self.download()
        except SearchError as error:
            logger.warning("The system is saved without an index. %s", error)
            return
        os.makedirs(folder, exist_ok=True)
        for path in paths:
            target = os.path.join(folder, os.path.basename(path))
            if not (os.path.exists(target) and os.path.samefile(path, target)):
                shutil.copyfile(path, target)


def hub_options(root: PreTrainedModel) -> dict[str, Any]:
    """Return the options to download a root's files again, with the commit it was loaded from as revision."""
    options = select_options(root, HUB_OPTIONS)
    commit = getattr(root.config, "_commit_hash", None)
    return options if commit is None else {**options, "revision": commit}


def select_options(root: PreTrainedModel, names: tuple[str, ...]) -> dict[str, Any]:
    """Return those of the named options that a root was loaded with."""
    return {name: root.loading_options[name] for name in names if name in root.loading_options}


def quantization_of_text(config: Any) -> Any:
    """
    Restrict a quantization config (or its dict) to the text model's linear layers, unless it lists modules to skip.

    The fusion is excluded because each stage trains its own beside its adapter, and the tower because it is small.
    """
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.copy(config)
    for name in ("llm_int8_skip_modules", "skip_modules", "modules_to_not_convert"):  # bitsandbytes, HQQ, most others
        if getattr(config, name, ()) in (None, ["lm_head"]):  # the default values
            setattr(config, name, ["lm_head", r"encoder(\.block\.\d+)?\.fusion", "encoder.vision_tower"])
    return config


def check_fusion(
    model: PreTrainedModel, info: dict[str, Any], name: str | os.PathLike, options: dict[str, Any], is_replaced: bool
) -> None:
    """
    Check that a model has the fusion of the checkpoint that it was loaded from, or another one if it may be replaced.

    Args:
        info (`dict`):
            The names of missing, unexpected and mismatched weights, as `from_pretrained` returns them.
        name (`str`):
            The checkpoint: a folder or a Hub id.
        options (`dict`):
            The arguments of `from_pretrained`.
        is_replaced (`bool`):
            Whether another fusion is allowed.

    Raises:
        ValueError: If the fusion differs and may not be replaced, or if there is nothing to replace.
    """
    own = {key for key, _ in model.named_parameters() if ".fusion." in key}
    missing = own & set(info["missing_keys"])
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    others = {key for key in {*info["unexpected_keys"], *mismatched} if ".fusion." in key}
    # All weights of the fusion are missing if the checkpoint is a plain T5.
    changed = sorted(others | (missing if missing != own else set()))
    requested = f"{model.config.fusion!r} ({model.config.fusion_options})"
    if is_replaced:
        if not changed:
            raise ValueError(f"replace_fusion has no effect: {name} has the fusion {requested} already, or none.")
        if mismatched - others:
            raise ValueError(f"{name}: {min(mismatched - others)} has another shape than in the model.")
        reinitialize_fusion(model)
        logger.warning("%s: its fusion is replaced by %s, whose weights are all new.", name, requested)
    elif changed:
        given = {key: options[key] for key in (*HUB_OPTIONS, "subfolder") if options.get(key) is not None}
        stored, _ = type(model.config).get_config_dict(name, **given)
        if (stored.get("fusion"), stored.get("fusion_options")) == (model.config.fusion, model.config.fusion_options):
            raise ValueError(
                f"{name}: its fusion {requested} does not have the expected weights: {changed[0]} differs."
            )
        raise ValueError(
            f"{name} has the fusion {stored.get('fusion')!r} ({stored.get('fusion_options')}), but {requested} was "
            f"requested: {changed[0]} differs. Omit fusion and fusion_options, or pass replace_fusion=True to train a "
            f"new fusion."
        )


def reinitialize_fusion(model: PreTrainedModel) -> None:
    """Start all fusions of a model again, also weights with the same name and shape as in another fusion."""
    for module in model.modules():
        if isinstance(module, Fusion):
            for parameter in module.parameters():
                parameter._is_hf_initialized = False  # transformers' functions skip weights that were loaded
            module.initialize(model.config.initializer_factor)


@contextlib.contextmanager
def stage_model(models: Mapping[str, PreTrainedModel], name: str) -> Iterator[PreTrainedModel]:
    """Provide a stage's model within the block. If the stages are adapters, one thread at a time uses the base."""
    if isinstance(models, StageAdapters):
        with models.activated(name) as model:
            yield model
    else:
        yield models[name]


def share_tower(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Replace the tower of `model` by the tower of `other` if all weights are equal, to store and run it only once."""
    own, tower = model.get_encoder().vision_tower, other.get_encoder().vision_tower
    if own is None or tower is None or model.config.vision_tower != other.config.vision_tower:
        return
    weights, others = own.state_dict(), tower.state_dict()
    if weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights):
        model.get_encoder().vision_tower = tower


class StageAdapters(Mapping):
    """
    Stages that are adapters of one base model, which is in memory once. An item access activates the adapter of the
    stage and returns the base.

    Args:
        base (`PreTrainedModel`):
            The base model of all adapters.
        repository (`str`):
            A folder or a Hub id.
        names (`list[str]`):
            The names of the stages, which are also the subfolders of their adapters.

    Raises:
        ImportError: If PEFT is not installed, or too old.
        ValueError: If an adapter is damaged, or was trained on another base or another fusion.
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
        """
        Load a stage's adapter.

        Raises:
            ValueError: If a file of the adapter is damaged, or its tensors do not match the base or the fusion.
        """
        try:
            result = self.model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
            # PEFT loads virtual tokens, but then reports them both as missing and as unexpected.
            found: Any = [key for key in result.missing_keys + result.unexpected_keys if not key.startswith("prompt_")]
        except SafetensorError as error:
            raise ValueError(f"{folder}/adapter_model.safetensors is damaged: {error}. Download it again.") from error
        except (KeyError, RuntimeError) as error:  # a missing tensor of the fusion; tensors of other shapes
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
        """Provide the base with a stage's adapter to this thread only; restore the previous adapter afterwards."""
        with self.lock:
            base = self.model.get_base_model()
            active, generation_config = self.model.active_adapter, base.generation_config
            try:
                yield self[name]
            finally:
                self.model.set_adapter(active, inference_mode=True)
                base.generation_config = generation_config

    def save_pretrained(self, folder: str | os.PathLike, **kwargs) -> None:
        """Save the base without adapters, and each stage's adapter in a subfolder."""
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
    """Return a base's weights under their original names, without the weights that PEFT added."""
    weights = {}
    for name, tensor in base.state_dict().items():
        if not any(part in name for part in (".lora_", ".modules_to_save.")):
            weights[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return weights


def base_digest(base: PreTrainedModel) -> str | None:
    """
    Compute a digest that distinguishes base models of the same shape, from the first values of each weight in bfloat16.

    The fusion is not included, because each adapter contains its own. An adapter records the digest in its
    configuration, as the `revision` of its base. The digest is None for a base whose weights are quantized, sharded,
    not loaded, or in float16, which rounds differently.
    """
    if getattr(base, "is_quantized", False) or base.dtype == torch.float16:
        return None
    digest = hashlib.sha256()
    for name, parameter in base.named_parameters():
        if parameter.is_meta or parameter.numel() == 0 or not parameter.is_floating_point():
            return None
        if ".fusion." not in name:
            first_values = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16)
            digest.update(name.encode() + first_values.view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def adapter_folder(repository: str, name: str, options: dict[str, Any]) -> str:
    """Return the local folder of a stage's adapter, because PEFT (0.21) does not find subfolders when offline."""
    files = [
        cached_file(repository, file, subfolder=name, **options)
        for file in ("adapter_config.json", "adapter_model.safetensors", "generation_config.json")
    ]
    return os.path.dirname(files[0])
