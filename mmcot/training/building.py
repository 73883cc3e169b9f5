"""A recipe -> its parts: the stages, the processor, the model that every stage starts from.

No model is trained and nothing is written here. The only data read are the problems that a tokenizer is trained on.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError, meta
from safetensors import SafetensorError, safe_open
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import ModelConfig

from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.featurizer import load_image_processor
from mmcot.problems.schema import GOLD_COLUMNS, TEXT_COLUMNS
from mmcot.recipes.arguments import StageArguments
from mmcot.recipes.recipe import Recipe
from mmcot.storage.paths import refuse_absent_path
from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.pictures_mmcot import build_image_processor
from modeling_mmcot.settings_mmcot import check_own_settings
from modeling_mmcot.stage_mmcot import (
    CHECK,
    ENVIRONMENT,
    KINDS,
    PAPER_TEMPLATES,
    PASSAGE_FIELDS,
    QUERY,
    RETRIEVE,
    RIGHT,
    WRONG,
    Stage,
    Stages,
)
from modeling_mmcot.vision_mmcot import find_tower, load_vision_tower, tower_config, tower_name, tower_width


def build_stages(stages: list[StageArguments]) -> Stages:
    """
    Build the stages of a recipe.

    Raises:
        ValueError: a stage has an unknown template, its source cannot be rendered from the columns that it reads, or it
            sends problems back and no earlier stage can write again.
    """
    built = Stages(build_stage(arguments) for arguments in stages)
    for stage in built:
        make_target = KINDS[stage.kind].make_target
        if make_target is not None:
            stage.target = make_target(built.answering.target)
        built.repeated_by(stage)
        check_templates(stage, [other.writes for other in built if other.kind == RETRIEVE])
    return built


def build_stage(arguments: StageArguments) -> Stage:
    if arguments.template is not None and arguments.template not in PAPER_TEMPLATES:
        raise ValueError(
            f"stage {arguments.name!r}: template is {arguments.template!r}; known: {', '.join(PAPER_TEMPLATES)}."
        )
    templates = PAPER_TEMPLATES.get(arguments.template, {"source": QUERY, "target": ""})
    source, target = arguments.source or templates["source"], arguments.target or templates["target"]
    optional = {name: getattr(arguments, name) for name in ("num_passages", "exclude_verbatim")}
    return Stage(
        name=arguments.name,
        reads=arguments.reads,
        writes=arguments.writes,
        source=source,
        target=target,
        max_source_length=arguments.max_source_length,
        max_target_length=arguments.max_target_length,
        score=arguments.score or default_score(target),
        kind=arguments.kind,
        **{name: value for name, value in optional.items() if value is not None},
    )


def check_templates(stage: Stage, passage_columns: list[str]) -> None:
    """
    Check a stage's source template, and that the target of each choice can be rendered in prediction.

    Args:
        passage_columns: the columns that contain passages.

    Raises:
        ValueError: the source template cannot be rendered from the columns that the stage reads, or the target of a
            choice needs a gold column.
    """
    passages = [dict.fromkeys(PASSAGE_FIELDS, "a")]
    examples = {"choices": ["a", "b"], **dict.fromkeys(passage_columns, passages)}
    row = {name: examples.get(name, "a") for name in stage.reads if name != "images"}
    try:
        stage.render_source(row)
    except TemplateError as error:
        raise ValueError(
            f"stage {stage.name!r}: its source cannot be rendered from the columns that it reads "
            f"({', '.join(stage.reads)}): {error}."
        ) from error
    if not stage.answers:
        return
    try:
        stage.render_target({**dict.fromkeys(set(TEXT_COLUMNS) - set(GOLD_COLUMNS), "a"), **row, "answer": 0})
    except TemplateError as error:
        raise ValueError(
            f"stage {stage.name!r}: its target cannot be rendered for a choice, without gold columns: {error}."
        ) from error


def default_score(target: str) -> str:
    """Return "mean" if the target contains a choice's text, because longer texts have lower total log-probabilities."""
    try:
        columns = meta.find_undeclared_variables(ENVIRONMENT.parse(target))
    except TemplateError as error:
        raise ValueError(f"the target {target!r:.100} is not a valid template: {error}.") from error
    return "mean" if "choices" in columns else "total"


def check_tower_name(recipe: Recipe) -> None:
    """Raise an error if `vision_tower` is not a known name, or does not fit the tower that the recipe describes."""
    arguments = recipe.arguments
    if arguments.vision_tower is None:
        return
    if arguments.vision_model_name_or_path is not None:
        vision_config = tower_config(arguments.vision_model_name_or_path)
    elif arguments.vision_config is not None:
        vision_config = AutoConfig.for_model(**arguments.vision_config)
    else:
        raise ValueError(f"vision_tower is {arguments.vision_tower!r}, but the recipe has no picture tower.")
    find_tower(vision_config, arguments.vision_tower)


