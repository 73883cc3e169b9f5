"""Retrieve passages for many problems, for a stage that retrieves.

The query cannot contain a gold column. Gold lectures are used only to leave out passages
(`mmcot/retrieval/exclusion.py`).
"""

from datasets import Dataset

from mmcot.prediction.columns import with_columns
from mmcot.problems.schema import with_column, without_gold
from mmcot.retrieval.exclusion import exclusion_of, search_with_exclusions
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.retrieval_mmcot import to_dict
from modeling_mmcot.stage_mmcot import Stage


def add_passages(
    predictions: dict[str, dict],
    processor: MMCoTProcessor,
    stage: Stage,
    problems: Dataset,
    gold_problems: Dataset | None = None,
) -> None:
    """
    Add the passages that a stage retrieves to `predictions`, for every problem.

    Args:
        problems: rows of the schema; the columns of earlier stages are in `predictions`.
        gold_problems: the same problems with their gold lectures, whose copies `exclude_verbatim` leaves out; by
            default `problems`.
    """
    rows = with_columns(problems, predictions, processor.stages.before(stage))
    found = retrieve(rows, processor, stage, problems if gold_problems is None else gold_problems)
    for problem_id, passages in zip(problems["id"], found, strict=True):
        predictions.setdefault(problem_id, {})[stage.writes] = passages


def with_passages(problems: Dataset, processor: MMCoTProcessor, stage: Stage) -> Dataset:
    """Return problems that have the columns a stage reads, with the passages that the stage retrieves."""
    return with_column(problems, stage.writes, retrieve(problems, processor, stage, problems))


def retrieve(rows: Dataset, processor: MMCoTProcessor, stage: Stage, gold_problems: Dataset) -> list[list[dict]]:
    """Return the passages for each row, best first; see `add_passages`."""
    queries = [stage.render_source(row) for row in without_gold(rows).remove_columns("images")]
    gold = gold_problems.select_columns(["id", "split", "lecture"])
    exclusions = [exclusion_of(problem, stage.exclude_verbatim) for problem in gold]
    found = search_with_exclusions(processor.searchers[stage.name], queries, stage.num_passages, exclusions)
    return [[to_dict(passage) for passage in passages] for passages in found]
