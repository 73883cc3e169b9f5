"""A dataset's pictures, read: one that is broken is named, and its pixels are kept for all epochs and stages.

What becomes of them is the model's side (`modeling_mmcot.pictures_mmcot`).
"""

import functools
import hashlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from mmcot.problems.progress_bars import without_dataset_bars
from mmcot.problems.schema import check_file
from mmcot.storage.caches import code_digest, kept, versions_of
from mmcot.storage.files import cache_folder
from modeling_mmcot import pictures_mmcot
from modeling_mmcot.pictures_mmcot import FORMATS, as_rgb, picture_pixels, shrink_while_reading, stack_pixels

logger = logging.getLogger(__name__)

Picture = tuple[str, dict[str, Any], str]  # its content's key, itself, and the first problem that shows it

# What decides a picture's pixels, beside the picture and its image processor.
PICTURE_CODE = (pictures_mmcot, sys.modules[__name__])
PICTURE_LIBRARIES = ("transformers", "pillow", "numpy")

# Pixels that would take more of the disk are not kept but decoded anew for each batch.
MAX_KEPT = 8e9


def content_key(picture: dict[str, Any]) -> str:
    """What tells a picture from others: the SHA-256 of its file."""
    return hashlib.sha256(picture["bytes"] or Path(picture["path"]).read_bytes()).hexdigest()


class ContentKeys:
    """The pictures' keys, of each file read once."""

    def __init__(self):
        self.by_path: dict[str, str] = {}

    def __call__(self, picture: dict[str, Any]) -> str:
        path = picture["path"]
        if path is None:
            return content_key(picture)
        if path not in self.by_path:
            self.by_path[path] = content_key(picture)
        return self.by_path[path]


def distinct_pictures(problems: Dataset, first_only: bool = False) -> list[Picture]:
    """Each picture once, in the order of the problems."""
    found: dict[str, Picture] = {}
    for problem in tqdm(problems.select_columns(["id", "images"]), desc="reading pictures", leave=False):
        for picture in problem["images"][: 1 if first_only else None]:
            key = content_key(picture)
            found.setdefault(key, (key, picture, problem["id"]))
    return list(found.values())


def open_header(picture: dict[str, Any]) -> Image.Image:
    """A picture of a problem, its pixels not decoded yet; only of the formats that cannot start another program."""
    return Image.open(io.BytesIO(picture["bytes"]) if picture["bytes"] else picture["path"], formats=FORMATS)


def aspect_ratio(picture: dict[str, Any]) -> float:
    """Width / height as the file's header says; 0 where that cannot be read."""
    try:
        with open_header(picture) as opened:
            return opened.width / opened.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0.0


def read_pictures(problem: dict[str, Any]) -> list[Image.Image]:
    """The problem's pictures, decoded to the end and upright, in the mode of their files."""
    return [read_picture(picture, problem["id"]) for picture in problem["images"]]


def read_picture(picture: dict[str, Any], problem_id: str) -> Image.Image:
    if not picture["bytes"]:
        check_file(Path(picture["path"]), f"problem {problem_id}")
    where = f"problem {problem_id}: picture {picture['path'] or 'given as bytes'}"
    try:
        with open_header(picture) as opened:
            shrink_while_reading(opened)
            return ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:
        raise ValueError(f"{where} is not an image that Pillow can read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{where} is too large: {error} Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS where you trust it."
        ) from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise errors of many kinds, SyntaxError too
        raise ValueError(f"{where} is truncated or damaged ({error}); expected a whole image file.") from error


def decode(pictures: list[Picture]) -> tuple[dict[str, Image.Image], list[str]]:
    """RGB pictures by key (see `distinct_pictures`), and an error message for each that cannot be decoded."""
    decoded, errors = {}, []
    for key, picture, problem_id in pictures:
        try:
            decoded[key] = as_rgb(read_picture(picture, problem_id))
        except ValueError as error:
            errors.append(str(error))
    return decoded, errors


class PixelStore:
    """
    The pixels of the problems' pictures, prepared for a tower and kept on disk by `datasets`; mapped, not loaded.

    Raises:
        ValueError: a picture that cannot be decoded, by name.
    """

    def __init__(self, problems: Dataset, image_processor: BaseImageProcessor):
        pictures = distinct_pictures(problems)
        self.rows = {key: row for row, (key, *_) in enumerate(pictures)}
        self.image_processor = image_processor
        self.key_of = ContentKeys()
        self.kept = self.keep(pictures)

    def keep(self, pictures: list[Picture]) -> Dataset | None:
        if not pictures or len(pictures) * self.prepare(pictures[0]).nbytes > MAX_KEPT:
            for picture in pictures:
                self.prepare(picture)
            return None
        makers = (code_digest(*PICTURE_CODE), versions_of(*PICTURE_LIBRARIES))
        key = Hasher.hash((list(self.rows), self.image_processor.to_dict(), makers))
        folder = cache_folder() / "pixels" / key
        make = functools.partial(
            Dataset.from_generator,
            self.generate,
            features=Features({"pixels": Value("binary"), "shape": List(Value("int64"))}),
            gen_kwargs={"pictures": pictures},
            fingerprint=key,
            cache_dir=str(folder),
            writer_batch_size=100,
        )
        try:
            with without_dataset_bars():
                return kept(make, folder, len(pictures)).with_format("arrow")
        except DatasetGenerationError as error:
            raise error.__cause__ from None  # which picture, and what is wrong with it

    def generate(self, pictures: list[Picture]) -> Iterator[dict[str, Any]]:
        for picture in pictures:
            pixels = self.prepare(picture)
            yield {"pixels": pixels.astype("<f4").tobytes(), "shape": pixels.shape}

    def prepare(self, picture: Picture) -> np.ndarray:
        _, content, problem_id = picture
        return picture_pixels(self.image_processor, as_rgb(read_picture(content, problem_id))).numpy()

    def read(self, picture: dict[str, Any], problem_id: str) -> torch.FloatTensor:
        """`(3, height, width)`."""
        if self.kept is None:
            return torch.from_numpy(self.prepare(("", picture, problem_id)))
        row = self.kept[self.rows[self.key_of(picture)]]
        pixels = np.frombuffer(row["pixels"][0].as_buffer(), dtype="<f4").reshape(row["shape"][0].as_py())
        return torch.from_numpy(pixels.copy())

    def batch(self, problems: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`pixel_values` and `pixel_mask`, as the processor gives them; nothing where no problem has a picture."""
        pixels = [[self.read(picture, problem["id"]) for picture in problem["images"]] for problem in problems]
        return stack_pixels(pixels)
