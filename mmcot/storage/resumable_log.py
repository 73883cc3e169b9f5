"""A log of finished work, one JSON line for each piece. A killed call loses its current piece; the next call resumes.

The first line may be a header with the settings that determine the pieces; a log with another header is refused. If the
last line has no newline, the process was killed while writing it: the line is not read, and the next call removes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class OtherHeader(ValueError):
    """A log was started with other settings: `found` is its header, or its text if it has no complete line."""

    def __init__(self, file: Path, found: Any, expected: dict[str, Any]):
        super().__init__(f"{file} was started with {found}, not with {expected}.")
        self.found, self.expected = found, expected


class ResumableLog:
    """
    Args:
        file: created if missing; otherwise its complete lines are kept and new lines are appended.
        header: the settings; None if the log does not record them.

    Raises:
        ValueError: the file is not such a log, or has another header (`OtherHeader`). The file is not changed.
    """

    def __init__(self, file: Path, header: Mapping[str, Any] | None = None):
        self.entries = read_log(file, header)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = complete_lines(file)
        self.lines = file.open("ab")
        self.lines.truncate(len(content))
        if header is not None and not content:
            self.append(header)

    def append(self, *entries: Any) -> None:
        self.lines.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
        self.lines.flush()

    def close(self) -> None:
        self.lines.close()


def read_log(file: Path, header: Mapping[str, Any] | None = None) -> list[Any]:
    """
    Return the entries of a log, without its header. A missing file has no entries.

    Raises:
        ValueError: a line is not JSON, or the header differs (`OtherHeader`).
    """
    entries = []
    for number, line in enumerate(complete_lines(file).splitlines(), 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not valid JSON ({error})") from error
    if header is None:
        return entries
    expected = json.loads(json.dumps(header))
    if entries:
        found, *entries = entries
    else:
        # A kill may have left only the beginning of the header, which is no other header.
        found = file.read_bytes() if file.exists() else b""
        found = expected if json.dumps(header).encode().startswith(found) else found.decode(errors="replace")
    if found != expected:
        raise OtherHeader(file, found, expected)
    return entries


def complete_lines(file: Path) -> bytes:
    """Return the content of a file up to its last newline."""
    content = file.read_bytes() if file.exists() else b""
    return content[: content.rfind(b"\n") + 1]
