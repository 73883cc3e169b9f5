"""The features of a dataset's pictures on disk: written batch by batch, read a row at a time.

Notable:
- a store is `manifest.json` (what made it), `rows.bin` (one record of fixed size a picture) and `rows.jsonl` (the keys
  of each batch, a line a batch, written after its rows). A kill loses the batch in hand, and the same command goes on;
- a row is found by its picture's content (or, of an imported file, by problem id), mapped into memory when it is read
  and let go at once: reading all of a store keeps none of it resident;
- a store that does not fit a model or a dataset is refused with what differs; its tower is told by its weights.

How features are computed is `features.py`'s.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from mmcot.pictures.reading import PICTURE_CODE, PICTURE_LIBRARIES
from mmcot.problems.digests import ContentKeys
from mmcot.problems.schema import first_few
from mmcot.storage.caches import code_digest, versions_of
from mmcot.storage.files import read_json, write_json
from modeling_mmcot import MMCoTForConditionalGeneration, vision_mmcot
from modeling_mmcot.vision_mmcot import resolved_name

MANIFEST, ROWS, KEYS = "manifest.json", "rows.bin", "rows.jsonl"
MAKERS = ("code", "versions")  # in the manifest: what computed the features, beside tower and pictures

logger = logging.getLogger(__name__)


class FeatureStore:
    """
    A finished store, to read from.

    Args:
        folder: where `python -m mmcot.features` wrote it.

    Raises:
        ValueError: a file that is missing, cut off or was edited, by name.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.record = record_type(self.manifest["record"])
        keys = [key for batch in read_key_batches(self.folder) for key in batch]
        expected, found = len(keys) * self.record.itemsize, file_size(self.folder / ROWS)
        if expected != found:
            raise ValueError(
                f"{self.folder / ROWS} has {found} bytes; {len(keys)} rows of {self.record.itemsize} bytes are "
                f"{expected}. The file was cut off or is still being written: run mmcot.features again."
            )
        self.rows = {key: row for row, key in enumerate(keys)}
        self.key_of = ContentKeys()

    @property
    def hidden_size(self) -> int:
        return self.record["features"].shape[1]

    @property
    def num_patches(self) -> int:
        return self.record["features"].shape[0] * self.manifest["repeats"]

    @property
    def needs_files(self) -> bool:
        """Whether rows are found by the pictures' content; those of an imported file go by problem id."""
        return self.manifest["keys"] == "content"

    def read(self, key: str) -> dict[str, np.ndarray]:
        """One record, copied: `features`, and of a detector `boxes` and `class_scores` too."""
        offset = self.rows[key] * self.record.itemsize
        # Mapped for this row alone: pages of a mapping that lives on would stay resident, all of the store in the end.
        row = np.memmap(self.folder / ROWS, dtype=self.record, mode="r", offset=offset, shape=(1,))[0]
        return {name: np.array(row[name]) for name in self.record.names}

    def keys_of(self, problem: dict[str, Any]) -> list[str]:
        """The rows that a problem's pictures should have."""
        if not self.needs_files:
            return [problem["id"]] if problem["images"] or problem["id"] in self.rows else []
        return [self.key_of(picture) for picture in problem["images"]]

    def features_of(self, problem: dict[str, Any]) -> torch.Tensor:
        """`(num_images * num_patches, hidden_size)`, its pictures one after another."""
        features = [torch.from_numpy(self.read(key)["features"]) for key in self.keys_of(problem)]
        repeated = [patches.repeat(self.manifest["repeats"], 1) for patches in features]
        return torch.cat(repeated) if repeated else torch.zeros(0, self.hidden_size)

    def batch(self, problems: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `vision_features` `(batch_size, num_patches, hidden_size)` in float32 and `vision_mask`
            `(batch_size, num_patches)`, or nothing where no problem of the batch has a picture.
        """
        features = [self.features_of(problem).float() for problem in problems]
        if not any(len(patches) for patches in features):
            return {}
        masks = [torch.ones(len(patches), dtype=torch.bool) for patches in features]
        return {
            "vision_features": torch.nn.utils.rnn.pad_sequence(features, batch_first=True),
            "vision_mask": torch.nn.utils.rnn.pad_sequence(masks, batch_first=True),
        }

    def check_problems(self, problems: Dataset) -> None:
        """Every picture of the problems has its row, or a `ValueError` names those without."""
        absent = [row["id"] for row in problems if not all(key in self.rows for key in self.keys_of(row))]
        if absent:
            raise ValueError(
                f"{self.folder} has no features for the pictures of {len(absent)} of {len(problems)} problems: "
                f"{first_few(absent)}. Run mmcot.features on this dataset, with the same --max_images."
            )

    def check_model(self, model: MMCoTForConditionalGeneration, image_processor: BaseImageProcessor | None) -> None:
        """The features are those that the model's own tower would give, as far as the model has one."""
        config, tower = model.config, model.encoder.vision_tower
        self.compare("width of the patches", self.hidden_size, config.vision_hidden_size)
        name = config.vision_tower if tower is None else resolved_name(config.vision_config, config.vision_tower)
        if name is not None:
            self.compare("vision_tower", self.manifest["vision_tower"], name)
        if config.num_vision_tokens is not None:
            self.compare("patches of a picture", self.num_patches, config.num_vision_tokens)
        if tower is None or self.manifest["vision_config"] is None:
            return
        if not config.freeze_vision:
            raise ValueError(
                f"{self.folder} holds features of a fixed tower; this model trains its own: freeze_vision."
            )
        self.compare_fields("vision_config", self.manifest["vision_config"], tower_settings(config.vision_config))
        self.compare_fields("image_processor", self.manifest["image_processor"], settings_of(image_processor))
        warn_of_other_makers(self.folder, self.manifest, makers_of(tower))
        if tower.dtype != torch.float16:  # rounding it to bfloat16 rounds a second time
            self.compare("weights of the tower", self.manifest["weights"], weights_digest(tower))

    def compare_fields(self, name: str, here: dict, there: dict) -> None:
        for field in sorted(here.keys() | there.keys()):
            self.compare(f"{name}.{field}", here.get(field), there.get(field))

    def compare(self, name: str, here: Any, there: Any) -> None:
        if here != there:
            raise ValueError(f"{self.folder} does not fit: {name} is {here!r} in the store, {there!r} in the model.")


def read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} is no feature store: it has no {MANIFEST}. python -m mmcot.features writes one.")
    manifest = read_json(file)
    if manifest.get("digest") != manifest_digest(manifest):
        raise ValueError(
            f"{file} was edited: its digest does not belong to what it says. Remove {folder} and compute it again."
        )
    return manifest


