"""Streams training problems during training, for datasets that do not fit on a disk (`--streaming`).

Properties of the whole training split are unknown: the number of problems, their lengths, columns written by other
stages. Nothing is stored; validation and test problems are loaded as usual.
"""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from mmcot.pictures.pixel_store import PixelStore
from mmcot.prediction.columns import with_gold
from mmcot.prediction.examples import tokenize
from mmcot.problems.schema import FEATURES, require_answer
from mmcot.problems.sources import stream_rows
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.stage_mmcot import Stage

# Number of examples from which the next one is drawn at random. The buffer keeps their pictures in memory.
SHUFFLE_BUFFER_SIZE = 1000
TOKENIZE_BATCH_SIZE = 16


def stream_problems(source: str, columns: str | Mapping[str, str] | None = None) -> IterableDataset:
    """
    Stream the training problems of a dataset; each row is checked when it is read.

    Raises:
        ValueError: the source is neither a dataset on the Hub nor a folder of Parquet files, or its first problem is
            invalid.
    """
    problems = stream_rows(source, columns).map(check_answer, features=FEATURES)
    next(iter(problems))
    return problems


def check_answer(problem: dict[str, Any]) -> dict[str, Any]:
    """Return the problem unchanged, because `map` needs a result; raise a ValueError if it has no answer."""
    require_answer(problem)
    return problem


def stream_examples(
    problems: IterableDataset, stage: Stage, processor: MMCoTProcessor, earlier: list[Stage], seed: int
) -> IterableDataset:
    """Stream the examples of a stage (`examples.tokenized`) endlessly, in a different order in each epoch."""
    options = {"stage": stage, "processor": processor, "with_targets": True}
    written = [other.writes for other in earlier]
    examples = problems.map(with_gold, fn_kwargs={"earlier": earlier}).map(
        tokenize,
        batched=True,
        batch_size=TOKENIZE_BATCH_SIZE,
        fn_kwargs=options,
        remove_columns=[name for name in (*FEATURES, *written) if name not in ("id", "images")],
    )
    # One shard at a time: files that are read in parallel repeat independently, shorter files more often.
    return examples.repeat(None).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_SIZE, max_buffer_input_shards=1)


def streamed_pictures(processor: MMCoTProcessor, problems: Dataset) -> PixelStore | None:
    """Return an empty store, which decodes the pictures of any problem when a batch is built."""
    if processor.image_processor is None:
        return None
    return PixelStore(problems.select([]), processor.image_processor)
