"""Parses a recipe (`configs/DATASET/VARIANT.yaml`) into the stages and the arguments of a run.

`TrlParser` reads the YAML and the command line into three dataclasses: `RecipeArguments`, `Seq2SeqTrainingArguments`
and `trl.ModelConfig`. The checks are in `checks.py` and `trainer_options.py`. No model is built here.
"""

import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import Seq2SeqTrainingArguments
from trl import ModelConfig, TrlParser

import mmcot
from mmcot.problems.opening import IN_PYTHON, Given
from mmcot.recipes.arguments import RecipeArguments, StageArguments
from mmcot.recipes.checks import (
    check_adapters,
    check_attention,
    check_inputs,
    check_one_stage,
    check_parts,
    check_shared_weights,
    check_stages,
    check_streaming,
    in_order,
    nearest,
    trains_tower,
)
from mmcot.recipes.trainer_options import check_trainer_options
from mmcot.storage.files import resolve_path, write_text
from mmcot.storage.paths import check_output_folder
from mmcot.storage.run_folder import RunFolder
from modeling_mmcot.stage_mmcot import KINDS, Kind

logger = logging.getLogger(__name__)

# Settings of the machine and of reporting, which do not change the result: they may differ when a run is resumed.
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
    "stage",
    "report_problems",
}
# These settings divide the problems of a step. A resumed run checks their number instead (`callbacks.StepSizeCheck`).
STEP_SETTINGS = {"per_device_train_batch_size", "gradient_accumulation_steps"}

# Paths among these settings are compared by their content (`run_inputs.py`), because data and run folders can be moved.
NAMES_OF_DATA = {"dataset", "features", "captions", "target_column"}
NAMES_OF_DATA |= {"model_name_or_path", "tokenizer_name_or_path", "vision_model_name_or_path"}

# Recipes of `configs/` whose earlier name was not DATASET_VARIANT. Their run folders still have the earlier name.
EARLIER_NAMES = {"demo/two_stages": "demo"}

PICTURE_SETTINGS = ("vision_model_name_or_path", "vision_tower", "vision_preprocessing", "freeze_vision", "max_images")
PICTURE_SETTINGS += ("features", "vision_config", "image_processor")


@dataclass
class Recipe:
    """A parsed recipe. `values` are the resolved settings of the YAML and the command line: the run's `recipe.yaml`."""

    arguments: RecipeArguments
    stages: list[StageArguments]
    training_arguments: Seq2SeqTrainingArguments
    model_config: ModelConfig
    values: dict[str, Any]
    given: Given | None = None  # a dataset that a Python caller passed

    @property
    def source(self) -> str | Given:
        """The source of the problems."""
        return self.arguments.dataset if self.given is None else self.given

    def with_dataset(self, given: Given) -> "Recipe":
        """Return the recipe with a dataset from Python, which has the name `IN_PYTHON` in records."""
        arguments = replace(self.arguments, dataset=IN_PYTHON)
        return replace(self, arguments=arguments, values={**self.values, "dataset": IN_PYTHON}, given=given)


