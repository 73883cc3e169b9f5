"""Caches results on disk: computes the parts of their keys, and replaces damaged files.

A key contains digests of code and versions of libraries, because both can change the numbers. A truncated or damaged
file is removed and computed again, with a warning in the log. Caches are in `files.cache_folder`.
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

DAMAGE_ERRORS = (ValueError, OSError, pyarrow.ArrowException)  # raised by pyarrow and json for a damaged file


def code_digest(*parts: Any) -> str:
    """Return the digest of the source code of modules, classes and functions."""
    return sha256_of_text("\0".join(map(inspect.getsource, parts)))


def versions_of(*libraries: str) -> dict[str, str]:
    """Return the installed version of each library."""
    return {name: importlib.metadata.version(name) for name in libraries}


def load_or_compute(make: Callable[[], Dataset], place: Path, num_rows: int | None = None) -> Dataset:
    """
    Return the dataset that `make` computes, or loads from the cache of `datasets`.

    Args:
        place: the file or folder of the cached dataset. It contains nothing else, because it is removed if damaged.
        num_rows: the expected number of rows, if the cached file does not record it.
    """
    existed = place.exists()
    try:
        return check_num_rows(make(), num_rows)
    except DAMAGE_ERRORS:
        if not existed:
            raise
    with FileLock(place.with_name(f"{place.name}.lock")):
        try:
            return check_num_rows(make(), num_rows)  # another process may have computed it again in the meantime
        except DAMAGE_ERRORS as error:
            logger.warning("%s is truncated or damaged (%s): it is removed and computed again.", place, error)
        remove(place)
        return check_num_rows(make(), num_rows)


def check_num_rows(rows: Dataset, num_rows: int | None) -> Dataset:
    """
    Return `rows` if none is missing. A file that is truncated between two batches of rows is read without an error.

    Raises:
        ValueError: rows are missing.
    """
    if num_rows is None:
        num_rows = sum(split.num_examples for split in rows.info.splits.values())
    if len(rows) != num_rows:
        raise ValueError(f"{len(rows)} of {num_rows} rows")
    return rows


def remove(place: Path) -> None:
    """Remove a file or a folder."""
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
