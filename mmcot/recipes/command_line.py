"""What the options of all commands have in common: none is without effect, a model that is named by a path is there,
and what is to be written can be written. All of it is found before any work.
"""

import argparse
import os
from collections.abc import Collection, Sequence
from pathlib import Path

# Folders in which a user's own runs, recipes and data lie: a path that begins so is no repository's id.
OWN_FOLDERS = ("runs", "configs", "data", "features", "tests")
FILE_ENDINGS = (".json", ".jsonl", ".yaml", ".safetensors", ".parquet", ".csv")


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """
    The names of the arguments that a command line gives, whatever their values.

    Args:
        parser: one of its own; its defaults are taken away.
    """
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def refuse_without_effect(said: Collection[str], names: Collection[str], reason: str) -> None:
    """
    Raises:
        ValueError: one of these options was given, which has no effect here, for that reason.
    """
    for name in names:
        if name in said:
            raise ValueError(f"--{name} has no effect here: {reason}.")


def refuse_below(arguments: argparse.Namespace, lowest: int, *names: str) -> None:
    """
    Raises:
        ValueError: an option is a number below that.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise ValueError(f"--{name} is {value}; expected {lowest} or more.")


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
