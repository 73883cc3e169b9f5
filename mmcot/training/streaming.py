"""Training problems that are read while they are trained on: for a dataset that does not fit on a disk (`--streaming`).

What is known of all problems at once is not known here: their number, lengths, columns written by other stages. Nothing
is kept; validation and test are loaded as ever.
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

# Examples among which the next one is drawn by chance, and so many are tokenized together. They hold their pictures.
SHUFFLED = 1000
TOKENIZED = 16


def stream_problems(source: str, columns: str | Mapping[str, str] | None = None) -> IterableDataset:
    """
    The training problems of a dataset of the Hub, each row checked when it comes.

    Raises:
        ValueError: the source is none, or its first problem is not good.
    """
    problems = stream_rows(source, columns).map(answered, features=FEATURES)
    next(iter(problems))
    return problems


def answered(problem: dict[str, Any]) -> dict[str, Any]:
    require_answer(problem)
    return problem


def stream_examples(
    problems: IterableDataset, stage: Stage, processor: MMCoTProcessor, earlier: list[Stage], seed: int
) -> IterableDataset:
    """The examples of a stage (`examples.tokenized`), without end and in another order each time through."""
    settings = {"stage": stage, "processor": processor, "with_targets": True}
    written = [other.writes for other in earlier]
    examples = problems.map(with_gold, fn_kwargs={"earlier": earlier}).map(
        tokenize,
        batched=True,
        batch_size=TOKENIZED,
        fn_kwargs=settings,
        remove_columns=[name for name in (*FEATURES, *written) if name not in ("id", "images")],
    )
    # Files read side by side would each be repeated by itself, the shorter ones more often.
    return examples.repeat(None).shuffle(seed=seed, buffer_size=SHUFFLED, max_buffer_input_shards=1)


def streamed_pictures(processor: MMCoTProcessor, problems: Dataset) -> PixelStore | None:
    """Pictures that are decoded when a batch is made, of any problems."""
    if processor.image_processor is None:
        return None
    return PixelStore(problems.select([]), processor.image_processor)
