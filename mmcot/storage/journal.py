"""Logs of finished predictions, one line for each batch, from which a killed prediction resumes.

A batch is identified by its problems. Results are reused only for the same batch, because batches of other problems
give results that differ in the last bits.
"""

import contextlib
import glob
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mmcot.storage.resumable_log import OtherHeader, ResumableLog, read_log

Batch = tuple[str, ...]  # the ids of its problems


class Journal:
    """
    The logs `OUTPUT.partial-PROCESS.jsonl` beside an unfinished predictions file, one for each process.

    Args:
        output: the predictions file.
        settings: everything that determines the predictions.

    Raises:
        ValueError: the existing logs were started with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        self.output = output
        state = PartialState()
        self.done: dict[str, dict[Batch, list[dict]]] = {}
        for file in partial_files(output):
            for entry in read_journal(file, settings):
                self.done.setdefault(entry["of"], {})[tuple(entry["ids"])] = entry["columns"]
        state.wait_for_everyone()  # all processes read the same logs before any of them writes
        own = output.with_name(f"{output.name}.partial-{state.process_index}.jsonl")
        self.log = ResumableLog(own, settings)

    def write(self, part: str, ids: Batch, columns: list[dict]) -> None:
        """Append the columns that a part of the prediction, such as a stage, wrote for a batch."""
        self.log.append({"of": part, "ids": ids, "columns": columns})

    def close_after_error(self) -> None:
        """Close the log after a failed write. When the command resumes, it skips an incomplete line."""
        with contextlib.suppress(OSError):
            self.log.close()

    def remove(self) -> None:
        """Remove all logs, once the predictions file is written."""
        self.log.close()
        PartialState().wait_for_everyone()
        remove_partial_files(self.output)


def read_journal(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Return the entries of a log.

    Raises:
        ValueError: the log was started with other settings.
    """
    try:
        return read_log(file, settings)
    except OtherHeader as error:
        found, expected = error.found if isinstance(error.found, dict) else {}, error.expected
        differing = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        name = differing[0]
        raise ValueError(
            f"{file} contains the beginning of another prediction: {', '.join(differing)} differ ({name}: "
            f"{found.get(name)!r} there, {expected.get(name)!r} here). Finish that prediction, or remove the file."
        ) from error


def partial_files(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.partial-*.jsonl"))


def remove_partial_files(output: Path) -> None:
    if PartialState().is_main_process:
        for file in partial_files(output):
            file.unlink()
