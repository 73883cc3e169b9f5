"""Where a file of predictions comes from: what was run, on what, and how; kept beside it as `NAME.meta.json`."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from transformers.utils import cached_file

from mmcot.pictures import ContentKeys
from modeling_mmcot import MMCoTProcessor

VERSIONS = ("torch", "transformers", "peft", "datasets", "accelerate")


def meta_file(predictions_file: Path) -> Path:
    return predictions_file.with_suffix(".meta.json")


def provenance(
    model: str, processor: MMCoTProcessor, models: Mapping[str, PreTrainedModel], problems: Dataset
) -> dict[str, Any]:
    """
    Args:
        model: a finished run, a folder in the Hub's layout, or a Hub id.
        models: of each stage, loaded from it.
    """
    folder = Path(model) / "hub" if (Path(model) / "hub").is_dir() else Path(model)
    return {
        "model": str(folder.resolve()) if folder.is_dir() else model,
        "revision": weights_digest(folder) if folder.is_dir() else commit_of(model),
        "dataset_fingerprint": problems_digest(problems),
        "n": len(problems),
        "stages": [asdict(stage) for stage in processor.stages],
        "decoding": {stage.name: models[stage.name].generation_config.to_diff_dict() for stage in processor.stages},
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }


def commit_of(repository: str) -> str:
    """Of a Hub id, the commit that was loaded: the name of its snapshot on this machine."""
    return Path(cached_file(repository, "config.json")).parent.name


def weights_digest(folder: Path) -> str:
    """Of all weights in a folder and below it, by their places."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def problems_digest(problems: Dataset) -> str:
    """Of the problems' columns and of their pictures' content, wherever those lie."""
    digest, key_of = hashlib.sha256(), ContentKeys()
    for row in problems:
        pictures = [key_of(picture) for picture in row["images"]]
        digest.update(json.dumps({**row, "images": pictures}, sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()}"
