"""Files on disk: written whole or not at all; JSON is read with errors that name the file and the line.

The content of a file (predictions, scores) is checked by the module that owns its format.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The JSON object, or list, in `path`; a ValueError names the file, and the line where its text breaks."""
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
    """Write `text` to `path`, its folder made where missing; whoever reads `path` sees the old file or the new one."""
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
    """The text that `write_json` writes."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def names_of(folder: Path) -> list[str]:
    """The files of a folder and its subfolders, by their paths in it."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def cache_folder() -> Path:
    """Where what was computed once is kept, beside what `datasets` keeps."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "mmcot"


def resolved(path_or_id: str) -> str:
    """A path of something that is there in full, so that two ways to write it are one; anything else as it is."""
    return str(Path(path_or_id).resolve()) if Path(path_or_id).exists() else path_or_id
