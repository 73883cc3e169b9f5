"""Writes the features of a dataset's pictures to disk, batch by batch (`feature_store.py` reads them).

The rows of a batch are written before its keys, so a batch whose keys are there is whole. A kill loses the batch in
hand, and the same command resumes.
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
    MAKERS,
    MANIFEST,
    fields_of,
    read_manifest,
    record_type,
    warn_of_other_makers,
    write_manifest,
)
from mmcot.storage.resumable_log import ResumableLog

logger = logging.getLogger(__name__)


class FeatureWriter:
    """
    Adds batches to a store, after those that are in it. A batch is there with all its rows or not at all. A context
    manager: the store is this process's until it is left.

    Args:
        folder: the store, begun by the same call or new.
        settings: the manifest's entries but for `record`, which the first batch decides.
        is_cache: nobody named the folder: where another process writes there, wait until it has finished, and where its
            files are cut off or damaged, remove them and say so in the log.

    Raises:
        ValueError: another process writes there, or the rows that are there are damaged or of another kind.
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
        """Remove the rows that a killed call wrote after its last whole batch."""
        if not (self.folder / MANIFEST).exists():
            raise ValueError(f"{self.folder} has rows and no {MANIFEST}: remove it and compute it again.")
        manifest = read_manifest(self.folder)
        # A digest of the weights identifies the tower, whatever its folder or its repository's commit.
        for name in self.settings.keys() - {"tower", "revision", *MAKERS}:
            self.compare(name, manifest.get(name), self.settings[name])
        warn_of_other_makers(self.folder, manifest, self.settings)
        self.record = record_type(manifest["record"])
        size = sum(map(len, batches)) * self.record.itemsize
        found = file_size(self.folder / ROWS)
        if found < size:
            raise ValueError(
                f"{self.folder / ROWS} has {found} bytes; its {len(self.keys)} rows are {size}. The file was cut off: "
                f"remove {self.folder} and compute it again."
            )
        os.truncate(self.folder / ROWS, size)

    def add(self, keys: list[str], rows: np.ndarray) -> None:
        if not np.isfinite(rows["features"]).all():
            raise ValueError(f"The features do not fit into {rows['features'].dtype}; take --dtype float32.")
        if self.record is None:
            write_manifest(self.folder, {**self.settings, "record": fields_of(rows.dtype)})
            self.record = rows.dtype
        self.compare("record", fields_of(self.record), fields_of(rows.dtype))
        with (self.folder / ROWS).open("ab") as file:
            file.write(rows.tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.log.append(keys)
        self.keys.update(keys)

    def compare(self, name: str, there: Any, here: Any) -> None:
        if there != here:
            raise ValueError(
                f"{self.folder} holds features of another kind: {name} is {there!r} there, {here!r} here. Choose "
                f"another --output."
            )
