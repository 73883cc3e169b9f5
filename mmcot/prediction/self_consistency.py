"""Several texts for each problem, drawn alike in whatever process. What they agree on: `self_consistency_mmcot.py`.

How a batch is written is `pipeline_mmcot.py`'s, how a split is walked over `predict.py`'s.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from mmcot.storage.journal import Batch


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
