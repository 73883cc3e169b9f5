"""What a recipe can say beyond the Trainer's arguments and `trl.ModelConfig`: its own settings, and a stage's."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from mmcot.problems.opening import SOURCES
from mmcot.problems.splits import SPLIT_SEED

STAGE_CHOICES = {"inputs_from": ("gold", "generated", "cross_fit"), "init_from": ("base", "previous_stage")}
PEFT_TYPES = ("LORA", "PROMPT_TUNING", "PREFIX_TUNING")


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
        score: of the stage that answers, how choices are compared (`processing_mmcot.SCORES`): `total`, `mean` or
            `calibrated`. By default `mean` where its target holds the choice's text, else `total`
            (docs/choice_lengths.md).
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
    score: str | None = None
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
        dataset: where the problems come from, see `sources.load_problems`.
        columns: `OURS=THEIRS,…` (in the recipe also a mapping), where the dataset names its columns otherwise.
        split_seed: of the division of rows without `split`.
        allow_overlap: train although validation or test problems are among those trained on (same text and pictures).
        stages: the stages in order (in the recipe only, see [`StageArguments`]).
        streaming: read the training problems of a dataset of the Hub while they are trained on, and keep none
            (`streaming.py`).
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
    columns: str | None = field(default=None, metadata={"help": "OURS=THEIRS,…: the dataset's names of columns."})
    split_seed: int = field(default=SPLIT_SEED, metadata={"help": "Of the division of rows without a split."})
    allow_overlap: bool = field(default=False, metadata={"help": "Test on problems that are trained on, and say so."})
    streaming: bool = field(default=False, metadata={"help": "Keep no training problems; wants max_steps."})
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


def help_text() -> str:
    """What `python train.py --help` shows without a recipe: the options that are ours, and where all others stand."""
    parser = argparse.ArgumentParser(
        prog="python train.py",
        usage="python train.py --config FILE [--dataset PATH_OR_ID] [--output_dir DIR] [--OPTION VALUE …]",
        description="Train, predict, score and export what a recipe describes. The same command again goes on with an "
        "interrupted run. Each option can stand in the recipe too; the command line goes before it.",
        epilog="Options of training (learning_rate, num_train_epochs, bf16, …) are those of "
        "transformers.Seq2SeqTrainingArguments, options of the text model and of adapters (model_name_or_path, dtype, "
        "use_peft, lora_r, …) those of trl.ModelConfig: `python train.py --config configs/demo/two_stages.yaml --help` "
        "shows them all.",
        add_help=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="The recipe: configs/DATASET/VARIANT.yaml, or one of your own."
    )
    for option in fields(RecipeArguments):
        parser.add_argument(
            f"--{option.name}", metavar=option.name.upper(), help=option.metadata["help"].replace("%", "%%")
        )
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="The run's folder; by default runs/DATASET_VARIANT, or runs/NAME for a NAME.yaml of your own.",
    )
    return parser.format_help()
