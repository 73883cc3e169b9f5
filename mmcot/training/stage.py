"""Trains a stage's model, resuming from its last complete checkpoint, and writes the stage's column for the splits.

With `share_weights`, the first stage that needs the model trains it for all stages.
"""

import contextlib
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
from mmcot.prediction.columns import columns_after, with_gold_columns
from mmcot.prediction.examples import lengths_of, tokenized
from mmcot.prediction.passages import with_passages
from mmcot.prediction.predictor import log_shortened
from mmcot.problems.known_datasets import known_dataset_name
from mmcot.recipes.arguments import StageArguments
from mmcot.recipes.recipe import Recipe
from mmcot.storage.checkpoints import RunStopped, checkpoint_to_resume
from mmcot.storage.files import write_json
from mmcot.storage.journal import remove_partial_files
from mmcot.storage.run_folder import CROSS_FITTED
from mmcot.training.adapters import adapt, freeze, load_adapter_weights, quantization
from mmcot.training.callbacks import BestCheckpoint, StepSizeCheck, Termination
from mmcot.training.mixed_inputs import MixedCollator, MixedTrainer, join_versions
from mmcot.training.mixture import mix
from mmcot.training.preparation import Run, Training, lock_file
from mmcot.training.progress import SharedReport, ValidationReport, hardware, plot_curves
from mmcot.training.stage_inputs import one_row_per_rationale, with_written_columns
from mmcot.training.stage_outputs import has_written, predict_split, retrieve_split
from mmcot.training.streaming import stream_examples, streamed_pictures
from mmcot.training.trainer import NamedCollator, StageTrainer, load_weights
from modeling_mmcot import MMCoTForConditionalGeneration
from modeling_mmcot.loading_mmcot import StageAdapters, share_model
from modeling_mmcot.stage_mmcot import KINDS, RETRIEVE, Stage, Stages

logger = logging.getLogger(__name__)


def train_and_write(prepared: Run, stage: Stage, splits: set[str], stages: Stages) -> None:
    """
    Train a stage, and write its column for the splits and for the problems that later stages are trained on.

    Args:
        stages: all stages that are trained on these problems, this one included.
    """
    splits = splits | splits_read_later(prepared, stages.after(stage))
    written = [split for split in splits if has_written(prepared, stage, split)]
    for split in written:  # a killed call can have left its journal
        remove_partial_files(prepared.folder.unfinished_predictions(split, stage.name))
    if prepared.folder.is_trained(prepared.training_of(stage).name) and len(written) == len(splits):
        logger.info("stage %s is trained and its columns are written already: %s", stage.name, prepared.folder)
        return
    if stage.kind == RETRIEVE:
        for split in sorted(splits):
            retrieve_split(prepared, stage, split)
        return
    model = train_stage(prepared, stage)
    for split in sorted(splits):
        predict_split(prepared, model, stage, split, lambda name: load_trained(prepared, prepared.stages.named(name)))


def splits_read_later(prepared: Run, later: Stages) -> set[str]:
    """Return the splits for which later stages read written columns during training."""
    inputs = {prepared.arguments_of(stage).inputs_from for stage in later.with_models}
    return ({"val"} if inputs - {"gold"} else set()) | ({"train"} if inputs & {"generated", "mixed"} else set())


def train_stage(prepared: Run, stage: Stage) -> MMCoTForConditionalGeneration:
    """Return the trained model of a stage: loaded from its folder if it is finished, otherwise trained now."""
    training = prepared.training_of(stage)
    if prepared.folder.is_trained(training.name):
        logger.info("%s is trained already: %s", training, prepared.folder.stage(training.name))
        return load_trained(prepared, stage)
    with lock_file(prepared.folder.stage_lock(training.name)) or contextlib.nullcontext():
        model = train(prepared, training)
    if model is None:
        gc.collect()  # so that the base is in memory only once
        return load_trained(prepared, stage)
    return model_of_stage(model, stage)