def makers_of(tower: PreTrainedModel) -> dict[str, Any]:
    """The code and the libraries that make a tower's features of a picture."""
    libraries = [*PICTURE_LIBRARIES, "torch", *(["timm"] if tower.config.model_type == "timm_wrapper" else [])]
    return {"code": code_digest(*PICTURE_CODE, vision_mmcot), "versions": versions_of(*libraries)}


def warn_of_other_makers(folder: Path, manifest: dict[str, Any], now: dict[str, Any]) -> None:
    """Other code or libraries may give other features; computing them again is left to the user, because it is dear."""
    there, here = ({"mmcot's code": said.get("code"), **said.get("versions", {})} for said in (manifest, now))
    differing = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if differing and "versions" in now:
        words = ", ".join(f"{name} {short(there.get(name))} there, {short(here.get(name))} here" for name in differing)
        logger.warning(
            "%s holds features that other code or libraries computed (%s): they may differ from those of now.",
            folder,
            words,
        )


def short(said: str | None) -> str:
    """A version, or the first digits of a digest."""
    return "unknown" if said is None else said[:12]


def manifest_digest(manifest: dict[str, Any]) -> str:
    said = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def record_type(fields: list[list]) -> np.dtype:
    for name, dtype, _ in fields:
        if dtype not in ("<f2", "<f4"):  # numpy would take bytes of a file for addresses of objects
            raise ValueError(f"{MANIFEST}: record has {name} of type {dtype!r}; expected '<f2' or '<f4'.")
    return np.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in fields])


def read_key_batches(folder: Path) -> list[list[str]]:
    """The keys of each whole batch; a last line that was cut off is one that was not written."""
    file = folder / KEYS
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(
            f"{file}: not a list of keys in each line ({error}). Remove {folder} and compute it again."
        ) from error


def file_size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


