"""Caches the preprocessed pixels of a dataset's pictures on disk, for all epochs and stages."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from transformers.image_processing_utils import BaseImageProcessor

from mmcot.pictures.reading import PICTURE_CODE, PICTURE_LIBRARIES, Picture, distinct_pictures, read_picture
from mmcot.problems.digests import ContentKeys
from mmcot.problems.progress_bars import without_dataset_bars
from mmcot.storage.caches import code_digest, load_or_compute, versions_of
from mmcot.storage.files import cache_folder
from modeling_mmcot.pictures_mmcot import as_rgb, picture_pixels, stack_pixels

# If the pixels of all pictures exceed this size, they are not cached, and pictures are decoded again for each batch.
MAX_CACHED_BYTES = 8e9


class PixelStore:
    """
    The pixels of the problems' pictures, preprocessed for a tower, in a memory-mapped cache of `datasets`.

    Raises:
        ValueError: a picture cannot be decoded; the message names it.
    """

    def __init__(self, problems: Dataset, image_processor: BaseImageProcessor):
        pictures = distinct_pictures(problems)
        self.rows = {key: row for row, (key, *_) in enumerate(pictures)}
        self.image_processor = image_processor
        self.key_of = ContentKeys()
        self.cached = self.cache(pictures)

    def cache(self, pictures: list[Picture]) -> Dataset | None:
        if not pictures or len(pictures) * self.prepare(pictures[0]).nbytes > MAX_CACHED_BYTES:
            for picture in pictures:  # so that a damaged picture is an error before training, not during it
                self.prepare(picture)
            return None
        producers = (code_digest(*PICTURE_CODE, PixelStore), versions_of(*PICTURE_LIBRARIES))
        key = Hasher.hash((list(self.rows), self.image_processor.to_dict(), producers))
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
                return load_or_compute(make, folder, len(pictures)).with_format("arrow")
        except DatasetGenerationError as error:
            raise error.__cause__ from None  # the cause names the picture and the problem

    def generate(self, pictures: list[Picture]) -> Iterator[dict[str, Any]]:
        for picture in pictures:
            pixels = self.prepare(picture)
            yield {"pixels": pixels.astype("<f4").tobytes(), "shape": pixels.shape}

    def prepare(self, picture: Picture) -> np.ndarray:
        _, content, problem_id = picture
        return picture_pixels(self.image_processor, as_rgb(read_picture(content, problem_id))).numpy()

    def read(self, picture: dict[str, Any], problem_id: str) -> torch.FloatTensor:
        """Return pixels of shape `(3, height, width)`."""
        if self.cached is None:
            return torch.from_numpy(self.prepare(("", picture, problem_id)))
        row = self.cached[self.rows[self.key_of(picture)]]
        pixels = np.frombuffer(row["pixels"][0].as_buffer(), dtype="<f4").reshape(row["shape"][0].as_py())
        return torch.from_numpy(pixels.copy())

    def batch(self, problems: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `pixel_values` and `pixel_mask`, as the processor does; an empty dict if no problem has a picture."""
        pixels = [[self.read(picture, problem["id"]) for picture in problem["images"]] for problem in problems]
        return stack_pixels(pixels)
