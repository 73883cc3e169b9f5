"""Files on disk: written completely or not at all. Errors about JSON name the file and the line.

The module that owns a format (predictions, scores) checks the content of its files.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets


def read_json(path: str | Path, kind: type = dict) -> Any:
    """
    Return the JSON object, or list, in `path`.

    Raises:
        ValueError: the file is not JSON of that kind. The message names the file, and the line of a syntax error.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not isinstance(data, kind):
        expected = "object" if kind is dict else kind.__name__
        raise ValueError(f"{path}: expected a JSON {expected}, found {type(data).__name__}")
    return data


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` and create its folder if missing. A reader of `path` sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write `data` to `path` as `write_text` does."""
    write_text(path, json_text(data))


def json_text(data: Mapping[str, Any]) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def list_files(folder: Path) -> list[str]:
    """Return the files of a folder and its subfolders, by their paths relative to the folder, sorted."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def cache_folder() -> Path:
    """Return the folder of cached results, inside the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "mmcot"


def resolve_path(path_or_id: str) -> str:
    """Return an existing path as an absolute one, so that two spellings of it are equal; any other text unchanged."""
    return str(Path(path_or_id).resolve()) if Path(path_or_id).exists() else path_or_id
