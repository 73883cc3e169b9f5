"""A recipe -> a trained, scored and exported system, with the HF Trainer.

For each stage in order: train it on gold, then let it write its column for val and test, free-running. Then score and
export. The same call again goes on where an interrupted one stopped: finished stages are kept, an unfinished one
resumes from its last whole checkpoint. Nothing here knows how a recipe is written (`recipes.py`) or what a stage does
with a batch (`pipeline_mmcot.py`).
"""

import copy
import json
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from jinja2 import meta
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.trainer_callback import TrainerState
from trl import ModelConfig

from mmcot.batching import by_both_lengths
from mmcot.evaluate import format_table
from mmcot.examples import StageCollator, lengths_of, tokenized
from mmcot.feature_store import FeatureStore
from mmcot.features import load_image_processor, vision_source
from mmcot.files import read_json, write_json
from mmcot.hub import export
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
from mmcot.trainer import StageTrainer
from modeling_mmcot import MMCoTConfig, MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.pictures_mmcot import build_image_processor
from modeling_mmcot.processing_mmcot import (
    ENVIRONMENT,
    GOLD_COLUMNS,
    LETTERS,
    PAPER_TEMPLATES,
    Stage,
)
from modeling_mmcot.vision_mmcot import find_tower, load_vision_tower, tower_config, tower_name, tower_width

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
    store = FeatureStore(recipe.arguments.features) if recipe.arguments.features is not None else None
    problems = {split: prepare_problems(recipe, stages, split, store) for split in SPLITS}
    processor = build_processor(recipe, stages, problems["train"])
    if store is not None:
        model = build_model(recipe, recipe.stages[0], processor.tokenizer, store)
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
    for stage, arguments in zip(stages, recipe.stages, strict=True):
        model = train_stage(prepared, arguments, stage)
        for split, columns in predictions.items():
            predict_split(prepared, model, stage, split, columns)
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
    model = build_model(recipe, recipe.stages[0], processor.tokenizer, None).to(recipe.training_arguments.device)
    return vision_source(model, processor.image_processor, every)


def is_frozen(recipe: Recipe) -> bool:
    """Whether the picture tower is left as it is."""
    if recipe.arguments.freeze_vision is not None:
        return recipe.arguments.freeze_vision
    own = own_config(recipe.model_config)
    return own is not None and own.freeze_vision


def build_stage(arguments: StageArguments) -> Stage:
    if arguments.template is not None and arguments.template not in PAPER_TEMPLATES:
        raise ValueError(
            f"stage {arguments.name!r}: template is {arguments.template!r}; known: {', '.join(PAPER_TEMPLATES)}."
        )
    templates = PAPER_TEMPLATES.get(arguments.template, {})
    return Stage(
        name=arguments.name,
        reads=arguments.reads,
        writes=arguments.writes,
        source=arguments.source or templates["source"],
        target=arguments.target or templates["target"],
        max_source_length=arguments.max_source_length,
        max_target_length=arguments.max_target_length,
    )


def check_tower_name(recipe: Recipe) -> None:
    """`vision_tower` is a name that there is, and goes with the tower that the recipe describes."""
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


def build_processor(recipe: Recipe, stages: list[Stage], train_problems: Dataset) -> MMCoTProcessor:
    arguments, model_config = recipe.arguments, recipe.model_config
    if arguments.tokenizer_vocab_size is not None:
        tokenizer = train_tokenizer(train_problems, stages, arguments.tokenizer_vocab_size)
    else:
        name = arguments.tokenizer_name_or_path or model_config.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(name)
    image_processor = None
    if arguments.image_processor is not None:
        image_processor = build_image_processor(arguments.image_processor)
    elif arguments.vision_model_name_or_path is not None:
        image_processor = load_image_processor(arguments.vision_model_name_or_path, arguments.vision_preprocessing)
    elif own_config(model_config) is not None:
        image_processor = MMCoTProcessor.from_pretrained(model_config.model_name_or_path).image_processor
    return MMCoTProcessor(tokenizer, image_processor, stages)


def own_config(model_config: ModelConfig) -> MMCoTConfig | None:
    """The configuration of the checkpoint to start from, where it is a model of this package and not a plain T5."""
    if model_config.model_name_or_path is None:
        return None
    config = AutoConfig.from_pretrained(model_config.model_name_or_path, revision=model_config.model_revision)
    return config if isinstance(config, MMCoTConfig) else None


def train_tokenizer(problems: Dataset, stages: list[Stage], vocab_size: int) -> PreTrainedTokenizerBase:
    """A small tokenizer with T5's special tokens, trained on the sources and targets of the training problems."""
    rows = problems.remove_columns("images").to_list()

    def texts():
        for row in rows:
            for stage in stages:
                row = {**row, stage.writes: stage.render_target(row)}
                yield stage.render_source(row)
                yield row[stage.writes]

    # Byte pairs within words, so that in a small vocabulary most words are one piece.
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


