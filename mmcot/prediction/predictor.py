"""Runs the stages over a split: `python -m mmcot.predict RUN_OR_HUB_DIR --dataset demo --split test --output FILE`.

Free-running: the gold columns are taken away before anything else happens, so no prompt can hold one, and with
`--leak_check` that is tried. What a stage does with a batch is `pipeline_mmcot.write_column`; this file walks over
problems, on one process or several, in batches of like lengths, and gives what was written in their order. Called again
after it was killed, the command goes on (`journal.py`). Beside FILE stands where it comes from (`provenance.py`).
"""

import argparse
import logging
import math
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mmcot.evaluation.leaks import leaking
from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.featurizer import vision_source
from mmcot.pictures.reading import PixelStore
from mmcot.prediction.batching import Lengths, by_both_lengths, filled, length_batches, shares
from mmcot.prediction.examples import StageCollator, lengths_of, tokenized
from mmcot.prediction.provenance import check_export, loaded_from, provenance
from mmcot.prediction.self_consistency import Sample
from mmcot.problems.opening import SOURCES, Given
from mmcot.problems.predictions import write_predictions
from mmcot.problems.schema import (
    SPLITS,
    first_few,
    join_captions,
    with_column,
    without_gold,
)
from mmcot.problems.sources import add_dataset_options, choose_source, load_problems, reading_options, said_options
from mmcot.problems.subsets import add_selection, select
from mmcot.recipes.command_line import (
    check_output_file,
    given_options,
    refuse_absent_path,
    refuse_below,
    refuse_without_effect,
)
from mmcot.storage.files import resolved
from mmcot.storage.journal import Journal
from modeling_mmcot import MMCoTForConditionalGeneration, MMCoTProcessor
from modeling_mmcot.generation_mmcot import packed_linears
from modeling_mmcot.pipeline_mmcot import count_unfinished, write_column
from modeling_mmcot.processing_mmcot import Stage
from modeling_mmcot.self_consistency_mmcot import TEMPERATURE, agreed
from modeling_mmcot.stages_mmcot import load_stages

logger = logging.getLogger(__name__)

# Options that say where and how fast, not what is predicted.
NOT_OF_THE_RESULT = ("model", "output", "leak_check", "num_workers", "source", "columns", "split_seed")


def predict_stage(
    model: PreTrainedModel,
    processor: MMCoTProcessor,
    stage: Stage,
    problems: Dataset,
    predictions: dict[str, dict],
    batch_size: int = 32,
    decode_answer: bool = False,
    pictures: FeatureStore | PixelStore | None = None,
    num_workers: int = 0,
    max_tokens: int | None = None,
    sample: Sample | None = None,
    journal: Journal | None = None,
) -> None:
    """
    Add the columns that a stage writes to `predictions`, for every problem, on every process alike.

    Args:
        problems: rows of the schema; gold columns may be there and are not looked at.
        predictions: by problem id, what the earlier stages wrote; a missing id is a problem with nothing written yet.
        batch_size: problems of a batch, on average at most: batches are of like lengths and cost (`batching.py`).
        pictures: where the problems' pictures are taken from; by default `features.vision_source`.
        num_workers: processes that read pictures or features ahead.
        max_tokens: padded source tokens of a batch at most, in place of `batch_size`.
        sample: how the stage's text is drawn; by default it is the model's own way, mostly the likeliest.
        journal: where batches are written that are done, and taken from.
    """
    model.eval()
    state = PartialState()
    earlier = processor.stages[: processor.stages.index(stage)]
    problems = with_columns(without_gold(problems), predictions, earlier)
    with state.main_process_first():
        examples = tokenized(problems, stage, processor, with_targets=False)
    log_shortened(stage, examples, "problems to predict")
    if pictures is None and "images" in stage.reads:
        pictures = vision_source(model, processor.image_processor, problems)
    lengths, ids = lengths_of(examples), problems["id"]
    batches = {tuple(ids[index] for index in batch): batch for batch in batches_of(lengths, batch_size, max_tokens)}
    of = stage.name if sample is None else f"{stage.name}, sample {sample.number}"
    done = {} if journal is None else journal.done.get(of, {})
    batches = [batch for names, batch in batches.items() if names not in done]
    batches = shares(batches, lengths, state.num_processes)[state.process_index]
    loader = DataLoader(
        examples, batch_sampler=batches, collate_fn=StageCollator(processor, stage, pictures), num_workers=num_workers
    )
    written = []
    progress = tqdm(
        total=sum(map(len, batches)), desc=f"{stage.name} stage", disable=not state.is_main_process, leave=False
    )
    rows = problems.remove_columns("images")
    with progress, packed_linears(model):
        for batch, inputs in zip(batches, loader, strict=True):
            names = tuple(ids[index] for index in batch)
            generation = {} if sample is None else sample.begin(names)
            columns = write_column(
                model, processor, stage, [rows[index] for index in batch], inputs, decode_answer, **generation
            )
            if journal is not None:
                journal.write(of, names, columns)
            written.append((names, columns))
            progress.update(len(batch))
    by_id = {}
    for names, columns in [*done.items(), *gather_object(written)]:
        by_id.update(zip(names, columns, strict=True))
    unfinished = count_unfinished([by_id[problem_id] for problem_id in ids])
    if unfinished and state.is_main_process:
        logger.warning(
            f"{stage.name} stage: {unfinished} of {len(ids)} texts end at the limit of new tokens, before their end"
        )
    for problem_id in ids:
        predictions.setdefault(problem_id, {}).update(by_id[problem_id])


