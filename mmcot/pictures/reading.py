"""Reads and decodes a dataset's pictures; an error names the damaged picture and its problem.

`modeling_mmcot.pictures_mmcot` converts them to pixels.
"""

import io
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from mmcot.problems.digests import content_key
from mmcot.problems.schema import check_file
from modeling_mmcot import pictures_mmcot
from modeling_mmcot.pictures_mmcot import FORMATS, as_rgb, shrink_while_reading

Picture = tuple[str, dict[str, Any], str]  # content key, picture, and the first problem that shows it

# Pixels depend on this code and these libraries, in addition to the picture and the image processor.
PICTURE_CODE = (pictures_mmcot, sys.modules[__name__])
PICTURE_LIBRARIES = ("transformers", "pillow", "numpy")


def distinct_pictures(problems: Dataset, first_only: bool = False) -> list[Picture]:
    """Return each picture once, in the order of the problems."""
    found: dict[str, Picture] = {}
    for problem in tqdm(problems.select_columns(["id", "images"]), desc="reading pictures", leave=False):
        for picture in problem["images"][: 1 if first_only else None]:
            key = content_key(picture)
            found.setdefault(key, (key, picture, problem["id"]))
    return list(found.values())


def open_header(picture: dict[str, Any]) -> Image.Image:
    """Open a picture without decoding its pixels; only in formats that cannot start another program."""
    return Image.open(io.BytesIO(picture["bytes"]) if picture["bytes"] else picture["path"], formats=FORMATS)


def aspect_ratio(picture: dict[str, Any]) -> float:
    """Return width / height from the file's header; 0 if the header is unreadable."""
    try:
        with open_header(picture) as opened:
            return opened.width / opened.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0.0


def read_pictures(problem: dict[str, Any]) -> list[Image.Image]:
    """Return the problem's pictures, fully decoded and upright, in the modes of their files."""
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
            f"{where} is too large: {error} Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from error
    except Exception as error:  # Pillow's decoders raise many kinds of errors for damaged files, even SyntaxError
        raise ValueError(f"{where} is truncated or damaged ({error}); expected a complete image file.") from error


def decode(pictures: list[Picture]) -> tuple[dict[str, Image.Image], list[str]]:
    """Return RGB pictures by key (see `distinct_pictures`), and an error message for each undecodable picture."""
    decoded, errors = {}, []
    for key, picture, problem_id in pictures:
        try:
            decoded[key] = as_rgb(read_picture(picture, problem_id))
        except ValueError as error:
            errors.append(str(error))
    return decoded, errors
