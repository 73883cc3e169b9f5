"""A recipe (`configs/DATASET/VARIANT.yaml`) -> the stages and the arguments of a run.

`TrlParser` reads the YAML and the command line into three dataclasses: our `RecipeArguments`,
`Seq2SeqTrainingArguments` and `trl.ModelConfig`. What a recipe can get wrong stands in `recipe_checks.py`. Nothing is
built here, and nothing is known of the model.
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
    check_parts,
    check_stages,
    check_streaming,
    nearest,
    trains_tower,
)
from mmcot.recipes.trainer_options import check_trainer_options
from mmcot.storage.files import resolve_path, write_text
from mmcot.storage.paths import check_output_folder
from mmcot.storage.run_folder import RunFolder

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

# Compared by what they hold (`run_inputs.py`), where they are paths: data can be moved, as a run's folder can.
NAMES_OF_DATA = {"dataset", "features", "captions", "target_column"}
NAMES_OF_DATA |= {"model_name_or_path", "tokenizer_name_or_path", "vision_model_name_or_path"}

# Recipes of `configs/` whose earlier name was not DATASET_VARIANT; their default run folder still has that name.
EARLIER_NAMES = {"demo/two_stages": "demo"}

PICTURE_SETTINGS = ("vision_model_name_or_path", "vision_tower", "vision_preprocessing", "freeze_vision", "max_images")
PICTURE_SETTINGS += ("features", "vision_config", "image_processor")


@dataclass
class Recipe:
    """A parsed recipe. `values` is what the YAML and the command line said, resolved: the run's `recipe.yaml`."""

    arguments: RecipeArguments
    stages: list[StageArguments]
    training_arguments: Seq2SeqTrainingArguments
    model_config: ModelConfig
    values: dict[str, Any]
    given: Given | None = None  # the dataset, where a Python caller gave it

    @property
    def source(self) -> str | Given:
        return self.arguments.dataset if self.given is None else self.given

    def with_dataset(self, given: Given) -> "Recipe":
        """The recipe on a dataset of Python, by whose name it goes in records."""
        arguments = replace(self.arguments, dataset=IN_PYTHON)
        return replace(self, arguments=arguments, values={**self.values, "dataset": IN_PYTHON}, given=given)


def parse_recipe(command_line: list[str]) -> Recipe:
    """
    Raises:
        ValueError: an unknown key (with the nearest known one), two stages of one name, a stage that reads a column
            nobody writes, an answer stage that is not the last one, settings that do not go together.
    """
    config = config_path(command_line)
    command_line = [*command_line]
    command_line[command_line.index("--config") + 1] = config
    recipe = read_yaml(Path(config))
    if not isinstance(recipe, dict):
        raise ValueError(f"{config}: a recipe is a mapping; found {recipe!r:.80}.")
    if "env" in recipe:
        # TrlParser would set the variables, whatever they do to other programs, and no record would be kept.
        raise ValueError(f"{config}: env is not read: set variables of the environment where the command is started.")
    parser = TrlParser((RecipeArguments, Seq2SeqTrainingArguments, ModelConfig), allow_abbrev=False)
    try:
        arguments, training_arguments, model_config, unknown, surplus = parser.parse_args_and_config(
            args=command_line, return_remaining_strings=True, separate_remaining_strings=True
        )
    except ImportError as error:  # of what an option needs, as deepspeed
        raise ValueError(f"{config}: {error}") from error
    known = {f.name for cls in (RecipeArguments, Seq2SeqTrainingArguments, ModelConfig) for f in fields(cls)}
    for where, words in ((config, unknown), ("the command line", surplus)):
        if words:
            raise ValueError(f"{where}: unknown key {words[0].lstrip('-')!r}{nearest(words[0].lstrip('-'), known)}.")
    for name in ("features", "captions"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, resolve_path(getattr(arguments, name)))
    said = recipe.keys() | {
        word.lstrip("-").split("=")[0].replace("-", "_") for word in command_line if word.startswith("--")
    }
    parsed = (arguments, training_arguments, model_config)
    values = {name: getattr(part, name) for part in parsed for name in sorted(said) if hasattr(part, name)}
    values = {name: plain(value) for name, value in values.items() if name not in MACHINE_SETTINGS}
    stages = [read_stage(entry, config) for entry in arguments.stages]
    if arguments.max_images == 0:
        withhold_pictures(arguments, stages)
    check_sizes(training_arguments, config)
    check_trainer_options(training_arguments, model_config, said, arguments.report_problems > 0, config)
    check_stages(stages, config)
    check_inputs(arguments, stages, config)
    check_streaming(arguments, training_arguments, stages, config)
    check_parts(arguments, model_config, stages, config)
    check_adapters(arguments, training_arguments, model_config, said, config)
    check_attention(arguments, model_config, config)
    if model_config.use_peft:
        arguments.freeze_vision = not trains_tower(model_config)
    if training_arguments.fp16:
        logger.warning(
            "fp16: T5's activations overflow float16 (transformers issues 14189 and 23918) and the loss becomes nan. "
            "Use bf16 where there is hardware for it, else float32 with smaller batches and accumulation."
        )
    if "--output_dir" not in " ".join(command_line) and "output_dir" not in said:
        training_arguments.output_dir = str(Path("runs") / run_name(Path(config)))
    check_output_folder(training_arguments.output_dir, "--output_dir")
    return Recipe(arguments, stages, training_arguments, model_config, values)


