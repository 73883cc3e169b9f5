"""Trains a stage on gold inputs first and on generated inputs at the end (`inputs_from: mixed`).

This is scheduled sampling (Bengio et al. 2015, arXiv 1506.03099, section 2.4) for columns in place of tokens. At each
step, all columns of earlier stages are generated with the probability step / number of steps (the paper's linear decay
of gold inputs, from 1 to 0), otherwise gold. The draw depends on the seed, the step and the problem's id, so it is the
same in a resumed run and in each process. `stage.py` makes the two versions of each problem.
"""

import random
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from datasets import Dataset

from mmcot.problems.progress_bars import without_dataset_bars
from mmcot.training.trainer import NamedCollator, StageTrainer

GENERATED = {"input_ids": "generated_input_ids", "labels": "generated_labels"}
FLAGS = ["is_shortened", "is_cut"]


def join_versions(gold: Dataset, generated: Dataset) -> Dataset:
    """
    Join the examples of the same problems with gold and with generated inputs.

    Returns:
        The gold examples with the tokens of the generated ones (the columns in `GENERATED`). `is_shortened` and
        `is_cut` are true if they are true for one of the versions.
    """
    flags = {name: [any(pair) for pair in zip(gold[name], generated[name], strict=True)] for name in FLAGS}
    tokens = generated.select_columns(list(GENERATED)).rename_columns(GENERATED)
    with without_dataset_bars():
        return datasets.concatenate_datasets([gold.remove_columns(FLAGS), tokens, Dataset.from_dict(flags)], axis=1)


def is_generated(problem_id: str, step: int, num_steps: int, seed: int) -> bool:
    """Draw whether a problem has generated inputs at a step, with the probability step / num_steps."""
    return random.Random(f"{seed} {step} {problem_id}").random() < step / num_steps


class MixedCollator(NamedCollator):
    """
    Adds the texts with gold and with generated inputs to a batch of training examples: `versions`, with tensors of
    shape `(2 * batch_size, sequence_length)`, first all gold ones. Examples for evaluation have one version.
    """

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        batch = super().__call__(examples)
        if GENERATED["input_ids"] not in examples[0]:
            return batch
        generated = [{name: row[column] for name, column in GENERATED.items()} for row in examples]
        return {**batch, "versions": self.collate_texts([*examples, *generated])}


class MixedTrainer(StageTrainer):
    """Trains on gold or generated inputs, drawn at each step."""

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """Choose the inputs of a step's batches before the Trainer counts their target tokens."""
        return super().get_batch_samples(map(self.choose_inputs, epoch_iterator), num_batches, device)

    def choose_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Replace both versions of a batch's texts by the version that is drawn for each problem."""
        size = len(batch["ids"])
        rows = [
            index + size * is_generated(problem_id, self.state.global_step, self.state.max_steps, self.args.seed)
            for index, problem_id in enumerate(batch["ids"])
        ]
        chosen = {name: tensor[rows] for name, tensor in batch["versions"].items()}
        return {name: value for name, value in batch.items() if name != "versions"} | chosen
