"""A predictions file and its origin, `NAME.json` and `NAME.meta.json`: written together, and read only as a pair.

The meta file contains the SHA-256 of the predictions file that it describes and a digest of the predicted problems. A
call that is killed between the two writes therefore never attributes predictions to the weights of another system, and
predictions are never scored against problems that have changed since. A predictions file of a system outside of mmcot
has no meta file, and its weights are unknown.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcot.storage.digests import digest_of_file, digest_of_text
from mmcot.storage.files import json_text, read_json, write_json


def meta_file(predictions_file: Path) -> Path:
    """Return the path `NAME.meta.json` beside `NAME.json`."""
    return predictions_file.with_name(predictions_file.name.removesuffix(".json") + ".meta.json")


def write_predictions(predictions_file: Path, predictions: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write both files of a pair. A kill in between leaves a pair that `read_meta` refuses."""
    digest = digest_of_text(json_text(predictions))
    write_json(meta_file(predictions_file), {**meta, "predictions": digest})
    write_json(predictions_file, predictions)


def read_meta(predictions_file: Path) -> dict[str, Any] | None:
    """
    Return the origin of a predictions file, or None if it has no meta file.

    Raises:
        ValueError: the meta file is not JSON, or describes another predictions file.
    """
    file = meta_file(predictions_file)
    if not file.is_file() or not predictions_file.is_file():
        return None
    meta = read_json(file)
    advice = f"Predict again; or remove {file.name} to score the predictions as those of an unknown system."
    if "predictions" not in meta:
        raise ValueError(f"{file} does not name its predictions: an older mmcot wrote it. {advice}")
    found = digest_of_file(predictions_file)
    if meta["predictions"] != found:
        raise ValueError(
            f"{file} does not belong to {predictions_file}: it records the digest {meta['predictions']}, and the "
            f"predictions have {found}. The predictions were changed, or a call was killed between writing the two "
            f"files. {advice}"
        )
    return meta