def model_of_stage(model: MMCoTForConditionalGeneration, stage: Stage) -> MMCoTForConditionalGeneration:
    """Return a trained model with the generation config of a stage."""
    return model if model.config.shared_stages is None else share_model(model, [stage.name])[stage.name]


def train(prepared: Run, training: Training) -> MMCoTForConditionalGeneration | None:
    """
    Train a model from its last checkpoint, and save it. Return it, or None if prediction needs to load it from the
    folder: an adapter of the base, or sharded weights.
    """
    with PartialState().main_process_first():
        by_stage = {
            split: [stage_examples(prepared, stage, split) for stage in training.stages] for split in ("train", "val")
        }
        checkpoint = checkpoint_of(prepared, training)
    seed = prepared.recipe.training_arguments.seed
    examples = {split: mix(training.stages, rows, seed) for split, rows in by_stage.items()}
    shortened = {split: count_shortened(training, rows, f"{split} problems") for split, rows in by_stage.items()}
    check_batches(prepared.recipe.training_arguments, examples["train"], training)
    trainer = build_trainer(prepared, training, examples, checkpoint)
    with Termination() as termination:
        for callback in (termination, StepSizeCheck(), BestCheckpoint()):
            trainer.add_callback(callback)
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if trainer.state.global_step < trainer.state.max_steps:
        exit_after_signal(trainer, training, termination)
    save_trained(trainer, prepared.recipe)
    if trainer.is_world_process_zero():
        write_results(trainer, prepared, training, metrics, shortened)
    PartialState().wait_for_everyone()
    if termination.received_by_any():
        exit_after_signal(trainer, training, termination)
    if saves_adapters(prepared.recipe) or is_sharded(trainer):
        return None
    # The same as a loaded model: without the wrapper for training in bfloat16.
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def count_shortened(training: Training, examples: list[Dataset | IterableDataset], which: str) -> dict[str, int] | None:
    """Apply `log_shortened` to the examples of each stage, and add up the numbers."""
    counts = [log_shortened(stage, rows, which) for stage, rows in zip(training.stages, examples, strict=True)]
    if counts[0] is None:
        return None
    return {name: sum(stage_counts[name] for stage_counts in counts) for name in counts[0]}


def checkpoint_of(prepared: Run, training: Training) -> str | None:
    """Return the newest checkpoint of a training, from which it resumes; None if there is none."""
    arguments = prepared.recipe.arguments
    checkpoint = checkpoint_to_resume(prepared.folder.stage(training.name), arguments.pass_over_damaged_checkpoints)
    check_resumable(prepared.recipe.training_arguments, checkpoint)
    return checkpoint


def build_trainer(
    prepared: Run, training: Training, examples: dict[str, Dataset | IterableDataset], checkpoint: str | None
) -> StageTrainer:
    recipe, processor, folder = prepared.recipe, prepared.processor, prepared.folder.stage(training.name)
    # A collator adds pictures if its stage reads them; the examples of other stages in a mixture have none.
    stage = next((stage for stage in training.stages if stage.sees_pictures), training.stages[0])
    pictures = prepared.pictures
    if recipe.arguments.streaming:
        pictures = streamed_pictures(processor, prepared.problems["val"])
    model = starting_model(prepared, training)
    if checkpoint is not None and not recipe.model_config.use_peft:  # the Trainer loads an adapter's weights itself
        load_weights(model, checkpoint)
    trainer_class, collator_class = StageTrainer, NamedCollator
    if prepared.arguments_of(stage).inputs_from == "mixed":
        trainer_class, collator_class = MixedTrainer, MixedCollator
    trainer = trainer_class(
        model=model,
        args=training_arguments(recipe.training_arguments, prepared.arguments_of(stage), folder),
        train_dataset=examples["train"],
        eval_dataset=sort_by_length(examples["val"]),
        data_collator=collator_class(processor, stage, pictures),
        processing_class=processor,
    )
    if recipe.arguments.report_problems and prepared.folder.fold_of is None:
        if is_sharded(trainer):
            raise RunStopped("report_problems generates texts during training, which sharded weights do not support.")
        trainer.validation_report = build_validation_report(prepared, training)
    return trainer


