"""What a stage is trained on: of the columns that earlier stages write, the texts that its training problems hold.

`gold` renders them from the dataset's own columns, as the paper does. `generated` takes what the earlier stages write
for their own training problems. `cross_fit` takes, for each problem, what stages trained without it write, so that a
stage trains on texts of the kind that it will read. Nothing is trained or predicted here.
"""

import random

from datasets import Dataset
from jinja2 import meta

from mmcot.prediction.columns import MissingColumns, with_columns
from mmcot.problems.schema import with_column
from mmcot.storage.checkpoints import RunStopped
from mmcot.storage.run_folder import RunFolder
from modeling_mmcot.stage_mmcot import ENVIRONMENT, Stage


def with_written_columns(problems: Dataset, earlier: list[Stage], folder: RunFolder, split: str) -> Dataset:
    """
    The columns that earlier stages wrote for the split.

    Raises:
        RunStopped: one of them has not written for every problem yet.
    """
    try:
        return with_columns(problems, folder.predictions_so_far(split), earlier, required=True)
    except MissingColumns as error:
        raise RunStopped(
            f"{folder.predictions(split)}: {error} The stage has to write it for all problems before a later stage is "
            f"trained on it; a cross-fitted one, in every fold."
        ) from error


def one_row_per_rationale(problems: Dataset, stages: list[Stage]) -> Dataset:
    """
    Each problem as often as it has gold rationales, its solution another one of them each time.

    Args:
        stages: those whose targets are rendered of these problems; where none is made from the solution, the problems
            are as they were.
    """
    rendered = [stage for stage in stages if stage.writes not in problems.column_names]
    if not any("solution" in target_columns(stage) for stage in rendered):
        return problems
    columns = zip(problems["rationales"], problems["solution"], strict=True)
    every = [rationales or [solution] for rationales, solution in columns]
    repeated = problems.select([index for index, texts in enumerate(every) for _ in texts])
    return with_column(repeated, "solution", [text for texts in every for text in texts])


def target_columns(stage: Stage) -> set[str]:
    """The columns that a stage's target is made from."""
    return meta.find_undeclared_variables(ENVIRONMENT.parse(stage.target))


def fold_of_each(num_problems: int, num_folds: int, seed: int) -> list[int]:
    """The fold of each problem, drawn by chance; folds differ in size by one at most."""
    folds = [number % num_folds for number in range(num_problems)]
    random.Random(seed).shuffle(folds)
    return folds
