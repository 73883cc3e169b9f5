"""Of a run's problems: how they came into splits, and which of them stand in two; kept as `splits.json` in its folder.

A score of problems that were trained on is no score: they are counted, and refused unless asked for. The card says it.
"""

import logging
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from mmcot.problems.known_datasets import known_dataset_name
from mmcot.problems.schema import first_few
from mmcot.problems.sources import is_divided
from mmcot.problems.splits import overlaps
from mmcot.recipes.recipe import Recipe

logger = logging.getLogger(__name__)
# Their splits are what published figures are of, whatever they share.
PUBLISHED = ("ScienceQA", "A-OKVQA")


def record_splits(recipe: Recipe, problems: Mapping[str, Dataset | IterableDataset]) -> dict[str, Any]:
    """
    Returns:
        `divided_by` (the `split_seed`, None where the dataset has splits of its own), `n` problems by split (None of a
        stream), and `overlap`, by two splits the number of problems of the second one that the first one has; None
        where training problems are streamed.

    Raises:
        ValueError: they share problems, and `allow_overlap` is not set.
    """
    arguments = recipe.arguments
    sizes = {split: len(rows) if isinstance(rows, Dataset) else None for split, rows in problems.items()}
    divided = None if arguments.streaming or not is_divided(recipe.source, arguments.columns) else arguments.split_seed
    record: dict[str, Any] = {"divided_by": divided, "n": sizes, "overlap": None}
    if arguments.streaming:
        logger.warning(
            "training problems are streamed: whether validation and test problems are among them is not checked"
        )
        return record
    found = overlaps(problems)
    record["overlap"] = {first: {name: len(ids) for name, ids in second.items()} for first, second in found.items()}
    shared = [
        f"{len(ids)} of {sizes[second]} {second} problems are in {first} too ({first_few(ids)})"
        for first, seconds in found.items()
        for second, ids in seconds.items()
        if ids
    ]
    if not shared:
        return record
    words = f"{arguments.dataset}: {'; '.join(shared)}: the same texts and pictures"
    if not arguments.allow_overlap and known_dataset_name(arguments.dataset) not in PUBLISHED:
        raise ValueError(
            f"{words}. Scores would be of problems that were trained or chosen on: take them out of one split, or say "
            f"--allow_overlap true; the card then says it."
        )
    logger.warning("%s; the card says it", words)
    return record
