"""Digests of the inputs of a run apart from its settings: its problems, and the files that the recipe names.

They are recorded when a run starts, and compared whenever the same command is called again: a run does not resume with
data that changed since. `recipes.recipe.claim_run_folder` compares the settings.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.featurizer import commit_of
from mmcot.prediction.examples import tokenizer_state
from mmcot.problems.digests import describe_difference, digest, problem_digests
from mmcot.recipes.recipe import Recipe
from mmcot.retrieval.corpora import TEXT_FILES
from mmcot.storage.digests import digest_of_file, digest_of_folders
from mmcot.storage.files import read_json, write_json
from mmcot.storage.run_folder import RunFolder
from modeling_mmcot import MMCoTProcessor

logger = logging.getLogger(__name__)

CHECKPOINT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*config.json")
ABSENT = "-"


def input_digests(
    recipe: Recipe,
    problems: Mapping[str, Dataset | IterableDataset],
    processor: MMCoTProcessor,
    store: FeatureStore | None,
) -> dict[str, Any]:
    """
    Compute the digests of a run's inputs.

    Returns:
        `problems`: by split and id, the digests of a problem's texts (joined columns included) and of its pictures;
        None for a stream. For each part that is loaded from files its digest, or its commit on the Hub: `tokenizer`,
        `image_processor`, `features`, `model_name_or_path`, `vision_model_name_or_path`, `corpora`.
    """
    digests_by_split = {
        split: None if isinstance(rows, IterableDataset) else problem_digests(rows) for split, rows in problems.items()
    }
    image_processor = processor.image_processor
    return {
        "problems": {
            split: digests and {name: " ".join(part or ABSENT for part in pair) for name, pair in digests.items()}
            for split, digests in digests_by_split.items()
        },
        "tokenizer": digest(tokenizer_state(processor.tokenizer)),
        "image_processor": image_processor and digest(image_processor.to_json_string()),
        "features": store and features_digest(store, problems),
        "model_name_or_path": checkpoint_digest(
            recipe.model_config.model_name_or_path, recipe.model_config.model_revision
        ),
        "vision_model_name_or_path": checkpoint_digest(recipe.arguments.vision_model_name_or_path, None),
        "corpora": corpora_digests(recipe),
    }


def corpora_digests(recipe: Recipe) -> dict[str, str] | None:
    """Return the digest of each file or folder of passages; None without any. Lectures belong to the problems."""
    paths = sorted({corpus for stage in recipe.stages for corpus in stage.corpora or [] if Path(corpus).exists()})
    return {path: digest_of_path(Path(path)) for path in paths} or None


def digest_of_path(path: Path) -> str:
    if path.is_file():
        return digest_of_file(path)
    return digest_of_folders([path], [f"**/*{ending}" for ending in TEXT_FILES])


def checkpoint_digest(name: str | None, revision: str | None) -> str | None:
    """Return the digest of a checkpoint's local folder, or its commit on the Hub."""
    if name is None:
        return None
    return digest_of_folders([Path(name)], CHECKPOINT_FILES) if Path(name).is_dir() else commit_of(name, revision)


def features_digest(store: FeatureStore, problems: Mapping[str, Dataset | IterableDataset]) -> str:
    """Return the digest of these problems' features only: features of other problems can be added to a store."""
    keys = {
        key
        for rows in problems.values()
        if isinstance(rows, Dataset)
        for problem in rows.select_columns(["id", "images"])
        for key in store.keys_of(problem)
    }
    content = hashlib.sha256()
    for key in sorted(keys):
        for name, values in store.read(key).items():
            content.update(f"{key} {name}".encode() + values.tobytes())
    return content.hexdigest()


def check_unchanged(folder: RunFolder, inputs: dict[str, Any]) -> None:
    """
    Compare the inputs with those recorded in the run folder; record them if there is no record.

    Raises:
        ValueError: inputs changed; the message names them, with counts. The run folder is left unchanged.
    """
    if not folder.inputs.exists():
        if folder.trained_stages():
            logger.warning(
                "%s has no record of the data that its run started with; the current data are recorded now", folder
            )
        write_json(folder.inputs, inputs)
        return
    recorded = read_json(folder.inputs)
    changes = [change for split in inputs["problems"] if (change := describe_changes(recorded, inputs, split))]
    changes += [
        f"{name} has different content" for name in inputs if name != "problems" and recorded.get(name) != inputs[name]
    ]
    if changes:
        raise ValueError(
            f"{folder} contains a run that started with different data: {'. '.join(changes)}. Nothing in it was "
            f"changed. Choose another --output_dir, or restore the earlier data."
        )


def describe_changes(recorded: dict[str, Any], current: dict[str, Any], split: str) -> str | None:
    """Describe how the problems of a split changed; None if they are the same."""
    versions = [inputs["problems"].get(split) for inputs in (recorded, current)]
    if None in versions:
        if versions[0] == versions[1]:
            return None
        return f"The {split} problems are streamed, without digests, in only one of the recorded and the current data"
    digests = [
        {name: [None if part == ABSENT else part for part in pair.split()] for name, pair in pairs.items()}
        for pairs in versions
    ]
    change = describe_difference(*digests)
    return change and f"Of {len(versions[0])} {split} problems {change}"
