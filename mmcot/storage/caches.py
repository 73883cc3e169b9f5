"""Results that are computed once and cached on disk: the parts of their keys, and the repair of damaged files.

Other code or another version of a library may give other numbers, so both are part of a key. A truncated or damaged
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

DAMAGES = (ValueError, OSError, pyarrow.ArrowException)  # the errors that pyarrow and json raise for a damaged file


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
        place: the file or folder of the cached dataset, without other content, because it is removed if damaged.
        num_rows: the expected number of rows, where the cached file does not record it.
    """
    was_there = place.exists()
    try:
        return check_num_rows(make(), num_rows)
    except DAMAGES:
        if not was_there:
            raise
    with FileLock(place.with_name(f"{place.name}.lock")):
        try:
            return check_num_rows(make(), num_rows)  # another process may have computed it again in the meantime
        except DAMAGES as error:
            logger.warning("%s is truncated or damaged (%s): it is removed and computed again.", place, error)
        remove(place)
        return check_num_rows(make(), num_rows)


def check_num_rows(rows: Dataset, num_rows: int | None) -> Dataset:
    """
    Return `rows`. They are counted, because a file that is truncated between two batches of rows reads without error.

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
