"""Pictures of every kind that users have -> RGB -> the pixels of a batch.

Notable:
- pictures become RGB one at a time and in bounded memory, whatever their mode, size or shape;
- they are always prepared in the Pillow backend of transformers' image processors: the same numbers with torchvision
  and without it, and those of the authors' code, which used Pillow.

Nothing here knows of text, problems or the model.
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

# A larger picture is reduced by a whole factor as it is read, and a longer strip is made shorter and wider: no tower
# sees the difference, and a resize by the shorter side would make either fill the memory.
MAX_PIXELS = 16_000_000
MAX_ASPECT = 32
MAX_STRIP = 8192
# All are raster formats that Pillow reads by itself; of those below, Ghostscript or the system draws the pixels.
DRAWN_FORMATS = ("EPS", "WMF")
Image.init()
FORMATS = tuple(
    name for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
MAX_DOWNLOAD = 64_000_000  # bytes
MAX_DOWNLOAD_TIME = 300  # seconds
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
MAX_PATH = 1024  # characters; a longer text that names no file is base64
BASE64_BEGINNINGS = ("iVBOR", "/9j/", "R0lGOD", "UklGR")  # of PNG, JPEG, GIF and WEBP
MAX_SHOWN = 300  # characters of a name in a message; a name can be a megabyte of base64
# Their settings choose Tesseract's arguments, or a file of another repository.
REFUSED_PROCESSORS = ("LayoutLMv2ImageProcessor", "LayoutLMv3ImageProcessor", "OneFormerImageProcessor")


def as_pictures(entry) -> list[Image.Image]:
    """
    The pictures of one problem, given as none, one or a list of what `open_picture` takes, as RGB.
    """
    if entry is None:
        return []
    entries = entry if isinstance(entry, (list, tuple)) else [entry]
    return [as_rgb(open_picture(picture)) for picture in entries]


def open_picture(picture) -> Image.Image:
    """
    Args:
        picture: a PIL image, a path (`~` is the home folder), a URL, a `data:` URL or base64, the bytes of a file or an
            open file, an undecoded picture of `datasets` (`{"bytes": …, "path": …}`), or an array or tensor of shape
            `(height, width)`, `(height, width, 3)` or `(3, height, width)`, of whole numbers from 0 to 255 or floats
            from 0 to 1.

    Raises:
        FileNotFoundError: a path that leads to no file.
        ValueError: any other value, or one that leads to no whole picture in one of `FORMATS`.
    """
    if isinstance(picture, Image.Image):
        return raster(picture)
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
    raise ValueError(f"a picture is given as {kinds}; found {picture!r:.80}")


def raster(picture: Image.Image) -> Image.Image:
    """A PIL image is decoded when it is first read, and may be one that Pillow hands to Ghostscript."""
    if picture.format in DRAWN_FORMATS:
        raise ValueError(f"a picture is a PIL image of the format {picture.format}; expected one of pixels.")
    return picture


def open_named(name: str) -> Image.Image:
    """A picture by its path or URL, or one that is written in the name itself, as base64."""
    if name.startswith(("http://", "https://")):
        return decode_picture(io.BytesIO(download(name)), name)
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return decode_picture(path, path)
    if name.startswith("data:"):
        return decode_picture(io.BytesIO(from_base64(name.partition(",")[2])), name)
    if name.startswith(BASE64_BEGINNINGS) or len(name) > MAX_PATH:
        return decode_picture(io.BytesIO(from_base64(name)), name)
    raise FileNotFoundError(f"picture {shortened(name)!r}: there is no such file.")


def shortened(name: str) -> str:
    """A name for a message: whole, or its beginning and its end."""
    return name if len(name) <= MAX_SHOWN else f"{name[: MAX_SHOWN // 2]}…{name[-MAX_SHOWN // 3 :]}"


def from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"picture {shortened(text)!r} is neither a file's path, a URL nor base64: {error}") from error


class PublicRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect, unless it leads from the internet into the network of the machine that follows it."""

    def redirect_request(self, request, response, code, message, headers, url):
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise urllib.error.URLError(f"it redirects to {shortened(url)}; expected a URL of http or https")
        if is_public(request.full_url) and not is_public(url):
            raise urllib.error.URLError(f"it redirects to {shortened(url)}, whose address is not public")
        return super().redirect_request(request, response, code, message, headers, url)


def is_public(url: str) -> bool:
    """Whether every address of a URL's host is one of the internet."""
    try:
        found = socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None)
    except OSError:  # a name that only a proxy can resolve: without one it is not reached either
        return True
    return all(ipaddress.ip_address(address[0].partition("%")[0]).is_global for *_, address in found)


