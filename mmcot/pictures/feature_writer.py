"""Writes the features of a dataset's pictures to disk in batches; `feature_store.py` reads them.

The rows of a batch are written before its keys, so a batch with keys is complete. After a kill, the same command
resumes and repeats only the interrupted batch.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from mmcot.pictures.feature_store import KEYS, ROWS, file_size, read_key_batches
from mmcot.pictures.manifest import (
    MANIFEST,
    PRODUCERS,
    fields_of,
    read_manifest,
    record_type,
    warn_of_other_producers,
    write_manifest,
)
from mmcot.storage.resumable_log import ResumableLog

logger = logging.getLogger(__name__)


class FeatureWriter:
    """
    Appends batches to a store; a batch is added with all its rows or not at all. The store is locked for this process
    until the `with` block of the writer ends.

    Args:
        folder: the store, new or begun by an earlier call with the same settings.
        settings: the manifest's entries except `record`, which the first batch determines.
        is_cache: whether the folder is a cache and not chosen by the user. In a cache, wait for another process that
            writes there, and replace truncated or damaged files with a warning.

    Raises:
        ValueError: another process writes to the folder, or its rows are damaged or have other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], is_cache: bool = False):
        self.folder, self.is_cache = folder, is_cache
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / ".lock")
        try:
            self.lock.acquire(timeout=-1 if is_cache else 0)
        except Timeout as error:
            raise ValueError(f"{folder} is being written by another process.") from error
        self.settings = json.loads(json.dumps(settings))
        self.record: np.dtype | None = None
        self.keys: set[str] = set()
        self.log: ResumableLog | None = None

    def __enter__(self) -> "FeatureWriter":
        try:
            self.open()
        except ValueError as error:
            if not self.is_cache:
                self.lock.release()
                raise
            logger.warning("%s The features are removed and computed again.", error)
            self.begin()
        self.log = ResumableLog(self.folder / KEYS)
        return self

    def __exit__(self, *_) -> None:
        self.log.close()
        self.lock.release()

    def open(self) -> None:
        batches = read_key_batches(self.folder)
        self.keys.update(key for batch in batches for key in batch)
        if self.keys:
            self.resume(batches)
        else:
            self.begin()

    def begin(self) -> None:
        self.keys, self.record = set(), None
        for name in (KEYS, ROWS):
            (self.folder / name).write_bytes(b"")
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def resume(self, batches: list[list[str]]) -> None:
        """Check the existing rows, and remove those that a killed call wrote after its last complete batch."""
        if not (self.folder / MANIFEST).exists():
            raise ValueError(f"{self.folder} has rows but no {MANIFEST}: remove it and compute it again.")
        manifest = read_manifest(self.folder)
        # The tower is identified by a digest of its weights, not by its folder or its repository's commit.
        for name in self.settings.keys() - {"tower", "revision", *PRODUCERS}:
            self.require_equal(name, manifest.get(name), self.settings[name])
        warn_of_other_producers(self.folder, manifest, self.settings)
        self.record = record_type(manifest["record"])
        size = sum(map(len, batches)) * self.record.itemsize
        found = file_size(self.folder / ROWS)
        if found < size:
            raise ValueError(
                f"{self.folder / ROWS} has {found} bytes; its {len(self.keys)} rows are {size}. The file is truncated: "
                f"remove {self.folder} and compute it again."
            )
        os.truncate(self.folder / ROWS, size)

    def add(self, keys: list[str], rows: np.ndarray) -> None:
        if not np.isfinite(rows["features"]).all():
            raise ValueError(f"The features overflow {rows['features'].dtype}; use --dtype float32.")
        if self.record is None:
            write_manifest(self.folder, {**self.settings, "record": fields_of(rows.dtype)})
            self.record = rows.dtype
        self.require_equal("record", fields_of(self.record), fields_of(rows.dtype))
        with (self.folder / ROWS).open("ab") as file:
            file.write(rows.tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.log.append(keys)
        self.keys.update(keys)

    def require_equal(self, name: str, there: Any, here: Any) -> None:
        if there != here:
            raise ValueError(
                f"{self.folder} contains features with other settings: {name} is {there!r} there, {here!r} here. "
                f"Choose another --output."
            )
