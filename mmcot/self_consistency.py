"""Several texts for each problem, and the answer that they agree on (Wang et al. 2023, arXiv 2203.11171).

How a batch is written is `pipeline_mmcot.py`'s, how a split is walked over `predict.py`'s.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from mmcot.journal import Batch
from modeling_mmcot.processing_mmcot import Stage


@dataclass(frozen=True)
class Sample:
    """One of several texts that are drawn for each problem: the same one in whatever process, and after a kill."""

    number: int
    temperature: float
    seed: int

    def begin(self, ids: Batch) -> dict[str, Any]:
        """Seeds the drawing for a batch, and gives the settings of `generate`."""
        drawn = hashlib.sha256(json.dumps([self.seed, self.number, ids]).encode()).digest()
        torch.manual_seed(int.from_bytes(drawn[:8], "big") >> 1)
        return {"do_sample": True, "num_beams": 1, "temperature": self.temperature}


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
