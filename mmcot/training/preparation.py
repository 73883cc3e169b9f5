"""A recipe -> a run that is ready to be trained: its data loaded and checked, its run folder locked.

All errors in recipe and data are raised here, before anything is trained or written.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, IterableDataset, concatenate_datasets
from filelock import AcquireReturnProxy, FileLock, Timeout
from torch import nn

from mmcot.hub.merging import shared_modules
from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.featurizer import vision_source
from mmcot.pictures.pixel_store import PixelStore
from mmcot.problems.schema import SPLITS, is_answered, join_captions, join_column, require_answers
from mmcot.problems.sources import load_problems, reading_options
from mmcot.recipes.arguments import StageArguments
from mmcot.recipes.recipe import Recipe, claim_run_folder
from mmcot.retrieval.corpora import LECTURES, read_corpus
from mmcot.storage.checkpoints import RunStopped
from mmcot.storage.files import write_json
from mmcot.storage.run_folder import SHARED, RunFolder
from mmcot.training.adapters import check_adapters
from mmcot.training.building import (
    InitialModel,
    build_processor,
    build_stages,
    check_tower_name,
    check_wrapped_classes,
    is_frozen,
    own_config,
    text_skeleton,
)
from mmcot.training.run_inputs import check_unchanged, input_digests
from mmcot.training.split_record import record_splits
from mmcot.training.stage_inputs import target_columns
from mmcot.training.streaming import stream_problems
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.stage_mmcot import GOLD_COLUMNS, Stage, Stages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """
    The training of one model.

    Args:
        name: the name of its folder: that of its stage, or `shared`.
        stages: the stages that the model is trained for: one, or with `share_weights` all stages with a model.
    """

    name: str
    stages: Stages

    def __str__(self) -> str:
        return "shared model" if self.name == SHARED else f"{self.name} stage"


@dataclass
class Run:
    """A recipe with its data checked and its run folder locked, ready for training."""

    recipe: Recipe
    stages: Stages
    problems: dict[str, Dataset | IterableDataset]  # by split; training problems can be a stream
    folder: RunFolder  # of the run, or of a fold
    processor: MMCoTProcessor
    initial_model: InitialModel
    pictures: FeatureStore | PixelStore | None  # the source of the batches' pictures
    lock: AcquireReturnProxy | None = None  # held, so that no other command writes into the folder

    def arguments_of(self, stage: Stage) -> StageArguments:
        return self.recipe.stages[self.stages.index(stage)]

    def training_of(self, stage: Stage) -> Training:
        """Return the training of the model that a stage uses."""
        if self.recipe.arguments.share_weights and stage.has_model:
            return Training(SHARED, self.stages.with_models)
        return Training(stage.name, Stages([stage]))


def prepare(recipe: Recipe) -> Run:
    """
    Load and check everything that a run needs, and lock its run folder.

    Raises:
        ValueError: the recipe or its data are invalid.
        RunStopped: another command is writing into the run folder.
    """
    stages = build_stages(recipe.stages)
    if recipe.arguments.share_weights:
        check_sources_differ(stages.with_models)
    check_model_options(recipe)
    for arguments in recipe.stages:
        for corpus in arguments.corpora or []:
            if corpus != LECTURES:
                read_corpus(corpus)  # raises errors before the run folder is claimed
    store = FeatureStore(recipe.arguments.features) if recipe.arguments.features is not None else None
    problems = {
        split: stream_problems(recipe.source, recipe.arguments.columns)
        if split == "train" and recipe.arguments.streaming
        else prepare_problems(recipe, stages, split, store)
        for split in SPLITS
    }
    if recipe.arguments.streaming:  # a stream cannot be checked as a whole
        for stage in stages:
            check_targets(problems["val"], stage, recipe.arguments.dataset)
    splits = record_splits(recipe, problems)
    if splits["divided_by"] is not None:
        recipe.values["split_seed"] = splits["divided_by"]
    processor = build_processor(recipe, stages, problems["train"])
    warn_of_choice_lengths(problems["val"], processor)
    initial_model = InitialModel(recipe, processor.tokenizer, store)
    if store is not None:
        check_features(store, recipe, processor, initial_model)
    elif processor.image_processor is None and stages.see_pictures:
        raise ValueError(
            f"A stage reads `images`, but {recipe.model_config.model_name_or_path} has no picture tower: name one "
            f"(vision_model_name_or_path), or features."
        )
    pictures = store or prepare_pictures(recipe, stages, processor, problems, initial_model)
    if not recipe.arguments.streaming:
        check_folds(recipe, len(problems["train"]))
    with PartialState().main_process_first():
        folder = claim_run_folder(recipe)
    is_whole_run = recipe.arguments.fold is None and recipe.arguments.stage is None  # these have locks of their own
    lock = lock_file(folder.lock) if is_whole_run else None
    with PartialState().main_process_first():
        check_unchanged(folder, input_digests(recipe, problems, processor, store))
    if PartialState().is_main_process:
        write_json(folder.splits, splits)
    return Run(recipe, stages, problems, folder, processor, initial_model, pictures, lock)


def check_sources_differ(stages: Stages) -> None:
    """Raise an error if two stages that share a model have the same source, and the model could not tell them apart."""
    names: dict[str, str] = {}
    for stage in stages:
        if stage.source in names:
            raise ValueError(
                f"stages {names[stage.source]!r} and {stage.name!r} have the same source, but with share_weights the "
                f"model recognizes a stage by its source: change a word in one of them."
            )
        names[stage.source] = stage.name


def check_model_options(recipe: Recipe) -> None:
    """
    Check the options that refer to the text model.

    Raises:
        ValueError: the recipe's text model is not a T5, or lacks the modules that an option names.
    """
    model = text_skeleton(recipe)
    check_tower_name(recipe)
    if recipe.arguments.vision_config is None and recipe.arguments.vision_model_name_or_path is None:
        check_wrapped_classes(model)
    if recipe.model_config.use_peft:
        linear_layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        check_adapters(recipe.model_config, linear_layers, recipe.arguments.peft_type, shared_modules(model))


def check_features(store: FeatureStore, recipe: Recipe, processor: MMCoTProcessor, initial_model: InitialModel) -> None:
    """
    Check that stored features fit the model.

    Raises:
        ValueError: the store's features are not those that the model reads.
    """
    own = own_config(recipe.model_config)
    has_tower = recipe.arguments.vision_model_name_or_path is not None or (own is not None and own.vision_config)
    model = initial_model.inspect() if has_tower else initial_model.without_weights()
    store.check_model(model, processor.image_processor)


def lock_file(path: Path) -> AcquireReturnProxy | None:
    """
    Acquire the lock of a run, of one of its folds or of a stage: different folds and stages can be trained at the same
    time. Only the main process acquires it. The result is a context manager that releases it; a killed process releases
    its lock.

    Raises:
        RunStopped: another command holds the lock.
    """
    if not PartialState().is_main_process:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout as error:
        raise RunStopped(
            f"{path.parent} is being written by another command, which holds {path.name}: wait until it ends, or stop "
            f"it."
        ) from error


def warn_of_choice_lengths(problems: Dataset, processor: MMCoTProcessor) -> None:
    """Warn if choices differ in length: a total log-probability rarely selects long ones (docs/choice_lengths.md)."""
    stage = processor.stages.answering
    if stage.score != "total" or not PartialState().is_main_process:
        return
    rows = problems.remove_columns("images").to_list()
    targets = [[stage.render_target({**row, "answer": index}) for index in range(len(row["choices"]))] for row in rows]
    lengths = [[len(tokens) for tokens in processor.tokenizer(texts, verbose=False)["input_ids"]] for texts in targets]
    differing = sum(len(set(choice_lengths)) > 1 for choice_lengths in lengths)
    if differing:
        logger.warning(
            f"{stage.name} stage: score is total, and in {differing} of {len(rows)} validation problems the choices' "
            f"targets differ in length; total favors the shorter ones: consider score: mean"
        )


def prepare_pictures(
    recipe: Recipe,
    stages: Stages,
    processor: MMCoTProcessor,
    problems: dict[str, Dataset],
    initial_model: InitialModel,
) -> FeatureStore | PixelStore | None:
    """Decode every picture once before training; if the tower is frozen, compute its features instead."""
    all_problems = concatenate_datasets([rows for rows in problems.values() if isinstance(rows, Dataset)])
    if processor.image_processor is None or not stages.see_pictures:
        return None
    if not is_frozen(recipe):
        return PixelStore(all_problems, processor.image_processor)
    model = initial_model.inspect().to(recipe.training_arguments.device)
    source = vision_source(model, processor.image_processor, all_problems)
    model.cpu()  # the Trainer moves it to its device
    return source


def prepare_problems(recipe: Recipe, stages: Stages, split: str, store: FeatureStore | None) -> Dataset:
    """Load and check the problems of a split, so that no run fails halfway on invalid data."""
    source = recipe.arguments.dataset
    see_pictures = stages.see_pictures
    needs_files = see_pictures and (store is None or store.needs_files)
    with PartialState().main_process_first():
        max_images = recipe.arguments.max_images if see_pictures else None
        problems = load_problems(recipe.source, split, max_images, needs_files, **reading_options(recipe.arguments))
    if len(problems) == 0:
        raise ValueError(
            f"{source}: split {split!r} has no problems. (Rows without a split are divided at random: eight in ten "
            f"to train, one in ten each to val and test. With few rows, give each a split, or name a file for each "
            f"split: train=FILE,val=FILE,test=FILE.)"
        )
    if split != "test" or is_answered(problems):
        require_answers(problems)
    if recipe.arguments.captions is not None:
        problems = join_captions(problems, recipe.arguments.captions)
    if store is not None and see_pictures:
        store.check_problems(problems)
    if split == "train":
        if recipe.arguments.target_column is not None:
            problems = join_target_column(problems, recipe.arguments.target_column, stages)
        for stage in stages:
            check_targets(problems, stage, source)
    return problems


def check_folds(recipe: Recipe, num_problems: int) -> None:
    """Raise an error if cross-fitting has more folds than training problems."""
    num_folds = recipe.arguments.num_folds
    if num_folds > num_problems and any(stage.inputs_from == "cross_fit" for stage in recipe.stages):
        raise ValueError(f"num_folds is {num_folds}, but there are only {num_problems} training problems.")


def join_target_column(problems: Dataset, target_column: str, stages: Stages) -> Dataset:
    """Join the column of `COLUMN=FILE.json` to the problems, as the target of the stage that writes it."""
    column, separator, path = target_column.partition("=")
    written = [stage.writes for stage in stages]
    if not separator or column not in written:
        raise ValueError(
            f"--target_column is {target_column!r}; expected COLUMN=FILE.json with a COLUMN that a stage writes: "
            f"{', '.join(written)}."
        )
    return join_column(problems, column, path)


def check_targets(problems: Dataset, stage: Stage, source: str) -> None:
    """Raise an error if a stage's gold is empty for every problem: the stage would learn to write nothing."""
    if stage.writes in problems.column_names:
        return
    gold = sorted(target_columns(stage) & set(GOLD_COLUMNS))
    if gold and "answer" not in gold and not any(any(problems[name]) for name in gold):
        raise ValueError(
            f"{source}: stage {stage.name!r} learns to write {stage.writes!r} from {', '.join(gold)}, which is empty "
            f"for all {len(problems)} problems. Use a recipe with one stage "
            f"(configs/demo/one_stage.yaml), or join your own texts by problem id "
            f"(--target_column {stage.writes}=FILE.json)."
        )
