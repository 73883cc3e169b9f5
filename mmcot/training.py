"""A recipe -> a trained, scored and exported system, with the HF Trainer.

For each stage in order: train it on gold, then let it write its column for val and test, free-running. Then score and
export. The same call again goes on where an interrupted one stopped: finished stages are kept, an unfinished one
resumes from its last whole checkpoint. Nothing here knows how a recipe is written (`recipes.py`) or what a stage does
with a batch (`pipeline_mmcot.py`).
"""

import copy
import gc
import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from jinja2 import meta
from transformers import Seq2SeqTrainingArguments, set_seed

from mmcot.adapters import adapt, check_adapters, quantization, save_base
from mmcot.batching import by_both_lengths
from mmcot.building import build_model, build_processor, build_stage, check_tower_name, is_frozen, linear_layers
from mmcot.checkpoints import RunStopped, checkpoint_to_resume
from mmcot.evaluate import format_table
from mmcot.examples import lengths_of, tokenized
from mmcot.feature_store import FeatureStore
from mmcot.features import vision_source
from mmcot.files import read_json, write_json
from mmcot.hub import BASE, export
from mmcot.metrics import score
from mmcot.pictures import PixelStore
from mmcot.predict import log_shortened, predict_stage
from mmcot.problems import (
    SPLITS,
    join_captions,
    join_column,
    load_problems,
    require_answers,
    with_column,
)
from mmcot.recipes import Recipe, StageArguments, claim_run_folder, parse_recipe
from mmcot.trainer import NamedCollator, SameSteps, StageTrainer, Termination, load_weights
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.processing_mmcot import ENVIRONMENT, GOLD_COLUMNS, LETTERS, Stage
from modeling_mmcot.stages_mmcot import StageAdapters

logger = logging.getLogger(__name__)

FINISHED = "train_results.json"  # written last in a stage's folder: the stage is trained


@dataclass
class Run:
    """A recipe with its data found good and its folder taken: what is left to do is the work."""

    recipe: Recipe
    stages: list[Stage]
    problems: dict[str, Dataset]  # by split
    folder: Path
    processor: MMCoTProcessor
    store: FeatureStore | None  # features of the problems' pictures that the recipe names
    pictures: FeatureStore | PixelStore | None  # where batches take their pictures from


def prepare(recipe: Recipe) -> Run:
    """All that can be wrong with recipe and data is a `ValueError` here, before anything is trained or written."""
    stages = [build_stage(arguments) for arguments in recipe.stages]
    check_tower_name(recipe)
    if recipe.model_config.use_peft:
        check_adapters(recipe.model_config, linear_layers(recipe))
    store = FeatureStore(recipe.arguments.features) if recipe.arguments.features is not None else None
    problems = {split: prepare_problems(recipe, stages, split, store) for split in SPLITS}
    processor = build_processor(recipe, stages, problems["train"])
    if store is not None:
        model = build_model(recipe, processor.tokenizer, store)
        store.check_model(model, processor.image_processor)
    elif processor.image_processor is None and any("images" in stage.reads for stage in stages):
        raise ValueError(
            f"A stage reads `images`, but {recipe.model_config.model_name_or_path} has no picture tower: name one "
            f"(vision_model_name_or_path), or features."
        )
    pictures = store or prepare_pictures(recipe, stages, processor, problems)
    with PartialState().main_process_first():
        folder = claim_run_folder(recipe)
    return Run(recipe, stages, problems, folder, processor, store, pictures)


def run(prepared: Run) -> None:
    """Train, predict, score and export, into the run's folder."""
    recipe, stages, problems, folder = prepared.recipe, prepared.stages, prepared.problems, prepared.folder
    processor = prepared.processor
    predictions = {split: read_predictions(folder, split) for split in ("val", "test")}
    if saves_adapters(recipe):
        with PartialState().main_process_first():
            prepare_base(prepared)
    for stage, arguments in zip(stages, recipe.stages, strict=True):
        model = train_stage(prepared, arguments, stage)
        for split, columns in predictions.items():
            predict_split(prepared, model, stage, split, columns)
        del model  # before the next one is loaded
    if PartialState().is_main_process:
        for split, columns in predictions.items():
            write_json(folder / "scores" / f"{split}.json", score(problems[split], columns))
        export(folder, processor)
    PartialState().wait_for_everyone()


