"""Checks of a recipe, before any data is read, trained on or written.

Each error names the recipe, the key, the value found and the value expected. The checks read and change no files.
"""

import difflib
from dataclasses import fields

from transformers import Seq2SeqTrainingArguments
from trl import ModelConfig

from mmcot.problems.schema import FEATURES, GOLD_COLUMNS
from mmcot.recipes.arguments import PEFT_TYPES, STAGE_CHOICES, RecipeArguments, StageArguments
from modeling_mmcot.configuration_mmcot import NO_FUSION
from modeling_mmcot.stage_mmcot import CHOOSE, KINDS, REJECTED, RETRIEVE, SCORES, STAGE_NAME, exclusive_column

# Folders of a run that are not stages.
RESERVED_NAMES = ("base", "shared", "hub", "hub_merged", "folds", "predictions", "scores")
# Keys of a prediction that are no column of a stage.
PREDICTED = ("scores", "decoded_answer", "agreement", REJECTED)
# Settings of a stage's own training, which it does not have if all stages share one model.
TRAINING_SETTINGS = ("num_train_epochs", "learning_rate", "inputs_from", "init_from")
# Settings of a stage whose target its kind does not determine, and settings that only a model has.
TARGET_SETTINGS = ("template", "target", "max_target_length", "num_beams")
MODEL_SETTINGS = (*TARGET_SETTINGS, "max_source_length", *TRAINING_SETTINGS)
# Settings of all adapters, and settings of LoRA only.
PEFT_SETTINGS = ("load_in_4bit", "load_in_8bit", "peft_type", "num_virtual_tokens")
LORA_SETTINGS = ("use_dora", "use_rslora", "merge_adapters")


def check_stages(stages: list[StageArguments], config: str) -> None:
    """
    Check the names, kinds, columns and settings of the stages.

    Raises:
        ValueError: with the first fault.
    """
    if not stages:
        raise ValueError(f"{config}: `stages` is empty; expected at least the answer stage.")
    names = [stage.name for stage in stages]
    for name in names:
        if not isinstance(name, str) or STAGE_NAME.fullmatch(name) is None:
            raise ValueError(
                f"{config}: name of a stage is {name!r:.80}; expected letters, digits, _ and -, because it is also the "
                f"name of a folder."
            )
        if name in RESERVED_NAMES:
            raise ValueError(f"{config}: name of a stage is {name!r}, a folder that a run uses for other files.")
        if names.count(name) > 1:
            raise ValueError(f"{config}: two stages are named {name!r}; expected different names.")
    for stage in stages:
        check_kind(stage, config)
    check_columns(stages, config)
    answering = [stage.name for stage in stages if stage.kind == CHOOSE]
    if len(answering) != 1:
        raise ValueError(
            f"{config}: exactly one stage writes `answer_text`; found "
            f"{', '.join(f'{stage.name} writes {stage.writes}' for stage in stages)}."
        )
    sending_back = [stage.name for stage in stages if KINDS[stage.kind].sends_back is not None]
    if len(sending_back) > 1:
        raise ValueError(f"{config}: {', '.join(sending_back)} send problems back; expected at most one such stage.")


def check_kind(stage: StageArguments, config: str) -> None:
    """
    Check the kind of a stage, and that all its settings have an effect.

    Raises:
        ValueError: with the first fault.
    """
    where = f"{config}: stage {stage.name!r}"
    if stage.kind not in KINDS:
        raise ValueError(f"{where} has kind {stage.kind!r}; expected one of {', '.join(KINDS)}.")
    kind = KINDS[stage.kind]
    if kind.writes != exclusive_column(stage.writes):
        writes = "another column" if kind.writes is None else f"{kind.writes!r}"
        raise ValueError(f"{where} has kind {stage.kind!r} and writes {stage.writes!r}; expected {writes}.")
    settings = {name for known in KINDS.values() for name in known.settings} | {"corpora"}
    settings -= {*kind.settings, *(["corpora"] if not kind.has_model else [])}
    settings |= set() if kind.has_model else set(MODEL_SETTINGS)
    settings |= set() if kind.make_target is None else set(TARGET_SETTINGS)
    defaults = {entry.name: entry.default for entry in fields(StageArguments)}
    for name in sorted(settings):
        if getattr(stage, name) != defaults[name]:
            raise ValueError(
                f"{where} has {name} {getattr(stage, name)!r}, which has no effect on a stage of kind {stage.kind!r}."
            )
    if "images" in stage.reads and not kind.has_model:
        raise ValueError(f"{where} reads images, which have no effect on a stage of kind {stage.kind!r}.")
    if stage.score is not None and stage.score not in SCORES:
        raise ValueError(f"{where} has score {stage.score!r}; expected one of {', '.join(SCORES)}.")
    if stage.num_passages is not None and (type(stage.num_passages) is not int or stage.num_passages < 1):
        raise ValueError(f"{where} has num_passages {stage.num_passages!r}; expected 1 or more.")
    if stage.kind == RETRIEVE and not (isinstance(stage.corpora, list) and stage.corpora):
        raise ValueError(f"{where} retrieves, and has corpora {stage.corpora!r}; expected a list of passages' sources.")


