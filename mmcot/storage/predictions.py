"""A predictions file and its origin, `NAME.json` and `NAME.meta.json`: written together, and read only as a pair.

The meta file holds the SHA-256 of the predictions file that it describes and a digest of the predicted problems. So a
call that is killed between the two writes never leaves one system's predictions under another system's weights, and
predictions are never scored against problems that were changed since. A predictions file of any other system has no
meta file, and nothing is known of its weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcot.storage.digests import digest_of_file, digest_of_text
from mmcot.storage.files import json_text, read_json, write_json


def meta_file(predictions_file: Path) -> Path:
    """`NAME.meta.json` beside `NAME.json`."""
    return predictions_file.with_name(predictions_file.name.removesuffix(".json") + ".meta.json")


def write_predictions(predictions_file: Path, predictions: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write both files of a pair. Killed in between, this leaves a pair that `read_meta` refuses."""
    digest = digest_of_text(json_text(predictions))
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
