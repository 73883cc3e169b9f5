"""Trains one stage, resumed from its last whole checkpoint, and lets it write its column for the splits."""

import copy
import gc
import logging
import random
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import Seq2SeqTrainingArguments, set_seed

from mmcot.prediction.batching import by_both_lengths
from mmcot.prediction.columns import with_gold_columns
from mmcot.prediction.examples import lengths_of, tokenized
from mmcot.prediction.predictor import log_shortened
from mmcot.problems.known_datasets import known_dataset_name
from mmcot.recipes.arguments import StageArguments
from mmcot.recipes.recipe import Recipe
from mmcot.storage.checkpoints import RunStopped, checkpoint_to_resume
from mmcot.storage.files import write_json
from mmcot.storage.journal import remove_partial_files
from mmcot.storage.run_folder import CROSS_FITTED
from mmcot.training.adapters import adapt, freeze, load_adapter_weights, quantization
from mmcot.training.callbacks import BestCheckpoint, SameSteps, Termination
from mmcot.training.preparation import Run
from mmcot.training.progress import ValidationReport, hardware, plot_curves
from mmcot.training.stage_inputs import one_row_per_rationale, with_written_columns
from mmcot.training.stage_outputs import is_written, predict_split
from mmcot.training.streaming import stream_examples, streamed_pictures
from mmcot.training.trainer import NamedCollator, StageTrainer, load_weights
from modeling_mmcot import MMCoTForConditionalGeneration
from modeling_mmcot.loading_mmcot import StageAdapters
from modeling_mmcot.stage_mmcot import Stage, Stages

logger = logging.getLogger(__name__)


def train_and_write(prepared: Run, stage: Stage, splits: set[str], stages: Stages) -> None:
    """
    Train a stage, and let it write its column for the splits and for what later stages are trained on.

    Args:
        stages: those that are trained on these problems, this one among them.
    """
    splits = splits | splits_read_later(prepared, stages.after(stage))
    written = [split for split in splits if is_written(prepared, stage, split)]
    for split in written:  # a call that was killed can have left its journal
        remove_partial_files(prepared.folder.unfinished_predictions(split, stage.name))
    if prepared.folder.is_trained(stage.name) and len(written) == len(splits):
        logger.info("stage %s is trained and has written already: %s", stage.name, prepared.folder)
        return
    model = train_stage(prepared, stage)
    for split in sorted(splits):
        predict_split(prepared, model, stage, split)


def splits_read_later(prepared: Run, later: list[Stage]) -> set[str]:
    """The splits for which later stages read written columns while they are trained."""
    inputs = {prepared.arguments_of(stage).inputs_from for stage in later}
    return ({"val"} if inputs - {"gold"} else set()) | ({"train"} if "generated" in inputs else set())


def train_stage(prepared: Run, stage: Stage) -> MMCoTForConditionalGeneration:
    """The trained model of a stage: loaded from its folder, or trained now where that is not finished."""
    if prepared.folder.is_trained(stage.name):
        logger.info("stage %s is trained already: %s", stage.name, prepared.folder.stage(stage.name))
        return load_trained(prepared, stage)
    model = train(prepared, stage)
    if model is None:
        gc.collect()  # the base is in memory once
        model = load_trained(prepared, stage)
    return model


def train(prepared: Run, stage: Stage) -> MMCoTForConditionalGeneration | None:
    """
    Train a stage from its last checkpoint, and save it. Returns its model, or None where the model that was trained is
    not the one that predicts: an adapter of the base, or sharded weights.
    """
    with PartialState().main_process_first():
        examples = {split: stage_examples(prepared, stage, split) for split in ("train", "val")}
        checkpoint = checkpoint_of(prepared, stage)
    check_batches(prepared.recipe.training_arguments, examples["train"], stage)
    shortened = {split: log_shortened(stage, rows, f"{split} problems") for split, rows in examples.items()}
    trainer = build_trainer(prepared, stage, examples, checkpoint)
    with Termination() as termination:
        for callback in (termination, SameSteps(), BestCheckpoint()):
            trainer.add_callback(callback)
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if trainer.state.global_step < trainer.state.max_steps:
        stop_in_order(trainer, stage, termination)
    save_trained(trainer, prepared.recipe)
    if trainer.is_world_process_zero():
        write_results(trainer, prepared, stage, metrics, shortened)
    PartialState().wait_for_everyone()
    if termination.is_asked_of_any():
        stop_in_order(trainer, stage, termination)
    if saves_adapters(prepared.recipe) or is_sharded(trainer):
        return None
    # As it would be loaded: without the wrapper by which it is trained in bfloat16.
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def checkpoint_of(prepared: Run, stage: Stage) -> str | None:
    """The stage's newest checkpoint, from which its training can resume."""
    arguments = prepared.recipe.arguments
    checkpoint = checkpoint_to_resume(prepared.folder.stage(stage.name), arguments.pass_over_damaged_checkpoints)
    check_resumable(prepared.recipe.training_arguments, checkpoint)
    return checkpoint


