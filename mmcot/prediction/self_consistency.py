"""Several texts for each problem, the same in any number of processes; `self_consistency_mmcot.py` combines them."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from mmcot.storage.journal import Batch
from modeling_mmcot.self_consistency_mmcot import TEMPERATURE


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


@dataclass(frozen=True)
class Drawing:
    """
    Args:
        num_rationales: with more than one, each stage before the last one draws so many texts.
        temperature, seed: of that drawing.
    """

    num_rationales: int = 1
    temperature: float = TEMPERATURE
    seed: int = 42

    def samples(self) -> list[Sample | None]:
        """One entry for each pass over the stages; None for a text that is not drawn."""
        if self.num_rationales == 1:
            return [None]
        return [Sample(number, self.temperature, self.seed) for number in range(self.num_rationales)]


NOT_DRAWN = Drawing()