def batches_of(lengths: list[Lengths], batch_size: int, max_tokens: int | None) -> list[list[int]]:
    if max_tokens is None:
        return length_batches(lengths, math.ceil(len(lengths) / batch_size))
    return filled(by_both_lengths(lengths), lengths, max_tokens, minimum=1)


def with_columns(problems: Dataset, predictions: dict[str, dict], earlier: list[Stage]) -> Dataset:
    """The problems with the texts that earlier stages wrote for them, as far as they did."""
    for stage in earlier:
        texts = [predictions.get(problem_id, {}).get(stage.writes) for problem_id in problems["id"]]
        absent = [problem_id for problem_id, text in zip(problems["id"], texts, strict=True) if text is None]
        if len(absent) == len(texts):
            continue
        if absent:
            raise ValueError(
                f"{len(absent)} problems have no {stage.writes!r} from an earlier stage: {first_few(absent)}."
            )
        problems = with_column(problems, stage.writes, texts)
    return problems


def log_shortened(stage: Stage, examples: Dataset | IterableDataset, which: str) -> dict[str, int] | None:
    """How many sources and targets were longer than the stage's, told and returned; None of a stream."""
    if isinstance(examples, IterableDataset):
        return None
    counts = {"of": len(examples), "sources": sum(examples["is_shortened"])}
    if "is_cut" in examples.column_names:
        counts["targets"] = sum(examples["is_cut"])
    for kind, length in (("sources", stage.max_source_length), ("targets", stage.max_target_length)):
        if counts.get(kind) and PartialState().is_main_process:
            logger.warning(
                f"{stage.name} stage: the {kind} of {counts[kind]} of {len(examples)} {which} are longer than {length} "
                f"tokens and are shortened"
            )
    return counts


def load_system(model: str, dtype: torch.dtype | str = "auto") -> tuple[MMCoTProcessor, Mapping[str, PreTrainedModel]]:
    """
    The processor and each stage's model, from a finished run, a folder in the Hub's layout or a Hub id.

    Raises:
        ValueError: nothing is there, it is no such folder, or a run whose stages were trained again since it was
            exported.
        OSError: the Hub does not give it, or a file of it is damaged.
    """
    refuse_absent_path(model, "a finished run, a model folder, or an id of the Hub (USER/NAME)")
    folder = Path(model)
    model, is_run = loaded_from(model), (folder / "hub").is_dir()
    if not is_run and folder.is_dir() and not (folder / "processor_config.json").is_file():
        raise ValueError(
            f"{folder} is neither a finished run (it has no hub/) nor a model folder (it has no processor_config.json)."
        )
    # Without the last argument, transformers asks at the terminal whether it may run a repository's code.
    processor = MMCoTProcessor.from_pretrained(model, trust_remote_code=False)
    if is_run:
        check_export(folder, processor)
    root = MMCoTForConditionalGeneration.from_pretrained(model, dtype=dtype, trust_remote_code=False)
    root = root.to(PartialState().device)
    return processor, load_stages(root, model, [stage.name for stage in processor.stages])


