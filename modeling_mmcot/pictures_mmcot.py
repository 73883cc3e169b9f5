"""Pictures of every kind that users have -> RGB -> the pixels of a batch.

Notable:
- pictures become RGB one at a time and in bounded memory, whatever their mode, size or shape;
- they are always prepared in the Pillow backend of transformers' image processors: the same numbers with torchvision
  and without it, and those of the authors' code, which used Pillow.

Nothing here knows of text, problems or the model.
"""

import io
import math
import os

import torch
import transformers
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

# A larger picture is reduced by a whole factor as it is read, and a longer strip is made shorter and wider: no tower
# sees the difference, and a resize by the shorter side would make either fill the memory.
MAX_PIXELS = 16_000_000
MAX_ASPECT = 32
MAX_STRIP = 8192


def as_pictures(entry) -> list[Image.Image]:
    """
    The pictures of one problem, given as none, one or a list of PIL images, paths, URLs or undecoded pictures of
    `datasets` (`{"bytes": …, "path": …}`), as RGB.
    """
    if entry is None:
        return []
    entries = entry if isinstance(entry, (list, tuple)) else [entry]
    return [as_rgb(open_picture(picture)) for picture in entries]


def open_picture(picture: Image.Image | str | os.PathLike | dict) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, dict) and picture.get("bytes"):
        return decode_picture(io.BytesIO(picture["bytes"]), picture.get("path") or "given as bytes")
    name = picture.get("path") if isinstance(picture, dict) else picture
    if not isinstance(name, (str, os.PathLike)):
        kinds = 'a PIL image, a path, a URL or {"bytes": …, "path": …}'
        raise ValueError(f"a picture is given as {kinds}; found {picture!r:.80}")
    path = os.fspath(name)
    if not os.path.isfile(path):
        return load_image(path)  # a URL or base64, or an error that lists what may be given
    return decode_picture(path, path)


def decode_picture(file: str | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file) as opened:
            shrink_while_reading(opened)
            opened.load()
            return opened
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"picture {name} is not a whole image that Pillow reads, or is too large: {error}") from error


def surplus(picture: Image.Image) -> int:
    """By which whole factor its sides are larger than any tower needs."""
    return math.ceil(math.sqrt(picture.width * picture.height / MAX_PIXELS))


def shrink_while_reading(opened: Image.Image) -> None:
    """Of a JPEG that is too large, let only a half, a quarter or an eighth of its sides be decoded."""
    if surplus(opened) > 1:
        opened.draft(None, (opened.width // surplus(opened), opened.height // surplus(opened)))


def as_rgb(picture: Image.Image) -> Image.Image:
    """
    As every tower takes a picture: upright, RGB, the first frame, of bounded size. Transparency is dropped, as the
    original and transformers drop it; 16-bit grey is scaled, where Pillow's own conversion cuts it off at white.
    """
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if surplus(picture) > 1:
        picture = picture.reduce(surplus(picture))
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        sides = [min(side, MAX_STRIP) for side in picture.size]
        picture = picture.resize(tuple(max(side, max(sides) // MAX_ASPECT) for side in sides))
    return picture


def build_image_processor(settings: dict) -> BaseImageProcessor:
    """
    An image processor of transformers from what its `to_dict` gave, in Pillow's backend where it has one.

    Args:
        settings (`dict`): `image_processor_type` names the class, the rest are its arguments.
    """
    settings = dict(settings)
    name = settings.pop("image_processor_type", None)
    if name == "TimmWrapperImageProcessor":
        # It saves what it made of `pretrained_cfg`, which it takes for one again.
        return transformers.TimmWrapperImageProcessor(settings["data_config"], settings.get("architecture"))
    name = str(name).removesuffix("Fast")
    image_processor_class = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name, None)
    if image_processor_class is None:
        raise ValueError(f"image_processor_type is {name!r}; expected an image processor of transformers.")
    return image_processor_class(**settings)


def in_pillow_backend(image_processor: BaseImageProcessor) -> BaseImageProcessor:
    """The same image processor as it will be when it is loaded again."""
    has_two_backends = hasattr(transformers, f"{type(image_processor).__name__}Pil")
    return build_image_processor(image_processor.to_dict()) if has_two_backends else image_processor


def picture_pixels(image_processor: BaseImageProcessor, picture: Image.Image) -> torch.FloatTensor:
    """One RGB picture as a tower reads it, `(3, height, width)`."""
    return image_processor(picture, return_tensors="pt")["pixel_values"][0]


def stack_pixels(pixels: list[list[torch.FloatTensor]]) -> dict[str, torch.Tensor]:
    """
    Pictures of unlike sizes and numbers, each `(3, height, width)`, a list for each problem -> one batch; nothing where
    there is not one picture. What is returned: `MMCoTProcessor.prepare_pictures`.
    """
    num_images = max(len(entry) for entry in pixels)
    if num_images == 0:
        return {}
    sizes = [picture.shape[1:] for entry in pixels for picture in entry]
    height, width = (max(size[side] for size in sizes) for side in (0, 1))
    values = torch.zeros(len(pixels), num_images, 3, height, width)
    mask = torch.zeros(len(pixels), num_images, height, width, dtype=torch.bool)
    for index, entry in enumerate(pixels):
        for number, picture in enumerate(entry):
            values[index, number, :, : picture.shape[1], : picture.shape[2]] = picture
            mask[index, number, : picture.shape[1], : picture.shape[2]] = True
    return {"pixel_values": values, "pixel_mask": mask}
