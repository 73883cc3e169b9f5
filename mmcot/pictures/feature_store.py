"""Reads the features of a dataset's pictures from disk, one row at a time; `feature_writer.py` writes them.

- A store consists of `manifest.json` (`manifest.py`), `rows.bin` (one record of fixed size per picture) and
  `rows.jsonl` (a line per batch with the keys of its rows).
- The key of a row is a digest of the picture's content or, in an imported store, the problem id. A row is memory-mapped
  for a single read and released, so reading a whole store does not fill the memory.
- A store that does not fit a model or a dataset raises an error that names the difference.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.image_processing_utils import BaseImageProcessor

from mmcot.pictures.manifest import (
    producers_of,
    read_manifest,
    record_type,
    settings_of,
    tower_settings,
    warn_of_other_producers,
    weights_digest,
)
from mmcot.problems.digests import ContentKeys
from mmcot.problems.schema import first_few
from mmcot.storage.resumable_log import read_log
from modeling_mmcot import MMCoTForConditionalGeneration
from modeling_mmcot.vision_mmcot import resolved_name

ROWS, KEYS = "rows.bin", "rows.jsonl"


class FeatureStore:
    """
    A finished feature store, opened for reading.

    Args:
        folder: the output folder of `python -m mmcot.features`.

    Raises:
        ValueError: a file is missing, truncated or edited; the message names it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.record = record_type(self.manifest["record"])
        keys = [key for batch in read_key_batches(self.folder) for key in batch]
        expected, found = len(keys) * self.record.itemsize, file_size(self.folder / ROWS)
        if expected != found:
            raise ValueError(
                f"{self.folder / ROWS} has {found} bytes; {len(keys)} rows of {self.record.itemsize} bytes are "
                f"{expected}. The file is truncated or still being written: run mmcot.features again."
            )
        self.rows = {key: row for row, key in enumerate(keys)}
        self.key_of = ContentKeys()

    @property
    def hidden_size(self) -> int:
        return self.record["features"].shape[1]

    @property
    def num_patches(self) -> int:
        return self.record["features"].shape[0] * self.manifest["repeats"]

    @property
    def needs_files(self) -> bool:
        """Whether rows are identified by picture content, which requires the files; imported rows have problem ids."""
        return self.manifest["keys"] == "content"

    def read(self, key: str) -> dict[str, np.ndarray]:
        """Return a copy of one record: `features` and, for a detector, `boxes` and `class_scores`."""
        offset = self.rows[key] * self.record.itemsize
        # Mapped for this row only, because all pages that were read stay in memory while a mapping is open.
        row = np.memmap(self.folder / ROWS, dtype=self.record, mode="r", offset=offset, shape=(1,))[0]
        return {name: np.array(row[name]) for name in self.record.names}

    def keys_of(self, problem: dict[str, Any]) -> list[str]:
        """Return the keys of the rows that a problem's pictures need."""
        if not self.needs_files:
            return [problem["id"]] if problem["images"] or problem["id"] in self.rows else []
        return [self.key_of(picture) for picture in problem["images"]]

    def features_of(self, problem: dict[str, Any]) -> torch.Tensor:
        """Return features of shape `(num_images * num_patches, hidden_size)`, the pictures concatenated."""
        features = [torch.from_numpy(self.read(key)["features"]) for key in self.keys_of(problem)]
        repeated = [patches.repeat(self.manifest["repeats"], 1) for patches in features]
        return torch.cat(repeated) if repeated else torch.zeros(0, self.hidden_size)

    def batch(self, problems: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Collate the features of problems, padded to the largest number of patches.

        Returns:
            `vision_features` `(batch_size, num_patches, hidden_size)` in float32 and `vision_mask`
            `(batch_size, num_patches)`; an empty dict if no problem of the batch has a picture.
        """
        features = [self.features_of(problem).float() for problem in problems]
        if not any(len(patches) for patches in features):
            return {}
        masks = [torch.ones(len(patches), dtype=torch.bool) for patches in features]
        return {
            "vision_features": torch.nn.utils.rnn.pad_sequence(features, batch_first=True),
            "vision_mask": torch.nn.utils.rnn.pad_sequence(masks, batch_first=True),
        }

    def check_problems(self, problems: Dataset) -> None:
        """Raise a `ValueError` with the ids of the problems whose pictures have no row."""
        absent = [row["id"] for row in problems if not all(key in self.rows for key in self.keys_of(row))]
        if absent:
            raise ValueError(
                f"{self.folder} has no features for the pictures of {len(absent)} of {len(problems)} problems: "
                f"{first_few(absent)}. Run mmcot.features on this dataset, with the same --max_images."
            )

    def check_model(self, model: MMCoTForConditionalGeneration, image_processor: BaseImageProcessor | None) -> None:
        """Raise a `ValueError` if the model has a tower and the features differ from its output."""
        config, tower = model.config, model.encoder.vision_tower
        self.require_equal("width of the patches", self.hidden_size, config.vision_hidden_size)
        name = config.vision_tower if tower is None else resolved_name(config.vision_config, config.vision_tower)
        if name is not None:
            self.require_equal("vision_tower", self.manifest["vision_tower"], name)
        if config.num_vision_tokens is not None:
            self.require_equal("patches of a picture", self.num_patches, config.num_vision_tokens)
        if tower is None or self.manifest["vision_config"] is None:
            return
        if not config.freeze_vision:
            raise ValueError(
                f"{self.folder} contains features of a fixed tower, but this model trains its tower: freeze_vision."
            )
        self.require_equal_fields("vision_config", self.manifest["vision_config"], tower_settings(config.vision_config))
        self.require_equal_fields("image_processor", self.manifest["image_processor"], settings_of(image_processor))
        warn_of_other_producers(self.folder, self.manifest, producers_of(tower))
        if tower.dtype != torch.float16:  # rounded twice, float16 weights can have another digest
            self.require_equal("weights of the tower", self.manifest["weights"], weights_digest(tower))

    def require_equal_fields(self, name: str, here: dict, there: dict) -> None:
        for field in sorted(here.keys() | there.keys()):
            self.require_equal(f"{name}.{field}", here.get(field), there.get(field))

    def require_equal(self, name: str, here: Any, there: Any) -> None:
        if here != there:
            raise ValueError(f"{self.folder} does not fit: {name} is {here!r} in the store, {there!r} in the model.")


def read_key_batches(folder: Path) -> list[list[str]]:
    """Return the keys of each complete batch."""
    try:
        return read_log(folder / KEYS)
    except ValueError as error:
        raise ValueError(f"{error}: not a list of keys. Remove {folder} and compute it again.") from error


def file_size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