def predict(
    processor: MMCoTProcessor,
    models: Mapping[str, PreTrainedModel],
    problems: Dataset,
    num_rationales: int = 1,
    temperature: float = TEMPERATURE,
    seed: int = 42,
    **options,
) -> dict[str, dict]:
    """
    The predictions of all stages, by problem id, in the order of the dataset.

    Args:
        num_rationales: with more than one, so many are drawn of what the stages before the last one write, and the
            answer is that of the highest mean probability (`self_consistency.py`).
        temperature, seed: of that drawing.
        options: of `predict_stage`.
    """
    drawn: list[dict[str, dict]] = []
    for number in range(num_rationales):
        predictions: dict[str, dict] = {problem_id: {} for problem_id in problems["id"]}
        for stage in processor.stages:
            sample = Sample(number, temperature, seed) if num_rationales > 1 else None
            predict_stage(models[stage.name], processor, stage, problems, predictions, sample=sample, **options)
        drawn.append(predictions)
    if num_rationales == 1:
        return drawn[0]
    rows, last = without_gold(problems).remove_columns("images"), processor.stages[-1]
    return {row["id"]: agreed([predictions[row["id"]] for predictions in drawn], row, last) for row in rows}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmcot.predict", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run folder, a folder in the Hub's layout, or a Hub id")
    parser.add_argument("--dataset", help=SOURCES)
    add_dataset_options(parser)
    parser.add_argument("--split", default="test", choices=SPLITS)
    add_selection(parser)
    parser.add_argument("--output", help="the predictions file to write")
    parser.add_argument("--leak_check", action="store_true", help="predict with and without gold columns, and compare")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_tokens", type=int, metavar="N", help="of a batch's padded sources, in place of its size")
    parser.add_argument("--num_rationales", type=int, default=1, metavar="N", help="drawn; the answer is agreed on")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="of that drawing")
    parser.add_argument("--seed", type=int, default=42, help="of that drawing")
    parser.add_argument("--decode_answer", action="store_true", help='read a generated "The answer is (B)." too')
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read pictures or features ahead")
    parser.add_argument("--bf16", action="store_true", help="run the models in bfloat16")
    parser.add_argument("--features", metavar="DIR", help="features of the pictures, as mmcot.features wrote them")
    parser.add_argument("--captions", metavar="FILE", help="captions.json, as mmcot.features --captions wrote it")
    return parser


