"""Folders that are written completely or not at all, as `files.write_text` writes a file.

A process writes into a temporary folder beside the target, `.NAME.PID.tmp`, and renames it at the end. The next call
for the same target removes the leftovers of a killed process.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

TEMPORARY = "tmp"  # suffix of the new folder
REPLACED = "replaced"  # suffix of the old folder, while the new one takes its place


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """
    Yield an empty temporary folder to write into. It replaces `folder` at the end of the block. After an error it is
    removed, and `folder` is unchanged.
    """
    folder = Path(folder)
    remove_leftovers(folder)
    temporary, replaced = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in (TEMPORARY, REPLACED))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        move_into_place(temporary, folder, replaced)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into_place(written: Path, folder: Path, replaced: Path) -> None:
    """
    Rename `written` to `folder`. A directory cannot replace another one in a single step, so the old folder is renamed
    to `replaced` first; a kill in between leaves both folders complete.
    """
    if folder.exists():
        folder.rename(replaced)
    try:
        written.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of killed processes. If the target is missing, restore its old folder."""
    for leftover, end in leftovers(folder):
        if end == REPLACED and not folder.exists():
            leftover.rename(folder)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def leftovers(folder: Path) -> list[tuple[Path, str]]:
    """Return the temporary folders beside `folder` that no running process writes, with their suffixes."""
    found = []
    for path in folder.parent.iterdir() if folder.parent.is_dir() else ():
        pid, _, end = path.name.removeprefix(f".{folder.name}.").partition(".")
        is_temporary = path.name == f".{folder.name}.{pid}.{end}" and pid.isdigit() and end in (TEMPORARY, REPLACED)
        if is_temporary and path.is_dir() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            found.append((path, end))
    return found
