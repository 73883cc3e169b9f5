"""A training's checkpoints: each is whole or absent, and lists the hashes of its files.

The Trainer defines a checkpoint's contents.
"""

from pathlib import Path

from mmcot.storage.digests import sha256_of_file
from mmcot.storage.files import read_json, write_json
from mmcot.storage.folders import move_into_place

FILES = "files.json"  # of each other file in a checkpoint its size and hash; written last
UNFINISHED = "unfinished"  # what is being written beside the checkpoints


class RunStopped(Exception):
    """A run cannot go on; the message says why and what can be done."""


def finish_checkpoint(unfinished: Path, checkpoint: Path) -> None:
    """Give what was written its list of files, then its name."""
    files = sorted(file for file in unfinished.rglob("*") if file.is_file())
    write_json(unfinished / FILES, {file.relative_to(unfinished).as_posix(): fingerprint(file) for file in files})
    # An earlier one is damaged and was passed over, or is of the same step, saved before it was evaluated.
    move_into_place(unfinished, checkpoint, unfinished.with_name("replaced"))


def finish_interrupted(stage_folder: Path) -> None:
    """A checkpoint that was written whole gets its name, if a kill came before `finish_checkpoint` gave it that."""
    for written in stage_folder.glob(f"{UNFINISHED}/checkpoint-*"):
        if damage_of(written) is None and not (stage_folder / written.name).exists():
            written.rename(stage_folder / written.name)


def fingerprint(file: Path) -> dict[str, int | str]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}


def checkpoint_to_resume(stage_folder: Path, pass_over_damaged: bool = False) -> str | None:
    """
    The newest checkpoint of a stage, None without any.

    Args:
        pass_over_damaged: take the newest that is whole, where the newest of all is not.

    Raises:
        RunStopped: it is damaged.
    """
    finish_interrupted(stage_folder)
    checkpoints = sorted(stage_folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in checkpoints:
        damage = damage_of(checkpoint)
        if damage is None:
            return str(checkpoint)
        if not pass_over_damaged:
            raise RunStopped(
                f"{checkpoint} is damaged: {damage}. Restore it, or go on from the one before it: "
                f"--pass_over_damaged_checkpoints true"
            )
    return None


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file is as it was written."""
    try:
        written = read_json(checkpoint / FILES)
    except (OSError, ValueError) as error:
        return f"its list of files cannot be read ({error})"
    for name, expected in written.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        found = fingerprint(file)
        for what in ("bytes", "sha256"):
            if found[what] != expected[what]:
                return f"{name} has {what} {found[what]}, expected {expected[what]}"
    return None