def parse_recipe(command_line: list[str]) -> Recipe:
    """
    Parse and check the recipe that a command line names.

    Raises:
        ValueError: a key is unknown (the message names the nearest known one), two stages have the same name, a stage
            reads a column that no stage writes, none or several stages answer, or settings conflict.
    """
    config = config_path(command_line)
    command_line = [*command_line]
    command_line[command_line.index("--config") + 1] = config
    recipe = read_yaml(Path(config))
    if not isinstance(recipe, dict):
        raise ValueError(f"{config}: a recipe is a mapping; found {recipe!r:.80}.")
    if "env" in recipe:
        # TrlParser would set variables that can affect other programs too, and the run would not record them.
        raise ValueError(f"{config}: env is not read: set environment variables where the command is started.")
    parser = TrlParser((RecipeArguments, Seq2SeqTrainingArguments, ModelConfig), allow_abbrev=False)
    try:
        arguments, training_arguments, model_config, unknown, surplus = parser.parse_args_and_config(
            args=command_line, return_remaining_strings=True, separate_remaining_strings=True
        )
    except ImportError as error:  # an option needs a library such as deepspeed
        raise ValueError(f"{config}: {error}") from error
    known = {f.name for cls in (RecipeArguments, Seq2SeqTrainingArguments, ModelConfig) for f in fields(cls)}
    for where, words in ((config, unknown), ("the command line", surplus)):
        if words:
            raise ValueError(f"{where}: unknown key {words[0].lstrip('-')!r}{nearest(words[0].lstrip('-'), known)}.")
    for name in ("features", "captions"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, resolve_path(getattr(arguments, name)))
    given_keys = recipe.keys() | {
        word.lstrip("-").split("=")[0].replace("-", "_") for word in command_line if word.startswith("--")
    }
    parsed = (arguments, training_arguments, model_config)
    values = {name: getattr(part, name) for part in parsed for name in sorted(given_keys) if hasattr(part, name)}
    values = {name: to_yaml_value(value) for name, value in values.items() if name not in MACHINE_SETTINGS}
    stages = [read_stage(entry, config) for entry in arguments.stages]
    if arguments.max_images == 0:
        withhold_pictures(arguments, stages)
    check_sizes(training_arguments, config)
    check_trainer_options(training_arguments, model_config, given_keys, arguments.report_problems > 0, config)
    check_stages(stages, config)
    stages = in_order(stages, config)
    check_shared_weights(arguments, model_config, stages, config)
    check_inputs(arguments, stages, config)
    check_one_stage(arguments, stages, config)
    check_streaming(arguments, training_arguments, stages, config)
    check_parts(arguments, model_config, stages, config)
    check_adapters(arguments, training_arguments, model_config, given_keys, config)
    check_attention(arguments, model_config, config)
    if model_config.use_peft:
        arguments.freeze_vision = not trains_tower(model_config)
    if training_arguments.fp16:
        logger.warning(
            "fp16: T5's activations overflow float16 (transformers issues 14189 and 23918) and the loss becomes nan. "
            "Use bf16 if the hardware supports it, else float32 with smaller batches and gradient accumulation."
        )
    if "--output_dir" not in " ".join(command_line) and "output_dir" not in given_keys:
        training_arguments.output_dir = str(Path("runs") / run_name(Path(config)))
    check_output_folder(training_arguments.output_dir, "--output_dir")
    return Recipe(arguments, stages, training_arguments, model_config, values)


def read_yaml(file: Path) -> Any:
    """
    Return the content of a YAML file.

    Raises:
        ValueError: the file is not YAML; the message names the line.
    """
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected a recipe in YAML; found {' '.join(str(error).split())}") from error


def check_sizes(arguments: Seq2SeqTrainingArguments, config: str) -> None:
    """
    Check that batches are not empty.

    Raises:
        ValueError: a batch size or the gradient accumulation is below 1.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{config}: {name} is {getattr(arguments, name)}; expected 1 or more.")


def config_path(command_line: list[str]) -> str:
    """
    Return the path of the recipe: the given file, or a recipe installed with the package. Earlier names are accepted.

    Raises:
        ValueError: no recipe is named, or the file does not exist.
    """
    if "--config" not in command_line[:-1]:
        raise ValueError("--config is missing: name a recipe, --config configs/DATASET/VARIANT.yaml")
    given = Path(command_line[command_line.index("--config") + 1])
    renamed = given.parent / f"{current_name(given.stem)}.yaml"
    for name in (given, renamed):
        for path in (name, Path(mmcot.__file__).parent / name):
            if path.is_file():
                if name != given:
                    logger.warning("%s is now %s.", given, renamed)
                return str(path)
    raise ValueError(f"--config {given}: no such file.")


def current_name(earlier_name: str) -> str:
    """Return DATASET/VARIANT for the earlier name DATASET_VARIANT of a recipe of `configs/`."""
    return next((new for new, old in EARLIER_NAMES.items() if old == earlier_name), earlier_name.replace("_", "/", 1))


def run_name(recipe: Path) -> str:
    """
    Return the default name of a run folder: DATASET_VARIANT for `configs/DATASET/VARIANT.yaml`, else the file's stem.

    DATASET_VARIANT is the earlier name of the recipe, so earlier run folders are still found.
    """
    dataset = recipe.absolute().parent
    if dataset.parent.name != "configs":
        return recipe.stem
    return EARLIER_NAMES.get(f"{dataset.name}/{recipe.stem}", f"{dataset.name}_{recipe.stem}")


def read_stage(entry: Any, config: str) -> StageArguments:
    """
    Parse an entry of `stages`.

    Raises:
        ValueError: the entry is not a mapping, has an unknown key or lacks a required one.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{config}: an entry of `stages` is a mapping; found {entry!r}.")
    known = {f.name for f in fields(StageArguments)}
    for key in entry.keys() - known:
        raise ValueError(f"{config}: stage {entry.get('name')!r} has the unknown key {key!r}{nearest(key, known)}.")
    for key in ("name", "reads", "writes"):
        if key not in entry:
            raise ValueError(f"{config}: stage {entry.get('name')!r} lacks the key {key!r}.")
    stage = StageArguments(**entry)
    kind = KINDS.get(stage.kind, Kind())
    needs_templates = kind.has_model and kind.make_target is None
    if kind.make_target is not None and stage.source is None:
        raise ValueError(f"{config}: stage {stage.name!r} needs a `source`.")
    if needs_templates and stage.template is None and (stage.source is None or stage.target is None):
        raise ValueError(
            f"{config}: stage {stage.name!r} needs a `template`, or both `source` and `target`; found "
            f"source {stage.source!r}, target {stage.target!r}."
        )
    return stage