def is_sharded(trainer: StageTrainer) -> bool:
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def write_results(
    trainer: StageTrainer,
    prepared: Run,
    training: Training,
    metrics: dict[str, float],
    shortened: dict[str, dict[str, int] | None],
) -> None:
    """Write `train_results.json`, which marks a training as finished, and `curves.png`."""
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
    plot_curves(history, prepared.folder.curves(training.name))
    write_json(prepared.folder.train_results(training.name), results)


def stage_examples(prepared: Run, stage: Stage, split: str) -> Dataset | IterableDataset:
    """Return the tokenized problems of a split, for training or for evaluation during training."""
    problems, processor = prepared.problems[split], prepared.processor
    if isinstance(problems, IterableDataset):
        return stream_examples(
            problems, stage, processor, prepared.stages.before(stage), prepared.recipe.training_arguments.seed
        )
    versions = [training_problems(prepared, stage, split)]
    if split == "train" and prepared.arguments_of(stage).inputs_from == "mixed":
        earlier = prepared.stages.before(stage)
        versions.append(with_written_columns(versions[0], earlier, prepared.folder, split))
    examples = [tokenized(rows, stage, processor, with_targets=True) for rows in with_target(versions, stage, split)]
    return join_versions(*examples) if len(examples) > 1 else examples[0]


def with_target(versions: list[Dataset], stage: Stage, split: str) -> list[Dataset]:
    """
    Return the problems for which the stage has a target, in each version of the problems; an empty target would teach
    the stage to write nothing.
    """
    num_problems = len(versions[0])
    targets = [[stage.render_target(row) for row in rows.remove_columns("images")] for rows in versions]
    kept = [index for index, texts in enumerate(zip(*targets, strict=True)) if all(texts)]
    if not kept:
        raise RunStopped(f"The {stage.name} stage has no target: it is empty for all {num_problems} {split} problems.")
    if KINDS[stage.kind].sends_back is not None:
        log_verdicts(stage, targets[-1], split)
    if len(kept) < num_problems and PartialState().is_main_process:
        logger.warning(
            f"{stage.name} stage: {num_problems - len(kept)} of {num_problems} {split} problems have an empty target "
            f"and are left out of its training"
        )
    return versions if len(kept) == num_problems else [rows.select(kept) for rows in versions]


def log_verdicts(stage: Stage, targets: list[str], split: str) -> None:
    """Log how many targets send a problem back; with a single kind of target, the stage would learn nothing."""
    sends_back = KINDS[stage.kind].sends_back
    count = targets.count(sends_back)
    if PartialState().is_main_process:
        logger.log(
            logging.INFO if 0 < count < len(targets) else logging.WARNING,
            f"{stage.name} stage: the target of {count} of {len(targets)} {split} problems is {sends_back!r}",
        )


def build_validation_report(prepared: Run, training: Training) -> ValidationReport | SharedReport:
    """Build the report of a training."""
    folder = prepared.folder.reports(training.name)
    if prepared.recipe.arguments.share_weights:
        return SharedReport(
            {stage.name: build_stage_report(prepared, stage, folder / stage.name) for stage in training.stages}
        )
    return build_stage_report(prepared, training.stages[0], folder)


def build_stage_report(prepared: Run, stage: Stage, folder: Path) -> ValidationReport:
    """Build the report of a stage on a random sample of validation problems, the same in each run."""
    problems = prepared.problems["val"]
    count = min(prepared.recipe.arguments.report_problems, len(problems))
    chosen = random.Random(0).sample(range(len(problems)), count)
    return ValidationReport(
        prepared.processor,
        stage,
        problems.select(sorted(chosen)),
        columns_after(prepared.folder.predictions_so_far("val"), prepared.stages.before(stage)),
        prepared.pictures,
        folder,
        prepared.recipe.training_arguments.per_device_eval_batch_size,
    )


