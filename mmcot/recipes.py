"""A recipe (one YAML in `configs/`) -> the stages and the arguments of a run.

`TrlParser` reads the YAML and the command line into three dataclasses: our `RecipeArguments`,
`Seq2SeqTrainingArguments` and `trl.ModelConfig`. This file checks what a recipe can get wrong before anything is
trained. It knows nothing of the model and builds nothing.
"""

import difflib
import logging
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import Seq2SeqTrainingArguments
from trl import ModelConfig, TrlParser

from mmcot.files import resolved
from mmcot.problems import FEATURES, GOLD_COLUMNS, SOURCES

logger = logging.getLogger(__name__)

# Where and how a run is run, not what is run: these may change between two calls that go on with one run.
MACHINE_SETTINGS = {
    "config",
    "output_dir",
    "use_cpu",
    "report_to",
    "disable_tqdm",
    "logging_steps",
    "logging_first_step",
    "dataloader_num_workers",
    "pass_over_damaged_checkpoints",
    "fold",
    "report_problems",
}
# How a step's problems are shared out; how many they are is checked when a run goes on (`trainer.SameSteps`).
STEP_SETTINGS = {"per_device_train_batch_size", "gradient_accumulation_steps"}

STAGE_CHOICES = {"inputs_from": ("gold", "generated", "cross_fit"), "init_from": ("base", "previous_stage")}
PICTURE_SETTINGS = ("vision_model_name_or_path", "vision_tower", "vision_preprocessing", "freeze_vision", "max_images")
PICTURE_SETTINGS += ("features", "vision_config", "image_processor")
PEFT_TYPES = ("LORA", "PROMPT_TUNING", "PREFIX_TUNING")
# Settings of adapters, and those of them that only LoRA has.
PEFT_SETTINGS = ("load_in_4bit", "load_in_8bit", "peft_type", "num_virtual_tokens")
LORA_SETTINGS = ("use_dora", "use_rslora", "merge_adapters")


@dataclass
class StageArguments:
    """
    One entry of a recipe's `stages`.

    Args:
        name: the stage's name and folder.
        reads: columns of the problem that its source shows; `images` among them to see the pictures.
        writes: the column it writes; `answer_text` makes it the stage that answers.
        template: a name of the set `paper` (`QCM-E`, `QCMG-A`, …), which gives source and target.
        source, target: Jinja templates, in place of the set's.
        max_source_length, max_target_length: in tokens.
        num_beams: of the free-running generation.
        num_train_epochs, learning_rate: this stage's own, in place of the recipe's.
        inputs_from: what it is trained on of the columns that earlier stages write: `gold`, `generated` or `cross_fit`
            (`stage_inputs.py`).
        init_from: what its training starts from: `base`, or `previous_stage`.
    """

    name: str
    reads: list[str]
    writes: str
    template: str | None = None
    source: str | None = None
    target: str | None = None
    max_source_length: int = 512
    max_target_length: int = 512
    num_beams: int = 1
    num_train_epochs: float | None = None
    learning_rate: float | None = None
    inputs_from: str = "gold"
    init_from: str = "base"

    def __post_init__(self):
        # YAML reads 1e-4 as a string, and nested values pass no argument parser.
        for name in ("num_train_epochs", "learning_rate"):
            if getattr(self, name) is not None:
                setattr(self, name, float(getattr(self, name)))


