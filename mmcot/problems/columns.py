"""Converts a user's rows to the schema: renames columns, and reads empty cells and integers that pandas made floats.

This module reads nothing from disk and checks only the form of values: `schema.check_fields` checks the rest.
"""

import json
import logging
import math
import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from numbers import Real
from typing import Any

from mmcot.problems.schema import FEATURES, LIST_COLUMNS, short_repr

logger = logging.getLogger(__name__)

# Other names of columns of the schema, which are accepted too.
ALIASES = {"hint": "context", "image": "images"}
KNOWN_COLUMNS = (*FEATURES, *ALIASES)
# The cells that pandas and other libraries write into a text file for a missing value.
EMPTY_CELLS = {"", "nan", "NaN", "NaT", "<NA>"}


@cache
def log_once(logger: logging.Logger, message: str) -> None:
    """Log a warning once per process, because a source is read once for each split."""
    logger.warning(message)


def is_absent(value: Any) -> bool:
    """Whether a value of a table is missing: None, NaN, pandas' NA and NaT."""
    return (
        value is None
        or type(value).__name__ in ("NAType", "NaTType")
        or (isinstance(value, Real) and math.isnan(value))
    )


def parse_columns(columns: str | Mapping[str, str] | None) -> dict[str, str]:
    """
    Parse `question=query,image=img` (ours = theirs) into a mapping; a mapping is only checked.

    Raises:
        ValueError: the text has another form, or names a column that problems do not have.
    """
    if isinstance(columns, str):
        pairs = [pair.partition("=") for pair in columns.split(",")]
        if any(not (ours.strip() and theirs.strip()) for ours, _, theirs in pairs):
            raise ValueError(f"columns is {columns!r}; expected OURS=THEIRS,… such as question=query,image=img.")
        columns = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    for ours in columns or {}:
        if ours not in KNOWN_COLUMNS:
            raise ValueError(f"columns names {ours!r}, which problems do not have; known: {', '.join(KNOWN_COLUMNS)}.")
    return dict(columns or {})