def training_problems(prepared: Run, stage: Stage, split: str) -> Dataset:
    """
    Return the problems with the columns of earlier stages that this stage reads during training and evaluation; with
    mixed inputs, the gold columns for training.
    """
    problems, earlier = prepared.problems[split], prepared.stages.before(stage)
    inputs_from = prepared.arguments_of(stage).inputs_from
    if inputs_from == "gold" or (inputs_from == "mixed" and split == "train"):
        rows = one_row_per_rationale(problems, [*earlier.with_models, stage])
        needed = set(stage.reads)
        for other in reversed(earlier.retrieving):
            needed |= set(other.reads) if other.writes in needed else set()
        for other in earlier:
            if other.has_model:
                rows = with_gold_columns(rows, [other])
            elif other.writes in needed:
                rows = with_passages(rows, prepared.processor, other)
        return rows
    if inputs_from == "cross_fit" and split == "train":
        problems = with_written_columns(problems, earlier, prepared.folder.run, CROSS_FITTED)
    else:
        problems = with_written_columns(problems, earlier, prepared.folder, split)
    return one_row_per_rationale(problems, [stage])


def exit_after_signal(trainer: StageTrainer, training: Training, termination: Termination) -> None:
    """
    Exit after a signal, with the status 128 plus the signal's number.

    Raises:
        RunStopped: the training ended early without a signal. With a signal's status, a scheduler would restart the
            run forever.
    """
    step, last = trainer.state.global_step, trainer.state.max_steps
    if not termination.received_by_any():
        raise RunStopped(f"The {training} ended at step {step} of {last}, though no signal was received.")
    if trainer.is_world_process_zero():
        saved = trainer.args.output_dir if step == last else checkpoint_to_resume(Path(trainer.args.output_dir))
        how_to_resume = "The same command resumes from it."
        if trainer.args.save_only_model and step < last:
            how_to_resume = "It cannot be resumed, because save_only_model saves no optimizer."
        state = f"the {training} stopped at step {step} of {last}, saved in {saved}"
        print(f"{termination.received.name}: {state}. {how_to_resume}", file=sys.stderr)
    sys.exit(128 + termination.received)


def check_batches(arguments: Seq2SeqTrainingArguments, examples: Dataset | IterableDataset, training: Training) -> None:
    """
    Check that a training has a full batch.

    Raises:
        RunStopped: `dataloader_drop_last` would drop the only batch.
    """
    if isinstance(examples, IterableDataset) or not arguments.dataloader_drop_last:
        return
    batch_size = arguments.train_batch_size * PartialState().num_processes
    if len(examples) < batch_size:
        raise RunStopped(
            f"The {training} has {len(examples)} training examples, but a batch over all processes has "
            f"{batch_size}: with dataloader_drop_last nothing would be trained."
        )


def check_resumable(arguments: Seq2SeqTrainingArguments, checkpoint: str | None) -> None:
    """
    Check that training can resume from a checkpoint.

    Raises:
        RunStopped: the checkpoint has no optimizer and no schedule; new ones would lead to other weights.
    """
    if checkpoint is not None and arguments.save_only_model:
        raise RunStopped(
            f"{checkpoint} was saved with save_only_model, without optimizer and schedule: a training resumed from "
            f"it would reach other weights. Remove {Path(checkpoint).parent} to train the stage again."
        )


def saves_adapters(recipe: Recipe) -> bool:
    """Whether the stages are saved as adapters of one base."""
    return recipe.model_config.use_peft and not recipe.arguments.merge_adapters


