"""What is computed once and kept on disk: which code and libraries its key holds, and what becomes of a damaged file.

Other code or another version of a library may give other numbers, so both are part of a key. What is cut off or damaged
is removed and computed again, and the log says so. Where caches lie: `files.cache_folder`.
"""

import importlib.metadata
import inspect
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset
from filelock import FileLock

from mmcot.storage.digests import sha256_of_text

logger = logging.getLogger(__name__)

DAMAGES = (ValueError, OSError, pyarrow.ArrowException)  # what reading a damaged file raises: pyarrow's and json's


def code_digest(*parts: Any) -> str:
    """Of the source of modules, classes and functions."""
    return sha256_of_text("\0".join(map(inspect.getsource, parts)))


def versions_of(*libraries: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in libraries}


def kept(make: Callable[[], Dataset], place: Path, num_rows: int | None = None) -> Dataset:
    """
    What `make` computes, or finds where `datasets` kept it.

    Args:
        place: the file or folder that it is kept in, and nothing else.
        num_rows: how many rows it has, where the kept file does not say so itself.
    """
    was_there = place.exists()
    try:
        return whole(make(), num_rows)
    except DAMAGES:
        if not was_there:
            raise
    with FileLock(place.with_name(f"{place.name}.lock")):
        try:
            return whole(make(), num_rows)  # another process computed it again meanwhile
        except DAMAGES as error:
            logger.warning("%s is cut off or damaged (%s): it is removed and computed again.", place, error)
        remove(place)
        return whole(make(), num_rows)


def whole(rows: Dataset, num_rows: int | None) -> Dataset:
    """A file that is cut between two batches of rows is read without an error."""
    if num_rows is None:
        num_rows = sum(split.num_examples for split in rows.info.splits.values())
    if len(rows) != num_rows:
        raise ValueError(f"{len(rows)} of {num_rows} rows")
    return rows


def remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
