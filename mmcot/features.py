"""Pictures -> features, computed once and kept in a folder: the feature store.

    python -m mmcot.features DATASET --vision CHECKPOINT_OR_NAME --output DIR [--preprocessing paper] [--dtype float16]
    python -m mmcot.features DATASET --vision detr --import_features detr.npy --name_map name_map.json --output DIR
    python -m mmcot.features DATASET --captions MODEL --output DIR

Notable:
- each distinct picture is computed once, whatever problems show it: rows are found by the file's content;
- a store is `manifest.json` (what made it), `rows.bin` (one record of fixed size a picture) and `rows.jsonl` (the keys
  of each batch, a line a batch, written after its rows). A kill loses the batch in hand, and the same command goes on;
- a row is mapped into memory when it is read and let go at once: reading all of a store keeps none of it resident;
- a store that does not fit a model or a dataset is refused with what differs.

Captions are `captions.py`'s, towers `vision_mmcot`'s.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING

from mmcot.captions import write_captions
from mmcot.files import read_json, write_json
from mmcot.problems import SPLITS, content_key, distinct_pictures, first_few, load_problems, read_picture
from modeling_mmcot.processing_mmcot import as_rgb, build_image_processor, stack_pixels
from modeling_mmcot.vision_mmcot import (
    TOWERS,
    checkpoint_of,
    encode_pictures,
    find_tower,
    load_vision_tower,
    without_unread_parts,
)

logger = logging.getLogger(__name__)

MANIFEST, ROWS, KEYS = "manifest.json", "rows.bin", "rows.jsonl"
DTYPES = {"float16": "<f2", "float32": "<f4"}
PREPROCESSINGS = ("checkpoint", "paper")

# The authors' published files (their utils_data.py): the kind of features -> the tower that it came from.
AUTHORS_TOWERS = {"detr": "detr", "vit": "vit", "clip": "clip", "resnet": "resnet_pooled"}


class FeatureStore:
    """
    A finished store, to read from.

    Args:
        folder: where `python -m mmcot.features` wrote it.

    Raises:
        ValueError: a file that is missing, cut off or was edited, by name.
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
                f"{expected}. The file was cut off or is still being written: run mmcot.features again."
            )
        self.rows = {key: row for row, key in enumerate(keys)}
        self.contents: dict[str, str] = {}  # a file's key by its path, so that it is read once

    @property
    def hidden_size(self) -> int:
        return self.record["features"].shape[1]

    @property
    def num_patches(self) -> int:
        return self.record["features"].shape[0] * self.manifest["repeats"]

    @property
    def needs_files(self) -> bool:
        """Whether rows are found by the pictures' content; those of an imported file go by problem id."""
        return self.manifest["keys"] == "content"

    def read(self, key: str) -> dict[str, np.ndarray]:
        """One record, copied: `features`, and of a detector `boxes` and `class_scores` too."""
        offset = self.rows[key] * self.record.itemsize
        # Mapped for this row alone: pages of a mapping that lives on would stay resident, all of the store in the end.
        row = np.memmap(self.folder / ROWS, dtype=self.record, mode="r", offset=offset, shape=(1,))[0]
        return {name: np.array(row[name]) for name in self.record.names}

    def keys_of(self, problem: dict[str, Any]) -> list[str]:
        """The rows that a problem's pictures should have."""
        if not self.needs_files:
            return [problem["id"]] if problem["images"] or problem["id"] in self.rows else []
        return [self.key_of(picture) for picture in problem["images"]]

    def key_of(self, picture: dict[str, Any]) -> str:
        path = picture["path"]
        if path is None:
            return content_key(picture)
        if path not in self.contents:
            self.contents[path] = content_key(picture)
        return self.contents[path]

    def features_of(self, problem: dict[str, Any]) -> torch.Tensor:
        """`(num_images * num_patches, hidden_size)`, its pictures one after another."""
        features = [torch.from_numpy(self.read(key)["features"]) for key in self.keys_of(problem)]
        repeated = [patches.repeat(self.manifest["repeats"], 1) for patches in features]
        return torch.cat(repeated) if repeated else torch.zeros(0, self.hidden_size)

    def batch(self, problems: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `vision_features` `(batch_size, num_patches, hidden_size)` in float32 and `vision_mask`
            `(batch_size, num_patches)`, or nothing where no problem of the batch has a picture.
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
        """Every picture of the problems has its row, or a `ValueError` names those without."""
        absent = [row["id"] for row in problems if not all(key in self.rows for key in self.keys_of(row))]
        if absent:
            raise ValueError(
                f"{self.folder} has no features for the pictures of {len(absent)} of {len(problems)} problems: "
                f"{first_few(absent)}. Run mmcot.features on this dataset."
            )

    def check_model(self, config: PreTrainedConfig, image_processor: BaseImageProcessor | None) -> None:
        """The features are those that the model's own tower would give, as far as the model has one."""
        self.compare("width of the patches", self.hidden_size, config.vision_hidden_size)
        if config.num_vision_tokens is not None:
            self.compare("patches of a picture", self.num_patches, config.num_vision_tokens)
        if config.vision_tower is not None and self.manifest["vision_tower"] is not None:
            self.compare("vision_tower", self.manifest["vision_tower"], config.vision_tower)
        if config.vision_config is None or self.manifest["vision_config"] is None:
            return
        if not config.freeze_vision:
            raise ValueError(
                f"{self.folder} holds features of a fixed tower; this model trains its own: freeze_vision."
            )
        self.compare_fields("vision_config", self.manifest["vision_config"], tower_settings(config.vision_config))
        self.compare_fields("image_processor", self.manifest["image_processor"], settings_of(image_processor))

    def check_tower(self, checkpoint: str, preprocessing: str) -> None:
        """The features are of this checkpoint, where the store says of which they are."""
        if self.manifest["tower"] is not None:
            self.compare("tower", self.manifest["tower"], checkpoint_of(checkpoint))
            self.compare("preprocessing", self.manifest["preprocessing"], preprocessing)

    def compare_fields(self, name: str, here: dict, there: dict) -> None:
        for field in sorted(here.keys() | there.keys()):
            self.compare(f"{name}.{field}", here.get(field), there.get(field))

    def compare(self, name: str, here: Any, there: Any) -> None:
        if here != there:
            raise ValueError(f"{self.folder} does not fit: {name} is {here!r} in the store, {there!r} in the model.")


def read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} is no feature store: it has no {MANIFEST}. python -m mmcot.features writes one.")
    manifest = read_json(file)
    if manifest.get("digest") != manifest_digest(manifest):
        raise ValueError(f"{file} was edited: its digest does not belong to what it says. Compute the store again.")
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    said = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def record_type(fields: list[list]) -> np.dtype:
    return np.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in fields])


