"""Checks of paths that a user gives: inputs exist, and outputs can be written."""

import os
from pathlib import Path

# Folders with a user's own runs, recipes and data. A path that begins with one of them is not a Hub id.
OWN_FOLDERS = ("runs", "configs", "data", "features", "tests")
FILE_ENDINGS = (".json", ".jsonl", ".yaml", ".safetensors", ".parquet", ".csv")


def refuse_absent_path(name: str, expected: str) -> None:
    """
    Raises:
        ValueError: `name` is a local path, not a Hub id (USER/NAME), and does not exist.
    """
    first = name.split("/")[0]
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(FILE_ENDINGS)
    is_path = is_path or (os.sep in name and (first in OWN_FOLDERS or Path(first).is_dir()))
    if is_path and not Path(name).exists():
        raise ValueError(f"{name}: no such file or folder; expected {expected}.")


def check_output_file(path: str | Path, option: str = "--output") -> None:
    """
    Raises:
        ValueError: `path` is a folder, or its parent folder cannot be created or written to.
    """
    if Path(path).is_dir():
        raise ValueError(f"{option} {path} is a folder; expected a file to write.")
    check_output_folder(Path(path).absolute().parent, option)


def check_output_folder(path: str | Path, option: str) -> None:
    """
    Raises:
        ValueError: `path` is a file, or cannot be created or written to.
    """
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{option}: {existing} is a file; expected a folder, or nothing, at {path}.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: {existing} is read-only; expected a folder that can be written to.")