def read_yaml(file: Path) -> Any:
    """
    Raises:
        ValueError: it is no YAML; the line is named.
    """
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected a recipe in YAML; found {' '.join(str(error).split())}") from error


def check_sizes(arguments: Seq2SeqTrainingArguments, config: str) -> None:
    """
    Raises:
        ValueError: a batch has no problem.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{config}: {name} is {getattr(arguments, name)}; expected 1 or more.")


def config_path(command_line: list[str]) -> str:
    """The recipe's file: as given, or among the recipes that were installed with the package; earlier names too."""
    if "--config" not in command_line[:-1]:
        raise ValueError("Name a recipe: --config configs/DATASET/VARIANT.yaml")
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
    """DATASET/VARIANT of a recipe of `configs/` that was named DATASET_VARIANT."""
    return next((new for new, old in EARLIER_NAMES.items() if old == earlier_name), earlier_name.replace("_", "/", 1))


def run_name(recipe: Path) -> str:
    """
    The default name of a recipe's run folder: DATASET_VARIANT for `configs/DATASET/VARIANT.yaml`, else the file's stem.

    It is the recipe's earlier name, so that earlier run folders are still found.
    """
    dataset = recipe.absolute().parent
    if dataset.parent.name != "configs":
        return recipe.stem
    return EARLIER_NAMES.get(f"{dataset.name}/{recipe.stem}", f"{dataset.name}_{recipe.stem}")


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


def withhold_pictures(arguments: RecipeArguments, stages: list[StageArguments]) -> None:
    for stage in stages:
        stage.reads = [column for column in stage.reads if column != "images"]
    for name in PICTURE_SETTINGS:
        setattr(arguments, name, RecipeArguments.__dataclass_fields__[name].default)


def plain(value: Any) -> Any:
    """A value as YAML writes it: enumerations of transformers by their value, settings as a mapping."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return value.value if hasattr(value, "value") else value


def is_path(value: Any) -> bool:
    """Whether it is one, there or not; `COLUMN=PATH` too. (`USER/NAME` is an id, where it is not there.)"""
    path = str(value).rpartition("=")[2]
    return value is not None and (Path(path).exists() or path.startswith((".", "/", "~")))


def difference(there: Any, here: Any, name: str) -> str:
    """The first value that differs within two values of a recipe, by the keys that lead to it."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            if there.get(key) != here.get(key):
                return difference(there.get(key), here.get(key), f"{name}.{key}")
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, (old, new) in enumerate(zip(there, here, strict=True)):
            if old != new:
                return difference(old, new, f"{name}[{number}]")
    return f"{name}: {there!r:.200} there, {here!r:.200} here"


def claim_run_folder(recipe: Recipe) -> RunFolder:
    """
    The run's folder with its `recipe.yaml`.

    Raises:
        ValueError: the folder holds a run of another recipe; what differs is named, nothing in it is touched.
    """
    folder = RunFolder(Path(recipe.training_arguments.output_dir))
    file = folder.recipe
    if file.exists():
        earlier = read_yaml(file)
        exempt = set() if recipe.arguments.streaming else STEP_SETTINGS  # a stream is gone through by batches
        differing = sorted(
            name
            for name in (earlier.keys() | recipe.values.keys()) - exempt
            if earlier.get(name) != recipe.values.get(name)
            and not (name in NAMES_OF_DATA and is_path(earlier.get(name)) and is_path(recipe.values.get(name)))
        )
        if differing:
            parts = {name: difference(earlier.get(name), recipe.values.get(name), name) for name in differing}
            raise ValueError(
                f"{folder} holds a run of another recipe: {'; '.join(parts.values())}. Choose another --output_dir."
            )
        return folder
    if folder.path.exists() and any(path.suffix != ".tmp" for path in folder.path.iterdir()):
        raise ValueError(f"{folder} exists, is not empty and holds no recipe.yaml. Choose another --output_dir.")
    # Folds are separate calls that can run at the same time.
    write_text(file, yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True))
    return folder
