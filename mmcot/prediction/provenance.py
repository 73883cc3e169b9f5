"""Record the origin of predictions and scores: the model, the problems and the options.

Weights are identified by a digest of the loaded files. `mmcot.storage.predictions` stores a predictions file together
with its origin.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.featurizer import commit_of
from mmcot.problems.digests import ContentKeys, digest_of_problems, recorded
from mmcot.problems.known_datasets import known_dataset_name
from mmcot.storage.digests import digest_of_file, digest_of_folders
from mmcot.storage.predictions import read_meta
from mmcot.storage.run_folder import SHARED, RunFolder
from modeling_mmcot import MMCoTProcessor
from modeling_mmcot.retrieval_mmcot import MANIFEST
from modeling_mmcot.stage_mmcot import Stage

WEIGHTS = ("*.safetensors", MANIFEST)  # the manifest identifies the index of a stage that retrieves
# The files of a model folder that determine its predictions.
MODEL_FILES = (*WEIGHTS, "*.safetensors.index.json", "*config.json", "tokenizer.json")
# Options of `mmcot.predict` that change the predictions.
PREDICT_OPTIONS = ("decode_answer", "bf16", "features", "captions")
VERSIONS = ("torch", "transformers", "peft", "datasets", "accelerate")


def provenance(
    model: str,
    processor: MMCoTProcessor,
    models: Mapping[str, PreTrainedModel],
    problems: Dataset,
    store: FeatureStore | None = None,
) -> dict[str, Any]:
    """
    Return the contents of a meta file: the origin of predictions.

    Args:
        model: a finished run, a folder in the Hub's layout, or a Hub id.
        models: the model of each stage, loaded from `model`.
        store: the feature store that replaces the pictures.
    """
    folder = Path(loaded_from(model))
    folders = [folder, *(folder / stage.name for stage in processor.stages)]
    return {
        "model": str(folder.resolve()) if folder.is_dir() else model,
        "revision": digest_of_folders(folders, MODEL_FILES) if folder.is_dir() else commit_of(model, None),
        "weights": weights_of(model, processor),
        "dataset_fingerprint": problems_digest(problems),
        "problems": digest_of_problems(problems),
        "n": len(problems),
        "max_images": min(models[stage.name].config.max_images for stage in processor.stages.with_models),
        "features_made_from": None if store is None else store.manifest,
        "stages": [asdict(stage) for stage in processor.stages],
        "decoding": {
            stage.name: models[stage.name].generation_config.to_diff_dict() for stage in processor.stages.with_models
        },
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }


def loaded_from(model: str) -> str:
    """Return the folder or repository that a system is loaded from: `hub/` of a finished run, else `model`."""
    exported = RunFolder(Path(model)).hub
    return str(exported) if exported.is_dir() else model


def weights_of(model: str, processor: MMCoTProcessor) -> dict[str, str] | None:
    """Return the weights digest of each stage of a run or folder; None for a repository, which has a commit instead."""
    folder = Path(loaded_from(model))
    return weights_by_stage(folder, processor) if folder.is_dir() else None


def weights_by_stage(folder: Path, processor: MMCoTProcessor) -> dict[str, str]:
    """Return the weights digest of each stage in a run's stage folders or in a folder in the Hub's layout."""
    run_folder = RunFolder(folder)
    return {stage.name: stage_weights(folder, training_name(run_folder, stage)) for stage in processor.stages}


def training_name(run_folder: RunFolder, stage: Stage) -> str:
    """Return the name of the folder that contains a stage's model or index in a run: its own, or `shared`."""
    return SHARED if stage.has_model and run_folder.is_shared else stage.name


def training_names(run_folder: RunFolder, processor: MMCoTProcessor) -> list[str]:
    """Return `training_name` of all stages, each name once."""
    return list(dict.fromkeys(training_name(run_folder, stage) for stage in processor.stages))


def check_export(run_folder: RunFolder, processor: MMCoTProcessor) -> None:
    """
    Check that the run's `hub/` contains the weights of its stages.

    Raises:
        ValueError: a stage was retrained after `hub/` was written, or its training is not finished.
    """
    trained = [name for name in training_names(run_folder, processor) if run_folder.stage(name).is_dir()]
    differing = [
        stage
        for stage in trained
        if not run_folder.is_trained(stage)
        or stage_weights(run_folder.path, stage) != stage_weights(run_folder.hub, stage)
    ]
    if differing:
        raise ValueError(
            f"{run_folder.hub} does not contain the weights of the run's stages ({', '.join(differing)}): they were "
            f"trained again after it was written. Run train.py to its end to write it again."
        )


def stage_weights(folder: Path, stage: str) -> str:
    """
    Return the weights digest of a stage in a run folder or a folder in the Hub's layout. The digest of an adapter
    covers its base too.
    """
    own = folder / stage if (folder / stage).is_dir() else folder
    run_folder = RunFolder(folder)
    base = run_folder.base if run_folder.is_adapted else folder
    return digest_of_folders([base, own] if (own / "adapter_config.json").is_file() else [own], WEIGHTS)


def origin_of_scores(
    predictions_file: Path,
    scores_file: Path,
    problems: Dataset,
    dataset: str,
    split: str,
    selection: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Return the origin of scores, from the arguments and the meta file beside the predictions.

    Args:
        scores_file: the file that the scores will be written to.
        problems: the scored problems, as loaded from `dataset`.
        selection: the options of `mmcot.evaluate` that select problems of the split.

    Returns:
        `dataset`, `dataset_known_as`, `split`, `predict_options` and `evaluate_options` (under the commands' option
        names, without defaults), `predictions` (the file's digest), `predictions_file` (its path relative to the scores
        file, so that a run can be moved), `problems_digest`, and, if known, `weights` (the digest of each stage).

    Raises:
        ValueError: the meta file beside the predictions belongs to other predictions (`predictions.read_meta`).
    """
    meta = read_meta(predictions_file) or {}
    selected = {name: value for name, value in (selection or {}).items() if value}
    options = {name: meta[name] for name in PREDICT_OPTIONS if meta.get(name)}
    if meta.get("num_rationales", 1) > 1:
        options |= {name: meta[name] for name in ("num_rationales", "temperature", "seed")}
    subset_options = {name: value for name, value in selected.items() if name not in ("allow_missing", "by")}
    origin = {"dataset": dataset, "dataset_known_as": known_dataset_name(dataset), "split": split}
    origin |= {"predict_options": subset_options | options, "evaluate_options": selected}
    origin |= {
        "predictions": digest_of_file(predictions_file),
        "predictions_file": Path(os.path.relpath(predictions_file, scores_file.parent)).as_posix(),
        "problems_digest": digest_of_problems(problems),
    }
    return origin | ({"weights": meta["weights"]} if meta.get("weights") else {})


def problems_digest(problems: Dataset) -> str:
    """Return a digest of columns and picture contents, independent of paths; an absent file contributes its name."""
    digest, key_of = hashlib.sha256(), ContentKeys()
    for row in problems:
        pictures = [
            key_of(picture) if picture["bytes"] or Path(picture["path"]).is_file() else picture["path"]
            for picture in row["images"]
        ]
        digest.update(json.dumps({**recorded(row), "images": pictures}, sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()}"
