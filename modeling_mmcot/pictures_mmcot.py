"""Pictures in all common forms -> RGB -> the pixels of a batch.

Notable:
- pictures are converted to RGB one at a time and in bounded memory, whatever their mode, size or shape;
- pictures are always prepared in the Pillow backend of transformers' image processors: the pixels are the same with and
  without torchvision, and the same as in the authors' code, which used Pillow.

This file does not depend on text, problems or the model.
"""

import base64
import binascii
import http.client
import io
import ipaddress
import math
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import BinaryIO

import torch
import transformers
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor

# A picture with more pixels is reduced by an integer factor when it is read. A strip with a larger aspect ratio is
# resized to a shorter and wider one. Without these limits, an image processor that resizes the shorter side would
# exhaust the memory. The limits make no difference to the towers.
MAX_PIXELS = 16_000_000
MAX_ASPECT = 32
MAX_STRIP = 8192
# Vector formats, whose pixels Pillow lets Ghostscript or the system draw. `FORMATS` are raster formats that Pillow
# decodes itself.
VECTOR_FORMATS = ("EPS", "WMF")
Image.init()
FORMATS = tuple(
    name for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
MAX_DOWNLOAD = 64_000_000  # bytes
MAX_DOWNLOAD_TIME = 300  # seconds
DOWNLOAD_TIMEOUT = 30  # seconds without a response
MAX_PATH = 1024  # characters; a longer string that is not an existing file is read as base64
BASE64_PREFIXES = ("iVBOR", "/9j/", "R0lGOD", "UklGR")  # of PNG, JPEG, GIF and WEBP
MAX_SHOWN = 300  # characters of a name in a message; a name can be a megabyte of base64
# The settings of these classes select arguments of Tesseract, or a file of another repository.
REFUSED_PROCESSORS = ("LayoutLMv2ImageProcessor", "LayoutLMv3ImageProcessor", "OneFormerImageProcessor")


def as_pictures(entry) -> list[Image.Image]:
    """Return the pictures of one problem in RGB, from None, one picture or a list of pictures (`open_picture`)."""
    if entry is None:
        return []
    entries = entry if isinstance(entry, (list, tuple)) else [entry]
    return [as_rgb(open_picture(picture)) for picture in entries]


def open_picture(picture) -> Image.Image:
    """
    Open a picture.

    Args:
        picture:
            A PIL image, a path (`~` is the home folder), a URL, a `data:` URL or base64, the bytes of a file or an open
            file, an undecoded picture of `datasets` (`{"bytes": …, "path": …}`), or an array or tensor of shape
            `(height, width)`, `(height, width, 3)` or `(3, height, width)` with integers from 0 to 255 or floats from 0
            to 1.

    Raises:
        FileNotFoundError: If there is no file at the path.
        ValueError: If the value has another type, or is not a complete picture in one of `FORMATS`.
    """
    if isinstance(picture, Image.Image):
        return check_raster(picture)
    if isinstance(picture, (str, os.PathLike)):
        return open_named(os.fspath(picture))
    if isinstance(picture, (bytes, bytearray)):
        return decode_picture(io.BytesIO(picture), "given as bytes")
    if hasattr(picture, "read"):
        return decode_picture(picture, "given as an open file")
    if isinstance(picture, torch.Tensor) or hasattr(picture, "__array__"):  # numpy's
        return from_array(picture)
    if isinstance(picture, dict) and picture.get("bytes"):
        return decode_picture(io.BytesIO(picture["bytes"]), picture.get("path") or "given as bytes")
    if isinstance(picture, dict) and isinstance(picture.get("path"), str):
        return open_named(picture["path"])
    kinds = 'a PIL image, a path, a URL, bytes, an array or {"bytes": …, "path": …}'
    raise ValueError(f"a picture must be {kinds}; found {picture!r:.80}")


def check_raster(picture: Image.Image) -> Image.Image:
    """
    Return a PIL image unchanged, unless Pillow would run Ghostscript to decode it on first access.

    Raises:
        ValueError: If the image has one of `VECTOR_FORMATS`.
    """
    if picture.format in VECTOR_FORMATS:
        raise ValueError(f"a picture is a PIL image in the format {picture.format}; expected a raster image.")
    return picture


def open_named(name: str) -> Image.Image:
    """Open a picture from a path or a URL, or from base64 in the string itself."""
    if name.startswith(("http://", "https://")):
        return decode_picture(io.BytesIO(download(name)), name)
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return decode_picture(path, path)
    if name.startswith("data:"):
        return decode_picture(io.BytesIO(from_base64(name.partition(",")[2])), name)
    if name.startswith(BASE64_PREFIXES) or len(name) > MAX_PATH:
        return decode_picture(io.BytesIO(from_base64(name)), name)
    raise FileNotFoundError(f"picture {shorten_name(name)!r}: there is no such file.")


def shorten_name(name: str) -> str:
    """Shorten a long name to its first and last characters, for messages."""
    return name if len(name) <= MAX_SHOWN else f"{name[: MAX_SHOWN // 2]}…{name[-MAX_SHOWN // 3 :]}"


def from_base64(text: str) -> bytes:
    """
    Decode base64, with or without white space.

    Raises:
        ValueError: If the text is not base64.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"picture {shorten_name(text)!r} is neither a path, a URL nor base64: {error}") from error


class PublicRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect, unless it leads from a public address to a private one of this machine's network."""

    def redirect_request(self, request, response, code, message, headers, url):
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise urllib.error.URLError(f"it redirects to {shorten_name(url)}; expected an http or https URL")
        if is_public(request.full_url) and not is_public(url):
            raise urllib.error.URLError(f"it redirects to {shorten_name(url)}, whose address is not public")
        return super().redirect_request(request, response, code, message, headers, url)


def is_public(url: str) -> bool:
    """Return whether all addresses of a URL's host are public."""
    try:
        found = socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None)
    except OSError:  # only a proxy can resolve such a name; without a proxy the request fails anyway
        return True
    return all(ipaddress.ip_address(address[0].partition("%")[0]).is_global for *_, address in found)


