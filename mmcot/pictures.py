"""A dataset's pictures, decoded where a broken one must not stop the work. What becomes of them is the model's side."""

from typing import Any

from PIL import Image

from mmcot.problems import read_picture
from modeling_mmcot.pictures_mmcot import as_rgb


def decode(pictures: list[tuple[str, dict[str, Any], str]]) -> tuple[dict[str, Image.Image], list[str]]:
    """RGB pictures by key (see `problems.distinct_pictures`), and an error message for each that cannot be decoded."""
    decoded, errors = {}, []
    for key, picture, problem_id in pictures:
        try:
            decoded[key] = as_rgb(read_picture(picture, problem_id))
        except ValueError as error:
            errors.append(str(error))
    return decoded, errors
