"""The settings of a recipe and of its stages, in addition to the Trainer's arguments and `trl.ModelConfig`."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from mmcot.problems.opening import SOURCES
from mmcot.problems.splits import SPLIT_SEED
from modeling_mmcot.stage_mmcot import default_kind

STAGE_CHOICES = {"inputs_from": ("gold", "generated", "cross_fit", "mixed"), "init_from": ("base", "previous_stage")}
PEFT_TYPES = ("LORA", "PROMPT_TUNING", "PREFIX_TUNING")


@dataclass
class StageArguments:
    """
    One entry of a recipe's `stages`.

    Args:
        name: the name of the stage and of its folder.
        reads: the columns of the problem that appear in its source; include `images` to read the pictures.
        writes: the column that the stage writes.
        kind: what the stage does (`stage_mmcot.KINDS`). By default the stage that writes `answer_text` chooses the
            answer, and every other one generates a text.
        template: a name in the template set `paper` (`QCM-E`, `QCMG-A`, …), which defines source and target.
        source, target: Jinja templates, in place of the named ones. A stage that retrieves has no target, and its
            source is the query; by default question and choices. A stage that checks has a source only.
        max_source_length, max_target_length: in tokens.
        score: how the answering stage compares choices (`stage_mmcot.SCORES`): `total`, `mean` or `calibrated`. By
            default `mean` if its target contains the text of the choice, else `total` (docs/choice_lengths.md).
        num_beams: the number of beams of free-running generation.
        num_train_epochs, learning_rate: for this stage, in place of the recipe's values.
        inputs_from: the origin of the earlier stages' columns in training: `gold`, `generated`, `cross_fit` or `mixed`
            (`training/stage_inputs.py`).
        init_from: the initial weights of its training: `base`, or `previous_stage`.
        corpora: of a stage that retrieves: the passages that it searches (`retrieval/corpora.py`).
        num_passages: of a stage that retrieves: the number of passages for a problem, by default 5.
        exclude_verbatim: of a stage that retrieves: leave out a passage that is the problem's own lecture.
    """

    name: str
    reads: list[str]
    writes: str
    kind: str | None = None
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
    corpora: list[str] | None = None
    num_passages: int | None = None
    exclude_verbatim: bool | None = None

    def __post_init__(self):
        self.kind = self.kind or default_kind(self.writes)
        # YAML reads 1e-4 as a string, and nested values pass no argument parser.
        for name in ("num_train_epochs", "learning_rate"):
            if getattr(self, name) is not None:
                setattr(self, name, float(getattr(self, name)))


@dataclass
class RecipeArguments:
    """
    The settings of a recipe.

    Args:
        dataset: the source of the problems (`sources.load_problems`).
        columns: `OURS=THEIRS,…` (in the recipe also a mapping), if the dataset has other column names.
        split_seed: the seed that divides rows without `split`.
        allow_overlap: train even if validation or test problems also occur in training (same text and pictures).
        stages: the stages (in the recipe only, see [`StageArguments`]). A stage runs after all stages whose columns it
            reads; apart from that, they run in the given order.
        share_weights: train one model for all stages, on the mixture of their examples, in place of one model for each.
        streaming: read the training problems of a Hub dataset during training, without keeping them on disk
            (`training/streaming.py`).
        fusion: a name in `fusion_mmcot.FUSIONS`, or `none`. By default that of the model, or `gated` for a new model.
        fusion_options: options of the fusion, such as `{every: 2}` (in the recipe only).
        replace_fusion: start with a new fusion if `model_name_or_path` has another one.
        vision_model_name_or_path: a pre-trained picture tower: a checkpoint, or a name in `vision_mmcot.TOWERS`.
        vision_tower: how the tower's output becomes patches: a name in `vision_mmcot.TOWERS`.
        vision_preprocessing: `checkpoint` (that of the checkpoint), or `paper` (that of the authors).
        freeze_vision: do not train the tower. By default as in the model's configuration, false for a new model.
        max_images: the largest number of pictures of one problem. With 0, no stage reads pictures and the model has no
            tower.
        features: a folder of picture features, as written by `mmcot.features`, used instead of running the tower.
        captions: a captions.json, as written by `mmcot.features --captions`, in place of the problems' captions.
        tokenizer_name_or_path: a tokenizer; by default that of the text model.
        tokenizer_vocab_size: train a tokenizer with this vocabulary size on the training texts instead.
        text_config, vision_config, image_processor: the configurations of a model from scratch (in the recipe only).
        target_column: `COLUMN=FILE.json`: texts by problem id, the targets for the stage that writes that column.
        report_problems: the number of validation problems that a stage predicts, free-running, at each evaluation; the
            scores are logged beside the loss (`training/progress.py`). By default none.
        freeze_text, freeze_fusion: do not train the text model, or the fusion.
        num_folds: the number of folds of the training problems, if a stage has `inputs_from: cross_fit`.
        fold: run only this fold, 0 to num_folds - 1: train the stages on the other folds, and predict the problems of
            this one. Folds can run in parallel; the command without `fold` uses their results.
        stage: only train the stage of this name, which must not depend on the training of others (`inputs_from: gold`,
            `init_from: base`). Several can be trained at the same time; the command without `stage` uses their weights.
        peft_type: with `use_peft`, PEFT's name for the adapter that is trained beside the fusion: `LORA`, or virtual
            tokens before the source (`PROMPT_TUNING`) or in the decoder's attention (`PREFIX_TUNING`).
        num_virtual_tokens: the number of virtual tokens.
        merge_adapters: with `use_peft`, save whole models in place of a base and adapters.
        pass_over_damaged_checkpoints: resume from the newest complete checkpoint, if a newer one is damaged.
        decode_answer: also generate "The answer is (B).", as in the paper, and report its accuracy.
    """

    dataset: str = field(
        default="",
        metadata={"help": SOURCES},
    )
    columns: str | None = field(default=None, metadata={"help": "OURS=THEIRS,…: the dataset's column names."})
    split_seed: int = field(default=SPLIT_SEED, metadata={"help": "The seed that divides rows without a split."})
    allow_overlap: bool = field(
        default=False, metadata={"help": "Allow test problems that occur in training; the scores record it."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read training problems during training; needs max_steps."}
    )
    stages: list[Any] = field(default_factory=list, metadata={"help": "In the recipe only."})
    share_weights: bool = field(default=False, metadata={"help": "Train one model for all stages."})
    fusion: str | None = field(default=None, metadata={"help": "The module through which the text model sees patches."})
    fusion_options: Any = field(default=None, metadata={"help": "Options of the fusion; in the recipe only."})
    replace_fusion: bool = field(default=False, metadata={"help": "Replace the fusion of the initial checkpoint."})
    vision_model_name_or_path: str | None = field(default=None, metadata={"help": "A pre-trained picture tower."})
    vision_tower: str | None = field(default=None, metadata={"help": "How the tower's output becomes patches."})
    vision_preprocessing: str = field(default="checkpoint", metadata={"help": "`checkpoint` or `paper`."})
    freeze_vision: bool | None = field(default=None, metadata={"help": "Do not train the picture tower."})
    max_images: int = field(default=1, metadata={"help": "The largest number of pictures of one problem."})
    features: str | None = field(default=None, metadata={"help": "A folder of precomputed picture features."})
    captions: str | None = field(
        default=None, metadata={"help": "A captions.json, in place of the dataset's captions."}
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "By default that of the text model."})
    tokenizer_vocab_size: int | None = field(default=None, metadata={"help": "Train a tokenizer of this size."})
    text_config: Any = field(default=None, metadata={"help": "For a model from scratch; in the recipe only."})
    vision_config: Any = field(default=None, metadata={"help": "For a model from scratch; in the recipe only."})
    image_processor: Any = field(default=None, metadata={"help": "For a model from scratch; in the recipe only."})
    target_column: str | None = field(default=None, metadata={"help": "COLUMN=FILE.json, texts by problem id."})
    report_problems: int = field(default=0, metadata={"help": "Validation problems to predict at each evaluation."})
    freeze_text: bool = field(default=False, metadata={"help": "Do not train the text model."})
    freeze_fusion: bool = field(default=False, metadata={"help": "Do not train the fusion."})
    num_folds: int = field(default=5, metadata={"help": "The number of folds of cross_fit."})
    fold: int | None = field(default=None, metadata={"help": "Run only this fold of cross_fit."})
    stage: str | None = field(
        default=None, metadata={"help": "Train only this stage; others can run at the same time."}
    )
    peft_type: str = field(default="LORA", metadata={"help": ", ".join(PEFT_TYPES)})
    num_virtual_tokens: int = field(default=20, metadata={"help": "For prompt and prefix tuning."})
    merge_adapters: bool = field(default=False, metadata={"help": "Save whole models in place of adapters."})
    pass_over_damaged_checkpoints: bool = field(
        default=False, metadata={"help": "Resume from the newest complete checkpoint if a newer one is damaged."}
    )
    decode_answer: bool = field(default=False, metadata={"help": 'Also generate and read "The answer is (B)."'})


def help_text() -> str:
    """Return the text of `python train.py --help` without a recipe: mmcot's options, and a pointer to all others."""
    parser = argparse.ArgumentParser(
        prog="python train.py",
        usage="python train.py --config FILE [--dataset PATH_OR_ID] [--output_dir DIR] [--OPTION VALUE …]",
        description="Train, predict, score and export the system that a recipe describes. The same command resumes an "
        "interrupted run. The recipe can set each option too; the command line overrides it.",
        epilog="Training options (learning_rate, num_train_epochs, bf16, …) come from "
        "transformers.Seq2SeqTrainingArguments, and options of the text model and of adapters (model_name_or_path, "
        "dtype, use_peft, lora_r, …) from trl.ModelConfig: "
        "`python train.py --config configs/demo/two_stages.yaml --help` lists them all.",
        add_help=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="The recipe: configs/DATASET/VARIANT.yaml, or a file of your own."
    )
    for option in fields(RecipeArguments):
        parser.add_argument(
            f"--{option.name}", metavar=option.name.upper(), help=option.metadata["help"].replace("%", "%%")
        )
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="The run folder; by default runs/DATASET_VARIANT, or runs/NAME for a NAME.yaml of your own.",
    )
    return parser.format_help()
