"""What decides a run beside its recipe: its problems, and what the files hold that the recipe names.

It is recorded when a run begins, and compared whenever the same command is called again: what was trained and predicted
on other data than there are now is not gone on with. The settings themselves are `recipes.claim_run_folder`'s affair.
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
from mmcot.storage.digests import digest_of_folders
from mmcot.storage.files import read_json, write_json
from mmcot.storage.run_folder import RunFolder
from modeling_mmcot import MMCoTProcessor

logger = logging.getLogger(__name__)

CHECKPOINT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*config.json")
ABSENT = "-"


def inputs_of(
    recipe: Recipe,
    problems: Mapping[str, Dataset | IterableDataset],
    processor: MMCoTProcessor,
    store: FeatureStore | None,
) -> dict[str, Any]:
    """
    Returns:
        `problems`: by split and id the digests of texts (what is joined to them among these) and pictures, None of a
        stream; and the digest, or the Hub's commit, of each part that is made from files: `tokenizer`,
        `image_processor`, `features`, `model_name_or_path`, `vision_model_name_or_path`.
    """
    known = {
        split: None if isinstance(rows, IterableDataset) else problem_digests(rows) for split, rows in problems.items()
    }
    image_processor = processor.image_processor
    return {
        "problems": {
            split: digests and {name: " ".join(one or ABSENT for one in pair) for name, pair in digests.items()}
            for split, digests in known.items()
        },
        "tokenizer": digest(tokenizer_state(processor.tokenizer)),
        "image_processor": image_processor and digest(image_processor.to_json_string()),
        "features": store and features_digest(store, problems),
        "model_name_or_path": checkpoint_digest(
            recipe.model_config.model_name_or_path, recipe.model_config.model_revision
        ),
        "vision_model_name_or_path": checkpoint_digest(recipe.arguments.vision_model_name_or_path, None),
    }


def checkpoint_digest(name: str | None, revision: str | None) -> str | None:
    if name is None:
        return None
    return digest_of_folders([Path(name)], CHECKPOINT_FILES) if Path(name).is_dir() else commit_of(name, revision)


def features_digest(store: FeatureStore, problems: Mapping[str, Dataset | IterableDataset]) -> str:
    """Of the rows of these problems: others can be added to a store."""
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
    Compare with what the run in the folder was begun with; where nothing is recorded, record it.

    Raises:
        ValueError: what is other now, with counts. Nothing in the folder is touched.
    """
    if not folder.inputs.exists():
        if folder.trained_stages():
            logger.warning("%s does not say on which data it was begun; from now on it does", folder)
        write_json(folder.inputs, inputs)
        return
    before = read_json(folder.inputs)
    changes = [change for split in inputs["problems"] if (change := problems_change(before, inputs, split))]
    changes += [
        f"{name} has other content" for name in inputs if name != "problems" and before.get(name) != inputs[name]
    ]
    if changes:
        raise ValueError(
            f"{folder} holds a run that was begun with other data: {'. '.join(changes)}. Nothing in it was changed. "
            f"Choose another --output_dir, or bring back what was there."
        )


def problems_change(before: dict[str, Any], now: dict[str, Any], split: str) -> str | None:
    pairs = [inputs["problems"].get(split) for inputs in (before, now)]
    if None in pairs:
        return None if pairs[0] == pairs[1] else f"Of the {split} problems, digests are known only before or only now"
    digests = [
        {name: [None if part == ABSENT else part for part in pair.split()] for name, pair in one.items()}
        for one in pairs
    ]
    change = describe_difference(*digests)
    return change and f"Of {len(pairs[0])} {split} problems {change}"
