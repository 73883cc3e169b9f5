"""Reads text files of rows: JSON lines, CSV and TSV. Each row comes with its place, for errors.

`columns.py` interprets the columns.
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmcot.problems.schema import short_repr

Rows = list[tuple[str, dict[str, Any]]]

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(file: Path) -> Rows:
    """
    Return the rows of a file.

    Raises:
        ValueError: the file does not exist, or a row cannot be read. The message names file, line and expected form.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file.")
    return list(READERS[file.suffix](file))


def jsonl_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file of JSON lines."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(BYTE_ORDER_MARK).strip()
            if not line:
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{where}: not valid JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: found {short_repr(row)}; expected a problem as a JSON object.")
            yield where, row


def csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a CSV or TSV file; cells are unconverted texts."""
    csv.field_size_limit(sys.maxsize)  # a context may be longer than 131,072 characters
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if None in row or None in row.values():
                    cells = len([value for name, value in row.items() if name is not None and value is not None])
                    cells += len(row.get(None, []))
                    raise ValueError(
                        f"{where}: {cells} cells; expected {len(reader.fieldnames)}, as in the first line."
                    )
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file}, line {reader.line_num + 1}: not a table in UTF-8 ({error}).") from error


READERS = {".jsonl": jsonl_rows, ".csv": csv_rows, ".tsv": csv_rows}
CELLS = (".csv", ".tsv")  # files in which each value is a text, and a list is JSON
