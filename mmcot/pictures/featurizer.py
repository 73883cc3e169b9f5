"""Computes features of pictures: loads a tower and its preprocessing, and adds missing pictures to a feature store.

The features of each distinct picture, identified by its content, are computed once. A picture that cannot be decoded is
reported and skipped. Training and prediction call `vision_source` for a dataset's pictures. `vision_mmcot.py` defines
the towers.
"""

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForObjectDetection, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils.hub import cached_file, extract_commit_hash

from mmcot.pictures.feature_store import FeatureStore
from mmcot.pictures.feature_writer import FeatureWriter
from mmcot.pictures.manifest import producers_of, settings_of, tower_settings, weights_digest
from mmcot.pictures.pixel_store import PixelStore
from mmcot.pictures.reading import Picture, aspect_ratio, distinct_pictures, read_picture
from mmcot.storage.caches import code_digest
from mmcot.storage.files import cache_folder
from modeling_mmcot import MMCoTForConditionalGeneration
from modeling_mmcot.pictures_mmcot import as_rgb, build_image_processor, picture_pixels, stack_pixels
from modeling_mmcot.vision_mmcot import (
    TOWERS,
    checkpoint_of,
    encode_pictures,
    find_tower,
    load_vision_tower,
    remove_unread_parts,
    resolved_name,
    tower_config,
    tower_name,
)

logger = logging.getLogger(__name__)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float16": "<f2", "float32": "<f4"}
PREPROCESSINGS = ("checkpoint", "paper")


