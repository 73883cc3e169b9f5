"""Measures of the study of stages: right answers by skill, kinds of mistakes, and how errors travel through stages."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from mmcot.evaluation.hallucination import hallucination
from mmcot.evaluation.mistakes import sort_mistake

Columns = Mapping[str, Any]
Row = Mapping[str, Any]


def measure(problems: Dataset, predictions: Mapping[str, Columns]) -> dict[str, Any]:
    """
    Returns:
        `right`: for each skill, a text with 1 or 0 for each problem, in the order of the problems; `mistakes`: for each
        family, the number of mistakes of each kind (`evaluation.mistakes`); `columns`: for each text that a stage wrote
        (and gold has), the numbers of problems by whether the text and the answer are right; `hallucination`: that of
        the descriptions, or None.
    """
    rows = list(problems.remove_columns("images"))
    right: defaultdict[str, str] = defaultdict(str)
    mistakes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    columns: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row, images in zip(rows, problems["images"], strict=True):
        written = predictions[row["id"]]
        is_right = written["answer"] == row["answer"]
        right[row["skill"]] += str(int(is_right))
        verdict = sort_mistake({**row, "images": images}, written)
        if verdict is not None and not is_right:
            mistakes[row["topic"]][verdict.kind] += 1
        for name, is_text_right in right_texts(row, written).items():
            columns[name][f"{name_of(is_text_right)} text, {name_of(is_right)} answer"] += 1
    descriptions = {name: text["description"] for name, text in predictions.items() if "description" in text}
    return {
        "right": dict(right),
        "mistakes": {name: dict(counts) for name, counts in mistakes.items()},
        "columns": {name: dict(counts) for name, counts in columns.items()},
        "hallucination": hallucination(problems, descriptions),
    }


def accuracy_of(problems: Dataset, predictions: Mapping[str, Columns]) -> float:
    right = [
        predictions[name]["answer"] == answer for name, answer in zip(problems["id"], problems["answer"], strict=True)
    ]
    return 100 * sum(right) / len(right)


def name_of(is_right: bool) -> str:
    return "right" if is_right else "wrong"


def right_texts(row: Row, written: Columns) -> dict[str, bool]:
    """Return whether each written text equals gold; for passages, whether gold is among them."""
    right = {}
    if "description" in written:
        right["description"] = written["description"] == row["observation"]
    if "passages" in written and row["gold_passages"]:
        right["passages"] = set(row["gold_passages"]) <= {passage["id"] for passage in written["passages"]}
    if "knowledge" in written:
        right["knowledge"] = written["knowledge"] == row["lecture"]
    if "rationale" in written:
        right["rationale"] = written["rationale"].removeprefix("Solution: ") == row["solution"]
    return right
