"""Identifies equal problems, and divides rows without `split` so that equal problems never get into different splits.

Two problems are equal if their question, choices and context are equal except for white space, and if the content of
their pictures is equal. This module reads only the files of pictures.
"""

import hashlib
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcot.problems.schema import SPLIT_ALIASES, SPLITS, PicturePaths, check_file, normalize_split
from mmcot.storage.digests import cached_sha256_of_file, sha256_of_bytes, sha256_of_json

SPLIT_SEED = 42
# The splits of ten hash values: 8:1:1.
SHARES = ("train",) * 8 + ("val", "test")

_NAMES = "|".join((*SPLITS, *SPLIT_ALIASES))


def parse_split_files(source: str) -> dict[str, str] | None:
    """
    Parse `train=A.jsonl,test=B.jsonl` into files by split. Return None for a source of another form.

    Raises:
        ValueError: a split is named twice.
    """
    if re.match(rf"({_NAMES})=", source) is None:
        return None
    parts: dict[str, str] = {}
    for part in re.split(rf",(?=(?:{_NAMES})=)", source):
        name, _, file = part.partition("=")
        split = normalize_split(name, source)
        if split in parts:
            raise ValueError(f"dataset is {source!r}, which names the split {split!r} twice.")
        parts[split] = file
    return parts


def content_key(row: Mapping[str, Any], picture_keys: list[str]) -> str:
    """Return a digest that is equal for equal problems."""
    texts = [
        collapse_whitespace(row["question"]),
        [collapse_whitespace(choice) for choice in row["choices"]],
        collapse_whitespace(row["context"]),
    ]
    return sha256_of_json([texts, picture_keys])


def collapse_whitespace(text: str) -> str:
    """Return the text with single spaces, and without white space at its ends."""
    return " ".join(text.split())


def draw_split(key: str, split_seed: int) -> str:
    """Draw a split from the content of a problem alone, so that a row keeps its split when other rows change."""
    drawn = hashlib.sha256(f"{split_seed}/{key}".encode()).digest()
    return SHARES[int.from_bytes(drawn[:8]) % len(SHARES)]


def picture_keys(images: list[Any], paths: PicturePaths, where: str) -> list[str]:
    """
    Return the digests of the pictures of a row that is not in the schema yet.

    Raises:
        ValueError: the file of a picture is missing or empty.
    """
    keys = []
    for picture in images:
        if isinstance(picture, dict) and picture.get("bytes"):
            keys.append(sha256_of_bytes(picture["bytes"]))
            continue
        file = paths.resolve(picture if isinstance(picture, str) else picture["path"], where)
        check_file(file, where)
        keys.append(cached_sha256_of_file(file))
    return keys


def content_keys(problems: Dataset) -> dict[str, str]:
    """Return the content key of each problem by id. If the file of a picture is missing, its path is used."""
    keys = {}
    for row in problems.select_columns(["id", "question", "choices", "context", "images"]):
        pictures = [
            sha256_of_bytes(picture["bytes"])
            if picture["bytes"]
            else cached_sha256_of_file(Path(picture["path"]))
            if Path(picture["path"]).is_file()
            else picture["path"]
            for picture in row["images"]
        ]
        keys[row["id"]] = content_key(row, pictures)
    return keys


def overlaps(problems: Mapping[str, Dataset]) -> dict[str, dict[str, list[str]]]:
    """
    Find problems that occur in two splits.

    Returns:
        `{first: {second: ids}}` for the pairs of splits (train, val), (train, test) and (val, test): the ids, in the
        second split, of the problems that the first split contains too.
    """
    keys = {split: content_keys(problems[split]) for split in SPLITS}
    found: dict[str, dict[str, list[str]]] = {}
    for first, second in itertools.combinations(SPLITS, 2):
        known = set(keys[first].values())
        found.setdefault(first, {})[second] = [name for name, key in keys[second].items() if key in known]
    return found