def build_model(
    recipe: Recipe, stage: StageArguments, tokenizer: PreTrainedTokenizerBase, store: FeatureStore | None
) -> MMCoTForConditionalGeneration:
    """The model that every stage starts from, the same for each."""
    arguments, model_config = recipe.arguments, recipe.model_config
    set_seed(recipe.training_arguments.seed)
    tower = None
    fields = {"max_images": arguments.max_images}
    for name in ("fusion", "freeze_vision"):
        if getattr(arguments, name) is not None:
            fields[name] = getattr(arguments, name)
    if arguments.vision_model_name_or_path is not None:
        tower = load_vision_tower(arguments.vision_model_name_or_path)
    own = own_config(model_config)
    if own is None or own.vision_hidden_size is None:
        # A model that has a width of its own keeps it, to be held against the tower or the store.
        if tower is not None:
            fields["vision_hidden_size"] = tower_width(tower)
        elif store is not None:
            fields["vision_hidden_size"] = store.hidden_size
            fields["num_vision_tokens"] = store.num_patches
            fields["vision_tower"] = tower_name(store.manifest["vision_tower"])
    if model_config.model_name_or_path is None:
        config = MMCoTConfig(
            vocab_size=len(tokenizer),
            decoder_start_token_id=tokenizer.pad_token_id,
            vision_config=arguments.vision_config,
            **{"vision_tower": arguments.vision_tower, **fields},
            **(arguments.text_config or {}),
        )
        model = MMCoTForConditionalGeneration(config)
    else:
        model = MMCoTForConditionalGeneration.from_pretrained(
            model_config.model_name_or_path,
            revision=model_config.model_revision,
            dtype=model_config.dtype,
            attn_implementation=model_config.attn_implementation,
            **fields,
        )
    if tower is not None:
        model.attach_tower(tower, tower_name(arguments.vision_model_name_or_path, arguments.vision_tower))
    model.generation_config.update(max_new_tokens=stage.max_target_length, num_beams=stage.num_beams)
    return model


def train_stage(prepared: Run, arguments: StageArguments, stage: Stage) -> MMCoTForConditionalGeneration:
    """The trained model of a stage: from its folder where it is finished, else trained from where it stands."""
    recipe, processor, stage_folder = prepared.recipe, prepared.processor, prepared.folder / stage.name
    if (stage_folder / FINISHED).exists():
        logger.info("stage %s is trained already: %s", stage.name, stage_folder)
        return MMCoTForConditionalGeneration.from_pretrained(stage_folder).to(recipe.training_arguments.device)
    earlier = processor.stages[: processor.stages.index(stage)]
    examples = {}
    with PartialState().main_process_first():
        for split in ("train", "val"):
            rows = with_gold_columns(prepared.problems[split], earlier)
            examples[split] = tokenized(rows, stage, processor, with_targets=True)
        checkpoint = last_whole_checkpoint(stage_folder)
    for split, rows in examples.items():
        log_shortened(stage, sum(rows["is_shortened"]), len(rows), f"{split} problems")
    model = build_model(recipe, arguments, processor.tokenizer, prepared.store)
    if checkpoint is not None:
        # The Trainer resumes by parameter names, and a ViT is saved under older names than it has in memory: its
        # weights would silently stay fresh. `from_pretrained` knows both. Copied, because a run
        # that went on with its tensors themselves differed from the uninterrupted one in last bits.
        saved = MMCoTForConditionalGeneration.from_pretrained(checkpoint, dtype=recipe.model_config.dtype)
        model.load_state_dict(saved.state_dict())
    trainer = StageTrainer(
        model=model,
        args=training_arguments(recipe.training_arguments, arguments, stage_folder),
        train_dataset=examples["train"],
        eval_dataset=by_length(examples["val"]),
        data_collator=StageCollator(processor, stage, prepared.pictures),
        processing_class=processor,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        losses = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        summary = {**result.metrics, "world_size": trainer.accelerator.num_processes, "log_history": losses}
        write_json(stage_folder / FINISHED, summary)
    PartialState().wait_for_everyone()
    return trainer.accelerator.unwrap_model(trainer.model)


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


def last_whole_checkpoint(stage_folder: Path) -> str | None:
    """
    The newest checkpoint that was written to its end. The Trainer writes `trainer_state.json` last; a checkpoint
    without a readable one was cut off and is removed.
    """
    checkpoints = sorted(stage_folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in reversed(checkpoints):
        try:
            TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            return str(checkpoint)
        except (OSError, json.JSONDecodeError):
            logger.warning("%s was not written to its end and is removed", checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None


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
    run(prepared)
    if PartialState().is_main_process:
        print(describe_result(prepared.folder, prepared.problems["test"]))


if __name__ == "__main__":
    main()
