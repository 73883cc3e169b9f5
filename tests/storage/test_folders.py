"""`replaced_folder`: the folder is whole or absent after success, after an error and after a kill at any moment."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from mmcot.storage import folders
from mmcot.storage.folders import replaced_folder

DEAD = 2**22 + 1  # more than the largest process id of Linux


def write(folder, text):
    with replaced_folder(folder) as new_folder:
        (new_folder / "sub").mkdir()
        (new_folder / "sub/file").write_text(text)


def text_of(folder):
    return (folder / "sub/file").read_text()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "parent" / "target"


def test_writes_new_folder_and_replaces_it(target):
    write(target, "old")
    (target / "more").write_text("more")
    write(target, "new")
    assert text_of(target) == "new" and not (target / "more").exists()
    assert os.listdir(target.parent) == ["target"]
    assert target.stat().st_mode & 0o777 == target.parent.stat().st_mode & 0o777, (
        "the mode is that of a private temporary folder"
    )


@pytest.mark.parametrize("exists", [True, False])
def test_error_leaves_target_unchanged_and_no_temporary_folder(target, exists):
    if exists:
        write(target, "old")
    with pytest.raises(KeyboardInterrupt), replaced_folder(target) as new_folder:
        (new_folder / "half").write_text("ha")
        raise KeyboardInterrupt
    assert os.listdir(target.parent) == (["target"] if exists else [])
    assert not exists or text_of(target) == "old"


def test_error_during_rename_keeps_old_folder(target, monkeypatch):
    write(target, "old")
    with pytest.raises(FileNotFoundError), replaced_folder(target) as new_folder:
        new_folder.rmdir()
    assert text_of(target) == "old" and os.listdir(target.parent) == ["target"]


# The moments of the kill: while files are written, before each rename, and after the second rename.
@pytest.mark.parametrize("moment", ["written", "first rename", "second rename", "old one removed"])
def test_kill_leaves_whole_folder_and_next_call_removes_leftovers(target, moment):
    write(target, "old")
    code = f"""
import os, pathlib, shutil, signal
from mmcot.storage import folders

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

rename, moment = pathlib.Path.rename, {moment!r}

def rename_or_kill(path, other):
    if moment == ("first rename" if path.name == "target" else "second rename"):
        kill()
    return rename(path, other)

pathlib.Path.rename = rename_or_kill
with folders.replaced_folder({str(target)!r}) as new_folder:
    (new_folder / "sub").mkdir()
    (new_folder / "sub/file").write_text("new")
    if moment == "written":
        kill()
    if moment == "old one removed":
        shutil.rmtree = kill
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY)
    assert process.returncode == -signal.SIGKILL
    assert len(os.listdir(target.parent)) == 2
    expected = "new" if moment == "old one removed" else "old"
    assert not target.exists() or text_of(target) == expected
    with pytest.raises(KeyboardInterrupt), replaced_folder(target):
        raise KeyboardInterrupt
    assert text_of(target) == ("new" if moment == "old one removed" else "old"), (
        "the next call fails, and nothing is lost"
    )
    write(target, "newer")
    assert text_of(target) == "newer" and os.listdir(target.parent) == ["target"]


def test_keeps_folders_of_running_processes_and_other_targets(target):
    target.parent.mkdir()
    kept = [f".target.{os.getppid()}.tmp", f".other.{DEAD}.tmp", ".target.old.tmp", f".target.{DEAD}.txt", "target.tmp"]
    for name in [*kept, f".target.{DEAD}.tmp", f".target.{os.getpid()}.tmp"]:
        (target.parent / name).mkdir()
    write(target, "new")
    assert sorted(os.listdir(target.parent)) == sorted([*kept, "target"])
    assert [path.name for path, _ in folders.leftovers(target)] == []
