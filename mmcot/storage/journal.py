"""What is predicted so far, a line for each batch, so that a prediction that was killed goes on where it was.

A batch is known by its problems: with other batches, results differ in last bits, and nothing of them is taken.
"""

import contextlib
import glob
import json
from pathlib import Path
from typing import Any

from accelerate import PartialState

Batch = tuple[str, ...]  # its problems' ids


class Journal:
    """
    The files `OUTPUT.partial-PROCESS.jsonl` beside the file that is being made. A line that was being written when its
    process was killed is not one.

    Args:
        output: the file that is being made.
        settings: what decides the predictions.

    Raises:
        ValueError: the files there were begun with other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        self.output, self.settings = output, settings
        state = PartialState()
        self.done: dict[str, dict[Batch, list[dict]]] = {}
        for file in partial_files(output):
            self.read(file)
        state.wait_for_everyone()  # before any process writes: all have read the same
        own = output.with_name(f"{output.name}.partial-{state.process_index}.jsonl")
        output.parent.mkdir(parents=True, exist_ok=True)
        self.lines = own.open("ab")
        self.lines.truncate(whole_length(own))
        if own.stat().st_size == 0:
            self.append(settings)

    def read(self, file: Path) -> None:
        lines = file.read_bytes()[: whole_length(file)].splitlines()
        if not lines:
            return
        begun = json.loads(lines[0])
        settings = json.loads(json.dumps(self.settings))
        differing = sorted(name for name in begun | settings if begun.get(name) != settings.get(name))
        if differing:
            name = differing[0]
            raise ValueError(
                f"{file} holds the beginning of another prediction: {', '.join(differing)} differ ({name}: "
                f"{begun.get(name)!r} there, {settings.get(name)!r} here). Finish that one, or remove it."
            )
        for line in lines[1:]:
            entry = json.loads(line)
            self.done.setdefault(entry["of"], {})[tuple(entry["ids"])] = entry["columns"]

    def append(self, entry: dict[str, Any]) -> None:
        self.lines.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self.lines.flush()

    def write(self, of: str, ids: Batch, columns: list[dict]) -> None:
        self.append({"of": of, "ids": ids, "columns": columns})

    def give_up(self) -> None:
        """After a write that failed. What is left of a line is passed over when the command goes on."""
        with contextlib.suppress(OSError):
            self.lines.close()

    def remove(self) -> None:
        """When the file that is being made is there."""
        self.lines.close()
        PartialState().wait_for_everyone()
        remove_partial_files(self.output)


def partial_files(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.partial-*.jsonl"))


def remove_partial_files(output: Path) -> None:
    if PartialState().is_main_process:
        for file in partial_files(output):
            file.unlink()


def whole_length(file: Path) -> int:
    """Bytes of the lines that were written to their end."""
    return file.read_bytes().rfind(b"\n") + 1