def check_columns(stages: list[StageArguments], config: str) -> None:
    """
    Check the columns that the stages read and write.

    Raises:
        ValueError: with the first fault.
    """
    columns = set(FEATURES) - set(GOLD_COLUMNS)
    written = [stage.writes for stage in stages]
    predicted = {*PREDICTED, *(f"{stage.writes}_score" for stage in stages if KINDS[stage.kind].sends_back is not None)}
    for stage in stages:
        if stage.writes in FEATURES:
            raise ValueError(f"{config}: stage {stage.name!r} writes {stage.writes!r}, a column that problems have.")
        if stage.writes in predicted:
            raise ValueError(f"{config}: stage {stage.name!r} writes {stage.writes!r}, a key that predictions have.")
        if written.count(stage.writes) > 1:
            raise ValueError(f"{config}: two stages write {stage.writes!r}; expected different columns.")
        for column in stage.reads:
            if column in GOLD_COLUMNS:
                raise ValueError(
                    f"{config}: stage {stage.name!r} reads {column!r}, a gold column, which is removed before "
                    f"prediction."
                )
            if column not in columns and column not in written:
                raise ValueError(
                    f"{config}: stage {stage.name!r} reads {column!r}, which no stage writes and no problem "
                    f"has{nearest(column, {*columns, *written})}."
                )


def in_order(stages: list[StageArguments], config: str) -> list[StageArguments]:
    """
    Return the stages in the order in which they run: each after the stages whose columns it reads, otherwise as given.

    Raises:
        ValueError: some stages read each other's columns.
    """
    ordered: list[StageArguments] = []
    while len(ordered) < len(stages):
        waiting = [stage for stage in stages if stage not in ordered]
        missing = {stage.writes for stage in waiting}
        ready = next((stage for stage in waiting if not missing & set(stage.reads)), None)
        if ready is None:
            cycle = "; ".join(
                f"{stage.name} reads {', '.join(sorted(missing & set(stage.reads)))}" for stage in waiting
            )
            raise ValueError(f"{config}: no stage can run first, because each reads a column of another one: {cycle}.")
        ordered.append(ready)
    return ordered


def check_inputs(arguments: RecipeArguments, stages: list[StageArguments], config: str) -> None:
    """
    Check `inputs_from` and `init_from` of the stages, and the folds.

    Raises:
        ValueError: with the first fault.
    """
    trained = [stage for stage in stages if KINDS[stage.kind].has_model]
    for key, known in STAGE_CHOICES.items():
        for number, stage in enumerate(trained):
            value = getattr(stage, key)
            if value not in known:
                raise ValueError(
                    f"{config}: stage {stage.name!r} has {key} {value!r}; expected one of {', '.join(known)}."
                )
            if number == 0 and value != known[0]:
                raise ValueError(f"{config}: stage {stage.name!r} has {key} {value!r}, but no stage before it.")
    for stage in trained:
        if KINDS[stage.kind].sends_back is not None and stage.inputs_from == "gold":
            raise ValueError(
                f"{config}: stage {stage.name!r} has inputs_from 'gold', and would learn only from right answers; "
                f"expected cross_fit, whose answers contain mistakes."
            )
    is_cross_fit = any(stage.inputs_from == "cross_fit" for stage in stages)
    if is_cross_fit and arguments.num_folds < 2:
        raise ValueError(f"{config}: num_folds is {arguments.num_folds}; expected 2 or more.")
    if arguments.fold is not None and not (is_cross_fit and 0 <= arguments.fold < arguments.num_folds):
        raise ValueError(
            f"{config}: fold is {arguments.fold}; expected 0 to num_folds - 1, and a stage with inputs_from: cross_fit."
        )
    if arguments.fold is not None and sum(stage.inputs_from == "cross_fit" for stage in stages) > 1:
        raise ValueError(
            f"{config}: fold is {arguments.fold}, but several stages have inputs_from: cross_fit, and a later stage "
            f"needs all folds of an earlier one: omit fold."
        )