@dataclass
class RecipeArguments:
    """
    Args:
        dataset: where the problems come from, see `problems.load_problems`.
        stages: the stages in order (in the recipe only, see [`StageArguments`]).
        fusion: how the picture enters; a name in `fusion_mmcot.FUSIONS`. By default the model's, `gated` for a new one.
        vision_model_name_or_path: a pre-trained picture tower: a checkpoint, or a name in `vision_mmcot.TOWERS`.
        vision_tower: how its output becomes patches, a name in `vision_mmcot.TOWERS`.
        vision_preprocessing: `checkpoint` (its own), or `paper` (as the authors prepared pictures for it).
        freeze_vision: leave the tower as it is. By default as the model says, false for a new one.
        max_images: the most pictures of one problem. With 0 the recipe is one without pictures: no stage reads them,
            and the model is given no tower.
        features: a folder of features of the pictures, as mmcot.features wrote it, in place of a run of the tower.
        captions: a captions.json, as `mmcot.features --captions` wrote it, in place of the problems' captions.
        tokenizer_name_or_path: a tokenizer; by default the text model's.
        tokenizer_vocab_size: train a tokenizer of that many pieces on the training texts instead.
        text_config, vision_config, image_processor: for a model from scratch, its configurations (in the recipe only).
        target_column: `COLUMN=FILE.json`, texts by problem id to train the stage that writes that column on.
        report_problems: for so many validation problems the stage writes, free-running, at each evaluation, and that is
            scored and logged beside the loss (`progress.py`). By default none.
        freeze_text, freeze_fusion: leave the text model, or the fusion, as they are.
        num_folds: into how many parts the training problems fall, where a stage has `inputs_from: cross_fit`.
        fold: only train the stages without that fold, 0 to num_folds - 1, and let them write for it. Folds can run side
            by side; the command without it goes on with what they wrote.
        peft_type: with `use_peft`, PEFT's name of what is trained beside the fusion: `LORA`, or virtual tokens in place
            of it: `PROMPT_TUNING` (before the source), `PREFIX_TUNING` (in the decoder's attention).
        num_virtual_tokens: how many of them.
        merge_adapters: with `use_peft`, save whole models in place of a base and adapters.
        pass_over_damaged_checkpoints: go on from the newest checkpoint that is whole, where a newer one is damaged.
        decode_answer: generate "The answer is (B)." too, the paper's way, and report its accuracy as well.
    """

    dataset: str = field(
        default="",
        metadata={"help": SOURCES},
    )
    stages: list[Any] = field(default_factory=list, metadata={"help": "In the recipe only."})
    fusion: str | None = field(default=None, metadata={"help": "How the picture enters the text."})
    vision_model_name_or_path: str | None = field(default=None, metadata={"help": "A pre-trained picture tower."})
    vision_tower: str | None = field(default=None, metadata={"help": "How the tower's output becomes patches."})
    vision_preprocessing: str = field(default="checkpoint", metadata={"help": "`checkpoint` or `paper`."})
    freeze_vision: bool | None = field(default=None, metadata={"help": "Leave the picture tower as it is."})
    max_images: int = field(default=1, metadata={"help": "The most pictures of one problem."})
    features: str | None = field(default=None, metadata={"help": "Features of the pictures, computed before."})
    captions: str | None = field(default=None, metadata={"help": "A captions.json, in place of the captions."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "By default the text model's."})
    tokenizer_vocab_size: int | None = field(default=None, metadata={"help": "Train a tokenizer of this size."})
    text_config: Any = field(default=None, metadata={"help": "For a model from scratch; in the recipe only."})
    vision_config: Any = field(default=None, metadata={"help": "For a model from scratch; in the recipe only."})
    image_processor: Any = field(default=None, metadata={"help": "For a model from scratch; in the recipe only."})
    target_column: str | None = field(default=None, metadata={"help": "COLUMN=FILE.json, texts by problem id."})
    report_problems: int = field(default=0, metadata={"help": "Validation problems to write for at evaluations."})
    freeze_text: bool = field(default=False, metadata={"help": "Leave the text model as it is."})
    freeze_fusion: bool = field(default=False, metadata={"help": "Leave the fusion as it is."})
    num_folds: int = field(default=5, metadata={"help": "Parts of the training problems, for cross_fit."})
    fold: int | None = field(default=None, metadata={"help": "Only what cross_fit wants of this fold."})
    peft_type: str = field(default="LORA", metadata={"help": ", ".join(PEFT_TYPES)})
    num_virtual_tokens: int = field(default=20, metadata={"help": "Of prompt and prefix tuning."})
    merge_adapters: bool = field(default=False, metadata={"help": "Save whole models in place of adapters."})
    pass_over_damaged_checkpoints: bool = field(default=False, metadata={"help": "Go on from the last whole one."})
    decode_answer: bool = field(default=False, metadata={"help": 'Generate "The answer is (B)." too, and read it.'})


@dataclass
class Recipe:
    """A parsed recipe. `values` is what the YAML and the command line said, resolved: the run's `recipe.yaml`."""

    arguments: RecipeArguments
    stages: list[StageArguments]
    training_arguments: Seq2SeqTrainingArguments
    model_config: ModelConfig
    values: dict[str, Any]


def parse_recipe(command_line: list[str]) -> Recipe:
    """
    Raises:
        ValueError: an unknown key (with the nearest known one), two stages of one name, a stage that reads a column
            nobody writes, an answer stage that is not the last one, settings that do not go together.
    """
    config = config_path(command_line)
    command_line = [*command_line]
    command_line[command_line.index("--config") + 1] = config
    parser = TrlParser((RecipeArguments, Seq2SeqTrainingArguments, ModelConfig), allow_abbrev=False)
    arguments, training_arguments, model_config, unknown, surplus = parser.parse_args_and_config(
        args=command_line, return_remaining_strings=True, separate_remaining_strings=True
    )
    known = {f.name for cls in (RecipeArguments, Seq2SeqTrainingArguments, ModelConfig) for f in fields(cls)}
    for where, words in ((config, unknown), ("the command line", surplus)):
        if words:
            raise ValueError(f"{where}: unknown key {words[0].lstrip('-')!r}{nearest(words[0].lstrip('-'), known)}.")
    for name in ("features", "captions"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, resolved(getattr(arguments, name)))
    said = yaml.safe_load(Path(config).read_text()).keys() | {
        word.lstrip("-").split("=")[0].replace("-", "_") for word in command_line if word.startswith("--")
    }
    parsed = (arguments, training_arguments, model_config)
    values = {name: getattr(part, name) for part in parsed for name in sorted(said) if hasattr(part, name)}
    values = {name: plain(value) for name, value in values.items() if name not in MACHINE_SETTINGS}
    stages = [read_stage(entry, config) for entry in arguments.stages]
    if arguments.max_images == 0:
        withhold_pictures(arguments, stages)
    check_stages(stages, config)
    check_inputs(arguments, stages, config)
    check_parts(arguments, model_config, stages, config)
    check_adapters(arguments, training_arguments, model_config, said, config)
    if training_arguments.fp16:
        logger.warning(
            "fp16: T5's activations overflow float16 (transformers issues 14189 and 23918) and the loss becomes nan. "
            "Use bf16 where there is hardware for it, else float32 with smaller batches and accumulation."
        )
    if "--output_dir" not in " ".join(command_line) and "output_dir" not in said:
        training_arguments.output_dir = str(Path("runs") / Path(config).stem)
    return Recipe(arguments, stages, training_arguments, model_config, values)


