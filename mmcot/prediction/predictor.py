"""Run the stages over a split of problems.

Gold columns are removed first, so no prompt can contain them. Problems are predicted in batches of similar lengths, in
one or several processes, and returned in the order of the dataset. `inference_mmcot.write_column` writes a stage's
column for a batch.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.featurizer import vision_source
from mmcot.pictures.pixel_store import PixelStore
from mmcot.prediction.batching import Lengths, by_both_lengths, fill_batches, length_batches, split_by_cost
from mmcot.prediction.columns import with_columns
from mmcot.prediction.examples import StageCollator, lengths_of, tokenized
from mmcot.prediction.passages import add_passages
from mmcot.prediction.self_consistency import NOT_DRAWN, Drawing, Sample
from mmcot.problems.schema import (
    without_gold,
)
from mmcot.storage.journal import Batch, Journal
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.generation_mmcot import packed_linears
from modeling_mmcot.inference_mmcot import count_unfinished, replace_columns, write_column
from modeling_mmcot.self_consistency_mmcot import majority_answer
from modeling_mmcot.stage_mmcot import RETRIEVE, Stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictOptions:
    """
    Args:
        batch_size: maximum average number of problems per batch; batches have similar lengths and costs
            (`batching.py`).
        max_tokens: maximum number of padded source tokens per batch, in place of `batch_size`.
        num_workers: number of processes that prefetch pictures or features.
        decode_answer: also generate an answer and parse it, in addition to scoring the choices.
    """

    batch_size: int = 32
    max_tokens: int | None = None
    num_workers: int = 0
    decode_answer: bool = False


def predict_stage(
    model: PreTrainedModel,
    processor: MMCoTProcessor,
    stage: Stage,
    problems: Dataset,
    predictions: dict[str, dict],
    options: PredictOptions = PredictOptions(),
    pictures: FeatureStore | PixelStore | None = None,
    sample: Sample | None = None,
    journal: Journal | None = None,
    rejected: Mapping[str, str] | None = None,
    sent_back_by: Stage | None = None,
) -> None:
    """
    Add the columns that a stage writes to `predictions`, for every problem and on every process.

    Args:
        problems: rows of the schema; their gold columns, if any, are removed.
        predictions: the columns of earlier stages by problem id; without earlier stages, ids may be absent.
        pictures: the source of the problems' pictures; by default `featurizer.vision_source`.
        sample: sampling settings of the stage's text; by default the model's generation settings apply.
        journal: records each finished batch, and contains the batches of an interrupted call.
        rejected: texts by problem id; the stage writes the next best text in place of each.
        sent_back_by: the stage that sent these problems back, if the stage writes for the second time.
    """
    model.eval()
    problems = with_columns(without_gold(problems), predictions, processor.stages.before(stage))
    with PartialState().main_process_first():
        examples = tokenized(problems, stage, processor, with_targets=False)
    log_shortened(stage, examples, "problems to predict")
    if pictures is None and stage.sees_pictures:
        pictures = vision_source(model, processor.image_processor, problems)

    part = stage.name if sample is None else f"{stage.name}, sample {sample.number}"
    if sent_back_by is not None:
        part += f", sent back by {sent_back_by.name}"
    done = {} if journal is None else journal.done.get(part, {})
    batches = batches_to_write(problems["id"], lengths_of(examples), options, done)
    loader = DataLoader(
        examples,
        batch_sampler=list(batches.values()),
        collate_fn=StageCollator(processor, stage, pictures),
        num_workers=options.num_workers,
    )
    rows = problems.remove_columns("images")
    written: list[tuple[Batch, list[dict]]] = []
    with progress_bar(stage, batches) as progress, packed_linears(model):
        for (ids, indices), inputs in zip(batches.items(), loader, strict=True):
            batch_rows = [rows[index] for index in indices]
            generation = {} if sample is None else sample.begin(ids)
            if rejected is not None:
                generation["rejected"] = [rejected[problem_id] for problem_id in ids]
            columns = write_column(model, processor, stage, batch_rows, inputs, options.decode_answer, **generation)
            if journal is not None:
                journal.write(part, ids, columns)
            written.append((ids, columns))
            progress.update(len(ids))
    add_columns(predictions, problems["id"], [*done.items(), *gather_object(written)], stage)


def send_back(
    load_model: Callable[[str], PreTrainedModel],
    processor: MMCoTProcessor,
    check: Stage,
    problems: Dataset,
    predictions: dict[str, dict],
    options: PredictOptions = PredictOptions(),
    pictures: FeatureStore | PixelStore | None = None,
    sample: Sample | None = None,
    journal: Journal | None = None,
    gold_problems: Dataset | None = None,
) -> None:
    """
    Let the stages before `check` write again for the problems that it sends back, once (`Stages.repeated_by`). Their
    new columns replace the rejected ones, which are kept under `REJECTED`.

    Args:
        load_model: returns the model of the stage with the given name.
    """
    rows = [row for row, problem_id in enumerate(problems["id"]) if check.sends_back(predictions[problem_id])]
    stages = processor.stages.repeated_by(check)
    if not stages or not rows:
        return
    if PartialState().is_main_process:
        logger.info("%s stage: %d of %d problems are sent back", check.name, len(rows), len(problems))
    sent_back = problems.select(rows)
    gold_problems = None if gold_problems is None else gold_problems.select(rows)
    earlier = {stage.writes for stage in processor.stages.before(stages[0])}
    written = {
        problem_id: {name: value for name, value in predictions[problem_id].items() if name in earlier}
        for problem_id in sent_back["id"]
    }
    settings = (options, pictures, sample, journal)
    rejected = {problem_id: predictions[problem_id][stages[0].writes] for problem_id in sent_back["id"]}
    for stage in stages:
        if not stage.has_model:
            add_passages(written, processor, stage, sent_back, gold_problems)
            continue
        texts = rejected if stage is stages[0] else None
        predict_stage(load_model(stage.name), processor, stage, sent_back, written, *settings, texts, check)
    for problem_id, columns in written.items():
        new = {name: value for name, value in columns.items() if name not in earlier}
        replace_columns(predictions[problem_id], new)


def batches_to_write(
    ids: list[str], lengths: list[Lengths], options: PredictOptions, done: Mapping[Batch, list[dict]]
) -> dict[Batch, list[int]]:
    """Return the unfinished batches of this process, as a mapping from problem ids to indices."""
    batches = batches_of(lengths, options)
    batches = [batch for batch in batches if tuple(ids[index] for index in batch) not in done]
    state = PartialState()
    own = split_by_cost(batches, lengths, state.num_processes)[state.process_index]
    return {tuple(ids[index] for index in batch): batch for batch in own}


def batches_of(lengths: list[Lengths], options: PredictOptions) -> list[list[int]]:
    if options.max_tokens is None:
        return length_batches(lengths, math.ceil(len(lengths) / options.batch_size))
    return fill_batches(by_both_lengths(lengths), lengths, options.max_tokens, minimum=1)


def progress_bar(stage: Stage, batches: Mapping[Batch, list[int]]) -> tqdm:
    is_main_process = PartialState().is_main_process
    return tqdm(total=sum(map(len, batches)), desc=f"{stage.name} stage", disable=not is_main_process, leave=False)


def add_columns(
    predictions: dict[str, dict], ids: list[str], written: list[tuple[Batch, list[dict]]], stage: Stage
) -> None:
    """Add the columns of all batches and processes in the order of the problems, and log the number of cut texts."""
    by_id = {id_: row for names, columns in written for id_, row in zip(names, columns, strict=True)}
    unfinished = count_unfinished([by_id[id_] for id_ in ids])
    if unfinished and PartialState().is_main_process:
        logger.warning(
            f"{stage.name} stage: {unfinished} of {len(ids)} texts reached the limit of new tokens and are cut off"
        )
    for id_ in ids:
        predictions.setdefault(id_, {}).update(by_id[id_])


def log_shortened(stage: Stage, examples: Dataset | IterableDataset, which: str) -> dict[str, int] | None:
    """Log and return the number of sources and targets that exceed the stage's limits. Return None for a stream."""
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


