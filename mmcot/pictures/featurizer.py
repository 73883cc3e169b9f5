"""Pictures -> features, computed once into a store (`feature_store.py`), or taken over from the authors' own files.

    python -m mmcot.features DATASET --vision CHECKPOINT_OR_NAME --output DIR [--preprocessing paper] [--dtype float16]
    python -m mmcot.features DATASET --vision detr --import_features detr.npy --name_map name_map.json --output DIR
    python -m mmcot.features DATASET --captions MODEL --output DIR

Each distinct picture is computed once, by its content, whatever problems show it. One that cannot be decoded is named
and left out, and the exit code says so. Training and prediction ask `vision_source` for a dataset's pictures. Captions
are `captions.py`'s, towers `vision_mmcot`'s.
"""

import argparse
import itertools
import logging
import os
import pickle
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForObjectDetection, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils.hub import cached_file, extract_commit_hash

from mmcot.pictures.captions import write_captions
from mmcot.pictures.feature_store import (
    FeatureStore,
    FeatureWriter,
    makers_of,
    settings_of,
    tower_settings,
    weights_digest,
)
from mmcot.pictures.reading import Picture, PixelStore, aspect_ratio, distinct_pictures, read_picture
from mmcot.problems.opening import SOURCES, Given
from mmcot.problems.schema import SPLITS, first_few
from mmcot.problems.sources import add_dataset_options, choose_source, load_problems, reading_options, splits_of
from mmcot.recipes.command_line import (
    check_output_folder,
    given_options,
    refuse_absent_path,
    refuse_below,
    refuse_without_effect,
)
from mmcot.storage.caches import code_digest
from mmcot.storage.files import cache_folder, read_json
from modeling_mmcot import MMCoTForConditionalGeneration
from modeling_mmcot.pictures_mmcot import as_rgb, build_image_processor, picture_pixels, stack_pixels
from modeling_mmcot.vision_mmcot import (
    TOWERS,
    checkpoint_of,
    encode_pictures,
    find_tower,
    load_vision_tower,
    resolved_name,
    tower_config,
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
    def __call__(self, pixels: list[torch.FloatTensor], dtype: str) -> np.ndarray:
        """A record for each picture, given as its pixels `(3, height, width)`."""
        inputs = {name: value.to(self.tower.device) for name, value in stack_pixels([[one] for one in pixels]).items()}
        patches, _ = encode_pictures(self.tower, self.name, **inputs)
        patches = patches[:, : patches.shape[1] // self.repeats]
        columns = {"features": (DTYPES[dtype], patches)}
        if self.detector is not None:
            boxes = self.detector.bbox_predictor(patches).sigmoid()
            probabilities = self.detector.class_labels_classifier(patches).softmax(dim=-1)
            columns["boxes"] = (DTYPES["float32"], boxes)
            columns["class_scores"] = (DTYPES["float32"], probabilities[..., :-1].amax(dim=-1))  # the last: no object
        record = np.dtype([(name, dtype, tuple(values.shape[1:])) for name, (dtype, values) in columns.items()])
        rows = np.zeros(len(pixels), dtype=record)
        for name, (_, values) in columns.items():
            rows[name] = values.float().cpu().numpy()
        return rows

    @property
    def repeats(self) -> int:
        return find_tower(self.tower.config, self.name).repeats


def load_featurizer(
    vision: str,
    preprocessing: str = "checkpoint",
    revision: str | None = None,
    vision_tower: str | None = None,
    bf16: bool = False,
) -> Featurizer:
    """
    Args:
        vision: a checkpoint of a picture tower, or a name in `TOWERS`.
        vision_tower: how its output becomes patches, a name in `TOWERS`.
        preprocessing: `checkpoint` (its own image processor) or `paper` (as the authors' extract_features.py).
        bf16: run the tower in bfloat16.
    """
    checkpoint = checkpoint_of(vision)
    image_processor = load_image_processor(vision, preprocessing, revision)
    detector = load_detector(checkpoint, revision)
    if detector is not None:
        tower = without_unread_parts(detector.model)
    else:
        tower = load_vision_tower(checkpoint, revision=revision).eval().to(DEVICE)
    if bf16:
        (detector or tower).to(torch.bfloat16, memory_format=torch.channels_last)  # a tenth faster (benchmarks)
    return Featurizer(tower, tower_name(vision, vision_tower), image_processor, detector)


def load_detector(checkpoint: str, revision: str | None) -> PreTrainedModel | None:
    """The detection model that the tower is part of, if the checkpoint is of one and holds its heads."""
    if not find_tower(tower_config(checkpoint, revision)).detects:
        return None
    detector, info = AutoModelForObjectDetection.from_pretrained(
        checkpoint, revision=revision, output_loading_info=True, trust_remote_code=False
    )
    if info["missing_keys"]:
        logger.warning("%s holds no detection heads: boxes and class scores are not kept", checkpoint)
        return None
    return detector.eval().to(DEVICE)


def load_image_processor(
    vision: str, preprocessing: str = "checkpoint", revision: str | None = None
) -> BaseImageProcessor:
    """What prepares a picture for a tower: the checkpoint's own, or what the authors' extract_features.py does."""
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
            f"preprocessing 'paper' is known for {' and '.join(published)}, which the authors published; {vision} is "
            f"of model_type {config.model_type!r}."
        )
    return build_image_processor(settings)


class Pixels(torch.utils.data.Dataset):
    """Pictures -> their pixels; for one that cannot be decoded, the error. What the DataLoader's workers do."""

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


def compute(
    problems: Dataset,
    folder: str | Path,
    vision: str,
    preprocessing: str = "checkpoint",
    dtype: str = "float16",
    batch_size: int = 8,
    revision: str | None = None,
    vision_tower: str | None = None,
    num_workers: int = 0,
    bf16: bool = False,
) -> list[str]:
    """
    Write the features of all distinct pictures of the problems, or those that the store lacks.

    Returns:
        The pictures that could not be decoded, an error message each. All others are in the store.
    """
    if not any(problems["images"]):
        raise ValueError(f"None of the {len(problems)} problems has a picture: there is nothing to compute.")
    featurizer = load_featurizer(vision, preprocessing, revision, vision_tower, bf16)
    said = {
        "tower": checkpoint_of(vision),
        "revision": commit_of(vision, revision),
        "preprocessing": preprocessing,
        **described(featurizer, dtype),
    }
    with FeatureWriter(Path(folder), said) as writer:
        return complete(writer, problems, featurizer, dtype, batch_size, num_workers)


def described(featurizer: Featurizer, dtype: str) -> dict[str, Any]:
    """What of a featurizer decides the numbers that it gives, and in what they are kept."""
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
        **makers_of(tower),
    }