def config_path(command_line: list[str]) -> str:
    """The recipe's file: as given, or of that name among the recipes that were installed with the package."""
    if "--config" not in command_line[:-1]:
        raise ValueError("Name a recipe: --config configs/NAME.yaml")
    given = command_line[command_line.index("--config") + 1]
    installed = Path(__file__).parent / given
    for path in (Path(given), installed):
        if path.is_file():
            return str(path)
    raise ValueError(f"--config {given}: there is no such file.")


def read_stage(entry: Any, config: str) -> StageArguments:
    if not isinstance(entry, dict):
        raise ValueError(f"{config}: an entry of `stages` is a mapping; found {entry!r}.")
    known = {f.name for f in fields(StageArguments)}
    for key in entry.keys() - known:
        raise ValueError(f"{config}: stage {entry.get('name')!r} has the unknown key {key!r}{nearest(key, known)}.")
    for key in ("name", "reads", "writes"):
        if key not in entry:
            raise ValueError(f"{config}: stage {entry.get('name')!r} lacks the key {key!r}.")
    stage = StageArguments(**entry)
    if stage.template is None and (stage.source is None or stage.target is None):
        raise ValueError(
            f"{config}: stage {stage.name!r} needs a `template`, or both `source` and `target`; found "
            f"source {stage.source!r}, target {stage.target!r}."
        )
    return stage


def check_stages(stages: list[StageArguments], config: str) -> None:
    if not stages:
        raise ValueError(f"{config}: `stages` is empty; a recipe has at least the stage that answers.")
    names = [stage.name for stage in stages]
    for name in names:
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
    if stages[-1].writes != "answer_text" or any(stage.writes == "answer_text" for stage in stages[:-1]):
        raise ValueError(
            f"{config}: the last stage, and only it, writes `answer_text`; found "
            f"{', '.join(f'{stage.name} writes {stage.writes}' for stage in stages)}."
        )


def withhold_pictures(arguments: RecipeArguments, stages: list[StageArguments]) -> None:
    for stage in stages:
        stage.reads = [column for column in stage.reads if column != "images"]
    for name in PICTURE_SETTINGS:
        setattr(arguments, name, RecipeArguments.__dataclass_fields__[name].default)


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
    if arguments.vision_preprocessing != "checkpoint":
        if arguments.vision_model_name_or_path is None or arguments.image_processor is not None:
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
    trains_tower = "vision_tower" in (model_config.lora_modules_to_save or [])
    if arguments.freeze_vision is not None and arguments.freeze_vision == trains_tower:
        raise ValueError(
            f"{config}: freeze_vision is {arguments.freeze_vision}, and with use_peft the picture tower is trained "
            f"where lora_modules_to_save names vision_tower; found {model_config.lora_modules_to_save}."
        )
    arguments.freeze_vision = not trains_tower


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


def plain(value: Any) -> Any:
    """A value as YAML writes it: enumerations of transformers by their value."""
    return value.value if hasattr(value, "value") else value


def claim_run_folder(recipe: Recipe) -> Path:
    """
    The run's folder with its `recipe.yaml`.

    Raises:
        ValueError: the folder holds a run of another recipe; what differs is named, nothing in it is touched.
    """
    folder = Path(recipe.training_arguments.output_dir)
    file = folder / "recipe.yaml"
    if file.exists():
        earlier = yaml.safe_load(file.read_text())
        differing = sorted(
            name
            for name in (earlier.keys() | recipe.values.keys()) - STEP_SETTINGS
            if earlier.get(name) != recipe.values.get(name)
        )
        if differing:
            name = differing[0]
            raise ValueError(
                f"{folder} holds a run of another recipe: {', '.join(differing)} differ ({name}: "
                f"{earlier.get(name)!r} there, {recipe.values.get(name)!r} here). Choose another --output_dir."
            )
        return folder
    if folder.exists() and any(path.suffix != ".tmp" for path in folder.iterdir()):
        raise ValueError(f"{folder} exists, is not empty and holds no recipe.yaml. Choose another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")  # folds are calls of their own, which can be made at once
    unfinished.write_text(yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True))
    unfinished.replace(file)
    return folder
