"""Records how a run's problems were split, and how many problems two splits share: `splits.json` in the run folder.

A score on problems that were trained on is not valid. Shared problems are counted, and refused unless `allow_overlap`
is set; the card then reports their number.
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
# Published figures refer to the splits of these datasets, even if their splits share problems.
PUBLISHED = ("ScienceQA", "A-OKVQA")


def record_splits(recipe: Recipe, problems: Mapping[str, Dataset | IterableDataset]) -> dict[str, Any]:
    """
    Describe the splits of a run, and check that they share no problems.

    Returns:
        `divided_by`: the `split_seed`, None if the dataset has its own splits. `n`: the number of problems by split,
        None for a stream. `overlap`: for each pair of splits, the number of problems of the second split that the
        first split also contains; None if training problems are streamed.

    Raises:
        ValueError: two splits share problems, and `allow_overlap` is not set.
    """
    arguments = recipe.arguments
    sizes = {split: len(rows) if isinstance(rows, Dataset) else None for split, rows in problems.items()}
    divided = None if arguments.streaming or not is_divided(recipe.source, arguments.columns) else arguments.split_seed
    record: dict[str, Any] = {"divided_by": divided, "n": sizes, "overlap": None}
    if arguments.streaming:
        logger.warning("training problems are streamed: their overlap with validation and test problems is not checked")
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
    message = f"{arguments.dataset}: {'; '.join(shared)}: the same texts and pictures"
    if not arguments.allow_overlap and known_dataset_name(arguments.dataset) not in PUBLISHED:
        raise ValueError(
            f"{message}. Scores would include problems that were used for training or model selection: remove them "
            f"from one split, or set --allow_overlap true; the card then reports the overlap."
        )
    logger.warning("%s; the card reports the overlap", message)
    return record
