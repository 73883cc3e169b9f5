"""A log of finished work, a JSON line for each piece: a killed call loses the piece in hand, and the next call resumes.

The first line may be a header with the settings that decide the pieces; a log with another header is refused. A last
line without its end was being written when a process was killed: it is not read, and the next call removes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class OtherHeader(ValueError):
    """A log was begun with other settings: `there` is its header (or text that is none), `here` the expected one."""

    def __init__(self, file: Path, there: Any, here: dict[str, Any]):
        super().__init__(f"{file} was begun with {there}, not with {here}.")
        self.there, self.here = there, here


class ResumableLog:
    """
    Args:
        file: is made where missing, else its whole lines are kept and new ones added.
        header: None for a log whose settings are recorded elsewhere.

    Raises:
        ValueError: the file is not such a log, or has another header (`OtherHeader`). It is not touched.
    """

    def __init__(self, file: Path, header: Mapping[str, Any] | None = None):
        self.entries = read_log(file, header)
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = whole_lines(file)
        self.lines = file.open("ab")
        self.lines.truncate(len(whole))
        if header is not None and not whole:
            self.append(header)

    def append(self, *entries: Any) -> None:
        self.lines.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
        self.lines.flush()

    def close(self) -> None:
        self.lines.close()


def read_log(file: Path, header: Mapping[str, Any] | None = None) -> list[Any]:
    """
    The entries of a log, without its header; none of a file that is missing.

    Raises:
        ValueError: a line is not JSON, or the header is another one (`OtherHeader`).
    """
    entries = []
    for number, line in enumerate(whole_lines(file).splitlines(), 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not valid JSON ({error})") from error
    if header is None:
        return entries
    here = json.loads(json.dumps(header))
    if entries:
        there, *entries = entries
    else:
        there = file.read_bytes() if file.exists() else b""
        there = here if json.dumps(header).encode().startswith(there) else there.decode(errors="replace")
    if there != here:
        raise OtherHeader(file, there, here)
    return entries


def whole_lines(file: Path) -> bytes:
    """The content without a last line that was cut off."""
    content = file.read_bytes() if file.exists() else b""
    return content[: content.rfind(b"\n") + 1]
