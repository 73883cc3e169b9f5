"""Runs the stages over a split of problems.

Gold columns are removed first, so that no prompt can hold one. Problems are predicted in batches of like lengths, in
one process or several, and returned in their order. `inference_mmcot.write_column` writes a stage's column for a batch.
"""

import logging
import math
from collections.abc import Mapping

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.featurizer import vision_source
from mmcot.pictures.pixel_store import PixelStore
from mmcot.prediction.batching import Lengths, by_both_lengths, filled, length_batches, shares
from mmcot.prediction.examples import StageCollator, lengths_of, tokenized
from mmcot.prediction.self_consistency import Sample
from mmcot.problems.schema import (
    first_few,
    with_column,
    without_gold,
)
from mmcot.storage.journal import Journal
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.generation_mmcot import packed_linears
from modeling_mmcot.inference_mmcot import count_unfinished, write_column
from modeling_mmcot.self_consistency_mmcot import TEMPERATURE, agreed
from modeling_mmcot.stage_mmcot import Stage

logger = logging.getLogger(__name__)


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
