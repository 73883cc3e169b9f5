"""What a recipe can get wrong, said before anything is read, trained or written.

Each check names the recipe, the key, what was found and what was expected. Nothing is read or changed here.
"""

import difflib

from transformers import Seq2SeqTrainingArguments
from trl import ModelConfig

from mmcot.problems.schema import FEATURES, GOLD_COLUMNS
from mmcot.recipes.arguments import PEFT_TYPES, STAGE_CHOICES, RecipeArguments, StageArguments
from modeling_mmcot.stage_mmcot import CHOOSE, SCORES, STAGE_NAME, default_kind

# What a run's folder holds beside its stages.
RESERVED_NAMES = ("base", "hub", "hub_merged", "folds", "predictions", "scores")
# Settings of adapters, and those of them that only LoRA has.
PEFT_SETTINGS = ("load_in_4bit", "load_in_8bit", "peft_type", "num_virtual_tokens")
LORA_SETTINGS = ("use_dora", "use_rslora", "merge_adapters")


def check_stages(stages: list[StageArguments], config: str) -> None:
    if not stages:
        raise ValueError(f"{config}: `stages` is empty; a recipe has at least the stage that answers.")
    for stage in stages:
        if stage.score is not None and stage.score not in SCORES:
            raise ValueError(
                f"{config}: stage {stage.name!r} has score {stage.score!r}; expected one of {', '.join(SCORES)}."
            )
        if stage.score is not None and default_kind(stage.writes) != CHOOSE:
            raise ValueError(f"{config}: stage {stage.name!r} has a score, and no choices: it writes {stage.writes!r}.")
    names = [stage.name for stage in stages]
    for name in names:
        if not isinstance(name, str) or STAGE_NAME.fullmatch(name) is None:
            raise ValueError(
                f"{config}: name of a stage is {name!r:.80}; expected letters, digits, _ and -, as it is a folder's "
                f"name too."
            )
        if name in RESERVED_NAMES:
            raise ValueError(f"{config}: name of a stage is {name!r}, a folder that a run has for other files.")
        if names.count(name) > 1:
            raise ValueError(f"{config}: two stages are named {name!r}; each needs a name of its own.")
    columns = set(FEATURES) - set(GOLD_COLUMNS)
    for stage in stages:
        if stage.writes in FEATURES:
            raise ValueError(f"{config}: stage {stage.name!r} writes {stage.writes!r}, a column that problems have.")
        for column in stage.reads:
            if column in GOLD_COLUMNS:
                raise ValueError(
                    f"{config}: stage {stage.name!r} reads {column!r}, a gold column, which is taken away before "
                    f"anything is predicted."
                )
            if column not in columns:
                raise ValueError(
                    f"{config}: stage {stage.name!r} reads {column!r}, which no earlier stage writes and no problem "
                    f"has{nearest(column, columns)}."
                )
        columns.add(stage.writes)
    kinds = [default_kind(stage.writes) for stage in stages]
    if kinds[-1] != CHOOSE or CHOOSE in kinds[:-1]:
        raise ValueError(
            f"{config}: the last stage, and only it, writes `answer_text`; found "
            f"{', '.join(f'{stage.name} writes {stage.writes}' for stage in stages)}."
        )


def check_inputs(arguments: RecipeArguments, stages: list[StageArguments], config: str) -> None:
    for key, known in STAGE_CHOICES.items():
        for number, stage in enumerate(stages):
            value = getattr(stage, key)
            if value not in known:
                raise ValueError(
                    f"{config}: stage {stage.name!r} has {key} {value!r}; expected one of {', '.join(known)}."
                )
            if number == 0 and value != known[0]:
                raise ValueError(f"{config}: stage {stage.name!r} has {key} {value!r}, and no stage before it.")
    is_cross_fit = any(stage.inputs_from == "cross_fit" for stage in stages)
    if is_cross_fit and arguments.num_folds < 2:
        raise ValueError(f"{config}: num_folds is {arguments.num_folds}; expected 2 or more.")
    if arguments.fold is not None and not (is_cross_fit and 0 <= arguments.fold < arguments.num_folds):
        raise ValueError(
            f"{config}: fold is {arguments.fold}; expected 0 to num_folds - 1, and a stage with inputs_from: cross_fit."
        )
    if arguments.fold is not None and sum(stage.inputs_from == "cross_fit" for stage in stages) > 1:
        raise ValueError(
            f"{config}: fold is {arguments.fold}, but several stages have inputs_from: cross_fit, of which the later "
            f"want all folds of the earlier: leave fold out."
        )


def check_streaming(
    arguments: RecipeArguments,
    training_arguments: Seq2SeqTrainingArguments,
    stages: list[StageArguments],
    config: str,
) -> None:
    if not arguments.streaming:
        return
    if training_arguments.max_steps < 1:
        raise ValueError(
            f"{config}: streaming is set, and max_steps is {training_arguments.max_steps}: how many problems there are "
            f"is not known, so say how many steps to train."
        )
    for name in ("features", "captions", "target_column", "tokenizer_vocab_size"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"{config}: {name} is set, which wants all training problems: it goes without streaming.")
    if training_arguments.train_sampling_strategy == "group_by_length":
        raise ValueError(
            f"{config}: train_sampling_strategy is group_by_length, which wants all lengths: it goes without streaming."
        )
    written = [stage.name for stage in stages if stage.inputs_from != "gold"]
    if written:
        raise ValueError(
            f"{config}: stage {written[0]!r} has inputs_from other than gold, which goes without streaming."
        )