def is_frozen(recipe: Recipe) -> bool:
    """Whether the picture tower is frozen."""
    if recipe.arguments.freeze_vision is not None:
        return recipe.arguments.freeze_vision
    own = own_config(recipe.model_config)
    return own is not None and own.freeze_vision


def build_processor(recipe: Recipe, stages: list[Stage], train_problems: Dataset) -> MMCoTProcessor:
    """Build the processor: the recipe's tokenizer, or one trained on the problems, and the tower's image processor."""
    arguments, model_config = recipe.arguments, recipe.model_config
    if arguments.tokenizer_vocab_size is not None:
        tokenizer = train_tokenizer(train_problems, stages, arguments.tokenizer_vocab_size)
    else:
        name = arguments.tokenizer_name_or_path or model_config.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    image_processor = None
    if arguments.image_processor is not None:
        image_processor = build_image_processor(arguments.image_processor)
    elif arguments.vision_model_name_or_path is not None:
        image_processor = load_image_processor(arguments.vision_model_name_or_path, arguments.vision_preprocessing)
    elif own_config(model_config) is not None:
        image_processor = MMCoTProcessor.from_pretrained(
            model_config.model_name_or_path, trust_remote_code=False
        ).image_processor
    processor = MMCoTProcessor(tokenizer, image_processor, stages)
    check_verdicts(processor)
    return processor


def check_verdicts(processor: MMCoTProcessor) -> None:
    """Raise an error if a stage checks answers, and the tokenizer does not distinguish its verdicts."""
    right, wrong = processor.tokenize_targets([RIGHT, WRONG]).tolist()
    for stage in processor.stages:
        if stage.kind == CHECK and right == wrong:
            raise ValueError(
                f"stage {stage.name!r} of kind {CHECK!r} writes {RIGHT!r} or {WRONG!r}, but the tokenizer "
                f"{processor.tokenizer.name_or_path or type(processor.tokenizer).__name__} has the same tokens for "
                f"both ({', '.join(processor.tokenizer.convert_ids_to_tokens(right))}): choose another tokenizer."
            )


def own_config(model_config: ModelConfig) -> MMCoTConfig | None:
    """Return the configuration of the initial checkpoint if it is an MMCoT model; None for a plain T5."""
    if model_config.model_name_or_path is None:
        return None
    name, revision = model_config.model_name_or_path, model_config.model_revision
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    return config if isinstance(config, MMCoTConfig) else None


def train_tokenizer(problems: Dataset, stages: list[Stage], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a small tokenizer with T5's special tokens on the sources and targets of the training problems."""
    rows = problems.remove_columns("images").to_list()

    def texts():
        for row in rows:
            for stage in stages:
                row = {**row, stage.writes: stage.render_target(row)}
                yield stage.render_source(row)
                yield row[stage.writes]
                yield KINDS[stage.kind].sends_back or ""  # a target that gold columns never have

    # Byte pairs within words: most words are a single token even with a small vocabulary.
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex("[.,?!:]"), "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    special_tokens = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def text_skeleton(recipe: Recipe) -> MMCoTForConditionalGeneration:
    """
    Build the text model without weights, picture tower and fusion.

    Raises:
        ValueError: the checkpoint's `model_type` is not a T5, or its generation config contains a setting that stages
            do not support.
    """
    tower = recipe.arguments.vision_model_name_or_path
    for path in (recipe.model_config.model_name_or_path, tower, recipe.arguments.tokenizer_name_or_path):
        if path is not None:
            refuse_absent_path(path, "a checkpoint's folder, or an id of the Hub (USER/NAME)")
            check_weight_files(path)
    name, revision = recipe.model_config.model_name_or_path, recipe.model_config.model_revision
    if name is None:
        return skeleton(MMCoTConfig(**(recipe.arguments.text_config or {})))
    config = MMCoTConfig.from_pretrained(name, revision=revision)
    config.vision_config = config.vision_hidden_size = None
    with contextlib.suppress(OSError):  # a generation config is optional
        check_own_settings(GenerationConfig.from_pretrained(name, revision=revision), name)
    return skeleton(config)


def skeleton(config: MMCoTConfig) -> MMCoTForConditionalGeneration:
    """Build a model without weights, which takes no time and no memory."""
    with torch.device("meta"):
        return MMCoTForConditionalGeneration(config)


def check_weight_files(folder: str) -> None:
    """
    Check the weight files of a local checkpoint without reading its tensors.

    Raises:
        ValueError: a file is truncated or damaged.
    """
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}. Copy or download it again.") from error


