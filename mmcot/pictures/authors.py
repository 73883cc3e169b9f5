"""Converts the authors' feature files (detr.npy, clip.npy, resnet.npy, vit.pth) to a feature store."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from mmcot.pictures.feature_writer import FeatureWriter
from mmcot.pictures.featurizer import DTYPES
from mmcot.problems.schema import first_few
from mmcot.storage.files import read_json
from modeling_mmcot.vision_mmcot import TOWERS

# The authors' name for a kind of features (in their utils_data.py) -> the tower that computed them.
AUTHORS_TOWERS = {"detr": "detr", "vit": "vit", "clip": "clip", "resnet": "resnet_pooled"}


def import_authors_features(
    problems: Dataset, folder: str | Path, vision: str, features_file: str, name_map_file: str, dtype: str = "float16"
) -> None:
    """
    Write a feature store from a feature file of the authors. The rows of the store are identified by problem id.

    Args:
        vision: the kind of features, a name in `AUTHORS_TOWERS`.
        name_map_file: the authors' name_map.json, problem id -> row of the file.

    Raises:
        ValueError: the file is damaged or has rows of another shape, or the name map lacks a problem with a picture.
    """
    tower = TOWERS[AUTHORS_TOWERS[vision]]
    shape = (tower.num_patches // tower.repeats, tower.hidden_size)
    num_rows, *found = open_authors_features(features_file).shape
    # Files with one pooled vector per picture have no patch dimension.
    if tuple(found) not in (shape, shape[-1:] if shape[0] == 1 else shape):
        raise ValueError(
            f"{features_file} contains rows of shape {tuple(found)}; expected {shape} for {vision} features."
        )
    name_map = read_json(name_map_file)
    rows = problems.select_columns(["id", "images"])
    absent = [row["id"] for row in rows if row["images"] and row["id"] not in name_map]
    if absent:
        raise ValueError(f"{name_map_file} lacks {len(absent)} problems that have a picture: {first_few(absent)}.")
    sources = {id_: row_number(name_map, id_, num_rows, name_map_file) for id_ in problems["id"] if id_ in name_map}
    settings = {
        "tower": None,
        "vision_tower": AUTHORS_TOWERS[vision],
        "vision_config": None,
        "dtype": dtype,
        "repeats": tower.repeats,
        "keys": "id",
        "source": Path(features_file).name,
    }
    with FeatureWriter(Path(folder), settings) as writer:
        todo = [id_ for id_ in sources if id_ not in writer.keys]
        for start in tqdm(range(0, len(todo), 64), desc="importing", unit="batch"):
            ids = todo[start : start + 64]
            # Reopened for each batch, because all pages that were read stay in memory while a mapping is open.
            features = open_authors_features(features_file)
            batch = np.zeros(len(ids), dtype=[("features", DTYPES[dtype], shape)])
            with np.errstate(over="ignore"):  # the writer rejects values that overflow
                for index, id_ in enumerate(ids):
                    batch["features"][index] = features[sources[id_]].reshape(shape)
            writer.add(ids, batch)


def open_authors_features(file: str) -> np.ndarray:
    """Memory-map the rows of the file without reading them."""
    try:
        if Path(file).suffix == ".npy":
            return np.load(file, mmap_mode="r", allow_pickle=False)
        tensor = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if isinstance(tensor, torch.Tensor):
            return tensor.numpy()
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is not a complete feature file: {error}") from error
    raise ValueError(f"{file} contains a {type(tensor).__name__}; expected one tensor.")


def row_number(name_map: dict[str, Any], problem_id: str, num_rows: int, file: str) -> int:
    row = name_map[problem_id]
    if not str(row).isdigit() or int(row) >= num_rows:
        raise ValueError(f"{file}: {problem_id!r} is {row!r}; expected a row of the file, 0 to {num_rows - 1}.")
    return int(row)