def download(url: str) -> bytes:
    """
    Raises:
        ValueError: the URL does not answer with a file of at most `MAX_DOWNLOAD` bytes within `MAX_DOWNLOAD_TIME`.
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
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: it is no URL
        raise ValueError(f"picture {shortened(url)} cannot be downloaded: {shortened(str(error))}") from error
    if content.tell() > MAX_DOWNLOAD:
        raise ValueError(f"picture {shortened(url)} is larger than {MAX_DOWNLOAD} bytes.")
    return content.getvalue()


def from_array(array) -> Image.Image:
    values = array_values(array)
    if values.dim() == 3 and values.shape[0] == 3 and values.shape[2] != 3:
        values = values.permute(1, 2, 0)
    if values.dim() not in (2, 3) or values.numel() == 0 or (values.dim() == 3 and values.shape[2] != 3):
        raise ValueError(
            f"a picture as an array is of shape (height, width), (height, width, 3) or (3, height, width); found "
            f"{tuple(array.shape)}."
        )
    highest = 1 if values.is_floating_point() else 255
    if not (values.min() >= 0 and values.max() <= highest):
        raise ValueError(
            f"a picture as an array holds whole numbers from 0 to 255 or floats from 0 to 1; found {array.dtype} from "
            f"{values.min().item():g} to {values.max().item():g}."
        )
    values = (values.float() * 255).round() if values.is_floating_point() else values
    return Image.fromarray(values.to(torch.uint8).contiguous().numpy())


def array_values(array) -> torch.Tensor:
    """An array's numbers, whole or floats. numpy's are copied: a view can run backwards, which torch cannot."""
    try:
        values = torch.as_tensor(array if isinstance(array, torch.Tensor) else array.__array__().copy())
    except TypeError as error:
        raise ValueError(f"a picture as an array holds numbers; found {array.dtype}.") from error
    if values.dtype == torch.bool or values.is_complex():
        raise ValueError(f"a picture as an array holds whole numbers or floats; found {array.dtype}.")
    values = values.detach().cpu()
    # torch finds no least of the unsigned types beyond uint8.
    return values if values.is_floating_point() or values.dtype == torch.uint8 else values.long()


def decode_picture(file: str | BinaryIO, name: str) -> Image.Image:
    """Only the formats of `FORMATS`: Pillow would hand PostScript to Ghostscript, whatever the file's name says."""
    try:
        with Image.open(file, formats=FORMATS) as opened:
            shrink_while_reading(opened)
            opened.load()
            return upright(opened)
    except Exception as error:  # a damaged file makes Pillow's decoders raise errors of many kinds
        raise ValueError(
            f"picture {shortened(name)} is not a whole image that Pillow reads, or is too large: {error}"
        ) from error


def surplus(picture: Image.Image) -> int:
    """By which whole factor its sides are larger than any tower needs."""
    return math.ceil(math.sqrt(picture.width * picture.height / MAX_PIXELS))


def shrink_while_reading(opened: Image.Image) -> None:
    """Of a JPEG that is too large, let only a half, a quarter or an eighth of its sides be decoded."""
    if surplus(opened) > 1:
        opened.draft(None, (opened.width // surplus(opened), opened.height // surplus(opened)))


def upright(picture: Image.Image) -> Image.Image:
    """As its camera was held."""
    is_turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(picture) if is_turned else picture


def as_rgb(picture: Image.Image) -> Image.Image:
    """
    As every tower takes a picture: upright, RGB, the first frame, of bounded size. Transparency is dropped, as the
    original and transformers drop it; 16-bit grey is scaled, where Pillow's own conversion cuts it off at white.
    """
    picture = upright(picture)
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
    if not isinstance(settings, dict):
        raise ValueError(f"image_processor is {settings!r:.80}; expected a dict.")
    settings = dict(settings)
    name = settings.pop("image_processor_type", None)
    if name == "TimmWrapperImageProcessor":
        if not isinstance(settings.get("data_config"), dict):
            raise ValueError(f"data_config of {name} is {settings.get('data_config')!r:.80}; expected a dict.")
        # It saves what it made of `pretrained_cfg`, which it takes for one again.
        return transformers.TimmWrapperImageProcessor(settings["data_config"], settings.get("architecture"))
    name = str(name).removesuffix("Fast")
    image_processor_class = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name, None)
    # The name comes from a file that may be a stranger's: nothing but an image processor is called.
    if not (isinstance(image_processor_class, type) and issubclass(image_processor_class, BaseImageProcessor)):
        raise ValueError(f"image_processor_type is {name!r:.80}; expected an image processor of transformers.")
    if image_processor_class.__name__.removesuffix("Pil") in REFUSED_PROCESSORS:
        raise ValueError(
            f"image_processor_type is {name!r}; expected an image processor of transformers that starts no program "
            f"and reads no other file."
        )
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