def check_wrapped_classes(model: nn.Module) -> None:
    """Raise an error if the model lacks a layer that FSDP is to wrap, because accelerate checks this only later."""
    class_names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    known = {type(module).__name__ for module in model.modules()}
    for name in filter(None, class_names.split(",")):
        if name not in known:
            raise ValueError(
                f"fsdp_transformer_layer_cls_to_wrap is {name!r}, but the text model has no such layer; expected one "
                f"of {', '.join(sorted(known))}."
            )


def picture_fields(recipe: Recipe, store: FeatureStore | None, tower: PreTrainedModel | None = None) -> dict[str, Any]:
    """Return the fields of the model's configuration that describe its pictures and fusion."""
    arguments = recipe.arguments
    fields = {"max_images": arguments.max_images}
    for name in ("fusion", "fusion_options", "freeze_vision"):
        if getattr(arguments, name) is not None:
            fields[name] = getattr(arguments, name)
    own = own_config(recipe.model_config)
    if own is not None and own.vision_hidden_size is not None:
        return fields  # the model keeps its own width; a later check compares it with the tower or the store
    if tower is not None:
        fields["vision_hidden_size"] = tower_width(tower)
    elif store is not None:
        fields["vision_hidden_size"] = store.hidden_size
        fields["num_vision_tokens"] = store.num_patches
        fields["vision_tower"] = tower_name(store.manifest["vision_tower"])
    return fields


def new_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]) -> MMCoTConfig:
    """Build the configuration of a model that starts from random weights."""
    return MMCoTConfig(
        vocab_size=len(tokenizer),
        decoder_start_token_id=tokenizer.pad_token_id,
        vision_config=recipe.arguments.vision_config,
        **{"vision_tower": recipe.arguments.vision_tower, **fields},
        **(recipe.arguments.text_config or {}),
    )


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, store: FeatureStore | None
) -> MMCoTForConditionalGeneration:
    """Build the model that every stage starts from; it is the same for each stage."""
    arguments, model_config = recipe.arguments, recipe.model_config
    set_seed(recipe.training_arguments.seed)
    tower = None
    if arguments.vision_model_name_or_path is not None:
        tower = load_vision_tower(arguments.vision_model_name_or_path)
    fields = picture_fields(recipe, store, tower)
    if model_config.model_name_or_path is None:
        model = MMCoTForConditionalGeneration(new_config(recipe, tokenizer, fields))
        if model_config.dtype not in (None, "auto"):
            model = model.to(getattr(torch, model_config.dtype))
    else:
        model = MMCoTForConditionalGeneration.from_pretrained(
            model_config.model_name_or_path,
            revision=model_config.model_revision,
            dtype=model_config.dtype,
            attn_implementation=model_config.attn_implementation,
            replace_fusion=arguments.replace_fusion,
            **fields,
        )
        # The checkpoint can be the root of a system, whose other stages are not in this model.
        model.config.stage_adapters = model.config.shared_stages = None
    if tower is not None:
        model.attach_tower(tower, tower_name(arguments.vision_model_name_or_path, arguments.vision_tower))
    return model


class InitialModel:
    """
    The model that every stage starts from. The first stage takes the model that preparation built for its checks; later
    stages build it again, because training changes it.

    Args:
        recipe: describes the model.
        tokenizer: sets the vocabulary size of a model that starts from random weights.
        store: precomputed features of the pictures, if any.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, store: FeatureStore | None):
        self.recipe, self.tokenizer, self.store = recipe, tokenizer, store
        self.built: MMCoTForConditionalGeneration | None = None

    def inspect(self) -> MMCoTForConditionalGeneration:
        """Return the model, and keep it until it is taken or discarded."""
        if self.built is None:
            self.built = build_model(self.recipe, self.tokenizer, self.store)
        return self.built

    def without_weights(self) -> MMCoTForConditionalGeneration:
        """Return the model's configuration and modules; only for a model without a picture tower."""
        name, revision = self.recipe.model_config.model_name_or_path, self.recipe.model_config.model_revision
        fields = picture_fields(self.recipe, self.store)
        if name is None:
            return skeleton(new_config(self.recipe, self.tokenizer, fields))
        return skeleton(MMCoTConfig.from_pretrained(name, revision=revision, **fields))

    def take(self) -> MMCoTForConditionalGeneration:
        """Return the model to train or save it, and keep no reference."""
        model = self.inspect()
        self.built = None
        return model

    def discard(self) -> None:
        """Free the memory of a model that is not used."""
        self.built = None
