"""Sample several texts for each problem, reproducibly; `self_consistency_mmcot.py` combines their answers."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from mmcot.storage.journal import Batch
from modeling_mmcot.self_consistency_mmcot import TEMPERATURE


@dataclass(frozen=True)
class Sample:
    """
    Settings of one of several sampled texts per problem. A text does not depend on the process that samples it, and is
    the same after a killed call resumes.
    """

    number: int
    temperature: float
    seed: int

    def begin(self, ids: Batch) -> dict[str, Any]:
        """Seed the sampling of a batch, and return the arguments of `generate`."""
        digest = hashlib.sha256(json.dumps([self.seed, self.number, ids]).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return {"do_sample": True, "num_beams": 1, "temperature": self.temperature}


@dataclass(frozen=True)
class Drawing:
    """
    Settings of self-consistency.

    Args:
        num_rationales: number of texts that each stage before the last one samples per problem; 1 disables sampling.
        temperature, seed: settings of the sampling.
    """

    num_rationales: int = 1
    temperature: float = TEMPERATURE
    seed: int = 42

    def samples(self) -> list[Sample | None]:
        """Return an entry for each pass over the stages; None means a pass without sampling."""
        if self.num_rationales == 1:
            return [None]
        return [Sample(number, self.temperature, self.seed) for number in range(self.num_rationales)]


NOT_DRAWN = Drawing()
