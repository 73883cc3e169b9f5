"""A predictions file and its origin, `NAME.json` and `NAME.meta.json`: written together, and read only as a pair.

The meta file holds the SHA-256 of the predictions file that it describes and a digest of the predicted problems. So a
call that is killed between the two writes never leaves one system's predictions under another system's weights, and
predictions are never scored against problems that were changed since. A predictions file of any other system has no
meta file, and nothing is known of its weights.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmcot.problems.digests import problem_digests, whole_digest
from mmcot.problems.schema import FEATURES
from mmcot.storage.files import json_text, read_json, write_json

# A caption is no part of the problem: systems may be given different ones, or none.
NOT_OF_THE_PROBLEM = ("caption",)
PARTS = {"texts": "questions, choices, answers or other texts", "pictures": "pictures"}


def meta_file(predictions_file: Path) -> Path:
    """`NAME.meta.json` beside `NAME.json`."""
    return predictions_file.with_name(predictions_file.name.removesuffix(".json") + ".meta.json")


def write_predictions(predictions_file: Path, predictions: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write both files of a pair. Killed in between, this leaves a pair that `read_meta` refuses."""
    digest = sha256_of_text(json_text(predictions))
    write_json(meta_file(predictions_file), {**meta, "predictions": digest})
    write_json(predictions_file, predictions)


def read_meta(predictions_file: Path) -> dict[str, Any] | None:
    """
    The origin of a predictions file; None where no meta file lies beside it.

    Raises:
        ValueError: the meta file is not JSON, or describes another predictions file.
    """
    file = meta_file(predictions_file)
    if not file.is_file() or not predictions_file.is_file():
        return None
    meta = read_json(file)
    ways_out = f"Predict again; or remove {file.name} to score the predictions as those of an unknown system."
    if "predictions" not in meta:
        raise ValueError(f"{file} does not say which predictions it belongs to: an older mmcot wrote it. {ways_out}")
    found = digest_of_file(predictions_file)
    if meta["predictions"] != found:
        raise ValueError(
            f"{file} does not belong to {predictions_file}: its predictions have the digest {meta['predictions']}, "
            f"those in the file {found}. The file was changed, or a call was killed between the two. {ways_out}"
        )
    return meta


def digest_of_file(file: Path) -> str:
    with file.open("rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"


def sha256_of_text(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


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