def prepare_pictures(
    recipe: Recipe, stages: list[Stage], processor: MMCoTProcessor, problems: dict[str, Dataset]
) -> FeatureStore | PixelStore | None:
    """Every picture decoded once, before anything is trained; of a tower that is not trained its features."""
    every = concatenate_datasets(list(problems.values()))
    if processor.image_processor is None or not any("images" in stage.reads for stage in stages):
        return None
    if not is_frozen(recipe):
        return PixelStore(every, processor.image_processor)
    model = build_model(recipe, processor.tokenizer, None).to(recipe.training_arguments.device)
    return vision_source(model, processor.image_processor, every)


def prepare_problems(recipe: Recipe, stages: list[Stage], split: str, store: FeatureStore | None) -> Dataset:
    """A split's problems, checked, so that no run dies of bad data half-way."""
    source = recipe.arguments.dataset
    needs_files = store is None or store.needs_files
    with PartialState().main_process_first():
        problems = load_problems(source, split, recipe.arguments.max_images, needs_files)
    if len(problems) == 0:
        raise ValueError(f"{source}: split {split!r} has no problems.")
    require_answers(problems)
    if recipe.arguments.captions is not None:
        problems = join_captions(problems, recipe.arguments.captions)
    if store is not None and any("images" in stage.reads for stage in stages):
        store.check_problems(problems)
    if split == "train":
        if recipe.arguments.target_column is not None:
            problems = join_target_column(problems, recipe.arguments.target_column, stages)
        for stage in stages:
            check_targets(problems, stage, source)
    return problems


def join_target_column(problems: Dataset, target_column: str, stages: list[Stage]) -> Dataset:
    column, separator, path = target_column.partition("=")
    written = [stage.writes for stage in stages]
    if not separator or column not in written:
        raise ValueError(
            f"--target_column is {target_column!r}; expected COLUMN=FILE.json with a COLUMN that a stage writes: "
            f"{', '.join(written)}."
        )
    return join_column(problems, column, path)


def check_targets(problems: Dataset, stage: Stage, source: str) -> None:
    """A stage whose gold is empty for every problem would learn to write nothing."""
    if stage.writes in problems.column_names:
        return
    names = meta.find_undeclared_variables(ENVIRONMENT.parse(stage.target))
    gold = sorted(names & set(GOLD_COLUMNS))
    if gold and "answer" not in gold and not any(any(problems[name]) for name in gold):
        raise ValueError(
            f"{source}: stage {stage.name!r} learns to write {stage.writes!r} from {', '.join(gold)}, which is empty "
            f"for all {len(problems)} training problems. Ways out: a recipe with one stage "
            f"(configs/demo_one_stage.yaml), or texts of your own joined by problem id "
            f"(--target_column {stage.writes}=FILE.json)."
        )


