"""ScienceQA's scores for `evaluate`: `evaluate.load("metrics/mmcot_scienceqa").compute(predictions=…, references=…)`.

`metrics.py` and `uncertainty.py` in this folder compute the scores. They are copies of mmcot's modules; mmcot's tests
compare them. This file contains only the interface of `evaluate`.

Some imports below are unused: `evaluate.load` copies a module of this folder, and reports a missing package, only if
this file imports it. They have no comments, because `evaluate.load` reads a comment after an import as an address.
"""
# ruff: noqa: F401

from typing import Any

import datasets
import evaluate
import nltk
import rouge
import scipy

from .metrics import score
from .uncertainty import calibration

TEXT, TEXTS = datasets.Value("string"), datasets.List(datasets.Value("string"))
PREDICTION = {
    "id": TEXT,
    "answer": datasets.Value("int64"),
    "decoded_answer": datasets.Value("int64"),
    "scores": datasets.List(datasets.Value("float64")),
    "rationale": TEXT,
}
REFERENCE = {
    "id": TEXT,
    "choices": TEXTS,
    "answer": datasets.Value("int64"),
    "context": TEXT,
    "has_image": datasets.Value("bool"),
    "subject": TEXT,
    "grade": TEXT,
    "solution": TEXT,
    "rationales": TEXTS,
}

DESCRIPTION = """
Accuracy on ScienceQA by class of problem (subject, context, grade) with 95 % bootstrap intervals, BLEU-1, BLEU-4 and
ROUGE-L of rationales as computed in the literature, and calibration of the choices' probabilities.
"""
CITATION = """
@inproceedings{lu2022learn,
  title={Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question Answering},
  author={Lu, Pan and Mishra, Swaroop and Xia, Tony and Qiu, Liang and Chang, Kai-Wei and Zhu, Song-Chun and
    Tafjord, Oyvind and Clark, Peter and Kalyan, Ashwin},
  booktitle={NeurIPS},
  year={2022}
}
"""
INPUTS = """
Args:
    predictions: a dict for each problem: `id`, `answer` (the choice's index) and optionally `decoded_answer` (the index
        parsed from a generated text, -1 if unreadable), `scores` (a probability for each choice), `rationale`.
    references: the problems: `id`, `choices`, `answer`, `subject`, `grade`, `solution`, `context` (or `hint`), `images`
        (or `image`, or `has_image`), and `rationales` if a problem has several gold rationales.
Returns:
    The contents of the scores file of `python -m mmcot.evaluate`: `accuracy`, `decoded_accuracy`, `rationale`, `n`,
    `class_n`, `intervals`, `calibration`, `problems`.
"""


class ScienceQA(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": PREDICTION, "references": REFERENCE}),
            reference_urls=["https://scienceqa.github.io", "https://arxiv.org/abs/2302.00923"],
        )

    def add_batch(self, *, predictions: list[dict[str, Any]], references: list[dict[str, Any]]) -> None:
        """Add rows, with defaults for absent keys."""
        super().add_batch(
            predictions=[
                {name: row.get(name) for name in PREDICTION} | {"rationale": row.get("rationale") or ""}
                for row in predictions
            ],
            references=[reference(row) for row in references],
        )

    def _compute(self, predictions: list[dict[str, Any]], references: list[dict[str, Any]]) -> dict[str, Any]:
        problems = [{**row, "images": [None] * row["has_image"]} for row in references]
        predicted_rows = [{name: value for name, value in row.items() if value is not None} for row in predictions]
        num_repeated = len(predicted_rows) - len({row["id"] for row in predicted_rows})
        if num_repeated:
            raise ValueError(f"{num_repeated} of {len(predicted_rows)} predictions repeat an id")
        return score(problems, {row.pop("id"): row for row in predicted_rows})


def reference(row: dict[str, Any]) -> dict[str, Any]:
    has_image = row.get("has_image", bool(row.get("images") or row.get("image")))
    values = {**row, "has_image": has_image, "context": row.get("context", row.get("hint"))}
    empty = {name: "" if feature == TEXT else [] for name, feature in REFERENCE.items()}
    return {name: empty[name] if values.get(name) is None else values[name] for name in REFERENCE}