def main(argv: list[str] | None = None, dataset: Given | None = None) -> None:
    """
    Args:
        argv: the command line; by default this process's.
        dataset: in place of `--dataset`.
    """
    arguments = build_parser().parse_args(argv)
    PartialState(cpu=not torch.accelerator.is_available())  # else processes without accelerator know nothing of others
    try:
        check_options(arguments, given_options(build_parser(), argv))
        arguments.source = choose_source(arguments, dataset)
        arguments.captions = arguments.captions and resolved(arguments.captions)
        processor, models = load_system(arguments.model, torch.bfloat16 if arguments.bf16 else "auto")
        if arguments.num_rationales > 1 and len(processor.stages) == 1:
            raise ValueError(f"--num_rationales is {arguments.num_rationales}, and {arguments.model} writes none.")
        problems, store = load_inputs(arguments, processor, models)
        settings = {name: value for name, value in vars(arguments).items() if name not in NOT_OF_THE_RESULT}
        settings |= said_options(arguments)
        options = {name: settings[name] for name in ("num_rationales", "temperature", "seed")}
        options |= {name: settings[name] for name in ("batch_size", "max_tokens", "decode_answer")}
        options |= {"pictures": store, "num_workers": arguments.num_workers}
        if arguments.leak_check:
            tell_leaks(problems, lambda rows: predict(processor, models, rows, **options))
            return
        meta = {**provenance(arguments.model, processor, models, problems, store), **settings}
        output = Path(arguments.output)
        journal = Journal(output, meta)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        predictions = predict(processor, models, problems, journal=journal, **options)
        if PartialState().is_main_process:
            write_predictions(output, predictions, meta)
            print(f"{len(predictions)} predictions: {output}")
        journal.remove()
    except OSError as error:  # a full disk
        journal.give_up()
        sys.exit(f"error: {output} could not be written: {error}. The same command goes on with what was predicted.")
    except KeyboardInterrupt:
        print(f"SIGINT: what is predicted is kept beside {output}. The same command goes on.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def check_options(arguments: argparse.Namespace, said: set[str]) -> None:
    """
    Raises:
        ValueError: an option is missing, is no number that it can be, or has no effect beside the others.
    """
    if arguments.output is None and not arguments.leak_check:
        raise ValueError("--output is missing: the predictions file to write.")
    refuse_below(arguments, 1, "batch_size", "max_tokens", "num_rationales")
    refuse_below(arguments, 0, "num_workers")
    if arguments.temperature <= 0:
        raise ValueError(f"--temperature is {arguments.temperature:g}; expected more than 0.")
    if arguments.num_rationales == 1:
        reason = "nothing is drawn without --num_rationales of 2 or more"
        refuse_without_effect(said, ("temperature", "seed"), reason)
    if arguments.leak_check:
        refuse_without_effect(said, ("output",), "--leak_check compares, and writes no file")
    else:
        check_output_file(arguments.output)
    if arguments.max_tokens is not None:
        refuse_without_effect(said, ("batch_size",), "--max_tokens stands in its place")
    if arguments.num_rationales > 1 and arguments.decode_answer:
        raise ValueError(
            "--decode_answer reads one generated answer, and --num_rationales makes several: leave one out."
        )


def tell_leaks(problems: Dataset, predict_all: Callable[[Dataset], dict[str, dict]]) -> None:
    leaks = leaking(problems, predict_all)
    if not PartialState().is_main_process:
        return
    if leaks:
        for problem_id, columns in list(leaks.items())[:20]:
            print(f"{problem_id}: {', '.join(columns)}")
        sys.exit(
            f"error: {len(leaks)} of {len(problems)} predictions differ when the gold columns are replaced by garbage: "
            f"something of them reaches the model."
        )
    print(f"No prediction of {len(problems)} differs when the gold columns are replaced by garbage.")


def reads_images(processor: MMCoTProcessor) -> bool:
    return any("images" in stage.reads for stage in processor.stages)


def load_inputs(
    arguments: argparse.Namespace, processor: MMCoTProcessor, models: Mapping[str, PreTrainedModel]
) -> tuple[Dataset, FeatureStore | None]:
    """
    The problems, and where asked for the store of their pictures' features; both are found to fit the models.

    Raises:
        ValueError: they do not, or no stage reads what an option gives.
    """
    for name, column in (("features", "images"), ("captions", "caption")):
        if getattr(arguments, name) is not None and not any(column in stage.reads for stage in processor.stages):
            raise ValueError(f"--{name} has no effect here: no stage of {arguments.model} reads `{column}`.")
    store = FeatureStore(arguments.features) if arguments.features is not None else None
    max_images = min(model.config.max_images for model in models.values())
    needs_files = store is None or store.needs_files
    reading = reading_options(arguments)
    problems = load_problems(arguments.source, arguments.split, max_images, needs_files, **reading)
    problems = select(problems, arguments.ids, arguments.filter, arguments.limit)
    if arguments.captions is not None:
        problems = join_captions(problems, arguments.captions)
    if store is None:
        if processor.image_processor is None and reads_images(processor) and any(problems["images"]):
            raise ValueError(f"{arguments.model} has no picture tower, and problems have pictures: give --features.")
        for model in models.values():  # kept on disk; here, so that a broken picture is named before any work
            vision_source(model, processor.image_processor, problems)
        return problems, None
    store.check_problems(problems)
    for model in models.values():
        store.check_model(model, processor.image_processor)
    return problems, store


if __name__ == "__main__":
    main()