def complete(
    writer: FeatureWriter, problems: Dataset, featurizer: Featurizer, dtype: str, batch_size: int, num_workers: int
) -> list[str]:
    """Add what the store lacks of the problems' pictures; what could not be decoded is returned, an error each."""
    # Those of one shape are of one size for the tower, and pass it together where they are beside each other.
    pictures = sorted(distinct_pictures(problems), key=lambda picture: aspect_ratio(picture[1]))
    batches = [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]
    todo = [[picture for picture in batch if picture[0] not in writer.keys] for batch in batches]
    todo = [batch for batch in todo if batch]
    starts = itertools.accumulate(map(len, todo), initial=0)
    loader = DataLoader(
        Pixels(list(itertools.chain(*todo)), featurizer.image_processor),
        batch_sampler=[range(start, start + len(batch)) for start, batch in zip(starts, todo, strict=False)],
        collate_fn=list,
        num_workers=num_workers,
    )
    failed: list[str] = []
    progress = tqdm(desc="features", unit="picture", total=len(pictures), initial=len(pictures) - sum(map(len, todo)))
    with progress:
        for batch, results in zip(todo, loader, strict=True):
            decoded = {
                key: pixels
                for (key, *_), pixels in zip(batch, results, strict=True)
                if isinstance(pixels, torch.Tensor)
            }
            failed.extend(result for result in results if isinstance(result, str))
            if decoded:
                writer.add(list(decoded), featurizer(list(decoded.values()), dtype))
            progress.update(len(batch))
    return failed