@dataclass
class Featurizer:
    """
    A picture tower with its preprocessing and, if it is part of a detector, the detection heads.

    Args:
        tower: the picture tower.
        name (`str`, *optional*): its name in `TOWERS`.
        image_processor: the image processor that prepares pictures for the tower.
        detector (*optional*): the detection model that contains the tower; its heads give a box and a class score for
            each patch.
    """

    tower: PreTrainedModel
    name: str | None
    image_processor: BaseImageProcessor
    detector: PreTrainedModel | None = None

    @torch.no_grad()
    def __call__(self, pixels: list[torch.FloatTensor], dtype: str) -> np.ndarray:
        """Return a record for each picture, given as pixels of shape `(3, height, width)`."""
        inputs = {name: value.to(self.tower.device) for name, value in stack_pixels([[one] for one in pixels]).items()}
        patches, _ = encode_pictures(self.tower, self.name, **inputs)
        patches = patches[:, : patches.shape[1] // self.repeats]
        columns = {"features": (DTYPES[dtype], patches)}
        if self.detector is not None:
            boxes = self.detector.bbox_predictor(patches).sigmoid()
            probabilities = self.detector.class_labels_classifier(patches).softmax(dim=-1)
            columns["boxes"] = (DTYPES["float32"], boxes)
            columns["class_scores"] = (DTYPES["float32"], probabilities[..., :-1].amax(dim=-1))  # without "no object"
        record = np.dtype([(name, dtype, tuple(values.shape[1:])) for name, (dtype, values) in columns.items()])
        rows = np.zeros(len(pixels), dtype=record)
        for name, (_, values) in columns.items():
            rows[name] = values.float().cpu().numpy()
        return rows

    @property
    def repeats(self) -> int:
        return find_tower(self.tower.config, self.name).repeats


@dataclass(frozen=True)
class TowerOptions:
    """
    Args:
        vision: a checkpoint of a picture tower, or a name in `TOWERS`.
        preprocessing: `checkpoint` (its own image processor) or `paper` (as in the authors' extract_features.py).
        revision: revision of the checkpoint.
        vision_tower: how the output is converted to patches, a name in `TOWERS`.
        bf16: run the tower in bfloat16.
    """

    vision: str
    preprocessing: str = "checkpoint"
    revision: str | None = None
    vision_tower: str | None = None
    bf16: bool = False


@dataclass(frozen=True)
class FeatureOptions:
    """
    Args:
        dtype: precision of the stored features, a name in `DTYPES`.
        batch_size: number of pictures per batch.
        num_workers: number of processes that prefetch and prepare pictures.
    """

    dtype: str = "float16"
    batch_size: int = 8
    num_workers: int = 0


def load_featurizer(options: TowerOptions) -> Featurizer:
    checkpoint = checkpoint_of(options.vision)
    image_processor = load_image_processor(options.vision, options.preprocessing, options.revision)
    detector = load_detector(checkpoint, options.revision)
    if detector is not None:
        tower = remove_unread_parts(detector.model)
    else:
        tower = load_vision_tower(checkpoint, revision=options.revision).eval().to(DEVICE)
    if options.bf16:
        (detector or tower).to(torch.bfloat16, memory_format=torch.channels_last)  # 10 % faster (benchmarks/README.md)
    return Featurizer(tower, tower_name(options.vision, options.vision_tower), image_processor, detector)


def load_detector(checkpoint: str, revision: str | None) -> PreTrainedModel | None:
    """Load the detection model that contains the tower, if the checkpoint is a detector with its heads."""
    if not find_tower(tower_config(checkpoint, revision)).detects:
        return None
    detector, info = AutoModelForObjectDetection.from_pretrained(
        checkpoint, revision=revision, output_loading_info=True, trust_remote_code=False
    )
    if info["missing_keys"]:
        logger.warning("%s has no detection heads: boxes and class scores are not stored", checkpoint)
        return None
    return detector.eval().to(DEVICE)


def load_image_processor(
    vision: str, preprocessing: str = "checkpoint", revision: str | None = None
) -> BaseImageProcessor:
    """Load the image processor of a checkpoint, or build the preprocessing of the authors' extract_features.py."""
    if preprocessing not in PREPROCESSINGS:
        raise ValueError(f"preprocessing is {preprocessing!r}; expected {' or '.join(PREPROCESSINGS)}.")
    if preprocessing == "checkpoint":
        return AutoImageProcessor.from_pretrained(
            checkpoint_of(vision), revision=revision, backend="pil", trust_remote_code=False
        )
    config = tower_config(vision, revision)
    settings = find_tower(config).paper_image_processor
    if settings is None:
        published = [name for name, tower in TOWERS.items() if tower.paper_image_processor is not None]
        raise ValueError(
            f"preprocessing 'paper' exists for {' and '.join(published)}, which the authors published; {vision} has "
            f"model_type {config.model_type!r}."
        )
    return build_image_processor(settings)


class Pixels(torch.utils.data.Dataset):
    """Decodes pictures to pixels in DataLoader workers. Returns an error message for an undecodable picture."""

    def __init__(self, pictures: list[Picture], image_processor: BaseImageProcessor):
        self.pictures = pictures
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> torch.FloatTensor | str:
        _, picture, problem_id = self.pictures[index]
        try:
            return picture_pixels(self.image_processor, as_rgb(read_picture(picture, problem_id)))
        except ValueError as error:
            return str(error)


def compute_features(
    problems: Dataset, folder: str | Path, tower: TowerOptions, options: FeatureOptions = FeatureOptions()
) -> list[str]:
    """
    Write the features of all distinct pictures of the problems; features that the store already has are skipped.

    Returns:
        An error message for each picture that could not be decoded. All other pictures are in the store.
    """
    if not any(problems["images"]):
        raise ValueError(f"None of the {len(problems)} problems has a picture: there is nothing to compute.")
    featurizer = load_featurizer(tower)
    settings = {
        "tower": checkpoint_of(tower.vision),
        "revision": commit_of(tower.vision, tower.revision),
        "preprocessing": tower.preprocessing,
        **featurizer_settings(featurizer, options.dtype),
    }
    with FeatureWriter(Path(folder), settings) as writer:
        return compute_missing(writer, problems, featurizer, options)


def featurizer_settings(featurizer: Featurizer, dtype: str) -> dict[str, Any]:
    """Return all settings that determine the features and their storage, as entries of the manifest."""
    tower = featurizer.tower
    return {
        "weights": weights_digest(tower),
        "vision_tower": resolved_name(tower.config, featurizer.name),
        "vision_config": tower_settings(tower.config),
        "image_processor": settings_of(featurizer.image_processor),
        "computed_in": str(tower.dtype).removeprefix("torch."),
        "dtype": dtype,
        "repeats": featurizer.repeats,
        "keys": "content",
        **producers_of(tower),
    }


def compute_missing(
    writer: FeatureWriter, problems: Dataset, featurizer: Featurizer, options: FeatureOptions
) -> list[str]:
    """Add missing features to the store. Return an error message for each picture that cannot be decoded."""
    # Sorted, because pictures of equal aspect ratio are resized to the same size, and a batch of them is one pass.
    pictures = sorted(distinct_pictures(problems), key=lambda picture: aspect_ratio(picture[1]))
    batches = missing_batches(pictures, writer.keys, options.batch_size)
    num_missing = sum(map(len, batches))
    failed: list[str] = []
    with tqdm(desc="features", unit="picture", total=len(pictures), initial=len(pictures) - num_missing) as progress:
        for batch, results in zip(batches, load_pixels(batches, featurizer, options.num_workers), strict=True):
            pixels = {
                key: result
                for (key, *_), result in zip(batch, results, strict=True)
                if isinstance(result, torch.Tensor)
            }
            failed.extend(result for result in results if isinstance(result, str))
            if pixels:
                writer.add(list(pixels), featurizer(list(pixels.values()), options.dtype))
            progress.update(len(batch))
    return failed


def missing_batches(pictures: list[Picture], present: set[str], batch_size: int) -> list[list[Picture]]:
    """
    Divide all pictures into batches, then remove the pictures that are present. In this order, a resumed call puts a
    picture into the same batch as the interrupted call.
    """
    batches = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
    missing = [[picture for picture in batch if picture[0] not in present] for batch in batches]
    return [batch for batch in missing if batch]


def load_pixels(batches: list[list[Picture]], featurizer: Featurizer, num_workers: int) -> DataLoader:
    """Return a loader that yields, for each batch, the pixels or the error message of each picture."""
    starts = itertools.accumulate(map(len, batches), initial=0)
    return DataLoader(
        Pixels(list(itertools.chain(*batches)), featurizer.image_processor),
        batch_sampler=[range(start, start + len(batch)) for start, batch in zip(starts, batches, strict=False)],
        collate_fn=list,
        num_workers=num_workers,
    )


def vision_source(
    model: MMCoTForConditionalGeneration, image_processor: BaseImageProcessor | None, problems: Dataset
) -> FeatureStore | PixelStore | None:
    """
    Return the source of the problems' pictures for a model; each picture is decoded once.

    For a frozen tower the source is a store of features, computed once for all models and runs with that tower;
    otherwise it is a store of pixels. None for a model without a tower, or problems without pictures.
    """
    if model.encoder.vision_tower is None or image_processor is None or not any(problems["images"]):
        return None
    if not model.config.freeze_vision:
        return PixelStore(problems, image_processor)
    featurizer = Featurizer(model.encoder.vision_tower.eval(), model.config.vision_tower, image_processor)
    options = FeatureOptions(dtype="float32")
    settings = featurizer_settings(featurizer, options.dtype)
    folder = cache_folder() / "features" / Hasher.hash((settings, code_digest(Featurizer, Pixels)))
    with FeatureWriter(folder, settings, is_cache=True) as writer:
        failed = compute_missing(writer, problems, featurizer, options)
    if failed:
        raise ValueError(failed[0])
    return FeatureStore(folder)


def commit_of(checkpoint: str, revision: str | None) -> str | None:
    """Return the commit of a Hub checkpoint; None for a folder."""
    source = checkpoint_of(checkpoint)
    if Path(source).is_dir():
        return None
    return extract_commit_hash(cached_file(source, "config.json", revision=revision), None)
