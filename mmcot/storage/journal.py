"""The predictions so far, a line for each batch, so that a killed prediction resumes where it was.

A batch is identified by its problems: with other batches, results differ in their last bits, and none is reused.
"""

import contextlib
import glob
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mmcot.storage.resumable_log import OtherHeader, ResumableLog, read_log

Batch = tuple[str, ...]  # its problems' ids


class Journal:
    """
    The logs `OUTPUT.partial-PROCESS.jsonl` beside the file that is being made, one of each process.

    Args:
        output: the file that is being made.
        settings: everything that decides the predictions.

    Raises:
        ValueError: the files there were begun with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        self.output = output
        state = PartialState()
        self.done: dict[str, dict[Batch, list[dict]]] = {}
        for file in partial_files(output):
            for entry in read_journal(file, settings):
                self.done.setdefault(entry["of"], {})[tuple(entry["ids"])] = entry["columns"]
        state.wait_for_everyone()  # before any process writes: all have read the same
        own = output.with_name(f"{output.name}.partial-{state.process_index}.jsonl")
        self.log = ResumableLog(own, settings)

    def write(self, of: str, ids: Batch, columns: list[dict]) -> None:
        self.log.append({"of": of, "ids": ids, "columns": columns})

    def give_up(self) -> None:
        """After a write that failed. What is left of a line is passed over when the command goes on."""
        with contextlib.suppress(OSError):
            self.log.close()

    def remove(self) -> None:
        """When the file that is being made is there."""
        self.log.close()
        PartialState().wait_for_everyone()
        remove_partial_files(self.output)


def read_journal(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        return read_log(file, settings)
    except OtherHeader as error:
        there, here = error.there if isinstance(error.there, dict) else {}, error.here
        differing = sorted(name for name in there | here if there.get(name) != here.get(name))
        name = differing[0]
        raise ValueError(
            f"{file} holds the beginning of another prediction: {', '.join(differing)} differ ({name}: "
            f"{there.get(name)!r} there, {here.get(name)!r} here). Finish that one, or remove it."
        ) from error


def partial_files(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.partial-*.jsonl"))


def remove_partial_files(output: Path) -> None:
    if PartialState().is_main_process:
        for file in partial_files(output):
            file.unlink()
