"""Which problems are the same, and how rows without `split` are divided, so that the same never stand on both sides.

Two problems are the same where their question, choices and context are, but for white space, and their pictures'
content. Nothing is read here but pictures' files.
"""

import hashlib
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcot.problems.schema import SPLIT_ALIASES, SPLITS, PicturePaths, check_file, split_named
from mmcot.storage.digests import cached_sha256_of_file, sha256_of_bytes, sha256_of_json

SPLIT_SEED = 42
# Of ten hashes, those that go to each split: 8:1:1.
SHARES = ("train",) * 8 + ("val", "test")

_NAMES = "|".join((*SPLITS, *SPLIT_ALIASES))


def named_parts(source: str) -> dict[str, str] | None:
    """`train=A.jsonl,test=B.jsonl` by split; None of a source that is not of that form."""
    if re.match(rf"({_NAMES})=", source) is None:
        return None
    parts: dict[str, str] = {}
    for part in re.split(rf",(?=(?:{_NAMES})=)", source):
        name, _, file = part.partition("=")
        split = split_named(name, source)
        if split in parts:
            raise ValueError(f"dataset is {source!r}, which names the split {split!r} twice.")
        parts[split] = file
    return parts


def content_key(row: Mapping[str, Any], picture_keys: list[str]) -> str:
    """What a problem has in common with all that are the same."""
    texts = [folded(row["question"]), [folded(choice) for choice in row["choices"]], folded(row["context"])]
    return sha256_of_json([texts, picture_keys])


def folded(text: str) -> str:
    return " ".join(text.split())


def drawn_split(key: str, split_seed: int) -> str:
    """By the problem's content alone, so that a row stays where it is when others come or go."""
    drawn = hashlib.sha256(f"{split_seed}/{key}".encode()).digest()
    return SHARES[int.from_bytes(drawn[:8]) % len(SHARES)]


def picture_keys(images: list[Any], paths: PicturePaths, where: str) -> list[str]:
    """Of the pictures of a row that is not in the schema yet; their files must be there."""
    keys = []
    for picture in images:
        if isinstance(picture, dict) and picture.get("bytes"):
            keys.append(sha256_of_bytes(picture["bytes"]))
            continue
        file = paths.resolve(picture if isinstance(picture, str) else picture["path"], where)
        check_file(file, where)
        keys.append(cached_sha256_of_file(file))
    return keys


def keys_of(problems: Dataset) -> dict[str, str]:
    """Of each problem by id. A picture whose file is not at hand goes by its path."""
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
    """By two splits (train, val; train, test; val, test), the ids of the second one whose problem the first one has."""
    keys = {split: keys_of(problems[split]) for split in SPLITS}
    found: dict[str, dict[str, list[str]]] = {}
    for first, second in itertools.combinations(SPLITS, 2):
        known = set(keys[first].values())
        found.setdefault(first, {})[second] = [name for name, key in keys[second].items() if key in known]
    return found