def predict(
    processor: MMCoTProcessor,
    models: Mapping[str, PreTrainedModel],
    problems: Dataset,
    options: PredictOptions = PredictOptions(),
    pictures: FeatureStore | None = None,
    journal: Journal | None = None,
    drawing: Drawing = NOT_DRAWN,
    gold_problems: Dataset | None = None,
) -> dict[str, dict]:
    """
    Return the predictions of all stages by problem id, in the order of the dataset. With several sampled rationales,
    the answer is the choice with the highest mean probability over them (`self_consistency_mmcot.py`).

    Args:
        gold_problems: the same problems with their gold lectures, whose copies `exclude_verbatim` leaves out; by
            default `problems`.
    """
    samples: list[dict[str, dict]] = []
    for sample in drawing.samples():
        predictions: dict[str, dict] = {problem_id: {} for problem_id in problems["id"]}
        for stage in processor.stages:
            if stage.kind == RETRIEVE:
                add_passages(predictions, processor, stage, problems, gold_problems)
                continue
            settings = (options, pictures, sample, journal)
            predict_stage(models[stage.name], processor, stage, problems, predictions, *settings)
            send_back(models.__getitem__, processor, stage, problems, predictions, *settings, gold_problems)
        samples.append(predictions)
    if len(samples) == 1:
        return samples[0]
    rows, answering = without_gold(problems).remove_columns("images"), processor.stages.answering
    return {
        row["id"]: majority_answer([predictions[row["id"]] for predictions in samples], row, answering) for row in rows
    }