def download(url: str) -> bytes:
    """
    Download a file into memory.

    Raises:
        ValueError: If the URL does not return a file of at most `MAX_DOWNLOAD` bytes within `MAX_DOWNLOAD_TIME`.
    """
    end, content = time.monotonic() + MAX_DOWNLOAD_TIME, io.BytesIO()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mmcot"})
        opener = urllib.request.build_opener(PublicRedirects)
        with opener.open(request, timeout=DOWNLOAD_TIMEOUT) as response:
            while content.tell() <= MAX_DOWNLOAD and (part := response.read1(1 << 16)):
                content.write(part)
                if time.monotonic() > end:
                    raise TimeoutError(f"it takes longer than {MAX_DOWNLOAD_TIME} seconds")
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: an invalid URL
        raise ValueError(f"picture {shorten_name(url)} cannot be downloaded: {shorten_name(str(error))}") from error
    if content.tell() > MAX_DOWNLOAD:
        raise ValueError(f"picture {shorten_name(url)} is larger than {MAX_DOWNLOAD} bytes.")
    return content.getvalue()


def from_array(array) -> Image.Image:
    """
    Convert an array or tensor to a PIL image.

    Raises:
        ValueError: If its shape, dtype or range of values is not that of a picture (see `open_picture`).
    """
    values = read_array(array)
    if values.dim() == 3 and values.shape[0] == 3 and values.shape[2] != 3:
        values = values.permute(1, 2, 0)
    if values.dim() not in (2, 3) or values.numel() == 0 or (values.dim() == 3 and values.shape[2] != 3):
        raise ValueError(
            f"a picture as an array must have the shape (height, width), (height, width, 3) or (3, height, width); "
            f"found {tuple(array.shape)}."
        )
    highest = 1 if values.is_floating_point() else 255
    if not (values.min() >= 0 and values.max() <= highest):
        raise ValueError(
            f"a picture as an array must contain integers from 0 to 255 or floats from 0 to 1; found {array.dtype} "
            f"from {values.min().item():g} to {values.max().item():g}."
        )
    values = (values.float() * 255).round() if values.is_floating_point() else values
    return Image.fromarray(values.to(torch.uint8).contiguous().numpy())


def read_array(array) -> torch.Tensor:
    """
    Convert an array to a tensor. numpy arrays are copied, because torch does not support negative strides.

    Raises:
        ValueError: If the array contains neither integers nor floats.
    """
    try:
        values = torch.as_tensor(array if isinstance(array, torch.Tensor) else array.__array__().copy())
    except TypeError as error:
        raise ValueError(f"a picture as an array must contain numbers; found {array.dtype}.") from error
    if values.dtype == torch.bool or values.is_complex():
        raise ValueError(f"a picture as an array must contain integers or floats; found {array.dtype}.")
    values = values.detach().cpu()
    # torch does not implement `min` for unsigned types other than uint8.
    return values if values.is_floating_point() or values.dtype == torch.uint8 else values.long()