def vision_source(
    model: MMCoTForConditionalGeneration, image_processor: BaseImageProcessor | None, problems: Dataset
) -> FeatureStore | PixelStore | None:
    """
    Where a model takes the problems' pictures from, each decoded once: of a fixed tower the features, computed once for
    all models and runs that have it; else the pixels. None for a model that has no tower, or problems without pictures.
    """
    if model.encoder.vision_tower is None or image_processor is None or not any(problems["images"]):
        return None
    if not model.config.freeze_vision:
        return PixelStore(problems, image_processor)
    featurizer = Featurizer(model.encoder.vision_tower.eval(), model.config.vision_tower, image_processor)
    said = described(featurizer, "float32")
    folder = cache_folder() / "features" / Hasher.hash((said, code_digest(Featurizer)))
    with FeatureWriter(folder, said, is_cache=True) as writer:
        failed = complete(writer, problems, featurizer, "float32", batch_size=8, num_workers=0)
    if failed:
        raise ValueError(failed[0])
    return FeatureStore(folder)


def commit_of(checkpoint: str, revision: str | None) -> str | None:
    """The commit of a checkpoint of the Hub; None of a folder."""
    source = checkpoint_of(checkpoint)
    if Path(source).is_dir():
        return None
    return extract_commit_hash(cached_file(source, "config.json", revision=revision), None)


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
    shape = (tower.num_patches // tower.repeats, tower.hidden_size)
    num_rows, *found = open_authors_features(features_file).shape
    # One pooled vector a picture comes without a dimension for patches.
    if tuple(found) not in (shape, shape[-1:] if shape[0] == 1 else shape):
        raise ValueError(f"{features_file} holds rows of shape {tuple(found)}; expected {shape} for {vision} features.")
    name_map = read_json(name_map_file)
    rows = problems.select_columns(["id", "images"])
    absent = [row["id"] for row in rows if row["images"] and row["id"] not in name_map]
    if absent:
        raise ValueError(f"{name_map_file} lacks {len(absent)} problems that have a picture: {first_few(absent)}.")
    sources = {id_: row_number(name_map, id_, num_rows, name_map_file) for id_ in problems["id"] if id_ in name_map}
    said = {
        "tower": None,
        "vision_tower": AUTHORS_TOWERS[vision],
        "vision_config": None,
        "dtype": dtype,
        "repeats": tower.repeats,
        "keys": "id",
        "source": Path(features_file).name,
    }
    with FeatureWriter(Path(folder), said) as writer:
        todo = [id_ for id_ in sources if id_ not in writer.keys]
        for start in tqdm(range(0, len(todo), 64), desc="importing", unit="batch"):
            ids = todo[start : start + 64]
            # Opened anew for each batch: pages of a mapping that lives on would stay resident, in the end all of them.
            features = open_authors_features(features_file)
            batch = np.zeros(len(ids), dtype=[("features", DTYPES[dtype], shape)])
            with np.errstate(over="ignore"):  # what does not fit is refused by the writer
                for index, id_ in enumerate(ids):
                    batch["features"][index] = features[sources[id_]].reshape(shape)
            writer.add(ids, batch)


def open_authors_features(file: str) -> np.ndarray:
    """The file's rows, mapped into memory and not read."""
    try:
        if Path(file).suffix == ".npy":
            return np.load(file, mmap_mode="r", allow_pickle=False)
        tensor = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if isinstance(tensor, torch.Tensor):
            return tensor.numpy()
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is not a whole file of features: {error}") from error
    raise ValueError(f"{file} holds a {type(tensor).__name__}; expected one tensor.")


def row_number(name_map: dict[str, Any], problem_id: str, num_rows: int, file: str) -> int:
    row = name_map[problem_id]
    if not str(row).isdigit() or int(row) >= num_rows:
        raise ValueError(f"{file}: {problem_id!r} is {row!r}; expected a row of the file, 0 to {num_rows - 1}.")
    return int(row)


def load_all_splits(
    source: str | Given, splits: Iterable[str], max_images: int | None, pictures: bool, **reading: Any
) -> Dataset:
    """
    Args:
        reading: of `load_problems`.
    """
    problems = [load_problems(source, split, max_images, pictures, **reading) for split in splits]
    return concatenate_datasets([part for part in problems if len(part)] or problems[:1])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mmcot.features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", nargs="?", help=SOURCES)
    add_dataset_options(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--vision", help=f"a tower's checkpoint (folder or Hub id), or one of {', '.join(TOWERS)}")
    what.add_argument("--captions", metavar="MODEL", help="caption the pictures: an image-text-to-text checkpoint")
    parser.add_argument("--output", required=True, metavar="DIR", help="the store; one that is there is completed")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, help="by default all that there are")
    parser.add_argument(
        "--max_images", type=int, default=1, help="of a ScienceQA problem's pictures, the first so many"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="pictures at a time")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    # Two processes on two cores would wait for each other.
    spare = max(0, min(4, (os.cpu_count() or 1) - 2))
    parser.add_argument("--num_workers", type=int, default=spare, help="processes that read and prepare pictures ahead")
    parser.add_argument("--bf16", action="store_true", help="run the tower in bfloat16")
    parser.add_argument("--preprocessing", choices=PREPROCESSINGS, default="checkpoint")
    parser.add_argument("--vision_tower", choices=TOWERS, help="how the checkpoint's output becomes patches")
    parser.add_argument("--revision", help="of the checkpoint")
    parser.add_argument(
        "--import_features", metavar="FILE", help="the authors' detr.npy, clip.npy, resnet.npy, vit.pth"
    )
    parser.add_argument("--name_map", metavar="FILE", help="with --import_features, their name_map.json")
    parser.add_argument("--prompt", help="with --captions, what the captioner is asked")
    return parser


def main(argv: list[str] | None = None, dataset: Given | None = None) -> None:
    """
    Args:
        argv: the command line; by default this process's.
        dataset: in place of `DATASET`.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if (arguments.import_features is None) != (arguments.name_map is None):
        parser.error("--import_features and --name_map go together")
    if arguments.prompt is not None and arguments.captions is None:
        parser.error("--prompt goes with --captions")
    if arguments.import_features is not None and arguments.vision not in AUTHORS_TOWERS:
        parser.error(f"with --import_features, --vision is one of {', '.join(AUTHORS_TOWERS)}")
    try:
        check_options(arguments, given_options(build_parser(), argv))
        arguments.source = choose_source(arguments, dataset)
        failed = run(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(
            "\n".join([*failed, f"error: {len(failed)} pictures were left out, the others are in {arguments.output}"])
        )
    print(f"written: {arguments.output}")


def check_options(arguments: argparse.Namespace, said: set[str]) -> None:
    """
    Raises:
        ValueError: an option is no number that it can be, or has no effect beside the others; nothing is at a path.
    """
    refuse_below(arguments, 1, "batch_size")
    refuse_below(arguments, 0, "num_workers", "max_images")
    of_a_tower = ("preprocessing", "vision_tower", "revision", "num_workers", "bf16")
    if arguments.import_features is not None:
        refuse_without_effect(said, (*of_a_tower, "batch_size"), "--import_features reads features, and runs no tower")
    if arguments.captions is not None:
        refuse_without_effect(said, (*of_a_tower, "dtype"), "--captions runs a captioner, and no tower")
    refuse_absent_path(arguments.vision or arguments.captions, "a checkpoint's folder, or an id of the Hub (USER/NAME)")
    check_output_folder(arguments.output, "--output")


def run(arguments: argparse.Namespace) -> list[str]:
    imports = arguments.import_features is not None
    problems = load_all_splits(
        arguments.source,
        arguments.splits or splits_of(arguments.source),
        arguments.max_images,
        not imports,
        **reading_options(arguments),
    )
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
        arguments.vision_tower,
        arguments.num_workers,
        arguments.bf16,
    )


if __name__ == "__main__":
    main()
