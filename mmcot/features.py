"""Pictures -> features, computed once into a store (`feature_store.py`), or taken over from the authors' own files.

    python -m mmcot.features DATASET --vision CHECKPOINT_OR_NAME --output DIR [--preprocessing paper] [--dtype float16]
    python -m mmcot.features DATASET --vision detr --import_features detr.npy --name_map name_map.json --output DIR
    python -m mmcot.features DATASET --captions MODEL --output DIR

Each distinct picture is computed once, by its content, whatever problems show it. One that cannot be decoded is named
and left out, and the exit code says so. Captions are `captions.py`'s, towers `vision_mmcot`'s.
"""

import argparse
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING

from mmcot.captions import write_captions
from mmcot.feature_store import FeatureWriter, fields_of, settings_of, tower_settings
from mmcot.files import read_json
from mmcot.problems import SPLITS, distinct_pictures, first_few, load_problems, read_picture
from modeling_mmcot.pictures_mmcot import as_rgb, build_image_processor, stack_pixels
from modeling_mmcot.vision_mmcot import (
    TOWERS,
    checkpoint_of,
    encode_pictures,
    find_tower,
    load_vision_tower,
    tower_name,
    without_unread_parts,
)

logger = logging.getLogger(__name__)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float16": "<f2", "float32": "<f4"}
PREPROCESSINGS = ("checkpoint", "paper")

# The authors' published files (their utils_data.py): the kind of features -> the tower that it came from.
AUTHORS_TOWERS = {"detr": "detr", "vit": "vit", "clip": "clip", "resnet": "resnet_pooled"}