def train_stage(prepared: Run, arguments: StageArguments, stage: Stage) -> MMCoTForConditionalGeneration:
    """The trained model of a stage: from its folder where it is finished, else trained from where it stands."""
    recipe, processor, stage_folder = prepared.recipe, prepared.processor, prepared.folder / stage.name
    if (stage_folder / FINISHED).exists():
        logger.info("stage %s is trained already: %s", stage.name, stage_folder)
        return load_trained(prepared, stage)
    earlier = processor.stages[: processor.stages.index(stage)]
    examples = {}
    with PartialState().main_process_first():
        for split in ("train", "val"):
            rows = with_gold_columns(prepared.problems[split], earlier)
            examples[split] = tokenized(rows, stage, processor, with_targets=True)
        checkpoint = checkpoint_to_resume(stage_folder, recipe.arguments.pass_over_damaged_checkpoints)
    for split, rows in examples.items():
        log_shortened(stage, sum(rows["is_shortened"]), len(rows), f"{split} problems")
    model = starting_model(prepared, arguments)
    if recipe.model_config.use_peft:
        set_seed(recipe.training_arguments.seed)  # the same adapter, however its base was made
        model = adapt(model, recipe.model_config)  # the Trainer resumes it
    elif checkpoint is not None:
        load_weights(model, checkpoint)
    trainer = StageTrainer(
        model=model,
        args=training_arguments(recipe.training_arguments, arguments, stage_folder),
        train_dataset=examples["train"],
        eval_dataset=by_length(examples["val"]),
        data_collator=NamedCollator(processor, stage, prepared.pictures),
        processing_class=processor,
    )
    with Termination() as termination:
        trainer.add_callback(termination)
        trainer.add_callback(SameSteps())
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < trainer.state.max_steps:
        stop_in_order(trainer, stage)
    save_trained(trainer, recipe, stage_folder)
    if trainer.is_world_process_zero():
        losses = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        summary = {**result.metrics, "world_size": trainer.accelerator.num_processes, "log_history": losses}
        write_json(stage_folder / FINISHED, summary)
    PartialState().wait_for_everyone()
    if termination.is_asked_of_any():
        stop_in_order(trainer, stage)
    is_whole = not (saves_adapters(recipe) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    if is_whole:
        return trainer.accelerator.unwrap_model(trainer.model)
    del model, trainer
    gc.collect()  # a base is in memory once
    return load_trained(prepared, stage)


def stop_in_order(trainer: StageTrainer, stage: Stage) -> None:
    step, last = trainer.state.global_step, trainer.state.max_steps
    if trainer.is_world_process_zero():
        saved = trainer.args.output_dir if step == last else checkpoint_to_resume(Path(trainer.args.output_dir))
        print(
            f"SIGTERM: the {stage.name} stage stopped at step {step} of {last}, saved in {saved}. The same command "
            f"goes on from there.",
            file=sys.stderr,
        )
    sys.exit(128 + signal.SIGTERM)


def saves_adapters(recipe: Recipe) -> bool:
    """Whether the stages are saved as adapters of one base."""
    return recipe.model_config.use_peft and not recipe.arguments.merge_adapters


def prepare_base(prepared: Run) -> None:
    """The base that all stages adapt, into the run's folder."""
    if not (prepared.folder / BASE).exists():
        model = build_model(prepared.recipe, prepared.processor.tokenizer, prepared.store)
        save_base(model, prepared.folder / BASE, [stage.name for stage in prepared.stages])


def starting_model(prepared: Run, arguments: StageArguments) -> MMCoTForConditionalGeneration:
    """What a stage's training starts from: the base of the run, where it has one, else a model built anew."""
    recipe = prepared.recipe
    if saves_adapters(recipe):
        model = MMCoTForConditionalGeneration.from_pretrained(
            prepared.folder / BASE,
            dtype=recipe.model_config.dtype,
            attn_implementation=recipe.model_config.attn_implementation,
            quantization_config=quantization(recipe.model_config),
        )
    else:
        model = build_model(recipe, prepared.processor.tokenizer, prepared.store)
    model.generation_config.update(max_new_tokens=arguments.max_target_length, num_beams=arguments.num_beams)
    return model


def save_trained(trainer: StageTrainer, recipe: Recipe, stage_folder: Path) -> None:
    """Into the stage's folder: a whole model, or its adapter and how to generate with it."""
    if recipe.arguments.merge_adapters:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        trainer.model = merged.to(merged.dtype)  # the fusion was trained in float32
    trainer.save_model()
    if saves_adapters(recipe) and trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).generation_config.save_pretrained(stage_folder)