def decode_picture(file: str | BinaryIO, name: str) -> Image.Image:
    """
    Decode a file in one of `FORMATS`. Others are excluded, because Pillow passes PostScript, under any file name, to
    Ghostscript.

    Raises:
        ValueError: If the file is damaged, too large or in another format.
    """
    try:
        with Image.open(file, formats=FORMATS) as opened:
            shrink_while_reading(opened)
            opened.load()
            return apply_orientation(opened)
    except Exception as error:  # Pillow's decoders raise many kinds of errors for a damaged file
        raise ValueError(
            f"picture {shorten_name(name)} is not a complete image that Pillow can read, or is too large: {error}"
        ) from error


def reduction_factor(picture: Image.Image) -> int:
    """Return the integer factor by which the sides of a picture must shrink to have at most `MAX_PIXELS`."""
    return math.ceil(math.sqrt(picture.width * picture.height / MAX_PIXELS))


def shrink_while_reading(opened: Image.Image) -> None:
    """Make Pillow decode a JPEG that is too large at a half, a quarter or an eighth of its size."""
    factor = reduction_factor(opened)
    if factor > 1:
        opened.draft(None, (opened.width // factor, opened.height // factor))


def apply_orientation(picture: Image.Image) -> Image.Image:
    """Rotate a picture according to the orientation in its EXIF data."""
    is_turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(picture) if is_turned else picture


def as_rgb(picture: Image.Image) -> Image.Image:
    """
    Convert a picture to the form that all towers accept: upright, RGB, the first frame, of bounded size.

    Transparency is dropped, as in the original and in transformers. 16-bit grey is scaled, because Pillow's own
    conversion clips it to white.
    """
    picture = apply_orientation(picture)
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if reduction_factor(picture) > 1:
        picture = picture.reduce(reduction_factor(picture))
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        sides = [min(side, MAX_STRIP) for side in picture.size]
        picture = picture.resize(tuple(max(side, max(sides) // MAX_ASPECT) for side in sides))
    return picture


def build_image_processor(settings: dict) -> BaseImageProcessor:
    """
    Build an image processor of transformers from its `to_dict()`, in the Pillow backend if there is one.

    Args:
        settings (`dict`):
            `image_processor_type` is the name of the class, all other entries are its arguments.

    Raises:
        ValueError: If the settings are not a dict, or the class is not an image processor of transformers, or one of
            `REFUSED_PROCESSORS`.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"image_processor is {settings!r:.80}; expected a dict.")
    settings = dict(settings)
    name = settings.pop("image_processor_type", None)
    if name == "TimmWrapperImageProcessor":
        if not isinstance(settings.get("data_config"), dict):
            raise ValueError(f"data_config of {name} is {settings.get('data_config')!r:.80}; expected a dict.")
        # This class saves the `data_config` that it derived from `pretrained_cfg`, and accepts it as `pretrained_cfg`.
        return transformers.TimmWrapperImageProcessor(settings["data_config"], settings.get("architecture"))
    name = str(name).removesuffix("Fast")
    image_processor_class = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name, None)
    # The name comes from a file that may be untrusted: only image processors are called.
    if not (isinstance(image_processor_class, type) and issubclass(image_processor_class, BaseImageProcessor)):
        raise ValueError(f"image_processor_type is {name!r:.80}; expected an image processor of transformers.")
    if image_processor_class.__name__.removesuffix("Pil") in REFUSED_PROCESSORS:
        raise ValueError(
            f"image_processor_type is {name!r}; expected an image processor of transformers that starts no program and "
            f"reads no other file."
        )
    return image_processor_class(**settings)


def in_pillow_backend(image_processor: BaseImageProcessor) -> BaseImageProcessor:
    """Return the image processor in the Pillow backend if there is one, as if it were saved and loaded again."""
    has_two_backends = hasattr(transformers, f"{type(image_processor).__name__}Pil")
    return build_image_processor(image_processor.to_dict()) if has_two_backends else image_processor


def picture_pixels(image_processor: BaseImageProcessor, picture: Image.Image) -> torch.FloatTensor:
    """Return the pixels of one RGB picture, `(3, height, width)`."""
    return image_processor(picture, return_tensors="pt")["pixel_values"][0]


def stack_pixels(pixels: list[list[torch.FloatTensor]]) -> dict[str, torch.Tensor]:
    """
    Stack pictures of different sizes, each `(3, height, width)`, with one list of pictures per problem.

    Returns:
        The outputs of `MMCoTProcessor.prepare_pictures`: `pixel_values` and `pixel_mask`, or an empty dict if no
        problem has a picture.
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
