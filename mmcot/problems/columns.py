"""A row as people have it -> the columns of the schema: other names, empty cells, numbers that pandas made floats.

Nothing is read from disk here, and no value is found right or wrong beyond its form: `problems.check_fields` does that.
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

from mmcot.problems.schema import FEATURES, LIST_COLUMNS, shown

logger = logging.getLogger(__name__)

# Names that are read beside the schema's own, which become one of those.
ALIASES = {"hint": "context", "image": "images"}
KNOWN = (*FEATURES, *ALIASES)
# What pandas and others write into a cell of a text file where there is nothing.
EMPTY_CELLS = {"", "nan", "NaN", "NaT", "<NA>"}


@cache
def log_once(logger: logging.Logger, message: str) -> None:
    """A source is read once a split, and what there is to say of it is said once."""
    logger.warning(message)


def is_absent(value: Any) -> bool:
    """Whether a table has nothing there: None, NaN, pandas' NA and NaT."""
    return (
        value is None
        or type(value).__name__ in ("NAType", "NaTType")
        or (isinstance(value, Real) and math.isnan(value))
    )


def parse_columns(columns: str | Mapping[str, str] | None) -> dict[str, str]:
    """
    `question=query,image=img`, or such a mapping, ours = theirs.

    Raises:
        ValueError: another form, or a column that problems do not have.
    """
    if isinstance(columns, str):
        pairs = [pair.partition("=") for pair in columns.split(",")]
        if any(not (ours.strip() and theirs.strip()) for ours, _, theirs in pairs):
            raise ValueError(f"columns is {columns!r}; expected OURS=THEIRS,… as question=query,image=img.")
        columns = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    for ours in columns or {}:
        if ours not in KNOWN:
            raise ValueError(f"columns names {ours!r}, which problems do not have; known: {', '.join(KNOWN)}.")
    return dict(columns or {})


@dataclass
class Plan:
    """
    Which columns of a source are read, and as what.

    Args:
        source: by name, for errors.
        names: theirs by ours.
        keep: columns that are kept under their own names beside the schema's, as texts.
        are_cells: whether the rows are of a text file, in which a list is JSON and a number is a text.
        labels: of columns that hold numbers of classes, the classes' names.
    """

    source: str
    names: dict[str, str]
    keep: tuple[str, ...] = ()
    are_cells: bool = False
    labels: dict[str, list[str]] = field(default_factory=dict)

    def row(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """
        Those of our columns in which the row has something, and the kept ones.

        Raises:
            ValueError: a value in a form that cannot be read, or one that is given twice.
        """
        row = {}
        for ours, theirs in self.names.items():
            value = raw.get(theirs)
            if ours != "answer" and theirs in self.labels and isinstance(value, int):
                value = self.labels[theirs][value] if value >= 0 else None
            value = from_cell(ours, value, where) if self.are_cells else value
            if not is_absent(value):
                row[ours] = value
        kept = {name: as_class(raw.get(name), name, where) for name in self.keep}
        return unified(row, where) | kept


def plan_columns(
    found: Mapping[str, str],
    source: str,
    columns: Mapping[str, str],
    keep: tuple[str, ...] = (),
    are_cells: bool = False,
    labels: Mapping[str, list[str]] | None = None,
) -> Plan:
    """
    Args:
        found: the source's columns, each with the place where it is first found.
        columns: ours = theirs, as the user says it.

    Raises:
        ValueError: a column that is asked for is not there, or one is nearly named as one of ours.
    """
    for name in (*columns.values(), *keep):
        if name not in found:
            raise ValueError(f"{source}: there is no column {name!r}; found {', '.join(found) or 'none'}.")
    said = {ALIASES.get(ours, ours) for ours in columns}
    own = {name: name for name in found if name in KNOWN and ALIASES.get(name, name) not in said}
    names = {**columns, **own}
    ignored = [name for name in found if name not in names.values() and name not in keep]
    for name in ignored:
        near = next((known for known in KNOWN if is_near(name, known)), None)
        if near is not None and name != "rationale":  # not a misspelled `rationales`, but what people call a solution
            raise ValueError(
                f"{found[name]}: unknown column {name!r} (did you mean {near!r}?). Rename it, or say it with "
                f"--columns {near}={name}."
            )
    if ignored:
        hint = "; a gold rationale is read as `solution`" if "rationale" in ignored else ""
        log_once(logger, f"{source}: columns that are not read: {', '.join(ignored)}{hint}")
    return Plan(source, names, keep, are_cells, dict(labels or {}))


def is_near(name: str, known: str) -> bool:
    """Whether a name is one of ours but for capitals, `_` or one letter (of short names any other one is)."""
    first, second = (text.lower().replace("_", "").replace(" ", "") for text in (name, known))
    if name == known or first == second:
        return name != known
    common = len(os.path.commonprefix([first, second]))  # noqa: RUF071 (by letters, as meant)
    first, second = first[common:], second[common:]
    is_one_letter = first[1:] == second[1:] or first[1:] == second or first == second[1:]
    is_swapped = first[:2] == second[1::-1] and first[2:] == second[2:]
    return len(known) > 3 and (is_one_letter or is_swapped)


def from_cell(column: str, text: Any, where: str) -> Any:
    """The value of a text file's cell: lists are JSON, an answer is a number."""
    if not isinstance(text, str) or text.strip() in EMPTY_CELLS:
        return None
    if column in LIST_COLUMNS:
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            values = None
        if not isinstance(values, list):
            raise ValueError(f'{where}: {column} is {shown(text)}; expected a JSON list, as ["red", "blue"].')
        return values
    if column == "answer":
        try:
            return float(text)
        except ValueError as error:
            raise ValueError(f"{where}: answer is {shown(text)}; expected the number of a choice, from 0.") from error
    return text


def unified(row: dict[str, Any], where: str) -> dict[str, Any]:
    """`hint` as `context`, `image` as `images`, a whole float as the integer that it is."""
    hint, image = row.pop("hint", None), row.pop("image", None)
    if hint:
        if row.get("context") and row["context"] != hint:
            raise ValueError(
                f"{where}: context is {shown(row['context'])} and hint is {shown(hint)}; expected one of them, or the "
                f"same text."
            )
        row["context"] = hint
    if image and image != {"bytes": None, "path": None}:
        if row.get("images"):
            raise ValueError(f"{where}: both image and images hold pictures; expected one of them.")
        if not isinstance(image, (str, Mapping)):
            raise ValueError(f"{where}: image is {shown(image)}; expected one picture (several are `images`).")
        row["images"] = [image]
    answer = row.get("answer")
    if isinstance(answer, float) and answer.is_integer():
        row["answer"] = int(answer)
    return row


def as_class(value: Any, column: str, where: str) -> str:
    """A value of a column that problems are counted by."""
    if is_absent(value):
        return ""
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: {column} is {shown(value)}; expected a text or a number.")
    return str(value)