def build_trainer(
    prepared: Run, stage: Stage, examples: dict[str, Dataset | IterableDataset], checkpoint: str | None
) -> StageTrainer:
    recipe, processor, stage_folder = prepared.recipe, prepared.processor, prepared.folder.stage(stage.name)
    pictures = prepared.pictures
    if recipe.arguments.streaming:
        pictures = streamed_pictures(processor, prepared.problems["val"])
    model = starting_model(prepared, stage)
    if checkpoint is not None and not recipe.model_config.use_peft:  # the Trainer itself loads an adapter's weights
        load_weights(model, checkpoint)
    trainer = StageTrainer(
        model=model,
        args=training_arguments(recipe.training_arguments, prepared.arguments_of(stage), stage_folder),
        train_dataset=examples["train"],
        eval_dataset=by_length(examples["val"]),
        data_collator=NamedCollator(processor, stage, pictures),
        processing_class=processor,
    )
    if recipe.arguments.report_problems and prepared.folder.fold_of is None:
        if is_sharded(trainer):
            raise RunStopped("report_problems lets the stage write while it is trained, which sharded weights cannot.")
        trainer.validation_report = build_report(prepared, stage)
    return trainer


def is_sharded(trainer: StageTrainer) -> bool:
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def write_results(
    trainer: StageTrainer,
    prepared: Run,
    stage: Stage,
    metrics: dict[str, float],
    shortened: dict[str, dict[str, int] | None],
) -> None:
    """`train_results.json`, by which a stage counts as trained, and `curves.png`."""
    history = trainer.state.log_history[:-1]  # the last entry repeats the metrics
    results = {
        **metrics,
        "world_size": trainer.accelerator.num_processes,
        "hardware": hardware(),
        "dataset_known_as": known_dataset_name(prepared.recipe.arguments.dataset),
        "shortened": shortened,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "log_history": history,
    }
    write_json(prepared.folder.train_results(stage.name), results)
    plot_curves(history, prepared.folder.curves(stage.name))


def stage_examples(prepared: Run, stage: Stage, split: str) -> Dataset | IterableDataset:
    """The tokens of a split's problems, to train on or to evaluate while training."""
    problems, processor = prepared.problems[split], prepared.processor
    if isinstance(problems, IterableDataset):
        return stream_examples(
            problems, stage, processor, prepared.stages.before(stage), prepared.recipe.training_arguments.seed
        )
    return tokenized(training_problems(prepared, stage, split), stage, processor, with_targets=True)


def build_report(prepared: Run, stage: Stage) -> ValidationReport:
    problems = prepared.problems["val"]
    count = min(prepared.recipe.arguments.report_problems, len(problems))
    chosen = random.Random(0).sample(range(len(problems)), count)
    return ValidationReport(
        prepared.processor,
        stage,
        problems.select(sorted(chosen)),
        prepared.folder.predictions_so_far("val"),
        prepared.pictures,
        prepared.folder.reports(stage.name),
        prepared.recipe.training_arguments.per_device_eval_batch_size,
    )


def training_problems(prepared: Run, stage: Stage, split: str) -> Dataset:
    """The problems with the columns of earlier stages that this one is trained on, or evaluated while it is trained."""
    problems, earlier = prepared.problems[split], prepared.stages.before(stage)
    inputs_from = prepared.arguments_of(stage).inputs_from
    if inputs_from == "gold":
        return with_gold_columns(one_row_per_rationale(problems, [*earlier, stage]), earlier)
    if inputs_from == "cross_fit" and split == "train":
        problems = with_written_columns(problems, earlier, prepared.folder.run, CROSS_FITTED)
    else:
        problems = with_written_columns(problems, earlier, prepared.folder, split)
    return one_row_per_rationale(problems, [stage])


def stop_in_order(trainer: StageTrainer, stage: Stage, termination: Termination) -> None:
    """
    Raises:
        RunStopped: no signal asked for it: a scheduler that is told so would start the run again for ever.
    """
    step, last = trainer.state.global_step, trainer.state.max_steps
    if not termination.is_asked_of_any():
        raise RunStopped(f"The {stage.name} stage ended at step {step} of {last}, though no signal asked for that.")
    if trainer.is_world_process_zero():
        saved = trainer.args.output_dir if step == last else checkpoint_to_resume(Path(trainer.args.output_dir))
        on = "The same command goes on from there."
        if trainer.args.save_only_model and step < last:
            on = "It cannot go on from there, because save_only_model keeps no optimizer."
        where = f"the {stage.name} stage stopped at step {step} of {last}, saved in {saved}"
        print(f"{termination.asked.name}: {where}. {on}", file=sys.stderr)
    sys.exit(128 + termination.asked)


def check_batches(arguments: Seq2SeqTrainingArguments, examples: Dataset | IterableDataset, stage: Stage) -> None:
    """
    Raises:
        RunStopped: with `dataloader_drop_last` no batch would be left.
    """
    if isinstance(examples, IterableDataset) or not arguments.dataloader_drop_last:
        return
    batch_size = arguments.train_batch_size * PartialState().num_processes
    if len(examples) < batch_size:
        raise RunStopped(
            f"The {stage.name} stage has {len(examples)} training examples, and a batch of all processes holds "
            f"{batch_size}: with dataloader_drop_last nothing would be trained."
        )


