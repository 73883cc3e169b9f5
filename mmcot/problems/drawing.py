"""The common parts of drawn problems: a canvas, the colors, and the split of a combination of values.

The texts and the drawings of the problems are in `demo.py` and in the `study_*.py` files.
"""

import hashlib
import io
import random
from collections.abc import Iterable
from functools import cache

from PIL import Image, ImageDraw, ImageFont

SIZE = 96  # side of a picture, px
SCALE = 2  # pictures are drawn larger by this factor and averaged down, for smooth edges

# Far apart in RGB, so that the color of a patch is recognizable even if half of the patch is background.
COLORS = {
    "red": (228, 26, 38),
    "yellow": (255, 208, 0),
    "green": (20, 160, 60),
    "blue": (24, 84, 232),
    "purple": (164, 44, 204),
    "black": (28, 28, 32),
}
PAPER = (250, 249, 245)
LINE = (214, 214, 208)
INK = (96, 98, 104)


def split_of_combination(name: str, values: tuple) -> str:
    """Return the split of a combination of values, by its digest: 10 % val, 20 % test, 70 % train."""
    digest = hashlib.sha256(f"{name} {values!r}".encode()).digest()
    return ("val", "test", "test", *["train"] * 7)[int.from_bytes(digest[:4], "big") % 10]


class Canvas:
    """A picture to draw on. Coordinates are px of the finished picture, boxes are (left, top, right, bottom)."""

    def __init__(self, background: Image.Image | tuple[int, int, int] = PAPER):
        side = SIZE * SCALE
        self.image = Image.new("RGB", (side, side), background) if isinstance(background, tuple) else background.copy()
        self._draw = ImageDraw.Draw(self.image)

    def rectangle(self, box: tuple, fill=None, outline=None, radius: float = 0) -> None:
        self._draw.rounded_rectangle(_scaled_box(box), radius * SCALE, fill, outline, SCALE)

    def ellipse(self, box: tuple, fill=None, outline=None) -> None:
        self._draw.ellipse(_scaled_box(box), fill, outline, SCALE)

    def polygon(self, points: Iterable[tuple], fill=None, outline=None) -> None:
        self._draw.polygon([(x * SCALE, y * SCALE) for x, y in points], fill, outline, SCALE)

    def line(self, start: tuple, end: tuple, fill) -> None:
        """Draw a horizontal or vertical line, one px wide."""
        (x0, y0), (x1, y1) = start, end
        self._draw.rectangle(_scaled_box((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))), fill)

    def text(self, center: tuple, text: str, size: int, fill, anchor: str = "mm") -> None:
        x, y = center
        self._draw.text((x * SCALE, y * SCALE), text, fill, _font(size * SCALE), anchor)

    def shape(self, name: str, center: tuple, radius: float, fill) -> None:
        """Draw a circle, a square or a triangle in a box of twice the radius around the center."""
        x, y = center
        box = (x - radius, y - radius, x + radius, y + radius)
        if name == "circle":
            self.ellipse(box, fill)
        elif name == "square":
            self.rectangle(box, fill)
        else:
            self.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill)

    def blot(self, rng: random.Random) -> None:
        """Draw ink at a random place, about as large as a shape of `SHAPES`."""
        x, y = rng.randint(0, SIZE), rng.randint(0, SIZE)
        self.ellipse((x - 13, y - 13, x + 13, y + 13), fill=INK)

    def png(self) -> bytes:
        file = io.BytesIO()
        self.image.reduce(SCALE).save(file, "PNG", compress_level=1)
        return file.getvalue()


def _scaled_box(box: tuple) -> tuple:
    left, top, right, bottom = (SCALE * value for value in box)
    return left, top, right - 1, bottom - 1  # Pillow's right and bottom are inside the box


@cache
def _font(size: int):
    return ImageFont.load_default(size)
