"""Selects problems of a split: by id, by the text of a column, or the first ones. It uses no model."""

import argparse
from collections.abc import Sequence

from datasets import Dataset

from mmcot.problems.schema import FEATURES, first_few, short_repr


def add_selection_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `select` to a command."""
    parser.add_argument("--ids", nargs="+", metavar="ID", help="only these problems")
    parser.add_argument(
        "--filter", action="append", default=[], metavar="COLUMN=TEXT", help="only problems with TEXT in COLUMN"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")


def select(
    problems: Dataset, ids: Sequence[str] | None = None, filters: Sequence[str] = (), limit: int | None = None
) -> Dataset:
    """
    Return the requested problems, in the order of the dataset.

    Args:
        ids: keep only problems with these ids.
        filters: `COLUMN=TEXT` each; a problem must match all of them.
        limit: keep only the first `limit` of the remaining problems.

    Raises:
        ValueError: an id or a column does not exist, or no problem remains.
    """
    if ids is not None:
        absent = sorted(set(ids) - set(problems["id"]))
        if absent:
            raise ValueError(f"--ids: {len(absent)} of {len(ids)} are not in this split: {first_few(absent)}.")
        requested = set(ids)
        problems = problems.select([row for row, name in enumerate(problems["id"]) if name in requested])
    for text in filters:
        problems = filter_by_column(problems, text)
    if limit is not None:
        if limit < 1:
            raise ValueError(f"--limit is {limit}; expected 1 or more.")
        problems = problems.select(range(min(limit, len(problems))))
    return problems


def filter_by_column(problems: Dataset, text: str) -> Dataset:
    """
    Return the problems that match `COLUMN=TEXT`.

    Raises:
        ValueError: there is no such column, or no problem matches.
    """
    column, separator, expected = text.partition("=")
    text_columns = [name for name, feature in FEATURES.items() if getattr(feature, "dtype", None) == "string"]
    if not separator or column not in text_columns:
        raise ValueError(f"--filter is {text!r}; expected COLUMN=TEXT with a COLUMN of {', '.join(text_columns)}.")
    rows = [row for row, value in enumerate(problems[column]) if value == expected]
    if not rows:
        found = first_few([short_repr(value) for value in sorted(set(problems[column]))])
        raise ValueError(f"--filter {text}: no problem has that {column}; there are {found}.")
    return problems.select(rows)
