"""Mixes the examples of several stages for the training of one model (`share_weights`).

The model recognizes the stage of an example by the words of the stage's source template.
"""

import datasets
from datasets import Dataset, IterableDataset

from mmcot.problems.progress_bars import without_dataset_bars
from modeling_mmcot.stage_mmcot import Stage, Stages


def mix(stages: Stages, examples: list[Dataset | IterableDataset], seed: int) -> Dataset | IterableDataset:
    """
    Return the examples of all stages in random order; those of a single stage unchanged.

    Args:
        examples: the tokenized problems of each stage (`examples.tokenized`).
    """
    if len(stages) == 1:
        return examples[0]
    pairs = zip(stages, examples, strict=True)
    with without_dataset_bars():
        mixture = datasets.concatenate_datasets([with_pictures_read(rows, stage) for stage, rows in pairs])
        return mixture.shuffle(seed=seed, keep_in_memory=True)


def with_pictures_read(examples: Dataset, stage: Stage) -> Dataset:
    """Return the examples of a stage, without their pictures if the stage reads none."""
    if stage.sees_pictures:
        return examples
    feature, images = examples.features["images"], [[] for _ in range(len(examples))]
    return examples.remove_columns("images").add_column("images", images, feature=feature)
