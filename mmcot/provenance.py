"""Where a file of predictions comes from: what was run, on what, and how; kept beside it as `NAME.meta.json`."""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from mmcot.feature_store import FeatureStore
from mmcot.features import commit_of
from mmcot.files import read_json
from mmcot.pictures import ContentKeys
from modeling_mmcot import MMCoTProcessor

WEIGHTS = ("*.safetensors",)
# What decides the predictions of a model's folder.
MODEL_FILES = (*WEIGHTS, "*.safetensors.index.json", "*config.json", "tokenizer.json")
VERSIONS = ("torch", "transformers", "peft", "datasets", "accelerate")


def meta_file(predictions_file: Path) -> Path:
    """`NAME.meta.json` beside `NAME.json`."""
    return predictions_file.with_name(predictions_file.name.removesuffix(".json") + ".meta.json")


def provenance(
    model: str,
    processor: MMCoTProcessor,
    models: Mapping[str, PreTrainedModel],
    problems: Dataset,
    store: FeatureStore | None = None,
) -> dict[str, Any]:
    """
    Args:
        model: a finished run, a folder in the Hub's layout, or a Hub id.
        models: of each stage, loaded from it.
        store: what stands in for the pictures.
    """
    folder = Path(model) / "hub" if (Path(model) / "hub").is_dir() else Path(model)
    folders = [folder, *(folder / stage.name for stage in processor.stages)]
    return {
        "model": str(folder.resolve()) if folder.is_dir() else model,
        "revision": folders_digest(folders, MODEL_FILES) if folder.is_dir() else commit_of(model, None),
        "weights": weights_of(model, processor),
        "dataset_fingerprint": problems_digest(problems),
        "n": len(problems),
        "max_images": min(models[stage.name].config.max_images for stage in processor.stages),
        "features_made_from": None if store is None else store.manifest,
        "stages": [asdict(stage) for stage in processor.stages],
        "decoding": {stage.name: models[stage.name].generation_config.to_diff_dict() for stage in processor.stages},
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }


def weights_of(model: str, processor: MMCoTProcessor) -> dict[str, str] | None:
    """Of each stage's model in a run or a folder; None of a repository, which says its commit."""
    folder = Path(model)
    return {stage.name: stage_weights(folder, stage.name) for stage in processor.stages} if folder.is_dir() else None


def stage_weights(folder: Path, stage: str) -> str:
    """Of a stage in a run's folder or one in the Hub's layout, with those of the base where it is an adapter."""
    own = folder / stage if (folder / stage).is_dir() else folder
    base = folder / "base" if (folder / "base").is_dir() else folder
    return folders_digest([base, own] if (own / "adapter_config.json").is_file() else [own], WEIGHTS)


def scored_weights(predictions_file: Path) -> dict[str, dict[str, str]]:
    """`{"weights": …}` of what made a file of predictions, as far as it is said beside it."""
    meta = read_json(meta_file(predictions_file)) if meta_file(predictions_file).is_file() else {}
    return {"weights": meta["weights"]} if meta.get("weights") else {}


def folders_digest(folders: Iterable[Path], patterns: Sequence[str]) -> str:
    """Of the files of those names that lie in the folders, by their places."""
    digest = hashlib.sha256()
    for number, folder in enumerate(folders):
        for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
            digest.update(f"{number}/{file.name}".encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def problems_digest(problems: Dataset) -> str:
    """Of the problems' columns and their pictures' content, wherever those lie; of a file that is absent its name."""
    digest, key_of = hashlib.sha256(), ContentKeys()
    for row in problems:
        pictures = [
            key_of(picture) if picture["bytes"] or Path(picture["path"]).is_file() else picture["path"]
            for picture in row["images"]
        ]
        digest.update(json.dumps({**row, "images": pictures}, sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()}"