class FeatureWriter:
    """
    Adds batches to a store, after those that are in it. A batch is there with all its rows or not at all. A context
    manager: the store is this process's until it is left.

    Args:
        folder: the store, begun by the same call or new.
        said: what the manifest says of the features, but for `record`, which the first batch shows.
        is_cache: nobody named the folder: where another process writes there, wait until it has finished, and where its
            files are cut off or damaged, remove them and say so in the log.

    Raises:
        ValueError: another process writes there, or the rows that are there are damaged or of another kind.
    """

    def __init__(self, folder: Path, said: dict[str, Any], is_cache: bool = False):
        self.folder, self.is_cache = folder, is_cache
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / ".lock")
        try:
            self.lock.acquire(timeout=-1 if is_cache else 0)
        except Timeout as error:
            raise ValueError(f"{folder} is being written by another process.") from error
        self.said = json.loads(json.dumps(said))
        self.record: np.dtype | None = None
        self.keys: set[str] = set()

    def __enter__(self) -> "FeatureWriter":
        try:
            self.open()
        except ValueError as error:
            if not self.is_cache:
                self.lock.release()
                raise
            logger.warning("%s The features are removed and computed again.", error)
            self.begin()
        return self

    def __exit__(self, *_) -> None:
        self.lock.release()

    def open(self) -> None:
        batches = read_key_batches(self.folder)
        self.keys.update(key for batch in batches for key in batch)
        if self.keys:
            self.go_on(batches)
        else:
            self.begin()

    def begin(self) -> None:
        self.keys, self.record = set(), None
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for name in (ROWS, KEYS):
            (self.folder / name).write_bytes(b"")

    def go_on(self, batches: list[list[str]]) -> None:
        """Take away what a killed run left behind its last whole batch."""
        if not (self.folder / MANIFEST).exists():
            raise ValueError(f"{self.folder} has rows and no {MANIFEST}: remove it and compute it again.")
        manifest = read_manifest(self.folder)
        # The weights tell a tower, wherever it lies and whatever else its repository was given since.
        for name in self.said.keys() - {"tower", "revision", *MAKERS}:
            self.compare(name, manifest.get(name), self.said[name])
        warn_of_other_makers(self.folder, manifest, self.said)
        self.record = record_type(manifest["record"])
        size = sum(map(len, batches)) * self.record.itemsize
        found = file_size(self.folder / ROWS)
        if found < size:
            raise ValueError(
                f"{self.folder / ROWS} has {found} bytes; its {len(self.keys)} rows are {size}. The file was cut off: "
                f"remove {self.folder} and compute it again."
            )
        os.truncate(self.folder / ROWS, size)
        os.truncate(self.folder / KEYS, sum(len(json.dumps(batch)) + 1 for batch in batches))

    def add(self, keys: list[str], rows: np.ndarray) -> None:
        if not np.isfinite(rows["features"]).all():
            raise ValueError(f"The features do not fit into {rows['features'].dtype}; take --dtype float32.")
        if self.record is None:
            manifest = {**self.said, "record": fields_of(rows.dtype)}
            write_json(self.folder / MANIFEST, {**manifest, "digest": manifest_digest(manifest)})
            self.record = rows.dtype
        self.compare("record", fields_of(self.record), fields_of(rows.dtype))
        append(self.folder / ROWS, rows.tobytes())
        append(self.folder / KEYS, json.dumps(keys).encode() + b"\n")
        self.keys.update(keys)

    def compare(self, name: str, there: Any, here: Any) -> None:
        if there != here:
            raise ValueError(
                f"{self.folder} holds features of another kind: {name} is {there!r} there, {here!r} here. Choose "
                f"another --output."
            )


def append(file: Path, content: bytes) -> None:
    with file.open("ab") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def weights_digest(tower: PreTrainedModel) -> str:
    """Of the weights as bfloat16, so that a model which holds them in that precision is known by it too."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        rounded = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        digest.update(name.encode())
        digest.update(rounded.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tower_settings(vision_config: PreTrainedConfig) -> dict[str, Any]:
    """What of a tower's configuration says which numbers it gives: not where it came from or in what it was saved."""
    said = json.loads(vision_config.to_json_string())
    for name in (
        "_name_or_path",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "id2label",
        "label2id",
    ):
        said.pop(name, None)
    return said


def settings_of(image_processor: BaseImageProcessor | None) -> dict[str, Any]:
    return {} if image_processor is None else json.loads(json.dumps(image_processor.to_dict()))


def fields_of(record: np.dtype) -> list[list]:
    return [[name, record[name].base.str, list(record[name].shape)] for name in record.names]
