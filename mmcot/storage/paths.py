"""Checks of paths that a user gives: what is to be read exists, and what is to be written can be written."""

import os
from pathlib import Path

# Folders in which a user's own runs, recipes and data lie: a path that begins so is no repository's id.
OWN_FOLDERS = ("runs", "configs", "data", "features", "tests")
FILE_ENDINGS = (".json", ".jsonl", ".yaml", ".safetensors", ".parquet", ".csv")


def refuse_absent_path(name: str, expected: str) -> None:
    """
    Raises:
        ValueError: it is written as a path of this machine, and nothing is there. (An id of the Hub is USER/NAME.)
    """
    first = name.split("/")[0]
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(FILE_ENDINGS)
    is_path = is_path or (os.sep in name and (first in OWN_FOLDERS or Path(first).is_dir()))
    if is_path and not Path(name).exists():
        raise ValueError(f"{name}: there is no such file or folder; expected {expected}.")


def check_output_file(path: str | Path, option: str = "--output") -> None:
    """
    Raises:
        ValueError: it is a folder, or its folder cannot be made or written to.
    """
    if Path(path).is_dir():
        raise ValueError(f"{option} {path} is a folder; expected a file to write.")
    check_output_folder(Path(path).absolute().parent, option)


def check_output_folder(path: str | Path, option: str) -> None:
    """
    Raises:
        ValueError: it is a file, or it cannot be made or written to.
    """
    there = Path(path).absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{option}: {there} is a file; expected a folder, or nothing, at {path}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: {there} is read-only; expected a folder that can be written to.")