def check_one_stage(arguments: RecipeArguments, stages: list[StageArguments], config: str) -> None:
    """
    Check that the stage of `stage` can be trained on its own.

    Raises:
        ValueError: with the first fault.
    """
    if arguments.stage is None:
        return
    trained = {stage.name: stage for stage in stages if KINDS[stage.kind].has_model}
    if arguments.stage not in trained:
        raise ValueError(f"{config}: stage is {arguments.stage!r}; expected one of {', '.join(trained)}.")
    stage = trained[arguments.stage]
    if (stage.inputs_from, stage.init_from) != ("gold", "base"):
        raise ValueError(
            f"{config}: stage is {stage.name!r}, which has inputs_from {stage.inputs_from!r} and init_from "
            f"{stage.init_from!r}, and needs earlier stages to be trained first: omit stage."
        )
    if arguments.fold is not None:
        raise ValueError(f"{config}: stage and fold are set; expected one of them.")
    if arguments.report_problems:
        raise ValueError(
            f"{config}: stage and report_problems are set, and a report needs the texts of earlier stages: omit one "
            f"of them."
        )


def check_shared_weights(
    arguments: RecipeArguments, model_config: ModelConfig, stages: list[StageArguments], config: str
) -> None:
    """
    Check that no setting needs a model for each stage, if all stages share one.

    Raises:
        ValueError: with the first fault.
    """
    if not arguments.share_weights:
        return
    trained = [stage for stage in stages if KINDS[stage.kind].has_model]
    if len(trained) == 1:
        raise ValueError(
            f"{config}: share_weights is set, but only the stage {trained[0].name!r} has a model: omit share_weights."
        )
    defaults = {entry.name: entry.default for entry in fields(StageArguments)}
    for stage in trained:
        if KINDS[stage.kind].sends_back is not None:
            raise ValueError(
                f"{config}: share_weights is set, but stage {stage.name!r} of kind {stage.kind!r} learns from answers "
                f"of trained stages, and a shared model is trained once, on gold columns: omit one of them."
            )
        for name in TRAINING_SETTINGS:
            if getattr(stage, name) != defaults[name]:
                raise ValueError(
                    f"{config}: stage {stage.name!r} has {name} {getattr(stage, name)!r}, which has no effect with "
                    f"share_weights: one training on gold columns trains all stages, with the top-level settings."
                )
    if model_config.use_peft:
        raise ValueError(
            f"{config}: share_weights and use_peft are set, but adapters share their base already, and each stage has "
            f"one: omit one of them."
        )
    if arguments.stage is not None:
        raise ValueError(f"{config}: stage and share_weights are set, but a shared model is trained for all stages.")
    if arguments.streaming:
        raise ValueError(
            f"{config}: share_weights is set, which needs all training problems and cannot be used with streaming."
        )


