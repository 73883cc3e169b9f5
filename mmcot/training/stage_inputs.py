"""Selects the texts of the columns that an earlier stage writes and a stage reads in training (`inputs_from`).

`gold` renders them from the dataset's own columns, as the paper does. `generated` takes the texts that the earlier
stages write for their own training problems. `cross_fit` takes, for each problem, texts of stages that were trained
without it, so that a stage trains on the kind of texts that it reads in prediction. `mixed` takes gold texts at first
and generated texts at the end (`mixed_inputs.py`). This file trains and predicts nothing.
"""

import random

from datasets import Dataset
from jinja2 import meta

from mmcot.prediction.columns import MissingColumns, columns_after, with_columns
from mmcot.problems.schema import with_column
from mmcot.storage.checkpoints import RunStopped
from mmcot.storage.run_folder import RunFolder
from modeling_mmcot.stage_mmcot import ENVIRONMENT, Stage


def with_written_columns(problems: Dataset, earlier: list[Stage], folder: RunFolder, split: str) -> Dataset:
    """
    Return the problems with the columns that earlier stages wrote for the split.

    Raises:
        RunStopped: an earlier stage has not written its column for every problem.
    """
    try:
        return with_columns(problems, columns_after(folder.predictions_so_far(split), earlier), earlier, required=True)
    except MissingColumns as error:
        raise RunStopped(
            f"{folder.predictions(split)}: {error} That stage has to write the column for all problems (a cross-fitted "
            f"stage: in every fold) before a later stage is trained on it."
        ) from error


def one_row_per_rationale(problems: Dataset, stages: list[Stage]) -> Dataset:
    """
    Return one row for each gold rationale of a problem, with that rationale as its solution.

    Args:
        stages: stages whose targets are rendered from these problems. If no target uses the solution, the problems are
            returned unchanged.
    """
    rendered = [stage for stage in stages if stage.writes not in problems.column_names]
    if not any("solution" in target_columns(stage) for stage in rendered):
        return problems
    columns = zip(problems["rationales"], problems["solution"], strict=True)
    texts_by_problem = [rationales or [solution] for rationales, solution in columns]
    repeated = problems.select([index for index, texts in enumerate(texts_by_problem) for _ in texts])
    return with_column(repeated, "solution", [text for texts in texts_by_problem for text in texts])


def target_columns(stage: Stage) -> set[str]:
    """Return the names of the columns that a stage's target template uses."""
    return meta.find_undeclared_variables(ENVIRONMENT.parse(stage.target))


def assign_folds(num_problems: int, num_folds: int, seed: int) -> list[int]:
    """Draw the fold of each problem at random; the sizes of folds differ by at most one."""
    folds = [number % num_folds for number in range(num_problems)]
    random.Random(seed).shuffle(folds)
    return folds