@dataclass
class Plan:
    """
    The columns of a source that are read, and the columns of the schema that they become.

    Args:
        source: the name of the source, for errors.
        names: the names of the source's columns by the schema's names.
        extra_columns: columns beside the schema that are kept under their own names, as texts.
        are_cells: whether the rows come from a CSV or TSV file, where each value is a text and a list is JSON.
        labels: the names of the classes, for columns that contain class numbers.
    """

    source: str
    names: dict[str, str]
    extra_columns: tuple[str, ...] = ()
    are_cells: bool = False
    labels: dict[str, list[str]] = field(default_factory=dict)

    def row(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """
        Return the columns of the schema that have a value in the row, and the extra columns.

        Raises:
            ValueError: a value cannot be read, or a column is given twice, under two of its names.
        """
        row = {}
        for ours, theirs in self.names.items():
            value = raw.get(theirs)
            if ours != "answer" and theirs in self.labels and isinstance(value, int):
                value = self.labels[theirs][value] if value >= 0 else None
            value = from_cell(ours, value, where) if self.are_cells else value
            if not is_absent(value):
                row[ours] = value
        extra = {name: as_class(raw.get(name), name, where) for name in self.extra_columns}
        return resolve_aliases(row, where) | extra


def plan_columns(
    found: Mapping[str, str],
    source: str,
    columns: Mapping[str, str],
    extra_columns: tuple[str, ...] = (),
    are_cells: bool = False,
    labels: Mapping[str, list[str]] | None = None,
) -> Plan:
    """
    Return the plan to read a source.

    Args:
        found: the source's columns, each with the place of its first occurrence.
        columns: ours = theirs, as given by the user.
        extra_columns, are_cells, labels: as in [`Plan`].

    Raises:
        ValueError: a requested column is missing, or the name of a column looks like a misspelled name of the schema.
    """
    for name in (*columns.values(), *extra_columns):
        if name not in found:
            raise ValueError(f"{source}: there is no column {name!r}; found {', '.join(found) or 'none'}.")
    mapped = {ALIASES.get(ours, ours) for ours in columns}
    own = {name: name for name in found if name in KNOWN_COLUMNS and ALIASES.get(name, name) not in mapped}
    names = {**columns, **own}
    ignored = [name for name in found if name not in names.values() and name not in extra_columns]
    for name in ignored:
        near = next((known for known in KNOWN_COLUMNS if is_near(name, known)), None)
        if near is not None and name != "rationale":  # a common name for a solution, not a misspelled `rationales`
            raise ValueError(
                f"{found[name]}: unknown column {name!r} (did you mean {near!r}?). Rename it, or map it with "
                f"--columns {near}={name}."
            )
    if ignored:
        hint = "; a gold rationale is read from `solution`" if "rationale" in ignored else ""
        log_once(logger, f"{source}: columns that are not read: {', '.join(ignored)}{hint}")
    return Plan(source, names, extra_columns, are_cells, dict(labels or {}))


def is_near(name: str, known: str) -> bool:
    """
    Whether a name differs from a known one only by case, `_`, spaces, one letter or two swapped letters. Letters
    are not compared if the known name has at most three letters.
    """
    first, second = (text.lower().replace("_", "").replace(" ", "") for text in (name, known))
    if name == known or first == second:
        return name != known
    common = len(os.path.commonprefix([first, second]))  # noqa: RUF071 (compares letters, as intended)
    first, second = first[common:], second[common:]
    is_one_letter = first[1:] == second[1:] or first[1:] == second or first == second[1:]
    is_swapped = first[:2] == second[1::-1] and first[2:] == second[2:]
    return len(known) > 3 and (is_one_letter or is_swapped)


def from_cell(column: str, text: Any, where: str) -> Any:
    """
    Return the value of a cell in a text file: a list is JSON, an answer is a number, an empty cell is None.

    Raises:
        ValueError: the cell has another form.
    """
    if not isinstance(text, str) or text.strip() in EMPTY_CELLS:
        return None
    if column in LIST_COLUMNS:
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            values = None
        if not isinstance(values, list):
            raise ValueError(f'{where}: {column} is {short_repr(text)}; expected a JSON list such as ["red", "blue"].')
        return values
    if column == "answer":
        try:
            return float(text)
        except ValueError as error:
            raise ValueError(
                f"{where}: answer is {short_repr(text)}; expected the number of a choice, from 0."
            ) from error
    return text


def resolve_aliases(row: dict[str, Any], where: str) -> dict[str, Any]:
    """
    Return the row with `hint` as `context`, `image` as `images`, and a float such as 1.0 in `answer` as an integer.

    Raises:
        ValueError: a column and its alias have different values.
    """
    hint, image = row.pop("hint", None), row.pop("image", None)
    if hint:
        if row.get("context") and row["context"] != hint:
            raise ValueError(
                f"{where}: context is {short_repr(row['context'])} and hint is {short_repr(hint)}; expected one of "
                f"them, or the same text."
            )
        row["context"] = hint
    if image and image != {"bytes": None, "path": None}:
        if row.get("images"):
            raise ValueError(f"{where}: both image and images contain pictures; expected one of them.")
        if not isinstance(image, (str, Mapping)):
            raise ValueError(f"{where}: image is {short_repr(image)}; expected one picture (several are `images`).")
        row["images"] = [image]
    answer = row.get("answer")
    if isinstance(answer, float) and answer.is_integer():
        row["answer"] = int(answer)
    return row


def as_class(value: Any, column: str, where: str) -> str:
    """
    Return a value of an extra column as a text, by which problems are grouped.

    Raises:
        ValueError: the value is neither a text nor a number.
    """
    if is_absent(value):
        return ""
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: {column} is {short_repr(value)}; expected a text or a number.")
    return str(value)
