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
from mmcot.known_datasets import known_as
from mmcot.pictures import ContentKeys
from mmcot.run_folder import BASE, is_adapted
from modeling_mmcot import MMCoTProcessor

WEIGHTS = ("*.safetensors",)
# What decides the predictions of a model's folder.
MODEL_FILES = (*WEIGHTS, "*.safetensors.index.json", "*config.json", "tokenizer.json")
# Of `mmcot.predict`, what changes the predictions.
PREDICT_OPTIONS = ("decode_answer", "bf16", "features", "captions")
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
    base = folder / BASE if is_adapted(folder) else folder
    return folders_digest([base, own] if (own / "adapter_config.json").is_file() else [own], WEIGHTS)


def origin_of_scores(
    predictions_file: Path, dataset: str, split: str, selection: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    What scores are of, as far as it is said beside the predictions.

    Args:
        selection: which of the split's problems they are of, as `mmcot.evaluate` was told.

    Returns:
        `dataset`, `dataset_known_as`, `split`, `predict_options` and `evaluate_options` (by the commands' names, as far
        as they are not the usual), and `weights`, each stage's digest, where it is known.
    """
    meta = read_json(meta_file(predictions_file)) if meta_file(predictions_file).is_file() else {}
    selected = {name: value for name, value in (selection or {}).items() if value}
    options = {name: meta[name] for name in PREDICT_OPTIONS if meta.get(name)}
    if meta.get("num_rationales", 1) > 1:
        options |= {name: meta[name] for name in ("num_rationales", "temperature", "seed")}
    some = {name: value for name, value in selected.items() if name not in ("allow_missing", "by")}
    origin = {"dataset": dataset, "dataset_known_as": known_as(dataset), "split": split}
    origin |= {"predict_options": some | options, "evaluate_options": selected}
    return origin | ({"weights": meta["weights"]} if meta.get("weights") else {})


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