@dataclass
class Featurizer:
    """
    A tower with all that goes with it.

    Args:
        tower: the picture tower.
        name (`str`, *optional*): its name in `TOWERS`.
        image_processor: what prepares a picture for it.
        detector (*optional*): the detection model that it is part of, whose heads say what each patch found.
    """

    tower: PreTrainedModel
    name: str | None
    image_processor: BaseImageProcessor
    detector: PreTrainedModel | None = None

    @torch.no_grad()
    def __call__(self, pictures: list, dtype: str) -> np.ndarray:
        """A record for each RGB picture."""
        pixels = [[self.image_processor(picture, return_tensors="pt")["pixel_values"][0]] for picture in pictures]
        inputs = {name: value.to(self.tower.device) for name, value in stack_pixels(pixels).items()}
        patches, _ = encode_pictures(self.tower, self.name, **inputs)
        patches = patches[:, : patches.shape[1] // self.repeats]
        columns = {"features": (DTYPES[dtype], patches)}
        if self.detector is not None:
            boxes = self.detector.bbox_predictor(patches).sigmoid()
            probabilities = self.detector.class_labels_classifier(patches).softmax(dim=-1)
            columns["boxes"] = (DTYPES["float32"], boxes)
            columns["class_scores"] = (DTYPES["float32"], probabilities[..., :-1].amax(dim=-1))  # the last: no object
        record = np.dtype([(name, dtype, tuple(values.shape[1:])) for name, (dtype, values) in columns.items()])
        rows = np.zeros(len(pictures), dtype=record)
        for name, (_, values) in columns.items():
            rows[name] = values.float().cpu().numpy()
        if not np.isfinite(rows["features"]).all():
            raise ValueError(f"The tower's features do not fit into {dtype}; take --dtype float32.")
        return rows

    @property
    def repeats(self) -> int:
        return find_tower(self.tower.config, self.name).repeats


def load_featurizer(vision: str, preprocessing: str = "checkpoint", revision: str | None = None) -> Featurizer:
    """
    Args:
        vision: a checkpoint of a picture tower, or a name in `TOWERS`.
        preprocessing: `checkpoint` (its own image processor) or `paper` (as the authors' extract_features.py).
    """
    checkpoint = checkpoint_of(vision)
    image_processor = load_image_processor(vision, preprocessing, revision)
    detector = load_detector(checkpoint, revision)
    if detector is not None:
        tower = without_unread_parts(detector.model)
    else:
        tower = load_vision_tower(checkpoint, revision=revision).eval().to(DEVICE)
    return Featurizer(tower, tower_name(vision), image_processor, detector)


def load_detector(checkpoint: str, revision: str | None) -> PreTrainedModel | None:
    """The detection model that the tower is part of, if the checkpoint is of one and holds its heads."""
    if type(AutoConfig.from_pretrained(checkpoint, revision=revision)) not in MODEL_FOR_OBJECT_DETECTION_MAPPING:
        return None
    detector, info = AutoModelForObjectDetection.from_pretrained(
        checkpoint, revision=revision, output_loading_info=True
    )
    if info["missing_keys"]:
        logger.warning("%s holds no detection heads: boxes and class scores are not kept", checkpoint)
        return None
    return detector.eval().to(DEVICE)


def load_image_processor(
    vision: str, preprocessing: str = "checkpoint", revision: str | None = None
) -> BaseImageProcessor:
    """What prepares a picture for a tower: the checkpoint's own, or what the authors' extract_features.py does."""
    checkpoint = checkpoint_of(vision)
    if preprocessing == "checkpoint":
        return AutoImageProcessor.from_pretrained(checkpoint, revision=revision, backend="pil")
    config = AutoConfig.from_pretrained(checkpoint, revision=revision)
    settings = find_tower(getattr(config, "vision_config", config)).paper_image_processor
    if settings is None:
        published = [name for name, tower in TOWERS.items() if tower.paper_image_processor is not None]
        raise ValueError(
            f"preprocessing 'paper' is known for {' and '.join(published)}, which the authors published; {vision} is "
            f"of model_type {config.model_type!r}."
        )
    return build_image_processor(settings)


def compute(
    problems: Dataset,
    folder: str | Path,
    vision: str,
    preprocessing: str = "checkpoint",
    dtype: str = "float16",
    batch_size: int = 8,
    revision: str | None = None,
) -> list[str]:
    """
    Write the features of all distinct pictures of the problems, or those that the store lacks.

    Returns:
        The pictures that could not be decoded, an error message each. All others are in the store.
    """
    featurizer = load_featurizer(vision, preprocessing, revision)
    writer = FeatureWriter(Path(folder))
    pictures = distinct_pictures(problems)
    if not pictures:
        raise ValueError(f"None of the {len(problems)} problems has a picture: there is nothing to compute.")
    failed: list[str] = []
    batches = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
    for batch in tqdm(batches, desc="features", unit="batch"):
        decoded = []
        for key, picture, problem_id in batch:
            if key in writer.keys:
                continue
            try:
                decoded.append((key, as_rgb(read_picture(picture, problem_id))))
            except ValueError as error:
                failed.append(str(error))
        if not decoded:
            continue
        rows = featurizer([picture for _, picture in decoded], dtype)
        writer.claim(
            {
                "tower": checkpoint_of(vision),
                "revision": getattr(featurizer.tower.config, "_commit_hash", None),
                "vision_tower": featurizer.name,
                "vision_config": tower_settings(featurizer.tower.config),
                "preprocessing": preprocessing,
                "image_processor": settings_of(featurizer.image_processor),
                "dtype": dtype,
                "record": fields_of(rows.dtype),
                "repeats": featurizer.repeats,
                "keys": "content",
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        )
        writer.add([key for key, _ in decoded], rows)
    return failed


def import_authors_features(
    problems: Dataset, folder: str | Path, vision: str, features_file: str, name_map_file: str, dtype: str = "float16"
) -> None:
    """
    A store from a feature file of the authors (detr.npy, clip.npy, resnet.npy, vit.pth), row by row by problem id.

    Args:
        vision: the kind of features, a name in `AUTHORS_TOWERS`.
        name_map_file: their name_map.json, problem id -> row of the file.
    """
    tower = TOWERS[AUTHORS_TOWERS[vision]]
    features = open_authors_features(features_file)
    shape = (tower.num_patches // tower.repeats, tower.hidden_size)
    # One pooled vector a picture comes without a dimension for patches.
    if features.shape[1:] not in (shape, shape[-1:] if shape[0] == 1 else shape):
        raise ValueError(
            f"{features_file} holds rows of shape {features.shape[1:]}; expected {shape} for {vision} features."
        )
    name_map = read_json(name_map_file)
    absent = [
        row["id"] for row in problems.select_columns(["id", "images"]) if row["images"] and row["id"] not in name_map
    ]
    if absent:
        raise ValueError(f"{name_map_file} lacks {len(absent)} problems that have a picture: {first_few(absent)}.")
    rows_by_id = {
        id_: row_number(name_map, id_, len(features), name_map_file) for id_ in problems["id"] if id_ in name_map
    }
    record = np.dtype([("features", DTYPES[dtype], shape)])
    writer = FeatureWriter(Path(folder))
    writer.claim(
        {
            "tower": None,
            "revision": None,
            "vision_tower": AUTHORS_TOWERS[vision],
            "vision_config": None,
            "preprocessing": None,
            "image_processor": None,
            "dtype": dtype,
            "record": fields_of(record),
            "repeats": tower.repeats,
            "keys": "id",
            "source": Path(features_file).name,
        }
    )
    todo = [id_ for id_ in rows_by_id if id_ not in writer.keys]
    for start in tqdm(range(0, len(todo), 64), desc="importing", unit="batch"):
        ids = todo[start : start + 64]
        rows = np.zeros(len(ids), dtype=record)
        for index, id_ in enumerate(ids):
            rows["features"][index] = features[rows_by_id[id_]].reshape(shape)
        writer.add(ids, rows)


def open_authors_features(file: str) -> np.ndarray:
    """The file's rows, mapped into memory and not read."""
    try:
        if Path(file).suffix == ".npy":
            return np.load(file, mmap_mode="r", allow_pickle=False)
        tensor = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is not a whole file of features: {error}") from error
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{file} holds a {type(tensor).__name__}; expected one tensor.")
    return tensor.numpy()


def row_number(name_map: dict[str, Any], problem_id: str, num_rows: int, file: str) -> int:
    row = name_map[problem_id]
    if not str(row).isdigit() or int(row) >= num_rows:
        raise ValueError(f"{file}: {problem_id!r} is {row!r}; expected a row of the file, 0 to {num_rows - 1}.")
    return int(row)


def load_all_splits(source: str, splits: Iterable[str], max_images: int | None, pictures: bool) -> Dataset:
    problems = [load_problems(source, split, max_images, pictures) for split in splits]
    return concatenate_datasets([part for part in problems if len(part)] or problems[:1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mmcot.features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", help="demo, a ScienceQA folder, or a .jsonl / .parquet file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--vision", help=f"a tower's checkpoint (folder or Hub id), or one of {', '.join(TOWERS)}")
    what.add_argument("--captions", metavar="MODEL", help="caption the pictures: an image-text-to-text checkpoint")
    parser.add_argument("--output", required=True, metavar="DIR", help="the store; one that is there is completed")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument(
        "--max_images", type=int, default=1, help="of a ScienceQA problem's pictures, the first so many"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--preprocessing", choices=PREPROCESSINGS, default="checkpoint")
    parser.add_argument("--revision", help="of the checkpoint")
    parser.add_argument(
        "--import_features", metavar="FILE", help="the authors' detr.npy, clip.npy, resnet.npy, vit.pth"
    )
    parser.add_argument("--name_map", metavar="FILE", help="with --import_features, their name_map.json")
    parser.add_argument("--prompt", help="with --captions, what the captioner is asked")
    arguments = parser.parse_args(argv)
    if (arguments.import_features is None) != (arguments.name_map is None):
        parser.error("--import_features and --name_map go together")
    if arguments.import_features is not None and arguments.vision not in AUTHORS_TOWERS:
        parser.error(f"with --import_features, --vision is one of {', '.join(AUTHORS_TOWERS)}")
    try:
        failed = run(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(
            "\n".join([*failed, f"error: {len(failed)} pictures were left out, the others are in {arguments.output}"])
        )
    print(f"written: {arguments.output}")


def run(arguments: argparse.Namespace) -> list[str]:
    imports = arguments.import_features is not None
    problems = load_all_splits(arguments.dataset, arguments.splits, arguments.max_images, pictures=not imports)
    if imports:
        import_authors_features(
            problems,
            arguments.output,
            arguments.vision,
            arguments.import_features,
            arguments.name_map,
            arguments.dtype,
        )
        return []
    if arguments.captions is not None:
        return write_captions(problems, arguments.output, arguments.captions, arguments.prompt, arguments.batch_size)
    return compute(
        problems,
        arguments.output,
        arguments.vision,
        arguments.preprocessing,
        arguments.dtype,
        arguments.batch_size,
        arguments.revision,
    )


if __name__ == "__main__":
    main()