def check_resumable(arguments: Seq2SeqTrainingArguments, checkpoint: str | None) -> None:
    """
    Raises:
        RunStopped: the checkpoint holds no optimizer and no schedule, and a fresh one would train other weights.
    """
    if checkpoint is not None and arguments.save_only_model:
        raise RunStopped(
            f"{checkpoint} was saved with save_only_model, without optimizer and schedule: the training cannot go on "
            f"from it to the same weights. Remove {Path(checkpoint).parent} to train the stage anew."
        )


def saves_adapters(recipe: Recipe) -> bool:
    """Whether the stages are saved as adapters of one base."""
    return recipe.model_config.use_peft and not recipe.arguments.merge_adapters


def starting_model(prepared: Run, stage: Stage) -> MMCoTForConditionalGeneration | PeftModel:
    """The model with which a stage's training starts: its frozen parts frozen, or with a fresh adapter."""
    recipe, arguments = prepared.recipe, prepared.arguments_of(stage)
    previous = None
    if arguments.init_from == "previous_stage":
        previous = prepared.folder.stage(prepared.stages.before(stage)[-1].name)
    model = load_starting_weights(prepared, previous)
    model.generation_config.update(max_new_tokens=arguments.max_target_length, num_beams=arguments.num_beams)
    if not recipe.model_config.use_peft:
        freeze(model, recipe.arguments.freeze_text, recipe.arguments.freeze_fusion)
        return model
    set_seed(recipe.training_arguments.seed)  # the same adapter, however its base was made
    model = adapt(
        model,
        recipe.model_config,
        recipe.arguments.freeze_fusion,
        recipe.arguments.peft_type,
        recipe.arguments.num_virtual_tokens,
    )
    if saves_adapters(recipe) and previous is not None:
        load_adapter_weights(model, previous)
    return model


def load_starting_weights(prepared: Run, previous: Path | None) -> MMCoTForConditionalGeneration:
    """The base that the run's stages adapt, else the weights of the stage before, else the recipe's model."""
    model_config = prepared.recipe.model_config
    loading = {"dtype": model_config.dtype, "attn_implementation": model_config.attn_implementation}
    if saves_adapters(prepared.recipe):
        loading["quantization_config"] = quantization(model_config)
        return load_saved(prepared, prepared.folder.base, **loading)
    if previous is not None:
        return load_saved(prepared, previous, **loading)
    return prepared.initial_model.take()


def load_saved(prepared: Run, folder: Path, **loading: Any) -> MMCoTForConditionalGeneration:
    """A model of the run, from its folder, in place of the initial one: a single model is in memory."""
    prepared.initial_model.discard()
    return MMCoTForConditionalGeneration.from_pretrained(folder, **loading)


def save_trained(trainer: StageTrainer, recipe: Recipe) -> None:
    """Into the stage's folder: a whole model, or its adapter and how to generate with it."""
    if recipe.arguments.merge_adapters:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        trainer.model = merged.to(merged.dtype)  # the fusion was trained in float32
    trainer.save_model()
    if saves_adapters(recipe) and trainer.is_world_process_zero():
        generation_config = trainer.accelerator.unwrap_model(trainer.model).generation_config
        generation_config.save_pretrained(trainer.args.output_dir)


def load_trained(prepared: Run, stage: Stage) -> MMCoTForConditionalGeneration:
    """A finished stage's model, from its folder."""
    folder, device = prepared.folder, prepared.recipe.training_arguments.device
    if not (folder.stage(stage.name) / "adapter_config.json").exists():
        return load_saved(prepared, folder.stage(stage.name)).to(device)
    base = load_saved(prepared, folder.base, dtype="auto").to(device)
    return StageAdapters(base, str(folder), [stage.name])[stage.name]


def training_arguments(
    common: Seq2SeqTrainingArguments, stage: StageArguments, stage_folder: Path
) -> Seq2SeqTrainingArguments:
    arguments = copy.deepcopy(common)
    arguments.output_dir = str(stage_folder)
    run = Path(common.output_dir)
    # Wherever it is told (`report_to`), a run's stages and folds stand under its name.
    arguments.run_name = str(Path(common.run_name or run.name) / stage_folder.relative_to(run))
    arguments.remove_unused_columns = False  # the collator makes tensors from all columns
    arguments.accelerator_config.dispatch_batches = False  # of a stream, which one process would read for all
    for name in ("num_train_epochs", "learning_rate"):
        if getattr(stage, name) is not None:
            setattr(arguments, name, getattr(stage, name))
    return arguments


def by_length(examples: Dataset) -> Dataset:
    """The same examples, neighbours of like lengths, so that batches of a fixed size hold little padding."""
    return examples.select(by_both_lengths(lengths_of(examples)))
