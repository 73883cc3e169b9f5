"""Add the columns of earlier stages to problems before a later stage reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from mmcot.problems.schema import first_few, with_column
from modeling_mmcot.stage_mmcot import KINDS, REJECTED, Stage


class MissingColumns(ValueError):
    """An earlier stage wrote its column for only some of the problems, or for none."""


def with_columns(
    problems: Dataset, predictions: Mapping[str, Mapping[str, Any]], earlier: Sequence[Stage], required: bool = False
) -> Dataset:
    """
    Return the problems with the columns that earlier stages wrote.

    Args:
        predictions: the written columns by problem id.
        required: whether every stage must have written its column; by default a stage without output is skipped.

    Raises:
        MissingColumns: a stage's column is missing for some problems.
    """
    for stage in earlier:
        texts = [predictions.get(problem_id, {}).get(stage.writes) for problem_id in problems["id"]]
        absent = [problem_id for problem_id, text in zip(problems["id"], texts, strict=True) if text is None]
        if len(absent) == len(texts) and not required:
            continue
        if absent:
            raise MissingColumns(
                f"{len(absent)} of {len(texts)} problems have no {stage.writes!r} from the {stage.name} stage: "
                f"{first_few(absent)}."
            )
        problems = with_column(problems, stage.writes, texts)
    return problems


def columns_after(predictions: dict[str, dict[str, Any]], stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
    """Return the columns as these stages wrote them, if a later stage has sent problems back and replaced some."""
    if any(KINDS[stage.kind].sends_back is not None for stage in stages):
        return predictions
    return {
        problem_id: {
            name: value for name, value in {**columns, **columns.get(REJECTED, {})}.items() if name != REJECTED
        }
        for problem_id, columns in predictions.items()
    }


def rejected_by(stage: Stage, prediction: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that a stage read and sent back, which later ones replaced; none for any other stage."""
    return prediction.get(REJECTED, {}) if stage.sends_back(prediction) else {}


def with_gold_columns(problems: Dataset, earlier: Sequence[Stage]) -> Dataset:
    """Return the problems with the columns that earlier stages with a model learn to write, rendered from gold."""
    rows = [with_gold(row, earlier) for row in problems.remove_columns("images")] if earlier else []
    for stage in earlier:
        problems = with_column(problems, stage.writes, [row[stage.writes] for row in rows])
    return problems


def with_gold(problem: dict[str, Any], earlier: Sequence[Stage]) -> dict[str, Any]:
    """Apply `with_gold_columns` to one problem, in place."""
    for stage in earlier:
        problem[stage.writes] = stage.render_target(problem)
    return problem
