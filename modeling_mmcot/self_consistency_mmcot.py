"""The answer that several drawn texts agree on (Wang et al. 2023, arXiv 2203.11171). It draws none itself."""

from collections import Counter
from typing import Any

import torch

from .stage_mmcot import Stage

TEMPERATURE = 0.7  # of the drawing, where nothing else is asked for


def agreed(samples: list[dict], problem: dict, stage: Stage) -> dict:
    """
    One prediction from those of several samples: the columns of the first that gives the answer agreed on, the mean
    `scores`, every sample's `rationales`, and `agreement`, the share of samples that give that answer.
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