def check_streaming(
    arguments: RecipeArguments,
    training_arguments: Seq2SeqTrainingArguments,
    stages: list[StageArguments],
    config: str,
) -> None:
    """
    Check that no setting needs all training problems at once.

    Raises:
        ValueError: with the first fault.
    """
    if not arguments.streaming:
        return
    if training_arguments.max_steps < 1:
        raise ValueError(
            f"{config}: streaming is set, but max_steps is {training_arguments.max_steps}: the number of problems is "
            f"unknown, so give the number of steps."
        )
    for name in ("features", "captions", "target_column", "tokenizer_vocab_size"):
        if getattr(arguments, name) is not None:
            raise ValueError(
                f"{config}: {name} is set, which needs all training problems and cannot be used with streaming."
            )
    if training_arguments.train_sampling_strategy == "group_by_length":
        raise ValueError(
            f"{config}: train_sampling_strategy is group_by_length, which needs all lengths and cannot be used with "
            f"streaming."
        )
    retrieving = [stage.name for stage in stages if stage.kind == RETRIEVE]
    if retrieving:
        raise ValueError(
            f"{config}: stage {retrieving[0]!r} retrieves passages for all training problems first, and cannot be used "
            f"with streaming."
        )
    not_gold = [stage.name for stage in stages if stage.inputs_from != "gold"]
    if not_gold:
        raise ValueError(
            f"{config}: stage {not_gold[0]!r} has inputs_from other than gold, which cannot be used with streaming."
        )


def check_parts(
    arguments: RecipeArguments, model_config: ModelConfig, stages: list[StageArguments], config: str
) -> None:
    """
    Check that each part of the model is specified once, and that pictures are prepared if a stage reads them.

    Raises:
        ValueError: with the first fault.
    """
    settings = {"model_name_or_path": model_config.model_name_or_path, **vars(arguments)}
    for trained, from_scratch in (
        ("model_name_or_path", "text_config"),
        ("model_name_or_path", "vision_config"),
        ("vision_model_name_or_path", "vision_config"),
        ("features", "vision_config"),
    ):
        if settings[trained] is not None and settings[from_scratch] is not None:
            raise ValueError(
                f"{config}: {trained} is {settings[trained]!r}, but {from_scratch} describes a part that is trained "
                f"from scratch: omit one of them."
            )
    if arguments.features is not None and arguments.vision_model_name_or_path and not arguments.freeze_vision:
        raise ValueError(f"{config}: features are computed by a fixed tower and require freeze_vision: true.")
    reads_pictures = any("images" in stage.reads for stage in stages)
    check_fusion(arguments, model_config, reads_pictures, config)
    # A checkpoint may contain a tower, which is checked when it is loaded.
    picture_settings = ("image_processor", "vision_model_name_or_path", "features", "model_name_or_path")
    if reads_pictures and all(settings[name] is None for name in picture_settings):
        raise ValueError(
            f"{config}: a stage reads `images`, but no setting specifies how pictures are prepared; expected "
            f"`vision_model_name_or_path`, `image_processor` or `features`."
        )
    if arguments.freeze_text and model_config.use_peft:
        raise ValueError(f"{config}: freeze_text is set, but with use_peft the text model is never trained.")
    text_only = [stage.name for stage in stages if "images" not in stage.reads and KINDS[stage.kind].has_model]
    if arguments.freeze_text and text_only:
        raise ValueError(
            f"{config}: freeze_text is set, but the stage {text_only[0]!r} reads no pictures and has nothing else to "
            f"train."
        )
    if arguments.freeze_text and arguments.freeze_fusion:
        raise ValueError(
            f"{config}: freeze_text and freeze_fusion leave nothing to train on problems without pictures."
        )
    has_checkpoint = arguments.vision_model_name_or_path is not None and arguments.image_processor is None
    if arguments.vision_preprocessing != "checkpoint" and not has_checkpoint:
        raise ValueError(
            f"{config}: vision_preprocessing is {arguments.vision_preprocessing!r}, which requires "
            f"vision_model_name_or_path and no image_processor."
        )
    if arguments.max_images < 1:
        raise ValueError(f"{config}: max_images is {arguments.max_images}; expected 0 or more.")


