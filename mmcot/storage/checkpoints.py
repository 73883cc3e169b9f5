"""The checkpoints of a training: each is complete or absent, and lists the hashes of its files.

The Trainer defines a checkpoint's contents.
"""

from pathlib import Path

from mmcot.storage.digests import sha256_of_file
from mmcot.storage.files import read_json, write_json
from mmcot.storage.folders import move_into_place

FILES = "files.json"  # size and hash of each other file in a checkpoint; written last
UNFINISHED = "unfinished"  # the folder of checkpoints that are still being written


class RunStopped(Exception):
    """A run cannot continue; the message gives the reason and the options."""


def finish_checkpoint(unfinished: Path, checkpoint: Path) -> None:
    """Add the list of files to a written checkpoint, then rename the checkpoint to its final name."""
    files = sorted(file for file in unfinished.rglob("*") if file.is_file())
    write_json(unfinished / FILES, {file.relative_to(unfinished).as_posix(): fingerprint(file) for file in files})
    # A checkpoint of this name can exist: a damaged one, or one that was saved at the same step before the evaluation.
    move_into_place(unfinished, checkpoint, unfinished.with_name("replaced"))


def finish_interrupted(stage_folder: Path) -> None:
    """Rename complete checkpoints to their final names, if a kill interrupted `finish_checkpoint`."""
    for written in stage_folder.glob(f"{UNFINISHED}/checkpoint-*"):
        if damage_of(written) is None and not (stage_folder / written.name).exists():
            written.rename(stage_folder / written.name)


def fingerprint(file: Path) -> dict[str, int | str]:
    """Return the size and the hash of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}


def checkpoint_to_resume(stage_folder: Path, pass_over_damaged: bool = False) -> str | None:
    """
    Return the newest checkpoint of a stage, or None if the stage has no checkpoint.

    Args:
        pass_over_damaged: skip damaged checkpoints and take the newest complete one.

    Raises:
        RunStopped: the newest checkpoint is damaged, and `pass_over_damaged` is not set.
    """
    finish_interrupted(stage_folder)
    checkpoints = sorted(stage_folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in checkpoints:
        damage = damage_of(checkpoint)
        if damage is None:
            return str(checkpoint)
        if not pass_over_damaged:
            raise RunStopped(
                f"{checkpoint} is damaged: {damage}. Restore it, or resume from the checkpoint before it: "
                f"--pass_over_damaged_checkpoints true"
            )
    return None


def damage_of(checkpoint: Path) -> str | None:
    """Describe the damage of a checkpoint; None if every file is as it was written."""
    try:
        written = read_json(checkpoint / FILES)
    except (OSError, ValueError) as error:
        return f"its list of files cannot be read ({error})"
    for name, expected in written.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        found = fingerprint(file)
        for key in ("bytes", "sha256"):
            if found[key] != expected[key]:
                return f"{name} has {key} {found[key]}, expected {expected[key]}"
    return None
