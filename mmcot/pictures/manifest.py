"""The manifest of a feature store, `manifest.json`: how its features were computed, and the layout of a row.

The tower is identified by a digest of its weights, so a store fits a model regardless of where the tower was loaded
from.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from mmcot.pictures.reading import PICTURE_CODE, PICTURE_LIBRARIES
from mmcot.storage.caches import code_digest, versions_of
from mmcot.storage.digests import sha256_of_json
from mmcot.storage.files import read_json, write_json
from modeling_mmcot import vision_mmcot

MANIFEST = "manifest.json"
PRODUCERS = ("code", "versions")  # manifest entries that identify the code and libraries that computed the features

logger = logging.getLogger(__name__)


def read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} is not a feature store: it has no {MANIFEST}. python -m mmcot.features writes one.")
    manifest = read_json(file)
    if manifest.get("digest") != manifest_digest(manifest):
        raise ValueError(
            f"{file} was edited: its digest does not match its contents. Remove {folder} and compute it again."
        )
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(folder / MANIFEST, {**manifest, "digest": manifest_digest(manifest)})


def manifest_digest(manifest: dict[str, Any]) -> str:
    return sha256_of_json({name: value for name, value in manifest.items() if name != "digest"})


def record_type(fields: list[list]) -> np.dtype:
    for name, dtype, _ in fields:
        if dtype not in ("<f2", "<f4"):  # with an object dtype, numpy would interpret bytes of the file as addresses
            raise ValueError(f"{MANIFEST}: record has {name} of type {dtype!r}; expected '<f2' or '<f4'.")
    return np.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in fields])


def fields_of(record: np.dtype) -> list[list]:
    return [[name, record[name].base.str, list(record[name].shape)] for name in record.names]


def producers_of(tower: PreTrainedModel) -> dict[str, Any]:
    """Return digests and versions of the code and the libraries that compute a tower's features."""
    libraries = [*PICTURE_LIBRARIES, "torch", *(["timm"] if tower.config.model_type == "timm_wrapper" else [])]
    return {"code": code_digest(*PICTURE_CODE, vision_mmcot), "versions": versions_of(*libraries)}


def warn_of_other_producers(folder: Path, manifest: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn if other code or libraries computed the features. The user decides about recomputing, which is slow."""
    there, here = ({"mmcot's code": made.get("code"), **made.get("versions", {})} for made in (manifest, now))
    differing = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if differing and "versions" in now:
        details = ", ".join(
            f"{name} {shorten(there.get(name))} there, {shorten(here.get(name))} here" for name in differing
        )
        logger.warning(
            "%s contains features that other code or libraries computed (%s): current ones may differ.",
            folder,
            details,
        )


def shorten(value: str | None) -> str:
    """Return a version unchanged, or the first 12 characters of a digest."""
    return "unknown" if value is None else value[:12]


def weights_digest(tower: PreTrainedModel) -> str:
    """Return a digest of the weights rounded to bfloat16, so that a bfloat16 copy of the tower has the same digest."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        rounded = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        digest.update(name.encode())
        digest.update(rounded.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tower_settings(vision_config: PreTrainedConfig) -> dict[str, Any]:
    """Return the configuration fields that determine a tower's output, without its origin and its file's precision."""
    settings = json.loads(vision_config.to_json_string())
    for name in (
        "_name_or_path",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "id2label",
        "label2id",
    ):
        settings.pop(name, None)
    return settings


def settings_of(image_processor: BaseImageProcessor | None) -> dict[str, Any]:
    return {} if image_processor is None else json.loads(json.dumps(image_processor.to_dict()))