def check_parts(
    arguments: RecipeArguments, model_config: ModelConfig, stages: list[StageArguments], config: str
) -> None:
    """Each part of the model is said once, and pictures that a stage reads have a way into it."""
    said = {"model_name_or_path": model_config.model_name_or_path, **vars(arguments)}
    for trained, from_scratch in (
        ("model_name_or_path", "text_config"),
        ("model_name_or_path", "vision_config"),
        ("vision_model_name_or_path", "vision_config"),
        ("features", "vision_config"),
    ):
        if said[trained] is not None and said[from_scratch] is not None:
            raise ValueError(
                f"{config}: {trained} is {said[trained]!r}, and {from_scratch} describes a part that is trained from "
                f"scratch: leave one of them out."
            )
    if arguments.features is not None and arguments.vision_model_name_or_path and not arguments.freeze_vision:
        raise ValueError(f"{config}: features are those of a fixed tower; they want freeze_vision: true.")
    sees = any("images" in stage.reads for stage in stages)
    # A checkpoint may bring a tower of its own, which is looked at when it is loaded.
    ways = ("image_processor", "vision_model_name_or_path", "features", "model_name_or_path")
    if sees and all(said[way] is None for way in ways):
        raise ValueError(
            f"{config}: a stage reads `images`, but neither `vision_model_name_or_path` nor `image_processor` says how "
            f"pictures are prepared, and `features` are not given."
        )
    if arguments.freeze_text and model_config.use_peft:
        raise ValueError(f"{config}: freeze_text is set; with use_peft the text model is left as it is anyway.")
    blind = [stage.name for stage in stages if "images" not in stage.reads]
    if arguments.freeze_text and blind:
        raise ValueError(
            f"{config}: freeze_text leaves the stage {blind[0]!r}, which sees no pictures, nothing to train."
        )
    if arguments.freeze_text and arguments.freeze_fusion:
        raise ValueError(f"{config}: freeze_text and freeze_fusion leave nothing to train on problems without picture.")
    has_checkpoint = arguments.vision_model_name_or_path is not None and arguments.image_processor is None
    if arguments.vision_preprocessing != "checkpoint" and not has_checkpoint:
        raise ValueError(
            f"{config}: vision_preprocessing is {arguments.vision_preprocessing!r}, which goes with "
            f"vision_model_name_or_path and without image_processor."
        )
    if arguments.max_images < 1:
        raise ValueError(f"{config}: max_images is {arguments.max_images}; expected 0 or more.")


def check_adapters(
    arguments: RecipeArguments,
    training_arguments: Seq2SeqTrainingArguments,
    model_config: ModelConfig,
    said: set[str],
    config: str,
) -> None:
    """What is said of adapters goes together; a tower is left as it is, unless it is trained whole beside them."""
    if not model_config.use_peft:
        for name in sorted(said):
            if name.startswith("lora_") or name in PEFT_SETTINGS + LORA_SETTINGS:
                raise ValueError(f"{config}: {name} is set, which goes with use_peft: true.")
        return
    check_virtual_tokens(arguments, training_arguments, said, config)
    is_mixed = training_arguments.bf16 or training_arguments.fp16
    if model_config.dtype in ("bfloat16", "float16", "auto") and not is_mixed:
        raise ValueError(
            f"{config}: dtype is {model_config.dtype}, and what is trained is kept in float32: that wants bf16: true."
        )
    if arguments.merge_adapters and (model_config.load_in_4bit or model_config.load_in_8bit):
        raise ValueError(f"{config}: merge_adapters wants a base that is not quantized; leave out one of them.")
    trained_tower = trains_tower(model_config)
    if arguments.freeze_vision is not None and arguments.freeze_vision == trained_tower:
        raise ValueError(
            f"{config}: freeze_vision is {arguments.freeze_vision}, and with use_peft the picture tower is trained "
            f"where lora_modules_to_save names vision_tower; found {model_config.lora_modules_to_save}."
        )


def check_attention(arguments: RecipeArguments, model_config: ModelConfig, config: str) -> None:
    """No attention is a kernel of the Hub, which is code."""
    parts = {"text_config": arguments.text_config or {}, "vision_config": arguments.vision_config or {}}
    named = {"attn_implementation": model_config.attn_implementation}
    named |= {f"{part}.attn_implementation": settings.get("attn_implementation") for part, settings in parts.items()}
    for name, value in named.items():
        if "/" in str(value):
            raise ValueError(f"{config}: {name} is {value!r}, code of the Hub; expected a name that transformers has.")


def trains_tower(model_config: ModelConfig) -> bool:
    """Whether the picture tower is trained whole, beside adapters."""
    return "vision_tower" in (model_config.lora_modules_to_save or [])


def check_virtual_tokens(
    arguments: RecipeArguments, training_arguments: Seq2SeqTrainingArguments, said: set[str], config: str
) -> None:
    peft_type = arguments.peft_type
    if peft_type not in PEFT_TYPES:
        raise ValueError(f"{config}: peft_type is {peft_type!r}; expected one of {', '.join(PEFT_TYPES)}.")
    if peft_type == "LORA":
        if "num_virtual_tokens" in said:
            raise ValueError(f"{config}: num_virtual_tokens is set, and peft_type is LORA, which has none.")
        return
    for name in sorted(said - {"lora_modules_to_save"}):
        if name.startswith("lora_") or name in LORA_SETTINGS:
            raise ValueError(f"{config}: {name} is set, which goes with peft_type: LORA; found {peft_type}.")
    if arguments.num_virtual_tokens < 1:
        raise ValueError(f"{config}: num_virtual_tokens is {arguments.num_virtual_tokens}; expected 1 or more.")
    if peft_type == "PREFIX_TUNING" and training_arguments.gradient_checkpointing:
        raise ValueError(f"{config}: gradient_checkpointing does not go with peft_type: PREFIX_TUNING (PEFT's limit).")


def nearest(word: str, known: set[str]) -> str:
    matches = difflib.get_close_matches(word, sorted(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