def load_trained(prepared: Run, stage: Stage) -> MMCoTForConditionalGeneration:
    """A finished stage's model, from its folder."""
    folder, device = prepared.folder, prepared.recipe.training_arguments.device
    if not (folder / stage.name / "adapter_config.json").exists():
        return MMCoTForConditionalGeneration.from_pretrained(folder / stage.name).to(device)
    base = MMCoTForConditionalGeneration.from_pretrained(folder / BASE, dtype="auto").to(device)
    return StageAdapters(base, str(folder), [stage.name])[stage.name]


def training_arguments(
    common: Seq2SeqTrainingArguments, stage: StageArguments, stage_folder: Path
) -> Seq2SeqTrainingArguments:
    arguments = copy.deepcopy(common)
    arguments.output_dir = str(stage_folder)
    arguments.remove_unused_columns = False  # the collator makes tensors from all columns
    for name in ("num_train_epochs", "learning_rate"):
        if getattr(stage, name) is not None:
            setattr(arguments, name, getattr(stage, name))
    return arguments


def with_gold_columns(problems: Dataset, earlier: list[Stage]) -> Dataset:
    """The columns that earlier stages would have written, rendered from gold: what a later stage is trained on."""
    for stage in earlier:
        texts = [stage.render_target(row) for row in problems.remove_columns("images")]
        problems = with_column(problems, stage.writes, texts)
    return problems


def by_length(examples: Dataset) -> Dataset:
    """The same examples, neighbours of like lengths, so that batches of a fixed size hold little padding."""
    return examples.select(by_both_lengths(lengths_of(examples)))


def read_predictions(folder: Path, split: str) -> dict[str, dict]:
    file = folder / "predictions" / f"{split}.json"
    return read_json(file) if file.exists() else {}


def predict_split(
    prepared: Run, model: MMCoTForConditionalGeneration, stage: Stage, split: str, predictions: dict[str, dict]
) -> None:
    """The stage's column for a split, into `predictions` and the predictions file, unless it is there."""
    recipe, problems = prepared.recipe, prepared.problems[split]
    if all(stage.writes in predictions.get(problem_id, {}) for problem_id in problems["id"]):
        return
    predict_stage(
        model,
        prepared.processor,
        stage,
        problems,
        predictions,
        batch_size=recipe.training_arguments.per_device_eval_batch_size,
        decode_answer=recipe.arguments.decode_answer,
        pictures=prepared.pictures,
        num_workers=recipe.training_arguments.dataloader_num_workers,
    )
    if PartialState().is_main_process:
        write_json(prepared.folder / "predictions" / f"{split}.json", predictions)


def describe_result(folder: Path, problems: Dataset) -> str:
    """What a run ends with: the score table, where everything lies, and one answered problem."""
    predictions = read_json(folder / "predictions" / "test.json")
    problem = next((row for row in problems if row["images"]), problems[0])
    columns = predictions[problem["id"]]
    choices = "\n".join(
        f"  ({letter}) {choice}  {100 * probability:.1f} %"
        for letter, choice, probability in zip(LETTERS, problem["choices"], columns["scores"], strict=False)
    )
    rationale = f"  {columns['rationale']}\n" if "rationale" in columns else ""
    return (
        f"{format_table(read_json(folder / 'scores' / 'test.json'))}\n\n"
        f"One test problem, answered ({problem['id']}, gold: {problem['choices'][problem['answer']]}):\n"
        f"  {problem['question']}\n{rationale}{choices}\n\nRun folder: {folder}"
    )


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("mmcot").setLevel(logging.INFO)
    try:
        prepared = prepare(parse_recipe(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        run(prepared)
    except (RunStopped, OSError) as error:
        sys.exit(f"error: {error}")
    if PartialState().is_main_process:
        print(describe_result(prepared.folder, prepared.problems["test"]))


if __name__ == "__main__":
    main()
