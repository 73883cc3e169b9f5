"""Self-consistency: the aggregated answer of several sampled rationales (Wang et al. 2023, arXiv 2203.11171).

This file only aggregates: the pipeline and `mmcot.predict` sample the rationales.
"""

from collections import Counter
from typing import Any

import torch

from .stage_mmcot import Stage

TEMPERATURE = 0.7  # default temperature for sampling


def majority_answer(samples: list[dict], problem: dict, stage: Stage) -> dict:
    """
    Aggregate several samples into one prediction.

    The answer is the choice with the highest mean probability; without choices, the most frequent text. The prediction
    consists of the columns of the first sample with that answer, the mean `scores`, the `rationales` of all samples,
    and `agreement`, the share of samples with that answer.
    """
    columns: dict[str, Any] = {}
    if problem["choices"]:
        scores = torch.tensor([sample["scores"] for sample in samples], dtype=torch.float64).mean(dim=0)
        answer = int(scores.argmax())
        columns = {"answer": answer, "scores": scores.tolist()}
        agreeing = [sample for sample in samples if sample["answer"] == answer]
        written = {name: value for name, value in samples[0].items() if name != "answer_text"}
        rendered = stage.render_target({**problem, **written, "answer": answer})
        columns["answer_text"] = agreeing[0]["answer_text"] if agreeing else rendered
    else:
        ((text, _),) = Counter(sample["answer_text"] for sample in samples).most_common(1)
        agreeing = [sample for sample in samples if sample["answer_text"] == text]
    columns["agreement"] = len(agreeing) / len(samples)
    columns["rationales"] = [sample.get("rationale", "") for sample in samples]
    return {**(agreeing or samples)[0], **columns}