def starting_model(prepared: Run, training: Training) -> MMCoTForConditionalGeneration | PeftModel:
    """Return the model that a training starts from, with frozen parts or with a new adapter."""
    recipe, stages = prepared.recipe, training.stages
    previous = None
    if prepared.arguments_of(stages[0]).init_from == "previous_stage":
        previous = prepared.folder.stage(prepared.stages.before(stages[0]).with_models[-1].name)
    model = load_starting_weights(prepared, previous)
    root = stages[0]
    if recipe.arguments.share_weights:
        model.config.shared_stages = {stage.name: generation_settings(prepared, stage) for stage in stages}
        root = prepared.stages.answering  # as always, the root of a repository generates like the stage that answers
    model.generation_config.update(**generation_settings(prepared, root))
    if not recipe.model_config.use_peft:
        freeze(model, recipe.arguments.freeze_text, recipe.arguments.freeze_fusion)
        return model
    set_seed(recipe.training_arguments.seed)  # so that the adapter does not depend on how its base was built
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


def generation_settings(prepared: Run, stage: Stage) -> dict[str, int]:
    """Return the settings of `generate` that a recipe gives a stage."""
    arguments = prepared.arguments_of(stage)
    return {"max_new_tokens": arguments.max_target_length, "num_beams": arguments.num_beams}


def load_starting_weights(prepared: Run, previous: Path | None) -> MMCoTForConditionalGeneration:
    """Load the base that the run's stages adapt, or the previous stage's model, or the recipe's model."""
    model_config = prepared.recipe.model_config
    load_options = {"dtype": model_config.dtype, "attn_implementation": model_config.attn_implementation}
    if saves_adapters(prepared.recipe):
        load_options["quantization_config"] = quantization(model_config)
        return load_saved(prepared, prepared.folder.base, **load_options)
    if previous is not None:
        return load_saved(prepared, previous, **load_options)
    return prepared.initial_model.take()


def load_saved(prepared: Run, folder: Path, **load_options: Any) -> MMCoTForConditionalGeneration:
    """Load a model of the run, after discarding the initial model, so that only one model is in memory."""
    prepared.initial_model.discard()
    return MMCoTForConditionalGeneration.from_pretrained(folder, **load_options)


def save_trained(trainer: StageTrainer, recipe: Recipe) -> None:
    """Save a full model, or its adapter and generation config, into the stage's folder."""
    if recipe.arguments.merge_adapters:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        trainer.model = merged.to(merged.dtype)  # the fusion was trained in float32
    trainer.save_model()
    if saves_adapters(recipe) and trainer.is_world_process_zero():
        generation_config = trainer.accelerator.unwrap_model(trainer.model).generation_config
        generation_config.save_pretrained(trainer.args.output_dir)


def load_trained(prepared: Run, stage: Stage) -> MMCoTForConditionalGeneration:
    """Load a finished stage's model from its folder."""
    folder, device = prepared.folder, prepared.recipe.training_arguments.device
    trained = folder.stage(prepared.training_of(stage).name)
    if not (trained / "adapter_config.json").exists():
        return model_of_stage(load_saved(prepared, trained).to(device), stage)
    base = load_saved(prepared, folder.base, dtype="auto").to(device)
    return StageAdapters(base, str(folder), [stage.name])[stage.name]


def training_arguments(
    common: Seq2SeqTrainingArguments, stage: StageArguments, stage_folder: Path
) -> Seq2SeqTrainingArguments:
    arguments = copy.deepcopy(common)
    arguments.output_dir = str(stage_folder)
    run = Path(common.output_dir)
    # In trackers (`report_to`), stages and folds are grouped under the run's name.
    arguments.run_name = str(Path(common.run_name or run.name) / stage_folder.relative_to(run))
    arguments.remove_unused_columns = False  # the collator uses all columns
    arguments.accelerator_config.dispatch_batches = False  # else one process would read a stream for all
    for name in ("num_train_epochs", "learning_rate"):
        if getattr(stage, name) is not None:
            setattr(arguments, name, getattr(stage, name))
    return arguments


def sort_by_length(examples: Dataset) -> Dataset:
    """Sort the examples by length, so that batches of a fixed size contain little padding."""
    return examples.select(by_both_lengths(lengths_of(examples)))
