"""Digests of problems, which detect changes since a training, a prediction or an evaluation.

The callers decide where a digest is recorded and how a difference is treated.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmcot.problems.schema import FEATURES, first_few
from mmcot.storage.digests import sha256_of_bytes, sha256_of_file, sha256_of_json
from mmcot.storage.predictions import read_meta

# Columns of the schema that are newer than the digests in run folders and beside predictions.
LATER_COLUMNS = ("observation", "gold_passages")
HEX_DIGITS = 16  # 64 bits for each digest, so that the digests of a large dataset are small on disk

Digests = dict[str, list[str | None]]  # by problem id: the digest of the texts and that of the pictures


def problem_digests(problems: Iterable[dict]) -> Digests:
    """
    Return two digests for each problem by id: one of all columns except `images`, and one of the content of the
    pictures. The second digest is None if the file of a picture is missing.
    """
    key_of = ContentKeys()

    def pictures(row: dict) -> str | None:
        if any(not picture["bytes"] and not Path(picture["path"]).is_file() for picture in row["images"]):
            return None
        return digest([key_of(picture) for picture in row["images"]])

    return {
        row["id"]: [digest({name: value for name, value in recorded(row).items() if name != "images"}), pictures(row)]
        for row in problems
    }


def recorded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a problem without the empty columns that earlier records lack, so that its digests stay comparable."""
    return {name: value for name, value in row.items() if value or name not in LATER_COLUMNS}


def digest(value: object) -> str:
    """Return a short digest of a JSON value."""
    return sha256_of_json(value)[:HEX_DIGITS]


def combined_digest(digests: Digests) -> dict[str, str | None]:
    """
    Return one digest of the `texts` and one of the `pictures` of all problems, regardless of their order. The second is
    None if the digest of any problem's pictures is None.
    """
    texts, pictures = ([[name, pair[part]] for name, pair in sorted(digests.items())] for part in (0, 1))
    return {"texts": digest(texts), "pictures": None if any(key is None for _, key in pictures) else digest(pictures)}


def describe_difference(before: Digests, now: Digests) -> str | None:
    """
    Describe the changes of the problems, with counts and ids. Return None if no change is found: the pictures of a
    problem are compared only if both digests are known.
    """
    same_ids = before.keys() & now.keys()
    changed = {
        "have other texts or answers": [name for name in same_ids if before[name][0] != now[name][0]],
        "have other pictures": [
            name for name in same_ids if None not in (before[name][1], now[name][1]) and before[name][1] != now[name][1]
        ],
        "are new": now.keys() - before.keys(),
        "are gone": before.keys() - now.keys(),
    }
    words = [f"{len(names)} {change} ({first_few(sort_ids(names))})" for change, names in changed.items() if names]
    if not words and list(before) != list(now):
        return f"all {len(now)} are the same, in another order"
    return "; ".join(words) or None


def sort_ids(names: Iterable[str]) -> list[str]:
    """Return ids sorted by length first, so that 2 comes before 10."""
    return sorted(names, key=lambda name: (len(name), name))


def content_key(picture: dict[str, Any]) -> str:
    """Return the SHA-256 of a picture's file, which identifies the picture."""
    return sha256_of_bytes(picture["bytes"]) if picture["bytes"] else sha256_of_file(Path(picture["path"]))


class ContentKeys:
    """Computes the keys of pictures; each file is read once."""

    def __init__(self):
        self.by_path: dict[str, str] = {}

    def __call__(self, picture: dict[str, Any]) -> str:
        path = picture["path"]
        if path is None:
            return content_key(picture)
        if path not in self.by_path:
            self.by_path[path] = content_key(picture)
        return self.by_path[path]


# A caption is not part of the problem: systems may use different captions, or none.
UNCOMPARED_COLUMNS = ("caption",)
PARTS = {"texts": "questions, choices, answers or other texts", "pictures": "pictures"}


def digest_of_problems(problems: Iterable[Mapping[str, Any]], max_images: int | None = None) -> dict[str, str | None]:
    """
    Return the digests of all problems together: `texts` (question, choices, answer and all other columns of the schema
    except the caption) and `pictures`, which is None if the file of a picture is missing.

    Args:
        max_images: use only the first `max_images` pictures of each problem.
    """
    return combined_digest(problem_digests(compared_columns(problem, max_images) for problem in problems))


def compared_columns(problem: Mapping[str, Any], max_images: int | None) -> dict[str, Any]:
    """Return the columns of a problem that its digests cover."""
    columns = {name: value for name, value in problem.items() if name in FEATURES and name not in UNCOMPARED_COLUMNS}
    return {**columns, "images": problem["images"][:max_images]}


def check_problems(
    predictions_file: Path,
    predictions: Mapping[str, Any],
    problems: Iterable[Mapping[str, Any]],
    dataset: str,
    pictures: bool = True,
) -> None:
    """
    Check that the problems of `dataset` are the problems that were predicted, by the digests in the meta file.

    Args:
        pictures: whether to compare the pictures too.

    Raises:
        ValueError: the problems differ, or `read_meta` refuses the pair of files.
    """
    meta = read_meta(predictions_file)
    if meta is None:
        return
    predicted = (problem for problem in problems if problem["id"] in predictions)
    found = digest_of_problems(predicted, meta["max_images"])
    differing = differing_parts(meta["problems"], found if pictures else {**found, "pictures": None})
    if differing:
        raise ValueError(
            f"{predictions_file} was predicted from {meta['dataset']!r} (split {meta['split']!r}), but the problems of "
            f"{dataset!r} with the same ids have other {' and other '.join(differing)}. Give the --dataset and --split "
            f"of the predictions, or predict again."
        )


def differing_parts(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    """Name the parts in which two digests of problems differ; pictures are compared only if both digests are known."""
    known = [part for part in PARTS if None not in (before[part], now[part])]
    return [PARTS[part] for part in known if before[part] != now[part]]