def check_adapters(
    arguments: RecipeArguments,
    training_arguments: Seq2SeqTrainingArguments,
    model_config: ModelConfig,
    given_keys: set[str],
    config: str,
) -> None:
    """
    Check the settings of adapters. The tower has no adapter: it is trained as a whole or not at all.

    Args:
        given_keys: the names of all settings in the recipe and on the command line.

    Raises:
        ValueError: with the first fault.
    """
    if not model_config.use_peft:
        for name in sorted(given_keys):
            if name.startswith("lora_") or name in PEFT_SETTINGS + LORA_SETTINGS:
                raise ValueError(f"{config}: {name} is set, which requires use_peft: true.")
        return
    check_virtual_tokens(arguments, training_arguments, given_keys, config)
    is_mixed = training_arguments.bf16 or training_arguments.fp16
    if model_config.dtype in ("bfloat16", "float16", "auto") and not is_mixed:
        raise ValueError(
            f"{config}: dtype is {model_config.dtype}, but trained weights are kept in float32, which requires "
            f"bf16: true."
        )
    if arguments.merge_adapters and (model_config.load_in_4bit or model_config.load_in_8bit):
        raise ValueError(f"{config}: merge_adapters requires a base that is not quantized; omit one of them.")
    trained_tower = trains_tower(model_config)
    if arguments.freeze_vision is not None and arguments.freeze_vision == trained_tower:
        raise ValueError(
            f"{config}: freeze_vision is {arguments.freeze_vision}, but with use_peft the picture tower is trained "
            f"if lora_modules_to_save contains vision_tower; found {model_config.lora_modules_to_save}."
        )


def check_fusion(arguments: RecipeArguments, model_config: ModelConfig, reads_pictures: bool, config: str) -> None:
    """
    Check the settings of the fusion that do not depend on the model.

    Raises:
        ValueError: with the first fault.
    """
    if arguments.fusion == NO_FUSION and reads_pictures:
        raise ValueError(f"{config}: fusion is {NO_FUSION!r}, but a stage reads `images`: omit it from `reads`.")
    if not isinstance(arguments.fusion_options, dict | None):
        raise ValueError(f"{config}: fusion_options is {arguments.fusion_options!r}; expected a mapping.")
    names_none = arguments.fusion is None and arguments.fusion_options is None
    if arguments.replace_fusion and (model_config.model_name_or_path is None or names_none):
        raise ValueError(
            f"{config}: replace_fusion has no effect without model_name_or_path and fusion (or fusion_options)."
        )


def check_attention(arguments: RecipeArguments, model_config: ModelConfig, config: str) -> None:
    """
    Check that no attention implementation is a kernel of the Hub, because a kernel is remote code.

    Raises:
        ValueError: with the setting.
    """
    parts = {"text_config": arguments.text_config or {}, "vision_config": arguments.vision_config or {}}
    named = {"attn_implementation": model_config.attn_implementation}
    named |= {f"{part}.attn_implementation": settings.get("attn_implementation") for part, settings in parts.items()}
    for name, value in named.items():
        if "/" in str(value):
            raise ValueError(f"{config}: {name} is {value!r}, code of the Hub; expected a name in transformers.")


def trains_tower(model_config: ModelConfig) -> bool:
    """Whether the picture tower is trained as a whole, beside adapters."""
    return "vision_tower" in (model_config.lora_modules_to_save or [])


def check_virtual_tokens(
    arguments: RecipeArguments, training_arguments: Seq2SeqTrainingArguments, given_keys: set[str], config: str
) -> None:
    """
    Check `peft_type` and the settings that depend on it.

    Raises:
        ValueError: with the first fault.
    """
    peft_type = arguments.peft_type
    if peft_type not in PEFT_TYPES:
        raise ValueError(f"{config}: peft_type is {peft_type!r}; expected one of {', '.join(PEFT_TYPES)}.")
    if peft_type == "LORA":
        if "num_virtual_tokens" in given_keys:
            raise ValueError(f"{config}: num_virtual_tokens is set, but peft_type is LORA, which has none.")
        return
    for name in sorted(given_keys - {"lora_modules_to_save"}):
        if name.startswith("lora_") or name in LORA_SETTINGS:
            raise ValueError(f"{config}: {name} is set, which requires peft_type: LORA; found {peft_type}.")
    if arguments.num_virtual_tokens < 1:
        raise ValueError(f"{config}: num_virtual_tokens is {arguments.num_virtual_tokens}; expected 1 or more.")
    if peft_type == "PREFIX_TUNING" and training_arguments.gradient_checkpointing:
        raise ValueError(f"{config}: gradient_checkpointing is not possible with peft_type: PREFIX_TUNING (in PEFT).")


def nearest(word: str, known: set[str]) -> str:
    """Return a suggestion for a misspelled word, or an empty text if no known word is close."""
    matches = difflib.get_close_matches(word, sorted(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
