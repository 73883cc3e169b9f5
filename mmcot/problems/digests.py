"""Digests of problems: whether they are still what they were when something was trained, predicted or scored.

What is recorded where, and what a difference means, is the affair of those who compare.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmcot.problems.schema import FEATURES, first_few
from mmcot.storage.digests import sha256_of_bytes, sha256_of_file, sha256_of_json
from mmcot.storage.predictions import read_meta

HEX_DIGITS = 16  # of each problem: 64 bits, so that a large dataset's stay small on disk

Digests = dict[str, list[str | None]]  # by a problem's id those of its texts and of its pictures


def problem_digests(problems: Iterable[dict]) -> Digests:
    """
    Of each problem by id: the digest of all its columns but the pictures, and that of its pictures' content. The second
    one is None where a picture's file is not at hand.
    """
    key_of = ContentKeys()

    def pictures(row: dict) -> str | None:
        if any(not picture["bytes"] and not Path(picture["path"]).is_file() for picture in row["images"]):
            return None
        return digest([key_of(picture) for picture in row["images"]])

    return {
        row["id"]: [digest({name: value for name, value in row.items() if name != "images"}), pictures(row)]
        for row in problems
    }


def digest(value: object) -> str:
    return sha256_of_json(value)[:HEX_DIGITS]


def whole_digest(digests: Digests) -> dict[str, str | None]:
    """Of all problems together, in whatever order: `texts` and `pictures`, the second None where one is."""
    texts, pictures = ([[name, pair[part]] for name, pair in sorted(digests.items())] for part in (0, 1))
    return {"texts": digest(texts), "pictures": None if any(key is None for _, key in pictures) else digest(pictures)}


def difference(before: Digests, now: Digests) -> str | None:
    """What became of the problems, in words with counts; None where they are the same, as far as is known."""
    same_ids = before.keys() & now.keys()
    changed = {
        "have other texts or answers": [name for name in same_ids if before[name][0] != now[name][0]],
        "have other pictures": [
            name for name in same_ids if None not in (before[name][1], now[name][1]) and before[name][1] != now[name][1]
        ],
        "are new": now.keys() - before.keys(),
        "are gone": before.keys() - now.keys(),
    }
    words = [f"{len(names)} {what} ({first_few(in_order(names))})" for what, names in changed.items() if names]
    if not words and list(before) != list(now):
        return f"all {len(now)} are the same, in another order"
    return "; ".join(words) or None


def in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (len(name), name))


def content_key(picture: dict[str, Any]) -> str:
    """The SHA-256 of a picture's file, which identifies the picture."""
    return sha256_of_bytes(picture["bytes"]) if picture["bytes"] else sha256_of_file(Path(picture["path"]))


class ContentKeys:
    """The pictures' keys, of each file read once."""

    def __init__(self):
        self.by_path: dict[str, str] = {}

    def __call__(self, picture: dict[str, Any]) -> str:
        path = picture["path"]
        if path is None:
            return content_key(picture)
        if path not in self.by_path:
            self.by_path[path] = content_key(picture)
        return self.by_path[path]


# A caption is no part of the problem: systems may be given different ones, or none.
NOT_OF_THE_PROBLEM = ("caption",)
PARTS = {"texts": "questions, choices, answers or other texts", "pictures": "pictures"}


def digest_of_problems(problems: Iterable[Mapping[str, Any]], max_images: int | None = None) -> dict[str, str | None]:
    """
    Of all problems together: `texts` (question, choices, answer and all other columns of the dataset but a caption) and
    `pictures`, which is None where the file of one is not at hand.

    Args:
        max_images: the first so many pictures of each problem alone.
    """
    return whole_digest(problem_digests(as_given(problem, max_images) for problem in problems))


def as_given(problem: Mapping[str, Any], max_images: int | None) -> dict[str, Any]:
    columns = {name: value for name, value in problem.items() if name in FEATURES and name not in NOT_OF_THE_PROBLEM}
    return {**columns, "images": problem["images"][:max_images]}


def check_problems(
    predictions_file: Path,
    predictions: Mapping[str, Any],
    problems: Iterable[Mapping[str, Any]],
    dataset: str,
    pictures: bool = True,
) -> None:
    """
    The problems that the predictions were made for are those that `dataset` gives under their ids now.

    Args:
        pictures: whether their pictures are compared, too.

    Raises:
        ValueError: they are others, or `read_meta` refuses the pair of files.
    """
    meta = read_meta(predictions_file)
    if meta is None:
        return
    predicted = (problem for problem in problems if problem["id"] in predictions)
    found = digest_of_problems(predicted, meta["max_images"])
    differing = differing_parts(meta["problems"], found if pictures else {**found, "pictures": None})
    if differing:
        raise ValueError(
            f"{predictions_file} was predicted from {meta['dataset']!r} (split {meta['split']!r}), and the problems of "
            f"{dataset!r} with the same ids have other {' and other '.join(differing)}. Give the --dataset and --split "
            f"that were predicted, or predict again."
        )


def differing_parts(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    """What two digests of problems do not share, in words; pictures are compared where both are known."""
    known = [part for part in PARTS if None not in (before[part], now[part])]
    return [PARTS[part] for part in known if before[part] != now[part]]