def read_key_batches(folder: Path) -> list[list[str]]:
    """The keys of each whole batch; a last line that was cut off is one that was not written."""
    file = folder / KEYS
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{file}: not a list of keys in each line ({error}). Compute the store again.") from error


def file_size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


class FeatureWriter:
    """Adds batches to a store, after those that are in it. A batch is there with all its rows or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        batches = read_key_batches(folder)
        self.keys = {key for batch in batches for key in batch}
        if self.keys:
            self.manifest = read_manifest(folder)
            size = len(self.keys) * record_type(self.manifest["record"]).itemsize
            found = file_size(folder / ROWS)
            if found < size:
                raise ValueError(
                    f"{folder / ROWS} has {found} bytes; its {len(self.keys)} rows are {size}. The file was cut off: "
                    f"remove {folder} and compute it again."
                )
            # What a killed run left behind its last whole batch.
            os.truncate(folder / ROWS, size)
            os.truncate(folder / KEYS, sum(len(json.dumps(batch)) + 1 for batch in batches))
        else:
            self.manifest = None
            for name in (ROWS, KEYS):
                (folder / name).write_bytes(b"")

    def claim(self, manifest: dict[str, Any]) -> None:
        """This store is of that manifest; one with rows of another is a `ValueError` that names what differs."""
        manifest = json.loads(json.dumps(manifest))
        manifest["digest"] = manifest_digest(manifest)
        if self.manifest is None:
            write_json(self.folder / MANIFEST, manifest)
            self.manifest = manifest
        for name in manifest.keys() - {"digest"}:
            if self.manifest.get(name) != manifest[name]:
                raise ValueError(
                    f"{self.folder} holds features of another kind: {name} is {self.manifest.get(name)!r} there, "
                    f"{manifest[name]!r} here. Choose another --output."
                )

    def add(self, keys: list[str], rows: np.ndarray) -> None:
        append(self.folder / ROWS, rows.tobytes())
        append(self.folder / KEYS, json.dumps(keys).encode() + b"\n")
        self.keys.update(keys)


def append(file: Path, content: bytes) -> None:
    with file.open("ab") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


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
    detector = None
    if type(AutoConfig.from_pretrained(checkpoint, revision=revision)) in MODEL_FOR_OBJECT_DETECTION_MAPPING:
        detector, info = AutoModelForObjectDetection.from_pretrained(
            checkpoint, revision=revision, output_loading_info=True
        )
        tower = without_unread_parts(detector.model)
        if info["missing_keys"]:
            logger.warning("%s has no detection heads: boxes and class scores are not kept", vision)
            detector = None
    else:
        tower = load_vision_tower(checkpoint, revision=revision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = vision if vision in TOWERS else None
    return Featurizer(tower.eval().to(device), name, image_processor, detector.eval().to(device) if detector else None)


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


def tower_settings(vision_config: PreTrainedConfig) -> dict[str, Any]:
    """What of a tower's configuration says which numbers it gives: not where it came from or in what it was saved."""
    said = json.loads(vision_config.to_json_string())
    for name in (
        "_name_or_path",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "id2label",
        "label2id",
    ):
        said.pop(name, None)
    return said


def settings_of(image_processor: BaseImageProcessor | None) -> dict[str, Any]:
    return {} if image_processor is None else json.loads(json.dumps(image_processor.to_dict()))


def fields_of(record: np.dtype) -> list[list]:
    return [[name, record[name].base.str, list(record[name].shape)] for name in record.names]


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
            "preprocessing": "paper",
            "image_processor": None,
            "dtype": dtype,
            "record": fields_of(record),
            "repeats": tower.repeats,
            "keys": "id",
            "source": Path(features_file).name,
        }
    )
    for ids in tqdm(list(chunks([id_ for id_ in rows_by_id if id_ not in writer.keys], 64)), desc="importing"):
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


def chunks(items: list[str], size: int) -> Iterator[list[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


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