def withhold_pictures(arguments: RecipeArguments, stages: list[StageArguments]) -> None:
    """Remove `images` from the stages and reset all settings of pictures."""
    for stage in stages:
        stage.reads = [column for column in stage.reads if column != "images"]
    for name in PICTURE_SETTINGS:
        setattr(arguments, name, RecipeArguments.__dataclass_fields__[name].default)


def to_yaml_value(value: Any) -> Any:
    """Convert an enumeration member to its value and a settings object to a mapping, because YAML cannot write them."""
    if isinstance(value, list):
        return [to_yaml_value(one) for one in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return value.value if hasattr(value, "value") else value


def is_path(value: Any) -> bool:
    """Whether a value is a path or `COLUMN=PATH`. A text like `USER/NAME` is a Hub id, unless such a path exists."""
    path = str(value).rpartition("=")[2]
    return value is not None and (Path(path).exists() or path.startswith((".", "/", "~")))


def describe_difference(there: Any, here: Any, name: str) -> str:
    """Describe the first difference within two values of a recipe, with the keys that lead to it."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            if there.get(key) != here.get(key):
                return describe_difference(there.get(key), here.get(key), f"{name}.{key}")
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, (old, new) in enumerate(zip(there, here, strict=True)):
            if old != new:
                return describe_difference(old, new, f"{name}[{number}]")
    return f"{name}: {there!r:.200} there, {here!r:.200} here"


def claim_run_folder(recipe: Recipe) -> RunFolder:
    """
    Return the run folder, and write its `recipe.yaml` if missing.

    Raises:
        ValueError: the folder contains a run of another recipe, or other files. The message names the differences; the
            folder is not changed.
    """
    folder = RunFolder(Path(recipe.training_arguments.output_dir))
    file = folder.recipe
    if file.exists():
        earlier = read_yaml(file)
        exempt = set() if recipe.arguments.streaming else STEP_SETTINGS  # a resumed stream skips whole batches
        differing = sorted(
            name
            for name in (earlier.keys() | recipe.values.keys()) - exempt
            if earlier.get(name) != recipe.values.get(name)
            and not (name in NAMES_OF_DATA and is_path(earlier.get(name)) and is_path(recipe.values.get(name)))
        )
        if differing:
            parts = [describe_difference(earlier.get(name), recipe.values.get(name), name) for name in differing]
            raise ValueError(
                f"{folder} contains a run of another recipe: {'; '.join(parts)}. Choose another --output_dir."
            )
        return folder
    if folder.path.exists() and any(path.suffix != ".tmp" for path in folder.path.iterdir()):
        raise ValueError(f"{folder} exists, is not empty and has no recipe.yaml. Choose another --output_dir.")
    # Written atomically, because folds are separate calls that can run at the same time.
    write_text(file, yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True))
    return folder
